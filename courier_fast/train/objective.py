"""What a run minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..data.loader import Batch
from ..loss import ClickSequenceLoss, ReconstructionLoss, ReconstructionStats
from .config import LossConfig


@dataclass
class StepResult:
    """Sums of this process's anchors over the anchors of all, so that the ranks' values add up."""

    loss: Tensor
    rec: Tensor
    seq: Tensor
    embeddings: Tensor
    stats: ReconstructionStats | None
    anchors: int  # of all processes


class Objective(nn.Module):
    """L_rec + weight * L_seq of a batch, from its unique embeddings.

    Each process sums its own anchors (their candidates are those of its batch) and divides by the anchors of all, so the sum of the
    processes' gradients is that of the mean over all anchors, however unequal the shards.

    Args:
        log_q: log sampling probability of each item of the dataset as a candidate [items], or None: no correction.
    """

    log_q: Tensor | None

    def __init__(self, config: LossConfig, log_q: Tensor | None = None) -> None:
        super().__init__()
        c = config
        self.weight, self.unit, self.history_negatives = (
            c.sequence_weight,
            c.unit,
            c.history_negatives,
        )
        self.rec = ReconstructionLoss(
            c.temperature, c.learnable_temperature, c.min_temperature, **c.reconstruction,
            negatives=c.negatives, direction=c.direction, reduction="sum", impl=c.impl,
        )  # fmt: skip
        self.seq = ClickSequenceLoss(c.sequence_temperature, reduction="sum", impl=c.impl)
        self.register_buffer("log_q", log_q, persistent=False)

    def _candidates(self, batch: Batch) -> dict[str, Any]:
        """Pages as the loss takes them; with `history_negatives` the items of all histories are shown on one page more,
        which has no history and no click: candidates as popular as what is clicked."""
        pv, clicked = batch.pv_index, batch.clicked
        pv_offsets, history_offsets = batch.pv_offsets, batch.history_offsets
        if self.history_negatives:
            pv = torch.cat([pv, batch.history_index])
            clicked = functional.pad(clicked, (0, len(batch.history_index)))
            pv_offsets = torch.cat([pv_offsets, pv_offsets.new_tensor([len(pv)])])
            history_offsets = torch.cat([history_offsets, history_offsets[-1:]])
        log_q = None
        if self.log_q is not None:
            log_q = self.log_q[torch.from_numpy(batch.plan.items).to(pv.device)[pv]]
        return {
            "pv": pv, "clicked": clicked, "pv_offsets": pv_offsets, "history_offsets": history_offsets, "log_q": log_q,
        }  # fmt: skip

    def forward(
        self, embeddings: Tensor, batch: Batch, anchors: int, sequence_anchors: int, stats: bool
    ) -> StepResult:
        table = embeddings[: batch.num_items]
        if self.unit:
            table = functional.normalize(table, dim=1)
        rec = self.rec(
            history=batch.history_index,
            embeddings=table,
            return_stats=stats,
            **self._candidates(batch),
        )
        rec, found = rec if stats else (rec, None)
        rec = rec / max(anchors, 1)
        seq = rec.new_zeros(())
        if self.weight:
            seq = self.seq(
                batch.history_index, history_offsets=batch.history_offsets, embeddings=table
            )
            seq = seq / max(sequence_anchors, 1)
        return StepResult(rec + self.weight * seq, rec, seq, embeddings.detach(), found, anchors)
