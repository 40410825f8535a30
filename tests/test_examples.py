"""What users copy runs: the scripts in examples/, and the first example of the README."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(script), run_name="__main__")
    assert "nan" not in capsys.readouterr().out


def test_first_example_of_the_readme() -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    images = {
        "pv_images": torch.randn(4, 5, 3, requires_grad=True),
        "history_images": torch.randn(4, 6, 3),
        "clicked": torch.tensor([[True, False, False, True, False]] * 4),
        "pv_mask": torch.ones(4, 5, dtype=torch.bool),
        "history_mask": torch.ones(4, 6, dtype=torch.bool),
    }
    encoder = torch.nn.Linear(3, 16)
    names: dict[str, Any] = {"encoder": encoder, **images}
    exec(compile(code[1], "README.md", "exec"), names)
    assert names["loss"] > 0
    assert encoder.weight.grad is not None
    assert encoder.weight.grad.any()
