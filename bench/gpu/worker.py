"""One process of a stage: takes cases until there are none left, or no time. Ends at a CUDA fault,
after which nothing in a process can be trusted; the driver starts another one."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from bench.gpu.record import Record
from bench.gpu.setting import Cases, Setting, attempt

FAULT = 3  # the exit code after a CUDA fault


def surroundings(setting: Setting) -> dict[str, str | int | None]:
    import torch

    from bench import measure

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
    from bench.gpu.stages import STAGES

    setting = Setting(args.out, args.rehearse, args.deadline)
    if args.rehearse:
        import torch

        from courier_fast.testing.interpreter import make_fast

        make_fast()
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    return run(STAGES[args.stage].cases(setting), Record(args.out, args.stage), setting)


if __name__ == "__main__":
    sys.exit(main())
