"""What a run learns: embeddings, their gradients, updates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..data.batches import BatchPlan
from .build import build_objective, build_optimizer, encoder_of
from .checkpoint import optimizer_tensors
from .config import Config
from .encoder import Encoder
from .gradient_cache import cached_backward
from .processes import Processes
from .sharding import (
    average_gradients,
    averaging,
    clip_gradients,
    is_sharded,
    make_mesh,
    shard,
)


class Learner:
    """The encoder, its average, the objective and their optimizer, on the run's device; the same on
    every process, or with model.shard a part of the backbone on each.

    Args:
        table: features [items, F] in place of images.

    Attributes:
        modules: encoder and objective, by the names of checkpoints.
        exported: the encoder that is saved: with model.ema the average of the weights.
        parameters: all that have a gradient; `replicated`: those that every process has whole.
    """

    def __init__(
        self, config: Config, plan: BatchPlan, table: np.ndarray | None, processes: Processes
    ) -> None:
        c = config.model
        self.config, self.processes, self.device = config, processes, processes.device
        self.sharded = c.shard and processes.world > 1
        self.encoder = encoder_of(config, table)
        self.encoder.about["trained_until"] = plan.until
        self.encoder.train()
        if not self.sharded:  # on a GPU there may be no room for the whole
            self.encoder.to(self.device)
            if table is None:
                self.encoder.to(memory_format=torch.channels_last)
        self.objective = build_objective(config, plan, processes.group).to(self.device)
        self.modules = nn.ModuleDict({"encoder": self.encoder, "objective": self.objective})
        processes.broadcast(list(self.modules.state_dict().values()))
        self.average = (
            AveragedModel(self.encoder, multi_avg_fn=averaging(c.ema), use_buffers=True)
            if c.ema
            else None
        )
        self.exported: Encoder = self.encoder if self.average is None else self.average.module
        if self.sharded:
            mesh = make_mesh(self.device)
            for encoder in dict.fromkeys((self.encoder, self.exported)):
                shard(encoder.backbone, mesh, config.run.precision)
                encoder.to(self.device)
        self.parameters = [p for p in self.modules.parameters() if p.requires_grad]
        self.replicated = [p for p in self.parameters if not is_sharded(p)]
        self.synchronised = (
            (lambda compute: compute()) if self.sharded else processes.synchronised(self.parameters)
        )
        self.optimizer = build_optimizer(config.optim, self.parameters)
        backbone = self.encoder.backbone
        self.backbone: Any = torch.compile(backbone, dynamic=False) if c.compile else backbone

    def encode(self, images: Tensor) -> Tensor:
        """Embeddings [n, D]."""
        return self.head(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """The backbone's output [n, F], in the run's precision."""
        n = len(images)
        if self.sharded:
            # To gather parameters takes all processes; some backbones fail on no image, batch norms
            # on one.
            if not n:
                images = images.new_zeros(2, *images.shape[1:])
            # What follows keeps the layout, which otherwise the weights have.
            images = images.contiguous(memory_format=torch.channels_last)
        with self._autocast():
            features = self.backbone(images)
        return features if n else features[:0]

    def head(self, features: Tensor) -> Tensor:
        """Embeddings [n, D] of the backbone's output; on a CPU in float32."""
        with self._autocast():
            embeddings = self.encoder.head(features)
        return embeddings if self.device.type == "cuda" else embeddings.float()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.run.precision == "bfloat16"
        )

    def backward(self, images: Tensor, loss_of: Callable[[Tensor], Tensor], seed: int) -> None:
        """The gradient of `loss_of(features(images))`, averaged over the processes, in the
        parameters' `.grad`; with model.slice the images are taken in slices."""
        # With replicas gradients stay where they are: in the buckets that are exchanged.
        self.optimizer.zero_grad(set_to_none=self.sharded or self.processes.world == 1)
        size, most = self.config.model.slice, len(images)
        if self.sharded:  # all gather at once, as often as any of them needs it
            most = max(self.processes.each(most))
        if size and most > size:
            count = -(-most // size)
            cached_backward(self.features, images, loss_of, size, seed, self.synchronised, count)
        elif len(images) or self.sharded:
            self.synchronised(lambda: loss_of(self.features(images))).backward()
        else:  # no page is left for this process: no row, and the others wait for its zeros
            rows = torch.zeros(0, self.encoder.features, device=self.device)
            self.synchronised(lambda: loss_of(rows)).backward()
        if self.sharded:
            average_gradients(self.replicated)

    def update(self, lr: float) -> Tensor:
        """Moves the parameters along their gradient; gives its norm, 0-d on the device."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        norm = clip_gradients(self.parameters, self.config.optim.clip)
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.encoder)
        return norm

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps."""
        tensors = {f"model.{n}": t for n, t in self.modules.state_dict().items()}
        tensors |= {
            f"optimizer.{n}": t for n, t in optimizer_tensors(self.modules, self.optimizer).items()
        }
        if self.average is not None:
            tensors |= {f"average.{n}": t for n, t in self.average.state_dict().items()}
        return tensors
