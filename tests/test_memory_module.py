"""EmbeddingMemory: what it keeps, what it says of it, and that a saved one goes on."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from spawn import spawn
from torch import Tensor

import courier_fast as cf
from courier_fast import EmbeddingMemory


def batch(number: int, rows: int, dim: int = 3) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(number)
    return torch.randn(rows, dim, generator=g), torch.arange(rows) + 100 * number


class Kept:
    """The definition: a list of (row, id, log_q, push), the oldest first out."""

    def __init__(self, size: int) -> None:
        self.size, self.rows, self.pushes = size, [], 0

    def push(self, rows: Tensor, ids: Tensor, log_q: Tensor | None) -> None:
        self.pushes += 1
        q = [None] * len(ids) if log_q is None else log_q.tolist()
        more = [
            (row.tolist(), i, x, self.pushes)
            for row, i, x in zip(rows, ids.tolist(), q, strict=True)
        ]
        self.rows = [*self.rows, *more][-self.size :]


def as_list(memory: EmbeddingMemory) -> list[Any]:
    rows, ids, log_q = memory.read()
    q = [None] * len(ids) if log_q is None else log_q.tolist()
    pushed = memory.pushed_at[: len(memory)].tolist()
    return sorted(zip(rows.tolist(), ids.tolist(), q, pushed, strict=True))


@pytest.mark.parametrize("with_log_q", [False, True])
@pytest.mark.parametrize("size", [1, 4, 7])
def test_it_keeps_the_last_rows(size: int, with_log_q: bool) -> None:
    memory, kept = EmbeddingMemory(size, 3), Kept(size)
    assert memory.age() == 0
    for number, n in enumerate([2, 0, 3, 1, 4, 7, 9, 2, 15, 1, 6]):
        rows, ids = batch(number, n)
        log_q = -torch.rand(n) if with_log_q else None
        memory.push(rows, ids, log_q)
        kept.push(rows, ids, log_q)
        assert as_list(memory) == sorted(kept.rows)
        assert len(memory) == len(kept.rows)
        ages = [kept.pushes + 1 - at for *_, at in kept.rows]
        assert memory.age() == pytest.approx(sum(ages) / len(ages))
        assert (memory.read()[2] is not None) == with_log_q


def test_rows_have_no_gradient_and_the_memorys_type() -> None:
    memory = EmbeddingMemory(4, 3, torch.bfloat16)
    rows, ids = batch(0, 2)
    memory.push(rows.double().requires_grad_() * 2, ids.to(torch.int32))
    found, found_ids, log_q = memory.read()
    assert not found.requires_grad
    assert log_q is None
    assert found.dtype == torch.bfloat16
    assert found_ids.dtype == torch.int64
    assert torch.equal(found, (rows * 2).bfloat16())
    assert not list(memory.parameters())


@pytest.mark.parametrize("pushes", [0, 1, 4])
def test_a_saved_memory_goes_on(pushes: int, tmp_path: Path) -> None:
    memory = EmbeddingMemory(5, 3)
    for number in range(pushes):
        memory.push(*batch(number, 2), torch.zeros(2))
    torch.save(memory.state_dict(), tmp_path / "memory.pt")
    again = EmbeddingMemory(5, 3)
    again.push(*batch(99, 4))
    again.load_state_dict(torch.load(tmp_path / "memory.pt"))
    for number in range(pushes, pushes + 3):
        assert as_list(again) == as_list(memory)
        assert (len(again), again.age()) == (len(memory), memory.age())
        for m in (memory, again):
            m.push(*batch(number, 2), torch.ones(2))


def test_repr_says_how_full_it_is() -> None:
    memory = EmbeddingMemory(5, 3)
    memory.push(*batch(0, 2))
    assert repr(memory) == "EmbeddingMemory(size=5, dim=3, filled=2)"


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ((0, 3), ValueError, "size: expected at least 1, got 0"),
        ((4, -1), ValueError, "dim: expected at least 1, got -1"),
        ((4.0, 3), TypeError, "size: expected an int, got float"),
        ((True, 3), TypeError, "size: expected an int, got bool"),
    ],
)
def test_sizes_are_checked(arguments: Any, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        EmbeddingMemory(*arguments)


def wrong(name: str) -> tuple[Any, ...]:
    rows, ids = batch(0, 2)
    return {
        "width": (rows[:, :2], ids),
        "vector": (rows[0], ids),
        "integers": (rows.long(), ids),
        "ids": (rows, ids[:1]),
        "float ids": (rows, ids.float()),
        "bool ids": (rows, ids > 0),
        "log_q": (rows, ids, torch.zeros(3)),
        "log_q at once": (rows, ids, torch.zeros(2)),
    }[name]


WRONG = {
    "width": (ValueError, r"embeddings: expected \[n, 3\], got \[2, 2\]"),
    "vector": (ValueError, r"embeddings: expected \[n, 3\], got \[3\]"),
    "integers": (TypeError, "embeddings: expected a floating tensor, got torch.int64"),
    "ids": (ValueError, r"ids: expected \[2\], got \[1\]"),
    "float ids": (TypeError, "ids: expected integers, got torch.float32"),
    "bool ids": (TypeError, "ids: expected integers, got torch.bool"),
    "log_q": (ValueError, r"log_q: expected \[2\], got \[3\]"),
    "log_q at once": (ValueError, "log_q: expected as in the pushes before, which were without it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_push_is_checked_and_changes_nothing(name: str) -> None:
    memory = EmbeddingMemory(5, 3)
    memory.push(*batch(0, 2))
    before = as_list(memory)
    error, text = WRONG[name]
    with pytest.raises(error, match=text):
        memory.push(*wrong(name))
    assert as_list(memory) == before


def test_log_q_may_not_stop() -> None:
    memory = EmbeddingMemory(5, 3)
    memory.push(*batch(0, 2), torch.zeros(2))
    with pytest.raises(
        ValueError, match="log_q: expected as in the pushes before, which were with"
    ):
        memory.push(*batch(1, 2))


def test_its_counts_are_its_buffers() -> None:
    """They were numbers on the host, of which a copy of the buffers had not heard."""
    memory = EmbeddingMemory(8, 3)
    average = torch.optim.swa_utils.AveragedModel(memory)
    memory.push(*batch(1, 5))
    average.update_parameters(memory)
    assert as_list(average.module) == as_list(memory)
    other = EmbeddingMemory(8, 3)
    for mine, theirs in zip(other.buffers(), memory.buffers(), strict=True):
        mine.data.copy_(theirs)
    for same in (other, copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))):
        same.push(*batch(2, 1))
        assert len(same) == 6
    assert len(memory) == 5
    state = {k: x.clone() for k, x in EmbeddingMemory(8, 3).state_dict().items()}
    rows, ids = batch(3, 2)
    torch.func.functional_call(
        Pushing(memory), {f"memory.{k}": x for k, x in state.items()}, (rows, ids)
    )
    assert int(state["position"][1]) == 2
    assert len(memory) == 5
    with torch.inference_mode():
        memory.push(*batch(4, 1))
    assert len(memory) == 6


class Pushing(torch.nn.Module):
    def __init__(self, memory: EmbeddingMemory) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, rows: Tensor, ids: Tensor) -> None:
        self.memory.push(rows, ids)


def test_a_state_that_does_not_fit_changes_nothing() -> None:
    big, small = EmbeddingMemory(16, 3), EmbeddingMemory(8, 3)
    big.push(*batch(1, 14))
    position = {"position": big.state_dict()["position"]}  # what is left of it, by shape
    small.load_state_dict(position, strict=False)
    assert len(small) == 0
    with pytest.raises(RuntimeError, match="Missing key"):
        small.load_state_dict(position)
    with pytest.raises(RuntimeError, match=r"rows: expected shape \[8, 3\]"):
        small.load_state_dict(big.state_dict())
    broken = small.state_dict() | {"position": torch.tensor([3, 99, 1, 0])}
    with pytest.raises(RuntimeError, match="position: expected a place below 8"):
        small.load_state_dict(broken)
    small.push(*batch(2, 2))
    assert as_list(small)[0][3] == 1
    assert len(small) == 2


# ---- beside the loss -----------------------------------------------------------------------------


def loss(pv: Tensor, **memory: Any) -> Tensor:
    history = batch(7, 4)[0]
    clicked = torch.tensor([True, False, False, True])
    offsets = {"pv_offsets": torch.tensor([0, 2, 4]), "history_offsets": torch.tensor([0, 3, 4])}
    ids = torch.arange(4)
    return cf.reconstruction_loss(pv, history, clicked, item_ids=ids, **offsets, **memory)


def test_an_empty_memory_changes_nothing() -> None:
    pv = batch(1, 4)[0]
    rows, ids, log_q = EmbeddingMemory(5, 3).read()
    assert log_q is None
    assert torch.equal(loss(pv, memory=rows, memory_ids=ids), loss(pv))


def test_candidates_of_a_memory_make_the_loss_harder_but_not_the_items_own() -> None:
    pv = batch(1, 4)[0]
    memory = EmbeddingMemory(5, 3)
    memory.push(pv, torch.arange(4))
    rows, ids, _ = memory.read()
    own = loss(pv, memory=rows[[0, 3]], memory_ids=torch.tensor([0, 0]))
    assert loss(pv, memory=rows, memory_ids=ids + 100) > loss(pv, memory=rows, memory_ids=ids)
    assert own > loss(pv)  # anchor 3 meets its own row under another id
    first = rows[:0]
    assert torch.equal(loss(pv, memory=first, memory_ids=ids[:0]), loss(pv))


def test_a_push_between_forward_and_backward_changes_no_gradient() -> None:
    """As the example in the docstring has it: rows that were read are not copies."""
    gradients = []
    for pushes in (False, True):
        pv = batch(1, 4)[0].requires_grad_()
        memory = EmbeddingMemory(4, 3)
        memory.push(*batch(2, 4))
        rows, ids, _ = memory.read()
        found = loss(pv, memory=rows, memory_ids=ids)
        if pushes:
            memory.push(*batch(3, 4))
        found.backward()
        gradients.append(pv.grad)
    assert torch.equal(gradients[0], gradients[1])


@pytest.mark.parametrize("attention", ["anchor", "candidate"])
def test_second_derivatives_are_an_error(attention: str) -> None:
    """They were numbers, without what goes through the log-sum-exps."""
    pv = batch(1, 4)[0].requires_grad_()
    memory = {"memory": batch(2, 2)[0], "memory_ids": torch.arange(2), "attention": attention}
    (g,) = torch.autograd.grad(loss(pv, impl="reference", **memory), pv, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        g.square().sum().backward()


# ---- several processes ---------------------------------------------------------------------------

COUNTS = [[2, 0, 1], [0, 0, 0], [3, 1, 0], [1, 1, 1], [0, 5, 9], [2, 2, 2]]


def pushing() -> tuple[list[Any], list[str]]:
    group, rank = dist.group.WORLD, dist.get_rank()
    memory = EmbeddingMemory(7, 3)
    found = []
    for number, counts in enumerate(COUNTS):
        rows, ids = batch(10 * number + rank, counts[rank])
        memory.push(rows, ids, -rows[:, 0].exp(), group)
        found.append((as_list(memory), memory.age()))
    texts = []
    for name in (*WRONG, "right"):
        good = (*batch(0, 2), torch.zeros(2))
        given = wrong(name) if rank == 1 and name in WRONG and "once" not in name else good
        try:
            memory.push(*given, group=group)
        except (ValueError, TypeError) as error:
            texts.append(f"{type(error).__name__}: {error}")
    return found, texts


@pytest.mark.long("several processes")
def test_every_process_keeps_the_same_rows(tmp_path: Path) -> None:
    every = spawn(pushing, 3, tmp_path)
    kept = Kept(7)
    for number, counts in enumerate(COUNTS):
        parts = [batch(10 * number + rank, n) for rank, n in enumerate(counts)]
        rows, ids = (torch.cat(x) for x in zip(*parts, strict=True))
        kept.push(rows, ids, -rows[:, 0].exp())
        for found, _ in every:
            assert found[number][0] == sorted(kept.rows)
            assert found[number][1] == every[0][0][number][1]
    texts = every[0][1]
    for _, said in every:
        assert said == texts
    named = [f"{WRONG[n][0].__name__}: rank 1: {WRONG[n][1]}" for n in WRONG if "once" not in n]
    for text, expected in zip(texts, named, strict=True):
        assert re.search(expected, text)
