"""Rows of the source, a batch at a time: those that can be used, with ids as codes and times in
ticks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
from numba import njit

from ..read import lists, truth
from ..read.ids import as_text, missing
from ..read.scan import reading, some
from .layouts import GivenHistories, Source
from .pages import mix

Array = npt.NDArray

BATCH = 1 << 19  # rows that are read at once
WITH_LISTS = 1 << 13  # the same, with histories
SHARE = 32  # so many items of a list take about what a row takes
SPLIT = 1 << 61  # between the places of two splits' rows, where these are their times
MAX_ID = 1024  # bytes; a longer "id" is something else, an unclosed quote for example


def coded(ids: pl.Series) -> tuple[Array, pl.Series]:
    """[n] int32 the codes of ids, in order of first use; and each id once, by code."""
    codes = ids.cast(pl.Categorical(pl.Categories.random())).to_physical()
    each = pl.DataFrame({"id": ids, "code": codes}).unique("code").sort("code")
    assert not len(each) or each["code"][-1] == len(each) - 1
    return codes.to_numpy().astype(np.int32), each["id"]


def arrow_text(ids: pl.Series) -> pa.LargeStringArray:
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
    return pl.Series("page", _hash(*buffers(arrow_text(ids))))


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


def batches(
    frame: pl.LazyFrame, table: str, source: Source, number: int = 0
) -> Iterator[pl.DataFrame]:
    """The rows of events or shown, a batch at a time, in order; those shown with their place, which
    orders them among the rows of all tables (this one's `number`)."""
    have = frame.collect_schema()
    columns = ["user_id"] + ["item_id"] * (table != "user_histories")
    columns += ["clicked"] * (table == "shown")
    columns += [n for n in ("time", "page_id", "microsecond", "history", "split") if n in have]
    size = WITH_LISTS if "history" in have else BATCH
    place = number << 40
    with reading(some([str(f) for f in source.files]) or "the source"):
        for batch in frame.select(columns).collect_batches(
            chunk_size=size, maintain_order=True, engine="streaming"
        ):
            if table == "shown":
                end = place + len(batch)
                batch = batch.with_columns(place=pl.int_range(place, end, dtype=pl.Int64))
                place = end
            yield batch


def sizes(batch: pl.DataFrame) -> Array:
    """[n] int64: what each row takes, in shares of a plain one."""
    out = np.full(len(batch), SHARE)
    for name in ("item_id", "history"):
        if name not in batch.columns:
            continue
        kind, column = batch[name].dtype, batch[name]
        if isinstance(kind, pl.List):
            items = column.list.len()
        elif isinstance(kind, pl.Array):
            items = pl.Series([kind.shape[0]] * len(batch))
        elif name == "history":
            items = column.str.len_bytes() // 4
        else:
            continue
        out += items.fill_null(0).to_numpy() * (SHARE if name == "item_id" else 1)
    return out


def clean(batch: pl.DataFrame, counts: Counter[str], ticks: int = 1) -> pl.DataFrame:
    """The rows that can be used: user_id, item_id, time (in ticks, `ticks` of them a second; their
    place, after the split, where they have none), and of impressions page (uint64, of its id),
    clicked (uint8), place and, where they have histories, list. Counts the others."""
    views = isinstance(batch["item_id"].dtype, pl.List)
    if views:
        empty = int((batch["item_id"].list.len().fill_null(0) == 0).sum())
        counts["a page view without items"] += empty
        batch = batch.explode("item_id", "clicked", keep_nulls=False)
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
    split = pl.col("split") if "split" in batch.columns else pl.lit(0, pl.Int64)
    if "time" not in batch.columns:
        short = short.with_columns(time=split * SPLIT + pl.col("place"))
    batch = _in_ticks(short, ticks).filter(pl.col("time").is_not_null())
    counts["time missing or unreadable"] += len(short) - len(batch)
    if "clicked" in batch.columns:
        clicked = truth.read(batch["clicked"])
        counts[truth.UNKNOWN] += clicked.null_count()
        page = pl.col("place").cast(pl.UInt64)
        if not views:  # a page of two splits is one of each
            of = pl.col("page_id" if "page_id" in names else "user_id")
            page = of.map_batches(hash_ids, pl.UInt64) ^ split.cast(pl.UInt64)
        batch = batch.select(
            "user_id",
            "item_id",
            "time",
            "place",
            *(["list"] if "list" in batch.columns else []),
            page=page,
            clicked=clicked.fill_null(False).cast(pl.UInt8),
        )
    return batch


def known_users(batch: pl.DataFrame, counts: Counter[str]) -> pl.DataFrame:
    """The rows of users' histories that can be used. Counts the others."""
    counts["read"] += len(batch)
    users = batch["user_id"]
    fits = users.is_not_null() & ~missing(users) & (users.str.len_bytes() <= MAX_ID)
    counts["no user id"] += len(batch) - int(fits.sum())
    return batch.filter(fits)


def past_items(columns: pl.Series, form: GivenHistories, where: str) -> tuple[Array, pl.Series]:
    """Where each of some lists begins, and the last ends, in the ids of all, without what is no
    item: oldest first."""
    found = lists.split(columns)
    ends, values = lists.flat(found.list.reverse() if form.newest_first else found)
    ids = as_text(values, where)
    there = ids.is_not_null() & ~missing(ids) & (ids != form.padding)
    there &= ids.str.len_bytes() <= MAX_ID
    before = np.concatenate([[0], np.cumsum(there.to_numpy(), dtype=np.int64)])
    return before[ends], ids.filter(there)


def pages_of_lists(page: Array, which: Array, ends: Array, ids: pl.Series) -> Array:
    """[n] uint64: of a user's rows in a split, `page`, those that have one list in common, `which`
    each: their page, where rows do not say it."""
    of_ids = hash_ids(ids).to_numpy()
    return _folded(ends, of_ids)[which] ^ page


@njit(cache=True, nogil=True)
def _folded(ends, values):  # type: ignore[no-untyped-def]
    out = np.empty(len(ends) - 1, np.uint64)
    for i in range(len(out)):
        value = np.uint64(ends[i + 1] - ends[i])
        for k in range(ends[i], ends[i + 1]):
            value = mix(value ^ values[k])
        out[i] = value
    return out


def _in_ticks(rows: pl.DataFrame, ticks: int) -> pl.DataFrame:
    """With time in ticks; null where that leaves int64."""
    if ticks == 1:
        return rows
    time, limit = pl.col("time"), np.iinfo(np.int64).max // ticks - 1
    part = pl.col("microsecond").fill_null(0) if "microsecond" in rows.columns else 0
    return rows.with_columns(time=pl.when(time.abs() < limit).then(time * ticks + part))


def time_columns(ticks_of: Array, ticks: int) -> dict[str, Array]:
    """The columns of times of a table of the dataset: time in whole seconds, and with parts of a
    second microsecond."""
    if ticks == 1:
        return {"time": ticks_of}
    return {"time": ticks_of // ticks, "microsecond": (ticks_of % ticks).astype(np.int32)}
