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
from courier_fast.ctr.features import cluster_features
from courier_fast.index.clusters import assign_clusters, fit_clusters
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
