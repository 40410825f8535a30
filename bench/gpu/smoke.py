"""Every kernel once, against float64.

    python -m bench.gpu.smoke [--smallest] [--bare] [--rehearse]

--smallest: a few cases of a few rows that launch every kernel. --bare: nothing is compared and
memory is not filled with NaN, so that under compute-sanitizer little else than the kernels runs.
Exit code 1 if something is wrong.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

import courier_fast
from bench.candidates import call, graphed
from bench.cases import VARIANTS
from bench.gpu.record import FAILED, SKIPPED, Result
from bench.gpu.setting import attempt
from bench.problems import Batch, Options, Shape, make_batch
from courier_fast.testing.budget import DRAWS, Budget, Rounding, Yardstick, held

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# What only `group` and `memory` launch.
NOT_LAUNCHED = ("collect_rows",)
_COURIER = Options(courier=True)


@dataclass(frozen=True)
class Smoke:
    """One problem: the loss with its gradients, or one of the other functions."""

    name: str
    dtype: str
    shape: Shape
    options: Options = field(default_factory=Options)
    what: str = "loss"  # or "forward", "graph", "sequence", "reconstruct", "given" (R)
    tf32: bool = False
    more: dict[str, Any] = field(default_factory=dict)  # arguments of the function

    @property
    def key(self) -> str:
        s = self.shape
        size = f"{s.pages} pages of {s.items}, history to {s.longest_history}, D = {s.dim}"
        return f"{self.name}: {self.dtype}{' (tf32)' if self.tf32 else ''}, {size}"


# ---- which ---------------------------------------------------------------------------------------


def _variants(dtype: str, shape: Shape) -> list[Smoke]:
    """Everything that changes which kernels are launched, or their code."""
    options = VARIANTS | {
        "small temperature": Options(tau=0.01),
        "unique items": Options(unique_items=shape.pages * shape.items // 2),
    }
    del options["bare"]  # measured by itself
    found = [Smoke(name, dtype, shape, x) for name, x in options.items()]
    found.append(Smoke("heads", dtype, shape, more={"num_heads": 4}))
    # Few pages: the reference takes one after the other.
    few = replace(shape, pages=min(shape.pages, 30))
    candidate = Options(attention="candidate")
    found.append(Smoke("candidate", dtype, few, candidate))
    found.append(Smoke("candidate by cosines", dtype, few, replace(candidate, cosine=True)))
    unique = few.pages * few.items // 2
    found.append(
        Smoke("candidate, unique items", dtype, few, replace(candidate, unique_items=unique))
    )
    found.append(Smoke("every item clicked", dtype, Shape(*_sizes(shape), shape.dim, 1.0)))
    return found


def _sizes(shape: Shape) -> tuple[int, int, int]:
    return shape.pages, shape.items, shape.longest_history


def _others(dtype: str, shape: Shape) -> list[Smoke]:
    return [
        Smoke("no gradient", dtype, shape, what="forward"),
        Smoke("reconstruct", dtype, shape, what="reconstruct"),
        Smoke("given", dtype, shape, Options(direction="both", ids=True), what="given"),
        Smoke("click sequence", dtype, shape, what="sequence"),
        Smoke("three losses", dtype, replace(shape, pages=min(shape.pages, 60)), _COURIER),
    ]


def smallest(dtype: str, dim: int) -> list[Smoke]:
    """Few rows, every kernel."""
    shape = Shape(3, 2, 3, dim, 0.5)
    wide = Shape(3, 2, 3, 768, 0.5)
    some = ("both", "weights", "unique items", "candidate", "candidate by cosines")
    found = [Smoke("smallest", dtype, shape), *_others(dtype, shape)]
    found += [x for x in _variants(dtype, shape) if x.name in some]
    return [
        *found,
        Smoke("smallest", dtype, wide),
        Smoke("click sequence", dtype, wide, what="sequence"),
    ]


def every(rehearse: bool) -> list[Smoke]:
    """All of them, what people use most first."""
    if rehearse:
        shape = Shape(9, 4, 5, 32, 0.4)
        found = [Smoke("loss", x, shape) for x in DTYPES]
        found += [*smallest("float32", 32), *_variants("float32", shape)]
        return [*found, Smoke("graph", "float32", shape, what="graph")]
    sizes = (150, 5, 12)
    main = Shape(*sizes, 256, 0.4)
    dims = {
        "bfloat16": (256, 128, 64, 100, 768),
        "float16": (256, 64, 768),
        "float32": (256, 64, 768),
    }
    found = [Smoke("loss", x, Shape(*sizes, d, 0.4)) for x, ds in dims.items() for d in ds]
    found += [Smoke("loss", "float32", Shape(*sizes, d, 0.4), tf32=True) for d in (256, 128)]
    found += [Smoke("one row", "bfloat16", Shape(1, 1, 1, 256, 1.0))]
    found += [Smoke("one row", "bfloat16", Shape(1, 1, 1, 256, 1.0), what="sequence")]
    for dtype in ("bfloat16", "float16", "float32"):
        found += _others(dtype, main)
    found += _variants("bfloat16", main)
    graphs = (Options(), Options(direction="both", ids=True), Options(unique_items=300))
    found += [
        Smoke(f"graph {i}", "bfloat16", main, x, what="graph") for i, x in enumerate(graphs, 1)
    ]
    candidate = next(x for x in found if x.name == "candidate")
    found.append(replace(candidate, name="graph candidate", what="graph"))
    return found + smallest("bfloat16", 256)


# ---- running -------------------------------------------------------------------------------------


@contextlib.contextmanager
def noted() -> Iterator[list[str]]:
    """Names of the kernels launched. On a GPU each is waited for, so that the last name is that of
    a failing one."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names: list[str] = []
    kinds: tuple[Any, ...] = (JITFunction, InterpretedFunction)
    originals = [kind.run for kind in kinds]

    def replaced(original: Any) -> Any:
        def run(self: Any, *args: Any, **kwargs: Any) -> Any:
            names.append(self.fn.__name__)
            result = original(self, *args, **kwargs)
            if torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize()
            return result

        return run

    try:
        for kind, original in zip(kinds, originals, strict=True):
            kind.run = replaced(original)
        yield names
    finally:
        for kind, original in zip(kinds, originals, strict=True):
            kind.run = original


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty gives NaN and huge integers: nothing may depend on what was there before."""
    owners = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))
    originals = [getattr(owner, name) for owner, name in owners]

    def poison(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            x = original(*args, **kwargs)
            if x.dtype == torch.bool or x.device.type == "meta":
                return x
            return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

        return make

    try:
        for (owner, name), original in zip(owners, originals, strict=True):
            setattr(owner, name, poison(original))
        yield
    finally:
        for (owner, name), original in zip(owners, originals, strict=True):
            setattr(owner, name, original)


def _function(case: Smoke, impl: str) -> Callable[[Batch], Tensor]:
    if case.what == "sequence":
        return lambda b: courier_fast.click_sequence_loss(
            b.history, history_offsets=b.history_offsets, temperature=b.options.tau, impl=impl
        )
    if case.what == "reconstruct":
        return lambda b: courier_fast.reconstruct(
            b.pv, b.history, pv_offsets=b.pv_offsets, history_offsets=b.history_offsets, impl=impl
        )
    if case.what == "given":
        return lambda b: courier_fast.reconstruction_loss(
            b.pv,
            None,
            b.clicked,
            pv_offsets=b.pv_offsets,
            reconstructed=b.pv.flip(0),
            direction=b.options.direction,
            item_ids=b.item_ids,
            impl=impl,
        )
    return lambda b: call(b, impl, **case.more)


def run_once(case: Smoke, function: Callable[[Batch], Tensor], batch: Batch) -> dict[str, Tensor]:
    """The output, and the gradient of each input that it depends on."""
    if case.what == "forward":
        with torch.no_grad():
            return {"output": function(batch)}
    names = {"sequence": ("history",), "given": ("pv",)}.get(case.what, batch.inputs)
    inputs = {k: x for k, x in batch.inputs.items() if k in names}
    out = function(batch)
    generator = torch.Generator().manual_seed(7)
    upstream = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
    gradients = torch.autograd.grad(out, list(inputs.values()), upstream)
    return {"output": out.detach()} | dict(zip(inputs, gradients, strict=True))


def _batches(case: Smoke, device: str) -> list[Batch]:
    """Errors of a few numbers may be large or small by luck: of few rows there are several
    problems."""
    draws = 4 if case.shape.pages * case.shape.items < 32 else 1
    where, dtype = torch.device(device), DTYPES[case.dtype]
    return [make_batch(case.shape, case.options, dtype, where, seed) for seed in range(draws)]


def _run(case: Smoke, function: Callable[[Batch], Tensor], batch: Batch, bare: bool) -> Any:
    with contextlib.nullcontext() if bare else poisoned():
        found = run_once(case, function, batch)
        # Captured above, replayed here.
        return run_once(case, function, batch) if case.what == "graph" else found


def check(case: Smoke, device: str, bare: bool = False) -> Result:
    """Runs it; with float64 beside it unless `bare`."""
    if device == "cpu" and case.dtype == "bfloat16":
        return Result("the interpreter's bfloat16 products are wrong", SKIPPED)
    batches = _batches(case, device)[: 1 if bare else None]
    first = batches[0]
    size = f"N = {first.rows}, M = {first.anchors}, K = {len(first.history)}, D = {first.dim}"
    function = _function(case, "triton")
    if case.what == "graph":
        made = graphed(first)
        if isinstance(made, str):
            return Result(made, SKIPPED)
        function = made.loss
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    try:
        with noted() as names:
            try:
                found = [_run(case, function, batch, bare) for batch in batches]
            except Exception as error:
                kernel = names[-1] if names else "before the first kernel"
                raise RuntimeError(f"{kernel}: {size}: {type(error).__name__}: {error}") from error
        kernels = sorted(set(names))
        if bare:
            return Result(f"{size}: {len(kernels)} kernels ran", data={"kernels": kernels})
        return compared(case, batches, found, size, kernels)
    finally:
        torch.set_float32_matmul_precision(precision)


def yardstick(case: Smoke, batch: Batch) -> Yardstick:
    """What bench.errors has for the loss, for any of the functions."""
    reference = _function(case, "reference")

    def rounded(draw: int) -> dict[str, Tensor]:
        rounding = Rounding(draw, batch.clicked.device)
        leaves: dict[str, Any] = {name: rounding.leaf(x) for name, x in batch.inputs.items()}
        found = run_once(case, reference, batch.with_inputs(leaves))
        return {name: held(x) for name, x in found.items()}

    truth = run_once(case, reference, batch.to(torch.float64))
    return Yardstick(truth, run_once(case, reference, batch), [rounded(i) for i in range(DRAWS)])


def compared(
    case: Smoke, batches: list[Batch], found: list[dict[str, Tensor]], size: str, kernels: list[str]
) -> Result:
    budget = Budget(DTYPES[case.dtype])
    for batch, results in zip(batches, found, strict=True):
        budget.add(yardstick(case, batch), results)
    judged = budget.errors()
    worst = max(judged, key=lambda e: e.share if e.share == e.share else float("inf"))
    line = f"{size}: {worst.tensor} ({worst.norm}) has {worst.share:.2f} x its budget"
    data = {"kernels": kernels, "worst": worst.share}
    if all(e.passes for e in judged):
        return Result(line, data=data)
    return Result(f"{line}; kernels: {', '.join(kernels)}", FAILED, data)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.smoke", description=__doc__)
    for name in ("smallest", "bare", "rehearse"):
        parser.add_argument(f"--{name}", action="store_true")
    args = parser.parse_args(arguments)
    device = "cpu" if args.rehearse else "cuda"
    small = smallest("float32", 32) if args.rehearse else smallest("bfloat16", 256)
    broken = 0
    for case in small if args.smallest else every(args.rehearse):
        result, sound = attempt(lambda case=case: check(case, device, args.bare))  # type: ignore[misc]
        print(f"{case.key}: {result.status}: {result.line}", flush=True)
        broken += result.status == FAILED
        if not sound:
            break
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
