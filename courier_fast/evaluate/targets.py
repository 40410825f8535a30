"""Held-out clicks, and the candidates that each is ranked among."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

from ..data.dataset import Dataset

Array = npt.NDArray

CANDIDATES = ("page", "sampled", "popular")


@dataclass(frozen=True)
class Targets:
    """The clicked items of a split's pages that have a history: T targets, by page.

    `history_start` to `history_end` are rows of the dataset's events: the most recent ones before
    the page.
    """

    item: Array  # [T]
    page: Array  # [T] rows of the dataset's pages
    history_start: Array  # [T]
    history_end: Array  # [T]

    def __len__(self) -> int:
        return len(self.item)

    def take(self, keep: Array) -> Targets:
        return Targets(
            self.item[keep], self.page[keep], self.history_start[keep], self.history_end[keep]
        )


@dataclass(frozen=True)
class Candidates:
    """The items that each target is ranked among: `items` [C] in segments `offsets` [T + 1], the
    target first."""

    targets: Targets
    items: Array
    offsets: Array


def find_targets(dataset: Dataset, split: str = "test", history: int = 20) -> Targets:
    """The split's held-out clicks with the `history` most recent events before their page.

    An item clicked twice on a page is one target. ValueError for an unknown split, one without
    pages, or one without a click after a history.
    """
    if history < 1:
        raise ValueError(f"history: expected at least 1, got {history}")
    d, pages = dataset, dataset.split(split)
    if not len(pages):
        raise ValueError(f"split: expected pages in {split!r} of {d.path}, got none")
    rows = slice(int(d.pv_start[pages.start]), int(d.pv_end[pages.stop - 1]))
    page = np.repeat(
        np.arange(pages.start, pages.stop), (d.pv_end - d.pv_start)[pages.start : pages.stop]
    )
    clicked = d.pv_clicked[rows] & (d.history_end > d.history_start)[page]
    key = np.unique(page[clicked] * d.num_items + d.pv_item[rows][clicked])
    page, item = np.divmod(key, d.num_items)
    if not len(page):
        raise ValueError(
            f"split: expected a click on a page with a history in {split!r} of {d.path}, got none"
        )
    end = d.history_end[page]
    return Targets(item, page, np.maximum(d.history_start[page], end - history), end)


@njit(cache=True, nogil=True)
def _mark(seen, item, mark):  # type: ignore[no-untyped-def]
    """Whether the item was not marked yet; it is now."""
    new = seen[item] != mark
    seen[item] = mark
    return new


@njit(cache=True, nogil=True)
def _page_items(item, page, pv_start, pv_end, pv_item, pv_clicked, seen, offsets, out):  # type: ignore[no-untyped-def]
    n = 0
    for t in range(len(item)):
        rows = range(pv_start[page[t]], pv_end[page[t]])
        for i in rows:
            if pv_clicked[i]:
                seen[pv_item[i]] = t
        out[n] = item[t]
        n += 1
        for i in rows:
            if _mark(seen, pv_item[i], t):
                out[n] = pv_item[i]
                n += 1
        offsets[t + 1] = n


@njit(cache=True, nogil=True)
def _sampled_items(  # type: ignore[no-untyped-def]
    rng,
    item,
    page,
    history_start,
    history_end,
    event_item,
    pv_start,
    pv_end,
    pv_item,
    pv_clicked,
    weight,
    total,
    others,
    seen,
    offsets,
    out,
):
    """`weight` [items] of each item in a draw and `total`, its running sum.

    Draws are repeated until they are new, which is sampling without replacement one by one. Where
    nearly all of the weight is taken, the rest comes from exponential keys (Efraimidis and Spirakis
    2006), which have the same distribution.
    """
    n = 0
    available = np.count_nonzero(weight)
    for t in range(len(item)):
        p, free = page[t], available
        for i in range(history_start[p], history_end[p]):
            if _mark(seen, event_item[i], t) and weight[event_item[i]] > 0:
                free -= 1
        for i in range(pv_start[p], pv_end[p]):
            if pv_clicked[i] and _mark(seen, pv_item[i], t) and weight[pv_item[i]] > 0:
                free -= 1
        out[n] = item[t]
        n += 1
        wanted = min(others, free)
        tries = 20 * wanted
        while wanted > 0 and tries > 0:
            tries -= 1
            drawn = np.searchsorted(total, rng.random() * total[-1], side="right")
            if _mark(seen, drawn, t):
                out[n] = drawn
                n += 1
                wanted -= 1
        if wanted > 0:
            keys = np.full(len(weight), np.inf)
            for j in range(len(weight)):
                if weight[j] > 0 and seen[j] != t:
                    keys[j] = rng.standard_exponential() / weight[j]
            order = np.argsort(keys)
            for j in order[:wanted]:
                out[n] = j
                n += 1
        offsets[t + 1] = n


def _candidates(targets: Targets, items: Array, offsets: Array) -> Candidates:
    """Without the targets that have no other candidate."""
    sizes = np.diff(offsets)
    keep = sizes > 1
    if not keep.any():
        raise ValueError("candidates: expected another item beside a clicked one, got none")
    items = items[: offsets[-1]][np.repeat(keep, sizes)]
    return Candidates(
        targets.take(keep), items, np.concatenate([[0], np.cumsum(sizes[keep], dtype=np.int64)])
    )


def page_candidates(dataset: Dataset, targets: Targets) -> Candidates:
    """Each target among the items of its page that were not clicked; targets on pages that show
    nothing else are left out."""
    d = dataset
    most = int((d.pv_end - d.pv_start)[targets.page].sum())
    offsets, items = np.zeros(len(targets) + 1, np.int64), np.zeros(most, np.int32)
    _page_items(
        targets.item,
        targets.page,
        d.pv_start,
        d.pv_end,
        d.pv_item,
        d.pv_clicked,
        np.full(d.num_items, -1),
        offsets,
        items,
    )
    return _candidates(targets, items, offsets)


def sampled_candidates(
    dataset: Dataset,
    targets: Targets,
    count: int = 100,
    *,
    popular: bool = False,
    seed: int = 0,
) -> Candidates:
    """Each target among `count - 1` distinct items that its user had not clicked before the page
    nor clicked on it, or as many as there are.

    The draw depends on the dataset, the targets and the seed alone, so every method ranks the same
    items. Where the dataset has images, only items with one are drawn.

    Args:
        count: candidates in all, at least 2.
        popular: draws by clicks on pages of the train split, in place of uniformly; items without
            such a click are never drawn.
    """
    if count < 2:
        raise ValueError(f"count: expected at least 2 candidates, got {count}")
    d = dataset
    weight = d.item_clicks.astype(np.float64) if popular else np.ones(d.num_items)
    if d.has_images:
        weight = weight * d.images.present
    if not weight.any():
        raise ValueError(
            "candidates: expected items to "
            f"sample{' with clicks in the train split' if popular else ''}, got none"
        )
    offsets = np.zeros(len(targets) + 1, np.int64)
    items = np.zeros(len(targets) * count, np.int32)
    _sampled_items(
        np.random.default_rng(seed),
        targets.item,
        targets.page,
        d.history_start,
        d.history_end,
        d.event_item,
        d.pv_start,
        d.pv_end,
        d.pv_item,
        d.pv_clicked,
        weight,
        np.cumsum(weight),
        count - 1,
        np.full(d.num_items, -1),
        offsets,
        items,
    )
    return _candidates(targets, items, offsets)
