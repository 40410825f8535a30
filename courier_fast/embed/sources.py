"""What is embedded: a dataset's images, a folder's, or rows of features."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..data.dataset import Dataset
from ..data.images.decode import Decoder, make_decoder
from ..data.images.files import read_any
from ..data.images.pictures import seen_size
from ..data.images.transforms import eval_windows
from ..locations import is_url, location
from ..storage import size_and_time
from .device import device_of

log = logging.getLogger(__name__)
Array = npt.NDArray


class RowSource(Protocol):
    """The inputs of an encoder, by row.

    `load(rows)` gives inputs [n, ...] and damaged [n] bool, whose inputs mean nothing; `digest` is
    that of a row's bytes; `fingerprint` changes when the inputs may have.
    """

    ids: Sequence[Any]  # [rows] text
    present: Array  # [rows] bool

    def load(self, rows: Array) -> tuple[Tensor, Array]: ...

    def digest(self, row: int) -> str: ...

    def fingerprint(self) -> str: ...


class DatasetImages:
    """The images of a dataset's items, centre crops."""

    def __init__(self, dataset: Dataset, decoder: Decoder) -> None:
        self.ids, self.store, self.decoder = dataset.item_ids, dataset.images, decoder
        self.present = self.store.present

    def load(self, rows: Array) -> tuple[Tensor, Array]:
        windows = eval_windows(self.store.shapes[rows])
        return self.decoder.decode(
            self.store.take(rows.tolist()), windows, np.zeros(len(rows), bool)
        )

    def digest(self, row: int) -> str:
        return hashlib.sha256(self.store[row].tobytes()).hexdigest()

    def fingerprint(self) -> str:
        return digest_of([self.ids.to_pylist(), *self.store.fingerprint()], self.store.shapes)


class FolderImages:
    """The image files of a folder (local or remote) and its subfolders, centre crops; by id,
    sorted.

    Symbolic links out of the folder are not followed: they are named, and their ids have no image.
    Of several files for one id the first usable one is taken; files of one name in different
    folders are an error, as their ids would be the same.

    Args:
        id_from: what of a file is its id: its "name" without suffix, the name of its "folder", or
            its "path" in the folder without suffix.
    """

    def __init__(
        self, folder: str | os.PathLike[str], decoder: Decoder, id_from: str = "name"
    ) -> None:
        from ..data.images.files import LEADS_OUT, ORDER, index_images

        files = index_images(location(folder), _Everything(), id_from)
        if several := files.several:
            name, paths = next(iter(several.items()))
            if id_from == "name" and len({os.path.dirname(path) for path in paths}) > 1:
                raise ValueError(
                    f"images: expected one folder for files of the same name, got {len(paths):,} "
                    f"called {name} ({paths[0]}, {paths[1]}): "
                    "with --id-from folder their folders' names are the ids, "
                    "with --id-from path both together"
                )
            log.warning(
                "images: %d ids have several files (first: %s before %s); one is taken %s",
                len(several),
                *paths[:2],
                ORDER,
            )
        for text in files.unreadable:
            log.warning("images: a folder cannot be read: %s", text)
        self.not_followed = sorted([*files.outside.values(), *files.folders])
        for link in self.not_followed[:5]:
            log.warning("%s: %s", link, LEADS_OUT)
        if len(self.not_followed) > 5:
            log.warning("and %d more such links", len(self.not_followed) - 5)
        if not files.paths:
            raise ValueError(
                f"images: expected a folder with images, got none in {folder}; "
                f"{files.missing_note([])}"
            )
        self.ids: Sequence[Any] = sorted(files.paths | files.outside)
        self.paths: list[Any] = [files.paths.get(i, "") for i in self.ids]
        self.decoder = decoder
        self.present = np.array([path != "" for path in self.paths])

    def load(self, rows: Array) -> tuple[Tensor, Array]:
        images = [_read(self.paths[row]) for row in rows.tolist()]
        windows = eval_windows(np.array([seen_size(image) for image in images]))
        return self.decoder.decode(images, windows, np.zeros(len(rows), bool))

    def digest(self, row: int) -> str:
        return hashlib.sha256(_read(self.paths[row]).tobytes()).hexdigest()

    def fingerprint(self) -> str:
        return digest_of(
            [list(self.ids), self.paths, [_size_and_time(path) for path in self.paths]]
        )


class FeatureRows:
    """Precomputed features [rows, F]; a row that is not finite is missing."""

    def __init__(self, table: Array, ids: Sequence[Any]) -> None:
        self.table, self.ids = table, ids
        self.present = np.isfinite(table).all(1)

    def load(self, rows: Array) -> tuple[Tensor, Array]:
        return torch.from_numpy(self.table[rows]), np.zeros(len(rows), bool)

    def digest(self, row: int) -> str:
        return hashlib.sha256(self.table[row].tobytes()).hexdigest()

    def fingerprint(self) -> str:
        return digest_of([str(i) for i in self.ids], self.table)


class _Everything:
    def __contains__(self, name: object) -> bool:
        return True


def _size_and_time(path: str | tuple[str, ...]) -> Any:
    if isinstance(path, tuple):
        return [_size_and_time(one) for one in path]
    if is_url(path):
        return size_and_time(path)
    try:
        about = os.stat(path)
    except OSError:  # a link without a target, a file just removed: a damaged image
        return 0, 0
    return about.st_size, about.st_mtime_ns


def _read(path: str | tuple[str, ...]) -> Array:
    """A file's bytes; none where it is gone, unreadable or too large, which is a damaged image. Of
    several files the first usable one's."""
    if isinstance(path, tuple):
        from ..data.prepare.images import check_image

        found = (_read(one) for one in path)
        return next(
            (x for x in found if check_image(x.tobytes()).image is not None), np.zeros(0, np.uint8)
        )
    try:
        return np.frombuffer(read_any(path), np.uint8)
    except (OSError, ValueError):
        return np.zeros(0, np.uint8)


def digest_of(about: Any, *arrays: Array) -> str:
    digest = hashlib.sha256(json.dumps(about).encode())
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
    return digest.hexdigest()


def run_source(encoder: Any, run: Path, dataset: Dataset, args: argparse.Namespace) -> RowSource:
    """What the encoder of a run takes: the dataset's images, or the features that a projection was
    trained on, a file or the dataset's own embeddings."""
    device, _ = device_of(args)
    if encoder.about["backbone"] is not None:
        return DatasetImages(dataset, make_decoder_for(encoder, device, args))
    from ..data.embeddings import read_embeddings
    from ..train.config import Config

    features = Config.load(run / "config.toml").data.features
    if features is not None:
        return FeatureRows(read_embeddings(features, dataset), dataset.item_ids)
    if not dataset.has_embeddings:
        raise ValueError(
            f"run: expected data.features in {run / 'config.toml'}, or a dataset with embeddings "
            f"(prepare --embeddings), got neither: {dataset.path} has none"
        )
    table = dataset.read_embeddings()
    if table.shape[1] != encoder.features:
        raise ValueError(
            f"run: expected embeddings of {encoder.features} dimensions, as {run} was trained on, "
            f"got {table.shape[1]} in {dataset.path}"
        )
    return FeatureRows(table, dataset.item_ids)


def make_decoder_for(encoder: Any, device: torch.device, args: argparse.Namespace) -> Decoder:
    """The decoder that `args` ask for, with the encoder's size and normalisation."""
    return make_decoder(
        args.decoder,
        encoder.size,
        device=device,
        threads=args.threads,
        mean=encoder.mean,
        std=encoder.std,
    )
