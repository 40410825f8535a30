"""Watches Triton's interpreter, in which the programs of a launch run one after the other: what a
GPU would run at once may not depend on that, nor on what is in memory beside the tensors."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Array = npt.NDArray[Any]

ORDERS: dict[str, Callable[[Sequence[int]], Sequence[int]]] = {
    "forward": lambda programs: programs,
    "reverse": lambda programs: programs[::-1],
    "random": lambda programs: random.Random(len(programs)).sample(programs, len(programs)),
}
# What memory holds that nobody has written, in bytes: NaN as float32, bfloat16 and float16.
UNWRITTEN = (0xA5, 0x7F)

# Who has read or written a byte: a program's number, or
NOBODY, SEVERAL, ATOMIC = -1, -2, -3


@dataclass(frozen=True)
class Finding:
    kernel: str
    what: str
    line: str


@dataclass
class Watch:
    kernels: set[str] = field(default_factory=set)  # that were launched
    findings: set[Finding] = field(default_factory=set)


class _Launch:
    """Who reads and writes each byte of the tensors that a launch was given."""

    def __init__(self, kernel: str, tensors: Sequence[Tensor], watch: Watch) -> None:
        self._kernel, self._watch = kernel, watch
        extents: list[list[int]] = []
        for start, end in sorted(map(_extent, tensors)):
            if extents and start <= extents[-1][1]:
                extents[-1][1] = max(end, extents[-1][1])
            else:
                extents.append([start, end])
        self._starts, self._ends = np.array(extents or [[0, 0]], np.int64).T
        self._offsets = np.cumsum(self._ends - self._starts) - self._ends
        total = int((self._ends - self._starts).sum())
        self._writers, self._readers = np.full((2, total), NOBODY, np.int32)

    def _bytes(self, pointers: Any, mask: Any) -> Array:
        """[elements, bytes of one] the places in `_writers` of what is pointed at."""
        at = np.asarray(pointers.data).astype(np.int64)
        if mask is not None:
            at = at[np.broadcast_to(np.asarray(mask.data, bool), at.shape)]
        at = at.reshape(-1)
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        extent = np.searchsorted(self._starts, at, side="right") - 1
        inside = (extent >= 0) & (at + size <= self._ends[extent])
        if not inside.all():
            self._found("an address outside of the tensors")
            at, extent = at[inside], extent[inside]
        return (at + self._offsets[extent])[:, None] + np.arange(size)

    def load(self, program: int, pointers: Any, mask: Any) -> None:
        places = self._bytes(pointers, mask)
        if _of_another(self._writers[places], program):
            self._found("reads what another program writes")
        readers = self._readers[places]
        mine = (readers == NOBODY) | (readers == program)
        self._readers[places] = np.where(mine, program, SEVERAL)

    def store(self, program: int, pointers: Any, mask: Any) -> None:
        places = self._bytes(pointers, mask)
        if len(np.unique(places[:, 0])) < len(places):
            self._found("writes a place twice at once")
        if _of_another(self._writers[places], program):
            self._found("writes what another program writes")
        if _of_another(self._readers[places], program):
            self._found("writes what another program reads")
        self._writers[places] = program

    def add(self, pointers: Any, mask: Any) -> None:
        places = self._bytes(pointers, mask)
        if _of_another(self._writers[places], ATOMIC) or _of_another(self._readers[places], ATOMIC):
            self._found("adds to what is read or written")
        self._writers[places] = ATOMIC

    def loaded(self, mask: Any, values: Array) -> None:
        """Looks at what has been read."""
        if mask is not None:
            values = values[np.broadcast_to(np.asarray(mask.data, bool), values.shape)]
        raw = np.ascontiguousarray(values).reshape(-1)
        size = raw.dtype.itemsize
        if raw.size and size > 1:  # of one byte, any value may be meant
            pattern = np.resize(np.array(UNWRITTEN, np.uint8), size)
            if (raw.view(np.uint8).reshape(-1, size) == pattern).all(1).any():
                self._found("reads what nobody has written")

    def _found(self, what: str) -> None:
        self._watch.findings.add(Finding(self._kernel, what, _line()))


def _extent(x: Tensor) -> tuple[int, int]:
    """The first byte of a tensor and the one past its last."""
    start = x.data_ptr()
    if not x.numel():
        return start, start
    last = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
    return start, start + (last + 1) * x.element_size()


def _of_another(who: Array, program: int) -> bool:
    return bool(((who != NOBODY) & (who != program)).any())


def _line() -> str:
    """Of the kernel, or of the function it calls."""
    frame: Any = sys._getframe(1)
    while frame and ("/triton/runtime/" in (name := frame.f_code.co_filename) or name == __file__):
        frame = frame.f_back
    while frame and "/site-packages/triton/" in frame.f_code.co_filename:
        frame = frame.f_back
    return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}" if frame else "?"


def _tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        yield x
    elif isinstance(x, tuple | list):
        for one in x:
            yield from _tensors(one)


def _unwritten(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def empty(*args: Any, **kwargs: Any) -> Tensor:
        x = original(*args, **kwargs)
        if x.device.type == "cpu" and x.numel() and type(x) is Tensor:
            view = x.new_empty(0, dtype=torch.uint8).set_(x.untyped_storage())  # type: ignore[call-overload]
            view[0::2], view[1::2] = UNWRITTEN
        return x

    return empty


@contextmanager
def watched(order: str = "forward") -> Iterator[Watch]:
    """Every launch inside, with its programs in this order (a key of ORDERS)."""
    import triton.runtime.interpreter as interpreter

    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    watch = Watch()
    launch: list[_Launch] = []
    turns: list[Sequence[int]] = []  # by the numbers of programs whose turn it is, who runs

    def number(self: Any) -> int:
        return int(np.ravel_multi_index(self.grid_idx, self.grid_dim))

    def begin(self: Any, *sizes: int) -> None:
        grids(self, *sizes)
        turns[:] = [ORDERS[order](range(int(np.prod(sizes))))]

    def turn(self: Any, *at: int) -> None:
        places(self, *at)
        self.grid_idx = tuple(
            int(i) for i in np.unravel_index(turns[0][number(self)], self.grid_dim)
        )

    def load(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
        launch[-1].load(number(self), pointers, mask)
        value = loads(self, pointers, mask, *rest)
        launch[-1].loaded(mask, np.asarray(value.data))
        return value

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch[-1].store(number(self), pointers, mask)
        return stores(self, pointers, value, mask, *rest)

    def add(self: Any, operation: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        launch[-1].add(pointers, mask)
        return adds(self, operation, pointers, value, mask, *rest)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        name = self.fn.__name__
        watch.kernels.add(name)
        launch.append(_Launch(name, [*_tensors(args), *_tensors(tuple(kwargs.values()))], watch))
        try:
            return calls(self, *args, **kwargs)
        finally:
            launch.pop()

    grids, places = builder.set_grid_dim, builder.set_grid_idx
    loads, stores = builder.create_masked_load, builder.create_masked_store
    adds, calls = builder.create_atomic_rmw, executor.__call__
    empties = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    with ExitStack() as stack:
        for owner, name, new in (
            (builder, "set_grid_dim", begin),
            (builder, "set_grid_idx", turn),
            (builder, "create_masked_load", load),
            (builder, "create_masked_store", store),
            (builder, "create_atomic_rmw", add),
            (executor, "__call__", call),
            *((owner, name, _unwritten(getattr(owner, name))) for owner, name in empties),
        ):
            stack.enter_context(mock.patch.object(owner, name, new))
        yield watch
