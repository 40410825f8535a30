"""The nearest rows by cosine: exact, in bounded memory, the same in every run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from torch import Tensor

Array = npt.NDArray

COSINES = 1 << 24  # at once


def normalised(rows: Array) -> Array:
    """[n, D] float32: rows of length 1, worked out in their own type; those of zeros stay."""
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.ascontiguousarray(rows / np.maximum(length, 1e-12), np.float32)


def exact_search(
    vectors: Array, queries: Array, k: int, block: int = 1 << 18, *, own: Array | None = None
) -> tuple[Array, Array]:
    """Rows and cosines, both [q, k], of the nearest of `vectors` [n, D] to `queries` [q, D]: the
    nearest first, of equal ones the lower row; all n where k is more.

    Args:
        vectors, queries: of length 1; the vectors may be a memory map.
        block: vectors at once.
        own: [q] each query's own row, whose cosine is taken as -inf.
    """
    import torch

    asked = torch.from_numpy(np.ascontiguousarray(queries, np.float32))
    k = min(k, len(vectors))
    rows = torch.empty((len(asked), k), dtype=torch.int64)
    best = torch.empty((len(asked), k))
    for start in range(0, len(vectors), block):
        part = torch.from_numpy(np.array(vectors[start : start + block], np.float32))
        before, now = min(k, start), min(k, start + len(part))  # columns that are filled
        step = max(1, COSINES // len(part))
        for first in range(0, len(asked), step):
            some = slice(first, first + step)
            cosines = asked[some] @ part.T
            if own is not None:
                place = torch.from_numpy(np.asarray(own[some])) - start
                here = ((place >= 0) & (place < len(part))).nonzero()[:, 0]
                cosines[here, place[here]] = -torch.inf
            found = _largest(cosines, k)
            # What was found before stands first, as its rows are lower.
            both = torch.cat([best[some, :before], cosines.gather(1, found)], 1)
            order = _largest(both, k)
            rows[some, :now] = torch.cat([rows[some, :before], found + start], 1).gather(1, order)
            best[some, :now] = both.gather(1, order)
    return rows.numpy(), best.numpy()


def _largest(values: Tensor, k: int) -> Tensor:
    """Columns [q, k] of the largest of [q, n], descending, of equals the first; all if k > n."""
    if k >= values.shape[1]:
        return values.sort(dim=1, descending=True, stable=True).indices
    found, columns = values.topk(k + 1, dim=1)
    tied = (found[:, k - 1] == found[:, k]).nonzero()[:, 0].tolist()
    columns = columns[:, :k].sort(dim=1).values
    for row in tied:  # which of them `topk` takes is its secret
        among = (values[row] >= found[row, k]).nonzero()[:, 0]
        columns[row] = among[values[row, among].sort(descending=True, stable=True).indices[:k]]
    order = values.gather(1, columns).sort(dim=1, descending=True, stable=True).indices
    return columns.gather(1, order)
