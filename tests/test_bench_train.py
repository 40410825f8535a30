"""The benchmarks of loader, decoders and step run and count what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from dataset_factory import make_dataset

from bench import decode, loader, step
from courier_fast.data.batches import BatchPlan
from courier_fast.data.dataset import Dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", seed=2)


def arguments(dataset: Dataset, out: Path, *more: str) -> list[str]:
    size = ("--size", "32", "--pages", "8", "--turns", "1", "--steps", "2")
    return ["--dataset", str(dataset.path), "--json", str(out), *size, *more]


def test_step(dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(arguments(dataset, tmp_path / "r.json", "--backbone", "small_conv")) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert result["rates"].keys() == {"ours", "plain", "backbone alone"}
    assert all(r["occurrences_per_s"] >= r["images_per_s"] > 0 for r in result["rates"].values())
    assert (
        result["rates"]["plain"]["occurrences_per_s"] == result["rates"]["plain"]["images_per_s"]
    ), "no unique items there"
    assert result["occurrences_per_unique_image"] > 1
    assert 0 < result["loss_share"] < 1
    assert "ours over plain" in capsys.readouterr().out


def test_the_plain_trainer_sees_the_same_pages(dataset: Dataset) -> None:
    plan = BatchPlan(dataset, pages=8, history=5)
    pages = step.PageDataset(plan, 16, (0.5,) * 3, (0.5,) * 3)
    batch = plan.batch(0, 0)
    shown, past, clicked, pv_offsets, history_offsets, shown_items, past_items = step.collate(
        [pages[i] for i in range(len(batch.pages))]
    )
    assert shown_items.tolist() == batch.items[batch.pv_index].tolist()
    assert past_items.tolist() == batch.items[batch.history_index].tolist()
    assert clicked.tolist() == batch.clicked.tolist()
    assert pv_offsets.tolist() == batch.pv_offsets.tolist()
    assert history_offsets.tolist() == batch.history_offsets.tolist()
    assert (len(shown), len(past)) == (len(batch.pv_index), len(batch.history_index))
    assert np.isfinite(shown.numpy()).all()


def test_loader(dataset: Dataset, tmp_path: Path) -> None:
    more = ("--backbone", "small_conv", "--decoders", "software", "pillow", "dali")
    assert loader.main(arguments(dataset, tmp_path / "r.json", *more)) == 0
    result = json.loads((tmp_path / "r.json").read_text())
    assert {"software", "pillow", "plain", "backbone training"} <= result["rates"].keys()
    assert all(r["images_per_s"] > 0 for r in result["rates"].values())
    assert (
        "dali" in result["rates"]
        or "GPU" in result["left_out"]["dali"]
        or "DALI" in result["left_out"]["dali"]
    )


def test_decode(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    small = ["--count", "8", "--batch", "4", "--repeats", "1", "--size", "64"]
    monkeypatch.setattr("sys.argv", ["bench.decode", *small, "--only", "software", "pillow"])
    decode.main()
    out = capsys.readouterr().out
    assert "software" in out
    assert "pillow" in out
