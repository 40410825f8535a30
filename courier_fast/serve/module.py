"""What is exported: an encoder with everything that follows the decoded picture."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..train.encoder import Encoder


class Serving(nn.Module):
    """uint8 RGB [B, size, size, 3] to embeddings [B, dim] float32 of length 1: y / |y|,
    y = encoder((x / 255 - mean) / std).

    An encoder of features takes them as they are, float32 [B, F].
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.takes_images = encoder.about["backbone"] is not None
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(getattr(encoder, name), dtype=torch.float32))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        if self.takes_images:
            x = ((x.to(self.mean.dtype) / 255 - self.mean) / self.std).permute(0, 3, 1, 2)
        return functional.normalize(self.encoder(x), dim=1)

    def example(self) -> Tensor:
        """Two inputs: of one, an exporter would take the batch size for a constant."""
        if self.takes_images:
            return torch.zeros(2, self.encoder.size, self.encoder.size, 3, dtype=torch.uint8)
        return torch.zeros(2, self.encoder.features)
