"""Every kernel once, against float64.

    python -m bench.gpu.smoke [--smallest] [--bare] [--rehearse]

--smallest: a few cases of a few rows that launch every kernel. --bare: nothing is compared and
memory is not filled with NaN, so that under compute-sanitizer little else than the kernels runs.
Exit code 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace

import torch

from bench.cases import VARIANTS
from bench.gpu.record import FAILED, SKIPPED, Result
from bench.gpu.setting import attempt
from courier_fast.doctor.cases import CANDIDATES, DTYPES, Case, of_a_machine, others
from courier_fast.doctor.check import (
    CannotRunError,
    Problems,
    WrongNumberError,
    check,
    observed,
    size_of,
)
from courier_fast.testing.batches import Options, Shape, graphed
from courier_fast.testing.interpreter import make_fast

# Lengths of histories on both sides of the widths into which pages are sorted.
HISTORIES = (1, 2, 15, 16, 17, 33, 64, 65, 100, 300)

# ---- which ---------------------------------------------------------------------------------------


def _variants(dtype: str, shape: Shape) -> list[Case]:
    """Everything that changes which kernels are launched, or their code."""
    options = VARIANTS | {
        "small temperature": Options(tau=0.01),
        "unique items": Options(unique_items=shape.pages * shape.items // 2),
    }
    del options["bare"]  # measured by itself
    found = [Case(name, dtype, shape, x) for name, x in options.items()]
    found.append(Case("heads", dtype, shape, more={"num_heads": 4}))
    found += _candidates(dtype, shape)
    found.append(Case("every item clicked", dtype, replace(shape, clicked=1.0)))
    return found


def _candidates(dtype: str, shape: Shape) -> list[Case]:
    # Few pages: the reference takes one after the other.
    few = replace(shape, pages=min(shape.pages, 30))
    unique = few.pages * few.items // 2
    return [
        Case(name, dtype, few, replace(x, unique_items=unique if x.unique_items else 0))
        for name, x in CANDIDATES.items()
    ]


def _histories(dtype: str, dim: int, lengths: Sequence[int]) -> list[Case]:
    """Pages with histories of 1 to each length, by both kinds of attention."""
    return [
        Case(f"{kind}, histories to {n}", dtype, Shape(9, 3, n, dim, 0.4), options)
        for n in lengths
        for kind, options in {"anchor": Options(), **CANDIDATES}.items()
        if not options.unique_items
    ]


def smallest(dtype: str, dim: int) -> list[Case]:
    """Few rows, every kernel."""
    again = (
        "anchor, identify",
        "mean",
        "page",
        "other pages",
        "learned temperature",
        "heads",
        "candidate, unique items",
    )
    return [x for x in of_a_machine(dtype, dim, 768) if x.gradients and x.name not in again]


def every(rehearse: bool) -> list[Case]:
    """All of them, what people use most first."""
    if rehearse:
        shape = Shape(9, 4, 5, 32, 0.4)
        found = [Case("loss", x, shape) for x in DTYPES]
        found += [*others("float32", shape), *_variants("float32", shape)]
        found += _histories("float32", 32, (1, 40))
        return [*found, Case("graph", "float32", shape, what="graph")]
    sizes = (150, 5, 12)
    main = Shape(*sizes, 256, 0.4)
    found = _candidates("bfloat16", main)[:2]  # the default call
    dims = {
        "bfloat16": (256, 128, 64, 100, 768),
        "float16": (256, 64, 768),
        "float32": (256, 64, 768),
    }
    found += [Case("loss", x, replace(main, dim=d)) for x, ds in dims.items() for d in ds]
    found += [Case("loss", "float32", replace(main, dim=d), tf32=True) for d in (256, 128)]
    found += [Case("one row", "bfloat16", Shape(1, 1, 1, 256, 1.0))]
    found += [Case("one click", "bfloat16", Shape(1, 1, 1, 256, 1.0), what="sequence")]
    for dtype in DTYPES:
        found += others(dtype, main)
    found += [x for x in _variants("bfloat16", main) if x not in found]
    for dtype, dim in (("float32", 256), ("float16", 256), ("bfloat16", 768), ("float32", 768)):
        found += _candidates(dtype, replace(main, dim=dim))
    found += _histories("bfloat16", 256, HISTORIES)
    graphs = (Options(), Options(direction="both", ids=True), Options(unique_items=300))
    found += [
        Case(f"graph {i}", "bfloat16", main, x, what="graph") for i, x in enumerate(graphs, 1)
    ]
    candidate = next(x for x in found if x.name == "candidate")
    found.append(replace(candidate, name="graph candidate", what="graph"))
    return found + smallest("bfloat16", 256)


# ---- running -------------------------------------------------------------------------------------


def judged(case: Case, device: str, bare: bool = False) -> Result:
    """Runs it; with float64 beside it unless `bare`."""
    if device == "cpu" and case.dtype == "bfloat16":
        return Result("the interpreter's bfloat16 products are wrong", SKIPPED)
    problems = Problems(case, torch.device(device))
    batch = problems.batch(0)
    if case.what == "graph" and isinstance(reason := graphed(batch), str):
        return Result(reason, SKIPPED)
    try:
        if bare:
            ran = observed(case, case.function("triton"), batch, bare=True)
            kernels = sorted(set(ran.kernels))
            line = f"{size_of(batch)}: {len(kernels)} kernels ran"
            return Result(line, data={"kernels": kernels})
        found = check(problems, "triton")
    except CannotRunError as error:
        return Result(str(error), SKIPPED)
    except WrongNumberError as error:
        if error.__cause__ is not None:  # nothing was computed
            raise
        return Result(str(error), FAILED)
    return Result(found.line, data={"kernels": found.kernels, "worst": found.worst.share})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.smoke", description=__doc__)
    for name in ("smallest", "bare", "rehearse"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args(arguments)
    device = "cpu" if args.rehearse else "cuda"
    small = smallest("float32", 32) if args.rehearse else smallest("bfloat16", 256)
    if args.rehearse:
        make_fast()
    broken = 0
    for case in small if args.smallest else every(args.rehearse):
        result, sound = attempt(lambda case=case: judged(case, device, args.bare))  # type: ignore[misc]
        print(f"{case.key}: {result.status}: {result.line}", flush=True)
        broken += result.status == FAILED
        if not sound:
            break
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
