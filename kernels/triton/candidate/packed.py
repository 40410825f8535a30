"""Triton: attention for each candidate where nothing but dot products is needed: one head, by
cosines, E and C themselves.

With unit rows e_j, c_k, lengths |C_k| and attention temperature T, the softmax's denominator
cancels:

    x_k = e_j . c_k,   w_k = |C_k| exp((x_k - 1)/T),   G = c c^T,
    u = sum_k w_k x_k,   n = w^T G w,   s = u / (tau sqrt n)

A block is UNITS units of SPAN history rows; pages whose histories need as many units, a power of
two, share blocks. A tile of candidates times a block is two products (x and t = w G); sums over a
page are sums over neighbouring columns. With g = dL/ds, A = g / (tau sqrt n), a = u / n and
y_k = w_k (x_k - a t_k):

    dL/dx_k = A (w_k + y_k / T),   dL/de_j = sum_k dL/dx_k c_k,   dL/dlog|C_k| = sum_j A y_k,
    dL/dc_k = sum_j dL/dx_k e_j - sum_l M_kl c_l,   M_kl = sum_j A a w_k w_l

Pages with more than SIDE anchors or with histories that do not fit into a block are left to
kernels.py.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..common import (
    LN2,
    exp2_flushed,
    kernel,
    normalize_backward,
    rsqrt_flushed,
    score_scale,
    unit_scale,
)
from ..masks import MASK_OTHER_PAGES
from .packing import SIDE, SLOTS, SPAN, UNITS

# Of n, a sum of squared weights: far below what weights can be.
SMALLEST = tl.constexpr(1e-37)


@triton.jit
def units_together(x, TOGETHER: tl.constexpr):
    """Each unit's number replaced by the sum of so many neighbours' [BLOCK_M, units]."""
    rows: tl.constexpr = x.shape[0]
    groups: tl.constexpr = x.shape[1] // TOGETHER
    sums = tl.sum(tl.reshape(x, (rows, groups, TOGETHER)), axis=2)
    each = tl.broadcast_to(tl.expand_dims(sums, 2), (rows, groups, TOGETHER))
    return tl.reshape(each, (rows, x.shape[1]))


@triton.jit
def page_sums(x, group):
    """Sums over each unit's page, [BLOCK_M, slots] -> [BLOCK_M, units]."""
    units: tl.constexpr = x.shape[1] // SPAN
    sums = tl.sum(tl.reshape(x, (x.shape[0], units, SPAN)), axis=2)
    if group > 1:
        if group == 2:
            sums = units_together(sums, 2)
        elif group == 4:
            sums = units_together(sums, 4)
        elif group == 8:
            sums = units_together(sums, 8)
        elif units == UNITS:
            sums = units_together(sums, UNITS)
    return sums


@triton.jit
def to_slots(x):
    """[BLOCK_M, units] -> [BLOCK_M, slots], each unit's number in all of its slots."""
    each = tl.broadcast_to(tl.expand_dims(x, 2), (x.shape[0], x.shape[1], SPAN))
    return tl.reshape(each, (x.shape[0], x.shape[1] * SPAN))


@triton.jit
def attend_block(x, slot_log, gram, group, sharpness, PRECISION: tl.constexpr):
    """w, t = w G [BLOCK_M, slots]; and u, 1 / sqrt n [BLOCK_M, units] of each unit's page."""
    w = exp2_flushed((x - 1.0) * sharpness + slot_log[None, :])
    # The same rounded weights above and below the line: a cosine of weights that are a little
    # different.
    w_dot = w.to(gram.dtype)
    w = w_dot.to(tl.float32)
    t = tl.dot(w_dot, gram, input_precision=PRECISION)
    u = page_sums(w * x, group)
    # No cosine is above 1, whatever was rounded.
    n = tl.maximum(page_sums(w * t, group), u * u)
    # A reconstruction of length 0: no cosine, no gradient.
    n = tl.where(n < SMALLEST, float("inf"), n)
    return w, t, u, rsqrt_flushed(n)


@triton.jit
def own_columns(unit_column_ptr, units, unit, column, side):
    """Which columns [BLOCK_M] are that of each unit's anchor number `side` [UNITS]."""
    return column[:, None] == tl.load(unit_column_ptr + side * units + unit)[None, :]


@kernel
def packed_scores(
    e_ptr,
    c_ptr,
    gram_ptr,
    slot_log_ptr,
    block_group_ptr,
    block_most_ptr,
    unit_page_ptr,
    unit_poison_ptr,
    unit_column_ptr,
    column_page_ptr,
    column_bias_ptr,
    column_count_ptr,
    packed_count_ptr,
    top_ptr,  # [parts, units]
    total_ptr,
    units,
    parts,
    sharpness,  # log2(e) / T
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(max, sum) of 2^t of a block's pages over part of the candidates, the anchors' own apart."""
    block = tl.program_id(0)
    part = tl.program_id(1)
    if block >= tl.load(packed_count_ptr):
        return
    dims = tl.arange(0, BLOCK_D)
    slot = block * SLOTS + tl.arange(0, SLOTS)
    unit = block * UNITS + tl.arange(0, UNITS)
    c = tl.load(c_ptr + slot.to(tl.int64)[:, None] * BLOCK_D + dims[None, :])
    gram = tl.load(gram_ptr + slot.to(tl.int64)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :])
    slot_log = tl.load(slot_log_ptr + slot)
    most = tl.load(block_most_ptr + block)
    group = tl.load(block_group_ptr + block)
    page = tl.load(unit_page_ptr + unit)
    poison = tl.load(unit_poison_ptr + unit)
    scale = score_scale(tau, TAU_IS_TENSOR)
    count = tl.load(column_count_ptr)
    share = tl.cdiv(tl.cdiv(count, BLOCK_M), parts) * BLOCK_M
    begin = part * share
    top = tl.full([BLOCK_M, UNITS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M, UNITS], tl.float32)
    for start in range(begin, tl.minimum(begin + share, count), BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        inside = column < count
        e = tl.load(e_ptr + column.to(tl.int64)[:, None] * BLOCK_D + dims[None, :])
        x = tl.dot(e, tl.trans(c), input_precision=PRECISION)
        _w, _t, u, root = attend_block(x, slot_log, gram, group, sharpness, PRECISION)
        t = u * root * scale + poison[None, :]
        if HAS_BIAS:
            t += tl.load(column_bias_ptr + column, mask=inside, other=0.0)[:, None]
        left_out = own_columns(unit_column_ptr, units, unit, column, 0)
        left_out = left_out | (inside == 0)[:, None]
        if most > 1:
            for side in tl.static_range(1, SIDE):
                left_out = left_out | own_columns(unit_column_ptr, units, unit, column, side)
        if MASK == MASK_OTHER_PAGES:
            column_page = tl.load(column_page_ptr + column, mask=inside, other=-2)
            left_out = left_out | (column_page[:, None] == page[None, :])
        t = tl.where(left_out, -float("inf"), t)
        new_top = tl.maximum(top, t)
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.exp2(t - shift)
        top = new_top
    highest = tl.max(top, axis=0)
    shift = tl.where(highest == -float("inf"), 0.0, highest)
    total = tl.sum(total * tl.exp2(top - shift[None, :]), axis=0)
    where = part.to(tl.int64) * units + unit
    tl.store(top_ptr + where, highest)
    tl.store(total_ptr + where, total)


class PackedPages(NamedTuple):
    """What the gradients of the scores need of each unit's page; SIDE times as many where anchors
    are told apart."""

    page: Any  # [units]
    poison: Any
    lse: Any
    weight: Any
    column: Any  # [SIDE, units]
    own: Any  # [SIDE, units]
    most: Any  # [blocks]
    units: Any


class Columns(NamedTuple):
    """Of the candidates [columns]; bias None where there is none."""

    page: Any
    bias: Any


@triton.jit
def pair_gradients(u, root, column, inside, block, unit, scale, pages, columns, MASK: tl.constexpr):
    """dL/ds [BLOCK_M, UNITS] of each unit's page."""
    page = tl.load(pages.page + unit)
    # Without a page nothing was written.
    lse = tl.load(pages.lse + unit, mask=page >= 0, other=float("inf"))
    weight = tl.load(pages.weight + unit, mask=page >= 0, other=0.0)
    most = tl.load(pages.most + block)
    t = u * root * scale - (lse - tl.load(pages.poison + unit))[None, :]
    if columns.bias is not None:
        t += tl.load(columns.bias + column, mask=inside, other=0.0)[:, None]
    g = exp2_flushed(t) * weight[None, :]
    counts = inside[:, None]
    if MASK == MASK_OTHER_PAGES:
        column_page = tl.load(columns.page + column, mask=inside, other=-2)
        counts = counts & (column_page[:, None] != page[None, :])
    g = tl.where(counts, g, 0.0)
    here = own_columns(pages.column, pages.units, unit, column, 0)
    own = tl.load(pages.own + unit)
    g = tl.where(here, own[None, :], g)
    if most > 1:
        for side in tl.static_range(1, SIDE):
            again = own_columns(pages.column, pages.units, unit, column, side)
            own = tl.load(pages.own + side * pages.units + unit)
            # Anchors of one item have one column.
            g = tl.where(again, tl.where(here, g, 0.0) + own[None, :], g)
            here = here | again
    return g


@kernel
def packed_columns(
    e_ptr,
    c_ptr,
    gram_ptr,
    slot_log_ptr,
    block_group_ptr,
    block_most_ptr,
    unit_page_ptr,
    unit_poison_ptr,
    unit_column_ptr,
    unit_own_ptr,
    unit_lse_ptr,
    unit_weight_ptr,
    column_page_ptr,
    column_bias_ptr,
    column_count_ptr,
    packed_count_ptr,
    unit_gradient_ptr,  # [columns, BLOCK_D] float32
    units,
    sharpness,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    STEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dL/de of a tile of candidates: half a block a step; then, in a launch of their own, the
    blocks of one large page."""
    column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.load(column_count_ptr)
    first = count * 0
    last = tl.load(packed_count_ptr + 2) * 2
    if STEP == SLOTS:
        first = last // 2
        last = tl.load(packed_count_ptr)
        if first == last:
            return
    if tl.program_id(0) * BLOCK_M >= count:
        return
    inside = column < count
    dims = tl.arange(0, BLOCK_D)
    e = tl.load(e_ptr + column.to(tl.int64)[:, None] * BLOCK_D + dims[None, :])
    scale = score_scale(tau, TAU_IS_TENSOR)
    where = column.to(tl.int64)[:, None] * BLOCK_D + dims[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if STEP == SLOTS:
        acc += tl.load(unit_gradient_ptr + where)
    pages = PackedPages(
        unit_page_ptr,
        unit_poison_ptr,
        unit_lse_ptr,
        unit_weight_ptr,
        unit_column_ptr,
        unit_own_ptr,
        block_most_ptr,
        units,
    )
    columns = Columns(column_page_ptr, column_bias_ptr if HAS_BIAS else None)
    for step in range(first, last):
        block = step * STEP // SLOTS
        place = step * STEP - block * SLOTS + tl.arange(0, STEP)
        slot = block * SLOTS + place
        unit = step * (STEP // SPAN) + tl.arange(0, STEP // SPAN)
        c = tl.load(c_ptr + slot.to(tl.int64)[:, None] * BLOCK_D + dims[None, :])
        gram = tl.load(gram_ptr + slot.to(tl.int64)[:, None] * SLOTS + place[None, :])
        x = tl.dot(e, tl.trans(c), input_precision=PRECISION)
        w, t, u, root = attend_block(
            x,
            tl.load(slot_log_ptr + slot),
            gram,
            tl.load(block_group_ptr + block),
            sharpness,
            PRECISION,
        )
        g = pair_gradients(u, root, column, inside, block, unit, scale, pages, columns, MASK)
        weight = to_slots(g * root * (scale * LN2))
        slope = to_slots(u * root * root)
        dx = weight * w * (1.0 + (x - slope * t) * (sharpness * LN2))
        acc = tl.dot(dx.to(DOT_TYPE), c.to(DOT_TYPE), acc, input_precision=PRECISION)
    tl.store(unit_gradient_ptr + where, acc)


@kernel
def finish_columns(
    unit_gradient_ptr,
    e_ptr,
    e_length_ptr,
    column_list_ptr,
    column_count_ptr,
    packed_count_ptr,
    # [N or n, D], rows at their places; holds what pages that did not fit gave, if there are any
    de_ptr,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/dE from the gradients of the unit rows."""
    column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = column < tl.load(column_count_ptr)
    dims = tl.arange(0, BLOCK_D)
    where = column.to(tl.int64)[:, None] * BLOCK_D + dims[None, :]
    grad = tl.load(unit_gradient_ptr + where, mask=inside[:, None], other=0.0)
    e = tl.load(e_ptr + where, mask=inside[:, None], other=0.0).to(tl.float32)
    length = tl.load(e_length_ptr + column, mask=inside, other=0.0)
    grad = normalize_backward(grad, e, length)
    position = tl.load(column_list_ptr + column, mask=inside, other=0)
    where = position.to(tl.int64)[:, None] * D + dims[None, :]
    mask = inside[:, None] & (dims < D)[None, :]
    if tl.load(packed_count_ptr + 1) > 0:
        grad += tl.load(de_ptr + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(de_ptr + where, grad.to(de_ptr.dtype.element_ty), mask=mask)


@kernel
def packed_history(
    e_ptr,
    c_ptr,
    gram_ptr,
    slot_log_ptr,
    slot_length_ptr,
    slot_row_ptr,
    block_group_ptr,
    block_most_ptr,
    unit_page_ptr,
    unit_poison_ptr,
    unit_column_ptr,
    unit_own_ptr,
    unit_lse_ptr,
    unit_weight_ptr,
    page_place_ptr,
    column_page_ptr,
    column_bias_ptr,
    column_count_ptr,
    packed_count_ptr,
    dc_ptr,  # [K, D]
    tau_part_ptr,  # [blocks] sum of g cos
    units,
    sharpness,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WANT_C: tl.constexpr,
    WANT_TAU: tl.constexpr,
    D: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dL/dC of a block's history, over all candidates."""
    block = tl.program_id(0)
    if block >= tl.load(packed_count_ptr):
        if WANT_TAU:
            tl.store(tau_part_ptr + block, 0.0)
        return
    dims = tl.arange(0, BLOCK_D)
    place = tl.arange(0, SLOTS)
    slot = block * SLOTS + place
    unit = block * UNITS + tl.arange(0, UNITS)
    c = tl.load(c_ptr + slot.to(tl.int64)[:, None] * BLOCK_D + dims[None, :])
    gram = tl.load(gram_ptr + slot.to(tl.int64)[:, None] * SLOTS + place[None, :])
    slot_log = tl.load(slot_log_ptr + slot)
    group = tl.load(block_group_ptr + block)
    scale = score_scale(tau, TAU_IS_TENSOR)
    count = tl.load(column_count_ptr)
    acc = tl.zeros([SLOTS, BLOCK_D], tl.float32)
    pairs = tl.zeros([SLOTS, SLOTS], tl.float32)
    along = tl.zeros([BLOCK_M // 16, 8, SLOTS], tl.float32)
    cosines = tl.zeros([BLOCK_M, UNITS], tl.float32)
    pages = PackedPages(
        unit_page_ptr,
        unit_poison_ptr,
        unit_lse_ptr,
        unit_weight_ptr,
        unit_column_ptr,
        unit_own_ptr,
        block_most_ptr,
        units,
    )
    columns = Columns(column_page_ptr, column_bias_ptr if HAS_BIAS else None)
    for start in range(0, count, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        e = tl.load(e_ptr + column.to(tl.int64)[:, None] * BLOCK_D + dims[None, :])
        x = tl.dot(e, tl.trans(c), input_precision=PRECISION)
        w, t, u, root = attend_block(x, slot_log, gram, group, sharpness, PRECISION)
        g = pair_gradients(
            u, root, column, column < count, block, unit, scale, pages, columns, MASK
        )
        if WANT_TAU:
            cosines += g * u * root
        if WANT_C:
            weight = to_slots(g * root * (scale * LN2)) * w
            slope = to_slots(u * root * root)
            y = weight * (x - slope * t)
            # Rows that a thread holds both of.
            along += tl.sum(tl.reshape(y, (BLOCK_M // 16, 2, 8, SLOTS)), axis=1)
            dx = weight + y * (sharpness * LN2)
            acc = tl.dot(tl.trans(dx.to(DOT_TYPE)), e.to(DOT_TYPE), acc, input_precision=PRECISION)
            pairs = tl.dot(
                tl.trans((weight * slope).to(DOT_TYPE)),
                w.to(DOT_TYPE),
                pairs,
                input_precision=PRECISION,
            )
    page = tl.load(unit_page_ptr + unit)
    if WANT_TAU:
        first = tl.load(page_place_ptr + page, mask=page >= 0, other=-1) == unit
        total = tl.where(first, tl.sum(cosines, axis=0), 0.0)
        tl.store(tau_part_ptr + block, tl.sum(total, axis=0))
    if WANT_C:
        slot_page = tl.load(unit_page_ptr + slot // SPAN)
        other_page = tl.load(unit_page_ptr + (block * SLOTS + place) // SPAN)
        pairs = tl.where(slot_page[:, None] == other_page[None, :], pairs, 0.0)
        acc -= tl.dot(pairs.to(DOT_TYPE), c.to(DOT_TYPE), input_precision=PRECISION)
        length = tl.load(slot_length_ptr + slot)
        wide = c.to(tl.float32)
        d_c = normalize_backward(acc, wide, tl.abs(length))
        total = tl.sum(tl.sum(along, axis=0), axis=0)
        d_c += (total * unit_scale(tl.abs(length)))[:, None] * wide
        row = tl.load(slot_row_ptr + slot)
        where = row.to(tl.int64)[:, None] * D + dims[None, :]
        mask = (row >= 0)[:, None] & (dims < D)[None, :]
        tl.store(dc_ptr + where, d_c.to(dc_ptr.dtype.element_ty), mask=mask)
