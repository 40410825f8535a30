"""tests/gate.py: two runs agree, and what differs is named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gate
import pytest


@pytest.mark.numpy_products
def test_a_changed_digest_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old, few = tmp_path / "old.json", ["--part", "losses", "--problem", "plain"]
    assert gate.main([str(old), *few]) == 0
    found = json.loads(old.read_text())
    plain = gate.losses(["plain"])  # of a process with other memory and threads
    assert found["losses"] == plain
    assert {"loss, triton, float32, plain: pv", "loss, cpu, float32, plain: output"} <= set(plain)
    capsys.readouterr()
    assert gate.compared(found, found, strict=True)
    assert capsys.readouterr().out == f"losses: 0 differ of {len(plain)}\n"
    other = {**found, "losses": plain | {"loss, cpu, float32, plain: pv": "another"}}
    assert not gate.compared(other, found, strict=False)
    assert "losses: loss, cpu, float32, plain: pv: another -> " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": {"loop": {"LDS": 1}}}, {"a": {"loop": {}}}, ["a, loop, LDS: 1 -> not there"]),
        ({"a": 1, "b": 2}, {"a": 1}, ["b: 2 -> not there"]),
        ({}, {"b": None}, ["b: not there -> None"]),
    ],
)
def test_what_differs(old: Any, new: Any, lines: list[str]) -> None:
    assert gate.differences(old, new) == lines


def test_times_count_where_they_are_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    old, new = ({"about": {"torch": t}, "host": {"plain": s}} for t, s in (("1", 1.0), ("2", 1.2)))
    assert gate.compared(old, new, strict=False)
    assert not gate.compared(old, new, strict=True)
    assert gate.compared(new, old, strict=True)
    out = capsys.readouterr().out
    assert "about: torch: 1 -> 2\nhost: plain: 1.20 SLOWER\n" in out
    assert "host: plain: 0.83\n" in out
    assert gate.compared(old, {"about": {}, "memory": {}}, strict=True)
    assert "memory: in one of the two only, not compared" in capsys.readouterr().out
