"""A dataset's pages as impressions, the ranges of time that a comparison trains and is judged on,
and what must not be there.

    time ->  [ encoder pages ][ CTR training pages ][ validation ][ test ]  protocol "disjoint"
             [ encoder pages = CTR training pages  ][ validation ][ test ]  protocol "shared"
             [ encoder pages ][ older pages ][ period | period | period ]   protocol "warm"

What is counted, fitted or clustered beside the CTR model comes from the encoder pages, the weights
from the CTR training pages, the moment to stop from validation. With "shared" the embeddings were
trained on the very clicks that the CTR model then learns from, so it trusts them more than they
deserve later; in production it is always "disjoint". "warm" has the ranges of "disjoint", but its
models go on learning over validation and test (warm.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..data.dataset import Dataset

Array = npt.NDArray

PROTOCOLS = ("disjoint", "shared", "warm")
SCRATCH = "warm-scratch"  # the other half of "warm": the inputs are there from the start
PERIODS = 10  # where pages have no times
DAY = 86_400
RECENT = 30 * DAY


class Impressions:
    """The items shown on some pages: n impressions in the order of the pages, arrays of the dataset
    without a copy where possible.

    Args:
        pages: a split's name, or rows of the dataset's pages.
        history: most recent events before a page that are its history; they may be of any range of
            time.

    Attributes:
        item, clicked: [n] rows of the dataset's items; bool.
        weight: [n] float32, how many impressions each stands for where pages were cut; None where
            none was.
        page, user: [n] rows of the dataset's pages and users.
        offsets: [P + 1] the impressions of each page.
        history_start, history_end: [P] rows of the dataset's events.

    ValueError for an unknown split, no page, a step in the range, or no history item.
    """

    def __init__(self, dataset: Dataset, pages: str | range, *, history: int = 20) -> None:
        if history < 1:
            raise ValueError(f"history: expected at least 1, got {history}")
        name = pages if isinstance(pages, str) else f"pages {pages.start} to {pages.stop}"
        self.pages = dataset.split(pages) if isinstance(pages, str) else pages
        if not len(self.pages) or self.pages.step != 1:
            raise ValueError(
                f"pages: expected some, in a row, in {name} of {dataset.path}, got {self.pages}"
            )
        d, rows = dataset, slice(self.pages.start, self.pages.stop)
        self.dataset, self.history = dataset, history
        first, last = int(d.pv_start[self.pages.start]), int(d.pv_end[self.pages.stop - 1])
        self.item, self.clicked = d.pv_item[first:last], d.pv_clicked[first:last]
        self.weight = None if d.pv_weight is None else d.pv_weight[first:last]
        self.offsets = np.append(d.pv_start[rows], last).astype(np.int64) - first
        self.history_end = d.history_end[rows]
        self.history_start = np.maximum(d.history_start[rows], self.history_end - history)

    def __len__(self) -> int:
        return len(self.item)

    @cached_property
    def page(self) -> Array:
        return np.repeat(np.arange(self.pages.start, self.pages.stop), np.diff(self.offsets))

    @property
    def user(self) -> Array:
        return self.dataset.page_user[self.page]

    @property
    def time(self) -> Array:
        """[n] seconds since 1970."""
        return self.dataset.page_time[self.page]

    @property
    def history_length(self) -> Array:
        """[n] history items used."""
        return (self.history_end - self.history_start)[self.page - self.pages.start]

    @property
    def hour(self) -> Array:
        """[n] of the day, UTC; 0 where pages have no times."""
        return self.time // 3600 % 24 * self.dataset.timed

    @property
    def weekday(self) -> Array:
        """[n] 0 on Mondays, UTC; 0 where pages have no times."""
        return (self.time // DAY + 3) % 7 * self.dataset.timed

    def popularity(self) -> Array:
        """[n, 2] float32 log(1 + clicks on the item strictly before the page's second): all of
        them, and those of the last 30 days (all, where pages have no times).

        Clicks are the dataset's events, or, where histories are given, the clicks on its pages."""
        d = self.dataset
        item, time = _clicks(d)
        # One sorted key answers "how many events of this item before this time".
        window = RECENT if d.timed else len(d.page_time)
        low = min(time.min(initial=0), d.page_time.min(initial=0) - window)
        span = max(time.max(initial=0), d.page_time.max(initial=0)) - low + 2
        key = np.sort(item * span + (time - low))
        mine = self.item.astype(np.int64) * span
        before, recent, first = (
            np.searchsorted(key, mine + at) for at in (self.time - low, self.time - window - low, 0)
        )
        return np.log1p(np.stack([before - first, before - recent], 1)).astype(np.float32)


def _clicks(d: Dataset) -> tuple[Array, Array]:
    """Items that were clicked, int64, and when."""
    if not d.histories_given:
        return d.event_item.astype(np.int64), d.event_time
    page = np.repeat(np.arange(d.num_pages), d.pv_end - d.pv_start)
    return d.pv_item[d.pv_clicked].astype(np.int64), d.page_time[page[d.pv_clicked]]


def histories_said(dataset: Dataset) -> str | None:
    """A line about histories that are given, for people; None for others."""
    if not dataset.histories_given:
        return None
    own = "with" if dataset.info.get("options", {}).get("keep_own") else "without"
    return f"Histories are given: lists of the source, {own} what was clicked on their own page."


def _range(dataset: Dataset, pages: range) -> str:
    """When a range of pages begins, for people."""
    if not dataset.timed:
        return f"page {pages.start:,}"
    return str(as_date(dataset.page_time[pages.start]))


@dataclass(frozen=True)
class Protocol:
    """Which pages teach what; all are rows of the dataset's pages. `bound` (seconds) is where the
    encoder's pages end. `periods`, of a warm start: the pages of validation and test, cut."""

    name: str
    encoder: range
    train: range
    validation: range
    test: range
    bound: float
    periods: Mapping[str, Sequence[range]] = field(default_factory=dict)

    def describe(self, dataset: Dataset) -> str:
        """A line about the ranges, for people."""
        parts = [
            ("embeddings", self.encoder),
            ("CTR model", self.train),
            ("validation", self.validation),
            ("test", self.test),
        ]
        said = ", ".join(
            f"{what} {len(pages):,} pages from {_range(dataset, pages)}" for what, pages in parts
        )
        bound = as_date(self.bound) if dataset.timed else f"page {self.bound:,}"
        if self.periods:
            count = sum(map(len, self.periods.values()))
            said += f", the last two in {count} periods, each predicted and then trained on"
        return f"{self.name}: {said}; embeddings must come from pages before {bound}"

    def known_items(self, dataset: Dataset) -> Array:
        """[items] bool: shown or clicked before `bound`: what k-means and standardisation see."""
        known = np.zeros(dataset.num_items, bool)
        if dataset.histories_given:
            d, pages = dataset, np.flatnonzero(dataset.page_moment < self.bound)
            past = d.events.column("item").ranges(d.history_start[pages], d.history_end[pages])
            known[past] = True
        else:
            known[dataset.event_item[dataset.event_moment < self.bound]] = True
        known[Impressions(dataset, self.encoder).item] = True
        return known


def make_protocol(
    dataset: Dataset, name: str = "disjoint", encoder_share: float = 0.5, periods: int = 0
) -> Protocol:
    """The ranges of a dataset's pages. The bound between encoder and CTR training never divides a
    moment.

    Args:
        encoder_share: of all pages, the first ones, for "disjoint" and "warm".
        periods: of "warm", of as many pages each; 0: days (UTC), or 10 where pages have no times.

    Raises:
        ValueError: an unknown protocol, a share that leaves a range without pages, or a period
            without a page or a click.
    """
    if name not in PROTOCOLS:
        raise ValueError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {name!r}")
    train, validation, test = (dataset.split(s) for s in ("train", "validation", "test"))
    time, cut = dataset.page_moment, train.stop
    if name != "shared":
        if not 0 < encoder_share < 1:
            raise ValueError(f"encoder_share: expected above 0 and below 1, got {encoder_share}")
        cut = dataset.first_pages(encoder_share).stop
        if cut == train.stop:
            raise ValueError(
                f"encoder_share: expected a share of all {dataset.num_pages} pages that leaves "
                f"some of the train split's {len(train)} to both encoder "
                f"and CTR model, got {encoder_share}"
            )
    encoder = range(train.start, cut)
    ctr = range(cut, train.stop) if name != "shared" else train
    bound = time[cut].item() if cut < len(time) else int(time[-1]) + 1
    found = Protocol(name, encoder, ctr, validation, test, bound)
    if name == "warm":
        found = replace(found, periods=_periods(dataset, (validation, test), periods))
    return found


def _periods(
    dataset: Dataset, ranges: tuple[range, range], count: int
) -> dict[str, tuple[range, ...]]:
    """The pages of validation and test, cut between moments alone: into days, or together into so
    many periods of about as many pages."""
    first, last = ranges[0].start, ranges[1].stop
    time = dataset.page_moment[first:last]
    if count > last - first or count < 0:
        raise ValueError(
            f"periods: expected at most the {last - first} pages of validation and test, got "
            f"{count}"
        )
    if count == 0 and dataset.timed:
        cuts = np.flatnonzero(np.diff(time // DAY)) + 1
    else:
        wanted = np.linspace(0, last - first, (count or min(PERIODS, last - first)) + 1)[1:-1]
        # A moment is not divided.
        cuts = np.searchsorted(time, time[wanted.astype(np.int64)])
    bounds = np.unique(np.concatenate([[0], cuts, [ranges[1].start - first], [last - first]]))
    found: dict[str, list[range]] = {"validation": [], "test": []}
    for start, stop in zip(bounds + first, bounds[1:] + first, strict=False):
        found["validation" if start < ranges[1].start else "test"].append(range(start, stop))
        clicked = dataset.pv_clicked[dataset.pv_start[start] : dataset.pv_end[stop - 1]]
        if not clicked.any():
            since = _range(dataset, range(start, stop))
            raise ValueError(
                f"periods: expected a click in each, got none on the {stop - start} pages from "
                f"{since} on; fewer --periods are longer"
            )
    return {name: tuple(of) for name, of in found.items()}


def as_date(seconds: float) -> str:
    return str(np.datetime64(int(seconds), "s")).replace("T", " ").removesuffix(" 00:00:00")


def check_dataset(dataset: Dataset) -> None:
    """ValueError that names it unless a dataset can be used: labels, users, categories, histories,
    and no look into the future."""
    d, path = dataset, dataset.path
    if d.categories.null_count == d.num_items:
        raise ValueError(
            f"categories: expected some in {path}, got none; `courier-fast prepare --items` with "
            "--category-column reads them"
        )
    for name in ("train", "validation", "test"):
        if not len(d.split(name)):
            raise ValueError(f"split: expected pages in {name!r} of {path}, got none")
    for earlier, later in (("train", "validation"), ("validation", "test")):
        last, first = d.page_moment[d.split(earlier)].max(), d.page_moment[d.split(later)].min()
        if last >= first:
            raise ValueError(
                f"split: expected {earlier!r} to end before {later!r} begins in {path}, got times "
                f"{last} and {first}"
            )
    empty = d.history_end <= d.history_start
    if empty.all():
        raise ValueError(f"history: expected a page with one in {path}, got none")
    if not d.histories_given:
        _check_past(d, empty)
    for name in ("train", "validation", "test"):
        check_impressions(Impressions(d, name), name)


def _check_past(d: Dataset, empty: Array) -> None:
    future = ~empty & (d.event_moment[np.maximum(d.history_end, 1) - 1] >= d.page_moment)
    if future.any():
        raise ValueError(
            f"history: expected events strictly before their page in {d.path}, got {future.sum()} "
            "pages that look into the future "
            f"(first: page {future.argmax()})"
        )


def check_impressions(shown: Impressions, name: str) -> None:
    """ValueError unless both labels and two users are there."""
    clicks, users = int(shown.clicked.sum()), len(np.unique(shown.user))
    if clicks in (0, len(shown)):
        raise ValueError(
            f"labels: expected clicked and not clicked items in {name!r} of {shown.dataset.path}, "
            f"got {clicks} clicks on {len(shown)} items"
        )
    if users < 2:
        raise ValueError(
            f"users: expected at least 2 in {name!r} of {shown.dataset.path}, got {users}"
        )


def category_codes(dataset: Dataset) -> tuple[Array, list[str]]:
    """[items] int64 codes by sorted name, the last one where unknown; and the names."""
    names = sorted(pc.unique(dataset.categories).drop_null().to_pylist())
    found = pc.index_in(dataset.categories, pa.array(names, pa.string()))
    return pc.fill_null(found, len(names)).to_numpy().astype(np.int64), [*names, "(none)"]


def id_codes(seen: Array, rows: int, least: int) -> Array:
    """[rows] int64: 0 for ids seen fewer than `least` times, else 1, 2, ... by row."""
    enough = np.bincount(seen, minlength=rows) >= least
    return np.where(enough, np.cumsum(enough), 0).astype(np.int64)
