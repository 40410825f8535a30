"""Every launch as a GPU would see it, without one: what Triton makes of its arguments, its
compiler, shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

pytest.importorskip("triton", reason="Triton is not installed")
if not sys.platform.startswith("linux"):
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)


def worker(what: str, **environment: str) -> Any:
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, str(HERE / "dry_run_worker.py"), what],
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


def test_sizes_do_not_compile_anew() -> None:
    """13 launches a step; what is decided by size (in place or not) adds a few, sizes themselves
    nothing."""
    counts = worker("ragged")
    assert counts[0] >= 10
    assert counts[-1] <= 16
