"""Small problems that between them run every loss, direction and kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import courier_fast

from ..testing.batches import Batch, Options, Shape, call, graphed, make_batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEMORY = 5  # rows of earlier batches


@dataclass(frozen=True)
class Case:
    """One problem: the reconstruction loss, or what `what` names.

    Args:
        what: "loss", "graph" (that by a CUDA graph), "memory" (with candidates of earlier batches),
            "given" (an R of the caller's), "reconstruct" (R alone) or "sequence".
        gradients: whether they are asked for.
        tf32: float32 products may round their inputs.
        more: arguments of the function.
    """

    name: str
    dtype: str
    shape: Shape
    options: Options = field(default_factory=Options)
    what: str = "loss"
    gradients: bool = True
    tf32: bool = False
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return f"{self.name}: {self.dtype}{' (tf32)' if self.tf32 else ''}, {self.size}"

    @property
    def size(self) -> str:
        s = self.shape
        return f"{s.pages} pages of {s.items}, history to {s.longest_history}, D = {s.dim}"

    @property
    def is_small(self) -> bool:
        """Errors of a few numbers are large or small by luck: one problem says little."""
        return self.shape.pages * self.shape.items < 32

    def batch(self, device: torch.device, seed: int) -> Batch:
        return make_batch(self.shape, self.options, DTYPES[self.dtype], device, seed)

    def function(self, impl: str) -> Callable[[Batch], Tensor]:
        """The output of a batch."""
        return _FUNCTIONS[self.what](self, impl)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        """Those whose gradients there are."""
        names = {"sequence": ("history",), "given": ("pv",)}.get(self.what, tuple(batch.inputs))
        return {name: x for name, x in batch.inputs.items() if name in names}


def _loss(case: Case, impl: str) -> Callable[[Batch], Tensor]:
    return lambda b: call(b, impl, **case.more)


def _graph(case: Case, impl: str) -> Callable[[Batch], Tensor]:
    if impl == "reference":
        return _loss(case, impl)

    made: list[Callable[[Batch], Tensor]] = []  # captured once, replayed afterwards

    def loss(b: Batch) -> Tensor:
        if not made:
            found = graphed(b)
            if isinstance(found, str):
                raise ValueError(found)
            made.append(found)
        return made[0](b)

    return loss


def _memory(case: Case, impl: str) -> Callable[[Batch], Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(MEMORY, case.shape.dim, generator=generator).to(DTYPES[case.dtype])
    return lambda b: call(b, impl, memory=rows.to(b.pv.device, b.pv.dtype))


def _sequence(case: Case, impl: str) -> Callable[[Batch], Tensor]:
    return lambda b: courier_fast.click_sequence_loss(
        b.history, history_offsets=b.history_offsets, temperature=b.options.tau, impl=impl
    )


def _reconstruct(case: Case, impl: str) -> Callable[[Batch], Tensor]:
    return lambda b: courier_fast.reconstruct(
        b.pv, b.history, pv_offsets=b.pv_offsets, history_offsets=b.history_offsets, impl=impl
    )


def _given(case: Case, impl: str) -> Callable[[Batch], Tensor]:
    return lambda b: courier_fast.reconstruction_loss(
        b.pv,
        None,
        b.clicked,
        pv_offsets=b.pv_offsets,
        reconstructed=b.pv.flip(0),
        direction=b.options.direction,
        item_ids=b.item_ids,
        impl=impl,
    )


_FUNCTIONS = {
    "loss": _loss,
    "graph": _graph,
    "memory": _memory,
    "sequence": _sequence,
    "reconstruct": _reconstruct,
    "given": _given,
}


# ---- which ---------------------------------------------------------------------------------------

_COURIER = Options(courier=True)
_BOTH = Options(direction="both", ids=True)
_CANDIDATE = Options(attention="candidate")
CANDIDATES = {
    "candidate": _CANDIDATE,
    "candidate by cosines": replace(_CANDIDATE, cosine=True),
    "candidate, unique items": replace(_CANDIDATE, unique_items=8),
}


def others(dtype: str, shape: Shape) -> list[Case]:
    """All but the reconstruction loss's options."""
    few = replace(shape, pages=min(shape.pages, 60))
    return [
        Case("no gradient", dtype, shape, gradients=False),
        Case("reconstruct", dtype, shape, what="reconstruct"),
        Case("given", dtype, shape, _BOTH, what="given"),
        Case("click sequence", dtype, shape, what="sequence"),
        Case("memory", dtype, shape, what="memory"),
        Case("three losses", dtype, few, _COURIER),
    ]


def of_a_machine(dtype: str, dim: int, wide: int) -> list[Case]:
    """Every loss, direction and kernel, few rows each; the parts before the whole, so that the
    first wrong number is that of few kernels. `wide`: a dimension of the chunked path."""
    shape = Shape(5, 3, 4, dim, 0.5)
    options = {
        "anchor": Options(),
        "anchor, identify": Options(direction="identify"),
        "anchor, both": _BOTH,
        "mean": Options(attention="mean"),
        "page": Options(negatives="page"),
        "other pages": Options(negatives="other_pages", log_q=True),
        "weights, statistics": Options(weights=True, stats=True),
        "learned temperature": Options(learn_tau=True, tau=0.01),
        "unique items": Options(unique_items=8),
    }
    parts = others(dtype, shape)
    before = [
        replace(case, name=f"{case.name}, no gradient", gradients=False)
        for case in parts
        if case.name in ("reconstruct", "given", "click sequence")
    ]
    found = [*before, *parts[:-2]]
    found += [Case(name, dtype, shape, x) for name, x in options.items()]
    found.append(Case("heads", dtype, shape, more={"num_heads": 4}))
    found += [Case(name, dtype, shape, x) for name, x in CANDIDATES.items()]
    # In float32 with products of tf32: exact ones take other kernels.
    tf32 = dtype == "float32"
    heads = {"num_heads": 4}
    found.append(Case("candidate, heads", dtype, shape, _CANDIDATE, tf32=tf32, more=heads))
    whole = replace(shape, dim=wide)
    found += [
        Case("anchor, wide", dtype, whole),
        Case("click sequence, wide", dtype, whole, what="sequence"),
    ]
    return found + parts[-2:]
