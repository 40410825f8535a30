"""Finds the fastest tiles of the contrast's passes on this GPU.

    python -m bench.tune [--dim 64 128 256] [--kind forward lse transposed] [--rows 32768]
                         [--out tiles.json]
    COURIER_FAST_TILES=tiles.json python train.py

For each pass and D: compiles every candidate and drops what spills or does not fit, checks the loss
and its gradients by the error budget, then times the whole loss in turns, so that a candidate is
judged by what it does to a step. tiles.json is written after each pass and D; entries that are in
it already are kept, and not tuned again.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from bench import measure
from bench.command import parser_of
from bench.errors import errors, loss_and_gradients, yardstick
from courier_fast.files import write_atomically
from courier_fast.testing.batches import Batch, Options, Shape, call, make_batch

KINDS = ("forward", "lse", "transposed")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("bench.tune", __doc__)
    add = parser.add_argument
    add("--dim", type=int, nargs="+", default=[64, 128, 256], choices=(64, 128, 256))
    add("--kind", nargs="+", default=list(KINDS), choices=KINDS)
    add("--rows", type=int, default=32_768, help="N, a multiple of 4")
    add("--clicked", type=float, default=1.0, help="share of the items that are anchors")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    add("--repeats", type=int, default=20, help="rounds at most")
    add("--seconds", type=float, default=30, help="after which no further round begins")
    add("--few", type=int, default=300, help="pages of the problem that errors are measured on")
    jobs = min(12, len(os.sched_getaffinity(0)))
    add("--jobs", type=int, default=jobs, help="processes that compile candidates")
    add("--block-m", type=int, nargs="+", default=[64, 128])
    add("--block-n", type=int, nargs="+", default=[32, 64, 128])
    add("--warps", type=int, nargs="+", default=[4, 8])
    add("--stages", type=int, nargs="+", default=[2, 3, 4])
    add("--out", type=Path, default=Path("tiles.json"))
    return parser.parse_args(arguments)


def grid(args: argparse.Namespace) -> Iterator[Any]:
    from courier_fast.kernels.triton.tiles import Tile

    for sizes in itertools.product(args.block_m, args.block_n, args.warps, args.stages):
        yield Tile(*sizes)


def fitting(tile: Any, kind: str, dim: int, capability: int) -> Any | None:
    """The tile with its programs on a multiprocessor; None if it spills or does not fit."""
    from bench.launches import compiled, launches_of
    from courier_fast.kernels.triton import tiles

    tiles.OVERRIDE = {("16-bit", k, dim): tile for k in KINDS}
    label = f"bf16-{dim}"
    for launch in launches_of(label, capability):
        if launch.name != "contrast":
            continue
        constants = launch.constexprs
        with_sum = "forward" if constants["NEED_VALUES"] else "lse"
        if kind != (with_sum if constants["NEED_SUM"] else "transposed"):
            continue
        try:
            x = compiled(launch, capability)
        except Exception:  # a tile that the compiler refuses is no candidate
            return None
        limit = tiles.SHARED_MEMORY.get(capability, 99 * 1024)
        if x.spilled or x.shared > limit:
            return None
        by_registers = 65_536 // (x.registers * 32 * tile.num_warps)
        return dataclasses.replace(tile, per_processor=max(1, min(by_registers, limit // x.shared)))
    return None


def fitted(candidates: list[Any], kind: str, dim: int, capability: int, jobs: int) -> list[Any]:
    """`fitting` of each, compiled in several processes: it takes seconds for one."""
    one = functools.partial(fitting, kind=kind, dim=dim, capability=capability)
    if jobs == 1:
        return [one(tile) for tile in candidates]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        return list(pool.map(one, candidates))


def step(batch: Batch, kind: str) -> Callable[[], object]:
    def alone() -> object:
        with torch.no_grad():
            return call(batch, "triton")

    if kind == "lse":
        return alone
    return functools.partial(loss_and_gradients, lambda b: call(b, "triton"), batch)


def _name(tile: Any) -> str:
    return f"{tile.block_m} x {tile.block_n}, {tile.num_warps} warps, {tile.num_stages} stages"


def tune(args: argparse.Namespace, kind: str, dim: int, device: torch.device) -> dict[str, Any]:
    """The entry of the fastest tile, as tiles.json has it."""
    from courier_fast.kernels.triton import tiles

    dtype = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}[
        args.dtype
    ]
    width = "float32" if args.dtype == "float32" else "16-bit"
    shape = Shape(args.rows // 4, 4, 10, dim, args.clicked)
    batch = make_batch(shape, Options(), dtype, device)
    checked = Shape(min(shape.pages, args.few), 4, 10, dim, args.clicked)
    small = make_batch(checked, Options(), dtype, device)
    judged = yardstick(small)

    def using(tile: Any, work: Callable[[], object]) -> object:
        tiles.OVERRIDE = {(width, kind, dim): tile}
        return work()

    before = tiles.contrast_tile(dtype, dim, device, kind)
    work: dict[str, Callable[[], object]] = {}
    measured: dict[str, Any] = {}
    same = functools.partial(dataclasses.replace, per_processor=before.per_processor)
    candidates = [before, *(t for t in grid(args) if same(t) != before)]
    known_of: list[Any] = candidates
    # The interpreter compiles nothing; only 16-bit launches are recorded for every D.
    if not tiles.interpreted() and width == "16-bit":
        known_of = fitted(candidates, kind, dim, tiles.capability(device), args.jobs)
    for tile, known in zip(candidates, known_of, strict=True):
        name = _name(tile)
        if known is None:
            print(f"  {name}: does not fit")
            continue
        found = using(known, lambda: loss_and_gradients(lambda b: call(b, "triton"), small))
        assert isinstance(found, dict)
        over = [e for e in errors(found, judged, dtype) if not e.passes]
        if over:
            print(f"  {name}: over the error budget: {over[0]}")
            continue
        measured[name] = known
        work[name] = functools.partial(using, known, step(batch, kind))
        work[name]()
    if not measured:
        raise RuntimeError(f"no tile fits: {kind}, D = {dim}")
    times = measure.interleaved_times(work, device, args.repeats, args.seconds)
    clock = "gpu" if device.type == "cuda" else "wall"
    for name in sorted(times, key=lambda n: times[n][clock][1]):
        print(f"  {name}: {times[name][clock][1] * 1e3:.4g} ms")
    best = min(times, key=lambda n: times[n][clock][1])
    present = times.get(_name(before))
    return {
        "type": width,
        "kind": kind,
        "stride": dim,
        "tile": dataclasses.asdict(measured[best]),
        "milliseconds": times[best][clock][1] * 1e3,
        "milliseconds_before": None if present is None else present[clock][1] * 1e3,
        "measured_on": str(measure.surroundings(device)["gpu"]),
        "rows": args.rows,
    }


def _write(entries: list[dict[str, Any]], path: Path) -> None:
    path.write_text(json.dumps(entries, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    from courier_fast.kernels.triton import tiles

    if not torch.cuda.is_available() and not tiles.interpreted():
        print("bench.tune: expected a CUDA device, found none", file=sys.stderr)
        return 2
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entries = json.loads(args.out.read_text()) if args.out.exists() else []
    done = {(x["type"], x["kind"], x["stride"]) for x in entries}
    before = tiles.OVERRIDE
    try:
        for dim, kind in itertools.product(args.dim, args.kind):
            width = "float32" if args.dtype == "float32" else "16-bit"
            if (width, kind, dim) in done:
                continue
            print(f"{kind}, D = {dim}")
            tiles.OVERRIDE = None
            entries.append(tune(args, kind, dim, device))
            write_atomically(args.out, functools.partial(_write, entries))
    finally:
        tiles.OVERRIDE = before
    return 0


if __name__ == "__main__":
    sys.exit(main())
