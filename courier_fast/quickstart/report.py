"""Writes report.html: one file with pictures, curves and numbers, which needs nothing else to be read.

`results` is what `courier_fast.evaluate.baselines.compare` gives; its main method is the one that the report is about.
"""

from __future__ import annotations

import base64
import io
import json
import math
import os
import platform
import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image, ImageOps

from .. import __version__, reconstruct
from ..data.dataset import Dataset
from ..evaluate.ranking import Reconstruction
from ..train.monitor import effective_rank, uniformity

Array = npt.NDArray

TITLES = {
    "page": "the other items of the page",
    "sampled": "items drawn uniformly",
    "popular": "items drawn by popularity",
}
MINUS, NONE, SPACE = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{NO-BREAK SPACE}"
THUMBNAIL = 112  # pixels: twice the side they are shown at on most screens


# ---- numbers ------------------------------------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A number as text, with a typographic minus; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.{digits}f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    return (
        NONE if value is None or not math.isfinite(value) else number(100 * value, 1) + SPACE + "%"
    )


def name_of(method: str) -> str:
    """A method's name for readers: "Pixels 8 x 8, standardised"."""
    method = re.sub(r"(?<=\d)x(?=\d)", " \N{MULTIPLICATION SIGN} ", method)
    return method[:1].upper() + method[1:]


def headline(results: Mapping[str, Any], candidates: str, metric: str) -> str:
    """The result in a sentence: the main method, raw pixels and the backbone before training, each at its better of raw and standardised."""
    methods = results["sets"][candidates]["methods"]

    def value(method: str) -> float:
        return methods[method][metric]["mean"]

    best: dict[str, str] = {}
    for method in methods:
        kind = method.split()[0]
        if method != results["settings"]["main"] and kind in ("pixels", "untrained", "pre-trained"):
            best[kind] = max(best.get(kind, method), method, key=value)
    texts = [
        f"{'raw pixels' if kind == 'pixels' else f'the {kind} network'} on {percent(value(method))}"
        for kind, method in best.items()
    ]
    rest = f", {' and '.join(texts)}" if texts else ""
    return f"The trained embedding ranks the clicked item first on {percent(value(results['settings']['main']))} of held-out pages{rest}."


def margins(results: Mapping[str, Any], candidates: str, metric: str) -> list[dict[str, str]]:
    """The main method's lead over each other one in percentage points, the smallest first."""
    rows = []
    for method, cells in results["sets"][candidates]["differences"].items():
        value, low, high = (100 * cells[metric][k] for k in ("mean", "low", "high"))
        text = (
            f"{'+' if value > 0 else ''}{number(value, 1)} ({number(low, 1)} to {number(high, 1)})"
        )
        rows.append((value, {"name": name_of(method), "text": text}))
    return [row for _, row in sorted(rows, key=lambda entry: entry[0])]


# ---- drawings -----------------------------------------------------------------------------------------------------


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover [low, high]."""
    span = high - low or abs(high) or 1.0
    raw = span / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def curve(
    title: str, note: str, series: Mapping[str, Sequence[tuple[float, float]]]
) -> dict[str, Any] | None:
    """A small line chart as SVG, its colours those of the page; None where nothing is to be drawn."""
    series = {
        n: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for n, points in series.items()
    }
    series = {n: points for n, points in series.items() if points}
    if not series:
        return None
    width, height, left, bottom, top, right = 340, 190, 42, 24, 10, 12
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    rows = _ticks(min(ys), max(ys))
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1), rows[0], rows[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            top + (y1 - y) / (y1 - y0) * (height - top - bottom),
        )

    decimals = max(0, -math.floor(math.log10(rows[1] - rows[0]) + 1e-9))
    if round((rows[1] - rows[0]) * 10**decimals, 6) % 1:
        decimals += 1
    parts = []
    for y in rows:
        _, py = place(x0, y)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}"/>'
        )
        parts.append(
            f'<text x="{left - 8}" y="{py + 3.5:.1f}" text-anchor="end">{number(y, decimals)}</text>'
        )
    for x, anchor in ((x0, "start"), (x1, "end")):
        px, _ = place(x, y0)
        label = f"step {x:.0f}" if anchor == "end" else f"{x:.0f}"
        parts.append(f'<text x="{px:.1f}" y="{height - 6}" text-anchor="{anchor}">{label}</text>')
    for i, points in enumerate(series.values()):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in points))
        parts.append(f'<polyline class="s{i}" points="{path}"/>')
        px, py = place(*points[-1])
        parts.append(f'<circle class="s{i}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>')
    last = "; ".join(
        f"{n} {number(p[0][1], 2)} to {number(p[-1][1], 2)}" for n, p in series.items()
    )
    return {
        "title": title,
        "note": note,
        "legend": list(series) if len(series) > 1 else [],
        "alt": f"{title} over the steps: {last}",
        "svg": Markup("".join(parts)),  # our own numbers alone
        "width": width,
        "height": height,
    }


def forest(results: Mapping[str, Any], candidates: str, metric: str) -> dict[str, Any]:
    """Methods as dots with their intervals on one axis, places in percent of its width; the best first."""
    main = results["settings"]["main"]
    rows = [
        {"method": method} | cells[metric]
        for method, cells in results["sets"][candidates]["methods"].items()
        if math.isfinite(cells[metric]["mean"])
    ]
    rows.sort(key=lambda row: -row["mean"])
    ticks = _ticks(0.0, max([row["high"] for row in rows], default=1.0))
    end = ticks[-1]
    return {
        "rows": [
            {
                "name": name_of(row["method"]),
                "own": row["method"] == main,
                "text": percent(row["mean"]),
                "at": round(100 * row["mean"] / end, 2),
                "from": round(100 * row["low"] / end, 2),
                "width": round(100 * (row["high"] - row["low"]) / end, 2),
            }
            for row in rows
        ],
        "ticks": [{"text": f"{100 * t:g}", "at": round(100 * t / end, 2)} for t in ticks],
    }


def thumbnail(dataset: Dataset, item: int, side: int = THUMBNAIL) -> str | None:
    """An item's picture as a data URI: a small JPEG, its centre cut square. None where there is none that can be read."""
    try:
        with Image.open(io.BytesIO(dataset.images[item].tobytes())) as image:
            small = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side))
    except (OSError, ValueError, SyntaxError):
        return None
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


class Pictures:
    """What the template needs to show an item: picture, id, category."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __call__(self, item: int, **more: Any) -> dict[str, Any]:
        category = self.dataset.categories[item].as_py()
        return {
            "id": self.dataset.item_ids[item].as_py(),
            "category": category or "",
            "src": thumbnail(self.dataset, item),
            **more,
        }


# ---- what the embedding does --------------------------------------------------------------------------------------


def attention_examples(
    dataset: Dataset,
    embeddings: Array,
    *,
    history: int,
    count: int,
    seed: int,
    how: Reconstruction | None = None,
) -> list[dict[str, Any]]:
    """Clicked items of random test pages, each with the weights of its reconstruction over the page's history, largest first."""
    how = how or Reconstruction()
    pages = np.array(dataset.split("test"), np.int64)
    length = np.minimum(dataset.history_end[pages] - dataset.history_start[pages], history)
    # A weight says something where there is something to choose from.
    enough = pages[length >= min(6, length.max(initial=0))]
    chosen = np.random.default_rng(seed).permutation(enough)[:count]
    table = torch.from_numpy(np.ascontiguousarray(embeddings, np.float32))
    if how.unit:
        table = torch.nn.functional.normalize(table, dim=1)
    known = np.isfinite(embeddings).all(1)
    show = Pictures(dataset)
    found = []
    for page in chosen.tolist():
        pv = slice(dataset.pv_start[page], dataset.pv_end[page])
        clicked = dataset.pv_item[pv][dataset.pv_clicked[pv]]
        clicked = clicked[known[clicked]]
        end = int(dataset.history_end[page])
        past = dataset.event_item[max(int(dataset.history_start[page]), end - history) : end]
        past = past[known[past]]
        if not len(clicked) or not len(past):
            continue
        item = int(clicked[0])
        _, weights = reconstruct(
            torch.tensor([[item]]), torch.from_numpy(past.astype(np.int64))[None],
            embeddings=table, return_weights=True, impl="reference", **how.arguments,
        )  # fmt: skip
        w = weights.flatten().numpy()
        order = np.argsort(-w, kind="stable")
        rows = [
            show(int(past[i]), weight=float(w[i]), text=percent(float(w[i])), bar=round(100 * float(w[i] / w[order[0]]), 1))
            for i in order.tolist()
        ]  # fmt: skip
        found.append({"clicked": show(item), "history": rows})
    return found


def neighbours(
    dataset: Dataset, embeddings: Array, *, count: int, nearest: int = 6, seed: int = 0
) -> list[dict[str, Any]]:
    """Random items, of as many categories as there are, with the `nearest` others by cosine."""
    x = np.asarray(embeddings, np.float32)
    usable = dataset.images.present & np.isfinite(x).all(1)
    x = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    categories = dataset.categories.to_pylist()
    order = np.random.default_rng(seed).permutation(np.flatnonzero(usable)).tolist()
    first = {categories[i]: i for i in reversed(order)}  # of each category, the first in this order
    queries = [*first.values(), *(i for i in order if first[categories[i]] != i)][:count]
    show = Pictures(dataset)
    found = []
    for item in queries:
        cosine = np.where(usable, x @ x[item], -np.inf)
        cosine[item] = -np.inf
        near = np.argsort(-cosine, kind="stable")[: min(nearest, usable.sum() - 1)].tolist()
        found.append(
            {"query": show(item), "near": [show(i, text=number(float(cosine[i]), 2)) for i in near]}
        )
    return found


def read_journal(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none where it is not there."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("}")]


def curves(journal: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The training curves that can be drawn from the journal."""

    def points(key: str) -> list[tuple[float, float]]:
        return [(line["step"], line[key]) for line in journal if line.get(key) is not None]

    charts = (
        ("Loss", "Lower is better.", {"reconstruction": "loss_rec", "click sequence": "loss_seq"}),
        ("Top-1 of the batch", "Share of reconstructions nearest to their own item, among all items of the batch.", {"top-1": "top1"}),
        ("Alignment and uniformity", "Alignment falls as reconstructions meet their items; uniformity falls as items spread out.", {"alignment": "alignment", "uniformity": "uniformity"}),
        ("Effective rank", "Directions that a batch of embeddings uses; near 1 it has collapsed.", {"effective rank": "effective_rank"}),
    )  # fmt: skip
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
            ("Effective rank", f"{number(rank, 1)} of {embeddings.shape[1]}", "directions that the catalogue's embeddings use"),
            ("Uniformity", number(spread, 2), f"0 where all items are the same point, about {MINUS}4 where they are spread evenly"),
            ("Damaged images", percent(damaged), "replaced by a neutral picture while training"),
            ("Items with an image", f"{int(dataset.images.present.sum()):,} of {dataset.num_items:,}", "in the dataset"),
        ],
    }  # fmt: skip


# ---- the file -----------------------------------------------------------------------------------------------------


def _tables(results: Mapping[str, Any]) -> list[dict[str, Any]]:
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
                    (number(cells[m]["mean"]), f"{number(cells[m]['low'])} to {number(cells[m]['high'])}")
                    for m in metrics
                ],
            }
            for method, cells in rows_of.items()
        ]  # fmt: skip
        title = f"The clicked item against {TITLES.get(kind, kind)}"
        note = f"{found['pages']:,} pages of {found['users']:,} users, {number(found['mean_candidates'], 1)} candidates on average"
        tables.append({"title": title, "note": note, "metrics": metrics, "rows": rows})
    return tables


def _stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    """How long each stage took, and its bar in percent of the longest one's."""
    longest = max(seconds.values(), default=1.0) or 1.0
    return [
        {"name": name, "text": f"{number(s, 1)} s", "width": round(100 * s / longest, 1)}
        for name, s in seconds.items()
    ]


def write_report(
    path: str | os.PathLike[str],
    *,
    run_dir: str | os.PathLike[str],
    dataset: Dataset,
    embeddings: Array,
    results: Mapping[str, Any],
    seconds: Mapping[str, float] | None = None,
    settings: Mapping[str, Any] | None = None,
    candidates: str = "page",
    metric: str = "HR@1",
    history: int = 20,
    examples: int = 5,
    seed: int = 0,
) -> None:
    """Writes the report, a single HTML file.

    Args:
        run_dir: the run's folder, of which metrics.jsonl is read.
        embeddings: [items, D], rows as the dataset's items.
        results: of the evaluation; see the module.
        seconds: how long each stage took.
        settings: what was run, name to value, shown as it is.
        candidates, metric: which of the results the headline is about.
        history: most recent history items, as in training.
        examples: clicked items and neighbour queries that are shown.

    Raises:
        ValueError: `embeddings` has not a row per item, or `results` lacks the headline's number.
    """
    if embeddings.ndim != 2 or len(embeddings) != dataset.num_items:
        raise ValueError(
            f"embeddings: expected [{dataset.num_items}, D], a row per item, got {list(embeddings.shape)}"
        )
    try:
        results["sets"][candidates]["methods"][results["settings"]["main"]][metric]["mean"]
    except KeyError as missing:
        raise ValueError(
            f"results: expected what `compare` gives, with {metric} in the set {candidates!r}, got none: {missing} is not there"
        ) from None
    run_dir = Path(run_dir)
    journal = read_journal(run_dir)
    how = Reconstruction.of_run(run_dir) if (run_dir / "config.toml").is_file() else None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)  # fmt: skip
    template = environment.from_string(
        (files(__package__) / "report.html.jinja").read_text(encoding="utf-8")
    )
    page = template.render(
        headline=headline(results, candidates, metric),
        margins=margins(results, candidates, metric),
        forest=forest(results, candidates, metric),
        metric=metric,
        versus=TITLES.get(candidates, candidates),
        forest_title=f"{metric} against {TITLES.get(candidates, candidates)}, in percent",
        history=history,
        tables=_tables(results),
        curves=curves(journal),
        attention=attention_examples(dataset, embeddings, history=history, count=examples, seed=seed, how=how),
        neighbours=neighbours(dataset, embeddings, count=examples + 1, seed=seed),
        health=health(dataset, embeddings, journal),
        test_pages=f"{len(dataset.split('test')):,}",
        train_pages=f"{len(dataset.split('train')):,}",
        items=f"{dataset.num_items:,}",
        users=f"{len(dataset.user_ids):,}",
        stages=_stages(seconds or {}),
        total=f"{number(sum((seconds or {}).values()), 0)} s",
        settings=[(name, str(value)) for name, value in (settings or {}).items()],
        versions=[
            ("courier_fast", __version__),
            ("PyTorch", torch.__version__),
            ("Python", platform.python_version()),
            ("Machine", f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores, {torch.get_num_threads()} threads"),
        ],
        written=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
    )  # fmt: skip
    Path(path).write_text(page, encoding="utf-8")
