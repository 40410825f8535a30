"""impl="cpu": rows against a block of columns (courier_fast/loss/union/blocks.py), by the chunks of
loss.py."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...loss.union import blocks
from . import candidate, operands
from .contrast import contrast_block
from .rows import Columns, on_other_pages, same_id
from .widen import widened_block, widened_histories

if TYPE_CHECKING:
    from ...loss.problem import Histories
    from ...loss.union.blocks import Block, CandidateGradients, Partial, Scoring


def _candidates(x: Block, y: Block, pairs: str) -> Columns:
    """`blocks.allowed` as ranges of columns that are left out."""
    found = Columns(y.rows, torch.full((len(x),), -1, dtype=torch.int64))
    if y.bias is not None:
        found.bias = y.bias.to(torch.float32)
    if x.ids is None or y.ids is None:
        return found
    if pairs == "sequence":
        assert x.page is not None
        found.own = torch.arange(len(x))
        found.order, found.same = on_other_pages(x.ids, x.page)
        return found
    found.order, same = same_id(y.ids, x.ids)
    found.same = same[:, None]
    if pairs == "other_pages":
        assert x.page is not None and y.page is not None
        first = torch.searchsorted(y.page, x.page)
        found.page = torch.stack([first, torch.searchsorted(y.page, x.page, right=True)], 1)
    return found


def forward(x: Block, y: Block, pairs: str, scoring: Scoring, bar: Tensor | None) -> Partial:
    """As blocks.forward."""
    x, y = widened_block(x), widened_block(y)
    if not len(y) or not len(x):
        return blocks.no_columns(x, bar)
    lse, mean, _ = contrast_block(
        x.rows, _candidates(x, y, pairs), float(scoring.inverse_tau), None, torch.ones(len(x))
    )
    ranks = None if bar is None else blocks.above(x, y, pairs, scoring, bar)
    return blocks.Partial(lse, mean, ranks)


def backward(y: Block, x: Block, lse: Tensor, g: Tensor, pairs: str, scoring: Scoring) -> Tensor:
    """As blocks.backward."""
    x, y = widened_block(x), widened_block(y)
    if not len(y) or not len(x):
        return torch.zeros(y.rows.shape)
    found = contrast_block(x.rows, _candidates(x, y, pairs), float(scoring.inverse_tau), lse, g)
    return found[2]


class _Candidates(candidate.Tiles):
    """Attention "candidate" over a block: what candidate.py does with a tile, with a contrast that
    knows no positive."""

    def __init__(
        self,
        histories: Histories,
        x: Block,
        y: Block,
        pairs: str,
        scoring: Scoring,
        given: tuple[Tensor, Tensor] | None,
        bar: Tensor | None,
    ) -> None:
        self.x, self.columns, self.pairs, self.scoring = x, y, pairs, scoring
        self.given, self.bar = given, bar
        self.lse = torch.full((len(x),), -torch.inf, dtype=torch.float64)
        self.above = None if bar is None else torch.zeros(len(x), dtype=torch.int64)
        self.keep = (histories.page >= 0).nonzero().squeeze(1)
        counts = torch.bincount(histories.page[self.keep], minlength=len(histories.offsets) - 1)
        starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        assert x.page is not None
        of = operands.pages_of(x.page, starts)
        grads = given is not None

        def operand(rows: Tensor, unit: bool) -> operands.Operand:
            return operands.Operand.of(rows, unit, grads)

        listed = self.keep[of.rows]
        e = operand(y.rows, True)
        same = y.query is None and histories.value is histories.key
        k = operand(histories.key[listed], histories.cosine)
        v = k if same else operand(histories.value[listed], False)
        q = e if same else replace(e) if y.query is None else operand(y.query, histories.cosine)
        attention = operands.Attention(histories.scale, histories.cosine, histories.heads)
        super().__init__(
            of, operands.Operands(e, q, k, v), attention, float(scoring.inverse_tau), grads
        )

    def gradients(self, histories: Histories) -> CandidateGradients:
        def placed(x: operands.Operand) -> Tensor:
            gradient = x.finished()
            assert gradient is not None
            whole = torch.zeros(histories.key.shape)
            return whole.index_copy_(0, self.keep[self.pages.rows], gradient)

        # q is e where it has no rows of its own: what is subtracted for both is in one place.
        rows = self.e.finished()
        query = None if self.columns.query is None else self.q.finished()
        key = placed(self.k)
        value = None if histories.value is histories.key else placed(self.v)
        assert rows is not None
        # sum of dL/ds s is that of dL/d(1/tau) / tau.
        slope = torch.tensor(self.slope / self.inverse_tau, dtype=torch.float64)
        return blocks.CandidateGradients(rows, query, key, value, slope)

    def span(self, first: int, last: int) -> tuple[slice, Tensor | None]:
        return slice(0, len(self.columns)), None

    def contrast(
        self, s: Tensor, first: int, last: int, columns: slice, ranges: Tensor | None
    ) -> None:
        """Log-sum-exps from the scores s [pages, n], or dL/ds in their place."""
        starts = self.pages.anchors[first : last + 1]
        mine = slice(int(starts[0]), int(starts[-1]))
        which = torch.arange(last - first).repeat_interleave(starts.diff())
        y, t = self.columns, s[which]
        if y.bias is not None:
            t += y.bias.to(t.dtype)
        meet = blocks.allowed(self.x.part(mine), y, self.pairs)
        if meet is not None:
            t.masked_fill_(~meet, -torch.inf)
        if self.given is not None:
            lse, g = (x[mine, None] for x in self.given)
            t.sub_(lse).exp_().mul_(g)
            s.zero_().index_add_(0, which, t)
            return
        self.lse[mine] = t.logsumexp(1).double()
        if self.above is not None and self.bar is not None:
            self.above[mine] = blocks.count_above(t, y, self.scoring, self.bar[mine])


def candidate_forward(
    histories: Histories, x: Block, y: Block, pairs: str, scoring: Scoring, bar: Tensor | None
) -> Partial:
    """As blocks.candidate_forward."""
    histories, x, y = widened_histories(histories), widened_block(x), widened_block(y)
    if not len(x) or not len(y):
        return replace(blocks.no_columns(x, bar), mean=None)
    run = _Candidates(histories, x, y, pairs, scoring, None, bar)
    return blocks.Partial(run.lse, None, run.above)


def candidate_backward(
    histories: Histories, x: Block, y: Block, lse: Tensor, g: Tensor, pairs: str, scoring: Scoring
) -> CandidateGradients:
    """As blocks.candidate_backward."""
    histories, x, y = widened_histories(histories), widened_block(x), widened_block(y)
    if not len(x) or not len(y):
        return blocks.no_gradients(histories, y)
    return _Candidates(histories, x, y, pairs, scoring, (lse, g), None).gradients(histories)
