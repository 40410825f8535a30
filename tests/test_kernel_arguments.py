"""How many arguments a Triton kernel takes: what belongs together is one (triton/common.py)."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

KERNELS = Path(__file__).parent.parent / "kernels" / "triton"

MOST = 30
MOST_SHARED = 12  # by two kernels
# Those of attention "candidate", which are to be written anew: these numbers may only fall.
LARGER = {
    "candidate_scores": 50,
    "candidate_columns": 49,
    "candidate_history": 50,
}
FOLDER = "candidate"  # where kernels may still share more


def arguments(source: str) -> dict[str, list[str]]:
    """Of each kernel in a file."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            names = [ast.unparse(x).partition("(")[0] for x in node.decorator_list]
            if "kernel" in names:
                found[node.name] = [x.arg for x in node.args.args]
    return found


def all_kernels() -> dict[Path, dict[str, list[str]]]:
    return {path: arguments(path.read_text()) for path in sorted(KERNELS.rglob("*.py"))}


def test_no_kernel_has_more_arguments_than_one_can_follow() -> None:
    counts = {k: len(v) for found in all_kernels().values() for k, v in found.items()}
    assert len(counts) > 30
    assert {k: n for k, n in counts.items() if n > MOST} == LARGER


def test_no_list_of_arguments_is_written_twice() -> None:
    kernels = {
        name: set(names)
        for path, found in all_kernels().items()
        if path.parent.name != FOLDER
        for name, names in found.items()
    }
    shared = {(a, b): kernels[a] & kernels[b] for a, b in itertools.combinations(kernels, 2)}
    assert {k: v for k, v in shared.items() if len(v) > MOST_SHARED} == {}


def test_kernels_are_found() -> None:
    code = (
        "@kernel\ndef a(x, y): ...\n@kernel(registers=1)\ndef b(z): ...\n@triton.jit\ndef c(): ..."
    )
    assert arguments(code) == {"a": ["x", "y"], "b": ["z"]}
