"""DIN (Zhou et al. 2018) and DCNv2 (Wang et al. 2021) as published, with a place for a frozen
embedding in each form.

Both see the same: user, candidate item, its history, hour and weekday, and dense numbers; they
differ in how they combine them. An item is [id, category, clusters ..., the frozen vector through
one linear layer], the same for candidate and history.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

MODELS = ("din", "dcnv2")
ID, CODE = 16, 8  # dimensions of an id's and of a category's, cluster's or time's embedding


@dataclass(frozen=True)
class ImpressionBatch:
    """Some impressions. Each of the U items that occur stands once; a pair is an impression with
    one of its history items.

    Attributes:
        items: [U] rows of the item tables.
        item: [B] places in `items`; user, hour, weekday: [B] codes.
        dense: [B, F]; clicked: [B] float; weight: [B] of each in the loss, or None.
        pair_impression, pair_item: [P] of every pair, by impression: its place in the batch, the
            history item's in `items`.
        offsets: [B] an impression's first pair.
    """

    items: Tensor
    item: Tensor
    user: Tensor
    hour: Tensor
    weekday: Tensor
    dense: Tensor
    clicked: Tensor
    pair_impression: Tensor
    pair_item: Tensor
    offsets: Tensor
    weight: Tensor | None = None


@dataclass(frozen=True)
class ItemTables:
    """What is known of every item: codes [items, C], each of an embedding of `sizes[c]` rows (the
    first columns are id and category), and vectors [items, D] or None.

    With `gated` all that is known by an embedding, the other codes, the vectors and the last
    `added` numbers of an impression, is weighed by a gate of the item's category between 0 and 2,
    2 sigmoid(w) with w = 0 at first (as LHUC, Swietojanski and Renals 2014): it begins as without.
    """

    codes: Tensor
    sizes: tuple[int, ...]
    vectors: Tensor | None = None
    added: int = 0
    gated: bool = False


class Dice(nn.Module):
    """f(x) = p x + (1 - p) alpha x,  p = sigmoid((x - mean) / sqrt(var + eps)), over the batch in
    training, running means after it. x is [n, dim]."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps=1e-8, affine=False, momentum=0.1)
        self.alpha = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor) -> Tensor:
        # Of one row the batch's variance is nothing: the running one then.
        alone = self.training and len(x) < 2
        normed = (
            self.norm(x)
            if not alone
            else functional.batch_norm(
                x, self.norm.running_mean, self.norm.running_var, eps=self.norm.eps
            )
        )
        p = torch.sigmoid(normed)
        return x * (p + (1 - p) * self.alpha)


class ItemEmbedding(nn.Module):
    """Rows [U, dim] of items [U]: their codes' embeddings beside the frozen vector through one
    linear layer."""

    def __init__(self, tables: ItemTables) -> None:
        super().__init__()
        self.tables = tables
        widths = [ID, *[CODE] * (len(tables.sizes) - 1)]
        self.codes = nn.ModuleList(
            _embedding(n, width) for n, width in zip(tables.sizes, widths, strict=True)
        )
        self.vector = None if tables.vectors is None else nn.Linear(tables.vectors.shape[1], ID)
        self.dim = sum(widths) + (0 if self.vector is None else ID)
        self.gates = None
        if tables.gated:
            self.gates = nn.Embedding.from_pretrained(torch.zeros(tables.sizes[1], 1), freeze=False)

    def gate(self, items: Tensor) -> Tensor | None:
        """[U, 1] of items [U]; None without gates."""
        if self.gates is None:
            return None
        return 2 * torch.sigmoid(self.gates(self.tables.codes[items, 1]))

    def forward(self, items: Tensor) -> Tensor:
        codes = self.tables.codes[items]
        parts = [table(codes[:, i]) for i, table in enumerate(self.codes)]
        if self.vector is not None and self.tables.vectors is not None:
            parts.append(self.vector(self.tables.vectors[items]))
        gate = self.gate(items)
        if gate is not None:
            parts = [*parts[:2], *(gate * part for part in parts[2:])]
        return torch.cat(parts, 1)


class _Model(nn.Module):
    def __init__(self, tables: ItemTables, users: int, dense: int) -> None:
        super().__init__()
        self.items = ItemEmbedding(tables)
        self.user = _embedding(users, ID)
        self.hour, self.weekday = _embedding(24, CODE), _embedding(7, CODE)
        self.context = ID + 2 * CODE + dense  # dimensions of what is neither item nor history

    def _inputs(self, batch: ImpressionBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Rows of the items [U, d], of the candidates [B, d], and the rest [B, context]."""
        rows = self.items(batch.items)
        rest = [self.user(batch.user), self.hour(batch.hour), self.weekday(batch.weekday)]
        dense, added = batch.dense, self.items.tables.added
        gate = self.items.gate(batch.items[batch.item]) if added else None
        if gate is not None:
            dense = torch.cat([dense[:, :-added], gate * dense[:, -added:]], 1)
        return rows, functional.embedding(batch.item, rows), torch.cat([*rest, dense], 1)


class DIN(_Model):
    """The history's weighted sum beside the candidate; the weight of a history item h for a
    candidate t is

        a(e_t, e_h) = MLP([e_t, e_h, e_t - e_h, e_t * e_h]),  not normalised,

    with Dice in both MLPs. Only true pairs are in the batch whose statistics Dice takes.
    """

    def __init__(
        self,
        tables: ItemTables,
        users: int,
        dense: int,
        *,
        attention: int = 64,
        hidden: Sequence[int] = (200, 80),
    ) -> None:
        super().__init__(tables, users, dense)
        d = self.items.dim
        self.unit = nn.Linear(4 * d, attention)
        self.unit_dice, self.weight = Dice(attention), nn.Linear(attention, 1)
        self.top = _mlp(self.context + 2 * d, hidden, Dice)
        self.logit = nn.Linear(hidden[-1], 1)

    def interest(self, rows: Tensor, target: Tensor, batch: ImpressionBatch) -> Tensor:
        """[B, d] the weighted sum of the history."""
        if not len(batch.pair_item):
            return torch.zeros_like(target)
        # The first layer falls apart into a part of the candidate, one of the history item and one
        # of their product.
        of_target, of_item, of_difference, of_product = self.unit.weight.chunk(4, 1)
        t = functional.linear(target, of_target + of_difference, self.unit.bias)
        h = functional.linear(rows, of_item - of_difference)
        place, item = batch.pair_impression, batch.pair_item
        product = functional.embedding(place, target) * functional.embedding(item, rows)
        x = functional.embedding(place, t) + functional.embedding(item, h) + product @ of_product.T
        a = self.weight(self.unit_dice(x)).squeeze(1)
        return functional.embedding_bag(item, rows, batch.offsets, mode="sum", per_sample_weights=a)

    def forward(self, batch: ImpressionBatch) -> Tensor:
        """[B] logits."""
        rows, target, rest = self._inputs(batch)
        interest = self.interest(rows, target, batch)
        return self.logit(self.top(torch.cat([target, interest, rest], 1))).squeeze(1)


class DCNv2(_Model):
    """x_{l+1} = x_0 * (W_l x_l + b_l) + x_l beside an MLP, both into one logit; the history is its
    mean (0 where there is none)."""

    def __init__(
        self,
        tables: ItemTables,
        users: int,
        dense: int,
        *,
        layers: int = 3,
        hidden: Sequence[int] = (256, 128),
    ) -> None:
        super().__init__(tables, users, dense)
        width = self.context + 2 * self.items.dim
        self.cross = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.deep = _mlp(width, hidden, lambda _: nn.ReLU())
        self.logit = nn.Linear(width + hidden[-1], 1)

    def forward(self, batch: ImpressionBatch) -> Tensor:
        """[B] logits."""
        rows, target, rest = self._inputs(batch)
        if len(batch.pair_item):
            mean = functional.embedding_bag(batch.pair_item, rows, batch.offsets, mode="mean")
        else:
            mean = torch.zeros_like(target)
        first = x = torch.cat([target, mean, rest], 1)
        for layer in self.cross:
            x = first * layer(x) + x
        return self.logit(torch.cat([x, self.deep(first)], 1)).squeeze(1)


def make_model(name: str, tables: ItemTables, users: int, dense: int) -> nn.Module:
    """A model by its name; `users` rows of user ids, `dense` numbers an impression. ValueError for
    an unknown name."""
    if name not in MODELS:
        raise ValueError(f"model: expected one of {', '.join(MODELS)}, got {name!r}")
    return (DIN if name == "din" else DCNv2)(tables, users, dense)


def _embedding(rows: int, dim: int) -> nn.Embedding:
    table = nn.Embedding(rows, dim)
    nn.init.normal_(table.weight, std=0.01 if rows > 64 else 0.05)
    return table


def _mlp(width: int, hidden: Sequence[int], activation: object) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in zip([width, *hidden], hidden, strict=False):
        layers += [nn.Linear(a, b), activation(b)]  # type: ignore[operator]
    return nn.Sequential(*layers)


def penalty(model: nn.Module, batch: ImpressionBatch) -> Tensor:
    """Squares of the batch's rows of users and item ids, over its impressions: what `l2` weighs."""
    assert isinstance(model, _Model)
    ids = model.items.codes[0](model.items.tables.codes[batch.items, 0])
    return (ids.square().sum() + model.user(batch.user).square().sum()) / len(batch.user)
