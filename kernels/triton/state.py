"""Shapes of the problems, the state that forward and backward share, and what the passes are told:
no launch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from functools import cache, cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from . import tiles
from .common import SMALLEST_FIXED_TAU
from .masks import MASKS

if TYPE_CHECKING:
    from typing_extensions import Self

    from ...loss.problem import Problem, SequenceProblem
    from ...loss.union.blocks import Scoring


# float16 probabilities of many candidates would be subnormal: they are lifted by 2^12 and lowered
# again in float32.
HALF_LIFT = 12.0


# Which candidates an anchor has, as the kernels are told.


def cdiv(a: Any, b: int) -> Any:
    return (a + b - 1) // b


def larger(a: Any, b: Any) -> Any:
    """The larger size; torch's own function, for sizes that are symbols, is slow for numbers."""
    return max(a, b) if type(a) is int and type(b) is int else torch.sym_max(a, b)


# ---- shapes --------------------------------------------------------------------------------------


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

    unbiased = False  # what lists of anchors are

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


# ---- the state -----------------------------------------------------------------------------------

Spec = list[tuple[tuple[Any, ...], torch.dtype]]


class _Declared(NamedTuple):
    shape: tuple[str | int, ...]
    dtype: torch.dtype | str
    when: str
    kind: Any = None
    names: Any = None


def tensor(*shape: str | int, dtype: torch.dtype | str = torch.float32, when: str = "") -> Any:
    """A tensor of a state. Names are attributes of its `Shape`: sizes, a type, and the flag without
    which it is None."""
    return field(metadata={"": _Declared(shape, dtype, when)})


def part(kind: type[State], when: str = "", **names: str) -> Any:
    """A state in a state; `names`: what its own names mean here."""
    return field(metadata={"": _Declared((), "", when, kind, names)})


class _Node(NamedTuple):
    """A field, its names as places in the list of what they stand for."""

    when: int | None
    shape: tuple[int, ...]
    dtype: int
    kind: Any
    nodes: Any


@cache
def _layout(kind: Any) -> tuple[Callable[[Shape], tuple[Any, ...]], tuple[Any, ...], list[_Node]]:
    """What gives the names' values of a shape, then the constants beside them, and the fields;
    worked out once, as each step asks."""
    names: dict[str, int] = {}
    constants: dict[Any, int] = {}

    def place(x: Any, meant: dict[str, str]) -> int:
        if isinstance(x, str):
            return names.setdefault(meant.get(x, x), len(names))
        return ~constants.setdefault(x, len(constants))  # from the end

    def nodes(kind: Any, meant: dict[str, str]) -> list[_Node]:
        return [
            _Node(
                place(d.when, meant) if d.when else None,
                tuple(place(x, meant) for x in d.shape),
                0 if d.kind else place(d.dtype, meant),
                d.kind,
                nodes(d.kind, d.names) if d.kind else None,
            )
            for d in (f.metadata[""] for f in fields(kind))
        ]

    found = nodes(kind, {})
    return attrgetter(*names), tuple(reversed(constants)), found


def _built(kind: Any, nodes: list[_Node], values: tuple[Any, ...], make: Callable[..., Any]) -> Any:
    found: list[Any] = []
    for when, shape, dtype, inner, its in nodes:
        if when is not None and not values[when]:
            found.append(None)
        elif inner is None:
            found.append(make(values, shape, dtype))
        else:
            found.append(_built(inner, its, values, make))
    return kind(*found)


@dataclass
class State:
    """Tensors that the stages of a problem share and its backward needs, each declared with its
    shape and type."""

    @classmethod
    def build(cls, s: Shape, make: Callable[..., Any]) -> Self:
        """`make(values, shape, dtype)` gives each tensor, in the order of `saved`; shape and type
        are places among the values."""
        values, constants, nodes = _layout(cast(Any, cls))
        return _built(cls, nodes, (*values(s), *constants), make)

    @classmethod
    def empty(cls, s: Shape) -> Self:
        device = s.device

        def new(values: Any, shape: Any, dtype: int) -> Tensor:
            return torch.empty([values[i] for i in shape], dtype=values[dtype], device=device)

        return cls.build(s, new)

    @classmethod
    def spec(cls, s: Shape) -> Spec:
        """Shapes and types of `saved`."""
        found: Spec = []

        def note(values: Any, shape: Any, dtype: int) -> None:
            found.append((tuple(values[i] for i in shape), values[dtype]))

        cls.build(s, note)
        return found

    @classmethod
    def restored(cls, s: Shape, saved: Sequence[Tensor]) -> Self:
        left = iter(saved)
        found = cls.build(s, lambda *_: next(left))
        assert next(left, None) is None
        return found

    def saved(self) -> list[Tensor]:
        """The tensors, as they cross to the backward."""
        found: list[Tensor] = []
        for x in vars(self).values():
            if isinstance(x, State):
                found += x.saved()
            elif x is not None:
                found.append(x)
        return found


@dataclass
class Listed(State):
    """Rows that a flag chose, the first of [capacity]; how many is known on the device."""

    list: Tensor = tensor("capacity", dtype=torch.int32)
    page: Tensor = tensor("capacity", dtype=torch.int32)
    id: Tensor = tensor("capacity", dtype="id_dtype")
    bias: Tensor | None = tensor("capacity", when="bias")


@dataclass
class Kept(State):
    """What the forward pass of a direction leaves."""

    acc: Tensor = tensor("value_rows", "stride", dtype="sums")
    top: Tensor = tensor("part_rows")
    lse: Tensor = tensor("rows")
    miss: Tensor = tensor("rows")
    # Gradient of the columns for an upstream gradient of 1, in units of the factor.
    dy: Tensor | None = tensor("candidates", "stride", when="early")
    factor: Tensor | None = tensor(when="early")


@dataclass
class Plan(State):
    """Pages and lists."""

    history_page: Tensor = tensor("history_rows", dtype=torch.int32)
    pv_page: Tensor = tensor("rows", dtype=torch.int32)
    # Of anchors, reconstructed rows, columns and clicked items that are skipped: plan.py.
    flags: Tensor = tensor(4, "rows", dtype=torch.int8)
    ranks: Tensor = tensor(4, "rows", dtype=torch.int32)
    counts: Tensor = tensor(4, dtype=torch.int32)
    anchor: Listed = part(Listed, capacity="rows", bias="unbiased")
    reconstructed: Listed | None = part(Listed, "identify", capacity="rows", bias="biased")
    column: Listed | None = part(Listed, "reconstruct", capacity="columns", bias="column_biased")
    item_count: Tensor | None = tensor("items", dtype=torch.int32, when="merged")
    item_rank: Tensor | None = tensor("items", dtype=torch.int32, when="merged")


@dataclass
class LossState(Plan):
    r: Tensor = tensor("rows", "stride", dtype="dtype")
    norm: Tensor = tensor("rows")
    weight_sum: Tensor = tensor()
    r_anchor: Tensor | None = tensor("rows", "stride", dtype="dtype", when="identify")
    e_anchor: Tensor | None = tensor("rows", "stride", dtype="dtype", when="identify")
    e: Tensor | None = tensor("columns", "stride", dtype="dtype", when="reconstruct")
    reconstruct: Kept | None = part(Kept, "reconstruct", candidates="columns")
    identify: Kept | None = part(Kept, "identify", candidates="rows")

    def kept(self, direction: str) -> Kept:
        return getattr(self, direction)


@dataclass
class SequenceState(State):
    history_page: Tensor = tensor("rows", dtype=torch.int32)
    flags: Tensor = tensor(1, "rows", dtype=torch.int8)
    ranks: Tensor = tensor(1, "rows", dtype=torch.int32)
    counts: Tensor = tensor(1, dtype=torch.int32)
    row: Listed = part(Listed, capacity="rows", bias="unbiased")
    c: Tensor = tensor("rows", "stride", dtype="dtype")
    number: Tensor = tensor("rows")
    anchors: Tensor = tensor()
    kept: Kept = part(Kept, candidates="rows")


# ---- passes of the contrast ----------------------------------------------------------------------


@dataclass
class PassSide:
    """One side of a contrast pass: unit rows and what masks and offsets them. Without ids, `ids` is
    the list."""

    unit: Tensor
    count: Tensor
    list: Tensor
    page: Tensor
    ids: Tensor
    bias: Tensor | None
    rank: Tensor  # prefix sums that made the list
    merged: bool = False  # the bias is log m of m equal candidates


@dataclass
class Pass:
    """Partial results of one contrast pass."""

    acc: Tensor
    top: Tensor | None
    total: Tensor | None
    above: Tensor | None
    slots: int
    tile: tiles.Tile
    in_place: bool = False  # `acc` is where the rows' gradients go, each at its row's place


@dataclass
class Results:
    """Where a forward pass leaves what it finds out of each row, beside the sums."""

    lse: Tensor  # [capacity] in powers of two
    miss: Tensor  # [capacity]
    loss: Tensor  # [capacity]
    positive: Tensor | None = None  # [capacity, 2]; None: positives are among the candidates
    log_q: Tensor | None = None  # [N]
    items: Sequence[Tensor] = ()  # [N] log-sum-exp, similarity and rank, with `stats`
    stats: bool = False


@dataclass
class Transposed:
    """sum_i g_i p_ij x_i, into `out` [y capacity, STRIDE]; g may be in units of its largest entry
    (float16)."""

    g: Tensor
    out: Tensor


@dataclass(frozen=True)
class Scores:
    """Which pairs the passes score, and how."""

    mask: int
    tau: Any  # what `score_scale` of the kernels takes
    tau_is_tensor: bool
    page_offsets: Tensor
    workspace: int  # bytes
    # Whether the running maximum may be needed: tau unknown here or small, or no bound on the
    # scores; and whether 1/tau may replace it. Where tau is on the device, both hold and the kernel
    # looks there.
    online: bool
    fixed_shift: bool


def temperature(p: Problem | SequenceProblem | Scoring) -> dict[str, Any]:
    """What `score_scale` of the kernels takes."""
    known = p.temperature is None
    tau = 1.0 / (p.tau * math.log(2.0)) if known else p.temperature
    return {"tau": tau, "TAU_IS_TENSOR": not known}


def scores(
    p: Problem | SequenceProblem | Scoring,
    mask: int,
    page_offsets: Tensor,
    dtype: torch.dtype,
    biased: bool,
) -> Scores:
    tau, tau_is_tensor = temperature(p).values()
    # Biases are of unknown size; float16 products need every bit of their range.
    bounded = not biased and dtype != torch.float16
    large = p.tau >= SMALLEST_FIXED_TAU
    return Scores(
        mask,
        tau,
        tau_is_tensor,
        page_offsets,
        p.workspace,
        online=tau_is_tensor or not large or not bounded,
        fixed_shift=bounded and (tau_is_tensor or large),
    )
