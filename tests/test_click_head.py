"""The click head: slices of rows are the whole, and the hidden layer is not kept."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from courier_factory import (
    HIDDEN,
    assert_close,
    head_results,
    head_rows,
    make_loss,
)
from factories import Budget
from torch import Tensor

from courier_fast.loss import click_head
from courier_fast.testing.budget import Yardstick


@pytest.mark.parametrize("live", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("n", [37, 3, 1, 0])
def test_slices_of_rows_are_the_definition(
    n: int, training: bool, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where batch norm sees one row, or none."""
    monkeypatch.setitem(click_head._SLICE, "cpu", 8 * HIDDEN)
    monkeypatch.setattr(click_head, "_KEPT", 17 * HIDDEN)  # two slices of five
    head = make_loss().click_head.train(training)
    with torch.no_grad():
        head[2].running_mean.normal_()
        head[2].running_var.uniform_(0.5, 2)
        # Far from 0: a variance from the sums of h and h^2 would cancel.
        head[0].bias += 1000
    rows = head_rows(n, live)
    truth = head_results(head, rows, exact=True)
    found = head_results(head, rows, exact=False)
    assert all(torch.isfinite(x).all() for x in truth.values())
    assert_close(found, truth)
    counted = n if rows.live is None else int(rows.live.sum())
    assert int(found["2.num_batches_tracked"]) == int(training and counted > 1)
    if training and not live and n > 1:
        own = copy.deepcopy(head)
        z = own(torch.cat([rows.r, rows.e], 1))[:, 0]
        assert (z - found["logits"]).abs().max() < 1e-8  # cancels by 1000
        assert_close({n: found[n] for n, _ in own.named_buffers()}, dict(own.named_buffers()))


def test_sums_over_many_rows_keep_their_digits() -> None:
    """With a mean whose rows are added up one after the other in float32, gamma's gradient, where
    nearly all cancels, is at 54 times its budget."""
    head, rows = make_loss(torch.float32).click_head, head_rows(5000, True)
    short = replace(rows, r=rows.r.float(), e=rows.e.float())
    truth = head_results(copy.deepcopy(head).double(), rows, exact=True)
    eager, found = (head_results(head, short, exact) for exact in (True, False))
    budget = Budget(torch.float32)
    budget.add(Yardstick(truth, eager, []), found)
    budget.check()


def test_the_hidden_layer_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what a small batch has."""
    n, some = 400, 50
    monkeypatch.setitem(click_head._SLICE, "cpu", 10 * HIDDEN)
    monkeypatch.setattr(click_head, "_KEPT", some * HIDDEN)
    kept: list[Tensor] = []
    head = make_loss(torch.float32).click_head
    rows = head_rows(n, False)
    rows = replace(rows, r=rows.r.float(), e=rows.e.float())
    for exact in (True, False):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            head.loss(rows, exact)
        of_hidden = [len(x) for x in kept if x.dim() == 2 and x.shape == (len(x), HIDDEN)]
        rows_kept = sum(x for x in of_hidden if x != HIDDEN)  # less the weights
        assert rows_kept >= 2 * n if exact else rows_kept == some
