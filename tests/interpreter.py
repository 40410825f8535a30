"""Triton's interpreter without what it does over and over: more than half of its time in these kernels."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any


def patch_language_once() -> None:
    """It puts its functions into triton.language at each launch, and again at each call of a device function inside,
    where they are already. Here it does so once a launch; what the kernels compute is the same, bit for bit."""
    try:
        interpreter = importlib.import_module("triton.runtime.interpreter")
    except ImportError:
        return
    # Other versions of Triton than those with this class are left as they are.
    scope = getattr(interpreter, "_LangPatchScope", None)
    if scope is None:
        return
    patch: Callable[[Any], Any] = interpreter._patch_lang
    languages = (interpreter.tl, interpreter.tl.core)
    patched: set[frozenset[int]] = set()
    seen_by: dict[Any, frozenset[int]] = {}

    class Launch(scope):  # type: ignore[misc, valid-type]
        """The changes of a launch, which it takes back at its end."""

        def restore(self) -> None:
            patched.clear()
            super().restore()

    def once(fn: Any) -> Any:
        if fn not in seen_by:
            modules = [x for x in fn.__globals__.values() if any(x is y for y in languages)]
            seen_by[fn] = frozenset(map(id, modules))
        launch = Launch()
        if seen_by[fn] not in patched:
            launch._changes = patch(fn)._changes
            patched.add(seen_by[fn])
        return launch

    once.original = patch  # type: ignore[attr-defined]
    interpreter._patch_lang = once
