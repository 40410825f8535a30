"""COURIER training losses, fused and exact: contrastive user intention reconstruction,
arXiv 2306.05001."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .lazy import find_moved, lazy

if TYPE_CHECKING:
    from .loss.courier import CourierLoss, CourierParts
    from .loss.functional import (
        ReconstructionStats,
        click_sequence_loss,
        reconstruct,
        reconstruction_loss,
    )
    from .loss.memory import EmbeddingMemory
    from .loss.modules import ClickSequenceLoss, ReconstructionLoss
    from .serve.load import load

__version__ = "0.1.0"

__all__ = [
    "ClickSequenceLoss",
    "CourierLoss",
    "CourierParts",
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
__getattr__, __dir__ = lazy(
    __name__,
    dict.fromkeys(__all__, "loss.functional")
    | dict.fromkeys(["ClickSequenceLoss", "ReconstructionLoss"], "loss.modules")
    | dict.fromkeys(["CourierLoss", "CourierParts"], "loss.courier")
    | {"EmbeddingMemory": "loss.memory", "load": "serve.load"},
)
find_moved()
