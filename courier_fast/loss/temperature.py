"""The temperature: checked, or held by a module, fixed or learned."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..surroundings import has_values
from . import operators
from .arguments import check_temperature
from .layouts import describe, require_flag, shown


class _ClampMax(torch.autograd.Function):
    """min(x, limit), with the gradient of x where it is not clamped or where a descent step leads
    back below."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        # An ordinary clamp has no gradient beyond the limit: a step past it could never be undone.
        return torch.where((x <= ctx.limit) | (grad > 0), grad, 0.0), None


class _TransformedClampMax(_ClampMax):
    """The same for torch.func. Not for every call: with setup_context, torch spends 10 us on the
    signature."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:  # type: ignore[override]
        return x.clamp(max=limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.limit = inputs
        ctx.save_for_backward(x)


class WithTemperature(nn.Module):
    """A fixed temperature, or one learned as log(1/tau) and clamped from below.

    The parameter has shape [1], as FSDP2 shards nothing of no dimension; saved ones of shape []
    load.
    """

    log_inverse_temperature: nn.Parameter | None

    def __init__(self, temperature: float, learnable: bool, minimum: float) -> None:
        super().__init__()
        require_flag("learnable_temperature", learnable)
        if isinstance(temperature, Tensor):
            raise TypeError(f"temperature: expected a float, got {describe(temperature)}")
        check_temperature(temperature, torch.device("cpu"), False)
        if (
            isinstance(minimum, bool)
            or not isinstance(minimum, (int, float))
            or not 0 < minimum <= sys.float_info.max
        ):
            raise ValueError(
                f"min_temperature: expected a finite value above 0, got {shown(minimum)}"
            )
        if learnable and temperature < minimum:
            raise ValueError(
                f"temperature: expected at least min_temperature {minimum}, got {temperature}"
            )
        self._fixed, self._minimum = float(temperature), float(minimum)
        start = nn.Parameter(torch.empty(1, dtype=torch.float32)) if learnable else None
        self.register_parameter("log_inverse_temperature", start)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The temperature it was made with; for a module that was built on the device "meta"."""
        if self.log_inverse_temperature is not None:
            nn.init.constant_(self.log_inverse_temperature, -math.log(self._fixed))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        name = f"{prefix}log_inverse_temperature"
        found = state_dict.get(name)
        if self.log_inverse_temperature is not None and found is not None and found.dim() == 0:
            state_dict[name] = found.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def temperature(self) -> float | Tensor:
        """The current temperature: a float, or if it is learned a 0-d tensor, float32 (float64 if
        the parameter is)."""
        x = self.log_inverse_temperature
        if x is None:
            return self._fixed
        clamp = _TransformedClampMax if operators.transformed() else _ClampMax
        if x.dtype != torch.float64:
            x = x.float()
        return torch.exp(-clamp.apply(x.reshape(()), -math.log(self._minimum)))

    def extra_repr(self) -> str:
        if self.log_inverse_temperature is None:
            return f"temperature={self._fixed:g}"
        x, now = self.log_inverse_temperature.detach(), ""
        # A part of a sharded parameter, or one on the device "meta", has no value to show.
        if type(x) is Tensor and has_values(x):
            now = f"temperature={float(torch.exp(-x)):.4g}, "
        return f"{now}learnable_temperature=True, min_temperature={self._minimum:g}"
