"""What a run minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

from .. import (
    ClickSequenceLoss,
    CourierLoss,
    EmbeddingMemory,
    ReconstructionLoss,
    ReconstructionStats,
    reconstruct,
)
from ..data.batches import PageBatch
from ..data.loader import Batch
from ..loss.click_head import ClickHead, ClickRows
from ..loss.union.exchange import Participants
from .config import LossConfig


@dataclass
class StepResult:
    """Sums of this process's anchors over the anchors of all, so that the ranks' values add up."""

    loss: Tensor
    rec: Tensor
    pred: Tensor
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


@dataclass
class _Table:
    """The embeddings of a batch, and what the attention's projections make of them."""

    rows: Tensor  # [n, D]
    projected: dict[str, Tensor]  # query, key, value [n, D], those that are projected

    def of(self, pv: Tensor, history: Tensor) -> dict[str, Tensor]:
        """The loss's arguments, for items and histories as indices."""
        return {"embeddings": self.rows} | {
            name: functional.embedding(pv if name == "query" else history, rows)
            for name, rows in self.projected.items()
        }


def newest_clicks(batch: Batch) -> dict[str, Tensor]:
    """Pages of one PV item, clicked: the newest item of each history; the older ones are their
    history. Packed; a batch's page without a history is one without items."""
    offsets, total = batch.history_offsets, len(batch.history_index)
    count = int((np.diff(batch.plan.history_offsets) > 0).sum())
    has = offsets.diff() > 0
    is_newest = torch.zeros(total + 1, dtype=torch.uint8, device=offsets.device)
    is_newest.scatter_(0, torch.where(has, offsets[1:] - 1, total), 1)
    # A stable order has the older ones first, without asking a GPU how many these are.
    items = batch.history_index[is_newest[:total].argsort(stable=True)]
    before = functional.pad(has.cumsum(0), (1, 0))  # newest items of the pages before
    return {
        "pv": items[total - count :],
        "history": items[: total - count],
        "clicked": batch.clicked.new_ones(count),
        "pv_offsets": before,
        "history_offsets": offsets - before,
    }


class Objective(nn.Module):
    """The weighted sum of L_rec, L_pred and L_seq of a batch, from its unique embeddings; a loss of
    weight 0 is not computed.

    Each process sums its own anchors and divides by the anchors of all, so the sum of the
    processes' gradients is that of the mean over all anchors, however unequal the shards.
    Candidates are the items of all processes, or with `candidates` "process" those of its batch,
    and with a memory the candidates of earlier steps. With `prefixes` the loss is the mean of that
    and of the same of the first p dimensions, for each p (Matryoshka, Kusupati et al. 2022).

    With attention "multihead" L_rec, L_pred and with sequence "newest" L_seq are those of
    `CourierLoss`. With others L_pred is that of a click head on the items' reconstructions, and
    the newest clicks are reconstructed as the items are.

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
        self.config, self.processes = c, group
        self.group = None if c.candidates == "process" else group
        self.rec: CourierLoss | ReconstructionLoss
        self.seq: ClickSequenceLoss | ReconstructionLoss | None
        self.seq, self.click_head = self._sequence_loss(), None
        if c.is_multihead:
            self.rec = self._multihead_loss(dim)
        else:
            self.rec = ReconstructionLoss(
                c.temperature,
                c.learnable_temperature,
                c.min_temperature,
                **c.options,
                reduction=self._reduction,
            )
            if c.prediction_weight:
                self.click_head = ClickHead(dim)
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

    @property
    def _reduction(self) -> str:
        return "sum" if self.group is None else "mean"

    def _multihead_loss(self, dim: int) -> CourierLoss:
        c = self.config
        newest = c.sequence_weight if c.sequence == "newest" else 0
        return CourierLoss(
            dim,
            c.heads,
            c.temperature,
            c.sequence_temperature,
            (c.reconstruction_weight, c.prediction_weight, newest),
            impl=c.impl,
        )

    def _sequence_loss(self) -> ClickSequenceLoss | ReconstructionLoss | None:
        """None where `CourierLoss` has it."""
        c = self.config
        options: dict[str, Any] = {
            "temperature": c.sequence_temperature,
            "learnable_temperature": c.sequence_learnable_temperature,
            "min_temperature": c.min_temperature,
            "reduction": self._reduction,
            "impl": c.impl,
        }
        if c.sequence == "pairs":
            return ClickSequenceLoss(**options)
        return None if c.is_multihead else ReconstructionLoss(**options, **c.reconstruction)

    @property
    def has_click_head(self) -> bool:
        return bool(self.config.prediction_weight)

    @property
    def sequence_temperature(self) -> float:
        fixed = self.config.sequence_temperature
        return fixed if self.seq is None else float(self.seq.temperature)

    def anchors(self, plan: PageBatch) -> float:
        """The weights of a batch's anchors, what L_rec is divided by; without, their number."""
        if self.host_weights is None:
            return plan.num_anchors
        return float(self.host_weights[plan.anchor_items].sum())

    def sequence_anchors(self, plan: PageBatch) -> int:
        """What L_seq is divided by."""
        newest = self.config.sequence == "newest"
        return plan.num_newest_anchors if newest else plan.num_sequence_anchors

    def _candidates(self, batch: Batch) -> dict[str, Any]:
        """Pages as the loss takes them; with `history_negatives` the items of all histories are
        shown on one page more, which has no history and no click: candidates as popular as what is
        clicked."""
        pv, clicked = batch.pv_index, batch.clicked
        pv_offsets, history_offsets = batch.pv_offsets, batch.history_offsets
        if self.config.history_negatives:
            pv = torch.cat([pv, batch.history_index])
            clicked = functional.pad(clicked, (0, len(batch.history_index)))
            pv_offsets = torch.cat([pv_offsets, pv_offsets.new_tensor([len(pv)])])
            history_offsets = torch.cat([history_offsets, history_offsets[-1:]])
        ids = None if self.log_q is None and self.weights is None else self._ids(batch)[pv]
        pages = {
            "pv": pv,
            "clicked": clicked,
            "pv_offsets": pv_offsets,
            "history_offsets": history_offsets,
        }
        for name, values in {"log_q": self.log_q, "weights": self.weights}.items():
            if values is not None:
                pages[name] = values[ids]
        return pages

    def _ids(self, batch: Batch) -> Tensor:
        """Items of the table's rows [n]."""
        return torch.from_numpy(batch.plan.items).to(batch.pv_index.device)

    def _rows(self, embeddings: Tensor) -> Tensor:
        """As the losses take them [..., D]."""
        return functional.normalize(embeddings, dim=-1) if self.config.unit else embeddings

    def _table(self, embeddings: Tensor, batch: Batch) -> _Table:
        rows = self._rows(embeddings[: batch.num_items])
        return _Table(rows, {name: project(rows) for name, project in self.projections.items()})

    def _share(self, loss: Tensor, anchors: float) -> Tensor:
        """This process's share of the mean: it has the sum of its anchors, or as many times the
        share as there are processes."""
        return loss / ((anchors or 1) if self.group is None else dist.get_world_size(self.group))

    def _reach(
        self, batch: Batch, table: _Table, recall: bool
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What both losses take for the candidates of other processes, and what L_rec takes for
        those of the memory."""
        shared, recalled = {}, {}
        dim, dtype = table.rows.shape[1], table.rows.dtype
        if self.group is not None:
            shared = {
                "table_ids": self._ids(batch),
                "group": self.group,
                "exchange": self.config.exchange,
            }
        if recall and self.memory is not None:
            rows, ids, log_q = self.memory.read()
            recalled = {
                "table_ids": self._ids(batch),
                "memory": (rows if rows.shape[1] == dim else self._rows(rows[:, :dim])).to(dtype),
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
        them calls it, also without pages. The parts are those of all dimensions."""
        counts, prefixes = (anchors, sequence_anchors), self.config.prefixes
        found = self._of_dimensions(embeddings, batch, counts, stats, recall)
        for size in prefixes:
            rows = embeddings[:, :size].contiguous()
            more = self._of_dimensions(rows, batch, counts, False, recall)
            found.loss = found.loss + more.loss
        if prefixes:
            found.loss = found.loss / (1 + len(prefixes))
        return found

    def _of_dimensions(
        self,
        embeddings: Tensor,
        batch: Batch,
        counts: tuple[float, int],
        stats: bool,
        recall: bool,
    ) -> StepResult:
        (anchors, sequence_anchors), c = counts, self.config
        table = self._table(embeddings, batch)
        shared, recalled = self._reach(batch, table, recall)
        found, loss = None, table.rows.new_zeros(())
        rec, pred, seq = loss, loss, loss
        if isinstance(self.rec, CourierLoss):
            loss, (rec, pred, seq) = self._by_multihead(table, batch, shared)
        else:
            if c.reconstruction_weight:
                rec, found = self._reconstruction(table, batch, stats, shared | recalled)
                rec = self._share(rec, anchors)
                loss = loss + c.reconstruction_weight * rec
            if self.click_head is not None:
                rows = self._click_rows(table, batch)
                pred = self._share(self.click_head.loss(rows, c.impl == "reference")[0], 1)
                loss = loss + c.prediction_weight * pred
        if self.seq is not None and c.sequence_weight:
            seq = self._share(self._sequence(table, batch, shared), sequence_anchors)
            loss = loss + c.sequence_weight * seq
        return StepResult(loss, rec, pred, seq, embeddings.detach(), found)

    def _by_multihead(
        self, table: _Table, batch: Batch, shared: dict[str, Any]
    ) -> tuple[Tensor, list[Tensor]]:
        """The weighted sum of the losses that share the attention, and the three of them."""
        loss, parts = self.rec(
            history=batch.history_index,
            embeddings=table.rows,
            return_parts=True,
            **self._candidates(batch),
            **shared,
        )
        loss, *three = (self._share(x, 1) for x in (loss, *parts[:3]))  # means, not sums
        return loss, three

    def _reconstruction(
        self, table: _Table, batch: Batch, stats: bool, beside: dict[str, Any]
    ) -> tuple[Tensor, ReconstructionStats | None]:
        candidates = self._candidates(batch)
        found = self.rec(
            history=batch.history_index,
            return_stats=stats,
            **candidates,
            **table.of(candidates["pv"], batch.history_index),
            **beside,
        )
        return found if stats else (found, None)

    def _sequence(self, table: _Table, batch: Batch, shared: dict[str, Any]) -> Tensor:
        if isinstance(self.seq, ReconstructionLoss):
            pages = newest_clicks(batch)
            return self.seq(**pages, **table.of(pages["pv"], pages["history"]), **shared)
        assert self.seq is not None
        return self.seq(
            batch.history_index,
            history_offsets=batch.history_offsets,
            embeddings=table.rows,
            **shared,
        )

    def _attends(self) -> dict[str, Any]:
        """Options of `reconstruct` for a given item, which asks for itself."""
        found = self.config.reconstruction
        if found.pop("attention") == "mean":
            found["attention_scale"] = 0.0
        return found | {"impl": self.config.impl}

    def _click_rows(self, table: _Table, batch: Batch) -> ClickRows:
        """The items of the pages, those of pages with a history."""
        r = reconstruct(
            batch.pv_index,
            batch.history_index,
            pv_offsets=batch.pv_offsets,
            history_offsets=batch.history_offsets,
            **table.of(batch.pv_index, batch.history_index),
            **self._attends(),
        )
        live = None
        if not np.diff(batch.plan.history_offsets).all():
            sizes = batch.pv_offsets.diff()
            has = batch.history_offsets.diff() > 0
            live = has.repeat_interleave(sizes, output_size=len(batch.pv_index))
        e = functional.embedding(batch.pv_index, table.rows)
        return ClickRows(r, e, batch.clicked, live, Participants.of(self.group))

    @torch.no_grad()
    def click_logits(self, items: Tensor, history: Tensor, known: Tensor) -> Tensor:
        """Logits [B, P] of the click head for items [B, P, D] after a history [B, H, D], where any
        of it is `known` [B, H]; by the running statistics."""
        e, history = self._rows(items), self._rows(history)
        if isinstance(self.rec, CourierLoss):
            return self.rec.click_logits(e, history, history_mask=known)
        assert self.click_head is not None
        asked = {n: p(e if n == "query" else history) for n, p in self.projections.items()}
        r = reconstruct(e, history, history_mask=known, **asked, **self._attends())
        assert isinstance(r, Tensor)
        rows = ClickRows(r.flatten(0, 1), e.flatten(0, 1), None, None)
        return self.click_head.logits(rows).view(e.shape[:2])

    @torch.no_grad()
    def remember(self, embeddings: Tensor, batch: Batch) -> None:
        """The candidates of a step, after its backward pass, into the memory, those of all
        processes; every process calls it."""
        if self.memory is None:
            return
        c = self._candidates(batch)
        rows = self._rows(embeddings[: batch.num_items])
        rows, ids = rows[c["pv"]], self._ids(batch)[c["pv"]]
        self.memory.push(rows, ids, c.get("log_q"), group=self.processes)
