"""What a run tells: a line of numbers every few steps, TensorBoard, the progress bar."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..files import write_atomically
from .checkpoint import Checkpoints
from .config import Config
from .monitor import effective_rank, uniformity
from .objective import Objective, StepResult
from .processes import Processes
from .progress import Progress, Schedule


class Run(Protocol):
    """What a journal tells of: the trainer."""

    config: Config
    out: Path
    progress: Progress
    schedule: Schedule
    processes: Processes
    objective: Objective
    checkpoints: Checkpoints


@torch.no_grad()
def measure(trainer: Run, result: StepResult, norm: Tensor, lr: float) -> dict[str, Any]:
    """A line of the journal. Values of the loss are over all processes, those of the embeddings of
    this one.

    Every process calls it. Raises RuntimeError where the loss or the gradient is no longer finite.
    """
    p = trainer.progress
    losses = [x.item() for x in (result.loss, result.rec, result.pred, result.seq)]
    loss, rec, pred, seq, images, occurrences, damaged = trainer.processes.sum(
        [*losses, p.images, p.occurrences, p.damaged]
    )
    line: dict[str, Any] = {
        "step": p.step,
        "epoch": p.epoch,
        "loss": loss,
        "loss_rec": rec,
        "loss_seq": seq,
        "lr": lr,
        "temperature": float(trainer.objective.rec.temperature),
        "sequence_temperature": trainer.objective.sequence_temperature,
        "grad_norm": norm.item(),
        "images": int(images),
        "occurrences": int(occurrences),
        "damaged_share": damaged / max(images, 1),
    }
    if trainer.objective.has_click_head:
        line["loss_pred"] = pred
    if len(result.embeddings) > 1:
        line["uniformity"] = uniformity(result.embeddings).item()
        line["effective_rank"] = effective_rank(result.embeddings).item()
    if result.stats is not None and int(result.stats.num_anchors):
        line["top1"] = result.stats.recall_at(1).item()
        cosine = result.stats.positive_similarity.sum() / result.stats.num_anchors
        line["alignment"] = 2 - 2 * cosine.item()
    if trainer.objective.memory is not None:
        line["memory_age"] = trainer.objective.memory.age()
    if not math.isfinite(loss) or not math.isfinite(line["grad_norm"]):
        raise RuntimeError(
            f"loss {loss:g}, gradient norm {line['grad_norm']:g} at step {p.step}: training has "
            "diverged. Lower optim.lr "
            f"(now {lr:g}) or raise optim.warmup; "
            f"the checkpoints in {trainer.checkpoints.folder} are untouched"
        )
    return line


def parsed(line: str) -> dict[str, Any] | None:
    """A line of the journal; None of what is none: a full disk or a machine that stopped has left a
    part of one."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else None


def _step_of(line: str) -> float:
    """The step of a line of the journal; infinity of what is none."""
    found = parsed(line)
    return math.inf if found is None else found["step"]


def last_step(path: Path) -> int | None:
    """The last step that a journal tells of; None where it tells of none."""
    steps = [_step_of(line) for line in path.read_text("utf-8", "replace").splitlines()]
    whole = [int(step) for step in steps if step < math.inf]
    return whole[-1] if whole else None


class Journal:
    """metrics.jsonl, TensorBoard and the progress bar of a run."""

    def __init__(self, trainer: Run) -> None:
        self.trainer, config = trainer, trainer.config
        trainer.out.mkdir(parents=True, exist_ok=True)
        config.save(trainer.out / "config.toml")
        self.path = trainer.out / "metrics.jsonl"
        self._forget_after(trainer.progress.step)
        self.file = self.path.open("a", buffering=1)
        self.started, p = time.monotonic(), trainer.progress
        self.images, self.occurrences = p.images, p.occurrences
        self.board: Any = None
        if config.run.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(
                str(trainer.out / "tensorboard"), purge_step=trainer.progress.step + 1
            )
        self.bar: Any = None
        if config.run.progress:
            from rich import progress
            from rich.progress import (
                BarColumn,
                MofNCompleteColumn,
                TextColumn,
                TimeRemainingColumn,
            )

            self.bar = progress.Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self.task = self.bar.add_task(
                "", total=trainer.schedule.steps(), completed=trainer.progress.step, text=""
            )
            self.bar.start()

    def _forget_after(self, step: int) -> None:
        """Drops lines of steps after the checkpoint that is resumed: they are done again."""
        if self.path.is_file():
            lines = self.path.read_text("utf-8", "replace").splitlines()
            text = "".join(f"{x}\n" for x in lines if _step_of(x) <= step)
            write_atomically(self.path, lambda path: path.write_text(text))

    def write(self, line: dict[str, Any]) -> None:
        """One JSON line; rates are since the last one."""
        now = time.monotonic()
        seconds = max(now - self.started, 1e-9)
        line |= {
            "images_per_s": (line["images"] - self.images) / seconds,
            "occurrences_per_s": (line["occurrences"] - self.occurrences) / seconds,
            "time": time.time(),
        }
        self.started, self.images, self.occurrences = now, line["images"], line["occurrences"]
        self.file.write(json.dumps(line) + "\n")
        if self.board:
            for name, value in line.items():
                if name not in ("step", "time"):
                    self.board.add_scalar(name, value, line["step"])
        if self.bar:
            top1 = f"  top-1 {line['top1']:.2f}" if "top1" in line else ""
            text = f"loss {line['loss']:.3f}{top1}  {line['images_per_s']:.0f} images/s"
            self.bar.update(self.task, text=text)

    def advance(self) -> None:
        if self.bar:
            self.bar.update(self.task, completed=self.trainer.progress.step)

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self.file.close()
        if self.board:
            self.board.close()
        if self.bar:
            self.bar.stop()
