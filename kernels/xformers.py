"""impl="xformers": the attention by memory_efficient_attention, the contrast by Triton kernels.

xformers takes the length of every page as a Python list, so this implementation synchronises with
the device and cannot be captured in a CUDA graph. Only pages with both a wanted PV row and a
history are gathered: no sequence of length zero reaches xformers, and no padding. Its backward may
use atomics: two runs need not give the same bits.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..loss.problem import LARGEST_DIM, Gradients, Needs, Problem, SequenceProblem

# xformers wants rows of whole 16-byte units; eight elements are enough for every type.
_ALIGNMENT = 8


# ---- whether it can run --------------------------------------------------------------------------


def _fmha() -> ModuleType:
    from xformers.ops import fmha

    return fmha


def _pipeline() -> ModuleType:
    from .triton import loss as triton_loss

    return triton_loss


@functools.cache
def _refusal(device: int, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why xformers has no operator for this GPU, type and size: asked by running one."""
    x = torch.ones(2, head_dim, dtype=dtype, device=torch.device("cuda", device))
    try:
        out, lse = attend(x, x, x, [1, 1], [1, 1], 1.0, 1)
        attend_backward(x, out, lse, x, x, x, [1, 1], [1, 1], 1.0, 1)
    except (NotImplementedError, ValueError, RuntimeError) as error:
        return str(error)
    return None


def _xformers_reasons(x: Tensor, heads: int) -> list[str]:
    try:
        _fmha()
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "xformers":
            return ['xformers is not installed: pip install "courier-fast[xformers]"']
        return [f"xformers cannot be imported: {error}"]
    except Exception as error:  # a wheel built for another torch fails in many ways
        return [f"xformers cannot be imported: {type(error).__name__}: {error}"]
    refusal = None
    if x.is_cuda:
        refusal = _refusal(
            x.get_device(), x.dtype, -(-x.shape[1] // heads // _ALIGNMENT) * _ALIGNMENT
        )
        if refusal is None:
            return []
    reasons = [] if refusal is None else [f"xformers refuses: {refusal}"]
    # A wheel for another torch imports, with a warning, but without its own kernels.
    broken = getattr(sys.modules.get("xformers._cpp_lib"), "_cpp_library_load_exception", None)
    if broken is not None:
        reasons.append(f"xformers' compiled part cannot be loaded: {' '.join(str(broken).split())}")
    return reasons


def unavailable_reasons(p: Problem | SequenceProblem) -> list[str]:
    """Every reason why this implementation cannot run this problem here; empty if it can."""
    source = p.pv if hasattr(p, "pv") else p.history
    reasons = []
    if not torch.cuda.is_available():
        reasons.append("torch finds no CUDA device, and xformers' attention needs one")
    elif not source.is_cuda:
        reasons.append(
            f"the tensors are on {source.device.type!r}; xformers' attention needs a CUDA device"
        )
    if getattr(p, "attention", "anchor") == "candidate":
        reasons.append('attention is "candidate", which needs kernels of its own')
    if getattr(p, "reconstructed", None) is not None:
        reasons.append("reconstructed is given: there is no attention for xformers to compute")
    reasons += _xformers_reasons(source, getattr(p, "num_heads", 1))
    try:
        triton_loss = _pipeline()
    except Exception as error:  # an installation that is broken fails in many ways
        what = error if isinstance(error, ImportError) else f"{type(error).__name__}: {error}"
        reasons.append(f"Triton, which the contrast needs, cannot be imported: {what}")
        if source.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            reasons.append(f"dtype is {source.dtype}; float32, float16 or bfloat16 is needed")
        if not 1 <= source.shape[1] <= LARGEST_DIM:
            reasons.append(
                f"the embedding dimension is {source.shape[1]}; 1 to {LARGEST_DIM} is supported"
            )
        return reasons
    return reasons + [f"contrast: {reason}" for reason in triton_loss.unavailable_reasons(p)]


# ---- attention -----------------------------------------------------------------------------------


def _as_heads(x: Tensor, heads: int) -> Tensor:
    """[n, D] -> [1, n, heads, D / heads], zeros appended up to the alignment."""
    x = x.reshape(1, x.shape[0], heads, x.shape[1] // heads)
    return pad(x, (0, -x.shape[-1] % _ALIGNMENT))


def _from_heads(x: Tensor, dim: int) -> Tensor:
    heads = x.shape[2]
    return x[..., : dim // heads].reshape(x.shape[1], dim)


def attend(
    q: Tensor,  # [n, D] rows of the pages, one page after the other
    k: Tensor,  # [k, D]
    v: Tensor,  # [k, D]
    pv_lengths: list[int],  # rows of q of each page, none zero
    history_lengths: list[int],  # rows of k and v of each page, none zero
    scale: float,
    heads: int,
) -> tuple[Tensor, Tensor]:
    """R [n, D] and xformers' log-sum-exps.

    R_j = sum_k a_jk v_k,  a_jk = softmax over k in H_b of (scale q_j . k_k)
    """
    fmha = _fmha()
    mask = fmha.BlockDiagonalMask.from_seqlens(pv_lengths, history_lengths, device=q.device)
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        _as_heads(q, heads), _as_heads(k, heads), _as_heads(v, heads), attn_bias=mask, scale=scale
    )
    return _from_heads(out, q.shape[1]), lse


def attend_backward(
    grad: Tensor,  # [n, D]
    out: Tensor,  # [n, D] as `attend` gave it
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pv_lengths: list[int],
    history_lengths: list[int],
    scale: float,
    heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dL/dq, dL/dk, dL/dv) of `attend`."""
    fmha = _fmha()
    mask = fmha.BlockDiagonalMask.from_seqlens(pv_lengths, history_lengths, device=q.device)
    dq, dk, dv = fmha.memory_efficient_attention_backward(
        *(_as_heads(x, heads) for x in (grad, out)),
        lse,
        *(_as_heads(x, heads) for x in (q, k, v)),
        attn_bias=mask,
        scale=scale,
    )
    return tuple(_from_heads(x, q.shape[1]) for x in (dq, dk, dv))  # type: ignore[return-value]


@dataclass(frozen=True)
class _Gathered:
    """The rows that attend and are attended to, and what they hold."""

    pv: Tensor  # [n] rows of the batch
    history: Tensor  # [k]
    pv_lengths: list[int]
    history_lengths: list[int]
    q: Tensor  # [n, D]
    k: Tensor  # [k, D]
    v: Tensor  # [k, D]


def _pages(offsets: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """Page of every row [rows], and B for padding (masked, or at or past the last offset)."""
    page = torch.searchsorted(offsets, torch.arange(rows, device=offsets.device), right=True) - 1
    return page if mask is None else torch.where(mask, page, offsets.shape[0] - 1)


def _gather(p: Problem, wanted: Tensor | None) -> _Gathered:
    """Rows of pages with a history and a wanted PV row ([N] bool, None: all). Synchronises."""
    count = p.pv_offsets.shape[0]  # pages, and one that stands for padding
    pv_page = _pages(p.pv_offsets, p.pv_mask, p.num_pv)
    if wanted is not None:
        pv_page = torch.where(wanted, pv_page, count - 1)
    history_page = _pages(p.history_offsets, p.history_mask, p.num_history)
    lengths = torch.stack([torch.bincount(x, minlength=count) for x in (pv_page, history_page)], 1)
    used = (lengths > 0).all(1)
    used[-1] = False
    pv, history = used[pv_page].nonzero().squeeze(1), used[history_page].nonzero().squeeze(1)
    pairs = lengths[used].tolist()
    c = p.pv if p.history is None else p.history
    c_rows = history if p.history_index is None else p.history_index[history]
    q_rows = pv if p.pv_index is None else p.pv_index[pv]
    c_values = c[c_rows] if p.key is None or p.value is None else c[:0]
    return _Gathered(
        pv,
        history,
        [pair[0] for pair in pairs],
        [pair[1] for pair in pairs],
        p.pv[q_rows] if p.query is None else p.query[pv],
        c_values if p.key is None else p.key[history],
        c_values if p.value is None else p.value[history],
    )


def _attend(p: Problem, wanted: Tensor | None) -> Tensor:
    """R [N, D]; zeros where it is not wanted, for padding, and for pages without history."""
    r = p.pv.new_zeros(p.num_pv, p.pv.shape[1])
    rows = _gather(p, wanted)
    if rows.pv_lengths:
        out, _ = attend(
            rows.q,
            rows.k,
            rows.v,
            rows.pv_lengths,
            rows.history_lengths,
            p.attention_scale,
            p.num_heads,
        )
        r.index_copy_(0, rows.pv, out)
    return r


def _add_attention_gradients(
    p: Problem,
    needs: Needs,
    grads: Gradients,
    d_r: Tensor,
    wanted: Tensor | None,
) -> None:
    """Adds what flows through the attention, computed again, to the gradients asked for."""
    asked = needs._replace(temperature=False)
    if not any(asked):
        return
    # Occurrences of a table's items are summed: in float32 until all are there.
    for name in asked.names:
        x, given = getattr(p, name), getattr(grads, name)
        kind = torch.float32 if p.history is None and name == "pv" else x.dtype
        new = torch.zeros_like(x, dtype=kind) if given is None else given.to(kind)
        setattr(grads, name, new)
    rows = _gather(p, wanted)
    if rows.pv_lengths:
        lengths = (rows.pv_lengths, rows.history_lengths, p.attention_scale, p.num_heads)
        out, lse = attend(rows.q, rows.k, rows.v, *lengths)
        d_out = d_r[rows.pv].to(out.dtype)
        dq, dk, dv = attend_backward(d_out, out, lse, rows.q, rows.k, rows.v, *lengths)

        def add(role: str, index: Tensor | None, at: Tensor, d: Tensor) -> None:
            """To the input that the rows were taken from."""
            name = p.input_of(role)
            target = getattr(grads, name)
            if target is not None:
                where = at if name == role or index is None else index[at]
                target.index_add_(0, where, d.to(target.dtype))

        add("query", p.pv_index, rows.pv, dq)
        add("key", p.history_index, rows.history, dk)
        add("value", p.history_index, rows.history, dv)
    if grads.pv is not None:
        grads.pv = grads.pv.to(p.pv.dtype)


# ---- the contrast, for a given R -----------------------------------------------------------------


def _contrast_forward(p: Problem, needs: Needs, stats: bool, r: Tensor) -> tuple[Any, ...]:
    return _pipeline().forward(p, needs, stats, r)


def _contrast_backward(
    p: Problem, needs: Needs, saved: Sequence[Tensor], grad: Tensor
) -> tuple[Gradients, Tensor]:
    """Gradients without what flows through R, and dL/dR [N, D]."""
    own = Needs(pv=needs.pv, temperature=needs.temperature)
    return _pipeline().backward(p, own, saved, grad, True)


# ---- what operators.py calls ---------------------------------------------------------------------


def saved_spec(p: Problem, needs: Needs) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """Shapes and types of `saved`, the contrast's: R is computed again in the backward."""
    return _pipeline().saved_spec(p, needs)


def _wanted(p: Problem) -> Tensor | None:
    """PV rows whose R enters the loss [N]; None: all, since "identify" pushes every R away."""
    if p.direction != "reconstruct":
        return None
    return p.clicked if p.weights is None else p.clicked & (p.weights > 0)


def loss_forward(p: Problem, needs: Needs, stats: bool) -> tuple[Any, ...]:
    """(loss, item_loss, log_sum_exp, positive_similarity, rank, is_anchor, num_skipped, saved)."""
    return _contrast_forward(p, needs, stats, _attend(p, _wanted(p)))


def loss_backward(p: Problem, needs: Needs, saved: Sequence[Tensor], grad: Tensor) -> Gradients:
    """Of `p`'s inputs."""
    grads, d_r = _contrast_backward(p, needs, saved, grad)
    _add_attention_gradients(p, needs, grads, d_r, _wanted(p))
    return grads


def reconstruct_forward(p: Problem) -> Tensor:
    """R [N, D], zeros for padding and for pages without history."""
    return _attend(p, None)


def reconstruct_backward(p: Problem, needs: Needs, grad: Tensor) -> Gradients:
    """Of `p`'s inputs."""
    grads = Gradients()
    _add_attention_gradients(p, needs, grads, grad, None)
    return grads


def sequence_saved_spec(
    p: SequenceProblem, needs: Needs
) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """The click-sequence loss has no attention: it is the Triton kernels' alone."""
    return _pipeline().sequence_saved_spec(p, needs)


def sequence_forward(p: SequenceProblem, needs: Needs) -> tuple[Tensor, list[Tensor]]:
    """(loss, saved)."""
    return _pipeline().sequence_forward(p, needs)


def sequence_backward(
    p: SequenceProblem, needs: Needs, saved: Sequence[Tensor], grad: Tensor
) -> Gradients:
    """Of `p`'s inputs."""
    return _pipeline().sequence_backward(p, needs, saved, grad)
