"""The click head that a training run has learned, as a score."""

from __future__ import annotations

from pathlib import Path

import torch

from ..train.checkpoint import Checkpoints
from ..train.config import Config
from ..train.objective import Objective
from .scores import ClickLogits

_PREFIX = "model.objective."


def click_logits_of(run: Path, device: torch.device | str = "cpu") -> ClickLogits:
    """The click head of a run's newest checkpoint, with the attention that its loss trained.

    Raises ValueError for a run that was trained without one, FileNotFoundError for one without a
    checkpoint.
    """
    config = Config.load(run / "config.toml")
    check_click_head(config, str(run))
    checkpoints = Checkpoints(run / "checkpoints")
    found = checkpoints.all()
    if not found:
        raise FileNotFoundError(
            f"score click: expected a checkpoint in {checkpoints.folder}, which has the click "
            "head, got none"
        )
    objective = Objective(config.loss, config.model.dim).eval()
    tensors = {f"{_PREFIX}{name}": x for name, x in objective.state_dict().items()}
    checkpoints.load(found[-1], tensors, _PREFIX)
    return objective.to(device).click_logits


def check_click_head(config: Config, where: str) -> None:
    """ValueError for settings of a run without a click head."""
    if not config.loss.prediction_weight:
        raise ValueError(
            "score click: expected a run with loss.prediction_weight above 0, which has a click "
            f"head, got 0 in {where}"
        )
