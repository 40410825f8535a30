"""What is around a call and is no part of it: autocast, the default dtype and device, the current
GPU, tensors without values."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

# Functions that make a tensor of numbers from nothing, of the default dtype and on the default
# device.
_NUMBERS = {torch.empty, torch.zeros, torch.ones}
# Those that take the dtype from what they are given; Python floats are of the default dtype.
_VALUES = {torch.full, torch.tensor, torch.as_tensor}
_INTEGERS = {torch.arange}
_NOTHING: AbstractContextManager[None] = nullcontext()

# Whether torch has products of bfloat16 for this CPU.
BFLOAT16_PRODUCTS = torch.backends.mkldnn.is_available() and bool(
    torch.ops.mkldnn._is_mkldnn_bf16_supported()
)


class _Plain(TorchFunctionMode):
    """New tensors are float32 and on the device of the inputs, whatever the defaults are."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _NUMBERS or func in _INTEGERS:
            kwargs.setdefault("device", self.device)
        if func in _NUMBERS:
            kwargs.setdefault("dtype", torch.float32)
        elif func in _VALUES:
            given = args[1] if func is torch.full and len(args) > 1 else args[0] if args else None
            if not isinstance(given, Tensor):
                kwargs.setdefault("device", self.device)
            if isinstance(given, float):
                kwargs.setdefault("dtype", torch.float32)
        return func(*args, **kwargs)


def _autocast_is_on(device: str) -> bool:
    try:  # torch.amp.is_autocast_available cannot be traced in PyTorch 2.11
        return torch.is_autocast_enabled(device)
    except RuntimeError:  # a device without autocast
        return False


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Types inside are those of the tensors."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if _autocast_is_on(device) else _NOTHING


def gpu_of(x: Tensor) -> int | None:
    """The number of the GPU that holds a tensor's values; None for other devices."""
    return x.get_device() if x.is_cuda and has_values(x) else None


def on_gpu_of(like: Tensor) -> AbstractContextManager[Any]:
    """Kernels are launched on the current GPU: inside, that is the tensor's one."""
    gpu = None if torch.compiler.is_compiling() else gpu_of(like)
    if gpu is None or gpu == torch.cuda.current_device():
        return _NOTHING
    return torch.cuda.device(gpu)


def alone(like: Tensor) -> AbstractContextManager[Any]:
    """For what an implementation computes: the same whatever is around. Where nothing is, this
    costs nothing."""
    odd = torch.get_default_dtype() != torch.float32 or torch._C._len_torch_function_stack() > 0
    plain: AbstractContextManager[Any] = _Plain(like.device) if odd else _NOTHING
    needed = [x for x in (on_gpu_of(like), without_autocast(like), plain) if x is not _NOTHING]
    if len(needed) < 2:
        return needed[0] if needed else _NOTHING
    stack = ExitStack()
    for x in needed:
        stack.enter_context(x)
    return stack


def alone_backward(backward: Callable[..., Any]) -> Callable[..., Any]:
    """`alone` around the backward of an autograd function, wherever the user calls it."""

    @wraps(backward)
    def wrapped(ctx: Any, upstream: Tensor, *others: Any) -> Any:
        with alone(upstream):
            return backward(ctx, upstream, *others)

    return wrapped


def cast(like: Tensor, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Embeddings in the autocast type, where autocast is on: the loss is a matrix product at heart.
    float64 stays."""
    device = like.device.type
    if not _autocast_is_on(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def has_slow_products(x: Tensor) -> bool:
    """Whether products of rows like these had better be made in float32: where torch has none of
    bfloat16 for the CPU (of AMD's and Intel's, those without AVX-512), one is made number by number
    and takes 4 to 160 times as long as in float32."""
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not BFLOAT16_PRODUCTS


def for_products(x: Tensor) -> Tensor:
    """Rows as their products had better be made: float32 where those of their type are slow."""
    return x.float() if has_slow_products(x) else x


def has_values(x: Tensor) -> bool:
    """Whether a tensor has numbers: not in FakeTensorMode, nor on the device "meta"."""
    return not isinstance(x, FakeTensor) and not x.is_meta


def watches_values(x: Tensor, validate: bool) -> bool:
    """Whether the values of `x` may be looked at: on a GPU if `validate`; not while torch.compile
    or torch.export traces, nor under vmap, nor where there are none."""
    if not (validate or x.device.type == "cpu"):
        return False
    if torch.compiler.is_compiling() or torch.compiler.is_exporting() or not has_values(x):
        return False
    if not torch._C._are_functorch_transforms_active():
        return True
    vmap = torch._C._functorch.TransformType.Vmap
    return all(t.key() != vmap for t in torch._C._functorch.get_interpreter_stack() or ())
