"""Settings of a run: files, command line, what does not go together."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from dataset_factory import make_dataset
from train_factory import metrics, settings

from courier_fast import cli
from courier_fast.data.dataset import Dataset
from courier_fast.train.config import Config, add_arguments, overrides_of


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("data") / "dataset", pages=120, seed=1)


def test_settings_round_trip(dataset: Dataset, tmp_path: Path) -> None:
    config = settings(dataset, tmp_path, data__images=64, optim__steps=3, data__scale=[0.2, 0.9])
    config.save(tmp_path / "config.toml")
    again = Config.load(tmp_path / "config.toml")
    assert again == config
    assert (again.data.pages, again.data.images, again.optim.epochs, again.data.scale) == (
        0,
        64,
        0,
        (0.2, 0.9),
    )


def test_wrong_settings_are_named_all_at_once(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        '[data]\ndataset = "x"\nsize = -1\n[optim]\nlr = "fast"\nspeed = 1\n'
    )
    with pytest.raises(ValueError) as error:  # noqa: PT011
        Config.load(tmp_path / "c.toml")
    for expected in (
        "data.size: Input should be greater than or equal to 0, got -1",
        "optim.lr: ",
        "got 'fast'",
        "optim.speed: ",
    ):
        assert expected in str(error.value)


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        ({}, ("candidate", None, 1.0)),
        ({"direction": "both"}, ("anchor", None, 1.0)),
        ({"attention": "mean"}, ("mean", None, None)),
        ({"attention_scale": 2.0}, ("candidate", 2.0, None)),
        ({"attention": "anchor", "attention_temperature": 0.5}, ("anchor", None, 0.5)),
    ],
    ids=str,
)
def test_attention_of_the_settings(
    loss: dict[str, Any], expected: tuple[Any, ...], tmp_path: Path
) -> None:
    config = Config.load(None, {"data.dataset": "x"} | {f"loss.{k}": v for k, v in loss.items()})
    assert tuple(config.loss.reconstruction.values()) == (*expected, 1)
    # What is not given stays open for the next override of a saved file.
    config.save(tmp_path / "c.toml")
    assert Config.load(tmp_path / "c.toml", {"loss.attention": "mean"} if not loss else {})


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (
            {"attention": "candidate", "direction": "both"},
            "direction reconstruct with attention candidate, got both",
        ),
        (
            {"attention_scale": 1.0, "attention_temperature": 1.0},
            "one of attention_scale and attention_temperature with attention candidate",
        ),
        (
            {"attention": "mean", "attention_temperature": 1.0},
            "none of attention_scale and attention_temperature with attention mean, got "
            "attention_temperature",
        ),
        (
            {"attention_temperature": 0},
            "loss.attention_temperature: Input should be greater than 0",
        ),
        ({"attention": "own"}, "loss.attention: "),
        (
            {"attention": "mean", "heads": 2},
            "no heads with attention mean, which asks nothing, got 2",
        ),
        (
            {"attention": "mean", "projections": "query_key"},
            "no projections with attention mean, which asks nothing, got query_key",
        ),
        (
            {"reconstruction_weight": 0, "sequence_weight": 0},
            "reconstruction_weight, prediction_weight or sequence_weight above 0, got none of them",
        ),
        (
            {"reconstruction_weight": 0, "memory": 9},
            "memory: expected a reconstruction_weight above 0 with it, got 0 and 9 rows",
        ),
        ({"heads": 3}, "loss.heads: expected a divisor of model.dim 256, got 3"),
        ({"prefixes": [64, 256]}, "loss.prefixes: expected multiples of loss.heads 1, from 1 to"),
        ({"prefixes": [3], "heads": 2}, "loss.prefixes: expected multiples of loss.heads 2, from"),
        ({"prefixes": [64], "projections": "all"}, "prefixes: expected none with projections"),
        ({"prefixes": [64], "prediction_weight": 1}, "prefixes: expected none with prediction_"),
        ({"prefixes": [64], "attention": "multihead"}, r"prefixes: expected \(\) with attention"),
    ],
    ids=str,
)
def test_attention_that_does_not_go_together(loss: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Config.load(None, {"data.dataset": "x"} | {f"loss.{k}": v for k, v in loss.items()})


def test_prefixes_are_numbers_on_the_command_line_and_a_list_in_a_file(tmp_path: Path) -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ["--data.dataset", "x", "--loss.prefixes", "64", "128"]
    config = Config.load(None, overrides_of(parser.parse_args(given)))
    assert config.loss.prefixes == (64, 128)
    config.save(tmp_path / "c.toml")
    assert Config.load(tmp_path / "c.toml").loss.prefixes == (64, 128)
    for wrong in ("[64, 128]", "64,128", "1.5"):
        given[3:] = [wrong]
        with pytest.raises(ValueError, match=r"loss.prefixes.0: .* got '"):
            Config.load(None, overrides_of(parser.parse_args(given)))


def test_memory_has_no_page() -> None:
    with pytest.raises(ValueError, match="negatives batch or other_pages with a memory, got page"):
        Config.load(None, {"data.dataset": "x", "loss.memory": 10, "loss.negatives": "page"})


def test_command_line_overrides_the_file(
    dataset: Dataset, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(dataset, tmp_path / "a", optim__epochs=1)
    config.save(tmp_path / "c.toml")
    arguments = [
        "train",
        str(tmp_path / "c.toml"),
        "--run.out",
        str(tmp_path / "b"),
        "--optim.steps",
        "2",
        "--loss.temperature",
        "0.2",
    ]
    assert cli.main(arguments) == 0
    resolved = Config.load(tmp_path / "b" / "config.toml")
    assert (
        resolved.optim.steps,
        resolved.optim.epochs,
        resolved.loss.temperature,
        resolved.data.pages,
    ) == (2, 0, 0.2, 16)
    assert "step 2, loss" in capsys.readouterr().out
    assert len(metrics(tmp_path / "b")) == 2


def test_command_line_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["train", "--data.dataset", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("courier-fast train: dataset: expected a folder")
    assert error.count("\n") == 1


@pytest.mark.parametrize("command", list(cli.COMMANDS))
def test_every_command_has_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0
    assert f"courier-fast {command}" in capsys.readouterr().out
