"""impl="triton", attention for each candidate: forward and backward as a sequence of launches (candidate.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor

from . import candidate, configs, packed_pipeline
from .stages import (
    attention_inputs,
    make_plan,
    occurrences,
    reduce_losses,
    row_gradients,
    sum_occurrences,
)
from .state import MASKS, Shape, cdiv, empty_tensors, loss_shape, plan_spec, temperature_argument

if TYPE_CHECKING:
    from courier_fast.problem import Problem

# Anchors of a page whose sums are kept side by side.
SLOTS = 16


def _merged(p: Problem, s: Shape) -> bool:
    """Equal candidates are one column, unless each occurrence has a query of its own."""
    return s.merged and p.query is None


def state_spec(p: Problem, s: Shape) -> dict[str, tuple[Any, torch.dtype]]:
    """Everything that the backward needs, in the order of `saved`."""
    rows = s.rows
    columns = s.items if _merged(p, s) else rows
    spec = plan_spec(p, s)
    del spec["attention_lse"]
    spec |= {
        "column_list": ((columns,), torch.int32),
        "column_page": ((columns,), torch.int32),
        "column_id": ((columns,), s.id_dtype),
        "lse": ((rows,), torch.float32),
        "miss": ((rows,), torch.float32),
        "weight_sum": ((), torch.float32),
    }
    if packed_pipeline.packs(p, _merged(p, s)):
        spec |= packed_pipeline.state_spec(p, s, columns)
        spec["positive"] = ((rows, 2), torch.float32)
    if p.log_q is not None or _merged(p, s):
        spec["column_bias"] = ((columns,), torch.float32)
    if _merged(p, s):
        spec |= {"item_count": ((s.items,), torch.int32), "item_rank": ((s.items,), torch.int32)}
    return spec


def _inputs(p: Problem, merged: bool) -> dict[str, Any]:
    """q, k, v and E with the index each is read through, and what is known of the attention."""
    found = attention_inputs(p)
    same = p.query is None
    if merged:  # columns are rows of the table
        found["HAS_Q_INDEX"] = False
    return found | {
        "e_ptr": p.pv,
        "e_index_ptr": p.pv_index if p.pv_index is not None else p.pv_offsets,
        "HAS_E_INDEX": p.pv_index is not None and not merged,
        "SAME_Q": same,
        "scale": p.attention_scale,
        "D": p.pv.shape[1],
        "HEADS": p.num_heads,
        "COSINE": p.cosine,
    }


def _columns(p: Problem, s: Shape, t: dict[str, Tensor]) -> dict[str, Any]:
    """Lists of the columns and anchors, and which pairs of them count."""
    has_ids = p.item_ids is not None or p.pv_index is not None
    return {
        "anchor_id_ptr": t["anchor_id"] if has_ids else t["anchor_list"],
        "anchor_rank_ptr": t["ranks"][0],
        "column_list_ptr": t["column_list"],
        "column_page_ptr": t["column_page"],
        "column_id_ptr": t["column_id"] if has_ids and not _merged(p, s) else t["column_list"],
        "column_bias_ptr": t.get("column_bias", t["lse"]),
        "column_count_ptr": t["counts"][2:3],
        "HAS_BIAS": "column_bias" in t,
        "MASK": MASKS[p.negatives],
    }


def tiles_of(s: Shape) -> dict[str, Any]:
    tile = configs.candidate_tile(s.precision, s.block_d)
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_H": tile.block_n,
        "BLOCK_D": s.block_d,
        "PRECISION": s.precision,
        **tile.launch,
    }


def parts_of(device: torch.device, pages: int) -> int:
    """Into how many the candidates are divided, where there are few pages: decided by what may be there, not by what is."""
    return max(1, min(16, configs.programs(device) * 4 // max(pages, 1)))


def forward(
    p: Problem, stats: bool, per_row: tuple[Tensor, ...]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(loss, item losses, state); `per_row` are where statistics go: item loss, log-sum-exp, similarity, rank."""
    s = loss_shape(p)
    device = p.pv.device
    merged = _merged(p, s)
    t = empty_tensors(state_spec(p, s), device)
    make_plan(p, s, t, p.clicked)
    tau, tau_is_tensor = temperature_argument(p)
    temperature = {"tau": tau, "TAU_IS_TENSOR": tau_is_tensor}
    item_loss, item_lse, item_positive, item_rank = per_row
    history = {
        "history_offsets_ptr": p.history_offsets,
        "history_page_ptr": t["history_page"],
    }
    positive = t.get("positive")
    if positive is None:
        positive = torch.empty(s.rows, 2, dtype=torch.float32, device=device)
    packed = packed_pipeline.packs(p, _merged(p, s))
    if packed:
        packed_pipeline.pack(p, s, t)
    # Ranks need every score beside every anchor's.
    fast = packed and not stats
    tiles = tiles_of(s)
    candidate.own_scores[(s.rows,)](
        **_inputs(p, False),
        **history,
        list_ptr=t["anchor_list"],
        list_page_ptr=t["anchor_page"],
        count_ptr=t["counts"][0:1],
        positive_ptr=positive,
        **(tiles | {"BLOCK_M": 16}),
    )
    parts = parts_of(device, s.pages)
    top = torch.empty(parts, s.rows, dtype=torch.float32, device=device)
    total = torch.empty_like(top)
    above = torch.empty((parts, s.rows) if stats else (1, 1), dtype=torch.int32, device=device)
    log_q = p.log_q if p.log_q is not None else positive
    candidate.candidate_scores[(s.rows, parts)](
        **_inputs(p, merged),
        **history,
        **_columns(p, s, t),
        **temperature,
        pv_offsets_ptr=p.pv_offsets,
        anchor_page_ptr=t["anchor_page"],
        anchor_count_ptr=t["counts"][0:1],
        y_rank_ptr=t["ranks"][2],
        positive_ptr=positive,
        list_ptr=t["anchor_list"],
        log_q_ptr=log_q,
        page_place_ptr=t["page_place"] if fast else above,
        top_ptr=top,
        total_ptr=total,
        above_ptr=above,
        capacity=s.rows,
        parts=parts,
        BIAS_IS_COUNT=merged,
        HAS_LOG_Q=p.log_q is not None,
        NEED_RANK=stats,
        PACKED=fast,
        SLOTS=SLOTS,
        **tiles,
    )
    if fast:
        packed_pipeline.scores(p, s, t, top, total)
    losses = torch.empty(s.rows, dtype=torch.float32, device=device)
    candidate.finish_candidates[(cdiv(s.rows, 256),)](
        top,
        total,
        above,
        t["counts"][0:1],
        positive,
        t["anchor_list"],
        log_q,
        losses,
        t["lse"],
        t["miss"],
        item_lse,
        item_positive,
        item_rank,
        s.rows,
        parts,
        tau,
        TAU_IS_TENSOR=tau_is_tensor,
        HAS_LOG_Q=p.log_q is not None,
        STATS=stats,
        BLOCK=256,
    )
    loss, items = reduce_losses(p, s, t, [losses], item_loss, stats)
    return loss, items, t


def backward(
    p: Problem, needs: Sequence[bool], saved: Sequence[Tensor], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of (pv, history, query, key, value, temperature)."""
    s = loss_shape(p)
    device, dtype = p.pv.device, p.pv.dtype
    merged, table = _merged(p, s), p.history is None
    packed = packed_pipeline.packs(p, _merged(p, s))
    t = dict(zip(state_spec(p, s), saved, strict=True))
    tau, tau_is_tensor = temperature_argument(p)
    g = row_gradients(p, s, t, grad, t["weight_sum"], 1.0)
    tiles = tiles_of(s)
    shared = {
        **_inputs(p, merged),
        **_columns(p, s, t),
        **tiles,
        "tau": tau,
        "TAU_IS_TENSOR": tau_is_tensor,
        "pv_offsets_ptr": p.pv_offsets,
        "history_offsets_ptr": p.history_offsets,
        "history_page_ptr": t["history_page"],
        "anchor_list_ptr": t["anchor_list"],
        "lse_ptr": t["lse"],
        "miss_ptr": t["miss"],
        "g_ptr": g,
        "MERGED": merged,
        "PACKED": packed,
        "SLOTS": SLOTS,
        # float16 has too little range for gradients of a mean over many anchors: their products run in tf32.
        "DOT_TYPE": tl.bfloat16 if dtype == torch.bfloat16 else tl.float32,
    }
    grads: list[Tensor | None] = [None] * 6

    columns = s.items if merged else s.rows
    want_e, want_q = needs[0], needs[2] if p.query is not None else needs[0]
    d_e = d_q = tau_parts = None
    if want_e or want_q or needs[5]:
        kind = torch.float32 if table else dtype
        d_e = torch.zeros(columns, s.dim, dtype=kind, device=device) if want_e else None
        if p.query is not None and want_q:
            d_q = torch.zeros_like(p.query)
        programs = cdiv(columns, tiles["BLOCK_M"])
        tau_parts = torch.empty(programs, dtype=torch.float32, device=device)
        candidate.candidate_columns[(programs,)](
            **shared,
            anchor_page_ptr=t["anchor_page"],
            anchor_count_ptr=t["counts"][0:1],
            long_ptr=t["long"] if packed else t["counts"],
            packed_count_ptr=t["packed_count"] if packed else t["counts"],
            de_ptr=d_e if d_e is not None else g,
            dq_ptr=d_q if d_q is not None else g,
            tau_part_ptr=tau_parts,
            WANT_E=want_e,
            WANT_Q=want_q,
        )
        grads[2] = d_q

    own = needs[0] if table else needs[1]
    want_k = needs[3] if p.key is not None else own
    want_v = needs[4] if p.value is not None else own
    together = p.key is None and p.value is None
    d_k = d_v = None
    if want_k or want_v:

        def output(given: Tensor | None) -> Tensor:
            kind = torch.float32 if table and given is None else dtype
            return torch.zeros(s.history_rows, s.dim, dtype=kind, device=device)

        d_k = output(p.key) if want_k else None
        d_v = output(p.value) if want_v and not together else None
        candidate.candidate_history[(s.pages,)](
            **shared,
            y_rank_ptr=t["ranks"][2],
            page_place_ptr=t["page_place"] if packed else t["counts"],
            dk_ptr=d_k if d_k is not None else g,
            dv_ptr=d_v if d_v is not None else g,
            WANT_DK=want_k,
            WANT_DV=want_v,
            SUM_KV=together,
        )
    tau_sums = [tau_parts] if tau_parts is not None else []
    if packed:
        more = packed_pipeline.backward(p, s, t, g, d_e, d_k, needs[5])
        tau_sums += [more] if more is not None else []
    if needs[5]:
        assert p.temperature is not None
        # Every score is cos / tau: the sum of g cos is dL/d(1/tau).
        grads[5] = -torch.cat(tau_sums).sum() / p.temperature.square()
    grads[3] = d_k if needs[3] else None
    grads[4] = d_v if needs[4] else None
    d_history = d_k if p.key is None else d_v if p.value is None else None
    if not table:
        grads[0] = d_e
        if needs[1]:
            grads[1] = d_history if d_history is not None else torch.zeros_like(p.history)
    elif needs[0]:
        assert d_e is not None and p.pv_index is not None and p.history_index is not None
        shown = p.pv_index, t["pv_page"]
        if merged:  # a column of each item, in place of its occurrences
            every = torch.arange(s.items, dtype=torch.int32, device=device)
            shown = every, torch.zeros_like(every)
        order, starts = occurrences(s.items, [shown, (p.history_index, t["history_page"])])
        grads[0] = sum_occurrences(p.pv, s, order, starts, d_e, d_history, len(shown[0]))
    return grads
