"""dataset_config.yaml for FuxiCTR 2.3: its models read the exported impressions as they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Any

from .features import CLUSTERS, LEVELS, SIMILARITY

SEPARATOR = "^"  # by which FuxiCTR joins a list of ids


def dataset_config(
    numbers: Sequence[str], embeddings: Iterable[tuple[str, int]], history: int
) -> str:
    """A dataset for each form and embedding, "none", "similarity_trained", ..., as JSON, which is
    YAML.

    Args:
        numbers: columns that every form has.
        embeddings: names and dimensions.
        history: the most items of one.
    """
    ids = [_categorical(name) for name in ("user_id", "item_id", "category", "hour", "weekday")]
    past = {
        "name": "history",
        "active": True,
        "dtype": "str",
        "type": "sequence",
        "splitter": SEPARATOR,
        "max_len": history,
        "share_embedding": "item_id",
        "fill_na": None,
    }
    page = {"name": "page", "active": True, "dtype": "int", "type": "meta"}
    base = [*ids, past, *_numeric(numbers), page]
    found = {"none": _dataset(base)}
    for name, dim in embeddings:
        vector = {
            "pretrained_emb": f"./{name}_vectors.npz",
            "pretrain_dim": dim,
            "pretrain_usage": "sum",
            "freeze_emb": True,
        }
        found[f"vector_{name}"] = _dataset(
            [c | vector if c["name"] == "item_id" else c for c in base]
        )
        similar = _numeric(f"{name}_similarity_{c}" for c in SIMILARITY)
        found[f"similarity_{name}"] = _dataset([*base, *similar])
        same = _numeric(f"{name}_same_cluster_{k}" for k in CLUSTERS)
        found[f"cluster_{name}"] = _dataset(
            [*base, *(_categorical(f"{name}_cluster_{k}") for k in CLUSTERS), *same]
        )
        levels = range(1, LEVELS + 1)
        code = [f"code_{i}" for i in levels] + [f"prefix_{i}" for i in levels[1:]]
        begins = _numeric(f"{name}_same_prefix_{i}" for i in levels)
        found[f"code_{name}"] = _dataset(
            [*base, *(_categorical(f"{name}_{c}") for c in code), *begins]
        )
    return json.dumps(found, indent=1, ensure_ascii=False) + "\n"


def _categorical(name: str) -> dict[str, Any]:
    return {"name": name, "active": True, "dtype": "str", "type": "categorical"}


def _numeric(names: Iterable[str]) -> list[dict[str, Any]]:
    return [{"name": n, "active": True, "dtype": "float", "type": "numeric"} for n in names]


def _dataset(columns: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "data_root": "./",
        "data_format": "parquet",
        "train_data": "./train.parquet",
        "valid_data": "./validation.parquet",
        "test_data": "./test.parquet",
        "min_categr_count": 2,
        "group_id": "page",
        "feature_cols": columns,
        "label_col": {"name": "clicked", "dtype": "float"},
    }
