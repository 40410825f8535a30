"""A plain training loop on several processes, whose candidates are those of all: `group=`.

torchrun --nproc-per-node 2 examples/ddp_loop.py
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from courier_fast import ReconstructionLoss

ITEMS, PAGES = 200, 49  # one page is left for the last batch


def main() -> None:
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)  # the same catalogue and pages everywhere
    images = torch.rand(ITEMS, 3, 16, 16)
    # Pages show five items, of which the first was clicked; the history has its neighbours.
    taste = torch.randint(ITEMS, (PAGES,))
    shown = torch.cat([(taste + 1)[:, None] % ITEMS, torch.randint(ITEMS, (PAGES, 4))], 1)
    seen = (taste[:, None] + torch.tensor([0, 2, 3])) % ITEMS
    clicked = torch.arange(5).expand(PAGES, 5) == 0

    encoder = torch.nn.Sequential(
        torch.nn.Flatten(), torch.nn.Linear(768, 64), torch.nn.ReLU(), torch.nn.Linear(64, 32)
    )
    model = DistributedDataParallel(encoder)
    loss_fn = ReconstructionLoss(group=dist.group.WORLD)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for epoch in range(10):
        for batch in torch.arange(PAGES).split(8 * size):
            mine = batch.tensor_split(size)[rank]  # of the last batch perhaps none: it still calls
            ids, index = torch.cat([shown[mine], seen[mine]], 1).unique(return_inverse=True)
            pv, history = index.split([5, 3], 1)
            loss = loss_fn(pv, history, clicked[mine], embeddings=model(images[ids]), table_ids=ids)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        dist.all_reduce(loss.detach_())
        if rank == 0:
            print(f"epoch {epoch}: loss {loss.item() / size:.3f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
