"""The stages of the quickstart as they are told: one line for the whole, with what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

HEAD_START = 5.0  # seconds for which the table's word counts as much as what this machine took


@dataclass
class Estimate:
    """What is left of all stages, from what they took elsewhere and how fast this machine is.

    Attributes:
        expected: {stage: seconds} on the machine of the table, in the order of the stages.
        fixed: stages that take their seconds on every machine.
        took: {stage: seconds} of those that are finished.
    """

    expected: Mapping[str, float]
    fixed: Iterable[str] = ()
    took: dict[str, float] = field(default_factory=dict)

    def slowness(self, stage: str = "", share: float = 0.0, seconds: float = 0.0) -> float:
        """How many times the table's seconds this machine takes: over the finished stages, and the
        share of `stage` that took `seconds`."""
        mine = known = HEAD_START
        for name, took in self.took.items():
            if name not in self.fixed:
                mine, known = mine + took, known + self.expected[name]
        if share and stage not in self.fixed:
            mine, known = mine + seconds, known + share * self.expected[stage]
        return mine / known

    def left(self, stage: str, share: float, seconds: float) -> float:
        """Seconds that are left while `stage` has run for `seconds`; `share` of it is done, 0 where
        that is not known."""
        slowness = self.slowness(stage, share, seconds)

        def whole(name: str) -> float:
            return self.expected[name] * (1 if name in self.fixed else slowness)

        rest = whole(stage) * (1 - share) if share else max(0.0, whole(stage) - seconds)
        after = set(self.expected) - self.took.keys() - {stage}
        return rest + sum(whole(name) for name in after)


class Stages:
    """Prints each stage as it begins and keeps its seconds; in a terminal a last line says how far
    all of them are.

    Attributes:
        seconds: {stage: seconds} of those that are finished.
    """

    def __init__(self, console: Console, expected: Mapping[str, float], fixed: Iterable[str] = ()):
        self.console, self.estimate = console, Estimate(expected, tuple(fixed))
        self.seconds = self.estimate.took
        self.began = time.monotonic()
        self._name, self._share, self._stage_began = "", 0.0, self.began

    @contextmanager
    def __call__(
        self, name: str, what: str, own_bar: bool = False
    ) -> Iterator[Callable[[float], None]]:
        """A stage; gives what is called with the share of it that is done. The line is not there
        while a stage shows a bar of its own."""
        self._name, self._share, self._stage_began = name, 0.0, time.monotonic()
        # What is no terminal gets a line a stage, and none that changes.
        terminal = self.console.is_terminal
        times = "" if terminal else f"  [dim]({self.times()})[/dim]"
        self.console.print(f"[bold]{name}[/bold]  {what}{times}", soft_wrap=True)
        line = Live(
            console=self.console,
            get_renderable=self._line,
            transient=True,
            refresh_per_second=2,
        )
        with line if terminal and not own_bar else nullcontext():
            yield self._advance
        self.seconds[name] = time.monotonic() - self._stage_began
        self.console.print(f"      [dim]{self.seconds[name]:.1f} s[/dim]")

    def _advance(self, share: float) -> None:
        self._share = min(1.0, share)

    @property
    def elapsed(self) -> float:
        return time.monotonic() - self.began

    @property
    def left(self) -> float:
        now = time.monotonic() - self._stage_began
        return self.estimate.left(self._name, self._share, now)

    def times(self) -> str:
        return f"{clock(self.elapsed)} so far, about {clock(self.left)} left"

    def _line(self) -> RenderableType:
        number = list(self.estimate.expected).index(self._name) + 1
        share = self.elapsed / (self.elapsed + self.left)
        line = Table.grid(padding=(0, 2))
        place = f"{number} of {len(self.estimate.expected)}"
        line.add_row("", place, ProgressBar(1.0, share, width=24), self.times())
        return line


def clock(seconds: float) -> str:
    """65 as 1:05."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02}"
