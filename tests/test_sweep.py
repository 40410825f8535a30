"""The grid of a sweep, what is resumed, and its numbers against those of `compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from dataset_factory import make_dataset
from train_factory import make_features

from courier_fast.cli import main
from courier_fast.data.dataset import Dataset
from courier_fast.data.embeddings import trained_until
from courier_fast.evaluate.click import click_logits_of
from courier_fast.evaluate.comparison import compare
from courier_fast.evaluate.methods import Method
from courier_fast.markdown import markdown_table
from courier_fast.sweep import grid
from courier_fast.train.trainer import Trainer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data") / "dataset"
    return make_dataset(folder, users=30, items=60, pages=300, history=6, images=False, seed=2)


@pytest.fixture(scope="module")
def features(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_features(dataset, tmp_path_factory.mktemp("features") / "features.npy")


def sweep(dataset: Dataset, features: Path, out: Path, *more: Any) -> int:
    fixed = (
        "--data.dataset",
        dataset.path,
        "--data.features",
        features,
        "--data.pages",
        32,
        "--model.dim",
        8,
        "--optim.steps",
        3,
        "--run.device",
        "cpu",
        "--run.tensorboard",
        "false",
        "--run.progress",
        "false",
        "--bootstrap",
        200,
        "--device",
        "cpu",
    )
    return main(["sweep", "--out", str(out), *map(str, fixed), *map(str, more)])


@pytest.fixture(scope="module")
def finished(
    dataset: Dataset, features: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, tuple[Any, ...]]:
    out = tmp_path_factory.mktemp("sweep")
    asked = ("--loss.temperature", 0.1, 0.5, "--loss.sequence_weight", 0, 1, "--seeds", 2)
    assert sweep(dataset, features, out, *asked) == 0
    return out, asked


def test_every_combination_is_a_row_with_the_numbers_of_compare(
    dataset: Dataset, finished: tuple[Path, tuple[Any, ...]]
) -> None:
    out, _ = finished
    rows = pq.read_table(out / "results.parquet").to_pylist()
    keys = [(r["loss.temperature"], r["loss.sequence_weight"]) for r in rows]
    assert list(dict.fromkeys(keys)) == [("0.1", "0"), ("0.1", "1"), ("0.5", "0"), ("0.5", "1")]
    assert len(list((out / "runs").iterdir())) == len(list((out / "cells").iterdir())) == 8
    for key in set(keys):
        means = []
        for seed in (0, 1):
            name = f"temperature-{key[0]}_sequence_weight-{key[1]}_*_seed-{seed}.npy"
            (table,) = (out / "embeddings").glob(name)
            assert trained_until(table) == dataset.page_time[dataset.split("train")[-1]]
            method = Method("x", np.load(table))
            found = compare(dataset, [method], split="validation", k=[10], bootstrap=2)
            means.append({s: v["methods"]["x"] for s, v in found["sets"].items()})
        for row in (r for r, k in zip(rows, keys, strict=True) if k == key):
            of_seeds = [m[row["candidates"]][row["metric"]]["mean"] for m in means]
            assert row["mean"] == pytest.approx(np.mean(of_seeds))
            assert row["deviation"] == pytest.approx(np.std(of_seeds, ddof=1))
            assert row["low"] <= row["mean"] <= row["high"]
            assert row["difference_low"] <= row["difference"] <= row["difference_high"]
    base = [r for r, k in zip(rows, keys, strict=True) if k == ("0.1", "0")]
    assert all(r["difference"] == r["difference_low"] == r["difference_high"] == 0 for r in base)
    assert any(r["difference"] for r in rows), "settings that change nothing would not tell"
    text = (out / "results.md").read_text()
    assert "| temperature | sequence_weight | HR@10 | MRR | AUC |" in text
    for axis in ("loss.temperature", "loss.sequence_weight"):
        assert (out / f"{axis}.png").read_bytes()[:4] == b"\x89PNG"


def test_what_is_done_is_not_done_again(
    dataset: Dataset,
    features: Path,
    finished: tuple[Path, tuple[Any, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, asked = finished
    before = (out / "results.parquet").read_bytes()
    trained = []
    fit = Trainer.fit
    monkeypatch.setattr(Trainer, "fit", lambda t: (trained.append(t.out.name), fit(t))[1])
    assert sweep(dataset, features, out, *asked) == 0
    assert not trained
    assert (out / "results.parquet").read_bytes() == before
    lost = next((out / "cells").glob("temperature-0.5_sequence_weight-1_*_seed-1-*"))
    lost.unlink()
    assert sweep(dataset, features, out, *asked) == 0
    assert len(trained) == 1  # and its run was complete: nothing to train
    assert (out / "results.parquet").read_bytes() == before
    # Another setting that is on no axis makes other cells.
    names = {
        cells[0].name
        for cells in grid(
            None, {"data.dataset": [str(dataset.path)], "loss.temperature": ["0.1", "0.5"]}, 1, out
        )
    }
    assert names.isdisjoint(p.name for p in (out / "runs").iterdir())


def test_a_run_that_diverges_is_left_out_and_named(
    dataset: Dataset,
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fit = Trainer.fit

    def diverges(trainer: Trainer) -> dict[str, Any]:
        if trainer.config.loss.temperature == 0.5:
            raise RuntimeError("training has diverged")
        return fit(trainer)

    monkeypatch.setattr(Trainer, "fit", diverges)
    assert sweep(dataset, features, tmp_path, "--loss.temperature", 0.1, 0.5) == 0
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert {r["loss.temperature"] for r in rows} == {"0.1"}
    assert "left out: temperature 0.5, seed 0: training has diverged" in capsys.readouterr().out
    assert sweep(dataset, features, tmp_path / "none", "--loss.temperature", 0.5) == 2


def test_rows_are_ranked_by_the_click_head_of_their_run(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    asked = ("--loss.recipe", "courier", "--optim.lr", 1e-3, 1e-2, "--score", "click")
    assert sweep(dataset, features, tmp_path, *asked) == 0
    rows = pq.read_table(tmp_path / "results.parquet").to_pylist()
    assert {r["optim.lr"] for r in rows} == {"0.001", "0.01"}
    for row in rows:
        (run,) = (tmp_path / "runs").glob(f"lr-{row['optim.lr']}_*")
        (table,) = (tmp_path / "embeddings").glob(f"lr-{row['optim.lr']}_*.npy")
        method = Method("x", np.load(table), click=click_logits_of(run))
        options = {"split": "validation", "score": "click", "k": [10], "bootstrap": 2}
        found = compare(dataset, [method], **options)
        mean = found["sets"][row["candidates"]]["methods"]["x"][row["metric"]]["mean"]
        assert row["mean"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--loss.temperature", "0.1", "-1"), "loss.temperature: Input should be greater than 0"),
        (("--loss.heads", "1", "3"), "loss.heads: expected a divisor of model.dim 8, got 3"),
        (("--seeds", "0"), "--seeds: expected at least 1, got 0"),
        (("--run.seed", "1", "2"), "--run.seed: expected --seeds in its place"),
        (("--run.out", "x"), "--run.out: expected --out in its place"),
        (("--data.dataset", "a", "b"), "--data.dataset: expected one, got"),
        (("--split", "last"), "split: expected one of"),
        (("--k", "0"), "--k: expected numbers of at least 1"),
    ],
)
def test_wrong_settings_are_an_error_before_any_training(
    dataset: Dataset,
    features: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr(Trainer, "fit", lambda trainer: pytest.fail("trained"))
    assert sweep(dataset, features, tmp_path / "out", *options) == 2
    assert message in capsys.readouterr().err


def test_cells_of_a_table_end_where_they_should() -> None:
    text = markdown_table(["a", "b"], [["x|y", "1\n2"], ["", "<"]])
    assert text.splitlines() == ["| a | b |", "| --- | --- |", "| x\\|y | 1 2 |", "|  | < |"]
