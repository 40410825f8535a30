"""impl="cpu", attention for each candidate: products of the columns with the history by torch.mm, a
chunk of pages at a time.

For page b and candidate j everything comes from dot products, x_jk = E_j . v_k and the logits'
q_j . k_k:

    s_bj = sum_k w_k x_jk / (tau |E_j| |sum_k w_k v_k|),   w_k = exp(logit_jk)

One native pass over a tile of them gives the scores, a second one the contrast of each anchor and
dL/ds, a third one puts dL/dx in the tile's place, whose products with v and E are the gradients.
README.md has the mathematics.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ...loss.problem import Gradients, Needs, Problem
from .direct import Direct
from .native import stage
from .operands import Attention, Operand, Operands, Pages, pages_of
from .rows import (
    Columns,
    Result,
    Rows,
    anchors_of,
    can_merge,
    history_gradients,
    inverse_tau_of,
    masked,
    merged,
    part,
    placed,
    shares_of,
)

# Of a tile of products.
CHUNK_BYTES = 16 << 20
# Longer histories, fewer dimensions and several heads are for direct.py: this way takes H^2 steps a
# candidate, and where values of few dimensions cancel, it is not as exact as R itself.
LONGEST_HISTORY = 192
LEAST_DIM = 16


class Tiles:
    """Columns against pages, a tile of whole pages at a time: the scores, and the gradients with
    them where `grads`."""

    def __init__(
        self,
        pages: Pages,
        operands: Operands,
        attention: Attention,
        inverse_tau: float,
        grads: bool,
    ) -> None:
        self.pages, self.attention = pages, attention
        self.inverse_tau, self.grads = inverse_tau, grads
        self.e, self.q, self.k, self.v = operands.e, operands.q, operands.k, operands.v
        self.same = operands.same
        self.slope = 0.0
        self._room: dict[str, Tensor] = {}
        rows, itemsize = len(self.e.rows), self.e.rows.element_size() * (1 if self.same else 2)
        self.chunk_rows = max(1, CHUNK_BYTES // max(rows * itemsize, 1))
        self.chunk_pages = max(1, CHUNK_BYTES // max(rows * 4, 1))
        direct: Direct | None = None
        for first, last, is_direct in self._chunks():
            if not is_direct:
                self._chunk(first, last)
                continue
            direct = direct or Direct(self)
            direct.pages(first, last)
        if direct is not None and grads:
            direct.finish()

    def span(self, first: int, last: int) -> tuple[slice, Tensor | None]:
        """The columns that these pages look at, and where each looks at its own alone, those of
        each among them."""
        raise NotImplementedError

    def contrast(
        self, s: Tensor, first: int, last: int, columns: slice, ranges: Tensor | None
    ) -> None:
        """Results of these pages' anchors; dL/ds in place of their scores s [pages, columns]."""
        raise NotImplementedError

    def _chunks(self) -> Iterator[tuple[int, int, bool]]:
        """(first page, end, whether direct.py takes them): whole pages, as many as a tile holds."""
        first, rows, before, count = 0, 0, False, len(self.pages.lengths)
        every = self.attention.heads > 1 or self.e.rows.shape[1] < LEAST_DIM
        for i, length in enumerate(self.pages.lengths):
            direct = every or length > LONGEST_HISTORY
            full = i - first >= self.chunk_pages if direct else rows + length > self.chunk_rows
            if first < i and (full or direct != before):
                yield first, i, before
                first, rows = i, 0
            before = direct
            rows += length
        if first < count:
            yield first, count, before

    def _tile(self, name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
        """[rows, columns] in the place of the last tile of that name: given back and asked for
        anew, the heap keeps more than one of them."""
        if name not in self._room or len(self._room[name]) < rows * columns:
            self._room.pop(name, None)
            self._room[name] = torch.empty(rows * columns, dtype=dtype)
        return self._room[name][: rows * columns].view(rows, columns)

    def _product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        return torch.mm(a, b, out=self._tile(name, len(a), b.shape[1], a.dtype))

    def _chunk(self, first: int, last: int) -> None:
        by, pages = self.attention, self.pages
        columns, ranges = self.span(first, last)
        rows = slice(int(pages.start[first]), int(pages.start[last]))
        e, v = self.e.rows[columns], self.v.rows[rows]
        x = self._product("x", v, e.T)
        y = None
        if not self.same:
            y = self._product("y", self.k.rows[rows], self.q.rows[columns].T)
        scale = None
        if by.cosine and self.q.inverse is not None:
            scale = self.q.inverse[columns] * by.scale
        s = self._tile("s", last - first, x.shape[1], torch.float32)
        numbers = torch.arange(rows.stop - rows.start)
        starts = pages.start[first : last + 1] - rows.start
        about = (
            x,
            y,
            starts,
            ranges,
            v,
            numbers,
            scale,
            part(self.k.inverse, rows) if by.cosine else None,
            part(self.e.inverse, columns),
            by.scale,
            self.inverse_tau,
            s,
        )
        stage("candidate", *about, False, None, None, None, None)
        self.contrast(s, first, last, columns, ranges)
        if not self.grads:
            return
        turned = None
        if by.cosine and not self.same:
            turned = self._tile("turned", last - first, x.shape[1], torch.float32)
        slope = torch.empty(last - first, dtype=torch.float64)
        through_length = None if self.v.gradient is None else torch.empty(v.shape)
        k_radial = part(self.k.radial, rows)
        if by.cosine and k_radial is None:
            k_radial = torch.zeros(len(v))
        stage("candidate", *about, True, turned, k_radial, through_length, slope)
        self.slope += float(slope.sum())
        if self.e.radial is not None:
            self.e.radial[columns] += s.sum(0)
        if turned is not None and self.q.radial is not None:
            self.q.radial[columns] += turned.sum(0)
        _add_product(self.e.gradient, columns, x.T, v)
        _add_product(self.v.gradient, rows, x, e)
        if self.v.gradient is not None:
            self.v.gradient[rows] += through_length
        if y is not None:
            _add_product(self.q.gradient, columns, y.T, self.k.rows[rows])
            _add_product(self.k.gradient, rows, y, self.q.rows[columns])


class _Run(Tiles):
    """One forward pass, and the gradients with it where there are weights g of the anchors."""

    def __init__(self, p: Problem, needs: Needs, want_rank: bool, upstream: Tensor | None) -> None:
        self.p, self.needs = p, needs
        self.a = anchors_of(p)
        pages = pages_of(self.a.pv.page[self.a.row], self.a.history.start)
        self.g = shares_of(p, self.a, upstream) if any(needs) else None
        self.y, self.column_source, self.every_row = self._columns()
        m = len(self.a.row)
        self.lse, self.loss, self.positive = torch.zeros(3, m, dtype=torch.float64)
        self.above = torch.zeros(m, dtype=torch.int64) if want_rank else None
        attention = Attention(p.attention_scale, p.cosine, p.num_heads)
        operands = self._operands(pages.rows)
        super().__init__(pages, operands, attention, inverse_tau_of(p), self.g is not None)

    # ---- what takes part -----------------------------------------------------------------------

    def _columns(self) -> tuple[Columns, Tensor, bool]:
        p, pv, anchor = self.p, self.a.pv, self.a.row
        if p.pv_index is not None and p.query is None and can_merge(p):
            y, source = merged(p, pv, anchor)
            return y, source, len(source) == len(p.pv)
        y = masked(p, pv, p.pv, torch.arange(len(pv.keep)), anchor, anchor)
        return y, pv.source, p.pv_index is None and len(pv.keep) == len(p.pv)

    def _operands(self, listed: Tensor) -> Operands:
        """`listed` [K]: the real history rows that take part."""
        p, grads = self.p, self.g is not None
        own = p.pv if p.history is None else p.history
        history: Rows = self.a.history

        def side(x: Tensor, rows: Tensor, every: bool, unit: bool, wanted: bool) -> Operand:
            return Operand.of(x if every else x[rows], unit, grads and wanted)

        def of_history(role: str, unit: bool) -> Operand:
            given, wanted = getattr(p, role), self.needs.of(p, role)
            rows = history.source[listed] if given is None else history.keep[listed]
            return side(own if given is None else given, rows, False, unit, wanted)

        e = side(p.pv, self.column_source, self.every_row, True, self.needs.pv)
        if p.query is None and p.key is None and p.value is None:
            both = of_history("value", p.cosine)
            return Operands(e, e, both, both)
        v = of_history("value", False)
        k = of_history("key", p.cosine)
        if p.query is None:
            q = replace(e)
        else:
            keep = self.a.pv.keep
            q = side(p.query, keep, len(keep) == len(p.query), p.cosine, self.needs.query)
        return Operands(e, q, k, v)

    def span(self, first: int, last: int) -> tuple[slice, Tensor | None]:
        if self.y.page is None or not self.y.page_only:
            return slice(0, len(self.e.rows)), None
        each = self.y.page[self.pages.anchors[first:last]]
        low = int(each[0, 0])
        return slice(low, int(each[-1, 1])), each - low

    def contrast(
        self, s: Tensor, first: int, last: int, columns: slice, ranges: Tensor | None
    ) -> None:
        starts = self.pages.anchors[first : last + 1]
        mine = slice(int(starts[0]), int(starts[-1]))
        about = (columns.start, starts - starts[0], ranges, *self.y.about(mine, columns))
        found = (self.lse[mine], self.loss[mine], self.positive[mine], part(self.above, mine))
        stage("softmax", s, *about, part(self.g, mine), *found)

    # ---- results -------------------------------------------------------------------------------

    def gradients(self) -> Gradients:
        p, needs, a, listed = self.p, self.needs, self.a, self.pages.rows
        if self.g is None:
            return Gradients()

        # Where q is e they are one operand, and where k is v.
        d_e, d_v = self.e.finished(), self.v.finished()
        d_k = d_v if self.k is self.v else self.k.finished()
        if p.key is None and p.value is None:  # one input
            if d_k is not None and d_v is not None and d_k is not d_v:
                d_k = d_v.add_(d_k)
            d_v = None
        rows = a.history.keep[listed]
        found, of_table = history_gradients(p, needs, rows, d_k, d_v)
        if needs.temperature:
            assert p.temperature is not None
            slope = -self.slope * self.inverse_tau
            found.temperature = torch.tensor(slope, dtype=p.temperature.dtype)
        if needs.query:
            found.query = placed(p.query, a.pv.keep, self.q.finished())
        if needs.pv:
            assert d_e is not None
            total = d_e
            if not self.every_row:
                total = torch.zeros(p.pv.shape).index_add_(0, self.column_source, d_e)
            if of_table is not None:
                total.index_add_(0, a.history.source[listed], of_table)
            found.pv = total.to(p.pv.dtype)
        return found


def _add_product(total: Tensor | None, rows: slice, a: Tensor, b: Tensor) -> None:
    """total[rows] += a b, in float32 whatever a and b are."""
    if total is None:
        return
    if a.dtype == torch.float32:
        total[rows].addmm_(a, b)
    else:
        stage("add", total[rows], a @ b)


def run(p: Problem, needs: Needs, want_rank: bool, upstream: Tensor | None) -> Result:
    """Forward pass and, if `needs` says so, all gradients; `upstream` [N] for reduction "none"."""
    one = _Run(p, needs, want_rank, upstream)
    cosine = one.positive / one.inverse_tau
    return Result(one.loss, one.lse, one.above, cosine, one.a, one.gradients())
