"""Triton: the gradient of a table of items, from those of its occurrences in a batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from .common import LN2, NO_TAU, kernel, normalize_backward, score_scale, unit_scale
from .contrast import Pass
from .parts import NO_PARTS, NO_UPSTREAM, Parts, Upstream, pass_rows, pass_tiles, with_factor
from .plan import ANCHOR, COLUMN
from .shapes import Shape


class ItemColumns(NamedTuple):
    """Columns that are unique items: how often each is a candidate [n], and their places
    from 1."""

    count: Any
    place: Any


NO_COLUMNS = ItemColumns(None, None)


@kernel
def table_gradient(
    out_ptr,  # [n, D]
    order_ptr,  # [N + K] occurrences sorted by item: PV rows, then history rows
    starts_ptr,  # [n + 1] first occurrence of each item
    pv_ptr,  # [N, D] gradient of each PV row, or None
    history_ptr,  # [K, D] gradient of each history row, or None
    table_ptr,  # [n, D]
    counts_ptr,  # as above, or None
    columns,  # ItemColumns, of None where columns are rows, as are the next two
    up,  # Upstream
    back,  # Parts of the transposed pass
    rows,
    transposed_slots,
    transposed_programs,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    D: tl.constexpr,
    back_how: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """dL/dU_u: the sum over u's occurrences in a fixed order, and u's share as a column."""
    item = tl.program_id(0).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    first = tl.load(starts_ptr + item)
    last = tl.load(starts_ptr + item + 1)
    total = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for start in range(first, last, BLOCK_R):
        place = start + tl.arange(0, BLOCK_R)
        occurrence = tl.load(order_ptr + place, mask=place < last, other=-1)
        if pv_ptr is not None:
            is_pv = (occurrence >= 0) & (occurrence < rows)
            total += tl.load(
                pv_ptr + occurrence[:, None] * D + dims[None, :],
                mask=is_pv[:, None] & (dims < D)[None, :],
                other=0.0,
            )
        if history_ptr is not None:
            total += tl.load(
                history_ptr + (occurrence - rows)[:, None] * D + dims[None, :],
                mask=(occurrence >= rows)[:, None] & (dims < D)[None, :],
                other=0.0,
            )
    result = tl.sum(total, axis=0)
    if back.acc is not None:
        if tl.load(columns.count + item) > 0:
            column = tl.load(columns.place + item) - 1 + tl.arange(0, 1)
            de = pass_rows(
                back,
                counts_ptr + COLUMN,
                counts_ptr + ANCHOR,
                transposed_slots,
                transposed_programs,
                column,
                column >= 0,
                back_how,
            )
            de = with_factor(de, up)
            de = de * (score_scale(tau, TAU_IS_TENSOR) * LN2)
            e = tl.load(
                table_ptr + item * D + dims[None, :], mask=(dims < D)[None, :], other=0.0
            ).to(tl.float32)
            norm = tl.sqrt(tl.sum(e * e, axis=1))
            result += tl.sum(normalize_backward(de, e * unit_scale(norm)[:, None], norm), axis=0)
    tl.store(out_ptr + item * D + dims, result.to(out_ptr.dtype.element_ty), mask=dims < D)


def occurrences(items: int, rows: Sequence[tuple[Any, Tensor]]) -> tuple[Tensor, Tensor]:
    """Row numbers by item, and where each item's begin [items + 1]; padding (page < 0) is last."""
    kind = torch.int32 if items < 2**31 - 1 else torch.int64  # half the passes of a radix sort
    keys = torch.cat([torch.where(page >= 0, index.to(kind), items) for index, page in rows])
    ordered, order = torch.sort(keys, stable=True)
    every = torch.arange(items + 1, dtype=kind, device=keys.device)
    return order, torch.searchsorted(ordered, every)


def sum_occurrences(
    table: Tensor,
    s: Shape,
    shown: Sequence[tuple[Any, Tensor]],
    d_pv: Tensor | None,
    d_history: Tensor | None,
    up: Upstream = NO_UPSTREAM,
    columns: ItemColumns = NO_COLUMNS,
    counts: Tensor | None = None,
    back: Pass | None = None,
    tau: dict[str, Any] = NO_TAU,
) -> Tensor:
    """The gradient of a table from those of its occurrences, `shown` by (item, page): with d_pv,
    first the PV rows; and what columns that are items add to it."""
    order, starts = occurrences(s.items, shown)
    out = torch.empty_like(table)
    table_gradient[(s.items,)](
        out,
        order,
        starts,
        d_pv,
        d_history,
        table,
        counts,
        columns,
        up,
        NO_PARTS if back is None else Parts(back.acc),
        0 if d_pv is None else shown[0][0].shape[0],
        1 if back is None else back.slots,
        s.programs(s.transposed),
        **tau,
        D=s.dim,
        back_how=pass_tiles(s, s.transposed),
        BLOCK_R=16,
        BLOCK_D=s.block_d,
        num_warps=4,
    )
    return out
