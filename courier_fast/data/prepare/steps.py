"""The steps of `prepare`, as functions of tables: what one returns depends on its arguments alone,
so any process can run it, again where one died. plan.py has their order.

A table is a dict of columns, NumPy arrays or Arrow text. Rows of events carry codes of users and
items; what the codes mean goes with each table.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from numba import njit

from ...locations import Location
from ..dataset import SPLITS
from ..images.files import Paths
from ..read.times import SECOND
from ..tables import copy_items, write_images, write_shard
from . import histories
from .images import check_images
from .layouts import Source
from .options import PrepareOptions
from .pages import (
    Events,
    Market,
    PageViews,
    before_pages,
    by_item,
    count_statuses,
    page_bounds,
    pages_around,
    pages_shown,
)
from .rows import (
    SHARE,
    SPLIT,
    arrow_text,
    batches,
    buffers,
    clean,
    coded,
    known_users,
    pages_of_lists,
    past_items,
    sizes,
    time_columns,
)

Array = npt.NDArray
Columns = dict[str, Any]

_EVENT = ["user", "item", "time"]
_SHOWN = {
    "user": pl.Int32,
    "item": pl.Int32,
    "time": pl.Int64,
    "page": pl.UInt64,
    "clicked": pl.UInt8,
    "place": pl.Int64,
}
_LIST = ("list", "ends", "past")  # of rows with given histories: which list, and all lists
_SAMPLE = 1024  # rows of a part from which the bounds of the next parts are taken


# ---- ids -----------------------------------------------------------------------------------------


def search(ids: pa.Array, wanted: pa.Array) -> Array:
    """[wanted] how many of the sorted `ids` are less than each."""
    found: Array = _search(*buffers(ids), *buffers(wanted))
    return found


@njit(cache=True, nogil=True)
def _search(offsets, data, wanted_offsets, wanted):  # type: ignore[no-untyped-def]
    out = np.empty(len(wanted_offsets) - 1, np.int64)
    for i in range(len(out)):
        start, end = wanted_offsets[i], wanted_offsets[i + 1]
        low, high = 0, len(offsets) - 1
        while low < high:
            middle = (low + high) // 2
            a, b = offsets[middle], start
            while a < offsets[middle + 1] and b < end and data[a] == wanted[b]:
                a += 1
                b += 1
            if b < end and (a == offsets[middle + 1] or data[a] < wanted[b]):
                low = middle + 1
            else:
                high = middle
        out[i] = low
    return out


def union(*ids: pa.Array) -> pa.Array:
    """All ids, sorted."""
    return arrow_text(pl.concat([pl.Series("id", part, pl.String) for part in ids]).unique().sort())


# ---- from rows of the source to events by user ---------------------------------------------------


def read(
    frames: Sequence[pl.LazyFrame],
    table: str,
    source: Source,
    number: int,
    block: int,
    ticks: int = 1,
) -> Iterator[Any]:
    """Three for each block of `block` rows: those that can be used; the ids of its items; counts,
    and a sample of its users.

    A block has the same rows whenever it is read: Ray takes those that were there from one run, and
    the others from the next.
    """
    held: list[pl.DataFrame] = []
    size, limit = 0, block * SHARE
    for batch in chain.from_iterable(
        batches(frame, table, source, number + n) for n, frame in enumerate(frames)
    ):
        ends = size + np.cumsum(sizes(batch))
        while len(ends) and ends[-1] >= limit:
            cut = int(np.searchsorted(ends, limit)) + 1
            yield from _block(pl.concat([*held, batch[:cut]]), source, ticks)
            held, batch, ends = [], batch[cut:], ends[cut:] - ends[cut - 1]
        held.append(batch)
        size = int(ends[-1]) if len(ends) else 0
    if sum(map(len, held)):
        yield from _block(pl.concat(held), source, ticks)


def _block(batch: pl.DataFrame, source: Source, ticks: int) -> Iterator[Any]:
    counts: Counter[str] = Counter()
    if "item_id" not in batch.columns:
        yield from _lists_block(known_users(batch, counts), source, counts)
        return
    past = None
    if "history" in batch.columns:  # a list once, where rows of a page have it one after another
        past, first = batch["history"], batch["history"].rle_id()
        batch = batch.drop("history").with_columns(list=first)
    views = isinstance(batch["item_id"].dtype, pl.List)
    known = clean(batch, counts, ticks)
    user, users = coded(known["user_id"])
    rows: Columns = {"time": known["time"].to_numpy()}
    if "page" in known.columns:
        rows |= {n: known[n].to_numpy() for n in ("page", "clicked", "place")}
    ids, size = known["item_id"], len(known)
    if past is not None and source.histories is not None:
        used, which = np.unique(known["list"].to_numpy(), return_inverse=True)
        one = np.searchsorted(first.to_numpy(), used)  # the first row that has it
        ends, of_lists = past_items(past.gather(one), source.histories, "--history-column")
        ids = pl.concat([ids, of_lists])
        if not views and "page_id" not in batch.columns:
            rows["page"] = pages_of_lists(rows["page"], which, ends, of_lists)
        rows |= {"list": which.astype(np.int32), "ends": ends}
        size += len(of_lists) // SHARE
    item, items = coded(ids)
    rows = {"user": user, "item": item[: len(known)], **rows}
    if past is not None:
        rows["past"] = item[len(known) :]
    yield {"users": arrow_text(users), **rows}
    yield arrow_text(items)
    sample = arrow_text(users[_sampled(user)])
    yield {"counts": counts, "rows": len(known), "size": size, "users": sample}


def _lists_block(known: pl.DataFrame, source: Source, counts: Counter[str]) -> Iterator[Any]:
    """As `_block`, of users' histories."""
    assert source.histories is not None
    user, users = coded(known["user_id"])
    ends, of_lists = past_items(known["history"], source.histories, "histories")
    past, items = coded(of_lists)
    split = np.zeros(len(known), np.int64)
    if "split" in known.columns:
        split = known["split"].to_numpy()
    which = np.arange(len(known), dtype=np.int32)
    rows = {"user": user, "time": split, "list": which, "ends": ends, "past": past}
    yield {"users": arrow_text(users), **rows}
    yield arrow_text(items)
    size = len(known) + len(of_lists) // SHARE
    sample = arrow_text(users[_sampled(user)])
    yield {"counts": counts, "rows": len(known), "size": size, "users": sample}


def _sampled(column: Array) -> Array:
    return column[:: max(1, len(column) // _SAMPLE)]


def to_users(
    rows: Columns, items: pa.Array, ids: pa.Array, chosen: Array, bounds: pa.Array
) -> list[Any]:
    """The rows whose item stays, cut by ranges of users' ids; and how many there are, and their
    bytes.

    `ids`, `chosen`: [all items] sorted ids, and the row in the table of items, -1 where it does not
    stay. `bounds`: ids, sorted.
    """
    codes = chosen[search(ids, items)]
    item = codes[rows["item"]] if "item" in rows else np.zeros(len(rows["user"]), np.int32)
    past = codes[rows["past"]] if "past" in rows else None
    part = search(bounds, rows["users"])[rows["user"]]
    parts = len(bounds) + 1
    part[item < 0] = parts
    order = np.argsort(part.astype(np.uint16) if parts < 1 << 16 else part, kind="stable")
    ends = np.cumsum(np.bincount(part, minlength=parts + 1))
    others = [n for n in rows if n not in ("users", "user", "item", *_LIST)]
    out: list[Any] = []
    for b in range(parts):
        here = order[ends[b - 1] if b else 0 : ends[b]]
        used, user = np.unique(rows["user"][here], return_inverse=True)
        piece = {
            "users": rows["users"].take(pa.array(used)),
            "user": user.astype(np.int32),
            **({"item": item[here]} if "item" in rows else {}),
        }
        piece |= {n: rows[n][here] for n in others}
        if past is not None:
            piece |= _taken(rows["list"][here], rows["ends"], past)
        out.append(piece)
    return [*out, {"rows": int(ends[-2]), "bytes": sum(map(nbytes, out))}]


def _taken(which: Array, ends: Array, past: Array) -> Columns:
    """The lists that some rows have, `which` of all."""
    used, place = np.unique(which, return_inverse=True)
    counts = (ends[1:] - ends[:-1])[used]
    return {
        "list": place.astype(np.int32),
        "ends": np.concatenate([[0], np.cumsum(counts)]),
        "past": copy_items(ends[used], counts, past),
    }


def by_user(
    given: bool, options: PrepareOptions, *pieces: Columns
) -> tuple[Columns, Columns, Columns | None, Columns, Columns]:
    """The rows of some users: their ids, sorted; events by user, time and item, each once; rows
    shown by user and page; when items were seen; and counts, with a sample of when pages are."""
    of_pages = [p for p in pieces if "item" in p]
    of_lists = [p for p in pieces if "item" not in p]  # users' histories
    users = union(pieces[0]["users"][:0], *(p["users"] for p in of_pages))
    frames: dict[bool, list[pl.DataFrame]] = {False: [], True: []}
    lists = 0  # before those of a piece
    for piece in of_pages:
        user = search(users, piece["users"])[piece["user"]].astype(np.int32)
        columns = {n: c for n, c in piece.items() if n not in ("users", "ends", "past")}
        if "list" in piece:
            columns["list"] = columns["list"].astype(np.int64) + lists
            lists += len(piece["ends"]) - 1
        frames["page" in piece].append(pl.DataFrame({**columns, "user": user}))
    none = pl.DataFrame(schema=_SHOWN)
    in_rows = any("list" in piece for piece in of_pages)
    has_lists = in_rows or bool(of_lists)
    if in_rows:
        none = none.with_columns(list=pl.lit(0, pl.Int64))
    shown = pl.concat([none, *(f.select(none.columns) for f in frames[True])])
    rows = pl.concat([none.select(_EVENT), *(f.select(_EVENT) for f in frames[False])])
    pages: Columns | None = None
    time = rows["time"].to_numpy()[:0]
    if given:
        ordered = shown.sort("user", "page", "place", maintain_order=True)
        pages = columns_of(ordered.drop("place"))
        first = page_bounds(pages)[:-1]
        time = np.minimum.reduceat(pages["time"], first) if len(first) else time
    about: Columns = {"users": len(users), "again": 0}
    if has_lists:
        assert pages is not None
        of = histories.joined([p for p in pieces if "list" in p])
        if in_rows:
            which = pages.pop("list")
        else:
            which, of = _lists_of_users(pages, users, of_lists, of)
        of_users, about["lists"] = histories.of_pages(pages, which, of, options)
        in_lists = histories.spans(of, which, pages)
        seen = pl.concat([shown.select("item", "time"), in_lists])
    else:
        clicks = pl.concat([rows, shown.filter(clicked=1).select(_EVENT)])
        events = clicks.unique().sort("user", "time", "item")
        sizes = np.bincount(events["user"].to_numpy(), minlength=len(users))
        of_users = columns_of(events.drop("user"))
        of_users["first"] = np.concatenate([[0], np.cumsum(sizes)])
        seen = pl.concat([rows, shown.select(_EVENT)])
        about["again"] = len(clicks) - len(events)
        if not given:
            time = events["time"].to_numpy()
    span = seen.group_by("item").agg(first=pl.min("time"), last=pl.max("time"))
    places = _sampled(np.arange(len(time)))
    about |= {"events": len(of_users["item"]), "pages": len(time)}
    about |= {"time": time[places], "row": places}
    return {"user_id": users}, of_users, pages, columns_of(span), about


def _lists_of_users(
    pages: Columns, users: pa.Array, pieces: Sequence[Columns], of: histories.Lists
) -> tuple[Array, histories.Lists]:
    """[rows] the list of each row's user and split, the first of several; and all lists, with an
    empty one at the end for users that have none."""
    keys, lists, before = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
    for piece in pieces if len(users) else ():
        place = search(users, piece["users"])
        known = np.minimum(place, len(users) - 1)
        theirs = users.take(pa.array(known)).cast(pa.string())
        same = np.array(pc.equal(theirs, piece["users"].cast(pa.string())))
        user = np.where(same, known, -1)[piece["user"]]
        here = user >= 0
        keys.append((user * len(SPLITS) + piece["time"])[here])
        lists.append((np.arange(len(user)) + before)[here])
        before += len(user)
    key, first = np.unique(np.concatenate(keys), return_index=True)
    wanted = pages["user"].astype(np.int64) * len(SPLITS) + pages["time"] // SPLIT
    found = np.searchsorted(key, wanted)
    has = np.append(key, -1)[found] == wanted
    which = np.where(has, np.append(np.concatenate(lists)[first], 0)[found], before)
    return which, histories.Lists(np.append(of.ends, of.ends[-1]), of.item)


def columns_of(frame: pl.DataFrame) -> Columns:
    return {n: frame[n].to_numpy() for n in frame.columns}


def nbytes(columns: Columns) -> int:
    return sum(c.nbytes for c in columns.values())


def merge_spans(*spans: Columns) -> Columns:
    """When items were first and last seen."""
    frame = pl.concat([pl.DataFrame(s) for s in spans])
    return columns_of(frame.group_by("item").agg(pl.min("first"), pl.max("last")).sort("item"))


# ---- by time -------------------------------------------------------------------------------------


def _cuts(time: Array, row: Array, bounds: tuple[Array, Array]) -> Array:
    """Where rows in order of time, then row, are cut at some (time, row)."""
    cuts = [0]
    for moment, place in zip(*bounds, strict=True):
        low, high = np.searchsorted(time, moment, "left"), np.searchsorted(time, moment, "right")
        cuts.append(low + int(np.searchsorted(row[low:high], place)))
    return np.array([*cuts, len(time)])


def together(*pieces: Mapping[str, Array]) -> Columns:
    """One table of several."""
    return {n: np.concatenate([p[n] for p in pieces]) for n in pieces[0]}


def to_moments(events: Columns, base: int, bounds: tuple[Array, Array]) -> list[Any]:
    """Times and items of events, by time, cut at `bounds`; their bytes, and how many there are."""
    order = np.argsort(events["time"], kind="stable")
    columns = {n: events[n][order] for n in ("time", "item")}
    cuts = _cuts(columns["time"], order + base, bounds)
    out = [{n: c[a:b] for n, c in columns.items()} for a, b in pairwise(cuts)]
    return [*out, {"bytes": nbytes(columns), "rows": np.diff(cuts)}]


def moments(base: int, *pieces: Columns) -> tuple[Columns, Columns]:
    """Items in order of time, then row; the times there are, and the events before each, `base` of
    them before these."""
    events = together(*pieces)
    order = np.argsort(events["time"], kind="stable")
    times, counts = np.unique(events["time"], return_counts=True)
    # Where a moment is cut in two, its first part is met.
    before = base + np.cumsum(counts) - counts
    return {"item": events["item"][order]}, {"time": times, "before": before}


def pages_of_users(
    events: Columns,
    shown: Columns | None,
    bases: tuple[int, int, int],
    market: Market | None,
    pool: Columns | None,
    past: Columns | None,
    bounds: tuple[Array, Array],
    options: PrepareOptions,
    ticks: int = 1,
) -> list[Any]:
    """The pages of some users by time, cut at `bounds`; and what became of them. `bases`: users,
    events and candidates for pages before these."""
    of_user, of_event, of_page = bases
    if shown is not None and "start" in events:
        past_rows = np.stack([events["start"], events["end"]], 1) + of_event
        given = pages_shown(shown, past_rows, options, ticks)
        return [*_pieces(given, of_user, of_page, bounds), _about(given, of_user)]
    first = events["first"]
    users = np.repeat(np.arange(len(first) - 1), np.diff(first))
    order = by_item(users, events["item"]).astype(np.int32)
    of_users = Events(events["item"], events["time"], order, first)
    if shown is not None:
        pages = pages_shown(shown, before_pages(shown, of_event, of_users), options, ticks)
    else:
        assert market is not None
        before = np.zeros(0, np.int64)
        if past is not None:
            before = past["before"][np.searchsorted(past["time"], events["time"])]
        items = np.zeros(0, np.int32) if pool is None else pool["item"]
        rows = np.arange(len(users))
        pages = pages_around(rows, users, of_event, before, of_users, market, items, options)
    return [*_pieces(pages, of_user, of_page, bounds), _about(pages, of_user)]


def _about(pages: PageViews, of_user: int) -> dict[str, Any]:
    columns = (pages.time, pages.user.astype(np.int32), pages.history, pages.counts, *pages.shown)
    return {
        "statuses": count_statuses(pages.status),
        "cut": pages.cut,
        "ids": pages.ids.moved(of_user),
        "bytes": sum(c.nbytes for c in columns),
    }


def _pieces(
    pages: PageViews, of_user: int, of_page: int, bounds: tuple[Array, Array]
) -> Iterator[Columns]:
    order = np.argsort(pages.time, kind="stable")
    counts = pages.counts[order]
    starts = (np.cumsum(pages.counts, dtype=np.int64) - pages.counts)[order]
    columns = {
        "user": (pages.user[order] + of_user).astype(np.int32),
        "time": pages.time[order],
        "history_start": pages.history[order, 0],
        "history_end": pages.history[order, 1],
        "count": counts,
    }
    row = np.flatnonzero(pages.kept)[order] + of_page
    cuts = _cuts(columns["time"], row, bounds)
    names = ("item", "clicked", "weight")
    for a, b in pairwise(cuts):
        piece = {n: c[a:b] for n, c in columns.items()}
        for n, column in zip(names, pages.shown, strict=False):
            piece[n] = copy_items(starts[a:b], counts[a:b], column)
        yield piece


def by_time(options: PrepareOptions, *pieces: Columns) -> tuple[Columns, Columns, Columns]:
    """PageViews in order of time, whose items are counted from the first of these; their items; how
    many there are, and pages by length of history."""
    old = together(*pieces)
    order = np.argsort(old["time"], kind="stable")
    ends = np.cumsum(old["count"], dtype=np.int64)
    counts = old["count"][order]
    items: Columns = {
        n: copy_items((ends - old["count"])[order], counts, old[n])
        for n in ("item", "clicked", "weight")
        if n in old
    }
    pages = {n: old[n][order] for n in ("user", "time", "history_start", "history_end")}
    pages["pv_end"] = np.cumsum(counts, dtype=np.int64)
    pages["pv_start"] = pages["pv_end"] - counts
    length = pages["history_end"] - pages["history_start"]
    lengths = np.bincount(length, minlength=options.max_history + 1)
    return pages, items, {"pages": len(order), "items": len(items["item"]), "lengths": lengths}


def count_clicks(items: Columns, end: int) -> Columns:
    """Items clicked among the first `end` rows, and how often."""
    rows = items["item"][:end][items["clicked"][:end] == 1]
    found, clicks = np.unique(rows, return_counts=True)
    return {"item": found, "clicks": clicks}


def add_clicks(*counts: Columns) -> Columns:
    frame = pl.concat([pl.DataFrame(c) for c in counts])
    return columns_of(frame.group_by("item").agg(pl.sum("clicks")).sort("item"))


def ranks(pages: Columns, first: Array, last: Array) -> list[Array]:
    """How many of these pages, in order of time, are before each time of `first`, and up to each of
    `last`."""
    before = np.searchsorted(pages["time"], first, "left")
    return [before, np.searchsorted(pages["time"], last, "right")]


def add(*counts: list[Array]) -> list[Array]:
    return [np.sum(of, axis=0) for of in zip(*counts, strict=True)]


def cell(columns: Columns, name: str, row: int) -> int:
    return int(columns[name][row])


# ---- writing -------------------------------------------------------------------------------------


def write_rows(
    folder: Location,
    table: str,
    names: Sequence[str],
    shards: Sequence[tuple[int, int, int]],
    starts: Sequence[int],
    shifts: Sequence[int],
    *parts: Columns,
) -> list[dict[str, Any]]:
    """Writes some shards (number, first row, end), whose rows are in `parts`, of which each begins
    at a row of `starts`; columns pv_* are moved by `shifts`. With microsecond among the names, time
    is in microseconds; with order, the number of the row is its time."""
    entries, stored = [], [n for n in names if n not in ("microsecond", "order")]
    for number, first, end in shards:
        columns: Columns = {}
        for name in stored:
            pieces = []
            for part, start, shift in zip(parts, starts, shifts, strict=True):
                rows = part[name][max(first - start, 0) : max(end - start, 0)]
                pieces.append(rows + shift if name.startswith("pv_") else rows)
            if isinstance(pieces[0], np.ndarray):
                columns[name] = np.concatenate(pieces)
            else:
                columns[name] = pa.concat_arrays(pieces).cast(pa.string())
        if "order" in names:
            columns["time"] = np.arange(first, end)
        if "microsecond" in names:
            columns |= time_columns(columns["time"], SECOND)
        entries.append(write_shard(folder, table, number, columns))
    return entries


def usable_images(
    paths: Sequence[Paths | None], options: PrepareOptions
) -> tuple[pa.Array, Columns]:
    """The usable images of some files; height, width and bytes (0 without one) of each, and the
    reason where there is none."""
    found = list(check_images(paths, shrink=options.shrink, threads=1))
    images = pa.array([c.image for c in found if c.image is not None], pa.large_binary())
    return images, {
        "height": [c.height for c in found],
        "width": [c.width for c in found],
        "bytes": [len(c.image or b"") for c in found],
        "reason": [c.reason for c in found],
    }


def write_image_shard(
    folder: Location, number: int, ranges: Sequence[tuple[int, int]], *parts: pa.Array
) -> dict[str, Any]:
    """Writes a shard of some images of each part."""
    images = [
        image.as_py()
        for (a, b), part in zip(ranges, parts, strict=True)
        for image in part.slice(a, b - a)
    ]
    return write_images(folder, number, images)
