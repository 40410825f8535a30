"""The passes of a loss through the contrast: in registers, or in chunks with P in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...loss.problem import Needs, Problem
from .chunked import Transposed, run_chunks
from .contrast import Pass, PassSide, Scores, lowered, run_contrast, scores
from .masks import MASKS
from .results import Results, finish_pass
from .shapes import Shape, cdiv
from .state import LossState


def forward_pass(
    s: Shape,
    x: PassSide,
    y: PassSide,
    scores: Scores,
    out: Pass,
    results: Results,
    transposed: Transposed | None = None,
) -> None:
    """Parts of sum_j p_ij y_j, and the results of each row x_i."""
    if s.chunked:
        run_chunks(s, x, y, scores, results.lse, transposed, out, results)
        return
    run_contrast(
        s,
        x,
        y,
        scores,
        out,
        positive=results.positive,
        log_q=results.log_q,
        need_rank=results.stats,
    )
    finish_pass(s, x, y, scores, out, results, 0, x.unit.shape[0])


def sides(p: Problem, s: Shape, t: LossState, direction: str) -> tuple[PassSide, PassSide]:
    """(anchors, candidates) of a direction."""

    def side(unit: Any, listed: Any, flag: int, merged: bool = False) -> PassSide:
        # Without ids an item is itself alone; a merged column's list holds item numbers, which are
        # the ids.
        ids = listed.list if p.ids is None or merged else listed.id
        count, place = t.counts[flag : flag + 1], t.places[flag]
        return PassSide(unit, count, listed.list, listed.page, ids, listed.bias, place, merged)

    if direction == "reconstruct":
        anchors = t.r if t.r_anchor is None else t.r_anchor
        return side(anchors, t.anchor, 0), side(t.e, t.column, 2, s.merged)
    return side(t.e_anchor, t.anchor, 0), side(t.r, t.reconstructed, 1)


def loss_scores(p: Problem, s: Shape) -> Scores:
    return scores(p, MASKS[p.negatives], p.pv_offsets, s.dtype, s.biased)


def transposed_passes(
    p: Problem,
    s: Shape,
    t: LossState,
    needs: Needs,
    grad: Tensor,
    g: Tensor | None,
    d_pv: Tensor | None,
) -> tuple[dict[str, Pass], Tensor | None]:
    """sum_i g_i p_ij x_i of each direction, to dL/dE itself where it can be; and the factor that is
    left out of them.

    `g` None: the same for every anchor, and left out."""
    half = s.dtype == torch.float16
    scale, factor = g, None
    results: dict[str, Pass] = {}
    for direction in s.directions:
        if direction == "reconstruct" and not needs.pv:
            continue
        x, y = sides(p, s, t, direction)
        kept = t.kept(direction)
        if kept.dy is not None:
            factor = kept.factor * grad
            results[direction] = Pass(kept.dy, None, None, None, 1, s.transposed)
            continue
        if half and g is not None and factor is None:
            scale, factor = lowered(g)
        into = d_pv if direction == "reconstruct" and p.negatives != "page" else None
        out = results[direction] = _transposed_pass(s, y, into)
        if s.chunked:
            assert scale is not None  # each row has its own: else P was used at once
            run_chunks(s, x, y, loss_scores(p, s), kept.lse, Transposed(scale, out.acc))
            continue
        run_contrast(
            s,
            y,
            x,
            loss_scores(p, s),
            out,
            y_offset=kept.lse,
            y_offset_is_lse=True,
            y_scale=scale,
            x_offset=y.bias,
            x_offset_after=s.merged and not half,
            need_sum=False,
        )
    return results, factor


def _transposed_pass(s: Shape, y: PassSide, d_pv: Tensor | None) -> Pass:
    """Where such a pass goes: to dL/dE itself, if given and each tile is written whole and once."""
    capacity = y.unit.shape[0]
    tiles = cdiv(capacity, s.transposed.block_m)
    # Chunks are summed in float32; one pass is rounded once.
    kind = torch.float32 if s.chunked else s.sums
    whole = not s.chunked and s.stride == s.dim and 2 * tiles > s.programs(s.transposed)
    if d_pv is not None and d_pv.dtype == kind and whole:
        return Pass(d_pv, None, None, None, tiles, s.transposed, True)
    acc = torch.empty(s.flat(capacity, s.transposed), s.stride, dtype=kind, device=s.device)
    return Pass(acc, None, None, None, s.slots(capacity, s.transposed), s.transposed)
