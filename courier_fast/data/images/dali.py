"""Decoding by NVIDIA DALI, on a GPU (nvJPEG, and the hardware decoder where there is one) or on a
CPU.

Pipeline mode fed by `external_source`: the caller says which images and windows, so nothing in DALI
has to be saved to resume. The GPU's and the CPU's pipeline differ in device names alone; what a GPU
does with it is not measured yet.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

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

from .pictures import MAX_PIXELS, fastest_reader, jpeg_header, stored_window, turn
from .software import Recycler, SoftwareDecoder

log = logging.getLogger(__name__)

Array = npt.NDArray


class DaliDecoder:
    """DALI behind the decoder interface; float16 or float32 pictures.

    DALI does JPEGs in grey or colour that have a start, an end and a body (`orientation_for_dali`:
    a few microseconds); all else is left to the software decoder, which knows every image by
    itself. Damage inside a JPEG's body that DALI passes over stays unseen, so images should be
    decoded once when data are prepared. Where a run fails all the same, DALI loses the whole batch
    and does not reliably name the image: the batch is halved until the image stands alone, and that
    one goes to the software decoder too.

    Args:
        on_gpu: decode on `device`, a GPU; else on the CPU.

    Raises:
        ValueError: another dtype than float16 and float32.
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
        # Another process makes its own pipeline.
        self._again = partial(
            DaliDecoder,
            size,
            device=device,
            on_gpu=on_gpu,
            dtype=dtype,
            threads=threads,
            mean=mean,
            std=std,
        )
        self.size, self.device, self.on_gpu, self.dtype = size, device, on_gpu, dtype
        self.threads = threads
        self.mean, self.std = [255 * m for m in mean], [255 * s for s in std]
        self._software = SoftwareDecoder(
            fastest_reader(),
            size,
            device=device,
            dtype=dtype,
            threads=threads,
            mean=mean,
            std=std,
        )
        self._memory = Recycler()
        self._pipe: Any = None
        self._capacity = 0
        self._next: tuple[list[Array], ...] = ([], [], [], [])

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again, ()

    def _build(self, capacity: int) -> None:
        @pipeline_def(
            batch_size=capacity,
            num_threads=self.threads,
            device_id=(self.device.index or 0) if self.on_gpu else None,
            # The loader's thread runs ahead; DALI answers for the batch it was given.
            prefetch_queue_depth=1,
            exec_dynamic=False,  # keeps its output's memory
        )
        def pipeline():  # type: ignore[no-untyped-def]
            image, anchor, shape, mirror = fn.external_source(
                source=lambda: self._next,
                num_outputs=4,
                batch=True,
                no_copy=True,
                dtype=[types.UINT8, types.FLOAT, types.FLOAT, types.INT32],
                ndim=[1, 1, 1, 0],
            )
            # The windows given are those of the stored image, and `decode` turns the picture.
            x = fn.decoders.image_slice(
                image,
                anchor,
                shape,
                device="mixed" if self.on_gpu else "cpu",
                axis_names="HW",
                normalized_anchor=True,
                normalized_shape=True,
                adjust_orientation=False,
                hw_decoder_load=1.0,
            )
            x = fn.resize(
                x, size=(self.size, self.size), interp_type=types.INTERP_LINEAR, antialias=True
            )
            return fn.crop_mirror_normalize(
                x,
                dtype=types.FLOAT16 if self.dtype == torch.float16 else types.FLOAT,
                output_layout="HWC",
                mirror=mirror,
                mean=self.mean,
                std=self.std,
            )

        self._pipe, self._capacity = pipeline(), capacity
        self._pipe.build()

    def decode(self, images: Sequence[Array], windows: Array, flips: Array) -> tuple[Tensor, Array]:
        n, shape = len(images), (len(images), self.size, self.size, 3)
        if self.on_gpu:
            out = torch.empty(shape, dtype=self.dtype, device=self.device)
        else:
            kind = np.float16 if self.dtype == torch.float16 else np.float32
            out = torch.from_numpy(self._memory.take(shape, kind))
        windows = np.asarray(windows, np.float32).reshape(n, 4)
        orientations = np.array([orientation_for_dali(image) for image in images], np.int64)
        turned = orientations > 1
        stored, mirrors = windows.copy(), np.asarray(flips, np.int32).copy()
        for i in np.flatnonzero(turned).tolist():
            stored[i] = stored_window(windows[i], orientations[i])
            mirrors[i] = 0  # comes after turning
        done = np.zeros(n, bool)
        self._decode(np.flatnonzero(orientations > 0), images, stored, mirrors, out, done)
        for i in np.flatnonzero(turned & done).tolist():
            picture = turn(out[i], orientations[i])
            out[i] = (picture.flip(1) if flips[i] else picture).clone()
        damaged = np.zeros(n, bool)
        rest = np.flatnonzero(~done)
        if len(rest):
            pictures, damaged[rest] = self._software.decode(
                [images[i] for i in rest.tolist()], windows[rest], np.asarray(flips)[rest]
            )
            out[torch.from_numpy(rest).to(self.device)] = pictures.permute(0, 2, 3, 1)
        return out.permute(0, 3, 1, 2), damaged

    def _decode(
        self,
        rows: Array,
        images: Sequence[Array],
        windows: Array,
        mirrors: Array,
        out: Tensor,
        done: Array,
    ) -> None:
        """Pictures of some rows into `out`; `done` [n] says for which it went well."""
        if not len(rows):
            return
        try:
            pictures = self._run(rows, images, windows, mirrors)
        except RuntimeError as error:
            self._pipe = None  # no longer valid
            log.debug("DALI failed on a batch of %d: %s", len(rows), error)
            if len(rows) > 1:
                for half in np.array_split(rows, 2):
                    self._decode(half, images, windows, mirrors, out, done)
            return
        if len(rows) == len(out):
            out.copy_(pictures)
        else:
            out[torch.from_numpy(rows).to(self.device)] = pictures
        if self.on_gpu:  # the next run writes to the same memory
            torch.cuda.current_stream(self.device).synchronize()
        done[rows] = True

    def _run(self, rows: Array, images: Sequence[Array], windows: Array, mirrors: Array) -> Tensor:
        """Pictures [rows, size, size, 3] in DALI's memory, valid until the next run."""
        if self._pipe is None or len(rows) > self._capacity:
            # DALI fixes its largest batch when it is built: a little room, so that it is not built
            # for every new record.
            self._build(max(self._capacity, len(rows) + len(rows) // 4))
        # What DALI reads is held until it has run.
        self._next = (
            [images[i] for i in rows.tolist()],
            list(windows[rows, :2]),
            list(windows[rows, 2:]),
            list(mirrors[rows]),
        )
        return torch.from_dlpack(self._pipe.run()[0].as_tensor())

    def close(self) -> None:
        self._pipe = None
        self._next = ([], [], [], [])
        self._software.close()


def orientation_for_dali(image: Array) -> int:
    """EXIF orientation of a JPEG that DALI can be given; 0 for other formats and colour spaces, and
    what is seen to be damaged."""
    header = jpeg_header(image)
    if header is None or header.components not in (1, 3) or not header.has_body:
        return 0
    if header.height * header.width > MAX_PIXELS or b"\xff\xd9" not in image[-64:].tobytes():
        return 0
    return header.orientation
