"""The processes of a run and what they exchange."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

Compute = Callable[[], Tensor]


def _store_of_this_start(rank: int, world: int) -> dist.Store:
    """The store in which processes find each other, without what those before a restart have left
    in it.

    torchrun keeps one store over its restarts, and in it the addresses at which killed processes
    listened: new ones that come early call there and fail (pytorch issue 167288). So the first
    process names this start; another asks by a name of its own, which nobody has had before.
    """
    store, _, _ = next(rendezvous("env://", rank, world))
    store = dist.PrefixStore("courier", store)
    own, start = uuid.uuid4().hex, ""
    if rank:
        store.set(f"process {rank}", own)
        start = store.get(f"start of {own}").decode()
        store.set(f"heard by {own}", start)
    else:
        start, waiting = own, set(range(1, world))
        until = time.monotonic() + store.timeout.total_seconds()
        while waiting:
            for other in sorted(waiting):
                if store.check([f"process {other}"]):
                    name = store.get(f"process {other}").decode()
                    store.set(f"start of {name}", start)
                    heard = f"heard by {name}"
                    if store.check([heard]) and store.get(heard).decode() == start:
                        waiting.remove(other)
            if time.monotonic() > until:
                raise TimeoutError(f"processes {sorted(waiting)[:9]} of {world} have not started")
            time.sleep(0.01)
    return dist.PrefixStore(start, store)


class _Attach(torch.autograd.Function):
    """x with parameters in its graph that get no gradient from it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *parameters: Tensor) -> Tensor:
        ctx.count = len(parameters)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, *[None] * ctx.count


class _Replica(nn.Module):
    """What DistributedDataParallel wraps: parameters alone, as it would broadcast buffers at every
    step.

    It waits for the gradient of each parameter, also of those that `compute` has not used, so all
    are attached to the result.
    """

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__()
        self.all = nn.ParameterList(parameters)

    def forward(self, compute: Compute) -> Tensor:
        return _Attach.apply(compute(), *self.all)


class Processes:
    """The processes of a torchrun job; one alone without it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.rank, self.world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        self.owned = self.world > 1 and not dist.is_initialized()
        if self.owned:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=_store_of_this_start(self.rank, self.world),
                rank=self.rank,
                world_size=self.world,
            )
        self.group = dist.group.WORLD if self.world > 1 else None

    def host_group(self) -> dist.ProcessGroup:
        """All processes once more, for a thread of each: its messages never meet those of the
        training step. Every process calls it."""
        return dist.new_group(backend="gloo")

    def sum(self, values: list[float]) -> list[float]:
        """Sums over the processes, on the host: a GPU is not waited for."""
        if self.world == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total)
        return total.tolist()

    def each(self, value: int) -> list[int]:
        """Every process's value, in the order of their ranks."""
        values = [0.0] * self.world
        values[self.rank] = value
        return [int(v) for v in self.sum(values)]

    def synchronised(self, parameters: list[nn.Parameter]) -> Callable[[Compute], Tensor]:
        """f with f(compute) = compute(), a tensor; its backward averages `.grad` over the
        processes, bucket by bucket as they are complete.

        Every process calls it once a step. What earlier backward passes of the step left in `.grad`
        is averaged with the rest.
        """
        if self.world == 1:
            return lambda compute: compute()
        replica = DistributedDataParallel(
            _Replica(parameters), gradient_as_bucket_view=True, init_sync=False
        )
        # Buckets are laid out anew after the first backward, in its order, and the layout decides
        # in which order numbers are added. Two passes here, last parameter first, fix it before the
        # first step: a resumed run adds as one that never stopped.
        for _ in range(2):
            start = torch.zeros((), device=parameters[0].device)
            replica(lambda x=start: reduce(_Attach.apply, parameters, x)).backward()
        return replica

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
