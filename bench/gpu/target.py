"""A step for a profiler to look at.

python -m bench.gpu.target --shape paper [--attention candidate [--cosine]]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import torch

from bench.errors import loss_and_gradients
from bench.problems import SHAPES
from courier_fast.testing.batches import Options, Shape, call, make_batch
from courier_fast.testing.interpreter import make_fast


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.target", description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="paper")
    parser.add_argument("--attention", choices=("anchor", "candidate"), default="anchor")
    parser.add_argument("--cosine", action="store_true")
    parser.add_argument("--rehearse", action="store_true")
    args = parser.parse_args(arguments)
    device = torch.device("cpu" if args.rehearse else "cuda")
    dtype = torch.float32 if args.rehearse else torch.bfloat16
    options = Options(attention=args.attention, cosine=args.cosine)
    shape = SHAPES[args.shape]
    if args.rehearse:
        make_fast()
        shape = Shape(8, 4, 5, 32, 0.4)
    batch = make_batch(shape, options, dtype, device)
    for measured in (False, True):
        if measured and device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        loss_and_gradients(lambda b: call(b, "triton"), batch)
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
