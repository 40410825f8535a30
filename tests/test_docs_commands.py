"""Every command line of the documentation is one that the commands' own parsers take; nothing is
run."""

from __future__ import annotations

import argparse
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from courier_fast.cli import main
from courier_fast.option_rules import check_options

ROOT = Path(__file__).parent.parent
PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "RELEASING.md",
    "SECURITY.md",
    "kernels/README.md",
    "kernels/measurements.md",
    "kernels/cpu/README.md",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "docs").rglob("*.md"))),
]
COMMAND = re.compile(r"(courier-fast|torchrun|make) |python -m (bench|courier_fast)")

pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def in_blocks(text: str) -> Iterator[str]:
    """Commands of the blocks of shell, one each; lines that end in a backslash go on."""
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.shlex(line, posix=True, punctuation_chars="&|;")
            words.whitespace_split = True
            command: list[str] = []
            for word in [*words, "&&"]:
                if not set(word) <= set("&|;"):
                    command.append(word)
                elif command:
                    yield shlex.join(command)
                    command = []


def in_text(text: str) -> list[str]:
    """Commands between backticks, which may leave out what goes without saying."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    return [re.sub(r"\[.*?\]", "", code) for code in re.findall(r"`([^`\n]+)`", text)]


class Parsed(Exception):  # noqa: N818
    """In place of what would run."""


def parse(command: str, whole: bool = True) -> None:
    """Has the command's own parser read it; ValueError where it does not take it. With `whole`, all
    that is required has to be there."""
    program, *words = shlex.split(command, comments=True)
    if program == "make":
        targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
        if not set(words) <= targets:
            raise ValueError(f"make: expected some of {sorted(targets)}, got {words}")
        return
    if program == "torchrun":
        while words and words[0].startswith("--"):
            del words[: 1 if words[0] == "--standalone" else 2]
        if words[0] != "-m":
            if not (ROOT / words[0]).is_file():
                raise ValueError(f"torchrun: expected a file, got {words[0]}")
            return
    module = "courier_fast.cli"
    if program != "courier-fast":
        module, words = words[1], words[2:]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            argparse.ArgumentParser, "parse_args", lambda p, given=None: read(p, given, whole)
        )
        patch.setattr(argparse.ArgumentParser, "error", refuse)
        patch.setattr(sys, "argv", [module, *words])
        patch.setenv("TRITON_INTERPRET", "0")  # some take it away, for all tests after this one
        patch.syspath_prepend(ROOT)
        try:
            if module == "courier_fast.cli":
                main(words)
            else:
                runpy.run_module(module, run_name="__main__")
        except Parsed:
            return
    raise ValueError(f"{command}: never came to its arguments")


def refuse(parser: argparse.ArgumentParser, message: str) -> None:
    raise ValueError(f"{parser.prog}: {message}")


def read(parser: argparse.ArgumentParser, given: Any, whole: bool) -> None:
    parsers = [parser]
    for p in parsers:
        p.allow_abbrev = False
        for group in p._mutually_exclusive_groups:
            group.required &= whole
        for action in p._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
                action.required &= whole
            elif not whole:
                action.required = False
                if not action.option_strings and action.nargs is None:
                    action.nargs = "?"
    given = sys.argv[1:] if given is None else given
    if {"-h", "--help"} & set(given):
        raise Parsed
    found, unknown = parser.parse_known_args(given)
    if unknown:
        raise ValueError(f"{parser.prog}: unrecognized arguments: {' '.join(unknown)}")
    if whole and parser.prog == "courier-fast":
        check_options(parser, found, given)
    settings = {name: value for name, value in vars(found).items() if "." in name}
    if getattr(found, "command", "") == "train" and settings and whole:
        from courier_fast.train.config import Config

        config = Config.load(None, settings)
        assert not config.unused(settings)
    raise Parsed


def commands(find: Any) -> list[str]:
    texts = ((ROOT / page).read_text() for page in PAGES if (ROOT / page).is_file())
    return sorted({c for text in texts for c in find(text) if COMMAND.match(c)})


@pytest.mark.parametrize("command", commands(in_blocks))
def test_a_command_of_a_block_is_taken(command: str) -> None:
    parse(command)


@pytest.mark.parametrize("command", commands(in_text))
def test_a_command_of_the_text_is_taken(command: str) -> None:
    parse(command, whole=False)


def test_commands_are_found() -> None:
    assert len(commands(in_blocks)) > 30
    assert len(commands(in_text)) > 20
    text = (
        '```sh\npip install "." && courier-fast prepare "a b"  # why\nmake \\\n    x\n```\n'
        "`make y`\n"
    )
    assert list(in_blocks(text)) == ["pip install .", "courier-fast prepare 'a b'", "make x"]
    assert in_text(text) == ["make y"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("courier-fast embed --run run/ --datset shop/ --out x.npy", "--dataset|required"),
        ("courier-fast embed --run run/ --dataset shop/ --out x.npy --wrong 3", "--wrong"),
        ("courier-fast embed --run run/ --dataset shop/", "required: --out"),
        ("courier-fast embed --run run/ --data shop/ --out x.npy", "--dataset"),  # no abbreviations
        ("courier-fast embedd --run run/", "invalid choice"),
        ("courier-fast train --data.dataset shop/ --optim.learning_rate 1", "learning_rate"),
        ("courier-fast train --data.dataset shop/ --optim.lr fast", "optim.lr"),
        ("courier-fast evaluate --dataset a --run b --score best", "invalid choice"),
        ("courier-fast sweep --data.dataset shop/ --loss.temperatur 0.1 --out s", "temperatur"),
        ("torchrun --nproc-per-node 8 -m courier_fast.cli train --data.wrong x", "data.wrong"),
        ("torchrun --nproc-per-node 2 examples/no_loop.py", "no_loop"),
        ("python -m bench.loss --shape paper --wrong", "--wrong"),
        ("python -m bench --grup candidate", "--grup"),
        ("make site", "make: expected"),
    ],
)
def test_a_wrong_command_is_not(command: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(command)


def test_text_may_leave_out_what_is_required_and_no_more() -> None:
    parse("courier-fast embed --run RUN", whole=False)
    with pytest.raises(ValueError, match="--wrong"):
        parse("courier-fast embed --wrong", whole=False)
