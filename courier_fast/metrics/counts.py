"""Impressions, checked, sorted by prediction, and what one pass over them counts for each user or
page.

n impressions, G groups (users or pages). Everything is O(n log n) time and O(n + G) memory; ties
are exact, nothing is binned. An impression of weight w counts as w impressions. Without weights
(None, for which the kernels are compiled apart) all counts are integers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import overload

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray

BLOCK = 1 << 20  # rows at a time where numpy would make a copy of all
SMALLEST = 1e-7  # probabilities are clipped to [SMALLEST, 1 - SMALLEST] in a logarithm


# ---- arguments -----------------------------------------------------------------------------------


def check_clicked(clicked: npt.ArrayLike, *, both: bool = True) -> Array:
    """[n] bool of labels that are bool, 0 or 1; ValueError for others, for none and, if `both`, for
    one label only."""
    given = np.asarray(clicked)
    if given.ndim != 1 or not len(given):
        raise ValueError(
            f"clicked: expected [n] labels, n at least 1, got shape {list(given.shape)}"
        )
    labels = given == 1
    if given.dtype != np.bool_:
        other = np.flatnonzero(~labels & (given != 0))
        if len(other):
            raise ValueError(
                f"clicked: expected only 0 and 1, got {given[other[0]]} at row {other[0]}"
            )
    if both and labels.all() == labels.any():
        label = int(labels[0])
        raise ValueError(f"clicked: expected both labels, got {len(given)} times {label}")
    return labels


def check_predictions(
    predictions: npt.ArrayLike, n: int, name: str = "predictions", *, probability: bool = False
) -> Array:
    """[n] float32 or float64 without NaN, in [0, 1] if `probability`; ValueError naming `name`."""
    p = np.asarray(predictions)
    if p.shape != (n,):
        raise ValueError(f"{name}: expected shape [{n}] as clicked, got {list(p.shape)}")
    if p.dtype.kind not in "fiub":
        raise ValueError(f"{name}: expected real numbers, got {p.dtype}")
    if p.dtype not in (np.float32, np.float64):
        p = p.astype(np.float32 if p.dtype == np.float16 else np.float64)
    low, high = p.min(), p.max()  # NaN if any is
    if np.isnan(low):
        raise ValueError(f"{name}: expected numbers, got {np.isnan(p).sum()} times NaN")
    if probability and not (low >= 0 and high <= 1):
        raise ValueError(f"{name}: expected probabilities in [0, 1], got {low} to {high}")
    return np.ascontiguousarray(p)


def check_weight(weight: npt.ArrayLike | None, n: int) -> Array | None:
    """[n] float64, finite and above 0; None for none. ValueError for others."""
    if weight is None:
        return None
    w = np.asarray(weight)
    if w.shape != (n,):
        raise ValueError(f"weight: expected shape [{n}] as clicked, got {list(w.shape)}")
    if w.dtype.kind not in "fiu":
        raise ValueError(f"weight: expected real numbers, got {w.dtype}")
    w = np.ascontiguousarray(w, np.float64)
    wrong = np.flatnonzero(~((w > 0) & (w < np.inf)))
    if len(wrong):
        raise ValueError(
            f"weight: expected finite numbers above 0, got {w[wrong[0]]} at row {wrong[0]}; leave "
            "out what has no weight"
        )
    return w


def group_codes(group: npt.ArrayLike, n: int, name: str) -> tuple[Array, int]:
    """([n] codes in [0, G), G) of the integers or strings [n] of `group`, in their order."""
    given = np.asarray(group)
    if given.shape != (n,):
        raise ValueError(f"{name}: expected shape [{n}] as clicked, got {list(given.shape)}")
    if given.dtype.kind not in "iubUSTO":
        raise ValueError(f"{name}: expected integers or strings, got {given.dtype}")
    kind = np.int32 if n < 2**31 else np.int64
    if given.dtype.kind in "iu" and given.min() >= 0 and given.max() <= 4 * n + 1024:
        seen = np.zeros(int(given.max()) + 1, np.bool_)  # a table instead of a sort
        seen[given] = True
        code = np.cumsum(seen, dtype=kind) - kind(1)
        return code[given], int(code[-1]) + 1
    names, code = np.unique(given, return_inverse=True)
    return code.astype(kind), len(names)


# ---- order ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SortedPredictions:
    """Impressions by ascending prediction: runs of equal predictions are ties."""

    order: Array  # [n] the impression at each place
    p: Array  # [n] its prediction
    first: Array  # [n] bool: its prediction differs from that of the place before

    @classmethod
    def of(cls, p: Array) -> SortedPredictions:
        if p.dtype == np.float32 and len(p) < 2**32:
            order, p = _sort_float32(p)
        else:
            order = np.argsort(p)
            p = p[order]
        first = np.ones(len(p), np.bool_)
        np.not_equal(p[1:], p[:-1], out=first[1:])
        return cls(order, p, first)

    @overload
    def take(self, values: Array) -> Array: ...
    @overload
    def take(self, values: None) -> None: ...
    def take(self, values: Array | None) -> Array | None:
        """`values` [n] in this order."""
        if values is None:
            return None
        out = np.empty_like(values)
        for start in range(0, len(out), BLOCK):  # numpy copies an index of 4 bytes to one of 8
            block = slice(start, start + BLOCK)
            out[block] = values[self.order[block]]
        return out


def _sort_float32(p: Array) -> tuple[Array, Array]:
    """(order, sorted) by one sort of 64-bit numbers, prediction above row: faster than argsort."""
    keys = np.empty(len(p), np.uint64)
    _pack(p.view(np.uint32), keys)
    keys.sort()
    order, bits = np.empty((2, len(p)), np.uint32)
    _unpack(keys, order, bits)
    return order, bits.view(np.float32)


_SIGN = np.uint32(1 << 31)


@njit(cache=True, nogil=True)
def _pack(bits, keys):  # type: ignore[no-untyped-def]
    for i in range(len(bits)):
        b = bits[i] if bits[i] != _SIGN else np.uint32(0)  # -0 is 0
        b = ~b if b & _SIGN else b | _SIGN  # unsigned, in the order of the numbers
        keys[i] = np.uint64(b) << np.uint64(32) | np.uint64(i)


@njit(cache=True, nogil=True)
def _unpack(keys, order, bits):  # type: ignore[no-untyped-def]
    for i in range(len(keys)):
        b = np.uint32(keys[i] >> np.uint64(32))
        order[i] = np.uint32(keys[i] & np.uint64(0xFFFFFFFF))
        bits[i] = b & ~_SIGN if b & _SIGN else ~b


# ---- counts --------------------------------------------------------------------------------------


def label_counts(clicked: Array, group: Array, groups: int, weight: Array | None = None) -> Array:
    """[G, 2] impressions of each group that were not clicked, and that were."""
    out = np.zeros((groups, 2), _sum_type(weight))
    _count_labels(clicked, group, weight, out)
    return out


def pairs_over_all(
    first: Array, clicked: Array, group: Array, groups: int, weight: Array | None = None
) -> Array:
    """[G, 2] of impressions in sorted order: twice the pairs (clicked, not clicked) in the right
    order, a tie counted one half.

    Column 1: the clicked one is of the group and the other anybody's; column 0: the one not clicked
    is of the group.
    """
    out = np.zeros((groups, 2), _sum_type(weight))
    _count_over_all(first, clicked, group, weight, clicks_of(clicked, weight), out)
    return out


def pairs_within(
    first: Array, clicked: Array, group: Array, groups: int, weight: Array | None = None
) -> Array:
    """[G] of impressions in sorted order: as `pairs_over_all`, of pairs whose impressions are both
    of the group."""
    out = np.zeros(groups, _sum_type(weight))
    _count_within(first, clicked, group, weight, _state(groups, len(group), weight), out)
    return out


def page_gains(first: Array, clicked: Array, page: Array, counts: Array, k: int) -> Array:
    """[3, G] NDCG@k, 1 / rank of the first click, and whether a click is among the first k, for
    impressions in sorted order.

    Each is the mean over all orders of tied impressions; 0 for a page without a click. `counts` [G,
    2] as of `label_counts`.
    """
    longest = int(counts.sum(1).max(initial=0))
    k = min(k, longest)
    discounts = np.append(0.0, np.cumsum(1 / np.log2(np.arange(2, k + 2))))
    out = np.zeros((len(counts), 3))
    _add_gains(first, clicked, page, discounts, _state(len(counts), len(page)), out)
    out[:, 0] /= discounts[np.clip(counts[:, 1], 1, k)]
    return out.T


def add_losses(
    clicked: Array, p: Array, group: Array, groups: int, weight: Array | None = None
) -> Array:
    """[G] sums of -log of the probability of the label, natural."""
    out = np.zeros(groups)
    _add_losses(clicked, p, group, weight, out)
    return out


def clicks_of(clicked: Array, weight: Array | None) -> float:
    """How many were clicked; an integer without weights."""
    return int(np.count_nonzero(clicked)) if weight is None else float(weight[clicked].sum())


def _sum_type(weight: Array | None) -> npt.DTypeLike:
    return np.int64 if weight is None else np.float64


def _state(groups: int, n: int, weight: Array | None = None) -> Array:
    small = weight is None and n < 2**31
    return np.zeros((groups, 4), np.int32 if small else _sum_type(weight))


@njit(cache=True, nogil=True)
def _of(weight, i):  # type: ignore[no-untyped-def]
    if weight is None:
        return 1
    return weight[i]


@njit(cache=True, nogil=True)
def _count_labels(clicked, group, weight, out):  # type: ignore[no-untyped-def]
    for i in range(len(group)):
        out[group[i], 1 if clicked[i] else 0] += _of(weight, i)


@njit(cache=True, nogil=True)
def _count_over_all(first, clicked, group, weight, positives, out):  # type: ignore[no-untyped-def]
    n, start = len(group), 0
    below, above = 0, positives  # not clicked below the run, clicked above it
    while start < n:
        end, tied, others = start, 0, 0
        while end < n and (end == start or not first[end]):
            tied += clicked[end] * _of(weight, end)
            others += (not clicked[end]) * _of(weight, end)
            end += 1
        above -= tied
        for i in range(start, end):
            if clicked[i]:
                out[group[i], 1] += (2 * below + others) * _of(weight, i)
            else:
                out[group[i], 0] += (2 * above + tied) * _of(weight, i)
        below += others
        start = end


@njit(cache=True, nogil=True)
def _count_within(first, clicked, group, weight, state, out):  # type: ignore[no-untyped-def]
    """`state` [G, 4]: not clicked below the run; in the run not clicked and clicked; the run."""
    run = 0
    for i in range(len(group)):
        run += first[i]
        g = group[i]
        if state[g, 3] != run:
            state[g, 0] += state[g, 1]
            state[g, 1] = state[g, 2] = 0
            state[g, 3] = run
        w = _of(weight, i)
        if clicked[i]:
            out[g] += (2 * state[g, 0] + state[g, 1]) * w
            state[g, 2] += w
        else:
            out[g] += state[g, 2] * w
            state[g, 1] += w


@njit(cache=True, nogil=True)
def _add_gains(first, clicked, page, discounts, state, out):  # type: ignore[no-untyped-def]
    """`state` [G, 4]: impressions above the run, in the run so far, clicked of those, the run; from
    the largest prediction down."""
    n, run = len(page), 0
    for i in range(n - 1, -1, -1):
        if i == n - 1 or first[i + 1]:
            run += 1
        g = page[i]
        if state[g, 3] != run:
            _close_run(g, state, discounts, out)
            state[g, 3] = run
        state[g, 1] += 1
        state[g, 2] += clicked[i]
    for g in range(len(out)):
        _close_run(g, state, discounts, out)


@njit(cache=True, nogil=True)
def _close_run(g, state, discounts, out):  # type: ignore[no-untyped-def]
    above, tied, clicks = state[g, 0], state[g, 1], state[g, 2]
    k = len(discounts) - 1
    if clicks:
        gain = discounts[min(k, above + tied)] - discounts[min(k, above)]
        out[g, 0] += gain * clicks / tied
        if out[g, 1] == 0:
            missed = 1.0  # probability of no click among the first t of the run
            for t in range(tied - clicks + 1):
                out[g, 1] += missed * clicks / (tied - t) / (above + t + 1)
                missed *= (tied - clicks - t) / (tied - t)
                if above + t < k:
                    out[g, 2] = 1 - missed
    state[g, 0] += tied
    state[g, 1] = state[g, 2] = 0


@njit(cache=True, nogil=True)
def _add_losses(clicked, p, group, weight, out):  # type: ignore[no-untyped-def]
    for i in range(len(group)):
        q = np.float64(p[i]) if clicked[i] else 1.0 - np.float64(p[i])
        out[group[i]] -= np.log(min(max(q, SMALLEST), 1 - SMALLEST)) * _of(weight, i)
