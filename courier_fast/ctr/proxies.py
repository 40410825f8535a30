"""Proxy metrics: how well what is cheap to know of an embedding foretells what it adds to a CTR
model, over many embeddings, such as the cells of a sweep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..data.batches import BatchPlan
from ..data.dataset import Dataset
from ..data.loader import Features, Loader
from ..evaluate.comparison import draw_candidates, page_table
from ..evaluate.methods import Method
from ..evaluate.targets import find_targets
from ..metrics.clicks import auc
from ..nearest import exact_search, normalised
from ..train.config import LossConfig
from ..train.monitor import effective_rank
from ..train.objective import Objective
from .cells import NONE, RANDOM, Plan, mean_predictions
from .impressions import Impressions, category_codes

Array = npt.NDArray

LEAST = 4  # embeddings: of fewer a rank correlation says nothing
PAGES = 128  # of a batch whose L_rec is looked at
NEIGHBOURS = 10
SAMPLES, HALVES = 2000, 20
ABOUT = (
    "Proxy metrics of the embeddings, on validation, against what each embedding adds to AUC: "
    "Spearman's rank correlation over the embeddings (95 %, bootstrap over embeddings), positive "
    "where the better one adds more; and what the embedding adds that the metric would choose. "
    '"The gain, on other users" is the correlation of the gain of one half of the users with that '
    "of the other: how far the gain itself can be told apart here."
)
# What is cheap, and whether more of it is better.
METRICS = {
    "HR@10": True,
    "AUC": True,
    "same category": True,
    "effective rank": True,
    "L_rec": False,
}


class Proxies:
    """Numbers of embeddings on the validation pages, all of the same pages and candidates.

    "HR@10" and "AUC" of the mean cosine to the history, among uniform candidates, as `evaluate`
    has them; "same category": the share of the 10 nearest items that are of an item's category;
    "effective rank" as `report` has it; "L_rec": the trainer's reconstruction loss by its default
    settings.
    """

    def __init__(self, dataset: Dataset, history: int = 20) -> None:
        self.dataset, self.history = dataset, history
        targets = find_targets(dataset, "validation", history)
        self.drawn = draw_candidates(dataset, targets, "sampled", 100, 0)
        self.category, names = category_codes(dataset)
        self.unknown = len(names) - 1

    def of(self, embeddings: Array) -> dict[str, float]:
        """{name: value} of embeddings [items, D]; rows that are not finite are no embedding."""
        have = np.isfinite(embeddings).all(1)
        ranked, _ = page_table(self.dataset, Method("", embeddings), self.drawn, [10])
        return {
            "HR@10": float(ranked["HR@10"].mean()),
            "AUC": float(np.nanmean(ranked["AUC"])),
            "same category": self._same_category(embeddings, have),
            "effective rank": float(effective_rank(torch.from_numpy(embeddings[have]))),
            "L_rec": self._loss(np.where(have[:, None], embeddings, 0)),
        }

    def _same_category(self, embeddings: Array, have: Array) -> float:
        category = self.category[have]
        rows = normalised(embeddings[have])
        near, _ = exact_search(rows, rows, NEIGHBOURS, own=np.arange(len(rows)))
        known = category != self.unknown
        return float((category[near] == category[:, None])[known].mean())

    @torch.no_grad()
    def _loss(self, embeddings: Array) -> float:
        plan = BatchPlan(
            self.dataset, split="validation", pages=PAGES, history=self.history, shuffle=False
        )
        loader = Loader(plan, Features(embeddings, torch.device("cpu")))
        objective = Objective(LossConfig(sequence_weight=0), embeddings.shape[1])
        total = anchors = 0.0
        for step in range(plan.steps(0)):
            batch = loader.load(0, step)
            n = objective.anchors(batch.plan)
            total += n * float(objective(batch.images, batch, n, 0, stats=False).rec)
            anchors += n
        return total / anchors


def judge_proxies(plan: Plan, out: Path, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each table and form of a report, by metric: "correlation", Spearman's, of the metric with
    the gain in AUC over the embeddings, so that 1 says the better the more, with "low" and "high"
    (95 %, bootstrap over embeddings); "chosen", the gain of the embedding that the metric would
    choose. Beside them "best" and "mean", the gains; "again": the correlation of the gain with
    itself, both of one half of the users, which no metric can be expected to pass by much.

    ValueError for fewer than four embeddings.
    """
    names = ranked_names(plan)
    proxies = Proxies(plan.dataset, plan.history)
    values: dict[str, Array] = {}
    for name in names:
        found = [proxies.of(table) for table in plan.embeddings[name]]
        values[name] = np.array([np.mean([x[m] for x in found]) for m in METRICS])
    metrics = np.stack([values[name] for name in names], 1)
    shown = Impressions(plan.dataset, report["split"], history=plan.history)
    rates = []
    for table in report["tables"]:
        for form in (f for f in plan.forms if f != NONE):
            gains = {
                row["embedding"]: row["difference"]["auc"]["value"]
                for row in table["rows"]
                if row["form"] == form
            }
            gain = np.array([gains[name] for name in names])
            of = partial(mean_predictions, plan, out, report["split"], table["model"])
            none = of(NONE, NONE, table["protocol"])
            read = [of(form, name, table["protocol"]) for name in names]
            rates.append(
                {
                    "model": table["model"],
                    "protocol": table["protocol"],
                    "form": form,
                    "embeddings": {
                        name: dict(zip(METRICS, values[name].tolist(), strict=True))
                        | {"gain": gains[name]}
                        for name in names
                    },
                    "metrics": _rates(metrics, gain),
                    "best": float(gain.max()),
                    "mean": float(gain.mean()),
                    "again": _again(shown, none, read),
                }
            )
    return rates


def ranked_names(plan: Plan) -> list[str]:
    """The embeddings that are compared; ValueError for fewer than four."""
    names = [name for name in plan.embeddings if name != RANDOM]
    if len(names) < LEAST:
        raise ValueError(
            f"proxies: expected at least {LEAST} embeddings to rank, as those of a sweep, got "
            f"{len(names)}"
        )
    return names


def _rates(metrics: Array, gain: Array, seed: int = 0) -> dict[str, dict[str, float]]:
    """By name of metrics [M, E] and gains [E]."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(0, len(gain), (SAMPLES, len(gain)))
    found = {}
    for (name, more), value in zip(METRICS.items(), metrics, strict=True):
        good = value if more else -value
        some = [spearman(good[d], gain[d]) for d in drawn]
        low, high = np.nanquantile(some, (0.025, 0.975))
        found[name] = {
            "correlation": spearman(good, gain),
            "low": float(low),
            "high": float(high),
            "chosen": float(gain[np.argmax(good)]),
        }
    return found


def spearman(x: Array, y: Array) -> float:
    """Rank correlation of [n] and [n], ties at their mean rank; NaN where all of one are equal."""
    from scipy.stats import rankdata

    ranks = np.stack([rankdata(x), rankdata(y)])
    ranks -= ranks.mean(1, keepdims=True)
    length = np.sqrt((ranks**2).sum(1).prod())
    return float(ranks[0] @ ranks[1] / length) if length else float("nan")


def _again(shown: Impressions, none: Array, read: Sequence[Array], seed: int = 0) -> float:
    """Mean rank correlation of the gains of one half of the users with those of the other."""
    users, of = np.unique(shown.user, return_inverse=True)
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(HALVES):
        half = rng.permutation(len(users)) < len(users) // 2
        gains = []
        for mask in (half[of], ~half[of]):
            clicked = shown.clicked[mask]
            if clicked.all() or not clicked.any():
                return float("nan")
            weight = None if shown.weight is None else shown.weight[mask]
            found_auc = [auc(clicked, p[mask], weight=weight) for p in (none, *read)]
            gains.append(np.array(found_auc[1:]) - found_auc[0])
        found.append(spearman(*gains))
    return float(np.mean(found))


def proxy_table(rates: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines for people."""
    head = ["model", "form", "proxy", "rank correlation with the gain", "gain of its choice"]
    lines = []
    for rate in rates:
        where = [f"{rate['model']}, {rate['protocol']}", rate["form"]]
        for name, x in rate["metrics"].items():
            correlation = f"{x['correlation']:+.2f} ({x['low']:+.2f} to {x['high']:+.2f})"
            lines.append([*where, name, correlation, f"{x['chosen']:+.4f}"])
        lines.append([*where, "the gain, on other users", f"{rate['again']:+.2f}", ""])
        gains = f"{rate['best']:+.4f}, {rate['mean']:+.4f}"
        lines.append([*where, "the best, and the mean of all", "", gains])
    return head, lines
