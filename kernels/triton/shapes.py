"""Shapes of the problems: what the launches of one have in common, and the sizes of its state."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import tiles
from .masks import MASKS

if TYPE_CHECKING:
    from ...loss.problem import Problem, SequenceProblem


def cdiv(a: Any, b: int) -> Any:
    return (a + b - 1) // b


def larger(a: Any, b: Any) -> Any:
    """The larger size; torch's own function, for sizes that are symbols, is slow for numbers."""
    return max(a, b) if type(a) is int and type(b) is int else torch.sym_max(a, b)


@dataclass(frozen=True)
class Shape:
    """What the launches of a problem have in common, and the sizes of its state."""

    device: torch.device
    dtype: torch.dtype  # of the embeddings
    dim: int
    stride: int
    block_d: int
    chunked: bool  # P of a chunk of rows is stored, instead of sums over D in registers
    stream: bool  # a tile may be divided between programs anywhere (`schedule` in common.py)
    tile: tiles.Tile
    transposed: tiles.Tile
    product: tiles.ProductTile
    attention: tiles.Tile
    backward: tiles.Tile
    small: tiles.Tile
    precision: str
    rows: int = 0  # N
    history_rows: int = 0  # K
    pages: int = 0
    items: int = 0  # n of the table, 0 without one
    heads: int = 1
    id_dtype: torch.dtype = torch.int64
    directions: tuple[str, ...] = ()
    merged: bool = False  # equal candidates are one column
    biased: bool = False  # log_q is given
    values: bool = True  # somebody wants gradients: the forward pass sums values too
    # P is used at once for the gradient of the columns: the weights of the rows are known.
    early: bool = False

    @property
    def reconstruct(self) -> bool:
        return "reconstruct" in self.directions

    @property
    def identify(self) -> bool:
        """Then R of every item with a history is needed: anchors and reconstructed rows are
        different lists."""
        return "identify" in self.directions

    @property
    def columns(self) -> int:
        return self.items if self.merged else self.rows

    @property
    def column_biased(self) -> bool:
        return self.biased or self.merged

    @property
    def sums(self) -> torch.dtype:
        """Of the sums that a contrast pass leaves: they are rounded once. float16 has too little
        range for them."""
        return torch.bfloat16 if self.dtype == torch.bfloat16 else torch.float32

    @cached_property
    def part_rows(self) -> Any:
        """Rows of the parts that a forward pass leaves."""
        return self.flat(self.rows, self.tile)

    @property
    def value_rows(self) -> Any:
        return self.part_rows if self.values else 0

    def programs(self, tile: tiles.Tile) -> int:
        """Programs of a contrast pass that are at work at the same time."""
        return 1 if self.chunked else tiles.programs(self.device) * tile.per_processor

    def slots(self, capacity: Any, tile: tiles.Tile) -> Any:
        """Programs of a contrast pass over at most `capacity` rows, and so the tiles of partial
        sums it writes."""
        if self.chunked:
            return 1
        return larger(cdiv(capacity, tile.block_m), self.programs(tile))

    def flat(self, capacity: Any, tile: tiles.Tile) -> Any:
        """Rows of what such a pass writes."""
        return capacity if self.chunked else self.slots(capacity, tile) * tile.block_m


@dataclass(frozen=True)
class SequenceShape(Shape):
    mask: int = 0


def _tiles(
    unit: Tensor, sequence: bool = False, values: bool = True, heads: int = 1
) -> dict[str, Any]:
    """What a shape takes from its rows; `sequence`: the masks of the click sequence by id."""
    dim, dtype = unit.shape[1], unit.dtype
    chunks = tiles.use_chunks(dtype, dim)
    stride = tiles.row_stride(dim, chunks)

    def tile(kind: str) -> tiles.Tile:
        kind = "sequence" if sequence else kind
        return tiles.contrast_tile(dtype, stride, unit.device, kind)

    return {
        "device": unit.device,
        "dtype": dtype,
        "dim": dim,
        "stride": stride,
        "block_d": tiles.block_dim(stride),
        "chunked": chunks,
        # float32 tiles have no registers left for a division anywhere.
        "stream": not chunks and (dtype != torch.float32 or tiles.interpreted()),
        "tile": tile("forward" if values else "lse"),
        "transposed": tile("transposed"),
        "product": tiles.product_tile(dtype),
        "attention": tiles.attention_tile(dtype, stride, heads, False),
        "backward": tiles.attention_tile(dtype, stride, heads, True),
        "small": tiles.rows_tile(stride),
        "precision": tiles.dot_precision(dtype),
        "heads": heads,
        "values": values,
    }


def block_shape(unit: Tensor, sequence: bool = False) -> Shape:
    """Of rows against columns alone: no pages, lists or attention."""
    return Shape(**_tiles(unit, sequence))


def loss_shape(p: Problem, values: bool = True, contrast: bool = True) -> Shape:
    """`values` off: of a forward pass whose gradient nobody wants; `contrast` off: of the
    reconstructions alone."""
    found = _tiles(p.pv, values=values, heads=p.num_heads)
    found["stream"] &= p.negatives != "page"
    table = p.pv_index is not None
    directions = ("reconstruct", "identify") if p.direction == "both" else (p.direction,)
    return Shape(
        **found,
        rows=p.num_pv,
        history_rows=p.num_history,
        pages=p.pv_offsets.shape[0] - 1,
        items=p.pv.shape[0] if table else 0,
        id_dtype=torch.int64 if p.item_ids is not None else torch.int32,
        directions=directions if contrast else (),
        # Columns can be merged where every page sees the same candidates, known by the index alone;
        # a table much larger than the batch is not worth a column list of its own.
        merged=contrast
        and table
        and p.item_ids is None
        and p.log_q is None
        and p.negatives == "batch"
        and p.direction != "identify"
        and (p.attention != "candidate" or p.query is None)  # else each occurrence has its own
        and p.pv.shape[0] <= p.num_pv,
        biased=p.log_q is not None,
        early=found["chunked"] and p.reduction != "none" and values,
    )


def sequence_shape(p: SequenceProblem, values: bool = True) -> SequenceShape:
    return SequenceShape(
        **_tiles(p.history, p.ids is not None, values),
        rows=p.num_history,
        history_rows=p.num_history,
        pages=p.history_offsets.shape[0] - 1,
        items=0 if p.history_index is None else p.history.shape[0],
        id_dtype=torch.int64 if p.item_ids is not None else torch.int32,
        mask=MASKS["sequence" if p.ids is None else "sequence ids"],
    )


def is_empty(p: Problem) -> bool:
    nothing = p.reconstructed is None and p.num_history == 0
    return p.num_pv == 0 or nothing or p.pv_offsets.shape[0] == 1


def sequence_is_empty(p: SequenceProblem) -> bool:
    return p.num_history == 0 or p.history_offsets.shape[0] == 1
