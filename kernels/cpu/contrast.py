"""impl="cpu": rows against columns, a chunk of rows at a time: tiles of scores, probabilities, and
both gradients with them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import native
from .native import VARIANT_VARIABLE, call, stage
from .rows import Columns, part

# Rows of P held at a time: as many as fit here, but enough that the products stay efficient
# (README.md).
CHUNK_BYTES = 32 << 20
# With products of our own nothing is packed anew for a chunk: fewer rows are as fast, and make room
# for the packed columns.
NATIVE_CHUNK_BYTES = 24 << 20
LEAST_CHUNK_ROWS = 256
# With negatives of the own page only, a chunk of rows meets the columns of its pages: fewer rows,
# narrower products.
PAGE_CHUNK_ROWS = 64


@dataclass
class Scores:
    """What a direction gives for each row; numbers in float64, vectors in float32."""

    lse: Tensor  # [M], the positive included
    loss: Tensor  # [M] lse - positive
    above: Tensor | None  # [M]
    d_x: Tensor | None  # [M, D] g_i (sum_j p_ij y_j - own_i), as the next two without the 1/tau
    d_own: Tensor | None  # [M, D] the positive's own terms apart from d_y: -g_i (1 - p_i) x_i
    d_y: Tensor | None  # [n, D] sum_i g_i p_ij x_i


def _chunks(m: int, y: Columns, chunk_bytes: int) -> list[tuple[slice, slice]]:
    """Rows and columns of each chunk."""
    n = y.unit.shape[0]
    if y.page is not None and y.page_only:
        # Rows and columns are in the order of pages.
        starts = range(0, m, PAGE_CHUNK_ROWS)
        stops = [min(start + PAGE_CHUNK_ROWS, m) for start in starts]
        lows = y.page[list(starts), 0].tolist()
        highs = y.page[[stop - 1 for stop in stops], 1].tolist()
        spans = map(slice, lows, highs)
        return list(zip(map(slice, starts, stops), spans, strict=True))
    most = max(LEAST_CHUNK_ROWS, chunk_bytes // max(n * y.unit.element_size(), 1))
    rows = max(1, math.ceil(m / max(1, math.ceil(m / most))))
    return [(slice(start, min(start + rows, m)), slice(0, n)) for start in range(0, m, rows)]


def _size(x: slice) -> int:
    return x.stop - x.start


def contrast(
    x: Tensor,
    y: Columns,
    inverse_tau: float,
    positive: Tensor | None,
    own_unit: Tensor | None,
    g: Tensor | None,
    want_rank: bool,
    want_y: bool = True,
    add_to: Tensor | None = None,
    given: Tensor | None = None,
) -> Scores:
    """One direction, chunk by chunk: scores, probabilities, and with g (weights of the rows) both
    gradients.

    `positive` [M]: scores of the positives, biases included, in float64, and `own_unit` [M, D]
    their unit vectors, whose terms stay apart in float32; None: the positives are among the other
    columns. `add_to`: where d_y is to be added. `given` [M]: log-sum-exps that are known, over
    columns that are not all here; d_y is wanted alone.
    """
    m, dim = x.shape
    # A few numbers a row in float64: the loss is a difference of scores of 1/tau.
    lse, loss, total = torch.zeros(3, m, dtype=torch.float64)
    factor, pull = torch.empty(2, m)
    top = torch.empty(m)
    above = torch.empty(m, dtype=torch.int64) if want_rank else None
    want_x, want_y = g is not None and given is None, g is not None and want_y
    products, chunks = _products(x, y, want_x, want_y)
    d_x = torch.empty(m, dim) if want_x else None
    d_own = torch.empty(m, dim) if want_x and own_unit is not None else None
    d_y = None
    if want_y:
        d_y = torch.zeros(y.unit.shape[0], dim) if add_to is None else add_to
    longest = max((_size(rows) for rows, _ in chunks), default=0)
    all_weighted = None if g is None else x.new_empty(longest, dim)
    for rows, columns in chunks:
        xs, into = x[rows], part(d_x, rows)
        results = (top[rows], total[rows], part(above, rows))
        about = (inverse_tau, *y.about(rows, columns))
        product = products.tile(xs, columns, about, results, into)
        weighted = None if all_weighted is None else all_weighted[: len(xs)]
        if given is not None:
            assert g is not None and weighted is not None
            torch.mul(xs, (g[rows] * (top[rows] - given[rows]).exp())[:, None], out=weighted)
        else:
            own, own_pull = part(own_unit, rows), None if own_unit is None else pull[rows]
            found = (lse[rows], loss[rows], factor[rows], own_pull)
            call("finish", *results[:2], part(positive, rows), part(g, rows), *found)
            if weighted is not None:
                # One pass, not five small ones: where cores are shared, each start of all threads
                # may wait for a slice of time.
                out = (into, weighted, part(d_own, rows))
                stage("weigh", product, xs, own, factor[rows], own_pull, *out)
        if d_y is not None:
            products.transposed(weighted, d_y[columns])
    return Scores(lse, loss, above, d_x, d_own, d_y)


def contrast_block(
    x: Tensor, y: Columns, inverse_tau: float, lse: Tensor | None, g: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows against some of their candidates: (log-sum-exp [M], g_i sum_j p_ij y_j [M, D], None), or
    with the log-sum-exp over all of them (.., None, sum_i g_i p_ij x_i [n, D])."""
    s = contrast(x, y, inverse_tau, None, None, g, False, want_y=lse is not None, given=lse)
    if s.d_x is not None:
        # Over no candidate at all, the sum is 0 and its inverse is not finite.
        s.d_x[s.lse == -math.inf] = 0
    return s.lse, s.d_x, s.d_y


class _LibraryProducts:
    """The products of a chunk through torch.mm; P in one workspace for all chunks: a fresh one each
    time would cost more in page faults than the pass over it."""

    def __init__(
        self,
        x: Tensor,
        y: Columns,
        chunks: list[tuple[slice, slice]],
        want_x: bool,
        want_y: bool,
    ) -> None:
        self.y = y
        self.workspace = x.new_empty(max((_size(a) * _size(b) for a, b in chunks), default=0))
        # Sums over chunks, and what becomes of a product, are float32: one of another type comes by
        # way of these.
        self.part_x = self.part_y = None
        if x.dtype != torch.float32:
            longest = max((_size(rows) for rows, _ in chunks), default=0)
            widest = max((_size(columns) for _, columns in chunks), default=0)
            self.part_x = x.new_empty(longest, x.shape[1]) if want_x else None
            self.part_y = x.new_empty(widest, x.shape[1]) if want_y else None

    def tile(
        self,
        x: Tensor,
        columns: slice,
        about: tuple[Any, ...],
        results: tuple[Any, ...],
        into: Tensor | None,
    ) -> Tensor | None:
        """P of these rows, kept for `transposed`, and P y, if there is where to put it."""
        ys = self.y.unit[columns]
        self.scores = self.workspace[: len(x) * len(ys)].view(len(x), len(ys))
        torch.mm(x, ys.T, out=self.scores)
        stage("contrast", self.scores, columns.start, *about, self.y.page_only, *results)
        if into is None:
            return None
        product = into if self.part_x is None else self.part_x[: len(x)]
        return torch.mm(self.scores, ys, out=product)

    def transposed(self, weighted: Tensor | None, d_y: Tensor) -> None:
        """d_y += P^T weighted."""
        assert weighted is not None
        if self.part_y is None:
            d_y.addmm_(self.scores.T, weighted)
        else:
            # torch's += would first make a float32 copy of the product.
            product = self.part_y[: len(d_y)]
            stage("add", d_y, torch.mm(self.scores.T, weighted, out=product))


class _NativeProducts:
    """The columns, packed once, and the three products of a chunk; what is in between never leaves
    the cache."""

    def __init__(self, y: Tensor, want_x: bool, want_y: bool) -> None:
        self.columns, self.dim = y.shape
        across, along, _, self.scratch_size = native.library.packed_sizes(0, *y.shape)
        self.across = torch.empty(across, dtype=torch.int32)
        self.along = torch.empty(along, dtype=torch.int32) if want_x else None
        self.want_y = want_y
        self.kept: Tensor | None = None
        self.weighted: Tensor | None = None
        stage("pack", y, self.across, self.along)

    def room(self, rows: int) -> None:
        """For chunks of at most so many rows."""
        threads = torch.get_num_threads()
        self.scratch = torch.empty(threads * self.scratch_size, dtype=torch.int32)
        if self.want_y:
            kept = native.library.packed_sizes(rows, self.columns, self.dim)[2]
            self.kept = torch.empty(kept, dtype=torch.int32)
            weighted = native.library.packed_sizes(0, rows, self.dim)[1]
            self.weighted = torch.empty(weighted, dtype=torch.int32)

    def tile(
        self,
        x: Tensor,
        columns: slice,
        about: tuple[Any, ...],
        results: tuple[Any, ...],
        into: Tensor | None,
    ) -> Tensor | None:
        """As the library's; the columns are all of them."""
        packed = (self.across, self.along, self.columns)
        stage("tile", x, *packed, *about, *results, into, self.kept, self.scratch)
        return into

    def transposed(self, weighted: Tensor | None, d_y: Tensor) -> None:
        assert weighted is not None
        stage("pack", weighted, None, self.weighted)
        stage("transposed", self.kept, self.weighted, weighted.shape[0], d_y)


def _products(
    x: Tensor, y: Columns, want_x: bool, want_y: bool
) -> tuple[_NativeProducts | _LibraryProducts, list[tuple[slice, slice]]]:
    """Our own where this CPU has them and they fit, else the library's; and the chunks."""
    if x.dtype == torch.bfloat16 and not y.page_only and len(x):
        panel = native.library.panel_columns(os.environ.get(VARIANT_VARIABLE))
        if panel and x.shape[1] % panel == 0:
            chunks = _chunks(len(x), y, NATIVE_CHUNK_BYTES)
            products = _NativeProducts(y.unit, want_x, want_y)
            products.room(max(_size(rows) for rows, _ in chunks))
            return products, chunks
    chunks = _chunks(len(x), y, CHUNK_BYTES)
    return _LibraryProducts(x, y, chunks, want_x, want_y), chunks
