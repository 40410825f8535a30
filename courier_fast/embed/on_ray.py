"""`courier-fast embed --engine ray`: the batches of `encode`, made by Ray's actors.

The rows are cut into the same batches as on one machine, and every actor computes with as many
threads, so on CPUs (or GPUs) of one kind the embeddings are the same bits. What an actor that dies
had in hand is done again by another; what has arrived is saved by `embed_source` as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from .encode import encode
from .sources import RowSource

Array = npt.NDArray

BATCHES = 8  # of a task: the next one is decoded while one is encoded


class Actor:
    """An encoder with its inputs; maps {"rows": [1, n]} to embeddings [1, n, D], damaged [1, n] and
    an error's text ("" without one)."""

    def __init__(self, encoder: Any, source: Any, threads: int, how: dict[str, Any]) -> None:
        import ray

        torch.set_num_threads(threads)
        self.encoder: nn.Module = ray.get(encoder).to(how["device"])
        self.source, self.how = ray.get(source), how

    def __call__(self, task: dict[str, Array]) -> dict[str, Array]:
        rows, error = task["rows"][0], ""
        found, damaged = (
            np.zeros((len(rows), int(self.encoder.dim)), np.float32),
            np.zeros(len(rows), bool),
        )
        try:
            parts = list(encode(self.encoder, self.source, rows, **self.how))
            found, damaged = (np.concatenate([part[i] for part in parts]) for i in (1, 2))
        except RuntimeError as wrong:  # Ray would wrap it up, and try again
            error = str(wrong)
        return {"embedding": found[None], "damaged": damaged[None], "error": np.array([error])}


def encode_on(ray: Any) -> Callable[..., Iterator[tuple[Array, Array, Array]]]:
    """An `encode` for `embed_source` that works on a connected Ray. Its machines must see the
    source's dataset or files under the same path."""

    def encode_rows(
        model: nn.Module, source: RowSource, rows: Array, *, batch: int, device: Any, dtype: Any
    ) -> Iterator[tuple[Array, Array, Array]]:
        if not len(rows):
            return
        size, threads = batch * BATCHES, torch.get_num_threads()
        gpu = torch.device(device).type == "cuda"
        there = ray.cluster_resources()
        most = int(there.get("GPU", 0)) if gpu else int(there.get("CPU", 1)) // threads
        how = {"batch": batch, "device": device, "dtype": dtype}
        tasks = [rows[i : i + size] for i in range(0, len(rows), size)]
        actors = ray.data.ActorPoolStrategy(size=max(1, min(most, len(tasks))))
        data = ray.data.from_items(
            [{"rows": task} for task in tasks], override_num_blocks=len(tasks)
        )
        found = data.map_batches(
            Actor,
            batch_size=1,
            batch_format="numpy",
            compute=actors,
            fn_constructor_args=(ray.put(model.cpu()), ray.put(source), threads, how),
            **({"num_gpus": 1} if gpu else {"num_cpus": min(threads, int(there.get("CPU", 1)))}),
        )
        for task, block in zip(tasks, found.iter_batches(batch_size=1), strict=True):
            if block["error"][0]:
                raise RuntimeError(block["error"][0])
            yield task, block["embedding"][0], block["damaged"][0]

    return encode_rows
