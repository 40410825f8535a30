"""Semantic ids of embeddings by residual quantisation: several numbers from coarse to fine, with
the codebooks, so that an id means the same tomorrow.

- codes.parquet: item_id (string), code_1, code_2, ... (int32; -1 without an embedding); its
  metadata has the format, the space and the sha256 of the codebooks
- codebooks.npy: [levels, codes, D] float32
- codes.json: format, space, levels, codes, until, items, sha256 of the codebooks, and a report

Codes of two spaces, or of two fits, mean nothing to each other. The table only grows: what is
fitted is never fitted again, and an item that has a code keeps it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .. import output
from ..ctr.features import CODES, LEVELS, code_prefixes, codebooks_of, nearest_codes
from ..files import check_listed, checksums
from ..nearest import exact_search, normalised
from .clusters import FORMAT, read_like

Array = npt.NDArray

ASKED = 2000  # items whose neighbours the report looks at
NEAR = 10


@dataclass(frozen=True)
class _Codebooks:
    books: Array  # [levels, codes, D]
    space: str | None
    until: str | None


def fit_codes(
    ids: pa.Array,
    vectors: Array,
    out: Path,
    *,
    known: Array | None = None,
    levels: int = LEVELS,
    codes: int = CODES,
    space: str | None = None,
    until: str | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Makes the codebooks from the vectors [n, D] of the `known` [n] items (None: all), and writes
    the folder with the codes of every item; gives the report.

    ValueError for numbers below 1, or no finite row of a known item.
    """
    books = codebooks_of(vectors, known, levels, codes, seed)
    return _write(ids, vectors, nearest_codes(vectors, books), _Codebooks(books, space, until), out)


def extend_codes(
    ids: pa.Array, vectors: Array, like: Path, out: Path, *, space: str | None = None
) -> dict[str, Any]:
    """The codes of an earlier folder, as they are, and those of further items by its codebooks;
    gives the report, which says how many items would have another code by now.

    ValueError for vectors of another space than that folder's, or files that were altered.
    """
    about = read_like(like, "codes", space)
    check_listed(like, about["files"], "codes.json", "fit them again")
    books = np.load(like / "codebooks.npy", allow_pickle=False)
    table = pq.read_table(like / "codes.parquet")
    old_ids = table["item_id"].combine_chunks()
    old = np.stack([table[f"code_{i + 1}"].to_numpy() for i in range(len(books))], 1)
    codes = nearest_codes(vectors, books)
    place = pc.fill_null(pc.index_in(ids, old_ids), -1).to_numpy()
    # Of an item that had no embedding there is no code to keep.
    has_one = (place >= 0) & (old[place, 0] >= 0)
    changed = has_one & (codes[:, 0] >= 0) & (codes != old[place]).any(1)
    codes[has_one] = old[place[has_one]]
    left = np.ones(len(old), bool)
    left[place[place >= 0]] = False
    every = pa.concat_arrays([old_ids.filter(pa.array(left)), ids.cast(old_ids.type)])
    rows = np.concatenate([old[left], codes])
    nothing = np.full((int(left.sum()), vectors.shape[1]), np.nan, vectors.dtype)
    return _write(
        every,
        np.concatenate([nothing, vectors]),
        rows,
        _Codebooks(books, space, about["until"]),
        out,
        would_change=int(changed.sum()),
    )


def _write(
    ids: pa.Array, vectors: Array, codes: Array, made: _Codebooks, out: Path, **more: int
) -> dict[str, Any]:
    report = {**code_report(vectors, codes, made.books), **more}
    columns = {f"code_{i + 1}": np.ascontiguousarray(x) for i, x in enumerate(codes.T)}

    def write(folder: Path) -> None:
        np.save(folder / "codebooks.npy", made.books)
        marks = {
            "courier_fast.format": str(FORMAT),
            "courier_fast.space": str(made.space),
            "courier_fast.codebooks": checksums(folder)["codebooks.npy"],
        }
        table = pa.table({"item_id": ids, **columns}).replace_schema_metadata(marks)
        pq.write_table(table, folder / "codes.parquet")
        about = {
            "format": FORMAT,
            "space": made.space,
            "levels": len(made.books),
            "codes": made.books.shape[1],
            "until": made.until,
            "items": len(ids),
            "files": checksums(folder),
            "report": report,
        }
        (folder / "codes.json").write_text(json.dumps(about, indent=1), "utf-8")

    output.write_folder(out, output.CODES, write)
    return report


def code_report(vectors: Array, codes: Array, codebooks: Array) -> dict[str, Any]:
    """What codes [n, levels] keep of the vectors [n, D] they were made of; lists are by level, from
    the first.

        shared:     share of the items whose whole code another item has too
        used:       codes that some item has; even: exp(entropy), how many there would be if all
                    were as frequent
        error:      mean square of what the levels leave of x / |x|
        neighbours: share of the 10 nearest by cosine (of at most 2,000 items) that have the same
                    code so far; by_chance: of all other items
    """
    have = (codes[:, 0] >= 0) & np.isfinite(vectors).all(1)
    unit, codes = normalised(vectors[have].astype(np.float64)), codes[have]
    if not len(unit):
        raise ValueError("embeddings: expected at least one finite row, got none")
    prefixes = code_prefixes(codes)
    whole = np.bincount(prefixes[:, -1])
    report: dict[str, Any] = {"shared": _rounded((whole[prefixes[:, -1]] > 1).mean())}
    counts = [np.bincount(x) for x in codes.T]
    shares = [x[x > 0] / x.sum() for x in counts]
    report["used"] = [int((x > 0).sum()) for x in counts]
    report["even"] = [_rounded(np.exp(-(x * np.log(x)).sum())) for x in shares]
    left, error = unit, []
    for code, book in zip(codes.T, codebooks, strict=True):
        left = left - book[code]
        error.append(_rounded(np.square(left, dtype=np.float64).sum(1).mean()))
    report["error"] = error
    asked = np.linspace(0, len(unit) - 1, min(len(unit), ASKED)).astype(np.int64)
    if len(unit) > 1:
        k = min(NEAR, len(unit) - 1)
        near, _ = exact_search(unit, unit[asked], k, own=asked)
        same = prefixes[near] == prefixes[asked][:, None]
        report["neighbours"] = [_rounded(x) for x in same.mean((0, 1))]
        sizes = [np.bincount(x)[x[asked]] - 1 for x in prefixes.T]
        report["by_chance"] = [_rounded(x.mean() / (len(unit) - 1)) for x in sizes]
    return report


def _rounded(x: float) -> float:
    return round(float(x), 6)
