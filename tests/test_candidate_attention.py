"""Attention for each candidate: the reference against the definition, every implementation against the reference, edges."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from factories import LOSS_INPUTS, check_loss, in_float64, make
from test_loss import HALF
from test_reference import SMALL, naive_loss, reduced
from torch import Tensor

from courier_fast import reference

IMPLS = ("cpu",)
CANDIDATE: dict[str, Any] = {"attention": "candidate"}
COSINE: dict[str, Any] = {"cosine": True, "attention_scale": 5.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cosine": COSINE,
    "page": {"negatives": "page"},
    "other-pages": {"negatives": "other_pages"},
    "ids": {"ids": True},
    "ids-page": {"ids": True, "negatives": "page"},
    "ids-other-pages-cosine": {"ids": True, "negatives": "other_pages"} | COSINE,
    "log-q": {"log_q": True},
    "weights": {"weights": True},
    "weights-sum": {"weights": True, "reduction": "sum"},
    "none-weights": {"reduction": "none", "weights": True},
    "heads": {"num_heads": 4},
    "heads-cosine": {"num_heads": 3} | COSINE,
    "projected": {"projected": True},
    "projected-cosine": {"projected": True} | COSINE,
    "projected-heads": {"projected": True, "num_heads": 2},
    "padding": {"mask": True},
    "padding-ids-cosine": {"mask": True, "ids": True} | COSINE,
    "items": {"table": True},
    "items-cosine": {"table": True} | COSINE,
    "items-page": {"table": True, "negatives": "page"},
    "items-other-pages": {"table": True, "negatives": "other_pages"},
    "items-ids": {"table": True, "ids": True},
    "items-log-q": {"table": True, "log_q": True},
    "items-padding-weights": {"table": True, "mask": True, "weights": True},
    "items-projected": {"table": True, "projected": True},
    "items-none": {"table": True, "reduction": "none"},
    "tensor-tau": {"tensor_tau": True},
    "tensor-tau-log-q": {"tensor_tau": True, "log_q": True},
    "tau-0.005": {"tau": 0.005},
    "tau-0.02-items": {"tau": 0.02, "table": True},
    "tau-2": {"tau": 2.0},
    "all-clicked": {"clicked": 1.0},
    "items-all-clicked": {"clicked": 1.0, "table": True},
    "sharp": {"attention_scale": 3.0},
    "long-histories": {"longest_history": 80, "pages": 5},
    "several-tiles": {"pages": 40},
    "one-page": {"pages": 1, "longest_pv": 12, "longest_history": 12},
    "dim-1": {"dim": 1},
    "dim-17": {"dim": 17},
    "dim-100": {"dim": 100, "pages": 6},
    "dim-256": {"dim": 256, "pages": 6},
    "dim-300": {"dim": 300, "pages": 6},
}
LOOPED = [name for name, case in CASES.items() if not {"dim", "pages"} & set(case)]


def problem(seed: int = 0, **case: Any) -> Any:
    return make(seed, **(CANDIDATE | case))


# ---- the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LOOPED)
def test_loss_is_the_definition(case: str) -> None:
    options = SMALL | CASES[case] | ({"num_heads": 3} if CASES[case].get("num_heads") else {})
    p = in_float64(problem(2, **options), LOSS_INPUTS)
    found, expected = reference.reconstruction_loss(p), naive_loss(p)
    assert expected
    items = torch.zeros(p.num_pv, dtype=torch.float64)
    for i, x in expected.items():
        items[i] = x
    torch.testing.assert_close(found.item_loss, items)
    total = reduced(expected, p.weights, p.reduction)
    loss = found.loss.detach()
    torch.testing.assert_close(loss, items if p.reduction == "none" else loss.new_tensor(total))


@pytest.mark.parametrize(
    "options",
    [{}, COSINE | {"log_q": True}, {"projected": True, "num_heads": 2}, {"table": True, "tensor_tau": True}],
    ids=str,
)  # fmt: skip
def test_derivatives(options: dict[str, Any]) -> None:
    small = {"pages": 3, "longest_pv": 3, "longest_history": 3, "dim": 4}
    p = in_float64(problem(1, **(small | options)), LOSS_INPUTS)
    names = [n for n in LOSS_INPUTS if getattr(p, n) is not None]
    names = [n for n in names if n != "history" or p.key is None]

    def loss(*tensors: Tensor) -> Tensor:
        inputs = dict(zip(names, tensors, strict=True))
        return reference.reconstruction_loss(replace(p, **inputs)).loss

    assert torch.autograd.gradcheck(loss, tuple(getattr(p, n) for n in names))


# ---- implementations -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("impl", IMPLS)
def test_float32(impl: str, case: str) -> None:
    check_loss(impl, **CANDIDATE, **CASES[case])


HALF_CASES = (
    "plain",
    "cosine",
    "items",
    "padding",
    "none-weights",
    "tensor-tau",
    "tau-0.02-items",
    "projected-cosine",
    "heads",
    "dim-300",
    "several-tiles",
)


@pytest.mark.parametrize("case", HALF_CASES)
@pytest.mark.parametrize(("impl", "dtype"), [(i, t) for i in IMPLS for t in HALF[i]], ids=str)
def test_half(impl: str, dtype: torch.dtype, case: str) -> None:
    check_loss(impl, dtype=dtype, **CANDIDATE, **({"pages": 14} | CASES[case]))
