"""What is there, as lines; each thing is looked for in a process of its own, so that one that is
missing or broken costs its line."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from .. import __version__
from .probes import MODULES, PACKAGES

SECONDS = 60.0  # for an import
# What changes which implementation runs, and how.
VARIABLES = (
    "TRITON_INTERPRET",
    "COURIER_FAST_CPU_VARIANT",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
)
# `-m` puts the working directory first, where anything may lie.
_BOOT = (
    "import sys; del sys.path[0]; sys.path += {paths!r}; "
    "from courier_fast.doctor.probes import main; main()"
)


def lines() -> Iterator[tuple[str, str]]:
    """(what, about it), the package itself first."""
    yield "courier_fast", f"{__version__}, {Path(__file__).parent.parent}"
    system = f"{platform.system()} {platform.release()}, {platform.machine()}"
    yield "Python", f"{platform.python_version()}, {system}, {_processors()} CPUs"
    given = [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    if given:
        yield "environment", ", ".join(given)
    names = ["losses", *MODULES]
    started = [_start(name) for name in names]  # all at once
    for name, process in zip(names, started, strict=True):
        yield from _found(name, process)


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _start(name: str) -> subprocess.Popen[str]:
    package = str(Path(__file__).parent.parent.parent)
    command = [sys.executable, "-c", _BOOT.format(paths=[package]), name]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, stdout=pipe, stderr=pipe, text=True, errors="replace", stdin=subprocess.DEVNULL
    )


def _found(name: str, process: subprocess.Popen[str]) -> Iterator[tuple[str, str]]:
    late = False
    try:
        out, err = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        late = True
    for line in out.splitlines():
        what, tab, text = line.partition("\t")
        if tab:  # what packages print while they are imported has none
            yield what, text
    if process.returncode:
        what = "PyTorch" if name == "losses" else name
        yield what, _problem(what, process.returncode, err, late)


def _problem(name: str, code: int, err: str, late: bool) -> str:
    if late:
        return f"not imported within {SECONDS:.0f} s"
    if code < 0:
        return f"broken: its process ended by {signal.Signals(-code).name}"
    said = [line.strip() for line in err.splitlines() if line.strip()]
    last = said[-1][:400] if said else f"its process ended with {code}"
    module = MODULES.get(name, "torch")
    missing = {f"'{module[:end]}'" for end in (len(module), module.find("."))}
    if last.startswith("ModuleNotFoundError") and any(last.endswith(x) for x in missing):
        return f"not installed (package {PACKAGES.get(name, 'torch')})"
    return f"broken: {last}"
