"""Baselines on the same pages, and the comparison of all methods with intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..data.dataset import Dataset
from ..data.embeddings import check_embeddings
from ..metrics.ranks import bootstrap_means, count_ranks, interval, page_values
from .methods import Method
from .scores import Reconstruction, check_score, history_scores
from .targets import (
    CANDIDATES,
    Candidates,
    Targets,
    find_targets,
    page_candidates,
    sampled_candidates,
)

Array = npt.NDArray


def compare(
    dataset: Dataset,
    methods: Sequence[Method],
    *,
    split: str = "test",
    candidates: Sequence[str] = ("page", "sampled"),
    count: int = 100,
    k: Sequence[int] = (1, 5, 10),
    history: int = 20,
    score: str = "mean",
    reconstruction: Reconstruction | None = None,
    bootstrap: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Ranks each held-out click by every method; the first method is the main one, the others are
    compared with it.

    Values are means over pages, intervals are 95 % percentile intervals of a bootstrap over users
    (see metrics/ranks.py). All methods rank the same candidates and share the bootstrap's draws, so
    differences are paired by user.

    Args:
        candidates: "page": the page's items that were not clicked; "sampled": items the user had
            not clicked, drawn uniformly; "popular": the same, drawn by popularity.
        count: candidates in all of "sampled" and "popular".
        k: of HR@k.
        history: most recent events that candidates are compared with.
        score: "mean", "max" or "reconstruction" of every method with embeddings, see
            `history_scores`; "click" of those with a click head, and "mean" of the others.
        reconstruction: settings of the score of that name, the same for every method; None: those
            that the loss has by default.
        bootstrap: samples of the bootstrap.

    Returns:
        A dict fit for JSON: `settings`; `clicks` of the split, with and without a history;
        `missing` {name: items without an embedding}; and by candidate set in `sets`: numbers of
        pages, clicks and users that were ranked and mean number of candidates; `methods` {name:
        {metric: {"mean", "low", "high"}}}; `differences` {name: ...}, main minus other, in the same
        form; `unranked` {name: clicks without an embedding of the item or of its history}, which
        come last or tie.

    Raises:
        ValueError: methods of one name or of another number of items, an unknown split, candidate
            set or score, settings of another score, score "click" with a first method that has no
            click head, nothing to rank.
    """
    _check_methods(methods, dataset)
    unknown = sorted(set(candidates) - set(CANDIDATES))
    if unknown or not candidates:
        raise ValueError(f"candidates: expected some of {', '.join(CANDIDATES)}, got {unknown}")
    reconstruction = check_score(score, reconstruction)
    if score == "click" and methods[0].click is None:
        raise ValueError(
            "score click: expected a click head with the embeddings of the first method, got none "
            f"with {methods[0].name!r}"
        )
    if not k or min(k) < 1:
        raise ValueError(f"k: expected numbers of at least 1, got {list(k)}")
    targets = find_targets(dataset, split, history)
    pages = dataset.split(split)
    rows = slice(int(dataset.pv_start[pages.start]), int(dataset.pv_end[pages.stop - 1]))
    clicks = int(dataset.pv_clicked[rows].sum())
    sets: dict[str, Any] = {}
    for name in dict.fromkeys(candidates):
        drawn = draw_candidates(dataset, targets, name, count, seed)
        values, unranked = {}, {}
        for m in methods:
            values[m.name], unranked[m.name] = page_table(
                dataset,
                m,
                drawn,
                sorted(set(k)),
                score=score,
                reconstruction=reconstruction,
                device=device,
            )
        user = dataset.page_user[np.unique(drawn.targets.page)]
        sets[name] = {
            "pages": len(user),
            "clicks": len(drawn.targets),
            "users": len(np.unique(user)),
            "mean_candidates": len(drawn.items) / len(drawn.targets),
            **_means(values, user, bootstrap, seed),
            "unranked": unranked,
        }
    return {
        "settings": {
            "dataset": str(dataset.path),
            "split": split,
            "main": methods[0].name,
            "count": count,
            "k": sorted(set(k)),
            "history": history,
            "score": score,
            "reconstruction": asdict(reconstruction) if reconstruction else None,
            "bootstrap": bootstrap,
            "seed": seed,
            "mean": "over pages",
            "interval": "95 %, percentile bootstrap over users",
        },
        "clicks": clicks,
        "sets": sets,
        "missing": {m.name: _missing(m) for m in methods},
    }


def _check_methods(methods: Sequence[Method], dataset: Dataset) -> None:
    names = [method.name for method in methods]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"methods: expected at least one, with different names, got {names}")
    for method in methods:
        if method.embeddings is not None:
            check_embeddings(method.embeddings, dataset)
        elif method.scores is not None and method.scores.shape != (dataset.num_items,):
            raise ValueError(
                f"{method.name}: expected scores [{dataset.num_items}] (one per item of the "
                f"dataset), got {list(method.scores.shape)}"
            )


def draw_candidates(
    dataset: Dataset, targets: Targets, name: str, count: int, seed: int
) -> Candidates:
    """The candidates of a set, by its name; see `compare`."""
    if name == "page":
        return page_candidates(dataset, targets)
    return sampled_candidates(dataset, targets, count, popular=name == "popular", seed=seed)


def _missing(method: Method) -> int:
    """Items without an embedding."""
    if method.embeddings is None:
        return 0
    return int((~np.isfinite(method.embeddings).all(1)).sum())


def page_table(
    dataset: Dataset,
    method: Method,
    drawn: Candidates,
    k: Sequence[int],
    *,
    score: str = "mean",
    reconstruction: Reconstruction | None = None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Array], int]:
    """Each metric's value by page with a target [pages], pages in order; and the clicks that could
    not be ranked."""
    if method.embeddings is None:
        assert method.scores is not None
        scores = np.asarray(method.scores)[drawn.items]
    else:
        by_click = score == "click"
        scores = history_scores(
            dataset,
            drawn,
            method.embeddings,
            score="mean" if by_click and method.click is None else score,
            reconstruction=reconstruction,
            click=method.click if by_click else None,
            device=device,
        )
    pages, page = np.unique(drawn.targets.page, return_inverse=True)
    values = page_values(count_ranks(scores, drawn.offsets), page, len(pages), k)
    return values, int(np.isnan(scores[drawn.offsets[:-1]]).sum())


def _means(
    values: Mapping[str, Mapping[str, Array]], user: Array, bootstrap: int, seed: int
) -> dict[str, Any]:
    """Means and intervals of each method's {metric: [pages]}, and of the first minus each other."""
    metrics = list(next(iter(values.values())))
    table = np.stack([np.stack(list(x.values()), 1) for x in values.values()], 1)
    means = table.mean(0)  # of [pages, methods, metrics]
    samples = bootstrap_means(
        table.reshape(len(table), -1), user, samples=bootstrap, seed=seed
    ).reshape(bootstrap, *means.shape)

    def named(mean: Array, drawn: Array) -> dict[str, dict[str, float]]:
        low, high = interval(drawn)
        return {
            metric: {"mean": float(mean[i]), "low": float(low[i]), "high": float(high[i])}
            for i, metric in enumerate(metrics)
        }

    return {
        "methods": {n: named(means[i], samples[:, i]) for i, n in enumerate(values)},
        "differences": {
            n: named(means[0] - means[i], samples[:, 0] - samples[:, i])
            for i, n in enumerate(values)
            if i
        },
    }
