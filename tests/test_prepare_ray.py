"""`prepare --engine ray` writes the bytes of the local engine, however its parts are cut, and where
processes are killed."""

from __future__ import annotations

import functools
import io
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from PIL import Image
from prepare_factory import digest, random_events, source_of
from test_data_layouts import write_taobao
from test_given_histories import item_rows, log

from courier_fast.cli import main
from courier_fast.data.dataset import Dataset
from courier_fast.data.prepare import on_ray, plan, rows, steps
from courier_fast.data.prepare.layouts import Columns, Source, generic, taobao_mm
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.run import prepare

SMALL = PrepareOptions(shard_rows=37, shard_bytes=2000, min_history=1, max_history=5, page_size=4)


class Graves:
    """Steps of which the first process to do one is killed, and of which one was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def dig(self, *steps: str) -> None:
        for step in steps:
            (self.folder / step).touch()

    def left(self) -> list[str]:
        return sorted(p.name for p in self.folder.iterdir())


@pytest.fixture
def graves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Graves:
    """Parts are of a few rows; no step dies unless it is told to."""
    monkeypatch.setattr(on_ray, "PART", 90)
    monkeypatch.setattr(plan, "IMAGES", 4)
    task, graves = on_ray.Ray.task, Graves(tmp_path / "graves")

    def small(run: Any, step: Callable[..., Any], returns: int | str = 1) -> Callable[..., Any]:
        return task(run, mortal(step, graves.folder / step.__name__), returns)

    monkeypatch.setattr(on_ray.Ray, "task", small)
    return graves


def mortal(step: Callable[..., Any], grave: Path) -> Callable[..., Any]:
    """The step in a worker, which reads small batches. One that finds its grave dies there, when
    its work is done and before anybody has heard."""

    def die() -> None:
        try:
            grave.unlink()
        except FileNotFoundError:
            return
        os.kill(os.getpid(), signal.SIGKILL)

    @functools.wraps(step)
    def stream(*args: Any) -> Iterator[Any]:
        rows.BATCH, rows.WITH_LISTS = 40, 7
        for n, value in enumerate(step(*args)):
            yield value
            if n == 2:
                die()

    @functools.wraps(step)
    def run(*args: Any) -> Any:
        result = step(*args)
        die()
        return result

    return stream if step is steps.read else run


def drawn_images(folder: Path, items: list[str]) -> Path:
    """An image for most items, a few of them damaged or much larger than a shard."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n, item in enumerate(items):
        side = 60 if n % 7 == 3 else 12
        file = io.BytesIO()
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(file, "JPEG")
        if n % 6 != 5:
            data = file.getvalue()
            (folder / f"{item}.jpg").write_bytes(data[: len(data) // 2] if n % 6 == 2 else data)
    return folder


def impressions(seed: int) -> pl.LazyFrame:
    """Pages of one user each, some of which come twice, with repeated items and rows that cannot be
    used."""
    rng = np.random.default_rng(seed)
    rows = []
    for page in rng.permutation(np.arange(120)).tolist() * 2:
        user, time = f"u{page % 13}", int(rng.integers(30)) * 3600
        rows += [
            (
                f"p{page}",
                user,
                f"{rng.integers(25):03}",
                time + int(rng.integers(2)),
                bool(rng.random() < 0.2),
            )
            for _ in range(rng.integers(1, 7))
        ]
    rows[5] = (None, *rows[5][1:])
    rows[6] = (*rows[6][:3], None, True)
    return pl.LazyFrame(rows, ["page_id", "user_id", "item_id", "time", "clicked"], orient="row")


def both(
    tmp_path: Path, source: Source, options: PrepareOptions, images: Path | None = None
) -> tuple[dict[str, str], dict[str, Any]]:
    """What the engines wrote, which is the same; dataset.json, too."""
    found, reports = [], []
    for engine in ("local", "ray"):
        out = tmp_path / engine
        reports.append(prepare(out, source=source, images=images, options=options, engine=engine))
        found.append(
            digest(out) | {"dataset.json": (out / "dataset.json").read_text("utf-8")},
        )
        assert not [p for p in tmp_path.iterdir() if "partial" in p.name]
    assert found[0] == found[1]
    assert reports[0] == reports[1]
    return found[1], reports[1]


@pytest.mark.long("Ray")
def test_made_pages_with_images_and_killed_workers(
    tmp_path: Path, ray: Any, graves: Graves
) -> None:
    graves.dig("write_image_shard", "pages_of_users", "write_rows")
    events = random_events(1, users=40, items=60, n=500)
    images = drawn_images(tmp_path / "images", sorted({e[1] for e in events}))
    files, report = both(tmp_path, source_of(events), SMALL, images)
    tables = [name.split("/")[0] for name in files]
    assert min(tables.count(n) for n in ("events", "pages", "page_items", "images")) > 3
    assert report["images"]["missing"] and report["images"]["undecodable"]
    assert graves.left() == []


@pytest.mark.long("Ray")
@pytest.mark.parametrize("negatives", ["popularity", "category"])
def test_made_pages_with_every_kind_of_negatives(
    tmp_path: Path, ray: Any, graves: Graves, negatives: str
) -> None:
    events = random_events(2, users=40, items=60, n=500)
    if negatives == "popularity":
        graves.dig("moments")
    items = sorted({e[1] for e in events})
    source = source_of(events, {item: f"c{n % 5}" for n, item in enumerate(items[:-6])})
    both(tmp_path, source, replace(SMALL, negatives=negatives, repeats="keep", seed=3))
    assert graves.left() == []


@pytest.mark.long("Ray")
def test_given_pages_whole_or_cut(tmp_path: Path, ray: Any, graves: Graves) -> None:
    graves.dig("by_time")
    before = source_of(random_events(4, users=12, n=150)).events
    source = Source("test", events=before, impressions=impressions(5))
    files, report = both(tmp_path, source, replace(SMALL, keep_unclicked=True))
    assert report["pages"]["cut"] and report["pages"]["unclicked"]
    assert report["impressions"]["dropped"] == {
        "no user, item or page id": 1,
        "time missing or unreadable": 1,
    }
    assert sum(name.startswith("page_items/") for name in files) > 3
    assert graves.left() == []


@pytest.mark.long("Ray")
@pytest.mark.parametrize("split", [None, "fold"])
@pytest.mark.parametrize("views", [False, True])
def test_given_histories(
    tmp_path: Path, ray: Any, graves: Graves, views: bool, split: str | None
) -> None:
    """Of three files, whose order decides; some items without an image are in histories."""
    graves.dig("by_user", "to_users")
    (tmp_path / "log").mkdir()
    names = np.random.default_rng(0).choice(["train", "test", "validation"], (3, 90)).tolist()
    for n in range(3):
        pages = [{**page, "page": f"{n}-{page['page']}"} for page in log(n, pages=90)]
        frame = item_rows(pages, fold=names[n])
        if views:
            frame = pl.DataFrame(pages).with_columns(fold=pl.Series(names[n]))
        frame.write_parquet(tmp_path / f"log/{n}.parquet")
    columns = Columns(page="page_id", history="past", split=split)
    if views:
        columns = Columns("user", "items", history="past", split=split)
    images = drawn_images(tmp_path / "images", [str(i) for i in range(1, 36)])
    source = generic([tmp_path / "log"], None, columns)
    files, report = both(tmp_path, source, replace(SMALL, max_history=3), images)
    assert len(report["histories"]["dropped"]) == 4
    assert sum(name.startswith("events/") for name in files) > 3
    assert graves.left() == []


@pytest.mark.long("Ray")
def test_histories_of_users(tmp_path: Path, ray: Any, graves: Graves) -> None:
    graves.dig("by_user")
    (tmp_path / "published").mkdir()
    write_taobao(tmp_path / "published")
    both(tmp_path, taobao_mm(tmp_path / "published"), SMALL)
    assert graves.left() == []


@pytest.mark.long("Ray")
def test_parts_without_rows(tmp_path: Path, ray: Any, graves: Graves) -> None:
    # One user has nearly everything, at one moment.
    events = [("a", f"{n:03}", 50) for n in range(400)] + [
        ("b", f"{n:03}", 40) for n in range(390, 410)
    ]
    events += [("a", f"{n:03}", 51 + n // 100) for n in range(200)]
    options = replace(SMALL, shard_rows=1000, repeats="keep", validation_share=0, test_share=0)
    for name, kind in (("one", "popularity"), ("two", "uniform")):
        (tmp_path / name).mkdir()
        both(tmp_path / name, source_of(events), replace(options, negatives=kind))


@pytest.mark.long("Ray")
def test_a_folder_of_parquet_is_read_by_several_tasks(
    tmp_path: Path, ray: Any, graves: Graves
) -> None:
    rows = impressions(7).collect()
    for n, part in enumerate(
        rows.with_row_index().with_columns(day=pl.col("index") // 90).partition_by("day")
    ):
        file = tmp_path / "shown" / f"day={n:03}" / "part.parquet"
        file.parent.mkdir(parents=True)
        part.drop("index", "day").write_parquet(file)
    columns = Columns(time="time", page="page_id", time_format="order")
    source = generic([tmp_path / "shown"], columns=columns)
    assert len(source.parts()) == n + 1 > 5
    graves.dig("read")
    files, _ = both(tmp_path, source, replace(SMALL, keep_unclicked=True))
    assert graves.left() == []
    (tmp_path / "whole").mkdir()
    whole = Source("test", impressions=rows.lazy())
    again, _ = both(tmp_path / "whole", whole, replace(SMALL, keep_unclicked=True))
    assert {**files, "dataset.json": ""} == {**again, "dataset.json": ""}


def test_blocks_are_the_same_however_rows_come(monkeypatch: pytest.MonkeyPatch) -> None:
    frame, source = impressions(9), Source("test")
    rows = len(frame.collect())
    found = []
    for size in (7, 64, 10_000):
        monkeypatch.setattr("courier_fast.data.prepare.rows.BATCH", size)
        parts = list(steps.read([frame], "shown", source, 3, 50))
        found.append(
            [
                {
                    n: getattr(c, "tolist", c.to_pylist if n == "users" else None)()
                    for n, c in p.items()
                }
                for p in parts[::3]
            ]
        )
        assert [a["counts"]["read"] for a in parts[2::3]] == [50] * (rows // 50) + [rows % 50]
    assert found[0] == found[1] == found[2]


@pytest.mark.long("Ray")
def test_the_command_and_its_errors(
    tmp_path: Path, ray: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    clicks = tmp_path / "clicks.csv"
    rows = [f"{user},{item},{1_600_000_000 + time}" for user, item, time in random_events(6)]
    clicks.write_text("\n".join(["user_id,item_id,timestamp", *rows]))
    command = ["prepare", str(tmp_path / "a"), "--interactions", str(clicks), "--engine"]
    assert main([*command, "ray", "--min-history", "1"]) == 0
    assert (
        main([*command[:1], str(tmp_path / "b"), *command[2:], "local", "--min-history", "1"]) == 0
    )
    assert digest(tmp_path / "a") == digest(tmp_path / "b")
    capsys.readouterr()
    for text, message in (
        ("user_id,item_id,timestamp\n", "expected events, got none"),
        (
            'user_id,item_id,timestamp\na,b,1600000000\n"c,d,1600000000\n',
            "clicks.csv: cannot be read",
        ),
        ("user_id,item_id,timestamp\na,b,1600000000\n", "pages: expected at least one"),
    ):
        clicks.write_text(text)
        errors = []
        for engine in ("ray", "local"):
            assert main([*command, engine, "--overwrite"]) == 2
            errors.append(capsys.readouterr().err)
        assert message in errors[0]
        assert errors[0] == errors[1]
    assert main([*command, "local", "--ray-address", "auto"]) == 2
    assert "--ray-address: has no effect without --engine ray" in capsys.readouterr().err
    with pytest.raises(ValueError, match="engine: expected one of"):
        prepare(tmp_path / "c", source=source_of([("a", "b", 1)]), engine="spark")


def test_ids_are_found_by_their_bytes() -> None:
    rng = np.random.default_rng(0)
    letters = ["", "a", "b", "ab", "ä", "z", "日"]
    ids = ["".join(rng.choice(letters, 3)) for _ in range(200)]
    known = steps.union(steps.arrow_text(pl.Series(ids)))
    assert known.to_pylist() == sorted(set(ids), key=str.encode)
    wanted = [*ids, "", "zzzz", "zz", "aä"]
    found = steps.search(known, steps.arrow_text(pl.Series(wanted)))
    expected = [sum(k.encode() < w.encode() for k in known.to_pylist()) for w in wanted]
    assert found.tolist() == expected
    assert steps.search(known[5:9], known[3:4]).tolist() == [0]
    assert steps.search(known[:0], known[:2]).tolist() == [0, 0]


def test_both_engines_take_the_same_of_several_files(tmp_path: Path, ray: Any) -> None:
    photos = tmp_path / "photos"
    for name in ("a", "b", "."):
        (photos / name).mkdir(parents=True, exist_ok=True)
    for n in range(6):
        for size, path in (((8 + n, 6), f"a/{n}.jpg"), ((40, 30), f"b/{n}.jpg")):
            Image.new("RGB", size).save(photos / path)
        (photos / f"{n}.jpg").write_text("<html>")
    events = [(f"u{n % 3}", f"{n % 6}", 60 * n) for n in range(60)]
    options = PrepareOptions(min_history=1, repeats="keep", page_size=3)
    _, report = both(tmp_path, source_of(events), options, photos)
    assert Dataset(tmp_path / "ray").images.shapes.tolist() == [[30, 40]] * 6
    assert list(report["images"]["gave_way"]) == [str(n) for n in range(6)]
    assert "6 items have several files" in report["notes"][0]
