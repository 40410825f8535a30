"""The trainer: runs that resume bit for bit, checkpoints, collapse watch."""

from __future__ import annotations

import logging
import math
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_factory import images_of, make_dataset, rewrite
from safetensors.torch import load_file
from torch import Tensor, nn
from train_factory import make_features, metrics, settings

from courier_fast import reconstruction_loss
from courier_fast.data.dataset import Dataset
from courier_fast.train.checkpoint import Checkpoints
from courier_fast.train.encoder import first_dimensions, load_encoder
from courier_fast.train.journal import measure
from courier_fast.train.monitor import effective_rank, uniformity
from courier_fast.train.objective import StepResult
from courier_fast.train.trainer import Trainer

PURCHASES = Path(__file__).parents[2] / "shared" / "data" / "hm-fashion"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", pages=120, seed=1)


@pytest.fixture(scope="module")
def features(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_features(dataset, tmp_path_factory.mktemp("features") / "features.npy")


# ---- stopping and resuming -----------------------------------------------------------------------


def launch(config: Path, *arguments: str) -> subprocess.Popen:
    # As many threads as the run it is compared with: sums are added in another order with more.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "courier_fast.cli", "train", str(config), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


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


@pytest.mark.long("killed processes")
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


@pytest.mark.long("killed processes")
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


def test_a_temperature_without_a_dimension_is_resumed(tmp_path: Path) -> None:
    """As checkpoints of earlier versions have it, with the optimizer's state of it; other shapes
    are an error."""
    checkpoints, name = Checkpoints(tmp_path), "model.loss.log_inverse_temperature"
    checkpoints.begin(1, {name: torch.tensor(1.5), "other": torch.ones(2)}, {"step": 1})
    checkpoints.wait()
    found = {name: torch.zeros(1), "other": torch.zeros(2)}
    assert checkpoints.load(checkpoints.path(1), found) == {"step": 1}
    assert found[name].tolist() == [1.5]
    with pytest.raises(ValueError, match="other parameters"):
        checkpoints.load(checkpoints.path(1), found | {name: torch.zeros(2)})


def test_checkpoints_are_complete_or_not_there(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (1, 2, 10):
        checkpoints.begin(step, {"x": torch.full((3,), float(step))}, {"step": step})
        checkpoints.wait()
    (tmp_path / ".step-00000011.partial").mkdir()  # killed while writing
    assert [p.name for p in checkpoints.all()] == ["step-00000002", "step-00000010"]
    x = torch.zeros(3)
    assert checkpoints.load(checkpoints.all()[-1], {"x": x}) == {"step": 10}
    assert x.tolist() == [10.0] * 3
    checkpoints.begin(12, {"x": x}, {})
    checkpoints.wait()
    assert not list(tmp_path.glob(".*"))
    # Nothing that would have to be unpickled.
    assert {f.suffix for f in tmp_path.rglob("*") if f.is_file()} == {".safetensors", ".json"}


# ---- what a run does -----------------------------------------------------------------------------


def test_training_finds_what_users_click(dataset: Dataset, tmp_path: Path) -> None:
    """Items in groups, users who click within one: the loss falls far and the embedding of a group
    closes up."""
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
            p = trainer.progress
            p.step, p.epoch, p.step_in_epoch = len(rates), epoch, step
            rates.append(trainer.schedule.learning_rate())
    peak, lr = int(np.argmax(rates)), trainer.config.optim.lr
    assert 0 < rates[0] < 0.1 * lr
    assert rates[peak] == pytest.approx(lr)
    assert peak == pytest.approx(0.2 * len(rates), abs=1)
    assert (np.diff(rates[: peak + 1]) > 0).all()
    assert (np.diff(rates[peak:]) <= 0).all()
    assert rates[-1] == pytest.approx(0.1 * lr, rel=0.05)


@pytest.mark.parametrize("unit", [True, False])
def test_memory_holds_the_candidates_of_earlier_steps(
    dataset: Dataset, features: Path, tmp_path: Path, unit: bool
) -> None:
    """The newest ones, as they were; from `memory_after` on the loss has them as candidates."""
    trainer, plain = (
        Trainer(settings(dataset, tmp_path / n, data__features=features, loss__unit=unit, **c))
        for n, c in (("with", {"loss__memory": 400, "loss__memory_after": 2}), ("without", {}))
    )
    expected: list[Tensor] = []
    expected_ids: list[Tensor] = []
    for step in range(5):
        batch = trainer.loader.load(0, step)
        with torch.no_grad():
            table = trainer.learner.encode(batch.images)
            table = nn.functional.normalize(table, dim=1) if unit else table
        plain.learner.modules.load_state_dict(trainer.learner.modules.state_dict(), strict=False)
        loss, without = trainer.step(batch)[0].loss.item(), plain.backward(batch).loss.item()
        if step < 2:
            assert loss == without
        else:
            assert loss > without + 0.1  # more candidates
        shown = torch.cat([batch.pv_index, batch.history_index])
        expected.append(table[shown])
        expected_ids.append(torch.from_numpy(batch.plan.items)[shown])
        rows, ids, _ = trainer.objective.memory.read()
        size = min(400, sum(map(len, expected)))
        newest = {
            (int(i), *row.tolist())
            for i, row in zip(
                torch.cat(expected_ids)[-size:], torch.cat(expected)[-size:], strict=True
            )
        }
        assert {(int(i), *row.tolist()) for i, row in zip(ids, rows, strict=True)} == newest
        assert len(rows) == size


def test_projections_are_the_identity_at_first_and_learned(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    """They belong to the loss, not to the encoder that is exported."""
    plain = Trainer(settings(dataset, tmp_path / "none", data__features=features, loss__heads=2))
    for projections, count in (("query_key", 2), ("all", 3)):
        trainer = Trainer(
            settings(
                dataset,
                tmp_path / projections,
                data__features=features,
                loss__heads=2,
                loss__projections=projections,
                optim__steps=3,
            )
        )
        start = trainer.backward(trainer.loader.load(0, 0)).loss
        assert start.item() == plain.backward(plain.loader.load(0, 0)).loss.item()
        trainer.fit()
        moved = [p for n, p in trainer.objective.named_parameters() if n.startswith("projections")]
        assert len(moved) == count
        assert all(p.abs().sum() > 0 for p in moved)
        assert load_encoder(trainer.out).state_dict().keys() == plain.encoder.state_dict().keys()


def second_step(trainer: Trainer) -> StepResult:
    """Without an update; the first batch is in the memory."""
    first = trainer.loader.load(0, 0)
    trainer.objective.remember(trainer.backward(first).embeddings, first)
    return trainer.backward(trainer.loader.load(0, 1))


def test_prefixes_are_losses_of_the_first_dimensions(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    """The mean of what runs of these dimensions alone have, candidates of earlier steps among
    them."""
    how = {"data__features": features, "loss__memory": 60, "loss__memory_after": 0}
    many = Trainer(settings(dataset, tmp_path / "many", loss__prefixes=[2, 5], **how))
    weight = many.encoder.head[1].weight
    dim, expected, gradient = many.encoder.dim, [], torch.zeros_like(weight)
    for size in (dim, 2, 5):
        one = Trainer(settings(dataset, tmp_path / str(size), model__dim=size, **how))
        one.encoder.load_state_dict(first_dimensions(deepcopy(many.encoder), size).state_dict())
        expected.append(second_step(one).loss)
        gradient[:size] += one.encoder.head[1].weight.grad / 3
    found = second_step(many)
    torch.testing.assert_close(found.loss, torch.stack(expected).mean())
    torch.testing.assert_close(found.rec + found.seq, expected[0])
    torch.testing.assert_close(weight.grad, gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("candidates", ["all", "process"])
def test_anchor_weights_are_a_power_of_the_items_clicks(
    dataset: Dataset, features: Path, tmp_path: Path, candidates: str
) -> None:
    """L_rec is the weighted mean over anchors of what it is for each of them."""
    plain, weighted = (
        Trainer(
            settings(
                dataset,
                tmp_path / str(p),
                data__features=features,
                loss__weight_power=p,
                loss__candidates=candidates,
            )
        )
        for p in (0.0, -0.7)
    )
    # As it is on the disk: another test changes the fixture's columns in memory.
    d, pages = plain.dataset, plain.dataset.split("train")
    shown = slice(int(d.pv_start[pages.start]), int(d.pv_end[pages.stop - 1]))
    clicks = Counter(d.pv_item[shown][d.pv_clicked[shown]].tolist())
    batch = plain.loader.load(0, 0)
    found = plain.backward(batch, stats=True).stats
    items = torch.from_numpy(batch.plan.items)[batch.pv_index].tolist()
    weights = torch.tensor([max(clicks[i], 1) ** -0.7 for i in items])
    rows = slice(len(items))  # the histories' items are candidates only
    anchors = found.is_anchor[rows]
    expected = (weights * found.item_loss[rows])[anchors].sum() / weights[anchors].sum()
    assert weighted.backward(batch).rec.item() == pytest.approx(expected.item(), rel=1e-5)
    assert len(set(weights[anchors].tolist())) > 2, "equal weights would not tell"


@pytest.mark.parametrize("direction", ["reconstruct", "both"])
def test_pages_without_a_click_are_candidates_and_no_anchors(
    dataset: Dataset, features: Path, tmp_path: Path, direction: str
) -> None:
    d = Dataset(dataset.path)
    clicked = d.pv_clicked & (np.repeat(np.arange(d.num_pages), d.pv_end - d.pv_start) % 3 > 0)
    columns = {"item": d.pv_item, "clicked": clicked}
    config = settings(
        rewrite(d, tmp_path / "data", {"page_items": columns}),
        tmp_path / "run",
        data__features=features,
        data__pages=24,
        loss__direction=direction,
        loss__sequence_weight=0,
        loss__history_negatives=False,
    )
    trainer = Trainer(config)
    batch, loss = trainer.loader.load(0, 0), trainer.config.loss
    with torch.no_grad():
        table = nn.functional.normalize(trainer.learner.encode(batch.images).double(), dim=1)

    def loss_of(pages: Any) -> float:
        part = trainer.plan.assemble(pages)
        where = {item: row for row, item in enumerate(batch.plan.items.tolist())}
        rows = torch.tensor([where[item] for item in part.items.tolist()])
        pv, history = (rows[torch.from_numpy(x)] for x in (part.pv_index, part.history_index))
        offsets = (torch.from_numpy(x) for x in (part.pv_offsets, part.history_offsets))
        return reconstruction_loss(
            table[pv],
            table[history],
            torch.from_numpy(part.clicked),
            **dict(zip(("pv_offsets", "history_offsets"), offsets, strict=True)),
            item_ids=pv,
            temperature=loss.temperature,
            direction=direction,
            impl="reference",
            **loss.reconstruction,
        ).item()

    pages = batch.plan.pages
    without = pages % 3 == 0
    assert 3 < without.sum() < len(pages) - 3
    rec = trainer.backward(batch).rec.item()
    assert rec == pytest.approx(loss_of(pages), rel=1e-5)
    assert rec > loss_of(pages[~without]) + 0.01  # fewer candidates, the same anchors
    # A batch of nothing else: no anchor, no gradient, and training goes on.
    trainer.plan.pages = lambda epoch, step: pages[without]  # type: ignore[method-assign]
    empty = trainer.loader.load(0, 0)
    assert empty.plan.num_anchors == 0 and len(empty.clicked)
    result, norm = trainer.step(empty, stats=True)
    line = measure(trainer, result, norm, 0.0)
    assert (line["loss"], line["grad_norm"]) == (0, 0)
    assert "top1" not in line
    assert all(p.isfinite().all() for p in trainer.learner.parameters)


def test_a_loss_of_weight_0_is_left_out(dataset: Dataset, features: Path, tmp_path: Path) -> None:
    weights = {"both": (2.0, 0.5), "rec": (1.0, 0.0), "seq": (0.0, 1.0)}
    found = {}
    for name, (rec, seq) in weights.items():
        trainer = Trainer(
            settings(
                dataset,
                tmp_path / name,
                data__features=features,
                loss__reconstruction_weight=rec,
                loss__sequence_weight=seq,
            )
        )
        found[name] = trainer.backward(trainer.loader.load(0, 0), stats=True)
    assert found["both"].loss.item() == pytest.approx(
        2 * found["rec"].loss.item() + 0.5 * found["seq"].loss.item()
    )
    assert found["rec"].seq == 0
    assert found["seq"].rec == 0
    assert found["seq"].stats is None


def test_temperature_of_each_loss_is_learned_or_fixed(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    for rec, seq in ((True, False), (False, True)):
        trainer = Trainer(
            settings(
                dataset,
                tmp_path / f"{rec}",
                data__features=features,
                optim__steps=4,
                loss__learnable_temperature=rec,
                loss__sequence_learnable_temperature=seq,
            )
        )
        trainer.fit()
        last = metrics(trainer.out)[-1]
        assert (abs(last["temperature"] - 0.2) > 1e-6) == rec
        assert (abs(last["sequence_temperature"] - 0.2) > 1e-6) == seq


def test_memory_is_used_after_the_warm_up(dataset: Dataset, features: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data__features": features, "optim__steps": 10, "optim__warmup": 0.3}
    trainer = Trainer(settings(dataset, tmp_path / "default", loss__memory=400, **options))
    used = []
    forward = trainer.objective.forward
    trainer.objective.forward = lambda *inputs: (used.append(inputs[-1]), forward(*inputs))[1]  # type: ignore[method-assign]
    trainer.fit()
    assert used == [False] * 3 + [True] * 7
    ages = [x["memory_age"] for x in metrics(tmp_path / "default")]
    assert ages[0] < ages[-1] < 10
    Trainer(settings(dataset, tmp_path / "without", **options)).fit()
    assert "memory_age" not in metrics(tmp_path / "without")[-1]


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
    assert torch.equal(exported.head[1].weight, trainer.learner.average.module.head[1].weight)
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


@pytest.mark.long("kernels case by case")
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


# ---- damaged images ------------------------------------------------------------------------------


def damage(dataset: Dataset, items: list[int], to: Path) -> Dataset:
    """A copy of the folder in which the images of some items are cut in half."""
    images = images_of(dataset)
    for i in items:
        image, *shape = images[i]
        assert image is not None
        images[i] = (image[: len(image) // 2], *shape)
    return rewrite(dataset, to, images=images)


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


# ---- collapse ------------------------------------------------------------------------------------


def test_uniformity_and_rank_tell_collapse() -> None:
    g = torch.Generator().manual_seed(0)
    spread = torch.randn(2000, 16, generator=g)
    one = torch.ones(100, 16)
    line = torch.randn(500, 1, generator=g) * torch.randn(1, 16, generator=g)
    assert uniformity(one).item() == pytest.approx(0, abs=1e-6)
    # E exp(-2 |x - y|^2) = E exp(-4 + 4 cos), and cos has variance 1 / D: about exp(-4 + 8 / D) for
    # large D.
    assert uniformity(spread).item() == pytest.approx(-4 + 8 / 16, abs=0.1)
    assert effective_rank(one).item() == 0
    assert effective_rank(line).item() == pytest.approx(1, rel=1e-3)
    assert effective_rank(spread).item() == pytest.approx(16, rel=0.02)


# ---- real photos ---------------------------------------------------------------------------------


@pytest.mark.skipif(not PURCHASES.is_dir(), reason="no purchases at ../shared/data/hm-fashion")
def test_real_purchases_and_photos(tmp_path: Path) -> None:
    """A few hundred pages of real photos, small: the loss of the click sequences falls, and the
    embeddings do not collapse."""
    from courier_fast.data.prepare.layouts import generic
    from courier_fast.data.prepare.run import prepare

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
