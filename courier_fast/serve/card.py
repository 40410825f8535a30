"""MODEL_CARD.md: what people ask of a model, in the form that model hubs read."""

from __future__ import annotations

import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .contract import Contract

NAME = "MODEL_CARD.md"


def write_card(folder: Path, contract: Contract) -> None:
    """Writes the card of an export; everything in it is from its contract."""
    environment = Environment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"yaml": _yaml, "signed": _signed, "interval": _interval_text}
    source = files("courier_fast.serve").joinpath("MODEL_CARD.md.jinja").read_text("utf-8")
    text = environment.from_string(source).render(
        c=contract,
        about=contract.encoder["about"],
        hub_licence=_hub_licence(contract.licence or ""),
        model=next(
            (e["name"] for e in contract.files if e["name"].endswith((".onnx", ".pt2"))), ""
        ),
    )
    (folder / NAME).write_text(text, "utf-8")


def _yaml(text: Any) -> str:
    """A YAML scalar: JSON is YAML."""
    return json.dumps(str(text), ensure_ascii=False)


def _hub_licence(licence: str) -> str:
    """The licence if it looks like an identifier (apache-2.0), else "other", with its name."""
    return licence.lower() if re.fullmatch(r"[A-Za-z0-9.\-]+", licence) else "other"


def _signed(value: dict[str, float]) -> str:
    mean, low, high = (round(value[n], 4) + 0.0 for n in ("mean", "low", "high"))  # no -0.0000
    return f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"


def _interval_text(value: dict[str, float]) -> str:
    return f"{value['mean']:.3f} ({value['low']:.3f} to {value['high']:.3f})"
