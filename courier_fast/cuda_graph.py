"""A loss, forward and backward, as one CUDA graph per signature: `ReconstructionLoss(..., cuda_graph=True)`.

One graph computes the loss and the gradients for an upstream gradient of one; the backward multiplies them. What a replay
leaves in the graph's own memory is copied out at once, so that another call before the backward, a backward later, twice
or never, changes nothing. What is captured is the loss of a `Problem`: from a user's layout to it, hardly anything is
launched.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from . import ops
from .problem import Problem, SequenceProblem

# What can be captured. Other implementations look at values on the host, or run on the CPU.
IMPLS: tuple[str, ...] = ("triton",)
DEVICES: tuple[str, ...] = ("cuda",)

Body = Callable[[], tuple[list[Tensor], list[Tensor]]]


def capture(
    body: Body, device: torch.device, pool: Any
) -> tuple[list[Tensor], list[Tensor], Callable[[], None]]:
    """(outputs, gradients, replay): `replay` does again what `body` did, into the same outputs and gradients."""
    current = torch.cuda.current_stream(device)
    side = torch.cuda.Stream(device)
    side.wait_stream(current)
    with torch.cuda.stream(side):
        for _ in range(2):  # kernels compile and libraries load outside of the graph
            body()
    current.wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on allocating: a loader that pins memory, for one.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        outputs, gradients = body()
    return outputs, gradients, graph.replay


class _Graph:
    """One signature: inputs, outputs and gradients that stay where they are, and the replay."""

    def __init__(
        self, p: Problem | SequenceProblem, needs: list[bool], stats: bool, impl: str, pool: Any
    ) -> None:
        flat = [x.detach().clone() if isinstance(x, Tensor) else x for x in ops.flat(p)]
        self.inputs = [x for x in flat if isinstance(x, Tensor)]
        self.device = self.inputs[0].device
        inside: Any = type(p)(*flat)
        one = torch.ones((), dtype=torch.float32, device=self.device)
        forward, backward = ops.passes(inside, impl)

        def body() -> tuple[list[Tensor], list[Tensor]]:
            with torch.no_grad():
                *outputs, saved = forward(needs, stats)
                gradients = backward(needs, saved, one) if any(needs) else []
            return outputs, [x for x in gradients if x is not None]

        with torch.cuda.device_of(self.inputs[0]):
            self.outputs, self.gradients, self.replay = capture(body, self.device, pool)

    def run(self, inputs: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs and gradients for other inputs, in memory of their own."""
        with torch.no_grad(), torch.cuda.device_of(self.inputs[0]):
            torch._foreach_copy_(self.inputs, list(inputs))
            self.replay()
            outputs = [x.clone() if x.numel() else x for x in self.outputs]
            return outputs, [x.clone() for x in self.gradients]


class _Scaled(torch.autograd.Function):
    """Gradients times the upstream gradient; no further derivative."""

    @staticmethod
    def forward(ctx: Any, upstream: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch._foreach_mul(gradients, upstream))

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return ops.refuse_double_backward(ctx)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, wanted: Sequence[bool], *flat: Any) -> tuple[Tensor, ...]:
        outputs, gradients = graph.run([x for x in flat if isinstance(x, Tensor)])
        ctx.wanted = wanted
        ctx.save_for_backward(*gradients)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> Any:
        if upstream is None:
            return (None,) * (len(ctx.wanted) + 2)
        if torch.is_grad_enabled() and not upstream.requires_grad:  # create_graph
            upstream = upstream.detach().requires_grad_()
        gradients = iter(_Scaled.apply(upstream, *ctx.saved_tensors))
        return (None, None, *(next(gradients) if want else None for want in ctx.wanted))


class Graphs:
    """The graphs of one module, at most `limit`: the one not used for longest goes.

    They share a memory pool, and so belong to one stream at a time: a call on another stream waits for the last one.
    A copy of the module starts without graphs.
    """

    def __init__(self, limit: int = 8) -> None:
        self.limit = limit
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
        self._pool: Any = None
        self._stream: Any = None
        self._evicted = 0

    def __len__(self) -> int:
        return len(self._graphs)

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self.limit,)

    def __call__(
        self, p: Problem | SequenceProblem, impl: str, stats: bool = False
    ) -> tuple[Tensor, ...]:
        """What the operator of the loss gives: the loss, and what belongs to `stats`.

        Raises RuntimeError with every reason why this cannot be a graph.
        """
        flat = ops.flat(p)
        if not ops.direct(flat) or (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        ):
            # A compiler makes graphs of its own, and an outer graph takes the launches as they are.
            return ops.loss(p, impl, stats)
        reasons = self._reasons(p, impl)
        if reasons:
            raise RuntimeError("cuda_graph=True cannot be used here: " + "; ".join(reasons))
        needs = ops.wanted(p)
        graph = self._graph(p, flat, needs, stats, impl)
        tensors = [x for x in flat if isinstance(x, Tensor)]
        if not any(needs):
            return tuple(graph.run(tensors)[0])
        names = dict(zip(ops.gradient_names(p), needs, strict=True))
        return _Replay.apply(graph, [names.get(f.name, False) for f in fields(p)], *flat)

    def _reasons(self, p: Problem | SequenceProblem, impl: str) -> list[str]:
        source = p.pv if isinstance(p, Problem) else p.history
        reasons = []
        if source.device.type not in DEVICES:
            reasons.append(f"the tensors are on {source.device}, expected a CUDA device")
        if impl not in IMPLS:
            reasons.append(f"impl={impl!r} cannot be captured, expected {' or '.join(IMPLS)}")
        if p.reduction == "none":
            reasons.append(
                'reduction="none" has an upstream gradient per item, known only after the forward pass; expected "mean" or "sum"'
            )
        if source.dtype == torch.float16:
            reasons.append(
                "float16 gradients would vanish before a GradScaler's factor reaches them; expected bfloat16 or float32"
            )
        return reasons

    def _graph(
        self,
        p: Problem | SequenceProblem,
        flat: Sequence[Any],
        needs: list[bool],
        stats: bool,
        impl: str,
    ) -> _Graph:
        signature = (
            impl,
            stats,
            tuple(needs),
            torch.get_float32_matmul_precision(),
            *((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in flat),
        )
        source = flat[0]
        if source.is_cuda:
            stream = torch.cuda.current_stream(source.device)
            if self._stream is not None and self._stream != stream:
                stream.wait_stream(self._stream)
            self._stream = stream
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
        graph = self._graphs.get(signature)
        if graph is None:
            graph = self._graphs[signature] = _Graph(p, needs, stats, impl, self._pool)
            if len(self._graphs) > self.limit:
                self._graphs.popitem(last=False)
                self._evicted += 1
                if self._evicted == self.limit:
                    warnings.warn(
                        f"cuda_graph=True: {2 * self.limit} different signatures so far, and each is captured anew; "
                        "pad pages and histories to a few sizes, or leave cuda_graph off",
                        stacklevel=3,
                    )
        self._graphs.move_to_end(signature)
        return graph
