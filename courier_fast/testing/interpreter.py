"""Triton's interpreter without what it does over and over: three quarters of its time for the
losses' small problems."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def make_fast() -> None:
    """What the kernels compute is the same, bit for bit. Another version of Triton than those whose
    parts are found here is left as it is, part by part."""
    try:
        interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    except ImportError:
        return
    if getattr(interpreter, "courier_fast_patched", False):
        return
    interpreter.courier_fast_patched = True
    _patch_language_once(interpreter)
    _leave_out_unused_checks(interpreter)
    _remember_types(interpreter)


@contextmanager
def truncated_tf32() -> Iterator[None]:
    """Inside, products in tf32 drop what a GPU does not look at, the last 13 bits of float32
    operands; the interpreter takes them whole."""
    interpreter: Any = importlib.import_module("triton.runtime.interpreter")
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    whole = builder.create_dot

    def seen(x: Any) -> Any:
        bits = np.ascontiguousarray(x.data).view(np.int32) & np.int32(-1 << 13)
        return handle(bits.view(np.float32), x.dtype)

    def create_dot(self: Any, a: Any, b: Any, d: Any, precision: Any, *more: Any) -> Any:
        if a.data.dtype == np.float32 and "TF32" in str(precision):
            a, b = seen(a), seen(b)
        return whole(self, a, b, d, precision, *more)

    builder.create_dot = create_dot
    try:
        yield
    finally:
        builder.create_dot = whole


def _patch_language_once(interpreter: Any) -> None:
    """It puts its functions into triton.language at each launch, and again at each call of a device
    function inside, where they are already. Here it does so once a launch, with the functions it
    made for the first."""
    scope = getattr(interpreter, "_LangPatchScope", None)
    if scope is None:
        return
    patch: Callable[[Any], Any] = interpreter._patch_lang
    languages = (interpreter.tl, interpreter.tl.core)
    patched: list[frozenset[int]] = []
    seen_by: dict[Any, frozenset[int]] = {}
    changes: dict[tuple[frozenset[int], ...], list[tuple[Any, str, Any]]] = {}

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
        if seen_by[fn] in patched:
            return launch
        patched.append(seen_by[fn])
        state = tuple(patched)  # what is patched by then is not patched again
        if state in changes:
            for owner, name, value in changes[state]:
                launch.set_attr(owner, name, value)
        else:
            launch._changes = patch(fn)._changes
            made = {(id(owner), name): owner for owner, name, _ in launch._changes}
            changes[state] = [(x, name, vars(x)[name]) for (_, name), x in made.items()]
        return launch

    once.original = patch  # type: ignore[attr-defined]
    interpreter._patch_lang = once


def _leave_out_unused_checks(interpreter: Any) -> None:
    """At each sum and product of integers it computes whether they overflow, for an assertion that
    is made with the option `debug` alone, which it never sets."""
    builder: Any = getattr(interpreter, "interpreter_builder", None)
    options: Any = getattr(builder, "options", None)
    if dataclasses.is_dataclass(options) and getattr(options, "debug", True) is False:
        change: Any = dataclasses.replace  # for the types, as whose class options are is not known
        builder.options = change(options, sanitize_overflow=False)


def _remember_types(interpreter: Any) -> None:
    """A block's type, a tensor's shape as constexprs, NumPy's type for one: each is worked out
    once."""
    core = interpreter.tl.core
    make_tensor, make_block = core.tensor.__init__, core.block_type.__init__
    numpy_type, numpy_types = interpreter._get_np_dtype, {}
    blocks: dict[tuple[Any, ...], dict[str, Any]] = {}

    def get_np_dtype(dtype: Any) -> Any:
        name = dtype.scalar.name  # it looks at no more of it
        if name not in numpy_types:
            numpy_types[name] = numpy_type(dtype)
        return numpy_types[name]

    interpreter._get_np_dtype = get_np_dtype
    probe = core.tensor(None, core.block_type(core.float32, [1]))
    if set(vars(probe)) != {"handle", "shape", "numel", "type", "dtype"}:
        return

    def init_block(self: Any, element_ty: Any, shape: Any) -> None:
        e, sizes = element_ty, shape.values if type(shape) is core.tuple else shape
        sizes = [x.value if type(x) is core.constexpr else x for x in sizes]
        key = (e.name, *((e.address_space, e.const) if e.is_ptr() else ()), None, *sizes)
        if key in blocks and all(type(x) is int for x in sizes):
            self.__dict__.update(blocks[key])
            return
        make_block(self, element_ty, shape)
        self.of_tensors = constexprs(self)
        blocks[key] = dict(vars(self))

    def constexprs(type: Any) -> tuple[Any, Any]:
        tensor = object.__new__(core.tensor)
        make_tensor(tensor, None, type)
        return tensor.shape, tensor.numel

    def init_tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        if not type.is_block():
            self.shape, self.numel = of_scalar
        elif hasattr(type, "of_tensors"):
            self.shape, self.numel = type.of_tensors
        else:
            make_tensor(self, handle, type)

    of_scalar = constexprs(core.float32)
    core.block_type.__init__ = init_block
    core.tensor.__init__ = init_tensor
