"""Every name of the package, and every file of the repository, that the documentation names is
there."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

import pytest
from test_docs_commands import PAGES

ROOT = Path(__file__).parent.parent
NAME = re.compile(r"(?<![\w/.-])courier_fast(?:\.[A-Za-z_]\w*)+")
FILE = re.compile(r"(?<![\w/.:-])(?:bench|courier_fast|docs|examples|kernels|tests)/[\w./*-]*\w")
# A line of mkdocstrings, and the members that it takes.
DESCRIBED = re.compile(r"^::: (\S+)\n((?:    .*\n)*)", re.MULTILINE)


def resolve(name: str) -> Any:
    """What a dotted name stands for; ImportError or AttributeError where there is no such thing."""
    parts = name.split(".")
    found: Any = importlib.import_module(parts[0])
    for end, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[:end]))
            except ModuleNotFoundError as error:
                raise AttributeError(f"{name} is not there") from error
    return found


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_names_and_files_are_there(page: str) -> None:
    text = (ROOT / page).read_text()
    for name in sorted(set(NAME.findall(text))):
        resolve(name)
    files = set(FILE.findall(text)) - {"tests/test_x.py"}  # a name for any of them
    assert [name for name in sorted(files) if not any(ROOT.glob(name))] == []


def test_what_the_api_describes_is_there() -> None:
    text = (ROOT / "docs/api.md").read_text()
    described = DESCRIBED.findall(text)
    assert len(described) == text.count(":::") - 1  # one is in a sentence
    for name, options in described:
        found = resolve(name)
        for members in re.findall(r"members: \[(.*?)\]", options, re.DOTALL):
            for member in members.split(","):
                assert hasattr(found, member.strip()), f"{name}.{member.strip()}"
