"""Triton: rows of a contrast pass from the parts that it left, where nothing else is to be computed
from them."""

from __future__ import annotations

import triton.language as tl

from .common import kernel
from .epilogue import pass_rows


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
