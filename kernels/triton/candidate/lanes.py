"""Triton: attention for each candidate, of small pages, whose history is one block. Their
reconstructions are never made: of R = sum_k a_k v_k, summed over heads, only products with rows
that are there anyway are needed.

    x_k = E . v_k,   G = v v^T within a head,   y = a G,   R . E = a . x,   |R|^2 = a . y
    cos = a . x / (|R| |E|),   dL/da_k = pull x_k - push y_k,
    pull = dL/dcos / (|R| |E|),   push = dL/dcos cos / |R|^2
    dL/dE += pull R - dL/dcos cos / |E|^2 E,
    dL/dv_k += sum_j a_jk pull_j E_j - sum_l ( sum_j push_j a_jk a_jl ) v_l

The softmax's denominator does not cancel here: with several heads each has its own, and with keys
or values of their own R . v is not what the logits are made of. A page's history is taken once for
each head, with zeros outside of the head's dimensions: lanes side by side, whose products with a
tile of candidates are one product. |R|^2 is off by the rounding of the rows' squares, which is seen
only where a reconstruction is much shorter than they are.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..attention import above_top, ascending, head_mask, row_products
from ..common import LN2, Source, kernel, load_source, score_scale, source_row, unit_scale
from ..masks import MASK_OTHER_PAGES, MASK_PAGE
from ..shapes import Shape, cdiv
from .attention import (
    Anchors,
    Own,
    Rules,
    Tile,
    add_scores,
    allowed_pairs,
    candidate_rows,
    columns_of,
    count_above,
    head_lengths,
    inverse_length,
    listed_before,
    load_bias,
    load_columns,
    of_head,
    own_ranked,
    page_history,
    scores_of,
    slot_gradients,
)
from .pages import ANCHORS, SMALL_PAGES, Pages, page_anchors


class Rows(NamedTuple):
    """E, queries, keys and values, the page of each history row, the factor of the logits."""

    q: Any  # Source, as k, v and e
    k: Any
    v: Any
    e: Any
    page: Any
    scale: Any


class How(NamedTuple):
    """What is constant: as Attention; GROUPS (a power of two) of BLOCK_H lanes, one a head."""

    D: Any
    HEADS: Any
    COSINE: Any
    SAME_Q: Any
    GROUPS: Any
    BLOCK_M: Any
    BLOCK_H: Any
    BLOCK_D: Any
    PRECISION: Any


class Columns(NamedTuple):
    """As of attention.py, with 1 / |E|, and 1 / |q| of each head."""

    list: Any
    id: Any
    page: Any
    bias: Any
    e_inverse: Any  # [capacity]
    q_inverse: Any  # [capacity, GROUPS], where the attention is by cosines


class Lanes(NamedTuple):
    """A page's history, once for each head: GROUPS x BLOCK_H rows, with zeros outside of the head's
    dimensions."""

    first: Any  # its rows are first <= k < end
    end: Any
    mine: Any  # [LANES] which are real
    k: Any  # [LANES, BLOCK_D]
    v: Any
    k_inverse: Any  # 1 / |k|, 1 where the attention is not by cosines
    gram: Any  # [LANES, LANES] v_k . v_l
    gram_rest: Any  # what bfloat16 leaves of it, if that is the type of products


@triton.jit
def of_lanes(x, how: tl.constexpr):
    """[rows, LANES] as [rows, GROUPS, BLOCK_H]."""
    return tl.reshape(x, [x.shape[0], how.GROUPS, how.BLOCK_H])


@triton.jit
def to_lanes(x, how: tl.constexpr):
    """A number for each head [rows, GROUPS] as one for each lane [rows, LANES]."""
    wide = tl.broadcast_to(x[:, :, None], [x.shape[0], how.GROUPS, how.BLOCK_H])
    return tl.reshape(wide, [x.shape[0], how.GROUPS * how.BLOCK_H])


@triton.jit
def load_lanes(source, row, mask, head, how: tl.constexpr):
    """Rows of a source with zeros outside of each one's head."""
    dims = tl.arange(0, how.BLOCK_D)
    inside = (dims < how.D)[None, :]
    if how.HEADS > 1:
        inside = head_mask(dims[None, :], head[:, None], how.D // how.HEADS)
    where = source_row(source, row, mask)[:, None] * how.D + dims[None, :]
    return tl.load(source.rows + where, mask=mask[:, None] & inside, other=0.0)


@triton.jit
def page_lanes(rows, pages, page, DOT_TYPE: tl.constexpr, how: tl.constexpr):
    """The fields of Lanes."""
    first = tl.load(pages.history_offsets + page)
    end = tl.load(pages.history_offsets + page + 1)
    lane = tl.arange(0, how.GROUPS * how.BLOCK_H)
    row = first + lane % how.BLOCK_H
    head = lane // how.BLOCK_H
    mine = page_history(rows.page, row, end, page) & (head < how.HEADS)
    k = load_lanes(rows.k, row, mine, head, how)
    v = load_lanes(rows.v, row, mine, head, how)
    gram = tl.dot(v, tl.trans(v), input_precision=how.PRECISION)
    rest = gram
    if DOT_TYPE == tl.bfloat16:
        whole = gram
        gram = whole.to(DOT_TYPE)
        rest = (whole - gram.to(tl.float32)).to(DOT_TYPE)
    return first, end, mine, k, v, head_lengths(k, how.COSINE), gram, rest


@triton.jit
def head_squares(x, how: tl.constexpr):
    """|x|^2 of each head of rows [rows, GROUPS]."""
    wide = x.to(tl.float32)
    group = tl.arange(0, how.GROUPS)[None, :]
    found = tl.full([x.shape[0], how.GROUPS], 0.0, tl.float32)
    for head in tl.static_range(how.HEADS):
        part = of_head(wide, head, how.D, how.HEADS, how.BLOCK_D)
        found += tl.where(group == head, tl.sum(part * part, axis=1)[:, None], 0.0)
    return found


@triton.jit
def of_query_heads(x, q, how: tl.constexpr):
    """q with each head times its number of x [rows, GROUPS]."""
    group = tl.arange(0, how.GROUPS)[None, :]
    found = tl.full([q.shape[0], how.BLOCK_D], 0.0, tl.float32)
    for head in tl.static_range(how.HEADS):
        part = of_head(q.to(tl.float32), head, how.D, how.HEADS, how.BLOCK_D)
        found += part * tl.sum(tl.where(group == head, x, 0.0), axis=1)[:, None]
    return found


@triton.jit
def of_heads(x, how: tl.constexpr):
    """Rows of lanes [LANES, BLOCK_D] as rows of the history: of each lane its head's dimensions."""
    if how.HEADS > 1:
        head = tl.arange(0, how.GROUPS * how.BLOCK_H) // how.BLOCK_H
        dims = tl.arange(0, how.BLOCK_D)
        x = tl.where(head_mask(dims[None, :], head[:, None], how.D // how.HEADS), x, 0.0)
        return tl.sum(tl.reshape(x, [how.GROUPS, how.BLOCK_H, how.BLOCK_D]), axis=0)
    else:
        return x


@triton.jit
def own_products(pairs, v, DOT_TYPE: tl.constexpr, how: tl.constexpr):
    """pairs v [LANES, BLOCK_D], of lanes of the same head."""
    head = tl.arange(0, how.GROUPS * how.BLOCK_H) // how.BLOCK_H
    pairs = tl.where(head[:, None] == head[None, :], pairs, 0.0)
    return tl.dot(pairs.to(DOT_TYPE), v.to(DOT_TYPE), input_precision=how.PRECISION)


@triton.jit
def query_lengths(q, how: tl.constexpr):
    """1 / |q| of each head [rows, GROUPS]; 1 where the attention is not by cosines."""
    inverse = tl.full([q.shape[0], how.GROUPS], 1.0, tl.float32)
    if how.COSINE:
        inverse = unit_scale(tl.sqrt(head_squares(q, how)))
    return inverse


@triton.jit
def lengths_of(columns, column, inside, how: tl.constexpr):
    """1 / |E| of some columns, and 1 / |q| of each head [rows, GROUPS], 1 where the attention is
    not by cosines."""
    e_inverse = tl.load(columns.e_inverse + column, mask=inside, other=0.0)
    q_inverse = tl.full([column.shape[0], how.GROUPS], 1.0, tl.float32)
    if how.COSINE:
        where = column.to(tl.int64)[:, None] * how.GROUPS + tl.arange(0, how.GROUPS)[None, :]
        q_inverse = tl.load(columns.q_inverse + where, mask=inside[:, None], other=0.0)
    return e_inverse, q_inverse


@triton.jit
def lane_weights(q, q_inverse, lanes, scale, how: tl.constexpr):
    """The logits without their factor, and a, both [rows, LANES]."""
    s = row_products(q, lanes.k, how.PRECISION)
    if how.COSINE:
        s = s * to_lanes(q_inverse, how) * lanes.k_inverse[None, :]
    real = of_lanes(lanes.mine[None, :], how)
    logit = tl.where(real, of_lanes(ascending(s, scale), how), -float("inf"))
    top = tl.max(logit, axis=2)
    top = tl.where(top == -float("inf"), 0.0, top)
    p = tl.where(real, above_top(logit, top[:, :, None], scale), 0.0)
    total = tl.sum(p, axis=2)
    a = p * (1.0 / tl.where(total == 0.0, 1.0, total))[:, :, None]
    return s, tl.reshape(a, s.shape)


@triton.jit
def lane_products(a, e, lanes, DOT_TYPE: tl.constexpr, how: tl.constexpr):
    """E_j . v_k and R_j . v_k [rows, LANES], and R . E and |R|^2: reconstructions are never made.
    The weights are rounded once, the same above and below the line of the cosine."""
    x = tl.dot(e, tl.trans(lanes.v), input_precision=how.PRECISION)
    near = a.to(DOT_TYPE)
    if DOT_TYPE == tl.float32:
        precision: tl.constexpr = "ieee" if how.PRECISION == "ieee" else "tf32x3"
        y = tl.dot(near, lanes.gram, input_precision=precision)
    else:
        y = tl.dot(near, lanes.gram_rest)
        y = tl.dot(near, lanes.gram, y)
    near = near.to(tl.float32)
    return x, y, tl.sum(near * x, axis=1), tl.sum(near * y, axis=1)


@triton.jit
def lane_cosine(a, e, e_inverse, lanes, DOT_TYPE: tl.constexpr, how: tl.constexpr):
    """cos(R, E), 1 / |R|, E . v and R . v."""
    x, y, along, square = lane_products(a, e, lanes, DOT_TYPE, how)
    # No cosine is above 1, whatever is rounded.
    shortest = along * e_inverse
    r_inverse = unit_scale(tl.sqrt(tl.maximum(square, shortest * shortest)))
    return shortest * r_inverse, r_inverse, x, y


@triton.jit
def lane_gradients(
    tile,
    q_inverse,
    lanes,
    anchors,
    pages,
    page,
    scale,
    inverse_tau,
    rules: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    how: tl.constexpr,
):
    """The logits without their factor, a and dL/dlogit [rows, LANES]; pull and push; g cos."""
    s, a = lane_weights(tile.q, q_inverse, lanes, scale, how)
    cosine, r_inverse, x, y = lane_cosine(a, tile.e, tile.e_inverse, lanes, DOT_TYPE, how)
    t = cosine * inverse_tau + tile.bias
    first, last = page_anchors(pages, page)
    g = slot_gradients(t, tile, anchors, page, first, last, rules)
    slope = g * cosine
    g = g * inverse_tau * LN2
    pull = g * r_inverse * tile.e_inverse
    push = g * cosine * r_inverse * r_inverse
    da = pull[:, None] * x - push[:, None] * y
    mean = tl.sum(of_lanes(a * da, how), axis=2)
    return s, a, a * (da - to_lanes(mean, how)), pull, push, slope


@triton.jit
def product_gradients(ds, lanes, q_inverse, scale, DOT_TYPE: tl.constexpr, how: tl.constexpr):
    """dL/d(q . k) of dL/dlogit, but for what turns unit rows."""
    if how.COSINE:
        ds = ds * lanes.k_inverse[None, :]
    return (ds * to_lanes(scale * q_inverse, how)).to(DOT_TYPE)


@triton.jit
def store_rows(ptr, x, row, mask, ADD: tl.constexpr, how: tl.constexpr):
    """Rows [rows, BLOCK_D] where somebody wants them."""
    if ptr is not None:
        dims = tl.arange(0, how.BLOCK_D)
        where = ptr + row.to(tl.int64)[:, None] * how.D + dims[None, :]
        mask = mask[:, None] & (dims < how.D)[None, :]
        if ADD:
            x += tl.load(where, mask=mask, other=0.0).to(tl.float32)
        tl.store(where, x.to(ptr.dtype.element_ty), mask=mask)


@kernel
def column_lengths(
    rows,  # Rows
    list_ptr,
    count_ptr,
    e_inverse_ptr,  # [capacity] 1 / |E|
    q_inverse_ptr,  # [capacity, GROUPS] 1 / |q| of each head, None where not by cosines
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COSINE: tl.constexpr,
    SAME_Q: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lengths of the candidates."""
    how: tl.constexpr = How(D, HEADS, COSINE, SAME_Q, GROUPS, BLOCK_M, BLOCK_H, BLOCK_D, PRECISION)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < tl.load(count_ptr)
    position = tl.load(list_ptr + column, mask=inside, other=0)
    e, q = candidate_rows(position, inside, rows, how)
    tl.store(e_inverse_ptr + column, inverse_length(e), mask=inside)
    if q_inverse_ptr is not None:
        group = tl.arange(0, GROUPS)
        where = column.to(tl.int64)[:, None] * GROUPS + group[None, :]
        tl.store(q_inverse_ptr + where, query_lengths(q, how), mask=inside[:, None])


@kernel
def lane_scores(
    rows,  # Rows
    pages,  # Pages
    columns,  # Columns
    own_of,  # Own, of ranks
    anchor_id_ptr,
    page_list_ptr,
    page_count_ptr,
    y_place_ptr,
    column_count_ptr,
    top_ptr,  # [parts, capacity]
    total_ptr,
    above_ptr,
    capacity,
    parts,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    BIAS_IS_COUNT: tl.constexpr,
    NEED_RANK: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COSINE: tl.constexpr,
    SAME_Q: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """As `candidate_scores`."""
    how: tl.constexpr = How(D, HEADS, COSINE, SAME_Q, GROUPS, BLOCK_M, BLOCK_H, BLOCK_D, PRECISION)
    part = tl.program_id(1)
    inverse_tau = score_scale(tau, TAU_IS_TENSOR)
    count = tl.load(column_count_ptr)
    for index in range(tl.program_id(0), tl.load(page_count_ptr), tl.num_programs(0)):
        page = tl.load(page_list_ptr + index)
        low, high = columns_of(page, pages.pv_offsets, y_place_ptr, count, MASK)
        share_of = tl.cdiv(tl.cdiv(high - low, BLOCK_M), parts) * BLOCK_M
        begin = low + part * share_of
        end = tl.minimum(begin + share_of, high)
        lanes = Lanes(*page_lanes(rows, pages, page, DOT_TYPE, how))
        first, last = page_anchors(pages, page)
        slot = first + tl.arange(0, ANCHORS)
        valid = slot < last
        own_id = tl.load(anchor_id_ptr + slot, mask=valid, other=0)
        own = tl.zeros([ANCHORS], tl.float32)
        if NEED_RANK:
            own = own_ranked(own_of, slot, valid, inverse_tau)
        top = tl.full([ANCHORS], -float("inf"), tl.float32)
        total = tl.zeros([ANCHORS], tl.float32)
        above = tl.zeros([ANCHORS], tl.int32)
        for start in range(begin, end, BLOCK_M):
            column = start + tl.arange(0, BLOCK_M)
            inside = column < end
            position, id, column_page = load_columns(
                columns, column, inside, MASK == MASK_OTHER_PAGES
            )
            e, q = candidate_rows(position, inside, rows, how)
            e_inverse, q_inverse = lengths_of(columns, column, inside, how)
            _s, a = lane_weights(q, q_inverse, lanes, rows.scale, how)
            cosine, _inverse, _x, _y = lane_cosine(a, e, e_inverse, lanes, DOT_TYPE, how)
            t, ranked, multiple = scores_of(
                cosine, columns, column, inside, inverse_tau, BIAS_IS_COUNT
            )
            allowed = allowed_pairs(id, column_page, inside, own_id, page, valid, MASK)
            top, total = add_scores(top, total, t, allowed)
            if NEED_RANK:
                above += count_above(ranked, multiple, allowed, own)
        where = part.to(tl.int64) * capacity + slot
        tl.store(top_ptr + where, top, mask=valid)
        tl.store(total_ptr + where, total, mask=valid)
        if NEED_RANK:
            tl.store(above_ptr + where, above, mask=valid)


@kernel
def lane_columns(
    rows,  # Rows
    pages,  # Pages
    columns,  # Columns
    anchors,  # Anchors
    page_list_ptr,
    page_count_ptr,
    column_count_ptr,
    de_ptr,  # [N or n, D], rows at their places; what is there is added to, as to dq
    dq_ptr,  # [N, D]; each None where nobody wants it
    tau_part_ptr,  # [programs] sum of g cos
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    MERGED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COSINE: tl.constexpr,
    SAME_Q: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dL/dE and dL/dq of a tile of candidates, over the listed pages; with SAME_Q their sum is
    dL/dE. A program has registers for one sum: of dL/dE where the second place in the grid is 0,
    else of dL/dq."""
    how: tl.constexpr = How(D, HEADS, COSINE, SAME_Q, GROUPS, BLOCK_M, BLOCK_H, BLOCK_D, PRECISION)
    rules: tl.constexpr = Rules(MASK, MERGED, ANCHORS)
    pid = tl.program_id(0)
    of_q = tl.program_id(1)
    listed = tl.load(page_count_ptr)
    if listed == 0:
        if of_q == 0:
            tl.store(tau_part_ptr + pid, 0.0)
        return
    column = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = column < tl.load(column_count_ptr)
    with_page: tl.constexpr = MASK == MASK_OTHER_PAGES or MASK == MASK_PAGE
    position, id, column_page = load_columns(columns, column, inside, with_page)
    bias = load_bias(columns, column, inside)
    e, q = candidate_rows(position, inside, rows, how)
    e_inverse, q_inverse = lengths_of(columns, column, inside, how)
    inverse_tau = score_scale(tau, TAU_IS_TENSOR)
    total = tl.full([BLOCK_M, BLOCK_D], 0.0, tl.float32)
    turned = tl.full([BLOCK_M, GROUPS], 0.0, tl.float32)
    slope = tl.full([BLOCK_M], 0.0, tl.float32)
    begin = listed * 0
    if MASK == MASK_PAGE:
        low_page = tl.min(tl.where(inside, column_page, 2147483647), axis=0)
        high_page = tl.max(tl.where(inside, column_page, -1), axis=0)
        begin = listed_before(page_list_ptr, listed, low_page)
        listed = listed_before(page_list_ptr, listed, high_page + 1)
    for index in range(begin, listed):
        page = tl.load(page_list_ptr + index)
        seen = inside
        if MASK == MASK_PAGE:
            seen = inside & (column_page == page)
        tile = Tile(e, q, e_inverse, position, id, column_page, bias, seen)
        lanes = Lanes(*page_lanes(rows, pages, page, DOT_TYPE, how))
        s, a, ds, pull, _push, g_cosine = lane_gradients(
            tile,
            q_inverse,
            lanes,
            anchors,
            pages,
            page,
            rows.scale,
            inverse_tau,
            rules,
            DOT_TYPE,
            how,
        )
        slope += g_cosine
        near = (a * pull[:, None]).to(DOT_TYPE)
        if COSINE:
            turned += tl.sum(of_lanes(ds * s, how), axis=2)
        ds = product_gradients(ds, lanes, q_inverse, rows.scale, DOT_TYPE, how)
        if SAME_Q:
            total = tl.dot(near, lanes.v.to(DOT_TYPE), total, input_precision=PRECISION)
            total = tl.dot(ds, lanes.k.to(DOT_TYPE), total, input_precision=PRECISION)
        elif of_q == 0:
            total = tl.dot(near, lanes.v.to(DOT_TYPE), total, input_precision=PRECISION)
        else:
            total = tl.dot(ds, lanes.k.to(DOT_TYPE), total, input_precision=PRECISION)
    # Rows once more from memory: the products have them in shared memory, and no register is left.
    if of_q == 0:
        along = slope * inverse_tau * LN2 * e_inverse * e_inverse
        wide = load_source(rows.e, position, inside, how, True).to(tl.float32)
        total -= along[:, None] * wide
        tl.store(tau_part_ptr + pid, tl.sum(slope, axis=0))
    if COSINE:
        if SAME_Q or of_q > 0:
            turned *= rows.scale * q_inverse * q_inverse
            q = load_source(rows.e if SAME_Q else rows.q, position, inside, how, True)
            total -= of_query_heads(turned, q, how)
    if of_q == 0:
        store_rows(de_ptr, total, position, inside, True, how)
    else:
        store_rows(dq_ptr, total, position, inside, True, how)


@kernel
def lane_history(
    rows,  # Rows
    pages,  # Pages
    columns,  # Columns
    anchors,  # Anchors
    page_list_ptr,
    page_count_ptr,
    y_place_ptr,
    column_count_ptr,
    dk_ptr,  # [K, D]; None where nobody wants it
    dv_ptr,  # [K, D]; with SUM_KV the sum of both
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    SUM_KV: tl.constexpr,
    MASK: tl.constexpr,
    MERGED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COSINE: tl.constexpr,
    SAME_Q: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dL/dv of the listed pages' history over all candidates where the second place in the grid is
    0, else dL/dk; SUM_KV: their sum."""
    how: tl.constexpr = How(D, HEADS, COSINE, SAME_Q, GROUPS, BLOCK_M, BLOCK_H, BLOCK_D, PRECISION)
    rules: tl.constexpr = Rules(MASK, MERGED, ANCHORS)
    of_k = tl.program_id(1)
    inverse_tau = score_scale(tau, TAU_IS_TENSOR)
    count = tl.load(column_count_ptr)
    LANES: tl.constexpr = GROUPS * BLOCK_H
    for index in range(tl.program_id(0), tl.load(page_count_ptr), tl.num_programs(0)):
        page = tl.load(page_list_ptr + index)
        low, high = columns_of(page, pages.pv_offsets, y_place_ptr, count, MASK)
        lanes = Lanes(*page_lanes(rows, pages, page, DOT_TYPE, how))
        # Transposed: warps share rows of the dimensions, and operands stay in shared memory.
        total = tl.full([BLOCK_D, LANES], 0.0, tl.float32)
        pairs = tl.full([LANES, LANES], 0.0, tl.float32)
        turned = tl.full([LANES], 0.0, tl.float32)
        for start in range(low, high, BLOCK_M):
            column = start + tl.arange(0, BLOCK_M)
            inside = column < high
            position, id, column_page = load_columns(
                columns, column, inside, MASK == MASK_OTHER_PAGES
            )
            bias = load_bias(columns, column, inside)
            e, q = candidate_rows(position, inside, rows, how)
            e_inverse, q_inverse = lengths_of(columns, column, inside, how)
            tile = Tile(e, q, e_inverse, position, id, column_page, bias, inside)
            s, a, ds, pull, push, _slope = lane_gradients(
                tile,
                q_inverse,
                lanes,
                anchors,
                pages,
                page,
                rows.scale,
                inverse_tau,
                rules,
                DOT_TYPE,
                how,
            )
            near = (a * pull[:, None]).to(DOT_TYPE)
            pair = tl.trans((a * push[:, None]).to(DOT_TYPE))
            if COSINE:
                turned += tl.sum(ds * s, axis=0)
            ds = product_gradients(ds, lanes, q_inverse, rows.scale, DOT_TYPE, how)
            if SUM_KV or of_k == 0:
                across = tl.trans(e.to(DOT_TYPE))
                total = tl.dot(across, near, total, input_precision=PRECISION)
                pairs = tl.dot(pair, a.to(DOT_TYPE), pairs, input_precision=PRECISION)
            if SUM_KV or of_k > 0:
                across = tl.trans(q.to(DOT_TYPE))
                total = tl.dot(across, ds, total, input_precision=PRECISION)
        total = tl.trans(total)
        if of_k == 0:
            total -= own_products(pairs, lanes.v, DOT_TYPE, how)
        if COSINE:
            if SUM_KV or of_k > 0:
                turn = turned * rows.scale * lanes.k_inverse * lanes.k_inverse
                total -= turn[:, None] * lanes.k.to(tl.float32)
        row = lanes.first + tl.arange(0, BLOCK_H)
        if of_k == 0:
            store_rows(dv_ptr, of_heads(total, how), row, row < lanes.end, False, how)
        else:
            store_rows(dk_ptr, of_heads(total, how), row, row < lanes.end, False, how)


# ---- launches ------------------------------------------------------------------------------------


def lanes_tile(s: Shape) -> tiles.Tile:
    """block_n: history rows that are one block; 0 where no page is taken so."""
    return tiles.candidate_lanes(s.dtype, s.block_d, s.heads, s.device)


class LanePass:
    """What the launches of a problem have in common; `given`: what kernels.py is told."""

    def __init__(self, s: Shape, given: dict[str, Any], listed: tuple[Tensor, Tensor]) -> None:
        tile = lanes_tile(s)
        self.tile, self.device, self.pages = tile, s.device, listed[0].shape[1]
        source = {
            name: Source(
                given[f"{name}_ptr"],
                given[f"{name}_index_ptr"] if given[f"HAS_{name.upper()}_INDEX"] else None,
            )
            for name in "qkve"
        }
        rows = Rows(**source, page=given["history_page_ptr"], scale=float(given["scale"]))
        cosine, same = given["COSINE"], given["SAME_Q"]
        groups = tiles.next_power_of_2(s.heads)
        how = How(
            s.dim, s.heads, cosine, same, groups, tile.block_m, tile.block_n, s.block_d, s.precision
        )._asdict()
        count, of_column = given["column_count_ptr"], given["column_list_ptr"]
        self.columns = of_column.shape[0]
        e_inverse = torch.empty(self.columns, dtype=torch.float32, device=s.device)
        q_inverse = e_inverse.new_empty(self.columns, groups) if cosine else None
        column_lengths[(cdiv(self.columns, s.small.block_m),)](
            rows, of_column, count, e_inverse, q_inverse, **how, BLOCK=s.small.block_m
        )
        self.given = {
            "rows": rows,
            "pages": Pages(*(given[f"{name}_ptr"] for name in Pages._fields)),
            "columns": Columns(
                of_column,
                given["column_id_ptr"],
                given["column_page_ptr"],
                given["column_bias_ptr"] if given["HAS_BIAS"] else None,
                e_inverse,
                q_inverse,
            ),
            "page_list_ptr": listed[0][SMALL_PAGES],
            "page_count_ptr": listed[1][SMALL_PAGES:],
            "column_count_ptr": count,
            "tau": given["tau"],
            "TAU_IS_TENSOR": given["TAU_IS_TENSOR"],
            # float16 has too little range for gradients of a mean over many anchors: their products
            # run in tf32.
            "DOT_TYPE": tl.bfloat16 if s.dtype == torch.bfloat16 else tl.float32,
            **how,
            **tile.launch,
        }
        # Two fit on a multiprocessor.
        self.programs = min(self.pages, 2 * tiles.programs(s.device))

    def scores(self, parts: int, own: Own, **given: Any) -> None:
        """(max, sum), and how many are above `own`, to the anchors' places."""
        lane_scores[(self.programs, parts)](**self.given, **given, own_of=own, parts=parts)

    def column_gradients(
        self, anchors: Anchors, rules: dict[str, Any], d_e: Tensor | None, d_q: Tensor | None
    ) -> Tensor:
        """Adds dL/dE and dL/dq; parts of the sum of g cos."""
        tiles_along = cdiv(self.columns, self.tile.block_m)
        tau_parts = torch.empty(tiles_along, dtype=torch.float32, device=self.device)
        lane_columns[(tiles_along, 1 if d_q is None else 2)](
            **self.given,
            anchors=anchors,
            **rules,
            de_ptr=d_e,
            dq_ptr=d_q,
            tau_part_ptr=tau_parts,
        )
        return tau_parts

    def history_gradients(
        self,
        anchors: Anchors,
        rules: dict[str, Any],
        y_place: Tensor,
        d_k: Tensor | None,
        d_v: Tensor | None,
        together: bool,
    ) -> None:
        """dL/dk and dL/dv of the listed pages; `together`: their sum to d_k."""
        lane_history[(self.programs, 1 if together or d_k is None else 2)](
            **self.given,
            anchors=anchors,
            **rules,
            y_place_ptr=y_place,
            dk_ptr=None if together else d_k,
            dv_ptr=d_k if together else d_v,
            SUM_KV=together,
        )
