"""Steps as tasks of Ray, on the cores of a machine or of a cluster. A task whose process or machine
dies runs again, as do those whose results went with it."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any

import polars as pl

from ...engines import connected
from ..read.scan import short
from . import steps

log = logging.getLogger(__name__)

# Rows of a part, about; more where there would be more than _PARTS, fewer where cores would have
# nothing to do.
PART = 1 << 22
_SMALL = 1 << 18
_PARTS = 1024  # a step sends each of its parts to each of the next
_RETRIES = 16  # of a task, where its process or machine dies


class Ray:
    """An executor (plan.py) of tasks; what they return lies in the object store."""

    def __init__(self, ray: Any) -> None:
        self._ray = ray
        self.cores, self.moved = int(ray.cluster_resources().get("CPU", 1)), Counter[str]()
        self.block = PART
        self._tasks: dict[Callable[..., Any], Any] = {}

    def parts(self, rows: int) -> int:
        return min(max(math.ceil(rows / PART), min(2 * self.cores, rows // _SMALL)), _PARTS)

    def readers(self, frames: Sequence[pl.LazyFrame]) -> list[Sequence[pl.LazyFrame]]:
        return [[frame] for frame in frames]

    def put(self, value: Any) -> Any:
        return self._ray.put(value)

    def get(self, what: Any) -> Any:
        return self._ray.get(what)

    def task(self, step: Callable[..., Any], returns: int | str = 1) -> Callable[..., Any]:
        if step not in self._tasks:
            self._tasks[step] = self._ray.remote(step)
        how = {"num_returns": returns, "max_retries": _RETRIES, "name": step.__name__}
        start: Callable[..., Any] = self._tasks[step].options(**how).remote
        return start

    def stream(self, step: Callable[..., Iterator[Any]], returns: int) -> Callable[..., Any]:
        start = self.task(step, "streaming")
        return lambda *given: self._groups(start(*given), returns)

    def _groups(self, references: Iterator[Any], size: int) -> Iterator[list[Any]]:
        while group := list(islice(references, size)):
            if len(group) < size:
                self.get(group)  # raises what the task did
            yield group

    def joined(self, parts: Sequence[Any]) -> Any:
        return self.task(steps.together)(*parts)


@contextmanager
def on_ray(address: str | None = None) -> Iterator[Ray]:
    """The executor, connected; what fails in a task is raised as it was there."""
    with connected(address) as ray:
        try:
            executor = Ray(ray)
            yield executor
        except ray.exceptions.RayError as error:
            cause: Exception = error
            while isinstance(inner := getattr(cause, "cause", None), Exception):
                cause = inner
            if isinstance(cause, ray.exceptions.RayError):
                raise RuntimeError(f"engine: ray failed: {short(cause)}") from error
            raise cause from None
        moved = ", ".join(f"{name} {size}" for name, size in executor.moved.items())
        log.info("bytes between tasks: %s", moved)
