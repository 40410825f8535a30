"""A dataset for measurements: the quickstart's catalogue and users."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq

from courier_fast.data.layouts import Columns, generic
from courier_fast.data.prepare import PrepareOptions, prepare
from courier_fast.quickstart.catalogue import draw_catalogue
from courier_fast.quickstart.users import simulate


def quickstart_dataset(folder: Path, items: int = 1200, users: int = 1000, seed: int = 0) -> Path:
    """Draws, simulates and prepares under `folder`; gives the dataset's folder."""
    catalogue = draw_catalogue(folder / "images", items, seed)
    pages, _ = simulate(catalogue, users, seed)
    pq.write_table(pages, folder / "pages.parquet")
    pq.write_table(catalogue, folder / "items.parquet")
    source = generic([folder / "pages.parquet"], folder / "items.parquet", Columns(page="page_id"))
    prepare(folder / "dataset", source=source, images=folder / "images", options=PrepareOptions())
    return folder / "dataset"
