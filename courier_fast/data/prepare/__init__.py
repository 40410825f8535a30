"""`courier-fast prepare`: interactions and images or ready embeddings in, a dataset out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...lazy import lazy

if TYPE_CHECKING:
    from .layouts import Source
    from .options import PrepareOptions
    from .run import prepare
    from .vectors import EmbeddingFile

__all__ = [
    "EmbeddingFile",
    "PrepareOptions",
    "Source",
    "prepare",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "Source": "layouts",
        "PrepareOptions": "options",
        "prepare": "run",
        "EmbeddingFile": "vectors",
    },
)
