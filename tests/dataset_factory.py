"""A small dataset folder, written directly: random users, events, pages and drawn pictures."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from courier_fast.data.dataset import TABLES, Dataset, write_manifest
from courier_fast.data.tables import SHARD_BYTES, SHARD_ROWS, ImageStoreWriter, write_shards

DAY = 86_400


def draw(rng: np.random.Generator, height: int, width: int) -> bytes:
    """A JPEG of a few flat rectangles."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = rng.integers(0, 256, 3)
    for _ in range(3):
        top, left = rng.integers(0, height), rng.integers(0, width)
        pixels[top : top + height // 2, left : left + width // 2] = rng.integers(0, 256, 3)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=90)
    return file.getvalue()


def make_dataset(
    path: Path,
    *,
    users: int = 20,
    items: int = 50,
    pages: int = 120,
    history: int = 6,
    images: bool = True,
    seed: int = 0,
) -> Dataset:
    """A valid folder: events on distinct days, every page after at least one event of its user; 1
    to 6 PV items, at least one clicked.

    Item ids have leading zeros. Splits are 80, 10 and 10 % of the pages by time.
    """
    rng = np.random.default_rng(seed)
    counts = rng.integers(2, 2 * history + 2, users)
    first = np.concatenate([[0], np.cumsum(counts)])
    times = np.concatenate([np.sort(rng.choice(1000, n, replace=False)) for n in counts]) * DAY
    event_item = rng.integers(0, items, first[-1]).astype(np.int32)

    user = rng.integers(0, users, pages).astype(np.int32)
    past = np.array([rng.integers(1, counts[u] + 1) for u in user])  # events before the page
    end = first[user] + past
    time = times[end - 1] + 1 + rng.integers(0, DAY // 2, pages)
    order = np.argsort(time, kind="stable")
    user, end, time = user[order], end[order], time[order]
    shown = rng.integers(1, 7, pages)
    pv = np.concatenate([[0], np.cumsum(shown)])
    pv_item = np.concatenate([rng.choice(items, n, replace=False) for n in shown]).astype(np.int32)
    clicked = rng.random(pv[-1]) < 0.2
    clicked[pv[:-1] + rng.integers(0, shown)] = True

    cuts = [0, int(pages * 0.8), int(pages * 0.9), pages]
    splits = {
        name: [a, b]
        for name, a, b in zip(("train", "validation", "test"), cuts, cuts[1:], strict=False)
    }
    train_rows = slice(0, pv[cuts[1]])
    clicks = np.bincount(pv_item[train_rows][clicked[train_rows]], minlength=items)
    tables: dict[str, dict[str, Any]] = {
        "users": {"user_id": pa.array([f"u{u}" for u in range(users)])},
        "items": {
            "item_id": pa.array([f"{i:06}" for i in range(items)]),
            "category": pa.array(
                [["shirt", "shoe", None][i % 3] for i in range(items)], pa.string()
            ),
            "clicks": clicks.astype(np.int64),
            "first_seen": np.zeros(items, np.int64),
            "last_seen": np.full(items, times.max(), np.int64),
        },
        "events": {"item": event_item, "time": times.astype(np.int64)},
        "pages": {
            "user": user,
            "time": time.astype(np.int64),
            "history_start": np.maximum(first[user], end - history).astype(np.int64),
            "history_end": end.astype(np.int64),
            "pv_start": pv[:-1].astype(np.int64),
            "pv_end": pv[1:].astype(np.int64),
        },
        "page_items": {"item": pv_item, "clicked": clicked},
    }
    shapes = (
        [tuple(int(x) for x in rng.integers(40, 120, 2)) for _ in range(items)] if images else []
    )
    drawn = [(draw(rng, *shape), *shape) for shape in shapes]
    return write_dataset(path, tables, splits, drawn or None)


def write_dataset(
    path: Path,
    tables: Mapping[str, Mapping[str, Any]],
    splits: Mapping[str, list[int]],
    images: Sequence[tuple[bytes | None, int, int]] | None = None,
    *,
    shard_rows: int = SHARD_ROWS,
    shard_bytes: int = SHARD_BYTES,
    **about: Any,
) -> Dataset:
    """A dataset folder of these tables; `images` are bytes, height and width of each item's."""
    path.mkdir(parents=True, exist_ok=True)
    shapes = np.zeros((len(tables["items"]["item_id"]), 2), np.int32)
    if images is not None:
        shapes[:] = [image[1:] if image[0] else (0, 0) for image in images]
    items = {**tables["items"], "height": shapes[:, 0], "width": shapes[:, 1]}
    whole = {**tables, "items": items}
    shards = {n: write_shards(path, n, of, shard_rows) for n, of in whole.items()}
    if images is not None:
        with ImageStoreWriter(path, shard_bytes) as store:
            for image, *_ in images:
                store.append(image)
        shards["images"] = store.shards
    info = {"source": {"layout": "test"}, "options": {}, "counts": {}, **about, "splits": splits}
    write_manifest(path, info, shards)
    return Dataset(path)


def columns_of(dataset: Dataset, table: str) -> dict[str, Any]:
    """A table's columns: text as Arrow arrays, numbers as NumPy arrays that may be changed."""
    of, found = dataset.tables[table], {}
    for name in of.schema.names:
        column = of.arrow(name)
        found[name] = column if pa.types.is_string(column.type) else column.to_numpy().copy()
    return found


def images_of(dataset: Dataset) -> list[tuple[bytes | None, int, int]]:
    store = dataset.images
    return [(store[i].tobytes() or None, *store.shapes[i].tolist()) for i in range(len(store))]


def rewrite(
    dataset: Dataset,
    to: Path,
    tables: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    images: Sequence[tuple[bytes | None, int, int]] | None = None,
    **how: Any,
) -> Dataset:
    """The dataset in another (or the same) folder with some tables or its images changed, or in
    other shards."""
    whole = {name: columns_of(dataset, name) for name in TABLES} | dict(tables or {})
    for name in ("height", "width"):
        whole["items"].pop(name)  # type: ignore[attr-defined]
    if images is None and dataset.has_images:
        images = images_of(dataset)
    info = {n: v for n, v in dataset.info.items() if n not in ("format", "manifest")}
    return write_dataset(to, whole, info.pop("splits"), images, **(info | how))
