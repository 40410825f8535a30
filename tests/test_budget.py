"""The error budget: right code is within it, each planted error is over it, and it is the same on
every machine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from factories import (
    LOSS_INPUTS,
    Budget,
    loss_yardstick,
    make,
    results,
    skip_unless_available,
)
from torch import Tensor

from courier_fast.loss import operators, reference
from courier_fast.loss.problem import Problem
from courier_fast.testing.budget import Rounding, Yardstick, held

Run = Callable[[Problem], dict[str, Tensor]]


def eager(p: Problem) -> dict[str, Tensor]:
    return results(lambda q: reference.reconstruction_loss(q).loss, p, LOSS_INPUTS)


def fused(impl: str) -> Run:
    return lambda p: results(lambda q: operators.loss(q, impl, False)[0], p, LOSS_INPUTS)


def judge(problems: list[Problem], yardsticks: list[Yardstick], run: Run) -> Budget:
    budget = Budget(problems[0].pv.dtype)
    for p, judged in zip(problems, yardsticks, strict=True):
        budget.add(judged, run(p))
    return budget


def assert_caught(
    problems: list[Problem], right: Run, plant: Callable[[], None], wrong: Run | None = None
) -> None:
    """Right code passes, and the same with an error planted does not."""
    yardsticks = [loss_yardstick(p, seed) for seed, p in enumerate(problems)]
    judge(problems, yardsticks, right).check()
    plant()
    with pytest.raises(AssertionError, match="over the error budget"):
        judge(problems, yardsticks, wrong or right).check()


def problems(impl: str, count: int = 3, **case: Any) -> list[Problem]:
    found = [make(seed, impl=impl, **case) for seed in range(count)]
    skip_unless_available(impl, found[0])
    return found


def nothing() -> None:
    pass


def but_one(rows: int, candidates: Tensor) -> Tensor:
    mask = torch.ones(rows, dtype=torch.bool, device=candidates.device)
    mask[candidates.nonzero()[0]] = False
    return mask


# ---- planted errors ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_a_dropped_candidate(impl: str, dtype: torch.dtype) -> None:
    if impl == "cpu" and dtype == torch.float16:
        dtype = torch.bfloat16
    found = problems(impl, dtype=dtype, pages=20)
    drop = lambda p: replace(p, pv_mask=but_one(p.num_pv, ~p.clicked))  # noqa: E731
    assert_caught(found, fused(impl), nothing, lambda p: fused(impl)(drop(p)))


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_a_dropped_history_item(impl: str) -> None:
    found = problems(impl, pages=20, longest_history=30)

    def drop(p: Problem) -> Problem:
        every = torch.ones(p.num_history, dtype=torch.bool, device=p.pv.device)
        return replace(p, history_mask=but_one(p.num_history, every))

    assert_caught(found, fused(impl), nothing, lambda p: fused(impl)(drop(p)))


def planted_after(monkeypatch: pytest.MonkeyPatch, stage: str, change: Callable[..., None]) -> None:
    """Lets a stage of the Triton pipeline run, and then spoils what it wrote."""
    pipeline = pytest.importorskip("courier_fast.kernels.triton.loss")
    original = getattr(pipeline, stage)

    def spoiled(*args: Any, **options: Any) -> Any:
        out = original(*args, **options)
        change(*args, **options)
        return out

    monkeypatch.setattr(pipeline, stage, spoiled)


def narrowed(x: Tensor) -> None:
    x.copy_(x.bfloat16())


@pytest.mark.numpy_products
def test_a_rounding_to_bfloat16_of_the_unit_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(p: Problem, s: Any, unit: Tensor, *rest: Any, **options: Any) -> None:
        narrowed(unit)

    assert_caught(
        problems("triton"),
        fused("triton"),
        lambda: planted_after(monkeypatch, "normalize", change),
    )


@pytest.mark.numpy_products
def test_the_positive_in_low_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(p: Problem, s: Any, t: Any, r: Tensor, norm: Tensor, positive: Tensor) -> None:
        narrowed(positive)

    assert_caught(
        problems("triton"),
        fused("triton"),
        lambda: planted_after(monkeypatch, "run_attention", change),
    )


@pytest.mark.parametrize("impl", ["cpu", "triton"])
def test_no_running_maximum(monkeypatch: pytest.MonkeyPatch, impl: str) -> None:
    """exp(s - 1/tau) underflows at tau = 0.005."""
    found = problems(impl, tau=0.005)

    def fixed_shift(s: Tensor, dim: int) -> Tensor:
        return (s - 200).exp().sum(dim).log() + 200

    def plant() -> None:
        if impl == "cpu":  # an imitation in eager code: the native library has no such switch
            monkeypatch.setattr(Tensor, "logsumexp", fixed_shift)
        else:
            pipeline = pytest.importorskip("courier_fast.kernels.triton.loss")
            right = pipeline.loss_scores
            without = lambda *a: replace(right(*a), online=False, fixed_shift=True)  # noqa: E731
            monkeypatch.setattr(pipeline, "loss_scores", without)

    assert_caught(found, fused(impl), plant, eager if impl == "cpu" else None)


@pytest.mark.numpy_products
def test_log_m_of_repeated_items_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    def change(p: Problem, s: Any, t: Any, *rest: Any, **options: Any) -> None:
        t.column.bias.zero_()

    assert_caught(
        problems("triton", table=True),
        fused("triton"),
        lambda: planted_after(monkeypatch, "make_plan", change),
    )


@pytest.mark.long("kernels case by case", short=("page",))
@pytest.mark.numpy_products
@pytest.mark.parametrize("negatives", ["page", "other_pages"])
def test_a_wrong_page_mask(monkeypatch: pytest.MonkeyPatch, negatives: str) -> None:
    """One candidate of one page is taken for one of the page after it."""

    def change(p: Problem, s: Any, t: Any, *rest: Any, **options: Any) -> None:
        t.column.page[p.num_pv // 2] += 1

    assert_caught(
        problems("triton", pages=30, clicked=0.9, negatives=negatives),
        fused("triton"),
        lambda: planted_after(monkeypatch, "make_plan", change),
    )


class _NarrowDifference(torch.autograd.Function):
    """logsumexp_j s_ij - s_ii, whose gradient p - 1 is taken in bfloat16."""

    @staticmethod
    def forward(ctx: Any, s: Tensor, positive: Tensor) -> Tensor:
        ctx.save_for_backward(s, positive)
        return s.logsumexp(1) - s.gather(1, positive[:, None]).squeeze(1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        s, positive = ctx.saved_tensors
        p = s.softmax(1).bfloat16()
        one = torch.zeros_like(p).scatter_(1, positive[:, None], 1)
        return (p - one).to(s.dtype) * grad[:, None], None


def confident(dtype: torch.dtype) -> Problem:
    """Eight pages of one item, half way to its history, and nothing like the others:
    p is 1 - 3e-4."""
    g = torch.Generator().manual_seed(3)
    pv = torch.eye(8, 16) * 3 + 0.02 * torch.randn(8, 16, generator=g)
    history = pv + torch.eye(16)[8:] * 3 + 0.01 * torch.randn(8, 16, generator=g)
    return replace(
        make(0, pages=1),
        pv=pv.to(dtype).requires_grad_(),
        history=history.to(dtype).requires_grad_(),
        pv_offsets=torch.arange(9),
        history_offsets=torch.arange(9),
        clicked=torch.ones(8, dtype=torch.bool),
        attention_scale=0.25,
        tau=0.07,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_p_minus_one_in_low_precision(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    def contrast(
        cosine: Tensor,
        positive: Tensor,
        allowed: Tensor,
        inverse_tau: Tensor,
        log_q: Tensor | None,
    ) -> Any:
        cosine = cosine.to(inverse_tau.dtype)
        s = (cosine * inverse_tau).masked_fill(~allowed, -torch.inf)
        loss = _NarrowDifference.apply(s, positive)
        return reference._Contrast(loss, loss, loss, positive)

    assert_caught(
        [confident(dtype)], eager, lambda: monkeypatch.setattr(reference, "_contrast", contrast)
    )


@pytest.mark.parametrize("change", [lambda x: x * (1 + 1e-5), lambda x: x * torch.nan])
def test_a_wrong_gradient(change: Callable[[Tensor], Tensor]) -> None:
    def wrong(p: Problem) -> dict[str, Tensor]:
        found = eager(p)
        return found | {"history": change(found["history"])}

    assert_caught([make(0)], eager, nothing, wrong)


# ---- the model -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_number_goes_to_one_of_its_two_neighbours(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    kept = torch.randn(500, generator=g).exp().to(dtype) * torch.randn(500, generator=g).sign()
    kept = kept.to(dtype)
    assert torch.equal(Rounding(0).move(kept.double(), dtype), kept.double())
    after = torch.nextafter(kept, torch.tensor(torch.inf, dtype=dtype)).double()
    between = kept.double() + 0.25 * (after - kept.double())
    moved = Rounding(0).move(between, dtype)
    assert ((moved == kept.double()) | (moved == after)).all()
    assert 75 < int((moved == after).sum()) < 175
    still = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan], dtype=torch.float64)
    assert torch.equal(Rounding(0).move(still, dtype).nan_to_num(5), still.nan_to_num(5))


def test_a_probability_next_to_one_is_one() -> None:
    """Half a unit away from it, as the model had it, the gradient of a row of length 10,000 may be
    wholly wrong."""
    one = torch.full((1000,), 1 - 1e-12, dtype=torch.float64)
    assert (Rounding(0).move(one, torch.float32) == 1).all()


def test_what_only_moves_is_not_rounded() -> None:
    rounding = Rounding(0)
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    y = rounding.leaf(x)
    for same in (y.T.T, y[1:], y + 0, y * 1, torch.cat([y, y])[:5], y.float(), y.double()):
        assert torch.equal(held(same), x.double()[-len(same) :])
    half = held(y.bfloat16()) - x.double()
    assert (half != 0).all()
    assert (held(y / 641) != x.double() / 641).all()
    assert (y @ y.T).dtype == torch.float32


def test_the_models_numbers_depend_on_the_seed_alone() -> None:
    compute = loss_yardstick.__wrapped__  # without what is remembered
    first, again, other = (compute(make(0), seed) for seed in (0, 0, 1))
    for name in first.exact:
        for x, y in zip(first.rounded, again.rounded, strict=True):
            assert torch.equal(held(x[name]), held(y[name]))
        assert not torch.equal(held(first.rounded[0][name]), held(other.rounded[0][name]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [{}, {"dim": 1}, {"tau": 0.005}, {"dim": 300}], ids=str)
def test_the_model_alone_holds_eager_code(case: dict[str, Any], dtype: torch.dtype) -> None:
    """Without the eager error of this machine; which then says nothing about the budget."""
    found = [make(seed, dtype=dtype, **case) for seed in range(4)]
    judged = [loss_yardstick(p, seed) for seed, p in enumerate(found)]
    judge(found, [replace(y, eager=y.exact) for y in judged], eager).check()


def test_a_product_is_as_far_off_as_one_added_up_in_order() -> None:
    """Row by row, as no library does it any more: what the model draws has that size."""
    g = torch.Generator().manual_seed(0)
    a, b = (torch.rand(40, 300, generator=g) + shift for shift in (0.0, -0.3))
    exact = a.double() @ b.double().T
    partial = torch.zeros(40, 40)
    for k in range(300):
        partial += torch.outer(a[:, k], b[:, k])
    modelled = held(Rounding(0).leaf(a) @ Rounding(1).leaf(b).T) - exact
    ratio = float(modelled.norm() / (partial - exact).norm())
    assert 0.7 < ratio < 1.5
    zero = torch.zeros(40, 300)
    assert not held(Rounding(0).leaf(a) @ zero.T).any()


def test_scores_of_size_1_over_tau_round_coarser() -> None:
    def error(tau: float) -> float:
        y = loss_yardstick(make(0, tau=tau, reduction="none"))
        return float(held(y.rounded[0]["output"]).sub(y.exact["output"]).norm())

    assert 8 < error(0.1 / 16) / error(0.1) < 32
