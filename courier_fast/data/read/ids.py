"""Ids as one text each, whatever type a file holds them in; and what means that there is none.
docs/data.md has the tables."""

from __future__ import annotations

import re
import unicodedata
import uuid
from collections.abc import Iterable
from typing import Any

import polars as pl
import pyarrow as pa

from ...locations import Location

# Exactly these mean "missing" where an id, a time or a category should be; an item that is really
# called so is a casualty.
MISSING = (
    "",
    "NULL",
    "null",
    "Null",
    "(null)",
    "<null>",
    "None",
    "NaN",
    "nan",
    "NAN",
    "NaT",
    "NA",
    "<NA>",
    "N/A",
    "n/a",
    "#N/A",
    "nil",
    "undefined",
    "\\N",
    '""',
    "''",
)

# Blanks of every kind, what no eye sees, and the zero bytes that fill fixed-size text.
_BLANK = (
    "\t\n\v\f\r \x00\x1c\x1d\x1e\x1f\x85\xa0\u1680"
    "\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a"
    "\u200b\u200c\u200d\u200e\u200f\u2028\u2029\u202f\u205f\u2060\u3000\ufeff"
)
_POINT_ZERO = r"^-?\d+\.0$"
_EXACT = 2.0**53  # beyond it a float skips whole numbers


def one(text: str) -> str:
    """A text in the form that ids have: trimmed, in Unicode's composed form (NFC)."""
    return unicodedata.normalize("NFC", text.strip(_BLANK))


def trimmed(text: pl.Series) -> pl.Series:
    """`one` of every value."""
    text = text.str.strip_chars(_BLANK)
    if (text.str.len_bytes() != text.str.len_chars()).any():
        text = text.str.normalize("NFC")
    return text


def as_text(values: pl.Series, name: str = "", *, whole: bool = False) -> pl.Series:
    """One text per id: the same for 7, 7.0 (a float), 7.000 (a decimal) and "7"; text is trimmed
    and NFC, its leading zeros stay.

    Args:
        name: of the column, with its file, for messages.
        whole: text such as "7.0" is the number 7 (see `written_as_floats`).

    Raises:
        ValueError: floats or decimals that are not whole, or so large that they have lost digits;
            types that are no ids.
    """
    kind = values.dtype
    if kind.is_integer() or kind == pl.Boolean or kind.is_temporal() or kind == pl.Null:
        return values.cast(pl.String)
    if kind.is_float():
        return _of_floats(values, name)
    if kind.is_decimal():
        text = values.cast(pl.String).str.replace(r"\.0*$", "")
        _refuse(values.filter(text.str.contains(".", literal=True)), name)
        return text
    if kind == pl.Binary:
        return trimmed(_of_bytes(values, name))
    if kind != pl.String and not isinstance(kind, (pl.Categorical, pl.Enum)):
        raise ValueError(
            f"{name or values.name}: expected ids (text or whole numbers), got a column of {kind}"
        )
    text = trimmed(values.cast(pl.String))
    return text.str.replace(r"^(-?\d+)\.0$", "${1}") if whole else text


def _of_floats(values: pl.Series, name: str) -> pl.Series:
    values = values.cast(pl.Float64).fill_nan(None)
    good = values.is_finite() & (values == values.floor())
    _refuse(values.filter(~good), name)
    if (values.abs() > _EXACT).any():
        shown = ", ".join(f"{x:.0f}" for x in values.filter(values.abs() > _EXACT).head(3))
        raise ValueError(
            f"{name or values.name}: expected ids that a float holds exactly, up to 2^53, got "
            f"{shown}: store them as whole numbers or text"
        )
    return values.cast(pl.Int64).cast(pl.String)


def _refuse(wrong: pl.Series, name: str) -> None:
    if len(wrong):
        shown = ", ".join(str(x) for x in wrong.head(3).to_list())
        raise ValueError(
            f"{name or wrong.name}: expected ids (text or whole numbers), got the numbers {shown}"
        )


def _of_bytes(values: pl.Series, name: str) -> pl.Series:
    """UTF-8; 16 bytes that are none are a UUID."""
    try:
        return values.cast(pl.String)
    except pl.exceptions.PolarsError:
        return pl.Series(values.name, [_of_some_bytes(v, name) for v in values], pl.String)


def _of_some_bytes(value: bytes | None, name: str) -> str | None:
    if value is None:
        return None
    try:
        return value.decode()
    except UnicodeDecodeError:
        if len(value) == 16:
            return str(uuid.UUID(bytes=value))
    raise ValueError(
        f"{name}: expected ids as UTF-8 text or UUIDs of 16 bytes, got the bytes {value!r:.60}"
    )


def text(column: str, name: str, path: Location | str = "", *, whole: bool = False) -> pl.Expr:
    """A column as ids called `name`; a missing word stays, for `missing` to find."""
    where = f"{path}: {column}" if path else column

    def read(values: pl.Series) -> pl.Series:
        return as_text(values, where, whole=whole)

    return pl.col(column).map_batches(read, pl.String, is_elementwise=True).alias(name)


def label(column: str, name: str, path: Location | str = "") -> pl.Expr:
    """A column of categories: as `text`, null where it is missing."""
    where = f"{path}: {column}" if path else column

    def read(values: pl.Series) -> pl.Series:
        found = as_text(values, where)
        return found.set(missing(found), None)

    return pl.col(column).map_batches(read, pl.String, is_elementwise=True).alias(name)


def written_as_floats(frame: pl.LazyFrame, column: str) -> bool:
    """Whether a column of text holds whole numbers that all end in ".0", as pandas writes them
    where one is missing.

    One value that does not settles it, so most columns are looked at in their first rows alone.
    """
    if frame.collect_schema()[column] != pl.String:
        return False
    plain = pl.col(column).str.strip_chars(_BLANK)
    there = plain.is_not_null() & ~plain.is_in(MISSING)
    found = (there & plain.str.contains(_POINT_ZERO)).sum()
    for some in (frame.select(column).head(1000), frame.select(column)):
        of, count = (
            some.select(there.sum().alias("there"), found.alias("found"))
            .collect(engine="streaming")
            .row(0)
        )
        if not count or count < of:
            return False
    return True


def missing(ids: pl.Series) -> pl.Series:
    """[n] bool: the text is one of the words that mean that there is no id."""
    return ids.is_in(MISSING).fill_null(False)


def array(ids: pa.Array | pa.ChunkedArray, name: str) -> pa.Array:
    """An Arrow column of ids as text (string)."""
    values = pl.from_arrow(ids)
    assert isinstance(values, pl.Series)
    found = as_text(values, name).to_arrow(compat_level=pl.CompatLevel.oldest())
    return found.cast(pa.string())


def no_match(theirs: Iterable[Any], ours: Iterable[Any]) -> str:
    """Why ids of two places may not fit, with examples of both."""
    a, b = ([str(x) for x, _ in zip(of, range(3), strict=False)] for of in (theirs, ours))
    shorter = {x.lstrip("0") for x in b} | {x.lstrip("0") for x in a}
    zeros = any(x.startswith("0") for x in (*a, *b)) and shorter
    digits = re.compile(r"\d+")
    said = (
        " (leading zeros are lost where ids are stored as numbers)"
        if zeros and all(map(digits.fullmatch, (*a, *b)))
        else ""
    )
    return f"{', '.join(map(repr, a))} against {', '.join(map(repr, b))}{said}"
