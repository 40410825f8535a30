"""Random ragged problems, and the error budget that every implementation is held to."""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from courier_fast.loss import operators, reference
from courier_fast.loss.problem import Problem, SequenceProblem
from courier_fast.testing.budget import DRAWS, Budget, Rounding, Yardstick
from courier_fast.testing.problems import RandomValues, problem

GPU = torch.cuda.is_available()
DEVICES = {"cpu": "cpu"} | dict.fromkeys(("triton", "xformers"), "cuda" if GPU else "cpu")
IMPLS = ("cpu", "triton", "xformers")
LOSS_INPUTS = ("pv", "history", "query", "key", "value", "temperature", "reconstructed")
SEQUENCE_INPUTS = ("history", "temperature")


def skip_unless_available(impl: str, p: Problem | SequenceProblem) -> None:
    """Skip with the reasons; `p` decides on type and device."""
    if impl != "reference" and (reasons := operators.unavailable_reasons(impl, p)):
        pytest.skip(f"{impl}: {'; '.join(reasons)}")


def lengths(generator: torch.Generator, pages: int, longest: int) -> Tensor:
    """Ragged lengths with zeros among them."""
    return torch.randint(0, longest + 1, (pages,), generator=generator)


def offsets_of(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def make(
    seed: int = 0,
    *,
    impl: str = "cpu",
    pages: int = 9,
    longest_pv: int = 6,
    longest_history: int = 9,
    dim: int = 24,
    mask: bool = False,
    **options: Any,
) -> Problem:
    """A random problem: ragged pages, some empty; with `mask` NaN in rows that are padding.
    `options` are those of `problem`."""
    values = RandomValues(seed)
    counts = [
        lengths(values.generator, pages, longest) for longest in (longest_pv, longest_history)
    ]
    rows = [int(x.sum()) for x in counts]
    if mask:  # also rows past the last offset
        rows = [rows[0] + 3, rows[1] + 2]
    pv, history = zip(rows, map(offsets_of, counts), strict=True)
    p = problem(values, pv, history, dim=dim, mask=mask, **options)
    return with_gradients(to_device(p, DEVICES[impl]), LOSS_INPUTS)


def make_sequence(
    seed: int = 0, *, ids: bool = False, reduction: str = "mean", **options: Any
) -> SequenceProblem:
    """The histories of such a problem, for the click-sequence loss."""
    p = make(seed, **options)
    g = torch.Generator().manual_seed(seed + 1000)
    rows = p.num_history
    item_ids = torch.randint(0, max(rows // 3, 1), (rows,), generator=g) if ids else None
    q = SequenceProblem(
        history=p.pv if p.history is None else p.history,
        history_index=p.history_index,
        history_offsets=p.history_offsets,
        history_mask=p.history_mask,
        item_ids=None if item_ids is None else item_ids.to(p.pv.device),
        temperature=p.temperature,
        tau=p.tau,
        reduction=reduction,
    )
    return with_gradients(q, SEQUENCE_INPUTS)


def mapped(p: Any, change: Callable[[str, Tensor], Tensor]) -> Any:
    tensors = {f.name: getattr(p, f.name) for f in fields(p)}
    return replace(p, **{k: change(k, x) for k, x in tensors.items() if isinstance(x, Tensor)})


def to_device(p: Any, device: str) -> Any:
    return mapped(p, lambda _, x: x.to(device))


def with_gradients(p: Any, inputs: Sequence[str]) -> Any:
    return mapped(p, lambda k, x: x.detach().requires_grad_() if k in inputs else x)


def in_float64(p: Any, inputs: Sequence[str]) -> Any:
    def change(name: str, x: Tensor) -> Tensor:
        x = x.detach().double() if x.is_floating_point() else x
        return x.requires_grad_() if name in inputs else x

    return mapped(p, change)


def upstream_for(loss: Tensor) -> Tensor:
    """A gradient per entry that is neither 1 nor equal."""
    g = torch.Generator().manual_seed(7)
    return torch.randn(loss.shape, generator=g).to(loss.device, loss.dtype)


def results(run: Callable[[Any], Tensor], p: Any, inputs: Sequence[str]) -> dict[str, Tensor]:
    """The output and the gradient of every input that is there."""
    present = {name: getattr(p, name) for name in inputs if getattr(p, name) is not None}
    out = run(p)
    grads = torch.autograd.grad(out, list(present.values()), upstream_for(out), allow_unused=True)
    found = {"output": out.detach()}
    for (name, x), grad in zip(present.items(), grads, strict=True):
        found[name] = torch.zeros_like(x) if grad is None else grad
        assert found[name].dtype == x.dtype
        assert found[name].shape == x.shape
    return found


def yardstick(
    run: Callable[[Any], Tensor], p: Any, inputs: Sequence[str], seed: int = 0
) -> Yardstick:
    """What an implementation's results are held to; `run` is the reference."""
    return yardstick_of(lambda q: results(run, q, inputs), p, inputs, seed)


def yardstick_of(
    run: Callable[[Any], dict[str, Tensor]], p: Any, inputs: Sequence[str], seed: int = 0
) -> Yardstick:
    """The same of anything that is computed from a problem; `seed` is that of the model's random
    numbers."""
    rounded = []
    for draw in range(DRAWS):
        rounding = Rounding(seed * DRAWS + draw)
        q = mapped(p, lambda _, x, r=rounding: r.leaf(x) if x.is_floating_point() else x)
        rounded.append(run(q))
    return Yardstick(run(in_float64(p, inputs)), run(p), rounded)


def content(p: Any) -> tuple[Any, ...]:
    """What the problem holds, to tell whether another is the same."""
    found: list[Any] = [type(p)]
    for field in fields(p):
        x = getattr(p, field.name)
        if isinstance(x, Tensor):
            plain = x.detach().cpu().clone(memory_format=torch.contiguous_format)
            data = plain.view(-1).view(torch.uint8).numpy().tobytes()
            x = x.dtype, x.shape, x.stride(), x.device, hashlib.sha256(data).digest()
        found.append(x)
    return tuple(found)


_yardsticks: OrderedDict[Any, Yardstick] = OrderedDict()


def remembered(compute: Callable[[Any, int], Yardstick]) -> Callable[..., Yardstick]:
    """compute(p, seed), once for all implementations and tests that are given the same problem one
    after the other."""

    @functools.wraps(compute)
    def find(p: Any, seed: int = 0) -> Yardstick:
        key = compute, seed, content(p)
        if key not in _yardsticks:
            _yardsticks[key] = compute(p, seed)
            if len(_yardsticks) > 32:
                _yardsticks.popitem(last=False)
        return _yardsticks[key]

    return find


@remembered
def loss_yardstick(p: Problem, seed: int) -> Yardstick:
    return yardstick(lambda q: reference.reconstruction_loss(q).loss, p, LOSS_INPUTS, seed)


@remembered
def reconstruct_yardstick(p: Problem, seed: int) -> Yardstick:
    return yardstick(lambda q: reference.reconstruct(q)[0], p, LOSS_INPUTS[:5], seed)


@remembered
def sequence_yardstick(p: SequenceProblem, seed: int) -> Yardstick:
    return yardstick(reference.click_sequence_loss, p, SEQUENCE_INPUTS, seed)


def check_loss(impl: str, draws: int = 3, **case: Any) -> None:
    """Loss and every gradient of `draws` random problems within the budget."""
    check_problems(impl, [make(seed, impl=impl, **case) for seed in range(draws)])


def check_problems(impl: str, problems: Sequence[Problem]) -> None:
    skip_unless_available(impl, problems[0])
    budget = Budget(problems[0].pv.dtype)
    for seed, p in enumerate(problems):
        found = results(lambda q: operators.loss(q, impl, False)[0], p, LOSS_INPUTS)
        budget.add(loss_yardstick(p, seed), found)
    budget.check()


def check_reconstruct(impl: str, draws: int = 3, **case: Any) -> None:
    inputs = LOSS_INPUTS[:5]
    problems = [make(seed, impl=impl, **case) for seed in range(draws)]
    skip_unless_available(impl, problems[0])
    budget = Budget(problems[0].pv.dtype)
    for seed, p in enumerate(problems):
        found = results(lambda q: operators.reconstruct(q, impl), p, inputs)
        budget.add(reconstruct_yardstick(p, seed), found)
    budget.check()


def check_sequence(impl: str, draws: int = 4, **case: Any) -> None:
    problems = [make_sequence(seed, impl=impl, **case) for seed in range(draws)]
    skip_unless_available(impl, problems[0])
    budget = Budget(problems[0].history.dtype)
    for seed, p in enumerate(problems):
        found = results(lambda q: operators.loss(q, impl)[0], p, SEQUENCE_INPUTS)
        budget.add(sequence_yardstick(p, seed), found)
    budget.check()
