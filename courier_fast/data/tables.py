"""Tables in numbered Arrow shards: written in order, read in place.

A shard is one uncompressed record batch in a file of Arrow IPC; shard s of a table holds its rows
from s * shard_rows on, and the shards of images are cut by bytes. Which process writes a shard does
not matter to its bytes.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from numba import njit

from ..disk import size_text, write_rows, writing
from ..locations import Location
from ..storage import Folder, Shard, join, write_file


@njit(cache=True, nogil=True)
def copy_items(starts, counts, column):  # type: ignore[no-untyped-def]
    """The rows of a column that are of some pages, one page after another."""
    out = np.empty(counts.sum(), column.dtype)
    at = 0
    for i in range(len(starts)):
        for k in range(starts[i], starts[i] + counts[i]):
            out[at] = column[k]
            at += 1
    return out


Array = npt.NDArray
T = TypeVar("T")
SHARD_ROWS = 1 << 22  # of a table
SHARD_BYTES = 64 << 20  # of images
_MAPS = 4096  # shards that are mapped at once: Linux allows a process some 65,000


# ---- writing -------------------------------------------------------------------------------------


def arrow_array(values: Any) -> pa.Array:
    """`values` as one Arrow array; NumPy numbers without a copy, a matrix as a list for each
    row."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values
    values = np.ascontiguousarray(values)
    if values.ndim == 2:
        return pa.FixedSizeListArray.from_arrays(arrow_array(values.reshape(-1)), values.shape[1])
    if values.dtype == bool:
        values = values.view(np.uint8)  # an Arrow bool is a bit and could not be read in place
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)]
    )


def write_table(path: str | os.PathLike[str], columns: Mapping[str, Any]) -> None:
    """Writes columns (arrays of Arrow or NumPy, memory maps) as one uncompressed record batch."""
    batch = pa.record_batch({name: arrow_array(values) for name, values in columns.items()})
    with pa.OSFile(os.fspath(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_table(path: str | os.PathLike[str]) -> pa.RecordBatch:
    """A file of `write_table`, mapped and not read."""
    return pa.ipc.open_file(pa.memory_map(os.fspath(path))).get_batch(0)


def shard_name(table: str, number: int) -> str:
    return f"{table}/{number:05}.arrow"


def write_shard(
    folder: Location, table: str, number: int, columns: Mapping[str, Any]
) -> dict[str, Any]:
    """Writes one shard to a local or remote folder, complete or not there, and gives its entry of
    the manifest: name, rows, bytes, sha256."""
    name = shard_name(table, number)
    # A slice would bring bits and offsets of where it was cut from; its copy has the bytes of any
    # other way to the same rows.
    whole = {n: c if isinstance(c, np.ndarray) else _own(c) for n, c in columns.items()}
    size, digest = write_file(join(folder, name), lambda path: write_table(path, whole))
    rows = len(next(iter(columns.values())))
    return {"name": name, "rows": rows, "bytes": size, "sha256": digest}


def _own(values: Any) -> pa.Array:
    """An Arrow array whose buffers hold its rows alone, without validity where no row is null."""
    array = arrow_array(values)
    array = pa.concat_arrays([array, array[:0]])
    if array.null_count:
        return array
    return pa.Array.from_buffers(array.type, len(array), [None, *array.buffers()[1:]], null_count=0)


def write_shards(
    folder: Location, table: str, columns: Mapping[str, Any], shard_rows: int = SHARD_ROWS
) -> list[dict[str, Any]]:
    """Writes a whole table, whose columns may be memory maps; the entries of its shards. An empty
    table has one shard."""
    rows = len(next(iter(columns.values())))
    return [
        write_shard(
            folder, table, s, {n: c[start : start + shard_rows] for n, c in columns.items()}
        )
        for s, start in enumerate(range(0, max(rows, 1), shard_rows))
    ]


class ImageStoreWriter:
    """Writes images: one JPEG (PNG, WebP) per item row, in order, `None` where there is none.

    Image i is in the shard with the number floor(bytes of the images before it / shard_bytes). Used
    as a context manager; a shard is held in memory until it is full.

    Attributes:
        shards: entries of the manifest, complete after the `with`.
    """

    def __init__(self, folder: Location, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.shards: list[dict[str, Any]] = []
        self._rows: list[bytes | None] = []
        self._number, self._before = 0, 0  # of the shard; bytes

    def append(self, image: bytes | None) -> None:
        """Adds the next item's image."""
        # An image larger than a shard passes over numbers, which are then not there.
        number = self._before // self.shard_bytes
        if number != self._number:
            self._flush()
            self._number = number
        self._rows.append(image or None)
        self._before += len(image or b"")

    def _flush(self) -> None:
        self.shards.append(write_images(self.folder, self._number, self._rows))
        self._rows = []

    def __enter__(self) -> ImageStoreWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None and (self._rows or not self.shards):
            self._flush()


def write_images(folder: Location, number: int, images: Sequence[bytes | None]) -> dict[str, Any]:
    """Writes one shard of images; its entry of the manifest."""
    return write_shard(folder, "images", number, {"jpeg": pa.array(images, pa.binary())})


# ---- reading -------------------------------------------------------------------------------------


class Maps:
    """Mapped shards of a folder; those used least recently are let go."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self._open: OrderedDict[str, tuple[Any, int]] = OrderedDict()
        self._bytes = 0

    def get(
        self, shards: Sequence[Shard], load: Callable[[Path], T], *, check: bool = True
    ) -> list[T]:
        """`load` of the local file of each shard."""
        missing = [s for s in shards if s.name not in self._open]
        opened = self.folder.open(missing, load, check=check) if missing else []
        for shard, one in zip(missing, opened, strict=True):
            self._open[shard.name] = (one, shard.bytes)
            self._bytes += shard.bytes
        found = []
        for shard in shards:
            self._open.move_to_end(shard.name)
            found.append(self._open[shard.name][0])
        # What the cache has removed goes when it is let go here.
        limit = np.inf if isinstance(self.folder.path, Path) else self.folder.cache.limit
        while len(self._open) > 1 and (len(self._open) > _MAPS or self._bytes > limit):
            self._bytes -= self._open.popitem(last=False)[1][1]
        return found


class ShardedTable:
    """A table of a dataset, whose shards are opened where they are needed."""

    def __init__(self, maps: Maps, shards: Sequence[Shard]) -> None:
        self.shards, self.maps = shards, maps
        self.bounds = np.concatenate([[0], np.cumsum([s.rows for s in shards], dtype=np.int64)])

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def batches(self, numbers: Sequence[int]) -> list[pa.RecordBatch]:
        """Some shards, mapped."""
        return self.maps.get([self.shards[n] for n in numbers], read_table)

    @cached_property
    def schema(self) -> pa.Schema:
        return self.batches([0])[0].schema

    def column(self, name: str) -> Column:
        return Column(self, name)

    def arrow(self, name: str) -> pa.Array:
        """A whole column, text for example; in memory where there are several shards."""
        parts = [batch.column(name) for n in range(len(self.shards)) for batch in self.batches([n])]
        return parts[0] if len(parts) == 1 else pa.concat_arrays(parts)


class Column:
    """A column of numbers: rows of it as NumPy arrays, from the shards that have them."""

    def __init__(self, table: ShardedTable, name: str) -> None:
        self.table, self.name = table, name

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, row: int) -> np.generic:
        return self.take(np.array([row]))[0]

    @cached_property
    def _whole(self) -> Array | None:
        return self._parts([0])[0] if len(self.table.shards) == 1 else None

    def _parts(self, numbers: Sequence[int]) -> list[Array]:
        return [batch.column(self.name).to_numpy() for batch in self.table.batches(numbers)]

    def parts(self, start: int = 0, stop: int | None = None) -> Iterator[Array]:
        """Rows from `start` to `stop`, shard by shard."""
        bounds = self.table.bounds
        stop = len(self) if stop is None else min(stop, len(self))
        for n in range(len(bounds) - 1):
            a, b = max(start, int(bounds[n])), min(stop, int(bounds[n + 1]))
            if a < b:
                yield self._parts([n])[0][a - bounds[n] : b - bounds[n]]

    def take(self, rows: Array) -> Array:
        """[n] any rows."""
        if self._whole is not None:
            return self._whole[rows]
        shard = np.searchsorted(self.table.bounds, rows, side="right") - 1
        numbers = np.unique(shard)
        out = None
        for n, part in zip(numbers.tolist(), self._parts(numbers.tolist()), strict=True):
            here = shard == n
            out = np.empty(len(rows), part.dtype) if out is None else out
            out[here] = part[rows[here] - self.table.bounds[n]]
        return self._parts([0])[0][:0] if out is None else out

    def ranges(self, starts: Array, ends: Array) -> Array:
        """The rows from starts[i] to ends[i], one range after another."""
        if self._whole is not None:
            return copy_items(starts, ends - starts, self._whole)
        return self.take(_rows(starts, ends))

    def joined(self) -> Array:
        """All rows as one array: in place where there is one shard, else copied to an unnamed file
        in the cache's folder."""
        if self._whole is not None:
            return self._whole
        dtype = self._parts([0])[0].dtype
        cache = self.table.maps.folder.cache
        size = len(self) * dtype.itemsize
        with (
            writing(
                cache.folder,
                lambda: (
                    f"a column needs {size_text(size)} there; "
                    "COURIER_FAST_CACHE names another folder"
                ),
            ),
            cache.scratch() as file,
        ):
            for part in self.parts():
                write_rows(file, part)
            file.flush()
            return np.memmap(file, dtype, "r", shape=(len(self),)).view(np.ndarray)


@njit(cache=True, nogil=True)
def _rows(starts, ends):  # type: ignore[no-untyped-def]
    out = np.empty((ends - starts).sum(), np.int64)
    at = 0
    for i in range(len(starts)):
        for row in range(starts[i], ends[i]):
            out[at] = row
            at += 1
    return out


class ImageShard:
    """Encoded images of a file: `shard[i]` is a NumPy view of it, empty where there is none."""

    def __init__(self, path: Path) -> None:
        self._map = np.memmap(path, np.uint8, "r")
        base = self._map.ctypes.data
        column = pa.ipc.open_file(pa.py_buffer(self._map)).get_batch(0).column("jpeg")
        # The buffers lie in the map: their addresses give each image's place in the file.
        _, offsets, data = column.buffers()
        self._bounds = np.frombuffer(offsets, np.int32)[: len(column) + 1].astype(np.int64)
        self._bounds += 0 if data is None else data.address - base

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        return self._map[self._bounds[row] : self._bounds[row + 1]].view(np.ndarray)
