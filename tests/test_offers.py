"""Items on offer, against a walk through all of them."""

from __future__ import annotations

import numpy as np
import pytest

from courier_fast.data.prepare.offers import kth_on_offer, offers_of, on_offer
from courier_fast.data.prepare.pages import Events, _draw_live


@pytest.mark.parametrize("items", [1, 2, 3, 63, 64, 65, 128, 200, 1024])
@pytest.mark.parametrize("grouped", [False, True])
def test_every_moment_is_that_of_brute_force(items: int, grouped: bool) -> None:
    rng = np.random.default_rng(items)
    first = rng.integers(0, 50, items)
    last = first + rng.integers(-2, 30, items)  # some are never on offer
    group = rng.integers(-1, 4, items) if grouped else np.zeros(items, np.int64)
    offers = offers_of(first, last, group if grouped else None)
    for time in (-1, 0, 7, 25, 49, 60, 200):
        for g in range(int(group.max()) + 1):
            expected = np.flatnonzero((first <= time) & (time <= last) & (group == g))
            count, gone, come = on_offer(offers, g, time)
            assert gone == np.sum((first <= time) & (last < time) & (group == g))
            assert count == len(expected)
            found = [kth_on_offer(offers, g, gone, come, k) for k in range(count)]
            assert sorted(found) == expected.tolist()
            assert (np.diff(last[found]) >= 0).all()


def test_no_items_and_no_groups() -> None:
    none = np.zeros(0, np.int64)
    assert on_offer(offers_of(none, none), 0, 5)[0] == 0
    offers = offers_of(np.array([0, 1]), np.array([5, 5]), np.array([-1, -1]))
    assert on_offer(offers, 0, 3)[0] == 0


@pytest.mark.parametrize("gone", [0, 3, 100, 5000])
def test_each_item_on_offer_is_drawn_as_often(gone: int) -> None:
    """Among few or many that have gone: by guessing and by selection."""
    first = np.zeros(gone + 6, np.int64)
    last = np.where(np.arange(gone + 6) < 6, 100, 5)
    offers = offers_of(first, last)
    # The user has had item 0, so five are left.
    none = Events(
        *(np.array([0], kind) for kind in (np.int32, np.int64, np.int32)), np.array([0, 1])
    )
    counts, n = np.zeros(gone + 6), 6000
    page, state = np.zeros(3, np.int32), np.zeros(1, np.uint64)
    for seed in range(n):
        state[0] = seed * 7919
        page[0] = 1
        assert _draw_live(page, 1, 3, offers, 0, none, 0, 50, state) == 3
        assert 1 not in page[1:] and page[1] != page[2]
        counts[page[1:]] += 1
    assert counts[:2].sum() == counts[6:].sum() == 0
    assert np.abs(counts[2:6] / n - 0.5).max() < 5 * 0.5 / n**0.5
    # And all of them where the page has room.
    large = np.ones(9, np.int32)
    assert _draw_live(large, 1, 9, offers, 0, none, 0, 50, state) == 5
    assert sorted(large[:5]) == [1, 2, 3, 4, 5]
