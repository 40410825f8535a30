"""Delimited text, a piece at a time.

A piece ends where a row ends, so what is wrong in it can be shown with its line.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, cast

import polars as pl

from ...locations import Location
from ...storage import local_copy

PIECE = 1 << 24  # bytes
_FIRST = 1 << 20  # bytes of the first: who asks for a few rows reads no more
_LONGEST = 1 << 28  # bytes of a row; an unclosed quote makes one of the rest of the file
_HEADER = 1 << 20  # bytes of a header
_SEPARATORS = ",;\t|"

_FORMS = {  # by the bytes with which files begin
    b"\x1f\x8b": "gzip; call it .gz",
    b"PAR1": "Parquet; call it .parquet",
    b"PK\x03\x04": "a zip archive or a spreadsheet; unpack it, or save it as CSV UTF-8",
    b"\xd0\xcf\x11\xe0": "an old spreadsheet; save it as CSV UTF-8",
    b"\x28\xb5\x2f\xfd": "Zstandard; unpack it with zstd -d",
    b"BZh": "bzip2; unpack it with bunzip2",
    b"\xfd7zXZ": "xz; unpack it with unxz",
    b"ARROW1": "Arrow; write it as Parquet",
    codecs.BOM_UTF32_LE: "UTF-32; convert it: iconv -f UTF-32 -t UTF-8",
    codecs.BOM_UTF16_LE: "UTF-16; convert it: iconv -f UTF-16 -t UTF-8, or save it as CSV UTF-8",
    codecs.BOM_UTF16_BE: "UTF-16; convert it: iconv -f UTF-16 -t UTF-8, or save it as CSV UTF-8",
}


def open_bytes(path: Location) -> IO[bytes]:
    """A file's bytes, unpacked where its name ends with .gz."""
    local = local_copy(path)
    return cast(IO[bytes], gzip.open(local, "rb")) if is_packed(path) else local.open("rb")


def is_packed(path: Location) -> bool:
    return str(path).lower().endswith(".gz")


def first_bytes(path: Location) -> bytes:
    """The beginning of a text file, without the mark of UTF-8.

    ValueError where it is no UTF-8 text at all.
    """
    with open_bytes(path) as file:
        start = file.read(_HEADER)
    for form, what in _FORMS.items():
        if start.startswith(form):
            raise ValueError(f"{path}: expected text, got {what}")
    if start[:1024].count(b"\0") > 256:
        raise ValueError(
            f"{path}: expected text in UTF-8, got zero bytes (is it UTF-16? convert it: "
            "iconv -f UTF-16 -t UTF-8)"
        )
    return start.removeprefix(codecs.BOM_UTF8)


def not_utf8(line: int, byte: int) -> str:
    return (
        f"line {line:,} is not UTF-8 (byte 0x{byte:02X}); convert the file, from Latin-1 for "
        "example: iconv -f WINDOWS-1252 -t UTF-8"
    )


def first_line(data: bytes, most: int = 60) -> str:
    """The first line of some bytes, cut."""
    line = data[: 4 * most].split(b"\n")[0].decode(errors="replace").strip()
    return line if len(line) <= most else f"{line[:most]}..."


@dataclass(frozen=True)
class Delimited:
    """A text file whose columns are all text.

    Args:
        names: of all columns.
        separator: one character.
        quote: whether fields may be in quotes.
        skip: bytes before the first row.
        lines: lines before it.
        lossy: whether what is not UTF-8 is replaced.
    """

    path: Location
    names: Sequence[str]
    separator: str = ","
    quote: bool = True
    skip: int = 0
    lines: int = 0
    lossy: bool = False

    def read(self, columns: Sequence[str]) -> Iterator[pl.DataFrame]:
        """Some columns, in batches. ValueError says which line cannot be read."""
        with open_bytes(self.path) as file:
            file.read(self.skip)
            line, rest = self.lines + 1, b""
            size = min(_FIRST, PIECE)
            while block := file.read(size):
                data, size = rest + block, PIECE
                end = self._last_end(data)
                if not end and len(data) > _LONGEST:
                    raise ValueError(
                        self._said(data, line)
                        or f"{self.path}: cannot be read: line {line:,} is longer than "
                        f"{_LONGEST >> 20} MiB"
                    )
                rest = data[end:]
                if end:
                    yield self._frame(data[:end], line, columns)
                    line += data.count(b"\n", 0, end)
            if rest:
                yield self._frame(rest, line, columns)

    def _last_end(self, data: bytes) -> int:
        """Where the last whole row of `data`, which begins with a row, ends; 0 without one."""
        end, open_ = len(data), self.quote and data.count(b'"') % 2 == 1
        while True:  # from quote to quote, back
            quote = data.rfind(b'"', 0, end) if self.quote else -1
            if not open_:
                newline = data.rfind(b"\n", 0, end)
                if newline < 0 or newline > quote:
                    return newline + 1
            end, open_ = quote, not open_

    def _frame(self, piece: bytes, line: int, columns: Sequence[str]) -> pl.DataFrame:
        names = {str(self.names.index(name)): name for name in columns}
        # An unclosed quote at the end is none to polars.
        if self.quote and piece.count(b'"') % 2 and (said := self._said(piece, line)):
            raise ValueError(said)
        try:
            frame = self._parsed(piece, list(names), self.lossy)
        except pl.exceptions.PolarsError as error:
            if "utf-8" in str(error).lower():  # in a column that nobody needs anything may stand
                frame = self._parsed(piece, list(names), True)
                bad = frame.select(pl.any_horizontal(pl.all().str.contains("\ufffd"))).to_series()
                if not bad.any():
                    return frame.rename(names)
            said = self._said(piece, line)
            if said is None:
                raise
            raise ValueError(said) from error
        return frame.rename(names)

    def _parsed(self, piece: bytes, columns: list[str], lossy: bool) -> pl.DataFrame:
        # All: of some alone polars would not see a row with a field too many, whose others are off.
        header = self.separator.join(str(i) for i in range(len(self.names)))
        frame = pl.read_csv(
            f"{header}\n".encode() + piece,
            separator=self.separator,
            infer_schema=False,
            quote_char='"' if self.quote else None,
            encoding="utf8-lossy" if lossy else "utf8",
        )
        return frame.select(columns)

    def _said(self, piece: bytes, line: int) -> str | None:
        """What is wrong in a piece that begins with this line; None where nothing is found."""
        said = self._fault(piece, line)
        if said is None:
            try:
                piece.decode()
            except UnicodeDecodeError as error:
                said = not_utf8(line + piece.count(b"\n", 0, error.start), piece[error.start])
        return None if said is None else f"{self.path}: cannot be read: {said}"

    def _fault(self, piece: bytes, line: int) -> str | None:
        separator = re.escape(self.separator.encode())
        quoted = rb'"[^"]*(?:""[^"]*)*("?)([^%b\n]*)|' % separator if self.quote else b"()()"
        field = re.compile(rb"(?:%b([^%b\n]*))(%b|\n|\Z)" % (quoted, separator, separator))
        at, fields, begin, odd = 0, 0, 0, None

        def row() -> str:
            return first_line(piece[begin : begin + 300])

        while at < len(piece):
            found = field.match(piece, at)
            assert found is not None
            closed, after, plain, end = found.groups()
            if closed is not None and self.quote:
                if not closed:
                    rest = first_line(piece[at : at + 300])
                    return f"line {line:,}: a quote opens that is not closed: {rest}"
                if after.strip():
                    return (
                        f"line {line:,}: text after a closing quote "
                        f'(within quotes a quote is written ""): {row()}'
                    )
            elif odd is None and self.quote and (plain or b"").count(b'"') % 2:
                odd = (
                    f"line {line:,}: a quote within a field "
                    f'(such a field is put in quotes, and the quote written ""): {row()}'
                )
            fields += 1
            if fields > len(self.names):
                total = piece[begin:].split(b"\n", 1)[0].count(self.separator.encode()) + 1
                n = max(total, fields)
                return f"line {line:,} has {n} fields, the header {len(self.names)}: {row()}"
            line, at = line + piece.count(b"\n", at, found.end()), found.end()
            if end == b"\n":
                fields, begin = 0, at
        return odd


def with_header(path: Location, separator: str | None = None) -> Delimited | None:
    """A text file that begins with the names of its columns; None where it is empty.

    Without a `separator` it is the comma, or where the header has none its semicolon, tab or bar.
    """
    start = first_bytes(path)
    with open_bytes(path) as file:
        mark = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
    body = start.lstrip(b"\r\n")
    if not body.strip():
        return None
    end = body.find(b"\n") + 1
    while end and body.count(b'"', 0, end) % 2:
        end = body.find(b"\n", end) + 1
    line = body[: end or len(body)]
    if b"\r" in line.rstrip(b"\r\n"):
        raise ValueError(
            f"{path}: cannot be read: its lines end in a carriage return alone; convert it: tr "
            "'\\r' '\\n'"
        )
    if not end and len(start) + mark >= _HEADER:
        raise ValueError(
            f"{path}: expected a line with the names of the columns, got none within "
            f"{_HEADER >> 20} MiB"
        )
    blank = len(start) - len(body)
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: cannot be read: {not_utf8(1, line[error.start])}") from None
    if separator is None:
        separator = next((s for s in _SEPARATORS if s in text), ",")
    try:
        names = next(csv.reader([text], delimiter=separator))
    except csv.Error as error:
        raise ValueError(f"{path}: cannot be read: the names of its columns: {error}") from None
    lines = start.count(b"\n", 0, blank) + line.count(b"\n")
    return Delimited(path, tuple(names), separator, skip=mark + blank + len(line), lines=lines)
