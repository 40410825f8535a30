"""Folders that are local or in an object store: s3://, gs:// and hdfs:// by pyarrow, other URLs by
fsspec where it knows them.

Files of a remote folder are fetched whole, checked, and kept in a local cache that all processes of
a machine share. Variables of the environment:

- COURIER_FAST_CACHE: its folder; ~/.cache/courier_fast where it is not set
- COURIER_FAST_CACHE_GIB: its size, 64 where it is not set; the files used least recently go first
- AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, ...: an S3 endpoint and its credentials, as for every AWS
  tool
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from pyarrow import fs

from .disk import size_text, writing
from .files import sha256, write_atomically
from .locations import Location as Location
from .locations import is_url as is_url
from .locations import local_path
from .locations import location as location

T = TypeVar("T")
_BLOCK = 1 << 20
# Files fetched or uploaded at once: the latency of an object store is tens of milliseconds.
_FETCHES = 8


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
        raise ValueError(
            "expected a local path, s3://, gs://, hdfs:// or another URL that fsspec opens, "
            f"got {root}: {error}"
        ) from None
    return fs.PyFileSystem(fs.FSSpecHandler(found)), path


def filesystem(url: str) -> tuple[fs.FileSystem, str]:
    """The file system of a URL and the path in it. ValueError for a scheme that nobody knows."""
    scheme, rest = url.split("://", 1)
    host, slash, path = rest.partition("/")
    found, root = _of_root(f"{scheme}://{host}")
    return found, f"{root.rstrip('/')}{slash}{path}"


def read_bytes(path: Location, most: int | None = None) -> bytes:
    """A file's bytes, its first ones with `most`. FileNotFoundError where it is not there."""
    if isinstance(path, Path):
        with path.open("rb") as local:
            return local.read(-1 if most is None else most)
    found, name = filesystem(path)
    with found.open_input_file(name) as file:
        return file.read(most)


def size_and_time(url: str) -> tuple[int, int]:
    """A file's size in bytes and the nanosecond of its last change; zeros where it is not there."""
    found, name = filesystem(url)
    about = found.get_file_info(name)
    return about.size or 0, about.mtime_ns or 0


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


def list_files(folder: Location, *, everything: bool = False) -> list[Location]:
    """All files under a folder or URL, sorted. Those that Hive and Spark hide (a name or folder
    that begins with "_" or ".") are left out, but for `everything`."""
    if isinstance(folder, Path):
        inside = sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())
        return [folder / path for path in inside if everything or not hidden(path)]
    found, name = filesystem(folder)
    rows = found.get_file_info(fs.FileSelector(name, recursive=True, allow_not_found=True))
    start = len(name.rstrip("/")) + 1
    inside = sorted(row.path[start:] for row in rows if row.type == fs.FileType.File)
    return [f"{folder}/{path}" for path in inside if everything or not hidden(path)]


def hidden(path: str) -> bool:
    return any(part.startswith(("_", ".")) and "=" not in part for part in path.split("/"))


def write_file(path: Location, fill: Callable[[Path], object]) -> tuple[int, str]:
    """`fill` writes a local file, which is then there as `path`, complete or not at all; its size
    and checksum."""
    if isinstance(path, Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, fill)
        return path.stat().st_size, sha256(path)
    found, name = filesystem(path)
    if found.type_name not in ("s3", "gcs"):  # which have no folders
        found.create_dir(os.path.dirname(name), recursive=True)
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder) / "file"
        fill(local)
        fs.copy_files(str(local), name, fs.LocalFileSystem(), found)
        return local.stat().st_size, sha256(local)


def delete_file(path: Location) -> None:
    """Removes a file if it is there."""
    if isinstance(path, Path):
        path.unlink(missing_ok=True)
    elif is_file(path):
        found, name = filesystem(path)
        found.delete_file(name)


def local_copy(path: Location) -> Path:
    """A file as a local one: itself, or a copy in the cache for as long as size and time of the
    original are the same."""
    if isinstance(path, Path):
        return path
    found, name = filesystem(path)
    about = found.get_file_info(name)
    if about.type != fs.FileType.File:
        raise FileNotFoundError(f"{path} is not there")
    key = hashlib.sha256(f"{path} {about.size} {about.mtime_ns}".encode()).hexdigest()
    return Cache().get(
        key, about.size, lambda to: fs.copy_files(name, str(to), found, fs.LocalFileSystem())
    )


# ---- shards and the cache ------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A file of a table, as the manifest lists it."""

    name: str
    rows: int
    bytes: int
    sha256: str


class Cache:
    """Files by the checksum of their bytes. Other processes use the same folder: a file is complete
    or not there."""

    def __init__(self, folder: Path | None = None, limit: int | None = None) -> None:
        self.folder = folder or local_path(
            os.environ.get("COURIER_FAST_CACHE") or Path.home() / ".cache" / "courier_fast"
        )
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
                        with writing(
                            self.folder,
                            lambda: (
                                f"the cache needs {size_text(size)} there; COURIER_FAST_CACHE "
                                "names another folder"
                            ),
                        ):
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
        """Removes what was used least recently until `size` bytes more are within the limit. A
        process that has a file mapped keeps its bytes."""
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
        whole = join(self.path, name)
        try:
            return read_bytes(whole).decode()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except UnicodeDecodeError:
            raise ValueError(f"{whole}: was altered, expected text in UTF-8") from None

    def local(self, shard: Shard, *, check: bool = True) -> Path:
        """A shard as a local file. ValueError names one that is cut off or was altered; of a local
        one the checksum is looked at once, with `check`."""
        if not isinstance(self.path, Path):
            return self.cache.get(shard.sha256, shard.bytes, lambda to: self._fetch(shard, to))
        path = self.path / shard.name
        if shard.name not in self._checked:
            try:
                size = path.stat().st_size
            except FileNotFoundError:
                raise FileNotFoundError(
                    f"dataset: {path} is in the manifest, but is not there"
                ) from None
            if size != shard.bytes:
                raise ValueError(
                    f"dataset: {path} was cut off or altered: expected {shard.bytes:,} bytes, "
                    f"got {size:,}"
                )
            if check:
                self.verify(shard)
                self._checked.add(shard.name)
        return path

    def open(
        self, shards: Sequence[Shard], load: Callable[[Path], T], *, check: bool = True
    ) -> list[T]:
        """`load` of the local file of each shard; remote ones are fetched at the same time."""
        if isinstance(self.path, Path):
            return [load(self.local(shard, check=check)) for shard in shards]

        def one(shard: Shard) -> T:
            while True:
                path = self.local(shard)
                try:
                    return load(path)
                except FileNotFoundError:  # it had to make room for another in between
                    continue

        if len(shards) == 1:
            return [one(shards[0])]
        with ThreadPoolExecutor(_FETCHES, "courier-fetch") as pool:
            return list(pool.map(one, shards))

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
                raise FileNotFoundError(
                    f"dataset: {whole} is in the manifest, but is not there"
                ) from None
        with source, Path(to or os.devnull).open("wb") as file:
            while block := source.read(_BLOCK):
                digest.update(block)
                size += file.write(block)
        got = f"sha256:{digest.hexdigest()}"
        if size != shard.bytes or got != shard.sha256:
            raise ValueError(
                f"dataset: {whole} was cut off or altered: expected {shard.bytes:,} bytes with "
                f"{shard.sha256}, got {size:,} with {got}"
            )
