"""The loss's share of a training step: Swin-T, bfloat16, compiled, on images that are already
there.

bench.step measures the whole trainer with its loader and needs pydantic; this needs timm alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench import measure
from bench.gpu.record import Result
from bench.gpu.setting import Setting
from courier_fast.testing.batches import Batch, Options, Shape, call, make_batch


def _steps(
    encode: Callable[[Tensor], Tensor], images: Tensor, batch: Batch, optimizer: Any, impl: str
) -> dict[str, Callable[[], object]]:
    """The whole step, the encoder's without the loss, and the loss alone on given embeddings."""

    def loss_of(table: Tensor) -> Tensor:
        return call(batch, impl, embeddings=table)

    def update(objective: Callable[[Tensor], Tensor]) -> None:
        optimizer.zero_grad()
        objective(encode(images)).backward()
        optimizer.step()

    given = encode(images).detach().requires_grad_()
    return {
        "step": lambda: update(loss_of),
        "without the loss": lambda: update(lambda x: x.float().square().mean()),
        "loss": lambda: torch.autograd.grad(loss_of(given), [given]),
    }


def share_of_the_loss(setting: Setting) -> Result:
    from courier_fast.train.encoder import build_encoder

    on_gpu = not setting.rehearse
    device = torch.device(setting.device)
    name, size, items, dim = (
        ("swin_tiny_patch4_window7_224", 224, 256, 256) if on_gpu else ("small_conv", 32, 16, 32)
    )
    pages = 96 if on_gpu else 6
    encoder = build_encoder(name, dim, size).to(device).train()
    optimizer = torch.optim.AdamW(encoder.parameters(), fused=on_gpu)
    images = torch.randn(items, 3, size, size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    batch = make_batch(Shape(pages, 5, 10, dim, 0.2), Options(unique_items=items), dtype, device)
    compiled: Callable[[Tensor], Tensor] = torch.compile(encoder) if on_gpu else encoder

    def encode(x: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu):
            return compiled(x).to(dtype)

    work = _steps(encode, images, batch, optimizer, "triton")
    for step in work.values():
        for _ in range(3 if on_gpu else 1):
            step()
    times = measure.interleaved_times(work, device, 20 if on_gpu else 1, setting.left / 3)
    clock = "gpu" if on_gpu else "wall"
    seconds = {k: t[clock][1] for k, t in times.items()}
    share = seconds["loss"] / seconds["step"]
    line = (
        f"{name}, {items} images: a step {seconds['step'] * 1e3:.1f} ms "
        f"({items / seconds['step']:,.0f} images/s), "
        f"without the loss {seconds['without the loss'] * 1e3:.1f} ms, "
        f"the loss alone {share:.1%} of it"
    )
    return Result(line, data={"seconds": seconds, "share": share, "images": items})
