"""`courier-fast evaluate`: with embeddings, with runs, by which score; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_factory import columns_of, make_dataset, rewrite
from torch.nn import functional
from train_factory import make_features, settings

from courier_fast import cli
from courier_fast.data.dataset import Dataset
from courier_fast.data.embeddings import read_embeddings
from courier_fast.evaluate import command, methods
from courier_fast.evaluate.click import click_logits_of
from courier_fast.evaluate.comparison import compare
from courier_fast.evaluate.methods import Method
from courier_fast.evaluate.scores import Reconstruction, history_scores
from courier_fast.evaluate.targets import find_targets, page_candidates
from courier_fast.train.checkpoint import Checkpoints
from courier_fast.train.config import Config
from courier_fast.train.encoder import load_encoder
from courier_fast.train.objective import Objective
from courier_fast.train.trainer import Trainer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(
        tmp_path_factory.mktemp("shop") / "d", users=40, items=60, pages=600, images=False
    )


# ---- the command ---------------------------------------------------------------------------------


def run(*arguments: object) -> int:
    import argparse

    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(a) for a in arguments]))


def test_command_with_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = make_dataset(tmp_path / "d", items=30, pages=200)
    table = np.random.default_rng(0).normal(size=(30, 8)).astype(np.float32)
    np.save(tmp_path / "mine.npy", table)
    out = tmp_path / "result.json"
    code = run(
        "--dataset",
        data.path,
        "--embeddings",
        tmp_path / "mine.npy",
        "--size",
        32,
        "--count",
        10,
        "--bootstrap",
        50,
        "--json",
        out,
        "--device",
        "cpu",
        "--threads",
        1,
    )
    assert code == 0
    result = json.loads(out.read_text())
    assert list(result["sets"]["page"]["methods"]) == [
        "mine",
        "random",
        "popularity",
        "pixels 8x8",
        "pixels 8x8, standardised",
        "untrained backbone",
        "untrained backbone, standardised",
    ]
    printed = capsys.readouterr().out
    assert "mine minus" in printed and "HR@10" in printed and "users" in printed


def test_command_without_images(tmp_path: Path, dataset: Dataset) -> None:
    np.save(tmp_path / "e.npy", np.eye(60, dtype=np.float32))
    out = tmp_path / "result.json"
    assert run("--dataset", dataset.path, "--embeddings", tmp_path / "e.npy", "--json", out) == 0
    assert list(json.loads(out.read_text())["missing"]) == ["e", "random", "popularity"]
    with pytest.raises(FileNotFoundError, match="without --images"):
        run("--dataset", dataset.path, "--embeddings", tmp_path / "e.npy", "--baselines", "pixels")


@pytest.mark.parametrize(
    ("options", "expected", "printed"),
    [
        (
            {"loss.attention": "candidate", "loss.attention_temperature": 0.3, "loss.unit": True},
            Reconstruction(attention_temperature=0.3, unit=True),
            "reconstruction (attention candidate, attention_temperature 0.3, "
            "num_heads 1, unit True)",
        ),
        (
            {"loss.attention": "anchor", "loss.attention_scale": 2.0, "loss.unit": False},
            Reconstruction(attention_scale=2.0),
            "reconstruction (attention candidate, attention_scale 2.0, num_heads 1, unit False)",
        ),
        (
            {"loss.attention": "mean"},
            Reconstruction("mean", unit=True),
            "reconstruction (attention mean, num_heads 1, unit True)",
        ),
    ],
)
def test_a_run_is_evaluated_by_the_score_that_it_trained(
    dataset: Dataset,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: dict[str, Any],
    expected: Reconstruction,
    printed: str,
) -> None:
    from courier_fast.embed.encode import encode_all
    from courier_fast.embed.sources import FeatureRows
    from courier_fast.train.config import Config
    from courier_fast.train.encoder import load_encoder
    from courier_fast.train.trainer import Trainer

    features = np.random.default_rng(4).normal(size=(60, 5)).astype(np.float32)
    np.save(tmp_path / "features.npy", features)
    common = {
        "data.dataset": dataset.path,
        "data.features": tmp_path / "features.npy",
        "data.pages": 64,
        "model.dim": 4,
        "optim.steps": 3,
        "run.out": tmp_path / "run",
        "run.device": "cpu",
        "run.tensorboard": False,
        "run.progress": False,
    }
    trainer = Trainer(Config.load(None, common | options))
    trainer.fit()
    trainer.close()
    out = tmp_path / "result.json"
    command_line = (
        "--dataset",
        dataset.path,
        "--run",
        tmp_path / "run",
        "--baselines",
        "backbone",
        "--bootstrap",
        5,
        "--device",
        "cpu",
    )
    assert run(*command_line, "--score", "reconstruction", "--json", out) == 0
    assert printed in " ".join(capsys.readouterr().out.split())
    encoder = load_encoder(tmp_path / "run")
    rivals = [
        Method("trained", encode_all(encoder, FeatureRows(features, dataset.item_ids))),
        Method("features", features),
        methods.standardised(Method("features", features)),
    ]
    options = {"score": "reconstruction", "reconstruction": expected, "bootstrap": 5}
    result = json.loads(out.read_text())
    assert result == compare(dataset, rivals, **options)
    # Not what another score gives.
    other = compare(dataset, rivals, score="max", bootstrap=5)
    assert other["settings"]["reconstruction"] is None
    assert result["sets"] != other["sets"]


def test_settings_of_a_run_are_read_before_the_work(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_main_method", lambda *_: pytest.fail("too late"))
    (tmp_path / "config.toml").write_text("[data]\ndataset = 'd'\n[loss]\nunit = 'often'\n")
    command_line = ("--dataset", dataset.path, "--run", tmp_path, "--score", "reconstruction")
    with pytest.raises(ValueError, match=r"loss\.unit"):
        run(*command_line)
    (tmp_path / "config.toml").unlink()
    with pytest.raises(FileNotFoundError, match=r"config\.toml"):
        run(*command_line)


def test_command_reconstructs_given_embeddings_by_the_defaults(
    tmp_path: Path, dataset: Dataset
) -> None:
    np.save(tmp_path / "e.npy", np.random.default_rng(5).normal(size=(60, 3)).astype(np.float32))
    out = tmp_path / "r.json"
    command_line = ("--dataset", dataset.path, "--embeddings", tmp_path / "e.npy", "--json", out)
    assert run(*command_line, "--score", "reconstruction", "--baselines", "random") == 0
    settings = json.loads(out.read_text())["settings"]
    assert settings["reconstruction"] == {
        "attention": "candidate",
        "attention_scale": None,
        "attention_temperature": None,
        "num_heads": 1,
        "unit": False,
    }


def test_projections_of_the_loss_are_not_there_to_rank_by(tmp_path: Path) -> None:
    from courier_fast.train.config import Config

    given = {"data.dataset": tmp_path, "loss.projections": "query_key"}
    Config.load(None, given).save(tmp_path / "config.toml")
    with pytest.raises(
        ValueError, match="loss.projections none, as they are not exported, got query_key"
    ):
        Reconstruction.of_run(tmp_path)


# ---- the click head of a run ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def clicked(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Users click what is of their history's group, and are shown others besides."""
    data = make_dataset(
        tmp_path_factory.mktemp("clicked") / "d", users=60, items=40, pages=900, images=False
    )
    rng = np.random.default_rng(0)
    events, shown = columns_of(data, "events"), columns_of(data, "page_items")
    group = np.arange(data.num_items) % 4
    members = [(np.flatnonzero(group == g), np.flatnonzero(group != g)) for g in range(4)]
    for page in range(data.num_pages):
        same, other = members[int(data.page_user[page]) % 4]
        history = slice(data.history_start[page], data.history_end[page])
        events["item"][history] = rng.choice(same, history.stop - history.start)
        for row in range(data.pv_start[page], data.pv_end[page]):
            shown["item"][row] = rng.choice(same if data.pv_clicked[row] else other)
    return rewrite(data, data.path.parent / "e", {"events": events, "page_items": shown})


@pytest.fixture(scope="module")
def runs(clicked: Dataset, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs with a click head, by attention, and one without."""
    folder = tmp_path_factory.mktemp("runs")
    features = np.eye(4)[np.arange(clicked.num_items) % 4]
    features = features + 0.3 * np.random.default_rng(1).normal(size=features.shape)
    np.save(folder / "f.npy", features.astype(np.float32))
    given: dict[str, Any] = {
        "data__features": folder / "f.npy",
        "optim__steps": 40,
        "optim__epochs": 0,
        "optim__lr": 0.01,
        "loss__reconstruction_weight": 0,
        "loss__sequence_weight": 0,
        "loss__prediction_weight": 1,
    }
    cases: dict[str, dict[str, Any]] = {
        "multihead": {"loss__attention": "multihead", "loss__heads": 2},
        "candidate": {"loss__projections": "all"},
        "mean": {"loss__attention": "mean"},
        "none": {"loss__prediction_weight": 0, "loss__sequence_weight": 1},
    }
    for name, more in cases.items():
        Trainer(settings(clicked, folder / name, **(given | more))).fit()
    return {name: folder / name for name in cases}


@pytest.mark.parametrize("name", ["multihead", "candidate", "mean"])
def test_click_head_ranks_what_is_clicked(
    name: str, clicked: Dataset, runs: dict[str, Path]
) -> None:
    """As the objective that was trained has it, and above the items that nobody clicked."""
    click = click_logits_of(runs[name])
    features = read_embeddings(runs[name].parent / "f.npy", clicked)
    encoder = load_encoder(runs[name])
    table = encoder(torch.from_numpy(features)).detach().numpy()
    rivals = [Method("trained", table, click=click), Method("mean of it", table)]
    found = compare(clicked, rivals, candidates=["page"], score="click", bootstrap=20)
    auc = found["sets"]["page"]["methods"]["trained"]["AUC"]["mean"]
    assert auc > 0.95
    assert found["settings"]["score"] == "click"
    # Another method's embeddings mean nothing to the head: they are ranked by the mean.
    by_mean = compare(clicked, rivals[1:], candidates=["page"], bootstrap=20)
    methods_of = (x["sets"]["page"]["methods"]["mean of it"] for x in (found, by_mean))
    assert next(methods_of) == next(methods_of)


def test_scores_of_the_click_head_are_its_logits(clicked: Dataset, runs: dict[str, Path]) -> None:
    """By plain PyTorch: the mean of the history and the candidate, in the run's running
    statistics."""
    objective = Objective(Config.load(runs["mean"] / "config.toml").loss, 8).eval()
    stored = Checkpoints(runs["mean"] / "checkpoints")
    tensors = {f"model.objective.{n}": x for n, x in objective.state_dict().items()}
    stored.load(stored.all()[-1], tensors, "model.objective.")
    rng = np.random.default_rng(2)
    table = rng.normal(size=(clicked.num_items, 8)).astype(np.float32)
    drawn = page_candidates(clicked, find_targets(clicked, "test", 3))
    scores = history_scores(
        clicked, drawn, table, score="click", click=click_logits_of(runs["mean"])
    )
    unit = functional.normalize(torch.from_numpy(table).double(), dim=1)
    head = objective.click_head
    assert head is not None
    for t in range(5):
        past = slice(drawn.targets.history_start[t], drawn.targets.history_end[t])
        r = unit[clicked.event_item[past].astype(np.int64)].mean(0)
        at = slice(drawn.offsets[t], drawn.offsets[t + 1])
        e = unit[drawn.items[at].astype(np.int64)]
        expected = head.double()(torch.cat([r.expand_as(e), e], 1)).squeeze(1)
        np.testing.assert_allclose(scores[at], expected.detach().numpy(), rtol=1e-5, atol=1e-6)


def test_score_click_needs_a_click_head(
    clicked: Dataset, runs: dict[str, Path], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="a run with loss.prediction_weight above 0, .* got 0 in"):
        run("--dataset", clicked.path, "--run", runs["none"], "--score", "click")
    np.save(tmp_path / "e.npy", np.ones((clicked.num_items, 2), np.float32))
    with pytest.raises(ValueError, match="--score click: expected --run, .* got --embeddings"):
        run("--dataset", clicked.path, "--embeddings", tmp_path / "e.npy", "--score", "click")
    table = np.ones((clicked.num_items, 2), np.float32)
    with pytest.raises(ValueError, match="score click: expected a click head .* with 'mine'"):
        compare(clicked, [Method("mine", table)], score="click")
    drawn = page_candidates(clicked, find_targets(clicked, "test", 3))
    with pytest.raises(ValueError, match="click: expected a click head with score click"):
        history_scores(clicked, drawn, table, score="click")
    config = (runs["mean"] / "config.toml").read_text()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(config)
    with pytest.raises(FileNotFoundError, match="score click: expected a checkpoint in"):
        click_logits_of(tmp_path / "run")


def test_command_by_the_click_head(
    clicked: Dataset, runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--dataset", clicked.path, "--run", runs["multihead"], "--score", "click")
    less = ("--baselines", "random", "backbone", "--bootstrap", 20, "--count", 10)
    assert run(*given, *less, "--json", tmp_path / "r.json", "--device", "cpu") == 0
    assert json.loads((tmp_path / "r.json").read_text())["settings"]["score"] == "click"
    assert "by click (baselines by mean)" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(ValueError, match="a run with another loss.attention than multihead"):
        run("--dataset", clicked.path, "--run", runs["multihead"], "--score", "reconstruction")


def test_report_by_the_click_head(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d", users=40, items=60, pages=200)
    given = {"data__features": make_features(data, tmp_path / "f.npy"), "optim__steps": 4}
    Trainer(settings(data, tmp_path / "run", loss__recipe="courier", **given)).fit()
    words = ["report", "--dataset", data.path, "--run", tmp_path / "run", "--device", "cpu"]
    words += ["--score", "click", "--baselines", "random", "--bootstrap", 20]
    assert cli.main([str(x) for x in [*words, "--out", tmp_path / "r.html"]]) == 0
    page = (tmp_path / "r.html").read_text("utf-8")
    assert "click head (baselines by their mean cosine similarity)" in page
    assert "click prediction" in page  # the curve of its loss
