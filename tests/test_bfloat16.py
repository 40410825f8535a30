"""bfloat16 through the Triton kernels without a GPU.

Triton's interpreter multiplies bfloat16 as the integers that hold it, and cuts where a GPU rounds.
Both are put right here, so that what the kernels round, and where, is held to the error budget.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from factories import GPU, check_loss, check_sequence

interpreter = pytest.importorskip("triton.runtime.interpreter")
tl = pytest.importorskip("triton.language")


def widened(x: Any) -> Any:
    """The float32 values of bfloat16 data."""
    is_bfloat16 = x.dtype.scalar == tl.bfloat16
    return (x.data.astype(np.uint32) << 16).view(np.float32) if is_bfloat16 else x.data


@pytest.fixture(autouse=True)
def rounds_as_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if GPU:
        return
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    multiply, cast = builder.create_dot, builder.cast_impl

    def create_dot(self: Any, a: Any, b: Any, d: Any, *options: Any) -> Any:
        if a.dtype.scalar != tl.bfloat16:
            return multiply(self, a, b, d, *options)
        total = np.matmul(widened(a), widened(b), dtype=d.data.dtype) + d.data
        return handle(total, d.dtype.scalar)

    def cast_impl(self: Any, source: Any, kind: Any) -> Any:
        before, after = source.dtype.scalar, kind.scalar
        if before == tl.float32 and after == tl.bfloat16:
            values = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return handle(values.view(torch.int16).numpy().view(np.uint16), after)
        if before == tl.bfloat16 and after == tl.float32:
            return handle(widened(source), after)
        return cast(self, source, kind)

    monkeypatch.setattr(builder, "create_dot", create_dot)
    monkeypatch.setattr(builder, "cast_impl", cast_impl)
    for name in ("create_fp_ext", "create_fp_trunc"):
        monkeypatch.setattr(builder, name, lambda self, x, kind: self.cast_impl(x, kind))


BINNED: dict[str, Any] = {"attention": "candidate", "cosine": True, "attention_scale": 2.0}
CASES: dict[str, dict[str, Any]] = {
    "in-place": {"pages": 60, "clicked": 0.3},
    "both": {"direction": "both", "pages": 20},
    "none": {"reduction": "none", "pages": 20},
    "items": {"table": True, "pages": 20},
    "tau-0.02": {"tau": 0.02, "pages": 20},
    "chunks": {"dim": 300, "pages": 10},
    "candidate": {"attention": "candidate", "pages": 8},
    "candidate-heads": {"attention": "candidate", "num_heads": 4, "projected": True, "pages": 8},
    "candidate-projected": BINNED | {"projected": True, "pages": 8},
    "binned": BINNED | {"pages": 20},
    "binned-items": BINNED | {"table": True, "tensor_tau": True, "pages": 12},
    "binned-sharp": BINNED | {"attention_scale": 20.0, "tau": 0.02, "pages": 12},
    "binned-long": BINNED | {"longest_history": 80, "pages": 5},
    "binned-dot": {"attention": "candidate", "pages": 20},
    "binned-dot-items": {"attention": "candidate", "table": True, "pages": 12},
    "binned-dot-sharp": {"attention": "candidate", "attention_scale": 20.0, "pages": 12},
    "binned-dot-dim-300": {"attention": "candidate", "dim": 300, "pages": 6},
}


@pytest.mark.long("kernels case by case", short=("both", "none", "candidate", "binned"))
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str) -> None:
    check_loss("triton", draws=2, **({"dim": 32, "dtype": torch.bfloat16} | CASES[case]))


def test_click_sequence() -> None:
    check_sequence("triton", draws=2, dim=32, pages=12, dtype=torch.bfloat16)
