"""A dataset for measurements: the quickstart's catalogue and users."""

from __future__ import annotations

from pathlib import Path

from courier_fast.quickstart.command import Quickstart, draw, prepare_dataset

QUICKSTART = Quickstart()


def quickstart_dataset(folder: Path) -> Path:
    """Draws, simulates and prepares under `folder`; gives the dataset's folder."""
    draw(folder, QUICKSTART)
    prepare_dataset(folder, QUICKSTART)
    return folder / "dataset"
