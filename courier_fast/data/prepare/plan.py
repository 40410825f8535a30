"""The order of steps of `prepare`, whoever executes them.

rows of the source -> by ranges of users' ids (their order is that of the parts) -> sorted, once
each: events of some users -> their pages -> by ranges of time -> sorted: pages in order -> shards,
cut at fixed rows.

Between the steps stand sums over all parts (which row of a table a part begins with, when an item
was first seen). Numbers of parts change nothing in the result: the rows of a part depend on its
users or its times alone, and shards are cut by row, images by their bytes; a shard is there
complete or not at all. The process that leads holds ids of items, when they were on offer, and a
few numbers for each part.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import polars as pl
from rich.console import Console
from rich.progress import track

from ...locations import Location
from ..images.files import Paths
from ..tables import write_shards
from . import steps
from .items import Candidates, Inputs, Items, spans
from .options import PrepareOptions
from .outcome import Outcome, dropped, nothing_read, say_page_ids, splits_of, write_about
from .page_ids import PageIds
from .pages import market_of
from .ready import embedded
from .rows import arrow_text

Array = npt.NDArray
log = logging.getLogger(__name__)

_TABLES = (
    ("events", "events"),
    ("impressions", "shown"),
    ("user_histories", "user_histories"),
)
IMAGES = 64  # of a part
MAX_CODES = np.iinfo(np.int32).max  # users, or items
_FAN = 32  # parts that are summed up at once


class Executor(Protocol):
    """Executes steps. What they return stays where it is, behind references that other steps take
    as arguments, and is let go with the last of them.

    Attributes:
        cores: steps that run at the same time.
        block: rows that are read at once.
        moved: bytes between steps.
    """

    cores: int
    block: int
    moved: Counter[str]

    def parts(self, rows: int) -> int:
        """Into how many parts rows are cut from here on."""

    def readers(self, frames: Sequence[pl.LazyFrame]) -> list[Sequence[pl.LazyFrame]]:
        """Tables by who reads them, in order."""

    def put(self, value: Any) -> Any:
        """A reference to a value that many steps take."""

    def get(self, what: Any) -> Any:
        """The value of a reference, or of each of a list."""

    def task(self, step: Callable[..., Any], returns: int = 1) -> Callable[..., Any]:
        """Starts the step with values and references: the reference of what it returns, or of each
        of several."""

    def stream(self, step: Callable[..., Iterator[Any]], returns: int) -> Callable[..., Any]:
        """As `task`, of a generator: references of so many values at a time, as they come."""

    def joined(self, parts: Sequence[Any]) -> Any:
        """One table of several."""


def write(
    executor: Executor,
    folder: Location,
    scratch: Path,
    inputs: Inputs,
    options: PrepareOptions,
    begin: Callable[[int], None],
) -> dict[str, Any]:
    """Writes the dataset folder and gives its report; `folder` and what is read are there for every
    step, `scratch` for this process alone. `begin` is told the rows read, before anything is
    written."""
    return _Run(executor, folder, scratch, inputs, options, begin).run()


class _Times(Sequence[int]):
    """Times of all pages, in order: those of each part are where it is."""

    def __init__(self, executor: Executor, parts: Sequence[Any], starts: Array) -> None:
        self._executor, self._parts, self._starts = executor, parts, starts

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, row: Any) -> Any:
        return self.cell("time", row % len(self))

    def cell(self, name: str, row: int) -> int:
        part, where = _place(self._starts, row)
        cell = self._executor.task(steps.cell)(self._parts[part], name, where)
        return int(self._executor.get(cell))


def _starts(counts: Sequence[int] | Array) -> Array:
    return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])


def _place(starts: Array, row: int) -> tuple[int, int]:
    """The part that has a row, and which of its rows that is."""
    part = int(np.searchsorted(starts, row, side="right")) - 1
    return part, row - int(starts[part])


def _check_codes(count: int) -> None:
    if count > MAX_CODES:
        raise ValueError(f"source: expected at most {MAX_CODES:,} users and items, got more")


class _Run:
    """One run of it; every method is a step, which lets go of what came before."""

    def __init__(
        self,
        executor: Executor,
        folder: Location,
        scratch: Path,
        inputs: Inputs,
        options: PrepareOptions,
        begin: Callable[[int], None],
    ) -> None:
        self.executor, self.task, self.get = executor, executor.task, executor.get
        self.folder, self.scratch, self.inputs = folder, scratch, inputs
        self.source = source = inputs.source
        self.options, self.begin = options, begin
        self.options_ref = executor.put(options)
        self.given = source.impressions is not None
        self.ticks = source.ticks if source.timed else 0  # of a second in times; 0: of none
        self.counts: dict[str, Counter[str]] = {}

    def run(self) -> dict[str, Any]:
        log.info("reading %s", ", ".join(str(f) for f in self.source.files) or "the source")
        items, pieces = self.read()
        log.info("sorting")
        users, events, shown, found, about = self.by_user(pieces)
        del pieces
        first_seen, last_seen = spans(self.get(found), items.table)
        histories = None
        if self.source.histories is None:
            again = sum(a["again"] for a in about)
            events_of = self.counts.setdefault("events", Counter())
            events_of["the same user, item and time again"] += again
        else:
            histories = sum((Counter(a["lists"]) for a in about), Counter())
        counts = {n: [a[n] for a in about] for n in ("users", "events", "pages")}
        _check_codes(sum(counts["users"]))
        log.info("pages")
        parts, statuses, cut, ids = self.pages(events, shown, about, items, first_seen, last_seen)
        of_user = _starts(counts["users"])
        notes = say_page_ids(ids, statuses, lambda user: self.user(users, of_user, user))
        del shown
        pages, of_pages, sums = self.by_time(parts)
        del parts
        log.info("writing")
        starts = _starts([s["pages"] for s in sums])
        first_items = _starts([s["items"] for s in sums])
        times = _Times(self.executor, pages, starts)
        named = self.source.named_splits
        splits = splits_of(times, dropped(statuses), self.options, self.ticks, named)
        last = splits["train"][1] - 1
        train_end = times.cell("pv_end", last) + int(first_items[_place(starts, last)[0]])
        clicks = self.clicks(of_pages, first_items, train_end, len(items.table))
        if not self.source.timed:
            first_seen, last_seen = self.ranks(pages, first_seen, last_seen)
        of_items = items.columns(clicks, first_seen, last_seen)
        weight = ["weight"] if cut else []
        time = ["time", "microsecond"] if items.ticks > 1 else ["time"]
        of_page = ["user", *time[:1], "history_start", "history_end", "pv_start", "pv_end"]
        of_page += time[1:] if self.source.timed else ["order"]
        of_event = ["item", *time] if histories is None else ["item"]
        written = {
            "users": self.write("users", users, of_user, ["user_id"]),
            "items": write_shards(self.folder, "items", of_items, self.options.shard_rows),
            "events": self.write("events", events, _starts(counts["events"]), of_event),
            "pages": self.write("pages", pages, starts, of_page, first_items),
            "page_items": self.write(
                "page_items", of_pages, first_items, ["item", "clicked", *weight]
            ),
        }
        shards = {n: of if n == "items" else [*chain(*self.get(of))] for n, of in written.items()}
        for name in ("images", "embeddings"):
            if getattr(self.inputs, name) is not None:
                shards[name] = items.shards
        outcome = Outcome(
            rows=self.counts,
            users=sum(counts["users"]),
            items=len(items.table),
            images=None if self.inputs.images is None else items.images(),
            embeddings=items.embeddings,
            events=sum(counts["events"]),
            times=times,
            page_items=int(first_items[-1]),
            splits=splits,
            lengths=np.sum([s["lengths"] for s in sums], axis=0),
            cut=cut,
            statuses=statuses,
            ticks=self.ticks,
            histories=histories,
            notes=[*self.source.notes, *items.notes, *notes],
            page_ids=ids.counts(),
        )
        return write_about(self.folder, self.inputs, self.options, outcome, shards)

    def read(self) -> tuple[Items, list[list[Any]]]:
        """The items, and each block's rows cut by users."""
        blocks, names, samples, total = [], [], [], 0
        for name, stream in self.streams():
            counts = self.counts.setdefault(name, Counter())
            for rows, items_of, about_ref in stream:
                about = self.get(about_ref)
                counts.update(about["counts"])
                blocks.append((name, about["rows"], rows, items_of))
                names.append(items_of)
                samples.append(pl.Series("id", about["users"], pl.String))
                total += about["size"]
        ids = self.tree(steps.union, names) if names else None
        table = pl.DataFrame(
            {"item_id": pl.Series("id", [] if ids is None else self.get(ids), pl.String)}
        )
        if not len(table):
            raise ValueError(nothing_read(self.source.files, self.counts))
        _check_codes(len(table))
        self.begin(sum(of["read"] for of in self.counts.values()))
        images, lost = self.inputs.images, self.inputs.dropped
        log.info("items%s", f", images of {images}" if images else "")
        items = self.choose(Candidates(table.with_row_index("code"), self.source, images))
        sample = pl.concat(samples).sort()
        count = self.executor.parts(total)
        bounds = arrow_text(
            sample[[len(sample) * b // count for b in range(1, count)]].unique().sort()
        )
        row = self.executor.put(items.row)
        cuts = [
            self.task(steps.to_users, len(bounds) + 2)(rows, items_of, ids, row, bounds)
            for _, _, rows, items_of in blocks
        ]
        sizes = [(name, rows) for name, rows, _, _ in blocks]
        del blocks, names
        for name in self.counts:
            self.counts[name][lost] += 0
        for (name, rows), about in zip(sizes, self.get([cut[-1] for cut in cuts]), strict=True):
            self.counts[name][lost] += rows - about["rows"]
            self.executor.moved["rows by user"] += about["bytes"]
        return items, [[cut[b] for cut in cuts] for b in range(len(bounds) + 1)]

    def streams(self) -> list[tuple[str, Any]]:
        """What those who read give, with the names of the source's tables."""
        whole, read = self.source, self.executor.stream(steps.read, 3)
        plain = dataclasses.replace(
            whole, events=None, impressions=None, user_histories=None, items=None, parts=None
        )
        return [
            (name, read(frames, table, plain, number, self.executor.block, whole.ticks))
            for name, table in _TABLES
            for number, frames in enumerate(self.executor.readers(whole.tables(name)))
        ]

    def tree(self, step: Callable[..., Any], refs: Sequence[Any]) -> Any:
        """One result of many, a few at a time."""
        while True:
            refs = [self.task(step)(*refs[i : i + _FAN]) for i in range(0, len(refs), _FAN)]
            if len(refs) == 1:
                return refs[0]

    def choose(self, candidates: Candidates) -> Items:
        """The items that stay. With images or embeddings, writes their shards and leaves out items
        without a usable one."""
        vectors = self.inputs.embeddings
        if vectors is not None:
            return embedded(candidates, vectors, self.folder, self.scratch, self.options)
        if self.inputs.images is None:
            return candidates.chosen([])
        shards: list[Any] = []
        number, before, item = 0, 0, 0
        held: list[tuple[Any, int, int]] = []  # images of the shard: a part, from and to
        for images, about in self.checked(candidates.paths):
            found, at = self.get(about), 0
            self.executor.moved["images"] += sum(found["bytes"])
            for height, width, size, reason in zip(*found.values(), strict=True):
                candidates.checked(item, height, width, reason)
                item += 1
                if not size:
                    continue
                if before // self.options.shard_bytes != number:
                    shards.append(self.write_images(number, held))
                    number, held = before // self.options.shard_bytes, []
                if not held or held[-1][0] is not images:
                    held.append((images, at, at))
                held[-1] = (images, held[-1][1], at + 1)
                at, before = at + 1, before + size
            if len(shards) > 4 * self.executor.cores:  # else what is checked would wait in memory
                self.get(shards[-4 * self.executor.cores])
        shards.append(self.write_images(number, held))
        return candidates.chosen(self.get(shards))

    def checked(self, paths: Sequence[Paths | None]) -> Iterator[Any]:
        """The usable images of each part of some files, and what was found; a bounded number of
        parts ahead."""

        def ahead() -> Iterator[Any]:
            queue: deque[Any] = deque()
            for start in range(0, len(paths), IMAGES):
                part = paths[start : start + IMAGES]
                queue.append(self.task(steps.usable_images, 2)(part, self.options_ref))
                if len(queue) > 4 * self.executor.cores:
                    yield queue.popleft()
            while queue:
                yield queue.popleft()

        quiet, console = not sys.stderr.isatty(), Console(stderr=True)
        parts = math.ceil(len(paths) / IMAGES)
        yield from track(ahead(), "images", parts, console=console, transient=True, disable=quiet)

    def write_images(self, number: int, held: list[tuple[Any, int, int]]) -> Any:
        ranges = [(a, b) for _, a, b in held]
        return self.task(steps.write_image_shard)(
            self.folder, number, ranges, *(ref for ref, _, _ in held)
        )

    def by_user(
        self, pieces: list[list[Any]]
    ) -> tuple[list[Any], list[Any], list[Any], Any, list[Any]]:
        """By part: users' ids, events, rows shown, counts; and when items were seen."""
        done = [self.task(steps.by_user, 5)(self.given, self.options_ref, *of) for of in pieces]
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
            market = self.executor.put(
                market_of(items.table, first_seen, last_seen, self.options, items.ticks)
            )
            if self.options.negatives == "popularity":
                pool, past = self.moments(events, bases[1], bounds)
        made = [
            self.task(steps.pages_of_users, len(bounds[0]) + 2)(
                events[p],
                shown[p] if self.given else None,
                tuple(int(b[p]) for b in bases),
                market,
                pool,
                past,
                bounds,
                self.options_ref,
                self.ticks,
            )
            for p in range(len(events))
        ]
        sums = self.get([of[-1] for of in made])
        statuses: Counter[int] = sum((s["statuses"] for s in sums), Counter())
        self.executor.moved["pages by time"] += sum(s["bytes"] for s in sums)
        parts = [[of[t] for of in made] for t in range(len(bounds[0]) + 1)]
        return (
            parts,
            statuses,
            sum(s["cut"] for s in sums),
            sum((s["ids"] for s in sums), PageIds()),
        )

    def user(self, users: list[Any], starts: Array, row: int) -> str:
        """A user's id."""
        part, where = _place(starts, row)
        return str(self.get(users[part])["user_id"][where])

    def time_bounds(self, about: list[Any], starts: Array) -> tuple[Array, Array]:
        """Times and rows that cut all pages into parts."""
        time = np.concatenate([a["time"] for a in about])
        row = np.concatenate(
            [a["row"] + start for a, start in zip(about, starts[:-1], strict=True)]
        )
        order = np.lexsort((row, time))
        count = self.executor.parts(int(starts[-1]))
        cuts = order[[len(order) * b // count for b in range(1, count)]]
        return time[cuts], row[cuts]

    def moments(
        self, events: list[Any], starts: Array, bounds: tuple[Array, Array]
    ) -> tuple[Any, Any]:
        """Items of all events by time, and how many events each time has before it."""
        parts = len(bounds[0]) + 1
        cuts = [
            self.task(steps.to_moments, parts + 1)(of, int(start), bounds)
            for of, start in zip(events, starts[:-1], strict=True)
        ]
        about = self.get([cut[-1] for cut in cuts])
        self.executor.moved["events by time"] += sum(a["bytes"] for a in about)
        before = _starts(np.sum([a["rows"] for a in about], axis=0))
        done = [
            self.task(steps.moments, 2)(int(before[t]), *(cut[t] for cut in cuts))
            for t in range(parts)
        ]
        pool, past = (self.executor.joined(of) for of in zip(*done, strict=True))
        return pool, past

    def by_time(self, parts: list[list[Any]]) -> tuple[list[Any], list[Any], list[Any]]:
        """By part: pages in order, their items, counts."""
        done = [self.task(steps.by_time, 3)(self.options_ref, *of) for of in parts]
        pages, items, sums = (list(of) for of in zip(*done, strict=True))
        return pages, items, self.get(sums)

    def clicks(self, parts: list[Any], starts: Array, end: int, items: int) -> Array:
        """[items] clicks among the first `end` rows of all."""
        counts = [
            self.task(steps.count_clicks)(part, end - int(start))
            for part, start in zip(parts, starts[:-1], strict=True)
            if start < end
        ]
        found, out = self.get(self.tree(steps.add_clicks, counts)), np.zeros(items, np.int64)
        out[found["item"]] = found["clicks"]
        return out

    def ranks(self, pages: list[Any], first: Array, last: Array) -> tuple[Array, Array]:
        """Numbers of pages in place of times that only order: the first at or after, the last
        up to."""
        refs = [self.task(steps.ranks)(part, first, last) for part in pages]
        before, until = self.get(self.tree(steps.add, refs))
        return np.minimum(before, np.maximum(until - 1, 0)), np.maximum(until - 1, 0)

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
