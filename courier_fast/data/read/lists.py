"""Lists in a column, whatever a file stores them in: lists of Parquet, JSON, or text between
blanks, commas or bars."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ...locations import Location
from .ids import as_text

EXPECTED = "a list of ids, or text between blanks, commas or bars"
Row = Callable[[int, int], str]  # names a row of a batch, and one of the columns

_ROW = "row of the file"
_BETWEEN = r"[\s,|]+"
_TEXT = (pl.String, pl.Categorical, pl.Enum)


def can_be_read(kind: pl.DataType) -> bool:
    """Whether a column of this type can hold lists of ids."""
    inner = getattr(kind, "inner", None) if isinstance(kind, (pl.List, pl.Array)) else kind
    return inner is not None and not inner.is_nested() and (inner != kind or kind in _TEXT)


def split(values: pl.Series) -> pl.Series:
    """[n] lists of a column that `checked` has passed: as they are, or of text."""
    if isinstance(values.dtype, pl.Array):
        return values.arr.to_list()
    if isinstance(values.dtype, pl.List):
        return values
    text = values.cast(pl.String).str.strip_chars().fill_null("")
    is_json = text.str.starts_with("[")
    plain = text.set(is_json, "").str.replace_all(_BETWEEN, " ").str.strip_chars()
    found = plain.str.split(" ")
    if is_json.any():
        decoded = text.set(~is_json, "[]").str.json_decode(pl.List(pl.String))
        whole = pl.element().str.replace(r"^(-?\d+)\.0+$", "${1}")  # as numbers are everywhere
        frame = pl.DataFrame({"json": is_json, "decoded": decoded.list.eval(whole), "found": found})
        found = frame.select(pl.when("json").then("decoded").otherwise("found")).to_series()
    return found


def flat(lists: pl.Series) -> tuple[npt.NDArray[np.int64], pl.Series]:
    """Where each list begins, and the last ends, and their values, one list after another."""
    sizes = lists.list.len().fill_null(0).to_numpy()
    ends = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])
    return ends, lists.explode(empty_as_null=False, keep_nulls=False)


def with_rows(frame: pl.LazyFrame) -> pl.LazyFrame:
    """With the number of each row of the file, by which messages name it."""
    return frame.with_row_index(_ROW, 1)


def each(
    path: Location,
    columns: Sequence[str],
    kind: Any,
    read: Callable[[list[pl.Series], Row], pl.Series],
) -> pl.Expr:
    """`read` of some columns' values, and of what names a row; for frames of `with_rows`."""

    def values(together: pl.Series) -> pl.Series:
        rows = together.struct.field(_ROW)
        found = [together.struct.field(column) for column in columns]
        return read(found, lambda i, column: f"{path}: row {rows[i]:,}: {columns[column]}")

    return pl.struct(_ROW, *columns).map_batches(values, kind, is_elementwise=True)


def check_json(
    values: pl.Series, where: Callable[[int], str], expected: str, inside: type | None = None
) -> None:
    """ValueError for a value that begins as JSON and is none, or no list of plain values (or of
    `inside`)."""
    if values.dtype != pl.String:
        return
    text = values.str.strip_chars()
    looks = text.str.contains(r"^[\[{]").fill_null(False)
    changed = text.ne_missing(text.shift())  # the rows of a page have one history
    for i in (looks & changed).arg_true().to_list():
        try:
            found = json.loads(text[i])
        except ValueError as error:
            raise ValueError(
                f"{where(i)}: expected {expected}, got what is not JSON ({error}): {text[i]:.80}"
            ) from None
        wrong = not isinstance(found, list) or any(
            not isinstance(one, inside) if inside else isinstance(one, (list, dict))
            for one in found
        )
        if wrong:
            raise ValueError(f"{where(i)}: expected {expected}, got {text[i]:.80}")


def check(frame: pl.LazyFrame, path: Location, *columns: str) -> None:
    """ValueError for a column whose type holds no lists."""
    schema = frame.collect_schema()
    for column in columns:
        if not can_be_read(schema[column]):
            raise ValueError(
                f"{path}: expected {EXPECTED} as {column}, got a column of {schema[column]}"
            )


def checked(frame: pl.LazyFrame, path: Location, column: str, name: str) -> pl.Expr:
    """A column of lists as it is, for `split`. ValueError for one whose type holds none; when it is
    read, for a row that is no list."""
    check(frame, path, column)
    if isinstance(frame.collect_schema()[column], (pl.List, pl.Array)):
        return pl.col(column).alias(name)

    def read(values: list[pl.Series], row: Row) -> pl.Series:
        text = values[0].cast(pl.String)
        check_json(text, lambda i: row(i, 0), EXPECTED)
        return text

    return each(path, [column], pl.String, read).alias(name)


def text_of(lists: pl.Series, where: str) -> pl.Series:
    """Lists of ids of any type as lists of text."""
    ends, values = flat(lists)
    return lists_of(ends, as_text(values, where))


def lists_of(ends: npt.NDArray[np.int64], values: pl.Series) -> pl.Series:
    """Values as lists: `flat` the other way round."""
    inside = values.to_arrow(compat_level=pl.CompatLevel.oldest())
    found = pl.from_arrow(pa.LargeListArray.from_arrays(pa.array(ends), inside))
    assert isinstance(found, pl.Series)
    return found
