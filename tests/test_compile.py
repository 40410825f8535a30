"""torch's machinery around the operators: compile, opcheck, autocast, accumulation, second
derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from factories import DEVICES, LOSS_INPUTS, make, make_sequence, skip_unless_available
from torch import Tensor

import courier_fast as cf
from courier_fast.loss import operators
from courier_fast.loss.problem import Needs

IMPLS = ("cpu", "triton")


def batch(impl: str, pages: int, seed: int = 0) -> tuple[Tensor, ...]:
    skip_unless_available(impl, make(0, impl=impl))
    g = torch.Generator().manual_seed(seed)
    pv, history = torch.randn(pages, 4, 16, generator=g), torch.randn(pages, 5, 16, generator=g)
    clicked, mask = torch.rand(pages, 4, generator=g) < 0.5, torch.rand(pages, 5, generator=g) < 0.8
    return tuple(x.to(DEVICES[impl]) for x in (pv, history, clicked, mask))


def model(impl: str) -> tuple[torch.nn.Module, Callable[..., Tensor]]:
    encoder = torch.nn.Linear(16, 16).to(DEVICES[impl])
    loss = cf.ReconstructionLoss(learnable_temperature=True, impl=impl).to(DEVICES[impl])
    sequence = cf.ClickSequenceLoss(impl=impl)

    def step(pv: Tensor, history: Tensor, clicked: Tensor, mask: Tensor) -> Tensor:
        e, c = encoder(pv), encoder(history)
        r = cf.reconstruct(e, c, history_mask=mask, impl=impl)
        return (
            loss(e, c, clicked, history_mask=mask) + 0.1 * sequence(c, history_mask=mask) + r.mean()
        )

    return torch.nn.ModuleList([encoder, loss]), step


@pytest.mark.long("kernels case by case")
@pytest.mark.parametrize(("impl", "backend"), [("cpu", "inductor"), ("triton", "aot_eager")])
def test_compiles_without_graph_breaks_and_for_any_number_of_pages(impl: str, backend: str) -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    parameters, step = model(impl)
    compiled = torch.compile(step, fullgraph=True, backend=backend)
    graphs = torch._dynamo.utils.counters["stats"]
    for pages in (6, 5, 7, 3):
        inputs = batch(impl, pages)
        expected = torch.autograd.grad(step(*inputs), list(parameters.parameters()))
        found = compiled(*inputs)
        torch.testing.assert_close(found, step(*inputs))
        for a, b in zip(
            torch.autograd.grad(found, list(parameters.parameters())), expected, strict=True
        ):
            torch.testing.assert_close(a, b)
    assert graphs["unique_graphs"] <= 3  # one for the first size, one for any size


def test_compiles_with_every_layout() -> None:
    torch._dynamo.reset()
    pv, history, clicked, _ = batch("cpu", 6)

    def step(
        pv: Tensor,
        history: Tensor,
        clicked: Tensor,
        starts: Tensor,
        past: Tensor,
        table: Tensor,
        index: Tensor,
    ) -> Tensor:
        packed = cf.reconstruction_loss(
            pv, history, clicked, pv_offsets=starts, history_offsets=past
        )
        items = cf.reconstruction_loss(
            index[:, :4],
            index[:, 4:],
            clicked.view(-1, 4),
            embeddings=table,
            return_stats=True,
            direction="both",
        )
        return packed + items[0] + items[1].mrr()

    args = (
        pv.flatten(0, 1),
        history.flatten(0, 1),
        clicked.flatten(),
        torch.arange(7) * 4,
        torch.arange(7) * 5,
        torch.randn(12, 16, requires_grad=True),
        torch.randint(0, 12, (6, 9), generator=torch.Generator().manual_seed(1)),
    )
    torch.testing.assert_close(
        torch.compile(step, fullgraph=True, backend="aot_eager")(*args), step(*args)
    )


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"table": True, "reduction": "none"},
        {"direction": "both", "tensor_tau": True},
        {"attention": "candidate", "cosine": True, "tensor_tau": True},
    ],
    ids=str,
)
def test_opcheck(impl: str, options: dict[str, Any]) -> None:
    p = make(1, impl=impl, **options)
    skip_unless_available(impl, p)
    checks = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if impl != "triton":
        # Not for buffers of which only part is written: the check compares all of what an operator
        # returns.
        checks.append("test_aot_dispatch_dynamic")
    needs = [getattr(p, name) is not None for name in LOSS_INPUTS]
    q = make_sequence(
        1, impl=impl, table=bool(options.get("table")), tensor_tau=bool(options.get("tensor_tau"))
    )
    torch_ops = torch.ops.courier_fast
    for operator, *arguments in (
        (torch_ops.reconstruction_loss, *operators.flat(p), needs, True, impl),
        (torch_ops.reconstruct, *operators.flat(p), [*needs[:5], False], False, impl),
        (
            torch_ops.click_sequence_loss,
            *operators.flat(q),
            list(Needs(history=True, temperature=q.temperature is not None)),
            False,
            impl,
        ),
    ):
        found = torch.library.opcheck(operator.default, tuple(arguments), test_utils=checks)
        assert set(found.values()) == {"SUCCESS"}


def test_autocast_casts_the_embeddings_and_keeps_the_loss() -> None:
    pv, history, clicked, mask = batch("cpu", 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = cf.reconstruction_loss(pv, history, clicked, history_mask=mask)
        mixed = cf.reconstruction_loss(pv.bfloat16(), history, clicked, history_mask=mask)
    expected = cf.reconstruction_loss(pv.bfloat16(), history.bfloat16(), clicked, history_mask=mask)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)
    assert torch.equal(mixed, expected)


@pytest.mark.parametrize("backward_inside", [False, True])
@pytest.mark.parametrize(
    ("impl", "dtype"),
    [("reference", torch.bfloat16), ("cpu", torch.bfloat16), ("triton", torch.float16)],
    ids=str,
)
def test_autocast_is_a_cast_of_the_inputs(
    impl: str, dtype: torch.dtype, backward_inside: bool
) -> None:
    """Same bits as inputs cast by hand, gradients included: autocast reaches no product of float32
    inside."""
    pv, history, clicked, mask = batch("cpu" if impl == "reference" else impl, 9)

    def run(cast: bool) -> list[Tensor]:
        leaves = [x.clone().requires_grad_() for x in (pv, history)]
        tau = torch.tensor(0.1, device=pv.device, requires_grad=True)

        def to(x: Tensor) -> Tensor:  # at each use, as autocast does
            return x.to(dtype) if cast else x

        with torch.autocast(pv.device.type, dtype=dtype, enabled=not cast):
            e, c = leaves
            options: dict[str, Any] = {"history_mask": mask, "impl": impl}
            loss = cf.reconstruction_loss(
                to(e), to(c), clicked, temperature=tau, direction="both", **options
            )
            sequence = cf.click_sequence_loss(to(c), temperature=tau, **options)
            r = cf.reconstruct(to(e), to(c), **options)
            assert loss.dtype == sequence.dtype == torch.float32
            assert r.dtype == dtype
            total = loss + sequence + r.float().square().sum()
            if backward_inside:
                total.backward()
        if not backward_inside:
            total.backward()
        return [loss, sequence, r, *(x.grad for x in (*leaves, tau))]

    for found, expected in zip(run(False), run(True), strict=True):
        assert torch.equal(found, expected)


def test_nested_inputs_compile() -> None:
    torch._dynamo.reset()
    g = torch.Generator().manual_seed(0)

    def step(pv: Tensor, history: Tensor, clicked: Tensor) -> Tensor:
        return cf.reconstruction_loss(pv, history, clicked, impl="cpu")

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for counts in ([2, 0, 3], [4, 1, 1, 2]):
        starts = torch.tensor([0, *counts]).cumsum(0)
        pv, history = (
            torch.nested.nested_tensor_from_jagged(torch.randn(sum(counts), 8, generator=g), starts)
            for _ in range(2)
        )
        clicked = torch.nested.nested_tensor_from_jagged(torch.ones(sum(counts)) > 0, starts)
        skip_unless_available("cpu", make(0))
        torch.testing.assert_close(compiled(pv, history, clicked), step(pv, history, clicked))


def test_autocast_gives_gradients_in_the_type_of_the_parameters() -> None:
    parameters, step = model("cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        step(*batch("cpu", 8)).backward()
    for x in parameters.parameters():
        assert x.grad is not None
        assert x.grad.dtype == torch.float32
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_accumulate(impl: str) -> None:
    parameters, step = model(impl)
    parts = []
    for seed in (1, 2):
        parameters.zero_grad()
        step(*batch(impl, 5, seed)).backward()
        parts.append([x.grad.clone() for x in parameters.parameters()])
    parameters.zero_grad()
    for seed in (1, 2):
        step(*batch(impl, 5, seed)).backward()
    for x, a, b in zip(parameters.parameters(), *parts, strict=True):
        torch.testing.assert_close(x.grad, a + b)


@pytest.mark.parametrize("impl", IMPLS)
def test_double_backward_is_refused_clearly(impl: str) -> None:
    p = make(1, impl=impl)
    skip_unless_available(impl, p)
    q = make_sequence(1, impl=impl)
    for out, x in (
        (operators.loss(p, impl, False)[0], p.pv),
        (operators.reconstruct(p, impl).sum(), p.pv),
        (operators.loss(q, impl)[0], q.history),
    ):
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        with pytest.raises(RuntimeError, match='double backward .*impl="reference"'):
            grad.sum().backward()


def test_reference_has_double_backward() -> None:
    p = make(1)
    loss = cf.reconstruction_loss(
        p.pv,
        p.history,
        p.clicked,
        pv_offsets=p.pv_offsets,
        history_offsets=p.history_offsets,
        impl="reference",
    )
    (grad,) = torch.autograd.grad(loss, p.pv, create_graph=True)
    grad.square().sum().backward()
    assert p.pv.grad is not None
    assert p.pv.grad.any()


@pytest.mark.parametrize("impl", IMPLS)
def test_no_graph_without_gradients(impl: str) -> None:
    p = make(1, impl=impl)
    skip_unless_available(impl, p)
    with torch.no_grad():
        loss = operators.loss(p, impl, False)[0]
    assert not loss.requires_grad
    with_grad = operators.loss(p, impl, False)[0]
    torch.testing.assert_close(loss, with_grad.detach())
