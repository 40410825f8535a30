"""The processes whose items are candidates: what they agree on before a loss, and how rows travel
between them.

torch.distributed alone. No gradient travels where rows can: columns are gathered in the forward
pass, rows (with their log-sum-exp and weight) in the backward, and each process finishes the
gradient of its own columns. One collective carries all of it, a padded all-gather of bytes, in one
round or in several of bounded memory; the next round is under way while the last one is computed
with.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..layouts import describe

_ERRORS = {"ValueError": ValueError, "TypeError": TypeError, "RuntimeError": RuntimeError}
_cpu_groups: dict[str, tuple[Any, Any]] = {}
WORLD = "world"


def _all_gather(out: Tensor, mine: Tensor, group: Any, async_op: bool = False) -> Any:
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return gather(out, mine, group=group, async_op=async_op)


def _reduce_scatter(mine: Tensor, every: Tensor, group: Any) -> None:
    reduce = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    reduce(mine, every, group=group)


def _cpu_group(group: Any) -> Any:
    """Where host integers travel: the group itself if it has a backend for the CPU, else one made
    beside it."""
    if "cpu" in {str(d) for d in group._device_types}:
        return group
    of, found = _cpu_groups.get(group.group_name, (None, None))
    if of is not group:  # a later init_process_group gives the same names again
        ranks = dist.get_process_group_ranks(group)
        found = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
        _cpu_groups[group.group_name] = group, found
    return found


class Group:
    """What a module was given as its `group`, and goes with it: copies share it, a pickled module
    has it by its name.

    `world`: the processes of torch.distributed as they are at the call.
    """

    def __init__(self, given: Any) -> None:
        check_group(given)
        self.given = given

    def __deepcopy__(self, memo: Any) -> Group:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        given = self.given
        if isinstance(given, dist.ProcessGroup):
            given = (
                WORLD if given is dist.group.WORLD else _Lost(dist.get_process_group_ranks(given))
            )
        return Group, (given,)

    def __repr__(self) -> str:
        return repr(self.given) if self.given is None or self.given == WORLD else "ProcessGroup"


class _Lost:
    """A process group of some of the processes, which no other program has."""

    def __init__(self, ranks: list[int]) -> None:
        self.ranks = ranks


def check_group(group: Any) -> None:
    """TypeError unless it is None, "world" or a process group."""
    kinds: tuple[type, ...] = (type(None), _Lost)
    if dist.is_available():
        kinds += (dist.ProcessGroup,)
    if not (isinstance(group, kinds) or (isinstance(group, str) and group == WORLD)):
        raise TypeError(
            'group: expected a torch.distributed ProcessGroup this process is in, "world" or None, '
            f"got {describe(group)}"
        )


def resolved(group: Any) -> Any:
    """The process group that is meant now, or None for this process alone."""
    check_group(group)
    if isinstance(group, _Lost):
        raise ValueError(
            "group: expected a process group, got a copy from a file of one of ranks "
            f"{group.ranks[:8]}, which is not in this program: give group at the call"
        )
    if not isinstance(group, str):
        return group
    if dist.is_available() and dist.is_initialized():
        return dist.group.WORLD
    if int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ValueError(
            'group: expected torch.distributed.init_process_group before a call with "world", '
            f"as WORLD_SIZE is {os.environ['WORLD_SIZE']}, got a call without it"
        )
    return None


def warn_of_early_none(group: Any) -> bool:
    """Whether None may be torch.distributed.group.WORLD, asked for before init_process_group, when
    it is None; says so where other processes are likely."""
    if group is not None or not dist.is_available() or dist.is_initialized():
        return False
    launched = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE"} & set(os.environ)
    if launched and os.environ.get("WORLD_SIZE") != "1":
        warnings.warn(f"group: got None {_EARLY}", stacklevel=4)
        return False
    return True


_EARLY = (
    "before init_process_group, where torch.distributed.group.WORLD is None, too: candidates are "
    "those of this process. "
    'Give group="world" for those of all, or leave group out'
)


def warn_of_late_world() -> bool:
    """At a call of a module for which `warn_of_early_none` was true: whether it is settled."""
    if not dist.is_initialized():
        return False
    if dist.get_world_size() > 1:
        warnings.warn(f"group: it was None {_EARLY}", stacklevel=4)
    return True


class Participants:
    """The processes of a group in one call of a loss. Every call sends one line of integers around
    before anything else; an error or a disagreement is found there, and raised by all."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: expected a process group this process is in, got another")
        self.agreed = False

    @classmethod
    def of(cls, group: Any) -> Participants | None:
        """None for no group; "world" is that of this moment."""
        if isinstance(group, Group):
            group = group.given
        if group is not None:
            group = resolved(group)
        return None if group is None else cls(group)

    # ---- agreement -------------------------------------------------------------------------------

    def agree(self, facts: dict[str, Any], sizes: Sequence[int]) -> list[list[int]]:
        """Each size on every process [len(sizes)][W]. `facts` have to be the same everywhere."""
        found = self.compare(facts, sizes, None)
        self.agreed = True
        return found

    def compare(
        self, facts: dict[str, Any], sizes: Sequence[int], error: Exception | None
    ) -> list[list[int]]:
        self.agreed = True  # whatever is raised from here on, the others raise as well
        digest = hashlib.blake2b(repr(sorted(facts.items())).encode(), digest_size=7).digest()
        most = 6  # as long whatever is called: processes may disagree about that, too
        line = [error is not None, int.from_bytes(digest, "big"), *sizes]
        mine = torch.tensor(line + [0] * (most + 2 - len(line)), dtype=torch.int64, device="cpu")
        every = torch.empty(self.size * len(mine), dtype=torch.int64, device="cpu")
        _all_gather(every, mine, _cpu_group(self.group))
        table = every.view(self.size, -1)
        if bool(table[:, 0].any()) or bool((table[:, 1] != table[0, 1]).any()):
            self._raise(facts, error)
        return table[:, 2 : 2 + len(sizes)].T.tolist()

    def _raise(self, facts: dict[str, Any], error: Exception | None) -> None:
        text = None if error is None else (type(error).__name__, str(error))
        every = self._gather_json([text, {name: repr(value) for name, value in facts.items()}])
        for rank, (found, _) in enumerate(every):
            if found is not None:
                kind = _ERRORS.get(found[0], RuntimeError)
                raise kind(f"rank {rank}: {found[1]}") from error
        first = every[0][1]
        for rank, (_, here) in enumerate(every):
            for name in first | here:
                if first.get(name) != here.get(name):
                    raise ValueError(
                        f"{name}: expected the same on every process, "
                        f"got {first.get(name)} on rank 0 and "
                        f"{here.get(name)} on rank {rank}"
                    )

    def _gather_json(self, mine: Any) -> list[Any]:
        """What each process gives; as JSON, since torch.distributed's objects are pickled."""
        text, group = json.dumps(mine).encode(), _cpu_group(self.group)
        lengths = torch.empty(self.size, dtype=torch.int64, device="cpu")
        _all_gather(lengths, torch.tensor([len(text)], device="cpu"), group)
        longest = int(lengths.max())
        every = torch.empty(self.size * longest, dtype=torch.uint8, device="cpu")
        mine = torch.tensor(list(text.ljust(longest)), dtype=torch.uint8, device="cpu")
        _all_gather(every, mine, group)
        return [json.loads(bytes(part.tolist())) for part in every.split(longest)]

    def sum(self, x: Tensor) -> Tensor:
        """Of all processes; on the device, without a host synchronisation."""
        total = x.clone()
        dist.all_reduce(total, group=self.group)
        return total

    # ---- rows that travel ------------------------------------------------------------------------

    def others(
        self, fields: Sequence[Tensor | None], counts: Sequence[int], rounds: int
    ) -> Iterator[tuple[list[Any], list[int]]]:
        """The rows of the other processes, a block for each round; the first transfer begins at
        once.

        `fields`: tensors [counts[rank], ...] that belong together, None as everywhere. A block's
        rows are those of the next process, and so on around; with it comes how many rows each
        process has in this round.
        """
        present = [f for f in fields if f is not None]
        size = -(-max(counts) // rounds) if max(counts) else 0
        if self.size == 1 or not size:
            return iter(())
        mine = torch.cat([_bytes(f) for f in present], 1)

        def start(number: int) -> tuple[Any, Tensor]:
            part = mine[number * size : (number + 1) * size]
            if len(part) < size:
                part = torch.nn.functional.pad(part, (0, 0, 0, size - len(part)))
            out = part.new_empty(self.size * size, part.shape[1])
            return _all_gather(out, part.contiguous(), self.group, async_op=True), out

        def blocks(under_way: tuple[Any, Tensor]) -> Iterator[tuple[list[Any], list[int]]]:
            for number in range(rounds):
                work, out = under_way
                work.wait()
                if number + 1 < rounds:
                    under_way = start(number + 1)
                every = out.view(self.size, size, -1)
                live = [min(max(n - number * size, 0), size) for n in counts]
                yield (
                    _fields(torch.cat([every[r, : live[r]] for r in self._around()]), fields),
                    live,
                )

        return blocks(start(0))

    def every(self, fields: Sequence[Tensor | None], counts: Sequence[int]) -> list[Any]:
        """The rows of all processes, in the order of the ranks."""
        parts: dict[int, list[Any]] = {self.rank: list(fields)}
        for found, live in self.others(fields, counts, 1):
            order = self._around()
            split = [
                [None] * len(order) if x is None else x.split([live[r] for r in order])
                for x in found
            ]
            parts |= {r: [x[i] for x in split] for i, r in enumerate(order)}
        ranks = sorted(parts)
        return [
            None if x is None else torch.cat([parts[r][i] for r in ranks])
            for i, x in enumerate(fields)
        ]

    def home(self, rows: Tensor, live: Sequence[int]) -> Tensor:
        """The sum of what the others have for this process's rows [live[rank], D], for what this
        one has for theirs, a block of `others`."""
        size = max(live)
        every = rows.new_zeros(self.size, size, rows.shape[1])
        order = self._around()
        for rank, part in zip(order, rows.split([live[r] for r in order]), strict=True):
            every[rank, : live[rank]] = part
        mine = rows.new_empty(size, rows.shape[1])
        _reduce_scatter(mine, every.view(-1, rows.shape[1]), self.group)
        return mine[: live[self.rank]]

    def _around(self) -> list[int]:
        return [(self.rank + i) % self.size for i in range(1, self.size)]


@contextmanager
def reporting(processes: Participants | None) -> Iterator[None]:
    """An error in here, before the processes agreed, is raised by all of them, with the rank:
    nobody waits in vain."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if processes is None or processes.agreed:
            raise
        processes.compare({}, [], error)
        raise


def rounds_of(exchange: str, size: int, rows: int, row_bytes: int, workspace: int) -> int:
    """Rounds that `rows` of each of `size` processes are divided into; two are held at a time."""
    if exchange == "gather" or not rows:
        return 1
    needed = -(-2 * size * rows * row_bytes // workspace)
    rounds = max(needed, size if exchange == "ring" else 1)
    return 1 if needed <= 1 and exchange == "auto" else min(rounds, rows)


def _bytes(x: Tensor) -> Tensor:
    """[n, bytes of a row] uint8."""
    return (x if x.dim() == 2 else x[:, None]).contiguous().view(torch.uint8)


def _fields(rows: Tensor, like: Sequence[Tensor | None]) -> list[Any]:
    found: list[Any] = []
    at = 0
    for x in like:
        if x is None:
            found.append(None)
            continue
        width = x.element_size() * (x.shape[1] if x.dim() == 2 else 1)
        part = rows.new_empty(len(rows), width).copy_(rows[:, at : at + width]).view(x.dtype)
        found.append(part if x.dim() == 2 else part.view(-1))
        at += width
    return found
