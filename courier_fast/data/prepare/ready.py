"""Ready embeddings in place of images: which row of a file is which item's, and the table of the
dataset that they become."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from ...disk import new_map
from ...locations import Location
from ..read.ids import MISSING, no_match
from ..read.scan import some
from ..tables import write_shard
from .items import Candidates, Items
from .options import PrepareOptions
from .rows import arrow_text
from .steps import search
from .vectors import REASONS, USABLE, Batch, Vectors

Array = npt.NDArray
log = logging.getLogger(__name__)


class Rows:
    """The rows of a file by item, in a map on the disk: a file is read once, in its own order.

    Attributes:
        what: [items] what an item's row is, see vectors.py; 0: the file has none.
        rows: [items, D], of those that are usable.
    """

    def __init__(self, ids: pl.Series, vectors: Vectors, scratch: Path) -> None:
        """`ids`: of all items, sorted."""
        self.ids, self.vectors, self.path = ids, vectors, scratch / "embeddings"
        self._known = arrow_text(ids)
        self.what = np.zeros(len(ids), np.uint8)
        self.rows: Array | None = None
        self._seen, self._again = (np.zeros(len(ids), bool) for _ in range(2))
        self.without_id = self.others = 0
        self.first_other: list[str] = []
        for batch in vectors.batches():
            self._take(batch)

    def _take(self, batch: Batch) -> None:
        missing = pc.is_in(pc.fill_null(batch.ids, ""), pa.array(MISSING, batch.ids.type))
        missing = missing.to_numpy(zero_copy_only=False)
        self.without_id += int(missing.sum())
        ids = batch.ids.cast(pa.large_string())
        code = search(self._known, pc.fill_null(ids, "")).clip(max=len(self._known) - 1)
        fits = pc.equal(self._known.take(pa.array(code)), ids)
        fits = pc.fill_null(fits, False).to_numpy(zero_copy_only=False) & ~missing
        other = ~fits & ~missing
        self.others += int(other.sum())
        if len(self.first_other) < 3:
            self.first_other += ids.filter(pa.array(other)).slice(0, 3).to_pylist()
        self._put(code[fits], batch.what[fits], batch.rows[fits])

    def _put(self, code: Array, what: Array, rows: Array) -> None:
        """Of several rows of an item the first that is usable counts, or of a folder the last."""
        if not len(code):
            return
        if self.vectors.newest:
            last = len(code) - 1 - np.unique(code[::-1], return_index=True)[1]
            code, what, rows = code[last], what[last], rows[last]
            chosen = np.ones(len(code), bool)
        else:
            self._again[code[self._seen[code]]] = True
            items, counts = np.unique(code, return_counts=True)
            self._again[items[counts > 1]] = True
            self._seen[items] = True
            # Usable rows come first here, each in the order of the file.
            order = np.argsort(what != USABLE, kind="stable")
            first = order[np.unique(code[order], return_index=True)[1]]
            code, what, rows = code[first], what[first], rows[first]
            chosen = self.what[code] != USABLE
        self.what[code[chosen]] = what[chosen]
        good = chosen & (what == USABLE)
        if good.any():
            if self.rows is None:
                shape = (len(self.ids), rows.shape[1])
                self.rows = new_map(self.path, self.vectors.dtype, shape)
            self.rows[code[good]] = rows[good]

    def close(self) -> None:
        self.rows = None
        self.path.unlink(missing_ok=True)

    @property
    def about(self) -> dict[str, Any]:
        """What the report says of them."""
        missing = self.ids.filter(pl.Series(self.what == 0))
        bad = np.flatnonzero(self.what > USABLE)
        why = {self.ids[i]: REASONS[w] for i, w in zip(bad.tolist(), self.what[bad], strict=True)}
        return {
            "usable": int((self.what == USABLE).sum()),
            "missing": missing.to_list(),
            "unusable": why,
            "several_rows": int(self._again.sum()),
            "without_id": self.without_id,
            "other_items": self.others,
        }


def embedded(
    candidates: Candidates,
    vectors: Vectors,
    folder: Location,
    scratch: Path,
    options: PrepareOptions,
) -> Items:
    """The items that have an embedding, and the shards of their table. ValueError where none
    has."""
    log.info("embeddings%s", f": column {vectors.columns[1]}" if vectors.columns else "")
    found = Rows(candidates.table["item_id"], vectors, scratch)
    about = found.about
    try:
        if found.rows is None:
            raise ValueError(_none_usable(found, about))
        candidates.note(_notes(found, about))
        candidates.stays = found.what == USABLE
        kept = np.flatnonzero(candidates.stays)
        shards, zeros = _written(found.rows, kept, folder, options)
        width = found.rows.shape[1]
    finally:
        found.close()
    if len(zeros):
        first = found.ids[int(zeros[0])]
        candidates.note(
            [
                f"embeddings: {len(zeros):,} items have zeros alone (first: {first}); they stay, "
                "and their cosine with any other is 0"
            ]
        )
    items = candidates.chosen(shards)
    items.embeddings = {
        **about,
        "zeros": len(zeros),
        "columns": list(vectors.columns) if vectors.columns else None,
        "dim": width,
        "dtype": vectors.dtype.name,
        "scale": vectors.scale,
    }
    return items


def _none_usable(found: Rows, about: dict[str, Any]) -> str:
    path, total = found.vectors.path, len(found.ids)
    if about["unusable"]:
        why = next(iter(about["unusable"].values()))
        return (
            f"embeddings: expected at least one that can be used in {path}, got none; of {total:,} "
            f"items, {len(about['missing']):,} have no row and {len(about['unusable']):,} one that "
            f"is {why}"
        )
    if not found.first_other:
        return f"embeddings: expected rows with ids in {path}, got none"
    fit = no_match(found.first_other, found.ids.head(3).to_list())
    return (
        f"embeddings: expected ids of items of the interactions, got none that fits in {path}: "
        f"{fit}"
    )


def _notes(found: Rows, about: dict[str, Any]) -> list[str]:
    path, total, notes = found.vectors.path, len(found.ids), []
    if found.without_id:
        notes.append(f"embeddings: {found.without_id:,} rows of {path} have no id")
    if found._again.any():
        first = found.ids[int(found._again.argmax())]
        notes.append(
            f"embeddings: {about['several_rows']:,} items have several rows in {path} (first: "
            f"{first}); the first that can be used is taken"
        )
    lacking = total - about["usable"]
    if 2 * lacking >= total:
        ids = [*about["missing"][:3], *about["unusable"]]
        notes.append(
            f"embeddings: {lacking:,} of {total:,} items have none that can be used in {path} "
            f"({some(ids, 3)}); they are left out"
        )
    return notes


def _written(
    rows: Array, kept: Array, folder: Location, options: PrepareOptions
) -> tuple[list[dict[str, Any]], Array]:
    """Entries of the shards of the kept rows, and which of these are zeros alone."""
    size = max(1, options.shard_bytes // (rows.shape[1] * rows.itemsize))
    size = min(size, options.shard_rows)
    shards, zeros = [], []
    for number, start in enumerate(range(0, len(kept), size)):
        part = kept[start : start + size]
        values = np.asarray(rows[part])
        zeros.append(part[~values.any(1)])
        shards.append(write_shard(folder, "embeddings", number, {"embedding": values}))
    return shards, np.concatenate(zeros)
