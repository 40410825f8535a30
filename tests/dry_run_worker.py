"""Takes every launch through Triton's own way to the GPU but for the last step, and prints what
came out as JSON.

Run by test_dry_run.py, as a process of its own: in one with TRITON_INTERPRET=1, @triton.jit gives
something that cannot be compiled.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import sys
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from bench.launches import Launch, launches, lowered
from courier_fast.kernels.triton import tiles
from courier_fast.kernels.triton.tiles import SHARED_MEMORY

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SIZES = (0, 1, 2, 15, 16, 17)
OPTIONS: tuple[dict[str, Any], ...] = (
    {},
    {"masks": True, "ids": True, "weights": True, "reduction": "sum"},
    {"direction": "identify", "stats": True, "reduction": "none"},
    {"direction": "both", "tensor_tau": True, "log_q": True, "stats": True},
    {"direction": "both", "negatives": "other_pages", "projected": True, "num_heads": 2},
    {"negatives": "page", "ids": True, "reduction": "none"},
    {"table": True, "tensor_tau": True},
    {"table": True, "direction": "both", "reduction": "none"},
    {"attention": "candidate", "tensor_tau": True, "log_q": True, "stats": True, "masks": True},
    {"attention": "candidate", "table": True, "cosine": True, "reduction": "none"},
)
# What chooses path and tile in kernels/triton/tiles.py: compute capability, embedding dimension,
# type, options.
PATHS: tuple[tuple[int, int, torch.dtype, dict[str, Any]], ...] = (
    (80, 1, BF16, {}),
    (80, 256, BF16, {"table": True, "everything": False}),
    (80, 100, FP32, {"tf32": True, "everything": False}),
    (86, 128, FP16, {"everything": False}),
    (86, 256, BF16, {"ids": True}),
    (86, 256, FP32, {"tf32": True, "everything": False}),
    (90, 17, FP32, {"table": True, "everything": False}),
    (100, 256, BF16, {}),
    (100, 300, BF16, {"reduction": "none", "everything": False}),
    (120, 64, FP16, {"table": True, "everything": False}),
    (120, 256, BF16, {"tensor_tau": True, "everything": False}),
    (120, 1024, FP32, {"everything": False}),
    (80, 768, BF16, {"attention": "candidate", "cosine": True, "everything": False}),
    (86, 256, BF16, {"attention": "candidate", "negatives": "page", "everything": False}),
    (120, 256, FP32, {"attention": "candidate", "table": True, "everything": False}),
)


def size_cases() -> list[dict[str, Any]]:
    """Arguments of `launches`: PV rows, history rows and pages of each size, and all of them at
    once, with every option."""
    shapes = [s for n in SIZES for s in ((1, n, 5), (1, 5, n), (n, 1, 1), (3, n, n))]
    return [
        {"dim": 64, "dtype": BF16, "pages": pages, "items": items, "past": past} | options
        for options, (pages, items, past) in itertools.product(OPTIONS, shapes)
    ]


def path_cases() -> list[dict[str, Any]]:
    return [
        {"dim": dim, "dtype": dtype, "capability": capability} | options
        for capability, dim, dtype, options in PATHS
    ]


def compile_one(job: tuple[Launch, int, str, tuple[str, ...]]) -> dict[str, Any]:
    launch, capability, label, stages = job
    result = {"kernel": launch.name, "capability": capability, "case": label}
    result |= {"fp_fusion": launch.fp_fusion, "limit": SHARED_MEMORY[capability]}
    try:
        shared = lowered(launch, capability, stages).get("shared", 0)
        return result | {"error": None, "shared": shared}
    except Exception as error:  # one kernel that does not compile must not hide the others
        return result | {"error": f"{type(error).__name__}: {error}"[-600:]}


JOBS: list[tuple[Launch, int, str, tuple[str, ...]]] = []


def compile_number(number: int) -> dict[str, Any]:
    return compile_one(JOBS[number])


def compiled(cases: list[dict[str, Any]], stages: tuple[str, ...]) -> list[dict[str, Any]]:
    found: dict[tuple[str, int], Any] = {}
    for case in cases:
        capability = case.get("capability", 90)
        for x in launches(**case):
            found.setdefault((x.key, capability), (x, capability, str(case), stages))
    JOBS[:] = found.values()
    context = multiprocessing.get_context("fork")  # a spawned process would import torch again
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), mp_context=context) as pool:
        return list(pool.map(compile_number, range(len(JOBS))))


def sizes() -> list[dict[str, Any]]:
    """Sizes decide what is a constant and what a multiple of 16: the first stage sees all of
    that."""
    return compiled(size_cases(), ("ttir",))


def paths() -> list[dict[str, Any]]:
    return compiled(path_cases(), ("ttir", "ttgir", "llir"))


ATTENTIONS: tuple[dict[str, Any], ...] = (
    {"num_heads": 4, "projected": True},
    {"attention": "candidate"},
    {"attention": "candidate", "cosine": True, "num_heads": 4, "projected": True},
)


def memory(capability: int, kind: str, dim: int) -> dict[str, Any]:
    """Of a type of rows ("tf32": float32 and such products): what each launch takes of shared
    memory, and what `tiles.candidate_bytes` says, without gradients and with them."""
    dtype, tf32 = (FP32, True) if kind == "tf32" else (getattr(torch, kind), False)
    sizes = {"dim": dim, "dtype": dtype, "capability": capability, "tf32": tf32}
    cases = [sizes | {"everything": False} | options for options in ATTENTIONS]
    found = compiled(cases, ("ttir", "ttgir", "llir"))
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    said = [tiles.candidate_bytes(dtype, dim, gradients) for gradients in (False, True)]
    return {"launches": found, "said": said}


def heads() -> list[str]:
    """The attention's gradients with several heads after Triton's first stage, as text."""
    found = launches(64, BF16, num_heads=4, projected=True, everything=False)
    return [
        str(lowered(x, 90, ("ttir",))["module"])
        for x in found
        if x.name in ("attend_sums", "attend_dq", "attend_dkv")
    ]


def ragged() -> list[int]:
    """Kernels compiled in all, after each of 40 batches of random sizes."""
    draw = random.Random(0)
    keys: set[str] = set()
    counts = []
    for _ in range(40):
        pages, items, past = draw.randint(1, 400), draw.randint(1, 8), draw.randint(1, 40)
        found = launches(256, BF16, pages=pages, items=items, past=past, everything=False)
        keys |= {x.key for x in found}
        counts.append(len(keys))
    return counts


if __name__ == "__main__":
    torch.set_num_threads(1)  # a forked process would wait forever for the threads of this one
    if sys.argv[1] == "memory":
        found: Any = memory(int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        found = {"sizes": sizes, "paths": paths, "heads": heads, "ragged": ragged}[sys.argv[1]]()
    json.dump(found, sys.stdout)
