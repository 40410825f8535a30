"""Triton: attention for each candidate where nothing but dot products is needed: one head, by
cosines, E and C themselves.

With unit rows e_j, c_k, lengths |C_k| and attention temperature T, the softmax's denominator
cancels:

    x_k = e_j . c_k,   w_k = |C_k| exp((x_k - 1)/T),   G = c c^T,
    u = sum_k w_k x_k,   n = w^T G w,   s = u / (tau sqrt n)

A bin is UNITS units of SPAN history rows; pages whose histories need as many units, a power of
two, share bins. A tile of candidates times a bin is two products (x and t = w G); sums over a
page are sums over neighbouring columns. With g = dL/ds, A = g / (tau sqrt n), a = u / n and
y_k = w_k (x_k - a t_k):

    dL/dx_k = A (w_k + y_k / T),   dL/de_j = sum_k dL/dx_k c_k,   dL/dlog|C_k| = sum_j A y_k,
    dL/dc_k = sum_j dL/dx_k e_j - sum_l M_kl c_l,   M_kl = sum_j A a w_k w_l

Pages with more than SIDE anchors or with histories that do not fit into a bin are left to
kernels.py.
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
    normalize_backward,
    rsqrt_flushed,
    score_scale,
    temperature,
    unit_scale,
)
from ..masks import MASK_OTHER_PAGES, MASKS
from ..shapes import cdiv
from .bins import ROWS, merge, weigh
from .state import SIDE, SLOTS, SPAN, UNITS, Bins, CandidateShape, CandidateState

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
def attend_bin(x, slot_log, gram, group, sharpness, PRECISION: tl.constexpr):
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
def binned_scores(
    e_ptr,
    c_ptr,
    gram_ptr,
    slot_log_ptr,
    bin_group_ptr,
    bin_most_ptr,
    unit_page_ptr,
    unit_poison_ptr,
    unit_column_ptr,
    column_page_ptr,
    column_bias_ptr,
    column_count_ptr,
    bin_count_ptr,
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
    """(max, sum) of 2^t of a bin's pages over part of the candidates, the anchors' own apart."""
    bin = tl.program_id(0)
    part = tl.program_id(1)
    if bin >= tl.load(bin_count_ptr):
        return
    dims = tl.arange(0, BLOCK_D)
    slot = bin * SLOTS + tl.arange(0, SLOTS)
    unit = bin * UNITS + tl.arange(0, UNITS)
    c = tl.load(c_ptr + slot.to(tl.int64)[:, None] * BLOCK_D + dims[None, :])
    gram = tl.load(gram_ptr + slot.to(tl.int64)[:, None] * SLOTS + tl.arange(0, SLOTS)[None, :])
    slot_log = tl.load(slot_log_ptr + slot)
    most = tl.load(bin_most_ptr + bin)
    group = tl.load(bin_group_ptr + bin)
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
        _w, _t, u, root = attend_bin(x, slot_log, gram, group, sharpness, PRECISION)
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


class BinnedPages(NamedTuple):
    """What the gradients of the scores need of each unit's page; SIDE times as many where anchors
    are told apart."""

    page: Any  # [units]
    poison: Any
    lse: Any
    weight: Any
    column: Any  # [SIDE, units]
    own: Any  # [SIDE, units]
    most: Any  # [bins]
    units: Any


class Columns(NamedTuple):
    """Of the candidates [columns]; bias None where there is none."""

    page: Any
    bias: Any


@triton.jit
def pair_gradients(u, root, column, inside, bin, unit, scale, pages, columns, MASK: tl.constexpr):
    """dL/ds [BLOCK_M, UNITS] of each unit's page."""
    page = tl.load(pages.page + unit)
    # Without a page nothing was written.
    lse = tl.load(pages.lse + unit, mask=page >= 0, other=float("inf"))
    weight = tl.load(pages.weight + unit, mask=page >= 0, other=0.0)
    most = tl.load(pages.most + bin)
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
def binned_columns(
    e_ptr,
    c_ptr,
    gram_ptr,
    slot_log_ptr,
    bin_group_ptr,
    bin_most_ptr,
    unit_page_ptr,
    unit_poison_ptr,
    unit_column_ptr,
    unit_own_ptr,
    unit_lse_ptr,
    unit_weight_ptr,
    column_page_ptr,
    column_bias_ptr,
    column_count_ptr,
    bin_count_ptr,
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
    """dL/de of a tile of candidates: half a bin a step; then, in a launch of their own, the
    bins of one large page."""
    column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.load(column_count_ptr)
    first = count * 0
    last = tl.load(bin_count_ptr + 2) * 2
    if STEP == SLOTS:
        first = last // 2
        last = tl.load(bin_count_ptr)
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
    pages = BinnedPages(
        unit_page_ptr,
        unit_poison_ptr,
        unit_lse_ptr,
        unit_weight_ptr,
        unit_column_ptr,
        unit_own_ptr,
        bin_most_ptr,
        units,
    )
    columns = Columns(column_page_ptr, column_bias_ptr if HAS_BIAS else None)
    for step in range(first, last):
        bin = step * STEP // SLOTS
        place = step * STEP - bin * SLOTS + tl.arange(0, STEP)
        slot = bin * SLOTS + place
        unit = step * (STEP // SPAN) + tl.arange(0, STEP // SPAN)
        c = tl.load(c_ptr + slot.to(tl.int64)[:, None] * BLOCK_D + dims[None, :])
        gram = tl.load(gram_ptr + slot.to(tl.int64)[:, None] * SLOTS + place[None, :])
        x = tl.dot(e, tl.trans(c), input_precision=PRECISION)
        w, t, u, root = attend_bin(
            x,
            tl.load(slot_log_ptr + slot),
            gram,
            tl.load(bin_group_ptr + bin),
            sharpness,
            PRECISION,
        )
        g = pair_gradients(u, root, column, inside, bin, unit, scale, pages, columns, MASK)
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
    bin_count_ptr,
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
    if tl.load(bin_count_ptr + 1) > 0:
        grad += tl.load(de_ptr + where, mask=mask, other=0.0).to(tl.float32)
    tl.store(de_ptr + where, grad.to(de_ptr.dtype.element_ty), mask=mask)


@kernel
def binned_history(
    e_ptr,
    c_ptr,
    gram_ptr,
    slot_log_ptr,
    slot_length_ptr,
    slot_row_ptr,
    bin_group_ptr,
    bin_most_ptr,
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
    bin_count_ptr,
    dc_ptr,  # [K, D]
    tau_part_ptr,  # [bins] sum of g cos
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
    """dL/dC of a bin's history, over all candidates."""
    bin = tl.program_id(0)
    if bin >= tl.load(bin_count_ptr):
        if WANT_TAU:
            tl.store(tau_part_ptr + bin, 0.0)
        return
    dims = tl.arange(0, BLOCK_D)
    place = tl.arange(0, SLOTS)
    slot = bin * SLOTS + place
    unit = bin * UNITS + tl.arange(0, UNITS)
    c = tl.load(c_ptr + slot.to(tl.int64)[:, None] * BLOCK_D + dims[None, :])
    gram = tl.load(gram_ptr + slot.to(tl.int64)[:, None] * SLOTS + place[None, :])
    slot_log = tl.load(slot_log_ptr + slot)
    group = tl.load(bin_group_ptr + bin)
    scale = score_scale(tau, TAU_IS_TENSOR)
    count = tl.load(column_count_ptr)
    acc = tl.zeros([SLOTS, BLOCK_D], tl.float32)
    pairs = tl.zeros([SLOTS, SLOTS], tl.float32)
    along = tl.zeros([BLOCK_M // 16, 8, SLOTS], tl.float32)
    cosines = tl.zeros([BLOCK_M, UNITS], tl.float32)
    pages = BinnedPages(
        unit_page_ptr,
        unit_poison_ptr,
        unit_lse_ptr,
        unit_weight_ptr,
        unit_column_ptr,
        unit_own_ptr,
        bin_most_ptr,
        units,
    )
    columns = Columns(column_page_ptr, column_bias_ptr if HAS_BIAS else None)
    for start in range(0, count, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        e = tl.load(e_ptr + column.to(tl.int64)[:, None] * BLOCK_D + dims[None, :])
        x = tl.dot(e, tl.trans(c), input_precision=PRECISION)
        w, t, u, root = attend_bin(x, slot_log, gram, group, sharpness, PRECISION)
        g = pair_gradients(u, root, column, column < count, bin, unit, scale, pages, columns, MASK)
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
        tl.store(tau_part_ptr + bin, tl.sum(total, axis=0))
    if WANT_C:
        slot_page = tl.load(unit_page_ptr + slot // SPAN)
        other_page = tl.load(unit_page_ptr + (bin * SLOTS + place) // SPAN)
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


# ---- launches ------------------------------------------------------------------------------------


def _tiles(p: Problem, s: CandidateShape, t: CandidateState, b: Bins, kind: str) -> dict[str, Any]:
    """What the passes over candidates times bins have in common."""
    tile = tiles.binned_tile(kind, s.device)
    return {
        "e_ptr": b.e,
        "c_ptr": b.c,
        "gram_ptr": b.gram,
        "slot_log_ptr": b.slot_log,
        "bin_group_ptr": b.bin_group,
        "bin_most_ptr": b.bin_most,
        "unit_page_ptr": b.unit_page,
        "unit_poison_ptr": b.unit_poison,
        "unit_column_ptr": b.unit_column,
        "column_page_ptr": t.column.page,
        "column_bias_ptr": b.slot_log if t.column.bias is None else t.column.bias,
        "column_count_ptr": t.counts[2:3],
        "bin_count_ptr": b.bin_count,
        "units": s.units,
        "sharpness": p.attention_scale / math.log(2.0),
        **temperature(p),
        "MASK": MASKS[p.negatives],
        "HAS_BIAS": t.column.bias is not None,
        "BLOCK_M": tile.block_m,
        "BLOCK_D": s.block_d,
        "PRECISION": s.precision,
        **tile.launch,
    }


def scores(
    p: Problem, s: CandidateShape, t: CandidateState, b: Bins, top: Tensor, total: Tensor
) -> None:
    """Log-sum-exps of the anchors in bins over everything but their positives, to the first
    rows of top and total."""
    bins, device = s.bins, s.device
    parts = max(1, min(16, tiles.programs(device) * 4 // max(bins, 1)))
    bin_top = torch.empty(parts, bins * UNITS.value, dtype=torch.float32, device=device)
    bin_total = torch.empty_like(bin_top)
    binned_scores[(bins, parts)](
        **_tiles(p, s, t, b, "scores"), parts=parts, top_ptr=bin_top, total_ptr=bin_total
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
    device = s.device
    pages = weigh(p, s, t, b, g)
    dots = {"DOT_TYPE": tl.bfloat16 if s.dtype == torch.bfloat16 else tl.float32}
    if d_e is not None:
        unit = torch.empty(b.e.shape, dtype=torch.float32, device=device)
        # Half a bin at a time; and what one page fills, whole.
        for kind, step in (("columns", SLOTS.value // 2), ("columns of large pages", SLOTS.value)):
            given = _tiles(p, s, t, b, kind)
            binned_columns[(cdiv(b.e.shape[0], given["BLOCK_M"]),)](
                **given,
                **pages,
                **dots,
                unit_gradient_ptr=unit,
                STEP=step,
            )
        finish_columns[(cdiv(b.e.shape[0], ROWS),)](
            unit,
            b.e,
            b.e_length,
            t.column.list,
            t.counts[2:3],
            b.bin_count,
            d_e,
            D=s.dim,
            BLOCK_M=ROWS,
            BLOCK_D=s.block_d,
        )
    if d_c is None and not want_tau:
        return []
    tau_parts = torch.empty(s.bins, dtype=torch.float32, device=device)
    binned_history[(s.bins,)](
        **_tiles(p, s, t, b, "history"),
        **pages,
        **dots,
        slot_length_ptr=b.slot_length,
        slot_row_ptr=b.slot_row,
        page_place_ptr=b.page_place,
        D=s.dim,
        dc_ptr=d_c if d_c is not None else g,
        tau_part_ptr=tau_parts,
        WANT_C=d_c is not None,
        WANT_TAU=want_tau,
    )
    return [tau_parts]
