"""What the Triton pipeline allocates over its inputs, and how often it launches, at the shapes that
people train on."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

MIB = 2**20
# (pages, items of a page, history rows, D, gradients): most MiB over the inputs and gradients,
# launches.
SHAPES = {
    "paper": ((3072, 5, 16_896, 256, True), 48, 13),
    "history-50": ((3072, 5, 78_336, 256, True), 48, 13),
    "65,535 rows": ((13_107, 5, 137_623, 256, True), 160, 13),
    "65,535 rows, no gradient": ((13_107, 5, 137_623, 256, False), 100, 7),
    "65,535 rows, D = 768": ((13_107, 5, 137_623, 768, True), 1536, None),
    # dL/dx of a chunk of candidates: 256 of it.
    "candidate": ((3072, 5, 16_896, 256, True, "candidate"), 368, None),
    "candidate, no gradient": ((3072, 5, 16_896, 256, False, "candidate"), 40, None),
    "262,145 rows": ((52_429, 5, 550_504, 256, True), 2048, 13),
}


@functools.cache
def walked() -> dict[str, dict[str, Any]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    cases = json.dumps([case for case, _, _ in SHAPES.values()])
    worker = Path(__file__).parent / "memory_worker.py"
    run = subprocess.run(
        [sys.executable, str(worker), cases],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return dict(zip(SHAPES, json.loads(run.stdout), strict=True))


@pytest.mark.parametrize("shape", SHAPES)
def test_memory_and_launches(shape: str) -> None:
    case, limit, launches = SHAPES[shape]
    found = walked()[shape]
    rows, dim = case[0] * case[1], case[3]
    # At least the unit rows of both sides, which everything is computed from.
    assert 2 * rows * dim * 2 <= found["extra"] <= limit * MIB
    if launches is not None:
        assert found["launches"] == launches
        assert not found["others"]
