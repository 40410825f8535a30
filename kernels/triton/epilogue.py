"""Triton: what stands before and after the two contrast passes. All of it is memory-bound, a few
rows a program."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .attention import load_rows, store_unit_rows
from .common import LN2, kernel, normalize_backward, parts_of, schedule, score_scale, unit_scale


@kernel
def normalize_rows(
    source_ptr,
    index_ptr,
    list_ptr,
    count_ptr,
    unit_ptr,  # [capacity, STRIDE]
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """e_j = E_j / |E_j| of the listed rows, made contiguous, with zeros from D to STRIDE."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(count_ptr)
    position = tl.load(list_ptr + row, mask=valid, other=0)
    x = load_rows(source_ptr, index_ptr, position, valid, D, BLOCK_D, HAS_INDEX).to(tl.float32)
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
    weights_ptr,  # [N]
    weight_sum_ptr,  # 0-d
    list_ptr,
    count_ptr,
    g_ptr,  # [capacity]
    rows,
    share,
    PER_ROW: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
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
        if HAS_WEIGHTS:
            g *= tl.load(weights_ptr + position, mask=valid, other=0.0)
    tl.store(g_ptr + row, tl.where(valid, g * share, 0.0), mask=row < rows)


class Upstream(NamedTuple):
    """The gradient of the loss [0-d] and what makes g of it; and the factor of a transposed pass
    that left g out."""

    # [capacity], unused where it is the same for every anchor: a mean or a sum without weights
    g: Any
    grad: Any
    weight_sum: Any  # 0-d
    share: Any
    lower: Any
    factor: Any  # 0-d, None where the pass had g in it


class Parts(NamedTuple):
    """What a contrast pass left, and what decides in how many parts (`schedule`)."""

    acc: Any  # [slots * TILE_M, STRIDE]
    count: Any
    other_count: Any
    slots: Any
    programs: Any
    top: Any = (
        None  # [slots * TILE_M] of a forward pass; parts of a transposed one are summed as they are
    )
    lse: Any = None  # [capacity], likewise


class PassTiles(NamedTuple):
    """The constants of that."""

    STREAM: Any
    STRIDE: Any
    TILE_M: Any
    TILE_N: Any
    BLOCK_D: Any


@triton.jit
def uniform_gradient(up):
    """g where it is the same for every anchor."""
    return tl.load(up.grad) / tl.load(up.weight_sum) * up.share


@triton.jit
def anchor_gradient(up, anchor, is_anchor, UNIFORM: tl.constexpr):
    """g_i of anchors, 0 for other rows."""
    if UNIFORM:
        return tl.where(is_anchor, uniform_gradient(up), 0.0)
    else:
        return tl.load(up.g + anchor, mask=is_anchor, other=0.0)


@triton.jit
def with_factor(x, up, UNIFORM: tl.constexpr):
    """What a transposed pass left, times what it left out."""
    if up.factor is not None:
        x *= tl.load(up.factor)
    elif UNIFORM:
        x *= uniform_gradient(up) * up.lower
    return x


@triton.jit
def pass_rows(passed, row, valid, how: tl.constexpr):
    """Rows [BLOCK_M] of a pass: sum_j p_ij y_j from the parts that a forward pass left, the plain
    sum of a transposed one's."""
    dims = tl.arange(0, how.BLOCK_D)
    if passed.top is not None:
        lse = tl.load(passed.lse + row, mask=valid, other=0.0)
    _tiles, blocks, parts, share = schedule(
        tl.load(passed.count),
        tl.load(passed.other_count),
        passed.slots,
        passed.programs,
        how.TILE_M,
        how.TILE_N,
        how.STREAM,
    )
    first, number = parts_of((row // how.TILE_M).to(tl.int64), blocks, parts, share)
    result = tl.zeros([row.shape[0], how.BLOCK_D], tl.float32)
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
    anchor_count_ptr,
    column_count_ptr,
    unit_ptr,  # [capacity, STRIDE] r
    norm_ptr,  # [capacity]
    e_ptr,
    e_index_ptr,
    forward_acc_ptr,  # "reconstruct": what the forward pass left
    forward_top_ptr,
    forward_lse_ptr,
    forward_miss_ptr,
    g_ptr,  # [capacity]; with UNIFORM unused
    upstream_ptr,  # 0-d
    weight_sum_ptr,  # 0-d
    transposed_acc_ptr,  # "identify": the transposed pass over r
    identify_miss_ptr,
    transposed_factor_ptr,  # 0-d factor of the transposed pass
    dr_ptr,  # [capacity, STRIDE]
    tau_part_ptr,  # [programs]
    share,
    lower,
    forward_slots,
    transposed_slots,
    programs,
    transposed_programs,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_E_INDEX: tl.constexpr,
    RECONSTRUCT: tl.constexpr,
    IDENTIFY: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    UNIFORM: tl.constexpr,
    STREAM: tl.constexpr,
    FORWARD_M: tl.constexpr,
    FORWARD_N: tl.constexpr,
    TRANSPOSED_M: tl.constexpr,
    TRANSPOSED_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/dr_i = g_i/tau (sum_{j != i} p_ij e_j - (1 - p_ii) e_i), dL/dR_i.

    "identify" adds 1/tau (sum_j g_j p_ji e_j - g_i (1 - p_ii) e_i). tau_part: sum_i dL/dr_i . r_i,
    which is -tau dL/dtau, since every score is r . e / tau.
    """
    factor = transposed_factor_ptr if HAS_FACTOR else None
    up = Upstream(g_ptr, upstream_ptr, weight_sum_ptr, share, lower, factor)
    ahead = Parts(
        forward_acc_ptr,
        anchor_count_ptr,
        column_count_ptr,
        forward_slots,
        programs,
        forward_top_ptr,
        forward_lse_ptr,
    )
    ahead_how: tl.constexpr = PassTiles(STREAM, STRIDE, FORWARD_M, FORWARD_N, BLOCK_D)
    back = Parts(
        transposed_acc_ptr, count_ptr, anchor_count_ptr, transposed_slots, transposed_programs
    )
    back_how: tl.constexpr = PassTiles(STREAM, STRIDE, TRANSPOSED_M, TRANSPOSED_N, BLOCK_D)
    dims = tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.load(count_ptr)
    valid = row < count
    position = tl.load(list_ptr + row, mask=valid, other=0)
    inverse_tau = score_scale(tau, TAU_IS_TENSOR) * LN2
    is_anchor = valid & (tl.load(anchor_flag_ptr + position, mask=valid, other=0) != 0)
    anchor = tl.load(anchor_rank_ptr + position, mask=is_anchor, other=1) - 1
    g = anchor_gradient(up, anchor, is_anchor, UNIFORM)

    dr = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    miss = tl.zeros([BLOCK_M], tl.float32)
    if RECONSTRUCT:
        dr += g[:, None] * pass_rows(ahead, anchor, is_anchor, ahead_how)
        miss += tl.load(forward_miss_ptr + anchor, mask=is_anchor, other=0.0)
    if IDENTIFY:
        part = pass_rows(back, row, valid, back_how)
        part = with_factor(part, up, UNIFORM)
        dr += part
        miss += tl.load(identify_miss_ptr + anchor, mask=is_anchor, other=0.0)
    e = load_rows(e_ptr, e_index_ptr, position, is_anchor, D, BLOCK_D, HAS_E_INDEX).to(tl.float32)
    e = e * unit_scale(tl.sqrt(tl.sum(e * e, axis=1)))[:, None]
    dr = (dr - (g * miss)[:, None] * e) * inverse_tau

    mask = valid[:, None] & (dims < D)[None, :]
    r = tl.load(unit_ptr + row[:, None] * STRIDE + dims[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    norm = tl.load(norm_ptr + row, mask=valid, other=0.0)
    tl.store(tau_part_ptr + tl.program_id(0), tl.sum(tl.sum(dr * r, axis=1), axis=0))
    d_reconstruction = normalize_backward(dr, r, norm)
    tl.store(
        dr_ptr + row[:, None] * STRIDE + dims[None, :],
        d_reconstruction.to(dr_ptr.dtype.element_ty),
        mask=valid[:, None] & (dims < STRIDE)[None, :],
    )


@kernel
def given_rows(
    r_ptr,  # [N, D]
    e_ptr,
    e_index_ptr,
    list_ptr,
    count_ptr,
    unit_ptr,
    norm_ptr,
    positive_ptr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_E_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """r = R / |R| of the listed rows and the positives' cosines, for another library's R."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(count_ptr)
    position = tl.load(list_ptr + row, mask=valid, other=0)
    r = load_rows(r_ptr, list_ptr, position, valid, D, BLOCK_D, False).to(tl.float32)
    store_unit_rows(
        r,
        e_ptr,
        e_index_ptr,
        unit_ptr,
        norm_ptr,
        positive_ptr,
        position,
        row,
        valid,
        D,
        STRIDE,
        BLOCK_D,
        HAS_E_INDEX,
    )


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
    grad = load_rows(grad_ptr, list_ptr, position, valid, D, BLOCK_D, False)
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
    anchor_count_ptr,
    column_count_ptr,
    reconstructed_count_ptr,
    e_ptr,
    e_index_ptr,
    unit_ptr,  # [capacity, STRIDE] r of the reconstructed rows
    dq_ptr,  # [capacity, DQ_STRIDE]
    transposed_acc_ptr,  # "reconstruct": the transposed pass over e
    transposed_factor_ptr,
    identify_acc_ptr,  # "identify": what its forward pass over e left
    identify_top_ptr,
    identify_lse_ptr,
    forward_miss_ptr,
    identify_miss_ptr,
    g_ptr,  # [capacity]; with UNIFORM unused
    upstream_ptr,  # 0-d
    weight_sum_ptr,  # 0-d
    rows,
    share,
    lower,
    transposed_slots,
    identify_slots,
    programs,
    transposed_programs,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    DQ_STRIDE: tl.constexpr,
    HAS_E_INDEX: tl.constexpr,
    CONTRAST: tl.constexpr,
    COLUMNS: tl.constexpr,
    RECONSTRUCT: tl.constexpr,
    IDENTIFY: tl.constexpr,
    ADD_DQ: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    UNIFORM: tl.constexpr,
    STREAM: tl.constexpr,
    IN_PLACE: tl.constexpr,
    TRANSPOSED_M: tl.constexpr,
    TRANSPOSED_N: tl.constexpr,
    IDENTIFY_M: tl.constexpr,
    IDENTIFY_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/dE_j of PV rows, dL/dq_j added, zeros for padding.

    dL/de_j = 1/tau (sum_i g_i p_ij r_i - [j in A] g_j (1 - p_jj) r_j), and for "identify"
    g_j/tau (sum_i p_ij r_i - (1 - p_jj) r_j). COLUMNS off: columns are unique items, the sum over i
    is added there. IN_PLACE: the transposed pass left its rows where dL/dE goes.
    """
    factor = transposed_factor_ptr if HAS_FACTOR else None
    up = Upstream(g_ptr, upstream_ptr, weight_sum_ptr, share, lower, factor)
    ahead = Parts(
        identify_acc_ptr,
        anchor_count_ptr,
        reconstructed_count_ptr,
        identify_slots,
        programs,
        identify_top_ptr,
        identify_lse_ptr,
    )
    ahead_how: tl.constexpr = PassTiles(STREAM, STRIDE, IDENTIFY_M, IDENTIFY_N, BLOCK_D)
    back = Parts(
        transposed_acc_ptr,
        column_count_ptr,
        anchor_count_ptr,
        transposed_slots,
        transposed_programs,
    )
    back_how: tl.constexpr = PassTiles(STREAM, STRIDE, TRANSPOSED_M, TRANSPOSED_N, BLOCK_D)
    dims = tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = row < rows
    rows64 = rows.to(tl.int64)
    is_reconstructed = inside & (tl.load(flag_ptr + rows64 + row, mask=inside, other=0) != 0)
    place = (tl.load(rank_ptr + rows64 + row, mask=is_reconstructed, other=1) - 1).to(tl.int64)
    result = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if CONTRAST:
        is_column = inside & (tl.load(flag_ptr + 2 * rows64 + row, mask=inside, other=0) != 0)
        is_anchor = inside & (tl.load(flag_ptr + row, mask=inside, other=0) != 0)
        anchor = tl.load(rank_ptr + row, mask=is_anchor, other=1) - 1
        g = anchor_gradient(up, anchor, is_anchor, UNIFORM)
        miss = tl.zeros([BLOCK_M], tl.float32)
        de = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if RECONSTRUCT:
            miss += tl.load(forward_miss_ptr + anchor, mask=is_anchor, other=0.0)
            if COLUMNS:
                if IN_PLACE:
                    part = tl.load(
                        out_ptr + row[:, None] * D + dims[None, :],
                        mask=is_column[:, None] & (dims < D)[None, :],
                        other=0.0,
                    ).to(tl.float32)
                else:
                    column = tl.load(rank_ptr + 2 * rows64 + row, mask=is_column, other=1) - 1
                    part = pass_rows(back, column, is_column, back_how)
                part = with_factor(part, up, UNIFORM)
                de += part
        if IDENTIFY:
            de += g[:, None] * pass_rows(ahead, anchor, is_anchor, ahead_how)
            miss += tl.load(identify_miss_ptr + anchor, mask=is_anchor, other=0.0)
        r = tl.load(
            unit_ptr + place[:, None] * STRIDE + dims[None, :],
            mask=is_anchor[:, None] & (dims < D)[None, :],
            other=0.0,
        ).to(tl.float32)
        de = (de - (g * miss)[:, None] * r) * (score_scale(tau, TAU_IS_TENSOR) * LN2)
        e = load_rows(e_ptr, e_index_ptr, row, is_column, D, BLOCK_D, HAS_E_INDEX).to(tl.float32)
        norm = tl.sqrt(tl.sum(e * e, axis=1))
        result += normalize_backward(de, e * unit_scale(norm)[:, None], norm)
    if ADD_DQ:
        result += tl.load(
            dq_ptr + place[:, None] * DQ_STRIDE + dims[None, :],
            mask=is_reconstructed[:, None] & (dims < D)[None, :],
            other=0.0,
        ).to(tl.float32)
    tl.store(
        out_ptr + row[:, None] * D + dims[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (dims < D)[None, :],
    )


@kernel
def table_gradient(
    out_ptr,  # [n, D]
    order_ptr,  # [N + K] occurrences sorted by item: PV rows, then history rows
    starts_ptr,  # [n + 1] first occurrence of each item
    pv_ptr,  # [N, D] gradient of each PV row
    history_ptr,  # [K, D] gradient of each history row
    item_count_ptr,  # [n] how often an item is a candidate, where columns are unique items
    column_rank_ptr,  # [n]
    column_count_ptr,
    anchor_count_ptr,
    table_ptr,  # [n, D]
    transposed_acc_ptr,
    transposed_factor_ptr,
    upstream_ptr,
    weight_sum_ptr,
    rows,
    share,
    lower,
    transposed_slots,
    transposed_programs,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    HAS_PV: tl.constexpr,
    HAS_HISTORY: tl.constexpr,
    MERGED: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    UNIFORM: tl.constexpr,
    STREAM: tl.constexpr,
    TRANSPOSED_M: tl.constexpr,
    TRANSPOSED_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/dU_u: the sum over u's occurrences in a fixed order, and u's share as a column."""
    factor = transposed_factor_ptr if HAS_FACTOR else None
    up = Upstream(None, upstream_ptr, weight_sum_ptr, share, lower, factor)
    back = Parts(
        transposed_acc_ptr,
        column_count_ptr,
        anchor_count_ptr,
        transposed_slots,
        transposed_programs,
    )
    back_how: tl.constexpr = PassTiles(STREAM, STRIDE, TRANSPOSED_M, TRANSPOSED_N, BLOCK_D)
    item = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    first = tl.load(starts_ptr + item)
    last = tl.load(starts_ptr + item + 1)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_R):
        place = start + tl.arange(0, BLOCK_R)
        occurrence = tl.load(order_ptr + place, mask=place < last, other=-1)
        if HAS_PV:
            is_pv = (occurrence >= 0) & (occurrence < rows)
            total += tl.load(
                pv_ptr + occurrence[:, None] * D + dims[None, :],
                mask=is_pv[:, None] & (dims < D)[None, :],
                other=0.0,
            )
        if HAS_HISTORY:
            total += tl.load(
                history_ptr + (occurrence - rows)[:, None] * D + dims[None, :],
                mask=(occurrence >= rows)[:, None] & (dims < D)[None, :],
                other=0.0,
            )
    result = tl.sum(total, axis=0)
    if MERGED:
        if tl.load(item_count_ptr + item) > 0:
            column = tl.load(column_rank_ptr + item) - 1 + tl.arange(0, 1)
            de = pass_rows(back, column, column >= 0, back_how)
            de = with_factor(de, up, UNIFORM)
            de = de * (score_scale(tau, TAU_IS_TENSOR) * LN2)
            e = tl.load(
                table_ptr + item * D + dims[None, :], mask=(dims < D)[None, :], other=0.0
            ).to(tl.float32)
            norm = tl.sqrt(tl.sum(e * e, axis=1))
            result += tl.sum(normalize_backward(de, e * unit_scale(norm)[:, None], norm), axis=0)
    tl.store(out_ptr + item * D + dims, result.to(out_ptr.dtype.element_ty), mask=dims < D)
