"""impl="triton": the click-sequence loss. Every history item is a row and a column of the same
contrast."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...loss.problem import Gradients, Needs, SequenceProblem
from . import click_sequence, epilogue, tiles
from .common import Source
from .masks import MASKS
from .passes import forward_pass, lowered, run_chunks, run_contrast
from .shapes import SequenceShape, cdiv, sequence_is_empty, sequence_shape
from .stages import row_tiles, sequence_plan, sum_occurrences
from .state import (
    HALF_LIFT,
    Pass,
    PassSide,
    Results,
    Scores,
    SequenceState,
    Spec,
    Transposed,
    scores,
    temperature,
)


def sequence_saved_spec(p: SequenceProblem, needs: Needs) -> Spec:
    """As `saved_spec`."""
    if not any(needs) or sequence_is_empty(p):
        return []
    return SequenceState.spec(sequence_shape(p))


def _sequence_rows(s: SequenceShape, t: SequenceState) -> PassSide:
    ids = t.row.id if s.mask == MASKS["sequence ids"] else t.row.list
    return PassSide(t.c, t.counts, t.row.list, t.row.page, ids, None, t.ranks[0])


def _scores(p: SequenceProblem, s: SequenceShape) -> Scores:
    return scores(p, s.mask, p.history_offsets, s.dtype, False)


def _page_mean(
    p: SequenceProblem,
    s: SequenceShape,
    t: SequenceState,
    factor: Tensor | None,
    number: Tensor,
    cosine: Tensor,
) -> Tensor:
    out = torch.empty(s.rows, s.stride, dtype=torch.float32, device=cosine.device)
    rows = _sequence_rows(s, t)
    click_sequence.page_mean[(cdiv(s.rows, s.attention.block_m),)](
        t.c,
        rows.ids if s.mask == MASKS["sequence ids"] else None,
        rows.page,
        rows.count,
        p.history_offsets,
        t.ranks,
        factor,
        out,
        number,
        cosine,
        STRIDE=s.stride,
        BLOCK_M=s.attention.block_m,
        BLOCK_H=s.attention.block_n,
        BLOCK_D=tiles.next_power_of_2(s.stride),
        PRECISION=s.precision,
        num_warps=8 if s.stride > 128 else 4,
        num_stages=1,
    )
    return out


def sequence_forward(p: SequenceProblem, needs: Needs) -> tuple[Tensor, list[Tensor]]:
    """(loss, saved) of the click-sequence loss."""
    device = p.history.device
    per_item = p.reduction == "none"
    if sequence_is_empty(p):
        return torch.zeros(
            (p.num_history,) if per_item else (), dtype=torch.float32, device=device
        ), []
    s = sequence_shape(p, any(needs))
    t = SequenceState.empty(s)
    sequence_plan(p, t)
    rows = _sequence_rows(s, t)
    epilogue.normalize_rows[(cdiv(s.rows, s.small.block_m),)](
        Source(p.history, p.history_index),
        rows.list,
        rows.count,
        t.c,
        D=s.dim,
        STRIDE=s.stride,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    cosine = torch.empty(s.rows, dtype=torch.float32, device=device)
    _page_mean(p, s, t, None, t.number, cosine)
    kept, total = t.kept, torch.empty(s.part_rows, dtype=torch.float32, device=device)
    out = Pass(kept.acc, kept.top, total, None, s.slots(s.rows, s.tile), s.tile)
    results = Results(kept.lse, kept.miss, cosine)
    forward_pass(s, rows, rows, _scores(p, s), out, results)
    loss = torch.zeros((s.rows,) if per_item else (), dtype=torch.float32, device=device)
    click_sequence.sequence_losses[(1,)](
        kept.lse,
        cosine,
        t.number,
        rows.list,
        rows.count,
        cosine if per_item else loss,
        t.anchors,
        loss,
        **temperature(p),
        MEAN=p.reduction == "mean",
        ITEMS=per_item,
        BLOCK=1024,
    )
    return loss, t.saved() if any(needs) else []


def sequence_backward(
    p: SequenceProblem, needs: Needs, saved: Sequence[Tensor], grad: Tensor
) -> Gradients:
    """Of `p`'s inputs."""
    device = p.history.device
    if sequence_is_empty(p):
        return Gradients.zeros(p, needs)
    s = sequence_shape(p)
    t = SequenceState.restored(s, saved)
    rows = _sequence_rows(s, t)
    half = s.dtype == torch.float16
    g, offset, factor, cosine, number = (
        torch.empty(s.rows, dtype=torch.float32, device=device) for _ in range(5)
    )
    click_sequence.sequence_row_gradients[(cdiv(s.rows, 256),)](
        grad,
        grad.stride(0) if grad.dim() else 0,
        t.anchors,
        t.number,
        t.kept.lse,
        rows.list,
        rows.count,
        g,
        offset,
        factor,
        s.rows,
        HALF_LIFT if half else 0.0,
        PER_ROW=p.reduction == "none",
        BLOCK=256,
    )
    scale, lower = lowered(g) if half else (g, None)
    # One upstream gradient for all anchors stays out of the transposed pass; rows that are none
    # have no weight there.
    uniform = p.reduction != "none" and not half and not s.chunked
    # Chunks are summed in float32; one pass is rounded once.
    kind = torch.float32 if s.chunked else s.sums
    acc = torch.empty(s.flat(s.rows, s.transposed), s.stride, dtype=kind, device=device)
    out = Pass(acc, None, None, None, s.slots(s.rows, s.transposed), s.transposed)
    if s.chunked:
        run_chunks(s, rows, rows, _scores(p, s), t.kept.lse, Transposed(scale, acc))
    else:
        y_scale = None if uniform else scale
        run_contrast(
            s, rows, rows, _scores(p, s), out, y_offset=offset, y_scale=y_scale, need_sum=False
        )
    # The positives are counted again, not into what was saved.
    mean = _page_mean(p, s, t, None, number, cosine)
    pulled = _page_mean(p, s, t, factor, number, cosine)
    d_rows, tau_parts = _row_gradients(p, s, t, out, g, mean, pulled, lower, grad, uniform)
    grads = Gradients()
    if needs.temperature:
        assert p.temperature is not None
        grads.temperature = -tau_parts.sum() / p.temperature
    if needs.history:
        grads.history = d_rows
        if p.history_index is not None:
            shown = [(p.history_index, t.history_page)]
            grads.history = sum_occurrences(p.history, s, shown, None, d_rows)
    return grads


def _row_gradients(
    p: SequenceProblem,
    s: SequenceShape,
    t: SequenceState,
    transposed: Pass,
    g: Tensor,
    mean: Tensor,
    pulled: Tensor,
    lower: Tensor | None,
    grad: Tensor,
    uniform: bool,
) -> tuple[Tensor, Tensor]:
    """dL/dC [K, D] of the rows, and parts of -tau dL/dtau."""
    table = p.history_index is not None
    kind = torch.float32 if table else s.dtype
    d_rows = torch.zeros(s.rows, s.dim, dtype=kind, device=s.device)
    programs = cdiv(s.rows, s.small.block_m)
    tau_parts = torch.empty(programs, dtype=torch.float32, device=s.device)
    click_sequence.sequence_gradient[(programs,)](
        t.row.list,
        t.counts,
        Source(p.history, p.history_index),
        g,
        mean,
        pulled,
        epilogue.Parts(t.kept.acc, t.kept.top, t.kept.lse),
        epilogue.Parts(transposed.acc),
        lower,
        grad if uniform else None,
        t.anchors,
        d_rows,
        tau_parts,
        s.slots(s.rows, s.tile),
        s.programs(s.tile),
        transposed.slots,
        s.programs(s.transposed),
        **temperature(p),
        how=row_tiles(s),
        num_warps=s.small.num_warps,
    )
    return d_rows, tau_parts
