"""Kernel launches as the pipeline makes them, recorded instead of run.

Nothing in the pipeline looks at data on the host, so it can be walked through without a GPU; what it would have
launched, with the types and constants of each launch, is what tests compile for other GPUs and what tuning looks at.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from triton import JITFunction
from triton.runtime.jit import KernelInterface

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class Launch:
    """One kernel with the argument types, alignment and constants of a launch."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]  # arguments known to be multiples of 16
    num_warps: int
    num_stages: int
    grid: tuple[int, ...]


class _Recorder:
    """Stands in for a kernel: `kernel[grid](...)` notes the launch."""

    def __init__(self, name: str, fn: Any, launches: list[Launch]) -> None:
        self._name, self._fn, self._launches = name, fn, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, num_warps: int = 4, num_stages: int = 3, **kwargs: Any) -> None:
            names = self._fn.arg_names
            values = dict(zip(names, args, strict=False)) | kwargs
            missing, extra = set(names) - set(values), set(values) - set(names)
            if missing or extra:
                raise TypeError(
                    f"{self._name}: missing arguments {sorted(missing)}, unknown arguments {sorted(extra)}"
                )
            constant = {p.name for p in self._fn.params if p.is_constexpr}
            signature: dict[str, str] = {}
            aligned = []
            for name in names:
                value = values[name]
                if name in constant:
                    signature[name] = "constexpr"
                elif isinstance(value, torch.Tensor):
                    signature[name] = "*" + _TYPES[value.dtype]
                    aligned.append(name)
                elif isinstance(value, int):
                    signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                    if value % 16 == 0:
                        aligned.append(name)
                else:
                    signature[name] = "fp32"
            constexprs = {name: values[name] for name in names if name in constant}
            self._launches.append(
                Launch(
                    self._name,
                    self._fn,
                    signature,
                    constexprs,
                    tuple(aligned),
                    num_warps,
                    num_stages,
                    tuple(grid),
                )
            )

        return launch


@contextlib.contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Replace the kernels of these modules by recorders; yields the list that fills."""
    launches: list[Launch] = []
    replaced: list[tuple[ModuleType, str, Any]] = []
    try:
        for module in modules:
            for name, value in list(vars(module).items()):
                if (
                    isinstance(value, (JITFunction, KernelInterface))
                    and value.__module__ == module.__name__
                ):
                    replaced.append((module, name, value))
                    setattr(module, name, _Recorder(name, value, launches))
        yield launches
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)
