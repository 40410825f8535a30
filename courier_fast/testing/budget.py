"""The error budget that every implementation is held to, and the model of rounding behind it.

An implementation in a floating type may err by twice what eager PyTorch code in that type errs,
plus one rounding. One run of eager code is no yardstick: its error depends on the products of one
machine's library, and that of a single number may be zero by luck. `Rounding` models it instead,
with the same random numbers everywhere.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Runs of the model for each problem. A tensor averages over its elements, but a loss is one number.
DRAWS = 4

# Matrix products, and at how many places along them the model looks at their partial sums.
PRODUCTS = frozenset(["addmm", "baddbmm", "bmm", "mm"])
PARTIAL_SUMS = 8

# What moves, selects or compares values, and so rounds nothing; whatever else gives floating
# numbers rounds.
EXACT = frozenset(
    [
        "_local_scalar_dense",
        "_reshape_alias",
        "_to_copy",
        "_unsafe_view",
        "abs",
        "alias",
        "amax",
        "amin",
        "as_strided",
        "cat",
        "clamp",
        "clamp_min",
        "clone",
        "constant_pad_nd",
        "copy",
        "copy_",
        "detach",
        "empty",
        "empty_like",
        "expand",
        "fill",
        "fill_",
        "flip",
        "full",
        "full_like",
        "gather",
        "index",
        "index_copy",
        "index_copy_",
        "index_fill",
        "index_fill_",
        "index_select",
        "lift_fresh",
        "masked_fill",
        "masked_fill_",
        "max",
        "maximum",
        "min",
        "minimum",
        "neg",
        "new_empty",
        "new_empty_strided",
        "new_full",
        "new_ones",
        "new_zeros",
        "ones_like",
        "permute",
        "repeat",
        "scalar_tensor",
        "select",
        "select_backward",
        "sgn",
        "sign",
        "slice",
        "slice_backward",
        "split",
        "squeeze",
        "stack",
        "t",
        "transpose",
        "unsqueeze",
        "view",
        "where",
        "zero_",
        "zeros",
        "zeros_like",
    ]
)


def _unit(x: Tensor, dtype: torch.dtype) -> Tensor:
    """A unit in the last place of each number of x in `dtype`; NaN and inf give anything."""
    info = torch.finfo(dtype)
    # The power of two at or below |x|; numbers below the smallest normal one share its unit.
    power = (x.view(torch.int64) & 0x7FF0000000000000).view(torch.float64)
    return power.clamp_(min=info.tiny).mul_(info.eps)


def _map(change: Callable[[Any], Any], x: Any) -> Any:
    return type(x)([change(y) for y in x]) if isinstance(x, (list, tuple)) else change(x)


class Rounding:
    """One draw of the model: each number that is stored is rounded at random to one of its two
    neighbours in its type, to the nearer one more often (stochastic rounding).

    It is off by 0.41 units in the last place in the root mean square, a rounding to nearest by
    0.29. And what the type holds stays what it is: a probability of 1 - 1e-12 is 1, in the model as
    in any code, and 1 less a sum of such is 0. (Half a unit up or down, as it was once, made of it
    an error that long rows' gradients multiply by thousands: then anything passes.)

    `leaf(x)` is x in a tensor that says it has x's type and holds float64. What is computed from
    it, its gradient included, is computed in float64 and then rounded to the type in which plain
    code would store it: R, unit rows and probabilities to the input's type, log-sum-exps and losses
    to float32, and a score of size 1/tau to a unit that is as much coarser.

    In a float32 matrix product every partial sum is rounded too: each library adds in an order of
    its own, and one after the other is the order with most roundings. The many of one sum are drawn
    at once, from a normal distribution with the variance of roundings to nearest. (Partial sums of
    shorter types are float32, which is nothing beside the result's rounding.)
    """

    def __init__(self, seed: int, device: torch.device | str = "cpu") -> None:
        self.generator = torch.Generator(device).manual_seed(seed)

    def leaf(self, x: Tensor) -> Tensor:
        held = _Rounded(x.detach().double(), x.dtype, self)
        return held.requires_grad_(x.requires_grad)

    def move(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x rounded to numbers of `dtype`; what is not finite stays."""
        unit = _unit(x, dtype)
        units = x / unit
        below = units.floor()
        draw = torch.empty_like(x).uniform_(generator=self.generator)
        moved = below.add_(draw < units.sub_(below)).mul_(unit)
        return torch.where(x.isfinite(), moved, x)

    def add_up(self, product: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """The float32 product of a [..., M, K] and b [..., K, N], with the roundings of its K - 1
        additions."""
        length = a.shape[-1]
        ends = sorted({length * i // PARTIAL_SUMS for i in range(PARTIAL_SUMS + 1)})
        partial, squares = torch.zeros_like(product), torch.zeros_like(product)
        for begin, end in itertools.pairwise(ends):
            partial += a[..., begin:end] @ b[..., begin:end, :]
            unit = _unit(partial, torch.float32)
            squares.addcmul_(unit, unit, value=(end - max(begin, 1)) / 12)
        squares.masked_fill_((product == 0) | ~product.isfinite(), 0)
        noise = partial.normal_(generator=self.generator)
        return noise.mul_(squares.sqrt_()).add_(product)


class _Rounded(Tensor):
    held: Tensor
    rounding: Rounding

    @staticmethod
    def __new__(cls, held: Tensor, dtype: torch.dtype, rounding: Rounding) -> _Rounded:
        made: _Rounded = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=dtype,
            device=held.device,
        )
        made.held, made.rounding = held, rounding
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Rounded({self.held}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        operands: list[Tensor] = []
        promoted: list[torch.dtype] = []
        asked: list[torch.dtype] = []
        roundings: list[Rounding] = []

        def open_(x: Any) -> Any:
            if isinstance(x, torch.dtype) and x.is_floating_point:
                asked.append(x)
                return torch.float64
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            if isinstance(x, _Rounded):
                roundings.append(x.rounding)
            held = x.held if isinstance(x, _Rounded) else x.double()
            operands.append(held)
            promoted.append(x.dtype)
            return held

        args_ = [_map(open_, x) for x in args]
        kwargs_ = {k: open_(x) for k, x in (kwargs or {}).items()}
        # A 0-d tensor takes part in promotion only among its like.
        arrays = [t for t, x in zip(promoted, operands, strict=True) if x.dim()] or promoted
        dtype = arrays[0]
        for other in arrays[1:]:
            dtype = torch.promote_types(dtype, other)
        name, in_place = func.overloadpacket.__name__, func._schema.is_mutable
        rounds = name not in EXACT
        if asked:
            if name == "_to_copy":
                rounds = torch.finfo(asked[0]).eps > torch.finfo(dtype).eps
            dtype = asked[0]
        out = func(*args_, **kwargs_)

        def close(x: Any) -> Any:
            if not isinstance(x, Tensor) or x.dtype != torch.float64:
                return x
            if name in PRODUCTS and dtype == torch.float32:
                x = roundings[0].add_up(x, *operands[-2:])
            if rounds:
                x = roundings[0].move(x, dtype)
            return _Rounded(x, dtype, roundings[0])

        if in_place:
            target = args[0]
            assert isinstance(target, _Rounded) and out is target.held, f"{func} on a plain tensor"
            if rounds:
                out.copy_(roundings[0].move(out, target.dtype))
            return target
        return _map(close, out)


def held(x: Tensor) -> Tensor:
    """The float64 numbers of what was computed from `Rounding.leaf`."""
    return x.held if isinstance(x, _Rounded) else x.double()


@dataclass(frozen=True)
class Yardstick:
    """Results by name: of the definition in float64, of eager code in the input's type, and of the
    model of its rounding."""

    exact: Mapping[str, Tensor]
    eager: Mapping[str, Tensor]
    rounded: Sequence[Mapping[str, Tensor]]


def _norms(x: Tensor) -> tuple[float, float]:
    """Root mean square and largest."""
    x = x.double()
    if not x.numel():
        return 0.0, 0.0
    return float(torch.linalg.vector_norm(x) / x.numel() ** 0.5), float(x.abs().max())


@dataclass(frozen=True)
class Error:
    """Of one tensor in one norm, as is its budget."""

    tensor: str
    norm: str
    error: float
    budget: float
    size: float

    @property
    def share(self) -> float:
        """Of the budget."""
        return self.error / self.budget if self.budget else (float("inf") if self.error else 0.0)

    @property
    def passes(self) -> bool:
        """False also where something is not finite."""
        return self.error <= self.budget < float("inf")


class Budget:
    """|fused - exact| <= 2 max(|eager - exact|, |rounded - exact|) + one rounding, in the l2 and in
    the max norm.

    Each error is a root mean square over the problems that were added; of the model's draws, the
    largest counts. The 2 is the promise: a fused result errs at most twice as much as eager code.
    The one rounding is that of storing the result.

    Why the largest: where an error is one number (a temperature's gradient, a largest entry), right
    code exceeds twice the root mean square of four draws in 3 of 100 checks of three problems,
    twice the largest in 2 of 1,000.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.rounding = torch.finfo(dtype).eps / 2
        self.squares: dict[tuple[str, str], list[float]] = {}
        self.problems = 0

    def add(self, yardstick: Yardstick, fused: Mapping[str, Tensor]) -> None:
        self.problems += 1
        for name, truth in yardstick.exact.items():
            exact = held(truth)

            def error(found: Mapping[str, Tensor]) -> tuple[float, float]:
                return _norms(held(found[name]) - exact)  # noqa: B023

            drawn = [error(r) for r in yardstick.rounded] or [(0.0, 0.0)]
            columns = (_norms(exact), error(fused), error(yardstick.eager))
            for i, norm in enumerate(("l2", "max")):
                total = self.squares.setdefault((name, norm), [0.0] * 4)
                for k, x in enumerate(
                    (*(c[i] ** 2 for c in columns), max(d[i] ** 2 for d in drawn))
                ):
                    total[k] += x

    def errors(self) -> list[Error]:
        assert self.problems
        found = []
        for (name, norm), total in self.squares.items():
            size, fused, eager, model = ((x / self.problems) ** 0.5 for x in total)
            budget = 2 * max(eager, model) + self.rounding * size
            found.append(Error(name, norm, fused, budget, size))
        return found

    def check(self) -> None:
        over = [e for e in self.errors() if not e.passes]
        assert not over, "over the error budget: " + "; ".join(
            f"{e.tensor} ({e.norm}): error {e.error:.3e} is {e.share:.3g} x its budget, "
            f"size {e.size:.3e}"
            for e in over
        )
