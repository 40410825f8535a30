"""A run, or a sweep, goes on with the data that it was begun with; settings given as pairs have
limits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from prepare_factory import random_events, source_of
from train_factory import make_features, settings

from courier_fast.data.dataset import Dataset
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.run import prepare
from courier_fast.sweep import ABOUT, _same_data
from courier_fast.train.config import Config
from courier_fast.train.trainer import Trainer

OPTIONS = PrepareOptions(min_history=1, overwrite=True)


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    prepare(tmp_path / "ds", source=source_of(random_events(0)), options=OPTIONS)
    return Dataset(tmp_path / "ds")


def other(dataset: Dataset) -> Dataset:
    """As many pages and items in the same place, other clicks."""
    ids = dataset.item_ids.to_pylist()
    swap = dict(zip(ids, ids[1:] + ids[:1], strict=True))
    events = [(u, swap[i], t) for u, i, t in random_events(0)]
    assert isinstance(dataset.path, Path)
    prepare(dataset.path, source=source_of(events), options=OPTIONS)
    return Dataset(dataset.path)


def trainer(dataset: Dataset, out: Path, features: Path, **more: object) -> Trainer:
    return Trainer(settings(dataset, out, data__features=features, optim__steps=2, **more))


def test_a_run_went_on_with_another_dataset(dataset: Dataset, tmp_path: Path) -> None:
    features = make_features(dataset, tmp_path / "f.npy")
    trainer(dataset, tmp_path / "run", features).fit()
    before = dataset.fingerprint
    changed = other(dataset)
    assert (changed.num_pages, changed.num_items) == (dataset.num_pages, dataset.num_items)
    with pytest.raises(
        ValueError,
        match=r"run\.out: .*run has a run that was begun with another data\.dataset \(checksum "
        rf"{before[:19]}\), got .*ds \(checksum {changed.fingerprint[:19]}\).* another "
        r"run\.out",
    ):
        trainer(changed, tmp_path / "run", features)


def test_a_run_went_on_with_other_features(dataset: Dataset, tmp_path: Path) -> None:
    features = make_features(dataset, tmp_path / "f.npy")
    trainer(dataset, tmp_path / "run", features).fit()
    table = np.load(features)
    # The same values in a file of another kind and place are the same features.
    from pyarrow import parquet
    from pyarrow import table as arrow_table

    parquet.write_table(
        arrow_table({"item_id": dataset.item_ids, "embedding": list(table)}), tmp_path / "f.parquet"
    )
    trainer(dataset, tmp_path / "run", tmp_path / "f.parquet")
    np.save(features, table[::-1])  # another order of the items
    with pytest.raises(ValueError, match=r"begun with another data\.features .*f\.npy"):
        trainer(dataset, tmp_path / "run", features)


def test_a_run_of_before_there_were_checksums_goes_on(dataset: Dataset, tmp_path: Path) -> None:
    features = make_features(dataset, tmp_path / "f.npy")
    trainer(dataset, tmp_path / "run", features).fit()
    state = next((tmp_path / "run" / "checkpoints").glob("step-*/state.json"))
    about = json.loads(state.read_text())
    for name in ("dataset", "features"):
        del about["identity"][name]
    state.write_text(json.dumps(about))
    assert trainer(dataset, tmp_path / "run", features).progress.step == 2
    state.write_text(state.read_text()[:40])
    with pytest.raises(
        ValueError, match=r"state\.json: was cut off .*remove .* to go on from an earlier one"
    ):
        trainer(dataset, tmp_path / "run", features)


def test_a_sweep_kept_cells_of_another_dataset(dataset: Dataset, tmp_path: Path) -> None:
    features = make_features(dataset, tmp_path / "f.npy")
    out = tmp_path / "sweep"
    _same_data(out, dataset, [features, None])
    _same_data(out, dataset, [features, make_features(dataset, tmp_path / "g.npy")])
    np.save(features, np.load(features) + 1)
    with pytest.raises(ValueError, match=r"another data\.features .*f\.npy .*another --out"):
        _same_data(out, dataset, [features])
    with pytest.raises(ValueError, match=r"another data\.dataset .*another --out"):
        _same_data(out, other(dataset), [])
    (out / ABOUT).write_text("{")
    with pytest.raises(ValueError, match=r"sweep\.json: was cut off"):
        _same_data(out, dataset, [])


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("data.scale", ["-1", "-0.5"], "expected shares of the area above 0 and at most 1"),
        ("data.scale", ["0", "0.5"], "got 0 0.5"),
        ("data.scale", ["5", "9"], "got 5 9"),
        ("data.scale", ["1.0", "0.5"], "the least one first, got 1 0.5"),
        ("data.scale", ["0.5"], "1: Field required"),
        ("data.scale", ["nan", "1"], "finite number"),
        ("data.ratio", ["0", "0"], "width over height above 0 and at most 100"),
        ("data.ratio", ["2", "1"], "got 2 1"),
        ("data.ratio", ["1", "inf"], "finite number"),
        ("optim.betas", ["0.9", "1"], "expected two of at least 0 and below 1, got 0.9 1"),
        ("optim.betas", ["-0.1", "0.9"], "got -0.1 0.9"),
        ("data.buckets", ["64", "0"], "expected numbers of at least 1 and below 2.31, got 64 0"),
        ("data.buckets", ["9" * 20], "expected numbers of at least 1 and below 2.31"),
        ("optim.lr", "inf", "finite number"),
        ("loss.weight_power", "nan", "finite number"),
        ("loss.attention_scale", "-inf", "finite number"),
    ],
)
def test_settings_have_limits(name: str, value: object, text: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*{text}"):
        Config.load(None, {"data.dataset": "ds", name: value})


def test_settings_at_their_limits() -> None:
    for name, value in {
        "data.scale": (1, 1),
        "data.ratio": (1, 1),
        "optim.betas": (0, 0),
        "data.buckets": (),
    }.items():
        Config.load(None, {"data.dataset": "ds", name: value})


def test_a_setting_that_is_no_path_is_one_line_and_a_mark_of_windows_is_let_pass(
    tmp_path: Path,
) -> None:
    path = tmp_path / "c.toml"
    for text, said in (
        ("[data]\ndataset = 3", "  data.dataset: Value error, expected a path, got 3"),
        (
            '[data]\ndataset = "ds"\nfeatures = 3',
            "  data.features: Value error, expected a path, got 3",
        ),
        (
            '[data]\ndataset = "ds"\nscale = [0.5, "x"]',
            "  data.scale.1: Input should be a valid number",
        ),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match="config") as error:
            Config.load(path)
        lines = str(error.value).splitlines()[1:]
        assert len(lines) == 1 and lines[0].startswith(said)
    path.write_text('\ufeff[data]\ndataset = "ds"', "utf-8")
    assert Config.load(path).data.dataset == Path("ds")
