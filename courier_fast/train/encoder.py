"""The encoder: a backbone and a projection to the embedding, and its files."""

from __future__ import annotations

import json
import os
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..data.images.transforms import IMAGENET_MEAN, IMAGENET_STD
from ..files import read_json, write_atomically
from ..locations import local_path

SMALL_CONV = "small_conv"


class SmallConvNet(nn.Module):
    """Four stages of convolution, batch norm and ReLU, each halving the picture: a backbone for
    CPUs (0.4 M parameters at width 32)."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        widths = [3, width, 2 * width, 4 * width, 8 * width]
        self.stages = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(b),
                nn.ReLU(inplace=True),
            )
            for a, b in pairwise(widths)
        )
        self.num_features = widths[-1]
        self.checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpointing = enable

    def forward(self, x: Tensor) -> Tensor:
        for stage in self.stages:
            x = (
                checkpoint(stage, x, use_reentrant=False)
                if self.checkpointing and x.requires_grad
                else stage(x)
            )
        return x.mean((2, 3))


class Standardise(nn.Module):
    """Features [n, F] to mean 0 and standard deviation 1 in each dimension over the catalogue: the
    backbone of precomputed embeddings."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("scale", torch.ones(num_features))

    def fit(self, table: Tensor) -> Standardise:
        """Takes mean and deviation from `table` [items, F], without rows with a NaN (no image)."""
        rows = table[table.isfinite().all(1)].double()
        self.mean.copy_(rows.mean(0))
        self.scale.copy_(1 / rows.std(0, correction=0).clamp_min(1e-12))
        return self

    def forward(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) * self.scale


class Encoder(nn.Module):
    """Images [n, 3, size, size], normalised by `mean` and `std`, or feature rows [n, F], to
    embeddings [n, dim].

    The head is a projection, after a batch norm without parameters where `about["batch_norm"]` says
    so: features of a network that starts from scratch are nearly the same for all images, and the
    contrast would collapse before it has told them apart.

    Attributes:
        backbone, head: the two halves; `head(backbone(x))` is `forward(x)`.
        features: F of the backbone's pooled output.
        about: what `load_encoder` needs to build it again; after training also "trained_until", the
            time of the newest page it has seen.
    """

    def __init__(self, backbone: nn.Module, dim: int, about: dict[str, Any]) -> None:
        super().__init__()
        self.backbone = backbone
        self.features = int(backbone.num_features)
        norm = (
            nn.BatchNorm1d(self.features, affine=False)
            if about.get("batch_norm")
            else nn.Identity()
        )
        self.head = nn.Sequential(norm, nn.Linear(self.features, dim))
        self.about = {**about, "dim": dim}
        self.dim = dim
        self.size: int = about.get("size", 0)
        self.mean: tuple[float, ...] = tuple(about.get("mean", IMAGENET_MEAN))
        self.std: tuple[float, ...] = tuple(about.get("std", IMAGENET_STD))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.backbone(images))


def build_encoder(
    backbone: str,
    dim: int,
    size: int,
    *,
    pretrained: bool = False,
    weights: str | os.PathLike[str] | None = None,
    batch_norm: bool = False,
) -> Encoder:
    """An encoder with a backbone of timm by its name, or "small_conv".

    Args:
        weights: a safetensors file with the backbone's weights; a classifier in it is left out.
        batch_norm: a batch norm before the projection.

    Raises:
        ValueError: timm has no such model, or `weights` do not fit it.
    """
    mean, std = IMAGENET_MEAN, IMAGENET_STD
    model: nn.Module
    if backbone == SMALL_CONV:
        if pretrained:
            raise ValueError(
                f"model.pretrained: expected false with {SMALL_CONV}, "
                "which has no pre-trained weights"
            )
        model = SmallConvNet()
    else:
        import timm

        if not timm.is_model(backbone.split(".")[0]):
            near = timm.list_models(f"*{backbone.split('_')[0]}*")[:5]
            raise ValueError(
                f"model.backbone: expected {SMALL_CONV} or a model of "
                f"timm{f' such as {near}' if near else ''}, got {backbone!r}"
            )
        # Only transformers with fixed windows or positions take an image size; convolutional nets
        # refuse the argument.
        try:
            model = timm.create_model(backbone, pretrained=pretrained, num_classes=0, img_size=size)
        except TypeError:
            model = timm.create_model(backbone, pretrained=pretrained, num_classes=0)
        mean, std = model.pretrained_cfg.get("mean", mean), model.pretrained_cfg.get("std", std)
    if weights is not None:
        missing, unexpected = model.load_state_dict(read_tensors(Path(weights)), strict=False)
        unexpected = [n for n in unexpected if not n.startswith(("head", "fc", "classifier"))]
        if missing or unexpected:
            raise ValueError(
                f"model.weights: expected the parameters of {backbone}, got a file without "
                f"{missing[:5]} and with {unexpected[:5]}"
            )
    about = {
        "backbone": backbone,
        "size": size,
        "mean": list(mean),
        "std": list(std),
        "batch_norm": batch_norm,
    }
    return Encoder(model, dim, about)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file. ValueError where it was cut off or is none, OSError where
    it cannot be read."""
    with path.open("rb"):  # its reader names no file
        pass
    try:
        return load_file(os.fspath(path))
    except SafetensorError as error:
        raise ValueError(
            f"{path}: was cut off or altered, expected a safetensors file ({error})"
        ) from None


def build_projection(features: int, dim: int, table: Tensor | None = None) -> Encoder:
    """Precomputed embeddings: standardised over `table` [items, F], then projected to `dim`."""
    standardise = Standardise(features)
    if table is not None:
        standardise.fit(table)
    return Encoder(standardise, dim, {"backbone": None, "features": features})


def first_dimensions(encoder: Encoder, dim: int) -> Encoder:
    """The encoder with the first `dim` dimensions of its embeddings alone. ValueError for more than
    it has."""
    if not 0 < dim <= encoder.dim:
        raise ValueError(f"dim: expected 1 to {encoder.dim}, the encoder's, got {dim}")
    whole = encoder.head[1]
    assert isinstance(whole, nn.Linear)
    short = nn.Linear(whole.in_features, dim).to(whole.weight)
    with torch.no_grad():
        short.weight.copy_(whole.weight[:dim])
        short.bias.copy_(whole.bias[:dim])
    encoder.head[1] = short
    encoder.dim, encoder.about = dim, encoder.about | {"dim": dim}
    return encoder


def save_encoder(
    encoder: Encoder, folder: str | os.PathLike[str], state: dict[str, Tensor] | None = None
) -> None:
    """Writes encoder.safetensors and encoder.json, each complete or not at all; `state`: its
    tensors, if they were taken earlier."""
    folder = local_path(folder)
    state = {
        name: value.detach().cpu().contiguous()
        for name, value in (state or encoder.state_dict()).items()
    }
    write_atomically(folder / "encoder.safetensors", lambda path: save_file(state, path))
    write_atomically(
        folder / "encoder.json", lambda path: path.write_text(json.dumps(encoder.about, indent=2))
    )


def load_encoder(folder: str | os.PathLike[str], device: str | torch.device = "cpu") -> Encoder:
    """The encoder of a run, ready for evaluation. FileNotFoundError where the folder has none."""
    folder = local_path(folder)
    about_file = folder / "encoder.json"
    if not about_file.is_file():
        raise FileNotFoundError(
            f"run: expected a folder with encoder.json and encoder.safetensors, got {folder}"
        )
    about = read_json(about_file)
    lacking = [name for name in ("backbone", "dim") if name not in about]
    if lacking:
        raise ValueError(f"{about_file}: was altered, expected {lacking[0]} in it")
    if about["backbone"] is None:
        encoder = build_projection(about["features"], about["dim"])
    else:
        encoder = build_encoder(
            about["backbone"], about["dim"], about["size"], batch_norm=about["batch_norm"]
        )
        encoder.mean, encoder.std = tuple(about["mean"]), tuple(about["std"])
    encoder.about = about
    encoder.load_state_dict(read_tensors(folder / "encoder.safetensors"))
    if about["backbone"] is not None:
        encoder.to(memory_format=torch.channels_last)
    return encoder.eval().to(device)
