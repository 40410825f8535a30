"""Triton: the integer bookkeeping of a batch (pages, anchors, compacted lists), without a host sync."""

from __future__ import annotations

import triton
import triton.language as tl

from .tl_common import LOG2E, page_of

# Rows of `flags` and `ranks`.
ANCHOR = tl.constexpr(0)
RECONSTRUCTED = tl.constexpr(1)
COLUMN = tl.constexpr(2)
SKIPPED = tl.constexpr(3)


@triton.jit
def history_pages(
    offsets_ptr,
    mask_ptr,
    page_ptr,
    live_ptr,
    rows,
    pages,
    steps,
    HAS_MASK: tl.constexpr,
    WANT_LIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Page of every history row, -1 for padding, and its 0/1 flag."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = row < rows
    page = page_of(offsets_ptr, row, pages, steps)
    live = inside & (page < pages)
    if HAS_MASK:
        live = live & tl.load(mask_ptr + row, mask=inside, other=0).to(tl.int1)
    if WANT_LIVE:
        tl.store(live_ptr + row, live.to(tl.int32), mask=inside)
    tl.store(page_ptr + row, tl.where(live, page, -1).to(tl.int32), mask=inside)


@triton.jit
def pv_flags(
    offsets_ptr,
    mask_ptr,
    clicked_ptr,
    weights_ptr,
    history_offsets_ptr,
    history_rank_ptr,
    index_ptr,
    page_ptr,
    flags_ptr,
    item_count_ptr,
    rows,
    pages,
    steps,
    HAS_MASK: tl.constexpr,
    HAS_WEIGHTS: tl.constexpr,
    HAS_CLICKED: tl.constexpr,
    HAS_HISTORY_MASK: tl.constexpr,
    EVERY_RECONSTRUCTION: tl.constexpr,
    COUNT_ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Page and flags (anchor, reconstructed, column, skipped) of every PV row; occurrences of each item.

    A = {i : y_i = 1, page(i) has a history, w_i > 0}; R is wanted for A, or for every item with a history.
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    inside = row < rows
    page = page_of(offsets_ptr, row, pages, steps)
    live = inside & (page < pages)
    if HAS_MASK:
        live = live & tl.load(mask_ptr + row, mask=inside, other=0).to(tl.int1)
    first = tl.load(history_offsets_ptr + page, mask=live, other=0)
    last = tl.load(history_offsets_ptr + page + 1, mask=live, other=0)
    if HAS_HISTORY_MASK:
        first = tl.load(history_rank_ptr + first - 1, mask=live & (first > 0), other=0)
        last = tl.load(history_rank_ptr + last - 1, mask=live & (last > 0), other=0)
    has_history = live & (last > first)
    clicked = live
    if HAS_CLICKED:
        clicked = live & tl.load(clicked_ptr + row, mask=inside, other=0).to(tl.int1)
    anchor = clicked & has_history
    if HAS_WEIGHTS:
        anchor = anchor & (tl.load(weights_ptr + row, mask=inside, other=0.0) > 0)
    reconstructed = has_history if EVERY_RECONSTRUCTION else anchor
    tl.store(page_ptr + row, tl.where(live, page, -1).to(tl.int32), mask=inside)
    rows64 = rows.to(tl.int64)
    tl.store(flags_ptr + ANCHOR * rows64 + row, anchor.to(tl.int32), mask=inside)
    tl.store(flags_ptr + RECONSTRUCTED * rows64 + row, reconstructed.to(tl.int32), mask=inside)
    tl.store(flags_ptr + COLUMN * rows64 + row, live.to(tl.int32), mask=inside)
    tl.store(
        flags_ptr + SKIPPED * rows64 + row, (clicked & (has_history == 0)).to(tl.int32), mask=inside
    )
    if COUNT_ITEMS:
        # Atomics on integers: the sum does not depend on their order.
        item = tl.load(index_ptr + row, mask=live, other=0)
        tl.atomic_add(item_count_ptr + item, 1, mask=live)


@triton.jit
def compact(
    rank_ptr,
    flag_ptr,
    page_ptr,
    id_ptr,
    log_q_ptr,
    list_ptr,
    list_page_ptr,
    list_id_ptr,
    list_bias_ptr,
    rows,
    HAS_ID: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Positions, pages, ids and biases (-log_q, in powers of two) of the flagged rows, in order."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    flagged = tl.load(flag_ptr + row, mask=row < rows, other=0) != 0
    place = tl.load(rank_ptr + row, mask=flagged, other=1) - 1
    tl.store(list_ptr + place, row.to(tl.int32), mask=flagged)
    tl.store(list_page_ptr + place, tl.load(page_ptr + row, mask=flagged, other=0), mask=flagged)
    if HAS_ID:
        tl.store(
            list_id_ptr + place,
            tl.load(id_ptr + row, mask=flagged, other=0).to(list_id_ptr.dtype.element_ty),
            mask=flagged,
        )
    if HAS_LOG_Q:
        tl.store(
            list_bias_ptr + place,
            tl.load(log_q_ptr + row, mask=flagged, other=0.0) * -LOG2E,
            mask=flagged,
        )


@triton.jit
def compact_items(rank_ptr, item_count_ptr, list_ptr, bias_ptr, items, BLOCK: tl.constexpr):
    """Items that occur, and log2 of how often: equal candidates are one column with the bias log m."""
    item = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    count = tl.load(item_count_ptr + item, mask=item < items, other=0)
    place = tl.load(rank_ptr + item, mask=count > 0, other=1) - 1
    tl.store(list_ptr + place, item.to(tl.int32), mask=count > 0)
    tl.store(bias_ptr + place, tl.log2(tl.maximum(count, 1).to(tl.float32)), mask=count > 0)
