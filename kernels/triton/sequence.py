"""impl="triton": the click-sequence loss. Every history item is a row and a column of the same
contrast; positives, losses and gradients have kernels of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from ...loss.problem import Gradients, Needs, SequenceProblem
from . import tiles
from .chunked import Transposed, run_chunks
from .common import (
    LN2,
    Source,
    kernel,
    load_rows,
    normalize_backward,
    score_scale,
    temperature,
    unit_scale,
)
from .contrast import HALF_LIFT, Pass, PassSide, Scores, lowered, run_contrast, scores
from .masks import MASKS
from .parts import Parts, pass_rows, row_tiles
from .passes import forward_pass
from .plan import sequence_plan
from .results import Results
from .rows import normalize
from .shapes import SequenceShape, cdiv, sequence_is_empty, sequence_shape
from .state import SequenceState, Spec
from .table import sum_occurrences


def sequence_saved_spec(p: SequenceProblem, needs: Needs) -> Spec:
    """As `saved_spec`."""
    if not any(needs) or sequence_is_empty(p):
        return []
    return SequenceState.spec(sequence_shape(p))


def _sequence_rows(s: SequenceShape, t: SequenceState) -> PassSide:
    ids = t.row.id if s.mask == MASKS["sequence ids"] else t.row.list
    return PassSide(t.c, t.counts, t.row.list, t.row.page, ids, None, t.places[0])


def _scores(p: SequenceProblem, s: SequenceShape) -> Scores:
    return scores(p, s.mask, p.history_offsets, s.dtype, False)


@kernel
def page_mean(
    unit_ptr,  # [capacity, STRIDE] unit rows of the real history
    id_ptr,  # None where every item has an id of its own
    page_ptr,
    count_ptr,
    history_offsets_ptr,
    place_ptr,  # prefix sums of the real rows
    factor_ptr,  # [capacity] factor of each summed row, or None
    mean_ptr,  # [capacity, STRIDE] float32
    number_ptr,  # [capacity]
    cosine_ptr,  # [capacity]
    STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(1/|pos(k)|) sum_{p in pos(k)} c_p, |pos(k)|, and the product with c_k; or, with factors,
    sum_{p in pos(k)} f_p c_p."""
    start = tl.program_id(0) * BLOCK_M
    count = tl.load(count_ptr)
    if start >= count:
        return
    dims = tl.arange(0, BLOCK_D)
    row = start + tl.arange(0, BLOCK_M)
    valid = row < count
    page = tl.load(page_ptr + row, mask=valid, other=-2)
    first = tl.load(page_ptr + start)
    last = tl.load(page_ptr + tl.minimum(start + BLOCK_M, count) - 1)
    low = tl.load(history_offsets_ptr + first)
    high = tl.load(history_offsets_ptr + last + 1)
    low = tl.load(place_ptr + low - 1, mask=low > 0, other=0)
    high = tl.load(place_ptr + high - 1, mask=high > 0, other=0)
    if id_ptr is not None:
        row_id = tl.load(id_ptr + row, mask=valid, other=0)
    total = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    number = tl.zeros([BLOCK_M], tl.float32)
    for block in range(low, high, BLOCK_H):
        other = block + tl.arange(0, BLOCK_H)
        inside = other < high
        other_page = tl.load(page_ptr + other, mask=inside, other=-1)
        positive = (page[:, None] == other_page[None, :]) & (row[:, None] != other[None, :])
        if id_ptr is not None:
            other_id = tl.load(id_ptr + other, mask=inside, other=0)
            positive = positive & (row_id[:, None] != other_id[None, :])
        weight = tl.where(positive, 1.0, 0.0)
        number += tl.sum(weight, axis=1)
        c = tl.load(
            unit_ptr + other.to(tl.int64)[:, None] * STRIDE + dims[None, :],
            mask=inside[:, None] & (dims < STRIDE)[None, :],
            other=0.0,
        ).to(tl.float32)
        if factor_ptr is not None:
            c = c * tl.load(factor_ptr + other, mask=inside, other=0.0)[:, None]
        total += tl.dot(weight, c, input_precision=PRECISION)
    if factor_ptr is None:
        total = total / tl.where(number > 0, number, 1.0)[:, None]
        own = tl.load(
            unit_ptr + row.to(tl.int64)[:, None] * STRIDE + dims[None, :],
            mask=valid[:, None] & (dims < STRIDE)[None, :],
            other=0.0,
        ).to(tl.float32)
        tl.store(number_ptr + row, number, mask=valid)
        tl.store(cosine_ptr + row, tl.sum(own * total, axis=1), mask=valid)
    tl.store(
        mean_ptr + row.to(tl.int64)[:, None] * STRIDE + dims[None, :],
        total,
        mask=valid[:, None] & (dims < STRIDE)[None, :],
    )


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
    page_mean[(cdiv(s.rows, s.attention.block_m),)](
        t.c,
        rows.ids if s.mask == MASKS["sequence ids"] else None,
        rows.page,
        rows.count,
        p.history_offsets,
        t.places,
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


@kernel
def sequence_losses(
    lse_ptr,
    cosine_ptr,
    number_ptr,
    list_ptr,
    count_ptr,
    loss_ptr,  # 0-d
    anchors_ptr,  # 0-d: what the sum was divided by
    item_loss_ptr,  # [K]
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    MEAN: tl.constexpr,
    ITEMS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean over anchors k (rows with a positive) of logsumexp_l s_kl - mean_p s_kp; one program."""
    count = tl.load(count_ptr)
    inverse_tau = score_scale(tau, TAU_IS_TENSOR) * LN2
    losses = tl.zeros([BLOCK], tl.float32)
    anchors = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        row = start + tl.arange(0, BLOCK)
        anchor = tl.load(number_ptr + row, mask=row < count, other=0.0) > 0
        loss = tl.load(lse_ptr + row, mask=anchor, other=0.0) * LN2
        loss -= tl.load(cosine_ptr + row, mask=anchor, other=0.0) * inverse_tau
        losses += loss
        anchors += tl.where(anchor, 1.0, 0.0)
        if ITEMS:
            position = tl.load(list_ptr + row, mask=anchor, other=0)
            tl.store(item_loss_ptr + position, loss, mask=anchor)
    divisor = 1.0
    if MEAN:
        number = tl.sum(anchors, axis=0)
        divisor = tl.where(number > 0, number, 1.0)
    tl.store(anchors_ptr, divisor)
    tl.store(loss_ptr, tl.sum(losses, axis=0) / divisor)


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
    normalize(Source(p.history, p.history_index), s, t.c, rows.list, rows.count)
    cosine = torch.empty(s.rows, dtype=torch.float32, device=device)
    _page_mean(p, s, t, None, t.number, cosine)
    kept, total = t.kept, torch.empty(s.part_rows, dtype=torch.float32, device=device)
    out = Pass(kept.acc, kept.top, total, None, s.slots(s.rows, s.tile), s.tile)
    results = Results(kept.lse, kept.miss, cosine)
    forward_pass(s, rows, rows, _scores(p, s), out, results)
    loss = torch.zeros((s.rows,) if per_item else (), dtype=torch.float32, device=device)
    sequence_losses[(1,)](
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


@kernel
def sequence_row_gradients(
    upstream_ptr,
    upstream_stride,
    anchors_ptr,
    number_ptr,
    lse_ptr,
    list_ptr,
    count_ptr,
    g_ptr,
    offset_ptr,
    factor_ptr,
    rows,
    lift,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """g_k of each anchor, its offset in the transposed pass, and g_k / |pos(k)|; zeros where k is
    no anchor."""
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    valid = row < tl.load(count_ptr)
    number = tl.load(number_ptr + row, mask=valid, other=0.0)
    anchor = number > 0
    if PER_ROW:
        position = tl.load(list_ptr + row, mask=anchor, other=0)
        g = tl.load(upstream_ptr + position.to(tl.int64) * upstream_stride, mask=anchor, other=0.0)
    else:
        g = tl.where(anchor, tl.load(upstream_ptr) / tl.load(anchors_ptr), 0.0)
    tl.store(g_ptr + row, g, mask=row < rows)
    tl.store(factor_ptr + row, g / tl.where(anchor, number, 1.0), mask=row < rows)
    # A row without candidates has no finite log-sum-exp; its g is 0 and so must be its products.
    lse = tl.load(lse_ptr + row, mask=anchor, other=0.0)
    tl.store(offset_ptr + row, tl.where(anchor, lift - lse, -float("inf")), mask=row < rows)


@kernel
def sequence_gradient(
    list_ptr,
    count_ptr,
    source,  # Source
    g_ptr,
    mean_ptr,  # [capacity, STRIDE] mean of each row's positives
    pulled_ptr,  # [capacity, STRIDE] sum over the anchors that have the row as a positive
    ahead,  # Parts of the forward pass
    back,  # Parts of the transposed one
    factor_ptr,  # 0-d factor of the transposed pass, or None
    upstream_ptr,  # 0-d: one for every anchor, which that pass left out; or None
    anchors_ptr,  # 0-d
    out_ptr,  # [K, D], zeroed
    tau_part_ptr,
    slots,
    programs,
    transposed_slots,
    transposed_programs,
    tau,
    TAU_IS_TENSOR: tl.constexpr,
    how: tl.constexpr,  # RowTiles
):
    """dL/dC_k, as an anchor: g_k/tau (sum_l p_kl c_l - mean of its positives), and as everyone's
    candidate and positive."""
    forward: tl.constexpr = how.ahead
    transposed: tl.constexpr = how.back
    dims = tl.arange(0, how.BLOCK_D)
    row = tl.program_id(0).to(tl.int64) * how.BLOCK_M + tl.arange(0, how.BLOCK_M)
    count = tl.load(count_ptr)
    valid = row < count
    position = tl.load(list_ptr + row, mask=valid, other=0)
    inverse_tau = score_scale(tau, TAU_IS_TENSOR) * LN2
    g = tl.load(g_ptr + row, mask=valid, other=0.0)
    anchor = valid & (g != 0.0)
    where = row[:, None] * how.STRIDE + dims[None, :]
    mask = valid[:, None] & (dims < how.STRIDE)[None, :]
    as_anchor = pass_rows(ahead, count_ptr, count_ptr, slots, programs, row, anchor, forward)
    as_anchor = (
        g[:, None] * (as_anchor - tl.load(mean_ptr + where, mask=mask, other=0.0)) * inverse_tau
    )
    others = pass_rows(
        back,
        count_ptr,
        count_ptr,
        transposed_slots,
        transposed_programs,
        row,
        valid,
        transposed,
    )
    if factor_ptr is not None:
        others *= tl.load(factor_ptr)
    elif upstream_ptr is not None:
        others *= tl.load(upstream_ptr) / tl.load(anchors_ptr)
    others = (others - tl.load(pulled_ptr + where, mask=mask, other=0.0)) * inverse_tau
    c = load_rows(source, position, valid, how.D, how.BLOCK_D).to(tl.float32)
    norm = tl.sqrt(tl.sum(c * c, axis=1))
    unit = c * unit_scale(norm)[:, None]
    tl.store(tau_part_ptr + tl.program_id(0), tl.sum(tl.sum(as_anchor * unit, axis=1), axis=0))
    result = normalize_backward(as_anchor + others, unit, norm)
    tl.store(
        out_ptr + position.to(tl.int64)[:, None] * how.D + dims[None, :],
        result.to(out_ptr.dtype.element_ty),
        mask=valid[:, None] & (dims < how.D)[None, :],
    )


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
    sequence_row_gradients[(cdiv(s.rows, 256),)](
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
    sequence_gradient[(programs,)](
        t.row.list,
        t.counts,
        Source(p.history, p.history_index),
        g,
        mean,
        pulled,
        Parts(t.kept.acc, t.kept.top, t.kept.lse),
        Parts(transposed.acc),
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
