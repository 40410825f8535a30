"""Metrics against brute force, intervals on known cases, candidates and scores against loops, and
the whole comparison."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from dataset_factory import make_dataset, rewrite

from courier_fast import reconstruction_loss
from courier_fast.data.dataset import Dataset
from courier_fast.data.embeddings import read_embeddings
from courier_fast.evaluate import methods
from courier_fast.evaluate.comparison import compare
from courier_fast.evaluate.methods import Method
from courier_fast.evaluate.scores import Reconstruction, history_scores
from courier_fast.evaluate.targets import find_targets, page_candidates, sampled_candidates


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(
        tmp_path_factory.mktemp("shop") / "d", users=40, items=60, pages=600, images=False
    )


# ---- targets and candidates ----------------------------------------------------------------------


def segments(values: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [values[a:b].tolist() for a, b in pairwise(offsets)]


def test_targets_are_the_clicks_of_the_split(dataset: Dataset) -> None:
    targets = find_targets(dataset, "test", history=3)
    expected = []
    for page in dataset.split("test"):
        rows = slice(dataset.pv_start[page], dataset.pv_end[page])
        for item in sorted(set(dataset.pv_item[rows][dataset.pv_clicked[rows]].tolist())):
            expected.append((page, item))
    assert list(zip(targets.page.tolist(), targets.item.tolist(), strict=True)) == expected
    lengths = targets.history_end - targets.history_start
    assert lengths.max() == 3 and lengths.min() >= 1
    times = dataset.event_time[targets.history_end - 1]
    assert (times < dataset.page_time[targets.page]).all()


def test_page_candidates_are_what_was_not_clicked(dataset: Dataset) -> None:
    targets = find_targets(dataset)
    drawn = page_candidates(dataset, targets)
    found = dict(
        zip(
            zip(drawn.targets.page.tolist(), drawn.targets.item.tolist(), strict=True),
            segments(drawn.items, drawn.offsets),
            strict=True,
        )
    )
    left_out = 0
    for page, item in zip(targets.page.tolist(), targets.item.tolist(), strict=True):
        rows = slice(dataset.pv_start[page], dataset.pv_end[page])
        others = dataset.pv_item[rows][~dataset.pv_clicked[rows]].tolist()
        if others:
            assert found[page, item] == [item, *others]
        else:
            assert (page, item) not in found
            left_out += 1
    assert left_out > 0  # pages of one item occur


@pytest.mark.parametrize("popular", [False, True])
def test_sampled_candidates_are_new_to_the_user(dataset: Dataset, popular: bool) -> None:
    targets = find_targets(dataset)
    drawn = sampled_candidates(dataset, targets, 10, popular=popular, seed=5)
    assert len(drawn.targets) == len(targets)
    for t, items in enumerate(segments(drawn.items, drawn.offsets)):
        page = targets.page[t]
        shown = slice(dataset.pv_start[page], dataset.pv_end[page])
        past = dataset.event_item[dataset.history_start[page] : dataset.history_end[page]]
        known = {*past.tolist(), *dataset.pv_item[shown][dataset.pv_clicked[shown]].tolist()}
        assert len(items) == len(set(items)) == 10
        assert items[0] == targets.item[t]
        assert not known & set(items[1:])
        if popular:
            assert (dataset.item_clicks[items[1:]] > 0).all()


def test_sampled_candidates_depend_on_the_seed_alone(dataset: Dataset) -> None:
    targets = find_targets(dataset)
    one, two, other = (sampled_candidates(dataset, targets, 10, seed=s).items for s in (1, 1, 2))
    assert (one == two).all() and (one != other).any()


def test_sampled_candidates_have_the_distribution_asked_for(dataset: Dataset) -> None:
    """One negative per target: an item's share is its weight among the items new to that user."""
    targets = find_targets(dataset, "train")
    for popular in (False, True):
        weight = dataset.item_clicks.astype(float) if popular else np.ones(dataset.num_items)
        expected, variance = np.zeros((2, dataset.num_items))
        for page in targets.page.tolist():
            shown = slice(dataset.pv_start[page], dataset.pv_end[page])
            p = weight.copy()
            p[dataset.event_item[dataset.history_start[page] : dataset.history_end[page]]] = 0
            p[dataset.pv_item[shown][dataset.pv_clicked[shown]]] = 0
            p /= p.sum()
            expected += p
            variance += p * (1 - p)
        drawn = sampled_candidates(dataset, targets, 2, popular=popular, seed=9)
        counts = np.bincount(drawn.items[drawn.offsets[:-1] + 1], minlength=dataset.num_items)
        assert (np.abs(counts - expected) < 4.5 * np.sqrt(variance) + 1e-9).all()


def test_all_items_are_taken_where_fewer_are_left(dataset: Dataset) -> None:
    """Also the path by exponential keys: the last items are rarely drawn."""
    targets = find_targets(dataset)
    drawn = sampled_candidates(dataset, targets, 1000, popular=True)
    for t, items in enumerate(segments(drawn.items, drawn.offsets)):
        page = targets.page[t]
        shown = slice(dataset.pv_start[page], dataset.pv_end[page])
        known = {
            *dataset.event_item[dataset.history_start[page] : dataset.history_end[page]].tolist(),
            *dataset.pv_item[shown][dataset.pv_clicked[shown]].tolist(),
        }
        left = set(np.flatnonzero(dataset.item_clicks).tolist()) - known
        assert set(items[1:]) == left and len(items) == len(left) + 1


def test_rare_items_are_drawn_by_their_weight_too(tmp_path: Path) -> None:
    """Of one item with nearly all of the weight and many light ones, the light ones are still drawn
    uniformly (exponential keys)."""
    data = make_dataset(tmp_path / "d", users=300, items=30, pages=2000, history=1, images=False)
    weight = np.ones(30, np.int64)
    weight[0] = 10**9
    data.item_clicks = weight
    targets = find_targets(data, "train")
    drawn = sampled_candidates(data, targets, 3, popular=True, seed=1)
    light = drawn.items[np.setdiff1d(np.arange(len(drawn.items)), drawn.offsets[:-1])]
    counts = np.bincount(light, minlength=30)
    free = counts[1:]
    assert counts[0] > 0.8 * len(targets)
    assert np.abs(free - free.mean()).max() < 5 * math.sqrt(free.mean())


def test_only_items_with_images_are_sampled(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d", items=40, images=False)
    images = [(b"not looked at" if item % 2 else None, 8, 8) for item in range(40)]
    data = rewrite(data, tmp_path / "e", images=images)
    drawn = sampled_candidates(data, find_targets(data), 12)
    others = np.setdiff1d(np.arange(len(drawn.items)), drawn.offsets[:-1])
    assert (drawn.items[others] % 2 == 1).all()


# ---- scores --------------------------------------------------------------------------------------


SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"attention_scale": 1.5},
    {"attention_temperature": 0.2},
    {"unit": True},
    {"attention_scale": 8.0, "unit": True},
    {"attention_temperature": 0.2, "unit": True},
    {"attention": "mean"},
    {"attention": "mean", "unit": True},
    {"attention_temperature": 0.2, "num_heads": 2},
    {"attention_scale": 1.5, "num_heads": 3, "unit": True},
)


def reconstruction_by_hand(e: np.ndarray, c: np.ndarray, how: Reconstruction) -> float:
    """cos(R, e) of an item e [D] and a history c [H, D], one history item at a time."""

    def unit(x: np.ndarray) -> np.ndarray:
        return x / np.linalg.norm(x)

    if how.unit:
        e, c = unit(e), np.stack([unit(x) for x in c])
    size = len(e) // how.num_heads
    scale = how.attention_scale or size**-0.5
    r = np.zeros(len(e))
    for head in range(0, len(e), size):
        q, k = e[head : head + size], c[:, head : head + size]
        if how.attention == "mean":
            logits = [0.0 for _ in k]
        elif how.attention_temperature is not None:
            logits = [unit(q) @ unit(x) / how.attention_temperature for x in k]
        else:
            logits = [scale * (q @ x) for x in k]
        total = sum(math.exp(x) for x in logits)
        for x, v in zip(logits, k, strict=True):
            r[head : head + size] += math.exp(x) / total * v
    return float(unit(r) @ unit(e))


@pytest.mark.parametrize(
    ("score", "settings"),
    [("mean", None), ("max", None), ("reconstruction", None)]
    + [("reconstruction", settings) for settings in SETTINGS],
)
@pytest.mark.parametrize("chunk", [1, 222, 1 << 21])
def test_scores_equal_a_loop(
    dataset: Dataset, score: str, settings: dict[str, Any] | None, chunk: int
) -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(size=(dataset.num_items, 6)).astype(np.float32)
    table[rng.random(dataset.num_items) < 0.3] = np.nan
    targets = find_targets(dataset, history=4)
    drawn = page_candidates(dataset, targets)
    how = None if settings is None else Reconstruction(**settings)
    found = history_scores(dataset, drawn, table, score=score, reconstruction=how, chunk=chunk)
    unit = table.astype(np.float64) / np.linalg.norm(table.astype(np.float64), axis=1)[:, None]
    for t, (items, own) in enumerate(
        zip(segments(drawn.items, drawn.offsets), segments(found, drawn.offsets), strict=True)
    ):
        past = dataset.event_item[drawn.targets.history_start[t] : drawn.targets.history_end[t]]
        past = past[np.isfinite(table[past]).all(1)]
        for item, value in zip(items, own, strict=True):
            if not len(past) or np.isnan(table[item]).any():
                assert math.isnan(value)
                continue
            if score == "reconstruction":
                e, c = (table[i].astype(np.float64) for i in (item, past))
                expected = reconstruction_by_hand(e, c, how or Reconstruction())
            else:
                similar = unit[past] @ unit[item]
                expected = similar.mean() if score == "mean" else similar.max()
            assert value == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize(
    ("attention", "options"),
    [
        (name, options)
        for name in ("candidate", "anchor")
        for options in ({}, {"attention_scale": 2.0}, {"attention_temperature": 0.3})
    ]
    + [("mean", {})],
)
def test_scores_are_what_the_loss_compares(
    dataset: Dataset, attention: str, options: dict[str, Any], unit: bool
) -> None:
    """A page for each target: the loss's similarity of the clicked item, and its logsumexp over the
    page where all candidates ask."""
    table = np.random.default_rng(2).normal(size=(dataset.num_items, 6)).astype(np.float32)
    drawn = page_candidates(dataset, find_targets(dataset, history=4))
    how = Reconstruction("mean" if attention == "mean" else "candidate", unit=unit, **options)
    scores = history_scores(dataset, drawn, table, score="reconstruction", reconstruction=how)
    rows = torch.from_numpy(table).double()
    past = [
        dataset.event_item[a:b]
        for a, b in zip(drawn.targets.history_start, drawn.targets.history_end, strict=True)
    ]
    first = drawn.offsets[:-1]
    clicked = torch.zeros(len(drawn.items), dtype=torch.bool)
    clicked[first] = True
    _, stats = reconstruction_loss(
        torch.from_numpy(drawn.items).long(),
        torch.from_numpy(np.concatenate(past)).long(),
        clicked,
        embeddings=torch.nn.functional.normalize(rows, dim=1) if unit else rows,
        pv_offsets=torch.from_numpy(drawn.offsets),
        history_offsets=torch.tensor(np.cumsum([0, *map(len, past)])),
        attention=attention,
        **options,
        temperature=0.5,
        negatives="page",
        return_stats=True,
        impl="reference",
    )
    close = {"rtol": 0, "atol": 1e-6}
    np.testing.assert_allclose(scores[first], stats.positive_similarity[first].numpy(), **close)
    if attention == "candidate":
        over_page = np.logaddexp.reduceat(scores.astype(np.float64) / 0.5, first)
        np.testing.assert_allclose(over_page, stats.log_sum_exp[first].numpy(), **close)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"attention": "anchor"},
            ValueError,
            "attention: expected candidate or mean, got 'anchor'",
        ),
        (
            {"attention_temperature": 0.0},
            ValueError,
            "attention_temperature: expected a value above 0",
        ),
        ({"attention_scale": math.inf}, ValueError, "attention_scale: expected a finite value"),
        ({"attention_scale": "1"}, TypeError, "attention_scale: expected a float"),
        (
            {"attention_scale": 1.0, "attention_temperature": 1.0},
            ValueError,
            "at most one of the two",
        ),
        (
            {"attention": "mean", "attention_scale": 1.0},
            ValueError,
            "expected none with attention 'mean'",
        ),
        ({"unit": 1}, TypeError, "unit: expected True or False, got 1"),
    ],
)
def test_settings_of_a_reconstruction_are_checked(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Reconstruction(**settings)


def test_settings_of_another_score_are_refused(dataset: Dataset) -> None:
    rivals = [methods.random_order(dataset)]
    with pytest.raises(ValueError, match="reconstruction: expected none with score 'max'"):
        compare(dataset, rivals, score="max", reconstruction=Reconstruction())
    with pytest.raises(TypeError, match=r"reconstruction: expected a Reconstruction, got \{\}"):
        compare(dataset, rivals, score="reconstruction", reconstruction={})  # type: ignore[arg-type]


def test_equal_embeddings_tie(dataset: Dataset) -> None:
    rng = np.random.default_rng(1)
    table = rng.normal(size=(3, 129)).astype(np.float32)[rng.integers(0, 3, dataset.num_items)]
    drawn = sampled_candidates(dataset, find_targets(dataset), 30)
    how = Reconstruction(attention_temperature=0.1, unit=True)
    for score, settings in (
        ("mean", None),
        ("max", None),
        ("reconstruction", None),
        ("reconstruction", how),
    ):
        scores = history_scores(dataset, drawn, table, score=score, reconstruction=settings)
        for own in segments(scores, drawn.offsets):
            assert len(set(own)) <= 3


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (np.zeros((59, 4)), r"expected \[60, D\].*got \[59, 4\]"),
        (np.zeros(60), r"got \[60\]"),
        (np.zeros((60, 0)), r"got \[60, 0\]"),
        (np.full((60, 4), np.nan), "at least one finite row"),
    ],
)
def test_embeddings_must_fit_the_dataset(
    dataset: Dataset, tmp_path: Path, table: np.ndarray, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        compare(dataset, [Method("m", table)])
    np.save(tmp_path / "e.npy", table)
    with pytest.raises(ValueError, match=message):
        read_embeddings(tmp_path / "e.npy", dataset)


# ---- embeddings from files -----------------------------------------------------------------------


def write_parquet(
    path: Path, ids: list[str], rows: list[list[float] | None], size: int = -1
) -> None:
    kind = pa.list_(pa.float32(), size) if size > 0 else pa.list_(pa.float32())
    pq.write_table(pa.table({"item_id": ids, "embedding": pa.array(rows, kind)}), path)


@pytest.mark.parametrize("size", [-1, 2])
def test_parquet_is_matched_by_id_as_text(dataset: Dataset, tmp_path: Path, size: int) -> None:
    ids = ["000007", "000003", "7", "unknown", "000009"]
    write_parquet(tmp_path / "e.parquet", ids, [[1, 2], [3, 4], [5, 6], [7, 8], None], size)
    table = read_embeddings(tmp_path / "e.parquet", dataset)
    assert table.shape == (60, 2)
    assert table[7].tolist() == [1, 2] and table[3].tolist() == [3, 4]
    assert np.isnan(np.delete(table, [3, 7], 0)).all()


def test_parquet_with_an_id_twice_or_ragged_rows(dataset: Dataset, tmp_path: Path) -> None:
    write_parquet(tmp_path / "twice.parquet", ["000001", "000001"], [[1.0], [2.0]])
    with pytest.raises(ValueError, match="each item_id once"):
        read_embeddings(tmp_path / "twice.parquet", dataset)
    write_parquet(tmp_path / "ragged.parquet", ["000001", "000002"], [[1.0], [2.0, 3.0]])
    with pytest.raises(ValueError, match="rows of one length"):
        read_embeddings(tmp_path / "ragged.parquet", dataset)


def test_rows_of_npy_with_ids_beside_were_taken_in_the_order_of_the_items(
    dataset: Dataset, tmp_path: Path
) -> None:
    ids = dataset.item_ids.to_pylist()[::-1]
    np.save(tmp_path / "e.npy", np.arange(120, dtype=np.float32).reshape(60, 2))
    beside = tmp_path / "e.npy.json"
    beside.write_text(json.dumps({"item_ids": ids}))
    table = read_embeddings(tmp_path / "e.npy", dataset)
    assert table[59].tolist() == [0, 1] and table[0].tolist() == [118, 119]
    for wrong, said in (
        (
            ids[1:],
            r"expected \[59, D\] in .*e\.npy, a row for each of the item_ids in e\.npy\.json",
        ),
        (ids[:59] + ids[:1], "each item_id once"),
        ([f"x{i}" for i in ids], "got none that fits in .*e.npy"),
        (3, "expected a list as item_ids"),
    ):
        beside.write_text(json.dumps({"item_ids": wrong}))
        with pytest.raises(ValueError, match=said):
            read_embeddings(tmp_path / "e.npy", dataset)


def test_other_files(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected a .npy or .parquet file"):
        read_embeddings(tmp_path / "none.npy", dataset)
    (tmp_path / "e.csv").write_text("1")
    with pytest.raises(ValueError, match="expected a .npy or .parquet file"):
        read_embeddings(tmp_path / "e.csv", dataset)


# ---- the comparison ------------------------------------------------------------------------------


def oracle(data: Dataset) -> Dataset:
    """Every history is of item 0 alone, so that an embedding can know everything."""
    data.event_item = np.zeros_like(data.event_item)
    return data


def test_perfect_embeddings_hit_always(dataset: Dataset) -> None:
    targets = find_targets(dataset)
    clicked = np.unique(targets.item)
    data = oracle(Dataset(dataset.path))
    table = np.tile(np.array([[0.0, 1.0]], np.float32), (data.num_items, 1))
    table[np.append(clicked, 0)] = (1.0, 0.0)
    one_each = np.flatnonzero(~np.isin(np.arange(data.num_items), np.append(clicked, 0)))
    assert len(one_each)  # else there is nothing to beat
    # Only items that nobody clicks are negatives.
    data.item_clicks = np.isin(np.arange(data.num_items), one_each).astype(np.int64)
    result = compare(data, [Method("perfect", table)], candidates=["popular"], bootstrap=20)
    for metric in ("HR@1", "HR@5", "HR@10", "MRR", "AUC"):
        value = result["sets"]["popular"]["methods"]["perfect"][metric]
        assert value == {"mean": 1.0, "low": 1.0, "high": 1.0}


def test_random_embeddings_hit_by_chance(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d", users=200, items=3000, pages=4000, images=False)
    table = np.random.default_rng(0).normal(size=(3000, 64)).astype(np.float32)
    result = compare(
        data,
        [Method("noise", table), methods.random_order(data)],
        split="train",
        candidates=["sampled"],
        count=50,
        bootstrap=50,
    )
    sampled = result["sets"]["sampled"]
    # A history may hold the clicked item itself, which the factory does not exclude: with 3000
    # items that is rare.
    for k in (1, 5, 10):
        error = math.sqrt(k / 50 * (1 - k / 50) / sampled["pages"])
        assert abs(sampled["methods"]["noise"][f"HR@{k}"]["mean"] - k / 50) < 4 * error + 0.003
        assert sampled["methods"]["random"][f"HR@{k}"]["mean"] == pytest.approx(k / 50)
    assert sampled["methods"]["random"]["AUC"]["mean"] == 0.5
    assert sampled["methods"]["random"]["MRR"]["mean"] == pytest.approx(
        sum(1 / r for r in range(1, 51)) / 50
    )


def test_result_is_json_with_paired_differences(dataset: Dataset) -> None:
    rng = np.random.default_rng(0)
    good = rng.normal(size=(dataset.num_items, 8)).astype(np.float32)
    methods = [Method("a", good), Method("b", good), Method("c", rng.normal(size=good.shape))]
    result = compare(dataset, methods, candidates=["page", "sampled"], count=20, bootstrap=100)
    assert json.loads(json.dumps(result)) == result
    for one in result["sets"].values():
        assert one["methods"]["a"] == one["methods"]["b"]
        assert one["differences"]["b"]["MRR"] == {"mean": 0.0, "low": 0.0, "high": 0.0}
        a, c, gap = (one["methods"]["a"], one["methods"]["c"], one["differences"]["c"])
        assert gap["AUC"]["mean"] == pytest.approx(a["AUC"]["mean"] - c["AUC"]["mean"])
        assert gap["AUC"]["low"] <= gap["AUC"]["mean"] <= gap["AUC"]["high"]
        assert "a" not in one["differences"]
        assert 0 < one["users"] <= one["pages"] <= one["clicks"]


def test_comparison_is_the_mean_over_pages(dataset: Dataset) -> None:
    """Every number of "popularity" on the page, by a loop."""
    one = compare(dataset, [methods.popularity(dataset)], candidates=["page"], bootstrap=2)
    one = one["sets"]["page"]
    by_page = []
    for page in dataset.split("test"):
        rows = slice(dataset.pv_start[page], dataset.pv_end[page])
        clicks = dataset.item_clicks[dataset.pv_item[rows]]
        clicked = dataset.pv_clicked[rows]
        if clicked.all():
            continue
        pairs = [(a > b) + 0.5 * (a == b) for a in clicks[clicked] for b in clicks[~clicked]]
        by_page.append(np.mean(pairs))
    assert one["pages"] == len(by_page)
    assert one["methods"]["popularity"]["AUC"]["mean"] == pytest.approx(np.mean(by_page))


def test_popularity_knows_the_train_split_alone(dataset: Dataset) -> None:
    train = dataset.split("train")
    rows = slice(dataset.pv_start[train.start], dataset.pv_end[train.stop - 1])
    clicks = np.bincount(
        dataset.pv_item[rows][dataset.pv_clicked[rows]], minlength=dataset.num_items
    )
    scores = methods.popularity(dataset).scores
    assert scores is not None and (scores == clicks).all()
    assert clicks.sum() < dataset.pv_clicked.sum()


def test_items_without_an_embedding_are_reported_and_come_last(dataset: Dataset) -> None:
    table = np.random.default_rng(0).normal(size=(dataset.num_items, 4)).astype(np.float32)
    gone = np.unique(find_targets(dataset).item)[::2]
    table[gone] = np.nan
    result = compare(dataset, [Method("m", table)], candidates=["sampled"], count=20, bootstrap=2)
    assert result["missing"] == {"m": len(gone)}
    targets = find_targets(dataset)
    past = [
        table[dataset.event_item[a:b]]
        for a, b in zip(targets.history_start, targets.history_end, strict=True)
    ]
    lost = [i in gone or np.isnan(p).any(1).all() for i, p in zip(targets.item, past, strict=True)]
    assert result["sets"]["sampled"]["unranked"]["m"] == sum(lost)


def test_standardised_columns() -> None:
    rng = np.random.default_rng(0)
    table = rng.normal(5, [1, 20, 0.01, 0], (50, 4)).astype(np.float32)
    table[7] = np.nan
    found = methods.standardised(Method("m", table)).embeddings
    assert found is not None and np.isnan(found[7]).all()
    rest = np.delete(found, 7, 0)
    np.testing.assert_allclose(rest.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(rest.std(0), [1, 1, 1, 0], atol=1e-3)
    with pytest.raises(ValueError, match="expected embeddings, got scores"):
        methods.standardised(Method("p", scores=np.zeros(3)))


def test_pixels_are_the_small_picture(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d", items=12, pages=30)
    method = methods.pixels(data)
    assert method.embeddings is not None and method.embeddings.shape == (12, 192)
    assert method.embeddings.min() >= 0 and method.embeddings.max() <= 1
    assert np.ptp(method.embeddings, 0).max() > 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "dev"}, "split: expected one of"),
        ({"candidates": ["pages"]}, "candidates: expected some of page, sampled, popular"),
        ({"candidates": []}, "candidates: expected"),
        ({"score": "median"}, "score: expected one of mean, max, reconstruction"),
        ({"k": [0]}, "k: expected numbers of at least 1"),
        ({"count": 1}, "count: expected at least 2"),
        ({"history": 0}, "history: expected at least 1"),
        ({"bootstrap": 0}, "samples: expected at least 1"),
    ],
)
def test_comparison_refuses(dataset: Dataset, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare(dataset, [methods.random_order(dataset)], **options)


def test_methods_must_differ_and_be_one_thing(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match="different names"):
        compare(dataset, [methods.random_order(dataset)] * 2)
    with pytest.raises(ValueError, match=r"expected scores \[60\].*got \[5\]"):
        compare(dataset, [Method("m", scores=np.zeros(5))])
    with pytest.raises(ValueError, match="either embeddings or scores"):
        Method("m")
