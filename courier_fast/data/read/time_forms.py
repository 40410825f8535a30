"""Which form a column of times has, told apart by its values and by their span.

Nothing is decided by the size of a single value: a column of seconds with one value of milliseconds
is an error, not two units.
"""

from __future__ import annotations

import time as clock
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
import polars as pl

from ...locations import Location
from .scan import reading
from .times import (
    COMPACT,
    DAY,
    FORMATS,
    NEVER,
    SECOND,
    SPREADSHEET,
    UNITS,
    TimeForm,
    by_pattern,
    plain,
    read_dates,
    whole_and_other,
    without_unknown_dates,
    without_unknown_numbers,
)

_1990, _2100 = 631_152_000 * SECOND, 4_102_444_800 * SECOND
_HINT = f"say what they are with --time-format: {', '.join(FORMATS)}, or a pattern such as %d/%m/%Y"
# Day or month first: nobody can know which.
_EITHER_WAY = r"^\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}\b"


def _as_digits(micro: int, digits: int) -> float:
    moment = datetime.fromtimestamp(min(micro, 253_402_300_799 * SECOND) // SECOND, timezone.utc)
    return float(f"{moment:%Y%m%d%H%M%S}000"[:digits])


def _ranges(low: int, high: int, most: int) -> dict[str, tuple[float, float]]:
    """From and to which number each form may go so that it reads as a time from `low` to `high`; 8
    digits to `most`."""
    found = {
        unit: (low / SECOND * (1e6 / scale), high / SECOND * (1e6 / scale))
        for unit, scale in UNITS.items()
    }
    found["days"] = (low / DAY + SPREADSHEET, high / DAY + SPREADSHEET)
    for name, digits in COMPACT.items():
        found[name] = (_as_digits(low, digits), _as_digits(most if digits == 8 else high, digits))
    return found


@dataclass
class _Seen:
    """What a look over a column has found."""

    numbers: int = 0
    dates: int = 0
    unknown: int = 0  # zero and so on
    bad: int = 0
    either_way: int = 0
    span: list[float] = field(default_factory=list)  # of numbers
    moments: list[int] = field(default_factory=list)  # of dates, in microseconds
    parts: bool = False
    first: dict[str, list[str]] = field(default_factory=dict)  # examples by kind

    @property
    def total(self) -> int:
        return self.numbers + self.dates + self.unknown + self.bad

    def example(self, kind: str, values: pl.Series) -> None:
        held = self.first.setdefault(kind, [])
        if len(held) < 3 and len(values):
            new = (
                values.drop_nulls().head(1000).unique(maintain_order=True).cast(pl.String).to_list()
            )
            held.extend(v for v in new if v not in held)
            del held[3:]

    def shown(self, *kinds: str) -> str:
        """Three values, one of each kind first."""
        lists = [self.first.get(k, []) for k in kinds]
        order = [
            v
            for place in zip(*(o + [""] * (3 - len(o)) for o in lists), strict=True)
            for v in place
        ]
        return ", ".join([repr(v[:40]) for v in dict.fromkeys(order) if v][:3])

    def extremes(self) -> str:
        """The least, the largest and another number."""
        ends = [min(self.span), max(self.span)]
        shown = [f"{x:.0f}" if x == round(x) and abs(x) < 1e17 else f"{x:.17g}" for x in ends]
        return ", ".join(list(dict.fromkeys([*shown, *self.first.get("numbers", [])]))[:3])


class _Look:
    """One look over a column; `where` names it in messages."""

    def __init__(self, where: str, form: str | None, any_date: bool) -> None:
        self.where, self.form, self.any_date = where, form, any_date
        tomorrow = (int(clock.time()) // 86_400 + 2) * DAY - 1
        self.low, self.high = (
            (-(1 << 62), 1 << 62) if any_date or form == "order" else (_1990, tomorrow)
        )
        self.ranges = (
            _ranges(_1990, _2100, NEVER) if any_date else _ranges(_1990, tomorrow, tomorrow)
        )
        self.seen = _Seen()

    def add(self, values: pl.Series) -> None:
        """Some more values."""
        if values.dtype.is_temporal():
            self._dates(values, TimeForm(any_date=True).micro(values))
            return
        values = plain(values)
        if self.form is not None and "%" in self.form:
            self._dates(values, by_pattern(values, self.form))
            return
        if (
            self.form is None
            and values.dtype == pl.String
            and "-" in str(values.drop_nulls().first())[1:]
        ):
            times = read_dates(values)
            if (
                times.null_count() == values.null_count()
            ):  # most often; else there may be numbers, too
                self._dates(values, times)
                return
        whole, other = whole_and_other(values)
        known = without_unknown_numbers(whole)
        if self.form == "order":
            known = whole
        number = known.is_not_null() | other.is_not_null()
        count = int(number.sum())
        self._unknown(values, whole.is_not_null() & known.is_null())
        if count:
            self._count_numbers(values, known, other, number)
        if count < len(values) - values.null_count():
            self._others(values, whole.is_not_null() | other.is_not_null())

    def _count_numbers(
        self, values: pl.Series, whole: pl.Series, other: pl.Series, number: pl.Series
    ) -> None:
        seen = self.seen
        seen.numbers += int(number.sum())
        if len(seen.first.get("numbers", [])) < 3:
            seen.example("numbers", values.filter(number))
        ends: list[Any] = [x for s in (whole, other) for x in (s.min(), s.max()) if x is not None]
        seen.span = [min(*seen.span, *ends), max(*seen.span, *ends)]
        forms = [self.form] if self.form else self._fitting(min(ends), max(ends))
        if len(forms) != 1:
            return  # which the whole column will show
        fractions = other.null_count() < len(other)
        if forms[0] in ("seconds", "order"):
            seen.parts |= fractions
        elif forms[0] in COMPACT or not seen.parts:
            micro = TimeForm(str(forms[0])).of_numbers(whole, other)
            seen.parts |= bool((micro % SECOND != 0).any())
            wrong = values.filter(micro.is_null() & number)
            seen.numbers -= len(wrong)
            seen.bad += len(wrong)
            seen.example("bad", wrong)

    def _fitting(self, low: float, high: float) -> list[str]:
        return [n for n, (a, b) in self.ranges.items() if a <= low and high <= b]

    def _unknown(self, values: pl.Series, which: pl.Series) -> None:
        if which.any():
            self.seen.unknown += int(which.sum())
            self.seen.example("unknown", values.filter(which))

    def _others(self, values: pl.Series, numbers: pl.Series) -> None:
        """Those that are no numbers."""
        if values.dtype != pl.String or self.form is not None:
            self._rest(values, numbers)
        else:
            text = values.set(numbers, None) if numbers.any() else values
            self._dates(text, read_dates(text))

    def _dates(self, values: pl.Series, read: pl.Series) -> None:
        """Values that should be dates, and what was read of them."""
        as_said = self.any_date or (self.form is not None and "%" in self.form)
        times = read if as_said else without_unknown_dates(read)
        self._unknown(values, read.is_not_null() & times.is_null())
        self._rest(values, read.is_not_null())
        seen, count = self.seen, len(times) - times.null_count()
        if not count:
            return
        if not seen.dates:
            seen.example("dates", values.filter(times.is_not_null()))
        seen.dates += count
        for pick, arg in ((min, times.arg_min()), (max, times.arg_max())):
            assert arg is not None
            moment = times[arg]
            if not seen.moments or pick(moment, *seen.moments) == moment:
                seen.first[pick.__name__] = [str(values[arg])]
            seen.moments = [*seen.moments, moment]
        seen.moments = [min(seen.moments), max(seen.moments)]
        seen.parts = seen.parts or bool((times % SECOND != 0).any())

    def _rest(self, values: pl.Series, read: pl.Series) -> None:
        bad = values.filter(~read & values.is_not_null())
        self.seen.bad += len(bad)
        self.seen.example("bad", bad)
        if len(bad) and bad.dtype == pl.String:
            either = bad.filter(bad.str.contains(_EITHER_WAY))
            self.seen.either_way += len(either)
            self.seen.example("either_way", either)

    def verdict(self) -> TimeForm:
        """What the column is. ValueError where that cannot be said."""
        seen = self.seen
        good = seen.numbers + seen.dates
        if seen.either_way and self.form is None:
            raise self._error(
                f"{seen.shown('either_way', 'dates', 'numbers')}: day or month first is not guessed"
            )
        if seen.numbers and seen.dates:
            raise self._error(f"{seen.shown('numbers', 'dates')}: numbers and dates in one column")
        if seen.total and good < seen.total / 2:
            named = seen.shown("bad", "unknown", "dates", "numbers")
            raise self._error(
                f"{named}: {seen.bad + seen.unknown:,} of {seen.total:,} values cannot be read"
            )
        missed = seen.bad + seen.unknown
        if seen.numbers:
            return TimeForm(self._unit(), seen.parts, missed, self.any_date)
        if seen.moments and not self.low <= seen.moments[0] <= seen.moments[1] <= self.high:
            shown = list(
                dict.fromkeys(v for k in ("min", "max", "dates") for v in seen.first.get(k, []))
            )[:3]
            raise self._error(
                f"{', '.join(map(repr, shown))}: from {_date(seen.moments[0])} to "
                f"{_date(seen.moments[1])}"
            )
        name = self.form if self.form and "%" in self.form else "dates"
        return TimeForm(name, seen.parts, missed, self.any_date)

    def _unit(self) -> str:
        """What the numbers are."""
        low, high = min(self.seen.span), max(self.seen.span)
        if self.form == "order":
            return "order"
        if self.form is None:
            if len(forms := self._fitting(low, high)) == 1:
                return forms[0]
            each = {n for x in (low, high) for n in self._fitting(x, x)}
            why = (
                f"{' and '.join(sorted(each))} in one column"
                if len(each) > 1
                else f"as seconds since 1970 they are {_date(low * 1e6)} to {_date(high * 1e6)}"
            )
            raise self._error(f"{self.seen.extremes()}: {why}")
        ends = TimeForm(self.form).micro(pl.Series([low, high], dtype=pl.Float64, strict=False))
        if ends.null_count() or not (self.low <= ends[0] and ends[1] <= self.high):
            said = [_date(x) for x in ends]
            raise self._error(
                f"{self.seen.extremes()}: as {self.form} they are {said[0]} to {said[1]}"
            )
        return self.form

    def _error(self, what: str) -> ValueError:
        expected = "times from 1990 to tomorrow"
        expected = "dates, or numbers since 1970," if self.any_date else expected
        return ValueError(f"{self.where}: expected {expected} in one form, got {what}; {_HINT}")


def _date(micro: float | None) -> str:
    """For people."""
    if micro is None or abs(micro) > 2.5e17:
        return "beyond the year 9999" if micro is None or micro > 0 else "before the year 1"
    try:
        return (
            str(np.datetime64(int(micro // SECOND), "s"))
            .replace("T", " ")
            .removesuffix(" 00:00:00")
        )
    except (OverflowError, ValueError):
        return "no date"


def time_form(
    frame: pl.LazyFrame,
    column: str,
    path: Location | str = "",
    form: str | None = None,
    *,
    any_date: bool = False,
) -> TimeForm:
    """Goes over a column once, a batch at a time, and says what it is.

    Args:
        path: the file, for messages.
        form: what the user says that it is: one of FORMATS or a strptime pattern; values of
            temporal types are what they are.
        any_date: dates need not lie between 1990 and tomorrow (when an item is on offer); numbers
            must lie between 1990 and 2100.

    Raises:
        ValueError: it is of a type that holds no times; most values cannot be read; numbers that
            are no known unit, or several; days and months in an order that nobody can know; times
            before 1990 or after tomorrow.
    """
    where = f"{path}: {column}" if path else column
    kind = frame.collect_schema()[column]
    if kind == pl.Null:
        return TimeForm()
    if kind in (pl.Time, pl.Duration, pl.Boolean) or kind.is_nested():
        raise ValueError(f"{where}: expected dates, or numbers since 1970, got a column of {kind}")
    looked = _Look(where, form, any_date)
    with reading(path or "the source"):
        for batch in frame.select(column).collect_batches(
            chunk_size=1 << 19, maintain_order=True, engine="streaming"
        ):
            looked.add(batch.to_series())
    return looked.verdict()
