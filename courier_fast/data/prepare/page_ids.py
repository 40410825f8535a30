"""Page ids that look as if they were used again: of sessions that are counted anew each day, or for
each user.

What is looked at adds up over parts of the users in any cut, so both engines say the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray

APART = 86_400  # seconds between items shown on one page: more is worth a word
SAMPLE = 4096  # page ids looked at for several users: those with the smallest hashes


@dataclass(frozen=True)
class PageIds:
    """What was seen so far of pages in order of their users."""

    apart: int = 0  # pages that last longer than APART
    first: tuple[int, int, int] | None = None  # the first of them: user (row), from and until
    pages: Array | None = (
        None  # [n] uint64 the sample, sorted; an id of several users is there twice
    )
    users: Array | None = None  # [n] int64 its users (rows)

    def __add__(self, other: PageIds) -> PageIds:
        """With pages of later users."""
        if self.pages is None or other.pages is None:
            return other if self.pages is None else self
        sample = _sample(
            np.concatenate([self.pages, other.pages]), np.concatenate([self.users, other.users])
        )  # type: ignore[list-item]
        return PageIds(self.apart + other.apart, self.first or other.first, *sample)

    def moved(self, by: int) -> PageIds:
        """With `by` users before."""
        if self.pages is None or self.users is None:
            return self
        first = None if self.first is None else (self.first[0] + by, *self.first[1:])
        return PageIds(self.apart, first, self.pages, self.users + by)

    def counts(self) -> dict[str, int] | None:
        """For report.json; None without given pages."""
        if self.pages is None:
            return None
        several = int(np.count_nonzero(self.pages[1:] == self.pages[:-1]))
        return {
            "apart": self.apart,
            "looked_at": len(self.pages) - several,
            "of_several_users": several,
        }

    def notes(self, user_of: Callable[[int], str], total: int) -> list[str]:
        """What there is to say; `total`: pages in all."""
        out = []
        if self.first is not None:
            user, *times = self.first
            since, until = (str(np.datetime64(t, "s")).replace("T", " ") for t in times)
            out.append(
                f"--page-column: {self.apart:,} of {total:,} pages hold items shown more than a "
                f"day apart (user {user_of(user)}: from {since} to {until}); "
                "is an id used again on another day?"
            )
        if self.pages is None or self.users is None:
            return out
        twice = np.flatnonzero(self.pages[1:] == self.pages[:-1])
        if len(twice):
            one, other = (user_of(int(self.users[twice[0] + i])) for i in (0, 1))
            out.append(
                f"--page-column: {len(twice):,} of {len(self.pages) - len(twice):,} page ids "
                f"looked at belong to several users ({one} and {other}, for example); each user's "
                "rows are a page of their own"
            )
        return out


def page_ids_of(rows: Mapping[str, Array], bounds: Array, ticks: int = 1) -> PageIds:
    """Of rows shown by user and page, with times in ticks of a second (0: they only order); bounds
    [pages + 1]: where pages begin."""
    starts = bounds[:-1]
    if not len(starts):
        return PageIds()
    low, high = (pick.reduceat(rows["time"], starts) for pick in (np.minimum, np.maximum))
    apart, user = (
        np.flatnonzero((high - low > APART * ticks) & (ticks > 0)),
        rows["user"][starts].astype(np.int64),
    )
    first = None
    if len(apart):
        at = apart[0]
        first = (int(user[at]), int(low[at] // ticks), int(high[at] // ticks))
    return PageIds(len(apart), first, *_sample(rows["page"][starts], user))


def _sample(pages: Array, users: Array) -> tuple[Array, Array]:
    """The rows of the SAMPLE smallest ids, sorted, of each id two at most."""
    smallest = np.unique(pages)[:SAMPLE]
    kept = pages <= smallest[-1]
    pages, users = pages[kept], users[kept]
    order = np.lexsort((users, pages))
    pages, users = pages[order], users[order]
    third = np.zeros(len(pages), bool)
    third[2:] = pages[2:] == pages[:-2]
    return pages[~third], users[~third]
