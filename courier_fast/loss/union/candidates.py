"""Where candidates are beside the batch, and what the processes have to agree on."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import operators
from ..fallback import OR_REFERENCE, kernels_of, or_reference
from ..layouts import as_index, describe, require_tensor
from ..problem import Problem, SequenceProblem
from . import blocks
from .exchange import Participants

BLOCKS = {
    "reference": "courier_fast.loss.union.blocks",
    "cpu": "courier_fast.kernels.cpu.blocks",
    "triton": "courier_fast.kernels.triton.blocks",
    "xformers": "courier_fast.kernels.triton.blocks",
}
_OPTIONAL = ("reconstructed", "item_ids", "log_q", "weights", "query", "key", "value")


@dataclass
class Memory:
    """Candidates of earlier batches; no gradient."""

    rows: Tensor  # [Q, D], in the type of the embeddings
    ids: Tensor | None  # [Q] int64
    log_q: Tensor | None  # [Q] float32 or float64


@dataclass
class CandidateUnion:
    """Candidates beside this batch, and who computes."""

    impl: str
    processes: Participants | None
    exchange: str
    memory: Memory | None
    table_ids: Tensor | None  # [n] int64: the ids of a table's rows, on every process

    @property
    def backend(self) -> Any:
        """The primitives: see blocks.py."""
        found = importlib.import_module(BLOCKS[kernels_of(self.impl)])
        return _BlocksOrReference(found) if self.impl.endswith(OR_REFERENCE) else found

    def agree(
        self, p: Problem | SequenceProblem, stats: bool, sizes: Sequence[int]
    ) -> list[list[int]]:
        """Each size on every process; ValueError, on all of them, where this were not one loss."""
        if self.processes is None:
            return [[n] for n in sizes]
        source = p.pv if isinstance(p, Problem) else p.history
        assert source is not None
        temperature: Any = p.tau
        if p.temperature is not None:
            # On a GPU nobody waits for its value.
            on_host = p.temperature.device.type == "cpu"
            temperature = p.temperature.item() if on_host else "a tensor"
        # The first that differs is named: what others follow from comes first.
        facts = {
            "loss": "reconstruction" if isinstance(p, Problem) else "click sequence",
            "embedding dimension": source.shape[1],
            "dtype": str(source.dtype),
            "device": source.device.type,
        }
        options = p.options
        scale = options.pop("attention_scale", None)  # follows from others
        facts |= options | {"attention_scale": scale}
        facts |= {f"{name} given": getattr(p, name, None) is not None for name in _OPTIONAL}
        facts |= {
            "temperature": temperature,
            "exchange": self.exchange,
            "impl": kernels_of(self.impl),
            "return_stats": stats,
            "memory rows": 0 if self.memory is None else len(self.memory.rows),
            "table_ids given": self.table_ids is not None,
            "gradients wanted": str(operators.wanted(p).names),
        }
        return self.processes.agree(facts, sizes)


@dataclass
class _BlocksOrReference:
    """Primitives, each of which is the reference's where its kernels cannot be launched: they leave
    nothing for one another, and nothing of it travels."""

    own: ModuleType

    def __getattr__(self, name: str) -> Callable[..., Any]:
        run, fallen_back = getattr(self.own, name), getattr(blocks, name)

        def call(*args: Any) -> Any:
            rows = [x.rows for x in args if isinstance(x, blocks.Block)]

            def about() -> Hashable:
                return name, *((x.dtype, x.shape[1], x.device) for x in rows)

            return or_reference(about, rows[0], lambda: run(*args), lambda: fallen_back(*args))

        return call


@dataclass
class Beside:
    """What a call says about candidates beside its batch, as the user gives it."""

    processes: Participants | None
    exchange: str
    table_ids: Tensor | None
    memory: Tensor | None = None
    memory_ids: Tensor | None = None
    memory_log_q: Tensor | None = None

    def union(self, p: Any, impl: str) -> tuple[Any, CandidateUnion | None]:
        """The problem, and what is beside it; None where this is the batch alone.

        Raises ValueError or TypeError where the arguments do not fit.
        """
        processes, table_ids = self.processes, self.table_ids
        table = p.pv_index is not None if isinstance(p, Problem) else p.history_index is not None
        if table_ids is not None:
            table_ids = _table_ids(p, table, table_ids)
        elif processes is not None and table and p.item_ids is None:
            raise ValueError(
                "table_ids: expected the ids of the items of embeddings [n] with group, as an "
                "index means another item on "
                "each process, got None"
            )
        found = None
        if self.memory is not None:
            assert isinstance(p, Problem)
            found = self._memory(p, table_ids is not None or p.item_ids is not None)
        else:
            for name in ("memory_ids", "memory_log_q"):
                x = getattr(self, name)
                if x is not None:
                    raise ValueError(f"{name}: expected None without memory, got {describe(x)}")
        if processes is None or processes.size == 1:
            if processes is not None:
                processes.agreed = True
            if found is None or not len(found.rows):
                return _identified(p, table_ids), None
            processes = None
        if torch.compiler.is_compiling() or operators.transformed():
            if processes is not None:
                processes.agreed = True  # nothing can be sent from in there
            raise RuntimeError(
                "group and memory: expected a call outside of torch.compile and torch.func, "
                "got one inside; "
                "wrap the loss in torch.compiler.disable"
            )
        return p, CandidateUnion(impl, processes, self.exchange, found, table_ids)

    def _memory(self, p: Problem, identified: bool) -> Memory:
        rows, ids, log_q = self.memory, self.memory_ids, self.memory_log_q
        rows = require_tensor("memory", rows)
        dim, device = p.pv.shape[1], p.pv.device
        if (
            rows.is_nested
            or rows.dim() != 2
            or rows.shape[1] != dim
            or not rows.is_floating_point()
        ):
            raise ValueError(f"memory: expected floating [Q, {dim}], got {describe(rows)}")
        if rows.requires_grad:
            raise ValueError(
                "memory: expected rows without a gradient, got a tensor that requires one"
            )
        if p.direction != "reconstruct" or p.negatives == "page":
            raise ValueError(
                'memory: expected direction "reconstruct" and negatives "batch" or "other_pages", '
                f"got direction {p.direction!r} and negatives {p.negatives!r}"
            )
        if p.attention == "candidate" and p.query is not None:
            raise ValueError(
                'memory: expected no query with attention "candidate", as its rows have none, '
                "got one"
            )
        if (ids is not None) != identified:
            what = "the ids of its rows [Q], as the items have ids" if identified else "None"
            raise ValueError(f"memory_ids: expected {what}, got {describe(ids)}")
        if (log_q is not None) != (p.log_q is not None):
            what = "None without log_q" if p.log_q is None else "[Q], as the items have log_q"
            raise ValueError(f"memory_log_q: expected {what}, got {describe(log_q)}")
        for name, x in (("memory", rows), ("memory_ids", ids), ("memory_log_q", log_q)):
            if x is None:
                continue
            shape = rows.shape if name == "memory" else rows.shape[:1]
            if require_tensor(name, x).shape != shape or x.device != device:
                raise ValueError(
                    f"{name}: expected shape {list(shape)} on {device}, got {describe(x)}"
                )
        if log_q is not None and not log_q.is_floating_point():
            raise TypeError(f"memory_log_q: expected a floating tensor, got {log_q.dtype}")
        ids = None if ids is None else as_index("memory_ids", ids)
        # As `log_q`: no gradient, float32 or better.
        log_q = None if log_q is None or p.log_q is None else log_q.detach().to(p.log_q.dtype)
        return Memory(rows.to(p.pv.dtype), ids, log_q)


def _table_ids(p: Any, table: bool, table_ids: Any) -> Tensor:
    ids = as_index("table_ids", require_tensor("table_ids", table_ids))
    source = p.pv if isinstance(p, Problem) else p.history
    if not table:
        raise ValueError("table_ids: expected None without embeddings; item_ids are for rows")
    if p.item_ids is not None:
        raise ValueError("table_ids and item_ids: expected at most one of the two, got both")
    if ids.shape != source.shape[:1] or ids.device != source.device:
        raise ValueError(
            f"table_ids: expected [{len(source)}] on {source.device}, one for each row of "
            f"embeddings, got {describe(ids)}"
        )
    return ids


def _identified(p: Any, table_ids: Tensor | None) -> Any:
    """With the ids of a table's rows as those of the items."""
    if table_ids is None:
        return p
    index = p.pv_index if isinstance(p, Problem) else p.history_index
    assert index is not None
    # Padding points anywhere.
    return replace(
        p, item_ids=table_ids[index.clamp(0, len(table_ids) - 1)] if len(table_ids) else index
    )
