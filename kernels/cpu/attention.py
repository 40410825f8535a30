"""impl="cpu": the attention to a page's history, forward and backward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...loss.problem import Gradients, Needs, Problem
from .native import call, stage
from .rows import (
    Rows,
    history_gradients,
    placed,
)

# ---- stages --------------------------------------------------------------------------------------


@dataclass
class Attention:
    """Attention of listed rows: arguments of the native stage, and what the forward pass leaves."""

    arguments: tuple[Any, ...]
    scale: float
    heads: int
    page_starts: Tensor
    dim: int
    rows: int
    history_rows: int

    def gradients(
        self, d_r: Tensor, want_q: bool, want_k: bool, want_v: bool, together: bool
    ) -> tuple[Any, Any, Any]:
        """float32 (dq of the listed rows, dk, dv of the real history rows); `together`: dk is the
        sum of both."""
        d_q = torch.zeros(self.rows, self.dim) if want_q else None
        d_k = torch.zeros(self.history_rows, self.dim) if want_k else None
        d_v = d_k if together else torch.zeros(self.history_rows, self.dim) if want_v else None
        given = (*self.arguments, d_r, d_q, d_k, d_v, self.page_starts, self.scale, self.heads)
        stage("attend_backward", *given)
        return d_q, d_k, d_v


@dataclass
class Reconstruction:
    unit: Tensor  # [M, D] r, or R itself
    norm: Tensor  # [M]
    positive: Tensor  # [M] cos(R, E) in float64
    attention: Attention


def attend(p: Problem, pv: Rows, history: Rows, rows: Tensor, raw: bool) -> Reconstruction:
    """Reconstructions of `rows` (among the real PV rows, all of pages with a history); an R that is
    given is attended to as a history of its own, of one row."""
    c_source = p.pv if p.history is None else p.history
    count, dim = rows.shape[0], p.pv.shape[1]
    first, last, weights_at, page_starts = torch.empty(4, count, dtype=torch.int64)
    e_row = pv.source[rows]
    q = (p.pv, e_row) if p.query is None else (p.query, pv.keep[rows])
    k = (c_source, history.source) if p.key is None else (p.key, history.keep)
    v = (c_source, history.source) if p.value is None else (p.value, history.keep)
    page, start = pv.page[rows], history.start
    if p.reconstructed is not None:
        page, start = torch.arange(count), torch.arange(count + 1)
        v = k = (p.reconstructed, pv.keep[rows])
    if not p.attention_scale:
        # Nobody asks: what q and k hold may be infinite, and 0 times that is not 0.
        nothing = torch.zeros(1, dim, dtype=p.pv.dtype)
        q, k = ((nothing, torch.zeros_like(index)) for _, index in (q, k))
    sizes, pages = call("spans", page, start, p.num_heads, first, last, weights_at, page_starts)
    weights = torch.empty(sizes, dtype=torch.float32)
    arguments = (*q, *k, *v, first, last, weights_at, weights)
    unit = torch.empty(count, dim, dtype=p.pv.dtype)
    norm = torch.empty(count, dtype=torch.float32)
    positive = torch.empty(count, dtype=torch.float64)
    how = (p.attention_scale, p.num_heads)
    stage("attend", *arguments, p.pv, e_row, unit, norm, positive, *how, raw)
    sizes = (dim, count, v[1].shape[0])
    attention = Attention(arguments, *how, page_starts[:pages], *sizes)
    return Reconstruction(unit, norm, positive, attention)


def reconstruction_gradients(
    p: Problem,
    needs: Needs,
    total: Tensor | None,  # float32, what pv (or the table) has got so far
    pv: Rows,
    history: Rows,
    listed: Tensor,
    attention: Attention,
    d_r: Tensor,  # [listed, D] gradient of R
) -> Gradients:
    """Through the attention: of all inputs but the temperature."""
    if p.reconstructed is not None:
        found, _ = Gradients.of_history(p, needs, None, None)
        found.pv = None if total is None else total.to(p.pv.dtype)
        if needs.reconstructed:
            found.reconstructed = placed(p.reconstructed, pv.keep[listed], d_r)
        return found
    asks = p.attention_scale != 0  # else q and k have none
    want_q, want_k = (asks and needs.of(p, role) for role in ("query", "key"))
    together = p.key is None and p.value is None and want_k
    d_q, d_k, d_v = attention.gradients(d_r, want_q, want_k, needs.of(p, "value"), together)

    # The sum of both is in d_k.
    found, of_table = history_gradients(p, needs, history.keep, d_k, None if together else d_v)
    if needs.key and found.key is None:
        found.key = torch.zeros_like(p.key)
    if needs.query:
        found.query = torch.zeros_like(p.query)
        if asks:
            found.query = placed(p.query, pv.keep[listed], d_q)
    if total is None:
        return found
    if p.query is None and asks:
        total.index_add_(0, pv.source[listed], d_q)
    if of_table is not None:
        total.index_add_(0, history.source, of_table)
    found.pv = total.to(p.pv.dtype)
    return found
