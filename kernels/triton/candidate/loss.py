"""impl="triton", attention for each candidate: forward and backward as a sequence of launches
(kernels.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ....loss.problem import Gradients, Needs, Problem
from .. import tiles
from ..attention import attention_sources
from ..attention_backward import empty_history
from ..common import temperature
from ..gradients import run_row_gradients
from ..masks import MASKS
from ..plan import make_plan
from ..results import reduce_losses
from ..rows import e_source
from ..shapes import Shape, cdiv
from ..state import Spec
from ..table import sum_occurrences
from . import binned, kernels
from .bins import make_bins
from .state import (
    CandidateShape,
    CandidateState,
    candidate_shape,
    fast_path_reasons,
    tell_slow_path,
)

# Anchors of a page whose sums are kept side by side.
SLOTS = 16


def saved_spec(p: Problem) -> Spec:
    """As of triton/loss.py."""
    return CandidateState.spec(candidate_shape(p))


def _inputs(p: Problem, t: CandidateState, merged: bool = False) -> dict[str, Any]:
    """q, k, v and E with the index each is read through, and what is known of the attention;
    `merged`: of the columns."""
    found: dict[str, Any] = {}
    for name, source in zip("qkve", (*attention_sources(p), e_source(p)), strict=True):
        found |= {
            f"{name}_ptr": source.rows,
            f"{name}_index_ptr": p.pv_offsets if source.index is None else source.index,
            f"HAS_{name.upper()}_INDEX": source.index is not None,
        }
    if merged:  # columns are rows of the table
        found |= {"HAS_Q_INDEX": False, "HAS_E_INDEX": False}
    return found | {
        "SAME_Q": p.query is None,
        "history_offsets_ptr": p.history_offsets,
        "history_page_ptr": t.history_page,
        "scale": p.attention_scale,
        "D": p.pv.shape[1],
        "HEADS": p.num_heads,
        "COSINE": p.cosine,
    }


def _columns(p: Problem, s: Shape, t: CandidateState) -> dict[str, Any]:
    """Lists of the columns and anchors, and which pairs of them count."""
    return {
        "anchor_id_ptr": t.anchor.list if p.ids is None else t.anchor.id,
        "anchor_place_ptr": t.places[0],
        "column_list_ptr": t.column.list,
        "column_page_ptr": t.column.page,
        "column_id_ptr": t.column.list if p.ids is None or s.merged else t.column.id,
        "column_bias_ptr": t.lse if t.column.bias is None else t.column.bias,
        "column_count_ptr": t.counts[2:3],
        "HAS_BIAS": t.column.bias is not None,
        "MASK": MASKS[p.negatives],
        "pv_offsets_ptr": p.pv_offsets,
        **temperature(p),
    }


def tiles_of(s: Shape) -> dict[str, Any]:
    tile = tiles.candidate_tile(s.dtype, s.block_d, s.device)
    return {
        "BLOCK_M": tile.block_m,
        "BLOCK_H": tile.block_n,
        "BLOCK_D": s.block_d,
        "PRECISION": s.precision,
        **tile.launch,
    }


def parts_of(device: torch.device, pages: int) -> int:
    """Into how many the candidates are divided, where there are few pages: decided by what may be
    there, not by what is."""
    return max(1, min(16, tiles.programs(device) * 4 // max(pages, 1)))


def forward(
    p: Problem, stats: bool, per_row: Sequence[Tensor]
) -> tuple[Tensor, Tensor, CandidateState]:
    """(loss, item losses, state); `per_row` are where statistics go: item loss, log-sum-exp,
    similarity, rank."""
    s = candidate_shape(p)
    t = CandidateState.empty(s)
    make_plan(p, s, t, p.clicked)
    positive = t.positive
    if positive is None:
        positive = torch.empty(s.rows, 2, dtype=torch.float32, device=s.device)
    bins = t.bins
    if bins is not None:
        make_bins(p, s, t, bins)
    tiles = tiles_of(s)
    kernels.own_scores[(s.rows,)](
        **_inputs(p, t),
        list_ptr=t.anchor.list,
        list_page_ptr=t.anchor.page,
        count_ptr=t.counts[0:1],
        positive_ptr=positive,
        **(tiles | {"BLOCK_M": 16}),
    )
    parts = parts_of(s.device, s.pages)
    top = torch.empty(parts, s.rows, dtype=torch.float32, device=s.device)
    total = torch.empty_like(top)
    above = torch.empty((parts, s.rows) if stats else (1, 1), dtype=torch.int32, device=s.device)
    log_q = p.log_q if p.log_q is not None else positive
    reasons = fast_path_reasons(p, stats)
    if reasons and s.device.type == "cuda":
        tell_slow_path(*reasons)
    fast = None if reasons else bins
    kernels.candidate_scores[(s.rows, parts)](
        **_inputs(p, t, s.merged),
        **_columns(p, s, t),
        anchor_page_ptr=t.anchor.page,
        anchor_count_ptr=t.counts[0:1],
        y_place_ptr=t.places[2],
        positive_ptr=positive,
        list_ptr=t.anchor.list,
        log_q_ptr=log_q,
        page_place_ptr=above if fast is None else fast.page_place,
        top_ptr=top,
        total_ptr=total,
        above_ptr=above,
        capacity=s.rows,
        parts=parts,
        BIAS_IS_COUNT=s.merged,
        HAS_LOG_Q=p.log_q is not None,
        NEED_RANK=stats,
        BINNED=fast is not None,
        SLOTS=SLOTS,
        **tiles,
    )
    if fast is not None:
        binned.scores(p, s, t, fast, top, total)
    losses = torch.empty(s.rows, dtype=torch.float32, device=s.device)
    kernels.finish_candidates[(cdiv(s.rows, 256),)](
        top,
        total,
        above,
        t.counts[0:1],
        positive,
        t.anchor.list,
        log_q,
        losses,
        t.lse,
        t.miss,
        *per_row[1:],
        s.rows,
        parts,
        **temperature(p),
        HAS_LOG_Q=p.log_q is not None,
        STATS=stats,
        BLOCK=256,
    )
    return *reduce_losses(p, s, t, t.weight_sum, [losses], per_row[0], stats), t


def backward(p: Problem, needs: Needs, saved: Sequence[Tensor], grad: Tensor) -> Gradients:
    """Of `p`'s inputs."""
    s = candidate_shape(p)
    t = CandidateState.restored(s, saved)
    table, bins = p.history is None, t.bins
    g = run_row_gradients(p, s, t, grad, t.weight_sum, 1.0)
    shared = {
        **_inputs(p, t, s.merged),
        **_columns(p, s, t),
        **tiles_of(s),
        "anchor_list_ptr": t.anchor.list,
        "lse_ptr": t.lse,
        "miss_ptr": t.miss,
        "g_ptr": g,
        "MERGED": s.merged,
        "BINNED": s.binned,
        "SLOTS": SLOTS,
        # float16 has too little range for gradients of a mean over many anchors: their products run
        # in tf32.
        "DOT_TYPE": tl.bfloat16 if s.dtype == torch.bfloat16 else tl.float32,
    }
    d_e, d_q, tau_sums = _column_gradients(p, s, t, needs, g, shared)
    d_k, d_v = empty_history(p, s, needs, torch.zeros)
    if d_k is not None or d_v is not None:
        together = p.key is None and p.value is None
        # A block that is loaded ahead takes registers that the products need: 72 bytes spilled in
        # place of 16.
        kernels.candidate_history[(s.pages,)](
            **shared | {"num_stages": 1},
            y_place_ptr=t.places[2],
            page_place_ptr=t.counts if bins is None else bins.page_place,
            dk_ptr=d_k if d_k is not None else g,
            dv_ptr=d_v if d_v is not None else g,
            WANT_DK=d_k is not None,
            WANT_DV=(d_k if together else d_v) is not None,
            SUM_KV=together,
        )
    if bins is not None:
        tau_sums += binned.backward(p, s, t, bins, g, d_e, d_k, needs.temperature)
    grads, d_history = Gradients.of_history(p, needs, d_k, d_v)
    grads.pv, grads.query = d_e, d_q
    if needs.temperature:
        assert p.temperature is not None
        # Every score is cos / tau: the sum of g cos is dL/d(1/tau).
        grads.temperature = -torch.cat(tau_sums).sum() / p.temperature.square()
    if table and needs.pv:
        shown: tuple[Any, Tensor] = p.pv_index, t.pv_page
        if s.merged:  # a column of each item, in place of its occurrences
            every = torch.arange(s.items, dtype=torch.int32, device=s.device)
            shown = every, torch.zeros_like(every)
        past = p.history_index, t.history_page
        grads.pv = sum_occurrences(p.pv, s, [shown, past], d_e, d_history)
    return grads


def _column_gradients(
    p: Problem,
    s: CandidateShape,
    t: CandidateState,
    needs: Needs,
    g: Tensor,
    shared: dict[str, Any],
) -> tuple[Tensor | None, Tensor | None, list[Tensor]]:
    """(dL/dE of the columns, dL/dq, parts of the sum of g cos)."""
    want_q = needs.of(p, "query")
    if not (needs.pv or want_q or needs.temperature):
        return None, None, []
    d_e = d_q = None
    if needs.pv:
        kind = torch.float32 if p.history is None else s.dtype
        d_e = torch.zeros(s.columns, s.dim, dtype=kind, device=s.device)
    if p.query is not None and want_q:
        d_q = torch.zeros_like(p.query)
    programs = cdiv(s.columns, shared["BLOCK_M"])
    tau_parts = torch.empty(programs, dtype=torch.float32, device=s.device)
    kernels.candidate_columns[(programs,)](
        **shared,
        anchor_page_ptr=t.anchor.page,
        anchor_count_ptr=t.counts[0:1],
        long_ptr=t.counts if t.bins is None else t.bins.long,
        bin_count_ptr=t.counts if t.bins is None else t.bins.bin_count,
        de_ptr=d_e if d_e is not None else g,
        dq_ptr=d_q if d_q is not None else g,
        tau_part_ptr=tau_parts,
        WANT_E=needs.pv,
        WANT_Q=want_q,
    )
    return d_e, d_q, [tau_parts]
