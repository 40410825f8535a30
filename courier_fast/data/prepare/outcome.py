"""What becomes of the pages: splits, and the report."""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from ... import __version__
from ...locations import Location
from ...storage import join
from ..dataset import SPLITS, write_json, write_manifest
from ..read import truth
from ..read.scan import some
from ..read.times import SECOND
from .histories import DIFFER, DROPPED, NO_IMAGE
from .items import NOT_EMBEDDED, Inputs
from .options import PrepareOptions, microseconds
from .page_ids import PageIds
from .pages import ALL_CLICKED, DROP_REASONS, UNCLICKED
from .rows import SPLIT

Array = npt.NDArray
log = logging.getLogger(__name__)


def split_bounds(times: Sequence[int], options: PrepareOptions, ticks: int = 1) -> list[int]:
    """The first page of validation, the first of test, and the number of pages; `times` is sorted.
    Never inside a timestamp."""
    n = len(times)
    if options.validation_from and options.test_from:
        dates = (("validation_from", options.validation_from), ("test_from", options.test_from))
        cuts = [-(-microseconds(*date) * ticks // SECOND) for date in dates]  # the next tick
    else:
        test = round(n * (1 - options.test_share))
        validation = round(n * (1 - options.test_share - options.validation_share))
        # A share of 0 is after the end.
        cuts = [int(times[i]) if i < n else int(times[-1]) + 1 for i in (validation, test)]
    return [*(bisect_left(times, cut) for cut in cuts), n]


def say_page_ids(
    seen: PageIds, statuses: Mapping[int, int], user_of: Callable[[int], str]
) -> list[str]:
    """Logs and gives what there is to say about the ids of given pages."""
    notes = seen.notes(user_of, sum(statuses.values()))
    for text in notes:
        log.warning("%s", text)
    return notes


def splits_of(
    times: Sequence[int],
    dropped: dict[str, int],
    options: PrepareOptions,
    ticks: int = 1,
    named: bool = False,
) -> dict[str, list[int]]:
    """First page and end of each split; `named`: the times say it, and validation, where no page is
    of it, is the last pages to train on; `ticks` 0: times only order."""
    if not len(times):
        raise ValueError(f"pages: expected at least one, got none; dropped: {dropped}")
    bounds = [0, *split_bounds(times, options, ticks)]
    if named:
        bounds[1:3] = (bisect_left(times, SPLIT), bisect_left(times, 2 * SPLIT))
        if bounds[1] == bounds[2]:
            bounds[1] = round(bounds[1] * (1 - options.validation_share))
    if not bounds[1]:
        before = f" before {_iso(times[0] // ticks)}" if ticks else ""
        raise ValueError(
            f"splits: expected pages to train on, got none{before}: all "
            f"{len(times)} pages are in validation or test"
        )
    splits = {name: bounds[i : i + 2] for i, name in enumerate(SPLITS)}
    for name, (start, end) in splits.items():
        if start == end:
            log.warning("%s: no page, the times are too coarse or the share is 0", name)
    return splits


def _iso(time: int) -> str:
    return str(np.datetime64(int(time), "s")) + "Z"


@dataclass
class Outcome:
    """What became of the rows and pages, for the report."""

    rows: dict[str, Counter[str]]  # by table of the source
    users: int
    items: int
    images: dict[str, Any] | None
    events: int
    times: Sequence[int]  # of the pages, sorted
    page_items: int
    splits: dict[str, list[int]]
    lengths: Array  # [max_history + 1] pages by the length of their history
    cut: int
    statuses: Counter[int] = field(default_factory=Counter)
    ticks: int = 1  # of a second, in which `times` are; 0: they only order
    histories: Counter[str] | None = None  # items of given ones
    notes: Sequence[str] = ()
    page_ids: dict[str, int] | None = None  # of given pages
    embeddings: dict[str, Any] | None = None  # ready ones

    def report(self, options: PrepareOptions) -> dict[str, Any]:
        pages = len(self.times)
        special = {"unclicked": self.statuses[UNCLICKED], "all_clicked": self.statuses[ALL_CLICKED]}
        return {
            **{
                n: {**of, "kept": self.events} if n == "events" else of
                for n, of in counts_of(self.rows).items()
            },
            **({} if self.histories is None else {"histories": self._histories(self.histories)}),
            "users": self.users,
            "items": self.items,
            "images": self.images,
            **({} if self.embeddings is None else {"embeddings": self.embeddings}),
            "pages": {
                "candidates": sum(self.statuses.values()),
                "kept": pages,
                "dropped": dropped(self.statuses),
                "items": self.page_items,
                "median_history": int(np.searchsorted(np.cumsum(self.lengths), (pages + 1) // 2)),
                **(special if options.keep_unclicked else {}),
                **({"cut": self.cut} if self.cut else {}),
                **({"page_ids": self.page_ids} if self.page_ids else {}),
            },
            "splits": {
                name: {"pages": b - a, **self._dates(a, b)} for name, (a, b) in self.splits.items()
            },
            "notes": list(self.notes),
        }

    def _dates(self, a: int, b: int) -> dict[str, str]:
        if b == a or not self.ticks:
            return {}
        first, last = (self.times[row] // self.ticks for row in (a, b - 1))
        return {"from": _iso(first), "to": _iso(last)}

    def _histories(self, counts: Counter[str]) -> dict[str, Any]:
        return {
            **{n: counts[n] for n in ("read", "kept", DIFFER)},
            "stored": self.events,
            "dropped": {self._why(n): counts[why] for n, why in DROPPED.items() if counts[why]},
        }

    def _why(self, number: int) -> str:
        ready = number == NO_IMAGE and self.embeddings is not None
        return NOT_EMBEDDED if ready else DROPPED[number]


def write_about(
    folder: Location,
    inputs: Inputs,
    options: PrepareOptions,
    outcome: Outcome,
    shards: Mapping[str, list[dict[str, Any]]],
) -> dict[str, Any]:
    """Writes report.json, manifest.json and dataset.json; the report."""
    source, images, vectors = inputs
    report = outcome.report(options)
    if source.unreadable:
        report["items_times_unreadable"] = dict(source.unreadable)
    about = {
        "source": {
            "layout": source.layout,
            "files": [str(f) for f in source.files],
            "images": str(images) if images else None,
            **({} if vectors is None else {"embeddings": str(vectors.path)}),
        },
        **({} if vectors is None else {"embeddings": {"scale": vectors.scale}}),
        "pages": "made" if source.impressions is None else "given",
        **({} if source.histories is None else {"histories": "given"}),
        **({} if source.timed else {"times": "order"}),
        "options": asdict(options),
        "splits": outcome.splits,
        "counts": {
            "users": outcome.users,
            "items": outcome.items,
            "events": outcome.events,
            "pages": len(outcome.times),
            "page_items": outcome.page_items,
        },
        "courier_fast": __version__,
    }
    write_json(join(folder, "report.json"), report)
    write_manifest(folder, about, shards)
    return report


def dropped(statuses: Mapping[int, int]) -> dict[str, int]:
    """Pages that are not kept, by reason."""
    return {DROP_REASONS[f]: n for f, n in sorted(statuses.items()) if f in DROP_REASONS and n}


def nothing_read(files: Sequence[Location], rows: Mapping[str, Counter[str]]) -> str:
    """That no row can be used, and why."""
    read = sum(of["read"] for of in rows.values())
    left = [of for table in rows.values() for of in table.items() if of[1]]
    why = ", ".join(f"{n:,} {k}" for k, n in left if k not in ("read", truth.UNKNOWN))
    where = some([str(f) for f in files]) or "the source"
    why = f" ({why})" if why else ""
    return f"{where}: expected events, got none that can be used of {read:,} rows{why}"


def counts_of(rows: Mapping[str, Counter[str]]) -> dict[str, Any]:
    """Rows of the source's tables: read, and dropped by reason."""
    return {
        name: {
            "read": of["read"],
            **({truth.UNKNOWN: n} if (n := of[truth.UNKNOWN]) else {}),
            "dropped": {k: n for k, n in of.items() if k not in ("read", truth.UNKNOWN) and n},
        }
        for name, of in rows.items()
    }
