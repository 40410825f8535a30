"""A loss as two CUDA graphs per signature, forward and backward:
`ReconstructionLoss(..., cuda_graph=True)`.

The upstream gradient is an input of the second, so gradients have the bits that they have without
graphs. What a replay leaves in the graphs' own memory is copied out at once, and a backward whose
forward has been replayed for other inputs since then replays it again for its own: another call
before the backward, a backward later, twice or never, changes nothing. What is captured is the loss
of a `Problem`: from a user's layout to it, hardly anything is launched.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..surroundings import on_gpu_of
from . import operators
from .problem import Needs, Problem, SequenceProblem

# What can be captured. Other implementations look at values on the host, or run on the CPU.
IMPLS: tuple[str, ...] = ("triton",)
DEVICES: tuple[str, ...] = ("cuda",)

Body = Callable[[], list[Tensor]]


class Place:
    """Where the graphs of one signature are captured and keep their memory.

    A capture takes what an earlier one in the same pool, on the same stream, has given back.
    Forward and backward of a signature do, and are replayed in that order. Between signatures there
    is no order: what one keeps for its backward must not be where another one works, so each has a
    pool of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last: Any = None
        # Not torch's own stream for captures: that one belongs to the GPU of the process's first
        # capture.
        self.stream = torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, body: Body) -> tuple[list[Tensor], Callable[[], None]]:
        """(results, replay): `replay` does again what `body` did, into the same results."""
        current = torch.cuda.current_stream(self._device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            for _ in range(2):  # kernels compile and libraries load outside of the graph
                body()
        current.wait_stream(self.stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on allocating: a loader that pins memory, for one.
        with torch.cuda.graph(
            graph, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"
        ):
            results = body()
        return results, graph.replay

    def take_turn(self) -> None:
        """Its memory is of one stream at a time: a replay on another one waits for the last."""
        stream = torch.cuda.current_stream(self._device)
        if self._last is not None and self._last != stream:
            stream.wait_stream(self._last)
        self._last = stream


class _Graph:
    """One signature: inputs, outputs, what the backward needs, and gradients, that stay where they
    are; the replays."""

    def __init__(self, p: Problem | SequenceProblem, needs: Needs, stats: bool, impl: str) -> None:
        flat = [x.detach().clone() if isinstance(x, Tensor) else x for x in operators.flat(p)]
        self._inputs = [x for x in flat if isinstance(x, Tensor)]
        self._call: object = None  # whose inputs and outputs are in the graphs' memory
        forward, backward = operators.passes(type(p)(*flat), impl)
        number = 0

        def forward_body() -> list[Tensor]:
            nonlocal number
            *outputs, saved = forward(needs, stats)
            number = len(outputs)
            return [*outputs, *saved]

        def backward_body() -> list[Tensor]:
            return backward(needs, self._saved, self._upstream).present()

        with torch.no_grad(), on_gpu_of(self._inputs[0]):
            self._place = Place(self._inputs[0].device)
            self._place.take_turn()
            results, self._forward = self._place.capture(forward_body)
            # Kept, as what is given back to the pool is used by the next capture.
            self._outputs, self._saved = results[:number], results[number:]
            if any(needs):
                self._upstream = torch.ones_like(self._outputs[0])
                self._forward()  # a capture runs nothing, and the backward reads counts from there
                self._gradients, self._backward = self._place.capture(backward_body)

    def _replay(self, call: object, inputs: Sequence[Tensor]) -> None:
        torch._foreach_copy_(self._inputs, list(inputs))
        self._forward()
        self._call = call

    def forward(self, call: object, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Outputs, in memory of their own."""
        with torch.no_grad(), on_gpu_of(self._inputs[0]):
            self._place.take_turn()
            self._replay(call, inputs)
            return [x.clone() if x.numel() else x for x in self._outputs]

    def backward(
        self, call: object, inputs: Sequence[Tensor], upstream: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients, in memory of their own."""
        with torch.no_grad(), on_gpu_of(self._inputs[0]):
            self._place.take_turn()
            if self._call is not call:
                self._replay(call, inputs)
            self._upstream.copy_(upstream)
            self._backward()
            return tuple(x.clone() for x in self._gradients)


class _Last(torch.autograd.Function):
    """Gradients that have no derivative."""

    @staticmethod
    def forward(ctx: Any, upstream: Tensor, *gradients: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in gradients)

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return operators.refuse_double_backward(ctx)


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, graph: _Graph, wanted: Sequence[bool], *flat: Any) -> tuple[Tensor, ...]:
        inputs = [x for x in flat if isinstance(x, Tensor)]
        ctx.graph, ctx.wanted, ctx.call = graph, wanted, object()
        outputs = graph.forward(ctx.call, inputs)
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*outputs[1:])
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Any) -> Any:
        if upstream is None:
            return (None,) * (len(ctx.wanted) + 2)
        found = ctx.graph.backward(ctx.call, ctx.saved_tensors, upstream)
        if torch.is_grad_enabled():  # create_graph
            found = _Last.apply(upstream.detach().requires_grad_(), *found)
        gradients = iter(found)
        return (None, None, *(next(gradients) if want else None for want in ctx.wanted))


class Graphs:
    """The graphs of one module, at most `limit`: the one not used for longest goes.

    A copy of the module starts without graphs.
    """

    def __init__(self, limit: int = 8) -> None:
        self.limit = limit
        self._graphs: OrderedDict[Any, _Graph] = OrderedDict()
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
        flat = operators.flat(p)
        if not operators.direct(flat) or (
            torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
        ):
            # A compiler makes graphs of its own, and an outer graph takes the launches as they are.
            return operators.loss(p, impl, stats)
        reasons = self._reasons(p, impl)
        if reasons:
            raise RuntimeError("cuda_graph=True cannot be used here: " + "; ".join(reasons))
        needs = operators.wanted(p)
        graph = self._graph(p, flat, needs, stats, impl)
        tensors = [x for x in flat if isinstance(x, Tensor)]
        if not any(needs):
            return tuple(graph.forward(None, tensors))
        return _Replay.apply(graph, [getattr(needs, f.name, False) for f in fields(p)], *flat)

    def _reasons(self, p: Problem | SequenceProblem, impl: str) -> list[str]:
        source = operators.source_of(p)
        reasons = []
        if source.device.type not in DEVICES:
            reasons.append(f"the tensors are on {source.device}, expected a CUDA device")
        if impl not in IMPLS:
            reasons.append(f"impl={impl!r} cannot be captured, expected {' or '.join(IMPLS)}")
        return reasons

    def _graph(
        self,
        p: Problem | SequenceProblem,
        flat: Sequence[Any],
        needs: Needs,
        stats: bool,
        impl: str,
    ) -> _Graph:
        signature = (
            impl,
            stats,
            needs,
            torch.get_float32_matmul_precision(),
            *((x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in flat),
        )
        graph = self._graphs.get(signature)
        if graph is None:
            graph = self._graphs[signature] = _Graph(p, needs, stats, impl)
            if len(self._graphs) > self.limit:
                self._graphs.popitem(last=False)
                self._evicted += 1
                if self._evicted == self.limit:
                    warnings.warn(
                        f"cuda_graph=True: {2 * self.limit} different signatures so far, and each "
                        "is captured anew; "
                        "pad pages and histories to a few sizes, or leave cuda_graph off",
                        stacklevel=3,
                    )
        self._graphs.move_to_end(signature)
        return graph
