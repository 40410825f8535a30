"""Ids and names that are nearly the same: why those of two sides do not match."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from urllib.parse import unquote

import polars as pl

# How names may differ from ids, and what makes the same of both; the mildest first.
FORMS: dict[str, Callable[[str], str]] = {
    "in blanks around them": str.strip,
    "in upper and lower case": lambda s: s.strip().casefold(),
    "in their form of Unicode": lambda s: unicodedata.normalize("NFKC", s).strip(),
    "in leading zeros": lambda s: s.strip().lstrip("0") or "0",
    "in a decimal point": lambda s: re.sub(r"\.0*$", "", s.strip()),
    "in URL-encoded characters": unquote,
    "in a suffix as files have it": lambda s: re.sub(r"(\.[A-Za-z]\w{1,4})+$", "", s),
    "in folders before them": lambda s: re.split(r"[/\\]", s)[-1],
    "in characters that are no letters and digits": lambda s: re.sub(r"\W|_", "", s),
}
MOST = 1000  # names that are compared
_IDS = 1_000_000


def difference(ids: Sequence[str], names: Iterable[str]) -> tuple[str, str, str] | None:
    """How some of `names` differ from some of `ids`: in what, such an id, such a name. None where
    nothing is alike."""
    names, ids = list(islice(names, MOST)), ids[:_IDS]
    for what, form in FORMS.items():
        known = {form(i): i for i in reversed(ids)}
        pairs = [(known[form(name)], name) for name in names if form(name) in known and form(name)]
        if pairs := [pair for pair in pairs if pair[0] != pair[1]]:
            return what, *min(pairs)
    return None


def items_note(ids: pl.Series, found: pl.Series, table: pl.LazyFrame) -> list[str]:
    """A word where less than half of the items (`ids`) are among those of the table of items, of
    which `found` are; ValueError where none is."""
    if 2 * len(found) >= len(ids):
        return []
    left = ids.filter(~ids.is_in(found.implode())).to_list()
    names = table.select("item_id").head(MOST).collect()["item_id"].drop_nulls().to_list()
    text = (
        f"items: {len(found):,} of {len(ids):,} items of the interactions match a row of --items, "
        "which has categories and dates; "
        f"not {', '.join(left[:3])}; its rows are {', '.join(names[:3]) or 'none'}"
    )
    if alike := difference(left, names):
        text += f"; do they differ {alike[0]} ({alike[1]} and {alike[2]})?"
    if not len(found):
        raise ValueError(text)
    return [text]
