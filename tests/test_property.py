"""Any ragged batch: every implementation gives the reference's loss and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from factories import (
    DEVICES,
    LOSS_INPUTS,
    Budget,
    loss_yardstick,
    make,
    offsets_of,
    results,
    skip_unless_available,
    to_device,
    with_gradients,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from courier_fast.loss import operators
from courier_fast.loss.options import CHOICES

PAGES = st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=0, max_size=8)


@pytest.mark.long("kernels case by case", short=("triton",))
@pytest.mark.parametrize(("impl", "examples"), [("cpu", 60), ("triton", 15)])
def test_ragged_batches(impl: str, examples: int) -> None:
    skip_unless_available(impl, make(0, impl=impl))

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],  # a failing case is small already; shrinking it takes minutes
        suppress_health_check=list(HealthCheck),
    )
    @given(
        pages=PAGES,
        dim=st.integers(1, 40),
        negatives=st.sampled_from(CHOICES["negatives"]),
        direction=st.sampled_from(CHOICES["direction"]),
        tau=st.sampled_from([0.01, 0.1, 1.0]),
        reduction=st.sampled_from(CHOICES["reduction"]),
        ids=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def check(
        pages: list[tuple[int, int]],
        dim: int,
        negatives: str,
        direction: str,
        tau: float,
        reduction: str,
        ids: bool,
        seed: int,
    ) -> None:
        counts = torch.tensor(pages, dtype=torch.int64).reshape(-1, 2)
        budget = Budget(torch.float32)
        for draw in range(3):
            g = torch.Generator().manual_seed(seed + draw)
            rows, history_rows = int(counts[:, 0].sum()), int(counts[:, 1].sum())
            p = replace(
                make(0),
                pv=torch.randn(rows, dim, generator=g),
                history=torch.randn(history_rows, dim, generator=g),
                pv_offsets=offsets_of(counts[:, 0]),
                history_offsets=offsets_of(counts[:, 1]),
                clicked=torch.rand(rows, generator=g) < 0.5,
                item_ids=torch.randint(0, 6, (rows,), generator=g) if ids else None,
                attention_scale=dim**-0.5,
                negatives=negatives,
                direction=direction,
                reduction=reduction,
                tau=tau,
            )
            p = with_gradients(to_device(p, DEVICES[impl]), LOSS_INPUTS)
            found = results(lambda q: operators.loss(q, impl, False)[0], p, LOSS_INPUTS)
            bad = [name for name, x in found.items() if not x.isfinite().all()]
            assert not bad, bad
            budget.add(loss_yardstick(p, draw), found)
        budget.check()

    check()
