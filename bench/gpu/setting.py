"""What a stage runs under, and one case: what became of it, and whether its process goes on."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from bench.gpu.record import FAILED, SKIPPED, Result


@dataclass(frozen=True)
class Setting:
    """What a stage runs under; a rehearsal is tiny, on the CPU, in Triton's interpreter."""

    out: Path
    rehearse: bool
    deadline: float  # of time.time()

    @property
    def left(self) -> float:
        return self.deadline - time.time()

    @property
    def device(self) -> str:
        return "cpu" if self.rehearse else "cuda"


Cases = dict[str, Callable[[], Result]]


def is_fault(error: BaseException) -> bool:
    """Whether the CUDA context is lost."""
    text = str(error)
    return "CUDA error" in text or "Triton Error [CUDA]" in text


def attempt(work: Callable[[], Result]) -> tuple[Result, bool]:
    """What became of it, and whether this process can go on."""
    try:
        return work(), True
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] in ("bench", "courier_fast"):
            raise  # not a package that may be missing
        return Result(str(error), SKIPPED), True
    except Exception as error:  # the other cases are still worth running
        traceback.print_exc()
        line = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        return Result(line, FAILED), not is_fault(error)
