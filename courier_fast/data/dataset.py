"""The dataset folder: what `courier-fast prepare` writes and everything else reads.

| file | rows | columns |
| --- | --- | --- |
| dataset.json | | format, source, pages ("given" or "made"), options, splits {name: [first page, end)}, counts |
| users.arrow | user | user_id (string) |
| items.arrow | item | item_id (string), category (string), clicks (int64: clicks on pages of the train split), first_seen, last_seen (int64) |
| events.arrow | event | item (int32), time (int64): what users clicked or bought, by user, then time |
| pages.arrow | page | user (int32), time (int64), history_start, history_end (int64: rows of events.arrow), pv_start, pv_end (int64: rows of page_items.arrow) |
| page_items.arrow | PV item | item (int32), clicked (uint8: 1 where clicked), weight (float32; only where some page was cut) |
| images.arrow | item | jpeg (binary; null without an image), height, width (int32; 0 without an image) |
| report.json | | what was kept and dropped, and why |

A page's history is a slice of its user's events, so nothing is stored twice: the last events strictly before the page's time are those up to
`history_end`. Pages are ordered by time, so a split is a range of rows. Times are seconds since 1970 (UTC). All tables but images.arrow
are one record batch of uncompressed Arrow IPC and are read in place.

A page that was shown can be cut: all clicked items and a sample of the others stay. `weight` is how many items of the uncut page a row
stands for, the inverse of its chance to stay: 1 where it was clicked or the page is whole, else others shown / others kept.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

FORMAT = 1
SPLITS = ("train", "validation", "test")


def arrow_array(values: Any) -> pa.Array:
    """`values` as one Arrow array; NumPy numbers without a copy."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if isinstance(values, pa.Array):
        return values
    values = np.ascontiguousarray(values)
    if values.dtype == bool:
        values = values.view(np.uint8)  # an Arrow bool is a bit and could not be read in place
    return pa.Array.from_buffers(
        pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)]
    )


def write_table(path: str | os.PathLike[str], columns: Mapping[str, Any]) -> None:
    """Writes columns (Arrow arrays, NumPy arrays or memory maps) as one uncompressed record batch."""
    batch = pa.record_batch({name: arrow_array(values) for name, values in columns.items()})
    with pa.OSFile(os.fspath(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def read_table(path: str | os.PathLike[str]) -> pa.RecordBatch:
    """A table of `write_table`, mapped and not read."""
    return pa.ipc.open_file(pa.memory_map(os.fspath(path))).get_batch(0)


class ImageStoreWriter:
    """Writes images.arrow: one JPEG (PNG, WebP) per item row, in order, `None` where there is none.

    Used as a context manager; rows are written out every `batch_bytes`, so memory stays bounded.
    """

    SCHEMA = pa.schema([("jpeg", pa.binary()), ("height", pa.int32()), ("width", pa.int32())])

    def __init__(self, path: str | os.PathLike[str], batch_bytes: int = 64 << 20) -> None:
        self._sink = pa.OSFile(os.fspath(path), "wb")
        self._writer = pa.ipc.new_file(self._sink, self.SCHEMA)
        self._batch_bytes = batch_bytes
        self._rows: list[tuple[bytes | None, int, int]] = []
        self._held = 0

    def append(self, image: bytes | None, height: int = 0, width: int = 0) -> None:
        """Adds the next item's image; `height` and `width` in pixels as seen, after EXIF rotation."""
        self._rows.append((image, height, width) if image else (None, 0, 0))
        self._held += len(image or b"")
        if self._held >= self._batch_bytes:
            self._flush()

    def _flush(self) -> None:
        if self._rows:
            columns = [
                pa.array(c, f.type)
                for c, f in zip(zip(*self._rows, strict=True), self.SCHEMA, strict=True)
            ]
            self._writer.write_batch(pa.record_batch(columns, schema=self.SCHEMA))
            self._rows, self._held = [], 0

    def __enter__(self) -> ImageStoreWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self._flush()
        self._writer.close()
        self._sink.close()


class ImageStore:
    """images.arrow, mapped: `store[row]` is the encoded image as a NumPy view of the file, empty where there is none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._map = np.memmap(self.path, np.uint8, "r")
        base = self._map.ctypes.data
        # Every batch's buffers lie in the map: their addresses give each image's place in the file.
        reader = pa.ipc.open_file(pa.py_buffer(self._map))
        starts, ends, shapes = [], [], []
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            column = batch.column("jpeg")
            _, offsets, data = column.buffers()
            where = np.frombuffer(offsets, np.int32)[: len(column) + 1].astype(np.int64)
            where += 0 if data is None else data.address - base
            starts.append(where[:-1])
            ends.append(where[1:])
            shapes.append(np.stack([batch.column(n).to_numpy() for n in ("height", "width")], 1))
        empty = np.zeros(0, np.int64)
        self._starts = np.concatenate([empty, *starts])
        self._ends = np.concatenate([empty, *ends])
        self.shapes = np.concatenate(
            [np.zeros((0, 2), np.int32), *shapes]
        )  # [items, (height, width)]

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        return self._map[self._starts[row] : self._ends[row]].view(np.ndarray)

    def take(self, rows: Iterable[int]) -> list[npt.NDArray[np.uint8]]:
        """The encoded images of some rows, without a copy."""
        return [self[row] for row in rows]

    @property
    def present(self) -> npt.NDArray[np.bool_]:
        """[items] whether there is an image."""
        return self._ends > self._starts

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageStore, (self.path,)


class Dataset:
    """A prepared folder, opened: tables as NumPy views of the mapped files (see the module's table).

    Raises FileNotFoundError where the folder or a table is not there, ValueError where its format is another.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        about = self.path / "dataset.json"
        if not about.is_file():
            raise FileNotFoundError(
                f"dataset: expected a folder that `courier-fast prepare` wrote (with dataset.json), got {self.path}"
            )
        self.info: dict[str, Any] = json.loads(about.read_text())
        if self.info.get("format") != FORMAT:
            raise ValueError(
                f"dataset: expected format {FORMAT}, got {self.info.get('format')} in {about}; prepare it again"
            )
        pages, self._items, self._users = (
            read_table(self.path / f"{name}.arrow") for name in ("pages", "items", "users")
        )
        events, shown = (
            read_table(self.path / f"{name}.arrow") for name in ("events", "page_items")
        )
        (
            self.page_user,
            self.page_time,
            self.history_start,
            self.history_end,
            self.pv_start,
            self.pv_end,
        ) = (
            pages.column(n).to_numpy()
            for n in ("user", "time", "history_start", "history_end", "pv_start", "pv_end")
        )
        self.event_item, self.event_time = (events.column(n).to_numpy() for n in ("item", "time"))
        self.pv_item = shown.column("item").to_numpy()
        self.pv_clicked = shown.column("clicked").to_numpy().view(np.bool_)
        # None: no page was cut, and every row stands for itself.
        self.pv_weight = shown.column("weight").to_numpy() if "weight" in shown.schema.names else None  # fmt: skip
        self.item_clicks, self.item_first_seen = (
            self._items.column(n).to_numpy() for n in ("clicks", "first_seen")
        )

    @property
    def num_items(self) -> int:
        return self._items.num_rows

    @property
    def num_pages(self) -> int:
        return len(self.page_user)

    @property
    def item_ids(self) -> pa.Array:
        """[items] ids as they were in the source, as text."""
        return self._items.column("item_id")

    @property
    def categories(self) -> pa.Array:
        """[items] categories as text, null where unknown."""
        return self._items.column("category")

    @property
    def user_ids(self) -> pa.Array:
        """[users] ids as they were in the source, as text."""
        return self._users.column("user_id")

    def split(self, name: str) -> range:
        """The rows of `pages` that are in this split."""
        if name not in self.info["splits"]:
            raise ValueError(f"split: expected one of {sorted(self.info['splits'])}, got {name!r}")
        return range(*self.info["splits"][name])

    def first_pages(self, share: float) -> range:
        """The rows of the train split that are among the first `share` of all pages; the cut never divides a moment.

        ValueError for a share that is not above 0 and at most 1, or that leaves none.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share: expected above 0 and at most 1, got {share}")
        train = self.split("train")
        cut = train.start + round(share * self.num_pages)
        if cut < train.stop:
            times = self.page_time[train.start : train.stop]
            cut = train.start + int(np.searchsorted(times, self.page_time[cut]))
        if cut <= train.start:
            raise ValueError(f"share: expected a share that leaves pages of the {self.num_pages} in {self.path}, got {share}")  # fmt: skip
        return range(train.start, min(cut, train.stop))

    @cached_property
    def images(self) -> ImageStore:
        """The image store; FileNotFoundError where the folder was prepared without images."""
        path = self.path / "images.arrow"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is not there: this dataset was prepared without --images"
            )
        return ImageStore(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.path,)
