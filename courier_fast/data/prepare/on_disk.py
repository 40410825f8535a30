"""What grows with the events is on the disk: columns that are then mapped, and tables that DuckDB
sorts within a bound of memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...disk import write_rows
from ..tables import arrow_array

Array = npt.NDArray

BATCH = 1 << 19  # rows that are read, or pages that are made, at once
PART = 1 << 22  # rows of a column that are looked at at once


class Spool:
    """A column that grows on disk and is then mapped."""

    def __init__(self, path: Path, dtype: npt.DTypeLike) -> None:
        self.path, self.dtype, self.rows = path, np.dtype(dtype), 0
        self._file = path.open("wb")

    def append(self, values: Array) -> None:
        write_rows(self._file, np.ascontiguousarray(values, self.dtype))
        self.rows += len(values)

    def array(self) -> Array:
        """All rows so far, mapped."""
        self._file.flush()
        return np.memmap(self.path, self.dtype, "r") if self.rows else np.zeros(0, self.dtype)


class Sorter:
    """Tables in a file of DuckDB, which sorts what memory does not hold.

    Args:
        folder: for the file and what does not fit.
        memory: GiB that DuckDB may take.
    """

    def __init__(self, folder: Path, memory: float, threads: int) -> None:
        # DuckDB takes what follows a "?" in a path for options, and only paths of UTF-8.
        self._elsewhere: TemporaryDirectory[str] | None = None
        if "?" in str(folder.resolve()) or not str(folder.resolve()).isprintable():
            self._elsewhere = TemporaryDirectory(prefix="courier-prepare-")
            folder = Path(self._elsewhere.name)
        config: dict[str, Any] = {
            "memory_limit": f"{round(memory * 1024)}MiB",
            "threads": threads,
            "temp_directory": str(folder / "duckdb"),
            # Nothing but the file and what it is given is read, and nothing comes from the network.
            "autoinstall_known_extensions": False,
            "autoload_known_extensions": False,
        }
        self._database = duckdb.connect(str(folder / "sort.duckdb"), config=config)

    def run(self, statement: str) -> None:
        self._database.execute(statement)

    def append(self, table: str, columns: Mapping[str, Any]) -> None:
        """Adds rows: the table's columns, in order."""
        rows = pa.table({name: arrow_array(values) for name, values in columns.items()})
        cursor = self._database.cursor()
        cursor.register("new_rows", rows)
        cursor.execute(f"INSERT INTO {table} SELECT * FROM new_rows")
        cursor.close()

    def rows(self, query: str) -> Iterator[dict[str, Array]]:
        """The result's columns, a batch at a time."""
        cursor = self._database.cursor()
        reader: pa.RecordBatchReader = cursor.sql(query).to_arrow_reader(BATCH)
        for batch in reader:
            if batch.num_rows:
                yield {n: batch.column(n).to_numpy() for n in batch.schema.names}
        cursor.close()

    def all(self, query: str) -> dict[str, Array]:
        """The result's columns, in memory."""
        found: pa.Table = self._database.sql(query).to_arrow_table()
        return {n: found.column(n).to_numpy() for n in found.column_names}

    def by_time(self, times: Array) -> Iterator[Array]:
        """Rows of `times` (mapped) in order of time, then row: batches of int64."""
        self.run("CREATE TABLE moments (time BIGINT, row BIGINT)")
        for start in range(0, len(times), BATCH):
            part = np.asarray(times[start : start + BATCH])
            self.append("moments", {"time": part, "row": np.arange(start, start + len(part))})
        for found in self.rows("SELECT row FROM moments ORDER BY time, row"):
            yield found["row"]
        self.run("DROP TABLE moments")

    def close(self) -> None:
        self._database.close()
        if self._elsewhere is not None:
            self._elsewhere.cleanup()


def whole(parts: Iterator[dict[str, Array]], *keys: str) -> Iterator[dict[str, Array]]:
    """Sorted rows cut so that those of equal keys are in one part."""
    left: dict[str, Array] | None = None
    for part in parts:
        joined = part if left is None else {n: np.concatenate([left[n], part[n]]) for n in part}
        before = np.any([joined[k] != joined[k][-1] for k in keys], axis=0)
        cut = int(before.argmin())  # sorted: nothing after it differs from the last
        if cut:
            yield {n: column[:cut] for n, column in joined.items()}
        left = {n: column[cut:] for n, column in joined.items()}
    if left is not None:
        yield left
