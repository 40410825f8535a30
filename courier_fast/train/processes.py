"""The processes of a run and what they exchange."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Processes:
    """The processes of a torchrun job; one alone without it."""

    def __init__(self, device: torch.device) -> None:
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.owned = self.world > 1 and not dist.is_initialized()
        if self.owned:
            dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the processes, on the host: a GPU is not waited for."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def sum_gradients(self, parameters: list[nn.Parameter]) -> None:
        """Sums all gradients in one collective; a process without pages joins with zeros."""
        if self.world == 1:
            return
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]
        )
        dist.all_reduce(flat)
        for p, gradient in zip(
            parameters, flat.split([p.numel() for p in parameters]), strict=True
        ):
            p.grad = gradient.view_as(p)

    def broadcast(self, tensors: list[Tensor]) -> None:
        """Rank 0's values on every rank."""
        for tensor in tensors if self.world > 1 else []:
            dist.broadcast(tensor, 0)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        if self.owned:
            dist.destroy_process_group()
