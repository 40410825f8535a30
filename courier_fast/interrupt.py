"""Signals end a command as an error would: what is open is closed, what is half written removed."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal has come. As a KeyboardInterrupt, which it is, it passes `except Exception`."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class _State:
    first = 0  # the signal that came first
    again = 0  # SIGINTs after it
    held = 0  # blocks of `signals_held` that are open
    waiting = 0  # a signal that came in one of them


def received() -> int:
    """The number of the signal that came first since `stopping` began; 0 without one. A library may
    have made another exception of it."""
    return _State.first


def note(number: int) -> None:
    """Says that a signal has come which somebody else has handled."""
    _State.first = _State.first or number


def _handle(number: int, frame: Any) -> None:
    if _State.first:  # it is being cleaned up: launchers send signals twice, people press ^C again
        _State.again += number == signal.SIGINT
        if _State.again >= 2:
            raise Stopped(number)
        return
    _State.first = number
    if _State.held:
        _State.waiting = number
        return
    raise Stopped(number)


@contextmanager
def stopping() -> Iterator[None]:
    """SIGINT, SIGTERM and SIGHUP raise `Stopped` in the main thread, where nobody else handles
    them; those that are ignored (nohup) stay so.

    One more of them changes nothing while the first is unwound, a third SIGINT ends at once.
    """
    _State.first = _State.again = _State.held = _State.waiting = 0
    before = {}
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            try:
                before[number] = signal.signal(number, _handle)
            except ValueError:  # not the main thread: signals are its owner's
                break
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_held() -> Iterator[None]:
    """A few renames that belong together: a signal waits for the end of them."""
    _State.held += 1
    try:
        yield
    finally:
        _State.held -= 1
        waiting, _State.waiting = _State.waiting, 0
    if waiting:
        raise Stopped(waiting)
