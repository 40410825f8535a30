"""impl="triton": R of every item and its gradients, as launches; the attention alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from . import epilogue
from .stages import (
    attend,
    attention_backward,
    history_gradient,
    make_plan,
    reconstructed,
    spread,
    sum_occurrences,
)
from .state import Plan, Shape, cdiv, is_empty, loss_shape

if TYPE_CHECKING:
    from ...loss.problem import Problem


def _reconstruct(p: Problem) -> tuple[Shape, Plan, Tensor]:
    """The lists of all PV rows with a history, and their R [N, D]."""
    s = loss_shape(p, contrast=False)
    t = Plan.empty(s)
    make_plan(p, s, t, None)
    r = torch.zeros(s.rows, s.dim, dtype=s.dtype, device=s.device)
    attend(p, s, t, r)
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
    listed = reconstructed(t)
    dr = torch.empty(s.rows, s.stride, dtype=s.dtype, device=s.device)
    epilogue.given_gradient[(cdiv(s.rows, s.small.block_m),)](
        grad.contiguous(),
        listed.list,
        listed.count,
        dr,
        D=s.dim,
        STRIDE=s.stride,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    dq, dk, dv = attention_backward(p, s, t, needs, dr)
    grads: list[Tensor | None] = [None] * 5
    grads[3], grads[4] = dk if needs[3] else None, dv if needs[4] else None
    d_history = history_gradient(p, dk, dv)
    table = p.history is None
    # The list holds exactly the rows with a gradient, and every place of it is written.
    d_rows = None
    if dq is not None:
        kind = torch.float32 if table and p.query is None else s.dtype
        d_rows = torch.empty(s.rows, s.dim, dtype=kind, device=s.device)
        spread(p, s, t, r, d_rows, dq)
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
            own = torch.zeros(s.rows, s.dim, dtype=torch.float32, device=s.device)
        shown = [(p.pv_index, t.pv_page), (p.history_index, t.history_page)]
        grads[0] = sum_occurrences(p.pv, s, shown, own, d_history)
    return grads
