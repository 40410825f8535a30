"""`courier-fast evaluate`: with embeddings, with runs, by which score; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_factory import make_dataset

from courier_fast.data.dataset import Dataset
from courier_fast.evaluate import command, methods
from courier_fast.evaluate.comparison import compare
from courier_fast.evaluate.methods import Method
from courier_fast.evaluate.scores import Reconstruction


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
