"""Options that need or exclude one another: the tables are walked, and every option of every command has been thought of."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from courier_fast.cli import COMMANDS, main
from courier_fast.evaluate.sweep import grid
from courier_fast.option_rules import RULES, SETTINGS, check, given
from courier_fast.train.config import Config

# What a command cannot do without, as the words of a command line.
REQUIRED = {
    "prepare": "out",
    "embed": "--run run --out e.npy",
    "export": "--out out",
    "evaluate": "--dataset ds",
    "report": "--dataset ds",
    "ctr": "--dataset ds --embeddings e.npy --out out",
    "sweep": "--out out",
    "index build": "--embeddings e.npy --out out",
    "index search": "--index index",
    "index clusters": "--embeddings e.npy --out out",
}

ONE_OF = {
    "evaluate": [("--run", "--embeddings")],
    "report": [("--run", "--embeddings")],
    "embed": [("--images", "--dataset")],
}

# Options that always have an effect, or an error of their own where they have none.
ALWAYS = {
    "prepare": "layout images shrink shard-rows overwrite engine page-column page-size min-history max-history seed validation-from test-from",
    "verify": "",
    "train": "",
    "embed": "run dataset images out only-new compact engine batch device precision decoder threads",
    "export": "run out verify",
    "evaluate": "dataset run embeddings split baselines candidates k history score bootstrap seed json device",
    "report": "dataset run embeddings split baselines candidates k history score bootstrap seed json device out ctr sweep headline",
    "ctr": "dataset embeddings out models forms protocol seeds split history min-count batch lr l2 epochs no-control allow-missing threads export",
    "sweep": "out seeds split candidates k history score bootstrap batch device precision decoder threads",
    "index build": "embeddings out kind",
    "index search": "index item image k html json",
    "index clusters": "embeddings out like",
    "quickstart": "out items users steps minutes short seed",
}  # fmt: skip
ALWAYS_SETTINGS = {
    "data": "dataset features pages images share history ahead buckets",
    "model": "dim compile slice shard ema",
    "loss": "unit candidates memory reconstruction_weight sequence_weight impl",
    "optim": "epochs steps lr min_lr warmup weight_decay betas clip",
    "run": "out seed device precision save_steps save_minutes keep log_steps tensorboard progress",
}


def parser_of(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    commands = parser.add_subparsers(dest="command")
    name = command.split()[0]
    importlib.import_module(COMMANDS[name][0]).add_arguments(commands.add_parser(name))
    return parser


def leaves(command: str) -> dict[str, argparse.Action]:
    """The command's options."""
    parser = parser_of(command)
    for word in command.split():
        (sub,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
        parser = sub.choices[word]
    return {a.option_strings[-1]: a for a in parser._actions if a.option_strings}


def sample(action: argparse.Action, value: str) -> list[str]:
    """Words that give an option."""
    if action.nargs == 0:
        return [action.option_strings[-1]]
    value = value or (str(next(iter(action.choices))) if action.choices else "1")
    return [action.option_strings[-1], value]


def broken() -> Iterator[tuple[str, str, list[str]]]:
    for command, rules in RULES.items():
        actions = leaves(command)
        for number, rule in enumerate(rules):
            for option in rule.options:
                name, _, value = option.partition(" ")
                line = [*command.split(), *REQUIRED[command].split(), *rule.example]
                if name not in line:
                    line += sample(actions[name], value)
                for one, other in ONE_OF.get(command.split()[0], ()):
                    line += [] if {one, other} & set(line) else [one, "x"]
                yield f"{command}-{number}-{option}", option, line


@pytest.mark.parametrize(
    ("option", "line"), [pytest.param(o, line, id=name) for name, o, line in broken()]
)
def test_each_rule_gives_its_error(
    option: str, line: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    parser = parser_of(" ".join(line[:1]))
    args = parser.parse_args(line)
    with pytest.raises(ValueError, match="has no effect with") as raised:
        check(parser, args, line)
    text = str(raised.value)
    assert text.count("\n") == 0
    assert text.count("--") >= 2 and option.split()[0] in text  # both are named


def test_every_option_of_every_command_is_in_the_table_or_has_always_an_effect() -> None:
    for command, rules in RULES.items():
        ruled = {o.split()[0] for rule in rules for o in rule.options}
        always = {f"--{o}" for o in ALWAYS[command].split()}
        found = {o for o in leaves(command) if o != "--help" and "." not in o}
        assert found == (ruled | always), command
    assert {c.split()[0] for c in RULES} == set(COMMANDS)


def test_every_setting_is_in_the_table_or_has_always_an_effect() -> None:
    ruled = {name for rule in SETTINGS for name in rule.options}
    always = {f"{s}.{n}" for s, names in ALWAYS_SETTINGS.items() for n in names.split()}
    assert {o[2:] for o in leaves("train") if "." in o} == ruled | always
    assert not ruled & always


@pytest.mark.parametrize(
    ("name", "example"),
    [pytest.param(n, r.example, id=f"{i}-{n}") for i, r in enumerate(SETTINGS) for n in r.options],
)
def test_each_setting_without_effect_gives_its_error(
    name: str, example: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    action = leaves("train")[f"--{name}"]
    default = getattr(getattr(Config.load(None, {"data.dataset": "ds"}), name.split(".")[0]), name.split(".")[1])  # fmt: skip
    value = {"loss.heads": "1", "loss.attention": "mean", "loss.attention_scale": "1", "loss.attention_temperature": "1"}.get(name)  # fmt: skip
    if value is None:
        value = default if isinstance(default, str) else "1" if default is None else default
    values = [str(x) for x in value] if isinstance(value, tuple) else [str(value)]
    assert main(["train", "--data.dataset", "ds", *example, action.option_strings[0], *values]) == 2
    text = capsys.readouterr().err
    assert f"{name}: has no effect with" in text and text.count("\n") == 1


def test_settings_of_a_file_without_effect_are_errors_defaults_and_what_a_run_wrote_are_not(
    tmp_path: Path,
) -> None:
    def unused(text: str) -> dict[str, str]:
        (tmp_path / "c.toml").write_text(f'[data]\ndataset = "ds"\n{text}')
        return Config.load(tmp_path / "c.toml").unused()

    assert set(unused("[loss]\nmemory_after = 5")) == {"loss.memory_after"}
    assert not unused("[loss]\nmemory_after = 5\nmemory = 9")
    assert set(unused('features = "f.npy"\nsize = 64')) == {"data.size"}
    assert set(unused("[loss]\nsequence_weight = 0\nsequence_temperature = 0.3")) == {
        "loss.sequence_temperature"
    }
    assert not unused("[loss]\nsequence_weight = 0\nsequence_temperature = 0.2")
    config = Config.load(None, {"data.dataset": "ds", "data.features": "f.npy"})
    config.data.size, config.model.backbone, config.model.batch_norm = 96, "small_conv", False
    config.save(tmp_path / "kept.toml")
    assert not Config.load(tmp_path / "kept.toml").unused()


def test_a_sweep_takes_settings_that_have_an_effect_in_some_run(tmp_path: Path) -> None:
    given = {"data.dataset": ["ds"], "loss.memory": ["0", "64"], "loss.memory_after": ["5"]}
    assert len(grid(None, given, 1, tmp_path)) == 2
    with pytest.raises(ValueError, match="memory_after: has no effect without loss.memory"):
        grid(None, given | {"loss.memory": ["0"]}, 1, tmp_path)


def test_an_option_that_gives_its_default_is_given(tmp_path: Path) -> None:
    line = ["prepare", "out", "--interactions", "c.csv", "--clicked-column", "clicked"]
    assert given(parser_of("prepare"), line) >= {"interactions", "clicked_column"}
    assert "user_column" not in given(parser_of("prepare"), line)


def test_options_that_go_together_are_taken() -> None:
    for line in (
        "prepare out --interactions c.csv --page-column p --clicked-column c --keep-unclicked --page-size 4 --seed 1",
        "prepare out --interactions c.csv --items i.csv --negatives category --category-column kind --live-days 3 --repeats keep",
        "prepare out --layout movielens --source ml --min-rating 4 --negatives popularity --images p --shrink 64 --shard-bytes 9",
        "prepare out --layout ebnerd --source e --keep-unclicked --validation-from 2020-01-01 --test-from 2020-01-02",
        "prepare out --layout hm --source e --negatives category --threads 2 --memory-gib 1",
        "embed --run r --dataset ds --out e --only-new --since 2020-01-01",
        "evaluate --dataset ds --embeddings e.npy --backbone resnet18 --pretrained --size 64 --batch 8 --candidates popular --count 9",
        "evaluate --dataset ds --run r --baselines random --batch 8 --threads 2",
        "ctr --dataset ds --embeddings e.npy --out o --protocol shared disjoint --encoder-share 0.4",
        "export --run r --out o --licence x --dataset ds --photos 9 --verify --vectors v.npy",
        "index search --index i --image a.jpg --encoder r --dataset ds --html p.html",
        "index clusters --embeddings e --out o --dataset ds --until 2020-01-01 --k 9",
        "sweep --out o --candidates sampled --count 5",
    ):  # fmt: skip
        words = line.split()
        parser = parser_of(words[0])
        check(parser, parser.parse_args(words), words)
