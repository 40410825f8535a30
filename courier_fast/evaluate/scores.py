"""Held-out clicks, the items they compete with, and scores from the similarity of embeddings to the
history."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from .. import reconstruct
from ..data.dataset import Dataset
from ..data.embeddings import check_embeddings
from ..loss.arguments import Attention
from .targets import Candidates

Array = npt.NDArray
SCORES = ("mean", "max", "reconstruction", "click")
# Logits [B, P] of items [B, P, D] after a history [B, H, D], where any of it is known [B, H].
ClickLogits = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Reconstruction:
    """How the score "reconstruction" makes R_j: the settings of the loss, by its names, and the
    trainer's `unit`.

    What attention "anchor" trained is ranked by "candidate": the clicked item asks the history
    itself in both, and a ranking does not know which candidate that is.
    """

    attention: str = "candidate"  # each candidate asks the history; "mean": nobody does
    attention_scale: float | None = None  # None: 1/sqrt(D) of each method's own embeddings
    attention_temperature: float | None = None
    num_heads: int = 1
    unit: bool = False  # embeddings divided by their length before anything else

    def __post_init__(self) -> None:
        if self.attention not in ("candidate", "mean"):
            raise ValueError(f"attention: expected candidate or mean, got {self.attention!r}")
        if not isinstance(self.unit, bool):
            raise TypeError(f"unit: expected True or False, got {self.unit!r}")
        # The loss's own checks of the numbers.
        Attention(self.attention, self.attention_scale, self.attention_temperature, self.num_heads)

    @classmethod
    def of_run(cls, run: Path) -> Reconstruction:
        """What the loss of a training run trained, by its config.toml; FileNotFoundError without
        one, ValueError where it had projections."""
        from ..train.config import Config

        loss = Config.load(run / "config.toml").loss
        if loss.is_multihead:
            raise ValueError(
                "score reconstruction: expected a run with another loss.attention than multihead, "
                f"whose projections are not exported, got {run}"
            )
        if loss.projections != "none":
            raise ValueError(
                "score reconstruction: expected a run with loss.projections none, as they are not "
                f"exported, got {loss.projections} in {run}"
            )
        trained = loss.reconstruction
        if trained["attention"] == "anchor":  # the same where the clicked item is not known
            trained["attention"] = "candidate"
        return cls(**trained, unit=loss.unit)

    @property
    def arguments(self) -> dict[str, Any]:
        """Those of `courier_fast.reconstruct`."""
        scale = 0.0 if self.attention == "mean" else self.attention_scale
        return {
            "attention_scale": scale,
            "attention_temperature": self.attention_temperature,
            "num_heads": self.num_heads,
        }


def check_score(score: str, reconstruction: Reconstruction | None) -> Reconstruction | None:
    """The settings of the score "reconstruction", None for another; raises ValueError or TypeError
    if they do not go together."""
    if score not in SCORES:
        raise ValueError(f"score: expected one of {', '.join(SCORES)}, got {score!r}")
    if reconstruction is None:
        return Reconstruction() if score == "reconstruction" else None
    if not isinstance(reconstruction, Reconstruction):
        raise TypeError(f"reconstruction: expected a Reconstruction, got {reconstruction!r}")
    if score != "reconstruction":
        raise ValueError(
            f"reconstruction: expected none with score {score!r}, got {reconstruction}"
        )
    return reconstruction


def history_scores(
    dataset: Dataset,
    candidates: Candidates,
    embeddings: Array,
    *,
    score: str = "mean",
    reconstruction: Reconstruction | None = None,
    click: ClickLogits | None = None,
    device: torch.device | str = "cpu",
    chunk: int = 1 << 20,
) -> Array:
    """Scores [C] float32 of all candidates: the similarity of E_j to the target's history items
    C_k, both rows of `embeddings`.

        mean:            mean_k cos(E_j, C_k)
        max:             max_k cos(E_j, C_k)
        reconstruction:  cos(R_j, E_j),  R_j = sum_k softmax_k(logit_jk) C_k, as in the loss
        click:           the logit of a click head, g([R_j, E_j]), with its own attention

    logit_jk is attention_scale * E_j . C_k, or cos(E_j, C_k) / attention_temperature, or with
    attention "mean" 0; with `unit`, E and C have length 1 in all of it.

    Computed in float64 and rounded, so that equal embeddings get equal scores.

    Args:
        embeddings: [items, D]; a row that is not finite is an item without an embedding: left out
            of histories, and as a candidate NaN, as are all candidates of a target without any
            embedding in its history.
        reconstruction: settings of the score of that name; None: those that the loss has by
            default.
        click: the head of the score of that name.
        chunk: numbers in the candidates' embeddings at once, which bounds the memory.

    Raises:
        ValueError: another shape, no finite row, an unknown score, settings of another score, or
            score "click" without a head.
    """
    reconstruction = check_score(score, reconstruction)
    if (score == "click") != (click is not None):
        raise ValueError(
            f"click: expected a click head with score click and with no other, got {click!r} with "
            f"score {score!r}"
        )
    check_embeddings(embeddings, dataset)
    have = np.isfinite(embeddings).all(1)
    table = torch.from_numpy(np.where(have[:, None], embeddings, 0).astype(np.float32)).to(device)
    targets, offsets = candidates.targets, candidates.offsets
    scores = np.empty(len(candidates.items), np.float32)
    # Targets with equally many candidates together: little padding.
    sizes = np.diff(offsets)
    order = np.argsort(sizes, kind="stable")
    chunk, first = max(1, chunk // embeddings.shape[1]), 0
    while first < len(order):
        window = sizes[order[first : first + chunk]]
        padded = window * np.arange(1, len(window) + 1)
        some = order[first : first + max(1, int(np.searchsorted(padded, chunk, side="right")))]
        first += len(some)
        rows, real = _padded_ranges(offsets[some], offsets[some + 1])
        items = np.where(real, candidates.items[rows], 0).astype(np.int64)
        past, known = _padded_ranges(targets.history_start[some], targets.history_end[some])
        history = np.where(known, dataset.event_item[past], 0).astype(np.int64)
        known &= have[history]
        e, c = (table[torch.from_numpy(a).to(device)].double() for a in (items, history))
        mask = torch.from_numpy(known).to(device)
        if click is not None:
            found = click(e, c, mask)
        elif reconstruction is None:
            found = _similarities(e, c, mask, score)
        else:
            found = _reconstructed(e, c, mask, reconstruction)
        usable = have[items] & known.any(1, keepdims=True)
        scores[rows[real]] = np.where(usable, found.float().cpu().numpy(), np.nan)[real]
    return scores


def _padded_ranges(start: Array, end: Array) -> tuple[Array, Array]:
    """The ranges [start, end) as rows of one matrix, and which of its entries are real; the others
    repeat the first."""
    step = np.arange((end - start).max())
    real = step < (end - start)[:, None]
    return np.where(real, start[:, None] + step, start[:, None]), real


def _similarities(items: Tensor, history: Tensor, known: Tensor, score: str) -> Tensor:
    """[B, P] of items [B, P, D] to history [B, H, D], where any of it is `known` [B, H]."""
    rows, columns = (torch.linalg.vector_norm(x, dim=2).clamp_min(1e-12) for x in (items, history))
    similar = items @ history.mT / rows[:, :, None] / columns[:, None]
    if score == "max":
        return similar.masked_fill(~known[:, None], -torch.inf).amax(2)
    weight = known.double() / known.sum(1, keepdim=True).clamp_min(1)
    return (similar @ weight[:, :, None]).squeeze(2)


def _reconstructed(items: Tensor, history: Tensor, known: Tensor, how: Reconstruction) -> Tensor:
    """cos(R_j, E_j) [B, P], shapes as above."""
    if how.unit:
        items, history = (functional.normalize(x, dim=2) for x in (items, history))
    rebuilt = reconstruct(
        items,
        history,
        history_mask=known,
        **how.arguments,
    )
    return functional.cosine_similarity(rebuilt, items, dim=2)
