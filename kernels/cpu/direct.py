"""impl="cpu", attention for each candidate as it is defined (direct.inl.h): rows as columns of
float32, and their gradients."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ...loss.problem import NORM_EPS
from .native import stage
from .operands import Attention, Operand, Pages

# Numbers of work for which another thread is started, and columns that it is given at least.
_WORTH_A_THREAD = 1 << 17
_LEAST_COLUMNS = 128


class HeadUnits:
    """Rows [n, D], heads divided by their lengths; zeros, without a gradient, for a zero vector."""

    def __init__(self, rows: Tensor, heads: int) -> None:
        x = rows.float().view(len(rows), heads, -1)
        norm = torch.linalg.vector_norm(x, dim=2, keepdim=True)
        zero = norm <= NORM_EPS
        self.unit = torch.where(zero, 0.0, x / torch.where(zero, 1.0, norm))
        self.inverse = torch.where(zero, 0.0, 1.0 / norm)
        self.rows = self.unit.view(rows.shape)

    def gradient(self, d_unit: Tensor) -> Tensor:
        d = d_unit.reshape(self.unit.shape)
        along = (d * self.unit).sum(2, keepdim=True)
        return ((d - along * self.unit) * self.inverse).view(self.rows.shape)


class Tiles(Protocol):
    """What is asked of the tiles of candidate.py."""

    pages: Pages
    attention: Attention
    inverse_tau: float
    grads: bool
    slope: float
    e: Operand
    q: Operand
    k: Operand
    v: Operand

    def span(self, first: int, last: int) -> tuple[slice, Tensor | None]: ...

    def contrast(
        self, s: Tensor, first: int, last: int, columns: slice, ranges: Tensor | None
    ) -> None: ...


class Direct:
    """The columns of some tiles, turned; `finish` adds what they get to the operands' gradients."""

    def __init__(self, tiles: Tiles) -> None:
        self.tiles, self.attention = tiles, tiles.attention
        e, q = tiles.e, tiles.q
        self.e = e.rows.float().T.contiguous()
        self.q_units = HeadUnits(q.rows, self.attention.heads) if self.attention.cosine else None
        if self.q_units is not None:
            self.q = self.q_units.rows.T.contiguous()
        else:
            self.q = self.e if q.rows is e.rows else q.rows.float().T.contiguous()
        self.d_e = torch.zeros_like(self.e) if tiles.grads and e.gradient is not None else None
        self.d_q = None
        if tiles.grads and q.gradient is not None:
            together = self.q is self.e and q.gradient is e.gradient
            self.d_q = self.d_e if together else torch.zeros_like(self.q)

    def pages(self, first: int, last: int) -> None:
        """Some pages, as `Tiles._chunk`."""
        t = self.tiles
        columns, ranges = t.span(first, last)
        rows = slice(int(t.pages.start[first]), int(t.pages.start[last]))
        count, dim = columns.stop - columns.start, len(self.e)
        k, k_units = _history(t.k, rows, self.attention)
        v = k if t.k is t.v and k_units is None else t.v.rows[rows].float()
        starts = t.pages.start[first : last + 1] - rows.start
        s = torch.zeros(last - first, count)
        about = (
            self.q,
            self.e,
            columns.start,
            k,
            v,
            starts,
            ranges,
            t.e.inverse,
            self.attention.scale,
            t.inverse_tau,
            self.attention.heads,
            s,
        )
        worth = count * len(k) * dim // _WORTH_A_THREAD
        parts = max(1, min(torch.get_num_threads(), worth, count // _LEAST_COLUMNS))
        stage("direct", *about, False, parts, None, None, None, None, None)
        t.contrast(s, first, last, columns, ranges)
        if not t.grads:
            return
        d_k, d_v = torch.zeros(2, parts, *k.shape)
        slope = torch.zeros(parts, last - first, dtype=torch.float64)
        stage("direct", *about, True, parts, self.d_q, self.d_e, d_k, d_v, slope)
        t.slope += float(slope.sum())
        if t.e.radial is not None:
            t.e.radial[columns] += s.sum(0)
        for side, found, units in ((t.k, d_k.sum(0), k_units), (t.v, d_v.sum(0), None)):
            if side.gradient is not None:
                side.gradient[rows] += found if units is None else units.gradient(found)

    def finish(self) -> None:
        t = self.tiles
        if self.d_e is not None and t.e.gradient is not None:
            t.e.gradient += self.d_e.T
        if self.d_q is not None and self.d_q is not self.d_e and t.q.gradient is not None:
            found = self.d_q.T
            t.q.gradient += found if self.q_units is None else self.q_units.gradient(found)


def _history(side: Operand, rows: slice, attention: Attention) -> tuple[Tensor, HeadUnits | None]:
    """Keys of some pages, and with cosines how they came to be."""
    if not attention.cosine:
        return side.rows[rows].float(), None
    units = HeadUnits(side.rows[rows], attention.heads)
    return units.rows, units
