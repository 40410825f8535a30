"""Importers: the published files of known datasets, and your own, as one `Source` of lazy tables.

Only headers are read here, by scan.py. Ids are text throughout, so that leading zeros stay.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from ...locations import Location, location
from ..dataset import SPLITS
from ..read import lists, truth
from ..read.ids import label, text, written_as_floats
from ..read.page_views import Shown, page_views
from ..read.scan import (
    Schema,
    Table,
    check_columns,
    find,
    find_any,
    find_one,
    need,
    scan,
    scan_json,
    scan_lines,
    tables,
)
from ..read.time_forms import time_form
from ..read.times import TimeForm, check_format

log = logging.getLogger(__name__)

ORDERS = ("newest-last", "newest-first")
# Of Qilin: its kinds of pages and how their results are called, and what may be asked for.
_RESULTS = {"recommendation": "rec", "search": "search"}
PAGES = (*_RESULTS, "both")
_STRETCHES = 100  # of each kind, in each split, where both are read
_LOOKED_AT = 100_000  # rows of a column that is asked what it says


@dataclass(frozen=True)
class GivenHistories:
    """How lists of a column history are read.

    Args:
        newest_first: their order; else the newest item is the last.
        padding: what stands for no item.
    """

    newest_first: bool = False
    padding: str = "0"


@dataclass(frozen=True)
class Source:
    """What an importer gives. Ids are text; times are int64 seconds since 1970 (UTC), null where
    they could not be read. Where some have parts of a second, a column microsecond (int32, 0 to
    999,999) is beside time in events or impressions.

    Args:
        layout: the importer's name, for the record.
        events: user_id, item_id, time: clicks, purchases, ratings. Without impressions, pages are
            made from them.
        impressions: a row per item shown: page_id, user_id, item_id, time, clicked (bool, or the
            words of truth.py). Their clicks are events too.
        histories: what the lists in a column history of impressions are; None: histories are events
            before. With them time may be lacking, so that the order of rows decides, or a column
            split does (its number in SPLITS). Without page_id a row is a page view, whose item_id
            and clicked are lists; or an item, and the rows of a user with one history are a page.
        user_histories: user_id, history and, optional, split: the lists of users, where impressions
            have no column history. A page has the first that is of its user, and split.
        items: item_id and, each optional, category, image (a file's stem where it is not the id),
            first_seen and last_seen (int64 seconds: when the item was on offer).
        files: what is read, for the record.
        parts: the rows of events, or of impressions where there are some, in tables that can be
            read at the same time, in order; None: as one.
        unreadable: of first_seen and last_seen, how many values are no times, for the report.
        notes: what looks as if it was not meant, for the log and the report.
    """

    layout: str
    events: pl.LazyFrame | None = None
    impressions: pl.LazyFrame | None = None
    histories: GivenHistories | None = None
    user_histories: pl.LazyFrame | None = None
    items: pl.LazyFrame | None = None
    files: Sequence[Location] = ()
    parts: Callable[[], list[pl.LazyFrame]] | None = None
    unreadable: Mapping[str, int] = field(default_factory=dict)
    notes: Sequence[str] = ()

    @property
    def ticks(self) -> int:
        """Of a second: 1,000,000 where some time has parts of one, else 1."""
        tables = [t for t in (self.events, self.impressions) if t is not None]
        return 1_000_000 if any("microsecond" in t.collect_schema() for t in tables) else 1

    @property
    def timed(self) -> bool:
        """Whether rows have times; else their order decides."""
        rows = self.impressions if self.histories else None
        return rows is None or "time" in rows.collect_schema()

    @property
    def named_splits(self) -> bool:
        """Whether rows say which split they are of."""
        rows = self.impressions if self.histories else None
        return rows is not None and "split" in rows.collect_schema()

    def tables(self, name: str) -> list[pl.LazyFrame]:
        """The rows of "events", "impressions" or "user_histories", in order, in tables to read at
        the same time."""
        frame = getattr(self, name)
        if frame is None:
            return []
        own = "events" if self.impressions is None else "impressions"
        in_parts = self.parts is not None and name == own
        return self.parts() if in_parts and self.parts is not None else [frame]


@dataclass(frozen=True)
class Columns:
    """Names of columns in files of one's own; with `page`, a row is an item shown on that page,
    `clicked` or not.

    `time_format` says what times are where their column does not: seconds, milliseconds,
    microseconds, nanoseconds (since 1970), days (of a spreadsheet), days-1904, order (numbers that
    only order events), or a strptime pattern; see times.py.

    With `history`, each row holds its page's as a list, or as text between blanks, commas or bars:
    the newest item last, or first with `history_order` "newest-first"; `padding` is no item. A row
    without `page` is then a page view: `item`, `clicked` and `position` (optional, by which items
    are sorted) hold lists, or are fields of the objects in the list `results`. Times are read where
    the column is there; without them, or with `split` (train, validation or test in each row), the
    order of rows decides.
    """

    user: str = "user_id"
    item: str = "item_id"
    time: str = "timestamp"
    category: str = "category"
    page: str | None = None
    clicked: str = "clicked"
    time_format: str | None = None
    history: str | None = None
    history_order: str = "newest-last"
    padding: str = "0"
    split: str | None = None
    position: str | None = None
    results: str | None = None

    def __post_init__(self) -> None:
        check_format(self.time_format)
        if self.history_order not in ORDERS:
            raise ValueError(f"history_order: expected one of {ORDERS}, got {self.history_order!r}")
        if self.history is None and (self.split or self.position or self.results):
            raise ValueError("split, position, results: expected a history column beside them")
        if self.page is not None and (self.position or self.results):
            raise ValueError(
                "position, results: expected rows that are page views, without a page column"
            )

    @property
    def views(self) -> bool:
        """Whether a row is a page view."""
        return self.history is not None and self.page is None


# ---- columns -------------------------------------------------------------------------------------


def _id(frame: pl.LazyFrame, path: Location, column: str, name: str) -> pl.Expr:
    """A column as ids; text that pandas wrote as floats is read as the whole numbers it was."""
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


def _truth(frame: pl.LazyFrame, path: Location, column: str) -> pl.Expr:
    """A column of yes and no as text, which truth.py reads batch by batch. ValueError for one whose
    type can hold neither."""
    kind = frame.collect_schema()[column]
    if not truth.can_be_read(kind):
        raise ValueError(
            f"{path}: expected yes or no in the column {column}, got a column of {kind}"
        )
    return pl.col(column).cast(pl.String).alias("clicked")


def _flag_note(table: Table, columns: Columns) -> str | None:
    """A word about a column that seems to say whether a row was clicked, where every row is taken
    for a click."""
    used = (columns.user, columns.item, columns.time)
    names = (
        truth.FLAGS if table.any_column else [n for n in table.names if n.casefold() in truth.FLAGS]
    )
    names = [n for n in names if n not in used and list(table.names).count(n) < 2]
    frame = table.frame(optional=names)
    for name, kind in frame.collect_schema().items():
        if name not in names or not truth.can_be_read(kind):
            continue
        values = frame.select(name).head(_LOOKED_AT).collect(engine="streaming")[name]
        found, strange = truth.split(values)
        no = int((~found).sum())
        if no and not len(strange):
            return (
                f"{table.path}: the column {name} says no in {no:,} of the first {len(values):,} "
                "rows, but every row is taken for a click: with "
                f"--page-column ID --clicked-column {name} rows are items shown, "
                "else leave the others out"
            )
    return None


def _events(
    frame: pl.LazyFrame, path: Location, user: str, item: str, time: str, form: str | None = None
) -> pl.LazyFrame:
    frame = need(frame, path, user, item, time)
    when = time_form(frame, time, path, form)
    ids = (_id(frame, path, c, n) for c, n in ((user, "user_id"), (item, "item_id")))
    return when.flat(frame.select(*ids, when.expression(time)))


def _offer(frame: pl.LazyFrame, column: str, path: Location, form: str | None) -> TimeForm:
    """What first_seen or last_seen is: as times were said to be; where that does not fit, as it
    reads."""
    try:
        return time_form(frame, column, path, form, any_date=True)
    except ValueError:
        if form is None or form == "order":
            raise
        try:
            return time_form(frame, column, path, any_date=True)
        except ValueError:
            pass
        raise


def _rated(frame: pl.LazyFrame, least: float | None) -> pl.LazyFrame:
    if least is None:
        return frame
    return frame.filter(pl.col("rating").cast(pl.Float64, strict=False) >= least)


# ---- histories that are given --------------------------------------------------------------------


def _with_history(table: Table, c: Columns, timed: bool) -> pl.LazyFrame:
    """Rows with their histories: items shown, or page views."""
    assert c.history is not None
    shown = Shown(c.item, c.clicked, c.position, c.results)
    plain = [c.user, *([c.time] if timed else []), *([c.split] if c.split else [])]
    nested = [c.history]
    if c.page is None:
        nested += shown.columns
    else:
        plain += [c.page, c.item, c.clicked]
    frame = lists.with_rows(table.frame(*plain, *nested, lists=nested))
    path = table.path
    chosen = [_id(frame, path, c.user, "user_id")]
    if c.page is None:
        chosen.append(page_views(frame, path, shown).alias("shown"))
    else:
        chosen += [_id(frame, path, c.page, "page_id"), _id(frame, path, c.item, "item_id")]
        chosen.append(_truth(frame, path, c.clicked))
    chosen.append(lists.checked(frame, path, c.history, "history"))
    if c.split:
        chosen.append(_split(path, c.split))
    when = time_form(frame, c.time, path, c.time_format) if timed else None
    if when is not None:
        frame = when.flat(frame.select(*chosen, when.expression(c.time)))
    else:
        frame = frame.select(chosen)
    return frame.unnest("shown") if c.page is None else frame


def _split(path: Location, column: str) -> pl.Expr:
    """The number of a split by its name."""

    def read(values: list[pl.Series], row: lists.Row) -> pl.Series:
        names = values[0].cast(pl.String).str.strip_chars()
        found = names.replace_strict(list(SPLITS), range(len(SPLITS)), default=None)
        for i in found.is_null().arg_true().head(1).to_list():
            raise ValueError(f"{row(i, 0)}: expected {', '.join(SPLITS)}, got {names[i]!r}")
        return found.cast(pl.Int64)

    return lists.each(path, [column], pl.Int64, read).alias("split")


def _one_kind(frames: Sequence[pl.LazyFrame]) -> list[pl.LazyFrame]:
    """Frames whose histories are of one type, so that they are one table."""
    kinds = {frame.collect_schema()["history"] for frame in frames}
    if len(kinds) == 1:
        return list(frames)

    def read(values: pl.Series) -> pl.Series:
        return lists.text_of(lists.split(values), "history")

    text = pl.col("history").map_batches(read, pl.List(pl.String), is_elementwise=True)
    return [frame.with_columns(text) for frame in frames]


# ---- layouts -------------------------------------------------------------------------------------


def generic(
    interactions: Sequence[Location], items: Location | None = None, columns: Columns | None = None
) -> Source:
    """Files of one's own, or folders of them, local or remote: .csv, .tsv, .parquet or .jsonl.

    Args:
        interactions: a row per event or, with `columns.page`, per item shown.
        items: a row per item; its columns category, first_seen, last_seen are used where they are
            there.
        columns: what the columns are called.
    """
    c = columns or Columns()
    interactions = [location(path) for path in interactions]
    items = None if items is None else location(items)
    if not interactions:
        raise ValueError("interactions: expected at least one file, got none")

    def rows(table: Table) -> pl.LazyFrame:
        if c.history is not None:
            return _with_history(table, c, timed)
        if c.page is None:
            frame = table.frame(c.user, c.item, c.time)
            return _events(frame, table.path, c.user, c.item, c.time, c.time_format)
        frame = table.frame(c.page, c.user, c.item, c.time, c.clicked)
        when = time_form(frame, c.time, table.path, c.time_format)
        names = ((c.page, "page_id"), (c.user, "user_id"), (c.item, "item_id"))
        ids = (_id(frame, table.path, *of) for of in names)
        clicked = _truth(frame, table.path, c.clicked)
        return when.flat(frame.select(*ids, when.expression(c.time), clicked))

    more: dict[str, Any] = {} if items is None else _about(items, c)
    read = tables(interactions)
    named = c.time != Columns.time or c.time_format is not None
    timed = c.split is None and (named or any(table.known([c.time]) for table in read))
    # What a column holds is decided here, once for each file, and is the same wherever its rows are
    # read.
    parts = _together([rows(table) for table in read])
    if c.history is not None:
        parts = _one_kind(parts)
        more["histories"] = GivenHistories(c.history_order == ORDERS[1], c.padding)
    elif c.page is None:
        note = next(filter(None, (_flag_note(table, c) for table in read)), None)
        more["notes"] = [*more.get("notes", ()), *([note] if note else [])]
    files = [*interactions, *([items] if items else [])]
    more |= {"files": files, "parts": parts.copy}
    if c.page is None and c.history is None:
        return Source("generic", events=pl.concat(parts), **more)
    return Source("generic", impressions=pl.concat(parts), **more)


def _about(items: Location, c: Columns) -> dict[str, Any]:
    """Of a Source: the items of all files, where a column that one has, all have; and what there is
    to say of them."""
    found = tables([items])
    times = ("first_seen", "last_seen")
    there = {name for table in found for name in table.known([c.category, *times])}
    if c.category != Columns.category and c.category not in there:  # asked for by name
        check_columns(items, found[0].names or [c.item, *sorted(there)], [c.item, c.category])
    more = [name for name in (c.category, *times) if name in there]
    parts, unreadable = [], Counter[str]()
    for table in found:
        frame = (
            table.frame(c.item, *more)
            if not table.any_column
            else table.frame(c.item, optional=more)
        )
        chosen = [_id(frame, table.path, c.item, "item_id")]
        for name in more:
            if name == c.category:
                chosen.append(label(name, "category", table.path))
                continue
            when = _offer(frame, name, table.path, c.time_format)
            if when.unreadable:
                log.warning(
                    "%s: %s: %d values cannot be read as times", table.path, name, when.unreadable
                )
                unreadable[name] += when.unreadable
            chosen.append(when.expression(name).struct.field("time").alias(name))
        parts.append(frame.select(chosen))
    notes = (
        []
        if more
        else [
            f"{items}: the columns {c.category}, first_seen and last_seen are what is used of it, "
            "and it has none of them"
        ]
    )
    return {"items": pl.concat(parts), "unreadable": dict(unreadable), "notes": notes}


def hm(folder: Path) -> Source:
    """H&M Personalized Fashion Recommendations: transactions_train.csv, articles.csv,
    images/0xx/0xxxxxxxxx.jpg."""
    path = find_one(folder, "transactions_train.csv", "transactions_train.parquet")
    events = _events(scan(path), path, "customer_id", "article_id", "t_dat")
    items, files = None, [path]
    for about in find_any(folder, "articles.csv", "articles.parquet"):
        frame = need(scan(about), about, "article_id", "product_group_name")
        category = label("product_group_name", "category", about)
        items = frame.select(text("article_id", "item_id"), category)
        files.append(about)
    return Source("hm", events=events, items=items, files=files)


def movielens(folder: Path, min_rating: float | None = None) -> Source:
    """MovieLens, all sizes: ratings.csv (20M, 25M, 32M, latest), ratings.dat (1M, 10M) or u.data
    (100K), and movies.csv or .dat.

    Ratings of at least `min_rating` are clicks (default: all); posters are called <movieId>.jpg. An
    item's category is its first genre.
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

    Reads <Category>.csv (user_id, parent_asin, rating, timestamp in ms) or else <Category>.jsonl
    (also .gz), and meta_<Category>.jsonl. Reviews of at least `min_rating` stars are clicks
    (default: all); images are called <parent_asin>.jpg. An item's category is the second of its
    "categories", or main_category.
    """
    kinds: Schema = {
        "user_id": pl.String,
        "parent_asin": pl.String,
        "rating": pl.Float64,
        "timestamp": pl.Int64,
    }
    ratings = find_any(folder, "*.csv*")
    texts = find_any(folder, "*.jsonl*")
    reviews = [p for p in texts if not p.name.startswith("meta_")]
    if not ratings and not reviews:
        raise FileNotFoundError(
            f"{folder}: expected <Category>.csv or <Category>.jsonl, got "
            f"{', '.join(sorted(p.name for p in folder.glob('*'))) or 'nothing'}"
        )
    frames = []
    for path in ratings or reviews:
        if path.name.removesuffix(".gz").endswith(".csv"):
            frame = need(scan(path), path, *kinds)
        else:
            frame = scan_json(path, kinds, list(kinds))
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
        scan_json(path, about_kinds, ["parent_asin"]).select(
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
    """MicroLens: MicroLens-*_pairs.csv (user, item, timestamp) or MicroLens-*_pairs.tsv; covers are
    called <item>.jpg.

    A line of the .tsv is a user, a tab, and items in order without times. Their times become whole
    seconds that end at 0 for every user's last item, so that a split by time holds out everyone's
    last items.
    """
    path = find_one(folder, "*_pairs.csv", "*_pairs.tsv")
    if path.suffix == ".csv":
        return Source(
            "microlens", events=_events(scan(path), path, "user", "item", "timestamp"), files=[path]
        )
    return Source("microlens", events=_sequences(path), files=[path])


def _sequences(path: Path) -> pl.LazyFrame:
    """Events of lines of a user, a tab, and items between blanks; times end at 0 for every user's
    last item."""
    last = 1 - pl.col("item_id").list.len().cast(pl.Int64)
    return (
        scan_lines(path, "\t", ("user_id", "items"))
        .with_columns(pl.col("items").str.split(" ").alias("item_id"))
        .with_columns(pl.int_ranges(last, 1).alias("time"))
        .select("user_id", "item_id", "time")
        .explode("item_id", "time")
    )


def pixelrec(folder: Path) -> Source:
    """PixelRec: Pixel200K.csv (1M, 8M, PixelRec.csv: item_id, user_id, timestamp), item_info.csv
    (item_id, tag); covers <item_id>.jpg."""
    path = find_one(folder, "Pixel*.csv", "pixel*.csv", "interaction*.csv")
    items, files = None, [path]
    for about in find_any(folder, "item_info.csv", "*item_info*.csv"):
        frame = need(scan(about), about, "item_id", "tag")
        items = frame.select(text("item_id", "item_id"), label("tag", "category", about))
        files.append(about)
    events = _events(scan(path), path, "user_id", "item_id", "timestamp")
    return Source("pixelrec", events=events, items=items, files=files)


def ebnerd(folder: Path) -> Source:
    """EB-NeRD: a bundle (train/, validation/, articles.parquet) or one of its splits; images by
    article id or by first image id.

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
        when = time_form(frame, "impression_time", path)
        pages = frame.select(
            text("impression_id", "page_id"),
            text("user_id", "user_id"),
            pl.col("article_ids_inview").alias("item"),
            when.expression("impression_time"),
            pl.col("article_ids_clicked").alias("hits"),
        )
        hit = pl.col("item").is_in(pl.col("hits")).fill_null(False).alias("clicked")
        shown.append(
            when.flat(pages)
            .explode("item")
            .with_columns(text("item", "item_id"), hit)
            .drop("item", "hits")
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
        chosen = [text("article_id", "item_id"), label("category_str", "category", about)]
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


def _in_split(frame: pl.LazyFrame, split: str) -> pl.LazyFrame:
    return frame.with_columns(split=pl.lit(SPLITS.index(split), pl.Int64))


def mmctr(folder: Path) -> Source:
    """MM-CTR of the WWW 2025 challenge: MicroLens_1M_x1/train.parquet, valid.parquet and, where it
    has labels, test.parquet (user_id, item_seq padded with 0, item_id, label); the first of an
    item's tags in item_info.parquet is its category.

    Rows have no page: those of a user with the same item_seq are one.
    """
    inner = folder / "MicroLens_1M_x1"
    folder = inner if inner.is_dir() else folder
    frames, files, notes = [], [], []
    for name, split in (("train", "train"), ("valid", "validation"), ("test", "test")):
        found = find_any(folder, f"{name}.parquet") if split == "test" else None
        if found == []:
            continue
        path = found[0] if found else find_one(folder, f"{name}.parquet")
        table = scan(path)
        if split == "test" and "label" not in table.collect_schema():
            notes.append(f"{path}: it has no labels, so it is not read: no page is for test")
            continue
        frame = lists.with_rows(need(table, path, "user_id", "item_seq", "item_id", "label"))
        rows = frame.select(
            text("user_id", "user_id", path),
            text("item_id", "item_id", path),
            _truth(frame, path, "label"),
            lists.checked(frame, path, "item_seq", "history"),
        )
        frames.append(_in_split(rows, split))
        files.append(path)
    items = None
    for about in find_any(folder, "item_info.parquet"):
        frame = need(scan(about), about, "item_id", "item_tags")
        frame = frame.with_columns(pl.col("item_tags").list.first())
        items = frame.select(text("item_id", "item_id", about), label("item_tags", "category"))
        items = items.filter(pl.col("item_id") != "0")
        files.append(about)
    return Source(
        "mmctr",
        impressions=pl.concat(_one_kind(frames)),
        histories=GivenHistories(),
        items=items,
        files=files,
        parts=_one_kind(frames).copy,
        notes=notes,
    )


def _qilin_pages(
    path: Path, kind: str, split: str, rows: tuple[int, int] | None = None
) -> pl.LazyFrame:
    """Pages of a file; `rows`: the first and the number of those that are wanted."""
    shown = Shown("note_idx", "click", "position", f"{_RESULTS[kind]}_result_details_with_idx")
    columns = ("user_idx", "recent_clicked_note_idxs", *shown.columns)
    frame = lists.with_rows(need(scan(path), path, *columns))
    frame = frame if rows is None else frame.slice(*rows)
    found = frame.select(
        text("user_idx", "user_id", path),
        page_views(frame, path, shown).alias("shown"),
        lists.checked(frame, path, "recent_clicked_note_idxs", "history"),
    )
    return _in_split(found.unnest("shown"), split)


def _stretches(files: Mapping[str, Sequence[Path]]) -> list[tuple[str, Path, tuple[int, int]]]:
    """Kind, file, and first and number of rows of short stretches, so that any share of all rows,
    in this order, has as large a share of each kind."""
    rows = {
        path: scan(path).select(pl.len()).collect(engine="streaming").item()
        for of in files.values()
        for path in of
    }
    found = []
    for number, (kind, paths) in itertools.product(range(_STRETCHES), files.items()):
        total = sum(rows[path] for path in paths)
        first, end = (total * n // _STRETCHES for n in (number, number + 1))
        for path in paths:
            start, stop = max(first, 0), min(end, rows[path])
            if start < stop:
                found.append((kind, path, (start, stop - start)))
            first, end = first - rows[path], end - rows[path]
    return found


def qilin(folder: Path, pages: str = "recommendation") -> Source:
    """Qilin's recommendation pages: recommendation_train and recommendation_test, a file or folder
    of Parquet each (user_idx, recent_clicked_note_idxs and rec_result_details_with_idx: note_idx,
    position and click of each note, as objects or JSON); of notes, taxonomy1_id is the
    category and the name of the first of image_path the image's.

    With `pages` "search" its search pages: search_train, search_test and their
    search_result_details_with_idx; with "both" stretches of each kind in turn. Validation is the
    last of train.
    """
    if pages not in PAGES:
        raise ValueError(f"pages: expected one of {', '.join(PAGES)}, got {pages!r}")
    kinds = list(_RESULTS) if pages == "both" else [pages]
    frames: list[pl.LazyFrame] = []
    files: list[Location] = []
    for split in ("train", "test"):
        found = {k: find(folder, f"{k}_{split}*.parquet", f"{k}_{split}/*.parquet") for k in kinds}
        files += [path for of in found.values() for path in of]
        if len(kinds) > 1:
            frames += [_qilin_pages(path, k, split, rows) for k, path, rows in _stretches(found)]
        else:
            frames += [_qilin_pages(path, pages, split) for path in found[pages]]
    abouts = []
    for about in find_any(folder, "notes*.parquet", "notes/*.parquet"):
        frame = need(scan(about), about, "note_idx", "taxonomy1_id", "image_path")
        stem = pl.col("image_path").list.first().str.extract(r"([^/]+?)(?:\.[^./]+)?$")
        category = label("taxonomy1_id", "category", about)
        abouts.append(
            frame.select(text("note_idx", "item_id", about), category, stem.alias("image"))
        )
        files.append(about)
    return Source(
        "qilin",
        impressions=pl.concat(_one_kind(frames)),
        # Whether a note may be called 0 is not said.
        histories=GivenHistories(padding=""),
        items=pl.concat(abouts) if abouts else None,
        files=files,
        parts=_one_kind(frames).copy,
    )


def ninerec(folder: Path) -> Source:
    """NineRec, one of its sets: <set>_pair.csv (user, item, timestamp), or, where that has no times
    (QB, TN), <set>_behaviour.tsv, whose order counts; covers <item>.jpg."""
    path = find_one(folder, "*_pair.csv", "*_behaviour.tsv")
    ordered = find_any(folder, "*_behaviour.tsv")
    if path.suffix == ".csv":
        frame = scan(path)
        if not ordered or "timestamp" in frame.collect_schema():
            events = _events(frame, path, "user", "item", "timestamp")
            return Source("ninerec", events=events, files=[path])
    path = find_one(folder, "*_behaviour.tsv")
    return Source("ninerec", events=_sequences(path), files=[path])


def taobao_mm(folder: Path) -> Source:
    """TAOBAO-MM: train_samples.parquet and test_samples.parquet (129_1 the user, 205 the item,
    label_0 two numbers of which the second is 1 for a click), the histories 150_2_180 of
    train_user_features.parquet and test_user_features.parquet, and 206 of item_features.parquet as
    the category.

    A page is all that the samples of a split show to a user. Validation is the last of train.
    """
    frames, past, files = [], [], []
    for split in ("train", "test"):
        path = find_one(folder, f"{split}_samples.parquet")
        hit = pl.col("label_0").list.get(1, null_on_oob=True).cast(pl.String).alias("clicked")
        frame = need(scan(path), path, "129_1", "205", "label_0")
        kind = frame.collect_schema()["label_0"]
        if not isinstance(kind, pl.List):
            raise ValueError(f"{path}: expected lists of two numbers as label_0, got {kind}")
        rows = frame.select(text("129_1", "user_id", path), text("205", "item_id", path), hit)
        frames.append(_in_split(rows, split))
        before = find_one(folder, f"{split}_user_features.parquet")
        frame = need(scan(before), before, "129_1", "150_2_180")
        history = lists.checked(lists.with_rows(frame), before, "150_2_180", "history")
        rows = lists.with_rows(frame).select(text("129_1", "user_id", before), history)
        past.append(_in_split(rows, split))
        files += [path, before]
    items = None
    for about in find_any(folder, "item_features.parquet"):
        frame = need(scan(about), about, "205", "206")
        items = frame.select(text("205", "item_id", about), label("206", "category", about))
        files.append(about)
    return Source(
        "taobao-mm",
        impressions=pl.concat(frames),
        histories=GivenHistories(),
        user_histories=pl.concat(_one_kind(past)),
        items=items,
        files=files,
        parts=frames.copy,
    )


LAYOUTS: dict[str, Callable[..., Source]] = {
    "hm": hm,
    "movielens": movielens,
    "amazon-reviews-2023": amazon_reviews_2023,
    "microlens": microlens,
    "pixelrec": pixelrec,
    "ebnerd": ebnerd,
    "mmctr": mmctr,
    "qilin": qilin,
    "taobao-mm": taobao_mm,
    "ninerec": ninerec,
}
