"""An exception as the line that a command prints about it, whoever raised it."""

from __future__ import annotations

import errno

from .disk import DiskFullError, full_error, is_full

_MOST, _LINES = 1500, 12  # characters and lines of a message
# What only a bug of the package itself raises: where input is wrong, the message names it.
_BUGS = (
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    ArithmeticError,
    RecursionError,
    StopIteration,
    UnboundLocalError,
)


def line_of(error: BaseException, command: str = "") -> str:
    """What to print: one line, or those of a message of the package's own; of a library's exception
    its first line, and whose it is."""
    while isinstance(getattr(error, "exceptions", None), tuple) and error.exceptions:  # type: ignore[attr-defined]
        error = error.exceptions[0]  # type: ignore[attr-defined] # a group
    debug = f"courier-fast --debug {command}".strip()
    library = _library(error)
    if isinstance(error, MemoryError) or _says_memory(error):
        return (
            f"the memory is not enough: {_first(error)}; smaller batches or fewer threads need less"
        )
    if is_full(error) and not isinstance(error, DiskFullError):
        place = getattr(error, "filename", None)
        return str(full_error(place, error)) if place else f"a disk is full: {_first(error)}"
    if library:
        return (
            f"{_first(error, library)} ({library}: {type(error).__name__}; {debug} ... shows where)"
        )
    if is_bug(error):
        return (
            f"an error of its own, {type(error).__name__}: {_first(error)}; "
            f"please report it with what {debug} ... shows"
        )
    if isinstance(error, OSError) and error.errno and error.strerror:
        name = error.filename if error.filename is not None else ""
        return f"{name}: {error.strerror}" if name != "" else error.strerror
    return _shortened("\n".join(str(error).splitlines()[:_LINES])) or type(error).__name__


def is_bug(error: BaseException) -> bool:
    """Whether it is the package that is wrong, not what it was given."""
    expected = (ValueError, TypeError, OSError, MemoryError, ModuleNotFoundError)
    if _library(error) or isinstance(error, expected):
        return False
    return isinstance(error, _BUGS) or not isinstance(error, (RuntimeError, ImportError))


def _library(error: BaseException) -> str:
    """Whose class it is; "" for Python's and the package's own, which zipfile's, json's and the
    like are not."""
    root = type(error).__module__.split(".")[0]
    return "" if root in ("builtins", "courier_fast", "socket", "subprocess", "__main__") else root


def _says_memory(error: BaseException) -> bool:
    text = str(error)[:2000]
    words = ("out of memory", "DefaultCPUAllocator", "can't allocate memory", "std::bad_alloc")
    found = any(word in text for word in words) or type(error).__name__ == "OutOfMemoryException"
    return (found and not is_full(error)) or (
        isinstance(error, OSError) and error.errno == errno.ENOMEM
    )


def _first(error: BaseException, library: str = "") -> str:
    """The line that says what is wrong: the last one of Ray's, which are a task's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return _shortened(lines[-1 if library == "ray" else 0]) if lines else type(error).__name__


def _shortened(text: str) -> str:
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    return text if len(text) <= _MOST else f"{text[:_MOST]} ..."
