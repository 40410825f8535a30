"""Folders of embeddings: what is new is appended, what is there stays, and vectors of two encoders
do not mix."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_factory import make_dataset
from torch import Tensor, nn

from courier_fast.data.dataset import Dataset
from courier_fast.data.embedding_store import EmbeddingStore, to_int8
from courier_fast.data.embeddings import (
    read_embeddings,
    read_npy,
    read_parquet,
    read_vectors,
    trained_until,
)
from courier_fast.embed import command as embed_command
from courier_fast.embed.grow import embed_new, rows_since
from courier_fast.embed.sources import FeatureRows

SPACE = "sha256:" + "a" * 64


class Double(nn.Module):
    """Features [n, 3] to twice them; counts the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.dim, self.rows = 3, 0
        self.about = {"trained_until": 7}

    def forward(self, x: Tensor) -> Tensor:
        self.rows += len(x)
        return 2 * x


def source(names: str, seed: int = 0, changed: str = "") -> FeatureRows:
    """A row for each letter, always the same for a letter, but where it has changed."""
    rows = [np.random.default_rng([ord(c), c in changed, seed]).normal(size=3) for c in names]
    return FeatureRows(np.array(rows, np.float32), list(names))


def interrupted(monkeypatch: pytest.MonkeyPatch, more: FeatureRows) -> None:
    """Its third batch is, once."""
    calls = 0

    def load(rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return FeatureRows.load(more, rows)

    monkeypatch.setattr(more, "load", load)


def checksums(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.glob("part-*"))}


def test_only_what_is_new_or_changed_is_encoded(tmp_path: Path) -> None:
    encoder, folder = Double(), tmp_path / "e"
    embed_new(encoder, source("abcde"), folder, space=SPACE)
    before = checksums(folder)
    assert encoder.rows == 5
    later = source("abcdefg", changed="bd")
    store, report = embed_new(encoder, later, folder, space=SPACE, only_new=True)
    assert report is not None and report.rows == 4 and encoder.rows == 9
    assert {n: b for n, b in checksums(folder).items() if n in before} == before
    ids, rows = EmbeddingStore.open(folder).read()
    whole = embed_new(encoder, later, tmp_path / "whole", space=SPACE)[0].read()
    order, other = np.argsort(ids.to_pylist()), np.argsort(whole[0].to_pylist())
    assert ids.take(order).to_pylist() == whole[0].take(other).to_pylist() == list("abcdefg")
    np.testing.assert_array_equal(rows[order], whole[1][other])
    assert store.rows == 9 and store.trained_until == trained_until(folder) == 7
    assert embed_new(encoder, later, folder, space=SPACE, only_new=True)[1] is None
    assert sorted(p.name for p in folder.iterdir()) == [
        "manifest.json",
        "part-00000.parquet",
        "part-00001.parquet",
    ]


def test_rows_that_are_not_looked_at_are_not_encoded(tmp_path: Path) -> None:
    encoder = Double()
    seen = np.array(["2024-01-01", "2024-03-01", "2024-02-01"], "datetime64[s]").astype(np.int64)
    rows = rows_since(seen, "2024-02-01")
    assert rows.tolist() == [1, 2]
    store, _ = embed_new(encoder, source("abc"), tmp_path / "e", space=SPACE, rows=rows)
    assert store.read()[0].to_pylist() == ["b", "c"]
    with pytest.raises(ValueError, match="since: expected a date"):
        rows_since(seen, "soon")


def test_a_run_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, encoder = tmp_path / "e", Double()
    embed_new(encoder, source("abc"), folder, space=SPACE)
    more = source("abcdefghij")
    interrupted(monkeypatch, more)
    how = {"space": SPACE, "only_new": True, "batch": 2, "save_seconds": 0.0}
    with pytest.raises(KeyboardInterrupt):
        embed_new(encoder, more, folder, **how)
    assert EmbeddingStore.open(folder).read()[0].to_pylist() == list("abc")
    encoder.rows = 0
    _, report = embed_new(encoder, more, folder, **how)
    assert report is not None and report.resumed == 7 - encoder.rows > 0
    ids, rows = EmbeddingStore.open(folder).read()
    assert ids.to_pylist() == list("abcdefghij")
    np.testing.assert_array_equal(rows, 2 * more.table)


def test_items_that_are_gone_and_come_back(tmp_path: Path) -> None:
    encoder, folder = Double(), tmp_path / "e"
    embed_new(encoder, source("abcde"), folder, space=SPACE)
    before = checksums(folder)
    again: dict[str, Any] = {"space": SPACE, "only_new": True}
    store, report = embed_new(encoder, source("ace"), folder, **again)
    assert report is None and store.read()[0].to_pylist() == list("abcde")  # unless it is asked for
    store, report = embed_new(encoder, source("acef"), folder, remove_missing=True, **again)
    assert report is not None and report.rows == 1
    assert store.read()[0].to_pylist() == store.ids.to_pylist() == list("acef")
    assert {n: b for n, b in checksums(folder).items() if n in before} == before
    count = encoder.rows
    assert embed_new(encoder, source("acef"), folder, remove_missing=True, **again) == (store, None)
    store, _ = embed_new(encoder, source("abcef"), folder, remove_missing=True, **again)
    assert encoder.rows == count + 1  # b, though it was there once
    ids, rows = EmbeddingStore.open(folder).read()
    assert sorted(ids.to_pylist()) == list("abcef")
    whole = source("".join(ids.to_pylist()))
    np.testing.assert_array_equal(rows, 2 * whole.table)


def test_a_folder_is_made_compact(tmp_path: Path) -> None:
    encoder, folder = Double(), tmp_path / "e"
    embed_new(encoder, source("abc"), folder, space=SPACE)
    embed_new(encoder, source("abd", changed="a"), folder, space=SPACE, only_new=True)
    store, _ = embed_new(
        encoder, source("ab", changed="a"), folder, space=SPACE, only_new=True, remove_missing=True
    )
    ids, rows = store.read()
    assert len(store.parts) == 3
    first = store.parts[0]["name"]
    data = (folder / first).read_bytes()
    (folder / first).write_bytes(data[:-1] + b"x")
    with pytest.raises(ValueError, match=rf"{first} was altered"):
        store.compact()
    (folder / first).write_bytes(data)
    small = store.compact()
    assert list(checksums(folder)) == ["part-00003.parquet"]
    assert small.rows == 2 and small == EmbeddingStore.open(folder) == small.compact()
    assert small.read()[0].to_pylist() == ids.to_pylist()
    np.testing.assert_array_equal(small.read()[1], rows)
    assert (
        embed_new(encoder, source("ab", changed="a"), folder, space=SPACE, only_new=True)[1] is None
    )
    made = pq.read_table(folder / "part-00003.parquet")["encoded_at"]
    assert made.null_count == 0


# ---- smaller numbers -----------------------------------------------------------------------------


def steps_of(rows: np.ndarray, dtype: str) -> np.ndarray:
    """What a stored number may be off by: half a step."""
    if dtype == "float16":
        return np.maximum(np.abs(rows) * 2.0**-11, 2.0**-25)
    return np.abs(rows).max(1, keepdims=True) / 127 / 2 * (1 + 1e-5)


def stored(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """The parts but for the time at which they were made."""
    return {
        p.name: pq.read_table(p).drop(["encoded_at"]).to_pydict()
        for p in sorted(folder.glob("part-*"))
    }


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_folder_of_smaller_numbers_grows(tmp_path: Path, dtype: str) -> None:
    encoder, folder = Double(), tmp_path / "e"
    embed_new(encoder, source("abcde"), folder, space=SPACE, numbers=dtype)
    about = json.loads((folder / "manifest.json").read_text())
    assert (about["format"], about["dtype"]) == (2, dtype)
    before = checksums(folder)
    later = source("acdefg", changed="d")
    later.table[5] *= 1000  # more than any before it: nothing is cut off
    again: dict[str, Any] = {"space": SPACE, "only_new": True}
    store, report = embed_new(encoder, later, folder, remove_missing=True, **again)
    assert report is not None and report.rows == 3 and store.dtype == dtype
    assert {n: b for n, b in checksums(folder).items() if n in before} == before
    ids, rows = EmbeddingStore.open(folder).read()
    assert rows.dtype == np.float32 and sorted(ids.to_pylist()) == list("acdefg")
    expected = 2 * later.table[["acdefg".index(i) for i in ids.to_pylist()]]
    off = np.abs(rows - expected)
    assert (off <= steps_of(expected, dtype)).all() and off.max() > 0
    kind = pq.read_schema(folder / "part-00002.parquet").field("embedding").type.value_type
    assert np.dtype(kind.to_pandas_dtype()) == dtype
    small = store.compact()
    assert small == EmbeddingStore.open(folder) and len(small.parts) == 1
    assert small.read()[0].to_pylist() == ids.to_pylist()
    np.testing.assert_array_equal(small.read()[1], rows)  # not rounded once more
    with pytest.raises(ValueError, match=f"dtype: expected {dtype}, that of the folder .*float32"):
        embed_new(encoder, later, folder, numbers="float32", **again)
    assert embed_new(encoder, later, folder, numbers=dtype, **again)[1] is None


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_a_killed_run_of_smaller_numbers_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    how: dict[str, Any] = {"space": SPACE, "batch": 2, "save_seconds": 0.0, "numbers": dtype}
    more = source("abcdefghij")
    interrupted(monkeypatch, more)
    with pytest.raises(KeyboardInterrupt):
        embed_new(Double(), more, tmp_path / "killed", **how)
    assert EmbeddingStore.open(tmp_path / "killed").rows == 0
    _, report = embed_new(Double(), more, tmp_path / "killed", **how)
    assert report is not None and report.resumed > 0
    embed_new(Double(), more, tmp_path / "whole", **how)
    assert stored(tmp_path / "killed") == stored(tmp_path / "whole")


class Damaged(FeatureRows):
    """Its second row is there, but cannot be read."""

    def load(self, rows: np.ndarray) -> tuple[Tensor, np.ndarray]:
        return super().load(rows)[0], rows == 1


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_damaged_images_and_rows_of_zeros_come_back(tmp_path: Path, dtype: str) -> None:
    some = source("abc")
    some.table[2] = 0
    damaged = Damaged(some.table, some.ids)
    store, _ = embed_new(Double(), damaged, tmp_path / "e", space=SPACE, numbers=dtype)
    ids, rows = store.read()
    assert ids.to_pylist() == list("abc")
    assert np.isnan(rows).all(1).tolist() == [False, True, False] and (rows[2] == 0).all()


def test_a_scale_for_each_row_loses_least() -> None:
    """Against one scale for all: 1/127, which no row of unit length exceeds, and that of a first
    part. What docs/evaluation.md says of it."""
    rng = np.random.default_rng(0)
    for dim, most in ((64, 1.8e-5), (256, 2.7e-5)):
        turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
        falling = rng.normal(size=(20_000, dim)) * np.arange(1, dim + 1) ** -0.7
        # As of a trained encoder: few directions hold most, and the mean is not 0.
        trained_like = falling @ turn + 0.1 * rng.normal(size=dim)
        for rows in (rng.normal(size=(20_000, dim)), trained_like):
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)

            def lost(found: np.ndarray, rows: np.ndarray = rows) -> float:
                return float(1 - ((found * rows).sum(1) / np.linalg.norm(found, axis=1)).mean())

            numbers, scale = to_int8(rows)
            assert (np.abs(numbers).max(1) == 127).all()
            one = np.abs(rows[:1000]).max() / 127
            first = lost(np.clip(np.rint(rows / one), -127, 127) * one)
            row, unit = lost(numbers * scale[:, None].astype(float)), lost(np.rint(rows * 127))
            assert row < most and 2 * row < first < unit


def test_a_row_is_stored_alike_whatever_is_beside_it() -> None:
    rows = np.random.default_rng(0).normal(size=(9, 5)).astype(np.float32)
    rows[3], rows[4] = np.nan, [np.inf, 0, 0, 0, 0]
    numbers, scale = to_int8(rows)
    for i in range(9):
        alone = to_int8(rows[i : i + 1])
        np.testing.assert_array_equal(alone[0][0], numbers[i])
        np.testing.assert_array_equal(alone[1][0], scale[i])
    assert np.isnan(scale).nonzero()[0].tolist() == [3, 4] and scale.dtype == np.float32


def test_folders_of_float32_are_as_they_were(tmp_path: Path) -> None:
    store, _ = embed_new(Double(), source("ab"), tmp_path / "e", space=SPACE)
    about = json.loads((tmp_path / "e" / "manifest.json").read_text())
    assert list(about) == ["space", "dim", "trained_until", "parts", "format"]
    assert about["format"] == 1 and store.dtype == "float32"
    part = pq.read_schema(tmp_path / "e" / "part-00000.parquet")
    assert part.names == ["item_id", "embedding", "source", "encoded_at"]
    with pytest.raises(ValueError, match="dtype: expected float32, that of the folder .*got int8"):
        embed_new(
            Double(), source("abc"), tmp_path / "e", space=SPACE, only_new=True, numbers="int8"
        )


def test_numbers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    large = source("abc")
    large.table[1, 2] = 1e6
    with pytest.raises(ValueError, match="expected embeddings below 65504 for float16, .* of b"):
        embed_new(Double(), large, tmp_path / "e", space=SPACE, numbers="float16")
    assert EmbeddingStore.open(tmp_path / "e").rows == 0
    embed_new(Double(), large, tmp_path / "e8", space=SPACE, numbers="int8")
    about = json.loads((tmp_path / "e8" / "manifest.json").read_text())
    for changes, said in (
        ({"dtype": "int4"}, "was altered, expected float16 or int8 as dtype, got int4"),
        ({"format": 1}, "was altered, expected dim, format, parts, space, trained_until in it"),
        ({"format": 3}, "expected format 1 or 2, got 3"),
    ):
        (tmp_path / "e8" / "manifest.json").write_text(json.dumps(about | changes))
        with pytest.raises(ValueError, match=said):
            EmbeddingStore.open(tmp_path / "e8")


def test_items_without_a_source_are_left_out(tmp_path: Path) -> None:
    some = source("abc")
    some.table[1] = np.nan
    store, _ = embed_new(Double(), FeatureRows(some.table, some.ids), tmp_path / "e", space=SPACE)
    assert store.read()[0].to_pylist() == ["a", "c"]


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    folder, encoder = tmp_path / "e", Double()
    store, _ = embed_new(encoder, source("ab"), folder, space=SPACE)
    with pytest.raises(ValueError, match="has 2 embeddings already; --only-new appends"):
        embed_new(encoder, source("ab"), folder, space=SPACE)
    other = "sha256:" + "b" * 64
    with pytest.raises(
        ValueError, match="space sha256:aaaaaaaaaaaa of .*, got sha256:bbbbbbbbbbbb"
    ):
        embed_new(encoder, source("abc"), folder, space=other, only_new=True)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").touch()
    with pytest.raises(ValueError, match="out: expected a folder of embeddings or none"):
        embed_new(encoder, source("ab"), tmp_path / "x", space=SPACE)
    part = folder / store.parts[0]["name"]
    table = pq.read_table(part)
    pq.write_table(table.slice(0, 1), part)
    with pytest.raises(ValueError, match=r"part-00000.parquet was altered"):
        EmbeddingStore.open(folder).read()
    for data in (part.read_bytes()[:-9], b"", b"{}"):
        part.write_bytes(data)
        with pytest.raises(ValueError, match=r"part-00000.parquet was cut off or altered"):
            embed_new(encoder, source("abc"), folder, space=SPACE, only_new=True)
    part.unlink()
    with pytest.raises(FileNotFoundError, match=r"part-00000.parquet is in manifest.json"):
        EmbeddingStore.open(folder)
    about = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(about | {"format": 9}))
    with pytest.raises(ValueError, match="expected format 1 or 2, got 9"):
        EmbeddingStore.open(folder)
    with pytest.raises(FileNotFoundError, match="with manifest.json"):
        EmbeddingStore.open(tmp_path)


def test_the_command_grows_a_folder_that_others_read(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    from test_embed import command, make_run

    from courier_fast.serve.contract import contract_of_run

    data = make_dataset(tmp_path / "d", images=False)
    features = tmp_path / "features.npy"
    np.save(features, np.random.default_rng(0).normal(size=(50, 12)).astype(np.float32))
    make_run(tmp_path / "run", data.path, features=features)
    common = ("--run", tmp_path / "run", "--dataset", data.path, "--device", "cpu")
    folder = tmp_path / "e"
    assert (
        command(embed_command, *common, "--out", folder, "--since", "1970-01-01", "--only-new") == 0
    )
    assert "50 embeddings of 8 dimensions more (part-00000.parquet)" in capsys.readouterr().out
    assert command(embed_command, *common, "--out", folder, "--only-new") == 0
    assert "0 embeddings of 8 dimensions more (nothing new)" in capsys.readouterr().out
    assert command(embed_command, *common, "--out", tmp_path / "e.npy") == 0
    assert command(embed_command, *common, "--out", tmp_path / "e.parquet") == 0
    table = read_embeddings(folder, Dataset(data.path), strict=True)
    np.testing.assert_array_equal(table, np.load(tmp_path / "e.npy"))
    space = contract_of_run(tmp_path / "run").space
    for name in ("e", "e.npy", "e.parquet"):
        ids, rows, said = read_vectors(tmp_path / name)
        assert ids.to_pylist() == data.item_ids.to_pylist() and said == space
        np.testing.assert_array_equal(rows, table)
    assert (
        command(
            embed_command, *common, "--out", folder, "--only-new", "--remove-missing", "--compact"
        )
        == 0
    )
    assert "(nothing new), 50 rows of float32 in all" in capsys.readouterr().out
    for dtype in ("float16", "int8"):
        small = tmp_path / dtype
        assert command(embed_command, *common, "--out", small, "--dtype", dtype) == 0
        assert command(embed_command, *common, "--out", small, "--only-new", "--compact") == 0
        assert f"50 rows of {dtype} in all" in capsys.readouterr().out
        found = read_embeddings(small, Dataset(data.path), strict=True)
        off = np.abs(found - table)
        assert (off <= steps_of(table, dtype)).all() and off.max() > 0
        assert read_vectors(small)[2] == space and trained_until(small) == trained_until(folder)
        with pytest.raises(ValueError, match=f"dtype: expected {dtype}, that of the folder"):
            command(embed_command, *common, "--out", small, "--only-new", "--dtype", "float32")
    for wrong in (
        ("--out", tmp_path / "e.npy", "--only-new"),
        ("--out", folder, "--since", "1970-01-01"),
        ("--out", folder, "--remove-missing"),
        ("--out", tmp_path / "e.npy", "--compact"),
    ):
        with pytest.raises(
            ValueError, match="compact: expected a folder|since: expected|remove_missing: expected"
        ):
            command(embed_command, *common, *wrong)


def test_embeddings_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    np.save(tmp_path / "e.npy", np.ones((3, 2), np.float32))
    with pytest.raises(ValueError, match=r"expected item_ids in .*e.npy.json"):
        read_vectors(tmp_path / "e.npy")
    (tmp_path / "e.npy.json").write_text(json.dumps({"item_ids": ["a", "b"]}))
    with pytest.raises(ValueError, match=r"expected \[2, D\]"):
        read_vectors(tmp_path / "e.npy")
    with pytest.raises(FileNotFoundError, match="expected a folder or file"):
        read_vectors(tmp_path / "other.npy")


def test_npy_and_parquet_that_are_something_else_are_named(tmp_path: Path) -> None:
    path, table = tmp_path / "e.npy", np.ones((3, 2), np.float32)
    np.save(path, table)
    whole = path.read_bytes()
    for data in (whole[:-4], whole[:60], b"", b"1,2\n", b"PK\3\4", b"\x80\4}."):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=r"e\.npy was cut off or is no .npy file of numbers"):
            read_npy(path)
    for wrong in (table.astype(str), table.astype(complex), table > 0, table.astype("M8[s]")):
        np.save(path, wrong)
        with pytest.raises(ValueError, match=r"expected numbers in .*e\.npy"):
            read_npy(path)
    np.savez(tmp_path / "e.npz", table)
    with pytest.raises(ValueError, match=r"e\.npz was cut off or is no .npy"):
        read_npy(tmp_path / "e.npz")

    path = tmp_path / "e.parquet"
    rows = pa.array(np.random.default_rng(0).normal(size=(500, 8)).tolist())
    pq.write_table(pa.table({"item_id": [str(i) for i in range(500)], "embedding": rows}), path)
    damaged = bytearray(path.read_bytes())
    damaged[60:4000] = bytes(range(256)) * 15 + bytes(100)
    path.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"e\.parquet cannot be read as Parquet"):
        read_parquet(path)
    for ids, rows, said in (
        ([], [], "got none"),
        (["a"], [None], "got none"),
        (["a"], [[]], "rows of 0 numbers"),
    ):
        kinds = pa.schema([("item_id", pa.string()), ("embedding", pa.list_(pa.float32()))])
        pq.write_table(pa.table({"item_id": ids, "embedding": rows}, schema=kinds), path)
        with pytest.raises(ValueError, match=rf"{said} in .*e\.parquet"):
            read_parquet(path)


def test_ids_as_views_of_text_and_doubles_beyond_float32(tmp_path: Path) -> None:
    ids = pa.array(["a", "b"], pa.string_view())
    pq.write_table(
        pa.table({"item_id": ids, "embedding": [[1.0, 2.0], [1e300, 0.0]]}), tmp_path / "e.parquet"
    )
    found, rows = read_parquet(tmp_path / "e.parquet")
    assert found.to_pylist() == ["a", "b"] and rows.dtype == np.float32
    assert rows.tolist() == [[1, 2], [np.inf, 0]]
