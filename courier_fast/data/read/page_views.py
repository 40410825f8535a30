"""Rows that are page views: what was shown, clicked and where it stood, in lists of one length, or
in a list of objects with a field of each."""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import polars as pl

from ...locations import Location
from . import lists

KIND = pl.Struct({"item_id": pl.List(pl.String), "clicked": pl.List(pl.String)})


class Shown(NamedTuple):
    """Names of columns, or of fields of the objects in the column `results`."""

    item: str
    clicked: str
    position: str | None = None
    results: str | None = None

    @property
    def fields(self) -> list[str]:
        return [self.item, self.clicked, *([self.position] if self.position else [])]

    @property
    def columns(self) -> list[str]:
        return [self.results] if self.results else self.fields


def page_views(frame: pl.LazyFrame, path: Location, shown: Shown) -> pl.Expr:
    """A struct of two lists for each row: item_id and clicked, as text, in order of their
    positions.

    ValueError for a column that holds no lists; when it is read, for a row whose lists are no
    lists, no JSON, or differ in length.
    """
    if not shown.results:
        lists.check(frame, path, *shown.columns)
    else:
        kind = frame.collect_schema()[shown.results]
        inner = kind.inner if isinstance(kind, pl.List) else None
        if kind != pl.String and not isinstance(inner, pl.Struct):
            raise ValueError(
                f"{path}: expected a list of objects, or JSON of one, as {shown.results}, got a "
                f"column of {kind}"
            )
        have = [f.name for f in inner.fields] if isinstance(inner, pl.Struct) else shown.fields
        if set(shown.fields) - set(have):
            raise ValueError(
                f"{path}: expected objects with {', '.join(shown.fields)} as {shown.results}, "
                f"got {', '.join(have)}"
            )

    def read(columns: list[pl.Series], row: lists.Row) -> pl.Series:
        if shown.results:
            columns = _fields(columns[0], shown, row)
        else:
            for number, column in enumerate(columns):
                lists.check_json(column, partial(_named, row, number), lists.EXPECTED)
            columns = [lists.split(column) for column in columns]
        for number, column in enumerate(columns[1:], 1):
            sizes = [of.list.len().fill_null(0) for of in (columns[0], column)]
            for i in (sizes[0] != sizes[1]).arg_true().head(1).to_list():
                raise ValueError(
                    f"{row(i, number)}: expected as many values as {shown.item} has, "
                    f"{sizes[0][i]}, got {sizes[1][i]}"
                )
        text = [
            lists.text_of(column, f"{path}: {shown.fields[n]}")
            for n, column in enumerate(columns[:2])
        ]
        found = pl.DataFrame({"item_id": text[0], "clicked": text[1]})
        if shown.position:
            found = _in_order(found, columns[2], path, shown.position)
        return found.to_struct()

    return lists.each(path, shown.columns, KIND, read)


def _named(row: lists.Row, column: int, i: int) -> str:
    return row(i, column)


def _fields(values: pl.Series, shown: Shown, row: lists.Row) -> list[pl.Series]:
    """Of a column of objects, a list of each field."""
    if values.dtype == pl.String:
        lists.check_json(values, lambda i: row(i, 0), "a JSON list of objects", dict)
        kind = pl.List(pl.Struct(dict.fromkeys(shown.fields, pl.String)))
        values = values.str.strip_chars().replace("", "[]").str.json_decode(kind)
    return [values.list.eval(pl.element().struct.field(name)) for name in shown.fields]


def _in_order(found: pl.DataFrame, position: pl.Series, path: Location, name: str) -> pl.DataFrame:
    ends, places = lists.flat(position)
    numbers = places.cast(pl.Float64, strict=False)
    if numbers.null_count():
        wrong = places.filter(numbers.is_null())[0]
        raise ValueError(f"{path}: expected numbers as {name}, got {wrong}")
    whole = found.with_row_index("row").with_columns(position=lists.lists_of(ends, numbers))
    rows = whole.explode("item_id", "clicked", "position").sort(
        "row", "position", maintain_order=True
    )
    return found.with_columns(
        lists.lists_of(ends, rows[n]).alias(n) for n in ("item_id", "clicked")
    )
