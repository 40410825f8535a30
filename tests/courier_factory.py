"""Batches, losses and gradients for the tests of `CourierLoss`."""

from __future__ import annotations

import copy
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from factories import offsets_of
from torch import Tensor, nn

import courier_fast as cf
from courier_fast.loss.click_head import ClickHead, ClickRows

DIM, HEADS, HIDDEN = 8, 4, 16
TAU, SEQUENCE_TAU = 0.3, 0.5
PARTS = ("reconstruction", "prediction", "sequence")
TOLERANCE = 1e-10  # of float64, against another order of the same sums


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


def step_of(loss: cf.CourierLoss, p: Pages, **more: Any) -> dict[str, Tensor]:
    found, parts = loss(**given(p, "padded"), return_parts=True, **more)
    values = {x: getattr(parts, x) for x in PARTS} | {"output": found.detach()}
    grads = gradients(found, loss, p)
    logits = parts.logits[mask_of(p.lengths)]
    buffers = {n: x.clone() for n, x in loss.named_buffers()}
    return values | grads | buffers | {"logits": logits}
