"""Triton: attention for each candidate. A reconstruction of every candidate from every page's
history is made in registers, compared with the candidate, and forgotten; the backward makes it
again.

For page b and candidate j: R_bj = sum_k a_bjk v_k, a_bjk = softmax over k in H_b of (c q_j . k_k),
s_bj = cos(R_bj, E_j) / tau. Scores in powers of two, t_bj = log2(e) s_bj + bias_j. With
g_bj = dL/ds_bj and rows of unit length e, r:

    dL/dR_bj = g/tau ( e_j - cos r_bj ) / |R_bj|,   dL/dE_j += g/tau ( r_bj - cos e_j ) / |E_j|,
    dL/dlogit_k = a_k ( dL/da_k - sum_l a_l dL/da_l ),  dL/da_k = dL/dR . v_k,

and from there as in any attention.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from ....loss.problem import Problem
from .. import tiles
from ..attention import attention_sources
from ..common import (
    Source,
    add_in,
    kernel,
    load_source,
    score_scale,
)
from ..masks import MASK_OTHER_PAGES, MASK_PAGE
from ..results import AnchorResults, Items, finish
from ..rows import e_source
from .attention import (
    Anchors,
    Attention,
    Candidates,
    Columns,
    History,
    Own,
    Rules,
    Tile,
    add_scores,
    allowed_pairs,
    candidate_rows,
    columns_of,
    cosine_of,
    count_above,
    head_lengths,
    head_of,
    inverse_length,
    listed_before,
    load_bias,
    load_columns,
    load_head,
    mean_gradient,
    of_head,
    own_ranked,
    page_gradients,
    page_history,
    reconstruct_candidates,
    scores_of,
    weight_gradients,
)
from .pages import EVERY_PAGE, Pages, page_anchors
from .state import CandidateShape, CandidateState


@kernel
def own_scores(
    q_of,  # Source, as all of that name
    k_of,
    v_of,
    e_of,
    pages,  # Pages
    history_page_ptr,
    list_ptr,  # PV rows of the anchors
    page_list_ptr,
    page_count_ptr,
    positive_ptr,  # [capacity, 2]: twice the same
    scale,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COSINE: tl.constexpr,
    SAME_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """cos(R_i, E_i) of the anchors, page by page."""
    how: tl.constexpr = Attention(D, HEADS, COSINE, SAME_Q, BLOCK_H, BLOCK_D, PRECISION)
    candidates = Candidates(e_of, q_of)
    history = History(k_of, v_of, history_page_ptr, scale)
    for index in range(tl.program_id(0), tl.load(page_count_ptr), tl.num_programs(0)):
        page = tl.load(page_list_ptr + index)
        past = tl.load(pages.history_offsets + page)
        until = tl.load(pages.history_offsets + page + 1)
        first, last = page_anchors(pages, page)
        for start in range(first, last, BLOCK_M):
            i = start + tl.arange(0, BLOCK_M)
            position = tl.load(list_ptr + i, mask=i < last, other=0)
            e, q = candidate_rows(position, i < last, candidates, how)
            r, _top, _share = reconstruct_candidates(q, history, past, until, page, how)
            cosine, _inverse = cosine_of(r, e, inverse_length(e))
            for part in tl.static_range(2):
                tl.store(positive_ptr + i.to(tl.int64) * 2 + part, cosine, mask=i < last)


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
    anchor_id_ptr,
    anchor_place_ptr,
    page_list_ptr,
    page_count_ptr,
    column_list_ptr,
    column_page_ptr,
    column_id_ptr,
    column_bias_ptr,
    y_place_ptr,
    column_count_ptr,
    positive_ptr,  # [capacity, 2]
    list_ptr,
    log_q_ptr,
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
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(max, sum) of 2^t over some candidates, for the anchors of listed pages, SLOTS at a time."""
    part = tl.program_id(1)
    how: tl.constexpr = Attention(D, HEADS, COSINE, SAME_Q, BLOCK_H, BLOCK_D, PRECISION)
    e_of = Source(e_ptr, e_index_ptr if HAS_E_INDEX else None)
    q_of = Source(q_ptr, q_index_ptr if HAS_Q_INDEX else None)
    candidates = Candidates(e_of, q_of)
    k_of = Source(k_ptr, k_index_ptr if HAS_K_INDEX else None)
    v_of = Source(v_ptr, v_index_ptr if HAS_V_INDEX else None)
    history = History(k_of, v_of, history_page_ptr, scale)
    all = Pages(pv_offsets_ptr, history_offsets_ptr, anchor_place_ptr)
    columns = Columns(
        column_list_ptr, column_id_ptr, column_page_ptr, column_bias_ptr if HAS_BIAS else None
    )
    inverse_tau = score_scale(tau, TAU_IS_TENSOR)
    columns_count = tl.load(column_count_ptr)
    for index in range(tl.program_id(0), tl.load(page_count_ptr), tl.num_programs(0)):
        page = tl.load(page_list_ptr + index)
        low, high = columns_of(page, pv_offsets_ptr, y_place_ptr, columns_count, MASK)
        share_of = tl.cdiv(tl.cdiv(high - low, BLOCK_M), parts) * BLOCK_M
        begin = low + part * share_of
        end = tl.minimum(begin + share_of, high)
        past = tl.load(history_offsets_ptr + page)
        until = tl.load(history_offsets_ptr + page + 1)
        first, last = page_anchors(all, page)
        for start_slot in range(first, last, SLOTS):
            slot = start_slot + tl.arange(0, SLOTS)
            slot_valid = slot < last
            where = part.to(tl.int64) * capacity + slot
            own_id = tl.load(anchor_id_ptr + slot, mask=slot_valid, other=0)
            own = tl.zeros([SLOTS], tl.float32)
            if NEED_RANK:
                own_of = Own(positive_ptr, list_ptr, log_q_ptr if HAS_LOG_Q else None)
                own = own_ranked(own_of, slot, slot_valid, inverse_tau)
            top = tl.full([SLOTS], -float("inf"), tl.float32)
            total = tl.zeros([SLOTS], tl.float32)
            above = tl.zeros([SLOTS], tl.int32)
            for start in range(begin, end, BLOCK_M):
                column = start + tl.arange(0, BLOCK_M)
                inside = column < end
                position, id, column_page = load_columns(
                    columns, column, inside, MASK == MASK_OTHER_PAGES
                )
                e, q = candidate_rows(position, inside, candidates, how)
                r, _top, _share = reconstruct_candidates(q, history, past, until, page, how)
                cosine, _inverse = cosine_of(r, e, inverse_length(e))
                t, ranked, multiple = scores_of(
                    cosine, columns, column, inside, inverse_tau, BIAS_IS_COUNT
                )
                allowed = allowed_pairs(id, column_page, inside, own_id, page, slot_valid, MASK)
                top, total = add_scores(top, total, t, allowed)
                if NEED_RANK:
                    above += count_above(ranked, multiple, allowed, own)
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
    anchor_id_ptr,
    anchor_place_ptr,
    page_list_ptr,
    page_count_ptr,
    column_list_ptr,
    column_page_ptr,
    column_id_ptr,
    column_bias_ptr,
    column_count_ptr,
    lse_ptr,
    miss_ptr,
    g_ptr,
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
    DOT_TYPE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dL/dE and dL/dq of a tile of candidates, over all pages with an anchor; with SAME_Q their sum
    is dL/dE."""
    pid = tl.program_id(0)
    listed = tl.load(page_count_ptr)
    if listed == 0:
        tl.store(tau_part_ptr + pid, 0.0)
        return
    how: tl.constexpr = Attention(D, HEADS, COSINE, SAME_Q, BLOCK_H, BLOCK_D, PRECISION)
    e_of = Source(e_ptr, e_index_ptr if HAS_E_INDEX else None)
    q_of = Source(q_ptr, q_index_ptr if HAS_Q_INDEX else None)
    candidates = Candidates(e_of, q_of)
    k_of = Source(k_ptr, k_index_ptr if HAS_K_INDEX else None)
    v_of = Source(v_ptr, v_index_ptr if HAS_V_INDEX else None)
    history = History(k_of, v_of, history_page_ptr, scale)
    all = Pages(pv_offsets_ptr, history_offsets_ptr, anchor_place_ptr)
    columns = Columns(
        column_list_ptr, column_id_ptr, column_page_ptr, column_bias_ptr if HAS_BIAS else None
    )
    anchors = Anchors(anchor_list_ptr, anchor_id_ptr, lse_ptr, miss_ptr, g_ptr)
    rules: tl.constexpr = Rules(MASK, MERGED, SLOTS)
    column = pid * BLOCK_M + tl.arange(0, BLOCK_M)
    inside = column < tl.load(column_count_ptr)
    with_page: tl.constexpr = MASK == MASK_OTHER_PAGES or MASK == MASK_PAGE
    position, id, column_page = load_columns(columns, column, inside, with_page)
    bias = load_bias(columns, column, inside)
    e, q = candidate_rows(position, inside, candidates, how)
    inverse_tau = score_scale(tau, TAU_IS_TENSOR)
    d_e = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    d_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    e_inverse = inverse_length(e)
    slope = tl.zeros([BLOCK_M], tl.float32)
    low_page = tl.min(tl.where(inside, column_page, 2147483647), axis=0)
    high_page = tl.max(tl.where(inside, column_page, -1), axis=0)
    index = listed * 0
    if MASK == MASK_PAGE:
        index = listed_before(page_list_ptr, listed, low_page)
        listed = listed_before(page_list_ptr, listed, high_page + 1)
    while index < listed:
        page = tl.load(page_list_ptr + index)
        first, last = page_anchors(all, page)
        past = tl.load(history_offsets_ptr + page)
        until = tl.load(history_offsets_ptr + page + 1)
        seen = inside
        if MASK == MASK_PAGE:
            seen = inside & (column_page == page)
        tile = Tile(e, q, e_inverse, position, id, column_page, bias, seen)
        top, share, dr, de, g_cosine = page_gradients(
            tile, history, anchors, page, first, last, past, until, inverse_tau, rules, how
        )
        slope += g_cosine
        d_e += de
        for head in range(HEADS):
            q_head, dr_head, q_inverse, top, share = head_of(
                tile, dr, top, share, history, past, until, page, head, how
            )
            # The history of most pages is one block, whose sum is at hand.
            alone = until - past <= BLOCK_H
            delta = tl.zeros([BLOCK_M], tl.float32)
            if until - past > BLOCK_H:
                delta = mean_gradient(
                    q_head,
                    q_inverse,
                    dr_head,
                    top,
                    share,
                    history,
                    past,
                    until,
                    page,
                    head,
                    DOT_TYPE,
                    how,
                )
            turned = tl.zeros([BLOCK_M], tl.float32)
            part = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            for start in range(past, until, BLOCK_H):
                row = start + tl.arange(0, BLOCK_H)
                mine = page_history(history_page_ptr, row, until, page)
                k = load_head(history.k, row, mine, head, how)
                v = load_head(history.v, row, mine, head, how)
                s, a, da = weight_gradients(
                    q_head, q_inverse, dr_head, k, v, top, share, scale, mine, DOT_TYPE, how
                )
                own = tl.sum(tl.where(mine[None, :], a * da, 0.0), axis=1)
                delta = tl.where(alone, own, delta)
                ds = tl.where(mine[None, :], a * (da - delta[:, None]), 0.0)
                if COSINE:
                    turned += tl.sum(tl.where(mine[None, :], ds * s, 0.0), axis=1)
                    ds = ds * head_lengths(k, COSINE)[None, :]
                part = tl.dot(ds.to(DOT_TYPE), k.to(DOT_TYPE), part, input_precision=PRECISION)
            part = of_head(part, head, D, HEADS, BLOCK_D) * (scale * q_inverse)[:, None]
            if COSINE:
                part -= (turned * scale * q_inverse * q_inverse)[:, None] * q_head.to(tl.float32)
            d_q += part
        index += 1
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
    anchor_place_ptr,
    page_list_ptr,
    page_count_ptr,
    column_list_ptr,
    column_page_ptr,
    column_id_ptr,
    column_bias_ptr,
    y_place_ptr,
    column_count_ptr,
    lse_ptr,
    miss_ptr,
    g_ptr,
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
    DOT_TYPE: tl.constexpr,
    SLOTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dL/dk and dL/dv of the history of listed pages, over all candidates; SUM_KV: their sum to
    dk."""
    how: tl.constexpr = Attention(D, HEADS, COSINE, SAME_Q, BLOCK_H, BLOCK_D, PRECISION)
    e_of = Source(e_ptr, e_index_ptr if HAS_E_INDEX else None)
    q_of = Source(q_ptr, q_index_ptr if HAS_Q_INDEX else None)
    candidates = Candidates(e_of, q_of)
    k_of = Source(k_ptr, k_index_ptr if HAS_K_INDEX else None)
    v_of = Source(v_ptr, v_index_ptr if HAS_V_INDEX else None)
    history = History(k_of, v_of, history_page_ptr, scale)
    all = Pages(pv_offsets_ptr, history_offsets_ptr, anchor_place_ptr)
    columns = Columns(
        column_list_ptr, column_id_ptr, column_page_ptr, column_bias_ptr if HAS_BIAS else None
    )
    anchors = Anchors(anchor_list_ptr, anchor_id_ptr, lse_ptr, miss_ptr, g_ptr)
    rules: tl.constexpr = Rules(MASK, MERGED, SLOTS)
    inverse_tau = score_scale(tau, TAU_IS_TENSOR)
    columns_count = tl.load(column_count_ptr)
    dims = tl.arange(0, BLOCK_D)
    for index in range(tl.program_id(0), tl.load(page_count_ptr), tl.num_programs(0)):
        page = tl.load(page_list_ptr + index)
        first, last = page_anchors(all, page)
        past = tl.load(history_offsets_ptr + page)
        until = tl.load(history_offsets_ptr + page + 1)
        low, high = columns_of(page, pv_offsets_ptr, y_place_ptr, columns_count, MASK)
        for block in range(past, until, BLOCK_H):
            row = block + tl.arange(0, BLOCK_H)
            mine = page_history(history_page_ptr, row, until, page)
            all_k = load_source(history.k, row, mine, how)
            all_v = load_source(history.v, row, mine, how)
            d_k = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
            d_v = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
            for start in range(low, high, BLOCK_M):
                column = start + tl.arange(0, BLOCK_M)
                inside = column < high
                position, id, column_page = load_columns(
                    columns, column, inside, MASK == MASK_OTHER_PAGES
                )
                bias = load_bias(columns, column, inside)
                e, q = candidate_rows(position, inside, candidates, how)
                tile = Tile(e, q, inverse_length(e), position, id, column_page, bias, inside)
                top, share, dr, _de, _slope = page_gradients(
                    tile, history, anchors, page, first, last, past, until, inverse_tau, rules, how
                )
                for head in range(HEADS):
                    k = of_head(all_k, head, D, HEADS, BLOCK_D)
                    v = of_head(all_v, head, D, HEADS, BLOCK_D)
                    q_head, dr_head, q_inverse, top, share = head_of(
                        tile, dr, top, share, history, past, until, page, head, how
                    )
                    s, a, da = weight_gradients(
                        q_head, q_inverse, dr_head, k, v, top, share, scale, mine, DOT_TYPE, how
                    )
                    if WANT_DV:
                        d_v = tl.dot(
                            tl.trans(a.to(DOT_TYPE)),
                            dr_head.to(DOT_TYPE),
                            d_v,
                            input_precision=PRECISION,
                        )
                    if WANT_DK:
                        delta = tl.sum(tl.where(mine[None, :], a * da, 0.0), axis=1)
                        if until - past > BLOCK_H:
                            delta = mean_gradient(
                                q_head,
                                q_inverse,
                                dr_head,
                                top,
                                share,
                                history,
                                past,
                                until,
                                page,
                                head,
                                DOT_TYPE,
                                how,
                            )
                        ds = tl.where(mine[None, :], a * (da - delta[:, None]), 0.0)
                        turned = tl.sum(tl.where(mine[None, :], ds * s, 0.0), axis=0)
                        ds = ds * (scale * q_inverse)[:, None]
                        k_inverse = head_lengths(k, COSINE)
                        part = tl.dot(
                            tl.trans(ds.to(DOT_TYPE)),
                            q_head.to(DOT_TYPE),
                            input_precision=PRECISION,
                        )
                        part = of_head(part, head, D, HEADS, BLOCK_D)
                        if COSINE:
                            part = part * k_inverse[:, None]
                            part -= (turned * scale * k_inverse * k_inverse)[:, None] * k.to(
                                tl.float32
                            )
                        d_k += part
            where = row.to(tl.int64)[:, None] * D + dims[None, :]
            mask = (row < until)[:, None] & (dims < D)[None, :]
            if SUM_KV:
                d_k += d_v
            if WANT_DK or SUM_KV:
                tl.store(dk_ptr + where, d_k.to(dk_ptr.dtype.element_ty), mask=mask)
            if WANT_DV and not SUM_KV:
                tl.store(dv_ptr + where, d_v.to(dv_ptr.dtype.element_ty), mask=mask)


# ---- launches ------------------------------------------------------------------------------------


def score_own(p: Problem, s: CandidateShape, t: CandidateState, positive: Tensor) -> None:
    """cos(R_i, E_i) of the anchors."""
    tile = tiles.candidate_tile(s.dtype, s.block_d, s.device)
    own_scores[(min(s.pages, 2 * tiles.programs(s.device)),)](
        *attention_sources(p),
        e_source(p),
        Pages(p.pv_offsets, p.history_offsets, t.places[0]),
        t.history_page,
        t.anchor.list,
        t.page_list[EVERY_PAGE],
        t.page_count[EVERY_PAGE:],
        positive,
        p.attention_scale,
        D=s.dim,
        HEADS=s.heads,
        COSINE=p.cosine,
        SAME_Q=p.query is None,
        BLOCK_M=16,
        BLOCK_H=tile.block_n,
        BLOCK_D=s.block_d,
        PRECISION=s.precision,
        **tile.launch,
    )
