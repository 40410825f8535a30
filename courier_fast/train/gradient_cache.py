"""Large batches in little memory: embeddings first without a graph, then the encoder slice by slice
(GradCache, arXiv 2101.06983).

Exact for encoders in which an image's embedding does not depend on the rest of the batch; batch
norm in training mode is refused.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def check_sliceable(encoder: nn.Module) -> None:
    """ValueError where the encoder has batch statistics, which slices would change."""
    for name, module in encoder.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ValueError(
                "model.slice: expected an encoder without batch statistics, got one with "
                f"{type(module).__name__} ({name}): "
                "its output in slices is not that of the whole batch; use model.checkpointing or a "
                "backbone with layer or group norm"
            )


def cached_backward(
    encode: Callable[[Tensor], Tensor],
    images: Tensor,
    loss_of: Callable[[Tensor], Tensor],
    size: int,
    seed: int,
    synchronised: Callable[[Callable[[], Tensor]], Tensor] = lambda compute: compute(),
    count: int = 0,
) -> Tensor:
    """Adds the gradient of `loss_of(encode(images))` to every parameter and returns the loss,
    detached.

    Args:
        images: [n, ...]; only `size` of them are in a graph at a time.
        encode: the part that is too large for one graph, on a slice.
        loss_of: its output for all images to a scalar; parameters in it get their gradients too.
        seed: random numbers (dropout, stochastic depth) are drawn from (seed, slice), the same in
            both passes.
        synchronised: around the last slice, whose backward completes every gradient
            (`Processes.synchronised`).
        count: slices at least, for processes that have to take as many steps as others; `encode`
            sees no image in those that are lacking.
    """
    slices = list(images.split(size)) if len(images) else []
    slices += [images[:0]] * (count - len(slices))

    def encode_slice(index: int) -> Tensor:
        torch.manual_seed(seed + index)
        return encode(slices[index])

    with torch.no_grad():
        embeddings = torch.cat([encode_slice(i) for i in range(len(slices))])
    embeddings.requires_grad_()
    loss = loss_of(embeddings)
    loss.backward()
    assert embeddings.grad is not None
    *gradients, last = embeddings.grad.split([len(x) for x in slices])
    for i, gradient in enumerate(gradients):
        encode_slice(i).backward(gradient)
    synchronised(lambda: encode_slice(len(gradients))).backward(last)
    return loss.detach()
