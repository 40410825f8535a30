"""What users copy runs: the scripts in examples/. Code in the documentation: test_docs.py."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EVERY = sorted((ROOT / "examples").glob("*.py"))
TOGETHER = [path for path in EVERY if "torchrun" in path.read_text()]
EXAMPLES = [path for path in EVERY if path not in TOGETHER]


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(script), run_name="__main__")
    assert "nan" not in capsys.readouterr().out


# Runs a script up to where it ends its process group: PyTorch's threads of gloo, on a busy machine,
# may abort a process after that ("terminate called without an active exception"), also where the
# script computes nothing but DDP.
UNTIL_THE_GROUP_ENDS = """
import os, runpy, sys
import torch.distributed as dist
def end():
    sys.stdout.flush()
    os._exit(0)
dist.destroy_process_group = end
runpy.run_path(sys.argv[1], run_name="__main__")
sys.exit("the script did not end its process group")
"""


@pytest.mark.long("several processes")
@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("script", TOGETHER, ids=lambda path: path.stem)
def test_example_of_several_processes_runs(script: Path, size: int, tmp_path: Path) -> None:
    main = tmp_path / "main.py"
    main.write_text(UNTIL_THE_GROUP_ENDS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(size), str(main), str(script)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]
    losses = [float(x) for x in re.findall(r"loss (\S+)", done.stdout)]
    assert len(losses) == 10
    assert losses[-1] < losses[0] / 3
