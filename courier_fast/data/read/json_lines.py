"""Some fields of JSON lines: numbers as they are written, so that their types need not agree.

Other fields may hold anything.
DuckDB reads them. What it refuses is read again by Python's json, which takes more (a lone
surrogate, a name twice), and says which line is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO

import duckdb
import polars as pl

from ...locations import Location
from ...storage import local_copy
from .delimited import first_bytes, first_line, is_packed, not_utf8, open_bytes

Kinds = Mapping[str, "pl.DataType | type[pl.DataType]"]
_ROWS = 1 << 17
_FEW = 1 << 12  # rows with lists
_LONGEST = 1 << 28  # bytes of a line


@dataclass(frozen=True)
class JsonLines:
    """A file with an object in each line.

    Args:
        kinds: types of fields that are no text: numbers, or lists.
        needed: fields that have to have a value somewhere.
        lists: fields that may hold lists, which are given as JSON; text as it is.
    """

    path: Location
    kinds: Kinds
    needed: Sequence[str] = ()
    lists: Sequence[str] = ()

    def read(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Some fields, in batches, null where a line lacks one.

        ValueError says which line cannot be read.
        """
        rows, missing = 0, set(self.needed) & set(columns)
        for batch in self._raw(columns):
            missing -= {name for name in missing if batch[name].null_count() < len(batch)}
            yield pl.DataFrame([self._typed(batch[name], rows) for name in columns])
            rows += len(batch)
        if missing and rows:
            raise ValueError(
                f"{self.path}: expected the fields {', '.join(self.needed)}, got no line with a "
                f"value of {', '.join(sorted(missing))}: {self._first()}"
            )

    def _raw(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Values as JSON."""
        rows = 0
        try:
            for batch in self._fast(columns):
                yield batch
                rows += len(batch)
        except duckdb.Error:
            yield from self._slow(columns, rows)  # on from there, or to the line that is wrong

    def _fast(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        names = ", ".join(_quoted(name, '"') for name in columns)
        # Of one field alone, DuckDB takes a line that is no object for its value.
        more = [] if len(columns) > 1 else [f"{columns[0]}, another"]
        fields = ", ".join(f"{_quoted(name, chr(39))}: 'JSON'" for name in [*columns, *more])
        packed = is_packed(self.path)
        # By descriptor: DuckDB takes names for patterns, and only of UTF-8.
        with local_copy(self.path).open("rb") as file, duckdb.connect() as database:
            rows = database.sql(
                f"SELECT {names} FROM read_json('/dev/fd/{file.fileno()}', "
                f"format='newline_delimited', columns={{{fields}}}, "
                f"compression='{'gzip' if packed else 'none'}', maximum_object_size={_LONGEST})"
            )
            for batch in rows.to_arrow_reader(_FEW if set(self.lists) & set(columns) else _ROWS):
                frame = pl.from_arrow(batch)
                assert isinstance(frame, pl.DataFrame)
                yield frame

    def _slow(self, columns: Sequence[str], done: int) -> Iterator[pl.DataFrame]:
        with open_bytes(self.path) as file:
            objects = islice(self._objects(file), done, None)
            while part := list(islice(objects, _ROWS)):
                yield pl.DataFrame(
                    {n: [_dumped(row.get(n)) for row in part] for n in columns},
                    dict.fromkeys(columns, pl.String),
                )

    def _objects(self, file: IO[bytes]) -> Iterator[dict[str, object]]:
        for number, line in enumerate(file, 1):
            text = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if not text.strip():
                continue
            where = f"{self.path}: cannot be read: "
            try:
                value = json.loads(text.decode(), strict=False)
            except UnicodeDecodeError as error:
                raise ValueError(where + not_utf8(number, text[error.start])) from None
            except (ValueError, RecursionError) as error:
                said = "(is the file cut off?) " if not line.endswith(b"\n") else ""
                if text.strip() == b"{":
                    said = "(an object over several lines? convert it: jq -c . FILE) "
                raise ValueError(
                    f"{where}line {number:,} is not a JSON object {said}{error}: {first_line(text)}"
                ) from None
            if not isinstance(value, dict):
                raise ValueError(f"{where}line {number:,} is not a JSON object: {first_line(text)}")
            yield value

    def _typed(self, raw: pl.Series, rows: int) -> pl.Series:
        kind = self.kinds.get(raw.name, pl.String)
        if isinstance(kind, pl.List):
            return raw.str.json_decode(kind)
        if raw.name in self.lists:
            return _text(raw)
        nested = raw.str.contains(r"^[\[{]")
        if nested.any():
            at = int(nested.fill_null(False).arg_true()[0])
            raise ValueError(
                f"{self.path}: expected text or a number as {raw.name}, got "
                f"{first_line(raw[at].encode())} in object {rows + at + 1:,}"
            )
        return _text(raw).cast(kind, strict=False)

    def _first(self) -> str:
        return f"the first is {first_line(first_bytes(self.path), 200)}"


def _text(raw: pl.Series) -> pl.Series:
    """[n] JSON of texts, numbers and so on as text."""
    name, value = raw.name, pl.col(raw.name)
    frame = raw.to_frame()
    quoted = value.str.starts_with('"')
    # 5.0 is how programs write a whole number of a column with gaps.
    number = value.replace("NaN", None).str.replace(r"^(-?\d+)\.0+$", "${1}")
    plain = value.str.strip_prefix('"').str.strip_suffix('"')
    text = frame.select(pl.when(quoted).then(plain).otherwise(number).alias(name)).to_series()
    escaped = (raw.str.contains("\\", literal=True) & raw.str.starts_with('"')).arg_true()
    if len(escaped):
        text = text.scatter(escaped, raw.gather(escaped).str.json_decode(pl.String))
    return text


def _dumped(value: object) -> str | None:
    if isinstance(value, str):  # half a surrogate pair is no text
        value = value.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    return None if value is None else json.dumps(value, ensure_ascii=False)


def _quoted(name: str, mark: str) -> str:
    return mark + name.replace(mark, mark * 2) + mark


def json_lines(
    path: Location, kinds: Kinds, needed: Sequence[str] = (), lists: Sequence[str] = ()
) -> JsonLines:
    """A file of JSON lines; ValueError where it does not begin as one."""
    start = first_bytes(path).lstrip()
    name = str(path).rsplit("/", 1)[-1]
    if start.startswith(b"["):
        raise ValueError(
            f"{path}: expected JSON lines, got a JSON array; convert it: "
            f"jq -c '.[]' {name} > lines.jsonl"
        )
    if start and not start.startswith(b"{"):
        raise ValueError(f"{path}: expected JSON lines, an object in each, got {first_line(start)}")
    return JsonLines(path, kinds, needed, lists)
