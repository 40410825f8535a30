"""Triton: attention for each candidate where nothing but products of E and C is needed: one head,
by dot products or by cosines, E and C themselves as query, key and value.

Rows e_j, c_k are E and C; by cosines they are these of unit length, and the length of C_k is part
of its weight. The softmax's denominator cancels, up to any shift of a page's logits. With an
attention scale c, and h_j = |E_j| (1 by cosines):

    x_k = e_j . c_k,   l_k = c x_k [+ log |C_k|],   w_k = exp(l_k - max l),   G = C C^T (c c^T),
    u = sum_k w_k x_k,   n = w^T G w,   s = cos / tau,   cos = u / (h_j sqrt n)

A bin is UNITS units of SPAN history rows; pages whose histories need as many units, a power of
two, share bins. A page has an entry there for each SIDE of its anchors; where ids say which items
are one, for each anchor, as its candidates are its own. A tile of candidates times a bin is two
products (x and t = w G); maxima and sums over an entry are those over neighbouring columns. With
g = dL/ds, A = g / (tau h_j sqrt n), a = u / n and y_k = A w_k (x_k - a t_k):

    dL/dx_k = A w_k + c y_k,   M_kl = sum_j A a w_k w_l,
    dL/dC_k = sum_j dL/dx_k E_j - sum_l M_kl C_l,
    dL/dE_j = sum_bk dL/dx_k C_k - (sum_b g s) E_j / |E_j|^2

By cosines dL/dC and dL/dE are those of c and e so far (without the last term), and
dL/dlog |C_k| = sum_j y_k. dL/dx of a chunk of candidates is stored, rounded once, and both
gradients are plain products with it.

Pages whose histories do not fit into a bin, and those of several entries if there is no room for
all of these, are left to kernels.py.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....loss.problem import Problem
from .. import tiles
from ..common import (
    LN2,
    exp2_flushed,
    kernel,
    rsqrt_flushed,
    score_scale,
    temperature,
    unit_scale,
)
from ..masks import MASK_OTHER_PAGES, MASKS
from ..shapes import cdiv
from .bins import LOWEST, ROWS, merge, weigh
from .pages import Pages, page_size, placed_of
from .state import PADDING, SIDE, SLOTS, SPAN, UNITS, Bins, CandidateShape, CandidateState

# Of n, where the page's largest weight is 1: a reconstruction of length 0 (NORM_EPS, squared).
SMALLEST = tl.constexpr(1e-24)


@triton.jit
def combined(x, MAXIMUM: tl.constexpr):
    """Sums over the last axis, or maxima."""
    last: tl.constexpr = len(x.shape) - 1
    if MAXIMUM:
        return tl.max(x, axis=last)
    else:
        return tl.sum(x, axis=last)


@triton.jit
def units_together(x, TOGETHER: tl.constexpr, MAXIMUM: tl.constexpr):
    """Each unit's number replaced by the sum of so many neighbours', or the maximum
    [BLOCK_M, units]."""
    rows: tl.constexpr = x.shape[0]
    groups: tl.constexpr = x.shape[1] // TOGETHER
    found = combined(tl.reshape(x, (rows, groups, TOGETHER)), MAXIMUM)
    each = tl.broadcast_to(tl.expand_dims(found, 2), (rows, groups, TOGETHER))
    return tl.reshape(each, (rows, x.shape[1]))


@triton.jit
def over_page(x, group, MAXIMUM: tl.constexpr):
    """Sums over each unit's page, or maxima, [BLOCK_M, slots] -> [BLOCK_M, units]."""
    units: tl.constexpr = x.shape[1] // SPAN
    found = combined(tl.reshape(x, (x.shape[0], units, SPAN)), MAXIMUM)
    if group > 1:
        if group == 2:
            found = units_together(found, 2, MAXIMUM)
        elif group == 4:
            found = units_together(found, 4, MAXIMUM)
        elif group == 8:
            found = units_together(found, 8, MAXIMUM)
        elif units == UNITS:
            found = units_together(found, UNITS, MAXIMUM)
    return found


@triton.jit
def to_slots(x):
    """[BLOCK_M, units] -> [BLOCK_M, slots], each unit's number in all of its slots."""
    each = tl.broadcast_to(tl.expand_dims(x, 2), (x.shape[0], x.shape[1], SPAN))
    return tl.reshape(each, (x.shape[0], x.shape[1] * SPAN))


class Packed(NamedTuple):
    """Candidates and bins, and each unit's page (state.py)."""

    e: Any
    e_inverse: Any
    c: Any
    gram: Any
    slot_log: Any
    bin_group: Any
    bin_most: Any
    unit_page: Any
    unit_poison: Any
    unit_column: Any
    unit_id: Any  # [units], None where every column is an item of its own
    column_id: Any  # [columns], or None
    column_page: Any  # [columns]
    column_bias: Any  # [columns], or None


class How(NamedTuple):
    """Constants of a pass over candidates times bins."""

    COSINE: Any
    TAU_IS_TENSOR: Any
    MASK: Any
    BLOCK_M: Any
    BLOCK_D: Any
    BLOCK_K: Any  # dimensions of a product at a time
    PRECISION: Any


class Bin(NamedTuple):
    """A bin, loaded."""

    c: Any  # [SLOTS, BLOCK_D]; nothing where rows are longer than BLOCK_K
    gram: Any  # [SLOTS, SLOTS]
    slot_log: Any  # [SLOTS]
    unit: Any  # [UNITS]
    poison: Any  # [UNITS]
    page: Any  # [UNITS]
    group: Any
    most: Any
    low: Any  # range of its anchors' columns
    high: Any


@triton.jit
def rows_of(ptr, row, first, STRIDE: tl.constexpr, WIDTH: tl.constexpr):
    """Rows [rows, WIDTH] from dimension `first` on."""
    dims = first + tl.arange(0, WIDTH)
    return tl.load(ptr + row.to(tl.int64)[:, None] * STRIDE + dims[None, :])


@triton.jit
def load_bin(packed, bin, units, how: tl.constexpr):
    slot = bin * SLOTS + tl.arange(0, SLOTS)
    unit = bin * UNITS + tl.arange(0, UNITS)
    c = tl.full([], 0, tl.int32)
    if how.BLOCK_K == how.BLOCK_D:
        c = rows_of(packed.c, slot, 0, how.BLOCK_D, how.BLOCK_D)
    low = tl.full([], 2147483647, tl.int32)
    high = tl.full([], -1, tl.int32)
    for side in tl.static_range(SIDE):
        column = tl.load(packed.unit_column + side * units + unit)
        low = tl.minimum(low, tl.min(tl.where(column < 0, 2147483647, column), axis=0))
        high = tl.maximum(high, tl.max(column, axis=0))
    return Bin(
        c,
        rows_of(packed.gram, slot, 0, SLOTS, SLOTS),
        tl.load(packed.slot_log + slot),
        unit,
        tl.load(packed.unit_poison + unit),
        tl.load(packed.unit_page + unit),
        tl.load(packed.bin_group + bin),
        tl.load(packed.bin_most + bin),
        low,
        high,
    )


@triton.jit
def products(packed, bin, c, start, how: tl.constexpr):
    """x [BLOCK_M, SLOTS] of a tile of candidates and a bin."""
    precision: tl.constexpr = how.PRECISION
    if how.BLOCK_K == how.BLOCK_D:
        # One address of 64 bits, and offsets of 32: others would take 32 registers.
        place = (
            tl.arange(0, how.BLOCK_M)[:, None] * how.BLOCK_D + tl.arange(0, how.BLOCK_D)[None, :]
        )
        e = tl.load(packed.e + start.to(tl.int64) * how.BLOCK_D + place)
        return tl.dot(e, tl.trans(c), input_precision=precision)
    else:
        column = start + tl.arange(0, how.BLOCK_M)
        slot = bin * SLOTS + tl.arange(0, SLOTS)
        x = tl.full([how.BLOCK_M, SLOTS], 0.0, tl.float32)
        for first in range(0, how.BLOCK_D, how.BLOCK_K):
            e = rows_of(packed.e, column, first, how.BLOCK_D, how.BLOCK_K)
            c_part = rows_of(packed.c, slot, first, how.BLOCK_D, how.BLOCK_K)
            x = tl.dot(e, tl.trans(c_part), x, input_precision=precision)
        return x


@triton.jit
def attend_bin(x, b, sharpness, PRECISION: tl.constexpr):
    """w, t = w G [BLOCK_M, slots]; and u, n [BLOCK_M, units] of each unit's page."""
    logit = x * sharpness + b.slot_log[None, :]
    w = exp2_flushed(logit - to_slots(over_page(logit, b.group, True)))
    if b.gram.dtype == tl.bfloat16:
        # The same short weights above and below the line: a cosine of weights that are a little
        # different. Cut off, not rounded: a factor that they have in common changes nothing.
        w = (w.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
    t = tl.dot(w.to(b.gram.dtype), b.gram, input_precision=PRECISION)
    return w, t, over_page(w * x, b.group, False), over_page(w * t, b.group, False)


@triton.jit
def e_factor(packed, column, how: tl.constexpr):
    """1 / h [BLOCK_M], 0 past the last candidate."""
    if how.COSINE:
        return tl.full([how.BLOCK_M], 1.0, tl.float32)
    else:
        return tl.load(packed.e_inverse + column)


@triton.jit
def has_own(b, start, BLOCK_M: tl.constexpr):
    """Whether a tile of candidates may hold items of the bin's anchors: a branch that all threads
    take alike, and seldom."""
    return (b.high >= start) & (b.low < start + BLOCK_M)


@triton.jit
def own_columns(packed, units, b, column, side):
    """Which columns [BLOCK_M] are that of each unit's anchor number `side` [UNITS]."""
    return column[:, None] == tl.load(packed.unit_column + side * units + b.unit)[None, :]


@triton.jit
def of_own_page(packed, b, column, inside):
    """Which candidates are on each unit's page [BLOCK_M, UNITS]."""
    page = tl.load(packed.column_page + column, mask=inside, other=-2)
    return page[:, None] == b.page[None, :]


@triton.jit
def of_own_item(packed, b, column, inside):
    """Which candidates are the item of each unit's anchor [BLOCK_M, UNITS]."""
    id = tl.load(packed.column_id + column, mask=inside, other=0)
    return id[:, None] == tl.load(packed.unit_id + b.unit, mask=b.page >= 0, other=0)[None, :]


@kernel
def binned_scores(
    packed,  # Packed
    column_count_ptr,
    bin_count_ptr,
    top_ptr,  # [parts, units]
    total_ptr,
    units,
    parts,
    sharpness,  # c log2(e)
    tau,
    how: tl.constexpr,
):
    """(max, sum) of 2^t of a bin's pages over part of the candidates, the anchors' own apart."""
    bin = tl.program_id(0)
    part = tl.program_id(1)
    if bin >= tl.load(bin_count_ptr):
        return
    precision: tl.constexpr = how.PRECISION
    BLOCK_M: tl.constexpr = how.BLOCK_M
    b = load_bin(packed, bin, units, how)
    scale = score_scale(tau, how.TAU_IS_TENSOR)
    count = tl.load(column_count_ptr)
    top = tl.full([BLOCK_M, UNITS], LOWEST, tl.float32)
    total = tl.full([BLOCK_M, UNITS], 0.0, tl.float32)
    share = tl.cdiv(tl.cdiv(count, BLOCK_M), parts) * BLOCK_M
    begin = part * share
    for ahead in range(0, tl.minimum(share, count - begin), BLOCK_M):
        start = begin + ahead
        column = start + tl.arange(0, BLOCK_M)
        x = products(packed, bin, b.c, start, how)
        inverse = e_factor(packed, column, how)
        _w, _t, u, n = attend_bin(x, b, sharpness, precision)
        t = u * rsqrt_flushed(tl.maximum(n, SMALLEST)) * (inverse * scale)[:, None]
        # No cosine is above 1, whatever was rounded.
        t = tl.minimum(t, scale, propagate_nan=tl.PropagateNan.ALL)
        if packed.column_bias is not None:
            t += tl.load(packed.column_bias + column, mask=column < count, other=0.0)[:, None]
        if has_own(b, start, BLOCK_M) | (start + BLOCK_M > count):
            left_out = (column >= count)[:, None] | own_columns(packed, units, b, column, 0)
            if b.most > 1:
                for side in tl.static_range(1, SIDE):
                    left_out = left_out | own_columns(packed, units, b, column, side)
            t = tl.where(left_out, -float("inf"), t)
        if packed.unit_id is not None:
            t = tl.where(of_own_item(packed, b, column, column < count), -float("inf"), t)
        if how.MASK == MASK_OTHER_PAGES:
            t = tl.where(of_own_page(packed, b, column, column < count), -float("inf"), t)
        new_top = tl.maximum(top, t)
        total = total * exp2_flushed(top - new_top) + exp2_flushed(t - new_top)
        top = new_top
    highest = tl.max(top, axis=0)
    total = tl.sum(total * tl.exp2(top - highest[None, :]), axis=0)
    where = part.to(tl.int64) * units + b.unit
    tl.store(top_ptr + where, tl.where(highest == LOWEST, -float("inf"), highest))
    tl.store(total_ptr + where, total + b.poison)


class PageGradients(NamedTuple):
    """What the gradients of the scores need of each unit's page; SIDE times as many where anchors
    are told apart."""

    lse: Any  # [units]
    weight: Any  # [units]
    own: Any  # [SIDE, units]


@triton.jit
def pair_gradients(t, start, packed, pages, b, units, count, how: tl.constexpr):
    """dL/dt [BLOCK_M, UNITS] of each unit's page. Past the last candidate it may be anything
    finite: what is made of it has a factor of 0."""
    column = start + tl.arange(0, how.BLOCK_M)
    # Without a page nothing was written.
    lse = tl.load(pages.lse + b.unit, mask=b.page >= 0, other=float("inf"))
    weight = tl.load(pages.weight + b.unit, mask=b.page >= 0, other=0.0) * LN2
    t -= (lse - b.poison)[None, :]
    if packed.column_bias is not None:
        t += tl.load(packed.column_bias + column, mask=column < count, other=0.0)[:, None]
    g = exp2_flushed(t) * weight[None, :]
    if packed.unit_id is not None:
        g = tl.where(of_own_item(packed, b, column, column < count), 0.0, g)
    if how.MASK == MASK_OTHER_PAGES:
        g = tl.where(of_own_page(packed, b, column, column < count), 0.0, g)
    if has_own(b, start, how.BLOCK_M):
        here = own_columns(packed, units, b, column, 0)
        g = tl.where(here, tl.load(pages.own + b.unit)[None, :] * LN2, g)
        if b.most > 1:
            for side in tl.static_range(1, SIDE):
                again = own_columns(packed, units, b, column, side)
                own = tl.load(pages.own + side * units + b.unit) * LN2
                # Anchors of one item have one column.
                g = tl.where(again, tl.where(here, g, 0.0) + own[None, :], g)
                here = here | again
    return g


class Chunk(NamedTuple):
    """Candidates whose dL/dx is stored: first, one past the last, and room for how many."""

    first: Any
    last: Any
    rows: Any


@triton.jit
def chunk_of(chunk, elements, column_count_ptr, bin_count_ptr):
    """As many candidates as there is room for beside the bins that there are."""
    count = tl.load(column_count_ptr)
    bins = tl.maximum(tl.load(bin_count_ptr), 1)
    room = elements.to(tl.int64) // (bins.to(tl.int64) * SLOTS)
    room = tl.minimum(room, tl.cdiv(count, PADDING) * PADDING) // PADDING * PADDING
    first = tl.minimum(chunk * room, count)
    last = tl.minimum(first + room, count)
    return Chunk(first.to(tl.int32), last.to(tl.int32), room.to(tl.int32))


@kernel
def binned_gradients(
    packed,  # Packed
    pages,  # PageGradients
    column_count_ptr,
    bin_count_ptr,
    dx_ptr,  # [bins, rows of a chunk, SLOTS]
    pairs_ptr,  # [parts, bins * SLOTS, SLOTS] M of a bin's rows
    along_ptr,  # [parts, bins * SLOTS] dL/dlog |C|; by cosines
    score_ptr,  # [bins, rows of a chunk] sum of g s of a bin's pages
    units,
    parts,
    chunk,
    elements,
    sharpness,
    tau,
    how: tl.constexpr,
):
    """dL/dx of a bin's history and a chunk of candidates, and what else is a sum over them."""
    bin = tl.program_id(0)
    part = tl.program_id(1)
    if bin >= tl.load(bin_count_ptr):
        return
    mine = chunk_of(chunk, elements, column_count_ptr, bin_count_ptr)
    if mine.first >= mine.last:
        return
    precision: tl.constexpr = how.PRECISION
    BLOCK_M: tl.constexpr = how.BLOCK_M
    dot_type: tl.constexpr = dx_ptr.dtype.element_ty
    b = load_bin(packed, bin, units, how)
    once = 1.0 / b.group  # a page has its score in each of its units
    scale = score_scale(tau, how.TAU_IS_TENSOR)
    count = tl.load(column_count_ptr)
    place = tl.arange(0, SLOTS)
    slot = part.to(tl.int64) * units * SPAN + bin * SLOTS + place
    pairs_at = pairs_ptr + slot[:, None] * SLOTS + place[None, :]
    pairs = tl.full([SLOTS, SLOTS], 0.0, tl.float32)
    if chunk > 0:
        pairs = tl.load(pairs_at)
    along = tl.full([BLOCK_M // 16, 8, SLOTS], 0.0, tl.float32)
    share = tl.cdiv(tl.cdiv(mine.last - mine.first, BLOCK_M), parts) * BLOCK_M
    begin = mine.first + part * share
    for ahead in range(0, tl.minimum(share, mine.last - begin), BLOCK_M):
        start = begin + ahead
        column = start + tl.arange(0, BLOCK_M)
        x = products(packed, bin, b.c, start, how)
        inverse = e_factor(packed, column, how)
        w, t, u, n = attend_bin(x, b, sharpness, precision)
        # A reconstruction of length 0: no cosine, no gradient.
        root = rsqrt_flushed(tl.where(n < SMALLEST, float("inf"), n))
        # Before the scores' gradients: then x and t are done with.
        slope = to_slots(u * root * root)
        y = x - slope * t
        if dot_type == tl.float32:
            # sum_k w_k y_k is 0: what is left of it is the rounding of a.
            y -= to_slots(over_page(w * y, b.group, False) * root * root) * t
        per_u = root * (inverse * scale)[:, None]
        t = tl.minimum(u * per_u, scale, propagate_nan=tl.PropagateNan.ALL)
        g = pair_gradients(t, start, packed, pages, b, units, count, how)
        row = bin * mine.rows.to(tl.int64) + column - mine.first
        w_dot = w.to(dot_type)
        factor = g * per_u
        tl.store(score_ptr + row, tl.sum(factor * u, axis=1) * once)
        w = to_slots(factor) * w
        pairs = tl.dot(tl.trans((w * slope).to(dot_type)), w_dot, pairs, input_precision=precision)
        y = w * y
        if how.COSINE:
            # Rows that a thread holds both of.
            along += tl.sum(tl.reshape(y, (BLOCK_M // 16, 2, 8, SLOTS)), axis=1)
        dx = (w + y * (sharpness * LN2)).to(dot_type)
        tl.store(dx_ptr + row[:, None] * SLOTS + place[None, :], dx)
    tl.store(pairs_at, pairs)
    if how.COSINE:
        total = tl.sum(tl.sum(along, axis=0), axis=0)
        if chunk > 0:
            total += tl.load(along_ptr + slot)
        tl.store(along_ptr + slot, total)


class Products(NamedTuple):
    """Constants of the products with dL/dx: BLOCK_M candidates, BLOCK_N dimensions."""

    COSINE: Any
    D: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_D: Any
    PRECISION: Any


@triton.jit
def division(mine, programs, BLOCK_M: tl.constexpr):
    """Tiles of a chunk's candidates, and parts of each over the bins."""
    count = tl.cdiv(mine.last - mine.first, BLOCK_M)
    return count, tl.maximum(programs // tl.maximum(count, 1), 1)


@kernel
def binned_columns(
    dx_ptr,
    score_ptr,
    c_ptr,
    column_count_ptr,
    bin_count_ptr,
    sum_ptr,  # [programs * BLOCK_M, BLOCK_D] float32
    score_sum_ptr,  # [programs * BLOCK_M]
    chunk,
    elements,
    programs,
    how: tl.constexpr,
):
    """sum over some of the bins of dL/dx C and of g s, of a tile of a chunk's candidates."""
    mine = chunk_of(chunk, elements, column_count_ptr, bin_count_ptr)
    count, parts = division(mine, programs, how.BLOCK_M)
    slot = tl.program_id(0)
    if slot >= count * parts:
        return
    tile = slot // parts
    part = slot - tile * parts
    first = tl.program_id(1) * how.BLOCK_N
    precision: tl.constexpr = how.PRECISION
    bins = tl.load(bin_count_ptr)
    share = tl.cdiv(bins, parts)
    place = tl.arange(0, SLOTS)
    row = tile * how.BLOCK_M + tl.arange(0, how.BLOCK_M)
    acc = tl.full([how.BLOCK_M, how.BLOCK_N], 0.0, tl.float32)
    scores = tl.full([how.BLOCK_M], 0.0, tl.float32)
    for bin in range(part * share, tl.minimum(part * share + share, bins)):
        at = bin * mine.rows.to(tl.int64) + row
        dx = tl.load(dx_ptr + at[:, None] * SLOTS + place[None, :])
        c = rows_of(c_ptr, place + bin * SLOTS, first, how.BLOCK_D, how.BLOCK_N)
        acc = tl.dot(dx, c.to(dx.dtype), acc, input_precision=precision)
        scores += tl.load(score_ptr + at)
    out = slot.to(tl.int64) * how.BLOCK_M + tl.arange(0, how.BLOCK_M)
    dims = first + tl.arange(0, how.BLOCK_N)
    tl.store(sum_ptr + out[:, None] * how.BLOCK_D + dims[None, :], acc)
    tl.store(score_sum_ptr + out, scores)


@triton.jit
def sum_of_parts(sum_ptr, row, inside, parts, first, how: tl.constexpr):
    """Sums over the parts of some candidates of a chunk, BLOCK_N dimensions from `first` on."""
    at = row // how.BLOCK_M * parts * how.BLOCK_M + row % how.BLOCK_M
    dims = first + tl.arange(0, how.BLOCK_N)
    total = tl.full([row.shape[0], how.BLOCK_N], 0.0, tl.float32)
    for part in range(parts):
        where = (at + part * how.BLOCK_M).to(tl.int64)[:, None] * how.BLOCK_D + dims[None, :]
        total += tl.load(sum_ptr + where, mask=inside[:, None], other=0.0)
    return total


@kernel
def finish_columns(
    sum_ptr,
    score_sum_ptr,
    e_ptr,
    e_inverse_ptr,
    column_list_ptr,
    column_count_ptr,
    bin_count_ptr,
    # [N or n, D], rows at their places; holds what pages that did not fit gave, if there are any
    de_ptr,
    score_gradient_ptr,  # [columns] sum of g s
    chunk,
    elements,
    programs,
    BLOCK_R: tl.constexpr,
    how: tl.constexpr,
):
    """dL/dE of a chunk's candidates from the parts of their sums."""
    mine = chunk_of(chunk, elements, column_count_ptr, bin_count_ptr)
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    if mine.first + tl.program_id(0) * BLOCK_R >= mine.last:
        return
    column = mine.first + row
    inside = column < mine.last
    _count, parts = division(mine, programs, how.BLOCK_M)
    at = row // how.BLOCK_M * parts * how.BLOCK_M + row % how.BLOCK_M
    scores = tl.zeros([BLOCK_R], tl.float32)
    for part in range(parts):
        scores += tl.load(score_sum_ptr + at + part * how.BLOCK_M, mask=inside, other=0.0)
    tl.store(score_gradient_ptr + column, scores, mask=inside)
    if de_ptr is None:
        return
    inverse = tl.load(e_inverse_ptr + column, mask=inside, other=0.0)
    # dL/dE = factor (sum - along E)
    along = scores * inverse * inverse
    factor = inverse
    if how.COSINE:
        along = tl.zeros([BLOCK_R], tl.float32)
        for first in range(0, how.BLOCK_D, how.BLOCK_N):
            e = rows_of(e_ptr, column, first, how.BLOCK_D, how.BLOCK_N).to(tl.float32)
            along += tl.sum(sum_of_parts(sum_ptr, row, inside, parts, first, how) * e, axis=1)
    else:
        factor = inverse * 0.0 + 1.0
    position = tl.load(column_list_ptr + column, mask=inside, other=0)
    long = tl.load(bin_count_ptr + 1) > 0
    for first in range(0, how.BLOCK_D, how.BLOCK_N):
        dims = first + tl.arange(0, how.BLOCK_N)
        e = rows_of(e_ptr, column, first, how.BLOCK_D, how.BLOCK_N).to(tl.float32)
        grad = sum_of_parts(sum_ptr, row, inside, parts, first, how)
        grad = (grad - along[:, None] * e) * factor[:, None]
        where = position.to(tl.int64)[:, None] * how.D + dims[None, :]
        mask = inside[:, None] & (dims < how.D)[None, :]
        if long:
            grad += tl.load(de_ptr + where, mask=mask, other=0.0).to(tl.float32)
        tl.store(de_ptr + where, grad.to(de_ptr.dtype.element_ty), mask=mask)


@kernel
def binned_history(
    dx_ptr,
    e_ptr,
    column_count_ptr,
    bin_count_ptr,
    sum_ptr,  # [bins * SLOTS, BLOCK_D] float32
    chunk,
    elements,
    BLOCK_S: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum of dL/dx E over a chunk of candidates, added to that of the chunks before."""
    slots = tl.load(bin_count_ptr) * SLOTS
    if tl.program_id(0) * BLOCK_S >= slots:
        return
    mine = chunk_of(chunk, elements, column_count_ptr, bin_count_ptr)
    if (mine.first >= mine.last) & (chunk > 0):
        return
    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    first = tl.program_id(1) * BLOCK_N
    dims = first + tl.arange(0, BLOCK_N)
    inside = (slot < slots)[:, None]
    where = slot.to(tl.int64)[:, None] * BLOCK_D + dims[None, :]
    acc = tl.zeros([BLOCK_S, BLOCK_N], tl.float32)
    if chunk > 0:
        acc += tl.load(sum_ptr + where, mask=inside, other=0.0)
    # Addresses as in `products`. Past the last bin it is read again, for nothing.
    row = tl.arange(0, BLOCK_M)
    bin = tl.program_id(0) * (BLOCK_S // SLOTS)
    real = tl.minimum(slot, slots - 1) - bin * SLOTS
    at = row[:, None] * SLOTS + (real // SLOTS * mine.rows * SLOTS + real % SLOTS)[None, :]
    dx_at = dx_ptr + bin * mine.rows.to(tl.int64) * SLOTS
    e_at = e_ptr + mine.first.to(tl.int64) * BLOCK_D + first
    of_e = row[:, None] * BLOCK_D + tl.arange(0, BLOCK_N)[None, :]
    for _ in range(0, mine.last - mine.first, BLOCK_M):
        dx = tl.load(dx_at + at)
        acc = tl.dot(
            tl.trans(dx), tl.load(e_at + of_e).to(dx.dtype), acc, input_precision=PRECISION
        )
        dx_at += BLOCK_M * SLOTS
        e_at += BLOCK_M * BLOCK_D
    tl.store(sum_ptr + where, acc, mask=inside)


@triton.jit
def history_part(sum_ptr, pairs, c_ptr, slot, entries, ahead, first, how: tl.constexpr):
    """C and dL/dC, but for their lengths, BLOCK_N dimensions from `first` on, of slots of which so
    many `entries` have the same rows, `ahead` slots from one to the next."""
    precision: tl.constexpr = how.PRECISION
    c = rows_of(c_ptr, slot, first, how.BLOCK_D, how.BLOCK_N)
    grad = rows_of(sum_ptr, slot, first, how.BLOCK_D, how.BLOCK_N)
    dims = first + tl.arange(0, how.BLOCK_N)
    for number in range(1, tl.max(entries, axis=0)):
        again = (slot + number * ahead).to(tl.int64)[:, None] * how.BLOCK_D + dims[None, :]
        grad += tl.load(sum_ptr + again, mask=(number < entries)[:, None], other=0.0)
    grad -= tl.dot(pairs, c.to(pairs.dtype), input_precision=precision)
    return c.to(tl.float32), grad


@kernel
def finish_history(
    sum_ptr,
    pairs_ptr,
    along_ptr,
    c_ptr,
    slot_length_ptr,
    slot_row_ptr,
    pages,  # Pages
    placed,  # Placed
    dc_ptr,  # [K, D]
    units,
    parts,
    DOT_TYPE: tl.constexpr,
    how: tl.constexpr,
):
    """dL/dC of a bin's history from the sums; entries of a page are added to its first."""
    bin = tl.program_id(0)
    if bin >= tl.load(placed.bin_count):
        return
    place = tl.arange(0, SLOTS)
    slot = bin * SLOTS + place
    page = tl.load(placed.unit_page + slot // SPAN)
    entry = tl.load(placed.unit_entry + slot // SPAN, mask=page >= 0, other=-1)
    stands = (page >= 0) & (entry == tl.load(placed.page_place + page, mask=page >= 0, other=-1))
    entries = tl.load(placed.page_entries + page, mask=stands, other=0)
    ahead = SPAN << page_size(pages, page, stands)
    pairs = tl.zeros([SLOTS, SLOTS], tl.float32)
    along = tl.zeros([SLOTS], tl.float32)
    same = stands[:, None] & (entry[:, None] == entry[None, :])
    for number in range(tl.max(entries, axis=0)):
        again = slot + number * ahead  # the same rows in another entry
        mine = number < entries
        for part in range(parts):
            at = part * units.to(tl.int64) * SPAN + again
            other = (again % SLOTS)[None, :]
            pairs += tl.load(
                pairs_ptr + at[:, None] * SLOTS + other, mask=same & mine[:, None], other=0.0
            )
            if how.COSINE:
                along += tl.load(along_ptr + at, mask=mine, other=0.0)
    pairs = pairs.to(DOT_TYPE)
    # dL/dC = factor (sum + along C)
    factor = tl.full([SLOTS], 1.0, tl.float32)
    if how.COSINE:
        length = tl.abs(tl.load(slot_length_ptr + slot))
        factor = unit_scale(length)
        for first in range(0, how.BLOCK_D, how.BLOCK_N):
            c, grad = history_part(sum_ptr, pairs, c_ptr, slot, entries, ahead, first, how)
            along -= tl.sum(grad * c, axis=1)
    row = tl.load(slot_row_ptr + slot, mask=stands, other=-1)
    for first in range(0, how.BLOCK_D, how.BLOCK_N):
        dims = first + tl.arange(0, how.BLOCK_N)
        c, grad = history_part(sum_ptr, pairs, c_ptr, slot, entries, ahead, first, how)
        if how.COSINE:
            grad = (grad + along[:, None] * c) * factor[:, None]
        where = row.to(tl.int64)[:, None] * how.D + dims[None, :]
        mask = (row >= 0)[:, None] & (dims < how.D)[None, :]
        tl.store(dc_ptr + where, grad.to(dc_ptr.dtype.element_ty), mask=mask)


# ---- launches ------------------------------------------------------------------------------------


def _pass(p: Problem, s: CandidateShape, t: CandidateState, b: Bins, kind: str) -> dict[str, Any]:
    """What the passes over candidates times bins have in common."""
    tile = tiles.binned_tile(kind, s.dtype, s.block_d, s.device)
    tau = temperature(p)
    return {
        "packed": Packed(
            b.e,
            b.e_inverse,
            b.c,
            b.gram,
            b.slot_log,
            b.bin_group,
            b.bin_most,
            b.unit_page,
            b.unit_poison,
            b.unit_column,
            b.unit_id,
            t.column.id if s.identified else None,
            t.column.page,
            t.column.bias,
        ),
        "column_count_ptr": t.counts[2:3],
        "bin_count_ptr": b.bin_count,
        "units": s.units,
        "parts": parts_of_candidates(s),
        "sharpness": p.attention_scale / math.log(2.0),
        "tau": tau["tau"],
        "how": How(
            p.cosine,
            tau["TAU_IS_TENSOR"],
            MASKS[p.negatives],
            tile.block_m,
            s.block_d,
            tile.block_k,
            s.precision,
        ),
        **tile.launch,
    }


def parts_of_candidates(s: CandidateShape) -> int:
    """Into how many the candidates are divided, where there may be few bins."""
    return max(1, min(16, tiles.programs(s.device) * 4 // max(s.bins, 1)))


def scores(
    p: Problem, s: CandidateShape, t: CandidateState, b: Bins, top: Tensor, total: Tensor
) -> None:
    """Log-sum-exps of the anchors in bins over everything but their positives, to the first
    rows of top and total."""
    bin_top, bin_total = torch.empty(
        2, parts_of_candidates(s), s.units, dtype=torch.float32, device=s.device
    )
    binned_scores[(s.bins, parts_of_candidates(s))](
        **_pass(p, s, t, b, "scores"), top_ptr=bin_top, total_ptr=bin_total
    )
    merge(p, s, t, b, (bin_top, bin_total), top, total)


def backward(
    p: Problem,
    s: CandidateShape,
    t: CandidateState,
    b: Bins,
    g: Tensor,
    d_e: Tensor | None,
    d_c: Tensor | None,
    want_tau: bool,
) -> list[Tensor]:
    """Adds to dL/dE and dL/dC; parts of sum of g cos."""

    def floats(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=s.device)

    both = _pass(p, s, t, b, "gradients")
    tile = tiles.binned_tile("gradients", s.dtype, s.block_d, s.device)
    product = tiles.binned_products(s.dtype, s.block_d, s.device)
    candidates, parts = b.e.shape[0], both["parts"]
    chunks, elements, dx = stored_gradients(p, s, candidates)
    score = floats(dx.numel() // SLOTS.value)
    pairs, along = floats(parts, s.bin_slots, SLOTS.value), floats(parts, s.bin_slots)
    sum_c = floats(s.bin_slots, s.block_d) if d_c is not None else None
    programs = tiles.programs(s.device)
    rows = max(programs, cdiv(candidates, tile.block_m)) * tile.block_m
    sum_e, score_sum = floats(rows, s.block_d), floats(rows)
    score_gradient = torch.zeros(s.columns, dtype=torch.float32, device=s.device)
    pages = weigh(p, s, t, b, g)
    how = Products(p.cosine, s.dim, tile.block_m, product.block_n, s.block_d, s.precision)
    widths = cdiv(s.block_d, product.block_n)
    for chunk in range(chunks):
        of = {
            "column_count_ptr": t.counts[2:3],
            "bin_count_ptr": b.bin_count,
            "chunk": chunk,
            "elements": elements,
        }
        binned_gradients[(s.bins, parts)](
            **both | of,
            pages=PageGradients(**pages),
            dx_ptr=dx,
            pairs_ptr=pairs,
            along_ptr=along,
            score_ptr=score,
        )
        if d_e is not None or want_tau:
            binned_columns[(rows // tile.block_m, widths)](
                dx,
                score,
                b.c,
                **of,
                sum_ptr=sum_e,
                score_sum_ptr=score_sum,
                programs=programs,
                how=how,
                **product.launch,
            )
            finish_columns[(cdiv(candidates, ROWS),)](
                sum_e,
                score_sum,
                b.e,
                b.e_inverse,
                t.column.list,
                **of,
                de_ptr=d_e,
                score_gradient_ptr=score_gradient,
                programs=programs,
                BLOCK_R=ROWS,
                how=how,
            )
        if sum_c is not None:
            binned_history[(cdiv(s.bin_slots, product.block_m), widths)](
                dx,
                b.e,
                **of,
                sum_ptr=sum_c,
                BLOCK_S=product.block_m,
                BLOCK_M=min(product.block_k, tile.block_m),
                BLOCK_N=product.block_n,
                BLOCK_D=s.block_d,
                PRECISION=s.precision,
                **product.launch,
            )
    if d_c is not None:
        # Two tiles and the products of the bin's rows: wider ones spill.
        width = min(product.block_n, 16 if s.dtype == torch.float32 else 128)
        finish_history[(s.bins,)](
            sum_c,
            pairs,
            along,
            b.c,
            b.slot_length,
            b.slot_row,
            Pages(p.pv_offsets, p.history_offsets, t.places[0]),
            placed_of(b),
            d_c,
            s.units,
            parts,
            DOT_TYPE=tl.bfloat16 if dx.dtype == torch.bfloat16 else tl.float32,
            how=how._replace(BLOCK_N=width),
            num_warps=8,
            maxnreg=tiles.MOST_REGISTERS,
        )
    # s = cos / tau
    return [score_gradient * p.temperature] if want_tau and p.temperature is not None else []


def stored_gradients(p: Problem, s: CandidateShape, candidates: int) -> tuple[int, int, Tensor]:
    """(chunks of candidates, elements of dL/dx, where it goes): at most a quarter of the workspace,
    but as many candidates as a tile has."""
    kind = torch.bfloat16 if s.dtype == torch.bfloat16 else torch.float32
    most = min(p.workspace // 4 // kind.itemsize, 2**31 - 1)
    elements = max(min(most, s.bin_slots * candidates), s.bin_slots * PADDING.value)
    rows = elements // s.bin_slots // PADDING.value * PADDING.value
    return cdiv(candidates, rows), elements, torch.empty(elements, dtype=kind, device=s.device)
