"""Writes report.html: one file with pictures, curves and numbers, which needs nothing else to be
read.

`results` is what `courier_fast.evaluate.comparison.compare` gives; its main method is the one that
the report is about.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from jinja2 import Environment, StrictUndefined, Template

from .. import __version__
from ..data.dataset import Dataset
from ..evaluate.scores import ClickLogits, Reconstruction
from ..files import write_atomically
from ..locations import local_path
from .charts import forest
from .items import attention_examples, map_of_items, neighbours
from .sections import (
    ctr_tables,
    curves,
    health,
    ranking_tables,
    read_journal,
    settings_of,
    slice_charts,
    summary,
    sweep_pictures,
)
from .text import TITLES, headline, margins, number

Array = npt.NDArray


@dataclass(frozen=True)
class About:
    """What the report is about, beside the results.

    Attributes:
        run_dir: the run's folder, of which metrics.jsonl and config.toml are read.
        embeddings: [items, D], rows as the dataset's items.
        ctr: folder of `courier-fast ctr`, or None.
        sweep: folder of `courier-fast sweep`, or None.
        seconds: how long each stage took.
        settings: what was run, name to value, shown as it is; None: the run's settings that are not
            the defaults.
        lead: a sentence below the headline.
        click: the click head that the results are by, where their score is "click".
    """

    dataset: Dataset
    run_dir: Path
    embeddings: Array
    ctr: Path | None = None
    sweep: Path | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, Any] | None = None
    lead: str = ""
    click: ClickLogits | None = None


def write_report(
    path: str | os.PathLike[str],
    about: About,
    results: Mapping[str, Any],
    *,
    candidates: str = "page",
    metric: str = "HR@1",
    history: int = 20,
    examples: int = 5,
    seed: int = 0,
) -> None:
    """Writes the report, a single HTML file.

    Args:
        results: of the evaluation; see the module.
        candidates, metric: which of the results the headline is about.
        history: most recent history items, as in training.
        examples: clicked items and neighbour queries that are shown.

    Raises:
        ValueError: the embeddings have not a row per item, or `results` lacks the headline's
            number.
        FileNotFoundError: there is no sweep or CTR table in the folder given.
    """
    d, embeddings = about.dataset, about.embeddings
    if embeddings.ndim != 2 or len(embeddings) != d.num_items:
        raise ValueError(
            f"embeddings: expected [{d.num_items}, D], a row per item, got {list(embeddings.shape)}"
        )
    _check_results(results, candidates, metric)
    journal = read_journal(about.run_dir)
    how, hidden = _attention_of(about.run_dir)
    versus = TITLES.get(candidates, candidates)
    page = _template().render(
        headline=headline(results, candidates, metric),
        lead=about.lead,
        margins=margins(results, candidates, metric),
        forest=forest(results, candidates, metric),
        metric=metric,
        versus=versus,
        forest_title=f"{metric} against {versus}, in percent",
        history=history,
        scored=results["settings"].get("score", "mean"),
        tables=ranking_tables(results),
        slices=slice_charts(
            d, embeddings, results["settings"], history=history, seed=seed, click=about.click
        ),
        ctr=None if about.ctr is None else ctr_tables(about.ctr),
        sweep=None if about.sweep is None else sweep_pictures(about.sweep),
        curves=curves(journal),
        attention=[]
        if hidden
        else attention_examples(d, embeddings, history=history, count=examples, seed=seed, how=how),
        attention_hidden=hidden,
        neighbours=neighbours(d, embeddings, count=examples + 1, seed=seed),
        map=map_of_items(d, embeddings, seed=seed),
        health=health(d, embeddings, journal),
        data=summary(d),
        test_pages=f"{len(d.split('test')):,}",
        train_pages=f"{len(d.split('train')):,}",
        items=f"{d.num_items:,}",
        users=f"{len(d.user_ids):,}",
        stages=_stages(about.seconds),
        total=f"{number(sum(about.seconds.values()), 0)} s",
        settings=settings_of(about.run_dir)
        if about.settings is None
        else [(n, str(v)) for n, v in about.settings.items()],
        versions=_surroundings(),
        written=datetime.now(timezone.utc).strftime("%d %B %Y, %H:%M UTC").lstrip("0"),
    )
    write_atomically(local_path(path), lambda partial: partial.write_text(page, encoding="utf-8"))


def _check_results(results: Mapping[str, Any], candidates: str, metric: str) -> None:
    try:
        results["sets"][candidates]["methods"][results["settings"]["main"]][metric]["mean"]
    except KeyError as missing:
        raise ValueError(
            f"results: expected what `compare` gives, with {metric} in the set {candidates!r}, got "
            f"none: {missing} is not there"
        ) from None


def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(
        (files(__package__) / "report.html.jinja").read_text(encoding="utf-8")
    )


def _attention_of(run_dir: Path) -> tuple[Reconstruction | None, str]:
    """The attention of a run's loss, the default without a run; or why it cannot be shown."""
    if not (run_dir / "config.toml").is_file():
        return None, ""
    try:
        return Reconstruction.of_run(run_dir), ""
    except ValueError as error:
        return None, str(error)


def _stages(seconds: Mapping[str, float]) -> list[dict[str, Any]]:
    longest = max(seconds.values(), default=1.0) or 1.0
    return [
        {"name": name, "text": f"{number(s, 1)} s", "width": round(100 * s / longest, 1)}
        for name, s in seconds.items()
    ]


def _surroundings() -> list[tuple[str, str]]:
    cores = len(os.sched_getaffinity(0))
    return [
        ("courier_fast", __version__),
        ("PyTorch", torch.__version__),
        ("Python", platform.python_version()),
        ("Machine", f"{platform.machine()}, {cores} cores, {torch.get_num_threads()} threads"),
    ]
