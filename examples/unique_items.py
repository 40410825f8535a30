"""Each item encoded once: a table of unique embeddings, and the click-sequence loss beside it.

python examples/unique_items.py
"""

from __future__ import annotations

import torch

from courier_fast import ClickSequenceLoss, ReconstructionLoss

SEQUENCE_WEIGHT = 0.1


def main() -> None:
    torch.manual_seed(0)
    items, pages, features, dim = 500, 64, 32, 64
    # Item ids of every page, one page after the other: what was shown, and what was clicked before.
    shown = torch.randint(items, (pages * 5,))
    shown_offsets = torch.arange(0, pages * 5 + 1, 5)
    lengths = torch.randint(0, 8, (pages,))  # new users have no history
    seen_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    seen = torch.randint(items, (int(seen_offsets[-1]),))
    clicked = torch.rand(len(shown)) < 0.2

    # Only items of this batch are encoded, each once; the losses get indices into their table.
    unique, index = torch.cat([shown, seen]).unique(return_inverse=True)
    pv, history = index[: len(shown)], index[len(shown) :]
    images = torch.randn(items, features)
    encoder = torch.nn.Sequential(
        torch.nn.Linear(features, 128), torch.nn.ReLU(), torch.nn.Linear(128, dim)
    )
    reconstruction = ReconstructionLoss(learnable_temperature=True)
    sequence = ClickSequenceLoss(temperature=0.1)
    parameters = [*encoder.parameters(), *reconstruction.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)

    for step in range(20):
        table = encoder(images[unique])  # [n, D]
        loss = reconstruction(
            pv,
            history,
            clicked,
            pv_offsets=shown_offsets,
            history_offsets=seen_offsets,
            embeddings=table,
        )
        pulled = sequence(history, history_offsets=seen_offsets, embeddings=table)
        optimizer.zero_grad()
        (loss + SEQUENCE_WEIGHT * pulled).backward()
        optimizer.step()
        if step % 5 == 0 or step == 19:
            print(f"step {step:2}: reconstruction {loss.item():.3f}, sequence {pulled.item():.3f}")


if __name__ == "__main__":
    main()
