"""How far a run is, and what follows from it: its end, the learning rate, the memory's use."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..data.batches import BatchPlan
from ..data.loader import Batch
from .config import Config


@dataclass
class Progress:
    """Where the run is: with the settings, all that is needed to go on beside the tensors."""

    step: int = 0  # updates done
    epoch: int = 0
    step_in_epoch: int = 0  # updates done in this epoch
    images: int = 0  # unique images, occurrences and damaged images so far
    occurrences: int = 0
    damaged: int = 0
    # Where this epoch was last cut into batches anew, for another number of processes: its steps
    # and pages before that.
    cut_step: int = 0
    cut_page: int = 0

    def count(self, batch: Batch) -> None:
        """A step is done."""
        self.step += 1
        self.step_in_epoch += 1
        self.images += batch.num_items
        self.occurrences += batch.plan.occurrences
        self.damaged += batch.damaged

    def next_epoch(self) -> None:
        self.epoch += 1
        self.step_in_epoch = self.cut_step = self.cut_page = 0


@dataclass(frozen=True)
class Schedule:
    """What a run does when, by its progress, which changes."""

    config: Config
    plan: BatchPlan
    progress: Progress

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to min_lr, by the share of the run that is done."""
        c, done = self.config.optim, self.done()
        if done < c.warmup:
            # Half a step ahead, so that the first update is not lost to a rate of 0.
            return c.lr * min(1.0, (done + 0.5 / max(self.steps(), 1)) / c.warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - c.warmup) / (1 - c.warmup))))
        return c.lr * (c.min_lr + (1 - c.min_lr) * share)

    def steps(self) -> int:
        """Steps of the run; by epochs, as if each had as many as this one."""
        c = self.config.optim
        return c.steps or c.epochs * self.plan.steps(self.progress.epoch)

    def done(self) -> float:
        """The share of the run that is done."""
        c, p = self.config.optim, self.progress
        if c.steps:
            return p.step / c.steps
        if p.cut_step:  # steps before and after it are not of one size
            share = self.plan.position(p.epoch, p.step_in_epoch) / len(self.plan.rows)
        else:
            share = p.step_in_epoch / self.plan.steps(p.epoch)
        return (p.epoch + share) / c.epochs

    def finished(self, more: int = 0) -> bool:
        """Whether the run is at its end, or will be after so many more steps of this epoch."""
        c, p = self.config.optim, self.progress
        if c.steps:
            return p.step + more >= c.steps
        last = p.epoch == c.epochs - 1
        return p.epoch >= c.epochs or (last and p.step_in_epoch + more >= self.plan.steps(p.epoch))

    def logs(self) -> bool:
        """Whether the journal gets a line of the step that comes."""
        return self.progress.step % self.config.run.log_steps == 0 or self.finished(1)

    def recalls(self) -> bool:
        """Whether the memory is old enough to be used."""
        after = self.config.loss.memory_after
        if after is None:
            return self.done() >= self.config.optim.warmup
        return self.progress.step >= after
