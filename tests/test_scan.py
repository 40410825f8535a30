"""Tables as people have them: each file read with its own schema, names taken literally, and every
fault named with its file and place."""

from __future__ import annotations

import codecs
import datetime
import decimal
import gzip
import json
import os
import pickle
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from courier_fast.data.prepare import layouts
from courier_fast.data.prepare.layouts import Columns, generic
from courier_fast.data.prepare.rows import batches
from courier_fast.data.read import delimited, json_lines, scan

NOON = 1_600_000_000
HEADER = "user_id,item_id,timestamp\n"
ROWS = [(f"u{k}", f"{k:06}", NOON + k) for k in range(20)]
TEXT = HEADER + "".join(f"{u},{i},{t}\n" for u, i, t in ROWS)
JSON = "".join(json.dumps({"user_id": u, "item_id": i, "timestamp": t}) + "\n" for u, i, t in ROWS)


def put(path: Path, data: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


def parquet(path: Path, **columns: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    base = {
        "user_id": [u for u, _, _ in ROWS],
        "item_id": [i for _, i, _ in ROWS],
        "timestamp": [t for _, _, t in ROWS],
    }
    with path.open("wb") as file:
        pq.write_table(pa.table(base | columns), file)
    return path


def rows(*paths: Path, **names: str) -> list[tuple[str | None, str | None, int | None]]:
    source = generic(paths, columns=Columns(**names))
    frames = [b for f in source.tables("events") for b in batches(f, "events", source)]
    return [row for frame in frames for row in frame.rows()]


def fault(*paths: Path, **names: str) -> str:
    """The error: of ours, one line, not long, and it names the file."""
    with pytest.raises((ValueError, OSError)) as error:
        rows(*paths, **names)
    said = str(error.value)
    assert type(error.value).__module__ == "builtins"
    assert "\n" not in said
    assert len(said) < 1000
    assert "traceback" not in said.lower()
    return said


# ---- folders -------------------------------------------------------------------------------------


def test_a_folder_of_parquet_took_the_first_files_types(tmp_path: Path) -> None:
    folder = tmp_path / "log"
    parquet(folder / "0.parquet", item_id=list(range(20)))
    parquet(folder / "1.parquet", timestamp=pa.array([t for _, _, t in ROWS], pa.timestamp("s")))
    parquet(
        folder / "2.parquet", item_id=pa.array([f"{k:06}" for k in range(20)]).dictionary_encode()
    )
    parquet(folder / "3.parquet", more=[[1]] * 20)
    found = rows(folder)
    assert [i for _, i, _ in found[:20]] == [str(k) for k in range(20)]
    assert found[20:] == ROWS * 3


def test_a_column_that_a_file_lacks_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    for kind, good, bad in (
        ("csv", TEXT, TEXT.replace("user_id", "uid")),
        ("jsonl", JSON, JSON.replace("user_id", "uid")),
    ):
        put(tmp_path / kind / f"a.{kind}", good)
        put(tmp_path / kind / f"b.{kind}", bad)
        said = fault(tmp_path / kind)
        assert f"b.{kind}: expected the" in said
        assert "user_id" in said and "uid" in said
    parquet(tmp_path / "p" / "a.parquet")
    pq.write_table(pa.table({"uid": [1]}), tmp_path / "p" / "b.parquet")
    assert "b.parquet: expected the columns user_id" in fault(tmp_path / "p")
    # Of items, too: categories of half of them are no table of categories.
    put(tmp_path / "i" / "a.csv", "item_id,category\n000001,hat\n")
    put(tmp_path / "i" / "b.csv", "item_id\n000002\n")
    with pytest.raises(
        ValueError, match=r"b\.csv: expected the columns item_id, category, got item_id"
    ):
        generic([put(tmp_path / "c.csv", TEXT)], tmp_path / "i")


def test_parts_that_are_empty_or_hidden_are_no_rows(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "log"
    put(folder / "a.csv", TEXT)
    put(folder / "b.csv", "")
    put(folder / "c.csv", HEADER)
    put(folder / "d.csv", HEADER.strip())
    put(folder / "e.csv.gz", gzip.compress(b""))
    put(
        folder / "f.CSV", f"item_id,user_id,timestamp,more\n7,v,{NOON},[\n"
    )  # columns in another order
    for name in ("_SUCCESS", ".a.csv.crc", ".DS_Store", "_temporary/x.csv", ".hidden/y.csv"):
        put(folder / name, "x")
    assert rows(folder) == [*ROWS, ("v", "7", NOON)]
    assert caplog.messages == [f"empty files, left out: {folder}/b.csv, {folder}/e.csv.gz"]
    parquet(tmp_path / "p" / "a.parquet")
    pq.write_table(pq.read_table(tmp_path / "p" / "a.parquet")[:0], tmp_path / "p" / "b.parquet")
    assert rows(tmp_path / "p") == ROWS
    put(tmp_path / "p" / "c.parquet", "")
    assert "c.parquet: cannot be read" in fault(tmp_path / "p")
    pq.write_table(pa.table({}), tmp_path / "p" / "c.parquet")
    assert "c.parquet: expected the columns" in fault(tmp_path / "p")
    for name in ("0.csv", "0.csv.gz", "bom.csv", "blank.csv"):
        only = put(
            tmp_path / "only" / name,
            {"bom.csv": codecs.BOM_UTF8, "blank.csv": b"\n \n"}.get(name, b""),
        )
        assert f"{only}: expected a line with the names of the columns, got an empty file" in fault(
            only
        )
    assert "expected a line with the names" in fault(tmp_path / "only")
    (tmp_path / "none").mkdir()
    assert (
        f"{tmp_path}/none: expected files of one kind, .parquet, .csv, .tsv or .jsonl, got none"
        in fault(tmp_path / "none")
    )


@pytest.mark.parametrize(
    "name",
    [
        "README.txt",
        "note.md",
        "Thumbs.db",
        "a.csv.bak",
        "a.csv~",
        "~$a.xlsx",
        "b.csv.zst",
        "b.parquet",
    ],
)
def test_other_files_in_a_folder_are_named(name: str, tmp_path: Path) -> None:
    put(tmp_path / "log" / "a.csv", TEXT)
    put(tmp_path / "log" / name, "x")
    said = fault(tmp_path / "log")
    assert f"{tmp_path}/log: expected files of one kind" in said
    assert name in said


def test_half_a_log_vanished_behind_what_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "log"
    put(folder / "a.csv", TEXT)
    put(folder / "closed" / "b.csv", TEXT)
    plain = os.scandir

    def closed(path: Any) -> Any:
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", closed)
        assert "closed" in fault(folder)
    with monkeypatch.context() as patch:

        def refuse(path: Any) -> Any:
            raise PermissionError(13, "Permission denied")

        patch.setattr(delimited, "open_bytes", refuse)
        assert f"{folder}/a.csv" in fault(folder)
    assert rows(folder) == ROWS * 2
    os.symlink(tmp_path / "gone.csv", folder / "lost.csv")
    assert f"{folder}/lost.csv" in fault(folder)
    assert f"{folder}/lost.csv" in fault(folder / "lost.csv")
    (folder / "lost.csv").unlink()
    os.mkfifo(folder / "pipe.csv")
    for path in (folder, folder / "pipe.csv"):
        assert f"{folder}/pipe.csv: expected a file, got a pipe" in fault(path)


def test_links_are_followed_and_loops_stop(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, other = tmp_path / "log", tmp_path / "elsewhere"
    put(other / "b.csv", TEXT)
    folder.mkdir()
    os.symlink(put(tmp_path / "x.csv", TEXT), folder / "a.csv")
    os.symlink(other, folder / "more")
    os.symlink(folder, other / "back")
    assert rows(folder) == ROWS * 2
    assert not caplog.messages
    assert rows(folder, tmp_path / "x.csv") == ROWS * 3
    assert caplog.messages == [f"{tmp_path}/x.csv is read twice: it is {folder}/a.csv"]
    put(folder / "a.csv.gz", gzip.compress(TEXT.encode()))
    assert rows(folder) == ROWS * 3
    assert caplog.messages[1:] == [
        f"{folder}/a.csv.gz is read beside {folder}/a.csv: is it the same, packed?"
    ]
    (folder / "a.csv.gz").unlink()
    os.symlink("self.csv", folder / "self.csv")
    assert "self.csv" in fault(folder)


NAMES = [
    "clicks[1]",
    "a*",
    "a?b",
    "a b",
    "a#b",
    "100%25",
    "it's",
    'say "x"',
    "two\nlines",
    "ü",
    "{a,b}",
    "~a",
    "$HOME",
    "-a",
    "a=b",
    "a\\b",
]


@pytest.mark.long("whole commands", short=("csv", "csv.gz", "parquet"))
@pytest.mark.parametrize("kind", ["csv", "csv.gz", "jsonl.gz", "parquet"])
def test_file_names_were_patterns(kind: str, tmp_path: Path) -> None:
    def write(path: Path, **columns: Any) -> None:
        text = TEXT if kind.startswith("csv") else JSON
        if kind == "parquet":
            parquet(path)
        else:
            put(path, gzip.compress(text.encode()) if kind.endswith("gz") else text)

    for name in [*NAMES, os.fsdecode(b"latin-\xfc")]:
        folder = tmp_path / name
        write(folder / f"{name}.{kind}")
        assert rows(folder / f"{name}.{kind}") == ROWS, name
        assert rows(folder) == ROWS, name
    put(tmp_path / "b" / f"clicks[1].{kind}", "no table")
    write(tmp_path / "b" / f"clicks1.{kind}")
    with pytest.raises(ValueError, match=r"clicks\[1\]"):
        rows(tmp_path / "b" / f"clicks[1].{kind}")


def test_partitions_are_columns_of_every_kind_of_file(tmp_path: Path) -> None:
    put(tmp_path / "a" / "day=2020-09-13" / "user=007" / "x.csv", "item_id\n1\n2\n")
    put(tmp_path / "a" / "day=2020-09-14" / "user=a%2Fb" / "x.csv", "item_id\n3\n")
    put(
        tmp_path / "a" / "day=2020-09-14" / "user=__HIVE_DEFAULT_PARTITION__" / "x.csv",
        "item_id\n4\n",
    )
    day = 1_599_955_200
    expected = [
        ("007", "1", day),
        ("007", "2", day),
        (None, "4", day + 86_400),
        ("a/b", "3", day + 86_400),
    ]
    assert rows(tmp_path / "a", user="user", time="day") == expected
    put(tmp_path / "j" / "user_id=1" / "x.jsonl", f'{{"item_id": 5, "timestamp": {NOON}}}\n')
    assert rows(tmp_path / "j") == [("1", "5", NOON)]
    # What the file itself says is more than the folder's name.
    parquet(tmp_path / "p" / "timestamp=2020-09-13" / "x.parquet")
    assert rows(tmp_path / "p") == ROWS
    parquet(tmp_path / "q" / "user_id=1" / "item_id=2" / "timestamp=3" / "x.parquet")
    assert len(rows(tmp_path / "q")) == 20


def test_a_published_layouts_folder_is_literal(tmp_path: Path) -> None:
    folder = tmp_path / "hm [2020]*"
    put(
        folder / "transactions_train.csv", "t_dat,customer_id,article_id\n2018-09-20,c,0663713001\n"
    )
    put(folder / "._articles.csv", "x")
    source = layouts.hm(folder)
    assert source.events is not None and source.events.collect().rows() == [
        ("c", "0663713001", 1_537_401_600)
    ]
    os.symlink(folder / "gone", folder / "articles.csv")
    with pytest.raises(FileNotFoundError, match=r"articles\.csv"):
        layouts.hm(folder)
    put(tmp_path / "ml" / "ratings.csv", "userId,movieId,rating,timestamp\n1,2,5,6,7\n")
    with pytest.raises(
        ValueError, match=r"ratings\.csv: cannot be read: line 2 has 5 fields, the header 4"
    ):
        layouts.movielens(tmp_path / "ml")


# ---- CSV -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [
        codecs.BOM_UTF8 + TEXT.encode(),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.rstrip("\n").encode(),
        TEXT.replace(",", ";").encode(),
        TEXT.replace(",", "\t").encode(),
        TEXT.replace(",", "|").encode(),
        b"\n\r\n" + TEXT.encode(),
        b'"user_id","item_id","timestamp"\n' + TEXT.split("\n", 1)[1].encode(),
        TEXT.replace("\n", ',"a, ""b""\nc"\n')
        .replace('"a, ""b""\nc"', '"more\nlines"', 1)
        .encode(),
        TEXT.replace("\n", ",x\n").replace("x\n", "Stövel\n").encode("latin-1"),
    ],
    ids=[
        "mark",
        "crlf",
        "no-end",
        "semicolon",
        "tab",
        "bar",
        "blank-lines",
        "quoted",
        "newlines",
        "other-field",
    ],
)
@pytest.mark.parametrize("piece", [64, delimited.PIECE])
def test_csv_as_people_have_it(
    data: bytes, piece: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(delimited, "PIECE", piece)
    if b"St" in data:  # the header is text, whatever stands in a field
        data = data.replace("Stövel".encode("latin-1"), b"more", 1)
    assert rows(put(tmp_path / "a.csv", data)) == ROWS
    assert (
        rows(put(tmp_path / "a.TXT.GZ", gzip.compress(data[:99]) + gzip.compress(data[99:])))
        == ROWS
    )


def lines(*others: str) -> str:
    """Line 22 on."""
    return TEXT + "".join(f"{line}\n" for line in others) + TEXT.split("\n", 1)[1]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (lines("a,b,5,6"), "a.csv: cannot be read: line 22 has 4 fields, the header 3: a,b,5,6"),
        (lines('"a\nb",c,1', "a,b,5,6,7"), "line 24 has 5 fields, the header 3: a,b,5,6,7"),
        (
            lines("a,b,5").replace("\n", ",z\n", 22).replace("a,b,5,z", "a,b,c,5,z"),
            "line 22 has 5 fields, the header 4",
        ),
        (lines('"a,b,5'), 'line 22: a quote opens that is not closed: "a,b,5'),
        (
            lines('x,"b"c,5'),
            'line 22: text after a closing quote (within quotes a quote is written ""): x,"b"c,5',
        ),
        (lines('"a\\"b",b,1', '"c'), "line 22: text after a closing quote"),
        (lines('5" screen,b,1'), "line 22: a quote within a field"),
        (
            lines(f"ü,b,{NOON}").encode("latin-1"),
            "line 22 is not UTF-8 (byte 0xFC); convert the file, from Latin-1 for example: iconv "
            "-f WINDOWS-1252 -t UTF-8",
        ),
        (TEXT.replace("user_id", "üser").encode("latin-1"), "line 1 is not UTF-8"),
        (TEXT.encode("utf-16"), "expected text, got UTF-16; convert it: iconv -f UTF-16 -t UTF-8"),
        (TEXT.encode("utf-16-be"), "zero bytes (is it UTF-16?"),
        (
            TEXT.replace("\n", "\r"),
            "its lines end in a carriage return alone; convert it: tr '\\r' '\\n'",
        ),
        (gzip.compress(TEXT.encode()), "expected text, got gzip; call it .gz"),
        (b"PAR1xxxx", "expected text, got Parquet; call it .parquet"),
        (b"PK\x03\x04xxxx", "a zip archive or a spreadsheet"),
        (
            TEXT.replace("user_id,", " user_id,"),
            "(user_id missing; is ' user_id' meant? names are taken as they are written)",
        ),
        (TEXT.replace("user_id", "User_ID"), "is 'User_ID' meant?"),
        (TEXT.replace("user_id", "userId"), "is 'userId' meant?"),
        (TEXT.split("\n", 1)[1], "has the file no header? its first line looks like a row"),
        (TEXT.replace("item_id", "user_id"), "(item_id missing)"),
        (
            TEXT.replace("user_id", "user_id,user_id").replace("u1", "u,u1"),
            "expected each column once, got user_id 2 times",
        ),
        (TEXT.replace(",", ":"), "(user_id, item_id, timestamp missing; is the separator another?"),
        ("x" * (1 << 21), "expected a line with the names of the columns, got none within 1 MiB"),
    ],
)
def test_csv_that_cannot_be_read(data: str | bytes, said: str, tmp_path: Path) -> None:
    good, path = put(tmp_path / "good.csv", TEXT), tmp_path / "a.csv"
    found = fault(good, put(path, data))
    assert found.startswith(f"{path}: ")
    assert said in found


def test_lines_are_counted_over_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delimited, "PIECE", 50)
    assert "line 22 has 4 fields" in fault(put(tmp_path / "a.csv", lines("a,b,5,6")))
    monkeypatch.setattr(delimited, "_LONGEST", 300)
    assert 'line 22: a quote opens that is not closed: "a,b,5' in fault(
        put(tmp_path / "a.csv", lines('"a,b,5'))
    )
    assert "line 22 is longer than" in fault(put(tmp_path / "a.csv", lines("x" * 400 + ",b,5")))


def test_rows_that_lack_fields_are_rows_with_gaps(tmp_path: Path) -> None:
    found = rows(put(tmp_path / "a.csv", lines("a,b", f"a\0b,c,{NOON}")))
    assert found == [*ROWS, ("a", "b", None), ("a\0b", "c", NOON), *ROWS]


def test_a_damaged_gz_names_its_file(tmp_path: Path) -> None:
    good, packed = put(tmp_path / "good.csv", TEXT), gzip.compress(TEXT.encode() * 50)
    flipped = bytearray(packed)
    flipped[len(packed) // 2] ^= 0xFF
    for number, data in enumerate(
        (packed[:-20], bytes(flipped), packed + b"junk", TEXT.encode(), packed[:5])
    ):
        for kind in ("csv", "jsonl"):
            path = put(tmp_path / f"{number}.{kind}.gz", data)
            said = fault(good, path)
            assert said.startswith(f"{path}: cannot be read: its gzip data is damaged"), said


# ---- JSON lines ----------------------------------------------------------------------------------


def test_types_of_json_were_those_of_the_first_1000_lines(tmp_path: Path) -> None:
    objects: list[dict[str, Any]] = [{"user_id": 1, "item_id": 7, "timestamp": NOON}] * 1200
    objects += [
        {"item_id": "i", "timestamp": NOON + 0.5, "user_id": "u"},
        {"user_id": 2**53 + 1, "item_id": 10**29 + 1, "timestamp": str(NOON)},
        {"user_id": 2**64 - 1, "item_id": 5.0, "timestamp": None, "price": float("nan")},
        {"user_id": 'ü"\n\\', "item_id": "😀", "timestamp": NOON, "price": [float("inf")]},
        {"user_id": True, "item_id": "5.0", "price": {"a": -float("inf")}},
    ]
    path = tmp_path / "a.jsonl"
    put(path, "".join(json.dumps(o) + "\n" for o in objects))
    found = [row[:2] for row in rows(path)]
    expected = [
        ("u", "i"),
        (str(2**53 + 1), str(10**29 + 1)),
        (str(2**64 - 1), "5"),
        ('ü"\n\\', "😀"),
        ("true", "5.0"),
    ]
    assert found == [("1", "7")] * 1200 + expected
    put(path, "".join(json.dumps(o, ensure_ascii=False) + "\n\n" for o in objects))
    assert [row[:2] for row in rows(path)] == found
    # Python's reader, which takes over where DuckDB stops, gives the same.
    put(
        path,
        "".join(json.dumps(o) + "\n" for o in objects)
        + '{"item_id": 1, "item_id": 2, "x": "\\ud800"}\n',
    )
    assert [row[:2] for row in rows(path)] == [*found, (None, "2")]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (JSON + '{"user_id": "a', "line 21 is not a JSON object (is the file cut off?)"),
        (JSON + "hello\n" + JSON, "line 21 is not a JSON object"),
        (JSON + "[1, 2]\n", "line 21 is not a JSON object: [1, 2]"),
        (JSON + "5\n", "line 21 is not a JSON object: 5"),
        (
            "[\n" + JSON.replace("\n", ",\n") + "]",
            "expected JSON lines, got a JSON array; convert it: jq -c '.[]' a.jsonl > lines.jsonl",
        ),
        (
            json.dumps({"user_id": 1}, indent=1),
            "line 1 is not a JSON object (an object over several lines? convert it: jq -c . FILE)",
        ),
        (JSON.replace("\n", ""), "line 1 is not a JSON object"),
        (TEXT, "expected JSON lines, an object in each, got user_id,item_id,timestamp"),
        (
            JSON.encode() + '{"user_id": "ü"}\n'.encode("latin-1"),
            "line 21 is not UTF-8 (byte 0xFC)",
        ),
        (JSON.encode("utf-16"), "expected text, got UTF-16"),
        (
            JSON.replace('"u3"', '["u3"]'),
            'expected text or a number as user_id, got ["u3"] in object 4',
        ),
        (
            JSON.replace("user_id", "uid"),
            "expected the fields user_id, item_id, timestamp, got no line with a value of user_id",
        ),
        (JSON + '{"a":' * 100_000 + "\n", "line 21 is not a JSON object"),
    ],
)
def test_json_that_cannot_be_read(data: str | bytes, said: str, tmp_path: Path) -> None:
    path = put(tmp_path / "a.jsonl", data)
    found = fault(path)
    assert found.startswith(f"{path}: ")
    assert said in found


def test_items_of_json_have_the_columns_that_some_line_has(tmp_path: Path) -> None:
    clicks = put(tmp_path / "a.csv", TEXT)
    path = put(
        tmp_path / "i" / "0.json", '{"item_id": 1}\n' * 1200 + '{"item_id": 2, "category": "hat"}\n'
    )
    put(tmp_path / "i" / "1.ndjson", '{"item_id": 3, "x": NaN}\n')
    for items, count in ((path, 1201), (tmp_path / "i", 1202)):
        found = generic([clicks], items).items
        assert found is not None
        frame = found.collect()
        assert frame.columns == ["item_id", "category"]
        assert len(frame) == count
        assert frame.drop_nulls().rows() == [("2", "hat")]
    with pytest.raises(
        ValueError, match=r"expected the columns item_id, kind, got item_id .kind missing"
    ):
        generic([clicks], path, Columns(category="kind"))


# ---- Parquet -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "columns",
    [
        {"user_id": pa.array([u for u, _, _ in ROWS]).dictionary_encode()},
        {"user_id": pa.array([u for u, _, _ in ROWS], pa.large_string())},
        {"user_id": pa.array([u.encode() for u, _, _ in ROWS], pa.binary())},
        {"timestamp": pa.array([t for _, _, t in ROWS], pa.timestamp("s", "Asia/Tokyo"))},
        {"timestamp": pa.array([t * 1000 for _, _, t in ROWS], pa.timestamp("ms"))},
        {"more": pa.array([[(1, 2)]] * 20, pa.map_(pa.int8(), pa.int8())), "user_id.x": [5] * 20},
    ],
    ids=["dictionary", "large", "binary", "zone", "ms", "map"],
)
def test_parquet_as_programs_write_it(columns: dict[str, Any], tmp_path: Path) -> None:
    assert rows(parquet(tmp_path / "a.PARQUET", **columns)) == ROWS


def test_parquet_times_of_old_spark_and_numbers_as_ids(tmp_path: Path) -> None:
    times = [datetime.datetime(2020, 9, 13, 12, 26, 40)] * 20
    path = tmp_path / "a.parquet"
    pq.write_table(
        pa.table(
            {
                "user_id": [2**63 + 5] * 20,
                "item_id": pa.array([decimal.Decimal(12)] * 20),
                "timestamp": times,
            },
            schema=pa.schema(
                {
                    "user_id": pa.uint64(),
                    "item_id": pa.decimal128(38, 0),
                    "timestamp": pa.timestamp("us"),
                }
            ),
        ),
        path,
        use_deprecated_int96_timestamps=True,
    )
    assert rows(path) == [(str(2**63 + 5), "12", NOON)] * 20
    parquet(path, timestamp=[datetime.date(2020, 9, 13)] * 20)
    assert rows(path)[0] == ("u0", "000000", 1_599_955_200)


def test_parquet_that_cannot_be_read(tmp_path: Path) -> None:
    good, path = parquet(tmp_path / "good.parquet"), tmp_path / "a.parquet"
    data = good.read_bytes()
    damaged = bytearray(data)
    damaged[4:60] = b"\xff" * 56  # pages of the first column
    for wrong in (
        data[:-9],
        data[:200],
        bytes(damaged),
        TEXT.encode(),
        b"",
        b"PAR1" + bytes(50) + b"PAR1",
        b"PARE" + bytes(50) + b"PARE",
    ):
        assert fault(good, put(path, wrong)).startswith(f"{path}: cannot be read: ")
    assert fault(parquet(path, item_id=[[1]] * 20)).startswith(
        f"{path}: expected text, numbers or times as item_id, got List"
    )
    parquet(path, user_id=pa.array([b"\xff\xfe"] * 20))
    assert fault(path).startswith(f"{path}: user_id: expected ids as UTF-8 text or UUIDs")
    names = ["user_id", "user_id", "item_id", "timestamp"]
    pq.write_table(pa.Table.from_arrays([pa.array([1])] * 4, names=names), path)
    assert f"{path}: expected each column once, got user_id 2 times" in fault(path)


# ---- the rest ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "do"),
    [
        ("a.csv.zst", "zstd -d first"),
        ("a.csv.bz2", "bunzip2 first"),
        ("a.csv.xz", "unxz first"),
        ("a.zip", "unzip first"),
        ("a.tar", "tar xf first"),
        ("a.xlsx", "save it as CSV UTF-8"),
        ("a.orc", "(.gz where text)"),
        ("a", "(.gz where text)"),
        ("a.parquet.gz", "(.gz where text)"),
    ],
)
def test_other_formats_say_what_to_do(name: str, do: str, tmp_path: Path) -> None:
    path = put(tmp_path / name, "x")
    said = fault(path)
    assert said.startswith(f"{path}: expected a .csv, .tsv, .parquet or .jsonl file")
    assert said.endswith(do)


def test_what_libraries_raise_is_one_line_of_ours() -> None:
    import duckdb

    cause: Exception
    for cause in (
        pl.exceptions.ComputeError("a\nb" * 1000),
        pa.ArrowInvalid("bad\n" * 500),
        duckdb.IOException("no"),
        EOFError("end"),
        OSError("Couldn't deserialize thrift"),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
    ):
        with (
            pytest.raises(ValueError, match=r"^a.csv: cannot be read: .{1,900}$"),
            scan.reading("a.csv"),
        ):
            raise cause
    with pytest.raises(OSError, match=r"Input/output error: 'a.csv'"), scan.reading("a.csv"):
        raise OSError(5, "Input/output error")
    with pytest.raises(ValueError, match="^mine$"), scan.reading("a.csv"):
        raise ValueError("mine")


def test_a_lazy_table_is_read_in_another_process(tmp_path: Path) -> None:
    """As tasks of Ray are: what a table holds is names, and no open file."""
    put(tmp_path / "a.csv", TEXT)
    put(tmp_path / "a.jsonl", JSON)
    parquet(tmp_path / "a.parquet")
    for kind in ("csv", "jsonl", "parquet"):
        (table,) = scan.tables([tmp_path / f"a.{kind}"])
        read = pickle.loads(pickle.dumps(table)).frame("user_id").collect()
        assert read["user_id"].to_list() == [u for u, _, _ in ROWS]
        assert table.frame("user_id").head(3).collect().height == 3
        few = table.frame("user_id", "item_id").filter(pl.col("user_id") == "u3").collect()
        assert few.rows() == [("u3", "000003")]


def test_json_lines_are_read_by_duckdb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def slow(*_: object) -> None:
        raise AssertionError("read by Python, which is ten times slower")

    monkeypatch.setattr(json_lines.JsonLines, "_slow", slow)
    assert (
        rows(put(tmp_path / "a.jsonl", JSON.replace("}", ', "x": NaN, "y": [{}, "\\u00fc"]}')))
        == ROWS
    )
