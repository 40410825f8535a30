"""Every implementation against the reference: the loss and every gradient, within the error
budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from factories import (
    GPU,
    IMPLS,
    LOSS_INPUTS,
    Budget,
    check_loss,
    check_problems,
    check_reconstruct,
    check_sequence,
    loss_yardstick,
    make,
    results,
    skip_unless_available,
)
from torch import Tensor

from courier_fast.loss import operators
from courier_fast.testing.budget import Yardstick, held

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "identify": {"direction": "identify"},
    "both": {"direction": "both"},
    "page": {"negatives": "page"},
    "other-pages": {"negatives": "other_pages"},
    "page-both": {"negatives": "page", "direction": "both", "pages": 30},
    "other-pages-identify": {"negatives": "other_pages", "direction": "identify"},
    "ids": {"ids": True},
    "ids-both-page": {"ids": True, "direction": "both", "negatives": "page"},
    "log-q": {"log_q": True},
    "log-q-both": {"log_q": True, "direction": "both"},
    "weights": {"weights": True},
    "weights-sum": {"weights": True, "reduction": "sum"},
    "none": {"reduction": "none"},
    "none-weights-both": {"reduction": "none", "weights": True, "direction": "both"},
    "heads": {"num_heads": 4},
    "projected": {"projected": True},
    "projected-heads": {"projected": True, "num_heads": 3, "direction": "both"},
    "padding": {"mask": True},
    "padding-both-ids": {"mask": True, "direction": "both", "ids": True},
    "items": {"table": True},
    "items-both": {"table": True, "direction": "both"},
    "items-page": {"table": True, "negatives": "page"},
    "items-ids": {"table": True, "ids": True},
    "items-log-q": {"table": True, "log_q": True},
    "items-padding-weights": {"table": True, "mask": True, "weights": True},
    "items-projected": {"table": True, "projected": True},
    "items-none": {"table": True, "reduction": "none"},
    "tensor-tau": {"tensor_tau": True},
    "tensor-tau-both-log-q": {"tensor_tau": True, "direction": "both", "log_q": True},
    "tau-0.005": {"tau": 0.005},
    "tau-0.02-items": {"tau": 0.02, "table": True},
    "tau-2": {"tau": 2.0},
    "long-histories": {"longest_history": 60, "pages": 5},
    "several-tiles": {"pages": 40},
    "one-page": {"pages": 1, "longest_pv": 12, "longest_history": 12},
    "dim-17": {"dim": 17},
    "dim-100": {"dim": 100, "pages": 6},
    "dim-256": {"dim": 256, "pages": 6},
    "dim-300": {"dim": 300, "pages": 6},
    "dim-1024": {"dim": 1024, "pages": 4},
    "given": {"given": True},
    "given-both-padding-weights": {
        "given": True,
        "mask": True,
        "weights": True,
        "direction": "both",
        "tensor_tau": True,
    },
    "given-identify-page-ids": {
        "given": True,
        "mask": True,
        "ids": True,
        "direction": "identify",
        "negatives": "page",
    },
    "given-none-log-q": {"given": True, "mask": True, "log_q": True, "reduction": "none"},
    "given-other-pages": {"given": True, "negatives": "other_pages", "longest_history": 0},
    "given-items": {"given": True, "table": True},
    "given-items-padding-both": {
        "given": True,
        "table": True,
        "mask": True,
        "direction": "both",
    },
    "given-dim-300": {"given": True, "mask": True, "dim": 300, "pages": 6},
}


# A page has few candidates: of three problems, one number is the largest error.
DRAWS = {"given-identify-page-ids": 12}


@pytest.mark.long(
    "kernels case by case",
    short=(
        "plain",
        "both",
        "page-both",
        "items-padding-weights",
        "projected-heads",
        "tensor-tau-both-log-q",
        "none-weights-both",
        "dim-300",
        "given-both-padding-weights",
        "given-items",
    ),
)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_float32(impl: str, case: str) -> None:
    check_loss(impl, DRAWS.get(case, 3), **CASES[case])


def away_from_zero(x: Tensor) -> Tensor:
    return (x.detach() + 0.5 * x.detach().sign()).requires_grad_()


@pytest.mark.parametrize("impl", IMPLS)
def test_rows_of_one_number(impl: str) -> None:
    """Unit rows of one number are 1 and -1, so that every gradient is 0, and what rounding leaves
    of it is as large as the luck of a few units in the last place: it is held to a bound. Each is
    divided by the length of a row and of a reconstruction; with a sharp attention neither is short.
    """
    budget = Budget(torch.float32)
    for seed in range(3):
        p = make(seed, impl=impl, dim=1, pages=20, attention_scale=10.0)
        skip_unless_available(impl, p)
        assert p.history is not None
        p = replace(p, pv=away_from_zero(p.pv), history=away_from_zero(p.history))
        judged = loss_yardstick(p, seed)
        found = results(lambda q: operators.loss(q, impl, False)[0], p, LOSS_INPUTS)
        losses = [{"output": of["output"]} for of in (judged.exact, judged.eager, *judged.rounded)]
        budget.add(Yardstick(losses[0], losses[1], losses[2:]), found)
        for name in ("pv", "history"):
            assert held(judged.exact[name]).abs().max() < 1e-12
            assert found[name].abs().max() <= 4 * torch.finfo(torch.float32).eps / p.tau, name
    budget.check()


HALF = {
    "cpu": [torch.bfloat16],
    "triton": [torch.float16] + [torch.bfloat16] * GPU,
    "xformers": [torch.float16, torch.bfloat16],
}
HALF_CASES = (
    "plain",
    "both",
    "items",
    "padding",
    "none-weights-both",
    "tensor-tau",
    "tau-0.02-items",
    "projected-heads",
    "dim-300",
    "several-tiles",
)


@pytest.mark.long("kernels case by case", short=("plain", "both", "items"))
@pytest.mark.parametrize(("impl", "dtype"), [(i, t) for i in IMPLS for t in HALF[i]], ids=str)
@pytest.mark.parametrize("case", HALF_CASES)
def test_half(impl: str, dtype: torch.dtype, case: str) -> None:
    check_loss(impl, dtype=dtype, **({"pages": 14} | CASES[case]))


CHUNKED = (
    "plain",
    "both",
    "items-both",
    "none-weights-both",
    "log-q-both",
    "tensor-tau",
    "page-both",
    "ids",
    "padding-both-ids",
)


@pytest.mark.long("kernels case by case", short=("padding-both-ids",))
@pytest.mark.numpy_products
@pytest.mark.parametrize("case", CHUNKED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_triton_in_several_chunks(
    monkeypatch: pytest.MonkeyPatch, case: str, dtype: torch.dtype
) -> None:
    """The three-product path, which is otherwise for D > 256, with a workspace of one row tile."""
    configs = pytest.importorskip("courier_fast.kernels.triton.tiles")
    monkeypatch.setattr(configs, "LARGEST_REGISTER_DIM", 8)
    check_loss("triton", dtype=dtype, workspace=1, draws=3, **({"pages": 20} | CASES[case]))


RECONSTRUCT = (
    "plain",
    "heads",
    "projected-heads",
    "padding",
    "items",
    "items-projected",
    "long-histories",
    "dim-17",
    "dim-300",
)


@pytest.mark.long("kernels case by case", short=("plain", "items-projected", "heads"))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", RECONSTRUCT)
def test_reconstruct(impl: str, case: str) -> None:
    options = {k: v for k, v in CASES[case].items() if k != "direction"}
    check_reconstruct(impl, **options)


SEQUENCE: dict[str, dict[str, Any]] = {
    "plain": {},
    "ids": {"ids": True},
    "padding-ids": {"mask": True, "ids": True},
    "items": {"table": True},
    "items-padding": {"table": True, "mask": True},
    "tensor-tau": {"tensor_tau": True},
    "tau-0.005": {"tau": 0.005},
    "none": {"reduction": "none", "ids": True},
    "sum": {"reduction": "sum"},
    "several-tiles": {"pages": 25, "ids": True},
    "dim-300": {"dim": 300, "pages": 5},
}


@pytest.mark.long("kernels case by case", short=("plain", "ids", "sum", "items-padding"))
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", SEQUENCE)
def test_click_sequence(impl: str, case: str) -> None:
    check_sequence(impl, **SEQUENCE[case])


@pytest.mark.parametrize(("impl", "dtype"), [(i, t) for i in IMPLS for t in HALF[i]], ids=str)
def test_click_sequence_half(impl: str, dtype: torch.dtype) -> None:
    check_sequence(impl, dtype=dtype, ids=True, pages=16)


@pytest.mark.parametrize("impl", ["cpu", "triton"])
@pytest.mark.parametrize(
    "options", [{}, {"table": True, "direction": "both"}], ids=["plain", "items-both"]
)
def test_two_runs_give_the_same_bits(impl: str, options: dict[str, Any]) -> None:
    p = make(3, impl=impl, pages=30, **options)
    skip_unless_available(impl, p)
    runs = [results(lambda q: operators.loss(q, impl, False)[0], p, LOSS_INPUTS) for _ in range(2)]
    for name, x in runs[0].items():
        assert torch.equal(x, runs[1][name]), name


@pytest.mark.numpy_products
def test_merged_columns_equal_expanded_rows() -> None:
    """Equal candidates as one column change nothing: the table's loss is that of its expanded rows
    with ids."""
    for impl in IMPLS[:2]:
        p = make(5, impl=impl, table=True, pages=20)
        skip_unless_available(impl, p)
        assert p.pv_index is not None
        assert p.history_index is not None
        expanded = replace(
            p,
            pv=p.pv[p.pv_index].detach().requires_grad_(),
            history=p.pv[p.history_index].detach().requires_grad_(),
            pv_index=None,
            history_index=None,
            item_ids=p.pv_index,
        )
        merged = results(lambda q: operators.loss(q, impl, False)[0], p, LOSS_INPUTS)  # noqa: B023
        rows = results(lambda q: operators.loss(q, impl, False)[0], expanded, LOSS_INPUTS)  # noqa: B023
        table = (
            torch.zeros_like(p.pv)
            .index_add_(0, p.pv_index, rows["pv"])
            .index_add_(0, p.history_index, rows["history"])
        )
        judged = loss_yardstick(p)
        budget = Budget(p.pv.dtype)
        budget.add(replace(judged, eager={"output": rows["output"], "pv": table}), merged)
        budget.check()


@pytest.mark.numpy_products
def test_tf32_setting_is_followed() -> None:
    """float32 products follow torch's matmul precision; on a GPU the result must then be that of
    tf32 rows."""
    configs = pytest.importorskip("courier_fast.kernels.triton.tiles")
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("highest")
        assert configs.dot_precision(torch.float32) == "ieee"
        torch.set_float32_matmul_precision("high")
        assert configs.dot_precision(torch.float32) == "tf32"
        if GPU:
            check_problems("triton", [make(seed, impl="triton") for seed in range(4)])
    finally:
        torch.set_float32_matmul_precision(before)
