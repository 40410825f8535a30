"""impl="cpu": rows against columns, a chunk of rows at a time: tiles of scores, probabilities, and both gradients with them."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import native
from .native import VARIANT_VARIABLE, call, stage
from .rows import Candidates, part

# Rows of P held at a time: as many as fit here, but enough that the products stay efficient (README.md).
CHUNK_BYTES = 32 << 20
# With products of our own nothing is packed anew for a chunk: fewer rows are as fast, and make room for the packed columns.
NATIVE_CHUNK_BYTES = 24 << 20
LEAST_CHUNK_ROWS = 256
# With negatives of the own page only, a chunk of rows meets the columns of its pages: fewer rows, narrower products.
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


def _chunks(m: int, y: Candidates, chunk_bytes: int) -> list[tuple[int, int, int, int]]:
    """(first row, end, first column, end) of each chunk."""
    n = y.unit.shape[0]
    if y.page is not None and y.page_only:
        # Rows and columns are in the order of pages.
        starts = range(0, m, PAGE_CHUNK_ROWS)
        stops = [min(start + PAGE_CHUNK_ROWS, m) for start in starts]
        lows = y.page[list(starts), 0].tolist()
        highs = y.page[[stop - 1 for stop in stops], 1].tolist()
        return list(zip(starts, stops, lows, highs, strict=True))
    most = max(LEAST_CHUNK_ROWS, chunk_bytes // max(n * y.unit.element_size(), 1))
    rows = max(1, math.ceil(m / max(1, math.ceil(m / most))))
    return [(start, min(start + rows, m), 0, n) for start in range(0, m, rows)]


class _Room:
    """What all chunks use one after the other: fresh memory for each would cost more in page faults than the pass over it."""

    x: Tensor | None = (
        None  # products of a half type, before they are summed in float32: of rows, and of columns
    )
    y: Tensor | None = None

    def __init__(
        self,
        x: Tensor,
        chunks: list[tuple[int, int, int, int]],
        products: _NativeProducts | None,
        gradients: bool,
    ) -> None:
        dim, longest = x.shape[1], max((b - a for a, b, _, _ in chunks), default=0)
        self.weighted = x.new_empty(longest if gradients else 0, dim)
        if products is not None:
            products.room(longest)
            return
        self.tile = x.new_empty(max(((b - a) * (d - c) for a, b, c, d in chunks), default=0))
        if gradients and x.dtype != torch.float32:
            self.x = x.new_empty(longest, dim)
            self.y = x.new_empty(max((d - c for _, _, c, d in chunks), default=0), dim)

    def scores(self, rows: int, columns: int) -> Tensor:
        return self.tile[: rows * columns].view(rows, columns)


def contrast(
    x: Tensor,
    y: Candidates,
    inverse_tau: float,
    positive: Tensor | None,
    own_unit: Tensor | None,
    g: Tensor | None,
    want_rank: bool,
    want_y: bool = True,
    add_to: Tensor | None = None,
    given: Tensor | None = None,
) -> Scores:
    """One direction, chunk by chunk: scores, probabilities, and with g (weights of the rows) both gradients.

    `positive` [M]: scores of the positives, biases included, in float64, and `own_unit` [M, D] their unit
    vectors, whose terms stay apart in float32; None: the positives are among the other columns.
    `add_to`: where d_y is to be added. `given` [M]: log-sum-exps that are known, over columns that are not all here; d_y
    is wanted alone.
    """
    m, dim = x.shape
    n = y.unit.shape[0]
    # A few numbers a row in float64: the loss is a difference of scores of 1/tau.
    lse, loss, total = torch.zeros(3, m, dtype=torch.float64)
    factor, pull = torch.empty(2, m)
    top = torch.empty(m)
    above = torch.empty(m, dtype=torch.int64) if want_rank else None
    want_x = g is not None and given is None
    products = _native_products(x, y, want_x, g is not None and want_y)
    chunks = _chunks(m, y, CHUNK_BYTES if products is None else NATIVE_CHUNK_BYTES)
    room = _Room(x, chunks, products, g is not None)
    d_x = d_y = d_own = None
    if want_x:
        d_x = torch.empty(m, dim)
        d_own = torch.empty(m, dim) if own_unit is not None else None
    if g is not None and want_y:
        d_y = torch.zeros(n, dim) if add_to is None else add_to
    for start, stop, low, high in chunks:
        rows, columns = slice(start, stop), slice(low, high)
        xs, ys = x[rows], y.unit[columns]
        about = (inverse_tau, *y.about(rows, columns))
        results = (top[rows], total[rows], part(above, rows))
        product = None if d_x is None else d_x[rows] if room.x is None else room.x[: stop - start]
        if products is None:
            scores = room.scores(stop - start, high - low)
            torch.mm(xs, ys.T, out=scores)
            stage("contrast", scores, low, *about, y.page_only, *results)
        else:
            products.tile(xs, about, results, product)
        weighted = None if g is None else room.weighted[: stop - start]
        if given is not None:
            assert g is not None and weighted is not None
            torch.mul(xs, (g[rows] * (top[rows] - given[rows]).exp())[:, None], out=weighted)
        else:
            own_pull = None if own_unit is None else pull[rows]
            numbers = (part(positive, rows), part(g, rows), lse[rows], loss[rows])
            call("finish", *results[:2], *numbers, factor[rows], own_pull)
            if weighted is None:
                continue
            if products is None:
                torch.mm(scores, ys, out=product)
            # One pass, not five small ones: where cores are shared, each start of all threads may wait for a slice of time.
            own = part(own_unit, rows)
            gradients = (part(d_x, rows), weighted, part(d_own, rows))
            stage("weigh", product, xs, own, factor[rows], own_pull, *gradients)
        if d_y is None:
            continue
        if products is not None:
            products.transposed(weighted, d_y)
        elif room.y is None:
            d_y[columns].addmm_(scores.T, weighted)
        else:
            # Sums over chunks stay in float32; torch's += would first make a float32 copy of the product.
            product = room.y[: high - low]
            torch.mm(scores.T, weighted, out=product)
            stage("add", d_y[columns], product)
    return Scores(lse, loss, above, d_x, d_own, d_y)


def contrast_block(
    x: Tensor, y: Candidates, inverse_tau: float, lse: Tensor | None, g: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows against some of their candidates: (log-sum-exp [M], g_i sum_j p_ij y_j [M, D], None), or with the log-sum-exp over
    all of them (.., None, sum_i g_i p_ij x_i [n, D])."""
    s = contrast(x, y, inverse_tau, None, None, g, False, want_y=lse is not None, given=lse)
    if s.d_x is not None:
        # Over no candidate at all, the sum is 0 and its inverse is not finite.
        s.d_x[s.lse == -math.inf] = 0
    return s.lse, s.d_x, s.d_y


class _NativeProducts:
    """The columns, packed once, and the three products of a chunk; what is in between never leaves the cache."""

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
        self, x: Tensor, about: tuple[Any, ...], results: tuple[Any, ...], product: Tensor | None
    ) -> None:
        """P of these rows, kept for `transposed`, and P y."""
        stage(
            "tile",
            x,
            self.across,
            self.along,
            self.columns,
            *about,
            *results,
            product,
            self.kept,
            self.scratch,
        )

    def transposed(self, weighted: Tensor, d_y: Tensor) -> None:
        """d_y += P^T weighted."""
        stage("pack", weighted, None, self.weighted)
        stage("transposed", self.kept, self.weighted, weighted.shape[0], d_y)


def _native_products(
    x: Tensor, y: Candidates, want_x: bool, want_y: bool
) -> _NativeProducts | None:
    """Where this CPU has them and they fit; else torch.mm."""
    if x.dtype != torch.bfloat16 or y.page_only or not len(x):
        return None
    panel = native.library.panel_columns(os.environ.get(VARIANT_VARIABLE))
    if not panel or x.shape[1] % panel:
        return None
    return _NativeProducts(y.unit, want_x, want_y)
