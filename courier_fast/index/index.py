"""Nearest neighbours by cosine among embeddings of one space: exact, IVF or HNSW, with the recall
and speed that were measured.

- index.json: format, space, kind, settings, rows, dim, what was measured, sha256 of the others
- vectors.npy: [n, D] float32, rows of length 1
- ids.arrow: item_id (string)
- index.faiss: ivf and hnsw only
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from ..data.read.ids import one
from ..data.tables import read_table, write_table
from ..files import check_listed, checksums, read_json
from ..nearest import exact_search as exact_search
from ..nearest import normalised
from ..output import INDEX, check_output, write_folder

log = logging.getLogger(__name__)

Array = npt.NDArray

FORMAT = 1
KINDS = ("auto", "exact", "ivf", "hnsw")
EXACT = 100_000  # rows up to which exact search is fast enough for anybody
QUERIES = 1_000  # that recall is measured with
K = 10  # of the recall


@dataclass(frozen=True)
class Index:
    """An opened index; `search` gives the nearest items of vectors, `of` the vector of an item."""

    path: Path
    space: str | None
    kind: str
    settings: dict[str, int]
    measured: dict[str, float]
    files: dict[str, str]
    ids: pa.Array = field(repr=False)
    vectors: Array = field(repr=False)
    approximate: Any = field(repr=False, default=None)

    @classmethod
    def open(cls, path: Path) -> Index:
        """FileNotFoundError where a file is missing, ValueError where one was altered, or the
        format is another."""
        about_file = path / "index.json"
        if not about_file.is_file():
            raise FileNotFoundError(
                "index: expected a folder that `courier-fast index build` wrote (with "
                f"index.json), got {path}"
            )
        about = read_json(about_file, "build it again")
        if about.pop("format", None) != FORMAT:
            raise ValueError(f"index: expected format {FORMAT} in {about_file}; build it again")
        expected_names = {"space", "kind", "settings", "measured", "files", "rows", "dim"}
        if set(about) != expected_names or not isinstance(about["files"], dict):
            raise ValueError(
                f"index: {about_file} was altered, expected {', '.join(sorted(expected_names))} in "
                "it; build it again"
            )
        # Before faiss reads them.
        check_listed(path, about["files"], "index.json", "build it again")
        del about["rows"], about["dim"]
        ids = read_table(path / "ids.arrow").column("item_id")
        vectors = np.load(path / "vectors.npy", mmap_mode="r", allow_pickle=False)
        approximate = None
        if about["kind"] != "exact":
            approximate = _faiss().read_index(str(path / "index.faiss"))
            _set(approximate, about["kind"], about["settings"])
        return cls(path, ids=ids, vectors=vectors, approximate=approximate, **about)

    def of(self, item_id: str) -> Array:
        """[D] the item's vector. ValueError for an id that is not there."""
        place = max(pc.index(self.ids, name).as_py() for name in (item_id, one(item_id)))
        if place < 0:
            raise ValueError(
                f"item: expected one of the {len(self.ids):,} items of {self.path}, got {item_id!r}"
            )
        return self.vectors[place]

    def search(self, queries: Array, k: int = K) -> tuple[Array, Array]:
        """Rows of `ids` and cosines, both [q, k], the nearest first; fewer than k where there are
        fewer items (IVF: -1 fills up).

        Args:
            queries: [q, D], finite and not 0.
        """
        if queries.ndim != 2 or queries.shape[1] != self.vectors.shape[1]:
            raise ValueError(
                f"queries: expected [q, {self.vectors.shape[1]}], got {list(queries.shape)}"
            )
        if k < 1:
            raise ValueError(f"k: expected at least 1, got {k}")
        queries, k = normalised(np.asarray(queries, np.float32)), min(k, len(self.ids))
        if self.approximate is None:
            return exact_search(self.vectors, queries, k)
        cosines, rows = self.approximate.search(queries, k)
        return rows, cosines


def build(
    ids: pa.Array,
    vectors: Array,
    out: Path,
    *,
    space: str | None = None,
    kind: str = "auto",
    recall: float = 0.95,
    seed: int = 0,
) -> Index:
    """Writes the folder `out`, new, empty or an earlier index: complete or not there.

    Args:
        ids: [n] text, each once.
        vectors: [n, D]; rows that are not finite, or 0, are left out.
        space: identity of the encoder, or None where nobody knows it.
        kind: "exact"; "ivf", inverted lists of vectors in 8 bits a dimension; "hnsw", a graph;
            "auto": exact up to 100,000 rows, then ivf.
        recall: share of the 10 nearest that ivf and hnsw must find; more lists or candidates are
            searched until they do.

    Raises:
        ValueError: an unknown kind, a recall that is not above 0 and at most 1, no row that is
            left, or a recall that cannot be reached.
    """
    if kind not in KINDS:
        raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {kind!r}")
    check_output(out, INDEX, overwrite=True)
    if not 0 < recall <= 1:
        raise ValueError(f"recall: expected above 0 and at most 1, got {recall}")
    have = np.isfinite(vectors).all(1) & (np.abs(vectors).max(1) > 0)
    if not have.any():
        raise ValueError("embeddings: expected a finite row that is not 0, got none")
    if not have.all():
        log.warning("%d of %d items have no embedding and are left out", (~have).sum(), len(have))
    ids, rows = ids.filter(pa.array(have)), normalised(np.asarray(vectors[have], np.float32))
    if kind == "auto":
        kind = "exact" if len(rows) <= EXACT else "ivf"
    made, settings, measured = _tried(kind, rows, recall, seed)

    def write(folder: Path) -> None:
        np.save(folder / "vectors.npy", rows)
        write_table(folder / "ids.arrow", {"item_id": ids})
        if made is not None:
            _faiss().write_index(made, str(folder / "index.faiss"))
        about = {
            "format": FORMAT,
            "space": space,
            "kind": kind,
            "settings": settings,
            "rows": len(rows),
            "dim": rows.shape[1],
            "measured": measured,
            "files": checksums(folder),
        }
        (folder / "index.json").write_text(json.dumps(about, indent=1), "utf-8")

    write_folder(out, INDEX, write)
    return Index.open(out)


def _tried(
    kind: str, rows: Array, recall: float, seed: int
) -> tuple[Any, dict[str, int], dict[str, float]]:
    """What faiss has made of the rows (None: nothing), its settings, and what was measured."""
    # An item's own row is found by any index: its K nearest others are asked for.
    asked = np.random.default_rng(seed).permutation(len(rows))[:QUERIES]
    queries, count = rows[asked], min(K + 1, len(rows))

    def exact(queries: Array) -> Array:
        return exact_search(rows, queries, count)[0]

    nearest = _others(exact(queries), asked)
    if kind == "exact":
        return None, {}, {"recall@10": 1.0, "queries_per_s": _speed(exact, queries)}
    made = _make(kind, rows, seed)

    def search(queries: Array) -> Array:
        return made.search(queries, count)[1]

    settings, found = _tune(made, kind, lambda: _others(search(queries), asked), nearest, recall)
    return made, settings, {"recall@10": found, "queries_per_s": _speed(search, queries)}


def _others(rows: Array, asked: Array) -> list[Array]:
    """Of each query's rows those that are not its own item, K at most."""
    return [
        found[(found != own) & (found >= 0)][:K] for found, own in zip(rows, asked, strict=True)
    ]


def _make(kind: str, rows: Array, seed: int) -> Any:
    faiss = _faiss()
    n, dim = rows.shape
    if kind == "hnsw":
        made = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
        made.hnsw.efConstruction = 80
    else:
        lists = max(1, min(int(4 * n**0.5), n // 40))
        made = faiss.index_factory(dim, f"IVF{lists},SQ8", faiss.METRIC_INNER_PRODUCT)
        made.cp.seed, made.cp.min_points_per_centroid = seed, 1
        made.train(rows[np.random.default_rng(seed).permutation(n)[: 256 * lists]])
    made.add(rows)
    return made


def _set(made: Any, kind: str, settings: dict[str, int]) -> None:
    if kind == "hnsw":
        made.hnsw.efSearch = settings["ef"]
    else:
        made.nprobe = settings["nprobe"]


def _tune(
    made: Any, kind: str, search: Callable[[], list[Array]], nearest: list[Array], wanted: float
) -> tuple[dict[str, int], float]:
    """The least effort, in doublings, that finds the share `wanted` of the nearest; its share."""
    name, most = ("ef", made.ntotal) if kind == "hnsw" else ("nprobe", made.nlist)
    effort = 16 if kind == "hnsw" else 1
    while True:
        _set(made, kind, {name: effort})
        hits = [len(np.intersect1d(a, b)) for a, b in zip(search(), nearest, strict=True)]
        found = sum(hits) / max(1, sum(map(len, nearest)))
        if found >= wanted:
            return {name: effort}, found
        if effort >= most:
            raise ValueError(
                f"recall: expected {wanted}, but {kind} finds {found:.3f} of the nearest however "
                "long it searches; ask for less, or for --kind exact"
            )
        effort = min(2 * effort, most)


def _speed(search: Callable[[Array], Array], queries: Array) -> float:
    began = time.perf_counter()
    search(queries)
    return len(queries) / (time.perf_counter() - began)


def _faiss() -> Any:
    try:
        import faiss
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            'ivf and hnsw need faiss: pip install "courier_fast[index]"'
        ) from None
    return faiss
