"""Processes of a gloo group on this machine, with a limit on how long they may take."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from courier_fast.testing.poison import poisoned

GROUP_TIMEOUT = 60.0

# A server that has imported torch, timm and no more: its children begin at once, and have no
# threads of ours.
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "timm", "factories"])


def spawn(
    work: Callable[..., Any],
    size: int,
    folder: Path,
    *args: Any,
    seconds: float = 120,
    lost: Sequence[int] = (),
) -> list[Any]:
    """What work(*args) returns on each of `size` processes; None for those that are to be `lost`.

    AssertionError with the traceback of every process that failed, or of where it was after
    `seconds`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    processes = [
        _context.Process(target=_child, args=(work, rank, size, folder, seconds, args), daemon=True)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    end = time.monotonic() + seconds + 5
    try:
        for process in processes:
            process.join(max(end - time.monotonic(), 0.1))
    finally:
        for process in processes:
            process.kill()
            process.join()
    failures = [
        f"---- rank {rank}, exit code {process.exitcode}\n{(folder / f'{rank}.txt').read_text()}"
        for rank, process in enumerate(processes)
        if process.exitcode != 0 and rank not in lost
    ]
    assert not failures, "\n".join(failures)
    return [
        None if rank in lost else torch.load(folder / f"{rank}.pt", weights_only=False)
        for rank in range(size)
    ]


def _child(
    work: Callable[..., Any],
    rank: int,
    size: int,
    folder: Path,
    seconds: float,
    args: tuple[Any, ...],
) -> None:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton
    torch.set_num_threads(1)
    with open(folder / f"{rank}.txt", "w") as report:
        faulthandler.dump_traceback_later(seconds, file=report, exit=True)
        try:
            with poisoned():
                dist.init_process_group(
                    "gloo",
                    init_method=f"file://{folder}/rendezvous",
                    rank=rank,
                    world_size=size,
                    timeout=timedelta(seconds=GROUP_TIMEOUT),
                )
                found = work(*args)
            torch.save(found, folder / f"{rank}.pt")
        except BaseException:
            traceback.print_exc(file=report)
            report.flush()
            os._exit(1)  # a group whose others are gone may not be taken down in order
        finally:
            faulthandler.cancel_dump_traceback_later()
    # Everything is in files: taking the group down, PyTorch's threads of gloo may abort a process
    # on a busy machine.
    os._exit(0)


def run_script(source: str, size: int, folder: Path, *arguments: str, seconds: float = 240) -> None:
    """A script on `size` processes, with the environment that torchrun gives them.

    AssertionError with what all of them have printed as soon as one fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    about = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": size}
    about |= {"LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": 1}
    processes = {}
    for rank in range(size):
        environment = {k: str(v) for k, v in (about | {"RANK": rank, "LOCAL_RANK": rank}).items()}
        process = _context.Process(
            target=_script,
            args=(source, arguments, environment, folder / f"printed-{rank}.txt"),
            daemon=True,
        )
        process.start()
        processes[process.sentinel] = process
    left, end = set(processes), time.monotonic() + seconds
    try:
        while left and (done := wait(left, max(end - time.monotonic(), 0.1))):
            left -= set(done)  # type: ignore[arg-type]
            for sentinel in done:
                processes[sentinel].join()  # type: ignore[index]
            if any(processes[sentinel].exitcode for sentinel in done):  # type: ignore[index]
                break
    finally:
        for process in processes.values():
            process.kill()
            process.join()
    codes = [process.exitcode for process in processes.values()]
    printed = [path.read_text() for path in sorted(folder.glob("printed-*.txt"))]
    assert codes == [0] * size, "\n".join([f"exit codes {codes}", *printed])


def _script(
    source: str, arguments: tuple[str, ...], environment: dict[str, str], printed: Path
) -> None:
    os.environ.update(environment)
    with printed.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    sys.argv = ["worker.py", *arguments]
    exec(compile(source, "worker.py", "exec"), {"__name__": "__main__"})
