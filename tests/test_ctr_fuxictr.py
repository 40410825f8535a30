"""The CTR models' layers against FuxiCTR's with the same weights, and FuxiCTR reading what
`--export` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from ctr_factory import make_world
from torch import nn

from courier_fast.ctr import Impressions, features, make_protocol
from courier_fast.ctr.export import export_impressions
from courier_fast.ctr.models import DIN, DCNv2, Dice, ImpressionBatch, ItemTables, make_model
from courier_fast.data.dataset import Dataset

pytest.importorskip("fuxictr", reason="FuxiCTR is not installed: the extra test-all brings it")
from fuxictr.features import FeatureMap
from fuxictr.preprocess import FeatureProcessor
from fuxictr.pytorch import layers
from fuxictr.pytorch.layers import FeatureEmbedding
from fuxictr.utils import load_dataset_config

pytestmark = pytest.mark.long("FuxiCTR")
HISTORY = 5


def full_batch(n: int = 40, items: int = 30) -> ImpressionBatch:
    """Histories all of `HISTORY` items: no layer has padding to differ in."""
    rng = np.random.default_rng(0)
    codes = {name: torch.from_numpy(rng.integers(0, 5, n)) for name in ("user", "hour", "weekday")}
    return ImpressionBatch(
        items=torch.arange(items),
        item=torch.from_numpy(rng.integers(0, items, n)),
        dense=torch.from_numpy(rng.normal(size=(n, 3)).astype(np.float32)),
        clicked=torch.zeros(n),
        pair_impression=torch.arange(n).repeat_interleave(HISTORY),
        pair_item=torch.from_numpy(rng.integers(0, items, n * HISTORY)),
        offsets=torch.arange(n) * HISTORY,
        **codes,
    )


def tables(items: int = 30) -> ItemTables:
    rng = np.random.default_rng(1)
    codes = torch.from_numpy(np.stack([np.arange(items), np.arange(items) % 3], 1))
    vectors = torch.from_numpy(rng.normal(size=(items, 4)).astype(np.float32))
    return ItemTables(codes, (items, 3), vectors)


def scrambled(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for x in model.parameters():
        x.data.copy_(torch.randn(x.shape, generator=generator) * 0.3)
    return model


@pytest.mark.parametrize("training", [True, False])
def test_dice_is_fuxictrs(training: bool) -> None:
    mine, theirs = Dice(7), layers.Dice(7)
    theirs.bn.eps = mine.norm.eps
    alpha = torch.linspace(-1, 1, 7)
    for x in (mine, theirs):
        x.alpha.data.copy_(alpha)
        x.train(training)
    rows = 3 * torch.randn(50, 7, generator=torch.Generator().manual_seed(1)) + 1
    torch.testing.assert_close(mine(rows), theirs(rows), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_the_attention_of_din_is_fuxictrs(training: bool) -> None:
    batch, model = full_batch(), scrambled(make_model("din", tables(), 5, 3))
    assert isinstance(model, DIN)
    theirs = layers.DIN_Attention(model.items.dim, [64], "Dice")
    linear, dice, last = theirs.attention_layer.mlp
    linear.load_state_dict(model.unit.state_dict())
    last.load_state_dict(model.weight.state_dict())
    dice.alpha.data.copy_(model.unit_dice.alpha)
    dice.bn.eps = model.unit_dice.norm.eps
    for x in (model, theirs):
        x.train(training)
    rows = model.items(batch.items)
    target, history = rows[batch.item], rows[batch.pair_item].reshape(len(batch.item), HISTORY, -1)
    expected = theirs(target, history)
    found = model.interest(rows, target, batch)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


def test_the_cross_layers_of_dcnv2_are_fuxictrs() -> None:
    batch, model = full_batch(), scrambled(make_model("dcnv2", tables(), 5, 3))
    assert isinstance(model, DCNv2)
    theirs = layers.CrossNetV2(model.cross[0].in_features, len(model.cross))
    theirs.cross_layers.load_state_dict(model.cross.state_dict())
    rows, target, rest = model._inputs(batch)
    mean = rows[batch.pair_item].reshape(len(batch.item), HISTORY, -1).mean(1)
    first = torch.cat([target, mean, rest], 1)
    expected = model.logit(torch.cat([theirs(first), model.deep(first)], 1)).squeeze(1)
    torch.testing.assert_close(
        model(batch), expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item()
    )


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, np.ndarray, Path]:
    path = tmp_path_factory.mktemp("fuxictr")
    d, style = make_world(path / "d", style_decides=True, users=60, items=120, pages=800)
    export_impressions(d, make_protocol(d), {"style": style}, path / "x", history=HISTORY)
    return d, style, path / "x"


@pytest.mark.parametrize(
    "form", ["none", "vector_style", "similarity_style", "cluster_style", "code_style"]
)
def test_fuxictr_reads_the_export(
    exported: tuple[Dataset, np.ndarray, Path], monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    d, style, folder = exported
    monkeypatch.chdir(folder)  # the configuration's paths are relative
    about = load_dataset_config(".", form)
    processor = FeatureProcessor(
        dataset_id=form, **{k: x for k, x in about.items() if k != "dataset_id"}
    )
    read = [
        processor.preprocess(processor.read_data(about[f"{s}_data"], data_format="parquet"))
        for s in ("train", "valid", "test")
    ]
    processor.fit(read[0], meta_ddf=pl.concat([x.select("page") for x in read]), min_categr_count=2)
    rows = read[2].collect()
    found = processor.transform({name: x.to_numpy() for name, x in rows.to_dict().items()})

    x = Impressions(d, "test", history=HISTORY)
    assert list(found["clicked"]) == x.clicked.tolist()
    columns = {c["name"] for c in about["feature_cols"]}
    assert set(processor.feature_map.features) == columns == set(rows.columns) - {"clicked"}
    vocabulary = json.loads((folder / form / "feature_vocab.json").read_text())["item_id"]
    ids = d.item_ids.to_pylist()
    assert list(found["item_id"]) == [vocabulary.get(ids[i], vocabulary["__OOV__"]) for i in x.item]
    for row in (0, len(x) - 1):
        page = x.page[row] - x.pages.start
        history = d.event_item[x.history_start[page] : x.history_end[page]]
        codes = [vocabulary.get(ids[i], vocabulary["__OOV__"]) for i in history]
        assert list(found["history"][row]) == codes + [0] * (HISTORY - len(codes))
    if form != "vector_style":
        return
    features_of = FeatureMap(form, str(folder / form))
    features_of.load(str(folder / form / "feature_map.json"), {})
    embedding = FeatureEmbedding(features_of, 8)
    tables = [m for m in embedding.modules() if hasattr(m, "pretrain_embedding")]
    vectors = features.vector_features(style, make_protocol(d).known_items(d))
    weight = tables[0].pretrain_embedding.weight.detach().numpy()
    np.testing.assert_array_equal(weight[[vocabulary[i] for i in ids]], vectors)
