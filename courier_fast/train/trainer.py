"""The training loop: L_rec + weight * L_seq over unique images, on one process or many.

from courier_fast.train.config import Config
from courier_fast.train.trainer import Trainer

Trainer(Config.load("config.toml")).fit()
"""

from __future__ import annotations

import logging
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ..data.batches import BatchPlan
from ..data.dataset import Dataset
from ..data.embeddings import read_embeddings
from ..data.loader import Augmentation, Batch, Features, Images, Loader
from .checkpoint import Checkpoints, optimizer_tensors
from .config import Config
from .encoder import SMALL_CONV, Encoder, build_encoder, build_projection, save_encoder
from .gradient_cache import cached_backward, check_sliceable
from .journal import Journal, measure
from .objective import Objective, StepResult
from .processes import Processes

log = logging.getLogger(__name__)


@dataclass
class Progress:
    """Where the run is: with the settings, all that is needed to go on beside the tensors."""

    step: int = 0  # updates done
    epoch: int = 0
    step_in_epoch: int = 0  # updates done in this epoch
    images: int = 0  # unique images, occurrences and damaged images so far
    occurrences: int = 0
    damaged: int = 0


class Trainer:
    """A training run in the folder `config.run.out`; one with checkpoints is resumed from the newest.

    Random numbers come from (seed, step, rank) and batches from (seed, epoch, step, rank), so a run stopped at any moment and resumed is, on a
    CPU, the same run bit for bit.

    Attributes:
        encoder: the encoder being trained; `exported` is the one that is saved (the average of the weights with model.ema).
        progress: how far the run is.

    Raises:
        ValueError: settings that do not fit each other or the dataset.
        FileNotFoundError: no dataset in the folder given.
    """

    def __init__(self, config: Config) -> None:
        name = config.run.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        self.config = config = self._resolve(config)
        self.processes = Processes(self.device)
        torch.manual_seed(config.run.seed)
        self.dataset = Dataset(config.data.dataset)
        self.plan = BatchPlan(
            self.dataset, pages=config.data.pages, images=config.data.images, history=config.data.history,
            share=config.data.share, seed=config.run.seed, rank=self.processes.rank, world=self.processes.world,
        )  # fmt: skip
        self._build_model()
        self._build_loader()
        self.progress = Progress()
        self.out = config.run.out
        self.checkpoints = Checkpoints(self.out / "checkpoints", config.run.keep)
        self._stop = False
        self._resume()

    # ---- building -------------------------------------------------------------------------------------------------

    def _resolve(self, config: Config) -> Config:
        """Every "auto" replaced by what it means on this device."""
        config = config.model_copy(deep=True)
        gpu = self.device.type == "cuda"
        config.run.device = self.device.type
        config.data.size = config.data.size or (224 if gpu else 96)
        if config.model.backbone == "auto":
            config.model.backbone = "swin_tiny_patch4_window7_224" if gpu else SMALL_CONV
        if config.model.batch_norm is None:
            config.model.batch_norm = not (
                config.model.pretrained or config.model.weights or config.data.features
            )
        if config.run.precision == "auto":
            config.run.precision = "bfloat16" if gpu else "float32"
        return config

    def _build_model(self) -> None:
        c = self.config
        self.table = (
            None if c.data.features is None else read_features(c.data.features, self.dataset)
        )
        if self.table is not None:
            self.encoder = build_projection(
                self.table.shape[1], c.model.dim, torch.from_numpy(self.table)
            )
        else:
            self.encoder = build_encoder(
                c.model.backbone,
                c.model.dim,
                c.data.size,
                pretrained=c.model.pretrained,
                weights=c.model.weights,
                batch_norm=bool(c.model.batch_norm),
            )
        self.encoder.about["trained_until"] = self.plan.until
        self.encoder.to(self.device).train()
        if self.table is None:
            self.encoder.to(memory_format=torch.channels_last)
        if c.model.checkpointing:
            enable = getattr(self.encoder.backbone, "set_grad_checkpointing", None)
            if enable is None:
                raise ValueError(
                    f"model.checkpointing: the backbone {c.model.backbone} has no gradient checkpointing"
                )
            enable()
        if c.model.slice:
            check_sliceable(self.encoder.backbone)
        log_q = (
            torch.from_numpy(self.plan.log_q(c.loss.history_negatives)) if c.loss.log_q else None
        )
        weights = (
            torch.from_numpy(self.plan.weights(c.loss.weight_power))
            if c.loss.weight_power
            else None
        )
        self.objective = Objective(c.loss, c.model.dim, log_q, weights, self.processes.group)
        self.objective.to(self.device)
        self.model = nn.ModuleDict({"encoder": self.encoder, "objective": self.objective})
        self.processes.broadcast(list(self.model.state_dict().values()))
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.synchronised = self.processes.synchronised(self.parameters)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": [p for p in self.parameters if p.ndim > 1], "weight_decay": c.optim.weight_decay},
                {"params": [p for p in self.parameters if p.ndim <= 1], "weight_decay": 0.0},
            ],
            lr=c.optim.lr, betas=c.optim.betas, fused=self.device.type == "cuda",
        )  # fmt: skip
        self.average = (
            AveragedModel(
                self.encoder, multi_avg_fn=get_ema_multi_avg_fn(c.model.ema), use_buffers=True
            )
            if c.model.ema
            else None
        )
        backbone = self.encoder.backbone
        self.backbone: Any = torch.compile(backbone, dynamic=False) if c.model.compile else backbone

    def _build_loader(self) -> None:
        c = self.config
        source: Images | Features
        if self.table is not None:
            source = Features(self.table, self.device)
        else:
            from ..data.decode import make_decoder

            decoder = make_decoder(
                c.data.decoder, c.data.size, device=self.device, threads=c.data.threads,
                mean=self.encoder.mean, std=self.encoder.std,
            )  # fmt: skip
            augmentation = Augmentation(c.data.scale, c.data.ratio, c.data.flip)
            source = Images(self.plan, decoder, augmentation, max_damaged=c.data.max_damaged)
        pad = self.device.type == "cuda" or c.model.compile or bool(c.data.buckets)
        self.loader = Loader(
            self.plan,
            source,
            device=self.device,
            pad=pad,
            buckets=c.data.buckets,
            ahead=c.data.ahead,
        )

    @property
    def exported(self) -> Encoder:
        return self.encoder if self.average is None else self.average.module

    # ---- one step -------------------------------------------------------------------------------------------------

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to min_lr, by the share of the run that is done."""
        c, done = self.config.optim, self._done()
        if done < c.warmup:
            # Half a step ahead, so that the first update is not lost to a rate of 0.
            return c.lr * min(1.0, (done + 0.5 / max(self._steps_estimate(), 1)) / c.warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - c.warmup) / (1 - c.warmup))))
        return c.lr * (c.min_lr + (1 - c.min_lr) * share)

    def _done(self) -> float:
        """The share of the run that is done."""
        c, p = self.config.optim, self.progress
        if c.steps:
            return p.step / c.steps
        return (p.epoch + p.step_in_epoch / self.plan.steps(p.epoch)) / c.epochs

    def _recalls(self) -> bool:
        """Whether the memory is old enough to be used."""
        after = self.config.loss.memory_after
        if after is None:
            return self._done() >= self.config.optim.warmup
        return self.progress.step >= after

    def _steps_estimate(self) -> int:
        c = self.config.optim
        return c.steps or c.epochs * self.plan.steps(self.progress.epoch)

    def encode(self, images: Tensor) -> Tensor:
        """Embeddings [n, D]."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The backbone's output [n, F], in the run's precision."""
        with self._autocast():
            return self.backbone(images)

    def head(self, features: Tensor) -> Tensor:
        """Embeddings [n, D] of the backbone's output; on a CPU in float32."""
        with self._autocast():
            embeddings = self.encoder.head(features)
        return embeddings if self.device.type == "cuda" else embeddings.float()

    def _autocast(self) -> Any:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16"
        )

    def backward(self, batch: Batch, stats: bool = False) -> StepResult:
        """Gradients of one batch, summed over the processes, in the parameters' `.grad`."""
        anchors, sequence_anchors = self.processes.sum(
            [self.objective.anchors(batch.plan), batch.plan.num_sequence_anchors]
        )
        seed = _mix(self.config.run.seed, self.progress.step, self.processes.rank)
        torch.manual_seed(seed)
        results: list[StepResult] = []
        recall = self._recalls()

        def loss_of(features: Tensor) -> Tensor:
            # The head sees the whole batch, also where the backbone sees slices.
            found = self.objective(
                self.head(features), batch, anchors, int(sequence_anchors), stats, recall
            )
            results.append(found)
            # The processes' gradients are averaged, and their sum is wanted.
            return found.loss * self.processes.world

        # With several processes gradients stay where they are: in the buckets that are exchanged.
        self.optimizer.zero_grad(set_to_none=self.processes.world == 1)
        size = self.config.model.slice
        if size and len(batch.images) > size:
            cached_backward(self.features, batch.images, loss_of, size, seed, self.synchronised)
        elif batch.num_items:
            self.synchronised(lambda: loss_of(self.features(batch.images))).backward()
        else:  # no page is left for this process: no row, and the others wait for its zeros
            rows = torch.zeros(0, self.encoder.features, device=self.device)
            self.synchronised(lambda: loss_of(rows)).backward()
        return results[0]

    def step(self, batch: Batch, stats: bool = False) -> tuple[StepResult, Tensor]:
        """One update; also gives the norm of the gradient, 0-d on the device."""
        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        result = self.backward(batch, stats)
        self.objective.remember(result.embeddings, batch)
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.optim.clip or math.inf)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.encoder)
        p = self.progress
        p.step += 1
        p.step_in_epoch += 1
        p.images += batch.num_items
        p.occurrences += batch.plan.occurrences
        p.damaged += batch.damaged
        return result, norm

    # ---- the run --------------------------------------------------------------------------------------------------

    def fit(self) -> dict[str, Any]:
        """Trains to the end of the run; gives the last line of metrics.jsonl and whether a signal ended it early.

        SIGTERM and SIGINT save a checkpoint and return.

        Raises:
            RuntimeError: the loss is no longer finite (checkpoints stay), or too many images are damaged.
        """
        c, p = self.config, self.progress
        saved_at, last = time.monotonic(), {}
        with (
            self._signals(),
            Journal(self) if self.processes.rank == 0 else nullcontext() as journal,
        ):
            while not self._finished():
                for batch in self.loader.epoch(p.epoch, p.step_in_epoch):
                    lr = self.learning_rate()
                    logs = p.step % c.run.log_steps == 0 or self._finished(1)
                    result, norm = self.step(batch, stats=logs)
                    finished = self._finished()
                    minutes = (time.monotonic() - saved_at) / 60
                    due = (
                        c.run.save_minutes > 0
                        and minutes >= c.run.save_minutes
                        and self.processes.rank == 0
                    )
                    # One collective: any process may have been told to stop, the first one keeps the time.
                    stop, due_now = self.processes.sum([self._stop, due])
                    if logs or finished or stop:
                        line = measure(self, result, norm, lr)
                        if journal:
                            journal.write(line)
                        last = line
                    if journal:
                        journal.advance()
                    if (
                        stop
                        or due_now
                        or finished
                        or (c.run.save_steps and p.step % c.run.save_steps == 0)
                    ):
                        self.save()
                        saved_at = time.monotonic()
                    if stop or finished:
                        break
                if stop or finished:
                    break
                p.epoch, p.step_in_epoch = p.epoch + 1, 0
                if not c.run.save_steps and not c.run.save_minutes:
                    self.save()
        return {**last, "stopped": bool(self._stop and not self._finished())}

    def _finished(self, more: int = 0) -> bool:
        """Whether the run is at its end, or will be after so many more steps of this epoch."""
        c, p = self.config.optim, self.progress
        if c.steps:
            return p.step + more >= c.steps
        last = p.epoch == c.epochs - 1
        return p.epoch >= c.epochs or (last and p.step_in_epoch + more >= self.plan.steps(p.epoch))

    @contextmanager
    def _signals(self) -> Iterator[None]:
        def stop(number: int, frame: Any) -> None:
            if self._stop and number == signal.SIGINT:  # asked for twice: now
                raise KeyboardInterrupt
            log.warning("signal %d: saving and stopping after this step", number)
            self._stop = True

        try:
            before = {s: signal.signal(s, stop) for s in (signal.SIGTERM, signal.SIGINT)}
        except ValueError:  # not the main thread: signals are its owner's
            before = {}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def close(self) -> None:
        """Ends the decoder and, where this trainer began it, the process group."""
        if isinstance(self.loader.source, Images):
            self.loader.source.decoder.close()
        self.processes.close()

    # ---- checkpoints ----------------------------------------------------------------------------------------------

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        tensors |= {
            f"optimizer.{n}": t for n, t in optimizer_tensors(self.model, self.optimizer).items()
        }
        if self.average is not None:
            tensors |= {f"average.{n}": t for n, t in self.average.state_dict().items()}
        return tensors

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for batches and schedule to go on where they were."""
        c = self.config
        return {
            "seed": c.run.seed, "world": self.processes.world, "pages": c.data.pages, "images": c.data.images,
            "history": c.data.history, "dataset_pages": len(self.plan.rows), "items": self.dataset.num_items,
        }  # fmt: skip

    def save(self) -> None:
        """Writes a checkpoint now. Every process calls it; the first one writes."""
        p = self.progress
        images, occurrences, damaged = self.processes.sum([p.images, p.occurrences, p.damaged])
        if self.processes.rank == 0:
            tensors = self._tensors()
            if not all(
                t.isfinite().all()
                for n, t in tensors.items()
                if n.startswith("model.") and t.is_floating_point()
            ):
                raise RuntimeError(
                    f"parameters are no longer finite at step {self.progress.step}: no checkpoint was written"
                )
            progress = replace(
                p, images=int(images), occurrences=int(occurrences), damaged=int(damaged)
            )
            state = {"progress": vars(progress), "identity": self._identity()}
            self.checkpoints.save(self.progress.step, tensors, state)
            save_encoder(self.exported, self.out)
        self.processes.barrier()

    def _resume(self) -> None:
        found = self.checkpoints.all()
        if not found:
            return
        state = self.checkpoints.load(found[-1], self._tensors())
        # Its tensors were filled in place, of which a memory, that counts its rows on the host, has not heard.
        self.model.load_state_dict(self.model.state_dict())
        here = self._identity()
        if state["identity"] != here:
            differ = {k: (v, here.get(k)) for k, v in state["identity"].items() if v != here.get(k)}
            raise ValueError(
                f"run.out: {self.out} has a run with other settings (there, here): {differ}; expected the same, or another folder"
            )
        self.progress = Progress(**state["progress"])
        if self.processes.rank:  # the checkpoint's counts are those of all processes
            self.progress = replace(self.progress, images=0, occurrences=0, damaged=0)
        if self.progress.step_in_epoch >= self.plan.steps(self.progress.epoch):
            self.progress.epoch, self.progress.step_in_epoch = self.progress.epoch + 1, 0
        log.info("resumed from %s", found[-1])


def _mix(*values: int) -> int:
    """A seed from several numbers, without the collisions of their sum."""
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0] >> np.uint64(2))


def read_features(path: str | os.PathLike[str], dataset: Dataset) -> np.ndarray:
    """Precomputed embeddings [items, F] as `read_embeddings` gives them; ValueError also where an item that is used has none."""
    table = read_embeddings(path, dataset)
    used = np.unique(np.concatenate([dataset.pv_item, dataset.event_item]))
    lacking = used[~np.isfinite(table[used]).all(1)]
    if len(lacking):
        ids = [str(dataset.item_ids[i]) for i in lacking[:5].tolist()]
        raise ValueError(
            f"features: {len(lacking)} items on pages or in histories have no finite row in {path}, such as {', '.join(ids)}"
        )
    return table
