"""Exported encoders and those of runs as one class, by onnxruntime, without torch, or by torch."""

from __future__ import annotations

import importlib.util
import os
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..data.images import pictures
from ..data.images.transforms import eval_windows
from ..locations import local_path
from .contract import NAME, Contract, contract_of_run

Array = npt.NDArray

RUNTIMES = ("auto", "onnxruntime", "torch")
PRECISIONS = ("float32", "float16", "int8")
WEIGHTS = "encoder.safetensors"


def load(
    path: str | os.PathLike[str],
    *,
    runtime: str = "auto",
    precision: str | None = None,
    threads: int = 0,
) -> ItemEncoder:
    """An encoder, ready to encode image files: three lines from a folder to embeddings.

    Args:
        path: folder of a training run, folder of `courier-fast export`, or an .onnx file in one.
        runtime: "onnxruntime", "torch", or "auto": onnxruntime where the folder has an ONNX file
            and it is installed.
        precision: "float32" (the default), "float16" or "int8", of an export's ONNX files.
        threads: that decode, and those of onnxruntime; 0: as many as there are CPUs for this
            process. torch has its own setting.

    Raises:
        FileNotFoundError: nothing of that kind there.
        ValueError: a file is not the one that was exported (which is named), or the export has no
            such precision or runtime.
        ModuleNotFoundError: the runtime asked for is not installed.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"runtime: expected one of {', '.join(RUNTIMES)}, got {runtime!r}")
    if precision not in (None, *PRECISIONS):
        raise ValueError(f"precision: expected one of {', '.join(PRECISIONS)}, got {precision!r}")
    path = local_path(path)
    if not threads:
        counts = hasattr(os, "sched_getaffinity")  # on Linux
        threads = len(os.sched_getaffinity(0)) if counts else os.cpu_count() or 1
    if path.suffix == ".onnx":
        if not path.is_file():
            raise FileNotFoundError(f"path: expected an .onnx file, got {path}, which is not there")
        contract = Contract.read(path.parent)
        if runtime == "torch" or precision not in (None, contract.entry(path.name)["precision"]):
            raise ValueError(
                f"path: expected a folder with runtime {runtime!r} and precision {precision!r}, "
                f"got the file {path.name}"
            )
        return ItemEncoder(
            contract, onnx_run(contract, contract.checked(path.parent, path.name), threads), threads
        )
    if not (path / NAME).is_file() and (path / "encoder.json").is_file():
        if runtime == "onnxruntime" or precision not in (None, "float32"):
            raise ValueError(
                f"path: {path} is a training run, which torch runs in float32; "
                "`courier-fast export` writes "
                f"files for runtime {runtime!r} and precision {precision!r}"
            )
        return ItemEncoder(contract_of_run(path), _torch(path), threads)
    contract = Contract.read(path)
    name = _choose_file(contract, runtime, precision)
    if name == WEIGHTS:
        for file in (WEIGHTS, "encoder.json"):
            contract.checked(path, file)
        return ItemEncoder(contract, _torch(path, contract.encoder["about"]["dim"]), threads)
    return ItemEncoder(contract, onnx_run(contract, contract.checked(path, name), threads), threads)


def _choose_file(contract: Contract, runtime: str, precision: str | None) -> str:
    """The file of an export that does it."""
    wanted = precision or "float32"
    onnx = [
        e["name"]
        for e in contract.files
        if e["name"].endswith(".onnx") and e["precision"] == wanted
    ]
    has_torch = wanted == "float32" and any(e["name"] == WEIGHTS for e in contract.files)
    installed = importlib.util.find_spec("onnxruntime") is not None
    if onnx and (runtime == "onnxruntime" or (runtime == "auto" and (installed or not has_torch))):
        return onnx[0]
    if has_torch and runtime != "onnxruntime":
        return WEIGHTS
    there = sorted({f"{e['name']} ({e['precision']})" for e in contract.files if e["precision"]})
    raise ValueError(
        f"expected runtime {runtime!r} in precision {wanted!r}, but the export has "
        f"{', '.join(there)}"
    )


def onnx_run(contract: Contract, path: Path, threads: int) -> Callable[[Array], Array]:
    """An ONNX file as a function of arrays, by onnxruntime."""
    try:
        import onnxruntime
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{path.name} needs {error.name}: pip install "courier_fast[serve]"', name=error.name
        ) from None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        os.fspath(path), options, providers=["CPUExecutionProvider"]
    )
    given, wanted = contract.input["name"], [contract.output["name"]]
    return lambda inputs: session.run(wanted, {given: inputs})[0]


def _torch(folder: Path, dim: int | None = None) -> Callable[[Array], Array]:
    """The weights are safetensors: nothing is unpickled. (`torch.export.load`, which reads
    encoder.pt2, unpickles.) `dim`: of an export, whose weights are the run's; None: all."""
    try:
        import torch

        from ..train.encoder import first_dimensions, load_encoder
        from .module import Serving
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{folder} without onnxruntime needs {error.name}: pip install "courier_fast[train]"',
            name=error.name,
        ) from None
    encoder = load_encoder(folder)
    serving = Serving(encoder if dim in (None, encoder.dim) else first_dimensions(encoder, dim))

    def run(inputs: Array) -> Array:
        with torch.inference_mode():
            return serving(torch.from_numpy(inputs)).numpy()

    return run


# ---- pictures ------------------------------------------------------------------------------------


def square(image: bytes | Image.Image, size: int) -> Array:
    """The preprocessing of the contract: the central square of an encoded or a Pillow image, [size,
    size, 3] uint8."""
    if isinstance(image, Image.Image):
        window = eval_windows(np.array([pictures.seen_size_pillow(image)]))[0]
        return pictures.resize_pillow(image, window, size)
    if not image:
        raise ValueError("image: expected bytes, got none")
    data = np.frombuffer(image, np.uint8)
    window = eval_windows(np.array([pictures.seen_size(data)]))[0]
    return pictures.fastest_reader()(data, window, size)


class ItemEncoder:
    """What `courier_fast.load` gives.

    Attributes:
        dim: dimensions of the embeddings.
        space: identity of the embeddings: only those of one space can be compared.
        contract: everything that is known of the encoder.
    """

    def __init__(self, contract: Contract, run: Callable[[Array], Array], threads: int) -> None:
        self.contract, self.space, self.dim = contract, contract.space, int(contract.encoder["dim"])
        self._run, self._threads = run, threads

    def __repr__(self) -> str:
        kind = self.contract.encoder["backbone"] or "features"
        return f"ItemEncoder({kind}, dim={self.dim}, space={self.space[:15]})"

    def encode(self, images: Sequence[Any] | Array, batch: int = 32) -> Array:
        """Embeddings [n, dim] float32, each of length 1.

        Args:
            images: local paths (or file:// URLs, ~), encoded images (bytes) or images of Pillow's;
                of an encoder of features, an array [n, F].
            batch: encoded at once.

        An image that cannot be read or decoded has a row of NaN, and a warning names it; so has a
        row of features that is not finite.

        Raises:
            TypeError: not a list, or something in it that is none of these.
            ValueError: features of another shape, or batch below 1.
        """
        if batch < 1:
            raise ValueError(f"batch: expected at least 1, got {batch}")
        if not self.contract.takes_images:
            return self._encode_features(images, batch)
        if isinstance(images, (str, bytes, os.PathLike, Image.Image)):
            raise TypeError(f"images: expected a list of images, got one: {type(images).__name__}")
        for image in images:
            if not isinstance(image, (str, os.PathLike, bytes, bytearray, memoryview, Image.Image)):
                raise TypeError(
                    "images: expected paths, bytes or images of Pillow's, got "
                    f"{type(image).__name__}"
                )
        out = np.full((len(images), self.dim), np.nan, np.float32)
        with ThreadPoolExecutor(self._threads, "courier-serve") as pool:

            def decode(start: int) -> list[Future[Array]]:
                return [pool.submit(self._picture, x) for x in images[start : start + batch]]

            ahead = decode(0)
            for start in range(0, len(images), batch):
                futures, ahead = ahead, decode(start + batch)  # while these are encoded
                rows, good = [], []
                for i, future in enumerate(futures, start):
                    try:
                        good.append(future.result())
                        rows.append(i)
                    except Exception as error:  # decoders raise whatever they like on damaged data
                        _warn(images[i], i, error)
                if good:
                    out[rows] = self._run(np.stack(good))
        return out

    def _picture(self, image: Any) -> Array:
        if isinstance(image, (str, os.PathLike)):
            image = pictures.read_image(os.fspath(local_path(image)))
        return square(
            image if isinstance(image, Image.Image) else bytes(image), self.contract.input["size"]
        )

    def _encode_features(self, table: Any, batch: int) -> Array:
        table, width = np.asarray(table, np.float32), self.contract.input["shape"][1]
        if table.ndim != 2 or table.shape[1] != width:
            raise ValueError(
                f"images: this encoder was trained on features, expected [n, {width}], got "
                f"{list(table.shape)}"
            )
        out = np.full((len(table), self.dim), np.nan, np.float32)
        good = np.flatnonzero(np.isfinite(table).all(1))
        for start in range(0, len(good), batch):
            rows = good[start : start + batch]
            out[rows] = self._run(np.ascontiguousarray(table[rows]))
        if len(good) < len(table):
            warnings.warn(
                f"{len(table) - len(good)} rows of features are not finite: NaN", stacklevel=3
            )
        return out


def _warn(image: Any, index: int, error: Exception) -> None:
    name = os.fspath(image) if isinstance(image, (str, os.PathLike)) else f"image {index}"
    reason = str(error).split("\n")[0].replace("<_io.BytesIO object at ", "<") or repr(error)
    warnings.warn(f"{name}: no embedding, its row is NaN ({reason})", stacklevel=3)
