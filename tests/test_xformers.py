"""impl="xformers" without xformers and a GPU: the reasons, and the gathering around a stand-in."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from factories import Budget, make, results, upstream_for, with_gradients, yardstick
from torch import Tensor

from courier_fast.kernels import xformers
from courier_fast.loss import operators, reference
from courier_fast.loss.problem import Needs, Problem


def block_mask(bias: Any) -> Tensor:
    """[n, k] bool."""
    pv, history = (torch.arange(len(x)).repeat_interleave(torch.tensor(x)) for x in bias.lengths)
    return pv[:, None] == history


def check(*tensors: Tensor) -> None:
    for x in tensors:
        assert x.dim() == 4
        assert x.shape[0] == 1
        assert x.shape[-1] % 8 == 0, "xformers wants aligned rows"
        assert x.isfinite().all(), "padding reached xformers"


def weights_of(q: Tensor, k: Tensor, bias: Any, scale: float) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    return scores.masked_fill(~block_mask(bias), -torch.inf).softmax(-1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, *, attn_bias: Any, scale: float
) -> tuple[Tensor, Tensor]:
    check(q, k, v)
    a = weights_of(q, k, attn_bias, scale)
    return torch.einsum("bhqk,bkhd->bqhd", a, v), torch.zeros(1)


def backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_bias: Any,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    check(grad, out, q, k, v)
    a = weights_of(q, k, attn_bias, scale)
    da = torch.einsum("bqhd,bkhd->bhqk", grad, v)
    ds = a * (da - (da * a).sum(-1, keepdim=True)) * scale
    dq, dk = torch.einsum("bhqk,bkhd->bqhd", ds, k), torch.einsum("bhqk,bqhd->bkhd", ds, q)
    return dq, dk, torch.einsum("bhqk,bqhd->bkhd", a, grad)


class BlockDiagonalMask:
    def __init__(self, lengths: list[list[int]]) -> None:
        self.lengths = lengths

    @classmethod
    def from_seqlens(
        cls, q: list[int], kv: list[int], *, device: torch.device
    ) -> BlockDiagonalMask:
        assert len(q) == len(kv)
        assert all(type(n) is int and n > 0 for n in q + kv), (
            "a sequence of length zero reached xformers"
        )
        return cls([q, kv])


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that looks like xformers and computes the same attention in plain PyTorch."""
    fmha = SimpleNamespace(
        BlockDiagonalMask=BlockDiagonalMask,
        memory_efficient_attention_forward_requires_grad=forward,
        memory_efficient_attention_backward=backward,
    )
    package, operators = ModuleType("xformers"), ModuleType("xformers.ops")
    operators.fmha = fmha  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "xformers", package)
    monkeypatch.setitem(sys.modules, "xformers.ops", operators)


def make_problem(case: str, dtype: torch.dtype = torch.float32, dim: int = 12) -> Problem:
    """Pages without PV items, without history, with neither; padding holds NaN."""
    options: dict[str, Any] = {case: True} if case in ("table", "weights") else {}
    return make(
        3,
        pages=30,
        longest_pv=5,
        longest_history=6,
        dim=dim,
        dtype=dtype,
        mask=True,
        projected=case == "projections",
        clicked=0.6,
        tau=0.2,
        attention_scale=0.7,
        num_heads=3 if case == "heads" else 1,
        direction="both" if case == "both" else "reconstruct",
        reduction="none",
        **options,
    )


INPUTS = ("pv", "history", "query", "key", "value")
CASES = ("plain", "table", "projections", "heads", "weights", "both")


@pytest.mark.parametrize("case", CASES)
def test_reconstruct_and_its_gradients(stand_in: None, case: str) -> None:
    p = with_gradients(make_problem(case), INPUTS)
    needs = Needs(*(getattr(p, name) is not None for name in INPUTS))
    judged = yardstick(lambda q: reference.reconstruct(q)[0], p, INPUTS)
    with torch.no_grad():
        r = xformers.reconstruct_forward(p)
        grads = xformers.reconstruct_backward(p, needs, upstream_for(r))
    fused = {name: x for name, x in vars(grads).items() if x is not None} | {"output": r}
    assert set(fused) == set(judged.exact)
    budget = Budget(torch.float32)
    budget.add(judged, fused)
    budget.check()


def test_no_page_with_both_gives_zeros(stand_in: None) -> None:
    p = make_problem("plain")
    p.pv_offsets = torch.tensor([0, 3, 3])
    p.history_offsets = torch.tensor([0, 0, 4])
    assert not xformers.reconstruct_forward(p).any()
    needs = Needs(pv=True, history=True)
    grads = xformers.reconstruct_backward(p, needs, torch.ones_like(p.pv)).present()
    assert [x.shape for x in grads] == [p.pv.shape, p.history.shape]
    assert not any(x.any() for x in grads)


@pytest.mark.parametrize("case", CASES)
def test_loss_and_its_gradients(stand_in: None, case: str) -> None:
    pytest.importorskip("triton")
    from courier_fast.kernels.triton import tiles

    if not tiles.interpreted():
        pytest.skip("the Triton kernels run on the CPU in the interpreter only: TRITON_INTERPRET=1")
    p = make_problem(case, dim=16 if case != "heads" else 18)
    p = with_gradients(p, INPUTS)
    budget = Budget(torch.float32)
    fused = results(lambda q: operators.loss(q, "xformers", False)[0], p, INPUTS)
    budget.add(yardstick(lambda q: reference.reconstruction_loss(q).loss, p, INPUTS), fused)
    budget.check()


def test_every_reason_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("xformers", "xformers.ops", "triton", "courier_fast.kernels.triton.loss"):
        monkeypatch.setitem(sys.modules, name, None)  # type: ignore[arg-type]
    monkeypatch.delattr("courier_fast.kernels.triton.loss", raising=False)
    p = make_problem("plain", torch.float64, dim=2048)
    reasons = "\n".join(operators.unavailable_reasons("xformers", p))
    for part in ("no CUDA device", "xformers is not installed", "Triton", "float64", "2048"):
        assert part in reasons, reasons


def test_a_wheel_for_another_torch_is_named(
    monkeypatch: pytest.MonkeyPatch, stand_in: None
) -> None:
    library = SimpleNamespace(_cpp_library_load_exception=OSError("built for PyTorch 2.0"))
    monkeypatch.setitem(sys.modules, "xformers._cpp_lib", library)  # type: ignore[arg-type]
    reasons = "\n".join(operators.unavailable_reasons("xformers", make_problem("plain")))
    assert "built for PyTorch 2.0" in reasons
