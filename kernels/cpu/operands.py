"""impl="cpu", attention for each candidate: what its products are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...loss.problem import NORM_EPS


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x| in float32, 0 for zero vectors; NaN stays NaN."""
    norm = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    return torch.where(norm <= NORM_EPS, 0.0, 1.0 / norm)


@dataclass
class Operand:
    """Rows of products, where their gradient goes, and what is known of their length."""

    rows: Tensor  # [n, D]
    inverse: Tensor | None  # [n] 1 / |row|
    gradient: Tensor | None  # [n, D] float32
    # [n] of what row / |row|^2 is still to be subtracted from the gradient
    radial: Tensor | None = None

    @classmethod
    def of(cls, rows: Tensor, unit: bool, wanted: bool) -> Operand:
        """With its length where it enters as a unit vector, and room for its gradient."""
        gradient = torch.zeros(rows.shape) if wanted else None
        radial = torch.zeros(len(rows)) if wanted and unit else None
        return cls(rows, _inverse_norm(rows) if unit else None, gradient, radial)

    def finished(self) -> Tensor | None:
        if self.gradient is not None and self.radial is not None and self.inverse is not None:
            self.gradient.addcmul_(
                self.rows, (self.radial * self.inverse.square())[:, None], value=-1
            )
        return self.gradient


@dataclass
class Operands:
    """e and v of the scores, q and k of the logits; q is e, k is v where the rows are the same."""

    e: Operand
    q: Operand
    k: Operand
    v: Operand

    @property
    def same(self) -> bool:
        return self.q is self.e and self.k is self.v


@dataclass
class Attention:
    scale: float
    cosine: bool
    heads: int


@dataclass
class Pages:
    """Pages with an anchor: their anchors, and their rows of history, one after the other."""

    page: Tensor  # [P]
    anchors: Tensor  # [P + 1] first anchor of each
    start: Tensor  # [P + 1] first row of each among `rows`
    rows: Tensor  # [K] real history rows
    lengths: list[int]


def pages_of(anchor_page: Tensor, history_start: Tensor) -> Pages:
    """`anchor_page` [M] ascending; `history_start` [B + 1] each page's first real history row."""
    page, counts = anchor_page.unique_consecutive(return_counts=True)
    first, last = history_start[page], history_start[page + 1]
    lengths = last - first
    start = torch.zeros(len(page) + 1, dtype=torch.int64)
    torch.cumsum(lengths, 0, out=start[1:])
    anchors = torch.zeros_like(start)
    torch.cumsum(counts, 0, out=anchors[1:])
    # Row i of the list is i rows after the first of all, moved by as much as its page was.
    rows = torch.arange(int(start[-1])) + (first - start[:-1]).repeat_interleave(lengths)
    return Pages(page, anchors, start, rows, lengths.tolist())
