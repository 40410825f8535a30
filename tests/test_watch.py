"""Kernels read and write inside of what they are given, what somebody has written, and nothing that
another program of their launch does; so programs give the same bits in every order."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from factories import (
    DEVICES,
    LOSS_INPUTS,
    SEQUENCE_INPUTS,
    make,
    make_sequence,
    results,
    skip_unless_available,
)
from test_kernel_arguments import all_kernels
from torch import Tensor
from watch import ORDERS, watched

import courier_fast as cf
from courier_fast.loss import operators

triton = pytest.importorskip("triton")
tl = triton.language

pytestmark = pytest.mark.skipif(DEVICES["triton"] != "cpu", reason="for the interpreter")

# Options of `make`.
LOSSES: dict[str, dict[str, Any]] = {
    "plain": {},
    "both": {"direction": "both", "mask": True, "ids": True, "weights": True},
    "identify": {"direction": "identify", "reduction": "none"},
    "page": {"negatives": "page", "ids": True, "reduction": "none"},
    "items": {"table": True, "direction": "both", "tensor_tau": True},
    "log-q": {"direction": "both", "log_q": True, "dtype": torch.float16},
    "heads": {"negatives": "other_pages", "projected": True, "num_heads": 2},
    "given": {"given": True, "mask": True},
    "given-items": {"given": True, "table": True},
    "chunks": {"dim": 300, "mask": True},
    "chunks-both": {"dim": 300, "table": True, "direction": "both", "log_q": True},
    "candidate": {"attention": "candidate", "mask": True, "log_q": True, "tensor_tau": True},
    "candidate-cosine": {"attention": "candidate", "cosine": True, "table": True},
    "candidate-ids": {"attention": "candidate", "ids": True, "weights": True},
    "candidate-heads": {"attention": "candidate", "num_heads": 2, "projected": True},
    "candidate-page": {"attention": "candidate", "negatives": "page", "reduction": "none"},
}


def of_loss(options: dict[str, Any], seed: int) -> dict[str, Tensor]:
    p = make(seed, impl="triton", pages=12, clicked=0.4, **options)
    skip_unless_available("triton", p)
    packed = p.attention == "candidate" and p.num_heads == 1  # these kernels have no statistics
    return results(lambda q: operators.loss(q, "triton", not packed)[0], p, LOSS_INPUTS)


def of_sequence(seed: int) -> dict[str, Tensor]:
    q = make_sequence(seed, impl="triton", ids=bool(seed % 2))
    skip_unless_available("triton", q)
    return results(lambda q: operators.loss(q, "triton", False)[0], q, SEQUENCE_INPUTS)


def of_reconstruct(seed: int) -> dict[str, Tensor]:
    p = make(seed, impl="triton", projected=True, mask=True)
    skip_unless_available("triton", p)
    inputs = ("query", "key", "value")
    return results(lambda q: operators.reconstruct(q, "triton"), p, inputs)


def of_memory(attention: str, seed: int) -> dict[str, Tensor]:
    """What is composed of attention, the contrast with two blocks of candidates, and its sums."""
    p = make(seed, impl="triton", ids=True)
    skip_unless_available("triton", p)
    given = {k: getattr(p, k) for k in ("clicked", "pv_offsets", "history_offsets", "item_ids")}
    given |= {"memory": p.pv.detach()[:14] * 2, "memory_ids": p.item_ids[:14] + 3}

    def run(q: Any) -> Tensor:
        return cf.reconstruction_loss(q.pv, q.history, **given, attention=attention, impl="triton")

    return results(run, p, ("pv", "history"))


CASES: dict[str, Callable[[int], dict[str, Tensor]]] = {
    **{name: partial(of_loss, options) for name, options in LOSSES.items()},
    "sequence": of_sequence,
    "reconstruct": of_reconstruct,
    "memory": partial(of_memory, "anchor"),
    "memory-candidate": partial(of_memory, "candidate"),
}
SHORT = ("plain", "items", "chunks", "candidate", "sequence", "memory")


@pytest.mark.long("kernels case by case", short=SHORT)
@pytest.mark.parametrize("case", CASES)
def test_programs_keep_to_themselves(case: str) -> None:
    seed = list(CASES).index(case)
    first = CASES[case](seed)
    for order in ORDERS:
        with watched(order) as watch:
            found = CASES[case](seed)
        assert len(watch.kernels) > 3
        assert not watch.findings
        for name, x in found.items():
            assert torch.equal(x, first[name]), (order, name)


@pytest.mark.long("kernels case by case")
def test_every_kernel_is_watched() -> None:
    reached = set()
    for seed, run in enumerate(CASES.values()):
        with watched() as watch:
            run(seed)
        reached |= watch.kernels
    assert reached == {name for found in all_kernels().values() for name in found}


# ---- faults, planted -----------------------------------------------------------------------------


@triton.jit
def copy(x_ptr, out_ptr, shift, count, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < count, other=0)
    tl.store(out_ptr + place + shift, x, mask=place < count)


@triton.jit
def same_place(x_ptr, out_ptr, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.arange(0, BLOCK)
    tl.store(out_ptr + place // 2, tl.load(x_ptr + place))


@triton.jit
def everybodys_sum(x_ptr, out_ptr, BLOCK: tl.constexpr):  # noqa: N803
    place = tl.arange(0, BLOCK)
    out = tl.load(out_ptr + place)
    tl.store(out_ptr + place, out + tl.load(x_ptr + tl.program_id(0) * BLOCK + place))


@triton.jit
def count_and_look(out_ptr):
    tl.atomic_add(out_ptr, 1)
    tl.store(out_ptr + 1 + tl.program_id(0), tl.load(out_ptr))


def found(run: Callable[[], Any], order: str = "forward") -> set[str]:
    with watched(order) as watch:
        run()
    assert len(watch.kernels) == 1
    assert all(x.line.startswith("test_watch.py:") for x in watch.findings)
    return {x.what for x in watch.findings}


def test_planted_faults_are_found() -> None:
    x, out = torch.arange(64), torch.zeros(64, dtype=torch.int64)
    assert found(lambda: copy[(4,)](x, out, 0, 64, BLOCK=16)) == set()
    assert torch.equal(out, x)
    assert found(lambda: copy[(4,)](x, out[:60], 0, 60, BLOCK=16)) == set()
    outside = "an address outside of the tensors"
    # The memory is there: a neighbour's, of the same storage.
    assert found(lambda: copy[(4,)](x, out[:60], 0, 64, BLOCK=16)) == {outside}
    assert found(lambda: copy[(4,)](x[:60], out, 0, 64, BLOCK=16)) == {outside}
    # In place, each program reads what the next one writes, or has written.
    both = {"writes what another program reads"}, {"reads what another program writes"}
    y = torch.zeros(80, dtype=torch.int64)
    assert found(lambda: copy[(4,)](y, y, 16, 64, BLOCK=16)) == both[1]
    assert found(lambda: copy[(4,)](y, y, 16, 64, BLOCK=16), "reverse") == both[0]
    assert found(lambda: same_place[(1,)](x, out, BLOCK=16)) == {"writes a place twice at once"}
    assert found(lambda: everybodys_sum[(4,)](x, out, BLOCK=16)) == {
        *both[0],
        *both[1],
        "writes what another program writes",
    }
    assert found(lambda: copy[(2,)](x, out, 0, 16, BLOCK=16)) == set()
    counts = torch.zeros(9, dtype=torch.int32)
    assert found(lambda: count_and_look[(1,)](counts)) == {"reads what another program writes"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int32, torch.int64])
def test_what_nobody_has_written_is_found(dtype: torch.dtype) -> None:
    out = torch.zeros(32, dtype=dtype)

    def run(written: int) -> None:
        for x in (torch.empty(32, dtype=dtype), out.new_empty(32), torch.empty_like(out)):
            x[:written] = 1
            copy[(2,)](x, out, 0, 20, BLOCK=16)

    assert found(lambda: run(20)) == set()
    assert found(lambda: run(19)) == {"reads what nobody has written"}


def test_programs_take_their_turns_in_every_order() -> None:
    x, out = torch.arange(64), torch.zeros(64, dtype=torch.int64)
    for order, turns in ORDERS.items():
        assert sorted(turns(range(5))) == [0, 1, 2, 3, 4]
        assert (list(turns(range(5))) == [0, 1, 2, 3, 4]) == (order == "forward")
        out.zero_()
        with watched(order):
            everybodys_last[(4,)](x, out, BLOCK=16)
        assert int(out[0]) == list(turns(range(4)))[-1]


@triton.jit
def everybodys_last(x_ptr, out_ptr, BLOCK: tl.constexpr):  # noqa: N803
    tl.store(out_ptr, tl.program_id(0).to(tl.int64))
