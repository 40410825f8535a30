"""Ranks of held-out clicks, their means over pages, and intervals over users."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

# ---- ranks of a clicked item ---------------------------------------------------------------------

Array = npt.NDArray


@dataclass(frozen=True)
class Ranks:
    """Where each target stands among its `others`: how many score above it and how many tie with
    it; all [T] int64."""

    above: Array
    tied: Array
    others: Array

    def expected_rank(self) -> Array:
        """[T] mean rank, from 1: candidates above, plus half of those tied, plus 1."""
        return 1 + self.above + self.tied / 2

    def hit(self, k: int) -> Array:
        """[T] probability that the target is among the first k."""
        return np.clip((k - self.above) / (self.tied + 1), 0.0, 1.0)

    def reciprocal(self) -> Array:
        """[T] mean of 1 / rank."""
        most = int((self.above + self.tied).max(initial=0)) + 1
        harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, most + 1))])
        total = harmonic[self.above + self.tied + 1] - harmonic[self.above]
        return total / (self.tied + 1)

    def auc(self) -> Array:
        """[T] probability that the target scores above another candidate drawn at random, a tie
        counted one half; NaN without another."""
        with np.errstate(invalid="ignore"):
            return (self.others - self.above - self.tied / 2) / self.others


def count_ranks(scores: Array, offsets: Array) -> Ranks:
    """Ranks from scores [C] (higher is better) in segments `offsets` [T + 1]; a segment's first
    score is its target's.

    NaN is below every number and ties with NaN: an item without an embedding comes last. ValueError
    for an empty segment.
    """
    sizes = np.diff(offsets)
    if offsets[0] != 0 or offsets[-1] != len(scores) or (sizes < 1).any():
        raise ValueError(
            f"offsets: expected segments of at least one score that cover all {len(scores)}, "
            f"got {offsets}"
        )
    if not len(sizes):
        return Ranks(*np.zeros((3, 0), np.int64))
    scores = np.where(np.isnan(scores), -np.inf, scores)
    own = np.repeat(scores[offsets[:-1]], sizes)
    above = np.add.reduceat(scores > own, offsets[:-1], dtype=np.int64)
    tied = np.add.reduceat(scores == own, offsets[:-1], dtype=np.int64) - 1
    return Ranks(above, tied, sizes - 1)


def _group_sum(values: Array, group: Array, groups: int) -> Array:
    flat = values.reshape(len(values), -1)
    columns = [np.bincount(group, c, groups) for c in flat.T]
    return np.stack(columns, 1).reshape(groups, *values.shape[1:])


def _mean_by_group(values: Array, group: Array, groups: int) -> Array:
    """Means [groups, ...] of values [n, ...] by `group` [n] below `groups`; NaN where none is."""
    with np.errstate(invalid="ignore"):
        return (_group_sum(values, group, groups).T / np.bincount(group, minlength=groups)).T


def bootstrap_means(values: Array, user: Array, *, samples: int = 1000, seed: int = 0) -> Array:
    """Means over pages [samples, M] of values [P, M], each of as many users as there are, drawn
    with replacement with all their pages.

    Columns share the draws: the difference of two columns is the bootstrap of their paired
    difference.

    Args:
        user: [P] whose page it is; any integers.
        samples: bootstrap samples, at least 1.
    """
    if values.ndim != 2 or user.shape != values.shape[:1] or not len(values):
        raise ValueError(
            f"expected values [P, M] and user [P] with P at least 1, got {list(values.shape)} and "
            f"{list(user.shape)}"
        )
    if samples < 1:
        raise ValueError(f"samples: expected at least 1, got {samples}")
    names, row = np.unique(user, return_inverse=True)
    users = len(names)
    # The ratio of sums over users is the mean over their pages.
    sums = _group_sum(np.column_stack([values, np.ones(len(values))]), row, users)
    rng = np.random.default_rng(seed)
    means = np.empty((samples, values.shape[1]))
    for sample in means:
        drawn = np.bincount(rng.integers(0, users, users), minlength=users).astype(np.float64)
        total = drawn @ sums
        sample[:] = total[:-1] / total[-1]
    return means


def interval(samples: Array, level: float = 0.95) -> tuple[Array, Array]:
    """Percentile interval (low, high), each [...], of bootstrap samples [samples, ...]."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return low, high


def page_values(ranks: Ranks, page: Array, pages: int, k: Sequence[int]) -> dict[str, Array]:
    """Each metric's value by page [pages]: "HR@k" for every k, "MRR" and "AUC"; `page` [T] is each
    target's page in [0, pages)."""
    by_target = {f"HR@{n}": ranks.hit(n) for n in k}
    by_target |= {"MRR": ranks.reciprocal(), "AUC": ranks.auc()}
    return {name: _mean_by_group(value, page, pages) for name, value in by_target.items()}
