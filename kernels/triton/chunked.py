"""Triton: the contrast as three products over chunks of rows, where an accumulator of D columns
does not fit in registers or float32 products must be exact. P = 2^(t - shift) of one chunk is
stored, in a workspace of bounded size, and used twice: P e for the gradient of r, and P^T r for
that of e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .common import LOG2E, add_in, kernel, score_scale
from .contrast import HALF_LIFT, Columns, Pass, PassSide, Rows, Scores, Sums
from .masks import MASK_OTHER_PAGES, MASK_PAGE, MASK_SEQUENCE, MASK_SEQUENCE_IDS, candidate_mask
from .results import Results, finish_pass
from .shapes import Shape, cdiv


@kernel(aligned=("p_stride",))
def scores(
    x,  # Rows
    y,  # Columns
    shift_ptr,  # [x capacity] the log-sum-exp P is relative to, where it is known, or None
    p_ptr,  # [chunk_rows, p_stride] or None
    sums,  # Sums of a tile of columns [column tiles, chunk_rows]
    tau,
    lift,
    first_row,
    chunk_rows,
    p_stride,
    STRIDE: tl.constexpr,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    Y_OFFSET_IS_COUNT: tl.constexpr,
    ONLINE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P_ij = 2^(t_ij - shift_i) of one tile, and per row its maximum, its sum and how many columns
    score above the positive."""
    tiles_m = tl.cdiv(chunk_rows, BLOCK_M)
    tile_n = tl.program_id(0) // tiles_m
    local = (tl.program_id(0) % tiles_m) * BLOCK_M + tl.arange(0, BLOCK_M)
    x_place = first_row + local
    y_place = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_count = tl.load(x.count)
    y_count = tl.load(y.count)
    if (first_row + (tl.program_id(0) % tiles_m) * BLOCK_M >= x_count) | (
        tile_n * BLOCK_N >= y_count
    ):
        return
    scale = score_scale(tau, TAU_IS_TENSOR)
    x_valid = (x_place < x_count) & (local < chunk_rows)
    y_valid = y_place < y_count
    dims = tl.arange(0, BLOCK_K)
    t = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Past the last row, the last row again: no mask in the loop, and what comes of it is not used.
    x_row = x.unit + tl.minimum(x_place, x_count - 1).to(tl.int64)[:, None] * STRIDE
    y_row = y.unit + tl.minimum(y_place, y_count - 1).to(tl.int64)[:, None] * STRIDE
    for start in range(0, STRIDE, BLOCK_K):
        x_part = tl.load(x_row + start + dims[None, :])
        y_part = tl.load(y_row + start + dims[None, :])
        t = tl.dot(x_part, tl.trans(y_part), t, input_precision=PRECISION)
    t = t * scale

    x_id = x_place
    y_id = y_place
    x_page = x_place
    y_page = y_place
    if MASK != MASK_SEQUENCE:
        x_id = tl.load(x.id + x_place, mask=x_valid, other=0)
        y_id = tl.load(y.id + y_place, mask=y_valid, other=0)
    if MASK == MASK_PAGE or MASK == MASK_OTHER_PAGES or MASK == MASK_SEQUENCE_IDS:
        x_page = tl.load(x.page + x_place, mask=x_valid, other=-2)
        y_page = tl.load(y.page + y_place, mask=y_valid, other=-1)
    allowed = candidate_mask(x_id, y_id, x_page, y_page, x_place, y_place, MASK) & y_valid[None, :]
    part = tile_n.to(tl.int64) * chunk_rows + local
    if sums.above is not None:
        near = tl.load(x.rank_score + x_place * 2 + 1, mask=x_valid, other=0.0) * scale
        if x.log_q is not None:
            position = tl.load(x.list + x_place, mask=x_valid, other=0)
            near -= tl.load(x.log_q + position, mask=x_valid, other=0.0) * LOG2E
        near += 1e-6 * scale
    if y.offset is not None:
        y_offset = tl.load(y.offset + y_place, mask=y_valid, other=0.0)
    if sums.above is not None:
        if Y_OFFSET_IS_COUNT:
            count = (tl.exp2(y_offset) + 0.5).to(tl.int32)
            above = tl.sum(tl.where(allowed & (t > near[:, None]), count[None, :], 0), axis=1)
        elif y.offset is not None:
            above = tl.sum((allowed & (t + y_offset[None, :] > near[:, None])).to(tl.int32), axis=1)
        else:
            above = tl.sum((allowed & (t > near[:, None])).to(tl.int32), axis=1)
        tl.store(sums.above + part, above, mask=x_valid)
    if y.offset is not None:
        t += y_offset[None, :]
    t = tl.where(allowed, t, -float("inf"))
    if shift_ptr is not None:
        shift = tl.load(shift_ptr + x_place, mask=x_valid, other=0.0) - lift
        shift = tl.where(shift == -float("inf"), 0.0, shift)
    elif ONLINE:
        shift = tl.max(t, axis=1)
        shift = tl.where(shift == -float("inf"), 0.0, shift)
    else:
        shift = tl.zeros([BLOCK_M], tl.float32) + scale
    p = tl.exp2(t - shift[:, None])
    if sums.total is not None:
        tl.store(sums.top + part, shift, mask=x_valid)
        tl.store(sums.total + part, tl.sum(p, axis=1), mask=x_valid)
    if p_ptr is not None:
        # The whole tile, which the products read: zeros past the last column.
        tl.store(
            p_ptr + local.to(tl.int64)[:, None] * p_stride + y_place[None, :],
            p.to(p_ptr.dtype.element_ty),
        )


@kernel
def reduce_parts(
    tiles,  # Sums of column tiles [column tiles, chunk_rows]
    out,  # Sums [x capacity]
    x_count_ptr,
    y_count_ptr,
    first_row,
    chunk_rows,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Maximum, sum and count of each row from those of its column tiles."""
    local = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = (local < chunk_rows) & (first_row + local < tl.load(x_count_ptr))
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.int32)
    for tile in range(tl.cdiv(tl.load(y_count_ptr), BLOCK_N)):
        part = tl.full([BLOCK], tile, tl.int64) * chunk_rows + local
        part_top = tl.load(tiles.top + part, mask=valid, other=-float("inf"))
        top, total = add_in(
            top, total, part_top, tl.load(tiles.total + part, mask=valid, other=0.0)
        )
        if out.above is not None:
            above += tl.load(tiles.above + part, mask=valid, other=0)
    tl.store(out.top + first_row + local, top, mask=valid)
    tl.store(out.total + first_row + local, total, mask=valid)
    if out.above is not None:
        tl.store(out.above + first_row + local, above, mask=valid)


@kernel
def scale_rows(
    x_ptr,  # [x capacity, STRIDE]
    g_ptr,  # [x capacity]
    top_ptr,  # what P is relative to, None where that is the log-sum-exp
    lse_ptr,
    out_ptr,  # [chunk_rows, STRIDE]
    x_count_ptr,
    first_row,
    chunk_rows,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """g_i 2^(shift_i - lse_i) r_i: what P^T is multiplied with; zeros past the last row."""
    local = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first_row + local
    valid = (row < tl.load(x_count_ptr)) & (local < chunk_rows)
    factor = tl.load(g_ptr + row, mask=valid, other=0.0)
    if top_ptr is not None:
        top = tl.load(top_ptr + row, mask=valid, other=0.0)
        factor *= tl.exp2(top - tl.load(lse_ptr + row, mask=valid, other=0.0))
    # A row without weight has no share, also where its log-sum-exp is over nothing.
    factor = tl.where(tl.load(g_ptr + row, mask=valid, other=0.0) == 0.0, 0.0, factor)
    dims = tl.arange(0, BLOCK_D)
    inside = (dims < STRIDE)[None, :]
    x = tl.load(
        x_ptr + row[:, None] * STRIDE + dims[None, :], mask=valid[:, None] & inside, other=0.0
    )
    scaled = x.to(tl.float32) * factor[:, None]
    tl.store(
        out_ptr + local[:, None] * STRIDE + dims[None, :],
        scaled.to(out_ptr.dtype.element_ty),
        mask=(local < chunk_rows)[:, None] & inside,
    )


@triton.jit
def load_columns(ptr, row, column, STRIDE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Some columns of some rows, zeros beyond the last column."""
    where = ptr + row[:, None] * STRIDE + column[None, :]
    if STRIDE % BLOCK_N == 0:
        return tl.load(where)
    else:
        return tl.load(where, mask=(column < STRIDE)[None, :], other=0.0)


@kernel(aligned=("p_stride",))
def product(
    p_ptr,  # [chunk_rows, p_stride]
    y_ptr,  # [y capacity, STRIDE]
    x_count_ptr,
    y_count_ptr,
    out_ptr,  # [x capacity, STRIDE]
    first_row,
    chunk_rows,
    p_stride,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(P e)_i = sum_j P_ij e_j for the rows of one chunk."""
    tiles_n: tl.constexpr = (STRIDE + BLOCK_N - 1) // BLOCK_N
    tile_m = tl.program_id(0) // tiles_n
    if first_row + tile_m * BLOCK_M >= tl.load(x_count_ptr):
        return
    local = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = (local < chunk_rows) & (first_row + local < tl.load(x_count_ptr))
    column = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    y_count = tl.load(y_count_ptr)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Rows past the last one are of no use, and their sums are not stored.
    p_row = p_ptr + local.to(tl.int64)[:, None] * p_stride
    whole = y_count // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        place = start + inner
        p = tl.load(p_row + place[None, :])
        y = load_columns(y_ptr, place.to(tl.int64), column, STRIDE, BLOCK_N)
        acc = tl.dot(p, y, acc, input_precision=PRECISION)
    if whole < y_count:
        place = whole + inner
        inside = place < y_count
        p = tl.load(p_row + place[None, :], mask=inside[None, :], other=0.0)
        y = load_columns(
            y_ptr, tl.minimum(place, y_count - 1).to(tl.int64), column, STRIDE, BLOCK_N
        )
        acc = tl.dot(p, y, acc, input_precision=PRECISION)
    tl.store(
        out_ptr + (first_row + local).to(tl.int64)[:, None] * STRIDE + column[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (column < STRIDE)[None, :],
    )


@kernel(aligned=("p_stride",))
def transposed_product(
    p_ptr,  # [chunk_rows, p_stride]
    x_ptr,  # [chunk_rows, STRIDE] scaled rows
    x_count_ptr,
    y_count_ptr,
    out_ptr,  # [y capacity, STRIDE] float32
    first_row,
    chunk_rows,
    p_stride,
    STRIDE: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(P^T x)_j = sum_i P_ij x_i over the rows of one chunk, added in float32 to those of the
    chunks before."""
    tiles_n: tl.constexpr = (STRIDE + BLOCK_N - 1) // BLOCK_N
    x_rows = tl.minimum(tl.load(x_count_ptr) - first_row, chunk_rows)
    y_count = tl.load(y_count_ptr)
    tile_m = tl.program_id(0) // tiles_n
    if tile_m * BLOCK_M >= y_count:
        return
    if ACCUMULATE:
        if x_rows <= 0:
            return
    y_place = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    y_valid = y_place < y_count
    column = (tl.program_id(0) % tiles_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    out = out_ptr + y_place.to(tl.int64)[:, None] * STRIDE + column[None, :]
    mask = y_valid[:, None] & (column < STRIDE)[None, :]
    if ACCUMULATE:
        acc = tl.load(out, mask=mask, other=0.0)
    else:
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    tl.static_assert(BLOCK_N % BLOCK_M == 0)  # P ends with a tile of BLOCK_N: it is all written
    p_column = p_ptr + y_place[None, :]
    whole = x_rows // BLOCK_K * BLOCK_K
    for start in range(0, whole, BLOCK_K):
        row = (start + inner).to(tl.int64)
        p = tl.load(p_column + row[:, None] * p_stride)
        x = load_columns(x_ptr, row, column, STRIDE, BLOCK_N)
        acc = tl.dot(tl.trans(p), x, acc, input_precision=PRECISION)
    if whole < x_rows:
        row = (whole + inner).to(tl.int64)
        inside = row < x_rows
        p = tl.load(p_column + row[:, None] * p_stride, mask=inside[:, None], other=0.0)
        x = load_columns(x_ptr, tl.minimum(row, x_rows - 1), column, STRIDE, BLOCK_N)
        acc = tl.dot(tl.trans(p), x, acc, input_precision=PRECISION)
    tl.store(out, acc, mask=mask)


# ---- launches ------------------------------------------------------------------------------------


@dataclass
class Transposed:
    """sum_i g_i p_ij x_i, into `out` [y capacity, STRIDE]; g may be in units of its largest entry
    (float16)."""

    g: Tensor
    out: Tensor


def run_chunks(
    s: Shape,
    x: PassSide,
    y: PassSide,
    scores: Scores,
    lse: Tensor,
    transposed: Transposed | None,
    out: Pass | None = None,
    results: Results | None = None,
) -> None:
    """A contrast direction in chunks of rows. `out` and `results`: the forward pass, which fills
    `lse`; without them `lse` is known. With a fixed shift and `transposed`, the scores are computed
    once and P serves two products."""
    values = out is not None and s.values
    run = _Chunks(s, x, y, scores, lse, values or transposed is not None, out, results)
    scaled = None
    if transposed is not None:
        scaled = torch.empty(run.rows, s.stride, dtype=x.unit.dtype, device=s.device)
    capacity = x.unit.shape[0]
    for first in range(0, capacity, run.rows):
        # Relative to the log-sum-exp, not to a shift.
        normalised = out is None or scores.online
        if out is not None and results is not None:
            run.scores(first, False, True, run.store and not normalised)
            run.reduce(first, out)
            finish_pass(s, x, y, scores, out, results, first, min(run.rows, capacity - first))
        if normalised and run.store:
            run.scores(first, True, False, True)
        if out is not None and values:
            if normalised:
                # The product's P is relative to the log-sum-exp now, not to the running maximum.
                assert out.top is not None
                last = min(first + run.rows, capacity)
                torch.sub(lse[first:last], run.lift, out=out.top[first:last])
            run.product(first, out.acc)
        if transposed is not None:
            top = out.top if out is not None else lse
            run.transposed_product(first, transposed, scaled, top, normalised)


_NO_SUMS = Sums(None, None, None, None)


class _Chunks:
    """The workspace of a direction in chunks of rows, and its launches for the chunk that begins
    with row `first`."""

    def __init__(
        self,
        s: Shape,
        x: PassSide,
        y: PassSide,
        scores: Scores,
        lse: Tensor,
        store: bool,
        out: Pass | None,
        results: Results | None,
    ) -> None:
        tile, kind = s.product, x.unit.dtype
        self.s, self.x, self.y, self.how, self.lse, self.store = s, x, y, scores, lse, store
        self.online, self.results = out is not None and scores.online, results
        self.rank = results is not None and results.stats
        self.columns = y.unit.shape[0]
        self.rows = min(
            tiles.chunk_rows(self.columns, kind, scores.workspace, tile),
            cdiv(x.unit.shape[0], tile.block_m) * tile.block_m,
        )
        self.tiles_m, self.tiles_n = cdiv(self.rows, tile.block_m), cdiv(self.columns, tile.block_n)
        self.stride = self.tiles_n * tile.block_n  # whole tiles: loads and stores have no mask
        self.p = torch.empty(self.rows, self.stride, dtype=kind, device=s.device) if store else None
        parts = (self.tiles_n, self.rows)
        top, total = (torch.empty(parts, dtype=torch.float32, device=s.device) for _ in range(2))
        above = torch.empty(parts, dtype=torch.int32, device=s.device) if self.rank else None
        self.sums = Sums(None, top, total, above)
        self.lift = HALF_LIFT if kind == torch.float16 else 0.0
        self.tile: dict[str, Any] = {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "PRECISION": s.precision,
            **tile.launch,
        }

    def scores(self, first: int, normalised: bool, sums: bool, keep: bool) -> None:
        """P of the chunk if `keep`; with `sums` its rows' largest score and sum in each tile."""
        x, y, results = self.x, self.y, self.results
        positive = None if results is None else results.positive
        log_q = None if results is None else results.log_q
        scores[(self.tiles_m * self.tiles_n,)](
            Rows(x.unit, x.ids, x.page, x.count, x.list, None, positive, log_q),
            Columns(y.unit, y.ids, y.page, y.count, y.bias),
            self.lse if normalised else None,
            self.p if keep else None,
            self.sums if sums else _NO_SUMS,
            self.how.tau,
            self.lift if normalised else 0.0,
            first,
            self.rows,
            self.stride,
            STRIDE=self.s.stride,
            TAU_IS_TENSOR=self.how.tau_is_tensor,
            MASK=self.how.mask,
            Y_OFFSET_IS_COUNT=y.merged and results is not None,
            ONLINE=self.online,
            **self.tile,
        )

    def reduce(self, first: int, out: Pass) -> None:
        """One part of each row, from those of the tiles."""
        reduce_parts[(cdiv(self.rows, 256),)](
            self.sums,
            Sums(None, out.top, out.total, out.above if self.rank else None),
            self.x.count,
            self.y.count,
            first,
            self.rows,
            BLOCK_N=self.s.product.block_n,
            BLOCK=256,
        )

    def product(self, first: int, out: Tensor) -> None:
        """P y."""
        product[(self.tiles_m * cdiv(self.s.stride, self.s.product.block_n),)](
            self.p,
            self.y.unit,
            self.x.count,
            self.y.count,
            out,
            first,
            self.rows,
            self.stride,
            STRIDE=self.s.stride,
            **self.tile,
        )

    def transposed_product(
        self, first: int, transposed: Transposed, scaled: Any, top: Tensor, normalised: bool
    ) -> None:
        """P^T of the scaled rows x, added to what earlier chunks gave."""
        s, tile = self.s, self.s.product
        scale_rows[(cdiv(self.rows, s.small.block_m),)](
            self.x.unit,
            transposed.g,
            None if normalised else top,
            self.lse,
            scaled,
            self.x.count,
            first,
            self.rows,
            STRIDE=s.stride,
            BLOCK_M=s.small.block_m,
            BLOCK_D=tiles.next_power_of_2(s.stride),
            num_warps=s.small.num_warps,
        )
        programs = cdiv(self.columns, tile.block_m) * cdiv(s.stride, tile.block_n)
        transposed_product[(programs,)](
            self.p,
            scaled,
            self.x.count,
            self.y.count,
            transposed.out,
            first,
            self.rows,
            self.stride,
            STRIDE=s.stride,
            ACCUMULATE=first > 0,
            **self.tile,
        )
