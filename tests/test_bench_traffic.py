"""bench.traffic: every kernel of a step has a count of bytes, and the counts fit the tensors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end: the installed package comes before the source tree

pytest.importorskip("triton", reason="Triton is not installed")

from bench import traffic  # noqa: E402
from bench.problems import SHAPES  # noqa: E402

# In a process of its own: in one with TRITON_INTERPRET=1, kernels cannot be told from helpers.
WORKER = """
import json, sys
from dataclasses import asdict, replace
sys.path.append(sys.argv[1])
import torch
from bench import traffic
from bench.problems import SHAPES
from courier_fast.testing.batches import Shape
found = {}
every = replace(SHAPES["paper"], clicked=1.0)
s = traffic.sizes(every)
for x in traffic.walk(s):
    tensors = {}
    for name, t in x.arguments.items():
        if isinstance(t, torch.Tensor):
            # Dummies are integers where rows of D are meant; a storage counts once.
            tensors[id(t.untyped_storage())] = t.numel() * t.element_size()
    found[x.name] = sum(tensors.values())
tables = {n: traffic.table(SHAPES[n]) for n in ("paper", "big20", "big100")}
print(json.dumps({"sizes": asdict(s), "tensors": found, "tables": tables}))
"""


@pytest.fixture(scope="module")
def walked() -> dict[str, Any]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", WORKER, str(ROOT)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def test_every_kernel_of_a_step_has_a_count(walked: dict[str, Any]) -> None:
    for rows in walked["tables"].values():
        assert {r["kernel"] for r in rows} == set(traffic.BYTES)
        assert sum(r["launches"] for r in rows) == 13


def test_counts_fit_the_tensors(walked: dict[str, Any]) -> None:
    """Where every item is clicked, a kernel touches its tensors whole: once, or once to read and
    once to write."""
    sizes = traffic.Sizes(**walked["sizes"])
    for name, held in walked["tensors"].items():
        counted = traffic.BYTES[name](sizes)
        twice = 2 if name in ("attend_dq", "pv_gradient") else 1  # in place
        assert counted <= 1.01 * twice * held, name
    rows = sizes.rows * sizes.dim * 2
    assert traffic.BYTES["normalize_rows"](sizes) == 2 * rows + 4 * sizes.rows
    assert traffic.BYTES["normalize_rows"](sizes) <= walked["tensors"]["normalize_rows"]
    kept = sizes.history * sizes.dim * 2
    assert traffic.BYTES["attend_dkv"](sizes) == pytest.approx(2 * kept + 2 * rows, rel=0.02)


def test_parts_of_the_forward_pass() -> None:
    """24 row tiles on 132 multiprocessors: five programs a tile. 103 of them: shares that end
    within tiles."""

    def launch(stream: bool) -> traffic.Noted:
        values = {"BLOCK_M": 128, "BLOCK_N": 64, "programs": 132, "STREAM": stream}
        return traffic.Noted("contrast forward", (132,), values)

    assert traffic.parts(traffic.sizes(SHAPES["paper"]), launch(True)) == 5
    big = traffic.sizes(SHAPES["big20"])
    assert traffic.parts(big, launch(False)) == 1
    assert 2 < traffic.parts(big, launch(True)) < 3


def test_the_table(walked: dict[str, Any]) -> None:
    text = traffic.markdown(walked["tables"])
    lines = text.splitlines()
    assert lines[0] == "| kernel | launches | paper: MB, us | big20: MB, us | big100: MB, us |"
    total = next(x for x in lines if x.startswith("| **all** |"))
    assert "| 13 |" in total
    moved = sum(r["bytes"] for r in walked["tables"]["paper"])
    assert f"{moved / 1e6:,.1f}, " in total
