"""Problems that nobody has: of random numbers for tests, or of sizes alone, for what looks at
launches and memory and computes nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..loss.problem import Problem


class RandomValues:
    """Numbers of a seed. Rows that a mask leaves out hold NaN."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator)

    def uniform(self, count: int) -> Tensor:
        return torch.rand(count, generator=self.generator)

    def integers(self, below: int, count: int) -> Tensor:
        return torch.randint(0, below, (count,), generator=self.generator)

    def spoil(self, rows: Tensor, real: Tensor) -> None:
        rows[~real] = torch.nan
        rows[-2:] = torch.inf


class NoValues(RandomValues):
    """Tensors in shape and type: all items clicked, all rows real, every index 0."""

    def __init__(self) -> None:
        pass

    def normal(self, *shape: int) -> Tensor:
        return torch.empty(*shape)

    def uniform(self, count: int) -> Tensor:
        return torch.zeros(count)

    def integers(self, below: int, count: int) -> Tensor:
        return torch.zeros(count, dtype=torch.int64)

    def spoil(self, rows: Tensor, real: Tensor) -> None:
        pass


def problem(
    values: RandomValues,
    pv: tuple[int, Tensor],
    history: tuple[int, Tensor],
    *,
    dim: int,
    dtype: torch.dtype = torch.float32,
    clicked: float = 0.5,
    table: bool = False,
    mask: bool = False,
    ids: bool = False,
    log_q: bool = False,
    weights: bool = False,
    projected: bool = False,
    given: bool = False,
    tau: float = 0.1,
    tensor_tau: bool = False,
    attention_scale: float | None = None,
    **options: Any,
) -> Problem:
    """The problem of `pv` and `history`, each as (rows, offsets [B + 1]).

    Args:
        clicked: share of the items that are.
        table: half as many unique items as PV rows, and indices into them.
        mask, ids, log_q, weights: whether there are such; some weights are 0.
        projected: whether query, key and value are rows of their own.
        given: R is, and there are no histories; with `mask` some items have none.
        options: further fields of `Problem`.
    """
    (rows, pv_offsets), (history_rows, history_offsets) = pv, history
    items = max(rows // 2, 1)

    def leaf(count: int) -> Tensor:
        return values.normal(count, dim).to(dtype)

    pv_mask = values.uniform(rows) < 0.8 if mask else None
    history_mask = values.uniform(history_rows) < 0.8 if mask else None
    e, c = leaf(items if table else rows), None if table else leaf(history_rows)
    pv_index = values.integers(items, rows) if table else None
    history_index = values.integers(items, history_rows) if table else None
    query, key, value = (leaf(n) if projected else None for n in (rows, history_rows, history_rows))
    if pv_mask is not None and history_mask is not None and c is not None:
        values.spoil(e, pv_mask)
        values.spoil(c, history_mask)
    w = values.uniform(rows) * (values.uniform(rows) < 0.8) if weights else None
    r, r_mask = leaf(rows) if given else None, None
    if given:
        history_offsets = torch.zeros_like(history_offsets)
        c, history_mask = None if c is None else c[:0], None
        history_index = None if history_index is None else history_index[:0]
        if pv_mask is not None:
            r_mask = values.uniform(rows) < 0.7
            values.spoil(r, r_mask & pv_mask)
    return Problem(
        pv=e,
        history=c,
        query=query,
        key=key,
        value=value,
        pv_index=pv_index,
        history_index=history_index,
        pv_offsets=pv_offsets,
        history_offsets=history_offsets,
        pv_mask=pv_mask,
        history_mask=history_mask,
        clicked=values.uniform(rows) < clicked,
        item_ids=values.integers(items, rows) if ids else None,
        log_q=values.normal(rows) * 0.5 - 3 if log_q else None,
        weights=w,
        temperature=torch.tensor(tau) if tensor_tau else None,
        tau=tau,
        attention_scale=dim**-0.5 if attention_scale is None else attention_scale,
        reconstructed=r,
        reconstructed_mask=r_mask,
        **options,
    )
