"""k-means clusters of embeddings as features of a CTR model, with the centroids, so that a number
means the same tomorrow.

- clusters.parquet: item_id (string), cluster_256, cluster_4096, ... (int32; -1 without an
  embedding)
- centroids_256.npy, ...: [k, D] float32, rows of length 1
- clusters.json: format, space, clusters, until, items, sha256 of the centroids

Numbers of two spaces, or of two fits, mean nothing to each other: later items get those of the
stored centroids.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from .. import output
from ..ctr.features import CLUSTERS, centroids_of, nearest_centroid
from ..files import check_listed, checksums, read_json

Array = npt.NDArray

FORMAT = 1


def fit_clusters(
    ids: pa.Array,
    vectors: Array,
    out: Path,
    *,
    known: Array | None = None,
    clusters: Sequence[int] = CLUSTERS,
    space: str | None = None,
    until: str | None = None,
    seed: int = 0,
) -> None:
    """Clusters the vectors [n, D] of the `known` [n] items (None: all) and writes the folder, with
    the nearest cluster of every item.

    ValueError for a number of clusters below 1, or no finite row of a known item.
    """
    if not clusters or min(clusters) < 1:
        raise ValueError(f"clusters: expected numbers of at least 1, got {list(clusters)}")
    _write_clusters(
        ids,
        vectors,
        {k: centroids_of(vectors, known, k, seed) for k in clusters},
        space,
        until,
        out,
    )


def assign_clusters(
    ids: pa.Array, vectors: Array, like: Path, out: Path, *, space: str | None = None
) -> None:
    """The clusters of an earlier folder for other items: the same centroids.

    ValueError for vectors of another space than that folder's, or centroids that were altered.
    """
    about = read_like(like, "clusters", space)
    files = {k: f"centroids_{k}.npy" for k in about["clusters"]}
    listed = {name: about["files"][name] for name in files.values()}
    check_listed(like, listed, "clusters.json", "fit them again")
    centroids = {k: np.load(like / name, allow_pickle=False) for k, name in files.items()}
    _write_clusters(ids, vectors, centroids, space, about["until"], out)


def read_like(like: Path, kind: str, space: str | None) -> dict[str, Any]:
    """What an earlier folder of `index clusters` or `index codes` says of itself, which is the
    `kind`; ValueError if it is of another format or space."""
    file = like / f"{kind}.json"
    if not file.is_file():
        raise FileNotFoundError(
            f"like: expected a folder that `courier-fast index {kind}` wrote (with {file.name}), "
            f"got {like}"
        )
    about = read_json(file, "fit them again")
    if about.get("format") != FORMAT:
        raise ValueError(f"like: expected format {FORMAT}, got {about.get('format')} in {file}")
    if about["space"] != space:
        raise ValueError(
            f"like: expected embeddings of the space {str(about['space'])[:19]} of {like}, "
            f"got {str(space)[:19]}"
        )
    return about


def _write_clusters(
    ids: pa.Array,
    vectors: Array,
    centroids: dict[int, Array],
    space: str | None,
    until: str | None,
    out: Path,
) -> None:
    columns = {f"cluster_{k}": nearest_centroid(vectors, means) for k, means in centroids.items()}

    def write(folder: Path) -> None:
        for k, means in centroids.items():
            np.save(folder / f"centroids_{k}.npy", means)
        files = checksums(folder)
        pq.write_table(pa.table({"item_id": ids, **columns}), folder / "clusters.parquet")
        about = {
            "format": FORMAT,
            "space": space,
            "clusters": list(centroids),
            "until": until,
            "items": len(ids),
            "files": files,
        }
        (folder / "clusters.json").write_text(json.dumps(about, indent=1), "utf-8")

    output.write_folder(out, output.CLUSTERS, write)
