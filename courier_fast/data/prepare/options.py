"""What `prepare` is told, beside its source."""

from __future__ import annotations

from dataclasses import dataclass

from ..read.ids import one
from ..read.times import SECOND, read_date
from ..tables import SHARD_BYTES, SHARD_ROWS

NEGATIVES = ("uniform", "popularity", "category")


@dataclass(frozen=True)
class PrepareOptions:
    """What `prepare` does.

    Args:
        page_size: items of a made page, the clicked one included; the most of a given page (all
            clicked ones stay).
        keep_unclicked: given pages of which nothing was clicked stay, and those of which everything
            was.
        negatives: for made pages: "uniform" over the items on offer at the time, "popularity" (an
            event drawn from all those before), "category" (the clicked item's, filled up
            uniformly).
        live_days: an item is on offer from so many days before its first event until so many after
            its last; where its first_seen and last_seen are given, those hold.
        min_history: earlier events that the user of a page needs.
        max_history: the most recent events that are a page's history.
        repeats: "drop" made pages whose clicked item the user had before, or "keep" them; of given
            histories, items that come again in one (the newest stays).
        keep_own: what a page's user clicked on it stays in its given history.
        validation_share, test_share: shares of the pages, the last ones in time; the cut is never
            inside a timestamp.
        validation_from, test_from: dates (ISO 8601 and the other forms of times.py; UTC) that cut
            instead.
        shrink: images whose short side is longer are scaled down to this many pixels; 0: bytes stay
            as they are.
        threads: threads that check images and sort; 0: one for each core.
        memory_gib: GiB that sorting and other steps may take, about; more is faster.
        shard_rows, shard_bytes: rows of a shard of a table; bytes of images or embeddings after
            which a shard is full.
    """

    page_size: int = 10
    keep_unclicked: bool = False
    negatives: str = "uniform"
    live_days: float = 30.0
    min_history: int = 3
    max_history: int = 50
    repeats: str = "drop"
    keep_own: bool = False
    validation_share: float = 0.1
    test_share: float = 0.1
    validation_from: str | None = None
    test_from: str | None = None
    shrink: int = 0
    seed: int = 0
    threads: int = 0
    memory_gib: float = 0.5
    shard_rows: int = SHARD_ROWS
    shard_bytes: int = SHARD_BYTES
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.page_size < 2:
            raise ValueError(f"page_size: expected at least 2, got {self.page_size}")
        if self.negatives not in NEGATIVES:
            raise ValueError(f"negatives: expected one of {NEGATIVES}, got {self.negatives!r}")
        if self.repeats not in ("drop", "keep"):
            raise ValueError(f"repeats: expected 'drop' or 'keep', got {self.repeats!r}")
        for name, least in (
            ("min_history", 1),
            ("max_history", 1),
            ("shrink", 0),
            ("threads", 0),
            ("shard_rows", 1),
            ("shard_bytes", 1),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name}: expected at least {least}, got {getattr(self, name)}")
        limits: tuple[tuple[str, float, int], ...] = (
            ("seed", 0, 2**63 - 1),
            ("memory_gib", 0.1, 1_000_000),
            ("live_days", 0, 1_000_000),  # in microseconds it is an int64
        )
        for name, low, high in limits:
            if not low <= getattr(self, name) <= high:
                raise ValueError(f"{name}: expected {low} to {high:,}, got {getattr(self, name)}")
        shares = (self.validation_share, self.test_share)
        if not (min(shares) >= 0 and sum(shares) < 1):  # nan is neither
            raise ValueError(
                "validation_share, test_share: expected shares of 0 or more that leave something "
                f"for train, got {shares}"
            )
        if (self.validation_from is None) != (self.test_from is None):
            raise ValueError("validation_from, test_from: expected both or neither")
        dates = [
            epoch(name, date)
            for name in ("validation_from", "test_from")
            if (date := getattr(self, name)) is not None
        ]
        if dates != sorted(dates):
            raise ValueError(
                f"test_from: expected no date before {self.validation_from}, got {self.test_from}"
            )


def epoch(name: str, date: str) -> float:
    """Seconds since 1970 of a date; see `microseconds`."""
    return microseconds(name, date) / SECOND


def microseconds(name: str, date: str) -> int:
    """Since 1970, of a date in any form that a column may have (times.py), but for numbers since
    1970. ValueError where it is none."""
    found = read_date(one(date))
    if found is None:
        raise ValueError(f"{name}: expected a date such as 2020-09-01, got {date!r}")
    return found
