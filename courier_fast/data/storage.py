"""Folders that are local or in an object store: s3://, gs:// and hdfs:// by pyarrow, other URLs by fsspec where it knows them.

Files of a remote folder are fetched whole, checked, and kept in a local cache that all processes of a machine share:

| variable | |
| --- | --- |
| COURIER_FAST_CACHE | its folder; ~/.cache/courier_fast where it is not set |
| COURIER_FAST_CACHE_GIB | its size, 64 where it is not set; the files used least recently go first |
| AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ... | an S3 endpoint and its credentials, as for every AWS tool |
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from pyarrow import fs

Location = str | Path
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_BLOCK = 1 << 20
_FETCHES = 8  # files that are fetched or uploaded at once: the latency of an object store is tens of milliseconds


def location(path: str | os.PathLike[str]) -> Location:
    """A URL as text without a slash at its end, anything else as a path."""
    text = os.fspath(path)
    if not _URL.match(text):
        return Path(text)
    return str(filesystem_path(text)) if text.startswith("file://") else text.rstrip("/")


def filesystem_path(url: str) -> Path:
    """The local path of a file:// URL."""
    return Path(fs.FileSystem.from_uri(url)[1])


def join(folder: Location, name: str) -> Location:
    return folder / name if isinstance(folder, Path) else f"{folder}/{name}"


@lru_cache(maxsize=64)
def _of_root(root: str) -> tuple[fs.FileSystem, str]:
    try:
        return fs.FileSystem.from_uri(root)
    except ValueError:
        from fsspec.core import url_to_fs  # type: ignore[import-untyped]
    try:
        found, path = url_to_fs(root)
    except (ValueError, ImportError) as error:
        raise ValueError(f"expected a local path, s3://, gs://, hdfs:// or another URL that fsspec opens, got {root}: {error}") from None  # fmt: skip
    return fs.PyFileSystem(fs.FSSpecHandler(found)), path


def filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URL and the path in it. ValueError for a scheme that nobody knows."""
    scheme, rest = url.split("://", 1)
    host, slash, path = rest.partition("/")
    found, root = _of_root(f"{scheme}://{host}")
    return found, f"{root.rstrip('/')}{slash}{path}"


def read_bytes(path: Location) -> bytes:
    """A file's bytes. FileNotFoundError where it is not there."""
    if isinstance(path, Path):
        return path.read_bytes()
    found, name = filesystem(path)
    with found.open_input_file(name) as file:
        return file.read()


def is_file(path: Location) -> bool:
    if isinstance(path, Path):
        return path.is_file()
    found, name = filesystem(path)
    return bool(found.get_file_info(name).type == fs.FileType.File)


def is_folder(path: Location) -> bool:
    """Whether there is a folder, or in an object store anything under that name."""
    if isinstance(path, Path):
        return path.is_dir()
    found, name = filesystem(path)
    return bool(found.get_file_info(name).type == fs.FileType.Directory)


def list_files(folder: str) -> list[str]:
    """URLs of all files under a URL, sorted. Those that Hive and Spark hide (a name or folder that begins with "_" or ".") are left out."""
    found, name = filesystem(folder)
    rows = found.get_file_info(fs.FileSelector(name, recursive=True, allow_not_found=True))
    inside = sorted(row.path[len(name.rstrip("/")) + 1 :] for row in rows if row.type == fs.FileType.File)  # fmt: skip
    return [f"{folder}/{path}" for path in inside if not hidden(path)]


def hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) and "=" not in part for part in path.split("/"))


def upload(folder: Path, url: str, last: str) -> None:
    """Copies a folder's files to a URL; `last` follows when all others are there, and goes first where it is there already."""
    found, root = filesystem(url)
    if found.get_file_info(f"{root}/{last}").type == fs.FileType.File:
        found.delete_file(f"{root}/{last}")
    names = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())

    def send(name: str) -> None:
        if not isinstance(found, fs.S3FileSystem):  # which has no folders
            found.create_dir(os.path.dirname(f"{root}/{name}"), recursive=True)
        fs.copy_files(str(folder / name), f"{root}/{name}", destination_filesystem=found)

    with ThreadPoolExecutor(_FETCHES) as pool:
        list(pool.map(send, [n for n in names if n != last]))
    send(last)


# ---- shards and the cache ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A file of a table, as the manifest lists it. Without a checksum it is that of a folder of format 1."""

    name: str
    rows: int
    bytes: int
    sha256: str | None


class Cache:
    """Files by the checksum of their bytes. Other processes use the same folder: a file is complete or not there."""

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = folder or Path(os.environ.get("COURIER_FAST_CACHE") or Path.home() / ".cache" / "courier_fast")  # fmt: skip
        size = os.environ.get("COURIER_FAST_CACHE_GIB", "64")
        try:
            self.limit = int(float(size) * 2**30) if limit is None else limit
        except ValueError:
            raise ValueError(f"COURIER_FAST_CACHE_GIB: expected a number, got {size!r}") from None

    def get(self, digest: str, size: int, write: Callable[[Path], None]) -> Path:
        """The file with this checksum; where it is not there, `write` makes it."""
        path = self.folder / digest.replace(":", "-")
        if not self._use(path, size):
            with self._locked(int(digest[-2:], 16) % 64):  # one process of the machine fetches it
                if not self._use(path, size):
                    self._make_room(size)
                    partial = path.with_name(f".{path.name}.{os.getpid()}")
                    try:
                        write(partial)
                        os.replace(partial, path)
                    finally:
                        partial.unlink(missing_ok=True)
        return path

    @staticmethod
    def _use(path: Path, size: int) -> bool:
        try:
            found = path.stat().st_size == size
            os.utime(path)
        except FileNotFoundError:
            return False
        return found

    @contextmanager
    def _locked(self, number: int | str) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f".lock-{number}").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _make_room(self, size: int) -> None:
        """Removes what was used least recently until `size` bytes more are within the limit. A process that has a file mapped keeps its bytes."""
        with self._locked("room"):
            files = []
            for entry in os.scandir(self.folder):
                if not entry.name.startswith("."):
                    about = entry.stat()
                    files.append((about.st_mtime_ns, about.st_size, entry.path))
            over = sum(size for _, size, _ in files) + size - self.limit
            for _, of, path in sorted(files):
                if over <= 0:
                    break
                Path(path).unlink(missing_ok=True)
                over -= of

    def scratch(self) -> tempfile._TemporaryFileWrapper[bytes]:
        """An unnamed file in the cache's folder, gone when it is closed."""
        self.folder.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryFile(dir=self.folder)  # type: ignore[return-value]


class Folder:
    """A folder of shards to read from, local or remote."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = location(path)
        self.cache = Cache()
        self._checked: set[str] = set()

    def read_text(self, name: str) -> str | None:
        """A file's text; None where it is not there."""
        try:
            return read_bytes(join(self.path, name)).decode()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def local(self, shard: Shard, *, check: bool = True) -> Path:
        """A shard as a local file. ValueError names one that is cut off or was altered; of a local one the checksum is looked at once, with `check`."""
        if not isinstance(self.path, Path):
            assert shard.sha256 is not None
            return self.cache.get(shard.sha256, shard.bytes, lambda to: self._fetch(shard, to))
        path = self.path / shard.name
        if shard.name not in self._checked:
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise FileNotFoundError(f"dataset: {path} is in the manifest, but is not there") from None  # fmt: skip
            if size != shard.bytes:
                raise ValueError(f"dataset: {path} was cut off or altered: expected {shard.bytes:,} bytes, got {size:,}")  # fmt: skip
            if check and shard.sha256 is not None:
                self.verify(shard)
                self._checked.add(shard.name)
        return path

    def locals(self, shards: Sequence[Shard], *, check: bool = True) -> list[Path]:
        """`local` of several, fetched at the same time."""
        if isinstance(self.path, Path) or len(shards) == 1:
            return [self.local(shard, check=check) for shard in shards]
        with ThreadPoolExecutor(_FETCHES, "courier-fetch") as pool:
            return list(pool.map(self.local, shards))

    def verify(self, shard: Shard) -> None:
        """Reads a shard where it lies; ValueError unless its bytes are those of the manifest."""
        self._fetch(shard, None)

    def _fetch(self, shard: Shard, to: Path | None) -> None:
        whole = join(self.path, shard.name)
        digest, size = hashlib.sha256(), 0
        if isinstance(whole, Path):
            source = whole.open("rb")
        else:
            found, name = filesystem(whole)
            try:
                source = found.open_input_stream(name)
            except FileNotFoundError:
                raise FileNotFoundError(f"dataset: {whole} is in the manifest, but is not there") from None  # fmt: skip
        with source, Path(to or os.devnull).open("wb") as file:
            while block := source.read(_BLOCK):
                digest.update(block)
                size += file.write(block)
        got = f"sha256:{digest.hexdigest()}"
        if size != shard.bytes or got != shard.sha256:
            raise ValueError(
                f"dataset: {whole} was cut off or altered: expected {shard.bytes:,} bytes with {shard.sha256}, got {size:,} with {got}"
            )
