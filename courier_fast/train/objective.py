"""What a run minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from .. import ClickSequenceLoss, EmbeddingMemory, ReconstructionLoss, ReconstructionStats
from ..data.batches import PageBatch
from ..data.loader import Batch
from .config import LossConfig


@dataclass
class StepResult:
    """Sums of this process's anchors over the anchors of all, so that the ranks' values add up."""

    loss: Tensor
    rec: Tensor
    seq: Tensor
    embeddings: Tensor
    stats: ReconstructionStats | None


class _Projection(nn.Module):
    """x + x A^T: the identity at first, where weight decay leads back to."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return x + functional.linear(x, self.weight.to(x.dtype))


class Objective(nn.Module):
    """The weighted sum of L_rec and L_seq of a batch, from its unique embeddings; a loss of weight
    0 is not computed.

    Each process sums its own anchors and divides by the anchors of all, so the sum of the
    processes' gradients is that of the mean over all anchors, however unequal the shards.
    Candidates are the items of all processes, or with `candidates` "process" those of its batch,
    and with a memory the candidates of earlier steps.

    Args:
        dim: D of the embeddings.
        log_q: log sampling probability of each item of the dataset as a candidate [items], or None:
            no correction.
        weights: weight of each item of the dataset as an anchor [items], or None: all the same.
        group: all processes; None: there is one.
    """

    log_q: Tensor | None
    weights: Tensor | None

    def __init__(
        self,
        config: LossConfig,
        dim: int,
        log_q: Tensor | None = None,
        weights: Tensor | None = None,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__()
        c = config
        self.processes = group
        self.group = None if c.candidates == "process" else group
        self.exchange = c.exchange
        reduction = "sum" if self.group is None else "mean"
        self.rec_weight, self.seq_weight = c.reconstruction_weight, c.sequence_weight
        self.unit, self.history_negatives = c.unit, c.history_negatives
        self.rec = ReconstructionLoss(
            c.temperature,
            c.learnable_temperature,
            c.min_temperature,
            **c.options,
            reduction=reduction,
        )
        self.seq = ClickSequenceLoss(
            c.sequence_temperature,
            c.sequence_learnable_temperature,
            c.min_temperature,
            reduction=reduction,
            impl=c.impl,
        )
        # The mean asks nothing: it has no query and no key.
        names = [] if c.projections == "none" or c.attention == "mean" else ["query", "key"]
        if c.projections == "all":
            names.append("value")
        self.projections = nn.ModuleDict({name: _Projection(dim) for name in names})
        # Filled with what all processes have shown, so that a checkpoint of one is that of all.
        self.memory = EmbeddingMemory(c.memory, dim) if c.memory else None
        self.register_buffer("log_q", log_q, persistent=False)
        self.register_buffer("weights", weights, persistent=False)
        # For their sum, which the host needs: a GPU is not waited for.
        self.host_weights = None if weights is None else weights.cpu().double().numpy()

    def anchors(self, plan: PageBatch) -> float:
        """The weights of a batch's anchors, what L_rec is divided by; without, their number."""
        if self.host_weights is None:
            return plan.num_anchors
        return float(self.host_weights[plan.anchor_items].sum())

    def _candidates(self, batch: Batch) -> dict[str, Any]:
        """Pages as the loss takes them; with `history_negatives` the items of all histories are
        shown on one page more, which has no history and no click: candidates as popular as what is
        clicked."""
        pv, clicked = batch.pv_index, batch.clicked
        pv_offsets, history_offsets = batch.pv_offsets, batch.history_offsets
        if self.history_negatives:
            pv = torch.cat([pv, batch.history_index])
            clicked = functional.pad(clicked, (0, len(batch.history_index)))
            pv_offsets = torch.cat([pv_offsets, pv_offsets.new_tensor([len(pv)])])
            history_offsets = torch.cat([history_offsets, history_offsets[-1:]])
        ids = None if self.log_q is None and self.weights is None else self._ids(batch)[pv]
        return {
            "pv": pv,
            "clicked": clicked,
            "pv_offsets": pv_offsets,
            "history_offsets": history_offsets,
            "log_q": None if self.log_q is None else self.log_q[ids],
            "weights": None if self.weights is None else self.weights[ids],
        }

    def _projected(self, table: Tensor, pv: Tensor, history: Tensor) -> dict[str, Tensor]:
        """Query, key and value of the attention, those that are projected."""
        return {
            name: functional.embedding(pv if name == "query" else history, project(table))
            for name, project in self.projections.items()
        }

    def _ids(self, batch: Batch) -> Tensor:
        """Items of the table's rows [n]."""
        return torch.from_numpy(batch.plan.items).to(batch.pv_index.device)

    def _table(self, embeddings: Tensor, batch: Batch) -> Tensor:
        table = embeddings[: batch.num_items]
        return functional.normalize(table, dim=1) if self.unit else table

    def _share(self, loss: Tensor, anchors: float) -> Tensor:
        """This process's share of the mean: it has the sum of its anchors, or as many times the
        share as there are processes."""
        return loss / ((anchors or 1) if self.group is None else dist.get_world_size(self.group))

    def _reach(
        self, batch: Batch, dtype: torch.dtype, recall: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What both losses take for the candidates of other processes, and what L_rec takes for
        those of the memory."""
        shared, recalled = {}, {}
        if self.group is not None:
            shared = {"table_ids": self._ids(batch), "group": self.group, "exchange": self.exchange}
        if recall and self.memory is not None:
            rows, ids, log_q = self.memory.read()
            recalled = {
                "table_ids": self._ids(batch),
                "memory": rows.to(dtype),
                "memory_ids": ids,
                "memory_log_q": log_q,
            }
        return shared, recalled

    def forward(
        self,
        embeddings: Tensor,
        batch: Batch,
        anchors: float,
        sequence_anchors: int,
        stats: bool,
        recall: bool = False,
    ) -> StepResult:
        """With `recall` the memory's rows are candidates, too. With other processes every one of
        them calls it, also without pages."""
        table = self._table(embeddings, batch)
        shared, recalled = self._reach(batch, table.dtype, recall)
        found, rec, seq = None, table.new_zeros(()), table.new_zeros(())
        if self.rec_weight:
            candidates = self._candidates(batch)
            rec = self.rec(
                history=batch.history_index,
                embeddings=table,
                return_stats=stats,
                **candidates,
                **self._projected(table, candidates["pv"], batch.history_index),
                **(shared | recalled),
            )
            rec, found = rec if stats else (rec, None)
            rec = self._share(rec, anchors)
        if self.seq_weight:
            seq = self.seq(
                batch.history_index,
                history_offsets=batch.history_offsets,
                embeddings=table,
                **shared,
            )
            seq = self._share(seq, sequence_anchors)
        loss = self.rec_weight * rec + self.seq_weight * seq
        return StepResult(loss, rec, seq, embeddings.detach(), found)

    @torch.no_grad()
    def remember(self, embeddings: Tensor, batch: Batch) -> None:
        """The candidates of a step, after its backward pass, into the memory, those of all
        processes; every process calls it."""
        if self.memory is None:
            return
        c = self._candidates(batch)
        rows, ids = self._table(embeddings, batch)[c["pv"]], self._ids(batch)[c["pv"]]
        self.memory.push(rows, ids, c["log_q"], group=self.processes)
