"""No files import each other in a circle; public modules are found by the names they once had."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from courier_fast.lazy import MOVED

ROOT = Path(__file__).parents[1]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("courier_fast", "bench")
    for path in sorted((ROOT / folder).rglob("*.py"))
} | {
    ".".join(("courier_fast", *path.relative_to(ROOT).with_suffix("").parts)): path
    for path in sorted((ROOT / "kernels").rglob("*.py"))
}

# The two arrows upward, on purpose and only when asked for: the package's own names
# (`courier_fast.load`, say), and the sub-commands of the command line.
LAZY = {"courier_fast", "courier_fast.cli"}


def imported(name: str) -> Iterator[str]:
    """The files that a file imports, wherever it does, be it for a type checker alone."""
    path = FILES[name]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.stem == "__init__" else name.split(".")[:-1]
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                if inner in FILES:
                    yield inner
                elif module in FILES:
                    yield module


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """Sets of files, of two or more, each of which leads to every other (Tarjan)."""
    found: list[set[str]] = []
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []

    def visit(name: str) -> None:
        number[name] = low[name] = len(number)
        stack.append(name)
        for other in graph[name]:
            if other not in number:
                visit(other)
            if other in stack:
                low[name] = min(low[name], low[other])
        if low[name] == number[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(set(stack[at:]))
            del stack[at:]

    for name in graph:
        if name not in number:
            visit(name)
    return found


def test_a_circle_is_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [{"b", "c"}]


def test_no_circle() -> None:
    graph = {name: {x for x in imported(name) if x != name} - LAZY for name in FILES}
    assert len(graph) > 150
    assert graph["courier_fast.loss.functional"] >= {"courier_fast.loss.problem"}
    assert circles(graph) == []


def room(name: str) -> str:
    """The folder or file in which a file is: those of bench/ are one, each of courier_fast/."""
    return ".".join(name.split(".")[: 1 if name.startswith("bench") else 2])


def test_rooms_stand_above_each_other() -> None:
    graph: dict[str, set[str]] = {room(name): set() for name in FILES}
    for name in FILES:
        others = {room(x) for x in imported(name) if x not in LAZY}
        graph[room(name)] |= others - {room(name)}
    assert graph["courier_fast.train"] >= {"courier_fast.data"}
    assert circles(graph) == []


@pytest.mark.parametrize("name", MOVED)
def test_public_modules_are_found_by_their_old_names(name: str) -> None:
    assert name not in FILES
    assert importlib.import_module(name) is importlib.import_module(MOVED[name])


def test_names_of_packages() -> None:
    for package in ("courier_fast", "courier_fast.embed", "courier_fast.data.prepare"):
        module = importlib.import_module(package)
        assert set(module.__all__) <= set(dir(module))
        for name in module.__all__:
            assert getattr(module, name).__name__ == name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        importlib.import_module("courier_fast.embed").nothing  # noqa: B018
