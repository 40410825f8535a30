"""Errors against float64, and the budget: twice the reference's, plus one rounding."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .candidates import Loss, call
from .problems import Batch

# Similarities that the float64 loss holds at a time.
CHUNK_ELEMENTS = 2**24


def loss_and_gradients(loss: Loss, batch: Batch) -> dict[str, Tensor]:
    """The loss and the gradient of each input."""
    value = loss(batch)
    gradients = torch.autograd.grad(value, list(batch.inputs.values()))
    return {"loss": value.detach()} | dict(zip(batch.inputs, gradients, strict=True))


def _sum_over(anchors: Tensor, batch: Batch) -> Tensor:
    """The summed loss of some anchors."""
    clicked = torch.zeros_like(batch.clicked).index_fill(0, anchors, True)
    return call(batch, "reference", clicked=clicked, reduction="sum")


def exact(batch: Batch) -> dict[str, Tensor]:
    """The reference in float64, some anchors at a time: the loss is a sum over them."""
    double = batch.to(torch.float64)
    anchors = batch.clicked.nonzero().squeeze(1)
    total: dict[str, Tensor] = {}
    for some in anchors.split(max(1, CHUNK_ELEMENTS // batch.rows)):
        part = loss_and_gradients(partial(_sum_over, some), double)
        total = {name: total.get(name, 0) + x for name, x in part.items()}
    return {name: x / len(anchors) for name, x in total.items()}


@dataclass(frozen=True)
class Error:
    """Of one tensor in one norm, relative to that norm of the exact tensor."""

    tensor: str
    norm: str
    error: float
    budget: float

    @property
    def share(self) -> float:
        """Of the budget."""
        return self.error / self.budget

    @property
    def passes(self) -> bool:
        """False also where something is not finite."""
        return self.error <= self.budget < float("inf")


def _norms(x: Tensor) -> dict[str, float]:
    return {"l2": float(torch.linalg.vector_norm(x)), "max": float(x.abs().max())}


def errors(
    found: dict[str, Tensor],
    reference: dict[str, Tensor],
    truth: dict[str, Tensor],
    dtype: torch.dtype,
) -> list[Error]:
    """One per tensor and norm."""
    rounding = torch.finfo(dtype).eps / 2
    result = []
    for name, x in truth.items():
        size = _norms(x)
        of_found, of_reference = (
            _norms(found[name].double() - x),
            _norms(reference[name].double() - x),
        )
        for norm, unit in size.items():
            unit = unit or 1.0
            budget = 2 * of_reference[norm] / unit + rounding
            result.append(Error(name, norm, of_found[norm] / unit, budget))
    return result
