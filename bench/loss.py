"""Time, peak memory and error of the reconstruction loss, forward and backward, in one run.

    python -m bench.loss --shape paper [--device cpu] [--dtype bfloat16] [--impl cpu] [--json FILE]

- reference: this package's definition
- eager: what a user writes, logits of the clicked rows and cross_entropy
- eager_full, compile: N x N logits, without and with torch.compile
- compile_rows: the clicked rows, compiled
- lce, lce_chunked: torch's linear_cross_entropy behind the eager attention
- cce, liger, liger_scaled, quack, inf_cl, varlen, memeff, siglip, xformers_ce: other packages, see
  peers.py
- cpu, triton, triton_graph (its CUDA graph), xformers: this package

With attention for each candidate, eager and compile take some pages after the other, forward and
backward, and eager_full all pages at once.

Times are taken in turns. On a GPU, p20, p50 and p80 are between two events around work that is
queued already, so that the host does not count unless it has to wait for the GPU; wall is a call
and a synchronisation. Memory is the peak over the inputs, gradients included: of torch's allocator
on a GPU, of the resident pages of a fresh process on the CPU. A speed-up (over eager; over the
reference where eager cannot do what is asked) is printed only for results within the error budget:
that of `courier_fast.testing.budget`. Exit code 1 if an implementation of this package is not
within it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench import courier, measure
from bench.candidates import NAMES, OURS, Candidate, make
from bench.command import line_of, parser_of, write_json
from bench.errors import errors, loss_and_gradients, yardstick
from bench.problems import SHAPES
from courier_fast.testing.batches import Batch, Options, Shape, call, make_batch
from courier_fast.testing.budget import Error

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class Row:
    """One candidate's measurements; None is what was not measured."""

    name: str
    # p20, p50, p80 in seconds: of the GPU's work, or of wall time on the CPU
    times: measure.Times | None = None
    wall: measure.Times | None = None  # of a call, from one idle device to the next
    memory: int | None = None  # bytes over the inputs
    beyond: int | None = None  # bytes over inputs and gradients
    errors: list[Error] | None = None
    left_out: str | None = None
    another: bool = False  # another loss: its errors mean nothing

    @property
    def failures(self) -> list[Error]:
        return [e for e in self.errors or [] if not e.passes]


@dataclass(frozen=True)
class Case:
    """What is measured at once, in turns."""

    name: str
    shape: Shape
    options: Options = field(default_factory=Options)
    dtype: str = "bfloat16"
    forward: bool = False  # the loss alone, nobody wants a gradient
    tf32: bool = False  # float32 products may round their inputs
    group: str = "shapes"
    names: tuple[str, ...] = ()  # which candidates; none: all


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("bench.loss", __doc__)
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
    add("--attention", choices=("anchor", "candidate"), default=Options.attention)
    add("--ids", action="store_true", help="give item ids, so that re-occurrences are no negatives")
    add("--log-q", action="store_true", help="give a sampling-bias correction")
    add(
        "--items",
        type=int,
        default=0,
        metavar="N",
        help="a table of N unique items, Zipf popularity",
    )
    add("--forward", action="store_true", help="the loss alone, without gradients")
    add("--tf32", action="store_true", help="float32 products may round their inputs")
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


def _work(candidate: Candidate, batch: Batch, forward: bool) -> Callable[[], object]:
    def loss_alone() -> object:
        with torch.no_grad():
            return candidate.loss(batch)

    return loss_alone if forward else partial(loss_and_gradients, candidate.loss, batch)


def first_run(candidate: Candidate, work: Callable[[], object], on_gpu: bool) -> str | None:
    """Runs it, so that libraries load and kernels compile; what it raised, if it did."""
    try:
        for _ in range(3 if on_gpu else 1):
            work()
    except Exception as error:  # the other candidates are still worth measuring
        if candidate.name == "reference":
            raise
        return f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"
    return None


def measured(
    case: Case,
    device: torch.device,
    repeats: int,
    memory: bool = True,
    extra: Sequence[Candidate] = (),
    limit: float = float("inf"),
) -> tuple[list[Row], dict[str, Any]]:
    """All rows, and what they were measured on; `limit`: seconds after which no further round of
    times begins."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    try:
        return _measured(case, device, repeats, memory, extra, limit)
    finally:
        torch.set_float32_matmul_precision(precision)


def _measured(
    case: Case,
    device: torch.device,
    repeats: int,
    memory: bool,
    extra: Sequence[Candidate],
    limit: float,
) -> tuple[list[Row], dict[str, Any]]:
    dtype, shape, options = DTYPES[case.dtype], case.shape, case.options
    batch = make_batch(shape, options, dtype, device)
    # Errors where the reference fits into memory: on this batch, or on fewer such pages.
    small = measure.shape_that_fits(shape, options, device)
    judged = batch if small == shape else make_batch(small, options, dtype, device)

    rows: dict[str, Row] = {}
    running: dict[str, Candidate] = {}
    for name in case.names or NAMES:
        made = make(name, batch)
        if isinstance(made, Candidate) and made.stored and not made.ours:
            need = measure.logits_bytes(shape, options, made.full)
            free = measure.free_memory(device)
            if need > 0.8 * free:
                gib = 2**30
                made = f"its logits take about {need / gib:.0f} GiB; {free / gib:.0f} GiB are free"
        left_out = made if isinstance(made, str) else None
        if isinstance(made, Candidate):
            left_out = first_run(made, _work(made, batch, case.forward), device.type == "cuda")
        rows[name] = Row(name, left_out=left_out)
        if left_out is None and isinstance(made, Candidate):
            running[name] = made
    for candidate in extra:
        rows[candidate.name] = Row(candidate.name)
        running[candidate.name] = candidate

    held_to = yardstick(judged)
    for name, candidate in running.items():
        rows[name].another = candidate.another
        if not candidate.another:
            found = loss_and_gradients(candidate.loss, judged)
            rows[name].errors = errors(found, held_to, dtype)
    judged_on = {"rows": judged.rows, "anchors": judged.anchors, "whole": judged is batch}
    del held_to, judged

    work = {name: _work(c, batch, case.forward) for name, c in running.items()}
    times = measure.interleaved_times(work, device, repeats, limit)
    for name, candidate in running.items():
        rows[name].wall = times[name]["wall"]
        rows[name].times = times[name].get("gpu", times[name]["wall"])
        if memory and candidate not in extra and measure.can_measure_memory(device):
            rows[name].memory, rows[name].beyond = measure.peak_memory(
                name, candidate.loss, shape, batch, case.forward
            )

    size, rate = measure.product_rate(dtype, device)
    products = 2 if case.forward else 6
    each, of = batch.anchors, "M"
    if options.attention == "candidate":
        each, of = batch.attended, "(K of pages with an anchor)"
    flops, floor_of = products * each * batch.columns * batch.dim, f"{products} {of} columns D"
    if options.courier:
        flops, floor_of = products * courier.products(batch), f"{products} {courier.PRODUCTS}"
    # What has to be read and written at least: both sides' rows, and the gradients.
    traffic = batch.gradient_bytes * (1 if case.forward else 2)
    about: dict[str, Any] = {
        "case": asdict(case),
        "device": str(device),
        "rows": batch.rows,
        "history": batch.history.shape[0],
        "anchors": batch.anchors,
        "columns": batch.columns,
        "dim": batch.dim,
        "flops": flops,
        "floor_of": floor_of,
        "bytes": traffic,
        "product": {"size": size, "flops_per_second": rate},
        "floor_seconds": flops / rate,
        "errors_on": judged_on,
        "repeats": repeats,
    }
    return list(rows.values()), about


def measured_variants(
    variants: dict[str, Options],
    shape: Shape,
    impl: str,
    dtype_name: str,
    device: torch.device,
    repeats: int,
    limit: float = float("inf"),
) -> tuple[list[Row], dict[str, Any]]:
    """One implementation with each of some options, in turns; errors on fewer such pages."""
    dtype = DTYPES[dtype_name]
    few = Shape(min(shape.pages, 512), *list(asdict(shape).values())[1:])
    rows: dict[str, Row] = {}
    work: dict[str, Callable[[], object]] = {}
    candidate = Candidate(impl, lambda b: call(b, impl), ours=True)
    for label, options in variants.items():
        judged, batch = (make_batch(x, options, dtype, device) for x in (few, shape))
        work[label] = _work(candidate, batch, False)
        rows[label] = Row(label, left_out=first_run(candidate, work[label], device.type == "cuda"))
        if rows[label].left_out is not None:
            del work[label]
            continue
        found = loss_and_gradients(candidate.loss, judged)
        rows[label].errors = errors(found, yardstick(judged), dtype)
    times = measure.interleaved_times(work, device, repeats, limit)
    for label in work:
        rows[label].wall = times[label]["wall"]
        rows[label].times = times[label].get("gpu", times[label]["wall"])
    case = Case("options", shape, dtype=dtype_name, group="options", names=(impl,))
    about = {
        "case": asdict(case),
        "device": str(device),
        "repeats": repeats,
        "judged_pages": few.pages,
    }
    return list(rows.values()), about


def _ratio(row: Row, base: Row) -> str:
    if row.failures:
        worst = max(row.failures, key=lambda e: e.share)
        return f"REFUSED: {worst.tensor} has {worst.share:.3g} x its budget ({worst.norm})"
    if row.times is None or base.times is None:
        return "-"
    return f"{base.times[1] / row.times[1]:.2f}x"


def heading(about: dict[str, Any]) -> list[str]:
    """What was measured, and on what."""
    product, judged, case = about["product"], about["errors_on"], about["case"]
    options = {k: v for k, v in case["options"].items() if v != getattr(Options(), k)}
    scope = "the whole batch"
    if not judged["whole"]:
        size = f"N = {judged['rows']:,}, M = {judged['anchors']:,}"
        scope = f"fewer pages ({size}): the reference does not fit at this shape, or takes long"
    return [
        f"{case['name']} on {about['device']}: {case['dtype']}{', tf32' if case['tf32'] else ''}, "
        f"N = {about['rows']:,} PV items, M = {about['anchors']:,} anchors, "
        f"{about['columns']:,} columns, "
        f"K = {about['history']:,} history items, D = {about['dim']}"
        + "".join(f", {k} {v}" for k, v in options.items()),
        f"floor: {about['floor_of']} flops in {about['floor_seconds'] * 1e3:.4g} ms, at the "
        f"{product['flops_per_second'] / 1e12:.4g} TFLOP/s of a product of size {product['size']}",
        f"errors: relative l2 against float64, on {scope}; "
        "budget: twice the error of eager code, or of its model (courier_fast.testing.budget), "
        "plus one rounding",
    ]


def report(rows: list[Row], about: dict[str, Any]) -> str:
    """The table, as text."""
    floor: float = about["floor_seconds"]
    base = next((r for r in rows if r.name == "eager" and r.times is not None), rows[0])
    titles = ("p20 ms", "p50 ms", "p80 ms", "wall ms", "peak MiB", "floor")
    columns = "".join(f"{x:>10}" for x in titles)
    columns += f"  errors (worst share of the budget)  [speed-up over {base.name}]"
    what = "forward" if about["case"]["forward"] else "forward + backward"
    lines = [*heading(about), "", f"{what:<19}{columns}"]
    for row in rows:
        if row.left_out is not None:
            lines.append(f"{row.name:<19}left out: {row.left_out}")
            continue
        assert row.times is not None
        assert row.wall is not None
        times = "".join(f"{t * 1e3:>10.3f}" for t in (*row.times, row.wall[1]))
        memory = "-" if row.memory is None else f"{row.memory / measure.MIB:.0f}"
        judged = "another loss"
        if row.errors is not None:
            each = ", ".join(f"{e.tensor} {e.error:.1e}" for e in row.errors if e.norm == "l2")
            judged = f"{each} ({max(e.share for e in row.errors):.2f})"
        lines.append(
            f"{row.name:<19}{times}{memory:>10}{floor / row.times[1]:>10.1%}  {judged}  "
            f"[{_ratio(row, base)}]"
        )
    return "\n".join(lines)


def as_json(rows: list[Row], about: dict[str, Any]) -> dict[str, Any]:
    table = [asdict(r) | {"failures": [asdict(e) for e in r.failures]} for r in rows]
    return about | {"results": table}


def main(arguments: Sequence[str] | None = None, extra: Sequence[Candidate] = ()) -> int:
    """Exit code 1 if ours or one of `extra` breaks the budget, or cannot run though asked for."""
    args = parse(arguments)
    shape = SHAPES[args.shape]
    if args.clicked is not None:
        shape = type(shape)(**(asdict(shape) | {"clicked": args.clicked}))
    options = Options(
        args.tau,
        args.negatives,
        args.direction,
        args.ids,
        args.log_q,
        args.items,
        attention=args.attention,
    )
    names = tuple(dict.fromkeys([*NAMES[:2], *(args.impl or NAMES)]))
    case = Case(args.shape, shape, options, args.dtype, args.forward, args.tf32, names=names)
    device = torch.device(args.device)
    rows, about = measured(case, device, args.repeats, not args.no_memory, extra)
    known = measure.surroundings(device)
    print(line_of(known))
    ours = [*OURS, *(c.name for c in extra)]
    print(report(rows, about))
    write_json(args.json, {"surroundings": known} | as_json(rows, about))
    broken = [r.name for r in rows if r.name in ours and r.failures]
    asked = set(args.impl or []) & set(OURS)
    missing = [r.name for r in rows if r.left_out is not None and r.name in asked]
    for text, names_of in (
        ("over the error budget", broken),
        ("asked for, but cannot run", missing),
    ):
        if names_of:
            print(f"{text}: {', '.join(names_of)}", file=sys.stderr)
    return 1 if broken or missing else 0


if __name__ == "__main__":
    sys.exit(main())
