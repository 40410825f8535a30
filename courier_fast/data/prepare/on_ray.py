"""`prepare --engine ray`: the steps of steps.py as tasks of Ray, on the cores of a machine or
of a cluster.

rows of the source -> by ranges of users' ids (their order is that of the parts) -> sorted, once
each: events of some users -> their pages -> by ranges of time -> sorted: pages in order -> shards,
cut at fixed rows.

Between the steps stand sums over all parts (which row of a table a part begins with, when an item
was first seen), so they are tasks and not maps of Ray Data. Numbers of parts change nothing in the
result: the rows of a part depend on its users or its times alone, and shards are cut by row, images
by their bytes. A task whose process or machine dies runs again, as do those whose results went with
it; a shard is there complete or not at all. The process that leads them holds ids of items, when
they were on offer, and a few numbers for each part.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain, groupby
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ...engines import connected
from ...locations import Location
from ..read.scan import short
from ..tables import write_shards
from . import steps
from .events import MAX_CODES, NO_IMAGE, Candidates, Items, spans, text
from .layouts import Source
from .options import PrepareOptions
from .outcome import Outcome, dropped, market_of, nothing_read, say_page_ids, splits_of, write_about
from .page_ids import PageIds

Array = npt.NDArray
log = logging.getLogger(__name__)

# Rows of a part, about; more where there would be more than _PARTS, fewer where cores would have
# nothing to do.
PART = 1 << 22
_SMALL = 1 << 18
_PARTS = 1024  # a step sends each of its parts to each of the next
IMAGES = 256  # of a part
_RETRIES = 16  # of a task, where its process or machine dies
_FAN = 32  # parts that are summed up at once


def write(
    folder: Location,
    source: Source,
    images: Location | None,
    options: PrepareOptions,
    address: str | None = None,
    begin: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Writes the dataset folder and gives its report, as the local engine; `folder` and what is
    read are there for every process."""
    with connected(address) as ray:
        try:
            return _Run(ray, folder, source, images, options, begin).run()
        except ray.exceptions.RayError as error:
            cause: Exception = error
            while isinstance(inner := getattr(cause, "cause", None), Exception):
                cause = inner
            if isinstance(cause, ray.exceptions.RayError):
                raise RuntimeError(f"engine: ray failed: {short(cause)}") from error
            raise cause from None


class _Times:
    """Times of all pages, in order: those of each part are where it is."""

    def __init__(self, run: _Run, parts: Sequence[Any], starts: Array) -> None:
        self._run, self._parts, self._starts = run, parts, starts

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: int) -> int:
        return self.cell("time", row % len(self))

    def cell(self, name: str, row: int) -> int:
        part = int(np.searchsorted(self._starts, row, side="right")) - 1
        where = row - int(self._starts[part])
        return int(self._run.get(self._run.task(steps.cell)(self._parts[part], name, where)))


def _starts(counts: Sequence[int]) -> Array:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


class _Run:
    """One run of it; every method is a step, which lets go of what came before."""

    def __init__(
        self,
        ray: Any,
        folder: Location,
        source: Source,
        images: Location | None,
        options: PrepareOptions,
        begin: Callable[[], None],
    ) -> None:
        self.ray, self.folder, self.source, self.images, self.options = (
            ray,
            folder,
            source,
            images,
            options,
        )
        self.begin = begin  # called before anything is written
        self.options_ref = ray.put(options)
        self.cores = int(ray.cluster_resources().get("CPU", 1))
        self.given = source.impressions is not None
        self.counts: dict[str, Counter[str]] = {}
        self.shuffled: Counter[str] = Counter()  # bytes
        self._tasks: dict[Callable[..., Any], Any] = {}

    def task(self, step: Callable[..., Any], returns: int | str = 1) -> Callable[..., Any]:
        """`step` as a task."""
        if step not in self._tasks:
            self._tasks[step] = self.ray.remote(step)
        how = {"num_returns": returns, "max_retries": _RETRIES, "name": step.__name__}
        run: Callable[..., Any] = self._tasks[step].options(**how).remote
        return run

    def get(self, refs: Any) -> Any:
        return self.ray.get(refs)

    def parts(self, rows: int) -> int:
        """Into how many parts rows are cut."""
        return min(max(math.ceil(rows / PART), min(2 * self.cores, rows // _SMALL)), _PARTS)

    def tree(self, step: Callable[..., Any], refs: Sequence[Any]) -> Any:
        """One result of many, a few at a time."""
        while True:
            refs = [self.task(step)(*refs[i : i + _FAN]) for i in range(0, len(refs), _FAN)]
            if len(refs) == 1:
                return refs[0]

    def run(self) -> dict[str, Any]:
        log.info("reading %s", ", ".join(str(f) for f in self.source.files) or "the source")
        items, pieces = self.read()
        log.info("sorting")
        users, events, shown, found, about = self.by_user(pieces)
        del pieces
        first_seen, last_seen = spans(self.get(found), items.table)
        self.counts.setdefault("events", Counter())["the same user, item and time again"] += sum(
            a["again"] for a in about
        )
        counts = {n: [a[n] for a in about] for n in ("users", "events", "pages")}
        if sum(counts["users"]) > MAX_CODES:
            raise ValueError(f"source: expected at most {MAX_CODES:,} users and items, got more")
        log.info("pages")
        parts, fates, cut, ids = self.pages(events, shown, about, items, first_seen, last_seen)
        of_user = _starts(counts["users"])
        notes = say_page_ids(ids, fates, lambda user: self.user(users, of_user, user))
        del shown
        pages, of_pages, sums = self.by_time(parts)
        del parts
        log.info("writing")
        starts = _starts([s["pages"] for s in sums])
        first_items = _starts([s["items"] for s in sums])
        times = _Times(self, pages, starts)
        splits = splits_of(times, dropped(fates), self.options, items.ticks)  # type: ignore[arg-type]
        last = splits["train"][1] - 1
        train_end = times.cell("pv_end", last) + int(
            first_items[np.searchsorted(starts, last, side="right") - 1]
        )
        names = ["item", "clicked", "weight"] if cut else ["item", "clicked"]
        more = ["microsecond"] if items.ticks > 1 else []
        page_names = ["user", "time", "history_start", "history_end", "pv_start", "pv_end", *more]
        written = {
            "users": self.write("users", users, of_user, ["user_id"]),
            "items": write_shards(
                self.folder,
                "items",
                items.columns(
                    self.clicks(of_pages, first_items, train_end, len(items.table)),
                    first_seen,
                    last_seen,
                ),
                self.options.shard_rows,
            ),
            "events": self.write(
                "events", events, _starts(counts["events"]), ["item", "time", *more]
            ),
            "pages": self.write("pages", pages, starts, page_names, first_items),
            "page_items": self.write("page_items", of_pages, first_items, names),
        }
        shards = {n: of if n == "items" else [*chain(*self.get(of))] for n, of in written.items()}
        if self.images is not None:
            shards["images"] = items.shards
        lengths = np.sum([s["lengths"] for s in sums], axis=0)
        outcome = Outcome(
            self.counts,
            sum(counts["users"]),
            len(items.table),
            None if self.images is None else items.images(),
            sum(counts["events"]),
            times,  # type: ignore[arg-type]
            int(first_items[-1]),
            splits,
            lengths,
            cut,
            fates,
            items.ticks,  # type: ignore[arg-type]
            [*self.source.notes, *items.notes, *notes],
            ids.counts(),
        )
        report = write_about(self.folder, self.source, self.images, self.options, outcome, shards)
        log.info("bytes between tasks: %s", ", ".join(f"{n} {b}" for n, b in self.shuffled.items()))
        return report

    def read(self) -> tuple[Items, list[list[Any]]]:
        """The items, and each block's rows cut by users."""
        blocks, names, samples, total = [], [], [], 0
        for name, stream in self.streams():
            counts = self.counts.setdefault(name, Counter())
            for rows in stream:
                items = next(stream, None)
                if items is None:
                    self.get(rows)  # raises what the task did
                about = self.get(next(stream))
                counts.update(about["counts"])
                blocks.append((name, about["rows"], rows, items))
                names.append(items)
                samples.append(pl.Series("id", about["users"], pl.String))
                total += about["rows"]
        ids = self.tree(steps.union, names) if names else None
        table = pl.DataFrame(
            {"item_id": pl.Series("id", [] if ids is None else self.get(ids), pl.String)}
        )
        if not len(table):
            raise ValueError(nothing_read(self.source.files, self.counts))
        if len(table) > MAX_CODES:
            raise ValueError(f"source: expected at most {MAX_CODES:,} users and items, got more")
        self.begin()
        log.info("items%s", f", images of {self.images}" if self.images else "")
        items = self.choose(Candidates(table.with_row_index("code"), self.source, self.images))
        sample = pl.concat(samples).sort()
        count = self.parts(total)
        bounds = text(sample[[len(sample) * b // count for b in range(1, count)]].unique().sort())
        row = self.ray.put(items.row)
        cuts = [
            self.task(steps.to_users, len(bounds) + 2)(rows, items_of, ids, row, bounds)
            for _, _, rows, items_of in blocks
        ]
        sizes = [(name, rows) for name, rows, _, _ in blocks]
        del blocks
        for name in self.counts:
            self.counts[name][NO_IMAGE] += 0
        for (name, rows), about in zip(sizes, self.get([cut[-1] for cut in cuts]), strict=True):
            self.counts[name][NO_IMAGE] += rows - about["rows"]
            self.shuffled["rows by user"] += about["bytes"]
        return items, [[cut[b] for cut in cuts] for b in range(len(bounds) + 1)]

    def streams(self) -> list[tuple[str, Any]]:
        """What the tasks that read give, with the names of the source's tables."""
        whole = self.source
        plain = dataclasses.replace(whole, events=None, impressions=None, items=None, parts=None)
        ticks = whole.ticks
        streams = []
        for name, table in (("events", "events"), ("impressions", "shown")):
            frames = whole.tables(name)
            for number, part in enumerate(frames):
                read = self.task(steps.read, "streaming")
                streams.append((name, read(part, table, plain, number, PART, ticks)))
        return streams

    def choose(self, candidates: Candidates) -> Items:
        """The items that stay. Parts of images are checked ahead of their shards, a bounded number
        at a time."""
        if self.images is None:
            return candidates.chosen([])
        paths = candidates.paths
        ahead = 4 * self.cores
        queue: list[tuple[int, Any, Any]] = []
        shards: list[Any] = []
        number, before = 0, 0
        held: list[tuple[Any, int, int]] = []  # images of the shard: a part, from and to
        for start in range(0, len(paths) + ahead * IMAGES, IMAGES):
            if start < len(paths):
                part = paths[start : start + IMAGES]
                queue.append((start, *self.task(steps.check, 2)(part, self.options_ref)))
            if len(queue) > ahead or (start >= len(paths) and queue):
                first, images, about = queue.pop(0)
                found, at = self.get(about), 0
                self.shuffled["images"] += sum(found["bytes"])
                for i, (height, width, size, reason) in enumerate(
                    zip(*found.values(), strict=True), first
                ):
                    candidates.checked(i, height, width, reason)
                    if not size:
                        continue
                    if before // self.options.shard_bytes != number:
                        shards.append(self.write_images(number, held))
                        number, held = before // self.options.shard_bytes, []
                    if not held or held[-1][0] is not images:
                        held.append((images, at, at))
                    held[-1] = (images, held[-1][1], at + 1)
                    at, before = at + 1, before + size
                if len(shards) > ahead:  # else what is checked would wait in memory
                    self.ray.wait(shards[-ahead:], num_returns=1)
        shards.append(self.write_images(number, held))
        return candidates.chosen(self.get(shards))

    def write_images(self, number: int, held: list[tuple[Any, int, int]]) -> Any:
        ranges = [(a, b) for _, a, b in held]
        return self.task(steps.write_image_shard)(
            self.folder, number, ranges, *(ref for ref, _, _ in held)
        )

    def by_user(
        self, pieces: list[list[Any]]
    ) -> tuple[list[Any], list[Any], list[Any], Any, list[Any]]:
        """By part: users' ids, events, rows shown, counts; and when items were seen."""
        done = [self.task(steps.by_user, 5)(self.given, *of) for of in pieces]
        users, events, shown, found, about = (list(of) for of in zip(*done, strict=True))
        return users, events, shown, self.tree(steps.merge_spans, found), self.get(about)

    def pages(
        self,
        events: list[Any],
        shown: list[Any],
        about: list[Any],
        items: Items,
        first_seen: Array,
        last_seen: Array,
    ) -> tuple[list[list[Any]], Counter[int], int, PageIds]:
        """Pages of each part of users, cut by time; what became of all; how many were cut; ids."""
        bases = [_starts([a[n] for a in about]) for n in ("users", "events", "pages")]
        bounds = self.time_bounds(about, bases[2])
        market, pool, past = None, None, None
        if not self.given:
            market = self.ray.put(
                market_of(items.table, first_seen, last_seen, self.options, items.ticks)
            )
            if self.options.negatives == "popularity":
                pool, past = self.moments(events, bases[1], bounds)
        made = [
            self.task(steps.make, len(bounds[0]) + 2)(
                events[p],
                shown[p] if self.given else None,
                tuple(int(b[p]) for b in bases),
                market,
                pool,
                past,
                bounds,
                self.options_ref,
                items.ticks,
            )
            for p in range(len(events))
        ]
        sums = self.get([of[-1] for of in made])
        fates: Counter[int] = sum((s["fates"] for s in sums), Counter())
        self.shuffled["pages by time"] += sum(s["bytes"] for s in sums)
        parts = [[of[t] for of in made] for t in range(len(bounds[0]) + 1)]
        return parts, fates, sum(s["cut"] for s in sums), sum((s["ids"] for s in sums), PageIds())

    def user(self, users: list[Any], starts: Array, row: int) -> str:
        """A user's id."""
        part = int(np.searchsorted(starts, row, side="right")) - 1
        return str(self.get(users[part])["user_id"][row - int(starts[part])])

    def time_bounds(self, about: list[Any], starts: Array) -> tuple[Array, Array]:
        """Times and rows that cut all pages into parts."""
        time = np.concatenate([a["time"] for a in about])
        row = np.concatenate(
            [a["row"] + start for a, start in zip(about, starts[:-1], strict=True)]
        )
        order = np.lexsort((row, time))
        count = self.parts(int(starts[-1]))
        cuts = order[[len(order) * b // count for b in range(1, count)]]
        return time[cuts], row[cuts]

    def moments(
        self, events: list[Any], starts: Array, bounds: tuple[Array, Array]
    ) -> tuple[Any, Any]:
        """Items of all events by time, and how many events each time has before it."""
        cuts = [
            self.task(steps.to_moments, len(bounds[0]) + 2)(of, int(start), bounds)
            for of, start in zip(events, starts[:-1], strict=True)
        ]
        self.shuffled["events by time"] += sum(self.get([cut[-1] for cut in cuts]))
        parts = [
            self.task(steps.moments)(*(cut[t] for cut in cuts)) for t in range(len(bounds[0]) + 1)
        ]
        pool, past = self.task(steps.join_moments, 2)(*parts)
        return pool, past

    def by_time(self, parts: list[list[Any]]) -> tuple[list[Any], list[Any], list[Any]]:
        """By part: pages in order, their items, counts."""
        done = [self.task(steps.by_time, 3)(self.options_ref, *of) for of in parts]
        pages, items, sums = (list(of) for of in zip(*done, strict=True))
        return pages, items, self.get(sums)

    def clicks(self, parts: list[Any], starts: Array, end: int, items: int) -> Array:
        """[items] clicks among the first `end` rows of all."""
        counts = [
            self.task(steps.clicked)(part, end - int(start))
            for part, start in zip(parts, starts[:-1], strict=True)
            if start < end
        ]
        found, out = self.get(self.tree(steps.add_clicks, counts)), np.zeros(items, np.int64)
        out[found["item"]] = found["clicks"]
        return out

    def write(
        self,
        table: str,
        parts: list[Any],
        starts: Array,
        names: list[str],
        shifts: Array | None = None,
    ) -> list[Any]:
        """Entries of a table's shards; a part's task writes those that begin in it, with rows of
        the next ones."""
        rows, total = self.options.shard_rows, int(starts[-1])
        shifts = np.zeros(len(starts), np.int64) if shifts is None else shifts
        shards = [
            (s, first, min(first + rows, total))
            for s, first in enumerate(range(0, max(total, 1), rows))
        ]
        begin = np.searchsorted(starts[1:], [first for _, first, _ in shards], side="right")
        refs = []
        for part, group in groupby(zip(begin.tolist(), shards, strict=True), lambda of: of[0]):
            mine = [shard for _, shard in group]
            p = min(part, len(parts) - 1)  # the one shard of an empty table
            stop = max(int(np.searchsorted(starts[:-1], mine[-1][2], side="left")), p + 1)
            refs.append(
                self.task(steps.write_rows)(
                    self.folder,
                    table,
                    names,
                    mine,
                    starts[p:stop].tolist(),
                    shifts[p:stop].tolist(),
                    *parts[p:stop],
                )
            )
        return refs
