"""Triton: attention for each candidate. A reconstruction of every candidate from every page's history is made in registers,
compared with the candidate, and forgotten; the backward makes it again.

For page b and candidate j: R_bj = sum_k a_bjk v_k, a_bjk = softmax over k in H_b of (c q_j . k_k), s_bj = cos(R_bj, E_j) / tau.
Scores in powers of two, t_bj = log2(e) s_bj + bias_j. With g_bj = dL/ds_bj and rows of unit length e, r:

    dL/dR_bj = g/tau ( e_j - cos r_bj ) / |R_bj|,   dL/dE_j += g/tau ( r_bj - cos e_j ) / |E_j|,
    dL/dlogit_k = a_k ( dL/dR . v_k - dL/dR . R ),  and from there as in any attention
"""

from __future__ import annotations

import triton
import triton.language as tl

from .contrast import MASK_OTHER_PAGES, MASK_PAGE, AnchorResults, Items, add_in, finish
from .reconstruct import head_mask, load_rows
from .tl_common import LN2, LOG2E, kernel, rank_before, score_scale, unit_scale


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
def logits(q, k, q_inverse, scale, mine, COSINE: tl.constexpr, PRECISION: tl.constexpr):
    """c q_j . k_k [BLOCK_M, BLOCK_H], or their cosines times c; -inf where the page has no such row."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if COSINE:
        s = s * q_inverse[:, None] * head_lengths(k, COSINE)[None, :]
    return tl.where(mine[None, :], s, -float("inf"))


@triton.jit
def attend_page(
    q,  # [BLOCK_M, BLOCK_D], of one head
    q_inverse,
    k_ptr,
    k_index_ptr,
    v_ptr,
    v_index_ptr,
    history_page_ptr,
    low,
    high,
    page,
    head,
    scale,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_K_INDEX: tl.constexpr,
    HAS_V_INDEX: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One head of R of some candidates on one page, float32 [BLOCK_M, BLOCK_D], the largest logits and 1 / sum of exp."""
    rows: tl.constexpr = q.shape[0]
    top = tl.full([rows], -float("inf"), tl.float32)
    total = tl.zeros([rows], tl.float32)
    acc = tl.zeros([rows, BLOCK_D], tl.float32)
    for start in range(low, high, BLOCK_H):
        row = start + tl.arange(0, BLOCK_H)
        mine = page_history(history_page_ptr, row, high, page)
        k = of_head(load_rows(k_ptr, k_index_ptr, row, mine, D, BLOCK_D, HAS_K_INDEX), head, D, HEADS, BLOCK_D)  # fmt: skip
        v = of_head(load_rows(v_ptr, v_index_ptr, row, mine, D, BLOCK_D, HAS_V_INDEX), head, D, HEADS, BLOCK_D)  # fmt: skip
        s = logits(q, k, q_inverse, scale, mine, COSINE, PRECISION)
        new_top = tl.maximum(top, tl.max(s, axis=1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        p = tl.exp2((s - shift[:, None]) * LOG2E)
        rescale = tl.exp2((top - shift) * LOG2E)
        total = total * rescale + tl.sum(p, axis=1)
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        top = new_top
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    return acc * share[:, None], tl.where(top == -float("inf"), 0.0, top), share


@triton.jit
def candidate_tile(
    position,
    valid,
    q_ptr,
    q_index_ptr,
    e_ptr,
    e_index_ptr,
    D: tl.constexpr,
    SAME_Q: tl.constexpr,
    HAS_Q_INDEX: tl.constexpr,
    HAS_E_INDEX: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """E and q of some candidates, and 1 / |E|."""
    e = load_rows(e_ptr, e_index_ptr, position, valid, D, BLOCK_D, HAS_E_INDEX)
    q = e
    if not SAME_Q:
        q = load_rows(q_ptr, q_index_ptr, position, valid, D, BLOCK_D, HAS_Q_INDEX)
    wide = e.to(tl.float32)
    return e, q, unit_scale(tl.sqrt(tl.sum(wide * wide, axis=1)))


@triton.jit
def reconstruct_candidates(
    q,
    k_ptr,
    k_index_ptr,
    v_ptr,
    v_index_ptr,
    history_page_ptr,
    low,
    high,
    page,
    scale,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COSINE: tl.constexpr,
    HAS_K_INDEX: tl.constexpr,
    HAS_V_INDEX: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """R of some candidates on one page, and the softmax of its last head."""
    r = tl.zeros([q.shape[0], BLOCK_D], tl.float32)
    top = tl.zeros([q.shape[0]], tl.float32)
    share = top
    for head in range(HEADS):
        q_head = of_head(q, head, D, HEADS, BLOCK_D)
        part, top, share = attend_page(
            q_head,
            head_lengths(q_head, COSINE),
            k_ptr,
            k_index_ptr,
            v_ptr,
            v_index_ptr,
            history_page_ptr,
            low,
            high,
            page,
            head,
            scale,
            D,
            HEADS,
            COSINE,
            HAS_K_INDEX,
            HAS_V_INDEX,
            BLOCK_H,
            BLOCK_D,
            PRECISION,
        )
        r += part
    return r, top, share


@triton.jit
def cosine_of(r, e, e_inverse):
    """cos(R, E) and 1 / |R|."""
    r_inverse = unit_scale(tl.sqrt(tl.sum(r * r, axis=1)))
    return tl.sum(r * e.to(tl.float32), axis=1) * r_inverse * e_inverse, r_inverse


@triton.jit
def columns_of(page, pv_offsets_ptr, column_rank_ptr, count, MASK: tl.constexpr):
    """The range of columns among which a page's candidates are."""
    low = count * 0
    high = count
    if MASK == MASK_PAGE:
        low = rank_before(column_rank_ptr, tl.load(pv_offsets_ptr + page))
        high = rank_before(column_rank_ptr, tl.load(pv_offsets_ptr + page + 1))
    return low, high


@triton.jit
def allowed_pairs(
    id, column_page, inside, own_id, page, slot_valid, MASK: tl.constexpr
):  # fmt: skip
    """Which columns are candidates of which anchors of a page, their positives apart [BLOCK_M, SLOTS]."""
    other = inside[:, None] & slot_valid[None, :] & (id[:, None] != own_id[None, :])
    if MASK == MASK_OTHER_PAGES:
        other = other & (column_page != page)[:, None]
    return other


@kernel
def own_scores(
    q_ptr,
    q_index_ptr,
    k_ptr,
    k_index_ptr,
    v_ptr,
    v_index_ptr,
    e_ptr,
    e_index_ptr,
    history_offsets_ptr,
    history_page_ptr,
    list_ptr,
    list_page_ptr,
    count_ptr,
    positive_ptr,  # [capacity, 2]: twice the same
    scale,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COSINE: tl.constexpr,
    SAME_Q: tl.constexpr,
    HAS_Q_INDEX: tl.constexpr,
    HAS_K_INDEX: tl.constexpr,
    HAS_V_INDEX: tl.constexpr,
    HAS_E_INDEX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """cos(R_i, E_i) of one anchor."""
    i = tl.program_id(0)
    if i >= tl.load(count_ptr):
        return
    row = tl.arange(0, BLOCK_M)
    valid = row < 1
    position = row + tl.load(list_ptr + i)
    page = tl.load(list_page_ptr + i)
    e, q, e_inverse = candidate_tile(
        position, valid, q_ptr, q_index_ptr, e_ptr, e_index_ptr, D, SAME_Q, HAS_Q_INDEX, HAS_E_INDEX, BLOCK_D
    )  # fmt: skip
    r, _top, _share = reconstruct_candidates(
        q,
        k_ptr,
        k_index_ptr,
        v_ptr,
        v_index_ptr,
        history_page_ptr,
        tl.load(history_offsets_ptr + page),
        tl.load(history_offsets_ptr + page + 1),
        page,
        scale,
        D,
        HEADS,
        COSINE,
        HAS_K_INDEX,
        HAS_V_INDEX,
        BLOCK_H,
        BLOCK_D,
        PRECISION,
    )
    cosine, _inverse = cosine_of(r, e, e_inverse)
    for part in tl.static_range(2):
        tl.store(positive_ptr + i.to(tl.int64) * 2 + part + row * 0, cosine, mask=valid)


@kernel
def candidate_scores(
    q_ptr,
    q_index_ptr,
    k_ptr,
    k_index_ptr,
    v_ptr,
    v_index_ptr,
    e_ptr,
    e_index_ptr,
    pv_offsets_ptr,
    history_offsets_ptr,
    history_page_ptr,
    anchor_page_ptr,
    anchor_id_ptr,
    anchor_rank_ptr,
    anchor_count_ptr,
    column_list_ptr,
    column_page_ptr,
    column_id_ptr,
    column_bias_ptr,
    y_rank_ptr,
    column_count_ptr,
    positive_ptr,  # [capacity, 2]
    list_ptr,
    log_q_ptr,
    page_place_ptr,
    top_ptr,  # [parts, capacity]
    total_ptr,
    above_ptr,
    capacity,
    parts,
    tau,
    scale,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COSINE: tl.constexpr,
    SAME_Q: tl.constexpr,
    HAS_Q_INDEX: tl.constexpr,
    HAS_K_INDEX: tl.constexpr,
    HAS_V_INDEX: tl.constexpr,
    HAS_E_INDEX: tl.constexpr,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BIAS_IS_COUNT: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    NEED_RANK: tl.constexpr,
    PACKED: tl.constexpr,  # only pages without a place among the packed ones
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(max, sum) of 2^t over some candidates, for up to SLOTS anchors of a page at a time: a program for the first of each."""
    i = tl.program_id(0)
    part = tl.program_id(1)
    count = tl.load(anchor_count_ptr)
    if i >= count:
        return
    page = tl.load(anchor_page_ptr + i)
    first = rank_before(anchor_rank_ptr, tl.load(pv_offsets_ptr + page))
    if (i - first) % SLOTS != 0:
        return
    last = rank_before(anchor_rank_ptr, tl.load(pv_offsets_ptr + page + 1))
    slot = i + tl.arange(0, SLOTS)
    slot_valid = slot < last
    where = part.to(tl.int64) * capacity + slot
    if PACKED:
        if tl.load(page_place_ptr + page) >= 0:
            tl.store(top_ptr + where, slot * 0.0 - float("inf"), mask=slot_valid)
            tl.store(total_ptr + where, slot * 0.0, mask=slot_valid)
            return
    own_id = tl.load(anchor_id_ptr + slot, mask=slot_valid, other=0)
    inverse_tau = score_scale(tau, TAU_IS_TENSOR)
    own = tl.zeros([SLOTS], tl.float32)
    if NEED_RANK:
        own = (
            tl.load(positive_ptr + slot.to(tl.int64) * 2 + 1, mask=slot_valid, other=0.0)
            * inverse_tau
        )
        if HAS_LOG_Q:
            place = tl.load(list_ptr + slot, mask=slot_valid, other=0)
            own -= tl.load(log_q_ptr + place, mask=slot_valid, other=0.0) * LOG2E
    low, high = columns_of(page, pv_offsets_ptr, y_rank_ptr, tl.load(column_count_ptr), MASK)
    share_of = tl.cdiv(tl.cdiv(high - low, BLOCK_M), parts) * BLOCK_M
    begin = low + part * share_of
    end = tl.minimum(begin + share_of, high)
    past = tl.load(history_offsets_ptr + page)
    until = tl.load(history_offsets_ptr + page + 1)
    top = tl.full([SLOTS], -float("inf"), tl.float32)
    total = tl.zeros([SLOTS], tl.float32)
    above = tl.zeros([SLOTS], tl.int32)
    for start in range(begin, end, BLOCK_M):
        column = start + tl.arange(0, BLOCK_M)
        inside = column < end
        position = tl.load(column_list_ptr + column, mask=inside, other=0)
        id = tl.load(column_id_ptr + column, mask=inside, other=0)
        column_page = column
        if MASK == MASK_OTHER_PAGES:
            column_page = tl.load(column_page_ptr + column, mask=inside, other=-2)
        e, q, e_inverse = candidate_tile(
            position, inside, q_ptr, q_index_ptr, e_ptr, e_index_ptr, D, SAME_Q, HAS_Q_INDEX, HAS_E_INDEX, BLOCK_D
        )  # fmt: skip
        r, _top, _share = reconstruct_candidates(
            q,
            k_ptr,
            k_index_ptr,
            v_ptr,
            v_index_ptr,
            history_page_ptr,
            past,
            until,
            page,
            scale,
            D,
            HEADS,
            COSINE,
            HAS_K_INDEX,
            HAS_V_INDEX,
            BLOCK_H,
            BLOCK_D,
            PRECISION,
        )
        cosine, _inverse = cosine_of(r, e, e_inverse)
        t = cosine * inverse_tau
        multiple = tl.full([BLOCK_M], 1, tl.int32)
        ranked = t
        if HAS_BIAS:
            bias = tl.load(column_bias_ptr + column, mask=inside, other=0.0)
            t += bias
            if BIAS_IS_COUNT:
                multiple = tl.floor(tl.exp2(bias) + 0.5).to(tl.int32)
            else:
                ranked = t
        allowed = allowed_pairs(id, column_page, inside, own_id, page, slot_valid, MASK)
        each = tl.where(allowed, t[:, None], -float("inf"))
        new_top = tl.maximum(top, tl.max(each, axis=0))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        total = total * tl.exp2(top - shift) + tl.sum(tl.exp2(each - shift[None, :]), axis=0)
        top = new_top
        if NEED_RANK:
            better = allowed & (ranked[:, None] > own[None, :])
            above += tl.sum(tl.where(better, multiple[:, None], 0), axis=0)
    tl.store(top_ptr + where, top, mask=slot_valid)
    tl.store(total_ptr + where, total, mask=slot_valid)
    if NEED_RANK:
        tl.store(above_ptr + where, above, mask=slot_valid)


@kernel
def finish_candidates(
    top_ptr,  # [parts, capacity]
    total_ptr,
    above_ptr,
    count_ptr,
    positive_ptr,  # [capacity, 2]
    list_ptr,  # [capacity] PV rows of the anchors
    log_q_ptr,  # [N]
    loss_ptr,  # [capacity]
    lse_ptr,  # [capacity] in powers of two
    miss_ptr,  # [capacity] 1 - p of the positive
    item_lse_ptr,  # [N]
    item_positive_ptr,
    item_rank_ptr,
    capacity,
    parts,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    HAS_LOG_Q: tl.constexpr,
    STATS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """loss_i = logsumexp_{j in cand(i)} s_ij - s_ii, from the parts' sums and the positive."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < tl.load(count_ptr)
    scale = score_scale(tau, TAU_IS_TENSOR)
    top = tl.full([BLOCK], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    above = tl.zeros([BLOCK], tl.int32)
    for part in range(parts):
        where = part * capacity.to(tl.int64) + row
        part_top = tl.load(top_ptr + where, mask=valid, other=-float("inf"))
        part_total = tl.load(total_ptr + where, mask=valid, other=0.0)
        top, total = add_in(top, total, part_top, part_total)
        if STATS:
            above += tl.load(above_ptr + where, mask=valid, other=0)
    log_q = log_q_ptr if HAS_LOG_Q else None
    items = Items(item_lse_ptr, item_positive_ptr, item_rank_ptr) if STATS else None
    out = AnchorResults(loss_ptr, lse_ptr, miss_ptr, items)
    finish(row, valid, top, total, above, positive_ptr, list_ptr, log_q, scale, out)


@triton.jit
def score_gradients(
    t,  # [BLOCK_M], biases included
    id,
    position,
    column_page,
    inside,
    page,
    first,
    last,
    anchor_list_ptr,
    anchor_id_ptr,
    lse_ptr,
    miss_ptr,
    g_ptr,
    MASK: tl.constexpr,
    MERGED: tl.constexpr,
    SLOTS: tl.constexpr,
):
    """dL/ds_bj [BLOCK_M]: sum over the page's anchors i of g_i (p_ij - [j = i])."""
    found = tl.zeros([t.shape[0]], tl.float32)
    for start in range(first, last, SLOTS):
        slot = start + tl.arange(0, SLOTS)
        slot_valid = slot < last
        own_id = tl.load(anchor_id_ptr + slot, mask=slot_valid, other=0)
        own = tl.load(anchor_list_ptr + slot, mask=slot_valid, other=-1)
        lse = tl.load(lse_ptr + slot, mask=slot_valid, other=0.0)
        g = tl.load(g_ptr + slot, mask=slot_valid, other=0.0)
        pull = g * tl.load(miss_ptr + slot, mask=slot_valid, other=0.0)
        allowed = allowed_pairs(id, column_page, inside, own_id, page, slot_valid, MASK)
        # A row without weight has no share, also where its log-sum-exp is over nothing.
        p = tl.where(allowed & (g != 0.0)[None, :], tl.exp2(t[:, None] - lse[None, :]), 0.0)
        if MERGED:
            positive = id[:, None] == own_id[None, :]
        else:
            positive = position[:, None] == own[None, :]
        positive = positive & inside[:, None] & slot_valid[None, :]
        found += tl.sum(p * g[None, :] - tl.where(positive, pull[None, :], 0.0), axis=1)
    return found


@triton.jit
def reconstruction_gradients(r, e, r_inverse, e_inverse, cosine, g):
    """dL/dR and dL/dE of a tile of candidates on one page, both float32 [BLOCK_M, BLOCK_D]; g is dL/dcos."""
    unit_r = r * r_inverse[:, None]
    unit_e = e.to(tl.float32) * e_inverse[:, None]
    dr = (unit_e - cosine[:, None] * unit_r) * (g * r_inverse)[:, None]
    de = (unit_r - cosine[:, None] * unit_e) * (g * e_inverse)[:, None]
    return dr, de


@kernel
def candidate_columns(
    q_ptr,
    q_index_ptr,
    k_ptr,
    k_index_ptr,
    v_ptr,
    v_index_ptr,
    e_ptr,
    e_index_ptr,
    pv_offsets_ptr,
    history_offsets_ptr,
    history_page_ptr,
    anchor_list_ptr,
    anchor_page_ptr,
    anchor_id_ptr,
    anchor_rank_ptr,
    anchor_count_ptr,
    column_list_ptr,
    column_page_ptr,
    column_id_ptr,
    column_bias_ptr,
    column_count_ptr,
    lse_ptr,
    miss_ptr,
    g_ptr,
    long_ptr,  # first anchors of the pages that are not packed
    packed_count_ptr,
    de_ptr,  # [N or n, D], rows at their places
    dq_ptr,  # [N, D] likewise
    tau_part_ptr,  # [programs] sum of g cos
    tau,
    scale,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COSINE: tl.constexpr,
    SAME_Q: tl.constexpr,
    HAS_Q_INDEX: tl.constexpr,
    HAS_K_INDEX: tl.constexpr,
    HAS_V_INDEX: tl.constexpr,
    HAS_E_INDEX: tl.constexpr,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MERGED: tl.constexpr,
    WANT_E: tl.constexpr,
    WANT_Q: tl.constexpr,
    PACKED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dL/dE and dL/dq of a tile of candidates, over all pages with an anchor; with SAME_Q their sum is dL/dE."""
    pid = tl.program_id(0)
    listed = tl.load(packed_count_ptr + 1) if PACKED else 0
    if PACKED:
        if listed == 0:
            tl.store(tau_part_ptr + pid, 0.0)
            return
    column = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = column < tl.load(column_count_ptr)
    position = tl.load(column_list_ptr + column, mask=inside, other=0)
    id = tl.load(column_id_ptr + column, mask=inside, other=0)
    column_page = column
    if MASK == MASK_OTHER_PAGES or MASK == MASK_PAGE:
        column_page = tl.load(column_page_ptr + column, mask=inside, other=-2)
    bias = tl.zeros([BLOCK_M], tl.float32)
    if HAS_BIAS:
        bias = tl.load(column_bias_ptr + column, mask=inside, other=0.0)
    e, q, e_inverse = candidate_tile(
        position, inside, q_ptr, q_index_ptr, e_ptr, e_index_ptr, D, SAME_Q, HAS_Q_INDEX, HAS_E_INDEX, BLOCK_D
    )  # fmt: skip
    inverse_tau = score_scale(tau, TAU_IS_TENSOR)
    d_e = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    slope = tl.zeros([BLOCK_M], tl.float32)
    count = tl.load(anchor_count_ptr)
    low_page = tl.min(tl.where(inside, column_page, 2147483647), axis=0)
    high_page = tl.max(tl.where(inside, column_page, -1), axis=0)
    first = count * 0
    if MASK == MASK_PAGE:
        there = high_page >= 0
        first = rank_before(
            anchor_rank_ptr, tl.load(pv_offsets_ptr + low_page, mask=there, other=0)
        )
        count = rank_before(
            anchor_rank_ptr, tl.load(pv_offsets_ptr + high_page + 1, mask=there, other=0)
        )
    index = first
    if PACKED:
        first = tl.load(long_ptr)
    while first < count:
        page = tl.load(anchor_page_ptr + first)
        last = rank_before(anchor_rank_ptr, tl.load(pv_offsets_ptr + page + 1))
        past = tl.load(history_offsets_ptr + page)
        until = tl.load(history_offsets_ptr + page + 1)
        r, top, share = reconstruct_candidates(
            q,
            k_ptr,
            k_index_ptr,
            v_ptr,
            v_index_ptr,
            history_page_ptr,
            past,
            until,
            page,
            scale,
            D,
            HEADS,
            COSINE,
            HAS_K_INDEX,
            HAS_V_INDEX,
            BLOCK_H,
            BLOCK_D,
            PRECISION,
        )
        cosine, r_inverse = cosine_of(r, e, e_inverse)
        seen = inside
        if MASK == MASK_PAGE:
            seen = inside & (column_page == page)
        g = score_gradients(
            cosine * inverse_tau + bias,
            id,
            position,
            column_page,
            seen,
            page,
            first,
            last,
            anchor_list_ptr,
            anchor_id_ptr,
            lse_ptr,
            miss_ptr,
            g_ptr,
            MASK,
            MERGED,
            SLOTS,
        )
        slope += g * cosine
        dr, de = reconstruction_gradients(r, e, r_inverse, e_inverse, cosine, g * inverse_tau * LN2)
        d_e += de
        for head in range(HEADS):
            q_head = of_head(q, head, D, HEADS, BLOCK_D)
            dr_head = of_head(dr, head, D, HEADS, BLOCK_D)
            q_inverse = head_lengths(q_head, COSINE)
            if HEADS > 1:
                _r, top, share = attend_page(
                    q_head,
                    q_inverse,
                    k_ptr,
                    k_index_ptr,
                    v_ptr,
                    v_index_ptr,
                    history_page_ptr,
                    past,
                    until,
                    page,
                    head,
                    scale,
                    D,
                    HEADS,
                    COSINE,
                    HAS_K_INDEX,
                    HAS_V_INDEX,
                    BLOCK_H,
                    BLOCK_D,
                    PRECISION,
                )
            delta = tl.sum(dr_head * r, axis=1)
            turned = tl.zeros([BLOCK_M], tl.float32)
            part = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for start in range(past, until, BLOCK_H):
                row = start + tl.arange(0, BLOCK_H)
                mine = page_history(history_page_ptr, row, until, page)
                k = of_head(load_rows(k_ptr, k_index_ptr, row, mine, D, BLOCK_D, HAS_K_INDEX), head, D, HEADS, BLOCK_D)  # fmt: skip
                v = of_head(load_rows(v_ptr, v_index_ptr, row, mine, D, BLOCK_D, HAS_V_INDEX), head, D, HEADS, BLOCK_D)  # fmt: skip
                s = logits(q_head, k, q_inverse, scale, mine, COSINE, PRECISION)
                a = tl.exp2((s - top[:, None]) * LOG2E) * share[:, None]
                da = tl.dot(
                    dr_head.to(DOT_TYPE), tl.trans(v.to(DOT_TYPE)), input_precision=PRECISION
                )
                ds = tl.where(mine[None, :], a * (da - delta[:, None]), 0.0)
                if COSINE:
                    turned += tl.sum(tl.where(mine[None, :], ds * s, 0.0), axis=1)
                    ds = ds * head_lengths(k, COSINE)[None, :]
                part = tl.dot(ds.to(DOT_TYPE), k.to(DOT_TYPE), part, input_precision=PRECISION)
            part = of_head(part, head, D, HEADS, BLOCK_D) * (scale * q_inverse)[:, None]
            if COSINE:
                part -= (turned * q_inverse * q_inverse)[:, None] * q_head.to(tl.float32)
            d_q += part
        first = last
        if PACKED:
            index += 1
            first = tl.load(long_ptr + index, mask=index < listed, other=2147483647)
    dims = tl.arange(0, BLOCK_D)
    where = position.to(tl.int64)[:, None] * D + dims[None, :]
    mask = inside[:, None] & (dims < D)[None, :]
    if SAME_Q:
        d_e += d_q
    if WANT_E:
        tl.store(de_ptr + where, d_e.to(de_ptr.dtype.element_ty), mask=mask)
    if WANT_Q and not SAME_Q:
        tl.store(dq_ptr + where, d_q.to(dq_ptr.dtype.element_ty), mask=mask)
    tl.store(tau_part_ptr + pid, tl.sum(slope, axis=0))


@kernel
def candidate_history(
    q_ptr,
    q_index_ptr,
    k_ptr,
    k_index_ptr,
    v_ptr,
    v_index_ptr,
    e_ptr,
    e_index_ptr,
    pv_offsets_ptr,
    history_offsets_ptr,
    history_page_ptr,
    anchor_list_ptr,
    anchor_id_ptr,
    anchor_rank_ptr,
    column_list_ptr,
    column_page_ptr,
    column_id_ptr,
    column_bias_ptr,
    y_rank_ptr,
    column_count_ptr,
    lse_ptr,
    miss_ptr,
    g_ptr,
    page_place_ptr,
    dk_ptr,  # [K, D]
    dv_ptr,
    tau,
    scale,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COSINE: tl.constexpr,
    SAME_Q: tl.constexpr,
    HAS_Q_INDEX: tl.constexpr,
    HAS_K_INDEX: tl.constexpr,
    HAS_V_INDEX: tl.constexpr,
    HAS_E_INDEX: tl.constexpr,
    TAU_IS_TENSOR: tl.constexpr,
    MASK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    MERGED: tl.constexpr,
    WANT_DK: tl.constexpr,
    WANT_DV: tl.constexpr,
    SUM_KV: tl.constexpr,
    PACKED: tl.constexpr,
    DOT_TYPE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dL/dk and dL/dv of a page's history, over all candidates; SUM_KV: their sum to dk. Zeros without an anchor."""
    page = tl.program_id(0)
    if PACKED:
        if tl.load(page_place_ptr + page) >= 0:
            return
    first = rank_before(anchor_rank_ptr, tl.load(pv_offsets_ptr + page))
    last = rank_before(anchor_rank_ptr, tl.load(pv_offsets_ptr + page + 1))
    past = tl.load(history_offsets_ptr + page)
    until = tl.load(history_offsets_ptr + page + 1)
    low, high = columns_of(page, pv_offsets_ptr, y_rank_ptr, tl.load(column_count_ptr), MASK)
    if first >= last:
        high = low
    inverse_tau = score_scale(tau, TAU_IS_TENSOR)
    dims = tl.arange(0, BLOCK_D)
    for block in range(past, until, BLOCK_H):
        row = block + tl.arange(0, BLOCK_H)
        mine = page_history(history_page_ptr, row, until, page)
        all_k = load_rows(k_ptr, k_index_ptr, row, mine, D, BLOCK_D, HAS_K_INDEX)
        all_v = load_rows(v_ptr, v_index_ptr, row, mine, D, BLOCK_D, HAS_V_INDEX)
        d_k = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        d_v = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        for start in range(low, high, BLOCK_M):
            column = start + tl.arange(0, BLOCK_M)
            inside = column < high
            position = tl.load(column_list_ptr + column, mask=inside, other=0)
            id = tl.load(column_id_ptr + column, mask=inside, other=0)
            column_page = column
            if MASK == MASK_OTHER_PAGES:
                column_page = tl.load(column_page_ptr + column, mask=inside, other=-2)
            bias = tl.zeros([BLOCK_M], tl.float32)
            if HAS_BIAS:
                bias = tl.load(column_bias_ptr + column, mask=inside, other=0.0)
            e, q, e_inverse = candidate_tile(
                position, inside, q_ptr, q_index_ptr, e_ptr, e_index_ptr, D, SAME_Q, HAS_Q_INDEX, HAS_E_INDEX, BLOCK_D
            )  # fmt: skip
            r, top, share = reconstruct_candidates(
                q,
                k_ptr,
                k_index_ptr,
                v_ptr,
                v_index_ptr,
                history_page_ptr,
                past,
                until,
                page,
                scale,
                D,
                HEADS,
                COSINE,
                HAS_K_INDEX,
                HAS_V_INDEX,
                BLOCK_H,
                BLOCK_D,
                PRECISION,
            )
            cosine, r_inverse = cosine_of(r, e, e_inverse)
            g = score_gradients(
                cosine * inverse_tau + bias,
                id,
                position,
                column_page,
                inside,
                page,
                first,
                last,
                anchor_list_ptr,
                anchor_id_ptr,
                lse_ptr,
                miss_ptr,
                g_ptr,
                MASK,
                MERGED,
                SLOTS,
            )
            dr, _de = reconstruction_gradients(
                r, e, r_inverse, e_inverse, cosine, g * inverse_tau * LN2
            )
            for head in range(HEADS):
                q_head = of_head(q, head, D, HEADS, BLOCK_D)
                dr_head = of_head(dr, head, D, HEADS, BLOCK_D)
                k = of_head(all_k, head, D, HEADS, BLOCK_D)
                v = of_head(all_v, head, D, HEADS, BLOCK_D)
                q_inverse = head_lengths(q_head, COSINE)
                if HEADS > 1:
                    _r, top, share = attend_page(
                        q_head,
                        q_inverse,
                        k_ptr,
                        k_index_ptr,
                        v_ptr,
                        v_index_ptr,
                        history_page_ptr,
                        past,
                        until,
                        page,
                        head,
                        scale,
                        D,
                        HEADS,
                        COSINE,
                        HAS_K_INDEX,
                        HAS_V_INDEX,
                        BLOCK_H,
                        BLOCK_D,
                        PRECISION,
                    )
                s = logits(q_head, k, q_inverse, scale, mine, COSINE, PRECISION)
                a = tl.exp2((s - top[:, None]) * LOG2E) * share[:, None]
                if WANT_DV:
                    d_v = tl.dot(
                        tl.trans(a.to(DOT_TYPE)),
                        dr_head.to(DOT_TYPE),
                        d_v,
                        input_precision=PRECISION,
                    )
                if WANT_DK:
                    da = tl.dot(
                        dr_head.to(DOT_TYPE), tl.trans(v.to(DOT_TYPE)), input_precision=PRECISION
                    )
                    delta = tl.sum(dr_head * r, axis=1)
                    ds = tl.where(mine[None, :], a * (da - delta[:, None]), 0.0)
                    turned = tl.sum(tl.where(mine[None, :], ds * s, 0.0), axis=0)
                    ds = ds * (scale * q_inverse)[:, None]
                    k_inverse = head_lengths(k, COSINE)
                    part = tl.dot(
                        tl.trans(ds.to(DOT_TYPE)), q_head.to(DOT_TYPE), input_precision=PRECISION
                    )
                    part = of_head(part, head, D, HEADS, BLOCK_D)
                    if COSINE:
                        part = part * k_inverse[:, None]
                        part -= (turned * k_inverse * k_inverse)[:, None] * k.to(tl.float32)
                    d_k += part
        where = row.to(tl.int64)[:, None] * D + dims[None, :]
        mask = (row < until)[:, None] & (dims < D)[None, :]
        if SUM_KV:
            d_k += d_v
        if WANT_DK or SUM_KV:
            tl.store(dk_ptr + where, d_k.to(dk_ptr.dtype.element_ty), mask=mask)
        if WANT_DV and not SUM_KV:
            tl.store(dv_ptr + where, d_v.to(dv_ptr.dtype.element_ty), mask=mask)
