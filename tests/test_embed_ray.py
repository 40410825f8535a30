"""`embed --engine ray` gives the bytes of the local engine, also where a worker is killed or the
driver stops."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dataset_factory import images_of, make_dataset, rewrite
from torch import Tensor, nn
from train_factory import settings

from courier_fast.cli import main
from courier_fast.data.dataset import Dataset
from courier_fast.data.embedding_store import EmbeddingStore
from courier_fast.embed import on_ray
from courier_fast.embed.sources import FeatureRows
from courier_fast.embed.write import embed_source
from courier_fast.train.trainer import Trainer

pytestmark = pytest.mark.long("Ray")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """60 items: number 4 without an image, number 9 with a damaged one."""
    data = make_dataset(tmp_path_factory.mktemp("shop") / "d", items=60)
    images = images_of(data)
    image, *shape = images[9]
    assert image is not None
    images[9], images[4] = (image[:40] + b"\0" * 100, *shape), (None, 0, 0)
    return rewrite(data, tmp_path_factory.mktemp("shop") / "e", images=images, shard_bytes=9000)


@pytest.fixture(scope="module")
def run(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    trainer = Trainer(settings(dataset, out, optim__steps=1, data__pages=6, data__max_damaged=0.5))
    trainer.fit()
    trainer.close()
    return out


def embed(run: Path, what: str, out: Path, *more: str) -> int:
    return main(["embed", f"--run={run}", what, f"--out={out}", "--batch=2", "--threads=1", *more])


def test_the_bytes_are_those_of_the_local_engine(
    ray: Any, dataset: Dataset, run: Path, tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for i, (image, *_) in enumerate(images_of(dataset)):
        (tmp_path / "photos" / f"{i:03}.jpg").write_bytes(image or b"")
    files = [tmp_path / engine / "e.parquet" for engine in ("local", "ray")]
    for file in files:
        assert (
            embed(run, f"--images={tmp_path / 'photos'}", file, f"--engine={file.parent.name}") == 0
        )
    assert files[0].read_bytes() == files[1].read_bytes()
    beside = [json.loads(Path(f"{f}.json").read_text()) for f in files]
    assert beside[0] == beside[1]
    assert len(beside[0]["damaged"]) == 2


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_a_folder_grows_as_the_local_engine_makes_it_grow(
    ray: Any, dataset: Dataset, run: Path, tmp_path: Path, dtype: str
) -> None:
    images = images_of(dataset)
    images[20] = images[21]
    later = rewrite(dataset, tmp_path / "later", images=images)
    tables = []
    for engine in ("local", "ray"):
        out = tmp_path / engine
        how = (f"--engine={engine}", f"--dtype={dtype}")
        assert embed(run, f"--dataset={dataset.path}", out, *how) == 0
        assert embed(run, f"--dataset={later.path}", out, *how, "--only-new") == 0
        parts = EmbeddingStore.open(out).parts
        assert [p["rows"] for p in parts] == [59, 1]
        tables.append(
            [pq.read_table(out / p["name"]).drop(["encoded_at"]).to_pydict() for p in parts]
        )
    for one, other in zip(*tables, strict=True):
        assert one.keys() == other.keys() and ("scale" in one) == (dtype == "int8")
        for column in ("item_id", "source"):
            assert one[column] == other[column]
        for column in one.keys() - {"item_id", "source"}:
            np.testing.assert_array_equal(one[column], other[column])


class Slow(nn.Module):
    """Takes its time, and writes down by whom."""

    def __init__(self, folder: Path, wrong: bool = False) -> None:
        super().__init__()
        self.dim, self.folder, self.wrong = 3, str(folder), wrong
        self.linear = nn.Linear(5, 3)
        nn.init.ones_(self.linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        if os.path.isdir(self.folder):
            Path(self.folder, f"{os.getpid()}").touch()
        time.sleep(0.02)
        return self.linear(x) / (0 if self.wrong else 1)


def rows(n: int = 200) -> FeatureRows:
    table = np.random.default_rng(0).standard_normal((n, 5)).astype(np.float32)
    table[7] = np.nan
    return FeatureRows(table, [f"i{i}" for i in range(n)])


def test_a_killed_worker_loses_nothing(ray: Any, tmp_path: Path) -> None:
    (tmp_path / "who").mkdir()
    killed: list[int] = []
    done = threading.Event()

    def kill() -> None:
        while not killed and not done.is_set():
            for name in os.listdir(tmp_path / "who"):
                if int(name) != os.getpid():
                    time.sleep(0.3)
                    os.kill(int(name), signal.SIGKILL)
                    killed.append(int(name))
                    break
            time.sleep(0.01)

    torch.manual_seed(0)
    model = Slow(tmp_path / "who")
    thread = threading.Thread(target=kill)
    thread.start()
    how = {"batch": 2, "encode": on_ray.encode_on(ray)}
    try:
        report = embed_source(model, rows(), tmp_path / "ray.npy", **how)  # type: ignore[arg-type]
    finally:
        done.set()
        thread.join()
    assert killed
    assert len(set(os.listdir(tmp_path / "who"))) > 1, "nobody took the place of the killed one"
    embed_source(model, rows(), tmp_path / "local.npy", batch=2)
    assert (tmp_path / "ray.npy").read_bytes() == (tmp_path / "local.npy").read_bytes()
    assert report.missing == ["i7"]


def test_a_stopped_driver_goes_on_where_it_was(ray: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, plain = Slow(tmp_path / "nowhere"), on_ray.encode_on(ray)

    def stopped(*args: Any, **how: Any) -> Iterator[Any]:
        for i, part in enumerate(plain(*args, **how)):
            if i == 2:
                raise KeyboardInterrupt
            yield part

    how: dict[str, Any] = {"batch": 4, "save_seconds": 0}
    with pytest.raises(KeyboardInterrupt):
        embed_source(model, rows(), tmp_path / "e.npy", encode=stopped, **how)
    report = embed_source(model, rows(), tmp_path / "e.npy", encode=plain, **how)
    assert report.resumed == 2 * 4 * on_ray.BATCHES
    embed_source(model, rows(), tmp_path / "local.npy", batch=4)
    assert (tmp_path / "e.npy").read_bytes() == (tmp_path / "local.npy").read_bytes()


def test_errors_are_those_of_the_local_engine(
    ray: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for encode in ({}, {"encode": on_ray.encode_on(ray)}):
        with pytest.raises(
            RuntimeError, match="expected finite embeddings, got NaN or infinity for i0"
        ):
            embed_source(Slow(tmp_path, wrong=True), rows(), tmp_path / "e.npy", **encode)  # type: ignore[arg-type]
    assert embed(tmp_path, "--images=.", tmp_path / "e.npy", "--ray-address=auto") == 2
    assert "--ray-address: has no effect without --engine ray" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert embed(tmp_path, "--images=.", tmp_path / "e.npy", "--engine=ray") == 2
    assert 'engine: "ray" needs ray: pip install "courier_fast[ray]"' in capsys.readouterr().err
