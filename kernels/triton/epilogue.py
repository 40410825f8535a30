"""Triton: what stands before and after the two contrast passes. All of it is memory-bound, a few
rows a program."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention import store_unit_rows
from .common import (
    LN2,
    Source,
    kernel,
    load_rows,
    normalize_backward,
    parts_of,
    schedule,
    score_scale,
    unit_scale,
)
from .plan import ANCHOR, COLUMN, RECONSTRUCTED


@kernel
def normalize_rows(
    source,  # Source
    list_ptr,
    count_ptr,
    unit_ptr,  # [capacity, STRIDE]
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """e_j = E_j / |E_j| of the listed rows, made contiguous, with zeros from D to STRIDE."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(count_ptr)
    position = tl.load(list_ptr + row, mask=valid, other=0)
    x = load_rows(source, position, valid, D, BLOCK_D).to(tl.float32)
    unit = x * unit_scale(tl.sqrt(tl.sum(x * x, axis=1)))[:, None]
    dims = tl.arange(0, BLOCK_D)
    tl.store(
        unit_ptr + row[:, None] * STRIDE + dims[None, :],
        unit.to(unit_ptr.dtype.element_ty),
        mask=valid[:, None] & (dims < STRIDE)[None, :],
    )


@kernel
def gather_anchors(
    unit_ptr,  # [capacity, STRIDE] r of every reconstructed item
    positive_ptr,  # [capacity, 2]
    reconstructed_rank_ptr,  # [N]
    list_ptr,
    count_ptr,
    anchor_unit_ptr,
    anchor_positive_ptr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """r and the positives' cosines of the anchors, where more than those were reconstructed."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(count_ptr)
    position = tl.load(list_ptr + row, mask=valid, other=0)
    place = (tl.load(reconstructed_rank_ptr + position, mask=valid, other=1) - 1).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (dims < STRIDE)[None, :]
    unit = tl.load(unit_ptr + place[:, None] * STRIDE + dims[None, :], mask=mask, other=0.0)
    tl.store(anchor_unit_ptr + row[:, None] * STRIDE + dims[None, :], unit, mask=mask)
    for part in tl.static_range(2):
        cosine = tl.load(positive_ptr + place * 2 + part, mask=valid, other=0.0)
        tl.store(anchor_positive_ptr + row * 2 + part, cosine, mask=valid)


@kernel
def row_gradients(
    upstream_ptr,  # 0-d, or [N] with stride
    upstream_stride,
    weights_ptr,  # [N] or None
    weight_sum_ptr,  # 0-d
    list_ptr,
    count_ptr,
    g_ptr,  # [capacity]
    rows,
    share,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g_i, the upstream gradient of anchor i's loss."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr)
    valid = row < count
    position = tl.load(list_ptr + row, mask=valid, other=0)
    if PER_ROW:
        g = tl.load(upstream_ptr + position.to(tl.int64) * upstream_stride, mask=valid, other=0.0)
    else:
        g = tl.zeros([BLOCK], tl.float32) + tl.load(upstream_ptr) / tl.load(weight_sum_ptr)
        if weights_ptr is not None:
            g *= tl.load(weights_ptr + position, mask=valid, other=0.0)
    tl.store(g_ptr + row, tl.where(valid, g * share, 0.0), mask=row < rows)


class Upstream(NamedTuple):
    """The gradient of the loss [0-d] and what makes g of it; and the factor of a transposed pass
    that left g out."""

    # [capacity], None where it is the same for every anchor: a mean or a sum without weights
    g: Any
    grad: Any
    weight_sum: Any  # 0-d
    share: Any
    lower: Any
    factor: Any  # 0-d, None where the pass had g in it


class Parts(NamedTuple):
    """What a contrast pass left: parts of rows."""

    acc: Any  # [slots * TILE_M, STRIDE]
    # Of a forward pass; parts of a transposed one are summed as they are.
    top: Any = None  # [slots * TILE_M]
    lse: Any = None  # [capacity]
    miss: Any = None  # [capacity] 1 - p of the positive


class PassTiles(NamedTuple):
    """The constants of that."""

    STREAM: Any
    STRIDE: Any
    TILE_M: Any
    TILE_N: Any
    BLOCK_D: Any


class RowTiles(NamedTuple):
    """The constants of gradients of rows that two such passes left parts of."""

    D: Any
    STRIDE: Any
    ahead: Any  # PassTiles of the forward pass
    back: Any  # of the transposed one
    BLOCK_M: Any
    BLOCK_D: Any


@triton.jit
def uniform_gradient(up):
    """g where it is the same for every anchor."""
    return tl.load(up.grad) / tl.load(up.weight_sum) * up.share


@triton.jit
def anchor_gradient(up, anchor, is_anchor):
    """g_i of anchors, 0 for other rows."""
    if up.g is None:
        return tl.where(is_anchor, uniform_gradient(up), 0.0)
    else:
        return tl.load(up.g + anchor, mask=is_anchor, other=0.0)


@triton.jit
def with_factor(x, up):
    """What a transposed pass left, times what it left out."""
    if up.factor is not None:
        x *= tl.load(up.factor)
    elif up.g is None:
        x *= uniform_gradient(up) * up.lower
    return x


@triton.jit
def pass_rows(passed, count_ptr, other_count_ptr, slots, programs, row, valid, how: tl.constexpr):
    """Rows [BLOCK_M] of a pass: sum_j p_ij y_j from the parts that a forward pass left, the plain
    sum of a transposed one's. How many there are of a row, the counts decide (`schedule`)."""
    dims = tl.arange(0, how.BLOCK_D)
    if passed.top is not None:
        lse = tl.load(passed.lse + row, mask=valid, other=0.0)
    _tiles, blocks, parts, share = schedule(
        tl.load(count_ptr),
        tl.load(other_count_ptr),
        slots,
        programs,
        how.TILE_M,
        how.TILE_N,
        how.STREAM,
    )
    first, number = parts_of((row // how.TILE_M).to(tl.int64), blocks, parts, share)
    result = tl.full([row.shape[0], how.BLOCK_D], 0.0, tl.float32)
    for part in range(tl.max(tl.where(valid, number, 0), axis=0)):
        slot = (first + part) * how.TILE_M + row % how.TILE_M
        there = valid & (part < number)
        if passed.top is not None:
            factor = tl.exp2(tl.load(passed.top + slot, mask=there, other=0.0) - lse)
        x = tl.load(
            passed.acc + slot[:, None] * how.STRIDE + dims[None, :],
            mask=there[:, None] & (dims < how.STRIDE)[None, :],
            other=0.0,
        ).to(tl.float32)
        if passed.top is not None:
            x *= tl.where(there, factor, 0.0)[:, None]
        result += x
    return result


@kernel
def reconstruction_gradient(
    list_ptr,
    count_ptr,
    anchor_rank_ptr,  # [N] prefix sums
    anchor_flag_ptr,  # [N]
    counts_ptr,  # [4], as of all rows of flags (plan.py)
    unit_ptr,  # [capacity, STRIDE] r
    norm_ptr,  # [capacity]
    e_of,  # Source
    up,  # Upstream
    ahead,  # Parts of "reconstruct": what the forward pass left
    back,  # Parts of "identify": the transposed pass over r, and 1 - p of its forward pass
    dr_ptr,  # [capacity, STRIDE]
    tau_part_ptr,  # [programs]
    forward_slots,
    programs,
    transposed_slots,
    transposed_programs,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    how: tl.constexpr,  # RowTiles
):
    """dL/dr_i = g_i/tau (sum_{j != i} p_ij e_j - (1 - p_ii) e_i), dL/dR_i.

    "identify" adds 1/tau (sum_j g_j p_ji e_j - g_i (1 - p_ii) e_i). tau_part: sum_i dL/dr_i . r_i,
    which is -tau dL/dtau, since every score is r . e / tau.
    """
    forward: tl.constexpr = how.ahead
    transposed: tl.constexpr = how.back
    dims = tl.arange(0, how.BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * how.BLOCK_M + tl.arange(0, how.BLOCK_M)
    count = tl.load(count_ptr)
    valid = row < count
    position = tl.load(list_ptr + row, mask=valid, other=0)
    inverse_tau = score_scale(tau, TAU_IS_TENSOR) * LN2
    is_anchor = valid & (tl.load(anchor_flag_ptr + position, mask=valid, other=0) != 0)
    anchor = tl.load(anchor_rank_ptr + position, mask=is_anchor, other=1) - 1
    g = anchor_gradient(up, anchor, is_anchor)

    dr = tl.full([how.BLOCK_M, how.BLOCK_D], 0.0, tl.float32)
    miss = tl.full([how.BLOCK_M], 0.0, tl.float32)
    if ahead.acc is not None:
        dr += g[:, None] * pass_rows(
            ahead,
            counts_ptr + ANCHOR,
            counts_ptr + COLUMN,
            forward_slots,
            programs,
            anchor,
            is_anchor,
            forward,
        )
        miss += tl.load(ahead.miss + anchor, mask=is_anchor, other=0.0)
    if back.acc is not None:
        part = pass_rows(
            back,
            count_ptr,
            counts_ptr + ANCHOR,
            transposed_slots,
            transposed_programs,
            row,
            valid,
            transposed,
        )
        part = with_factor(part, up)
        dr += part
        miss += tl.load(back.miss + anchor, mask=is_anchor, other=0.0)
    e = load_rows(e_of, position, is_anchor, how.D, how.BLOCK_D).to(tl.float32)
    e = e * unit_scale(tl.sqrt(tl.sum(e * e, axis=1)))[:, None]
    dr = (dr - (g * miss)[:, None] * e) * inverse_tau

    mask = valid[:, None] & (dims < how.D)[None, :]
    r = tl.load(unit_ptr + row[:, None] * how.STRIDE + dims[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    norm = tl.load(norm_ptr + row, mask=valid, other=0.0)
    tl.store(tau_part_ptr + tl.program_id(0), tl.sum(tl.sum(dr * r, axis=1), axis=0))
    d_reconstruction = normalize_backward(dr, r, norm)
    tl.store(
        dr_ptr + row[:, None] * how.STRIDE + dims[None, :],
        d_reconstruction.to(dr_ptr.dtype.element_ty),
        mask=valid[:, None] & (dims < how.STRIDE)[None, :],
    )


@kernel
def given_rows(
    r_ptr,  # [N, D]
    e_of,  # Source
    list_ptr,
    count_ptr,
    out,  # UnitRows
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """r = R / |R| of the listed rows and the positives' cosines, for another library's R."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(count_ptr)
    position = tl.load(list_ptr + row, mask=valid, other=0)
    r = load_rows(Source(r_ptr, None), position, valid, D, BLOCK_D).to(tl.float32)
    store_unit_rows(r, e_of, out, position, row, valid, D, STRIDE, BLOCK_D)


@kernel
def given_gradient(
    grad_ptr,  # [N, D] contiguous
    list_ptr,
    count_ptr,
    dr_ptr,  # [capacity, STRIDE]
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The rows of a given dL/dR that `reconstruct` listed."""
    dims = tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(count_ptr)
    position = tl.load(list_ptr + row, mask=valid, other=0)
    grad = load_rows(Source(grad_ptr, None), position, valid, D, BLOCK_D)
    tl.store(
        dr_ptr + row[:, None] * STRIDE + dims[None, :],
        grad,
        mask=valid[:, None] & (dims < STRIDE)[None, :],
    )


@kernel
def pv_gradient(
    out_ptr,  # [N, D]
    rank_ptr,  # [3, N] prefix sums: anchor, reconstructed, column
    flag_ptr,  # [3, N]
    counts_ptr,  # [3]
    e_of,  # Source
    unit_ptr,  # [capacity, STRIDE] r of the reconstructed rows
    dq_ptr,  # [capacity, DQ_STRIDE] or None
    up,  # Upstream; without a gradient of the loss dq is all there is
    ahead,  # Parts of "identify": what its forward pass over e left
    back,  # Parts of "reconstruct": the transposed pass over e, where columns are rows of the batch
    miss_ptr,  # [capacity] of "reconstruct": 1 - p of its forward pass, or None
    rows,
    identify_slots,
    programs,
    transposed_slots,
    transposed_programs,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    DQ_STRIDE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    how: tl.constexpr,  # RowTiles
):
    """dL/dE_j of PV rows, dL/dq_j added, zeros for padding.

    dL/de_j = 1/tau (sum_i g_i p_ij r_i - [j in A] g_j (1 - p_jj) r_j), and for "identify"
    g_j/tau (sum_i p_ij r_i - (1 - p_jj) r_j). Where columns are unique items, the sum over i is
    added there. IN_PLACE: the transposed pass left its rows where dL/dE goes.
    """
    forward: tl.constexpr = how.ahead
    transposed: tl.constexpr = how.back
    dims = tl.arange(0, how.BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * how.BLOCK_M + tl.arange(0, how.BLOCK_M)
    inside = row < rows
    rows64 = rows.to(tl.int64)
    is_reconstructed = inside & (tl.load(flag_ptr + rows64 + row, mask=inside, other=0) != 0)
    place = (tl.load(rank_ptr + rows64 + row, mask=is_reconstructed, other=1) - 1).to(tl.int64)
    result = tl.full([how.BLOCK_M, how.BLOCK_D], 0.0, tl.float32)
    if up.grad is not None:
        is_column = inside & (tl.load(flag_ptr + 2 * rows64 + row, mask=inside, other=0) != 0)
        is_anchor = inside & (tl.load(flag_ptr + row, mask=inside, other=0) != 0)
        anchor = tl.load(rank_ptr + row, mask=is_anchor, other=1) - 1
        g = anchor_gradient(up, anchor, is_anchor)
        miss = tl.full([how.BLOCK_M], 0.0, tl.float32)
        de = tl.full([how.BLOCK_M, how.BLOCK_D], 0.0, tl.float32)
        if miss_ptr is not None:
            miss += tl.load(miss_ptr + anchor, mask=is_anchor, other=0.0)
        if back.acc is not None:
            if IN_PLACE:
                part = tl.load(
                    out_ptr + row[:, None] * how.D + dims[None, :],
                    mask=is_column[:, None] & (dims < how.D)[None, :],
                    other=0.0,
                ).to(tl.float32)
            else:
                column = tl.load(rank_ptr + 2 * rows64 + row, mask=is_column, other=1) - 1
                part = pass_rows(
                    back,
                    counts_ptr + COLUMN,
                    counts_ptr + ANCHOR,
                    transposed_slots,
                    transposed_programs,
                    column,
                    is_column,
                    transposed,
                )
            part = with_factor(part, up)
            de += part
        if ahead.acc is not None:
            de += g[:, None] * pass_rows(
                ahead,
                counts_ptr + ANCHOR,
                counts_ptr + RECONSTRUCTED,
                identify_slots,
                programs,
                anchor,
                is_anchor,
                forward,
            )
            miss += tl.load(ahead.miss + anchor, mask=is_anchor, other=0.0)
        r = tl.load(
            unit_ptr + place[:, None] * how.STRIDE + dims[None, :],
            mask=is_anchor[:, None] & (dims < how.D)[None, :],
            other=0.0,
        ).to(tl.float32)
        de = (de - (g * miss)[:, None] * r) * (score_scale(tau, TAU_IS_TENSOR) * LN2)
        e = load_rows(e_of, row, is_column, how.D, how.BLOCK_D).to(tl.float32)
        norm = tl.sqrt(tl.sum(e * e, axis=1))
        result += normalize_backward(de, e * unit_scale(norm)[:, None], norm)
    if dq_ptr is not None:
        result += tl.load(
            dq_ptr + place[:, None] * DQ_STRIDE + dims[None, :],
            mask=is_reconstructed[:, None] & (dims < how.D)[None, :],
            other=0.0,
        ).to(tl.float32)
    tl.store(
        out_ptr + row[:, None] * how.D + dims[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (dims < how.D)[None, :],
    )


class ItemColumns(NamedTuple):
    """Columns that are unique items: how often each is a candidate [n], and the prefix sums."""

    count: Any
    rank: Any


@kernel
def table_gradient(
    out_ptr,  # [n, D]
    order_ptr,  # [N + K] occurrences sorted by item: PV rows, then history rows
    starts_ptr,  # [n + 1] first occurrence of each item
    pv_ptr,  # [N, D] gradient of each PV row, or None
    history_ptr,  # [K, D] gradient of each history row, or None
    table_ptr,  # [n, D]
    counts_ptr,  # as above, or None
    columns,  # ItemColumns, of None where columns are rows, as are the next two
    up,  # Upstream
    back,  # Parts of the transposed pass
    rows,
    transposed_slots,
    transposed_programs,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    D: tl.constexpr,
    back_how: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/dU_u: the sum over u's occurrences in a fixed order, and u's share as a column."""
    item = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    first = tl.load(starts_ptr + item)
    last = tl.load(starts_ptr + item + 1)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_R):
        place = start + tl.arange(0, BLOCK_R)
        occurrence = tl.load(order_ptr + place, mask=place < last, other=-1)
        if pv_ptr is not None:
            is_pv = (occurrence >= 0) & (occurrence < rows)
            total += tl.load(
                pv_ptr + occurrence[:, None] * D + dims[None, :],
                mask=is_pv[:, None] & (dims < D)[None, :],
                other=0.0,
            )
        if history_ptr is not None:
            total += tl.load(
                history_ptr + (occurrence - rows)[:, None] * D + dims[None, :],
                mask=(occurrence >= rows)[:, None] & (dims < D)[None, :],
                other=0.0,
            )
    result = tl.sum(total, axis=0)
    if back.acc is not None:
        if tl.load(columns.count + item) > 0:
            column = tl.load(columns.rank + item) - 1 + tl.arange(0, 1)
            de = pass_rows(
                back,
                counts_ptr + COLUMN,
                counts_ptr + ANCHOR,
                transposed_slots,
                transposed_programs,
                column,
                column >= 0,
                back_how,
            )
            de = with_factor(de, up)
            de = de * (score_scale(tau, TAU_IS_TENSOR) * LN2)
            e = tl.load(
                table_ptr + item * D + dims[None, :], mask=(dims < D)[None, :], other=0.0
            ).to(tl.float32)
            norm = tl.sqrt(tl.sum(e * e, axis=1))
            result += tl.sum(normalize_backward(de, e * unit_scale(norm)[:, None], norm), axis=0)
    tl.store(out_ptr + item * D + dims, result.to(out_ptr.dtype.element_ty), mask=dims < D)
