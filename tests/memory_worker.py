"""Walks through the pipeline with tensors that hold nothing, and prints what it would launch and
allocate as JSON.

Run by test_memory.py, as a process of its own: in one with TRITON_INTERPRET=1, kernels cannot be
recorded.
"""

from __future__ import annotations

import json
import sys
import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.launches import recorded
from courier_fast.kernels.triton import loss as triton_loss
from courier_fast.kernels.triton import tiles
from courier_fast.loss.problem import Needs
from courier_fast.testing.problems import NoValues, problem


class Memory(TorchDispatchMode):
    """Bytes of the storages that are alive, and their peak; which operators compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.computing: list[str] = []
        self.live = self.peak = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        some = any(isinstance(x, torch.Tensor) and x.numel() for x in tree_leaves(out))
        if some and not func.is_view and "empty" not in str(func):
            self.computing.append(str(func))
        for x in tree_leaves(out):
            if not isinstance(x, torch.Tensor) or x.untyped_storage() in self.seen:
                continue
            storage = x.untyped_storage()
            self.seen.add(storage)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self.free, storage.nbytes())
        return out

    def free(self, size: int) -> None:
        self.live -= size


def walk(
    pages: int, items: int, history_rows: int, dim: int, gradients: bool, attention: str = "anchor"
) -> dict[str, Any]:
    rows = pages * items
    with torch.device("meta"):
        offsets = torch.empty(pages + 1, dtype=torch.int64)
        p = problem(
            NoValues(),
            (rows, offsets),
            (history_rows, offsets),
            dim=dim,
            dtype=torch.bfloat16,
            attention_scale=1.0,
            attention=attention,
            cosine=attention == "candidate",
        )
        needs = Needs(pv=gradients, history=gradients)
        with recorded() as launches, Memory() as memory:
            loss, *_, saved = triton_loss.loss_forward(p, needs, False)
            forward, size = memory.peak, 0
            if gradients:
                found = triton_loss.loss_backward(p, needs, saved, loss)
                size = sum(x.untyped_storage().nbytes() for x in found.present())
    # The gradients are not yet there in the forward pass.
    extra = max(forward, memory.peak - size)
    return {"launches": len(launches), "extra": extra, "others": memory.computing}


if __name__ == "__main__":
    tiles.programs = lambda _device: 132
    print(json.dumps([walk(*case) for case in json.loads(sys.argv[1])]))
