"""What is near what, for people: lines of text, and a page of pictures that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from ..data.dataset import Dataset
from ..data.read.ids import one
from ..files import write_atomically
from .index import Index

SIDE = 160  # pixels of a picture


@dataclass(frozen=True)
class Neighbours:
    """A query's name (an item's id or a file), whether it is a file, the nearest (id, cosine)."""

    query: str
    is_file: bool
    near: list[tuple[str, float]]

    def lines(self) -> list[str]:
        return [self.query, *(f"  {cosine:6.3f}  {item}" for item, cosine in self.near)]


def nearest_items(index: Index, items: Sequence[str], k: int) -> list[Neighbours]:
    """The k nearest others of some of the index's items. ValueError for an id that it has not."""
    import numpy as np

    if not items:
        return []
    rows, cosines = index.search(np.stack([index.of(item) for item in items]), k + 1)
    found = []
    for item, near, values in zip(items, rows, cosines, strict=True):
        others = [(i, c) for i, c in _named(index, near, values) if i not in (item, one(item))]
        found.append(Neighbours(item, False, others[:k]))
    return found


def nearest_images(index: Index, encoder: Any, paths: Sequence[Path], k: int) -> list[Neighbours]:
    """The k nearest items of image files.

    Args:
        encoder: what `courier_fast.load` gave.

    Raises:
        ValueError: an encoder of another space than the index's, or an image that cannot be read.
    """
    import numpy as np

    if index.space is None or encoder.space != index.space:
        raise ValueError(
            f"encoder: expected one of the space {(index.space or 'that nobody wrote down')[:22]} "
            f"of {index.path}, got {encoder.space[:19]}: vectors of "
            "two encoders cannot be compared"
        )
    vectors = encoder.encode(list(paths))
    for path, vector in zip(paths, vectors, strict=True):
        if not np.isfinite(vector).all():
            raise ValueError(f"image: expected an image that can be read, got {path}")
    rows, cosines = index.search(vectors, k)
    return [
        Neighbours(str(path), True, _named(index, near, values))
        for path, near, values in zip(paths, rows, cosines, strict=True)
    ]


def _named(index: Index, rows: Any, cosines: Any) -> list[tuple[str, float]]:
    return [
        (index.ids[r].as_py(), c)
        for r, c in zip(rows.tolist(), cosines.tolist(), strict=True)
        if r >= 0
    ]


def write_page(found: Sequence[Neighbours], index: Index, dataset: Dataset, out: Path) -> None:
    """One HTML file without scripts; pictures are small JPEGs in it, ids and categories escaped."""
    from jinja2 import Environment, StrictUndefined

    from ..data.images.thumbnails import Pictures

    show = Pictures(dataset, side=SIDE)

    def item(name: str, text: str = "") -> dict[str, Any]:
        row = pc.index(dataset.item_ids, pa.scalar(name, pa.string())).as_py()
        if row < 0:
            return {"id": name, "category": "", "src": None, "text": text}
        return show(row, text=text)

    queries = [
        {
            "query": {"id": n.query, "category": "", "src": _file(n.query), "text": ""}
            if n.is_file
            else item(one(n.query)),
            "near": [item(name, f"{cosine:.2f}") for name, cosine in n.near],
        }
        for n in found
    ]
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("courier_fast.index").joinpath("neighbours.html.jinja").read_text("utf-8")
    recall = index.measured["recall@10"]
    note = (
        f"Cosines among {len(index.ids):,} items of {dataset.name}; index {index.kind}, "
        f"which finds {recall:.1%} of the 10 nearest."
    )
    text = environment.from_string(source).render(title="Nearest items", note=note, queries=queries)
    write_atomically(out, lambda path: path.write_text(text, "utf-8"))


def _file(path: str) -> str | None:
    from ..data.images.thumbnails import data_uri

    return data_uri(Path(path).read_bytes(), SIDE)
