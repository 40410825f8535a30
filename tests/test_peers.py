"""Failures that users of similar packages reported, by name: none of them here."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from factories import (
    DEVICES,
    LOSS_INPUTS,
    Budget,
    check_loss,
    loss_yardstick,
    make,
    results,
    skip_unless_available,
)
from torch import Tensor

import courier_fast as cf
from courier_fast.loss import operators, reference
from courier_fast.loss.problem import Problem

IMPLS = ("cpu", "triton")


def run(impl: str, p: Problem) -> dict[str, Tensor]:
    skip_unless_available(impl, p)
    return results(lambda q: operators.loss(q, impl, False)[0], p, LOSS_INPUTS)


@pytest.mark.parametrize("impl", IMPLS)
def test_reduction_none_uses_each_rows_own_gradient(impl: str) -> None:
    """Liger-Kernel #968, #1298: every gradient was scaled by grad_output[0]."""
    check_loss(
        impl, reduction="none", draws=3
    )  # the budget's upstream gradient differs from row to row


@pytest.mark.parametrize("impl", IMPLS)
def test_bias_path_with_negative_losses(impl: str) -> None:
    """ml-cross-entropy #52: with biases of either sign (log_q) scores of positives are above 1/tau,
    and gradients went wrong."""
    g = torch.Generator().manual_seed(1)
    p = make(2, impl=impl, pages=14)
    bias = torch.full((p.num_pv,), 9.0)
    assert p.clicked is not None
    bias[p.clicked.cpu()] = -9 + torch.rand(int(p.clicked.sum()), generator=g)
    p = replace(p, log_q=bias.to(p.pv.device), reduction="none")
    budget = Budget(p.pv.dtype)
    budget.add(loss_yardstick(p), run(impl, p))
    budget.check()


@pytest.mark.parametrize(
    ("impl", "dtype"), [("cpu", torch.bfloat16), ("triton", torch.float16)], ids=str
)
def test_gradients_of_many_chunks_are_summed_in_float32(
    monkeypatch: pytest.MonkeyPatch, impl: str, dtype: torch.dtype
) -> None:
    """siglip-kernel and ml-cross-entropy #14, #18: gradients accumulated across chunks in the input
    type."""
    if impl == "triton":
        configs = pytest.importorskip("courier_fast.kernels.triton.tiles")
        monkeypatch.setattr(configs, "LARGEST_REGISTER_DIM", 8)
    check_loss(
        impl, dtype=dtype, pages=40, longest_history=3, dim=16, workspace=1, clicked=0.9, draws=2
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("impl", IMPLS)
def test_confident_positives_keep_their_gradient(impl: str, dtype: torch.dtype) -> None:
    """Liger-Kernel #1419: p - 1 of a confident positive was lost to bfloat16 rounding."""
    if impl == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available():
        pytest.skip("bfloat16 products are wrong in Triton's interpreter")
    g = torch.Generator().manual_seed(3)
    e = torch.eye(8)[:, None] * 3 + 0.02 * torch.randn(8, 1, 8, generator=g)
    device = DEVICES[impl]
    p = make(0, pages=1)
    rows = e.reshape(8, 8).to(dtype)
    p = replace(
        p,
        pv=rows.to(device).requires_grad_(),
        history=(rows + 0.01 * torch.randn(8, 8, generator=g).to(dtype))
        .to(device)
        .requires_grad_(),
        pv_offsets=torch.arange(9, device=device),
        history_offsets=torch.arange(9, device=device),
        clicked=torch.ones(8, dtype=torch.bool, device=device),
        attention_scale=8**-0.5,
        tau=0.1,
    )
    skip_unless_available(impl, p)
    judged = loss_yardstick(p)
    found = run(impl, p)
    assert 0 < float(judged.exact["output"]) < 0.01  # p of the positive is above 0.99
    budget = Budget(dtype)
    budget.add(judged, found)
    budget.check()
    for name in ("pv", "history"):
        assert found[name].any()


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_masks_do_not_make_the_temperatures_gradient_nan(impl: str) -> None:
    """NVIDIA-NeMo/Automodel #3850: -inf before the division by tau, finite loss and NaN gradient of
    tau."""
    p = make(
        1,
        impl="cpu" if impl == "reference" else impl,
        tensor_tau=True,
        ids=True,
        negatives="page",
        mask=True,
    )
    if impl != "reference":
        skip_unless_available(impl, p)
    loss = (
        reference.reconstruction_loss(p).loss
        if impl == "reference"
        else operators.loss(p, impl, False)[0]
    )
    (grad,) = torch.autograd.grad(loss, [p.temperature])
    assert grad.isfinite()
    assert grad != 0


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_fully_masked_batch(impl: str) -> None:
    """Liger-Kernel #177, Automodel #3796: ZeroDivisionError or NaN where everything is masked."""
    device = DEVICES.get(impl, "cpu")
    pv, history = (
        torch.full((3, 4, 8), torch.nan, device=device, requires_grad=True) for _ in range(2)
    )
    nothing = torch.zeros(3, 4, dtype=torch.bool, device=device)
    if impl == "cpu":
        pytest.importorskip("courier_fast._native")
    loss = cf.reconstruction_loss(
        pv, history, ~nothing, pv_mask=nothing, history_mask=nothing, impl=impl
    )
    loss.backward()
    assert float(loss.detach()) == 0
    assert pv.grad is not None
    assert not pv.grad.any()


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_rows_beyond_the_last_offset(impl: str) -> None:
    """pytorch #188933, flash-attention #2324: NaN gradients for rows past the last offset."""
    device = DEVICES.get(impl, "cpu")
    if impl == "cpu":
        pytest.importorskip("courier_fast._native")
    pv = torch.randn(9, 8, device=device)
    pv[6:] = torch.nan
    history = torch.randn(7, 8, device=device)
    history[5:] = torch.inf
    pv.requires_grad_()
    history.requires_grad_()
    offsets = {
        "pv_offsets": torch.tensor([0, 4, 6], device=device),
        "history_offsets": torch.tensor([0, 2, 5], device=device),
    }
    loss = cf.reconstruction_loss(
        pv, history, torch.ones(9, dtype=torch.bool, device=device), impl=impl, **offsets
    )
    loss.backward()
    assert loss.isfinite()
    assert pv.grad is not None
    assert history.grad is not None
    assert pv.grad[:6].isfinite().all()
    assert not pv.grad[6:].any()
    assert not history.grad[5:].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_length_sequences(impl: str) -> None:
    """flash-attention #2562, #1537: crashes on zero-length sequences; every length is 0 or 1
    here."""
    check_loss(impl, longest_pv=1, longest_history=1, pages=30, clicked=0.9)


@pytest.mark.parametrize("count", [31, 32, 33, 63, 64, 65, 97])
@pytest.mark.parametrize("impl", IMPLS)
def test_tail_tiles(impl: str, count: int) -> None:
    """inf-cl: NaN where M or N is no multiple of the tile."""
    g = torch.Generator().manual_seed(count)
    device = DEVICES[impl]
    p = make(0)
    p = replace(
        p,
        pv=torch.randn(count, 8, generator=g).to(device).requires_grad_(),
        history=torch.randn(count, 8, generator=g).to(device).requires_grad_(),
        pv_offsets=torch.tensor([0, count], device=device),
        history_offsets=torch.tensor([0, count], device=device),
        clicked=torch.ones(count, dtype=torch.bool, device=device),
        attention_scale=0.5,
        reduction="none",
    )
    skip_unless_available(impl, p)
    budget = Budget(torch.float32)
    budget.add(loss_yardstick(p), run(impl, p))
    budget.check()


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_non_contiguous_inputs_and_stride_0_gradients(impl: str) -> None:
    """TransformerEngine #2746: non-contiguous inputs silently wrong; ROCm/TransformerEngine #623:
    grad of .sum()."""
    if impl == "cpu":
        pytest.importorskip("courier_fast._native")
    device = DEVICES.get(impl, "cpu")
    g = torch.Generator().manual_seed(0)
    pv = torch.randn(8, 4, 3, generator=g).to(device).permute(2, 1, 0)
    history = torch.randn(3, 5, 16, generator=g).to(device)[..., ::2]
    clicked = torch.ones(3, 4, dtype=torch.bool, device=device)
    grads = []
    for a, b in ((pv, history), (pv.contiguous(), history.contiguous())):
        a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
        cf.reconstruction_loss(a, b, clicked, reduction="none", impl=impl).sum().backward()
        grads.append((a.grad, b.grad))
    assert torch.equal(grads[0][0], grads[1][0])
    assert torch.equal(grads[0][1], grads[1][1])


@pytest.mark.parametrize("tau", [0.01, 0.005])
@pytest.mark.parametrize("impl", IMPLS)
def test_orthogonal_pairs_at_a_small_temperature(impl: str, tau: float) -> None:
    """memeff: the fixed maximum 1/tau underflows, exp(-100) at tau = 0.01; inf-cl: no maximum
    overflows."""
    device = DEVICES[impl]
    pv, history = (
        torch.eye(8, device=device)[:, None],
        torch.eye(8, device=device).roll(1, 0)[:, None],
    )
    clicked = torch.ones(8, 1, dtype=torch.bool, device=device)
    skip_unless_available(impl, make(0, impl=impl))
    losses = []
    for which in (impl, "reference"):
        a = pv.clone().requires_grad_()
        loss = cf.reconstruction_loss(a, history, clicked, temperature=tau, impl=which)
        loss.backward()
        losses.append((loss.detach(), a.grad))
    assert float(losses[1][0]) > 1 / tau - 1
    torch.testing.assert_close(losses[0][0], losses[1][0])
    torch.testing.assert_close(losses[0][1], losses[1][1])


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_log_q_has_the_right_sign(impl: str) -> None:
    """tensorflow/recommenders #219, #706: a candidate that is sampled often counts less as a
    negative."""
    device = DEVICES.get(impl, "cpu")
    if impl == "cpu":
        pytest.importorskip("courier_fast._native")
    g = torch.Generator().manual_seed(2)
    pv, history = (
        torch.randn(1, 3, 8, generator=g).to(device),
        torch.randn(1, 2, 8, generator=g).to(device),
    )
    clicked = torch.tensor([[True, False, False]], device=device)

    def loss(log_q: list[float]) -> float:
        rows = torch.tensor([log_q], device=device)
        return float(cf.reconstruction_loss(pv, history, clicked, log_q=rows, impl=impl))

    plain = loss([0.0, 0.0, 0.0])
    assert loss([0.0, 5.0, 0.0]) < plain  # a frequent negative is discounted
    assert loss([5.0, 0.0, 0.0]) > plain  # so is a frequent positive
    # Only differences matter, but for the rounding of scores of up to 1/tau + 3.
    assert abs(loss([3.0, 3.0, 3.0]) - plain) <= 13 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_accidental_hits_are_told_by_id_not_by_similarity(impl: str) -> None:
    """sentence-transformers #3260: equal embeddings of different items are negatives, equal ids are
    not."""
    device = DEVICES.get(impl, "cpu")
    if impl == "cpu":
        pytest.importorskip("courier_fast._native")
    g = torch.Generator().manual_seed(2)
    row = torch.randn(8, generator=g)
    pv = torch.stack([row, row])[None].to(device)
    history, clicked = (
        torch.randn(1, 2, 8, generator=g).to(device),
        torch.tensor([[True, False]], device=device),
    )
    options: dict[str, Any] = {"impl": impl}
    rounding = torch.finfo(torch.float32).eps / 0.1  # of a score, at the default temperature
    both = float(cf.reconstruction_loss(pv, history, clicked, **options))
    assert abs(both - math.log(2)) <= rounding
    same = torch.tensor([[7, 7]], device=device)
    alone = float(cf.reconstruction_loss(pv, history, clicked, item_ids=same, **options))
    assert abs(alone) <= rounding


@pytest.mark.parametrize(
    "options", [{}, {"reduction": "none"}, {"table": True}, {"dim": 300}], ids=str
)
@pytest.mark.parametrize("impl", IMPLS)
def test_second_backward_gives_the_same(impl: str, options: dict[str, Any]) -> None:
    """Backward passes that change what was saved: the second one, with retain_graph, was wrong."""
    p = make(1, impl=impl, **options)
    skip_unless_available(impl, p)
    loss = operators.loss(p, impl, False)[0]
    upstream = torch.rand_like(loss)
    first = torch.autograd.grad(loss, p.pv, upstream, retain_graph=True)[0].clone()
    second = torch.autograd.grad(loss, p.pv, 2 * upstream, retain_graph=True)[0]
    third = torch.autograd.grad(loss, p.pv, upstream)[0]
    assert torch.equal(first, third)
    torch.testing.assert_close(second, 2 * first)
