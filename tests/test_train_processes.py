"""Training on many processes: gradients of the mean over all anchors, and steps that all of them take."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from dataset_factory import make_dataset
from train_factory import make_features, metrics, settings

from courier_fast.data.dataset import Dataset
from courier_fast.train.config import Config
from courier_fast.train.trainer import Trainer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", pages=120, seed=1)


@pytest.fixture(scope="module")
def features(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_features(dataset, tmp_path_factory.mktemp("features") / "features.npy")


WORKER = """
import sys, json, torch
from courier_fast.train.config import Config
from courier_fast.train.trainer import Trainer
torch.set_num_threads(1)
trainer = Trainer(Config.load(None, json.loads(sys.argv[1])))
step = int(sys.argv[2])
batch = trainer.loader.load(0, step)
result = trainer.backward(batch)
rank = trainer.processes.rank
torch.save({"gradients": [p.grad for p in trainer.parameters], "pages": len(batch.plan.pages), "loss": result.loss}, f"{sys.argv[3]}/{rank}.pt")
trainer.close()
"""


def torchrun(world: int, *command: str, **environment: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}", *command],
        check=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, capture_output=True,
    )  # fmt: skip


def test_gradient_over_processes_is_that_of_the_mean_over_all_anchors(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    """For unequal shards, too: averaging the ranks' means, as many trainers do, would be wrong."""
    world, pages = 3, 37
    overrides = {
        "data.dataset": str(dataset.path), "data.features": str(features), "data.pages": pages, "model.dim": 8,
        "loss.learnable_temperature": True, "run.device": "cpu", "run.out": str(tmp_path / "run"),
    }  # fmt: skip
    (tmp_path / "worker.py").write_text(WORKER)
    torchrun(world, str(tmp_path / "worker.py"), json.dumps(overrides), "0", str(tmp_path))
    ranks = [torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(world)]

    # In one process: the sum of each shard's sums over the anchors of all.
    trainer = Trainer(Config.load(None, overrides))
    batches = []
    for r in range(world):
        trainer.plan.rank, trainer.plan.world, trainer.plan._epoch = r, world, -1
        batches.append(trainer.loader.load(0, 0))
    assert len({b.plan.num_anchors for b in batches}) > 1, "equal shards would not tell"
    anchors = sum(b.plan.num_anchors for b in batches)
    sequence = sum(b.plan.num_sequence_anchors for b in batches)
    total = sum(
        trainer.objective(trainer.encode(b.images), b, anchors, sequence, False).loss
        for b in batches
    )
    total.backward()
    torch.testing.assert_close(sum(x["loss"] for x in ranks), total.detach(), rtol=1e-6, atol=0)
    for r in range(world):
        for p, gradient in zip(trainer.parameters, ranks[r]["gradients"], strict=True):
            assert p.grad is not None
            torch.testing.assert_close(
                gradient, p.grad, rtol=1e-4, atol=1e-7 + 1e-5 * p.grad.abs().max().item()
            )


def test_a_process_without_pages_joins_every_step(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    """Two processes and a budget of images: the last step has a batch for one of them only. The run ends, and resumes."""
    plan = Trainer(settings(dataset, tmp_path / "x", data__features=features, data__images=30)).plan
    batches = len(plan._bounds) - 1 if plan.steps(0) else 0
    budget = next(b for b in range(25, 45) if _batches(dataset, b) % 2 == 1)
    assert batches
    arguments = [
        "-m", "courier_fast.cli", "train", f"--data.dataset={dataset.path}", f"--data.features={features}", f"--data.images={budget}",
        "--model.dim=8", "--optim.epochs=1", "--run.device=cpu", f"--run.out={tmp_path / 'run'}", "--run.progress=false", "--run.log_steps=1",
    ]  # fmt: skip
    torchrun(2, *arguments)
    lines = metrics(tmp_path / "run")
    assert len(lines) == -(-_batches(dataset, budget) // 2)
    assert all(math.isfinite(x["loss"]) and x["loss"] > 0 for x in lines)


def _batches(dataset: Dataset, images: int) -> int:
    from courier_fast.data.batches import BatchPlan

    plan = BatchPlan(dataset, images=images)
    return plan.steps(0)
