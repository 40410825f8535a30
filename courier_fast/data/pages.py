"""Pages from events: who had clicked what before, and what else was on offer.

Time runs forward in every kernel here, and a page sees only what its time allows: its history is its user's events strictly before it, and
a made page's negatives are items on offer at that time. Random numbers are a function of the seed and the page, so the result depends
neither on threads nor on how the work is cut into chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray

NEGATIVES = ("uniform", "popularity", "category")
# Draws for a page before it keeps fewer negatives: _TRIES + _TRIES_PER_ITEM * its size.
_TRIES, _TRIES_PER_ITEM = 100, 20

# What becomes of a page; the last two are kept, too.
KEPT, SHORT_HISTORY, REPEAT, NO_NEGATIVE, NO_CLICK, UNCLICKED, ALL_CLICKED = range(7)


class Events(NamedTuple):
    """Events by user, then time, then item, each (user, item, time) once."""

    item: Array  # [E] int32
    time: Array  # [E] int64
    by_item: (
        Array  # [E] int32: each user's events by item, then time, counted from the user's first
    )
    first: Array  # [U + 1] int64: a user's events are first[u] to first[u + 1]


class Live(NamedTuple):
    """The items on offer at a moment that moves forward, in groups: each group's are a prefix of its segment of `slots`."""

    first_seen: Array  # [I] int64
    last_seen: Array  # [I] int64
    by_first: Array  # [I] int32: items in order of first_seen
    by_last: Array  # [I] int32: items in order of last_seen
    cursor: Array  # [2] int64: how much of by_first has come, of by_last has gone
    group: Array  # [I] int32, -1 for none
    start: Array  # [G] int64: the group's segment of slots
    filled: Array  # [G] int64: the group's items on offer
    slots: Array  # [I] int32
    where: Array  # [I] int64: the item's place in slots, -1 while it is not on offer


def live_items(first_seen: Array, last_seen: Array, group: Array | None = None) -> Live:
    """No item on offer yet. `first_seen`, `last_seen` [I] int64 seconds, both included; `group` [I] int (-1: none; default: one group)."""
    items = len(first_seen)
    group = np.zeros(items, np.int32) if group is None else group.astype(np.int32)
    sizes = np.bincount(group[group >= 0], minlength=1)
    return Live(
        first_seen, last_seen,
        np.argsort(first_seen, kind="stable").astype(np.int32), np.argsort(last_seen, kind="stable").astype(np.int32),
        np.zeros(2, np.int64), group, np.cumsum(sizes) - sizes, np.zeros(len(sizes), np.int64),
        np.zeros(items, np.int32), np.full(items, -1, np.int64),
    )  # fmt: skip


@njit(cache=True, nogil=True)
def _advance(live, time):  # type: ignore[no-untyped-def]
    """Moves to `time`, which is not before the last one."""
    while live.cursor[0] < len(live.by_first):
        item = live.by_first[live.cursor[0]]
        if live.first_seen[item] > time:
            break
        live.cursor[0] += 1
        g = live.group[item]
        if g >= 0:
            live.where[item] = live.start[g] + live.filled[g]
            live.slots[live.where[item]] = item
            live.filled[g] += 1
    while live.cursor[1] < len(live.by_last):
        item = live.by_last[live.cursor[1]]
        if live.last_seen[item] >= time:
            break
        live.cursor[1] += 1
        g = live.group[item]
        if g >= 0:  # the last of the group takes its place
            live.filled[g] -= 1
            last = live.slots[live.start[g] + live.filled[g]]
            live.slots[live.where[item]] = last
            live.where[last] = live.where[item]
            live.where[item] = -1


@njit(cache=True, nogil=True)
def _mix(x):  # type: ignore[no-untyped-def]
    """The finaliser of SplitMix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, nogil=True)
def _below(state, n):  # type: ignore[no-untyped-def]
    """A number from 0 to n - 1; `state` [1] uint64 moves on."""
    state[0] += np.uint64(0x9E3779B97F4A7C15)
    return np.int64(np.float64(_mix(state[0]) >> np.uint64(11)) * (2.0**-53) * n)


@njit(cache=True, nogil=True)
def _seed(state, seed, page):  # type: ignore[no-untyped-def]
    state[0] = _mix(np.uint64(seed) + _mix(np.uint64(page) + np.uint64(0x9E3779B97F4A7C15)))


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
def _draw_live(page, count, size, live, group, events, user, time, state):  # type: ignore[no-untyped-def]
    """Fills the page from a group's items on offer, each equally likely; the new count."""
    start, n = live.start[group], live.filled[group]
    # Draws without replacement: what was drawn is swapped to the front, and the order in the segment means nothing.
    for drawn in range(min(n, _TRIES + _TRIES_PER_ITEM * size)):
        if count == size:
            break
        a, b = start + drawn, start + drawn + _below(state, n - drawn)
        item, other = live.slots[b], live.slots[a]
        live.slots[a], live.slots[b] = item, other
        live.where[other] = b
        live.where[item] = a
        count = _take(page, count, item, events, user, time)
    return count


@njit(cache=True, nogil=True)
def _draw_popular(page, count, size, live, past, events, user, time, state):  # type: ignore[no-untyped-def]
    """Fills the page with the items of past events, each event equally likely; the new count."""
    if len(past):
        for _ in range(_TRIES + _TRIES_PER_ITEM * size):
            if count == size:
                break
            item = past[_below(state, len(past))]
            if live.where[item] >= 0:
                count = _take(page, count, item, events, user, time)
    return count


@njit(cache=True, nogil=True)
def make_pages(  # type: ignore[no-untyped-def]
    rows, users, events, live, kin, pool, done, kind, size, min_history, max_history, drop_repeats, seed,
    history, items, clicked, counts, fate,
):  # fmt: skip
    """A page for each of some events, which go on in time where the last call ended.

    Args:
        rows, users: [n] the events and their users, by time.
        events, live: what was clicked; what is on offer (one group).
        kin: as live, in groups by category; used by kind 2.
        pool: [E] items of all events by time, at least up to the end of this chunk; used by kind 1.
        done: [3] int64: events before this chunk; the last time and how many events came before it. Carried from call to call.
        kind: the place in NEGATIVES.
        size: items of a page.
        history: [n, 2] out: rows of the events.
        items, clicked: [n * size] out: the pages kept, without gaps.
        counts, fate: [n] out: items of each page (0 where it is not kept); what became of it.

    Returns:
        How many items were written.
    """
    state, page = np.zeros(1, np.uint64), np.zeros(size, np.int32)
    written = 0
    for i in range(len(rows)):
        row, user = rows[i], users[i]
        item, time = events.item[row], events.time[row]
        if time != done[1] or done[0] + i == 0:
            done[1], done[2] = time, done[0] + i
        counts[i] = 0
        first = events.first[user]
        end = _before(events.time, first, row, time)
        if end - first < min_history:
            fate[i] = SHORT_HISTORY
            continue
        if drop_repeats and _first_time(events, user, item) < time:
            fate[i] = REPEAT
            continue
        _advance(live, time)
        _seed(state, seed, row)
        page[0] = item
        count = 1
        if kind == 1:
            count = _draw_popular(
                page, count, size, live, pool[: done[2]], events, user, time, state
            )
        else:
            if kind == 2:
                _advance(kin, time)
                if kin.group[item] >= 0:
                    count = _draw_live(
                        page, count, size, kin, kin.group[item], events, user, time, state
                    )
            count = _draw_live(page, count, size, live, 0, events, user, time, state)
        if count < 2:
            fate[i] = NO_NEGATIVE
            continue
        place = _below(state, count)  # of the clicked item, which changes places with the one there
        page[0], page[place] = page[place], page[0]
        items[written : written + count] = page[:count]
        clicked[written : written + count] = 0
        clicked[written + place] = 1
        written += count
        counts[i], fate[i] = count, KEPT
        history[i, 0], history[i, 1] = max(first, end - max_history), end
    done[0] += len(rows)
    return written


@njit(cache=True, nogil=True)
def given_pages(  # type: ignore[no-untyped-def]
    bounds, user, item, time, click, events, size, min_history, max_history, keep_unclicked, seed, number,
    page_user, page_time, history, items, clicked, weight, counts, fate,
):  # fmt: skip
    """Pages that were shown, from rows of items that are grouped by page.

    A page is cut to `size` items: all that were clicked and a sample of the others, at least one, in the order shown. An item shown
    twice counts once, clicked if either was. The page's time is that of its earliest row.

    Args:
        bounds: [n + 1] the rows of each page.
        user, item, time, click: [rows].
        keep_unclicked: pages of which nothing or everything was clicked stay.
        number: pages before these, which seeds the sample.
        weight: out, as `items`: of an item that was not clicked, how many such items of its page it stands for; 1 for the clicked.
        page_user, page_time, history, items, clicked, counts, fate: out, as in `make_pages`.

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
        first, last = events.first[user[start]], events.first[user[start] + 1]
        end = _before(events.time, first, last, page_time[i])
        if clicks == 0 and not keep_unclicked:
            fate[i] = NO_CLICK
        elif clicks == shown and not keep_unclicked:
            fate[i] = NO_NEGATIVE
        elif end - first < min_history:
            fate[i] = SHORT_HISTORY
        else:
            _seed(state, seed, number + i)
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
            fate[i] = UNCLICKED if clicks == 0 else ALL_CLICKED if clicks == shown else KEPT
            history[i, 0], history[i, 1] = max(first, end - max_history), end
    return written


@njit(cache=True, nogil=True)
def copy_items(starts, counts, column):  # type: ignore[no-untyped-def]
    """The rows of a column that are of some pages, one page after another."""
    out = np.empty(counts.sum(), column.dtype)
    at = 0
    for i in range(len(starts)):
        for k in range(starts[i], starts[i] + counts[i]):
            out[at] = column[k]
            at += 1
    return out
