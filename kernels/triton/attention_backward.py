"""Triton: the gradients of the attention (attention.py), of the same rounded products as they are
subtracted from each other."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...loss.problem import Needs, Problem
from . import tiles
from .attention import (
    History,
    Operand,
    above_top,
    ascending,
    attention_sources,
    attention_tiles,
    head_mask,
    history_block,
    list_tile,
    products,
    softmax_block,
)
from .common import kernel, load_source, places_before, source_row
from .plan import reconstructed
from .shapes import Shape, cdiv
from .state import Plan


@triton.jit
def operand(source, row, mask, DOT_TYPE: tl.constexpr, how: tl.constexpr):
    """Rows of a source as an operand, at hand where whole ones fit."""
    rows = mask
    if how.BLOCK_C == how.BLOCK_D:
        rows = load_source(source, row, mask, how).to(DOT_TYPE)
    return Operand(rows, source.rows, source_row(source, row, mask) * how.D, mask)


@triton.jit
def gradient_operand(dr_ptr, place, valid, DOT_TYPE: tl.constexpr, how: tl.constexpr):
    """dL/dR of the listed rows as an operand, at hand where whole ones fit."""
    start = place.to(tl.int64) * how.STRIDE
    rows = valid
    if how.BLOCK_C == how.BLOCK_D:
        dims = tl.arange(0, how.BLOCK_D)
        rows = tl.load(
            dr_ptr + start[:, None] + dims[None, :],
            mask=valid[:, None] & (dims < how.D)[None, :],
            other=0.0,
        ).to(DOT_TYPE)
    return Operand(rows, dr_ptr, start, valid)


@triton.jit
def of_head(x, head, DOT_TYPE: tl.constexpr, how: tl.constexpr):
    """An operand masked to a head, where there are several and its rows are at hand."""
    rows = x.rows
    if how.HEADS > 1 and how.BLOCK_C == how.BLOCK_D:
        dims = tl.arange(0, how.BLOCK_D)
        own = head_mask(dims, head, how.D // how.HEADS)[None, :]
        rows = tl.where(own, rows, 0.0).to(DOT_TYPE)
    return Operand(rows, x.ptr, x.start, x.mask)


@triton.jit
def attention_weights(
    q,
    k,
    mine,
    sums_ptr,
    place,
    valid,
    head,
    capacity,
    scale,
    DOT_TYPE: tl.constexpr,
    how: tl.constexpr,
):
    """a_jk [BLOCK_M, BLOCK_H] of the largest product and 1 / sum of a row's softmax, which
    `attend_sums` has left. With both and not with one log-sum-exp: of rows of length 1,000 that is
    rounded to whole numbers."""
    where = head * capacity.to(tl.int64) + place
    top = tl.load(sums_ptr + where, mask=valid, other=0.0)
    share = tl.load(sums_ptr + how.HEADS * capacity.to(tl.int64) + where, mask=valid, other=0.0)
    s = ascending(products(q, k, head, DOT_TYPE, how), scale)
    return tl.where(mine, above_top(s, top[:, None], scale) * share[:, None], 0.0)


@triton.jit
def finite(x):
    """x with 0 for NaN and inf: for operands whose rows of other pages meet a zero factor."""
    return tl.where(tl.abs(x.to(tl.float32)) < float("inf"), x, 0.0).to(x.dtype)


@kernel
def attend_sums(
    q_of,
    k_of,
    v_of,
    history,
    listed,
    sums_ptr,  # [3, HEADS, capacity]
    dr_ptr,  # [capacity, STRIDE]
    capacity,
    history_rows,
    scale,
    DOT_TYPE: tl.constexpr,
    how: tl.constexpr,
):
    """Of each row and head the largest q_j . k_k, 1 / sum of exp, and delta_j = sum_k a_jk (dL/dR_j
    . v_k), of the same rounded products that it is subtracted from. dL/dR_j . R_j is equal on
    paper, but where a is 1 the difference must be 0: what is left of it is multiplied by rows as
    long as they are.

    These numbers and the gradients are of the same products, to the last bit: tiles of the list and
    blocks of history begin at multiples of their sizes in all three kernels, so that each product
    is of the same operands, at the same places in them."""
    start = tl.program_id(0) * how.BLOCK_M
    count = tl.load(listed.count)
    if start >= count:
        return
    place, valid, position, page, first, last = list_tile(listed, count, start, how.BLOCK_M)
    low = tl.load(history.offsets + first)
    high = tl.load(history.offsets + last + 1)
    q = operand(q_of, position, valid, DOT_TYPE, how)
    dr = gradient_operand(dr_ptr, place, valid, DOT_TYPE, how)
    for head in range(how.HEADS):
        q_head = of_head(q, head, DOT_TYPE, how)
        dr_head = of_head(dr, head, DOT_TYPE, how)
        top = tl.full([how.BLOCK_M], -float("inf"), tl.float32)
        total = tl.full([how.BLOCK_M], 0.0, tl.float32)
        delta = tl.full([how.BLOCK_M], 0.0, tl.float32)
        for block in range(low // how.BLOCK_H * how.BLOCK_H, high, how.BLOCK_H):
            row, real, mine = history_block(history, block, history_rows, page, how.BLOCK_H)
            k = operand(k_of, row, real, DOT_TYPE, how)
            v = operand(v_of, row, real, DOT_TYPE, how)
            s = products(q_head, k, head, DOT_TYPE, how)
            da = products(dr_head, v, head, DOT_TYPE, how)
            p, rescale, top = softmax_block(s, mine, top, scale)
            total = total * rescale + tl.sum(p, axis=1)
            delta = delta * rescale + tl.sum(tl.where(mine, p * da, 0.0), axis=1)
        where = head * capacity.to(tl.int64) + place
        share = 1.0 / tl.where(total == 0.0, 1.0, total)
        tl.store(sums_ptr + where, tl.where(top == -float("inf"), 0.0, top), mask=valid)
        after = how.HEADS * capacity.to(tl.int64)
        tl.store(sums_ptr + after + where, share, mask=valid)
        tl.store(sums_ptr + 2 * after + where, delta * share, mask=valid)


@kernel
def attend_dq(
    q_of,
    k_of,
    v_of,
    history,
    listed,
    sums_ptr,  # [3, HEADS, capacity]
    dr_ptr,  # [capacity, STRIDE]
    capacity,
    history_rows,
    scale,
    # [capacity, DQ_STRIDE]; may be dr_ptr: a program reads its own rows of dr before it writes them
    dq_ptr,
    DQ_STRIDE: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    how: tl.constexpr,
):
    """dL/dq_j = c sum_k a_jk (dL/dR_j . v_k - delta_j) k_k."""
    start = tl.program_id(0) * how.BLOCK_M
    count = tl.load(listed.count)
    if start >= count:
        return
    dims = tl.arange(0, how.BLOCK_D)
    place, valid, position, page, first, last = list_tile(listed, count, start, how.BLOCK_M)
    low = tl.load(history.offsets + first)
    high = tl.load(history.offsets + last + 1)
    q = operand(q_of, position, valid, DOT_TYPE, how)
    dr = gradient_operand(dr_ptr, place, valid, DOT_TYPE, how)
    dq = tl.full([how.BLOCK_M, how.BLOCK_D], 0.0, tl.float32)
    for head in range(how.HEADS):
        where = (2 * how.HEADS + head) * capacity.to(tl.int64) + place
        delta = tl.load(sums_ptr + where, mask=valid, other=0.0)
        q_head = of_head(q, head, DOT_TYPE, how)
        dr_head = of_head(dr, head, DOT_TYPE, how)
        acc = tl.full([how.BLOCK_M, how.BLOCK_D], 0.0, tl.float32)
        for block in range(low // how.BLOCK_H * how.BLOCK_H, high, how.BLOCK_H):
            row, real, mine = history_block(history, block, history_rows, page, how.BLOCK_H)
            k = load_source(k_of, row, real, how).to(DOT_TYPE)
            v = operand(v_of, row, real, DOT_TYPE, how)
            k_start = source_row(k_of, row, real) * how.D
            a = attention_weights(
                q_head,
                Operand(k, k_of.rows, k_start, real),
                mine,
                sums_ptr,
                place,
                valid,
                head,
                capacity,
                scale,
                DOT_TYPE,
                how,
            )
            da = products(dr_head, v, head, DOT_TYPE, how)
            ds = tl.where(mine, a * (da - delta[:, None]), 0.0)
            acc = tl.dot(ds.to(DOT_TYPE), finite(k), acc, input_precision=how.PRECISION)
        if how.HEADS > 1:
            acc = tl.where(head_mask(dims, head, how.D // how.HEADS)[None, :], acc, 0.0)
        dq += acc
    where = place.to(tl.int64)[:, None] * DQ_STRIDE + dims[None, :]
    tl.store(
        dq_ptr + where,
        (dq * scale).to(dq_ptr.dtype.element_ty),
        mask=valid[:, None] & (dims < how.D)[None, :],
    )


@kernel
def attend_dkv(
    q_of,
    k_of,
    v_of,
    history,
    listed,
    sums_ptr,  # [3, HEADS, capacity]
    dr_ptr,  # [capacity, STRIDE]
    capacity,
    history_rows,
    scale,
    pv_offsets_ptr,
    place_ptr,  # prefix sums that made the list
    dk_ptr,  # [K, D], or None as dv_ptr
    dv_ptr,  # [K, D]
    SUM_KV: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    BLOCK_O: tl.constexpr,
    how: tl.constexpr,
):
    """dL/dv_k = sum_j a_jk dL/dR_j and dL/dk_k = c sum_j a_jk (dL/dR_j . v_k - delta_j) q_j;
    SUM_KV: their sum to dk."""
    # The second grid axis walks over slices of BLOCK_O output dimensions, all of them in one where
    # registers allow.
    dims = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    row = tl.program_id(0).to(tl.int64) * how.BLOCK_H + tl.arange(0, how.BLOCK_H)
    history_page = tl.load(history.page + row, mask=row < history_rows, other=-1)
    real = history_page >= 0
    first = tl.min(tl.where(real, history_page, 2147483647), axis=0)
    last = tl.max(history_page, axis=0)
    there = last >= 0
    low = places_before(place_ptr, tl.load(pv_offsets_ptr + first, mask=there, other=0))
    high = places_before(place_ptr, tl.load(pv_offsets_ptr + last + 1, mask=there, other=0))
    k = operand(k_of, row, real, DOT_TYPE, how)
    v = operand(v_of, row, real, DOT_TYPE, how)
    dk = tl.full([how.BLOCK_H, BLOCK_O], 0.0, tl.float32)
    dv = tl.full([how.BLOCK_H, BLOCK_O], 0.0, tl.float32)
    count = tl.load(listed.count)
    for start in range(low // how.BLOCK_M * how.BLOCK_M, high, how.BLOCK_M):
        place = start + tl.arange(0, how.BLOCK_M)
        valid = place < count
        position = tl.load(listed.list + place, mask=valid, other=0)
        page = tl.load(listed.page + place, mask=valid, other=-2)
        mine = page[:, None] == history_page[None, :]
        q_start = source_row(q_of, position, valid) * how.D
        dr_start = place.to(tl.int64) * how.STRIDE
        inside = valid[:, None] & (dims < how.D)[None, :]
        q = tl.load(q_of.rows + q_start[:, None] + dims[None, :], mask=inside, other=0.0).to(
            DOT_TYPE
        )
        dr = tl.load(dr_ptr + dr_start[:, None] + dims[None, :], mask=inside, other=0.0).to(
            DOT_TYPE
        )
        for head in range(how.HEADS):
            where = (2 * how.HEADS + head) * capacity.to(tl.int64) + place
            delta = tl.load(sums_ptr + where, mask=valid, other=0.0)
            if how.HEADS > 1:
                own = head_mask(dims, head, how.D // how.HEADS)[None, :]
                q_head = tl.where(own, q, 0.0).to(DOT_TYPE)
                dr_head = tl.where(own, dr, 0.0).to(DOT_TYPE)
            else:
                q_head = q
                dr_head = dr
            a = attention_weights(
                Operand(q_head, q_of.rows, q_start, valid),
                k,
                mine,
                sums_ptr,
                place,
                valid,
                head,
                capacity,
                scale,
                DOT_TYPE,
                how,
            )
            if dv_ptr is not None or SUM_KV:
                dv = tl.dot(tl.trans(a.to(DOT_TYPE)), dr_head, dv, input_precision=how.PRECISION)
            if dk_ptr is not None:
                da = products(
                    Operand(dr_head, dr_ptr, dr_start, valid),
                    v,
                    head,
                    DOT_TYPE,
                    how,
                )
                ds = tl.where(mine, a * (da - delta[:, None]), 0.0) * scale
                dk = tl.dot(tl.trans(ds.to(DOT_TYPE)), q_head, dk, input_precision=how.PRECISION)
    where = row[:, None] * how.D + dims[None, :]
    mask = (row < history_rows)[:, None] & (dims < how.D)[None, :]
    if SUM_KV:
        dk += dv
    if dk_ptr is not None:
        tl.store(dk_ptr + where, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    if dv_ptr is not None:
        tl.store(dv_ptr + where, dv.to(dv_ptr.dtype.element_ty), mask=mask)


# ---- launches ------------------------------------------------------------------------------------


def empty_history(
    p: Problem, s: Shape, needs: Needs, new: Any = torch.empty
) -> tuple[Tensor | None, Tensor | None]:
    """(dk, dv) for a kernel to fill, None where nobody wants it; where key and value are both the
    history, dk is for their sum and dv None."""

    def output(role: str) -> Tensor | None:
        if not needs.of(p, role):
            return None
        kind = torch.float32 if p.input_of(role) == "pv" else s.dtype
        return new(s.history_rows, s.dim, dtype=kind, device=s.device)

    together = p.key is None and p.value is None
    return output("key"), None if together else output("value")


def attention_backward(
    p: Problem, s: Shape, t: Plan, needs: Needs, dr: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq of the listed rows, dk, dv) as of `empty_history`.

    dr is lost: dq takes its place where it can.
    """
    inputs = (
        *attention_sources(p),
        History(p.history_offsets, t.history_page),
        reconstructed(t),
    )
    sums = torch.empty(3, s.heads, s.rows, dtype=torch.float32, device=s.device)
    sizes = s.rows, s.history_rows, p.attention_scale
    constants = {
        # float16 has too little range for gradients of a mean over many anchors: their products run
        # in tf32.
        "DOT_TYPE": tl.bfloat16 if s.dtype == torch.bfloat16 else tl.float32,
        "how": attention_tiles(s, s.backward),
        **s.backward.launch,
    }
    grid = (cdiv(s.rows, s.backward.block_m),)
    attend_sums[grid](*inputs, sums, dr, *sizes, **constants)
    dk, dv = empty_history(p, s, needs)
    if dk is not None or dv is not None:
        whole = constants["how"].BLOCK_C == s.block_d
        width = s.block_d if whole else min(s.block_d, tiles.LARGEST_REGISTER_DIM)
        attend_dkv[(cdiv(s.history_rows, s.backward.block_n), cdiv(s.block_d, width))](
            *inputs,
            sums,
            dr,
            *sizes,
            p.pv_offsets,
            t.places[int(s.identify)],
            dk,
            dv,
            SUM_KV=p.key is None and p.value is None,
            BLOCK_O=width,
            **constants,
        )
    if not needs.of(p, "query"):
        return None, dk, dv
    # Occurrences of a table's items are summed: they stay in float32 until then, and so does what
    # float16 cannot hold.
    wide = (p.history is None and p.query is None) or s.dtype == torch.float16
    dq = torch.empty(s.rows, s.dim, dtype=torch.float32, device=s.device) if wide else dr
    attend_dq[grid](*inputs, sums, dr, *sizes, dq, DQ_STRIDE=dq.shape[1], **constants)
    return dq, dk, dv
