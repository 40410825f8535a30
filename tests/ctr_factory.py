"""Simulated shoppers with impressions, written as a dataset folder: either an item's style decides
clicks, or the item itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from dataset_factory import write_dataset

from courier_fast.data.dataset import Dataset


def make_world(
    path: Path,
    *,
    style_decides: bool,
    users: int = 300,
    items: int = 300,
    pages: int = 6000,
    shown: int = 6,
    seed: int = 0,
    turned: int | None = None,
) -> tuple[Dataset, np.ndarray]:
    """The folder and the items' styles [items, 8] of length 1. A user's taste is a style, too.

    Clicks have probability sigmoid(4 taste . style - 2), or sigmoid(quality - 1.5) with a normally
    distributed quality of each item. From validation on, taste is turned round for the items of the
    category `turned` (0 to 3): what was learned of it then misleads.
    """
    rng = np.random.default_rng(seed)
    style, taste = (rng.normal(size=(n, 8)) for n in (items, users))
    style /= np.linalg.norm(style, axis=1, keepdims=True)
    taste /= np.linalg.norm(taste, axis=1, keepdims=True)
    quality = 1.5 * rng.normal(size=items)
    user = rng.integers(0, users, pages)
    time = 1_700_000_000 + np.sort(rng.choice(90 * 86_400, pages, replace=False))
    item = rng.permuted(np.tile(np.arange(items), (pages, 1)), axis=1)[:, :shown]
    logit = (
        4 * (taste[user][:, None] * style[item]).sum(2) - 2
        if style_decides
        else quality[item] - 1.5
    )
    if turned is not None:
        late = np.arange(pages)[:, None] >= int(0.8 * pages)
        logit = np.where(late & (item % 4 == turned), -4 - logit, logit)
    clicked = rng.random(item.shape) < 1 / (1 + np.exp(-logit))
    write_world(path, user, time, item, clicked, items)
    return Dataset(path), style.astype(np.float32)


def write_world(
    path: Path,
    user: np.ndarray,
    time: np.ndarray,
    item: np.ndarray,
    clicked: np.ndarray,
    items: int,
    history: int = 20,
) -> None:
    """Pages [P] by time with items [P, S]; events are the clicks; splits are 80, 10 and 10 % of the
    pages."""
    pages, shown = item.shape
    user, time = user.astype(np.int64), time.astype(np.int64)
    page, place = np.nonzero(clicked)
    order = np.lexsort((time[page], user[page]))
    owner, at, what = user[page][order], time[page][order], item[page, place][order]
    key = owner * (1 << 40) + at
    end = np.searchsorted(key, user * (1 << 40) + time)
    start = np.maximum(np.searchsorted(key, user * (1 << 40)), end - history)
    cuts = [0, int(0.8 * pages), int(0.9 * pages), pages]
    clicks = np.bincount(item[: cuts[1]][clicked[: cuts[1]]], minlength=items)
    users = int(user.max()) + 1
    seen = np.full(items, time[0])
    offsets = np.arange(pages + 1) * shown
    tables: dict[str, dict[str, Any]] = {
        "users": {"user_id": pa.array([f"u{u}" for u in range(users)])},
        "items": {
            "item_id": pa.array([f"{i:05}" for i in range(items)]),
            "category": pa.array([f"c{i % 4}" for i in range(items)]),
            "clicks": clicks.astype(np.int64),
            "first_seen": seen,
            "last_seen": seen + 90 * 86_400,
        },
        "events": {"item": what.astype(np.int32), "time": at},
        "pages": {
            "user": user.astype(np.int32),
            "time": time,
            "history_start": start,
            "history_end": end,
            "pv_start": offsets[:-1],
            "pv_end": offsets[1:],
        },
        "page_items": {"item": item.ravel().astype(np.int32), "clicked": clicked.ravel()},
    }
    splits = {
        name: [a, b]
        for name, a, b in zip(("train", "validation", "test"), cuts, cuts[1:], strict=False)
    }
    write_dataset(path, tables, splits)
