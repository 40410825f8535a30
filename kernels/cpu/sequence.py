"""impl="cpu": the click-sequence loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...loss.problem import Gradients, Needs, SequenceProblem
from ...surroundings import has_slow_products
from .contrast import contrast
from .rows import (
    Columns,
    Rows,
    gradient_shapes,
    inverse_tau_of,
    normalize,
    normalize_backward,
    on_other_pages,
    real_rows,
    scaled,
)
from .widen import narrowed, widened


def sequence_saved_spec(p: SequenceProblem, needs: Needs) -> list[tuple[Any, torch.dtype]]:
    """As `saved_spec`."""
    return [] if p.reduction == "none" else gradient_shapes(p, needs)


def _page_sums(values: Tensor, rows: Rows) -> Tensor:
    return torch.zeros(rows.start.shape[0] - 1, values.shape[1]).index_add_(0, rows.page, values)


def _run_sequence(
    p: SequenceProblem, needs: Needs, upstream: Tensor | None
) -> tuple[Tensor, Tensor, Gradients]:
    """(losses of the anchors, their positions in the batch, gradients)."""
    if has_slow_products(p.history):
        loss, where, found = _run_sequence(widened(p), needs, upstream)
        return loss, where, narrowed(found, p)
    inverse_tau = inverse_tau_of(p)
    rows = real_rows(p, "history")
    c, norm = normalize(p.history, rows.source)
    count = rows.keep.shape[0]
    every = torch.arange(count)
    ids = None if p.ids is None else p.ids[rows.keep]

    # Positives of k: the page's rows without those of k's item; sums over a page and over an item
    # on a page give both.
    group = every
    if ids is not None:
        _, item = torch.unique(ids, return_inverse=True)
        _, group = torch.unique(rows.page * (count + 1) + item, return_inverse=True)
    groups = int(group.max()) + 1 if count else 0
    page_size = rows.start.diff()[rows.page]
    number = page_size - torch.bincount(group, minlength=groups)[group]
    anchor = (number > 0).nonzero().squeeze(1)

    def sum_of_positives(values: Tensor) -> Tensor:
        """[n, D]: for each row the sum over its positives."""
        own = values
        if ids is not None:
            own = torch.zeros(groups, values.shape[1]).index_add_(0, group, values)[group]
        return _page_sums(values, rows)[rows.page] - own

    y = Columns(c, anchor)
    if ids is not None:
        # Left out: the item's occurrences on other pages.
        y.order, same = on_other_pages(ids, rows.page)
        y.same = same[anchor]
    c32 = c.to(torch.float32)
    mean = sum_of_positives(c32)[anchor] / number[anchor][:, None]
    g = None
    if any(needs):
        if upstream is not None:
            g = upstream[rows.keep[anchor]].to(torch.float32)
        else:
            g = torch.full(
                (anchor.shape[0],), 1.0 / max(anchor.shape[0], 1) if p.reduction == "mean" else 1.0
            )
    s = contrast(c[anchor], y, inverse_tau, None, None, g, False)
    loss = s.lse - (c32[anchor] * mean).sum(1, dtype=torch.float64) * inverse_tau

    gradients = Gradients()
    if g is not None and s.d_x is not None and s.d_y is not None:
        s.d_x -= g[:, None] * mean
        if needs.temperature:
            assert p.temperature is not None
            slope = (s.d_x * c32[anchor]).sum(dtype=torch.float64)
            gradients.temperature = (-slope * inverse_tau**2).to(p.temperature.dtype)
        if needs.history:
            pulled = torch.zeros(count, c.shape[1])
            pulled[anchor] = (g / number[anchor])[:, None] * c32[anchor]
            d_c = s.d_y.index_add_(0, anchor, s.d_x) - sum_of_positives(pulled)
            d_rows = normalize_backward(d_c, c, norm, inverse_tau)
            target = rows.keep if p.history_index is None else rows.source
            total = torch.zeros(p.history.shape, dtype=torch.float32).index_add_(0, target, d_rows)
            gradients.history = total.to(p.history.dtype)
    return loss, rows.keep[anchor], gradients


def sequence_forward(p: SequenceProblem, needs: Needs) -> tuple[Tensor, list[Tensor]]:
    """(loss, saved) of the click-sequence loss."""
    early = p.reduction != "none"
    losses, where, gradients = _run_sequence(p, needs if early else Needs(), None)
    if p.reduction == "none":
        return torch.zeros(p.num_history).index_copy_(0, where, losses.float()), []
    loss = losses.sum(dtype=torch.float64)
    if p.reduction == "mean":
        loss = loss / max(len(losses), 1)
    return loss.to(torch.float32), gradients.present()


def sequence_backward(
    p: SequenceProblem, needs: Needs, saved: Sequence[Tensor], grad: Tensor
) -> Gradients:
    """Of `p`'s inputs."""
    if p.reduction == "none":
        return _run_sequence(p, needs, grad)[2]
    return scaled(saved, needs, grad)
