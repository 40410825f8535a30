"""Time, peak memory and error of the reconstruction loss, forward and backward, in one run.

    python -m bench.loss --shape paper [--device cpu] [--dtype bfloat16] [--impl eager cpu] [--json FILE]

eager: the reference on the clicked rows. compile, compile_rows: torch.compile of N x N logits, and of the clicked rows.
lce, lce_chunked: torch's linear_cross_entropy behind the same attention. cpu, triton, xformers: this package.
Times are taken in turns; on a GPU between two events on the stream, so that launches the GPU waits for count. Memory is the
peak over the inputs, gradients included: of torch's allocator on a GPU, of the resident pages of a fresh process on the CPU.
A speed-up is printed for results within the error budget only; exit code 1 if an implementation of this package is not.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from . import measure
from .candidates import NAMES, OURS, Candidate, make
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
        help="default: all that can run here; eager is always measured",
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
    on_gpu = options.device == "cuda"
    options.dtype = options.dtype or ("bfloat16" if on_gpu else "float32")
    options.repeats = options.repeats or (50 if on_gpu else 5)
    return options


def first_run(candidate: Candidate, batch: Batch) -> str | None:
    """Runs it a few times (libraries load, kernels compile); what it raised, if it did. Without eager nothing can be judged."""
    try:
        for _ in range(3 if batch.clicked.is_cuda else 1):
            loss_and_gradients(candidate.loss, batch)
    except Exception as error:  # noqa: BLE001  the other candidates are still worth measuring
        if candidate.name == "eager":
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    return None


def measured(
    args: argparse.Namespace, extra: Sequence[Candidate] = ()
) -> tuple[list[Row], dict[str, object]]:
    """All rows, and what they were measured on."""
    device, dtype = torch.device(args.device), DTYPES[args.dtype]
    shape = SHAPES[args.shape]
    if args.clicked is not None:
        shape = type(shape)(**(asdict(shape) | {"clicked": args.clicked}))
    options = Options(args.tau, args.negatives, args.direction, args.ids, args.log_q, args.items)
    batch = make_batch(shape, options, dtype, device)

    rows: dict[str, Row] = {}
    running: dict[str, Candidate] = {}
    for name in dict.fromkeys(["eager", *(args.impl or NAMES)]):
        made = make(name, batch)
        if isinstance(made, Candidate) and not made.ours:
            need, free = measure.eager_bytes(shape, made.full), measure.free_memory(device)
            if "chunked" not in name and need > 0.8 * free:
                made = f"its logits take about {need / 2**30:.0f} GiB, and {free / 2**30:.0f} GiB are free"
        left_out = made if isinstance(made, str) else first_run(made, batch)
        rows[name] = Row(name, left_out=left_out)
        if left_out is None and isinstance(made, Candidate):
            running[name] = made
    for candidate in extra:
        rows[candidate.name] = Row(candidate.name)
        running[candidate.name] = candidate

    # Errors where eager fits into memory: on this batch, or on fewer pages of the same kind.
    small = measure.shape_that_fits(shape, device)
    judged = batch if small == shape else make_batch(small, options, dtype, device)
    truth = exact(judged)
    eager = loss_and_gradients(make("eager", judged).loss, judged)  # type: ignore[union-attr]
    for name, candidate in running.items():
        found = eager if name == "eager" else loss_and_gradients(candidate.loss, judged)
        rows[name].errors = errors(found, eager, truth, dtype)
    judged_on = {"rows": judged.rows, "anchors": judged.anchors, "whole": judged is batch}
    del truth, eager, judged

    times = measure.interleaved_times({k: c.loss for k, c in running.items()}, batch, args.repeats)
    for name, candidate in running.items():
        rows[name].times = times[name]
        if not args.no_memory and candidate not in extra and measure.can_measure_memory(device):
            rows[name].memory = measure.peak_memory(name, candidate.loss, shape, batch)

    size, rate = measure.product_rate(dtype, device)
    flops = 6 * batch.anchors * batch.columns * batch.dim
    about: dict[str, object] = {
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


def _ratio(row: Row, eager: Row, ours: bool) -> str:
    if row.failures:
        worst = max(row.failures, key=lambda e: e.share)
        return f"REFUSED: {worst.tensor} has {worst.share:.3g} x its budget ({worst.norm})"
    if row.times is None or eager.times is None:
        return "-"
    return f"{eager.times[1] / row.times[1]:.2f}x"


def report(
    rows: list[Row], about: dict[str, object], args: argparse.Namespace, ours: Sequence[str]
) -> str:
    """The table, as text."""
    where = ", ".join(f"{k} {v}" for k, v in about["surroundings"].items() if v is not None)  # type: ignore[attr-defined]
    floor: float = about["floor_seconds"]  # type: ignore[assignment]
    product: dict[str, float] = about["product"]  # type: ignore[assignment]
    judged: dict[str, int] = about["errors_on"]  # type: ignore[assignment]
    scope = "the whole batch"
    if not judged["whole"]:
        scope = f"fewer pages (N = {judged['rows']:,}, M = {judged['anchors']:,}): eager does not fit at this shape"
    lines = [
        where,
        f"{args.shape} on {args.device}: {args.dtype}, N = {about['rows']:,} PV items, M = {about['anchors']:,} anchors, "
        f"{about['columns']:,} columns, K = {about['history']:,} history items, D = {about['dim']}, tau {args.tau}, "
        f"negatives {args.negatives}, direction {args.direction}",
        f"floor 6 M columns D: {floor * 1e3:.4g} ms at {product['flops_per_second'] / 1e12:.4g} TFLOP/s, "
        f"measured on a product of size {product['size']}",
        f"errors: relative l2 against float64, on {scope}; budget: twice the eager error plus one rounding",
        "",
        f"{'forward + backward':<19}{'p20 ms':>10}{'p50 ms':>10}{'p80 ms':>10}{'peak MiB':>10}{'floor':>8}"
        "  errors (worst share of the budget)  [speed-up over eager]",
    ]
    eager = rows[0]
    for row in rows:
        if row.left_out is not None:
            lines.append(f"{row.name:<19}left out: {row.left_out}")
            continue
        assert row.times is not None and row.errors is not None
        p20, p50, p80 = (t * 1e3 for t in row.times)
        memory = "-" if row.memory is None else f"{row.memory / measure.MIB:.0f}"
        each = ", ".join(f"{e.tensor} {e.error:.1e}" for e in row.errors if e.norm == "l2")
        worst = max(e.share for e in row.errors)
        lines.append(
            f"{row.name:<19}{p20:>10.3f}{p50:>10.3f}{p80:>10.3f}{memory:>10}{floor * 1e3 / p50:>8.1%}"
            f"  {each} ({worst:.2f})  [{_ratio(row, eager, row.name in ours)}]"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None, extra: Sequence[Candidate] = ()) -> int:
    """Exit code: 1 if an implementation of this package, or of `extra`, breaks the budget, or one of ours asked for cannot run."""
    args = parse(arguments)
    rows, about = measured(args, extra)
    ours = [*OURS, *(c.name for c in extra)]
    print(report(rows, about, args, ours))
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
