"""One text per id whatever a file stores it in, and what means that there is none."""

from __future__ import annotations

import unicodedata
import uuid
from collections import Counter
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from courier_fast.data.dataset import Dataset
from courier_fast.data.embeddings import read_embeddings, read_parquet
from courier_fast.data.prepare.layouts import generic
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.rows import clean
from courier_fast.data.prepare.run import prepare
from courier_fast.data.read.ids import MISSING, array, as_text, one, text, written_as_floats

UUID = uuid.UUID("12345678-1234-4678-9234-567812345678")
NOON = 1_600_000_000


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (pa.array([7, 2**62]), ["7", str(2**62)]),
        (pa.array([2**64 - 1], pa.uint64()), [str(2**64 - 1)]),
        (pa.array([7.0, 1e15, None, float("nan")]), ["7", "1000000000000000", None, None]),
        (pa.array([7.0], pa.float32()), ["7"]),
        (pa.array([Decimal(7), Decimal(-10)], pa.decimal128(38, 18)), ["7", "-10"]),
        (pa.array([Decimal(70)], pa.decimal128(10, 0)), ["70"]),
        (
            pa.array(["0007", " 7\u00a0", "\ufeff7\u200b", "7.0", "1e3"]),
            ["0007", "7", "7", "7.0", "1e3"],
        ),
        (pa.array(["e\u0301"]), ["\u00e9"]),
        (pa.array(["7  "], pa.large_string()), ["7"]),
        (pa.array(["7\t"], pa.string_view()), ["7"]),
        (pa.array(["7", "b", "7"]).dictionary_encode(), ["7", "b", "7"]),
        (pa.array([b"7 ", "\u00e9".encode()]), ["7", "\u00e9"]),
        (pa.array([b"7\0\0\0"], pa.binary(4)), ["7"]),
        (pa.array([UUID.bytes], pa.binary(16)), [str(UUID)]),
    ],
)
def test_one_text_whatever_the_type(
    values: pa.Array, ids: list[str | None], tmp_path: Path
) -> None:
    assert array(values, "").to_pylist() == ids
    pq.write_table(pa.table({"c": values}), tmp_path / "x.parquet")
    frame = pl.scan_parquet(tmp_path / "x.parquet").select(text("c", "id"))
    assert frame.collect(engine="streaming")["id"].to_list() == ids


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1.5, 2.0], "got the numbers 1.5"),
        ([float("inf")], "got the numbers inf"),
        ([2.0**60], r"exactly, up to 2\^53, got 1152921504606846976"),
        ([Decimal("1.5")], "got the numbers 1.5"),
        ([[1]], "got a column of List"),
        ([b"\xff"], "UTF-8 text or UUIDs"),
    ],
)
def test_what_is_no_id_is_refused(values: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^a.csv: user: expected ids .*{message}"):
        as_text(pl.Series(values), "a.csv: user")


def test_text_that_pandas_wrote_as_floats() -> None:
    def whole(*values: str | None) -> bool:
        return written_as_floats(pl.LazyFrame({"a": pl.Series(values, dtype=pl.String)}), "a")

    assert whole("1.0", "20.0", "", None, "NULL")
    assert not whole("1.0", "2")
    assert not whole(*["1.0"] * 2000, "x")
    assert not whole(None, "")
    assert not whole("1.50")
    assert as_text(pl.Series(["1.0", "NULL"]), whole=True).to_list() == ["1", "NULL"]


def test_words_for_missing_were_users() -> None:
    words = [w for w in MISSING if w]
    users = [*words, None, "", "none", "Nullson", "0", "-"]
    batch = pl.DataFrame(
        {"user_id": users, "item_id": ["a"] * len(users), "time": [NOON] * len(users)}
    )
    counts: Counter[str] = Counter()
    assert clean(batch, counts)["user_id"].to_list() == ["none", "Nullson", "0", "-"]
    assert counts.pop("read") == len(users)
    assert counts.pop("no user, item or page id") == 1
    assert {k: n for k, n in counts.items() if n} == {
        f'a missing id, user_id "{w}"': 1 for w in MISSING
    }


def rows(kind: Any = str, pad: str = "") -> dict[str, list[Any]]:
    """Six users, ten items, a click a minute."""
    n = range(180)
    return {
        "user_id": [kind(i % 6 + 1) if kind is not str else f"{i % 6 + 1}{pad}" for i in n],
        "item_id": [f"{(i * 7 + i // 6) % 10:03}" for i in n],
        "timestamp": [NOON + 60 * i for i in n],
    }


OPTIONS = PrepareOptions(min_history=1, repeats="keep")


def test_ids_of_two_types_were_two_users(tmp_path: Path) -> None:
    """Whole numbers, floats, decimals, padded text and what pandas writes of floats, a file each:
    the same users, in both engines' steps."""
    files = []
    for n, made in enumerate((rows(int), rows(float), rows(Decimal), rows(str, "  "))):
        files.append(tmp_path / f"{n}.parquet")
        made["timestamp"] = [t + n for t in made["timestamp"]]
        pq.write_table(pa.table(made), files[-1])
    files.append(tmp_path / "pandas.csv")
    frame = pl.DataFrame(rows(float) | {"user_id": [None, *map(float, rows(int)["user_id"][1:])]})
    frame.write_csv(files[-1])
    report = prepare(tmp_path / "out", source=generic(files), options=OPTIONS)
    data = Dataset(tmp_path / "out")
    assert data.user_ids.to_pylist() == list("123456")
    assert data.item_ids.to_pylist() == [f"{i:03}" for i in range(10)]
    assert report["events"]["dropped"]["no user, item or page id"] == 1


def test_composed_and_decomposed_names_are_one(tmp_path: Path) -> None:
    """macOS writes file names decomposed; a table of items and padded categories fit as well."""
    table = rows()
    table["item_id"] = [f"é{i}" for i in table["item_id"]]
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    photos = tmp_path / "photos"
    photos.mkdir()
    names = sorted(set(table["item_id"]))
    for name in names:
        Image.new("RGB", (8, 8)).save(photos / (unicodedata.normalize("NFD", name) + ".jpg"))
    about = pa.table(
        {
            "item_id": [unicodedata.normalize("NFD", n) + " " for n in names],
            "category": ["hat ", "NULL"] * 5,
        }
    )
    pq.write_table(about, tmp_path / "items.parquet")
    source = generic([tmp_path / "a.parquet"], tmp_path / "items.parquet")
    report = prepare(tmp_path / "out", source=source, images=photos, options=OPTIONS)
    assert report["images"]["usable"] == 10
    data = Dataset(tmp_path / "out")
    assert data.categories.to_pylist() == ["hat", None] * 5
    vectors = {
        "item_id": [unicodedata.normalize("NFD", n) for n in names],
        "embedding": [[float(i), 1.0] for i in range(10)],
    }
    pq.write_table(pa.table(vectors), tmp_path / "e.parquet")
    assert read_embeddings(tmp_path / "e.parquet", data)[:, 0].tolist() == list(range(10))
    assert one(f" {unicodedata.normalize('NFD', names[0])}\ufeff") == names[0]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("ids")
    pq.write_table(pa.table(rows()), folder / "a.parquet")
    prepare(folder / "out", source=generic([folder / "a.parquet"]), options=OPTIONS)
    return Dataset(folder / "out")


def test_embeddings_with_ids_as_numbers_fitted_nothing(dataset: Dataset, tmp_path: Path) -> None:
    def write(**columns: Any) -> Path:
        path = tmp_path / "e.parquet"
        pq.write_table(pa.table(columns), path)
        return path

    vectors = np.eye(10).tolist()
    numbers = write(item_id=list(range(10)), embedding=vectors)
    with pytest.raises(
        ValueError,
        match=r"none that fits in .*e.parquet: '0', '1', '2' against '000', '001', '002' \(leading "
        r"zeros",
    ):
        read_embeddings(numbers, dataset)
    padded = write(item_id=[f"{i:03} " for i in range(10)], embedding=vectors)
    assert np.array_equal(read_embeddings(padded, dataset), np.eye(10, dtype=np.float32))
    for bad, message in (
        (
            {"item_id": ["000"], "embedding": ["1 2"]},
            r"lists of numbers in the column embedding of .*e.parquet, got string",
        ),
        (
            {"item_id": ["000"], "vector": [[1.0]]},
            r"columns item_id and embedding in .*e.parquet, got item_id, vector",
        ),
        ({"item_id": [0.5], "embedding": [[1.0]]}, r"e.parquet: item_id: expected ids"),
        ({"item_id": ["000", "000 "], "embedding": [[1.0], [2.0]]}, r"got 000 twice"),
    ):
        with pytest.raises(ValueError, match=message):
            read_embeddings(write(**bad), dataset)
    (tmp_path / "e.parquet").write_bytes(b"no")
    with pytest.raises(ValueError, match=r"e.parquet cannot be read as Parquet"):
        read_embeddings(tmp_path / "e.parquet", dataset)
    ids, table = read_parquet(write(item_id=[7.0, None], embedding=[[1.0, 2.0], [3.0, 4.0]]))
    assert (ids.to_pylist(), table.tolist()) == (["7"], [[1.0, 2.0]])
