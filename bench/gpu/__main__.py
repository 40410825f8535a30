"""The first hour on a GPU, as one command; in parts, if need be.

    python -m bench.gpu --out DIR [--minutes 9] [--stage NAME ...]
    TRITON_INTERPRET=1 python -m bench.gpu --rehearse --out DIR     every stage, tiny, on the CPU

Stages run in the order below, each in processes of its own with a share of the time; what one does
not use, the next ones get. Each case is written to DIR/<stage>.json as it ends, its output to
DIR/<stage>.log. The same command with the same DIR goes on with what is missing; a stage named by
--stage that was finished begins again. A crash, a CUDA fault or a hang costs its case only.
DIR/summary.md has a line for each stage and the targets beside what was measured. Nothing needs the
network; a package that is missing costs a line. A Python into which pip may not install (PEP 668)
gets a virtual environment, DIR/venv. Exit code 1 if something failed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench import report
from bench.command import parser_of, write_json
from bench.gpu import summary, tools
from bench.gpu.record import Record, finished
from bench.gpu.stages import STAGES, Stage
from bench.gpu.worker import FAULT
from courier_fast.files import write_atomically

# Seconds that a process has to end after its time.
GRACE = 5.0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("bench.gpu", __doc__)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR")
    add("--minutes", type=float, default=9, help="for everything; default: %(default)s")
    add(
        "--stage",
        nargs="+",
        choices=STAGES,
        metavar="NAME",
        help=f"of {', '.join(STAGES)}; default: all",
    )
    add("--rehearse", action="store_true", help="tiny problems on the CPU, in the interpreter")
    add("--no-install", action="store_true", help="take the package that is installed")
    args = parser.parse_args(arguments)
    if not args.minutes > 0:
        parser.error(f"--minutes: expected more than 0, got {args.minutes}")
    args.out = args.out.resolve()
    return args


# ---- the package ---------------------------------------------------------------------------------


def sources() -> str:
    """A digest of what is measured."""
    digest = hashlib.sha256()
    for folder in ("courier_fast", "kernels"):
        for path in sorted((tools.ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu"):
                digest.update(path.relative_to(tools.ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def _editable() -> bool:
    """Whether the package that is installed is this checkout itself."""
    try:
        text = importlib.metadata.distribution("courier_fast").read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return False
    about = json.loads(text or "{}")
    where = Path(about.get("url", "").removeprefix("file://"))
    return bool(about.get("dir_info", {}).get("editable")) and where.resolve() == tools.ROOT


def install(out: Path, source: str) -> str | None:
    """Builds and installs the checkout, without the network, if it is not there yet; what went
    wrong, if it did."""
    done = out / "installed.txt"
    if _editable() or (done.exists() and done.read_text() == source):
        return None
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--force-reinstall"]
    command = [sys.executable, "-m", "pip", "install", *options, str(tools.ROOT)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    (out / "install.log").write_text(run.stdout + run.stderr)
    if run.returncode:
        return f"{' '.join(command[1:])}: {tools.last_lines(run.stdout + run.stderr)}"
    done.write_text(source)
    return None


def externally_managed() -> bool:
    """Whether pip may not install into this Python (PEP 668): the system's, outside of any virtual
    environment."""
    marker = Path(sysconfig.get_path("stdlib")) / "EXTERNALLY-MANAGED"
    return sys.prefix == sys.base_prefix and marker.exists()


def own_python(out: Path) -> Path | str:
    """The Python of a virtual environment in `out` that sees the packages of this one; what to do
    where none can be made."""
    folder = out / "venv"
    python = folder / "bin" / "python"
    if not python.exists():
        # Without a pip of its own, which needs packages of the system; it sees this Python's.
        options = ["--system-site-packages", "--without-pip"]
        command = [sys.executable, "-m", "venv", *options, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            return (
                f"this Python is managed by the system (PEP 668) and {' '.join(command[1:])} "
                f"failed: {tools.last_lines(done.stdout + done.stderr)}. Make a virtual "
                "environment with --system-site-packages and run this in it"
            )
    return python


# ---- stages --------------------------------------------------------------------------------------


class Processes:
    """The worker processes of one stage, until its time is over."""

    def __init__(self, args: argparse.Namespace, name: str, stage: Stage, deadline: float) -> None:
        self.record, self.name, self.deadline = Record(args.out, name), name, deadline
        words = ["--out", str(args.out), "--deadline", repr(deadline)]
        self.command = tools.module("bench.gpu.worker", name, *words)
        self.command += ["--rehearse"] * args.rehearse
        self.log = args.out / f"{name}.log"
        most = max(1, len(os.sched_getaffinity(0)) // (2 if stage.workers > 1 else 1))
        self.count = min(stage.workers, most)
        self.environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        if args.rehearse:
            self.environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(self) -> subprocess.Popen:
        # A session of its own, so that what it starts ends with it.
        with open(self.log, "ab") as log:
            return subprocess.Popen(
                self.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.log.parent,
                env=self.environment,
                start_new_session=True,
            )

    def ended(self, process: subprocess.Popen, late: bool) -> bool:
        """Notes what it left open; whether another one should go on."""
        if late:
            reason = "stopped: no time left"
        else:
            tail = self.log.read_text(errors="replace")[-4000:]
            reason = f"its process ended with {process.returncode}: {tools.last_lines(tail, 2)}"
        had = self.record.settle(process.pid, reason, late)
        if process.returncode not in (0, FAULT) and not had and not late:
            with self.record.changed() as content:  # it did not even begin
                content["problem"] = reason
            return False
        return process.returncode != 0 and not late

    def run(self) -> None:
        running = [self.start() for _ in range(self.count)]
        while running:
            time.sleep(0.05)
            late = time.time() > self.deadline + GRACE
            for process in list(running):
                if late and process.poll() is None:
                    process.kill()
                    process.wait()
                if process.poll() is not None:
                    with contextlib.suppress(ProcessLookupError):  # what it started
                        os.killpg(process.pid, signal.SIGKILL)
                    running.remove(process)
                    if self.ended(process, late):
                        running.append(self.start())


def run_stage(args: argparse.Namespace, name: str, seconds: float, source: str) -> dict[str, Any]:
    record = Record(args.out, name)
    record.open_again()
    with record.changed() as content:
        content["source"] = source
    start = time.time()
    Processes(args, name, STAGES[name], start + seconds).run()
    with record.changed() as content:
        content["seconds"] += time.time() - start
        return dict(content)


def begin_again(args: argparse.Namespace) -> None:
    """Forgets finished stages that were asked for by name."""
    for name in args.stage or ():
        record = Record(args.out, name)
        if finished(record.read()):
            record.path.unlink()
            (args.out / f"{name}.log").unlink(missing_ok=True)
            if name == "tune":
                (args.out / "tiles.json").unlink(missing_ok=True)


def run_all(args: argparse.Namespace, source: str, command: str) -> None:
    deadline = time.time() + 60 * args.minutes
    names = [n for n in STAGES if args.stage is None or n in args.stage]
    left = [n for n in names if not finished(Record(args.out, n).read())]
    for i, name in enumerate(left):
        # A share of what is left, so that a quick stage leaves time to the later ones.
        shares = sum(STAGES[n].share for n in left[i:])
        seconds = (deadline - time.time()) * STAGES[name].share / shares
        if seconds < 1:
            print(f"{', '.join(left[i:])}: no time left; the same command goes on from here")
            break
        print(f"{name}: {seconds:.0f} s", flush=True)
        content = run_stage(args, name, seconds, source)
        failure = summary.first_failure(content)
        print(f"  {summary.state(content)}" + (f"; first failure: {failure}" if failure else ""))
        write_summary(args, source, command)


def write_summary(args: argparse.Namespace, source: str, command: str) -> dict[str, dict[str, Any]]:
    records = {name: Record(args.out, name).read() for name in STAGES}
    text = summary.markdown(records, command, args.rehearse, source)
    write_atomically(args.out / "summary.md", lambda path: path.write_text(text))
    return records


def write_tables(args: argparse.Namespace, command: str, records: Any) -> None:
    """bench's own tables and plots."""
    results = summary.results_of(records, command)
    folder = args.out / "bench"
    folder.mkdir(exist_ok=True)
    write_json(folder / "results.json", results)
    if not results["cases"] or results["copy_bytes_per_second"] is None:
        return
    try:
        report.write_report(results, folder)
    except Exception as error:  # plots are not worth a run
        print(f"bench: no tables: {type(error).__name__}: {error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    args = parse(arguments)
    if not args.rehearse and not torch.cuda.is_available():
        print("bench.gpu: expected a CUDA device, found none; --rehearse runs on the CPU")
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    words = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["python -m bench.gpu", *words])
    source = sources()
    problem = None
    if not args.no_install:
        if externally_managed():
            python = own_python(args.out)
            if isinstance(python, Path):  # all of this again, there
                run = subprocess.run([str(python), "-m", "bench.gpu", *words], check=False)
                return run.returncode
            problem = python
        else:
            problem = install(args.out, source)
    if problem is not None:
        os.environ[tools.FROM_SOURCE] = "1"
        print(f"not installed, the sources run as they are: {problem}", flush=True)
    begin_again(args)
    run_all(args, source, command)
    records = write_summary(args, source, command)
    write_tables(args, command, records)
    print((args.out / "summary.md").read_text())
    return 1 if summary.broken(records) else 0


if __name__ == "__main__":
    sys.exit(main())
