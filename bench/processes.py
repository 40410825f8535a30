"""A loss over several processes: what it moves, what that costs, how much of it is hidden.

    python -m bench.processes

Gloo on the CPU; NCCL where there is a GPU for each process. Each process has a batch of the shape;
all step together.

bytes: counted at the collectives, received by a process in one step, forward and backward, beside
the formula. A padded all-gather moves the longest shard W - 1 times.

step: forward and backward, the slowest process of each step. "waiting": the same step, but each
transfer is waited for where it begins, so that none is under way while something is computed.
"transfers": the step's collectives alone, with nothing in between. All three take turns in one run.

hidden: median (p20 to p80) of (waiting - step) / transfers, turn by turn; whoever waits at each
transfer also waits for slower processes, so it can be more than all, and on shared cores the spread
says how much of it to believe.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench.command import line_of, parser_of, write_json
from bench.measure import surroundings
from courier_fast.loss.union import exchange
from courier_fast.testing.batches import Batch, Options, Shape, call, make_batch

# What every call sends around first (exchange.Participants.compare), bytes of a process.
HEADER = 8 * 8
KINDS = ("step", "waiting", "transfers")


@dataclass(frozen=True)
class Case:
    """What is measured with every number of processes."""

    attention: str
    exchange: str
    ids: bool = False


CASES = (
    Case("anchor", "gather"),
    Case("anchor", "gather", ids=True),
    Case("anchor", "ring"),
    Case("candidate", "gather"),
    Case("candidate", "ring"),
)


@dataclass(frozen=True)
class Settings:
    shape: Shape
    dtype: str
    device: str
    repeats: int
    cases: tuple[Case, ...] = CASES


# ---- bytes ---------------------------------------------------------------------------------------


def predicted(
    case: Case, size: int, rows: int, anchors: int, dim: int, element: int, gpu: bool = False
) -> list[int]:
    """Bytes that a process receives [forward, backward]; `rows` and `anchors` are those of the
    process with most.

    Forward, a header and the columns: D s, and 8 for an id. Backward, with attention "anchor" the
    anchors: D s, 8 for an id, 8 for the log-sum-exp and 4 for the weight; with "candidate" the
    columns again, and 4 D for each that travel home. On a GPU, where nobody asks how many anchors
    there are, all rows travel as such, and 4 with a column: whether it is one.
    """
    if size == 1:
        return [0, 0]
    identity = 8 if case.ids else 0
    wide = dim * element + identity
    column = wide + (4 if gpu else 0)

    def moved(count: int, each: int) -> int:
        rounds = min(size, count) if case.exchange == "ring" else 1
        return (size - 1) * rounds * -(-count // max(rounds, 1)) * each

    forward = (size - 1) * HEADER + moved(rows, column)
    if case.attention == "candidate":
        return [forward, moved(rows, column) + moved(rows, 4 * dim)]
    return [forward, moved(rows if gpu else anchors, wide + 8 + 4)]


class _Done:
    def wait(self) -> None:
        pass


class Transfers:
    """What the collectives of a step are given: (name, this process's part, what all have)."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Tensor, Tensor]] = []

    def received(self, size: int) -> int:
        return sum((size - 1) * mine.numel() * mine.element_size() for _, mine, _ in self.seen)

    @contextmanager
    def noting(self) -> Iterator[None]:
        gather, scatter = exchange._all_gather, exchange._reduce_scatter

        def all_gather(out: Tensor, mine: Tensor, group: Any, async_op: bool = False) -> Any:
            self.seen.append(("gather", mine, out))
            return gather(out, mine, group, async_op)

        def reduce_scatter(mine: Tensor, every: Tensor, group: Any) -> None:
            self.seen.append(("scatter", mine, every))
            scatter(mine, every, group)

        with _replaced(all_gather, reduce_scatter):
            yield

    def again(self, group: Any) -> None:
        """All of it, and nothing else."""
        for name, mine, every in self.seen:
            if name == "scatter":
                exchange._reduce_scatter(mine, every, group)
            else:
                own = group if mine.device.type == "cuda" else exchange._cpu_group(group)
                exchange._all_gather(every, mine, own)


@contextmanager
def _replaced(gather: Any, scatter: Any) -> Iterator[None]:
    before = exchange._all_gather, exchange._reduce_scatter
    exchange._all_gather, exchange._reduce_scatter = gather, scatter
    try:
        yield
    finally:
        exchange._all_gather, exchange._reduce_scatter = before


@contextmanager
def waiting() -> Iterator[None]:
    """Transfers are waited for where they begin."""
    gather = exchange._all_gather

    def at_once(out: Tensor, mine: Tensor, group: Any, async_op: bool = False) -> Any:
        gather(out, mine, group)
        if out.device.type == "cuda":
            torch.cuda.synchronize()
        return _Done()

    with _replaced(at_once, exchange._reduce_scatter):
        yield


# ---- one process ---------------------------------------------------------------------------------


def forward(batch: Batch, case: Case, group: Any) -> Tensor:
    return call(batch, "auto", group=group, exchange=case.exchange)


def counted(batch: Batch, case: Case, group: Any) -> tuple[list[int], Transfers]:
    """Bytes that a step receives [forward, backward]."""
    size = dist.get_world_size(group)
    both, after = Transfers(), Transfers()
    with both.noting():
        loss = forward(batch, case, group)
        first = both.received(size)
        with after.noting():
            torch.autograd.grad(loss, list(batch.inputs.values()))
    return [first, after.received(size)], both


def slowest(work: Callable[[], object], group: Any, device: torch.device) -> float:
    """Seconds of the process that took longest."""
    dist.barrier(group)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    mine = torch.tensor(time.perf_counter() - start, dtype=torch.float64, device=device)
    dist.all_reduce(mine, dist.ReduceOp.MAX, group=group)
    return float(mine)


def measured(case: Case, settings: Settings, group: Any, device: torch.device) -> dict[str, Any]:
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    options = Options(ids=case.ids, attention=case.attention)
    batch = make_batch(settings.shape, options, getattr(torch, settings.dtype), device, seed=rank)
    inputs = list(batch.inputs.values())
    moved, transfers = counted(batch, case, group)

    def step() -> None:
        torch.autograd.grad(forward(batch, case, group), inputs)

    def waiting_step() -> None:
        with waiting():
            step()

    work = {"step": step, "waiting": waiting_step, "transfers": lambda: transfers.again(group)}
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for repeat in range(settings.repeats + 1):
        for kind in KINDS:
            taken = slowest(work[kind], group, device)
            if repeat:  # the first warms up
                seconds[kind].append(taken)
    longest = torch.tensor([batch.rows, batch.anchors], device=device)
    dist.all_reduce(longest, dist.ReduceOp.MAX, group=group)
    rows, anchors = longest.tolist()
    element = inputs[0].element_size()
    found = {kind: torch.tensor(x, dtype=torch.float64) for kind, x in seconds.items()}
    times = {kind: float(x.median()) for kind, x in found.items()}
    hidden = None
    if size > 1:
        share = (found["waiting"] - found["step"]) / times["transfers"]
        hidden = share.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
    return asdict(case) | {
        "processes": size,
        "rows": rows,
        "anchors": anchors,
        "bytes": moved,
        "predicted": predicted(
            case, size, rows, anchors, batch.dim, element, device.type == "cuda"
        ),
        "seconds": times,
        "hidden": hidden,
    }


def _process(rank: int, size: int, folder: str, settings: Settings) -> None:
    device = torch.device(settings.device, rank if settings.device == "cuda" else None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // size))
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=f"file://{folder}/rendezvous-{size}",
        rank=rank,
        world_size=size,
    )
    group = dist.group.WORLD
    found = [measured(case, settings, group, device) for case in settings.cases]
    if rank == 0:
        Path(folder, f"{size}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def measure(sizes: Sequence[int], settings: Settings) -> list[dict[str, Any]]:
    """A row for each case and number of processes."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            torch.multiprocessing.spawn(_process, (size, folder, settings), nprocs=size)
            found += json.loads(Path(folder, f"{size}.json").read_text())
    return found


# ---- the command ---------------------------------------------------------------------------------


def report(result: dict[str, Any]) -> str:
    shape = result["shape"]
    lines = [line_of(result["surroundings"]), ""]
    lines.append(
        f"{result['backend']}, {result['dtype']}, of each process {shape['pages']:,} pages of "
        f"{shape['items']} items, D = {shape['dim']}"
    )
    if result["backend"] == "gloo":
        cores = os.cpu_count()
        lines.append(
            f"All processes share {cores} cores, which also carry the transfers: times compare "
            "exchanges, they say nothing of scaling."
        )
    lines += [
        "",
        f"{'W':>2} {'attention':<10}{'exchange':<9}{'ids':<4}"
        f"{'MB forward (formula)':>22}{'MB backward (formula)':>22}"
        f"{'step ms':>9}{'waiting':>9}{'transfers':>10}{'hidden':>21}",
    ]
    for row in result["rows"]:
        moved = [
            f"{m / 1e6:.3f} ({p / 1e6:.3f})"
            for m, p in zip(row["bytes"], row["predicted"], strict=True)
        ]
        times = [row["seconds"][kind] * 1e3 for kind in KINDS]
        hidden = ""
        if row["hidden"] is not None:
            low, middle, high = (100 * x for x in row["hidden"])
            hidden = f"{middle:.0f}% ({low:.0f} to {high:.0f})"
        lines.append(
            f"{row['processes']:>2} "
            f"{row['attention']:<10}{row['exchange']:<9}{'yes' if row['ids'] else '':<4}"
            f"{moved[0]:>22}{moved[1]:>22}{times[0]:>9.1f}{times[1]:>9.1f}{times[2]:>10.1f}{hidden:>21}"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code 1 if a count differs from its formula."""
    parser = parser_of("bench.processes", __doc__)
    add = parser.add_argument
    add("--processes", type=int, nargs="+", default=[1, 2, 4], metavar="W")
    add("--device", choices=("cuda", "cpu"), help="default: cuda with a GPU for each process")
    add("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    add("--pages", type=int, default=512, help="of each process")
    add("--dim", type=int, default=256)
    add("--repeats", type=int, default=20)
    add("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    enough = torch.cuda.device_count() >= max(args.processes)
    device = args.device or ("cuda" if enough else "cpu")
    if device == "cuda" and not enough:
        parser.error(
            f"--device cuda: expected a GPU for each process, got {torch.cuda.device_count()}"
        )
    shape = replace(Shape(512, 5, 20, 256, 0.2), pages=args.pages, dim=args.dim)
    settings = Settings(shape, args.dtype, device, args.repeats)
    rows = measure(args.processes, settings)
    result = {
        "surroundings": surroundings(torch.device(device)),
        "backend": "nccl" if device == "cuda" else "gloo",
        "dtype": args.dtype,
        "shape": asdict(shape),
        "rows": rows,
    }
    print(report(result))
    write_json(args.json, result)
    return int(any(row["bytes"] != row["predicted"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
