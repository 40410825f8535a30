"""`courier-fast quickstart`: everything once, on drawn products and simulated users: draw, prepare,
train, embed, evaluate, report."""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
from rich.console import Console

from ..files import remove, write_atomically
from ..interrupt import Stopped
from ..locations import local_path
from ..output import Product, check_output, discard
from .catalogue import draw_catalogue
from .stages import Stages
from .users import Behaviour, click_probability, simulate

if TYPE_CHECKING:
    from ..data.dataset import Dataset
    from ..train.config import Config

Array = npt.NDArray
Advance = Callable[[float], None]  # told the share that is done

LEAD = (
    "The network saw pictures and clicks, and nothing else: no categories, no attributes, "
    "no pre-trained weights."
)
MARK = "quickstart.json"  # says that a folder is a quickstart's, and may be written anew
PRODUCT = Product(
    "an earlier quickstart",
    MARK,
    ("items", "users", "seed"),
    re.compile(
        r"(quickstart|results)\.json|(items|views)\.parquet|(truth|embeddings)\.npy|report\.html|images/[^/]+\.jpg|(dataset|run|trial|ctr)/.*"
    ),
)


@dataclass(frozen=True)
class Quickstart:
    """What is run.

    Attributes:
        items, users: sizes of the drawn catalogue and of the crowd.
        steps: updates of the encoder; `minutes`, if above 0, sets them from the time that the first
            ones take.
        pages, history, size, lr: of training, see `courier_fast.train.config`.
        behaviour: how users shop.
    """

    items: int = 1200
    users: int = 800
    steps: int = 60
    minutes: float = 0.0
    pages: int = 96
    history: int = 12
    size: int = 64
    dim: int = 128
    lr: float = 3e-3
    seed: int = 0
    behaviour: Behaviour = field(default_factory=Behaviour)


SHORT = Quickstart(items=240, users=60, steps=6, pages=16, size=32, behaviour=Behaviour(pages=8))


# Seconds on two cores without AVX-512 (docs/speed.md), by which the time that is left is told.
SECONDS = {
    "Draw": 12.0,
    "Prepare": 3.0,
    "Train": 97.0,
    "Embed": 1.0,
    "Evaluate": 3.0,
    "CTR": 34.0,
    "Report": 10.0,
}


def expected_seconds(q: Quickstart) -> dict[str, float]:
    """SECONDS for other sizes."""
    d = Quickstart()
    items, pages = q.items / d.items, q.users * q.behaviour.pages / (d.users * d.behaviour.pages)
    pictures = q.steps * q.pages * q.size**2 / (d.steps * d.pages * d.size**2)
    more = {"Draw": items, "Prepare": items, "Train": pictures, "Evaluate": pages, "CTR": pages}
    found = {name: seconds * more.get(name, 1.0) for name, seconds in SECONDS.items()}
    return found | ({"Train": 60 * q.minutes} if q.minutes else {})


def draw(out: Path, q: Quickstart, advance: Advance = lambda share: None) -> None:
    """Pictures in images/, items.parquet and the page views, views.parquet."""
    import pyarrow.parquet as pq

    count = itertools.count(1)
    catalogue = draw_catalogue(
        out / "images", q.items, q.seed, lambda: advance(next(count) / q.items)
    )
    views, like = simulate(catalogue, q.users, q.seed, q.behaviour)
    truth = click_probability(like.reshape(-1, q.behaviour.shown), q.behaviour).ravel()
    np.save(out / "truth.npy", truth)
    pq.write_table(catalogue, out / "items.parquet")
    pq.write_table(views, out / "views.parquet")


def prepare_dataset(out: Path, q: Quickstart) -> Dataset:
    """The dataset folder, a fifth of the pages held out: few pages would make wide intervals."""
    from ..data.dataset import Dataset
    from ..data.prepare.layouts import Columns, generic
    from ..data.prepare.options import PrepareOptions
    from ..data.prepare.run import prepare

    source = generic([out / "views.parquet"], out / "items.parquet", Columns(page="page_id"))
    options = PrepareOptions(
        page_size=q.behaviour.shown,
        min_history=1,
        validation_share=0.05,
        test_share=0.2,
        seed=q.seed,
    )
    prepare(out / "dataset", source=source, images=out / "images", options=options)
    return Dataset(out / "dataset")


def settings(out: Path, q: Quickstart, steps: int) -> Config:
    """What `courier-fast train` would be given."""
    from ..train.config import Config

    return Config.load(
        None,
        {
            "data.dataset": str(out / "dataset"),
            "data.pages": q.pages,
            "data.history": q.history,
            "data.size": q.size,
            "model.backbone": "small_conv",
            "model.dim": q.dim,
            "optim.steps": steps,
            "optim.lr": q.lr,
            # Soft at first: a network that starts from scratch is overwhelmed by items that merely
            # look alike.
            "loss.sequence_temperature": 0.3,
            "run.out": str(out / "run"),
            "run.seed": q.seed,
            "run.log_steps": max(1, steps // 40),
            "run.tensorboard": False,
            "run.progress": False,
        },
    )


def train(out: Path, q: Quickstart, advance: Advance = lambda share: None) -> int:
    """Trains into run/; gives the number of steps."""
    from ..train.trainer import Trainer

    class Watched(Trainer):
        def step(self, *args: Any, **options: Any) -> Any:
            result = super().step(*args, **options)
            advance(self.schedule.done())
            return result

    steps = _steps_for(out, q) if q.minutes else q.steps
    trainer = Watched(settings(out, q, steps))
    try:
        if trainer.fit().get("stopped"):
            raise Stopped(trainer.status - 128)
    finally:
        trainer.close()
    return steps


def _steps_for(out: Path, q: Quickstart, trial: int = 5) -> int:
    """How many steps fit into q.minutes, from the time of a few in a run that is thrown away."""
    from ..train.trainer import Trainer

    config = settings(out, q, trial)
    config.run.out = out / "trial"
    trainer = Trainer(config)
    batches = trainer.loader.epoch(0, 0)
    try:
        trainer.step(next(batches))  # the first one also warms up
        began = time.monotonic()
        for _ in range(trial):
            trainer.step(next(batches))
        each = (time.monotonic() - began) / trial
    finally:
        batches.close()  # type: ignore[attr-defined]
        trainer.close()
        remove(out / "trial")
    return max(1, round(60 * q.minutes / each))


def encode_pictures(dataset: Dataset, model: Any, encoder: Any) -> Array:
    """[items, D] embeddings by `model` of the pictures as `encoder` takes them."""
    from ..data.images.decode import make_decoder
    from ..embed.encode import encode_all
    from ..embed.sources import DatasetImages

    device = next(encoder.parameters()).device
    decoder = make_decoder("auto", encoder.size, device=device, mean=encoder.mean, std=encoder.std)
    try:
        return encode_all(model, DatasetImages(dataset, decoder), device=device)
    finally:
        decoder.close()


def embed(out: Path, dataset: Dataset) -> Array:
    """The trained encoder's embeddings, also in embeddings.npy."""
    from ..train.encoder import load_encoder

    encoder = load_encoder(out / "run")
    table = encode_pictures(dataset, encoder, encoder)
    np.save(out / "embeddings.npy", table)
    return table


def evaluate_embedding(
    out: Path, dataset: Dataset, embeddings: Array, q: Quickstart
) -> dict[str, Any]:
    """The trained embedding beside what needs no training, also in results.json."""
    import torch

    from ..evaluate import comparison, methods
    from ..train.encoder import build_encoder

    torch.manual_seed(q.seed)  # as the run began
    before = build_encoder("small_conv", q.dim, q.size).eval()
    backbone = methods.Method(
        "untrained backbone", encode_pictures(dataset, before.backbone, before)
    )
    pixels = methods.pixels(dataset)
    results = comparison.compare(
        dataset,
        [
            methods.Method("trained", embeddings),
            backbone,
            methods.standardised(backbone),
            pixels,
            methods.standardised(pixels),
            methods.popularity(dataset),
            methods.random_order(dataset),
        ],
        k=(1, 3, 10),
        history=q.history,
        seed=q.seed,
    )
    text = json.dumps(results, indent=1)
    write_atomically(out / "results.json", lambda path: path.write_text(text))
    return results


def quickstart(out: Path, q: Quickstart, console: Console | None = None) -> Path:
    """Runs every stage in the folder `out` and gives the report's path.

    Raises:
        ValueError: `out` has something else in it than an earlier quickstart.
    """
    console = console or Console()
    stages = Stages(console, expected_seconds(q), ["Train"] if q.minutes else [])
    from ..report.page import About, write_report
    from ..report.text import headline, margins
    from .ctr import compare_ctr

    check_output(out, PRODUCT, overwrite=True)
    if out.is_dir():
        discard(out, PRODUCT)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARK).write_text(json.dumps({"items": q.items, "users": q.users, "seed": q.seed}))
    with stages("Draw", f"{q.items:,} products, {q.users:,} shoppers") as advance:
        draw(out, q, advance)
    with stages("Prepare", "page views and pictures to a dataset", own_bar=True):
        dataset = prepare_dataset(out, q)
    with stages(
        "Train", f"{len(dataset.split('train')):,} pages, pictures of {q.size} px"
    ) as advance:
        steps = train(out, q, advance)
    with stages("Embed", "every product"):
        embeddings = embed(out, dataset)
    with stages("Evaluate", f"{len(dataset.split('test')):,} held-out pages"):
        results = evaluate_embedding(out, dataset, embeddings, q)
    with stages("CTR", "a click model with and without the embedding") as advance:
        ctr = compare_ctr(out, dataset, embeddings, q.history, advance)
        if isinstance(ctr, str):
            console.print(f"      left out: {ctr}", highlight=False)
    path = out / "report.html"
    settings = {
        "Catalogue": f"{q.items:,} items drawn, seed {q.seed}",
        "Shoppers": f"{q.users:,}, {q.behaviour.pages} pages each, {q.behaviour.shown} items a "
        "page",
        "Network": f"small_conv at {q.size} px, {q.dim} dimensions",
        "Training": f"{steps:,} steps of {q.pages} pages, histories of {q.history}, AdamW at "
        f"{q.lr:g}",
    }
    with stages("Report", "pictures, curves and numbers in one file"):
        about = About(
            dataset,
            out / "run",
            embeddings,
            None if isinstance(ctr, str) else out / "ctr",
            seconds=stages.seconds,
            settings=settings,
            lead=LEAD,
        )
        write_report(path, about, results, history=q.history, seed=q.seed)
    console.print(f"\n[bold]{headline(results, 'page', 'HR@1')}[/bold]")
    for margin in margins(results, "page", "HR@1"):
        console.print(f"  minus {margin['name'].lower()}: {margin['text']} points", highlight=False)
    if not isinstance(ctr, str):
        console.print(ctr["summary"], highlight=False)
    console.print(f"\n{stages.elapsed:.0f} s in all. Open {path}", soft_wrap=True)
    return path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    d = Quickstart()
    parser.add_argument(
        "--out",
        type=local_path,
        default=Path("courier-quickstart"),
        help="folder for everything (default ./courier-quickstart)",
    )
    parser.add_argument("--items", type=int, help=f"products drawn (default {d.items})")
    parser.add_argument("--users", type=int, help=f"shoppers (default {d.users})")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"training steps (default {d.steps})")
    length.add_argument(
        "--minutes",
        type=float,
        help="of training, in place of steps; then no two machines train alike",
    )
    parser.add_argument(
        "--short",
        action="store_true",
        help="some seconds of everything, to see that it runs; learns nothing",
    )
    parser.add_argument("--seed", type=int, default=d.seed)


def run(args: argparse.Namespace) -> int:
    given = {
        n: v for n in ("items", "users", "steps", "minutes") if (v := getattr(args, n)) is not None
    }
    for name, value in given.items():
        if value <= 0:
            raise ValueError(f"--{name}: expected more than 0, got {value}")
    logging.getLogger("courier_fast").setLevel(logging.WARNING)
    quickstart(args.out, replace(SHORT if args.short else Quickstart(), seed=args.seed, **given))
    return 0
