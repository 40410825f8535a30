"""Steps in threads: what they return lies in files as long as somebody holds it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from courier_fast.data.prepare.in_threads import Threads


def table(rows: int) -> dict[str, Any]:
    return {"number": np.arange(rows), "text": pa.array([str(n) for n in range(rows)])}


def halves(of: dict[str, Any]) -> Iterator[Any]:
    middle = len(of["number"]) // 2
    for part in (slice(middle), slice(middle, None)):
        yield {n: c[part] for n, c in of.items()}


@pytest.fixture
def threads(tmp_path: Path) -> Iterator[Threads]:
    with closing(Threads(tmp_path, 0.1, 2)) as executor:
        yield executor


def test_a_file_goes_with_its_last_reference(threads: Threads, tmp_path: Path) -> None:
    whole = threads.task(table)(7)
    low, high = threads.task(halves, 2)(whole)
    for rows, part in ((range(3), low), (range(3, 7), high)):
        found = threads.get(part)
        assert found["number"].tolist() == list(rows)
        assert found["text"].to_pylist() == [str(n) for n in rows]
    assert len(list(tmp_path.iterdir())) == 2
    del whole, low
    assert len(list(tmp_path.iterdir())) == 1  # both halves are in one
    mapped = high.value()["number"]
    del high, part
    assert not list(tmp_path.iterdir())
    assert mapped.tolist() == [3, 4, 5, 6] and not mapped.flags.writeable


def test_streams_are_read_as_they_come_and_joined_column_by_column(threads: Threads) -> None:
    numbers = threads.task(lambda: {"a": np.arange(6, dtype=np.int32), "b": np.ones(6)})
    (parts,) = threads.stream(halves, 2)({n: c[:4] for n, c in table(6).items()})
    assert [threads.get(p)["text"].to_pylist() for p in parts] == [["0", "1"], ["2", "3"]]
    joined = threads.joined([numbers(), numbers()])
    assert joined["a"].tolist() == [*range(6)] * 2 and joined["a"].dtype == np.int32
    assert joined["b"].tolist() == [1] * 12
    empty = threads.joined([threads.task(lambda: {"a": np.zeros(0, np.int32)})()])
    assert empty["a"].dtype == np.int32 and not len(empty["a"])


def test_an_error_is_that_of_the_step(threads: Threads) -> None:
    def fail(_: Any) -> None:
        raise ValueError("this one")

    failed = threads.task(fail)(threads.task(table)(1))
    with pytest.raises(ValueError, match="this one"):
        threads.get(threads.task(halves, 2)(failed)[1])


def test_parts_are_few_and_never_none(threads: Threads) -> None:
    assert threads.parts(0) == threads.parts(1) == 1
    assert threads.parts(threads.block + 1) == 2
    assert threads.parts(1 << 40) == 1024
    assert threads.get(threads.task(table)(2))["number"].tolist() == [0, 1]
