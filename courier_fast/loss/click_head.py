"""The click head of COURIER: whether a shown item was clicked, from its reconstruction and itself.

    h_j = relu(W_1 [R_j, E_j] + b_1)                                   [hidden]
    z_j = w_2 . (gamma (h_j - mean) / sqrt(var + eps) + beta) + b_2    mean, var of h over the rows
    L   = mean over the rows of log(1 + exp(z_j)) - y_j z_j

h [n, hidden] would be the largest tensor of a step, kept four times. Batch norm is linear once its
statistics are known, so `_SlicedLoss` needs only two sums of h before the logits, and two sums of
dL/dz h before the gradients. It makes h a slice of rows at a time, keeps the first slices, and
makes the others again where they are needed again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from ..surroundings import alone_backward, for_products
from .union.exchange import Participants

# Numbers of a slice of h: 8 MiB in float32, and on a GPU what keeps it busy.
_SLICE = {"cpu": 1 << 21, "cuda": 1 << 24}
# Those of the slices that are kept, 32 MiB in float32: all of a small batch.
_KEPT = 1 << 23
# Rows of a float32 sum.
_SHORT = 64


class _Sum(torch.autograd.Function):
    """Of all processes; so is its gradient, as each process's loss depends on what the others
    gave."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, processes: Participants) -> Tensor:
        ctx.processes = processes
        return processes.sum(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return ctx.processes.sum(upstream.contiguous()), None


@dataclass
class ClickRows:
    """The rows that a click head sees: on the CPU those that count, on a GPU, where nobody waits
    for how many these are, all."""

    r: Tensor  # [n, D]
    e: Tensor  # [n, D]
    clicked: Tensor | None  # [n] bool
    live: Tensor | None  # [n] bool: those that count; None: all
    processes: Participants | None = None  # whose rows are one batch with these; None: this one

    def total(self, x: Tensor) -> Tensor:
        """The sum of all processes."""
        return x if self.processes is None else _Sum.apply(x, self.processes)

    def for_products(self) -> ClickRows:
        """In float32 where those of the rows' type are slow."""
        return replace(self, r=for_products(self.r), e=for_products(self.e))

    @property
    def weights(self) -> Tensor:
        """1 for each row that counts, 0 for others [n], in the type of sums."""
        if self.live is None:
            return torch.ones(len(self.r), dtype=self.precise, device=self.r.device)
        return self.live.to(self.precise)

    @property
    def precise(self) -> torch.dtype:
        """Of what is not a product: float32, or float64 for rows of that."""
        return torch.promote_types(self.r.dtype, torch.float32)


@dataclass
class _Moments:
    """Mean and variance of h [hidden], float64, and whether the rows' own are meant: not outside of
    training, and not of one row, whose variance would be 0."""

    mean: Tensor
    var: Tensor
    count: Tensor  # 0-d float64: rows of all processes
    own: Tensor  # 0-d bool


class ClickHead(nn.Sequential):
    """Linear(2 D -> hidden), ReLU, batch norm, Linear(hidden -> 1): click logits [n, 1] of
    [R, E] [n, 2 D].

    `loss` and `logits` take the rows as `ClickRows`, and weights in the type of the rows.
    """

    def __init__(self, dim: int, hidden: int = 1024) -> None:
        super().__init__(
            nn.Linear(2 * dim, hidden), nn.ReLU(), nn.BatchNorm1d(hidden), nn.Linear(hidden, 1)
        )

    def reset_parameters(self) -> None:
        for layer in (self[0], self[2], self[3]):
            layer.reset_parameters()

    def loss(self, rows: ClickRows, exact: bool) -> tuple[Tensor, Tensor]:
        """The mean loss of the rows of all processes, 0-d: this process's part of it times their
        number, so that the mean of these losses and of their gradients is the union's; and the
        logits [n], without a gradient.

        `exact`: by the definition, which keeps h; otherwise by slices of rows.
        """
        count = rows.weights.sum(dtype=torch.float64)
        size = 1
        if rows.processes is not None:
            count, size = rows.processes.sum(count), rows.processes.size
        if exact:
            total, logits = self._defined(rows, count)
        else:
            rows = rows.for_products()
            total, logits = _SlicedLoss.apply(
                rows.r, rows.e, *self._weights(rows), self, rows, count
            )
        return (total * size / count.clamp(min=1)).to(rows.precise), logits.detach()

    @torch.no_grad()
    def logits(self, rows: ClickRows) -> Tensor:
        """By the running statistics, [n]."""
        rows = rows.for_products()
        moments = self._running(torch.zeros((), dtype=torch.float64, device=rows.r.device))
        folded = _Folded.of(_Weights(*self._weights(rows)), moments, self[2].eps)
        return torch.cat([folded.logits(h) for *_, h in _hidden(rows, folded.weights, {})])

    def _weights(self, rows: ClickRows) -> list[Tensor]:
        """Those of `_Weights`: of the first layer in the type of the rows, others of sums."""
        first, _, norm, last = self
        kinds = [rows.r.dtype] * 2 + [rows.precise] * 4
        given = (first.weight, first.bias, norm.weight, norm.bias, last.weight.view(-1), last.bias)
        return [x.to(kind) for x, kind in zip(given, kinds, strict=True)]

    # ---- statistics --------------------------------------------------------------------------

    def _running(self, count: Tensor) -> _Moments:
        norm = self[2]
        own = torch.zeros((), dtype=torch.bool, device=count.device)
        return _Moments(norm.running_mean.double(), norm.running_var.double(), count, own)

    def _moments(self, mean: Tensor, var: Tensor, count: Tensor) -> _Moments:
        """Of the rows in training, where there are two or more, which the running ones remember."""
        norm, own = self[2], count > 1
        before = self._running(count)
        with torch.no_grad():
            unbiased = var * count / (count - 1).clamp(min=1)
            for running, now in ((norm.running_mean, mean), (norm.running_var, unbiased)):
                moved = torch.lerp(running.double(), now.double(), norm.momentum)
                running.copy_(torch.where(own, moved, running.double()))
            norm.num_batches_tracked += own
        mean = torch.where(own, mean, before.mean)
        return _Moments(mean, torch.where(own, var, before.var), count, own)

    # ---- the definition ----------------------------------------------------------------------

    def _defined(self, rows: ClickRows, count: Tensor) -> tuple[Tensor, Tensor]:
        w = _Weights(*self._weights(rows))
        weights = rows.weights
        h = functional.linear(torch.cat([rows.r, rows.e], 1), w.first, w.bias).relu()
        h = h.to(rows.precise)
        if self.training:
            n = count.clamp(min=1)
            mean = rows.total(_summed(weights, h)) / n
            off = h - mean.to(h.dtype)
            moments = self._moments(mean, rows.total(_summed(weights, off.square())) / n, count)
        else:
            moments = self._running(count)
        unit = (h - moments.mean.to(h.dtype)) * (moments.var + self[2].eps).rsqrt().to(h.dtype)
        logits = (unit * w.gamma + w.beta) @ w.last + w.last_bias
        assert rows.clicked is not None
        each = functional.binary_cross_entropy_with_logits(
            logits, rows.clicked.to(logits.dtype), reduction="none"
        )
        return (weights * each).sum(dtype=torch.float64), logits


def _summed(weights: Tensor, x: Tensor) -> Tensor:
    """The weighted sum of the rows, float64."""
    return (weights[:, None] * x).sum(0, dtype=torch.float64)


# ---- by slices of rows ---------------------------------------------------------------------------


@dataclass
class _Weights:
    first: Tensor  # [hidden, 2 D]
    bias: Tensor  # [hidden]
    gamma: Tensor  # [hidden]
    beta: Tensor  # [hidden]
    last: Tensor  # [hidden]
    last_bias: Tensor  # [1]


@dataclass
class _Folded:
    """Batch norm and the last layer as one: z = (h - mean) . scale + shift."""

    weights: _Weights
    mean: Tensor  # [hidden]
    rstd: Tensor  # [hidden]
    scale: Tensor  # [hidden]
    shift: Tensor  # [1]

    @classmethod
    def of(cls, w: _Weights, moments: _Moments, eps: float) -> _Folded:
        rstd = (moments.var + eps).rsqrt()
        scale = (w.gamma * rstd * w.last).to(w.last.dtype)
        shift = w.beta @ w.last + w.last_bias
        return cls(w, moments.mean.to(w.last.dtype), rstd.to(w.last.dtype), scale, shift)

    def centred(self, h: Tensor) -> Tensor:
        return h.to(self.mean.dtype) - self.mean

    def logits(self, h: Tensor) -> Tensor:
        return self.centred(h) @ self.scale + self.shift


def _weighted_sum(weights: Tensor, x: Tensor) -> Tensor:
    """weights [n] @ x [n, hidden], float64: short products added up, as a float32 sum of thousands
    of rows, one after the other, loses digits that a mean, and what nearly cancels, needs."""
    whole = len(x) // _SHORT * _SHORT
    blocks = weights[:whole].view(-1, 1, _SHORT) @ x[:whole].view(-1, _SHORT, x.shape[1])
    rest = weights[whole:] @ x[whole:]
    return blocks.sum((0, 1), dtype=torch.float64) + rest


def _slices(rows: ClickRows, hidden: int) -> Iterator[slice]:
    """At least one, so that what is made of none has its shape."""
    size = max(_SLICE.get(rows.r.device.type, _SLICE["cpu"]) // hidden, 1)
    for start in range(0, max(len(rows.r), 1), size):
        yield slice(start, start + size)


def _hidden(
    rows: ClickRows, w: _Weights, kept: dict[int, Tensor]
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """A slice of rows after the other, its [R, E] and its h, both in the type of the rows. `kept`:
    h by the first row; it grows up to its limit."""
    for at in _slices(rows, len(w.bias)):
        x, h = torch.cat([rows.r[at], rows.e[at]], 1), kept.get(at.start)
        if h is None:
            h = torch.addmm(w.bias, x, w.first.T).relu_()
            if sum(y.numel() for y in kept.values()) + h.numel() <= _KEPT:
                kept[at.start] = h
        yield at, x, h


def _mean_and_var(
    rows: ClickRows, w: _Weights, count: Tensor, kept: dict[int, Tensor]
) -> tuple[Tensor, Tensor]:
    """Of h over the rows of all processes, biased, float64: each slice about its own mean, these
    about that of all, so that nothing cancels."""
    weights, found = rows.weights, []
    for at, _, h in _hidden(rows, w, kept):
        h, weight = h.to(rows.precise), weights[at]
        n = weight.sum(dtype=torch.float64)
        mean = _weighted_sum(weight, h) / n.clamp(min=1)
        off = (h - mean.to(h.dtype)).square_()
        found.append((n, mean, _weighted_sum(weight, off)))
    n, mean, squares = (torch.stack(x) for x in zip(*found, strict=True))
    every = count.clamp(min=1)
    middle = rows.total(n @ mean) / every
    return middle, rows.total(squares.sum(0) + n @ (mean - middle).square()) / every


class _SlicedLoss(torch.autograd.Function):
    """The sum of the rows' losses, float64, and their logits [n]."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, e: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
        *weights, head, rows, count = given
        w = _Weights(*weights)
        rows = replace(rows, r=r, e=e)  # without autograd
        assert rows.clicked is not None
        kept: dict[int, Tensor] = {}
        if head.training:
            moments = head._moments(*_mean_and_var(rows, w, count, kept), count)
        else:
            moments = head._running(count)
        folded = _Folded.of(w, moments, head[2].eps)
        y, weight = rows.clicked.to(rows.precise), rows.weights
        logits, slope = y.new_empty(len(y)), y.new_empty(len(y))
        total, by_h = y.new_zeros((), dtype=torch.float64), torch.zeros_like(moments.mean)
        for at, _, h in _hidden(rows, w, kept):
            off = folded.centred(h)
            z = torch.mv(off, folded.scale) + folded.shift
            logits[at] = z
            slope[at] = weight[at] * (z.sigmoid() - y[at])
            each = functional.binary_cross_entropy_with_logits(z, y[at], reduction="none")
            total += (weight[at] * each).sum(dtype=torch.float64)
            by_h += _weighted_sum(slope[at], off)
        # `off` is from the mean as the rows' type holds it, and the slopes' sum is no small number.
        by_h -= (moments.mean - folded.mean) * slope.sum(dtype=torch.float64)
        ctx.save_for_backward(r, e, *weights, slope, by_h, rows.live, *kept.values())
        ctx.about = folded.mean, folded.rstd, moments.count, moments.own, rows.processes, list(kept)
        ctx.mark_non_differentiable(logits)
        return total, logits

    @staticmethod
    @once_differentiable
    @alone_backward
    def backward(ctx: Any, upstream: Tensor, _: Any) -> Any:  # type: ignore[override]
        mean, rstd, count, own, processes, starts = ctx.about
        r, e, *weights = ctx.saved_tensors[:8]
        slope, by_h, live, *kept = ctx.saved_tensors[8:]
        w = _Weights(*weights)
        rows = ClickRows(r, e, None, live, processes)
        slope = (slope * upstream).to(slope.dtype)
        own_sums = torch.cat([slope.sum(dtype=torch.float64).view(1), by_h * upstream])
        sums = own_sums if processes is None else processes.sum(own_sums)
        # dL/dh = scale (slope - [own] (mean of slope + (h - mean) rstd^2 mean of slope (h - mean)))
        by_mean = torch.where(own, sums / count.clamp(min=1), 0).to(slope.dtype)
        scale = w.gamma * rstd * w.last
        shift, factor = -scale * by_mean[0], -scale * rstd.square() * by_mean[1:]
        d_r, d_e = torch.empty_like(r), torch.empty_like(e)
        d_first, d_bias = torch.zeros_like(w.first, dtype=slope.dtype), torch.zeros_like(shift)
        for at, x, h in _hidden(rows, w, dict(zip(starts, kept, strict=True))):
            d = (h.to(slope.dtype) - mean).mul_(factor).add_(shift)
            if live is not None:
                d *= live[at, None]
            d = torch.ops.aten.threshold_backward(d.addr_(slope[at], scale), h, 0)
            d_bias += d.sum(0)
            d = d.to(h.dtype)
            if d_first.dtype == d.dtype:
                d_first.addmm_(d.T, x)
            else:
                d_first += d.T @ x
            d_r[at], d_e[at] = (d @ w.first).split(r.shape[1], 1)
        n, by_unit = own_sums[0].to(slope.dtype), own_sums[1:].to(slope.dtype) * rstd
        d_last = w.gamma * by_unit + w.beta * n
        d_weights = (
            d_first.to(r.dtype),
            d_bias.to(r.dtype),
            w.last * by_unit,
            w.last * n,
            d_last,
            n.view(1),
        )
        return (d_r, d_e, *d_weights, None, None, None)
