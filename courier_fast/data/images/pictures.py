"""One encoded picture and a window of it to pixels: simplejpeg where it is installed, Pillow for
everything else.

Training and serving decode by this module alone. It needs neither torch nor numba; with torch it
resizes faster.
"""

from __future__ import annotations

import io
import math
import os
import re
import stat
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

try:
    from PIL import Image, ImageOps
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f'decoding images needs {error.name}: pip install "courier_fast[train]"', name=error.name
    ) from None
try:
    import simplejpeg
except ModuleNotFoundError:  # Pillow alone then decodes
    simplejpeg = None
try:
    import torch
    from torch.nn import functional
except ModuleNotFoundError:  # Pillow alone then resizes
    torch = None

Array = npt.NDArray

MAX_PIXELS = 100_000_000  # more is taken for a decompression bomb
MAX_FILE = 1 << 28  # bytes; a larger file is not read


# ---- windows in pixels, and orientation ----------------------------------------------------------


def pixel_slices(window: Array, height: int, width: int, scale: float = 1.0) -> tuple[slice, slice]:
    """Rows and columns of a relative window in an image that was decoded at `scale`: whole pixels,
    at least one."""
    top, left, h, w = (float(x) for x in window)
    slices = []
    for start, length, full in ((top, h, height), (left, w, width)):
        end = math.ceil(full * scale)  # the last pixel may be part of one
        first = min(round(start * full * scale), end - 1)
        last = min(max(round((start + length) * full * scale), first + 1), end)
        slices.append(slice(first, last))
    return slices[0], slices[1]


# EXIF orientations: what is seen is the stored picture, transposed, then mirrored left to right,
# then upside down.
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


def turn(picture: Any, orientation: int) -> Any:
    """A stored picture [H, W, C], array or tensor, as seen."""

    def flip(axis: int) -> Any:  # a tensor has no negative strides
        return np.flip(picture, axis) if isinstance(picture, np.ndarray) else picture.flip(axis)

    if orientation in _TRANSPOSED:
        picture = picture.swapaxes(0, 1)
    if orientation in _MIRRORED:
        picture = flip(1)
    return flip(0) if orientation in _UPSIDE_DOWN else picture


# ---- JPEG headers --------------------------------------------------------------------------------


class JpegHeader(NamedTuple):
    """What stands before the first scan; height and width are those of the stored image."""

    height: int
    width: int
    components: int
    orientation: int  # EXIF, 1 to 8
    body: int  # bytes behind it

    @property
    def has_body(self) -> bool:
        """False where less than a bit is left for every 8 x 8 block: no Huffman code is shorter."""
        return 8 * self.body >= (self.height // 8) * (self.width // 8)


def jpeg_header(image: Array) -> JpegHeader | None:
    """The header of a JPEG; None for other formats, a header that is cut off, and coding that a
    browser does not show either."""
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


def read_image(path: str) -> bytes:
    """An image file's bytes. OSError where it cannot be read; ValueError where it is no file or one
    that is too large."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise ValueError("not a file")
        if about.st_size > MAX_FILE:
            raise ValueError(f"{about.st_size:,} bytes are over {MAX_FILE:,}")
        return file.read()


def seen_size(image: Array) -> tuple[int, int]:
    """Height and width in pixels after EXIF rotation; (0, 0) where the header says nothing."""
    header = jpeg_header(image)
    if header is not None:
        size = header.height, header.width
        return size[::-1] if header.orientation >= 5 else size
    try:
        with Image.open(io.BytesIO(memoryview(image))) as file:  # type: ignore[arg-type]
            return seen_size_pillow(file)
    except Exception:  # the decoder will flag it
        return 0, 0


def seen_size_pillow(image: Image.Image) -> tuple[int, int]:
    """Of an image of Pillow's. ValueError where it is larger than any photo."""
    check_size(image.height, image.width)  # a PNG's EXIF block may stand behind its pixels
    turned = image.getexif().get(0x0112, 1) in _TRANSPOSED
    return (image.width, image.height) if turned else (image.height, image.width)


# ---- one image: bytes and window to size x size x 3 uint8 ----------------------------------------

Reader = Callable[[Array, Array, int], Array]


def resize(picture: Array, size: int) -> Array:
    """[H, W, C] uint8 to [size, size, C], bilinear with antialiasing: within 1 of Pillow's
    BILINEAR, off in half a percent of the bytes."""
    if torch is None:
        planes = [Image.fromarray(picture[:, :, c]) for c in range(picture.shape[2])]
        bilinear = Image.Resampling.BILINEAR
        return np.stack([np.asarray(x.resize((size, size), bilinear)) for x in planes], 2)
    # PyTorch's is vectorised: three times as fast as Pillow's and OpenCV's area filter.
    x = torch.from_numpy(picture)[None].permute(0, 3, 1, 2)  # channels last, and it stays so
    x = functional.interpolate(x, size=(size, size), mode="bilinear", antialias=True)
    return x[0].permute(1, 2, 0).numpy()


def check_size(height: int, width: int) -> None:
    """ValueError for an image whose header says that it is larger than any photo: before memory is
    taken for it."""
    if height * width > MAX_PIXELS:
        raise ValueError(f"image: expected at most {MAX_PIXELS:,} pixels, got {width} x {height}")


def read_pillow(image: Array, window: Array, size: int) -> Array:
    """By Pillow: every format and colour space it knows, EXIF rotation, transparency over white."""
    header = jpeg_header(image)
    if header is not None and not header.has_body:
        raise ValueError("image: expected a JPEG, got its header")
    with Image.open(io.BytesIO(memoryview(image))) as file:  # type: ignore[arg-type]
        return resize_pillow(file, window, size)


def resize_pillow(image: Image.Image, window: Array, size: int) -> Array:
    """A window of an image of Pillow's as seen, [size, size, 3] uint8."""
    check_size(image.height, image.width)
    seen = rgb(ImageOps.exif_transpose(image))
    rows, columns = pixel_slices(window, seen.height, seen.width)
    box = (columns.start, rows.start, columns.stop, rows.stop)
    return np.array(seen.resize((size, size), Image.Resampling.BILINEAR, box))


def rgb(image: Image.Image) -> Image.Image:
    """Any image of Pillow's in 8-bit RGB, transparency over white.

    16-bit grey is divided by 257, floats from 0 to 1 are multiplied by 255. ValueError for other
    floats and for integers of 32 bits whose range nobody says.
    """
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image), image.mode))
    if image.mode in ("La", "RGBa"):  # multiplied by their alpha
        image = image.convert("LA" if image.mode == "La" else "RGBA")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    return image.convert("RGB")


def _eight_bits(values: Array, mode: str) -> Array:
    """Grey of more than 8 bits [H, W] as uint8."""
    low, high = values.min(), values.max()
    if mode == "F":
        if not (low >= 0 and high <= 1):  # NaN, too
            raise ValueError(f"floats from {low:.4g} to {high:.4g}, expected 0 to 1")
        return _not_black(np.rint(255 * values.astype(np.float32)), high, "floats", "1")
    # Some versions of Pillow give 16 bits in 32.
    if mode == "I" and not (low >= 0 and 255 < high < 1 << 16):
        raise ValueError(f"32-bit integers from {low} to {high}, expected 8 or 16 bits")
    return _not_black((values.astype(np.uint32) + 128) // 257, high, "16-bit grey", "65535")


def _not_black(values: Array, high: Any, what: str, white: str) -> Array:
    """As uint8; ValueError where the brightest of them is next to black, though there is something:
    the range is another."""
    if high > 0 and values.max() <= 1:
        raise ValueError(
            f"{what} up to {high:.4g}, where white is {white}: all of it would be black"
        )
    return values.astype(np.uint8)


def decode_strictly(image: Array, colorspace: str = "RGB", **options: Any) -> Array:
    """A JPEG's pixels by simplejpeg; ValueError where data are missing or wrong.

    Stray bytes between segments cost nothing and are let pass; behind a scan (before a restart or
    end marker) they are what is left of a scan that broke off.
    """
    options = {"fastdct": True, "fastupsample": True, **options}
    try:
        return simplejpeg.decode_jpeg(image, colorspace, **options)
    except ValueError as error:
        if not re.search("extraneous bytes before marker 0x(?!d)", str(error)):
            raise
        return simplejpeg.decode_jpeg(image, colorspace, strict=False, **options)


# Full-size pictures, one per thread: fresh memory costs a page fault every 4 KiB, together a
# quarter of the decoding.
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
    """JPEG by libjpeg-turbo, at the smallest fast DCT scale that leaves the window `size` pixels;
    the rest by Pillow."""
    header = jpeg_header(image)
    if header is None or header.components not in (1, 3, 4):
        return read_pillow(image, window, size)
    height, width, components, orientation, _ = header
    check_size(height, width)
    if orientation != 1:
        window = stored_window(window, orientation)
    eighths = 8
    if max(height, width) >= 64:  # of a smaller image the shape does not tell the scale
        # 7, 6, 5 and 3 eighths have no vector code and take longer than the next larger.
        for eighths in (1, 2, 4, 8):
            rows, columns = pixel_slices(window, height, width, eighths / 8)
            if min(rows.stop - rows.start, columns.stop - columns.start) >= size:
                break
    decoded = decode_strictly(
        image,
        "CMYK" if components == 4 else "RGB",
        min_height=-(-height * eighths // 8),
        min_width=-(-width * eighths // 8),
        buffer=_buffer(height * width * max(components, 3)),
    )
    picture = resize(decoded[pixel_slices(window, height, width, eighths / 8)], size)
    if components == 4:  # stored inverted, as Adobe does and everybody after it
        picture = (picture[:, :, :3] * (picture[:, :, 3:] / np.float32(255)) + 0.5).astype(np.uint8)
    if orientation != 1:
        picture = np.ascontiguousarray(turn(picture, orientation))
    return picture


def is_fast() -> bool:
    """Whether simplejpeg is installed."""
    return simplejpeg is not None


def fastest_reader() -> Reader:
    """The reader of the "software" decoder, or of "pillow" where its library is missing."""
    return read_pillow if simplejpeg is None else read_fast
