"""impl="triton": the loss as a sequence of kernel launches, without a host sync and without the
similarity matrix.

Forward: pages and compacted lists (plan) -> e and r as contiguous unit rows -> one streaming pass
over the candidates -> log-sum-exp and loss. Backward: gradients of r -> attention -> one transposed
pass for the gradients of e. README.md has the notation and the derivation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy
import torch
import triton
from torch import Tensor

from ...loss.problem import LARGEST_DIM, Gradients, Needs, Problem, SequenceProblem
from . import tiles
from .attention import run_attention
from .attention_backward import attention_backward
from .candidate import loss as candidate_loss
from .chunked import Transposed
from .common import Source, temperature
from .contrast import HALF_LIFT, Pass, lowered
from .gradients import run_reconstruction_gradient, run_row_gradients, spread
from .parts import Upstream
from .passes import forward_pass, loss_scores, sides, transposed_passes
from .plan import make_plan
from .reconstruct import reconstruct_backward, reconstruct_forward
from .results import Results, reduce_losses
from .rows import e_source, normalize, normalize_given, run_gather_anchors
from .sequence import sequence_backward, sequence_forward, sequence_saved_spec
from .shapes import Shape, is_empty, loss_shape
from .state import LossState, Plan, Spec
from .table import ItemColumns, sum_occurrences

__all__ = [
    "loss_backward",
    "loss_forward",
    "reconstruct_backward",
    "reconstruct_forward",
    "saved_spec",
    "sequence_backward",
    "sequence_forward",
    "sequence_saved_spec",
    "unavailable_reasons",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreter_works(triton_version: str, numpy_version: str) -> bool:
    """Triton before 3.7 takes arrays of one element for numbers, which NumPy 2.4 no longer does."""
    old, new = (
        tuple(int(x) for x in version.split(".")[:2]) for version in (triton_version, numpy_version)
    )
    return old >= (3, 7) or new < (2, 4)


def unavailable_reasons(p: Problem | SequenceProblem) -> list[str]:
    """Why these kernels cannot run this problem here; empty if they can."""
    source = p.pv if hasattr(p, "pv") else p.history
    reasons = []
    device = source.device
    if device.type != "cuda" and not (device.type == "cpu" and tiles.interpreted()):
        reasons.append(f"the tensors are on {device.type!r}; Triton kernels need a CUDA device")
    elif device.type == "cpu" and not interpreter_works(triton.__version__, numpy.__version__):
        reasons.append(
            f"the interpreter of Triton {triton.__version__} needs NumPy below 2.4, this is "
            f"{numpy.__version__}"
        )
    if (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        reasons.append("the GPU is older than compute capability 8.0")
    if source.dtype not in _DTYPES:
        reasons.append(f"dtype is {source.dtype}; float32, float16 or bfloat16 is needed")
    if not 1 <= source.shape[1] <= LARGEST_DIM:
        reasons.append(
            f"the embedding dimension is {source.shape[1]}; 1 to {LARGEST_DIM} is supported"
        )
    if not reasons and not tiles.interpreted():
        if isinstance(p, Problem) and p.attention == "candidate":
            reasons += _shared_memory_reasons(p)
    return reasons


def _shared_memory_reasons(p: Problem) -> list[str]:
    """Of attention for each candidate: all other kernels fit into 99 KiB."""
    inputs = (getattr(p, name) for name in Needs._fields)
    gradients = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    dtype, dim, there = p.pv.dtype, p.pv.shape[1], tiles.shared_memory(p.pv.device)
    needed = tiles.candidate_bytes(dtype, dim, gradients)
    if needed <= there:
        return []
    kind = f"{dtype}".removeprefix("torch.") + (" and gradients" if gradients else "")
    half = tiles.candidate_bytes(torch.bfloat16, dim, gradients)
    return [
        f'attention="candidate" of {dim} dimensions needs {needed // 1024} KiB of shared memory '
        f"for {kind} ({half // 1024} for bfloat16), a block of this GPU has {there // 1024}"
    ]


def saved_spec(p: Problem, needs: Needs) -> Spec:
    """Shapes and types of `saved`; nothing is saved where there is nothing to compute or nobody
    wants gradients."""
    if not any(needs) or is_empty(p):
        return []
    if p.attention == "candidate":
        return candidate_loss.saved_spec(p)
    return LossState.spec(loss_shape(p))


def loss_forward(p: Problem, needs: Needs, stats: bool) -> tuple[Any, ...]:
    """(loss, item_loss, log_sum_exp, positive_similarity, rank, is_anchor, num_skipped, saved)."""
    return forward(p, needs, stats, p.reconstructed)


def forward(p: Problem, needs: Needs, stats: bool, given: Tensor | None) -> tuple[Any, ...]:
    """The loss; `given` is R [N, D], of the problem or of another implementation's attention."""
    rows, device = p.num_pv if stats else 0, p.pv.device
    floats = (torch.zeros(rows, dtype=torch.float32, device=device) for _ in range(3))
    per_row = (*floats, torch.zeros(rows, dtype=torch.int64, device=device))
    if is_empty(p):
        shape = (p.num_pv,) if p.reduction == "none" else ()
        loss = torch.zeros(shape, dtype=torch.float32, device=device)
        is_anchor = torch.zeros(rows, dtype=torch.bool, device=device)
        skipped = _skipped_without_history(p) if stats else per_row[3].clone()
        return loss, *per_row, is_anchor, skipped, []

    if p.attention == "candidate":
        found: tuple[Tensor, Tensor, Plan] = candidate_loss.forward(p, stats, per_row)
    else:
        found = _forward(p, any(needs), stats, given, per_row)
    loss, items, state = found
    if p.reduction == "none":
        loss = items.clone() if stats else items
    is_anchor = state.flags[0] != 0 if stats else state.flags.new_zeros(0, dtype=torch.bool)
    skipped = state.counts[3].to(torch.int64) if stats else per_row[3].clone()
    saved = state.saved() if any(needs) else []
    return loss, *per_row, is_anchor, skipped, saved


def _forward(
    p: Problem, grads: bool, stats: bool, given: Tensor | None, per_row: Sequence[Tensor]
) -> tuple[Tensor, Tensor, Plan]:
    """(loss, items' losses, state); `per_row` are where statistics go: item loss, log-sum-exp,
    similarity, rank."""
    s = loss_shape(p, grads)
    t = LossState.empty(s)
    make_plan(p, s, t, p.clicked)
    positive = torch.empty(s.rows, 2, dtype=torch.float32, device=s.device)
    if t.e is not None and t.column is not None:
        source = Source(p.pv, None) if s.merged else e_source(p)
        normalize(source, s, t.e, t.column.list, t.counts[2:3])
    if given is not None:
        normalize_given(p, s, t, given, positive)
    else:
        run_attention(p, s, t, t.r, t.norm, positive)
    if t.e_anchor is not None:
        every, positive = positive, torch.empty_like(positive)
        normalize(e_source(p), s, t.e_anchor, t.anchor.list, t.counts[0:1])
        run_gather_anchors(s, t, every, positive)

    losses = []
    for direction in s.directions:
        x, y = sides(p, s, t, direction)
        kept, first = t.kept(direction), direction == s.directions[0]
        out = Pass(
            kept.acc,
            kept.top,
            torch.empty(s.part_rows, dtype=torch.float32, device=s.device),
            torch.empty(s.part_rows, dtype=torch.int32, device=s.device) if stats else None,
            s.slots(s.rows, s.tile),
            s.tile,
        )
        losses.append(torch.empty(s.rows, dtype=torch.float32, device=s.device))
        results = Results(
            kept.lse, kept.miss, losses[-1], positive, p.log_q, per_row[1:], stats and first
        )
        transposed = None
        if kept.dy is not None and kept.factor is not None:
            g, factor = _early_row_gradients(p, s, t)
            transposed = Transposed(g, kept.dy)
            kept.factor.copy_(factor)
        forward_pass(s, x, y, loss_scores(p, s), out, results, transposed)
    return *reduce_losses(p, s, t, t.weight_sum, losses, per_row[0], stats), t


def _skipped_without_history(p: Problem) -> Tensor:
    """Clicked items of a batch without any history: all of them, padding apart."""
    assert p.clicked is not None
    clicked = p.clicked if p.pv_mask is None else p.clicked & p.pv_mask
    inside = torch.arange(p.num_pv, device=clicked.device) < p.pv_offsets[-1]
    return (clicked & inside).sum()


def loss_backward(p: Problem, needs: Needs, saved: Sequence[Tensor], grad: Tensor) -> Gradients:
    """Of `p`'s inputs."""
    given = p.reconstructed is not None
    grads, d_r = backward(p, needs, saved, grad, given)
    if given and needs.reconstructed:
        grads.reconstructed = d_r
    return grads


def backward(
    p: Problem, needs: Needs, saved: Sequence[Tensor], grad: Tensor, given: bool
) -> tuple[Gradients, Tensor | None]:
    """Gradients, and dL/dR [N, D] where R was given."""
    if is_empty(p):
        d_r = p.pv.new_zeros(p.num_pv, p.pv.shape[1]) if given else None
        return Gradients.zeros(p, needs), d_r
    if p.attention == "candidate":
        return candidate_loss.backward(p, needs, saved, grad), None
    s = loss_shape(p)
    t = LossState.restored(s, saved)

    # Upstream gradient of each anchor. In a mean or a sum without weights it is one number, and
    # stays out of the transposed pass: a factor of every column costs it 3 percent.
    uniform = p.weights is None and p.reduction != "none"
    share = 1.0 / len(s.directions)
    g = None if uniform else run_row_gradients(p, s, t, grad, t.weight_sum, share)
    d_pv = torch.empty_like(p.pv) if needs.pv and p.history is not None else None
    results, factor = transposed_passes(p, s, t, needs, grad, g, d_pv)
    lower = 2.0**-HALF_LIFT if s.dtype == torch.float16 else 1.0
    up = Upstream(g, grad, t.weight_sum, share, lower, factor)
    dr, tau_parts = run_reconstruction_gradient(p, s, t, results.get("identify"), up)
    d_rows = dq = dk = dv = None
    if given:
        d_rows = torch.empty(s.rows, s.dim, dtype=s.dtype, device=s.device)
        spread(p, s, t, t.r, d_rows, dr)
    else:
        dq, dk, dv = attention_backward(p, s, t, needs, dr)
    grads, d_history = Gradients.of_history(p, needs, dk, dv)
    if needs.temperature:
        assert p.temperature is not None
        grads.temperature = -tau_parts.sum() / p.temperature
    if needs.query:
        grads.query = spread(p, s, t, t.r, torch.empty_like(p.query), dq)
    if needs.pv:
        if d_pv is None:
            d_pv = torch.empty(s.rows, s.dim, dtype=torch.float32, device=s.device)
        own_dq = dq if p.query is None else None
        column = results.get("reconstruct")
        grads.pv = spread(p, s, t, t.r, d_pv, own_dq, up, column)
        if p.history is None:
            shown = [(p.pv_index, t.pv_page), (p.history_index, t.history_page)]
            rows = (p.pv, s, shown, d_pv, d_history)
            if column is None or not s.merged:
                grads.pv = sum_occurrences(*rows)
            else:
                columns = ItemColumns(t.item_count, t.item_place)
                merged = up, columns, t.counts, column, temperature(p)
                grads.pv = sum_occurrences(*rows, *merged)
    return grads, d_rows


def _early_row_gradients(p: Problem, s: Shape, t: LossState) -> tuple[Tensor, Tensor]:
    """g_i for an upstream gradient of 1, before the losses are known, and its factor."""
    one = torch.ones((), dtype=torch.float32, device=s.device)
    weight_sum = one
    if p.reduction == "mean":
        flags = t.flags[0]
        weight_sum = (
            flags.sum(dtype=torch.float32)
            if p.weights is None
            else torch.where(flags != 0, p.weights, 0).sum()
        )
    g = run_row_gradients(p, s, t, one, weight_sum, 1.0 / len(s.directions))
    return lowered(g) if s.dtype == torch.float16 else (g, one)
