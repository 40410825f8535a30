"""The shape and the state of attention "candidate": no launch."""

from __future__ import annotations

import functools
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor

from ..shapes import Shape, cdiv, larger, loss_shape
from ..state import Group, Listed, Make, Plan

if TYPE_CHECKING:
    from typing_extensions import Self

    from ....loss.problem import Problem

# A bin is UNITS units of SPAN history rows, its slots.
SPAN = tl.constexpr(4)
UNITS = tl.constexpr(16)
SLOTS = tl.constexpr(64)
# Anchors of a page whose columns are told apart side by side.
SIDE = tl.constexpr(4)
# Rows of candidates that a tile may go past the last one.
PADDING = tl.constexpr(128)


@dataclass(frozen=True)
class CandidateShape(Shape):
    binned: bool = False
    bins: Any = 0
    identified: bool = False  # items of one id are no candidates of each other

    @property
    def per_entry(self) -> int:
        """Anchors of an entry: what is summed is for all of them, but for SIDE columns."""
        return 1 if self.identified else SIDE.value

    @property
    def bin_slots(self) -> Any:
        return self.bins * SLOTS.value

    @property
    def units(self) -> Any:
        return self.bins * UNITS.value

    @property
    def padded_columns(self) -> Any:
        return cdiv(self.columns, PADDING.value) * PADDING.value


def fast_path_reasons(p: Problem, stats: bool = False) -> list[str]:
    """Why no page of this problem is packed (binned.py); empty if those that fit are: products of E
    and C must be all that is needed."""
    own = [name for name in ("query", "key", "value") if getattr(p, name) is not None]
    found = {
        f"num_heads is {p.num_heads}": p.num_heads != 1,
        f"{' and '.join(own)} of the caller's own": bool(own),
        'negatives is "page"': p.negatives == "page",
        # Every cosine is 1 or -1 and the gradients are 0, which sums of E and C miss.
        "one dimension": p.pv.shape[1] == 1 and not p.cosine,
        "return_stats: ranks need every score beside every anchor's": stats,
    }
    return [reason for reason, holds in found.items() if holds]


def candidate_shape(p: Problem) -> CandidateShape:
    s = loss_shape(p)
    # A bin holds at least 33 rows, or 16 entries of a single unit; the last one of each size may
    # hold less. The quarter more is for pages of several entries.
    bins = s.pages * 34 // 1024 + cdiv(s.history_rows, 33) + 6
    bins = torch.sym_min(s.pages * 5 // 4 + 4, bins)
    identified = p.ids is not None and not s.merged
    # With ids each anchor has an entry of its own: for two a page.
    bins = larger(bins * (2 if identified else 1), 1)
    return CandidateShape(
        **vars(s), binned=not fast_path_reasons(p), bins=bins, identified=identified
    )


@functools.cache
def tell_slow_path(*reasons: str) -> None:
    """Once in a process."""
    logging.getLogger(__name__).info(
        'attention="candidate" takes the slower kernels: %s', "; ".join(reasons)
    )


@dataclass
class Bins(Group):
    """What the backward needs of the bins."""

    unit_page: Tensor
    unit_entry: Tensor
    unit_id: Tensor | None
    bin_group: Tensor
    bin_most: Tensor
    page_place: Tensor
    page_entries: Tensor
    bin_count: Tensor
    c: Tensor
    gram: Tensor
    slot_log: Tensor
    slot_length: Tensor
    slot_row: Tensor
    unit_poison: Tensor
    unit_column: Tensor
    e: Tensor
    e_inverse: Tensor

    @classmethod
    def build(cls, s: CandidateShape, make: Make) -> Self:
        return cls(
            unit_page=make((s.units,), torch.int32),
            unit_entry=make((s.units,), torch.int32),
            unit_id=make((s.units,), s.id_dtype) if s.identified else None,
            bin_group=make((s.bins,), torch.int32),
            bin_most=make((s.bins,), torch.int32),
            page_place=make((s.pages,), torch.int32),
            page_entries=make((s.pages,), torch.int32),
            bin_count=make((2,), torch.int32),
            c=make((s.bin_slots, s.block_d), s.dtype),
            # Weights and gradients in products: float16 has too little range for them.
            gram=make((s.bin_slots, SLOTS.value), s.sums),
            slot_log=make((s.bin_slots,)),
            slot_length=make((s.bin_slots,)),
            slot_row=make((s.bin_slots,), torch.int64),
            unit_poison=make((s.units,)),
            unit_column=make((SIDE.value, s.units), torch.int32),
            e=make((s.padded_columns, s.block_d), s.dtype),
            e_inverse=make((s.padded_columns,)),
        )


@dataclass
class CandidateState(Plan):
    column: Listed
    lse: Tensor
    miss: Tensor
    weight_sum: Tensor
    page_list: Tensor  # as pages.py has them
    page_count: Tensor
    positive: Tensor | None
    bins: Bins | None

    @classmethod
    def build(cls, s: Any, make: Make) -> Self:
        """Of a CandidateShape."""
        return cls(
            **vars(Plan.build(s, make)),
            lse=make((s.rows,)),
            miss=make((s.rows,)),
            weight_sum=make(()),
            page_list=make((3, s.pages), torch.int32),
            page_count=make((3,), torch.int32),
            positive=make((s.rows, 2)) if s.binned else None,
            bins=Bins.build(s, make) if s.binned else None,
        )
