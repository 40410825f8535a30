"""COURIER training losses: contrastive user intention reconstruction (arXiv 2306.05001), fused and exact."""

from .loss import (
    ClickSequenceLoss,
    ReconstructionLoss,
    ReconstructionStats,
    click_sequence_loss,
    reconstruct,
    reconstruction_loss,
)
from .memory import EmbeddingMemory

__version__ = "0.1.0"

__all__ = [
    "ClickSequenceLoss",
    "EmbeddingMemory",
    "ReconstructionLoss",
    "ReconstructionStats",
    "click_sequence_loss",
    "reconstruct",
    "reconstruction_loss",
]
