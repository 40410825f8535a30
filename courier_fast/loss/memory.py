"""Embeddings of earlier batches as further candidates (cross-batch memory: XBM, CVPR 2020; for
recommenders CBNS, SIGIR 2021)."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from ..surroundings import has_values
from .layouts import INTEGERS, describe, require_size, require_tensor
from .union.exchange import Participants, reporting


class EmbeddingMemory(nn.Module):
    """The last `size` embeddings that were pushed, with their ids; a ring buffer, saved in the
    state_dict.

        memory = EmbeddingMemory(65536, 256)
        rows, ids, log_q = memory.read()
        loss = loss_fn(pv, history, clicked, item_ids=item_ids, memory=rows, memory_ids=ids)
        memory.push(pv, item_ids)

    Push after the loss, so that a batch never meets itself. Rows are as old as the memory is deep:
    start with one once embeddings move slowly, and watch `age`. With DistributedDataParallel, push
    with `group`, and keep the module outside of what is wrapped: every process then holds the same
    rows, and nothing has to be broadcast.

    All there is to it is in its buffers, so a copy of them (an average of models, a functional
    call, a checkpoint that was filled in place) is a copy of the memory. How many rows are filled
    is read from `position`; on a GPU, where that would wait for the device, only after `position`
    was written to: what is written there through `.data`, or under torch.inference_mode by others
    than `push`, is not seen.

    Args:
        size: rows, at least 1.
        dim: features of an embedding.
        dtype: of what is kept; embeddings are rounded to it. `log_q` stays float32 or better.
    """

    rows: Tensor
    ids: Tensor
    log_q: Tensor
    pushed_at: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            require_size(name, value)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise TypeError(
                "dtype: expected a floating torch.dtype, got "
                f"{dtype if isinstance(dtype, torch.dtype) else describe(dtype)}"
            )
        self.register_buffer("rows", torch.empty(size, dim, dtype=dtype))
        self.register_buffer("ids", torch.empty(size, dtype=torch.int64))
        self.register_buffer("log_q", torch.empty(size, dtype=torch.float32))
        self.register_buffer("pushed_at", torch.empty(size, dtype=torch.int64))
        # Where the next row goes, rows that are filled, pushes, and whether they came with log_q.
        self.register_buffer("position", torch.empty(4, dtype=torch.int64))
        self._known: tuple[Any, int, list[int]] | None = None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Empties it; also for one that was built on the device "meta"."""
        for x in self.buffers():
            x.zero_()

    # ---- what the buffers say ------------------------------------------------------------------

    def _counts(self) -> list[int]:
        """`position` on the host."""
        x = self.position
        if not has_values(x):
            return [0, 0, 0, 0]
        if x.device.type == "cpu":
            return x.tolist()
        known = self._known
        if known is None or known[0]() is not x or x.is_inference() or known[1] != x._version:
            return self._know(x.tolist())
        return known[2]

    def _know(self, counts: list[int]) -> list[int]:
        x = self.position
        if x.device.type != "cpu" and not x.is_inference():
            self._known = weakref.ref(x), x._version, counts
        return counts

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_known": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._known = None

    def __len__(self) -> int:
        """Rows that are filled."""
        return self._counts()[1]

    # ---- rows in and out -----------------------------------------------------------------------

    @torch.no_grad()
    def push(
        self, embeddings: Tensor, ids: Tensor, log_q: Tensor | None = None, group: Any = None
    ) -> None:
        """Keeps `embeddings` [n, D] with `ids` [n] (integers) and, if all pushes have it, `log_q`
        [n], in place of the oldest.

        `group`: a torch.distributed ProcessGroup or "world", all of whose processes call this: each
        keeps the rows of all, in the order of the ranks. Raises ValueError or TypeError if the
        arguments do not fit, with a group on every process.
        """
        processes = Participants.of(group)
        before = self._counts()
        if processes is None:
            self._check(embeddings, ids, log_q, before)
        else:
            with reporting(processes):
                self._check(embeddings, ids, log_q, before)
                facts = {"memory": tuple(self.rows.shape), "log_q": log_q is not None}
                counts = processes.agree(facts, [len(ids)])[0]
            given = [embeddings.to(self.rows), ids.to(self.ids), log_q]
            embeddings, ids, log_q = processes.every(given, counts)
        size = len(self.rows)
        fields = [(self.rows, embeddings), (self.ids, ids)]
        if log_q is not None:
            fields.append((self.log_q, log_q))
        at, filled, pushes = before[0], before[1], before[2] + 1
        n = min(len(ids), size)
        first = min(n, size - at)
        for kept, given_rows in fields:
            last = given_rows[len(given_rows) - n :].to(kept)
            kept[at : at + first] = last[:first]
            kept[: n - first] = last[first:]
        self.pushed_at[at : at + first] = pushes
        self.pushed_at[: n - first] = pushes
        now = [(at + n) % size, min(filled + n, size), pushes, int(log_q is not None)]
        self.position.copy_(torch.tensor(now, dtype=torch.int64, device="cpu"))
        self._know(now)

    def _check(self, embeddings: Any, ids: Any, log_q: Any, before: list[int]) -> None:
        dim = self.rows.shape[1]
        for name, x in (("embeddings", embeddings), ("ids", ids), ("log_q", log_q)):
            if x is None and name == "log_q":
                continue
            require_tensor(name, x)
            if x.is_nested:
                raise ValueError(f"{name}: expected rows one after the other, got {describe(x)}")
            if x.is_meta and not self.rows.is_meta:
                raise ValueError(f"{name}: expected a tensor with values, got {describe(x)}")
        if embeddings.dim() != 2 or embeddings.shape[1] != dim:
            raise ValueError(f"embeddings: expected [n, {dim}], got {list(embeddings.shape)}")
        if not embeddings.is_floating_point():
            raise TypeError(f"embeddings: expected a floating tensor, got {embeddings.dtype}")
        for name, x in (("ids", ids), ("log_q", log_q)):
            if x is not None and x.shape != embeddings.shape[:1]:
                raise ValueError(f"{name}: expected [{len(embeddings)}], got {list(x.shape)}")
        if ids.dtype not in INTEGERS:
            raise TypeError(f"ids: expected integers, got {ids.dtype}")
        if log_q is not None and not log_q.is_floating_point():
            raise TypeError(f"log_q: expected a floating tensor, got {log_q.dtype}")
        if before[1] and (log_q is not None) != bool(before[3]):
            said = "with" if before[3] else "without"
            raise ValueError(f"log_q: expected as in the pushes before, which were {said} it")

    def read(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(rows [Q, D], ids [Q], log_q [Q] or None): what is filled so far, without gradient. Not
        copies: a push changes them. A loss has what it needs of them, so it may come before the
        backward pass."""
        _, n, _, has_log_q = self._counts()
        return self.rows[:n], self.ids[:n], self.log_q[:n] if has_log_q else None

    def age(self) -> float:
        """Mean age of the rows in pushes, 1 for those of the last one; 0 if there are none."""
        _, filled, pushes, _ = self._counts()
        if not filled:
            return 0.0
        return float((pushes + 1 - self.pushed_at[:filled]).double().mean())

    # ---- states --------------------------------------------------------------------------------

    def _apply(self, fn: Any, *args: Any, **kwargs: Any) -> EmbeddingMemory:
        """Moves and casts as any module; but half() and bfloat16() do not round log_q."""
        log_q = self.log_q
        super()._apply(fn, *args, **kwargs)
        if self.log_q.dtype.itemsize < log_q.dtype.itemsize:
            self.log_q = log_q.to(self.log_q.device)
        return self

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """All of a memory or nothing: rows without their position are none, and a position is none
        without its rows."""
        kept = dict(self.named_buffers(recurse=False))
        found = {name: state_dict[prefix + name] for name in kept if prefix + name in state_dict}
        if found and len(found) < len(kept):
            missing_keys.extend(prefix + name for name in kept if name not in found)
            return
        wrong = [] if not found else _misfits(kept, found)
        if wrong:
            error_msgs.extend(f"{prefix}{text}" for text in wrong)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def extra_repr(self) -> str:
        filled = f", filled={len(self)}" if has_values(self.position) else ""
        return f"size={len(self.rows)}, dim={self.rows.shape[1]}{filled}"


def _misfits(kept: dict[str, Tensor], found: dict[str, Any]) -> list[str]:
    """Why the buffers of another memory do not fit."""
    wrong = []
    for name, x in found.items():
        mine = kept[name]
        if not isinstance(x, Tensor):
            wrong.append(f"{name}: expected a torch.Tensor, got {describe(x)}")
        elif x.shape != mine.shape or x.is_floating_point() != mine.is_floating_point():
            wrong.append(f"{name}: expected {describe(mine)}, got {describe(x)}")
    if wrong or not has_values(found["position"]):
        return wrong
    size = len(kept["rows"])
    at, filled, pushes, has_log_q = found["position"].tolist()
    if not (0 <= at < size and 0 <= filled <= size and pushes >= 0 and has_log_q in (0, 1)):
        wrong.append(
            f"position: expected a place below {size}, at most {size} rows, "
            "a number of pushes and 0 or 1, "
            f"got {[at, filled, pushes, has_log_q]}"
        )
    return wrong
