"""A run's folder: what is saved in it, and how the run goes on from there."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.batches import BatchPlan
from ..files import array_sha256
from ..output import check_growing
from .build import build_plan
from .checkpoint import Checkpoints
from .config import Config
from .encoder import save_encoder
from .learner import Learner
from .processes import Processes
from .progress import Progress
from .sharding import gathered, local, make_mesh

log = logging.getLogger(__name__)

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


class SavedRun:
    """The checkpoints of a run, and the encoder beside them.

    Args:
        table: the features that the run is trained on in place of images.
    """

    def __init__(
        self,
        config: Config,
        plan: BatchPlan,
        table: np.ndarray | None,
        learner: Learner,
        processes: Processes,
    ) -> None:
        self.config, self.plan, self.table = config, plan, table
        self.learner, self.processes = learner, processes
        self.checkpoints = Checkpoints(
            config.run.out / "checkpoints",
            config.run.keep,
            processes.rank,
            processes.host_group() if learner.sharded else None,
            make_mesh(torch.device("cpu")) if learner.sharded else None,
        )
        self._saved_at = time.monotonic()

    # ---- saving ----------------------------------------------------------------------------------

    def due(self) -> bool:
        """Whether run.save_minutes have passed since the last checkpoint; the first process keeps
        the time."""
        minutes = self.config.run.save_minutes
        passed = (time.monotonic() - self._saved_at) / 60
        return minutes > 0 and passed >= minutes and self.processes.rank == 0

    def save(self, progress: Progress) -> None:
        """Begins a checkpoint of now, written while training goes on. Every process calls it."""
        p, tensors = progress, self.learner.tensors()
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
        total = replace(p, images=int(images), occurrences=int(occurrences), damaged=int(damaged))
        state = {"progress": vars(total), "identity": self._identity()}
        exported, out = self.learner.exported, self.config.run.out
        encoder = gathered(exported, self.processes.rank == 0)
        self.checkpoints.begin(
            p.step, tensors, state, then=lambda: save_encoder(exported, out, encoder)
        )
        self._saved_at = time.monotonic()

    def _identity(self) -> dict[str, Any]:
        """What has to be the same for batches and schedule to go on where they were."""
        c, dataset = self.config, self.plan.dataset
        return {
            "seed": c.run.seed,
            "world": self.processes.world,
            "pages": c.data.pages,
            "images": c.data.images,
            "history": c.data.history,
            "dataset_pages": len(self.plan.rows),
            "items": dataset.num_items,
            "dataset": dataset.fingerprint,
            "features": self._features,
        }

    @cached_property
    def _features(self) -> str | None:
        """ "sha256:..." of the features' values, in the order of the items."""
        return None if self.table is None else array_sha256(self.table)

    # ---- going on --------------------------------------------------------------------------------

    def restore(self) -> Progress:
        """Fills the learner from the newest checkpoint, if there is one, and cuts the plan's epoch
        as it was; gives how far the run is.

        ValueError where the run in the folder is of other data or settings.
        """
        # The first process says which is the newest.
        newest = [int(x.name[5:]) + 1 for x in self.checkpoints.all()[-1:]]
        found = self.processes.each(newest[0] if newest else 0)[0]
        if not found:
            return Progress()
        path = self.checkpoints.path(found - 1)
        state = self.checkpoints.state(path)
        there = state["identity"]
        # Another number of processes, also with other batches, goes on at the same page.
        moved = there["world"] != self.processes.world
        self._check_same(there, may_differ=("world", "pages", "images") if moved else ())
        self.checkpoints.load(path, self.learner.tensors())
        p = Progress(**state["progress"])
        if self.processes.rank:  # the checkpoint's counts are those of all processes
            p.images = p.occurrences = p.damaged = 0
        if moved:
            self._move(p, there)
        elif p.cut_step:
            self.plan.recut(p.epoch, p.cut_step, p.cut_page)
        if p.step_in_epoch >= self.plan.steps(p.epoch):
            p.next_epoch()
        log.info("resumed from %s", path)
        return p

    def _check_same(self, there: dict[str, Any], may_differ: tuple[str, ...]) -> None:
        """ValueError where the run in the folder was begun with something else; it names the
        dataset or features, if that is it."""
        c, here = self.config, self._identity()
        differ = {
            k: (v, here.get(k))
            for k, v in there.items()
            if v != here.get(k) and k not in may_differ
        }
        features = c.data.features or "the embeddings of data.dataset"
        for name, path in (("dataset", c.data.dataset), ("features", features)):
            if name in differ:
                before, now = (str(x)[:19] if x else "none" for x in differ[name])
                raise ValueError(
                    f"run.out: {c.run.out} has a run that was begun with another data.{name} "
                    f"(checksum {before}), got {path} (checksum {now}): it "
                    f"cannot go on with it; give that data.{name}, or another run.out to begin anew"
                )
        if differ:
            raise ValueError(
                f"run.out: {c.run.out} has a run with other settings (there, here): {differ}; "
                "expected the same, or another folder"
            )

    def _move(self, p: Progress, there: dict[str, Any]) -> None:
        """Goes on at the page where a run of other processes and batches was: with the same pages
        in a step at the same step, otherwise with the rest of the epoch cut anew."""
        config = self.config.model_copy(deep=True)
        config.data.pages, config.data.images = there["pages"], there["images"]
        before = build_plan(config, self.plan.dataset, 0, there["world"])
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
