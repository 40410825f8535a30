"""impl="cpu": tiles of the similarity through torch.mm, everything between two products in one
native pass.

With reduction "mean" or "sum" the weights of the anchors are known in the forward pass, so each
chunk of rows of P = exp(s - top) is computed once and serves both P e and P^T r while it is in
cache; the backward only scales what was saved. README.md has the measurements.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ...loss.problem import Gradients, Needs, Problem, SequenceProblem
from ...surroundings import has_slow_products
from . import candidate, native
from .attention import Reconstruction, attend, reconstruction_gradients
from .contrast import Scores, contrast
from .native import VARIANT_VARIABLE
from .rows import (
    Columns,
    Result,
    Rows,
    anchors_of,
    can_merge,
    gradient_shapes,
    inverse_tau_of,
    masked,
    merged,
    normalize,
    normalize_backward,
    real_rows,
    scaled,
    shares_of,
)
from .sequence import sequence_backward, sequence_forward, sequence_saved_spec
from .widen import narrowed, widened

__all__ = [
    "loss_backward",
    "loss_forward",
    "reconstruct_backward",
    "reconstruct_forward",
    "saved_spec",
    "sequence_backward",
    "sequence_forward",
    "sequence_saved_spec",
    "unavailable_reasons",
]
_DTYPES = (torch.float32, torch.bfloat16)


def unavailable_reasons(p: Problem | SequenceProblem) -> list[str]:
    """Why the CPU kernels cannot run this problem here; empty if they can."""
    source = p.pv if hasattr(p, "pv") else p.history
    reasons = []
    if native.library is None:
        reasons.append(
            "the native library courier_fast._native is missing or does not load: "
            f"{native.error_text}"
        )
    else:
        variant = os.environ.get(VARIANT_VARIABLE)
        if variant is not None and variant not in native.library.variants():
            runs = ", ".join(native.library.variants())
            reasons.append(f"{VARIANT_VARIABLE} is {variant!r}, and this CPU runs {runs}")
    if source.device.type != "cpu":
        reasons.append(f"the tensors are on {source.device.type!r}, not on the CPU")
    if source.dtype not in _DTYPES:
        reasons.append(f"dtype is {source.dtype}; float32 or bfloat16 is needed")
    return reasons


def saved_spec(p: Problem, needs: Needs) -> list[tuple[Any, torch.dtype]]:
    """The finished gradients, unless each row's upstream gradient has to be awaited."""
    return [] if p.reduction == "none" else gradient_shapes(p, needs)


# ---- reconstruction loss -------------------------------------------------------------------------


def _run(p: Problem, needs: Needs, want_rank: bool, upstream: Tensor | None) -> Result:
    """Forward pass and, if `needs` says so, all gradients; `upstream` [N] for reduction "none"."""
    if has_slow_products(p.pv):
        result = _run(widened(p), needs, want_rank, upstream)
        return replace(result, gradients=narrowed(result.gradients, p))
    if p.attention == "candidate":
        return candidate.run(p, needs, want_rank, upstream)
    one = _Run(p, needs, want_rank, upstream)
    first, items = one.scores[0], one.scores[0].loss
    if len(one.scores) > 1:
        items = (items + one.scores[1].loss) / 2
    return Result(items, first.lse, first.above, one.cosine, one.a, one.gradients())


class _Run:
    """One forward pass, with the gradients of both sides where anchors have weights g."""

    def __init__(self, p: Problem, needs: Needs, want_rank: bool, upstream: Tensor | None) -> None:
        self.p, self.needs, self.inverse_tau = p, needs, inverse_tau_of(p)
        self.a = a = anchors_of(p)
        self.every = p.direction != "reconstruct"
        # The rows with an R, and the anchors' places among them.
        self.listed, self.place = a.row, None
        if self.every:
            self.listed = a.has_history.nonzero().squeeze(1)
            self.place = torch.searchsorted(self.listed, a.row)
        self.r = attend(p, a.pv, a.history, self.listed, False)
        self.r_anchor = self.r.unit if self.place is None else self.r.unit[self.place]
        self.cosine = self.r.positive if self.place is None else self.r.positive[self.place]
        self.g = shares_of(p, a, upstream) if any(needs) else None
        if self.g is not None and p.direction == "both":
            self.g = self.g / 2
        self.columns = None if p.direction == "identify" else _item_columns(p, a.pv, a.row)
        self.e_anchor, self.e_norm = normalize(p.pv, a.pv.source[a.row])
        self.positive = self.cosine * self.inverse_tau
        if p.log_q is not None:
            self.positive = self.positive - p.log_q[a.pv.keep[a.row]]
        self.d_r: Tensor | None = None  # [listed, D], without the 1/tau as the next two
        self.d_e: Tensor | None = None  # [M, D] of the anchors
        self.d_columns: Tensor | None = None
        self.scores: list[Scores] = []
        if self.columns is not None:
            self._reconstruct(self.columns, want_rank)
        if self.every:
            self._identify(want_rank and not self.scores)

    def _zeros(self) -> Tensor:
        return torch.zeros(len(self.listed), self.p.pv.shape[1])

    def _keep(self, s: Scores) -> None:
        """Without its vectors, to be given back before the gradients through the attention."""
        self.scores.append(Scores(s.lse, s.loss, s.above, None, None, None))

    def _reconstruct(self, columns: _ItemColumns, want_rank: bool) -> None:
        """Each anchor's R against the items."""
        about = (columns.candidates, self.inverse_tau, self.positive, self.e_anchor, self.g)
        s = contrast(self.r_anchor, *about, want_rank, self.needs.pv)
        if s.d_x is not None:
            self.d_e, self.d_columns = s.d_own, s.d_y
            self.d_r = s.d_x
            if self.place is not None:
                self.d_r = self._zeros().index_add_(0, self.place, s.d_x)
        self._keep(s)

    def _identify(self, want_rank: bool) -> None:
        """Each anchor's item against all R."""
        y = masked(self.p, self.a.pv, self.r.unit, self.listed, self.a.row, self.place)
        if self.g is not None and self.d_r is None:
            self.d_r = self._zeros()
        about = (y, self.inverse_tau, self.positive, self.r_anchor, self.g)
        s = contrast(self.e_anchor, *about, want_rank, add_to=self.d_r)
        if s.d_x is not None:
            assert self.d_r is not None
            self.d_e = s.d_x if self.d_e is None else self.d_e.add_(s.d_x)
            self.d_r.index_add_(0, self.place, s.d_own)
        self._keep(s)

    def gradients(self) -> Gradients:
        """Of the problem's inputs; once."""
        p, a, d_r = self.p, self.a, self.d_r
        if d_r is None or self.d_e is None:
            return Gradients()
        d_temperature = None
        if self.needs.temperature:
            assert p.temperature is not None
            # Every score is r . e / tau: the sum of dL/dr . r is dL/d(1/tau).
            slope = (d_r * self.r.unit).sum(dtype=torch.float64)
            d_temperature = (-slope * self.inverse_tau**2).to(p.temperature.dtype)
        normalize_backward(d_r, self.r.unit, self.r.norm, self.inverse_tau)
        total = None
        if self.needs.pv:
            total = _column_gradients(p, self.columns, self.d_columns, self.inverse_tau)
            normalize_backward(self.d_e, self.e_anchor, self.e_norm, self.inverse_tau)
            total.index_add_(0, a.pv.source[a.row], self.d_e)
        self.columns = self.d_columns = self.d_e = None  # their memory is for what follows
        rows = (a.pv, a.history, self.listed)
        found = reconstruction_gradients(p, self.needs, total, *rows, self.r.attention, d_r)
        found.temperature = d_temperature
        return found


@dataclass
class _ItemColumns:
    """The columns of direction "reconstruct": PV items, or the unique items among them."""

    candidates: Columns
    norm: Tensor  # [n]
    source: Tensor  # [n] rows of pv or of the table
    every_row: bool  # `source` is all of them, in order


def _column_gradients(
    p: Problem, columns: _ItemColumns | None, d_columns: Tensor | None, inverse_tau: float
) -> Tensor:
    """float32 gradient of pv (or of the table) as columns; in the memory of `d_columns` where that
    has its shape."""
    if columns is None or d_columns is None:
        return torch.zeros(p.pv.shape, dtype=torch.float32)
    normalize_backward(d_columns, columns.candidates.unit, columns.norm, inverse_tau)
    if columns.every_row:
        return d_columns
    return torch.zeros(p.pv.shape, dtype=torch.float32).index_add_(0, columns.source, d_columns)


def _item_columns(p: Problem, pv: Rows, anchor: Tensor) -> _ItemColumns:
    if p.pv_index is not None and can_merge(p):
        y, source = merged(p, pv, anchor)
        unit, norm = normalize(p.pv, source)
        y.unit = unit
        return _ItemColumns(y, norm, source, source.shape[0] == p.pv.shape[0])
    unit, norm = normalize(p.pv, pv.source)
    y = masked(p, pv, unit, torch.arange(len(pv.keep)), anchor, anchor)
    every_row = p.pv_index is None and len(pv.keep) == p.pv.shape[0]
    return _ItemColumns(y, norm, pv.source, every_row)


def _reduced(p: Problem, result: Result) -> Tensor:
    anchors = result.anchors
    if p.reduction == "none":
        item = result.item.float()
        return torch.zeros(p.num_pv).index_copy_(0, anchors.pv.keep[anchors.row], item)
    weight = anchors.weight
    loss = (result.item if weight is None else weight.double() * result.item).sum()
    if p.reduction == "mean" and len(result.item):
        loss /= len(result.item) if weight is None else weight.sum(dtype=torch.float64)
    return loss.to(torch.float32)


def loss_forward(p: Problem, needs: Needs, stats: bool) -> tuple[Any, ...]:
    """(loss, item_loss, log_sum_exp, positive_similarity, rank, is_anchor, num_skipped, saved)."""
    early = p.reduction != "none"
    result = _run(p, needs if early else Needs(), stats, None)
    anchors = result.anchors
    where = anchors.pv.keep[anchors.row]

    def spread(x: Tensor | None) -> Tensor:
        if not stats or x is None:
            return torch.zeros(0)
        dtype = torch.float32 if x.is_floating_point() else x.dtype
        return torch.zeros(p.num_pv, dtype=dtype).index_copy_(0, where, x.to(dtype))

    rank = torch.zeros(0, dtype=torch.int64)
    is_anchor, skipped = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    if stats:
        assert result.above is not None
        rank = spread(result.above + 1)
        is_anchor = torch.zeros(p.num_pv, dtype=torch.bool).index_fill_(0, where, True)
        skipped = anchors.left_out.sum()
    saved = result.gradients.present()
    per_row = (spread(result.item), spread(result.lse), spread(result.cosine))
    return _reduced(p, result), *per_row, rank, is_anchor, skipped, saved


def loss_backward(p: Problem, needs: Needs, saved: Sequence[Tensor], grad: Tensor) -> Gradients:
    """Of `p`'s inputs."""
    if p.reduction == "none":
        return _run(p, needs, False, grad).gradients
    return scaled(saved, needs, grad)


# ---- reconstruct ---------------------------------------------------------------------------------


def _reconstructed(p: Problem) -> tuple[Rows, Rows, Tensor, Reconstruction]:
    pv, history = real_rows(p, "pv"), real_rows(p, "history")
    listed = (history.start.diff() > 0)[pv.page].nonzero().squeeze(1)
    return pv, history, listed, attend(p, pv, history, listed, True)


def reconstruct_forward(p: Problem) -> Tensor:
    """R [N, D], zeros for padding and for pages without history."""
    pv, _, listed, r = _reconstructed(p)
    return torch.zeros(p.num_pv, p.pv.shape[1], dtype=p.pv.dtype).index_copy_(
        0, pv.keep[listed], r.unit
    )


def reconstruct_backward(p: Problem, needs: Needs, grad: Tensor) -> Gradients:
    """Of `p`'s inputs; the attention weights are computed again."""
    pv, history, listed, r = _reconstructed(p)
    d_r = grad[pv.keep[listed]].to(torch.float32).contiguous()
    total = torch.zeros(p.pv.shape, dtype=torch.float32) if needs.pv else None
    return reconstruction_gradients(p, needs, total, pv, history, listed, r.attention, d_r)
