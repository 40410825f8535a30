"""The arguments of a call, checked, and the fields of a `Problem` that they make."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..surroundings import cast, watches_values
from . import operators, reference
from .layouts import (
    Given,
    as_bool,
    as_index,
    check_index,
    describe,
    require_flag,
    require_size,
    require_tensor,
    shown,
    side,
)
from .options import CHOICES as _CHOICES

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

CHOICES = _CHOICES | {"impl": ("auto", "reference", *operators.IMPLEMENTATIONS)}


# ---- options -------------------------------------------------------------------------------------


def check_choices(**values: Any) -> None:
    for name, value in values.items():
        if not isinstance(value, str) or value not in CHOICES[name]:
            kind = ValueError if isinstance(value, str) else TypeError
            raise kind(
                f"{name}: expected one of {', '.join(map(repr, CHOICES[name]))}, got {shown(value)}"
            )


def check_workspace(workspace: Any) -> None:
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        raise TypeError(f"workspace: expected an int (bytes), got {describe(workspace)}")
    if workspace < 1:
        raise ValueError(f"workspace: expected at least 1 byte, got {shown(workspace)}")
    if workspace >= 1 << 63:
        raise ValueError(f"workspace: expected less than 2**63 bytes, got {shown(workspace)}")


def attention_of(attention: str | None, direction: str) -> str:
    """What trained the best embeddings (docs/hm-fashion.md), where a direction has it."""
    if attention is not None:
        return attention
    plain = isinstance(direction, str) and direction == "reconstruct"
    return "candidate" if plain else "anchor"


def check_reconstructed(**others: Any) -> None:
    """`others`: what R is made of; where it is given, they are None."""
    given = [name for name, x in others.items() if x is not None]
    if given:
        raise ValueError(
            "reconstructed: expected no history, attention, query, key or value beside it, got "
            + " and ".join(f"{name} ({shown(others[name])})" for name in given)
        )


def finite(name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: expected a float, got {describe(x)}")
    if not abs(x) <= sys.float_info.max:
        raise ValueError(f"{name}: expected a finite value, got {shown(x)}")
    return float(x)


@dataclass(frozen=True)
class Attention:
    """The attention's arguments, as the user gives them."""

    kind: str
    scale: float | None
    temperature: float | None
    heads: Any

    def __post_init__(self) -> None:
        require_size("num_heads", self.heads)
        given = [n for n in ("scale", "temperature") if getattr(self, n) is not None]
        for name in given:
            finite(f"attention_{name}", getattr(self, name))
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(
                f"attention_temperature: expected a value above 0, got {self.temperature}"
            )
        most = 0 if self.kind == "mean" else 1
        if len(given) > most:
            what = "none with attention 'mean'" if most == 0 else "at most one of the two"
            raise ValueError(
                f"attention_scale and attention_temperature: expected {what}, got "
                + " and ".join(f"attention_{n} {getattr(self, n)}" for n in given)
            )

    def of(self, dim: int) -> dict[str, Any]:
        """Fields of the Problem; raises ValueError if the heads do not divide the dimension."""
        heads = self.heads
        if dim % heads:
            raise ValueError(
                f"num_heads: expected a divisor of the embedding dimension {dim}, "
                f"got {shown(heads)}"
            )
        scale = (dim // heads) ** -0.5 if self.scale is None else float(self.scale)
        if self.temperature is not None:
            scale = 1.0 / self.temperature
        return {
            # The mean of a history is that of every candidate.
            "attention": "candidate" if self.kind == "candidate" and scale else "anchor",
            "cosine": self.kind == "candidate" and self.temperature is not None,
            "attention_scale": 0.0 if self.kind == "mean" else scale,
            "num_heads": heads,
        }


# ---- tensors -------------------------------------------------------------------------------------


def _float_rows(name: str, x: Any, like: Tensor | None) -> Tensor:
    x = require_tensor(name, x)
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected a floating tensor (embeddings), got {x.dtype}")
    if like is not None and x.dtype != like.dtype:
        raise TypeError(
            f"{name}: expected {like.dtype}, the type of the other embeddings, got {x.dtype}"
        )
    return x if like is None else _on_device(name, x, like.device)


def _on_device(name: str, x: Tensor, device: torch.device) -> Tensor:
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {x.device}")
    return x


def _table(embeddings: Any) -> Tensor:
    table = _float_rows("embeddings", embeddings, None)
    if table.dim() != 2 or table.is_nested:
        raise ValueError(f"embeddings: expected shape [items, D], got {describe(table)}")
    return table


def _same_layout(pv: Given, history: Given) -> None:
    if (pv.x.is_nested != history.x.is_nested) or (
        (pv.offsets is None) != (history.offsets is None)
    ):
        raise ValueError(
            "pv and history: expected the same layout (both padded, both packed with offsets, "
            "or both nested), "
            f"got pv {describe(pv.x)} with{'' if pv.offsets is not None else 'out'} pv_offsets and "
            f"history {describe(history.x)} "
            f"with{'' if history.offsets is not None else 'out'} history_offsets"
        )


def _unit_heads(x: Tensor, heads: int) -> Tensor:
    """Rows divided by their length, head by head."""
    return reference.normalize(x.view(len(x), heads, x.shape[1] // heads)).reshape(x.shape)


def fields_of_given(
    rows: Tensor, index: Tensor | None, offsets: Tensor, r: Tensor | None, mask: Tensor | None
) -> dict[str, Any]:
    """Fields of a Problem of these PV rows, or a table and the index into it, whose R is given: no
    page has a history."""
    return {
        "pv": rows,
        "pv_index": index,
        "pv_offsets": offsets,
        "history_offsets": torch.zeros_like(offsets),
        "history": rows.detach()[:0] if index is None else None,
        "history_index": None if index is None else index[:0],
        "history_mask": None,
        **dict.fromkeys(("query", "key", "value")),
        "attention_scale": 0.0,
        "reconstructed": r,
        "reconstructed_mask": mask,
    }


class CheckedInputs:
    """The embeddings of a call, checked and in one type, and the layout of each side.

    Args:
        given: the sides: PV and history, or the history alone. Tensors with a value per item follow
            the first.
        embeddings: the table that they index, or None.
        projections: query, key and value, or R, where a loss has them.
    """

    def __init__(
        self, given: Sequence[Given], embeddings: Any, validate: bool, **projections: Any
    ) -> None:
        require_flag("validate", validate)
        self.validate = bool(validate)
        self._unused: list[Tensor] = []
        for g in given:
            require_tensor(g.name, g.x)
        table = None if embeddings is None else _table(embeddings)
        for g in given:
            if table is None:
                _float_rows(g.name, g.x, None)
            else:
                as_index(g.name, g.x)
        for name, x in projections.items():
            if x is not None:
                require_tensor(name, x)
        found = cast(given[0].x, *(g.x for g in given), *projections.values(), table)
        self._inputs = dict(zip((*(g.name for g in given), *projections), found, strict=False))
        table = found[-1]
        self._table = None if table is None else table.contiguous()
        source = found[0] if table is None else table
        assert source is not None
        self._source = source
        self.device = source.device
        for g in given:
            g.x = self._inputs[g.name]
            if table is None:
                _float_rows(g.name, g.x, source)
            else:
                _on_device(g.name, g.x, self.device)
        if len(given) == 2:
            _same_layout(*given)
        features = 1 if table is None else 0
        self.sides = {g.name: side(g, features, self.device, validate) for g in given}
        self.items, *others = self.sides.values()
        pages = self.items.offsets.shape[0] - 1
        for other in others:
            found = other.offsets.shape[0] - 1
            if found != pages:
                raise ValueError(
                    f"{other.name}: expected {pages} pages, as in {self.items.name}, got {found}"
                )
        self.dim = (source.values() if source.is_nested else source).shape[-1]
        if self.dim == 0:
            name = self.items.name if table is None else "embeddings"
            raise ValueError(f"{name}: expected an embedding dimension of at least 1, got 0")

    @property
    def _precise(self) -> torch.dtype:
        """The type of what the scores are computed from, beside the embeddings."""
        return torch.float64 if self._source.dtype == torch.float64 else torch.float32

    def rows(self, name: str) -> tuple[Tensor, Tensor | None]:
        """A side's rows, or the table and the index into it."""
        layout, x = self.sides[name], self._inputs[name]
        assert x is not None
        if self._table is None:
            return layout.flatten(name, x, (self.dim,)), None
        index = as_index(name, layout.flatten(name, x, ()))
        size = self._table.shape[0]
        index = check_index(name, index, layout.live(), size, self.validate)
        return self._table, index

    def _projection(self, name: str, of: str) -> Tensor | None:
        x = self._inputs[name]
        if x is None:
            return None
        return self.sides[of].flatten(name, _float_rows(name, x, self._source), (self.dim,))

    def fields(self, attention: Attention, clicked: Any | None) -> dict[str, Any]:
        """Those of a Problem that say what is attended to, and by whom."""
        options = attention.of(self.dim)
        query, key = self._projection("query", "pv"), self._projection("key", "history")
        if not options["attention_scale"]:
            # 0 times a product is not computed: what it is made of may be infinite.
            self._unused, query, key = [x for x in (query, key) if x is not None], None, None
        fields: dict[str, Any] = {
            "query": query,
            "key": key,
            "value": self._projection("value", "history"),
            "clicked": None if clicked is None else self._clicked(clicked),
        } | options
        for name, layout in self.sides.items():
            fields[f"{name}_offsets"], fields[f"{name}_mask"] = layout.offsets, layout.mask
            fields[name], fields[f"{name}_index"] = self.rows(name)
        if attention.temperature is not None and not options["cosine"]:
            # Attention on unit vectors is that of projections: one query a row costs little.
            for name, of in (("query", "pv"), ("key", "history")):
                x, index = fields[name], fields[f"{of}_index"]
                if x is None:
                    x = fields[of] if index is None else fields[of][index]
                live = self.sides[of].live()
                if live is not None:  # whatever padding holds
                    x = torch.where(live[:, None], x, 0)
                fields[name] = _unit_heads(x, options["num_heads"])
        if self._table is not None:
            fields["history"] = None
        return fields

    def fields_of_reconstructed(self, clicked: Any, mask: Any | None) -> dict[str, Any]:
        """`fields`, where R is given."""
        layout = self.sides["pv"]
        fields = {"pv_mask": layout.mask, "clicked": self._clicked(clicked)}
        r = self._projection("reconstructed", "pv")
        mask = None if mask is None else self._bools("reconstructed_mask", mask)
        return fields | fields_of_given(*self.rows("pv"), layout.offsets, r, mask)

    def attached(self, x: Tensor) -> Tensor:
        """With a gradient of zeros for inputs that have no influence."""
        for unused in self._unused:
            x = x + unused[:0].sum().to(x.dtype)
        return x

    def temperature(self, temperature: float | Tensor) -> dict[str, Any]:
        """The fields `temperature` and `tau`."""
        tensor, tau = check_temperature(temperature, self.device, self.validate)
        return {"temperature": None if tensor is None else tensor.to(self._precise), "tau": tau}

    def _per_item(self, name: str, x: Any, of: str | None = None) -> Tensor:
        x = _on_device(name, require_tensor(name, x), self.device)
        return (self.items if of is None else self.sides[of]).flatten(name, x, ())

    def _bools(self, name: str, x: Any) -> Tensor:
        return as_bool(name, self._per_item(name, x), self.items, self.validate)

    def _clicked(self, clicked: Any) -> Tensor:
        found = self._bools("clicked", clicked)
        if clicked.is_nested:  # results are in its layout
            self.items.like = clicked
        return found

    def ids(self, name: str, x: Any, of: str | None = None) -> Tensor | None:
        """Integers, one per item, or per row of the side `of`."""
        return None if x is None else as_index(name, self._per_item(name, x, of))

    def floats(self, name: str, x: Any) -> Tensor | None:
        """Floats, one per item; they take no gradient."""
        if x is None:
            return None
        if not require_tensor(name, x).is_floating_point():
            raise TypeError(f"{name}: expected a floating tensor, got {x.dtype}")
        return self._per_item(name, x).detach().to(self._precise)

    def weights(self, x: Any) -> Tensor | None:
        """`floats` of at least 0."""
        weights = self.floats("weights", x)
        if weights is None or not watches_values(weights, self.validate):
            return weights
        bad = ~(torch.isfinite(weights) & (weights >= 0))
        live = self.items.live()
        if live is not None:
            bad = bad & live
        if bool(bad.any()):
            raise ValueError(
                f"weights: expected finite values of at least 0, got {float(weights[bad][0])}"
            )
        return weights


def check_temperature(
    temperature: Any, device: torch.device, validate: bool
) -> tuple[Tensor | None, float]:
    """(0-d tensor, float): exactly one of them is used."""
    if isinstance(temperature, Tensor):
        require_tensor("temperature", temperature)
        if not temperature.is_floating_point() or tuple(temperature.shape) not in ((), (1,)):
            raise ValueError(
                "temperature: expected a float or a 0-d floating tensor, got "
                f"{describe(temperature)}"
            )
        if temperature.dim():
            temperature = temperature.reshape(())
        if temperature.device != device:
            if temperature.device.type != "cpu":
                raise ValueError(
                    f"temperature: expected a tensor on {device}, got {temperature.device}"
                )
            # The host does not wait: what is read there was copied before the call returns.
            temperature = temperature.to(device, non_blocking=True)
        if watches_values(temperature, validate) and not float(temperature.detach()) > 0:
            raise ValueError(
                f"temperature: expected a value above 0, got {float(temperature.detach())}"
            )
        return temperature, 0.0
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"temperature: expected a float or a 0-d tensor, got {describe(temperature)}"
        )
    if not 0 < temperature <= sys.float_info.max:
        raise ValueError(f"temperature: expected a finite value above 0, got {shown(temperature)}")
    return None, float(temperature)
