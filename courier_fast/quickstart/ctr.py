"""What the embedding adds to a click model of the simulated shoppers, and how much there is to add:
their true probabilities are known."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq

from ..ctr.cells import NONE, RANDOM, Plan, run_plan
from ..ctr.features import random_vectors
from ..ctr.impressions import Impressions, check_dataset, make_protocol
from ..ctr.plots import write_plots
from ..ctr.report import make_report, write_ctr_report
from ..data.dataset import Dataset
from ..metrics.clicks import auc

Array = npt.NDArray


def compare_ctr(
    out: Path,
    dataset: Dataset,
    embeddings: Array,
    history: int,
    advance: Callable[[float], None] = lambda share: None,
) -> dict[str, Any] | str:
    """The report of `courier-fast ctr` for DIN with the trained embedding and the random control,
    also in ctr/, with "attainable": the AUC of the true probabilities, and "summary", a sentence.
    In place of it why it cannot be made, for too small a crowd."""
    try:
        check_dataset(dataset)
        protocol = make_protocol(dataset, "shared")
    except ValueError as error:
        return str(error)
    tables = {"trained": [embeddings], RANDOM: [random_vectors(*embeddings.shape)]}
    plan = Plan(
        dataset,
        tables,
        ["din"],
        [NONE, "similarity"],
        [protocol],
        seeds=1,
        history=history,
    )
    cells, ended = sum(len(plan.cells(group)) for group in plan.groups()), itertools.count(1)
    run_plan(plan, out / "ctr", threads=2, ended=lambda _: advance(next(ended) / cells))
    report = make_report(plan, out / "ctr")
    shown = Impressions(dataset, "test", history=history)
    report["attainable"] = auc(shown.clicked, truth_of(out, shown))
    report["summary"] = sentence(report)
    write_ctr_report(report, out / "ctr")
    write_plots(report, out / "ctr")
    return report


def truth_of(out: Path, shown: Impressions) -> Array:
    """[n] true click probabilities, from truth.npy, whose rows are those of views.parquet."""
    views, d = pq.read_table(out / "views.parquet").to_pydict(), shown.dataset
    rows = zip(views["user_id"], views["timestamp"], views["item_id"], strict=True)
    place = {key: i for i, key in enumerate(rows)}
    users, items = d.user_ids.to_pylist(), d.item_ids.to_pylist()
    found = [
        place[users[u], t, items[i]]
        for u, t, i in zip(
            shown.user.tolist(), shown.time.tolist(), shown.item.tolist(), strict=True
        )
    ]
    return np.load(out / "truth.npy")[found]


def sentence(report: dict[str, Any]) -> str:
    """The table in a line: ids, the better form of the embedding, and how much of the way to the
    attainable AUC that is."""
    rows = report["tables"][0]["rows"]
    base = next(r for r in rows if r["form"] == NONE)["auc"]["value"]
    best = max((r for r in rows if r["embedding"] == "trained"), key=lambda r: r["auc"]["value"])
    d, most = best["difference"]["auc"], report["attainable"]
    way = (best["auc"]["value"] - base) / (most - base) if most > base else float("nan")
    return (
        f"A click model (DIN) on ids has an AUC of {base:.3f}; the embedding as {best['form']} "
        f"adds {d['value']:+.3f} ({d['low']:+.3f} to "
        f"{d['high']:+.3f}): {way:.0%} of the way to {most:.3f}, "
        "that of the shoppers' true probabilities."
    )
