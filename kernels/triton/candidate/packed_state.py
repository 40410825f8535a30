"""Launches of packing.py and packed.py: pages with an anchor packed into blocks, which
loss.py then leaves out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor

from .. import tiles
from ..common import temperature
from ..masks import MASKS
from ..shapes import Shape, cdiv, larger, loss_shape
from ..state import Group, Listed, Make, Plan
from . import packed, packing

if TYPE_CHECKING:
    from typing_extensions import Self

    from ....loss.problem import Problem

_SLOTS, _UNITS, _SIDE, _PADDING = (
    x.value for x in (packing.SLOTS, packing.UNITS, packing.SIDE, packing.PADDING)
)
# exp((x - 1) / T) squared must stay above float32's smallest number for every cosine x.
_SHARPEST = 20.0
_ROWS = 16


@dataclass(frozen=True)
class CandidateShape(Shape):
    packed: bool = False
    blocks: Any = 0  # of the packing

    @property
    def block_slots(self) -> Any:
        return self.blocks * _SLOTS

    @property
    def units(self) -> Any:
        return self.blocks * _UNITS

    @property
    def padded_columns(self) -> Any:
        return cdiv(self.columns, _PADDING) * _PADDING


def candidate_shape(p: Problem) -> CandidateShape:
    s = loss_shape(p)
    # A block holds at least 33 rows, or 16 pages of a single unit; the last one of each size may
    # hold less.
    blocks = torch.sym_min(s.pages, s.pages * 34 // 1024 + cdiv(s.history_rows, 33) + 6)
    return CandidateShape(
        **vars(s),
        # Whether dot products of E and C are all that is needed, and every column is an item of its
        # own.
        packed=tiles.packs(s.dtype, s.device)
        and s.dim <= tiles.LARGEST_REGISTER_DIM
        and p.cosine
        and 0 <= p.attention_scale <= _SHARPEST
        and s.heads == 1
        and p.query is None
        and p.key is None
        and p.value is None
        and p.item_ids is None
        and (s.merged or p.pv_index is None)
        and p.negatives != "page",
        blocks=larger(blocks, 1),
    )


@dataclass
class Packing(Group):
    """What the backward needs of the packing."""

    unit_page: Tensor
    block_group: Tensor
    block_most: Tensor
    page_place: Tensor
    long: Tensor
    packed_count: Tensor
    c: Tensor
    gram: Tensor
    slot_log: Tensor
    slot_length: Tensor
    slot_row: Tensor
    unit_poison: Tensor
    unit_column: Tensor
    e: Tensor
    e_length: Tensor

    @classmethod
    def build(cls, s: CandidateShape, make: Make) -> Self:
        return cls(
            unit_page=make((s.units,), torch.int32),
            block_group=make((s.blocks,), torch.int32),
            block_most=make((s.blocks,), torch.int32),
            page_place=make((s.pages,), torch.int32),
            long=make((s.pages,), torch.int32),
            packed_count=make((3,), torch.int32),
            c=make((s.block_slots, s.block_d), s.dtype),
            # Weights and gradients in products: float16 has too little range for them.
            gram=make((s.block_slots, _SLOTS), s.sums),
            slot_log=make((s.block_slots,)),
            slot_length=make((s.block_slots,)),
            slot_row=make((s.block_slots,), torch.int64),
            unit_poison=make((s.units,)),
            unit_column=make((_SIDE, s.units), torch.int32),
            e=make((s.padded_columns, s.block_d), s.dtype),
            e_length=make((s.columns,)),
        )


@dataclass
class CandidateState(Plan):
    column: Listed
    lse: Tensor
    miss: Tensor
    weight_sum: Tensor
    positive: Tensor | None
    packing: Packing | None

    @classmethod
    def build(cls, s: Any, make: Make) -> Self:
        """Of a CandidateShape."""
        return cls(
            **vars(Plan.build(s, make)),
            lse=make((s.rows,)),
            miss=make((s.rows,)),
            weight_sum=make(()),
            positive=make((s.rows, 2)) if s.packed else None,
            packing=Packing.build(s, make) if s.packed else None,
        )


def _anchors(p: Problem, s: CandidateShape, t: CandidateState, k: Packing) -> dict[str, Any]:
    """What the small kernels know of anchors and their pages."""
    return {
        "pv_offsets_ptr": p.pv_offsets,
        "anchor_place_ptr": t.places[0],
        "anchor_list_ptr": t.anchor.list,
        "anchor_page_ptr": t.anchor.page,
        "anchor_id_ptr": t.anchor.id if s.merged else t.anchor.list,
        "count_ptr": t.counts[0:1],
        "page_place_ptr": k.page_place,
        "positive_ptr": t.positive,
        "log_q_ptr": p.log_q if p.log_q is not None else t.positive,
        "pv_index_ptr": p.pv_index if s.merged else t.anchor.list,
        "item_count_ptr": t.item_count if s.merged else t.anchor.list,
        "units": s.units,
        **temperature(p),
        "MASK": MASKS[p.negatives],
        "HAS_LOG_Q": p.log_q is not None,
        "MERGED": s.merged,
        "BLOCK": 256,
    }


def _tiles(
    p: Problem, s: CandidateShape, t: CandidateState, k: Packing, kind: str
) -> dict[str, Any]:
    """What the passes over candidates times blocks have in common."""
    tile = tiles.packed_tile(kind, s.device)
    return {
        "e_ptr": k.e,
        "c_ptr": k.c,
        "gram_ptr": k.gram,
        "slot_log_ptr": k.slot_log,
        "block_group_ptr": k.block_group,
        "block_most_ptr": k.block_most,
        "unit_page_ptr": k.unit_page,
        "unit_poison_ptr": k.unit_poison,
        "unit_column_ptr": k.unit_column,
        "column_page_ptr": t.column.page,
        "column_bias_ptr": k.slot_log if t.column.bias is None else t.column.bias,
        "column_count_ptr": t.counts[2:3],
        "packed_count_ptr": k.packed_count,
        "units": s.units,
        "sharpness": p.attention_scale / math.log(2.0),
        **temperature(p),
        "MASK": MASKS[p.negatives],
        "HAS_BIAS": t.column.bias is not None,
        "BLOCK_M": tile.block_m,
        "BLOCK_D": s.block_d,
        "PRECISION": s.precision,
        **tile.launch,
    }


def pack(p: Problem, s: CandidateShape, t: CandidateState, k: Packing) -> None:
    """Fills `k`."""
    source = p.pv if p.history is None else p.history
    k.unit_page.fill_(-1)
    packing.pack_pages[(1,)](
        p.pv_offsets,
        p.history_offsets,
        t.places[0],
        k.unit_page,
        k.page_place,
        k.long,
        k.packed_count,
        s.pages,
        CHUNK=512,
        num_warps=8,
    )
    packing.pack_blocks[(s.blocks,)](
        source,
        p.history_index if p.history_index is not None else k.slot_row,
        p.pv_offsets,
        p.history_offsets,
        t.history_page,
        t.anchor.list,
        t.places[0],
        p.pv_index if s.merged else k.slot_row,
        t.item_place if s.merged else t.places[2],
        k.unit_page,
        k.page_place,
        k.packed_count,
        k.c,
        k.gram,
        k.slot_log,
        k.slot_length,
        k.slot_row,
        k.unit_poison,
        k.unit_column,
        k.block_group,
        k.block_most,
        s.units,
        D=s.dim,
        HAS_INDEX=p.history_index is not None,
        MERGED=s.merged,
        BLOCK_D=s.block_d,
        PRECISION=s.precision,
        num_warps=8,
    )
    packing.unit_columns[(cdiv(k.e.shape[0], _ROWS),)](
        p.pv,
        k.slot_row,
        t.column.list,
        t.counts[2:3],
        k.e,
        k.e_length,
        D=s.dim,
        HAS_INDEX=False,
        BLOCK_M=_ROWS,
        BLOCK_D=s.block_d,
    )


def scores(
    p: Problem, s: CandidateShape, t: CandidateState, k: Packing, top: Tensor, total: Tensor
) -> None:
    """Log-sum-exps of the packed pages' anchors over everything but their positives, to the first
    rows of top and total."""
    blocks, device = s.blocks, s.device
    parts = max(1, min(16, tiles.programs(device) * 4 // max(blocks, 1)))
    packed_top = torch.empty(parts, blocks * _UNITS, dtype=torch.float32, device=device)
    packed_total = torch.empty_like(packed_top)
    packed.packed_scores[(blocks, parts)](
        **_tiles(p, s, t, k, "scores"), parts=parts, top_ptr=packed_top, total_ptr=packed_total
    )
    packing.merge_packed[(cdiv(s.rows, 256),)](
        **_anchors(p, s, t, k),
        packed_top_ptr=packed_top,
        packed_total_ptr=packed_total,
        top_ptr=top,
        total_ptr=total,
        packed_parts=parts,
    )


def backward(
    p: Problem,
    s: CandidateShape,
    t: CandidateState,
    k: Packing,
    g: Tensor,
    d_e: Tensor | None,
    d_c: Tensor | None,
    want_tau: bool,
) -> list[Tensor]:
    """Adds to dL/dE and dL/dC; parts of sum of g cos."""
    device, units = s.device, s.units
    own = torch.empty(_SIDE, units, dtype=torch.float32, device=device)
    lse, weight = torch.empty(2, units, dtype=torch.float32, device=device)
    packing.page_weights[(cdiv(s.rows, 256),)](
        **_anchors(p, s, t, k),
        history_offsets_ptr=p.history_offsets,
        lse_ptr=t.lse,
        miss_ptr=t.miss,
        g_ptr=g,
        unit_lse_ptr=lse,
        unit_weight_ptr=weight,
        unit_own_ptr=own,
    )
    pages = {"unit_own_ptr": own, "unit_lse_ptr": lse, "unit_weight_ptr": weight}
    dots = {"DOT_TYPE": tl.bfloat16 if s.dtype == torch.bfloat16 else tl.float32}
    if d_e is not None:
        unit = torch.empty(k.e.shape, dtype=torch.float32, device=device)
        # Half a block at a time; and what one page fills, whole.
        for kind, step in (("columns", _SLOTS // 2), ("columns of large pages", _SLOTS)):
            tiles = _tiles(p, s, t, k, kind)
            packed.packed_columns[(cdiv(k.e.shape[0], tiles["BLOCK_M"]),)](
                **tiles,
                **pages,
                **dots,
                unit_gradient_ptr=unit,
                STEP=step,
            )
        packed.finish_columns[(cdiv(k.e.shape[0], _ROWS),)](
            unit,
            k.e,
            k.e_length,
            t.column.list,
            t.counts[2:3],
            k.packed_count,
            d_e,
            D=s.dim,
            BLOCK_M=_ROWS,
            BLOCK_D=s.block_d,
        )
    if d_c is None and not want_tau:
        return []
    tau_parts = torch.empty(s.blocks, dtype=torch.float32, device=device)
    packed.packed_history[(s.blocks,)](
        **_tiles(p, s, t, k, "history"),
        **pages,
        **dots,
        slot_length_ptr=k.slot_length,
        slot_row_ptr=k.slot_row,
        page_place_ptr=k.page_place,
        D=s.dim,
        dc_ptr=d_c if d_c is not None else g,
        tau_part_ptr=tau_parts,
        WANT_C=d_c is not None,
        WANT_TAU=want_tau,
    )
    return [tau_parts]
