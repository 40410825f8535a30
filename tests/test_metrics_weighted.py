"""Metrics of predicted clicks with weights: against scikit-learn, against impressions repeated that
often, and against a bootstrap."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest
import sklearn.metrics as sk
from sklearn.isotonic import IsotonicRegression
from sklearn.linear_model import LogisticRegression
from test_metrics import DESIGNS, Array, bootstrap, impressions

from courier_fast import metrics
from courier_fast.metrics import clicks
from courier_fast.metrics.intervals import Comparison, compare


@pytest.fixture(params=[(None, "f8"), (7, "f4")], ids=["random", "tied float32"])
def data(request: pytest.FixtureRequest) -> tuple[Array, Array, Array, Array]:
    levels, kind = request.param
    clicked, p, group = impressions(levels=levels, kind=kind)
    return clicked, p, group, np.random.default_rng(5).lognormal(0, 1, len(p)).astype("f4")


def test_auc_and_logloss(data: tuple) -> None:
    clicked, p, _, w = data
    exact = w.astype("f8")
    auc = sk.roc_auc_score(clicked, p, sample_weight=exact)
    assert metrics.auc(clicked, p, weight=w) == pytest.approx(auc, rel=1e-12)
    loss = sk.log_loss(clicked, p.astype("f8"), sample_weight=exact)
    assert metrics.logloss(clicked, p, weight=w) == pytest.approx(loss, rel=1e-12)
    share = np.full(len(p), np.average(clicked, weights=exact))
    entropy = sk.log_loss(clicked, share, sample_weight=exact)
    found = metrics.normalised_entropy(clicked, p, weight=w)
    assert found == pytest.approx(loss / entropy, rel=1e-12)
    assert abs(found - metrics.normalised_entropy(clicked, p)) > 1e-3, "weights would not tell"


def test_logloss_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    clicked, p, _ = impressions()
    whole = metrics.logloss(clicked, p, weight=1 + p)
    monkeypatch.setattr(clicks, "BLOCK", 7)
    assert metrics.logloss(clicked, p, weight=1 + p) == pytest.approx(whole, rel=1e-13)


@pytest.mark.parametrize("weighting", ["impressions", "clicks", "users"])
def test_gauc(data: tuple, weighting: str) -> None:
    clicked, p, group, w = data
    value, of_group = [], []
    for g in np.unique(group):
        y, own = clicked[group == g], w[group == g].astype("f8")
        if 0 < y.sum() < len(y):
            value.append(sk.roc_auc_score(y, p[group == g], sample_weight=own))
            of_group.append(
                {"impressions": own.sum(), "clicks": own[y].sum(), "users": 1}[weighting]
            )
    found = metrics.gauc(clicked, p, group, weighting, weight=w)
    assert found.value == pytest.approx(np.average(value, weights=of_group), rel=1e-12)
    assert found.kept == len(value)


def test_recalibration(data: tuple) -> None:
    clicked, p, _, w = data
    found = metrics.calibration(clicked, p, weight=w)
    assert found.pcoc == pytest.approx((w * p).sum(dtype="f8") / w[clicked].sum(dtype="f8"))
    assert sum(b.count for b in found.bins) == pytest.approx(w.sum(dtype="f8"))
    exact, p = w.astype("f8"), p.astype("f8")
    isotonic = IsotonicRegression(out_of_bounds="clip").fit(p, clicked, sample_weight=exact)
    ours = metrics.fit_isotonic(clicked, p, weight=w)(p)
    np.testing.assert_allclose(ours, isotonic.predict(p), atol=1e-12)
    x = np.log(p / (1 - p))[:, None]
    n1, n0 = exact[clicked].sum(), exact[~clicked].sum()
    target = np.where(clicked, (n1 + 1) / (n1 + 2), 1 / (n0 + 2))
    twice = np.concatenate([x, x]), np.repeat([1, 0], len(p))
    both = np.concatenate([target * exact, (1 - target) * exact])
    platt = LogisticRegression(C=np.inf, tol=1e-10).fit(*twice, sample_weight=both)
    ours = metrics.fit_platt(clicked, p, weight=w)(p)
    np.testing.assert_allclose(ours, platt.predict_proba(x)[:, 1], atol=1e-5)


def numbers(found: dict[str, Comparison], but: tuple[str, ...] = ()) -> dict[str, Any]:
    """All numbers by name; counts of impressions left out, and the metrics that begin as one of
    `but`."""
    out: dict[str, Any] = {}
    for name, c in found.items():
        out |= {(name, "entropy"): c.normalised_entropy, (name, "rela_impr"): c.rela_impr or 0.0}
        out |= {(name, "pcoc"): c.calibration.pcoc, (name, "ece"): c.calibration.ece}
        for i, b in enumerate(c.calibration.bins):
            out |= {(name, "bin", i, key): value for key, value in asdict(b).items()}
        for metric, e in c.metrics.items():
            if not metric.startswith(but or ("-",)):
                out |= {
                    (name, metric, key): getattr(e, key) for key in ("value", "low", "high", "se")
                }
                if e.minus_base is not None:
                    out |= {(name, metric, "-", k): v for k, v in asdict(e.minus_base).items()}
    return out


@pytest.mark.parametrize(("levels", "kind"), [(None, "f8"), (7, "f4")])
def test_a_weight_counts_as_so_many_impressions(levels: int | None, kind: str) -> None:
    """Values, intervals, differences, p-values, and the calibration with its bins; but for the
    metrics of pages."""
    clicked, p, user = impressions(levels=levels, kind=kind)
    q, page = np.roll(p, 1), user * 9 + np.arange(len(user)) % 5
    w = np.random.default_rng(1).integers(1, 5, len(p))
    both, at = {"q": q, "p": p}, np.repeat(np.arange(len(p)), w)
    found = compare(clicked, both, user=user, page=page, base="p", weight=w)
    often = compare(
        clicked[at], {n: x[at] for n, x in both.items()}, user=user[at], page=page[at], base="p"
    )
    of_pages = ("ndcg", "mrr", "hr")
    assert numbers(found, of_pages) == pytest.approx(numbers(often, of_pages), rel=1e-9, abs=1e-12)
    once = compare(clicked, both, user=user, page=page, base="p")
    for name, c in found.items():
        for metric, e in c.metrics.items():
            if metric.startswith(of_pages):  # they take no weights
                assert e == once[name].metrics[metric]
            else:
                assert abs(e.value - once[name].metrics[metric].value) > 1e-5
        assert c.auc.kept == len(p)
    # The scale of the weights means nothing, and weights of one are as none.
    third = compare(clicked, both, user=user, page=page, base="p", weight=w / 3)
    scaled = {k: v / 3 if k[-1] == "count" else v for k, v in numbers(found).items()}
    assert numbers(third) == pytest.approx(scaled, rel=1e-9, abs=1e-12)
    ones = compare(clicked, both, user=user, page=page, base="p", weight=np.ones(len(p)))
    assert numbers(ones) == pytest.approx(numbers(once), rel=1e-11, abs=1e-13)


def test_standard_errors_are_those_of_the_bootstrap() -> None:
    clicked, predictions, user = DESIGNS[2].draw(400, 1)
    rng = np.random.default_rng(2)
    w = np.where(clicked, 1, rng.lognormal(0, 1, 400)[user] * rng.integers(1, 4, len(user)))
    found = compare(clicked, predictions, user=user, base="a", weight=w)
    drawn = bootstrap(clicked, predictions, user, 2000, w)
    for i, name in enumerate(("auc", "gauc", "logloss")):
        values = [getattr(found[m], name) for m in ("a", "b")]
        assert [v.se for v in values] == pytest.approx(drawn[:, :, i].std(0), rel=0.05)
        minus = values[1].minus_base
        assert minus.se == pytest.approx((drawn[:, 1, i] - drawn[:, 0, i]).std(), rel=0.05)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1.0, 2.0], r"weight: expected shape \[4\] as clicked, got \[2\]"),
        ([[1.0]] * 4, r"weight: expected shape \[4\] as clicked, got \[4, 1\]"),
        ([1.0, 2.0, 0.0, 1.0], "weight: expected finite numbers above 0, got 0.0 at row 2"),
        ([1.0, -1.0, 0.0, 1.0], "got -1.0 at row 1"),
        ([1.0, np.nan, 1.0, 1.0], "got nan at row 1"),
        ([1.0, 1.0, 1.0, np.inf], "got inf at row 3"),
        (["1", "1", "1", "1"], "weight: expected real numbers, got <U1"),
    ],
)
def test_wrong_weights(weight: Any, message: str) -> None:
    clicked, p, user = [0, 1, 0, 1], [0.1, 0.2, 0.3, 0.4], [0, 0, 1, 1]
    for call in (
        lambda: metrics.auc(clicked, p, weight=weight),
        lambda: metrics.gauc(clicked, p, user, weight=weight),
        lambda: metrics.logloss(clicked, p, weight=weight),
        lambda: metrics.normalised_entropy(clicked, p, weight=weight),
        lambda: metrics.calibration(clicked, p, weight=weight),
        lambda: metrics.fit_isotonic(clicked, p, weight=weight),
        lambda: metrics.fit_platt(clicked, p, weight=weight),
        lambda: compare(clicked, {"a": p}, user=user, weight=weight),
    ):
        with pytest.raises(ValueError, match=message):
            call()
