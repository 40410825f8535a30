"""bench.processes: what the collectives are given is what the formula says, and the report says
both."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end: the installed package comes before the source tree

from bench import processes  # noqa: E402
from bench.processes import Case, predicted  # noqa: E402


@pytest.mark.parametrize(
    ("case", "size", "expected"),
    [
        (Case("anchor", "gather"), 1, [0, 0]),
        # a header of 64; 100 rows of 8 numbers of 2 bytes; 21 anchors with 12 bytes more
        (Case("anchor", "gather"), 4, [3 * (64 + 100 * 16), 3 * 21 * 28]),
        (Case("anchor", "gather", ids=True), 4, [3 * (64 + 100 * 24), 3 * 21 * 36]),
        # four rounds of 25 rows; of 6 anchors, the last of which carries 3
        (Case("anchor", "ring"), 4, [3 * (64 + 100 * 16), 3 * 24 * 28]),
        (Case("candidate", "gather"), 2, [64 + 100 * 16, 100 * 16 + 100 * 32]),
    ],
    ids=str,
)
def test_formula(case: Case, size: int, expected: list[int]) -> None:
    assert predicted(case, size, rows=100, anchors=21, dim=8, element=2) == expected


def test_formula_where_the_host_knows_no_counts() -> None:
    found = predicted(Case("anchor", "gather"), 2, rows=100, anchors=21, dim=8, element=2, gpu=True)
    assert found == [64 + 100 * (16 + 4), 100 * (16 + 12)]


@pytest.mark.long("several processes")
def test_counts_are_those_of_the_formula(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "processes.json"
    asked = "--device cpu --processes 1 2 --pages 12 --dim 16 --repeats 2 --json"
    assert processes.main([*asked.split(), str(out)]) == 0
    result = json.loads(out.read_text())
    assert [row["processes"] for row in result["rows"]] == [1] * 5 + [2] * 5
    for row in result["rows"]:
        assert row["bytes"] == row["predicted"]
        assert all(row["bytes"]) == (row["processes"] == 2)
        assert (row["hidden"] is None) == (row["processes"] == 1)
        assert row["seconds"]["step"] > 0
    printed = capsys.readouterr().out
    assert "they say nothing of scaling" in printed
    assert len(printed.splitlines()) == 16
