"""From what users hold (padded, packed, nested, a table of unique items) to rows, offsets and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)


def describe(x: Any) -> str:
    """What came, for an error message."""
    if isinstance(x, Tensor):
        kind = "nested" if x.is_nested else f"shape {list(x.shape)}"
        return f"{kind}, {x.dtype}, on {x.device}"
    return f"{type(x).__name__} {x!r}"


def require_tensor(name: str, x: Any) -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {describe(x)}")
    return x


def watches_values() -> bool:
    """Whether tensor values may be looked at: not while torch.compile or torch.export traces, nor under vmap."""
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return False
    if not torch._C._are_functorch_transforms_active():
        return True
    vmap = torch._C._functorch.TransformType.Vmap
    return all(t.key() != vmap for t in torch._C._functorch.get_interpreter_stack() or ())


@dataclass
class Given:
    """One side of the problem, PV or history, as the user gives it."""

    name: str  # "pv" or "history"
    x: Any  # embeddings, or indices into a table
    mask: Any = None
    offsets: Any = None


@dataclass
class Side:
    """The layout of one side of the problem, PV or history: how a tensor in that layout becomes rows."""

    name: str  # "pv" or "history"
    kind: str  # "padded", "packed" or "nested"
    rows: int
    offsets: Tensor  # [B + 1] int64
    mask: Tensor | None  # [rows] bool
    shape: tuple[int, ...]  # of a tensor with one value per row: [B, L] or [rows]
    like: Tensor | None = None  # the nested tensor itself
    watch: bool = False  # whether values may be looked at, for checks

    def live(self) -> Tensor | None:
        """Which rows are real [rows] bool; None: all."""
        if self.kind == "padded":
            return self.mask
        inside = torch.arange(self.rows, device=self.offsets.device) < self.offsets[-1]
        return inside if self.mask is None else inside & self.mask

    def flatten(self, name: str, x: Tensor, per_row: tuple[int, ...]) -> Tensor:
        """A tensor in this layout as [rows, *per_row]; raises ValueError where it is not in this layout."""
        if self.kind == "nested":
            assert self.like is not None
            if not x.is_nested:
                raise ValueError(
                    f"{name}: expected a jagged NestedTensor, as {self.name} is one, got {describe(x)}"
                )
            values = jagged_values(name, x)
            for what in ("offsets", "lengths"):
                if not self._same(getattr(x, what)(), getattr(self.like, what)()):
                    raise ValueError(
                        f"{name}: expected the {what} of {self.name}, got different ones"
                    )
            x = values
        elif x.is_nested:
            raise ValueError(
                f"{name}: expected a {self.kind} tensor, as {self.name} is one, got {describe(x)}"
            )
        expected = (self.rows, *per_row) if self.kind == "nested" else (*self.shape, *per_row)
        if tuple(x.shape) != expected:
            raise ValueError(f"{name}: expected shape {list(expected)}, got {list(x.shape)}")
        return x.reshape(self.rows, *per_row).contiguous()

    def _same(self, a: Tensor | None, b: Tensor | None) -> bool:
        if a is None or b is None:
            return a is b
        return a is b or not self.watch or torch.equal(a, b)

    def restore(self, x: Tensor) -> Tensor:
        """[rows, ...] in the layout of the input."""
        if self.kind == "nested":
            assert self.like is not None
            return torch.nested.nested_tensor_from_jagged(
                x, self.like.offsets(), self.like.lengths()
            )
        return x.reshape(*self.shape, *x.shape[1:])


def jagged_values(name: str, x: Tensor) -> Tensor:
    if x.layout != torch.jagged:
        raise ValueError(
            f"{name}: expected a NestedTensor of layout torch.jagged, got layout {x.layout}"
        )
    if getattr(x, "_ragged_idx", 1) != 1:
        raise ValueError(
            f"{name}: expected the ragged dimension to be dimension 1, got {x._ragged_idx}"
        )
    return x.values()


def as_bool(name: str, x: Any, layout: Side | None, validate: bool) -> Tensor:
    """A bool tensor; integers 0 and 1 are accepted, floats are not (a probability is no click).

    `layout`: whose real rows count, None: all; another integer there (a label of -100, say) is an error.
    """
    x = require_tensor(name, x)
    if x.dtype == torch.bool:
        return x
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected a bool or integer (0/1) tensor, got {x.dtype}")
    if watches_values() and (validate or x.device.type == "cpu"):
        bad = (x != 0) & (x != 1)
        live = None if layout is None else layout.live()
        if live is not None:
            bad = bad & live
        if bool(bad.any()):
            raise ValueError(f"{name}: expected bool or integers 0 and 1, got {int(x[bad][0])}")
    return x != 0


def as_index(name: str, x: Tensor) -> Tensor:
    if x.dtype not in _INTEGERS:
        raise TypeError(f"{name}: expected an integer tensor, got {x.dtype}")
    return x.to(torch.int64)


def side(given: Given, features: int, device: torch.device, validate: bool) -> Side:
    """The layout of a side, whose tensor has `features` (0 or 1) dimensions beside those of the layout."""
    if given.x.is_nested:
        layout = _nested(given, features, device)
    else:
        make = _padded if given.offsets is None else _packed
        layout = make(given, features, device, validate)
    layout.watch = watches_values() and (validate or device.type == "cpu")
    return layout


def _nested(given: Given, features: int, device: torch.device) -> Side:
    name, x = given.name, given.x
    if given.mask is not None or given.offsets is not None:
        raise ValueError(
            f"{name}: a NestedTensor brings its own offsets; expected no {name}_mask and no {name}_offsets"
        )
    rows = jagged_values(name, x).shape[0]
    starts = x.offsets().to(device=device, dtype=torch.int64)
    if x.dim() != 2 + features:
        raise ValueError(f"{name}: expected {2 + features} dimensions, got {x.dim()}")
    lengths = x.lengths()
    holes = None
    if lengths is not None:
        # With holes, a page ends before the next one begins: what lies between is padding.
        row = torch.arange(rows, device=device)
        last = max(starts.shape[0] - 2, 0)
        page = (torch.searchsorted(starts, row, right=True) - 1).clamp(0, last)
        holes = row < starts[page] + lengths.to(device)[page] if starts.shape[0] > 1 else row < 0
    return Side(name, "nested", rows, starts, holes, (rows,), like=x)


def _packed(given: Given, features: int, device: torch.device, validate: bool) -> Side:
    name, x = given.name, given.x
    if given.mask is not None:
        raise ValueError(
            f"{name}: expected {name}_mask (padded) or {name}_offsets (packed), got both"
        )
    if x.dim() != 1 + features:
        what = "[rows, D]" if features else "[rows]"
        raise ValueError(f"{name}: with {name}_offsets expected shape {what}, got {list(x.shape)}")
    rows = x.shape[0]
    offsets = _offsets(f"{name}_offsets", given.offsets, rows, device, validate)
    return Side(name, "packed", rows, offsets, None, (rows,))


def _padded(given: Given, features: int, device: torch.device, validate: bool) -> Side:
    name, x, mask = given.name, given.x, given.mask
    if x.dim() != 2 + features:
        what = f"[pages, length{', D' if features else ''}]"
        raise ValueError(
            f"{name}: expected padded shape {what}, or packed rows with {name}_offsets, got {list(x.shape)}"
        )
    pages, length = x.shape[0], x.shape[1]
    if mask is not None:
        mask = as_bool(f"{name}_mask", mask, None, validate)
        if tuple(mask.shape) != (pages, length):
            raise ValueError(
                f"{name}_mask: expected shape {[pages, length]}, got {list(mask.shape)}"
            )
        if mask.device != device:
            raise ValueError(f"{name}_mask: expected a tensor on {device}, got {mask.device}")
        mask = mask.reshape(-1).contiguous()
    if length:
        starts = torch.arange(0, pages * length + 1, length, device=device)
    else:
        starts = torch.zeros(pages + 1, dtype=torch.int64, device=device)
    return Side(name, "padded", pages * length, starts, mask, (pages, length))


def _offsets(name: str, offsets: Any, rows: int, device: torch.device, validate: bool) -> Tensor:
    offsets = as_index(name, require_tensor(name, offsets))
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{name}: expected shape [pages + 1], got {list(offsets.shape)}")
    if offsets.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {offsets.device}")
    if watches_values() and (validate or offsets.device.type == "cpu"):
        if int(offsets[0]) != 0:
            raise ValueError(f"{name}: expected to start at 0, got {int(offsets[0])}")
        steps = offsets.diff()
        if bool((steps < 0).any()):
            page = int((steps < 0).nonzero()[0])
            raise ValueError(
                f"{name}: expected non-decreasing values, got {int(offsets[page])} before {int(offsets[page + 1])}"
            )
        if int(offsets[-1]) > rows:
            raise ValueError(
                f"{name}: expected to end at {rows} rows or before, got {int(offsets[-1])}"
            )
    return offsets.contiguous()


def check_index(name: str, index: Tensor, live: Tensor | None, size: int, validate: bool) -> Tensor:
    """Indices into the table, padding pointed at row 0; out of range is an error where values may be looked at."""
    if live is not None:
        index = torch.where(live, index, 0)
    if watches_values() and (validate or index.device.type == "cpu") and index.numel():
        low, high = int(index.min()), int(index.max())
        if low < 0 or high >= size:
            raise ValueError(
                f"{name}: expected indices from 0 to {size - 1}, got {low if low < 0 else high}"
            )
    return index
