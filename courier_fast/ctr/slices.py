"""Parts of the impressions that are looked at on their own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .impressions import DAY, Impressions, category_codes

Array = npt.NDArray

Slice = tuple[str, str, Array]  # kind, name, mask [n]

CATEGORIES = 20  # the largest ones; the others together


def slices(shown: Impressions, cosine: Array | None = None) -> Iterator[Slice]:
    """Each slice that has impressions.

    Kinds: clicks of the item on pages of the train split; days (without times, pages) since it was
    first seen; length of
    the history; `cosine` [n], if given, in quartiles, NaN apart; category.
    """
    clicks = shown.dataset.item_clicks[shown.item]
    day = DAY if shown.dataset.timed else 1
    age = (shown.time - shown.dataset.item_first_seen[shown.item]) // day
    for kind, values, bounds in (
        ("clicks in training", clicks, (0, 1, 5, 20)),
        (f"{'days' if shown.dataset.timed else 'pages'} since first seen", age, (0, 7, 30, 90)),
        ("history", shown.history_length, (0, 1, 5, 10)),
    ):
        if (values < bounds[0]).any():
            yield kind, "before", values < bounds[0]
        for low, after in zip(bounds, [*bounds[1:], None], strict=True):
            mask = (values >= low) if after is None else (values >= low) & (values < after)
            if mask.any():
                name = (
                    f"{low}+"
                    if after is None
                    else str(low)
                    if after == low + 1
                    else f"{low}-{after - 1}"
                )
                yield kind, name, mask
    if cosine is not None:
        yield from _quartiles("largest cosine to the history", cosine)
    yield from _category_slices(shown)


def _quartiles(kind: str, values: Array) -> Iterator[Slice]:
    have = np.isfinite(values)
    if have.any():
        bounds = np.quantile(values[have], (0, 0.25, 0.5, 0.75, 1))
        part = np.where(have, np.searchsorted(bounds[1:4], values, side="right"), -1)
        for i in range(4):
            if (part == i).any():
                yield kind, f"{bounds[i]:.2f} to {bounds[i + 1]:.2f}", part == i
    if not have.all():
        yield kind, "none", ~have


def _category_slices(shown: Impressions) -> Iterator[Slice]:
    codes, names = category_codes(shown.dataset)
    of = codes[shown.item]
    counts = np.bincount(of, minlength=len(names))
    largest = [c for c in np.argsort(-counts, kind="stable")[:CATEGORIES] if counts[c]]
    for c in largest:
        yield "category", names[c], of == c
    rest = ~np.isin(of, largest)
    if rest.any():
        yield "category", "(the rest)", rest
