"""What a step moves: every launch of forward and backward, and the bytes that it reads and writes,
without a GPU.

    python -m bench.traffic [--shape paper paper50 big20 big100] [--json FILE]

Walks through the pipeline with tensors that hold nothing, as in tests/test_memory.py, and notes
every kernel and every operator of PyTorch. Bytes come from a formula for each kernel: each row that
it touches, once. What is read again is taken to come from the second-level cache, so the time at
the copy's rate is a floor, and no prediction where a kernel waits.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bench.command import parser_of, write_json
from bench.problems import SHAPES
from courier_fast.testing.batches import Shape

# One H100 80GB: a copy's bytes a second, a large bfloat16 product's flops a second,
# multiprocessors.
BYTES_PER_SECOND, FLOPS_PER_SECOND, PROCESSORS = 3e12, 791e12, 132


@dataclass(frozen=True)
class Sizes:
    """Of a batch whose counts are what they are on average."""

    pages: int
    rows: int  # N
    anchors: int  # M
    history: int  # K
    dim: int
    parts: float = 1.0  # rows of partial sums that the forward pass leaves for an anchor
    element: int = 2

    def vectors(self, count: float) -> float:
        """Bytes of so many rows of D."""
        return count * self.dim * self.element


Formula = Callable[[Sizes], float]

# Bytes read and written, in the order of the tensors' first use; the bookkeeping's few bytes of a
# block are left out.
# fmt: off
BYTES: dict[str, Formula] = {
    # both offsets, clicked; page and four flags of a row, page of a history row
    "mark_rows": lambda s: 16 * s.pages + s.rows + (4 + 4) * s.rows + 4 * s.history,
    # flags, page; four prefix sums; list and page of anchors and columns
    "compact": lambda s: (4 + 4) * s.rows + 16 * s.rows + 8 * (s.anchors + s.rows),
    # list, E; e
    "normalize_rows": lambda s: 4 * s.rows + s.vectors(2 * s.rows),
    # lists, E of anchors, C with its pages; r, norm, positive's two cosines, log-sum-exp
    "attend": lambda s: 8 * s.anchors + s.vectors(2 * s.anchors + s.history) + 4 * s.history
    + 16 * s.anchors,
    # both sides with ids; the sums, their maximum and total, in parts
    "contrast forward": lambda s: s.vectors(s.anchors + s.rows) + 4 * (s.anchors + s.rows)
    + s.parts * (s.vectors(s.anchors) + 8 * s.anchors),
    # parts, list, cosines; loss, log-sum-exp, 1 - p
    "finish_rows": lambda s: 8 * s.parts * s.anchors + 8 * s.anchors + 12 * s.anchors,
    "reduce_loss": lambda s: 8 * s.anchors,
    # both sides with ids, log-sum-exps; a row of dL/dE
    "contrast transposed": lambda s: s.vectors(s.rows + s.anchors) + 4 * (s.rows + s.anchors)
    + 4 * s.anchors + s.vectors(s.rows) + 4 * s.rows,
    # list, flag, place, parts with their maximum, lse, 1 - p, E, r, norm; dL/dR
    "reconstruction_gradient": lambda s: 9 * s.anchors
    + s.parts * (s.vectors(s.anchors) + 4 * s.anchors) + 12 * s.anchors
    + s.vectors(2 * s.anchors) + s.vectors(s.anchors),
    # lists, E and dL/dR of anchors, C with its pages; largest product, 1 / sum and delta
    "attend_sums": lambda s: 8 * s.anchors + s.vectors(2 * s.anchors + s.history) + 4 * s.history
    + 12 * s.anchors,
    # C with its pages, lists, those three, E and dL/dR of anchors; dL/dC
    "attend_dkv": lambda s: s.vectors(s.history) + 4 * s.history + 20 * s.anchors
    + s.vectors(2 * s.anchors) + s.vectors(s.history),
    # lists, those three, E and dL/dR of anchors, C with its pages; dq
    "attend_dq": lambda s: 20 * s.anchors + s.vectors(2 * s.anchors + s.history) + 4 * s.history
    + s.vectors(s.anchors),
    # three flags and places, 1 - p, the row of the transposed pass, E, r and dq of anchors; dL/dE
    "pv_gradient": lambda s: 15 * s.rows + 4 * s.anchors + s.vectors(2 * s.rows)
    + s.vectors(2 * s.anchors) + s.vectors(s.rows),
}
# fmt: on


@dataclass(frozen=True)
class Noted:
    """A launch, its grid and tensors by argument, or an operator of PyTorch and what it gives."""

    name: str
    grid: tuple[int, ...]
    arguments: dict[str, Any]


class _Kernel:
    def __init__(self, name: str, kernel: Any, noted: list[Noted]) -> None:
        self.name, self.kernel, self.noted = name, kernel, noted

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **more: Any) -> None:
            given = dict(zip(self.kernel.arg_names, args, strict=False)) | more
            values: dict[str, Any] = {}
            for argument, value in given.items():
                inside = value._asdict() if hasattr(value, "_asdict") else {}
                # Constants have names of their own.
                values |= {k if k.isupper() else f"{argument}.{k}": x for k, x in inside.items()}
                values[argument] = value
            name = self.name
            if name == "contrast":
                name += " forward" if values["NEED_SUM"] else " transposed"
            self.noted.append(Noted(name, tuple(int(n) for n in grid), values))

        return launch


class _Operators(TorchDispatchMode):
    """Notes what PyTorch itself would launch."""

    def __init__(self, noted: list[Noted]) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor) and x.numel()]
        if made and not func.is_view and not name.startswith(("empty", "new_empty", "detach")):
            self.noted.append(Noted(f"torch.{name}", (), {"out": made[0]}))
        return out


@contextmanager
def noting(modules: Sequence[ModuleType], noted: list[Noted]) -> Iterator[None]:
    """Kernels of these modules are noted instead of launched."""
    from triton.runtime.jit import KernelInterface

    kernels = [
        (module, name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, KernelInterface) and value.__module__ == module.__name__
    ]
    try:
        for module, name, value in kernels:
            setattr(module, name, _Kernel(name, value, noted))
        with _Operators(noted):
            yield
    finally:
        for module, name, value in kernels:
            setattr(module, name, value)


def walk(s: Sizes) -> list[Noted]:
    """A step of bfloat16 training: loss and gradients, packed, without options. Not under
    TRITON_INTERPRET=1."""
    from courier_fast.kernels.triton import (
        attention,
        attention_backward,
        chunked,
        contrast,
        gradients,
        plan,
        results,
        rows,
        table,
        tiles,
    )
    from courier_fast.kernels.triton import (
        loss as triton_loss,
    )
    from courier_fast.loss.problem import Needs
    from courier_fast.testing.problems import NoValues, problem

    forward = (plan, rows, attention, contrast, chunked, results)
    modules = (*forward, gradients, attention_backward, table)
    noted: list[Noted] = []
    before = tiles.programs
    tiles.programs = lambda device: PROCESSORS
    try:
        with FakeTensorMode():
            offsets = torch.empty(s.pages + 1, dtype=torch.int64)
            sides = (s.rows, offsets), (s.history, offsets.clone())
            p = problem(NoValues(), *sides, dim=s.dim, dtype=torch.bfloat16)
            needs = Needs(pv=True, history=True)
            with noting(modules, noted):
                loss, *_, saved = triton_loss.loss_forward(p, needs, False)
                triton_loss.loss_backward(p, needs, saved, loss)
    finally:
        tiles.programs = before
    return noted


def sizes(shape: Shape) -> Sizes:
    rows = shape.pages * shape.items
    history = shape.pages * (1 + shape.longest_history) // 2
    return Sizes(shape.pages, rows, round(rows * shape.clicked), history, shape.dim)


def parts(s: Sizes, launch: Noted) -> float:
    """Parts of a row tile in the forward pass, on average (`schedule` of triton/common.py)."""
    values = launch.arguments
    tiles = math.ceil(s.anchors / values["BLOCK_M"])
    blocks = math.ceil(s.rows / values["BLOCK_N"])
    programs: int = values["programs"]
    each = min(max(programs // tiles, 1), blocks)
    work = tiles * each
    if not values["STREAM"] or work * 10 >= math.ceil(work / programs) * programs * 9:
        return each
    share = math.ceil(tiles * blocks / programs)
    ends = [((t * blocks) // share, (t * blocks + blocks - 1) // share) for t in range(tiles)]
    return sum(last - first + 1 for first, last in ends) / tiles


def table(shape: Shape) -> list[dict[str, Any]]:
    """A row for each kernel: launches, bytes, microseconds for them, and for the products where
    there are some."""
    s = sizes(shape)
    noted = walk(s)
    forward = next(x for x in noted if x.name == "contrast forward")
    s = Sizes(s.pages, s.rows, s.anchors, s.history, s.dim, parts(s, forward))
    found = []
    for name in dict.fromkeys(x.name for x in noted):
        launches = [x for x in noted if x.name == name]
        if name in BYTES:
            moved = BYTES[name](s) * len(launches)
        else:  # an operator of PyTorch
            made = [x.arguments["out"] for x in launches]
            moved = float(sum(x.numel() * x.element_size() for x in made))
        flops = 4 * s.anchors * s.rows * s.dim if name.startswith("contrast") else 0
        found.append(
            {
                "kernel": name,
                "launches": len(launches),
                "programs": math.prod(launches[0].grid),
                "bytes": moved,
                "us": moved / BYTES_PER_SECOND * 1e6,
                "products_us": flops / FLOPS_PER_SECOND * 1e6,
            }
        )
    return found


def markdown(tables: dict[str, list[dict[str, Any]]]) -> str:
    names = list(dict.fromkeys(r["kernel"] for rows in tables.values() for r in rows))
    lines = [
        "| kernel | launches | " + " | ".join(f"{n}: MB, us" for n in tables) + " |",
        "| --- | --- " + "| --- " * len(tables) + "|",
    ]
    for name in names:
        cells, launches = [], 0
        for rows in tables.values():
            row = next((r for r in rows if r["kernel"] == name), None)
            cells.append("" if row is None else _cell(row))
            launches = max(launches, row["launches"] if row else 0)
        lines.append(f"| {name} | {launches} | " + " | ".join(cells) + " |")
    for label, rest in (("all", False), ("all but the contrast", True)):
        sums = []
        for rows in tables.values():
            some = [r for r in rows if not (rest and r["products_us"])]
            total = {k: sum(r[k] for r in some) for k in ("bytes", "us", "products_us")}
            sums.append(_cell(total))
        counts = max(
            sum(r["launches"] for r in rows if not (rest and r["products_us"]))
            for rows in tables.values()
        )
        lines.append(f"| **{label}** | {counts} | " + " | ".join(sums) + " |")
    return "\n".join(lines)


def _cell(row: dict[str, Any]) -> str:
    products = f" (products {row['products_us']:,.0f})" if row["products_us"] else ""
    return f"{row['bytes'] / 1e6:,.1f}, {row['us']:,.1f}{products}"


def main(arguments: Sequence[str] | None = None) -> int:
    # With it, kernels cannot be told from helpers.
    os.environ.pop("TRITON_INTERPRET", None)
    parser = parser_of("bench.traffic", __doc__)
    default = ("paper", "paper50", "big20", "big100")
    parser.add_argument("--shape", nargs="+", choices=default, default=default)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args(arguments)
    tables = {name: table(SHAPES[name]) for name in args.shape}
    print(markdown(tables))
    write_json(args.json, tables)
    return 0


if __name__ == "__main__":
    sys.exit(main())
