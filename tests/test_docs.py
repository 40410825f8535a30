"""Every block of Python in the documentation runs, with small stand-ins for what it presupposes;
those of docs/contributing in test_docs_contributing.py."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import courier_fast as cf

ROOT = Path(__file__).parent.parent
DOCS = sorted(set((ROOT / "docs").rglob("*.md")) - set((ROOT / "docs/contributing").iterdir()))
KERNELS = ("kernels/README.md", "kernels/measurements.md")
PAGES = ("README.md", "CONTRIBUTING.md", *KERNELS, *DOCS)
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
        "loss_fn": cf.ReconstructionLoss(),
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


def three_losses(names: dict[str, Any]) -> Check:
    statistics(names)

    def check(names: dict[str, Any]) -> None:
        assert names["loss"] == sum(names["parts"][:3])
        assert names["parts"].logits.shape == (4, 5)
        assert names["loss_fn"].attention.in_proj_weight.grad.any()

    return check


def statistics(names: dict[str, Any]) -> Check:
    names |= {
        "loss_fn": cf.ReconstructionLoss(),
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
    """A dataset, and the backbone's file as it is: other names, a classifier, weights in
    channels-last order."""
    timm = pytest.importorskip("timm")
    make_dataset = pytest.importorskip("dataset_factory", exc_type=ImportError).make_dataset
    make_dataset(Path("data"), users=3, items=6, pages=5, history=2)
    torch.manual_seed(0)
    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    state = backbone.to(memory_format=torch.channels_last).state_dict()
    stored = {
        f"_{i}.num_batches" if "num_batches" in n else f"_{i}": x
        for i, (n, x) in enumerate(state.items())
    }
    torch.save(stored | {"_fc.weight": torch.zeros(2, 2)}, "efficientnet-lite0-57934424.pth")

    def check(names: dict[str, Any]) -> None:
        table = np.load("lite0.npy")
        assert table.shape == (6, 1280)
        assert np.isfinite(table).any()
        written = names["encoder"].backbone.state_dict()
        for name in names["names"]:
            assert torch.equal(written[name], state[name]), name

    return check


def network_from_a_projection(names: dict[str, Any]) -> Check:
    """A projection of features of a small dataset, and the network's settings with one step."""
    timm = pytest.importorskip("timm")
    make_dataset = pytest.importorskip("dataset_factory", exc_type=ImportError).make_dataset
    from safetensors.torch import load_file, save_file
    from train_factory import settings

    from courier_fast.train.trainer import Trainer

    dataset = make_dataset(Path("data5"), users=6, items=12, pages=30, history=4)
    torch.manual_seed(0)
    backbone = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    save_file(backbone.state_dict(), "lite0.safetensors")
    features = np.random.default_rng(0).normal(3, 2, (dataset.num_items, 1280))
    np.save("features.npy", features.astype(np.float32))
    Trainer(settings(dataset, Path("frozen"), data__features="features.npy", optim__steps=1)).fit()
    Path("end-to-end.toml").write_text(
        '[data]\ndataset = "data5"\nsize = 32\npages = 4\n[model]\ndim = 8\nbatch_norm = true\n'
        'backbone = "tf_efficientnet_lite0"\nweights = "lite0.safetensors"\n'
        '[optim]\nsteps = 1\n[run]\ndevice = "cpu"\nout = "end-to-end"\n'
    )

    def check(names: dict[str, Any]) -> None:
        found, start = (
            load_file(Path(x) / "encoder.safetensors") for x in ("end-to-end", "frozen")
        )
        given = load_file("lite0.safetensors")
        assert torch.equal(found["backbone.bn1.running_mean"], given["bn1.running_mean"])
        assert not torch.equal(found["backbone.conv_stem.weight"], given["conv_stem.weight"])
        assert (found["head.1.weight"] - start["head.1.weight"]).norm() < 0.1
        torch.testing.assert_close(
            found["head.0.running_var"].sqrt(), 1 / start["backbone.scale"].float()
        )

    return check


def attention_from_the_identity(names: dict[str, Any]) -> Check:
    make_dataset = pytest.importorskip("dataset_factory", exc_type=ImportError).make_dataset
    dataset = make_dataset(Path("data"), images=False)
    np.save("lite0.npy", np.random.default_rng(0).normal(size=(dataset.num_items, 4)))

    def check(names: dict[str, Any]) -> None:
        assert names["trainer"].progress.step == 4
        out = names["attention"].out_proj.weight.detach() - torch.eye(256)
        assert 0 < out.abs().max() < 0.1

    return check


def features_of_impressions(names: dict[str, Any]) -> Check:
    make_dataset = pytest.importorskip("dataset_factory", exc_type=ImportError).make_dataset
    dataset = make_dataset(Path("shop"), pages=60, images=False)
    np.save("embeddings.npy", np.random.default_rng(0).normal(size=(dataset.num_items, 4)))

    def check(names: dict[str, Any]) -> None:
        assert names["x"].shape == (len(names["impressions"]), len(names["SIMILARITY"]))
        assert names["x"].any()

    return check


def one_of_several_processes(names: dict[str, Any]) -> Check:
    """A group of one, and items whose first half is shown and second half was seen."""
    rendezvous = Path("rendezvous").absolute()
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=0, world_size=1)
    ids = torch.arange(300, 900, 2)
    names |= {
        "encoder": torch.nn.Linear(3, 32),
        "images": torch.randn(1000, 3),
        "ids": ids,
        "pv": torch.arange(150).view(30, 5),
        "history": torch.arange(150, 300).view(30, 5),
        "clicked": torch.arange(5).expand(30, 5) == 0,
    }

    def check(names: dict[str, Any]) -> None:
        assert names["loss"] > 0
        assert all(x.grad.any() for x in names["encoder"].parameters())

    return check


def several_processes_are_set_up(names: dict[str, Any]) -> Check:
    """What the first block of the page leaves."""
    check = one_of_several_processes(names)
    names |= {
        "torch": torch,
        "dist": dist,
        "encoder": DistributedDataParallel(names["encoder"]),
        "loss_fn": cf.ReconstructionLoss(group=dist.group.WORLD),
    }
    return check


def gradient_cache(names: dict[str, Any]) -> Check:
    several_processes_are_set_up(names)

    def check(names: dict[str, Any]) -> None:
        encoder, ids = names["encoder"], names["ids"]
        found = [x.grad.clone() for x in encoder.parameters()]
        encoder.zero_grad()
        layout = {n: names[n] for n in ("pv", "history", "clicked")}
        table = encoder(names["images"][ids])
        names["loss_fn"](**layout, embeddings=table, table_ids=ids).backward()
        for x, y in zip(encoder.parameters(), found, strict=True):
            torch.testing.assert_close(x.grad, y)

    return check


def memory_of_earlier_batches(names: dict[str, Any]) -> Check:
    check_loss = several_processes_are_set_up(names)

    def check(names: dict[str, Any]) -> None:
        check_loss(names)
        assert len(names["memory"]) == 30 * len(names["ids"])

    return check


def predicted_clicks(names: dict[str, Any]) -> Check:
    rng = np.random.default_rng(0)
    p = rng.random((2, 400))
    names |= {
        "clicked": rng.random(400) < p[1],
        "p0": p[0],
        "p1": p[1],
        "users": np.arange(400) // 20,
        "pages": np.arange(400) // 5,
    }

    def check(names: dict[str, Any]) -> None:
        assert names["gain"].low > 0

    return check


def encoder_of_a_run(names: dict[str, Any]) -> Check:
    """A run's encoder, and photos."""
    encoders = pytest.importorskip("courier_fast.train.encoder", exc_type=ImportError)
    draw = pytest.importorskip("dataset_factory", exc_type=ImportError).draw
    torch.manual_seed(0)
    Path("run").mkdir()
    encoders.save_encoder(encoders.build_encoder("small_conv", 8, 32, batch_norm=True), "run")
    Path("photos").mkdir()
    for path in (Path("a.jpg"), Path("b.jpg"), Path("photos/c.jpg"), Path("photos/d.jpg")):
        path.write_bytes(draw(np.random.default_rng(ord(path.stem)), 60, 90))

    def check(names: dict[str, Any]) -> None:
        assert names["vectors"].shape == (2, 8)
        np.testing.assert_allclose((names["vectors"] ** 2).sum(1), 1, atol=1e-5)

    return check


def another_client(names: dict[str, Any]) -> Check:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    encoder_of_a_run(names)
    from courier_fast.serve.export import export

    export(Path("run"), Path("export"), licence="mit", formats=["onnx"])

    def check(names: dict[str, Any]) -> None:
        expected = np.load("export/golden/vectors.npy")[:1]
        np.testing.assert_allclose(names["embedding"], expected, atol=1e-5)

    return check


STAND_INS = {
    "README.md 0": loss_of_ones_own_training,
    "docs/courier.md 0": attention_from_the_identity,
    "docs/evaluation.md 0": predicted_clicks,
    "docs/evaluation.md 1": features_of_impressions,
    "docs/hm-fashion.md 0": features_of_a_backbone,
    "docs/hm-fashion.md 1": network_from_a_projection,
    "docs/loss.md 0": loss_of_unique_items,
    "docs/loss.md 1": three_losses,
    "docs/loss.md 2": statistics,
    "docs/serving.md 0": encoder_of_a_run,
    "docs/serving.md 1": another_client,
    "docs/training.md 0": training_from_python,
    "docs/processes.md 0": one_of_several_processes,
    "docs/processes.md 1": gradient_cache,
    "docs/processes.md 2": memory_of_earlier_batches,
}


def test_every_block_has_its_stand_ins() -> None:
    assert blocks().keys() == STAND_INS.keys()


@pytest.mark.parametrize("block", STAND_INS)
def test_block_runs(block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    try:
        check = STAND_INS[block](names)
        exec(compile(blocks()[block], block, "exec"), names)
        check(names)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
