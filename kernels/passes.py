"""The two ways through the contrast: sums over the candidates in registers, or P of a chunk of rows in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import chunked, configs, contrast
from .state import HALF_LIFT, Pass, Rows, Shape, Transposed, cdiv


def run_contrast(
    s: Shape,
    x: Rows,
    y: Rows,
    *,
    out: Pass,
    mask: int,
    tau: Any,
    tau_is_tensor: bool,
    page_offsets: Tensor,
    y_offset: Tensor | None = None,
    y_offset_is_count: bool = False,
    y_offset_is_lse: bool = False,
    y_scale: Tensor | None = None,
    x_offset: Tensor | None = None,
    x_offset_after: bool = False,
    positive: Tensor | None = None,
    log_q: Tensor | None = None,
    online: bool = False,
    fixed_shift: bool = False,
    need_sum: bool = True,
    need_values: bool = True,
    need_rank: bool = False,
) -> None:
    dummy = x.list

    def pick(tensor: Tensor | None) -> Tensor:
        return dummy if tensor is None else tensor

    either = fixed_shift and online
    ways = ((True, False), (False, True)) if either else ((fixed_shift, online),)
    for fixed, running in ways:
        contrast.contrast[(out.slots,)](
            x_ptr=x.unit,
            y_ptr=y.unit,
            x_count_ptr=x.count,
            y_count_ptr=y.count,
            x_id_ptr=x.ids,
            y_id_ptr=y.ids,
            x_page_ptr=x.page,
            y_page_ptr=y.page,
            x_offset_ptr=pick(x_offset),
            y_offset_ptr=pick(y_offset),
            y_scale_ptr=pick(y_scale),
            x_rank_score_ptr=pick(positive),
            log_q_ptr=pick(log_q),
            page_offsets_ptr=page_offsets,
            y_rank_ptr=y.rank,
            tau=tau,
            acc_ptr=out.acc,
            top_ptr=out.top,
            total_ptr=out.total,
            above_ptr=out.above,
            slots=out.slots,
            programs=s.programs(out.tile, x.unit.device),
            list_ptr=x.list,
            TAU_IS_TENSOR=tau_is_tensor,
            MASK=mask,
            # Where no ids but the rows' own places decide, both sides ascend by position or page.
            DIAGONAL=mask == contrast.MASK_SEQUENCE.value
            or (mask in (0, 2) and x.ids is x.list and y.ids is y.list),
            HAS_X_OFFSET=x_offset is not None,
            X_OFFSET_AFTER=x_offset_after,
            HAS_Y_OFFSET=y_offset is not None,
            HAS_Y_SCALE=y_scale is not None,
            Y_OFFSET_IS_COUNT=y_offset_is_count,
            Y_OFFSET_IS_LSE=y_offset_is_lse,
            LIFT=HALF_LIFT if y_offset_is_lse and x.unit.dtype == torch.float16 else 0.0,
            HAS_RANK_LOG_Q=log_q is not None,
            FIXED_SHIFT=fixed,
            ONLINE=running,
            EITHER=either,
            NEED_SUM=need_sum,
            NEED_VALUES=need_values,
            NEED_RANK=need_rank,
            STREAM=s.stream and not out.in_place,
            TO_LIST=out.in_place,
            BLOCK_M=out.tile.block_m,
            BLOCK_N=out.tile.block_n,
            BLOCK_D=s.stride,
            PRECISION=s.precision,
            **out.tile.launch,
        )


def run_chunks(
    s: Shape,
    x: Rows,
    y: Rows,
    out: Pass | None,
    lse: Tensor,
    finish: Callable[[int, int], None] | None,
    transposed: Transposed | None,
    workspace: int,
    *,
    mask: int,
    tau: Any,
    tau_is_tensor: bool,
    y_offset: Tensor | None = None,
    y_offset_is_count: bool = False,
    positive: Tensor | None = None,
    log_q: Tensor | None = None,
    online: bool = False,
    need_values: bool = True,
    need_rank: bool = False,
) -> None:
    """A contrast direction in chunks of rows. `out` and `finish`: the forward pass, which fills `lse`; without them
    `lse` is known. With a fixed shift and `transposed`, the scores are computed once and P serves two products."""
    device = x.unit.device
    tile = s.product
    capacity, columns = x.unit.shape[0], y.unit.shape[0]
    rows = min(
        configs.chunk_rows(columns, x.unit.dtype, workspace, tile),
        cdiv(capacity, tile.block_m) * tile.block_m,
    )
    tiles_n = cdiv(columns, tile.block_n)
    store = transposed is not None or need_values
    # Rows of P begin at multiples of a tile: loads stay wide, and a tile may be read beyond its last column.
    p_stride = cdiv(columns, tile.block_n) * tile.block_n
    p_stride = cdiv(p_stride, tile.block_m) * tile.block_m
    p = torch.empty((rows, p_stride) if store else (1, 1), dtype=x.unit.dtype, device=device)
    part_top = torch.empty(tiles_n, rows, dtype=torch.float32, device=device)
    part_total = torch.empty_like(part_top)
    part_above = torch.empty(
        (tiles_n, rows) if need_rank else (1, 1), dtype=torch.int32, device=device
    )
    scaled = (
        torch.empty(rows, s.stride, dtype=x.unit.dtype, device=device)
        if transposed is not None
        else p
    )
    lift = HALF_LIFT if x.unit.dtype == torch.float16 else 0.0
    block: dict[str, Any] = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    block["PRECISION"] = s.precision
    small = {"BLOCK_M": s.small.block_m, "BLOCK_D": configs.next_power_of_2(s.stride)}

    def run_scores(first_row: int, normalised: bool, sums: bool, keep: bool) -> None:
        rank = need_rank and sums
        chunked.scores[(cdiv(rows, tile.block_m) * tiles_n,)](
            x.unit,
            y.unit,
            x.count,
            y.count,
            x.ids,
            y.ids,
            x.page,
            y.page,
            y_offset if y_offset is not None else lse,
            positive if positive is not None else lse,
            x.list,
            log_q if log_q is not None else lse,
            lse,
            p,
            part_top,
            part_total,
            part_above,
            tau,
            lift if normalised else 0.0,
            first_row,
            rows,
            p_stride,
            STRIDE=s.stride,
            TAU_IS_TENSOR=tau_is_tensor,
            MASK=mask,
            HAS_Y_OFFSET=y_offset is not None,
            Y_OFFSET_IS_COUNT=y_offset_is_count,
            HAS_RANK_LOG_Q=log_q is not None,
            NORMALISED=normalised,
            ONLINE=online,
            STORE=keep,
            SUMS=sums,
            NEED_RANK=rank,
            **block,
            **tile.launch,
        )

    for first_row in range(0, capacity, rows):
        normalised = online or out is None
        if out is not None and finish is not None:
            run_scores(first_row, False, True, store and not normalised)
            chunked.reduce_parts[(cdiv(rows, 256),)](
                part_top,
                part_total,
                part_above,
                out.top,
                out.total,
                out.above,
                x.count,
                y.count,
                first_row,
                rows,
                NEED_RANK=need_rank,
                BLOCK_N=tile.block_n,
                BLOCK=256,
            )
            finish(first_row, min(rows, capacity - first_row))
        if normalised and store:
            run_scores(first_row, True, False, True)
        if out is not None and need_values:
            if normalised:
                # The product's P is relative to the log-sum-exp now, not to the running maximum.
                last = min(first_row + rows, capacity)
                torch.sub(lse[first_row:last], lift, out=out.top[first_row:last])
            chunked.product[(cdiv(rows, tile.block_m) * cdiv(s.stride, tile.block_n),)](
                p,
                y.unit,
                x.count,
                y.count,
                out.acc,
                first_row,
                rows,
                p_stride,
                STRIDE=s.stride,
                **block,
                **tile.launch,
            )
        if transposed is not None:
            chunked.scale_rows[(cdiv(rows, s.small.block_m),)](
                x.unit,
                transposed.g,
                out.top if out is not None else lse,
                lse,
                scaled,
                x.count,
                first_row,
                rows,
                STRIDE=s.stride,
                NORMALISED=normalised,
                **small,
                num_warps=s.small.num_warps,
            )
            chunked.transposed_product[
                (cdiv(columns, tile.block_m) * cdiv(s.stride, tile.block_n),)
            ](
                p,
                scaled,
                x.count,
                y.count,
                transposed.out,
                first_row,
                rows,
                p_stride,
                STRIDE=s.stride,
                ACCUMULATE=first_row > 0,
                **block,
                **tile.launch,
            )


def lowered(g: Tensor) -> tuple[Tensor, Tensor]:
    """g in units of its largest entry, and the factor that restores the products (float16 range)."""
    largest = g.abs().amax()
    largest = torch.where(largest == 0, 1.0, largest)
    return g / largest, largest * 2.0**-HALF_LIFT
