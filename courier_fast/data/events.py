"""Events as codes, in order: read in batches, spooled to disk, sorted there by user and time."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
from numba import njit
from rich.console import Console
from rich.progress import track

from . import spool as on_disk
from .image_check import LEADS_OUT, check_images, index_images
from .layouts import Source
from .options import PrepareOptions
from .pages import (
    Events,
)
from .spool import Buckets, Spool
from .storage import Location
from .tables import ImageStoreWriter

Array = npt.NDArray

EVENT = np.dtype([("user", np.int32), ("item", np.int32), ("time", np.int64)])
SHOWN = np.dtype([*EVENT.descr, ("page", np.uint64), ("clicked", np.uint8)])

NO_IMAGE = "item without a usable image"
MAX_ID = 1024  # bytes; a longer "id" is something else, an unclosed quote for example
MAX_CODES = np.iinfo(np.int32).max  # users, or items


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
        if self.count > MAX_CODES:
            raise ValueError(f"source: expected at most {MAX_CODES:,} users and items, got more")
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
                chunk_size=on_disk.BATCH, maintain_order=True, engine="streaming"
            ):
                _spool(batch, spool, raw, counts)
        except pl.exceptions.PolarsError as error:
            files = ", ".join(str(f) for f in source.files) or "the source"
            text = str(error)  # after an unclosed quote it has the rest of the file
            if len(text) > 1000:
                text = f"{text[:300]} ... {text[-300:]}"
            raise ValueError(f"{files}: cannot be read: {text}") from error
    return raw


def _spool(batch: pl.DataFrame, spool: Spool, raw: Raw, counts: Counter[str]) -> None:
    names = [n for n in ("user_id", "item_id", "page_id") if n in batch.columns]
    counts["read"] += len(batch)
    known = batch.filter(pl.all_horizontal(pl.col(n).is_not_null() for n in names))
    counts["no user, item or page id"] += len(batch) - len(known)
    short = known.filter(pl.all_horizontal(pl.col(n).str.len_bytes() <= MAX_ID for n in names))
    counts[f"an id of over {MAX_ID:,} bytes"] += len(known) - len(short)
    batch = short.filter(pl.col("time").is_not_null())
    counts["time missing or unreadable"] += len(short) - len(batch)
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

    table: (
        pl.DataFrame
    )  # item_id, category, height, width, and first_seen, last_seen where the source has them
    row: Array  # [codes] int32: the row of a code, -1 where the item does not stay
    missing: list[str]
    undecodable: dict[str, str]
    not_followed: list[str]  # links to folders
    shards: list[dict[str, Any]]  # of images, for the manifest


def choose_items(
    raw: Raw, source: Source, images: Location | None, out: Location, options: PrepareOptions
) -> Items:
    """Joins the metadata, and with `images` writes their shards and leaves out the items without a usable one."""
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
    not_followed: list[str] = []
    shards: list[dict[str, Any]] = []
    stays = np.ones(len(table), bool)
    shapes = np.zeros((len(table), 2), np.int32)
    if images is not None:
        names = table["item_id"].to_list()
        other = table["image"].to_list()
        files = index_images(images, {*names, *(n for n in other if n is not None)})
        chosen, links = (
            [by_stem.get(a) or by_stem.get(b) for a, b in zip(names, other, strict=True)]
            for by_stem in (files.paths, files.outside)
        )
        not_followed = files.folders
        with ImageStoreWriter(out, options.shard_bytes) as store:
            checks = check_images(chosen, shrink=options.shrink, threads=options.threads)
            quiet = not sys.stderr.isatty()
            console = Console(stderr=True)
            for i, checked in enumerate(
                track(checks, "images", len(chosen), console=console, transient=True, disable=quiet)
            ):
                if checked.image is not None:
                    store.append(checked.image)
                    shapes[i] = checked.height, checked.width
                    continue
                stays[i] = False
                if chosen[i] is not None:
                    undecodable[names[i]] = checked.reason
                elif links[i] is not None:
                    undecodable[names[i]] = LEADS_OUT
                else:
                    missing.append(names[i])
        shards = store.shards
        if not stays.any():
            raise ValueError(
                f"images: expected files under {images} called after items such as {', '.join(names[:3])}; of {len(names)} items, {len(missing)} have none and {len(undecodable)} one that cannot be used"
                + (f" (first: {next(iter(undecodable.values()))})" if undecodable else "")
            )
    table = table.with_columns(height=shapes[:, 0], width=shapes[:, 1]).filter(stays)
    row = np.full(len(stays), -1, np.int32)
    row[table["code"].to_numpy()] = np.arange(len(table))
    return Items(table, row, missing, undecodable, not_followed, shards)


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
    # Buckets of about on_disk.BUCKET rows.
    ends = np.cumsum(sizes[codes])
    total = int(ends[-1]) if len(ends) else 0
    bounds = np.unique(
        np.searchsorted(ends, np.arange(on_disk.BUCKET, total, on_disk.BUCKET), side="right")
    )
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
