"""A whole training step: loader, encoder, loss, update. `python -m bench.step --dataset DIR`

Against a plain PyTorch trainer in the same run: DataLoader with Pillow and torchvision's
transforms, every occurrence of an item decoded and encoded, eager loss. Both see the same pages in
the same order, in turns. Also: the share of the step that the loss takes, and the images/s of the
backbone alone on images that are already there, the most that any trainer can reach.

On a GPU: Swin-T at 224 px in bfloat16, compiled; on a CPU, training at the quickstart's size.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from bench.command import line_of, write_json
from bench.datasets import QUICKSTART, quickstart_dataset
from bench.measure import surroundings
from courier_fast import click_sequence_loss, reconstruction_loss
from courier_fast.data.batches import BatchPlan
from courier_fast.data.dataset import Dataset
from courier_fast.data.loader import Batch
from courier_fast.train.config import Config
from courier_fast.train.trainer import Trainer


class PageDataset(TorchDataset):
    """What most people write first: a page is an item of the dataset, and each of its images is
    opened where it occurs."""

    def __init__(
        self, plan: BatchPlan, size: int, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        from torchvision import transforms

        self.plan = plan
        self.order = np.concatenate([plan.pages(0, s) for s in range(plan.steps(0))])
        self.transform = transforms.Compose(
            [
                transforms.RandomResizedCrop(size, (0.5, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(mean, std),
            ]
        )

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, np.ndarray, np.ndarray, np.ndarray]:
        page = self.plan.assemble(self.order[index : index + 1])
        shown, past = page.items[page.pv_index], page.items[page.history_index]
        return self._open(shown), self._open(past), page.clicked, shown, past

    def _open(self, items: np.ndarray) -> Tensor:
        import io

        from PIL import Image

        store = self.plan.dataset.images
        return torch.stack(
            [
                self.transform(Image.open(io.BytesIO(store[i].tobytes())).convert("RGB"))
                for i in items.tolist()
            ]
        )


def collate(pages: list[Any]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    shown, past, clicked, shown_items, past_items = zip(*pages, strict=True)

    def offsets(parts: Sequence[Any]) -> Tensor:
        return torch.tensor([0, *np.cumsum([len(p) for p in parts])])

    return (
        torch.cat(shown),
        torch.cat(past),
        torch.from_numpy(np.concatenate(clicked)),
        offsets(shown),
        offsets(past),
        torch.from_numpy(np.concatenate(shown_items)),
        torch.from_numpy(np.concatenate(past_items)),
    )


class Plain:
    """The plain trainer: the same encoder and optimizer, no unique items, eager loss."""

    def __init__(self, config: Config, workers: int) -> None:
        self.trainer = Trainer(config)
        t = self.trainer
        pages = PageDataset(t.plan, t.config.data.size, t.encoder.mean, t.encoder.std)
        self.batches = DataLoader(
            pages,
            config.data.pages,
            num_workers=workers,
            collate_fn=collate,
            persistent_workers=workers > 0,
            pin_memory=t.device.type == "cuda",
        )
        self.iterator = self._forever()

    def _forever(self) -> Iterator[Any]:
        while True:
            yield from self.batches

    def step(self) -> tuple[int, int]:
        t, loss_config = self.trainer, self.trainer.config.loss
        shown, past, clicked, pv_offsets, history_offsets, shown_items, past_items = (
            x.to(t.device, non_blocking=True) for x in next(self.iterator)
        )
        t.learner.optimizer.zero_grad()
        embeddings = t.learner.encode(
            torch.cat([shown, past]).contiguous(memory_format=torch.channels_last)
        )
        pv, history = embeddings.split([len(shown), len(past)])
        loss = reconstruction_loss(
            pv,
            history,
            clicked,
            pv_offsets=pv_offsets,
            history_offsets=history_offsets,
            item_ids=shown_items,
            temperature=loss_config.temperature,
            impl="reference",
        )
        loss = loss + loss_config.sequence_weight * click_sequence_loss(
            history,
            history_offsets=history_offsets,
            item_ids=past_items,
            temperature=loss_config.sequence_temperature,
            impl="reference",
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(t.learner.parameters, t.config.optim.clip)
        t.learner.optimizer.step()
        return len(embeddings), len(embeddings)


class Ours:
    """The trainer as it is; each turn has a loader thread of its own, which would otherwise work
    ahead while others are measured."""

    def __init__(self, config: Config) -> None:
        self.trainer = Trainer(config)
        self.epoch = 0
        self.waited = 0.0
        self.batches: Iterator[Batch] = iter(())

    def begin(self) -> None:
        self.batches = self.trainer.loader.epoch(self.epoch)
        self.epoch += 1

    def end(self) -> None:
        self.batches.close()  # type: ignore[attr-defined]

    def step(self) -> tuple[int, int]:
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        self.trainer.step(batch)
        return batch.plan.occurrences, batch.num_items


@dataclass
class Rate:
    """Totals over the turns of one trainer."""

    seconds: list[float] = field(default_factory=list)
    occurrences: list[int] = field(default_factory=list)
    images: list[int] = field(default_factory=list)

    def add(self, seconds: float, occurrences: int, images: int) -> None:
        self.seconds.append(seconds)
        self.occurrences.append(occurrences)
        self.images.append(images)

    def per_second(self, what: str) -> float:
        """The median turn."""
        return statistics.median(
            n / s for n, s in zip(getattr(self, what), self.seconds, strict=True)
        )


def turn(
    step: Callable[[], tuple[int, int]], steps: int, device: torch.device, rate: Rate | None
) -> None:
    """Some steps of one candidate; what it starts first (a loader's thread) counts too."""
    owner: Any = getattr(step, "__self__", None)
    start = time.perf_counter()
    if hasattr(owner, "begin"):
        owner.begin()
    done = [step() for _ in range(steps)]
    if device.type == "cuda":
        torch.cuda.synchronize()
    if hasattr(owner, "end"):
        owner.end()
    if rate is not None:
        rate.add(time.perf_counter() - start, sum(o for o, _ in done), sum(i for _, i in done))


def bare(trainer: Trainer, batch: Batch) -> tuple[int, int]:
    """The backbone alone: forward, a backward of a plain sum, update; no loader, no loss."""
    trainer.learner.optimizer.zero_grad()
    trainer.learner.encode(batch.images).float().square().mean().backward()
    trainer.learner.optimizer.step()
    return batch.plan.occurrences, batch.num_items


def loss_seconds(trainer: Trainer, batch: Batch, repeats: int = 5) -> float:
    """Forward and backward of both losses on given embeddings: the best of some runs."""
    with torch.no_grad():
        embeddings = trainer.learner.encode(batch.images)
    best = float("inf")
    for _ in range(repeats):
        leaf = embeddings.detach().requires_grad_()
        start = time.perf_counter()
        trainer.objective(leaf, batch, 1, 1, False).loss.backward()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return best


def measure(
    config: Config, *, turns: int, steps: int, workers: int, plain: bool = True, warm_up: int = 2
) -> dict[str, Any]:
    """Rates of each trainer; see the module."""
    ours = Ours(config)
    device = ours.trainer.device
    batch = ours.trainer.loader.load(0, 0)
    candidates: dict[str, Callable[[], tuple[int, int]]] = {
        "ours": ours.step,
        "backbone alone": lambda: bare(ours.trainer, batch),
    }
    if plain:
        candidates["plain"] = Plain(config, workers).step
    for step in candidates.values():
        turn(step, warm_up, device, None)
    ours.waited = 0.0
    rates = {name: Rate() for name in candidates}
    for _ in range(turns):
        for name, step in candidates.items():
            turn(step, steps, device, rates[name])
    step_seconds = statistics.median(rates["ours"].seconds) / steps
    return {
        "rates": {
            name: {
                "occurrences_per_s": r.per_second("occurrences"),
                "images_per_s": r.per_second("images"),
            }
            for name, r in rates.items()
        },
        "occurrences_per_unique_image": sum(rates["ours"].occurrences) / sum(rates["ours"].images),
        "step_seconds": step_seconds,
        "loss_share": loss_seconds(ours.trainer, batch) / step_seconds,
        "waiting_for_images_share": ours.waited / sum(rates["ours"].seconds),
    }


def add_arguments(parser: argparse.ArgumentParser, size: int) -> None:
    """What bench.loader is asked for, too."""
    add = parser.add_argument
    add(
        "--dataset",
        type=Path,
        help="a prepared dataset; without one, that of the quickstart is drawn",
    )
    add("--pages", type=int, default=QUICKSTART.pages, help="per step (default: the quickstart's)")
    add("--backbone", default="auto")
    add("--size", type=int, default=size, help="pixels; 0: the trainer's default")
    add("--history", type=int, default=QUICKSTART.history)
    add("--turns", type=int, default=3)
    add("--steps", type=int, default=10, help="batches per turn")
    add(
        "--workers",
        type=int,
        default=0,
        help="of the plain DataLoader; on two cores 0 was no slower than 2",
    )
    add("--json", type=Path)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m bench.step", description=__doc__.split("\n")[0] if __doc__ else None
    )
    on_gpu = torch.cuda.is_available()
    add_arguments(parser, 0 if on_gpu else QUICKSTART.size)
    add = parser.add_argument
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=on_gpu,
        help="torch.compile the encoder (default: on a GPU)",
    )
    add(
        "--warm-up",
        type=int,
        default=20 if on_gpu else 2,
        help="steps before the first turn: every padded number of images is compiled once",
    )
    return parser.parse_args(arguments)


def run(
    args: argparse.Namespace,
    more: dict[str, Any],
    measure: Callable[[Config], dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
) -> int:
    """Measures with the settings asked for and `more`, and says what came out."""
    with tempfile.TemporaryDirectory() as folder:
        if args.dataset is None:
            args.dataset = quickstart_dataset(Path(folder))
        overrides = {
            "data.dataset": args.dataset,
            "data.pages": args.pages,
            "data.size": args.size,
            "data.history": args.history,
            "model.backbone": args.backbone,
            "run.out": Path(folder) / "run",
        }
        result = measure(Config.load(None, overrides | more))
        dataset = Dataset(args.dataset)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        result |= {
            "surroundings": surroundings(device),
            "dataset": {"pages": dataset.num_pages, "items": dataset.num_items},
        }
    print(report(result))
    write_json(args.json, result)
    return 0


def report(result: dict[str, Any]) -> str:
    rates = result["rates"]
    lines = [line_of(result["surroundings"]), ""]
    lines += [f"{'':<16}{'occurrences/s':>15}{'images/s':>12}"]
    lines += [
        f"{name:<16}{r['occurrences_per_s']:>15,.0f}{r['images_per_s']:>12,.0f}"
        for name, r in rates.items()
    ]
    lines += ["", f"occurrences per unique image: {result['occurrences_per_unique_image']:.2f}"]
    if "plain" in rates:
        lines.append(
            "ours over plain: "
            f"{rates['ours']['occurrences_per_s'] / rates['plain']['occurrences_per_s']:.2f} x "
            "occurrences/s"
        )
    lines += [
        "ours over the backbone alone: "
        f"{rates['ours']['images_per_s'] / rates['backbone alone']['images_per_s']:.1%} of its "
        "images/s",
        f"a step takes {result['step_seconds'] * 1e3:.0f} ms: "
        f"{result['loss_share']:.1%} of it the loss, "
        f"{result['waiting_for_images_share']:.1%} waiting for images",
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    sizes = {"turns": args.turns, "steps": args.steps, "workers": args.workers}
    more = {"model.compile": args.compile, "optim.steps": 10**6}
    return run(args, more, partial(measure, **sizes, warm_up=args.warm_up), report)


if __name__ == "__main__":
    sys.exit(main())
