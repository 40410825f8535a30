"""The device that a command works on, and its options."""

from __future__ import annotations

import argparse

import torch

from ..data.images.decode import KINDS

# ---- the command ---------------------------------------------------------------------------------


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """How images are decoded and encoded: shared with `evaluate`."""
    parser.add_argument("--batch", type=int, default=256, help="images encoded at once")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda if there")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 autocast on a GPU",
    )
    parser.add_argument("--decoder", choices=KINDS, default="auto")
    parser.add_argument("--threads", type=int, default=0, help="decoding threads; 0: all cores")


def device_of(args: argparse.Namespace) -> tuple[torch.device, torch.dtype | None]:
    """Device and autocast type that the arguments ask for."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    bfloat16 = args.precision == "bfloat16" or (args.precision == "auto" and device.type == "cuda")
    return device, torch.bfloat16 if bfloat16 else None
