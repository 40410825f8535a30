"""The native library, and how its stages are called."""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch
from torch import Tensor
from torch.utils.dlpack import to_dlpack

from ...loss.launched import tell

library: Any = None
error_text = ""
try:
    library = importlib.import_module("courier_fast._native")
except ImportError as error:
    error_text = str(error)

# One of library.variants(), in place of the best that this CPU runs.
VARIANT_VARIABLE = "COURIER_FAST_CPU_VARIANT"


def stage(name: str, *arguments: Any) -> None:
    """Runs a native stage, on torch's threads and with the instruction set that is asked for.

    Tensors go as capsules: through their own `__dlpack__` each would cost the host 5 us, more than
    a small batch's work.
    """
    call(name, *arguments, torch.get_num_threads(), os.environ.get(VARIANT_VARIABLE))


def call(name: str, *arguments: Any) -> Any:
    tell(name)
    return getattr(library, name)(
        *[to_dlpack(x) if isinstance(x, Tensor) else x for x in arguments]
    )
