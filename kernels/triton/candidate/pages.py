"""Triton: which pages have an anchor, and what their products are made by: pages in bins, and lists
of the others."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common import kernel, places_before
from ..shapes import cdiv
from .state import SIDE, SPAN, UNITS

if TYPE_CHECKING:
    from .state import Bins

# Pages take 1, 2, 4, 8 or 16 units of a bin.
LARGEST = tl.constexpr(5)
# Lists of pages: those in no bin that are small, with a history of one block and up to ANCHORS
# anchors; those that are not; and every page with an anchor.
SMALL_PAGES, LARGE_PAGES, EVERY_PAGE = range(3)
ANCHORS = tl.constexpr(16)
BLOCK = 512


class Pages(NamedTuple):
    """PV rows, history rows and anchors of the pages."""

    pv_offsets: Any
    history_offsets: Any
    anchor_place: Any


class Placed(NamedTuple):
    """Bins that are filled; None without bins."""

    unit_page: Any  # [units] -1 where there is none
    page_place: Any  # [pages] first unit, -1 where it has none
    count: Any  # [3] bins, pages in no bin, bins of more than one page


@triton.jit
def exponent_of(length):
    """log2 of the units that so many history rows take."""
    exponent = (length > SPAN).to(tl.int32)
    for more in tl.static_range(1, LARGEST):
        exponent += (length > (SPAN << more)).to(tl.int32)
    return exponent


@triton.jit
def anchors_of(pv_offsets_ptr, anchor_place_ptr, page, mask):
    """The range of anchors of pages [BLOCK]."""
    first_row = tl.load(pv_offsets_ptr + page, mask=mask, other=0)
    last_row = tl.load(pv_offsets_ptr + page + 1, mask=mask, other=0)
    return places_before(anchor_place_ptr, first_row), places_before(anchor_place_ptr, last_row)


@triton.jit
def page_anchors(all, page):
    """The range of anchors of a page."""
    first = places_before(all.anchor_place, tl.load(all.pv_offsets + page))
    return first, places_before(all.anchor_place, tl.load(all.pv_offsets + page + 1))


@triton.jit
def kind_of(all, page, pages, SHORT: tl.constexpr, BINNED: tl.constexpr):
    """log2 of the units that pages need; LARGEST where they are in no bin, one more where they are
    not small; -1 without an anchor."""
    inside = page < pages
    first, last = anchors_of(all.pv_offsets, all.anchor_place, page, inside)
    begin = tl.load(all.history_offsets + page, mask=inside, other=0)
    end = tl.load(all.history_offsets + page + 1, mask=inside, other=0)
    length = end - begin
    kind = LARGEST + ((length > SHORT) | (last - first > ANCHORS)).to(tl.int32)
    if BINNED:
        size = exponent_of(length)
        kind = tl.where((last - first <= SIDE) & (size < LARGEST), size, kind)
    return tl.where(inside & (last > first), kind, -1)


@kernel
def count_pages(
    all,  # Pages
    placed,  # Placed, or None
    kind_count_ptr,  # [blocks, 8]
    pages,
    units,
    SHORT: tl.constexpr,
    BINNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pages of each kind of a block of pages; and no page in any unit."""
    block = tl.program_id(0)
    kinds = tl.arange(0, 8)
    page = block * BLOCK + tl.arange(0, BLOCK)
    kind = kind_of(all, page, pages, SHORT, BINNED)
    count = tl.sum((kind[:, None] == kinds[None, :]).to(tl.int32), axis=0)
    tl.store(kind_count_ptr + block * 8 + kinds, count)
    if BINNED:
        share = tl.cdiv(units, tl.num_programs(0))
        end = tl.minimum((block + 1) * share, units)
        for start in range(block * share, end, BLOCK):
            unit = start + tl.arange(0, BLOCK)
            tl.store(placed.unit_page + unit, -1, mask=unit < end)


@kernel
def place_pages(
    all,  # Pages
    placed,  # Placed, or None
    kind_count_ptr,  # [blocks, 8]
    list_ptr,  # [3, pages] pages of each list, ascending
    list_count_ptr,  # [3]
    pages,
    blocks,
    SHORT: tl.constexpr,
    BINNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pages with an anchor in bins, those of as many units side by side, in order of the pages; and
    lists of those in none."""
    block = tl.program_id(0)
    kinds = tl.arange(0, 8)  # sizes are powers of two
    counts = tl.zeros([8], tl.int32)
    before = tl.zeros([8], tl.int32)
    for start in range(0, blocks, 64):
        other = start + tl.arange(0, 64)
        where = kind_count_ptr + other[:, None] * 8 + kinds[None, :]
        found = tl.load(where, mask=(other < blocks)[:, None], other=0)
        counts += tl.sum(found, axis=0)
        before += tl.sum(tl.where((other < block)[:, None], found, 0), axis=0)
    page = block * BLOCK + tl.arange(0, BLOCK)
    kind = kind_of(all, page, pages, SHORT, BINNED)
    is_kind = (kind[:, None] == kinds[None, :]).to(tl.int32)
    earlier = tl.cumsum(is_kind, axis=0) - is_kind + before[None, :]
    rank = tl.sum(earlier * is_kind, axis=1)
    tl.store(list_ptr + (kind - LARGEST).to(tl.int64) * pages + rank, page, mask=kind >= LARGEST)
    any = (kind >= 0).to(tl.int32)
    rank = tl.cumsum(any, axis=0) - any + tl.sum(before, axis=0)
    tl.store(list_ptr + 2 * pages.to(tl.int64) + rank, page, mask=kind >= 0)
    listed = (kinds >= LARGEST) & (kinds < LARGEST + 2)
    if block == 0:
        tl.store(list_count_ptr + kinds - LARGEST, counts, mask=listed)
        tl.store(list_count_ptr + 2, tl.sum(counts, axis=0))
    if BINNED:
        bins = tl.where(kinds < LARGEST, tl.cdiv(counts << kinds, UNITS), 0)
        base = (tl.cumsum(bins, axis=0) - bins) * UNITS
        place = tl.sum((base[None, :] + (earlier << kinds[None, :])) * is_kind, axis=1)
        fits = (kind >= 0) & (kind < LARGEST)
        tl.store(placed.page_place + page, tl.where(fits, place, -1), mask=page < pages)
        for unit in tl.static_range(UNITS):
            mine = fits & ((unit >> tl.maximum(kind, 0)) == 0)
            tl.store(placed.unit_page + place + unit, page, mask=mine)
        if block == 0:
            several = tl.where(kinds < LARGEST - 1, bins, 0)
            tl.store(placed.count, tl.sum(bins, axis=0))
            tl.store(placed.count + 1, tl.sum(tl.where(listed, counts, 0), axis=0))
            tl.store(placed.count + 2, tl.sum(several, axis=0))


# ---- launches ------------------------------------------------------------------------------------


def place(all: Pages, listed: tuple[Tensor, Tensor], short: int, bins: Bins | None) -> None:
    """Fills the lists [3, pages] and their lengths; and where pages are in bins. Small ones have a
    history of up to `short` rows."""
    lists, counts = listed
    pages, device = lists.shape[1], lists.device
    blocks = cdiv(pages, BLOCK)
    kind_count = torch.empty(blocks, 8, dtype=torch.int32, device=device)
    placed, units = None, 0
    if bins is not None:
        placed = Placed(bins.unit_page, bins.page_place, bins.bin_count)
        units = bins.unit_page.shape[0]
    options = {"SHORT": short, "BINNED": bins is not None, "BLOCK": BLOCK, "num_warps": 8}
    count_pages[(blocks,)](all, placed, kind_count, pages, units, **options)
    place_pages[(blocks,)](all, placed, kind_count, lists, counts, pages, blocks, **options)
