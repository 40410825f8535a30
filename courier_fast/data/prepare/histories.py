"""Histories that are given: each page's list, without what has no place in it, stored once where
pages of a user have the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from numba import njit

from ..tables import copy_items
from .options import PrepareOptions
from .pages import mix, page_bounds

Array = npt.NDArray

NO_IMAGE, OWN, REPEATED, OLDER = range(4)
DROPPED = {
    NO_IMAGE: "item without a usable image",
    OWN: "clicked on the page itself (--keep-own keeps them)",
    REPEATED: "in the history again, later (--repeats keep keeps them)",
    OLDER: "older than the newest --max-history",
}

DIFFER = "pages whose rows have several"


class Lists(NamedTuple):
    """Some lists of items, oldest first, one after another."""

    ends: Array  # [n + 1] int64
    item: Array  # int32; -1: one that does not stay


class PageLists(NamedTuple):
    """The histories of some pages."""

    columns: dict[str, Array]  # item; start and end [pages]: rows of it
    counts: dict[str, int]  # items read, and those dropped by reason; pages whose rows differ


def joined(pieces: Sequence[Mapping[str, Any]]) -> Lists:
    """The lists of each piece, one after another."""
    ends, before = [np.zeros(1, np.int64)], 0
    for piece in pieces:
        ends.append(piece["ends"][1:] + before)
        before += int(piece["ends"][-1])
    return Lists(np.concatenate(ends), np.concatenate([p["past"] for p in pieces]))


def spans(of: Lists, which: Array, rows: Mapping[str, Array]) -> pl.DataFrame:
    """Items of lists that rows have, `which` each, and when they were first and last in one: item
    and time."""
    most, least = np.iinfo(np.int64).max, np.iinfo(np.int64).min
    first, last = np.full(len(of.ends) - 1, most), np.full(len(of.ends) - 1, least)
    np.minimum.at(first, which, rows["time"])
    np.maximum.at(last, which, rows["time"])
    sizes = np.diff(of.ends)
    found = pl.DataFrame(
        {"item": of.item, "first": np.repeat(first, sizes), "last": np.repeat(last, sizes)}
    ).filter(pl.col("item") >= 0, pl.col("first") <= pl.col("last"))  # of lists that a row has
    each = found.group_by("item").agg(pl.min("first"), pl.max("last"))
    return pl.concat([each.select("item", time=n) for n in ("first", "last")])


def of_pages(
    rows: Mapping[str, Array], which: Array, of: Lists, options: PrepareOptions
) -> PageLists:
    """The history of each page of rows shown (by user and page): the list of its first row."""
    bounds = page_bounds(rows)
    starts = bounds[:-1]
    mine = which[starts]
    dropped, ends = np.zeros(len(DROPPED), np.int64), np.zeros(len(starts) + 1, np.int64)
    out = np.empty(int(np.minimum(np.diff(of.ends)[mine], options.max_history).sum()), np.int32)
    key = np.zeros(len(starts), np.uint64)
    whole = _hashes(of.ends, of.item)
    differ = (
        np.maximum.reduceat(whole[which], starts) != np.minimum.reduceat(whole[which], starts)
        if len(starts)
        else np.zeros(0, bool)
    )
    rest = (options.max_history, options.keep_own, options.repeats == "keep")
    _filtered(bounds, rows["item"], rows["clicked"], mine, *of, *rest, out, ends, key, dropped)
    start, end = ends[:-1], ends[1:]
    order = np.lexsort((np.arange(len(key)), key, end - start, rows["user"][starts]))
    same = _same(order, rows["user"][starts], key, ends, out)
    own = same == np.arange(len(same))
    counts = (end - start)[own]
    after = np.cumsum(counts, dtype=np.int64)
    place = np.zeros(len(own), np.int64)
    place[own] = after - counts
    place = place[same]
    columns = {
        "item": copy_items(start[own], counts, out),
        "start": place,
        "end": place + (end - start),
    }
    about = {"read": int(np.diff(of.ends)[mine].sum()), "kept": int(ends[-1])}
    about |= {DROPPED[i]: int(n) for i, n in enumerate(dropped)}
    about[DIFFER] = int(np.count_nonzero(differ))
    return PageLists(columns, about)


@njit(cache=True, nogil=True)
def _hashes(ends, item):  # type: ignore[no-untyped-def]
    out = np.zeros(len(ends) - 1, np.uint64)
    for i in range(len(out)):
        value = np.uint64(ends[i + 1] - ends[i])
        for k in range(ends[i], ends[i + 1]):
            value = mix(value ^ np.uint64(item[k]))
        out[i] = value
    return out


@njit(cache=True, nogil=True)
def _filtered(  # type: ignore[no-untyped-def]
    bounds,
    item,
    clicked,
    mine,
    list_ends,
    past,
    most,
    keep_own,
    keep_repeats,
    out,
    ends,
    key,
    dropped,
):
    """Each page's list without what is dropped, its newest `most` items, oldest first.

    Args:
        bounds: [n + 1] rows of each page; item, clicked: [rows].
        mine: [n] the list of each page, whose items are past[list_ends[l] : list_ends[l + 1]].
        out, ends [n + 1]: out, the items that are kept.
        key: [n] out, a hash of them.
        dropped: [4] out, counts by reason.
    """
    held = np.empty(most, np.int32)
    table = np.full(64, -1, np.int32)  # of items that were met: open addressing
    own = np.empty(64, np.int32)
    for page in range(len(bounds) - 1):
        first, last = list_ends[mine[page]], list_ends[mine[page] + 1]
        clicks = 0
        for row in range(bounds[page], bounds[page + 1]):
            if clicked[row] and not keep_own:
                if clicks == len(own):
                    own = np.append(own, own)
                own[clicks] = item[row]
                clicks += 1
        room = len(table)
        while room < 2 * (last - first):
            room *= 2
        if room > len(table):
            table = np.empty(room, np.int32)
        table[:] = -1
        mask = len(table) - 1
        count = 0
        for k in range(last - 1, first - 1, -1):  # the newest first
            one = past[k]
            if one < 0:
                dropped[NO_IMAGE] += 1
                continue
            mine_too = False
            for i in range(clicks):
                mine_too |= own[i] == one
            if mine_too:
                dropped[OWN] += 1
                continue
            if not keep_repeats:
                at = np.int64(mix(np.uint64(one)) & np.uint64(mask))
                while table[at] >= 0 and table[at] != one:
                    at = (at + 1) & mask
                if table[at] == one:
                    dropped[REPEATED] += 1
                    continue
                table[at] = one
            if count == most:
                dropped[OLDER] += 1
                continue
            held[count] = one
            count += 1
        at, value = ends[page], np.uint64(count)
        for i in range(count):
            out[at + i] = held[count - 1 - i]
            value = mix(value ^ np.uint64(held[i]))
        ends[page + 1], key[page] = at + count, value


@njit(cache=True, nogil=True)
def _same(order, user, key, ends, out):  # type: ignore[no-untyped-def]
    """[n] the first page of its user with the same list, itself where there is none; `order`: pages
    by user, length and key."""
    same = np.arange(len(order))
    first = -1
    for page in order:
        size = ends[page + 1] - ends[page]
        equal = first >= 0 and user[page] == user[first] and key[page] == key[first]
        equal = equal and size == ends[first + 1] - ends[first]
        if equal:
            for i in range(size):
                if out[ends[page] + i] != out[ends[first] + i]:
                    equal = False
                    break
        if equal:
            same[page] = first
        else:
            first = page
    return same
