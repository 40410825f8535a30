"""Memory that nobody has written holds nothing that a result could come from."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

_MAKERS = ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty"))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """torch.empty and its like give NaN and huge integers: nothing may depend on what was there
    before."""
    originals = [getattr(owner, name) for owner, name in _MAKERS]
    try:
        for (owner, name), original in zip(_MAKERS, originals, strict=True):
            setattr(owner, name, _poisoning(original))
        yield
    finally:
        for (owner, name), original in zip(_MAKERS, originals, strict=True):
            setattr(owner, name, original)


def _poisoning(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def made(*args: Any, **kwargs: Any) -> Tensor:
        x = make(*args, **kwargs)
        # What is traced or has no memory of its own stays.
        if torch.compiler.is_compiling() or type(x) is not Tensor or x.device.type == "meta":
            return x
        if x.is_floating_point():
            return x.fill_(torch.nan)
        return x if x.dtype == torch.bool else x.fill_(torch.iinfo(x.dtype).max)

    return made
