"""Checkpoints: complete or not there, newest first, nothing pickled.

A checkpoint is a folder `step-00001234` with tensors in safetensors (torch.distributed.checkpoint,
HuggingFace storage: its default storage unpickles what it finds) and state.json. It is written
under another name, flushed and renamed, while training goes on.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.default_planner import (
    DefaultSavePlanner,
    create_default_global_save_plan,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from ..disk import writing
from ..files import partial_of, publish, read_json, remove

_NAME = re.compile(r"step-(\d+)")


@contextmanager
def _one_process() -> Iterator[None]:
    """Each process writes and reads its own without a word to the others; torch remarks on that."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


class _OwnParts(DefaultSavePlanner):
    """A plan of this process's parts alone, not held against the whole of each tensor: the others'
    are in their files."""

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        self.global_plan, self.metadata = create_default_global_save_plan(all_plans)
        return self.global_plan, self.metadata


def _here(tensor: Tensor) -> bool:
    """Whether this process has a part of it: FSDP's last ones may have none."""
    return not isinstance(tensor, DTensor) or tensor.to_local().numel() > 0


def _fits(stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """A learned temperature and its optimizer's state had the shape [] in earlier versions."""
    return stored == shape or (stored, shape) == ((), (1,))


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the parameters' names; zeros where it has not stepped yet."""
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
    """The checkpoints of a run's folder; keeps the newest `keep`.

    Args:
        rank: this process's.
        group: of a sharded run: all processes, for their writers alone; each writes its parts.
            None: rank 0 writes everything.
        mesh: of a sharded run: all processes, their CPUs.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        rank: int = 0,
        group: dist.ProcessGroup | None = None,
        mesh: DeviceMesh | None = None,
    ) -> None:
        self.folder, self.keep, self.rank, self.group, self.mesh = folder, keep, rank, group, mesh
        self._writer = ThreadPoolExecutor(1, "courier-checkpoints")
        self._writing: Future[None] | None = None

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [p for p in self.folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
        return sorted(found, key=lambda p: int(p.name[5:]))

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def begin(
        self,
        step: int,
        tensors: dict[str, Tensor],
        state: dict[str, Any],
        then: Callable[[], None] = lambda: None,
    ) -> None:
        """Begins the checkpoint of `step`, and returns when `tensors` are copied: a thread writes
        them, when the last ones are written, and then removes what is older than the newest `keep`
        and what was left unfinished.

        Every process calls it, with the names and sharded tensors of all; `then` is called by the
        first one's thread once the checkpoint is there.
        """
        self.wait()
        if self.rank == 0 or self.group is not None:
            rows = {
                name: self._copy(value)
                for name, value in tensors.items()
                if _here(value) and (self.rank == 0 or isinstance(value, DTensor))
            }
            self._writing = self._writer.submit(self._write, self.path(step), rows, state, then)

    @property
    def failed(self) -> bool:
        """Whether what was begun has ended with an error, which `wait` raises."""
        written = self._writing
        return written is not None and written.done() and written.exception() is not None

    def wait(self) -> None:
        """Returns when everything is written; raises what went wrong with it."""
        written, self._writing = self._writing, None
        if written is not None:
            written.result()

    def _copy(self, value: Tensor) -> Tensor:
        """In the host's memory in storage order: a channels-last parameter comes back as it was."""
        if isinstance(value, DTensor):
            part = value.to_local().detach().to("cpu", copy=True)
            assert self.mesh is not None
            return DTensor.from_local(
                part,
                self.mesh,
                value.placements,
                run_check=False,
                shape=value.shape,
                stride=value.stride(),
            )
        return value.detach().to("cpu", memory_format=torch.contiguous_format, copy=True)

    def _write(
        self,
        path: Path,
        rows: dict[str, Tensor],
        state: dict[str, Any],
        then: Callable[[], None],
    ) -> None:
        """This process's part and, by the first one, once all parts are there, the rest."""
        partial, first = partial_of(path), self.rank == 0
        if first:
            remove(partial)
        if not self._total(first and path.is_dir()):
            error: Exception | None = None
            try:
                with writing(path, lambda: "the checkpoints before it are whole"):
                    self._write_part(partial, rows)
            except Exception as e:  # the others wait for it
                error = e
            failed = self._total(error is not None)
            if error is not None:
                if first:
                    remove(partial)
                raise error
            if failed:
                raise RuntimeError(
                    f"{path}: {failed} other processes could not write their parts, "
                    "and say why; nothing was kept"
                )
            if first:
                with writing(path, lambda: "the checkpoints before it are whole"):
                    (partial / "state.json").write_text(json.dumps(state))
                    publish(path)
        if first:
            for old in self.all()[: -self.keep]:
                remove(old)
            for left in self.folder.glob(".step-*.partial"):
                remove(left)
            then()

    def _write_part(self, partial: Path, rows: dict[str, Tensor]) -> None:
        own = partial / str(self.rank)
        own.mkdir(parents=True)
        writer = dcp.HuggingFaceStorageWriter(str(own), save_distributed=True)
        with _one_process():
            dcp.save(rows, storage_writer=writer, planner=_OwnParts(), no_dist=True)
        for file in own.iterdir():
            file.rename(partial / f"part-{self.rank:05d}{file.suffix}")
        own.rmdir()

    def _total(self, value: bool) -> int:
        """Sum over the writers, who all call it."""
        if self.group is None:
            return value
        total = torch.tensor(int(value))
        dist.all_reduce(total, group=self.group)
        return int(total)

    def state(self, path: Path) -> dict[str, Any]:
        """The state.json of a checkpoint. ValueError where it was cut off."""
        state = read_json(path / "state.json", f"remove {path} to go on from an earlier one")
        lacking = [n for n in ("identity", "progress") if not isinstance(state.get(n), dict)]
        if lacking:
            raise ValueError(
                f"{path / 'state.json'}: was altered, expected {lacking[0]} in it; remove {path} "
                "to go on from an earlier one"
            )
        return state

    def load(self, path: Path, tensors: dict[str, Tensor], prefix: str = "") -> dict[str, Any]:
        """Fills `tensors` in place from a checkpoint and returns its state.json; in which parts
        each of the two is does not matter. `prefix`: of the names that are meant.

        Raises ValueError where names or shapes differ, or a part is lacking.
        """
        reader = dcp.HuggingFaceStorageReader(str(path))
        try:
            stored = reader.read_metadata().state_dict_metadata
        except (
            Exception
        ) as error:  # safetensors, JSON and torch say each in their way that a file was cut off
            raise ValueError(
                f"{path}: a file of this checkpoint was cut off or altered "
                f"({str(error).splitlines()[0] if str(error) else type(error).__name__}); remove "
                "it to go on from an earlier one"
            ) from None
        if not stored:
            raise ValueError(
                f"{path}: the files of this checkpoint with its tensors (part-00000.safetensors) "
                "are not there; remove it to go on from an earlier one"
            )
        stored = {n: found for n, found in stored.items() if n.startswith(prefix)}
        wrong = sorted(set(stored) ^ set(tensors)) + [
            n
            for n in sorted(set(stored) & set(tensors))
            if not _fits(tuple(stored[n].size), tuple(tensors[n].shape))
        ]
        if wrong:
            raise ValueError(
                f"{path}: this checkpoint is of a model with other parameters "
                f"({', '.join(wrong[:5])}); "
                "expected the same [model] and [loss] settings, or another run.out"
            )
        for name, found in stored.items():
            there = sum(math.prod(chunk.sizes) for chunk in found.chunks)
            if there != math.prod(found.size):
                raise ValueError(
                    f"{path}: a file of this checkpoint is lacking, with a part of {name}"
                )
        rows = {
            name: torch.empty_like(value, memory_format=torch.contiguous_format)
            for name, value in tensors.items()
            if _here(value)
        }
        rows |= {n: x.reshape(()) for n, x in rows.items() if not stored[n].size and x.dim()}
        with _one_process():
            dcp.load(rows, storage_reader=reader, no_dist=True)
        with torch.no_grad():
            for name, row in rows.items():
                tensors[name].copy_(row)  # one of shape [] fits [1]
        return read_json(path / "state.json")
