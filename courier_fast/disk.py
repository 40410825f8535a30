"""Full disks: one line that names the place and what is needed, whoever met it, and before a file
is mapped."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# NumPy, Arrow, DuckDB, safetensors and faiss say it in words alone.
_WORDS = re.compile(
    r"no space left|disk quota exceeded|file too large|(?:errno|os error) (?:28|122|27)\b|\d+ "
    r"requested and \d+ written"
    r"|max_temp_directory_size|failed to offload|could not write (?:file|to|all)|disk (?:is )?full",
    re.IGNORECASE,
)


class DiskFullError(OSError):
    """A file could not be written: the disk is full, or a quota or limit of size is reached."""


def is_full(error: BaseException | None) -> bool:
    """Whether an exception, or one that it came from, says that a disk is full."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, OSError) and error.errno in _NUMBERS:
            return True
        if isinstance(error, DiskFullError) or _WORDS.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def size_text(size: float) -> str:
    """A number of bytes for people."""
    for unit in ("bytes", "kB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:,.0f} {unit}" if size >= 100 or unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1000
    raise AssertionError


def bytes_under(folder: Path) -> int:
    """Bytes that a file, or a folder's files, take on the disk."""
    total = 0
    for path in [folder, *folder.rglob("*")] if folder.is_dir() else [folder]:
        try:
            total += path.lstat().st_blocks * 512
        except OSError:  # gone in between
            continue
    return total


def _existing(path: Path) -> Path:
    path = Path(os.path.abspath(path))
    return next((p for p in (path, *path.parents) if p.exists()), Path("/"))


@contextmanager
def writing(place: str | os.PathLike[str], need: Callable[[], str] | None = None) -> Iterator[None]:
    """Whatever says within that a disk is full becomes a DiskFullError in one line, with what
    `need` says of the space that is needed."""
    try:
        yield
    except DiskFullError:
        raise
    except Exception as error:
        if not is_full(error):
            raise
        raise full_error(place, error, need() if need else "") from error


def full_error(
    place: str | os.PathLike[str], error: BaseException, need: str = ""
) -> DiskFullError:
    """The line about `place`."""
    if isinstance(error, OSError) and error.errno == errno.EFBIG:
        return DiskFullError(
            f"{os.fspath(place)}: cannot be written, a limit on the size of files is reached "
            f"(ulimit -f){'; ' if need else ''}{need}"
        )
    there = _existing(Path(place))
    try:
        about = shutil.disk_usage(there)
        room = f", {size_text(about.free)} free of {size_text(about.total)}"
    except OSError:
        room = ""
    quota = isinstance(error, OSError) and error.errno == errno.EDQUOT
    what = "the quota is used up" if quota else "the disk is full"
    return DiskFullError(
        f"{os.fspath(place)}: cannot be written, {what} (the one of "
        f"{there}{room}){'; ' if need else ''}{need}"
    )


def reserve(path: Path, size: int) -> None:
    """Makes a file of `size` bytes that are there on the disk, so that a map of it can be written:
    on a full disk that would end the process.

    DiskFullError, and no file, where there is no room.
    """
    try:
        with writing(path, lambda: f"it needs {size_text(size)}"), path.open("wb") as file:
            if size:
                os.posix_fallocate(file.fileno(), 0, size)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def new_map(path: Path, dtype: npt.DTypeLike, shape: tuple[int, ...]) -> np.memmap:
    """A file of zeros mapped for writing; DiskFullError where there is no room for it."""
    reserve(path, int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
    return np.memmap(path, dtype, "r+", shape=shape)


def write_rows(file: IO[bytes], values: npt.NDArray) -> None:
    """Appends an array's bytes to an open file. `ndarray.tofile` would say of a full disk neither
    that nor where."""
    if values.size:
        file.write(memoryview(np.ascontiguousarray(values)).cast("B"))  # type: ignore[arg-type]
