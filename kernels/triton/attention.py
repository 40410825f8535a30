"""Triton: attention of PV items over their page's history, packed and ragged, and its gradients.

A tile of listed PV rows walks the history rows of all pages between its first and its last: history
is contiguous by page, so pages of any length need no padding, and what belongs to another page is
masked (a block-diagonal tile).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import (
    LOG2E,
    kernel,
    load_rows,
    load_source,
    rank_before,
    source_row,
    unit_scale,
)


@triton.jit
def head_mask(dims, head, HEAD_DIM: tl.constexpr):
    """Which dimensions belong to a head: a masked product costs little here, and any D and head
    count work."""
    return (dims >= head * HEAD_DIM) & (dims < (head + 1) * HEAD_DIM)


class Operand(NamedTuple):
    """Rows of a product [rows, BLOCK_D], masked to a head; or, with BLOCK_C < BLOCK_D, where in
    memory they are."""

    rows: Any
    ptr: Any
    start: Any  # [rows] int64 offsets
    mask: Any


class Tiles(NamedTuple):
    """What is constant in the attention to a history."""

    D: Any
    STRIDE: Any  # of r and dL/dR
    HEADS: Any
    BLOCK_M: Any
    BLOCK_H: Any
    BLOCK_D: Any
    BLOCK_C: Any
    PRECISION: Any


class History(NamedTuple):
    """Which rows are of which page."""

    offsets: Any  # [B + 1]
    page: Any  # [K], -1 for padding


class Listing(NamedTuple):
    """The PV rows that have an R [capacity], their pages, and how many they are."""

    list: Any
    page: Any
    count: Any


class UnitRows(NamedTuple):
    """Where R of the listed rows goes: r [capacity, STRIDE], |R| [capacity] and the positive's two
    cosines [capacity, 2]; or, without these two, R as it is into the rows of the batch [N, D]."""

    unit: Any
    norm: Any
    positive: Any


@triton.jit
def leading(x):
    """The leading bits of rows, so few that sums of products of such numbers are exact."""
    wide: tl.constexpr = x.shape[1]
    lift: tl.constexpr = 2.0**15 if wide <= 16 else 2.0**16
    lifted = tl.max(tl.abs(x), axis=1)[:, None] * lift
    return (x + lifted) - lifted


@triton.jit
def row_products(a, b, PRECISION: tl.constexpr):
    """a_i . b_j. What is exact in float32 is as good as rounded once, in three products: a logit of
    two rows of length 300 is off by 1e-3 otherwise, and so is its exponential. Rows of more than 64
    dimensions would take too many registers."""
    if PRECISION == "ieee" and a.dtype == tl.float32 and a.shape[1] <= 64:
        first_a = leading(a)
        first_b = leading(b)
        rest = tl.dot(first_a, tl.trans(b - first_b), input_precision=PRECISION)
        rest = tl.dot(a - first_a, tl.trans(b), rest, input_precision=PRECISION)
        return tl.dot(first_a, tl.trans(first_b), input_precision=PRECISION) + rest
    else:
        return tl.dot(a, tl.trans(b), input_precision=PRECISION)


@triton.jit
def products(a, b, head, DOT_TYPE: tl.constexpr, how: tl.constexpr):
    """a_i . b_j [BLOCK_A, BLOCK_B] of one head; where whole rows are too many registers, from
    memory in parts of BLOCK_C."""
    precision: tl.constexpr = how.PRECISION
    if how.BLOCK_C == how.BLOCK_D:
        return row_products(a.rows, b.rows, precision)
    s = tl.zeros([a.start.shape[0], b.start.shape[0]], tl.float32)
    for first in range(0, how.D, how.BLOCK_C):
        dims = first + tl.arange(0, how.BLOCK_C)
        inside = dims < how.D
        if how.HEADS > 1:
            inside = inside & head_mask(dims, head, how.D // how.HEADS)
        part_a = tl.load(
            a.ptr + a.start[:, None] + dims[None, :],
            mask=a.mask[:, None] & inside[None, :],
            other=0.0,
        )
        part_b = tl.load(
            b.ptr + b.start[:, None] + dims[None, :],
            mask=b.mask[:, None] & inside[None, :],
            other=0.0,
        )
        s += row_products(part_a.to(DOT_TYPE), part_b.to(DOT_TYPE), precision)
    return s


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
def history_block(history, start, end, page, BLOCK_H: tl.constexpr):
    """Rows of a block of history [BLOCK_H], which of them are real, and who may attend to them
    [BLOCK_M, BLOCK_H]."""
    row = start + tl.arange(0, BLOCK_H)
    history_page = tl.load(history.page + row, mask=row < end, other=-1)
    return row, history_page >= 0, page[:, None] == history_page[None, :]


@triton.jit
def ascending(products, scale):
    """q_j . k_k, so that a larger one has the larger weight."""
    return products * tl.where(scale < 0.0, -1.0, 1.0)


@triton.jit
def above_top(s, top, scale):
    """exp(|c| (s - top)) of such products. The difference first: the largest has exactly 1 however
    long the rows are, whether or not the compiler joins a product and a sum into one operation."""
    return tl.exp2((s - top) * (tl.abs(scale) * LOG2E))


@triton.jit
def softmax_block(s, mine, top, scale):
    """exp of a block's logits beside the largest so far, what the sums before it are multiplied by,
    and the new largest."""
    s = tl.where(mine, ascending(s, scale), -float("inf"))
    new_top = tl.maximum(top, tl.max(s, axis=1))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    p = tl.where(mine, above_top(s, shift[:, None], scale), 0.0)
    rescale = tl.where(top == -float("inf"), 0.0, above_top(top, shift, scale))
    return p, rescale, new_top


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
    where = head * capacity + place
    top = tl.load(sums_ptr + where, mask=valid, other=0.0)
    share = tl.load(sums_ptr + how.HEADS * capacity + where, mask=valid, other=0.0)
    s = ascending(products(q, k, head, DOT_TYPE, how), scale)
    return tl.where(mine, above_top(s, top[:, None], scale) * share[:, None], 0.0)


@triton.jit
def attend_tile(
    q_of,  # Source, as k_of and v_of
    k_of,
    v_of,
    history,
    position,  # [BLOCK_M] PV rows
    page,  # [BLOCK_M], -2 where there is no row
    first_page,
    last_page,
    scale,
    how: tl.constexpr,
):
    """R_j = sum_k a_jk v_k, a_jk = softmax over k in H_b of (c q_j . k_k), as float32 [BLOCK_M,
    BLOCK_D]."""
    dims = tl.arange(0, how.BLOCK_D)
    low = tl.load(history.offsets + first_page)
    high = tl.load(history.offsets + last_page + 1)
    q_start = source_row(q_of, position, page >= 0) * how.D
    q = page
    if how.BLOCK_C == how.BLOCK_D:
        q = load_source(q_of, position, page >= 0, how)
    result = tl.full([how.BLOCK_M, how.BLOCK_D], 0.0, tl.float32)
    for head in range(how.HEADS):
        q_head = q
        if how.HEADS > 1 and how.BLOCK_C == how.BLOCK_D:
            q_head = tl.where(head_mask(dims, head, how.D // how.HEADS)[None, :], q, 0.0).to(
                q.dtype
            )
        top = tl.full([how.BLOCK_M], -float("inf"), tl.float32)
        total = tl.full([how.BLOCK_M], 0.0, tl.float32)
        acc = tl.full([how.BLOCK_M, how.BLOCK_D], 0.0, tl.float32)
        for start in range(low, high, how.BLOCK_H):
            row, real, mine = history_block(history, start, high, page, how.BLOCK_H)
            k = real
            if how.BLOCK_C == how.BLOCK_D:
                k = load_source(k_of, row, real, how)
            k_start = source_row(k_of, row, real) * how.D
            s = products(
                Operand(q_head, q_of.rows, q_start, page >= 0),
                Operand(k, k_of.rows, k_start, real),
                head,
                q_of.rows.dtype.element_ty,
                how,
            )
            p, rescale, top = softmax_block(s, mine, top, scale)
            total = total * rescale + tl.sum(p, axis=1)
            v = load_source(v_of, row, real, how)
            # A NaN or inf of another page must not come in through 0 * NaN; one of the own page
            # must.
            bad = tl.max(
                tl.where(tl.abs(v.to(tl.float32)) < float("inf"), 0, 1), axis=1
            )  # [BLOCK_H]
            v = tl.where(bad[:, None] != 0, 0.0, v).to(v.dtype)
            poisoned = tl.max(tl.where(mine & (bad[None, :] != 0), 1, 0), axis=1)
            acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision=how.PRECISION)
            acc = tl.where(poisoned[:, None] != 0, float("nan"), acc)
        if how.HEADS > 1:
            acc = tl.where(head_mask(dims, head, how.D // how.HEADS)[None, :], acc, 0.0)
        result += acc / tl.where(total == 0.0, 1.0, total)[:, None]
    return result


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


@triton.jit
def list_tile(listed, count, start, BLOCK_M: tl.constexpr):
    """A tile of a compacted list: places, validity, PV rows, pages (-2: none), the page range."""
    place = start + tl.arange(0, BLOCK_M)
    valid = place < count
    position = tl.load(listed.list + place, mask=valid, other=0)
    page = tl.load(listed.page + place, mask=valid, other=-2)
    first = tl.load(listed.page + start)
    last = tl.load(listed.page + tl.minimum(start + BLOCK_M, count) - 1)
    return place, valid, position, page, first, last


@kernel
def attend(
    q_of,  # Source, as all of that name
    k_of,
    v_of,
    e_of,
    history,  # History
    listed,  # Listing
    out,  # UnitRows
    scale,
    how: tl.constexpr,  # Tiles
):
    """R of the listed PV rows."""
    start = tl.program_id(0) * how.BLOCK_M
    count = tl.load(listed.count)
    if start >= count:
        return
    place, valid, position, page, first, last = list_tile(listed, count, start, how.BLOCK_M)
    r = attend_tile(q_of, k_of, v_of, history, position, page, first, last, scale, how)
    if out.norm is None:
        dims = tl.arange(0, how.BLOCK_D)
        where = position.to(tl.int64)[:, None] * how.D + dims[None, :]
        tl.store(
            out.unit + where,
            r.to(out.unit.dtype.element_ty),
            mask=valid[:, None] & (dims < how.D)[None, :],
        )
    else:
        store_unit_rows(r, e_of, out, position, place, valid, how.D, how.STRIDE, how.BLOCK_D)


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
        where = head * capacity + place
        share = 1.0 / tl.where(total == 0.0, 1.0, total)
        tl.store(sums_ptr + where, tl.where(top == -float("inf"), 0.0, top), mask=valid)
        tl.store(sums_ptr + how.HEADS * capacity + where, share, mask=valid)
        tl.store(sums_ptr + 2 * how.HEADS * capacity + where, delta * share, mask=valid)


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
        delta = tl.load(sums_ptr + (2 * how.HEADS + head) * capacity + place, mask=valid, other=0.0)
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
    rank_ptr,  # prefix sums that made the list
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
    low = rank_before(rank_ptr, tl.load(pv_offsets_ptr + first, mask=there, other=0))
    high = rank_before(rank_ptr, tl.load(pv_offsets_ptr + last + 1, mask=there, other=0))
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
            delta = tl.load(
                sums_ptr + (2 * how.HEADS + head) * capacity + place, mask=valid, other=0.0
            )
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
