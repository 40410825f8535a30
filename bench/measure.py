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
from pathlib import Path

import torch

from bench.candidates import Loss, make
from bench.errors import loss_and_gradients
from courier_fast.surroundings import has_slow_products
from courier_fast.testing.batches import Batch, Options, Shape, make_batch

MIB = 2**20


def run_time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run: between two events on the stream, or of wall time on the CPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        work()
        return time.perf_counter() - start
    torch.cuda.synchronize()
    return _between_events(work)


def _between_events(work: Callable[[], object]) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    work()
    last.record()
    last.synchronize()
    milliseconds: float = first.elapsed_time(last)
    return milliseconds / 1e3


# How long the GPU is kept waiting before a timed run, so that its launches are all queued by then.
QUEUE_SECONDS = 2e-3


def queued_time(work: Callable[[], object]) -> float:
    """Seconds of the GPU's work alone: it starts when all of it is queued. What synchronises with
    the host cannot be queued, and its waiting counts."""
    torch.cuda.synchronize()
    rate = torch.cuda.get_device_properties(torch.cuda.current_device())
    cycles = int(QUEUE_SECONDS * 1e3 * getattr(rate, "clock_rate", 1_800_000))
    torch.cuda._sleep(cycles)
    return _between_events(work)


def wall_time(work: Callable[[], object], device: torch.device) -> float:
    """Seconds on the host's clock, from one idle device to the next."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


Times = tuple[float, float, float]  # p20, p50, p80 in seconds


def interleaved_times(
    work: dict[str, Callable[[], object]],
    device: torch.device,
    repeats: int,
    limit: float = float("inf"),
) -> dict[str, dict[str, Times]]:
    """Times by kind ("gpu", "wall") of each candidate, in turns: all see the same machine.

    At least 5 rounds (or `repeats`); no more once they have taken `limit` seconds.
    """
    clocks: dict[str, Callable[[Callable[[], object]], float]] = {
        "wall": lambda w: wall_time(w, device)
    }
    if device.type == "cuda":
        clocks["gpu"] = queued_time
    seconds: dict[tuple[str, str], list[float]] = {(n, k): [] for n in work for k in clocks}
    gc.collect()
    gc.freeze()  # what is there stays: a collection then takes no time, however much was imported
    start = time.perf_counter()
    for done in range(repeats):
        if done >= 5 and time.perf_counter() - start > limit:
            break
        for name, run in work.items():
            gc.collect()
            for kind, clock in clocks.items():
                seconds[name, kind].append(clock(run))
    gc.unfreeze()
    points = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)
    return {
        name: {
            kind: tuple(
                torch.tensor(seconds[name, kind], dtype=torch.float64).quantile(points).tolist()
            )
            for kind in clocks
        }
        for name in work
    }


def product_rate(dtype: torch.dtype, device: torch.device) -> tuple[int, float]:
    """(size, flops per second) of the best of five square products: the roof of everything here; in
    float32 where that is faster."""
    size = 8192 if device.type == "cuda" else 2048
    x = torch.randn(size, size, device=device)
    if not has_slow_products(x.to(dtype)):
        x = x.to(dtype)
    x @ x
    return size, 2 * size**3 / min(run_time(lambda: x @ x, device) for _ in range(5))


def copy_rate(device: torch.device) -> float:
    """Bytes per second, read and written, of the best of five large copies: the roof of what is
    bound by memory."""
    size = 2**30 if device.type == "cuda" else 2**27
    x = torch.zeros(size, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    y.copy_(x)
    return 2 * size / min(run_time(lambda: y.copy_(x), device) for _ in range(5))


# ---- memory --------------------------------------------------------------------------------------


def _status(field: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise OSError(f"no {field} in /proc/self/status")


def _run(loss: Loss, batch: Batch, forward: bool) -> object:
    if not forward:
        return loss_and_gradients(loss, batch)
    with torch.no_grad():
        return loss(batch)


def _child(
    name: str, shape: Shape, options: Options, dtype: torch.dtype, threads: int, forward: bool
) -> int:
    """Peak resident bytes of one run, over those before it."""
    torch.set_num_threads(threads)
    cpu = torch.device("cpu")
    batch = make_batch(shape, options, dtype, cpu)
    candidate = make(name, batch)
    assert not isinstance(candidate, str)
    # Libraries load and start their threads on a small batch; what compiles, compiles on this one.
    small = Shape(48, shape.items, shape.longest_history, shape.dim, shape.clicked)
    first = batch if name.startswith("compile") else make_batch(small, options, dtype, cpu)
    _run(candidate.loss, first, forward)
    del first
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the peak of the resident memory
    before = _status("VmRSS")
    _run(candidate.loss, batch, forward)
    return _status("VmHWM") - before


def can_measure_memory(device: torch.device) -> bool:
    return device.type == "cuda" or os.access("/proc/self/clear_refs", os.W_OK)


def peak_memory(
    name: str, loss: Loss, shape: Shape, batch: Batch, forward: bool = False
) -> tuple[int, int | None]:
    """Bytes at the peak of one run over the inputs: with gradients, and without (on a GPU)."""
    device = batch.clicked.device
    if device.type == "cuda":

        def peak(work: Callable[[], object]) -> int:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before: int = torch.cuda.memory_allocated()
            result = work()
            torch.cuda.synchronize()
            highest: int = torch.cuda.max_memory_allocated()
            del result
            return highest - before

        whole = peak(lambda: _run(loss, batch, forward))
        if forward:
            return whole, whole
        # The gradients are not there yet in the forward pass.
        return whole, max(peak(lambda: loss(batch)), whole - batch.gradient_bytes)
    dtype = next(iter(batch.inputs.values())).dtype
    # Spawned: a fork would inherit thread pools that do not run.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        threads = torch.get_num_threads()
        job = pool.submit(_child, name, shape, batch.options, dtype, threads, forward)
        return job.result(), None


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


# Attention for each candidate is judged on no more than this: the model of its rounding takes
# seconds for it.
JUDGED_BYTES = 2**29


def logits_bytes(shape: Shape, options: Options, full: bool) -> int:
    """About what M x N (full: N x N) float32 logits take with their mask, softmax and gradients;
    or, with attention for each candidate, reconstructions of all N from every page with an anchor.
    """
    columns = shape.pages * shape.items
    if options.attention == "candidate":
        pages = shape.pages * (1 - (1 - shape.clicked) ** shape.items)
        return int(6 * 4 * pages * columns * shape.dim)
    rows = columns if full else int(columns * shape.clicked)
    return 6 * 4 * rows * columns


def shape_that_fits(shape: Shape, options: Options, device: torch.device) -> Shape:
    """The shape, or the same pages but fewer of them, so that the reference and the model of its
    rounding fit into memory."""
    limit = 0.8 * free_memory(device)
    if options.attention == "candidate" or options.courier:
        limit = min(limit, JUDGED_BYTES)
    # The model holds float64, and what it is moved by: 80 bytes a pair were measured, where the
    # reference takes 24.
    share = min(1.0, (limit / (4 * logits_bytes(shape, options, False))) ** 0.5)
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
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "load": f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else None,
    }
