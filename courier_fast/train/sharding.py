"""An encoder over several processes, a part of each on every one (FSDP2): for encoders that one GPU
cannot hold and train.

The backbone's large matrices are sharded, with their gradients and the optimizer's state, and
gathered block by block where they are used. All else is replicated: the head, the objective, and
what is small in the backbone. The loss sees full embeddings.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

# A block holds at most this share of the backbone, if it can be taken apart.
_LARGEST = 1 / 16


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _is_list(module: nn.Module) -> bool:
    """Whether a module is a row of others that are more than single layers: by its class, or as all
    of its children have one class."""
    children = list(module.children())
    composed = [next(x.children(), None) is not None for x in children]
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return any(composed)
    return len(children) > 1 and all(composed) and len({type(x) for x in children}) == 1


def _elements(module: nn.Module) -> Iterator[nn.Module]:
    """The elements of the outermost lists in a module, or of itself."""
    for child in module.children():
        if _is_list(module):
            yield child
        else:
            yield from _elements(child)


def blocks(backbone: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one at a time, inner ones first, in the end the backbone
    itself.

    They are the elements of the backbone's outermost lists (`nn.Sequential`, `nn.ModuleList`,
    children of one class): a transformer's blocks, a convolutional net's stages. One with more than
    a sixteenth of the parameters is taken apart in the same way, into a stage's blocks, and itself
    holds only what lies beside them, such as a stage's downsampling. Lists of single layers (a
    convolution and its norm) are not taken apart, and what has no list is gathered whole.
    """
    largest = _LARGEST * _count(backbone)

    def within(module: nn.Module) -> Iterator[nn.Module]:
        for element in _elements(module):
            # Before its forward a module is gathered, which these do not have.
            callable_ = not isinstance(element, (nn.ModuleList, nn.ModuleDict))
            if not callable_ or _count(element) > largest:
                yield from within(element)
            if callable_ and _count(element):
                yield element

    return [*within(backbone), backbone]


def matrices(backbone: nn.Module) -> set[nn.Parameter]:
    """The parameters that are sharded: weights of linear layers and convolutions, and other tables
    of more than a hundredth of all.

    The rest (norms, biases, scales, positions) is well below that share, and remains in float32
    where the run's precision is bfloat16: autocast rounds those weights for their products in any
    case, and nothing else.
    """
    layers = (nn.Linear, nn.modules.conv._ConvNd)
    found = {m.weight for m in backbone.modules() if isinstance(m, layers)}
    least = _count(backbone) / 100
    large = (p for p in backbone.parameters() if p.numel() > least)
    return found | {p for p in large if p.ndim > 1 and len(p) > 1}


def shard(backbone: nn.Module, mesh: DeviceMesh, precision: str) -> None:
    """Distributes the backbone's `matrices` over the processes of `mesh`, in place; moves them to
    its device, a block at a time.

    Where `precision` is bfloat16 they travel in it, and gradients are added in float32. Activations
    are left to autocast.
    """
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    rest = set(backbone.parameters()) - matrices(backbone)
    for module in blocks(backbone):
        if module is not backbone:  # of which the result is only read
            module.register_forward_hook(_without_views)
        fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=rest)
    # The others' are copies, so what is left of FSDP's remark on them is about the backbone's.
    name = re.escape(type(backbone).__name__)
    warnings.filterwarnings("ignore", rf"FSDP2-wrapped module \({name}\) returned a view")


def _without_views(module: nn.Module, inputs: Any, result: Any) -> Any:
    """A result that is a view is copied: FSDP marks what a module returns, and a change of a view
    in place would remove the mark."""
    return result.clone() if isinstance(result, Tensor) and result._is_view() else result


def make_mesh(device: torch.device) -> DeviceMesh:
    """All processes of the run."""
    return init_device_mesh(device.type, (dist.get_world_size(),))


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor; any other as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor's whole; every process calls it. Any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """Averages `.grad` over the processes, in one message."""
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for p, mean in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = mean.view(p.shape)


def clip_gradients(parameters: Sequence[nn.Parameter], largest: float) -> Tensor:
    """`nn.utils.clip_grad_norm_` by the norm of the whole gradient, sharded or not; gives that
    norm, 0-d. With `largest` 0 nothing is clipped."""
    kinds = [[p for p in parameters if is_sharded(p) is kind] for kind in (False, True)]
    kinds = [kind for kind in kinds if kind]
    gradients = [[p.grad for p in kind if p.grad is not None] for kind in kinds]
    norms = [full(nn.utils.get_total_norm(x)) for x in gradients]
    norm = norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms))
    for kind in kinds:
        nn.utils.clip_grads_with_norm_(kind, largest or math.inf, norm)
    return norm


def averaging(decay: float) -> Callable[..., None]:
    """`multi_avg_fn` of AveragedModel: the exponential average, of sharded tensors by part."""
    update = get_ema_multi_avg_fn(decay)

    def update_parts(average: Iterable[Tensor], now: Iterable[Tensor], count: Tensor | int) -> None:
        update([local(x) for x in average], [local(x) for x in now], count)

    return update_parts


def gathered(module: nn.Module, keep: bool) -> dict[str, Tensor]:
    """Copies of a module's tensors in the host's memory, whole, where `keep` says so; every process
    calls it."""
    state = {}
    for name, value in module.state_dict().items():
        whole = full(value)
        if keep:
            state[name] = whole.detach().to("cpu", copy=True)
    return state
