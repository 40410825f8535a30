"""The dataset folder: what `courier-fast prepare` writes and everything else reads. It may be local
or in an object store (storage.py).

- dataset.json: format, source, pages ("given" or "made"), histories ("given", where the source had
  them), times ("order", where it had none), options,
  splits {name: [first page, end)}, counts, manifest (its checksum)
- manifest.json: tables {name: [{name, rows, bytes, sha256} of each shard]}
- users/, a row per user: user_id (string)
- items/, a row per item: item_id (string), category (string), clicks (int64: clicks on pages of the
  train split), first_seen, last_seen (int64), height, width (int32: of the image in pixels; 0
  without one)
- events/, a row per event: item (int32), time (int64): what users clicked or bought, by user, then
  time
- pages/, a row per page: user (int32), time (int64), history_start, history_end (int64: rows of
  events), pv_start, pv_end (int64: rows of page_items)
- page_items/, a row per PV item: item (int32), clicked (uint8: 1 where clicked), weight (float32;
  only where some page was cut)
- images/, a row per item: jpeg (binary; null without an image)
- embeddings/, in place of images, a row per item: embedding (fixed_size_list of int8, float16 or
  float32; "embeddings" in dataset.json has the scale that these are multiplied by)
- report.json: what was kept and dropped, and why

Where histories are given, events are their lists, by user and page, each once where pages of a user
have the same; they have no time, and `item` is the table's only column. Without times a page's time
is its row: pages are in the order of the source.

A page's history is a slice of its user's events, so nothing is stored twice: the last events
strictly before the page's time are those up to `history_end`. Pages are ordered by time, so a split
is a range of rows. Times are whole seconds since 1970 (UTC). Where some had parts of a second,
events and pages have a column microsecond (int32) beside time: both together are in order, and
"before" means before in both. A table is a folder of numbered shards, 00000.arrow and so on
(tables.py), each one record batch of uncompressed Arrow IPC that is read in place.

A page that was shown can be cut: all clicked items and a sample of the others stay. `weight` is how
many items of the uncut page a row stands for, the inverse of its chance to stay: 1 where it was
clicked or the page is whole, else others shown / others kept.
"""

from __future__ import annotations

import hashlib
import json
import os
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ..files import parse_json
from ..locations import Location
from ..storage import Folder, Shard, join, write_file
from .tables import ImageShard, Maps, ShardedTable

Array = npt.NDArray

FORMAT = 2
SPLITS = ("train", "validation", "test")
TABLES = ("users", "items", "events", "pages", "page_items")


def write_manifest(
    folder: Location, about: Mapping[str, Any], tables: Mapping[str, list[dict[str, Any]]]
) -> None:
    """Writes manifest.json, the entries of each table's shards, and then dataset.json, with which
    the folder is complete."""
    _, digest = write_json(join(folder, "manifest.json"), {"tables": tables})
    write_json(join(folder, "dataset.json"), {"format": FORMAT, **about, "manifest": digest})


def write_json(path: Location, about: Any) -> tuple[int, str]:
    """Writes a file, local or remote; its size and checksum."""
    text = json.dumps(about, indent=1, ensure_ascii=False) + "\n"
    return write_file(path, lambda local: local.write_text(text, "utf-8"))


class ImageStore:
    """The images of the items: `store[row]` is the encoded image as a NumPy view of its mapped
    shard, empty where there is none.

    Attributes:
        shapes: [items, 2] height and width in pixels as seen, after EXIF rotation.
        present: [items] whether there is an image.
    """

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.table = dataset.tables["images"]
        columns = [dataset.items.arrow(n).to_numpy() for n in ("height", "width")]
        self.shapes: Array = np.stack(columns, 1)
        self.present: Array = self.shapes[:, 0] > 0

    def __len__(self) -> int:
        return len(self.shapes)

    def _open(self, numbers: list[int]) -> list[ImageShard]:
        # Their checksums are left to `Dataset.verify`: one image of a local shard is wanted, and a
        # damaged one is found when it is decoded.
        table = self.table
        return table.maps.get([table.shards[n] for n in numbers], ImageShard, check=False)

    def __getitem__(self, row: int) -> npt.NDArray[np.uint8]:
        return self.take([row])[0]

    def take(self, rows: Iterable[int]) -> list[npt.NDArray[np.uint8]]:
        """The encoded images of some rows, without a copy."""
        wanted = np.asarray(list(rows), np.int64)
        bounds = self.table.bounds
        shard = np.searchsorted(bounds, wanted, side="right") - 1
        numbers = np.unique(shard).tolist()
        opened = dict(zip(numbers, self._open(numbers), strict=True))
        return [
            opened[n][row - bounds[n]]
            for n, row in zip(shard.tolist(), wanted.tolist(), strict=True)
        ]

    def fingerprint(self) -> list[Any]:
        """What changes when the images may have."""
        return [shard.sha256 for shard in self.table.shards]

    def __reduce__(self) -> tuple[Any, ...]:
        return ImageStore, (self._dataset,)


def _whole(table: str, name: str) -> cached_property[Array]:
    return cached_property(lambda dataset: dataset.tables[table].column(name).joined())


class _Moments(Sequence[float]):
    """Times of a table's rows in seconds, opened where they are looked at."""

    def __init__(self, table: ShardedTable) -> None:
        names = ("time", "microsecond") if "microsecond" in table.schema.names else ("time",)
        self._columns = [table.column(name) for name in names]

    def __len__(self) -> int:
        return len(self._columns[0])

    def __getitem__(self, row: Any) -> Any:
        time, *part = (int(column[row]) for column in self._columns)
        return time + part[0] / 1e6 if part else time


class Dataset:
    """A prepared folder, opened: columns as NumPy arrays, in place where a table has one shard (see
    the module's table).

    Args:
        path: a local folder, or a URL (s3://, gs://, hdfs:// and so on) whose shards are fetched
            into a cache when they are needed.

    Attributes:
        tables: users, items, events, pages, page_items and, with them, images or embeddings, as
            `Table`s whose shards are opened one by one.

    Raises:
        FileNotFoundError: the folder or a shard is not there.
        ValueError: its format is another; at any access: a shard was cut off or altered.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._folder = Folder(path)
        self.path: Location = self._folder.path
        about = self._folder.read_text("dataset.json")
        if about is None:
            raise FileNotFoundError(
                "dataset: expected a folder that `courier-fast prepare` wrote (with "
                f"dataset.json), got {self.path}"
            )
        advice = "prepare it again"
        self.info: dict[str, Any] = parse_json(about, join(self.path, "dataset.json"), advice)
        self.maps = Maps(self._folder)
        shards = self._shards()
        self.tables = {name: ShardedTable(self.maps, of) for name, of in shards.items()}
        self.users, self.items, self.events, self.pages, self.page_items = (
            self.tables[n] for n in TABLES
        )

    def _shards(self) -> dict[str, list[Shard]]:
        format_ = self.info.get("format")
        if format_ != FORMAT:
            raise ValueError(
                f"dataset: expected format {FORMAT}, got {format_} in {self.path}/dataset.json; "
                "prepare it again"
            )
        manifest = self._folder.read_text("manifest.json")
        if manifest is None:
            raise FileNotFoundError(f"dataset: {self.path}/manifest.json is not there")
        lacking = [name for name in ("manifest", "splits") if name not in self.info]
        if lacking:
            raise ValueError(
                f"dataset: {self.path}/dataset.json was altered: "
                f"expected {lacking[0]} in it; prepare it again"
            )
        got = "sha256:" + hashlib.sha256(manifest.encode()).hexdigest()
        if got != self.info["manifest"]:
            raise ValueError(
                f"dataset: {self.path}/manifest.json was cut off or altered: expected "
                f"{self.info['manifest']}, got {got}"
            )
        tables = parse_json(manifest, join(self.path, "manifest.json"))["tables"]
        return {n: [Shard(**s) for s in of] for n, of in tables.items()}

    def verify(self) -> int:
        """Reads every shard where it lies and compares it with the manifest; gives the number of
        bytes. ValueError names a shard, or report.json, that was cut off or altered."""
        _ = self.report  # is JSON; it has no checksum
        total = 0
        for table in self.tables.values():
            for shard in table.shards:
                self._folder.verify(shard)
                total += shard.bytes
        return total

    # Whole columns, for what looks at all of a dataset; batches are taken from the shards
    # (batches.py).
    page_user = _whole("pages", "user")
    page_time = _whole("pages", "time")
    history_start = _whole("pages", "history_start")
    history_end = _whole("pages", "history_end")
    pv_start = _whole("pages", "pv_start")
    pv_end = _whole("pages", "pv_end")
    event_item = _whole("events", "item")
    event_time = _whole("events", "time")
    pv_item = _whole("page_items", "item")
    item_clicks = _whole("items", "clicks")
    item_first_seen = _whole("items", "first_seen")

    @cached_property
    def pv_clicked(self) -> npt.NDArray[np.bool_]:
        """[PV items] bool."""
        return self.page_items.column("clicked").joined().view(np.bool_)

    @cached_property
    def pv_weight(self) -> Array | None:
        """[PV items] float32; None: no page was cut, and every row stands for itself."""
        column = self.page_items.column("weight")
        return column.joined() if "weight" in self.page_items.schema.names else None

    @cached_property
    def page_moment(self) -> Array:
        """[pages] times in seconds: `page_time`, or where there are parts of a second float64,
        exact to the microsecond. For what is in order."""
        return self._moment("pages")

    @cached_property
    def event_moment(self) -> Array:
        """[events] as `page_moment`."""
        return self._moment("events")

    @property
    def histories_given(self) -> bool:
        """Whether histories are lists of the source, whose events have no times."""
        return self.info.get("histories") == "given"

    @property
    def timed(self) -> bool:
        """Whether times are times; else they are the order of pages."""
        return self.info.get("times") != "order"

    def need_times(self, option: str) -> None:
        """ValueError that names the option where pages have no times."""
        if not self.timed:
            raise ValueError(
                f"{option}: expected a dataset with times, got {self.path}, whose pages are in the "
                "order of their rows alone"
            )

    def _moment(self, name: str) -> Array:
        table = self.tables[name]
        time = table.column("time").joined()
        if "microsecond" not in table.schema.names:
            return time
        moment: Array = time + table.column("microsecond").joined() / 1e6
        return moment

    @property
    def moments(self) -> Sequence[float]:
        """`page_moment`, of which only the rows that are asked for are read."""
        return _Moments(self.pages)

    @property
    def name(self) -> str:
        """The folder's."""
        return (
            str(self.path).rsplit("/", 1)[-1]
            if isinstance(self.path, str)
            else self.path.resolve().name
        )

    @property
    def fingerprint(self) -> str:
        """ "sha256:..." of all tables: that of the manifest, which has theirs."""
        return str(self.info["manifest"])

    @cached_property
    def report(self) -> dict[str, Any]:
        """What `prepare` read, kept and dropped; empty where report.json is not there."""
        text = self._folder.read_text("report.json")
        return {} if text is None else parse_json(text, join(self.path, "report.json"))

    @property
    def num_items(self) -> int:
        return len(self.items)

    @property
    def num_pages(self) -> int:
        return len(self.pages)

    @property
    def has_images(self) -> bool:
        return "images" in self.tables

    @cached_property
    def item_ids(self) -> pa.Array:
        """[items] ids as they were in the source, as text."""
        return self.items.arrow("item_id")

    @cached_property
    def categories(self) -> pa.Array:
        """[items] categories as text, null where unknown."""
        return self.items.arrow("category")

    @cached_property
    def user_ids(self) -> pa.Array:
        """[users] ids as they were in the source, as text."""
        return self.users.arrow("user_id")

    def split(self, name: str) -> range:
        """The rows of `pages` that are in this split."""
        if name not in self.info["splits"]:
            raise ValueError(f"split: expected one of {sorted(self.info['splits'])}, got {name!r}")
        return range(*self.info["splits"][name])

    def first_pages(self, share: float) -> range:
        """The rows of the train split that are among the first `share` of all pages; the cut never
        divides a moment.

        ValueError for a share that is not above 0 and at most 1, or that leaves none.
        """
        if not 0 < share <= 1:
            raise ValueError(f"share: expected above 0 and at most 1, got {share}")
        train = self.split("train")
        cut = train.start + round(share * self.num_pages)
        if cut < train.stop:
            times = self.moments
            cut = bisect_left(times, times[cut], train.start, train.stop)
        if cut <= train.start:
            raise ValueError(
                f"share: expected a share that leaves pages of the {self.num_pages} in "
                f"{self.path}, got {share}"
            )
        return range(train.start, min(cut, train.stop))

    @cached_property
    def images(self) -> ImageStore:
        """The image store; FileNotFoundError where the folder was prepared without images."""
        if not self.has_images:
            raise FileNotFoundError(
                f"images: {self.path} has none: this dataset was prepared without --images"
            )
        return ImageStore(self)

    @property
    def has_embeddings(self) -> bool:
        """Whether there are ready embeddings in place of images."""
        return "embeddings" in self.tables

    def read_embeddings(self) -> npt.NDArray[np.float32]:
        """[items, D] float32, finite in every row, in memory; FileNotFoundError where the folder
        was prepared without embeddings."""
        if not self.has_embeddings:
            raise FileNotFoundError(
                f"embeddings: {self.path} has none of its own: it was prepared without --embeddings"
            )
        scale = self.info.get("embeddings", {}).get("scale")
        if not isinstance(scale, int | float):
            raise ValueError(
                f"dataset: {self.path}/dataset.json was altered: expected the scale of the "
                "embeddings in it; prepare it again"
            )
        table = self.tables["embeddings"]
        width = table.schema.field("embedding").type.list_size
        found = np.empty((self.num_items, width), np.float32)
        for number, start in enumerate(table.bounds[:-1].tolist()):
            (batch,) = table.batches([number])
            rows = batch.column("embedding").flatten().to_numpy().reshape(-1, width)
            found[start : start + len(rows)] = rows
        found *= np.float32(scale)
        return found

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.path,)
