"""What each section of the report shows, as the template takes it; None where it is nothing."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..data.dataset import Dataset
from ..evaluate.scores import ClickLogits, Reconstruction, history_scores
from ..evaluate.targets import find_targets, sampled_candidates
from ..files import read_json
from ..metrics.ranks import bootstrap_means, count_ranks, interval
from ..train.config import Config
from ..train.journal import parsed
from ..train.monitor import effective_rank, uniformity
from .charts import curve, dots
from .text import MINUS, TITLES, name_of, number, percent

Array = npt.NDArray

MOST_CATEGORIES = 20
POPULARITY = (
    ("no click", 0, 0),
    ("1 to 4 clicks", 1, 4),
    ("5 to 19 clicks", 5, 19),
    ("20 clicks or more", 20, np.inf),
)
KINDS = {
    "unclicked": "without a click",
    "all_clicked": "with nothing but clicks",
    "cut": "cut to --page-size",
}
LOSSES = {
    "reconstruction": "loss_rec",
    "click prediction": "loss_pred",
    "click sequence": "loss_seq",
}
SPLITS = {"train": "learn from", "validation": "choose by", "test": "test on"}


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none where it is not there."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text("utf-8", "replace").splitlines() if path.is_file() else []
    found = (parsed(line) for line in lines)
    return [line for line in found if line is not None]


def curves(journal: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The training curves that can be drawn from the journal."""

    def points(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in journal if line.get(key) is not None]

    charts = (
        ("Loss", "Lower is better.", LOSSES),
        (
            "Top-1 of the batch",
            "Share of reconstructions nearest to their own item, among all items of the batch.",
            {"top-1": "top1"},
        ),
        (
            "Alignment and uniformity",
            "Alignment falls as reconstructions meet their items; "
            "uniformity falls as items spread out.",
            {"alignment": "alignment", "uniformity": "uniformity"},
        ),
        (
            "Effective rank",
            "Directions that a batch of embeddings uses; near 1 it has collapsed.",
            {"effective rank": "effective_rank"},
        ),
    )
    drawn = (curve(t, note, {n: points(k) for n, k in keys.items()}) for t, note, keys in charts)
    return [chart for chart in drawn if chart is not None]


def health(
    dataset: Dataset, embeddings: Array, journal: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Signs of collapse over the whole catalogue, and damaged images."""
    rows = torch.from_numpy(np.asarray(embeddings, np.float32))
    rows = rows[rows.isfinite().all(1)]
    rank, spread = float(effective_rank(rows)), float(uniformity(rows))
    damaged = next(
        (x["damaged_share"] for x in reversed(journal) if x.get("damaged_share") is not None), 0.0
    )
    # A constant embedding has rank 0 and uniformity 0; one line of items has rank 1.
    collapsed = rank < 2 or spread > -0.05
    return {
        "collapsed": collapsed,
        "facts": [
            (
                "Effective rank",
                f"{number(rank, 1)} of {embeddings.shape[1]}",
                "directions that the catalogue's embeddings use",
            ),
            (
                "Uniformity",
                number(spread, 2),
                "0 where all items are the same point, "
                f"about {MINUS}4 where they are spread evenly",
            ),
            ("Damaged images", percent(damaged), "replaced by a neutral picture while training"),
            (
                "Items with an image",
                f"{int(dataset.images.present.sum()):,} of {dataset.num_items:,}",
                "in the dataset",
            ),
        ],
    }


def ranking_tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A table per kind of candidates: metrics as columns, methods as rows, the main one first."""
    tables = []
    for kind, found in results["sets"].items():
        rows_of: Mapping[str, Any] = found["methods"]
        metrics = list(next(iter(rows_of.values())))
        # Where k reaches all candidates every method hits: nothing to compare.
        metrics = [m for m in metrics if any(cells[m]["mean"] != 1 for cells in rows_of.values())]
        rows = [
            {
                "name": name_of(method),
                "own": method == results["settings"]["main"],
                "cells": [
                    (
                        number(cells[m]["mean"]),
                        f"{number(cells[m]['low'])} to {number(cells[m]['high'])}",
                    )
                    for m in metrics
                ],
            }
            for method, cells in rows_of.items()
        ]
        title = f"The clicked item against {TITLES.get(kind, kind)}"
        candidates = number(found["mean_candidates"], 1)
        note = (
            f"{found['pages']:,} pages of {found['users']:,} users, "
            f"{candidates} candidates on average"
        )
        tables.append({"title": title, "note": note, "metrics": metrics, "rows": rows})
    return tables


def slice_charts(
    dataset: Dataset,
    embeddings: Array,
    settings: Mapping[str, Any],
    *,
    history: int,
    seed: int,
    click: ClickLogits | None = None,
) -> list[dict[str, Any]]:
    """AUC of held-out clicks among items drawn uniformly, by category and by training clicks of the
    clicked item, with intervals over users. A click's AUC is the share of the other candidates that
    it scores above; `settings` are those of the results, `click` the head of the score "click"."""
    split, score = settings.get("split", "test"), settings.get("score", "mean")
    how = settings.get("reconstruction")
    reconstruction = Reconstruction(**how) if how else None
    targets = find_targets(dataset, split, history)
    drawn = sampled_candidates(dataset, targets, 100, seed=seed)
    scores = history_scores(
        dataset, drawn, embeddings, score=score, reconstruction=reconstruction, click=click
    )
    auc, item = count_ranks(scores, drawn.offsets).auc(), drawn.targets.item
    user = dataset.page_user[drawn.targets.page]
    categories = [dataset.categories[int(i)].as_py() or "" for i in item]
    common = [name for name, _ in Counter(n for n in categories if n).most_common(MOST_CATEGORIES)]
    by_category = [(name, np.array([c == name for c in categories])) for name in common]
    if len(common) > 1:
        rest = ~np.any([rows for _, rows in by_category], axis=0)
        by_category.append(("other categories", rest))
    clicks = dataset.item_clicks[item]
    by_clicks = [(text, (clicks >= low) & (clicks <= high)) for text, low, high in POPULARITY]
    charts = []
    for title, groups in (
        ("By category of the clicked item", by_category if len(common) > 1 else []),
        ("By clicks of the item in training", by_clicks),
    ):
        rows = []
        for name, chosen in groups:
            kept = chosen & np.isfinite(auc)
            if kept.any():
                means = bootstrap_means(auc[kept, None], user[kept], seed=seed)
                low, high = interval(means[:, 0])
                rows.append(
                    (f"{name} ({kept.sum():,})", float(auc[kept].mean()), float(low), float(high))
                )
        if rows:
            if groups is by_category:
                rows.sort(key=lambda row: -row[1])
            charts.append({"title": title} | dots(rows, start=min(0.5, *(row[2] for row in rows))))
    return charts


def summary(dataset: Dataset) -> dict[str, Any]:
    """What `prepare` read, kept and dropped, by its report.json; the splits' times."""
    about = dataset.report
    facts, dropped = [], []
    for name in ("events", "impressions", "histories", "pages"):
        found = about.get(name)
        if found:
            read = found.get("read", found.get("candidates"))
            kept = found.get("kept", read - sum(found["dropped"].values()))
            # Events that given pages make are not among those read.
            said = "Items of given histories" if name == "histories" else name.capitalize()
            facts.append((said, f"{kept:,}", f"of {read:,}" if read >= kept else ""))
            dropped += [(f"{name}: {why}", f"{n:,}") for why, n in found["dropped"].items()]
            facts += [
                (f"{name.capitalize()} {what}", f"{found[n]:,}", "")
                for n, what in KINDS.items()
                if n in found
            ]
    images = about.get("images")
    if images:
        missing, damaged = len(images["missing"]), len(images["undecodable"])
        dropped += [
            (f"images: {why}", f"{n:,}")
            for why, n in (("missing", missing), ("undecodable", damaged))
            if n
        ]
    for name, split in about.get("splits", {}).items():
        when = f"{split['from'][:10]} to {split['to'][:10]}" if "from" in split else ""
        facts.append((f"Pages to {SPLITS.get(name, name)}", f"{split['pages']:,}", when))
    return {"facts": facts, "dropped": dropped}


def sweep_pictures(folder: Path) -> list[dict[str, str]]:
    """The plots of `courier-fast sweep` as data URIs; FileNotFoundError where there is no sweep."""
    if not (folder / "results.parquet").is_file():
        raise FileNotFoundError(
            f"--sweep: expected the folder of a sweep, with results.parquet, got {folder}"
        )
    return _pictures(folder)


def _pictures(folder: Path) -> list[dict[str, str]]:
    """Its PNG files as data URIs."""
    return [
        {
            "title": path.stem,
            "src": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode(),
        }
        for path in sorted(folder.glob("*.png"))
    ]


def settings_of(run_dir: Path) -> list[tuple[str, str]]:
    """The run's settings that are not the defaults, by its config.toml."""
    path = run_dir / "config.toml"
    if not path.is_file():
        return []
    config, found = Config.load(path), []
    for section, values in config:
        for name, value in values:
            field = type(values).model_fields[name]
            if value != field.default and (section, name) not in (
                ("run", "out"),
                ("data", "dataset"),
            ):
                found.append((f"{section}.{name}", str(value)))
    return found


def ctr_tables(folder: Path) -> dict[str, Any]:
    """The tables of `courier-fast ctr`, with the slices and pictures; FileNotFoundError where there
    are none."""
    path = folder / "ctr.json"
    if not path.is_file():
        raise FileNotFoundError(
            "--ctr: expected the folder of a finished `courier-fast ctr`, with ctr.json, "
            f"got {folder}"
        )
    from ..ctr.report import HEAD, about_table, cells_of, notes_of, slice_cells

    report, tables = read_json(path), []
    for table in report["tables"]:
        name = f"{table['model']}, {table['protocol']}"
        rows = [cells_of(row, table["made_pages"]) for row in table["rows"]]
        tables.append({"title": name, "note": about_table(table), "head": HEAD, "rows": rows})
        for kind in dict.fromkeys(s["kind"] for s in table["slices"]):
            head, rows = slice_cells(kind, [s for s in table["slices"] if s["kind"] == kind])
            tables.append({"title": f"{name}, by {kind}", "note": "", "head": head, "rows": rows})
    notes = [report["summary"]] if "summary" in report else []
    notes += [note.strip("*") for note in notes_of(report)]
    return {"notes": notes, "tables": tables, "pictures": _pictures(folder)}
