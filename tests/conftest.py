"""Which implementations the tests run on, and memory that shows when it is read before it is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Before anything imports Triton: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

from factories import DEVICES, poison


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """torch.empty gives NaN and huge integers: nothing may depend on what was there before."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)

        def poisoned(*args: Any, _original: Any = original, **kwargs: Any) -> torch.Tensor:
            return poison(_original(*args, **kwargs))

        monkeypatch.setattr(owner, name, poisoned)
    return


def pytest_report_header() -> list[str]:
    return [f"courier_fast: torch {torch.__version__}, implementations on {DEVICES}"]
