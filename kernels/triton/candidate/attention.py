"""Triton: the attention of a tile of candidates to one page's history, in registers, and its
gradients: what the kernels of kernels.py are made of."""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..attention import above_top, ascending, head_mask, row_products, softmax_block
from ..common import LN2, LOG2E, load_source, places_before, unit_scale
from ..masks import MASK_OTHER_PAGES, MASK_PAGE


class Candidates(NamedTuple):
    """E and q."""

    e: Any  # Source
    q: Any  # Source, unused with SAME_Q


class History(NamedTuple):
    """Keys and values, the page of each row, and the factor of the logits."""

    k: Any  # Source
    v: Any  # Source
    page: Any
    scale: Any


class Attention(NamedTuple):
    """What is constant in it: dimension, heads, whether by cosines, whether q is E; tiles."""

    D: Any
    HEADS: Any
    COSINE: Any
    SAME_Q: Any
    BLOCK_H: Any
    BLOCK_D: Any
    PRECISION: Any


class Columns(NamedTuple):
    """Lists of the candidates [capacity]; bias None where there is none."""

    list: Any
    id: Any
    page: Any
    bias: Any


class Anchors(NamedTuple):
    """What the gradients of the scores need of each anchor [capacity]."""

    list: Any
    id: Any
    lse: Any
    miss: Any
    g: Any


class Tile(NamedTuple):
    """A tile of candidates, loaded: [BLOCK_M] each, e and q [BLOCK_M, BLOCK_D]."""

    e: Any
    q: Any
    e_inverse: Any
    position: Any
    id: Any
    page: Any
    bias: Any
    inside: Any


class Rules(NamedTuple):
    """Which scores an anchor has; and how many anchors are looked at together."""

    MASK: Any
    MERGED: Any
    SLOTS: Any


@triton.jit
def page_history(history_page_ptr, row, high, page):
    """Which rows of a block of history are real ones of a page."""
    return tl.load(history_page_ptr + row, mask=row < high, other=-1) == page


@triton.jit
def of_head(x, head, D: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr):
    """x with zeros outside of a head's dimensions."""
    if HEADS > 1:
        dims = tl.arange(0, BLOCK_D)
        x = tl.where(head_mask(dims, head, D // HEADS)[None, :], x, 0.0).to(x.dtype)
    return x


@triton.jit
def head_lengths(x, COSINE: tl.constexpr):
    """1 / |x| of rows that hold one head's dimensions; 1 where the attention is not by cosines."""
    inverse = tl.full([x.shape[0]], 1.0, tl.float32)
    if COSINE:
        wide = x.to(tl.float32)
        inverse = unit_scale(tl.sqrt(tl.sum(wide * wide, axis=1)))
    return inverse


@triton.jit
def logits(q, k, q_inverse, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """q_j . k_k [BLOCK_M, BLOCK_H], or their cosines; without the factor, as `softmax_block` takes
    them."""
    s = row_products(q, k, PRECISION)
    if COSINE:
        s = s * q_inverse[:, None] * head_lengths(k, COSINE)[None, :]
    return s


@triton.jit
def load_head(source, row, mask, head, how: tl.constexpr):
    """The same with zeros outside of a head's dimensions."""
    return of_head(load_source(source, row, mask, how), head, how.D, how.HEADS, how.BLOCK_D)


@triton.jit
def attend_page(q, q_inverse, history, low, high, page, head, how: tl.constexpr):
    """One head of R of some candidates on one page, float32 [BLOCK_M, BLOCK_D], the largest q . k
    and 1 / sum of exp."""
    rows: tl.constexpr = q.shape[0]
    top = tl.full([rows], -float("inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    acc = tl.full([rows, how.BLOCK_D], 0.0, tl.float32)
    for start in range(low, high, how.BLOCK_H):
        row = start + tl.arange(0, how.BLOCK_H)
        mine = page_history(history.page, row, high, page)
        k = load_head(history.k, row, mine, head, how)
        v = load_head(history.v, row, mine, head, how)
        s = logits(q, k, q_inverse, how.COSINE, how.PRECISION)
        p, rescale, top = softmax_block(s, mine[None, :], top, history.scale)
        total = total * rescale + tl.sum(p, axis=1)
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision=how.PRECISION)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    return acc * share[:, None], tl.where(top == -float("inf"), 0.0, top), share


@triton.jit
def candidate_rows(position, valid, candidates, how: tl.constexpr):
    """E and q of some candidates."""
    e = load_source(candidates.e, position, valid, how)
    q = e
    if not how.SAME_Q:
        q = load_source(candidates.q, position, valid, how)
    return e, q


@triton.jit
def inverse_length(e):
    """1 / |E| of rows."""
    wide = e.to(tl.float32)
    return unit_scale(tl.sqrt(tl.sum(wide * wide, axis=1)))


@triton.jit
def reconstruct_candidates(q, history, low, high, page, how: tl.constexpr):
    """R of some candidates on one page, and the softmax of its last head."""
    r = tl.full([q.shape[0], how.BLOCK_D], 0.0, tl.float32)
    top = tl.zeros([q.shape[0]], tl.float32)
    share = top
    for head in range(how.HEADS):
        q_head = of_head(q, head, how.D, how.HEADS, how.BLOCK_D)
        q_inverse = head_lengths(q_head, how.COSINE)
        part, top, share = attend_page(q_head, q_inverse, history, low, high, page, head, how)
        r += part
    return r, top, share


@triton.jit
def cosine_of(r, e, e_inverse):
    """cos(R, E) and 1 / |R|."""
    r_inverse = unit_scale(tl.sqrt(tl.sum(r * r, axis=1)))
    return tl.sum(r * e.to(tl.float32), axis=1) * r_inverse * e_inverse, r_inverse


@triton.jit
def columns_of(page, pv_offsets_ptr, column_place_ptr, count, MASK: tl.constexpr):
    """The range of columns among which a page's candidates are."""
    low = count * 0
    high = count
    if MASK == MASK_PAGE:
        low = places_before(column_place_ptr, tl.load(pv_offsets_ptr + page))
        high = places_before(column_place_ptr, tl.load(pv_offsets_ptr + page + 1))
    return low, high


@triton.jit
def listed_before(list_ptr, count, page):
    """How many of the listed pages, which ascend, are before one."""
    low = count * 0
    high = count
    while low < high:
        middle = (low + high) // 2
        if tl.load(list_ptr + middle) < page:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit
def allowed_pairs(id, column_page, inside, own_id, page, slot_valid, MASK: tl.constexpr):
    """Which columns are candidates of which anchors of a page, positives apart [BLOCK_M, SLOTS]."""
    other = inside[:, None] & slot_valid[None, :] & (id[:, None] != own_id[None, :])
    if MASK == MASK_OTHER_PAGES:
        other = other & (column_page != page)[:, None]
    return other


@triton.jit
def load_columns(columns, column, inside, WITH_PAGE: tl.constexpr):
    """Positions, ids and pages of some columns; without pages, the columns themselves."""
    position = tl.load(columns.list + column, mask=inside, other=0)
    id = tl.load(columns.id + column, mask=inside, other=0)
    page = column
    if WITH_PAGE:
        page = tl.load(columns.page + column, mask=inside, other=-2)
    return position, id, page


@triton.jit
def load_bias(columns, column, inside):
    """What is added to the scores of some columns."""
    bias = tl.zeros([column.shape[0]], tl.float32)
    if columns.bias is not None:
        bias = tl.load(columns.bias + column, mask=inside, other=0.0)
    return bias


@triton.jit
def slot_gradients(
    t,  # [BLOCK_M], biases included
    tile,
    anchors,
    page,
    first,
    last,
    rules: tl.constexpr,
):
    """dL/ds_bj [BLOCK_M]: sum over the page's anchors i, SLOTS of them at most, of g_i (p_ij -
    [j = i])."""
    slot = first + tl.arange(0, rules.SLOTS)
    slot_valid = slot < last
    own_id = tl.load(anchors.id + slot, mask=slot_valid, other=0)
    own = tl.load(anchors.list + slot, mask=slot_valid, other=-1)
    lse = tl.load(anchors.lse + slot, mask=slot_valid, other=0.0)
    g = tl.load(anchors.g + slot, mask=slot_valid, other=0.0)
    pull = g * tl.load(anchors.miss + slot, mask=slot_valid, other=0.0)
    allowed = allowed_pairs(tile.id, tile.page, tile.inside, own_id, page, slot_valid, rules.MASK)
    # A row without weight has no share, also where its log-sum-exp is over nothing.
    p = tl.where(allowed & (g != 0.0)[None, :], tl.exp2(t[:, None] - lse[None, :]), 0.0)
    if rules.MERGED:
        positive = tile.id[:, None] == own_id[None, :]
    else:
        positive = tile.position[:, None] == own[None, :]
    positive = positive & tile.inside[:, None] & slot_valid[None, :]
    return tl.sum(p * g[None, :] - tl.where(positive, pull[None, :], 0.0), axis=1)


@triton.jit
def score_gradients(t, tile, anchors, page, first, last, rules: tl.constexpr):
    """The same of any number of anchors."""
    found = tl.zeros([t.shape[0]], tl.float32)
    for start in range(first, last, rules.SLOTS):
        found += slot_gradients(t, tile, anchors, page, start, last, rules)
    return found


@triton.jit
def reconstruction_gradients(r, e, r_inverse, e_inverse, cosine, g):
    """dL/dR and dL/dE of a tile of candidates on one page, both float32 [BLOCK_M, BLOCK_D]; g is
    dL/dcos."""
    unit_r = r * r_inverse[:, None]
    unit_e = e.to(tl.float32) * e_inverse[:, None]
    dr = (unit_e - cosine[:, None] * unit_r) * (g * r_inverse)[:, None]
    de = (unit_r - cosine[:, None] * unit_e) * (g * e_inverse)[:, None]
    return dr, de


@triton.jit
def page_gradients(
    tile,
    history,
    anchors,
    page,
    first,
    last,
    past,
    until,
    inverse_tau,
    rules: tl.constexpr,
    how: tl.constexpr,
):
    """The softmax of the last head of a tile of candidates on one page, dL/dR, dL/dE, and g cos."""
    r, top, share = reconstruct_candidates(tile.q, history, past, until, page, how)
    cosine, r_inverse = cosine_of(r, tile.e, tile.e_inverse)
    t = cosine * inverse_tau + tile.bias
    g = score_gradients(t, tile, anchors, page, first, last, rules)
    slope = g * cosine
    g = g * inverse_tau * LN2
    dr, de = reconstruction_gradients(r, tile.e, r_inverse, tile.e_inverse, cosine, g)
    return top, share, dr, de, slope


@triton.jit
def head_of(tile, dr, top, share, history, past, until, page, head, how: tl.constexpr):
    """q and dL/dR of one head, 1 / |q|, and the head's softmax, known where it is the only one."""
    q = of_head(tile.q, head, how.D, how.HEADS, how.BLOCK_D)
    dr = of_head(dr, head, how.D, how.HEADS, how.BLOCK_D)
    q_inverse = head_lengths(q, how.COSINE)
    if how.HEADS > 1:
        _r, top, share = attend_page(q, q_inverse, history, past, until, page, head, how)
    return q, dr, q_inverse, top, share


@triton.jit
def weight_gradients(
    q, q_inverse, dr, k, v, top, share, scale, mine, DOT_TYPE: tl.constexpr, how: tl.constexpr
):
    """The logits without their factor, a_jk, and dL/da_jk = dL/dR_j . v_k of one head and a block
    of history."""
    s = logits(q, k, q_inverse, how.COSINE, how.PRECISION)
    a = above_top(ascending(s, scale), top[:, None], scale) * share[:, None]
    da = tl.dot(dr.to(DOT_TYPE), tl.trans(v.to(DOT_TYPE)), input_precision=how.PRECISION)
    return s, tl.where(mine[None, :], a, 0.0), da


@triton.jit
def mean_gradient(
    q,
    q_inverse,
    dr,
    top,
    share,
    history,
    low,
    high,
    page,
    head,
    DOT_TYPE: tl.constexpr,
    how: tl.constexpr,
):
    """sum_k a_jk dL/da_jk over a history of more than a block, of the rounded products that it is
    subtracted from. dL/dR_j . R_j is equal on paper, but where a is 1 the difference must be 0:
    what is left of it is multiplied by rows as long as they are."""
    delta = tl.zeros([q.shape[0]], tl.float32)
    for start in tl.range(low, high, how.BLOCK_H, num_stages=1):  # registers, not speed
        row = start + tl.arange(0, how.BLOCK_H)
        mine = page_history(history.page, row, high, page)
        k = load_head(history.k, row, mine, head, how)
        v = load_head(history.v, row, mine, head, how)
        _s, a, da = weight_gradients(
            q, q_inverse, dr, k, v, top, share, history.scale, mine, DOT_TYPE, how
        )
        delta += tl.sum(tl.where(mine[None, :], a * da, 0.0), axis=1)
    return delta


class Own(NamedTuple):
    """What an anchor's rank is found from."""

    positive: Any  # [capacity, 2]
    list: Any  # [capacity]
    log_q: Any  # [N], or None


@triton.jit
def own_ranked(own, slot, valid, inverse_tau):
    """Scores of anchors' own items, as those of candidates are ranked."""
    score = tl.load(own.positive + slot.to(tl.int64) * 2 + 1, mask=valid, other=0.0) * inverse_tau
    if own.log_q is not None:
        place = tl.load(own.list + slot, mask=valid, other=0)
        score -= tl.load(own.log_q + place, mask=valid, other=0.0) * LOG2E
    return score


@triton.jit
def scores_of(cosine, columns, column, inside, inverse_tau, BIAS_IS_COUNT: tl.constexpr):
    """t of some columns, what is ranked, and how often."""
    t = cosine * inverse_tau
    ranked = t
    multiple = tl.full([column.shape[0]], 1, tl.int32)
    if columns.bias is not None:
        bias = load_bias(columns, column, inside)
        t += bias
        if BIAS_IS_COUNT:
            multiple = tl.floor(tl.exp2(bias) + 0.5).to(tl.int32)
        else:
            ranked = t
    return t, ranked, multiple


@triton.jit
def add_scores(top, total, t, allowed):
    """(max, sum) of 2^t of some anchors with one more tile of candidates."""
    each = tl.where(allowed, t[:, None], -float("inf"))
    new_top = tl.maximum(top, tl.max(each, axis=0))
    shift = tl.where(new_top == -float("inf"), 0.0, new_top)
    total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(each - shift[None, :]), axis=0)
    return new_top, total


@triton.jit
def count_above(ranked, multiple, allowed, own):
    """How many candidates of a tile are above the anchors' own items."""
    better = allowed & (ranked[:, None] > own[None, :])
    return tl.sum(tl.where(better, multiple[:, None], 0), axis=0)
