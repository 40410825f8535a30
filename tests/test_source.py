"""Nothing that the package reads may run: no call in the source, or in the documentation, unpickles
or evaluates data."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

MODULES = {"pickle", "_pickle", "dill", "cloudpickle", "joblib", "jsonpickle", "marshal", "shelve"}
CALLS = {
    "eval",
    "exec",
    "torch.export.load",
    "torch.package.PackageImporter",
    "os.system",
    "os.popen",
    "pandas.read_pickle",
    "torch.hub.load",
    "torch.jit.load",
    "yaml.load",
    "yaml.full_load",
    "yaml.unsafe_load",
    "yaml.load_all",
    "yaml.unsafe_load_all",
}
# torch.distributed's objects travel as pickles.
OBJECTS = re.compile(r"(all_gather|broadcast|gather|scatter|send|recv)_object(_list)?$")
# What an argument has to be where it is given.
ARGUMENTS = {"weights_only": True, "allow_pickle": False, "shell": False}


def full_names(tree: ast.AST) -> dict[str, str]:
    """What imported names stand for."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for a in node.names:
                names[a.asname or a.name.split(".")[0]] = (
                    a.name if a.asname else a.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, names)}.{node.attr}"
    return ""


def findings(code: str) -> Iterator[str]:
    """Imports and calls that run what they are given, by line."""
    tree = ast.parse(code)
    names = full_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
            )
            yield from (
                f"{node.lineno}: imports {m}" for m in modules if m and m.split(".")[0] in MODULES
            )
        elif isinstance(node, ast.Call):
            name, given = dotted(node.func, names), {k.arg: k.value for k in node.keywords}
            if name in CALLS or OBJECTS.search(name):
                yield f"{node.lineno}: calls {name}"
            if name == "torch.load" and "weights_only" not in given:
                yield f"{node.lineno}: torch.load without weights_only=True"
            for argument, right in ARGUMENTS.items():
                value = given.get(argument)
                if value is not None and not (
                    isinstance(value, ast.Constant) and value.value is right
                ):
                    yield f"{node.lineno}: {name} with another {argument} than {right}"


def sources() -> dict[str, str]:
    folders = ("courier_fast", "kernels", "bench", "examples")
    found = {
        str(path.relative_to(ROOT)): path.read_text()
        for folder in folders
        for path in sorted((ROOT / folder).rglob("*.py"))
    }
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        codes = re.findall(r"^```python\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
        found |= {f"{path.relative_to(ROOT)} {i}": code for i, code in enumerate(codes)}
    return found


def test_nothing_read_is_run() -> None:
    every = sources()
    assert {
        "courier_fast/loss/union/exchange.py",
        "kernels/triton/candidate/bins.py",
        "docs/training.md 0",
    } <= every.keys()
    assert [f"{name}:{line}" for name, code in every.items() for line in findings(code)] == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import joblib.numpy_pickle",
        "import torch; torch.load(path)",
        "import torch as t; t.load(path, weights_only=False)",
        "from torch import load; load(path)",
        "from torch import load as read; read(path, weights_only=flag)",
        "import numpy as np; np.load(path, allow_pickle=True)",
        "import yaml; yaml.load(text, Loader=yaml.Loader)",
        "import torch.distributed as dist; dist.all_gather_object(out, x)",
        "import torch; torch.distributed.broadcast_object_list(x)",
        "from torch.distributed import gather_object; gather_object(x)",
        "class A:\n def f(self): return eval(self.text)",
        "exec(compile(text, name, 'exec'))",
        "import subprocess; subprocess.run(text, shell=True)",
        "import os; os.system(text)",
        "import pandas as pd; pd.read_pickle(path)",
    ],
)
def test_what_runs_is_found(code: str) -> None:
    assert len(list(findings(code))) == 1


@pytest.mark.parametrize(
    "code",
    [
        "model.eval()",
        "import torch; torch.load(path, weights_only=True)",
        "import numpy as np; np.load(path), np.load(path, allow_pickle=False)",
        "import json; json.load(file)",
        "import yaml; yaml.safe_load(text)",
        "import subprocess; subprocess.run(['a', text], shell=False)",
    ],
)
def test_what_only_reads_is_not(code: str) -> None:
    assert list(findings(code)) == []
