"""The registered operators: schemas, fakes, autograd, and dispatch to an implementation.

The only file that knows torch.library. No implementation is imported before it is first asked for; ../CONTRIBUTING.md
lists the functions an implementation module provides.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import fields
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from .problem import Problem, SequenceProblem

IMPLEMENTATIONS = {
    "triton": "courier_fast.kernels.pipeline",
    "cpu": "courier_fast.kernels.cpu.driver",
    "xformers": "courier_fast.kernels.xformers_attention",
}

# Embeddings an implementation takes at most; none: any.
LARGEST_DIM = {"triton": 1024, "xformers": 1024}


def _module(impl: str) -> ModuleType:
    return importlib.import_module(IMPLEMENTATIONS[impl])


def unavailable_reasons(impl: str, p: Problem | SequenceProblem) -> list[str]:
    """Every reason why `impl` cannot run `p` here; empty if it can."""
    if not torch.compiler.is_compiling():
        return _reasons(impl, p)
    # Imports and device queries cannot be traced: ask them once, about an empty problem of this kind.
    source = p.pv if isinstance(p, Problem) else p.history
    reasons = _reasons_while_tracing(
        impl,
        isinstance(p, Problem),
        str(source.device),
        source.dtype,
        getattr(p, "num_heads", 1),
        getattr(p, "attention", "anchor"),
    )
    limit = LARGEST_DIM.get(impl)
    if limit is not None and source.shape[1] > limit:
        reasons = [*reasons, f"the embedding dimension is above {limit}"]
    return reasons


def _reasons_while_tracing(
    impl: str, is_loss: bool, device: str, dtype: torch.dtype, heads: int, attention: str
) -> list[str]:
    kind = Problem if is_loss else SequenceProblem
    rows = torch.empty(0, 64 * heads, dtype=dtype, device=device)
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    values: dict[str, Any] = dict.fromkeys((f.name for f in fields(kind)), None)
    values |= {"history": rows, "history_offsets": offsets, "tau": 1.0}
    if is_loss:
        values |= {"pv": rows, "pv_offsets": offsets, "attention_scale": 1.0, "num_heads": heads}
        values |= {"attention": attention, "cosine": False}
    return _reasons(impl, kind(**values))


# What torch.compiler.assume_constant_result does; calling that here would import all of Dynamo, over a second.
_reasons_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _reasons(impl: str, p: Problem | SequenceProblem) -> list[str]:
    try:
        module = _module(impl)
    except ImportError as error:
        return [f"{IMPLEMENTATIONS[impl]} cannot be imported: {error}"]
    return module.unavailable_reasons(p)


_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "float": "float",
    "int": "int",
    "bool": "bool",
    "str": "str",
}


def _schema_of(problem: type) -> str:
    """The dataclass fields as schema arguments: one list, so that the two cannot differ."""
    return ", ".join(f"{_TYPES[str(f.type)]} {f.name}" for f in fields(problem))


def flat(p: Problem | SequenceProblem) -> list[Any]:
    """The fields, in order."""
    return [getattr(p, f.name) for f in fields(p)]


_LOSS_FIELDS = len(fields(Problem))
_SEQUENCE_FIELDS = len(fields(SequenceProblem))

# The inputs that may take a gradient, in the order of `needs`.
_LOSS_GRADS = ("pv", "history", "query", "key", "value", "temperature")
_RECONSTRUCT_GRADS = _LOSS_GRADS[:5]
_SEQUENCE_GRADS = ("history", "temperature")

_lib = torch.library.Library("courier_fast", "DEF")


def _wanted(p: Problem | SequenceProblem, names: Sequence[str]) -> list[bool]:
    tensors = (getattr(p, name) for name in names)
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]


def gradient_names(p: Problem | SequenceProblem) -> tuple[str, ...]:
    """The fields that may take a gradient, in the order of `needs`."""
    return _LOSS_GRADS if isinstance(p, Problem) else _SEQUENCE_GRADS


def wanted(p: Problem | SequenceProblem) -> list[bool]:
    """Which gradients of the loss are asked for."""
    return _wanted(p, gradient_names(p))


def _device_of(x: Tensor) -> Any:
    """Kernels are launched on the current GPU: make it the inputs' one. On the CPU, nothing."""
    return torch.cuda.device_of(x)


def _dense(grads: Sequence[Tensor | None]) -> list[Tensor]:
    """An operator returns tensors only: drop the gradients nobody asked for."""
    return [g for g in grads if g is not None]


def _like_inputs(
    p: Problem | SequenceProblem, names: Sequence[str], needs: Sequence[bool]
) -> list[Tensor]:
    return [
        torch.empty_like(getattr(p, name)) for name, need in zip(names, needs, strict=True) if need
    ]


def _scatter_grads(
    problem: type, names: Sequence[str], needs: Sequence[bool], grads: Sequence[Tensor]
) -> list[Any]:
    """Gradients by field of the problem dataclass, None elsewhere."""
    remaining = iter(grads)
    by_name = {name: next(remaining) for name, need in zip(names, needs, strict=True) if need}
    return [by_name.get(f.name) for f in fields(problem)]


def _define(name: str, schema: str, run: Any, fake: Any) -> Any:
    _lib.define(f"{name}({schema}")
    _lib.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"courier_fast::{name}", fake, lib=_lib)
    return getattr(torch.ops.courier_fast, name).default


def refuse_double_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "double backward through a fused courier_fast loss is not implemented (create_graph=True): "
        'use impl="reference" where second derivatives are needed'
    )


def _no_context(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def _save(ctx: Any, flat: Sequence[Any], saved: Sequence[Tensor]) -> None:
    """Keep tensors through save_for_backward (so that in-place changes are caught), the rest on the context."""
    ctx.places = [i for i, x in enumerate(flat) if isinstance(x, Tensor)]
    ctx.constants = [None if isinstance(x, Tensor) else x for x in flat]
    ctx.save_for_backward(*(flat[i] for i in ctx.places), *saved)


def _restore(ctx: Any) -> tuple[list[Any], list[Tensor]]:
    tensors = list(ctx.saved_tensors)
    flat = list(ctx.constants)
    for place, tensor in zip(ctx.places, tensors, strict=False):
        flat[place] = tensor
    return flat, tensors[len(ctx.places) :]


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work (and not torch.compile)."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def _refuse_vmap(*_: Any) -> Any:
    raise RuntimeError(
        "torch.func.vmap over a fused courier_fast loss is not implemented: call it once for each batch, "
        'or use impl="reference"'
    )


def _refuse_jvp(*_: Any) -> Any:
    raise RuntimeError(
        "forward-mode differentiation of a fused courier_fast loss is not implemented (jvp, jacfwd, make_dual): "
        'use grad, vjp or jacrev, or impl="reference"'
    )


def _for_transforms(run: Any, backward_run: Any, context: Any, grad: Any, outputs: int) -> Any:
    """The operator as torch.func wants it, with setup_context; what torch.library generates has none.

    `outputs`: how many tensors `run` gives before the list of what it saves, which counts as output here.
    """

    class Backward(torch.autograd.Function):
        """Of a flat list: torch.func looks for tensors of a level that is gone (vjp) in no list inside it."""

        @staticmethod
        def forward(spec: TreeSpec, *leaves: Any) -> Any:
            return tuple(backward_run(*tree_unflatten(leaves, spec)))

        setup_context = staticmethod(_no_context)
        backward = staticmethod(refuse_double_backward)
        jvp = staticmethod(_refuse_jvp)

        @staticmethod
        def vmap(info: Any, in_dims: Any, *args: Any) -> Any:
            # Several upstream gradients of one loss (jacrev): one after the other.
            *shared, dim = in_dims
            if dim is None or any(d is not None for d in shared):
                _refuse_vmap()
            *rest, upstream = args
            each = zip(*(Backward.apply(*rest, g) for g in upstream.unbind(dim)), strict=True)
            found = tuple(torch.stack(x) for x in each)
            return found, (0,) * len(found)

    def backward_of(*args: Any) -> Any:
        leaves, spec = tree_flatten(args)
        return Backward.apply(spec, *leaves)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*args: Any) -> Any:
            *found, saved = run(*args)
            return (*found, *saved)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            context(ctx, inputs, (*output[:outputs], list(output[outputs:])))
            ctx.mark_non_differentiable(*output[1:])

        @staticmethod
        def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> Any:
            return grad(ctx, upstream, run=backward_of)

        vmap = staticmethod(_refuse_vmap)
        jvp = staticmethod(_refuse_jvp)
        gradients = staticmethod(backward_of)

    return Forward


def direct(values: Sequence[Any]) -> bool:
    """Whether the implementation can be called without the operator around it: plain tensors, and nobody who traces,
    transforms or watches operators. What an operator with this many arguments costs the host exceeds what it computes
    in a small batch."""
    return (
        not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not transformed()
        and all(type(x) in (Tensor, Parameter) for x in values if isinstance(x, Tensor))
    )


# ---- reconstruction loss ------------------------------------------------------------------------------------------


def _loss_run(*args: Any) -> Any:
    *flat, needs, stats, impl = args
    with _device_of(flat[0]):
        return _module(impl).loss_forward(Problem(*flat), needs, stats)


def _loss_fake(*args: Any) -> Any:
    *flat, needs, stats, impl = args
    p = Problem(*flat)
    rows = p.num_pv
    per_row = (rows if stats else 0,)
    new = p.pv.new_empty
    loss = new((rows,) if p.reduction == "none" else (), dtype=torch.float32)
    floats = [new(per_row, dtype=torch.float32) for _ in range(3)]
    rank, is_anchor = new(per_row, dtype=torch.int64), new(per_row, dtype=torch.bool)
    skipped = new(() if stats else (0,), dtype=torch.int64)
    saved = [new(shape, dtype=dtype) for shape, dtype in _module(impl).saved_spec(p, needs)]
    return (loss, *floats, rank, is_anchor, skipped, saved)


def _loss_backward_run(*args: Any) -> list[Tensor]:
    *flat, needs, impl, saved, grad = args
    with _device_of(flat[0]):
        return _dense(_module(impl).loss_backward(Problem(*flat), needs, saved, grad))


def _loss_backward_fake(*args: Any) -> list[Tensor]:
    *flat, needs, _impl, _saved, _grad = args
    return _like_inputs(Problem(*flat), _LOSS_GRADS, needs)


_loss_op = _define(
    "reconstruction_loss",
    f"{_schema_of(Problem)}, bool[] needs, bool stats, str impl) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _loss_run,
    _loss_fake,
)
_loss_backward_op = _define(
    "reconstruction_loss_backward",
    f"{_schema_of(Problem)}, bool[] needs, str impl, Tensor[] saved, Tensor grad) -> Tensor[]",
    _loss_backward_run,
    _loss_backward_fake,
)


def _loss_context(ctx: Any, inputs: Any, output: Any) -> None:
    *flat, ctx.needs, _, ctx.impl = inputs
    _save(ctx, flat, output[-1])
    ctx.mark_non_differentiable(*output[1:-1])
    ctx.set_materialize_grads(False)


def _loss_grad(ctx: Any, grad: Tensor | None, *_: Any, run: Any = _loss_backward_op) -> Any:
    flat, saved = _restore(ctx)
    if grad is None:
        return (None,) * (_LOSS_FIELDS + 3)
    grads = run(*flat, ctx.needs, ctx.impl, saved, grad)
    return (*_scatter_grads(Problem, _LOSS_GRADS, ctx.needs, grads), None, None, None)


torch.library.register_autograd(
    "courier_fast::reconstruction_loss", _loss_grad, setup_context=_loss_context, lib=_lib
)
torch.library.register_autograd(
    "courier_fast::reconstruction_loss_backward",
    refuse_double_backward,
    setup_context=_no_context,
    lib=_lib,
)


_TransformedLoss = _for_transforms(
    _loss_run, _loss_backward_run, _loss_context, _loss_grad, outputs=7
)


def _backward_way(operator: Any, run: Any, function: Any) -> Any:
    """How a backward without the operator around it computes gradients."""
    if torch._C._are_functorch_transforms_active():
        return function.gradients
    # With create_graph, the operator: it says why there is no second derivative.
    return operator if torch.is_grad_enabled() else run


class _DirectLoss(torch.autograd.Function):
    """The same without the operator."""

    @staticmethod
    def forward(ctx: Any, needs: Sequence[bool], stats: bool, impl: str, *flat: Any) -> Any:
        *outputs, saved = _loss_run(*flat, needs, stats, impl)
        _loss_context(ctx, (*flat, needs, stats, impl), (*outputs, saved))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
        run = _backward_way(_loss_backward_op, _loss_backward_run, _TransformedLoss)
        return (None, None, None, *_loss_grad(ctx, grad, run=run)[:_LOSS_FIELDS])


def reconstruction_loss(p: Problem, impl: str, stats: bool) -> tuple[Tensor, ...]:
    """(loss, item_loss, log_sum_exp, positive_similarity, rank, is_anchor, num_skipped); all but loss need `stats`."""
    values, needs = flat(p), wanted(p)
    if not direct(values):
        if transformed():
            return _TransformedLoss.apply(*values, needs, stats, impl)[:7]
        return _loss_op(*values, needs, stats, impl)[:-1]
    if not any(needs):
        with torch.no_grad():
            return _loss_run(*values, needs, stats, impl)[:-1]
    return _DirectLoss.apply(needs, stats, impl, *values)


# ---- reconstruct --------------------------------------------------------------------------------------------------


def _reconstruct_run(*args: Any) -> Tensor:
    *flat, _needs, impl = args
    with _device_of(flat[0]):
        return _module(impl).reconstruct_forward(Problem(*flat))


def _reconstruct_fake(*args: Any) -> Tensor:
    *flat, _needs, _impl = args
    p = Problem(*flat)
    return p.pv.new_empty((p.num_pv, p.pv.shape[1]))


def _reconstruct_backward_run(*args: Any) -> list[Tensor]:
    *flat, needs, impl, grad = args
    with _device_of(flat[0]):
        return _dense(_module(impl).reconstruct_backward(Problem(*flat), needs, grad))


def _reconstruct_backward_fake(*args: Any) -> list[Tensor]:
    *flat, needs, _impl, _grad = args
    return _like_inputs(Problem(*flat), _RECONSTRUCT_GRADS, needs)


_reconstruct_op = _define(
    "reconstruct",
    f"{_schema_of(Problem)}, bool[] needs, str impl) -> Tensor",
    _reconstruct_run,
    _reconstruct_fake,
)
_reconstruct_backward_op = _define(
    "reconstruct_backward",
    f"{_schema_of(Problem)}, bool[] needs, str impl, Tensor grad) -> Tensor[]",
    _reconstruct_backward_run,
    _reconstruct_backward_fake,
)


def _reconstruct_context(ctx: Any, inputs: Any, output: Any) -> None:
    *flat, ctx.needs, ctx.impl = inputs
    _save(ctx, flat, ())


def _reconstruct_grad(ctx: Any, grad: Tensor, *_: Any, run: Any = _reconstruct_backward_op) -> Any:
    flat, _saved = _restore(ctx)
    grads = run(*flat, ctx.needs, ctx.impl, grad)
    return (*_scatter_grads(Problem, _RECONSTRUCT_GRADS, ctx.needs, grads), None, None)


torch.library.register_autograd(
    "courier_fast::reconstruct", _reconstruct_grad, setup_context=_reconstruct_context, lib=_lib
)
torch.library.register_autograd(
    "courier_fast::reconstruct_backward",
    refuse_double_backward,
    setup_context=_no_context,
    lib=_lib,
)


_TransformedReconstruct = _for_transforms(
    lambda *args: (_reconstruct_run(*args), ()),
    _reconstruct_backward_run,
    _reconstruct_context,
    _reconstruct_grad,
    outputs=1,
)


def reconstruct(p: Problem, impl: str) -> Tensor:
    """R [N, D]; zeros for padding and for pages without history."""
    values, needs = flat(p), _wanted(p, _RECONSTRUCT_GRADS)
    if transformed():
        return _TransformedReconstruct.apply(*values, needs, impl)[0]
    return _reconstruct_op(*values, needs, impl)


# ---- click-sequence loss ------------------------------------------------------------------------------------------


def _sequence_run(*args: Any) -> Any:
    *flat, needs, impl = args
    with _device_of(flat[0]):
        return _module(impl).sequence_forward(SequenceProblem(*flat), needs)


def _sequence_fake(*args: Any) -> Any:
    *flat, needs, impl = args
    p = SequenceProblem(*flat)
    loss = p.history.new_empty(
        (p.num_history,) if p.reduction == "none" else (), dtype=torch.float32
    )
    spec = _module(impl).sequence_saved_spec(p, needs)
    return loss, [p.history.new_empty(shape, dtype=dtype) for shape, dtype in spec]


def _sequence_backward_run(*args: Any) -> list[Tensor]:
    *flat, needs, impl, saved, grad = args
    with _device_of(flat[0]):
        return _dense(_module(impl).sequence_backward(SequenceProblem(*flat), needs, saved, grad))


def _sequence_backward_fake(*args: Any) -> list[Tensor]:
    *flat, needs, _impl, _saved, _grad = args
    return _like_inputs(SequenceProblem(*flat), _SEQUENCE_GRADS, needs)


_sequence_op = _define(
    "click_sequence_loss",
    f"{_schema_of(SequenceProblem)}, bool[] needs, str impl) -> (Tensor, Tensor[])",
    _sequence_run,
    _sequence_fake,
)
_sequence_backward_op = _define(
    "click_sequence_loss_backward",
    f"{_schema_of(SequenceProblem)}, bool[] needs, str impl, Tensor[] saved, Tensor grad) -> Tensor[]",
    _sequence_backward_run,
    _sequence_backward_fake,
)


def _sequence_context(ctx: Any, inputs: Any, output: Any) -> None:
    *flat, ctx.needs, ctx.impl = inputs
    _save(ctx, flat, output[-1])
    ctx.set_materialize_grads(False)


def _sequence_grad(ctx: Any, grad: Tensor | None, *_: Any, run: Any = _sequence_backward_op) -> Any:
    flat, saved = _restore(ctx)
    if grad is None:
        return (None,) * (_SEQUENCE_FIELDS + 2)
    grads = run(*flat, ctx.needs, ctx.impl, saved, grad)
    return (*_scatter_grads(SequenceProblem, _SEQUENCE_GRADS, ctx.needs, grads), None, None)


torch.library.register_autograd(
    "courier_fast::click_sequence_loss", _sequence_grad, setup_context=_sequence_context, lib=_lib
)
torch.library.register_autograd(
    "courier_fast::click_sequence_loss_backward",
    refuse_double_backward,
    setup_context=_no_context,
    lib=_lib,
)


_TransformedSequence = _for_transforms(
    _sequence_run, _sequence_backward_run, _sequence_context, _sequence_grad, outputs=1
)


class _DirectSequence(torch.autograd.Function):
    """The same without the operator."""

    @staticmethod
    def forward(ctx: Any, needs: Sequence[bool], impl: str, *flat: Any) -> Any:
        loss, saved = _sequence_run(*flat, needs, impl)
        _sequence_context(ctx, (*flat, needs, impl), (loss, saved))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> Any:
        run = _backward_way(_sequence_backward_op, _sequence_backward_run, _TransformedSequence)
        return (None, None, *_sequence_grad(ctx, grad, run=run)[:_SEQUENCE_FIELDS])


def click_sequence_loss(p: SequenceProblem, impl: str) -> Tensor:
    """0-d, or [K] with reduction "none"."""
    values, needs = flat(p), wanted(p)
    if not direct(values):
        if transformed():
            return _TransformedSequence.apply(*values, needs, impl)[0]
        return _sequence_op(*values, needs, impl)[0]
    if not any(needs):
        with torch.no_grad():
            return _sequence_run(*values, needs, impl)[0]
    return _DirectSequence.apply(needs, impl, *values)


# ---- for CUDA graphs ----------------------------------------------------------------------------------------------


def loss(p: Problem | SequenceProblem, impl: str, stats: bool) -> tuple[Tensor, ...]:
    """The loss of either kind of problem, and what belongs to `stats`."""
    if isinstance(p, Problem):
        return reconstruction_loss(p, impl, stats)
    return (click_sequence_loss(p, impl),)


def passes(p: Problem | SequenceProblem, impl: str) -> tuple[Any, Any]:
    """forward(needs, stats) -> (outputs ..., saved) and backward(needs, saved, upstream) -> gradients, None where not
    asked for: what an implementation computes, without autograd."""
    module = _module(impl)
    if isinstance(p, Problem):
        return partial(module.loss_forward, p), partial(module.loss_backward, p)
    return (
        lambda needs, _stats: module.sequence_forward(p, needs),
        partial(module.sequence_backward, p),
    )
