"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, matrix
instructions, the inner loop.

    python -m bench.compiled [PROBLEM ...] [--target 90] [--kernel contrast ...] [--json FILE]

A problem is one of those of bench/launches.py: `bf16-256` (the default), `bf16-768`, `items`,
`page`, `candidate-256`, ... The loop is the innermost one with matrix instructions, for candidates
that over their page's history.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from bench.command import parser_of, write_json

# Arguments that tell launches of one kernel apart.
_TELLING = (
    "BLOCK_M",
    "BLOCK_N",
    "BLOCK_H",
    "NEED_VALUES",
    "NEED_SUM",
    "NEED_RANK",
    "TO_LIST",
    "STREAM",
    "SUMS",
    "STORE",
)


def parse(arguments: Sequence[str] | None, problems: Sequence[str]) -> argparse.Namespace:
    parser = parser_of("bench.compiled", __doc__)
    add = parser.add_argument
    add("problem", nargs="*", default=["bf16-256"], help=f"of {', '.join(problems)}")
    add("--target", type=int, default=90, help="compute capability, 90 for sm_90")
    add("--kernel", nargs="+", help="only these")
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    unknown = sorted(set(args.problem) - set(problems))
    if unknown:
        parser.error(f"problem: expected some of {', '.join(problems)}, got {', '.join(unknown)}")
    return args


def main(arguments: Sequence[str] | None = None) -> int:
    # With it, @triton.jit gives something that cannot be compiled.
    os.environ.pop("TRITON_INTERPRET", None)
    from bench.launches import COMMON, SPECIAL, compiled, launches_of

    args = parse(arguments, [*COMMON, *SPECIAL])
    found = []
    print(
        f"{'kernel':<24}{'regs':>5}{'spill':>6}{'KiB':>5}{'wgmma':>6}{'loop':>6}  warps, "
        "stages, what for"
    )
    for problem in args.problem:
        print(f"{problem}, sm_{args.target}")
        for launch in launches_of(problem, args.target):
            if args.kernel and launch.name not in args.kernel:
                continue
            x = compiled(launch, args.target, with_loop=True)
            telling = {k: launch.constexprs[k] for k in _TELLING if k in launch.constexprs}
            words = [f"{k.lower()} {v}" for k, v in telling.items() if not isinstance(v, bool)] + [
                k.lower() for k, v in telling.items() if v is True
            ]
            print(
                f"{launch.name:<24}{x.registers:>5}{x.spilled:>6}{x.shared / 1024:>5.0f}"
                f"{x.wgmma:>6}{sum(x.loop.values()):>6}  {launch.num_warps}, {launch.num_stages}, "
                f"{', '.join(words)}",
                flush=True,
            )
            found.append(
                {"problem": problem, "kernel": launch.name, "target": args.target}
                | {"warps": launch.num_warps, "stages": launch.num_stages}
                | asdict(x)
                | {"constants": telling}
            )
    write_json(args.json, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
