"""One process of a stage: takes cases until there are none left, or no time. Ends at a CUDA fault,
after which nothing in a process can be trusted; the driver starts another one."""

from __future__ import annotations

import argparse
import os
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .record import FAILED, SKIPPED, Record, Result

FAULT = 3  # the exit code after a CUDA fault


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


def surroundings(setting: Setting) -> dict[str, str | int | None]:
    import torch

    from .. import measure

    return measure.surroundings(torch.device(setting.device))


def run(cases: Cases, record: Record, setting: Setting) -> int:
    keys = list(cases)
    known = surroundings(setting)
    with record.changed() as content:
        content.setdefault("surroundings", known)
    while setting.left > 0 and (key := record.claim(keys)) is not None:
        result, sound = attempt(cases[key])
        record.put(key, result)
        print(f"{record.stage}: {key}: {result.status}: {result.line}", flush=True)
        if not sound:
            return FAULT
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench.gpu.worker")
    parser.add_argument("stage")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--deadline", type=float, required=True)
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args()
    from .stages import STAGES

    setting = Setting(args.out, args.rehearse, args.deadline)
    if args.rehearse:
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    return run(STAGES[args.stage].cases(setting), Record(args.out, args.stage), setting)


if __name__ == "__main__":
    sys.exit(main())
