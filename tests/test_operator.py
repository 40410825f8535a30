"""The loss with and without the registered operator around it, and under torch.func: the same bits,
and seen by whoever watches operators."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import DEVICES, IMPLS, make, make_sequence, skip_unless_available
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import courier_fast as cf
from courier_fast.loss import operators


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
        outputs = list(operators.loss(p, impl, True))
    else:
        p = make_sequence(impl=impl, reduction=reduction, tensor_tau=True)
        inputs = [p.history, p.temperature]
        skip_unless_available(impl, p)
        outputs = [operators.loss(p, impl)[0]]
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
        plain = operators.loss(p, impl, False)[0]
        p.pv = p.pv.detach().as_subclass(Named)
        assert torch.equal(operators.loss(p, impl, False)[0].as_subclass(Tensor), plain)


# ---- torch.func ----------------------------------------------------------------------------------

KINDS = ("loss", "sequence", "reconstruct")


def case(
    kind: str, impl: str, reduction: str = "mean"
) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """A scalar of padded embeddings and a temperature, and values for them."""
    device = DEVICES.get(impl, "cpu")
    skip_unless_available(impl, make(impl=impl if impl in IMPLS else "cpu"))
    g = torch.Generator().manual_seed(0)
    pv, history = (torch.randn(3, n, 8, generator=g).to(device) for n in (4, 5))
    clicked = (torch.rand(3, 4, generator=g) < 0.6).to(device)
    tau = torch.tensor(0.1, device=device)
    scale = torch.randn(3, 4, generator=g).to(device)

    def loss(e: Tensor, c: Tensor, t: Tensor) -> Tensor:
        x = cf.reconstruction_loss(e, c, clicked, temperature=t, reduction=reduction, impl=impl)
        return x if reduction == "mean" else (x * scale).sum()

    def sequence(c: Tensor, t: Tensor) -> Tensor:
        return cf.click_sequence_loss(c, temperature=t, reduction=reduction, impl=impl).sum()

    def reconstruct(e: Tensor, c: Tensor) -> Tensor:
        return cf.reconstruct(e, c, impl=impl).square().sum()

    if kind == "loss":
        return loss, [pv, history, tau]
    return (sequence, [history, tau]) if kind == "sequence" else (reconstruct, [pv, history])


def by_autograd(f: Callable[..., Tensor], values: list[Tensor]) -> tuple[Tensor, ...]:
    leaves = [x.clone().requires_grad_() for x in values]
    return torch.autograd.grad(f(*leaves), leaves)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_gradients_by_torch_func_are_those_of_autograd(
    impl: str, kind: str, reduction: str
) -> None:
    f, values = case(kind, impl, reduction)
    every = tuple(range(len(values)))
    expected = by_autograd(f, values)
    assert all(x.any() for x in expected)
    out, pullback = torch.func.vjp(f, *values)
    for found in (
        torch.func.grad(f, argnums=every)(*values),
        torch.func.jacrev(f, argnums=every)(*values),
        pullback(torch.ones_like(out)),  # the transform is over by then
    ):
        for x, y in zip(found, expected, strict=True):
            assert torch.equal(x, y) if impl != "xformers" else torch.allclose(x, y)


@pytest.mark.parametrize("impl", IMPLS)
def test_several_upstream_gradients_at_once(impl: str) -> None:
    f, values = case("loss", impl, "none")
    leaf = values[0].clone().requires_grad_()
    out = f(leaf, *values[1:])
    scales = torch.tensor([1.0, -2.0], device=leaf.device)

    def pull(scale: Tensor) -> Tensor:
        return torch.autograd.grad(out, leaf, scale, retain_graph=True)[0]

    found = torch.func.vmap(pull)(scales)
    for x, scale in zip(found, scales, strict=True):
        torch.testing.assert_close(x, pull(scale))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("impl", IMPLS)
def test_vmap_forward_mode_and_second_derivatives_are_refused(impl: str, kind: str) -> None:
    f, values = case(kind, impl)
    twice = [torch.stack([x, x]) for x in values]
    for mapped in (f, torch.func.grad(f)):
        with pytest.raises(RuntimeError, match=r'vmap over .* once for each batch, .*"reference"'):
            torch.func.vmap(mapped)(*twice)
    with pytest.raises(RuntimeError, match='forward-mode .*jacrev, or impl="reference"'):
        torch.func.jvp(f, tuple(values), tuple(values))
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="forward-mode"):
        f(forward_ad.make_dual(values[0], values[0]), *values[1:])

    def slope(*x: Tensor) -> Tensor:
        return torch.func.grad(f)(*x).sum()

    with pytest.raises(RuntimeError, match='double backward .*impl="reference"'):
        torch.func.grad(slope)(*values)
    assert torch.func.vmap(lambda s: f(*values) * s)(torch.ones(2, device=values[0].device)).any()


def test_the_reference_takes_every_transform() -> None:
    f, values = case("loss", "reference")
    twice = [torch.stack([x, x * 1.5]) for x in values]
    found = torch.func.vmap(torch.func.grad(f))(*twice)
    for i in range(2):
        torch.testing.assert_close(found[i], by_autograd(f, [x[i] for x in twice])[0])
    assert torch.func.jvp(f, tuple(values), tuple(values))[1].isfinite()


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_a_module_as_a_function_of_its_temperature(impl: str) -> None:
    """Was refused for want of setup_context, in the clamp of the temperature."""
    _, (pv, history, _) = case("loss", impl)
    loss = cf.ReconstructionLoss(0.05, learnable_temperature=True, impl=impl).to(pv.device)
    inputs = (pv, history, torch.ones(3, 4, dtype=torch.bool, device=pv.device))
    parameters = {n: x.detach() for n, x in loss.named_parameters()}
    found = torch.func.grad(lambda p: torch.func.functional_call(loss, p, inputs))(parameters)
    loss(*inputs).backward()
    for name, x in loss.named_parameters():
        torch.testing.assert_close(found[name], x.grad)
