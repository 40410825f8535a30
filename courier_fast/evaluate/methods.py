"""What an embedding is compared with: chance, popularity, pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from ..data.dataset import Dataset
from ..data.images.decode import Decoder, make_decoder
from ..embed.encode import encode_all
from ..embed.sources import DatasetImages
from .scores import ClickLogits

Array = npt.NDArray

BASELINES = ("random", "popularity", "pixels", "backbone")


@dataclass(frozen=True)
class Method:
    """A way to score candidates: `embeddings` [items, D], compared with the history's, or `scores`
    [items], the same for everybody; `click`: the click head that was trained with the
    embeddings."""

    name: str
    embeddings: Array | None = None
    scores: Array | None = None
    click: ClickLogits | None = None

    def __post_init__(self) -> None:
        if (self.embeddings is None) == (self.scores is None):
            raise ValueError(f"{self.name}: expected either embeddings or scores")


def random_order(dataset: Dataset) -> Method:
    """Chance, exactly: all candidates tie, and ties count by their expectation."""
    return Method("random", scores=np.zeros(dataset.num_items))


def popularity(dataset: Dataset) -> Method:
    """Clicks on pages of the train split."""
    return Method("popularity", scores=dataset.item_clicks)


def pixels(dataset: Dataset, side: int = 8, decoder: Decoder | None = None) -> Method:
    """The image shrunk to `side` x `side` pixels, red, green and blue in [0, 1]."""
    made = decoder or make_decoder("auto", side, mean=(0, 0, 0), std=(1, 1, 1))
    try:
        table = encode_all(lambda x: x.flatten(1), DatasetImages(dataset, made), batch=1024)
    finally:
        if decoder is None:
            made.close()
    return Method(f"pixels {side}x{side}", table)


def ready(dataset: Dataset) -> Method:
    """The dataset's own embeddings, as they came."""
    return Method("ready embeddings", dataset.read_embeddings())


def standardised(method: Method) -> Method:
    """Embeddings with mean 0 and standard deviation 1 in each dimension over the items; a constant
    dimension becomes 0.

    Frozen features have a large common part, which makes all cosines alike: without it they are a
    far stronger baseline.
    """
    if method.embeddings is None:
        raise ValueError(f"{method.name}: expected embeddings, got scores")
    table = np.asarray(method.embeddings, np.float64)
    rows = table[np.isfinite(table).all(1)]
    deviation = rows.std(0)
    # A constant column's deviation is rounding, not exactly 0.
    varies = deviation > 1e-7 * (1 + np.abs(rows).max(0, initial=0))
    scaled = np.where(varies, (table - rows.mean(0)) / np.where(varies, deviation, 1), 0.0)
    scaled[~np.isfinite(table).all(1)] = np.nan
    return replace(
        method, name=f"{method.name}, standardised", embeddings=scaled.astype(np.float32)
    )
