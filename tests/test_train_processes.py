"""Training on many processes: gradients of the mean over all anchors, and steps that all of them
take."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_factory import make_dataset
from safetensors.torch import load_file
from spawn import run_script
from torch import Tensor
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


# Each process's gradients in some cases (name, settings, step), and its tensors before the first.
WORKER = """
import os, sys, json, torch
from courier_fast.train.config import Config
from courier_fast.train.trainer import Trainer
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank = os.environ["RANK"]
for name, overrides, step in json.loads(sys.argv[1].replace("{rank}", rank)):
    trainer = Trainer(Config.load(None, overrides))
    state = {n: t.clone() for n, t in trainer.learner.modules.state_dict().items()}
    batch = trainer.loader.load(0, step)
    # Twice: gradients of a step do not stay for the next.
    found = [trainer.backward(batch) for _ in range(2)]
    gradients = [p.grad.clone() for p in trainer.learner.parameters]
    trainer.step(batch)
    results = {"gradients": gradients, "pages": len(batch.plan.pages), "state": state,
               "loss": found[1].loss.detach(), "after": trainer.learner.modules.state_dict()}
    torch.save(results, f"{sys.argv[2]}/{name}-{rank}.pt")
    trainer.close()
torch.distributed.barrier()
# Taking the group down, PyTorch's threads of gloo may abort a process on a busy machine.
os._exit(0)
"""

RESUMED = """
import os, sys, json, torch
from courier_fast.train.config import Config
from courier_fast.train.trainer import Trainer
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
def run(name, overrides):
    def trainer(out):
        return Trainer(Config.load(None, overrides | {"run.out": f"{sys.argv[2]}/{name}/{out}"}))
    trainer("whole").fit()
    stopped = trainer("resumed")
    step = stopped.step
    def step_and_stop(*arguments, **options):
        stopped.signal.number = stopped.progress.step == 2
        return step(*arguments, **options)
    stopped.step = step_and_stop
    assert stopped.fit()["step"] == 3
    trainer("resumed").fit()
for name, overrides in json.loads(sys.argv[1]).items():
    run(name, overrides)
torch.distributed.barrier()
os._exit(0)
"""

Case = tuple[str, dict[str, Any], int]


def torchrun(world: int, *command: str, **environment: str) -> None:
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            *command,
        ],
        check=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
    )


def on_processes(world: int, cases: list[Case], folder: Path) -> dict[str, list[dict[str, Any]]]:
    """What each process has saved of each case."""
    run_script(WORKER, world, folder, json.dumps(cases), str(folder))
    return {
        name: [torch.load(folder / f"{name}-{r}.pt", weights_only=True) for r in range(world)]
        for name, _, _ in cases
    }


def in_one_process(
    overrides: dict[str, Any], world: int, step: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, list[Tensor], list[int]]:
    """The sum of each shard's sums over the anchors of all, its gradients, and the anchors of each
    shard."""
    trainer = Trainer(Config.load(None, overrides))
    trainer.learner.modules.to(dtype)
    batches = []
    for r in range(world):
        trainer.plan.rank, trainer.plan.world, trainer.plan._epoch = r, world, -1
        batches.append(trainer.loader.load(0, step))
    anchors = sum(trainer.objective.anchors(b.plan) for b in batches)
    sequence = sum(b.plan.num_sequence_anchors for b in batches)
    total = sum(
        trainer.objective(trainer.encoder(b.images.to(dtype)), b, anchors, sequence, False).loss
        for b in batches
        if b.num_items
    )
    assert isinstance(total, Tensor)
    total.backward()
    gradients = [p.grad for p in trainer.learner.parameters if p.grad is not None]
    assert len(gradients) == len(trainer.learner.parameters)
    return total.detach(), gradients, [b.plan.num_anchors for b in batches]


Started = tuple[dict[str, Case], dict[str, list[dict[str, Any]]]]


@pytest.fixture(scope="module")
def three(dataset: Dataset, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Started:
    """Cases on three processes, and what those have saved: one start for all, which takes longer
    than they do."""
    folder = tmp_path_factory.mktemp("three")
    overrides = {
        "data.dataset": str(dataset.path),
        "data.features": str(features),
        "model.dim": 8,
        "loss.learnable_temperature": True,
        "loss.heads": 2,
        "loss.projections": "all",
        "loss.weight_power": -0.5,
        "run.device": "cpu",
        "run.out": str(folder / "run"),
    }
    every = {"data.pages": 11, "loss.candidates": "all", "loss.log_q": True, "loss.memory": 200}
    differ: dict[str, dict[str, Any]] = {
        "mean": {
            "data.pages": 37,
            "loss.candidates": "process",
            "loss.sequence_learnable_temperature": True,
        },
        "gather": every | {"loss.exchange": "gather"},
        "ring": every | {"loss.exchange": "ring"},
        "parts": {
            "data.pages": 11,
            "loss.prediction_weight": 1,
            "loss.sequence": "newest",
            "loss.sequence_learnable_temperature": True,
        },
    }
    cases = {name: (name, overrides | more, 0) for name, more in differ.items()}
    names = ("data.dataset", "data.features", "model.dim", "run.device", "run.out")
    plain = {name: overrides[name] for name in names} | {"data.pages": 11}
    cases["courier"] = ("courier", plain | {"loss.recipe": "courier"}, 0)
    return cases, on_processes(3, list(cases.values()), folder)


@pytest.fixture(scope="module")
def two(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Started:
    """The same on two: an image encoder, whole or in slices, and processes that begin with
    different tensors."""
    folder = tmp_path_factory.mktemp("two")
    budget = next(b for b in range(25, 45) if _batches(dataset, b) % 2 == 1)
    last = _batches(dataset, budget) // 2
    overrides = {
        "data.dataset": str(dataset.path),
        "data.images": budget,
        "data.size": 32,
        "data.threads": 1,
        "model.dim": 8,
        "model.backbone": "test_convnext",
        "loss.learnable_temperature": True,
        "run.device": "cpu",
        "run.out": str(folder / "run"),
    }
    cases: dict[str, Case] = {}
    for name, candidates, step in (
        ("full", "process", 0),
        ("empty", "process", last),
        ("empty-all", "all", last),
    ):
        for size in (0, 7):
            more = {"model.slice": size, "loss.candidates": candidates}
            cases[f"{name}-{size}"] = (f"{name}-{size}", overrides | more, step)
    for rank in range(2):
        table = np.random.default_rng(rank).normal(rank, size=(dataset.num_items, 12))
        np.save(folder / f"features-{rank}.npy", table.astype(np.float32))
    start = {
        "data.dataset": str(dataset.path),
        "data.features": str(folder / "features-{rank}.npy"),
        "model.dim": 8,
        "run.seed": "{rank}",
        "run.device": "cpu",
        "run.out": str(folder / "run"),
    }
    cases["start"] = ("start", start, 0)
    return cases, on_processes(2, list(cases.values()), folder)


def test_gradient_over_processes_is_that_of_the_mean_over_all_anchors(three: Started) -> None:
    """For unequal shards, too: averaging the ranks' means, as many trainers do, would be wrong."""
    world = 3
    overrides, ranks = three[0]["mean"][1], three[1]["mean"]
    total, gradients, anchors = in_one_process(overrides, world, 0)
    assert len(set(anchors)) > 1, "equal shards would not tell"
    torch.testing.assert_close(sum(x["loss"] for x in ranks), total, rtol=1e-6, atol=0)
    for r in range(world):
        for expected, gradient in zip(gradients, ranks[r]["gradients"], strict=True):
            torch.testing.assert_close(
                gradient, expected, rtol=1e-4, atol=1e-7 + 1e-5 * expected.abs().max().item()
            )


@pytest.mark.parametrize("name", ["gather", "ring", "parts", "courier"])
def test_gradient_over_the_candidates_of_all_processes_is_that_of_one_batch(
    three: Started, name: str
) -> None:
    world = 3
    overrides, ranks = three[0][name][1], three[1][name]
    trainer = Trainer(Config.load(None, overrides))
    pages = []
    for r in range(world):
        trainer.plan.rank, trainer.plan.world, trainer.plan._epoch = r, world, -1
        pages.append(trainer.plan.pages(0, 0))
    batch = trainer.plan.assemble(np.concatenate(pages))
    trainer.plan.batch = lambda epoch, step: batch  # type: ignore[method-assign]
    loss = trainer.backward(trainer.loader.load(0, 0)).loss.detach()
    torch.testing.assert_close(sum(x["loss"] for x in ranks), loss, rtol=1e-6, atol=0)
    for x in ranks:
        for p, gradient in zip(trainer.learner.parameters, x["gradients"], strict=True):
            assert p.grad is not None
            torch.testing.assert_close(
                gradient, p.grad, rtol=1e-4, atol=1e-7 + 1e-5 * p.grad.abs().max().item()
            )
        # A memory has what all of them have shown, and batch norm its statistics, on each.
        assert x["after"].keys() == trainer.learner.modules.state_dict().keys()
        assert any("memory" in n or "running_mean" in n for n in x["after"])
        assert all(torch.equal(t, ranks[0]["after"][n]) for n, t in x["after"].items())


@pytest.mark.long("several processes")
def test_two_processes_are_one_with_batches_twice_as_large(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    """Candidates of both and of a memory that holds them all, over several steps; features, as no
    random number is drawn for them."""
    arguments = [
        "-m",
        "courier_fast.cli",
        "train",
        f"--data.dataset={dataset.path}",
        f"--data.features={features}",
        "--data.pages=8",
        "--model.dim=8",
        "--loss.memory=2000",
        "--loss.memory_after=2",
        "--optim.steps=6",
        "--run.device=cpu",
        f"--run.out={tmp_path / 'two'}",
        "--run.progress=false",
        "--run.tensorboard=false",
        "--run.log_steps=1",
    ]
    torchrun(2, *arguments)
    one = {"data__pages": 16, "loss__memory": 2000, "loss__memory_after": 2, "optim__steps": 6}
    Trainer(settings(dataset, tmp_path / "one", data__features=features, **one)).fit()
    for two, expected in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        for name in ("loss", "loss_rec", "loss_seq", "grad_norm", "memory_age"):
            assert two[name] == pytest.approx(expected[name], rel=1e-4), (name, two["step"])


@pytest.mark.long("several processes")
def test_slices_and_empty_batches_of_an_image_encoder(two: Started) -> None:
    """Whole or in slices, with pages for both processes or for one: by the error budget of one
    process's gradient."""
    world = 2
    for name, overrides, step in two[0].values():
        if name == "start":
            continue
        ranks = two[1][name]
        assert [x["pages"] > 0 for x in ranks] == [True, name.startswith("full")]
        total, once, _ = in_one_process(overrides, world, step)
        _, exact, _ = in_one_process(overrides, world, step, torch.float64)
        torch.testing.assert_close(sum(x["loss"] for x in ranks), total)
        for x, y, one, z in zip(*(r["gradients"] for r in ranks), once, exact, strict=True):
            rounding = torch.finfo(torch.float32).eps * z.norm()
            assert torch.equal(x, y)
            assert (x - z).norm() <= 2 * (one - z).norm() + rounding, name


@pytest.mark.long("several processes")
def test_all_processes_start_from_the_first_ones_tensors(two: Started) -> None:
    """Parameters and buffers, here from another seed and other features on each."""
    overrides, (a, b) = two[0]["start"][1], (x["state"] for x in two[1]["start"])
    alone = Trainer(
        Config.load(None, json.loads(json.dumps(overrides).replace("{rank}", "0")))
    ).learner.modules.state_dict()
    assert {"encoder.backbone.mean", "encoder.head.1.weight"} <= a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], alone[name])
        assert torch.equal(b[name], alone[name])


@pytest.fixture(scope="module")
def resumed(dataset: Dataset, features: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of three processes, whole and resumed, by name."""
    folder = tmp_path_factory.mktemp("resumed")
    overrides = {
        "data.dataset": str(dataset.path),
        "data.features": str(features),
        "data.pages": 8,
        "model.dim": 64,
        "loss.learnable_temperature": True,
        "optim.steps": 6,
        "run.device": "cpu",
        "run.log_steps": 1,
        "run.tensorboard": False,
        "run.progress": False,
    }
    cases = {
        "process": overrides | {"loss.candidates": "process"},
        "all": overrides | {"loss.candidates": "all", "loss.memory": 200, "loss.memory_after": 1},
        "courier": overrides | {"loss.recipe": "courier", "loss.learnable_temperature": False},
    }
    run_script(RESUMED, 3, folder, json.dumps(cases), str(folder))
    return folder


@pytest.mark.long("several processes")
@pytest.mark.parametrize("name", ["process", "all", "courier"])
def test_processes_that_resume_are_the_same_run(resumed: Path, name: str) -> None:
    """Three add in an order that depends on where a gradient lies in its bucket: buckets are the
    same from the first step on."""
    folder = resumed / name
    assert len(metrics(folder / "whole")) == 6
    assert metrics(folder / "resumed") == metrics(folder / "whole")
    a, b = (load_file(folder / x / "encoder.safetensors") for x in ("resumed", "whole"))
    assert all(torch.equal(a[n], b[n]) for n in b)


@pytest.mark.long("several processes")
def test_a_process_without_pages_joins_every_step(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    """Two processes and a budget of images: the last step has a batch for one of them only. The run
    ends, and resumes."""
    plan = Trainer(settings(dataset, tmp_path / "x", data__features=features, data__images=30)).plan
    batches = len(plan._bounds) - 1 if plan.steps(0) else 0
    budget = next(b for b in range(25, 45) if _batches(dataset, b) % 2 == 1)
    assert batches
    arguments = [
        "-m",
        "courier_fast.cli",
        "train",
        f"--data.dataset={dataset.path}",
        f"--data.features={features}",
        f"--data.images={budget}",
        "--model.dim=8",
        "--optim.epochs=1",
        "--run.device=cpu",
        f"--run.out={tmp_path / 'run'}",
        "--run.progress=false",
        "--run.log_steps=1",
    ]
    torchrun(2, *arguments)
    lines = metrics(tmp_path / "run")
    assert len(lines) == -(-_batches(dataset, budget) // 2)
    assert all(math.isfinite(x["loss"]) and x["loss"] > 0 for x in lines)


def _batches(dataset: Dataset, images: int) -> int:
    from courier_fast.data.batches import BatchPlan

    plan = BatchPlan(dataset, images=images)
    return plan.steps(0)
