"""A batch in shards, one for each process, and the same batch whole."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from factories import (
    LOSS_INPUTS,
    SEQUENCE_INPUTS,
    in_float64,
    make,
    make_sequence,
    offsets_of,
    results,
    upstream_for,
    with_gradients,
)
from torch import Tensor

import courier_fast as cf
from courier_fast.loss import reference
from courier_fast.loss.problem import Problem, SequenceProblem
from courier_fast.loss.union import losses

# What a process may have; the first one is always among them.
KINDS: tuple[dict[str, Any], ...] = (
    {"pages": 6},
    {"pages": 0},
    {"pages": 1, "longest_pv": 1, "longest_history": 1, "clicked": 1.0},
    {"pages": 3, "clicked": 0.0},
    {"pages": 3, "longest_history": 0},
    {"pages": 2, "longest_pv": 0},
    {"pages": 3, "longest_pv": 2},
)
PER_PV = ("pv", "query", "reconstructed", "item_ids", "log_q", "weights", "clicked", "pv_index")
PER_HISTORY = ("history", "key", "value", "history_index", "item_ids")
STATS = ("item_loss", "log_sum_exp", "positive_similarity", "rank", "is_anchor")
MEMORY_ROWS = 5


@dataclass(frozen=True)
class Case:
    """What is computed; `options` are those of factories.make or make_sequence."""

    impl: str = "reference"
    dtype: torch.dtype = torch.float64
    options: dict[str, Any] = field(default_factory=dict)
    sequence: bool = False
    exchange: str = "auto"
    layout: str = "packed"  # "past" (rows past the end) or "padded": with NaN in what is padding
    table_ids: bool = True  # with a table, else item_ids
    memory: bool = False
    static: bool = False  # as on a GPU, where nobody asks for values
    stats: bool = True

    @property
    def inputs(self) -> tuple[str, ...]:
        return SEQUENCE_INPUTS if self.sequence else LOSS_INPUTS


@dataclass
class Shard:
    problem: Any
    table_ids: Tensor | None


@dataclass
class Rows:
    """A memory's."""

    rows: Tensor
    ids: Tensor
    log_q: Tensor


def shards_of(case: Case, size: int, seed: int) -> list[Shard]:
    """Packed, without padding."""
    draw = random.Random(seed)
    kinds = [draw.choice(KINDS) for _ in range(size)]
    kinds[seed % size] = KINDS[0]
    found = []
    for rank, kind in enumerate(kinds):
        build = make_sequence if case.sequence else make
        half = case.dtype if case.dtype != torch.float64 else torch.float32
        options = {"dim": 12, "tensor_tau": True, "dtype": half} | kind | case.options
        p = build(100 * seed + rank, **options)
        if case.dtype == torch.float64:
            p = in_float64(p, case.inputs)
        ids = None
        if case.options.get("table") and case.table_ids:
            g = torch.Generator().manual_seed(seed + rank)
            items = len(p.history if case.sequence else p.pv)
            ids = torch.randperm(items + 8, generator=g)[:items]
        found.append(Shard(p, ids))
    return found


def memory_of(case: Case, seed: int) -> Rows | None:
    if not case.memory:
        return None
    g = torch.Generator().manual_seed(seed)
    rows = torch.randn(MEMORY_ROWS, case.options.get("dim", 12), generator=g).to(case.dtype)
    ids = torch.randint(0, 12, (MEMORY_ROWS,), generator=g)
    return Rows(rows, ids, torch.randn(MEMORY_ROWS, generator=g) - 3)


# ---- the union -----------------------------------------------------------------------------------


def union_of(shards: Sequence[Shard], memory: Rows | None) -> Any:
    """One problem; a memory is one more page at the end, without a history. Tables follow each
    other."""
    first = shards[0].problem
    every = [s.problem for s in shards]
    sequence = isinstance(first, SequenceProblem)
    whole: dict[str, Any] = {}
    names = ("history", "history_index", "item_ids") if sequence else (*PER_PV, *PER_HISTORY)
    for name in names:
        parts = [getattr(p, name) for p in every]
        if name.endswith("_index") and parts[0] is not None:
            sizes = torch.tensor([len(p.history if sequence else p.pv) for p in every])
            parts = [x + start for x, start in zip(parts, offsets_of(sizes), strict=False)]
        whole[name] = None if parts[0] is None else torch.cat([x.detach() for x in parts])
    index = "history_index" if sequence else "pv_index"
    if shards[0].table_ids is not None:
        ids = torch.cat([s.table_ids for s in shards if s.table_ids is not None])
        whole["item_ids"] = ids[whole[index]]
    for name in ("history_offsets",) if sequence else ("pv_offsets", "history_offsets"):
        whole[name] = offsets_of(torch.cat([getattr(p, name).diff() for p in every]))
    if memory is not None:
        _with_memory(whole, memory)
    inputs = SEQUENCE_INPUTS if sequence else LOSS_INPUTS
    return with_gradients(replace(first, **whole), inputs)


def _with_memory(whole: dict[str, Any], memory: Rows) -> None:
    n = len(memory.rows)
    if whole["pv_index"] is not None:
        more = len(whole["pv"]) + torch.arange(n)
        whole["pv_index"] = torch.cat([whole["pv_index"], more])
    added = {
        "pv": memory.rows,
        "item_ids": memory.ids,
        "log_q": memory.log_q,
        "weights": torch.zeros(n),
        "clicked": torch.zeros(n, dtype=torch.bool),
        "query": torch.zeros_like(memory.rows),
        "reconstructed": torch.zeros_like(memory.rows),
    }
    for name, x in added.items():
        if whole[name] is not None:
            whole[name] = torch.cat([whole[name], x.to(whole[name].dtype)])
    for name, rows in (("pv_offsets", n), ("history_offsets", 0)):
        whole[name] = torch.cat([whole[name], whole[name][-1:] + rows])


# ---- one process ---------------------------------------------------------------------------------


def _padded(x: Tensor, mask: Tensor) -> Tensor:
    """[B, L, ...] with the rows of x [N, ...] where the mask is True, and whatever is worst
    elsewhere."""
    worst = torch.nan if x.is_floating_point() else 0
    return x.new_full((*mask.shape, *x.shape[1:]), worst).masked_scatter_(
        mask.view(*mask.shape, *[1] * (x.dim() - 1)).expand(*mask.shape, *x.shape[1:]), x
    )


def _masks(p: Any, layout: str) -> dict[str, Tensor]:
    """Which rows are real, [B, L] or [N], of each side."""
    found = {}
    for name in ("pv", "history"):
        offsets = getattr(p, f"{name}_offsets", None)
        if offsets is None:
            continue
        lengths = offsets.diff()
        if layout == "padded":
            longest = int(lengths.max()) + 1 if len(lengths) else 2
            found[name] = torch.arange(longest) < lengths[:, None]
        else:
            rows = int(offsets[-1])
            found[name] = torch.arange(rows + (2 if layout == "past" else 0)) < rows
    return found


def arguments(
    shard: Shard, layout: str
) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Of the public function; by name what takes a gradient among them; and which rows are real."""
    p = shard.problem
    masks = _masks(p, layout)
    found: dict[str, Any] = {"reduction": p.reduction, "workspace": p.workspace}
    found["temperature"] = p.tau if p.temperature is None else p.temperature.detach()
    if isinstance(p, SequenceProblem):
        sides = {"history": PER_HISTORY}
    else:
        sides = {"pv": PER_PV, "history": PER_HISTORY[:-1]}
        found |= {
            "negatives": p.negatives,
            "direction": p.direction,
        }
        if p.reconstructed is None:
            found["num_heads"] = p.num_heads
            found["attention"] = p.attention if p.attention_scale else "mean"
        if p.cosine:
            found["attention_temperature"] = 1 / p.attention_scale
        elif p.attention_scale and p.reconstructed is None:
            found["attention_scale"] = p.attention_scale
    table = p.history_index is not None
    if table:
        found["embeddings"] = (p.history if isinstance(p, SequenceProblem) else p.pv).detach()
        found["table_ids"] = shard.table_ids
    if getattr(p, "reconstructed", None) is not None:
        del sides["history"]
        found["history"] = None
    for name, per_row in sides.items():
        offsets = getattr(p, f"{name}_offsets")
        found |= (
            {f"{name}_mask": masks[name]} if layout == "padded" else {f"{name}_offsets": offsets}
        )
        for field_name in per_row:
            x = getattr(p, field_name, None)
            if x is None or (table and field_name == name):
                continue
            found[field_name.replace("_index", "")] = _padded(x.detach(), masks[name])
    leaves = {}
    for name in ("embeddings", *LOSS_INPUTS):
        x = found.get(name)
        if isinstance(x, Tensor) and x.is_floating_point():
            leaves[name] = found[name] = x.clone().requires_grad_()
    return found, leaves, masks


def _call(case: Case, given: dict[str, Any]) -> Any:
    given = dict(given)
    if case.sequence:
        return cf.click_sequence_loss(given.pop("history"), **given), None
    rows = [given.pop(n) for n in ("pv", "history", "clicked")]
    found = cf.reconstruction_loss(*rows, return_stats=case.stats, **given)
    return found if case.stats else (found, None)


def run_shard(
    case: Case, seed: int, group: Any, rank: int, size: int, **more: Any
) -> dict[str, Tensor]:
    """This process's loss, gradients and statistics, packed; by the names of the union's
    problem."""
    shards, memory = shards_of(case, size, seed), memory_of(case, seed)
    given, leaves, masks = arguments(shards[rank], case.layout)
    given |= {"group": group, "exchange": case.exchange, "impl": case.impl} | more
    if memory is not None:
        identified = given.get("item_ids") is not None or given.get("table_ids") is not None
        given |= {
            "memory": memory.rows,
            "memory_ids": memory.ids if identified else None,
            "memory_log_q": None if given.get("log_q") is None else memory.log_q,
        }
    waits = losses._waits
    if case.static:
        losses._waits = lambda device: False
    try:
        loss, stats = _call(case, given)
        own = masks["history" if case.sequence else "pv"]
        upstream = _upstream(case, shards, memory, rank)
        output = loss[own] if loss.dim() else loss
        names = list(leaves)
        grads = dict(
            zip(names, torch.autograd.grad(output, list(leaves.values()), upstream), strict=True)
        )
    finally:
        losses._waits = waits
    found = {"output": output.detach()}
    for name, x in grads.items():
        assert x.dtype == leaves[name].dtype
        if name not in ("embeddings", "temperature"):
            mask = masks["pv" if name in PER_PV else "history"]
            assert not x[~mask].any(), f"a gradient in padding of {name}"
            x = x[mask]
        found[name] = x
    if "embeddings" in found:
        found["history" if case.sequence else "pv"] = found.pop("embeddings")
    if stats is not None:
        found |= {name: getattr(stats, name)[own] for name in STATS}
        found |= {n: getattr(stats, n) for n in ("num_anchors", "num_clicked_without_history")}
        found["hits"] = (stats.recall_at(3) * stats.num_anchors).nan_to_num().round().long()
    return found


def _upstream(case: Case, shards: Sequence[Shard], memory: Rows | None, rank: int) -> Tensor:
    kind = torch.promote_types(case.dtype, torch.float32)
    p = shards[0].problem
    if p.reduction != "none":
        return upstream_for(torch.zeros((), dtype=kind))
    counts = [s.problem.num_history if case.sequence else s.problem.num_pv for s in shards]
    whole = upstream_for(torch.zeros(sum(counts) + (MEMORY_ROWS if memory else 0), dtype=kind))
    first = sum(counts[:rank])
    return whole[first : first + counts[rank]]


def combined(case: Case, found: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The union's, from what the processes have: means for reduction "mean", as DDP takes them."""
    reduction = case.options.get("reduction", "mean")
    scale = len(found) if reduction == "mean" else 1
    summed = ("temperature", "num_anchors", "num_clicked_without_history", "hits")
    whole = {}
    for name in found[0]:
        parts = [f[name] for f in found]
        wide = [x.double() if x.is_floating_point() else x for x in parts]
        if name in summed or (name == "output" and reduction != "none"):
            whole[name] = torch.stack(wide).sum(0)
        else:
            whole[name] = torch.cat(wide)
        if (name == "output" and reduction == "mean") or name in case.inputs:
            whole[name] = whole[name] / scale
    return whole


def expected(case: Case, p: Any, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The definition's loss, gradients and statistics of a union; without the rows of a memory,
    which `like` has not."""
    if case.sequence:
        return results(reference.click_sequence_loss, p, case.inputs)
    seen: dict[str, Tensor] = {}

    def loss(q: Problem) -> Tensor:
        out = reference.reconstruction_loss(q)
        seen.update({n: getattr(out, n).detach() for n in STATS})
        seen["num_anchors"] = out.is_anchor.sum()
        seen["num_clicked_without_history"] = out.num_skipped
        seen["hits"] = (out.is_anchor & (out.rank <= 3)).sum()
        return out.loss

    found = results(loss, p, case.inputs) | (seen if case.stats else {})
    if getattr(p, "reconstructed", None) is not None:
        found.pop("history", None)  # no rows; a table has none
    return {n: x[: len(like[n])] if x.dim() else x for n, x in found.items()}
