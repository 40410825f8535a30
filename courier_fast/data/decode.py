"""Encoded images to normalised tensors: one interface, several decoders.

Every decoder applies the same windows and flips (see transforms.py) and gives the same picture up to the interpolation. None of them
raises for a damaged image: it becomes zeros, which is the mean colour, and is flagged.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from numba import njit
from PIL import Image, ImageOps
from torch import Tensor

from .transforms import IMAGENET_MEAN, IMAGENET_STD

cv2: Any
simplejpeg: Any
try:
    cv2, simplejpeg = import_module("cv2"), import_module("simplejpeg")
except ModuleNotFoundError:  # Pillow alone then decodes
    cv2 = simplejpeg = None

Array = npt.NDArray

KINDS = ("auto", "dali", "dali-cpu", "software", "pillow")
MAX_PIXELS = 100_000_000  # more is taken for a decompression bomb


class Decoder(Protocol):
    """Decodes a batch.

    `decode(images, windows, flips)` takes n encoded images (1-d uint8 arrays; an empty one is a missing image), windows [n, 4] and
    flips [n], and gives pictures [n, 3, size, size] on `device`, normalised, in channels-last order, and damaged [n] bool.
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
    """The decoder of that kind; "auto" is DALI for a GPU where it is installed, else "software" or, without its libraries, "pillow".

    Raises:
        ValueError: no such kind, or "dali" without a GPU.
        ModuleNotFoundError: a kind whose packages are not installed.
    """
    device = torch.device(device)
    if kind not in KINDS:
        raise ValueError(f"decoder: expected one of {', '.join(KINDS)}, got {kind!r}")
    threads = threads or len(os.sched_getaffinity(0))
    if kind == "auto":
        kind = "software" if cv2 is not None else "pillow"
        if device.type == "cuda":
            try:
                import nvidia.dali  # noqa: F401

                kind = "dali"
            except ModuleNotFoundError:
                pass
    if kind.startswith("dali"):
        from .dali import DaliDecoder

        if kind == "dali" and device.type != "cuda":
            raise ValueError(
                f'decoder: "dali" decodes on a GPU, expected device "cuda" (or decoder "dali-cpu"), got {device}'
            )
        return DaliDecoder(
            size,
            device=device,
            on_gpu=kind == "dali",
            dtype=dtype,
            threads=threads,
            mean=mean,
            std=std,
        )
    if kind == "software" and cv2 is None:
        raise ModuleNotFoundError(
            'decoder: "software" needs simplejpeg and OpenCV: pip install "courier_fast[train]"'
        )
    return ThreadedDecoder(
        read_fast if kind == "software" else read_pillow,
        size,
        device=device,
        dtype=dtype,
        threads=threads,
        mean=mean,
        std=std,
    )


# ---- one image: bytes and window to size x size x 3 uint8 -----------------------------------------------------------

Reader = Callable[[Array, Array, int], Array]


def pixels(window: Array, height: int, width: int) -> tuple[int, int, int, int]:
    """A relative window in whole pixels of an image: top, left, bottom, right; at least one pixel."""
    top, left, h, w = (float(x) for x in window)
    a, b = min(round(top * height), height - 1), min(round(left * width), width - 1)
    return (
        a,
        b,
        min(max(round((top + h) * height), a + 1), height),
        min(max(round((left + w) * width), b + 1), width),
    )


def read_pillow(image: Array, window: Array, size: int) -> Array:
    """By Pillow alone: every format and colour space it knows, EXIF rotation, transparency over white."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(io.BytesIO(memoryview(image))) as file:
            if file.width * file.height > MAX_PIXELS:
                raise ValueError(f"{file.width} x {file.height} pixels")
            seen = rgb(ImageOps.exif_transpose(file))
    top, left, bottom, right = pixels(window, seen.height, seen.width)
    return np.asarray(
        seen.resize((size, size), Image.Resampling.BILINEAR, (left, top, right, bottom))
    )


def rgb(image: Image.Image) -> Image.Image:
    """Any image of Pillow's in 8-bit RGB."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):  # 16-bit grey, which convert() would clip
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def exif_orientation(image: Array) -> int:
    """1 to 8 from a JPEG's EXIF block, 1 without one; looks at segment headers alone."""
    data = image[: 1 << 16].tobytes()
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF and data[at + 1] != 0xDA:
        if data[at + 1] == 0xE1 and data[at + 4 : at + 10] == b"Exif\0\0":
            order = "little" if data[at + 10 : at + 12] == b"II" else "big"

            def number(where: int, count: int, base: int = at + 10, order: str = order) -> int:
                return int.from_bytes(data[base + where : base + where + count], order)  # type: ignore[arg-type]

            entries = number(4, 4)
            for i in range(number(entries, 2)):
                if number(entries + 2 + 12 * i, 2) == 0x0112:
                    return value if 1 <= (value := number(entries + 2 + 12 * i + 8, 2)) <= 8 else 1
            return 1
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return 1


def read_fast(image: Array, window: Array, size: int) -> Array:
    """JPEG by libjpeg-turbo at the smallest DCT scale that keeps the window at `size` pixels, resized by OpenCV; the rest by Pillow."""
    if len(image) < 4 or image[0] != 0xFF or image[1] != 0xD8:
        return read_pillow(image, window, size)
    height, width, space, _ = simplejpeg.decode_jpeg_header(image)
    if space not in ("YCbCr", "Gray", "RGB") or exif_orientation(image) != 1:
        return read_pillow(image, window, size)
    if height * width > MAX_PIXELS:
        raise ValueError(f"{width} x {height} pixels")
    # Both sides scale alike, so the one that is cut more decides.
    factor = min(
        1.0,
        max(size / max(float(window[2]) * height, 1.0), size / max(float(window[3]) * width, 1.0)),
    )
    decoded = simplejpeg.decode_jpeg(
        image, "RGB", fastdct=True, fastupsample=True, min_height=math.ceil(height * factor), min_width=math.ceil(width * factor),
        # 7/8 to 5/8 have no vector code and take longer than the whole image.
        min_factor=2,
    )  # fmt: skip
    # The last row and column may be part of a pixel: the scale is in eighths, not the ratio of the shapes.
    scale = round(8 * decoded.shape[0] / height) / 8 if height >= 8 else 1.0
    top, left, bottom, right = pixels(window, scale * height, scale * width)
    cut = decoded[top:bottom, left:right]
    # What the DCT leaves is mostly under 2: two taps miss no pixel there, and cost a sixth of the exact area.
    area = min(cut.shape[:2]) > 2 * size
    return cv2.resize(cut, (size, size), interpolation=cv2.INTER_AREA if area else cv2.INTER_LINEAR)


# ---- a batch --------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, fastmath=True)
def _normalise(picture, scale, shift, out):  # type: ignore[no-untyped-def]
    """out = picture * scale + shift, rows of width x channel."""
    for y in range(picture.shape[0]):
        for x in range(picture.shape[1]):
            out[y, x] = picture[y, x] * scale[x] + shift[x]


class ThreadedDecoder:
    """A reader in a pool of threads (the libraries release Python's lock). Normalised in the same threads, or on the GPU."""

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
        self.read, self.size, self.device, self.dtype = read, size, device, dtype
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, "courier-decode")
        self._scale = np.tile(np.array([1 / (255 * s) for s in std], np.float32), size)
        self._shift = np.tile(
            np.array([-m / s for m, s in zip(mean, std, strict=True)], np.float32), size
        )
        if cv2 is not None:
            cv2.setNumThreads(0)  # the pool is the parallelism

    def decode(self, images: Sequence[Array], windows: Array, flips: Array) -> tuple[Tensor, Array]:
        n, size = len(images), self.size
        on_gpu = self.device.type == "cuda"
        out = np.empty((n, size, size * 3), np.uint8 if on_gpu else np.float32)
        damaged = np.zeros(n, bool)

        def decode_one(i: int) -> None:
            try:
                if not len(images[i]):
                    raise ValueError("no image")
                picture = self.read(images[i], windows[i], size)
            except Exception:  # whatever a decoder makes of a damaged file, the batch goes on
                damaged[i] = True
                out[i] = 0
                return
            if flips[i]:
                picture = picture[:, ::-1] if cv2 is None else cv2.flip(picture, 1)
            rows = np.ascontiguousarray(picture).reshape(size, -1)
            if on_gpu:  # a quarter of the bytes to move
                out[i] = rows
            else:
                _normalise(rows, self._scale, self._shift, out[i])

        def decode_some(start: int) -> None:
            for i in range(start, min(start + block, n)):
                decode_one(i)

        block = max(1, min(16, n // (2 * self.threads)))
        list(self._pool.map(decode_some, range(0, n, block)))
        pictures = torch.from_numpy(out).view(n, size, size, 3)
        if on_gpu:
            pictures = pictures.pin_memory().to(self.device, non_blocking=True)
            scale, shift = (
                torch.from_numpy(a[:3]).to(self.device) for a in (self._scale, self._shift)
            )
            pictures = torch.addcmul(shift, pictures, scale)
            pictures[torch.from_numpy(damaged).to(self.device)] = 0
        return pictures.to(self.dtype).permute(0, 3, 1, 2), damaged

    def close(self) -> None:
        self._pool.shutdown()
