"""What is measured: this package's implementations, and what a user would write instead."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from bench import courier, peers
from courier_fast.testing.batches import Batch, call, graphed

OURS = ("cpu", "triton", "triton_graph", "xformers")
NAMES = (
    "reference",
    "eager",
    "eager_full",
    "compile",
    "compile_rows",
    "lce",
    "lce_chunked",
    *peers.NAMES,
    *OURS,
)

Loss = Callable[[Batch], Tensor]


@dataclass(frozen=True)
class Candidate:
    """A way to compute the loss of a batch; `full` if it holds N x N similarities, not M x N."""

    name: str
    loss: Loss
    ours: bool = False
    full: bool = False
    another: bool = False  # a related loss: its time can be compared, its values cannot
    stored: bool = True  # whether it holds similarities of all pairs at all


def _graphed(batch: Batch) -> Candidate | str:
    found = graphed(batch)
    return found if isinstance(found, str) else Candidate("triton_graph", found, ours=True)


def _logit_type(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def padded(batch: Batch, pages: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """E [N, D], and the histories of some pages [P, H, D] with what is real of them [P, H]."""
    first, lengths = batch.history_offsets[:-1], batch.history_offsets.diff()
    if pages is not None:
        first, lengths = first[pages], lengths[pages]
    slots = torch.arange(batch.longest_history, device=lengths.device)
    present = slots < lengths[:, None]
    source = (first[:, None] + slots).clamp(max=len(batch.history) - 1)
    if batch.embeddings is not None:
        return batch.embeddings[batch.pv], batch.embeddings[batch.history[source]], present
    return batch.pv, batch.history[source], present


def attend(q: Tensor, c: Tensor, present: Tensor, cosine: bool) -> Tensor:
    """R [P, n, D] of the queries [P, n, D], or of the same [n, D] on every page."""
    k, scale = c, q.shape[-1] ** -0.5
    if cosine:
        q, k, scale = functional.normalize(q, dim=-1), functional.normalize(c, dim=-1), 1.0
    scores = (q @ k.mT).to(_logit_type(q)) * scale
    a = scores.masked_fill(~present[:, None, :], -torch.inf).softmax(-1)
    return a.to(c.dtype) @ c


def unit_rows(batch: Batch, rows: Tensor | None) -> tuple[Tensor, Tensor]:
    """r of the rows (None: all) and e of all, by attention over padded histories."""
    e, c, present = padded(batch)
    q = e.view(len(c), -1, e.shape[1])  # every page has as many PV items
    r = attend(q, c, present, batch.options.cosine).view_as(e)
    return functional.normalize(r if rows is None else r[rows], dim=-1), functional.normalize(
        e, dim=-1
    )


def eager_logits(batch: Batch, rows: Tensor | None) -> Tensor:
    """The loss as N x N (rows None) or M x N logits in plain PyTorch; direction "reconstruct"."""
    r, e = unit_rows(batch, rows)
    anchor = torch.arange(batch.rows, device=e.device) if rows is None else rows
    total, weight = contrast(r @ e.T, batch, anchor)
    return total / weight


def contrast(cosine: Tensor, batch: Batch, anchor: Tensor) -> tuple[Tensor, Tensor]:
    """The loss of some rows, cosines [M, N], as a weighted sum; and the sum of the weights."""
    place = torch.arange(batch.rows, device=anchor.device)
    tau = batch.options.tau if batch.temperature is None else batch.temperature
    s = cosine.to(_logit_type(cosine)) / tau
    if batch.log_q is not None:
        s = s - batch.log_q
    ids = batch.item_ids
    if ids is None and batch.embeddings is not None:
        ids = batch.pv
    if ids is not None or batch.options.negatives != "batch":
        itself = anchor[:, None] == place
        other = torch.ones_like(itself)
        page = place // (batch.rows // (len(batch.pv_offsets) - 1))
        if batch.options.negatives == "page":
            other = page[anchor][:, None] == page
        elif batch.options.negatives == "other_pages":
            other = page[anchor][:, None] != page
        if ids is not None:
            other = other & (ids[anchor][:, None] != ids)
        s = s.masked_fill(~(itself | other), -torch.inf)
    loss = functional.cross_entropy(s, anchor, reduction="none")
    weight = batch.clicked.to(loss.dtype) if batch.weights is None else batch.weights
    weight = torch.where(batch.clicked, weight, 0)[anchor]
    return (weight * loss).sum(), weight.sum()


# ---- attention for each candidate ----------------------------------------------------------------

# Numbers in the reconstructions of a chunk of pages. On a CPU a larger one is no faster: its memory
# has to be mapped anew.
CHUNK_ELEMENTS = {"cpu": 2**22, "cuda": 2**28}


def candidate_loss(
    batch: Batch, rows: Tensor, pages: Tensor, which: Tensor
) -> tuple[Tensor, Tensor]:
    """`contrast` of the anchors `rows`, on `pages`; `which` of these is the page of each."""
    e, c, present = padded(batch, pages)
    r = functional.normalize(attend(e, c, present, batch.options.cosine), dim=-1)  # [P, N, D]
    cosine = (r * functional.normalize(e, dim=-1)).sum(-1)
    return contrast(cosine[which], batch, rows)


def _chunks(batch: Batch, elements: float) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Arguments of `candidate_loss`, some pages after the other."""
    rows = batch.clicked.nonzero().squeeze(1)
    page = rows // (batch.rows // (len(batch.pv_offsets) - 1))
    pages, which = page.unique_consecutive(return_inverse=True)
    count = int(max(1, min(elements / (batch.rows * batch.dim), len(pages))))
    for first in range(0, len(pages), count):
        mine = (which >= first) & (which < first + count)
        yield rows[mine], pages[first : first + count], which[mine] - first


class _Given(torch.autograd.Function):
    """A loss whose gradients are known."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: list[Tensor], *inputs: Tensor) -> Tensor:
        ctx.gradients = [g.to(x.dtype) for g, x in zip(gradients, inputs, strict=True)]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        return None, None, *(g * grad for g in ctx.gradients)


def in_chunks(batch: Batch, part: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
    """The loss with attention for each candidate. Every anchor needs its own page alone, so each
    chunk of pages goes forward and backward before the next: nothing is computed twice, and nothing
    is held of more than a chunk."""
    inputs = list(batch.inputs.values())
    gradients = [torch.zeros_like(x, dtype=_logit_type(x)) for x in inputs]
    total = weights = 0.0
    for chunk in _chunks(batch, CHUNK_ELEMENTS[batch.clicked.device.type]):
        loss, weight = part(batch, *chunk)
        if torch.is_grad_enabled():
            for g, x in zip(gradients, torch.autograd.grad(loss, inputs), strict=True):
                g += x
        total, weights = total + loss.detach(), weights + weight
    if not torch.is_grad_enabled():
        return total / weights
    return _Given.apply(total / weights, [g.div_(weights) for g in gradients], *inputs)


def at_once(batch: Batch) -> Tensor:
    """The same, of all pages together."""
    (chunk,) = _chunks(batch, math.inf)
    total, weight = candidate_loss(batch, *chunk)
    return total / weight


def _candidate_attention(name: str, batch: Batch) -> Candidate | str:
    if name == "eager":
        return Candidate(name, lambda b: in_chunks(b, candidate_loss), stored=False)
    if name == "eager_full":
        return Candidate(name, at_once, full=True)
    if name != "compile":
        return 'computes attention "anchor" only'
    missing = _without_compiler(batch.clicked.device)
    if missing is not None:
        return missing
    compiled = torch.compile(candidate_loss)
    return Candidate(name, lambda b: in_chunks(b, compiled), stored=False)


def _linear_cross_entropy(batch: Batch, **options: Any) -> Tensor:
    rows = batch.clicked.nonzero().squeeze(1)
    r, e = unit_rows(batch, rows)
    function: Any = vars(functional)["linear_cross_entropy"]  # older torch has none
    return function(r / batch.options.tau, e, rows, **options)


def _courier(name: str, batch: Batch) -> Candidate | str:
    if name not in ("eager", "compile"):
        return "computes the reconstruction loss alone"
    of = courier.plain(batch.dim, batch.clicked.device, batch.pv.dtype)

    def plain(b: Batch) -> Tensor:
        return of(b, *padded(b)[1:])

    if name == "eager":
        return Candidate(name, plain)
    missing = _without_compiler(batch.clicked.device)
    return Candidate(name, torch.compile(plain)) if missing is None else missing


def _without_compiler(device: torch.device) -> str | None:
    if device.type == "cpu" and not any(shutil.which(c) for c in ("g++", "clang++", "c++", "cl")):
        return "torch.compile needs a C++ compiler on the CPU, and none is on the PATH"
    return None


def make(name: str, batch: Batch) -> Candidate | str:
    """The candidate, or why it cannot be measured on this batch."""
    options = batch.options
    if name == "reference":
        return Candidate(name, lambda b: call(b, "reference"))
    if name == "triton_graph":
        return _graphed(batch)
    if name in OURS:
        return Candidate(name, lambda b: call(b, name), ours=True)
    if options.courier:
        return _courier(name, batch)
    if options.attention == "candidate":
        return _candidate_attention(name, batch)
    if name == "memeff":
        return _from(name, batch, peers.memeff(batch))
    if name == "siglip":
        return _from(name, batch, peers.siglip(batch), another=True)
    if options.direction != "reconstruct":
        return 'computes direction "reconstruct" only'
    if options.stats:
        return "has no statistics"
    if name == "eager":
        return Candidate(name, lambda b: eager_logits(b, b.clicked.nonzero().squeeze(1)))
    if name == "eager_full":
        return Candidate(name, lambda b: eager_logits(b, None), full=True)
    if name.startswith("compile"):
        missing = _without_compiler(batch.clicked.device)
        if missing is not None:
            return missing
        compiled = torch.compile(eager_logits)
        if name == "compile":
            return Candidate(name, lambda b: compiled(b, None), full=True)
        return Candidate(name, lambda b: compiled(b, b.clicked.nonzero().squeeze(1)))
    plain = options.negatives == "batch" and not options.log_q and not options.weights
    if not plain or batch.item_ids is not None or batch.embeddings is not None:
        return "takes no masks or weights: all items are candidates, without ids or log_q"
    if options.learn_tau:
        return "takes no gradient of a temperature"
    if name in peers.NAMES:
        return _from(name, batch, peers.cross_entropy(name, batch))
    if not hasattr(functional, "linear_cross_entropy"):
        return "this torch has no linear_cross_entropy"
    chunked = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if name == "lce_chunked" and chunked is None:
        return "this torch has no chunked linear_cross_entropy"
    chunks = {"options": chunked()} if name == "lce_chunked" and chunked is not None else {}
    return Candidate(
        name, lambda b: _linear_cross_entropy(b, **chunks), stored=name != "lce_chunked"
    )


def _from(name: str, batch: Batch, found: Any, another: bool = False) -> Candidate | str:
    """A peer's contrast behind its own attention, or the eager one."""
    attend = peers.attention(name, batch)
    if isinstance(attend, str):
        return attend
    if isinstance(found, str):
        return found

    def loss(b: Batch) -> Tensor:
        rows = b.clicked.nonzero().squeeze(1)
        if attend is None:
            return found(*unit_rows(b, rows), rows)
        r, e = (functional.normalize(x, dim=-1) for x in (attend(b)[rows], b.pv))
        return found(r, e, rows)

    return Candidate(name, loss, another=another, stored=False)
