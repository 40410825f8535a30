"""Commands that a signal, a full disk or a bug ends: one line, the right status, nothing left
behind."""

from __future__ import annotations

import errno
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prepare_factory import random_events, source_of

from courier_fast import cli, disk, interrupt
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.run import prepare
from courier_fast.data.read.json_lines import json_lines
from courier_fast.disk import DiskFullError, new_map, writing
from courier_fast.files import parse_json, write_atomically
from courier_fast.messages import line_of

FULL = OSError(errno.ENOSPC, "No space left on device")


# ---- signals -------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A command of which `run` is given, in this process; gives its status. Signals are as in a
    terminal: what starts the tests may ignore some."""
    before = {n: signal.getsignal(n) for n in interrupt.SIGNALS}
    for number in interrupt.SIGNALS:
        signal.signal(
            number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        )

    def call(run: Any, *options: str) -> int:
        fake = type("Fake", (), {"add_arguments": lambda parser: None, "run": staticmethod(run)})
        monkeypatch.setitem(sys.modules, "courier_fast.fake", fake)
        monkeypatch.setitem(cli.COMMANDS, "fake", ("courier_fast.fake", "for a test"))
        return cli.main([*options, "fake"])

    yield call
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.long("killed processes", short=(signal.SIGTERM,))
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_signal_unwinds_and_is_the_status(command: Any, number: int) -> None:
    before = [signal.getsignal(n) for n in interrupt.SIGNALS]
    said = []

    def run(args: Any) -> int:
        try:
            os.kill(os.getpid(), number)
            time.sleep(9)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # once more: it does not disturb the cleaning up
            said.append("cleaned up")
        return 0

    assert command(run) == 128 + number
    assert said == ["cleaned up"]
    assert [signal.getsignal(n) for n in interrupt.SIGNALS] == before


def test_a_signal_of_which_a_library_makes_an_error(command: Any) -> None:
    """DuckDB says "Query interrupted", and an error in the cleaning up hid the signal, too."""

    def run(args: Any) -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(9)
        except KeyboardInterrupt:
            raise RuntimeError("Query interrupted") from None
        return 0

    assert command(run) == 143


def test_reading_json_lines_is_interrupted(command: Any, tmp_path: Path) -> None:
    """DuckDB reads them: a signal may come while its threads are at work, or between batches."""
    path = tmp_path / "a.jsonl"
    path.write_text('{"user": "u", "item": "i"}\n' * 300_000)
    read = []

    def run(args: Any) -> int:
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            for batch in json_lines(path, {}).read(["user", "item"]):
                if not read:  # until then what is slow is importing
                    signal.setitimer(signal.ITIMER_REAL, 0.3)
                read.append(len(batch))
        return 0

    before = signal.signal(signal.SIGALRM, lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    try:
        assert command(run) == 143
    finally:
        signal.signal(signal.SIGALRM, before)


def test_what_nohup_ignores_stays_ignored(command: Any) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert command(lambda args: os.kill(os.getpid(), signal.SIGHUP) or 0) == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_renames_that_belong_together_are_not_torn(command: Any) -> None:
    done = []

    def run(args: Any) -> int:
        with interrupt.signals_held():
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            done.append("both")
        done.append("never")
        return 0

    assert command(run) == 143
    assert done == ["both"]


@pytest.mark.long("killed processes")
def test_sigterm_left_the_partial_folder(tmp_path: Path) -> None:
    script = """
import sys, time
from courier_fast import cli
from courier_fast.data.prepare import plan
def wait(*_):
    print("writing", flush=True)
    time.sleep(60)
plan.write_shards = wait
sys.exit(cli.main(sys.argv[1:]))
"""
    rows = "".join(f"u{k % 5},i{k % 7},{1577836800 + 86400 * k}\n" for k in range(60))
    (tmp_path / "c.csv").write_text("user_id,item_id,timestamp\n" + rows)
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            script,
            "prepare",
            str(tmp_path / "ds"),
            "--interactions",
            str(tmp_path / "c.csv"),
        ],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None and child.stdout.readline() == b"writing\n"
    assert any("partial" in path.name for path in tmp_path.iterdir())
    child.send_signal(signal.SIGTERM)
    child.communicate(timeout=60)
    assert child.returncode == 143
    assert [path.name for path in tmp_path.iterdir()] == ["c.csv"]


# ---- full disks ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        FULL,
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        OSError("1000 requested and 400 written"),
        duckdb.IOException("Could not write file /x/sort.duckdb: No space left on device"),
        duckdb.OutOfMemoryException(
            "failed to offload data block of size 256.0 KiB (100 KiB/100 KiB used). "
            "max_temp_directory_size"
        ),
        pa.ArrowInvalid("[errno 28] Error writing bytes to file"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
        pl.exceptions.ComputeError("No space left on device"),
    ],
)
def test_whoever_says_that_a_disk_is_full(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(DiskFullError) as found, writing(tmp_path / "x", lambda: "it needs 5 GB"):
        raise error
    line = str(found.value)
    assert "\n" not in line
    assert line.startswith(f"{tmp_path}/x: cannot be written, ") and line.endswith(
        "; it needs 5 GB"
    )
    assert (
        "the quota is used up" if getattr(error, "errno", 0) == errno.EDQUOT else "the disk is full"
    ) in line
    assert " free of " in line


def test_other_errors_are_no_full_disk(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected 28"), writing(tmp_path):
        raise ValueError("expected 28")
    with pytest.raises(PermissionError), writing(tmp_path):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_map_on_a_full_disk_was_a_bus_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = new_map(tmp_path / "a", np.int32, (1000,))
    made[:] = 7
    made.flush()
    assert np.fromfile(tmp_path / "a", np.int32).tolist() == [7] * 1000
    assert (tmp_path / "a").stat().st_blocks * 512 >= 4000

    def full(*_: Any) -> None:
        raise FULL

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(DiskFullError, match=r"b: .*it needs 4\.0 kB"):
        new_map(tmp_path / "b", np.int32, (1000,))
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("where", ["write_rows", "write_shard", "write_shards", "sync_all"])
def test_prepare_on_a_full_disk_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    from courier_fast import output
    from courier_fast.data.prepare import in_threads, plan, steps

    def full(*_: Any, **__: Any) -> None:
        raise FULL

    owner, name = {
        "write_rows": (in_threads, "write_rows"),
        "write_shard": (steps, "write_shard"),
        "write_shards": (plan, "write_shards"),
        "sync_all": (output, "sync_all"),
    }[where]
    monkeypatch.setattr(owner, name, full)
    options = PrepareOptions(min_history=1, negatives="popularity")
    with pytest.raises(DiskFullError, match=r"ds: cannot be written, the disk is full .* written"):
        prepare(tmp_path / "ds", source=source_of(random_events(0)), options=options)
    assert not list(tmp_path.iterdir())


def test_a_file_on_a_full_disk_leaves_the_old_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def full(path: Path) -> None:
        path.write_text("half")
        raise FULL

    with pytest.raises(DiskFullError, match="a: cannot be written"):
        write_atomically(tmp_path / "a", full)
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def _spool(path: Path) -> None:
    with path.open("wb") as file:
        disk.write_rows(file, np.zeros(1 << 18))


def test_a_real_full_disk(tmp_path: Path) -> None:
    """Each of the ways in which the package writes, on a volume that is too small."""
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=128k", "none", tmp_path], capture_output=True
    ).returncode:
        pytest.skip("may not mount")
    try:
        from safetensors.torch import save_file
        from torch import zeros

        from courier_fast.embed.write import _allocate

        for write in (
            lambda path: path.write_bytes(bytes(1 << 20)),
            lambda path: save_file({"x": zeros(1 << 18)}, path),
            lambda path: pq.write_table(
                pa.table({"x": np.random.default_rng(0).normal(size=1 << 17)}), path
            ),
            _spool,
            lambda path: _allocate(path, 1 << 12, 64),
        ):
            with pytest.raises(DiskFullError, match="cannot be written, the disk is full"):
                write_atomically(tmp_path / "a", write)
            assert not list(tmp_path.iterdir())
    finally:
        subprocess.run(["umount", "-l", tmp_path], check=True)


# ---- the last net --------------------------------------------------------------------------------


class _PanicError(Exception):
    __module__ = "somelib.deep"


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (
            pl.exceptions.ComputeError("bad row\n\nYou might want to try:\n- increasing it"),
            2,
            "bad row (polars: ComputeError; courier-fast --debug fake ... shows where)",
        ),
        (
            duckdb.ConversionException("Conversion Error: no\nLINE 1: SELECT"),
            2,
            "Conversion Error: no (_duckdb: ConversionException",
        ),
        (_PanicError(""), 2, "_PanicError (somelib: _PanicError"),
        (
            KeyError("x"),
            1,
            "an error of its own, KeyError: 'x'; "
            "please report it with what courier-fast --debug fake ... shows",
        ),
        (AssertionError(), 1, "an error of its own, AssertionError: AssertionError"),
        (ZeroDivisionError("division by zero"), 1, "an error of its own"),
        (RecursionError("maximum"), 1, "an error of its own"),
        (
            MemoryError("Unable to allocate 9 GiB"),
            2,
            "the memory is not enough: Unable to allocate 9 GiB",
        ),
        (
            RuntimeError("CUDA out of memory. Tried to\nallocate"),
            2,
            "the memory is not enough: CUDA out of memory",
        ),
        (
            FileNotFoundError(2, "No such file or directory", "a.csv"),
            2,
            "a.csv: No such file or directory",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device", "/tmp/a"),
            2,
            "/tmp/a: cannot be written, the disk is full",
        ),
        (ValueError("x: expected 1, got 2"), 2, "fake: x: expected 1, got 2"),
        (ValueError("a" * 10_000), 2, "aaa ..."),
        (ValueError("\n".join("abcdefghijklmnopqrstuvwxyz")), 2, "l\n"),
    ],
)
def test_whatever_is_raised_is_a_line(
    command: Any, capsys: pytest.CaptureFixture[str], error: Exception, status: int, text: str
) -> None:
    def run(args: Any) -> int:
        raise error

    assert command(run) == status
    said = capsys.readouterr().err
    assert said.startswith("courier-fast fake: ") and text.replace("_duckdb", "") in said.replace(
        "_duckdb", ""
    )
    assert len(said) < 2000 and len(said.splitlines()) <= 12
    with pytest.raises(type(error)):
        command(run, "--debug")


def test_groups_of_exceptions_say_the_first() -> None:
    if sys.version_info >= (3, 11):
        import builtins

        group = builtins.ExceptionGroup("several", [ValueError("x: wrong")])
        assert line_of(group) == "x: wrong"


def test_nobody_reads_what_is_printed(tmp_path: Path) -> None:
    """courier-fast ... | head: a traceback, or "Broken pipe"."""
    script = (
        "import sys\nfrom courier_fast import cli\n"
        "sys.modules['courier_fast.fake'] = type('F', (), {'add_arguments': lambda p: None, "
        "'run': lambda a: [print('x' * 99) for _ in range(9999)] and 0})\n"
        "cli.COMMANDS['fake'] = ('courier_fast.fake', '')\nsys.exit(cli.main(['fake']))"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None and child.stderr is not None
    child.stdout.close()
    assert child.stderr.read() == b""
    child.stderr.close()
    assert child.wait() == 128 + signal.SIGPIPE


# ---- files that were cut off ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"", "got an empty file"),
        (b" \n", "got an empty file"),
        (b'{"format": 2, "sp', "was cut off or altered"),
        (b"PK\x03\x04\xff", "got other bytes"),
        (b"[1]", "expected a JSON object, got list"),
        (b"null", "expected a JSON object, got NoneType"),
        (b"{}{}", "was cut off or altered"),
    ],
)
def test_json_that_was_cut_off_names_its_file(data: bytes, text: str) -> None:
    with pytest.raises(ValueError, match=rf"^a/x\.json: .*{text}.*; do this$"):
        parse_json(data, "a/x.json", "do this")


@pytest.mark.parametrize("name", ["dataset.json", "manifest.json"])
@pytest.mark.parametrize("how", ["cut", "empty", "list", "folder", "gone"])
def test_a_dataset_whose_json_was_cut_off(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, how: str, made: Path
) -> None:
    subprocess.run(["cp", "-r", made, tmp_path / "ds"], check=True)
    path = tmp_path / "ds" / name
    text = path.read_text()
    path.unlink()
    if how == "folder":
        path.mkdir()
    elif how != "gone":
        path.write_text({"cut": text[:30], "empty": "", "list": "[]"}[how])
    assert cli.main(["verify", str(tmp_path / "ds")]) == 2
    said = capsys.readouterr().err
    assert name in said and len(said.splitlines()) == 1, said


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "ds"
    prepare(out, source=source_of(random_events(0)), options=PrepareOptions(min_history=1))
    return out


def test_what_else_was_cut_off(tmp_path: Path) -> None:
    from courier_fast.data.embedding_store import EmbeddingStore
    from courier_fast.index.index import Index
    from courier_fast.serve.contract import Contract
    from courier_fast.train.checkpoint import Checkpoints
    from courier_fast.train.encoder import load_encoder, read_tensors
    from courier_fast.train.journal import last_step

    for name, read in {
        "manifest.json": EmbeddingStore.open,
        "contract.json": Contract.read,
        "index.json": Index.open,
        "encoder.json": load_encoder,
        "state.json": Checkpoints(tmp_path).state,
        "encoder.safetensors": lambda folder: read_tensors(folder / "encoder.safetensors"),
    }.items():
        for data in (
            b"",
            b'{"format": 1, "schem',
            b"\xff\xfe",
            b"[]",
            b"{}",
            b'{"format": 1, "schema": 1}',
        ):
            (tmp_path / name).write_bytes(data)
            with pytest.raises((ValueError, OSError)) as found:
                read(tmp_path)
            assert name in str(found.value) and "\n" not in str(found.value), (name, data)
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        with pytest.raises((ValueError, OSError), match=f"{tmp_path}"):
            read(tmp_path)
        (tmp_path / name).rmdir()
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 3}\n[]\n\xff\n{"step": 4, "los')
    assert last_step(tmp_path / "metrics.jsonl") == 3


def test_a_stream_that_is_written_to() -> None:
    file = io.BytesIO()
    disk.write_rows(file, np.arange(6, dtype=np.int16).reshape(2, 3)[:, ::-1])
    disk.write_rows(file, np.zeros((0, 3)))
    assert np.frombuffer(file.getvalue(), np.int16).tolist() == [2, 1, 0, 5, 4, 3]
