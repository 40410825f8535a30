"""COURIER as its authors define it: against plain PyTorch written from the equations."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from courier_factory import (
    DIM,
    EDGES,
    HEADS,
    HIDDEN,
    INPUTS,
    PARAMETERS,
    PARTS,
    RAGGED,
    SEQUENCE_TAU,
    TAU,
    TOLERANCE,
    Pages,
    as_table,
    assert_close,
    given,
    gradients,
    make_loss,
    mask_of,
    of_table,
    padded,
    pages,
    results_of,
    step_of,
    weighted,
)
from factories import Budget, mapped, yardstick_of
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

import courier_fast as cf
from courier_fast import surroundings
from courier_fast.loss import courier

# ---- the definition ------------------------------------------------------------------------------


class Definition(nn.Module):
    """From the equations: PyTorch's attention, over the batch its cross entropy, its batch norm."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
        self.click_head = nn.Sequential(
            nn.Linear(2 * DIM, HIDDEN), nn.ReLU(), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, 1)
        )

    @classmethod
    def of(cls, loss: cf.CourierLoss) -> Definition:
        made = cls().to(loss.attention.in_proj_weight.dtype).train(loss.training)
        made.load_state_dict(loss.state_dict())
        return made

    def forward(self, p: Pages) -> dict[str, Tensor]:
        pv, history = (
            x.nan_to_num() for x in (padded(p.pv, p.lengths), padded(p.history, p.history_lengths))
        )
        shown, seen = mask_of(p.lengths), mask_of(p.history_lengths)
        clicked = padded(p.clicked, p.lengths).bool() & shown
        ids, seen_ids = padded(p.item_ids, p.lengths), padded(p.history_ids, p.history_lengths)
        r = self.attend(pv, history, seen)
        some = seen.any(1)[:, None]
        rows = shown & some
        z = self.click_head(torch.cat([r[rows], pv[rows]], 1))[:, 0]
        # The newest click of each history is the query of those before.
        last = seen.sum(1) - 1
        has_newest, place = last >= 0, last.clamp(min=0)
        older = seen & (torch.arange(seen.shape[1]) != last[:, None])
        page = torch.arange(len(seen))
        newest, newest_ids = history[page, place][:, None], seen_ids[page, place][:, None]
        r_newest = self.attend(newest, history, older)
        target = older.any(1)[:, None]
        each = binary_cross_entropy_with_logits(z, clicked[rows].to(z.dtype), reduction="sum")
        return {
            "reconstruction": contrast(r, pv, shown, clicked & some, ids, TAU),
            "prediction": each / max(len(z), 1),
            "sequence": contrast(
                r_newest, newest, has_newest[:, None], target, newest_ids, SEQUENCE_TAU
            ),
        }

    def attend(self, x: Tensor, history: Tensor, real: Tensor) -> Tensor:
        """[B, P, D]; zeros for pages without a history."""
        some = real.any(1)
        r = torch.zeros_like(x)
        if not some.any():
            return r
        key = history[some]
        found = self.attention(x[some], key, key, key_padding_mask=~real[some], need_weights=False)
        return r.index_put((some,), found[0])


def contrast(
    r: Tensor, e: Tensor, real: Tensor, anchors: Tensor, ids: Tensor, tau: float
) -> Tensor:
    """Of [B, P, D]: cross entropy over all real items, but for the same item again."""
    logits = normalize(r[anchors], dim=1) @ normalize(e[real], dim=1).T / tau
    target = (real.flatten().cumsum(0) - 1).view(real.shape)[anchors]
    again = ids[anchors][:, None] == ids[real]
    again[torch.arange(len(target)), target] = False
    loss = cross_entropy(logits.masked_fill(again, -torch.inf), target, reduction="sum")
    return loss / max(len(target), 1)


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("layout", ["packed", "padded", "past"])
def test_ragged_pages_by_plain_pytorch(layout: str, training: bool) -> None:
    p, loss = pages(), make_loss(impl="reference").train(training)
    definition = Definition.of(loss)
    truth = definition(p)
    found, parts = loss(**given(p, layout), return_parts=True)
    for name, x in truth.items():
        assert (getattr(parts, name) - x).abs() < TOLERANCE, name
    whole = sum(truth.values())
    assert (found - whole).abs() < TOLERANCE
    assert_close(gradients(found, loss, p), gradients(whole, definition, p))
    assert_close(dict(loss.named_buffers()), dict(definition.named_buffers()))


@pytest.mark.parametrize("name", PARTS)
def test_each_part_alone(name: str) -> None:
    p = pages()
    weights = [0.0] * 3
    weights[PARTS.index(name)] = 0.7
    loss = make_loss(impl="reference", weights=weights)
    definition = Definition()
    state = loss.state_dict()
    definition.double().load_state_dict(state, strict=name == "prediction")
    truth = 0.7 * definition(p)[name]
    found, parts = loss(**given(p), return_parts=True)
    assert (found - truth).abs() < TOLERANCE
    assert [float(getattr(parts, x)) for x in PARTS if x != name] == [0, 0]
    expected = gradients(truth, definition, p)
    mine = gradients(found, loss, p)
    assert_close(mine, {n: expected[n] for n in mine})
    assert (parts.logits is None) == (loss.click_head is None) == (name != "prediction")


def test_published_formulas_without_padding() -> None:
    """Full pages, no ids: the formulas to the letter."""
    b, shown, clicks = 6, 4, 5
    g = torch.Generator().manual_seed(5)
    pv, history = (torch.randn(b, n, DIM, generator=g).double() for n in (shown, clicks))
    clicked = torch.rand(b, shown, generator=g) < 0.5
    loss = make_loss(impl="reference")
    m = Definition.of(loss)
    r, _ = m.attention(pv, history, history)
    e, r_rows = pv.flatten(0, 1), r.flatten(0, 1)
    logits = normalize(r_rows, dim=1) @ normalize(e, dim=1).T / TAU
    y = clicked.flatten()
    rec = cross_entropy(logits[y], y.nonzero()[:, 0])
    z = m.click_head(torch.cat([r_rows, e], 1))[:, 0]
    pred = binary_cross_entropy_with_logits(z, y.double())
    newest, older = history[:, -1:], history[:, :-1]
    r_newest = m.attention(newest, older, older)[0][:, 0]
    logits = normalize(r_newest, dim=1) @ normalize(newest[:, 0], dim=1).T / SEQUENCE_TAU
    seq = cross_entropy(logits, torch.arange(b))
    found, parts = loss(pv, history, clicked, return_parts=True)
    for x, truth in zip((found, *parts[:3]), (rec + pred + seq, rec, pred, seq), strict=True):
        assert (x - truth).abs() < TOLERANCE
    assert (parts.logits - z.view(b, shown)).abs().max() < TOLERANCE


def test_the_first_temperature_is_that_of_both() -> None:
    p = pages()
    one = make_loss(impl="reference", sequence_temperature=None)
    two = make_loss(impl="reference", sequence_temperature=TAU)
    other = make_loss(impl="reference")
    assert one(**given(p)) == two(**given(p)) != other(**given(p))


# ---- backends ------------------------------------------------------------------------------------


@pytest.mark.long("kernels case by case", short=("cpu",))
@pytest.mark.parametrize(
    ("impl", "dtype"),
    # Triton's interpreter multiplies bfloat16 as integers (test_bfloat16.py).
    [
        ("cpu", torch.float32),
        ("cpu", torch.bfloat16),
        ("cpu without products", torch.bfloat16),
        ("triton", torch.float32),
        ("triton", torch.float16),
    ],
    ids=str,
)
def test_backends_are_within_the_budget(
    impl: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if impl == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr(surroundings, "BFLOAT16_PRODUCTS", impl == "cpu")
    impl = impl.split()[0]
    budget = Budget(dtype)
    for seed in range(3):
        p = pages(seed=seed, dtype=dtype)
        w = weighted(p, make_loss(torch.float32, seed))
        truth = yardstick_of(partial(results_of, "reference", p, {}), w, INPUTS, seed)
        budget.add(truth, results_of(impl, p, {}, w))
    budget.check()


# ---- layouts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["packed", "padded", "past", "nested"])
@pytest.mark.parametrize("kind", ["rows", "table", "table_ids"])
def test_layouts_agree(kind: str, layout: str) -> None:
    """Also a table whose row that nobody asks for holds NaN."""
    loss, p = make_loss(impl="reference"), pages()
    expected = copy.deepcopy(loss)
    truth = expected(**given(p))
    grads = gradients(truth, expected, p)
    if kind == "rows":
        found = loss(**given(p, layout))
        assert_close(gradients(found, loss, p), grads)
    else:
        rows, table = as_table(p)
        more: dict[str, Any] = {"embeddings": table}
        if kind == "table_ids":
            more["table_ids"] = torch.arange(10) * 7
        found = loss(**given(rows, layout, ids=False), **more)
        mine, *others = torch.autograd.grad(found, [table, *loss.parameters()])
        assert_close({"table": mine}, {"table": of_table(p, grads)})
        assert_close(dict(zip(PARAMETERS, others, strict=True)), {n: grads[n] for n in PARAMETERS})
    assert (found - truth).abs() < TOLERANCE


def test_logits_are_in_the_layout_of_clicked() -> None:
    p, loss = pages(), make_loss(impl="reference")
    _, parts = loss(**given(p), return_parts=True)
    some = torch.repeat_interleave(p.history_lengths > 0, p.lengths)
    assert parts.logits.shape == p.clicked.shape
    assert (parts.logits[~some] == 0).all()
    assert (parts.logits[some] != 0).all()
    assert not parts.logits.requires_grad
    _, in_padding = loss(**given(p, "padded"), return_parts=True)
    assert (in_padding.logits[~mask_of(p.lengths)] == 0).all()
    assert (in_padding.logits[mask_of(p.lengths)] - parts.logits).abs().max() < TOLERANCE
    _, nested = loss(**given(p, "nested"), return_parts=True)
    assert nested.logits.is_nested


def test_where_nobody_may_ask_for_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: the click head sees all rows, and which of them count."""
    p, loss = pages(), make_loss(impl="reference")
    truth = step_of(copy.deepcopy(loss), p)
    monkeypatch.setattr(courier, "has_values", lambda x: False)
    found = step_of(loss, p)
    assert_close(found, truth)
    assert (found["logits"] == 0).any()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_click_logits_are_those_of_eval(impl: str) -> None:
    p, loss = pages(dtype=torch.float32), make_loss(torch.float32, impl=impl)
    loss(**given(p))  # moves the running statistics
    rows = {n: x for n, x in given(p, ids=False).items() if n != "clicked"}
    state = copy.deepcopy(loss.state_dict())
    found = loss.click_logits(**rows)
    assert all(torch.equal(x, state[n]) for n, x in loss.state_dict().items())
    _, parts = loss.eval()(**given(p), return_parts=True)
    assert found.shape == p.clicked.shape
    assert not found.requires_grad
    torch.testing.assert_close(found, parts.logits)


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("clicked", [0.0, 1.0], ids=["none clicked", "all clicked"])
@pytest.mark.parametrize("edge", EDGES)
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_edges(impl: str, edge: str, clicked: float) -> None:
    kind = torch.float64 if impl == "reference" else torch.float32
    p = pages(EDGES[edge], dtype=kind, clicked=clicked)
    loss = make_loss(kind, impl=impl)
    with torch.no_grad():
        loss.click_head[2].running_mean += 0.3
    rows = torch.repeat_interleave(p.history_lengths > 0, p.lengths).sum()
    definition = Definition.of(loss).train(bool(rows > 1))
    truth = definition(p)
    for layout in ("packed", "padded"):
        module = copy.deepcopy(loss)
        found, parts = module(**given(p, layout), return_parts=True)
        leaves = p.leaves | dict(module.named_parameters())
        grads = torch.autograd.grad(found, list(leaves.values()))  # none is unused
        assert all(torch.isfinite(x).all() for x in grads)
        for name, x in truth.items():
            torch.testing.assert_close(getattr(parts, name), x)
        if not rows:
            assert parts.reconstruction == 0
            assert parts.prediction == 0
        if rows < 2:
            assert_close(dict(module.named_buffers()), dict(loss.named_buffers()), 0)


@pytest.mark.parametrize("weights", [(0, 0, 1), (1, 0, 0), (0, 1, 0)], ids=str)
def test_every_input_has_a_gradient(weights: tuple[int, ...]) -> None:
    for impl, kind in (("reference", torch.float64), ("cpu", torch.float32)):
        for lengths in (RAGGED, EDGES["nothing"], EDGES["no page"]):
            p = pages(lengths, dtype=kind)
            loss = make_loss(kind, impl=impl, weights=weights)
            leaves = [*p.leaves.values(), *loss.parameters()]
            found = torch.autograd.grad(loss(**given(p)), leaves)
            assert all(torch.isfinite(x).all() for x in found)


# ---- the module ----------------------------------------------------------------------------------


def test_weights_of_pytorchs_attention_load() -> None:
    p, loss = pages(), make_loss(impl="reference")
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    loss.attention.load_state_dict(theirs.state_dict())
    names = [f"attention.{n}" for n in theirs.state_dict()]
    assert list(loss.state_dict())[: len(names)] == names
    truth = sum(Definition.of(loss)(p).values())
    assert (loss(**given(p)) - truth).abs() < TOLERANCE


def test_it_starts_as_pytorchs_modules_do() -> None:
    torch.manual_seed(3)
    attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True)
    head = Definition().click_head
    torch.manual_seed(3)
    loss = cf.CourierLoss(DIM, HEADS, hidden=HIDDEN)
    for name, x in attention.state_dict().items():
        assert torch.equal(x, loss.attention.state_dict()[name]), name
    assert {n: x.shape for n, x in head.state_dict().items()} == {
        n: x.shape for n, x in loss.click_head.state_dict().items()
    }
    state = loss.state_dict()
    with torch.device("meta"):
        meta = cf.CourierLoss(DIM, HEADS, hidden=HIDDEN)
    meta.to_empty(device="cpu")
    for x in (*meta.parameters(), *meta.buffers()):
        nn.init.constant_(x, 77)
    torch.manual_seed(3)
    meta.reset_parameters()
    for name, x in meta.state_dict().items():
        assert torch.equal(x, state[name]), name


def test_copies_and_state_dicts() -> None:
    p, loss = pages(), make_loss(impl="reference")
    loss(**given(p))
    other = make_loss(impl="reference", seed=2)
    other.load_state_dict(loss.state_dict())
    found = [x(**given(p)) for x in (loss, copy.deepcopy(loss), other)]
    assert found[0] == found[1] == found[2]
    assert "weights=(1, 1, 1)" in repr(loss)
    assert "sequence_temperature=0.5" in repr(loss)


def test_autocast_casts_rows_and_weights() -> None:
    p, loss = pages(dtype=torch.float32), make_loss(torch.float32, impl="reference")
    with torch.autocast("cpu", torch.bfloat16):
        found = copy.deepcopy(loss)(**given(p))
    half = replace(p, pv=p.pv.bfloat16(), history=p.history.bfloat16())
    assert found == loss(**given(half))
    assert found.dtype == torch.float32
    assert loss.click_head[2].running_mean.dtype == torch.float32


@pytest.mark.parametrize("kind", ["fake", "meta"])
def test_without_values(kind: str) -> None:
    p, loss = pages(dtype=torch.float32), make_loss(torch.float32, impl="reference")
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    convert = mode.from_tensor if kind == "fake" else lambda x: x.to("meta")
    p = mapped(p, lambda _, x: x.detach())
    loss.to("meta" if kind == "meta" else "cpu")
    with mode if kind == "fake" else nullcontext():
        arguments = {n: convert(x) for n, x in given(p).items()}
        found, parts = loss(**arguments, return_parts=True)
        found.backward()
    assert (found.shape, found.dtype) == ((), torch.float32)
    assert parts.logits.shape == p.clicked.shape


def test_second_derivatives_of_the_reference() -> None:
    p, loss = pages(((2, 3), (3, 2))), make_loss(impl="reference").eval()
    arguments = given(p)

    def of(pv: Tensor, history: Tensor) -> Tensor:
        return loss(**(arguments | {"pv": pv, "history": history}))

    assert torch.autograd.gradgradcheck(of, (p.pv, p.history), fast_mode=True)


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_gradients_by_torch_func(impl: str) -> None:
    p, loss = pages(dtype=torch.float32), make_loss(torch.float32, impl=impl).eval()
    truth = torch.autograd.grad(loss(**given(p)), list(p.leaves.values()))
    arguments = given(p)

    def of(leaves: dict[str, Tensor]) -> Tensor:
        return loss(**(arguments | leaves))

    found = torch.func.grad(of)({n: x.detach() for n, x in p.leaves.items()})
    for x, y in zip(found.values(), truth, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.long("kernels case by case")
def test_compiled() -> None:
    p, loss = pages(dtype=torch.float32), make_loss(torch.float32)
    truth = loss(**given(p))
    compiled = torch.compile(make_loss(torch.float32), backend="aot_eager")
    leaves = list(p.leaves.values())
    found = compiled(**given(p))
    torch.testing.assert_close(found, truth)
    expected = torch.autograd.grad(truth, leaves)
    torch.testing.assert_close(torch.autograd.grad(found, leaves), expected)


def test_errors() -> None:
    rows: dict[str, Any] = given(pages(dtype=torch.float32))
    wide = torch.randn(17, DIM + 1)
    bad_options: list[tuple[str, type[Exception], dict[str, Any]]] = [
        (
            r"num_heads: expected a divisor of the embedding dimension 8, got 3",
            ValueError,
            {"num_heads": 3},
        ),
        (r"num_heads: expected an int, got float 4.0", TypeError, {"num_heads": 4.0}),
        (r"dim: expected at least 1, got 0", ValueError, {"dim": 0}),
        (r"hidden: expected at least 1, got 0", ValueError, {"hidden": 0}),
        (r"hidden: expected an int, got float", TypeError, {"hidden": 1.5}),
        (
            r"weights: expected three numbers, of reconstruction, .*, got 2",
            ValueError,
            {"weights": (1, 2)},
        ),
        (r"weights: expected three numbers, got int 1", TypeError, {"weights": 1}),
        (
            r"weights: expected numbers of at least 0 and one above, got \(1.0, -1.0, 1.0\)",
            ValueError,
            {"weights": (1, -1, 1)},
        ),
        (
            r"weights: expected numbers of at least 0 and one above",
            ValueError,
            {"weights": (0, 0, 0)},
        ),
        (r"weights: expected a float, got str 'a'", TypeError, {"weights": ("a", 1, 1)}),
        (
            r"weights: expected a finite value, got nan",
            ValueError,
            {"weights": (float("nan"), 1, 1)},
        ),
        (r"^temperature: expected a finite value above 0, got 0", ValueError, {"temperature": 0}),
        (
            r"sequence_temperature: expected a value above 0, got -1",
            ValueError,
            {"sequence_temperature": -1},
        ),
        (
            r"sequence_temperature: expected a float, got str",
            TypeError,
            {"sequence_temperature": "a"},
        ),
        (r"impl: expected one of", ValueError, {"impl": "fast"}),
        (r"exchange: expected one of", ValueError, {"exchange": "fast"}),
        (r"workspace: expected at least 1 byte", ValueError, {"workspace": 0}),
        (r"validate: expected True or False", TypeError, {"validate": "no"}),
    ]
    for message, kind, change in bad_options:
        with pytest.raises(kind, match=message):
            cf.CourierLoss(**({"dim": DIM} | change))
    loss = cf.CourierLoss(DIM, hidden=HIDDEN)
    bad: list[tuple[str, type[Exception], dict[str, Any]]] = [
        (
            r"pv: expected 8 features, the dim of the loss, got 9",
            ValueError,
            {"pv": wide, "history": wide[:16]},
        ),
        (
            r"embeddings: expected 8 features, .*, got 9",
            ValueError,
            {"pv": rows["item_ids"], "history": rows["history_ids"], "embeddings": wide},
        ),
        (r"history: expected torch.float32", TypeError, {"history": rows["history"].double()}),
        (
            r"history_ids: expected shape \[16\], got \[17\]",
            ValueError,
            {"history_ids": rows["item_ids"]},
        ),
        (r"item_ids: expected an integer tensor", TypeError, {"item_ids": rows["clicked"] * 0.5}),
        (r"clicked: expected a torch.Tensor, got None", TypeError, {"clicked": None}),
        (
            r"table_ids: expected None without embeddings",
            ValueError,
            {"table_ids": torch.arange(3)},
        ),
        (r"impl='xformers' cannot run this problem here", RuntimeError, {"impl": "xformers"}),
        (r"workspace: expected an int", TypeError, {"workspace": "big"}),
        (r"return_parts: expected True or False", TypeError, {"return_parts": "yes"}),
        (r"unexpected keyword argument 'log_q'", TypeError, {"log_q": rows["clicked"] * 0.5}),
    ]
    for message, kind, change in bad:
        with pytest.raises(kind, match=message):
            loss(**(rows | change))
    meta = {n: x.to("meta") for n, x in rows.items()}
    with pytest.raises(ValueError, match=r"pv: expected a tensor on cpu, as the parameters"):
        loss(**meta)
    without = cf.CourierLoss(DIM, weights=(1, 0, 1))
    with pytest.raises(ValueError, match=r"click_logits: expected a loss with a click head"):
        without.click_logits(rows["pv"], rows["history"])
