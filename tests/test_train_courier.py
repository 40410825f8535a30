"""The trainer's recipe of COURIER's authors, and each of its parts alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_factory import make_dataset
from safetensors.torch import load_file
from torch.nn import functional
from train_factory import make_features, metrics, settings

from courier_fast import CourierLoss
from courier_fast.data.dataset import Dataset
from courier_fast.train.config import Config, LossConfig
from courier_fast.train.objective import newest_clicks
from courier_fast.train.trainer import Trainer


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", pages=120, seed=1)


@pytest.fixture(scope="module")
def features(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_features(dataset, tmp_path_factory.mktemp("features") / "features.npy")


# ---- settings ------------------------------------------------------------------------------------


def load(**given: Any) -> Config:
    overrides = {name.replace("__", "."): value for name, value in given.items()}
    return Config.load(None, {"data.dataset": "x"} | overrides)


def test_the_recipe_holds_where_nothing_is_given(tmp_path: Path) -> None:
    c = load(loss__recipe="courier", loss__temperature=0.2, optim__lr="3e-4")
    assert (c.loss.attention, c.loss.heads, c.loss.sequence) == ("multihead", 4, "newest")
    assert (c.loss.prediction_weight, c.loss.sequence_temperature) == (1, 0.05)
    assert (c.loss.unit, c.loss.history_negatives, c.data.history) == (False, False, 5)
    assert (c.optim.epochs, c.optim.steps, c.optim.betas) == (1, 0, (0.9, 0.999))
    assert (c.optim.weight_decay, c.optim.warmup, c.optim.min_lr, c.optim.clip) == (1e-6, 0, 1, 0)
    assert (c.loss.temperature, c.optim.lr) == (0.2, 3e-4)
    assert not c.unused()
    c.save(tmp_path / "c.toml")
    assert Config.load(tmp_path / "c.toml") == c
    assert not Config.load(tmp_path / "c.toml").unused()


def test_a_run_has_the_length_that_was_given() -> None:
    for name, value in (("steps", 7), ("epochs", 3)):
        optim = load(**{"loss__recipe": "courier", f"optim__{name}": value}).optim
        assert {"steps": optim.steps, "epochs": optim.epochs} == {"steps": 0, "epochs": 0} | {
            name: value
        }


def test_a_recipe_goes_with_sections_that_are_models() -> None:
    config = Config(data={"dataset": "x"}, loss=LossConfig(recipe="courier", heads=2))  # type: ignore[arg-type]
    assert (config.loss.attention, config.loss.heads, config.data.history) == ("multihead", 2, 5)


def test_no_other_recipe_and_none_by_default() -> None:
    assert load().loss == LossConfig()
    with pytest.raises(ValueError, match=r"loss\.recipe: .*'candidate' or 'courier'.* got 'own'"):
        load(loss__recipe="own")


def test_another_attention_beside_the_recipe() -> None:
    assert load(loss__recipe="courier", loss__attention="mean").loss.heads == 1
    assert load(loss__recipe="courier", loss__attention="candidate").loss.heads == 4


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"attention_scale": 1},
            "attention_scale: expected none with attention multihead, got 1.0",
        ),
        ({"attention_temperature": 1}, "attention_temperature: expected none with attention multi"),
        ({"projections": "all"}, "projections: expected none with attention multihead, got all"),
        ({"direction": "both"}, "direction: expected reconstruct with attention multihead"),
        ({"negatives": "page"}, "negatives: expected batch with attention multihead, got page"),
        ({"memory": 9}, "memory: expected 0 with attention multihead, got 9"),
        ({"log_q": True}, "log_q: expected false with attention multihead, got true"),
        ({"weight_power": -0.5}, "weight_power: expected 0 with attention multihead, got -0.5"),
        ({"learnable_temperature": True}, "learnable_temperature: expected false with attention"),
        ({"sequence_learnable_temperature": True}, "sequence_learnable_temperature: expected fal"),
        ({"candidates": "process"}, "candidates: expected all or auto with prediction_weight abo"),
        (
            {"candidates": "process", "prediction_weight": 0},
            "candidates: expected all or auto with attention multihead, got process",
        ),
        (
            {"reconstruction_weight": 0, "prediction_weight": 0, "sequence": "pairs"},
            "attention multihead: expected reconstruction_weight, prediction_weight, or with",
        ),
        ({"heads": 3}, "loss.heads: expected a divisor of model.dim 256, got 3"),
    ],
    ids=str,
)
def test_what_does_not_go_with_it(loss: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load(loss__recipe="courier", **{f"loss__{name}": value for name, value in loss.items()})


def test_an_attention_of_no_loss_has_no_effect() -> None:
    none = {"loss__reconstruction_weight": 0, "loss__heads": 2}
    assert set(load(**none).unused()) == {"loss.heads"}
    assert not load(**none, loss__prediction_weight=1).unused()
    assert not load(**none, loss__sequence="newest").unused()


# ---- runs ----------------------------------------------------------------------------------------

NONE = {"loss__reconstruction_weight": 0, "loss__sequence_weight": 0}
ALONE: dict[str, dict[str, Any]] = {
    "reconstruction": {"loss__sequence_weight": 0, "loss__attention": "multihead"},
    "prediction": NONE | {"loss__prediction_weight": 1, "loss__attention": "multihead"},
    "newest": NONE
    | {"loss__sequence_weight": 1, "loss__sequence": "newest", "loss__attention": "multihead"},
    "prediction of candidates": NONE | {"loss__prediction_weight": 1, "loss__projections": "all"},
    "prediction of means": NONE | {"loss__prediction_weight": 1, "loss__attention": "mean"},
    "newest of candidates": NONE | {"loss__sequence_weight": 1, "loss__sequence": "newest"},
    "recipe": {"loss__recipe": "courier", "loss__unit": True},
}


@pytest.mark.parametrize("name", ALONE)
def test_each_part_learns(name: str, dataset: Dataset, features: Path, tmp_path: Path) -> None:
    given = {"optim__lr": 0.01, "optim__warmup": 0, "optim__steps": 24}
    config = settings(dataset, tmp_path / "run", data__features=features, **(ALONE[name] | given))
    trainer = Trainer(config)
    before = {n: p.detach().clone() for n, p in trainer.objective.named_parameters()}
    trainer.fit()
    lines = metrics(tmp_path / "run")
    first, last = (np.mean([x["loss"] for x in part]) for part in (lines[:4], lines[-4:]))
    assert last < 0.95 * first
    assert all(not torch.equal(p, before[n]) for n, p in trainer.objective.named_parameters())
    assert ("loss_pred" in lines[-1]) == bool(config.loss.prediction_weight)
    # What the loss learned is no part of what is exported.
    exported = load_file(tmp_path / "run" / "encoder.safetensors")
    assert exported.keys() == trainer.encoder.state_dict().keys()


def test_the_weighted_sum_is_that_of_its_parts(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    for number, attention in enumerate(("multihead", "candidate", "mean")):
        for sequence in ("newest", "pairs"):
            given: dict[str, Any] = {
                "loss__attention": attention,
                "loss__sequence": sequence,
                "loss__reconstruction_weight": 0.5,
                "loss__prediction_weight": 2,
                "loss__sequence_weight": 3,
            }
            out = tmp_path / f"{number}-{sequence}"
            trainer = Trainer(settings(dataset, out, data__features=features, **given))
            x = trainer.backward(trainer.loader.load(0, 0))
            expected = 0.5 * x.rec + 2 * x.pred + 3 * x.seq
            assert x.loss.item() == pytest.approx(expected.item(), rel=1e-6)
            assert min(x.rec, x.pred, x.seq) > 0


def test_it_is_the_loss_of_the_package(dataset: Dataset, features: Path, tmp_path: Path) -> None:
    """On a batch as it is, also with the histories' items as candidates, which have no click."""
    trainer = Trainer(settings(dataset, tmp_path, data__features=features, loss__recipe="courier"))
    batch = trainer.loader.load(0, 0)
    embeddings = trainer.encoder(batch.images).detach()
    loss = trainer.objective.rec
    assert isinstance(loss, CourierLoss)
    expected = loss(
        batch.pv_index,
        batch.history_index,
        batch.clicked,
        pv_offsets=batch.pv_offsets,
        history_offsets=batch.history_offsets,
        embeddings=embeddings[: batch.num_items],
    )
    found = trainer.objective(embeddings, batch, 1, 1, False)
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    trainer.objective.config.history_negatives = True
    more = trainer.objective(embeddings, batch, 1, 1, False)
    assert more.rec > found.rec
    assert more.pred.item() == pytest.approx(found.pred.item(), rel=1e-5)
    assert more.seq.item() == pytest.approx(found.seq.item(), rel=1e-6)


def test_click_prediction_is_the_mean_over_pages_with_a_history(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    """By plain PyTorch, of the mean of the history; and pages without one give no rows."""
    given = NONE | {"loss__prediction_weight": 1, "loss__attention": "mean"}
    trainer = Trainer(settings(dataset, tmp_path, data__features=features, **given))
    batch = trainer.loader.load(0, 0)
    offsets = batch.history_offsets.clone()
    offsets[1:3] = 0  # the third page has the history of the first three
    plan = batch.plan
    plan.history_offsets[:] = offsets.numpy()
    batch.history_offsets.copy_(offsets)
    table = functional.normalize(trainer.encoder(batch.images).detach(), dim=1)
    rows, clicked = [], []
    for page in range(2, len(offsets) - 1):
        history = table[batch.history_index[offsets[page] : offsets[page + 1]]]
        for j in range(int(batch.pv_offsets[page]), int(batch.pv_offsets[page + 1])):
            rows.append(torch.cat([history.mean(0), table[batch.pv_index[j]]]))
            clicked.append(batch.clicked[j])
    head = trainer.objective.click_head
    assert head is not None
    logits = head(torch.stack(rows)).squeeze(1)
    expected = functional.binary_cross_entropy_with_logits(logits, torch.stack(clicked).float())
    found = trainer.objective(trainer.encoder(batch.images), batch, 1, 1, False)
    assert found.pred.item() == pytest.approx(expected.item(), rel=1e-5)


def test_newest_clicks_are_pages_of_one_item(
    dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    trainer = Trainer(settings(dataset, tmp_path, data__features=features))
    batch = trainer.loader.load(0, 0)
    offsets = batch.history_offsets.clone()
    offsets[1:3] = 0  # two pages without a history
    batch.plan.history_offsets[:] = offsets.numpy()
    batch.history_offsets.copy_(offsets)
    found = newest_clicks(batch)
    assert (len(found["pv"]), found["pv_offsets"][:4].tolist()) == (len(offsets) - 3, [0, 0, 0, 1])
    for page in range(len(offsets) - 1):
        history = batch.history_index[offsets[page] : offsets[page + 1]]
        newest, older = (
            found[side][found[f"{side}_offsets"][page] : found[f"{side}_offsets"][page + 1]]
            for side in ("pv", "history")
        )
        assert torch.equal(newest, history[-1:])
        assert torch.equal(older, history[:-1])
    assert batch.plan.num_newest_anchors == int((offsets.diff() > 1).sum())


@pytest.mark.parametrize("name", ["recipe", "prediction of candidates"])
def test_a_run_that_is_resumed_is_the_same(
    name: str, dataset: Dataset, features: Path, tmp_path: Path
) -> None:
    given = ALONE[name] | {"data__features": features, "optim__steps": 6, "run__save_steps": 3}
    Trainer(settings(dataset, tmp_path / "whole", **given)).fit()
    stopped = Trainer(settings(dataset, tmp_path / "resumed", **given))
    step = stopped.step

    def step_and_stop(*arguments: Any, **options: Any) -> Any:
        stopped.signal.number = int(stopped.progress.step == 2)
        return step(*arguments, **options)

    stopped.step = step_and_stop  # type: ignore[method-assign]
    assert stopped.fit()["step"] == 3
    resumed = Trainer(settings(dataset, tmp_path / "resumed", **given))
    resumed.fit()
    assert metrics(tmp_path / "resumed") == metrics(tmp_path / "whole")
    whole = Trainer(settings(dataset, tmp_path / "whole", **given))  # from its last checkpoint
    here, there = (x.learner.modules.state_dict() for x in (resumed, whole))
    assert any("running_mean" in n for n in here)
    assert all(torch.equal(here[n], there[n]) for n in there)
