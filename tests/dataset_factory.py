"""A small dataset folder, written directly: random users, events, pages and drawn pictures."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from PIL import Image

from courier_fast.data.dataset import FORMAT, Dataset, ImageStoreWriter, write_table

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
    """A valid folder: events on distinct days, every page after at least one event of its user; 1 to 6 PV items, at least one clicked.

    Item ids have leading zeros. Splits are 80, 10 and 10 % of the pages by time.
    """
    rng = np.random.default_rng(seed)
    path.mkdir(parents=True)
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
    write_table(path / "users.arrow", {"user_id": pa.array([f"u{u}" for u in range(users)])})
    write_table(
        path / "items.arrow",
        {
            "item_id": pa.array([f"{i:06}" for i in range(items)]),
            "category": pa.array(
                [["shirt", "shoe", None][i % 3] for i in range(items)], pa.string()
            ),
            "clicks": clicks.astype(np.int64),
            "first_seen": np.zeros(items, np.int64),
            "last_seen": np.full(items, times.max(), np.int64),
        },
    )
    write_table(path / "events.arrow", {"item": event_item, "time": times.astype(np.int64)})
    write_table(
        path / "pages.arrow",
        {
            "user": user,
            "time": time.astype(np.int64),
            "history_start": np.maximum(first[user], end - history).astype(np.int64),
            "history_end": end.astype(np.int64),
            "pv_start": pv[:-1].astype(np.int64),
            "pv_end": pv[1:].astype(np.int64),
        },
    )
    write_table(path / "page_items.arrow", {"item": pv_item, "clicked": clicked})
    if images:
        with ImageStoreWriter(path / "images.arrow") as store:
            for _ in range(items):
                height, width = (int(x) for x in rng.integers(40, 120, 2))
                store.append(draw(rng, height, width), height, width)
    about = {
        "format": FORMAT,
        "source": {"layout": "test"},
        "options": {},
        "splits": splits,
        "counts": {},
    }
    (path / "dataset.json").write_text(json.dumps(about))
    return Dataset(path)
