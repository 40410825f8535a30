"""Settings of small training runs, and what such a run has written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from courier_fast.data.dataset import Dataset
from courier_fast.train.config import Config


def make_features(dataset: Dataset, path: Path) -> Path:
    """A file of random embeddings [items, 12] of the dataset's items."""
    np.save(path, np.random.default_rng(0).normal(size=(dataset.num_items, 12)).astype(np.float32))
    return path


def settings(dataset: Dataset, out: Path, **overrides: Any) -> Config:
    values = {
        "data.dataset": dataset.path,
        "data.size": 32,
        "data.pages": 16,
        "data.threads": 1,
        "model.dim": 8,
        "model.backbone": "small_conv",
        "optim.epochs": 2,
        "run.out": out,
        "run.device": "cpu",
        "run.log_steps": 1,
        "run.tensorboard": False,
        "run.progress": False,
    }
    given = {k.replace("__", "."): v for k, v in overrides.items()}
    for name, other in (("data.images", "data.pages"), ("optim.steps", "optim.epochs")):
        if name in given:
            del values[other]
    return Config.load(None, values | given)


def metrics(run: Path) -> list[dict[str, Any]]:
    """The journal without what depends on the clock."""
    clock = ("time", "images_per_s", "occurrences_per_s")
    lines = [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if k not in clock} for x in lines]
