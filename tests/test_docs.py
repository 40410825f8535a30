"""Every block of Python in the documentation runs, with small stand-ins for what it presupposes."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from courier_fast import ReconstructionLoss

ROOT = Path(__file__).parent.parent
PAGES = ("README.md", "CONTRIBUTING.md", "kernels/README.md", *sorted((ROOT / "docs").glob("*.md")))
Check = Callable[[dict[str, Any]], None]


def blocks() -> dict[str, str]:
    """Blocks of Python by page and number."""
    found = {}
    for page in PAGES:
        path = ROOT / page
        codes = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
        found |= {f"{path.relative_to(ROOT)} {i}": code for i, code in enumerate(codes)}
    return found


def loss_of_ones_own_training(names: dict[str, Any]) -> Check:
    names |= {
        "encoder": torch.nn.Linear(3, 16),
        "pv_images": torch.randn(4, 5, 3, requires_grad=True),
        "history_images": torch.randn(4, 6, 3),
        "clicked": torch.tensor([[True, False, False, True, False]] * 4),
        "pv_mask": torch.ones(4, 5, dtype=torch.bool),
        "history_mask": torch.ones(4, 6, dtype=torch.bool),
    }

    def check(names: dict[str, Any]) -> None:
        assert names["loss"] > 0
        assert names["encoder"].weight.grad.any()

    return check


def loss_of_unique_items(names: dict[str, Any]) -> Check:
    names |= {
        "torch": torch,
        "loss_fn": ReconstructionLoss(),
        "encoder": torch.nn.Linear(3, 16),
        "images": torch.randn(9, 3),
        "shown": torch.tensor([0, 1, 2, 1, 3]),
        "seen": torch.tensor([3, 4, 4, 8]),
        "clicked": torch.tensor([True, False, False, False, True]),
        "shown_offsets": torch.tensor([0, 3, 5]),
        "seen_offsets": torch.tensor([0, 2, 4]),
    }

    def check(names: dict[str, Any]) -> None:
        assert names["table"].shape == (6, 16)
        assert names["loss"] > 0
        assert names["encoder"].weight.grad.any()

    return check


def statistics(names: dict[str, Any]) -> Check:
    names |= {
        "loss_fn": ReconstructionLoss(),
        "pv": torch.randn(4, 5, 16),
        "history": torch.randn(4, 6, 16),
        "clicked": torch.tensor([[True, False, False, True, False]] * 4),
        "pv_mask": torch.ones(4, 5, dtype=torch.bool),
        "history_mask": torch.ones(4, 6, dtype=torch.bool),
    }

    def check(names: dict[str, Any]) -> None:
        assert names["stats"].num_anchors == 8

    return check


def training_from_python(names: dict[str, Any]) -> Check:
    make_dataset = pytest.importorskip("dataset_factory", exc_type=ImportError).make_dataset
    make_dataset(Path("shop"), users=6, items=12, pages=30, history=4)
    Path("config.toml").write_text(
        '[data]\ndataset = "shop"\nsize = 32\npages = 8\n[model]\ndim = 8\n[run]\ndevice = "cpu"\n'
    )

    def check(names: dict[str, Any]) -> None:
        assert names["last"]["step"] == 2
        assert Path("run/encoder.safetensors").is_file()

    return check


def features_of_a_backbone(names: dict[str, Any]) -> Check:
    """A dataset, and the backbone's file as it is: other names, a classifier, weights in channels-last order."""
    timm = pytest.importorskip("timm")
    make_dataset = pytest.importorskip("dataset_factory", exc_type=ImportError).make_dataset
    make_dataset(Path("data"), users=3, items=6, pages=5, history=2)
    torch.manual_seed(0)
    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    state = backbone.to(memory_format=torch.channels_last).state_dict()
    stored = {f"_{i}.num_batches" if "num_batches" in n else f"_{i}": x
              for i, (n, x) in enumerate(state.items())}  # fmt: skip
    torch.save(stored | {"_fc.weight": torch.zeros(2, 2)}, "efficientnet-lite0-57934424.pth")

    def check(names: dict[str, Any]) -> None:
        table = np.load("lite0.npy")
        assert table.shape == (6, 1280)
        assert np.isfinite(table).any()
        written = names["encoder"].backbone.state_dict()
        for name in names["names"]:
            assert torch.equal(written[name], state[name]), name

    return check


STAND_INS = {
    "README.md 0": loss_of_ones_own_training,
    "docs/hm-fashion.md 0": features_of_a_backbone,
    "docs/loss.md 0": loss_of_unique_items,
    "docs/loss.md 1": statistics,
    "docs/training.md 0": training_from_python,
}


def test_every_block_has_its_stand_ins() -> None:
    assert blocks().keys() == STAND_INS.keys()


@pytest.mark.parametrize("block", STAND_INS)
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    check = STAND_INS[block](names)
    exec(compile(blocks()[block], block, "exec"), names)
    check(names)
