"""`CourierLoss` over several processes: uneven shards are one batch."""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from courier_factory import (
    BUFFERS,
    DIM,
    HEADS,
    HIDDEN,
    INPUTS,
    PARAMETERS,
    RAGGED,
    TAU,
    Pages,
    as_table,
    assert_close,
    given,
    head_results,
    head_rows,
    make_loss,
    of_table,
    pages,
    results_of,
    step_of,
    weighted,
)
from factories import Budget, yardstick_of
from spawn import spawn
from torch import Tensor

import courier_fast as cf
from courier_fast.loss.click_head import ClickRows

SHARDS = (RAGGED, ((), ()), ((2, 1, 3), (3, 1, 0)))


def joined(shards: list[Pages]) -> Pages:
    """Their union."""
    values = {f.name: [getattr(s, f.name) for s in shards] for f in fields(Pages)}
    whole = Pages(**{n: torch.cat([x.detach() for x in xs]) for n, xs in values.items()})
    return replace(whole, **{n: x.requires_grad_() for n, x in whole.leaves.items()})


def shards_of(dtype: torch.dtype) -> list[Pages]:
    return [pages(x, seed=i, dtype=dtype) for i, x in enumerate(SHARDS)]


def on_each(impl: str, dtype: torch.dtype, exchange: str) -> dict[str, Tensor]:
    p = shards_of(dtype)[dist.get_rank()]
    kind = torch.float32 if impl == "cpu" else dtype
    loss = make_loss(kind, impl=impl, group="world", exchange=exchange)
    return step_of(loss, p)


def in_one(every: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """As DistributedDataParallel takes the mean of gradients."""
    whole = {}
    for name in every[0]:
        parts = [x[name] for x in every]
        if name in ("pv", "history"):
            whole[name] = torch.cat(parts) / len(parts)
        elif name == "logits":
            whole[name] = torch.cat(parts)
        elif "running" in name or "num_batches" in name:
            assert all(torch.equal(x, parts[0]) for x in parts), name
            whole[name] = parts[0]
        else:
            whole[name] = torch.stack(parts).mean(0)
    return whole


def on_processes(exchange: str) -> list[Any]:
    """Everything that processes are needed for, in one start of them."""
    exact = on_each("reference", torch.float64, exchange)
    fused = on_each("cpu", torch.float32, exchange)
    rank = dist.get_rank()
    head = make_loss().click_head
    # The slices in float64, as the fused losses take float32 alone.
    rows = replace(head_rows((11, 0, 5)[rank], False, rank), processes=_participants())
    return [exact, fused, head_results(head, rows, False), errors(), with_table()]


def with_table() -> dict[str, Tensor]:
    """The loss and the gradient of this process's table."""
    rows, table = as_table(shards_of(torch.float64)[dist.get_rank()])
    about = {"embeddings": table, "table_ids": torch.arange(10), "group": "world"}
    found = make_loss(impl="reference")(**given(rows, ids=False), **about)
    return {"output": found.detach(), "table": torch.autograd.grad(found, table)[0]}


def _participants() -> Any:
    return cf.loss.union.exchange.Participants(dist.group.WORLD)


def errors() -> list[str]:
    """Of mistakes of process 1."""
    found = []
    first = dist.get_rank() == 1
    p = pages(seed=dist.get_rank())
    good = given(p)
    mistakes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"clicked": p.clicked[1:]}),
        ({}, {"history_ids": p.history_ids.float()}),
        ({"weights": (1, 2, 1)}, {}),
        ({"weights": (0, 1, 0)}, {}),
        ({"hidden": 8}, {}),
        ({"sequence_temperature": 0.4}, {}),
        ({}, {"item_ids": None}),
    ]
    for options, arguments in mistakes:
        options = {"temperature": TAU, "hidden": HIDDEN} | (options if first else {})
        loss = cf.CourierLoss(DIM, HEADS, group="world", **options).double()
        try:
            loss(**(good | (arguments if first else {})))
            found.append("no error")
        except (ValueError, TypeError) as error:
            found.append(str(error))
    return found


EXPECTED_ERRORS = (
    "rank 1: clicked: expected shape",
    "rank 1: history_ids: expected an integer tensor",
    "weights: expected the same on every process",
    "weights: expected the same on every process",
    "hidden: expected the same on every process",
    "temperature: expected the same on every process",
    "item_ids given: expected the same on every process",
)


@pytest.mark.long("several processes", short=("gather",))
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_uneven_shards_are_one_batch(exchange: str, tmp_path: Path) -> None:
    """One of three processes has no page."""
    every = spawn(on_processes, 3, tmp_path, exchange)
    truth = step_of(make_loss(impl="reference"), joined(shards_of(torch.float64)))
    assert_close(in_one([x[0] for x in every]), truth)
    # The items of a table: its gradient is that of its rows.
    shards = shards_of(torch.float64)
    split = {n: truth[n].split([len(getattr(s, n)) for s in shards]) for n in ("pv", "history")}
    for rank, shard in enumerate(shards):
        mine = of_table(shard, {n: x[rank] for n, x in split.items()})
        assert_close({"table": every[rank][4]["table"] / 3}, {"table": mine})
    output = torch.stack([x[4]["output"] for x in every]).mean()
    assert_close({"output": output}, {"output": truth["output"]})
    # Batch norm of the union is no sum of products in another order alone: float32 by its budget.
    whole = joined(shards_of(torch.float32))
    loss = make_loss(torch.float32)
    rename = dict(zip(PARAMETERS, INPUTS[2:], strict=True))
    rename |= {f"click_head.2.{x}": x for x in BUFFERS}
    fused = {rename.get(n, n): x for n, x in in_one([x[1] for x in every]).items()}
    run = partial(results_of, "reference", whole, {})
    budget = Budget(torch.float32)
    yardstick = yardstick_of(run, weighted(whole, loss), INPUTS)
    budget.add(yardstick, fused)
    budget.check()
    # The click head's slices.
    rows = [head_rows(n, False, rank) for rank, n in enumerate((11, 0, 5))]
    leaves = [
        torch.cat([x.detach() for x in xs]).requires_grad_()
        for xs in ([x.r for x in rows], [x.e for x in rows])
    ]
    clicked = torch.cat([x.clicked for x in rows])
    one = head_results(make_loss().click_head, ClickRows(*leaves, clicked, None), True)
    found = [x[2] for x in every]
    three = {
        n: torch.stack([x[n] for x in found]).mean(0)
        for n in one
        if n not in ("r", "e") and n != "logits" and "num" not in n
    }
    three |= {n: torch.cat([x[n] for x in found]) / 3 for n in ("r", "e")}
    assert_close(three, {n: one[n] for n in three})
    for rank, messages in enumerate(x[3] for x in every):
        for message, expected in zip(messages, EXPECTED_ERRORS, strict=True):
            assert message.startswith(expected), (rank, message)


def test_a_group_of_one_has_the_bits_of_none(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    try:
        for impl, kind in (("reference", torch.float64), ("cpu", torch.float32)):
            loss, p = make_loss(kind, impl=impl), pages(dtype=kind)
            alone = step_of(copy.deepcopy(loss), p)
            grouped = step_of(loss, p, group=dist.group.WORLD)
            assert all(torch.equal(x, alone[n]) for n, x in grouped.items())
    finally:
        dist.destroy_process_group()
