"""`courier-fast embed`: embeddings of images, anew or beside those that are there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..lazy import lazy

if TYPE_CHECKING:
    from .encode import encode_all
    from .grow import embed_new
    from .sources import DatasetImages, FeatureRows, FolderImages
    from .write import EmbedReport, embed_source

__all__ = [
    "DatasetImages",
    "EmbedReport",
    "FeatureRows",
    "FolderImages",
    "embed_new",
    "embed_source",
    "encode_all",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "encode_all": "encode",
        "embed_new": "grow",
        "DatasetImages": "sources",
        "FeatureRows": "sources",
        "FolderImages": "sources",
        "EmbedReport": "write",
        "embed_source": "write",
    },
)
