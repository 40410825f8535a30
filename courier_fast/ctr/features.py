"""Four forms in which a click-through-rate model can take a frozen embedding; pure functions, for
this package's models or any other.

- vector, `vector_features`: a row per item, for one linear layer beside the ids
- similarity, `similarity_features`: numbers per impression, the candidate against the history
- cluster, `cluster_features` and `same_cluster`: cluster numbers per item, for embeddings of their
  own; their agreement with the history per impression
- code, `code_features`, `code_prefixes` and `same_cluster` of these: a semantic id, several numbers
  per item from coarse to fine

A row of the table that is not finite is an item without an embedding: vector 0, cluster and codes
-1, left out of histories; as a candidate, all its similarities are 0, and so is the column "count".
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..nearest import normalised

if TYPE_CHECKING:
    from .impressions import Impressions

Array = npt.NDArray

FORMS = ("none", "vector", "similarity", "cluster", "code", "all")
BINS = 20
SIMILARITY = (
    "max",
    "mean",
    "mean_top3",
    "mean_recent",
    "reconstruction",
    "count",
    *(f"histogram_{i:02}" for i in range(BINS)),
)
CLUSTERS = (256, 4096)
LEVELS, CODES = 3, 256  # of semantic ids
DECAY = 0.8  # of a history item's weight in "mean_recent" against the next newer one's


def check_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"form: expected one of {', '.join(FORMS)}, got {form!r}")


def vector_features(embeddings: Array, known: Array | None = None) -> Array:
    """[items, D] float32: the embeddings minus their mean, divided by one number, so that an
    entry's mean square is 1.

    Directions and relative lengths stay; a linear layer of the usual initialisation gets inputs of
    the usual size.

    Args:
        embeddings: [items, D].
        known: [items] bool, the items that mean and scale come from; None: all.
    """
    have, rows = _with_embedding(embeddings, known)
    centred = np.where(have[:, None], embeddings - rows.mean(0), 0)
    scale = np.sqrt(np.square(rows - rows.mean(0)).mean())
    return (centred / (scale if scale > 0 else 1)).astype(np.float32)


def similarity_features(
    embeddings: Array, impressions: Impressions, *, block: int = 1 << 23
) -> Array:
    """[n, 26] float32, in the columns `SIMILARITY`, from the cosines c_k of an impression's item E
    to its H history items C_k.

        max, mean, mean_top3:  of c_k (of fewer than three: their mean)
        mean_recent:           weighted by 0.8^(history items that are newer)
        reconstruction:        cos(R, E),  R = sum_k softmax_k(c_k) C_k / |C_k|: the training loss's
                               default
        count:                 log(1 + H)
        histogram_00 to _19:   log(1 + number of c_k in each of 20 equal bins over [-1, 1])

    Args:
        embeddings: [items, D].
        block: numbers of the table at once, which bounds the memory.
    """
    have, _ = _with_embedding(embeddings, None)
    table = torch.from_numpy(np.where(have[:, None], embeddings, 0).astype(np.float32))
    table = torch.nn.functional.normalize(table, dim=1)
    out = np.zeros((len(impressions), len(SIMILARITY)), np.float32)
    for rows, shown, past, items, history in _blocks(impressions, block // table.shape[1]):
        known = past & have[history]
        e, c = table[torch.from_numpy(items)], table[torch.from_numpy(history)]
        found = _similarity_columns(e @ c.mT, c @ c.mT, torch.from_numpy(known))
        out[rows] = np.where(have[items][..., None], found.numpy(), 0)[shown]
    return out


def random_vectors(items: int, dim: int, seed: int = 0) -> Array:
    """The control: [items, dim] float32 of random directions, which know nothing of the items."""
    rows = np.random.default_rng([seed, 7]).normal(size=(items, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def _with_embedding(embeddings: Array, known: Array | None) -> tuple[Array, Array]:
    """[items] bool: has an embedding; and the rows of those in `known`, in float64."""
    if embeddings.ndim != 2 or not embeddings.size:
        raise ValueError(f"embeddings: expected [items, D], got {list(embeddings.shape)}")
    have = np.isfinite(embeddings).all(1)
    if known is not None and known.shape != have.shape:
        raise ValueError(
            f"known: expected [{len(have)}] (a flag per item), got {list(known.shape)}"
        )
    rows = embeddings[have if known is None else have & known]
    if not len(rows):
        raise ValueError("embeddings: expected at least one finite row of a known item, got none")
    return have, rows.astype(np.float64)


def _blocks(
    impressions: Impressions, rows: int
) -> Iterator[tuple[slice, Array, Array, Array, Array]]:
    """Blocks of pages as padded matrices: the block's impressions, which entries are items [b, P]
    and history [b, H], and those items."""
    d, x = impressions.dataset, impressions
    sizes = np.diff(x.offsets)
    step = max(1, rows // max(1, int(sizes.max()) + x.history))
    for first in range(0, len(sizes), step):
        some = slice(first, min(first + step, len(sizes)))
        shown, at = _matrix_of(x.offsets[some], x.offsets[some.start + 1 : some.stop + 1])
        past, before = _matrix_of(x.history_start[some], x.history_end[some])
        items = x.item[np.where(shown, at, x.offsets[first])].astype(np.int64)
        history = np.where(past, d.event_item[np.where(past, before, 0)], 0).astype(np.int64)
        yield slice(x.offsets[first], x.offsets[some.stop]), shown, past, items, history


def _matrix_of(start: Array, end: Array) -> tuple[Array, Array]:
    """Which entries of a matrix whose rows are the ranges [start, end) are real, and the entries;
    at least one column."""
    step = np.arange(max(1, int((end - start).max())))
    return step < (end - start)[:, None], start[:, None] + step


def _similarity_columns(cosine: Tensor, gram: Tensor, known: Tensor) -> Tensor:
    """[b, P, 26] of cosines [b, P, H], the history's own [b, H, H], and which is known [b, H]."""
    mask = known[:, None].expand_as(cosine)
    count = known.sum(1)[:, None, None].float()
    least = count.clamp_min(1)
    cosine = cosine.masked_fill(~mask, 0)
    ranked = cosine.masked_fill(~mask, -torch.inf).topk(min(3, cosine.shape[2]), dim=2).values
    top = ranked.masked_fill(ranked == -torch.inf, 0)
    newer = known.flip(1).cumsum(1).flip(1) - known.long()  # the newest history item is the last
    recent = torch.where(known, DECAY**newer, 0.0)[:, None]
    # |R|^2 by the history's own cosines: R itself, [b, P, D], is not needed.
    weight = cosine.exp() * mask
    length = ((weight @ gram) * weight).sum(2).clamp_min(1e-12).sqrt()
    bins = ((cosine + 1) * (BINS / 2)).long().clamp(0, BINS - 1)
    histogram = torch.zeros(*cosine.shape[:2], BINS).scatter_add_(2, bins, mask.float())
    columns = [
        top[..., :1],
        cosine.sum(2, keepdim=True) / least,
        top.sum(2, keepdim=True) / least.clamp_max(3),
        (cosine * recent).sum(2, keepdim=True) / recent.sum(2, keepdim=True).clamp_min(1e-12),
        ((weight * cosine).sum(2) / length)[..., None],
        count.log1p().expand(*cosine.shape[:2], 1),
        histogram.log1p(),
    ]
    return torch.cat(columns, 2)


def cluster_features(
    embeddings: Array,
    known: Array | None = None,
    *,
    clusters: Sequence[int] = CLUSTERS,
    seed: int = 0,
) -> Array:
    """[items, len(clusters)] int32: the item's k-means cluster by cosine for each number of
    clusters, -1 without an embedding.

    Args:
        embeddings: [items, D].
        known: [items] bool, the items whose embeddings are clustered; the others get the nearest
            centroid. None: all.
        clusters: numbers of clusters, each at most the number of known items (else that many).
        seed: of the centroids; same seed, same clusters.
    """
    if not clusters or min(clusters) < 1:
        raise ValueError(f"clusters: expected numbers of at least 1, got {list(clusters)}")
    return np.stack(
        [nearest_centroid(embeddings, centroids_of(embeddings, known, k, seed)) for k in clusters],
        1,
    )


def centroids_of(embeddings: Array, known: Array | None, clusters: int, seed: int = 0) -> Array:
    """[clusters, D] float32: k-means centroids by cosine of the rows of `known` (None: all); fewer
    where there are fewer rows."""
    return _k_means(normalised(_with_embedding(embeddings, known)[1]), clusters, seed, True)


def _k_means(rows: Array, clusters: int, seed: int, spherical: bool) -> Array:
    import faiss

    means = faiss.Kmeans(
        rows.shape[1],
        min(clusters, len(rows)),
        niter=20,
        spherical=spherical,
        seed=seed,
        min_points_per_centroid=1,
    )
    means.train(rows)
    return np.asarray(means.centroids)


def nearest_centroid(embeddings: Array, centroids: Array) -> Array:
    """[items] int32: the number of the nearest of the centroids [k, D] by cosine, -1 without an
    embedding."""
    import faiss

    have, _ = _with_embedding(embeddings, None)
    index = faiss.IndexFlatIP(centroids.shape[1])
    index.add(centroids)
    found = np.full(len(have), -1, np.int32)
    found[have] = index.search(normalised(embeddings[have].astype(np.float64)), 1)[1][:, 0]
    return found


def code_features(
    embeddings: Array,
    known: Array | None = None,
    *,
    levels: int = LEVELS,
    codes: int = CODES,
    seed: int = 0,
) -> Array:
    """[items, levels] int32: the item's semantic id by residual quantisation, from coarse to fine,
    -1 without an embedding.

    Args:
        embeddings: [items, D].
        known: [items] bool, the items that the codebooks are made of; None: all.
        levels, codes: numbers of an id, and how many different ones each can be (at most the number
            of known items).
        seed: of the codebooks; same seed, same codes.
    """
    return nearest_codes(embeddings, codebooks_of(embeddings, known, levels, codes, seed))


def codebooks_of(
    embeddings: Array, known: Array | None, levels: int, codes: int, seed: int = 0
) -> Array:
    """[levels, codes, D] float32: of each level the k-means centroids of what the levels before
    left of the unit rows of `known` (None: all); fewer codes where there are fewer rows."""
    for name, number in (("levels", levels), ("codes", codes)):
        if number < 1:
            raise ValueError(f"{name}: expected at least 1, got {number}")
    left = normalised(_with_embedding(embeddings, known)[1])
    books = []
    for level in range(levels):
        books.append(_k_means(left, codes, seed + level, False))
        left = left - books[-1][_nearest_code(left, books[-1])]
    return np.stack(books)


def nearest_codes(embeddings: Array, codebooks: Array) -> Array:
    """[items, levels] int32: of each level [codes, D] the nearest code of what the levels before
    left of x / |x|, -1 without an embedding."""
    have, _ = _with_embedding(embeddings, None)
    found = np.full((len(have), len(codebooks)), -1, np.int32)
    left = normalised(embeddings[have].astype(np.float64))
    for level, book in enumerate(codebooks):
        code = _nearest_code(left, book)
        found[have, level] = code
        left = left - book[code]
    return found


def _nearest_code(rows: Array, book: Array) -> Array:
    import faiss

    index = faiss.IndexFlatL2(book.shape[1])
    index.add(book)
    return index.search(np.ascontiguousarray(rows), 1)[1][:, 0]


def code_prefixes(codes: Array, known: Array | None = None) -> Array:
    """[items, levels] int32: a number for each different beginning of a semantic id, of one level,
    of two and so on, counted from 0 in the order of the codes; -1 without an embedding.

    Args:
        codes: [items, levels], of `code_features`.
        known: [items] bool: beginnings that none of these has are -1; None: all.
    """
    found = np.full(codes.shape, -1, np.int32)
    have = codes[:, 0] >= 0
    counted = have if known is None else have & known
    for level in range(codes.shape[1]):
        there, number = np.unique(codes[have, : level + 1], axis=0, return_inverse=True)
        number = number.reshape(-1)  # NumPy 2.0 keeps the axis
        seen = np.zeros(len(there), bool)
        seen[number[counted[have]]] = True
        found[have, level] = np.where(seen, np.cumsum(seen) - 1, -1)[number]
    return found


def same_cluster(clusters: Array, impressions: Impressions) -> Array:
    """[n, columns] float32: log(1 + history items in the item's cluster), for the [items, columns]
    of `cluster_features` or `code_prefixes`."""
    out = np.zeros((len(impressions), clusters.shape[1]), np.float32)
    for rows, shown, past, items, history in _blocks(impressions, 1 << 18):
        for column in range(clusters.shape[1]):
            own, others = clusters[items, column], clusters[history, column]
            same = (own[:, :, None] == others[:, None]) & past[:, None] & (own >= 0)[:, :, None]
            out[rows, column] = np.log1p(same.sum(2))[shown]
    return out
