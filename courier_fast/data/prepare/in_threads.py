"""Steps in threads of this process. What they return is put into files and mapped where it is
needed, so nothing that grows with the events is held in memory."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import polars as pl
import pyarrow as pa

from ...disk import write_rows

_OF_ROW = 768  # bytes that a step takes for each row of its part, about
_FEWEST = 1 << 18  # rows of a part; fewer threads before smaller parts
_PARTS = 1024  # a step sends each of its parts to each of the next
_ALIGNED = 64


class _InFile(NamedTuple):
    """Where an array is: numbers of a type and shape, or what Arrow writes of an array."""

    start: int
    end: int
    dtype: np.dtype[Any] | None = None
    shape: tuple[int, ...] = ()


class Stored:
    """Some values whose arrays are in a file, which goes with the last of those who hold it.

    Nothing else is in there, so nothing that is read could run.
    """

    def __init__(self, path: Path, values: Sequence[Any]) -> None:
        self.path = path
        weakref.finalize(self, path.unlink, missing_ok=True)
        with path.open("wb") as file:
            self._values = [_put(value, file) for value in values]

    def value(self, number: int, *, mapped: bool = True) -> Any:
        """One of the values; its arrays lie in the file, or are copies."""
        whole = pa.py_buffer(b"")  # which cannot be mapped
        if self.path.stat().st_size:
            with pa.memory_map(str(self.path)) as file:  # a buffer of it outlives it
                whole = file.read_buffer()
        return _got(self._values[number], whole, mapped)


def _put(value: Any, file: BinaryIO) -> Any:
    """The value with what is in the file in place of its arrays."""
    if isinstance(value, np.ndarray):
        start = _aligned(file)
        write_rows(file, np.ascontiguousarray(value).reshape(-1).view(np.uint8))
        return _InFile(start, file.tell(), value.dtype, value.shape)
    if isinstance(value, pa.Array):
        start = _aligned(file)
        batch = pa.record_batch([value], ["array"])
        with pa.ipc.new_stream(pa.PythonFile(file, "w"), batch.schema) as stream:
            stream.write_batch(batch)
        return _InFile(start, file.tell())
    if type(value) is dict:
        return {name: _put(one, file) for name, one in value.items()}
    return [_put(one, file) for one in value] if type(value) is list else value


def _aligned(file: BinaryIO) -> int:
    file.write(bytes(-file.tell() % _ALIGNED))
    return file.tell()


def _got(value: Any, whole: pa.Buffer, mapped: bool) -> Any:
    if isinstance(value, _InFile):
        raw = whole.slice(value.start, value.end - value.start)
        if value.dtype is None:
            batch = pa.ipc.open_stream(raw if mapped else raw.to_pybytes()).read_next_batch()
            return batch.column(0)
        array = np.frombuffer(raw, value.dtype).reshape(value.shape)
        return array if mapped else array.copy()
    if type(value) is dict:
        return {name: _got(one, whole, mapped) for name, one in value.items()}
    return [_got(one, whole, mapped) for one in value] if type(value) is list else value


class Reference:
    """What a step returns, or will."""

    __slots__ = ("number", "stored")

    def __init__(self, stored: Future[Stored], number: int) -> None:
        self.stored, self.number = stored, number

    def value(self, *, mapped: bool = True) -> Any:
        return self.stored.result().value(self.number, mapped=mapped)


class Threads:
    """An executor (plan.py) of this process.

    Args:
        folder: for what steps return.
        memory: GiB that steps may take, about.
    """

    def __init__(self, folder: Path, memory: float, threads: int) -> None:
        self.cores, self.moved = threads, Counter[str]()
        self._folder, self._numbers = folder, itertools.count()
        self._rows = memory * 2**30 / _OF_ROW  # that may be in memory
        self.block = max(int(self._rows / threads), _FEWEST)
        self._pool = ThreadPoolExecutor(threads, "courier-prepare")

    def parts(self, rows: int) -> int:
        count = min(max(math.ceil(rows / self.block), 1), _PARTS)
        # Where parts are large, not as many threads have room for one.
        busy = int(self._rows * count / max(rows, 1))
        self._pool.shutdown()
        self._pool = ThreadPoolExecutor(min(max(busy, 1), self.cores), "courier-prepare")
        return count

    def readers(self, frames: Sequence[pl.LazyFrame]) -> list[Sequence[pl.LazyFrame]]:
        return [frames] if frames else []  # polars reads in threads of its own

    def put(self, value: Any) -> Any:
        return value

    def get(self, what: Any) -> Any:
        if isinstance(what, Reference):
            return what.value(mapped=False)
        return [self.get(one) for one in what]

    def task(self, step: Callable[..., Any], returns: int = 1) -> Callable[..., Any]:
        def run(*given: Any) -> Stored:
            values = step(*(g.value() if isinstance(g, Reference) else g for g in given))
            return self._stored([values] if returns == 1 else values)

        def start(*given: Any) -> Any:
            # First in, first out: what a step waits for was started before it, so none waits for
            # ever.
            stored = self._pool.submit(run, *given)
            found = [Reference(stored, number) for number in range(returns)]
            return found[0] if returns == 1 else found

        return start

    def stream(self, step: Callable[..., Iterator[Any]], returns: int) -> Callable[..., Any]:
        def start(*given: Any) -> Iterator[list[Reference]]:
            values = step(*given)
            while some := list(itertools.islice(values, returns)):
                stored: Future[Stored] = Future()
                stored.set_result(self._stored(some))
                yield [Reference(stored, number) for number in range(returns)]

        return start

    def joined(self, parts: Sequence[Reference]) -> Any:
        # Column by column into a file each: together they may be more than memory has room for.
        tables, found = [part.value() for part in parts], {}
        for name, column in tables[0].items():
            path = self._path()
            with path.open("wb") as file:
                for table in tables:
                    write_rows(file, table[name])
            empty = not path.stat().st_size
            found[name] = column[:0] if empty else np.memmap(path, column.dtype, "r")
        return found

    def _stored(self, values: Sequence[Any]) -> Stored:
        return Stored(self._path(), values)

    def _path(self) -> Path:
        return self._folder / f"{next(self._numbers)}"

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)
