"""Checkpoints: complete or not there, newest first, nothing pickled.

A checkpoint is a folder `step-00001234` with tensors in safetensors (torch.distributed.checkpoint, HuggingFace storage: its default
storage unpickles what it finds) and state.json. It is written under another name, flushed and renamed.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn

from ..files import remove, write_atomically

_NAME = re.compile(r"step-(\d+)")


@contextmanager
def _one_process() -> Iterator[None]:
    """State is the same on every rank, so one process writes it; torch remarks on that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the parameters' names; zeros where the optimizer has not stepped yet."""
    tensors: dict[str, Tensor] = {}
    for name, p in model.named_parameters():
        state = optimizer.state[p]
        if not state:
            on_device = optimizer.defaults.get("fused") or optimizer.defaults.get("capturable")
            state["step"] = torch.zeros((), device=p.device if on_device else "cpu")
            state["exp_avg"] = torch.zeros_like(p, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(p, memory_format=torch.preserve_format)
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
    return tensors


class Checkpoints:
    """The checkpoints of a run's folder; keeps the newest `keep`."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def save(self, step: int, tensors: dict[str, Tensor], state: dict[str, Any]) -> Path:
        """Writes the checkpoint of `step`, then removes what is older than the newest `keep` and what was left unfinished."""
        path = self.folder / f"step-{step:08d}"
        self.folder.mkdir(parents=True, exist_ok=True)

        def write(partial: Path) -> None:
            partial.mkdir()
            # Storage order, so that a channels-last parameter comes back as it was.
            rows = {
                name: value.detach().clone(memory_format=torch.contiguous_format)
                for name, value in tensors.items()
            }
            with _one_process():
                dcp.save(
                    rows, storage_writer=dcp.HuggingFaceStorageWriter(str(partial)), no_dist=True
                )
            (partial / "state.json").write_text(json.dumps(state))

        if not path.is_dir():
            write_atomically(path, write)
        for old in self.all()[: -self.keep]:
            remove(old)
        for left in self.folder.glob(".step-*.partial"):
            remove(left)
        return path

    def load(self, path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
        """Fills `tensors` in place from a checkpoint and returns its state.json. ValueError where names or shapes differ."""
        reader = dcp.HuggingFaceStorageReader(str(path))
        stored = reader.read_metadata().state_dict_metadata
        wrong = sorted(set(stored) ^ set(tensors)) + [
            n
            for n in sorted(set(stored) & set(tensors))
            if tuple(stored[n].size) != tuple(tensors[n].shape)
        ]
        if wrong:
            raise ValueError(
                f"{path}: this checkpoint is of a model with other parameters ({', '.join(wrong[:5])}); "
                "expected the same [model] and [loss] settings, or another run.out"
            )
        rows = {
            name: torch.empty_like(value, memory_format=torch.contiguous_format)
            for name, value in tensors.items()
        }
        with _one_process():
            dcp.load(rows, storage_reader=reader, no_dist=True)
        with torch.no_grad():
            for name, value in tensors.items():
                value.copy_(rows[name])
        return json.loads((path / "state.json").read_text())
