"""Files as lazy tables, each with a schema of its own: local or remote, alone or in folders.

Names are literal: no character in them is a pattern. Only headers are read before rows are asked
for, and of the rows only the columns asked for.
Whatever a library finds wrong is a ValueError that names the file.
"""

from __future__ import annotations

import difflib
import errno
import gzip
import logging
import os
import re
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as parquet
from polars.io.plugins import register_io_source

from ...locations import Location
from ...storage import filesystem, hidden, is_file, is_folder, join, list_files
from .delimited import Delimited, is_packed, with_header
from .json_lines import Kinds, json_lines

log = logging.getLogger(__name__)

_NAME = re.compile(r"\.(parquet|csv|tsv|txt|jsonl|ndjson|json)(\.gz)?$", re.IGNORECASE)
_SAME = {"ndjson": "jsonl", "json": "jsonl"}
_UNPACK = {
    ".zst": "zstd -d",
    ".bz2": "bunzip2",
    ".xz": "unxz",
    ".zip": "unzip",
    ".lz4": "lz4 -d",
    ".7z": "7z x",
    ".tar": "tar xf",
    ".tgz": "tar xf",
    ".xlsx": "save it as CSV UTF-8",
    ".xls": "save it as CSV UTF-8",
}
_EXPECTED = "expected a .csv, .tsv, .parquet or .jsonl file (.gz where text)"
_FOREIGN = (
    pl.exceptions.PolarsError,
    pl.exceptions.PanicException,
    pa.ArrowException,
    duckdb.Error,
    gzip.BadGzipFile,
    zlib.error,
    EOFError,
    UnicodeError,
)
_OPENED = 16  # remote files whose headers are read at once
_ROWS = 1 << 17
_VALUES = 1 << 22  # of lists, that are read at once
_BUFFER = 1 << 20  # bytes

Read = Callable[[Sequence[str]], Iterator[pl.DataFrame]]
Schema = dict[str, "pl.DataType | type[pl.DataType]"]


# ---- what is wrong -------------------------------------------------------------------------------


@contextmanager
def reading(where: object) -> Iterator[None]:
    """What a library raises inside, as a ValueError of one line that begins with `where`."""
    try:
        yield
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"{where}: cannot be read: its gzip data is damaged or cut off: {short(error)}"
        ) from error
    except _FOREIGN as error:
        raise ValueError(f"{where}: cannot be read: {short(error)}") from error
    except ValueError as error:  # of a function that polars calls: it adds its plan
        raise ValueError(str(error).split("\n\nThis error occurred")[0]) from error
    except OSError as error:
        if error.filename is not None or isinstance(error, FileNotFoundError):
            raise
        if error.errno is None:  # of Arrow
            raise ValueError(f"{where}: cannot be read: {short(error)}") from error
        raise type(error)(error.errno, error.strerror or short(error), str(where)) from error


def short(error: BaseException) -> str:
    """What it says, in one line of at most 600 characters."""
    said = " ".join(str(error).split("\n\nYou might")[0].split())
    return said if len(said) <= 600 else f"{said[:300]} ... {said[-200:]}"


def need(frame: pl.LazyFrame, path: Location, *columns: str) -> pl.LazyFrame:
    """The frame; ValueError naming the columns that are not there and those that are."""
    check_columns(path, frame.collect_schema().names(), columns)
    return frame


def check_columns(path: Location, found: Sequence[str], columns: Sequence[str]) -> None:
    """ValueError naming the columns that are not there once, and what may have been meant."""
    missing = [c for c in columns if c not in found]
    if missing:
        names = some(found, 40)
        raise ValueError(
            f"{path}: expected the columns {', '.join(columns)}, got {names or 'an empty file'}"
            f" ({', '.join(missing)} missing{_meant(missing, found)})"
        )
    again = [c for c in columns if list(found).count(c) > 1]
    if again:
        raise ValueError(
            f"{path}: expected each column once, got {again[0]} {list(found).count(again[0])} times"
        )


def _meant(missing: Sequence[str], found: Sequence[str]) -> str:
    plain = {re.sub(r"[\W_]", "", name.lower()): name for name in found}
    for column in missing:
        close = difflib.get_close_matches(re.sub(r"[\W_]", "", column.lower()), plain, 1, 0.9)
        if close:
            return f"; is {plain[close[0]]!r} meant? names are taken as they are written"
    if len(found) == 1 and all(column in found[0] for column in missing):
        return "; is the separator another? it is a comma, semicolon, tab or bar, of .tsv a tab"
    if found and any(re.fullmatch(r"-?\d+(\.\d+)?|\d{4}-\d\d-\d\d.*", name) for name in found):
        return "; has the file no header? its first line looks like a row"
    return ""


# ---- a file --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A file as a table.

    Args:
        path: as it was given.
        schema: the columns in it.
        read: some of them, in batches.
        hive_columns: what its folders' names hold, such as day=2020-09-01, by column.
        names: of the columns in it; one may be there twice.
        any_column: whether columns are known only when all rows are read: JSON lines.
    """

    path: Location
    schema: Schema
    read: Read
    hive_columns: dict[str, str | None] = field(default_factory=dict)
    names: Sequence[str] = ()
    any_column: bool = False

    def known(self, columns: Sequence[str]) -> set[str]:
        """Which of these it has. Of JSON lines, that have a value in some line: all are read."""
        found = {c for c in columns if c in self.schema or c in self.hive_columns}
        if self.any_column:
            others = [c for c in columns if c not in found]
            with reading(self.path):
                for batch in self.read(others):
                    found |= {c for c in others if batch[c].null_count() < len(batch)}
        return found

    def frame(
        self, *columns: str, optional: Sequence[str] = (), lists: Sequence[str] = ()
    ) -> pl.LazyFrame:
        """These columns, and those of `optional` that the file has.

        ValueError where one is missing, is there twice or holds lists, but for those of `lists`,
        which JSON lines give as text.
        """
        if self.any_column:
            inside = [c for c in columns if c not in self.hive_columns]
            others = [c for c in optional if c not in self.hive_columns]
            read: Read = json_lines(self.path, {}, inside, lists).read
            # Some field, for the number of rows, where folders name all columns.
            schema: Schema = dict.fromkeys([*inside, *others] or ["row"], pl.String)
        else:
            there = [c for c in optional if c in self.known(optional)]
            found = [*self.names, *(p for p in self.hive_columns if p not in self.schema)]
            check_columns(self.path, found, [*columns, *there])
            read = self.read
            schema = {c: self.schema[c] for c in [*columns, *there] if c in self.schema}
        for name, kind in schema.items():
            if name not in lists and (kind.is_nested() or kind == pl.Object):
                raise ValueError(
                    f"{self.path}: expected text, numbers or times as {name}, got {kind}"
                )
        wanted = [c for c in (*columns, *optional) if c in self.hive_columns and c not in schema]
        if not schema and self.schema:  # for the number of rows
            schema = dict([next(iter(self.schema.items()))])
        frame = lazy_frame(self.path, schema, read)
        return frame.with_columns(pl.lit(self.hive_columns[c], pl.String).alias(c) for c in wanted)

    def all(self) -> pl.LazyFrame:
        """All its columns."""
        return lazy_frame(self.path, self.schema, self.read)


def lazy_frame(path: Location, schema: Schema, read: Read) -> pl.LazyFrame:
    """A lazy table of what `read` gives, which needs nothing but `path` in any process."""

    def batches(
        columns: list[str] | None, predicate: pl.Expr | None, rows: int | None, _: int | None
    ) -> Iterator[pl.DataFrame]:
        with reading(path):
            for whole in read(columns or list(schema)):
                for part in whole.iter_slices(_ROWS):
                    frame = part if rows is None else part.head(rows)
                    rows = None if rows is None else rows - len(frame)
                    yield frame if predicate is None else frame.filter(predicate)
                    if rows == 0:
                        return

    return register_io_source(batches, schema=schema)


def open_table(path: Location, hive_columns: dict[str, str | None] | None = None) -> Table | None:
    """A file as a table; None where it is an empty text file. ValueError where it is no table."""
    kind = kind_of(path)
    with reading(path):
        if kind == "parquet":
            columns = Parquet(path).columns()
            return Table(
                path, dict(columns), Parquet(path).read, hive_columns or {}, [n for n, _ in columns]
            )
        if kind == "jsonl":
            source_of = json_lines(path, {})
            return Table(path, {}, source_of.read, hive_columns or {}, any_column=True)
        text = with_header(path, "\t" if kind == "tsv" else None)
    if text is None:
        return None
    return Table(
        path, dict.fromkeys(text.names, pl.String), text.read, hive_columns or {}, text.names
    )


def kind_of(path: Location) -> str:
    """parquet, jsonl, csv, tsv or txt, by the name. ValueError for another."""
    found = _NAME.search(str(path))
    if found is None or (found[2] and found[1].lower() == "parquet"):
        ending = os.path.splitext(str(path))[1].lower()
        do = _UNPACK.get(ending)
        hint = "" if do is None else f"; {do} first" if " it " not in do else f"; {do}"
        raise ValueError(f"{path}: {_EXPECTED}{hint}")
    kind = found[1].lower()
    return _SAME.get(kind, kind)


@dataclass(frozen=True)
class Parquet:
    """A file of Parquet."""

    path: Location

    @contextmanager
    def _open(self, buffer: int = 0) -> Iterator[parquet.ParquetFile]:
        if isinstance(self.path, Path):
            file: Any = self.path.open("rb")
        else:
            system, name = filesystem(self.path)
            file = system.open_input_file(name)
        with file:
            yield parquet.ParquetFile(
                file,
                coerce_int96_timestamp_unit="us",
                pre_buffer=buffer == 0 and not isinstance(self.path, Path),
                buffer_size=buffer,
            )

    def columns(self) -> list[tuple[str, Any]]:
        """Names and types."""
        with self._open() as file:
            return [(column.name, _polars_type(column.type)) for column in file.schema_arrow]

    def read(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Some columns, in batches; text in any form as text."""
        nested = {name for name, kind in self.columns() if kind.is_nested()}
        # Of lists a row group may be larger than memory: its columns are read piece by piece.
        with self._open(_BUFFER if nested & set(columns) else 0) as file:
            for group in range(file.num_row_groups):  # what is read ahead is let go after each
                rows = _rows_at_once(file.metadata.row_group(group), nested & set(columns))
                for batch in file.iter_batches(rows, [group], columns=list(columns)):
                    arrays = [_plain(batch.column(name)) for name in columns]
                    frame = pl.from_arrow(pa.table(arrays, list(columns)))
                    assert isinstance(frame, pl.DataFrame)
                    yield frame


def _rows_at_once(group: Any, lists: set[str]) -> int:
    """So many that their lists hold about _VALUES."""
    columns = [group.column(i) for i in range(group.num_columns)] if lists else []
    values = sum(c.num_values for c in columns if c.path_in_schema.split(".")[0] in lists)
    return min(max(_VALUES * group.num_rows // max(values, 1), 1), _ROWS)


def _polars_type(kind: pa.DataType) -> Any:
    """As what a column of Arrow is read."""
    try:
        found = pl.from_arrow(_plain(pa.array([], kind)))
    except (*_FOREIGN, NotImplementedError, TypeError, ValueError):
        return pl.Object()  # an error where it is needed
    assert isinstance(found, pl.Series)
    return found.dtype


def _plain(column: pa.Array) -> pa.Array:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    return column


# ---- files and folders ---------------------------------------------------------------------------


def scan(path: Location) -> pl.LazyFrame:
    """All columns of one file. ValueError where it is empty."""
    table = open_table(_there(path))
    if table is None:
        raise ValueError(
            f"{path}: expected a line with the names of the columns, got an empty file"
        )
    return table.all()


def scan_json(path: Path, schema: Kinds, needed: Sequence[str]) -> pl.LazyFrame:
    """Some fields of a .jsonl file, with their types; its other fields may hold anything."""
    with reading(path):
        return lazy_frame(path, dict(schema), json_lines(path, schema, needed).read)


def scan_lines(path: Path, separator: str, columns: Sequence[str]) -> pl.LazyFrame:
    """A text file without a header, whose separator may have several characters.

    Columns past a line's end are null.
    """
    lines = Delimited(_there(path), ("line",), "\x01", quote=False, lossy=True)
    parts = pl.col("line").str.split(separator)
    return lazy_frame(path, {"line": pl.String}, lines.read).select(
        parts.list.get(i, null_on_oob=True).alias(name) for i, name in enumerate(columns)
    )


def tables(paths: Sequence[Location]) -> list[Table]:
    """The files, and those of the folders, as Spark and Hive write them: with those in subfolders.

    Empty text files are left out, and a file that is there twice is read twice: with a warning.
    """
    files: list[tuple[Location, dict[str, str | None]]] = []
    for path in paths:
        with reading(path):
            if is_folder(path):
                files += [(file, _hive_columns(folder)) for file, folder in _files(path)]
            else:
                files.append((_there(path), {}))
    _warn_of_copies([file for file, _ in files])
    remote = any(isinstance(file, str) for file, _ in files)
    with ThreadPoolExecutor(_OPENED if remote else 1) as threads:
        found = list(threads.map(lambda of: open_table(*of), files))
    empty = [str(file) for (file, _), table in zip(files, found, strict=True) if table is None]
    if len(empty) == len(files):
        raise ValueError(
            f"{empty[0]}: expected a line with the names of the columns, got an empty file"
        )
    if empty:
        log.warning("empty files, left out: %s", some(empty))
    return [table for table in found if table is not None]


def _there(path: Location) -> Location:
    """The path of a file. FileNotFoundError, or ValueError where it is something else."""
    if is_file(path):
        return path
    if isinstance(path, Path) and os.path.lexists(path):
        if not path.exists():
            raise FileNotFoundError(errno.ENOENT, "a link to what is not there", str(path))
        raise ValueError(f"{path}: expected a file, got a pipe, socket or device")
    raise FileNotFoundError(f"{path} is not there")


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of them, and how many more there are."""
    return ", ".join(names[:most]) + (
        f" and {len(names) - most:,} more" if len(names) > most else ""
    )


def _warn_of_copies(files: Sequence[Location]) -> None:
    seen: dict[str, Location] = {}
    for file in files:
        real = os.path.realpath(file) if isinstance(file, Path) else file
        if real in seen:
            log.warning("%s is read twice: it is %s", file, seen[real])
        seen.setdefault(real, file)
    names = {str(file) for file in files}
    for name in sorted(names):
        if is_packed(name) and (other := name[: -len(".gz")]) in names:
            log.warning("%s is read beside %s: is it the same, packed?", name, other)


def _files(folder: Location) -> list[tuple[Location, str]]:
    """A folder's files, in order, and in which of its folders they are.

    ValueError unless they are of one kind.
    """
    if isinstance(folder, Path):
        inside = sorted(_walk(folder, ""))
    else:
        inside = [str(file)[len(str(folder)) + 1 :] for file in list_files(folder)]
    kinds: dict[str, str] = {}
    other = []
    for name in inside:
        try:
            kinds.setdefault("." + kind_of(name), name)
        except ValueError:
            other.append(name)
    expected = "expected files of one kind, .parquet, .csv, .tsv or .jsonl"
    if len(kinds) > 1:
        raise ValueError(
            f"{folder}: {expected}, got {', '.join(sorted(kinds))} ({', '.join(kinds.values())})"
        )
    if other:
        raise ValueError(
            f"{folder}: {expected}, and no others, got {some(other)}; "
            "move what is no table away, or unpack it"
        )
    if not kinds:
        raise ValueError(f"{folder}: {expected}, got none")
    return [(join(folder, name), name.rpartition("/")[0]) for name in inside]


def _walk(folder: Path, below: str, above: frozenset[tuple[int, int]] = frozenset()) -> list[str]:
    """Names of all files under a folder, hidden ones left out, links followed.

    OSError for what cannot be read, ValueError for what is no file.
    """
    about = os.stat(folder)
    if (about.st_dev, about.st_ino) in above:  # a link back
        return []
    above |= {(about.st_dev, about.st_ino)}
    found = []
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        path, inside = folder / name, f"{below}{name}"
        if hidden(name):
            continue
        mode = os.stat(_there(path) if path.is_symlink() and not path.exists() else path).st_mode
        if stat.S_ISDIR(mode):
            found += _walk(path, f"{inside}/", above)
        else:
            _there(path)
            found.append(inside)
    return found


def _hive_columns(folder: str) -> dict[str, str | None]:
    """day=2020-09-01/hour=07 as columns."""
    found: dict[str, str | None] = {}
    for part in folder.split("/"):
        name, is_one, value = part.partition("=")
        if is_one and name:
            found[unquote(name)] = None if value == "__HIVE_DEFAULT_PARTITION__" else unquote(value)
    return found


# ---- files of published data ---------------------------------------------------------------------


def find(folder: Path, *patterns: str) -> list[Path]:
    """The files of a folder that match the first pattern with a match.

    FileNotFoundError without any.
    """
    if matches := find_any(folder, *patterns):
        return matches
    inside = sorted(p.name for p in folder.iterdir())
    raise FileNotFoundError(
        f"{folder}: expected {' or '.join(patterns)}, got {some(inside, 20) or 'an empty folder'}"
    )


def find_one(folder: Path, *patterns: str) -> Path:
    """The one file of `find`; ValueError where several match."""
    matches = find(folder, *patterns)
    if len(matches) > 1:
        raise ValueError(
            f"{folder}: expected one of {' or '.join(patterns)}, got "
            f"{', '.join(p.name for p in matches)}"
        )
    return matches[0]


def find_any(folder: Path, *patterns: str) -> list[Path]:
    """As `find`, but no file is no error."""
    if not folder.is_dir():
        raise FileNotFoundError(f"source: expected a folder, got {folder}")
    return next(filter(None, (_matching(folder, pattern) for pattern in patterns)), [])


def _matching(folder: Path, pattern: str) -> list[Path]:
    """Unlike with Path.glob, a folder that cannot be read and a link to nothing are errors."""
    first, _, rest = pattern.partition("/")
    if first == "..":
        return _matching(folder / "..", rest)
    names = sorted(name for name in os.listdir(folder) if fnmatchcase(name, first))
    paths = [folder / name for name in names if not hidden(name)]
    if rest:
        return [found for path in paths if path.is_dir() for found in _matching(path, rest)]
    return [_there(path) for path in paths if not path.is_dir()]  # type: ignore[misc]
