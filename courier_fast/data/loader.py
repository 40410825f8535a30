"""Batches with images: planned, read, decoded and moved to the device ahead of their step."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .batches import BatchPlan, PageBatch, padded_size
from .images.transforms import eval_windows, random_flips, random_windows

if TYPE_CHECKING:
    from .images.decode import Decoder

log = logging.getLogger(__name__)

Array = npt.NDArray


@dataclass(frozen=True)
class Batch:
    """What everything after the loader sees: the images of unique items, and pages as indices into
    them.

    `images` [n', ...] holds the images (or feature rows) of the `num_items` unique items; rows past
    them are padding, repeats of the first rows, so that few shapes occur. Index tensors are int64
    on the images' device.
    """

    images: Tensor  # [n', 3, S, S] or [n', F]
    num_items: int  # n
    pv_index: Tensor  # [N]
    history_index: Tensor  # [K]
    pv_offsets: Tensor  # [B + 1]
    history_offsets: Tensor  # [B + 1]
    clicked: Tensor  # [N] bool
    plan: PageBatch
    damaged: int  # images that could not be decoded
    step: int  # within the epoch


@dataclass(frozen=True)
class Augmentation:
    """Random resized crop (share of the area, aspect ratio) and horizontal flip."""

    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (0.75, 4 / 3)
    flip: bool = True


class DamagedImages:
    """Counts images that could not be decoded; logs each item once; raises above `limit` of all
    (after the first thousand)."""

    def __init__(self, item_ids: Sequence[object], limit: float) -> None:
        self.item_ids, self.limit = item_ids, limit
        self.seen = self.damaged = 0
        self._logged: set[int] = set()

    def add(self, items: Array, damaged: Array) -> int:
        self.seen += len(items)
        self.damaged += int(damaged.sum())
        for item in items[damaged].tolist():
            if item not in self._logged:
                self._logged.add(item)
                log.warning(
                    "image of item %s cannot be decoded: a neutral one takes its place",
                    self.item_ids[item],
                )
        if self.damaged > self.limit * max(self.seen, 1000):
            raise RuntimeError(
                f"{self.damaged} of {self.seen} images cannot be decoded, more than "
                f"data.max_damaged = {self.limit:g} of them; "
                f"{len(self._logged)} items, for example "
                f"{', '.join(str(self.item_ids[i]) for i in sorted(self._logged)[:5])}"
            )
        return int(damaged.sum())


class Images:
    """The images of some items, decoded; augmented if an `Augmentation` is given, by numbers drawn
    from (seed, counter) alone."""

    def __init__(
        self,
        plan: BatchPlan,
        decoder: Decoder,
        augmentation: Augmentation | None,
        *,
        max_damaged: float = 0.01,
    ) -> None:
        self.store, self.seed = plan.dataset.images, plan.seed
        self.decoder, self.augmentation = decoder, augmentation
        self.damaged = DamagedImages(plan.dataset.item_ids, max_damaged)

    def __call__(self, items: Array, counter: tuple[int, int, int]) -> tuple[Tensor, int]:
        shapes = self.store.shapes[items]
        if self.augmentation is None:
            windows, flips = eval_windows(shapes), np.zeros(len(items), bool)
        else:
            epoch, step, rank = counter
            # The seed is the key and where we are the counter: no state, so a resumed run draws the
            # same.
            rng = np.random.Generator(
                np.random.Philox(key=[self.seed, (1 << 32) + rank], counter=[0, 0, step, epoch])
            )
            windows = random_windows(rng, shapes, self.augmentation.scale, self.augmentation.ratio)
            flips = (
                random_flips(rng, len(items))
                if self.augmentation.flip
                else np.zeros(len(items), bool)
            )
        images, damaged = self.decoder.decode(self.store.take(items.tolist()), windows, flips)
        return images, self.damaged.add(items, damaged)


class Features:
    """Rows of a table of precomputed embeddings [items, F] in place of images."""

    def __init__(self, table: Array, device: torch.device) -> None:
        self.table, self.device = table, device

    def __call__(self, items: Array, counter: tuple[int, int, int]) -> tuple[Tensor, int]:
        rows = torch.from_numpy(np.ascontiguousarray(self.table[items], np.float32))
        return rows.to(self.device, non_blocking=True), 0


class Loader:
    """Iterates over the batches of an epoch; a thread works `ahead` batches in advance.

    Args:
        source: `Images` or `Features`.
        pad: pads the number of images to a few sizes (`padded_size`).
    """

    def __init__(
        self,
        plan: BatchPlan,
        source: Images | Features,
        *,
        device: torch.device | str = "cpu",
        pad: bool = False,
        buckets: tuple[int, ...] = (),
        ahead: int = 2,
    ) -> None:
        self.plan, self.source, self.device = plan, source, torch.device(device)
        self.pad, self.buckets, self.ahead = pad, buckets, ahead

    def load(self, epoch: int, step: int) -> Batch:
        """One batch, in this thread."""
        pages = self.plan.batch(epoch, step)
        n = len(pages.items)
        size = padded_size(n, self.buckets) if self.pad and n else n
        images, damaged = self.source(pages.items, (epoch, step, self.plan.rank))
        if size > n:
            # Repeats, not zeros: batch statistics of the backbone stay those of images.
            images = torch.cat([images, images[torch.arange(size - n, device=images.device) % n]])
        put = self._to_device
        return Batch(
            images=images,
            num_items=n,
            pv_index=put(pages.pv_index),
            history_index=put(pages.history_index),
            pv_offsets=put(pages.pv_offsets),
            history_offsets=put(pages.history_offsets),
            clicked=put(pages.clicked),
            plan=pages,
            damaged=damaged,
            step=step,
        )

    def _to_device(self, array: Array) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.device.type == "cuda":
            tensor = tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on. An error in the thread is raised here;
        leaving early ends the thread."""
        ready: queue.Queue[Batch | BaseException | None] = queue.Queue(self.ahead)
        stop = threading.Event()

        def put(value: Batch | BaseException | None) -> None:
            while not stop.is_set():
                try:
                    ready.put(value, timeout=0.1)
                except queue.Full:
                    continue
                return

        def produce() -> None:
            try:
                for step in range(start, self.plan.steps(epoch)):
                    if stop.is_set():
                        return
                    put(self.load(epoch, step))
                put(None)
            except BaseException as error:
                put(error)

        thread = threading.Thread(target=produce, name="courier-loader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stop.set()
            thread.join()
