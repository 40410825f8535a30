"""Time, peak memory, the rate of a plain product, and what they were measured on."""

from __future__ import annotations

import ctypes
import gc
import importlib.metadata
import multiprocessing
import os
import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from datetime import datetime, timezone
from functools import partial
from pathlib import Path

import torch

from .candidates import Loss, make
from .errors import loss_and_gradients
from .problems import Batch, Options, Shape, make_batch

MIB = 2**20


def run_time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run: between two events on the stream, or of wall time on the CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    first.record()
    work()
    last.record()
    last.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1e3


def interleaved_times(
    losses: dict[str, Loss], batch: Batch, repeats: int
) -> dict[str, tuple[float, float, float]]:
    """p20, p50, p80 of forward and backward in seconds, in turns: all see the same machine."""
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    for _ in range(repeats):
        for name, loss in losses.items():
            gc.collect()
            seconds[name].append(
                run_time(partial(loss_and_gradients, loss, batch), batch.clicked.device)
            )
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return {
        k: tuple(torch.tensor(v, dtype=torch.float64).quantile(points).tolist())
        for k, v in seconds.items()
    }


def product_rate(dtype: torch.dtype, device: torch.device) -> tuple[int, float]:
    """(size, flops per second) of the best of five square products: the roof of everything here."""
    size = 8192 if device.type == "cuda" else 2048
    x = torch.randn(size, size, device=device).to(dtype)
    x @ x
    return size, 2 * size**3 / min(run_time(lambda: x @ x, device) for _ in range(5))


# ---- memory --------------------------------------------------------------------------------------


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _child(name: str, shape: Shape, options: Options, dtype: torch.dtype, threads: int) -> int:
    """Peak resident bytes of one forward and backward, over those before it."""
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    batch = make_batch(shape, options, dtype, cpu)
    candidate = make(name, batch)
    assert not isinstance(candidate, str)
    # Libraries load and start their threads on a small batch; what compiles, compiles on this one.
    small = Shape(48, shape.items, shape.longest_history, shape.dim, shape.clicked)
    first = batch if name.startswith("compile") else make_batch(small, options, dtype, cpu)
    loss_and_gradients(candidate.loss, first)
    del first
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident memory
    before = _status("VmRSS")
    loss_and_gradients(candidate.loss, batch)
    return _status("VmHWM") - before


def can_measure_memory(device: torch.device) -> bool:
    return device.type == "cuda" or os.access("/proc/self/clear_refs", os.W_OK)


def peak_memory(name: str, loss: Loss, shape: Shape, batch: Batch) -> int:
    """Bytes that one forward and backward needs at its peak over the inputs; gradients count."""
    device = batch.clicked.device
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before: int = torch.cuda.memory_allocated()
        loss_and_gradients(loss, batch)
        torch.cuda.synchronize()
        peak: int = torch.cuda.max_memory_allocated()
        return peak - before
    dtype = next(iter(batch.inputs.values())).dtype
    # Spawned: a fork would inherit thread pools that do not run.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        threads = torch.get_num_threads()
        return pool.submit(_child, name, shape, batch.options, dtype, threads).result()


def free_memory(device: torch.device) -> int:
    """Bytes that can still be allocated."""
    if device.type == "cuda":
        free: int = torch.cuda.mem_get_info()[0]
        unused: int = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return free + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 * 2**30


def logits_bytes(shape: Shape, full: bool) -> int:
    """About what M x N (full: N x N) float32 logits take with their mask, softmax and gradients."""
    columns = shape.pages * shape.items
    rows = columns if full else int(columns * shape.clicked)
    return 6 * 4 * rows * columns


def shape_that_fits(shape: Shape, device: torch.device) -> Shape:
    """The shape, or the same pages but fewer of them, so that the reference fits into memory."""
    limit = 0.8 * free_memory(device)
    share = min(1.0, (limit / logits_bytes(shape, False)) ** 0.5)
    return Shape(
        max(1, int(shape.pages * share)),
        shape.items,
        shape.longest_history,
        shape.dim,
        shape.clicked,
    )


# ---- surroundings --------------------------------------------------------------------------------


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: Sequence[str]) -> str | None:
    try:
        run = subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def surroundings(device: torch.device) -> dict[str, str | int | None]:
    """Versions, hardware, date and commit."""
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"])
    if commit is not None and _output(["git", "status", "--porcelain", "--untracked-files=no"]):
        commit += " and uncommitted changes"
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "courier-fast": _version("courier-fast"),
        "commit": commit,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "xformers": _version("xformers"),
        "gpu": gpu,
        "cpu": _processor(),
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else None,
    }
