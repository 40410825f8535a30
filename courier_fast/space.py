"""The space of embeddings: what two of them must share to be compared."""

from __future__ import annotations

import hashlib
import json
from typing import Any

# The number is part of a space: it rises when the pixels that an encoder gets for a file change by
# more than rounding.
PREPROCESSING = 1


def space_of(weights: str, about: dict[str, Any]) -> str:
    """The identity of an encoder's embeddings, from the checksum of its encoder.safetensors and its
    encoder.json."""
    identity = [weights, about, PREPROCESSING, "unit length"]
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"))
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
