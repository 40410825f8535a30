"""Signals that end a run after a step, with a checkpoint."""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


class StopSignal:
    """SIGTERM, SIGINT or SIGHUP as a wish that the run ends; `number`: which came, 0 before."""

    def __init__(self) -> None:
        self.number = 0

    @property
    def status(self) -> int:
        """What the shell is told: 128 and the signal's number; another process's was SIGTERM."""
        return 128 + (self.number or signal.SIGTERM)

    @contextmanager
    def heard(self) -> Iterator[None]:
        wanted = [signal.SIGTERM, signal.SIGINT]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
            wanted.append(signal.SIGHUP)
        try:
            before = {s: signal.signal(s, self._note) for s in wanted}
        except ValueError:  # not the main thread: signals are its owner's
            before = {}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)

    def _note(self, number: int, frame: Any) -> None:
        if self.number and number == signal.SIGINT:  # asked for twice: now
            raise KeyboardInterrupt
        log.warning("signal %d: saving and stopping after this step", number)
        self.number = number
