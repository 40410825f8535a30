"""Importers: the published files of known datasets, and your own, as one `Source` of lazy tables.

Only headers are read here. Ids are text throughout, so that leading zeros stay.
"""

from __future__ import annotations

import gzip
import json
import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.dataset as arrow
from polars.io.plugins import register_io_source

from .ids import label, text, written_as_floats
from .storage import Location, filesystem, is_file, is_folder, list_files, local_copy
from .times import check_format, look

log = logging.getLogger(__name__)
_NAME = re.compile(r"^.*?(?=\.(?:parquet|csv|tsv|txt|jsonl|ndjson)(?:\.gz)?$)")

Schema = dict[str, pl.DataType | type[pl.DataType]]


@dataclass(frozen=True)
class Source:
    """What an importer gives. Ids are text; times are int64 seconds since 1970 (UTC), null where they could not be read. Where some have parts
    of a second, a column microsecond (int32, 0 to 999,999) is beside time in events or impressions.

    Args:
        layout: the importer's name, for the record.
        events: user_id, item_id, time: clicks, purchases, ratings. Without impressions, pages are made from them.
        impressions: a row per item shown: page_id, user_id, item_id, time, clicked (bool). Their clicks are events too.
        items: item_id and, each optional, category, image (a file's stem where it is not the id), first_seen and
            last_seen (int64 seconds: when the item was on offer).
        files: what is read, for the record.
        parts: the rows of events, or of impressions where there are some, in tables that can be read at the same time, in order; None: as one.
        unreadable: of first_seen and last_seen, how many values are no times, for the report.
    """

    layout: str
    events: pl.LazyFrame | None = None
    impressions: pl.LazyFrame | None = None
    items: pl.LazyFrame | None = None
    files: Sequence[Location] = ()
    parts: Callable[[], list[pl.LazyFrame]] | None = None
    unreadable: Mapping[str, int] = field(default_factory=dict)

    @property
    def ticks(self) -> int:
        """Of a second: 1,000,000 where some time has parts of one, else 1."""
        tables = [t for t in (self.events, self.impressions) if t is not None]
        return 1_000_000 if any("microsecond" in t.collect_schema() for t in tables) else 1


@dataclass(frozen=True)
class Columns:
    """Names of columns in files of one's own; with `page`, a row is an item shown on that page, `clicked` or not.

    `time_format` says what times are where their column does not: seconds, milliseconds, microseconds, nanoseconds (since 1970), days (of a
    spreadsheet), days-1904, order (numbers that only order events), or a strptime pattern; see times.py.
    """

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    category: str = "category"
    page: str | None = None
    clicked: str = "clicked"
    time_format: str | None = None

    def __post_init__(self) -> None:
        check_format(self.time_format)


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


# ---- columns --------------------------------------------------------------------------------------------------------


def _id(frame: pl.LazyFrame, path: Location, column: str, name: str) -> pl.Expr:
    """A column as ids; text that pandas wrote as floats is read as the whole numbers that it was."""
    whole = written_as_floats(frame, column)
    if whole:
        log.warning("%s: %s: every value ends in .0, so it is read as whole numbers", path, column)
    return text(column, name, path, whole=whole)


def _together(frames: Sequence[pl.LazyFrame]) -> list[pl.LazyFrame]:
    """Frames with "microsecond" in all where some have it, so that they are one table."""
    have = ["microsecond" in frame.collect_schema() for frame in frames]
    if not any(have):
        return list(frames)
    none = pl.lit(0, pl.Int32).alias("microsecond")
    return [f if has else f.with_columns(none) for f, has in zip(frames, have, strict=True)]


def _truth(frame: pl.LazyFrame, column: str) -> pl.Expr:
    """A column of 0/1, false/true or no/yes as bool, null taken for false."""
    if frame.collect_schema()[column] == pl.Boolean:
        return pl.col(column).fill_null(False).alias("clicked")
    words = pl.col(column).cast(pl.String).str.strip_chars().str.to_lowercase()
    number = words.cast(pl.Float64, strict=False).fill_null(0) > 0
    return (number | words.is_in(["true", "yes"]).fill_null(False)).alias("clicked")


def _events(
    frame: pl.LazyFrame, path: Location, user: str, item: str, time: str, form: str | None = None
) -> pl.LazyFrame:
    frame = need(frame, path, user, item, time)
    when = look(frame, time, path, form)
    ids = (_id(frame, path, c, n) for c, n in ((user, "user_id"), (item, "item_id")))
    return when.flat(frame.select(*ids, when.expression(time)))


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
            return _events(frame, path, c.user, c.item, c.time, c.time_format)
        frame = need(frame, path, c.page, c.user, c.item, c.time, c.clicked)
        when = look(frame, c.time, path, c.time_format)
        names = ((c.page, "page_id"), (c.user, "user_id"), (c.item, "item_id"))
        ids = (_id(frame, path, *of) for of in names)
        return when.flat(frame.select(*ids, when.expression(c.time), _truth(frame, c.clicked)))

    about, unreadable = None, dict[str, int]()
    if items is not None:
        about, unreadable = _items(items, c)
    # What a column holds is decided here, once for each file, and is the same wherever its rows are read.
    read = _together([rows(frame, path) for path in interactions for frame in scan_parts(path)])
    files = [*interactions, *([items] if items else [])]
    more: dict[str, Any] = {"items": about, "files": files, "parts": lambda: read, "unreadable": unreadable}  # fmt: skip
    if c.page is None:
        return Source("generic", events=pl.concat(read), **more)
    return Source("generic", impressions=pl.concat(read), **more)


def _items(path: Location, c: Columns) -> tuple[pl.LazyFrame, dict[str, int]]:
    """The table of items; and how many values of first_seen and last_seen are there but cannot be read."""
    frame = need(scan(path), path, c.item)
    found = frame.collect_schema().names()
    chosen = [_id(frame, path, c.item, "item_id")]
    if c.category in found:
        chosen.append(label(c.category, "category"))
    elif c.category != Columns.category:  # asked for by name
        need(frame, path, c.category)
    form = None if c.time_format is None or "%" in c.time_format else c.time_format
    unreadable: dict[str, int] = {}
    for name in ("first_seen", "last_seen"):
        if name not in found:
            continue
        when = look(frame, name, path, form, any_date=True)
        if when.unreadable:
            log.warning("%s: %s: %d values cannot be read as times", path, name, when.unreadable)
            unreadable[name] = when.unreadable
        chosen.append(when.expression(name).struct.field("time").alias(name))
    return frame.select(chosen), unreadable


def hm(folder: Path) -> Source:
    """H&M Personalized Fashion Recommendations: transactions_train.csv, articles.csv, images/0xx/0xxxxxxxxx.jpg."""
    path = find_one(folder, "transactions_train.csv", "transactions_train.parquet")
    events = _events(scan(path), path, "customer_id", "article_id", "t_dat")
    items, files = None, [path]
    for about in find_any(folder, "articles.csv", "articles.parquet"):
        frame = need(scan(about), about, "article_id", "product_group_name")
        items = frame.select(text("article_id", "item_id"), label("product_group_name", "category"))
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
        events=pl.concat(_together(frames)),
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
        items = frame.select(text("item_id", "item_id"), label("tag", "category"))
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
        when = look(frame, "impression_time", path)
        pages = frame.select(
            text("impression_id", "page_id"),
            text("user_id", "user_id"),
            pl.col("article_ids_inview").alias("item"),
            when.expression("impression_time"),
            pl.col("article_ids_clicked").alias("hits"),
        )
        hit = pl.col("item").is_in(pl.col("hits")).fill_null(False).alias("clicked")
        shown.append(
            when.flat(pages).explode("item").with_columns(text("item", "item_id"), hit).drop("item", "hits")
        )  # fmt: skip
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
        chosen = [text("article_id", "item_id"), label("category_str", "category")]
        if "image_ids" in table.collect_schema().names():
            table = table.with_columns(pl.col("image_ids").list.first())
            chosen.append(text("image_ids", "image"))
        items = table.select(chosen)
        files.append(about)
    return Source(
        "ebnerd",
        events=pl.concat(_together(past)) if past else None,
        impressions=pl.concat(_together(shown)),
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
