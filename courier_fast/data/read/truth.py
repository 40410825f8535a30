"""Words for yes and no, as columns of clicks have them."""

from __future__ import annotations

import polars as pl

YES = ("true", "t", "yes", "y", "on", "1")
NO = ("false", "f", "no", "n", "off", "0")
# Taken for no, and counted. Fewer words than those of ids.py, and in any case: "n/a" is an error.
MISSING = ("", "null", "none", "nan", "\\n")
UNKNOWN = "not said whether clicked"
# Names of columns that say whether a row was clicked.
FLAGS = ("clicked", "is_clicked", "was_clicked", "click", "is_click", "label", "click_label")


def can_be_read(kind: pl.DataType) -> bool:
    """Whether a column of this type can hold yes and no."""
    plain = kind == pl.String or kind == pl.Boolean or kind == pl.Null
    return plain or kind.is_numeric() or isinstance(kind, (pl.Categorical, pl.Enum))


def split(values: pl.Series) -> tuple[pl.Series, pl.Series]:
    """Text or numbers as yes and no (null: missing), and the distinct words that are neither, with
    their number of rows.

    Case and blanks around a word do not matter, 1.0 is 1; of numbers only 0 and 1 say something.
    """
    if values.dtype == pl.Boolean:
        return values, pl.Series([], dtype=pl.Struct({"word": pl.String, "count": pl.UInt32}))
    words = values.cast(pl.String).str.strip_chars()
    small = words.str.to_lowercase()
    number = small.cast(pl.Float64, strict=False)
    yes, no = (
        small.is_in(YES) | (number == 1).fill_null(False),
        small.is_in(NO) | (number == 0).fill_null(False),
    )
    found = pl.select(pl.when(yes).then(True).when(no).then(False)).to_series()
    strange = words.filter(~(yes | no | small.is_in(MISSING)).fill_null(True))
    counts = strange.rename("word").value_counts(sort=True, name="count")
    # Words of one count in one order.
    return found, counts.sort("count", "word", descending=[True, False]).to_struct()


def read(values: pl.Series, column: str = "--clicked-column") -> pl.Series:
    """[n] bool, null where it is missing. ValueError names what is neither yes nor no."""
    found, strange = split(values)
    if len(strange):
        shown = ", ".join(f"{w['word']!r} in {w['count']:,}" for w in strange[:3].to_list())
        more = f" and {len(strange) - 3:,} more" if len(strange) > 3 else ""
        raise ValueError(
            f"{column}: expected yes or no in each row "
            f"({', '.join(f'{y}/{n}' for y, n in zip(YES, NO, strict=True))}; an empty one is no), "
            f"got {shown}{more} of {len(values):,} rows"
        )
    return found
