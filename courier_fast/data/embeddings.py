"""Tables of embeddings that belong to a dataset: of an encoder, or of somebody else's model."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..files import read_json
from ..locations import local_path
from .dataset import Dataset
from .embedding_store import EmbeddingStore
from .read.ids import MISSING, array, no_match, one

NO_EMBEDDING = -128  # every number of a row of int8 that stands for none

Array = npt.NDArray
log = logging.getLogger(__name__)


def check_embeddings(embeddings: Array, dataset: Dataset) -> None:
    """ValueError unless `embeddings` has a row for every item, at least one of them finite."""
    if embeddings.ndim != 2 or len(embeddings) != dataset.num_items or not embeddings.shape[1]:
        raise ValueError(
            f"embeddings: expected [{dataset.num_items}, D] (a row per item of the dataset), got "
            f"{list(embeddings.shape)}"
        )
    if not np.isfinite(embeddings).all(1).any():
        raise ValueError("embeddings: expected at least one finite row, got none")


def read_embeddings(
    path: str | os.PathLike[str], dataset: Dataset, *, strict: bool = False
) -> Array:
    """Embeddings [items, D] float32 in the dataset's order, from .npy (rows in that order, or of
    the ids in the JSON beside it), .parquet (item_id, embedding), a folder that
    `courier-fast embed` wrote, or a dataset that has embeddings of its own.

    Items without a row where there are ids are NaN, other items are left out; `strict` takes
    neither. ValueError where the shape is another or an id comes twice.
    """
    path = local_path(path)
    if path.is_dir():
        table = _in_order(*_read_folder(path)[:2], dataset, path, strict)
    elif not path.is_file():
        raise FileNotFoundError(
            "embeddings: expected a .npy or .parquet file or a folder of "
            f"`courier-fast embed`, got {path}"
        )
    elif path.suffix == ".npy":
        table, ids = read_npy(path), _ids_beside(path)
        if ids is not None:
            check_rows(ids, table, path)
            table = _in_order(ids, table, dataset, path, strict)
    elif path.suffix == ".parquet":
        table = _in_order(*read_parquet(path), dataset, path, strict)
    else:
        raise ValueError(f"embeddings: expected a .npy or .parquet file, got {path}")
    check_embeddings(table, dataset)
    return table


def read_vectors(path: str | os.PathLike[str]) -> tuple[pa.Array, Array, str | None]:
    """Item ids, each once, embeddings [n, D] float32, and the space of the encoder (None where
    nobody wrote it down), of what `courier-fast embed` wrote: a folder, .parquet, or .npy with its
    ids in the JSON beside it; or of a dataset that has embeddings."""
    path = local_path(path)
    if path.is_dir():
        return _read_folder(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"embeddings: expected a folder or file of `courier-fast embed`, got {path}"
        )
    space = _beside(path).get("space")
    if path.suffix == ".parquet":
        return *read_parquet(path), space
    ids, table = needed_ids(path), read_npy(path)
    check_rows(ids, table, path)
    return ids, table, space


def _read_folder(path: Path) -> tuple[pa.Array, Array, str | None]:
    """As `read_vectors`, of a folder."""
    if _is_dataset(path):
        dataset = Dataset(path)
        return dataset.item_ids, dataset.read_embeddings(), None
    store = EmbeddingStore.open(path)
    return *store.read(), store.space


def _is_dataset(path: Path) -> bool:
    return (path / "dataset.json").is_file()


def read_npy(path: Path) -> Array:
    """The numbers of a .npy file as float32. ValueError, which names it, where it is cut off,
    something else, or holds no real numbers."""
    with npy_errors(path), path.open("rb") as file:
        table = np.lib.format.read_array(file, allow_pickle=False)
    check_numbers(table, path)
    return _as_floats(table, path)


@contextmanager
def npy_errors(path: Path) -> Iterator[None]:
    """What NumPy says of a file that it cannot read becomes a ValueError with its name."""
    try:
        yield
    except (ValueError, EOFError) as error:
        said = str(error).split("\n")[0]
        raise ValueError(
            f"embeddings: {path} was cut off or is no .npy file of numbers: {said}"
        ) from None


def check_numbers(table: Array, path: Path) -> None:
    if table.dtype.kind not in "fiu":
        raise ValueError(f"embeddings: expected numbers in {path}, got {table.dtype}")


def _as_floats(table: Array, path: Path) -> Array:
    """float32; of int8 by the scale in the JSON beside it (1 without), with NaN for rows of -128
    alone."""
    with np.errstate(over="ignore"):  # infinity then, as a row without an embedding
        found = table.astype(np.float32, copy=False)
    if table.dtype == np.int8:
        found *= np.float32(scale_beside(path))
        if table.ndim == 2 and table.shape[1]:
            found[(table == NO_EMBEDDING).all(1)] = np.nan
    return found


def scale_beside(path: Path) -> float:
    """What numbers of int8 are multiplied by, where the JSON beside them says it; else 1."""
    scale: Any = _beside(path).get("scale", 1.0)
    if not isinstance(scale, int | float) or not 0 < scale < np.inf:
        raise ValueError(
            f"embeddings: expected a positive number as scale in {path}.json, got {scale!r}"
        )
    return float(scale)


def _ids_beside(path: Path, *, once: bool = True) -> pa.Array | None:
    """The ids of the rows of a .npy file, where the JSON beside it has them; ValueError where one
    comes again that should be there `once`."""
    ids = _beside(path).get("item_ids")
    if ids is None:
        return None
    if not isinstance(ids, list):
        raise ValueError(
            f"embeddings: expected a list as item_ids in {path}.json, got {type(ids).__name__}"
        )
    found = pa.array([one(str(i)) for i in ids], pa.string())
    if once:
        _check_once(found, Path(f"{path}.json"))
    return found


def needed_ids(path: Path, *, once: bool = True) -> pa.Array:
    """The same; ValueError where there are none."""
    ids = _ids_beside(path, once=once)
    if ids is None:
        raise ValueError(
            f"embeddings: expected item_ids in {path}.json, got none; .parquet has them within"
        )
    return ids


def check_rows(ids: pa.Array, table: Array, path: Path) -> None:
    if table.ndim != 2 or len(table) != len(ids):
        raise ValueError(
            f"embeddings: expected [{len(ids)}, D] in {path}, a row for each of the item_ids in "
            f"{path.name}.json, got {list(table.shape)}"
        )


def _check_once(ids: pa.Array, path: Path) -> None:
    if len(ids.unique()) != len(ids):
        twice = next(v["values"] for v in pc.value_counts(ids).to_pylist() if v["counts"] > 1)
        raise ValueError(f"embeddings: expected each item_id once, got {twice} twice in {path}")


def _beside(path: Path) -> dict[str, Any]:
    """What the JSON file beside embeddings says; empty where there is none."""
    beside = Path(f"{path}.json")
    return read_json(beside) if beside.is_file() else {}


def trained_until(path: str | os.PathLike[str]) -> float | None:
    """Time of the newest page that the encoder was trained on, in seconds since 1970; None where
    nobody wrote it down beside the file."""
    path = local_path(path)
    if path.is_dir():
        return None if _is_dataset(path) else EmbeddingStore.open(path).trained_until
    value: float | None = _beside(path).get("trained_until")
    return value


def without_embedding(table: Array, dataset: Dataset) -> tuple[int, str]:
    """How many items have no finite row, and the first one's id ("" where there is none)."""
    missing = ~np.isfinite(table).all(1)
    first = str(dataset.item_ids[int(missing.argmax())]) if missing.any() else ""
    return int(missing.sum()), first


def read_parquet(path: Path) -> tuple[pa.Array, Array]:
    """Item ids, each once, and rows [n, D] of a Parquet file with the columns item_id and
    embedding. ValueError where it is none."""
    with parquet_errors(path):
        schema = pq.read_schema(path)
        for name in ("item_id", "embedding"):
            if name not in schema.names:
                raise ValueError(
                    f"embeddings: expected the columns item_id and embedding in {path}, got "
                    f"{', '.join(schema.names)}"
                )
        check_lists(path, schema.field("embedding").type, "embedding")
        read = pq.read_table(path, columns=["item_id", "embedding"])
    ids, rows = array(read["item_id"], f"embeddings: {path}: item_id"), read["embedding"]
    there = pc.invert(pc.is_in(pc.fill_null(ids, ""), pa.array(MISSING)))
    if not pc.all(there, min_count=0).as_py():
        log.warning(
            "%s: %d rows without an item_id are left out", path, pc.sum(pc.invert(there)).as_py()
        )
    there = pc.and_(there, pc.is_valid(rows.combine_chunks()))
    ids, rows = ids.filter(there), rows.filter(there)
    widths = pc.unique(pc.list_value_length(rows)).to_pylist()
    if len(widths) != 1 or not widths[0]:
        got = f"rows of {', '.join(map(str, sorted(widths)))} numbers" if widths else "none"
        raise ValueError(f"embeddings: expected rows of one length, got {got} in {path}")
    _check_once(ids, path)
    table = pc.list_flatten(rows).to_numpy().reshape(-1, widths[0])
    return ids, _as_floats(table, path)


@contextmanager
def parquet_errors(path: Path) -> Iterator[None]:
    """What pyarrow says of a damaged file becomes a ValueError with its name."""
    try:
        yield
    except (pa.ArrowException, OSError) as error:  # damaged pages are an OSError of pyarrow's
        if isinstance(error, OSError) and error.errno:
            raise
        said = str(error).split("\n")[0]
        raise ValueError(f"embeddings: {path} cannot be read as Parquet: {said}") from None


def check_lists(path: Path, kind: pa.DataType, column: str) -> None:
    """ValueError unless a column of this type holds lists of numbers."""
    lists = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    numbers = (pa.types.is_floating, pa.types.is_integer)
    if not (any(of(kind) for of in lists) and any(of(kind.value_type) for of in numbers)):
        raise ValueError(
            f"embeddings: expected lists of numbers in the column {column} of {path}, got {kind}"
        )


def _in_order(ids: pa.Array, rows: Array, dataset: Dataset, path: Path, strict: bool) -> Array:
    where = pc.fill_null(pc.index_in(ids, dataset.item_ids), -1).to_numpy()
    if len(ids) and (where < 0).all():
        found = no_match(ids.slice(0, 3).to_pylist(), dataset.item_ids.slice(0, 3).to_pylist())
        raise ValueError(
            f"embeddings: expected item_id of items of {dataset.path}, "
            f"got none that fits in {path}: {found}"
        )
    if strict and (where < 0).any():
        raise ValueError(
            f"embeddings: expected items of {dataset.path} alone, got {(where < 0).sum()} others "
            f"in {path} (first: {ids[int((where < 0).argmax())]})"
        )
    table = np.full((dataset.num_items, rows.shape[1]), np.nan, np.float32)
    table[where[where >= 0]] = rows[where >= 0]
    return table
