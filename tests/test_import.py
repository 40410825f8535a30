"""`import courier_fast` is light, and works where Triton, a GPU or the native library are
missing."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest


def python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_import_is_light_and_quick() -> None:
    out = python(
        """
        import sys, time
        import torch
        before = set(sys.modules)
        start = time.perf_counter()
        import courier_fast
        courier_fast.reconstruction_loss  # which imports what there is to import
        print(time.perf_counter() - start)
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        heavy = {"triton", "xformers", "numba", "pandas", "polars", "nvidia", "torchvision"}
        print(*sorted(new & heavy))
        print(*[name for name in sys.modules if name.startswith("courier_fast.kernels")])
        """
    ).splitlines()
    assert float(out[0]) < 1
    assert out[1:] == ["", ""]  # no heavy module, no implementation


@pytest.mark.long("whole commands", short=("courier_fast._native",))
@pytest.mark.parametrize("missing", ["triton", "courier_fast._native"])
def test_works_without(missing: str) -> None:
    out = python(
        f"""
        import sys
        sys.modules[{missing!r}] = None  # import fails
        import torch, courier_fast as cf
        from courier_fast.loss import operators
        pv, history = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
        clicked = torch.ones(2, 3, dtype=torch.bool)
        print(bool(torch.isfinite(cf.reconstruction_loss(pv, history, clicked))))
        print(bool(torch.isfinite(cf.click_sequence_loss(history))))
        impl = "triton" if {missing!r} == "triton" else "cpu"
        try:
            cf.reconstruction_loss(pv, history, clicked, impl=impl)
        except RuntimeError as error:
            print(error)
        """
    ).splitlines()
    assert out[:2] == ["True", "True"]
    assert missing in out[2]


def test_public_names() -> None:
    import courier_fast

    for name in courier_fast.__all__:
        assert getattr(courier_fast, name).__doc__
    assert courier_fast.__version__
