"""Parts of the impressions that are looked at on their own, and recalibration."""

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


def platt(p: Array, clicked: Array, steps: int = 50) -> tuple[float, float]:
    """Slope and intercept of the logistic regression of clicks on the logit of p, by Newton's method with a touch of ridge."""
    x = np.stack([_logit(p), np.ones(len(p))], 1)
    y, w = clicked.astype(np.float64), np.array([1.0, 0.0])
    for _ in range(steps):
        q = 1 / (1 + np.exp(-(x @ w)))
        gradient = x.T @ (q - y) + 1e-6 * w
        hessian = (x * (q * (1 - q))[:, None]).T @ x + 1e-6 * np.eye(2)
        change = np.linalg.solve(hessian, gradient)
        w = w - change
        if np.abs(change).max() < 1e-10:
            break
    return float(w[0]), float(w[1])


def recalibrated(p: Array, slope: float, intercept: float) -> Array:
    """Probabilities after `platt`."""
    return 1 / (1 + np.exp(-(slope * _logit(p) + intercept)))


def _logit(p: Array) -> Array:
    p = np.clip(p, 1e-7, 1 - 1e-7)
    return np.log(p / (1 - p))
