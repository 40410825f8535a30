"""Triton: unit rows, of items and of reconstructions, made contiguous in the order of a list."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ...loss.problem import Problem
from . import tiles
from .common import Source, kernel, load_rows, unit_scale
from .plan import reconstructed
from .shapes import Shape, cdiv
from .state import LossState, Plan


def e_source(p: Problem) -> Source:
    return Source(p.pv, p.pv_index)


@kernel
def normalize_rows(
    source,  # Source
    list_ptr,
    count_ptr,
    unit_ptr,  # [capacity, STRIDE]
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """e_j = E_j / |E_j| of the listed rows, made contiguous, with zeros from D to STRIDE."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(count_ptr)
    position = tl.load(list_ptr + row, mask=valid, other=0)
    x = load_rows(source, position, valid, D, BLOCK_D).to(tl.float32)
    unit = x * unit_scale(tl.sqrt(tl.sum(x * x, axis=1)))[:, None]
    dims = tl.arange(0, BLOCK_D)
    tl.store(
        unit_ptr + row[:, None] * STRIDE + dims[None, :],
        unit.to(unit_ptr.dtype.element_ty),
        mask=valid[:, None] & (dims < STRIDE)[None, :],
    )


def normalize(source: Source, s: Shape, unit: Tensor, rows: Tensor, count: Tensor) -> None:
    """Unit rows of the source's listed `rows`."""
    normalize_rows[(cdiv(unit.shape[0], s.small.block_m),)](
        source,
        rows,
        count,
        unit,
        D=s.dim,
        STRIDE=s.stride,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )


class UnitRows(NamedTuple):
    """Where R of the listed rows goes: r [capacity, STRIDE], |R| [capacity] and the positive's two
    cosines [capacity, 2]; or, without these two, R as it is into the rows of the batch [N, D]."""

    unit: Any
    norm: Any
    positive: Any


@triton.jit
def store_unit_rows(
    reconstruction,  # [BLOCK_M, BLOCK_D] float32
    e_of,  # Source
    out,  # UnitRows
    position,
    place,
    valid,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """r = R / |R| in the input type, |R|, and cos(R_j, E_j): in float32, and as products of rounded
    rows see it."""
    dims = tl.arange(0, BLOCK_D)
    norm = tl.sqrt(tl.sum(reconstruction * reconstruction, axis=1))
    exact = reconstruction * unit_scale(norm)[:, None]
    unit = exact.to(out.unit.dtype.element_ty)
    tl.store(
        out.unit + place.to(tl.int64)[:, None] * STRIDE + dims[None, :],
        unit,
        mask=valid[:, None] & (dims < STRIDE)[None, :],
    )
    tl.store(out.norm + place, norm, mask=valid)
    e = load_rows(e_of, position, valid, D, BLOCK_D).to(tl.float32)
    e = e * unit_scale(tl.sqrt(tl.sum(e * e, axis=1)))[:, None]
    tl.store(out.positive + place * 2, tl.sum(exact * e, axis=1), mask=valid)
    rounded = e.to(out.unit.dtype.element_ty).to(tl.float32)
    tl.store(
        out.positive + place * 2 + 1, tl.sum(unit.to(tl.float32) * rounded, axis=1), mask=valid
    )


@kernel
def given_rows(
    r_ptr,  # [N, D]
    e_of,  # Source
    list_ptr,
    count_ptr,
    out,  # UnitRows
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """r = R / |R| of the listed rows and the positives' cosines, for an R that is given."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(count_ptr)
    position = tl.load(list_ptr + row, mask=valid, other=0)
    r = load_rows(Source(r_ptr, None), position, valid, D, BLOCK_D).to(tl.float32)
    store_unit_rows(r, e_of, out, position, row, valid, D, STRIDE, BLOCK_D)


def normalize_given(p: Problem, s: Shape, t: LossState, given: Tensor, positive: Tensor) -> None:
    """As `attend`, of an R [N, D] that is known."""
    listed = reconstructed(t)
    given_rows[(cdiv(s.rows, s.small.block_m),)](
        given,
        e_source(p),
        listed.list,
        listed.count,
        UnitRows(t.r, t.norm, positive),
        D=s.dim,
        STRIDE=s.stride,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )


@kernel
def given_gradient(
    grad_ptr,  # [N, D] contiguous
    list_ptr,
    count_ptr,
    dr_ptr,  # [capacity, STRIDE]
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """The rows of a given dL/dR that `reconstruct` listed."""
    dims = tl.arange(0, BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(count_ptr)
    position = tl.load(list_ptr + row, mask=valid, other=0)
    grad = load_rows(Source(grad_ptr, None), position, valid, D, BLOCK_D)
    tl.store(
        dr_ptr + row[:, None] * STRIDE + dims[None, :],
        grad,
        mask=valid[:, None] & (dims < STRIDE)[None, :],
    )


def list_gradient(s: Shape, t: Plan, grad: Tensor, dr: Tensor) -> None:
    """dL/dR [N, D] to the rows [capacity, STRIDE] of the list."""
    listed = reconstructed(t)
    given_gradient[(cdiv(s.rows, s.small.block_m),)](
        grad.contiguous(),
        listed.list,
        listed.count,
        dr,
        D=s.dim,
        STRIDE=s.stride,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )


@kernel
def gather_anchors(
    unit_ptr,  # [capacity, STRIDE] r of every reconstructed item
    positive_ptr,  # [capacity, 2]
    reconstructed_place_ptr,  # [N]
    list_ptr,
    count_ptr,
    anchor_unit_ptr,
    anchor_positive_ptr,
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """r and the positives' cosines of the anchors, where more than those were reconstructed."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(count_ptr)
    position = tl.load(list_ptr + row, mask=valid, other=0)
    place = (tl.load(reconstructed_place_ptr + position, mask=valid, other=1) - 1).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    mask = valid[:, None] & (dims < STRIDE)[None, :]
    unit = tl.load(unit_ptr + place[:, None] * STRIDE + dims[None, :], mask=mask, other=0.0)
    tl.store(anchor_unit_ptr + row[:, None] * STRIDE + dims[None, :], unit, mask=mask)
    for part in tl.static_range(2):
        cosine = tl.load(positive_ptr + place * 2 + part, mask=valid, other=0.0)
        tl.store(anchor_positive_ptr + row * 2 + part, cosine, mask=valid)


def run_gather_anchors(s: Shape, t: LossState, every: Tensor, positive: Tensor) -> None:
    """r and the positives' cosines of the anchors, from those of every reconstructed row."""
    gather_anchors[(cdiv(s.rows, s.small.block_m),)](
        t.r,
        every,
        t.places[1],
        t.anchor.list,
        t.counts[0:1],
        t.r_anchor,
        positive,
        STRIDE=s.stride,
        BLOCK_M=s.small.block_m,
        BLOCK_D=tiles.next_power_of_2(s.stride),
        num_warps=s.small.num_warps,
    )
