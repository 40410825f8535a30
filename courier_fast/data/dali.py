"""Decoding by NVIDIA DALI, on a GPU (nvJPEG, and the hardware decoder where there is one) or on a CPU.

Pipeline mode fed by `external_source`: the caller says which images and windows, so nothing in DALI has to be saved to resume.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

try:
    from nvidia.dali import fn, pipeline_def, types
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        'decoder: DALI is not installed: pip install "courier_fast[dali]"', name=error.name
    ) from None

from .decode import ThreadedDecoder, read_fast

Array = npt.NDArray


class DaliDecoder:
    """DALI behind the decoder interface; float16 or float32 pictures.

    DALI drops the whole batch for one damaged image and then names it at best, so images are first looked at (`plausible`: a few
    microseconds), and if a run still fails, the software decoder, which knows every image by itself, does that batch.

    Args:
        on_gpu: decode on `device`, a GPU; else on the CPU.
    """

    def __init__(
        self,
        size: int,
        *,
        device: torch.device,
        on_gpu: bool,
        dtype: torch.dtype = torch.float32,
        threads: int,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        if dtype not in (torch.float16, torch.float32):
            raise ValueError(f"dtype: expected float16 or float32 from DALI, got {dtype}")
        self.size, self.device, self.on_gpu, self.dtype, self.threads = (
            size,
            device,
            on_gpu,
            dtype,
            threads,
        )
        self.mean, self.std = [255 * m for m in mean], [255 * s for s in std]
        self._software = ThreadedDecoder(
            read_fast, size, device=device, dtype=dtype, threads=threads, mean=mean, std=std
        )
        self._pipe, self._capacity = None, 0
        self._next: tuple[list[Array], ...] = ([], [], [], [])

    def _build(self, capacity: int) -> None:
        kind = types.FLOAT16 if self.dtype == torch.float16 else types.FLOAT

        @pipeline_def(
            batch_size=capacity,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if self.on_gpu else None,
            prefetch_queue_depth=1,  # the loader's thread runs ahead; DALI has to answer for the batch it was given
            exec_dynamic=False,
        )
        def pipeline():  # type: ignore[no-untyped-def]
            image, anchor, shape, mirror = fn.external_source(
                source=lambda: self._next, num_outputs=4, batch=True, no_copy=True,
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32], ndim=[1, 1, 1, 0],
            )  # fmt: skip
            more = {"hw_decoder_load": 1.0} if self.on_gpu else {}
            x = fn.decoders.image_slice(
                image, anchor, shape, device="mixed" if self.on_gpu else "cpu", axis_names="HW",
                normalized_anchor=True, normalized_shape=True, **more,
            )  # fmt: skip
            x = fn.resize(
                x, size=(self.size, self.size), interp_type=types.INTERP_LINEAR, antialias=True
            )
            return fn.crop_mirror_normalize(
                x, dtype=kind, output_layout="HWC", mirror=mirror, mean=self.mean, std=self.std
            )

        self._pipe, self._capacity = pipeline(), capacity
        self._pipe.build()

    def decode(self, images: Sequence[Array], windows: Array, flips: Array) -> tuple[Tensor, Array]:
        good = np.array([plausible(image) for image in images], bool)
        out = torch.zeros(
            (len(images), self.size, self.size, 3), dtype=self.dtype, device=self.device
        )
        damaged = np.zeros(len(images), bool)
        rows = np.flatnonzero(good)
        try:
            if len(rows):
                out[torch.from_numpy(rows).to(self.device)] = self._run(
                    rows, images, windows, flips
                )
        except RuntimeError:
            # The pipeline is no longer valid and does not say which images were at fault.
            self._pipe = None
            good[:] = False
        rest = np.flatnonzero(~good)
        if len(rest):
            pictures, bad = self._software.decode(
                [images[i] for i in rest], windows[rest], flips[rest]
            )
            out[torch.from_numpy(rest).to(self.device)] = pictures.permute(0, 2, 3, 1)
            damaged[rest] = bad
        return out.permute(0, 3, 1, 2), damaged

    def _run(self, rows: Array, images: Sequence[Array], windows: Array, flips: Array) -> Tensor:
        if self._pipe is None or len(rows) > self._capacity:
            # DALI fixes its largest batch when it is built: a little room, so that it is not built for every new record.
            self._build(max(self._capacity, len(rows) + len(rows) // 4))
        # What DALI reads is held until it has run.
        self._next = (
            [images[i] for i in rows],
            list(np.ascontiguousarray(windows[rows, :2], np.float32)),
            list(np.ascontiguousarray(windows[rows, 2:], np.float32)),
            list(flips[rows].astype(np.int32)),
        )
        assert self._pipe is not None
        pictures = self._pipe.run()[0].as_tensor()
        if self.on_gpu:
            return torch.from_dlpack(pictures)
        return torch.from_numpy(np.asarray(pictures))

    def close(self) -> None:
        self._pipe = None
        self._software.close()


def plausible(image: Array) -> bool:
    """Whether a JPEG has its start and its end: what DALI can be given. Other formats take the software decoder."""
    if len(image) < 128 or image[0] != 0xFF or image[1] != 0xD8:
        return False
    return b"\xff\xd9" in image[-64:].tobytes()
