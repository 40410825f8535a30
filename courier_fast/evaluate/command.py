"""`courier-fast evaluate`."""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import replace
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..data.dataset import Dataset
from ..data.embeddings import read_embeddings
from ..embed.device import add_device_arguments, device_of
from ..embed.encode import encode_all
from ..embed.sources import DatasetImages, RowSource, make_decoder_for, run_source
from ..files import write_atomically
from ..locations import local_path, location
from ..output import check_file
from . import methods
from .comparison import compare
from .methods import BASELINES, Method
from .scores import SCORES, ClickLogits, Reconstruction
from .targets import CANDIDATES

log = logging.getLogger(__name__)

TITLES = {
    "page": "against the page's items that were not clicked",
    "sampled": "among items drawn uniformly",
    "popular": "among items drawn by popularity",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dataset", type=location, required=True, help="folder written by `courier-fast prepare`"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--run", type=local_path, help="folder of a training run: its encoder is evaluated"
    )
    what.add_argument(
        "--embeddings",
        type=local_path,
        help=".npy (rows as items of the dataset) or .parquet (item_id, embedding); with neither: "
        "the dataset's own",
    )
    parser.add_argument("--split", default="test")
    parser.add_argument(
        "--baselines", nargs="*", choices=BASELINES, help="default: all that the dataset allows"
    )
    parser.add_argument(
        "--backbone",
        help="of that baseline, untrained or with --weights; default: as the run began, or "
        "small_conv",
    )
    parser.add_argument("--weights", type=local_path, help="safetensors file for --backbone")
    parser.add_argument(
        "--pretrained", action="store_true", help="timm's weights for --backbone (downloads them)"
    )
    parser.add_argument(
        "--size", type=int, default=96, help="of the images for --backbone, in pixels"
    )
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, default=["page", "sampled"])
    parser.add_argument(
        "--count", type=int, default=100, help="sampled candidates, the clicked item included"
    )
    parser.add_argument("--k", type=int, nargs="+", default=[1, 5, 10], help="of HR@k")
    parser.add_argument("--history", type=int, default=20, help="most recent history items used")
    parser.add_argument(
        "--score",
        choices=SCORES,
        default="mean",
        help="similarity to the history, of every method; reconstruction: what the loss trains, "
        "with the attention and unit of --run; click: the click head of --run, baselines by mean",
    )
    parser.add_argument(
        "--bootstrap", type=int, default=1000, help="samples of the bootstrap over users"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=local_path, help="also write the result there")
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    *_, result = evaluate(args)
    print_result(result)
    return 0


def inputs_of(args: argparse.Namespace) -> list[Any]:
    """What is read."""
    inputs = [args.dataset, args.run, args.embeddings, args.weights]
    if args.run is not None:
        inputs += [
            args.run / name
            for name in ("config.toml", "encoder.json", "encoder.safetensors", "metrics.jsonl")
        ]
    return inputs


def evaluate(args: argparse.Namespace) -> tuple[Dataset, list[Method], dict[str, Any]]:
    """The dataset, its methods, the main one first, and what `compare` gives of them, written to
    --json."""
    # What is wrong is an error before the work, not after.
    if args.json is not None:
        check_file(args.json, "json", inputs=inputs_of(args), begins="{")
    dataset = Dataset(args.dataset)
    dataset.split(args.split)
    reconstruction, click = None, None
    if args.score == "reconstruction" and args.run is not None:
        reconstruction = Reconstruction.of_run(args.run)
    if args.score == "click":
        click = _click_logits(args)
    wanted = args.baselines
    if wanted is None:
        # A run on a dataset without images was trained on features, which then are the backbone's.
        images, features = dataset.has_images, dataset.has_embeddings or args.run is not None
        possible = {"pixels": images, "backbone": images or features}
        wanted = [name for name in BASELINES if possible.get(name, True)]
    main = replace(_main_method(args, dataset), click=click)
    own = main if args.run is None and args.embeddings is None else None
    methods = [main, *(m for m in _baselines(args, dataset, wanted, own) if m is not main)]
    result = compare(
        dataset,
        methods,
        split=args.split,
        candidates=args.candidates,
        count=args.count,
        k=args.k,
        history=args.history,
        score=args.score,
        reconstruction=reconstruction,
        bootstrap=args.bootstrap,
        seed=args.seed,
        device=device_of(args)[0],
    )
    if args.json is not None:
        write_atomically(args.json, lambda path: path.write_text(json.dumps(result, indent=1)))
    return dataset, methods, result


def _click_logits(args: argparse.Namespace) -> ClickLogits:
    if args.run is None:
        given = "none" if args.embeddings is None else "--embeddings"
        raise ValueError(f"--score click: expected --run, whose click head ranks, got {given}")
    from .click import click_logits_of

    return click_logits_of(args.run, device_of(args)[0])


def _encode(name: str, model: Any, source: RowSource, args: argparse.Namespace) -> Method:
    device, dtype = device_of(args)
    model.to(device)
    return Method(name, encode_all(model, source, batch=args.batch, device=device, dtype=dtype))


def _main_method(args: argparse.Namespace, dataset: Dataset) -> Method:
    if args.embeddings is not None:
        return Method(args.embeddings.stem, read_embeddings(args.embeddings, dataset))
    if args.run is None:
        if dataset.has_embeddings:
            return methods.ready(dataset)
        raise ValueError(
            f"--run, --embeddings: expected one of them, got neither, and {dataset.path} has no "
            "embeddings of its own (prepare --embeddings)"
        )
    from ..train.encoder import load_encoder

    encoder = load_encoder(args.run)
    return _encode("trained", encoder, run_source(encoder, args.run, dataset, args), args)


def _baselines(
    args: argparse.Namespace, dataset: Dataset, wanted: list[str], own: Method | None
) -> list[Method]:
    """`own`: the dataset's ready embeddings, where they have been read."""
    found = []
    for name in wanted:
        if name == "random":
            found.append(methods.random_order(dataset))
        elif name == "popularity":
            found.append(methods.popularity(dataset))
        elif name in ("pixels", "backbone"):
            method = methods.pixels(dataset) if name == "pixels" else _backbone(args, dataset, own)
            found += [method, methods.standardised(method)]
    return found


def _backbone(args: argparse.Namespace, dataset: Dataset, own: Method | None = None) -> Method:
    """Features of the backbone as it was before training: the run's own (same seed), the one named
    on the command line, or the dataset's ready embeddings."""
    from ..train.config import Config
    from ..train.encoder import SMALL_CONV, build_encoder

    name, size = args.backbone or SMALL_CONV, args.size
    pretrained, weights, seed = args.pretrained, args.weights, args.seed
    config = None
    if args.run is not None and args.backbone is None:
        config = Config.load(args.run / "config.toml")
        if config.data.features is not None:
            return Method("features", read_embeddings(config.data.features, dataset))
    if args.backbone is None and dataset.has_embeddings:
        if unused := {"weights", "pretrained", "size"} & set(getattr(args, "given", ())):
            raise ValueError(
                f"--{min(unused)}: has no effect with --dataset {dataset.path}, whose embeddings "
                "are the baseline: no image is read"
            )
        return own or methods.ready(dataset)
    if config is not None:
        name, size = config.model.backbone, config.data.size
        pretrained, weights, seed = config.model.pretrained, config.model.weights, config.run.seed
    torch.manual_seed(seed)
    encoder = build_encoder(name, 1, size, pretrained=pretrained, weights=weights).eval()
    kind = "pre-trained" if pretrained or weights else "untrained"
    device, _ = device_of(args)
    decoder = make_decoder_for(encoder, device, args)
    return _encode(f"{kind} backbone", encoder.backbone, DatasetImages(dataset, decoder), args)


def print_result(result: dict[str, Any], console: Console | None = None) -> None:
    """Prints what `compare` gave: for each candidate set a table of values and one of differences,
    with 95 % intervals."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            console.width = 100
    settings = result["settings"]
    main, score = settings["main"], settings["score"]
    if settings["reconstruction"] is not None:
        given = [f"{n} {v}" for n, v in settings["reconstruction"].items() if v is not None]
        score += f" ({', '.join(given)})"
    elif score == "click":
        score += " (baselines by mean)"
    for name, missing in result["missing"].items():
        if missing:
            log.warning("%s: %d items have no embedding; they come last", name, missing)
    for name, one in result["sets"].items():
        console.print(
            f"\nHeld-out clicks {TITLES[name]} (split {settings['split']}): {one['clicks']:,} of "
            f"{result['clicks']:,} clicks, on {one['pages']:,} pages of "
            f"{one['users']:,} users, {one['mean_candidates']:.1f} candidates on average; by "
            f"{score} over the last "
            f"{settings['history']} events of the history",
            style="bold",
            highlight=False,
        )
        console.print(_method_table("", one["methods"]))
        if one["differences"]:
            console.print(_method_table(f"{main} minus", one["differences"], differences=True))
    console.print(
        "Means over pages, 95 % intervals below them (users resampled); differences are paired, "
        "green or red where 0 is outside.",
        highlight=False,
    )


def _method_table(
    corner: str, rows: dict[str, dict[str, dict[str, float]]], differences: bool = False
) -> Table:
    metrics = list(next(iter(rows.values())))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(Text(corner))
    for name in metrics:
        table.add_column(name, no_wrap=True)
    sign = "+" if differences else ""
    for method, values in rows.items():
        table.add_row(Text(method), *(_cell(values[m], sign) for m in metrics))
    return table


def _cell(value: dict[str, float], sign: str) -> Text:
    mean, low, high = f"{value['mean']:{sign}.3f}", f"{value['low']:.3f}", f"{value['high']:.3f}"
    colour = "green" if value["low"] > 0 else "red" if value["high"] < 0 else ""
    return Text.assemble((f"{mean}\n", colour if sign else "bold"), (f"{low} {high}", "dim"))
