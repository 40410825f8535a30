"""An encoder in parts over several processes (model.shard), its checkpoints, and runs that go on
with other processes or after a kill."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_factory import make_dataset
from safetensors.torch import load_file
from spawn import run_script
from test_train_processes import in_one_process
from torch import Tensor, nn
from train_factory import metrics, settings

from courier_fast.data.batches import BatchPlan
from courier_fast.data.dataset import Dataset
from courier_fast.disk import DiskFullError
from courier_fast.train.checkpoint import Checkpoints
from courier_fast.train.config import Config
from courier_fast.train.encoder import build_encoder, load_encoder
from courier_fast.train.sharding import blocks, matrices
from courier_fast.train.trainer import Trainer

# What a process does of its cases (kind, name, settings, more), in their order.
WORKER = """
import os, sys, json, shutil, torch
from courier_fast.train.config import Config
from courier_fast.train.sharding import full, is_sharded
from courier_fast.train.trainer import Trainer
torch.set_num_threads(1)
torch.distributed.init_process_group("gloo")
rank, folder = int(os.environ["RANK"]), sys.argv[2]

def gradients(name, overrides, step):
    trainer = Trainer(Config.load(None, overrides))
    batch = trainer.loader.load(0, step)
    # Twice: gradients of a step do not stay for the next.
    found = [trainer.backward(batch) for _ in range(2)]
    parameters = trainer.learner.parameters
    grads = [full(p.grad).clone() for p in parameters]
    _, norm = trainer.step(batch)
    results = {"gradients": grads, "pages": len(batch.plan.pages),
               "loss": found[1].loss.detach(), "norm": norm,
               "sharded": sum(p.to_local().numel() for p in parameters if is_sharded(p)),
               "all": sum(p.numel() for p in parameters)}
    torch.save(results, f"{folder}/{name}-{rank}.pt")

def compare(name, overrides, step):
    found = {}
    for kind in ("sharded", "replicated", "own"):
        trainer = Trainer(Config.load(None, overrides | {"model.shard": kind == "sharded"}))
        if kind == "own":  # what this process alone has
            trainer.learner.synchronised = lambda compute: compute()
        batch = trainer.loader.load(0, step)
        trainer.backward(batch)
        found[kind] = [full(p.grad).clone() for p in trainer.learner.parameters]
    torch.save(found | {"pages": len(batch.plan.pages)}, f"{folder}/{name}-{rank}.pt")

def tensors(trainer, name):
    found = {n: full(t) for n, t in trainer.learner.tensors().items()}
    if rank == 0:
        torch.save(found, f"{folder}/{name}.pt")

def run(name, overrides, dump):
    trainer = Trainer(Config.load(None, overrides))
    if dump:
        trainer.loader.source.augmentation = None  # it depends on the rank
        tensors(trainer, f"{name}-{dump}")
    step = trainer.step
    def step_and_dump(*arguments, **options):
        result = step(*arguments, **options)
        if trainer.progress.step == dump:
            tensors(trainer, f"{name}-{dump}")
        return result
    trainer.step = step_and_dump
    trainer.fit()
    tensors(trainer, f"{name}-end")

def again(name, overrides, other):
    if rank == 0:  # what another run had after four steps
        path = "checkpoints/step-00000004"
        shutil.copytree(f"{other}/{path}", f"{overrides['run.out']}/{path}")
        shutil.copy(f"{other}/metrics.jsonl", overrides["run.out"])
    torch.distributed.barrier()
    run(name, overrides, 0)

def fails(name, overrides, who):
    trainer = Trainer(Config.load(None, overrides))
    write = trainer.checkpoints._write_part
    def fail(partial, rows):
        if rank == who and "00000002" in partial.name:
            raise OSError("no space left on device")
        write(partial, rows)
    trainer.checkpoints._write_part = fail
    try:
        trainer.fit()
        said = "nothing"
    except (OSError, RuntimeError) as error:
        said = f"{type(error).__name__} at step {trainer.progress.step}: {error}"
    open(f"{folder}/{name}-{rank}.txt", "w").write(said)
    torch.distributed.barrier()

kinds = {"gradients": gradients, "compare": compare, "run": run, "again": again, "fails": fails}
for kind, name, overrides, more in json.loads(sys.argv[1]):
    kinds[kind](name, overrides, more)
torch.distributed.barrier()
os._exit(0)
"""

# A run whose processes are killed: in the middle of a checkpoint, then in the middle of a step.
KILLED = """
import os, signal, sys, torch
from courier_fast import cli
from courier_fast.disk import DiskFullError
from courier_fast.train.checkpoint import Checkpoints
from courier_fast.train.trainer import Trainer
torch.set_num_threads(1)
rank, start = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
write, backward = Checkpoints._write_part, Trainer.backward
def kill_while_writing(self, partial, rows):
    write(self, partial, rows)
    if start == 0 and rank == 1 and "00000004" in partial.name:
        os.kill(os.getpid(), signal.SIGKILL)
def kill_in_step(self, *arguments):
    if start == 1 and rank == 0 and self.progress.step == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return backward(self, *arguments)
Checkpoints._write_part, Trainer.backward = kill_while_writing, kill_in_step
open(f"{sys.argv[1]}/start-{start}-{rank}", "w").close()
code = cli.main(sys.argv[2:])
sys.stdout.flush()
os._exit(code)
"""

Case = tuple[str, str, dict[str, Any], Any]


def torchrun(world: int, *command: str, restarts: int = 0) -> str:
    """What the processes printed."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={world}",
            f"--max-restarts={restarts}",
            *command,
        ],
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def on_processes(world: int, cases: list[Case], folder: Path) -> None:
    run_script(WORKER, world, folder, json.dumps(cases), str(folder))


def base_of_all(factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of pytest-xdist share: several of them have tests of this file."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@contextmanager
def first_time(folder: Path) -> Iterator[bool]:
    """Whether nobody has filled the folder yet; others wait until that is done."""
    with folder.with_suffix(".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        done = folder / "done"
        folder.mkdir(exist_ok=True)
        yield not done.exists()
        done.touch()


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", pages=120, seed=1)


def base(dataset: Dataset, **more: Any) -> dict[str, Any]:
    """Settings of a small sharded run."""
    return {
        "data.dataset": str(dataset.path),
        "data.size": 32,
        "data.threads": 1,
        "model.dim": 8,
        "model.backbone": "test_vit",
        "model.shard": True,
        "loss.learnable_temperature": True,
        "run.device": "cpu",
        "run.log_steps": 1,
        "run.tensorboard": False,
        "run.progress": False,
    } | {k.replace("__", "."): v for k, v in more.items()}


def run_settings(dataset: Dataset, out: Path, **more: Any) -> dict[str, Any]:
    """A run of six steps in less than an epoch, whatever the number of processes: 16 pages a
    step."""
    options = {
        "model__batch_norm": False,
        "model__ema": 0.5,
        "optim__steps": 6,
        "optim__clip": 0.3,
        "loss__memory": 2000,
        "run__save_steps": 3,
        "run__keep": 9,
    }
    return base(dataset, run__out=str(out), **(options | more))


def batch_of_four(dataset: Dataset, folder: Path) -> tuple[dict[str, Any], int]:
    """Settings for four processes, and a step with pages for two of them alone."""
    budget = next(b for b in range(25, 45) if BatchPlan(dataset, images=b).steps(0) % 4 == 2)
    last = BatchPlan(dataset, images=budget).steps(0) // 4
    more = {"data__images": budget, "loss__candidates": "process", "run__out": str(folder / "none")}
    return base(dataset, **more), last


def courier(overrides: dict[str, Any]) -> dict[str, Any]:
    """With the authors' recipe: an attention and a click head beside the encoder, candidates and
    batch norm of all processes."""
    more = {"loss.recipe": "courier", "loss.candidates": "all", "loss.memory": 0}
    return overrides | more | {"loss.learnable_temperature": False}


def once_on_four(folder: Path, cases: list[Case]) -> tuple[Path, list[Case]]:
    with first_time(folder) as first:
        if first:
            on_processes(4, cases, folder)
    return folder, cases


@pytest.fixture(scope="module")
def four(
    request: pytest.FixtureRequest, dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Case]]:
    """Cases on four processes: a run, and where a test asks for them gradients of steps with pages
    for all of them or for some."""
    folder = base_of_all(tmp_path_factory) / "four"
    overrides, last = batch_of_four(dataset, folder)
    differ: dict[str, tuple[dict[str, Any], int]] = {
        "vit": ({}, 0),
        "vit-slices": ({"model.checkpointing": True, "model.slice": 7}, 0),
        "vit-slices-some": ({"model.slice": 7}, last),
    }
    names = {getattr(item, "originalname", None) for item in request.session.items}
    cases: list[Case] = []
    if test_sharded_gradients_are_those_of_one_process.__name__ in names:
        cases += [("gradients", n, overrides | more, step) for n, (more, step) in differ.items()]
    cases.append(("run", "run", run_settings(dataset, folder / "run", data__pages=4), 3))
    return once_on_four(folder, cases)


@pytest.fixture(scope="module")
def replicas(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The gradients of four processes, sharded, replicated and each process's own."""
    folder = base_of_all(tmp_path_factory) / "replicas"
    overrides, last = batch_of_four(dataset, folder)
    conv = overrides | {"model.backbone": "small_conv"}
    cases: list[Case] = [
        ("compare", "conv-some", conv | {"model.checkpointing": True}, last),
        ("compare", "bfloat16", overrides | {"run.precision": "bfloat16"}, 0),
        ("compare", "bfloat16-conv", conv | {"run.precision": "bfloat16"}, 0),
        ("compare", "courier-some", courier(overrides), last),
    ]
    return once_on_four(folder, cases)[0]


def test_blocks_and_what_is_sharded() -> None:
    """A transformer's blocks, a convolutional net's stages, the large ones taken apart; nearly all
    parameters are in matrices."""
    import timm

    @cache
    def make(name: str) -> nn.Module:
        with torch.device("meta"):
            return timm.create_model(name, num_classes=0)

    def names(backbone: nn.Module) -> list[str]:
        found = {m: n for n, m in backbone.named_modules()}
        return [found[m] for m in blocks(backbone)]

    def numbered(*of: tuple[str, int]) -> list[str]:
        return [f"{name}.{i}" for name, count in of for i in range(count)]

    swin = numbered(("layers", 2), ("layers.2.blocks", 6))
    swin += ["layers.2", *numbered(("layers.3.blocks", 2)), "layers.3", ""]
    assert names(make("swin_tiny_patch4_window7_224")) == swin
    assert names(make("vit_base_patch16_224")) == [*numbered(("blocks", 12)), ""]
    assert names(make("resnet18")) == [*numbered(*((f"layer{i}", 2) for i in range(1, 5))), ""]
    conv = build_encoder("small_conv", 8, 32).backbone
    assert names(conv) == [*numbered(("stages", 4)), ""]
    for backbone in map(
        make, ("swin_tiny_patch4_window7_224", "convnext_tiny", "resnet50", "vit_base_patch16_224")
    ):
        count = sum(p.numel() for p in backbone.parameters())
        assert sum(p.numel() for p in matrices(backbone)) > 0.99 * count
        assert all(p.ndim > 1 for p in matrices(backbone))


def gradients_of(folder: Path, name: str) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{name}-{r}.pt", weights_only=True) for r in range(4)]


def within(found: list[Tensor], once: list[Tensor], exact: list[Tensor]) -> None:
    """The error of `found` is at most twice that of one process, and a rounding."""
    for x, one, z in zip(found, once, exact, strict=True):
        rounding = torch.finfo(torch.float32).eps * z.norm()
        assert (x - z).norm() <= 2 * (one - z).norm() + rounding


@cache
def in_one(overrides: str, step: int) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Loss and gradients of one process on the batches of four, and the gradients in float64."""
    total, once, _ = in_one_process(json.loads(overrides), 4, step)
    return total, once, in_one_process(json.loads(overrides), 4, step, torch.float64)[1]


@pytest.mark.parametrize("name", ["vit", "vit-slices", "vit-slices-some"])
def test_sharded_gradients_are_those_of_one_process(
    four: tuple[Path, list[Case]], name: str
) -> None:
    """Whole or in slices, with pages for all processes or for two of four: by the error budget of
    one process's gradient."""
    folder, cases = four
    overrides, step = next((c[2], c[3]) for c in cases if c[1] == name)
    ranks = gradients_of(folder, name)
    assert [x["pages"] > 0 for x in ranks] == [
        True,
        True,
        *["some" not in name] * 2,
    ]
    plain = overrides | {"model.shard": False, "model.slice": 0, "model.checkpointing": False}
    total, once, exact = in_one(json.dumps(plain, sort_keys=True), step)
    torch.testing.assert_close(sum(x["loss"] for x in ranks), total)
    for x in ranks:
        within(x["gradients"], once, exact)
        assert all(
            torch.equal(a, b) for a, b in zip(x["gradients"], ranks[0]["gradients"], strict=True)
        )
        norm = math.sqrt(sum(float(g.square().sum()) for g in exact))
        assert float(x["norm"]) == pytest.approx(norm, rel=1e-5)
    assert sum(x["sharded"] for x in ranks) > 0.9 * ranks[0]["all"]
    assert all(x["sharded"] < 0.35 * x["all"] for x in ranks)


@pytest.mark.long("sharding")
@pytest.mark.parametrize("name", ["conv-some", "bfloat16", "bfloat16-conv", "courier-some"])
def test_sharded_gradients_are_those_of_replicas(replicas: Path, name: str) -> None:
    """The mean of what each process has alone, by the error of DistributedDataParallel's: with
    batch norms, whose statistics are each process's own, and in bfloat16, where weights travel as
    autocast rounds them for their products, and sums are float32's."""
    ranks = gradients_of(replicas, name)
    own = [
        torch.stack([x.double() for x in g]) for g in zip(*(x["own"] for x in ranks), strict=True)
    ]
    exact = [x.mean(0) for x in own]
    assert all(x[:2].any() for x in own)
    assert [x["pages"] > 0 for x in ranks] == [True, True, *["some" not in name] * 2]
    for x in ranks:
        within(x["sharded"], x["replicated"], exact)


# ---- checkpoints, and other numbers of processes -------------------------------------------------


def started_from(four: tuple[Path, list[Case]], out: Path, step: int = 3) -> Path:
    """A run's folder with one checkpoint of that on four processes."""
    (out / "checkpoints").mkdir(parents=True)
    name = f"step-{step:08d}"
    shutil.copytree(four[0] / "run" / "checkpoints" / name, out / "checkpoints" / name)
    shutil.copy(four[0] / "run" / "metrics.jsonl", out / "metrics.jsonl")
    return out


@pytest.fixture(scope="module")
def two(
    four: tuple[Path, list[Case]], dataset: Dataset, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """On two processes: runs that go on from the checkpoint of four, sharded or not; whole runs;
    one that cannot write."""
    folder = base_of_all(tmp_path_factory) / "two"
    with first_time(folder) as first:
        if first:
            run_two(four, dataset, folder)
    return folder


def run_two(four: tuple[Path, list[Case]], dataset: Dataset, folder: Path) -> None:
    cases: list[Case] = []
    for name, sharded in (("resumed", True), ("replicated", False)):
        out = started_from(four, folder / name)
        cases.append(
            ("run", name, run_settings(dataset, out, data__pages=8, model__shard=sharded), 3)
        )
    back = cases[-1][2] | {"model.shard": True, "optim.steps": 7}
    cases.append(("run", "sharded again", back, 6))
    cases.append(("run", "whole", killed_settings(dataset, folder / "whole"), 0))
    names = ("courier", "courier again")
    each = [courier(killed_settings(dataset, folder / name)) for name in names]
    cases.append(("run", names[0], each[0], 0))
    cases.append(("again", names[1], each[1], str(folder / names[0])))
    failing = killed_settings(dataset, folder / "fails") | {"run.save_steps": 1}
    cases.append(("fails", "fails", failing, 1))
    on_processes(2, cases, folder)


def killed_settings(dataset: Dataset, out: Path) -> dict[str, Any]:
    more = {"data__images": 40, "run__save_steps": 2, "model__backbone": "small_conv"}
    return run_settings(dataset, out, **more)


def same_curve(run: Path, expected: Path, more: int = 0) -> None:
    """The journals, up to rounding in float32; the signs of collapse are those of one process's
    batch."""
    lines, others = metrics(run), metrics(expected)
    assert len(lines) == len(others) + more
    lines = lines[: len(others)]
    assert [x["step"] for x in lines] == [x["step"] for x in others] == [*range(1, 7)]
    for line, other in zip(lines, others, strict=True):
        for name in ("loss", "loss_rec", "loss_seq", "grad_norm", "temperature", "lr"):
            assert line[name] == pytest.approx(other[name], rel=1e-4), (name, line["step"])
        assert line["epoch"] == other["epoch"]


@pytest.mark.long("sharding")
def test_a_sharded_checkpoint_is_the_same_at_any_number_of_processes(
    four: tuple[Path, list[Case]], two: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """Written by four, read by two (sharded or not) and by one: every tensor, bit for bit; each
    process has written its part."""
    path = four[0] / "run" / "checkpoints" / "step-00000003"
    assert sorted(x.name for x in path.iterdir()) == [
        *(f"part-{r:05d}.safetensors" for r in range(4)),
        "state.json",
    ]
    sizes = [x.stat().st_size for x in sorted(path.glob("part-*"))]
    assert max(sizes) < 0.5 * sum(sizes)
    saved = torch.load(four[0] / "run-3.pt", weights_only=True)
    assert any(n.startswith("average.") for n in saved)
    assert any("memory" in n for n in saved)
    alone = Trainer(
        Config.load(None, run_settings(dataset, started_from(four, tmp_path), data__pages=16))
    )
    found = {
        "one": alone.learner.tensors(),
        **{n: torch.load(two / f"{n}-3.pt", weights_only=True) for n in ("resumed", "replicated")},
    }
    for name, tensors in found.items():
        assert tensors.keys() == saved.keys()
        assert all(torch.equal(tensors[n], saved[n]) for n in saved), name
    # And the other way, from a checkpoint of replicas to parts.
    a, b = (
        torch.load(two / f"{n}.pt", weights_only=True)
        for n in ("replicated-end", "sharded again-6")
    )
    assert a.keys() == b.keys()
    assert all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.long("sharding")
def test_a_run_goes_on_at_another_number_of_processes(
    four: tuple[Path, list[Case]], two: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """As many pages a step: the same batches, and the loss curve of the run on four."""
    for name, more in (("resumed", 0), ("replicated", 1)):
        same_curve(two / name, four[0] / "run", more)
    alone = Trainer(
        Config.load(None, run_settings(dataset, started_from(four, tmp_path), data__pages=16))
    )
    alone.loader.source.augmentation = None  # type: ignore[union-attr]
    alone.fit()
    same_curve(tmp_path, four[0] / "run")
    # And the exported encoder is an ordinary one: the average of the weights.
    a, b = (load_file(x / "encoder.safetensors") for x in (tmp_path, two / "resumed"))
    assert a.keys() == b.keys() == load_encoder(two / "resumed").state_dict().keys()
    for name, tensor in a.items():
        assert (tensor - b[name]).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.long("sharding")
def test_what_a_loss_learns_is_in_sharded_checkpoints(two: Path) -> None:
    """A run with an attention and a click head of its own goes on from its fourth step as if it had
    not been cut; the encoder has none of them."""
    whole, again = (
        torch.load(two / f"{n}-end.pt", weights_only=True) for n in ("courier", "courier again")
    )
    assert len(metrics(two / "courier again")) == 6
    for name in ("attention.in_proj_weight", "click_head.0.weight", "click_head.2.running_mean"):
        assert any(n.endswith(name) for n in whole), name
    assert whole.keys() == again.keys()
    assert all(torch.equal(whole[n], again[n]) for n in whole)
    exported = load_file(two / "courier again" / "encoder.safetensors")
    assert not any("click_head" in n or "in_proj" in n for n in exported)


def test_with_other_batches_no_page_is_lost_or_seen_twice(
    four: tuple[Path, list[Case]], dataset: Dataset, tmp_path: Path
) -> None:
    """Three steps of 4 * 4 pages, then one process with 9: its steps have the epoch's other pages;
    so have those after another restart."""
    before = BatchPlan(dataset, pages=4, world=4)
    order = np.concatenate(
        [
            BatchPlan(dataset, pages=4, rank=r, world=4).pages(0, s)
            for s in range(6)
            for r in range(4)
        ]
    )
    done = before.position(0, 3)
    started = started_from(four, tmp_path)
    more = {"data__pages": 9, "run__save_steps": 1, "optim__steps": 5, "data__images": 0}
    trainer = Trainer(Config.load(None, run_settings(dataset, started, **more)))
    p = trainer.progress
    assert (p.step, p.epoch, p.step_in_epoch, p.cut_step, p.cut_page) == (3, 0, 3, 3, done)
    steps = range(3, trainer.plan.steps(0))
    rest = np.concatenate([trainer.plan.pages(0, s) for s in steps])
    assert np.array_equal(rest, order[done:])
    assert max(len(trainer.plan.pages(0, s)) for s in steps) == 8
    assert len(np.unique(trainer.plan.pages(1, 0))) == 8
    trainer.fit()
    again = Trainer(
        Config.load(None, run_settings(dataset, started, **(more | {"optim__steps": 8})))
    )
    assert again.progress.step == 5
    assert np.array_equal(again.plan.pages(0, 5), trainer.plan.pages(0, 5))


def test_share_of_the_run_goes_on_over_a_cut(dataset: Dataset, tmp_path: Path) -> None:
    """By epochs the learning rate follows the pages, where steps before and after a cut are not of
    one size."""
    trainer = Trainer(settings(dataset, tmp_path, optim__epochs=2, data__pages=8))
    p = trainer.progress
    trainer.plan.recut(0, 3, 48)
    p.step = p.step_in_epoch = p.cut_step = 3
    p.cut_page = 48
    assert trainer.schedule.done() == 48 / len(trainer.plan.rows) / 2
    p.step_in_epoch = trainer.plan.steps(0)
    assert trainer.schedule.done() == 0.5
    trainer.progress.next_epoch()
    assert trainer.schedule.done() == 0.5


def test_a_checkpoint_without_one_of_its_parts_is_refused(
    four: tuple[Path, list[Case]], dataset: Dataset, tmp_path: Path
) -> None:
    started = started_from(four, tmp_path)
    next(tmp_path.rglob("part-00001.safetensors")).unlink()
    with pytest.raises(ValueError, match="a file of this checkpoint is lacking, with a part of"):
        Trainer(Config.load(None, run_settings(dataset, started, data__pages=16)))


# ---- written while training goes on --------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_written(dataset: Dataset, tmp_path: Path) -> None:
    """Steps are done during a write, the next one waits for it, and what is written is of the step
    at which it began."""
    begun, may_go_on = threading.Event(), threading.Event()
    config = settings(dataset, tmp_path / "run", optim__steps=4, run__save_steps=2, run__keep=5)
    trainer = Trainer(config)
    write, step, when = trainer.checkpoints._write_part, trainer.step, []

    def wait_and_write(partial: Path, rows: dict[str, Tensor]) -> None:
        begun.set()
        assert may_go_on.wait(60)
        write(partial, rows)

    def count(*arguments: Any, **options: Any) -> Any:
        result = step(*arguments, **options)
        if trainer.progress.step == 3:
            assert begun.wait(60)
            when.append(trainer.checkpoints.all())
            may_go_on.set()
        return result

    trainer.checkpoints._write_part, trainer.step = wait_and_write, count  # type: ignore[method-assign]
    trainer.fit()
    assert when == [[]]
    assert [x.name for x in trainer.checkpoints.all()] == ["step-00000002", "step-00000004"]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-00000004")
    resumed = Trainer(config)
    assert resumed.progress.step == 2
    resumed.fit()
    a, b = resumed.learner.modules.state_dict(), trainer.learner.modules.state_dict()
    assert all(torch.equal(a[n], b[n]) for n in b)


def test_a_checkpoint_that_cannot_be_written_ends_the_run(dataset: Dataset, tmp_path: Path) -> None:
    trainer = Trainer(settings(dataset, tmp_path, optim__steps=6, run__save_steps=1))
    write = trainer.checkpoints._write_part

    def fail(partial: Path, rows: dict[str, Tensor]) -> None:
        if "00000002" in partial.name:
            raise OSError("no space left on device")
        write(partial, rows)

    trainer.checkpoints._write_part = fail  # type: ignore[method-assign]
    with pytest.raises(DiskFullError, match="the disk is full"):
        trainer.fit()
    assert trainer.progress.step <= 4
    assert [x.name for x in trainer.checkpoints.all()] == ["step-00000001"]
    assert Trainer(settings(dataset, tmp_path, optim__steps=6)).progress.step == 1


@pytest.mark.long("sharding")
def test_a_part_that_cannot_be_written_ends_all_processes(two: Path) -> None:
    """Each says what it knows; the older checkpoint stays, without the name of the new one."""
    said = [(two / f"fails-{r}.txt").read_text() for r in range(2)]
    assert "1 other processes could not write their parts" in said[0]
    assert said[0].startswith("RuntimeError at step")
    assert said[1].startswith("DiskFullError at step")
    assert "the disk is full" in said[1]
    assert [x.name for x in Checkpoints(two / "fails" / "checkpoints").all()] == ["step-00000001"]


@pytest.mark.long("sharding")
def test_killed_workers_are_restarted_and_the_run_is_the_same(
    two: Path, dataset: Dataset, tmp_path: Path
) -> None:
    """One is killed while it writes a checkpoint, after the restart another in a step: both times
    the newest complete checkpoint serves."""
    (tmp_path / "worker.py").write_text(KILLED)
    options = killed_settings(dataset, tmp_path / "killed")
    arguments = [
        f"--{n}={str(v).lower() if isinstance(v, bool) else v}" for n, v in options.items()
    ]
    output = torchrun(
        2, str(tmp_path / "worker.py"), str(tmp_path), "train", *arguments, restarts=2
    )
    assert len(list(tmp_path.glob("start-*"))) == 6, output
    assert metrics(tmp_path / "killed") == metrics(two / "whole")
    a, b = (load_file(x / "encoder.safetensors") for x in (tmp_path / "killed", two / "whole"))
    assert all(torch.equal(a[n], b[n]) for n in b)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"model__compile": True}, "model.shard: expected model.compile false with it, got true"),
        ({"data__features": "x.npy"}, "model.shard: expected images with it, got data.features"),
    ],
)
def test_what_cannot_be_sharded_is_refused(
    dataset: Dataset, tmp_path: Path, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        settings(dataset, tmp_path, model__shard=True, **more)


def test_one_process_keeps_the_whole_encoder(dataset: Dataset, tmp_path: Path) -> None:
    """It is the run without the setting."""
    for name, sharded in (("a", True), ("b", False)):
        Trainer(settings(dataset, tmp_path / name, optim__steps=2, model__shard=sharded)).fit()
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b")
