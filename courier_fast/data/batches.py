"""Batches of unique items: which pages a step trains on, and the table of items those pages share.

The plan is a pure function of (seed, epoch, step, rank, world): nothing has to be saved to resume
in the middle of an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from .dataset import Dataset

Array = npt.NDArray

WINDOW = 1 << 23  # pages that are shuffled together
CHUNK = 1 << 16  # pages that are cut into batches at once


class _Packed(NamedTuple):
    """Items of some pages, one page after another."""

    shown: Array  # [N]
    past: Array  # [K]
    pv_offsets: Array  # [B + 1]
    history_offsets: Array  # [B + 1]
    pv_start: Array  # [B] rows of page_items
    pv_end: Array  # [B]


@dataclass(frozen=True)
class PageBatch:
    """Some pages by their unique items; rows of the dataset's tables, all int64 but `clicked`."""

    pages: Array  # [B] pages
    items: Array  # [n] unique items in order of first use
    pv_index: Array  # [N] into items
    history_index: Array  # [K] into items
    pv_offsets: Array  # [B + 1]
    history_offsets: Array  # [B + 1]
    clicked: Array  # [N] bool

    @property
    def occurrences(self) -> int:
        """N + K: images that a loader without unique items would decode and encode."""
        return len(self.pv_index) + len(self.history_index)

    @property
    def num_anchors(self) -> int:
        """Clicked items on pages with a history: what L_rec averages over."""
        return int(self._is_anchor.sum())

    @property
    def anchor_items(self) -> Array:
        """[anchors] rows of the dataset's items."""
        return self.items[self.pv_index[self._is_anchor]]

    @property
    def _is_anchor(self) -> Array:
        has_history = np.diff(self.history_offsets) > 0
        return self.clicked & np.repeat(has_history, np.diff(self.pv_offsets))

    @property
    def num_sequence_anchors(self) -> int:
        """History items whose page has another, different one: what L_seq averages over."""
        return int(_sequence_anchors(self.history_index, self.history_offsets))

    @property
    def num_newest_anchors(self) -> int:
        """Histories of two items or more: what the loss of the newest clicks averages over."""
        return int((np.diff(self.history_offsets) > 1).sum())


@njit(cache=True, nogil=True)
def _sequence_anchors(index, offsets):  # type: ignore[no-untyped-def]
    count = 0
    for b in range(len(offsets) - 1):
        for k in range(offsets[b] + 1, offsets[b + 1]):
            if index[k] != index[offsets[b]]:
                count += offsets[b + 1] - offsets[b]
                break
    return count


@njit(cache=True, nogil=True)
def _unique(shown, pv_offsets, past, history_offsets, slot):  # type: ignore[no-untyped-def]
    """Items in order of first use, and both columns as indices into them; `slot` [items] is -1 on
    entry and on return."""
    items = np.empty(len(shown) + len(past), np.int64)
    pv_index, history_index = np.empty(len(shown), np.int64), np.empty(len(past), np.int64)
    n = 0
    for page in range(len(pv_offsets) - 1):
        for column, index, offsets in (
            (shown, pv_index, pv_offsets),
            (past, history_index, history_offsets),
        ):
            for i in range(offsets[page], offsets[page + 1]):
                item = column[i]
                if slot[item] < 0:
                    slot[item] = n
                    items[n] = item
                    n += 1
                index[i] = slot[item]
    for i in range(n):
        slot[items[i]] = -1
    return items[:n].copy(), pv_index, history_index


@njit(cache=True, nogil=True)
def _cut(shown, pv_offsets, past, history_offsets, seen, state, budget, bounds):  # type: ignore[no-untyped-def]
    """Bounds of consecutive batches of at most `budget` unique items, for pages that follow those
    of the last call; the first page over the budget, or -1. `state` [4]: batches so far, unique
    items of the open one, its mark in `seen`, pages before."""
    for page in range(len(pv_offsets) - 1):
        new = 0
        for attempt in range(2):
            new = 0
            for i in range(pv_offsets[page], pv_offsets[page + 1]):
                if seen[shown[i]] != state[2]:
                    seen[shown[i]] = state[2]
                    new += 1
            for i in range(history_offsets[page], history_offsets[page + 1]):
                if seen[past[i]] != state[2]:
                    seen[past[i]] = state[2]
                    new += 1
            if state[1] + new <= budget:
                break
            if attempt == 1 or state[1] == 0:
                return page
            state[0] += 1  # the page opens the next batch, and its items are counted anew
            bounds[state[0]] = state[3]
            state[2] += 1
            state[1] = 0
        state[1] += new
        state[3] += 1
    return -1


class Order:
    """The pages of a split in an epoch's order, a function of (seed, epoch).

    Up to WINDOW pages are shuffled as a whole. Of more, those of each shard stay near each other,
    so that a process reads one shard after another: shards come in a random order, and as many of
    them as make up WINDOW pages are shuffled together.

    Args:
        rows: the split.
        bounds: [S + 1] the first page of each shard, and the end.
    """

    def __init__(self, rows: range, bounds: Array, seed: int, shuffle: bool) -> None:
        self.rows, self.seed, self.shuffle = rows, seed, shuffle
        cuts = np.unique(np.clip(bounds, rows.start, rows.stop))
        self._pieces = (
            np.stack([cuts[:-1], cuts[1:]], 1)
            if len(rows) > WINDOW and shuffle
            else np.array([[rows.start, rows.stop]])
        )
        self._epoch = self._window = -1
        self._windows: list[Array] = []  # pieces of each
        self._ends = np.zeros(0, np.int64)
        self._pages = np.zeros(0, np.int64)

    def _numbers(self, epoch: int, stream: int) -> np.random.Generator:
        bits = np.random.Philox(key=[self.seed, epoch], counter=[0, 0, stream, 0])
        return np.random.Generator(bits)

    def _begin(self, epoch: int) -> None:
        pieces = self._pieces
        if len(pieces) > 1:
            pieces = pieces[self._numbers(epoch, 1).permutation(len(pieces))]
        ends = np.cumsum(pieces[:, 1] - pieces[:, 0])
        last = np.searchsorted(ends, np.arange(WINDOW, ends[-1] + WINDOW, WINDOW))
        last = np.unique(np.minimum(last, len(pieces) - 1))
        self._windows = np.split(pieces, last[:-1] + 1)
        self._ends, self._epoch, self._window = ends[last], epoch, -1

    def pages(self, epoch: int, start: int, stop: int) -> Array:
        """Those at the positions from `start` to `stop`."""
        if epoch != self._epoch:
            self._begin(epoch)
        found = [self._pages[:0]]
        while start < stop:
            window = int(np.searchsorted(self._ends, start, side="right"))
            first = int(self._ends[window - 1]) if window else 0
            if window != self._window:
                self._pages = np.concatenate([np.arange(a, b) for a, b in self._windows[window]])
                if self.shuffle:
                    self._numbers(epoch, 2 * window).shuffle(self._pages)
                self._window = window
            end = min(stop, int(self._ends[window]))
            found.append(self._pages[start - first : end - first])
            start = end
        return found[1] if len(found) == 2 else np.concatenate(found)


class BatchPlan:
    """Which pages each step trains on, for one rank of `world`.

    The pages of a split are shuffled by a permutation seeded with (seed, epoch) and cut into
    `steps(epoch) * world` batches, which go to the ranks in turns: ranks never overlap and no page
    is lost. Exactly one of `pages` and `images` says how large a batch is.

    Args:
        pages: pages per rank and step at most; the epoch is cut evenly, so sizes differ by one
            page.
        images: unique items per rank and step at most; pages are added until the next one would
            exceed it.
        history: the most recent history items of a page that are used.
        share: of all pages, the first ones, in place of the whole train split
            (`Dataset.first_pages`).
        shuffle: False keeps the order in time.

    Raises:
        ValueError: an empty split, or a page that alone holds more than `images` unique items.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        split: str = "train",
        share: float = 1.0,
        pages: int = 0,
        images: int = 0,
        history: int = 20,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        shuffle: bool = True,
    ) -> None:
        if (pages > 0) == (images > 0):
            raise ValueError(
                "expected exactly one of pages and images above 0, "
                f"got pages={pages}, images={images}"
            )
        if history < 1:
            raise ValueError(f"history: expected at least 1, got {history}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 <= rank < world, got rank {rank} of {world}")
        self.dataset = dataset
        self._columns = {
            n: dataset.pages.column(n)
            for n in ("history_start", "history_end", "pv_start", "pv_end")
        }
        self._shown, self._clicked = (dataset.page_items.column(n) for n in ("item", "clicked"))
        self._past = dataset.events.column("item")
        self.rows = dataset.first_pages(share) if share < 1 else dataset.split(split)
        if not len(self.rows):
            raise ValueError(f"split: {split!r} of {dataset.path} has no page")
        self.pages_per_batch, self.images_per_batch, self.history = pages, images, history
        self.seed, self.rank, self.world, self.shuffle = seed, rank, world, shuffle
        self._slot = np.full(dataset.num_items, -1, np.int64)
        self._order = Order(self.rows, dataset.pages.bounds, seed, shuffle)
        self._epoch = -1
        self._bounds = np.zeros(0, np.int64)
        self._recut = (-1, 0, 0)

    def recut(self, epoch: int, step: int, position: int) -> None:
        """Cuts the rest of an epoch anew: the steps from `step` on have its pages from `position`
        of its order on, those before it none."""
        self._recut, self._epoch = (epoch, step, position), -1

    def position(self, epoch: int, step: int) -> int:
        """How many pages of an epoch come before a step, on all ranks."""
        batches = self._batches(epoch)
        return self._bound(epoch, min(step * self.world, batches), batches)

    def _start(self, epoch: int) -> tuple[int, int]:
        """The first batch of an epoch that has pages, and its first page's position."""
        recut, step, position = self._recut
        return (step * self.world, position) if epoch == recut else (0, 0)

    def _prepare(self, epoch: int) -> None:
        """With `images`, cuts the epoch: one pass over its pages."""
        if epoch == self._epoch or self.pages_per_batch:
            return
        first, begin = self._start(epoch)
        bounds = np.full(len(self.rows) + 1, begin)
        state = np.array([0, 0, 1, begin])
        seen = np.zeros(self.dataset.num_items, np.int64)
        for start in range(begin, len(self.rows), CHUNK):
            pages = self._order.pages(epoch, start, min(start + CHUNK, len(self.rows)))
            packed = self._packed(pages)
            too_large = _cut(
                packed.shown,
                packed.pv_offsets,
                packed.past,
                packed.history_offsets,
                seen,
                state,
                self.images_per_batch,
                bounds,
            )
            if too_large >= 0:
                raise ValueError(
                    f"images: a batch may hold {self.images_per_batch} unique images, but page "
                    f"{pages[too_large]} alone holds more; raise it"
                )
        bounds[state[0] + 1] = len(self.rows)
        self._bounds = np.append(np.full(first, begin), bounds[: state[0] + 2])
        self._epoch = epoch

    def _packed(self, pages: Array) -> _Packed:
        start, end, pv_start, pv_end = (c.take(pages) for c in self._columns.values())
        start = np.maximum(start, end - self.history)
        pv, history = (np.append(0, np.cumsum(n)) for n in (pv_end - pv_start, end - start))
        shown, past = self._shown.ranges(pv_start, pv_end), self._past.ranges(start, end)
        return _Packed(shown, past, pv, history, pv_start, pv_end)

    def _batches(self, epoch: int) -> int:
        if not self.pages_per_batch:
            self._prepare(epoch)
            return len(self._bounds) - 1
        first, begin = self._start(epoch)
        rest = len(self.rows) - begin
        return first + -(-rest // (self.pages_per_batch * self.world)) * self.world

    def _bound(self, epoch: int, batch: int, batches: int) -> int:
        if not self.pages_per_batch:
            return int(self._bounds[batch])
        first, begin = self._start(epoch)
        rest = len(self.rows) - begin
        return begin + max(batch - first, 0) * rest // max(batches - first, 1)

    def steps(self, epoch: int) -> int:
        """Steps of this epoch: the same on every rank."""
        return -(-self._batches(epoch) // self.world)

    def pages(self, epoch: int, step: int) -> Array:
        """[B] this rank's pages of a step; B = 0 where the last step has too few for all ranks."""
        if not 0 <= step < self.steps(epoch):
            raise ValueError(f"step: expected 0 <= step < {self.steps(epoch)}, got {step}")
        batch, batches = step * self.world + self.rank, self._batches(epoch)
        if batch >= batches:
            return np.zeros(0, np.int64)
        return self._order.pages(
            epoch, *(self._bound(epoch, b, batches) for b in (batch, batch + 1))
        )

    def assemble(self, pages: Array) -> PageBatch:
        """Any pages in terms of their unique items. Not for several threads at once."""
        pages = np.ascontiguousarray(pages, np.int64)
        packed = self._packed(pages)
        items, pv_index, history_index = _unique(
            packed.shown, packed.pv_offsets, packed.past, packed.history_offsets, self._slot
        )
        clicked = self._clicked.ranges(packed.pv_start, packed.pv_end).view(np.bool_)
        return PageBatch(
            pages,
            items,
            pv_index,
            history_index,
            packed.pv_offsets,
            packed.history_offsets,
            clicked,
        )

    def log_q(self, histories: bool = False) -> Array:
        """[items] float32: log of each item's share among the PV items of the split, with
        `histories` among its used history items, too; that of half an occurrence where there is
        none."""
        counts = np.zeros(self.dataset.num_items)
        for items in self._shown.parts(*self._shown_rows()):
            counts += np.bincount(items, minlength=len(counts))
        if histories:
            # How many pages use each event: +1 where a history begins, -1 where it ends.
            uses = np.zeros(len(self._past) + 1)
            columns = (
                self._columns[n].parts(self.rows.start, self.rows.stop)
                for n in ("history_start", "history_end")
            )
            for start, end in zip(*columns, strict=True):
                np.add.at(uses, np.maximum(start, end - self.history), 1)
                np.add.at(uses, end, -1)
            uses, at = np.cumsum(uses), 0
            for items in self._past.parts():
                counts += np.bincount(items, uses[at : at + len(items)], len(counts))
                at += len(items)
        return np.log(np.maximum(counts, 0.5) / counts.sum()).astype(np.float32)

    @property
    def until(self) -> float:
        """Time of the newest page in seconds since 1970, an int unless times have parts of one."""
        return self.dataset.moments[self.rows.stop - 1]

    def _shown_rows(self) -> tuple[int, int]:
        """First row and end of the split's PV items."""
        start, end = (self._columns[n] for n in ("pv_start", "pv_end"))
        return int(start[self.rows.start]), int(end[self.rows.stop - 1])

    def weights(self, power: float) -> Array:
        """[items] float32: the split's clicks of each item to a power, divided by the mean over
        clicks; items without a click as with one."""
        clicks = np.zeros(self.dataset.num_items)
        rows = self._shown_rows()
        shown, clicks_of = self._shown.parts(*rows), self._clicked.parts(*rows)
        for items, clicked in zip(shown, clicks_of, strict=True):
            clicks += np.bincount(items, clicked, len(clicks))
        weights = np.maximum(clicks, 1.0) ** power
        return (weights * (clicks.sum() / max(clicks @ weights, 1e-300))).astype(np.float32)

    def batch(self, epoch: int, step: int) -> PageBatch:
        """This rank's pages of a step in terms of their unique items."""
        return self.assemble(self.pages(epoch, step))


def padded_size(n: int, buckets: tuple[int, ...] = ()) -> int:
    """The number of images that a batch of `n` is padded to: the next of `buckets`, or without any
    a multiple of 1/16 of its power of two.

    A shape that changes with every step would make cuDNN plan and torch.compile compile again;
    steps of a sixteenth keep the padding under 12.5 % (3 % on average) and a run at two or three
    shapes.
    """
    for size in sorted(buckets):
        if n <= size:
            return size
    grain = max(1, (1 << max(n - 1, 1).bit_length()) // 16)
    return -(-n // grain) * grain
