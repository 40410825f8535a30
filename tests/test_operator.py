"""The loss with and without the registered operator around it: the same bits, and seen by whoever watches operators."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import IMPLS, make, make_sequence, skip_unless_available
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from courier_fast import ops


class Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def run(kind: str, impl: str, reduction: str) -> list[Tensor]:
    if kind == "loss":
        p: Any = make(impl=impl, reduction=reduction, tensor_tau=True)
        inputs = [p.pv, p.history, p.temperature]
        skip_unless_available(impl, p)
        outputs = list(ops.reconstruction_loss(p, impl, True))
    else:
        p = make_sequence(impl=impl, reduction=reduction, tensor_tau=True)
        inputs = [p.history, p.temperature]
        skip_unless_available(impl, p)
        outputs = [ops.click_sequence_loss(p, impl)]
    assert all(not x.requires_grad for x in outputs[1:])
    gradients = torch.autograd.grad(outputs[0].sum(), inputs)
    return [x.detach() for x in outputs] + list(gradients)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", ["loss", "sequence"])
@pytest.mark.parametrize("impl", IMPLS)
def test_both_ways_give_the_same_bits(impl: str, kind: str, reduction: str) -> None:
    alone = run(kind, impl, reduction)
    with Watch() as watch:
        watched = run(kind, impl, reduction)
    name = "reconstruction_loss" if kind == "loss" else "click_sequence_loss"
    assert f"courier_fast::{name}" in watch.names
    assert f"courier_fast::{name}_backward" in watch.names
    exact = impl != "xformers"  # its backward adds in any order
    for x, y in zip(alone, watched, strict=True):
        assert torch.equal(x, y) if exact else torch.allclose(x, y)


@pytest.mark.parametrize("impl", ["cpu"])
def test_tensor_subclasses_reach_the_operator(impl: str) -> None:
    class Named(Tensor):
        pass

    p = make(impl=impl)
    skip_unless_available(impl, p)
    with torch.no_grad():
        plain = ops.reconstruction_loss(p, impl, False)[0]
        p.pv = p.pv.detach().as_subclass(Named)
        assert torch.equal(ops.reconstruction_loss(p, impl, False)[0].as_subclass(Tensor), plain)
