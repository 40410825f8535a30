"""What each edge of the definition must give, on every implementation."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import (
    DEVICES,
    GPU,
    LOSS_INPUTS,
    Budget,
    loss_yardstick,
    make,
    mapped,
    results,
    skip_unless_available,
    to_device,
    with_gradients,
)
from torch import Tensor

import courier_fast as cf
from courier_fast.kernels.triton import tiles
from courier_fast.loss import operators, reference
from courier_fast.loss.problem import Problem

IMPLS = ("reference", "cpu", "triton")


def loss_of(impl: str, p: Problem) -> Tensor:
    if impl == "reference":
        return reference.reconstruction_loss(p).loss
    skip_unless_available(impl, p)
    return operators.loss(p, impl, False)[0]


def run(impl: str, p: Problem) -> dict[str, Tensor]:
    return results(lambda q: loss_of(impl, q), p, LOSS_INPUTS)


def build(
    impl: str,
    pv: Tensor,
    history: Tensor,
    pages: list[tuple[int, int]],
    clicked: list[int],
    **options: Any,
) -> Problem:
    """Pages as (PV items, history items)."""
    counts = torch.tensor(pages, dtype=torch.int64).reshape(-1, 2)
    starts = torch.cat([torch.zeros(1, 2, dtype=torch.int64), counts.cumsum(0)])
    p = make(0)
    p = replace(
        p,
        pv=pv,
        history=history,
        pv_offsets=starts[:, 0].contiguous(),
        history_offsets=starts[:, 1].contiguous(),
        clicked=torch.tensor(clicked, dtype=torch.bool),
        attention_scale=pv.shape[1] ** -0.5,
        **options,
    )
    return with_gradients(to_device(p, DEVICES.get(impl, "cpu")), LOSS_INPUTS)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    "case",
    [
        "no click",
        "clicked page without history",
        "no PV item",
        "no history",
        "no page",
        "all weights zero",
    ],
)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_anchor_gives_zero_attached_to_every_input(impl: str, case: str, reduction: str) -> None:
    pages, clicked, weights = [(3, 2), (2, 0)], [1, 0, 1, 0, 0], None
    if case == "no click":
        clicked = [0] * 5
    elif case == "clicked page without history":
        clicked = [0, 0, 0, 1, 1]
    elif case == "no PV item":
        pages, clicked = [(0, 2)], []
    elif case == "no history":
        pages = [(3, 0), (2, 0)]
    elif case == "no page":
        pages, clicked = [], []
    else:
        weights = torch.zeros(5)
    rows, history_rows = sum(n for n, _ in pages), sum(k for _, k in pages)
    options = {
        "weights": weights,
        "reduction": reduction,
        "temperature": torch.tensor(0.1),
        "direction": "both",
    }
    p = build(impl, normal(rows, 8), normal(history_rows, 8), pages, clicked, **options)
    loss = loss_of(impl, p)
    assert loss.requires_grad
    assert not loss.any()
    assert loss.shape == ((rows,) if reduction == "none" else ())
    grads = torch.autograd.grad(loss.sum(), [p.pv, p.history, p.temperature])
    for grad in grads:
        assert not grad.any()  # NaN would count


def no_rows(layout: str, device: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch without PV items: what takes a gradient, and the rest."""
    none, starts = torch.zeros(0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    pv, past = {"packed": ((0,), (4,)), "padded": ((2, 0), (2, 2)), "no page": ((0, 3), (0, 2))}[
        layout.removesuffix(" table")
    ]
    if layout.endswith("table"):
        leaves = {"embeddings": normal(5, 8)}
        rest = {"pv": none.reshape(pv), "history": torch.ones(past, dtype=torch.int64)}
    else:
        leaves, rest = {"pv": normal(*pv, 8), "history": normal(*past, 8)}, {}
    leaves |= {"query": normal(*pv, 8), "key": normal(*past, 8), "value": normal(*past, 8)}
    leaves["temperature"] = torch.tensor(0.1)
    rest["clicked"] = torch.ones(pv, dtype=torch.bool)
    if layout.startswith("packed"):
        rest |= {"pv_offsets": starts, "history_offsets": starts + torch.tensor([0, 2, 4])}
    leaves = {k: x.to(device).requires_grad_() for k, x in leaves.items()}
    return leaves, {k: x.to(device) for k, x in rest.items()}


@pytest.mark.parametrize("layout", ["packed", "padded", "no page", "packed table", "padded table"])
@pytest.mark.parametrize("impl", (*IMPLS, "xformers"))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_row_gives_a_loss_attached_to_every_input(
    impl: str, layout: str, reduction: str
) -> None:
    """Each input alone, too: the reference had no graph for a history that key and value stand in
    for."""
    leaves, rest = no_rows(layout, DEVICES.get(impl, "cpu"))
    skip_unless_available(impl, make(impl=impl if impl != "reference" else "cpu"))

    def total(**values: Tensor) -> Tensor:
        loss = cf.reconstruction_loss(**values, **rest, reduction=reduction, impl=impl)
        assert loss.shape == (rest["clicked"].shape if reduction == "none" else ())
        return loss.sum()

    total(**leaves).backward()
    detached = {k: x.detach() for k, x in leaves.items()}
    for name, x in leaves.items():
        alone = x.detach().requires_grad_()
        total(**(detached | {name: alone})).backward()
        for found in (x.grad, alone.grad):
            assert found is not None, name
            assert not found.any(), name  # NaN would count


@pytest.mark.parametrize("impl", IMPLS)
def test_page_without_history_has_candidates_but_no_anchors(impl: str) -> None:
    pv, history = normal(5, 8), normal(2, 8, seed=1)
    both = build(impl, pv, history, [(3, 2), (2, 0)], [1, 0, 0, 1, 1])
    alone = build(impl, pv[:3], history, [(3, 2)], [1, 0, 0])
    assert loss_of(impl, both) > loss_of(impl, alone)  # two more negatives
    assert run(impl, both)["pv"][3:].any()
    if impl != "reference":
        out = operators.loss(both, impl, True)
        assert (int(out[5].sum()), int(out[6])) == (1, 2)


@pytest.mark.parametrize("impl", IMPLS)
def test_page_without_pv_items_is_ignored(impl: str) -> None:
    pv, history = normal(3, 8), normal(4, 8, seed=1)
    found = run(impl, build(impl, pv, history, [(3, 2), (0, 2)], [1, 0, 1]))
    expected = run(impl, build(impl, pv, history[:2], [(3, 2)], [1, 0, 1]))
    torch.testing.assert_close(found["output"], expected["output"])
    assert not found["history"][2:].any()


@pytest.mark.parametrize("negatives", ["batch", "page", "other_pages"])
@pytest.mark.parametrize("impl", IMPLS)
def test_one_candidate_only_gives_zero(impl: str, negatives: str) -> None:
    options: dict[str, Any] = {"negatives": negatives, "direction": "both"}
    p = build(impl, normal(1, 8), normal(2, 8, seed=1), [(1, 2)], [1], **options)
    found = run(impl, p)
    # The positive is its only candidate: what is left is the rounding of one score, and of p = 1,
    # times 1/tau.
    rounding = torch.finfo(torch.float32).eps / p.tau
    assert abs(float(found["output"])) <= rounding
    assert found["pv"].abs().max() <= rounding / p.tau
    assert found["history"].abs().max() <= rounding / p.tau


@pytest.mark.parametrize("direction", ["reconstruct", "identify", "both"])
@pytest.mark.parametrize("impl", IMPLS)
def test_anchors_of_one_page_without_negatives_have_no_loss(impl: str, direction: str) -> None:
    """Not one of rounding either: their log-sum-exp is their score."""
    options: dict[str, Any] = {"negatives": "other_pages", "direction": direction, "tau": 1.0}
    for seed in range(3):
        pv, history = normal(7, 31, seed=seed), normal(5, 31, seed=seed + 9)
        p = build(impl, pv, history, [(7, 5)], [1] * 7, reduction="none", **options)
        found = run(impl, p)
        assert found["output"].shape == (7,) and not any(x.any() for x in found.values())


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_weights_are_no_anchors(impl: str) -> None:
    pv, history, pages = normal(5, 8), normal(4, 8, seed=1), [(3, 2), (2, 2)]
    weighted = run(
        impl,
        build(impl, pv, history, pages, [1, 1, 0, 1, 0], weights=torch.tensor([1.0, 0, 1, 1, 1])),
    )
    dropped = run(impl, build(impl, pv, history, pages, [1, 0, 0, 1, 0]))
    for name, x in weighted.items():
        torch.testing.assert_close(x, dropped[name])


@pytest.mark.parametrize("direction", ["reconstruct", "both"])
@pytest.mark.parametrize("filler", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("impl", IMPLS)
def test_padding_has_no_influence(impl: str, filler: float, direction: str) -> None:
    p = make(3, mask=True, direction=direction, impl=impl if impl != "reference" else "cpu")
    assert p.pv_mask is not None
    assert p.history_mask is not None
    dead = {"pv": ~p.pv_mask, "history": ~p.history_mask}
    for mask in dead.values():
        mask[-1] = True  # past the last offset

    def filled(value: float) -> dict[str, Tensor]:
        def change(name: str, x: Tensor) -> Tensor:
            return x.detach().masked_fill(dead[name][:, None], value) if name in dead else x

        return run(impl, with_gradients(mapped(p, change), LOSS_INPUTS))

    found, clean = filled(filler), filled(0.0)
    for name, x in found.items():
        assert torch.equal(x, clean[name]), name
        assert x.isfinite().all()
    assert not found["pv"][dead["pv"]].any()
    assert not found["history"][dead["history"]].any()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["pv", "history"])
@pytest.mark.parametrize("impl", IMPLS)
def test_non_finite_live_rows_reach_the_loss(impl: str, name: str, value: float) -> None:
    tensors = {"pv": normal(5, 8), "history": normal(4, 8, seed=1)}
    tensors[name][0, 3] = value
    p = build(
        impl, tensors["pv"], tensors["history"], [(3, 2), (2, 2)], [1, 0, 0, 1, 0], reduction="none"
    )
    expected = reference.reconstruction_loss(p).loss
    found = loss_of(impl, p)
    assert expected.isnan().any()
    assert found.isnan().tolist() == expected.isnan().tolist()


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_vectors(impl: str) -> None:
    """cos with a zero vector is 0, and so is its gradient."""
    pv, history = normal(5, 8), normal(4, 8, seed=1)
    pv[1] = 0
    history[2:] = 0  # the reconstruction of page 1 is zero
    p = build(impl, pv, history, [(3, 2), (2, 2)], [1, 1, 0, 1, 0], direction="both")
    found, expected = run(impl, p), run("reference", p)
    torch.testing.assert_close(found["output"], expected["output"])
    assert not found["pv"][1].any() or p.query is None
    assert all(x.isfinite().all() for x in found.values())
    torch.testing.assert_close(found["history"], expected["history"])


@pytest.mark.parametrize("impl", IMPLS)
def test_upstream_gradient_scales_each_anchor_by_its_own(impl: str) -> None:
    p = make(1, reduction="none", impl=impl if impl != "reference" else "cpu")
    loss = loss_of(impl, p)
    anchors = (loss != 0).nonzero().squeeze(1)
    assert len(anchors) > 2
    weights = torch.linspace(-2, 3, len(loss), device=loss.device)
    together = torch.autograd.grad(loss, p.history, weights, retain_graph=True)[0]
    apart = torch.zeros_like(together)
    for i in anchors:
        one = torch.zeros_like(loss).index_fill(0, i, 1)
        apart += weights[i] * torch.autograd.grad(loss, p.history, one, retain_graph=True)[0]
    torch.testing.assert_close(together, apart)
    scalar = replace(p, reduction="sum")
    whole = torch.autograd.grad(loss_of(impl, scalar) * 3, p.history)[0]
    torch.testing.assert_close(whole, 3 * torch.autograd.grad(loss_of(impl, scalar), p.history)[0])


@pytest.mark.parametrize("impl", IMPLS)
def test_temperature_of_0_005_is_right(impl: str) -> None:
    """exp(2/tau) overflows float32 there."""
    budget = Budget(torch.float32)
    for seed in range(4):
        p = make(seed, tau=0.005, impl=impl if impl != "reference" else "cpu")
        found = run(impl, p)
        budget.add(loss_yardstick(p, seed), found)
        assert all(x.isfinite().all() for x in found.values())
    budget.check()


KERNELS = Path(tiles.__file__).parent
STRIDES = {"D", "STRIDE", "DQ_STRIDE", "BLOCK_D", "y_capacity", "chunk_rows"}


def narrow_products(source: str) -> list[str]:
    """Products of row numbers with a stride in which nothing is known to have 64 bits."""
    tree = ast.parse(source)
    wide = {"rows64", "occurrence"}  # the latter: positions from torch.sort
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names = {x.id for x in ast.walk(node.value) if isinstance(x, ast.Name)}
            text = ast.unparse(node.value)
            if "int64" in text or "source_row" in text or names & wide:
                wide.add(node.targets[0].id)
    found = []
    for node in ast.walk(tree):
        if not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult)):
            continue
        names = {x.id for x in ast.walk(node.left) if isinstance(x, ast.Name)}
        stride = ast.unparse(node.right).removeprefix("how.")
        is_row = "[" in ast.unparse(node.left) and stride in STRIDES
        if is_row and "int64" not in ast.unparse(node.left) and not names & wide:
            found.append(ast.unparse(node))
    return found


def test_narrow_products_are_found() -> None:
    for stride in ("STRIDE", "how.STRIDE"):
        assert narrow_products(f"row = tl.arange(0, 4)\nx = ptr + row[:, None] * {stride}")
    assert not narrow_products(
        "row = tl.arange(0, 4)\nx = ptr + row.to(tl.int64)[:, None] * STRIDE"
    )


@pytest.mark.parametrize("kernel", sorted(x.stem for x in KERNELS.glob("*.py")))
def test_row_offsets_are_64_bit(kernel: str) -> None:
    """No kernel multiplies a 32-bit row number by a stride (flash-linear-attention #1080, FBGEMM
    #5755)."""
    assert not narrow_products((KERNELS / f"{kernel}.py").read_text())


def test_more_than_2_31_similarities() -> None:
    """N x M above 2^31 on the CPU, against counts: of 16 different rows, shown again and again, the
    sum is known."""
    rows = 46400
    assert rows * rows > 2**31
    g = torch.Generator().manual_seed(0)
    kinds = torch.nn.functional.normalize(torch.randn(16, 4, generator=g, dtype=torch.float64))
    kind = torch.randint(0, 16, (rows,), generator=g)
    starts = torch.arange(rows + 1)
    e = kinds[kind].float()
    p = replace(
        make(0),
        pv=e,
        history=e.roll(1, 0),
        pv_offsets=starts,
        history_offsets=starts,
        clicked=torch.ones(rows, dtype=torch.bool),
        attention_scale=0.5,
        tau=0.5,
        reduction="none",
    )
    skip_unless_available("cpu", p)
    with torch.no_grad():
        found = operators.loss(p, "cpu", False)[0]
    s = kinds @ kinds.T / 0.5  # a single history item is its own reconstruction
    lse = (s + torch.bincount(kind, minlength=16).log()).logsumexp(1)
    before = kind.roll(1)
    torch.testing.assert_close(found, (lse[before] - s[before, kind]).float())


@pytest.mark.skipif(not GPU, reason="needs a GPU with 30 GiB: a table of more than 2^31 numbers")
def test_more_than_2_31_elements() -> None:
    """flash-linear-attention #1080, FBGEMM #5755: 32-bit offsets overflow silently."""
    items, dim = 2**31 // 256 + 1000, 256
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("less than 30 GiB of GPU memory free")
    table = torch.zeros(items, dim, dtype=torch.bfloat16, device="cuda")
    table[-64:] = torch.randn(64, dim, device="cuda").to(torch.bfloat16)
    index = torch.arange(items - 64, items, device="cuda").reshape(8, 8)
    clicked = torch.ones(8, 4, dtype=torch.bool, device="cuda")
    big = table.requires_grad_()
    loss = cf.reconstruction_loss(
        index[:, :4], index[:, 4:], clicked, embeddings=big, impl="triton"
    )
    loss.backward()
    small = table.detach()[-64:].clone().requires_grad_()
    local = index - (items - 64)
    expected = cf.reconstruction_loss(
        local[:, :4], local[:, 4:], clicked, embeddings=small, impl="triton"
    )
    expected.backward()
    assert torch.equal(loss, expected)
    assert big.grad is not None
    assert small.grad is not None
    assert torch.equal(big.grad[-64:], small.grad)
