"""Steps in threads of this process. What they return is put into files and mapped where it is
needed, so nothing that grows with the events is held in memory."""

from __future__ import annotations

import itertools
import math
import pickle
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from ...disk import write_rows

_OF_ROW = 768  # bytes that a step takes for each row of its part, about
_FEWEST = 1 << 18  # rows of a part; fewer threads before smaller parts
_PARTS = 1024  # a step sends each of its parts to each of the next
_ALIGNED = 64


class Stored:
    """Some values in a file, which goes with the last of those who hold it."""

    def __init__(self, path: Path, values: Sequence[Any]) -> None:
        self.path, self.places = path, list[tuple[int, int]]()
        weakref.finalize(self, path.unlink, missing_ok=True)
        with path.open("wb") as file:
            for value in values:
                arrays: list[pickle.PickleBuffer] = []
                data = pickle.dumps(value, 5, buffer_callback=arrays.append)
                where = []
                for array in arrays:
                    raw = np.frombuffer(array.raw(), np.uint8)
                    file.write(bytes(-file.tell() % _ALIGNED))
                    where.append((file.tell(), len(raw)))
                    write_rows(file, raw)
                start = file.tell()
                file.write(pickle.dumps((data, where)))
                self.places.append((start, file.tell()))

    def value(self, number: int, *, mapped: bool = True) -> Any:
        """One of the values; its arrays lie in the file, or are copies."""
        with pa.memory_map(str(self.path)) as file:  # a buffer of it outlives it, unlike its handle
            whole = memoryview(file.read_buffer())
        start, end = self.places[number]
        data, where = pickle.loads(whole[start:end])
        arrays = (whole[at : at + size] for at, size in where)
        return pickle.loads(data, buffers=arrays if mapped else map(bytes, arrays))


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
