"""What the embedding does with items: pictures, attention weights, neighbours, a map of all."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from markupsafe import Markup

from .. import reconstruct
from ..data.dataset import Dataset
from ..data.images.thumbnails import Pictures
from ..evaluate.scores import Reconstruction
from ..nearest import exact_search, normalised
from .text import number, percent

Array = npt.NDArray
COLOURS = 8  # categories that are told apart in a picture


def attention_examples(
    dataset: Dataset,
    embeddings: Array,
    *,
    history: int,
    count: int,
    seed: int,
    how: Reconstruction | None = None,
) -> list[dict[str, Any]]:
    """Clicked items of random test pages, each with the weights of its reconstruction over the
    page's history, largest first."""
    how = how or Reconstruction()
    pages = np.array(dataset.split("test"), np.int64)
    length = np.minimum(dataset.history_end[pages] - dataset.history_start[pages], history)
    # A weight says something where there is something to choose from.
    enough = pages[length >= min(6, length.max(initial=0))]
    chosen = np.random.default_rng(seed).permutation(enough)[:count]
    table = torch.from_numpy(np.ascontiguousarray(embeddings, np.float32))
    if how.unit:
        table = torch.nn.functional.normalize(table, dim=1)
    known = np.isfinite(embeddings).all(1)
    show = Pictures(dataset)
    found = []
    for page in chosen.tolist():
        pv = slice(dataset.pv_start[page], dataset.pv_end[page])
        clicked = dataset.pv_item[pv][dataset.pv_clicked[pv]]
        clicked = clicked[known[clicked]]
        end = int(dataset.history_end[page])
        past = dataset.event_item[max(int(dataset.history_start[page]), end - history) : end]
        past = past[known[past]]
        if not len(clicked) or not len(past):
            continue
        item = int(clicked[0])
        _, weights = reconstruct(
            torch.tensor([[item]]),
            torch.from_numpy(past.astype(np.int64))[None],
            embeddings=table,
            return_weights=True,
            impl="reference",
            **how.arguments,
        )
        w = weights.mean(-2).flatten().numpy()  # over the heads
        order = np.argsort(-w, kind="stable")
        rows = [
            show(
                int(past[i]),
                weight=float(w[i]),
                text=percent(float(w[i])),
                bar=round(100 * float(w[i] / w[order[0]]), 1),
            )
            for i in order.tolist()
        ]
        found.append({"clicked": show(item), "history": rows})
    return found


def neighbours(
    dataset: Dataset, embeddings: Array, *, count: int, nearest: int = 6, seed: int = 0
) -> list[dict[str, Any]]:
    """Random items, of as many categories as there are, with the `nearest` others by cosine."""
    x = np.asarray(embeddings, np.float32)
    usable = dataset.images.present & np.isfinite(x).all(1)
    categories = dataset.categories.to_pylist()
    order = np.random.default_rng(seed).permutation(np.flatnonzero(usable)).tolist()
    first = {categories[i]: i for i in reversed(order)}  # of each category, the first in this order
    queries = [*first.values(), *(i for i in order if first[categories[i]] != i)][:count]
    if not queries:
        return []
    items, places = np.flatnonzero(usable), (np.cumsum(usable) - 1)[queries]
    x = normalised(x[items])
    near, cosines = exact_search(x, x[places], min(nearest, len(x) - 1), own=places)
    show = Pictures(dataset)
    return [
        {
            "query": show(query),
            "near": [
                show(int(items[row]), text=number(float(cosine), 2))
                for row, cosine in zip(rows, values, strict=True)
            ],
        }
        for query, rows, values in zip(queries, near, cosines, strict=True)
    ]


def map_of_items(
    dataset: Dataset, embeddings: Array, *, most: int = 2000, nearest: int = 10, seed: int = 0
) -> dict[str, Any] | None:
    """t-SNE of at most `most` items as SVG, coloured by the largest categories; with the share of
    an item's `nearest` that are of its category, and what chance would give: a picture alone proves
    nothing. None where fewer than 10 items have an embedding, or all have the same."""
    from sklearn.manifold import TSNE

    x = np.asarray(embeddings, np.float32)
    rows = np.flatnonzero(np.isfinite(x).all(1) & (np.abs(x).max(1) > 0))
    rows = np.sort(np.random.default_rng(seed).permutation(rows)[:most])
    if len(rows) < 10:
        return None
    x = normalised(x[rows])
    if np.ptp(x, axis=0).max() < 1e-6:
        return None
    # Of unit vectors the squared distance is 2 - 2 cos: the same neighbours.
    tsne = TSNE(perplexity=min(30, (len(rows) - 1) / 3), init="pca", random_state=seed)
    places = tsne.fit_transform(x)
    names = [dataset.categories[int(i)].as_py() or "" for i in rows]
    category = np.unique(names, return_inverse=True)[1]
    counts = Counter(name for name in names if name)
    largest = [name for name, _ in counts.most_common(COLOURS)] if len(counts) > 1 else []
    colour = {name: f"c{i}" for i, name in enumerate(largest)}
    low, high = places.min(0), places.max(0)
    at = 8 + (places - low) / np.maximum(high - low, 1e-9) * (np.array([680, 440]) - 16)
    points = [
        f'<circle class="{colour.get(name, "rest")}" cx="{px:.1f}" cy="{py:.1f}" r="2.6"/>'
        for name, (px, py) in zip(names, at, strict=True)
    ]
    near, _ = exact_search(x, x, nearest, own=np.arange(len(x)))
    known = np.array([bool(name) for name in names])
    drawn = " drawn at random" if len(rows) == most else ""
    note = f"{len(rows):,} items{drawn}, placed by t-SNE so that what is alike is close."
    if largest:
        same = float((category[near] == category[:, None])[known].mean())
        chance = float(np.bincount(category)[category[known]].mean() / len(rows))
        note += (
            f" Of the {nearest} nearest items by cosine {percent(same)} are of the item's own "
            f"category; by chance it would be {percent(chance)}."
        )
    return {
        "note": note,
        "legend": [
            *largest,
            *(["other"] if len(counts) > len(largest) or counts.total() < len(names) else []),
        ]
        if largest
        else [],
        "alt": f"Map of {len(rows)} items, coloured by category",
        "svg": Markup("".join(points)),  # our own numbers alone
        "width": 680,
        "height": 440,
    }
