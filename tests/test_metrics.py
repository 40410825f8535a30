"""Metrics of predicted clicks against scikit-learn, torchmetrics, ranx and all orders of ties;
intervals against a bootstrap and by coverage."""

from __future__ import annotations

import dataclasses
import json
import math
import tracemalloc
import warnings
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
import torch
from scipy.stats import t
from sklearn.calibration import calibration_curve
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from torchmetrics.functional.classification import binary_auroc
from torchmetrics.functional.retrieval import (
    retrieval_hit_rate,
    retrieval_normalized_dcg,
    retrieval_reciprocal_rank,
)

from courier_fast import metrics
from courier_fast.metrics import clicks
from courier_fast.metrics.counts import SortedPredictions
from courier_fast.metrics.intervals import compare

Array = np.ndarray


def impressions(
    seed: int = 0, *, n: int = 2000, groups: int = 60, levels: int | None = None, kind: Any = "f8"
) -> tuple[Array, Array, Array]:
    """Labels, predictions (with `levels` different ones, else all different) and groups, some of
    which have one label only."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, groups, n)
    p = rng.random(n).clip(0.001, 0.999)
    clicked = rng.random(n) < 0.6 * p * (group > groups // 6)
    if levels:
        p = (np.ceil(p * levels) - 0.5) / levels
    return clicked, p.astype(kind), group


@pytest.fixture(
    params=[(None, "f8"), (None, "f4"), (7, "f8"), (7, "f4"), (1, "f4")],
    ids=["random", "random float32", "tied", "tied float32", "constant"],
)
def data(request: pytest.FixtureRequest) -> tuple[Array, Array, Array]:
    levels, kind = request.param
    return impressions(levels=levels, kind=kind)


# ---- values --------------------------------------------------------------------------------------


def test_auc(data: tuple) -> None:
    clicked, p, _ = data
    assert metrics.auc(clicked, p) == pytest.approx(sk.roc_auc_score(clicked, p), rel=1e-12)
    theirs = binary_auroc(torch.from_numpy(p), torch.from_numpy(clicked).long())
    assert metrics.auc(clicked, p) == pytest.approx(float(theirs), abs=1e-6)


@pytest.mark.parametrize("kind", ["f2", "f4", "f8", "i8"])
def test_scores_of_any_sign_and_type(kind: str) -> None:
    rng = np.random.default_rng(1)
    scores = np.round(rng.normal(size=500) * 4).astype(kind)
    scores[:50] *= -1  # zeros of both signs
    clicked = rng.random(500) < 0.3
    assert metrics.auc(clicked, scores) == pytest.approx(sk.roc_auc_score(clicked, scores))
    wide = np.concatenate([[-np.inf, np.inf], rng.normal(size=498) * 10.0 ** rng.integers(-40, 38)])
    order = SortedPredictions.of(wide.astype("f4"))
    np.testing.assert_array_equal(order.p, np.sort(wide.astype("f4")))
    np.testing.assert_array_equal(wide.astype("f4")[order.order], order.p)


@pytest.mark.parametrize("weighting", ["impressions", "clicks", "users"])
def test_gauc(data: tuple, weighting: str) -> None:
    clicked, p, group = data
    value, weight = [], []
    for g in np.unique(group):
        y = clicked[group == g]
        if 0 < y.sum() < len(y):
            value.append(sk.roc_auc_score(y, p[group == g]))
            weight.append({"impressions": len(y), "clicks": y.sum(), "users": 1}[weighting])
    found = metrics.gauc(clicked, p, group, weighting)
    assert found.value == pytest.approx(np.average(value, weights=weight), rel=1e-12)
    assert (found.kept, found.dropped) == (len(value), 60 - len(value))
    assert found.dropped >= 10
    # The same under other names and in another order.
    order = np.random.default_rng(2).permutation(len(p))
    for names in (group * 10**12 - 5, group.astype("U"), group.astype(np.int8)):
        other = metrics.gauc(clicked[order], p[order], names[order], weighting)
        assert other.value == pytest.approx(found.value, rel=1e-13)
        assert (other.kept, other.dropped) == (found.kept, found.dropped)


def test_logloss(data: tuple) -> None:
    clicked, p, _ = data
    expected = sk.log_loss(clicked, p.astype("f8"))
    assert metrics.logloss(clicked, p) == pytest.approx(expected, rel=1e-12)
    constant = sk.log_loss(clicked, np.full(len(p), clicked.mean()))
    assert metrics.normalised_entropy(clicked, p) == pytest.approx(expected / constant, rel=1e-12)


def test_logloss_of_the_impossible_is_finite() -> None:
    assert metrics.logloss([1, 0], [0.0, 0.0]) == pytest.approx(-math.log(1e-7) / 2)


def test_logloss_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clicked, p, _ = impressions()
    whole = metrics.logloss(clicked, p)
    monkeypatch.setattr(clicks, "BLOCK", 7)
    assert metrics.logloss(clicked, p) == pytest.approx(whole, rel=1e-13)


def test_page_metrics_by_libraries() -> None:
    """Every page by torchmetrics; NDCG by scikit-learn too, which averages over ties as well."""
    clicked, p, page = impressions(3, n=900)
    found: dict[str, list] = {"ndcg": [], "mrr": [], "hr": [], "sk": []}
    for g in np.unique(page[clicked]):
        y, s = clicked[page == g], p[page == g]
        one = torch.from_numpy(s), torch.from_numpy(y)
        found["ndcg"].append(retrieval_normalized_dcg(one[0], one[1].long(), top_k=4))
        found["mrr"].append(retrieval_reciprocal_rank(*one))
        found["hr"].append(retrieval_hit_rate(*one, top_k=4))
        found["sk"].append(sk.ndcg_score([y], [s], k=4))
    kept = len(found["mrr"])
    ours = metrics.ndcg(clicked, p, page, 4)
    assert ours.value == pytest.approx(np.mean(found["ndcg"]), abs=1e-6)
    assert ours.value == pytest.approx(np.mean(found["sk"]), rel=1e-12)
    assert (ours.kept, ours.dropped) == (kept, 60 - kept)
    assert metrics.mrr(clicked, p, page).value == pytest.approx(np.mean(found["mrr"]), abs=1e-6)
    assert metrics.hit_rate(clicked, p, page, 4).value == pytest.approx(np.mean(found["hr"]))


def test_page_metrics_by_ranx() -> None:
    """Where it is installed (`pip install ranx`): its compilation takes longer than all other tests
    here, and torchmetrics says the same."""
    pytest.importorskip("ranx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its compiler's
        from ranx.metrics import hit_rate, ndcg, reciprocal_rank
    rng = np.random.default_rng(4)
    scores = rng.random((40, 12))
    clicked = rng.random((40, 12)) < 0.2
    clicked[:, 0] |= ~clicked.any(1)
    items = np.broadcast_to(np.arange(12.0), scores.shape)
    qrels, run = (  # both of ranx's are sorted
        np.stack([np.take_along_axis(a, np.argsort(-v, 1), 1) for a in (items, v)], 2)
        for v in (clicked.astype(float), scores)
    )
    rows = clicked.ravel(), scores.ravel(), np.repeat(np.arange(40), 12)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = [f(qrels, run, 5, 1).mean() for f in (ndcg, hit_rate)]
        theirs.append(reciprocal_rank(qrels, run, 0, 1).mean())
    ours = [metrics.ndcg(*rows, 5), metrics.hit_rate(*rows, 5), metrics.mrr(*rows)]
    assert [m.value for m in ours] == pytest.approx(theirs, rel=1e-12)


def test_ndcg_of_ties_is_that_of_scikit_learn() -> None:
    clicked, p, page = impressions(5, levels=4)
    for k in (1, 3, 10, 1000):
        each = [
            sk.ndcg_score([clicked[page == g]], [p[page == g]], k=k)
            for g in np.unique(page[clicked])
        ]
        assert metrics.ndcg(clicked, p, page, k).value == pytest.approx(np.mean(each), rel=1e-12)


@pytest.mark.parametrize("k", [1, 2, 4, 6, 9])
def test_page_metrics_are_means_over_all_orders_of_ties(k: int) -> None:
    rng = np.random.default_rng(k)
    for levels in (1, 2, 3):
        scores, clicked = rng.integers(0, levels, 6), rng.random(6) < 0.4
        clicked[rng.integers(6)] = True
        totals = []
        for order in permutations(range(6)):
            y = clicked[sorted(order, key=lambda i: -scores[i])]  # stable: all ways to break ties
            gains = y / np.log2(np.arange(2, 8))
            ideal = np.sort(y)[::-1] / np.log2(np.arange(2, 8))
            rank = int(np.argmax(y)) + 1
            totals.append([gains[:k].sum() / ideal[:k].sum(), 1 / rank, rank <= k])
        rows = clicked, scores, np.zeros(6, int)
        ours = metrics.ndcg(*rows, k), metrics.mrr(*rows), metrics.hit_rate(*rows, k)
        assert [m.value for m in ours] == pytest.approx(np.mean(totals, 0), rel=1e-12)


# ---- calibration ---------------------------------------------------------------------------------


def test_calibration_of_different_predictions() -> None:
    clicked, p, _ = impressions(n=1500)
    found = metrics.calibration(clicked, p)
    assert [b.count for b in found.bins] == [100] * 15
    observed, predicted = calibration_curve(clicked, p, n_bins=15, strategy="quantile")
    np.testing.assert_allclose([b.observed for b in found.bins], observed, rtol=1e-12)
    np.testing.assert_allclose([b.predicted for b in found.bins], predicted, rtol=1e-12)
    assert found.ece == pytest.approx(np.abs(observed - predicted).mean(), rel=1e-12)
    assert found.pcoc == pytest.approx(p.sum() / clicked.sum(), rel=1e-12)


@pytest.mark.parametrize("levels", [1, 2, 7, 40])
@pytest.mark.parametrize("bins", [1, 15, 300])
def test_bins_of_ties(levels: int, bins: int) -> None:
    """No two bins share a prediction; every level is in the bin of its middle place."""
    clicked, p, _ = impressions(levels=levels, n=200)
    found = metrics.calibration(clicked, p, bins=bins)
    expected: dict[int, list[float]] = {}
    for level in np.unique(p):
        middle = ((p < level).sum() + (p <= level).sum()) / 2
        expected.setdefault(math.ceil(middle / 200 * bins) - 1, []).append(level)
    assert len(found.bins) == len(expected)
    ece = 0.0
    for found_bin, inside in zip(found.bins, expected.values(), strict=True):
        rows = np.isin(p, inside)
        assert (found_bin.low, found_bin.high) == (min(inside), max(inside))
        assert found_bin.count == rows.sum()
        assert found_bin.observed == pytest.approx(clicked[rows].mean())
        ece += rows.mean() * abs(clicked[rows].mean() - p[rows].mean())
    assert found.ece == pytest.approx(ece, rel=1e-12)


@pytest.mark.parametrize("levels", [None, 9, 1])
def test_isotonic_is_that_of_scikit_learn(levels: int | None) -> None:
    clicked, p, _ = impressions(levels=levels)
    other = np.random.default_rng(6).random(500)
    theirs = IsotonicRegression(out_of_bounds="clip").fit(p, clicked)
    ours = metrics.fit_isotonic(clicked, p)
    np.testing.assert_allclose(ours(other), theirs.predict(other), atol=1e-12)
    np.testing.assert_allclose(ours(p), theirs.predict(p), atol=1e-12)
    # By its definition it is calibrated where it was fitted.
    assert metrics.calibration(clicked, ours(p)).ece < 1e-12


@pytest.mark.parametrize("levels", [None, 2])
def test_platt_is_a_logistic_regression(levels: int | None) -> None:
    clicked, p, _ = impressions(levels=levels)
    x = np.log(p / (1 - p))[:, None]
    n1 = clicked.sum()
    target = np.where(clicked, (n1 + 1) / (n1 + 2), 1 / (len(p) - n1 + 2))
    twice = np.concatenate([x, x]), np.repeat([1, 0], len(p))
    weight = np.concatenate([target, 1 - target])
    theirs = LogisticRegression(C=np.inf, tol=1e-10).fit(*twice, sample_weight=weight)
    ours = metrics.fit_platt(clicked, p)
    assert ours.slope == pytest.approx(theirs.coef_[0, 0], abs=1e-5)
    assert ours.intercept == pytest.approx(theirs.intercept_[0], abs=1e-5)
    np.testing.assert_allclose(ours(p), theirs.predict_proba(x)[:, 1], atol=1e-5)


def test_platt_of_separable_and_of_constant_predictions() -> None:
    clicked = np.repeat([0, 1], 50)
    found = metrics.fit_platt(clicked, np.repeat([0.2, 0.9], 50))
    np.testing.assert_allclose(found([0.2, 0.9]), [1 / 52, 51 / 52], rtol=1e-6)
    constant = metrics.fit_platt(clicked, np.full(100, 0.01))
    np.testing.assert_allclose(constant([0.01]), [0.5], rtol=1e-9)
    extreme = metrics.fit_platt(clicked, np.repeat([0.0, 1.0], 50))
    np.testing.assert_allclose(extreme([0.0, 1.0]), [1 / 52, 51 / 52], rtol=1e-6)


# ---- intervals -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Design:
    """Simulated users: how many impressions each, how far they differ in what they click and in
    what is predicted for them."""

    impressions: float
    spread: float  # of the users' own log-odds
    noise: float  # of the predictions of `b`; those of `a` have half of it in common with them
    levels: int | None = None

    def draw(self, users: int, seed: int) -> tuple[Array, dict[str, Array], Array]:
        rng = np.random.default_rng(seed)
        user = np.repeat(np.arange(users), 1 + rng.geometric(1 / self.impressions, users))
        n = len(user)
        skill = rng.lognormal(0, self.spread / 2, users)[user]
        taste = skill * rng.normal(size=n)
        z = -1 + self.spread * rng.normal(size=users)[user] + taste
        clicked = rng.random(n) < 1 / (1 + np.exp(-z))
        common, own = rng.normal(size=(2, n)) * self.noise
        a = 1 / (1 + np.exp(1 - 0.5 * taste - 0.7 * common - 0.7 * own))
        b = 1 / (1 + np.exp(1 - 0.6 * taste - common))
        if self.levels:
            a, b = ((np.floor(p * self.levels) + 0.5) / self.levels for p in (a, b))
        return clicked, {"a": a, "b": b}, user


DESIGNS = [Design(20, 0.3, 0.5), Design(8, 1.0, 0.3), Design(30, 0.6, 0.8, levels=6)]


def bootstrap(
    clicked: Array, predictions: dict[str, Array], user: Array, draws: int, own: Array | None = None
) -> Array:
    """[draws, 2, 3]: AUC, GAUC and logloss of both predictions, for as many users as there are,
    drawn with replacement.

    `own` [n]: weights of the impressions.
    """
    own = np.ones(len(user)) if own is None else own
    users = int(user[-1]) + 1
    rng = np.random.default_rng(0)
    weight = rng.multinomial(users, np.full(users, 1 / users), draws).astype(float)
    size = np.bincount(user, own)
    out = np.empty((draws, 2, 3))
    for m, p in enumerate(predictions.values()):
        order = np.argsort(p)
        runs = np.flatnonzero(np.diff(p[order], prepend=-1))
        y, u, mine = clicked[order], user[order], own[order]
        for d in range(draws):
            w = weight[d, u] * mine
            no = np.add.reduceat(w * ~y, runs)
            yes = np.add.reduceat(w * y, runs)
            right = (yes * (np.cumsum(no) - no / 2)).sum()
            out[d, m, 0] = right / (yes.sum() * no.sum())
        of_user = [user == i for i in range(users)]
        both = [clicked[i].any() and not clicked[i].all() for i in of_user]
        each = [
            metrics.auc(clicked[i], p[i], weight=own[i]) if some else 0.0
            for i, some in zip(of_user, both, strict=True)
        ]
        kept = size * np.array(both)
        out[:, m, 1] = weight @ (kept * np.array(each)) / (weight @ kept)
        loss = np.bincount(user, -own * np.log(np.where(clicked, p, 1 - p)))
        out[:, m, 2] = weight @ loss / (weight @ size)
    return out


@pytest.mark.parametrize("design", DESIGNS, ids=["even", "uneven", "tied"])
def test_standard_errors_are_those_of_the_bootstrap(design: Design) -> None:
    clicked, predictions, user = design.draw(400, 1)
    found = compare(clicked, predictions, user=user, base="a")
    drawn = bootstrap(clicked, predictions, user, 2000)
    for i, name in enumerate(("auc", "gauc", "logloss")):
        values = [getattr(found[m], name) for m in ("a", "b")]
        assert [v.se for v in values] == pytest.approx(drawn[:, :, i].std(0), rel=0.05)
        minus = values[1].minus_base
        assert minus is not None and values[0].minus_base is None
        assert minus.value == values[1].value - values[0].value
        assert minus.se == pytest.approx((drawn[:, 1, i] - drawn[:, 0, i]).std(), rel=0.05)
        assert minus.se < 0.95 * math.hypot(*(v.se for v in values))  # paired


def test_impressions_of_a_user_are_not_independent() -> None:
    """Every impression eight times: the interval stays what it was."""
    clicked, predictions, user = DESIGNS[0].draw(300, 2)
    once = compare(clicked, predictions, user=user, base="a")["b"]
    often = compare(
        np.repeat(clicked, 8),
        {name: np.repeat(p, 8) for name, p in predictions.items()},
        user=np.repeat(user, 8),
        base="a",
    )["b"]
    for name in ("auc", "logloss", "gauc[users]"):
        a, b = once.metrics[name], often.metrics[name]
        assert b.se == pytest.approx(a.se, rel=1e-9)
        assert b.minus_base is not None and a.minus_base is not None
        assert b.minus_base.se == pytest.approx(a.minus_base.se, rel=1e-9)


@pytest.mark.parametrize("design", [DESIGNS[1]], ids=["uneven"])
def test_coverage(design: Design) -> None:
    """The 95 % interval holds the value of all users that there could be in 93 to 97 of 100 samples
    of 150 of them."""
    clicked, predictions, user = design.draw(100_000, 3)
    truth = compare(clicked, predictions, user=user, base="a")
    names = ("auc", "gauc", "logloss")
    held = np.zeros((2, 3))
    for repetition in range(500):
        clicked, predictions, user = design.draw(150, 1000 + repetition)
        found = compare(clicked, predictions, user=user, base="a")["b"]
        for i, name in enumerate(names):
            one, true = getattr(found, name), getattr(truth["b"], name)
            held[0, i] += one.low <= true.value <= one.high
            held[1, i] += one.minus_base.low <= true.minus_base.value <= one.minus_base.high
    assert ((held / 500 >= 0.93) & (held / 500 <= 0.97)).all(), held / 500


def test_intervals_of_pages_are_those_of_the_bootstrap() -> None:
    clicked, predictions, user = DESIGNS[1].draw(400, 4)
    rng = np.random.default_rng(0)
    page = user * 1000 + np.sort(rng.integers(0, 3, len(user)))
    found = compare(clicked, predictions, user=user, page=page, base="a", k=3)
    kept = np.unique(page[clicked])
    rows = [page == g for g in kept]
    owner = np.array([user[r][0] for r in rows])
    for name, function in (("ndcg@3", metrics.ndcg), ("hr@3", metrics.hit_rate)):
        each = [
            [function(clicked[r], p[r], page[r], 3).value for r in rows]
            for p in predictions.values()
        ]
        drawn = metrics.bootstrap_means(np.array(each).T, owner, samples=2000)
        b = found["b"].metrics[name]
        assert (b.kept, b.dropped) == (len(kept), len(np.unique(page)) - len(kept))
        assert b.users == len(np.unique(owner))
        assert b.se == pytest.approx(drawn[:, 1].std(), rel=0.05)
        assert b.minus_base is not None
        assert b.minus_base.se == pytest.approx((drawn[:, 1] - drawn[:, 0]).std(), rel=0.05)


def test_comparison_has_the_values_of_the_functions() -> None:
    clicked, p, user = impressions(levels=50)
    page = user * 7 + np.arange(len(user)) % 4  # numbered with gaps
    q = np.roll(p, 1).astype("f4")
    found = compare(clicked, {"q": q, "p": p}, user=user, page=page, base="p", k=5)
    assert list(found) == ["q", "p"]
    for name, one in (("p", p), ("q", q)):
        c = found[name]
        assert c.auc.value == pytest.approx(metrics.auc(clicked, one), rel=1e-13)
        assert c.logloss.value == pytest.approx(metrics.logloss(clicked, one), rel=1e-13)
        entropy = metrics.normalised_entropy(clicked, one)
        assert c.normalised_entropy == pytest.approx(entropy, rel=1e-13)
        assert c.calibration == metrics.calibration(clicked, one)
        groups = {
            f"gauc[{w}]": metrics.gauc(clicked, one, user, w)
            for w in ("impressions", "clicks", "users")
        }
        groups |= {
            "gauc[impressions, page]": metrics.gauc(clicked, one, page),
            "ndcg@5": metrics.ndcg(clicked, one, page, 5),
            "mrr": metrics.mrr(clicked, one, page),
            "hr@5": metrics.hit_rate(clicked, one, page, 5),
        }
        for metric, expected in groups.items():
            e = c.metrics[metric]
            assert e.value == pytest.approx(expected.value, rel=1e-13)
            assert (e.kept, e.dropped) == (expected.kept, expected.dropped)
        assert set(c.metrics) == {"auc", "logloss", *groups}
        assert all(e.name == metric for metric, e in c.metrics.items())
        assert c.gauc.users == c.gauc.kept == groups["gauc[users]"].kept
        assert (c.auc.users, c.auc.kept) == (60, len(p))
    assert found["p"].rela_impr is None
    expected = (found["q"].auc.value - 0.5) / (found["p"].auc.value - 0.5) - 1
    assert found["q"].rela_impr == pytest.approx(expected)
    assert json.loads(json.dumps(dataclasses.asdict(found["q"])))["metrics"]["auc"]["users"] == 60


def test_intervals_widen_with_the_level_and_detectable_is_in_the_unit_of_the_metric() -> None:
    clicked, predictions, user = DESIGNS[0].draw(100, 5)
    e, wide = (
        compare(clicked, predictions, user=user, base="a", level=level)["b"].auc
        for level in (0.95, 0.99)
    )
    assert (e.high - e.low) / e.se == pytest.approx(2 * t.ppf(0.975, 99), rel=1e-9)
    d = e.minus_base
    assert d is not None and d.p == pytest.approx(2 * t.sf(abs(d.value) / d.se, 99), rel=1e-9)
    assert (wide.high - wide.low) / e.se == pytest.approx(2 * t.ppf(0.995, 99), rel=1e-9)
    assert d.detectable == pytest.approx(2.8 * d.se)


def test_same_predictions_differ_by_nothing() -> None:
    clicked, p, user = impressions()
    found = compare(clicked, {"none": p, "again": p.copy()}, user=user, base="none")["again"]
    for e in found.metrics.values():
        d = e.minus_base
        assert d is not None
        assert (d.value, d.low, d.high, d.se, d.p, d.holm) == (0, 0, 0, 0, 1, 1)


def test_holm() -> None:
    adjusted = metrics.holm(np.array([0.04, 0.01, math.nan, 0.03, 0.5]))
    np.testing.assert_allclose(adjusted, [0.09, 0.04, math.nan, 0.09, 0.5])
    rng = np.random.default_rng(7)
    clicked, p, user = impressions()
    others = {f"f{i}": np.clip(p + rng.normal(0, 0.02 * i, len(p)), 0, 1) for i in range(1, 5)}
    found = compare(clicked, {**others, "none": p}, user=user, base="none")
    for metric in ("auc", "logloss"):
        minus = [found[name].metrics[metric].minus_base for name in others]
        assert found["none"].metrics[metric].minus_base is None
        raw = np.array([d.p for d in minus if d is not None])
        assert [d.holm for d in minus if d is not None] == pytest.approx(metrics.holm(raw))


def test_without_a_base_and_without_a_user_of_both_labels() -> None:
    found = compare([1, 1, 0, 0], {"m": [0.9, 0.8, 0.3, 0.4]}, user=["a", "a", "b", "b"])["m"]
    assert found.auc.value == 1 and found.auc.minus_base is None
    assert (found.gauc.kept, found.gauc.dropped) == (0, 2)
    assert math.isnan(found.gauc.value) and math.isnan(found.gauc.low)
    one = compare([1, 0, 0, 0], {"m": [0.9, 0.8, 0.3, 0.4]}, user=[1, 1, 2, 2])["m"].gauc
    assert (one.value, one.kept, one.dropped) == (1, 1, 1) and math.isnan(one.se)


def test_memory_is_linear_in_impressions_with_as_many_users_and_pages() -> None:
    def peak(n: int) -> int:
        rng = np.random.default_rng(0)
        clicked, p = rng.random(n) < 0.2, rng.random((2, n), np.float32)
        user = np.arange(n) // 2
        page = np.arange(n) // 2
        tracemalloc.start()
        compare(clicked, {"a": p[0], "b": p[1]}, user=user, page=page, base="a")
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return most

    peak(100)
    small, large = peak(50_000), peak(200_000)
    assert large < 4.2 * small
    assert large < 200_000 * 200


# ---- refusals ------------------------------------------------------------------------------------

OK = np.array([0.1, 0.2, 0.3, 0.4])
LABELS, USERS = [0, 1, 0, 1], [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: metrics.auc([], []), r"clicked: expected \[n\] labels, n at least 1"),
        (lambda: metrics.auc([[0, 1]], OK), r"clicked: expected \[n\] labels.*\[1, 2\]"),
        (lambda: metrics.auc([0, 1, 2, 1], OK), "clicked: expected only 0 and 1, got 2 at row 2"),
        (lambda: metrics.auc([0.0, math.nan, 0, 1], OK), "only 0 and 1, got nan at row 1"),
        (lambda: metrics.auc([0, 0, 0, 0], OK), "clicked: expected both labels, got 4 times 0"),
        (lambda: metrics.auc([True] * 4, OK), "clicked: expected both labels, got 4 times 1"),
        (lambda: metrics.auc(LABELS, OK[:3]), r"predictions: expected shape \[4\].*got \[3\]"),
        (lambda: metrics.auc(LABELS, ["a"] * 4), "predictions: expected real numbers"),
        (lambda: metrics.auc(LABELS, [0.1, math.nan, 0, math.nan]), "got 2 times NaN"),
        (lambda: metrics.logloss(LABELS, OK * 4), r"expected probabilities in \[0, 1\], got 0.4"),
        (lambda: metrics.logloss(LABELS, OK - 0.2), r"probabilities in \[0, 1\], got -0.1"),
        (lambda: metrics.calibration(LABELS, OK * 4), r"probabilities in \[0, 1\]"),
        (lambda: metrics.calibration(LABELS, OK, bins=0), "bins: expected at least 1, got 0"),
        (lambda: metrics.calibration([0] * 4, OK), "clicked: expected at least one click"),
        (lambda: metrics.gauc(LABELS, OK, USERS[:2]), r"group: expected shape \[4\].*got \[2\]"),
        (lambda: metrics.gauc(LABELS, OK, OK), "group: expected integers or strings, got float64"),
        (lambda: metrics.gauc(LABELS, OK, USERS, "user"), "weighting: expected one of impressions"),
        (lambda: metrics.gauc(LABELS, OK, [1, 2, 3, 4]), "a group with both labels, got none in 4"),
        (lambda: metrics.ndcg(LABELS, OK, USERS, -1), "k: expected an integer of at least 1"),
        (lambda: metrics.hit_rate(LABELS, OK, USERS, 0), "k: expected an integer.*got 0"),
        (lambda: metrics.mrr([0] * 4, OK, USERS), "a group with a click, got none in 2"),
        (lambda: metrics.fit_platt([1] * 4, OK), "clicked: expected both labels"),
        (lambda: metrics.fit_isotonic(LABELS, OK * 4), r"probabilities in \[0, 1\]"),
        (lambda: compare(LABELS, {}, user=USERS), "predictions: expected at least one"),
        (lambda: compare(LABELS, {"m": OK[1:]}, user=USERS), r"predictions\['m'\]: expected shape"),
        (lambda: compare(LABELS, {"m": OK * 4}, user=USERS), r"predictions\['m'\]: .*\[0, 1\]"),
        (lambda: compare(LABELS, {"m": OK}, user=USERS, base="n"), "base: expected one of m"),
        (lambda: compare(LABELS, {"m": OK}, user=USERS[1:]), r"user: expected shape \[4\]"),
        (lambda: compare(LABELS, {"m": OK}, user=[1] * 4), "user: expected at least 2 users"),
        (lambda: compare(LABELS, {"m": OK}, user=USERS, page=[1] * 4), "page: expected pages of"),
        (lambda: compare(LABELS, {"m": OK}, user=USERS, level=95), "level: expected a number"),
        (lambda: compare(LABELS, {"m": OK}, user=USERS, k=0), "k: expected an integer"),
        (lambda: compare([1] * 4, {"m": OK}, user=USERS), "clicked: expected both labels"),
    ],
)
def test_refusals(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
