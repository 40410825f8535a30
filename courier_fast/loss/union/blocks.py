"""Rows against a block of columns: the primitive of every loss whose candidates are in more than
one place.

Candidates of other processes and of a memory come in blocks. Over each of them a row has a
log-sum-exp and a weighted sum; partial results merge, and the gradient of a column needs the rows'
log-sum-exps alone. So a backend gives four functions:

- `forward(x, y, pairs, scoring, bar)`: `Partial` over the candidates that rows x have in block y
- `backward(y, x, lse, g, pairs, scoring)`: sum_i g_i exp(s_ij - lse_i) x_i of the columns j,
  [n, D] float32
- `candidate_forward(histories, x, y, pairs, scoring, bar)`: `forward` of attention "candidate", of
  anchors x (without rows) on their pages, without `mean`
- `candidate_backward(histories, x, y, lse, g, pairs, scoring)`: `CandidateGradients` of
  sum_i g_i lse_i, lse over all blocks

This file holds them as dense PyTorch (impl="reference", any type and device); the others are in
kernels/triton/blocks.py and kernels/cpu/blocks.py.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import reference
from ..problem import Histories

# Scores that are held at a time, by the reference and where ranks are counted.
ELEMENTS = 1 << 24


@dataclass
class Block:
    """Rows or columns of scores, and what says which of them meet."""

    rows: Tensor  # [n, D] in the type of the inputs: unit rows; for attention "candidate" E itself
    # [n] int64: rows and columns of one id do not meet; None: they all do
    ids: Tensor | None = None
    page: Tensor | None = None  # [n] int64, ascending
    bias: Tensor | None = None  # [n] float32 or float64, added to a column's scores
    merged: bool = False  # the bias is log m: the column stands for m equal candidates
    count: Tensor | None = None  # [1] int32 on the device: how many rows are there, the first ones
    query: Tensor | None = None  # [n, D] attention "candidate": q where it is not E

    def __len__(self) -> int:
        return self.rows.shape[0]

    def part(self, which: slice) -> Block:
        """Some rows of the anchors'."""
        found = replace(self, rows=self.rows[which])
        for name in ("ids", "page"):
            x = getattr(self, name)
            setattr(found, name, None if x is None else x[which])
        return found


@dataclass(frozen=True)
class Scoring:
    """s_ij = x_i . y_j / tau + bias_j."""

    temperature: Tensor | None  # 0-d, without gradient; None: tau
    tau: float
    workspace: int

    @property
    def inverse_tau(self) -> Tensor | float:
        return 1.0 / self.tau if self.temperature is None else 1.0 / self.temperature.double()

    def inverse_tau_on(self, device: torch.device) -> Tensor:
        """0-d float64."""
        return torch.as_tensor(self.inverse_tau, device=device, dtype=torch.float64)


@dataclass
class Partial:
    """What the rows have from one block or from several."""

    lse: Tensor  # [M] float64: logsumexp_j s_ij over their candidates, -inf where there is none
    mean: Tensor | None  # [M, D] float32: sum_j p_ij y_j
    above: Tensor | None  # [M] int64: candidates that score above `bar`

    def merge(self, other: Partial) -> Partial:
        lse = torch.logaddexp(self.lse, other.lse)

        def share(part: Tensor) -> Tensor:
            return torch.where(part == -torch.inf, 0.0, (part - lse).exp())[:, None]

        mean = self.mean
        if mean is not None and other.mean is not None:
            mean = mean * share(self.lse).to(mean.dtype) + other.mean * share(other.lse).to(
                mean.dtype
            )
        above = self.above
        if above is not None and other.above is not None:
            above = above + other.above
        return Partial(lse, mean, above)


@dataclass
class CandidateGradients:
    """float32; in the layouts of what they are the gradients of."""

    rows: Tensor  # [n, D]
    query: Tensor | None  # [n, D], where the columns have queries of their own
    key: Tensor  # [K, D]; where key and value are the same rows, the sum of both
    value: Tensor | None
    inverse_tau: Tensor  # 0-d float64

    def add(self, other: CandidateGradients) -> None:
        """Of another block: what belongs to the pages and the temperature."""
        self.key += other.key
        if self.value is not None:
            self.value += other.value
        self.inverse_tau += other.inverse_tau


def no_gradients(histories: Histories, y: Block) -> CandidateGradients:
    def like(x: Tensor | None) -> Tensor | None:
        return None if x is None else torch.zeros(x.shape, dtype=sums_dtype(x), device=x.device)

    value = None if histories.value is histories.key else histories.value
    rows, query, key, value = (like(x) for x in (y.rows, y.query, histories.key, value))
    assert rows is not None and key is not None
    slope = torch.zeros((), dtype=torch.float64, device=rows.device)
    return CandidateGradients(rows, query, key, value, slope)


def no_columns(x: Block, bar: Tensor | None) -> Partial:
    m, dim = x.rows.shape
    new = x.rows.new_zeros
    return Partial(
        new(m, dtype=torch.float64).fill_(-torch.inf),
        new(m, dim, dtype=sums_dtype(x.rows)),
        None if bar is None else new(m, dtype=torch.int64),
    )


def sums_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def allowed(x: Block, y: Block, pairs: str) -> Tensor | None:
    """Candidates [M, n] bool; None: all. `pairs`: "ids" alone; "other_pages" besides; or
    "sequence", where rows and columns are the same list and a row's own id on its own page stays a
    candidate."""
    meet = None
    if x.ids is not None and y.ids is not None:
        meet = x.ids[:, None] != y.ids
    if pairs == "other_pages":
        assert x.page is not None and y.page is not None and meet is not None
        meet &= x.page[:, None] != y.page
    elif pairs == "sequence":
        assert x.page is not None and y.page is not None and meet is not None
        meet |= x.page[:, None] == y.page
        meet.fill_diagonal_(False)
    return meet


def scores(x: Block, y: Block, pairs: str, scoring: Scoring) -> Tensor:
    """[M, n] in float32 or better, -inf where a column is no candidate."""
    return _scored((x.rows @ y.rows.T).to(sums_dtype(x.rows)), x, y, pairs, scoring)


def _scored(cosine: Tensor, x: Block, y: Block, pairs: str, scoring: Scoring) -> Tensor:
    """Scores from cosines [M, n], biases included, -inf where a column is no candidate."""
    s = cosine * scoring.inverse_tau_on(cosine.device).to(cosine.dtype)
    if y.bias is not None:
        s = s + y.bias.to(s.dtype)
    meet = allowed(x, y, pairs)
    return s if meet is None else s.masked_fill(~meet, -torch.inf)


def above(
    x: Block,
    y: Block,
    pairs: str,
    scoring: Scoring,
    bar: Tensor,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """`count_above` of unit rows, some at a time."""
    wide = replace(y, rows=y.rows.to(dtype))
    step = max(1, ELEMENTS // max(len(y), 1))
    found = torch.zeros(len(x), dtype=torch.int64, device=bar.device)
    for first in range(0, len(x), step):
        which = slice(first, first + step)
        some = x.part(which)
        some.rows = some.rows.to(dtype)
        found[which] = count_above(scores(some, wide, pairs, scoring), y, scoring, bar[which])
    return found


# ---- the definition ------------------------------------------------------------------------------


def forward(x: Block, y: Block, pairs: str, scoring: Scoring, bar: Tensor | None) -> Partial:
    if not len(y):
        return no_columns(x, bar)
    s = scores(x, y, pairs, scoring)
    lse = s.logsumexp(1)
    p = torch.where(lse[:, None] == -torch.inf, 0.0, (s - lse[:, None]).exp())
    mean = (p.to(x.rows.dtype) @ y.rows).to(s.dtype)
    ranks = None if bar is None else above(x, y, pairs, scoring, bar, s.dtype)
    return Partial(lse.double(), mean, ranks)


def backward(y: Block, x: Block, lse: Tensor, g: Tensor, pairs: str, scoring: Scoring) -> Tensor:
    s = scores(x, y, pairs, scoring)
    p = (s.double() - lse[:, None]).exp().to(s.dtype) * g[:, None].to(s.dtype)
    return (p.T.to(x.rows.dtype) @ x.rows).to(s.dtype)


def _candidate_scores(
    histories: Histories, x: Block, y: Block, pairs: str, scoring: Scoring
) -> tuple[Tensor, Tensor]:
    """Cosines and scores [M, n], biases included, -inf where a column is no candidate."""
    assert x.page is not None
    listed, which = x.page.unique_consecutive(return_inverse=True)
    query = y.rows if y.query is None else y.query
    cosine = reference.candidate_cosines(histories, reference.normalize(y.rows), query, listed)
    cosine = cosine[which].to(sums_dtype(y.rows))
    return cosine, _scored(cosine, x, y, pairs, scoring)


def count_above(s: Tensor, y: Block, scoring: Scoring, bar: Tensor) -> Tensor:
    """[M] int64: candidates with a score [M, n] above `bar` [M]; ties but for rounding are not."""
    limit = bar.to(s.dtype) + 1e-6 * scoring.inverse_tau_on(bar.device).to(s.dtype)
    if not y.merged or y.bias is None:
        return (s > limit[:, None]).sum(1)
    return ((s - y.bias.to(s.dtype) > limit[:, None]) * y.bias.exp().round().to(torch.int64)).sum(1)


def candidate_forward(
    histories: Histories, x: Block, y: Block, pairs: str, scoring: Scoring, bar: Tensor | None
) -> Partial:
    _, s = _candidate_scores(histories, x, y, pairs, scoring)
    ranks = None if bar is None else count_above(s, y, scoring, bar)
    return Partial(s.logsumexp(1).double(), None, ranks)


def candidate_backward(
    histories: Histories, x: Block, y: Block, lse: Tensor, g: Tensor, pairs: str, scoring: Scoring
) -> CandidateGradients:
    if not len(x) or not len(y):
        return no_gradients(histories, y)
    same = histories.value is histories.key
    key = histories.key.detach().requires_grad_()
    value = key if same else histories.value.detach().requires_grad_()
    query = None if y.query is None else y.query.detach().requires_grad_()
    rows = y.rows.detach().requires_grad_()
    with torch.enable_grad():
        cosine, s = _candidate_scores(
            replace(histories, key=key, value=value),
            x,
            replace(y, rows=rows, query=query),
            pairs,
            scoring,
        )
        upstream = (s.detach().double() - lse[:, None]).exp().to(s.dtype) * g[:, None].to(s.dtype)
        inputs = (rows, query, key, None if same else value)
        grads = iter(torch.autograd.grad(s, [t for t in inputs if t is not None], upstream))
    d_rows, d_query, d_key, d_value = (
        None if t is None else next(grads).to(s.dtype) for t in inputs
    )
    assert d_rows is not None and d_key is not None
    slope = (upstream.double() * cosine.detach().double()).sum()
    return CandidateGradients(d_rows, d_query, d_key, d_value, slope)
