"""Names of a package that are imported when they are asked for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader
from types import ModuleType
from typing import Any

# Public modules by the names that they once had. These can be imported as before.
MOVED = {
    "courier_fast.data.decode": "courier_fast.data.images.decode",
    "courier_fast.data.layouts": "courier_fast.data.prepare.layouts",
    "courier_fast.data.options": "courier_fast.data.prepare.options",
    "courier_fast.evaluate.ctr": "courier_fast.ctr",
    "courier_fast.evaluate.ctr.impressions": "courier_fast.ctr.impressions",
    "courier_fast.evaluate.embed": "courier_fast.embed",
    "courier_fast.evaluate.embed_new": "courier_fast.embed.grow",
    "courier_fast.evaluate.features": "courier_fast.ctr.features",
    "courier_fast.evaluate.metrics": "courier_fast.metrics",
    "courier_fast.problem": "courier_fast.loss.problem",
    "courier_fast.reference": "courier_fast.loss.reference",
    "courier_fast.serve.clusters": "courier_fast.index.clusters",
    "courier_fast.serve.index": "courier_fast.index.index",
}


class _Moved(MetaPathFinder, Loader):
    """Gives the module itself, not a copy, for a name that it once had."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        return spec_from_loader(fullname, self) if fullname in MOVED else None

    def exec_module(self, module: ModuleType) -> None:
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


def find_moved() -> None:
    """From now on the names of MOVED are found."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())  # also before a folder that is left over


def lazy(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of a package; `modules`: which of its modules has a name."""

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(f".{modules[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    def names() -> list[str]:
        return sorted({*vars(sys.modules[package]), *modules})

    return get, names
