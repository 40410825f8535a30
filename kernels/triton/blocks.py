"""impl="triton": rows against a block of columns (courier_fast/loss/union/blocks.py), by the passes
of contrast.py and chunked.py."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...loss.union import blocks
from . import tiles
from .candidate import kernels
from .candidate.attention import Anchors, Own
from .candidate.lanes import LanePass, lanes_tile
from .candidate.loss import Wanted, candidate_gradients, large_pages, parts_of, tiles_of
from .candidate.pages import ANCHORS, Pages, place
from .chunked import Transposed, run_chunks
from .common import LOG2E, temperature
from .contrast import Pass, PassSide, lowered, run_contrast, scores
from .masks import MASKS
from .parts import collect
from .passes import forward_pass
from .results import Results
from .shapes import block_shape

if TYPE_CHECKING:
    from ...loss.problem import Histories
    from ...loss.union.blocks import Block, CandidateGradients, Partial, Scoring


class _Pass:
    """Rows x against columns y: shapes, both sides for the kernels, what a launch is told."""

    def __init__(self, x: Block, y: Block, pairs: str, scoring: Scoring) -> None:
        unit = x.rows
        self.device, self.dim = unit.device, unit.shape[1]
        self.shape = block_shape(unit, pairs == "sequence")
        self.x, self.y = self._rows(x), self._rows(y)
        if x.ids is None or y.ids is None:
            # Nothing is left out: ids of which no two are equal.
            self.x.ids, self.y.ids = torch.ones_like(self.x.list), torch.zeros_like(self.y.list)
        known = {"ids": MASKS["batch"], "other_pages": MASKS["other_pages"]}
        mask = known.get(pairs, MASKS["sequence ids"])
        offsets = torch.zeros(1, dtype=torch.int64, device=self.device)
        # log m is no more than a few times 1/tau; where rows are counted on the device, some
        # columns are none.
        biased = y.count is not None or (y.bias is not None and not y.merged)
        self.scores = scores(scoring, mask, offsets, unit.dtype, biased)

    def _rows(self, block: Block) -> PassSide:
        unit = block.rows
        if self.shape.stride != self.dim:
            unit = torch.nn.functional.pad(unit, (0, self.shape.stride - self.dim))
        n = len(block)
        count = block.count
        if count is None:
            count = torch.full((1,), n, dtype=torch.int32, device=self.device)
        every = torch.arange(n, dtype=torch.int32, device=self.device)
        page = every if block.page is None else block.page.to(torch.int32)
        bias = None if block.bias is None else (block.bias * LOG2E.value).to(torch.float32)
        ids = every if block.ids is None else block.ids
        return PassSide(unit.contiguous(), count, every, page, ids, bias, every)

    def empty(self, tile: tiles.Tile, rows: int, parts: bool) -> Pass:
        s, new = self.shape, torch.empty
        flat = s.flat(rows, tile)
        acc = new(flat, s.stride, dtype=s.sums, device=self.device)
        top, total = (
            new(flat, dtype=torch.float32, device=self.device) if parts else None for _ in range(2)
        )
        return Pass(acc, top, total, None, s.slots(rows, tile), tile)


def forward(x: Block, y: Block, pairs: str, scoring: Scoring, bar: Tensor | None) -> Partial:
    """As blocks.forward."""
    if not len(y) or not len(x):
        return blocks.no_columns(x, bar)
    run = _Pass(x, y, pairs, scoring)
    out = run.empty(run.shape.tile, len(x), True)
    lse = torch.full((len(x),), -torch.inf, dtype=torch.float32, device=run.device)
    forward_pass(run.shape, run.x, run.y, run.scores, out, Results(lse, lse, lse))
    mean = torch.where(lse[:, None] == -torch.inf, 0.0, collect(run.shape, out, run.x, run.y, lse))
    ranks = None if bar is None else blocks.above(x, y, pairs, scoring, bar)
    return blocks.Partial(lse.double() * math.log(2.0), mean, ranks)


def _with_weight(x: Block, lse: Tensor, g: Tensor) -> tuple[Block, Tensor, Tensor]:
    """The rows with any weight, first and counted on the device: what others sent is padded."""
    if x.rows.device.type == "cpu":
        return x, lse, g
    order = torch.argsort((g == 0).to(torch.uint8), stable=True)
    ids = None if x.ids is None else x.ids[order]
    count = (g != 0).sum(dtype=torch.int32).view(1)
    return blocks.Block(x.rows[order], ids, count=count), lse[order], g[order]


def backward(y: Block, x: Block, lse: Tensor, g: Tensor, pairs: str, scoring: Scoring) -> Tensor:
    """As blocks.backward."""
    if not len(y) or not len(x):
        return torch.zeros(y.rows.shape, dtype=torch.float32, device=y.rows.device)
    if pairs == "ids":
        x, lse, g = _with_weight(x, lse, g)
    run = _Pass(x, y, pairs, scoring)
    s = run.shape
    g, factor = lowered(g) if s.dtype == torch.float16 else (g.to(torch.float32), None)
    offset = (lse * LOG2E.value).to(torch.float32)
    if s.chunked:
        acc = torch.zeros(len(y), s.stride, dtype=torch.float32, device=run.device)
        run_chunks(s, run.x, run.y, run.scores, offset, Transposed(g, acc))
        found = acc[:, : run.dim]
    else:
        out = run.empty(s.transposed, len(y), False)
        about: dict[str, Any] = {"x_offset": run.y.bias, "y_scale": g, "need_sum": False}
        run_contrast(
            s, run.y, run.x, run.scores, out, y_offset=offset, y_offset_is_lse=True, **about
        )
        found = collect(s, out, run.y, run.x, None)
    return found if factor is None else found * factor


# ---- attention "candidate" -----------------------------------------------------------------------


class _CandidatePass:
    """What the kernels of attention "candidate" are told: anchors as the only rows of their
    pages, a block's rows as columns."""

    def __init__(
        self, histories: Histories, x: Block, y: Block, pairs: str, scoring: Scoring
    ) -> None:
        e = y.rows.contiguous()
        self.device, self.dim, self.n, self.m = e.device, e.shape[1], len(y), len(x)
        assert x.page is not None
        int32 = {"dtype": torch.int32, "device": self.device}
        rows, columns = torch.arange(self.m + 1, **int32), torch.arange(self.n, **int32)
        # First anchor of each page; where they are padded, the last ones are of no page.
        anchors = torch.searchsorted(
            x.page, torch.arange(len(histories.offsets), device=self.device)
        )
        identified = x.ids is not None and y.ids is not None
        query = None if y.query is None else y.query.contiguous()
        self.shape = replace(block_shape(e), heads=histories.heads)
        key, value = histories.key.contiguous(), histories.value.contiguous()
        nothing = rows
        self.shared: dict[str, Any] = {
            "q_ptr": e if query is None else query,
            "k_ptr": key,
            "v_ptr": value,
            "e_ptr": e,
            "pv_offsets_ptr": anchors,
            "history_offsets_ptr": histories.offsets,
            "history_page_ptr": histories.page.to(torch.int32),
            "anchor_id_ptr": x.ids if identified else torch.ones_like(rows),
            "anchor_place_ptr": rows[1:],
            "column_list_ptr": columns,
            "column_page_ptr": nothing if y.page is None else y.page.to(torch.int32),
            "column_id_ptr": y.ids if identified else torch.zeros_like(columns),
            "column_bias_ptr": nothing if y.bias is None else (y.bias * LOG2E.value).float(),
            "column_count_ptr": self._count(y),
            **temperature(scoring),
            "scale": histories.scale,
            "D": self.dim,
            "HEADS": histories.heads,
            "COSINE": histories.cosine,
            "SAME_Q": query is None,
            "MASK": MASKS["other_pages" if pairs == "other_pages" else "batch"],
            "HAS_BIAS": y.bias is not None,
        }
        for name in "qkve":
            self.shared |= {f"{name}_index_ptr": nothing, f"HAS_{name.upper()}_INDEX": False}
        self.every = rows
        pages = len(histories.offsets) - 1
        self.listed = torch.empty(3, pages, **int32), torch.empty(3, **int32)
        place(
            Pages(anchors, histories.offsets, rows[1:]),
            self.listed,
            lanes_tile(self.shape).block_n,
            None,
        )
        self.pages = pages

    def _count(self, block: Block) -> Tensor:
        if block.count is not None:
            return block.count
        return torch.full((1,), len(block), dtype=torch.int32, device=self.device)


def candidate_forward(
    histories: Histories, x: Block, y: Block, pairs: str, scoring: Scoring, bar: Tensor | None
) -> Partial:
    """As blocks.candidate_forward."""
    if not len(x) or not len(y):
        return replace(blocks.no_columns(x, bar), mean=None)
    run = _CandidatePass(histories, x, y, pairs, scoring)
    parts = parts_of(run.device, len(histories.offsets) - 1)
    new = torch.zeros
    top = torch.full((parts, run.m), -torch.inf, dtype=torch.float32, device=run.device)
    total, positive = torch.zeros_like(top), new(run.m, 2, dtype=torch.float32, device=run.device)
    above = new(parts, run.m, dtype=torch.int32, device=run.device)
    if bar is not None:
        # Ties but for rounding are not above: see blocks.count_above.
        positive[:, 1] = bar / torch.as_tensor(scoring.inverse_tau, device=run.device) + 1e-6
    sums = {
        "y_place_ptr": run.every,
        "top_ptr": top,
        "total_ptr": total,
        "above_ptr": above,
        "capacity": run.m,
        "BIAS_IS_COUNT": y.merged,
        "NEED_RANK": bar is not None,
    }
    kernels.candidate_scores[(min(run.pages, tiles.programs(run.device)), parts)](
        **run.shared,
        **sums,
        **large_pages(run.listed),
        **tiles_of(run.shape),
        positive_ptr=positive,
        list_ptr=run.every,
        log_q_ptr=positive,
        parts=parts,
        HAS_LOG_Q=False,
        SLOTS=ANCHORS.value,
    )
    if lanes_tile(run.shape).block_n:
        lanes, own = LanePass(run.shape, run.shared, run.listed), Own(positive, run.every, None)
        mask, ids = run.shared["MASK"], run.shared["anchor_id_ptr"]
        lanes.scores(parts, own, **sums, MASK=mask, anchor_id_ptr=ids)
    # Sums of nothing are 0, whose logarithm is right.
    lse = torch.logsumexp((top.double() + total.double().log2()) * math.log(2.0), 0)
    return blocks.Partial(lse, None, None if bar is None else above.sum(0))


def candidate_backward(
    histories: Histories, x: Block, y: Block, lse: Tensor, g: Tensor, pairs: str, scoring: Scoring
) -> CandidateGradients:
    """As blocks.candidate_backward."""
    found = blocks.no_gradients(histories, y)
    if not len(x) or not len(y):
        return found
    run = _CandidatePass(histories, x, y, pairs, scoring)
    nothing = torch.zeros(run.m, dtype=torch.float32, device=run.device)  # positives are elsewhere
    lse = (lse * LOG2E.value).float()
    anchors = Anchors(run.every, run.shared["anchor_id_ptr"], lse, nothing, g.to(torch.float32))
    wanted = Wanted(found.rows, found.query, found.key, found.value, found.value is None, True)
    slopes = candidate_gradients(
        run.shape, run.shared, run.listed, anchors, run.every, wanted, merged=False
    )
    found.inverse_tau = torch.cat(slopes).sum(dtype=torch.float64)
    return found
