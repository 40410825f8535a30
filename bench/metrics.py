"""Time and memory of the metrics of predicted clicks, two predictions at a time, beside
scikit-learn where it is installed.

python -m bench.metrics [N ...] [--pages] [--double] [--weights]
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from courier_fast import metrics

BLOCK = 1 << 20


def draw(n: int, kind: str) -> tuple[npt.NDArray, npt.NDArray, npt.NDArray]:
    """Labels [n], two predictions [n] of which the first knows their probability, and users [n] of
    50 impressions each."""
    rng = np.random.default_rng(0)
    clicked, p = np.empty(n, np.bool_), np.empty((2, n), kind)
    for start in range(0, n, BLOCK):
        block = slice(start, start + BLOCK)
        a, b = rng.random((2, len(clicked[block])), np.float32)
        clicked[block] = b < 0.2 * a
        p[0, block], p[1, block] = a, (a + rng.random(len(a), np.float32)) / 2
    return clicked, p, np.arange(n, dtype=np.int32) // 50


def timed(name: str, function: Callable[[], Any]) -> None:
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 2**10
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    print(
        f"{name:44} {wall:8.2f} s {cpu:8.2f} s of processors, at most + {more:.2f} GiB", flush=True
    )


def measure(n: int, args: argparse.Namespace, timed: Callable[[str, Callable], None]) -> None:
    clicked, p, user = draw(n, "f8" if args.double else "f4")
    page = np.arange(n, dtype=np.int32) // 10 if args.pages else None
    both = {"a": p[0], "b": p[1]}
    weight = np.where(clicked, 1, 4) if args.weights else None
    timed(
        f"compare, {n:,} of {user[-1] + 1:,} users",
        lambda: metrics.compare(clicked, both, user=user, base="a", page=page, weight=weight),
    )
    try:
        from sklearn.metrics import log_loss, roc_auc_score
    except ImportError:
        return
    if n <= 10**7:
        timed("auc", lambda: metrics.auc(clicked, p[0]))
        timed("scikit-learn's", lambda: roc_auc_score(clicked, p[0]))
        timed("logloss", lambda: metrics.logloss(clicked, p[0]))
        timed("scikit-learn's", lambda: log_loss(clicked, p[0]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", nargs="*", type=float, default=[1e6])
    parser.add_argument("--pages", action="store_true", help="with the metrics of pages of 10")
    parser.add_argument("--double", action="store_true", help="float64 instead of float32")
    parser.add_argument(
        "--weights",
        action="store_true",
        help="compare with weights, 4 of each that was not clicked",
    )
    args = parser.parse_args()
    measure(1000, args, timed=lambda _, function: function())  # compiles
    for n in args.n:
        measure(int(n), args, timed=timed)


if __name__ == "__main__":
    main()
