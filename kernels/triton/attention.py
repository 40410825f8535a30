"""Triton: attention of PV items over their page's history, packed and ragged (its gradients:
attention_backward.py).

A tile of listed PV rows walks the history rows of all pages between its first and its last: history
is contiguous by page, so pages of any length need no padding, and what belongs to another page is
masked (a block-diagonal tile).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...loss.problem import Problem
from . import tiles
from .common import LOG2E, Source, kernel, load_source, source_row
from .plan import reconstructed
from .rows import UnitRows, e_source, store_unit_rows
from .shapes import Shape, cdiv
from .state import Plan


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


# ---- launches ------------------------------------------------------------------------------------


def attention_sources(p: Problem) -> tuple[Source, Source, Source]:
    """q, k and v."""
    if not p.attention_scale:
        # Nobody asks: what q and k hold may be infinite, and 0 times that is not 0.
        zero = torch.zeros(1, p.pv.shape[1], dtype=p.pv.dtype, device=p.pv.device)
        q, k = (Source(zero, p.pv_offsets.new_zeros(n)) for n in (p.num_pv, p.num_history))
    else:
        q = e_source(p) if p.query is None else Source(p.query, None)
        k = _history_source(p) if p.key is None else Source(p.key, None)
    return q, k, _history_source(p) if p.value is None else Source(p.value, None)


def _history_source(p: Problem) -> Source:
    return Source(p.pv if p.history is None else p.history, p.history_index)


def attention_tiles(s: Shape, tile: tiles.Tile) -> Tiles:
    part = tiles.attention_part(s.block_d)
    return Tiles(s.dim, s.stride, s.heads, tile.block_m, tile.block_n, s.block_d, part, s.precision)


def run_attention(
    p: Problem,
    s: Shape,
    t: Plan,
    out: Tensor,
    norm: Tensor | None = None,
    positive: Tensor | None = None,
) -> None:
    """Unit rows r of the list, lengths and the positives' cosines; or R [N, D] alone."""
    q, k, v = attention_sources(p)
    attend[(cdiv(s.rows, s.attention.block_m),)](
        q,
        k,
        v,
        e_source(p),
        History(p.history_offsets, t.history_page),
        reconstructed(t),
        UnitRows(out, norm, positive),
        p.attention_scale,
        how=attention_tiles(s, s.attention),
        **s.attention.launch,
    )
