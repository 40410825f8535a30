"""Triton: log-sum-exp and loss of each row from the sums that a forward pass of the contrast left,
and the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...loss.problem import Problem
from .common import LN2, LOG2E, add_in, kernel, parts_of, schedule, score_scale
from .contrast import Pass, PassSide, Scores, Sums
from .shapes import Shape, cdiv
from .state import Plan


class Items(NamedTuple):
    """Statistics of each item, at its place in the batch [N]."""

    lse: Any
    positive: Any
    rank: Any


class AnchorResults(NamedTuple):
    """What is known of each anchor [capacity] after the forward pass."""

    loss: Any
    lse: Any  # in powers of two
    miss: Any  # 1 - p of the positive
    items: Any  # None without statistics


@triton.jit
def finish(row, valid, top, total, above, positive_ptr, list_ptr, log_q_ptr, scale, out):
    """loss_i = logsumexp_{j in cand(i)} s_ij - s_ii from the sums over all but the positive."""
    position = tl.load(list_ptr + row, mask=valid, other=0)
    cosine = tl.load(positive_ptr + row.to(tl.int64) * 2, mask=valid, other=0.0)
    positive = cosine * scale
    if log_q_ptr is not None:
        positive -= tl.load(log_q_ptr + position, mask=valid, other=0.0) * LOG2E
    one = tl.full([row.shape[0]], 1.0, tl.float32)
    # Alone among the candidates the positive is their log-sum-exp, to the bit.
    top = tl.where(total > 0, top, -float("inf"))
    highest, everything = add_in(top, total, positive, one)
    lse = highest + tl.log2(everything)
    tl.store(out.miss + row, total * tl.exp2(top - highest) / everything, mask=valid)
    tl.store(out.loss + row, (lse - positive) * LN2, mask=valid)
    tl.store(out.lse + row, lse, mask=valid)
    if out.items is not None:
        tl.store(out.items.lse + position, lse * LN2, mask=valid)
        tl.store(out.items.positive + position, cosine, mask=valid)
        tl.store(out.items.rank + position, above.to(tl.int64) + 1, mask=valid)


@kernel
def finish_rows(
    sums,  # Sums
    x_count_ptr,
    y_count_ptr,
    positive_ptr,  # [capacity, 2] or None
    list_ptr,  # [capacity] PV rows of the anchors
    log_q_ptr,  # [N] or None
    out,  # AnchorResults
    slots,
    programs,
    first_row,
    last_row,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    STREAM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss_i = logsumexp_{j in cand(i)} s_ij - s_ii, the positive added in float32 apart from the
    products.

    Without positives (click sequence) they are among the candidates, only the log-sum-exp is
    wanted.
    """
    row = first_row + tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x_count = tl.load(x_count_ptr)
    valid = row < tl.minimum(x_count, last_row)
    _tiles, blocks, parts, share = schedule(
        x_count, tl.load(y_count_ptr), slots, programs, BLOCK_M, BLOCK_N, STREAM
    )
    scale = score_scale(tau, TAU_IS_TENSOR)
    first, number = parts_of((row // BLOCK_M).to(tl.int64), blocks, parts, share)
    most = tl.max(tl.where(valid, number, 0), axis=0)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.int32)
    for part in range(most):
        slot = (first + part) * BLOCK_M + row % BLOCK_M
        there = valid & (part < number)
        part_top = tl.load(sums.top + slot, mask=there, other=-float("inf"))
        part_total = tl.load(sums.total + slot, mask=there, other=0.0)
        top, total = add_in(top, total, part_top, part_total)
        if out.items is not None:
            above += tl.load(sums.above + slot, mask=there, other=0)
    if positive_ptr is not None:
        finish(row, valid, top, total, above, positive_ptr, list_ptr, log_q_ptr, scale, out)
    else:
        tl.store(out.lse + row, top + tl.log2(total), mask=valid)


@dataclass
class Results:
    """Where a forward pass leaves what it finds out of each row, beside the sums."""

    lse: Tensor  # [capacity] in powers of two
    miss: Tensor  # [capacity]
    loss: Tensor  # [capacity]
    positive: Tensor | None = None  # [capacity, 2]; None: positives are among the candidates
    log_q: Tensor | None = None  # [N]
    items: Sequence[Tensor] = ()  # [N] log-sum-exp, similarity and rank, with `stats`
    stats: bool = False


def finish_pass(
    s: Shape,
    x: PassSide,
    y: PassSide,
    scores: Scores,
    out: Pass,
    results: Results,
    first: int,
    number: int,
) -> None:
    """Results of rows `first` to `first + number` from the parts in `out`."""
    items = Items(*results.items) if results.stats else None
    finish_rows[(cdiv(number, 256),)](
        Sums(None, out.top, out.total, out.above),
        x.count,
        y.count,
        results.positive,
        x.list,
        results.log_q,
        AnchorResults(results.loss, results.lse, results.miss, items),
        out.slots,
        s.programs(out.tile),
        first,
        first + number,
        scores.tau,
        TAU_IS_TENSOR=scores.tau_is_tensor,
        STREAM=s.stream,
        BLOCK_M=out.tile.block_m,
        BLOCK_N=out.tile.block_n,
        BLOCK=256,
    )


@kernel
def reduce_loss(
    first_ptr,  # [capacity] loss of each anchor
    second_ptr,  # [capacity], of the other direction, or None
    list_ptr,
    count_ptr,
    weights_ptr,  # [N] or None
    loss_ptr,  # 0-d
    weight_sum_ptr,  # 0-d: what the weighted sum was divided by
    item_loss_ptr,  # [N] or None
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """sum_i w_i loss_i / sum_i w_i in one program: a fixed order, so the same bits every time."""
    count = tl.load(count_ptr)
    losses = tl.zeros([BLOCK], tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK)
        valid = row < count
        loss = tl.load(first_ptr + row, mask=valid, other=0.0)
        if second_ptr is not None:
            loss = 0.5 * (loss + tl.load(second_ptr + row, mask=valid, other=0.0))
        position = tl.load(list_ptr + row, mask=valid, other=0)
        weight = tl.where(valid, 1.0, 0.0)
        if weights_ptr is not None:
            weight = tl.load(weights_ptr + position, mask=valid, other=0.0)
        losses += weight * loss
        weights += weight
        if item_loss_ptr is not None:
            tl.store(item_loss_ptr + position, loss, mask=valid)
    divisor = 1.0
    if MEAN:
        weight = tl.sum(weights, axis=0)
        divisor = tl.where(weight > 0, weight, 1.0)
    tl.store(weight_sum_ptr, divisor)
    tl.store(loss_ptr, tl.sum(losses, axis=0) / divisor)


def reduce_losses(
    p: Problem,
    s: Shape,
    t: Plan,
    weight_sum: Tensor,
    losses: Sequence[Tensor],
    item_loss: Tensor,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, items' losses [N]) from those of the anchors, in one direction or two; `item_loss` is
    where statistics go."""
    per_item = p.reduction == "none"
    items = item_loss
    if per_item and not stats:
        items = torch.zeros(s.rows, dtype=torch.float32, device=s.device)
    loss = torch.empty((), dtype=torch.float32, device=s.device)
    reduce_loss[(1,)](
        losses[0],
        losses[1] if len(losses) == 2 else None,
        t.anchor.list,
        t.counts[0:1],
        p.weights,
        loss,
        weight_sum,
        items if per_item or stats else None,
        MEAN=p.reduction == "mean",
        BLOCK=1024,
    )
    return loss, items
