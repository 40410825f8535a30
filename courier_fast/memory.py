"""Embeddings of earlier batches as further candidates (cross-batch memory: XBM, CVPR 2020; for recommenders CBNS, SIGIR 2021)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .peers import Peers, reporting


class EmbeddingMemory(nn.Module):
    """The last `size` embeddings that were pushed, with their ids; a ring buffer, saved in the state_dict.

        memory = EmbeddingMemory(65536, 256)
        rows, ids, log_q = memory.read()
        loss = loss_fn(pv, history, clicked, item_ids=item_ids, memory=rows, memory_ids=ids)
        memory.push(pv, item_ids)

    Push after the loss, so that a batch never meets itself. Rows are as old as the memory is deep: start with one once
    embeddings move slowly, and watch `age`. With DistributedDataParallel, push with `group`, and keep the module outside of
    what is wrapped: every process then holds the same rows, and nothing has to be broadcast.

    Args:
        size: rows, at least 1.
        dim: features of an embedding.
        dtype: of what is kept; embeddings are rounded to it.
    """

    rows: Tensor
    ids: Tensor
    log_q: Tensor
    pushed_at: Tensor
    position: Tensor

    def __init__(self, size: int, dim: int, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        for name, value in (("size", size), ("dim", dim)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{name}: expected at least 1, got {value}")
        self.register_buffer("rows", torch.zeros(size, dim, dtype=dtype))
        self.register_buffer("ids", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("log_q", torch.zeros(size))
        self.register_buffer("pushed_at", torch.zeros(size, dtype=torch.int64))
        # Where the next row goes, rows that are filled, pushes, and whether they came with log_q; on the host as well.
        self.register_buffer("position", torch.zeros(4, dtype=torch.int64))
        self._next, self._filled, self._pushes, self._has_log_q = 0, 0, 0, False

    def __len__(self) -> int:
        """Rows that are filled."""
        return self._filled

    @torch.no_grad()
    def push(
        self, embeddings: Tensor, ids: Tensor, log_q: Tensor | None = None, group: Any = None
    ) -> None:
        """Keeps `embeddings` [n, D] with `ids` [n] (integers) and, if all pushes have it, `log_q` [n], in place of the oldest.

        `group`: a torch.distributed ProcessGroup, all of whose processes call this: each keeps the rows of all, in the order
        of the ranks. Raises ValueError or TypeError if the arguments do not fit, with a group on every process.
        """
        peers = Peers.of(group)
        if peers is None:
            self._check(embeddings, ids, log_q)
        else:
            with reporting(peers):
                self._check(embeddings, ids, log_q)
                facts = {"memory": tuple(self.rows.shape), "log_q": log_q is not None}
                counts = peers.agree(facts, [len(ids)])[0]
            given = [embeddings.to(self.rows), ids.to(self.ids), log_q]
            embeddings, ids, log_q = peers.every(given, counts)
        size = len(self.rows)
        fields = [(self.rows, embeddings), (self.ids, ids)]
        if log_q is not None:
            fields.append((self.log_q, log_q))
        n = min(len(ids), size)
        first = min(n, size - self._next)
        self._pushes += 1
        for kept, given_rows in fields:
            last = given_rows[len(given_rows) - n :].to(kept)
            kept[self._next : self._next + first] = last[:first]
            kept[: n - first] = last[first:]
        self.pushed_at[self._next : self._next + first] = self._pushes
        self.pushed_at[: n - first] = self._pushes
        self._next = (self._next + n) % size
        self._filled = min(self._filled + n, size)
        self._has_log_q = log_q is not None
        state = [self._next, self._filled, self._pushes, self._has_log_q]
        self.position.copy_(torch.tensor(state, dtype=torch.int64))

    def _check(self, embeddings: Tensor, ids: Tensor, log_q: Tensor | None) -> None:
        dim = self.rows.shape[1]
        if embeddings.dim() != 2 or embeddings.shape[1] != dim:
            raise ValueError(f"embeddings: expected [n, {dim}], got {list(embeddings.shape)}")
        if not embeddings.is_floating_point():
            raise TypeError(f"embeddings: expected a floating tensor, got {embeddings.dtype}")
        for name, x in (("ids", ids), ("log_q", log_q)):
            if x is not None and x.shape != embeddings.shape[:1]:
                raise ValueError(f"{name}: expected [{len(embeddings)}], got {list(x.shape)}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise TypeError(f"ids: expected integers, got {ids.dtype}")
        if self._filled and (log_q is not None) != self._has_log_q:
            before = "with" if self._has_log_q else "without"
            raise ValueError(f"log_q: expected as in the pushes before, which were {before} it")

    def read(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """(rows [Q, D], ids [Q], log_q [Q] or None): what is filled so far, without gradient. Not copies: a push changes
        them. A loss has what it needs of them, so it may come before the backward pass."""
        n = self._filled
        return self.rows[:n], self.ids[:n], self.log_q[:n] if self._has_log_q else None

    def age(self) -> float:
        """Mean age of the rows in pushes, 1 for those of the last one; 0 if there are none."""
        if not self._filled:
            return 0.0
        return float((self._pushes + 1 - self.pushed_at[: self._filled]).double().mean())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._next, self._filled, self._pushes, has_log_q = self.position.tolist()
        self._has_log_q = bool(has_log_q)

    def extra_repr(self) -> str:
        return f"size={len(self.rows)}, dim={self.rows.shape[1]}, filled={self._filled}"
