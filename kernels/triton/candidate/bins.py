"""Triton: pages in bins, whose products binned.py has, and what goes between their anchors and
bins."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ....loss.problem import Problem
from .. import tiles
from ..common import (
    LOG2E,
    NORM_EPS,
    Source,
    add_in,
    kernel,
    load_rows,
    score_scale,
    source_row,
    temperature,
    unit_scale,
)
from ..masks import MASK_OTHER_PAGES, MASKS
from ..shapes import cdiv
from .pages import Pages, entry_anchors, entry_of, placed_of
from .state import PADDING, SIDE, SLOTS, SPAN, UNITS, Bins, CandidateShape, CandidateState

# Of logits and scores: below all there are.
LOWEST = tl.constexpr(-1e30)
ROWS = 16


@triton.jit
def load_part(source, row, mask, first, D: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH dimensions of rows of a source, zeros beyond D and where the mask is off."""
    dims = first + tl.arange(0, WIDTH)
    at = source_row(source, row, mask)[:, None] * D + dims[None, :]
    return tl.load(source.rows + at, mask=mask[:, None] & (dims < D)[None, :], other=0.0)


@kernel
def fill_bins(
    source_ptr,
    index_ptr,
    pages,  # Pages
    placed,  # Placed
    history_page_ptr,
    anchor_list_ptr,
    anchor_id_ptr,
    pv_index_ptr,
    column_place_ptr,
    c_ptr,  # [bins * SLOTS, BLOCK_D] history rows, by cosines of unit length
    gram_ptr,  # [bins, SLOTS, SLOTS] within entries
    # [bins * SLOTS] LOWEST in empty slots, else 0; by cosines log2 |C|, the page's largest
    # subtracted, and 0 of zero rows
    slot_log_ptr,
    # [bins * SLOTS] |C|; of a zero row minus the page's largest, 0 where all are zero
    slot_length_ptr,
    slot_row_ptr,  # [bins * SLOTS] history rows, -1 in empty slots
    unit_poison_ptr,  # [bins * UNITS] NaN where the page's history is not finite, else 0
    unit_column_ptr,  # [SIDE, bins * UNITS] columns of the entry's anchors, -1 for none
    unit_id_ptr,  # [bins * UNITS] id of the entry's anchor, or None
    bin_group_ptr,  # [bins] units of each of its entries
    bin_most_ptr,  # [bins] anchors of an entry, at most
    units,
    D: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    MERGED: tl.constexpr,
    PER: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Rows of a bin's history side by side, the products of each entry's with each other, and
    its anchors' columns."""
    bin = tl.program_id(0)
    if bin >= tl.load(placed.bin_count):
        return
    slot = bin * SLOTS + tl.arange(0, SLOTS)
    page = tl.load(placed.unit_page + slot // SPAN)
    there = page >= 0
    entry = tl.load(placed.unit_entry + slot // SPAN, mask=there, other=-1)
    row = tl.load(pages.history_offsets + page, mask=there, other=0) + slot - entry * SPAN
    real = there & (row < tl.load(pages.history_offsets + page + 1, mask=there, other=0))
    real = real & (tl.load(history_page_ptr + row, mask=real, other=-1) == page)
    source = Source(source_ptr, index_ptr if HAS_INDEX else None)
    squares = tl.zeros([SLOTS], tl.float32)
    for first in range(0, BLOCK_D, BLOCK_K):
        wide = load_part(source, row, real, first, D, BLOCK_K).to(tl.float32)
        squares += tl.sum(wide * wide, axis=1)
    length = tl.sqrt(squares)
    finite = length < float("inf")
    gram = tl.zeros([SLOTS, SLOTS], tl.float32)
    for first in range(0, BLOCK_D, BLOCK_K):
        wide = load_part(source, row, real, first, D, BLOCK_K).to(tl.float32)
        if COSINE:
            wide = wide * unit_scale(length)[:, None]
        # Zeros in place of what is not finite: it must not reach the other pages of the bin.
        c = tl.where(finite[:, None], wide, 0.0).to(c_ptr.dtype.element_ty)
        dims = first + tl.arange(0, BLOCK_K)
        tl.store(c_ptr + slot.to(tl.int64)[:, None] * BLOCK_D + dims[None, :], c)
        gram = tl.dot(c, tl.trans(c), gram, input_precision=PRECISION)
    same = there[:, None] & (entry[:, None] == entry[None, :])
    log = tl.where(real & finite, 0.0, LOWEST)
    if COSINE:
        some = length > NORM_EPS
        log = tl.where(real & finite & some, tl.log2(length), -float("inf"))
        highest = tl.max(tl.where(same, log[None, :], -float("inf")), axis=1)
        log -= tl.where(highest == -float("inf"), 0.0, highest)
        # A zero row adds nothing to any sum, whatever its weight; but that weight is its gradient's
        # as a value.
        nothing = real & finite & (some == 0)
        log = tl.where(nothing, 0.0, tl.maximum(log, LOWEST))
        length = tl.where(nothing, -tl.exp2(highest), length)
    gram = tl.where(same, gram, 0.0)
    other = tl.arange(0, SLOTS)
    where = slot.to(tl.int64)[:, None] * SLOTS + other[None, :]
    tl.store(gram_ptr + where, gram.to(gram_ptr.dtype.element_ty))
    tl.store(slot_log_ptr + slot, log)
    tl.store(slot_length_ptr + slot, length)
    tl.store(slot_row_ptr + slot, tl.where(real, row, -1))
    bad = tl.max(tl.where(same & (real & (finite == 0))[None, :], 1, 0), axis=1)
    poison = tl.where(bad > 0, float("nan"), 0.0)
    tl.store(unit_poison_ptr + slot // SPAN, poison, mask=slot % SPAN == 0)
    units_here = bin * UNITS + tl.arange(0, UNITS)
    page = tl.load(placed.unit_page + units_here)
    there = page >= 0
    entry = tl.load(placed.unit_entry + units_here, mask=there, other=-1)
    first, last = entry_anchors(pages, placed, page, entry, there, PER)
    for side in tl.static_range(SIDE):
        has = there & (first + side < last)
        item = tl.load(anchor_list_ptr + first + side, mask=has, other=0)
        if MERGED:
            item = tl.load(pv_index_ptr + item, mask=has, other=0).to(tl.int32)
        column = tl.load(column_place_ptr + item, mask=has, other=0) - 1
        tl.store(unit_column_ptr + side * units + units_here, column)
    if unit_id_ptr is not None:
        id = tl.load(anchor_id_ptr + first, mask=there, other=0)
        tl.store(unit_id_ptr + units_here, id)
    tl.store(bin_most_ptr + bin, tl.max(last - first, axis=0))
    tl.store(bin_group_ptr + bin, tl.sum((entry == bin * UNITS).to(tl.int32), axis=0))


@kernel
def pack_columns(
    source_ptr,
    index_ptr,
    list_ptr,
    count_ptr,
    # [columns, BLOCK_D], by cosines of unit length; zeros up to the end of a tile of PADDING
    e_ptr,
    inverse_ptr,  # [columns] 1 / |E|; so, too
    D: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows of the candidates, and their lengths."""
    column = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    count = tl.load(count_ptr)
    inside = column < count
    position = tl.load(list_ptr + column, mask=inside, other=0)
    source = Source(source_ptr, index_ptr if HAS_INDEX else None)
    e = load_rows(source, position, inside, D, BLOCK_D).to(tl.float32)
    inverse = unit_scale(tl.sqrt(tl.sum(e * e, axis=1)))
    if COSINE:
        e = e * inverse[:, None]
    dims = tl.arange(0, BLOCK_D)
    where = column.to(tl.int64)[:, None] * BLOCK_D + dims[None, :]
    padded = column < tl.cdiv(count, PADDING) * PADDING
    tl.store(e_ptr + where, e.to(e_ptr.dtype.element_ty), mask=padded[:, None])
    tl.store(inverse_ptr + column, inverse, mask=padded)


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
    """Whether anchor `other` of an entry is a candidate of another of its anchors: another item,
    each counted once."""
    has = valid & (other < last)
    id = tl.load(anchor_id_ptr + other, mask=has, other=0)
    counts = has & (id != own_id)
    if MERGED:
        for side in tl.static_range(SIDE):
            earlier = first + side
            again = tl.load(anchor_id_ptr + earlier, mask=has & (earlier < other), other=0) == id
            counts = counts & ((again & (earlier < other)) == 0)
    return counts


class Own(NamedTuple):
    """What the scores of anchors' items on their own pages are made of."""

    positive: Any  # [capacity, 2]
    list: Any  # [capacity]
    log_q: Any  # [N], or None
    pv_index: Any  # [N], None where no columns are merged
    item_count: Any  # [n]


@triton.jit
def own_score(i, valid, scale, own):
    """Score of anchors' items on their own pages in powers of two, and what it is as a candidate:
    log2 of how often more."""
    score = tl.load(own.positive + i.to(tl.int64) * 2, mask=valid, other=0.0) * scale
    row = tl.load(own.list + i, mask=valid, other=0)
    if own.log_q is not None:
        score -= tl.load(own.log_q + row, mask=valid, other=0.0) * LOG2E
    often = score * 0.0
    if own.pv_index is not None:
        item = tl.load(own.pv_index + row, mask=valid, other=0)
        often = tl.log2(tl.load(own.item_count + item, mask=valid, other=1).to(tl.float32))
    return score, score + often


@kernel
def merge_binned(
    pages,  # Pages
    placed,  # Placed
    anchor_list_ptr,
    anchor_page_ptr,
    anchor_id_ptr,
    count_ptr,
    positive_ptr,
    log_q_ptr,
    pv_index_ptr,
    item_count_ptr,
    bin_top_ptr,  # [bin_parts, units]
    bin_total_ptr,
    top_ptr,  # [parts, capacity]
    total_ptr,
    capacity,
    parts,
    units,
    bin_parts,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    MERGED: tl.constexpr,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """(max, sum) of an anchor in a bin: of its entry's parts and the entry's other anchors."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < tl.load(count_ptr)
    page = tl.load(anchor_page_ptr + i, mask=valid, other=0)
    valid = valid & (tl.load(placed.page_place + page, mask=valid, other=-1) >= 0)
    scale = score_scale(tau, TAU_IS_TENSOR)
    own = Own(
        positive_ptr,
        anchor_list_ptr,
        log_q_ptr if HAS_LOG_Q else None,
        pv_index_ptr if MERGED else None,
        item_count_ptr,
    )
    place, _size, first, last = entry_of(pages, placed, i, page, valid, PER)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(bin_parts):
        where = part * units.to(tl.int64) + place
        part_top = tl.load(bin_top_ptr + where, mask=valid, other=-float("inf"))
        part_total = tl.load(bin_total_ptr + where, mask=valid, other=0.0)
        top, total = add_in(top, total, part_top, part_total)
    own_id = tl.load(anchor_id_ptr + i, mask=valid, other=0)
    if MASK != MASK_OTHER_PAGES:
        for side in tl.static_range(PER):
            other = first + side
            counts = among_page(other, first, last, valid, own_id, anchor_id_ptr, MERGED)
            _score, t = own_score(other, counts, scale, own)
            t = tl.where(counts, t, -float("inf"))
            top, total = add_in(top, total, t, tl.where(counts, 1.0, 0.0))
    tl.store(top_ptr + i, top, mask=valid)
    tl.store(total_ptr + i, total, mask=valid)
    for part in range(1, parts):
        where = part * capacity.to(tl.int64) + i
        tl.store(top_ptr + where, tl.full([BLOCK], -float("inf"), tl.float32), mask=valid)
        tl.store(total_ptr + where, tl.zeros([BLOCK], tl.float32), mask=valid)


@kernel
def page_weights(
    pages,  # Pages
    placed,  # Placed
    anchor_list_ptr,
    anchor_page_ptr,
    anchor_id_ptr,
    count_ptr,
    positive_ptr,
    log_q_ptr,
    pv_index_ptr,
    item_count_ptr,
    lse_ptr,
    miss_ptr,
    g_ptr,
    unit_lse_ptr,  # [units] the smallest of the entry's anchors
    unit_weight_ptr,  # [units] sum of g_i 2^(that - lse_i)
    unit_own_ptr,  # [SIDE, units] dL/ds of the anchors' own columns
    units,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    MERGED: tl.constexpr,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """What the gradient of an entry's scores needs: dL/ds_bj = weight 2^(t - lse) of all but its
    anchors' own columns."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = i < tl.load(count_ptr)
    page = tl.load(anchor_page_ptr + i, mask=valid, other=0)
    valid = valid & (tl.load(placed.page_place + page, mask=valid, other=-1) >= 0)
    scale = score_scale(tau, TAU_IS_TENSOR)
    place, size, first, last = entry_of(pages, placed, i, page, valid, PER)
    own_id = tl.load(anchor_id_ptr + i, mask=valid, other=0)
    own_of = Own(
        positive_ptr,
        anchor_list_ptr,
        log_q_ptr if HAS_LOG_Q else None,
        pv_index_ptr if MERGED else None,
        item_count_ptr,
    )
    _score, t = own_score(i, valid, scale, own_of)
    own = -tl.load(g_ptr + i, mask=valid, other=0.0) * tl.load(miss_ptr + i, mask=valid, other=0.0)
    # The first anchor of an item stands for its column.
    stands = valid
    if MERGED:
        for side in tl.static_range(PER):
            earlier = valid & (first + side < i)
            again = tl.load(anchor_id_ptr + first + side, mask=earlier, other=0) == own_id
            stands = stands & ((earlier & again) == 0)
    lowest = tl.full([BLOCK], float("inf"), tl.float32)
    for side in tl.static_range(PER):
        other = first + side
        has = valid & (other < last)
        g = tl.load(g_ptr + other, mask=has, other=0.0)
        lse = tl.load(lse_ptr + other, mask=has, other=0.0)
        lowest = tl.minimum(lowest, tl.where(has & (g != 0.0), lse, float("inf")))
    weight = tl.zeros([BLOCK], tl.float32)
    for side in tl.static_range(PER):
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
    side_of = i - first
    for unit in tl.static_range(UNITS):
        is_first = valid & ((unit >> size) == 0) & (side_of == 0)
        tl.store(unit_lse_ptr + place + unit, lowest, mask=is_first)
        tl.store(unit_weight_ptr + place + unit, weight, mask=is_first)
        tl.store(
            unit_own_ptr + side_of * units + place + unit, own, mask=valid & ((unit >> size) == 0)
        )


# ---- launches ------------------------------------------------------------------------------------


def make_bins(p: Problem, s: CandidateShape, t: CandidateState, b: Bins) -> None:
    """Fills `b`, whose pages are placed."""
    source = p.pv if p.history is None else p.history
    fill_bins[(s.bins,)](
        source,
        p.history_index if p.history_index is not None else b.slot_row,
        Pages(p.pv_offsets, p.history_offsets, t.places[0]),
        placed_of(b),
        t.history_page,
        t.anchor.list,
        t.anchor.id,
        p.pv_index if s.merged else b.slot_row,
        t.item_place if s.merged else t.places[2],
        b.c,
        b.gram,
        b.slot_log,
        b.slot_length,
        b.slot_row,
        b.unit_poison,
        b.unit_column,
        b.unit_id,
        b.bin_group,
        b.bin_most,
        s.units,
        D=s.dim,
        COSINE=p.cosine,
        HAS_INDEX=p.history_index is not None,
        MERGED=s.merged,
        PER=s.per_entry,
        BLOCK_D=s.block_d,
        BLOCK_K=tiles.binned_tile("scores", s.dtype, s.block_d, s.device).block_k,
        PRECISION=s.precision,
        num_warps=8,
        maxnreg=tiles.MOST_REGISTERS,
    )
    # Merged columns are rows of the table themselves.
    index = None if s.merged else p.pv_index
    pack_columns[(cdiv(b.e.shape[0], ROWS),)](
        p.pv,
        b.slot_row if index is None else index,
        t.column.list,
        t.counts[2:3],
        b.e,
        b.e_inverse,
        D=s.dim,
        COSINE=p.cosine,
        HAS_INDEX=index is not None,
        BLOCK_M=ROWS,
        BLOCK_D=s.block_d,
    )


def _anchors(p: Problem, s: CandidateShape, t: CandidateState, b: Bins) -> dict[str, Any]:
    """What the small kernels know of anchors and their pages."""
    return {
        "pages": Pages(p.pv_offsets, p.history_offsets, t.places[0]),
        "placed": placed_of(b),
        "anchor_list_ptr": t.anchor.list,
        "anchor_page_ptr": t.anchor.page,
        "anchor_id_ptr": t.anchor.id if s.merged else t.anchor.list,
        "count_ptr": t.counts[0:1],
        "positive_ptr": t.positive,
        "log_q_ptr": p.log_q if p.log_q is not None else t.positive,
        "pv_index_ptr": p.pv_index if s.merged else t.anchor.list,
        "item_count_ptr": t.item_count if s.merged else t.anchor.list,
        "units": s.units,
        **temperature(p),
        "MASK": MASKS[p.negatives],
        "HAS_LOG_Q": p.log_q is not None,
        "MERGED": s.merged,
        "PER": s.per_entry,
        "BLOCK": 256,
    }


def merge(
    p: Problem,
    s: CandidateShape,
    t: CandidateState,
    b: Bins,
    parts: tuple[Tensor, Tensor],
    top: Tensor,
    total: Tensor,
) -> None:
    """The (max, sum) of anchors in bins, from `parts` of their pages, [parts, units] each."""
    merge_binned[(cdiv(s.rows, 256),)](
        **_anchors(p, s, t, b),
        bin_top_ptr=parts[0],
        bin_total_ptr=parts[1],
        top_ptr=top,
        total_ptr=total,
        capacity=s.rows,
        parts=top.shape[0],
        bin_parts=parts[0].shape[0],
    )


def weigh(
    p: Problem, s: CandidateShape, t: CandidateState, b: Bins, g: Tensor
) -> dict[str, Tensor]:
    """What the gradients of the scores need of each unit's page."""
    device, units = s.device, s.units
    # A kernel that asks which of them there are spills 370 bytes more: zeros where there are none.
    own = torch.zeros(SIDE.value, units, dtype=torch.float32, device=device)
    lse, weight = torch.empty(2, units, dtype=torch.float32, device=device)
    page_weights[(cdiv(s.rows, 256),)](
        **_anchors(p, s, t, b),
        lse_ptr=t.lse,
        miss_ptr=t.miss,
        g_ptr=g,
        unit_lse_ptr=lse,
        unit_weight_ptr=weight,
        unit_own_ptr=own,
    )
    return {"lse": lse, "weight": weight, "own": own}
