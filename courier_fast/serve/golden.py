"""Pictures that the package draws, what an encoder makes of them, and the judgement of anything
that claims to do the same.

Exporters err by 1e-7, clients by how they decode and resize: each picture is one way to go wrong.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from ..data.images.pictures import rgb
from .contract import Contract
from .load import load, square

Array = npt.NDArray

FOLDER = "golden"
VECTORS = f"{FOLDER}/vectors.npy"
FEATURES = f"{FOLDER}/features.npy"
FEATURE_LIMIT = 1e-5  # mean distance: there is nothing to decode
INT8_ALLOWANCE = 1e-3  # mean distance that int8 may add


def scene(height: int, width: int, seed: int) -> Array:
    """[height, width, 3] uint8: waves of all lengths, edges, stripes as fine as fabric, grain; no
    symmetry."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width].astype(np.float64)
    span = max(height, width)
    picture = np.full((height, width, 3), 127.0)
    for k in range(1, 6):
        a, b, c = rng.normal(size=(3, 3)) * 2**k
        picture += 60 / k * np.sin(a * x[..., None] / span + b * y[..., None] / span + c)
    left, top = width // 3, height // 2
    picture[top:, :left] *= 0.5
    stripes = 15 * np.sin(2 * np.pi * (x * 0.93 + y * 0.31) / 6)
    picture[:top, left:] += stripes[:top, left:, None]
    picture += rng.normal(size=(height, width, 1)) * 8
    return picture.clip(0, 255).astype(np.uint8)


def golden_pictures(size: int) -> dict[str, bytes]:
    """Files by name, for an encoder of pictures of `size` pixels: larger than that several times,
    but for the tiny one."""
    long, short = 45 * size // 10, 33 * size // 10

    def encoded(image: Image.Image, kind: str = "JPEG", **options: object) -> bytes:
        file = io.BytesIO()
        image.save(file, kind, **({"quality": 92} if kind == "JPEG" else {}) | options)
        return file.getvalue()

    def drawn(seed: int, height: int = short, width: int = long) -> Image.Image:
        return Image.fromarray(scene(height, width, seed))

    turned = Image.Exif()
    turned[0x0112] = 6
    veiled = drawn(6).convert("RGBA")
    veil = np.linspace(0, 255, long, dtype=np.uint8)[None].repeat(short, 0)
    veiled.putalpha(Image.fromarray(veil))
    return {
        "photo.jpg": encoded(drawn(0)),
        "tiny.png": encoded(drawn(1, 1, 1), "PNG"),
        "wide.jpg": encoded(drawn(2, 23 * size // 10, 8 * size)),
        "grey.jpg": encoded(drawn(3).convert("L")),
        "cmyk.jpg": encoded(drawn(4).convert("CMYK")),
        "turned.jpg": encoded(drawn(5), exif=turned.tobytes()),
        "transparent.png": encoded(veiled, "PNG"),
        "progressive.jpg": encoded(drawn(7, long, short), progressive=True),
    }


def without_antialiasing(image: bytes, size: int) -> Array:
    """What many clients do in place of `square`: bilinear, but of four pixels only, however many
    there are."""
    with Image.open(io.BytesIO(image)) as file:
        seen = rgb(ImageOps.exif_transpose(file))
    side = min(seen.size)
    left, top = (seen.width - side) // 2, (seen.height - side) // 2
    box = (left, top, left + side, top + side)
    return np.array(
        seen.transform((size, size), Image.Transform.EXTENT, box, Image.Resampling.BILINEAR)
    )


def decoded_in_full(image: bytes, size: int) -> Array:
    """What a careful client does: every pixel decoded, Pillow's BILINEAR."""
    with Image.open(io.BytesIO(image)) as file:
        return square(file, size)


def distance(found: Array, expected: Array) -> float:
    """Mean over rows [n, D] of 1 - cosine; NaN where a row has one."""
    lengths = np.linalg.norm(found, axis=1) * np.linalg.norm(expected, axis=1)
    cosines = (found.astype(np.float64) * expected).sum(1) / lengths
    return float(np.mean(np.maximum(1 - cosines, 0)))  # rounding


def levels(found: Array, expected: Array) -> float:
    """Mean difference of pixels, of 255 levels."""
    return float(np.abs(found.astype(np.float64) - expected).mean())


def write_golden(
    folder: Path, contract: Contract, embed: Callable[[Array], Array]
) -> dict[str, Any]:
    """Draws the pictures, writes them, their pixels and their vectors, and returns the contract's
    `golden`.

    Limits lie between what a careful client and one that resizes without antialiasing are off by:
    at the geometric mean of the two.
    """
    (folder / FOLDER).mkdir()
    if not contract.takes_images:
        rng = np.random.default_rng(0)
        features = rng.normal(size=(8, contract.input["shape"][1])).astype(np.float32)
        np.save(folder / FEATURES, features)
        np.save(folder / VECTORS, embed(features))
        limits = {"distance": {"limit": FEATURE_LIMIT}}
        return {"features": FEATURES, "vectors": VECTORS, "limits": limits}
    size = contract.input["size"]
    drawn = golden_pictures(size)
    right, careful, wrong = (
        np.stack([how(image, size) for image in drawn.values()])
        for how in (square, decoded_in_full, without_antialiasing)
    )
    pictures = []
    for (name, image), pixels in zip(drawn.items(), right, strict=True):
        file, beside = f"{FOLDER}/{name}", f"{FOLDER}/{Path(name).stem}.input.png"
        (folder / file).write_bytes(image)
        Image.fromarray(pixels).save(folder / beside)
        pictures.append({"file": file, "input": beside})
    vectors = embed(right)
    np.save(folder / VECTORS, vectors)
    limits = {
        "distance": _limit(distance(embed(careful), vectors), distance(embed(wrong), vectors)),
        "levels": _limit(levels(careful, right), levels(wrong, right)),
    }
    return {"pictures": pictures, "vectors": VECTORS, "limits": limits}


def _limit(careful: float, wrong: float) -> dict[str, float]:
    between = (max(careful, 0.0) * max(wrong, 0.0)) ** 0.5
    return {
        "decoded in full": careful,
        "without antialiasing": wrong,
        "limit": max(between, 2 * careful, 1e-6),
    }


# ---- judgement -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Verdict:
    """What was looked at, what it is off by, and by how much it may be."""

    what: str
    off: float
    limit: float
    unit: str

    @property
    def passes(self) -> bool:
        return self.off <= self.limit  # False for NaN

    def __str__(self) -> str:
        word = "ok" if self.passes else "FAILED"
        return f"{word}: {self.what}: {self.unit} {self.off:.2e}, limit {self.limit:.2e}"


def verify(folder: Path, vectors: Path | None = None) -> list[Verdict]:
    """Runs the golden pictures through every file of an export as it is served; or judges the
    vectors that another client made of them.

    Args:
        vectors: .npy [8, dim], in the order of the contract's pictures; None: the package's own
            client.

    Raises:
        ValueError: a file was altered, or the vectors are of another shape.
    """
    contract = Contract.read(folder)
    for entry in contract.files:
        contract.checked(folder, entry["name"])
    golden = contract.golden
    assert golden is not None  # of every export
    expected = np.load(folder / golden["vectors"], allow_pickle=False)
    limit = golden["limits"]["distance"]["limit"]
    unit = "mean 1 - cosine"
    if vectors is not None:
        found = np.load(vectors, allow_pickle=False)
        if found.shape != expected.shape:
            raise ValueError(
                f"vectors: expected {list(expected.shape)}, a row for each golden picture, got "
                f"{list(found.shape)}"
            )
        return [Verdict(vectors.name, distance(found, expected), limit, unit)]
    verdicts, inputs = [], _inputs_of(folder, golden)
    if contract.takes_images:
        size = contract.input["size"]
        found = np.stack([square(path.read_bytes(), size) for path in inputs])
        right = np.stack([np.array(Image.open(folder / p["input"])) for p in golden["pictures"]])
        limits = golden["limits"]["levels"]
        verdicts.append(
            Verdict("preprocessing", levels(found, right), limits["limit"], "mean of 255 levels")
        )
    for entry in contract.files:
        name, precision = entry["name"], entry["precision"]
        if name.endswith((".onnx", ".safetensors")):
            runtime = "torch" if name.endswith(".safetensors") else "onnxruntime"
            encoder = load(folder, runtime=runtime, precision=precision)
            found = encoder.encode(inputs)
            allowed = limit + (INT8_ALLOWANCE if precision == "int8" else 0)
            verdicts.append(Verdict(name, distance(found, expected), allowed, unit))
    return verdicts


def _inputs_of(folder: Path, golden: dict[str, Any]) -> Any:
    if "features" in golden:
        return np.load(folder / golden["features"], allow_pickle=False)
    return [folder / picture["file"] for picture in golden["pictures"]]
