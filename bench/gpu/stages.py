"""The stages, in order, with their cases. A case gives a line and what it measured, or raises."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.gpu.record import FAILED, Result
from bench.gpu.setting import Cases, Setting

# Seconds of rounds that a timed case may take, once it is compiled and checked.
ROUNDS = 4.0


@dataclass(frozen=True)
class Stage:
    """`share` of the time, in seconds of nine minutes; `workers`: processes at a time, 1 where
    something is timed."""

    cases: Callable[[Setting], Cases]
    share: float
    workers: int = 1


def smoke(setting: Setting) -> Cases:
    from bench.gpu.smoke import every, judged

    return {x.key: partial(judged, x, setting.device) for x in every(setting.rehearse)}


# What runs on a GPU where there is one, quickest first, and which of its tests.
TESTS = {
    "test_cuda_graph": "",
    "test_stats": "triton",
    "test_edges": "triton",
    "test_layouts": "triton",
    "test_operator": "",
    "test_loss": "triton",
    "test_candidate_attention": "triton",
    "test_bfloat16": "",
    "test_schedule": "",
    "test_peers": "",
    "test_property": "triton",
    "test_compile": "triton",
}


def tests(setting: Setting) -> Cases:
    from bench.gpu import tools

    if setting.rehearse:
        every = [f"tests/{name}.py" for name in TESTS]
        some = ("tests/test_cuda_graph.py",)
        return {
            "all are found": lambda: tools.tests(every, setting, "--collect-only"),
            "one": lambda: tools.tests(some, setting, "-k", "without_a_gpu"),
        }
    return {
        name: partial(tools.tests, [f"tests/{name}.py"], setting, *(["-k", which] if which else []))
        for name, which in TESTS.items()
    }


def sanitizer(setting: Setting) -> Cases:
    from bench.gpu import tools

    return {tool: partial(tools.sanitize, tool, setting) for tool in tools.SANITIZERS}


# ---- timings -------------------------------------------------------------------------------------


def _tiny() -> Any:
    from bench.loss import Case
    from courier_fast.testing.batches import Shape

    shape = Shape(8, 4, 5, 32, 0.4)
    return Case("tiny", shape, dtype="float32", names=("reference", "eager", "triton"))


def _tiny_candidate() -> Any:
    from courier_fast.testing.batches import Options, Shape

    options = Options(attention="candidate")
    return replace(_tiny(), name="tiny candidate", shape=Shape(4, 3, 4, 32, 0.4), options=options)


def _measured(case: Any, setting: Setting, memory: bool) -> tuple[Result, dict[str, Any]]:
    """A line of ours beside the fastest other, and the rows by name."""
    import torch

    from bench.candidates import OURS
    from bench.loss import as_json, measured

    repeats, device = (1 if setting.rehearse else 50), torch.device(setting.device)
    rows, about = measured(case, device, repeats, memory, limit=ROUNDS)
    data = as_json(rows, about)
    found = {r["name"]: r for r in data["results"]}
    if found["triton"]["left_out"]:
        return Result(f"triton: {found['triton']['left_out']}", FAILED, data), found
    shown = [f"floor {about['floor_seconds'] * 1e3:.4g} ms"]
    right = {
        n: r for n, r in found.items() if r["times"] and not r["failures"] and not r["another"]
    }
    shown += [f"{n} {right[n]['times'][1] * 1e3:.4g} ms" for n in OURS if n in right]
    others = [n for n in right if n not in OURS]
    if others:
        best = min(others, key=lambda n: right[n]["times"][1])
        shown.append(f"best other {best} {right[best]['times'][1] * 1e3:.4g} ms")
    broken = [n for n in OURS if n in found and found[n]["failures"]]
    if broken:
        shown.append(f"over the error budget: {', '.join(broken)}")
    return Result("; ".join(shown), FAILED if broken else "passed", data), found


# What is measured first, the default call before all.
FIRST = (
    "candidate paper",
    "candidate paper, cosine",
    "paper",
    "candidate paper50",
    "candidate big20",
    "big20",
    "paper50",
    "candidate paper50, cosine",
    "candidate big20, cosine",
    "items",
    "candidate D = 768",
    "candidate float32",
    "big100",
    "forward",
    "big768",
    "candidate",
    "huge",
)


def bench(setting: Setting) -> Cases:
    import torch

    from bench import measure
    from bench.candidates import OURS
    from bench.cases import cases
    from bench.peers import NAMES as PEERS

    def copy() -> Result:
        rate = measure.copy_rate(torch.device(setting.device))
        return Result(f"{rate / 1e12:.3g} TB/s", data={"copy_bytes_per_second": rate})

    if setting.rehearse:
        tiny = (_tiny(), _tiny_candidate())
        return {c.name: partial(lambda c: _measured(c, setting, False)[0], c) for c in tiny}
    # torch.compile on every shape would take longer than everything else.
    short = ("reference", "eager", "lce", *PEERS, *OURS)
    compiled = ("paper", "big20", "big100", "candidate")
    chosen = [
        replace(c, names=tuple(n for n in c.names if n != "compile") or short)
        if c.name not in compiled
        else c
        for c in cases("cuda")
    ]
    chosen.sort(key=lambda c: FIRST.index(c.name) if c.name in FIRST else len(FIRST))
    measured: Cases = {c.name: partial(lambda c: _measured(c, setting, True)[0], c) for c in chosen}
    return {"copy": copy} | measured


def graph(setting: Setting) -> Cases:
    from bench.loss import Case
    from bench.problems import SHAPES
    from courier_fast.testing.batches import Options

    def one(case: Any) -> Result:
        result, found = _measured(case, setting, False)
        walls = {n: r["wall"][1] * 1e3 for n, r in found.items() if r["wall"]}
        line = ", ".join(f"{n} {ms:.4g} ms" for n, ms in walls.items() if n.startswith("triton"))
        missing = found["triton_graph"]["left_out"]
        return replace(result, line=f"wall: {line}" + (f"; no graph: {missing}" if missing else ""))

    names = ("triton", "triton_graph")
    if setting.rehearse:
        return {"tiny": lambda: one(replace(_tiny(), names=names))}
    default = Options(attention="candidate")
    found = {f"candidate {n}": Case(n, SHAPES[n], default, names=names) for n in ("paper", "tiny")}
    found |= {n: Case(n, SHAPES[n], names=names) for n in ("paper", "tiny", "paper50", "big20")}
    return {name: partial(one, case) for name, case in found.items()}


def options(setting: Setting) -> Cases:
    import torch

    from bench.cases import VARIANT_GOALS, VARIANTS, options_shape
    from bench.loss import as_json, measured_variants

    device = torch.device(setting.device)
    dtype = "float32" if setting.rehearse else "bfloat16"
    shape = _tiny().shape if setting.rehearse else options_shape("cuda")

    def one(name: str) -> Result:
        pair = {"bare": VARIANTS["bare"], name: VARIANTS[name]}
        repeats = 1 if setting.rehearse else 50
        rows, about = measured_variants(pair, shape, "triton", dtype, device, repeats, ROUNDS)
        data = as_json(rows, about)
        bare, other = rows
        if bare.times is None or other.times is None:
            return Result(str(bare.left_out or other.left_out), FAILED, data)
        ratio = other.times[1] / bare.times[1]
        goal = VARIANT_GOALS.get(name)
        line = f"{ratio:.3f} of the bare loss" + (f", at most {goal}" if goal else "")
        broken = bare.failures or other.failures
        if broken:
            return Result(f"{line}; over the error budget: {broken[0]}", FAILED, data)
        return Result(line, data=data | {"ratio": ratio})

    some = ("item ids", "statistics") if setting.rehearse else VARIANTS
    return {name: partial(one, name) for name in some if name != "bare"}


def tune(setting: Setting) -> Cases:
    from bench import tune as module

    path = setting.out / "tiles.json"

    def one(dim: int, kind: str) -> Result:
        size = ["--seconds", str(ROUNDS), "--dim", str(dim), "--kind", kind, "--out", str(path)]
        if setting.rehearse:
            size += ["--rows", "48", "--repeats", "1", "--dtype", "float32", "--few", "6"]
            size += [
                f"--{x}={n}"
                for x, n in (("block-m", 16), ("block-n", 32), ("warps", 4), ("stages", 2))
            ]
        if module.main(size):
            return Result("bench.tune failed", FAILED)
        entries = [
            x for x in json.loads(path.read_text()) if (x["kind"], x["stride"]) == (kind, dim)
        ]
        entry = entries[-1]
        t, before = entry["tile"], entry["milliseconds_before"]
        line = f"{t['block_m']} x {t['block_n']}, {t['num_warps']} warps, {t['num_stages']} stages"
        present = "does not fit" if before is None else f"{before:.4g} ms"
        return Result(
            f"{line}: {entry['milliseconds']:.4g} ms; the present tile: {present}", data=entry
        )

    every = [(dim, kind) for dim in (256, 128, 64) for kind in module.KINDS]
    return {
        f"{kind}, D = {dim}": partial(one, dim, kind)
        for dim, kind in every[-1:] * setting.rehearse or every
    }


# ---- the rest ------------------------------------------------------------------------------------


def profile(setting: Setting) -> Cases:
    from bench.gpu import tools

    return {what: partial(tools.profile, what, setting) for what in tools.PROFILES}


def step(setting: Setting) -> Cases:
    from bench.gpu.swin import share_of_the_loss

    return {"share of the loss": lambda: share_of_the_loss(setting)}


def dali(setting: Setting) -> Cases:
    from bench.gpu import tools

    def decode() -> Result:
        importlib.import_module("nvidia.dali")
        few = ["--count", "4", "--size", "32", "--batch", "4", "--repeats", "1"]
        only = ["--only", "software", "pillow", "dali-cpu", "dali"]
        arguments = [*(few if setting.rehearse else []), *only]
        code, text = tools.run(tools.module("bench.decode", *arguments))
        rates = [" ".join(x.split()[:2]) for x in text.splitlines() if x.split(" ")[0] in only]
        line = f"images/s: {'; '.join(rates)}"
        return (
            Result(line, data={"text": text})
            if code == 0
            else Result(tools.last_lines(text), FAILED)
        )

    return {"decode": decode}


# Is it right, how fast is it, and why; then what takes long to ask.
STAGES = {
    "smoke": Stage(smoke, 90, workers=12),
    "bench": Stage(bench, 150),
    "graph": Stage(graph, 20),
    "profile": Stage(profile, 35),
    "sanitizer": Stage(sanitizer, 60, workers=4),
    "tests": Stage(tests, 70, workers=4),
    "options": Stage(options, 35),
    "tune": Stage(tune, 40),
    "step": Stage(step, 25),
    "dali": Stage(dali, 15),
}
