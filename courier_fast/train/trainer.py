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
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..data.batches import BatchPlan
from ..data.dataset import Dataset
from ..data.embeddings import read_embeddings
from ..data.loader import Augmentation, Batch, Features, Images, Loader
from ..files import array_sha256
from ..output import check_growing
from .checkpoint import Checkpoints, optimizer_tensors
from .config import Config
from .encoder import SMALL_CONV, Encoder, build_encoder, build_projection, save_encoder
from .gradient_cache import cached_backward, check_sliceable
from .journal import Journal, measure
from .objective import Objective, StepResult
from .processes import Processes
from .progress import Progress
from .sharding import (
    average_gradients,
    averaging,
    clip_gradients,
    gathered,
    is_sharded,
    local,
    make_mesh,
    shard,
)

log = logging.getLogger(__name__)


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
        name = config.run.device
        if name == "auto":
            name = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(name)
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
            torch.cuda.set_device(self.device)
        self.config = config = self._resolve(config)
        self.out = config.run.out
        check_run(config)
        self.processes = Processes(self.device)
        self.sharded = config.model.shard and self.processes.world > 1
        torch.manual_seed(config.run.seed)
        self.dataset = Dataset(config.data.dataset)
        self.plan = self._plan(
            config.data.pages, config.data.images, self.processes.rank, self.processes.world
        )
        self._build_model()
        self._build_loader()
        self.progress = Progress()
        self.checkpoints = Checkpoints(
            self.out / "checkpoints",
            config.run.keep,
            self.processes.rank,
            self.processes.host_group() if self.sharded else None,
            make_mesh(torch.device("cpu")) if self.sharded else None,
        )
        self._stop = 0  # the number of the signal that asked for it
        self._resume()

    def _plan(self, pages: int, images: int, rank: int, world: int) -> BatchPlan:
        c = self.config
        return BatchPlan(
            self.dataset,
            pages=pages,
            images=images,
            history=c.data.history,
            share=c.data.share,
            seed=c.run.seed,
            rank=rank,
            world=world,
        )

    # ---- building --------------------------------------------------------------------------------

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
        self.encoder.train()
        if not self.sharded:  # on a GPU there may be no room for the whole
            self.encoder.to(self.device)
            if self.table is None:
                self.encoder.to(memory_format=torch.channels_last)
        if c.model.checkpointing:
            enable = getattr(self.encoder.backbone, "set_grad_checkpointing", None)
            if enable is None:
                raise ValueError(
                    "model.checkpointing: "
                    f"the backbone {c.model.backbone} has no gradient checkpointing"
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
        self.average = (
            AveragedModel(self.encoder, multi_avg_fn=averaging(c.model.ema), use_buffers=True)
            if c.model.ema
            else None
        )
        if self.sharded:
            mesh = make_mesh(self.device)
            for encoder in (
                [self.encoder] if self.average is None else [self.encoder, self.exported]
            ):
                shard(encoder.backbone, mesh, c.run.precision)
                encoder.to(self.device)
        self._build_optimizer()
        backbone = self.encoder.backbone
        self.backbone: Any = torch.compile(backbone, dynamic=False) if c.model.compile else backbone

    def _build_optimizer(self) -> None:
        c = self.config.optim
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.replicated = [p for p in self.parameters if not is_sharded(p)]
        self.synchronised = (
            (lambda compute: compute())
            if self.sharded
            else self.processes.synchronised(self.parameters)
        )
        # A group is of one kind: no kernel takes both.
        kinds = [self.replicated, [p for p in self.parameters if is_sharded(p)]]
        groups = [
            {
                "params": [p for p in kind if (p.ndim > 1) is decays],
                "weight_decay": c.weight_decay * decays,
            }
            for kind in kinds
            for decays in (True, False)
        ]
        self.optimizer = torch.optim.AdamW(
            [g for g in groups if g["params"]],
            lr=c.lr,
            betas=c.betas,
            fused=self.device.type == "cuda",
        )

    def _build_loader(self) -> None:
        c = self.config
        source: Images | Features
        if self.table is not None:
            source = Features(self.table, self.device)
        else:
            from ..data.images.decode import make_decoder

            decoder = make_decoder(
                c.data.decoder,
                c.data.size,
                device=self.device,
                threads=c.data.threads,
                mean=self.encoder.mean,
                std=self.encoder.std,
            )
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

    # ---- one step --------------------------------------------------------------------------------

    def learning_rate(self) -> float:
        """Linear warm-up, then a cosine to min_lr, by the share of the run that is done."""
        c, done = self.config.optim, self._done()
        if done < c.warmup:
            # Half a step ahead, so that the first update is not lost to a rate of 0.
            return c.lr * min(1.0, (done + 0.5 / max(self.steps_estimate(), 1)) / c.warmup)
        share = 0.5 * (1 + math.cos(math.pi * min(1.0, (done - c.warmup) / (1 - c.warmup))))
        return c.lr * (c.min_lr + (1 - c.min_lr) * share)

    def _done(self) -> float:
        """The share of the run that is done."""
        c, p = self.config.optim, self.progress
        if c.steps:
            return p.step / c.steps
        if p.cut_step:  # steps before and after it are not of one size
            share = self.plan.position(p.epoch, p.step_in_epoch) / len(self.plan.rows)
        else:
            share = p.step_in_epoch / self.plan.steps(p.epoch)
        return (p.epoch + share) / c.epochs

    def _recalls(self) -> bool:
        """Whether the memory is old enough to be used."""
        after = self.config.loss.memory_after
        if after is None:
            return self._done() >= self.config.optim.warmup
        return self.progress.step >= after

    def steps_estimate(self) -> int:
        c = self.config.optim
        return c.steps or c.epochs * self.plan.steps(self.progress.epoch)

    def encode(self, images: Tensor) -> Tensor:
        """Embeddings [n, D]."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The backbone's output [n, F], in the run's precision."""
        n = len(images)
        if self.sharded:
            # To gather parameters takes all processes; some backbones fail on no image, batch norms
            # on one.
            if not n:
                images = images.new_zeros(2, *images.shape[1:])
            # What follows keeps the layout, which otherwise the weights have.
            images = images.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            features = self.backbone(images)
        return features if n else features[:0]

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

        # With replicas gradients stay where they are: in the buckets that are exchanged.
        self.optimizer.zero_grad(set_to_none=self.sharded or self.processes.world == 1)
        size, images = self.config.model.slice, len(batch.images)
        if self.sharded:  # all gather at once, as often as any of them needs it
            images = max(self.processes.each(images))
        if size and images > size:
            cached_backward(
                self.features,
                batch.images,
                loss_of,
                size,
                seed,
                self.synchronised,
                -(-images // size),
            )
        elif batch.num_items or self.sharded:
            self.synchronised(lambda: loss_of(self.features(batch.images))).backward()
        else:  # no page is left for this process: no row, and the others wait for its zeros
            rows = torch.zeros(0, self.encoder.features, device=self.device)
            self.synchronised(lambda: loss_of(rows)).backward()
        if self.sharded:
            average_gradients(self.replicated)
        return results[0]

    def step(self, batch: Batch, stats: bool = False) -> tuple[StepResult, Tensor]:
        """One update; also gives the norm of the gradient, 0-d on the device."""
        lr = self.learning_rate()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        result = self.backward(batch, stats)
        self.objective.remember(result.embeddings, batch)
        norm = clip_gradients(self.parameters, self.config.optim.clip)
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
        try:
            last = self._fit()
        finally:
            self.checkpoints.wait()
        self.processes.barrier()
        return last

    def _fit(self) -> dict[str, Any]:
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
                    # One collective: any process may have been told to stop, the first one keeps
                    # the time.
                    stop, due_now, failed = self.processes.sum(
                        [bool(self._stop), due, self.checkpoints.failed]
                    )
                    if failed:
                        self.checkpoints.wait()  # raises what went wrong here
                        raise RuntimeError(
                            "another process could not write a checkpoint, and says why"
                        )
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
                self._next_epoch()
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
            self._stop = number

        wanted = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            wanted.append(signal.SIGHUP)
        try:
            before = {s: signal.signal(s, stop) for s in wanted}
        except ValueError:  # not the main thread: signals are its owner's
            before = {}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    @property
    def status(self) -> int:
        """What the shell is told of a run that a signal ended: 128 and its number; another
        process's was SIGTERM."""
        return 128 + (self._stop or signal.SIGTERM)

    def close(self) -> None:
        """Ends the decoder and, where this trainer began it, the process group."""
        if isinstance(self.loader.source, Images):
            self.loader.source.decoder.close()
        self.processes.close()

    # ---- checkpoints -----------------------------------------------------------------------------

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
            "seed": c.run.seed,
            "world": self.processes.world,
            "pages": c.data.pages,
            "images": c.data.images,
            "history": c.data.history,
            "dataset_pages": len(self.plan.rows),
            "items": self.dataset.num_items,
            "dataset": self.dataset.fingerprint,
            "features": self._features,
        }

    @cached_property
    def _features(self) -> str | None:
        """ "sha256:..." of the features' values, in the order of the items."""
        return None if self.table is None else array_sha256(self.table)

    def save(self) -> None:
        """Begins a checkpoint of now, written while training goes on. Every process calls it."""
        p, tensors = self.progress, self._tensors()
        finite = all(
            local(t).isfinite().all()
            for n, t in tensors.items()
            if n.startswith("model.") and t.is_floating_point()
        )
        images, occurrences, damaged, diverged = self.processes.sum(
            [p.images, p.occurrences, p.damaged, not finite]
        )
        if diverged:
            raise RuntimeError(
                f"parameters are no longer finite at step {p.step}: no checkpoint was written"
            )
        progress = replace(
            p, images=int(images), occurrences=int(occurrences), damaged=int(damaged)
        )
        state = {"progress": vars(progress), "identity": self._identity()}
        exported, encoder = self.exported, gathered(self.exported, self.processes.rank == 0)
        self.checkpoints.begin(
            p.step, tensors, state, then=lambda: save_encoder(exported, self.out, encoder)
        )

    def _resume(self) -> None:
        # The first process says which is the newest.
        newest = [int(x.name[5:]) + 1 for x in self.checkpoints.all()[-1:]]
        found = self.processes.each(newest[0] if newest else 0)[0]
        if not found:
            return
        path = self.checkpoints.path(found - 1)
        state = self.checkpoints.state(path)
        there, here = state["identity"], self._identity()
        # Another number of processes, also with other batches, goes on at the same page.
        moved = there["world"] != here["world"]
        differ = {
            k: (v, here.get(k))
            for k, v in there.items()
            if v != here.get(k) and not (moved and k in ("world", "pages", "images"))
        }
        self._same_data(differ)
        if differ:
            raise ValueError(
                f"run.out: {self.out} has a run with other settings (there, here): {differ}; "
                "expected the same, or another folder"
            )
        self.checkpoints.load(path, self._tensors())
        self.progress = p = Progress(**state["progress"])
        if self.processes.rank:  # the checkpoint's counts are those of all processes
            p.images = p.occurrences = p.damaged = 0
        if moved:
            self._move(there)
        elif p.cut_step:
            self.plan.recut(p.epoch, p.cut_step, p.cut_page)
        if p.step_in_epoch >= self.plan.steps(p.epoch):
            self._next_epoch()
        log.info("resumed from %s", path)

    def _same_data(self, differ: dict[str, tuple[Any, Any]]) -> None:
        """ValueError that names the dataset or features, where the run in the folder was begun with
        others."""
        given = {"dataset": self.config.data.dataset, "features": self.config.data.features}
        for name, path in given.items():
            if name in differ:
                there, here = (str(x)[:19] if x else "none" for x in differ[name])
                raise ValueError(
                    f"run.out: {self.out} has a run that was begun with another data.{name} "
                    f"(checksum {there}), got {path} (checksum {here}): it "
                    f"cannot go on with it; give that data.{name}, or another run.out to begin anew"
                )

    def _next_epoch(self) -> None:
        p = self.progress
        p.epoch, p.step_in_epoch, p.cut_step, p.cut_page = p.epoch + 1, 0, 0, 0

    def _move(self, there: dict[str, Any]) -> None:
        """Goes on at the page where a run of other processes and batches was: with the same pages
        in a step at the same step, otherwise with the rest of the epoch cut anew."""
        p = self.progress
        before = self._plan(there["pages"], there["images"], 0, there["world"])
        if p.cut_step:
            before.recut(p.epoch, p.cut_step, p.cut_page)
        page = before.position(p.epoch, p.step_in_epoch)
        p.cut_step = p.cut_page = 0
        steps = range(self.plan.steps(p.epoch) + 1)
        same = [s for s in steps if self.plan.position(p.epoch, s) == page]
        if same:
            p.step_in_epoch = same[0]
        else:
            p.cut_step, p.cut_page = p.step_in_epoch, page
            self.plan.recut(p.epoch, p.cut_step, p.cut_page)


_OWN = (
    "config.toml",
    "metrics.jsonl",
    "encoder.json",
    "encoder.safetensors",
    "checkpoints",
    "tensorboard",
)


def _is_run(folder: Path) -> bool:
    """Whether a folder is that of a run: its checkpoints, or its settings and its journal."""
    if any((folder / "checkpoints").glob("step-*")):
        return True
    return (folder / "config.toml").is_file() and (folder / "metrics.jsonl").is_file()


def check_run(config: Config) -> None:
    """ValueError or OSError where no run can be written into the folder, or something else would be
    written over."""
    inputs = (config.data.dataset, config.data.features, config.model.weights)
    check_growing(
        config.run.out,
        _OWN,
        _is_run,
        what="run.out: expected a new folder or a run's",
        inputs=inputs,
    )


def _mix(*values: int) -> int:
    """A seed from several numbers, without the collisions of their sum."""
    return int(np.random.SeedSequence(values).generate_state(1, np.uint64)[0] >> np.uint64(2))


def read_features(path: str | os.PathLike[str], dataset: Dataset) -> np.ndarray:
    """Precomputed embeddings [items, F] as `read_embeddings` gives them; ValueError also where an
    item that is used has none."""
    table = read_embeddings(path, dataset)
    used = np.unique(np.concatenate([dataset.pv_item, dataset.event_item]))
    lacking = used[~np.isfinite(table[used]).all(1)]
    if len(lacking):
        ids = [str(dataset.item_ids[i]) for i in lacking[:5].tolist()]
        raise ValueError(
            f"features: {len(lacking)} items on pages or in histories have no finite row in "
            f"{path}, such as {', '.join(ids)}"
        )
    return table
