"""Other programs that the stages start: Python modules, pytest, compute-sanitizer, ncu; and what
they print, read."""

from __future__ import annotations

import csv
import io
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.record import FAILED, SKIPPED, Result
from bench.gpu.setting import Setting

ROOT = Path(__file__).resolve().parent.parent.parent
# Set where the checkout could not be installed: its sources run as they are.
FROM_SOURCE = "BENCH_FROM_SOURCE"
# `python -m` puts the working directory first, and with it the source tree, which lacks the native
# library.
BOOT = (
    f"import os, runpy, sys; sys.path[:1] = [{str(ROOT)!r}] if "
    f"os.environ.get({FROM_SOURCE!r}) else []; "
    f"sys.path.append({str(ROOT)!r}); del sys.argv[0]; "
    "runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)"
)


def module(name: str, *arguments: str) -> list[str]:
    """The command that runs a module of the installed package, of bench/, or of another package."""
    return [sys.executable, "-c", BOOT, name, *arguments]


def found(tool: str) -> str | None:
    """Where a program of the CUDA toolkit is."""
    homes = [os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"]
    places = os.pathsep.join([os.environ.get("PATH", ""), *(f"{h}/bin" for h in homes if h)])
    return shutil.which(tool, path=places)


def run(command: Sequence[str], more: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit code and output, both streams. The driver kills what is still running when the stage's
    time is over."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | dict(more or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def last_lines(text: str, count: int = 3) -> str:
    return " | ".join([x.strip() for x in text.splitlines() if x.strip()][-count:])[:600]


# ---- pytest --------------------------------------------------------------------------------------


def tests(paths: Sequence[str], setting: Setting, *options: str) -> Result:
    # pytest-xdist may be missing: without the project's own options for it.
    own = ("-q", "-o", "addopts=--strict-markers", "-p", "no:cacheprovider", "--maxfail=10")
    code, text = run(module("pytest", *paths, *own, *options))
    (setting.out / f"{Path(paths[0]).stem}.txt").write_text(text)
    return of_pytest(code, text)


def of_pytest(code: int, text: str) -> Result:
    broken = re.findall(r"^(?:FAILED|ERROR) (.*)$", text, re.MULTILINE)
    data = {"exit": code, "broken": broken}
    line = last_lines(text, 1)
    if code == 5:
        return Result("no test was selected", FAILED, data)
    if code:
        return Result(
            f"{line}; first: {broken[0][:300] if broken else last_lines(text)}", FAILED, data
        )
    return Result(line, data=data)


# ---- compute-sanitizer ---------------------------------------------------------------------------

SANITIZERS = ("memcheck", "racecheck", "initcheck", "synccheck")


def sanitizer_command(tool: str, program: str = "compute-sanitizer") -> list[str]:
    smoke = module("bench.gpu.smoke", "--smallest", "--bare")
    return [program, "--tool", tool, "--error-exitcode", "66", "--print-limit", "20", *smoke]


def sanitize(tool: str, setting: Setting) -> Result:
    if setting.rehearse:
        command = sanitizer_command(tool)
        # The same for all four without the tool: once is enough.
        if tool == SANITIZERS[0]:
            code, text = run([*command[command.index(sys.executable) :], "--rehearse"])
            if code:
                return Result(last_lines(text), FAILED)
        return Result(f"not run: {' '.join(command[:7])} ... {' '.join(command[-3:])}")
    program = found("compute-sanitizer")
    if program is None:
        return Result("compute-sanitizer is not on the PATH", SKIPPED)
    # torch's cache would hide what is read outside of an allocation.
    code, text = run(sanitizer_command(tool, program), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
    (setting.out / f"{tool}.txt").write_text(text)
    return of_sanitizer(code, text)


def of_sanitizer(code: int, text: str) -> Result:
    """From its summary; without one it did not come to its end."""
    lines = [x.removeprefix("=========").strip() for x in text.splitlines() if x.startswith("===")]
    counts = re.findall(
        r"(?:ERROR SUMMARY: |\()(\d+) errors?", "\n".join(x for x in lines if "SUMMARY" in x)
    )
    if not counts:
        return Result(f"no summary (exit code {code}): {last_lines(text)}", FAILED)
    errors = max(int(x) for x in counts)
    data = {"errors": errors, "exit": code}
    if errors:
        seen = [x for x in lines if x and "COMPUTE-SANITIZER" not in x][:2]
        return Result(f"{errors} errors; first: {' '.join(seen)[:300]}", FAILED, data)
    if code:
        return Result(f"no errors, but exit code {code}: {last_lines(text)}", FAILED, data)
    return Result("no errors", data=data)


# ---- ncu -----------------------------------------------------------------------------------------

# Sections, since names of metrics change from one architecture to the next.
SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
)
STALL = re.compile(
    r"smsp__average_warps?_(?:latency_)?issue_stalled_(\w+?)(?:_not_issued)?(?:_per_issue_active)?\.ratio"
)


# Steps, by the options of bench.gpu.target.
_DEFAULT = ("--attention", "candidate")
PROFILES: dict[str, tuple[str, ...]] = {
    "candidate paper": ("--shape", "paper", *_DEFAULT),
    "candidate paper, cosine": ("--shape", "paper", *_DEFAULT, "--cosine"),
    "paper": ("--shape", "paper"),
    "candidate big20": ("--shape", "big20", *_DEFAULT),
    "big20": ("--shape", "big20"),
}
# The kernels with a product in their loop: the contrast, and those of attention for each candidate.
KERNELS = r"regex:^(contrast|\w+_(scores|columns|history))$"


def profile_command(what: str, log: Path, program: str = "ncu") -> list[str]:
    """The passes of one step, after it has run before."""
    sections = [x for name in SECTIONS for x in ("--section", name)]
    options = ["--profile-from-start", "off", "--kernel-name", KERNELS, "--csv", "--page", "raw"]
    target = module("bench.gpu.target", *PROFILES[what])
    return [program, *options, "--log-file", str(log), *sections, *target]


def profile(what: str, setting: Setting) -> Result:
    log = setting.out / f"ncu-{what.replace(', ', '-').replace(' ', '-')}.csv"
    if setting.rehearse:
        command = profile_command(what, log)
        target = [*PROFILES[what], "--rehearse"]
        once = PROFILES[what][1] == "paper"  # the others are the same but for the shape
        code, text = run(module("bench.gpu.target", *target)) if once else (0, "")
        if code:
            return Result(last_lines(text), FAILED)
        return Result(f"not run: {' '.join(command[:8])} ...")
    program = found("ncu")
    if program is None:
        return Result("ncu is not on the PATH", SKIPPED)
    code, text = run(profile_command(what, log, program))
    return of_ncu(code, (log.read_text() if log.exists() else "") + "\n" + text)


def ncu_rows(text: str) -> list[dict[str, str]]:
    """Rows of `ncu --csv --page raw`: a header, a line of units, a line for each kernel; other
    lines are left out."""
    lines = [x for x in text.splitlines() if x.startswith('"')]
    start = next((i for i, x in enumerate(lines) if x.startswith('"ID"')), None)
    if start is None:
        return []
    rows = list(csv.DictReader(io.StringIO("\n".join(lines[start:]))))
    return [r for r in rows if (r["ID"] or "").strip()]  # the units have no ID


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None


def ncu_metrics(row: Mapping[str, str]) -> dict[str, Any]:
    """Tensor pipe and issue slots in percent, and the three largest reasons why warps wait, in
    cycles an instruction."""

    def largest(*parts: str) -> float | None:
        values = [_number(v) for k, v in row.items() if all(p in k for p in parts)]
        return max((v for v in values if v is not None), default=None)

    stalls = {m[1]: _number(v) for k, v in row.items() if (m := STALL.fullmatch(k))}
    known = sorted(
        ((v, k) for k, v in stalls.items() if v is not None and k != "selected"), reverse=True
    )
    issue = largest("issue_active", "pct")
    if issue is None and (each := largest("smsp__issue_active", "per_cycle_active")) is not None:
        issue = 100 * each
    return {
        "kernel": row.get("Kernel Name"),
        "tensor_pipe_percent": largest("pipe_tensor", "pct"),
        "issue_slots_percent": issue,
        "stalls": {k: v for v, k in known[:3]},
        "registers": largest("launch__registers_per_thread"),
    }


def of_ncu(code: int, text: str) -> Result:
    if "ERR_NVGPUCTRPERM" in text:
        return Result("this user may not read the GPU's counters (ERR_NVGPUCTRPERM)", SKIPPED)
    rows = [ncu_metrics(r) for r in ncu_rows(text)]
    if not rows:
        return Result(f"ncu gave no rows (exit code {code}): {last_lines(text)}", FAILED)
    shown = []
    for r in rows:
        waits = ", ".join(f"{k} {v:.2f}" for k, v in r["stalls"].items())
        tensor, issue = (
            ("?" if r[k] is None else f"{r[k]:.1f} %")
            for k in ("tensor_pipe_percent", "issue_slots_percent")
        )
        shown.append(f"{r['kernel']}: tensor pipe {tensor}, issue slots {issue}, waits for {waits}")
    return Result("; ".join(shown), data={"kernels": rows})
