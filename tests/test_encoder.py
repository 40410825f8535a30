"""Encoders: their files, their backbones, projections of precomputed embeddings."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from dataset_factory import make_dataset

from courier_fast.train.build import read_features
from courier_fast.train.encoder import build_encoder, build_projection, load_encoder, save_encoder


def test_encoder_files(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("small_conv", 7, 40).to(memory_format=torch.channels_last).eval()
    save_encoder(encoder, tmp_path)
    again = load_encoder(tmp_path)
    images = torch.randn(3, 3, 40, 40)
    assert torch.equal(again(images), encoder(images))
    assert (again.size, again.dim) == (40, 7)
    with pytest.raises(FileNotFoundError, match="encoder.json"):
        load_encoder(tmp_path / "nothing")


def test_timm_backbones(tmp_path: Path) -> None:
    encoder = build_encoder("test_convnext", 5, 64)
    assert encoder(torch.zeros(2, 3, 64, 64)).shape == (2, 5)
    save_encoder(encoder, tmp_path)
    assert load_encoder(tmp_path).about["backbone"] == "test_convnext"
    vit = build_encoder("test_vit", 5, 96)  # made for 160: the size is passed on
    assert vit(torch.zeros(2, 3, 96, 96)).shape == (2, 5)
    with pytest.raises(
        ValueError,
        match=r"model\.backbone: expected small_conv or a model of timm.*, got 'resnet5000'",
    ):
        build_encoder("resnet5000", 5, 64)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    save_encoder(build_encoder("small_conv", 7, 40), tmp_path)
    with pytest.raises(
        ValueError,
        match=r"model\.weights: expected the parameters of small_conv, got a file without",
    ):
        build_encoder("small_conv", 7, 40, weights=tmp_path / "encoder.safetensors")


def test_projection_standardises_its_features() -> None:
    table = torch.randn(100, 4) * torch.tensor([1.0, 10.0, 100.0, 0.0]) + 5
    table[3] = math.nan  # an item without an image
    encoder = build_projection(4, 2, table)
    rows = encoder.backbone(table[4:])
    assert rows[:, :3].std(0, correction=0) == pytest.approx(1, rel=0.2)
    assert (rows[:, 3] == 0).all()  # constant: no information, and no division by zero


def test_features_by_id_or_by_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    dataset = make_dataset(tmp_path / "dataset", pages=120, seed=1)
    table = np.random.default_rng(0).normal(size=(dataset.num_items, 3)).astype(np.float32)
    np.save(tmp_path / "t.npy", table)
    order = np.random.default_rng(1).permutation(dataset.num_items)
    columns = {
        "item_id": dataset.item_ids.take(pa.array(order)),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(table[order].ravel()), 3),
    }
    pq.write_table(pa.table(columns), tmp_path / "t.parquet")
    assert np.array_equal(read_features(tmp_path / "t.npy", dataset), table)
    assert np.array_equal(read_features(tmp_path / "t.parquet", dataset), table)
    np.save(tmp_path / "short.npy", table[:-1])
    with pytest.raises(ValueError, match=r"embeddings: expected \[50, D\] .* got \[49, 3\]"):
        read_features(tmp_path / "short.npy", dataset)
    table[int(dataset.pv_item[0])] = math.nan
    np.save(tmp_path / "nan.npy", table)
    with pytest.raises(
        ValueError, match="features: 1 items on pages or in histories have no finite row"
    ):
        read_features(tmp_path / "nan.npy", dataset)
