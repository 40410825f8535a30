"""Metrics of ranks against brute force over ties, the bootstrap over users on known cases."""

from __future__ import annotations

import math
from itertools import permutations

import numpy as np
import pytest

from courier_fast.metrics.ranks import Ranks, bootstrap_means, count_ranks, interval, page_values

# ---- metrics -------------------------------------------------------------------------------------


def ranks_of(*segments: list[float]) -> Ranks:
    offsets = np.cumsum([0, *map(len, segments)])
    return count_ranks(np.array([s for segment in segments for s in segment]), offsets)


def in_all_orders(scores: list[float]) -> list[int]:
    """The first score's rank in every order of the candidates, sorted by a stable sort: all ways to
    break ties."""
    found = []
    for order in permutations(range(len(scores))):
        ranked = sorted(order, key=lambda i: -scores[i])
        found.append(ranked.index(0) + 1)
    return found


@pytest.mark.parametrize(
    "scores",
    [
        [3, 1, 2],
        [1, 3, 2, 1],
        [2, 2, 2, 2, 2],
        [1, 2, 1, 1, 0, 2],
        [0, 5, 5, 0],
        [7],
        [0.1, 0.1],
    ],
)
def test_metrics_are_expectations_over_tie_breaking(scores: list[float]) -> None:
    ranks, all_ranks = ranks_of(scores), np.array(in_all_orders(scores))
    assert ranks.expected_rank()[0] == pytest.approx(all_ranks.mean())
    assert ranks.reciprocal()[0] == pytest.approx((1 / all_ranks).mean())
    for k in range(1, len(scores) + 2):
        assert ranks.hit(k)[0] == pytest.approx((all_ranks <= k).mean())
    if len(scores) > 1:
        pairs = [(scores[0] > s) + 0.5 * (scores[0] == s) for s in scores[1:]]
        assert ranks.auc()[0] == pytest.approx(np.mean(pairs))
    else:
        assert math.isnan(ranks.auc()[0])


def test_nan_is_last_and_ties_with_nan() -> None:
    nan = math.nan
    ranks = ranks_of([nan, 1.0, nan, -np.inf], [0.0, nan, nan], [nan, nan])
    assert ranks.above.tolist() == [0 + 1, 0, 0]
    assert ranks.tied.tolist() == [2, 0, 1]
    assert ranks.others.tolist() == [3, 2, 1]


@pytest.mark.parametrize("offsets", [[0, 2, 2, 3], [0, 2], [1, 3]])
def test_segments_must_cover_the_scores(offsets: list[int]) -> None:
    with pytest.raises(ValueError, match="offsets: expected"):
        count_ranks(np.zeros(3), np.array(offsets))


def test_a_page_is_the_mean_of_its_clicks() -> None:
    ranks = ranks_of([3, 1, 2], [1, 1, 2], [5, 0])  # two clicks on page 0, one on page 1
    values = page_values(ranks, np.array([0, 0, 1]), 2, (1,))
    assert values["HR@1"].tolist() == [0.5, 1.0]
    assert values["AUC"].tolist() == [(1 + 0.25) / 2, 1.0]
    assert values["MRR"][0] == pytest.approx((1 + (1 / 2 + 1 / 3) / 2) / 2)
    assert np.isnan(page_values(ranks_of([1, 0]), np.array([1]), 2, (1,))["MRR"][0])


# ---- bootstrap -----------------------------------------------------------------------------------


def test_bootstrap_draws_users_with_all_their_pages() -> None:
    rng = np.random.default_rng(0)
    user = rng.integers(0, 5, 30) * 7  # any integers
    values = rng.random((30, 2))
    found = bootstrap_means(values, user, samples=4, seed=3)
    draws = np.random.default_rng(3)
    names = np.unique(user)
    for row in found:
        drawn = draws.integers(0, len(names), len(names))
        pages = np.concatenate([np.flatnonzero(user == names[u]) for u in drawn])
        np.testing.assert_allclose(row, values[pages].mean(0))


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered, runs = 0, 200
    user = np.repeat(np.arange(80), 3)
    for run in range(runs):
        effect = rng.normal(0.5, 1, 80)  # pages of a user are alike
        values = effect[user] + rng.normal(0, 0.2, len(user))
        low, high = interval(bootstrap_means(values[:, None], user, samples=300, seed=run))
        covered += bool(low[0] <= 0.5 <= high[0])
    assert abs(covered / runs - 0.95) < 4 * math.sqrt(0.95 * 0.05 / runs)


def width(values: np.ndarray, user: np.ndarray) -> float:
    low, high = interval(bootstrap_means(values[:, None], user, samples=1000))
    return float(high[0] - low[0])


def test_interval_width_falls_with_the_square_root_of_users_not_pages() -> None:
    rng = np.random.default_rng(2)
    effect = rng.normal(size=3200)
    once, many = np.arange(200), np.arange(3200)
    base = width(effect[:200], once)
    assert width(effect, many) == pytest.approx(base / 4, rel=0.2)
    # Sixteen identical pages of each user are no new evidence.
    assert width(np.repeat(effect[:200], 16), np.repeat(once, 16)) == pytest.approx(base, rel=1e-9)


def test_paired_difference_is_narrower_than_unpaired() -> None:
    rng = np.random.default_rng(3)
    a = rng.normal(size=500)
    b = a + rng.normal(0.1, 0.1, size=500)
    user = np.arange(500)
    samples = bootstrap_means(np.stack([a, b], 1), user, samples=1000)
    low, high = interval(samples[:, 1] - samples[:, 0])
    unpaired = math.hypot(width(a, user), width(b, user))
    assert high - low < 0.2 * unpaired
    assert low < 0.1 < high and low > 0


@pytest.mark.parametrize(
    ("values", "user", "samples", "message"),
    [
        (np.zeros((3, 1)), np.zeros(2, int), 5, "expected values"),
        (np.zeros((0, 1)), np.zeros(0, int), 5, "expected values"),
        (np.zeros(3), np.zeros(3, int), 5, "expected values"),
        (np.zeros((3, 1)), np.zeros(3, int), 0, "samples: expected at least 1"),
    ],
)
def test_bootstrap_refuses(
    values: np.ndarray, user: np.ndarray, samples: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_means(values, user, samples=samples)
