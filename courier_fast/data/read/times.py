"""Times as people's files hold them: one definition of what is read, told apart by form and by the
span of a column.

What a column is (`TimeForm`) is decided once, by `look`, which goes over all its values; then each
value is read on its own, anywhere. Nothing is decided by the size of a single value: a column of
seconds with one value of milliseconds is an error, not two units. docs/data.md has the table.
"""

from __future__ import annotations

import logging
import time as clock
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl

from ...locations import Location
from .ids import as_text, missing
from .scan import reading

Array = npt.NDArray
log = logging.getLogger(__name__)

SECOND = 1_000_000  # microseconds, the unit within
DAY = 86_400 * SECOND
_1990, _2100 = 631_152_000 * SECOND, 4_102_444_800 * SECOND
_SPREADSHEET = 25_569  # the day 1970-01-01, counted from 1899-12-30
_1904 = 24_107  # the same, counted from 1904-01-01
# What stands for "unknown": zero, -1, and the "not a time" of NumPy and pandas as a number.
_UNKNOWN = (0, -1, np.iinfo(np.int64).min)
# The same among dates: the first and the last of several databases, the year 1900, zero seconds.
_UNKNOWN_DATES = tuple(
    int(np.datetime64(d, "us").astype(np.int64)) for d in ("0001-01-01", "1900-01-01", "1970-01-01")
)
_NEVER = int(np.datetime64("9999-12-31", "us").astype(np.int64))

UNITS: dict[str, float] = {
    "seconds": 1e6,
    "milliseconds": 1e3,
    "microseconds": 1,
    "nanoseconds": 1e-3,
}
DAYS = {"days": _SPREADSHEET, "days-1904": _1904}
FORMATS = (*UNITS, *DAYS, "order")
_COMPACT = {"YYYYMMDD": 8, "YYYYMMDDhhmm": 12, "YYYYMMDDhhmmss": 14, "YYYYMMDDhhmmssfff": 17}
_HINT = f"say what they are with --time-format: {', '.join(FORMATS)}, or a pattern such as %d/%m/%Y"

# ---- text of dates -------------------------------------------------------------------------------

_ZONE = (
    r"(?:\s*(Z|z|UTC|utc|GMT|UT|(?:UTC|GMT)?[+-]\d{2}(?::?\d{2}(?::?\d{2})?)?|[ECMP][SD]T)"
    r"(?:\s*[\[(][^\])]*[\])])?)?"
)
_CLOCK = r"(\d{1,2})(?::(\d{2})(?::(\d{2})(?:[.,](\d{1,9}))?)?)?" + _ZONE
_SHAPES = (
    r"^(\d{4})[-/.](\d{1,2})[-/.](\d{1,2})(?:(?:[Tt_]|\s+)" + _CLOCK + ")?$",
    r"^(\d{4})(\d{2})(\d{2})(?:[Tt_]|\s+)"
    r"(\d{2}):?(\d{2})?:?(\d{2})?(?:[.,](\d{1,9}))?" + _ZONE + "$",
    r"^(?:[A-Za-z]{3,9},?\s+)?(\d{1,2})[ -]([A-Za-z]{3})[a-z]*[ -](\d{4})(?:\s+" + _CLOCK + ")?$",
)
_FIXED = r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d"
_TAIL = r"^(?:[.,](\d{1,9}))?" + _ZONE + "$"
_MONTHS = {
    m: i
    for i, m in enumerate(
        ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"], 1
    )
}
_AMERICAN = {"EST": -5, "EDT": -4, "CST": -6, "CDT": -5, "MST": -7, "MDT": -6, "PST": -8, "PDT": -7}
# Day or month first: nobody can know which.
_EITHER_WAY = r"^\d{1,2}[-/.]\d{1,2}[-/.]\d{2,4}\b"


def _offset(zone: pl.Series) -> pl.Series:
    """Microseconds east of Greenwich."""
    known = zone.unique().drop_nulls()
    found: list[int] = []
    for name in known.to_list():
        digits = name.lstrip("UTCGM+-").replace(":", "").ljust(6, "0")
        east = _AMERICAN.get(name, 0) * 3600
        if digits.isdigit() and any(sign in name for sign in "+-"):
            east = int(digits[:2]) * 3600 + int(digits[2:4]) * 60 + int(digits[4:6])
            east = -east if "-" in name else east
        found.append(east * SECOND)
    return zone.replace_strict(known, found, default=0, return_dtype=pl.Int64).fill_null(0)


def _fraction(digits: pl.Series) -> pl.Series:
    """Microseconds; what is beyond them is cut off."""
    six = digits.str.slice(0, 6).str.pad_end(6, "0")
    return six.cast(pl.Int64).fill_null(0)


def _civil(y: Array, mo: Array, d: Array, clock_: tuple[Array, Array, Array]) -> pl.Series:
    """Microseconds of calendar dates and times of a day; null where there is no such date."""
    h, mi, s = clock_
    month = np.clip((y - 1970) * 12 + mo - 1, -24_000, 200_000)
    first, after = (
        m.astype("datetime64[M]").astype("datetime64[D]").astype(np.int64)
        for m in (month, month + 1)
    )
    good = (y > 0) & (y < 10_000) & (mo >= 1) & (mo <= 12) & (d >= 1) & (d <= after - first)
    good &= (h < 24) & (mi < 60) & (s <= 60) | (h == 24) & (mi == 0) & (s == 0)
    found = (first + d - 1) * DAY + (h * 3600 + mi * 60 + s) * SECOND
    return pl.Series(found).set(pl.Series(~good), None)


def _by_shape(text: pl.Series, shape: str) -> pl.Series:
    parts = text.str.extract_groups(shape).struct.unnest()
    read = parts.select(pl.col("1").is_not_null()).to_series()
    names = ["1", "2", "3"]
    if shape == _SHAPES[2]:
        month = (
            parts["2"]
            .str.to_lowercase()
            .replace_strict(_MONTHS, default=None, return_dtype=pl.Int64)
        )
        parts = parts.with_columns(pl.Series("2", month))
        names = ["3", "2", "1"]
    y, mo, d = (parts[n].cast(pl.Int64).fill_null(0).to_numpy() for n in names)
    h, mi, s = (parts[n].cast(pl.Int64).fill_null(0).to_numpy() for n in ("4", "5", "6"))
    found = _civil(y, mo, d, (h, mi, s)) + _fraction(parts["7"]) - _offset(parts["8"])
    return found.set(~read, None)


def read_dates(text: pl.Series) -> pl.Series:
    """Trimmed text of dates as int64 microseconds since 1970, UTC unless it has a zone; null where
    it is none of the forms."""
    times = _nothing(text)
    first = text.drop_nulls().head(1).to_list()
    if not first:
        return times
    if pl.Series(first).str.contains(_FIXED)[0]:
        times = _fixed(text, first[0][10])
    elif len(first[0]) == 10:
        times = text.str.to_datetime("%Y-%m-%d", strict=False, time_unit="us").to_physical()
    for shape in _SHAPES:
        left = (times.is_null() & text.is_not_null()).arg_true()
        if not len(left):
            break
        times = times.scatter(left, _by_shape(text.gather(left), shape))
    return times


def read_date(text: str) -> int | None:
    """`read_dates` of one text, or of digits such as 20200131; None where it is no date."""
    compact = {n: name for name, n in _COMPACT.items()}.get(len(text)) if text.isdigit() else None
    times = TimeForm(compact).micro(pl.Series([text])) if compact else read_dates(pl.Series([text]))
    return None if times[0] is None else int(times[0])


def _fixed(text: pl.Series, mark: str) -> pl.Series:
    """The common forms, whose first 19 characters are alike; the others are null. About four times
    as fast as by shape."""
    head = text.str.slice(0, 19).str.to_datetime(
        f"%Y-%m-%d{mark}%H:%M:%S", strict=False, time_unit="us"
    )
    times, tail = head.to_physical(), text.str.slice(19)
    more = (~tail.is_in(["", "Z"])).fill_null(False).arg_true()
    if not len(more):
        return times
    parts = tail.gather(more).str.extract_groups(_TAIL).struct.unnest()
    parsed = times.gather(more) + _fraction(parts["1"]) - _offset(parts["2"])
    known = tail.gather(more).str.contains(_TAIL)
    return times.scatter(more, parsed.set(~known, None))


# ---- numbers -------------------------------------------------------------------------------------


def _nothing(values: pl.Series, kind: type[pl.DataType] = pl.Int64) -> pl.Series:
    return pl.Series([None], dtype=kind).new_from_index(0, len(values))


def _numbers(text: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Values as int64, and as float64 those that are not whole or were written with a point or an
    exponent; null where they are neither."""
    if text.dtype == pl.String:
        whole = text.cast(pl.Int64, strict=False)
        if whole.null_count() == text.null_count():
            return whole, _nothing(text, pl.Float64)
        other = text.cast(pl.Float64, strict=False)
    elif text.dtype.is_integer():
        return text.cast(pl.Int64, strict=False), _nothing(text, pl.Float64)
    elif text.dtype.is_decimal():
        whole = text.cast(pl.Int64, strict=False)
        whole = whole.set((whole.cast(text.dtype, strict=False) != text).fill_null(True), None)
        other = text.cast(pl.Float64)
    else:
        other = text.cast(pl.Float64)
        whole = _nothing(text)
    exact = other.is_finite() & (other == other.floor()) & (other.abs() < 2.0**53)
    whole = whole.zip_with(
        whole.is_not_null() | ~exact.fill_null(False),
        other.set((~exact).fill_null(True), None).cast(pl.Int64),
    )
    other = other.set((whole.is_not_null() | ~other.is_finite()).fill_null(True), None)
    return whole, other


def _known(whole: pl.Series) -> pl.Series:
    return whole.set(whole.is_in(_UNKNOWN).fill_null(False), None)


def _scaled(whole: pl.Series, other: pl.Series, unit: str) -> pl.Series:
    """Numbers since 1970 in a unit, as microseconds; null where they leave int64."""
    if unit == "nanoseconds":
        times = whole // 1000
    else:
        scale = int(UNITS[unit])
        limit = np.iinfo(np.int64).max // scale
        times = whole.set((whole.abs() > limit).fill_null(False), None) * scale
    if other.null_count() == len(other):
        return times
    micro = (other * UNITS[unit]).round()
    micro = micro.set((micro.abs() > 9e18).fill_null(False), None).cast(pl.Int64)
    return times.zip_with(times.is_not_null(), micro)


def _days(whole: pl.Series, other: pl.Series, first: int) -> pl.Series:
    """Days of a spreadsheet, to the millisecond: their fractions are rounded when written."""
    days = whole.cast(pl.Float64).zip_with(whole.is_not_null(), other)
    milli = ((days - first) * 86_400_000).round()
    return milli.set((milli.abs() > 9e15).fill_null(False), None).cast(pl.Int64) * 1000


def _compact(whole: pl.Series, digits: int) -> pl.Series:
    """Numbers whose digits are a date and the time of a day."""
    x = whole.fill_null(0).to_numpy()
    milli = np.zeros_like(x)
    if digits == 17:
        x, milli = x // 1000, x % 1000
    elif digits == 12:
        x = x * 100
    elif digits == 8:
        x = x * 1_000_000
    date, time = x // 1_000_000, x % 1_000_000
    found = _civil(
        date // 10_000,
        date // 100 % 100,
        date % 100,
        (time // 10_000, time // 100 % 100, time % 100),
    )
    return (found + pl.Series(milli * 1000)).set(whole.is_null(), None)


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
    found["days"] = (low / DAY + _SPREADSHEET, high / DAY + _SPREADSHEET)
    for name, digits in _COMPACT.items():
        found[name] = (_as_digits(low, digits), _as_digits(most if digits == 8 else high, digits))
    return found


# ---- a column ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TimeForm:
    """What the values of a column are, and how they become times.

    Args:
        name: "dates" (text or temporal types, each value in its own form), one of FORMATS or of the
            compact forms, or a strptime pattern.
        parts: some have parts of a second.
        unreadable: how many values are there but no time.
    """

    name: str = "dates"
    parts: bool = False
    unreadable: int = 0
    any_date: bool = False  # dates that often stand for "unknown" are what they are

    def micro(self, values: pl.Series) -> pl.Series:
        """[n] int64 microseconds since 1970 (UTC), null where there is no time. Not for "order"."""
        times = self._micro(values)
        if self.any_date or not (values.dtype.is_temporal() or self.name == "dates"):
            return times
        return _without_unknown(times)

    def _micro(self, values: pl.Series) -> pl.Series:
        if values.dtype.is_temporal():
            return (values.cast(pl.Datetime("us")) if values.dtype == pl.Date else values).dt.epoch(
                "us"
            )
        if values.dtype == pl.Null:
            return values.cast(pl.Int64)
        values = _trimmed(values)
        if self.name == "dates":
            return read_dates(values) if values.dtype == pl.String else _nothing(values)
        if "%" in self.name:
            return _by_pattern(values, self.name)
        whole, other = _numbers(values)
        return self.of_numbers(_known(whole), other)

    def of_numbers(self, whole: pl.Series, other: pl.Series) -> pl.Series:
        """As `micro`, of whole numbers (int64) and others (float64)."""
        if self.name in UNITS:
            return _scaled(whole, other, self.name)
        if self.name in DAYS:
            return _days(whole, other, DAYS[self.name])
        return _compact(whole, _COMPACT[self.name])

    def split(self, values: pl.Series) -> pl.Series:
        """[n] {time: int64 seconds, microsecond: int32}."""
        if self.name == "order" and values.dtype != pl.Null:
            whole, other = _numbers(_trimmed(values))
            floor = other.floor().cast(pl.Int64, strict=False)
            time = whole.zip_with(whole.is_not_null(), floor)
            part = ((other - other.floor()) * SECOND).round().cast(pl.Int32, strict=False)
            part = part.clip(0, SECOND - 1).fill_null(0)
        else:
            micro = self.micro(values)
            time, part = micro // SECOND, (micro % SECOND).cast(pl.Int32)
        return pl.DataFrame({"time": time, "microsecond": part}).to_struct(values.name)

    def expression(self, column: str) -> pl.Expr:
        """A column as {time, microsecond}, called "time", for `flat`: so that text is read once."""
        kind = pl.Struct({"time": pl.Int64, "microsecond": pl.Int32})
        return pl.col(column).map_batches(self.split, kind, is_elementwise=True).alias("time")

    def flat(self, frame: pl.LazyFrame) -> pl.LazyFrame:
        """A frame with `expression` as "time", and with parts of a second "microsecond"."""
        if self.parts:
            return frame.unnest("time")
        return frame.with_columns(pl.col("time").struct.field("time"))


def _without_unknown(times: pl.Series) -> pl.Series:
    unknown = (times.is_in(_UNKNOWN_DATES) | (times >= _NEVER)).fill_null(False)
    return times.set(unknown, None) if unknown.any() else times


def _trimmed(values: pl.Series) -> pl.Series:
    """Numbers as they are, anything else as trimmed text without words for missing."""
    if values.dtype.is_numeric():
        return values.cast(pl.Float64).fill_nan(None) if values.dtype.is_float() else values
    text = as_text(values)
    none = missing(text)
    return text.set(none, None) if none.any() else text


def _by_pattern(values: pl.Series, pattern: str) -> pl.Series:
    """Text by a strptime pattern; polars where it takes it, else Python, value by value."""
    text = values.cast(pl.String)
    times = _nothing(text)
    quick = pattern.replace(".%f", "%.f")
    if "%f" not in quick:
        try:
            found = text.str.to_datetime(quick, strict=False, time_unit="us")
            times = found.dt.epoch("us")
        except pl.exceptions.PolarsError:
            pass
    left = (times.is_null() & text.is_not_null()).arg_true()
    if not len(left):
        return times
    of = {t: _strptime(t, pattern) for t in text.gather(left).unique().to_list()}
    rest = text.gather(left).replace_strict(of, return_dtype=pl.Int64)
    return times.scatter(left, rest)


def _strptime(text: str, pattern: str) -> int | None:
    try:
        moment = datetime.strptime(text, pattern)
    except ValueError:
        return None
    moment = moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    since = moment - datetime(1970, 1, 1, tzinfo=timezone.utc)
    return since.days * DAY + since.seconds * SECOND + since.microseconds


def check_format(form: str | None) -> None:
    """ValueError unless it is a format that `look` takes."""
    if form is not None and form not in FORMATS and "%" not in form:
        raise ValueError(
            f"time_format: expected {', '.join(FORMATS)}, or a pattern such as %d/%m/%Y, "
            f"got {form!r}"
        )


# ---- the first look ------------------------------------------------------------------------------


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
            _ranges(_1990, _2100, _NEVER) if any_date else _ranges(_1990, tomorrow, tomorrow)
        )
        self.seen = _Seen()

    def add(self, values: pl.Series) -> None:
        """Some more values."""
        if values.dtype.is_temporal():
            self._dates(values, TimeForm()._micro(values))
            return
        values = _trimmed(values)
        if self.form is not None and "%" in self.form:
            self._dates(values, _by_pattern(values, self.form))
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
        whole, other = _numbers(values)
        known = _known(whole)
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
        elif forms[0] in _COMPACT or not seen.parts:
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
        times = read if as_said else _without_unknown(read)
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


def look(
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
