"""What an item's image is worth: found by one look at the folder, decoded once in full, so that
training meets no surprise."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from ..images.files import Paths, read_any
from ..images.pictures import check_size, exif_orientation, rgb

_KEPT = ("JPEG", "PNG", "WEBP")  # every decoder reads these; others are written anew as JPEG
_HEIF = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


@dataclass(frozen=True)
class Checked:
    """A usable image: its bytes, and its size in pixels as seen, after EXIF rotation. Or the reason
    why there is none.

    Beside an image, the reason says why other files of the item were not taken.
    """

    image: bytes | None = None
    height: int = 0
    width: int = 0
    reason: str = ""


def check_image(data: bytes, shrink: int = 0) -> Checked:
    """Decodes an image in full. With `shrink`, one whose short side is longer is scaled down to it
    and written as JPEG (quality 90).

    Never raises for what the bytes hold: the reason is in the result.
    """
    if not data:
        return Checked(reason="empty file")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _check(data, shrink)
    except Exception as error:  # decoders raise whatever they like on damaged data
        text = str(error).split("\n")[0].replace("<_io.BytesIO object at ", "<")
        if data[:256].lstrip()[:1] == b"<":
            text = "text (HTML or XML), not an image"
        elif text.startswith("cannot identify image file"):
            text = _kind(data)
        return Checked(reason=text or type(error).__name__)


def _kind(data: bytes) -> str:
    """What bytes are that Pillow does not know."""
    if data[4:8] == b"ftyp" and data[8:12] in _HEIF:
        return "HEIC, which is not read, whatever the file is called: make it JPEG or PNG"
    if data[:4] in (b"II*\0", b"MM\0*"):
        return "a TIFF of a kind that is not read: 8 or 16 bits a channel are"
    return "not an image"


def _check(data: bytes, shrink: int) -> Checked:
    with Image.open(io.BytesIO(data)) as file:
        check_size(file.height, file.width)
        small = shrink and min(file.size) > shrink
        if not small and file.format == "JPEG":
            return _check_jpeg(data, file)
        if small and file.format == "JPEG":
            _entropy_decode(data)
            file.draft("RGB", (2 * shrink, 2 * shrink))
        seen = rgb(ImageOps.exif_transpose(file))
        if not small and file.format in _KEPT:
            return Checked(data, seen.height, seen.width)
        if small:
            scale = shrink / min(seen.size)
            seen = seen.resize(
                (max(1, round(seen.width * scale)), max(1, round(seen.height * scale))),
                Image.Resampling.LANCZOS,
            )
        out = io.BytesIO()
        seen.save(out, "JPEG", quality=90)
        return Checked(out.getvalue(), seen.height, seen.width)


def _check_jpeg(data: bytes, file: Image.Image) -> Checked:
    height, width = file.height, file.width
    if file.mode in ("RGB", "L"):
        _entropy_decode(data)
    else:  # CMYK and other spaces
        file.load()
    rotated = exif_orientation(np.frombuffer(data, np.uint8)) >= 5
    return Checked(data, *((width, height) if rotated else (height, width)))


def _entropy_decode(data: bytes) -> None:
    """Reads every coefficient, at an eighth of the size; raises at a warning of libjpeg (truncated,
    corrupt)."""
    simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, min_height=1, min_width=1, min_factor=8)


def check_images(
    paths: Sequence[Paths | None], *, shrink: int = 0, threads: int = 0
) -> Iterator[Checked]:
    """`check_image` of each file in order, in threads; `None` gives the reason "missing". Holds a
    few hundred images at most.

    Of several files the first usable one is taken; its reason then says what is wrong with those
    before it.
    """

    def check_one(path: str) -> Checked:
        try:
            return check_image(read_any(path), shrink)
        except OSError as error:
            return Checked(reason=f"unreadable: {error.strerror or error}")
        except ValueError as error:
            return Checked(reason=str(error))

    def check(of: Paths | None) -> Checked:
        if of is None:
            return Checked(reason="missing")
        if isinstance(of, str):
            return check_one(of)
        wrong: list[str] = []
        for path in of:
            checked = check_one(path)
            if checked.image is not None:
                return replace(checked, reason="; ".join(wrong))
            wrong.append(f"{path}: {checked.reason}")
        return Checked(reason="; ".join(wrong))

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), "courier-check") as pool:
        for start in range(0, len(paths), 256):
            yield from pool.map(check, paths[start : start + 256])
