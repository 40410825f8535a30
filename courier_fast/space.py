"""The space of embeddings: what two of them must share to be compared."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from .files import read_json, sha256

# The number is part of a space: it rises when the pixels that an encoder gets for a file change by
# more than rounding.
PREPROCESSING = 1


def space_of(weights: str, about: dict[str, Any]) -> str:
    """The identity of an encoder's embeddings, from the checksum of its encoder.safetensors and its
    encoder.json."""
    identity = [weights, about, PREPROCESSING, "unit length"]
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"


def encoder_of_run(run: Path) -> tuple[dict[str, Any], str]:
    """encoder.json of a run's folder, and the checksum of its encoder.safetensors.
    FileNotFoundError without them."""
    about, weights = run / "encoder.json", run / "encoder.safetensors"
    if not (about.is_file() and weights.is_file()):
        raise FileNotFoundError(
            f"run: expected a folder with encoder.json and encoder.safetensors, got {run}"
        )
    return read_json(about), sha256(weights)
