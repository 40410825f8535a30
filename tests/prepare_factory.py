"""Sources of events for `prepare`, and what it wrote as plain rows."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from courier_fast.data.dataset import Dataset
from courier_fast.data.prepare.layouts import Source

Event = tuple[str, str, int]


def source_of(events: list[Event], categories: dict[str, str] | None = None) -> Source:
    schema = {"user_id": pl.String, "item_id": pl.String, "time": pl.Int64}
    about = None
    if categories:
        about = pl.LazyFrame({"item_id": list(categories), "category": list(categories.values())})
    return Source("test", pl.LazyFrame(events, schema, orient="row"), items=about)


def random_events(seed: int, users: int = 12, items: int = 25, n: int = 260) -> list[Event]:
    """Few distinct times, so that ties and duplicates abound; ids whose text order is not that of
    their numbers."""
    rng = np.random.default_rng(seed)
    popularity = rng.dirichlet(np.full(items, 0.4))
    return [
        (
            f"u{rng.integers(users)}",
            f"{rng.choice(items, p=popularity):04}",
            int(rng.integers(40)) * 86_400,
        )
        for _ in range(n)
    ]


def digest(folder: Path) -> dict[str, str]:
    """All files but dataset.json, which has the paths."""
    files = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "dataset.json"]
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def page_rows(data: Dataset) -> list[dict[str, Any]]:
    items, users = data.item_ids.to_pylist(), data.user_ids.to_pylist()
    return [
        {
            "user": users[data.page_user[p]],
            "time": int(data.page_time[p]),
            "history": [
                (items[data.event_item[e]], int(data.event_time[e]))
                for e in range(data.history_start[p], data.history_end[p])
            ],
            "items": [items[i] for i in data.pv_item[data.pv_start[p] : data.pv_end[p]]],
            "clicked": data.pv_clicked[data.pv_start[p] : data.pv_end[p]].tolist(),
            "weight": None
            if data.pv_weight is None
            else data.pv_weight[data.pv_start[p] : data.pv_end[p]].tolist(),
        }
        for p in range(data.num_pages)
    ]
