"""COURIER as its authors define it: against plain PyTorch written from the equations."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from factories import Budget, mapped, offsets_of, yardstick_of
from spawn import spawn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, normalize

import courier_fast as cf
from courier_fast import surroundings
from courier_fast.loss import click_head, courier
from courier_fast.loss.click_head import ClickHead, ClickRows
from courier_fast.testing.budget import Yardstick

DIM, HEADS, HIDDEN = 8, 4, 16
TAU, SEQUENCE_TAU = 0.3, 0.5
PARTS = ("reconstruction", "prediction", "sequence")
TOLERANCE = 1e-10  # of float64, against another order of the same sums


# ---- batches -------------------------------------------------------------------------------------


@dataclass
class Pages:
    """Packed."""

    pv: Tensor  # [N, D]
    history: Tensor  # [K, D]
    clicked: Tensor  # [N]
    item_ids: Tensor  # [N]
    history_ids: Tensor  # [K]
    lengths: Tensor  # [B]
    history_lengths: Tensor  # [B]

    @property
    def leaves(self) -> dict[str, Tensor]:
        return {"pv": self.pv, "history": self.history}


RAGGED = ((3, 2, 4, 0, 5, 1, 2), (2, 0, 3, 1, 4, 1, 5))
# What a user may have, by page: PV items, and clicks in the history.
EDGES: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "no page": ((), ()),
    "no PV item": ((0, 0), (2, 3)),
    "no history": ((3, 2), (0, 0)),
    "nothing": ((0, 0, 0), (0, 0, 0)),
    "one click each": ((3, 2), (1, 1)),
    "one row": ((1, 2, 0), (2, 0, 3)),
    "one history": ((3,), (4,)),
}


def pages(
    lengths: tuple[tuple[int, ...], tuple[int, ...]] = RAGGED,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    clicked: float = 0.6,
    items: int = 9,
) -> Pages:
    """Ids are those of `items` rows, so that a row says which it is."""
    g = torch.Generator().manual_seed(seed)
    pv_lengths, history_lengths = (torch.tensor(x, dtype=torch.int64) for x in lengths)
    n, k = int(pv_lengths.sum()), int(history_lengths.sum())
    table = torch.randn(items, DIM, generator=g, dtype=torch.float64).to(dtype)
    ids = [torch.randint(0, items, (rows,), generator=g) for rows in (n, k)]
    rows = [table[x].clone().requires_grad_() for x in ids]
    return Pages(*rows, torch.rand(n, generator=g) < clicked, *ids, pv_lengths, history_lengths)


def padded(x: Tensor, lengths: Tensor, more: int = 1) -> Tensor:
    """[B, longest + more, ...]; padding holds NaN."""
    longest = (int(lengths.max()) if len(lengths) else 0) + more
    mask = mask_of(lengths, more)
    worst = torch.nan if x.is_floating_point() else 0
    found = x.new_full((len(lengths), longest, *x.shape[1:]), worst)
    return found.index_put((mask,), x)


def mask_of(lengths: Tensor, more: int = 1) -> Tensor:
    longest = (int(lengths.max()) if len(lengths) else 0) + more
    return torch.arange(longest) < lengths[:, None]


def given(p: Pages, layout: str = "packed", ids: bool = True) -> dict[str, Any]:
    """Arguments of the loss."""
    found: dict[str, Any] = {"pv": p.pv, "history": p.history, "clicked": p.clicked}
    if ids:
        found |= {"item_ids": p.item_ids, "history_ids": p.history_ids}
    of_history = ("history", "history_ids")
    sides = {n: p.history_lengths if n in of_history else p.lengths for n in found}
    offsets = {"pv": offsets_of(p.lengths), "history": offsets_of(p.history_lengths)}
    if layout == "padded":
        found = {n: padded(x, sides[n]) for n, x in found.items()}
        masks = {"pv_mask": mask_of(p.lengths), "history_mask": mask_of(p.history_lengths)}
        return found | masks
    if layout == "nested":
        make = torch.nested.nested_tensor_from_jagged
        return {
            n: make(x, offsets["history" if n in of_history else "pv"]) for n, x in found.items()
        }
    if layout == "past":  # rows past the last offset
        found = {n: torch.cat([x, worst_of(x)]) for n, x in found.items()}
    return found | {f"{n}_offsets": x for n, x in offsets.items()}


def worst_of(x: Tensor) -> Tensor:
    return x.new_full((2, *x.shape[1:]), torch.nan if x.is_floating_point() else 0)


def make_loss(dtype: torch.dtype = torch.float64, seed: int = 1, **options: Any) -> cf.CourierLoss:
    """With biases and batch norm away from where they start."""
    torch.manual_seed(seed)
    options = {"temperature": TAU, "sequence_temperature": SEQUENCE_TAU} | options
    loss = cf.CourierLoss(DIM, HEADS, hidden=HIDDEN, **options).to(dtype)
    with torch.no_grad():
        for x in loss.parameters():
            x += 0.2 * torch.randn_like(x)
    return loss


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


def gradients(loss: Tensor, module: nn.Module, p: Pages) -> dict[str, Tensor]:
    leaves = p.leaves | dict(module.named_parameters())
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        n: torch.zeros_like(x) if g is None else g
        for (n, x), g in zip(leaves.items(), found, strict=True)
    }


def assert_close(
    found: dict[str, Tensor], truth: dict[str, Tensor], eps: float = TOLERANCE
) -> None:
    assert found.keys() == truth.keys()
    for name, x in truth.items():
        assert found[name].shape == x.shape, name
        off = (found[name] - x).abs().max() if x.numel() else 0
        assert off <= eps * (1 + x.abs().max() if x.numel() else 1), f"{name}: off by {off}"


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


@dataclass
class Weighted:
    """What takes a gradient, and the rest, in one: for the yardstick."""

    pv: Tensor
    history: Tensor
    in_proj_weight: Tensor
    in_proj_bias: Tensor
    out_proj_weight: Tensor
    out_proj_bias: Tensor
    first_weight: Tensor
    first_bias: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    last_weight: Tensor
    last_bias: Tensor
    running_mean: Tensor
    running_var: Tensor


_NAMES = ("in_proj_weight", "in_proj_bias", "out_proj.weight", "out_proj.bias")
PARAMETERS = [f"attention.{x}" for x in _NAMES] + [
    f"click_head.{i}.{x}" for i in (0, 2, 3) for x in ("weight", "bias")
]
INPUTS = tuple(f.name for f in fields(Weighted))[:-2]
BUFFERS = ("running_mean", "running_var")


def weighted(p: Pages, loss: nn.Module) -> Weighted:
    state = dict(loss.named_parameters())
    assert list(state) == PARAMETERS
    leaves = (x.detach().clone().requires_grad_() for x in (p.pv, p.history, *state.values()))
    return Weighted(*leaves, *(loss.click_head[2].get_buffer(n).clone() for n in BUFFERS))


def results_of(impl: str, p: Pages, how: dict[str, Any], w: Weighted) -> dict[str, Tensor]:
    """Loss, parts, gradients and running statistics."""
    leaves = {name: getattr(w, name) for name in INPUTS}
    loss = cf.CourierLoss(DIM, HEADS, TAU, SEQUENCE_TAU, hidden=HIDDEN, impl=impl)
    rows = replace(p, pv=w.pv, history=w.history)
    names = dict(zip(PARAMETERS, list(leaves.values())[2:], strict=True))
    running = {x: getattr(w, x).clone() for x in BUFFERS}
    buffers = {f"click_head.2.{x}": values for x, values in running.items()}
    arguments = given(rows, "packed") | how | {"return_parts": True}
    found, parts = torch.func.functional_call(loss, names | buffers, (), arguments)
    grads = torch.autograd.grad(found, list(leaves.values()))
    return (
        {"output": found.detach(), "logits": parts.logits}
        | {x: getattr(parts, x) for x in PARTS}
        | dict(zip(leaves, grads, strict=True))
        | running
    )


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


# ---- the click head ------------------------------------------------------------------------------


def head_rows(n: int, live: bool, seed: int = 0) -> ClickRows:
    g = torch.Generator().manual_seed(seed)
    r, e = (torch.randn(n, DIM, generator=g).double().requires_grad_() for _ in range(2))
    y = torch.rand(n, generator=g) < 0.4
    return ClickRows(r, e, y, torch.rand(n, generator=g) < 0.7 if live else None)


def head_results(head: ClickHead, rows: ClickRows, exact: bool) -> dict[str, Tensor]:
    head = copy.deepcopy(head)
    loss, logits = head.loss(rows, exact)
    leaves = {"r": rows.r, "e": rows.e} | dict(head.named_parameters())
    found = torch.autograd.grad(3 * loss, list(leaves.values()))
    grads = dict(zip(leaves, found, strict=True))
    return {"loss": loss.detach(), "logits": logits} | grads | dict(head.named_buffers())


@pytest.mark.parametrize("live", [False, True], ids=["all rows", "some rows"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
@pytest.mark.parametrize("n", [37, 3, 1, 0])
def test_slices_of_rows_are_the_definition(
    n: int, training: bool, live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where batch norm sees one row, or none."""
    monkeypatch.setitem(click_head._SLICE, "cpu", 8 * HIDDEN)
    monkeypatch.setattr(click_head, "_KEPT", 17 * HIDDEN)  # two slices of five
    head = make_loss().click_head.train(training)
    with torch.no_grad():
        head[2].running_mean.normal_()
        head[2].running_var.uniform_(0.5, 2)
        # Far from 0: a variance from the sums of h and h^2 would cancel.
        head[0].bias += 1000
    rows = head_rows(n, live)
    truth = head_results(head, rows, exact=True)
    found = head_results(head, rows, exact=False)
    assert all(torch.isfinite(x).all() for x in truth.values())
    assert_close(found, truth)
    counted = n if rows.live is None else int(rows.live.sum())
    assert int(found["2.num_batches_tracked"]) == int(training and counted > 1)
    if training and not live and n > 1:
        own = copy.deepcopy(head)
        z = own(torch.cat([rows.r, rows.e], 1))[:, 0]
        assert (z - found["logits"]).abs().max() < 1e-8  # cancels by 1000
        assert_close({n: found[n] for n, _ in own.named_buffers()}, dict(own.named_buffers()))


def test_sums_over_many_rows_keep_their_digits() -> None:
    """With a mean whose rows are added up one after the other in float32, gamma's gradient, where
    nearly all cancels, is at 54 times its budget."""
    head, rows = make_loss(torch.float32).click_head, head_rows(5000, True)
    short = replace(rows, r=rows.r.float(), e=rows.e.float())
    truth = head_results(copy.deepcopy(head).double(), rows, exact=True)
    eager, found = (head_results(head, short, exact) for exact in (True, False))
    budget = Budget(torch.float32)
    budget.add(Yardstick(truth, eager, []), found)
    budget.check()


def test_the_hidden_layer_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what a small batch has."""
    n, some = 400, 50
    monkeypatch.setitem(click_head._SLICE, "cpu", 10 * HIDDEN)
    monkeypatch.setattr(click_head, "_KEPT", some * HIDDEN)
    kept: list[Tensor] = []
    head = make_loss(torch.float32).click_head
    rows = head_rows(n, False)
    rows = replace(rows, r=rows.r.float(), e=rows.e.float())
    for exact in (True, False):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
            head.loss(rows, exact)
        of_hidden = [len(x) for x in kept if x.dim() == 2 and x.shape == (len(x), HIDDEN)]
        rows_kept = sum(x for x in of_hidden if x != HIDDEN)  # less the weights
        assert rows_kept >= 2 * n if exact else rows_kept == some


# ---- several processes ---------------------------------------------------------------------------

SHARDS = (RAGGED, ((), ()), ((2, 1, 3), (3, 1, 0)))


def joined(shards: list[Pages]) -> Pages:
    """Their union."""
    values = {f.name: [getattr(s, f.name) for s in shards] for f in fields(Pages)}
    whole = Pages(**{n: torch.cat([x.detach() for x in xs]) for n, xs in values.items()})
    return replace(whole, **{n: x.requires_grad_() for n, x in whole.leaves.items()})


def shards_of(dtype: torch.dtype) -> list[Pages]:
    return [pages(x, seed=i, dtype=dtype) for i, x in enumerate(SHARDS)]


def step_of(loss: cf.CourierLoss, p: Pages, **more: Any) -> dict[str, Tensor]:
    found, parts = loss(**given(p, "padded"), return_parts=True, **more)
    values = {x: getattr(parts, x) for x in PARTS} | {"output": found.detach()}
    grads = gradients(found, loss, p)
    logits = parts.logits[mask_of(p.lengths)]
    buffers = {n: x.clone() for n, x in loss.named_buffers()}
    return values | grads | buffers | {"logits": logits}


def on_each(impl: str, dtype: torch.dtype, exchange: str) -> dict[str, Tensor]:
    p = shards_of(dtype)[dist.get_rank()]
    kind = torch.float32 if impl == "cpu" else dtype
    loss = make_loss(kind, impl=impl, group="world", exchange=exchange)
    return step_of(loss, p)


def in_one(every: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """As DistributedDataParallel takes the mean of gradients."""
    whole = {}
    for name in every[0]:
        parts = [x[name] for x in every]
        if name in ("pv", "history"):
            whole[name] = torch.cat(parts) / len(parts)
        elif name == "logits":
            whole[name] = torch.cat(parts)
        elif "running" in name or "num_batches" in name:
            assert all(torch.equal(x, parts[0]) for x in parts), name
            whole[name] = parts[0]
        else:
            whole[name] = torch.stack(parts).mean(0)
    return whole


def on_processes(exchange: str) -> list[Any]:
    """Everything that processes are needed for, in one start of them."""
    exact = on_each("reference", torch.float64, exchange)
    fused = on_each("cpu", torch.float32, exchange)
    rank = dist.get_rank()
    head = make_loss().click_head
    # The slices in float64, as the fused losses take float32 alone.
    rows = replace(head_rows((11, 0, 5)[rank], False, rank), processes=_participants())
    return [exact, fused, head_results(head, rows, False), errors(), with_table()]


def with_table() -> dict[str, Tensor]:
    """The loss and the gradient of this process's table."""
    rows, table = as_table(shards_of(torch.float64)[dist.get_rank()])
    about = {"embeddings": table, "table_ids": torch.arange(10), "group": "world"}
    found = make_loss(impl="reference")(**given(rows, ids=False), **about)
    return {"output": found.detach(), "table": torch.autograd.grad(found, table)[0]}


def _participants() -> Any:
    return cf.loss.union.exchange.Participants(dist.group.WORLD)


def errors() -> list[str]:
    """Of mistakes of process 1."""
    found = []
    first = dist.get_rank() == 1
    p = pages(seed=dist.get_rank())
    good = given(p)
    mistakes: list[tuple[dict[str, Any], dict[str, Any]]] = [
        ({}, {"clicked": p.clicked[1:]}),
        ({}, {"history_ids": p.history_ids.float()}),
        ({"weights": (1, 2, 1)}, {}),
        ({"weights": (0, 1, 0)}, {}),
        ({"hidden": 8}, {}),
        ({"sequence_temperature": 0.4}, {}),
        ({}, {"item_ids": None}),
    ]
    for options, arguments in mistakes:
        options = {"temperature": TAU, "hidden": HIDDEN} | (options if first else {})
        loss = cf.CourierLoss(DIM, HEADS, group="world", **options).double()
        try:
            loss(**(good | (arguments if first else {})))
            found.append("no error")
        except (ValueError, TypeError) as error:
            found.append(str(error))
    return found


EXPECTED_ERRORS = (
    "rank 1: clicked: expected shape",
    "rank 1: history_ids: expected an integer tensor",
    "weights: expected the same on every process",
    "weights: expected the same on every process",
    "hidden: expected the same on every process",
    "temperature: expected the same on every process",
    "item_ids given: expected the same on every process",
)


@pytest.mark.long("several processes", short=("gather",))
@pytest.mark.parametrize("exchange", ["gather", "ring"])
def test_uneven_shards_are_one_batch(exchange: str, tmp_path: Path) -> None:
    """One of three processes has no page."""
    every = spawn(on_processes, 3, tmp_path, exchange)
    truth = step_of(make_loss(impl="reference"), joined(shards_of(torch.float64)))
    assert_close(in_one([x[0] for x in every]), truth)
    # The items of a table: its gradient is that of its rows.
    shards = shards_of(torch.float64)
    split = {n: truth[n].split([len(getattr(s, n)) for s in shards]) for n in ("pv", "history")}
    for rank, shard in enumerate(shards):
        mine = of_table(shard, {n: x[rank] for n, x in split.items()})
        assert_close({"table": every[rank][4]["table"] / 3}, {"table": mine})
    output = torch.stack([x[4]["output"] for x in every]).mean()
    assert_close({"output": output}, {"output": truth["output"]})
    # Batch norm of the union is no sum of products in another order alone: float32 by its budget.
    whole = joined(shards_of(torch.float32))
    loss = make_loss(torch.float32)
    rename = dict(zip(PARAMETERS, INPUTS[2:], strict=True))
    rename |= {f"click_head.2.{x}": x for x in BUFFERS}
    fused = {rename.get(n, n): x for n, x in in_one([x[1] for x in every]).items()}
    run = partial(results_of, "reference", whole, {})
    budget = Budget(torch.float32)
    yardstick = yardstick_of(run, weighted(whole, loss), INPUTS)
    budget.add(yardstick, fused)
    budget.check()
    # The click head's slices.
    rows = [head_rows(n, False, rank) for rank, n in enumerate((11, 0, 5))]
    leaves = [
        torch.cat([x.detach() for x in xs]).requires_grad_()
        for xs in ([x.r for x in rows], [x.e for x in rows])
    ]
    clicked = torch.cat([x.clicked for x in rows])
    one = head_results(make_loss().click_head, ClickRows(*leaves, clicked, None), True)
    found = [x[2] for x in every]
    three = {
        n: torch.stack([x[n] for x in found]).mean(0)
        for n in one
        if n not in ("r", "e") and n != "logits" and "num" not in n
    }
    three |= {n: torch.cat([x[n] for x in found]) / 3 for n in ("r", "e")}
    assert_close(three, {n: one[n] for n in three})
    for rank, messages in enumerate(x[3] for x in every):
        for message, expected in zip(messages, EXPECTED_ERRORS, strict=True):
            assert message.startswith(expected), (rank, message)


def test_a_group_of_one_has_the_bits_of_none(tmp_path: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    try:
        for impl, kind in (("reference", torch.float64), ("cpu", torch.float32)):
            loss, p = make_loss(kind, impl=impl), pages(dtype=kind)
            alone = step_of(copy.deepcopy(loss), p)
            grouped = step_of(loss, p, group=dist.group.WORLD)
            assert all(torch.equal(x, alone[n]) for n, x in grouped.items())
    finally:
        dist.destroy_process_group()


# ---- layouts -------------------------------------------------------------------------------------


def as_table(p: Pages, items: int = 10) -> tuple[Pages, Tensor]:
    """Indices in the place of rows, and the items' table, NaN where nobody asks."""
    table = torch.full((items, DIM), torch.nan, dtype=p.pv.dtype)
    for ids, rows in ((p.item_ids, p.pv), (p.history_ids, p.history)):
        table[ids] = rows.detach()
    return replace(p, pv=p.item_ids, history=p.history_ids), table.requires_grad_()


def of_table(p: Pages, grads: dict[str, Tensor], items: int = 10) -> Tensor:
    """Gradient of such a table, from those of the rows."""
    whole = torch.zeros(items, DIM, dtype=grads["pv"].dtype)
    for ids, name in ((p.item_ids, "pv"), (p.history_ids, "history")):
        whole.index_add_(0, ids, grads[name])
    return whole


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
