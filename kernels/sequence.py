"""impl="triton": the click-sequence loss. Every history item is a row and a column of the same contrast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import click_sequence, configs, contrast, epilogue
from .passes import lowered, run_chunks, run_contrast
from .stages import occurrences, sequence_plan, sum_occurrences
from .state import (
    HALF_LIFT,
    Pass,
    Rows,
    SequenceShape,
    Transposed,
    allows_fixed_shift,
    cdiv,
    empty_tensors,
    needs_running_maximum,
    sequence_is_empty,
    sequence_shape,
    sequence_spec,
    sums_dtype,
    temperature_argument,
)

if TYPE_CHECKING:
    from courier_fast.problem import SequenceProblem


def sequence_saved_spec(
    p: SequenceProblem, needs: Sequence[bool]
) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """As `saved_spec`."""
    if not any(needs) or sequence_is_empty(p):
        return []
    return list(sequence_spec(p, sequence_shape(p)).values())


def _sequence_rows(s: SequenceShape, t: dict[str, Tensor]) -> Rows:
    ids = t["row_id"] if s.mask == 4 else t["row_list"]
    return Rows(t["c"], t["counts"], t["row_list"], t["row_page"], ids, None, t["ranks"][0])


def _page_mean(
    p: SequenceProblem,
    s: SequenceShape,
    t: dict[str, Tensor],
    factor: Tensor | None,
    cosine: Tensor,
) -> Tensor:
    out = torch.empty(s.rows, s.stride, dtype=torch.float32, device=cosine.device)
    rows = _sequence_rows(s, t)
    click_sequence.page_mean[(cdiv(s.rows, s.attention.block_m),)](
        t["c"],
        rows.ids,
        rows.page,
        rows.count,
        p.history_offsets,
        t["ranks"],
        factor if factor is not None else cosine,
        out,
        t["number"],
        cosine,
        STRIDE=s.stride,
        HAS_ID=s.mask == 4,
        TRANSPOSED=factor is not None,
        BLOCK_M=s.attention.block_m,
        BLOCK_H=s.attention.block_n,
        BLOCK_D=configs.next_power_of_2(s.stride),
        PRECISION=s.precision,
        num_warps=8 if s.stride > 128 else 4,
        num_stages=1,
    )
    return out


def sequence_forward(p: SequenceProblem, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
    """(loss, saved) of the click-sequence loss."""
    device = p.history.device
    per_item = p.reduction == "none"
    if sequence_is_empty(p):
        return torch.zeros(
            (p.num_history,) if per_item else (), dtype=torch.float32, device=device
        ), []
    s = sequence_shape(p)
    tile = s.forward(any(needs))
    t = empty_tensors(sequence_spec(p, s, any(needs)), device)
    tau, tau_is_tensor = temperature_argument(p)
    sequence_plan(p, t)
    rows = _sequence_rows(s, t)
    epilogue.normalize_rows[(cdiv(s.rows, s.small.block_m),)](
        p.history,
        p.history_index if p.history_index is not None else rows.list,
        rows.list,
        rows.count,
        t["c"],
        D=s.dim,
        STRIDE=s.stride,
        HAS_INDEX=p.history_index is not None,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    cosine = torch.empty(s.rows, dtype=torch.float32, device=device)
    _page_mean(p, s, t, None, cosine)
    out = Pass(
        t["pass_acc"],
        t["pass_top"],
        torch.empty(s.flat(s.rows, tile, device), dtype=torch.float32, device=device),
        t["flags"],
        s.slots(s.rows, tile, device),
        tile,
    )
    options = {
        "mask": s.mask,
        "tau": tau,
        "tau_is_tensor": tau_is_tensor,
        "online": needs_running_maximum(p, p.history.dtype, False),
        "need_values": any(needs),
    }

    def finish(first_row: int, number: int) -> None:
        contrast.finish_rows[(cdiv(number, 256),)](
            out.top,
            out.total,
            out.above,
            rows.count,
            rows.count,
            cosine,
            rows.list,
            cosine,
            cosine,
            t["pass_lse"],
            t["pass_miss"],
            cosine,
            cosine,
            out.above,
            out.slots,
            s.programs(tile, device),
            first_row,
            first_row + number,
            tau,
            TAU_IS_TENSOR=tau_is_tensor,
            HAS_LOG_Q=False,
            HAS_POSITIVE=False,
            STATS=False,
            STREAM=s.stream,
            BLOCK_M=tile.block_m,
            BLOCK_N=tile.block_n,
            BLOCK=256,
        )

    if s.chunked:
        run_chunks(s, rows, rows, out, t["pass_lse"], finish, None, p.workspace, **options)
    else:
        run_contrast(
            s,
            rows,
            rows,
            out=out,
            page_offsets=p.history_offsets,
            fixed_shift=allows_fixed_shift(p, p.history.dtype, False),
            **options,
        )
        finish(0, s.rows)
    loss = torch.zeros((s.rows,) if per_item else (), dtype=torch.float32, device=device)
    click_sequence.sequence_losses[(1,)](
        t["pass_lse"],
        cosine,
        t["number"],
        rows.list,
        rows.count,
        cosine if per_item else loss,
        t["anchors"],
        loss,
        tau,
        TAU_IS_TENSOR=tau_is_tensor,
        MEAN=p.reduction == "mean",
        ITEMS=per_item,
        BLOCK=1024,
    )
    return loss, list(t.values()) if any(needs) else []


def sequence_backward(
    p: SequenceProblem, needs: Sequence[bool], saved: Sequence[Tensor], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of (history or the table, temperature)."""
    device = p.history.device
    if sequence_is_empty(p):
        return [
            torch.zeros_like(p.history) if needs[0] else None,
            torch.zeros_like(p.temperature) if needs[1] and p.temperature is not None else None,
        ]
    s = sequence_shape(p)
    t = dict(zip(sequence_spec(p, s), saved, strict=True))
    # `page_mean` counts the positives again: not into what was saved.
    scratch = t | {"number": torch.empty_like(t["number"])}
    tau, tau_is_tensor = temperature_argument(p)
    half = p.history.dtype == torch.float16
    rows = _sequence_rows(s, t)
    g, offset, factor, cosine = (
        torch.empty(s.rows, dtype=torch.float32, device=device) for _ in range(4)
    )
    click_sequence.sequence_row_gradients[(cdiv(s.rows, 256),)](
        grad,
        grad.stride(0) if grad.dim() else 0,
        t["anchors"],
        t["number"],
        t["pass_lse"],
        rows.list,
        rows.count,
        g,
        offset,
        factor,
        s.rows,
        HALF_LIFT if half else 0.0,
        PER_ROW=p.reduction == "none",
        BLOCK=256,
    )
    scale, lower = lowered(g) if half else (g, None)
    # One upstream gradient for all anchors stays out of the transposed pass; rows that are none have no weight there.
    uniform = p.reduction != "none" and not half and not s.chunked
    slots = s.slots(s.rows, s.transposed, device)
    # Chunks are summed in float32; one pass is rounded once.
    kind = torch.float32 if s.chunked else sums_dtype(p.history.dtype)
    acc = torch.empty(s.flat(s.rows, s.transposed, device), s.stride, dtype=kind, device=device)
    options = {"mask": s.mask, "tau": tau, "tau_is_tensor": tau_is_tensor}
    if s.chunked:
        run_chunks(
            s,
            rows,
            rows,
            None,
            t["pass_lse"],
            None,
            Transposed(scale, acc),
            p.workspace,
            **options,
        )
    else:
        run_contrast(
            s,
            rows,
            rows,
            out=Pass(acc, g, g, g, slots, s.transposed),
            page_offsets=p.history_offsets,
            y_offset=offset,
            y_scale=None if uniform else scale,
            need_sum=False,
            **options,
        )
    mean = _page_mean(p, s, scratch, None, cosine)
    pulled = _page_mean(p, s, scratch, factor, cosine)
    table = p.history_index is not None
    d_rows = torch.zeros(
        s.rows, s.dim, dtype=torch.float32 if table else p.history.dtype, device=device
    )
    programs = cdiv(s.rows, s.small.block_m)
    tau_parts = torch.empty(programs, dtype=torch.float32, device=device)
    tiles = {"TILE_M": s.tile.block_m, "TILE_N": s.tile.block_n}
    tiles |= {"TRANSPOSED_M": s.transposed.block_m, "TRANSPOSED_N": s.transposed.block_n}
    click_sequence.sequence_gradient[(programs,)](
        rows.list,
        rows.count,
        p.history,
        p.history_index if p.history_index is not None else rows.list,
        g,
        t["pass_lse"],
        mean,
        pulled,
        t["pass_acc"],
        t["pass_top"],
        acc,
        lower if lower is not None else g,
        grad,
        t["anchors"],
        d_rows,
        tau_parts,
        s.slots(s.rows, s.tile, device),
        slots,
        s.programs(s.tile, device),
        s.programs(s.transposed, device),
        tau,
        TAU_IS_TENSOR=tau_is_tensor,
        HAS_INDEX=table,
        HAS_FACTOR=lower is not None,
        UNIFORM=uniform,
        D=s.dim,
        STRIDE=s.stride,
        STREAM=s.stream,
        **tiles,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    d_temperature = None
    if needs[1]:
        assert p.temperature is not None
        d_temperature = -tau_parts.sum() / p.temperature
    if not needs[0]:
        return [None, d_temperature]
    if not table:
        return [d_rows, d_temperature]
    order, starts = occurrences(s.items, [(p.history_index, t["history_page"])])
    return [sum_occurrences(p.history, s, order, starts, None, d_rows, 0), d_temperature]
