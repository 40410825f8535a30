"""Shapes, types and names that the stages of one problem share: pure arithmetic, no data, no launch."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import configs
from .tl_common import SMALLEST_FIXED_TAU

if TYPE_CHECKING:
    from courier_fast.blocks import Scoring
    from courier_fast.problem import Problem, SequenceProblem


# float16 probabilities of many candidates would be subnormal: they are lifted by 2^12 and lowered again in float32.
HALF_LIFT = 12.0


# Which candidates an anchor has, as the kernels are told.
MASKS = {"batch": 0, "page": 1, "other_pages": 2}

_Spec = dict[str, tuple[tuple[Any, ...], torch.dtype]]


def cdiv(a: Any, b: int) -> Any:
    return (a + b - 1) // b


@dataclass(frozen=True)
class Shape:
    """What the launches of one problem have in common."""

    dim: int
    stride: int
    block_d: int
    rows: int  # N
    history_rows: int  # K
    pages: int
    items: int  # n of the table, 0 without one
    merged: bool  # equal candidates are one column
    every: bool  # R of every item with a history, not of the anchors only
    both_lists: bool  # anchors and reconstructed rows are different lists
    directions: tuple[str, ...]
    id_dtype: torch.dtype
    chunked: bool  # P of a chunk of rows is stored, instead of sums over D in registers
    early: bool  # ... and used at once for the gradient of the columns: the weights of the rows are known
    stream: bool  # a tile may be divided between programs anywhere (`schedule` in tl_common.py)
    tile: configs.Tile
    lse: configs.Tile  # of a forward pass whose gradient nobody wants: without values
    transposed: configs.Tile
    product: configs.ProductTile
    attention: configs.Tile
    backward: configs.Tile
    small: configs.Tile
    precision: str

    def programs(self, tile: configs.Tile, device: torch.device) -> int:
        """Programs of a contrast pass that are at work at the same time."""
        return 1 if self.chunked else configs.programs(device) * tile.per_processor

    def slots(self, capacity: Any, tile: configs.Tile, device: torch.device) -> Any:
        """Programs of a contrast pass over at most `capacity` rows, and so the tiles of partial sums it writes."""
        if self.chunked:
            return 1
        return torch.sym_max(cdiv(capacity, tile.block_m), self.programs(tile, device))

    def forward(self, values: bool) -> configs.Tile:
        return self.tile if values else self.lse

    def flat(self, capacity: Any, tile: configs.Tile, device: torch.device) -> Any:
        """Rows of what such a pass writes."""
        return capacity if self.chunked else self.slots(capacity, tile, device) * tile.block_m


def _divisible(dtype: torch.dtype, chunks: bool) -> bool:
    """Whether a row tile may be divided anywhere between programs: float32 tiles have no registers left for that."""
    return not chunks and (dtype != torch.float32 or configs.interpreted())


def loss_shape(p: Problem) -> Shape:
    dim = p.pv.shape[1]
    chunks = configs.use_chunks(p.pv.dtype, dim)
    stride = configs.row_stride(dim, chunks)
    table = p.pv_index is not None
    every = p.direction != "reconstruct"

    def tile(kind: str) -> configs.Tile:
        return configs.contrast_tile(p.pv.dtype, stride, p.pv.device, kind)

    return Shape(
        dim=dim,
        stride=stride,
        block_d=configs.block_dim(stride),
        rows=p.num_pv,
        history_rows=p.num_history,
        pages=p.pv_offsets.shape[0] - 1,
        items=p.pv.shape[0] if table else 0,
        # Columns can be merged where every page sees the same candidates, known by the index alone; a table much
        # larger than the batch is not worth a column list of its own.
        merged=table
        and p.item_ids is None
        and p.log_q is None
        and p.negatives == "batch"
        and p.direction != "identify"
        and p.pv.shape[0] <= p.num_pv,
        every=every,
        both_lists=every,
        directions=("reconstruct", "identify") if p.direction == "both" else (p.direction,),
        id_dtype=torch.int64 if p.item_ids is not None else torch.int32,
        chunked=chunks,
        early=chunks and p.reduction != "none",
        stream=_divisible(p.pv.dtype, chunks) and p.negatives != "page",
        tile=tile("forward"),
        lse=tile("lse"),
        transposed=tile("transposed"),
        product=configs.product_tile(p.pv.dtype),
        attention=configs.attention_tile(p.pv.dtype, stride, p.num_heads, False),
        backward=configs.attention_tile(p.pv.dtype, stride, p.num_heads, True),
        small=configs.rows_tile(stride),
        precision=configs.dot_precision(p.pv.dtype),
    )


def _list_spec(name: str, capacity: Any, id_dtype: torch.dtype, bias: bool) -> _Spec:
    spec: _Spec = {
        f"{name}_list": ((capacity,), torch.int32),
        f"{name}_page": ((capacity,), torch.int32),
        f"{name}_id": ((capacity,), id_dtype),
    }
    if bias:
        spec[f"{name}_bias"] = ((capacity,), torch.float32)
    return spec


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of the sums that a contrast pass leaves: they are rounded once. float16 has too little range for them."""
    return torch.bfloat16 if dtype == torch.bfloat16 else torch.float32


def _pass_spec(
    name: str, flat: Any, stride: int, rows: Any, dtype: torch.dtype, values: bool
) -> _Spec:
    return {
        f"{name}_acc": ((flat if values else 0, stride), sums_dtype(dtype)),
        f"{name}_top": ((flat,), torch.float32),
        f"{name}_lse": ((rows,), torch.float32),
        f"{name}_miss": ((rows,), torch.float32),
    }


def plan_spec(p: Problem, s: Shape) -> _Spec:
    """Pages, lists and the attention's log-sum-exp."""
    spec: _Spec = {
        "history_page": ((s.history_rows,), torch.int32),
        "pv_page": ((s.rows,), torch.int32),
        "flags": ((4, s.rows), torch.int8),
        "ranks": ((4, s.rows), torch.int32),
        "counts": ((4,), torch.int32),
        "attention_lse": ((p.num_heads, s.rows), torch.float32),
    }
    return spec | _list_spec("anchor", s.rows, s.id_dtype, False)


def state_spec(p: Problem, s: Shape, values: bool = True) -> _Spec:
    """Name, shape and type of every tensor that the backward needs, in the order of `saved`; `values` off: of the
    forward pass alone."""
    device, dtype, rows = p.pv.device, p.pv.dtype, s.rows
    columns = s.items if s.merged else rows
    spec = plan_spec(p, s) | {
        "r": ((rows, s.stride), dtype),
        "norm": ((rows,), torch.float32),
        "weight_sum": ((), torch.float32),
    }
    if s.both_lists:
        spec |= _list_spec("reconstructed", rows, s.id_dtype, p.log_q is not None)
        spec |= {"r_anchor": ((rows, s.stride), dtype), "e_anchor": ((rows, s.stride), dtype)}
    if "reconstruct" in s.directions:
        spec |= _list_spec("column", columns, s.id_dtype, p.log_q is not None or s.merged)
        spec |= {"e": ((columns, s.stride), dtype)}
    if s.merged:
        spec |= {"item_count": ((s.items,), torch.int32), "item_rank": ((s.items,), torch.int32)}
    for name in s.directions:
        flat = s.flat(rows, s.forward(values), device)
        spec |= _pass_spec(name, flat, s.stride, rows, dtype, values)
        if s.early and values:
            columns_of = columns if name == "reconstruct" else rows
            spec |= {
                f"{name}_dy": ((columns_of, s.stride), torch.float32),
                f"{name}_factor": ((), torch.float32),
            }
    return spec


def is_empty(p: Problem) -> bool:
    return p.num_pv == 0 or p.num_history == 0 or p.pv_offsets.shape[0] == 1


def empty_tensors(spec: _Spec, device: torch.device) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in spec.items()
    }


def temperature_argument(p: Problem | SequenceProblem | Scoring) -> tuple[Any, bool]:
    """What `score_scale` of the kernels takes."""
    return (
        (1.0 / (p.tau * math.log(2.0)), False) if p.temperature is None else (p.temperature, True)
    )


def needs_running_maximum(
    p: Problem | SequenceProblem | Scoring, dtype: torch.dtype, biased: bool
) -> bool:
    """Whether the running maximum may be needed: tau unknown here or small, or no bound on the scores."""
    return p.temperature is not None or p.tau < SMALLEST_FIXED_TAU or not _bounded(dtype, biased)


def allows_fixed_shift(
    p: Problem | SequenceProblem | Scoring, dtype: torch.dtype, biased: bool
) -> bool:
    """Whether 1/tau may replace the running maximum. Where tau is on the device, both hold and the kernel looks there."""
    return _bounded(dtype, biased) and (p.temperature is not None or p.tau >= SMALLEST_FIXED_TAU)


def _bounded(dtype: torch.dtype, biased: bool) -> bool:
    """Biases are of unknown size; float16 products need every bit of their range."""
    return not biased and dtype != torch.float16


@dataclass
class Rows:
    """One side of a contrast pass: unit rows and what masks and offsets them. `ids` None: the list itself."""

    unit: Tensor
    count: Tensor
    list: Tensor
    page: Tensor
    ids: Tensor
    bias: Tensor | None
    rank: Tensor  # prefix sums that made the list


@dataclass
class Pass:
    """Partial results of one contrast pass."""

    acc: Tensor
    top: Tensor
    total: Tensor
    above: Tensor
    slots: int
    tile: configs.Tile
    in_place: bool = False  # `acc` is where the rows' gradients go, each at its row's place


@dataclass
class Transposed:
    """sum_i g_i p_ij x_i, into `out` [y capacity, STRIDE]; g may be in units of its largest entry (float16)."""

    g: Tensor
    out: Tensor


@dataclass(frozen=True)
class SequenceShape(Shape):
    mask: int = 0


def block_shape(unit: Tensor, kind: str) -> Shape:
    """Of rows against columns alone: no pages, lists or attention."""
    dim, dtype = unit.shape[1], unit.dtype
    chunks = configs.use_chunks(dtype, dim)
    stride = configs.row_stride(dim, chunks)

    def tile(kind: str) -> configs.Tile:
        return configs.contrast_tile(dtype, stride, unit.device, kind)

    return Shape(
        dim=dim,
        stride=stride,
        block_d=configs.block_dim(stride),
        rows=0,
        history_rows=0,
        pages=0,
        items=0,
        merged=False,
        every=False,
        both_lists=False,
        directions=(),
        id_dtype=torch.int64,
        chunked=chunks,
        early=False,
        stream=_divisible(dtype, chunks),
        tile=tile(kind),
        lse=tile(kind if kind == "sequence" else "lse"),
        transposed=tile(kind if kind == "sequence" else "transposed"),
        product=configs.product_tile(dtype),
        attention=configs.attention_tile(dtype, stride, 1, False),
        backward=configs.attention_tile(dtype, stride, 1, True),
        small=configs.rows_tile(stride),
        precision=configs.dot_precision(dtype),
    )


def sequence_shape(p: SequenceProblem) -> SequenceShape:
    shape = vars(block_shape(p.history, "forward" if p.ids is None else "sequence")) | {
        "rows": p.num_history,
        "history_rows": p.num_history,
        "pages": p.history_offsets.shape[0] - 1,
        "items": 0 if p.history_index is None else p.history.shape[0],
        "id_dtype": torch.int64 if p.item_ids is not None else torch.int32,
    }
    return SequenceShape(**shape, mask=3 if p.ids is None else 4)


def sequence_spec(p: SequenceProblem, s: SequenceShape, values: bool = True) -> _Spec:
    spec: _Spec = {
        "history_page": ((s.rows,), torch.int32),
        "flags": ((1, s.rows), torch.int8),
        "ranks": ((1, s.rows), torch.int32),
        "counts": ((1,), torch.int32),
        "c": ((s.rows, s.stride), p.history.dtype),
        "number": ((s.rows,), torch.float32),
        "anchors": ((), torch.float32),
    }
    spec |= _list_spec("row", s.rows, s.id_dtype, False)
    flat = s.flat(s.rows, s.forward(values), p.history.device)
    return spec | _pass_spec("pass", flat, s.stride, s.rows, p.history.dtype, values)


def sequence_is_empty(p: SequenceProblem) -> bool:
    return p.num_history == 0 or p.history_offsets.shape[0] == 1
