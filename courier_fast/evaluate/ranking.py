"""Held-out clicks, the items they compete with, and scores from the similarity of embeddings to the
history."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from torch import Tensor
from torch.nn import functional

from .. import reconstruct
from ..arguments import Attention
from ..data.dataset import Dataset
from ..data.embeddings import check_embeddings

Array = npt.NDArray

CANDIDATES = ("page", "sampled", "popular")
SCORES = ("mean", "max", "reconstruction")


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


@dataclass(frozen=True)
class Targets:
    """The clicked items of a split's pages that have a history: T targets, by page.

    `history_start` to `history_end` are rows of the dataset's events: the most recent ones before
    the page.
    """

    item: Array  # [T]
    page: Array  # [T] rows of the dataset's pages
    history_start: Array  # [T]
    history_end: Array  # [T]

    def __len__(self) -> int:
        return len(self.item)

    def take(self, keep: Array) -> Targets:
        return Targets(
            self.item[keep], self.page[keep], self.history_start[keep], self.history_end[keep]
        )


@dataclass(frozen=True)
class Candidates:
    """The items that each target is ranked among: `items` [C] in segments `offsets` [T + 1], the
    target first."""

    targets: Targets
    items: Array
    offsets: Array


def find_targets(dataset: Dataset, split: str = "test", history: int = 20) -> Targets:
    """The split's held-out clicks with the `history` most recent events before their page.

    An item clicked twice on a page is one target. ValueError for an unknown split, one without
    pages, or one without a click after a history.
    """
    if history < 1:
        raise ValueError(f"history: expected at least 1, got {history}")
    d, pages = dataset, dataset.split(split)
    if not len(pages):
        raise ValueError(f"split: expected pages in {split!r} of {d.path}, got none")
    rows = slice(int(d.pv_start[pages.start]), int(d.pv_end[pages.stop - 1]))
    page = np.repeat(
        np.arange(pages.start, pages.stop), (d.pv_end - d.pv_start)[pages.start : pages.stop]
    )
    clicked = d.pv_clicked[rows] & (d.history_end > d.history_start)[page]
    key = np.unique(page[clicked] * d.num_items + d.pv_item[rows][clicked])
    page, item = np.divmod(key, d.num_items)
    if not len(page):
        raise ValueError(
            f"split: expected a click on a page with a history in {split!r} of {d.path}, got none"
        )
    end = d.history_end[page]
    return Targets(item, page, np.maximum(d.history_start[page], end - history), end)


@njit(cache=True, nogil=True)
def _mark(seen, item, mark):  # type: ignore[no-untyped-def]
    """Whether the item was not marked yet; it is now."""
    new = seen[item] != mark
    seen[item] = mark
    return new


@njit(cache=True, nogil=True)
def _page_items(item, page, pv_start, pv_end, pv_item, pv_clicked, seen, offsets, out):  # type: ignore[no-untyped-def]
    n = 0
    for t in range(len(item)):
        rows = range(pv_start[page[t]], pv_end[page[t]])
        for i in rows:
            if pv_clicked[i]:
                seen[pv_item[i]] = t
        out[n] = item[t]
        n += 1
        for i in rows:
            if _mark(seen, pv_item[i], t):
                out[n] = pv_item[i]
                n += 1
        offsets[t + 1] = n


@njit(cache=True, nogil=True)
def _sampled_items(  # type: ignore[no-untyped-def]
    rng,
    item,
    page,
    history_start,
    history_end,
    event_item,
    pv_start,
    pv_end,
    pv_item,
    pv_clicked,
    weight,
    total,
    others,
    seen,
    offsets,
    out,
):
    """`weight` [items] of each item in a draw and `total`, its running sum.

    Draws are repeated until they are new, which is sampling without replacement one by one. Where
    nearly all of the weight is taken, the rest comes from exponential keys (Efraimidis and Spirakis
    2006), which have the same distribution.
    """
    n = 0
    available = np.count_nonzero(weight)
    for t in range(len(item)):
        p, free = page[t], available
        for i in range(history_start[p], history_end[p]):
            if _mark(seen, event_item[i], t) and weight[event_item[i]] > 0:
                free -= 1
        for i in range(pv_start[p], pv_end[p]):
            if pv_clicked[i] and _mark(seen, pv_item[i], t) and weight[pv_item[i]] > 0:
                free -= 1
        out[n] = item[t]
        n += 1
        wanted = min(others, free)
        tries = 20 * wanted
        while wanted > 0 and tries > 0:
            tries -= 1
            drawn = np.searchsorted(total, rng.random() * total[-1], side="right")
            if _mark(seen, drawn, t):
                out[n] = drawn
                n += 1
                wanted -= 1
        if wanted > 0:
            keys = np.full(len(weight), np.inf)
            for j in range(len(weight)):
                if weight[j] > 0 and seen[j] != t:
                    keys[j] = rng.standard_exponential() / weight[j]
            order = np.argsort(keys)
            for j in order[:wanted]:
                out[n] = j
                n += 1
        offsets[t + 1] = n


def _candidates(targets: Targets, items: Array, offsets: Array) -> Candidates:
    """Without the targets that have no other candidate."""
    sizes = np.diff(offsets)
    keep = sizes > 1
    if not keep.any():
        raise ValueError("candidates: expected another item beside a clicked one, got none")
    items = items[: offsets[-1]][np.repeat(keep, sizes)]
    return Candidates(
        targets.take(keep), items, np.concatenate([[0], np.cumsum(sizes[keep], dtype=np.int64)])
    )


def page_candidates(dataset: Dataset, targets: Targets) -> Candidates:
    """Each target among the items of its page that were not clicked; targets on pages that show
    nothing else are left out."""
    d = dataset
    most = int((d.pv_end - d.pv_start)[targets.page].sum())
    offsets, items = np.zeros(len(targets) + 1, np.int64), np.zeros(most, np.int32)
    _page_items(
        targets.item,
        targets.page,
        d.pv_start,
        d.pv_end,
        d.pv_item,
        d.pv_clicked,
        np.full(d.num_items, -1),
        offsets,
        items,
    )
    return _candidates(targets, items, offsets)


def sampled_candidates(
    dataset: Dataset,
    targets: Targets,
    count: int = 100,
    *,
    popular: bool = False,
    seed: int = 0,
) -> Candidates:
    """Each target among `count - 1` distinct items that its user had not clicked before the page
    nor clicked on it, or as many as there are.

    The draw depends on the dataset, the targets and the seed alone, so every method ranks the same
    items. Where the dataset has images, only items with one are drawn.

    Args:
        count: candidates in all, at least 2.
        popular: draws by clicks on pages of the train split, in place of uniformly; items without
            such a click are never drawn.
    """
    if count < 2:
        raise ValueError(f"count: expected at least 2 candidates, got {count}")
    d = dataset
    weight = d.item_clicks.astype(np.float64) if popular else np.ones(d.num_items)
    if d.has_images:
        weight = weight * d.images.present
    if not weight.any():
        raise ValueError(
            "candidates: expected items to "
            f"sample{' with clicks in the train split' if popular else ''}, got none"
        )
    offsets = np.zeros(len(targets) + 1, np.int64)
    items = np.zeros(len(targets) * count, np.int32)
    _sampled_items(
        np.random.default_rng(seed),
        targets.item,
        targets.page,
        d.history_start,
        d.history_end,
        d.event_item,
        d.pv_start,
        d.pv_end,
        d.pv_item,
        d.pv_clicked,
        weight,
        np.cumsum(weight),
        count - 1,
        np.full(d.num_items, -1),
        offsets,
        items,
    )
    return _candidates(targets, items, offsets)


def history_scores(
    dataset: Dataset,
    candidates: Candidates,
    embeddings: Array,
    *,
    score: str = "mean",
    reconstruction: Reconstruction | None = None,
    device: torch.device | str = "cpu",
    chunk: int = 1 << 20,
) -> Array:
    """Scores [C] float32 of all candidates: the similarity of E_j to the target's history items
    C_k, both rows of `embeddings`.

        mean:            mean_k cos(E_j, C_k)
        max:             max_k cos(E_j, C_k)
        reconstruction:  cos(R_j, E_j),  R_j = sum_k softmax_k(logit_jk) C_k, as in the loss

    logit_jk is attention_scale * E_j . C_k, or cos(E_j, C_k) / attention_temperature, or with
    attention "mean" 0; with `unit`, E and C have length 1 in all of it.

    Computed in float64 and rounded, so that equal embeddings get equal scores.

    Args:
        embeddings: [items, D]; a row that is not finite is an item without an embedding: left out
            of histories, and as a candidate NaN, as are all candidates of a target without any
            embedding in its history.
        reconstruction: settings of the score of that name; None: those that the loss has by
            default.
        chunk: numbers in the candidates' embeddings at once, which bounds the memory.

    Raises:
        ValueError: another shape, no finite row, an unknown score, or settings of another score.
    """
    reconstruction = check_score(score, reconstruction)
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
        rows, real = _padded(offsets[some], offsets[some + 1])
        items = np.where(real, candidates.items[rows], 0).astype(np.int64)
        past, known = _padded(targets.history_start[some], targets.history_end[some])
        history = np.where(known, dataset.event_item[past], 0).astype(np.int64)
        known &= have[history]
        e, c = (table[torch.from_numpy(a).to(device)].double() for a in (items, history))
        mask = torch.from_numpy(known).to(device)
        if reconstruction is None:
            found = _similarities(e, c, mask, score)
        else:
            found = _reconstructed(e, c, mask, reconstruction)
        usable = have[items] & known.any(1, keepdims=True)
        scores[rows[real]] = np.where(usable, found.float().cpu().numpy(), np.nan)[real]
    return scores


def _padded(start: Array, end: Array) -> tuple[Array, Array]:
    """The ranges [start, end) as rows of one matrix, and which of its entries are real; the others
    repeat the first."""
    step = np.arange((end - start).max())
    real = step < (end - start)[:, None]
    return np.where(real, start[:, None] + step, start[:, None]), real


def _similarities(items: Tensor, history: Tensor, known: Tensor, score: str) -> Tensor:
    """[B, P] of items [B, P, D] to history [B, H, D], where `known` [B, H]; of no meaning without
    any."""
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
