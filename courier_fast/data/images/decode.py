"""Encoded images to normalised tensors: one interface, several decoders.

Every decoder applies the same windows and flips (see transforms.py) and gives the same picture up
to the interpolation. None of them raises for a damaged image: it becomes zeros, which is the mean
colour, and is flagged.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor

from . import pictures, software
from .transforms import IMAGENET_MEAN, IMAGENET_STD

Array = npt.NDArray

KINDS = ("auto", "dali", "dali-cpu", "software", "pillow")


class Decoder(Protocol):
    """Decodes a batch.

    `decode(images, windows, flips)` takes n encoded images (1-d uint8 arrays; an empty one is a
    missing image), windows [n, 4] and flips [n], and gives pictures [n, 3, size, size] on `device`,
    normalised, in channels-last order, and damaged [n] bool.
    """

    size: int
    device: torch.device

    def decode(
        self, images: Sequence[Array], windows: Array, flips: Array
    ) -> tuple[Tensor, Array]: ...

    def close(self) -> None: ...


def make_decoder(
    kind: str = "auto",
    size: int = 224,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    threads: int = 0,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Decoder:
    """The decoder of that kind; "auto" is DALI for a GPU where it is installed, else "software" or,
    without simplejpeg, "pillow".

    Args:
        size: height and width of the pictures in pixels.
        dtype: of the pictures; DALI gives float16 and float32.
        threads: that decode; 0: as many as there are CPUs for this process.
        mean, std: of red, green and blue in [0, 1].

    Raises:
        ValueError: no such kind, a size below 1, or "dali" without a GPU.
        ModuleNotFoundError: a kind whose packages are not installed.
    """
    device = torch.device(device)
    if kind not in KINDS:
        raise ValueError(f"decoder: expected one of {', '.join(KINDS)}, got {kind!r}")
    if size < 1:
        raise ValueError(f"size: expected at least 1 pixel, got {size}")
    threads = threads or len(os.sched_getaffinity(0))
    how: dict[str, Any] = {
        "device": device,
        "dtype": dtype,
        "threads": threads,
        "mean": mean,
        "std": std,
    }
    if kind == "auto":
        kind = "software" if pictures.is_fast() else "pillow"
        if device.type == "cuda":
            try:
                import nvidia.dali  # noqa: F401

                kind = "dali"
            except ModuleNotFoundError:
                pass
    if kind.startswith("dali"):
        if kind == "dali" and device.type != "cuda":
            raise ValueError(
                'decoder: "dali" decodes on a GPU, expected device "cuda" (or decoder "dali-cpu"), '
                f"got {device}"
            )
        from .dali import DaliDecoder

        return DaliDecoder(size, on_gpu=kind == "dali", **how)
    if kind == "software" and not pictures.is_fast():
        raise ModuleNotFoundError(
            'decoder: "software" needs simplejpeg: pip install "courier_fast[train]"'
        )
    reader = pictures.fastest_reader() if kind == "software" else pictures.read_pillow
    return software.SoftwareDecoder(reader, size, **how)
