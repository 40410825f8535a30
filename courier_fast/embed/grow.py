"""`courier-fast embed` into a folder: what is not in it yet, or was made from another image, as one
more part."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from torch import Tensor, nn

from ..data.embedding_store import NAME, EmbeddingStore
from .sources import RowSource
from .write import EmbedReport, embed_source

Array = npt.NDArray


class Subset:
    """Some rows of a source, as a source."""

    def __init__(self, source: RowSource, rows: Array) -> None:
        self.source, self.rows = source, rows
        self.ids: Sequence[Any] = [str(source.ids[i]) for i in rows.tolist()]
        self.present = source.present[rows]

    def load(self, rows: Array) -> tuple[Tensor, Array]:
        return self.source.load(self.rows[rows])

    def digest(self, row: int) -> str:
        return self.source.digest(int(self.rows[row]))

    def fingerprint(self) -> str:
        return f"{self.source.fingerprint()} {hashlib.sha256(self.rows.tobytes()).hexdigest()}"


def embed_new(
    encoder: nn.Module,
    source: RowSource,
    folder: Path,
    *,
    space: str,
    numbers: str | None = None,
    rows: Array | None = None,
    only_new: bool = False,
    remove_missing: bool = False,
    **how: Any,
) -> tuple[EmbeddingStore, EmbedReport | None]:
    """Appends embeddings of the rows whose item is not in the folder, or has another image there;
    None where there are none.

    What is there stays as it is. A run that was killed goes on where it was.

    Args:
        space: identity of the encoder, that of the folder.
        numbers: float32, float16 or int8: as what a folder stores them; None: as it does already,
            float32 in a new one.
        rows: of the source that are looked at; None: all with an image.
        only_new: the folder may be there already.
        remove_missing: items of the folder that the source lacks, or has no image of, are marked as
            gone.
        how: further arguments of `embed_source`.

    Raises:
        ValueError: the folder is there and `only_new` is not given, or is of another space or
            of other numbers.
    """
    begun = folder / "unfinished.npy"
    if (folder / NAME).is_file():
        store = EmbeddingStore.open(folder)
        if not only_new and store.parts:
            raise ValueError(
                f"out: {folder} has {store.rows:,} embeddings already; "
                "--only-new appends what it lacks"
            )
        store.require(space)
        store.require_dtype(numbers)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"out: expected a folder of embeddings or none, got {folder}")
    else:
        until = getattr(encoder, "about", {}).get("trained_until")
        dim: int = encoder.dim  # type: ignore[assignment]
        store = EmbeddingStore(folder, space, dim, until, dtype=numbers or "float32").write()
    rows = np.arange(len(source.ids)) if rows is None else rows
    part = Subset(source, rows[source.present[rows]])
    if remove_missing:
        there = store.ids
        gone = there.filter(pc.invert(pc.is_in(there, pa.array(part.ids, pa.string()))))
        if len(gone):
            store = store.delete(gone.to_pylist())
    digests = [part.digest(row) for row in range(len(part.ids))]
    wanted = ~store.has(part.ids, digests)
    if not wanted.any():
        return store, None
    part = Subset(source, part.rows[wanted])
    report = embed_source(encoder, part, begun, **how)
    table = np.load(begun, mmap_mode="r")
    store = store.append(part.ids, [d for d, w in zip(digests, wanted, strict=True) if w], table)
    del table
    for path in (begun, begun.with_name(f"{begun.name}.json")):
        path.unlink(missing_ok=True)
    return store, report


def rows_since(first_seen: Array, date: str) -> Array:
    """Rows of the items that were first seen at or after a date (ISO 8601, UTC)."""
    from ..data.prepare.options import epoch

    return np.flatnonzero(first_seen >= epoch("since", date))
