"""Importers: the published files of known datasets, and your own, as one `Source` of lazy tables.

Only headers are read here. Ids are text throughout, so that leading zeros stay.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.dataset as arrow
from polars.io.plugins import register_io_source

from . import truth
from .storage import Location, filesystem, is_file, is_folder, list_files, local_copy

_NAME = re.compile(r"^.*?(?=\.(?:parquet|csv|tsv|txt|jsonl|ndjson)(?:\.gz)?$)")

_LOOKED_AT = 100_000  # rows of a column that is asked what it says

Schema = dict[str, pl.DataType | type[pl.DataType]]


@dataclass(frozen=True)
class Source:
    """What an importer gives. Ids are text; times are int64 seconds since 1970 (UTC), null where they could not be read.

    Args:
        layout: the importer's name, for the record.
        events: user_id, item_id, time: clicks, purchases, ratings. Without impressions, pages are made from them.
        impressions: a row per item shown: page_id, user_id, item_id, time, clicked (bool, or the words of truth.py). Their clicks are events too.
        items: item_id and, each optional, category, image (a file's stem where it is not the id), first_seen and
            last_seen (int64 seconds: when the item was on offer).
        files: what is read, for the record.
        parts: the rows of events, or of impressions where there are some, in tables that can be read at the same time, in order; None: as one.
        notes: what looks as if it was not meant, for the log and the report.
    """

    layout: str
    events: pl.LazyFrame | None = None
    impressions: pl.LazyFrame | None = None
    items: pl.LazyFrame | None = None
    files: Sequence[Location] = ()
    parts: Callable[[], list[pl.LazyFrame]] | None = None
    notes: Sequence[str] = ()


@dataclass(frozen=True)
class Columns:
    """Names of columns in files of one's own; with `page`, a row is an item shown on that page, `clicked` or not."""

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    category: str = "category"
    page: str | None = None
    clicked: str = "clicked"


# ---- reading --------------------------------------------------------------------------------------------------------


def scan(path: Location) -> pl.LazyFrame:
    """A lazy table of a .csv, .tsv, .parquet or .jsonl file (.gz where text), local or remote, or of a folder of such files.

    Columns of .csv and .tsv are text. A folder is read as Spark and Hive write it: files in subfolders, those of partitions such as
    day=2020-09-01 with their value as a column, names that begin with "_" or "." left out.
    """
    if is_folder(path):
        return _scan_folder(path)
    if not is_file(path):
        raise FileNotFoundError(f"{path} is not there")
    if str(path).endswith(".parquet") and isinstance(path, str):
        data = _parquet(path, [path])
        return _scan_arrow(data, data.schema)
    return _scan_file(local_copy(path), str(path))


def _scan_folder(folder: Location) -> pl.LazyFrame:
    files, kind = _files(folder)
    if kind == ".parquet":
        data = _parquet(folder, files)
        return _scan_arrow(data, data.schema)
    return pl.concat([scan(file) for file in files])


def _files(folder: Location) -> tuple[list[Location], str]:
    """A folder's files, and of which kind they are."""
    files = list_files(folder)
    kinds = {_NAME.sub("", str(file).rsplit("/", 1)[1]).removesuffix(".gz") for file in files}
    if len(kinds) != 1:
        raise ValueError(
            f"{folder}: expected files of one kind, .parquet, .csv, .tsv or .jsonl, got {', '.join(sorted(kinds)) or 'none'}"
        )
    return files, kinds.pop()


def _parquet(folder: Location, files: Sequence[Location]) -> arrow.FileSystemDataset:
    """Parquet files, wherever they are; values of partitions are columns."""
    system, root = (None, str(folder)) if isinstance(folder, Path) else filesystem(folder)
    names = [str(f) if system is None else filesystem(str(f))[1] for f in files]
    try:
        return arrow.dataset(names, format="parquet", filesystem=system, partitioning="hive", partition_base_dir=root)  # fmt: skip
    except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
        raise ValueError(f"{folder}: cannot be read as Parquet: {error}") from None


def _scan_arrow(source: arrow.Dataset | arrow.Fragment, schema: pa.Schema) -> pl.LazyFrame:
    """A dataset of Arrow, or a file of it, read a batch at a time."""
    empty = pl.from_arrow(schema.empty_table())
    assert isinstance(empty, pl.DataFrame)

    def read(
        columns: list[str] | None, predicate: pl.Expr | None, rows: int | None, batch: int | None
    ) -> Iterator[pl.DataFrame]:
        how = {"schema": schema} if isinstance(source, arrow.Fragment) else {}
        for part in source.to_batches(columns=columns, batch_size=batch or 1 << 17, **how):
            frame = pl.from_arrow(part)
            assert isinstance(frame, pl.DataFrame)
            frame = frame if rows is None else frame.head(rows)
            rows = None if rows is None else rows - len(frame)
            yield frame if predicate is None else frame.filter(predicate)
            if rows == 0:
                return

    return register_io_source(read, schema=empty.schema)


def scan_parts(path: Location) -> list[pl.LazyFrame]:
    """The rows of `scan`, file by file."""
    if not is_folder(path):
        return [scan(path)]
    files, kind = _files(path)
    if kind != ".parquet":
        return [scan(file) for file in files]
    data = _parquet(path, files)
    return [_scan_arrow(fragment, data.schema) for fragment in data.get_fragments()]


def _scan_file(path: Path, name: str) -> pl.LazyFrame:
    kind = name.removesuffix(".gz")
    if kind.endswith(".parquet"):
        return pl.scan_parquet(path)
    if kind.endswith((".jsonl", ".ndjson")):
        return pl.scan_ndjson(path, infer_schema_length=1000)
    if kind.endswith((".csv", ".tsv", ".txt")):
        separator = "\t" if kind.endswith(".tsv") else ","
        return pl.scan_csv(path, separator=separator, infer_schema=False)
    raise ValueError(f"{name}: expected a .csv, .tsv, .parquet or .jsonl file (.gz where text)")


def scan_json(path: Path, schema: Schema) -> pl.LazyFrame:
    """Some fields of a .jsonl file, with their types; its other fields may hold anything."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
        first = json.loads(next(lines, "") or "{}")
    _check(path, list(first), schema)
    return pl.scan_ndjson(path, schema=schema)


def scan_lines(path: Path, separator: str, columns: Sequence[str]) -> pl.LazyFrame:
    """A text file without a header whose separator may have several characters; columns past a line's end are null."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    lines = pl.scan_csv(
        path, separator="\x01", has_header=False, new_columns=["line"], infer_schema=False, quote_char=None,
        encoding="utf8-lossy",
    )  # fmt: skip
    parts = pl.col("line").str.split(separator)
    return lines.select(
        parts.list.get(i, null_on_oob=True).alias(name) for i, name in enumerate(columns)
    )


def need(frame: pl.LazyFrame, path: Location, *columns: str) -> pl.LazyFrame:
    """The frame; ValueError naming the columns that are not there and those that are."""
    _check(path, frame.collect_schema().names(), columns)
    return frame


def _check(path: Location, found: Sequence[str], columns: Sequence[str] | dict) -> None:
    missing = [c for c in columns if c not in found]
    if missing:
        raise ValueError(
            f"{path}: expected the columns {', '.join(columns)}, got {', '.join(found) or 'an empty file'} ({', '.join(missing)} missing)"
        )


def find(folder: Path, *patterns: str) -> list[Path]:
    """The files of a folder that match the first pattern with a match; FileNotFoundError without any."""
    if not folder.is_dir():
        raise FileNotFoundError(f"source: expected a folder, got {folder}")
    for pattern in patterns:
        if matches := sorted(p for p in folder.glob(pattern) if p.is_file()):
            return matches
    inside = sorted(p.name for p in folder.iterdir())
    shown = ", ".join(inside[:20]) + (", ..." if len(inside) > 20 else "")
    raise FileNotFoundError(
        f"{folder}: expected {' or '.join(patterns)}, got {shown or 'an empty folder'}"
    )


def find_one(folder: Path, *patterns: str) -> Path:
    """The one file of `find`; ValueError where several match."""
    matches = find(folder, *patterns)
    if len(matches) > 1:
        raise ValueError(
            f"{folder}: expected one of {' or '.join(patterns)}, got {', '.join(p.name for p in matches)}"
        )
    return matches[0]


def find_any(folder: Path, *patterns: str) -> list[Path]:
    """As `find`, but no file is no error."""
    try:
        return find(folder, *patterns)
    except FileNotFoundError:
        return []


TIME_FORMS = ("%Y-%m-%d", "%Y-%m-%d %H:%M:%S", "%Y-%m-%d %H:%M:%S%.f", "%Y-%m-%d %H:%M", "%Y-%m-%d %H:%M:%S%z", "%Y-%m-%d %H:%M:%S%.f%z")  # fmt: skip


# ---- columns --------------------------------------------------------------------------------------------------------


def text(column: str, name: str) -> pl.Expr:
    return pl.col(column).cast(pl.String).alias(name)


def seconds(frame: pl.LazyFrame, column: str) -> pl.Expr:
    """A column as "time": dates, ISO 8601 text, or numbers of seconds, milli-, micro- or nanoseconds (told by their size)."""
    kind = frame.collect_schema()[column]
    values = pl.col(column)
    if kind.is_temporal():
        return values.dt.epoch("s").alias("time")
    if kind != pl.String:
        return _by_size(values.cast(pl.Float64)).alias("time")
    return values.map_batches(_parse_times, pl.Int64, is_elementwise=True).alias("time")


def _parse_times(values: pl.Series) -> pl.Series:
    """Text as seconds; each form is tried on what the ones before left."""
    text = values.rename("text").str.strip_chars()
    number = pl.col("text").cast(pl.Float64, strict=False)
    times = text.to_frame().select(_by_size(number)).to_series()
    if times.null_count() == values.null_count():
        return times
    # One form out of many: "T" or a blank, with or without a fraction and a zone.
    plain = text.str.replace(r"^(\d+-\d+-\d+)T", "${1} ").str.replace(r" ?(Z|UTC)$", "+00:00")
    for form in TIME_FORMS:
        left = (times.is_null() & plain.is_not_null()).arg_true()
        if not len(left):
            break
        parsed = plain.gather(left).str.to_datetime(form, strict=False, time_unit="us")
        times = times.scatter(left, parsed.dt.epoch("s"))
    return times


def _by_size(x: pl.Expr) -> pl.Expr:
    # Seconds up to the year 5138 have at most 11 digits.
    size = x.abs()
    scale = (
        pl.when(size >= 1e17)
        .then(1e9)
        .when(size >= 1e14)
        .then(1e6)
        .when(size >= 1e11)
        .then(1e3)
        .otherwise(1.0)
    )
    return (x / scale).floor().cast(pl.Int64, strict=False)


def _truth(frame: pl.LazyFrame, path: Location, column: str) -> pl.Expr:
    """A column of yes and no as text, which truth.py reads batch by batch. ValueError for one whose type can hold neither."""
    kind = frame.collect_schema()[column]
    if not truth.can_be_read(kind):
        raise ValueError(f"{path}: expected yes or no in the column {column}, got a column of {kind}")  # fmt: skip
    return pl.col(column).cast(pl.String).alias("clicked")


def _flag_notes(path: Location, frame: pl.LazyFrame, columns: Columns) -> list[str]:
    """A word about a column that seems to say whether a row was clicked, where every row is taken for a click."""
    used = (columns.user, columns.item, columns.time)
    out = []
    for name, kind in frame.collect_schema().items():
        if name.casefold() not in truth.FLAGS or name in used or not truth.can_be_read(kind):
            continue
        try:
            values = frame.select(name).head(_LOOKED_AT).collect(engine="streaming")[name]
        except pl.exceptions.PolarsError:  # said where all is read
            continue
        found, strange = truth.split(values)
        no = int((~found).sum())
        if no and not len(strange):
            out.append(
                f"{path}: the column {name} says no in {no:,} of the first {len(values):,} rows, but every row is taken for a click: with "
                f"--page-column ID --clicked-column {name} rows are items shown, else leave the others out"
            )
    return out


def _events(frame: pl.LazyFrame, path: Location, user: str, item: str, time: str) -> pl.LazyFrame:
    frame = need(frame, path, user, item, time)
    return frame.select(text(user, "user_id"), text(item, "item_id"), seconds(frame, time))


def _rated(frame: pl.LazyFrame, least: float | None) -> pl.LazyFrame:
    if least is None:
        return frame
    return frame.filter(pl.col("rating").cast(pl.Float64, strict=False) >= least)


# ---- layouts --------------------------------------------------------------------------------------------------------


def generic(
    interactions: Sequence[Location], items: Location | None = None, columns: Columns | None = None
) -> Source:
    """Files of one's own, or folders of them, local or remote: .csv, .tsv, .parquet or .jsonl.

    Args:
        interactions: a row per event or, with `columns.page`, per item shown.
        items: a row per item; its columns category, first_seen, last_seen are used where they are there.
        columns: what the columns are called.
    """
    c = columns or Columns()
    if not interactions:
        raise ValueError("interactions: expected at least one file, got none")

    def rows(frame: pl.LazyFrame, path: Location) -> pl.LazyFrame:
        if c.page is None:
            return _events(frame, path, c.user, c.item, c.time)
        frame = need(frame, path, c.page, c.user, c.item, c.time, c.clicked)
        return frame.select(
            text(c.page, "page_id"),
            text(c.user, "user_id"),
            text(c.item, "item_id"),
            seconds(frame, c.time),
            _truth(frame, path, c.clicked),
        )

    def parts() -> list[pl.LazyFrame]:
        return [rows(frame, path) for path in interactions for frame in scan_parts(path)]

    about, notes = None, []
    if items is not None:
        frame = need(scan(items), items, c.item)
        found = frame.collect_schema().names()
        chosen = [text(c.item, "item_id")]
        if c.category in found:
            chosen.append(text(c.category, "category"))
        elif c.category != Columns.category:  # asked for by name
            need(frame, items, c.category)
        chosen += [seconds(frame, n).alias(n) for n in ("first_seen", "last_seen") if n in found]
        about = frame.select(chosen)
        if len(chosen) == 1:
            notes.append(f"{items}: the columns {c.category}, first_seen and last_seen are what is used of it, and it has none of them")  # fmt: skip
    scanned = [(path, scan(path)) for path in interactions]
    if c.page is None:
        notes += [note for path, frame in scanned for note in _flag_notes(path, frame, c)]
    table = pl.concat([rows(frame, path) for path, frame in scanned])
    files = [*interactions, *([items] if items else [])]
    if c.page is None:
        return Source("generic", events=table, items=about, files=files, parts=parts, notes=notes)
    return Source("generic", impressions=table, items=about, files=files, parts=parts, notes=notes)


def hm(folder: Path) -> Source:
    """H&M Personalized Fashion Recommendations: transactions_train.csv, articles.csv, images/0xx/0xxxxxxxxx.jpg."""
    path = find_one(folder, "transactions_train.csv", "transactions_train.parquet")
    events = _events(scan(path), path, "customer_id", "article_id", "t_dat")
    items, files = None, [path]
    for about in find_any(folder, "articles.csv", "articles.parquet"):
        frame = need(scan(about), about, "article_id", "product_group_name")
        items = frame.select(text("article_id", "item_id"), text("product_group_name", "category"))
        files.append(about)
    return Source("hm", events=events, items=items, files=files)


def movielens(folder: Path, min_rating: float | None = None) -> Source:
    """MovieLens, all sizes: ratings.csv (20M, 25M, 32M, latest), ratings.dat (1M, 10M) or u.data (100K), and movies.csv or .dat.

    Ratings of at least `min_rating` are clicks (default: all); posters are called <movieId>.jpg. An item's category is its first genre.
    """
    path = find_one(folder, "ratings.csv", "ratings.dat", "u.data")
    names = ("userId", "movieId", "rating", "timestamp")
    if path.suffix == ".csv":
        frame = need(scan(path), path, *names)
    else:
        frame = scan_lines(path, "::" if path.suffix == ".dat" else "\t", names)
    events = _events(_rated(frame, min_rating), path, "userId", "movieId", "timestamp")
    items, files = None, [path]
    for about in find_any(folder, "movies.csv", "movies.dat"):
        fields = ("movieId", "title", "genres")
        table = scan_lines(about, "::", fields) if about.suffix == ".dat" else scan(about)
        genre = pl.col("genres").str.split("|").list.first().alias("category")
        items = need(table, about, *fields).select(text("movieId", "item_id"), genre)
        files.append(about)
    return Source("movielens", events=events, items=items, files=files)


def amazon_reviews_2023(folder: Path, min_rating: float | None = None) -> Source:
    """Amazon Reviews 2023, one or more categories in a folder.

    Reads <Category>.csv (user_id, parent_asin, rating, timestamp in ms) or else <Category>.jsonl (also .gz), and
    meta_<Category>.jsonl. Reviews of at least `min_rating` stars are clicks (default: all); images are called <parent_asin>.jpg. An
    item's category is the second of its "categories", or main_category.
    """
    kinds: Schema = {"user_id": pl.String, "parent_asin": pl.String, "rating": pl.Float64, "timestamp": pl.Int64}  # fmt: skip
    ratings = find_any(folder, "*.csv*")
    texts = find_any(folder, "*.jsonl*")
    reviews = [p for p in texts if not p.name.startswith("meta_")]
    if not ratings and not reviews:
        raise FileNotFoundError(
            f"{folder}: expected <Category>.csv or <Category>.jsonl, got {', '.join(sorted(p.name for p in folder.glob('*'))) or 'nothing'}"
        )
    frames = []
    for path in ratings or reviews:
        if path.name.removesuffix(".gz").endswith(".csv"):
            frame = need(scan(path), path, *kinds)
        else:
            frame = scan_json(path, kinds)
        frames.append(
            _events(_rated(frame, min_rating), path, "user_id", "parent_asin", "timestamp")
        )
    about = find_any(folder, "meta_*.jsonl*")
    about_kinds: Schema = {
        "parent_asin": pl.String,
        "main_category": pl.String,
        "categories": pl.List(pl.String),
    }
    category = pl.coalesce(pl.col("categories").list.get(1, null_on_oob=True), "main_category")
    metas = [
        scan_json(path, about_kinds).select(
            text("parent_asin", "item_id"), category.alias("category")
        )
        for path in about
    ]
    return Source(
        "amazon-reviews-2023",
        events=pl.concat(frames),
        items=pl.concat(metas) if metas else None,
        files=[*(ratings or reviews), *about],
    )


def microlens(folder: Path) -> Source:
    """MicroLens: MicroLens-*_pairs.csv (user, item, timestamp) or MicroLens-*_pairs.tsv; covers are called <item>.jpg.

    A line of the .tsv is a user, a tab, and items in order without times. Their times become whole seconds that end at 0 for every
    user's last item, so that a split by time holds out everyone's last items.
    """
    path = find_one(folder, "*_pairs.csv", "*_pairs.tsv")
    if path.suffix == ".csv":
        return Source(
            "microlens", events=_events(scan(path), path, "user", "item", "timestamp"), files=[path]
        )
    events = (
        scan_lines(path, "\t", ("user_id", "items"))
        .with_columns(pl.col("items").str.split(" ").alias("item_id"))
        .with_columns(
            pl.int_ranges(1 - pl.col("item_id").list.len().cast(pl.Int64), 1).alias("time")
        )
        .select("user_id", "item_id", "time")
        .explode("item_id", "time")
    )
    return Source("microlens", events=events, files=[path])


def pixelrec(folder: Path) -> Source:
    """PixelRec: Pixel200K.csv (1M, 8M, PixelRec.csv: item_id, user_id, timestamp), item_info.csv (item_id, tag); covers <item_id>.jpg."""
    path = find_one(folder, "Pixel*.csv", "pixel*.csv", "interaction*.csv")
    items, files = None, [path]
    for about in find_any(folder, "item_info.csv", "*item_info*.csv"):
        frame = need(scan(about), about, "item_id", "tag")
        items = frame.select(text("item_id", "item_id"), text("tag", "category"))
        files.append(about)
    events = _events(scan(path), path, "user_id", "item_id", "timestamp")
    return Source("pixelrec", events=events, items=items, files=files)


def ebnerd(folder: Path) -> Source:
    """EB-NeRD: a bundle (train/, validation/, articles.parquet) or one of its splits; images by article id or by first image id.

    behaviors.parquet has what was in view and clicked, history.parquet the clicks before.
    """
    parts = find(folder, "behaviors.parquet", "*/behaviors.parquet")
    shown, past = [], []
    files = list(parts)
    for path in parts:
        columns = (
            "impression_id",
            "user_id",
            "impression_time",
            "article_ids_inview",
            "article_ids_clicked",
        )
        frame = need(scan(path), path, *columns)
        shown.append(
            frame.select(
                text("impression_id", "page_id"),
                text("user_id", "user_id"),
                pl.col("article_ids_inview").alias("item"),
                seconds(frame, "impression_time"),
                pl.col("article_ids_clicked").alias("hits"),
            )
            .explode("item")
            .select(
                "page_id",
                "user_id",
                text("item", "item_id"),
                "time",
                pl.col("item").is_in(pl.col("hits")).fill_null(False).alias("clicked"),
            )
        )
        for before in find_any(path.parent, "history.parquet"):
            lists = need(
                scan(before), before, "user_id", "article_id_fixed", "impression_time_fixed"
            )
            rows = lists.select("user_id", "article_id_fixed", "impression_time_fixed").explode(
                "article_id_fixed", "impression_time_fixed"
            )
            past.append(
                _events(rows, before, "user_id", "article_id_fixed", "impression_time_fixed")
            )
            files.append(before)
    items = None
    for about in find_any(folder, "articles.parquet", "../articles.parquet")[:1]:
        table = need(scan(about), about, "article_id", "category_str")
        chosen = [text("article_id", "item_id"), text("category_str", "category")]
        if "image_ids" in table.collect_schema().names():
            chosen.append(pl.col("image_ids").list.first().cast(pl.String).alias("image"))
        items = table.select(chosen)
        files.append(about)
    return Source(
        "ebnerd",
        events=pl.concat(past) if past else None,
        impressions=pl.concat(shown),
        items=items,
        files=files,
    )


LAYOUTS: dict[str, Callable[..., Source]] = {
    "hm": hm,
    "movielens": movielens,
    "amazon-reviews-2023": amazon_reviews_2023,
    "microlens": microlens,
    "pixelrec": pixelrec,
    "ebnerd": ebnerd,
}
