"""Triton: the integer bookkeeping of a batch (pages, anchors, compacted lists), in two launches,
without a host sync."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...loss.problem import Problem, SequenceProblem
from . import tiles
from .common import LOG2E, kernel, page_of
from .shapes import Shape, cdiv
from .state import Listed, Plan, SequenceState

# Rows of `flags` and `places`.
ANCHOR = tl.constexpr(0)
RECONSTRUCTED = tl.constexpr(1)
COLUMN = tl.constexpr(2)
SKIPPED = tl.constexpr(3)


@triton.jit
def store_flag(
    flags_ptr, block_counts_ptr, number: tl.constexpr, flag, row, inside, rows, block, blocks
):
    """A row of flags, and how many of this block are set."""
    tl.store(
        flags_ptr + number * rows.to(tl.int64) + row,
        flag.to(flags_ptr.dtype.element_ty),
        mask=inside,
    )
    tl.store(block_counts_ptr + number * blocks + block, tl.sum(flag.to(tl.int32), axis=0))


@triton.jit
def any_history(mask_ptr, first, last, live):
    """Whether one of the history rows first <= k < last is real; most often the first is."""
    found = first < first
    k = first
    searching = live & (k < last)
    while tl.max(searching.to(tl.int32), axis=0) > 0:
        found = found | (searching & tl.load(mask_ptr + k, mask=searching, other=0).to(tl.int1))
        k += 1
        searching = live & (k < last) & (found == 0)
    return found


@triton.jit
def mark_history(
    block,
    offsets_ptr,
    mask_ptr,
    page_ptr,
    flags_ptr,
    block_counts_ptr,
    rows,
    pages,
    steps,
    blocks,
    WANT_FLAG: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Page of every history row, -1 for padding, and its 0/1 flag."""
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = row < rows
    page = page_of(offsets_ptr, row, pages, steps)
    live = inside & (page < pages)
    if mask_ptr is not None:
        live = live & tl.load(mask_ptr + row, mask=inside, other=0).to(tl.int1)
    tl.store(page_ptr + row, tl.where(live, page, -1).to(tl.int32), mask=inside)
    if WANT_FLAG:
        store_flag(flags_ptr, block_counts_ptr, 0, live, row, inside, rows, block, blocks)


@kernel
def mark_sequence(
    offsets_ptr,
    mask_ptr,
    page_ptr,
    flags_ptr,
    block_counts_ptr,
    rows,
    pages,
    steps,
    blocks,
    BLOCK: tl.constexpr,
):
    """Pages and flags of the history rows of a click-sequence loss."""
    mark_history(
        tl.program_id(0),
        offsets_ptr,
        mask_ptr,
        page_ptr,
        flags_ptr,
        block_counts_ptr,
        rows,
        pages,
        steps,
        blocks,
        True,
        BLOCK,
    )


@kernel(registers=255)
def mark_rows(
    offsets_ptr,
    mask_ptr,  # None where there is none, as the next three
    clicked_ptr,
    weights_ptr,
    index_ptr,
    page_ptr,
    flags_ptr,  # [4, N]
    block_counts_ptr,  # [4, blocks]
    item_count_ptr,  # [n] or None
    history_offsets_ptr,
    history_mask_ptr,
    history_page_ptr,
    reconstructed_mask_ptr,  # None where there is none
    rows,
    history_rows,
    pages,
    steps,
    blocks,
    GIVEN: tl.constexpr,  # R is, with no history: items have one but where the mask says no
    EVERY_RECONSTRUCTION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Page and flags (anchor, reconstructed, column, skipped) of every PV row, occurrences of each
    item; then the pages of the history rows.

    A = {i : y_i = 1, page(i) has a history, w_i > 0}; R is wanted for A, or for every item with a
    history.
    """
    block = tl.program_id(0)
    if block >= blocks:
        mark_history(
            block - blocks,
            history_offsets_ptr,
            history_mask_ptr,
            history_page_ptr,
            flags_ptr,
            block_counts_ptr,
            history_rows,
            pages,
            steps,
            blocks,
            False,
            BLOCK,
        )
        return
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = row < rows
    page = page_of(offsets_ptr, row, pages, steps)
    live = inside & (page < pages)
    if mask_ptr is not None:
        live = live & tl.load(mask_ptr + row, mask=inside, other=0).to(tl.int1)
    if GIVEN:
        has_history = live
        if reconstructed_mask_ptr is not None:
            kept = tl.load(reconstructed_mask_ptr + row, mask=inside, other=0)
            has_history = live & kept.to(tl.int1)
    else:
        first = tl.load(history_offsets_ptr + page, mask=live, other=0)
        last = tl.load(history_offsets_ptr + page + 1, mask=live, other=0)
        if history_mask_ptr is not None:
            has_history = any_history(history_mask_ptr, first, last, live)
        else:
            has_history = live & (last > first)
    clicked = live
    if clicked_ptr is not None:
        clicked = live & tl.load(clicked_ptr + row, mask=inside, other=0).to(tl.int1)
    anchor = clicked & has_history
    if weights_ptr is not None:
        anchor = anchor & (tl.load(weights_ptr + row, mask=inside, other=0.0) > 0)
    reconstructed = has_history if EVERY_RECONSTRUCTION else anchor
    skipped = clicked & (has_history == 0)
    tl.store(page_ptr + row, tl.where(live, page, -1).to(tl.int32), mask=inside)
    store_flag(flags_ptr, block_counts_ptr, ANCHOR, anchor, row, inside, rows, block, blocks)
    store_flag(
        flags_ptr, block_counts_ptr, RECONSTRUCTED, reconstructed, row, inside, rows, block, blocks
    )
    store_flag(flags_ptr, block_counts_ptr, COLUMN, live, row, inside, rows, block, blocks)
    store_flag(flags_ptr, block_counts_ptr, SKIPPED, skipped, row, inside, rows, block, blocks)
    if item_count_ptr is not None:
        # Atomics on integers: the sum does not depend on their order.
        item = tl.load(index_ptr + row, mask=live, other=0)
        tl.atomic_add(item_count_ptr + item, 1, mask=live)


class List(NamedTuple):
    """A list of flagged rows [capacity], of None where nobody wants it."""

    list: Any
    page: Any
    id: Any
    bias: Any  # None for anchors


class Listing(NamedTuple):
    """The PV rows that have an R [capacity], their pages, and how many they are."""

    list: Any
    page: Any
    count: Any


@triton.jit
def store_list(flagged, place, row, page_ptr, id_ptr, log_q_ptr, out):
    """Positions, pages, ids and biases (-log_q, in powers of two) of the flagged rows, in order."""
    tl.store(out.list + place, row.to(tl.int32), mask=flagged)
    tl.store(out.page + place, tl.load(page_ptr + row, mask=flagged, other=0), mask=flagged)
    if id_ptr is not None:
        tl.store(
            out.id + place,
            tl.load(id_ptr + row, mask=flagged, other=0).to(out.id.dtype.element_ty),
            mask=flagged,
        )
    if log_q_ptr is not None and out.bias is not None:
        tl.store(
            out.bias + place,
            tl.load(log_q_ptr + row, mask=flagged, other=0.0) * -LOG2E,
            mask=flagged,
        )


@kernel(registers=255)
def compact(
    flags_ptr,  # [FLAGS, rows]
    block_counts_ptr,  # [FLAGS, blocks]
    page_ptr,
    id_ptr,  # None where there is none, as log_q_ptr
    log_q_ptr,
    places_ptr,  # [FLAGS, rows] places in the lists from 1: inclusive prefix sums
    counts_ptr,  # [FLAGS]
    first,  # List of the first row of flags
    second,
    third,
    rows,
    blocks,
    FLAGS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Prefix sums and counts of the flags, and the lists of flagged rows."""
    block = tl.program_id(0)
    rows64 = rows.to(tl.int64)
    row = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = row < rows
    for number in tl.static_range(FLAGS):
        before = tl.zeros([BLOCK], tl.int32)
        for start in range(0, block, BLOCK):
            other = start + tl.arange(0, BLOCK)
            before += tl.load(
                block_counts_ptr + number * blocks + other, mask=other < block, other=0
            )
        flag = tl.load(flags_ptr + number * rows64 + row, mask=inside, other=0).to(tl.int32)
        upto = tl.cumsum(flag, axis=0) + tl.sum(before, axis=0)
        tl.store(places_ptr + number * rows64 + row, upto, mask=inside)
        if block == blocks - 1:
            tl.store(counts_ptr + number, tl.max(upto, axis=0))
        flagged = flag != 0
        place = upto - 1
        if number == 0:
            store_list(flagged, place, row, page_ptr, id_ptr, log_q_ptr, first)
        if number == 1 and second.list is not None:
            store_list(flagged, place, row, page_ptr, id_ptr, log_q_ptr, second)
        if number == 2 and third.list is not None:
            store_list(flagged, place, row, page_ptr, id_ptr, log_q_ptr, third)


@kernel
def compact_items(
    item_count_ptr,  # [n]
    item_place_ptr,  # [n] likewise of the items that occur
    count_ptr,  # 0-d
    list_ptr,
    bias_ptr,
    items,
    BLOCK: tl.constexpr,
):
    """Items that occur, and log2 of how often: equal candidates are one column of bias log m."""
    block = tl.program_id(0)
    before = block * 0
    for start in range(0, block * BLOCK, 4 * BLOCK):
        other = start + tl.arange(0, 4 * BLOCK)
        count = tl.load(item_count_ptr + other, mask=other < block * BLOCK, other=0)
        before += tl.sum((count > 0).to(tl.int32), axis=0)
    item = block * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    count = tl.load(item_count_ptr + item, mask=item < items, other=0)
    upto = tl.cumsum((count > 0).to(tl.int32), axis=0) + before
    tl.store(item_place_ptr + item, upto, mask=item < items)
    if block == tl.num_programs(0) - 1:
        tl.store(count_ptr, tl.max(upto, axis=0))
    tl.store(list_ptr + upto - 1, item.to(tl.int32), mask=count > 0)
    tl.store(bias_ptr + upto - 1, tl.log2(tl.maximum(count, 1).to(tl.float32)), mask=count > 0)


# ---- launches ------------------------------------------------------------------------------------


def _steps(pages: int) -> int:
    return (pages + 1).bit_length()


def _compact(
    t: Plan | SequenceState,
    block_counts: Tensor,
    page: Tensor,
    ids: Tensor | None,
    log_q: Tensor | None,
    first: Listed,
    second: Listed | None = None,
    third: Listed | None = None,
) -> None:
    """Lists of the rows of each flag, where there is one; prefix sums, and the counts."""

    def of(listed: Listed | None) -> List:
        if listed is None:
            return List(None, None, None, None)
        return List(listed.list, listed.page, listed.id, listed.bias)

    flags, blocks = t.flags.shape[0], block_counts.shape[1]
    compact[(blocks,)](
        t.flags,
        block_counts,
        page,
        ids,
        log_q,
        t.places,
        t.counts,
        of(first),
        of(second),
        of(third),
        t.flags.shape[1],
        blocks,
        FLAGS=flags,
        BLOCK=tiles.BLOCK_PLAN,
    )


def sequence_plan(p: SequenceProblem, t: SequenceState) -> None:
    """Page of every history row, and the list of the real ones; their count stays on the device."""
    page, flags = t.history_page, t.flags
    pages = p.history_offsets.shape[0] - 1
    blocks = cdiv(page.shape[0], tiles.BLOCK_PLAN)
    block_counts = torch.empty(1, blocks, dtype=torch.int32, device=page.device)
    mark_sequence[(blocks,)](
        p.history_offsets,
        p.history_mask,
        page,
        flags,
        block_counts,
        page.shape[0],
        pages,
        _steps(pages),
        blocks,
        BLOCK=tiles.BLOCK_PLAN,
    )
    _compact(t, block_counts, page, p.ids, None, t.row)


def make_plan(p: Problem, s: Shape, t: Plan, clicked: Tensor | None) -> None:
    """Pages, flags, prefix sums and compacted lists; the counts stay on the device."""
    items = t.item_count
    if items is not None:
        items.zero_()
    blocks = cdiv(s.rows, tiles.BLOCK_PLAN)
    block_counts = torch.empty(4, blocks, dtype=torch.int32, device=s.device)
    mark_rows[(blocks + cdiv(s.history_rows, tiles.BLOCK_PLAN),)](
        p.pv_offsets,
        p.pv_mask,
        clicked,
        p.weights,
        p.pv_index,
        t.pv_page,
        t.flags,
        block_counts,
        items,
        p.history_offsets,
        p.history_mask,
        t.history_page,
        p.reconstructed_mask,
        s.rows,
        s.history_rows,
        s.pages,
        _steps(s.pages),
        blocks,
        GIVEN=p.reconstructed is not None,
        EVERY_RECONSTRUCTION=s.identify,
        BLOCK=tiles.BLOCK_PLAN,
    )
    column = None if s.merged else t.column
    log_q = p.log_q if s.directions else None
    _compact(t, block_counts, t.pv_page, p.ids, log_q, t.anchor, t.reconstructed, column)
    if s.merged:
        assert t.column is not None
        compact_items[(cdiv(s.items, tiles.BLOCK_PLAN),)](
            items,
            t.item_place,
            t.counts[2:3],
            t.column.list,
            t.column.bias,
            s.items,
            BLOCK=tiles.BLOCK_PLAN,
        )


def reconstructed(t: Plan) -> Listing:
    if t.reconstructed is None:
        return Listing(t.anchor.list, t.anchor.page, t.counts[0:1])
    return Listing(t.reconstructed.list, t.reconstructed.page, t.counts[1:2])
