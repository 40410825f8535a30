"""From what users hold (padded, packed, nested, a table of items) to rows, offsets and masks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..surroundings import watches_values

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8)
# Characters of a value that a message shows.
_SHOWN = 60


def shown(x: Any) -> str:
    """A value as a message shows it: no data of a list, an array or a tensor, no long text."""
    if isinstance(x, int) and not isinstance(x, bool) and x.bit_length() > 4 * _SHOWN:
        return f"an int of {x.bit_length()} bits"
    if x is None or isinstance(x, (bool, int, float, str, bytes)):
        text = repr(x[: _SHOWN + 1] if isinstance(x, (str, bytes)) else x)
        return text if len(text) <= _SHOWN + 2 else f"{text[:_SHOWN]}..."
    return describe(x)


def describe(x: Any) -> str:
    """What came, for an error message: its kind, and its size or a value that is short."""
    kind = type(x).__name__
    if isinstance(x, Tensor):
        shape = "nested" if x.is_nested else f"shape {list(x.shape)}"
        return f"{shape}, {x.dtype}, on {x.device}"
    if x is None:
        return "None"
    if isinstance(x, (bool, int, float, str, bytes)):
        return f"{kind} {shown(x)}"
    if isinstance(getattr(x, "shape", None), tuple):
        return f"{kind} of shape {list(x.shape)}"
    try:
        return f"{kind} of length {len(x)}"
    except TypeError:
        return kind


_LAYOUTS = (torch.strided, torch.jagged)


def require_tensor(name: str, x: Any) -> Tensor:
    """TypeError unless `x` is a tensor that holds its values here, as they are."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {describe(x)}")
    if type(x) is not Tensor:
        _require_plain(name, x)
    # A NestedTensor of another layout has an error of its own.
    if x.layout not in _LAYOUTS or x.is_quantized:
        kind = "a quantized one" if x.is_quantized else f"layout {x.layout}"
        raise TypeError(f"{name}: expected a dense torch.Tensor, got {kind}")
    return x


def _require_plain(name: str, x: Tensor) -> None:
    kind = type(x)
    if kind.__module__.startswith("torch.distributed.tensor"):
        raise TypeError(
            f"{name}: expected a torch.Tensor of this process, got a {kind.__name__}: give its "
            "to_local() or full_tensor()"
        )
    if kind.__module__.startswith("torch.masked"):
        raise TypeError(
            f"{name}: expected a torch.Tensor and a mask of its own, got a MaskedTensor"
        )


def require_flag(name: str, x: Any) -> None:
    if not isinstance(x, (bool, int)) and type(x).__name__ not in ("bool_", "bool"):
        raise TypeError(f"{name}: expected True or False, got {describe(x)}")


def require_size(name: str, x: Any) -> None:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"{name}: expected an int, got {describe(x)}")
    if x < 1:
        raise ValueError(f"{name}: expected at least 1, got {shown(x)}")
    if x >= 1 << 31:
        raise ValueError(f"{name}: expected less than 2**31, got {shown(x)}")


@dataclass
class Given:
    """One side of the problem, PV or history, as the user gives it."""

    name: str  # "pv" or "history"
    x: Any  # embeddings, or indices into a table
    mask: Any = None
    offsets: Any = None


@dataclass
class Side:
    """The layout of one side of the problem, PV or history: how a tensor in it becomes rows."""

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
        """A tensor in this layout as [rows, *per_row]; ValueError where it is not in it."""
        if self.kind == "nested":
            assert self.like is not None
            if not x.is_nested:
                raise ValueError(
                    f"{name}: expected a jagged NestedTensor, as {self.name} is one, "
                    f"got {describe(x)}"
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
            like = self.like
            # Its offsets themselves, and its longest length: what comes goes with it in sums and
            # products.
            known = {
                f"{which}_seqlen": getattr(like, f"_maybe_{which}_seqlen", None)
                for which in ("min", "max")
            }
            return torch.nested.nested_tensor_from_jagged(
                x, like.offsets(), like.lengths(), **known
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

    `layout`: whose real rows count, None: all; another integer there (a label of -100, say) is an
    error.
    """
    x = require_tensor(name, x)
    if x.dtype == torch.bool:
        return x
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected a bool or integer (0/1) tensor, got {x.dtype}")
    if watches_values(x, validate):
        bad = (x != 0) & (x != 1)
        live = None if layout is None else layout.live()
        if live is not None:
            bad = bad & live
        if bool(bad.any()):
            raise ValueError(f"{name}: expected bool or integers 0 and 1, got {int(x[bad][0])}")
    return x != 0


def as_index(name: str, x: Tensor) -> Tensor:
    if x.dtype not in INTEGERS:
        raise TypeError(f"{name}: expected an integer tensor, got {x.dtype}")
    return x.to(torch.int64)


def side(given: Given, features: int, device: torch.device, validate: bool) -> Side:
    """The layout of a side, whose tensor has `features` (0 or 1) dimensions besides."""
    if given.x.is_nested:
        layout = _nested(given, features, device)
    else:
        make = _padded if given.offsets is None else _packed
        layout = make(given, features, device, validate)
    layout.watch = watches_values(layout.offsets, validate)
    return layout


def _nested(given: Given, features: int, device: torch.device) -> Side:
    name, x = given.name, given.x
    if given.mask is not None or given.offsets is not None:
        raise ValueError(
            f"{name}: a NestedTensor brings its own offsets; "
            f"expected no {name}_mask and no {name}_offsets"
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
            f"{name}: expected padded shape {what}, or packed rows with {name}_offsets, "
            f"got {list(x.shape)}"
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
    if offsets.device.type != "cpu" and not watches_values(offsets, validate):
        # Nobody waits for a GPU's values: whatever they are, nothing outside is read. On a CPU the
        # operator looks.
        return offsets.clamp(0, rows)
    if watches_values(offsets, validate):
        check_offsets(name, offsets, rows)
    return offsets.contiguous()


def check_offsets(name: str, offsets: Tensor, rows: int) -> None:
    if int(offsets[0]) != 0:
        raise ValueError(f"{name}: expected to start at 0, got {int(offsets[0])}")
    steps = offsets.diff()
    if bool((steps < 0).any()):
        page = int((steps < 0).nonzero()[0])
        raise ValueError(
            f"{name}: expected non-decreasing values, got {int(offsets[page])} before "
            f"{int(offsets[page + 1])}"
        )
    if int(offsets[-1]) > rows:
        raise ValueError(
            f"{name}: expected to end at {rows} rows or before, got {int(offsets[-1])}"
        )


def check_range(name: str, index: Tensor, size: int) -> None:
    if not index.numel():
        return
    low, high = (int(x) for x in index.aminmax())
    if low < 0 or high >= size:
        raise ValueError(
            f"{name}: expected indices from 0 to {size - 1}, got {low if low < 0 else high}"
        )


def check_index(name: str, index: Tensor, live: Tensor | None, size: int, validate: bool) -> Tensor:
    """Indices into the table, those of padding inside of it, too. Out of range is an error where
    values may be looked at; on a GPU they are clamped, and on a CPU the operator looks at what is
    traced."""
    if index.device.type != "cpu" and not watches_values(index, validate):
        if not size and index.numel():
            raise ValueError(f"embeddings: expected a row for the indices in {name}, got none")
        return index.clamp(0, max(size - 1, 0))
    if live is not None:
        index = torch.where(live, index, 0)
    if watches_values(index, validate) and (size or live is None or bool(live.any())):
        check_range(name, index, size)
    return index
