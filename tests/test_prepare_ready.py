"""Ready embeddings in place of images: every form of file, what is dropped and why, and training,
evaluation and CTR models on them."""

from __future__ import annotations

import json
import logging
import re
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_factory import digest, page_rows, random_events, source_of
from test_data_layouts import write_mmctr, write_taobao
from train_factory import metrics, settings

from courier_fast.cli import main
from courier_fast.data.dataset import Dataset
from courier_fast.data.embedding_store import EmbeddingStore
from courier_fast.data.embeddings import read_embeddings, read_vectors, trained_until
from courier_fast.data.prepare import vectors
from courier_fast.data.prepare.layouts import Columns, Source, generic
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.run import prepare
from courier_fast.data.prepare.vectors import EmbeddingFile
from courier_fast.train.trainer import Trainer

OPTIONS = PrepareOptions(min_history=1, repeats="keep", page_size=4)
EVENTS = random_events(1, users=12, items=25, n=300)
IDS = sorted({event[1] for event in EVENTS})
DIM = 5

Write = Callable[[Path, list[str], np.ndarray], EmbeddingFile]


def table(dtype: str = "float32", rows: int = len(IDS)) -> np.ndarray:
    rng = np.random.default_rng(0)
    if np.dtype(dtype).kind == "i":
        return rng.integers(-127, 128, (rows, DIM)).astype(dtype)
    return rng.normal(size=(rows, DIM)).astype(dtype)


def npy(folder: Path, ids: list[str], x: np.ndarray, **about: Any) -> EmbeddingFile:
    np.save(folder / "e.npy", x)
    (folder / "e.npy.json").write_text(json.dumps({"item_ids": ids, **about}))
    return EmbeddingFile(folder / "e.npy")


def parquet(
    folder: Path,
    ids: list[Any],
    rows: Any,
    *,
    kind: Any = None,
    names: tuple[str, str] = ("item_id", "embedding"),
    **given: Any,
) -> EmbeddingFile:
    """Rows may be an array, or lists with what is missing."""
    if isinstance(rows, np.ndarray):
        kind = kind or pa.list_(pa.from_numpy_dtype(rows.dtype))
        rows = list(rows)
    columns = [pa.array(ids), pa.array(rows, kind or pa.list_(pa.float32()))]
    pq.write_table(pa.table(dict(zip(names, columns, strict=True))), folder / "e.parquet")
    return EmbeddingFile(folder / "e.parquet", **given)


def store(folder: Path, ids: list[str], x: np.ndarray) -> EmbeddingFile:
    grown = EmbeddingStore(folder / "e", "sha256:" + "a" * 64, x.shape[1], None).write()
    grown.append(ids[:9], ["s"] * 9, x[:9]).append(ids[9:], ["s"] * len(ids[9:]), x[9:])
    return EmbeddingFile(folder / "e")


def kind_of(make: Callable[..., Any], *size: int) -> Write:
    def write(folder: Path, ids: list[str], x: np.ndarray) -> EmbeddingFile:
        return parquet(folder, ids, x, kind=make(pa.from_numpy_dtype(x.dtype), *size))

    return write


def ready(tmp_path: Path, file: EmbeddingFile, source: Source | None = None, **how: Any) -> Dataset:
    source = source or source_of(EVENTS)
    prepare(tmp_path / "shop", source=source, embeddings=file, options=OPTIONS, **how)
    return Dataset(tmp_path / "shop")


# ---- forms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "stored", "scale", "write"),
    [
        ("int8", "int8", 0.25, lambda f, i, x: npy(f, i, x, scale=0.25)),
        ("int8", "int8", 0.5, lambda f, i, x: replace(npy(f, i, x, scale=0.25), scale=0.5)),
        ("float16", "float16", 1, npy),
        ("float32", "float32", 1, npy),
        (">f4", "float32", 1, npy),
        ("float64", "float32", 1, lambda f, i, x: npy(f, i, np.asfortranarray(x))),
        ("int64", "float32", 1, npy),
        ("float16", "float16", 1, kind_of(pa.list_)),
        ("float32", "float32", 1, kind_of(pa.list_, DIM)),
        ("float64", "float32", 1, kind_of(pa.large_list)),
        ("int8", "int8", 1, kind_of(pa.list_, DIM)),
        ("int8", "int8", 0.1, lambda f, i, x: parquet(f, i, x, scale=0.1)),
        ("int16", "float32", 3, lambda f, i, x: parquet(f, i, x, scale=3.0)),
        ("float32", "float32", 1, store),
        ("float32", "float32", 1, lambda f, i, x: parquet(f, i, x, names=("item_id", "embedding"))),
        (
            "float32",
            "float32",
            1,
            lambda f, i, x: parquet(f, i, x, names=("id", "v"), column="v", id_column="id"),
        ),
        (
            "float32",
            "float32",
            1,
            lambda f, i, x: parquet(f, i, x, names=("item_id", "v"), column="v"),
        ),
        (
            "float16",
            "float16",
            1,
            lambda f, i, x: parquet(f, i, x, names=("item_id", "item_emb_d128")),
        ),
        (
            "float32",
            "float32",
            1,
            lambda f, i, x: parquet(f, i, x, names=("item_id", "img_emb_CLIPRN50")),
        ),
        ("int8", "int8", 1 / 127, lambda f, i, x: parquet(f, i, x, names=("205", "205_c"))),
        (
            "int8",
            "int8",
            2,
            lambda f, i, x: parquet(f, i, x, names=("205", "205_c"), scale=2.0),
        ),
    ],
)
def test_every_form(tmp_path: Path, dtype: str, stored: str, scale: float, write: Write) -> None:
    """In another order than that of the items, with others among them."""
    order = np.random.default_rng(3).permutation(len(IDS) + 4)
    ids, x = [*IDS, "x1", "x2", "x3", "x4"], table(dtype, len(IDS) + 4)
    data = ready(tmp_path, write(tmp_path, [ids[i] for i in order], x[order]))
    assert data.has_embeddings and not data.has_images
    assert data.item_ids.to_pylist() == IDS
    expected = x[: len(IDS)].astype(stored).astype(np.float32) * np.float32(scale)
    np.testing.assert_array_equal(data.read_embeddings(), expected)
    kind = data.tables["embeddings"].schema.field("embedding").type
    assert kind == pa.list_(pa.from_numpy_dtype(np.dtype(stored)), DIM)
    about = data.report["embeddings"]
    assert (about["usable"], about["missing"], about["unusable"]) == (len(IDS), [], {})
    assert (about["other_items"], about["dim"], about["dtype"]) == (4, DIM, stored)
    assert about["scale"] == pytest.approx(scale)
    assert data.verify() > data.tables["embeddings"].shards[0].bytes


def test_ids_are_the_same_whatever_type_holds_them(tmp_path: Path) -> None:
    events = [(user, str(int(item) + 1), time) for user, item, time in EVENTS]
    ids = sorted({int(event[1]) for event in events})
    x = table(rows=len(ids))
    data = ready(tmp_path, parquet(tmp_path, [float(i) for i in ids], x), source_of(events))
    where = [data.item_ids.to_pylist().index(str(i)) for i in ids]
    np.testing.assert_array_equal(data.read_embeddings()[where], x)


# ---- what is left out ----------------------------------------------------------------------------


def test_items_without_an_embedding_are_nowhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The dataset is that of the events of the other items."""
    x = table()
    rows: list[Any] = [row.tolist() for row in x]
    rows[1], rows[3] = None, []
    rows[5] = [1.0, None, 1.0, 1.0, 1.0]
    rows[7] = [1.0, float("nan"), 1.0, 1.0, 1.0]
    rows[9] = [float("inf")] * DIM
    rows[11] = [0.0] * DIM
    kept = [i for i in range(len(IDS)) if i not in (0, 1, 3, 5, 7, 9)]
    # The first item has no row; others come again, after and before what cannot be used.
    ids = [*IDS[1:], IDS[12], IDS[13], IDS[1], None, "null"]
    given = [*rows[1:], [9.0] * DIM, None, None, rows[2], rows[2]]
    file = parquet(tmp_path, [IDS[14], *ids], [[float("nan")] * DIM, *given])
    clicks = tmp_path / "clicks.parquet"
    frame = source_of(EVENTS).events.select("user_id", "item_id", timestamp="time").collect()
    frame.write_parquet(clicks)
    line = ["prepare", str(tmp_path / "shop"), "--interactions", str(clicks)]
    line += ["--time-format", "order", "--min-history", "1", "--repeats", "keep", "--page-size"]
    assert main([*line, "4", "--embeddings", str(file.path)]) == 0
    said = capsys.readouterr().out
    data = Dataset(tmp_path / "shop")
    assert data.item_ids.to_pylist() == [IDS[i] for i in kept]
    expected = x[kept].copy()
    expected[kept.index(11)] = 0
    np.testing.assert_array_equal(data.read_embeddings(), expected)
    about = data.report["embeddings"]
    assert about["missing"] == [IDS[0]]
    null, infinite = "null or empty", "not finite"
    assert about["unusable"] == {
        IDS[1]: null,
        IDS[3]: null,
        IDS[5]: null,
        IDS[7]: infinite,
        IDS[9]: infinite,
    }
    assert (about["usable"], about["zeros"], about["several_rows"]) == (len(kept), 1, 4)
    assert (about["without_id"], about["other_items"]) == (2, 0)
    lost = sum(event[1] not in {IDS[i] for i in kept} for event in EVENTS)
    assert data.report["events"]["dropped"]["item without a usable embedding"] == lost > 0
    assert f"{lost} item without a usable embedding" in said
    assert f"{len(kept)} embeddings of 5 dimensions (float32), 1 missing, 5 that cannot" in said
    assert f"{IDS[7]}: not finite" in said
    notes = "\n".join(data.report["notes"])
    assert f"2 rows of {file.path} have no id" in notes
    assert f"4 items have several rows in {file.path} (first: {IDS[1]})" in notes
    assert f"1 items have zeros alone (first: {IDS[11]})" in notes
    # The same pages as of the events of these items.
    fewer = [event for event in EVENTS if event[1] in {IDS[i] for i in kept}]
    prepare(tmp_path / "fewer", source=source_of(fewer), options=OPTIONS)
    assert page_rows(data) == page_rows(Dataset(tmp_path / "fewer"))
    assert data.num_pages > 100


def test_rows_of_minus_128_are_none(tmp_path: Path) -> None:
    x = table("int8")
    x[4] = -128
    x[6, 1:] = -128
    data = ready(tmp_path, npy(tmp_path, IDS, x))
    assert data.report["embeddings"]["unusable"] == {IDS[4]: "null or empty"}
    np.testing.assert_array_equal(data.read_embeddings(), np.delete(x, 4, 0).astype(np.float32))


def test_the_first_of_several_rows_counts(tmp_path: Path) -> None:
    x = table()
    data = ready(tmp_path, npy(tmp_path, [*IDS, IDS[3], IDS[3], IDS[5]], np.vstack([x, x[6:9]])))
    np.testing.assert_array_equal(data.read_embeddings(), x)
    assert data.report["embeddings"]["several_rows"] == 2


def test_what_overflows_by_its_scale_is_not_finite(tmp_path: Path) -> None:
    x = table()
    x[2] = 3e38
    data = ready(tmp_path, parquet(tmp_path, IDS, x, scale=2.0))
    assert data.report["embeddings"]["unusable"] == {IDS[2]: "not finite"}
    assert np.isfinite(data.read_embeddings()).all()


def test_the_newest_row_of_a_folder_counts(tmp_path: Path) -> None:
    x = table()
    file = store(tmp_path, IDS, x)
    grown = EmbeddingStore.open(file.path).delete([IDS[3], IDS[4]])
    grown = grown.append([IDS[4], IDS[5], IDS[5]], ["s"] * 3, np.arange(15.0).reshape(3, DIM))
    grown.append([IDS[6]], ["s"], np.full((1, DIM), np.nan))
    x[4], x[5] = np.arange(5), np.arange(10, 15)
    data = ready(tmp_path, file)
    about = data.report["embeddings"]
    assert about["unusable"] == {IDS[3]: "gone from the folder", IDS[6]: "not finite"}
    assert about["several_rows"] == 0
    np.testing.assert_array_equal(data.read_embeddings(), np.delete(x, [3, 6], 0))


def test_items_of_given_histories_without_an_embedding_are_dropped(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    frame = pl.DataFrame(
        {
            "user_id": [f"u{n % 4}" for n in range(40)],
            "past": [rng.choice(30, 6, replace=False).tolist() for _ in range(40)],
            "item_id": [rng.choice(30, 4, replace=False).tolist() for _ in range(40)],
            "clicked": [[1, 0, 0, 0]] * 40,
        }
    )
    frame.write_parquet(tmp_path / "views.parquet")
    source = generic([tmp_path / "views.parquet"], None, Columns(history="past"))
    file = parquet(tmp_path, [str(i) for i in range(25)], table(rows=25))
    data = ready(tmp_path, file, source)
    dropped = data.report["histories"]["dropped"]
    assert dropped["item without a usable embedding"] > 0
    assert not any("image" in why for why in dropped)
    assert data.item_ids.to_pylist() == sorted(str(i) for i in range(25))


# ---- published files -----------------------------------------------------------------------------


def test_the_file_that_mm_ctr_publishes(tmp_path: Path) -> None:
    write_mmctr(tmp_path)
    published = tmp_path / "MicroLens_1M_x1/item_info.parquet"
    line = ["prepare", str(tmp_path / "shop"), "--layout", "mmctr", "--source", str(tmp_path)]
    assert main([*line, "--min-history", "1", "--embeddings", str(published)]) == 0
    data = Dataset(tmp_path / "shop")
    np.testing.assert_array_equal(data.read_embeddings(), np.full((data.num_items, 128), 0.5))
    assert data.report["embeddings"]["columns"] == ["item_id", "item_emb_d128"]


def test_the_file_that_taobao_mm_publishes(tmp_path: Path) -> None:
    """One key comes twice; some items have no row."""
    write_taobao(tmp_path)
    ids = [*range(-15, 20), -3]
    x = np.random.default_rng(0).integers(-127, 128, (len(ids), 128)).astype(np.int8)
    frame = pl.DataFrame({"205": ids, "205_c": pl.Series(x.tolist(), dtype=pl.List(pl.Int8))})
    frame.write_parquet(tmp_path / "scl_embedding_int8_p90.parquet")
    line = ["prepare", str(tmp_path / "shop"), "--layout", "taobao-mm", "--source", str(tmp_path)]
    line += ["--min-history", "1", "--embeddings", str(tmp_path / "scl_embedding_int8_p90.parquet")]
    assert main(line) == 0
    data = Dataset(tmp_path / "shop")
    rows = [ids.index(int(i)) for i in data.item_ids.to_pylist()]
    np.testing.assert_array_equal(
        data.read_embeddings(), x[rows].astype(np.float32) * np.float32(1 / 127)
    )
    about = data.report["embeddings"]
    assert about["several_rows"] == 1
    assert len(about["missing"]) + data.num_items == 45 - 1  # 0 is no item
    assert {int(i) for i in about["missing"]} == set(range(20, 30))


# ---- errors --------------------------------------------------------------------------------------


def lengths(folder: Path) -> EmbeddingFile:
    rows = [row.tolist() for row in table()]
    rows[8] = rows[8][:-1]
    return parquet(folder, IDS, rows)


def cut(file: EmbeddingFile) -> EmbeddingFile:
    path = Path(file.path)
    path.write_bytes(path.read_bytes()[:-20])
    return file


def without_ids(folder: Path) -> EmbeddingFile:
    file = npy(folder, IDS, table())
    (folder / "e.npy.json").unlink()
    return file


def altered(folder: Path) -> EmbeddingFile:
    file = store(folder, IDS, table())
    part = folder / "e/part-00001.parquet"
    part.write_bytes(part.read_bytes().replace(b"item_id", b"item_ie", 1))
    return file


NO_FIT = r"expected ids of items of the interactions, got none that fits in .*e.parquet: 'a7', "


def archive(folder: Path) -> EmbeddingFile:
    """An .npz under another name."""
    found = npy(folder, IDS, table())
    with open(found.path, "wb") as file:
        np.savez(file, table())
    return found


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (without_ids, r"expected item_ids in .*e.npy.json, got none; .parquet has them within"),
        (lambda f: npy(f, IDS[1:], table()), r"expected \[\d+, D\] in .*e.npy, a row for each"),
        (lambda f: npy(f, IDS, table().astype(str)), "expected numbers in .*e.npy, got <U"),
        (
            lambda f: npy(f, IDS, table().astype("O")),
            "is no .npy file of numbers: .*Python objects",
        ),
        (lambda f: npy(f, IDS, table("int8"), scale=0), "expected a positive number as scale in"),
        (lambda f: cut(npy(f, IDS, table())), "e.npy was cut off or is no .npy file of numbers"),
        (archive, "e.npy was cut off or is no .npy file of numbers"),
        (lambda f: cut(parquet(f, IDS, table())), "e.parquet cannot be read as Parquet"),
        (altered, "part-00001.parquet was altered: expected sha256:"),
        (lengths, "expected rows of one length, got rows of 4, 5 numbers in .*e.parquet"),
        (
            lambda f: parquet(f, IDS, IDS, kind=pa.string()),
            "expected lists of numbers in the column embedding of .*e.parquet, got string",
        ),
        (
            lambda f: parquet(f, IDS, table(), names=("id", "vector")),
            "expected the columns item_id and embedding in .*e.parquet, got id, vector; "
            "--embedding-id-column and --embedding-column name others",
        ),
        (
            lambda f: parquet(f, IDS, table(), names=("id", "vector"), column="vector"),
            "expected the columns item_id and vector in .*e.parquet, got id, vector$",
        ),
        (
            lambda f: replace(npy(f, IDS, table()), column="v"),
            "embedding_column, embedding_id_column: expected a .parquet file with them, got .*npy",
        ),
        (
            lambda f: parquet(f, [f"a{i}" for i in range(7, 20)], table(rows=13)),
            NO_FIT + f"'a8', 'a9' against '{IDS[0]}'",
        ),
        (
            lambda f: parquet(f, IDS, [None] * len(IDS)),
            rf"at least one that can be used in .*e.parquet, got none; of {len(IDS)} items, 0 have "
            rf"no row and {len(IDS)} one that is null or empty",
        ),
        (
            lambda f: parquet(f, IDS[:3], np.full((3, DIM), np.nan, np.float32)),
            rf"of {len(IDS)} items, {len(IDS) - 3} have no row and 3 one that is not finite",
        ),
        (
            lambda f: parquet(f, [None, "null"], table(rows=2)),
            "expected rows with ids in .*e.parquet, got none",
        ),
        (
            lambda f: parquet(f, [0.5, 1.5], table(rows=2)),
            r"e.parquet: item_id: expected ids \(text or whole numbers\), got the numbers 0.5, 1.5",
        ),
    ],
)
def test_what_is_wrong_is_named(
    tmp_path: Path, make: Callable[[Path], EmbeddingFile], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        ready(tmp_path, make(tmp_path))
    left = {p.name.split(".")[0] for p in tmp_path.iterdir()}
    assert left <= {"e"}  # no dataset, and nothing half written


def test_wrong_arguments(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = parquet(tmp_path, IDS, table())
    with pytest.raises(ValueError, match="images, embeddings: expected one of them, got both"):
        ready(tmp_path, file, images=tmp_path)
    for scale in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="embedding_scale: expected a positive number, got"):
            replace(file, scale=scale)
    for path in (tmp_path / "e.npz", tmp_path / "no.parquet", tmp_path / "no.npy"):
        with pytest.raises(FileNotFoundError, match=f"expected a .npy .*got {path}"):
            ready(tmp_path, EmbeddingFile(path))
    (tmp_path / "e.csv").write_text("item_id,embedding\n")
    with pytest.raises(ValueError, match="expected a .npy or .parquet file, got .*e.csv"):
        ready(tmp_path, EmbeddingFile(tmp_path / "e.csv"))
    with pytest.raises(FileNotFoundError, match="expected a folder that `courier-fast embed`"):
        ready(tmp_path, EmbeddingFile(tmp_path))
    (tmp_path / "c.csv").write_text("user_id,item_id,timestamp\n")
    line = ["prepare", str(tmp_path / "out"), "--interactions", str(tmp_path / "c.csv")]
    both = ["--embeddings", str(file.path), "--images", str(tmp_path)]
    assert main([*line, *both]) == 2
    assert "images, embeddings: expected one of them, got both" in capsys.readouterr().err
    # Nothing is written into the folder of what is read, and a dataset may be replaced.
    with pytest.raises((ValueError, FileExistsError), match="out: "):
        prepare(tmp_path / "e.parquet", source=source_of(EVENTS), embeddings=file)
    ready(tmp_path, file)
    prepare(
        tmp_path / "shop",
        source=source_of(EVENTS),
        embeddings=file,
        options=replace(OPTIONS, overwrite=True),
    )


# ---- how it is read and written ------------------------------------------------------------------


@pytest.mark.parametrize("write", [npy, parquet, store])
def test_small_batches_and_shards_change_nothing(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = table()
    x[4] = np.nan
    file = write(tmp_path, IDS[::-1], x[::-1])
    whole = ready(tmp_path, file)
    monkeypatch.setattr(vectors, "ROWS", 3)
    prepare(tmp_path / "again", source=source_of(EVENTS), embeddings=file, options=OPTIONS)
    assert digest(tmp_path / "again") == digest(tmp_path / "shop")
    options = replace(OPTIONS, shard_bytes=7 * DIM * 4)
    prepare(tmp_path / "small", source=source_of(EVENTS), embeddings=file, options=options)
    small = Dataset(tmp_path / "small")
    sizes = [shard.rows for shard in small.tables["embeddings"].shards]
    assert sizes == [7] * (len(sizes) - 1) + [(len(IDS) - 1) % 7 or 7] and len(sizes) > 2
    np.testing.assert_array_equal(small.read_embeddings(), whole.read_embeddings())


@pytest.mark.parametrize("write", [npy, kind_of(pa.list_)])
def test_memory_is_that_of_a_batch(
    tmp_path: Path, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vectors, "ROWS", 64)
    ids = [*IDS, *(f"x{n}" for n in range(10_000))]
    x = np.random.default_rng(0).normal(size=(len(ids), 512)).astype(np.float32)
    file = write(tmp_path, ids, x)
    size, x = x.nbytes, x[: len(IDS)]
    ready(tmp_path, file)  # what is compiled and imported once
    options = replace(OPTIONS, overwrite=True, shard_bytes=1 << 16)
    before = pa.total_allocated_bytes()
    most = 0

    def watched(batch: Any) -> Any:
        nonlocal most
        most = max(most, pa.total_allocated_bytes() - before)
        return batch

    judged = vectors.Vectors.judged
    monkeypatch.setattr(vectors.Vectors, "judged", lambda *given: watched(judged(*given)))
    tracemalloc.start()
    try:
        prepare(tmp_path / "shop", source=source_of(EVENTS), embeddings=file, options=options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < size / 4
    assert peak < size / 2
    np.testing.assert_array_equal(Dataset(tmp_path / "shop").read_embeddings(), x)


def test_damage_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ready(tmp_path, parquet(tmp_path, IDS, table()))
    about = tmp_path / "shop/dataset.json"
    text = about.read_text()
    about.write_text(text.replace('"scale"', '"scala"'))
    with pytest.raises(ValueError, match="dataset.json was altered: expected the scale of the emb"):
        Dataset(data.path).read_embeddings()
    about.write_text(text)
    shard = tmp_path / "shop/embeddings/00000.arrow"
    raw = bytearray(shard.read_bytes())
    raw[len(raw) // 2] ^= 1
    shard.write_bytes(raw)
    assert main(["verify", str(data.path)]) == 2
    assert "embeddings/00000.arrow" in capsys.readouterr().err
    with pytest.raises(ValueError, match="embeddings/00000.arrow"):
        Dataset(data.path).read_embeddings()


def test_an_object_store_has_them_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("fsspec")
    monkeypatch.setenv("COURIER_FAST_CACHE", str(tmp_path / "cache"))
    file, options = npy(tmp_path, IDS, table("int8"), scale=0.5), replace(OPTIONS, shard_bytes=40)
    prepare("memory://ready", source=source_of(EVENTS), embeddings=file, options=options)
    data = Dataset("memory://ready")
    assert len(data.tables["embeddings"].shards) > 2
    np.testing.assert_array_equal(data.read_embeddings(), table("int8") * np.float32(0.5))
    assert data.verify() > 0


@pytest.mark.long("Ray")
def test_ray_writes_the_same_bytes(tmp_path: Path, ray: Any) -> None:
    x = table()
    x[3] = np.inf
    file = parquet(tmp_path, [*IDS[2:], IDS[5]], [*x[2:], None])
    options = replace(OPTIONS, shard_rows=37, shard_bytes=100)
    found = []
    for engine in ("local", "ray"):
        out = tmp_path / engine
        report = prepare(
            out, source=source_of(EVENTS), embeddings=file, options=options, engine=engine
        )
        found.append((digest(out), (out / "dataset.json").read_text(), report))
    assert found[0] == found[1]
    assert sum(name.startswith("embeddings/") for name in found[1][0]) > 2


# ---- training, evaluation, CTR models ------------------------------------------------------------


@pytest.fixture
def shop(tmp_path: Path) -> Dataset:
    """Two items have no embedding."""
    source = source_of(EVENTS, {item: f"c{n % 3}" for n, item in enumerate(IDS)})
    return ready(tmp_path, parquet(tmp_path, IDS[2:], table("int8")[2:], scale=0.1), source)


def run_of(data: Dataset, out: Path, **how: Any) -> list[dict[str, Any]]:
    trainer = Trainer(settings(data, out, optim__epochs=1, **how))
    trainer.fit()
    trainer.close()
    return metrics(out)


def as_file(data: Dataset, path: Path) -> Path:
    """The dataset's own embeddings as a file of rows in the order of its items."""
    np.save(path, data.read_embeddings())
    return path


def test_training_is_that_on_a_file_of_features(
    shop: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    features = as_file(shop, tmp_path / "f.npy")
    lines = run_of(shop, tmp_path / "own")
    assert lines == run_of(shop, tmp_path / "file", data__features=features)
    assert len(lines) > 1 and np.isfinite(lines[-1]["loss"])
    found = []
    for run in ("own", "file"):
        out = tmp_path / f"{run}.npy"
        line = ["embed", "--run", str(tmp_path / run), "--dataset", str(shop.path)]
        assert main([*line, "--out", str(out), "--device", "cpu"]) == 0
        found.append(read_embeddings(out, shop))
    np.testing.assert_array_equal(*found)
    assert found[0].shape == (shop.num_items, 8) and np.isfinite(found[0]).all()
    # A run goes on with the same embeddings, wherever they are, and with no others.
    trainer = Trainer(settings(shop, tmp_path / "own", optim__epochs=1, data__features=features))
    trainer.close()
    np.save(features, shop.read_embeddings()[::-1])
    with pytest.raises(ValueError, match="begun with another data.features"):
        Trainer(settings(shop, tmp_path / "own", optim__epochs=1, data__features=features))
    run_of(shop, tmp_path / "other", data__features=features)
    with pytest.raises(ValueError, match="got the embeddings of data.dataset .checksum"):
        Trainer(settings(shop, tmp_path / "other", optim__epochs=1))


def test_what_needs_images_is_refused(
    shop: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train = ["train", "--data.dataset", str(shop.path), "--run.out", str(tmp_path / "run")]
    for option in (["--data.size", "64"], ["--model.backbone", "small_conv"]):
        assert main([*train, *option]) == 2
        said = "has no effect with a dataset of embeddings: no image is read"
        assert f"{option[0][2:]}: {said}" in capsys.readouterr().err
    assert main([*train, "--model.shard", "true"]) == 2
    assert "model.shard: expected images with it, got" in capsys.readouterr().err
    sweep = ["sweep", "--data.dataset", str(shop.path), "--out", str(tmp_path / "sweep")]
    assert main([*sweep, "--data.size", "32", "64"]) == 2
    assert "data.size: has no effect with a dataset of embed" in capsys.readouterr().err
    assert not (tmp_path / "run").exists() and not (tmp_path / "sweep").exists()
    judge = ["evaluate", "--dataset", str(shop.path)]
    for option, said in (
        (["--size", "64"], "--size: has no effect with --dataset"),
        (["--batch", "9"], "--batch: has no effect without --run, --embeddings or --backbone"),
        (["--backbone", "small_conv"], "images: .* has none"),
        (["--baselines", "pixels"], "images: .* has none"),
        (["--score", "click"], "--score click: expected --run, whose click head ranks, got none"),
    ):
        assert main([*judge, *option]) == 2
        assert re.search(said, capsys.readouterr().err)
    assert main(["report", "--dataset", str(shop.path)]) == 2
    assert "--run, --embeddings: expected one of them, got neither" in capsys.readouterr().err


def test_evaluate(shop: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its own embeddings are the main method, or else the baseline of the backbone."""
    run_of(shop, tmp_path / "run")
    features = as_file(shop, tmp_path / "features.npy")

    def judged(*what: str) -> dict[str, Any]:
        line = ["evaluate", "--dataset", str(shop.path), "--count", "6", "--bootstrap", "20"]
        out = tmp_path / "r.json"
        assert main([*line, *what, "--device", "cpu", "--json", str(out)]) == 0
        rows = json.loads(out.read_text())["sets"]["sampled"]["methods"]
        # Ends of intervals are sums over all methods at once, and may be rounded otherwise.
        return {n: {metric: of["mean"] for metric, of in row.items()} for n, row in rows.items()}

    own, scaled = "ready embeddings", "ready embeddings, standardised"
    alone = judged()
    assert list(alone) == [own, "random", "popularity", scaled]
    beside = judged("--embeddings", str(features))
    assert list(beside) == ["features", "random", "popularity", own, scaled]
    assert beside["features"] == beside[own] == alone[own] and beside[scaled] == alone[scaled]
    assert alone[own] != alone["random"]
    by_run = judged("--run", str(tmp_path / "run"))
    assert list(by_run) == ["trained", "random", "popularity", own, scaled]
    assert by_run[own] == alone[own] and by_run[scaled] == alone[scaled]
    assert list(judged("--baselines", "random")) == [own, "random"]
    assert judged("--embeddings", str(shop.path), "--baselines", "random")["shop"] == alone[own]


def test_runs_and_datasets_that_do_not_fit(
    shop: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_of(shop, tmp_path / "run")
    prepare(tmp_path / "plain", source=source_of(EVENTS), options=OPTIONS)
    wide = parquet(tmp_path, IDS, np.ones((len(IDS), 7), np.float32))
    prepare(tmp_path / "wide", source=source_of(EVENTS), embeddings=wide, options=OPTIONS)
    for what, said in (
        (["plain"], "expected one of them, got neither, and .*plain has no embeddings of its own"),
        (["plain", "--run"], "or a dataset with embeddings .*, got neither: .*plain has none"),
        (["wide", "--run"], "expected embeddings of 5 dimensions, as .*run was trained on, got 7"),
        (["shop", "--embeddings", "plain"], "embeddings: .*plain has none of its own"),
        (["plain", "--embeddings", "wide"], None),
    ):
        line = ["evaluate", "--dataset", str(tmp_path / what[0]), *what[1:2]]
        line += ["run"] if what[1:] == ["--run"] else what[2:]
        line[-1] = str(tmp_path / line[-1])
        assert main([*line, "--device", "cpu", "--bootstrap", "5"]) == (2 if said else 0)
        assert not said or re.search(said, capsys.readouterr().err)
    ids, found, space = read_vectors(tmp_path / "wide")
    assert ids.to_pylist() == IDS and found.shape == (len(IDS), 7) and space is None
    assert trained_until(tmp_path / "wide") is None


def test_ctr(
    shop: Dataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("faiss")
    caplog.set_level(logging.INFO, "courier_fast")
    line = ["ctr", "--dataset", str(shop.path), "--out", str(tmp_path / "ctr")]
    line += ["--protocol", "shared", "--models", "din", "--forms", "vector", "--epochs", "1"]
    line += ["--seeds", "1"]
    assert main(line) == 0
    rows = json.loads((tmp_path / "ctr/ctr.json").read_text())
    assert "ready" in json.dumps(rows)
    # The cells are those of the same embeddings by name: nothing is left to be trained.
    assert main([*line, "--embeddings", f"ready={shop.path}"]) == 0
    cells = len(list((tmp_path / "ctr/cells").iterdir()))
    assert f"{cells} of {cells} cells were there already" in caplog.text
    source = source_of(EVENTS, dict.fromkeys(IDS, "c"))
    prepare(tmp_path / "plain", source=source, options=OPTIONS)
    line[2] = str(tmp_path / "plain")
    assert main(line) == 2
    assert "embeddings: expected --embeddings, got none" in capsys.readouterr().err
