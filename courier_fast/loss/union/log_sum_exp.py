"""The log-sum-exp of rows over columns that are in more than one place: the one primitive with a
gradient.

Columns come block by block (blocks.py): the batch's own, those of other processes, those of a
memory. Partial results merge.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ...surroundings import alone, alone_backward
from ..problem import NORM_EPS, Histories
from .blocks import Block, Partial, Scoring
from .candidates import CandidateUnion
from .exchange import rounds_of


@dataclass
class Call:
    """One log-sum-exp: everything but the two tensors that take a gradient. The sides are without
    their rows."""

    union: CandidateUnion
    scoring: Scoring
    x: Block
    y: Block
    pairs: str  # of the rows with this batch's own columns (blocks.allowed)
    identified: bool  # ids mean the same elsewhere; else nothing elsewhere is one of these items
    rows: list[int]  # of x on each process
    columns: list[int]
    memory: Block | None
    bar: Tensor | None  # [M] scores of the positives, where ranks are asked for

    def others(self, block: Block, counts: list[int], *more: Tensor) -> Iterator[Any]:
        """Blocks of the other processes' rows of a block: (block, *more, rows of each process). The
        first transfer begins here."""
        processes = self.union.processes
        if processes is None:
            return iter(())
        ids = block.ids if self.identified else None
        fields = [block.rows, block.query, ids, block.bias, *more]
        wide = sum(
            x.element_size() * (x.shape[1] if x.dim() > 1 else 1) for x in fields if x is not None
        )
        rounds = rounds_of(
            self.union.exchange, processes.size, max(counts), wide, self.scoring.workspace
        )
        return (
            (Block(rows, ids, None, bias, block.merged, query=query), *rest, live)
            for (rows, query, ids, bias, *rest), live in processes.others(fields, counts, rounds)
        )

    def merged(self, own: Block, partial: Callable[[Block, str], Partial]) -> Partial:
        """What `partial` gives for this batch's columns, other processes' and the memory's."""
        blocks = self.others(own, self.columns)
        found = partial(own, self.pairs)
        for block, _ in blocks:
            found = found.merge(partial(block, "ids"))
        if self.memory is not None:
            found = found.merge(partial(self.memory, "ids"))
        return found


class LogSumExp(torch.autograd.Function):
    """lse_i = logsumexp_j x_i . y_j / tau + bias_j [M] float64, and how many score above the
    positive [M].

    Columns are gathered in the forward pass, rows in the backward:
    dL/dy_j = sum_i g_i p_ij x_i / tau is finished where y_j is,
    dL/dx_i = g_i sum_j p_ij y_j / tau where x_i is.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, y: Tensor, inverse_tau: Tensor, dtype: torch.dtype, call: Call
    ) -> tuple[Tensor, Tensor]:
        backend = call.union.backend
        own_x, own_y = replace(call.x, rows=x.to(dtype)), replace(call.y, rows=y.to(dtype))
        with alone(x):
            found = call.merged(
                own_y, lambda y, pairs: backend.forward(own_x, y, pairs, call.scoring, call.bar)
            )
        ctx.save_for_backward(own_x.rows, own_y.rows, found.lse, found.mean, inverse_tau)
        ctx.call, ctx.dtypes = call, (x.dtype, y.dtype)
        above = found.above if found.above is not None else x.new_zeros(0, dtype=torch.int64)
        ctx.mark_non_differentiable(above)
        return found.lse, above

    @staticmethod
    @once_differentiable
    @alone_backward
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:  # type: ignore[override]
        x, y, lse, mean, inverse_tau = ctx.saved_tensors
        call: Call = ctx.call
        backend, scoring = call.union.backend, call.scoring
        own_x, own_y = replace(call.x, rows=x), replace(call.y, rows=y)
        d_y = d_x = d_scale = None
        weights = g.to(mean.dtype)
        if ctx.needs_input_grad[1]:
            # A row without weight may have no candidate: exp(s - inf) is 0 whatever s is.
            lse = torch.where(g == 0, torch.inf, lse)
            blocks = call.others(replace(own_x, bias=None), call.rows, lse, weights)
            d_y = backend.backward(own_y, own_x, lse, weights, call.pairs, scoring)
            for rows, row_lse, row_weights, _ in blocks:
                if len(own_y):
                    d_y += backend.backward(own_y, rows, row_lse, row_weights, "ids", scoring)
            d_y = (d_y * inverse_tau.to(d_y.dtype)).to(ctx.dtypes[1])
        pulled = weights[:, None] * mean
        if ctx.needs_input_grad[2]:
            d_scale = (pulled.double() * x.double()).sum()
        if ctx.needs_input_grad[0]:
            d_x = (pulled * inverse_tau.to(pulled.dtype)).to(ctx.dtypes[0])
        return d_x, d_y, d_scale, None, None


class CandidateLogSumExp(torch.autograd.Function):
    """The same for attention "candidate": lse_i over s_ij = cos(R_bj, E_j) / tau + bias_j on i's
    page b.

    Candidates travel, histories stay: dL/dE_j has a part from every process, and these parts travel
    back to be added up.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        rows: Tensor,
        query: Tensor | None,
        key: Tensor,
        value: Tensor | None,
        inverse_tau: Tensor,
        histories: Histories,
        call: Call,
    ) -> tuple[Tensor, Tensor]:
        partial = call.union.backend.candidate_forward
        histories = replace(histories, key=key, value=key if value is None else value)
        with alone(rows):
            found = call.merged(
                replace(call.y, rows=rows, query=query),
                lambda y, pairs: partial(histories, call.x, y, pairs, call.scoring, call.bar),
            )
        ctx.save_for_backward(rows, query, key, value, found.lse)
        ctx.call, ctx.histories = call, replace(histories, key=None, value=None)
        above = found.above if found.above is not None else rows.new_zeros(0, dtype=torch.int64)
        ctx.mark_non_differentiable(above)
        return found.lse, above

    @staticmethod
    @once_differentiable
    @alone_backward
    def backward(ctx: Any, g: Tensor, _: Any) -> Any:  # type: ignore[override]
        rows, query, key, value, lse = ctx.saved_tensors
        call: Call = ctx.call
        backend, scoring, x = call.union.backend, call.scoring, call.x
        histories = replace(ctx.histories, key=key, value=key if value is None else value)
        own = replace(call.y, rows=rows, query=query)
        lse = torch.where(g == 0, torch.inf, lse)
        g = g.to(torch.promote_types(rows.dtype, torch.float32))
        blocks = call.others(own, call.columns)
        d = backend.candidate_backward(histories, x, own, lse, g, call.pairs, scoring)
        first = 0  # of this process's rows, in a round
        for block, live in blocks:
            part = backend.candidate_backward(histories, x, block, lse, g, "ids", scoring)
            d.add(part)
            assert call.union.processes is not None
            back = part.rows if query is None else torch.cat([part.rows, part.query], 1)
            mine = call.union.processes.home(back, live)
            d.rows[first : first + len(mine)] += mine[:, : rows.shape[1]]
            if d.query is not None:
                d.query[first : first + len(mine)] += mine[:, rows.shape[1] :]
            first += len(mine)
        if call.memory is not None:
            d.add(backend.candidate_backward(histories, x, call.memory, lse, g, "ids", scoring))
        wanted = ctx.needs_input_grad
        found = (d.rows, d.query, d.key, d.value)
        kinds = (rows, query, key, value)
        grads = [
            f.to(k.dtype) if want and f is not None and k is not None else None
            for want, f, k in zip(wanted, found, kinds, strict=False)
        ]
        return *grads, d.inverse_tau if wanted[4] else None, None, None


class _Unit(torch.autograd.Function):
    """x / |x|, rounded as x is, in float32 or better, so that its gradient is not rounded; zero
    vectors stay zero."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        wide = torch.promote_types(x.dtype, torch.float32)
        norm = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide)
        norm = torch.where(norm <= NORM_EPS, torch.inf, norm)
        unit = (x.to(wide) / norm).to(x.dtype).to(wide)
        ctx.save_for_backward(unit, norm)
        ctx.dtype = x.dtype
        return unit

    @staticmethod
    @once_differentiable
    @alone_backward
    def backward(ctx: Any, d: Tensor) -> Tensor:  # type: ignore[override]
        unit, norm = ctx.saved_tensors
        return ((d - (d * unit).sum(1, keepdim=True) * unit) / norm).to(ctx.dtype)


def unit_rows(x: Tensor) -> Tensor:
    return _Unit.apply(x)
