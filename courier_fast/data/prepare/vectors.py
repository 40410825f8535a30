"""Files of ready embeddings, a batch at a time: .npy with its ids beside it, .parquet, or a folder
that grows. Numbers stay as they are stored, where a dataset stores such."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ...locations import local_path
from ..embedding_store import EmbeddingStore
from ..embeddings import (
    NO_EMBEDDING,
    check_lists,
    check_numbers,
    check_rows,
    needed_ids,
    npy_errors,
    parquet_errors,
    scale_beside,
)
from ..read.ids import array

Array = npt.NDArray

ROWS = 8192  # of a batch
KEPT = ("int8", "float16", "float32")  # types that are stored as they came; others as float32

# Id and embedding, and what a number is worth, of our own files and of published ones: MM-CTR's
# item_info and item_feature, TAOBAO-MM's scl_embedding_int8_p90.
_KNOWN = (
    ("item_id", "embedding", 1.0),
    ("item_id", "item_emb_d128", 1.0),
    ("item_id", "img_emb_CLIPRN50", 1.0),
    ("205", "205_c", 1 / 127),
)

# What a row is.
USABLE, NULL, NOT_FINITE, GONE = range(1, 5)
REASONS = {NULL: "null or empty", NOT_FINITE: "not finite", GONE: "gone from the folder"}


@dataclass(frozen=True)
class EmbeddingFile:
    """Where ready embeddings are.

    Args:
        path: .npy with item_ids in the JSON beside it, .parquet, or a folder that
            `courier-fast embed` wrote.
        column, id_column: of .parquet, where they are not item_id and embedding, or those of a
            published file.
        scale: what the numbers are multiplied by; None: the one in the JSON beside .npy of int8,
            of a published file its own, else 1.
    """

    path: str | os.PathLike[str]
    column: str | None = None
    id_column: str | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.scale is not None and not 0 < self.scale < np.inf:
            raise ValueError(f"embedding_scale: expected a positive number, got {self.scale}")

    def open(self) -> Vectors:
        """ValueError or FileNotFoundError where it is none of these."""
        path = local_path(self.path)
        named = self.column is not None or self.id_column is not None
        if path.is_dir() or path.suffix.lower() == ".npy":
            if named:
                raise ValueError(
                    "embedding_column, embedding_id_column: expected a .parquet file with them, "
                    f"got {path}"
                )
            return _Folder(path, self.scale) if path.is_dir() else _Npy(path, self.scale)
        if not path.is_file():
            raise FileNotFoundError(
                "embeddings: expected a .npy or .parquet file or a folder of "
                f"`courier-fast embed`, got {path}"
            )
        if path.suffix.lower() != ".parquet":
            raise ValueError(f"embeddings: expected a .npy or .parquet file, got {path}")
        return _Parquet(path, self)


class Batch(NamedTuple):
    """Some rows of a file."""

    ids: pa.Array  # [n] text, null without one
    rows: Array  # [n, D], D 0 where no row has numbers
    what: Array  # [n] uint8: USABLE, or why not


@dataclass
class Vectors:
    """An opened file.

    Attributes:
        dtype: of KEPT, as which rows are stored.
        scale: what they are multiplied by.
        columns: id and embedding, where it has columns.
        newest: of several rows of an item the last counts, not the first.
    """

    path: Path
    dtype: np.dtype
    scale: float = 1.0
    columns: tuple[str, str] | None = None
    newest: bool = False
    files: list[Path] = field(default_factory=list)  # that are read

    def batches(self) -> Iterator[Batch]:
        """All rows in order. ValueError where the file was cut off, or rows differ in length."""
        raise NotImplementedError

    def judged(self, ids: pa.Array, rows: Array, there: Array) -> Batch:
        """A batch: rows as they are stored, [n] bool which are `there` at all."""
        what = np.where(there, USABLE, NULL).astype(np.uint8)
        if rows.dtype == np.int8 and rows.shape[1]:
            what[there & (rows == NO_EMBEDDING).all(1)] = NULL
        with np.errstate(over="ignore", invalid="ignore"):  # infinity then, which is not usable
            rows = rows.astype(self.dtype, copy=False)
            worth = rows.astype(np.float32) * np.float32(self.scale)
        what[(what == USABLE) & ~np.isfinite(worth).all(1)] = NOT_FINITE
        return Batch(ids, rows, what)


def _kept(dtype: np.dtype) -> np.dtype:
    return np.dtype(dtype.name if dtype.name in KEPT else "float32")


class _Npy(Vectors):
    """Mapped, not read."""

    def __init__(self, path: Path, scale: float | None) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"embeddings: expected a .npy file, got {path}")
        ids = needed_ids(path, once=False)
        with npy_errors(path):
            self._table = np.lib.format.open_memmap(path, "r")
        check_numbers(self._table, path)
        kind = self._table.dtype
        check_rows(ids, self._table, path)
        self._ids = ids
        if scale is None:
            scale = scale_beside(path) if kind == np.int8 else 1.0
        super().__init__(path, _kept(kind), scale, files=[path, Path(f"{path}.json")])

    def batches(self) -> Iterator[Batch]:
        for start in range(0, len(self._table), ROWS):
            rows = np.ascontiguousarray(self._table[start : start + ROWS])
            yield self.judged(self._ids[start : start + ROWS], rows, np.ones(len(rows), bool))


class _Parquet(Vectors):
    def __init__(self, path: Path, about: EmbeddingFile) -> None:
        with parquet_errors(path):
            schema = pq.read_schema(path)
        id_column, column, worth = _columns(schema, about, path)
        kind = schema.field(column).type
        check_lists(path, kind, column)
        scale = worth if about.scale is None else about.scale
        dtype = _kept(np.dtype(kind.value_type.to_pandas_dtype()))
        super().__init__(path, dtype, scale, (id_column, column), files=[path])

    def batches(self) -> Iterator[Batch]:
        assert self.columns is not None
        id_column, column = self.columns
        width = 0
        with parquet_errors(self.path), pq.ParquetFile(self.path, memory_map=True) as file:
            for batch in file.iter_batches(ROWS, columns=[id_column, column]):
                ids = array(batch[id_column], f"embeddings: {self.path}: {id_column}")
                rows, there = _numbers(batch[column], width, self.path)
                width = width or rows.shape[1]
                yield self.judged(ids, rows, there)


class _Folder(Vectors):
    """Rows of items that are gone are null."""

    def __init__(self, path: Path, scale: float | None) -> None:
        self._store = EmbeddingStore.open(path)
        super().__init__(
            path, np.dtype(np.float32), 1.0 if scale is None else scale, newest=True, files=[path]
        )

    def batches(self) -> Iterator[Batch]:
        for batch in self._store.batches(ROWS):
            rows, there = _numbers(batch["embedding"], self._store.dim, self.path)
            found = self.judged(batch["item_id"], rows, there)
            found.what[batch["source"].is_null().to_numpy(zero_copy_only=False)] = GONE
            yield found


def _columns(schema: pa.Schema, about: EmbeddingFile, path: Path) -> tuple[str, str, float]:
    """Names of the columns of ids and of embeddings, and the scale of a published file."""
    for id_column, column, scale in _KNOWN:
        fits = about.id_column in (None, id_column) and about.column in (None, column)
        if fits and {id_column, column} <= {*schema.names}:
            return id_column, column, scale
    id_column, column = about.id_column or _KNOWN[0][0], about.column or _KNOWN[0][1]
    if {id_column, column} <= {*schema.names}:
        return id_column, column, 1.0
    named = about.column is not None or about.id_column is not None
    raise ValueError(
        f"embeddings: expected the columns {id_column} and {column} in {path}, got "
        f"{', '.join(schema.names)}"
        + ("" if named else "; --embedding-id-column and --embedding-column name others")
    )


def _numbers(column: pa.Array, width: int, path: Path) -> tuple[Array, Array]:
    """Rows [n, D] of a column of lists, NaN or 0 where there is none, and [n] bool where there is
    one; `width`: of the rows before, 0 where none had numbers."""
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False)
    there = lengths > 0
    widths = {*np.unique(lengths[there]).tolist(), *([width] if width else [])}
    if len(widths) > 1:
        raise ValueError(
            "embeddings: expected rows of one length, got rows of "
            f"{', '.join(map(str, sorted(widths)))} numbers in {path}"
        )
    if not widths:
        return np.zeros((len(column), 0), np.float32), there
    values = pc.list_flatten(column.filter(pa.array(there)))
    found = values.to_numpy(zero_copy_only=False).reshape(-1, *widths)
    if values.null_count:  # whole numbers then came as float64, with NaN for null
        holes = values.is_null().to_numpy(zero_copy_only=False).reshape(found.shape)
        kind = np.dtype(values.type.to_pandas_dtype())
        found, whole = np.where(holes, 0, found).astype(kind), ~holes.any(1)
        there[there] = whole
        found = found[whole]
    if there.all():
        return found, there
    rows = np.zeros((len(column), *widths), found.dtype)
    rows[there] = found
    return rows, there
