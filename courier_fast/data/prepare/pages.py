"""Pages from events: who had clicked what before, and what else was on offer.

A page sees only what its time allows: its history is its user's events strictly before it, and a
made page's negatives are items on offer at that time. It is a function of the seed, its user's
events and the items, so that pages can be made in any order, anywhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
from numba import njit

from .offers import Offers, come_by, kth_on_offer, offers_of, on_offer
from .options import NEGATIVES, PrepareOptions
from .page_ids import PageIds, page_ids_of

Array = npt.NDArray

# Draws for a page before it keeps fewer negatives: _TRIES + _TRIES_PER_ITEM * its size.
_TRIES, _TRIES_PER_ITEM = 100, 20
_GUESSES_PER_ITEM = 8

# What becomes of a page; the last two are kept, too.
KEPT, SHORT_HISTORY, REPEAT, NO_NEGATIVE, NO_CLICK, UNCLICKED, ALL_CLICKED = range(7)
DROP_REASONS = {
    SHORT_HISTORY: "fewer earlier events than --min-history",
    REPEAT: "the user had the item before",
    NO_NEGATIVE: "nothing else to show",
    NO_CLICK: "nothing clicked",
}


class Events(NamedTuple):
    """Events by user, then time, then item, each (user, item, time) once."""

    item: Array  # [E] int32
    time: Array  # [E] int64
    by_item: (
        Array  # [E] int32: each user's events by item, then time, counted from the user's first
    )
    first: Array  # [U + 1] int64: a user's events are first[u] to first[u + 1]


# ---- compiled: a page after another --------------------------------------------------------------


@njit(cache=True, nogil=True)
def mix(x):  # type: ignore[no-untyped-def]
    """The finaliser of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True)
def _below(state, n):  # type: ignore[no-untyped-def]
    """A number from 0 to n - 1; `state` [1] uint64 moves on."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    return np.int64(np.float64(mix(state[0]) >> np.uint64(11)) * (2.0**-53) * n)


@njit(cache=True, nogil=True)
def _seed(state, seed, page):  # type: ignore[no-untyped-def]
    state[0] = mix(np.uint64(seed) + mix(np.uint64(page) + np.uint64(0x9E3779B97F4A7C15)))


@njit(cache=True, nogil=True)
def _before(times, start, end, time):  # type: ignore[no-untyped-def]
    """The first of the sorted times[start:end] that is not before `time`."""
    while start < end:
        middle = (start + end) // 2
        if times[middle] < time:
            start = middle + 1
        else:
            end = middle
    return start


@njit(cache=True, nogil=True)
def _first_time(events, user, item):  # type: ignore[no-untyped-def]
    """When the user first had the item; the largest int64 if never."""
    first = events.first[user]
    start, end = first, events.first[user + 1]
    while start < end:
        middle = (start + end) // 2
        if events.item[first + events.by_item[middle]] < item:
            start = middle + 1
        else:
            end = middle
    if start < events.first[user + 1] and events.item[first + events.by_item[start]] == item:
        return events.time[first + events.by_item[start]]
    return np.int64(0x7FFFFFFFFFFFFFFF)


@njit(cache=True, nogil=True)
def _take(page, count, item, events, user, time):  # type: ignore[no-untyped-def]
    """Adds the item unless it is on the page or the user's own up to this time; the new count."""
    for i in range(count):
        if page[i] == item:
            return count
    if _first_time(events, user, item) <= time:
        return count
    page[count] = item
    return count + 1


@njit(cache=True, nogil=True)
def _swapped(swaps, count, place):  # type: ignore[no-untyped-def]
    """What lies at a place of a list that began as 0, 1, 2, ..., of which `swaps` [count] holds the
    places that changed."""
    for i in range(count - 1, -1, -1):
        if swaps[i, 0] == place:
            return swaps[i, 1]
    return place


@njit(cache=True, nogil=True)
def _draw_live(page, count, size, offers, group, events, user, time, state):  # type: ignore[no-untyped-def]
    """Fills the page from a group's items on offer, each equally likely, without replacement; the
    new count."""
    # Most often some of those that have come are on offer still; each that is met is equally
    # likely, so nothing changes if it is not.
    left, come = come_by(offers, group, time)
    for _ in range(_GUESSES_PER_ITEM * size if come > left else 0):
        if count == size:
            return count
        item = offers.items[left + _below(state, come - left)]
        if offers.last_of[item] >= time:
            count = _take(page, count, item, events, user, time)
    n, gone, come = on_offer(offers, group, time)
    tries = min(n, _TRIES + _TRIES_PER_ITEM * size)
    swaps = np.empty(
        (tries, 2), np.int64
    )  # what was drawn changes places with the first that was not
    for drawn in range(tries):
        if count == size:
            break
        place = drawn + _below(state, n - drawn)
        k = _swapped(swaps, drawn, place)
        swaps[drawn, 0], swaps[drawn, 1] = place, _swapped(swaps, drawn, drawn)
        item = kth_on_offer(offers, group, gone, come, k)
        count = _take(page, count, item, events, user, time)
    return count


@njit(cache=True, nogil=True)
def _draw_popular(page, count, size, seen, past, events, user, time, state):  # type: ignore[no-untyped-def]
    """Fills the page with the items of past events, each event equally likely; the new count."""
    if len(past):
        for _ in range(_TRIES + _TRIES_PER_ITEM * size):
            if count == size:
                break
            item = past[_below(state, len(past))]
            if seen[item, 0] <= time <= seen[item, 1]:
                count = _take(page, count, item, events, user, time)
    return count


@njit(cache=True, nogil=True)
def make_pages(  # type: ignore[no-untyped-def]
    rows,
    users,
    base,
    before,
    events,
    seen,
    offers,
    kin,
    pool,
    kind,
    size,
    min_history,
    max_history,
    drop_repeats,
    seed,
    history,
    items,
    clicked,
    counts,
    status,
):
    """A page for each of some events: a function of the seed, the event, its user's events and the
    items on offer.

    Args:
        rows, users: [n] the events, and their users, as rows of `events`.
        base: the row that events.item[0] has among those of all users.
        before: [n] int64: events of all users strictly before each; used by kind 1.
        seen: [I, 2] int64: from when until when an item is on offer.
        offers: the same, in one group.
        kin: the same, in groups by category; used by kind 2.
        pool: [E] items of all events by time, then row; used by kind 1.
        kind: the place in NEGATIVES.
        size: items of a page.
        history: [n, 2] out: rows of the events of all users.
        items, clicked: [n * size] out: the pages kept, without gaps.
        counts, status: [n] out: items of each page (0 where it is not kept); what became of it.

    Returns:
        How many items were written.
    """
    state, page = np.zeros(1, np.uint64), np.zeros(size, np.int32)
    written = 0
    for i in range(len(rows)):
        row, user = rows[i], users[i]
        item, time = events.item[row], events.time[row]
        counts[i] = 0
        first = events.first[user]
        end = _before(events.time, first, row, time)
        if end - first < min_history:
            status[i] = SHORT_HISTORY
            continue
        if drop_repeats and _first_time(events, user, item) < time:
            status[i] = REPEAT
            continue
        _seed(state, seed, base + row)
        page[0] = item
        count = 1
        if kind == 1:
            past = pool[: before[i]]
            count = _draw_popular(page, count, size, seen, past, events, user, time, state)
        else:
            if kind == 2 and kin.group[item] >= 0:
                count = _draw_live(
                    page, count, size, kin, kin.group[item], events, user, time, state
                )
            count = _draw_live(page, count, size, offers, 0, events, user, time, state)
        if count < 2:
            status[i] = NO_NEGATIVE
            continue
        place = _below(state, count)  # of the clicked item, which changes places with the one there
        page[0], page[place] = page[place], page[0]
        items[written : written + count] = page[:count]
        clicked[written : written + count] = 0
        clicked[written + place] = 1
        written += count
        counts[i], status[i] = count, KEPT
        history[i, 0], history[i, 1] = base + max(first, end - max_history), base + end
    return written


@njit(cache=True, nogil=True)
def given_pages(  # type: ignore[no-untyped-def]
    bounds,
    user,
    key,
    item,
    time,
    click,
    size,
    min_history,
    max_history,
    keep_unclicked,
    seed,
    history,
    page_user,
    page_time,
    items,
    clicked,
    weight,
    counts,
    status,
):
    """Pages that were shown, from rows of items that are grouped by page.

    A page is cut to `size` items: all that were clicked and a sample of the others, at least one,
    in the order shown. An item shown twice counts once, clicked if either was. The page's time is
    that of its earliest row.

    Args:
        bounds: [n + 1] the rows of each page.
        user, key, item, time, click: [rows]; the user as one of `events`, `key` a uint64 of the
            page that seeds its sample.
        history: [n, 2] of all users' events those that each page may have; out: its newest
            `max_history`.
        keep_unclicked: pages of which nothing or everything was clicked stay.
        weight: out, as `items`: of an item that was not clicked, how many such items of its page it
            stands for; 1 for the clicked.
        page_user, page_time, items, clicked, counts, status: out, as in `make_pages`.

    Returns:
        How many items were written.
    """
    state = np.zeros(1, np.uint64)
    written = 0
    for i in range(len(bounds) - 1):
        start, shown = bounds[i], 0
        page_user[i], page_time[i], counts[i] = user[start], time[start], 0
        # Distinct items go to `out`, which has room for all rows of the page.
        out, mark = items[written:], clicked[written:]
        clicks = 0
        for r in range(start, bounds[i + 1]):
            page_time[i] = min(page_time[i], time[r])
            place = shown
            for k in range(shown):
                if out[k] == item[r]:
                    place = k
                    break
            if place == shown:
                out[shown], mark[shown] = item[r], 0
                shown += 1
            if click[r] and not mark[place]:
                mark[place] = 1
                clicks += 1
        length = history[i, 1] - history[i, 0]
        if clicks == 0 and not keep_unclicked:
            status[i] = NO_CLICK
        elif clicks == shown and not keep_unclicked:
            status[i] = NO_NEGATIVE
        elif length < min_history:
            status[i] = SHORT_HISTORY
        else:
            _seed(state, seed, key[start])
            others, wanted = shown - clicks, max(size - clicks, 1)
            stand_for = max(others / wanted, 1.0)
            kept = 0
            for k in range(
                shown
            ):  # selection sampling: each of the others is equally likely to stay
                stays = mark[k] == 1
                if not stays:
                    stays = _below(state, others) < wanted
                    others -= 1
                    wanted -= stays
                if stays:
                    out[kept], mark[kept] = out[k], mark[k]
                    weight[written + kept] = 1.0 if mark[k] else stand_for
                    kept += 1
            written += kept
            counts[i] = kept
            status[i] = UNCLICKED if clicks == 0 else ALL_CLICKED if clicks == shown else KEPT
            history[i, 0] = history[i, 1] - min(length, max_history)
    return written


@njit(cache=True, nogil=True)
def _events_before(bounds, user, time, base, events, out):  # type: ignore[no-untyped-def]
    for i in range(len(bounds) - 1):
        when = time[bounds[i] : bounds[i + 1]].min()
        first, last = events.first[user[bounds[i]]], events.first[user[bounds[i]] + 1]
        out[i, 0], out[i, 1] = base + first, base + _before(events.time, first, last, when)


# ---- tables of pages -----------------------------------------------------------------------------


class PageViews(NamedTuple):
    """Page views that are kept, and what became of all."""

    kept: Array  # [n] which of the candidates
    user: Array  # [kept] as a row of the events' `first`
    time: Array  # [kept]
    history: Array  # [kept, 2] rows of the events of all users
    counts: Array  # [kept] items
    shown: list[Array]  # [items] of all pages: item, whether clicked, and of given pages weight
    status: Array  # [n]
    ids: PageIds = PageIds()  # of given pages

    @property
    def cut(self) -> int:
        """Pages of which some items were left out."""
        if len(self.shown) < 3 or not len(self.counts):
            return 0
        starts = np.cumsum(self.counts, dtype=np.int64) - self.counts
        return int(np.count_nonzero(np.maximum.reduceat(self.shown[2], starts) > 1))


class Market(NamedTuple):
    """From when until when items are on offer, and what made pages draw from that."""

    seen: Array  # [I, 2] int64
    offers: Offers
    kin: Offers  # by category, if that is asked for


def market_of(
    table: pl.DataFrame,
    first_seen: Array,
    last_seen: Array,
    options: PrepareOptions,
    ticks: int = 1,
) -> Market:
    # Most items of a long tail are sold once: they were on offer for longer than that second.
    margin = round(86_400 * options.live_days) * ticks
    first = first_seen - np.where(table["first_seen"].is_null(), margin, 0)
    last = last_seen + np.where(table["last_seen"].is_null(), margin, 0)
    offers = offers_of(first, last)
    kin = offers
    if options.negatives == "category":
        if table["category"].is_null().all():
            raise ValueError(
                "negatives: category expects items with a category, "
                f"got none of {len(table):,} with one"
            )
        group = table["category"].rank("dense").cast(pl.Int64).fill_null(0).to_numpy() - 1
        kin = offers_of(first, last, group)
    return Market(np.stack([first, last], 1), offers, kin)


def pages_around(
    rows: Array,
    users: Array,
    base: int,
    before: Array,
    events: Events,
    market: Market,
    pool: Array,
    options: PrepareOptions,
) -> PageViews:
    """A page for each of some events; arguments as those of `make_pages`."""
    n, size = len(rows), options.page_size
    history = np.zeros((n, 2), np.int64)
    shown, clicked = np.zeros(n * size, np.int32), np.zeros(n * size, np.uint8)
    counts, status = np.zeros((2, n), np.int32)
    written = make_pages(
        rows,
        users,
        base,
        before,
        events,
        *market,
        pool,
        NEGATIVES.index(options.negatives),
        size,
        options.min_history,
        options.max_history,
        options.repeats == "drop",
        options.seed,
        history,
        shown,
        clicked,
        counts,
        status,
    )
    kept = ~np.isin(status, list(DROP_REASONS))
    return PageViews(
        kept,
        users[kept],
        events.time[rows[kept]],
        history[kept],
        counts[kept],
        [shown[:written], clicked[:written]],
        status,
    )


def page_bounds(rows: Mapping[str, Array]) -> Array:
    """[pages + 1] where pages begin in rows that are by user and page."""
    total = len(rows["user"])
    new = np.ones(total, bool)
    new[1:] = np.any([rows[k][1:] != rows[k][:-1] for k in ("user", "page")], axis=0)
    return np.append(np.flatnonzero(new), total)


def before_pages(rows: Mapping[str, Array], base: int, events: Events) -> Array:
    """[pages, 2] the events of each page's user before it, of rows as those of `pages_shown`;
    `base`: the row that events.item[0] has among those of all users."""
    bounds = page_bounds(rows)
    out = np.zeros((len(bounds) - 1, 2), np.int64)
    _events_before(bounds, rows["user"], rows["time"], base, events, out)
    return out


def pages_shown(
    rows: Mapping[str, Array], history: Array, options: PrepareOptions, ticks: int = 1
) -> PageViews:
    """Pages, by user and page, of rows shown (user, page, item, time, clicked, so sorted).
    `history` [pages, 2]: rows of all users' events, of which each has the newest; `ticks` of a
    second in times, 0: they only order."""
    bounds, total = page_bounds(rows), len(rows["user"])
    n = len(bounds) - 1
    user, time = np.zeros(n, np.int32), np.zeros(n, np.int64)
    shown = [np.zeros(total, kind) for kind in (np.int32, np.uint8, np.float32)]
    counts, status = np.zeros((2, n), np.int32)
    written = given_pages(
        bounds,
        *(rows[c] for c in ("user", "page", "item", "time", "clicked")),
        options.page_size,
        options.min_history,
        options.max_history,
        options.keep_unclicked,
        options.seed,
        history,
        user,
        time,
        *shown,
        counts,
        status,
    )
    kept = ~np.isin(status, list(DROP_REASONS))
    return PageViews(
        kept,
        user[kept],
        time[kept],
        history[kept],
        counts[kept],
        [column[:written] for column in shown],
        status,
        page_ids_of(rows, bounds, ticks),
    )


def by_item(user: Array, item: Array) -> Array:
    """[n] each user's events by item, then time, counted from the user's first; for sorted events
    of whole users."""
    key = user.astype(np.int64) << 32 | item
    return np.argsort(key, kind="stable") - np.searchsorted(user, user)


def count_statuses(status: Array) -> Counter[int]:
    return Counter(dict(enumerate(np.bincount(status, minlength=1).tolist())))
