"""`courier-fast sweep`: a grid of training settings, each trained, embedded and evaluated; one
table with intervals, and plots.

A cell of the grid is a run in `runs/`, its items' `embeddings/` and what its evaluation gave for
each page in `cells/`: what is there is not done again.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table

from .data.dataset import Dataset
from .data.embeddings import read_embeddings
from .embed.device import add_device_arguments, device_of
from .embed.encode import encode_all
from .embed.sources import run_source
from .evaluate.click import check_click_head, click_logits_of
from .evaluate.comparison import draw_candidates, page_table
from .evaluate.methods import Method
from .evaluate.scores import SCORES, Reconstruction, check_score
from .evaluate.targets import CANDIDATES, Candidates, find_targets
from .files import array_sha256, read_json, write_atomically
from .interrupt import Stopped
from .locations import local_path
from .markdown import markdown_table
from .metrics.ranks import bootstrap_means, interval
from .option_rules import refuse
from .output import check_growing
from .train import config as training
from .train.config import Config

log = logging.getLogger(__name__)

Array = npt.NDArray

ABOUT = "sweep.json"  # checksums of the data that a folder's sweep was begun with


@dataclass(frozen=True)
class SweepCell:
    """One training run of the grid: `values` {setting: value} on its axes, and all settings."""

    values: dict[str, str]
    config: Config

    @property
    def name(self) -> str:
        """Readable, and another for other settings, also those that are not on an axis; seeds
        differ in its end alone."""
        settings = self.config.model_dump(mode="json", exclude={"run": {"out", "progress", "seed"}})
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
        parts = [f"{axis.split('.')[1]}-{value}" for axis, value in self.values.items()]
        text = re.sub(r"[^A-Za-z0-9._-]", "-", "_".join(parts))[:120]
        return f"{text}_{digest}_seed-{self.config.run.seed}".lstrip("_")

    @property
    def title(self) -> str:
        values = [f"{axis.split('.')[1]} {value}" for axis, value in self.values.items()]
        return ", ".join([*values, f"seed {self.config.run.seed}"])


def grid(path: Path | None, given: dict[str, Any], seeds: int, out: Path) -> list[list[SweepCell]]:
    """The combinations of all values, in the order given, each with a cell for every seed.

    Args:
        path: TOML file of the settings that are not in `given`, or None.
        given: {"loss.temperature": ["0.1", "0.2"], ...}; a list of one value is no axis.
        seeds: cells of a combination, with seeds from run.seed on.

    Raises:
        ValueError: a setting or combination that the trainer would refuse, before anything is
            trained.
    """
    if seeds < 1:
        raise ValueError(f"--seeds: expected at least 1, got {seeds}")
    for name in ("run.out", "run.seed"):
        if isinstance(given.get(name), list) and (name == "run.out" or len(given[name]) > 1):
            raise ValueError(
                f"--{name}: expected {'--out' if name == 'run.out' else '--seeds'} in "
                f"its place, got {given[name]}"
            )
    if len(given.get("data.dataset", [])) > 1:
        raise ValueError(f"--data.dataset: expected one, got {given['data.dataset']}")
    tuples = {n for n in given if isinstance(_default(n), tuple)}
    several = {n: v for n, v in given.items() if n not in tuples}
    axes = {n: list(dict.fromkeys(v)) for n, v in several.items()}
    fixed = {n: v[0] for n, v in axes.items() if len(v) == 1} | {n: given[n] for n in tuples}
    axes = {n: v for n, v in axes.items() if len(v) > 1}
    combinations = []
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values, strict=True))
        first = Config.load(path, fixed | chosen)
        cells = []
        for seed in range(first.run.seed, first.run.seed + seeds):
            cell = SweepCell(chosen, first.model_copy(deep=True))
            cell.config.run.seed = seed
            cell.config.run.out = out / "runs" / cell.name
            cells.append(cell)
        combinations.append(cells)
    _refuse_unused(combinations, given)
    return combinations


def _refuse_unused(
    combinations: list[list[SweepCell]], given: dict[str, Any], ready: bool = False
) -> None:
    """ValueError for settings that have no effect in any combination; `ready`: the dataset has
    embeddings."""
    found = [cells[0].config.unused(given, ready) for cells in combinations]
    refuse({n: why for n, why in found[0].items() if all(n in of for of in found)})


def _default(name: str) -> Any:
    section, _, key = name.partition(".")
    model = Config.model_fields[section].annotation
    assert isinstance(model, type) and issubclass(model, training.Section)
    return model.model_fields[key].default


@dataclass(frozen=True)
class Judge:
    """How a cell's embeddings are evaluated, the same for all; see
    `courier_fast.evaluate.comparison.compare`."""

    dataset: Dataset
    split: str
    candidates: Sequence[str]
    count: int
    k: Sequence[int]
    history: int
    score: str
    seed: int

    def __post_init__(self) -> None:
        find_targets(self.dataset, self.split, self.history)  # raises before any training
        check_score(self.score, None)
        if min(self.k) < 1:
            raise ValueError(f"--k: expected numbers of at least 1, got {list(self.k)}")

    @property
    def key(self) -> str:
        """Another for another evaluation."""
        how = [
            str(self.dataset.path),
            self.split,
            self.count,
            list(self.k),
            self.history,
            self.score,
            self.seed,
        ]
        return hashlib.sha256(json.dumps([*how, list(self.candidates)]).encode()).hexdigest()[:8]

    @cached_property
    def drawn(self) -> dict[str, Candidates]:
        """The candidates of each set, the same for every cell."""
        targets = find_targets(self.dataset, self.split, self.history)
        return {
            name: draw_candidates(self.dataset, targets, name, self.count, self.seed)
            for name in self.candidates
        }

    def values(self, embeddings: Array, run: Path) -> dict[str, Array]:
        """{"set/metric": value by page}; pages that have a target, in order."""
        reconstruction = Reconstruction.of_run(run) if self.score == "reconstruction" else None
        click = click_logits_of(run) if self.score == "click" else None
        found: dict[str, Array] = {}
        for name, drawn in self.drawn.items():
            table, _ = page_table(
                self.dataset,
                Method("cell", embeddings, click=click),
                drawn,
                self.k,
                score=self.score,
                reconstruction=reconstruction,
            )
            found |= {f"{name}/{metric}": value for metric, value in table.items()}
            found[f"{name}/user"] = self.dataset.page_user[np.unique(drawn.targets.page)]
        return found


def evaluate_cell(cell: SweepCell, judge: Judge, out: Path, args: argparse.Namespace) -> Path:
    """Trains, embeds and evaluates a cell, what of it is not done; gives the file with its values
    by page.

    Raises RuntimeError if the training diverges, KeyboardInterrupt if a signal stopped it (the run
    can go on).
    """
    from .train.encoder import load_encoder
    from .train.trainer import Trainer

    path = out / "cells" / f"{cell.name}-{judge.key}.npz"
    if path.is_file():
        return path
    trainer = Trainer(cell.config)
    try:
        if trainer.fit()["stopped"]:
            raise Stopped(trainer.status - 128)
    finally:
        trainer.close()
    run = cell.config.run.out
    device, dtype = device_of(args)
    encoder = load_encoder(run, device)
    source = run_source(encoder, run, judge.dataset, args)
    embeddings = encode_all(encoder, source, batch=args.batch, device=device, dtype=dtype)
    values = judge.values(embeddings, run)
    table = out / "embeddings" / f"{cell.name}.npy"
    about = {
        "rows": len(embeddings),
        "dim": embeddings.shape[1],
        "trained_until": encoder.about["trained_until"],
    }
    beside = table.with_name(f"{table.name}.json")
    write_atomically(beside, lambda p: p.write_text(json.dumps(about, indent=1)))
    write_atomically(table, lambda p: _save(p, np.save, embeddings))
    write_atomically(path, lambda p: _save(p, lambda file, x: np.savez(file, **x), values))
    return path


def _save(path: Path, save: Any, what: Any) -> None:
    with path.open("wb") as file:  # NumPy would append a suffix to a name
        save(file, what)


def summarise(
    combinations: list[tuple[dict[str, str], list[Path]]], bootstrap: int, seed: int
) -> list[dict[str, Any]]:
    """A row for each combination, set and metric: mean over pages and seeds, its 95 % interval over
    users, and the same of the paired difference from the first combination; `deviation` over the
    seeds."""
    tables = []
    for _, files in combinations:
        loaded = [dict(np.load(file)) for file in files]
        tables.append({name: np.stack([x[name] for x in loaded]) for name in loaded[0]})
    rows = []
    for name in tables[0]:
        candidates, metric = name.split("/", 1)
        if metric == "user":
            continue
        by_page = np.stack([table[name].mean(0) for table in tables], 1)  # [pages, combinations]
        user = tables[0][f"{candidates}/user"][0]
        samples = bootstrap_means(by_page, user, samples=bootstrap, seed=seed)
        low, high = interval(samples)
        difference = interval(samples - samples[:, :1])
        means = by_page.mean(0)
        for i, (values, files) in enumerate(combinations):
            per_seed = tables[i][name].mean(1)
            rows.append(
                values
                | {
                    "seeds": len(files),
                    "candidates": candidates,
                    "metric": metric,
                    "mean": float(means[i]),
                    "low": float(low[i]),
                    "high": float(high[i]),
                    "deviation": float(per_seed.std(ddof=1)) if len(files) > 1 else None,
                    "difference": float(means[i] - means[0]),
                    "difference_low": float(difference[0][i]),
                    "difference_high": float(difference[1][i]),
                }
            )
    return rows


# ---- what is written -----------------------------------------------------------------------------


def _shown(rows: list[dict[str, Any]]) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rows by set of candidates."""
    for name in dict.fromkeys(row["candidates"] for row in rows):
        yield name, [row for row in rows if row["candidates"] == name]


def table_of(rows: list[dict[str, Any]], axes: list[str]) -> list[list[str]]:
    """Header and lines: the axes' values, then for each metric its mean with the interval, and the
    difference from the first line."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    lines: dict[tuple[str, ...], list[str]] = {}
    for row in rows:
        key = tuple(row[axis] for axis in axes)
        text = f"{row['mean']:.3f} ({row['low']:.3f} to {row['high']:.3f})"
        if lines and key != next(iter(lines)):
            low, high = row["difference_low"], row["difference_high"]
            text += f"; {row['difference']:+.3f} ({low:+.3f} to {high:+.3f})"
        lines.setdefault(key, []).append(text)
    head = [axis.split(".")[1] for axis in axes]
    return [[*head, *metrics], *([*key, *cells] for key, cells in lines.items())]


def plot_axes(rows: list[dict[str, Any]], axes: list[str], out: Path) -> list[Path]:
    """A picture for each axis: the metrics over its values with their intervals; the other axes at
    their first values."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    base, paths = {axis: rows[0][axis] for axis in axes}, []
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    for axis in axes:
        others = {a: v for a, v in base.items() if a != axis}
        chosen = [row for row in rows if all(row[a] == v for a, v in others.items())]
        values = list(dict.fromkeys(row[axis] for row in chosen))
        places = range(len(values))
        figure, panels = plt.subplots(
            1, len(metrics), figsize=(3.2 * len(metrics), 3), squeeze=False, layout="constrained"
        )
        for panel, metric in zip(panels[0], metrics, strict=True):
            for name, of_set in _shown([row for row in chosen if row["metric"] == metric]):
                mean = np.array([row["mean"] for row in of_set])
                ends = np.array([[row["low"], row["high"]] for row in of_set]).T
                panel.errorbar(places, mean, abs(ends - mean), marker="o", capsize=3, label=name)
            panel.set_xticks(places, values)
            panel.set_title(metric)
            panel.set_xlabel(axis)
            panel.grid(alpha=0.3)
        panels[0][0].legend()
        figure.suptitle(", ".join(f"{a} {v}" for a, v in others.items()) or None)
        path = out / f"{axis}.png"
        figure.savefig(path, dpi=120)
        plt.close(figure)
        paths.append(path)
    return paths


def write_results(rows: list[dict[str, Any]], axes: list[str], out: Path, console: Console) -> None:
    """results.parquet, results.md, a picture for each axis; and the table on the console."""
    content = pa.Table.from_pylist(rows)
    write_atomically(out / "results.parquet", lambda path: pq.write_table(content, path))
    text = []
    for name, of_set in _shown(rows):
        head, *lines = table_of(of_set, axes)
        table = Table(box=box.SIMPLE_HEAD, title=f"candidates: {name}", title_justify="left")
        for column in head:
            table.add_column(column)
        for line in lines:
            table.add_row(*line)
        console.print(table)
        text += [f"Candidates: {name}", "", markdown_table(head, lines), ""]
    note = (
        "Means over pages and seeds; 95 % intervals over users; after the semicolon the paired "
        "difference from the first line."
    )
    console.print(note, highlight=False)
    write_atomically(out / "results.md", lambda p: p.write_text("\n".join([*text, note, ""])))
    plot_axes(rows, axes, out)


# ---- the command ---------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config",
        nargs="?",
        type=local_path,
        help="TOML file of the settings that are the same for all",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        help="folder of the sweep; what is done in it is not done again",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=1,
        help="runs of each combination, with seeds from run.seed on (default 1)",
    )
    parser.add_argument(
        "--split", default="validation", help="that settings are chosen on (default validation)"
    )
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=["page", "sampled"])
    parser.add_argument(
        "--count", type=int, default=100, help="sampled candidates, the clicked item included"
    )
    parser.add_argument("--k", type=int, nargs="+", default=[10], help="of HR@k")
    parser.add_argument("--history", type=int, default=20, help="most recent history items used")
    parser.add_argument("--score", choices=SCORES, default="mean", help="similarity to the history")
    parser.add_argument(
        "--bootstrap", type=int, default=1000, help="samples of the bootstrap over users"
    )
    add_device_arguments(parser)
    training.add_arguments(parser, several=True)


def _is_sweep(folder: Path) -> bool:
    return (folder / ABOUT).is_file() or all((folder / n).is_dir() for n in ("cells", "embeddings"))


def _same_data(out: Path, dataset: Dataset, features: Sequence[Path | None]) -> None:
    """ValueError where what is done in the folder was done with another dataset, or a file of
    features that has changed; else notes both."""
    now = {"dataset": dataset.fingerprint}
    now |= {
        f"features {path}": array_sha256(read_embeddings(path, dataset))
        for path in {*features}
        if path is not None
    }
    path = out / ABOUT
    before = read_json(path, "another --out begins anew") if path.is_file() else {}
    for name in now.keys() & before.keys():
        if now[name] != before[name]:
            raise ValueError(
                f"out: {out} has a sweep that was begun with another data.{name} (checksum "
                f"{before[name][:19]}, now {now[name][:19]}); "
                "another --out begins anew"
            )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda p: p.write_text(json.dumps(before | now, indent=1)))


def run(args: argparse.Namespace) -> int:
    given = training.overrides_of(args)
    combinations = grid(args.config, given, args.seeds, args.out)
    first = combinations[0][0].config
    check_growing(
        args.out,
        ("runs", "cells", "embeddings", "results.parquet", "results.md", ABOUT),
        _is_sweep,
        what="out: expected a new folder or a sweep's",
        inputs=(args.config, first.data.dataset, first.data.features, first.model.weights),
    )
    if args.score == "click":
        for cells in combinations:
            check_click_head(cells[0].config, cells[0].title)
    judge = Judge(
        Dataset(first.data.dataset),
        args.split,
        args.candidates,
        args.count,
        args.k,
        args.history,
        args.score,
        seed=0,
    )
    if judge.dataset.has_embeddings:
        _refuse_unused(combinations, given, ready=True)
    _same_data(
        args.out,
        judge.dataset,
        [cell.config.data.features for cells in combinations for cell in cells],
    )
    for name in ("cells", "embeddings"):
        (args.out / name).mkdir(parents=True, exist_ok=True)
    console = Console()
    done, failed = [], []
    total, number = len(combinations) * args.seeds, 0
    for cells in combinations:
        files = []
        for cell in cells:
            number += 1
            console.print(f"[bold]{number} of {total}[/bold]  {cell.title}", highlight=False)
            try:
                files.append(evaluate_cell(cell, judge, args.out, args))
            except RuntimeError as error:
                failed.append(f"{cell.title}: {error}")
                log.warning("%s", failed[-1])
        if files:
            done.append((cells[0].values, files))
    if not done:
        raise RuntimeError("none of the runs could be evaluated: " + "; ".join(failed))
    rows = summarise(done, args.bootstrap, judge.seed)
    write_results(rows, list(combinations[0][0].values), args.out, console)
    for text in failed:
        console.print(f"left out: {text}", highlight=False, style="red")
    return 0
