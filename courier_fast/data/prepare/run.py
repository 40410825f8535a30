"""`courier-fast prepare`: interactions, item metadata and an image folder -> the dataset folder of
dataset.py.

Nothing that grows with the number of events is held in memory. Rows are read in batches, ids become
codes, and the codes go to the disk, where DuckDB sorts them, first by user, then by time. What
stays in memory grows with users and items.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ...disk import bytes_under, new_map, size_text, writing
from ...engines import ENGINES
from ...locations import Location, location
from ...output import DATASET, check_remote, new_folder
from ..storage import delete_file, join
from ..tables import copy_items, write_shards
from . import on_disk, on_ray
from .events import Items, Sorted, choose_items, id_array, read, sort_events, time_columns
from .layouts import Source
from .on_disk import Sorter, Spool
from .options import PrepareOptions
from .outcome import (
    Outcome,
    Pages,
    count_fates,
    dropped,
    market_of,
    nothing_read,
    pages_around,
    pages_shown,
    say_page_ids,
    splits_of,
    write_about,
)
from .page_ids import PageIds

Array = npt.NDArray
log = logging.getLogger(__name__)

# Bytes that a click takes at most until its page is written, and each item of that; and an item
# shown (measured on 200,000 rows).
_OF_CLICK, _OF_ITEM, _OF_SHOWN = 140, 10, 60


# ---- pages ---------------------------------------------------------------------------------------


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
        self.ids = PageIds()

    def append(
        self, user: Array, time: Array, history: Array, counts: Array, shown: Sequence[Array]
    ) -> None:
        """Adds pages; `shown` has items, whether they were clicked, and if some page may be cut
        weights of all, `counts` of each."""
        ends = self._shown["item"].rows + np.cumsum(counts, dtype=np.int64)
        values = (user, time, history[:, 0], history[:, 1], ends - counts, ends)
        for spool, column in zip(self._columns.values(), values, strict=True):
            spool.append(column)
        for spool, column in zip(self._shown.values(), shown, strict=False):
            spool.append(column)

    def columns(self) -> dict[str, Array]:
        """Those of pages, mapped."""
        return {name: spool.array() for name, spool in self._columns.items()}

    def items(self) -> dict[str, Array]:
        """Those of page_items, mapped; weights only where some page was cut."""
        return {n: spool.array() for n, spool in self._shown.items() if n != "weight" or self.cut}

    def add(self, pages: Pages) -> None:
        """Adds those of some pages that are kept, and counts all."""
        self.fates.update(count_fates(pages.fate))
        self.cut += pages.cut
        self.ids += pages.ids
        self.append(pages.user, pages.time, pages.history, pages.counts, pages.shown)


def pages_of_events(
    sorted_: Sorted, items: Items, folder: Path, options: PrepareOptions
) -> PageSpools:
    """A page for each event, in order of time."""
    events, total = sorted_.events, len(sorted_.events.item)
    pages = PageSpools(folder, "made")
    market = market_of(items.table, sorted_.first_seen, sorted_.last_seen, options, items.ticks)
    popular = options.negatives == "popularity"
    pool = np.zeros(0, np.int32)
    if popular and total:
        pool = new_map(folder / "pool", np.int32, (total,))
    done, last_time, began = 0, np.iinfo(np.int64).min, 0
    for rows in sorted_.sorter.by_time(events.time):
        users = np.searchsorted(events.first, rows, side="right") - 1
        before = np.zeros(0, np.int64)
        if popular:
            pool[done : done + len(rows)] = events.item[rows]
            times = events.time[rows]
            # A moment can have begun in the last part.
            same = done + np.searchsorted(times, times)
            before = np.where(times == last_time, began, same)
            last_time, began = times[-1], before[-1]
        done += len(rows)
        pages.add(pages_around(rows, users, 0, before, events, market, pool, options))
    return pages


def pages_of_impressions(
    sorted_: Sorted, folder: Path, options: PrepareOptions, ticks: int
) -> PageSpools:
    """The pages shown, in order of time."""
    unordered = PageSpools(folder, "given")
    for rows in sorted_.shown():
        unordered.add(pages_shown(rows, 0, sorted_.events, options, ticks))
    pages = PageSpools(folder, "ordered")
    pages.fates, pages.cut, pages.ids = unordered.fates, unordered.cut, unordered.ids
    old, of_all = unordered.columns(), unordered.items()
    for places in sorted_.sorter.by_time(old["time"]):
        starts = old["pv_start"][places]
        counts = old["pv_end"][places] - starts
        shown = [copy_items(starts, counts, column) for column in of_all.values()]
        history = np.stack([old["history_start"][places], old["history_end"][places]], 1)
        pages.append(old["user"][places], old["time"][places], history, counts, shown)
    return pages


# ---- all of it -----------------------------------------------------------------------------------


def prepare(
    out: Location,
    *,
    source: Source,
    images: Location | None = None,
    options: PrepareOptions | None = None,
    engine: str = "local",
    ray_address: str | None = None,
) -> dict[str, Any]:
    """Writes the dataset folder `out` (see dataset.py) and gives its report.

    A local folder appears when it is complete: until then there is `<out>.partial-...` beside it
    (in it, where it is a mounted volume), which is removed again where something fails or a signal
    ends it. In an object store dataset.json is written last, and a folder without it is none. Items
    that no event or page names are left out, and with `images` those without a usable one, before
    any page is made.

    Args:
        out: a folder, local or s3:// and so on, that is not there yet or empty; with
            `options.overwrite` also a dataset. See output.py.
        source: from an importer of layouts.py, or of one's own.
        images: a folder of image files called after the items; None: a dataset without images.
        engine: "local", this process; or "ray", processes of this machine or a cluster. Both write
            the same bytes.
        ray_address: of a running cluster; None: processes of this machine.

    Raises:
        FileExistsError: `out` is there, or has come while this ran: then the message says where the
            finished dataset is.
        FileNotFoundError: a file or folder is not.
        DiskFullError: there is no room for it; the message says where.
        ValueError: `out` is something else than a dataset, an input or in one; columns or values
            that are not what they should be; nothing left to train on.
    """
    options = options or PrepareOptions()
    if options.keep_unclicked and source.impressions is None:
        raise ValueError(
            "keep_unclicked: expected a source with impressions (--page-column, or --layout "
            f"ebnerd), got {source.layout} with clicks alone: its pages are "
            "made around them"
        )
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, got {engine!r}")
    out, images = location(out), None if images is None else location(images)
    rule: dict[str, Any] = {
        "inputs": [images],
        "listed": source.files,
        "overwrite": options.overwrite,
    }
    need = _Need(options)

    for text in source.notes:
        log.warning("%s", text)

    def write(folder: Location, scratch: Path, begin: Callable[[], None]) -> dict[str, Any]:
        if engine == "ray":
            return on_ray.write(folder, source, images, options, ray_address, begin)
        threads = options.threads or len(os.sched_getaffinity(0))
        with closing(Sorter(scratch, options.memory_gib, threads)) as sorter:
            return _write(folder, scratch, sorter, source, images, options, begin, need)

    if isinstance(out, Path):
        with new_folder(out, DATASET, **rule, need=need) as folder:
            (folder / "scratch").mkdir()
            need.folder = folder
            report = write(folder, folder / "scratch", lambda: None)
            shutil.rmtree(folder / "scratch")
        return report
    check_remote(out, DATASET, **rule)

    def begin() -> None:
        check_remote(out, DATASET, **rule)
        delete_file(join(out, "dataset.json"))

    with tempfile.TemporaryDirectory(prefix="courier-prepare-") as temporary:
        need.folder = Path(temporary)
        with writing(temporary, need):
            return write(out, Path(temporary), begin)


class _Need:
    """What the message about a full disk says of the space that is needed."""

    def __init__(self, options: PrepareOptions) -> None:
        self.options, self.folder, self.rows, self.shown = options, Path(), 0, False

    def __call__(self) -> str:
        written = bytes_under(self.folder)
        text = f"prepare had written {size_text(written)} there"
        if not self.rows:
            return f"{text}, and reading had not ended"
        each = _OF_SHOWN if self.shown else _OF_CLICK + _OF_ITEM * self.options.page_size
        least = max(self.rows * each, written)
        return (
            f"{text} and needs about {size_text(least)} for {self.rows:,} rows, besides the images"
        )


def _write(
    folder: Location,
    scratch: Path,
    sorter: Sorter,
    source: Source,
    images: Location | None,
    options: PrepareOptions,
    begin: Callable[[], None],
    need: _Need,
) -> dict[str, Any]:
    log.info("reading %s", ", ".join(str(f) for f in source.files) or "the source")
    raw = read(source, sorter)
    if not raw.items.count:
        raise ValueError(nothing_read(source.files, raw.counts))
    need.rows = sum(c["read"] for c in raw.counts.values())
    need.shown = source.impressions is not None
    begin()
    log.info("items%s", f", images of {images}" if images else "")
    items = choose_items(raw, source, images, folder, options)
    log.info("sorting")
    sorted_ = sort_events(raw, items, scratch)
    log.info("pages")
    if source.impressions is not None:
        pages = pages_of_impressions(sorted_, scratch, options, items.ticks)
    else:
        pages = pages_of_events(sorted_, items, scratch, options)
    notes = say_page_ids(pages.ids, pages.fates, lambda user: str(sorted_.user_ids[user]))

    columns, shown = pages.columns(), pages.items()
    splits = splits_of(columns["time"], dropped(pages.fates), options, items.ticks)
    log.info("writing")
    train_end = int(columns["pv_end"][splits["train"][1] - 1])
    events = sorted_.events
    tables: dict[str, dict[str, Any]] = {
        "users": {"user_id": id_array(sorted_.user_ids)},
        "items": items.columns(
            _clicks(shown, train_end, len(items.table)), sorted_.first_seen, sorted_.last_seen
        ),
        "events": {"item": events.item, **time_columns(events.time, items.ticks)},
        "pages": columns | time_columns(columns["time"], items.ticks),
        "page_items": shown,
    }
    shards = {n: write_shards(folder, n, of, options.shard_rows) for n, of in tables.items()}
    if images is not None:
        shards["images"] = items.shards
    outcome = Outcome(
        raw.counts,
        len(sorted_.user_ids),
        len(items.table),
        None if images is None else items.images(),
        len(events.item),
        columns["time"],
        len(shown["item"]),
        splits,
        _history_lengths(columns, options.max_history),
        pages.cut,
        pages.fates,
        items.ticks,
        [*source.notes, *items.notes, *notes],
        pages.ids.counts(),
    )
    return write_about(folder, source, images, options, outcome, shards)


def _clicks(shown: dict[str, Array], end: int, items: int) -> Array:
    """[items] clicks among the first `end` rows, a part at a time: the columns are on the disk."""
    clicks = np.zeros(items, np.int64)
    for start in range(0, end, on_disk.PART):
        part = slice(start, min(start + on_disk.PART, end))
        clicks += np.bincount(shown["item"][part][shown["clicked"][part] == 1], minlength=items)
    return clicks


def _history_lengths(columns: dict[str, Array], longest: int) -> Array:
    """[longest + 1] pages by the length of their history."""
    lengths = np.zeros(longest + 1, np.int64)
    for start in range(0, len(columns["time"]), on_disk.PART):
        part = slice(start, start + on_disk.PART)
        length = columns["history_end"][part] - columns["history_start"][part]
        lengths += np.bincount(length, minlength=len(lengths))
    return lengths
