"""Predicted against observed clicks, and predictions mended on other impressions than those they
are judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from numba import njit

from .counts import (
    SMALLEST,
    SortedPredictions,
    check_clicked,
    check_predictions,
    check_weight,
    clicks_of,
)

Array = npt.NDArray


@dataclass(frozen=True)
class Bin:
    """Impressions with predictions from `low` to `high`: how many (the sum of their weights), their
    mean prediction, their share of clicks."""

    low: float
    high: float
    count: float
    predicted: float
    observed: float


@dataclass(frozen=True)
class Calibration:
    """`pcoc`: predicted clicks over observed clicks; `ece`: mean over impressions of
    |predicted - observed| of their bin."""

    pcoc: float
    ece: float
    bins: tuple[Bin, ...]


def calibration(
    clicked: npt.ArrayLike,
    predictions: npt.ArrayLike,
    *,
    bins: int = 15,
    weight: npt.ArrayLike | None = None,
) -> Calibration:
    """PCOC = sum p / sum y, and ECE = sum_b n_b / n |mean p - mean y| over bins of (nearly) equal
    numbers of impressions.

    Equal predictions are in one bin, that of the middle of their places; so there can be fewer than
    `bins`.

    Args:
        clicked: [n] bool or 0 and 1, some of them clicked.
        predictions: [n] probabilities.
        weight: [n] how many impressions each stands for.
    """
    y = check_clicked(clicked, both=False)
    p = check_predictions(predictions, len(y), probability=True)
    w = check_weight(weight, len(y))
    by = SortedPredictions.of(p)
    return calibration_of(by, by.take(y), bins, by.take(w))


def calibration_of(
    by_prediction: SortedPredictions, clicked: Array, bins: int, weight: Array | None = None
) -> Calibration:
    """As `calibration`, of impressions in sorted order."""
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    if not clicked.any():
        raise ValueError(f"clicked: expected at least one click, got {len(clicked)} times 0")
    p, n = by_prediction.p, len(clicked)
    # How much comes before each row and the end; without weights that is its number.
    before = None if weight is None else np.append(0.0, np.cumsum(weight))
    total = n if before is None else float(before[-1])
    bounds = {0, n}
    for place in (total * b / bins for b in range(1, bins)):
        row = int(place) if before is None else int(np.searchsorted(before, place, "right")) - 1
        start, end = (int(np.searchsorted(p, p[min(row, n - 1)], s)) for s in ("left", "right"))
        around = start + end if before is None else before[start] + before[end]
        bounds.add(end if around < 2 * place else start)
    found = []
    for start, end in pairwise(sorted(bounds)):
        some, w = slice(start, end), None if weight is None else weight[start:end]
        count = end - start if w is None else float(w.sum())
        predicted = p[some].mean(dtype=np.float64) if w is None else (w * p[some]).sum() / count
        observed = clicks_of(clicked[some], w) / count
        found.append(Bin(float(p[start]), float(p[end - 1]), count, float(predicted), observed))
    expected = sum(b.count * b.predicted for b in found)
    ece = sum(b.count * abs(b.predicted - b.observed) for b in found) / total
    return Calibration(expected / clicks_of(clicked, weight), ece, tuple(found))


# ---- recalibration -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Isotonic:
    """A function that does not fall, linear between the knots `x` and constant outside; called with
    predictions [n]."""

    x: Array  # [knots] ascending
    y: Array  # [knots]

    def __call__(self, predictions: npt.ArrayLike) -> Array:
        given = np.asarray(predictions)
        p = check_predictions(given, given.size, probability=True)
        return np.interp(p, self.x, self.y)


@dataclass(frozen=True)
class Platt:
    """sigmoid(slope * logit(p) + intercept); called with predictions [n]."""

    slope: float
    intercept: float

    def __call__(self, predictions: npt.ArrayLike) -> Array:
        given = np.asarray(predictions)
        p = check_predictions(given, given.size, probability=True)
        return _sigmoid(self.slope * _logit(p) + self.intercept)


def fit_isotonic(
    clicked: npt.ArrayLike, predictions: npt.ArrayLike, *, weight: npt.ArrayLike | None = None
) -> Isotonic:
    """The non-decreasing function of the prediction with the least squared error to the labels [n],
    by pooling adjacent violators.

    Fit it on validation: `fit_isotonic(clicked_v, p_v)(p_test)`. It makes ties, and predictions of
    0 and 1 at the ends. `weight` [n]: how many impressions each stands for.
    """
    y = check_clicked(clicked, both=False)
    by_prediction = SortedPredictions.of(check_predictions(predictions, len(y), probability=True))
    w = check_weight(weight, len(y))
    w = np.ones(len(y)) if w is None else by_prediction.take(w)
    start = np.flatnonzero(by_prediction.first)
    clicks = np.add.reduceat(w * by_prediction.take(y), start)
    count = np.add.reduceat(w, start)
    value = _pool(clicks, count)
    # Inside a pool the function is constant: its ends are enough.
    inside = np.zeros(len(value), np.bool_)
    inside[1:-1] = (value[1:-1] == value[:-2]) & (value[1:-1] == value[2:])
    x = by_prediction.p[start].astype(np.float64)
    return Isotonic(x[~inside], value[~inside])


@njit(cache=True, nogil=True)
def _pool(total, count):  # type: ignore[no-untyped-def]
    """[n] means of the pools of `total` / `count` [n], which it uses as its stack."""
    n = len(total)
    size = np.ones(n, np.int64)
    top = -1
    for i in range(n):
        top += 1
        total[top], count[top], size[top] = total[i], count[i], 1
        while top and total[top - 1] * count[top] >= total[top] * count[top - 1]:
            total[top - 1] += total[top]
            count[top - 1] += count[top]
            size[top - 1] += size[top]
            top -= 1
    out = np.empty(n)
    end = n
    for pool in range(top, -1, -1):
        out[end - size[pool] : end] = total[pool] / count[pool]
        end -= size[pool]
    return out


def fit_platt(
    clicked: npt.ArrayLike,
    predictions: npt.ArrayLike,
    *,
    steps: int = 100,
    weight: npt.ArrayLike | None = None,
) -> Platt:
    """The logistic regression of the labels [n] on logit(p), by Newton's method; p clipped to
    [1e-7, 1
    - 1e-7].

    As Platt has it the labels are (n1 + 1) / (n1 + 2) and 1 / (n0 + 2) of n1 clicked and n0 not, so
    that it ends on separable ones too. `weight` [n]: how many impressions each stands for, in n1
    and n0, too.
    """
    y = check_clicked(clicked)
    x = _logit(check_predictions(predictions, len(y), probability=True))
    sizes = check_weight(weight, len(y))
    positives = clicks_of(y, sizes)
    negatives = clicks_of(~y, sizes)
    target = np.where(y, (positives + 1) / (positives + 2), 1 / (negatives + 2))

    def mean(values: Array) -> float:
        return float(np.average(values, weights=sizes))

    def loss(at: Array) -> float:
        z = at[0] * x + at[1]
        return mean(np.logaddexp(0, z) - target * z)

    # From the best constant on; where x is constant the hessian is singular, and lstsq takes the
    # shortest step.
    at = np.array([0.0, math.log(positives / negatives)])
    before = loss(at)
    for _ in range(steps):
        p = _sigmoid(at[0] * x + at[1])
        gradient = np.array([mean((p - target) * x), mean(p - target)])
        w = p * (1 - p)
        cross = mean(w * x)
        hessian = np.array([[mean(w * x * x), cross], [cross, mean(w)]])
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        while (now := loss(at - step)) > before and np.abs(step).max() > 1e-14:
            step = step / 2
        if now > before:
            break
        at = at - step
        if np.abs(step).max() <= 1e-12 * max(1.0, np.abs(at).max()):
            break
        before = now
    return Platt(float(at[0]), float(at[1]))


def _logit(p: Array) -> Array:
    p = np.clip(p.astype(np.float64), SMALLEST, 1 - SMALLEST)
    return np.log(p) - np.log1p(-p)


def _sigmoid(z: Array) -> Array:
    return np.exp(-np.logaddexp(0, -z))
