"""Every Triton kernel compiles for GPUs that need not be there; sums stay in registers on sm_90."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CAPABILITIES = (80, 90, 100)
# Bytes of shared memory a block can have: a kernel that wants more compiles, but cannot start.
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
HERE = Path(__file__).parent

pytest.importorskip("triton", reason="Triton is not installed")
if not sys.platform.startswith("linux"):
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from courier_fast.kernels.configs import compile_cases  # noqa: E402

CASES = {case.name: case for case in compile_cases()}


@functools.cache
def compiled(which: str) -> dict[tuple[str, int], dict[str, Any]]:
    """What came out of each case on each capability; Triton's own cache makes later runs short."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        str(HERE / "compile_worker.py"),
        which,
        str(min(2, os.cpu_count() or 1)),
    ]
    run = subprocess.run(
        command + [str(c) for c in CAPABILITIES],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return {(result["name"], result["capability"]): result for result in json.loads(run.stdout)}


def test_detects_spills_and_wgmma() -> None:
    own = compiled("own")
    assert own["fits", 90]["error"] is None
    assert own["fits", 90]["wgmma"]
    assert own["fits", 90]["spilled"] == 0
    assert not own["fits", 80]["wgmma"]
    assert own["spills", 90]["spilled"] > 0


def test_case_names_are_unique() -> None:
    assert len(CASES) == len(compile_cases())


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("name", CASES)
def test_kernel_compiles(name: str, capability: int) -> None:
    result = compiled("package")[name, capability]
    assert result["error"] is None, result["error"]
    assert result["shared"] <= SHARED_MEMORY[capability]
    if capability == 90 and CASES[name].must_not_spill:
        assert result["spilled"] == 0, (
            f"{result['spilled']} bytes on the stack with {result['registers']} registers"
        )
    if capability == 90 and CASES[name].needs_wgmma:
        assert result["wgmma"], "no wgmma in the PTX: the product runs on the slower instructions"
