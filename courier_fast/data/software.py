"""JPEGs and other pictures decoded by the CPU: simplejpeg where it is installed, Pillow for everything else."""

from __future__ import annotations

import io
import math
import re
import struct
import threading
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

try:
    from numba import njit
    from PIL import Image, ImageOps
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'decoding images needs {error.name}: pip install "courier_fast[train]"', name=error.name
    ) from None
try:
    import simplejpeg
except ModuleNotFoundError:  # Pillow alone then decodes
    simplejpeg = None

Array = npt.NDArray

MAX_PIXELS = 100_000_000  # more is taken for a decompression bomb


# ---- windows in pixels, and orientation -----------------------------------------------------------------------------


def pixels(window: Array, height: int, width: int, scale: float = 1.0) -> tuple[slice, slice]:
    """Rows and columns of a relative window in an image that was decoded at `scale`: whole pixels, at least one."""
    top, left, h, w = (float(x) for x in window)
    slices = []
    for start, length, full in ((top, h, height), (left, w, width)):
        end = math.ceil(full * scale)  # the last pixel may be part of one
        first = min(round(start * full * scale), end - 1)
        last = min(max(round((start + length) * full * scale), first + 1), end)
        slices.append(slice(first, last))
    return slices[0], slices[1]


# EXIF orientations: what is seen is the stored picture, transposed, then mirrored left to right, then upside down.
_TRANSPOSED, _MIRRORED, _UPSIDE_DOWN = (5, 6, 7, 8), (2, 3, 6, 7), (3, 4, 7, 8)


def stored_window(window: Array, orientation: int) -> Array:
    """The window of the stored image that shows `window` of the image as seen."""
    top, left, h, w = window
    if orientation in _MIRRORED:
        left = 1 - left - w
    if orientation in _UPSIDE_DOWN:
        top = 1 - top - h
    box = (left, top, w, h) if orientation in _TRANSPOSED else (top, left, h, w)
    return np.maximum(np.array(box, np.float32), 0)


def turn(picture: Tensor, orientation: int) -> Tensor:
    """A stored picture [H, W, C] as seen."""
    if orientation in _TRANSPOSED:
        picture = picture.transpose(0, 1)
    if orientation in _MIRRORED:
        picture = picture.flip(1)
    return picture.flip(0) if orientation in _UPSIDE_DOWN else picture


# ---- JPEG headers ---------------------------------------------------------------------------------------------------


class JpegHeader(NamedTuple):
    """What stands before the first scan; height and width are those of the stored image."""

    height: int
    width: int
    components: int
    orientation: int  # EXIF, 1 to 8
    body: int  # bytes behind it

    @property
    def has_body(self) -> bool:
        """False where less than a bit is left for every 8 x 8 block: Huffman codes cannot be shorter."""
        return 8 * self.body >= (self.height // 8) * (self.width // 8)


def jpeg_header(image: Array) -> JpegHeader | None:
    """The header of a JPEG; None for other formats, a header that is cut off, and coding that a browser does not show either."""
    data = memoryview(image)  # type: ignore[arg-type]
    if len(data) < 4 or data[0] != 0xFF or data[1] != 0xD8:
        return None
    height = width = components = 0
    orientation, at = 1, 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # fill
            at += 1
            continue
        end = at + 2 + (data[at + 2] << 8 | data[at + 3])
        if marker in (0xC0, 0xC1, 0xC2) and end <= len(data) and end - at >= 10:
            height, width = data[at + 5] << 8 | data[at + 6], data[at + 7] << 8 | data[at + 8]
            components = data[at + 9]
        elif marker == 0xE1 and orientation == 1:
            orientation = _exif_orientation(bytes(data[at + 4 : end]))
        elif marker == 0xDA:
            if not height * width or end > len(data):
                return None
            return JpegHeader(height, width, components, orientation, len(data) - end - 2)
        at = end
    return None


def _exif_orientation(block: bytes) -> int:
    """The orientation in an APP1 block; 1 where it has none."""
    if block[:6] != b"Exif\0\0":
        return 1
    tiff = block[6:]
    order = "<" if tiff[:2] == b"II" else ">"
    try:
        (at,) = struct.unpack_from(order + "I", tiff, 4)
        (entries,) = struct.unpack_from(order + "H", tiff, at)
        for i in range(entries):
            tag, _, _, value = struct.unpack_from(order + "HHIH", tiff, at + 2 + 12 * i)
            if tag == 0x0112:
                return value if 1 <= value <= 8 else 1
    except struct.error:  # a damaged block says nothing
        pass
    return 1


def exif_orientation(image: Array) -> int:
    """1 to 8 from a JPEG's EXIF block, 1 without one."""
    header = jpeg_header(image)
    return 1 if header is None else header.orientation


# ---- one image: bytes and window to size x size x 3 uint8 -----------------------------------------------------------

Reader = Callable[[Array, Array, int], Array]


def resize(picture: Array, size: int) -> Array:
    """[H, W, C] uint8 to [size, size, C], bilinear with antialiasing (the same bytes as Pillow's BILINEAR gives)."""
    # PyTorch's is vectorised: three times as fast as Pillow's and OpenCV's area filter.
    x = torch.from_numpy(picture)[None].permute(0, 3, 1, 2)  # channels last, and it stays so
    x = functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return x[0].permute(1, 2, 0).numpy()


def _limit(height: int, width: int) -> None:
    if height * width > MAX_PIXELS:
        raise ValueError(f"image: expected at most {MAX_PIXELS:,} pixels, got {width} x {height}")


def read_pillow(image: Array, window: Array, size: int) -> Array:
    """By Pillow alone: every format and colour space it knows, EXIF rotation, transparency over white."""
    header = jpeg_header(image)
    if header is not None and not header.has_body:
        raise ValueError("image: expected a JPEG, got its header")
    with Image.open(io.BytesIO(memoryview(image))) as file:  # type: ignore[arg-type]
        _limit(file.height, file.width)
        seen = rgb(ImageOps.exif_transpose(file))
    rows, columns = pixels(window, seen.height, seen.width)
    box = (columns.start, rows.start, columns.stop, rows.stop)
    return np.array(seen.resize((size, size), Image.Resampling.BILINEAR, box))


def rgb(image: Image.Image) -> Image.Image:
    """Any image of Pillow's in 8-bit RGB."""
    if image.mode in ("I;16", "I;16L", "I;16B", "I"):  # 16-bit grey, which convert() would clip
        image = Image.fromarray((np.asarray(image, np.uint32) >> 8).clip(0, 255).astype(np.uint8))
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def decode_strictly(image: Array, colorspace: str = "RGB", **options: Any) -> Array:
    """A JPEG's pixels by simplejpeg; ValueError where data are missing or wrong.

    Stray bytes between segments cost nothing and are let pass; behind a scan (before a restart or end marker) they are what is left
    of a scan that broke off.
    """
    options = {"fastdct": True, "fastupsample": True, **options}
    try:
        return simplejpeg.decode_jpeg(image, colorspace, **options)
    except ValueError as error:
        if not re.search("extraneous bytes before marker 0x(?!d)", str(error)):
            raise
        return simplejpeg.decode_jpeg(image, colorspace, strict=False, **options)


# Full-size pictures, one per thread: fresh memory costs a page fault every 4 KiB, together a quarter of the decoding.
_scratch = threading.local()
_SCRATCH_BYTES = 1 << 25  # a larger picture gets memory of its own, and gives it back


def _buffer(size: int) -> Array:
    if size > _SCRATCH_BYTES:
        return np.empty(size, np.uint8)
    buffer: Array | None = getattr(_scratch, "buffer", None)
    if buffer is None or len(buffer) < size:
        buffer = _scratch.buffer = np.empty(size, np.uint8)
    return buffer


def read_fast(image: Array, window: Array, size: int) -> Array:
    """JPEG by libjpeg-turbo, at the smallest fast DCT scale that leaves the window `size` pixels; the rest by Pillow."""
    header = jpeg_header(image)
    if header is None or header.components not in (1, 3, 4):
        return read_pillow(image, window, size)
    height, width, components, orientation, _ = header
    _limit(height, width)
    if orientation != 1:
        window = stored_window(window, orientation)
    eighths = 8
    if max(height, width) >= 64:  # of a smaller image the shape does not tell the scale
        # 7, 6, 5 and 3 eighths have no vector code and take longer than the next larger.
        for eighths in (1, 2, 4, 8):
            rows, columns = pixels(window, height, width, eighths / 8)
            if min(rows.stop - rows.start, columns.stop - columns.start) >= size:
                break
    decoded = decode_strictly(
        image,
        "CMYK" if components == 4 else "RGB",
        min_height=-(-height * eighths // 8),
        min_width=-(-width * eighths // 8),
        buffer=_buffer(height * width * max(components, 3)),
    )
    picture = resize(decoded[pixels(window, height, width, eighths / 8)], size)
    if components == 4:  # stored inverted, as Adobe does and everybody after it
        picture = (picture[:, :, :3] * (picture[:, :, 3:] / np.float32(255)) + 0.5).astype(np.uint8)
    if orientation != 1:
        picture = turn(torch.from_numpy(picture), orientation).numpy()
    return picture


def is_fast() -> bool:
    """Whether simplejpeg is installed."""
    return simplejpeg is not None


def fastest_reader() -> Reader:
    """The reader of the "software" decoder, or of "pillow" where its library is missing."""
    return read_pillow if simplejpeg is None else read_fast


# ---- a batch --------------------------------------------------------------------------------------------------------


@njit(cache=True, nogil=True, fastmath=True)
def _normalise(picture, scale, shift, out):  # type: ignore[no-untyped-def]
    """out = picture * scale + shift, rows of width x channel."""
    for y in range(picture.shape[0]):
        for x in range(picture.shape[1]):
            out[y, x] = picture[y, x] * scale[x] + shift[x]


def normalise_batch(pictures: Tensor, damaged: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Pictures [n, H, W, 3] uint8 on a GPU times scale [3] plus shift [3]; zeros where damaged [n]."""
    return (pictures * scale + shift).masked_fill_(damaged[:, None, None, None], 0)


class Recycler:
    """Memory of batches that nobody holds any more, used again: touching fresh pages can cost more than decoding into them."""

    def __init__(self) -> None:
        self._free: list[Array] = []

    def take(self, shape: tuple[int, ...], dtype: npt.DTypeLike) -> Array:
        """An array with anything in it. Its memory comes back when the last tensor or view of it is gone."""
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
        self._memory = Recycler()
        self._scale = np.array([1 / (255 * s) for s in std], np.float32)
        self._shift = np.array([-m / s for m, s in zip(mean, std, strict=True)], np.float32)

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
