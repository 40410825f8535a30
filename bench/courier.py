"""COURIER as its authors define it, in the plain PyTorch that `CourierLoss` replaces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from courier_fast.testing.batches import COURIER_TAU as TAU
from courier_fast.testing.batches import HEADS, HIDDEN, Batch

# Multiply-adds of the products of L_rec, of L_seq, of the click head and of the projections.
PRODUCTS = "(M N D + B^2 D + 2 N D hidden + 2 (N + K + B) D^2)"


def products(batch: Batch) -> int:
    pages, rows, dim = len(batch.pv_offsets) - 1, batch.rows, batch.dim
    contrasts = (batch.anchors * rows + pages**2) * dim
    projected = 2 * (rows + len(batch.history) + pages) * dim**2
    return contrasts + 2 * rows * dim * HIDDEN + projected


class PlainCourier(nn.Module):
    """What a user would write from the equations: padded attention, cross entropies, BCE."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(dim, HEADS, batch_first=True)
        self.click_head = nn.Sequential(
            nn.Linear(2 * dim, HIDDEN), nn.ReLU(), nn.BatchNorm1d(HIDDEN), nn.Linear(HIDDEN, 1)
        )

    def attend(self, query: Tensor, history: Tensor, present: Tensor) -> Tensor:
        return self.attention(
            query, history, history, key_padding_mask=~present, need_weights=False
        )[0]

    def forward(self, pv: Tensor, history: Tensor, present: Tensor, clicked: Tensor) -> Tensor:
        """E [B, P, D], C [B, H, D] and what is real of it [B, H], every page with some; [N]."""
        e = pv.flatten(0, 1)
        r = self.attend(pv, history, present).flatten(0, 1)
        rows = clicked.nonzero().squeeze(1)
        loss = _contrast(r[rows], e, rows)
        logits = _precise(self.click_head(torch.cat([r, e], 1)).squeeze(1))
        loss = loss + functional.binary_cross_entropy_with_logits(logits, clicked.to(logits.dtype))
        last = present.sum(1) - 1
        page = torch.arange(len(last), device=last.device)
        newest = history[page, last]
        older = present.index_put((page, last), torch.zeros_like(last, dtype=torch.bool))
        some = (last > 0).nonzero().squeeze(1)
        made = self.attend(newest[some, None], history[some], older[some])[:, 0]
        return loss + _contrast(made, newest, some)


def _precise(x: Tensor) -> Tensor:
    """In float32, or as it is in float64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _contrast(r: Tensor, e: Tensor, own: Tensor) -> Tensor:
    logits = functional.normalize(r, dim=1) @ functional.normalize(e, dim=1).T
    return functional.cross_entropy(_precise(logits) / TAU, own)


def plain(dim: int, device: torch.device, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The loss of a batch, its histories padded [B, H, D], and what is real of them [B, H]."""
    module = PlainCourier(dim).to(device, dtype)

    def loss(batch: Batch, history: Tensor, present: Tensor) -> Tensor:
        pv = batch.pv.view(len(history), -1, dim)
        return functional_call(module, batch.parameters, (pv, history, present, batch.clicked))

    return loss
