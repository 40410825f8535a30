"""`courier-fast prepare`: interactions, item metadata and an image folder -> the dataset folder of dataset.py.

Nothing that grows with the number of events is held in memory. Rows are read in batches, ids become codes, and the codes are spooled to
disk; they are sorted there in buckets of a few million, first by user, then by time. What stays in memory grows with users and items.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from numba import njit
from rich.console import Console
from rich.progress import track
from rich.table import Table

from .. import __version__
from ..files import sync
from .dataset import FORMAT, SPLITS, ImageStoreWriter, write_table
from .image_check import check_images, index_images
from .layouts import LAYOUTS, Columns, Source, generic
from .pages import (
    KEPT,
    NEGATIVES,
    NO_CLICK,
    NO_NEGATIVE,
    REPEAT,
    SHORT_HISTORY,
    Events,
    copy_items,
    given_pages,
    live_items,
    make_pages,
)

Array = npt.NDArray
log = logging.getLogger(__name__)

BATCH = 1 << 19  # rows that are read, or pages that are made, at once
BUCKET = 1 << 22  # rows that are sorted at once

EVENT = np.dtype([("user", np.int32), ("item", np.int32), ("time", np.int64)])
SHOWN = np.dtype([*EVENT.descr, ("page", np.uint64), ("clicked", np.uint8)])
AT = np.dtype([("time", np.int64), ("row", np.int64)])

FATES = {
    SHORT_HISTORY: "fewer earlier events than --min-history",
    REPEAT: "the user had the item before",
    NO_NEGATIVE: "nothing else to show",
    NO_CLICK: "nothing clicked",
}
NO_IMAGE = "item without a usable image"


@dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` does.

    Args:
        page_size: items of a made page, the clicked one included; the most of a given page (all clicked ones stay).
        negatives: for made pages: "uniform" over the items on offer at the time, "popularity" (an event drawn from all those before),
            "category" (the clicked item's, filled up uniformly).
        live_days: an item is on offer from so many days before its first event until so many after its last; where its first_seen and
            last_seen are given, those hold.
        min_history: earlier events that the user of a page needs.
        max_history: the most recent events that are a page's history.
        repeats: "drop" made pages whose clicked item the user had before, or "keep" them.
        validation_share, test_share: shares of the pages, the last ones in time; the cut is never inside a timestamp.
        validation_from, test_from: dates (ISO 8601, UTC) that cut instead.
        shrink: images whose short side is longer are scaled down to this many pixels; 0: bytes stay as they are.
        threads: threads that check images; 0: one for each core.
    """

    page_size: int = 10
    negatives: str = "uniform"
    live_days: float = 30.0
    min_history: int = 3
    max_history: int = 50
    repeats: str = "drop"
    validation_share: float = 0.1
    test_share: float = 0.1
    validation_from: str | None = None
    test_from: str | None = None
    shrink: int = 0
    seed: int = 0
    threads: int = 0
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.page_size < 2:
            raise ValueError(f"page_size: expected at least 2, got {self.page_size}")
        if self.negatives not in NEGATIVES:
            raise ValueError(f"negatives: expected one of {NEGATIVES}, got {self.negatives!r}")
        if self.repeats not in ("drop", "keep"):
            raise ValueError(f"repeats: expected 'drop' or 'keep', got {self.repeats!r}")
        for name, least in (("min_history", 1), ("max_history", 1), ("shrink", 0), ("seed", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        if not self.live_days >= 0:
            raise ValueError(f"live_days: expected at least 0, got {self.live_days}")
        shares = (self.validation_share, self.test_share)
        if min(shares) < 0 or sum(shares) >= 1:
            raise ValueError(
                f"validation_share, test_share: expected shares of 0 or more that leave something for train, got {shares}"
            )
        if (self.validation_from is None) != (self.test_from is None):
            raise ValueError("validation_from, test_from: expected both or neither")
        dates = [
            _epoch(name, date)
            for name in ("validation_from", "test_from")
            if (date := getattr(self, name)) is not None
        ]
        if dates != sorted(dates):
            raise ValueError(
                f"test_from: expected no date before {self.validation_from}, got {self.test_from}"
            )


def _epoch(name: str, date: str) -> int:
    try:
        moment = datetime.fromisoformat(date.replace("Z", "+00:00"))
    except ValueError:
        raise ValueError(f"{name}: expected a date such as 2020-09-01, got {date!r}") from None
    return int((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp())


def _iso(time: int) -> str:
    return str(np.datetime64(int(time), "s")) + "Z"


# ---- on disk --------------------------------------------------------------------------------------------------------


class Spool:
    """A column or records that grow on disk and are then mapped."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.path, self.dtype, self.rows = path, np.dtype(dtype), 0
        self._file = path.open("wb")

    def append(self, values: Array) -> None:
        np.ascontiguousarray(values, self.dtype).tofile(self._file)
        self.rows += len(values)

    def array(self) -> Array:
        """All rows so far, mapped."""
        self._file.flush()
        return np.memmap(self.path, self.dtype, "r") if self.rows else np.zeros(0, self.dtype)

    def chunks(self) -> Iterator[Array]:
        """All rows so far, read a batch at a time."""
        self._file.flush()
        with self.path.open("rb") as file:
            while len(rows := np.fromfile(file, self.dtype, BATCH)):
                yield rows

    def remove(self) -> None:
        self._file.close()
        self.path.unlink()


class Buckets:
    """Records in files by ranges of one of their fields: bucket b holds those from bounds[b - 1] on and below bounds[b], in order."""

    def __init__(self, folder: Path, dtype: np.dtype, field: str, bounds: Array) -> None:
        folder.mkdir()
        self._field, self._bounds = field, bounds
        self._spools = [Spool(folder / str(b), dtype) for b in range(len(bounds) + 1)]

    def add(self, records: Array) -> None:
        bucket = np.searchsorted(self._bounds, records[self._field], side="right")
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket, minlength=len(self._spools)))
        for spool, part in zip(self._spools, np.split(order, ends[:-1]), strict=True):
            if len(part):
                spool.append(records[part])

    def __iter__(self) -> Iterator[Array]:
        """Each bucket's records; its file is gone afterwards."""
        for spool in self._spools:
            records = np.array(spool.array())
            spool.remove()
            yield records


def by_time(times: Array, folder: Path) -> Iterator[Array]:
    """Rows of `times` (mapped) in order of time, then row: batches of int64."""
    count = -(-len(times) // BUCKET)
    sample = np.sort(times[:: max(1, len(times) // (256 * count or 1))])
    bounds = np.unique(sample[[len(sample) * b // count for b in range(1, count)]])
    buckets = Buckets(folder, AT, "time", bounds)
    for start in range(0, len(times), BATCH):
        part = np.zeros(min(BATCH, len(times) - start), AT)
        part["time"], part["row"] = (
            times[start : start + BATCH],
            np.arange(start, start + len(part)),
        )
        buckets.add(part)
    for records in buckets:
        rows = records["row"][np.argsort(records["time"], kind="stable")]
        for start in range(0, len(rows), BATCH):
            yield rows[start : start + BATCH]


# ---- reading --------------------------------------------------------------------------------------------------------


class Ids:
    """Ids as codes, in order of first use."""

    def __init__(self) -> None:
        self._kind = pl.Categorical(pl.Categories.random())
        # Polars forgets the codes when the last series that has some is gone.
        self._held = pl.Series("id", [], pl.String).cast(self._kind)
        self._parts: list[pl.Series] = [pl.Series("id", [], pl.String)]
        self.count = 0

    def codes(self, ids: pl.Series) -> Array:
        self._held = ids.cast(self._kind)
        codes = self._held.to_physical()
        new = pl.DataFrame({"id": ids, "code": codes}).filter(pl.col("code") >= self.count)
        new = new.unique("code").sort("code")
        self._parts.append(new["id"])
        self.count += len(new)
        return codes.to_numpy().astype(np.int32)

    def all(self) -> pl.Series:
        """[count] the ids by code."""
        ids = pl.concat(self._parts)
        codes = ids.cast(self._kind).to_physical().to_numpy()
        assert (codes == np.arange(self.count)).all()
        return ids


@dataclass
class Raw:
    """What was read, as codes."""

    users: Ids
    items: Ids
    events: Spool  # EVENT
    shown: Spool | None  # SHOWN
    counts: dict[str, Counter[str]]  # by table: rows by what became of them


def read(source: Source, folder: Path) -> Raw:
    """Spools the source's rows. Raises ValueError where its files cannot be read as what they should be."""
    if source.events is None and source.impressions is None:
        raise ValueError("source: expected events or impressions, got neither")
    given = source.impressions is not None
    shown = Spool(folder / "raw-shown", SHOWN) if given else None
    raw = Raw(Ids(), Ids(), Spool(folder / "raw-events", EVENT), shown, {})
    for name, frame, spool in (
        ("events", source.events, raw.events),
        ("impressions", source.impressions, shown),
    ):
        if frame is None or spool is None:
            continue
        counts = raw.counts[name] = Counter()
        columns = ["user_id", "item_id", "time"] + ["page_id", "clicked"] * (spool is shown)
        try:
            for batch in frame.select(columns).collect_batches(
                chunk_size=BATCH, maintain_order=True, engine="streaming"
            ):
                _spool(batch, spool, raw, counts)
        except pl.exceptions.PolarsError as error:
            files = ", ".join(str(f) for f in source.files) or "the source"
            raise ValueError(f"{files}: cannot be read: {error}") from error
    return raw


def _spool(batch: pl.DataFrame, spool: Spool, raw: Raw, counts: Counter[str]) -> None:
    names = [n for n in ("user_id", "item_id", "page_id") if n in batch.columns]
    counts["read"] += len(batch)
    known = batch.filter(pl.all_horizontal(pl.col(n).is_not_null() for n in names))
    counts["no user, item or page id"] += len(batch) - len(known)
    batch = known.filter(pl.col("time").is_not_null())
    counts["time missing or unreadable"] += len(known) - len(batch)
    records = np.zeros(len(batch), spool.dtype)
    records["user"] = raw.users.codes(batch["user_id"])
    records["item"] = raw.items.codes(batch["item_id"])
    records["time"] = batch["time"].to_numpy()
    if "page_id" in names:
        records["page"] = batch["page_id"].hash().to_numpy()
        records["clicked"] = batch["clicked"].fill_null(False).to_numpy()
    spool.append(records)


@njit(cache=True, nogil=True)
def _span(items, times, first, last):  # type: ignore[no-untyped-def]
    for i in range(len(items)):
        first[items[i]] = min(first[items[i]], times[i])
        last[items[i]] = max(last[items[i]], times[i])


# ---- items ----------------------------------------------------------------------------------------------------------


@dataclass
class Items:
    """The items that stay, in order of their ids."""

    table: pl.DataFrame  # item_id, category, and first_seen, last_seen where the source has them
    row: Array  # [codes] int32: the row of a code, -1 where the item does not stay
    missing: list[str]
    undecodable: dict[str, str]


def choose_items(
    raw: Raw, source: Source, images: Path | None, out: Path, options: PrepareOptions
) -> Items:
    """Joins the metadata, and with `images` writes images.arrow and leaves out the items without a usable one."""
    ids = pl.DataFrame({"item_id": raw.items.all()}).with_row_index("code").sort("item_id")
    extra = {
        "category": pl.String,
        "image": pl.String,
        "first_seen": pl.Int64,
        "last_seen": pl.Int64,
    }
    table = ids
    if source.items is not None:
        about = source.items.join(ids.lazy().select("item_id"), on="item_id", how="semi")
        found = about.collect(engine="streaming").unique(
            "item_id", keep="first", maintain_order=True
        )
        table = ids.join(found, on="item_id", how="left", maintain_order="left")
    table = table.with_columns(
        pl.lit(None, kind).alias(name) for name, kind in extra.items() if name not in table.columns
    )
    missing: list[str] = []
    undecodable: dict[str, str] = {}
    stays = np.ones(len(table), bool)
    if images is not None:
        names = table["item_id"].to_list()
        other = table["image"].to_list()
        paths = index_images(images, {*names, *(n for n in other if n is not None)})
        chosen = [paths.get(a) or paths.get(b) for a, b in zip(names, other, strict=True)]
        with ImageStoreWriter(out / "images.arrow") as store:
            checks = check_images(chosen, shrink=options.shrink, threads=options.threads)
            quiet = not sys.stderr.isatty()
            console = Console(stderr=True)
            for i, checked in enumerate(
                track(checks, "images", len(chosen), console=console, transient=True, disable=quiet)
            ):
                if checked.image is not None:
                    store.append(checked.image, checked.height, checked.width)
                    continue
                stays[i] = False
                if chosen[i] is None:
                    missing.append(names[i])
                else:
                    undecodable[names[i]] = checked.reason
        if not stays.any():
            raise ValueError(
                f"images: expected files under {images} called after items such as {', '.join(names[:3])}; of {len(names)} items, {len(missing)} have none and {len(undecodable)} one that cannot be decoded"
            )
    table = table.filter(stays)
    row = np.full(len(stays), -1, np.int32)
    row[table["code"].to_numpy()] = np.arange(len(table))
    return Items(table, row, missing, undecodable)


# ---- events ---------------------------------------------------------------------------------------------------------


@dataclass
class Sorted:
    """The events that stay, by user; the rows shown, in buckets by user; when each item was seen."""

    events: Events
    shown: Buckets | None
    user_ids: pl.Series
    first_seen: Array
    last_seen: Array


def sort_events(raw: Raw, items: Items, folder: Path) -> Sorted:
    """Sorts by user, then time, then item; an event that is there twice counts once."""
    sizes = np.zeros(raw.users.count, np.int64)
    for spool, name in ((raw.events, "events"), (raw.shown, "impressions")):
        for records in spool.chunks() if spool else ():
            stays = items.row[records["item"]] >= 0
            raw.counts[name][NO_IMAGE] += int((~stays).sum())
            sizes += np.bincount(records["user"][stays], minlength=len(sizes))
    users = (
        pl.DataFrame({"id": raw.users.all()}).with_row_index("code").filter(sizes > 0).sort("id")
    )
    codes = users["code"].to_numpy()
    user_row = np.zeros(len(sizes), np.int32)
    user_row[codes] = np.arange(len(codes))
    # Buckets of about BUCKET rows.
    ends = np.cumsum(sizes[codes])
    total = int(ends[-1]) if len(ends) else 0
    bounds = np.unique(np.searchsorted(ends, np.arange(BUCKET, total, BUCKET), side="right"))
    clicks = Buckets(folder / "events", EVENT, "user", bounds)
    shown = Buckets(folder / "shown", SHOWN, "user", bounds) if raw.shown else None
    first_seen = np.full(len(items.table), np.iinfo(np.int64).max)
    last_seen = np.full(len(items.table), np.iinfo(np.int64).min)
    for spool, buckets in ((raw.events, clicks), (raw.shown, shown)):
        for records in spool.chunks() if spool else ():
            records["item"] = items.row[records["item"]]
            records["user"] = user_row[records["user"]]
            records = records[records["item"] >= 0]
            _span(records["item"], records["time"], first_seen, last_seen)
            if buckets is not None:
                buckets.add(records)
            if spool is raw.shown:
                clicks.add(records[["user", "item", "time"]][records["clicked"] == 1].astype(EVENT))
        if spool:
            spool.remove()
    for name, pick, seen in (
        ("first_seen", np.fmin, first_seen),
        ("last_seen", np.fmax, last_seen),
    ):
        about = items.table[name]
        known = about.is_not_null().to_numpy()
        seen[known] = pick(seen[known], about.drop_nulls().to_numpy())

    item, time = Spool(folder / "item", np.int32), Spool(folder / "time", np.int64)
    by_item = Spool(folder / "by-item", np.int32)
    sizes = np.zeros(len(users), np.int64)
    for records in clicks:
        columns = {name: np.ascontiguousarray(records[name]) for name in EVENT.fields or ()}
        order = pl.DataFrame(columns).select(pl.arg_sort_by("user", "time", "item")).to_series()
        records = records[order.to_numpy()]
        again = np.zeros(len(records), bool)
        again[1:] = records[1:] == records[:-1]
        raw.counts.setdefault("events", Counter())["the same user, item and time again"] += int(
            again.sum()
        )
        records = records[~again]
        owner = records["user"]
        sizes += np.bincount(owner, minlength=len(sizes))
        start = np.searchsorted(owner, owner)
        item.append(records["item"])
        time.append(records["time"])
        key = owner.astype(np.int64) << 32 | records["item"]
        by_item.append(np.argsort(key, kind="stable") - start)
    first = np.concatenate([[0], np.cumsum(sizes)])
    events = Events(item.array(), time.array(), by_item.array(), first)
    return Sorted(events, shown, users["id"], first_seen, last_seen)


# ---- pages ----------------------------------------------------------------------------------------------------------


class PageSpools:
    """pages.arrow and page_items.arrow while they grow."""

    def __init__(self, folder: Path, name: str) -> None:
        names = ("time", "history_start", "history_end", "pv_start", "pv_end")
        kinds = {"user": np.int32, **dict.fromkeys(names, np.int64)}
        self._columns = {n: Spool(folder / f"{name}-{n}", kind) for n, kind in kinds.items()}
        self._item = Spool(folder / f"{name}-item", np.int32)
        self._clicked = Spool(folder / f"{name}-clicked", np.uint8)
        self.fates: Counter[int] = Counter()

    def append(
        self, user: Array, time: Array, history: Array, counts: Array, items: Array, clicked: Array
    ) -> None:
        """Adds pages; `items` and `clicked` have those of all of them, `counts` of each."""
        ends = self._item.rows + np.cumsum(counts, dtype=np.int64)
        values = (user, time, history[:, 0], history[:, 1], ends - counts, ends)
        for spool, column in zip(self._columns.values(), values, strict=True):
            spool.append(column)
        self._item.append(items)
        self._clicked.append(clicked)

    def columns(self) -> dict[str, Array]:
        """pages.arrow, mapped."""
        return {name: spool.array() for name, spool in self._columns.items()}

    def items(self) -> dict[str, Array]:
        """page_items.arrow, mapped."""
        return {"item": self._item.array(), "clicked": self._clicked.array()}

    def count_fates(self, fate: Array) -> Array:
        """Which pages are kept; counts them all."""
        self.fates.update(dict(enumerate(np.bincount(fate, minlength=1).tolist())))
        return fate == KEPT


def pages_of_events(
    sorted_: Sorted, items: Items, folder: Path, options: PrepareOptions
) -> PageSpools:
    """A page for each event, in order of time."""
    events = sorted_.events
    pages = PageSpools(folder, "made")
    # Most items of a long tail are sold once: they were on offer for longer than that second.
    margin = round(86_400 * options.live_days)
    first = sorted_.first_seen - np.where(items.table["first_seen"].is_null(), margin, 0)
    last = sorted_.last_seen + np.where(items.table["last_seen"].is_null(), margin, 0)
    live = live_items(first, last)
    category = items.table["category"]
    group = category.rank("dense").cast(pl.Int64).fill_null(0).to_numpy() - 1
    kind = NEGATIVES.index(options.negatives)
    kin = live_items(first, last, group) if kind == 2 else live
    total, size = len(events.item), options.page_size
    pool = np.zeros(0, np.int32)
    if kind == 1 and total:
        pool = np.memmap(folder / "pool", np.int32, "w+", shape=(total,))
    done = np.zeros(3, np.int64)
    buffers = (
        np.zeros((BATCH, 2), np.int64),
        np.zeros(BATCH * size, np.int32),
        np.zeros(BATCH * size, np.uint8),
    )
    for rows in by_time(events.time, folder / "by-time"):
        users = np.searchsorted(events.first, rows, side="right") - 1
        if kind == 1:
            pool[done[0] : done[0] + len(rows)] = events.item[rows]
        history, shown, clicked = buffers
        counts, fate = np.zeros((2, len(rows)), np.int32)
        written = make_pages(
            rows, users, events, live, kin, pool, done, kind, size, options.min_history, options.max_history,
            options.repeats == "drop", options.seed, history, shown, clicked, counts, fate,
        )  # fmt: skip
        kept = pages.count_fates(fate)
        pages.append(
            users[kept], events.time[rows[kept]], history[: len(rows)][kept], counts[kept],
            shown[:written], clicked[:written],
        )  # fmt: skip
    return pages


def pages_of_impressions(sorted_: Sorted, folder: Path, options: PrepareOptions) -> PageSpools:
    """The pages shown, in order of time."""
    unordered, number = PageSpools(folder, "given"), 0
    for records in sorted_.shown or ():
        # Stable: the items of a page stay in the order shown.
        records = records[np.lexsort((records["page"], records["user"]))]
        new = np.ones(len(records), bool)
        new[1:] = records[["user", "page"]][1:] != records[["user", "page"]][:-1]
        bounds = np.append(np.flatnonzero(new), len(records))
        n = len(bounds) - 1
        user, time, history = (
            np.zeros(n, np.int32),
            np.zeros(n, np.int64),
            np.zeros((n, 2), np.int64),
        )
        items, clicked = np.zeros(len(records), np.int32), np.zeros(len(records), np.uint8)
        counts, fate = np.zeros((2, n), np.int32)
        columns = [np.ascontiguousarray(records[c]) for c in ("user", "item", "time", "clicked")]
        written = given_pages(
            bounds, *columns, sorted_.events, options.page_size, options.min_history, options.max_history,
            options.seed, number, user, time, history, items, clicked, counts, fate,
        )  # fmt: skip
        kept = unordered.count_fates(fate)
        unordered.append(
            user[kept], time[kept], history[kept], counts[kept], items[:written], clicked[:written]
        )
        number += n
    pages = PageSpools(folder, "ordered")
    pages.fates = unordered.fates
    old, shown = unordered.columns(), unordered.items()
    for rows in by_time(old["time"], folder / "pages-by-time"):
        starts = old["pv_start"][rows]
        counts = old["pv_end"][rows] - starts
        items, clicked = copy_items(starts, counts, shown["item"], shown["clicked"])
        history = np.stack([old["history_start"][rows], old["history_end"][rows]], 1)
        pages.append(old["user"][rows], old["time"][rows], history, counts, items, clicked)
    return pages


def split_bounds(times: Array, options: PrepareOptions) -> list[int]:
    """The first page of validation, the first of test, and the number of pages; `times` is sorted. Never inside a timestamp."""
    n = len(times)
    if options.validation_from and options.test_from:
        cuts = [
            _epoch("validation_from", options.validation_from),
            _epoch("test_from", options.test_from),
        ]
    else:
        test = round(n * (1 - options.test_share))
        validation = round(n * (1 - options.test_share - options.validation_share))
        # A share of 0 is after the end.
        cuts = [int(times[i]) if i < n else int(times[-1]) + 1 for i in (validation, test)]
    return [*(int(i) for i in np.searchsorted(times, cuts)), n]


# ---- all of it ------------------------------------------------------------------------------------------------------


def prepare(
    out: Path,
    *,
    source: Source,
    images: Path | None = None,
    options: PrepareOptions | None = None,
) -> dict[str, Any]:
    """Writes the dataset folder `out` (see dataset.py) and gives its report.

    The folder appears when it is complete: until then there is `out`.partial-<pid>, which is removed again where something fails. Items
    that no event or page names are left out, and with `images` those without a usable one, before any page is made.

    Args:
        out: a folder that is not there yet, unless `options.overwrite`.
        source: from an importer of layouts.py, or of one's own.
        images: a folder of image files called after the items; None: a dataset without images.

    Raises:
        FileExistsError: `out` is there.
        FileNotFoundError: a file or folder is not.
        ValueError: columns or values that are not what they should be; nothing left to train on.
    """
    options = options or PrepareOptions()
    out = Path(os.path.abspath(out))
    if out.exists() and not options.overwrite:
        raise FileExistsError(f"{out} is there already; --overwrite replaces it")
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # in containers, a killed run had the same id
    partial.mkdir(parents=True)
    try:
        report = _write(partial, source, images, options)
        shutil.rmtree(partial / "scratch")
        sync(partial)
        if out.exists():
            old = out.with_name(f"{out.name}.old-{os.getpid()}")
            out.rename(old)
            partial.rename(out)
            shutil.rmtree(old)
        else:
            partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return report


def _write(
    folder: Path, source: Source, images: Path | None, options: PrepareOptions
) -> dict[str, Any]:
    scratch = folder / "scratch"
    scratch.mkdir()
    log.info("reading %s", ", ".join(str(f) for f in source.files) or "the source")
    raw = read(source, scratch)
    if not raw.items.count:
        raise ValueError(f"source: expected events, got none that can be read ({_counts(raw)})")
    log.info("items%s", f", images of {images}" if images else "")
    items = choose_items(raw, source, images, folder, options)
    log.info("sorting")
    sorted_ = sort_events(raw, items, scratch)
    log.info("pages")
    if source.impressions is not None:
        pages = pages_of_impressions(sorted_, scratch, options)
    else:
        pages = pages_of_events(sorted_, items, scratch, options)

    columns, shown = pages.columns(), pages.items()
    times = columns["time"]
    dropped = {FATES[f]: n for f, n in sorted(pages.fates.items()) if f != KEPT and n}
    if not len(times):
        raise ValueError(f"pages: expected at least one, got none; dropped: {dropped}")
    bounds = [0, *split_bounds(times, options)]
    splits = {name: bounds[i : i + 2] for i, name in enumerate(SPLITS)}
    if not bounds[1]:
        raise ValueError(
            f"splits: expected pages to train on, got none before {_iso(times[0])}: all {len(times)} pages are in validation or test"
        )
    for name, (start, end) in splits.items():
        if start == end:
            log.warning("%s: no page, the times are too coarse or the share is 0", name)
    log.info("writing")
    clicks = np.zeros(len(items.table), np.int64)
    lengths = np.zeros(options.max_history + 1, np.int64)
    train_end = int(columns["pv_end"][bounds[1] - 1])
    for start in range(0, train_end, BUCKET):
        part = slice(start, min(start + BUCKET, train_end))
        clicked = shown["item"][part][shown["clicked"][part] == 1]
        clicks += np.bincount(clicked, minlength=len(clicks))
    for start in range(0, len(times), BUCKET):
        part = slice(start, start + BUCKET)
        length = columns["history_end"][part] - columns["history_start"][part]
        lengths += np.bincount(length, minlength=len(lengths))
    write_table(folder / "users.arrow", {"user_id": _text(sorted_.user_ids)})
    write_table(
        folder / "items.arrow",
        {
            "item_id": _text(items.table["item_id"]),
            "category": _text(items.table["category"]),
            "clicks": clicks,
            "first_seen": sorted_.first_seen,
            "last_seen": sorted_.last_seen,
        },
    )
    events = sorted_.events
    write_table(folder / "events.arrow", {"item": events.item, "time": events.time})
    write_table(folder / "pages.arrow", columns)
    write_table(folder / "page_items.arrow", shown)

    report: dict[str, Any] = {
        **_counts(raw),
        "users": len(sorted_.user_ids),
        "items": len(items.table),
        "images": None
        if images is None
        else {
            "usable": len(items.table),
            "missing": items.missing,
            "undecodable": items.undecodable,
        },
        "pages": {
            "candidates": sum(pages.fates.values()),
            "kept": len(times),
            "dropped": dropped,
            "items": len(shown["item"]),
            "median_history": int(np.searchsorted(np.cumsum(lengths), (len(times) + 1) // 2)),
        },
        "splits": {
            name: {"pages": b - a, "from": _iso(times[a]), "to": _iso(times[b - 1])}
            if b > a
            else {"pages": 0}
            for name, (a, b) in splits.items()
        },
    }
    report["events"]["kept"] = len(events.item)
    about = {
        "format": FORMAT,
        "source": {"layout": source.layout, "files": [str(f) for f in source.files], "images": str(images) if images else None},
        "options": asdict(options),
        "splits": splits,
        "counts": {
            "users": report["users"],
            "items": report["items"],
            "events": report["events"]["kept"],
            "pages": len(times),
            "page_items": len(shown["item"]),
        },
        "courier_fast": __version__,
    }  # fmt: skip
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n")
    (folder / "dataset.json").write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n")
    return report


def _counts(raw: Raw) -> dict[str, Any]:
    return {
        name: {
            "read": counts["read"],
            "dropped": {k: n for k, n in counts.items() if k != "read" and n},
        }
        for name, counts in raw.counts.items()
    }


def _text(ids: pl.Series) -> pa.Array:
    return ids.to_arrow(compat_level=pl.CompatLevel.oldest()).cast(pa.string())


# ---- the command ----------------------------------------------------------------------------------------------------


def print_report(report: dict[str, Any]) -> None:
    """The report of `prepare` for people."""
    table = Table("", "read", "kept", "dropped, and why", show_edge=False)

    def reasons(dropped: dict[str, int]) -> str:
        return "\n".join(f"{n:,} {why}" for why, n in dropped.items())

    for name in ("events", "impressions"):
        if name in report:
            counts = report[name]
            kept = counts.get("kept", counts["read"] - sum(counts["dropped"].values()))
            table.add_row(name, f"{counts['read']:,}", f"{kept:,}", reasons(counts["dropped"]))
    pages = report["pages"]
    table.add_row(
        "pages", f"{pages['candidates']:,}", f"{pages['kept']:,}", reasons(pages["dropped"])
    )
    console = Console()
    console.print(table)
    images = report["images"]
    console.print(
        f"{report['users']:,} users, {report['items']:,} items, {pages['items'] / pages['kept']:.1f} items a page, median history {pages['median_history']}"
    )
    if images:
        bad = images["undecodable"]
        console.print(
            f"{images['usable']:,} images, {len(images['missing']):,} missing, {len(bad):,} undecodable"
            + "".join(f"\n  {item}: {why}" for item, why in list(bad.items())[:5])
            + ("\n  ... (report.json has all)" if len(bad) > 5 else ""),
            markup=False,
        )
    for name, split in report["splits"].items():
        when = f", {split['from']} to {split['to']}" if split["pages"] else ""
        console.print(f"{name}: {split['pages']:,} pages{when}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    columns, options = Columns(), PrepareOptions()
    parser.add_argument("out", type=Path, help="the dataset folder to write")
    parser.add_argument("--layout", default="generic", choices=["generic", *LAYOUTS])
    parser.add_argument(
        "--source", type=Path, help="folder of the published files (not for generic)"
    )
    parser.add_argument("--images", type=Path, help="folder of image files called after the items")
    parser.add_argument(
        "--min-rating",
        type=float,
        help="least rating that is a click (movielens, amazon-reviews-2023)",
    )

    own = parser.add_argument_group("generic")
    own.add_argument(
        "--interactions", type=Path, nargs="+", default=[], help=".csv, .tsv, .parquet or .jsonl"
    )
    own.add_argument("--items", type=Path, help="a row per item, with its category")
    own.add_argument("--user-column", default=columns.user)
    own.add_argument("--item-column", default=columns.item)
    own.add_argument("--time-column", default=columns.time, help="ISO dates, or numbers since 1970")
    own.add_argument("--category-column", default=columns.category)
    own.add_argument(
        "--page-column", help="page or impression id: a row is then an item shown on that page"
    )
    own.add_argument("--clicked-column", default=columns.clicked, help="whether it was clicked")

    pages = parser.add_argument_group("pages")
    pages.add_argument("--page-size", type=int, default=options.page_size, help="items of a page")
    pages.add_argument("--negatives", choices=NEGATIVES, default=options.negatives)
    pages.add_argument(
        "--live-days",
        type=float,
        default=options.live_days,
        help="an item is on offer so long before its first and after its last event",
    )
    pages.add_argument(
        "--min-history",
        type=int,
        default=options.min_history,
        help="earlier events that a page needs",
    )
    pages.add_argument(
        "--max-history",
        type=int,
        default=options.max_history,
        help="most recent events that are kept",
    )
    pages.add_argument(
        "--repeats",
        choices=("drop", "keep"),
        default=options.repeats,
        help="made pages whose item the user had before",
    )
    pages.add_argument("--validation-share", type=float, default=options.validation_share)
    pages.add_argument("--test-share", type=float, default=options.test_share)
    pages.add_argument("--validation-from", metavar="DATE")
    pages.add_argument("--test-from", metavar="DATE")
    pages.add_argument("--seed", type=int, default=options.seed)

    parser.add_argument(
        "--shrink",
        type=int,
        default=0,
        metavar="PIXELS",
        help="scale longer short sides down to this",
    )
    parser.add_argument("--threads", type=int, default=0, help="threads that check images")
    parser.add_argument("--overwrite", action="store_true")


def source_of(args: argparse.Namespace) -> Source:
    """The source that the command line names."""
    if args.layout == "generic":
        if args.min_rating is not None:
            raise ValueError(
                "min_rating: expected --layout movielens or amazon-reviews-2023, got generic"
            )
        names = ("user", "item", "time", "category", "page", "clicked")
        columns = Columns(**{n: getattr(args, f"{n}_column") for n in names})
        return generic(args.interactions, args.items, columns)
    if args.source is None:
        raise ValueError(
            f"source: expected --source with the folder of the {args.layout} files, got none"
        )
    if args.min_rating is None:
        return LAYOUTS[args.layout](args.source)
    if args.layout not in ("movielens", "amazon-reviews-2023"):
        raise ValueError(
            f"min_rating: expected --layout movielens or amazon-reviews-2023, got {args.layout}"
        )
    return LAYOUTS[args.layout](args.source, min_rating=args.min_rating)


def run(args: argparse.Namespace) -> int:
    options = PrepareOptions(**{n: getattr(args, n) for n in PrepareOptions.__dataclass_fields__})
    print_report(prepare(args.out, source=source_of(args), images=args.images, options=options))
    print(f"written to {args.out}")
    return 0
