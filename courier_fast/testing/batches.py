"""Batches to judge and measure implementations on: random pages of a shape, and the public call of
the loss on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

import courier_fast

# Of the three losses of COURIER's authors.
HEADS, HIDDEN, COURIER_TAU = 4, 1024, 0.05


@dataclass(frozen=True)
class Shape:
    """B pages of equally many PV items, histories of 1 to `longest_history` items."""

    pages: int
    items: int
    longest_history: int
    dim: int
    clicked: float  # share of the PV items


@dataclass(frozen=True)
class Options:
    """What the loss is asked for beside its shape."""

    tau: float = 0.1
    negatives: str = "batch"
    direction: str = "reconstruct"
    ids: bool = False
    log_q: bool = False
    unique_items: int = 0  # 0: every row has an embedding of its own
    weights: bool = False
    learn_tau: bool = False  # the temperature takes a gradient
    stats: bool = False
    attention: str = "anchor"
    cosine: bool = False  # attention by cosines at a temperature of 1, embeddings of unit length
    courier: bool = False  # the three losses of COURIER's authors, in place of all above


@dataclass(frozen=True)
class Batch:
    """Arguments of one call, packed; with a table, `pv` and `history` are indices into it."""

    options: Options
    pv: Tensor  # [N, D] or [N] int64
    history: Tensor  # [K, D] or [K] int64
    embeddings: Tensor | None  # [n, D]
    clicked: Tensor  # [N] bool
    pv_offsets: Tensor  # [B + 1]
    history_offsets: Tensor  # [B + 1]
    item_ids: Tensor | None  # [N]
    log_q: Tensor | None  # [N] float32
    weights: Tensor | None  # [N] float32
    temperature: Tensor | None  # 0-d
    longest_history: int
    parameters: dict[str, Tensor] = field(default_factory=dict)  # of a loss that has some

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors that take a gradient."""
        tau = {} if self.temperature is None else {"temperature": self.temperature}
        if self.embeddings is not None:
            return {"embeddings": self.embeddings} | tau
        return {"pv": self.pv, "history": self.history} | tau | self.parameters

    @property
    def rows(self) -> int:
        return len(self.pv)

    @property
    def anchors(self) -> int:
        """Every page has a history here, so each clicked item is an anchor."""
        return int(self.clicked.sum())

    @property
    def attended(self) -> int:
        """History rows of pages with an anchor."""
        page = self.clicked.nonzero().squeeze(1) // (self.rows // (len(self.pv_offsets) - 1))
        return int(self.history_offsets.diff()[page.unique()].sum())

    @property
    def gradient_bytes(self) -> int:
        return sum(x.numel() * x.element_size() for x in self.inputs.values())

    @property
    def columns(self) -> int:
        """Candidates that differ: equal items of a table are one column."""
        merged = self.embeddings is not None and self.item_ids is None and self.log_q is None
        return len(self.pv.unique()) if merged else self.rows

    @property
    def dim(self) -> int:
        dim: int = next(iter(self.inputs.values())).shape[1]
        return dim

    def to(self, dtype: torch.dtype) -> Batch:
        """The same values in another type, as fresh leaves."""
        leaves: dict[str, Any] = {
            k: v.detach().to(dtype).clone().requires_grad_() for k, v in self.inputs.items()
        }
        if self.weights is not None:
            leaves["weights"] = self.weights.to(dtype)
        return self.with_inputs(leaves)

    def with_inputs(self, leaves: dict[str, Any]) -> Batch:
        """With others in place of some inputs."""
        parameters = {name: leaves.get(name, x) for name, x in self.parameters.items()}
        fields = {name: x for name, x in leaves.items() if name not in parameters}
        return replace(self, **fields, parameters=parameters)


def _zipf(count: int, size: int, generator: torch.Generator) -> Tensor:
    """`size` draws of `count` items, the k-th most popular with a weight of 1 / k."""
    weights = 1.0 / torch.arange(1, count + 1, dtype=torch.float64)
    return torch.multinomial(weights, size, replacement=True, generator=generator)


def _parameters(dim: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Those of the attention and the click head, by their names in `CourierLoss`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(1 << 31, (1,), generator=generator)))
        module = courier_fast.CourierLoss(dim, HEADS, hidden=HIDDEN)
    return {name: x.detach() for name, x in module.named_parameters()}


def make_batch(
    shape: Shape, options: Options, dtype: torch.dtype, device: torch.device, seed: int = 0
) -> Batch:
    """Random pages, the same of a seed; rows of a page share a direction, so that pairs match."""
    generator = torch.Generator().manual_seed(seed)
    rows = shape.pages * shape.items
    lengths = torch.randint(1, shape.longest_history + 1, (shape.pages,), generator=generator)
    history_offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    count = int(history_offsets[-1])

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    def leaf(x: Tensor) -> Tensor:
        x = functional.normalize(x, dim=1) if options.cosine else x
        return x.to(device, dtype).requires_grad_()

    ids = None
    embeddings = None
    if options.unique_items:
        pv = _zipf(options.unique_items, rows, generator)
        history = _zipf(options.unique_items, count, generator)
        embeddings = leaf(randn(options.unique_items, shape.dim))
    else:
        topic = randn(shape.pages, shape.dim)
        pv = randn(rows, shape.dim) + topic.repeat_interleave(shape.items, 0)
        history = randn(count, shape.dim) + topic.repeat_interleave(lengths, 0)
        pv, history = leaf(pv), leaf(history)
    if options.ids:
        ids = pv.clone() if options.unique_items else _zipf(max(rows // 2, 1), rows, generator)
    log_q = None
    if options.log_q:
        log_q = (torch.rand(rows, generator=generator) + 0.01).log()
    return Batch(
        options=options,
        pv=pv.to(device),
        history=history.to(device),
        embeddings=embeddings,
        clicked=(torch.rand(rows, generator=generator) < shape.clicked).to(device),
        pv_offsets=torch.arange(0, rows + 1, shape.items, device=device),
        history_offsets=history_offsets.to(device),
        item_ids=None if ids is None else ids.to(device),
        log_q=None if log_q is None else log_q.to(device),
        weights=torch.rand(rows, generator=generator).to(device) if options.weights else None,
        temperature=torch.tensor(options.tau, device=device).requires_grad_()
        if options.learn_tau
        else None,
        longest_history=shape.longest_history,
        parameters={n: leaf(x) for n, x in _parameters(shape.dim, generator).items()}
        if options.courier
        else {},
    )


# ---- the calls -----------------------------------------------------------------------------------


def attention_of(options: Options) -> dict[str, Any]:
    return {
        "attention": options.attention,
        "attention_temperature": 1.0 if options.cosine else None,
    }


def call(batch: Batch, impl: str, **arguments: Any) -> Tensor:
    """The public function, packed layout."""
    if batch.options.courier:
        return courier(batch, impl)
    given: dict[str, Any] = {
        "pv_offsets": batch.pv_offsets,
        "history_offsets": batch.history_offsets,
        "embeddings": batch.embeddings,
        "temperature": batch.options.tau if batch.temperature is None else batch.temperature,
        "negatives": batch.options.negatives,
        "direction": batch.options.direction,
        "item_ids": batch.item_ids,
        "log_q": batch.log_q,
        "weights": batch.weights,
        "return_stats": batch.options.stats,
        "impl": impl,
        **attention_of(batch.options),
    }
    given |= arguments
    clicked = given.pop("clicked", batch.clicked)
    result = courier_fast.reconstruction_loss(batch.pv, batch.history, clicked, **given)
    return result[0] if isinstance(result, tuple) else result


@cache  # made once: its own parameters, which others stand in for, take time to draw
def _fused(dim: int, device: torch.device, impl: str) -> nn.Module:
    return courier_fast.CourierLoss(dim, HEADS, COURIER_TAU, hidden=HIDDEN, impl=impl).to(device)


def courier(batch: Batch, impl: str) -> Tensor:
    """The three losses of COURIER's authors, packed layout or a table."""
    # Of the parameters' kind, whatever stands for numbers there.
    gamma = batch.parameters["click_head.2.weight"].detach()
    running = {"running_mean": torch.zeros_like(gamma), "running_var": torch.ones_like(gamma)}
    held = batch.parameters | {f"click_head.2.{name}": x for name, x in running.items()}
    pages = {"pv_offsets": batch.pv_offsets, "history_offsets": batch.history_offsets}
    rows = batch.pv, batch.history, batch.clicked
    module = _fused(batch.dim, batch.clicked.device, impl)
    return functional_call(module, held, rows, pages | {"embeddings": batch.embeddings})


def graphed(batch: Batch) -> Callable[[Batch], Tensor] | str:
    """The module with its CUDA graph, or why there is none."""
    if not batch.clicked.is_cuda:
        return "a CUDA graph needs a CUDA device"
    options = batch.options
    if options.learn_tau:
        return "the module learns a temperature of its own, not this one"
    if options.courier:
        return "the module of three losses has no graph"
    module = courier_fast.ReconstructionLoss(
        options.tau,
        negatives=options.negatives,
        direction=options.direction,
        return_stats=options.stats,
        impl="triton",
        cuda_graph=True,
        **attention_of(options),
    )

    def loss(b: Batch) -> Tensor:
        result = module(
            b.pv,
            b.history,
            b.clicked,
            pv_offsets=b.pv_offsets,
            history_offsets=b.history_offsets,
            embeddings=b.embeddings,
            item_ids=b.item_ids,
            log_q=b.log_q,
            weights=b.weights,
        )
        return result[0] if isinstance(result, tuple) else result

    return loss
