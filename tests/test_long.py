"""Which tests `pytest` leaves out (conftest.py), and what its last lines say of them."""

from __future__ import annotations

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


@pytest.mark.parametrize(
    ("arguments", "ran", "says"),
    [
        ("-n 2", SHORT, True),
        ("--long", LONG, False),
        ("-m long", LONG, False),
        ("test_made.py", SHORT | LONG, False),
        ("test_made.py::test_storm", {"test_storm"}, False),
        (". -k storm", set(), True),
    ],
)
@pytest.mark.long("whole commands", short=("-n 2",))
def test_what_is_left_out(tmp_path: Path, arguments: str, ran: set[str], says: bool) -> None:
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "test_made.py").write_text(MADE)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    long\n    numpy_products\n")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments.split()],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == (0 if ran else 5), run.stdout + run.stderr
    assert set(re.findall(r"test_made\.py::(\S+)", run.stdout)) == ran
    assert (SAYS in run.stdout) == says


def test_a_short_case_that_is_none(tmp_path: Path) -> None:
    shutil.copy(HERE / "conftest.py", tmp_path)
    (tmp_path / "test_made.py").write_text(MADE.replace('short=("small",)', 'short=("tiny",)'))
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(HERE)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 4
    assert "test_size: short: expected values of its parameters, got 'tiny'" in run.stderr
