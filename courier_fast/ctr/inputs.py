"""What the models are given: impressions in a form, as tensors, and batches of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.dataset import Dataset
from .features import (
    CLUSTERS,
    CODES,
    check_form,
    cluster_features,
    code_features,
    code_prefixes,
    same_cluster,
    similarity_features,
    vector_features,
)
from .harm import GATE, base_form
from .impressions import Impressions, Protocol, category_codes, id_codes
from .models import ImpressionBatch, ItemTables

Array = npt.NDArray

RANGES = ("train", "validation", "test")


@dataclass(frozen=True)
class Split:
    """Impressions and their codes and numbers: user, hour, weekday [n] int64, dense [n, F] float32;
    weight [n] float32 with mean 1, or None."""

    shown: Impressions
    user: Tensor
    hour: Tensor
    weekday: Tensor
    dense: Tensor
    weight: Tensor | None = None

    def batch(self, pages: Array) -> ImpressionBatch:
        """Impressions of some pages (counted from the range's first), with all their history."""
        x, d = self.shown, self.shown.dataset
        rows, page = _ragged(x.offsets[pages], x.offsets[pages + 1])
        start, end = x.history_start[pages], x.history_end[pages]
        events, _ = _ragged(start, end)
        items, place = np.unique(
            np.concatenate([x.item[rows], d.event_item[events]]), return_inverse=True
        )
        length = end - start
        first = np.cumsum(length) - length + len(rows)  # of a page's history in `place`
        pairs, impression = _ragged(first[page], (first + length)[page])
        counts = length[page]
        index = torch.from_numpy(rows)
        return ImpressionBatch(
            items=torch.from_numpy(items.astype(np.int64)),
            item=torch.from_numpy(place[: len(rows)]),
            user=self.user[index],
            hour=self.hour[index],
            weekday=self.weekday[index],
            dense=self.dense[index],
            clicked=torch.from_numpy(x.clicked[rows].astype(np.float32)),
            pair_impression=torch.from_numpy(impression),
            pair_item=torch.from_numpy(place[pairs]),
            offsets=torch.from_numpy(np.cumsum(counts) - counts),
            weight=None if self.weight is None else self.weight[index],
        )


def _ragged(start: Array, end: Array) -> tuple[Array, Array]:
    """The ranges [start, end) one after another, and the number of each entry's range."""
    size = end - start
    group = np.repeat(np.arange(len(size)), size)
    return (start - np.cumsum(size) + size)[group] + np.arange(int(size.sum())), group


@dataclass(frozen=True)
class Inputs:
    """One protocol, form and embedding: what every model and seed of it shares."""

    tables: ItemTables
    users: int
    splits: Mapping[str, Split]

    @property
    def dense(self) -> int:
        return self.splits["train"].dense.shape[1]


def base_numbers(shown: Impressions) -> Array:
    """[n, 4] float32 of every form: `popularity`, and log(1 + times) that the item and that its
    category are in the history.

    The latter so that no form wins, nor a random vector, by telling that alone.
    """
    category, names = category_codes(shown.dataset)
    category[category == len(names) - 1] = -1
    same = np.stack([np.arange(shown.dataset.num_items), category], 1)
    return np.concatenate([shown.popularity(), same_cluster(same, shown)], 1)


class Material:
    """Makes `Inputs`; what several forms share is worked out once.

    Args:
        history: most recent events of an impression.
        least: impressions in training that an id needs for a row of its own.
        ranges: which of train, validation and test are made; without "test" nobody looks at it.
        seed: of k-means.
    """

    def __init__(
        self,
        dataset: Dataset,
        protocol: Protocol,
        *,
        history: int = 20,
        least: int = 2,
        ranges: tuple[str, ...] = RANGES,
        seed: int = 0,
    ) -> None:
        self.dataset, self.protocol, self.least, self.seed = dataset, protocol, least, seed
        self.shown = {
            r: Impressions(dataset, getattr(protocol, r), history=history) for r in ranges
        }
        self.known = protocol.known_items(dataset)

    @cached_property
    def _numbers(self) -> dict[str, Array]:
        return {name: base_numbers(x) for name, x in self.shown.items()}

    @cached_property
    def _codes(self) -> tuple[Array, Array, list[int]]:
        """Codes of users, of items [items, (id, category)], and the numbers of both of these."""
        train, d = self.shown["train"], self.dataset
        user = id_codes(train.user, len(d.user_ids), self.least)
        item = id_codes(train.item, d.num_items, self.least)
        category, names = category_codes(d)
        return user, np.stack([item, category], 1), [int(item.max()) + 1, len(names)]

    def inputs(
        self, form: str, embeddings: Array | None = None, off: Array | None = None
    ) -> Inputs:
        """Those of a form, behind which "+gate" may stand. ValueError for an unknown form, or one
        without the embeddings [items, D] it needs.

        Args:
            off: [items] bool, items for which what the embedding says is zeros: vectors, numbers
                before they are standardised, and codes, whose 0 stands for none.
        """
        gated, form = form.endswith(GATE), base_form(form)
        check_form(form)
        if form != "none" and embeddings is None:
            raise ValueError(f"embeddings: expected some for the form {form!r}, got none")
        user, codes, sizes = self._codes
        sizes = list(sizes)
        dense, vectors = {name: [x] for name, x in self._numbers.items()}, None
        if embeddings is not None and form in ("vector", "all"):
            vectors = torch.from_numpy(vector_features(embeddings, self.known))
        if embeddings is not None and form in ("similarity", "all"):
            for name, x in self.shown.items():
                dense[name].append(similarity_features(embeddings, x))
        if embeddings is not None and form in ("cluster", "all"):
            clusters = cluster_features(embeddings, self.known, seed=self.seed)
            codes = np.concatenate([codes, clusters + 1], 1)
            sizes += [k + 1 for k in CLUSTERS]
            for name, x in self.shown.items():
                dense[name].append(same_cluster(clusters, x))
        if embeddings is not None and form in ("code", "all"):
            levels = code_features(embeddings, self.known, seed=self.seed)
            seen = code_prefixes(levels, self.known)
            # The first level is its own prefix.
            codes = np.concatenate([codes, levels + 1, seen[:, 1:] + 1], 1)
            sizes += [*[CODES + 1] * levels.shape[1], *(int(n) + 2 for n in seen[:, 1:].max(0))]
            every = code_prefixes(levels)
            for name, x in self.shown.items():
                dense[name].append(same_cluster(every, x))
        if off is not None:
            codes[off, 2:] = 0
            if vectors is not None:
                vectors[torch.from_numpy(off)] = 0
            for name, x in self.shown.items():
                for numbers in dense[name][1:]:
                    numbers[off[x.item]] = 0
        columns = _standardised({name: np.concatenate(x, 1) for name, x in dense.items()})
        added = columns["train"].shape[1] - self._numbers["train"].shape[1]
        codes = torch.from_numpy(codes.astype(np.int64))
        tables = ItemTables(codes, tuple(sizes), vectors, added, gated)
        splits = {
            name: Split(
                x,
                *map(
                    torch.from_numpy, (user[x.user], x.hour, x.weekday, columns[name], *_weights(x))
                ),
            )
            for name, x in self.shown.items()
        }
        return Inputs(tables, int(user.max()) + 1, splits)


def _weights(shown: Impressions) -> list[Array]:
    """Those of the impressions, if they have some, with mean 1: the loss stays as large as without
    beside the squares of rows."""
    return [] if shown.weight is None else [shown.weight / shown.weight.mean()]


def _standardised(columns: dict[str, Array]) -> dict[str, Array]:
    """Mean 0, deviation 1 in the training range, outliers cut at 5; what is constant there is 0."""
    mean = columns["train"].mean(0, dtype=np.float64)
    deviation = columns["train"].std(0, dtype=np.float64)
    varies = deviation > 1e-6
    scale = np.where(varies, 1 / np.where(varies, deviation, 1), 0)
    return {
        name: np.clip((x - mean) * scale, -5, 5).astype(np.float32) for name, x in columns.items()
    }
