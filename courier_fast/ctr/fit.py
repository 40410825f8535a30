"""One cell of the table: train a model on the training range, stop by validation, predict."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from .inputs import Inputs, Split
from .models import make_model, penalty

Array = npt.NDArray

_SEEDING = (
    threading.Lock()
)  # torch's random numbers are the process's, and cells are fitted in threads


@dataclass(frozen=True)
class Settings:
    """Of training, the same for every form.

    Args:
        batch: impressions of a step; pages stay whole.
        lr: of Adam.
        l2: weight of the squares of user and item id rows.
        epochs: at most; validation is looked at `looks` times an epoch.
        patience: looks without a better logloss before training ends. CTR models overfit from the
            second epoch on.
    """

    batch: int = 256
    lr: float = 2e-3
    l2: float = 1e-5
    epochs: int = 5
    looks: int = 2
    patience: int = 2

    def __post_init__(self) -> None:
        for name in ("batch", "epochs", "looks", "patience"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not self.lr > 0 or not self.l2 >= 0:
            raise ValueError(f"lr, l2: expected above 0 and at least 0, got {self.lr}, {self.l2}")


@dataclass(frozen=True)
class Fitted:
    """`predictions` {range: [n] float32 probabilities} of validation and, if it is among the
    inputs, test; `losses`: of validation at each look."""

    predictions: dict[str, Array]
    losses: list[float]
    model: torch.nn.Module


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """What is drawn inside depends on the seed alone, and on no other thread."""
    with _SEEDING, torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def fit(
    name: str,
    inputs: Inputs,
    settings: Settings | None = None,
    seed: int = 0,
    progress: Callable[[float], None] = lambda _: None,
) -> Fitted:
    """Trains the model of that name; on a CPU the same bits for the same inputs, settings, seed and
    number of threads.

    Args:
        progress: called with the share of the steps that are done.
    """
    s = settings or Settings()
    with seeded(seed):
        model = make_model(name, inputs.tables, inputs.users, inputs.dense)
    optimizer = torch.optim.Adam(model.parameters(), lr=s.lr)
    train, validation = inputs.splits["train"], inputs.splits["validation"]
    steps = max(1, math.ceil(len(train.shown) / s.batch))
    looks = {math.ceil(steps * (i + 1) / s.looks) for i in range(s.looks)}
    losses: list[float] = []
    best: dict[str, torch.Tensor] = {}
    for epoch in range(s.epochs):
        order = np.random.default_rng([seed, epoch]).permutation(len(train.shown.pages))
        for step, pages in enumerate(np.array_split(order, min(steps, len(order))), 1):
            train_step(model, optimizer, train, np.sort(pages), s.l2)
            progress((epoch + step / steps) / s.epochs)
            if step not in looks:
                continue
            p, shown = predict(model, validation), validation.shown
            losses.append(_logloss(p, shown.clicked, shown.weight))
            if losses[-1] == min(losses):
                best = {k: v.detach().clone() for k, v in model.state_dict().items()}
            elif len(losses) - 1 - int(np.argmin(losses)) >= s.patience:
                break
        else:
            continue
        break
    if not best:
        raise RuntimeError(f"{name}: the validation logloss was never a number, got {losses}")
    model.load_state_dict(best)
    progress(1.0)
    ranges = [r for r in inputs.splits if r != "train"]
    return Fitted({r: predict(model, inputs.splits[r]) for r in ranges}, losses, model)


def train_step(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, train: Split, pages: Array, l2: float
) -> None:
    """On some pages of a range."""
    model.train()
    batch = train.batch(pages)
    loss = functional.binary_cross_entropy_with_logits(model(batch), batch.clicked, batch.weight)
    if l2:
        loss = loss + l2 * penalty(model, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()


@torch.no_grad()
def predict(
    model: torch.nn.Module, split: Split, pages: Array | None = None, impressions: int = 1 << 13
) -> Array:
    """[n] float32 probabilities, in the order of the split's impressions; of some pages in a row,
    if given."""
    model.eval()
    if pages is None:
        pages = np.arange(len(split.shown.pages))
    offsets = split.shown.offsets
    parts = max(1, math.ceil(int(offsets[pages[-1] + 1] - offsets[pages[0]]) / impressions))
    found = [
        torch.sigmoid(model(split.batch(some))).numpy()
        for some in np.array_split(pages, min(parts, len(pages)))
    ]
    return np.concatenate(found)


def _logloss(p: Array, clicked: Array, weight: Array | None) -> float:
    p = np.clip(p.astype(np.float64), 1e-7, 1 - 1e-7)
    return float(np.average(-np.log(np.where(clicked, p, 1 - p)), weights=weight))
