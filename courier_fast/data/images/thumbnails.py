"""Pictures of items for a report: small JPEGs inside the page."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image, ImageOps

from ..dataset import Dataset

THUMBNAIL = 112  # pixels: twice the side they are shown at on most screens


def data_uri(encoded: bytes, side: int = THUMBNAIL) -> str | None:
    """A picture as a data URI: a small JPEG, its centre cut square; None if it cannot be read."""
    try:
        with Image.open(io.BytesIO(encoded)) as image:
            small = ImageOps.fit(ImageOps.exif_transpose(image).convert("RGB"), (side, side))
    except (OSError, ValueError, SyntaxError):
        return None
    file = io.BytesIO()
    small.save(file, "JPEG", quality=82)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


class Pictures:
    """What the template needs to show an item: picture, id, category."""

    def __init__(self, dataset: Dataset, side: int = THUMBNAIL) -> None:
        self.dataset, self.side = dataset, side

    def __call__(self, item: int, **more: Any) -> dict[str, Any]:
        category = self.dataset.categories[item].as_py()
        return {
            "id": self.dataset.item_ids[item].as_py(),
            "category": category or "",
            "src": data_uri(self.dataset.images[item].tobytes(), self.side),
            **more,
        }
