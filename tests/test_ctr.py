"""Impressions, features and models of the CTR comparison: against loops, against the published
layers, and what must not leak."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ctr_factory import make_world, write_world
from dataset_factory import columns_of, make_dataset, rewrite
from torch import nn
from torch.nn import functional

from courier_fast.ctr import Impressions, features, make_protocol
from courier_fast.ctr.fit import Settings, fit, predict
from courier_fast.ctr.impressions import check_dataset, id_codes
from courier_fast.ctr.inputs import Inputs, Material, Split
from courier_fast.ctr.models import DIN, DCNv2, Dice, ImpressionBatch, ItemTables, make_model
from courier_fast.data.dataset import Dataset
from courier_fast.metrics.clicks import auc


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("shop") / "d", pages=300, images=False)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, np.ndarray]:
    path = tmp_path_factory.mktemp("world") / "d"
    return make_world(path, style_decides=True, users=60, items=120, pages=800)


# ---- impressions ---------------------------------------------------------------------------------


def test_impressions_are_the_pages_items_with_the_newest_history(dataset: Dataset) -> None:
    d, x = dataset, Impressions(dataset, "validation", history=3)
    at = 0
    for page in d.split("validation"):
        for row in range(d.pv_start[page], d.pv_end[page]):
            assert (x.page[at], x.user[at], x.time[at]) == (
                page,
                d.page_user[page],
                d.page_time[page],
            )
            assert (x.item[at], x.clicked[at]) == (d.pv_item[row], d.pv_clicked[row])
            assert x.history_length[at] == min(3, d.history_end[page] - d.history_start[page])
            at += 1
    assert at == len(x) == x.offsets[-1]


def test_hour_and_weekday_are_those_of_utc(dataset: Dataset) -> None:
    x = Impressions(dataset, "test")
    when = x.time.astype("datetime64[s]").tolist()
    assert x.hour.tolist() == [t.hour for t in when]
    assert x.weekday.tolist() == [t.weekday() for t in when]


def test_popularity_counts_what_was_strictly_before(dataset: Dataset) -> None:
    d, x = dataset, Impressions(dataset, "test")
    for item, time, found in zip(x.item, x.time, np.expm1(x.popularity()), strict=True):
        at = d.event_time[d.event_item == item]
        before = at < time
        expected = [before.sum(), (before & (at >= time - 30 * 86_400)).sum()]
        np.testing.assert_allclose(found, expected, atol=1e-4)


def test_protocols_divide_the_pages_by_time(world: tuple[Dataset, Any]) -> None:
    d, _ = world
    p = make_protocol(d, "disjoint", 0.5)
    assert (p.encoder, p.train) == (range(400), range(400, 640))
    assert p.bound == d.page_time[400]
    shared = make_protocol(d, "shared")
    assert shared.encoder == shared.train == range(640)
    known = p.known_items(d)
    shown = np.unique(d.pv_item[: d.pv_end[399]])
    assert set(np.flatnonzero(known)) == set(shown)
    for share in (0.0, 0.8, 1.0):
        with pytest.raises(ValueError, match=f"encoder_share: expected .* got {share}"):
            make_protocol(d, "disjoint", share)
    with pytest.raises(ValueError, match="protocol: expected one of disjoint, shared, warm, got"):
        make_protocol(d, "both")


def test_the_bound_divides_no_moment(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    time = np.repeat(np.arange(20), 10) * 86_400 + 1_700_000_000
    item = np.stack([rng.permutation(9)[:3] for _ in time])
    clicked = np.tile([True, False, False], (200, 1))
    write_world(tmp_path / "d", np.arange(200) % 7, time, item, clicked, 9)
    p = make_protocol(Dataset(tmp_path / "d"), "disjoint", 0.53)
    assert p.encoder == range(100)


def _broken(tmp_path: Path, what: str) -> Dataset:
    make_world(tmp_path / "d", style_decides=True, users=20, items=50, pages=100)
    dataset = Dataset(tmp_path / "d")
    pages, shown, items = (columns_of(dataset, n) for n in ("pages", "page_items", "items"))
    if what == "labels":
        shown["clicked"][80 * 6 : 90 * 6] = 0
    elif what == "users":
        pages["user"][90:] = 3
    elif what == "categories":
        import pyarrow as pa

        items["category"] = pa.nulls(50, pa.string())
    elif what == "pages":
        dataset.info["splits"]["test"] = [100, 100]
    elif what == "history":
        pages["history_start"][:] = pages["history_end"]
    elif what == "order":
        pages["time"][80] = pages["time"][79]
    elif what == "future":  # the page's own click in its history
        page = int(np.flatnonzero(shown["clicked"].reshape(-1, 6).any(1))[50])
        pages["history_end"][page] += 1
    return rewrite(
        dataset, tmp_path / "broken", {"pages": pages, "page_items": shown, "items": items}
    )


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "labels",
            "labels: expected clicked and not clicked items in 'validation' .* 0 clicks on 60",
        ),
        ("users", "users: expected at least 2 in 'test' .*, got 1"),
        ("categories", "categories: expected some in .*, got none"),
        ("pages", "split: expected pages in 'test' of .*, got none"),
        ("history", "history: expected a page with one in .*, got none"),
        ("order", "split: expected 'train' to end before 'validation' begins"),
        ("future", "history: expected events strictly before .* 1 pages that look into the future"),
    ],
)
def test_what_cannot_be_compared_is_named(tmp_path: Path, what: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_dataset(_broken(tmp_path, what))


def test_rare_ids_share_a_row() -> None:
    assert id_codes(np.array([3, 3, 1, 4, 4, 4]), 6, 2).tolist() == [0, 0, 0, 1, 2, 0]


# ---- features ------------------------------------------------------------------------------------


def _similarities_by_loop(table: np.ndarray, item: int, history: list[int]) -> list[float]:
    def unit(row: int) -> np.ndarray:
        return table[row].astype(np.float64) / np.linalg.norm(table[row].astype(np.float64))

    past = [unit(h) for h in history if np.isfinite(table[h]).all()]
    if not past or not np.isfinite(table[item]).all():
        return [0.0] * 26
    cosines = np.array([unit(item) @ h for h in past])
    weights = 0.8 ** np.arange(len(past))[::-1]
    rebuilt = np.exp(cosines) @ np.stack(past)
    bins = np.clip(((cosines + 1) * 10).astype(int), 0, 19)
    return [
        cosines.max(),
        cosines.mean(),
        np.sort(cosines)[-3:].mean(),
        (weights * cosines).sum() / weights.sum(),
        rebuilt @ unit(item) / np.linalg.norm(rebuilt),
        math.log1p(len(past)),
        *np.log1p(np.bincount(bins, minlength=20)),
    ]


def test_similarities_equal_a_loop(dataset: Dataset) -> None:
    d, x = dataset, Impressions(dataset, "test", history=4)
    table = np.random.default_rng(0).normal(size=(d.num_items, 5)).astype(np.float32)
    table[::7] = np.nan
    found = features.similarity_features(table, x)
    assert found.shape == (len(x), len(features.SIMILARITY))
    for i, item in enumerate(x.item):
        page = x.page[i] - x.pages.start
        history = d.event_item[x.history_start[page] : x.history_end[page]].tolist()
        expected = _similarities_by_loop(table, item, history)
        if np.isnan(table[item]).any():
            assert not found[i].any()
        else:
            np.testing.assert_allclose(found[i], expected, rtol=2e-5, atol=2e-6)
    np.testing.assert_array_equal(found, features.similarity_features(table, x, block=1))


def test_vectors_keep_their_directions() -> None:
    table = 3 + 5 * np.random.default_rng(0).normal(size=(40, 6))
    table[3] = np.nan
    known = np.arange(40) < 30
    found = features.vector_features(table, known)
    rest = known & (np.arange(40) != 3)
    assert np.square(found[rest]).mean() == pytest.approx(1)
    np.testing.assert_allclose(found[rest].mean(0), 0, atol=1e-6)
    assert not found[3].any()
    centred = table - table[rest].mean(0)
    np.testing.assert_allclose(found[35] / found[36], centred[35] / centred[36], rtol=1e-4)


def test_clusters_are_of_known_items_and_the_same_again(dataset: Dataset) -> None:
    rng = np.random.default_rng(0)
    centre = np.eye(4, 8)
    of = rng.integers(0, 4, dataset.num_items)
    table = (centre[of] + 0.05 * rng.normal(size=(dataset.num_items, 8))).astype(np.float32)
    table[5] = np.nan
    known = rng.random(dataset.num_items) < 0.8
    found = features.cluster_features(table, known, clusters=(4, 4096))
    have = np.isfinite(table).all(1)
    assert (found[~have] == -1).all() and (found[have] >= 0).all()
    assert found[:, 1].max() < (known & have).sum()  # no more clusters than items
    pairs = (found[have, 0][:, None] == found[have, 0]) == (of[have][:, None] == of[have])
    assert pairs.all()
    np.testing.assert_array_equal(
        found, features.cluster_features(table, known, clusters=(4, 4096))
    )
    # What is not known moves no centroid.
    other = table.copy()
    other[~known] = rng.normal(size=((~known).sum(), 8))
    again = features.cluster_features(other, known, clusters=(4, 4096))
    np.testing.assert_array_equal(found[known], again[known])

    x = Impressions(dataset, "test", history=4)
    same = features.same_cluster(found, x)
    for i, item in enumerate(x.item):
        page = x.page[i] - x.pages.start
        history = dataset.event_item[x.history_start[page] : x.history_end[page]]
        expected = (found[history] == found[item]).sum(0) * have[item]
        np.testing.assert_allclose(np.expm1(same[i]), expected, atol=1e-5)


def test_codes_are_the_nearest_of_what_is_left() -> None:
    rng = np.random.default_rng(2)
    table = (3 * rng.normal(size=(300, 8))).astype(np.float32)
    table[7] = np.nan
    known = rng.random(300) < 0.7
    have = np.isfinite(table).all(1)
    found = features.code_features(table, known, levels=3, codes=16)
    np.testing.assert_array_equal(found, features.code_features(table, known, levels=3, codes=16))
    assert (found[7] == -1).all() and (found[have] >= 0).all() and found.max() == 15
    books = features.codebooks_of(table, known, 3, 16)
    left = table[have] / np.linalg.norm(table[have], axis=1, keepdims=True)
    errors = [1.0]
    for level, book in enumerate(books):
        distance = np.square(left[:, None] - book).sum(2)
        chosen = distance[np.arange(len(left)), found[have, level]]
        np.testing.assert_allclose(chosen, distance.min(1), atol=1e-5)
        left = left - book[found[have, level]]
        errors.append(float(np.square(left).sum(1).mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]
    # What is not known moves no codebook.
    other = table.copy()
    other[~known] = rng.normal(size=((~known).sum(), 8))
    np.testing.assert_array_equal(books, features.codebooks_of(other, known, 3, 16))
    few = features.codebooks_of(table[:5], None, 2, 16)
    assert few.shape == (2, 5, 8)
    for levels, codes, message in ((0, 4, "levels: expected at least 1"), (1, 0, "codes: exp")):
        with pytest.raises(ValueError, match=message):
            features.code_features(table, levels=levels, codes=codes)


def test_prefixes_are_numbers_of_what_codes_begin_with() -> None:
    codes = np.array(
        [[3, 1, 0], [0, 5, 5], [3, 1, 2], [-1, -1, -1], [3, 0, 0], [0, 5, 5], [9, 9, 9]]
    )
    found = features.code_prefixes(codes)
    have = codes[:, 0] >= 0
    assert (found[~have] == -1).all()
    for level in range(3):
        begins = [tuple(x) for x in codes[have, : level + 1]]
        numbers = found[have, level]
        assert dict(zip(begins, numbers, strict=True)) == {
            x: i for i, x in enumerate(sorted(set(begins)))
        }
        assert [numbers[begins.index(x)] for x in begins] == numbers.tolist()
    known = np.array([True] * 3 + [True, False, True, False])
    seen = features.code_prefixes(codes, known)
    assert seen[:, 0].tolist() == [1, 0, 1, -1, 1, 0, -1]
    assert seen[:, 1].tolist() == [1, 0, 1, -1, -1, 0, -1]  # 3, 0 is the beginning of none
    assert seen[:, 2].tolist() == [1, 0, 2, -1, -1, 0, -1]


def test_the_form_code_is_an_id_for_each_level_and_prefix(
    world: tuple[Dataset, np.ndarray],
) -> None:
    d, style = world
    protocol = make_protocol(d)
    known = protocol.known_items(d)
    inputs = Material(d, protocol).inputs("code", style)
    plain = Material(d, protocol).inputs("none")
    codes = features.code_features(style, known)
    seen = features.code_prefixes(codes, known)
    expected = np.concatenate([codes, seen[:, 1:]], 1) + 1
    found = inputs.tables.codes.numpy()[:, plain.tables.codes.shape[1] :]
    np.testing.assert_array_equal(found, expected)
    assert (inputs.tables.codes.numpy() < np.array(inputs.tables.sizes)).all()
    assert len(inputs.tables.sizes) == plain.tables.codes.shape[1] + 5
    assert inputs.dense == plain.dense + 3
    same = features.same_cluster(features.code_prefixes(codes), inputs.splits["train"].shown)
    own = inputs.splits["train"].dense[:, -3:].numpy()
    for level in range(3):  # as they are, but for mean, scale and outliers
        if same[:, level].std() > 0:
            assert np.corrcoef(own[:, level], same[:, level])[0, 1] > 0.9


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: features.vector_features(np.zeros(3)),
            r"embeddings: expected \[items, D\], got \[3\]",
        ),
        (lambda: features.vector_features(np.full((3, 2), np.nan)), "at least one finite row"),
        (
            lambda: features.vector_features(np.zeros((3, 2)), np.ones(2, bool)),
            r"known: expected \[3\]",
        ),
        (
            lambda: features.cluster_features(np.ones((3, 2)), clusters=(0,)),
            "clusters: expected numbers",
        ),
        (lambda: features.check_form("pixels"), "form: expected one of none, .* got 'pixels'"),
    ],
)
def test_wrong_features_are_named(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# ---- models --------------------------------------------------------------------------------------


def make_batch(lengths: list[int], items: int = 12, seed: int = 0) -> ImpressionBatch:
    """Impressions with histories of these lengths."""
    rng = np.random.default_rng(seed)
    n, pairs = len(lengths), sum(lengths)
    counts = torch.tensor(lengths)
    return ImpressionBatch(
        items=torch.arange(items),
        item=torch.from_numpy(rng.integers(0, items, n)),
        user=torch.from_numpy(rng.integers(0, 5, n)),
        hour=torch.from_numpy(rng.integers(0, 24, n)),
        weekday=torch.from_numpy(rng.integers(0, 7, n)),
        dense=torch.from_numpy(rng.normal(size=(n, 3)).astype(np.float32)),
        clicked=torch.from_numpy(rng.integers(0, 2, n).astype(np.float32)),
        pair_impression=torch.repeat_interleave(torch.arange(n), counts),
        pair_item=torch.from_numpy(rng.integers(0, items, pairs)),
        offsets=counts.cumsum(0) - counts,
    )


def tables(items: int = 12, dim: int = 4) -> ItemTables:
    rng = np.random.default_rng(1)
    codes = torch.from_numpy(np.stack([np.arange(items), np.arange(items) % 3], 1))
    return ItemTables(
        codes, (items, 3), torch.from_numpy(rng.normal(size=(items, dim)).astype(np.float32))
    )


def _din_by_loop(model: DIN, batch: ImpressionBatch) -> torch.Tensor:
    """DIN as it is written down, an impression at a time, without Dice's batch statistics
    (eval)."""
    rows, target, rest = model._inputs(batch)
    logits = []
    for i in range(len(target)):
        interest = torch.zeros_like(target[0])
        for item in batch.pair_item[batch.pair_impression == i]:
            t, h = target[i], rows[item]
            x = model.unit(torch.cat([t, h, t - h, t * h]))[None]
            interest = interest + model.weight(model.unit_dice(x))[0] * h
        x = torch.cat([target[i], interest, rest[i]])[None]
        logits.append(model.logit(model.top(x))[0])
    return torch.cat(logits)


def _scrambled(model: nn.Module) -> nn.Module:
    """Weights, alphas and running statistics away from their beginnings."""
    generator = torch.Generator().manual_seed(0)
    for name, x in model.state_dict().items():
        if x.is_floating_point() and "tables" not in name:
            x.copy_(torch.randn(x.shape, generator=generator) * 0.3)
            if "running_var" in name:
                x.abs_().add_(0.5)
    return model


def test_din_is_the_published_one() -> None:
    model = _scrambled(make_model("din", tables(), 5, 3)).eval()
    batch = make_batch([3, 0, 1, 7, 2])
    assert isinstance(model, DIN)
    torch.testing.assert_close(model(batch), _din_by_loop(model, batch), rtol=1e-4, atol=1e-4)


def test_dcnv2_is_the_published_one() -> None:
    model = _scrambled(make_model("dcnv2", tables(), 5, 3)).eval()
    batch = make_batch([3, 0, 1, 7, 2])
    assert isinstance(model, DCNv2)
    rows, target, rest = model._inputs(batch)
    histories = [rows[batch.pair_item[batch.pair_impression == i]] for i in range(5)]
    mean = torch.stack([h.mean(0) if len(h) else torch.zeros(h.shape[1]) for h in histories])
    x0 = x = torch.cat([target, mean, rest], 1)
    for layer in model.cross:
        x = x0 * (x @ layer.weight.T + layer.bias) + x
    expected = model.logit(torch.cat([x, model.deep(x0)], 1)).squeeze(1)
    torch.testing.assert_close(model(batch), expected, rtol=1e-4, atol=1e-4)


def test_dice_normalises_over_the_batch() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)) * 3 + 1
    dice = Dice(4)
    nn.init.constant_(dice.alpha, 0.25)
    p = torch.sigmoid((x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-8).sqrt())
    torch.testing.assert_close(dice(x), p * x + (1 - p) * 0.25 * x)
    double = Dice(4).double().eval()
    assert torch.autograd.gradcheck(double, x[:5].double().requires_grad_())


@pytest.mark.parametrize("lengths", [[0, 0], [1], [0, 1]])
@pytest.mark.parametrize("name", ["din", "dcnv2"])
def test_batches_of_hardly_anything(name: str, lengths: list[int]) -> None:
    model, batch = make_model(name, tables(), 5, 3), make_batch(lengths)
    loss = functional.binary_cross_entropy_with_logits(model(batch), batch.clicked)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_models_have_names() -> None:
    with pytest.raises(ValueError, match="model: expected one of din, dcnv2, got 'deepfm'"):
        make_model("deepfm", tables(), 5, 3)


# ---- one cell ------------------------------------------------------------------------------------

QUICK = Settings(batch=256, epochs=2, lr=3e-3)


def test_a_batch_is_its_pages(world: tuple[Dataset, np.ndarray]) -> None:
    d, _ = world
    inputs = Material(d, make_protocol(d), history=4).inputs("none")
    split = inputs.splits["train"]
    pages = np.array([2, 5, 11])
    batch, x = split.batch(pages), split.shown
    rows = np.concatenate([np.arange(x.offsets[p], x.offsets[p + 1]) for p in pages])
    assert batch.items[batch.item].tolist() == x.item[rows].tolist()
    assert batch.clicked.bool().tolist() == x.clicked[rows].tolist()
    torch.testing.assert_close(batch.dense, split.dense[rows], rtol=0, atol=0)
    ends = [*batch.offsets.tolist()[1:], len(batch.pair_item)]
    for i, (row, first, end) in enumerate(zip(rows, batch.offsets.tolist(), ends, strict=True)):
        page = x.page[row] - x.pages.start
        history = d.event_item[x.history_start[page] : x.history_end[page]]
        assert batch.items[batch.pair_item[first:end]].tolist() == history.tolist()
        assert (batch.pair_impression[first:end] == i).all()


@pytest.mark.parametrize("name", ["din", "dcnv2"])
def test_the_same_seed_gives_the_same_bits(name: str, world: tuple[Dataset, np.ndarray]) -> None:
    d, style = world
    inputs = Material(d, make_protocol(d)).inputs("all", style)
    one, two = (fit(name, inputs, QUICK, seed=3) for _ in range(2))
    other = fit(name, inputs, QUICK, seed=4)
    for part in ("validation", "test"):
        np.testing.assert_array_equal(one.predictions[part], two.predictions[part])
        assert (one.predictions[part] != other.predictions[part]).any()
    assert one.losses == two.losses


def test_it_keeps_the_weights_of_the_best_look(world: tuple[Dataset, np.ndarray]) -> None:
    d, _ = world
    inputs = Material(d, make_protocol(d)).inputs("none")
    found = fit("din", inputs, replace(QUICK, lr=0.03, epochs=6))
    p = found.predictions["validation"].astype(np.float64)
    clicked = inputs.splits["validation"].shown.clicked
    assert -np.log(np.where(clicked, p, 1 - p)).mean() == pytest.approx(min(found.losses))
    assert len(found.losses) < 12  # stopped
    assert found.losses[-1] > min(found.losses)
    blocks = predict(found.model, inputs.splits["validation"], impressions=50)  # however it is cut
    np.testing.assert_allclose(blocks, p, rtol=1e-5)


def test_nothing_after_the_validation_bound_is_trained_on(
    tmp_path: Path, world: tuple[Dataset, np.ndarray]
) -> None:
    """Items, labels and users of everything at or after the bound permuted: the weights after fixed
    steps are the same bits."""
    d, style = world
    rng = np.random.default_rng(0)
    first = d.split("validation").start
    item, clicked = (x.reshape(-1, 6).copy() for x in (d.pv_item, d.pv_clicked))
    item[first:] = rng.permuted(np.tile(np.arange(d.num_items), (len(item) - first, 1)), axis=1)[
        :, :6
    ]
    clicked[first:] = rng.permuted(clicked[first:].ravel()).reshape(-1, 6)
    user = d.page_user.copy()
    user[first:] = rng.permuted(user[first:])
    write_world(tmp_path / "d", user, d.page_time, item, clicked, d.num_items)
    trained = []
    for one in (d, Dataset(tmp_path / "d")):
        inputs = Material(one, make_protocol(one)).inputs("all", style)
        found = fit("din", inputs, replace(QUICK, epochs=1, looks=1))  # one look: nothing to choose
        trained.append(found.model.state_dict())
    for name, x in trained[0].items():
        assert torch.equal(x, trained[1][name]), name


def _with_dense(inputs: Inputs, column: Any) -> Inputs:
    splits = {
        name: Split(s.shown, s.user, s.hour, s.weekday, torch.cat([s.dense, column(s)[:, None]], 1))
        for name, s in inputs.splits.items()
    }
    return replace(inputs, splits=splits)


def test_a_column_that_knows_the_label_is_learnt(world: tuple[Dataset, np.ndarray]) -> None:
    d, _ = world
    inputs = Material(d, make_protocol(d)).inputs("none")
    planted = _with_dense(inputs, lambda s: torch.from_numpy(s.shown.clicked.astype(np.float32)))
    found = fit("din", planted, Settings(batch=64, epochs=4, lr=1e-2))
    p, clicked = found.predictions["test"], planted.splits["test"].shown.clicked
    assert (p[clicked][:, None] > p[~clicked]).mean() > 0.99


def test_training_on_later_pages_would_show(tmp_path: Path) -> None:
    """Where every week has its own items and their quality alone decides, a model that was trained
    on test's pages, too, is better there: what the test of permuted pages guards against is worth a
    lot of AUC, and would be seen."""
    rng = np.random.default_rng(0)
    pages, shown = 1500, 6
    item = (
        np.arange(pages)[:, None] // 150 * 30
        + rng.permuted(np.tile(np.arange(30), (pages, 1)), axis=1)[:, :shown]
    )
    quality = 2 * rng.normal(size=300)
    clicked = rng.random(item.shape) < 1 / (1 + np.exp(1.5 - quality[item]))
    time = 1_700_000_000 + np.arange(pages) * 3600
    write_world(tmp_path / "d", rng.integers(0, 60, pages), time, item, clicked, 300)
    d = Dataset(tmp_path / "d")
    honest = make_protocol(d, "shared")
    found = []
    for protocol in (honest, replace(honest, train=range(d.num_pages))):
        inputs = Material(d, protocol).inputs("none")
        fitted = fit("din", inputs, replace(QUICK, epochs=3))
        found.append(auc(inputs.splits["test"].shown.clicked, fitted.predictions["test"]))
    assert found[1] > found[0] + 0.1, found
