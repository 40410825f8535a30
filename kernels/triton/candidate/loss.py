"""impl="triton", attention for each candidate: forward and backward as a sequence of launches
(kernels.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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
from .attention import Anchors, Own
from .bins import make_bins
from .lanes import LanePass, lanes_tile
from .pages import ANCHORS, LARGE_PAGES, Pages, place
from .state import (
    CandidateShape,
    CandidateState,
    candidate_shape,
    fast_path_reasons,
    tell_slow_path,
)


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


def small_rows(s: Shape) -> int:
    """History rows of a small page, 0 where none is: with bins what is in none is rare, and not
    worth launches of its own."""
    return 0 if getattr(s, "binned", False) else lanes_tile(s).block_n


def large_pages(listed: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    """The list of the pages that are not small, and how many they are."""
    return {"page_list_ptr": listed[0][LARGE_PAGES], "page_count_ptr": listed[1][LARGE_PAGES:]}


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
    bins, small = t.bins, small_rows(s)
    of_pages = Pages(p.pv_offsets, p.history_offsets, t.places[0])
    listed = t.page_list, t.page_count
    place(of_pages, listed, small, bins, s.per_entry)
    kernels.score_own(p, s, t, positive)
    if bins is not None:
        make_bins(p, s, t, bins)
        if stats:  # ranks need every score beside every anchor's
            listed = torch.empty_like(t.page_list), torch.empty_like(t.page_count)
            small = lanes_tile(s).block_n
            place(of_pages, listed, small, None)
    parts = parts_of(s.device, s.pages)
    top = torch.empty(parts, s.rows, dtype=torch.float32, device=s.device)
    total = torch.empty_like(top)
    above = torch.empty((parts, s.rows) if stats else (1, 1), dtype=torch.int32, device=s.device)
    log_q = p.log_q if p.log_q is not None else positive
    reasons = fast_path_reasons(p, stats)
    if reasons and s.device.type == "cuda":
        tell_slow_path(*reasons)
    given = _inputs(p, t, s.merged) | _columns(p, s, t)
    sums = {
        "y_place_ptr": t.places[2],
        "top_ptr": top,
        "total_ptr": total,
        "above_ptr": above,
        "capacity": s.rows,
        "BIAS_IS_COUNT": s.merged,
        "NEED_RANK": stats,
    }
    kernels.candidate_scores[(min(s.pages, tiles.programs(s.device)), parts)](
        **given,
        **sums,
        **large_pages(listed),
        **tiles_of(s),
        positive_ptr=positive,
        list_ptr=t.anchor.list,
        log_q_ptr=log_q,
        parts=parts,
        HAS_LOG_Q=p.log_q is not None,
        SLOTS=ANCHORS.value,
    )
    if small:
        own = Own(positive, t.anchor.list, p.log_q)
        passed = LanePass(s, given, listed)
        passed.scores(parts, own, **sums, MASK=given["MASK"], anchor_id_ptr=given["anchor_id_ptr"])
    if bins is not None and not stats:
        binned.scores(p, s, t, bins, top, total)
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
    given = _inputs(p, t, s.merged) | _columns(p, s, t)
    listed = t.page_list, t.page_count
    d_e, d_q = _empty_columns(p, s, needs)
    d_k, d_v = empty_history(p, s, needs, torch.zeros)
    together = p.key is None and p.value is None
    wanted = Wanted(d_e, d_q, d_k, d_v, together, needs.temperature)
    anchors = Anchors(t.anchor.list, given["anchor_id_ptr"], t.lse, t.miss, g)
    tau_sums = candidate_gradients(s, given, listed, anchors, t.places[2], wanted, s.merged)
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


def _empty_columns(
    p: Problem, s: CandidateShape, needs: Needs
) -> tuple[Tensor | None, Tensor | None]:
    """Zeros for dL/dE of the columns and dL/dq."""
    d_e = d_q = None
    if needs.pv:
        kind = torch.float32 if p.history is None else s.dtype
        d_e = torch.zeros(s.columns, s.dim, dtype=kind, device=s.device)
    if p.query is not None and needs.of(p, "query"):
        d_q = torch.zeros_like(p.query)
    return d_e, d_q


class Wanted(NamedTuple):
    """Where gradients go, zeros before; `together`: dL/dk and dL/dv summed to d_k."""

    e: Tensor | None
    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    together: bool
    temperature: bool


def candidate_gradients(
    s: Shape,
    given: dict[str, Any],
    listed: tuple[Tensor, Tensor],
    anchors: Anchors,
    y_place: Tensor,
    wanted: Wanted,
    merged: bool,
) -> list[Tensor]:
    """Gradients of what is `given`, from the pages in no bin: those of long histories, and what the
    others add. Parts of the sum of g cos."""
    lanes = LanePass(s, given, listed) if small_rows(s) else None
    rules = {"MASK": given["MASK"], "MERGED": merged}
    long = {
        **given,
        **tiles_of(s),
        **large_pages(listed),
        "anchor_list_ptr": anchors.list,
        "lse_ptr": anchors.lse,
        "miss_ptr": anchors.miss,
        "g_ptr": anchors.g,
        "MERGED": merged,
        "SLOTS": ANCHORS.value,
        # float16 has too little range for gradients of a mean over many anchors: their products run
        # in tf32.
        "DOT_TYPE": tl.bfloat16 if s.dtype == torch.bfloat16 else tl.float32,
    }
    d_e, d_q, d_k, d_v, together, _ = wanted
    nowhere = anchors.g
    tau_sums = []
    if d_e is not None or d_q is not None or wanted.temperature:
        columns = given["column_list_ptr"].shape[0]
        programs = cdiv(columns, long["BLOCK_M"])
        tau_sums.append(torch.empty(programs, dtype=torch.float32, device=s.device))
        kernels.candidate_columns[(programs,)](
            **long,
            de_ptr=d_e if d_e is not None else nowhere,
            dq_ptr=d_q if d_q is not None else nowhere,
            tau_part_ptr=tau_sums[0],
            WANT_E=d_e is not None,
            WANT_Q=d_q is not None,
        )
        if lanes is not None:
            tau_sums.append(lanes.column_gradients(anchors, rules, d_e, d_q))
    if d_k is not None or d_v is not None:
        pages = listed[0].shape[1]
        # A block that is loaded ahead takes registers that the products need: 72 bytes spilled in
        # place of 16.
        kernels.candidate_history[(min(pages, tiles.programs(s.device)),)](
            **long | {"num_stages": 1},
            y_place_ptr=y_place,
            dk_ptr=d_k if d_k is not None else nowhere,
            dv_ptr=d_v if d_v is not None else nowhere,
            WANT_DK=d_k is not None,
            WANT_DV=(d_k if together else d_v) is not None,
            SUM_KV=together,
        )
        if lanes is not None:
            lanes.history_gradients(anchors, rules, y_place, d_k, d_v, together)
    return tau_sums
