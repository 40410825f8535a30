"""The canonical form of one loss evaluation: what every implementation receives.

`arguments.py` turns whatever layout the user has (padded, packed, nested, unique items) into a
`Problem`; an implementation never sees a layout.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .options import WORKSPACE

# Vectors no longer than this count as zero: their cosine is 0 and so is its gradient.
NORM_EPS = 1e-12
LARGEST_DIM = 1024  # of embeddings, in Triton's kernels


class LaunchError(RuntimeError):
    """A kernel of an implementation cannot be compiled, or not be launched, on this device."""


@dataclass
class Problem:
    """B pages with N PV rows and K history rows, pages one after the other.

    Without a table, `pv` [N, D] and `history` [K, D] hold the rows themselves. With a table of
    unique items, `pv` is the table [n, D], `history` is None and `pv_index` [N], `history_index`
    [K] point into it. Rows that a mask excludes, and rows at or past the last offset, are padding:
    whatever they hold has no influence.
    """

    pv: Tensor  # [N, D], or the table [n, D]
    history: Tensor | None  # [K, D], or None with a table
    query: Tensor | None  # [N, D]; None: the PV rows
    key: Tensor | None  # [K, D]; None: the history rows
    value: Tensor | None  # [K, D]; None: the history rows
    pv_index: Tensor | None  # [N] int64
    history_index: Tensor | None  # [K] int64
    pv_offsets: Tensor  # [B + 1] int64
    history_offsets: Tensor  # [B + 1] int64
    pv_mask: Tensor | None  # [N] bool, True = real
    history_mask: Tensor | None  # [K] bool, True = real
    clicked: Tensor | None  # [N] bool; None for `reconstruct`
    item_ids: Tensor | None  # [N] int64; None: pv_index with a table, else all items differ
    log_q: Tensor | None  # [N] float32 or float64
    weights: Tensor | None  # [N] float32 or float64
    temperature: Tensor | None  # 0-d float32 or 64, if it takes a gradient or is on the device
    tau: float  # the temperature when `temperature` is None
    attention_scale: float  # c; with `cosine` 1 / attention_temperature
    num_heads: int = 1
    negatives: str = "batch"
    direction: str = "reconstruct"
    reduction: str = "mean"
    workspace: int = WORKSPACE  # bytes that the chunked path may use for stored probabilities
    # "candidate" or "anchor", by whose query R is made; the mean of the history is either with a
    # scale of 0.
    attention: str = "anchor"
    cosine: bool = False  # "candidate" only: q and k are divided by their lengths, head by head
    # R itself [N, D], with no history and no attention; and the rows that have one [N] bool, None:
    # all.
    reconstructed: Tensor | None = None
    reconstructed_mask: Tensor | None = None

    @property
    def num_pv(self) -> int:
        return self.pv.shape[0] if self.pv_index is None else self.pv_index.shape[0]

    @property
    def num_history(self) -> int:
        if self.history is not None:
            return self.history.shape[0]
        assert self.history_index is not None
        return self.history_index.shape[0]

    @property
    def ids(self) -> Tensor | None:
        """Identity of PV rows [N]: the given ids, else the table index, else None (no two rows are
        the same item)."""
        return self.item_ids if self.item_ids is not None else self.pv_index

    @property
    def embedded(self) -> list[Tensor]:
        """The inputs that are rows of embeddings, those that are there."""
        every = (getattr(self, name) for name in Needs._fields if name != "temperature")
        return [x for x in every if x is not None]

    def has_given(self, rows: Tensor) -> Tensor:
        """Which of these real PV rows have an R, where R is given."""
        if self.reconstructed_mask is None:
            return torch.ones_like(rows, dtype=torch.bool)
        return self.reconstructed_mask[rows]

    def input_of(self, role: str) -> str:
        """The input whose rows are the attention's "query", "key" or "value": the one of that name
        where it is given, else the embeddings."""
        if getattr(self, role) is not None:
            return role
        return "pv" if role == "query" or self.history is None else "history"

    @property
    def options(self) -> dict[str, Any]:
        """What makes it another loss, beside its tensors and the temperature."""
        return {name: getattr(self, name) for name in _OPTIONS}


@dataclass
class SequenceProblem:
    """The click-sequence loss: K history rows of B pages, as in `Problem`."""

    history: Tensor  # [K, D], or the table [n, D]
    history_index: Tensor | None  # [K] int64
    history_offsets: Tensor  # [B + 1] int64
    history_mask: Tensor | None  # [K] bool
    item_ids: Tensor | None  # [K] int64; None: history_index with a table, else all items differ
    temperature: Tensor | None
    tau: float
    reduction: str = "mean"
    workspace: int = WORKSPACE

    @property
    def num_history(self) -> int:
        return self.history.shape[0] if self.history_index is None else self.history_index.shape[0]

    @property
    def ids(self) -> Tensor | None:
        return self.item_ids if self.item_ids is not None else self.history_index

    @property
    def options(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _SEQUENCE_OPTIONS}


# Here, as Dynamo traces no fields() of a class.
_OPTIONS, _SEQUENCE_OPTIONS = (
    tuple(f.name for f in fields(kind) if "Tensor" not in str(f.type) and f.name != "tau")
    for kind in (Problem, SequenceProblem)
)


@dataclass
class Histories:
    """The pages' histories, and how a candidate asks them; rows are in the pages' order, padding in
    between."""

    key: Tensor  # [K, D]
    value: Tensor  # [K, D], the same tensor where they are the same
    offsets: Tensor  # [B + 1] int64
    page: Tensor  # [K] int64, -1 for padding
    scale: float
    cosine: bool
    heads: int


class Needs(NamedTuple):
    """The inputs whose gradients are asked for; those of a table are the `pv`'s."""

    pv: bool = False
    history: bool = False
    query: bool = False
    key: bool = False
    value: bool = False
    temperature: bool = False
    reconstructed: bool = False

    @property
    def names(self) -> list[str]:
        """Of these inputs."""
        return [name for name, need in zip(self._fields, self, strict=True) if need]

    def of(self, p: Problem, role: str) -> bool:
        """Whether that of the attention's "query", "key" or "value" is, as `Problem.input_of`."""
        return bool(getattr(self, p.input_of(role)))


@dataclass
class Gradients:
    """Of a problem's inputs, in their shapes and types; None where nobody asks."""

    pv: Tensor | None = None
    history: Tensor | None = None
    query: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    temperature: Tensor | None = None
    reconstructed: Tensor | None = None

    @classmethod
    def of(cls, needs: Needs, found: Iterable[Tensor]) -> Gradients:
        """From `present` of those that `needs` asks for."""
        remaining = iter(found)
        return cls(*(next(remaining) if need else None for need in needs))

    @classmethod
    def zeros(cls, p: Problem | SequenceProblem, needs: Needs) -> Gradients:
        return cls.of(needs, (torch.zeros_like(getattr(p, name)) for name in needs.names))

    @classmethod
    def of_history(
        cls, p: Problem, needs: Needs, dk: Tensor | None, dv: Tensor | None
    ) -> tuple[Gradients, Tensor | None]:
        """dL/dk and dL/dv [K, D] given to the inputs that k and v are, and what a table's rows of
        history get of them; where k and v are one input, the sum is one of the two."""
        given = (("value", dv), ("key", dk))
        of = {p.input_of(role): d for role, d in given if d is not None}
        found = cls(key=of.get("key"), value=of.get("value"), history=of.get("history"))
        if needs.history and found.history is None and p.history is not None:
            found.history = torch.zeros_like(p.history)  # k and v are others, or nobody asks
        return found, of.get("pv")

    def present(self) -> list[Tensor]:
        """Those that are there, in order."""
        every = (getattr(self, name) for name in Needs._fields)
        return [x for x in every if x is not None]
