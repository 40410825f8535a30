"""Errors against float64, and the yardstick of `courier_fast.testing.budget` for them."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench.candidates import Loss
from courier_fast.testing.batches import Batch, call
from courier_fast.testing.budget import DRAWS, Budget, Error, Rounding, Yardstick, held

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
    if batch.options.courier:
        return loss_and_gradients(lambda b: call(b, "reference"), double)
    anchors = batch.clicked.nonzero().squeeze(1)
    total: dict[str, Tensor] = {}
    each = batch.rows * (batch.dim if batch.options.attention == "candidate" else 1)
    for some in anchors.split(max(1, CHUNK_ELEMENTS // each)):
        part = loss_and_gradients(partial(_sum_over, some), double)
        total = {name: total.get(name, 0) + x for name, x in part.items()}
    weight = len(anchors) if double.weights is None else double.weights[anchors].sum()
    return {name: x / weight for name, x in total.items()}


def _rounded(batch: Batch, draw: int) -> dict[str, Tensor]:
    """One draw of the model of rounding."""
    rounding = Rounding(draw, batch.clicked.device)
    leaves: dict[str, Any] = {name: rounding.leaf(x) for name, x in batch.inputs.items()}
    found = loss_and_gradients(lambda b: call(b, "reference"), batch.with_inputs(leaves))
    return {name: held(x) for name, x in found.items()}


def yardstick(batch: Batch) -> Yardstick:
    """What every candidate's results are held to."""
    eager = loss_and_gradients(lambda b: call(b, "reference"), batch)
    return Yardstick(exact(batch), eager, [_rounded(batch, draw) for draw in range(DRAWS)])


def errors(found: dict[str, Tensor], judged: Yardstick, dtype: torch.dtype) -> list[Error]:
    """One per tensor and norm."""
    budget = Budget(dtype)
    budget.add(judged, found)
    return budget.errors()
