"""Events as codes, in order: read in batches, put on the disk, sorted there by user and time."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from numba import njit
from rich.console import Console
from rich.progress import track

from ...locations import Location
from ..images.files import LEADS_OUT, ORDER, ImageFiles, Paths, index_images
from ..read import truth
from ..read.ids import missing, one
from ..read.likeness import items_note
from ..read.scan import reading, some
from ..tables import ImageStoreWriter
from . import on_disk
from .images import check_images
from .layouts import Source
from .on_disk import Sorter, Spool, whole
from .options import PrepareOptions
from .outcome import by_item
from .pages import Events, mix

Array = npt.NDArray
log = logging.getLogger(__name__)

NO_IMAGE = "item without a usable image"
MAX_ID = 1024  # bytes; a longer "id" is something else, an unclosed quote for example
MAX_CODES = np.iinfo(np.int32).max  # users, or items


# ---- reading -------------------------------------------------------------------------------------


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
        if self.count > MAX_CODES:
            raise ValueError(f"source: expected at most {MAX_CODES:,} users and items, got more")
        return codes.to_numpy().astype(np.int32)

    def all(self) -> pl.Series:
        """[count] the ids by code."""
        ids = pl.concat(self._parts)
        codes = ids.cast(self._kind).to_physical().to_numpy()
        assert (codes == np.arange(self.count)).all()
        return ids


def text(ids: pl.Series) -> pa.LargeStringArray:
    """As an Arrow array."""
    return ids.to_arrow(compat_level=pl.CompatLevel.oldest())


def buffers(ids: pa.Array) -> tuple[Array, Array]:
    """Where each id begins, and the last ends, in the bytes of all."""
    _, offsets, data = ids.buffers()
    where = np.zeros(1, np.int64)
    if len(ids):
        where = np.frombuffer(offsets, np.int64)[ids.offset : ids.offset + len(ids) + 1]
    letters = np.frombuffer(data or b"", np.uint8)
    for array in (where, letters):
        array.flags.writeable = False  # one type for the compiler
    return where, letters


def hash_ids(ids: pl.Series) -> pl.Series:
    """[n] uint64, of the bytes alone: the same with every version of every library."""
    return pl.Series("page", _hash(*buffers(text(ids))))


@njit(cache=True, nogil=True)
def _hash(offsets, data):  # type: ignore[no-untyped-def]
    """FNV-1a (Fowler, Noll, Vo), mixed."""
    out = np.empty(len(offsets) - 1, np.uint64)
    for i in range(len(out)):
        value = np.uint64(0xCBF29CE484222325)
        for b in range(offsets[i], offsets[i + 1]):
            value = (value ^ np.uint64(data[b])) * np.uint64(0x00000100000001B3)
        out[i] = mix(value)
    return out


@dataclass
class Raw:
    """What was read, as codes."""

    users: Ids
    items: Ids
    sorter: Sorter  # with the tables events and shown
    counts: dict[str, Counter[str]]  # by table: rows by what became of them


def read(source: Source, sorter: Sorter) -> Raw:
    """Puts the source's rows into `sorter`. Raises ValueError where its files cannot be read as
    what they should be."""
    if source.events is None and source.impressions is None:
        raise ValueError("source: expected events or impressions, got neither")
    columns = "user INTEGER, item INTEGER, time BIGINT"
    sorter.run(f"CREATE TABLE events ({columns})")
    sorter.run(f"CREATE TABLE shown ({columns}, page UBIGINT, clicked UTINYINT, place BIGINT)")
    raw, ticks = Raw(Ids(), Ids(), sorter, {}), source.ticks
    for name, table in (("events", "events"), ("impressions", "shown")):
        if not (frames := source.tables(name)):
            continue
        counts, place = raw.counts.setdefault(name, Counter()), 0
        for batch in chain.from_iterable(batches(f, table, source) for f in frames):
            known = clean(batch, counts, ticks)
            users, items = (
                ids.codes(known[n]) for ids, n in ((raw.users, "user_id"), (raw.items, "item_id"))
            )
            rows = {"user": users, "item": items, "time": known["time"].to_numpy()}
            if table == "shown":
                rows |= {n: known[n].to_numpy() for n in ("page", "clicked")}
                rows["place"] = np.arange(place, place + len(known))
                place += len(known)
            sorter.append(table, rows)
    return raw


def batches(frame: pl.LazyFrame, table: str, source: Source) -> Iterator[pl.DataFrame]:
    """The rows of events or shown, a batch at a time, in order."""
    columns = ["user_id", "item_id", "time"] + ["page_id", "clicked"] * (table == "shown")
    columns += ["microsecond"] * ("microsecond" in frame.collect_schema())
    with reading(some([str(f) for f in source.files]) or "the source"):
        yield from frame.select(columns).collect_batches(
            chunk_size=on_disk.BATCH, maintain_order=True, engine="streaming"
        )


def clean(batch: pl.DataFrame, counts: Counter[str], ticks: int = 1) -> pl.DataFrame:
    """The rows that can be used: user_id, item_id, time (in ticks, `ticks` of them a second), and
    of impressions page (uint64, of its id) and clicked (uint8). Counts the others."""
    names = [n for n in ("user_id", "item_id", "page_id") if n in batch.columns]
    counts["read"] += len(batch)
    known = batch.filter(pl.all_horizontal(pl.col(n).is_not_null() for n in names))
    counts["no user, item or page id"] += len(batch) - len(known)
    for name in names:
        words = missing(known[name])
        if words.any():
            for word, count in known.filter(words)[name].value_counts().sort(name).iter_rows():
                counts[f'a missing id, {name} "{word}"'] += count
            known = known.filter(~words)
    short = known.filter(pl.all_horizontal(pl.col(n).str.len_bytes() <= MAX_ID for n in names))
    counts[f"an id of over {MAX_ID:,} bytes"] += len(known) - len(short)
    batch = _in_ticks(short, ticks).filter(pl.col("time").is_not_null())
    counts["time missing or unreadable"] += len(short) - len(batch)
    if "page_id" in names:
        clicked = truth.read(batch["clicked"])
        counts[truth.UNKNOWN] += clicked.null_count()
        batch = batch.select(
            "user_id",
            "item_id",
            "time",
            page=pl.col("page_id").map_batches(hash_ids, pl.UInt64),
            clicked=clicked.fill_null(False).cast(pl.UInt8),
        )
    return batch


def _in_ticks(rows: pl.DataFrame, ticks: int) -> pl.DataFrame:
    """With time in ticks; null where that leaves int64."""
    if ticks == 1:
        return rows
    time, limit = pl.col("time"), np.iinfo(np.int64).max // ticks - 1
    part = pl.col("microsecond").fill_null(0) if "microsecond" in rows.columns else 0
    return rows.with_columns(time=pl.when(time.abs() < limit).then(time * ticks + part))


def time_columns(ticks_of: Array, ticks: int) -> dict[str, Any]:
    """The columns of times of a table of the dataset: time in whole seconds, and with parts of a
    second microsecond."""
    if ticks == 1:
        return {"time": ticks_of}
    return {
        "time": _Part(ticks_of, lambda t: t // ticks),
        "microsecond": _Part(ticks_of, lambda t: (t % ticks).astype(np.int32)),
    }


class _Part:
    """A column made from a mapped one where it is read."""

    def __init__(self, column: Array, made: Callable[[Array], Array]) -> None:
        self._column, self._made = column, made

    def __len__(self) -> int:
        return len(self._column)

    def __getitem__(self, rows: slice) -> Array:
        return self._made(np.asarray(self._column[rows]))


# ---- items ---------------------------------------------------------------------------------------


@dataclass
class Items:
    """The items that stay, in order of their ids."""

    # item_id, category, height, width, and first_seen, last_seen where the source has them
    table: pl.DataFrame
    row: Array  # [codes] int32: the row of a code, -1 where the item does not stay
    missing: list[str]
    undecodable: dict[str, str]
    about_images: dict[str, Any]  # more for the report
    shards: list[dict[str, Any]]  # of images, for the manifest
    notes: list[str]
    ticks: int = 1  # of a second, in which times are

    def columns(self, clicks: Array, first_seen: Array, last_seen: Array) -> dict[str, Any]:
        """Those of the table items."""
        return {
            "item_id": id_array(self.table["item_id"]),
            "category": id_array(self.table["category"]),
            "clicks": clicks,
            "first_seen": first_seen // self.ticks,
            "last_seen": last_seen // self.ticks,
            **{n: self.table[n].to_numpy() for n in ("height", "width")},
        }

    def images(self) -> dict[str, Any]:
        """Their part of the report."""
        return {
            "usable": len(self.table),
            "missing": self.missing,
            "undecodable": self.undecodable,
            **self.about_images,
        }


def id_array(ids: pl.Series) -> pa.Array:
    """As a column of the dataset."""
    return text(ids).cast(pa.string())


class Candidates:
    """All items of the source in order of their ids, with the metadata; which of them stay is told
    one after another."""

    def __init__(self, ids: pl.DataFrame, source: Source, images: Location | None) -> None:
        """`ids`: code and item_id, sorted."""
        table = ids
        self.notes: list[str] = []
        if source.items is not None:
            ours = ids.lazy().select("item_id")
            about = source.items.join(ours, on="item_id", how="semi", maintain_order="left")
            with reading("items"):
                rows = about.collect(engine="streaming").unique(maintain_order=True)
                found = rows.unique("item_id", keep="first", maintain_order=True)
                if len(rows) > len(found):
                    again = rows.filter(pl.col("item_id").is_duplicated())["item_id"]
                    shown = f"(first: {again[0]}); the first row is taken"
                    self.note([f"items: {again.n_unique():,} items have rows that differ {shown}"])
                self.note(items_note(ids["item_id"], found["item_id"], source.items))
            table = ids.join(found, on="item_id", how="left", maintain_order="left")
        extra = {
            "category": pl.String,
            "image": pl.String,
            "first_seen": pl.Int64,
            "last_seen": pl.Int64,
        }
        self.table = table.with_columns(
            pl.lit(None, kind).alias(name)
            for name, kind in extra.items()
            if name not in table.columns
        )
        self.ticks = source.ticks
        if self.ticks > 1:  # the second in which an item was last on offer counts whole
            limit = np.iinfo(np.int64).max // self.ticks - 1
            first, last = (pl.col(n).clip(-limit, limit) for n in ("first_seen", "last_seen"))
            self.table = self.table.with_columns(first * self.ticks, (last + 1) * self.ticks - 1)
        self.images = images
        self.stays = np.ones(len(table), bool)
        self.shapes = np.zeros((len(table), 2), np.int32)
        self.missing: list[str] = []
        self.undecodable: dict[str, str] = {}
        self.gave_way: dict[str, str] = {}
        self.files = ImageFiles()
        self.paths: list[Paths | None] = []
        if images is None:
            return
        self._names, other = self.table["item_id"].to_list(), self.table["image"].to_list()
        pairs = [(one(a), one(b or "")) for a, b in zip(self._names, other, strict=True)]
        files = index_images(images, {name for pair in pairs for name in pair} - {""})
        self.files = files
        self.paths = [files.paths.get(a) or files.paths.get(b) for a, b in pairs]
        self._links = [files.outside.get(a) or files.outside.get(b) for a, b in pairs]
        if several := files.several:
            item, (one_file, other_file, *_) = next(iter(several.items()))
            self.note(
                [
                    f"images: {len(several):,} items have several files (first: {item}, {one_file} "
                    f"before {other_file}); one is taken {ORDER}"
                ]
            )
        if files.unreadable:
            self.note(
                [
                    f"images: {len(files.unreadable):,} folders cannot be read (first: "
                    f"{files.unreadable[0]}): their items count as missing"
                ]
            )

    def note(self, notes: list[str]) -> None:
        """Logs and keeps them."""
        for text in notes:
            log.warning("%s", text)
        self.notes += notes

    def checked(self, i: int, height: int, width: int, reason: str) -> None:
        """What item i's image is; height and width 0 where there is none that can be used."""
        self.stays[i] = height > 0
        self.shapes[i] = height, width
        if height:
            if reason:
                self.gave_way[self._names[i]] = reason
            return
        if self.paths[i] is not None:
            self.undecodable[self._names[i]] = reason
        elif self._links[i] is not None:
            self.undecodable[self._names[i]] = LEADS_OUT
        else:
            self.missing.append(self._names[i])

    def chosen(self, shards: list[dict[str, Any]]) -> Items:
        """The items that stay. ValueError where none does."""
        missing, total = len(self.missing), len(self.stays)
        if self.gave_way:
            name, why = next(iter(self.gave_way.items()))
            self.note(
                [
                    f"images: of {len(self.gave_way):,} items another file is taken, as the first "
                    f"cannot be used (first: {name}: {why})"
                ]
            )
        if missing and self.stays.any():
            unread = any(i in self.files.unread for i in self.missing)
            if unread or 2 * missing >= total:
                self.note(
                    [
                        f"images: {missing:,} of {total:,} items have none under {self.images} "
                        f"({some(self.missing, 3)}); {self.files.missing_note(self.missing)}"
                    ]
                )
        if not self.stays.any():
            raise ValueError(
                f"images: expected files under {self.images} called after items such as "
                f"{', '.join(self._names[:3])}; of {len(self._names)} items, {missing} have none "
                f"and {len(self.undecodable)} one that cannot be used"
                + (f" (first: {next(iter(self.undecodable.values()))})" if self.undecodable else "")
                + (f"; {self.files.missing_note(self.missing)}" if missing else "")
            )
        table = self.table.with_columns(height=self.shapes[:, 0], width=self.shapes[:, 1])
        table = table.filter(self.stays)
        row = np.full(len(self.stays), -1, np.int32)
        row[table["code"].to_numpy()] = np.arange(len(table))
        return Items(
            table,
            row,
            self.missing,
            self.undecodable,
            self._about_images(),
            shards,
            self.notes,
            self.ticks,
        )

    def _about_images(self) -> dict[str, Any]:
        files, several = self.files, self.files.several
        return {
            "folders_not_followed": files.folders,
            "folders_unreadable": files.unreadable,
            "hidden": files.hidden,
            "several_files": {
                "items": len(several),
                "first": dict(islice(((i, list(of)) for i, of in several.items()), 5)),
            },
            "gave_way": self.gave_way,
        }


def choose_items(
    raw: Raw, source: Source, images: Location | None, out: Location, options: PrepareOptions
) -> Items:
    """Joins the metadata, and with `images` writes their shards and leaves out the items without a
    usable one."""
    ids = pl.DataFrame({"item_id": raw.items.all()}).with_row_index("code").sort("item_id")
    items = Candidates(ids, source, images)
    if images is None:
        return items.chosen([])
    with ImageStoreWriter(out, options.shard_bytes) as store:
        checks = check_images(items.paths, shrink=options.shrink, threads=options.threads)
        quiet, console = not sys.stderr.isatty(), Console(stderr=True)
        for i, checked in enumerate(
            track(checks, "images", len(ids), console=console, transient=True, disable=quiet)
        ):
            if checked.image is not None:
                store.append(checked.image)
            items.checked(i, checked.height, checked.width, checked.reason)
    return items.chosen(store.shards)


# ---- events --------------------------------------------------------------------------------------


@dataclass
class Sorted:
    """The events that stay, by user; and when each item was seen."""

    events: Events
    user_ids: pl.Series
    first_seen: Array
    last_seen: Array
    sorter: Sorter

    def shown(self) -> Iterator[dict[str, Array]]:
        """Rows shown, by user, then page, then as they were read; whole pages at a time."""
        rows = self.sorter.rows(
            "SELECT users.row AS user, page, item, time, clicked FROM kept_shown JOIN users ON "
            "user = code ORDER BY users.row, page, place"
        )
        return whole(rows, "user", "page")


def sort_events(raw: Raw, items: Items, folder: Path) -> Sorted:
    """Sorts by user, then time, then item; an event that is there twice counts once."""
    sorter = raw.sorter
    for table, codes in (("items", items.row), ("users", np.zeros(0, np.int32))):
        sorter.run(f"CREATE TABLE {table} (code INTEGER, row INTEGER)")
        rows = np.flatnonzero(codes >= 0).astype(np.int32)
        sorter.append(table, {"code": rows, "row": codes[rows]})
    for table, more in (("events", ""), ("shown", ", page, clicked, place")):
        sorter.run(
            f"CREATE VIEW kept_{table} AS SELECT user, row AS item, time{more} FROM {table} JOIN "
            "items ON item = code"
        )
    for table, name in (("events", "events"), ("shown", "impressions")):
        if name in raw.counts:
            count, kept = (
                int(sorter.all(f"SELECT count(*) AS n FROM {t}")["n"][0])
                for t in (table, f"kept_{table}")
            )
            raw.counts[name][NO_IMAGE] += count - kept
    sorter.run(
        "CREATE VIEW seen AS SELECT user, item, time FROM kept_events UNION ALL SELECT user, item, "
        "time FROM kept_shown"
    )
    sorter.run(
        "CREATE VIEW clicks AS SELECT user, item, time FROM kept_events UNION ALL SELECT user, "
        "item, time FROM kept_shown WHERE clicked = 1"
    )

    used = sorter.all("SELECT DISTINCT user FROM seen")["user"]
    users = pl.DataFrame({"id": raw.users.all()}).with_row_index("code")
    users = users[np.sort(used)].sort("id")
    sorter.append(
        "users",
        {
            "code": users["code"].to_numpy().astype(np.int32),
            "row": np.arange(len(users), dtype=np.int32),
        },
    )
    found = sorter.all("SELECT item, min(time) AS first, max(time) AS last FROM seen GROUP BY item")
    first_seen, last_seen = spans(found, items.table)

    columns = {"item": np.int32, "time": np.int64, "by_item": np.int32}
    spools = {name: Spool(folder / name, kind) for name, kind in columns.items()}
    sizes = np.zeros(len(users), np.int64)
    parts = sorter.rows(
        "SELECT DISTINCT users.row AS user, item, time FROM clicks JOIN users ON user = code ORDER "
        "BY users.row, time, item"
    )
    for part in whole(parts, "user"):
        sizes += np.bincount(part["user"], minlength=len(sizes))
        for name, spool in spools.items():
            spool.append(by_item(part["user"], part["item"]) if name == "by_item" else part[name])
    total = int(sorter.all("SELECT count(*) AS n FROM clicks")["n"][0])
    again = raw.counts.setdefault("events", Counter())
    again["the same user, item and time again"] += total - spools["item"].rows
    first = np.concatenate([[0], np.cumsum(sizes)])
    item, time, order = (spool.array() for spool in spools.values())
    events = Events(item, time, order, first)
    return Sorted(events, users["id"], first_seen, last_seen, sorter)


def spans(found: Mapping[str, Array], table: pl.DataFrame) -> tuple[Array, Array]:
    """[items] when each was first and last seen; the source's word holds where it is wider.

    `found`: item, first, last, from events and rows shown.
    """
    spans = []
    for name, column, pick, none in (
        ("first_seen", "first", np.fmin, np.iinfo(np.int64).max),
        ("last_seen", "last", np.fmax, np.iinfo(np.int64).min),
    ):
        seen = np.full(len(table), none)
        seen[found["item"]] = found[column]
        known = table[name].is_not_null().to_numpy()
        seen[known] = pick(seen[known], table[name].drop_nulls().to_numpy())
        spans.append(seen)
    return spans[0], spans[1]
