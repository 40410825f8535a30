"""What is made from a config before the first step."""

from __future__ import annotations

import os

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from ..data.batches import BatchPlan
from ..data.dataset import Dataset
from ..data.embeddings import read_embeddings
from ..data.loader import Augmentation, Features, Images, Loader
from .config import Config, OptimConfig
from .encoder import SMALL_CONV, Encoder, build_encoder, build_projection
from .gradient_cache import check_sliceable
from .objective import Objective
from .sharding import is_sharded


def choose_device(name: str) -> torch.device:
    """The device that run.device names; of several GPUs this process's."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda":
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


def without_auto(config: Config, device: torch.device) -> Config:
    """Every "auto" replaced by what it means on this device."""
    config = config.model_copy(deep=True)
    gpu = device.type == "cuda"
    config.run.device = device.type
    config.data.size = config.data.size or (224 if gpu else 96)
    if config.model.backbone == "auto":
        config.model.backbone = "swin_tiny_patch4_window7_224" if gpu else SMALL_CONV
    if config.model.batch_norm is None:
        config.model.batch_norm = not (
            config.model.pretrained or config.model.weights or config.data.features
        )
    if config.run.precision == "auto":
        config.run.precision = "bfloat16" if gpu else "float32"
    return config


def build_plan(config: Config, dataset: Dataset, rank: int, world: int) -> BatchPlan:
    c = config.data
    return BatchPlan(
        dataset,
        pages=c.pages,
        images=c.images,
        history=c.history,
        share=c.share,
        seed=config.run.seed,
        rank=rank,
        world=world,
    )


def read_features(path: str | os.PathLike[str], dataset: Dataset) -> np.ndarray:
    """Precomputed embeddings [items, F] as `read_embeddings` gives them; ValueError also where an
    item that is used has none."""
    table = read_embeddings(path, dataset)
    used = np.unique(np.concatenate([dataset.pv_item, dataset.event_item]))
    lacking = used[~np.isfinite(table[used]).all(1)]
    if len(lacking):
        ids = [str(dataset.item_ids[i]) for i in lacking[:5].tolist()]
        raise ValueError(
            f"features: {len(lacking)} items on pages or in histories have no finite row in "
            f"{path}, such as {', '.join(ids)}"
        )
    return table


def table_of(config: Config, dataset: Dataset) -> np.ndarray | None:
    """What a projection is trained on: data.features, or else the dataset's own embeddings; None:
    its images are trained on."""
    if config.data.features is not None:
        return read_features(config.data.features, dataset)
    if not dataset.has_embeddings:
        return None
    if config.model.shard:
        raise ValueError(
            f"model.shard: expected images with it, got {dataset.path} with embeddings: their "
            "projection is no encoder to be sharded"
        )
    return dataset.read_embeddings()


def encoder_of(config: Config, table: np.ndarray | None) -> Encoder:
    """The encoder that the config asks for, of images or of the features' `table`. ValueError where
    its backbone cannot do what the config asks of it."""
    c = config.model
    if table is not None:
        encoder = build_projection(table.shape[1], c.dim, torch.from_numpy(table))
    else:
        encoder = build_encoder(
            c.backbone,
            c.dim,
            config.data.size,
            pretrained=c.pretrained,
            weights=c.weights,
            batch_norm=bool(c.batch_norm),
        )
    if c.checkpointing:
        enable = getattr(encoder.backbone, "set_grad_checkpointing", None)
        if enable is None:
            raise ValueError(
                f"model.checkpointing: the backbone {c.backbone} has no gradient checkpointing"
            )
        enable()
    if c.slice:
        check_sliceable(encoder.backbone)
    return encoder


def build_objective(config: Config, plan: BatchPlan, group: dist.ProcessGroup | None) -> Objective:
    c = config.loss
    log_q = torch.from_numpy(plan.log_q(c.history_negatives)) if c.log_q else None
    weights = torch.from_numpy(plan.weights(c.weight_power)) if c.weight_power else None
    return Objective(c, config.model.dim, log_q, weights, group)


def build_optimizer(config: OptimConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW; vectors and scalars do not decay."""
    # A group is of one kind: no kernel takes both.
    kinds = [[p for p in parameters if is_sharded(p) is kind] for kind in (False, True)]
    groups = [
        {
            "params": [p for p in kind if (p.ndim > 1) is decays],
            "weight_decay": config.weight_decay * decays,
        }
        for kind in kinds
        for decays in (True, False)
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=config.lr,
        betas=config.betas,
        fused=parameters[0].device.type == "cuda",
    )


def build_loader(
    config: Config,
    plan: BatchPlan,
    encoder: Encoder,
    table: np.ndarray | None,
    device: torch.device,
) -> Loader:
    """Batches of rows of `table`, or of images as the encoder takes them."""
    c = config.data
    source: Images | Features
    if table is not None:
        source = Features(table, device)
    else:
        from ..data.images.decode import make_decoder

        decoder = make_decoder(
            c.decoder,
            c.size,
            device=device,
            threads=c.threads,
            mean=encoder.mean,
            std=encoder.std,
        )
        augmentation = Augmentation(c.scale, c.ratio, c.flip)
        source = Images(plan, decoder, augmentation, max_damaged=c.max_damaged)
    pad = device.type == "cuda" or config.model.compile or bool(c.buckets)
    return Loader(plan, source, device=device, pad=pad, buckets=c.buckets, ahead=c.ahead)
