"""Batches without anchors, rows or pages, in every option: a loss of 0 that is attached to every
input, never NaN or an error."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, product
from typing import Any

import pytest
import torch
from factories import DEVICES, make, skip_unless_available
from torch import Tensor

import courier_fast as cf

DIM = 8
# Items and history rows of the pages; "masked": none of them is real; "unclicked": nobody is an
# anchor.
SIZES: dict[str, tuple[list[int], list[int]]] = {
    "no pages": ([], []),
    "an empty page": ([0], [0]),
    "no items": ([0, 0], [2, 1]),
    "no history": ([3, 0, 1], [0, 0, 0]),
    "elsewhere": ([2, 0], [0, 3]),
    "masked": ([2, 1], [1, 2]),
    "unclicked": ([2, 1], [1, 2]),
}
LAYOUTS = ("padded", "packed", "nested", "table")
ASKED = [("candidate", "reconstruct")] + [
    (attention, direction)
    for attention in ("anchor", "mean")
    for direction in ("reconstruct", "identify", "both")
]


def side(counts: list[int], layout: str, masked: bool, name: str, *shape: int) -> dict[str, Tensor]:
    """A tensor of ones [*, *shape] in a layout, with what goes with it."""
    starts = torch.tensor([0, *counts]).cumsum(0)
    rows = torch.ones(int(starts[-1]), *shape)
    if layout == "padded":
        longest = max(counts, default=2)
        there = torch.arange(longest) < torch.tensor(counts, dtype=torch.int64)[:, None]
        there = there.view(len(counts), longest)
        return {name: torch.ones(*there.shape, *shape), f"{name}_mask": there & (not masked)}
    if layout == "nested":
        lengths = torch.zeros(len(counts), dtype=torch.int64) if masked else None
        return {name: torch.nested.nested_tensor_from_jagged(rows, starts, lengths)}
    return {name: rows, f"{name}_offsets": starts * (not masked)}


def like(x: Tensor, value: float, dtype: torch.dtype) -> Tensor:
    """One value for each item, in the layout of `x` without its features."""
    if x.is_nested:
        rows = torch.full(x.values().shape[:1], value).to(dtype)
        return torch.nested.nested_tensor_from_jagged(rows, x.offsets(), x.lengths())
    return torch.full(x.shape[: x.dim() - 1], value).to(dtype)


def batch(size: str, layout: str) -> dict[str, Any]:
    counts, masked = SIZES[size], size == "masked"
    shape = "packed" if layout == "table" else layout
    given = side(counts[0], shape, masked, "pv", DIM) | side(
        counts[1], shape, masked, "history", DIM
    )
    clicked = like(given["pv"], size != "unclicked", torch.bool)
    given |= {"clicked": clicked}
    if layout == "table":
        given |= {name: like(given[name], 1, torch.int64) for name in ("pv", "history")}
        given["embeddings"] = torch.randn(3, DIM)
    return given


def extras(given: dict[str, Any], which: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    item = given["clicked"]
    wide = item if item.is_nested else item[..., None]
    each = like(wide, 0.5, torch.float32) if not item.is_nested else None
    if which in ("all", "memory") and each is not None:
        found = {"item_ids": each.long(), "log_q": each}
    if which in ("all", "weightless") and each is not None:
        found["weights"] = each * (which == "all")
    if which == "projected" and "embeddings" not in given:
        found = {"query": given["pv"], "key": given["history"], "value": given["history"]}
    if which == "memory" and each is not None:
        found |= {
            "memory": torch.randn(2, DIM),
            "memory_ids": torch.tensor([7, 8]),
            "memory_log_q": torch.zeros(2),
        }
    return found


def leaves(given: dict[str, Any]) -> Iterator[tuple[str, Tensor]]:
    for name in ("pv", "history", "embeddings", "query", "key", "value"):
        x = given.get(name)
        if x is not None and x.is_floating_point():
            yield name, x


def problem(impl: str, given: dict[str, Any], options: dict[str, Any]) -> str | None:
    """What is wrong with the loss of a batch without anchors; None if nothing is."""
    given = {k: x.to(DEVICES.get(impl, "cpu")) for k, x in given.items()}
    tau = torch.tensor(0.1, requires_grad=True)
    inputs = {name: x.detach().clone().requires_grad_() for name, x in leaves(given)}
    try:
        found = cf.reconstruction_loss(
            **(given | inputs), **options, impl=impl, temperature=tau.to(given["clicked"].device)
        )
        loss, stats = found if options["return_stats"] else (found, None)
        rows = loss.values() if loss.is_nested else loss
        rows.sum().backward()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    if rows.any() or (options["reduction"] == "none") != (rows.dim() > 0):
        return f"loss {rows}"
    if stats is not None and (int(stats.num_anchors) or stats.recall_at(1) == 1):
        return "anchors"
    for name, x in (*inputs.items(), ("temperature", tau)):
        grad = x.grad
        if grad is None:
            return f"no gradient of {name}"
        if bool((grad.values() if grad.is_nested else grad).any()):
            return f"gradient of {name}: {grad}"
    return None


def cases() -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    """Every size, layout, attention and direction, with or without attention_temperature; the other
    options in turn."""
    turns = zip(
        cycle(("mean", "sum", "none")),
        cycle(("batch", "page", "other_pages", "batch", "batch")),
        cycle((1, 2)),
        cycle(("none", "all", "weightless", "projected", "memory", "none", "all")),
        cycle((True, False, False)),
        strict=False,
    )
    for size, layout, (attention, direction), cosine in product(SIZES, LAYOUTS, ASKED, (1.5, None)):
        reduction, negatives, heads, extra, stats = next(turns)
        options = {
            "attention": attention,
            "direction": direction,
            "reduction": reduction,
            "num_heads": heads,
            "negatives": negatives,
            "return_stats": stats,
            "attention_temperature": None if attention == "mean" else cosine,
        }
        given = batch(size, layout)
        if extra == "memory" and (direction != "reconstruct" or negatives == "page"):
            extra = "all"
        given |= extras(given, extra)
        yield given, options, f"{size}, {layout}, {options}, {extra}"


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_every_option(impl: str) -> None:
    torch.manual_seed(0)
    skip_unless_available(impl, make(0))
    wrong, count = [], 0
    for given, options, what in cases():
        count += 1
        found = problem(impl, given, options)
        if found is not None:
            wrong.append(f"{what}: {found}")
    assert count == 2 * len(SIZES) * len(LAYOUTS) * len(ASKED)
    assert not wrong, f"{len(wrong)} of {count}:\n" + "\n".join(wrong[:10])


@pytest.mark.numpy_products
def test_some_of_them_on_triton() -> None:
    skip_unless_available("triton", make(0, impl="triton"))
    wrong = []
    for number, (given, options, what) in enumerate(cases()):
        if number % 31 == 5:
            found = problem("triton", given, options)
            if found is not None:
                wrong.append(f"{what}: {found}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_reconstructions_and_click_sequences(impl: str) -> None:
    skip_unless_available(impl, make(0))
    for size, layout, heads, cosine in product(SIZES, LAYOUTS, (1, 2), (1.5, None)):
        given = batch(size, layout)
        del given["clicked"]
        inputs = {name: x.detach().clone().requires_grad_() for name, x in leaves(given)}
        masked = given | inputs
        r, weights = cf.reconstruct(
            **masked, num_heads=heads, attention_temperature=cosine, return_weights=True, impl=impl
        )
        rows = r.values() if r.is_nested else r
        alone = size not in ("masked", "unclicked", "elsewhere")
        assert rows.shape[-1] == DIM
        assert not (alone and rows.any()), (size, layout)
        assert not weights.isnan().any()
        sequence = {k: x for k, x in masked.items() if "pv" not in k}
        total = rows.sum()
        for reduction in ("mean", "none"):
            loss = cf.click_sequence_loss(**sequence, reduction=reduction, impl=impl)
            flat = loss.values() if loss.is_nested else loss
            assert flat.isfinite().all()
            assert not (alone and size != "no items" and flat.any())
            total = total + flat.sum()
        total.backward()
        for name, x in inputs.items():
            assert x.grad is not None, (size, layout, name)
            assert (x.grad.values() if x.grad.is_nested else x.grad).isfinite().all()


@pytest.mark.long("kernels case by case", short=("no history",))
@pytest.mark.parametrize("size", ["no pages", "no history"])
def test_compiled_and_under_torch_func(size: str) -> None:
    torch._dynamo.reset()
    given = batch(size, "packed")
    pv = given.pop("pv")

    def loss(x: Tensor) -> Tensor:
        return cf.reconstruction_loss(x, **given, attention="anchor", attention_temperature=1.0)

    assert not torch.func.grad(loss)(pv).any()
    leaf = pv.clone().requires_grad_()
    found = torch.compile(loss, backend="aot_eager")(leaf)
    found.backward()
    assert float(found.detach()) == 0
    assert leaf.grad is not None
    assert not leaf.grad.any()


# ---- what is not needed is not multiplied --------------------------------------------------------


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("huge", [torch.inf, 1e30])
def test_the_mean_asks_nobody(impl: str, huge: float) -> None:
    """0 times an infinite product is not 0: queries and keys have no influence on a mean."""
    skip_unless_available(impl, make(0, impl="triton" if impl == "triton" else "cpu"))
    g = torch.Generator().manual_seed(0)
    pv, history = torch.randn(2, 3, DIM, generator=g), torch.randn(2, 4, DIM, generator=g)
    clicked = torch.ones(2, 3, dtype=torch.bool)
    device = DEVICES.get(impl, "cpu")
    for direction in ("reconstruct", "both"):
        how = {"attention": "mean", "direction": direction, "impl": impl}
        found = []
        for asks in (False, True):
            x, y = (t.to(device).requires_grad_() for t in (pv.clone(), history.clone()))
            q, k = (torch.full_like(t, huge).requires_grad_() for t in (x, y))
            asked = {"query": q, "key": k, "value": y} if asks else {}
            loss = cf.reconstruction_loss(x, y, clicked.to(device), **asked, **how)
            loss.backward()
            found.append((loss.detach(), x.grad, y.grad))
            if asks:
                assert q.grad is not None
                assert k.grad is not None
                assert not q.grad.any()
                assert not k.grad.any()
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("impl", ["reference", "cpu", "triton"])
@pytest.mark.parametrize("huge", [torch.inf, torch.nan])
def test_the_mean_of_values_reads_no_history(impl: str, huge: float) -> None:
    """Its rows are the keys where none are given: their products made the loss NaN on one path."""
    skip_unless_available(impl, make(0, impl="triton" if impl == "triton" else "cpu"))
    g, device = torch.Generator().manual_seed(0), DEVICES.get(impl, "cpu")
    pv, history, memory = (
        torch.randn(*n, DIM, generator=g).to(device) for n in ((2, 3), (2, 4), (3,))
    )
    clicked = torch.ones(2, 3, dtype=torch.bool, device=device)
    unread = torch.full_like(history, huge)
    mean: dict[str, Any] = {"attention": "mean", "impl": impl}
    for options in (mean, mean | {"memory": memory}, {"attention_scale": 0.0, "impl": impl}):
        found = []
        for rows in (history, unread):
            x, y, v = (t.clone().requires_grad_() for t in (pv, rows, history))
            loss = cf.reconstruction_loss(x, y, clicked, value=v, **options)
            found.append((loss.detach(), *torch.autograd.grad(loss, (x, y, v))))
        assert not found[1][2].any()
        for a, b in zip(*found, strict=True):
            assert torch.equal(a, b)
    given = {"value": history, "attention_scale": 0.0, "impl": impl}
    assert torch.equal(cf.reconstruct(pv, unread, **given), cf.reconstruct(pv, history, **given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_mean_of_long_rows(dtype: torch.dtype) -> None:
    """Products of rows of length 300 and more do not fit into float16."""
    g = torch.Generator().manual_seed(0)
    pv, history = (torch.randn(2, n, 64, generator=g).to(dtype) for n in (3, 4))
    clicked = torch.ones(2, 3, dtype=torch.bool)
    options: dict[str, Any] = {"attention": "mean"}
    short = cf.reconstruction_loss(pv, history, clicked, **options)
    long = cf.reconstruction_loss(pv * 128, history * 64, clicked, **options)
    torch.testing.assert_close(long, short, rtol=1e-3, atol=1e-3)
