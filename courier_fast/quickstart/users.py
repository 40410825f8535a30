"""Simulates shoppers: each has a taste in pattern, palette and cut, whatever the garment, and
clicks accordingly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from .catalogue import CUTS, PALETTES, PATTERNS

Array = npt.NDArray

START = 1_767_225_600  # 2026-01-01 UTC
DAY = 86_400
ATTRIBUTES = {"pattern": PATTERNS, "palette": tuple(PALETTES), "cut": CUTS}
IMPORTANCE = {"pattern": 1.0, "palette": 1.0, "cut": 0.3}
BOTH = 1.0  # more for the right pattern in the right palette


@dataclass(frozen=True)
class Behaviour:
    """How users shop.

    Attributes:
        pages: page views of a user; about `session` of them are minutes apart, sessions are spread
            over `days`.
        shown: items on a page, none of them twice for the same user.
        fitting: share of them that the shop shows because they fit a taste's pattern and palette;
            the others fit none.
        tastes: of a user; an item is liked as much as the taste it fits best. More are harder to
            learn: histories are mixtures.
        sharpness: of the choice, P(click i) = softmax_i(sharpness * liking); noise: share of clicks
            on anything.
        again: share of pages with a second click; none: share without a click.
    """

    pages: int = 16
    session: int = 4
    days: int = 30
    shown: int = 8
    fitting: float = 0.2
    tastes: int = 1
    sharpness: float = 5.0
    noise: float = 0.05
    again: float = 0.15
    none: float = 0.1


def item_codes(catalogue: pa.Table) -> Array:
    """[items, 3] int: the place of each attribute in `ATTRIBUTES`."""
    columns = [
        [names.index(v) for v in catalogue.column(a).to_pylist()] for a, names in ATTRIBUTES.items()
    ]
    return np.array(columns, np.int64).T


def user_tastes(count: int, tastes: int, seed: int) -> Array:
    """[users, tastes, 3] int: the pattern, palette and cut that a taste is for; a user's tastes
    differ in pattern and palette."""
    rng = np.random.default_rng([seed, 2])
    columns = [
        np.argsort(rng.random((count, len(names))), 1)[:, :tastes]
        if len(names) >= tastes > 1 and name != "cut"
        else rng.integers(len(names), size=(count, tastes))
        for name, names in ATTRIBUTES.items()
    ]
    return np.stack(columns, 2)


def liking(tastes: Array, items: Array) -> Array:
    """How well items [..., 3] fit the best of a user's tastes [..., tastes, 3]: 0 to 3.3, [...]."""
    match = tastes == items[..., None, :]
    value = match @ np.array(list(IMPORTANCE.values())) + BOTH * match[..., :2].all(-1)
    return value.max(-1)


def click_probability(like: Array, behaviour: Behaviour) -> Array:
    """P(clicked) of each item of pages with liking [pages, shown], pages without a click left out:
    what a perfect model would say.

    With p = softmax(sharpness * liking): one click, or with a second one, drawn from the others,
    p_i + sum_{j != i} p_j p_i / (1 - p_j).
    """
    b = behaviour

    def clicked(scores: Array) -> Array:
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        odds = p / np.maximum(1 - p, 1e-300)
        second = p * (odds.sum(1, keepdims=True) - odds)
        return p + b.again / (1 - b.none) * second

    return (1 - b.noise) * clicked(b.sharpness * like) + b.noise * clicked(np.zeros(like.shape))


def simulate(
    catalogue: pa.Table, users: int, seed: int = 0, behaviour: Behaviour | None = None
) -> tuple[pa.Table, Array]:
    """Page views of `users` shoppers in the catalogue of `draw_catalogue`.

    Returns:
        A row per item shown, by time: page_id, user_id, item_id (text), timestamp (int64 seconds),
        clicked (bool); and beside it the liking [rows] that the clicks were drawn from, which an
        oracle would know.

    Raises:
        ValueError: too few items for pages without repeats, or no user.
    """
    b = behaviour or Behaviour()
    least = 2 * b.pages * b.shown
    if users < 1 or catalogue.num_rows < least:
        raise ValueError(
            f"expected at least 1 user and {least} items (twice what a user is shown), got {users} "
            f"and {catalogue.num_rows}"
        )
    rng = np.random.default_rng([seed, 3])
    pages = users * b.pages
    owner = np.repeat(np.arange(users), b.pages)
    # Sessions on days of their own, an evening each; pages a minute or more apart.
    sessions = -(-b.pages // b.session)
    day = np.sort(np.argsort(rng.random((users, max(b.days, sessions))), 1)[:, :sessions], 1)
    opened = day * DAY + rng.integers(17 * 3600, 22 * 3600, (users, sessions))
    number = np.arange(b.pages)
    at = opened[:, number // b.session] + number % b.session * 300
    time = START + (at + rng.integers(0, 240, at.shape)).ravel()

    codes, tastes = item_codes(catalogue), user_tastes(users, b.tastes, seed)
    shown = np.empty((users, b.pages * b.shown), np.int64)
    for user, own in enumerate(tastes):
        order = rng.permutation(len(codes))
        fits = (codes[order, None, :2] == own[:, :2]).all(-1).any(-1)
        place = rng.random(b.pages * b.shown) < b.fitting
        place[np.flatnonzero(place)[fits.sum() :]] = False  # no more of them
        shown[user, place] = order[fits][: place.sum()]
        shown[user, ~place] = order[~fits][: (~place).sum()]
    shown = shown.reshape(pages, b.shown)
    like = liking(tastes[owner][:, None], codes[shown])
    # Gumbel's trick: the largest is a draw from the softmax, the second largest the next without
    # replacement.
    careless = rng.random(pages) < b.noise
    score = np.where(careless[:, None], 0.0, b.sharpness * like) + rng.gumbel(size=like.shape)
    rank = np.argsort(np.argsort(-score, 1), 1)
    draw = rng.random(pages)
    clicks = np.where(draw < b.none, 0, np.where(draw < b.none + b.again, 2, 1))
    clicked = rank < clicks[:, None]

    order = np.argsort(time, kind="stable")
    ids = np.array(catalogue.column("item_id").to_pylist())
    width = len(str(max(pages, users)))
    table = pa.table(
        {
            "page_id": [f"p{i:0{width}}" for i in np.repeat(np.arange(pages), b.shown)],
            "user_id": [f"u{i:0{width}}" for i in np.repeat(owner[order], b.shown)],
            "item_id": ids[shown[order].ravel()],
            "timestamp": np.repeat(time[order], b.shown).astype(np.int64),
            "clicked": clicked[order].ravel(),
        }
    )
    return table, like[order].ravel()
