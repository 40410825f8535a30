"""contract.json: what an exported encoder takes and gives, where it came from, and the checksums of
its files. Needs nothing but Python."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..files import check_listed, read_json
from ..space import encoder_of_run, space_of

SCHEMA = 1
NAME = "contract.json"

IMAGE_STEPS = (
    "decode to 8 bits a channel; more are cut to their highest 8. JPEG: libjpeg-turbo with the "
    "fast DCT and fast upsampling, at the smallest of "
    "the scales 1/8, 1/4, 1/2 and 1 that leaves the square below at least `size` pixels",
    "turn and mirror as EXIF's orientation says",
    "to RGB, transparency over white, CMYK as Adobe stores it (inverted); "
    "colour profiles are ignored",
    "cut out the central square, its side the shorter side, its edges rounded to whole pixels",
    "resize it to `size` x `size`, bilinear with antialiasing: Pillow's BILINEAR, or PyTorch's "
    "interpolate with antialias=True",
    "uint8 [batch, size, size, 3]; what follows (/ 255, mean, std) is in the graph",
)

FEATURE_STEPS = (
    "the features that the run was trained on, float32 [batch, features]; "
    "standardisation is in the graph",
)


@dataclass(frozen=True)
class Contract:
    """What contract.json holds; `read` and `write` are inverse.

    Attributes:
        space: identity of the embeddings, "sha256:...": of the weights, the preprocessing and the
            dimension. Only vectors of one space can be compared.
        encoder: backbone, dim, trained_dim (the embedding is the first `dim` of them), normalised,
            weights (checksum of encoder.safetensors, which has all), about (encoder.json of the
            run, with this dim).
        input: name, dtype, shape and, for images, size, layout, colour.
        output: name, dtype, shape.
        preprocessing: the steps before the input, in order.
        trained: what the encoder came from: run, steps, settings and their checksum, dataset with
            its checksum and dates; null where unknown.
        files: name, sha256, precision, and what was measured of it.
        golden: pictures and expected vectors; limits of what a client may be off by.
        measured: photos, ranking and speed, or null.
        versions: of the packages that wrote it.
    """

    space: str
    encoder: dict[str, Any]
    input: dict[str, Any]
    output: dict[str, Any]
    preprocessing: list[str]
    trained: dict[str, Any]
    files: list[dict[str, Any]]
    golden: dict[str, Any] | None
    measured: dict[str, Any] | None
    licence: str | None
    versions: dict[str, str]
    schema: int = SCHEMA

    @property
    def takes_images(self) -> bool:
        return self.encoder["backbone"] is not None

    def write(self, folder: Path) -> None:
        (folder / NAME).write_text(json.dumps(asdict(self), indent=1, ensure_ascii=False), "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Contract:
        """The contract of a folder. FileNotFoundError without one, ValueError where it is of
        another schema or contradicts itself."""
        path = folder / NAME
        if not path.is_file():
            raise FileNotFoundError(
                f"path: expected a folder that `courier-fast export` wrote (with {NAME}), "
                f"got {folder}"
            )
        values = read_json(path, "export the run again")
        if values.get("schema") != SCHEMA:
            raise ValueError(
                f"{path}: expected schema {SCHEMA}, got {values.get('schema')}; "
                "export the run again"
            )
        wrong = sorted({f.name for f in fields(cls)} ^ set(values))
        if wrong:
            raise ValueError(
                f"{path}: expected the fields of schema {SCHEMA}, got others: {', '.join(wrong)}"
            )
        found = cls(**values)
        space = space_of(found.encoder["weights"], found.encoder["about"])
        if found.space != space:
            raise ValueError(
                f"{path}: its weights, preprocessing and dimension are of space {space[:15]}, but "
                f"it says {found.space[:15]}: it was changed"
            )
        return found

    def entry(self, name: str) -> dict[str, Any]:
        """What the contract says of a file; ValueError where it does not know it."""
        for entry in self.files:
            if entry["name"] == name:
                return entry
        raise ValueError(
            "path: expected a file of the contract "
            f"({', '.join(e['name'] for e in self.files)}), got {name}"
        )

    def checked(self, folder: Path, name: str) -> Path:
        """The path of a file whose bytes are those that were exported; ValueError names it if they
        are not."""
        check_listed(folder, {name: self.entry(name)["sha256"]}, NAME, "export it again")
        return folder / name


def contract_of_run(run: Path, dim: int | None = None) -> Contract:
    """The contract of a run's folder as it is: without files, golden pictures and licence.
    FileNotFoundError without an encoder.

    Args:
        dim: the first dimensions alone, in the space that `embed --dim` gives them; None: all.
    """
    about, weights = encoder_of_run(run)
    trained_dim = about["dim"]
    if dim is not None:
        about |= {"dim": dim}
    taken: dict[str, Any]
    steps: tuple[str, ...]
    if about["backbone"] is None:
        steps = FEATURE_STEPS
        taken = {"name": "features", "dtype": "float32", "shape": ["batch", about["features"]]}
    else:
        size, steps = about["size"], IMAGE_STEPS
        taken = {
            "name": "pixels",
            "dtype": "uint8",
            "shape": ["batch", size, size, 3],
            "layout": "NHWC",
            "colour": "sRGB",
            "size": size,
        }
    return Contract(
        space=space_of(weights, about),
        encoder={
            "backbone": about["backbone"],
            "dim": about["dim"],
            "trained_dim": trained_dim,
            "normalised": True,
            "weights": weights,
            "about": about,
        },
        input=taken,
        output={"name": "embedding", "dtype": "float32", "shape": ["batch", about["dim"]]},
        preprocessing=list(steps),
        trained={},
        files=[],
        golden=None,
        measured=None,
        licence=None,
        versions={},
    )
