"""Results of the kernels against the definition in float64."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..loss.functional import REFUSED
from ..loss.launched import listening
from ..testing.batches import Batch
from ..testing.budget import DRAWS, Budget, Error, Rounding, Yardstick, held
from ..testing.poison import poisoned
from .cases import DTYPES, Case

# Random problems of few rows, and how many before a number is called wrong.
FIRST, MOST = 2, 8


class WrongNumberError(RuntimeError):
    """Not within the error budget, or not computed at all; names kernels and shape."""


class CannotRunError(RuntimeError):
    """The implementation refuses the problem, with its reasons."""


@dataclass
class Run:
    """Of one problem: the output and the gradients by input, and the kernels launched."""

    results: dict[str, Tensor] = field(default_factory=dict)
    forward: list[str] = field(default_factory=list)  # until the output
    kernels: list[str] = field(default_factory=list)


@contextlib.contextmanager
def noted(names: list[str]) -> Iterator[None]:
    """Adds the names of the kernels launched. On a GPU each waits for the one before, so that the
    last name is that of a failing one."""

    def hear(name: str) -> None:
        if torch.cuda.is_available() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.synchronize()
        names.append(name)

    with listening(hear):
        yield


def results(
    case: Case, function: Callable[[Batch], Tensor], batch: Batch, run: Run | None = None
) -> dict[str, Tensor]:
    """The output, and the gradient of each input that it depends on."""
    run = run or Run()
    with contextlib.nullcontext() if case.gradients else torch.no_grad():
        out = function(batch)
    run.forward = list(run.kernels)
    run.results = {"output": out.detach()}
    if case.gradients:
        inputs = case.inputs(batch)
        generator = torch.Generator().manual_seed(7)
        upstream = torch.randn(out.shape, generator=generator).to(out.device, out.dtype)
        gradients = torch.autograd.grad(out, list(inputs.values()), upstream)
        run.results |= dict(zip(inputs, gradients, strict=True))
    return run.results


def observed(
    case: Case, function: Callable[[Batch], Tensor], batch: Batch, bare: bool = False
) -> Run:
    """`bare`: memory is not filled with NaN."""
    run = Run()
    with noted(run.kernels), contextlib.nullcontext() if bare else poisoned():
        try:
            for _ in range(2 if case.what == "graph" else 1):  # captured, then replayed
                results(case, function, batch, run)
            if batch.clicked.is_cuda:
                torch.cuda.synchronize()
        except Exception as error:
            if REFUSED in str(error):
                raise CannotRunError(str(error).partition(REFUSED)[2].strip(": ")) from error
            kernel = run.kernels[-1] if run.kernels else "before the first kernel"
            line = f"{kernel}: {size_of(batch)}: {type(error).__name__}: {error}"
            raise WrongNumberError(line) from error
    return run


def size_of(batch: Batch) -> str:
    return f"N = {batch.rows}, M = {batch.anchors}, K = {len(batch.history)}, D = {batch.dim}"


def yardstick(case: Case, batch: Batch) -> Yardstick:
    """What the results are held to."""
    reference = case.function("reference")

    def rounded(draw: int) -> dict[str, Tensor]:
        rounding = Rounding(draw, batch.clicked.device)
        leaves: dict[str, Any] = {name: rounding.leaf(x) for name, x in batch.inputs.items()}
        found = results(case, reference, batch.with_inputs(leaves))
        return {name: held(x) for name, x in found.items()}

    truth = results(case, reference, batch.to(torch.float64))
    return Yardstick(truth, results(case, reference, batch), [rounded(i) for i in range(DRAWS)])


class Problems:
    """The random problems of a case on a device, each with its yardstick, made when they are asked
    for: several implementations are held to the same."""

    def __init__(self, case: Case, device: torch.device) -> None:
        self.case, self.device = case, device
        self._made: list[tuple[Batch, Yardstick]] = []

    def batch(self, seed: int) -> Batch:
        return self.case.batch(self.device, seed)

    def __getitem__(self, seed: int) -> tuple[Batch, Yardstick]:
        while len(self._made) <= seed:
            batch = self.batch(len(self._made))
            with precision(self.case):
                self._made.append((batch, yardstick(self.case, batch)))
        return self._made[seed]


@contextlib.contextmanager
def precision(case: Case) -> Iterator[None]:
    """Of float32 products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@dataclass
class Judged:
    """The error that takes most of its budget, and the kernels launched."""

    worst: Error
    size: str
    kernels: list[str]

    @property
    def line(self) -> str:
        e = self.worst
        return f"{self.size}: {e.tensor} ({e.norm}) has {e.share:.2f} x its budget"


def check(problems: Problems, impl: str, right: set[str] | None = None) -> Judged:
    """Raises WrongNumberError where `impl` is not within the budget of a case, CannotRunError where
    it refuses it.

    An excess may be luck where there are few numbers: it has to stay with more problems. `right`
    are the kernels of cases that were right before, and gets those of this one.
    """
    case, right = problems.case, set() if right is None else right
    function, budget = case.function(impl), Budget(DTYPES[case.dtype])
    runs: list[Run] = []
    first, most = (FIRST, MOST) if case.is_small else (1, 1)
    errors: list[Error] = []
    while len(runs) < first or (len(runs) < most and not all(e.passes for e in errors)):
        batch, judged = problems[len(runs)]
        with precision(case):
            runs.append(observed(case, function, batch))
        budget.add(judged, runs[-1].results)
        errors = budget.errors()
    worst = max(errors, key=lambda e: e.share if e.share == e.share else float("inf"))
    kernels = list(dict.fromkeys(name for run in runs for name in run.kernels))
    found = Judged(worst, size_of(problems[0][0]), kernels)
    wrong = {e.tensor for e in errors if not e.passes}
    if wrong:
        if "output" in wrong:
            kernels = list(dict.fromkeys(name for run in runs for name in run.forward))
        suspects = [name for name in kernels if name not in right] or kernels
        raise WrongNumberError(f"{found.line}; kernels: {', '.join(suspects)}")
    right.update(kernels)
    return found
