"""Nearest neighbours: recall as it is, exact ones as a loop finds them, spaces that do not mix,
pages that escape, clusters that stay."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dataset_factory import make_dataset

from courier_fast.cli import main
from courier_fast.ctr.features import cluster_features, code_features, nearest_codes
from courier_fast.index.clusters import assign_clusters, fit_clusters
from courier_fast.index.codes import code_report, extend_codes, fit_codes
from courier_fast.index.index import Index, build, exact_search
from courier_fast.index.neighbours import nearest_images, nearest_items, write_page

N, D, SPACE = 3000, 16, "sha256:" + "a" * 64


@pytest.fixture(scope="module")
def vectors() -> np.ndarray:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(60, D))
    rows = centres[rng.integers(0, 60, N)] + 0.6 * rng.normal(size=(N, D))
    return (3 * rows).astype(np.float32)


IDS = pa.array([f"i{i:04}" for i in range(N)])


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["exact", "ivf", "hnsw"])
def test_the_recall_that_is_said_is_there(tmp_path: Path, vectors: np.ndarray, kind: str) -> None:
    index = build(IDS, vectors, tmp_path / "i", space=SPACE, kind=kind, recall=0.9)
    index = Index.open(tmp_path / "i")
    assert (index.kind, index.space, len(index.ids)) == (kind, SPACE, N)
    asked = np.random.default_rng(5).permutation(N)[:500]
    queries = vectors[asked]
    expected = np.argsort(-(unit(queries) @ unit(vectors).T), axis=1)[:, 1:11]
    rows, cosines = index.search(queries, 11)
    others = [
        [r for r in found if r != own] for found, own in zip(rows.tolist(), asked, strict=True)
    ]
    recall = np.mean(
        [len(set(a) & set(b)) / 10 for a, b in zip(others, expected.tolist(), strict=True)]
    )
    said = index.measured["recall@10"]
    # Two samples of at least 500 items: their means differ by less than 4 standard errors of
    # shares.
    assert recall == said == 1 if kind == "exact" else said >= 0.9 and abs(said - recall) < 0.04
    assert (np.diff(cosines, axis=1) <= 1e-6).all()
    near = np.take_along_axis(unit(queries) @ unit(vectors).T, rows, 1)
    np.testing.assert_allclose(cosines, near, atol=0.02 if kind == "ivf" else 1e-5)
    assert index.measured["queries_per_s"] > 0


def test_more_recall_costs_more_search(tmp_path: Path, vectors: np.ndarray) -> None:
    low, high = (build(IDS, vectors, tmp_path / str(r), kind="ivf", recall=r) for r in (0.5, 0.97))
    assert low.settings["nprobe"] < high.settings["nprobe"]
    assert low.measured["recall@10"] < 0.97 <= high.measured["recall@10"]
    with pytest.raises(ValueError, match="recall: expected 1.0, but ivf finds 0.9"):
        build(IDS, vectors, tmp_path / "i", kind="ivf", recall=1.0)
    assert not (tmp_path / "i").exists()


def test_exact_search_is_the_same_in_blocks_and_needs_no_faiss(
    tmp_path: Path, vectors: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = unit(vectors).astype(np.float32)
    whole = exact_search(rows, rows[:20], 10)
    for block in (7, 1000, N):
        found, cosines = exact_search(rows, rows[:20], 10, block)
        np.testing.assert_array_equal(found, whole[0])
        np.testing.assert_allclose(cosines, whole[1], atol=1e-6)
    monkeypatch.setitem(sys.modules, "faiss", None)
    index = build(IDS, vectors, tmp_path / "i")
    assert index.kind == "exact" and nearest_items(index, ["i0003"], 3)[0].query == "i0003"
    with pytest.raises(ModuleNotFoundError, match=r"courier_fast\[index\]"):
        build(IDS, vectors, tmp_path / "j", kind="ivf")


@pytest.mark.parametrize("block", [7, 64, 1000])
def test_of_equal_rows_the_first_is_found(block: int) -> None:
    """Among many ties, with and without the query's own row, and for more than there are."""
    rng = np.random.default_rng(0)
    rows = rng.integers(-1, 2, (200, 4)).astype(np.float32)
    asked = np.array([3, 9, 150])
    for own in (None, asked):
        cosines = rows[asked] @ rows.T
        if own is not None:
            cosines[np.arange(3), own] = -np.inf
        order = np.argsort(-cosines, axis=1, kind="stable")
        for k in (1, 11, 200, 300):
            found, values = exact_search(rows, rows[asked], k, own=own, block=block)
            np.testing.assert_array_equal(found, order[:, :k])
            np.testing.assert_array_equal(values, np.take_along_axis(cosines, order, 1)[:, :k])


def test_neighbours_are_others(tmp_path: Path, vectors: np.ndarray) -> None:
    index = build(IDS, vectors, tmp_path / "i")
    cosine = unit(vectors) @ unit(vectors)[7]
    cosine[7] = -2
    (found,) = nearest_items(index, ["i0007"], 4)
    assert [i for i, _ in found.near] == [IDS[int(j)].as_py() for j in np.argsort(-cosine)[:4]]
    assert found.lines()[0] == "i0007" and len(found.lines()) == 5
    with pytest.raises(
        ValueError, match="item: expected one of the 3,000 items of .*, got 'other'"
    ):
        nearest_items(index, ["other"], 4)


def test_rows_without_an_embedding_are_left_out(tmp_path: Path, vectors: np.ndarray) -> None:
    some = vectors.copy()
    some[3], some[5, 2] = 0, np.nan
    index = build(IDS, some, tmp_path / "i")
    assert len(index.ids) == N - 2
    with pytest.raises(ValueError, match="item: expected one of"):
        index.of("i0005")
    with pytest.raises(ValueError, match="expected a finite row that is not 0"):
        build(IDS, np.zeros((N, D)), tmp_path / "j")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"kind": "tree"}, "kind: expected one of auto, exact, ivf, hnsw, got 'tree'"),
        ({"recall": 0}, "recall: expected above 0 and at most 1, got 0"),
    ],
)
def test_wrong_settings_are_named(
    tmp_path: Path, vectors: np.ndarray, more: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        build(IDS, vectors, tmp_path / "i", **more)


def test_what_was_altered_is_named(tmp_path: Path, vectors: np.ndarray) -> None:
    folder = tmp_path / "i"
    index = build(IDS, vectors, folder, kind="ivf")
    for wrong in (np.ones((2, D + 1)), np.ones(D)):
        with pytest.raises(ValueError, match=r"queries: expected \[q, 16\]"):
            index.search(wrong)
    with pytest.raises(ValueError, match="k: expected at least 1, got 0"):
        index.search(vectors[:1], 0)
    for name in ("index.faiss", "vectors.npy", "ids.arrow"):
        bytes_ = (folder / name).read_bytes()
        (folder / name).write_bytes(bytes_[:-1] + bytes([bytes_[-1] ^ 1]))
        with pytest.raises(ValueError, match=f"{name} was altered"):
            Index.open(folder)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=f"{name} is in index.json, but is not there"):
            Index.open(folder)
        (folder / name).write_bytes(bytes_)
    about = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(about | {"format": 9}))
    with pytest.raises(ValueError, match="expected format 1"):
        Index.open(folder)
    with pytest.raises(FileNotFoundError, match="with index.json"):
        Index.open(tmp_path)


class Encoder:
    """What `courier_fast.load` gives, as far as it is used."""

    def __init__(self, space: str, rows: np.ndarray) -> None:
        self.space, self.rows = space, rows

    def encode(self, paths: list[Path]) -> np.ndarray:
        return self.rows[: len(paths)]


def test_images_need_an_encoder_of_the_space(tmp_path: Path, vectors: np.ndarray) -> None:
    index = build(IDS, vectors, tmp_path / "i", space=SPACE)
    (found,) = nearest_images(index, Encoder(SPACE, vectors[9:]), [Path("a.jpg")], 2)
    assert found.near[0][0] == "i0009" and found.is_file
    with pytest.raises(ValueError, match="image: expected an image that can be read, got a.jpg"):
        nearest_images(index, Encoder(SPACE, np.full((1, D), np.nan)), [Path("a.jpg")], 2)
    for other, of in ((SPACE, None), ("sha256:" + "b" * 64, SPACE)):
        index = build(IDS, vectors, tmp_path / f"{of}", space=of)
        with pytest.raises(ValueError, match="encoder: expected one of the space .*, got sha256:"):
            nearest_images(index, Encoder(other, vectors), [Path("a.jpg")], 2)


def test_the_page_shows_pictures_and_escapes(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "d")
    rows = np.random.default_rng(0).normal(size=(data.num_items, 4))
    ids = pa.array([*data.item_ids.to_pylist()[:-1], "<script>alert(1)</script>"])
    index = build(ids, rows, tmp_path / "i")
    found = nearest_items(index, [ids[0].as_py(), ids[len(ids) - 1].as_py()], len(ids))
    write_page(found, index, data, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "<script" not in text and text.count("&lt;script&gt;") == 2
    assert text.count("data:image/jpeg;base64,") == 2 * int(data.images.present[:-1].sum()) > 50


def test_clusters_are_those_of_the_features_and_stay(tmp_path: Path, vectors: np.ndarray) -> None:
    known = np.arange(N) < 2000
    out = tmp_path / "c"
    fit_clusters(IDS, vectors, out, known=known, clusters=[8, 50], space=SPACE, until="2024-01-01")
    read = pq.read_table(out / "clusters.parquet")
    expected = cluster_features(vectors, known, clusters=(8, 50))
    np.testing.assert_array_equal(np.stack([read["cluster_8"], read["cluster_50"]], 1), expected)
    later = vectors[::-1][:100]
    assign_clusters(IDS[:100], later, out, tmp_path / "later", space=SPACE)
    read = pq.read_table(tmp_path / "later" / "clusters.parquet")
    np.testing.assert_array_equal(read["cluster_50"], expected[::-1][:100, 1])
    with pytest.raises(
        ValueError, match="like: expected embeddings of the space sha256:aaaaaaaaaaaa"
    ):
        assign_clusters(IDS[:100], later, out, tmp_path / "x", space=None)
    path = out / "centroids_8.npy"
    path.write_bytes(path.read_bytes() + b"1")
    with pytest.raises(ValueError, match=r"centroids_8.npy was altered"):
        assign_clusters(IDS[:100], later, out, tmp_path / "x", space=SPACE)
    with pytest.raises(FileNotFoundError, match="with clusters.json"):
        assign_clusters(IDS[:100], later, tmp_path, tmp_path / "x", space=SPACE)
    with pytest.raises(ValueError, match="clusters: expected numbers of at least 1"):
        fit_clusters(IDS, vectors, tmp_path / "x", clusters=[0])


def read_codes(folder: Path) -> dict[str, tuple[int, ...]]:
    table = pq.read_table(folder / "codes.parquet")
    columns = [table[c].to_pylist() for c in table.column_names if c.startswith("code_")]
    return dict(zip(table["item_id"].to_pylist(), zip(*columns, strict=True), strict=True))


def test_a_table_of_codes_only_grows(tmp_path: Path, vectors: np.ndarray) -> None:
    known, first, second = np.arange(2000) < 1500, tmp_path / "c", tmp_path / "later"
    rows = vectors[:2000].copy()
    rows[3] = np.nan
    report = fit_codes(IDS[:2000], rows, first, known=known, levels=2, codes=32, space=SPACE)
    old = read_codes(first)
    expected = code_features(rows, known, levels=2, codes=32)
    assert list(old.values()) == list(map(tuple, expected.tolist()))
    # Of the items 1,900 to 2,999: a hundred have a code, of which some have moved far.
    more = vectors[1900:].copy()
    more[:10] = vectors[:10]
    report = extend_codes(IDS[1900:], more, first, second, space=SPACE)
    new = read_codes(second)
    assert list(new) == IDS.to_pylist()
    assert {i: new[i] for i in old} == old
    books = np.load(first / "codebooks.npy")
    np.testing.assert_array_equal(np.load(second / "codebooks.npy"), books)
    assert [new[f"i{i:04}"] for i in range(2000, N)] == list(
        map(tuple, nearest_codes(vectors[2000:], books).tolist())
    )
    moved = [old[f"i{1900 + i:04}"] != old[f"i{i:04}"] for i in range(10) if i != 3]
    assert report["would_change"] in (sum(moved), sum(moved) + 1)  # item 3 has no embedding there
    # An item without an embedding has no code to keep.
    extend_codes(IDS[:10], vectors[:10], first, tmp_path / "x", space=SPACE)
    assert read_codes(tmp_path / "x")["i0003"] != (-1, -1)
    # The same vectors once more: nothing but the report's last line is new.
    again = extend_codes(IDS[:2000], rows, first, tmp_path / "y", space=SPACE)
    assert again == {**json.loads((first / "codes.json").read_text())["report"], "would_change": 0}
    marks = pq.read_table(second / "codes.parquet").schema.metadata
    assert marks[b"courier_fast.space"].decode() == SPACE
    digest = json.loads((first / "codes.json").read_text())["files"]["codebooks.npy"]
    assert marks[b"courier_fast.codebooks"].decode() == digest

    with pytest.raises(ValueError, match="like: expected embeddings of the space sha256:aaaaaa"):
        extend_codes(IDS, vectors, first, tmp_path / "z", space=None)
    path = first / "codes.parquet"
    path.write_bytes(path.read_bytes() + b"1")
    with pytest.raises(ValueError, match=r"codes.parquet was altered"):
        extend_codes(IDS, vectors, first, tmp_path / "z", space=SPACE)
    with pytest.raises(FileNotFoundError, match="with codes.json"):
        extend_codes(IDS, vectors, tmp_path, tmp_path / "z", space=SPACE)


def test_the_report_of_codes() -> None:
    """Four corners of a square, twice; codes that halve it, and then halve the halves."""
    rows = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]] * 2, np.float32)
    side, half = 2**-0.5, np.array([[2**-0.5, 0], [-(2**-0.5), 0]])
    books = np.stack([half, half[:, ::-1]])
    codes = nearest_codes(rows, books.astype(np.float32))
    assert codes[:4].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    report = code_report(rows, codes, books)
    assert report["shared"] == 1 and report["used"] == [2, 2] and report["even"] == [2, 2]
    assert report["error"] == pytest.approx([side**2, 0])
    # All seven others are among the ten nearest.
    assert report["neighbours"] == report["by_chance"] == pytest.approx([3 / 7, 1 / 7], abs=1e-5)
    alone = code_report(rows[:4], codes[:4], books)
    assert alone["shared"] == 0 and alone["neighbours"] == pytest.approx([1 / 3, 0], abs=1e-5)
    assert "neighbours" not in code_report(rows[:1], codes[:1], books)


def test_codes_by_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = make_dataset(tmp_path / "d")
    table = np.random.default_rng(0).normal(size=(data.num_items, 4)).astype(np.float32)
    np.save(tmp_path / "e.npy", table)
    about = {"item_ids": data.item_ids.to_pylist(), "space": SPACE}
    (tmp_path / "e.npy.json").write_text(json.dumps(about))
    common = ["index", "codes", "--embeddings", str(tmp_path / "e.npy"), "--out"]
    early = ["--levels", "2", "--codes", "8", "--dataset", str(data.path), "--until", "2100-01-01"]
    assert main([*common, str(tmp_path / "c"), *early]) == 0
    said = capsys.readouterr().out
    assert f"codes of {data.num_items:,} items" in said and "used 8, 8; squared error 0." in said
    assert main([*common, str(tmp_path / "c2"), "--like", str(tmp_path / "c")]) == 0
    assert read_codes(tmp_path / "c") == read_codes(tmp_path / "c2")
    for options, message in (
        (["--until", "1972-01-01"], "dataset: expected one with --until"),
        (["--levels", "0"], "levels: expected at least 1, got 0"),
        (["--like", str(tmp_path / "c"), "--codes", "8"], "--codes: has no effect with --like"),
    ):
        assert main([*common, str(tmp_path / "x"), *options]) == 2
        assert message in capsys.readouterr().err


def test_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = make_dataset(tmp_path / "d")
    table = np.random.default_rng(0).normal(size=(data.num_items, 4)).astype(np.float32)
    np.save(tmp_path / "e.npy", table)
    about = {"item_ids": data.item_ids.to_pylist(), "space": SPACE}
    (tmp_path / "e.npy.json").write_text(json.dumps(about))

    def run(*arguments: object) -> tuple[int, str]:
        code = main(["index", *map(str, arguments)])
        said = capsys.readouterr()
        return code, said.out + said.err

    code, said = run("build", "--embeddings", tmp_path / "e.npy", "--out", tmp_path / "i")
    assert code == 0 and "50 items, exact; recall@10 1.000" in said
    item = data.item_ids[3].as_py()
    page, found = tmp_path / "p.html", tmp_path / "n.json"
    code, said = run(
        "search",
        "--index",
        tmp_path / "i",
        "--item",
        item,
        "--k",
        2,
        "--dataset",
        data.path,
        "--html",
        page,
        "--json",
        found,
    )
    assert code == 0 and said.startswith(item) and page.is_file()
    (one,) = json.loads(found.read_text())
    cosine = unit(table) @ unit(table)[3]
    near = [data.item_ids[int(i)].as_py() for i in np.argsort(-cosine)[1:3]]
    assert (one["query"], [n["item_id"] for n in one["near"]]) == (item, near)
    common = ("clusters", "--embeddings", tmp_path / "e.npy")
    code, _ = run(
        *common, "--k", 4, "--out", tmp_path / "c", "--dataset", data.path, "--until", "1972-01-01"
    )
    assert code == 0
    code, _ = run(*common, "--out", tmp_path / "c2", "--like", tmp_path / "c")
    assert code == 0
    first, second = (pq.read_table(tmp_path / n / "clusters.parquet") for n in ("c", "c2"))
    assert first.equals(second)
    for arguments, message in (
        (("search", "--index", tmp_path / "i"), "item, image: expected one of them"),
        (("search", "--index", tmp_path / "i", "--image", "a.jpg"), "encoder: expected the run"),
        (
            ("search", "--index", tmp_path / "i", "--item", item, "--html", page),
            "dataset: expected",
        ),
        (("search", "--index", tmp_path / "i", "--item", item, "--k", 0), "k: expected at least 1"),
        (
            (*common, "--out", tmp_path / "x", "--until", "1972-01-01"),
            "dataset: expected one with --until",
        ),
        (
            (*common, "--out", tmp_path / "x", "--like", tmp_path / "c", "--until", "1972-01-01"),
            "--until: has no effect with --like",
        ),
    ):
        code, said = run(*arguments)
        assert code == 2 and message in said, said
