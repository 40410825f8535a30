"""Every launch as a GPU would see it, without one: what Triton makes of its arguments, its
compiler, shared memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

pytest.importorskip("triton", reason="Triton is not installed")
if not sys.platform.startswith("linux"):
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)


def worker(*what: str, **environment: str) -> Any:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(HERE / "dry_run_worker.py"), *what],
        env=inherited | environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


# Triton's default, which changes between versions, turned off: what is launched asks for it all the
# same.
@pytest.mark.long("GPU targets")
@pytest.mark.parametrize("what", ["sizes", "paths"])
def test_what_a_gpu_would_compile_compiles(what: str) -> None:
    found = worker(what, TRITON_DEFAULT_FP_FUSION="0")
    assert len(found) > 100
    wrong = [x for x in found if x["error"] or x["shared"] > x["limit"] or not x["fp_fusion"]]
    assert not wrong, "\n".join(map(str, wrong[:10]))
    if what == "paths":  # else the limit would hold for anything
        assert max(x["shared"] for x in found if x["kernel"] == "contrast") > 90_000


# Of attention for each candidate: the kernels of its forward pass (0), and of its gradients (1).
CANDIDATE = {"own_scores": 0, "candidate_scores": 0, "candidate_columns": 1, "candidate_history": 1}


@pytest.mark.long("GPU targets")
# Each capability (87 is as 80, 89 and 12.x as 86), type and dimension, both sides of each limit.
@pytest.mark.parametrize(
    ("capability", "kind", "dim"),
    [
        (80, "float32", 512),
        (80, "bfloat16", 1024),
        (86, "float32", 256),
        (86, "float16", 512),
        (90, "bfloat16", 512),
        (100, "tf32", 1024),
    ],
)
def test_what_is_said_of_shared_memory_is_what_compiles(
    capability: int, kind: str, dim: int
) -> None:
    """What `unavailable_reasons` lets pass can be launched, every kernel of it; what it refuses
    cannot be."""
    found = worker("memory", str(capability), kind, str(dim))
    most = [0, 0]
    for x in found["launches"]:
        assert not x["error"], x
        if x["kernel"] in CANDIDATE:
            which = CANDIDATE[x["kernel"]]
            most[which] = max(most[which], x["shared"])
        else:
            assert x["shared"] <= x["limit"], x
    limit = found["launches"][0]["limit"]
    for said, shared in zip(found["said"], most, strict=True):
        assert shared > 0
        # Up to 256 dimensions there is room, and blocks are loaded ahead.
        assert dim <= 256 or shared <= said
        assert (said <= limit) == (shared <= limit)


def test_products_of_heads_and_rows_have_64_bits() -> None:
    """Of 16 heads and 45 million items they are above 2^31."""
    programs = worker("heads")
    assert len(programs) == 3
    for program in programs:
        assert re.search(r"arith\.extsi %capacity\w* : i32 to i64", program)
        assert not re.search(r"arith\.muli [^\n]*%capacity\w*[^\n]* : i32", program)


def test_sizes_do_not_compile_anew() -> None:
    """13 launches a step; what is decided by size (in place or not) adds a few, sizes themselves
    nothing."""
    counts = worker("ragged")
    assert counts[0] >= 10
    assert counts[-1] <= 16
