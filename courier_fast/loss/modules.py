"""The losses as modules, whose temperature may be learnt."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .arguments import CHOICES, Attention, attention_of, check_choices, check_workspace
from .cuda_graph import Graphs
from .functional import (
    LEFT_OUT,
    ReconstructionStats,
    click_sequence_loss,
    reconstruction_loss,
)
from .layouts import describe, require_flag
from .options import WORKSPACE
from .temperature import WithTemperature
from .union.exchange import Group, warn_of_early_none, warn_of_late_world

# ---- modules -------------------------------------------------------------------------------------


class LossModule(WithTemperature):
    """The options of each call, and its graphs."""

    _may_be_early = False  # in what was pickled before

    def __init__(
        self, temperature: tuple[float, bool, float], options: dict[str, Any], cuda_graph: bool
    ) -> None:
        if not isinstance(cuda_graph, bool):
            raise TypeError(f"cuda_graph: expected True or False, got {describe(cuda_graph)}")
        if cuda_graph and options["validate"]:
            raise ValueError(
                "cuda_graph and validate: expected at most one, as validation looks at values on "
                "the host, got both"
            )
        # Left out, it is None for good; given as None, it may be a WORLD that is not there yet.
        left_out = options["group"] is LEFT_OUT
        self._may_be_early = not left_out and warn_of_early_none(options["group"])
        if not left_out:
            options["group"] = Group(options["group"])
        if cuda_graph and options["group"].given is not None:
            raise ValueError(
                "cuda_graph: expected False with group, whose sizes the host has to know, got True"
            )
        super().__init__(*temperature)
        check_choices(**{name: options[name] for name in CHOICES if name in options})
        check_workspace(options["workspace"])
        for name in ("return_stats", "validate"):
            require_flag(name, options.get(name, False))
        self._graphs = Graphs() if cuda_graph else None
        self._options = options

    def extra_repr(self) -> str:
        options = self._options | {"cuda_graph": self._graphs is not None}
        return super().extra_repr() + "".join(
            f", {name}={value!r}"
            for name, value in options.items()
            if value is not None and repr(value) != "None"
        )

    def _arguments(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Of a call: the options, and what is given with it."""
        if self._may_be_early and "group" not in inputs and not torch.compiler.is_compiling():
            self._may_be_early = not warn_of_late_world()
        return self._options | inputs


class ReconstructionLoss(LossModule):
    """`reconstruction_loss` as a module: options at construction, tensors at the call.

    With `learnable_temperature` the parameter `log_inverse_temperature` holds log(1/tau) ([1],
    float32 whatever the default dtype; state dicts with shape [] load), and
    tau >= `min_temperature`; at that limit only gradients that raise tau pass. `reset_parameters`
    gives it its first value, for modules built on the device "meta". Other options as for
    `reconstruction_loss`. A `group` is shared by copies of the module and saved with it by its
    name: give "world" where the module is made before `init_process_group`, as
    `torch.distributed.group.WORLD` is None until then.

    With `cuda_graph`, forward and backward are captured as two CUDA graphs for each signature
    (shapes, types, which tensors are given, which take a gradient, options) and replayed
    afterwards: for small batches of fixed shape, whose launches cost the host more than the GPU. Up
    to 8 signatures are kept; other shapes are captured anew, so use the padded layout, or pad to a
    few sizes. A backward that comes after another call of the same signature computes its forward
    again. Under torch.compile, and inside somebody else's graph, the kernels are launched as usual.
    Raises RuntimeError where there is no CUDA device, and for implementations other than "triton".

        loss_fn = ReconstructionLoss(temperature=0.1)
        loss = loss_fn(pv, history, clicked, pv_mask=..., history_mask=...)
    """

    _attention_by_default = False  # in what was pickled before

    def __init__(
        self,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        min_temperature: float = 0.01,
        *,
        attention: str | None = None,
        attention_scale: float | None = None,
        attention_temperature: float | None = None,
        num_heads: int = 1,
        negatives: str = "batch",
        direction: str = "reconstruct",
        group: Any = LEFT_OUT,
        exchange: str = "auto",
        reduction: str = "mean",
        return_stats: bool = False,
        validate: bool = False,
        impl: str = "auto",
        workspace: int = WORKSPACE,
        cuda_graph: bool = False,
    ) -> None:
        options = {
            "attention": attention_of(attention, direction),
            "attention_scale": attention_scale,
            "attention_temperature": attention_temperature,
            "num_heads": num_heads,
            "negatives": negatives,
            "direction": direction,
            "reduction": reduction,
            "return_stats": return_stats,
            "validate": validate,
            "impl": impl,
            "workspace": workspace,
            "group": group,
            "exchange": exchange,
        }
        fixed_or_learned = (temperature, learnable_temperature, min_temperature)
        super().__init__(fixed_or_learned, options, cuda_graph)
        Attention(options["attention"], attention_scale, attention_temperature, num_heads)
        self._attention_by_default = attention is None

    def forward(
        self, pv: Tensor, history: Tensor | None, clicked: Tensor, **inputs: Any
    ) -> Tensor | tuple[Tensor, ReconstructionStats]:
        """`inputs`: the tensor arguments of `reconstruction_loss` (masks, offsets, embeddings,
        query, reconstructed, ids, weights, ...)."""
        arguments = self._arguments(inputs)
        if self._attention_by_default and inputs.get("reconstructed") is not None:
            arguments["attention"] = None
        return reconstruction_loss(
            pv,
            history,
            clicked,
            temperature=self.temperature,
            _graphs=self._graphs,
            **arguments,
        )


class ClickSequenceLoss(LossModule):
    """`click_sequence_loss` as a module; temperature, `cuda_graph` as in `ReconstructionLoss`."""

    def __init__(
        self,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        min_temperature: float = 0.01,
        *,
        group: Any = LEFT_OUT,
        exchange: str = "auto",
        reduction: str = "mean",
        validate: bool = False,
        impl: str = "auto",
        workspace: int = WORKSPACE,
        cuda_graph: bool = False,
    ) -> None:
        options = {
            "reduction": reduction,
            "validate": validate,
            "impl": impl,
            "workspace": workspace,
            "group": group,
            "exchange": exchange,
        }
        fixed_or_learned = (temperature, learnable_temperature, min_temperature)
        super().__init__(fixed_or_learned, options, cuda_graph)

    def forward(self, history: Tensor, **inputs: Any) -> Tensor:
        """`inputs`: tensors of `click_sequence_loss` (mask, offsets, embeddings, item_ids)."""
        return click_sequence_loss(
            history, temperature=self.temperature, _graphs=self._graphs, **self._arguments(inputs)
        )
