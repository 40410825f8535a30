"""Which options of the command line need or exclude one another: a table for each command, looked
at before any work.

An option that would have no effect is an error, since whoever gave it meant something by it.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Said:
    """The values of all options, and which of them were given."""

    values: Mapping[str, Any]  # by the name in the namespace, as in `given`
    names: Collection[str]

    def value(self, option: str) -> Any:
        """What holds, given or by default."""
        return self.values.get(_destination(option))

    def given(self, option: str) -> bool:
        """Whether the option, or with "--option value" that value of it, was given."""
        option, _, value = option.partition(" ")
        return _destination(option) in self.names and (
            not value or str(self.value(option)) == value
        )


def _destination(option: str) -> str:
    return option.lstrip("-").replace("-", "_") if option.startswith("-") else option


@dataclass(frozen=True)
class Rule:
    """Options that have no effect in some case.

    Args:
        where: says why they have none here, with the name of the other option, or None where they
            have one.
        example: words of a command line beside which they have none.
    """

    options: tuple[str, ...]
    where: Callable[[Said], str | None]
    example: tuple[str, ...] = ()

    def broken(self, said: Said) -> tuple[str, str] | None:
        """An option that was given without effect, and why it has none."""
        why = self.where(said)
        if why is None:
            return None
        return next(((option, why) for option in self.options if said.given(option)), None)


def without(others: str, *options: str) -> Rule:
    """Options that need one of the others."""
    several = others.split(" or ")
    return Rule(options, lambda s: None if any(map(s.given, several)) else f"without {others}")


def beside(other: str, *options: str, example: str = "") -> Rule:
    """Options that another, or its value, leaves without effect; `example` is such a value."""
    words = tuple(f"{other} {example}".split())
    return Rule(options, lambda s: f"with {other}" if s.given(other) else None, words)


def only(other: str, values: Sequence[str], *options: str, example: str = "") -> Rule:
    """Options that need one of some values of another; `example`: a value that is none of them."""

    def where(said: Said) -> str | None:
        found = said.value(other)
        found = found if isinstance(found, list) else [found]
        if set(map(str, found)) & set(values):
            return None
        return f"with {other} {' '.join(map(str, found))}; they need {other} {' or '.join(values)}"

    return Rule(options, where, tuple(f"{other} {example}".split()) if example else ())


# ---- the commands --------------------------------------------------------------------------------


# Layouts whose rows say what was shown, and those whose rows also give histories.
_SHOWN = ("ebnerd", "mmctr", "qilin", "taobao-mm")
_LISTS = ("mmctr", "qilin", "taobao-mm")


def _given_pages(said: Said) -> str | None:
    if said.given("--page-column"):
        return "with --page-column, whose pages are given and not made around clicks"
    if said.value("--layout") in _SHOWN:
        layout = said.value("--layout")
        return f"with --layout {layout}, whose pages are given and not made around clicks"
    if said.given("--history-column"):
        return "with --history-column, whose pages are given and not made around clicks"
    return None


def _made_pages(said: Said) -> str | None:
    if _given_pages(said):
        return None
    return (
        "without --page-column, --history-column (or --layout "
        f"{' or '.join(_SHOWN)}): pages are made around clicks then"
    )


def _no_backbone(said: Said) -> str | None:
    found = said.value("--baselines")
    if found is None or "backbone" in found:
        return None
    return "with --baselines that lack backbone"


def _backbone_of_run(said: Said) -> str | None:
    of_run = said.given("--run") and not said.given("--backbone")
    return "with --run and without --backbone: the baseline is the run's own" if of_run else None


def _nothing_encoded(said: Said) -> str | None:
    if not (said.given("--embeddings") or said.given("--run") or said.given("--backbone")):
        return "without --run, --embeddings or --backbone: nothing is encoded"
    if not said.given("--embeddings") or _no_backbone(said) is None:
        return None
    return "with --embeddings and --baselines that lack backbone: nothing is encoded"


def _given_histories(said: Said) -> bool:
    return said.given("--history-column") or said.value("--layout") in _LISTS


def _repeats(said: Said) -> str | None:
    return None if _given_histories(said) else _given_pages(said)


def _own(said: Said) -> str | None:
    if _given_histories(said):
        return None
    return f"without --history-column (or --layout {' or '.join(_LISTS)})"


_NAMES = ("user", "item", "time", "category", "page", "clicked", "history")
_COLUMNS = [f"--{n}-column" for n in _NAMES]
_HISTORIES = ["--history-order", "--padding-id", "--split-column", "--results-column"]
_HISTORIES += ["--position-column"]
_RATED = ["movielens", "amazon-reviews-2023"]
_ENGINE = without("--engine ray", "--ray-address")
_PAGES = ("--layout", "ebnerd")
_DRAWN = only("--candidates", ["sampled", "popular"], "--count", example="page")

_EVALUATE = [
    Rule(
        ("--backbone", "--weights", "--pretrained", "--size"),
        _no_backbone,
        ("--embeddings", "e.npy", "--baselines", "random"),
    ),
    Rule(("--weights", "--pretrained", "--size"), _backbone_of_run, ("--run", "run")),
    beside("--weights", "--pretrained", example="w.safetensors --backbone resnet18 --run run"),
    Rule(
        ("--batch", "--precision", "--decoder", "--threads"),
        _nothing_encoded,
        ("--embeddings", "e.npy", "--baselines", "random"),
    ),
    _DRAWN,
]

RULES: dict[str, list[Rule]] = {
    "prepare": [
        only(
            "--layout",
            ["generic"],
            "--interactions",
            "--items",
            "--time-format",
            *_COLUMNS,
            example="hm",
        ),
        Rule(
            ("--source",),
            lambda s: (
                "with --layout generic, whose files are --interactions"
                if s.value("--layout") == "generic"
                else None
            ),
        ),
        only("--layout", _RATED, "--min-rating", example="hm"),
        only("--layout", ["qilin"], "--pages", example="hm"),
        without("--items", "--category-column"),
        without("--page-column or --history-column", "--clicked-column"),
        without("--history-column", *_HISTORIES),
        Rule(("--keep-own",), _own),
        beside("--page-column", "--results-column", "--position-column", example="p"),
        beside(
            "--split-column",
            "--time-column",
            "--time-format",
            "--test-share",
            "--validation-from",
            "--test-from",
            example="s --history-column h",
        ),
        Rule(("--keep-unclicked",), _made_pages),
        Rule(("--negatives", "--live-days"), _given_pages, _PAGES),
        Rule(("--repeats",), _repeats, _PAGES),
        Rule(
            ("--negatives category",),
            lambda s: (
                "without --items, which has the categories"
                if s.value("--layout") == "generic" and not s.given("--items")
                else None
            ),
        ),
        beside("--layout microlens", "--negatives category"),
        without("--images", "--shrink"),
        without("--images or --embeddings", "--shard-bytes"),
        without("--embeddings", "--embedding-column", "--embedding-id-column", "--embedding-scale"),
        beside("--engine ray", "--threads", "--memory-gib"),
        _ENGINE,
        beside("--validation-from", "--validation-share", "--test-share", example="2020-09-01"),
        beside("--test-from", "--validation-share", "--test-share", example="2020-09-08"),
    ],
    "verify": [],
    "train": [],
    "embed": [
        without("--only-new", "--since", "--remove-missing"),
        without("--dataset", "--since"),
        without("--images", "--id-from"),
        beside("--since", "--remove-missing", example="2020-09-01 --only-new --dataset ds"),
        _ENGINE,
    ],
    "export": [
        without(
            "--run",
            "--format",
            "--licence",
            "--precision",
            "--dim",
            "--dataset",
            "--split",
            "--photos",
            "--threads",
        ),
        without("--dataset", "--split", "--photos", "--threads"),
        without("--verify", "--vectors"),
    ],
    "evaluate": _EVALUATE,
    "report": _EVALUATE,
    "ctr": [
        only("--protocol", ["disjoint", "warm"], "--encoder-share", example="shared"),
        only("--protocol", ["warm"], "--periods", example="shared"),
        only(
            "--protocol",
            ["disjoint", "shared"],
            "--min-count",
            "--epochs",
            "--export",
            example="warm",
        ),
    ],
    "sweep": [_DRAWN],
    "index build": [beside("--kind exact", "--recall", "--seed")],
    "index search": [without("--image", "--encoder"), without("--html", "--dataset")],
    "index clusters": [
        beside("--like", "--until", "--k", "--seed", example="clusters/"),
        without("--until", "--dataset"),
    ],
    "index codes": [
        beside("--like", "--until", "--levels", "--codes", "--seed", example="codes/"),
        without("--until", "--dataset"),
    ],
    "quickstart": [],
    "doctor": [],
}


def check_options(
    parser: argparse.ArgumentParser, args: argparse.Namespace, argv: Sequence[str]
) -> None:
    """ValueError with the names of two options where one of them leaves the other without effect.

    `args` are what `parser` made of `argv`; afterwards args.given has the names of those that stood
    there.
    """
    names = args.given = given(parser, argv)
    command = f"{args.command} {args.action}" if "action" in args else args.command
    said = Said(vars(args), names)
    for rule in RULES.get(command, ()):
        if found := rule.broken(said):
            option, why = found
            raise ValueError(f"{option}: has no effect {why}")


def given(parser: argparse.ArgumentParser, argv: Sequence[str]) -> set[str]:
    """Names of the options that `argv` has, also where it gives them their default."""
    parsers, actions = [parser], []
    for p in parsers:
        for action in p._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.option_strings:
                actions.append((action, action.default))
    try:
        for action, _ in actions:
            action.default = argparse.SUPPRESS
        return set(vars(parser.parse_known_args(list(argv))[0]))
    finally:
        for action, default in actions:
            action.default = default


# ---- settings of training ------------------------------------------------------------------------


def _of_images(said: Said) -> str | None:
    if said.value("data.features") is not None:
        return "with data.features: no image is read"
    return "with a dataset of embeddings: no image is read" if said.value("ready") else None


def _unweighted(weight: str) -> Callable[[Said], str | None]:
    return lambda s: None if s.value(weight) else f"with {weight} 0"


def _reconstructs_nothing(said: Said) -> str | None:
    newest = said.value("loss.sequence") == "newest" and said.value("loss.sequence_weight")
    weights = ("loss.reconstruction_weight", "loss.prediction_weight")
    if newest or any(map(said.value, weights)):
        return None
    return f"with {' 0, '.join(weights)} 0 and without loss.sequence newest"


def _fixed_temperatures(said: Said) -> str | None:
    learned = ("loss.learnable_temperature", "loss.sequence_learnable_temperature")
    return None if any(map(said.value, learned)) else f"without {' or '.join(learned)}"


def _loss(*names: str) -> tuple[str, ...]:
    return tuple(f"loss.{n}" for n in names)


SETTINGS = [
    Rule(
        (
            "data.size",
            "data.scale",
            "data.ratio",
            "data.flip",
            "data.decoder",
            "data.threads",
            "data.max_damaged",
            "model.backbone",
            "model.pretrained",
            "model.weights",
            "model.batch_norm",
            "model.checkpointing",
        ),
        _of_images,
        ("--data.features", "f.npy"),
    ),
    Rule(
        ("model.pretrained",),
        lambda s: "with model.weights, which replace them" if s.value("model.weights") else None,
        ("--model.weights", "w.safetensors"),
    ),
    Rule(
        _loss("attention", "attention_scale", "attention_temperature", "heads", "projections"),
        _reconstructs_nothing,
        ("--loss.reconstruction_weight", "0"),
    ),
    Rule(
        _loss(
            "temperature",
            "learnable_temperature",
            "weight_power",
            "negatives",
            "direction",
            "history_negatives",
            "log_q",
            "memory_after",
        ),
        _unweighted("loss.reconstruction_weight"),
        ("--loss.reconstruction_weight", "0"),
    ),
    Rule(
        _loss("sequence", "sequence_temperature", "sequence_learnable_temperature"),
        _unweighted("loss.sequence_weight"),
        ("--loss.sequence_weight", "0"),
    ),
    Rule(_loss("min_temperature"), _fixed_temperatures),
    Rule(
        _loss("memory_after"), lambda s: None if s.value("loss.memory") else "without loss.memory"
    ),
    Rule(
        _loss("exchange"),
        lambda s: (
            "with loss.candidates process" if s.value("loss.candidates") == "process" else None
        ),
        ("--loss.candidates", "process"),
    ),
]

# What a run of features writes to its config.toml, in place of "auto".
_RESOLVED = {
    "data.size": (96, 224),
    "model.backbone": ("small_conv", "swin_tiny_patch4_window7_224"),
    "model.batch_norm": (False, True),
}


def without_effect(
    values: Mapping[str, Any], defaults: Mapping[str, Any], typed: Collection[str]
) -> dict[str, str]:
    """Settings that have no effect beside the others, and why: of those of the command line
    (`typed`), and those that are not their default.

    A file may well repeat a default: one with all settings is kept with every run.
    """
    changed = {
        n for n in values if values[n] != defaults[n] and values[n] not in _RESOLVED.get(n, ())
    }
    said = Said(values, changed | set(typed))
    found: dict[str, str] = {}
    for rule in SETTINGS:
        why = rule.where(said)
        for name in rule.options:
            if why is not None and said.given(name):
                found.setdefault(name, why)
    return found


def refuse(found: Mapping[str, str]) -> None:
    """ValueError for settings without effect."""
    if found:
        raise ValueError("; ".join(f"{name}: has no effect {why}" for name, why in found.items()))
