"""What an exported file is worth: parity with PyTorch on photos, ranking, and images per second."""

from __future__ import annotations

import copy
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from ..data.dataset import Dataset
from ..data.images.pictures import Reader, fastest_reader
from ..data.images.transforms import eval_windows
from ..evaluate.comparison import compare
from ..evaluate.methods import Method
from ..nearest import exact_search
from .module import Serving

Array = npt.NDArray
Run = Callable[[Array], Array]

# float32: |found - exact| <= 2 max(|eager - exact|, |rounded - exact|) + one rounding, in the l2
# and in the max norm over all inputs; the others by their cosines with the exact vectors.
ROUNDING = 2.0**-24
DRAWS = 2  # of rounded
LEAST_COSINE = {"float16": 0.999, "int8": 0.995}
MEAN_COSINE = {"float16": 0.9999, "int8": 0.999}
LEAST_OVERLAP = 0.95  # of the 10 nearest among at most NEIGHBOURS items
NEIGHBOURS = 2000


def pixels_of(
    dataset: Dataset, rows: Array, size: int, read: Reader | None = None
) -> tuple[Array, Array]:
    """Pictures [n, size, size, 3] uint8 of some items, as they are served or by `read`, and which
    of them [n] could be decoded."""
    read, store = read or fastest_reader(), dataset.images
    out, good = np.zeros((len(rows), size, size, 3), np.uint8), np.zeros(len(rows), bool)
    windows = eval_windows(store.shapes[rows])
    for i, image in enumerate(store.take(rows.tolist())):
        try:
            out[i], good[i] = read(image, windows[i], size), True
        except Exception:  # damaged
            continue
    return out, good


def some_photos(dataset: Dataset, count: int, size: int) -> Array:
    """`count` photos at most, spread over the items."""
    rows = np.flatnonzero(dataset.images.present)
    if not len(rows):
        raise ValueError(f"dataset: expected items with images, got none in {dataset.path}")
    rows = rows[np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))]
    pixels, good = pixels_of(dataset, rows, size)
    return pixels[good]


# ---- parity --------------------------------------------------------------------------------------


class Parity:
    """Inputs [n, ...], and what the encoder makes of them: eagerly; exactly, in float64; and
    rounded: exactly, but with every weight and every module's output off by one rounding of
    float32. Eager code is one draw of its errors, and on few inputs a lucky one."""

    def __init__(self, serving: Serving, inputs: Array, batch: int = 32) -> None:
        self.inputs, self.batch = inputs, batch
        self.eager = self._all(run_of(serving))
        exact = copy.deepcopy(serving).double()
        self.exact = self._all(run_of(exact))
        self.rounded = [self._all(run_of(_off_by_roundings(exact, seed))) for seed in range(DRAWS)]

    def _all(self, run: Run) -> Array:
        parts = range(0, len(self.inputs), self.batch)
        return np.concatenate([run(self.inputs[i : i + self.batch]) for i in parts])

    def same(self, module: nn.Module) -> bool:
        """Whether a module gives the bits of eager code."""
        return np.array_equal(self._all(run_of(module)), self.eager)

    def of(self, run: Run) -> dict[str, float]:
        """Numbers about what a file makes of the inputs."""
        found = self._all(run).astype(np.float64)
        cosines = (found * self.exact).sum(1) / np.linalg.norm(found, axis=1)
        error, eager, *model = (np.abs(x - self.exact) for x in (found, self.eager, *self.rounded))
        shares = []
        for norm in (lambda x: float(np.sqrt((x**2).mean())), lambda x: float(x.max())):
            yardstick = max(norm(x) for x in (eager, *model))
            shares.append(norm(error) / (2 * yardstick + ROUNDING * norm(np.abs(self.exact))))
        return {
            "cosine_min": float(cosines.min()),
            "cosine_mean": float(cosines.mean()),
            "error": float(error.max()),
            "error_eager": float(eager.max()),
            "budget_share": max(shares),
        }


def _off_by_roundings(exact: Serving, seed: int) -> Serving:
    moved = copy.deepcopy(exact)
    generator = torch.Generator().manual_seed(seed)

    def off(x: Tensor) -> Tensor:
        u = 2 * torch.rand(x.shape, generator=generator) - 1
        return x * (1 + ROUNDING * u.double())

    with torch.no_grad():
        for weight in moved.parameters():
            weight.copy_(off(weight))
    for module in moved.modules():
        module.register_forward_hook(lambda module, given, result: off(result))
    return moved


def why_refused(precision: str, numbers: Mapping[str, float]) -> str:
    """How a file of that precision breaks its budget; "" if it keeps it."""
    if precision == "float32":
        if not numbers["budget_share"] <= 1:
            return (
                f"its error is {numbers['budget_share']:.2f} times the budget "
                "(2 x that of eager code or of the model of rounding + one rounding)"
            )
        return ""
    wanted = {"cosine_min": LEAST_COSINE[precision], "cosine_mean": MEAN_COSINE[precision]}
    if "overlap10" in numbers and precision == "int8":
        wanted["overlap10"] = LEAST_OVERLAP
    wrong = [
        f"{name} {numbers[name]:.5f}, expected at least {least}"
        for name, least in wanted.items()
        if not numbers[name] >= least
    ]
    return "; ".join(wrong)


def run_of(serving: nn.Module) -> Run:
    """The module as a function of arrays."""

    def run(inputs: Array) -> Array:
        with torch.inference_mode():
            return serving(torch.from_numpy(inputs)).numpy()

    return run


# ---- ranking -------------------------------------------------------------------------------------


def tables_of(
    dataset: Dataset,
    runs: Mapping[str, Run],
    size: int,
    read: Reader | None = None,
    batch: int = 64,
) -> dict[str, Array]:
    """Embeddings [items, dim] float32 of the whole catalogue by every run; NaN without a picture.
    Each picture is decoded once."""
    found: dict[str, Array] = {}
    rows = np.flatnonzero(dataset.images.present)
    for start in range(0, len(rows), batch):
        some = rows[start : start + batch]
        pixels, good = pixels_of(dataset, some, size, read)
        if not good.any():
            continue
        for name, run in runs.items():
            vectors = run(pixels[good])
            table = found.setdefault(
                name, np.full((dataset.num_items, vectors.shape[1]), np.nan, np.float32)
            )
            table[some[good]] = vectors
    return found


def ranking(dataset: Dataset, tables: Mapping[str, Array], split: str) -> dict[str, dict[str, Any]]:
    """HR@10 among 100 sampled items with its interval, its paired difference to the first table,
    and the overlap of neighbours with it."""
    methods = [Method(name, table) for name, table in tables.items()]
    result = compare(dataset, methods, split=split, candidates=("sampled",), k=(10,))
    one = result["sets"]["sampled"]
    (metric,) = (m for m in one["methods"][methods[0].name] if m.lower() == "hr@10")
    found: dict[str, dict[str, Any]] = {}
    base = methods[0].embeddings
    for method in methods:
        numbers: dict[str, Any] = {"hr10": one["methods"][method.name][metric]}
        if method is not methods[0]:
            minus = one["differences"][method.name][metric]  # the first minus this one
            numbers["hr10_minus_float32"] = {
                "mean": -minus["mean"],
                "low": -minus["high"],
                "high": -minus["low"],
            }
        assert base is not None and method.embeddings is not None
        numbers["overlap10"] = overlap(base, method.embeddings)
        found[method.name] = numbers
    return found


def overlap(a: Array, b: Array, k: int = 10, most: int = NEIGHBOURS) -> float:
    """Share of each item's k nearest by cosine that two tables [items, D] of unit rows have in
    common, over the first `most` with both."""
    rows = np.flatnonzero(np.isfinite(a).all(1) & np.isfinite(b).all(1))[:most]
    k = min(k, len(rows) - 1)
    if k < 1:
        return 1.0
    own = np.arange(len(rows))
    one, other = (exact_search(x[rows], x[rows], k, own=own)[0] for x in (a, b))
    return float(np.mean([len(np.intersect1d(x, y)) / k for x, y in zip(one, other, strict=True)]))


# ---- speed ---------------------------------------------------------------------------------------


def speed(
    runs: Mapping[str, Run], inputs: Array, rounds: int = 7, seconds: float = 0.5
) -> dict[str, float]:
    """Inputs per second of each, the median of rounds with all in turn; without decoding."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run(inputs)
    for _ in range(rounds):
        for name, run in runs.items():
            count, began = 0, time.perf_counter()
            while (took := time.perf_counter() - began) < seconds:
                run(inputs)
                count += len(inputs)
            rates[name].append(count / took)
    return {name: statistics.median(values) for name, values in rates.items()}


def machine(threads: int) -> str:
    """The processor and the threads used."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        pass
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
