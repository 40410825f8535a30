"""A folder of embeddings that grows: numbered parts, never changed once they are there, and a
manifest that says which there are.

- manifest.json: format, space, dim, trained_until, parts [{name, rows, sha256}]; in format 2 also
  dtype, float16 or int8, which are float32 in format 1
- part-00000.parquet: item_id (string), embedding (fixed_size_list<dtype>[D]; NaN without an image
  that can be read), source (string: sha256 of what was encoded), encoded_at (timestamp, UTC), and
  of int8 scale (float32): a row's embedding is its numbers times its scale, which is NaN without an
  image that can be read; of an item that is gone, embedding, source and scale are null

A scale for each row: no later part can exceed it, and a row is stored as the same bytes whatever it
is stored beside. Of an item in several parts the last one counts. `space` is the identity of the
encoder: vectors of two encoders cannot be compared.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files import check_listed, read_json, sha256, write_atomically
from ..locations import local_path

Array = npt.NDArray

FORMATS = (1, 2)
DTYPES = ("float32", "float16", "int8")
NAME = "manifest.json"
_PART = re.compile(r"part-\d{5}\.parquet")
ROWS = 50_000  # of a row group


@dataclass(frozen=True)
class EmbeddingStore:
    """An opened folder; `append` gives the folder as it is then."""

    path: Path
    space: str
    dim: int
    trained_until: float | None
    parts: tuple[dict[str, Any], ...] = ()
    dtype: str = "float32"  # of DTYPES: as what numbers are stored

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> EmbeddingStore:
        """FileNotFoundError where the folder or a part is not there, ValueError where the format is
        another."""
        path = local_path(path)
        if not (path / NAME).is_file():
            raise FileNotFoundError(
                "embeddings: expected a folder that `courier-fast embed` wrote "
                f"(with {NAME}), got {path}"
            )
        about = read_json(path / NAME, "embed into a new folder")
        if (number := about.get("format")) not in FORMATS:
            raise ValueError(
                f"embeddings: expected format {' or '.join(map(str, FORMATS))}, got {number} in "
                f"{path / NAME}"
            )
        expected = {"format", *(f.name for f in fields(cls))} - {"path"}
        if number == 1:
            expected -= {"dtype"}
        if set(about) != expected or not isinstance(about["parts"], list):
            raise ValueError(
                f"embeddings: {path / NAME} was altered, expected {', '.join(sorted(expected))} in "
                f"it, got {', '.join(sorted(about))}"
            )
        if number == 2 and about["dtype"] not in DTYPES[1:]:
            raise ValueError(
                f"embeddings: {path / NAME} was altered, expected float16 or int8 as dtype, got "
                f"{about['dtype']}"
            )
        del about["format"]
        parts = tuple(about.pop("parts"))
        for part in parts:
            if not (isinstance(part, dict) and _PART.fullmatch(str(part.get("name")))):
                raise ValueError(
                    f"embeddings: {path / NAME} was altered, expected parts called "
                    f"part-00000.parquet and so on, got {part}"
                )
            if not (path / part["name"]).is_file():
                raise FileNotFoundError(
                    f"embeddings: {path / part['name']} is in {NAME}, but is not there"
                )
        return cls(path, parts=parts, **about)

    @property
    def rows(self) -> int:
        """Of all parts; an item that was encoded again counts each time."""
        return sum(part["rows"] for part in self.parts)

    def require(self, space: str) -> None:
        """ValueError unless the folder is of this space."""
        if space != self.space:
            raise ValueError(
                f"embeddings: expected an encoder of the space {self.space[:19]} of {self.path}, "
                f"got {space[:19]}: vectors of two encoders cannot be "
                "compared; choose another folder"
            )

    def require_dtype(self, dtype: str | None) -> None:
        """ValueError unless the folder's numbers are stored like that; None: however they are."""
        if dtype not in (None, self.dtype):
            raise ValueError(
                f"dtype: expected {self.dtype}, that of the folder {self.path}, got {dtype}; "
                "choose another folder"
            )

    def append(
        self, ids: Sequence[str], sources: Sequence[str], embeddings: Array
    ) -> EmbeddingStore:
        """Writes one more part: item ids, sha256 of what was encoded, rows [n, dim] float32. The
        manifest is written last. ValueError names an item beyond the numbers of float16."""
        scale = None
        if self.dtype == "int8":  # in pieces: the table may be a file larger than memory
            blocks = [to_int8(embeddings[i : i + ROWS]) for i in range(0, len(embeddings), ROWS)]
            embeddings, scale = (np.concatenate(part) for part in zip(*blocks, strict=True))
        elif self.dtype == "float16":
            embeddings = _to_float16(ids, embeddings)
        values = pa.array(np.ascontiguousarray(embeddings, self.dtype).ravel())
        rows = pa.FixedSizeListArray.from_arrays(values, self.dim)
        return self._append(ids, sources, rows, scale)

    def delete(self, ids: Sequence[str]) -> EmbeddingStore:
        """Writes one more part, which says that these items are gone; `read` leaves them out until
        they are appended again."""
        none = [None] * len(ids)
        return self._append(ids, none, pa.array(none, self._schema.field("embedding").type), none)

    def compact(self) -> EmbeddingStore:
        """Puts the newest row of each item into one part, which takes the place of all others."""
        if len(self.parts) < 2:
            return self
        self._check()  # what was altered is not written anew
        kept = replace(self, parts=())._write(self._newest(list(self._schema.names)), self._next)
        for part in self.parts:
            (self.path / part["name"]).unlink(missing_ok=True)
        return kept

    @property
    def ids(self) -> pa.Array:
        """Of the items that have a row and are not gone."""
        return self._newest(["item_id", "source"])["item_id"].combine_chunks()

    @property
    def _next(self) -> str:
        number = max((int(p["name"][5:10]) for p in self.parts), default=-1) + 1
        return f"part-{number:05}.parquet"

    @property
    def _schema(self) -> pa.Schema:
        number = pa.from_numpy_dtype(np.dtype(self.dtype))
        columns = {"item_id": pa.string(), "embedding": pa.list_(number, self.dim)}
        columns |= {"source": pa.string(), "encoded_at": pa.timestamp("s", "UTC")}
        if self.dtype == "int8":
            columns["scale"] = pa.float32()
        return pa.schema(list(columns.items()))

    def _append(
        self, ids: Sequence[str], sources: Sequence[str | None], rows: pa.Array, scale: Any
    ) -> EmbeddingStore:
        now = [datetime.now(timezone.utc)] * len(ids)
        columns = {"item_id": ids, "embedding": rows, "source": sources, "encoded_at": now}
        columns |= {"scale": scale}
        schema = self._schema
        arrays = [pa.array(columns[f.name], f.type) for f in schema]
        return self._write(pa.table(arrays, schema=schema), self._next)

    def _write(self, table: pa.Table, name: str) -> EmbeddingStore:
        write_atomically(self.path / name, lambda p: pq.write_table(table, p, row_group_size=ROWS))
        part = {"name": name, "rows": len(table), "sha256": sha256(self.path / name)}
        return replace(self, parts=(*self.parts, part)).write()

    def write(self) -> EmbeddingStore:
        """The manifest."""
        self.path.mkdir(parents=True, exist_ok=True)
        about = {name: value for name, value in asdict(self).items() if name != "path"}
        about["format"] = 2
        if self.dtype == "float32":  # as it was before there were others
            del about["dtype"]
            about["format"] = 1
        text = json.dumps(about, indent=1)
        write_atomically(self.path / NAME, lambda p: p.write_text(text, "utf-8"))
        return self

    def has(self, ids: Sequence[str], sources: Sequence[str]) -> Array:
        """[n] bool: the item's newest row was made from the same."""
        newest = self._newest(["item_id", "source"])
        place = pc.index_in(pa.array(ids, pa.string()), newest["item_id"].combine_chunks())
        before = newest["source"].combine_chunks().take(place)
        return pc.fill_null(pc.equal(before, pa.array(sources, pa.string())), False).to_numpy(
            zero_copy_only=False
        )

    def read(self) -> tuple[pa.Array, Array]:
        """Item ids, each once, and their newest rows [n, dim] float32. ValueError names a part that
        was altered."""
        self._check()
        scaled = ["scale"] if self.dtype == "int8" else []
        newest = self._newest(["item_id", "source", "embedding", *scaled])
        numbers = newest["embedding"].combine_chunks().flatten().to_numpy()
        rows = numbers.reshape(-1, self.dim).astype(np.float32, copy=False)
        if scaled:
            rows *= newest["scale"].to_numpy()[:, None]
        return newest["item_id"].combine_chunks(), rows

    def batches(self, rows: int) -> Iterator[pa.RecordBatch]:
        """All rows with item_id, source and embedding, so many at a time, of which the last of an
        item counts. ValueError names a part that was altered."""
        self._check()
        schema = pa.schema([self._schema.field(n) for n in ("item_id", "source", "embedding")])
        for part in self.parts:
            with self._whole(self.path / part["name"]) as path, pq.ParquetFile(path) as file:
                for batch in file.iter_batches(rows, columns=schema.names):
                    yield batch.select(schema.names).cast(schema)

    def _check(self) -> None:
        check_listed(self.path, {part["name"]: part["sha256"] for part in self.parts}, NAME)

    def _read(self, name: str, schema: pa.Schema) -> pa.Table:
        """A part's columns. ValueError where it was cut off or is something else."""
        with self._whole(self.path / name) as path:
            return pq.read_table(path, columns=schema.names).cast(schema)

    @contextmanager
    def _whole(self, path: Path) -> Iterator[Path]:
        """A part to read. ValueError where it was cut off or is something else."""
        try:
            yield path
        except (pa.ArrowException, KeyError, ValueError, OSError) as error:
            if isinstance(error, OSError) and error.errno:
                raise
            raise ValueError(
                f"embeddings: {path} was cut off or altered ({str(error).splitlines()[0]})"
            ) from None

    def _newest(self, columns: list[str]) -> pa.Table:
        """Some columns, item_id and source among them, of the newest row of each item not gone."""
        empty = pa.schema([self._schema.field(c) for c in columns]).empty_table()
        table = pa.concat_tables(
            [empty, *(self._read(p["name"], empty.schema) for p in self.parts)]
        )
        place = pa.array(np.arange(len(table)))
        last = (
            pa.table({"id": table["item_id"], "place": place})
            .group_by("id")
            .aggregate([("place", "max")])
        )
        newest = table.take(pa.array(np.sort(last["place_max"].to_numpy())))
        return newest.filter(pc.is_valid(newest["source"]))


def to_int8(rows: Array) -> tuple[Array, Array]:
    """Numbers [n, D] int8 and scales [n] float32 of rows [n, D]: scale = max |row| / 127, so that
    nothing is cut off; NaN of a row that is not finite."""
    have = np.isfinite(rows).all(1, keepdims=True)
    known = np.where(have, rows, 0).astype(np.float32)
    scale = np.abs(known).max(1, keepdims=True) / np.float32(127)
    steps = np.rint(np.divide(known, scale, out=np.zeros_like(known), where=scale > 0))
    return np.clip(steps, -127, 127).astype(np.int8), np.where(have, scale, np.nan)[:, 0]


def _to_float16(ids: Sequence[str], rows: Array) -> Array:
    with np.errstate(over="ignore"):  # named below
        found = np.asarray(rows).astype(np.float16)
    beyond = (np.isinf(found) & np.isfinite(rows)).any(1)
    if beyond.any():
        raise ValueError(
            f"dtype: expected embeddings below {np.finfo(np.float16).max:g} for float16, got more "
            f"of {ids[int(beyond.argmax())]}"
        )
    return found
