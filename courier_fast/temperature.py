"""The temperature: checked, or held by a module, fixed or learned."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import ops
from .packing import describe, watches_values


def check_temperature(
    temperature: Any, device: torch.device, validate: bool
) -> tuple[Tensor | None, float]:
    """(tensor, float): exactly one of them is used."""
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or not temperature.is_floating_point():
            raise ValueError(
                f"temperature: expected a float or a 0-d floating tensor, got {describe(temperature)}"
            )
        if temperature.device != device:
            if temperature.device.type != "cpu":
                raise ValueError(
                    f"temperature: expected a tensor on {device}, got {temperature.device}"
                )
            # The host does not wait: what is read there was copied before the call returns.
            temperature = temperature.to(device, non_blocking=True)
        if (
            watches_values()
            and (validate or device.type == "cpu")
            and not float(temperature.detach()) > 0
        ):
            raise ValueError(
                f"temperature: expected a value above 0, got {float(temperature.detach())}"
            )
        return temperature, 0.0
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"temperature: expected a float or a 0-d tensor, got {describe(temperature)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite value above 0, got {temperature}")
    return None, float(temperature)


class _ClampMax(torch.autograd.Function):
    """min(x, limit), with the gradient of x where it is not clamped or where a descent step leads back below."""

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
    """The same for torch.func. Not for every call: with setup_context, torch spends 10 us on the signature."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:  # type: ignore[override]
        return x.clamp(max=limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.limit = inputs
        ctx.save_for_backward(x)


class WithTemperature(nn.Module):
    """A fixed temperature, or one learned as log(1/tau) and clamped from below."""

    log_inverse_temperature: nn.Parameter | None

    def __init__(self, temperature: float, learnable: bool, minimum: float) -> None:
        super().__init__()
        if isinstance(temperature, Tensor):
            raise TypeError(f"temperature: expected a float, got {describe(temperature)}")
        check_temperature(temperature, torch.device("cpu"), False)
        if (
            isinstance(minimum, bool)
            or not isinstance(minimum, (int, float))
            or not 0 < minimum < math.inf
        ):
            raise ValueError(f"min_temperature: expected a finite value above 0, got {minimum!r}")
        if learnable and temperature < minimum:
            raise ValueError(
                f"temperature: expected at least min_temperature {minimum}, got {temperature}"
            )
        self._fixed, self._minimum = float(temperature), float(minimum)
        start = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable else None
        self.register_parameter("log_inverse_temperature", start)

    @property
    def temperature(self) -> float | Tensor:
        """The current temperature: a float, or a 0-d float32 tensor if it is learned."""
        if self.log_inverse_temperature is None:
            return self._fixed
        clamp = _TransformedClampMax if ops.transformed() else _ClampMax
        clamped = clamp.apply(self.log_inverse_temperature.float(), -math.log(self._minimum))
        return torch.exp(-clamped)

    def extra_repr(self) -> str:
        if self.log_inverse_temperature is None:
            return f"temperature={self._fixed:g}"
        now = float(torch.exp(-self.log_inverse_temperature.detach()))
        return (
            f"temperature={now:.4g}, learnable_temperature=True, min_temperature={self._minimum:g}"
        )
