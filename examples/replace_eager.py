"""From an eager loss to courier_fast: the same number, the same gradients, and no N x N matrix.

python examples/replace_eager.py
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from courier_fast import ReconstructionLoss

TAU = 0.1


def eager_loss(pv: Tensor, history: Tensor, clicked: Tensor, history_mask: Tensor) -> Tensor:
    """What is replaced: attention over the history, and a softmax over all items of the batch."""
    scores = pv @ history.mT / pv.shape[-1] ** 0.5  # [B, P, H]
    weights = scores.masked_fill(~history_mask[:, None], -torch.inf).softmax(-1)
    r = functional.normalize(weights @ history, dim=-1).flatten(0, 1)  # [N, D]
    e = functional.normalize(pv, dim=-1).flatten(0, 1)  # [N, D]
    logits = r @ e.T / TAU  # [N, N]
    return functional.cross_entropy(logits, torch.arange(len(e)), reduction="none")[
        clicked.flatten()
    ].mean()


def main() -> None:
    torch.manual_seed(0)
    pages, items, most, dim = 64, 5, 10, 128
    pv = torch.randn(pages, items, dim, requires_grad=True)
    history = torch.randn(pages, most, dim, requires_grad=True)
    history_mask = torch.arange(most) < torch.randint(1, most + 1, (pages, 1))
    clicked = torch.rand(pages, items) < 0.2

    before = eager_loss(pv, history, clicked, history_mask)
    before_gradients = torch.autograd.grad(before, (pv, history))

    # As above, the clicked item's query makes the reconstruction; by default each candidate makes
    # its own.
    loss_fn = ReconstructionLoss(temperature=TAU, attention="anchor")
    after = loss_fn(pv, history, clicked, history_mask=history_mask)
    after_gradients = torch.autograd.grad(after, (pv, history))

    print(f"loss: eager {before.item():.6f}, courier_fast {after.item():.6f}")
    for name, x, y in zip(("pv", "history"), before_gradients, after_gradients, strict=True):
        print(f"gradient of {name}: relative difference {((x - y).norm() / x.norm()).item():.1e}")


if __name__ == "__main__":
    main()
