"""Rows of embeddings from images, in order, a batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from .sources import RowSource

# ---- encoding ------------------------------------------------------------------------------------

Array = npt.NDArray


def encode(
    model: Callable[[Tensor], Tensor],
    source: RowSource,
    rows: Array,
    *,
    batch: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[Array, Array, Array]]:
    """Batches (rows [n], embeddings [n, D] float32 with NaN for damaged images, damaged [n]) of
    some rows of `source`, in their order.

    The next batch is decoded while one is encoded. Batches are cut from the start of `rows`, so an
    interrupted pass that goes on at a multiple of `batch` does the same arithmetic.

    Args:
        dtype: autocast to it; None: as the model is.
    """
    device = torch.device(device)
    training = isinstance(model, nn.Module) and model.training
    bounds = [*range(0, len(rows), batch), len(rows)]
    parts = [rows[a:b] for a, b in pairwise(bounds)]
    with ThreadPoolExecutor(1, "courier-embed") as ahead:
        if isinstance(model, nn.Module):
            model.eval()
        try:
            loading = ahead.submit(source.load, parts[0]) if parts else None
            for part, following in zip(parts, [*parts[1:], None], strict=True):
                assert loading is not None
                inputs, damaged = loading.result()
                if following is not None:
                    loading = ahead.submit(source.load, following)
                context = torch.autocast(device.type, dtype) if dtype else nullcontext()
                with torch.inference_mode(), context:
                    found = model(inputs.to(device, non_blocking=True)).float().cpu().numpy()
                wrong = ~np.isfinite(found).all(1) & ~damaged
                if wrong.any():
                    raise RuntimeError(
                        "encoder: expected finite embeddings, got NaN or infinity for "
                        f"{source.ids[int(part[wrong.argmax()])]}"
                    )
                found[damaged] = np.nan
                yield part, found, damaged
        finally:
            if isinstance(model, nn.Module):
                model.train(training)


def encode_all(
    model: Callable[[Tensor], Tensor],
    source: RowSource,
    *,
    batch: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Array:
    """Embeddings [rows, D] float32 of everything in `source`, in memory; NaN where an image is
    missing or damaged. ValueError without any."""
    table: Array | None = None
    rows = np.flatnonzero(source.present)
    for part, found, _ in encode(model, source, rows, batch=batch, device=device, dtype=dtype):
        if table is None:
            table = np.full((len(source.ids), found.shape[1]), np.nan, np.float32)
        table[part] = found
    if table is None:
        raise ValueError("images: expected at least one, got none")
    return table
