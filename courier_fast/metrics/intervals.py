"""Several predictions of the same clicks: metrics, differences to a base, and intervals that take
users, not impressions, as independent.

A metric's influence h_u says how far user u alone moves it. Then var(metric) = U/(U-1) sum_u h_u^2
over U users, and var(metric of a - metric of b) = U/(U-1) sum_u (h_u^a - h_u^b)^2: what a bootstrap
over users comes to, in closed form. For a mean over groups g with weights w_g, which GAUC, logloss
and the metrics of pages are, h_u = sum_{g of u} w_g (value_g - mean) / sum_g w_g. For AUC
(Obuchowski's DeLong for clusters), with n1 impressions clicked and n0 not, and V_i the share of the
other label's impressions that i is on the right side of, ties one half,

    h_u = sum_{i of u, clicked} (V_i - AUC) / n1  +  sum_{j of u, not clicked} (V_j - AUC) / n0.

An impression of weight w counts as w of them in every sum, share and number above. That other
impressions were left out at random is in these variances, too, as long as that was done for each
user apart.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from scipy.special import stdtr, stdtrit

from . import counts
from .calibration import Calibration, calibration_of
from .counts import (
    SortedPredictions,
    check_clicked,
    check_predictions,
    check_weight,
    group_codes,
    label_counts,
)

Array = npt.NDArray

WEIGHTINGS = ("impressions", "clicks", "users")


@dataclass(frozen=True)
class Difference:
    """A metric minus that of the base, paired by user. `p`: two-sided, by Student's t; `holm`: `p`
    adjusted for the other predictions (Holm 1979)."""

    value: float
    low: float
    high: float
    se: float
    p: float
    holm: float

    @property
    def detectable(self) -> float:
        """The smallest true difference that these users show four times out of five, at the
        two-sided level of 5 %: 2.8 standard errors."""
        return 2.8 * self.se


@dataclass(frozen=True)
class Estimate:
    """A metric with its interval.

    `kept` groups are in it, `dropped` have no value: users, pages or impressions, as `name` says.
    `users` are independent in the interval, which is NaN for fewer than 2.
    """

    name: str
    value: float
    low: float
    high: float
    se: float
    users: int
    kept: int
    dropped: int
    minus_base: Difference | None


@dataclass(frozen=True)
class Comparison:
    """What one of the predictions is worth.

    `metrics` by name: "auc", "gauc[impressions]", "gauc[clicks]", "gauc[users]", "logloss"; with
    pages also "gauc[impressions, page]", "ndcg@10", "mrr", "hr@10". `normalised_entropy`: logloss
    over that of the share of clicks as constant prediction. `rela_impr`: see
    `relative_improvement`; None for the base and without one.
    """

    metrics: dict[str, Estimate]
    calibration: Calibration
    normalised_entropy: float
    rela_impr: float | None

    @property
    def auc(self) -> Estimate:
        return self.metrics["auc"]

    @property
    def gauc(self) -> Estimate:
        """Weighted by impressions."""
        return self.metrics["gauc[impressions]"]

    @property
    def logloss(self) -> Estimate:
        return self.metrics["logloss"]


def compare(
    clicked: npt.ArrayLike,
    predictions: Mapping[str, npt.ArrayLike],
    *,
    user: npt.ArrayLike,
    base: str | None = None,
    page: npt.ArrayLike | None = None,
    weight: npt.ArrayLike | None = None,
    k: int = 10,
    bins: int = 15,
    level: float = 0.95,
) -> dict[str, Comparison]:
    """Every metric of every one of `predictions`, with intervals, and with the differences to the
    one named `base`.

    O(n log n) time for each; memory O(n + users + pages). The predictions that are not the base are
    one table for Holm, metric by metric.

    Args:
        clicked: [n] bool or 0 and 1, both of them.
        predictions: by name [n] probabilities; float32 is sorted several times as fast as float64.
        user: [n] integers or strings, at least 2 different ones.
        page: [n] integers or strings; a page is of one user.
        weight: [n] how many impressions each stands for, finite and above 0; NDCG, MRR and HR take
            none.
        k: of ndcg@k and hr@k.
        bins: of the calibration.
        level: of the intervals, between 0 and 1.

    Raises:
        ValueError: for other lengths, labels or numbers than these, NaN, one label only, or a base
            that is not among the predictions.
    """
    if not predictions:
        raise ValueError("predictions: expected at least one, got none")
    if base is not None and base not in predictions:
        raise ValueError(f"base: expected one of {', '.join(predictions)}, got {base!r}")
    if not 0 < level < 1:
        raise ValueError(f"level: expected a number between 0 and 1, got {level}")
    design = _Design.of(clicked, user, page, weight, k)
    names = list(predictions)
    checked = {
        name: check_predictions(p, len(design.clicked), f"predictions[{name!r}]", probability=True)
        for name, p in predictions.items()
    }
    if base is not None:
        names.insert(0, names.pop(names.index(base)))
    against: dict[str, _Statistic] | None = None
    found: dict[str, Comparison] = {}
    for name in names:
        own, calibrated = design.statistics(checked[name], bins)
        if against is None:
            metrics = {m: s.estimate(m, level, None) for m, s in own.items()}
            rela_impr = None
        else:
            metrics = {m: s.estimate(m, level, against[m]) for m, s in own.items()}
            rela_impr = relative_improvement(own["auc"].value, against["auc"].value)
        entropy = own["logloss"].value / design.entropy
        found[name] = Comparison(metrics, calibrated, entropy, rela_impr)
        if name == base:
            against = own
    return _adjusted({name: found[name] for name in predictions})


def relative_improvement(auc: float, base: float) -> float:
    """RelaImpr = (AUC - 1/2) / (AUC of the base - 1/2) - 1; NaN for a base at 1/2."""
    return (auc - 0.5) / (base - 0.5) - 1 if base != 0.5 else math.nan


def holm(p: Array) -> Array:
    """[m] p-values adjusted by Holm's step-down method; NaN stays NaN and does not count."""
    out = np.full(len(p), math.nan)
    order = np.argsort(p)[: np.count_nonzero(~np.isnan(p))]
    steps = np.arange(len(order), 0, -1)
    out[order] = np.minimum(1.0, np.maximum.accumulate(p[order] * steps))
    return out


def group_auc(pairs: Array, counted: Array, weighting: str) -> tuple[Array, Array]:
    """(AUC [G], weight [G]) from pairs in the right order, doubled, and labels [G, 2]; both 0 for a
    group with one label only."""
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting: expected one of {', '.join(WEIGHTINGS)}, got {weighting!r}")
    product = counted[:, 0] * counted[:, 1]
    both = product > 0
    auc = np.divide(pairs, 2 * product, out=np.zeros(len(pairs)), where=both)
    if weighting == "users":
        return auc, both.astype(np.float64)
    weight = counted.sum(1) if weighting == "impressions" else counted[:, 1]
    return auc, np.where(both, weight, 0).astype(np.float64)


# ---- statistics ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Statistic:
    value: float
    influence: Array  # [users]
    users: int  # with a part in it
    kept: int
    dropped: int

    def se(self, influence: Array) -> float:
        if self.users < 2:
            return math.nan
        return math.sqrt(self.users / (self.users - 1) * float(np.square(influence).sum()))

    def estimate(self, name: str, level: float, base: _Statistic | None) -> Estimate:
        """With Student's t, of a degree less than users: their variance is an estimate, too."""
        se, freedom = self.se(self.influence), max(self.users - 1, 1)
        z = float(stdtrit(freedom, (1 + level) / 2))
        low, high = self.value - z * se, self.value + z * se
        minus = None
        if base is not None:
            d, e = self.value - base.value, self.se(self.influence - base.influence)
            p = 2 * float(stdtr(freedom, -abs(d) / e)) if e else float(d == 0)
            minus = Difference(d, d - z * e, d + z * e, e, p, math.nan)
        return Estimate(name, self.value, low, high, se, self.users, self.kept, self.dropped, minus)


def _mean(value: Array, weight: Array, owner: Array | None = None, users: int = 0) -> _Statistic:
    """The mean of `value` [G] by `weight` [G]; groups of weight 0 are dropped. `owner` [G]: the
    user of each; None: they are the users."""
    total = weight.sum()
    if not total:
        return _Statistic(math.nan, np.full(users or len(value), math.nan), 0, 0, len(value))
    mean = float((weight * value).sum() / total)  # no BLAS: the same bits with any threads
    influence = weight * (value - mean) / total
    kept = clusters = int(np.count_nonzero(weight))
    if owner is not None:
        influence = np.bincount(owner, influence, users)
        clusters = int(np.count_nonzero(np.bincount(owner, weight, users)))
    return _Statistic(mean, influence, clusters, kept, len(value) - kept)


@dataclass(frozen=True)
class _Order:
    """Impressions in the order of one prediction."""

    first: Array
    clicked: Array
    user: Array
    page: Array | None
    weight: Array | None


@dataclass(frozen=True)
class _Design:
    """What does not depend on a prediction."""

    clicked: Array  # [n]
    user: Array  # [n]
    weight: Array | None  # [n]
    by_user: Array  # [U, 2] labels, by weight
    page: Array | None  # [n]
    by_page: Array  # [G, 2] labels, by weight
    on_page: Array  # [G, 2] labels, counted
    owner: Array  # [G] users of the pages
    k: int

    @classmethod
    def of(
        cls,
        clicked: npt.ArrayLike,
        user: npt.ArrayLike,
        page: npt.ArrayLike | None,
        weight: npt.ArrayLike | None,
        k: int,
    ) -> _Design:
        check_k(k)
        y = check_clicked(clicked)
        n = len(y)
        user, users = group_codes(user, n, "user")
        if users < 2:
            raise ValueError(f"user: expected at least 2 users, got {users}")
        w = check_weight(weight, n)
        by_user = label_counts(y, user, users, w)
        if page is None:
            none = np.zeros((0, 2), np.int64)
            return cls(y, user, w, by_user, None, none, none, user[:0], k)
        page, pages = group_codes(page, n, "page")
        owner = np.empty(pages, user.dtype)
        owner[page] = user
        if (owner[page] != user).any():
            row = int(np.argmax(owner[page] != user))
            raise ValueError(
                f"page: expected pages of one user each, got one of several users at row {row}"
            )
        by_page = label_counts(y, page, pages, w)
        on_page = by_page if w is None else label_counts(y, page, pages)
        return cls(y, user, w, by_user, page, by_page, on_page, owner, k)

    @property
    def entropy(self) -> float:
        """Of the label, natural logarithm."""
        q = self.by_user.sum(0) / self.by_user.sum()
        return float(-(q * np.log(q)).sum())

    def statistics(self, p: Array, bins: int) -> tuple[dict[str, _Statistic], Calibration]:
        by = SortedPredictions.of(p)
        page = None if self.page is None else by.take(self.page)
        weight = by.take(self.weight)
        order = _Order(by.first, by.take(self.clicked), by.take(self.user), page, weight)
        calibrated = calibration_of(by, order.clicked, bins, weight)
        del by  # half of the memory
        return {"auc": self.auc(order), **self.means(order, p)}, calibrated

    def auc(self, order: _Order) -> _Statistic:
        users = len(self.by_user)
        pairs = counts.pairs_over_all(order.first, order.clicked, order.user, users, order.weight)
        labels = self.by_user.sum(0)
        # .item(): without weights integers of any size.
        auc = pairs[:, 1].sum().item() / (2 * labels[0].item() * labels[1].item())
        # Of each label: the sum of V_i is half the pairs over how many have the other label.
        influence = ((pairs / (2 * labels[::-1]) - auc * self.by_user) / labels).sum(1)
        return _Statistic(auc, influence, users, len(self.clicked), 0)

    def means(self, order: _Order, p: Array) -> dict[str, _Statistic]:
        users = len(self.by_user)
        weight = order.weight
        pairs = counts.pairs_within(order.first, order.clicked, order.user, users, weight)
        found = {f"gauc[{w}]": _mean(*group_auc(pairs, self.by_user, w)) for w in WEIGHTINGS}
        n = self.by_user.sum(1).astype(np.float64)
        losses = counts.add_losses(self.clicked, p, self.user, users, self.weight)
        loss = _mean(losses / n, n)
        found["logloss"] = replace(loss, kept=len(p))
        if order.page is None:
            return found
        of = (self.owner, users)
        pages = len(self.by_page)
        pairs = counts.pairs_within(order.first, order.clicked, order.page, pages, weight)
        by_page = group_auc(pairs, self.by_page, "impressions")
        found["gauc[impressions, page]"] = _mean(*by_page, *of)
        gains = counts.page_gains(order.first, order.clicked, order.page, self.on_page, self.k)
        some = (self.on_page[:, 1] > 0).astype(np.float64)
        for name, gain in zip((f"ndcg@{self.k}", "mrr", f"hr@{self.k}"), gains, strict=True):
            found[name] = _mean(gain, some, *of)
        return found


def check_k(k: int) -> None:
    if not isinstance(k, (int, np.integer)) or k < 1:
        raise ValueError(f"k: expected an integer of at least 1, got {k!r}")


def _adjusted(found: dict[str, Comparison]) -> dict[str, Comparison]:
    """`found` with Holm's p-values."""
    rows = [c for c in found.values() if c.auc.minus_base is not None]
    for name in rows[0].metrics if rows else ():
        estimates = [c.metrics[name] for c in rows]
        differences = [e.minus_base for e in estimates if e.minus_base is not None]
        adjusted = holm(np.array([d.p for d in differences]))
        for row, estimate, difference, p in zip(
            rows, estimates, differences, adjusted, strict=True
        ):
            row.metrics[name] = replace(estimate, minus_base=replace(difference, holm=float(p)))
    return found
