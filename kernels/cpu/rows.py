"""Rows of a batch as the CPU path sees them: without padding; which candidates a row has; the
anchors and their weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...loss.problem import Gradients, Needs, Problem, SequenceProblem
from .native import call, stage


def normalize(source: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows of source[row] in its type, and their norms in float32."""
    unit = torch.empty(row.shape[0], source.shape[1], dtype=source.dtype)
    norm = torch.empty(row.shape[0], dtype=torch.float32)
    stage("normalize", source, row, unit, norm)
    return unit, norm


def normalize_backward(gradient: Tensor, unit: Tensor, norm: Tensor, scale: float) -> Tensor:
    """The gradient of unit rows, scaled, becomes in place that of the rows."""
    stage("normalize_backward", gradient, unit, norm, gradient, scale)
    return gradient


@dataclass
class Rows:
    """Real rows of one side, padding removed."""

    keep: Tensor  # [n] positions in the batch
    page: Tensor  # [n]
    start: Tensor  # [B + 1] first real row of each page
    source: Tensor  # [n] row of the source tensor: the position, or the table index


def real_rows(p: Any, side: str) -> Rows:
    """Of a side of either kind of problem, "pv" or "history". Raises ValueError for offsets, or
    indices of the table, that are out of range."""
    offsets, mask, index = (getattr(p, f"{side}_{x}") for x in ("offsets", "mask", "index"))
    rows = p.num_history if side == "history" else p.num_pv
    table = rows if index is None else source_of(p).shape[0]
    keep, page, source = torch.empty(3, rows, dtype=torch.int64)
    start = torch.empty(offsets.shape[0], dtype=torch.int64)
    about = (side, offsets, mask, index, rows, table)
    count = call("real_rows", *about, keep, page, source, start)
    return Rows(keep[:count], page[:count], start, source[:count])


def source_of(p: Any) -> Tensor:
    """The embeddings, or the table."""
    return p.pv if hasattr(p, "pv") else p.history


@dataclass
class Columns:
    """The columns of a direction, and which are no candidates of a row beside its own column."""

    unit: Tensor  # [n, D]
    own: Tensor  # [M] column of each row's positive, or of the row itself
    bias: Tensor | None = None  # [n] float32
    rank_bias: Tensor | None = None  # [n] the part of it that ranks see
    count: Tensor | None = None  # [n] float32, candidates that a column stands for
    order: Tensor | None = None  # [n] columns by item id
    same: Tensor | None = None  # [M, ranges, 2] ranges of `order`: the row's item again
    page: Tensor | None = None  # [M, 2] columns of the row's page
    page_only: bool = False  # these alone are candidates; else they are none

    def about(self, rows: slice, columns: slice) -> tuple[Tensor | None, ...]:
        """What a native contrast of some rows with some columns is told."""
        return (
            part(self.bias, columns),
            part(self.rank_bias, columns),
            part(self.count, columns),
            self.own[rows],
            self.order,
            part(self.same, rows),
            part(self.page, rows),
        )


def part(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def same_id(ids: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """Positions ordered by id [n], and for each id in `of` its range among them [M, 2]."""
    ordered, order = torch.sort(ids, stable=True)
    first = torch.searchsorted(ordered, of)
    return order, torch.stack([first, torch.searchsorted(ordered, of, right=True)], 1)


def on_other_pages(ids: Tensor, page: Tensor) -> tuple[Tensor, Tensor]:
    """Positions ordered by id, then by page [n], and for each row the two ranges among them of its
    id's occurrences on other pages [n, 2, 2]; `page` [n] ascends."""
    order, same = same_id(ids, ids)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    pages = int(page[-1]) + 1 if len(page) else 1
    ordered_page = page[order] + pages * same[order, 0]
    own_page = ordered_page[place]
    first = torch.searchsorted(ordered_page, own_page)
    last = torch.searchsorted(ordered_page, own_page, right=True)
    return order, torch.stack([same[:, 0], first, last, same[:, 1]], 1).view(-1, 2, 2)


def inverse_tau_of(p: Problem | SequenceProblem) -> float:
    return 1.0 / (p.tau if p.temperature is None else float(p.temperature))


def can_merge(p: Problem) -> bool:
    """Whether equal candidates of a table are the same to every anchor."""
    return p.item_ids is None and p.log_q is None and p.negatives == "batch"


def merged(p: Problem, pv: Rows, anchor: Tensor) -> tuple[Columns, Tensor]:
    """Equal candidates as one column with the bias log m; the anchor's own item is the positive,
    whatever its m. Without their vectors; and the table's rows that are columns [n]."""
    counts = torch.bincount(pv.source, minlength=p.pv.shape[0])
    source = counts.nonzero().squeeze(1)
    count = counts[source].to(torch.float32)
    own = torch.searchsorted(source, pv.source[anchor])
    return Columns(p.pv, own, bias=count.log(), count=count), source


def masked(
    p: Problem,
    pv: Rows,
    unit: Tensor,
    column: Tensor,  # [n] real PV rows of the columns
    anchor: Tensor,  # [M] real PV rows of the anchors
    own: Tensor,  # [M] columns of the anchors
) -> Columns:
    y = Columns(unit, own, page_only=p.negatives == "page")
    if p.ids is not None:
        ids = p.ids[pv.keep]
        y.order, same = same_id(ids[column], ids[anchor])
        y.same = same[:, None]
    if p.log_q is not None:
        y.bias = y.rank_bias = -p.log_q[pv.keep[column]].to(torch.float32)
    if p.negatives != "batch":
        page, of = pv.page[column], pv.page[anchor]
        first, last = torch.searchsorted(page, of), torch.searchsorted(page, of, right=True)
        y.page = torch.stack([first, last], 1)
    return y


@dataclass
class Anchors:
    """Real rows of both sides, and the clicked ones of PV that have a history and a weight."""

    pv: Rows
    history: Rows
    row: Tensor  # [M] positions among the real PV rows
    weight: Tensor | None  # [M]
    has_history: Tensor  # [n] of each real PV row's page; or whether the row's R is given
    left_out: Tensor  # [n] clicked, on a page without history


def anchors_of(p: Problem) -> Anchors:
    assert p.clicked is not None
    pv, history = real_rows(p, "pv"), real_rows(p, "history")
    if p.reconstructed is None:
        has_history = (history.start.diff() > 0)[pv.page]
    else:
        has_history = p.has_given(pv.keep)
    clicked = p.clicked[pv.keep]
    is_anchor = clicked & has_history
    weights = None if p.weights is None else p.weights[pv.keep]
    if weights is not None:
        is_anchor &= weights > 0
    row = is_anchor.nonzero().squeeze(1)
    weight = None if weights is None else weights[row]
    return Anchors(pv, history, row, weight, has_history, clicked & ~has_history)


def shares_of(p: Problem, anchors: Anchors, upstream: Tensor | None) -> Tensor:
    """dL/d(loss of each anchor) [M] for an upstream gradient of 1, or for `upstream` [N] with
    reduction "none"."""
    weight, count = anchors.weight, len(anchors.row)
    if upstream is not None:
        return upstream[anchors.pv.keep[anchors.row]].to(torch.float32)
    if weight is None:
        return torch.full((count,), 1 / max(count, 1) if p.reduction == "mean" else 1.0)
    return weight / weight.sum(dtype=torch.float64) if p.reduction == "mean" else weight


@dataclass
class Result:
    """What a loss gives, and its gradients."""

    item: Tensor  # [M] loss of each anchor, float64
    lse: Tensor  # [M] over the candidates, float64
    above: Tensor | None  # [M] candidates that score above the positive
    cosine: Tensor  # [M] of the positives, float64
    anchors: Anchors
    gradients: Gradients


def placed(like: Tensor, rows: Tensor, values: Tensor) -> Tensor:
    """`values` at `rows` (ascending) of a tensor as `like`, zeros elsewhere; `values` itself if
    these are all rows."""
    if rows.shape[0] == like.shape[0]:
        return values.to(like.dtype)
    return torch.zeros_like(like).index_copy_(0, rows, values.to(like.dtype))


def gradient_shapes(p: Any, needs: Needs) -> list[tuple[Any, torch.dtype]]:
    tensors = [getattr(p, name) for name in needs.names]
    return [(tuple(t.shape), t.dtype) for t in tensors]


def history_gradients(
    p: Problem, needs: Needs, rows: Tensor, d_k: Tensor | None, d_v: Tensor | None
) -> tuple[Gradients, Tensor | None]:
    """`Gradients.of_history` of gradients of some `rows` of the histories; what a table's rows get
    stays in their order."""

    def of_input(role: str, d: Tensor | None) -> Tensor | None:
        name = p.input_of(role)
        return d if d is None or name == "pv" else placed(getattr(p, name), rows, d)

    return Gradients.of_history(p, needs, of_input("key", d_k), of_input("value", d_v))


def scaled(saved: Sequence[Tensor], needs: Needs, grad: Tensor) -> Gradients:
    # Saved gradients are for an upstream gradient of 1; a new tensor each time, since backward may
    # run again.
    return Gradients.of(needs, (x * grad for x in saved))
