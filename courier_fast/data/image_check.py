"""What an item's image is worth: found by one look at the folder, decoded once in full, so that training meets no surprise."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import simplejpeg
from PIL import Image, ImageOps

from .ids import one
from .pictures import check_size, exif_orientation, rgb
from .storage import Location, list_files, read_any

LEADS_OUT = "a symbolic link out of the folder of images, not followed"
# An item with several files uses the first of these.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif")
_KEPT = ("JPEG", "PNG", "WEBP")  # every decoder reads these; others are written anew as JPEG


@dataclass(frozen=True)
class Checked:
    """A usable image: its bytes, and its size in pixels as seen, after EXIF rotation. Or the reason why there is none."""

    image: bytes | None = None
    height: int = 0
    width: int = 0
    reason: str = ""


@dataclass(frozen=True)
class ImageFiles:
    """The image files of a folder, by the stem of their name. No symbolic link is followed out of it."""

    paths: dict[str, str]
    outside: dict[str, str]  # stems whose only file is a link out of the folder: the link
    folders: list[str]  # links to folders out of it: what they hold is not looked at


def index_images(folder: Location, stems: Container[str]) -> ImageFiles:
    """The image files under `folder` (with its subfolders) for the stems wanted. FileNotFoundError where it is none."""
    if isinstance(folder, str):
        return ImageFiles(_index_remote(folder, stems), {}, [])
    if not folder.is_dir():
        raise FileNotFoundError(f"images: expected a folder, got {folder}")
    root = os.path.realpath(folder)

    def leads_out(link: str) -> bool:
        return os.path.commonpath([root, os.path.realpath(link)]) != root

    found: dict[str, tuple[bool, int, str]] = {}
    linked = []
    folders = [os.fspath(folder)]
    while folders:
        with os.scandir(folders.pop()) as entries:
            for entry in entries:
                stem, suffix = os.path.splitext(entry.name)
                stem = one(stem)
                link = entry.is_symlink()
                if entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif link and os.path.isdir(entry.path):
                    if leads_out(entry.path):  # else its files are found without it
                        linked.append(entry.path)
                elif suffix.lower() in SUFFIXES and stem in stems:
                    out = link and leads_out(entry.path)
                    candidate = (out, SUFFIXES.index(suffix.lower()), entry.path)
                    found[stem] = min(found.get(stem, candidate), candidate)
    inside, outside = (
        {stem: path for stem, (out, _, path) in found.items() if out is which}
        for which in (False, True)
    )
    return ImageFiles(inside, outside, sorted(linked))


def _index_remote(folder: str, stems: Container[str]) -> dict[str, str]:
    found: dict[str, tuple[int, str]] = {}
    for path in map(str, list_files(folder)):
        stem, suffix = os.path.splitext(path.rsplit("/", 1)[1])
        stem = one(stem)
        if suffix.lower() in SUFFIXES and stem in stems:
            candidate = (SUFFIXES.index(suffix.lower()), path)
            found[stem] = min(found.get(stem, candidate), candidate)
    if not found:
        raise FileNotFoundError(f"images: expected a folder with images called after the items, got none in {folder}")  # fmt: skip
    return {stem: path for stem, (_, path) in found.items()}


def check_image(data: bytes, shrink: int = 0) -> Checked:
    """Decodes an image in full. With `shrink`, one whose short side is longer is scaled down to it and written as JPEG (quality 90).

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
            text = "not an image"
        return Checked(reason=text or type(error).__name__)


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
    """Reads every coefficient, at an eighth of the size; raises at a warning of libjpeg (truncated, corrupt)."""
    simplejpeg.decode_jpeg(data, "GRAY", fastdct=True, min_height=1, min_width=1, min_factor=8)


def check_images(
    paths: Sequence[str | None], *, shrink: int = 0, threads: int = 0
) -> Iterator[Checked]:
    """`check_image` of each file in order, in threads; `None` gives the reason "missing". Holds a few hundred images at most."""

    def check(path: str | None) -> Checked:
        if path is None:
            return Checked(reason="missing")
        try:
            return check_image(read_any(path), shrink)
        except OSError as error:
            return Checked(reason=f"unreadable: {error.strerror or error}")
        except ValueError as error:
            return Checked(reason=str(error))

    with ThreadPoolExecutor(threads or len(os.sched_getaffinity(0)), "courier-check") as pool:
        for start in range(0, len(paths), 256):
            yield from pool.map(check, paths[start : start + 256])
