"""What both engines of `prepare` do: events of some users in, pages out; then splits and report."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl

from ... import __version__
from ...locations import Location
from ..dataset import SPLITS, write_json, write_manifest
from ..read import truth
from ..read.scan import some
from ..read.times import SECOND
from ..storage import join
from .layouts import Source
from .offers import Offers, offers_of
from .options import PrepareOptions, microseconds
from .page_ids import PageIds, look
from .pages import (
    ALL_CLICKED,
    NEGATIVES,
    NO_CLICK,
    NO_NEGATIVE,
    REPEAT,
    SHORT_HISTORY,
    UNCLICKED,
    Events,
    given_pages,
    make_pages,
)

Array = npt.NDArray
log = logging.getLogger(__name__)

FATES = {
    SHORT_HISTORY: "fewer earlier events than --min-history",
    REPEAT: "the user had the item before",
    NO_NEGATIVE: "nothing else to show",
    NO_CLICK: "nothing clicked",
}


# ---- pages ---------------------------------------------------------------------------------------


class Pages(NamedTuple):
    """Pages that are kept, and what became of all."""

    kept: Array  # [n] which of the candidates
    user: Array  # [kept] as a row of the events' `first`
    time: Array  # [kept]
    history: Array  # [kept, 2] rows of the events of all users
    counts: Array  # [kept] items
    shown: list[Array]  # [items] of all pages: item, whether clicked, and of given pages weight
    fate: Array  # [n]
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
) -> Pages:
    """A page for each of some events; arguments as those of `make_pages`."""
    n, size = len(rows), options.page_size
    history = np.zeros((n, 2), np.int64)
    shown, clicked = np.zeros(n * size, np.int32), np.zeros(n * size, np.uint8)
    counts, fate = np.zeros((2, n), np.int32)
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
        fate,
    )
    kept = ~np.isin(fate, list(FATES))
    return Pages(
        kept,
        users[kept],
        events.time[rows[kept]],
        history[kept],
        counts[kept],
        [shown[:written], clicked[:written]],
        fate,
    )


def page_bounds(rows: Mapping[str, Array]) -> Array:
    """[pages + 1] where pages begin in rows that are by user and page."""
    total = len(rows["user"])
    new = np.ones(total, bool)
    new[1:] = np.any([rows[k][1:] != rows[k][:-1] for k in ("user", "page")], axis=0)
    return np.append(np.flatnonzero(new), total)


def pages_shown(
    rows: Mapping[str, Array],
    base: int,
    events: Events,
    options: PrepareOptions,
    ticks: int = 1,
) -> Pages:
    """Pages, by user and page, of rows shown (user, page, item, time, clicked, so sorted)."""
    bounds, total = page_bounds(rows), len(rows["user"])
    n = len(bounds) - 1
    user, time, history = np.zeros(n, np.int32), np.zeros(n, np.int64), np.zeros((n, 2), np.int64)
    shown = [np.zeros(total, kind) for kind in (np.int32, np.uint8, np.float32)]
    counts, fate = np.zeros((2, n), np.int32)
    written = given_pages(
        bounds,
        *(rows[c] for c in ("user", "page", "item", "time", "clicked")),
        base,
        events,
        options.page_size,
        options.min_history,
        options.max_history,
        options.keep_unclicked,
        options.seed,
        user,
        time,
        history,
        *shown,
        counts,
        fate,
    )
    kept = ~np.isin(fate, list(FATES))
    return Pages(
        kept,
        user[kept],
        time[kept],
        history[kept],
        counts[kept],
        [column[:written] for column in shown],
        fate,
        look(rows, bounds, ticks),
    )


def by_item(user: Array, item: Array) -> Array:
    """[n] each user's events by item, then time, counted from the user's first; for sorted events
    of whole users."""
    key = user.astype(np.int64) << 32 | item
    return np.argsort(key, kind="stable") - np.searchsorted(user, user)


# ---- splits and report ---------------------------------------------------------------------------


def split_bounds(
    times: Sequence[int] | Array, options: PrepareOptions, ticks: int = 1
) -> list[int]:
    """The first page of validation, the first of test, and the number of pages; `times` is sorted.
    Never inside a timestamp."""
    n = len(times)
    if options.validation_from and options.test_from:
        dates = (("validation_from", options.validation_from), ("test_from", options.test_from))
        cuts = [-(-microseconds(*date) * ticks // SECOND) for date in dates]  # the next tick
    else:
        test = round(n * (1 - options.test_share))
        validation = round(n * (1 - options.test_share - options.validation_share))
        # A share of 0 is after the end.
        cuts = [int(times[i]) if i < n else int(times[-1]) + 1 for i in (validation, test)]
    return [*(bisect_left(times, cut) for cut in cuts), n]


def say_page_ids(
    seen: PageIds, fates: Mapping[int, int], user_of: Callable[[int], str]
) -> list[str]:
    """Logs and gives what there is to say about the ids of given pages."""
    notes = seen.notes(user_of, sum(fates.values()))
    for text in notes:
        log.warning("%s", text)
    return notes


def splits_of(
    times: Sequence[int] | Array, dropped: dict[str, int], options: PrepareOptions, ticks: int = 1
) -> dict[str, list[int]]:
    """First page and end of each split."""
    if not len(times):
        raise ValueError(f"pages: expected at least one, got none; dropped: {dropped}")
    bounds = [0, *split_bounds(times, options, ticks)]
    if not bounds[1]:
        raise ValueError(
            f"splits: expected pages to train on, got none before {_iso(times[0] // ticks)}: all "
            f"{len(times)} pages are in validation or test"
        )
    splits = {name: bounds[i : i + 2] for i, name in enumerate(SPLITS)}
    for name, (start, end) in splits.items():
        if start == end:
            log.warning("%s: no page, the times are too coarse or the share is 0", name)
    return splits


def _iso(time: int) -> str:
    return str(np.datetime64(int(time), "s")) + "Z"


@dataclass
class Outcome:
    """What became of the rows and pages, for the report."""

    rows: dict[str, Counter[str]]  # by table of the source
    users: int
    items: int
    images: dict[str, Any] | None
    events: int
    times: Sequence[int] | Array  # of the pages, sorted
    page_items: int
    splits: dict[str, list[int]]
    lengths: Array  # [max_history + 1] pages by the length of their history
    cut: int
    fates: Counter[int] = field(default_factory=Counter)
    ticks: int = 1  # of a second, in which `times` are
    notes: Sequence[str] = ()
    page_ids: dict[str, int] | None = None  # of given pages

    def report(self, options: PrepareOptions) -> dict[str, Any]:
        pages = len(self.times)
        special = {"unclicked": self.fates[UNCLICKED], "all_clicked": self.fates[ALL_CLICKED]}
        return {
            **{
                n: {**of, "kept": self.events} if n == "events" else of
                for n, of in counts_of(self.rows).items()
            },
            "users": self.users,
            "items": self.items,
            "images": self.images,
            "pages": {
                "candidates": sum(self.fates.values()),
                "kept": pages,
                "dropped": dropped(self.fates),
                "items": self.page_items,
                "median_history": int(np.searchsorted(np.cumsum(self.lengths), (pages + 1) // 2)),
                **(special if options.keep_unclicked else {}),
                **({"cut": self.cut} if self.cut else {}),
                **({"page_ids": self.page_ids} if self.page_ids else {}),
            },
            "splits": {
                name: {
                    "pages": b - a,
                    "from": _iso(self.times[a] // self.ticks),
                    "to": _iso(self.times[b - 1] // self.ticks),
                }
                if b > a
                else {"pages": 0}
                for name, (a, b) in self.splits.items()
            },
            "notes": list(self.notes),
        }


def write_about(
    folder: Location,
    source: Source,
    images: Location | None,
    options: PrepareOptions,
    outcome: Outcome,
    shards: Mapping[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Writes report.json, manifest.json and dataset.json; the report."""
    report = outcome.report(options)
    if source.unreadable:
        report["items_times_unreadable"] = dict(source.unreadable)
    about = {
        "source": {
            "layout": source.layout,
            "files": [str(f) for f in source.files],
            "images": str(images) if images else None,
        },
        "pages": "made" if source.impressions is None else "given",
        "options": asdict(options),
        "splits": outcome.splits,
        "counts": {
            "users": outcome.users,
            "items": outcome.items,
            "events": outcome.events,
            "pages": len(outcome.times),
            "page_items": outcome.page_items,
        },
        "courier_fast": __version__,
    }
    write_json(join(folder, "report.json"), report)
    write_manifest(folder, about, shards)
    return report


def dropped(fates: Mapping[int, int]) -> dict[str, int]:
    """Pages that are not kept, by reason."""
    return {FATES[f]: n for f, n in sorted(fates.items()) if f in FATES and n}


def count_fates(fate: Array) -> Counter[int]:
    return Counter(dict(enumerate(np.bincount(fate, minlength=1).tolist())))


def nothing_read(files: Sequence[Location], rows: Mapping[str, Counter[str]]) -> str:
    """That no row can be used, and why."""
    read = sum(of["read"] for of in rows.values())
    left = [of for table in rows.values() for of in table.items() if of[1]]
    why = ", ".join(f"{n:,} {k}" for k, n in left if k not in ("read", truth.UNKNOWN))
    where = some([str(f) for f in files]) or "the source"
    why = f" ({why})" if why else ""
    return f"{where}: expected events, got none that can be used of {read:,} rows{why}"


def counts_of(rows: Mapping[str, Counter[str]]) -> dict[str, Any]:
    """Rows of the source's tables: read, and dropped by reason."""
    return {
        name: {
            "read": of["read"],
            **({truth.UNKNOWN: n} if (n := of[truth.UNKNOWN]) else {}),
            "dropped": {k: n for k, n in of.items() if k not in ("read", truth.UNKNOWN) and n},
        }
        for name, of in rows.items()
    }
