"""`courier-fast doctor`: what is there; with --check also whether the numbers are right.

Nothing is imported here that may be missing.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ..testing.interpreter import make_fast
from .machine import lines

if TYPE_CHECKING:
    from .cases import Case

INTERPRET = "TRITON_INTERPRET"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--check",
        action="store_true",
        help="compute every loss, direction and gradient by every implementation that runs here, "
        "and hold them to the definition in float64; a minute on two CPUs. The exit status is 1 "
        "after the first wrong number",
    )


def run(args: argparse.Namespace) -> int:
    for what, text in lines():
        print(f"{what}: {text}", flush=True)
    return check() if args.check else 0


# ---- the check -----------------------------------------------------------------------------------


@dataclass
class Path:
    """One way to compute the losses on this machine, and the kernels that were right in it."""

    name: str
    impl: str
    device: str
    types: tuple[str, ...]
    some: tuple[str, ...] = ()  # a type that is checked in the commonest cases alone
    variables: dict[str, str] = field(default_factory=dict)
    right: set[str] = field(default_factory=set)

    @contextlib.contextmanager
    def set(self) -> Iterator[None]:
        """Its variables of the environment."""
        before = {name: os.environ.get(name) for name in self.variables}
        os.environ.update(self.variables)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value


def _paths() -> Iterator[Path]:
    """Those that can run; of others a line with the reason."""
    import torch

    from ..kernels.cpu import native

    if native.library is None:
        print(f"not checked: cpu: {native.error_text}")
    else:
        here = os.environ.get(native.VARIANT_VARIABLE)
        for variant in [here] if here else native.library.variants():
            types = ("float32", "bfloat16")
            yield Path(
                f"cpu, {variant}", "cpu", "cpu", types, variables={native.VARIANT_VARIABLE: variant}
            )
    interpreted = os.environ.get(INTERPRET) == "1"
    device = "cuda" if torch.cuda.is_available() and not interpreted else "cpu"
    for impl in ("triton", "xformers"):
        reasons = _reasons(impl, device)
        if reasons:
            print(f"not checked: {impl}: {'; '.join(reasons)}")
        elif device == "cuda":
            yield Path(f"{impl}, GPU", impl, device, ("bfloat16",), ("float32", "float16"))
        elif impl == "triton":  # the interpreter's products of bfloat16 are wrong
            make_fast()
            yield Path("triton, interpreter", impl, device, ("float32",), ("float16",))


def _reasons(impl: str, device: str) -> list[str]:
    import torch

    from ..loss.operators import unavailable_reasons
    from .probes import empty_problem

    return unavailable_reasons(
        impl, empty_problem(torch.device(device), torch.float32, 64, "anchor")
    )


# Checked in every type.
_COMMON = ("anchor", "candidate", "click sequence")


def _cases(path: Path, dtype: str) -> list[Case]:
    from dataclasses import replace

    from .cases import of_a_machine

    gpu = path.device == "cuda"
    found = of_a_machine(dtype, *((256, 768) if gpu else (32, 320)))
    if dtype in path.some:
        return [x for x in found if x.name in _COMMON]
    if gpu:
        of_graph = next(x for x in found if x.name == "anchor")
        more = replace(of_graph.shape, pages=30)
        found.append(replace(of_graph, name="CUDA graph", what="graph", shape=more))
    return found


def check() -> int:
    """1 after the first wrong number, or where nothing can be checked."""
    try:
        import torch
    except Exception as error:  # an installation that is broken fails in many ways
        print(f"nothing can be checked: {type(error).__name__}: {' '.join(str(error).split())}")
        return 1
    if not torch.cuda.is_available():
        os.environ[INTERPRET] = "1"  # before the kernels are imported
    from .check import CannotRunError, WrongNumberError

    start, count = time.monotonic(), 0
    problems: dict[tuple[str, Case], Any] = {}
    warnings.filterwarnings("ignore", category=RuntimeWarning, module="triton")
    for path in _paths():
        for dtype in (*path.types, *path.some):
            for case in _cases(path, dtype):
                print(f"{path.name}: {case.key}: ", end="", flush=True)
                try:
                    print(_checked(path, case, problems), flush=True)
                except CannotRunError as error:
                    print(f"not checked: {error}", flush=True)
                    continue
                except WrongNumberError as error:
                    print(f"WRONG: {error}", flush=True)
                    print("Please report this as an issue, with all of the above.")
                    return 1
                count += 1
    if not count:
        print("nothing can be checked: no implementation beside the definition runs here")
        return 1
    print(f"all {count} right, {time.monotonic() - start:.0f} s")
    return 0


def _checked(path: Path, case: Case, problems: dict[Any, Any]) -> str:
    """Paths on the same device are held to the same problems."""
    import torch

    from .check import Problems, check

    key = (path.device, case.key)
    if key not in problems:
        problems[key] = Problems(case, torch.device(path.device))
    with path.set():
        found = check(problems[key], path.impl, path.right)
    return f"right, {found.worst.share:.2f} of its budget"
