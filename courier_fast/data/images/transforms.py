"""Crop windows and flips: drawn for a whole batch from one generator, applied by whichever decoder.

A window is (top, left, height, width) relative to the image as seen (after EXIF rotation), in [0,
1]; its picture is resized to a square.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Array = npt.NDArray

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_TRIES = 10


def random_windows(
    rng: np.random.Generator,
    shapes: Array,
    scale: tuple[float, float] = (0.5, 1.0),
    ratio: tuple[float, float] = (3 / 4, 4 / 3),
) -> Array:
    """Random resized crops [n, 4] float32, the rule of Inception training (Szegedy et al., arXiv
    1409.4842) for all images at once.

    The area is a uniform share in `scale`, the aspect ratio (width over height, in pixels)
    log-uniform in `ratio`; of ten draws the first that fits the image is taken, and without one the
    largest central window of an allowed ratio.

    Args:
        shapes: [n, 2] height and width in pixels as seen; (0, 0) (no image) gives the whole.
    """
    n = len(shapes)
    height, width = (np.maximum(shapes[:, i], 1).astype(np.float64) for i in (0, 1))
    draws = rng.random((4, n, _TRIES))
    area = (height * width)[:, None] * (scale[0] + (scale[1] - scale[0]) * draws[0])
    aspect = np.exp(np.log(ratio[0]) + (np.log(ratio[1]) - np.log(ratio[0])) * draws[1])
    w, h = np.sqrt(area * aspect), np.sqrt(area / aspect)
    # A hair of room, so that the whole of a square image is found to fit it.
    fits = (w <= width[:, None] * (1 + 1e-9)) & (h <= height[:, None] * (1 + 1e-9))
    first = fits.argmax(1)
    rows = np.arange(n)
    found = fits.any(1)
    own = np.clip(width / height, *ratio)
    h = np.where(found, h[rows, first], np.minimum(height, width / own))
    w = np.where(found, w[rows, first], np.minimum(width, height * own))
    h, w = np.minimum(h / height, 1.0), np.minimum(w / width, 1.0)
    top = np.where(found, draws[2, rows, first], 0.5) * (1 - h)
    left = np.where(found, draws[3, rows, first], 0.5) * (1 - w)
    windows = np.stack([top, left, h, w], 1).astype(np.float32)
    windows[(shapes <= 0).any(1)] = (0, 0, 1, 1)
    return windows


def eval_windows(shapes: Array, crop: float = 1.0) -> Array:
    """The central squares [n, 4] float32 whose side is `crop` times the shorter side, in pixels;
    (0, 0) gives the whole."""
    if not 0 < crop <= 1:
        raise ValueError(f"crop: expected a share in (0, 1], got {crop}")
    sides = np.maximum(shapes, 1).astype(np.float64)
    size = crop * sides.min(1, keepdims=True) / sides
    windows = np.concatenate([(1 - size) / 2, size], 1).astype(np.float32)
    windows[(shapes <= 0).any(1)] = (0, 0, 1, 1)
    return windows


def random_flips(rng: np.random.Generator, n: int) -> Array:
    """[n] bool, each True with probability one half."""
    return rng.random(n) < 0.5
