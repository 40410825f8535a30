"""The cases of `python -m bench` under pytest-benchmark: `pytest bench --benchmark-only`.

Results are checked before they are timed. COURIER_FAST_BENCH=full takes every case, not only the
quick ones.
"""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import pytest
import torch

from bench import measure
from bench.candidates import NAMES, Candidate, make
from bench.cases import cases
from bench.errors import errors, loss_and_gradients, yardstick
from bench.loss import DTYPES, Case
from courier_fast.testing.batches import Batch, make_batch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = cases(DEVICE, quick=os.environ.get("COURIER_FAST_BENCH") != "full")


def _prepared(case: Case, name: str) -> tuple[Candidate, Batch]:
    """The candidate, right on this batch or on fewer pages of it; skips what cannot run."""
    device, dtype = torch.device(DEVICE), DTYPES[case.dtype]
    batch = make_batch(case.shape, case.options, dtype, device)
    candidate = make(name, batch)
    if isinstance(candidate, str):
        pytest.skip(candidate)
    need, free = (
        measure.logits_bytes(case.shape, case.options, candidate.full),
        measure.free_memory(device),
    )
    if candidate.stored and not candidate.ours and need > 0.8 * free:
        pytest.skip(f"its logits take about {need / 2**30:.0f} GiB")
    small = measure.shape_that_fits(case.shape, case.options, device)
    judged = batch if small == case.shape else make_batch(small, case.options, dtype, device)
    try:
        candidate.loss(judged)
    except RuntimeError as error:
        if "cannot run this problem here" not in str(error):
            raise
        pytest.skip(str(error))
    if not candidate.another:
        found = loss_and_gradients(candidate.loss, judged)
        over = [e for e in errors(found, yardstick(judged), dtype) if not e.passes]
        if over and not candidate.ours:
            pytest.skip(f"over the error budget: {over[0]}")
        assert not over
    return candidate, batch


@pytest.mark.parametrize(
    ("case", "name"),
    [(c, n) for c in CASES for n in (c.names or NAMES)],
    ids=lambda x: getattr(x, "name", x),
)
def test_loss(benchmark: Any, case: Case, name: str) -> None:
    benchmark.group = f"{case.name} {case.dtype}"
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if case.tf32 else "highest")
    try:
        candidate, batch = _prepared(case, name)
        run = partial(loss_and_gradients, candidate.loss, batch)

        def step() -> None:
            if case.forward:
                with torch.no_grad():
                    candidate.loss(batch)
            else:
                run()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(step, rounds=20 if DEVICE == "cuda" else 3, warmup_rounds=1)
    finally:
        torch.set_float32_matmul_precision(before)
