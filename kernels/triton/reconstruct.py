"""impl="triton": R of every item and its gradients, as launches; the attention alone."""

from __future__ import annotations

import torch
from torch import Tensor

from ...loss.problem import Gradients, Needs, Problem
from .attention import run_attention
from .attention_backward import attention_backward
from .gradients import spread
from .plan import make_plan
from .rows import list_gradient
from .shapes import Shape, is_empty, loss_shape
from .state import Plan
from .table import sum_occurrences


def _reconstruct(p: Problem) -> tuple[Shape, Plan, Tensor]:
    """The lists of all PV rows with a history, and their R [N, D]."""
    s = loss_shape(p, contrast=False)
    t = Plan.empty(s)
    make_plan(p, s, t, None)
    r = torch.zeros(s.rows, s.dim, dtype=s.dtype, device=s.device)
    run_attention(p, s, t, r)
    return s, t, r


def reconstruct_forward(p: Problem) -> Tensor:
    """R [N, D], zeros for padding and for pages without history."""
    if is_empty(p):
        return torch.zeros(p.num_pv, p.pv.shape[1], dtype=p.pv.dtype, device=p.pv.device)
    return _reconstruct(p)[2]


def reconstruct_backward(p: Problem, needs: Needs, grad: Tensor) -> Gradients:
    """Of `p`'s inputs; the attention is computed again."""
    if is_empty(p):
        return Gradients.zeros(p, needs)
    s, t, r = _reconstruct(p)
    dr = torch.empty(s.rows, s.stride, dtype=s.dtype, device=s.device)
    list_gradient(s, t, grad, dr)
    dq, dk, dv = attention_backward(p, s, t, needs, dr)
    grads, d_history = Gradients.of_history(p, needs, dk, dv)
    table = p.history is None
    # The list holds exactly the rows with a gradient, and every place of it is written.
    d_rows = None
    if dq is not None:
        kind = torch.float32 if table and p.query is None else s.dtype
        d_rows = torch.empty(s.rows, s.dim, dtype=kind, device=s.device)
        spread(p, s, t, r, d_rows, dq)
    if needs.query:
        grads.query = d_rows
    own = d_rows if p.query is None else None
    if needs.pv and not table:
        grads.pv = own if own is not None else torch.zeros_like(p.pv)
    elif needs.pv:
        if own is None:
            own = torch.zeros(s.rows, s.dim, dtype=torch.float32, device=s.device)
        shown = [(p.pv_index, t.pv_page), (p.history_index, t.history_page)]
        grads.pv = sum_occurrences(p.pv, s, shown, own, d_history)
    return grads
