"""Numbers on disk: what grows with the events is spooled there, and sorted in buckets that memory holds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

Array = npt.NDArray

BATCH = 1 << 19  # rows that are read, or pages that are made, at once
BUCKET = 1 << 22  # rows that are sorted at once

AT = np.dtype([("time", np.int64), ("row", np.int64)])


class Spool:
    """A column or records that grow on disk and are then mapped."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.path, self.dtype, self.rows = path, np.dtype(dtype), 0
        self._file = path.open("wb")

    def append(self, values: Array) -> None:
        np.ascontiguousarray(values, self.dtype).tofile(self._file)
        self.rows += len(values)

    def array(self) -> Array:
        """All rows so far, mapped."""
        self._file.flush()
        return np.memmap(self.path, self.dtype, "r") if self.rows else np.zeros(0, self.dtype)

    def chunks(self) -> Iterator[Array]:
        """All rows so far, read a batch at a time."""
        self._file.flush()
        with self.path.open("rb") as file:
            while len(rows := np.fromfile(file, self.dtype, BATCH)):
                yield rows

    def remove(self) -> None:
        self._file.close()
        self.path.unlink()


class Buckets:
    """Records in files by ranges of one of their fields: bucket b holds those from bounds[b - 1] on and below bounds[b], in order."""

    def __init__(self, folder: Path, dtype: np.dtype, field: str, bounds: Array) -> None:
        folder.mkdir()
        self._field, self._bounds = field, bounds
        self._spools = [Spool(folder / str(b), dtype) for b in range(len(bounds) + 1)]

    def add(self, records: Array) -> None:
        bucket = np.searchsorted(self._bounds, records[self._field], side="right")
        order = np.argsort(bucket, kind="stable")
        ends = np.cumsum(np.bincount(bucket, minlength=len(self._spools)))
        for spool, part in zip(self._spools, np.split(order, ends[:-1]), strict=True):
            if len(part):
                spool.append(records[part])

    def __iter__(self) -> Iterator[Array]:
        """Each bucket's records; its file is gone afterwards."""
        for spool in self._spools:
            records = np.array(spool.array())
            spool.remove()
            yield records


def by_time(times: Array, folder: Path) -> Iterator[Array]:
    """Rows of `times` (mapped) in order of time, then row: batches of int64."""
    count = -(-len(times) // BUCKET)
    sample = np.sort(times[:: max(1, len(times) // (256 * count or 1))])
    bounds = np.unique(sample[[len(sample) * b // count for b in range(1, count)]])
    buckets = Buckets(folder, AT, "time", bounds)
    for start in range(0, len(times), BATCH):
        part = np.zeros(min(BATCH, len(times) - start), AT)
        part["time"], part["row"] = (
            times[start : start + BATCH],
            np.arange(start, start + len(part)),
        )
        buckets.add(part)
    for records in buckets:
        rows = records["row"][np.argsort(records["time"], kind="stable")]
        for start in range(0, len(rows), BATCH):
            yield rows[start : start + BATCH]
