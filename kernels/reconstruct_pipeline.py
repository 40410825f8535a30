"""impl="triton": R of every item and its gradients, as a sequence of launches; the attention alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import epilogue
from .stages import (
    attend,
    attention_backward,
    make_plan,
    occurrences,
    reconstructed,
    spread,
    sum_occurrences,
)
from .state import Shape, cdiv, empty_tensors, is_empty, loss_shape, plan_spec

if TYPE_CHECKING:
    from courier_fast.problem import Problem


def _reconstruct(p: Problem) -> tuple[Shape, dict[str, Tensor], Tensor]:
    """The lists of all PV rows with a history, and their R [N, D]."""
    p = replace(p, direction="reconstruct")  # a single list
    s = loss_shape(p)
    t = empty_tensors(plan_spec(p, s), p.pv.device)
    make_plan(p, s, t, None)
    r = torch.zeros(s.rows, s.dim, dtype=p.pv.dtype, device=p.pv.device)
    t |= {"r": r, "norm": t["attention_lse"]}
    attend(p, s, t, t["attention_lse"], r)
    return s, t, r


def reconstruct_forward(p: Problem) -> Tensor:
    """R [N, D], zeros for padding and for pages without history."""
    if is_empty(p):
        return torch.zeros(p.num_pv, p.pv.shape[1], dtype=p.pv.dtype, device=p.pv.device)
    return _reconstruct(p)[2]


def reconstruct_backward(p: Problem, needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """Gradients of (pv, history, query, key, value); the attention is computed again."""
    inputs = (p.pv, p.history, p.query, p.key, p.value)
    if is_empty(p):
        return [
            torch.zeros_like(x) if need and x is not None else None
            for x, need in zip(inputs, needs, strict=True)
        ]
    s, t, r = _reconstruct(p)
    device, dtype = p.pv.device, p.pv.dtype
    rows, _, count = reconstructed(s, t)
    dr = torch.empty(s.rows, s.stride, dtype=dtype, device=device)
    delta = torch.empty(p.num_heads, s.rows, dtype=torch.float32, device=device)
    epilogue.given_gradient[(cdiv(s.rows, s.small.block_m),)](
        grad.contiguous(),
        r,
        rows,
        count,
        dr,
        delta,
        s.rows,
        D=s.dim,
        STRIDE=s.stride,
        HEADS=p.num_heads,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    dq, d_key, d_value = attention_backward(p, s, t, needs, dr, delta)
    grads: list[Tensor | None] = [None] * 5
    grads[3] = d_key if needs[3] else None
    grads[4] = d_value if needs[4] else None
    d_history = d_key if p.key is None else d_value if p.value is None else None
    table = p.history is None
    # The list holds exactly the rows with a gradient, and every place of it is written.
    d_rows = None
    if dq is not None:
        kind = torch.float32 if table and p.query is None else dtype
        d_rows = torch.empty(s.rows, s.dim, dtype=kind, device=device)
        spread(p, s, t, d_rows, dq)
    if needs[2]:
        grads[2] = d_rows
    own = d_rows if p.query is None else None
    if not table:
        if needs[0]:
            grads[0] = own if own is not None else torch.zeros_like(p.pv)
        if needs[1]:
            grads[1] = d_history if d_history is not None else torch.zeros_like(p.history)
    elif needs[0]:
        if own is None:
            own = torch.zeros(s.rows, s.dim, dtype=torch.float32, device=device)
        assert p.pv_index is not None and p.history_index is not None
        order, starts = occurrences(
            s.items, [(p.pv_index, t["pv_page"]), (p.history_index, t["history_page"])]
        )
        grads[0] = sum_occurrences(p.pv, s, order, starts, own, d_history, s.rows)
    return grads
