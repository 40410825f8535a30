"""Parts of the impressions that are looked at on their own."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from .impressions import Impressions, category_codes

Array = npt.NDArray

CATEGORIES = 20  # the largest ones; the others together


def slices(shown: Impressions) -> Iterator[tuple[str, str, Array]]:
    """Kind, name and mask [n] of each slice: clicks of the item on pages of the train split, length of the history, category."""
    clicks = shown.dataset.item_clicks[shown.item]
    for kind, values, bounds in (
        ("clicks in training", clicks, (0, 1, 5, 20)),
        ("history", shown.history_length, (0, 1, 5, 10)),
    ):
        for low, after in zip(bounds, [*bounds[1:], None], strict=True):
            mask = (values >= low) if after is None else (values >= low) & (values < after)
            if mask.any():
                name = f"{low}+" if after is None else str(low) if after == low + 1 else f"{low}-{after - 1}"  # fmt: skip
                yield kind, name, mask
    codes, names = category_codes(shown.dataset)
    of = codes[shown.item]
    counts = np.bincount(of, minlength=len(names))
    largest = [c for c in np.argsort(-counts, kind="stable")[:CATEGORIES] if counts[c]]
    for c in largest:
        yield "category", names[c], of == c
    rest = ~np.isin(of, largest)
    if rest.any():
        yield "category", "(the rest)", rest
