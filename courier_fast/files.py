"""Files that are complete or not there, whenever the process or the machine stops."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path


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
    """`write` fills a file or folder beside `path`, which is then flushed and renamed to it."""
    partial = partial_of(path)
    remove(partial)
    write(partial)
    publish(path)


def partial_of(path: Path) -> Path:
    """Where a file or folder is while it is written."""
    return path.with_name(f".{path.name}.partial")


def publish(path: Path) -> None:
    """Flushes what was written in place of a file or folder, and renames it."""
    partial = partial_of(path)
    sync_all(partial)
    if path.is_dir():
        remove(path)
    os.replace(partial, path)
    sync(path.parent)


def sha256(*paths: Path) -> str:
    """ "sha256:..." of the bytes of a file, or of several in that order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return f"sha256:{digest.hexdigest()}"


def check_sha256(path: Path, expected: str, advice: str = "") -> None:
    """ValueError, with `advice` at its end, where the bytes of a file are not those that were listed."""
    found = sha256(path)
    if found != expected:
        end = f"; {advice}" if advice else ""
        raise ValueError(f"{path} was altered: expected {expected[:19]}, got {found[:19]}{end}")


def remove(path: Path) -> None:
    """Removes a file or folder if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
