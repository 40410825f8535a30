"""Compiles kernels for a GPU that need not be there, and reports what came out as JSON.

Run by test_compile_targets.py, as a process of its own: in one with TRITON_INTERPRET=1, @triton.jit
gives something that cannot be compiled.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from bench.launches import compiled, launches_of


@triton.jit
def product(x_ptr, y_ptr, out_ptr, steps, BLOCK: tl.constexpr, WIDE: tl.constexpr):  # noqa: N803
    """x y^T, accumulated over `steps`; with WIDE = 512 there are too few registers for it."""
    row = tl.arange(0, BLOCK)[:, None]
    x = tl.load(x_ptr + row * BLOCK + tl.arange(0, BLOCK)[None, :])
    column = tl.arange(0, WIDE)[:, None]
    total = tl.zeros([BLOCK, WIDE], tl.float32)
    for step in range(steps):
        y = tl.load(y_ptr + step * WIDE * BLOCK + column * BLOCK + tl.arange(0, BLOCK)[None, :])
        total = tl.dot(x, tl.trans(y), total)
    tl.store(out_ptr + row * WIDE + tl.arange(0, WIDE)[None, :], total)


@dataclass
class Case:
    """The same attributes as the launches of bench/launches.py."""

    name: str
    constexprs: dict[str, int]
    fn: Any = product
    num_warps: int = 4
    num_stages: int = 2
    registers: int | None = None
    must_not_spill: bool = True
    needs_wgmma: bool = True

    @property
    def signature(self) -> dict[str, str]:
        types = {"x_ptr": "*bf16", "y_ptr": "*bf16", "out_ptr": "*fp32", "steps": "i32"}
        return types | dict.fromkeys(self.constexprs, "constexpr")

    @property
    def constants(self) -> dict[str, int]:
        return self.constexprs

    @property
    def attributes(self) -> dict[tuple[int], Any]:
        return {(place,): [["tt.divisibility", 16]] for place in range(4)}


def own_cases() -> list[Case]:
    """Known answers: the first fits and multiplies with wgmma on sm_90, the second spills."""
    return [Case("fits", {"BLOCK": 64, "WIDE": 64}), Case("spills", {"BLOCK": 128, "WIDE": 512})]


def cases(which: str, capability: int) -> list[Any]:
    if which == "own":
        return own_cases()
    return launches_of(which, capability)


# Kernels whose loop over columns or candidates is counted, which takes a disassembly of each.
PASSES = ("scores", "columns", "history")
COUNTED = {"contrast", "binned_gradients"} | {
    f"{x}_{y}" for x in ("binned", "lane") for y in PASSES
}
# Launch and capability by what it compiles to: several labels have some in common.
JOBS: dict[tuple[str, int], Any] = {}  # forked processes have them


def compile_one(job: tuple[str, int]) -> dict[str, Any]:
    case, capability = JOBS[job], job[1]
    result: dict[str, Any] = {"name": case.name, "capability": capability}
    result["needs_wgmma"] = case.needs_wgmma
    result["constexprs"] = {k: x for k, x in case.constexprs.items() if isinstance(x, bool | int)}
    try:
        hot = capability == 90 and case.name in COUNTED
        found = compiled(case, capability, with_loop=hot)
    except Exception as error:  # one kernel that does not compile must not hide the others
        return result | {"error": f"{type(error).__name__}: {error}"[:2000]}
    return (
        result
        | {"error": None, "wgmma": found.wgmma > 0}
        | {name: getattr(found, name) for name in ("registers", "spilled", "shared", "loop")}
    )


def main() -> None:
    which, workers, *capabilities = sys.argv[1:]
    torch.set_num_threads(1)  # a forked process would wait forever for the threads of this one
    targets = [int(c) for c in capabilities]
    asked = [
        (label, (getattr(case, "key", case.name), target), case)
        for label in which.split(",")
        for target in targets
        for case in cases(label, target)
    ]
    JOBS.update((job, case) for _, job, case in asked)
    context = multiprocessing.get_context("fork")  # a spawned process would import torch again
    with ProcessPoolExecutor(int(workers), mp_context=context) as pool:
        found = dict(zip(JOBS, pool.map(compile_one, JOBS), strict=True))
    json.dump([{"which": label} | found[job] for label, job, _ in asked], sys.stdout)


if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)
    main()
