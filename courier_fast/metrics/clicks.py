"""Metrics of predicted clicks, and ranks of a clicked item among its candidates. Nothing depends on
the order of ties.

Predictions of clicks, for impressions [n]: AUC, GAUC, logloss, calibration, and by page NDCG@k, MRR
and HR@k; `compare` has all of them, with intervals. The metrics of pages are means over all orders
of tied impressions.

Weights [n], finite and above 0, say how many impressions each stands for, as where pages were cut
(`Dataset.pv_weight`): the metrics are then estimates of those of all. NDCG, MRR and HR take none:
they are of the impressions that are there.

Ranks. A target is one clicked item; its rank statistics are expectations over random orders of tied
candidates, so a constant score gets exactly what chance gets. A page's value is the mean over its
targets, a result is the mean over pages, and an interval comes from drawing users, with all their
pages, with replacement: pages of one user are not independent.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .counts import (
    BLOCK,
    SortedPredictions,
    add_losses,
    check_clicked,
    check_predictions,
    check_weight,
    clicks_of,
    group_codes,
    label_counts,
    page_gains,
    pairs_within,
)
from .intervals import (
    check_k,
    group_auc,
)

Array = npt.NDArray


# ---- predictions of clicks -----------------------------------------------------------------------


@dataclass(frozen=True)
class GroupMean:
    """A mean over the `kept` groups; the `dropped` have no value."""

    value: float
    kept: int
    dropped: int


def auc(
    clicked: npt.ArrayLike, predictions: npt.ArrayLike, *, weight: npt.ArrayLike | None = None
) -> float:
    """Probability that a clicked impression is predicted above one that was not, a tie counted one
    half.

    Args:
        clicked: [n] bool or 0 and 1, both of them.
        predictions: [n] scores, higher for a likelier click.
        weight: [n] how many impressions each stands for.
    """
    y = check_clicked(clicked)
    return gauc(y, predictions, np.zeros(len(y), np.int32), weight=weight).value


def gauc(
    clicked: npt.ArrayLike,
    predictions: npt.ArrayLike,
    group: npt.ArrayLike,
    weighting: str = "impressions",
    *,
    weight: npt.ArrayLike | None = None,
) -> GroupMean:
    """sum_g w_g AUC_g / sum_g w_g over the groups (users or pages) with both labels; ValueError if
    there is none.

    Args:
        clicked: [n] bool or 0 and 1.
        predictions: [n] scores.
        group: [n] integers or strings, the user or the page of each.
        weighting: w_g: "impressions" of the group (DIN's and FuxiCTR's), its "clicks", or "users":
            each group counts once.
        weight: [n] how many impressions each stands for.
    """
    y = check_clicked(clicked)
    p = check_predictions(predictions, len(y))
    w = check_weight(weight, len(y))
    code, groups = group_codes(group, len(y), "group")
    by = SortedPredictions.of(p)
    pairs = pairs_within(by.first, by.take(y), by.take(code), groups, by.take(w))
    value, of_group = group_auc(pairs, label_counts(y, code, groups, w), weighting)
    return _group_mean(value, of_group, "both labels")


def logloss(
    clicked: npt.ArrayLike, predictions: npt.ArrayLike, *, weight: npt.ArrayLike | None = None
) -> float:
    """Mean of -log of the probability of the label, natural, of probabilities [n] clipped to [1e-7,
    1
    - 1e-7], by `weight` [n]."""
    y = check_clicked(clicked, both=False)
    p = check_predictions(predictions, len(y), probability=True)
    w = check_weight(weight, len(y))
    one, total = np.zeros(min(len(y), BLOCK), np.int32), 0.0
    for start in range(0, len(y), BLOCK):
        b = slice(start, start + BLOCK)
        part = None if w is None else w[b]
        total += float(add_losses(y[b], p[b], one[: len(y[b])], 1, part)[0])
    return total / (len(y) if w is None else float(w.sum()))


def normalised_entropy(
    clicked: npt.ArrayLike, predictions: npt.ArrayLike, *, weight: npt.ArrayLike | None = None
) -> float:
    """Logloss over that of the share of clicks as constant prediction: comparable across sets, 1
    for knowing the share alone; by `weight` [n]."""
    y = check_clicked(clicked)
    w = check_weight(weight, len(y))
    share = clicks_of(y, w) / (len(y) if w is None else w.sum())
    return logloss(y, predictions, weight=w) / logloss(y, np.full(len(y), share), weight=w)


def ndcg(
    clicked: npt.ArrayLike, predictions: npt.ArrayLike, page: npt.ArrayLike, k: int = 10
) -> GroupMean:
    """Mean over pages with a click of DCG@k / ideal DCG@k, DCG@k = sum of 1 / log2(1 + rank) over
    clicked impressions among the first k.

    Args:
        clicked: [n] bool or 0 and 1.
        predictions: [n] scores.
        page: [n] integers or strings.
    """
    return _page_mean(0, clicked, predictions, page, k)


def mrr(clicked: npt.ArrayLike, predictions: npt.ArrayLike, page: npt.ArrayLike) -> GroupMean:
    """Mean over pages with a click of 1 / rank of the first clicked one; arguments as of `ndcg`."""
    return _page_mean(1, clicked, predictions, page, 1)


def hit_rate(
    clicked: npt.ArrayLike, predictions: npt.ArrayLike, page: npt.ArrayLike, k: int = 10
) -> GroupMean:
    """HR@k: share of pages with a click that have one among the first k; arguments as of `ndcg`."""
    return _page_mean(2, clicked, predictions, page, k)


def _page_mean(
    column: int, clicked: npt.ArrayLike, predictions: npt.ArrayLike, page: npt.ArrayLike, k: int
) -> GroupMean:
    check_k(k)
    y = check_clicked(clicked, both=False)
    p = check_predictions(predictions, len(y))
    code, pages = group_codes(page, len(y), "page")
    by, labels = SortedPredictions.of(p), label_counts(y, code, pages)
    value = page_gains(by.first, by.take(y), by.take(code), labels, k)[column]
    return _group_mean(value, labels[:, 1] > 0, "a click")


def _group_mean(value: Array, weight: Array, what: str) -> GroupMean:
    kept = int(np.count_nonzero(weight))
    if not kept:
        raise ValueError(f"clicked: expected a group with {what}, got none in {len(value)} groups")
    return GroupMean(float(np.average(value, weights=weight)), kept, len(value) - kept)
