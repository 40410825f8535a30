"""Triton: rows of a contrast pass from the parts that it left, where nothing else is to be computed
from them."""

from __future__ import annotations

import triton.language as tl

from .common import kernel
from .epilogue import Parts, PassTiles, pass_rows


@kernel
def collect_rows(
    acc_ptr,  # what a pass left
    top_ptr,
    lse_ptr,  # [rows] in powers of two; not read with SUM
    count_ptr,
    other_count_ptr,
    out_ptr,  # [rows, D] float32
    slots,
    programs,
    D: tl.constexpr,
    STRIDE: tl.constexpr,
    SUM: tl.constexpr,
    STREAM: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """sum_j p_ij y_j of the rows, or with SUM the plain sum of their parts."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    valid = row < tl.load(count_ptr)
    how: tl.constexpr = PassTiles(STREAM, STRIDE, TILE_M, TILE_N, BLOCK_D)
    if SUM:
        passed = Parts(acc_ptr, count_ptr, other_count_ptr, slots, programs)
        found = pass_rows(passed, row, valid, how)
    else:
        passed = Parts(acc_ptr, count_ptr, other_count_ptr, slots, programs, top_ptr, lse_ptr)
        found = pass_rows(passed, row, valid, how)
    dims = tl.arange(0, BLOCK_D)
    tl.store(
        out_ptr + row[:, None] * D + dims[None, :], found, mask=valid[:, None] & (dims < D)[None, :]
    )
