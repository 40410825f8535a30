"""Kernels and native stages by name, told to whoever listens before each is launched."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

_listeners: list[Callable[[str], None]] = []


@contextmanager
def listening(hear: Callable[[str], None]) -> Iterator[None]:
    """Inside, `hear` is called with each name, in this thread and in autograd's."""
    _listeners.append(hear)
    try:
        yield
    finally:
        _listeners.remove(hear)


def tell(name: str) -> None:
    for hear in _listeners:
        hear(name)
