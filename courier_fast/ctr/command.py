"""`courier-fast ctr`: what embeddings are worth to a click-through-rate model."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path

import faiss  # noqa: F401  (missing: said before any work)
import numpy.typing as npt
from rich.progress import MofNCompleteColumn, Progress, TaskID, TimeElapsedColumn

from ..data.dataset import Dataset
from ..data.embeddings import read_embeddings, trained_until, without_embedding
from ..files import read_json, write_atomically
from ..locations import LocationError, local_path, location
from ..output import check_growing
from .cells import NONE, RANDOM, Cell, Plan, run_plan
from .export import EXPORTED, export_impressions, is_export
from .features import FORMS, check_form, random_vectors
from .fit import Settings
from .harm import GATE, POLICY, Policy
from .harm_report import decided, harm, harm_notes
from .impressions import (
    PROTOCOLS,
    SCRATCH,
    Impressions,
    Protocol,
    as_date,
    check_dataset,
    make_protocol,
)
from .models import MODELS
from .plots import write_plots
from .proxies import judge_proxies, ranked_names
from .report import make_report, print_ctr_report, write_ctr_report
from .warm_report import write_warm_plot

log = logging.getLogger(__name__)

Array = npt.NDArray

READY = "ready"  # a dataset's own embeddings, where no others are given
DIMENSIONS = "embeddings.json"
DECIDED = "policy.json"
DESCRIPTION = (
    "Trains click-through-rate models on the dataset's pages with and without each embedding, in "
    "several forms, and prints what it adds. "
    "A run that was stopped goes on with the cells of the table that are missing."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument(
        "--dataset", type=location, required=True, help="folder written by `courier-fast prepare`"
    )
    parser.add_argument(
        "--embeddings",
        nargs="+",
        default=[],
        metavar="[NAME=]PATH",
        help=".parquet (item_id, embedding), .npy (rows as items of the dataset) or a dataset with "
        "embeddings, by the file's name or NAME; {seed} in it stands for 0, 1, ...: encoders of "
        f"several seeds, one for each of the model's. Default: the dataset's own, as {READY}",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        help="folder for cells, ctr.json, ctr.md and pictures",
    )
    parser.add_argument(
        "--models", nargs="+", default=list(MODELS), help=f"some of {', '.join(MODELS)}"
    )
    parser.add_argument(
        "--forms",
        nargs="+",
        default=list(FORMS[:4]),
        help=f"some of {', '.join(FORMS)}; none is always there",
    )
    parser.add_argument(
        "--protocol",
        nargs="+",
        default=["disjoint"],
        help=f"some of {', '.join(PROTOCOLS)}: whether the embeddings were trained on other pages "
        "than the CTR model is; warm: models of ids go on over the newer pages, with the embedding "
        "added and without",
    )
    parser.add_argument(
        "--periods",
        type=int,
        default=0,
        help="of warm, of as many pages each; 0: days (10 where pages have no times)",
    )
    parser.add_argument(
        "--encoder-share",
        type=float,
        default=0.5,
        help="of all pages, the first ones, left to the embeddings by disjoint and warm",
    )
    parser.add_argument(
        "--seeds", type=int, default=3, help="models of each cell; their probabilities are averaged"
    )
    parser.add_argument(
        "--split",
        choices=("validation", "test"),
        default="test",
        help="what the table is of; validation leaves test unseen, for choosing settings",
    )
    parser.add_argument("--history", type=int, default=20, help="most recent history items used")
    parser.add_argument(
        "--min-count",
        type=int,
        default=2,
        help="impressions in training that an id needs for a row of its own",
    )
    defaults = Settings()
    for name, text in {
        "batch": "impressions of a step",
        "lr": "of Adam",
        "l2": "weight of the squares of id rows",
        "epochs": "at most; validation logloss ends training",
    }.items():
        value = getattr(defaults, name)
        parser.add_argument(f"--{name}", type=type(value), default=value, help=text)
    parser.add_argument(
        "--gate",
        action="store_true",
        help="every form also with a gate for each category, learned, on what the embedding says",
    )
    parser.add_argument(
        "--policy",
        type=local_path,
        help="policy.json of an earlier run: every form also with zeros in the categories that it "
        "turns off; the export has them, too, and says for what there is no policy",
    )
    parser.add_argument(
        "--no-control",
        action="store_true",
        help="without the random vectors that show what capacity alone is worth",
    )
    parser.add_argument(
        "--allow-missing",
        action="store_true",
        help="items without an embedding get zeros in place of an error",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="cells trained at once; 0: as many as cores"
    )
    parser.add_argument(
        "--proxies",
        action="store_true",
        help="also tell which proxy metric of the embeddings, on validation, foretells best what "
        "they add; of four or more",
    )
    parser.add_argument(
        "--export",
        type=local_path,
        help="also write the impressions with every form as Parquet there, for a model of your own",
    )


def run(args: argparse.Namespace) -> int:
    inputs = [
        args.dataset,
        *([] if args.policy is None or args.policy.parent == args.out else [args.policy]),
        *(path for text in args.embeddings for path in _named_files(text, max(args.seeds, 1))[1]),
    ]
    check_growing(
        args.out,
        ("cells", "ctr.json", "ctr.md", DIMENSIONS, DECIDED),
        _is_ctr,
        what="out: expected a new folder or one of `ctr`",
        inputs=inputs,
    )
    for folder in (
        () if args.export is None else (args.export, *(args.export / p for p in args.protocol))
    ):
        check_growing(
            folder,
            EXPORTED,
            is_export,
            what="export: expected a new folder or an earlier one",
            inputs=inputs,
        )
    dataset = Dataset(args.dataset)
    plan = _plan(args, dataset)  # what is wrong is an error before the work, not after
    if args.proxies:
        ranked_names(plan)
    for protocol in plan.protocols:
        log.info("%s", protocol.describe(dataset))
    args.out.mkdir(parents=True, exist_ok=True)
    _same_dimensions(args.out / DIMENSIONS, plan.embeddings)
    if args.export is not None:
        own = {name: plan.embeddings[of][seed] for name, of, seed in _exported(plan)}
        off = None if plan.policy is None else _exported_off(plan, plan.policy)
        exported = [p for p in plan.protocols if not p.periods]
        for protocol in exported:
            folder = args.export / protocol.name if len(exported) > 1 else args.export
            export_impressions(dataset, protocol, own, folder, history=plan.history, off=off)
            print(f"{folder}: impressions of {protocol.name} as Parquet, described in README.md")
    groups = plan.groups()
    total = sum(len(plan.cells(group)) for group in groups)
    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns) as bar:
        bars = _Bars(bar, total)
        found = run_plan(
            plan,
            args.out,
            threads=args.threads or len(os.sched_getaffinity(0)),
            began=bars.began,
            ended=bars.ended,
        )
    if found:
        log.info("%d of %d cells were there already", found, total)
    report = make_report(plan, args.out, args.split)
    policy = plan.policy
    if policy is None:
        policy = decided(plan, args.out)
        policy.write(args.out / DECIDED)
    report["harm"] = harm(plan, args.out, args.split, policy)
    report["harm_notes"] = harm_notes(policy, args.split) if report["harm"] else []
    if args.proxies:
        report["proxies"] = judge_proxies(plan, args.out, report)
    write_ctr_report(report, args.out)
    for path in [*write_plots(report, args.out), *write_warm_plot(report["warm"], args.out)]:
        log.info("%s", path)
    print_ctr_report(report)
    return 0


def _exported(plan: Plan) -> Iterator[tuple[str, str, int]]:
    """Name in the export, embedding and seed."""
    for name, of in plan.embeddings.items():
        for seed in range(len(of)) if name != RANDOM else ():
            yield name if len(of) == 1 else f"{name}-{seed}", name, seed


def _exported_off(plan: Plan, policy: Policy) -> dict[str, dict[str, Array]]:
    """{name in the export: {form: [items] bool}}."""
    found: dict[str, dict[str, Array]] = {}
    for name, of, _ in _exported(plan):
        forms = [row["form"] for row in policy.rows if row["embedding"] == of]
        found[name] = {form: policy.off(form, of, plan.dataset) for form in forms}
    return found


def _is_ctr(folder: Path) -> bool:
    return (folder / "cells").is_dir() and (folder / DIMENSIONS).is_file()


def _plan(args: argparse.Namespace, dataset: Dataset) -> Plan:
    """Everything checked."""
    for form in args.forms:
        check_form(form)
    _some("models", args.models, MODELS)
    _some("protocol", args.protocol, PROTOCOLS)
    if args.seeds < 1 or args.threads < 0 or args.min_count < 1:
        raise ValueError(
            f"seeds, threads, min_count: expected at least 1, 0 and 1, got {args.seeds}, "
            f"{args.threads} and {args.min_count}"
        )
    settings = Settings(
        **{f.name: getattr(args, f.name) for f in fields(Settings) if hasattr(args, f.name)}
    )
    check_dataset(dataset)
    Impressions(dataset, args.split, history=args.history)  # its own check
    names = dict.fromkeys(args.protocol)
    protocols = [make_protocol(dataset, n, args.encoder_share, args.periods) for n in names]
    protocols += [replace(p, name=SCRATCH) for p in protocols if p.periods]
    tables = _tables(args, dataset, protocols)
    if not args.no_control:
        widest = max(x[0].shape[1] for x in tables.values())
        tables[RANDOM] = [random_vectors(dataset.num_items, widest)]
    forms = [form for form in args.forms if form != NONE]
    variants = [GATE] * args.gate + [POLICY] * (args.policy is not None)
    policy = None
    if args.policy is not None:
        own = {name: of for name, of in tables.items() if name != RANDOM}
        policy = Policy.read(args.policy, dataset, own, forms)
    return Plan(
        dataset,
        tables,
        list(dict.fromkeys(args.models)),
        list(dict.fromkeys([NONE, *forms, *(form + x for form in forms for x in variants)])),
        protocols,
        args.seeds,
        settings,
        args.history,
        args.min_count,
        ("validation",) if args.split == "validation" else ("validation", "test"),
        policy,
    )


def _tables(
    args: argparse.Namespace, dataset: Dataset, protocols: Sequence[Protocol]
) -> dict[str, list[Array]]:
    """The embeddings by their names, of each seed; the dataset's own where none are given."""
    tables: dict[str, list[Array]] = {}
    if not args.embeddings:
        if not dataset.has_embeddings:
            raise ValueError(
                f"embeddings: expected --embeddings, got none, and {dataset.path} has none of its "
                "own (prepare --embeddings)"
            )
        tables[READY] = [dataset.read_embeddings()]
    for text in args.embeddings:
        name, paths = _named_files(text, args.seeds)
        if name in tables or name in (NONE, RANDOM):
            raise ValueError(
                f"embeddings: expected different names, none of them {NONE} or {RANDOM}, got {text}"
            )
        tables[name] = [_read_embeddings(path, dataset, args.allow_missing) for path in paths]
        for path, protocol in itertools.product(paths, protocols):
            _check_until(path, protocol)
        widths = {x.shape[1] for x in tables[name]}
        if len(widths) > 1:
            raise ValueError(
                f"embeddings: expected the same dimensions of all seeds of {name!r}, "
                f"got {sorted(widths)}"
            )
    return tables


def _some(name: str, got: list[str], known: tuple[str, ...]) -> None:
    unknown = [x for x in got if x not in known]
    if unknown:
        raise ValueError(f"{name}: expected some of {', '.join(known)}, got {unknown[0]!r}")


def _named_files(text: str, seeds: int) -> tuple[str, list[Path]]:
    """The name and the files of `[NAME=]PATH`; with {seed} in it one file for each."""
    name, equals, path = text.partition("=")
    if not equals or "/" in name:  # an "=" inside a path, as partitioned folders have it
        name, path = re.sub(r"[-_.]?(seed)?[-_.]?\{seed\}", "", Path(text).stem), text
    if not name:
        raise ValueError(
            f"embeddings: expected NAME=PATH where the file's name is but the seed, got {text}"
        )
    several = range(seeds) if "{seed}" in path else [0]
    try:
        return name, [local_path(path.replace("{seed}", str(seed))) for seed in several]
    except LocationError as error:
        raise ValueError(f"embeddings: {error}") from None


def _read_embeddings(path: Path, dataset: Dataset, allow_missing: bool) -> Array:
    table = read_embeddings(path, dataset, strict=True)
    missing, first = without_embedding(table, dataset)
    if missing and not allow_missing:
        raise ValueError(
            f"embeddings: expected finite numbers for all {dataset.num_items:,} items, got none "
            f"for {missing:,} in {path} (first: {first}); "
            "--allow-missing gives them zeros"
        )
    if missing:
        log.warning("%s: %d items have no embedding; they get zeros", path, missing)
    return table


def _check_until(path: Path, protocol: Protocol) -> None:
    """ValueError where the encoder is known to have seen pages that the protocol keeps from it."""
    until = trained_until(path)
    if until is not None and until >= protocol.bound:
        raise ValueError(
            f"embeddings: expected an encoder trained on pages before {as_date(protocol.bound)} "
            f"for --protocol {protocol.name}, got one that has seen "
            f"pages until {as_date(until)} in {path}; train one with --data.share (as "
            "--encoder-share here), or see --protocol"
        )


def _same_dimensions(path: Path, tables: Mapping[str, Sequence[Array]]) -> None:
    """ValueError where the folder's last run had embeddings of this name with other dimensions."""
    now = {name: x[0].shape[1] for name, x in tables.items()}
    before: dict[str, int] = read_json(path) if path.is_file() else {}
    for name in now.keys() & before.keys() - {RANDOM}:
        if now[name] != before[name]:
            raise ValueError(
                f"embeddings: expected {before[name]} dimensions of {name!r}, as in the last run "
                f"into {path.parent}, got {now[name]}; "
                "another --out begins anew"
            )
    write_atomically(path, lambda partial: partial.write_text(json.dumps(before | now)))


class _Bars:
    """One bar for the table and one for each cell that is being trained."""

    def __init__(self, bar: Progress, total: int) -> None:
        self.bar, self.all = bar, bar.add_task("cells", total=total)
        self.tasks: dict[Cell, TaskID] = {}
        self.lock = threading.Lock()

    def began(self, cell: Cell) -> Callable[[float], None]:
        task = self.bar.add_task(cell.file.removesuffix(".parquet"), total=100)
        with self.lock:
            self.tasks[cell] = task
        return lambda share: self.bar.update(task, completed=int(100 * share))

    def ended(self, cell: Cell) -> None:
        with self.lock:
            task = self.tasks.pop(cell, None)
        if task is not None:
            self.bar.remove_task(task)
        self.bar.advance(self.all)
