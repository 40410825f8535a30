"""The loader alone, with each decoder, against the rate at which the backbone trains.

    python -m bench.loader --dataset DIR

Everything decodes the same batches in turns in one run: random crop, resize, flip, normalise.
"plain" is a DataLoader with Pillow and torchvision's transforms that opens every occurrence of an
item. Occurrences/s is what counts for training; images/s what a decoder does.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch.utils.data import DataLoader

from bench.command import line_of
from bench.datasets import QUICKSTART
from bench.step import PageDataset, Rate, add_arguments, bare, collate, run, turn
from courier_fast.data.loader import Augmentation, Batch, Images, Loader
from courier_fast.train.config import Config
from courier_fast.train.trainer import Trainer

KINDS = ("dali", "software", "dali-cpu", "pillow")


class Drained:
    """A loader that is asked for batch after batch; its thread lives for one turn."""

    def __init__(self, loader: Loader) -> None:
        self.loader, self.epoch = loader, 0
        self.batches: Iterator[Batch] = iter(())

    def begin(self) -> None:
        self.batches = self.loader.epoch(self.epoch)
        self.epoch += 1

    def end(self) -> None:
        self.batches.close()  # type: ignore[attr-defined]

    def step(self) -> tuple[int, int]:
        batch = next(self.batches)
        return batch.plan.occurrences, batch.num_items


def plain_batches(loader: DataLoader) -> Iterator[tuple[int, int]]:
    while True:
        for shown, past, *_ in loader:
            yield len(shown) + len(past), len(shown) + len(past)


def measure(
    config: Config, kinds: Sequence[str], *, turns: int, steps: int, workers: int
) -> dict[str, Any]:
    """Rates of each decoder's loader, the plain one and the backbone; why one was left out."""
    from courier_fast.data.images.decode import make_decoder

    trainer = Trainer(config)
    c, encoder = trainer.config.data, trainer.encoder
    candidates: dict[str, Callable[[], tuple[int, int]]] = {}
    left_out = {}
    for kind in kinds:
        try:
            decoder = make_decoder(
                kind, c.size, device=trainer.device, mean=encoder.mean, std=encoder.std
            )
        except (ValueError, ModuleNotFoundError) as reason:
            left_out[kind] = str(reason)
            continue
        source = Images(trainer.plan, decoder, Augmentation(), max_damaged=1.0)
        candidates[kind] = Drained(
            Loader(trainer.plan, source, device=trainer.device, ahead=1)
        ).step
    pages = PageDataset(trainer.plan, c.size, encoder.mean, encoder.std)
    plain = DataLoader(
        pages, c.pages, num_workers=workers, collate_fn=collate, persistent_workers=workers > 0
    )
    candidates["plain"] = plain_batches(plain).__next__
    batch = trainer.loader.load(0, 0)
    candidates["backbone training"] = lambda: bare(trainer, batch)
    for step in candidates.values():
        turn(step, 2, trainer.device, None)
    rates = {name: Rate() for name in candidates}
    for _ in range(turns):
        for name, step in candidates.items():
            turn(step, steps, trainer.device, rates[name])
    return {
        "rates": {
            name: {
                "occurrences_per_s": r.per_second("occurrences"),
                "images_per_s": r.per_second("images"),
            }
            for name, r in rates.items()
        },
        "left_out": left_out,
    }


def report(result: dict[str, Any]) -> str:
    rates = result["rates"]
    base = rates["backbone training"]["images_per_s"]
    lines = [line_of(result["surroundings"]), ""]
    over = "images/s over the backbone in training"
    lines.append(f"{'':<20}{'images/s':>10}{'occurrences/s':>15}{over:>42}")
    for name, r in rates.items():
        images, occurrences = r["images_per_s"], r["occurrences_per_s"]
        lines.append(f"{name:<20}{images:>10,.0f}{occurrences:>15,.0f}{images / base:>41.2f}x")
    lines += [f"{kind}: left out: {reason}" for kind, reason in result["left_out"].items()]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.loader")
    add_arguments(parser, QUICKSTART.size)
    parser.add_argument("--decoders", nargs="+", default=KINDS, choices=KINDS)
    args = parser.parse_args(arguments)
    sizes = {"turns": args.turns, "steps": args.steps, "workers": args.workers}
    return run(args, {}, partial(measure, kinds=args.decoders, **sizes), report)


if __name__ == "__main__":
    sys.exit(main())
