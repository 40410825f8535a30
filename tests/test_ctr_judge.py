"""The numbers of a CTR table: against definitions written as loops, and intervals against a bootstrap over users."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from courier_fast.evaluate.ctr.judge import by_page, calibrated, holm, judge, plain_auc


def pairs_auc(clicked: np.ndarray, p: np.ndarray) -> float:
    more = p[clicked][:, None] - p[~clicked]
    return float(((more > 0) + 0.5 * (more == 0)).mean())


def simulated(users: int = 150, seed: int = 0) -> tuple[np.ndarray, ...]:
    """Clicks, two related predictions (rounded: ties) and users whose impressions are alike."""
    rng = np.random.default_rng(seed)
    user = np.repeat(np.arange(users), rng.integers(1, 40, users))
    taste = rng.normal(size=users)[user]
    signal = rng.normal(size=len(user))
    clicked = rng.random(len(user)) < 1 / (1 + np.exp(2 - taste - signal))
    noise = rng.normal(size=(2, len(user)))
    good, poor = (1 / (1 + np.exp(2 - 0.8 * signal - 0.5 * noise[i] * (1 + i) - 0.5 * taste)) for i in (0, 1))  # fmt: skip
    return clicked, good.round(2), poor.round(2), user


def test_values_are_their_definitions() -> None:
    clicked, good, poor, user = simulated(40)
    result = judge(clicked, {"none": poor, "x": good}, user)
    for name, p in (("none", poor), ("x", good)):
        found = result[name]
        assert found["auc"]["value"] == pytest.approx(pairs_auc(clicked, p))
        assert plain_auc(clicked, p) == pytest.approx(pairs_auc(clicked, p))
        both = [u for u in np.unique(user) if 0 < clicked[user == u].sum() < (user == u).sum()]
        sizes = [(user == u).sum() for u in both]
        values = [pairs_auc(clicked[user == u], p[user == u]) for u in both]
        assert found["gauc"]["value"] == pytest.approx(np.average(values, weights=sizes))
        q = np.clip(p, 1e-7, 1 - 1e-7)
        loss = -np.log(np.where(clicked, q, 1 - q)).mean()
        assert found["logloss"]["value"] == pytest.approx(loss)
    difference = result["x"]["difference"]["auc"]["value"]
    assert difference == pytest.approx(pairs_auc(clicked, good) - pairs_auc(clicked, poor))
    none = result["none"]["auc"]["value"]
    assert result["x"]["relaimpr"] == pytest.approx(difference / (none - 0.5))


def test_intervals_are_those_of_a_bootstrap_over_users() -> None:
    clicked, good, poor, user = simulated()
    result = judge(clicked, {"none": poor, "x": good}, user)
    rng, draws = np.random.default_rng(1), []
    rows = [np.flatnonzero(user == u) for u in range(150)]
    for _ in range(400):
        chosen = rng.integers(0, 150, 150)
        some = np.concatenate([rows[u] for u in chosen])
        who = np.repeat(np.arange(150), [len(rows[u]) for u in chosen])
        one = judge(clicked[some], {"none": poor[some], "x": good[some]}, who)
        draws.append([one["x"][m]["value"] for m in ("auc", "gauc", "logloss")] + [one["x"]["difference"][m]["value"] for m in ("auc", "gauc", "logloss")])  # fmt: skip
    expected = np.std(draws, 0, ddof=1)
    x = result["x"]
    found = [of[m]["se"] for of in (x, x["difference"]) for m in ("auc", "gauc", "logloss")]
    # 400 draws know a deviation to 3.5 %.
    np.testing.assert_allclose(found, expected, rtol=0.14)
    assert x["mde"] == pytest.approx(2.8 * x["difference"]["auc"]["se"])


def test_the_same_prediction_differs_by_nothing() -> None:
    clicked, good, _, user = simulated(30)
    same = judge(clicked, {"none": good, "x": good}, user)["x"]["difference"]["auc"]
    assert (same["value"], same["low"], same["high"], same["p"]) == (0, 0, 0, 1)


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert holm([]) == []


def test_calibration_bins_have_equal_mass_and_divide_no_tie() -> None:
    rng = np.random.default_rng(0)
    p = rng.random(3000)
    clicked = rng.random(3000) < p**2
    found = calibrated(clicked, p)
    assert [b["impressions"] for b in found["bins"]] == [200] * 15
    parts = np.array_split(np.argsort(p), 15)
    expected = np.mean([abs(p[i].mean() - clicked[i].mean()) for i in parts])
    assert found["ece"] == pytest.approx(expected)
    assert found["ratio"] == pytest.approx(p.sum() / clicked.sum())
    assert len(calibrated(clicked, p.round(1))["bins"]) <= 11
    constant = calibrated(clicked, np.full(3000, 0.25))
    assert len(constant["bins"]) == 1
    assert constant["ece"] == pytest.approx(abs(0.25 - clicked.mean()))


def test_pages_are_means_over_the_orders_of_ties() -> None:
    rng = np.random.default_rng(0)
    sizes = [5, 4, 6, 3, 5]
    page = np.repeat(np.arange(5) * 3, sizes)
    p = rng.integers(0, 3, len(page)) / 4
    clicked = rng.random(len(page)) < 0.4
    clicked[page == 9] = False  # a page without a click does not count
    expected = []
    for one in np.unique(page[clicked]):
        y, q = clicked[page == one], p[page == one]
        found = []
        for order in permutations(range(len(y))):
            ranked = y[sorted(order, key=lambda i: -q[i])]
            gains = 1 / np.log2(np.arange(len(y)) + 2)
            best = gains[:2][: ranked.sum()].sum()
            found.append([gains[:2][ranked[:2]].sum() / best, 1 / (1 + np.flatnonzero(ranked)[0])])
        expected.append(np.mean(found, 0))
    result = by_page(clicked, p, page, k=2)
    np.testing.assert_allclose([result["ndcg@2"], result["mrr"]], np.mean(expected, 0))
