"""Launches around the contrast: bookkeeping, attention, normalisation, gradients of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...loss.problem import Needs, Problem, SequenceProblem
from . import attention, contrast, epilogue, plan, tiles
from .common import Source
from .shapes import Shape, cdiv
from .state import Kept, Listed, LossState, Pass, PassSide, Plan, SequenceState, temperature


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

    def of(listed: Listed | None) -> plan.List:
        if listed is None:
            return plan.List(None, None, None, None)
        return plan.List(listed.list, listed.page, listed.id, listed.bias)

    flags, blocks = t.flags.shape[0], block_counts.shape[1]
    plan.compact[(blocks,)](
        t.flags,
        block_counts,
        page,
        ids,
        log_q,
        t.ranks,
        t.counts,
        of(first),
        of(second),
        of(third),
        t.flags.shape[1],
        blocks,
        FLAGS=flags,
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
        p.history_mask,
        page,
        flags,
        block_counts,
        page.shape[0],
        pages,
        _steps(pages),
        blocks,
        BLOCK=tiles.BLOCK_PLAN,
    )
    _compact(t, block_counts, page, p.ids, None, t.row)


def make_plan(p: Problem, s: Shape, t: Plan, clicked: Tensor | None) -> None:
    """Pages, flags, prefix sums and compacted lists; the counts stay on the device."""
    items = t.item_count
    if items is not None:
        items.zero_()
    blocks = cdiv(s.rows, tiles.BLOCK_PLAN)
    block_counts = torch.empty(4, blocks, dtype=torch.int32, device=s.device)
    plan.mark_rows[(blocks + cdiv(s.history_rows, tiles.BLOCK_PLAN),)](
        p.pv_offsets,
        p.pv_mask,
        clicked,
        p.weights,
        p.pv_index,
        t.pv_page,
        t.flags,
        block_counts,
        items,
        p.history_offsets,
        p.history_mask,
        t.history_page,
        s.rows,
        s.history_rows,
        s.pages,
        _steps(s.pages),
        blocks,
        EVERY_RECONSTRUCTION=s.identify,
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


def sides(p: Problem, s: Shape, t: LossState, direction: str) -> tuple[PassSide, PassSide]:
    """(anchors, candidates) of a direction."""

    def side(unit: Any, listed: Any, flag: int, merged: bool = False) -> PassSide:
        # Without ids an item is itself alone; a merged column's list holds item numbers, which are
        # the ids.
        ids = listed.list if p.ids is None or merged else listed.id
        count, rank = t.counts[flag : flag + 1], t.ranks[flag]
        return PassSide(unit, count, listed.list, listed.page, ids, listed.bias, rank, merged)

    if direction == "reconstruct":
        anchors = t.r if t.r_anchor is None else t.r_anchor
        return side(anchors, t.anchor, 0), side(t.e, t.column, 2, s.merged)
    return side(t.e_anchor, t.anchor, 0), side(t.r, t.reconstructed, 1)


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


def e_source(p: Problem) -> Source:
    return Source(p.pv, p.pv_index)


def reconstructed(t: Plan) -> attention.Listing:
    if t.reconstructed is None:
        return attention.Listing(t.anchor.list, t.anchor.page, t.counts[0:1])
    return attention.Listing(t.reconstructed.list, t.reconstructed.page, t.counts[1:2])


def _attention_tiles(s: Shape, tile: tiles.Tile) -> attention.Tiles:
    part = tiles.attention_part(s.block_d)
    return attention.Tiles(
        s.dim, s.stride, s.heads, tile.block_m, tile.block_n, s.block_d, part, s.precision
    )


def pass_tiles(s: Shape, tile: tiles.Tile) -> epilogue.PassTiles:
    return epilogue.PassTiles(s.stream, s.stride, tile.block_m, tile.block_n, s.block_d)


def row_tiles(s: Shape) -> epilogue.RowTiles:
    passes = pass_tiles(s, s.tile), pass_tiles(s, s.transposed)
    return epilogue.RowTiles(s.dim, s.stride, *passes, s.small.block_m, s.block_d)


def attend(
    p: Problem,
    s: Shape,
    t: Plan,
    out: Tensor,
    norm: Tensor | None = None,
    positive: Tensor | None = None,
) -> None:
    """Unit rows r of the list, lengths and the positives' cosines; or R [N, D] alone."""
    q, k, v = attention_sources(p)
    attention.attend[(cdiv(s.rows, s.attention.block_m),)](
        q,
        k,
        v,
        e_source(p),
        attention.History(p.history_offsets, t.history_page),
        reconstructed(t),
        attention.UnitRows(out, norm, positive),
        p.attention_scale,
        how=_attention_tiles(s, s.attention),
        **s.attention.launch,
    )


def normalize(
    p: Problem, s: Shape, unit: Tensor, rows: Tensor, count: Tensor, through_index: bool
) -> None:
    epilogue.normalize_rows[(cdiv(unit.shape[0], s.small.block_m),)](
        Source(p.pv, p.pv_index if through_index else None),
        rows,
        count,
        unit,
        D=s.dim,
        STRIDE=s.stride,
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
        losses[1] if len(losses) == 2 else None,
        t.anchor.list,
        t.counts[0:1],
        p.weights,
        loss,
        weight_sum,
        items if per_item or stats else None,
        MEAN=p.reduction == "mean",
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
        p.weights,
        weight_sum,
        t.anchor.list,
        t.counts[0:1],
        g,
        s.rows,
        share,
        PER_ROW=p.reduction == "none",
        BLOCK=256,
    )
    return g


def normalize_given(p: Problem, s: Shape, t: LossState, given: Tensor, positive: Tensor) -> None:
    """As `attend`, of an R [N, D] that is known."""
    listed = reconstructed(t)
    epilogue.given_rows[(cdiv(s.rows, s.small.block_m),)](
        given,
        e_source(p),
        listed.list,
        listed.count,
        attention.UnitRows(t.r, t.norm, positive),
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


_NO_UPSTREAM = epilogue.Upstream(None, None, None, None, None, None)
_NO_PARTS = epilogue.Parts(None)
_NO_COLUMNS = epilogue.ItemColumns(None, None)
_NO_TAU = {"tau": 1.0, "TAU_IS_TENSOR": False}


def forward_parts(kept: Kept | None) -> epilogue.Parts:
    """What the forward pass of a direction left, if there was one."""
    return _NO_PARTS if kept is None else epilogue.Parts(kept.acc, kept.top, kept.lse, kept.miss)


def spread(
    p: Problem,
    s: Shape,
    t: Plan,
    unit: Tensor,
    out: Tensor,
    dq: Tensor | None,
    up: epilogue.Upstream = _NO_UPSTREAM,
    column: Pass | None = None,
) -> Tensor:
    """Rows of the batch [N, D] from the compacted dq; with a gradient of the loss dL/dE and dq
    together. `column`: the transposed pass of "reconstruct"."""
    ahead = back = _NO_PARTS
    miss, tau = None, _NO_TAU
    if up.grad is not None:
        assert isinstance(t, LossState)
        ahead, tau = forward_parts(t.identify), temperature(p)
        if column is not None and not s.merged:
            back = epilogue.Parts(column.acc)
        miss = None if t.reconstruct is None else t.reconstruct.miss
    epilogue.pv_gradient[(cdiv(s.rows, s.small.block_m),)](
        out,
        t.ranks,
        t.flags,
        t.counts,
        e_source(p),
        unit,
        dq,
        up,
        ahead,
        back,
        miss,
        s.rows,
        s.slots(s.rows, s.tile),
        s.programs(s.tile),
        1 if column is None else column.slots,
        s.programs(s.transposed),
        **tau,
        DQ_STRIDE=s.dim if dq is None else dq.shape[1],
        IN_PLACE=column is not None and column.in_place,
        how=row_tiles(s),
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
    inputs = (
        *attention_sources(p),
        attention.History(p.history_offsets, t.history_page),
        reconstructed(t),
    )
    sums = torch.empty(3, s.heads, s.rows, dtype=torch.float32, device=s.device)
    sizes = s.rows, s.history_rows, p.attention_scale
    constants = {
        # float16 has too little range for gradients of a mean over many anchors: their products run
        # in tf32.
        "DOT_TYPE": tl.bfloat16 if s.dtype == torch.bfloat16 else tl.float32,
        "how": _attention_tiles(s, s.backward),
        **s.backward.launch,
    }
    grid = (cdiv(s.rows, s.backward.block_m),)
    attention.attend_sums[grid](*inputs, sums, dr, *sizes, **constants)
    dk, dv = empty_history(p, s, needs)
    if dk is not None or dv is not None:
        whole = constants["how"].BLOCK_C == s.block_d
        width = s.block_d if whole else min(s.block_d, tiles.LARGEST_REGISTER_DIM)
        attention.attend_dkv[(cdiv(s.history_rows, s.backward.block_n), cdiv(s.block_d, width))](
            *inputs,
            sums,
            dr,
            *sizes,
            p.pv_offsets,
            t.ranks[int(s.identify)],
            dk,
            dv,
            SUM_KV=p.key is None and p.value is None,
            BLOCK_O=width,
            **constants,
        )
    if not needs.of(p, "query"):
        return None, dk, dv
    # Occurrences of a table's items are summed: they stay in float32 until then, and so does what
    # float16 cannot hold.
    wide = (p.history is None and p.query is None) or s.dtype == torch.float16
    dq = torch.empty(s.rows, s.dim, dtype=torch.float32, device=s.device) if wide else dr
    attention.attend_dq[grid](*inputs, sums, dr, *sizes, dq, DQ_STRIDE=dq.shape[1], **constants)
    return dq, dk, dv


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
    up: epilogue.Upstream = _NO_UPSTREAM,
    columns: epilogue.ItemColumns = _NO_COLUMNS,
    counts: Tensor | None = None,
    back: Pass | None = None,
    tau: dict[str, Any] = _NO_TAU,
) -> Tensor:
    """The gradient of a table from those of its occurrences, `shown` by (item, page): with d_pv,
    first the PV rows; and what columns that are items add to it."""
    order, starts = occurrences(s.items, shown)
    out = torch.empty_like(table)
    epilogue.table_gradient[(s.items,)](
        out,
        order,
        starts,
        d_pv,
        d_history,
        table,
        counts,
        columns,
        up,
        _NO_PARTS if back is None else epilogue.Parts(back.acc),
        0 if d_pv is None else shown[0][0].shape[0],
        1 if back is None else back.slots,
        s.programs(s.transposed),
        **tau,
        D=s.dim,
        back_how=pass_tiles(s, s.transposed),
        BLOCK_R=16,
        BLOCK_D=s.block_d,
        num_warps=4,
    )
    return out
