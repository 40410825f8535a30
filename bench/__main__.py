"""Measures every case with every candidate that can run here, and writes tables and plots.

    python -m bench [--quick] [--case paper big20 ...] [--group options ...]
                    [--impl triton cce ...] [--out DIR]
    python -m bench --report DIR       tables and plots of what was measured before

bench/results/<machine>/ gets results.json, written after each case, README.md and the plots. What
cannot run here (no GPU, a peer that is not installed, logits that do not fit) is listed with the
reason. bench.loss says what is measured how; `pytest bench --benchmark-only` runs the same cases
under pytest-benchmark.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.candidates import NAMES, OURS
from bench.cases import GROUPS, VARIANTS, options_shape, selected
from bench.command import parser_of
from bench.loss import as_json, measured, measured_variants, report
from bench.report import write_report
from courier_fast.files import write_atomically

RESULTS = Path(__file__).parent / "results"


def machine(device: torch.device) -> str:
    """A folder's name for this machine."""
    known = measure.surroundings(device)
    name = str(known["gpu"] or "{cpu} {vectors} {threads} cores".format(**known))
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("bench", __doc__)
    add = parser.add_argument
    add("--quick", action="store_true", help="a few cases, in less than two minutes")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--case", nargs="+", metavar="NAME", help="default: all")
    add("--group", nargs="+", choices=GROUPS, help="default: all")
    add("--impl", nargs="+", choices=NAMES, help="default: all that can run here")
    add(
        "--repeats", type=int, help="rounds at most; default: 50 on a GPU, 7 on the CPU, 3 if quick"
    )
    add("--seconds", type=float, default=60, help="after which a case begins no further round")
    add("--no-memory", action="store_true", help="leave the memory out")
    add("--out", type=Path, metavar="DIR", help="default: bench/results/<machine>")
    add("--report", type=Path, metavar="DIR", help="measure nothing, render DIR/results.json again")
    args = parser.parse_args(arguments)
    if args.repeats is not None and args.repeats < 1:
        parser.error(f"--repeats: expected at least 1, got {args.repeats}")
    default = 3 if args.quick else 50 if args.device == "cuda" else 7
    args.repeats = args.repeats or default
    return args


def run(args: argparse.Namespace, out: Path, command: str) -> dict[str, Any]:
    """Every selected case; results.json is complete after each of them."""
    device = torch.device(args.device)
    chosen = selected(args.device, args.quick, args.case, args.group)
    if args.impl is not None:
        # What ours is compared and checked with is always there.
        names = tuple(dict.fromkeys(["reference", "eager", *args.impl]))
        chosen = [replace(case, names=names) for case in chosen]
    results: dict[str, Any] = {
        "command": command,
        "surroundings": measure.surroundings(device),
        "copy_bytes_per_second": measure.copy_rate(device),
        "cases": [],
    }

    def keep(found: dict[str, Any]) -> None:
        results["cases"].append(found)
        text = json.dumps(results, indent=1) + "\n"
        write_atomically(out / "results.json", lambda path: path.write_text(text))

    for case in chosen:
        start = time.perf_counter()
        rows, about = measured(
            case, device, args.repeats, not (args.quick or args.no_memory), limit=args.seconds
        )
        print(report(rows, about), f"({time.perf_counter() - start:.0f} s)\n", sep="\n", flush=True)
        keep(as_json(rows, about))
    if args.case is None and (args.group is None or "options" in args.group):
        own = "triton" if args.device == "cuda" else "cpu"
        if args.impl is None or own in args.impl:
            rows, about = measured_variants(
                VARIANTS,
                options_shape(args.device),
                own,
                "bfloat16",
                device,
                args.repeats,
                args.seconds,
            )
            keep(as_json(rows, about))
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if something of this package is over the error budget."""
    args = parse(arguments)
    if args.report is not None:
        write_report(json.loads((args.report / "results.json").read_text()), args.report)
        return 0
    out = args.out or RESULTS / machine(torch.device(args.device))
    out.mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:] if arguments is None else arguments
    try:
        results = run(args, out, " ".join(["python -m bench", *words]))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    write_report(results, out)
    print((out / "README.md").read_text())
    broken = [
        f"{row['name']} on {case['case']['name']}"
        for case in results["cases"]
        for row in case["results"]
        if row["failures"] and (row["name"] in OURS or case["case"]["group"] == "options")
    ]
    if broken:
        print(f"over the error budget: {', '.join(broken)}", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
