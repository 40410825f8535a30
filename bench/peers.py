"""Other packages' contrasts, each behind the same eager attention over padded histories. Imported
when they are asked for.

cce: cut-cross-entropy, with its gradient filter off, so that it computes the same. liger:
liger-kernel's fused linear cross entropy; liger_scaled: its scaled one, with a temperature of its
own, which on unit rows is this very contrast. quack: quack-kernels' chunked linear cross entropy.
inf_cl: inf-cl's single-GPU loss. varlen: PyTorch's own varlen_attn and linear_cross_entropy.
memeff: memeff's CLIP loss, direction "both" of a batch in which every item was clicked. siglip:
siglip-kernel, a sigmoid loss of the same pairs: another loss, for its time only.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from courier_fast.testing.batches import Batch

NAMES = (
    "cce",
    "liger",
    "liger_scaled",
    "quack",
    "inf_cl",
    "varlen",
    "memeff",
    "siglip",
    "xformers_ce",
)
PACKAGES = {
    "cce": "cut-cross-entropy",
    "liger": "liger-kernel",
    "liger_scaled": "liger-kernel",
    "quack": "quack-kernels",
    "inf_cl": "inf-cl",
    "memeff": "memeff",
    "siglip": "siglip-kernel",
    "xformers_ce": "xformers",
}

# (unit rows r of the anchors, unit rows e of all items, places of the anchors) -> loss
Contrast = Callable[[Tensor, Tensor, Tensor], Tensor]
# R of every item
Attention = Callable[[Any], Tensor]


def _module(name: str, module: str, batch: Batch) -> Any:
    """The module, or why there is none."""
    if not batch.clicked.is_cuda:
        return f"{PACKAGES.get(name, name)} needs a CUDA device"
    try:
        return importlib.import_module(module)
    except ImportError as error:
        return f"{PACKAGES.get(name, name)} is not installed: {error}"


def cross_entropy(name: str, batch: Batch) -> Contrast | str:
    """A linear cross entropy of the anchors with all items as classes, or why there is none."""
    tau = batch.options.tau
    if name == "xformers_ce":
        return lambda r, e, rows: functional.cross_entropy((r @ e.T).float() / tau, rows)
    if name == "varlen":
        if not hasattr(functional, "linear_cross_entropy"):
            return "this torch has no linear_cross_entropy"
        linear: Any = vars(functional)["linear_cross_entropy"]
        return lambda r, e, rows: linear(r / tau, e, rows)
    modules = {
        "cce": "cut_cross_entropy",
        "liger": "liger_kernel.transformers.functional",
        "liger_scaled": "liger_kernel.ops.fused_linear_scaled_cross_entropy",
        "quack": "quack.linear_cross_entropy",
        "inf_cl": "inf_cl",
    }
    module = _module(name, modules[name], batch)
    if isinstance(module, str):
        return module
    if name == "cce":
        return lambda r, e, rows: module.linear_cross_entropy(r / tau, e, rows, filter_eps=None)
    if name == "liger":
        return lambda r, e, rows: module.liger_fused_linear_cross_entropy(r / tau, e, rows)
    if name == "liger_scaled":
        scaled = module.LigerFusedLinearScaledCrossEntropyFunction
        return lambda r, e, rows: scaled.apply(r, e, rows, tau).mean()
    if name == "quack":
        return lambda r, e, rows: module.chunked_linear_cross_entropy(r / tau, e, rows)
    head = next((d for d in (256, 128, 64, 32, 16) if batch.dim % d == 0), None)
    if head is None:
        return f"inf-cl takes dimensions that are multiples of 16, not {batch.dim}"
    return lambda r, e, rows: module.cal_flash_loss(
        r, e, labels=rows, scale=1 / tau, head_dim=head
    ).mean()


def attention(name: str, batch: Batch) -> Attention | str | None:
    """A peer's own attention, why it cannot run, or None: the eager one."""
    if name not in ("varlen", "xformers_ce"):
        return None
    path = "torch.nn.attention.varlen" if name == "varlen" else "xformers.ops"
    module = _module(name, path, batch)
    if isinstance(module, str):
        return module
    return _varlen(module) if name == "varlen" else _xformers(module)


def _varlen(module: Any) -> Attention:
    def attend(b: Batch) -> Tensor:
        q, k = b.pv[:, None], b.history[:, None]
        offsets = (b.pv_offsets.int(), b.history_offsets.int())
        longest = (b.rows // (len(b.pv_offsets) - 1), b.longest_history)
        return module.varlen_attn(q, k, k, *offsets, *longest)[:, 0]

    return attend


def _xformers(module: Any) -> Attention:
    masks = importlib.import_module("xformers.ops.fmha.attn_bias")

    def attend(b: Batch) -> Tensor:
        bias = masks.BlockDiagonalMask.from_seqlens(
            b.pv_offsets.diff().tolist(), b.history_offsets.diff().tolist()
        )
        q, k = b.pv[None, :, None], b.history[None, :, None]
        return module.memory_efficient_attention(q, k, k, attn_bias=bias)[0, :, 0]

    return attend


def _all_pairs(name: str, batch: Batch) -> str | None:
    options = batch.options
    if not bool(batch.clicked.all()):
        return "takes pairs: every item has to be clicked"
    bare = options.negatives == "batch" and not (options.ids or options.log_q or options.weights)
    if not bare or options.unique_items or options.learn_tau or options.stats:
        return f"{PACKAGES[name]} takes pairs alone: no ids, masks, weights or statistics"
    return None


def memeff(batch: Batch) -> Contrast | str:
    if batch.options.direction != "both":
        return 'computes direction "both" only'
    reason = _all_pairs("memeff", batch)
    module = reason or _module("memeff", "memeff", batch)
    if isinstance(module, str):
        return module
    clip = module.MemoryEfficientCLIPLoss(
        temperature=batch.options.tau, normalized_inputs=True, stable=False
    )
    return lambda r, e, rows: clip(r, e)


def siglip(batch: Batch) -> Contrast | str:
    reason = _all_pairs("siglip", batch)
    module = reason or _module("siglip", "siglip_kernel", batch)
    if isinstance(module, str):
        return module
    device = batch.clicked.device
    log_temperature = torch.tensor(1 / batch.options.tau, device=device).log()
    bias = torch.tensor(-10.0, device=device)
    return lambda r, e, rows: module.fused_siglip_loss(r, e, log_temperature, bias)
