"""impl="auto" where a kernel cannot be compiled or launched: the reference, and one warning.

What can be known before is a reason in `unavailable_reasons`. This is for the rest: a compiler, a
driver or a GPU that nobody has tried. An explicit `impl` raises the `LaunchError`.
"""

from __future__ import annotations

import platform
import sys
import warnings
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch
from torch import Tensor

from .problem import LaunchError

# After the name of an implementation, in the name that `impl="auto"` gives to the operators.
OR_REFERENCE = " or reference"

T = TypeVar("T")
About = Callable[[], Hashable]  # made where it is asked for: most processes never ask
_failed: set[Hashable] = set()
_told: set[str] = set()


def kernels_of(impl: str) -> str:
    """The implementation alone."""
    return impl.removesuffix(OR_REFERENCE)


def has_failed(about: About) -> bool:
    """Whether the kernels of what is described so have failed in this process."""
    return bool(_failed) and about() in _failed


def or_reference(about: About, like: Tensor, run: Callable[[], T], reference: Callable[[], T]) -> T:
    """`run()`; where its kernels cannot be launched on the device of `like`, `reference()`, from
    then on for everything that `about` describes: Triton would compile it anew each time."""
    if has_failed(about):
        return reference()
    try:
        return run()
    except LaunchError as error:
        _failed.add(about())
        if str(error) not in _told:
            _told.add(str(error))
            warnings.warn(_message(error, like), RuntimeWarning, stacklevel=2)
        return reference()


def _message(error: LaunchError, like: Tensor) -> str:
    triton = sys.modules.get("triton")
    versions = f"PyTorch {torch.__version__}, Triton {getattr(triton, '__version__', 'unknown')}"
    gpu = f", {torch.cuda.get_device_name(like.device)}" if like.is_cuda else ""
    what = str(error).rstrip(".")
    return (
        f'courier_fast, impl="auto": {what}. The reference takes its place: its results are right, '
        "but it is slower and needs more memory. Please report this as an issue, with what "
        f"`courier-fast doctor` prints, {versions}, Python {platform.python_version()}{gpu}"
    )
