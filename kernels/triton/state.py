"""The state that forward and backward share: no launch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .shapes import Shape

if TYPE_CHECKING:
    from typing_extensions import Self


Spec = list[tuple[tuple[Any, ...], torch.dtype]]
# make(shape, dtype=torch.float32) is called for one tensor after the other, in the order of the
# fields: it allocates, notes down or restores.
Make = Callable[..., Any]


@dataclass
class Group:
    """Tensors that belong together, None where nobody needs one; some are groups themselves."""

    def saved(self) -> list[Tensor]:
        """The tensors, as they cross to the backward."""
        found: list[Tensor] = []
        for x in vars(self).values():
            if isinstance(x, Group):
                found += x.saved()
            elif x is not None:
                found.append(x)
        return found


@dataclass
class State(Group):
    """Tensors that the stages of a problem share and its backward needs."""

    @classmethod
    def build(cls, s: Any, make: Make) -> Self:
        """The state of a shape."""
        raise NotImplementedError

    @classmethod
    def empty(cls, s: Shape) -> Self:
        device = s.device

        def new(shape: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls.build(s, new)

    @classmethod
    def spec(cls, s: Shape) -> Spec:
        """Shapes and types of `saved`."""
        found: Spec = []

        def note(shape: tuple[Any, ...], dtype: torch.dtype = torch.float32) -> None:
            found.append((shape, dtype))

        cls.build(s, note)
        return found

    @classmethod
    def restored(cls, s: Shape, saved: Sequence[Tensor]) -> Self:
        left = iter(saved)
        found = cls.build(s, lambda *_: next(left))
        assert next(left, None) is None
        return found


@dataclass
class Listed(Group):
    """Rows that a flag chose, the first of [capacity]; how many is known on the device."""

    list: Tensor
    page: Tensor
    id: Tensor
    bias: Tensor | None

    @classmethod
    def build(cls, s: Shape, make: Make, capacity: Any, biased: bool = False) -> Self:
        return cls(
            list=make((capacity,), torch.int32),
            page=make((capacity,), torch.int32),
            id=make((capacity,), s.id_dtype),
            bias=make((capacity,)) if biased else None,
        )


@dataclass
class Kept(Group):
    """What the forward pass of a direction leaves."""

    acc: Tensor
    top: Tensor
    lse: Tensor
    miss: Tensor
    # Gradient of the columns for an upstream gradient of 1, in units of the factor.
    dy: Tensor | None
    factor: Tensor | None

    @classmethod
    def build(cls, s: Shape, make: Make, candidates: Any) -> Self:
        return cls(
            acc=make((s.value_rows, s.stride), s.sums),
            top=make((s.part_rows,)),
            lse=make((s.rows,)),
            miss=make((s.rows,)),
            dy=make((candidates, s.stride)) if s.early else None,
            factor=make(()) if s.early else None,
        )


@dataclass
class Plan(State):
    """Pages and lists."""

    history_page: Tensor
    pv_page: Tensor
    # Of anchors, reconstructed rows, columns and clicked items that are skipped: plan.py.
    flags: Tensor
    places: Tensor  # of the flagged rows in their list, from 1: inclusive prefix sums
    counts: Tensor
    anchor: Listed
    reconstructed: Listed | None
    column: Listed | None
    item_count: Tensor | None
    item_place: Tensor | None

    @classmethod
    def build(cls, s: Shape, make: Make) -> Self:
        return cls(
            history_page=make((s.history_rows,), torch.int32),
            pv_page=make((s.rows,), torch.int32),
            flags=make((4, s.rows), torch.int8),
            places=make((4, s.rows), torch.int32),
            counts=make((4,), torch.int32),
            anchor=Listed.build(s, make, s.rows),
            reconstructed=Listed.build(s, make, s.rows, s.biased) if s.identify else None,
            column=Listed.build(s, make, s.columns, s.column_biased) if s.reconstruct else None,
            item_count=make((s.items,), torch.int32) if s.merged else None,
            item_place=make((s.items,), torch.int32) if s.merged else None,
        )


@dataclass
class LossState(Plan):
    r: Tensor
    norm: Tensor
    weight_sum: Tensor
    r_anchor: Tensor | None
    e_anchor: Tensor | None
    e: Tensor | None
    reconstruct: Kept | None
    identify: Kept | None

    @classmethod
    def build(cls, s: Shape, make: Make) -> Self:
        return cls(
            **vars(Plan.build(s, make)),
            r=make((s.rows, s.stride), s.dtype),
            norm=make((s.rows,)),
            weight_sum=make(()),
            r_anchor=make((s.rows, s.stride), s.dtype) if s.identify else None,
            e_anchor=make((s.rows, s.stride), s.dtype) if s.identify else None,
            e=make((s.columns, s.stride), s.dtype) if s.reconstruct else None,
            reconstruct=Kept.build(s, make, s.columns) if s.reconstruct else None,
            identify=Kept.build(s, make, s.rows) if s.identify else None,
        )

    def kept(self, direction: str) -> Kept:
        return getattr(self, direction)


@dataclass
class SequenceState(State):
    history_page: Tensor
    flags: Tensor
    places: Tensor
    counts: Tensor
    row: Listed
    c: Tensor
    number: Tensor
    anchors: Tensor
    kept: Kept

    @classmethod
    def build(cls, s: Shape, make: Make) -> Self:
        return cls(
            history_page=make((s.rows,), torch.int32),
            flags=make((1, s.rows), torch.int8),
            places=make((1, s.rows), torch.int32),
            counts=make((1,), torch.int32),
            row=Listed.build(s, make, s.rows),
            c=make((s.rows, s.stride), s.dtype),
            number=make((s.rows,)),
            anchors=make(()),
            kept=Kept.build(s, make, s.rows),
        )
