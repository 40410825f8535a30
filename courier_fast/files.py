"""Files that are complete or not there, whenever the process or the machine stops."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .disk import writing


def sync_all(path: Path) -> None:
    """Flushes a file, or a folder with everything in it, to the disk."""
    if path.is_dir():
        for child in path.iterdir():
            sync_all(child)
    sync(path)


def sync(path: Path) -> None:
    """Flushes a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """`write` fills a file beside `path`, which is then flushed and renamed to it; gone where that
    fails. A link stays one, a device or pipe is written to. Raises IsADirectoryError where a folder
    is there, DiskFullError where there is no room."""
    path = Path(os.path.realpath(path))
    if path.is_dir():
        raise IsADirectoryError(f"{path}: expected a file, got a folder")
    if path.exists() and not path.is_file():
        _write_through(path, write)
        return
    partial = partial_of(path)
    try:
        with writing(path):
            partial.unlink(missing_ok=True)
            write(partial)
            publish(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def _write_through(path: Path, write: Callable[[Path], object]) -> None:
    """A device or pipe: what was written elsewhere goes through it."""
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder) / "file")
        with (Path(folder) / "file").open("rb") as file, path.open("wb") as to:
            shutil.copyfileobj(file, to)


def partial_of(path: Path) -> Path:
    """Where a file or folder is while it is written."""
    return path.with_name(f".{path.name}.partial")


def publish(path: Path) -> None:
    """Flushes what was written in place of a file or folder, and renames it; a folder that is there
    must be empty."""
    partial = partial_of(path)
    sync_all(partial)
    os.replace(partial, path)
    sync(path.parent)


def read_json(path: Path, advice: str = "") -> dict[str, Any]:
    """The object in a JSON file. OSError where it cannot be read, ValueError, with `advice` at its
    end, where it is cut off or something else."""
    return parse_json(path.read_bytes(), path, advice)


def parse_json(data: bytes | str, path: object, advice: str = "") -> dict[str, Any]:
    """The JSON object that `path` holds. ValueError names the file."""
    end = f"; {advice}" if advice else ""
    if not data.strip():
        raise ValueError(f"{path}: expected JSON, got an empty file{end}")
    try:
        found = json.loads(data)
    except UnicodeDecodeError:
        raise ValueError(f"{path}: expected JSON in UTF-8, got other bytes{end}") from None
    except RecursionError:
        raise ValueError(f"{path}: expected JSON, got brackets within brackets{end}") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: was cut off or altered, expected JSON: {error.msg} in line {error.lineno}, "
            f"column {error.colno}{end}"
        ) from None
    if not isinstance(found, dict):
        raise ValueError(f"{path}: expected a JSON object, got {type(found).__name__}{end}")
    return found


def sha256(*paths: Path) -> str:
    """ "sha256:..." of the bytes of a file, or of several in that order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def array_sha256(array: npt.NDArray) -> str:
    """ "sha256:..." of an array's type, shape and values."""
    digest = hashlib.sha256(f"{array.dtype.str}{array.shape}".encode())
    digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return f"sha256:{digest.hexdigest()}"


def checksums(folder: Path) -> dict[str, str]:
    """The checksum of each file in a folder, by name; without hidden ones."""
    return {p.name: sha256(p) for p in sorted(folder.iterdir()) if not p.name.startswith(".")}


def check_listed(folder: Path, files: Mapping[str, str], listing: str, advice: str = "") -> None:
    """FileNotFoundError or ValueError, with `advice` at its end, where one of the files that
    `listing` has with their checksums is not there, or has other bytes."""
    end = f"; {advice}" if advice else ""
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise FileNotFoundError(f"{path} is in {listing}, but is not there{end}")
        found = sha256(path)
        if found != expected:
            raise ValueError(f"{path} was altered: expected {expected[:19]}, got {found[:19]}{end}")


def remove(path: Path) -> None:
    """Removes a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
