"""The named shapes that are measured."""

from __future__ import annotations

from courier_fast.testing.batches import Shape

SHAPES = {
    "tiny": Shape(48, 5, 6, 32, 0.4),
    "paper": Shape(3072, 5, 10, 256, 0.2),
    "paper50": Shape(3072, 5, 50, 256, 0.2),
    "big20": Shape(13107, 5, 20, 256, 0.2),
    "big100": Shape(13107, 5, 20, 256, 1.0),
    "big768": Shape(13107, 5, 20, 768, 1.0),
    "huge": Shape(52429, 5, 20, 256, 1.0),
}
