"""COURIER training losses, fused and exact: contrastive user intention reconstruction,
arXiv 2306.05001."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .loss import (
        ClickSequenceLoss,
        ReconstructionLoss,
        ReconstructionStats,
        click_sequence_loss,
        reconstruct,
        reconstruction_loss,
    )
    from .memory import EmbeddingMemory
    from .serve.load import load

__version__ = "0.1.0"

__all__ = [
    "ClickSequenceLoss",
    "EmbeddingMemory",
    "ReconstructionLoss",
    "ReconstructionStats",
    "click_sequence_loss",
    "load",
    "reconstruct",
    "reconstruction_loss",
]

# Imported when they are asked for: embeddings are served without torch, and training needs nothing
# of serving.
_MODULES = dict.fromkeys(__all__, "loss") | {"EmbeddingMemory": "memory", "load": "serve.load"}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
