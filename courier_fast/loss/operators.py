"""The registered operators: schemas, fakes, autograd, and dispatch to an implementation.

The only file that knows torch.library. No implementation is imported before it is first asked for;
docs/contributing/add-a-backend.md lists the functions an implementation module provides.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import fields, replace
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter
from torch.utils._python_dispatch import is_in_torch_dispatch_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from ..surroundings import alone
from . import reference
from .fallback import OR_REFERENCE, has_failed, kernels_of, or_reference
from .layouts import check_offsets, check_range
from .problem import LARGEST_DIM, Gradients, Needs, Problem, SequenceProblem

IMPLEMENTATIONS = {
    "triton": "courier_fast.kernels.triton.loss",
    "cpu": "courier_fast.kernels.cpu.loss",
    "xformers": "courier_fast.kernels.xformers",
}


def _module(impl: str) -> ModuleType:
    return importlib.import_module(IMPLEMENTATIONS[kernels_of(impl)])


def unavailable_reasons(impl: str, p: Problem | SequenceProblem) -> list[str]:
    """Every reason why `impl` cannot run `p` here; empty if it can."""
    if not torch.compiler.is_compiling():
        return _reasons(impl, p)
    # Imports and device queries cannot be traced: ask them once, about an empty problem of this
    # kind.
    source = source_of(p)
    options = p.options | ({"attention_scale": 1.0} if isinstance(p, Problem) else {})  # of D
    # A class of dimensions: one that the program leaves open is no constant.
    width = 64
    while width < LARGEST_DIM and width < source.shape[1]:
        width *= 2
    about = (impl, isinstance(p, Problem), str(source.device), source.dtype, width)
    reasons = _reasons_while_tracing(*about, any(wanted(p)), **options)
    if impl != "cpu" and source.shape[1] > LARGEST_DIM:
        reasons = [*reasons, f"the embedding dimension is above {LARGEST_DIM}"]
    return reasons


def _reasons_while_tracing(
    impl: str,
    is_loss: bool,
    device: str,
    dtype: torch.dtype,
    dim: int,
    gradients: bool,
    **options: Any,
) -> list[str]:
    kind = Problem if is_loss else SequenceProblem
    rows = torch.empty(0, dim, dtype=dtype, device=device, requires_grad=gradients)
    offsets = torch.zeros(1, dtype=torch.int64, device=device)
    values: dict[str, Any] = dict.fromkeys((f.name for f in fields(kind)), None)
    values |= {"history": rows, "history_offsets": offsets, "tau": 1.0, **options}
    if is_loss:
        values |= {"pv": rows, "pv_offsets": offsets}
    return _reasons(impl, kind(**values))


# What torch.compiler.assume_constant_result does; calling that here would import all of Dynamo,
# over a second.
_reasons_while_tracing._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _reasons(impl: str, p: Problem | SequenceProblem) -> list[str]:
    try:
        module = _module(impl)
    except Exception as error:  # an installation that is broken fails in many ways
        what = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        return [f"{IMPLEMENTATIONS[impl]} cannot be imported: {what}"]
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


def source_of(p: Problem | SequenceProblem) -> Tensor:
    """The embeddings, or the table."""
    return p.pv if isinstance(p, Problem) else p.history


def flat(p: Problem | SequenceProblem) -> list[Any]:
    """The fields, in order."""
    return [getattr(p, f.name) for f in fields(p)]


# The inputs that may take a gradient.
_RECONSTRUCT_GRADS = ("pv", "history", "query", "key", "value")
_LOSS_GRADS = (*_RECONSTRUCT_GRADS, "temperature", "reconstructed")
_SEQUENCE_GRADS = ("history", "temperature")

_lib = torch.library.Library("courier_fast", "DEF")


def wanted(p: Problem | SequenceProblem) -> Needs:
    """Which gradients of the loss are asked for."""
    return Needs(*_wanted(p, _operator_of(p).gradients))


def _wanted(p: Problem | SequenceProblem, names: Sequence[str]) -> list[bool]:
    """As `Needs`; of `names` alone."""
    tensors = (getattr(p, name) if name in names else None for name in Needs._fields)
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in tensors]


def refuse_double_backward(ctx: Any, *_: Any) -> Any:
    raise RuntimeError(
        "double backward through a fused courier_fast loss is not implemented (create_graph=True): "
        'use impl="reference" where second derivatives are needed'
    )


def _refuse_vmap(*_: Any) -> Any:
    raise RuntimeError(
        "torch.func.vmap over a fused courier_fast loss is not implemented: "
        "call it once for each batch, "
        'or use impl="reference"'
    )


def _refuse_jvp(*_: Any) -> Any:
    raise RuntimeError(
        "forward-mode differentiation of a fused courier_fast loss is not implemented (jvp, "
        "jacfwd, make_dual): "
        'use grad, vjp or jacrev, or impl="reference"'
    )


def _no_context(ctx: Any, inputs: Any, output: Any) -> None:
    pass


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation is at work (and not torch.compile)."""
    return not torch.compiler.is_compiling() and (
        torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


def direct(values: Sequence[Any]) -> bool:
    """Whether the implementation can be called without the operator around it: plain tensors, and
    nobody who traces, transforms or watches operators. What an operator with this many arguments
    costs the host exceeds what it computes in a small batch."""
    return (
        not torch.compiler.is_compiling()
        and not is_in_torch_dispatch_mode()
        and not transformed()
        and all(type(x) in (Tensor, Parameter) for x in values if isinstance(x, Tensor))
    )


class Operator:
    """A forward and a backward of the implementations, for everyone who may call them:

        name(fields of the problem ..., needs, stats, impl) -> (outputs ..., saved)
        name_backward(fields ..., needs, impl, saved, grad) -> the gradients that `needs` asks for

    `needs` are the values of a `Needs`; `impl` may end in OR_REFERENCE (fallback.py). Only the
    first output takes a gradient. torch.compile and those who watch operators see the two above;
    torch.func an autograd function with setup_context; everyone else one that costs the host less.
    """

    def __init__(
        self,
        name: str,
        problem: type,
        gradients: tuple[str, ...],
        outputs: int,
        forward: Callable[[Any, Any, Needs, bool], tuple[Any, ...]],
        backward: Callable[[Any, Any, Needs, Sequence[Tensor], Tensor], Gradients],
        fake: Callable[[Any, bool], list[Tensor]],
        saved_spec: Callable[[Any, Any, Needs], Any],
        defined: Callable[[Any], tuple[Tensor, ...]],
    ) -> None:
        """`forward(module, p, needs, stats)`, `backward(module, p, needs, saved, grad)` and
        `saved_spec(module, p, needs)` call a function of an implementation's module;
        `fake(p, stats)` gives empty outputs, `defined(p)` those of the reference."""
        self.gradients, self.forward, self.backward = gradients, forward, backward
        self._problem, self._outputs, self.defined = problem, outputs, defined
        self.fake_outputs, self._saved_spec = fake, saved_spec
        inputs = f"{_schema_of(problem)}, bool[] needs"
        self._op = self._define(
            name,
            f"{inputs}, bool stats, str impl) -> ({'Tensor, ' * outputs}Tensor[])",
            (self._run, self._fake),
            (self._backward, self._save),
        )
        self._backward_op = self._define(
            f"{name}_backward",
            f"{inputs}, str impl, Tensor[] saved, Tensor grad) -> Tensor[]",
            (self._run_backward, self._fake_backward),
            (refuse_double_backward, _no_context),
        )
        self._transformed = _for_transforms(self, outputs)
        self._direct = _without_operator(self)

    @staticmethod
    def _define(name: str, schema: str, run: tuple[Any, Any], autograd: tuple[Any, Any]) -> Any:
        _lib.define(f"{name}({schema}")
        _lib.impl(name, run[0], "CompositeExplicitAutograd")
        name = f"courier_fast::{name}"
        torch.library.register_fake(name, run[1], lib=_lib)
        torch.library.register_autograd(name, autograd[0], setup_context=autograd[1], lib=_lib)
        return getattr(torch.ops.courier_fast, name.split("::")[1]).default

    def __call__(
        self, p: Problem | SequenceProblem, impl: str, stats: bool = False
    ) -> tuple[Tensor, ...]:
        """The outputs; all but the first may need `stats`."""
        needs = _wanted(p, self.gradients)
        inputs = (*flat(p), needs, stats, impl)
        if not direct(inputs):
            call = self._transformed.apply if transformed() else self._op
            return call(*inputs)[: self._outputs]
        if any(needs):
            return self._direct.apply(*inputs)
        with torch.no_grad():
            return self._run(*inputs)[:-1]

    def _run(self, *inputs: Any) -> Any:
        *values, needs, stats, impl = inputs
        return self.run(self._problem(*values), impl, Needs(*needs), stats)

    def run(self, p: Problem | SequenceProblem, impl: str, needs: Needs, stats: bool) -> Any:
        """What an implementation computes, without autograd, whatever is around."""

        def fallen_back() -> Any:
            found = self.defined(p)
            # An operator's outputs share no memory, and all have the promised shapes: also what is
            # saved, which nobody will read.
            rest = (x.clone() if stats else x.new_empty(0) for x in found[1:])
            spec = self._saved_spec(_module(impl), p, needs)
            saved = [found[0].new_empty(shape, dtype=dtype) for shape, dtype in spec]
            return (found[0], *rest, saved)

        run = partial(self.forward, _module(impl), p, needs, stats)
        return self._or_reference(p, impl, needs, run, fallen_back)

    def run_backward(
        self,
        p: Problem | SequenceProblem,
        impl: str,
        needs: Needs,
        saved: Sequence[Tensor],
        grad: Tensor,
    ) -> Gradients:
        run = partial(self.backward, _module(impl), p, needs, saved, grad)
        return self._or_reference(p, impl, needs, run, partial(self._slopes, p, needs, grad))

    def _or_reference(
        self,
        p: Problem | SequenceProblem,
        impl: str,
        needs: Needs,
        run: Callable[[], Any],
        fallen_back: Callable[[], Any],
    ) -> Any:
        source = source_of(p)
        with alone(source):
            if not impl.endswith(OR_REFERENCE):
                return run()
            return or_reference(partial(self.about, p, needs), source, run, fallen_back)

    def about(self, p: Problem | SequenceProblem, needs: Needs) -> Hashable:
        """What decides which kernels are launched, and how they are compiled, but for sizes and
        the temperature, which may be another at each step."""
        source = source_of(p)
        given = (x.dtype if isinstance(x, Tensor) else x for x in flat(p))
        kind = (x for x in given if not isinstance(x, float))
        precision = torch.get_float32_matmul_precision()
        return self._op, source.device, source.shape[1], precision, needs, *kind

    def _slopes(self, p: Any, needs: Needs, grad: Tensor) -> Gradients:
        """The reference's gradients, of its forward pass once more."""
        leaves = {name: getattr(p, name).detach().requires_grad_() for name in needs.names}
        with _recording():
            first = self.defined(replace(p, **leaves))[0]
            found = torch.autograd.grad(first, list(leaves.values()), grad, materialize_grads=True)
        return Gradients.of(needs, (x.contiguous() for x in found))

    def _fake(self, *inputs: Any) -> Any:
        *values, needs, stats, impl = inputs
        p = self._problem(*values)
        spec = self._saved_spec(_module(impl), p, Needs(*needs))
        new = values[0].new_empty
        return (*self.fake_outputs(p, stats), [new(shape, dtype=dtype) for shape, dtype in spec])

    def _run_backward(self, *inputs: Any) -> list[Tensor]:
        *values, needs, impl, saved, grad = inputs
        p = self._problem(*values)
        return self.run_backward(p, impl, Needs(*needs), saved, grad).present()

    def _fake_backward(self, *inputs: Any) -> list[Tensor]:
        *values, needs, _impl, _saved, _grad = inputs
        return Gradients.zeros(self._problem(*values), Needs(*needs)).present()

    def _save(self, ctx: Any, inputs: Any, output: Any) -> None:
        """Keep tensors through save_for_backward (so that in-place changes are caught), the rest on
        the context."""
        *values, ctx.needs, _stats, ctx.impl = inputs
        *outputs, saved = output
        ctx.places = [i for i, x in enumerate(values) if isinstance(x, Tensor)]
        ctx.constants = [None if isinstance(x, Tensor) else x for x in values]
        ctx.save_for_backward(*(values[i] for i in ctx.places), *saved)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)

    def _backward(self, ctx: Any, grad: Tensor | None, *_: Any, run: Any = None) -> Any:
        """Gradients of the operator's inputs by `run`, the backward operator or its stand-in."""
        names = [f.name for f in fields(self._problem)]
        if grad is None:
            return (None,) * (len(names) + 3)
        tensors, values = list(ctx.saved_tensors), list(ctx.constants)
        for place, tensor in zip(ctx.places, tensors, strict=False):
            values[place] = tensor
        saved = tensors[len(ctx.places) :]
        found = (run or self._backward_op)(*values, ctx.needs, ctx.impl, saved, grad)
        grads = Gradients.of(Needs(*ctx.needs), found)
        return (*(getattr(grads, name, None) for name in names), None, None, None)


def _recording() -> AbstractContextManager[Any]:
    """Inside, autograd is on, also in an operator, where its dispatch keys are off."""
    on, off = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor"):
        off = off - torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))
    stack = ExitStack()
    stack.enter_context(torch._C._ForceDispatchKeyGuard(on, off))
    stack.enter_context(torch.enable_grad())
    return stack


def _without_operator(op: Operator) -> Any:
    class Direct(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = op._run(*inputs)
            op._save(ctx, inputs, output)
            return tuple(output[:-1])

        @staticmethod
        def backward(ctx: Any, grad: Tensor | None, *_: Any) -> Any:
            run = op._run_backward
            if torch._C._are_functorch_transforms_active():
                run = op._transformed.gradients
            elif torch.is_grad_enabled():
                # With create_graph, the operator: it says why there is no second derivative.
                run = op._backward_op
            return op._backward(ctx, grad, run=run)

    return Direct


def _for_transforms(op: Operator, outputs: int) -> Any:
    """The operator as torch.func wants it, with setup_context; what torch.library generates has
    none. What is saved counts as output here."""

    class Backward(torch.autograd.Function):
        """Of a flat list: torch.func looks for tensors of a level that is gone (vjp) in no list
        inside it."""

        @staticmethod
        def forward(spec: TreeSpec, *leaves: Any) -> Any:
            return tuple(op._run_backward(*tree_unflatten(leaves, spec)))

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

    def gradients_of(*args: Any) -> Any:
        leaves, spec = tree_flatten(args)
        return Backward.apply(spec, *leaves)

    class Forward(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Any) -> Any:
            *found, saved = op._run(*inputs)
            return (*found, *saved)

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            op._save(ctx, inputs, (*output[:outputs], list(output[outputs:])))
            ctx.mark_non_differentiable(*output[1:])

        @staticmethod
        def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> Any:
            return op._backward(ctx, upstream, run=gradients_of)

        vmap = staticmethod(_refuse_vmap)
        jvp = staticmethod(_refuse_jvp)
        gradients = staticmethod(gradients_of)

    return Forward


# ---- the three -----------------------------------------------------------------------------------


def _loss_fake(p: Problem, stats: bool) -> list[Tensor]:
    rows, new = p.num_pv, p.pv.new_empty
    per_row = (rows if stats else 0,)
    return [
        new((rows,) if p.reduction == "none" else (), dtype=torch.float32),
        *(new(per_row, dtype=torch.float32) for _ in range(3)),
        new(per_row, dtype=torch.int64),
        new(per_row, dtype=torch.bool),
        new(() if stats else (0,), dtype=torch.int64),
    ]


def _loss_defined(p: Problem) -> tuple[Tensor, ...]:
    out = reference.reconstruction_loss(p)
    return (out.loss, *out.rows, out.num_skipped)


def _sequence_fake(p: SequenceProblem, stats: bool) -> list[Tensor]:
    shape = (p.num_history,) if p.reduction == "none" else ()
    return [p.history.new_empty(shape, dtype=torch.float32)]


_loss = Operator(
    "reconstruction_loss",
    Problem,
    _LOSS_GRADS,
    7,
    lambda module, p, needs, stats: module.loss_forward(p, needs, stats),
    lambda module, *args: module.loss_backward(*args),
    _loss_fake,
    lambda module, p, needs: module.saved_spec(p, needs),
    _loss_defined,
)
_reconstruct = Operator(
    "reconstruct",
    Problem,
    _RECONSTRUCT_GRADS,
    1,
    lambda module, p, needs, stats: (module.reconstruct_forward(p), []),
    lambda module, p, needs, saved, grad: module.reconstruct_backward(p, needs, grad),
    lambda p, stats: [p.pv.new_empty((p.num_pv, p.pv.shape[1]))],
    lambda module, p, needs: [],
    lambda p: (reference.reconstruct(p)[0],),
)
_sequence = Operator(
    "click_sequence_loss",
    SequenceProblem,
    _SEQUENCE_GRADS,
    1,
    lambda module, p, needs, stats: module.sequence_forward(p, needs),
    lambda module, *args: module.sequence_backward(*args),
    _sequence_fake,
    lambda module, p, needs: module.sequence_saved_spec(p, needs),
    lambda p: (reference.click_sequence_loss(p),),
)


def _operator_of(p: Problem | SequenceProblem) -> Operator:
    return _loss if isinstance(p, Problem) else _sequence


def loss(p: Problem | SequenceProblem, impl: str, stats: bool = False) -> tuple[Tensor, ...]:
    """The loss of either kind of problem, 0-d, or [N] or [K] with reduction "none". Of a `Problem`
    after it item_loss, log_sum_exp, positive_similarity, rank, is_anchor and num_skipped, which
    need `stats`."""
    return _operator_of(p)(p, impl, stats)


def fell_back(p: Problem | SequenceProblem) -> bool:
    """Whether the kernels of such a loss have failed, so that "auto" takes the reference."""
    if torch.compiler.is_compiling():
        return False
    return has_failed(lambda: _operator_of(p).about(p, wanted(p)))


def defined(p: Problem | SequenceProblem) -> tuple[Tensor, ...]:
    """What `loss` gives, by the reference, all of it."""
    return _operator_of(p).defined(checked(p))


def reconstruct(p: Problem, impl: str) -> Tensor:
    """R [N, D]; zeros for padding and for pages without history."""
    return _reconstruct(p, impl)[0]


def without_values(p: Problem | SequenceProblem, stats: bool, whole: bool = True) -> list[Tensor]:
    """Outputs in shape and type alone, attached to the inputs: where there are no values, what
    waits for some cannot run. `whole`: of the loss, else of `reconstruct`."""
    operator = _operator_of(p) if whole else _reconstruct
    first, *rest = operator.fake_outputs(p, stats)
    if whole:
        first = first.to(torch.promote_types(source_of(p).dtype, torch.float32))
    for name in operator.gradients:
        x = getattr(p, name)
        if x is not None:
            first = first + (x[:0].sum() if x.dim() else x * 0).to(first.dtype)
    return [first, *rest]


# ---- bounds --------------------------------------------------------------------------------------

_lib.define("checked_offsets(Tensor offsets, int rows, str name) -> Tensor")
_lib.define("checked_index(Tensor index, int size, str name) -> Tensor")


def _checked_offsets(offsets: Tensor, rows: int, name: str) -> Tensor:
    check_offsets(name, offsets, rows)
    return offsets.clone()


def _checked_index(index: Tensor, size: int, name: str) -> Tensor:
    check_range(name, index, size)
    return index.clone()


for _name, _run in (("checked_offsets", _checked_offsets), ("checked_index", _checked_index)):
    _lib.impl(_name, _run, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"courier_fast::{_name}", lambda x, *_: torch.empty_like(x), lib=_lib
    )


def checked(p: Any) -> Any:
    """While a program is traced, the same problem with its bounds checked by operators of the
    program: the reference's own would read row -1 as the last one. The CPU operator checks by
    itself, and on a GPU what comes is clamped."""
    if not torch.compiler.is_compiling() or source_of(p).device.type != "cpu":
        return p
    op, changes = torch.ops.courier_fast, {}
    for side in ("pv", "history"):
        offsets, index = getattr(p, f"{side}_offsets", None), getattr(p, f"{side}_index", None)
        if offsets is not None:
            rows = p.num_pv if side == "pv" else p.num_history
            name = f"{side}_offsets"
            changes[name] = op.checked_offsets(offsets, rows, name)
        if index is not None:
            size = source_of(p).shape[0]
            changes[f"{side}_index"] = op.checked_index(index, size, side)
    return replace(p, **changes)


def passes(p: Problem | SequenceProblem, impl: str) -> tuple[Any, Any]:
    """forward(needs, stats) -> (outputs ..., saved) and backward(needs, saved, upstream) ->
    gradients: what an implementation computes, without autograd."""
    operator = _operator_of(p)
    return partial(operator.run, p, impl), partial(operator.run_backward, p, impl)
