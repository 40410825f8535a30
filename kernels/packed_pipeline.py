"""Launches of packing.py and packed.py: pages with an anchor packed into blocks, which candidate_pipeline.py then leaves out."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor

from . import configs, packed, packing
from .state import MASKS, Shape, cdiv, temperature_argument

if TYPE_CHECKING:
    from courier_fast.problem import Problem

_SLOTS, _UNITS, _SIDE, _PADDING = (
    x.value for x in (packing.SLOTS, packing.UNITS, packing.SIDE, packing.PADDING)
)
# exp((x - 1) / T) squared must stay above float32's smallest number for every cosine x.
_SHARPEST = 20.0
_ROWS = 16


def packs(p: Problem, merged: bool) -> bool:
    """Whether dot products of E and C are all that is needed, and every column is an item of its own."""
    return (
        configs.packs(p.pv.dtype, p.pv.device)
        and p.pv.shape[1] <= configs.LARGEST_REGISTER_DIM
        and p.cosine
        and 0 <= p.attention_scale <= _SHARPEST
        and p.num_heads == 1
        and p.query is None
        and p.key is None
        and p.value is None
        and p.item_ids is None
        and (merged or p.pv_index is None)
        and p.negatives != "page"
    )


def state_spec(p: Problem, s: Shape, columns: Any) -> dict[str, tuple[Any, torch.dtype]]:
    """What the backward needs of the packing."""
    # A block holds at least 33 rows, or 16 pages of a single unit; the last one of each size may hold less.
    blocks = torch.sym_min(s.pages, s.pages * 34 // 1024 + cdiv(s.history_rows, 33) + 6)
    blocks = torch.sym_max(blocks, 1)
    slots, units = blocks * _SLOTS, blocks * _UNITS
    numbers, counts = torch.float32, torch.int32
    return {
        "unit_page": ((units,), counts),
        "block_group": ((blocks,), counts),
        "block_most": ((blocks,), counts),
        "page_place": ((s.pages,), counts),
        "long": ((s.pages,), counts),
        "packed_count": ((3,), counts),
        "c": ((slots, s.block_d), p.pv.dtype),
        "gram": ((slots, _SLOTS), _dot_dtype(p)),
        "slot_log": ((slots,), numbers),
        "slot_length": ((slots,), numbers),
        "slot_row": ((slots,), torch.int64),
        "unit_poison": ((units,), numbers),
        "unit_column": ((_SIDE, units), counts),
        "e": ((cdiv(columns, _PADDING) * _PADDING, s.block_d), p.pv.dtype),
        "e_length": ((columns,), numbers),
    }


def _dot_dtype(p: Problem) -> torch.dtype:
    """Of weights and gradients in products: float16 has too little range for them."""
    return torch.bfloat16 if p.pv.dtype == torch.bfloat16 else torch.float32


def _merged(t: dict[str, Tensor]) -> bool:
    return "item_count" in t


def _anchors(p: Problem, t: dict[str, Tensor]) -> dict[str, Any]:
    """What the small kernels know of anchors and their pages."""
    tau, tau_is_tensor = temperature_argument(p)
    return {
        "pv_offsets_ptr": p.pv_offsets,
        "anchor_rank_ptr": t["ranks"][0],
        "anchor_list_ptr": t["anchor_list"],
        "anchor_page_ptr": t["anchor_page"],
        "anchor_id_ptr": t["anchor_id"] if _merged(t) else t["anchor_list"],
        "count_ptr": t["counts"][0:1],
        "page_place_ptr": t["page_place"],
        "positive_ptr": t["positive"],
        "log_q_ptr": p.log_q if p.log_q is not None else t["positive"],
        "pv_index_ptr": p.pv_index if _merged(t) else t["anchor_list"],
        "item_count_ptr": t["item_count"] if _merged(t) else t["anchor_list"],
        "units": t["unit_page"].shape[0],
        "tau": tau,
        "TAU_IS_TENSOR": tau_is_tensor,
        "MASK": MASKS[p.negatives],
        "HAS_LOG_Q": p.log_q is not None,
        "MERGED": _merged(t),
        "BLOCK": 256,
    }


def _tiles(p: Problem, s: Shape, t: dict[str, Tensor], kind: str) -> dict[str, Any]:
    """What the passes over candidates times blocks have in common."""
    tau, tau_is_tensor = temperature_argument(p)
    tile = configs.packed_tile(kind, p.pv.device)
    return {
        "e_ptr": t["e"],
        "c_ptr": t["c"],
        "gram_ptr": t["gram"],
        "slot_log_ptr": t["slot_log"],
        "block_group_ptr": t["block_group"],
        "block_most_ptr": t["block_most"],
        "unit_page_ptr": t["unit_page"],
        "unit_poison_ptr": t["unit_poison"],
        "unit_column_ptr": t["unit_column"],
        "column_page_ptr": t["column_page"],
        "column_bias_ptr": t.get("column_bias", t["slot_log"]),
        "column_count_ptr": t["counts"][2:3],
        "packed_count_ptr": t["packed_count"],
        "units": t["unit_page"].shape[0],
        "sharpness": p.attention_scale / math.log(2.0),
        "tau": tau,
        "TAU_IS_TENSOR": tau_is_tensor,
        "MASK": MASKS[p.negatives],
        "HAS_BIAS": "column_bias" in t,
        "BLOCK_M": tile.block_m,
        "BLOCK_D": s.block_d,
        "PRECISION": s.precision,
        **tile.launch,
    }


def _blocks(t: dict[str, Tensor]) -> int:
    return t["unit_page"].shape[0] // _UNITS


def pack(p: Problem, s: Shape, t: dict[str, Tensor]) -> None:
    """Fills what `state_spec` names."""
    source = p.pv if p.history is None else p.history
    merged = _merged(t)
    t["unit_page"].fill_(-1)
    packing.pack_pages[(1,)](
        p.pv_offsets,
        p.history_offsets,
        t["ranks"][0],
        t["unit_page"],
        t["page_place"],
        t["long"],
        t["packed_count"],
        s.pages,
        CHUNK=512,
        num_warps=8,
    )
    packing.pack_blocks[(_blocks(t),)](
        source,
        p.history_index if p.history_index is not None else t["slot_row"],
        p.pv_offsets,
        p.history_offsets,
        t["history_page"],
        t["anchor_list"],
        t["ranks"][0],
        p.pv_index if merged else t["slot_row"],
        t["item_rank"] if merged else t["ranks"][2],
        t["unit_page"],
        t["page_place"],
        t["packed_count"],
        t["c"],
        t["gram"],
        t["slot_log"],
        t["slot_length"],
        t["slot_row"],
        t["unit_poison"],
        t["unit_column"],
        t["block_group"],
        t["block_most"],
        t["unit_page"].shape[0],
        D=s.dim,
        HAS_INDEX=p.history_index is not None,
        MERGED=merged,
        BLOCK_D=s.block_d,
        PRECISION=s.precision,
        num_warps=8,
    )
    packing.unit_columns[(cdiv(t["e"].shape[0], _ROWS),)](
        p.pv,
        t["slot_row"],
        t["column_list"],
        t["counts"][2:3],
        t["e"],
        t["e_length"],
        D=s.dim,
        HAS_INDEX=False,
        BLOCK_M=_ROWS,
        BLOCK_D=s.block_d,
    )


def scores(p: Problem, s: Shape, t: dict[str, Tensor], top: Tensor, total: Tensor) -> None:
    """Log-sum-exps of the packed pages' anchors over everything but their positives, to the first rows of top and total."""
    blocks, device = _blocks(t), p.pv.device
    parts = max(1, min(16, configs.programs(device) * 4 // max(blocks, 1)))
    packed_top = torch.empty(parts, blocks * _UNITS, dtype=torch.float32, device=device)
    packed_total = torch.empty_like(packed_top)
    packed.packed_scores[(blocks, parts)](
        **_tiles(p, s, t, "scores"), parts=parts, top_ptr=packed_top, total_ptr=packed_total
    )
    packing.merge_packed[(cdiv(s.rows, 256),)](
        **_anchors(p, t),
        packed_top_ptr=packed_top,
        packed_total_ptr=packed_total,
        top_ptr=top,
        total_ptr=total,
        packed_parts=parts,
    )


def backward(
    p: Problem,
    s: Shape,
    t: dict[str, Tensor],
    g: Tensor,
    d_e: Tensor | None,
    d_c: Tensor | None,
    want_tau: bool,
) -> Tensor | None:
    """Adds to dL/dE and dL/dC; parts of sum of g cos."""
    device = p.pv.device
    units, blocks = t["unit_page"].shape[0], _blocks(t)
    own = torch.empty(_SIDE, units, dtype=torch.float32, device=device)
    lse, weight = torch.empty(2, units, dtype=torch.float32, device=device)
    packing.page_weights[(cdiv(s.rows, 256),)](
        **_anchors(p, t),
        history_offsets_ptr=p.history_offsets,
        lse_ptr=t["lse"],
        miss_ptr=t["miss"],
        g_ptr=g,
        unit_lse_ptr=lse,
        unit_weight_ptr=weight,
        unit_own_ptr=own,
    )
    pages = {"unit_own_ptr": own, "unit_lse_ptr": lse, "unit_weight_ptr": weight}
    dots = {"DOT_TYPE": tl.bfloat16 if _dot_dtype(p) == torch.bfloat16 else tl.float32}
    if d_e is not None:
        unit = torch.empty(t["e"].shape, dtype=torch.float32, device=device)
        # Half a block at a time; and what one page fills, whole.
        for kind, step in (("columns", _SLOTS // 2), ("columns of large pages", _SLOTS)):
            tiles = _tiles(p, s, t, kind)
            packed.packed_columns[(cdiv(t["e"].shape[0], tiles["BLOCK_M"]),)](
                **tiles,
                **pages,
                **dots,
                unit_gradient_ptr=unit,
                STEP=step,
            )
        packed.finish_columns[(cdiv(t["e"].shape[0], _ROWS),)](
            unit,
            t["e"],
            t["e_length"],
            t["column_list"],
            t["counts"][2:3],
            t["packed_count"],
            d_e,
            D=s.dim,
            BLOCK_M=_ROWS,
            BLOCK_D=s.block_d,
        )
    if d_c is None and not want_tau:
        return None
    tau_parts = torch.empty(blocks, dtype=torch.float32, device=device)
    packed.packed_history[(blocks,)](
        **_tiles(p, s, t, "history"),
        **pages,
        **dots,
        slot_length_ptr=t["slot_length"],
        slot_row_ptr=t["slot_row"],
        page_place_ptr=t["page_place"],
        D=s.dim,
        dc_ptr=d_c if d_c is not None else g,
        tau_part_ptr=tau_parts,
        WANT_C=d_c is not None,
        WANT_TAU=want_tau,
    )
    return tau_parts
