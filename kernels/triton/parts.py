"""Triton: rows of a contrast pass, and their gradients, from the parts that it left."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .common import kernel, parts_of, schedule
from .contrast import Pass, PassSide
from .shapes import Shape, cdiv
from .state import Kept


class Upstream(NamedTuple):
    """The gradient of the loss [0-d] and what makes g of it; and the factor of a transposed pass
    that left g out."""

    # [capacity], None where it is the same for every anchor: a mean or a sum without weights
    g: Any
    grad: Any
    weight_sum: Any  # 0-d
    share: Any
    lower: Any
    factor: Any  # 0-d, None where the pass had g in it


NO_UPSTREAM = Upstream(None, None, None, None, None, None)


class Parts(NamedTuple):
    """What a contrast pass left: parts of rows."""

    acc: Any  # [slots * TILE_M, STRIDE]
    # Of a forward pass; parts of a transposed one are summed as they are.
    top: Any = None  # [slots * TILE_M]
    lse: Any = None  # [capacity]
    miss: Any = None  # [capacity] 1 - p of the positive


NO_PARTS = Parts(None)


class PassTiles(NamedTuple):
    """The constants of that."""

    STREAM: Any
    STRIDE: Any
    TILE_M: Any
    TILE_N: Any
    BLOCK_D: Any


class RowTiles(NamedTuple):
    """The constants of gradients of rows that two such passes left parts of."""

    D: Any
    STRIDE: Any
    ahead: Any  # PassTiles of the forward pass
    back: Any  # of the transposed one
    BLOCK_M: Any
    BLOCK_D: Any


@triton.jit
def uniform_gradient(up):
    """g where it is the same for every anchor."""
    return tl.load(up.grad) / tl.load(up.weight_sum) * up.share


@triton.jit
def anchor_gradient(up, anchor, is_anchor):
    """g_i of anchors, 0 for other rows."""
    if up.g is None:
        return tl.where(is_anchor, uniform_gradient(up), 0.0)
    else:
        return tl.load(up.g + anchor, mask=is_anchor, other=0.0)


@triton.jit
def with_factor(x, up):
    """What a transposed pass left, times what it left out."""
    if up.factor is not None:
        x *= tl.load(up.factor)
    elif up.g is None:
        x *= uniform_gradient(up) * up.lower
    return x


@triton.jit
def pass_rows(passed, count_ptr, other_count_ptr, slots, programs, row, valid, how: tl.constexpr):
    """Rows [BLOCK_M] of a pass: sum_j p_ij y_j from the parts that a forward pass left, the plain
    sum of a transposed one's. How many there are of a row, the counts decide (`schedule`)."""
    dims = tl.arange(0, how.BLOCK_D)
    if passed.top is not None:
        lse = tl.load(passed.lse + row, mask=valid, other=0.0)
    _tiles, blocks, parts, share = schedule(
        tl.load(count_ptr),
        tl.load(other_count_ptr),
        slots,
        programs,
        how.TILE_M,
        how.TILE_N,
        how.STREAM,
    )
    first, number = parts_of((row // how.TILE_M).to(tl.int64), blocks, parts, share)
    result = tl.full([row.shape[0], how.BLOCK_D], 0.0, tl.float32)
    for part in range(tl.max(tl.where(valid, number, 0), axis=0)):
        slot = (first + part) * how.TILE_M + row % how.TILE_M
        there = valid & (part < number)
        if passed.top is not None:
            factor = tl.exp2(tl.load(passed.top + slot, mask=there, other=0.0) - lse)
        x = tl.load(
            passed.acc + slot[:, None] * how.STRIDE + dims[None, :],
            mask=there[:, None] & (dims < how.STRIDE)[None, :],
            other=0.0,
        ).to(tl.float32)
        if passed.top is not None:
            x *= tl.where(there, factor, 0.0)[:, None]
        result += x
    return result


def pass_tiles(s: Shape, tile: tiles.Tile) -> PassTiles:
    return PassTiles(s.stream, s.stride, tile.block_m, tile.block_n, s.block_d)


def row_tiles(s: Shape) -> RowTiles:
    passes = pass_tiles(s, s.tile), pass_tiles(s, s.transposed)
    return RowTiles(s.dim, s.stride, *passes, s.small.block_m, s.block_d)


def forward_parts(kept: Kept | None) -> Parts:
    """What the forward pass of a direction left, if there was one."""
    return NO_PARTS if kept is None else Parts(kept.acc, kept.top, kept.lse, kept.miss)


@kernel
def collect_rows(
    passed,  # Parts
    count_ptr,
    other_count_ptr,
    out_ptr,  # [rows, D] float32
    slots,
    programs,
    D: tl.constexpr,
    how: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum_j p_ij y_j of the rows, or the plain sum of their parts."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(count_ptr)
    found = pass_rows(passed, count_ptr, other_count_ptr, slots, programs, row, valid, how)
    dims = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + row[:, None] * D + dims[None, :], found, mask=valid[:, None] & (dims < D)[None, :]
    )


def collect(s: Shape, out: Pass, x: PassSide, y: PassSide, lse: Tensor | None) -> Tensor:
    """sum_j p_ij y_j [rows, D] of a forward pass, whose log-sum-exps are known; the plain sums of
    a transposed one."""
    n = x.unit.shape[0]
    found = torch.zeros(n, s.dim, dtype=torch.float32, device=s.device)
    collect_rows[(cdiv(n, s.small.block_m),)](
        Parts(out.acc, None if lse is None else out.top, lse),
        x.count,
        y.count,
        found,
        out.slots,
        s.programs(out.tile),
        D=s.dim,
        how=pass_tiles(s, out.tile),
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    return found
