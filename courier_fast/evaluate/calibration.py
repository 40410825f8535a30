"""Predicted against observed clicks, and predictions mended on other impressions than those they are judged by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from numba import njit

from .counts import SMALLEST, Sorted, check_clicked, check_predictions

Array = npt.NDArray


@dataclass(frozen=True)
class Bin:
    """Impressions with predictions from `low` to `high`: how many, their mean prediction, their share of clicks."""

    low: float
    high: float
    count: int
    predicted: float
    observed: float


@dataclass(frozen=True)
class Calibration:
    """`pcoc`: predicted clicks over observed clicks; `ece`: mean over impressions of |predicted - observed| of their bin."""

    pcoc: float
    ece: float
    bins: tuple[Bin, ...]


def calibration(
    clicked: npt.ArrayLike, predictions: npt.ArrayLike, *, bins: int = 15
) -> Calibration:
    """PCOC = sum p / sum y, and ECE = sum_b n_b / n |mean p - mean y| over bins of (nearly) equal numbers of impressions.

    Equal predictions are in one bin, that of the middle of their places; so there can be fewer than `bins`.

    Args:
        clicked: [n] bool or 0 and 1, some of them clicked.
        predictions: [n] probabilities.
    """
    y = check_clicked(clicked, both=False)
    p = check_predictions(predictions, len(y), probability=True)
    by_prediction = Sorted.of(p)
    return calibration_of(by_prediction, by_prediction.take(y), bins)


def calibration_of(by_prediction: Sorted, clicked: Array, bins: int) -> Calibration:
    """As `calibration`, of impressions in sorted order."""
    if bins < 1:
        raise ValueError(f"bins: expected at least 1, got {bins}")
    if not clicked.any():
        raise ValueError(f"clicked: expected at least one click, got {len(clicked)} times 0")
    p, n = by_prediction.p, len(clicked)
    bounds = {0, n}
    for place in (n * b / bins for b in range(1, bins)):
        start, end = (int(np.searchsorted(p, p[int(place)], side)) for side in ("left", "right"))
        bounds.add(end if start + end < 2 * place else start)
    edges = sorted(bounds)
    found = []
    for start, end in pairwise(edges):
        predicted = p[start:end].mean(dtype=np.float64)
        observed = np.count_nonzero(clicked[start:end]) / (end - start)
        low, high = float(p[start]), float(p[end - 1])
        found.append(Bin(low, high, end - start, float(predicted), observed))
    expected = sum(b.count * b.predicted for b in found)
    ece = sum(b.count * abs(b.predicted - b.observed) for b in found) / n
    return Calibration(expected / np.count_nonzero(clicked), ece, tuple(found))


# ---- recalibration ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Isotonic:
    """A function that does not fall, linear between the knots `x` and constant outside; called with predictions [n]."""

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


def fit_isotonic(clicked: npt.ArrayLike, predictions: npt.ArrayLike) -> Isotonic:
    """The non-decreasing function of the prediction with the least squared error to the labels [n], by pooling adjacent violators.

    Fit it on validation: `fit_isotonic(clicked_v, p_v)(p_test)`. It makes ties, and predictions of 0 and 1 at the ends.
    """
    y = check_clicked(clicked, both=False)
    by_prediction = Sorted.of(check_predictions(predictions, len(y), probability=True))
    start = np.flatnonzero(by_prediction.first)
    clicks = np.add.reduceat(by_prediction.take(y), start, dtype=np.float64)
    count = np.diff(start, append=len(y)).astype(np.float64)
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


def fit_platt(clicked: npt.ArrayLike, predictions: npt.ArrayLike, *, steps: int = 100) -> Platt:
    """The logistic regression of the labels [n] on logit(p), by Newton's method; p clipped to [1e-7, 1 - 1e-7].

    As Platt has it the labels are (n1 + 1) / (n1 + 2) and 1 / (n0 + 2) of n1 clicked and n0 not, so that it ends on separable ones too.
    """
    y = check_clicked(clicked)
    x = _logit(check_predictions(predictions, len(y), probability=True))
    positives = np.count_nonzero(y)
    target = np.where(y, (positives + 1) / (positives + 2), 1 / (len(y) - positives + 2))

    def loss(at: Array) -> float:
        z = at[0] * x + at[1]
        return float(np.mean(np.logaddexp(0, z) - target * z))

    # From the best constant on; where x is constant the hessian is singular, and lstsq takes the shortest step.
    at = np.array([0.0, math.log(positives / (len(y) - positives))])
    before = loss(at)
    for _ in range(steps):
        p = _sigmoid(at[0] * x + at[1])
        gradient = np.array([np.mean((p - target) * x), np.mean(p - target)])
        w = p * (1 - p)
        cross = np.mean(w * x)
        hessian = np.array([[np.mean(w * x * x), cross], [cross, np.mean(w)]])
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
