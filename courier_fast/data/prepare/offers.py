"""Which items are on offer at a moment: their number, and the k-th of them, without walking through
time.

Items are on offer from first_seen to last_seen. In order of first_seen those that have come are a
prefix; a wavelet matrix (Claude, Navarro and Ordonez, Information Systems 47, 2015) over the ranks
of their last_seen counts those of it that have not gone, and selects the k-th, in one step for each
bit of a rank. It holds a bit for each item and level, and a count for every 64: 100 million items
take 0.5 GB for it, and 2.8 GB for their times and orders.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Array = npt.NDArray


class Offers(NamedTuple):
    """The items that are on offer, in groups; made by `offers_of`."""

    group: Array  # [I] int32, -1: in none
    # [G + 1] int64: a group's items are those of first_seen from start[g] to start[g + 1]
    start: Array
    items: Array  # [n] int32: those in a group, by group, then first_seen
    first_seen: Array  # [n] int64, of these
    last_seen: Array  # [n] int64 sorted
    last_of: Array  # [I] int64: last_seen of each item
    by_last: Array  # [n] int32: items in that order
    # [levels, words] uint64: a bit of the ranks by last_seen, highest first, in its level's order
    bits: Array
    zeros: Array  # [levels, words + 1] int32: zeros before each word, and all of the level


def offers_of(first_seen: Array, last_seen: Array, group: Array | None = None) -> Offers:
    """`first_seen`, `last_seen` [I] int64 seconds, both included; `group` [I] int (-1: none;
    default: one group)."""
    group = np.zeros(len(first_seen), np.int32) if group is None else group.astype(np.int32)
    order = np.lexsort((first_seen, group))
    order = order[np.searchsorted(group[order], 0) :]
    by_last = order[np.argsort(last_seen[order], kind="stable")].astype(np.int32)
    rank = np.empty(len(first_seen), np.int32)
    rank[by_last] = np.arange(len(by_last))
    groups = int(group.max(initial=0)) + 1
    start = np.searchsorted(group[order], np.arange(groups + 1))
    levels = max(1, (len(order) - 1).bit_length())
    bits = np.zeros((levels, len(order) // 64 + 1), np.uint64)
    zeros = np.zeros((levels, bits.shape[1] + 1), np.int32)
    values = rank[order]
    for level in range(levels):
        one = (values >> (levels - 1 - level)) & 1 == 1
        padded = np.zeros(bits.shape[1] * 64, np.uint8)
        padded[: len(one)] = one
        bits[level] = np.packbits(padded, bitorder="little").view("<u8")
        zeros[level, 1:] = np.cumsum(64 - padded.reshape(-1, 64).sum(1, dtype=np.int64))
        zeros[level, -1] = np.count_nonzero(~one)
        values = np.concatenate([values[~one], values[one]])
    return Offers(
        group,
        start.astype(np.int64),
        order.astype(np.int32),
        first_seen[order],
        last_seen[by_last],
        last_seen,
        by_last,
        bits,
        zeros,
    )


@njit(cache=True, nogil=True, inline="always")
def _ones(x):  # type: ignore[no-untyped-def]
    """How many bits of a uint64 are set."""
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(cache=True, nogil=True, inline="always")
def _zeros_before(bits, zeros, level, i):  # type: ignore[no-untyped-def]
    word, bit = i >> 6, i & 63
    below = bits[level, word] & ((np.uint64(1) << np.uint64(bit)) - np.uint64(1))
    return zeros[level, word] + bit - _ones(below)


@njit(cache=True, nogil=True)
def come_by(offers, group, time):  # type: ignore[no-untyped-def]
    """Where the group's items of first_seen up to `time` begin in `offers.items`, and end."""
    left, right = offers.start[group], offers.start[group + 1]
    return left, left + np.searchsorted(offers.first_seen[left:right], time, side="right")


@njit(cache=True, nogil=True)
def on_offer(offers, group, time):  # type: ignore[no-untyped-def]
    """(number of the group's items on offer, how many have gone, the end of those that have come),
    for `kth_on_offer`."""
    left, come = come_by(offers, group, time)
    gone_before = np.searchsorted(offers.last_seen, time, side="left")  # ranks below it have gone
    levels = offers.bits.shape[0]
    if gone_before >= 1 << levels:  # everything has
        return 0, come - left, come
    gone, a, b = 0, left, come
    for level in range(levels):
        if a == b:
            break
        zero_a = _zeros_before(offers.bits, offers.zeros, level, a)
        zero_b = _zeros_before(offers.bits, offers.zeros, level, b)
        if (gone_before >> (levels - 1 - level)) & 1:
            gone += zero_b - zero_a
            zeros = offers.zeros[level, -1]
            a, b = zeros + a - zero_a, zeros + b - zero_b
        else:
            a, b = zero_a, zero_b
    return come - left - gone, gone, come


@njit(cache=True, nogil=True)
def kth_on_offer(offers, group, gone, come, k):  # type: ignore[no-untyped-def]
    """The k-th of the group's items on offer, from 0, in order of their last_seen."""
    levels = offers.bits.shape[0]
    a, b, rank = offers.start[group], come, 0
    k += gone
    for level in range(levels):
        zero_a = _zeros_before(offers.bits, offers.zeros, level, a)
        zero_b = _zeros_before(offers.bits, offers.zeros, level, b)
        if k < zero_b - zero_a:
            a, b = zero_a, zero_b
        else:
            k -= zero_b - zero_a
            rank |= 1 << (levels - 1 - level)
            zeros = offers.zeros[level, -1]
            a, b = zeros + a - zero_a, zeros + b - zero_b
    return offers.by_last[rank]
