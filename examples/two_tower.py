"""A two-tower model on the fused contrast: R is the user's side, whatever made it.

python examples/two_tower.py
"""

from __future__ import annotations

import torch
from torch import nn

from courier_fast import reconstruction_loss


def main() -> None:
    torch.manual_seed(0)
    pages, shown, features, dim = 256, 5, 32, 64
    taste = torch.randn(pages, features)  # what is known of the user of each page view
    items = torch.randn(pages, shown, features)
    clicked = (items * taste[:, None]).sum(-1).argsort(1) == shown - 1  # one of each page
    item_ids = torch.arange(pages * shown).view(pages, shown)  # an item is no negative of itself

    user_tower = nn.Sequential(nn.Linear(features, 128), nn.ReLU(), nn.Linear(128, dim))
    item_tower = nn.Linear(features, dim)
    parameters = [*user_tower.parameters(), *item_tower.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3)
    for step in range(60):
        user = user_tower(taste)[:, None].expand(-1, shown, -1)  # [pages, shown, dim]
        loss, stats = reconstruction_loss(
            item_tower(items),
            None,  # no history, no attention
            clicked,
            reconstructed=user,
            item_ids=item_ids,
            return_stats=True,
        )
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 0 or step == 59:
            print(f"step {step:2}: loss {loss.item():.3f}, recall@10 {stats.recall_at(10):.3f}")


if __name__ == "__main__":
    main()
