"""How good predicted click probabilities are, with intervals that know that impressions of one user are alike.

With V_i = share of negatives below positive i (ties one half), V_j = share of positives above negative j, AUC = mean V_i and user u's influence

    h_u = sum_{i in u, clicked} (V_i - AUC) / n1 + sum_{j in u, not clicked} (V_j - AUC) / n0
    var(AUC) = U / (U - 1) sum_u h_u^2,        var(AUC^a - AUC^b) = U / (U - 1) sum_u (h_u^a - h_u^b)^2

(DeLong's interval, by clusters: Obuchowski 1997). GAUC, by users with both labels and weighted by their impressions, and logloss are ratios of
sums over users, so their influences are those of ratios.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from ..metrics import Ranks, group_mean

Array = npt.NDArray

BINS = 15  # of calibration
POWER = 2.8  # standard errors of the difference that is found in 80 % of samples, two-sided 5 %


def judge(
    clicked: Array, p: Mapping[str, Array], user: Array, base: str = "none"
) -> dict[str, dict[str, Any]]:
    """By name of probabilities [n]: "auc", "gauc" and "logloss" with "value", "low", "high" (95 %).

    For all names but `base` also "difference": the three minus those of `base`, paired by user, with "p" after Holm's correction over the names;
    "mde": the least difference of AUC that is found with power 80 %; "relaimpr": (AUC - 0.5) / (AUC of base - 0.5) - 1.
    """
    _, who = np.unique(user, return_inverse=True)
    users = int(who.max()) + 1
    # Each metric: its value and every user's influence on it.
    found = {name: _metrics(clicked, x, who, users) for name, x in p.items()}
    result: dict[str, dict[str, Any]] = {
        name: {m: _interval(value, h) for m, (value, h) in of.items()} for name, of in found.items()
    }
    against = found[base]
    others = [name for name in p if name != base]
    for name in others:
        differences = {
            m: _interval(value - against[m][0], h - against[m][1])
            for m, (value, h) in found[name].items()
        }
        result[name]["difference"] = differences
        result[name]["mde"] = POWER * differences["auc"]["se"]
        above = against["auc"][0] - 0.5
        result[name]["relaimpr"] = (found[name]["auc"][0] - 0.5) / above - 1 if above else math.nan
    for metric in against:
        raw = [result[n]["difference"][metric]["p"] for n in others]
        for name, corrected in zip(others, holm(raw), strict=True):
            result[name]["difference"][metric]["p"] = corrected
    return result


def _metrics(clicked: Array, p: Array, who: Array, users: int) -> dict[str, tuple[float, Array]]:
    above, mine = _placements(clicked, p), np.bincount(who, minlength=users)
    auc = float(above[clicked].mean())
    n1 = clicked.sum()
    weight = np.where(clicked, 1 / n1, 1 / (len(p) - n1))
    losses = -np.log(np.where(clicked, np.clip(p, 1e-7, 1), np.clip(1 - p, 1e-7, 1)))
    loss = float(losses.mean())
    of_user, both = _auc_by_user(clicked, p, who, users)
    size = np.where(both, mine, 0)
    gauc = float((size * of_user).sum() / size.sum()) if size.sum() else math.nan
    return {
        "auc": (auc, np.bincount(who, (above - auc) * weight, users)),
        "gauc": (gauc, size * (of_user - gauc) / max(1, size.sum())),
        "logloss": (loss, (np.bincount(who, losses, users) - mine * loss) / len(p)),
    }


def _placements(clicked: Array, p: Array) -> Array:
    """[n] of a clicked one the share of the others below it, of another the share of clicked ones above it; ties count one half."""
    out = np.empty(len(p))
    for label, side in ((True, 1), (False, -1)):
        other = np.sort(side * p[clicked != label])
        here = side * p[clicked == label]
        below = np.searchsorted(other, here, "left") + np.searchsorted(other, here, "right")
        out[clicked == label] = below / (2 * len(other))
    return out


def _auc_by_user(clicked: Array, p: Array, who: Array, users: int) -> tuple[Array, Array]:
    """[users] AUC, 0 where a user has one label; and who has both."""
    clicks = np.bincount(who, clicked, users)
    others = np.bincount(who, ~clicked, users)
    both = (clicks > 0) & (others > 0)
    rank = _mean_ranks(p, who)
    total = np.bincount(who, np.where(clicked, rank, 0), users)
    auc = (total - clicks * (clicks + 1) / 2) / np.maximum(clicks * others, 1)
    return np.where(both, auc, 0), both


def _mean_ranks(p: Array, group: Array) -> Array:
    """[n] rank of p within its group, from 1; equal ones get their mean."""
    order = np.lexsort((p, group))
    g, v = group[order], p[order]
    new = np.append(True, (g[1:] != g[:-1]) | (v[1:] != v[:-1]))
    first, run = np.flatnonzero(new), np.cumsum(new) - 1
    last = np.append(first[1:], len(p))
    begins = np.flatnonzero(np.append(True, g[1:] != g[:-1]))
    start = np.repeat(begins, np.diff(np.append(begins, len(p))))
    rank = np.empty(len(p))
    rank[order] = (first[run] + last[run] + 1) / 2 - start
    return rank


def _interval(value: float, influence: Array) -> dict[str, float]:
    users = len(influence)
    se = math.sqrt(users / (users - 1) * float(np.square(influence).sum()))
    p = math.erfc(abs(value) / se / math.sqrt(2)) if se > 0 else float(value == 0)
    return {"value": value, "low": value - 1.96 * se, "high": value + 1.96 * se, "se": se, "p": p}


def holm(p: list[float]) -> list[float]:
    """Holm's correction for as many tests as there are."""
    order = np.argsort(p)
    grown = np.maximum.accumulate(np.minimum(1, np.sort(p) * np.arange(len(p), 0, -1)))
    out = np.empty(len(p))
    out[order] = grown
    return out.tolist()


def plain_auc(clicked: Array, p: Array) -> float:
    return float(_placements(clicked, p)[clicked].mean())


def calibrated(clicked: Array, p: Array, bins: int = BINS) -> dict[str, Any]:
    """ "ratio": predicted over observed clicks; "ece": mean |predicted - observed rate| over bins of equal mass, ties never divided; "bins": their rates."""
    order = np.argsort(p, kind="stable")
    value = p[order]
    cut = np.searchsorted(value, value[np.arange(1, bins) * len(p) // bins], "left")
    starts = np.unique(np.append(0, cut))
    size = np.diff(np.append(starts, len(p)))
    predicted = np.add.reduceat(value, starts) / size
    observed = np.add.reduceat(clicked[order].astype(np.float64), starts) / size
    return {
        "ratio": float(p.sum() / clicked.sum()),
        "ece": float((size * np.abs(predicted - observed)).sum() / len(p)),
        "bins": [{"predicted": a, "observed": b, "impressions": n} for a, b, n in zip(predicted.tolist(), observed.tolist(), size.tolist(), strict=True)],
    }  # fmt: skip


def by_page(clicked: Array, p: Array, page: Array, k: int = 10) -> dict[str, float]:
    """NDCG@k and MRR of the best click, means over pages with a click, the expected value over random orders of ties."""
    _, which = np.unique(page, return_inverse=True)
    pages = int(which.max()) + 1
    order = np.lexsort((-p, which))
    g, v, y = which[order], p[order], clicked[order].astype(np.float64)
    sizes = np.bincount(g, minlength=pages)
    start = np.cumsum(sizes) - sizes
    place = np.arange(len(p)) - start[g]  # from 0
    gain = np.where(place < k, 1 / np.log2(place + 2), 0)
    # A click among tied items gets their mean gain.
    new = np.append(True, (g[1:] != g[:-1]) | (v[1:] != v[:-1]))
    run = np.cumsum(new) - 1
    clicks = np.bincount(g, y, pages)
    found = np.bincount(g, y * group_mean(gain, run, int(run[-1]) + 1)[run], pages)
    best = np.append(0, np.cumsum(1 / np.log2(np.arange(k) + 2)))
    ndcg = found / np.maximum(best[np.minimum(clicks, k).astype(int)], 1e-12)
    has = clicks > 0
    mrr = _first_click(v, y, run, g, pages, place)
    return {f"ndcg@{k}": float(ndcg[has].mean()), "mrr": float(mrr[has].mean())}


def _first_click(v: Array, y: Array, run: Array, g: Array, pages: int, place: Array) -> Array:
    """[pages] expected 1 / rank of the first clicked item; 0 without a click."""
    out = np.zeros(pages)
    runs = int(run[-1]) + 1
    size, hits = np.bincount(run, minlength=runs), np.bincount(run, y, runs)
    first = np.flatnonzero(np.append(True, run[1:] != run[:-1]))
    done = np.zeros(pages, bool)
    for r in np.flatnonzero(hits):
        page = g[first[r]]
        if done[page]:
            continue
        done[page] = True
        above, n, c = int(place[first[r]]), int(size[r]), int(hits[r])
        if c == 1:  # anywhere among the tied
            out[page] = Ranks(*np.array([[above], [n - 1], [0]])).reciprocal()[0]
            continue
        # P(first of c clicks at place m of n) = C(n - m, c - 1) / C(n, c)
        out[page] = sum(
            math.comb(n - m, c - 1) / math.comb(n, c) / (above + m) for m in range(1, n - c + 2)
        )
    return out
