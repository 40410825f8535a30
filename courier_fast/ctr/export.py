"""The impressions and every form of the embeddings as Parquet, with a data dictionary, for a model
of one's own."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.dataset import Dataset
from ..files import read_json, write_atomically
from ..markdown import markdown_table
from .features import (
    CLUSTERS,
    FORMS,
    SIMILARITY,
    cluster_features,
    code_features,
    code_prefixes,
    same_cluster,
    similarity_features,
    vector_features,
)
from .fuxictr import SEPARATOR, dataset_config
from .impressions import Impressions, Protocol, category_codes, histories_said
from .inputs import RANGES, base_numbers

log = logging.getLogger(__name__)

EXPORTED_FORMS = FORMS[1:-1]  # of columns; "all" is these together

Array = npt.NDArray

IMPRESSIONS = {
    "user_id": "text; who saw the page",
    "item_id": "text; the item that was shown",
    "category": "text, null where unknown; of the item",
    "page": "int64; number of the page view: its items are rows in a row",
    "time": "int64; seconds since 1970, UTC",
    "clicked": "bool; the label",
    "history": "list of text; item ids of the user's newest events strictly before the page, "
    "oldest first",
    "hour": "int8; of the day, UTC",
    "weekday": "int8; 0 is Monday",
    "popularity": "float32; log(1 + clicks on the item strictly before the page)",
    "popularity_30_days": "float32; the same, of the 30 days before",
    "same_item": "float32; log(1 + times the item is in the history)",
    "same_category": "float32; log(1 + history items of its category, if known)",
}
WEIGHT = {
    "weight": "float32; how many impressions the row stands for, as some pages were cut: of the "
    "loss, and of metrics"
}
OF_EMBEDDING = {
    "{}_similarity_*": "float32; the item against the history: " + ", ".join(SIMILARITY),
    "{}_cluster_*": "int32; the item's k-means cluster by number of clusters, -1 without an "
    "embedding",
    "{}_same_cluster_*": "float32; log(1 + history items in the item's cluster), by number of "
    "clusters",
    "{}_code_*": "int32; the item's semantic id, level by level, -1 without an embedding",
    "{}_prefix_*": "int32; a number of its first 2, 3, ... levels, -1 also where no item before "
    "the bound begins so",
    "{}_same_prefix_*": "float32; log(1 + history items whose id begins so)",
}
ITEMS = {
    "item_id": "text",
    "category": "text, null where unknown",
    "{}_vector": "list of float32; centred and scaled to mean square 1, 0 without an embedding",
    "{}_cluster_*": "int32; k-means cluster by number of clusters, -1 without an embedding",
    "{}_code_*": "int32; semantic id, level by level, -1 without an embedding",
    "{}_prefix_*": "int32; a number of its first levels",
}


EXPORTED = (*(f"{name}.parquet" for name in (*RANGES, "items")), "dataset_config.yaml", "README.md")


def is_export(folder: Path) -> bool:
    """Whether `export` has written the folder, or begun to: its description, YAML that is JSON,
    comes first."""
    try:
        return "none" in read_json(folder / "dataset_config.yaml")
    except (OSError, ValueError):
        return False


def export_impressions(
    dataset: Dataset,
    protocol: Protocol,
    embeddings: Mapping[str, Array],
    folder: Path,
    *,
    history: int = 20,
    rows: int = 1 << 20,
    off: Mapping[str, Mapping[str, Array]] | None = None,
) -> None:
    """Writes train, validation and test.parquet (a row per impression), items.parquet, for FuxiCTR
    dataset_config.yaml and each embedding's vectors, and README.md into the folder.

    Numbers are those that the package's own models get, but for their standardisation. Clusters and
    scales come from the encoder's pages.

    Args:
        rows: impressions written at once, about; bounds the memory.
        off: {embedding: {form: [items] bool}}, items for which that form's columns say nothing, as
            a policy has it (harm.py): numbers and vectors are zeros, clusters and codes -1. Forms
            that it lacks stay as they are, which a warning and README.md say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = [n for n in IMPRESSIONS if n.startswith(("popularity", "same_"))]
    config = dataset_config(numbers, ((n, x.shape[1]) for n, x in embeddings.items()), history)
    write_atomically(folder / "dataset_config.yaml", lambda path: path.write_text(config))
    known = protocol.known_items(dataset)
    codes = {name: _Codes(x, known, (off or {}).get(name, {})) for name, x in embeddings.items()}
    for name in RANGES:
        made = partial(
            _write_export,
            dataset=dataset,
            pages=getattr(protocol, name),
            embeddings=embeddings,
            codes=codes,
            history=history,
            rows=rows,
        )
        write_atomically(folder / f"{name}.parquet", made)
    table = pa.table(_columns_of_items(dataset, embeddings, codes, known))
    write_atomically(folder / "items.parquet", lambda path: pq.write_table(table, path))
    ids = np.array(dataset.item_ids.to_pylist())
    for name in embeddings:
        vectors = np.stack(table[f"{name}_vector"].to_numpy())
        made = partial(_save_vectors, key=ids, value=vectors)
        write_atomically(folder / f"{name}_vectors.npz", made)
    if pc.any(pc.match_substring(dataset.item_ids, SEPARATOR)).as_py():
        log.warning("item ids with %r: FuxiCTR would cut the histories' ids there", SEPARATOR)
    text = _dictionary(dataset, protocol, embeddings, history)
    if off is not None:
        _warn_of_undecided(embeddings, off)
        text += "\n" + _policy_section(dataset, embeddings, off)
    write_atomically(folder / "README.md", lambda path: path.write_text(text))


def _save_vectors(path: Path, key: Array, value: Array) -> None:
    with path.open("wb") as file:  # NumPy would append a suffix to a name
        np.savez(file, key=key, value=value)


def _write_export(
    path: Path,
    dataset: Dataset,
    pages: range,
    embeddings: Mapping[str, Array],
    codes: Mapping[str, _Codes],
    history: int,
    rows: int,
) -> None:
    d = dataset
    shown = int(d.pv_end[pages.stop - 1] - d.pv_start[pages.start])
    step = max(1, rows * len(pages) // max(1, shown))
    writer: pq.ParquetWriter | None = None
    try:
        for first in range(pages.start, pages.stop, step):
            some = range(first, min(first + step, pages.stop))
            columns = _columns(Impressions(d, some, history=history))
            for name, x in embeddings.items():
                columns |= _embedding_columns(name, x, codes[name], d, some, history)
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(path, table.schema)
            writer.write_table(table)
    finally:
        if writer is not None:
            writer.close()


def _columns(x: Impressions) -> dict[str, pa.Array]:
    d = x.dataset
    rows = x.page - x.pages.start
    size = x.history_length
    offsets = np.append(0, np.cumsum(size))
    group = np.repeat(np.arange(len(x)), size)
    events = np.arange(offsets[-1]) - offsets[group] + x.history_start[rows][group]
    numbers = base_numbers(x)
    columns = [
        d.user_ids.take(pa.array(x.user)),
        d.item_ids.take(pa.array(x.item)),
        d.categories.take(pa.array(x.item)),
        pa.array(x.page.astype(np.int64)),
        pa.array(x.time),
        pa.array(x.clicked),
        pa.ListArray.from_arrays(
            pa.array(offsets.astype(np.int32)), d.item_ids.take(pa.array(d.event_item[events]))
        ),
        pa.array(x.hour.astype(np.int8)),
        pa.array(x.weekday.astype(np.int8)),
        *(pa.array(np.ascontiguousarray(column)) for column in numbers.T),
    ]
    found = dict(zip(IMPRESSIONS, columns, strict=True))
    return found if x.weight is None else found | {"weight": pa.array(x.weight)}


class _Codes:
    """An embedding's clusters and codes by the names of their columns, [items] each: of the item,
    and those that are counted in the history; `off` of what `export_impressions` has."""

    def __init__(self, table: Array, known: Array, off: Mapping[str, Array]) -> None:
        self.off = {form: off.get(form, np.zeros(len(table), bool)) for form in EXPORTED_FORMS}
        clusters = dict(zip(CLUSTERS, cluster_features(table, known).T, strict=True))
        codes = code_features(table, known)
        levels = range(1, codes.shape[1] + 1)
        seen, every = code_prefixes(codes, known).T, code_prefixes(codes).T
        self.item = {f"cluster_{k}": x for k, x in clusters.items()}
        self.item |= {f"code_{i}": codes[:, i - 1] for i in levels}
        self.item |= {f"prefix_{i}": seen[i - 1] for i in levels[1:]}  # the first is code_1
        self.item = {n: np.where(self.off_of(n), np.int32(-1), x) for n, x in self.item.items()}
        self.counted = {f"same_cluster_{k}": x for k, x in clusters.items()}
        self.counted |= {f"same_prefix_{i}": every[i - 1] for i in levels}

    def off_of(self, column: str) -> Array:
        """[items] bool, by the form that a column is of."""
        return self.off["cluster" if "cluster" in column else "code"]


def _embedding_columns(
    name: str, table: Array, codes: _Codes, dataset: Dataset, pages: range, history: int
) -> dict[str, pa.Array]:
    x = Impressions(dataset, pages, history=history)
    similar = similarity_features(table, x)
    same = same_cluster(np.stack(list(codes.counted.values()), 1), x)
    similar[codes.off["similarity"][x.item]] = 0
    for i, n in enumerate(codes.counted):
        same[codes.off_of(n)[x.item], i] = 0
    columns = {f"{name}_similarity_{c}": similar[:, i] for i, c in enumerate(SIMILARITY)}
    columns |= {f"{name}_{n}": numbers[x.item] for n, numbers in codes.item.items()}
    columns |= {f"{name}_{n}": same[:, i] for i, n in enumerate(codes.counted)}
    return {n: pa.array(np.ascontiguousarray(c)) for n, c in columns.items()}


def _columns_of_items(
    dataset: Dataset, embeddings: Mapping[str, Array], codes: Mapping[str, _Codes], known: Array
) -> dict[str, pa.Array]:
    columns = {
        "item_id": dataset.item_ids,
        "category": dataset.categories,
    }
    for name, x in embeddings.items():
        vectors = vector_features(x, known)
        vectors[codes[name].off["vector"]] = 0
        columns[f"{name}_vector"] = pa.FixedSizeListArray.from_arrays(
            pa.array(vectors.ravel()), vectors.shape[1]
        )
        columns |= {
            f"{name}_{n}": pa.array(np.ascontiguousarray(numbers))
            for n, numbers in codes[name].item.items()
        }
    return columns


def _dictionary(
    dataset: Dataset, protocol: Protocol, embeddings: Mapping[str, Array], history: int
) -> str:
    def rows(columns: Mapping[str, str]) -> str:
        plain = [(n, text) for n, text in columns.items() if "{}" not in n]
        named = [
            (n.format(e), text) for e in embeddings for n, text in columns.items() if "{}" in n
        ]
        return "\n".join(f"| {n} | {text} |" for n, text in [*plain, *named])

    pages = dataset.info.get("pages", "given or made")
    drawn = "drawn, so the rate of clicks and calibration mean nothing"
    said = histories_said(dataset)
    about = (
        f"{protocol.describe(dataset)}. Histories hold at most {history} items. Clusters, "
        "codes, centres and scales of the embeddings come from\nitems seen before that bound. "
        f"Pages are {pages}: what was shown is {'known' if pages == 'given' else drawn}.\n"
        f"{'' if said is None else said + chr(10)}"
        "Train on train.parquet, stop and choose by validation.parquet, look at test.parquet once. "
        "dataset_config.yaml describes all this to\nFuxiCTR (2.3), with the vectors in "
        "*_vectors.npz: a dataset for each form and embedding."
    )
    return f"""# Impressions of {dataset.name}

{about}

## train.parquet, validation.parquet, test.parquet: a row per impression

| column | |
| --- | --- |
{rows(IMPRESSIONS | ({} if dataset.pv_weight is None else WEIGHT) | OF_EMBEDDING)}

## items.parquet: a row per item

| column | |
| --- | --- |
{rows(ITEMS)}
"""


def _warn_of_undecided(names: Iterable[str], off: Mapping[str, Mapping[str, Array]]) -> None:
    """Whoever trains on these columns takes them for what the policy's tables have judged."""
    lacking = [f"{f} of {n}" for n in names for f in EXPORTED_FORMS if f not in off.get(n, {})]
    if lacking:
        log.warning(
            "policy: it has nothing for %s: exported without zeros (a row of the form all is of a "
            "model of its own, and counts for none of them)",
            ", ".join(lacking),
        )


def _policy_section(
    dataset: Dataset, names: Iterable[str], off: Mapping[str, Mapping[str, Array]]
) -> str:
    codes, categories = category_codes(dataset)
    lines = []
    for name, form in itertools.product(names, EXPORTED_FORMS):
        mask = off.get(name, {}).get(form)
        said = "nothing was decided: as without a policy"
        if mask is not None:
            said = ", ".join(categories[c] for c in np.unique(codes[mask])) or "no category"
        lines.append([name, form, said])
    return f"""## Policy

Items of the categories that a policy has turned off: their vectors and numbers of similarity are 0,
their clusters and codes -1, and how often these are in the history 0. As items of the history they
still count in the numbers of items of other categories.

{markdown_table(["embedding", "columns of", "categories that are off"], lines)}
"""
