"""Warm start: a model that has learned from the older pages goes on over the newer ones, period by
period, each predicted before it is trained on.

    old pages, one pass in their order -> [ predict, train ] period 1 -> [ predict, train ] ...

Once as it is, once with the embedding's inputs added to what the older pages have made, and once
with them from the start ("from scratch"), which is what a comparison of freshly trained models
claims. What is added starts at zero: every weight that leads from a new input into the model that
there was is 0, so that its first predictions are those of the model without.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .fit import Fitted, Settings, predict, seeded, train_step
from .impressions import Protocol
from .inputs import Inputs, Split
from .models import make_model

Array = npt.NDArray


def go_on(
    name: str,
    inputs: Inputs,
    protocol: Protocol,
    settings: Settings,
    seed: int = 0,
    *,
    before: Inputs | None = None,
    progress: Callable[[float], None] = lambda _: None,
) -> Fitted:
    """Trains the model of that name on the older pages, then predicts and trains period by period.

    Args:
        inputs: of the periods, and of the older pages, too, where `before` is None.
        before: what the model knows on the older pages; `inputs` are added after them.
        progress: called with the share of the pages that are done.

    Returns:
        Predictions of the ranges among `inputs`; there is nothing that ends training, so no losses.
    """
    first = inputs if before is None else before
    with seeded(seed):
        model = make_model(name, first.tables, first.users, first.dense)
    stream = _Stream(model, torch.optim.Adam(model.parameters(), lr=settings.lr), settings)
    ranges = [r for r in inputs.splits if r != "train"]
    total = sum(len(x.shown.pages) for x in inputs.splits.values())
    old = first.splits["train"]
    stream.train(old, np.arange(len(old.shown.pages)))
    if before is not None:
        with seeded(seed):
            wider = make_model(name, inputs.tables, inputs.users, inputs.dense)
        stream = stream.into(wider)
    done = len(old.shown.pages)
    predictions = {}
    for r in ranges:
        split, found = inputs.splits[r], []
        for period in protocol.periods[r]:
            pages = np.arange(period.start, period.stop) - split.shown.pages.start
            found.append(predict(stream.model, split, pages))
            stream.train(split, pages)
            done += len(pages)
            progress(done / total)
        predictions[r] = np.concatenate(found)
    return Fitted(predictions, [], stream.model)


@dataclass
class _Stream:
    """A model in training."""

    model: nn.Module
    optimizer: torch.optim.Adam
    settings: Settings

    def train(self, split: Split, pages: Array) -> None:
        """One pass over some pages, in their order."""
        offsets = split.shown.offsets
        shown = int(offsets[pages[-1] + 1] - offsets[pages[0]]) if len(pages) else 0
        parts = min(len(pages), max(1, math.ceil(shown / self.settings.batch)))
        for some in np.array_split(pages, parts):
            train_step(self.model, self.optimizer, split, some, self.settings.l2)

    def into(self, wider: nn.Module) -> _Stream:
        """The same, with what `wider` has beside it; what it remembers of gradients, too."""
        parts = dict(self.model.named_parameters())
        optimizer = torch.optim.Adam(wider.parameters(), lr=self.settings.lr)
        grown = {name: Grown(self.model, wider, name) for name in parts}
        with torch.no_grad():
            for name, parameter in wider.named_parameters():
                if name not in grown:
                    continue  # a table of its own
                parameter.copy_(grown[name].filled(parts[name], parameter))
                remembered = self.optimizer.state[parts[name]]
                nothing = torch.zeros_like(parameter)
                optimizer.state[parameter] = {
                    key: x if x.dim() == 0 else grown[name].filled(x, nothing)
                    for key, x in remembered.items()
                }
            for name, buffer in wider.named_buffers():
                buffer.copy_(self.model.get_buffer(name))
        return _Stream(wider, optimizer, self.settings)


class Grown:
    """Where the numbers of a parameter of a model go in one with more inputs.

    An item's row has its new dimensions after the old ones, and so have the numbers of an
    impression; both models see [candidate, history, the rest].
    """

    def __init__(self, model: nn.Module, wider: nn.Module, name: str) -> None:
        shape, now = model.get_parameter(name).shape, wider.get_parameter(name).shape
        self.same = shape == now
        if self.same:
            return
        old, new = model.items.dim, wider.items.dim  # type: ignore[union-attr]
        item, rest = torch.arange(old), torch.arange(model.context)  # type: ignore[arg-type]
        row = torch.cat([item, new + item, 2 * new + rest])
        if name.startswith("unit."):
            self.columns = torch.cat([part * new + item for part in range(4)])
        else:  # behind a row there may be what other layers make of it
            behind = torch.arange(shape[-1] - len(row))
            self.columns = torch.cat([row, now[-1] - len(behind) + behind])
        self.rows = torch.arange(shape[0]) if shape[0] == now[0] or len(shape) == 1 else row

    def filled(self, old: Tensor, fresh: Tensor) -> Tensor:
        """`fresh` with the old numbers at their places, and zeros where new inputs lead to old
        outputs."""
        if self.same:
            return old.clone()
        found = fresh.clone()
        if found.dim() == 1:
            found[self.columns] = old
            return found
        found[self.rows] = 0
        found[self.rows[:, None], self.columns[None, :]] = old
        return found
