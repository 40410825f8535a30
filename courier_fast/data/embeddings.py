"""Tables of embeddings that belong to a dataset: of an encoder, or of somebody else's model."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from .dataset import Dataset

Array = npt.NDArray


def check_embeddings(embeddings: Array, dataset: Dataset) -> None:
    """ValueError unless `embeddings` has a row for every item, at least one of them finite."""
    if embeddings.ndim != 2 or len(embeddings) != dataset.num_items:
        raise ValueError(
            f"embeddings: expected [{dataset.num_items}, D] (a row per item of the dataset), got {list(embeddings.shape)}"
        )
    if not np.isfinite(embeddings).all(1).any():
        raise ValueError("embeddings: expected at least one finite row, got none")


def read_embeddings(
    path: str | os.PathLike[str], dataset: Dataset, *, strict: bool = False
) -> Array:
    """Embeddings [items, D] float32 in the dataset's order, from .npy (rows in that order) or .parquet (item_id, embedding).

    Items without a row in the Parquet file are NaN, its other items are left out; `strict` takes neither. ValueError where the shape is another or
    an id comes twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"embeddings: expected a .npy or .parquet file, got {path}")
    if path.suffix == ".npy":
        table = np.load(path, allow_pickle=False).astype(np.float32, copy=False)
    elif path.suffix == ".parquet":
        table = _read_parquet(path, dataset, strict)
    else:
        raise ValueError(f"embeddings: expected a .npy or .parquet file, got {path}")
    check_embeddings(table, dataset)
    return table


def trained_until(path: str | os.PathLike[str]) -> int | None:
    """Time of the newest page that the encoder was trained on, in seconds since 1970; None where nobody wrote it down beside the file."""
    beside = Path(f"{os.fspath(path)}.json")
    if not beside.is_file():
        return None
    value = json.loads(beside.read_text("utf-8")).get("trained_until")
    return None if value is None else int(value)


def without_embedding(table: Array, dataset: Dataset) -> tuple[int, str]:
    """How many items have no finite row, and the id of the first of them ("" where there is none)."""
    missing = ~np.isfinite(table).all(1)
    first = str(dataset.item_ids[int(missing.argmax())]) if missing.any() else ""
    return int(missing.sum()), first


def _read_parquet(path: Path, dataset: Dataset, strict: bool) -> Array:
    read = pq.read_table(path, columns=["item_id", "embedding"])
    read = read.filter(pc.is_valid(read["embedding"]))
    widths = pc.unique(pc.list_value_length(read["embedding"])).to_pylist()
    if len(widths) != 1:
        raise ValueError(f"embeddings: expected rows of one length, got {widths} in {path}")
    ids = read["item_id"].cast(pa.string()).combine_chunks()
    if len(ids.unique()) != len(ids):
        twice = next(v["values"] for v in pc.value_counts(ids).to_pylist() if v["counts"] > 1)
        raise ValueError(f"embeddings: expected each item_id once, got {twice} twice in {path}")
    values = pc.list_flatten(read["embedding"]).to_numpy()
    where = pc.fill_null(pc.index_in(ids, dataset.item_ids), -1).to_numpy()
    if strict and (where < 0).any():
        raise ValueError(
            f"embeddings: expected items of {dataset.path} alone, got {(where < 0).sum()} others in {path} (first: {ids[int((where < 0).argmax())]})"
        )
    table = np.full((dataset.num_items, widths[0]), np.nan, np.float32)
    table[where[where >= 0]] = values.reshape(len(ids), -1)[where >= 0]
    return table
