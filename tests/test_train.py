"""The trainer: exact gradients in slices and over processes, runs that resume bit for bit, settings, checkpoints, collapse watch."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_factory import make_dataset
from safetensors.torch import load_file
from torch import Tensor, nn

from courier_fast import cli
from courier_fast.data.dataset import Dataset
from courier_fast.train.checkpoint import Checkpoints
from courier_fast.train.config import Config
from courier_fast.train.encoder import build_encoder, build_projection, load_encoder, save_encoder
from courier_fast.train.gradient_cache import cached_backward, check_sliceable
from courier_fast.train.monitor import effective_rank, uniformity
from courier_fast.train.trainer import Trainer, read_features

PURCHASES = Path(__file__).parents[2] / "shared" / "data" / "hm-fashion"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", pages=120, seed=1)


@pytest.fixture(scope="module")
def features(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("features") / "features.npy"
    np.save(path, np.random.default_rng(0).normal(size=(dataset.num_items, 12)).astype(np.float32))
    return path


def settings(dataset: Dataset, out: Path, **overrides: Any) -> Config:
    values = {
        "data.dataset": dataset.path, "data.size": 32, "data.pages": 16, "data.threads": 1, "model.dim": 8,
        "model.backbone": "small_conv", "optim.epochs": 2, "run.out": out, "run.device": "cpu", "run.log_steps": 1, "run.tensorboard": False,
        "run.progress": False,
    }  # fmt: skip
    given = {k.replace("__", "."): v for k, v in overrides.items()}
    for name, other in (("data.images", "data.pages"), ("optim.steps", "optim.epochs")):
        if name in given:
            del values[other]
    return Config.load(None, values | given)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# ---- gradient cache ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 8, 100])
def test_gradient_in_slices_is_that_in_one_pass(size: int) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("test_convnext", 6, 32).double()
    images, target = torch.randn(21, 3, 32, 32).double(), torch.randn(21, 21).double()

    def loss_of(e: Tensor) -> Tensor:  # every pair counts, as in a contrastive loss
        return ((e @ e.T).softmax(1) * target).sum()

    loss_of(encoder(images)).backward()
    expected = gradients(encoder)
    encoder.zero_grad()
    loss = cached_backward(encoder, images, loss_of, size, seed=0)
    torch.testing.assert_close(loss, loss_of(encoder(images)).detach(), rtol=1e-12, atol=0)
    found = gradients(encoder)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-13)


def test_both_passes_draw_the_same_random_numbers() -> None:
    """With dropout the slices' gradient is that of one graph over the same draws."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    rows = torch.randn(10, 4).double()

    def loss_of(e: Tensor) -> Tensor:
        return (e @ e.T).logsumexp(1).sum()

    whole = []
    for i, part in enumerate(rows.split(4)):
        torch.manual_seed(7 + i)
        whole.append(encoder(part))
    loss_of(torch.cat(whole)).backward()
    expected = gradients(encoder)
    encoder.zero_grad()
    cached_backward(encoder, rows, loss_of, 4, seed=7)
    for name, gradient in gradients(encoder).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13)


def test_batch_norm_is_refused_in_slices() -> None:
    with pytest.raises(
        ValueError,
        match=r"model\.slice: expected an encoder without batch statistics, got one with BatchNorm2d \(1\)",
    ):
        check_sliceable(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))


def test_slices_in_the_trainer(dataset: Dataset, tmp_path: Path) -> None:
    """In float32 by the error budget: the slices' error against float64 is at most twice that of one pass, plus a rounding."""
    one, two, exact = (
        Trainer(
            settings(dataset, tmp_path / name, model__slice=size, model__backbone="test_convnext")
        )
        for name, size in (("one", 0), ("two", 7), ("exact", 0))
    )
    batch = one.loader.load(0, 0)
    exact.model.double()
    exact.head = exact.encoder.head  # type: ignore[method-assign]  # which would give float32
    exact.backward(replace(batch, images=batch.images.double()))
    a, b = one.backward(batch), two.backward(batch)
    torch.testing.assert_close(a.loss, b.loss)
    for (name, x), y, z in zip(
        one.model.named_parameters(), two.model.parameters(), exact.model.parameters(), strict=True
    ):
        rounding = torch.finfo(torch.float32).eps * z.grad.norm()
        assert (y.grad - z.grad).norm() <= 2 * (x.grad - z.grad).norm() + rounding, name


# ---- many processes ------------------------------------------------------------------------------------------------

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


# ---- stopping and resuming -----------------------------------------------------------------------------------------


def metrics(run: Path) -> list[dict[str, Any]]:
    """The journal without what depends on the clock."""
    clock = ("time", "images_per_s", "occurrences_per_s")
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in clock} for x in lines]


def launch(config: Path, *arguments: str) -> subprocess.Popen:
    # As many threads as the run it is compared with: sums are added in another order with more.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "courier_fast.cli", "train", str(config), *arguments],
        env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_lines(run: Path, count: int, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        path = run / "metrics.jsonl"
        if path.is_file() and path.read_text().count("\n") >= count:
            return
        time.sleep(0.002)
    pytest.fail(f"no {count} steps: {process.communicate()[0]}")


@pytest.fixture(scope="module")
def uninterrupted(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A config with everything that has state, and the run of it that nothing stopped."""
    folder = tmp_path_factory.mktemp("run")
    config = settings(
        dataset,
        folder / "whole",
        optim__epochs=6,
        run__save_steps=4,
        model__ema=0.9,
        loss__learnable_temperature=True,
        model__backbone="test_convnext",
        model__slice=30,
    )
    config.save(folder / "config.toml")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as those that are launched
    try:
        Trainer(config).fit()
    finally:
        torch.set_num_threads(threads)
    return folder / "config.toml", folder / "whole"


def test_killed_at_any_moment_and_resumed_it_is_the_same_run(
    uninterrupted: tuple[Path, Path], tmp_path: Path
) -> None:
    """Killed before the first checkpoint, after the first and after several, then left alone."""
    config, whole = uninterrupted
    out = f"--run.out={tmp_path / 'killed'}"
    for after in (1, 6, 23):
        process = launch(config, out)
        wait_for_lines(tmp_path / "killed", after, process)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    process = launch(config, out)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 0, output
    assert metrics(tmp_path / "killed") == metrics(whole)
    a, b = (load_file(run / "encoder.safetensors") for run in (tmp_path / "killed", whole))
    assert all(torch.equal(a[n], b[n]) for n in b)


def test_sigterm_saves_and_exits(uninterrupted: tuple[Path, Path], tmp_path: Path) -> None:
    config, whole = uninterrupted
    arguments = (f"--run.out={tmp_path / 'stopped'}", "--run.save_steps=0", "--run.save_minutes=60")
    process = launch(config, *arguments)
    wait_for_lines(tmp_path / "stopped", 5, process)
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 143, output
    done = metrics(tmp_path / "stopped")
    newest = Checkpoints(tmp_path / "stopped" / "checkpoints").all()[-1]
    assert int(newest.name[5:]) == done[-1]["step"] >= 5
    assert launch(config, *arguments).wait(300) == 0
    assert metrics(tmp_path / "stopped") == metrics(whole)


def test_resuming_with_other_batches_is_refused(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    Trainer(settings(dataset, tmp_path, data__features=features)).fit()
    with pytest.raises(ValueError, match=r"run\.out: .* other settings .*'pages': \(16, 8\)"):
        Trainer(settings(dataset, tmp_path, data__features=features, data__pages=8))
    with pytest.raises(ValueError, match="a model with other parameters"):
        Trainer(settings(dataset, tmp_path, data__features=features, model__dim=9))


def test_checkpoints_are_complete_or_not_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10):
        checkpoints.save(step, {"x": torch.full((3,), float(step))}, {"step": step})
    (tmp_path / ".step-00000011.partial").mkdir()  # killed while writing
    assert [p.name for p in checkpoints.all()] == ["step-00000002", "step-00000010"]
    x = torch.zeros(3)
    assert checkpoints.load(checkpoints.all()[-1], {"x": x}) == {"step": 10}
    assert x.tolist() == [10.0] * 3
    checkpoints.save(12, {"x": x}, {})
    assert not list(tmp_path.glob(".*"))
    # Nothing that would have to be unpickled.
    assert {f.suffix for f in tmp_path.rglob("*") if f.is_file()} == {".safetensors", ".json"}


# ---- what a run does -----------------------------------------------------------------------------------------------


def test_training_finds_what_users_click(dataset: Dataset, tmp_path: Path) -> None:
    """Items in groups, users who click within one: the loss falls far and the embedding of a group closes up."""
    rng = np.random.default_rng(0)
    group = rng.integers(0, 5, dataset.num_items)
    user_group = rng.integers(0, 5, len(dataset.user_ids))
    by_group = [np.flatnonzero(group == g) for g in range(5)]
    event_user = np.searchsorted(
        np.unique(dataset.history_start), np.arange(len(dataset.event_item)), "right"
    )
    table = rng.normal(size=(dataset.num_items, 32)) * 3
    table[:, :5] += np.eye(5)[group] * 3
    dataset = replace_events(dataset, by_group, user_group, rng)
    assert len(event_user)
    np.save(tmp_path / "table.npy", table)
    config = settings(
        dataset,
        tmp_path / "run",
        data__features=tmp_path / "table.npy",
        optim__epochs=60,
        optim__lr=0.01,
        loss__negatives="page",
    )
    trainer = Trainer(config)
    trainer.dataset = trainer.plan.dataset = dataset
    trainer.fit()
    lines = metrics(tmp_path / "run")
    first, last = (np.mean([x["loss_seq"] for x in part]) for part in (lines[:6], lines[-6:]))
    assert last < first - 0.3
    assert {
        "alignment",
        "uniformity",
        "effective_rank",
        "top1",
        "damaged_share",
        "grad_norm",
        "lr",
    } <= lines[-1].keys()


def replace_events(
    dataset: Dataset, by_group: list[np.ndarray], user_group: np.ndarray, rng: np.random.Generator
) -> Dataset:
    """The same folder, but every user's events and clicks are of the user's group."""
    dataset.event_item = dataset.event_item.copy()
    dataset.pv_item = dataset.pv_item.copy()
    for page in range(dataset.num_pages):
        items = by_group[user_group[dataset.page_user[page]]]
        history = slice(dataset.history_start[page], dataset.history_end[page])
        dataset.event_item[history] = rng.choice(items, history.stop - history.start)
        shown = np.arange(dataset.pv_start[page], dataset.pv_end[page])
        clicked = shown[dataset.pv_clicked[shown]]
        dataset.pv_item[clicked] = rng.choice(items, len(clicked))
    return dataset


def test_learning_rate_rises_and_falls(dataset: Dataset, features: Path, tmp_path: Path) -> None:
    trainer = Trainer(
        settings(
            dataset,
            tmp_path,
            data__features=features,
            optim__epochs=10,
            optim__warmup=0.2,
            optim__min_lr=0.1,
        )
    )
    rates = []
    for epoch in range(10):
        for step in range(trainer.plan.steps(0)):
            trainer.progress = replace(
                trainer.progress, step=len(rates), epoch=epoch, step_in_epoch=step
            )
            rates.append(trainer.learning_rate())
    peak, lr = int(np.argmax(rates)), trainer.config.optim.lr
    assert 0 < rates[0] < 0.1 * lr
    assert rates[peak] == pytest.approx(lr)
    assert peak == pytest.approx(0.2 * len(rates), abs=1)
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) <= 0).all()
    assert rates[-1] == pytest.approx(0.1 * lr, rel=0.05)


def test_divergence_is_an_error_and_keeps_the_checkpoints(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    config = settings(
        dataset, tmp_path, data__features=features, run__save_steps=1, optim__epochs=1
    )
    trainer = Trainer(config)
    original = trainer.backward

    def backward(batch: Any, stats: bool = False) -> Any:
        result = original(batch, stats)
        if trainer.progress.step == 2:
            result.loss = result.loss * math.nan
        return result

    trainer.backward = backward  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="at step 3: training has diverged"):
        trainer.fit()
    assert [p.name for p in trainer.checkpoints.all()] == ["step-00000001", "step-00000002"]


def test_average_of_the_weights_is_what_is_exported(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    trainer = Trainer(settings(dataset, tmp_path, data__features=features, model__ema=0.5))
    trainer.fit()
    exported = load_encoder(tmp_path)
    assert torch.equal(exported.head[1].weight, trainer.average.module.head[1].weight)
    assert not torch.equal(exported.head[1].weight, trainer.encoder.head[1].weight)


@pytest.mark.parametrize(
    "change", [{"model__checkpointing": True}, {"run__precision": "bfloat16"}, {"data__images": 40}]
)
def test_options_of_the_encoder(dataset: Dataset, tmp_path: Path, change: dict[str, Any]) -> None:
    plain, other = (
        Trainer(settings(dataset, tmp_path / name, **c))
        for name, c in (("plain", {}), ("other", change))
    )
    batch = plain.loader.load(0, 0)
    a, b = plain.backward(batch).loss.item(), other.backward(batch).loss.item()
    assert a == pytest.approx(b, rel=0.05 if "run__precision" in change else 1e-6)
    assert other.fit()["step"] == other.progress.step > 0


def test_compiled_training_keeps_to_a_few_shapes(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    config = settings(
        dataset,
        tmp_path,
        data__features=features,
        model__compile=True,
        data__buckets=(64, 96),
        run__log_steps=100,
    )
    trainer = Trainer(config)
    sizes = {len(b.images) for b in trainer.loader.epoch(0)}
    assert sizes <= {64, 96}
    plain = Trainer(settings(dataset, tmp_path / "plain", data__features=features))
    batch = trainer.loader.load(0, 1)
    assert trainer.backward(batch).loss.item() == pytest.approx(
        plain.backward(plain.loader.load(0, 1)).loss.item(), rel=1e-5
    )


# ---- damaged images ------------------------------------------------------------------------------------------------


def damage(dataset: Dataset, items: list[int], to: Path) -> Dataset:
    """A copy of the folder in which the images of some items are cut in half."""
    import shutil

    from courier_fast.data.dataset import ImageStoreWriter

    shutil.copytree(dataset.path, to)
    store = dataset.images
    (to / "images.arrow").unlink()
    with ImageStoreWriter(to / "images.arrow") as writer:
        for i in range(len(store)):
            image = bytes(store[i])
            writer.append(
                image[: len(image) // 2] if i in items else image, *store.shapes[i].tolist()
            )
    return Dataset(to)


def test_damaged_images_are_replaced_counted_and_named(
    dataset: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    broken = damage(dataset, [3, 7], tmp_path / "broken")
    with caplog.at_level(logging.WARNING):
        last = Trainer(settings(broken, tmp_path / "run", data__max_damaged=0.5)).fit()
    named = [r.getMessage() for r in caplog.records if "cannot be decoded" in r.getMessage()]
    assert sorted(named) == [
        f"image of item {i:06} cannot be decoded: a neutral one takes its place" for i in (3, 7)
    ]
    assert 0 < last["damaged_share"] < 0.2


def test_too_many_damaged_images_stop_the_run(dataset: Dataset, tmp_path: Path) -> None:
    broken = damage(dataset, list(range(0, 50, 2)), tmp_path / "broken")
    with pytest.raises(
        RuntimeError,
        match=r"images cannot be decoded, more than data.max_damaged = 0.01 .* for example 0000",
    ):
        Trainer(settings(broken, tmp_path / "run", optim__epochs=30)).fit()


# ---- encoders, features, settings ----------------------------------------------------------------------------------


def test_encoder_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("small_conv", 7, 40).to(memory_format=torch.channels_last).eval()
    save_encoder(encoder, tmp_path)
    again = load_encoder(tmp_path)
    images = torch.randn(3, 3, 40, 40)
    assert torch.equal(again(images), encoder(images))
    assert (again.size, again.dim) == (40, 7)
    with pytest.raises(FileNotFoundError, match="encoder.json"):
        load_encoder(tmp_path / "nothing")


def test_timm_backbones(tmp_path: Path) -> None:
    encoder = build_encoder("test_convnext", 5, 64)
    assert encoder(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    save_encoder(encoder, tmp_path)
    assert load_encoder(tmp_path).about["backbone"] == "test_convnext"
    vit = build_encoder("test_vit", 5, 96)  # made for 160: the size is passed on
    assert vit(torch.zeros(2, 3, 96, 96)).shape == (2, 5)
    with pytest.raises(
        ValueError,
        match=r"model\.backbone: expected small_conv or a model of timm.*, got 'resnet5000'",
    ):
        build_encoder("resnet5000", 5, 64)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    save_encoder(build_encoder("small_conv", 7, 40), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"model\.weights: expected the parameters of small_conv, got a file without",
    ):
        build_encoder("small_conv", 7, 40, weights=tmp_path / "encoder.safetensors")


def test_projection_standardises_its_features() -> None:
    table = torch.randn(100, 4) * torch.tensor([1.0, 10.0, 100.0, 0.0]) + 5
    table[3] = math.nan  # an item without an image
    encoder = build_projection(4, 2, table)
    rows = encoder.backbone(table[4:])
    assert rows[:, :3].std(0, correction=0) == pytest.approx(1, rel=0.2)
    assert (rows[:, 3] == 0).all()  # constant: no information, and no division by zero


def test_features_by_id_or_by_row(dataset: Dataset, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = np.random.default_rng(0).normal(size=(dataset.num_items, 3)).astype(np.float32)
    np.save(tmp_path / "t.npy", table)
    order = np.random.default_rng(1).permutation(dataset.num_items)
    columns = {
        "item_id": dataset.item_ids.take(pa.array(order)),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(table[order].ravel()), 3),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert np.array_equal(read_features(tmp_path / "t.npy", dataset), table)
    assert np.array_equal(read_features(tmp_path / "t.parquet", dataset), table)
    np.save(tmp_path / "short.npy", table[:-1])
    with pytest.raises(ValueError, match=r"embeddings: expected \[50, D\] .* got \[49, 3\]"):
        read_features(tmp_path / "short.npy", dataset)
    table[int(dataset.pv_item[0])] = math.nan
    np.save(tmp_path / "nan.npy", table)
    with pytest.raises(
        ValueError, match="features: 1 items on pages or in histories have no finite row"
    ):
        read_features(tmp_path / "nan.npy", dataset)


def test_settings_round_trip(dataset: Dataset, tmp_path: Path) -> None:
    config = settings(dataset, tmp_path, data__images=64, optim__steps=3, data__scale=[0.2, 0.9])
    config.save(tmp_path / "config.toml")
    again = Config.load(tmp_path / "config.toml")
    assert again == config
    assert (again.data.pages, again.data.images, again.optim.epochs, again.data.scale) == (
        0,
        64,
        0,
        (0.2, 0.9),
    )


def test_wrong_settings_are_named_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        '[data]\ndataset = "x"\nsize = -1\n[optim]\nlr = "fast"\nspeed = 1\n'
    )
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Config.load(tmp_path / "c.toml")
    for expected in (
        "data.size: Input should be greater than or equal to 0, got -1",
        "optim.lr: ",
        "got 'fast'",
        "optim.speed: ",
    ):
        assert expected in str(error.value)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({}, ("candidate", None, 1.0)),
        ({"direction": "both"}, ("anchor", None, 1.0)),
        ({"attention": "mean"}, ("mean", None, None)),
        ({"attention_scale": 2.0}, ("candidate", 2.0, None)),
        ({"attention": "anchor", "attention_temperature": 0.5}, ("anchor", None, 0.5)),
    ],
    ids=str,
)
def test_attention_of_the_settings(
    loss: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    config = Config.load(None, {"data.dataset": "x"} | {f"loss.{k}": v for k, v in loss.items()})
    assert tuple(config.loss.reconstruction.values()) == expected
    # What is not given stays open for the next override of a saved file.
    config.save(tmp_path / "c.toml")
    assert Config.load(tmp_path / "c.toml", {"loss.attention": "mean"} if not loss else {})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        ({"attention": "candidate", "direction": "both"}, "direction reconstruct with attention candidate, got both"),
        ({"attention_scale": 1.0, "attention_temperature": 1.0}, "one of attention_scale and attention_temperature with attention candidate"),
        ({"attention": "mean", "attention_temperature": 1.0}, "none of attention_scale and attention_temperature with attention mean, got attention_temperature"),
        ({"attention_temperature": 0}, "loss.attention_temperature: Input should be greater than 0"),
        ({"attention": "own"}, "loss.attention: "),
    ],
    ids=str,
)  # fmt: skip
def test_attention_that_does_not_go_together(loss: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.load(None, {"data.dataset": "x"} | {f"loss.{k}": v for k, v in loss.items()})


def test_command_line_overrides_the_file(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(dataset, tmp_path / "a", optim__epochs=1)
    config.save(tmp_path / "c.toml")
    arguments = [
        "train",
        str(tmp_path / "c.toml"),
        "--run.out",
        str(tmp_path / "b"),
        "--optim.steps",
        "2",
        "--loss.temperature",
        "0.2",
    ]
    assert cli.main(arguments) == 0
    resolved = Config.load(tmp_path / "b" / "config.toml")
    assert (
        resolved.optim.steps,
        resolved.optim.epochs,
        resolved.loss.temperature,
        resolved.data.pages,
    ) == (2, 0, 0.2, 16)
    assert "step 2, loss" in capsys.readouterr().out
    assert len(metrics(tmp_path / "b")) == 2


def test_tensorboard_gets_what_the_journal_gets(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Trainer(
        settings(dataset, tmp_path, data__features=features, optim__steps=3, run__tensorboard=True)
    ).fit()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    found = [(e.step, e.value) for e in events.Scalars("loss")]
    assert found == [(x["step"], pytest.approx(x["loss"], rel=1e-6)) for x in metrics(tmp_path)]


def test_command_line_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--data.dataset", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("courier-fast train: dataset: expected a folder")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"courier-fast {command}" in capsys.readouterr().out


# ---- collapse ------------------------------------------------------------------------------------------------------


def test_uniformity_and_rank_tell_collapse() -> None:
    g = torch.Generator().manual_seed(0)
    spread = torch.randn(2000, 16, generator=g)
    one = torch.ones(100, 16)
    line = torch.randn(500, 1, generator=g) * torch.randn(1, 16, generator=g)
    assert uniformity(one).item() == pytest.approx(0, abs=1e-6)
    # E exp(-2 |x - y|^2) = E exp(-4 + 4 cos), and cos has variance 1 / D: about exp(-4 + 8 / D) for large D.
    assert uniformity(spread).item() == pytest.approx(-4 + 8 / 16, abs=0.1)
    assert effective_rank(one).item() == 0
    assert effective_rank(line).item() == pytest.approx(1, rel=1e-3)
    assert effective_rank(spread).item() == pytest.approx(16, rel=0.02)


# ---- real photos ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not PURCHASES.is_dir(), reason="no purchases at ../shared/data/hm-fashion")
def test_real_purchases_and_photos(tmp_path: Path) -> None:
    """A few hundred pages of real photos, small: the loss of the click sequences falls, and the embeddings do not collapse."""
    from courier_fast.data.layouts import generic
    from courier_fast.data.prepare import prepare

    lines = (PURCHASES / "interactions.csv").read_text().splitlines()
    users = sorted({x.split(",")[0] for x in lines[1:]})[:40]
    (tmp_path / "some.csv").write_text(
        "\n".join([lines[0], *(x for x in lines[1:] if x.split(",")[0] in users)]) + "\n"
    )
    prepare(tmp_path / "data", source=generic([tmp_path / "some.csv"]), images=PURCHASES / "images")
    dataset = Dataset(tmp_path / "data")
    assert 200 < len(dataset.split("train")) < 2000
    config = settings(
        dataset,
        tmp_path / "run",
        data__pages=24,
        data__size=32,
        optim__steps=30,
        optim__lr=3e-3,
        loss__sequence_weight=1.0,
        loss__temperature=0.2,
        loss__sequence_temperature=0.3,
    )
    last = Trainer(config).fit()
    lines = metrics(tmp_path / "run")
    assert last["damaged_share"] == 0
    assert np.mean([x["loss_seq"] for x in lines[-5:]]) < np.mean(
        [x["loss_seq"] for x in lines[:5]]
    )
    assert last["effective_rank"] > 2
