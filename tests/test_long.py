"""Which tests `pytest` leaves out (conftest.py), and what its last lines say of them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MADE = """
import pytest

@pytest.mark.parametrize("size", ["small", "large", "huge"])
@pytest.mark.long("sizes", short=("small",))
def test_size(size):
    pass

@pytest.mark.long("weather")
def test_storm():
    pass

def test_calm():
    pass
"""
SAYS = "3 long tests were left out: sizes (2), weather (1). `pytest --long` runs them"
SHORT = {"test_size[small]", "test_calm"}
LONG = {"test_size[large]", "test_size[huge]", "test_storm"}


# Several commands in one process: most of the time of each goes into its imports.
RUN = """
import contextlib, io, json, sys, pytest
found = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(out):
        code = pytest.main(["-v", "-p", "no:cacheprovider", *arguments.split()])
    found.append((code, out.getvalue()))
print(json.dumps(found))
"""


def pytest_in(folder: Path, made: str, *commands: str) -> list[tuple[int, str]]:
    """Exit code and output of pytest with each of these arguments, beside our conftest.py and the
    tests `made`."""
    shutil.copy(HERE / "conftest.py", folder)
    (folder / "test_made.py").write_text(made)
    (folder / "pytest.ini").write_text("[pytest]\nmarkers =\n    long\n    numpy_products\n")
    run = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout)


def check(result: tuple[int, str], ran: set[str], says: bool) -> None:
    code, out = result
    assert code == (0 if ran else 5), out
    assert set(re.findall(r"test_made\.py::(\S+)", out)) == ran
    assert (SAYS in out) == says


def test_workers_leave_long_tests_out(tmp_path: Path) -> None:
    check(*pytest_in(tmp_path, MADE, "-n 2"), SHORT, True)


@pytest.mark.long("whole commands")
def test_what_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "test_other.py").write_text("raise ValueError('imported without a long test')")
    expected = {
        "--long": (LONG, False),
        "-m long --ignore=test_other.py": (LONG, False),
        "test_made.py": (SHORT | LONG, False),
        "test_made.py::test_storm": ({"test_storm"}, False),
        ". -k storm --ignore=test_other.py": (set(), True),
    }
    for result, (ran, says) in zip(
        pytest_in(tmp_path, MADE, *expected), expected.values(), strict=True
    ):
        check(result, ran, says)


@pytest.mark.long("whole commands")
def test_a_short_case_that_is_none(tmp_path: Path) -> None:
    made = MADE.replace('short=("small",)', 'short=("tiny",)')
    ((code, out),) = pytest_in(tmp_path, made, "")
    assert code == 4
    assert "test_size: short: expected values of its parameters, got 'tiny'" in out
