"""Batches of pictures decoded by the CPU."""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .pictures import Reader

try:
    from numba import njit
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'decoding images needs {error.name}: pip install "courier_fast[train]"', name=error.name
    ) from None

Array = npt.NDArray


@njit(cache=True, nogil=True, fastmath=True)
def _normalise(picture, scale, shift, out):  # type: ignore[no-untyped-def]
    """out = picture * scale + shift, rows of width x channel."""
    for y in range(picture.shape[0]):
        for x in range(picture.shape[1]):
            out[y, x] = picture[y, x] * scale[x] + shift[x]


def normalise_batch(pictures: Tensor, damaged: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Pictures [n, H, W, 3] uint8 on a GPU times scale [3], plus shift [3]; 0 where damaged [n]."""
    return (pictures * scale + shift).masked_fill_(damaged[:, None, None, None], 0)


class Recycler:
    """Memory of batches that nobody holds any more, used again: touching fresh pages can cost more
    than decoding into them."""

    def __init__(self) -> None:
        self._free: list[Array] = []

    def take(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """An array with anything in it; its memory comes back with its last tensor or view."""
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            memory = self._free.pop()
        except IndexError:
            memory = np.empty(0, np.uint8)
        if len(memory) < size:  # dropped: batches vary a little, so soon all are large enough
            memory = np.empty(size + size // 8, np.uint8)
        array = memory[:size].view(dtype).reshape(shape)
        weakref.finalize(array, self._free.append, memory).atexit = False
        return array


class SoftwareDecoder:
    """A reader in a pool of threads (the libraries release Python's lock). Normalised in the same
    threads, or on the GPU."""

    def __init__(
        self,
        read: Reader,
        size: int,
        *,
        device: torch.device,
        dtype: torch.dtype,
        threads: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        # Another process makes its own threads and memory.
        self._again = partial(
            SoftwareDecoder,
            read,
            size,
            device=device,
            dtype=dtype,
            threads=threads,
            mean=mean,
            std=std,
        )
        self.read, self.size, self.device, self.dtype = read, size, device, dtype
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "courier-decode")
        self._memory = Recycler()
        self._scale = np.array([1 / (255 * s) for s in std], np.float32)
        self._shift = np.array([-m / s for m, s in zip(mean, std, strict=True)], np.float32)

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again, ()

    def decode(self, images: Sequence[Array], windows: Array, flips: Array) -> tuple[Tensor, Array]:
        n, size = len(images), self.size
        on_gpu = self.device.type == "cuda"
        shape = (n, size, size * 3)
        if on_gpu:  # a quarter of the bytes to move
            host = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            host = torch.from_numpy(self._memory.take(shape, np.float32))
        out = host.numpy()
        scale, shift = np.tile(self._scale, size), np.tile(self._shift, size)
        damaged = np.zeros(n, bool)

        def decode_one(i: int) -> None:
            try:
                if not len(images[i]):
                    raise ValueError("image: expected bytes, got none")
                picture = self.read(images[i], windows[i], size)
            except Exception:  # whatever a library makes of a damaged file, the batch goes on
                damaged[i] = True
                out[i] = 0
                return
            if flips[i]:
                picture = torch.from_numpy(picture).flip(1).numpy()  # vectorised
            rows = np.ascontiguousarray(picture).reshape(size, -1)
            if on_gpu:
                out[i] = rows
            else:
                _normalise(rows, scale, shift, out[i])

        def decode_some(start: int) -> None:
            for i in range(start, min(start + block, n)):
                decode_one(i)

        block = max(1, min(16, n // (2 * self.threads)))
        list(self._pool.map(decode_some, range(0, n, block)))
        pictures = host.view(n, size, size, 3)
        if on_gpu:
            put = [torch.from_numpy(a).to(self.device) for a in (damaged, self._scale, self._shift)]
            pictures = normalise_batch(pictures.to(self.device, non_blocking=True), *put)
        return pictures.to(self.dtype).permute(0, 3, 1, 2), damaged

    def close(self) -> None:
        self._pool.shutdown()
