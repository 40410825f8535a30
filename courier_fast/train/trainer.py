"""The training loop: a weighted sum of losses over unique images, on one process or many.

from courier_fast.train.config import Config
from courier_fast.train.trainer import Trainer

Trainer(Config.load("config.toml")).fit()
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..data.loader import Batch, Images
from .build import build_loader, build_plan, choose_device, table_of, without_auto
from .config import Config
from .encoder import Encoder
from .journal import Journal, measure
from .learner import Learner
from .objective import StepResult
from .processes import Processes
from .progress import Schedule
from .resume import SavedRun, check_run
from .stop import StopSignal


class Trainer:
    """A training run in the folder `config.run.out`; one with checkpoints is resumed from the
    newest.

    Random numbers come from (seed, step, rank) and batches from (seed, epoch, step, rank), so a run
    stopped at any moment and resumed is, on a CPU, the same run bit for bit.

    Attributes:
        encoder: the encoder being trained; `exported` is the one that is saved (the average of the
            weights with model.ema).
        progress: how far the run is.

    Raises:
        ValueError: settings that do not fit each other or the dataset.
        FileNotFoundError: no dataset in the folder given.
    """

    def __init__(self, config: Config) -> None:
        self.device = choose_device(config.run.device)
        self.config = config = without_auto(config, self.device)
        self.out = config.run.out
        check_run(config)
        self.processes = Processes(self.device)
        torch.manual_seed(config.run.seed)
        self.dataset = Dataset(config.data.dataset)
        self.plan = build_plan(config, self.dataset, self.processes.rank, self.processes.world)
        table = table_of(config, self.dataset)
        self.learner = Learner(config, self.plan, table, self.processes)
        self.encoder, self.objective = self.learner.encoder, self.learner.objective
        self.loader = build_loader(config, self.plan, self.encoder, table, self.device)
        self.saved = SavedRun(config, self.plan, table, self.learner, self.processes)
        self.checkpoints = self.saved.checkpoints
        self.progress = self.saved.restore()
        self.schedule = Schedule(config, self.plan, self.progress)
        self.signal = StopSignal()

    @property
    def exported(self) -> Encoder:
        return self.learner.exported

    # ---- one step --------------------------------------------------------------------------------

    def backward(self, batch: Batch, stats: bool = False) -> StepResult:
        """Gradients of one batch, summed over the processes, in the parameters' `.grad`."""
        anchors, sequence_anchors = self.processes.sum(
            [self.objective.anchors(batch.plan), self.objective.sequence_anchors(batch.plan)]
        )
        seed = _mix(self.config.run.seed, self.progress.step, self.processes.rank)
        torch.manual_seed(seed)
        results: list[StepResult] = []
        recall = self.schedule.recalls()

        def loss_of(features: Tensor) -> Tensor:
            # The head sees the whole batch, also where the backbone sees slices.
            embeddings = self.learner.head(features)
            found = self.objective(embeddings, batch, anchors, int(sequence_anchors), stats, recall)
            results.append(found)
            # The processes' gradients are averaged, and their sum is wanted.
            return found.loss * self.processes.world

        self.learner.backward(batch.images, loss_of, seed)
        return results[0]

    def step(self, batch: Batch, stats: bool = False) -> tuple[StepResult, Tensor]:
        """One update; also gives the norm of the gradient, 0-d on the device."""
        lr = self.schedule.learning_rate()
        result = self.backward(batch, stats)
        self.objective.remember(result.embeddings, batch)
        norm = self.learner.update(lr)
        self.progress.count(batch)
        return result, norm

    # ---- the run ---------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the end of the run; gives the last line of metrics.jsonl and whether a signal
        ended it early.

        SIGTERM, SIGINT and SIGHUP save a checkpoint and return. Checkpoints are written while
        training goes on; however it ends, it waits for them.

        Raises:
            RuntimeError: the loss is no longer finite (checkpoints stay), too many images are
                damaged, or another process could not write its part of a checkpoint.
            OSError: a checkpoint could not be written; raised at a later step.
        """
        first = self.processes.rank == 0
        try:
            with self.signal.heard(), Journal(self) if first else nullcontext() as journal:
                last = self._fit(journal)
        finally:
            self.checkpoints.wait()
        self.processes.barrier()
        return {**last, "stopped": bool(self.signal.number and not self.schedule.finished())}

    def _fit(self, journal: Journal | None) -> dict[str, Any]:
        c, p, schedule = self.config.run, self.progress, self.schedule
        last: dict[str, Any] = {}
        while not schedule.finished():
            for batch in self.loader.epoch(p.epoch, p.step_in_epoch):
                lr, logs = schedule.learning_rate(), schedule.logs()
                result, norm = self.step(batch, stats=logs)
                stopped, due = self._asked()
                ends = stopped or schedule.finished()
                if logs or ends:
                    last = measure(self, result, norm, lr)
                    if journal:
                        journal.write(last)
                if journal:
                    journal.advance()
                if ends or due or (c.save_steps and p.step % c.save_steps == 0):
                    self.save()
                if ends:
                    return last
            p.next_epoch()
            if not c.save_steps and not c.save_minutes:
                self.save()
        return last

    def _asked(self) -> tuple[bool, bool]:
        """Whether to stop, and whether to save a checkpoint now; the same on every process."""
        # One collective: any process may have been told to stop, the first one keeps the time.
        stopped, due, failed = self.processes.sum(
            [bool(self.signal.number), self.saved.due(), self.checkpoints.failed]
        )
        if failed:
            self.checkpoints.wait()  # raises what went wrong here
            raise RuntimeError("another process could not write a checkpoint, and says why")
        return bool(stopped), bool(due)

    def save(self) -> None:
        """Begins a checkpoint of now, written while training goes on. Every process calls it."""
        self.saved.save(self.progress)

    @property
    def status(self) -> int:
        """What the shell is told of a run that a signal ended: 128 and its number; another
        process's was SIGTERM."""
        return self.signal.status

    def close(self) -> None:
        """Ends the decoder and, where this trainer began it, the process group."""
        if isinstance(self.loader.source, Images):
            self.loader.source.decoder.close()
        self.processes.close()


def _mix(*values: int) -> int:
    """A seed from several numbers, without the collisions of their sum."""
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0] >> np.uint64(2))
