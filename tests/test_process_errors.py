"""A mistake on one process is an error on every process, at once; a process that is lost is one
soon."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawn import GROUP_TIMEOUT, spawn
from torch import Tensor

import courier_fast as cf
from courier_fast.loss.union import losses

Given = dict[str, Any]
SECONDS = 5.0


def rows(items: int, dim: int = 8) -> Tensor:
    return torch.randn(items, dim, generator=torch.Generator().manual_seed(items))


def good() -> Given:
    return {
        "pv": rows(4).requires_grad_(),
        "history": rows(3),
        "clicked": torch.tensor([True, False, True, False]),
        "pv_offsets": torch.tensor([0, 2, 4]),
        "history_offsets": torch.tensor([0, 2, 3]),
        "group": dist.group.WORLD,
    }


def table(given: Given) -> None:
    index = {"pv": torch.tensor([0, 1, 2, 0]), "history": torch.tensor([1, 2, 2])}
    given.update(index, embeddings=rows(3).requires_grad_(), table_ids=torch.tensor([5, 6, 7]))


def changed(**arguments: Callable[[], Any]) -> Callable[[Given], None]:
    return lambda given: given.update({name: make() for name, make in arguments.items()})


def both(*changes: Callable[[Given], None]) -> Callable[[Given], None]:
    return lambda given: [change(given) for change in changes] and None


def wide(given: Given) -> None:
    given.update(pv=rows(4, 9).requires_grad_(), history=rows(3, 9))


def double(given: Given) -> None:
    given.update(pv=rows(4).double().requires_grad_(), history=rows(3).double())


def memory(**more: Callable[[], Any]) -> Callable[[Given], None]:
    return changed(memory=lambda: rows(2), **more)


def nothing(given: Given) -> None:
    pass


ids = partial(torch.tensor, [1, 2, 3, 4])
# What is changed on every process, what on process 1 alone, and the error on all.
Mistake = tuple[Callable[[Given], None], Callable[[Given], None], type[Exception], str]
MISTAKES: dict[str, Mistake] = {
    # Each for itself would be right.
    "dimension": (nothing, wide, ValueError, "embedding dimension: .* 8 on rank 0 and 9 on rank 1"),
    "dtype": (nothing, double, ValueError, "dtype: .*'torch.float32' on rank 0"),
    "negatives": (nothing, changed(negatives=lambda: "other_pages"), ValueError, "negatives: "),
    "page": (nothing, changed(negatives=lambda: "page"), ValueError, "negatives: "),
    "direction": (
        changed(attention=lambda: "anchor"),
        changed(direction=lambda: "both"),
        ValueError,
        "direction: expected the same",
    ),
    "attention": (nothing, changed(attention=lambda: "anchor"), ValueError, "attention: "),
    "heads": (nothing, changed(num_heads=lambda: 2), ValueError, "num_heads: "),
    "reduction": (nothing, changed(reduction=lambda: "sum"), ValueError, "reduction: "),
    "exchange": (nothing, changed(exchange=lambda: "ring"), ValueError, "exchange: "),
    "workspace": (nothing, changed(workspace=lambda: 1000), ValueError, "workspace: "),
    "impl": (changed(impl=lambda: "reference"), changed(impl=lambda: "auto"), ValueError, "impl: "),
    "stats": (nothing, changed(return_stats=lambda: True), ValueError, "return_stats: "),
    "temperature": (
        nothing,
        changed(temperature=lambda: 0.2),
        ValueError,
        "temperature: .*0.1 on rank 0 and 0.2 on rank 1",
    ),
    "temperature tensor": (
        changed(temperature=lambda: torch.tensor(0.5)),
        changed(temperature=lambda: torch.tensor(0.25)),
        ValueError,
        "temperature: .*0.5 on rank 0 and 0.25 on rank 1",
    ),
    "ids on one": (nothing, changed(item_ids=ids), ValueError, "item_ids given: "),
    "log_q on one": (nothing, changed(log_q=lambda: torch.zeros(4)), ValueError, "log_q given: "),
    "frozen on one": (
        nothing,
        lambda g: g["pv"].requires_grad_(False),
        ValueError,
        "gradients wanted",
    ),
    "memory on one": (nothing, memory(), ValueError, "memory rows: .* 0 on rank 0 and 2 on rank 1"),
    "another loss": (
        nothing,
        lambda g: [g.pop(n) for n in ("pv", "clicked", "pv_offsets")] and None,
        ValueError,
        "^loss: expected the same on every process, "
        "got 'reconstruction' on rank 0 and 'click sequence'",
    ),
    # Wrong on process 1.
    "weights": (
        nothing,
        changed(weights=lambda: -torch.ones(4)),
        ValueError,
        "^rank 1: weights: expected finite values of at least 0",
    ),
    "clicked": (nothing, changed(clicked=lambda: torch.rand(4)), TypeError, "^rank 1: clicked: "),
    "offsets": (
        nothing,
        changed(pv_offsets=lambda: torch.tensor([0, 3, 9])),
        ValueError,
        "^rank 1: pv_offsets: ",
    ),
    "choice": (nothing, changed(negatives=lambda: "all"), ValueError, "^rank 1: negatives: "),
    "tau": (nothing, changed(temperature=lambda: -1.0), ValueError, "^rank 1: temperature: "),
    "unavailable": (
        nothing,
        both(double, changed(impl=lambda: "cpu")),
        RuntimeError,
        "^rank 1: impl='cpu' cannot run",
    ),
    "table_ids of one": (
        table,
        changed(table_ids=lambda: torch.tensor([1])),
        ValueError,
        r"^rank 1: table_ids: expected \[3\]",
    ),
    "table_ids as floats": (
        table,
        changed(table_ids=lambda: torch.ones(3)),
        TypeError,
        "^rank 1: table_ids: ",
    ),
    "table_ids and item_ids": (
        table,
        changed(item_ids=ids),
        ValueError,
        "^rank 1: table_ids and item_ids: expected at most one",
    ),
    "no table_ids on one": (
        table,
        changed(table_ids=lambda: None),
        ValueError,
        "^rank 1: table_ids: expected the ids",
    ),
    "memory with gradient": (
        memory(),
        changed(memory=lambda: rows(2).requires_grad_()),
        ValueError,
        "^rank 1: memory: expected rows without a gradient",
    ),
    "memory of another width": (
        memory(),
        changed(memory=lambda: rows(2, 5)),
        ValueError,
        r"^rank 1: memory: expected floating \[Q, 8\]",
    ),
    # Wrong on every process: the first is named.
    "no table_ids": (
        both(table, changed(table_ids=lambda: None)),
        nothing,
        ValueError,
        "^rank 0: table_ids: expected the ids",
    ),
    "table_ids for rows": (
        changed(table_ids=ids),
        nothing,
        ValueError,
        "^rank 0: table_ids: expected None without embeddings",
    ),
    "memory and identify": (
        memory(attention=lambda: "anchor", direction=lambda: "identify"),
        nothing,
        ValueError,
        '^rank 0: memory: expected direction "reconstruct"',
    ),
    "memory and page": (
        memory(negatives=lambda: "page"),
        nothing,
        ValueError,
        "^rank 0: memory: expected direction",
    ),
    "no memory_ids": (
        memory(item_ids=ids),
        nothing,
        ValueError,
        "^rank 0: memory_ids: expected the ids of its rows",
    ),
    "memory_ids alone": (
        changed(memory_ids=ids),
        nothing,
        ValueError,
        "^rank 0: memory_ids: expected None without memory",
    ),
    "memory_ids without ids": (
        memory(memory_ids=ids),
        nothing,
        ValueError,
        "^rank 0: memory_ids: expected None",
    ),
    "no memory_log_q": (
        memory(log_q=lambda: torch.zeros(4)),
        nothing,
        ValueError,
        "^rank 0: memory_log_q: expected .Q.",
    ),
    "memory and query": (
        memory(query=lambda: rows(4)),
        nothing,
        ValueError,
        "^rank 0: memory: expected no query",
    ),
}


def call(given: Given) -> Any:
    """The loss and its gradient."""
    given = dict(given)
    if "pv" not in given:
        return cf.click_sequence_loss(given.pop("history"), **given)
    args = [given.pop(n) for n in ("pv", "history", "clicked")]
    loss = cf.reconstruction_loss(*args, **given)
    loss.backward()
    return loss.detach()


def caught(work: Callable[[], Any]) -> tuple[str, str, float]:
    """Name of the error, its text, and after how many seconds it came."""
    start = time.monotonic()
    try:
        work()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - start
    return "", "", time.monotonic() - start


def mistakes() -> dict[str, tuple[str, str, float]]:
    found = {}
    expected = call(good())
    for name, (everywhere, on_one, _, _) in MISTAKES.items():
        given = good()
        everywhere(given)
        if dist.get_rank() == 1:
            on_one(given)
        found[name] = caught(partial(call, given))
        assert torch.equal(call(good()), expected), f"the group is out of step after {name}"
    return found


@pytest.mark.long("several processes", short=(2,))
@pytest.mark.parametrize("size", [2, 4])
def test_every_process_has_the_same_error(size: int, tmp_path: Path) -> None:
    every = spawn(mistakes, size, tmp_path)
    for name, (_, _, kind, text) in MISTAKES.items():
        for found, said, seconds in (mine[name] for mine in every):
            assert found == kind.__name__, (name, found, said)
            assert re.search(text, said), (name, said)
            assert said == every[0][name][1], name
            assert seconds < SECONDS, name


# ---- what is not an argument ---------------------------------------------------------------------


def others() -> dict[str, tuple[str, str, float]]:
    group, rank = dist.group.WORLD, dist.get_rank()
    found = {}
    some = dist.new_group([0])
    if rank == 0:
        call(good() | {"group": some})
    else:
        found["another group"] = caught(partial(call, good() | {"group": some}))
    found["no group"] = caught(partial(call, good() | {"group": "gloo"}))
    found["cuda_graph"] = caught(
        lambda: cf.ReconstructionLoss(attention="anchor", group=group, cuda_graph=True)
    )
    given = good()
    pv, history, clicked = (given.pop(n).detach() for n in ("pv", "history", "clicked"))

    def loss(x: Tensor) -> Tensor:
        return cf.reconstruction_loss(x, history, clicked, **given)

    found["torch.func"] = caught(lambda: torch.func.grad(loss)(pv))
    found["torch.compile"] = caught(
        lambda: torch.compile(loss, fullgraph=True, backend="eager")(pv)
    )
    if rank == 1:

        def fails(*args: Any) -> Any:
            raise RuntimeError("no memory left")

        losses._listed, listed = fails, losses._listed
        found["inside"] = caught(partial(call, good()))
        losses._listed = listed
    else:
        found["inside"] = caught(partial(call, good()))
    call(good())
    return found


@pytest.mark.long("several processes")
def test_what_does_not_go_together(tmp_path: Path) -> None:
    every = spawn(others, 2, tmp_path)
    expected = {
        "another group": ("TypeError", "group: expected a torch.distributed ProcessGroup this"),
        "no group": ("TypeError", "group: expected a torch.distributed ProcessGroup .* got str"),
        "cuda_graph": ("ValueError", "cuda_graph: expected False with group"),
        "torch.func": ("RuntimeError", "^group and memory: expected a call outside of torch.comp"),
        "torch.compile": (r"\w+", ""),  # Dynamo's own
        "inside": ("RuntimeError", "^rank 1: no memory left"),
    }
    for mine in every:
        for name, (kind, text, _) in mine.items():
            assert re.fullmatch(expected[name][0], kind), (name, kind, text)
            assert re.search(expected[name][1], text), (name, text)


# ---- a process that is gone ----------------------------------------------------------------------


def losing(how: str) -> tuple[str, str, float]:
    """Process 1 goes after a first step: what the others meet then."""
    call(good())
    if dist.get_rank() != 1:
        return caught(lambda: [call(good()) for _ in range(3)])
    if how == "raises":
        raise KeyError("outside of the loss")
    if how == "backward":
        given = good()
        args = [given.pop(n) for n in ("pv", "history", "clicked")]
        cf.reconstruction_loss(*args, **given)
    if how == "exits":
        os._exit(3)
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.mark.parametrize("how", ["raises", "exits", "killed", "backward"])
def test_a_lost_process_is_an_error_of_the_others(how: str, tmp_path: Path) -> None:
    found = spawn(losing, 3, tmp_path, how, lost=[1])
    assert found[1] is None
    for kind, text, seconds in (found[0], found[2]):
        assert kind.endswith("Error"), (kind, text)
        assert seconds < GROUP_TIMEOUT / 6
