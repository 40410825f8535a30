"""Embeddings of datasets and folders; interrupted passes that end with the same bytes; damaged and
missing images."""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from dataset_factory import draw, images_of, make_dataset, rewrite
from torch import Tensor, nn

from courier_fast.data.dataset import Dataset
from courier_fast.data.embeddings import read_embeddings, read_vectors, trained_until
from courier_fast.data.images.decode import make_decoder
from courier_fast.data.images.pictures import seen_size
from courier_fast.data.images.transforms import eval_windows
from courier_fast.embed import command as embed_command
from courier_fast.embed import encode, sources, write
from courier_fast.embed.sources import DatasetImages, FolderImages
from courier_fast.embed.write import EmbedReport, embed_source

SIZE = 16


class Tiny(nn.Module):
    """A stand-in for an encoder; raises at one call if told to."""

    def __init__(self, seed: int = 0, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv, self.linear = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 5)
        self.size, self.dim, self.mean, self.std = SIZE, 5, (0.5,) * 3, (0.25,) * 3
        self.fail_at, self.calls = fail_at, 0
        self.sizes: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.calls == self.fail_at:
            raise KeyboardInterrupt
        self.calls += 1
        self.sizes.append(len(x))
        return self.linear(self.conv(x).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """50 items: number 4 without an image, number 9 with a damaged one."""
    data = make_dataset(tmp_path_factory.mktemp("shop") / "d", items=50)
    images = images_of(data)
    image, *shape = images[9]
    images[9] = (image[:40] + b"\0" * 100, *shape)
    images[4] = (None, 0, 0)
    return rewrite(data, tmp_path_factory.mktemp("shop") / "e", images=images)


def embed_images(kind: type, encoder: Any, images: Any, out: Path, **how: Any) -> EmbedReport:
    decoder = make_decoder("auto", encoder.size, mean=encoder.mean, std=encoder.std)
    try:
        return embed_source(encoder, kind(images, decoder), out, **how)
    finally:
        decoder.close()


def embed_dataset(encoder: Any, dataset: Dataset, out: Path, **how: Any) -> EmbedReport:
    return embed_images(DatasetImages, encoder, dataset, out, **how)


def embed_folder(encoder: Any, folder: Path, out: Path, **how: Any) -> EmbedReport:
    return embed_images(FolderImages, encoder, folder, out, **how)


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if "partial" in p.name or "progress" in p.name)


def test_rows_are_what_the_encoder_gives(dataset: Dataset, tmp_path: Path) -> None:
    encoder = Tiny()
    encoder.train()
    report = embed_dataset(encoder, dataset, tmp_path / "e.npy", batch=8)
    assert encoder.training  # as it was
    table = np.load(tmp_path / "e.npy")
    assert table.shape == (50, 5) and table.dtype == np.float32
    decoder = make_decoder("auto", SIZE, mean=encoder.mean, std=encoder.std)
    for item in (0, 17, 49):
        image, _ = decoder.decode(
            [dataset.images[item]],
            eval_windows(dataset.images.shapes[[item]]),
            np.zeros(1, bool),
        )
        with torch.no_grad():
            np.testing.assert_allclose(table[item], encoder(image)[0], atol=1e-5)
    lost = np.isnan(table).all(1)
    assert np.flatnonzero(lost).tolist() == [4, 9] and np.isfinite(table[~lost]).all()
    assert (report.missing, report.damaged) == (["000004"], ["000009"])
    assert (report.rows, report.dim, report.resumed) == (50, 5, 0)
    beside = json.loads((tmp_path / "e.npy.json").read_text())
    assert beside["missing"] == ["000004"] and beside["damaged"] == ["000009"]
    assert beside["item_ids"] == [f"{i:06}" for i in range(50)]
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("fail_at", [0, 1, 3, 6])
@pytest.mark.parametrize("suffix", [".npy", ".parquet"])
@pytest.mark.parametrize("save_seconds", [0.0, 1e9])
def test_interrupted_and_resumed_is_the_same_file(
    dataset: Dataset, tmp_path: Path, fail_at: int, suffix: str, save_seconds: float
) -> None:
    whole, parts = tmp_path / f"whole{suffix}", tmp_path / f"parts{suffix}"
    embed_dataset(Tiny(), dataset, whole, batch=8)
    with pytest.raises(KeyboardInterrupt):
        embed_dataset(Tiny(fail_at=fail_at), dataset, parts, batch=8, save_seconds=save_seconds)
    assert not parts.exists()
    rest = Tiny()
    report = embed_dataset(rest, dataset, parts, batch=8)
    assert report.resumed == 8 * fail_at
    assert rest.calls == 7 - fail_at  # 49 images
    assert parts.read_bytes() == whole.read_bytes()
    assert (report.missing, report.damaged) == (["000004"], ["000009"])
    assert leftovers(tmp_path) == []


def test_kill_9_and_resume(dataset: Dataset, tmp_path: Path) -> None:
    """A process killed with batches done ends, when run again, with an uninterrupted run's
    bytes."""
    script = textwrap.dedent(
        f"""
        import sys, time
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from test_embed import Tiny, Dataset, embed_dataset
        class Slow(Tiny):
            def forward(self, x):
                if self.calls == 4:
                    time.sleep(60)
                return super().forward(x)
        Slow.__name__ = "Tiny"
        embed_dataset(Slow(), Dataset({str(dataset.path)!r}), sys.argv[1], batch=8, save_seconds=0)
        """
    )
    out = tmp_path / "killed.npy"
    progress = tmp_path / "killed.npy.progress"
    process = subprocess.Popen([sys.executable, "-c", script, str(out)])
    try:
        deadline = time.monotonic() + 120
        while not (progress.exists() and json.loads(progress.read_text())["done"] == 32):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not out.exists()
    report = embed_dataset(Tiny(), dataset, out, batch=8)
    assert report.resumed == 32
    embed_dataset(Tiny(), dataset, tmp_path / "whole.npy", batch=8)
    assert out.read_bytes() == (tmp_path / "whole.npy").read_bytes()


def other_encoder(data: Dataset, out: Path) -> int:
    return embed_dataset(Tiny(seed=1), data, out, batch=8).resumed


def other_batch(data: Dataset, out: Path) -> int:
    return embed_dataset(Tiny(), data, out, batch=9).resumed


def other_input(data: Dataset, out: Path) -> int:
    images = images_of(data)
    images[0] = ((images[0][0] or b"") + b"\0", *images[0][1:])  # past its end: the same picture
    return embed_dataset(
        Tiny(), rewrite(data, out.parent / "d", images=images), out, batch=8
    ).resumed


def other_progress(data: Dataset, out: Path) -> int:
    (out.parent / f"{out.name}.progress").write_text("{}")
    return embed_dataset(Tiny(), data, out, batch=8).resumed


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_encoder, "encoder"),
        (other_batch, "settings"),
        (other_input, "input"),
        (other_progress, "progress file"),
    ],
)
def test_a_change_starts_over_and_says_so(
    dataset: Dataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    change: Callable[[Dataset, Path], int],
    what: str,
) -> None:
    out = tmp_path / "e.npy"
    with pytest.raises(KeyboardInterrupt):
        embed_dataset(Tiny(fail_at=3), dataset, out, batch=8)
    with caplog.at_level(logging.WARNING, logger=write.__name__):
        assert change(dataset, out) == 0
    assert f"another {what}: starting over" in caplog.text
    embed_dataset(Tiny(seed=change is other_encoder), dataset, tmp_path / "new.npy", batch=8)
    np.testing.assert_allclose(
        np.load(out), np.load(tmp_path / "new.npy"), atol=1e-6, equal_nan=True
    )


def test_progress_of_another_partial_file_is_gone_first(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed right after starting over, the next run would have taken the new file's empty rows for
    done."""
    out = tmp_path / "e.npy"
    with pytest.raises(KeyboardInterrupt):
        embed_dataset(Tiny(fail_at=3), dataset, out, batch=8)

    def killed(*arguments: object) -> np.memmap:
        assert not (tmp_path / "e.npy.progress").exists()
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(write, "_allocate", killed)
        with pytest.raises(OSError, match="no space left"):
            embed_dataset(Tiny(seed=1), dataset, out, batch=8)
    assert embed_dataset(Tiny(), dataset, out, batch=8).resumed == 0


def test_parquet_goes_round_with_ids_as_text(dataset: Dataset, tmp_path: Path) -> None:
    embed_dataset(Tiny(), dataset, tmp_path / "e.parquet", batch=8)
    embed_dataset(Tiny(), dataset, tmp_path / "e.npy", batch=8)
    table = pq.read_table(tmp_path / "e.parquet")
    assert table["item_id"].to_pylist() == [f"{i:06}" for i in range(50)]
    assert str(table.schema.field("embedding").type) == "fixed_size_list<element: float>[5]"
    found, expected = (
        read_embeddings(tmp_path / f"e{suffix}", dataset) for suffix in (".parquet", ".npy")
    )
    np.testing.assert_array_equal(found, expected)


def test_folder_of_images(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    folder = tmp_path / "photos"
    (folder / "01").mkdir(parents=True)
    for name in ("0012.jpg", "01/0003.jpeg", "b.JPG"):
        (folder / name).write_bytes(draw(rng, 50, 30))
    (folder / "broken.jpg").write_bytes(b"no image")
    (folder / "empty.png").write_bytes(b"")
    (folder / "notes.txt").write_text("not an image")
    report = embed_folder(Tiny(), folder, tmp_path / "e.parquet", batch=2)
    read = pq.read_table(tmp_path / "e.parquet").to_pydict()
    assert read["item_id"] == ["0003", "0012", "b", "broken", "empty"]
    lost = np.isnan(np.array(read["embedding"])).all(1)
    assert lost.tolist() == [False, False, False, True, True]
    assert report.damaged == ["broken", "empty"] and report.missing == []
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="expected a folder with images, got none"):
        embed_folder(Tiny(), tmp_path / "nothing", tmp_path / "e.npy")
    with pytest.raises(FileNotFoundError, match="expected a folder"):
        embed_folder(Tiny(), tmp_path / "nowhere", tmp_path / "e.npy")


def test_folder_and_dataset_agree(dataset: Dataset, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for i in range(50):
        if i != 4:
            (tmp_path / "photos" / f"{i:06}.jpg").write_bytes(dataset.images[i].tobytes())
    embed_folder(Tiny(), tmp_path / "photos", tmp_path / "folder.npy", batch=8)
    embed_dataset(Tiny(), dataset, tmp_path / "dataset.npy", batch=8)
    expected = np.delete(np.load(tmp_path / "dataset.npy"), 4, 0)
    np.testing.assert_array_equal(np.load(tmp_path / "folder.npy"), expected)


def test_exif_rotation_counts_in_the_crop(tmp_path: Path) -> None:
    from PIL import Image

    picture = np.zeros((40, 80, 3), np.uint8)
    picture[:, :40] = 255
    exif = Image.Exif()
    exif[0x0112] = 6
    for suffix in ("jpg", "png"):
        Image.fromarray(picture).save(tmp_path / f"a.{suffix}", exif=exif)
        data = np.frombuffer((tmp_path / f"a.{suffix}").read_bytes(), np.uint8)
        assert seen_size(data) == (80, 40)


def test_an_encoder_that_gives_nan_is_an_error(dataset: Dataset, tmp_path: Path) -> None:
    encoder = Tiny()
    with torch.no_grad():
        encoder.linear.bias[2] = torch.nan
    with pytest.raises(RuntimeError, match="expected finite embeddings, got NaN .* for 000000"):
        embed_dataset(encoder, dataset, tmp_path / "e.npy", batch=8)
    assert not (tmp_path / "e.npy").exists()


def test_wrong_arguments(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a .npy or .parquet file"):
        embed_dataset(Tiny(), dataset, tmp_path / "e.csv")
    with pytest.raises(ValueError, match="batch: expected at least 1"):
        embed_dataset(Tiny(), dataset, tmp_path / "e.npy", batch=0)


def test_autocast(dataset: Dataset, tmp_path: Path) -> None:
    embed_dataset(Tiny(), dataset, tmp_path / "half.npy", dtype=torch.bfloat16)
    embed_dataset(Tiny(), dataset, tmp_path / "full.npy")
    half, full = np.load(tmp_path / "half.npy"), np.load(tmp_path / "full.npy")
    assert half.dtype == np.float32
    assert not np.array_equal(half, full, equal_nan=True)
    np.testing.assert_allclose(half, full, atol=0.02, equal_nan=True)


# ---- with a run of the trainer -------------------------------------------------------------------


def command(module: object, *arguments: object) -> int:
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)  # type: ignore[attr-defined]
    return module.run(parser.parse_args([str(a) for a in arguments]))  # type: ignore[attr-defined]


def make_run(folder: Path, dataset: Path, *, features: Path | None = None) -> None:
    from courier_fast.train.config import Config
    from courier_fast.train.encoder import build_encoder, build_projection, save_encoder

    folder.mkdir()
    overrides: dict[str, object] = {"data.dataset": str(dataset), "data.size": 32}
    if features is None:
        torch.manual_seed(0)
        encoder = build_encoder("small_conv", 8, 32)
        overrides["model.backbone"] = "small_conv"
        with torch.no_grad():
            for p in encoder.parameters():  # trained, as it were
                p += 0.01 * torch.randn_like(p)
    else:
        table = torch.from_numpy(np.load(features))
        encoder = build_projection(table.shape[1], 8, table)
        overrides["data.features"] = str(features)
    encoder.about["trained_until"] = 1_700_000_000
    save_encoder(encoder, folder)
    Config.load(None, overrides).save(folder / "config.toml")


def test_commands_with_a_run(dataset: Dataset, tmp_path: Path) -> None:
    from courier_fast.evaluate import command as evaluate
    from courier_fast.train.encoder import build_encoder

    run, out = tmp_path / "run", tmp_path / "e.npy"
    make_run(run, dataset.path)
    assert (
        command(
            embed_command, "--run", run, "--dataset", dataset.path, "--out", out, "--device", "cpu"
        )
        == 0
    )
    assert np.load(out).shape == (50, 8)
    assert trained_until(out) == 1_700_000_000 and trained_until(tmp_path / "other.npy") is None
    common = (
        "--dataset",
        dataset.path,
        "--split",
        "train",
        "--count",
        10,
        "--bootstrap",
        10,
        "--device",
        "cpu",
    )
    assert command(evaluate, *common, "--run", run, "--json", tmp_path / "run.json") == 0
    assert command(evaluate, *common, "--embeddings", out, "--json", tmp_path / "file.json") == 0
    by_run, by_file = (json.loads((tmp_path / f"{n}.json").read_text()) for n in ("run", "file"))
    for name in ("page", "sampled"):
        a, b = by_run["sets"][name]["methods"], by_file["sets"][name]["methods"]
        assert a["trained"] == b["e"] and a["pixels 8x8"] == b["pixels 8x8"]
    assert by_run["sets"]["page"]["unranked"]["trained"] == by_file["sets"]["page"]["unranked"]["e"]
    # The untrained backbone is the one that the run began with.
    torch.manual_seed(0)
    fresh = build_encoder("small_conv", 8, 32)
    args = argparse.Namespace(
        run=run,
        backbone=None,
        size=0,
        pretrained=False,
        weights=None,
        seed=5,
        device="cpu",
        precision="auto",
        decoder="auto",
        threads=1,
        batch=64,
    )
    method = evaluate._backbone(args, dataset)
    decoder = make_decoder("auto", 32, mean=fresh.mean, std=fresh.std)
    expected = encode.encode_all(
        fresh.backbone.eval(), sources.DatasetImages(dataset, decoder), batch=64
    )
    assert method.name == "untrained backbone" and method.embeddings is not None
    np.testing.assert_allclose(method.embeddings, expected, atol=1e-5, equal_nan=True)


def test_small_vectors(dataset: Dataset, tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run, dataset.path)
    common = (embed_command, "--run", run, "--dataset", dataset.path, "--device", "cpu", "--out")
    assert command(*common, tmp_path / "whole.npy") == 0
    whole = read_vectors(tmp_path / "whole.npy")
    have = np.isfinite(whole[1]).all(1)
    assert 0 < have.sum() < len(have)
    spaces = {whole[2]}
    for suffix in ("npy", "parquet"):
        for dtype, step in (("float32", 0), ("float16", 2**-11), ("int8", 0)):
            out = tmp_path / f"{dtype}.{suffix}"
            assert command(*common, out, "--dim", 5, "--dtype", dtype) == 0
            about = json.loads(Path(f"{out}.json").read_text())
            assert (about["dim"], about["dtype"]) == (5, dtype)
            ids, found, space = read_vectors(out)
            spaces.add(space)
            rows = dict(zip(ids.to_pylist(), found, strict=True))
            expected = dict(zip(whole[0].to_pylist(), whole[1][:, :5], strict=True))
            if dtype == "int8":
                most = np.abs(whole[1][have][:, :5]).max()
                assert about["scale"] == pytest.approx(most / 127)
                step = about["scale"] / 2 * (1 + 1e-5)
            for name, row in expected.items():
                if not np.isfinite(row).all():
                    assert name not in rows or np.isnan(rows[name]).all()
                else:
                    # A product of fewer columns is rounded otherwise.
                    near = 1e-6 + (np.abs(row) * step if dtype == "float16" else step)
                    assert (np.abs(rows[name] - row) <= near).all()
            stored = np.load(out) if suffix == "npy" else pq.read_table(out)["embedding"].type
            kind = stored.dtype if suffix == "npy" else stored.value_type.to_pandas_dtype()
            assert np.dtype(kind) == dtype
            if suffix == "npy":
                table = read_embeddings(out, dataset)
                np.testing.assert_array_equal(np.isfinite(table).all(1), have)
    assert len(spaces) == 2  # of all dimensions, and of the first five
    # A folder of the first dimensions grows by them alone.
    assert command(*common, tmp_path / "store", "--dim", 5) == 0
    with pytest.raises(ValueError, match="space"):
        command(*common, tmp_path / "store", "--only-new")
    for options, message in (
        ((tmp_path / "x.npy", "--dim", 9), "dim: expected 1 to 8, the encoder's, got 9"),
        ((tmp_path / "x.npy", "--dim", 0), "dim: expected 1 to 8"),
        (
            (tmp_path / "store", "--dim", 5, "--only-new", "--dtype", "int8"),
            "dtype: expected float32",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            command(*common, *options)
    beside = tmp_path / "int8.npy.json"
    beside.write_text(beside.read_text().replace('"scale": ', '"scale": -'))
    with pytest.raises(ValueError, match="expected a positive number as scale in .*int8.npy.json"):
        read_vectors(tmp_path / "int8.npy")


def test_commands_with_a_run_on_features(tmp_path: Path) -> None:
    from courier_fast.evaluate import command as evaluate

    data = make_dataset(tmp_path / "d", images=False)
    features = tmp_path / "features.npy"
    np.save(features, np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32))
    make_run(tmp_path / "run", data.path, features=features)
    out = tmp_path / "e.parquet"
    assert (
        command(embed_command, "--run", tmp_path / "run", "--dataset", data.path, "--out", out) == 0
    )
    assert read_embeddings(out, data).shape == (50, 8)
    assert trained_until(out) == 1_700_000_000
    found = tmp_path / "r.json"
    code = command(
        evaluate,
        "--dataset",
        data.path,
        "--run",
        tmp_path / "run",
        "--json",
        found,
        "--count",
        5,
        "--bootstrap",
        5,
    )
    assert code == 0
    assert list(json.loads(found.read_text())["missing"]) == [
        "trained",
        "random",
        "popularity",
        "features",
        "features, standardised",
    ]
    with pytest.raises(ValueError, match="expected an encoder of images with --images"):
        command(embed_command, "--run", tmp_path / "run", "--images", tmp_path, "--out", out)
