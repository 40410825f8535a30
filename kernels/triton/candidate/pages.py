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
from .state import SPAN, UNITS

if TYPE_CHECKING:
    from .state import Bins

# Entries take 1, 2, 4, 8 or 16 units of a bin.
LARGEST = tl.constexpr(5)
# Of a page with more entries than one the kind is so much higher.
SEVERAL = tl.constexpr(8)
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
    unit_entry: Any  # [units] first unit of the entry, where there is one
    page_place: Any  # [pages] first unit of the first entry, -1 where it has none
    page_entries: Any  # [pages] entries, one behind the other; 0 where it has none
    bin_count: Any  # [2] bins, pages in no bin


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
def page_size(all, page, mask):
    """log2 of the units that an entry of pages takes."""
    begin = tl.load(all.history_offsets + page, mask=mask, other=0)
    return exponent_of(tl.load(all.history_offsets + page + 1, mask=mask, other=0) - begin)


@triton.jit
def entry_anchors(all, placed, page, entry, mask, PER: tl.constexpr):
    """The range of anchors of the entries that begin with units `entry`."""
    first, last = anchors_of(all.pv_offsets, all.anchor_place, page, mask)
    ahead = entry - tl.load(placed.page_place + page, mask=mask, other=0)
    first += (ahead >> page_size(all, page, mask)) * PER
    return first, tl.minimum(first + PER, last)


@triton.jit
def entry_of(all, placed, i, page, valid, PER: tl.constexpr):
    """Of anchors `i` of pages in bins: the first unit of the entry, log2 of its units and the range
    of its anchors."""
    page_first, page_last = anchors_of(all.pv_offsets, all.anchor_place, page, valid)
    size = page_size(all, page, valid)
    number = (i - page_first) // PER
    place = tl.load(placed.page_place + page, mask=valid, other=0) + (number << size)
    first = page_first + number * PER
    return place, size, first, tl.minimum(first + PER, page_last)


@triton.jit
def kind_of(all, page, pages, SHORT: tl.constexpr, PER: tl.constexpr):
    """log2 of the units that an entry of each page needs, SEVERAL more where it has several;
    LARGEST where the page is in no bin, one more where it is not small; -1 without an anchor. And
    how many entries."""
    inside = page < pages
    first, last = anchors_of(all.pv_offsets, all.anchor_place, page, inside)
    begin = tl.load(all.history_offsets + page, mask=inside, other=0)
    end = tl.load(all.history_offsets + page + 1, mask=inside, other=0)
    length = end - begin
    kind = LARGEST + ((length > SHORT) | (last - first > ANCHORS)).to(tl.int32)
    entries = kind * 0
    if PER is not None:
        size = exponent_of(length)
        entries = tl.cdiv(last - first, PER).to(tl.int32)
        kind = tl.where(size < LARGEST, size + SEVERAL * (entries > 1).to(tl.int32), kind)
    return tl.where(inside & (last > first), kind, -1), entries


@kernel
def count_pages(
    all,  # Pages
    placed,  # Placed, or None
    kind_count_ptr,  # [2, blocks, 16]
    pages,
    units,
    SHORT: tl.constexpr,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pages of each kind of a block of pages, and their entries; and no page in any unit."""
    block = tl.program_id(0)
    kinds = tl.arange(0, 16)
    page = block * BLOCK + tl.arange(0, BLOCK)
    kind, entries = kind_of(all, page, pages, SHORT, PER)
    is_kind = kind[:, None] == kinds[None, :]
    where = kind_count_ptr + block * 16 + kinds
    tl.store(where, tl.sum(is_kind.to(tl.int32), axis=0))
    where += tl.num_programs(0) * 16
    tl.store(where, tl.sum(tl.where(is_kind, entries[:, None], 0), axis=0))
    if placed is not None:
        share = tl.cdiv(units, tl.num_programs(0))
        end = tl.minimum((block + 1) * share, units)
        for start in range(block * share, end, BLOCK):
            unit = start + tl.arange(0, BLOCK)
            tl.store(placed.unit_page + unit, -1, mask=unit < end)


@triton.jit
def sizes_of(entries, fits):
    """Entries by kind [16] as those by size [8]; pages of several are in no bin if not all fit."""
    kinds = tl.arange(0, 16)
    counted = fits | (kinds < SEVERAL)
    # Not by a reshape to [2, 8], whose layout takes kilobytes of local memory.
    of_size = ((kinds % SEVERAL)[:, None] == tl.arange(0, 8)[None, :]) & counted[:, None]
    return tl.sum(tl.where(of_size, entries[:, None], 0), axis=0)


@triton.jit
def bins_of(entries, fits):
    """Bins of each size [8], of entries by kind [16]."""
    sizes = tl.arange(0, 8)
    needed = tl.cdiv(sizes_of(entries, fits) << sizes, UNITS)
    return tl.where(sizes < LARGEST, needed, 0)


@triton.jit
def sums_before(ptr, block, blocks):
    """Sums over all blocks, and over those before one, of [blocks, 16]."""
    kinds = tl.arange(0, 16)
    total = tl.zeros([16], tl.int32)
    before = tl.zeros([16], tl.int32)
    for start in range(0, blocks, 64):
        other = start + tl.arange(0, 64)
        where = ptr + other[:, None] * 16 + kinds[None, :]
        found = tl.load(where, mask=(other < blocks)[:, None], other=0)
        total += tl.sum(found, axis=0)
        before += tl.sum(tl.where((other < block)[:, None], found, 0), axis=0)
    return total, before


@triton.jit
def place_entries(placed, page, kind, entries, total, before, fits, pages):
    """Entries of pages of the kinds [BLOCK], those of one size side by side, in order of the pages;
    which pages are in bins."""
    sizes = tl.arange(0, 8)
    size = kind % SEVERAL
    inside = (kind >= 0) & (size < LARGEST) & (fits | (kind < SEVERAL))
    entries = tl.where(inside, entries, 0)
    bins = bins_of(total, fits)
    base = (tl.cumsum(bins, axis=0) - bins) * UNITS
    is_size = (size[:, None] == sizes[None, :]) & inside[:, None]
    of_size = tl.where(is_size, entries[:, None], 0)
    earlier = tl.cumsum(of_size, axis=0) - of_size + sizes_of(before, fits)[None, :]
    place = base[None, :] + (earlier << sizes[None, :])
    place = tl.sum(tl.where(is_size, place, 0), axis=1)
    tl.store(placed.page_place + page, tl.where(inside, place, -1), mask=page < pages)
    tl.store(placed.page_entries + page, entries, mask=page < pages)
    for number in range(tl.max(entries, axis=0)):
        first = place + (number << size)
        for unit in tl.static_range(UNITS):
            mine = (number < entries) & ((unit >> size) == 0)
            tl.store(placed.unit_page + first + unit, page, mask=mine)
            tl.store(placed.unit_entry + first + unit, first, mask=mine)
    return inside


@triton.jit
def list_pages(list_ptr, page, mask, before):
    """The pages of a block that the mask has, behind those before it."""
    rank = before + tl.cumsum(mask.to(tl.int32), axis=0) - 1
    tl.store(list_ptr + rank, page, mask=mask)


@kernel
def place_pages(
    all,  # Pages
    placed,  # Placed, or None
    kind_count_ptr,  # [2, blocks, 16]
    list_ptr,  # [3, pages] pages of each list, ascending
    list_count_ptr,  # [3]
    pages,
    units,
    blocks,
    SHORT: tl.constexpr,
    PER: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Pages with an anchor in bins, and lists of those in none."""
    block = tl.program_id(0)
    kinds = tl.arange(0, 16)
    counts, before = sums_before(kind_count_ptr, block, blocks)
    page = block * BLOCK + tl.arange(0, BLOCK)
    kind, entries = kind_of(all, page, pages, SHORT, PER)
    large = kinds == LARGEST + 1
    is_large = kind == LARGEST + 1
    if placed is not None:
        total, entries_before = sums_before(kind_count_ptr + blocks * 16, block, blocks)
        fits = tl.sum(bins_of(total, True), axis=0) * UNITS <= units
        inside = place_entries(placed, page, kind, entries, total, entries_before, fits, pages)
        large = large | ((kinds >= SEVERAL) & (fits == 0))
        is_large = is_large | ((kind >= SEVERAL) & (inside == 0))
    small = kinds == LARGEST
    list_pages(list_ptr, page, kind == LARGEST, tl.sum(tl.where(small, before, 0), axis=0))
    list_pages(list_ptr + pages, page, is_large, tl.sum(tl.where(large, before, 0), axis=0))
    list_pages(list_ptr + 2 * pages.to(tl.int64), page, kind >= 0, tl.sum(before, axis=0))
    if block == 0:
        tl.store(list_count_ptr, tl.sum(tl.where(small, counts, 0), axis=0))
        tl.store(list_count_ptr + 1, tl.sum(tl.where(large, counts, 0), axis=0))
        tl.store(list_count_ptr + 2, tl.sum(counts, axis=0))
        if placed is not None:
            listed = tl.where(large | small, counts, 0)
            tl.store(placed.bin_count, tl.sum(bins_of(total, fits), axis=0))
            tl.store(placed.bin_count + 1, tl.sum(listed, axis=0))


# ---- launches ------------------------------------------------------------------------------------


def placed_of(bins: Bins) -> Placed:
    return Placed(*(getattr(bins, name) for name in Placed._fields))


def place(
    all: Pages, listed: tuple[Tensor, Tensor], short: int, bins: Bins | None, per: int = 1
) -> None:
    """Fills the lists [3, pages] and their lengths; and where pages are in bins, `per` anchors an
    entry. Small ones have a history of up to `short` rows."""
    lists, counts = listed
    pages, device = lists.shape[1], lists.device
    blocks = cdiv(pages, BLOCK)
    kind_count = torch.empty(2, blocks, 16, dtype=torch.int32, device=device)
    placed, units = None, 0
    if bins is not None:
        placed, units = placed_of(bins), bins.unit_page.shape[0]
    options = {"SHORT": short, "PER": None if bins is None else per, "BLOCK": BLOCK, "num_warps": 8}
    count_pages[(blocks,)](all, placed, kind_count, pages, units, **options)
    place_pages[(blocks,)](all, placed, kind_count, lists, counts, pages, units, blocks, **options)
