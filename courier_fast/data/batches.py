"""Batches of unique items: which pages a step trains on, and the table of items those pages share.

The plan is a pure function of (seed, epoch, step, rank, world): nothing has to be saved to resume in the middle of an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from .dataset import Dataset

Array = npt.NDArray


@dataclass(frozen=True)
class PageBatch:
    """Some pages in terms of their unique items; rows of the dataset's tables, all int64 but `clicked`."""

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
        """History items whose page has another, different history item: what L_seq averages over."""
        return int(_sequence_anchors(self.history_index, self.history_offsets))


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
def _gather(pages, pv_start, pv_end, pv_item, pv_clicked, from_, to, event_item, slot, offsets):  # type: ignore[no-untyped-def]
    """Items of the pages in order of first use; `slot` [items] is -1 on entry and on return."""
    pv_offsets, history_offsets = offsets
    for b in range(len(pages)):
        pv_offsets[b + 1] = pv_offsets[b] + pv_end[pages[b]] - pv_start[pages[b]]
        history_offsets[b + 1] = history_offsets[b] + to[pages[b]] - from_[b]
    N, K = pv_offsets[-1], history_offsets[-1]
    pv_index, history_index = np.empty(N, np.int64), np.empty(K, np.int64)
    clicked, items = np.empty(N, np.bool_), np.empty(N + K, np.int64)
    n = 0
    for b in range(len(pages)):
        source = pv_start[pages[b]]
        for i in range(pv_offsets[b], pv_offsets[b + 1]):
            item = pv_item[source]
            if slot[item] < 0:
                slot[item] = n
                items[n] = item
                n += 1
            pv_index[i] = slot[item]
            clicked[i] = pv_clicked[source]
            source += 1
        source = from_[b]
        for k in range(history_offsets[b], history_offsets[b + 1]):
            item = event_item[source]
            if slot[item] < 0:
                slot[item] = n
                items[n] = item
                n += 1
            history_index[k] = slot[item]
            source += 1
    for i in range(n):
        slot[items[i]] = -1
    return items[:n].copy(), pv_index, history_index, clicked


@njit(cache=True, nogil=True)
def _cut(pages, pv_start, pv_end, pv_item, from_, to, event_item, seen, budget, bounds):  # type: ignore[no-untyped-def]
    """Bounds of consecutive batches of at most `budget` unique items; (count, first page over the budget or -1)."""
    count, unique, mark = 0, 0, 1
    for position in range(len(pages)):
        page = pages[position]
        new = 0
        for attempt in range(2):
            new = 0
            for i in range(pv_start[page], pv_end[page]):
                if seen[pv_item[i]] != mark:
                    seen[pv_item[i]] = mark
                    new += 1
            for i in range(from_[position], to[page]):
                if seen[event_item[i]] != mark:
                    seen[event_item[i]] = mark
                    new += 1
            if unique + new <= budget:
                break
            if attempt == 1 or unique == 0:
                return count, page
            count += 1  # the page opens the next batch, and its items are counted anew
            bounds[count] = position
            mark += 1
            unique = 0
        unique += new
    count += 1
    bounds[count] = len(pages)
    return count, -1


class BatchPlan:
    """Which pages each step trains on, for one rank of `world`.

    The pages of a split are shuffled by a permutation seeded with (seed, epoch) and cut into `steps(epoch) * world` batches, which go to
    the ranks in turns: ranks never overlap and no page is lost. Exactly one of `pages` and `images` says how large a batch is.

    Args:
        pages: pages per rank and step at most; the epoch is cut evenly, so sizes differ by one page.
        images: unique items per rank and step at most; pages are added until the next one would exceed it.
        history: the most recent history items of a page that are used.
        share: of all pages, the first ones, in place of the whole train split (`Dataset.first_pages`).
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
                f"expected exactly one of pages and images above 0, got pages={pages}, images={images}"
            )
        if history < 1:
            raise ValueError(f"history: expected at least 1, got {history}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: expected 0 <= rank < world, got rank {rank} of {world}")
        self.dataset = dataset
        self.rows = dataset.first_pages(share) if share < 1 else dataset.split(split)
        if not len(self.rows):
            raise ValueError(f"split: {split!r} of {dataset.path} has no page")
        self.pages_per_batch, self.images_per_batch, self.history = pages, images, history
        self.seed, self.rank, self.world, self.shuffle = seed, rank, world, shuffle
        self._slot = np.full(dataset.num_items, -1, np.int64)
        self._epoch = -1
        self._order = self._bounds = np.zeros(0, np.int64)

    def _prepare(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        order = np.arange(self.rows.start, self.rows.stop, dtype=np.int64)
        if self.shuffle:
            np.random.Generator(np.random.Philox(key=[self.seed, epoch])).shuffle(order)
        count = len(order)
        if self.pages_per_batch:
            batches = -(-count // (self.pages_per_batch * self.world)) * self.world
            self._bounds = np.arange(batches + 1, dtype=np.int64) * count // batches
        else:
            d, bounds = self.dataset, np.zeros(count + 1, np.int64)
            seen = np.zeros(d.num_items, np.int64)
            batches, too_large = _cut(
                order, d.pv_start, d.pv_end, d.pv_item, self._history_start(order), d.history_end, d.event_item,
                seen, self.images_per_batch, bounds,
            )  # fmt: skip
            if too_large >= 0:
                raise ValueError(
                    f"images: a batch may hold {self.images_per_batch} unique images, but page {too_large} alone holds more; raise it"
                )
            self._bounds = bounds[: batches + 1]
        self._order, self._epoch = order, epoch

    def _history_start(self, pages: Array) -> Array:
        d = self.dataset
        return np.maximum(d.history_start[pages], d.history_end[pages] - self.history)

    def steps(self, epoch: int) -> int:
        """Steps of this epoch: the same on every rank."""
        self._prepare(epoch)
        return -(-(len(self._bounds) - 1) // self.world)

    def pages(self, epoch: int, step: int) -> Array:
        """[B] this rank's pages of a step; B = 0 where the last step has too few batches for all ranks."""
        if not 0 <= step < self.steps(epoch):
            raise ValueError(f"step: expected 0 <= step < {self.steps(epoch)}, got {step}")
        batch = step * self.world + self.rank
        if batch + 1 >= len(self._bounds):
            return self._order[:0]
        return self._order[self._bounds[batch] : self._bounds[batch + 1]]

    def assemble(self, pages: Array) -> PageBatch:
        """Any pages in terms of their unique items. Not for several threads at once."""
        d = self.dataset
        pages = np.ascontiguousarray(pages, np.int64)
        offsets = np.zeros((2, len(pages) + 1), np.int64)
        items, pv_index, history_index, clicked = _gather(
            pages, d.pv_start, d.pv_end, d.pv_item, d.pv_clicked, self._history_start(pages), d.history_end,
            d.event_item, self._slot, offsets,
        )  # fmt: skip
        return PageBatch(pages, items, pv_index, history_index, offsets[0], offsets[1], clicked)

    def log_q(self, histories: bool = False) -> Array:
        """[items] float32: log of each item's share among the PV items of the split, with `histories` among its used history
        items, too; that of half an occurrence where there is none."""
        d, pages = self.dataset, np.arange(self.rows.start, self.rows.stop)
        shown = slice(int(d.pv_start[pages[0]]), int(d.pv_end[pages[-1]]))
        counts = np.bincount(d.pv_item[shown], minlength=d.num_items).astype(np.float64)
        if histories:
            # How many pages use each event: +1 where a history begins, -1 where it ends.
            uses = np.zeros(len(d.event_item) + 1)
            np.add.at(uses, self._history_start(pages), 1)
            np.add.at(uses, d.history_end[pages], -1)
            counts += np.bincount(d.event_item, np.cumsum(uses)[:-1], d.num_items)
        return np.log(np.maximum(counts, 0.5) / counts.sum()).astype(np.float32)

    @property
    def until(self) -> int:
        """Time of the newest page, in seconds since 1970."""
        return int(self.dataset.page_time[self.rows.stop - 1])

    def weights(self, power: float) -> Array:
        """[items] float32: the split's clicks of each item to a power, divided by the mean over clicks; items without a click as with one."""
        d, pages = self.dataset, self.rows
        shown = slice(int(d.pv_start[pages.start]), int(d.pv_end[pages.stop - 1]))
        clicks = np.bincount(d.pv_item[shown], d.pv_clicked[shown], d.num_items)
        weights = np.maximum(clicks, 1.0) ** power
        return (weights * (clicks.sum() / max(clicks @ weights, 1e-300))).astype(np.float32)

    def batch(self, epoch: int, step: int) -> PageBatch:
        """This rank's pages of a step in terms of their unique items."""
        return self.assemble(self.pages(epoch, step))


def padded_size(n: int, buckets: tuple[int, ...] = ()) -> int:
    """The number of images that a batch of `n` is padded to: the next of `buckets`, or without any a multiple of 1/16 of its power of two.

    A shape that changes with every step would make cuDNN plan and torch.compile compile again; steps of a sixteenth keep the padding
    under 12.5 % (3 % on average) and a run at two or three shapes.
    """
    for size in sorted(buckets):
        if n <= size:
            return size
    grain = max(1, (1 << max(n - 1, 1).bit_length()) // 16)
    return -(-n // grain) * grain
