"""The items that stay: those that rows name, with their metadata, their images and when they are on
offer."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa

from ...locations import Location
from ..images.files import LEADS_OUT, ORDER, ImageFiles, Paths, index_images
from ..read.ids import one
from ..read.likeness import items_note
from ..read.scan import reading, some
from .layouts import Source
from .rows import arrow_text
from .vectors import Vectors

Array = npt.NDArray
log = logging.getLogger(__name__)

NO_IMAGE = "item without a usable image"
NOT_EMBEDDED = "item without a usable embedding"


class Inputs(NamedTuple):
    """What is read: rows, and images or embeddings of their items, or neither."""

    source: Source
    images: Location | None = None
    embeddings: Vectors | None = None

    @property
    def dropped(self) -> str:
        """Why a row is left out whose item does not stay."""
        return NO_IMAGE if self.embeddings is None else NOT_EMBEDDED


@dataclass
class Items:
    """The items that stay, in order of their ids."""

    # item_id, category, height, width, and first_seen, last_seen where the source has them
    table: pl.DataFrame
    row: Array  # [codes] int32: the row of a code, -1 where the item does not stay
    missing: list[str]
    undecodable: dict[str, str]
    about_images: dict[str, Any]  # more for the report
    shards: list[dict[str, Any]]  # of images or embeddings, for the manifest
    notes: list[str]
    ticks: int = 1  # of a second, in which times are
    embeddings: dict[str, Any] | None = None  # their part of the report

    def columns(self, clicks: Array, first_seen: Array, last_seen: Array) -> dict[str, Any]:
        """Those of the table items."""
        return {
            "item_id": id_array(self.table["item_id"]),
            "category": id_array(self.table["category"]),
            "clicks": clicks,
            "first_seen": first_seen // self.ticks,
            "last_seen": last_seen // self.ticks,
            **{n: self.table[n].to_numpy() for n in ("height", "width")},
        }

    def images(self) -> dict[str, Any]:
        """Their part of the report."""
        return {
            "usable": len(self.table),
            "missing": self.missing,
            "undecodable": self.undecodable,
            **self.about_images,
        }


def id_array(ids: pl.Series) -> pa.Array:
    """As a column of the dataset."""
    return arrow_text(ids).cast(pa.string())


class Candidates:
    """All items of the source in order of their ids, with the metadata; which of them stay is told
    one after another."""

    def __init__(self, ids: pl.DataFrame, source: Source, images: Location | None) -> None:
        """`ids`: code and item_id, sorted."""
        table = ids
        self.notes: list[str] = []
        if source.items is not None:
            ours = ids.lazy().select("item_id")
            about = source.items.join(ours, on="item_id", how="semi", maintain_order="left")
            with reading("items"):
                rows = about.collect(engine="streaming").unique(maintain_order=True)
                found = rows.unique("item_id", keep="first", maintain_order=True)
                if len(rows) > len(found):
                    again = rows.filter(pl.col("item_id").is_duplicated())["item_id"]
                    shown = f"(first: {again[0]}); the first row is taken"
                    self.note([f"items: {again.n_unique():,} items have rows that differ {shown}"])
                self.note(items_note(ids["item_id"], found["item_id"], source.items))
            table = ids.join(found, on="item_id", how="left", maintain_order="left")
        if not source.timed:  # nothing that these could be compared with
            table = table.drop("first_seen", "last_seen", strict=False)
        extra = {
            "category": pl.String,
            "image": pl.String,
            "first_seen": pl.Int64,
            "last_seen": pl.Int64,
        }
        self.table = table.with_columns(
            pl.lit(None, kind).alias(name)
            for name, kind in extra.items()
            if name not in table.columns
        )
        self.ticks = source.ticks
        if self.ticks > 1:  # the second in which an item was last on offer counts whole
            limit = np.iinfo(np.int64).max // self.ticks - 1
            first, last = (pl.col(n).clip(-limit, limit) for n in ("first_seen", "last_seen"))
            self.table = self.table.with_columns(first * self.ticks, (last + 1) * self.ticks - 1)
        self.images = images
        self.stays = np.ones(len(table), bool)
        self.shapes = np.zeros((len(table), 2), np.int32)
        self.missing: list[str] = []
        self.undecodable: dict[str, str] = {}
        self.gave_way: dict[str, str] = {}
        self.files = ImageFiles()
        self.paths: list[Paths | None] = []
        if images is None:
            return
        self._names, other = self.table["item_id"].to_list(), self.table["image"].to_list()
        pairs = [(one(a), one(b or "")) for a, b in zip(self._names, other, strict=True)]
        files = index_images(images, {name for pair in pairs for name in pair} - {""})
        self.files = files
        self.paths = [files.paths.get(a) or files.paths.get(b) for a, b in pairs]
        self._links = [files.outside.get(a) or files.outside.get(b) for a, b in pairs]
        if several := files.several:
            item, (one_file, other_file, *_) = next(iter(several.items()))
            self.note(
                [
                    f"images: {len(several):,} items have several files (first: {item}, {one_file} "
                    f"before {other_file}); one is taken {ORDER}"
                ]
            )
        if files.unreadable:
            self.note(
                [
                    f"images: {len(files.unreadable):,} folders cannot be read (first: "
                    f"{files.unreadable[0]}): their items count as missing"
                ]
            )

    def note(self, notes: list[str]) -> None:
        """Logs and keeps them."""
        for line in notes:
            log.warning("%s", line)
        self.notes += notes

    def checked(self, i: int, height: int, width: int, reason: str) -> None:
        """What item i's image is; height and width 0 where there is none that can be used."""
        self.stays[i] = height > 0
        self.shapes[i] = height, width
        if height:
            if reason:
                self.gave_way[self._names[i]] = reason
            return
        if self.paths[i] is not None:
            self.undecodable[self._names[i]] = reason
        elif self._links[i] is not None:
            self.undecodable[self._names[i]] = LEADS_OUT
        else:
            self.missing.append(self._names[i])

    def chosen(self, shards: list[dict[str, Any]]) -> Items:
        """The items that stay. ValueError where none does."""
        missing, total = len(self.missing), len(self.stays)
        if self.gave_way:
            name, why = next(iter(self.gave_way.items()))
            self.note(
                [
                    f"images: of {len(self.gave_way):,} items another file is taken, as the first "
                    f"cannot be used (first: {name}: {why})"
                ]
            )
        if missing and self.stays.any():
            unread = any(i in self.files.unread for i in self.missing)
            if unread or 2 * missing >= total:
                self.note(
                    [
                        f"images: {missing:,} of {total:,} items have none under {self.images} "
                        f"({some(self.missing, 3)}); {self.files.missing_note(self.missing)}"
                    ]
                )
        if not self.stays.any():
            raise ValueError(
                f"images: expected files under {self.images} called after items such as "
                f"{', '.join(self._names[:3])}; of {len(self._names)} items, {missing} have none "
                f"and {len(self.undecodable)} one that cannot be used"
                + (f" (first: {next(iter(self.undecodable.values()))})" if self.undecodable else "")
                + (f"; {self.files.missing_note(self.missing)}" if missing else "")
            )
        table = self.table.with_columns(height=self.shapes[:, 0], width=self.shapes[:, 1])
        table = table.filter(self.stays)
        row = np.full(len(self.stays), -1, np.int32)
        row[table["code"].to_numpy()] = np.arange(len(table))
        return Items(
            table,
            row,
            self.missing,
            self.undecodable,
            self._about_images(),
            shards,
            self.notes,
            self.ticks,
        )

    def _about_images(self) -> dict[str, Any]:
        files, several = self.files, self.files.several
        return {
            "folders_not_followed": files.folders,
            "folders_unreadable": files.unreadable,
            "hidden": files.hidden,
            "several_files": {
                "items": len(several),
                "first": dict(islice(((i, list(of)) for i, of in several.items()), 5)),
            },
            "gave_way": self.gave_way,
        }


def spans(found: Mapping[str, Array], table: pl.DataFrame) -> tuple[Array, Array]:
    """[items] when each was first and last seen; the source's word holds where it is wider.

    `found`: item, first, last, from events and rows shown.
    """
    spans = []
    for name, column, pick, none in (
        ("first_seen", "first", np.fmin, np.iinfo(np.int64).max),
        ("last_seen", "last", np.fmax, np.iinfo(np.int64).min),
    ):
        seen = np.full(len(table), none)
        seen[found["item"]] = found[column]
        known = table[name].is_not_null().to_numpy()
        seen[known] = pick(seen[known], table[name].drop_nulls().to_numpy())
        spans.append(seen)
    first, last = spans
    never = first > last  # in a history that no page has
    first[never] = last[never] = last.max(where=~never, initial=0)
    return first, last
