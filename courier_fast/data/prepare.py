"""`courier-fast prepare`: interactions, item metadata and an image folder -> the dataset folder of dataset.py.

Nothing that grows with the number of events is held in memory. Rows are read in batches, ids become codes, and the codes go to the disk, where
DuckDB sorts them, first by user, then by time. What stays in memory grows with users and items.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from .. import __version__
from ..files import sync_all
from . import spool as on_disk
from .dataset import SPLITS, write_json, write_manifest
from .events import Items, Raw, Sorted, choose_items, read, sort_events
from .layouts import Source
from .offers import offers_of
from .options import PrepareOptions, epoch
from .pages import (
    ALL_CLICKED,
    NEGATIVES,
    NO_CLICK,
    NO_NEGATIVE,
    REPEAT,
    SHORT_HISTORY,
    UNCLICKED,
    copy_items,
    given_pages,
    make_pages,
)
from .spool import Sorter, Spool
from .storage import Location, delete_file, is_file, join, location
from .tables import write_shards

Array = npt.NDArray
log = logging.getLogger(__name__)


FATES = {
    SHORT_HISTORY: "fewer earlier events than --min-history",
    REPEAT: "the user had the item before",
    NO_NEGATIVE: "nothing else to show",
    NO_CLICK: "nothing clicked",
}


def _iso(time: int) -> str:
    return str(np.datetime64(int(time), "s")) + "Z"


# ---- pages ----------------------------------------------------------------------------------------------------------


class PageSpools:
    """The tables pages and page_items while they grow."""

    def __init__(self, folder: Path, name: str) -> None:
        names = ("time", "history_start", "history_end", "pv_start", "pv_end")
        kinds = {"user": np.int32, **dict.fromkeys(names, np.int64)}
        self._columns = {n: Spool(folder / f"{name}-{n}", kind) for n, kind in kinds.items()}
        of_item = (("item", np.int32), ("clicked", np.uint8), ("weight", np.float32))
        self._shown = {n: Spool(folder / f"{name}-{n}", kind) for n, kind in of_item}
        self.fates: Counter[int] = Counter()
        self.cut = 0  # pages of which some items were left out

    def append(
        self, user: Array, time: Array, history: Array, counts: Array, shown: Sequence[Array]
    ) -> None:
        """Adds pages; `shown` has items, whether they were clicked, and if some page may be cut weights of all, `counts` of each."""
        ends = self._shown["item"].rows + np.cumsum(counts, dtype=np.int64)
        values = (user, time, history[:, 0], history[:, 1], ends - counts, ends)
        for spool, column in zip(self._columns.values(), values, strict=True):
            spool.append(column)
        for spool, column in zip(self._shown.values(), shown, strict=False):
            spool.append(column)

    @property
    def dropped(self) -> dict[str, int]:
        return {FATES[f]: n for f, n in sorted(self.fates.items()) if f in FATES and n}

    def columns(self) -> dict[str, Array]:
        """Those of pages, mapped."""
        return {name: spool.array() for name, spool in self._columns.items()}

    def items(self) -> dict[str, Array]:
        """Those of page_items, mapped; weights only where some page was cut."""
        return {n: spool.array() for n, spool in self._shown.items() if n != "weight" or self.cut}

    def count_fates(self, fate: Array) -> Array:
        """Which pages are kept; counts them all."""
        self.fates.update(dict(enumerate(np.bincount(fate, minlength=1).tolist())))
        return ~np.isin(fate, list(FATES))


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
    seen, offers = np.stack([first, last], 1), offers_of(first, last)
    category = items.table["category"]
    group = category.rank("dense").cast(pl.Int64).fill_null(0).to_numpy() - 1
    kind = NEGATIVES.index(options.negatives)
    kin = offers_of(first, last, group) if kind == 2 else offers
    total, size = len(events.item), options.page_size
    pool = np.zeros(0, np.int32)
    if kind == 1 and total:
        pool = np.memmap(folder / "pool", np.int32, "w+", shape=(total,))
    done, last_time, began = 0, np.iinfo(np.int64).min, 0
    buffers = (
        np.zeros((on_disk.BATCH, 2), np.int64),
        np.zeros(on_disk.BATCH * size, np.int32),
        np.zeros(on_disk.BATCH * size, np.uint8),
    )
    for rows in sorted_.sorter.by_time(events.time):
        users = np.searchsorted(events.first, rows, side="right") - 1
        before = np.zeros(0, np.int64)
        if kind == 1:
            pool[done : done + len(rows)] = events.item[rows]
            times = events.time[rows]
            # A moment can have begun in the last part.
            same = done + np.searchsorted(times, times)
            before = np.where(times == last_time, began, same)
            last_time, began = times[-1], before[-1]
        done += len(rows)
        history, shown, clicked = buffers
        counts, fate = np.zeros((2, len(rows)), np.int32)
        written = make_pages(
            rows, users, 0, before, events, seen, offers, kin, pool, kind, size, options.min_history, options.max_history,
            options.repeats == "drop", options.seed, history, shown, clicked, counts, fate,
        )  # fmt: skip
        kept = pages.count_fates(fate)
        pages.append(
            users[kept], events.time[rows[kept]], history[: len(rows)][kept], counts[kept],
            (shown[:written], clicked[:written]),
        )  # fmt: skip
    return pages


def pages_of_impressions(sorted_: Sorted, folder: Path, options: PrepareOptions) -> PageSpools:
    """The pages shown, in order of time."""
    unordered = PageSpools(folder, "given")
    for records in sorted_.shown():
        total = len(records["user"])
        new = np.ones(total, bool)
        new[1:] = np.any([records[k][1:] != records[k][:-1] for k in ("user", "page")], axis=0)
        bounds = np.append(np.flatnonzero(new), total)
        n = len(bounds) - 1
        user, time, history = (
            np.zeros(n, np.int32),
            np.zeros(n, np.int64),
            np.zeros((n, 2), np.int64),
        )
        shown = [np.zeros(total, kind) for kind in (np.int32, np.uint8, np.float32)]
        counts, fate = np.zeros((2, n), np.int32)
        written = given_pages(
            bounds, *(records[c] for c in ("user", "page", "item", "time", "clicked")), 0, sorted_.events, options.page_size, options.min_history, options.max_history, options.keep_unclicked,
            options.seed, user, time, history, *shown, counts, fate,
        )  # fmt: skip
        kept, shown = unordered.count_fates(fate), [column[:written] for column in shown]
        unordered.append(user[kept], time[kept], history[kept], counts[kept], shown)
        starts = np.cumsum(counts[kept], dtype=np.int64) - counts[kept]
        unordered.cut += int(np.count_nonzero(np.maximum.reduceat(shown[2], starts) > 1))
    pages = PageSpools(folder, "ordered")
    pages.fates, pages.cut = unordered.fates, unordered.cut
    old, of_all = unordered.columns(), unordered.items()
    for rows in sorted_.sorter.by_time(old["time"]):
        starts = old["pv_start"][rows]
        counts = old["pv_end"][rows] - starts
        shown = [copy_items(starts, counts, column) for column in of_all.values()]
        history = np.stack([old["history_start"][rows], old["history_end"][rows]], 1)
        pages.append(old["user"][rows], old["time"][rows], history, counts, shown)
    return pages


def split_bounds(times: Array, options: PrepareOptions) -> list[int]:
    """The first page of validation, the first of test, and the number of pages; `times` is sorted. Never inside a timestamp."""
    n = len(times)
    if options.validation_from and options.test_from:
        cuts = [
            epoch("validation_from", options.validation_from),
            epoch("test_from", options.test_from),
        ]
    else:
        test = round(n * (1 - options.test_share))
        validation = round(n * (1 - options.test_share - options.validation_share))
        # A share of 0 is after the end.
        cuts = [int(times[i]) if i < n else int(times[-1]) + 1 for i in (validation, test)]
    return [*(int(i) for i in np.searchsorted(times, cuts)), n]


# ---- all of it ------------------------------------------------------------------------------------------------------


def prepare(
    out: Location,
    *,
    source: Source,
    images: Location | None = None,
    options: PrepareOptions | None = None,
) -> dict[str, Any]:
    """Writes the dataset folder `out` (see dataset.py) and gives its report.

    A local folder appears when it is complete: until then there is `<out>.partial-<pid>`, which is removed again where something fails. In an
    object store dataset.json is written last, and a folder without it is none. Items
    that no event or page names are left out, and with `images` those without a usable one, before any page is made.

    Args:
        out: a folder, local or s3:// and so on, that is not there yet, unless `options.overwrite`.
        source: from an importer of layouts.py, or of one's own.
        images: a folder of image files called after the items; None: a dataset without images.

    Raises:
        FileExistsError: `out` is there.
        FileNotFoundError: a file or folder is not.
        ValueError: columns or values that are not what they should be; nothing left to train on.
    """
    options = options or PrepareOptions()
    if options.keep_unclicked and source.impressions is None:
        raise ValueError(
            f"keep_unclicked: expected a source with impressions (--page-column, or --layout ebnerd), got {source.layout} with clicks alone: its pages are "
            "made around them"
        )
    out = location(out)
    there = is_file(join(out, "dataset.json")) if isinstance(out, str) else out.exists()
    if there and not options.overwrite:
        raise FileExistsError(f"{out} is there already; --overwrite replaces it")
    if isinstance(out, str):
        with tempfile.TemporaryDirectory(prefix="courier-prepare-") as scratch:
            delete_file(join(out, "dataset.json"))
            return _write(out, Path(scratch), source, images, options)
    out = Path(os.path.abspath(out))
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)  # in containers, a killed run had the same id
    (partial / "scratch").mkdir(parents=True)
    try:
        report = _write(partial, partial / "scratch", source, images, options)
        shutil.rmtree(partial / "scratch")
        sync_all(partial)
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
    folder: Location,
    scratch: Path,
    source: Source,
    images: Location | None,
    options: PrepareOptions,
) -> dict[str, Any]:
    log.info("reading %s", ", ".join(str(f) for f in source.files) or "the source")
    sorter = Sorter(scratch, options.memory_gib, options.threads or len(os.sched_getaffinity(0)))
    raw = read(source, sorter)
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
    splits = _splits(columns["time"], pages.dropped, options)
    log.info("writing")
    train_end = int(columns["pv_end"][splits["train"][1] - 1])
    events = sorted_.events
    tables: dict[str, dict[str, Any]] = {
        "users": {"user_id": _text(sorted_.user_ids)},
        "items": {
            "item_id": _text(items.table["item_id"]),
            "category": _text(items.table["category"]),
            "clicks": _clicks(shown, train_end, len(items.table)),
            "first_seen": sorted_.first_seen,
            "last_seen": sorted_.last_seen,
            **{n: items.table[n].to_numpy() for n in ("height", "width")},
        },
        "events": {"item": events.item, "time": events.time},
        "pages": columns,
        "page_items": shown,
    }
    shards = {n: write_shards(folder, n, of, options.shard_rows) for n, of in tables.items()}
    if images is not None:
        shards["images"] = items.shards

    times = columns["time"]
    report: dict[str, Any] = {
        **_counts(raw),
        "users": len(sorted_.user_ids),
        "items": len(items.table),
        "images": None if images is None else {
            "usable": len(items.table), "missing": items.missing, "undecodable": items.undecodable,
            "folders_not_followed": items.not_followed,
        },
        "pages": {
            "candidates": sum(pages.fates.values()), "kept": len(times), "dropped": pages.dropped, "items": len(shown["item"]),
            "median_history": _median_history(columns, options.max_history), **_special(pages, options),
        },
        "splits": {
            name: {"pages": b - a, "from": _iso(times[a]), "to": _iso(times[b - 1])} if b > a else {"pages": 0}
            for name, (a, b) in splits.items()
        },
    }  # fmt: skip
    report["events"]["kept"] = len(events.item)
    about = {
        "source": {"layout": source.layout, "files": [str(f) for f in source.files], "images": str(images) if images else None},
        "pages": "made" if source.impressions is None else "given",
        "options": asdict(options),
        "splits": splits,
        "counts": {
            "users": report["users"], "items": report["items"], "events": report["events"]["kept"], "pages": len(times),
            "page_items": len(shown["item"]),
        },
        "courier_fast": __version__,
    }  # fmt: skip
    write_json(join(folder, "report.json"), report)
    write_manifest(folder, about, shards)
    return report


def _splits(times: Array, dropped: dict[str, int], options: PrepareOptions) -> dict[str, list[int]]:
    """First page and end of each split."""
    if not len(times):
        raise ValueError(f"pages: expected at least one, got none; dropped: {dropped}")
    bounds = [0, *split_bounds(times, options)]
    if not bounds[1]:
        raise ValueError(
            f"splits: expected pages to train on, got none before {_iso(times[0])}: all {len(times)} pages are in validation or test"
        )
    splits = {name: bounds[i : i + 2] for i, name in enumerate(SPLITS)}
    for name, (start, end) in splits.items():
        if start == end:
            log.warning("%s: no page, the times are too coarse or the share is 0", name)
    return splits


def _clicks(shown: dict[str, Array], end: int, items: int) -> Array:
    """[items] clicks among the first `end` rows, a part at a time: the columns are on the disk."""
    clicks = np.zeros(items, np.int64)
    for start in range(0, end, on_disk.PART):
        part = slice(start, min(start + on_disk.PART, end))
        clicks += np.bincount(shown["item"][part][shown["clicked"][part] == 1], minlength=items)
    return clicks


def _median_history(columns: dict[str, Array], longest: int) -> int:
    lengths, pages = np.zeros(longest + 1, np.int64), len(columns["time"])
    for start in range(0, pages, on_disk.PART):
        part = slice(start, start + on_disk.PART)
        length = columns["history_end"][part] - columns["history_start"][part]
        lengths += np.bincount(length, minlength=len(lengths))
    return int(np.searchsorted(np.cumsum(lengths), (pages + 1) // 2))


def _special(pages: PageSpools, options: PrepareOptions) -> dict[str, int]:
    """Pages that are kept on request, and those that were cut."""
    of = {"unclicked": pages.fates[UNCLICKED], "all_clicked": pages.fates[ALL_CLICKED]}
    return (of if options.keep_unclicked else {}) | ({"cut": pages.cut} if pages.cut else {})


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
