"""Launches around the contrast: bookkeeping, attention, normalisation, gradients of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...loss.problem import Needs, Problem, SequenceProblem
from . import attention, contrast, epilogue, plan, tiles
from .state import Listed, LossState, Plan, Rows, SequenceState, Shape, cdiv


def _steps(pages: int) -> int:
    return (pages + 1).bit_length()


def _compact(
    t: Plan | SequenceState,
    block_counts: Tensor,
    page: Tensor,
    ids: Tensor | None,
    log_q: Tensor | None,
    first: Listed,
    second: Listed | None = None,
    third: Listed | None = None,
) -> None:
    """Lists of the rows of each flag, where there is one; prefix sums, and the counts."""
    flags = t.flags

    def of(listed: Listed | None, part: str) -> Tensor:
        found = getattr(listed, part, None)
        return flags if found is None else found

    rows, blocks = flags.shape[1], block_counts.shape[1]
    plan.compact[(blocks,)](
        flags,
        block_counts,
        page,
        ids if ids is not None else flags,
        log_q if log_q is not None else flags,
        t.ranks,
        t.counts,
        *(of(first, part) for part in ("list", "page", "id")),
        *(of(second, part) for part in ("list", "page", "id", "bias")),
        *(of(third, part) for part in ("list", "page", "id", "bias")),
        rows,
        blocks,
        FLAGS=flags.shape[0],
        SECOND=second is not None,
        THIRD=third is not None,
        HAS_ID=ids is not None,
        HAS_LOG_Q=log_q is not None,
        BLOCK=tiles.BLOCK_PLAN,
    )


def sequence_plan(p: SequenceProblem, t: SequenceState) -> None:
    """Page of every history row, and the list of the real ones; their count stays on the device."""
    page, flags = t.history_page, t.flags
    pages = p.history_offsets.shape[0] - 1
    blocks = cdiv(page.shape[0], tiles.BLOCK_PLAN)
    block_counts = torch.empty(1, blocks, dtype=torch.int32, device=page.device)
    plan.mark_sequence[(blocks,)](
        p.history_offsets,
        p.history_mask if p.history_mask is not None else flags,
        page,
        flags,
        block_counts,
        page.shape[0],
        pages,
        _steps(pages),
        blocks,
        HAS_MASK=p.history_mask is not None,
        BLOCK=tiles.BLOCK_PLAN,
    )
    _compact(t, block_counts, page, p.ids, None, t.row)


def make_plan(p: Problem, s: Shape, t: Plan, clicked: Tensor | None) -> None:
    """Pages, flags, prefix sums and compacted lists; the counts stay on the device."""
    dummy, items = t.flags, t.item_count
    if items is not None:
        items.zero_()
    blocks = cdiv(s.rows, tiles.BLOCK_PLAN)
    block_counts = torch.empty(4, blocks, dtype=torch.int32, device=dummy.device)
    plan.mark_rows[(blocks + cdiv(s.history_rows, tiles.BLOCK_PLAN),)](
        p.pv_offsets,
        p.pv_mask if p.pv_mask is not None else dummy,
        clicked if clicked is not None else dummy,
        p.weights if p.weights is not None else dummy,
        p.pv_index if p.pv_index is not None else dummy,
        t.pv_page,
        t.flags,
        block_counts,
        items if items is not None else dummy,
        p.history_offsets,
        p.history_mask if p.history_mask is not None else dummy,
        t.history_page,
        s.rows,
        s.history_rows,
        s.pages,
        _steps(s.pages),
        blocks,
        HAS_MASK=p.pv_mask is not None,
        HAS_WEIGHTS=p.weights is not None,
        HAS_CLICKED=clicked is not None,
        HAS_HISTORY_MASK=p.history_mask is not None,
        EVERY_RECONSTRUCTION=s.identify,
        COUNT_ITEMS=s.merged,
        BLOCK=tiles.BLOCK_PLAN,
    )
    column = None if s.merged else t.column
    log_q = p.log_q if s.directions else None
    _compact(t, block_counts, t.pv_page, p.ids, log_q, t.anchor, t.reconstructed, column)
    if s.merged:
        assert t.column is not None
        plan.compact_items[(cdiv(s.items, tiles.BLOCK_PLAN),)](
            items,
            t.item_rank,
            t.counts[2:3],
            t.column.list,
            t.column.bias,
            s.items,
            BLOCK=tiles.BLOCK_PLAN,
        )


def sides(p: Problem, s: Shape, t: LossState, direction: str) -> tuple[Rows, Rows]:
    """(anchors, candidates) of a direction."""

    def side(unit: Any, listed: Any, flag: int, merged: bool = False) -> Rows:
        # Without ids an item is itself alone; a merged column's list holds item numbers, which are
        # the ids.
        ids = listed.list if p.ids is None or merged else listed.id
        count, rank = t.counts[flag : flag + 1], t.ranks[flag]
        return Rows(unit, count, listed.list, listed.page, ids, listed.bias, rank, merged)

    if direction == "reconstruct":
        anchors = t.r if t.r_anchor is None else t.r_anchor
        return side(anchors, t.anchor, 0), side(t.e, t.column, 2, s.merged)
    return side(t.e_anchor, t.anchor, 0), side(t.r, t.reconstructed, 1)


def attention_inputs(p: Problem) -> dict[str, Any]:
    """q, k, v and the index each is read through."""
    history = p.pv if p.history is None else p.history
    inputs: dict[str, Any] = {}
    for name, given, default, index in (
        ("q", p.query, p.pv, p.pv_index),
        ("k", p.key, history, p.history_index),
        ("v", p.value, history, p.history_index),
    ):
        indexed = given is None and index is not None
        inputs[f"{name}_ptr"] = default if given is None else given
        inputs[f"{name}_index_ptr"] = index if indexed else p.history_offsets
        inputs[f"HAS_{name.upper()}_INDEX"] = indexed
    if not p.attention_scale:
        # Nobody asks: what q and k hold may be infinite, and 0 times that is not 0.
        nothing = torch.zeros(1, p.pv.shape[1], dtype=p.pv.dtype, device=p.pv.device)
        for name, rows in (("q", p.num_pv), ("k", p.num_history)):
            inputs[f"{name}_ptr"] = nothing
            inputs[f"{name}_index_ptr"] = p.pv_offsets.new_zeros(rows)
            inputs[f"HAS_{name.upper()}_INDEX"] = True
    return inputs


def e_inputs(p: Problem) -> dict[str, Any]:
    return {
        "e_ptr": p.pv,
        "e_index_ptr": p.pv_index if p.pv_index is not None else p.pv_offsets,
        "HAS_E_INDEX": p.pv_index is not None,
    }


def reconstructed(t: Plan) -> tuple[Tensor, Tensor, Tensor]:
    """List, pages and count of the rows that have an R."""
    if t.reconstructed is None:
        return t.anchor.list, t.anchor.page, t.counts[0:1]
    return t.reconstructed.list, t.reconstructed.page, t.counts[1:2]


def attend(
    p: Problem,
    s: Shape,
    t: Plan,
    out: Tensor,
    norm: Tensor,
    positive: Tensor,
    raw: bool = False,
) -> None:
    """Unit rows r of the list, lengths and the positives' cosines; with `raw` R [N, D] alone."""
    rows, pages, count = reconstructed(t)
    attention.attend[(cdiv(s.rows, s.attention.block_m),)](
        **attention_inputs(p),
        **e_inputs(p),
        history_offsets_ptr=p.history_offsets,
        history_page_ptr=t.history_page,
        list_ptr=rows,
        list_page_ptr=pages,
        count_ptr=count,
        unit_ptr=out,
        norm_ptr=norm,
        positive_ptr=positive,
        scale=p.attention_scale,
        D=s.dim,
        STRIDE=s.stride,
        HEADS=p.num_heads,
        RAW=raw,
        BLOCK_M=s.attention.block_m,
        BLOCK_H=s.attention.block_n,
        BLOCK_D=s.block_d,
        BLOCK_C=tiles.attention_part(s.block_d),
        PRECISION=s.precision,
        **s.attention.launch,
    )


def normalize(
    p: Problem, s: Shape, unit: Tensor, rows: Tensor, count: Tensor, through_index: bool
) -> None:
    index = p.pv_index if through_index else None
    epilogue.normalize_rows[(cdiv(unit.shape[0], s.small.block_m),)](
        p.pv,
        index if index is not None else rows,
        rows,
        count,
        unit,
        D=s.dim,
        STRIDE=s.stride,
        HAS_INDEX=index is not None,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )


def reduce_losses(
    p: Problem,
    s: Shape,
    t: Plan,
    weight_sum: Tensor,
    losses: Sequence[Tensor],
    item_loss: Tensor,
    stats: bool,
) -> tuple[Tensor, Tensor]:
    """(loss, items' losses [N]) from those of the anchors, in one direction or two; `item_loss` is
    where statistics go."""
    per_item = p.reduction == "none"
    items = item_loss
    if per_item and not stats:
        items = torch.zeros(s.rows, dtype=torch.float32, device=s.device)
    loss = torch.empty((), dtype=torch.float32, device=s.device)
    contrast.reduce_loss[(1,)](
        losses[0],
        losses[-1],
        t.anchor.list,
        t.counts[0:1],
        p.weights if p.weights is not None else loss,
        loss,
        weight_sum,
        items,
        BOTH=len(losses) == 2,
        HAS_WEIGHTS=p.weights is not None,
        MEAN=p.reduction == "mean",
        ITEMS=per_item or stats,
        BLOCK=1024,
    )
    return loss, items


def row_gradients(
    p: Problem, s: Shape, t: Plan, grad: Tensor, weight_sum: Tensor, share: float
) -> Tensor:
    """g_i [capacity], the upstream gradient of each anchor's loss, times `share`."""
    g = torch.empty(s.rows, dtype=torch.float32, device=s.device)
    epilogue.row_gradients[(cdiv(s.rows, 256),)](
        grad,
        grad.stride(0) if grad.dim() else 0,
        p.weights if p.weights is not None else g,
        weight_sum,
        t.anchor.list,
        t.counts[0:1],
        g,
        s.rows,
        share,
        PER_ROW=p.reduction == "none",
        HAS_WEIGHTS=p.weights is not None,
        BLOCK=256,
    )
    return g


def normalize_given(p: Problem, s: Shape, t: LossState, given: Tensor, positive: Tensor) -> None:
    """As `attend`, of an R [N, D] that is known."""
    rows, _, count = reconstructed(t)
    epilogue.given_rows[(cdiv(s.rows, s.small.block_m),)](
        r_ptr=given,
        **e_inputs(p),
        list_ptr=rows,
        count_ptr=count,
        unit_ptr=t.r,
        norm_ptr=t.norm,
        positive_ptr=positive,
        D=s.dim,
        STRIDE=s.stride,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )


def gather_anchors(s: Shape, t: LossState, every: Tensor, positive: Tensor) -> None:
    """r and the positives' cosines of the anchors, from those of every reconstructed row."""
    epilogue.gather_anchors[(cdiv(s.rows, s.small.block_m),)](
        t.r,
        every,
        t.ranks[1],
        t.anchor.list,
        t.counts[0:1],
        t.r_anchor,
        positive,
        STRIDE=s.stride,
        BLOCK_M=s.small.block_m,
        BLOCK_D=tiles.next_power_of_2(s.stride),
        num_warps=s.small.num_warps,
    )


def spread(
    p: Problem,
    s: Shape,
    t: Plan,
    unit: Tensor,
    out: Tensor,
    dq: Tensor | None,
    **contrast_inputs: Any,
) -> Tensor:
    """Rows of the batch [N, D] from the compacted dq; with the contrast's inputs, dL/dE and dq
    together."""
    dummy = t.ranks
    unused: dict[str, Any] = dict.fromkeys(
        (
            "anchor_count_ptr column_count_ptr reconstructed_count_ptr transposed_acc_ptr "
            "transposed_factor_ptr "
            "identify_acc_ptr identify_top_ptr identify_lse_ptr "
            "forward_miss_ptr identify_miss_ptr g_ptr "
            "upstream_ptr weight_sum_ptr"
        ).split(),
        dummy,
    )
    unused |= {"transposed_slots": 1, "identify_slots": 1, "share": 1.0, "lower": 1.0, "tau": 1.0}
    flags = "CONTRAST COLUMNS RECONSTRUCT IDENTIFY HAS_FACTOR UNIFORM IN_PLACE TAU_IS_TENSOR"
    unused |= dict.fromkeys(flags.split(), False)
    epilogue.pv_gradient[(cdiv(s.rows, s.small.block_m),)](
        out_ptr=out,
        rank_ptr=t.ranks,
        flag_ptr=t.flags,
        **e_inputs(p),
        unit_ptr=unit,
        dq_ptr=dq if dq is not None else dummy,
        rows=s.rows,
        programs=s.programs(s.tile),
        transposed_programs=s.programs(s.transposed),
        **(unused | contrast_inputs),
        STREAM=s.stream,
        D=s.dim,
        STRIDE=s.stride,
        DQ_STRIDE=dq.shape[1] if dq is not None else s.dim,
        ADD_DQ=dq is not None,
        TRANSPOSED_M=s.transposed.block_m,
        TRANSPOSED_N=s.transposed.block_n,
        IDENTIFY_M=s.tile.block_m,
        IDENTIFY_N=s.tile.block_n,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    return out


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
    rows, pages, count = reconstructed(t)
    common = attention_inputs(p) | {
        "history_page_ptr": t.history_page,
        "list_ptr": rows,
        "list_page_ptr": pages,
        "dr_ptr": dr,
        "sums_ptr": torch.empty(3, s.heads, s.rows, dtype=torch.float32, device=s.device),
        "count_ptr": count,
        "capacity": s.rows,
        "history_rows": s.history_rows,
        "scale": p.attention_scale,
        "D": s.dim,
        "STRIDE": s.stride,
        "HEADS": s.heads,
        # float16 has too little range for gradients of a mean over many anchors: their products run
        # in tf32.
        "DOT_TYPE": tl.bfloat16 if s.dtype == torch.bfloat16 else tl.float32,
        "BLOCK_M": s.backward.block_m,
        "BLOCK_H": s.backward.block_n,
        "BLOCK_D": s.block_d,
        "BLOCK_C": tiles.attention_part(s.block_d),
        "PRECISION": s.precision,
        **s.backward.launch,
    }
    grid, offsets = (cdiv(s.rows, s.backward.block_m),), p.history_offsets
    attention.attend_sums[grid](**common, history_offsets_ptr=offsets)
    dk, dv = _key_value_gradients(p, s, t, needs, common)
    if not needs.of(p, "query"):
        return None, dk, dv
    # Occurrences of a table's items are summed: they stay in float32 until then, and so does what
    # float16 cannot hold.
    wide = (p.history is None and p.query is None) or s.dtype == torch.float16
    dq = torch.empty(s.rows, s.dim, dtype=torch.float32, device=s.device) if wide else dr
    attention.attend_dq[grid](
        **common, history_offsets_ptr=offsets, dq_ptr=dq, DQ_STRIDE=dq.shape[1]
    )
    return dq, dk, dv


def _key_value_gradients(
    p: Problem, s: Shape, t: Plan, needs: Needs, common: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    dk, dv = empty_history(p, s, needs)
    anything = dk if dk is not None else dv
    if anything is None:
        return None, None
    whole = common["BLOCK_C"] == s.block_d
    width = s.block_d if whole else min(s.block_d, tiles.LARGEST_REGISTER_DIM)
    together = p.key is None and p.value is None
    attention.attend_dkv[(cdiv(s.history_rows, s.backward.block_n), cdiv(s.block_d, width))](
        **common,
        pv_offsets_ptr=p.pv_offsets,
        rank_ptr=t.ranks[int(s.identify)],
        dk_ptr=dk if dk is not None else anything,
        dv_ptr=dv if dv is not None else anything,
        WANT_DK=dk is not None,
        WANT_DV=(dk if together else dv) is not None,
        SUM_KV=together,
        BLOCK_O=width,
    )
    return dk, dv


def occurrences(items: int, rows: Sequence[tuple[Any, Tensor]]) -> tuple[Tensor, Tensor]:
    """Row numbers by item, and where each item's begin [items + 1]; padding (page < 0) is last."""
    kind = torch.int32 if items < 2**31 - 1 else torch.int64  # half the passes of a radix sort
    keys = torch.cat([torch.where(page >= 0, index.to(kind), items) for index, page in rows])
    ordered, order = torch.sort(keys, stable=True)
    every = torch.arange(items + 1, dtype=kind, device=keys.device)
    return order, torch.searchsorted(ordered, every)


def sum_occurrences(
    table: Tensor,
    s: Shape,
    shown: Sequence[tuple[Any, Tensor]],
    d_pv: Tensor | None,
    d_history: Tensor | None,
    merged: dict[str, Any] | None = None,
) -> Tensor:
    """The gradient of a table from those of its occurrences, `shown` by (item, page): with d_pv,
    first the PV rows."""
    order, starts = occurrences(s.items, shown)
    out = torch.empty_like(table)
    unused = dict.fromkeys(
        ("item_count_ptr", "column_rank_ptr", "column_count_ptr", "anchor_count_ptr"), order
    )
    floats = "transposed_acc_ptr transposed_factor_ptr upstream_ptr weight_sum_ptr"
    unused |= dict.fromkeys(floats.split(), out)
    plain = unused | {"transposed_slots": 1, "share": 1.0, "lower": 1.0, "tau": 1.0}
    plain |= dict.fromkeys(("TAU_IS_TENSOR", "MERGED", "HAS_FACTOR", "UNIFORM"), False)
    epilogue.table_gradient[(s.items,)](
        out_ptr=out,
        order_ptr=order,
        starts_ptr=starts,
        pv_ptr=d_pv if d_pv is not None else out,
        history_ptr=d_history if d_history is not None else out,
        table_ptr=table,
        rows=0 if d_pv is None else shown[0][0].shape[0],
        transposed_programs=s.programs(s.transposed),
        **(plain if merged is None else merged),
        STREAM=s.stream,
        D=s.dim,
        STRIDE=s.stride,
        HAS_PV=d_pv is not None,
        HAS_HISTORY=d_history is not None,
        TRANSPOSED_M=s.transposed.block_m,
        TRANSPOSED_N=s.transposed.block_n,
        BLOCK_R=16,
        BLOCK_D=s.block_d,
        num_warps=4,
    )
    return out
