"""Triton: attention for each candidate where nothing but dot products is needed: one head, by cosines, E and C themselves.

With unit rows e_j, c_k, lengths |C_k| and attention temperature T, the softmax's denominator cancels:

    x_k = e_j . c_k,   w_k = |C_k| exp((x_k - 1)/T),   G = c c^T,   u = sum_k w_k x_k,   n = w^T G w,   s = u / (tau sqrt n)

A block is UNITS units of SPAN history rows; pages whose histories need as many units, a power of two, share blocks. A tile
of candidates times a block is two products (x and t = w G); sums over a page are sums over neighbouring columns. With g = dL/ds, A = g / (tau sqrt n), a = u / n and y_k = w_k (x_k - a t_k):

    dL/dx_k = A (w_k + y_k / T),   dL/de_j = sum_k dL/dx_k c_k,   dL/dlog|C_k| = sum_j A y_k,
    dL/dc_k = sum_j dL/dx_k e_j - sum_l M_kl c_l,   M_kl = sum_j A a w_k w_l

Pages with more than SIDE anchors or with histories that do not fit into a block are left to candidate.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .contrast import MASK_OTHER_PAGES, add_in
from .reconstruct import load_rows
from .tl_common import (
    LN2,
    LOG2E,
    exp2_flushed,
    kernel,
    normalize_backward,
    rank_before,
    rsqrt_flushed,
    score_scale,
    unit_scale,
)

SPAN = tl.constexpr(4)
UNITS = tl.constexpr(16)
SLOTS = tl.constexpr(64)
# Rows of candidates that a tile may go past the last one.
PADDING = tl.constexpr(128)
# Pages take 1, 2, 4, 8 or 16 units.
LARGEST = tl.constexpr(5)
# Of n, a sum of squared weights: far below what weights can be.
SMALLEST = tl.constexpr(1e-37)
# Anchors of a page whose columns are told apart side by side.
SIDE = tl.constexpr(4)


@kernel
def pack_pages(
    pv_offsets_ptr,
    history_offsets_ptr,
    anchor_rank_ptr,
    unit_page_ptr,  # [blocks * UNITS], -1 before
    page_place_ptr,  # [pages] its first unit, -1 where it has none
    long_ptr,  # [pages] first anchors of the pages that do not fit
    packed_count_ptr,  # [3] blocks, pages that do not fit, blocks of more than one page
    pages,
    CHUNK: tl.constexpr,
):
    """Pages with an anchor in blocks, those of as many units side by side; one program, in order of the pages."""
    sizes = tl.arange(0, 8)  # powers of two
    counts = tl.zeros([8], tl.int32)
    for start in range(0, pages, CHUNK):
        page = start + tl.arange(0, CHUNK)
        size, _first = size_of(pv_offsets_ptr, history_offsets_ptr, anchor_rank_ptr, page, pages)
        counts += tl.sum((size[:, None] == sizes[None, :]).to(tl.int32), axis=0)
    blocks = tl.where(sizes < LARGEST, tl.cdiv(counts << sizes, UNITS), 0)
    base = tl.cumsum(blocks, axis=0) - blocks
    seen = tl.zeros([8], tl.int32)
    long = pages * 0
    for start in range(0, pages, CHUNK):
        page = start + tl.arange(0, CHUNK)
        size, first = size_of(pv_offsets_ptr, history_offsets_ptr, anchor_rank_ptr, page, pages)
        is_size = (size[:, None] == sizes[None, :]).to(tl.int32)
        rank = tl.cumsum(is_size, axis=0) - is_size + seen[None, :]
        place = (base * UNITS)[None, :] + (rank << sizes[None, :])
        place = tl.sum(place * is_size, axis=1)
        seen += tl.sum(is_size, axis=0)
        fits = (size >= 0) & (size < LARGEST)
        tl.store(page_place_ptr + page, tl.where(fits, place, -1), mask=page < pages)
        for unit in tl.static_range(UNITS):
            tl.store(unit_page_ptr + place + unit, page, mask=fits & ((unit >> size) == 0))
        is_long = (size == LARGEST).to(tl.int32)
        before = tl.cumsum(is_long, axis=0) - is_long + long
        tl.store(long_ptr + before, first, mask=is_long > 0)
        long += tl.sum(is_long, axis=0)
    tl.store(packed_count_ptr, tl.sum(blocks, axis=0))
    tl.store(packed_count_ptr + 1, long)
    tl.store(packed_count_ptr + 2, tl.sum(tl.where(sizes < LARGEST - 1, blocks, 0), axis=0))


@triton.jit
def exponent_of(length):
    """log2 of the units that so many history rows take."""
    exponent = (length > SPAN).to(tl.int32)
    for more in tl.static_range(1, LARGEST):
        exponent += (length > (SPAN << more)).to(tl.int32)
    return exponent


@triton.jit
def size_of(pv_offsets_ptr, history_offsets_ptr, anchor_rank_ptr, page, pages):
    """log2 of the units that pages need, LARGEST where they do not fit, -1 without an anchor; and their first anchors."""
    inside = page < pages
    first, last = anchors_of(pv_offsets_ptr, anchor_rank_ptr, page, inside)
    begin = tl.load(history_offsets_ptr + page, mask=inside, other=0)
    end = tl.load(history_offsets_ptr + page + 1, mask=inside, other=0)
    size = tl.where(last - first <= SIDE, exponent_of(end - begin), LARGEST)
    return tl.where(inside & (last > first), size, -1), first


@triton.jit
def anchors_of(pv_offsets_ptr, anchor_rank_ptr, page, mask):
    """The range of anchors of pages [BLOCK]."""
    first_row = tl.load(pv_offsets_ptr + page, mask=mask, other=0)
    last_row = tl.load(pv_offsets_ptr + page + 1, mask=mask, other=0)
    return rank_before(anchor_rank_ptr, first_row), rank_before(anchor_rank_ptr, last_row)


@kernel
def pack_blocks(
    source_ptr,
    index_ptr,
    pv_offsets_ptr,
    history_offsets_ptr,
    history_page_ptr,
    anchor_list_ptr,
    anchor_rank_ptr,
    pv_index_ptr,
    column_rank_ptr,
    unit_page_ptr,
    page_place_ptr,
    packed_count_ptr,
    c_ptr,  # [blocks * SLOTS, BLOCK_D] unit rows
    gram_ptr,  # [blocks, SLOTS, SLOTS] within pages
    slot_log_ptr,  # [blocks * SLOTS] log2 |C|, the page's largest subtracted; -inf in empty slots
    slot_length_ptr,  # [blocks * SLOTS]
    slot_row_ptr,  # [blocks * SLOTS] history rows, -1 in empty slots
    unit_poison_ptr,  # [blocks * UNITS] NaN where the page's history is not finite, else 0
    unit_column_ptr,  # [SIDE, blocks * UNITS] columns of the page's anchors, -1 for none
    block_group_ptr,  # [blocks] units of each of its pages
    block_most_ptr,  # [blocks] anchors of a page, at most
    units,
    D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Unit rows of a block's history side by side, the products of each page's with each other, and its anchors' columns."""
    block = tl.program_id(0)
    if block >= tl.load(packed_count_ptr):
        return
    slot = block * SLOTS + tl.arange(0, SLOTS)
    page = tl.load(unit_page_ptr + slot // SPAN)
    there = page >= 0
    place = tl.load(page_place_ptr + page, mask=there, other=0)
    row = tl.load(history_offsets_ptr + page, mask=there, other=0) + slot - place * SPAN
    real = there & (row < tl.load(history_offsets_ptr + page + 1, mask=there, other=0))
    real = real & (tl.load(history_page_ptr + row, mask=real, other=-1) == page)
    c = load_rows(source_ptr, index_ptr, row, real, D, BLOCK_D, HAS_INDEX)
    wide = c.to(tl.float32)
    length = tl.sqrt(tl.sum(wide * wide, axis=1))
    finite = length < float("inf")
    # Zeros in place of what is not finite: it must not reach the other pages of the block.
    unit = tl.where(finite[:, None], wide * unit_scale(length)[:, None], 0.0)
    unit = unit.to(c_ptr.dtype.element_ty)
    same = there[:, None] & (page[:, None] == page[None, :])
    log = tl.where(real & finite & (length > 0), tl.log2(length), -float("inf"))
    highest = tl.max(tl.where(same, log[None, :], -float("inf")), axis=1)
    log -= tl.where(highest == -float("inf"), 0.0, highest)
    gram = tl.dot(unit, tl.trans(unit), input_precision=PRECISION)
    gram = tl.where(same, gram, 0.0)
    dims = tl.arange(0, BLOCK_D)
    other = tl.arange(0, SLOTS)
    tl.store(c_ptr + slot.to(tl.int64)[:, None] * BLOCK_D + dims[None, :], unit)
    where = slot.to(tl.int64)[:, None] * SLOTS + other[None, :]
    tl.store(gram_ptr + where, gram.to(gram_ptr.dtype.element_ty))
    tl.store(slot_log_ptr + slot, log)
    tl.store(slot_length_ptr + slot, length)
    tl.store(slot_row_ptr + slot, tl.where(real, row, -1))
    bad = tl.max(tl.where(same & (real & (finite == 0))[None, :], 1, 0), axis=1)
    poison = tl.where(bad > 0, float("nan"), 0.0)
    tl.store(unit_poison_ptr + slot // SPAN, poison, mask=slot % SPAN == 0)
    units_here = block * UNITS + tl.arange(0, UNITS)
    page = tl.load(unit_page_ptr + units_here)
    there = page >= 0
    first, last = anchors_of(pv_offsets_ptr, anchor_rank_ptr, page, there)
    for side in tl.static_range(SIDE):
        has = there & (first + side < last)
        item = tl.load(anchor_list_ptr + first + side, mask=has, other=0)
        if MERGED:
            item = tl.load(pv_index_ptr + item, mask=has, other=0).to(tl.int32)
        column = tl.load(column_rank_ptr + item, mask=has, other=0) - 1
        tl.store(unit_column_ptr + side * units + units_here, column)
    tl.store(block_most_ptr + block, tl.max(last - first, axis=0))
    of_first = page == tl.load(unit_page_ptr + block * UNITS)
    tl.store(block_group_ptr + block, tl.sum(of_first.to(tl.int32), axis=0))


@kernel
def unit_columns(
    source_ptr,
    index_ptr,
    list_ptr,
    count_ptr,
    e_ptr,  # [columns, BLOCK_D]; zeros up to the end of a tile of PADDING
    length_ptr,  # [columns]
    D: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Unit rows of the candidates, and their lengths."""
    column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.load(count_ptr)
    inside = column < count
    position = tl.load(list_ptr + column, mask=inside, other=0)
    e = load_rows(source_ptr, index_ptr, position, inside, D, BLOCK_D, HAS_INDEX).to(tl.float32)
    length = tl.sqrt(tl.sum(e * e, axis=1))
    e = (e * unit_scale(length)[:, None]).to(e_ptr.dtype.element_ty)
    dims = tl.arange(0, BLOCK_D)
    where = column.to(tl.int64)[:, None] * BLOCK_D + dims[None, :]
    tl.store(e_ptr + where, e, mask=(column < tl.cdiv(count, PADDING) * PADDING)[:, None])
    tl.store(length_ptr + column, length, mask=inside)


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
    # The same rounded weights above and below the line: a cosine of weights that are a little different.
    w_dot = w.to(gram.dtype)
    w = w_dot.to(tl.float32)
    t = tl.dot(w_dot, gram, input_precision=PRECISION)
    u = page_sums(w * x, group)
    # No cosine is above 1, whatever was rounded.
    n = tl.maximum(tl.maximum(page_sums(w * t, group), u * u), SMALLEST)
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
    """(max, sum) of 2^t of a block's pages over a part of the candidates, the anchors' own apart."""
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


@triton.jit
def among_page(
    other,
    first,
    last,
    valid,
    own_id,
    anchor_id_ptr,
    MERGED: tl.constexpr,
):
    """Whether anchor `other` of a page is a candidate of another of its anchors: another item, each counted once."""
    has = valid & (other < last)
    id = tl.load(anchor_id_ptr + other, mask=has, other=0)
    counts = has & (id != own_id)
    if MERGED:
        for side in tl.static_range(SIDE):
            earlier = first + side
            again = tl.load(anchor_id_ptr + earlier, mask=has & (earlier < other), other=0) == id
            counts = counts & ((again & (earlier < other)) == 0)
    return counts


@triton.jit
def own_score(
    i,
    valid,
    scale,
    positive_ptr,
    anchor_list_ptr,
    log_q_ptr,
    pv_index_ptr,
    item_count_ptr,
    HAS_LOG_Q: tl.constexpr,
    MERGED: tl.constexpr,
):
    """Score of anchors' items on their own pages in powers of two, and what it is as a candidate: log2 of how often more."""
    score = tl.load(positive_ptr + i.to(tl.int64) * 2, mask=valid, other=0.0) * scale
    row = tl.load(anchor_list_ptr + i, mask=valid, other=0)
    if HAS_LOG_Q:
        score -= tl.load(log_q_ptr + row, mask=valid, other=0.0) * LOG2E
    often = score * 0.0
    if MERGED:
        item = tl.load(pv_index_ptr + row, mask=valid, other=0)
        often = tl.log2(tl.load(item_count_ptr + item, mask=valid, other=1).to(tl.float32))
    return score, score + often


@kernel
def merge_packed(
    pv_offsets_ptr,
    anchor_rank_ptr,
    anchor_list_ptr,
    anchor_page_ptr,
    anchor_id_ptr,
    count_ptr,
    page_place_ptr,
    positive_ptr,
    log_q_ptr,
    pv_index_ptr,
    item_count_ptr,
    packed_top_ptr,  # [packed_parts, units]
    packed_total_ptr,
    top_ptr,  # [capacity]
    total_ptr,
    units,
    packed_parts,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(max, sum) of an anchor of a packed page: of its page's parts, and of the page's other anchors."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < tl.load(count_ptr)
    page = tl.load(anchor_page_ptr + i, mask=valid, other=0)
    place = tl.load(page_place_ptr + page, mask=valid, other=-1)
    valid = valid & (place >= 0)
    scale = score_scale(tau, TAU_IS_TENSOR)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(packed_parts):
        where = part * units.to(tl.int64) + place
        part_top = tl.load(packed_top_ptr + where, mask=valid, other=-float("inf"))
        part_total = tl.load(packed_total_ptr + where, mask=valid, other=0.0)
        top, total = add_in(top, total, part_top, part_total)
    first, last = anchors_of(pv_offsets_ptr, anchor_rank_ptr, page, valid)
    own_id = tl.load(anchor_id_ptr + i, mask=valid, other=0)
    if MASK != MASK_OTHER_PAGES:
        for side in tl.static_range(SIDE):
            other = first + side
            counts = among_page(other, first, last, valid, own_id, anchor_id_ptr, MERGED)
            _score, t = own_score(
                other, counts, scale, positive_ptr, anchor_list_ptr, log_q_ptr, pv_index_ptr, item_count_ptr, HAS_LOG_Q, MERGED
            )  # fmt: skip
            t = tl.where(counts, t, -float("inf"))
            top, total = add_in(top, total, t, tl.where(counts, 1.0, 0.0))
    tl.store(top_ptr + i, top, mask=valid)
    tl.store(total_ptr + i, total, mask=valid)


@kernel
def page_weights(
    pv_offsets_ptr,
    history_offsets_ptr,
    anchor_rank_ptr,
    anchor_list_ptr,
    anchor_page_ptr,
    anchor_id_ptr,
    count_ptr,
    page_place_ptr,
    positive_ptr,
    log_q_ptr,
    pv_index_ptr,
    item_count_ptr,
    lse_ptr,
    miss_ptr,
    g_ptr,
    unit_lse_ptr,  # [units] the smallest of the page's anchors
    unit_weight_ptr,  # [units] sum of g_i 2^(that - lse_i)
    unit_own_ptr,  # [SIDE, units] dL/ds of the anchors' own columns
    units,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    MERGED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the gradient of a page's scores needs: dL/ds_bj = weight 2^(t - lse) of all but its anchors' own columns."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < tl.load(count_ptr)
    page = tl.load(anchor_page_ptr + i, mask=valid, other=0)
    place = tl.load(page_place_ptr + page, mask=valid, other=-1)
    valid = valid & (place >= 0)
    scale = score_scale(tau, TAU_IS_TENSOR)
    first, last = anchors_of(pv_offsets_ptr, anchor_rank_ptr, page, valid)
    own_id = tl.load(anchor_id_ptr + i, mask=valid, other=0)
    _score, t = own_score(
        i, valid, scale, positive_ptr, anchor_list_ptr, log_q_ptr, pv_index_ptr, item_count_ptr, HAS_LOG_Q, MERGED
    )  # fmt: skip
    own = -tl.load(g_ptr + i, mask=valid, other=0.0) * tl.load(miss_ptr + i, mask=valid, other=0.0)
    # The first anchor of an item stands for its column.
    stands = valid
    if MERGED:
        for side in tl.static_range(SIDE):
            earlier = valid & (first + side < i)
            again = tl.load(anchor_id_ptr + first + side, mask=earlier, other=0) == own_id
            stands = stands & ((earlier & again) == 0)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    for side in tl.static_range(SIDE):
        other = first + side
        has = valid & (other < last)
        g = tl.load(g_ptr + other, mask=has, other=0.0)
        lse = tl.load(lse_ptr + other, mask=has, other=0.0)
        lowest = tl.minimum(lowest, tl.where(has & (g != 0.0), lse, float("inf")))
    weight = tl.zeros([BLOCK], tl.float32)
    for side in tl.static_range(SIDE):
        other = first + side
        has = valid & (other < last)
        g = tl.load(g_ptr + other, mask=has, other=0.0)
        lse = tl.load(lse_ptr + other, mask=has, other=0.0)
        # A row without weight has no share, also where its log-sum-exp is over nothing.
        has = has & (g != 0.0)
        weight += tl.where(has, g * tl.exp2(lowest - lse), 0.0)
        id = tl.load(anchor_id_ptr + other, mask=has, other=0)
        if MASK != MASK_OTHER_PAGES:
            own += tl.where(has & stands & (id != own_id), g * tl.exp2(t - lse), 0.0)
    begin = tl.load(history_offsets_ptr + page, mask=valid, other=0)
    end = tl.load(history_offsets_ptr + page + 1, mask=valid, other=0)
    size = exponent_of(end - begin)
    side_of = i - first
    for unit in tl.static_range(UNITS):
        is_first = valid & ((unit >> size) == 0) & (side_of == 0)
        tl.store(unit_lse_ptr + place + unit, lowest, mask=is_first)
        tl.store(unit_weight_ptr + place + unit, weight, mask=is_first)
        tl.store(
            unit_own_ptr + side_of * units + place + unit, own, mask=valid & ((unit >> size) == 0)
        )


@triton.jit
def pair_gradients(
    u,
    root,
    column,
    inside,
    block,
    unit,
    scale,
    block_most_ptr,
    unit_page_ptr,
    unit_poison_ptr,
    unit_column_ptr,
    unit_own_ptr,
    unit_lse_ptr,
    unit_weight_ptr,
    column_page_ptr,
    column_bias_ptr,
    units,
    MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """dL/ds [BLOCK_M, UNITS] of each unit's page."""
    page = tl.load(unit_page_ptr + unit)
    # Without a page nothing was written.
    lse = tl.load(unit_lse_ptr + unit, mask=page >= 0, other=float("inf"))
    weight = tl.load(unit_weight_ptr + unit, mask=page >= 0, other=0.0)
    most = tl.load(block_most_ptr + block)
    t = u * root * scale - (lse - tl.load(unit_poison_ptr + unit))[None, :]
    if HAS_BIAS:
        t += tl.load(column_bias_ptr + column, mask=inside, other=0.0)[:, None]
    g = exp2_flushed(t) * weight[None, :]
    counts = inside[:, None]
    if MASK == MASK_OTHER_PAGES:
        column_page = tl.load(column_page_ptr + column, mask=inside, other=-2)
        counts = counts & (column_page[:, None] != page[None, :])
    g = tl.where(counts, g, 0.0)
    here = own_columns(unit_column_ptr, units, unit, column, 0)
    own = tl.load(unit_own_ptr + unit)
    g = tl.where(here, own[None, :], g)
    if most > 1:
        for side in tl.static_range(1, SIDE):
            again = own_columns(unit_column_ptr, units, unit, column, side)
            own = tl.load(unit_own_ptr + side * units + unit)
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
    """dL/de of a tile of candidates: half a block a step; then, in a launch of their own, the blocks of one large page."""
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
        g = pair_gradients(
            u,
            root,
            column,
            inside,
            block,
            unit,
            scale,
            block_most_ptr,
            unit_page_ptr,
            unit_poison_ptr,
            unit_column_ptr,
            unit_own_ptr,
            unit_lse_ptr,
            unit_weight_ptr,
            column_page_ptr,
            column_bias_ptr,
            units,
            MASK,
            HAS_BIAS,
        )
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
    de_ptr,  # [N or n, D], rows at their places; holds what the pages that did not fit gave, if there are any
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
    for start in range(0, count, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        e = tl.load(e_ptr + column.to(tl.int64)[:, None] * BLOCK_D + dims[None, :])
        x = tl.dot(e, tl.trans(c), input_precision=PRECISION)
        w, t, u, root = attend_block(x, slot_log, gram, group, sharpness, PRECISION)
        g = pair_gradients(
            u,
            root,
            column,
            column < count,
            block,
            unit,
            scale,
            block_most_ptr,
            unit_page_ptr,
            unit_poison_ptr,
            unit_column_ptr,
            unit_own_ptr,
            unit_lse_ptr,
            unit_weight_ptr,
            column_page_ptr,
            column_bias_ptr,
            units,
            MASK,
            HAS_BIAS,
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
        d_c = normalize_backward(acc, wide, length)
        total = tl.sum(tl.sum(along, axis=0), axis=0)
        d_c += (total * unit_scale(length))[:, None] * wide
        row = tl.load(slot_row_ptr + slot)
        where = row.to(tl.int64)[:, None] * D + dims[None, :]
        mask = (row >= 0)[:, None] & (dims < D)[None, :]
        tl.store(dc_ptr + where, d_c.to(dc_ptr.dtype.element_ty), mask=mask)
