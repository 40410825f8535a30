"""Impressions that stand for several, as where `prepare` cut pages: training, the table, its cells
and the export; and why."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
import torch
from ctr_factory import make_world, write_world
from dataset_factory import columns_of, rewrite

from courier_fast import metrics
from courier_fast.cli import main
from courier_fast.ctr import Impressions, make_protocol
from courier_fast.ctr.cells import Cell, Plan, read_predictions
from courier_fast.ctr.fit import Settings, fit
from courier_fast.ctr.inputs import Material
from courier_fast.ctr.slices import slices
from courier_fast.data.dataset import Dataset
from courier_fast.data.prepare.layouts import Source
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.run import prepare

Array = np.ndarray
QUICK = Settings(batch=256, epochs=1, lr=3e-3)


def with_weights(dataset: Dataset, path: Path, weight: Array) -> Dataset:
    """A copy whose rows have these weights [page items]."""
    columns = columns_of(dataset, "page_items") | {"weight": weight.astype(np.float32)}
    return rewrite(dataset, path, {"page_items": columns})


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Batches are small: more threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, Array]:
    path = tmp_path_factory.mktemp("world") / "d"
    return make_world(path, style_decides=True, users=60, items=120, pages=800)


def test_training_is_by_weight(world: tuple[Dataset, Array], tmp_path: Path) -> None:
    """Equal weights change no bit; what weighs more is learnt more."""
    d, _ = world
    same = with_weights(d, tmp_path / "same", np.full(len(d.pv_item), 4.0))
    other = with_weights(d, tmp_path / "other", np.where(d.pv_clicked, 1, 50))
    settings = Settings(batch=32, epochs=1, lr=0.01)
    none, equal, heavy = (
        fit("dcnv2", Material(x, make_protocol(x)).inputs("none"), settings)
        for x in (d, same, other)
    )
    for name, p in none.predictions.items():
        np.testing.assert_array_equal(p, equal.predictions[name])
        assert heavy.predictions[name].mean() < 0.5 * p.mean()
    assert none.losses == pytest.approx(equal.losses, rel=1e-13)


def test_the_moment_to_stop_is_by_weight(world: tuple[Dataset, Array], tmp_path: Path) -> None:
    d, _ = world
    other = with_weights(d, tmp_path / "d", 1 + np.arange(len(d.pv_item)) % 7)
    inputs = Material(other, make_protocol(other)).inputs("none")
    found, shown = fit("dcnv2", inputs, QUICK), inputs.splits["validation"].shown
    p = found.predictions["validation"]
    assert min(found.losses) == pytest.approx(
        metrics.logloss(shown.clicked, p, weight=shown.weight)
    )
    assert min(found.losses) != pytest.approx(metrics.logloss(shown.clicked, p), rel=1e-4)


def test_the_table_and_the_export_have_the_weights(
    world: tuple[Dataset, Array], tmp_path: Path
) -> None:
    d, style = world
    rng = np.random.default_rng(0)
    other = with_weights(
        d, tmp_path / "d", np.where(d.pv_clicked, 1, rng.integers(1, 9, len(d.pv_item)))
    )
    np.save(tmp_path / "style.npy", style)
    what = [
        "ctr",
        "--dataset",
        str(other.path),
        "--embeddings",
        str(tmp_path / "style.npy"),
        "--out",
        str(tmp_path / "out"),
    ]
    more = [
        "--models",
        "din",
        "--forms",
        "similarity",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--export",
        str(tmp_path / "x"),
    ]
    assert main([*what, *more]) == 0
    report = json.loads((tmp_path / "out/ctr.json").read_text())
    (table,) = report["tables"]
    tuned, shown = (Impressions(other, s) for s in ("validation", "test"))
    p = {}
    for row in table["rows"]:
        cell = Cell("din", row["form"], row["embedding"], "disjoint", 0)
        read = read_predictions(tmp_path / "out/cells" / cell.file, ("validation", "test"))
        p[row["embedding"]] = read["test"]
        expected = metrics.auc(shown.clicked, read["test"], weight=shown.weight)
        assert row["auc"]["value"] == row["auc_of_seeds"][0] == pytest.approx(expected, rel=1e-12)
        curve = metrics.fit_platt(tuned.clicked, read["validation"], weight=tuned.weight)
        mended = metrics.calibration(shown.clicked, curve(read["test"]), weight=shown.weight)
        assert row["recalibrated"]["pcoc"] == pytest.approx(mended.pcoc)
    found = metrics.compare(shown.clicked, p, user=shown.user, base="random", weight=shown.weight)
    difference = found["style"].auc.minus_base
    against = table["against"][0]["auc"]
    assert difference is not None
    assert (against["value"], against["low"]) == pytest.approx((difference.value, difference.low))
    masks = {(kind, name): mask for kind, name, mask in slices(shown)}  # but those by cosine
    assert len(masks) > 5
    of = {(one["kind"], one["name"]): one for one in table["slices"]}
    for key, mask in masks.items():
        one = of[key]
        if one["rows"]:
            expected = metrics.auc(shown.clicked[mask], p["none"][mask], weight=shown.weight[mask])
            assert one["rows"]["none"]["auc"]["value"] == pytest.approx(expected, rel=1e-12)
    assert "Some pages were cut" in (tmp_path / "out/ctr.md").read_text()
    np.testing.assert_array_equal(
        pq.read_table(tmp_path / "x/test.parquet")["weight"], shown.weight
    )
    assert "| weight | float32; how many" in (tmp_path / "x/README.md").read_text()


def test_cells_of_datasets_without_weights_stay_valid(tmp_path: Path) -> None:
    """The fingerprint is what it was before there were weights, and another one with them."""
    page = np.arange(200)
    item = (page[:, None] * 7 + np.arange(4) * 5) % 30
    clicked = (page[:, None] + np.arange(4)) % 5 == 0
    write_world(tmp_path / "d", page % 11, 1_000_000 + 1000 * page, item, clicked, 30)
    d = Dataset(tmp_path / "d")
    weighted = with_weights(d, tmp_path / "w", np.arange(800) % 3 + 1)
    again = with_weights(d, tmp_path / "v", np.arange(800) % 4 + 1)
    table = {"x": [np.arange(90, dtype=np.float32).reshape(30, 3)]}
    cell = Cell("din", "vector", "x", "shared", 0)
    found = [
        Plan(x, table, ["din"], ["vector"], [make_protocol(x, "shared")]).fingerprints()(cell)
        for x in (d, weighted, again)
    ]
    assert found[0] == "d94f0f227c36fd990dd9e162243001614eea5d972c2f5fa0f9aa1e44b852c888"
    assert len(set(found)) == 3


# ---- why -----------------------------------------------------------------------------------------


def make_log(users: int = 250, pages: int = 20, items: int = 60) -> tuple[Source, Array, Array]:
    """Click probabilities are those of users [U] times those of items [I]; most pages are without a
    click. Who clicks less sees more."""
    rng = np.random.default_rng(0)
    of_user, of_item = rng.lognormal(-3.8, 1.2, users).clip(0, 0.25), 2 * rng.random(items) ** 2
    size = np.where(of_user > np.median(of_user), 5, 20)[np.arange(users * pages) % users]
    page = np.repeat(np.arange(users * pages), size)
    item = np.concatenate([rng.choice(items, n, replace=False) for n in size])
    clicked = rng.random(len(page)) < of_user[page % users] * of_item[item]

    def ids(kind: str, numbers: Array) -> list[str]:
        return [f"{kind}{n:04}" for n in numbers]

    shown = pl.LazyFrame(
        {
            "page_id": ids("p", page),
            "user_id": ids("u", page % users),
            "item_id": ids("i", item),
            "time": 100 + page,
            "clicked": clicked,
        }
    )
    before = pl.LazyFrame(
        {"user_id": ids("u", np.arange(users)), "item_id": ["i0000"] * users, "time": [1] * users}
    )
    about = pl.LazyFrame(
        {"item_id": ids("i", np.arange(items)), "category": ids("c", np.arange(items) % 5)}
    )
    return Source("test", before, shown, items=about), of_user, of_item


def rate(clicked: Array, p: Array, user: Array, weight: Array | None) -> tuple[float, float]:
    """Predicted over observed clicks, and half of its 95 % interval by users."""
    weight = np.ones(len(p)) if weight is None else weight
    value = metrics.calibration(clicked, p, weight=weight).pcoc
    part = np.bincount(user, weight * (p - value * clicked)) / (weight @ clicked)
    return value, 1.96 * float(np.sqrt(np.square(part).sum()))


def test_a_log_that_was_cut_is_judged_as_the_whole(tmp_path: Path) -> None:
    """By the true probabilities, what is kept with its weights has the AUC, the logloss and the
    rate of the log; without either it does not."""
    source, of_user, of_item = make_log()
    data = {}
    for name, size, keep in (("whole", 20, True), ("kept", 5, True), ("dropped", 5, False)):
        options = PrepareOptions(
            page_size=size, keep_unclicked=keep, min_history=1, validation_share=0.2, test_share=0.4
        )
        report = prepare(tmp_path / name, source=source, options=options)["pages"]
        data[name] = Dataset(tmp_path / name)
        assert "cut" not in report if name == "whole" else report["cut"] > 0.3 * report["kept"]
    assert data["dropped"].num_pages < 0.5 * data["whole"].num_pages
    assert data["whole"].pv_weight is None

    def truth(x: Impressions) -> Array:
        return of_user[x.user] * of_item[x.item]

    x = Impressions(data["whole"], "test")
    whole = metrics.compare(x.clicked, {"p": truth(x)}, user=x.user)["p"]
    assert rate(x.clicked, truth(x), x.user, None)[0] == pytest.approx(1, abs=0.1)
    assert whole.auc.value == pytest.approx(0.849, abs=6e-4)
    # As docs/evaluation.md has it.
    documented = {
        ("kept", True): 0.849,
        ("kept", False): 0.76,
        ("dropped", True): 0.802,
        ("dropped", False): 0.673,
    }
    for name, weighted in documented:
        x = Impressions(data[name], "test")
        assert x.weight is not None
        weight = x.weight if weighted else None
        found = metrics.compare(x.clicked, {"p": truth(x)}, user=x.user, weight=weight)["p"]
        pcoc, half = rate(x.clicked, truth(x), x.user, weight)
        right = name == "kept" and weighted
        assert found.auc.value == pytest.approx(documented[name, weighted], abs=6e-4)
        assert (found.auc.low <= whole.auc.value <= found.auc.high) == right, (name, weighted)
        assert (found.logloss.low <= whole.logloss.value <= found.logloss.high) == right
        assert (abs(pcoc - whole.calibration.pcoc) <= half) == right, (name, weighted)
