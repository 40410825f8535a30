"""What a change that is to change nothing is held to, written as JSON; and what another has
otherwise.

    python tests/gate.py NEW.json [--against OLD.json [--strict]] [--part losses ...]
                         [--compiled] [--ray]

losses    digests of the loss and of every gradient on the tests' problems, by each implementation
          that runs here
launches  kernels of each problem of bench/launches.py, their warps, stages and constants; with
          --compiled also registers, spills, shared memory and the contrast's loop (minutes)
memory    bytes and launches as test_memory.py counts them
host      seconds of an eager call of "triton" and its backward, all but the kernels
datasets  digests of small prepared datasets; with --ray also by that engine

Each checkout runs its own copy with the package that is installed from it. With --against it exits
1 where anything differs; times are compared as ratios, and count from 1.1 on with --strict.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import sys
import tempfile
import time
import types
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent))  # for bench; the installed package comes before the source tree

Part = dict[str, Any]  # what was found, by what it was found of
SLOWER = 1.1
NOTES = "package", "commit", "torch", "triton", "cpu"


def losses(only: Sequence[str] | None = None) -> Part:
    """Of the problems whose names are in `only`, by default of all."""
    import test_candidate_attention as candidate
    import test_loss as anchor
    import torch
    from factories import (
        IMPLS,
        LOSS_INPUTS,
        SEQUENCE_INPUTS,
        make,
        make_sequence,
        results,
    )

    from courier_fast.loss import operators
    from courier_fast.testing.interpreter import make_fast

    make_fast()
    torch.set_num_threads(1)

    def loss(p: Any, impl: str) -> torch.Tensor:
        return operators.loss(p, impl, False)[0]

    few = {"pages": 5}  # Triton's interpreter takes seconds for what a GPU does in microseconds
    attention = {"attention": "candidate"}
    kinds: list[tuple[str, Any, dict[str, dict[str, Any]], Any, Sequence[str]]] = [
        ("loss", make, anchor.CASES, loss, LOSS_INPUTS),
        ("click sequence", make_sequence, anchor.SEQUENCE, loss, SEQUENCE_INPUTS),
        (
            "reconstruct",
            make,
            {name: anchor.CASES[name] for name in anchor.RECONSTRUCT},
            operators.reconstruct,
            LOSS_INPUTS[:5],
        ),
        (
            "candidate",
            make,
            {name: few | case | attention for name, case in candidate.CASES.items()},
            loss,
            LOSS_INPUTS,
        ),
    ]
    half = {"loss": anchor.HALF_CASES, "candidate": candidate.HALF_CASES}
    found: Part = {}
    for kind, build, cases, run, inputs in kinds:
        for impl in IMPLS:
            for dtype in (torch.float32, *anchor.HALF[impl]):
                names = cases if dtype == torch.float32 else half.get(kind, ("plain",))
                for name in names:
                    if only is not None and name not in only:
                        continue
                    p = build(impl=impl, dtype=dtype, **cases[name])
                    if operators.unavailable_reasons(impl, p):
                        continue
                    of = results(lambda q, run=run, impl=impl: run(q, impl), p, inputs)
                    label = f"{kind}, {impl}, {str(dtype)[6:]}, {name}"
                    found |= {f"{label}: {key}": digest(x) for key, x in of.items()}
    return found


def digest(x: Any) -> str:
    import torch

    data = x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()[:16]


def launches(compile: bool = False) -> Part:
    from bench.launches import COMMON, SPECIAL, launches_of

    found: Part = {}
    labels = [*COMMON, *SPECIAL]
    for label in labels:
        for i, x in enumerate(launches_of(label, 90)):
            constants = {k: v for k, v in x.constexprs.items() if isinstance(v, bool | int)}
            found[f"{label}: {i} {x.name}"] = {
                "warps": x.num_warps,
                "stages": x.num_stages,
                "constants": dict(sorted(constants.items())),
            }
    if compile:
        from test_compile_targets import outcomes

        places = dict.fromkeys(labels, 0)
        for x in outcomes(",".join(labels), 90):
            label = x["which"]
            found[f"{label}: {places[label]} {x['name']}"] |= {
                key: x.get(key) for key in ("error", "registers", "spilled", "shared", "loop")
            }
            places[label] += 1
    return found


def memory() -> Part:
    from test_memory import walked

    return {f"{shape}: {key}": x for shape, of in walked().items() for key, x in of.items()}


def host(rounds: int = 30, calls: int = 20) -> Part:
    """The fastest round's, as others share the machine."""
    import torch
    import triton
    from factories import LOSS_INPUTS, make

    from bench.launches import recorded
    from courier_fast.loss import operators

    kernel = types.SimpleNamespace(
        launch_metadata=lambda *_: None, run=lambda *_: None, function=None, packed_metadata=None
    )
    torch.set_num_threads(1)
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "both, log_q": {"direction": "both", "log_q": True},
        "items, learned temperature": {"table": True, "tensor_tau": True},
        "candidate": {"attention": "candidate"},
    }
    found: Part = {}
    compile = triton.compiler.compile
    triton.compiler.compile = lambda *_, **__: kernel
    try:
        with recorded():
            triton.knobs.runtime.jit_cache_hook = None  # nothing is noted
            for name, case in cases.items():
                p = make(dtype=torch.bfloat16, **case)
                inputs = [x for k in LOSS_INPUTS if (x := getattr(p, k)) is not None]
                times = []
                for _ in range(rounds):
                    begin = time.perf_counter()
                    for _ in range(calls):
                        torch.autograd.grad(operators.loss(p, "triton", False)[0], inputs)
                    times.append((time.perf_counter() - begin) / calls)
                found[name] = min(times)
    finally:
        triton.compiler.compile = compile
    return found


def datasets(ray: bool = False) -> Part:
    import numpy as np
    import polars as pl
    from dataset_factory import draw
    from prepare_factory import digest, random_events, source_of

    from courier_fast.data.prepare.layouts import Source
    from courier_fast.data.prepare.options import PrepareOptions
    from courier_fast.data.prepare.run import prepare

    rng = np.random.default_rng(0)
    events = random_events(1, users=40, items=60, n=900)
    items = sorted({item for _, item, _ in events})
    shown = pl.LazyFrame(
        [
            (f"p{n // 4}", f"u{n // 4 % 13}", items[n * 7 % len(items)], n // 4 * 3600, n % 5 == 0)
            for n in range(600)
        ],
        ["page_id", "user_id", "item_id", "time", "clicked"],
        orient="row",
    )
    common = {"shard_rows": 37, "shard_bytes": 4000, "min_history": 1, "page_size": 4}
    sources: dict[str, tuple[Source, dict[str, Any], bool]] = {
        "uniform, images": (source_of(events), {}, True),
        "popularity": (source_of(events), {"negatives": "popularity", "repeats": "keep"}, False),
        "category": (
            source_of(events, {item: f"c{n % 5}" for n, item in enumerate(items[:-6])}),
            {"negatives": "category", "seed": 3},
            False,
        ),
        "pages": (
            Source("test", events=source_of(events).events, impressions=shown),
            {"keep_unclicked": True},
            False,
        ),
    }
    found: Part = {}
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images"
        images.mkdir()
        for n, item in enumerate(items):
            data = draw(rng, 20 + n, 30)
            (images / f"{item}.jpg").write_bytes(data[: 100 if n % 9 == 4 else None])
        for name, (source, options, pictures) in sources.items():
            for engine in ("local", "ray") if ray else ("local",):
                out = Path(folder) / f"{engine} {name}"
                prepare(
                    out,
                    source=source,
                    images=images if pictures else None,
                    options=PrepareOptions(**(common | options)),
                    engine=engine,
                )
                found |= {f"{engine}, {name}: {file}": x for file, x in digest(out).items()}
    return found


PARTS = {f.__name__: f for f in (losses, launches, memory, host, datasets)}


def about() -> dict[str, Any]:
    """Of what the digests are: on another processor or with another torch they may be others."""
    import torch

    import courier_fast
    from bench.measure import surroundings

    known = surroundings(torch.device("cpu")) | {"package": str(Path(courier_fast.__file__).parent)}
    return {name: known[name] for name in NOTES}


def in_a_process(part: str, *arguments: Any) -> Part:
    """With the interpreter where kernels are to compute something, else without."""
    os.environ.pop("TRITON_INTERPRET", None)
    if part == "losses":
        os.environ["TRITON_INTERPRET"] = "1"
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(PARTS[part], *arguments).result()


def differences(old: Part, new: Part) -> list[str]:
    """What is otherwise, a line each; of what has several values, those that are."""
    lines = []
    for key in [*old, *(k for k in new if k not in old)]:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            lines += [f"{key}, {line}" for line in differences(a, b)]
        elif a != b or (key in old) != (key in new):
            lines.append(
                f"{key}: {a if key in old else 'not there'} -> {b if key in new else 'not there'}"
            )
    return lines


def compared(old: dict[str, Any], new: dict[str, Any], strict: bool) -> bool:
    """Whether nothing differs; prints what does."""
    same = True
    for line in differences(old["about"], new["about"]):
        print(f"about: {line}")
    for part in PARTS:
        if (part in old) != (part in new):
            print(f"{part}: in one of the two only, not compared")
        elif part == "host" and part in new:
            for name in new[part].keys() & old[part].keys():
                ratio = new[part][name] / old[part][name]
                slower = ratio > SLOWER
                print(f"host: {name}: {ratio:.2f}{' SLOWER' if slower else ''}")
                same &= not (slower and strict)
        elif part in new:
            lines = differences(old[part], new[part])
            for line in (*lines, f"{len(lines)} differ of {len(new[part])}"):
                print(f"{part}: {line}")
            same &= not lines
    return same


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python tests/gate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("out", type=Path, metavar="NEW.json")
    add("--against", type=Path, metavar="OLD.json")
    add("--part", nargs="+", choices=PARTS, default=list(PARTS), help="default: all")
    add("--problem", nargs="+", metavar="NAME", help="of losses; default: all")
    add("--compiled", action="store_true", help="compile the launches, too")
    add("--ray", action="store_true", help="prepare with Ray, too")
    add("--strict", action="store_true", help=f"times above {SLOWER} of the other's count")
    args = parser.parse_args(arguments)
    old = json.loads(args.against.read_text()) if args.against else None
    more = {"losses": [args.problem], "launches": [args.compiled], "datasets": [args.ray]}
    new: dict[str, Any] = {"about": about()}
    for part in args.part:
        begin = time.perf_counter()
        new[part] = in_a_process(part, *more.get(part, ()))
        print(f"{part}: {len(new[part])} ({time.perf_counter() - begin:.0f} s)", flush=True)
    args.out.write_text(json.dumps(new, indent=1) + "\n")
    return 0 if old is None or compared(old, new, args.strict) else 1


if __name__ == "__main__":
    sys.exit(main())
