"""Datasets and sources in an object store: an S3 server of this process, the same bytes as on a
disk, and a bounded cache."""

from __future__ import annotations

import logging
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq
import pytest
from dataset_factory import draw, images_of, make_dataset, rewrite
from moto.server import ThreadedMotoServer
from prepare_factory import random_events
from pyarrow import fs
from train_factory import settings

from courier_fast import storage
from courier_fast.cli import main
from courier_fast.data.batches import BatchPlan
from courier_fast.data.dataset import Dataset
from courier_fast.storage import Cache, Folder, filesystem
from courier_fast.train.trainer import Trainer


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of an S3 server with the bucket "shop"."""
    names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_DEFAULT_REGION", "AWS_ENDPOINT_URL")
    before = {name: os.environ.get(name) for name in names}
    logging.getLogger("werkzeug").setLevel(logging.WARNING)
    served = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    served.start()
    host, port = served.get_host_and_port()
    os.environ |= dict(
        zip(names, ("key", "secret", "us-east-1", f"http://{host}:{port}"), strict=True)
    )
    fs.S3FileSystem(allow_bucket_creation=True, endpoint_override=os.environ[names[3]]).create_dir(
        "shop"
    )
    yield os.environ[names[3]]
    served.stop()
    storage._of_root.cache_clear()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("COURIER_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    path = tmp_path_factory.mktemp("local")
    whole = make_dataset(path / "whole", items=60, pages=150)
    return rewrite(whole, path / "cut", shard_rows=17, shard_bytes=5000)


@pytest.fixture(scope="module")
def remote(server: str, local: Dataset) -> str:
    copy(local.path, "s3://shop/dataset")
    return "s3://shop/dataset"


def copy(folder: Path | str, url: str) -> None:
    found, name = filesystem(url)
    fs.copy_files(str(folder), name, destination_filesystem=found)


def contents(folder: Path | str) -> dict[str, bytes]:
    start = len(str(folder)) + 1
    return {str(f)[start:]: storage.read_bytes(f) for f in storage.list_files(folder)}


def cached(folder: Path) -> list[Path]:
    return [p for p in folder.iterdir() if not p.name.startswith(".")] if folder.is_dir() else []


# ---- sources -------------------------------------------------------------------------------------


def shop(folder: Path) -> None:
    """Events in Parquet files by day as Spark writes them, the same as CSV, items, and a picture of
    each."""
    rng = np.random.default_rng(0)
    events = pl.DataFrame(random_events(0), schema=["user", "item", "at"], orient="row")
    events = events.with_columns(at=1_600_041_600 + pl.col("at") // 4)  # of ten days
    (folder / "images").mkdir(parents=True)
    for item in events["item"].unique().to_list():
        (folder / "images" / f"{item}.jpg").write_bytes(draw(rng, 40, 30))
    events.write_csv(folder / "events.csv")
    days = events.with_columns(day=pl.from_epoch("at").dt.strftime("%Y-%m-%d"))
    for (day,), rows in days.group_by("day", maintain_order=True):
        part = folder / "events" / f"day={day}"
        part.mkdir(parents=True)
        for i, piece in enumerate((rows[:2], rows[2:])):
            pq.write_table(piece.drop("day").to_arrow(), part / f"part-{i:05}.snappy.parquet")
    (folder / "events" / "_SUCCESS").write_bytes(b"")
    (folder / "events" / "_temporary").mkdir()
    (folder / "events" / "_temporary" / "part-00009.parquet").write_bytes(b"half")
    events.select("item").unique().with_columns(category=pl.lit("c")).write_csv(
        folder / "items.csv"
    )


COLUMNS = [
    "--user-column=user",
    "--item-column=item",
    "--time-column=at",
    "--min-history=1",
    "--shard-rows=40",
]


def run_prepare(out: str, folder: str, events: str, *more: str) -> int:
    return main(
        [
            "prepare",
            out,
            "--interactions",
            f"{folder}/{events}",
            "--items",
            f"{folder}/items.csv",
            "--images",
            f"{folder}/images",
            "--shard-bytes=3000",
            *COLUMNS,
            *more,
        ]
    )


@pytest.mark.long("object stores")
def test_prepare_from_s3_to_s3_is_prepare_on_a_disk(
    server: str, ray: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first test with Ray, whose processes have the server's address."""
    folder = tmp_path / "shop"
    shop(folder)
    copy(folder, "s3://shop/source")
    assert run_prepare(str(tmp_path / "out"), str(folder), "events.csv") == 0
    expected = contents(tmp_path / "out")
    assert len(expected) > 20
    # By day, one file of text; and by day, a task for each file.
    for i, (events, engine) in enumerate(
        (("events", "local"), ("events.csv", "local"), ("events", "ray"))
    ):
        out = f"s3://shop/out{i}"
        assert run_prepare(out, "s3://shop/source", events, f"--engine={engine}") == 0
        found = contents(out)
        assert found.keys() == expected.keys()
        different = {n for n in found if found[n] != expected[n]}
        assert different == {"dataset.json"}  # which has the paths
        assert main(["verify", out]) == 0
    # A folder by day on a disk, too.
    assert run_prepare(str(tmp_path / "days"), str(folder), "events") == 0
    assert (tmp_path / "days/manifest.json").read_bytes() == expected["manifest.json"]
    capsys.readouterr()
    assert run_prepare("s3://shop/out0", str(folder), "events") == 2
    assert "s3://shop/out0 is there already; --overwrite replaces it" in capsys.readouterr().err
    assert run_prepare("s3://shop/out0", str(folder), "events", "--overwrite", "--seed=1") == 0
    assert Dataset("s3://shop/out0").verify() > 0
    assert contents("s3://shop/out0")["manifest.json"] != expected["manifest.json"]


def test_a_column_of_a_partition_is_read(tmp_path: Path) -> None:
    shop(tmp_path)
    how = ["--user-column=user", "--item-column=item", "--time-column=day", "--min-history=1"]
    assert (
        main(["prepare", str(tmp_path / "out"), "--interactions", str(tmp_path / "events"), *how])
        == 0
    )
    times = Dataset(tmp_path / "out").event_time
    assert (times % 86_400 == 0).all()


def test_sources_that_cannot_be_read(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shop(tmp_path)
    (tmp_path / "events" / "note.csv").write_text("x")
    for events, message in (
        (
            str(tmp_path / "events"),
            "expected files of one kind, .parquet, .csv, .tsv or .jsonl, got .csv, .parquet",
        ),
        ("s3://shop/nowhere.csv", "s3://shop/nowhere.csv is not there"),
        ("s3://nowhere/events.parquet", "s3://nowhere/events.parquet is not there"),
        (
            "nonsense://a/b.csv",
            "expected a local path, s3://, gs://, hdfs:// or another URL that fsspec opens, "
            "got nonsense://a",
        ),
    ):
        assert main(["prepare", str(tmp_path / "out"), "--interactions", events, *COLUMNS]) == 2
        assert message in capsys.readouterr().err
    events = ["--interactions", str(tmp_path / "events.csv")]
    assert (
        main(["prepare", str(tmp_path / "out"), *events, "--images=s3://shop/nothing", *COLUMNS])
        == 2
    )
    assert "images called after the items, got none in s3://shop/nothing" in capsys.readouterr().err


# ---- reading -------------------------------------------------------------------------------------


def test_a_remote_dataset_is_the_local_one(local: Dataset, remote: str) -> None:
    found = Dataset(remote)
    assert found.path == remote
    assert found.fingerprint == local.fingerprint
    assert images_of(found) == images_of(local)
    assert found.item_ids.to_pylist() == local.item_ids.to_pylist()
    plans = [BatchPlan(d, images=30, seed=1) for d in (found, local)]
    for step in range(plans[0].steps(0)):
        one, other = (vars(p.batch(0, step)) for p in plans)
        assert {n: v.tolist() for n, v in one.items()} == {n: v.tolist() for n, v in other.items()}


def test_training_from_s3_is_training_from_a_disk(
    local: Dataset, remote: str, tmp_path: Path
) -> None:
    weights = []
    for i, dataset in enumerate((local, Dataset(remote))):
        trainer = Trainer(settings(dataset, tmp_path / str(i), optim__steps=2, data__pages=6))
        trainer.fit()
        weights.append({n: t.clone() for n, t in trainer.encoder.state_dict().items()})
        trainer.close()
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    assert (
        main(
            [
                "embed",
                f"--run={tmp_path / '1'}",
                f"--dataset={remote}",
                f"--out={tmp_path / 'e.npy'}",
            ]
        )
        == 0
    )
    assert np.isfinite(np.load(tmp_path / "e.npy")).all()


def test_only_the_shards_that_are_needed_are_fetched(
    local: Dataset, remote: str, cache: Path
) -> None:
    found = Dataset(remote)
    assert not cached(cache)
    plan = BatchPlan(found, split="test", pages=4)
    batch = plan.batch(0, 0)
    read = {p.name for p in cached(cache)}
    of = {
        t: [s.sha256.replace(":", "-") in read for s in found.tables[t].shards if s.sha256]
        for t in ("pages", "users", "images")
    }
    assert sum(of["pages"]) == 2 and of["pages"][-1] and not any(of["users"] + of["images"])
    found.images.take(batch.items[:1].tolist())
    assert len(cached(cache)) <= len(read) + 1 + len(found.items.shards)


def test_the_cache_is_bounded(
    local: Dataset, remote: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = Dataset(remote)
    largest = max(s.bytes for t in found.tables.values() for s in t.shards)
    limit = 3 * largest
    monkeypatch.setenv("COURIER_FAST_CACHE_GIB", str(limit / 2**30))
    found = Dataset(remote)
    everything = sum(s.bytes for s in found.tables["images"].shards)
    assert everything > 2 * limit
    expected = images_of(local)
    for row in range(60):
        assert found.images[row].tobytes() == expected[row][0]
        assert sum(p.stat().st_size for p in cached(cache)) <= limit
        assert found.maps._bytes <= limit
    # A batch that needs more at once than the limit is still right.
    assert [i.tobytes() for i in found.images.take(range(60))] == [image for image, *_ in expected]
    monkeypatch.setenv("COURIER_FAST_CACHE_GIB", "much")
    with pytest.raises(ValueError, match="COURIER_FAST_CACHE_GIB: expected a number, got 'much'"):
        Dataset(remote)


def test_the_shards_used_last_stay(tmp_path: Path) -> None:
    made: list[str] = []
    cache = Cache(tmp_path / "c", limit=30)

    def get(name: str) -> None:
        digest = f"sha256:{name * 64}"

        def write(path: Path) -> None:
            made.append(name)
            path.write_bytes(b"0123456789")

        assert cache.get(digest, 10, write).read_bytes() == b"0123456789"
        os.utime(tmp_path / "c" / digest.replace(":", "-"), ns=(next(clock),) * 2)

    clock = iter(range(1, 99))
    for name in "abcadab":
        get(name)
    assert "".join(made) == "abcdb"  # b went for d, as a had been used since


def _begin(barrier: Any) -> None:
    """What a process of the pool is given at its start."""
    globals()["_together"] = barrier.wait


def _fetch(url: str) -> int:
    fetched = []
    folder = Folder(url)
    plain = Folder._fetch

    def counted(self: Folder, shard: storage.Shard, to: Path | None) -> None:
        fetched.append(shard.name)
        plain(self, shard, to)

    Folder._fetch = counted  # type: ignore[method-assign]
    _together()  # type: ignore[name-defined] # noqa: F821
    Dataset(url).images.take(range(60))
    assert folder.path == url
    return len(fetched)


@pytest.mark.long("object stores")
def test_processes_fetch_a_shard_once(local: Dataset, remote: str) -> None:
    context = multiprocessing.get_context("spawn")
    with context.Pool(2, _begin, (context.Barrier(2),)) as pool:
        counts = pool.map(_fetch, [remote] * 2, chunksize=1)
    needed = len(local.tables["images"].shards) + len(local.items.shards)
    assert sum(counts) == needed
    with ThreadPoolExecutor(4) as threads:  # and threads of one
        assert len(list(threads.map(lambda _: Dataset(remote).event_item, range(4)))) == 4


def test_a_damaged_remote_shard_is_named(local: Dataset, server: str, cache: Path) -> None:
    url = "s3://shop/damaged"
    copy(local.path, url)
    found, name = filesystem(f"{url}/events/00001.arrow")
    data = storage.read_bytes(f"{url}/events/00001.arrow")
    for wrong in (data[:-8], data[:100] + b"x" + data[101:]):
        with found.open_output_stream(name) as file:
            file.write(wrong)
        with pytest.raises(ValueError, match=rf"{url}/events/00001\.arrow was cut off or altered"):
            _ = Dataset(url).event_item
        assert main(["verify", url]) == 2
        assert len(cached(cache)) == 1  # the shard before it
    found.delete_file(name)
    with pytest.raises(FileNotFoundError, match=rf"{url}/events/00001\.arrow is in the manifest"):
        _ = Dataset(url).event_item
    with pytest.raises(
        FileNotFoundError, match="expected a folder that `courier-fast prepare` wrote"
    ):
        Dataset("s3://shop/nothing")


def test_other_file_systems_come_from_fsspec(local: Dataset) -> None:
    """In a process of its own: its memory."""
    script = """
import sys
from courier_fast import storage
from courier_fast.data.dataset import Dataset
from pyarrow import fs
found, name = storage.filesystem("memory://shop/d")
fs.copy_files(sys.argv[1], name, destination_filesystem=found)
d = Dataset("memory://shop/d")
print(d.verify(), d.num_pages, sum(map(len, d.images.take(range(60)))))
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(local.path)], capture_output=True, text=True, check=True
    )
    expected = (
        local.verify(),
        local.num_pages,
        sum(len(image or b"") for image, *_ in images_of(local)),
    )
    assert done.stdout.split() == [str(n) for n in expected]


def test_embedding_a_remote_folder_of_images(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    shop(folder)
    (folder / "images" / "broken.jpg").write_bytes(b"no image")
    copy(folder / "images", "s3://shop/photos")
    from courier_fast.data.images.decode import make_decoder
    from courier_fast.embed.sources import FolderImages

    decoder = make_decoder("pillow", 16)
    here, there = (FolderImages(f, decoder) for f in (folder / "images", "s3://shop/photos"))
    assert list(here.ids) == list(there.ids)
    rows = np.arange(len(here.ids))
    (pictures, damaged), (others, also) = here.load(rows), there.load(rows)
    assert [here.ids[i] for i in np.flatnonzero(damaged)] == ["broken"]
    assert (also == damaged).all()
    assert (pictures == others)[~damaged].all()
    assert here.digest(3) == there.digest(3)
    before = there.fingerprint()
    assert FolderImages("s3://shop/photos", decoder).fingerprint() == before
    (folder / "images" / "broken.jpg").write_bytes(b"still no image")
    copy(folder / "images", "s3://shop/photos")
    assert FolderImages("s3://shop/photos", decoder).fingerprint() != before


def put(url: str, data: bytes = b"x") -> None:
    found, name = filesystem(url)
    with found.open_output_stream(name) as file:
        file.write(data)


def test_a_prefix_with_something_else_is_left(server: str, tmp_path: Path) -> None:
    """`prepare` wrote its tables among whatever was there, and removed its dataset.json before it
    had read a row."""
    from prepare_factory import source_of

    from courier_fast.data.prepare.options import PrepareOptions
    from courier_fast.data.prepare.run import prepare
    from courier_fast.output import DATASET, check_remote

    put("s3://shop/mine/photo.jpg")
    put("s3://shop/json/report.json", b"{}")
    put("s3://shop/other/dataset.json", b'{"name": "mine"}')
    for url in ("s3://shop/mine", "s3://shop/json", "s3://shop/other", "s3://shop/mine/photo.jpg"):
        with pytest.raises(ValueError, match=f"got {url}, which (holds something else|is a file)"):
            check_remote(url, DATASET, overwrite=True)
    check_remote("s3://shop/nothing-yet", DATASET)
    put("s3://shop/left/users/00000.arrow")  # by a run that was killed
    check_remote("s3://shop/left", DATASET)
    for name in ("images", "images/a/b.csv"):
        with pytest.raises(ValueError, match="which is or holds the input"):
            check_remote("s3://shop/images", DATASET, inputs=[f"s3://shop/{name}"])
    check_remote("s3://shop/images2", DATASET, inputs=["s3://shop/images"])
    check_remote("s3://shop/images/ds", DATASET, inputs=["s3://shop/images"])
    with pytest.raises(ValueError, match="all of whose files are read"):
        check_remote("s3://shop/logs/ds", DATASET, listed=["s3://shop/logs/"])
    # An earlier dataset stays until the source has been read.
    options = PrepareOptions(min_history=1, overwrite=True)
    prepare("s3://shop/kept", source=source_of(random_events(0)), options=options)
    with pytest.raises(ValueError, match="expected events, got none"):
        prepare("s3://shop/kept", source=source_of([]), options=options)
    assert Dataset("s3://shop/kept").verify() > 0
