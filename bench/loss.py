"""Time, peak memory and error of the reconstruction loss, forward and backward, in one run.

    python -m bench.loss --shape paper [--device cpu] [--dtype bfloat16] [--impl cpu] [--json FILE]

reference: this package's definition. eager: what a user writes, logits of the clicked rows and
cross_entropy. compile, compile_rows: torch.compile of that with N x N logits, and with the clicked
rows. lce, lce_chunked: torch's linear_cross_entropy behind the same attention. cpu, triton,
xformers: this package.

Times are taken in turns; on a GPU between two events on the stream, so that launches the GPU waits
for count. Memory is the peak over the inputs, gradients included: of torch's allocator on a GPU,
of the resident pages of a fresh process on the CPU. A speed-up (over eager; over the reference
where eager cannot do what is asked) is printed only for results within the error budget: twice the
error of the reference in the same type, plus one rounding. Exit code 1 if an implementation of this
package is not within it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from . import measure
from .candidates import NAMES, OURS, Candidate, call, make
from .errors import Error, errors, exact, loss_and_gradients
from .problems import SHAPES, Batch, Options, make_batch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Row:
    """One candidate's measurements; None is what was not measured."""

    name: str
    times: tuple[float, float, float] | None = None  # p20, p50, p80 in seconds
    memory: int | None = None  # bytes
    errors: list[Error] | None = None
    left_out: str | None = None

    @property
    def failures(self) -> list[Error]:
        return [e for e in self.errors or [] if not e.passes]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench.loss", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="paper")
    add("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on the CPU")
    add(
        "--impl",
        nargs="+",
        choices=NAMES,
        help="default: all that can run here; reference and eager always are measured",
    )
    add("--repeats", type=int, help="default: 50 on a GPU, 5 on the CPU")
    add(
        "--clicked",
        type=float,
        help="share of the PV items that are clicked, in place of the shape's",
    )
    add("--tau", type=float, default=Options.tau)
    add("--negatives", choices=("batch", "page", "other_pages"), default=Options.negatives)
    add("--direction", choices=("reconstruct", "identify", "both"), default=Options.direction)
    add("--ids", action="store_true", help="give item ids, so that re-occurrences are no negatives")
    add("--log-q", action="store_true", help="give a sampling-bias correction")
    add(
        "--items",
        type=int,
        default=0,
        metavar="N",
        help="a table of N unique items, Zipf popularity",
    )
    add(
        "--no-memory",
        action="store_true",
        help="leave the memory out (one process per row on the CPU)",
    )
    add("--json", type=Path, metavar="FILE", help="write everything that was measured")
    options = parser.parse_args(arguments)
    if options.clicked is not None and not 0 < options.clicked <= 1:
        parser.error(f"--clicked: expected a share in (0, 1], got {options.clicked}")
    on_gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.repeats = options.repeats or (50 if on_gpu else 5)
    return options


def first_run(candidate: Candidate, batch: Batch) -> str | None:
    """Runs it, so that libraries load and kernels compile; what it raised, if it did."""
    try:
        for _ in range(3 if batch.clicked.is_cuda else 1):
            loss_and_gradients(candidate.loss, batch)
    except Exception as error:  # the other candidates are still worth measuring
        if candidate.name == "reference":
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    return None


def measured(
    args: argparse.Namespace, extra: Sequence[Candidate] = ()
) -> tuple[list[Row], dict[str, Any]]:
    """All rows, and what they were measured on."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    shape = SHAPES[args.shape]
    if args.clicked is not None:
        shape = type(shape)(**(asdict(shape) | {"clicked": args.clicked}))
    options = Options(args.tau, args.negatives, args.direction, args.ids, args.log_q, args.items)
    batch = make_batch(shape, options, dtype, device)

    rows: dict[str, Row] = {}
    running: dict[str, Candidate] = {}
    for name in dict.fromkeys([*NAMES[:2], *(args.impl or NAMES)]):
        made = make(name, batch)
        if isinstance(made, Candidate) and not made.ours:
            need, free = measure.logits_bytes(shape, made.full), measure.free_memory(device)
            if "chunked" not in name and need > 0.8 * free:
                gib = 2**30
                made = f"its logits take about {need / gib:.0f} GiB; {free / gib:.0f} GiB are free"
        left_out = made if isinstance(made, str) else first_run(made, batch)
        rows[name] = Row(name, left_out=left_out)
        if left_out is None and isinstance(made, Candidate):
            running[name] = made
    for candidate in extra:
        rows[candidate.name] = Row(candidate.name)
        running[candidate.name] = candidate

    # Errors where the reference fits into memory: on this batch, or on fewer such pages.
    small = measure.shape_that_fits(shape, device)
    judged = batch if small == shape else make_batch(small, options, dtype, device)
    truth = exact(judged)
    reference = loss_and_gradients(lambda b: call(b, "reference"), judged)
    for name, candidate in running.items():
        found = reference if name == "reference" else loss_and_gradients(candidate.loss, judged)
        rows[name].errors = errors(found, reference, truth, dtype)
    judged_on = {"rows": judged.rows, "anchors": judged.anchors, "whole": judged is batch}
    del truth, reference, judged

    times = measure.interleaved_times({k: c.loss for k, c in running.items()}, batch, args.repeats)
    for name, candidate in running.items():
        rows[name].times = times[name]
        if not args.no_memory and candidate not in extra and measure.can_measure_memory(device):
            rows[name].memory = measure.peak_memory(name, candidate.loss, shape, batch)

    size, rate = measure.product_rate(dtype, device)
    flops = 6 * batch.anchors * batch.columns * batch.dim
    about: dict[str, Any] = {
        "surroundings": measure.surroundings(device),
        "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()},
        "rows": batch.rows,
        "history": batch.history.shape[0],
        "anchors": batch.anchors,
        "columns": batch.columns,
        "dim": batch.dim,
        "product": {"size": size, "flops_per_second": rate},
        "floor_seconds": flops / rate,
        "errors_on": judged_on,
    }
    return list(rows.values()), about


def _ratio(row: Row, base: Row) -> str:
    if row.failures:
        worst = max(row.failures, key=lambda e: e.share)
        return f"REFUSED: {worst.tensor} has {worst.share:.3g} x its budget ({worst.norm})"
    if row.times is None or base.times is None:
        return "-"
    return f"{base.times[1] / row.times[1]:.2f}x"


def heading(about: dict[str, Any], args: argparse.Namespace) -> list[str]:
    """What was measured, and on what."""
    known = {k: v for k, v in about["surroundings"].items() if v is not None}
    product, judged = about["product"], about["errors_on"]
    scope = "the whole batch"
    if not judged["whole"]:
        size = f"N = {judged['rows']:,}, M = {judged['anchors']:,}"
        scope = f"fewer pages ({size}): the reference does not fit at this shape"
    return [
        ", ".join(f"{k} {v}" for k, v in known.items()),
        f"{args.shape} on {args.device}: {args.dtype}, N = {about['rows']:,} PV items, "
        f"M = {about['anchors']:,} anchors, {about['columns']:,} columns, "
        f"K = {about['history']:,} history items, D = {about['dim']}, "
        f"tau {args.tau}, negatives {args.negatives}, direction {args.direction}",
        f"floor: 6 M columns D flops in {about['floor_seconds'] * 1e3:.4g} ms, at the "
        f"{product['flops_per_second'] / 1e12:.4g} TFLOP/s of a product of size {product['size']}",
        f"errors: relative l2 against float64, on {scope}; "
        "budget: twice the reference's error plus one rounding",
    ]


def report(rows: list[Row], about: dict[str, Any], args: argparse.Namespace) -> str:
    """The table, as text."""
    floor: float = about["floor_seconds"]
    base = next((r for r in rows if r.name == "eager" and r.times is not None), rows[0])
    columns = "".join(f"{x:>10}" for x in ("p20 ms", "p50 ms", "p80 ms", "peak MiB", "floor"))
    columns += f"  errors (worst share of the budget)  [speed-up over {base.name}]"
    lines = [*heading(about, args), "", f"{'forward + backward':<19}{columns}"]
    for row in rows:
        if row.left_out is not None:
            lines.append(f"{row.name:<19}left out: {row.left_out}")
            continue
        assert row.times is not None
        assert row.errors is not None
        times = "".join(f"{t * 1e3:>10.3f}" for t in row.times)
        memory = "-" if row.memory is None else f"{row.memory / measure.MIB:.0f}"
        each = ", ".join(f"{e.tensor} {e.error:.1e}" for e in row.errors if e.norm == "l2")
        worst = max(e.share for e in row.errors)
        lines.append(
            f"{row.name:<19}{times}{memory:>10}{floor / row.times[1]:>10.1%}"
            f"  {each} ({worst:.2f})  [{_ratio(row, base)}]"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, extra: Sequence[Candidate] = ()) -> int:
    """Exit code 1 if ours or one of `extra` breaks the budget, or cannot run though asked for."""
    args = parse(arguments)
    rows, about = measured(args, extra)
    ours = [*OURS, *(c.name for c in extra)]
    print(report(rows, about, args))
    if args.json is not None:
        table = [asdict(r) | {"failures": [asdict(e) for e in r.failures]} for r in rows]
        args.json.write_text(json.dumps(about | {"results": table}, indent=1) + "\n")
    broken = [r.name for r in rows if r.name in ours and r.failures]
    asked = set(args.impl or []) & set(OURS)
    missing = [r.name for r in rows if r.left_out is not None and r.name in asked]
    for text, names in (("over the error budget", broken), ("asked for, but cannot run", missing)):
        if names:
            print(f"{text}: {', '.join(names)}", file=sys.stderr)
    return 1 if broken or missing else 0


if __name__ == "__main__":
    sys.exit(main())
