"""Triton: the gradients of the rows of a batch, from what the passes of the contrast left."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from ...loss.problem import Problem
from .common import (
    LN2,
    NO_TAU,
    kernel,
    load_rows,
    normalize_backward,
    score_scale,
    temperature,
    unit_scale,
)
from .contrast import Pass
from .parts import (
    NO_PARTS,
    NO_UPSTREAM,
    Parts,
    Upstream,
    anchor_gradient,
    forward_parts,
    pass_rows,
    row_tiles,
    with_factor,
)
from .plan import ANCHOR, COLUMN, RECONSTRUCTED, reconstructed
from .rows import e_source
from .shapes import Shape, cdiv
from .state import LossState, Plan


@kernel
def row_gradients(
    upstream_ptr,  # 0-d, or [N] with stride
    upstream_stride,
    weights_ptr,  # [N] or None
    weight_sum_ptr,  # 0-d
    list_ptr,
    count_ptr,
    g_ptr,  # [capacity]
    rows,
    share,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g_i, the upstream gradient of anchor i's loss."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(count_ptr)
    valid = row < count
    position = tl.load(list_ptr + row, mask=valid, other=0)
    if PER_ROW:
        g = tl.load(upstream_ptr + position.to(tl.int64) * upstream_stride, mask=valid, other=0.0)
    else:
        g = tl.zeros([BLOCK], tl.float32) + tl.load(upstream_ptr) / tl.load(weight_sum_ptr)
        if weights_ptr is not None:
            g *= tl.load(weights_ptr + position, mask=valid, other=0.0)
    tl.store(g_ptr + row, tl.where(valid, g * share, 0.0), mask=row < rows)


def run_row_gradients(
    p: Problem, s: Shape, t: Plan, grad: Tensor, weight_sum: Tensor, share: float
) -> Tensor:
    """g_i [capacity], the upstream gradient of each anchor's loss, times `share`."""
    g = torch.empty(s.rows, dtype=torch.float32, device=s.device)
    row_gradients[(cdiv(s.rows, 256),)](
        grad,
        grad.stride(0) if grad.dim() else 0,
        p.weights,
        weight_sum,
        t.anchor.list,
        t.counts[0:1],
        g,
        s.rows,
        share,
        PER_ROW=p.reduction == "none",
        BLOCK=256,
    )
    return g


@kernel
def reconstruction_gradient(
    list_ptr,
    count_ptr,
    anchor_place_ptr,  # [N] prefix sums
    anchor_flag_ptr,  # [N]
    counts_ptr,  # [4], as of all rows of flags (plan.py)
    unit_ptr,  # [capacity, STRIDE] r
    norm_ptr,  # [capacity]
    e_of,  # Source
    up,  # Upstream
    ahead,  # Parts of "reconstruct": what the forward pass left
    back,  # Parts of "identify": the transposed pass over r, and 1 - p of its forward pass
    dr_ptr,  # [capacity, STRIDE]
    tau_part_ptr,  # [programs]
    forward_slots,
    programs,
    transposed_slots,
    transposed_programs,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    how: tl.constexpr,  # RowTiles
):
    """dL/dr_i = g_i/tau (sum_{j != i} p_ij e_j - (1 - p_ii) e_i), dL/dR_i.

    "identify" adds 1/tau (sum_j g_j p_ji e_j - g_i (1 - p_ii) e_i). tau_part: sum_i dL/dr_i . r_i,
    which is -tau dL/dtau, since every score is r . e / tau.
    """
    forward: tl.constexpr = how.ahead
    transposed: tl.constexpr = how.back
    dims = tl.arange(0, how.BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * how.BLOCK_M + tl.arange(0, how.BLOCK_M)
    count = tl.load(count_ptr)
    valid = row < count
    position = tl.load(list_ptr + row, mask=valid, other=0)
    inverse_tau = score_scale(tau, TAU_IS_TENSOR) * LN2
    is_anchor = valid & (tl.load(anchor_flag_ptr + position, mask=valid, other=0) != 0)
    anchor = tl.load(anchor_place_ptr + position, mask=is_anchor, other=1) - 1
    g = anchor_gradient(up, anchor, is_anchor)

    dr = tl.full([how.BLOCK_M, how.BLOCK_D], 0.0, tl.float32)
    miss = tl.full([how.BLOCK_M], 0.0, tl.float32)
    if ahead.acc is not None:
        dr += g[:, None] * pass_rows(
            ahead,
            counts_ptr + ANCHOR,
            counts_ptr + COLUMN,
            forward_slots,
            programs,
            anchor,
            is_anchor,
            forward,
        )
        miss += tl.load(ahead.miss + anchor, mask=is_anchor, other=0.0)
    if back.acc is not None:
        part = pass_rows(
            back,
            count_ptr,
            counts_ptr + ANCHOR,
            transposed_slots,
            transposed_programs,
            row,
            valid,
            transposed,
        )
        part = with_factor(part, up)
        dr += part
        miss += tl.load(back.miss + anchor, mask=is_anchor, other=0.0)
    e = load_rows(e_of, position, is_anchor, how.D, how.BLOCK_D).to(tl.float32)
    e = e * unit_scale(tl.sqrt(tl.sum(e * e, axis=1)))[:, None]
    dr = (dr - (g * miss)[:, None] * e) * inverse_tau

    mask = valid[:, None] & (dims < how.D)[None, :]
    r = tl.load(unit_ptr + row[:, None] * how.STRIDE + dims[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    norm = tl.load(norm_ptr + row, mask=valid, other=0.0)
    tl.store(tau_part_ptr + tl.program_id(0), tl.sum(tl.sum(dr * r, axis=1), axis=0))
    d_reconstruction = normalize_backward(dr, r, norm)
    tl.store(
        dr_ptr + row[:, None] * how.STRIDE + dims[None, :],
        d_reconstruction.to(dr_ptr.dtype.element_ty),
        mask=valid[:, None] & (dims < how.STRIDE)[None, :],
    )


def run_reconstruction_gradient(
    p: Problem, s: Shape, t: LossState, identify: Pass | None, up: Upstream
) -> tuple[Tensor, Tensor]:
    """dL/dR of the listed rows, and parts of -tau dL/dtau; `identify`: its transposed pass."""
    listed, back = reconstructed(t), Parts(None)
    if identify is not None and t.identify is not None:
        back = Parts(identify.acc, miss=t.identify.miss)
    dr = torch.empty(s.rows, s.stride, dtype=s.dtype, device=s.device)
    programs = cdiv(s.rows, s.small.block_m)
    tau_parts = torch.empty(programs, dtype=torch.float32, device=s.device)
    reconstruction_gradient[(programs,)](
        listed.list,
        listed.count,
        t.places[0],
        t.flags[0],
        t.counts,
        t.r,
        t.norm,
        e_source(p),
        up,
        forward_parts(t.reconstruct),
        back,
        dr,
        tau_parts,
        s.slots(s.rows, s.tile),
        s.programs(s.tile),
        1 if identify is None else identify.slots,
        s.programs(s.transposed),
        **temperature(p),
        how=row_tiles(s),
        num_warps=s.small.num_warps,
    )
    return dr, tau_parts


@kernel
def pv_gradient(
    out_ptr,  # [N, D]
    place_ptr,  # [3, N] prefix sums: anchor, reconstructed, column
    flag_ptr,  # [3, N]
    counts_ptr,  # [3]
    e_of,  # Source
    unit_ptr,  # [capacity, STRIDE] r of the reconstructed rows
    dq_ptr,  # [capacity, DQ_STRIDE] or None
    up,  # Upstream; without a gradient of the loss dq is all there is
    ahead,  # Parts of "identify": what its forward pass over e left
    back,  # Parts of "reconstruct": the transposed pass over e, where columns are rows of the batch
    miss_ptr,  # [capacity] of "reconstruct": 1 - p of its forward pass, or None
    rows,
    identify_slots,
    programs,
    transposed_slots,
    transposed_programs,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    DQ_STRIDE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    how: tl.constexpr,  # RowTiles
):
    """dL/dE_j of PV rows, dL/dq_j added, zeros for padding.

    dL/de_j = 1/tau (sum_i g_i p_ij r_i - [j in A] g_j (1 - p_jj) r_j), and for "identify"
    g_j/tau (sum_i p_ij r_i - (1 - p_jj) r_j). Where columns are unique items, the sum over i is
    added there. IN_PLACE: the transposed pass left its rows where dL/dE goes.
    """
    forward: tl.constexpr = how.ahead
    transposed: tl.constexpr = how.back
    dims = tl.arange(0, how.BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * how.BLOCK_M + tl.arange(0, how.BLOCK_M)
    inside = row < rows
    rows64 = rows.to(tl.int64)
    is_reconstructed = inside & (tl.load(flag_ptr + rows64 + row, mask=inside, other=0) != 0)
    place = (tl.load(place_ptr + rows64 + row, mask=is_reconstructed, other=1) - 1).to(tl.int64)
    result = tl.full([how.BLOCK_M, how.BLOCK_D], 0.0, tl.float32)
    if up.grad is not None:
        is_column = inside & (tl.load(flag_ptr + 2 * rows64 + row, mask=inside, other=0) != 0)
        is_anchor = inside & (tl.load(flag_ptr + row, mask=inside, other=0) != 0)
        anchor = tl.load(place_ptr + row, mask=is_anchor, other=1) - 1
        g = anchor_gradient(up, anchor, is_anchor)
        miss = tl.full([how.BLOCK_M], 0.0, tl.float32)
        de = tl.full([how.BLOCK_M, how.BLOCK_D], 0.0, tl.float32)
        if miss_ptr is not None:
            miss += tl.load(miss_ptr + anchor, mask=is_anchor, other=0.0)
        if back.acc is not None:
            if IN_PLACE:
                part = tl.load(
                    out_ptr + row[:, None] * how.D + dims[None, :],
                    mask=is_column[:, None] & (dims < how.D)[None, :],
                    other=0.0,
                ).to(tl.float32)
            else:
                column = tl.load(place_ptr + 2 * rows64 + row, mask=is_column, other=1) - 1
                part = pass_rows(
                    back,
                    counts_ptr + COLUMN,
                    counts_ptr + ANCHOR,
                    transposed_slots,
                    transposed_programs,
                    column,
                    is_column,
                    transposed,
                )
            part = with_factor(part, up)
            de += part
        if ahead.acc is not None:
            de += g[:, None] * pass_rows(
                ahead,
                counts_ptr + ANCHOR,
                counts_ptr + RECONSTRUCTED,
                identify_slots,
                programs,
                anchor,
                is_anchor,
                forward,
            )
            miss += tl.load(ahead.miss + anchor, mask=is_anchor, other=0.0)
        r = tl.load(
            unit_ptr + place[:, None] * how.STRIDE + dims[None, :],
            mask=is_anchor[:, None] & (dims < how.D)[None, :],
            other=0.0,
        ).to(tl.float32)
        de = (de - (g * miss)[:, None] * r) * (score_scale(tau, TAU_IS_TENSOR) * LN2)
        e = load_rows(e_of, row, is_column, how.D, how.BLOCK_D).to(tl.float32)
        norm = tl.sqrt(tl.sum(e * e, axis=1))
        result += normalize_backward(de, e * unit_scale(norm)[:, None], norm)
    if dq_ptr is not None:
        result += tl.load(
            dq_ptr + place[:, None] * DQ_STRIDE + dims[None, :],
            mask=is_reconstructed[:, None] & (dims < how.D)[None, :],
            other=0.0,
        ).to(tl.float32)
    tl.store(
        out_ptr + row[:, None] * how.D + dims[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=inside[:, None] & (dims < how.D)[None, :],
    )


def spread(
    p: Problem,
    s: Shape,
    t: Plan,
    unit: Tensor,
    out: Tensor,
    dq: Tensor | None,
    up: Upstream = NO_UPSTREAM,
    column: Pass | None = None,
) -> Tensor:
    """Rows of the batch [N, D] from the compacted dq; with a gradient of the loss dL/dE and dq
    together. `column`: the transposed pass of "reconstruct"."""
    ahead = back = NO_PARTS
    miss, tau = None, NO_TAU
    if up.grad is not None:
        assert isinstance(t, LossState)
        ahead, tau = forward_parts(t.identify), temperature(p)
        if column is not None and not s.merged:
            back = Parts(column.acc)
        miss = None if t.reconstruct is None else t.reconstruct.miss
    pv_gradient[(cdiv(s.rows, s.small.block_m),)](
        out,
        t.places,
        t.flags,
        t.counts,
        e_source(p),
        unit,
        dq,
        up,
        ahead,
        back,
        miss,
        s.rows,
        s.slots(s.rows, s.tile),
        s.programs(s.tile),
        1 if column is None else column.slots,
        s.programs(s.transposed),
        **tau,
        DQ_STRIDE=s.dim if dq is None else dq.shape[1],
        IN_PLACE=column is not None and column.in_place,
        how=row_tiles(s),
        num_warps=s.small.num_warps,
    )
    return out
