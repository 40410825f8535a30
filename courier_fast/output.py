"""Where a command may write: looked at before any work, and once more before anything is replaced.

Nothing is ever replaced or removed but an empty folder or one that this package wrote, as its mark
says and all its files show; never what is read, or holds that; never the current folder, the home,
or what they are in. A folder is filled beside its place, under a lock, and renamed; where its place
is a mounted volume, or its parent cannot be written, within it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .disk import writing
from .files import sync, sync_all
from .interrupt import signals_held

log = logging.getLogger(__name__)

# What file managers and file systems leave in folders that people call empty.
_LITTER = re.compile(
    r"\.DS_Store|\._.*|Thumbs\.db|desktop\.ini|\.directory|lost\+found|\.nfs[0-9a-f]+|\.Trash.*"
    r"|\.snapshot|System Volume Information"
)
_LOCK = ".lock"  # of a folder that is being filled; whose holder has ended, it was killed
_PARTIAL, _OLD = ".partial-", ".old-"


@dataclass(frozen=True)
class Product:
    """A kind of folder that this package writes.

    Attributes:
        name: for messages.
        mark: a JSON file with these `keys` says that a folder is one.
        files: matches the path, with slashes, of every file of it.
    """

    name: str
    mark: str
    keys: tuple[str, ...]
    files: re.Pattern[str]

    def marked(self, folder: Path) -> bool:
        """Whether the mark is there and says so."""
        try:
            about = json.loads((folder / self.mark).read_text("utf-8"))
        except (OSError, ValueError):
            return False
        return isinstance(about, dict) and all(key in about for key in self.keys)

    def foreign(self, folder: Path) -> str | None:
        """The path of something in a folder that is none of its files; None where there is none."""
        for where, folders, files in os.walk(folder):
            inner = Path(where).relative_to(folder)
            if where == os.fspath(folder):
                folders[:] = [f for f in folders if not f.startswith(_PARTIAL)]
            for name in (*files, *(f for f in folders if (Path(where) / f).is_symlink())):
                path = (inner / name).as_posix()
                if not self.files.fullmatch(path) and not _LITTER.fullmatch(name):
                    return path
        return None


_TABLES = "users|items|events|pages|page_items|images|embeddings"
DATASET = Product(
    "a dataset",
    "dataset.json",
    ("format", "splits"),
    re.compile(rf"(dataset|manifest|report)\.json|({_TABLES})/\d{{5,}}\.arrow"),
)
EXPORT = Product(
    "an earlier export",
    "contract.json",
    ("schema", "space"),
    re.compile(
        r"contract\.json|MODEL_CARD\.md|encoder\.(json|safetensors|pt2|onnx|float16\.onnx|int8\.onnx)|golden/[^/]+"
    ),
)
INDEX = Product(
    "an earlier index",
    "index.json",
    ("format", "kind"),
    re.compile(r"index\.(json|faiss)|vectors\.npy|ids\.arrow"),
)
CLUSTERS = Product(
    "earlier clusters",
    "clusters.json",
    ("format", "clusters"),
    re.compile(r"clusters\.(json|parquet)|centroids_\d+\.npy"),
)
CODES = Product(
    "earlier codes",
    "codes.json",
    ("format", "codes"),
    re.compile(r"codes\.(json|parquet)|codebooks\.npy"),
)


# ---- the rule ------------------------------------------------------------------------------------


def check_output(
    path: Path,
    product: Product,
    *,
    inputs: Iterable[object] = (),
    listed: Iterable[object] = (),
    overwrite: bool = False,
) -> Path:
    """The folder, without links, that a command may write.

    Args:
        path: as it was given.
        inputs: what is read: files and folders, some of them URLs or None.
        listed: folders among them of which every file is read; nothing is written into them.
        overwrite: a folder of this kind may be replaced.

    Raises:
        FileExistsError: a folder of this kind is there, without `overwrite`.
        ValueError: it is something else, or an input, or it may not be replaced for another reason.
        OSError: it cannot be written.
    """
    expected = f"out: expected a new folder or {product.name}, got {path}"
    out = _real(path, expected)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{expected}, which is {what_is_at(out)}")
    _check_inputs(path, out, inputs, listed)
    _check_own(path, out)
    if out.is_dir():
        _check_content(path, out, product, overwrite)
    _check_writable(path, out)
    return out


def _real(path: Path, expected: str) -> Path:
    for part in (path, *path.parents):  # a volume that is not mounted would be made on another disk
        if part.is_symlink() and not part.exists():
            where = "a link" if part == path else f"in {part}, a link"
            raise ValueError(f"{expected}, {where} to {os.readlink(part)}, which is not there")
    return Path(os.path.realpath(path))


def what_is_at(path: Path) -> str:
    """What is at a path, in words."""
    mode = path.stat().st_mode
    for test, text in {
        stat.S_ISREG: "a file",
        stat.S_ISDIR: "a folder",
        stat.S_ISFIFO: "a pipe",
        stat.S_ISSOCK: "a socket",
    }.items():
        if test(mode):
            return text
    return "a device"


def _same(a: Path, b: Path) -> bool:
    """Also by another name: a mount, a hard link, letters of another case."""
    if a == b:
        return True
    try:
        return os.path.samefile(a, b)
    except OSError:
        return False


def within(inner: Path, outer: Path) -> bool:
    """Whether a path is another one or in it."""
    return any(_same(p, outer) for p in (inner, *inner.parents))


def _local_paths(paths: Iterable[object]) -> Iterator[Path]:
    for path in paths:
        if path is not None and not (isinstance(path, str) and "://" in path):
            yield Path(os.path.realpath(str(path)))


def _check_inputs(
    path: Path, out: Path, inputs: Iterable[object], listed: Iterable[object]
) -> None:
    read_whole = [*_local_paths(listed)]
    for source in (*_local_paths(inputs), *read_whole):
        if within(source, out):
            what = "is" if _same(source, out) else "holds"
            raise ValueError(
                f"out: expected a folder that is not read, got {path}, "
                f"which {what} the input {source}"
            )
    for source in read_whole:
        if source.is_dir() and within(out, source):
            raise ValueError(
                f"out: expected a folder outside of {source}, "
                f"all of whose files are read, got {path}"
            )


def _check_own(path: Path, out: Path) -> None:
    own = {"the current folder": os.getcwd, "the home folder": lambda: os.path.expanduser("~")}
    for name, where in own.items():
        try:
            there = Path(os.path.realpath(where()))
        except OSError:  # it was removed
            continue
        if within(there, out):
            what = "is" if _same(there, out) else "holds"
            raise ValueError(f"out: expected a folder of its own, got {path}, which {what} {name}")


def _entries(out: Path) -> list[str]:
    """What is in a folder, without litter and what runs that were killed have left there."""
    names = (entry.name for entry in os.scandir(out))
    return sorted(n for n in names if not _LITTER.fullmatch(n) and not n.startswith(_PARTIAL))


def is_partial(name: str) -> bool:
    """Whether a folder of this name is one that a run fills, or has left."""
    return re.search(rf"{re.escape(_PARTIAL)}[0-9a-f]{{8}}$", name) is not None


def is_empty(folder: Path) -> bool:
    """Whether there is nothing in a folder but what file managers and file systems leave there."""
    return not _entries(folder)


def _check_content(path: Path, out: Path, product: Product, overwrite: bool) -> None:
    names = _entries(out)
    aside = next((n for n in names if n.startswith(_OLD)), None)
    if aside is not None:
        raise ValueError(
            f"out: a run that was killed has left {out} half replaced; {product.name} that was "
            f"there is whole in {out / aside}: move it to another place"
        )
    if not names or _unfinished(out, product):
        return
    expected = f"out: expected a new folder or {product.name}, got {path}"
    if not product.marked(out):
        raise ValueError(
            f"{expected}, which is not empty ({names[0]}) and has no {product.mark} that says so; "
            "nothing in it is touched"
        )
    if not overwrite:
        raise FileExistsError(f"{path} is there already; --overwrite replaces it")
    foreign = product.foreign(out)
    if foreign is not None:
        raise ValueError(
            f"{expected}, which holds something else, too: {foreign}; move that to another place"
        )


def _unfinished(out: Path, product: Product) -> bool:
    """Whether a run that was filling it was killed in the middle: its lock lies there, and its
    files alone."""
    locks = [*out.glob(f"{_PARTIAL}*/{_LOCK}")]
    if not locks or product.marked(out):
        return False
    return all(
        product.files.fullmatch(f.relative_to(out).as_posix()) or _LITTER.fullmatch(f.name)
        for name in _entries(out)
        for f in ((out / name).rglob("*") if (out / name).is_dir() else [out / name])
        if not f.is_dir()
    )


def _check_writable(path: Path, out: Path) -> None:
    there = next(p for p in (out, *out.parents) if os.path.lexists(p))
    if not there.is_dir():
        raise NotADirectoryError(f"out: {path} cannot be made, since {there} is no folder")
    if out.is_dir() and not _in_place(out):
        there = out.parent
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(f"out: {path} cannot be written, no permission to write in {there}")


def check_remote(
    url: str,
    product: Product,
    *,
    inputs: Iterable[object] = (),
    listed: Iterable[object] = (),
    overwrite: bool = False,
) -> None:
    """The same rule in an object store, where nothing is renamed: what is there stays until files
    of the same names take its place."""
    from .locations import is_url
    from .storage import is_file, join, list_files, read_bytes

    read_whole = [str(x) for x in listed]
    for source in (*(str(x) for x in inputs if x is not None), *read_whole):
        if is_url(source) and f"{source.rstrip('/')}/".startswith(f"{url}/"):
            raise ValueError(
                f"out: expected a folder that is not read, got {url}, "
                f"which is or holds the input {source}"
            )
    for source in read_whole:
        if is_url(source) and f"{url}/".startswith(f"{source.rstrip('/')}/"):
            raise ValueError(
                f"out: expected a folder outside of {source}, "
                f"all of whose files are read, got {url}"
            )
    if is_file(url):
        raise ValueError(
            f"out: expected a new folder or {product.name}, got {url}, which is a file"
        )
    names = [str(f)[len(url) + 1 :] for f in list_files(url, everything=True)]
    mark = join(url, product.mark)
    foreign = next(
        (
            n
            for n in names
            if not product.files.fullmatch(n) and not _LITTER.fullmatch(n.rsplit("/", 1)[-1])
        ),
        None,
    )
    if product.mark in names:
        if not overwrite:
            raise FileExistsError(f"{url} is there already; --overwrite replaces it")
        try:
            about = json.loads(read_bytes(mark))
        except ValueError:
            about = None
        if not (isinstance(about, dict) and all(key in about for key in product.keys)):
            foreign = product.mark
    elif names and foreign is None and not any(n.endswith(".arrow") for n in names):
        foreign = names[0]  # a run that was killed has left shards
    if foreign is not None:
        raise ValueError(
            f"out: expected a new folder or {product.name}, got {url}, which holds something else: "
            f"{foreign}; nothing in it is touched"
        )


# ---- a folder that appears when it is complete ---------------------------------------------------


def _in_place(out: Path) -> bool:
    """Whether a folder that is there can only be filled, not renamed: a mounted volume, or in a
    parent that cannot be written."""
    return out.is_dir() and (_is_mount(out) or not os.access(out.parent, os.W_OK | os.X_OK))


def _is_mount(path: Path) -> bool:
    if os.path.ismount(path):
        return True
    try:  # a part of the same file system that is mounted once more
        lines = Path("/proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    places = (line.split(" ")[4] for line in lines)
    octal = re.compile(r"\\([0-7]{3})")
    return os.fspath(path) in {octal.sub(lambda m: chr(int(m[1], 8)), p) for p in places}


@contextmanager
def new_folder(
    path: Path,
    product: Product,
    *,
    inputs: Iterable[object] = (),
    listed: Iterable[object] = (),
    overwrite: bool = False,
    need: Callable[[], str] | None = None,
) -> Iterator[Path]:
    """An empty folder to fill, which is `path` when the block has ended, complete; gone, if it ends
    with an error. See `check_output`.

    Something that has come to `path` meanwhile stays as it is: then the finished folder is
    `<path>.finished` (`<path>/finished` in a mounted volume), and FileExistsError says so.
    """
    read = {"inputs": [*inputs], "listed": [*listed]}
    check = partial(check_output, path, product, overwrite=overwrite, **read)
    out = check()
    inside = _in_place(out)
    _clear_leftovers(out, inside)
    out.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    filled = out / f"{_PARTIAL}{token}" if inside else out.with_name(f"{out.name}{_PARTIAL}{token}")
    with writing(out, need):
        filled.mkdir()
    try:
        lock = _lock(filled)
        with writing(out, need):
            yield filled
            sync_all(filled)
        with signals_held():
            put = _fill if inside else _rename
            put(filled, out, product, check)
    except BaseException:
        shutil.rmtree(filled, ignore_errors=True)
        raise
    if lock is not None:
        os.close(lock)


def _lock(folder: Path) -> int | None:
    """Holds the folder's lock until this process ends or closes it; None if there are no locks."""
    descriptor = os.open(folder / _LOCK, os.O_CREAT | os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        (folder / _LOCK).unlink()
        return None
    return descriptor


def _ended(folder: Path) -> bool:
    """Whether the run that filled a folder has surely ended."""
    try:
        descriptor = os.open(folder / _LOCK, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True


def _clear_leftovers(out: Path, inside: bool) -> None:
    """Removes what killed runs left of this output, where it is surely theirs; names the rest."""
    where, name = (out, "") if inside else (out.parent, out.name)
    for entry in where.iterdir() if where.is_dir() else ():
        if not entry.name.startswith((f"{name}{_PARTIAL}", f"{name}{_OLD}")) or not entry.is_dir():
            continue
        if entry.name.startswith(f"{name}{_PARTIAL}") and not entry.is_symlink() and _ended(entry):
            shutil.rmtree(entry, ignore_errors=True)
            log.info("%s is removed, which a run that was killed has left", entry)
        else:
            log.warning(
                "%s is there, of a run that goes on or was killed; if none goes on, "
                "it can be removed",
                entry,
            )


def _rename(filled: Path, out: Path, product: Product, check: Callable[[], Path]) -> None:
    """Makes `filled` be `out`; a rename takes the place of nothing but an empty folder."""
    (filled / _LOCK).unlink(missing_ok=True)
    old: Path | None = None
    try:
        try:
            os.rename(filled, out)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            if check() != out:
                raise
            old = _aside(out, product)
            try:
                os.rename(filled, out)
            except BaseException:
                os.rename(old, out)
                raise
    except (OSError, ValueError) as error:
        raise _kept(filled, out, out.with_name(f"{out.name}.finished"), error) from None
    sync(out.parent)
    if old is not None:
        discard(old, product)


def _aside(out: Path, product: Product) -> Path:
    """Renames what is to be replaced, and looks at it where nobody else does."""
    old = out.with_name(f"{out.name}{_OLD}{secrets.token_hex(4)}")
    os.rename(out, old)
    if not is_empty(old) and (not product.marked(old) or product.foreign(old) is not None):
        os.rename(old, out)
        raise FileExistsError(f"{out} has changed")
    return old


def _kept(filled: Path, out: Path, name: Path, error: Exception) -> Exception:
    """Puts what is finished safely at `name`, or that with a number; the error that says so."""
    (filled / _LOCK).unlink(missing_ok=True)
    names = (f"{name.name}{n}" for n in ("", *(f"-{i}" for i in range(2, 1000))))
    finished = next(p for p in map(name.with_name, names) if not os.path.lexists(p))
    os.rename(filled, finished)
    return FileExistsError(
        f"{out} has come or changed while this ran, and is left as it is ({error}); what was made "
        f"is complete, in {finished}: "
        "rename that when there is room for it"
    )


def _fill(filled: Path, out: Path, product: Product, check: Callable[[], Path]) -> None:
    """Moves the entries of `filled`, which is in `out`, into it, the mark last; what is there goes
    aside and, if that fails, comes back."""
    try:
        check()
    except (OSError, ValueError) as error:
        raise _kept(filled, out, out / "finished", error) from None
    old = out / f"{_OLD}{secrets.token_hex(4)}"
    before = sorted(_entries(out), key=lambda name: name != product.mark)  # first: then it is none
    after = sorted(
        (p.name for p in filled.iterdir() if p.name != _LOCK), key=lambda name: name == product.mark
    )
    moved: list[tuple[Path, Path]] = []

    def move(source: Path, target: Path) -> None:
        os.rename(source, target)
        moved.append((source, target))

    if before:
        old.mkdir()
    try:
        for name in before:
            move(out / name, old / name)
        for name in after:
            move(filled / name, out / name)
    except Exception as error:
        for source, target in reversed(moved):
            with suppress(OSError):
                os.rename(target, source)
        with suppress(OSError):
            old.rmdir()
        raise _kept(filled, out, out / "finished", error) from None
    sync(out)
    shutil.rmtree(filled, ignore_errors=True)
    if before:
        discard(old, product)


def discard(old: Path, product: Product) -> None:
    """Removes the files of a product, and folders that are empty then: nothing that has come to it
    meanwhile."""
    for where, _, files in os.walk(old, topdown=False):
        for name in files:
            path = Path(where) / name
            inner = path.relative_to(old).as_posix()
            if product.files.fullmatch(inner) or _LITTER.fullmatch(name):
                path.unlink(missing_ok=True)
        with suppress(OSError):  # not empty, or a mounted volume
            os.rmdir(where)
    if old.exists() and not is_empty(old):
        log.warning("%s is left: it holds something else than %s", old, product.name)


def write_folder(
    path: Path, product: Product, write: Callable[[Path], object], *, inputs: Iterable[object] = ()
) -> None:
    """`write` fills a folder, which then is `path`, complete, in place of an empty folder or an
    earlier one of this kind."""
    with new_folder(path, product, inputs=inputs, overwrite=True) as folder:
        write(folder)


# ---- folders that grow, and files ----------------------------------------------------------------


def check_growing(
    path: Path,
    names: Iterable[str],
    proof: Callable[[Path], bool],
    *,
    what: str,
    inputs: Iterable[object] = (),
) -> Path:
    """The folder that a command adds to, without links: no input, and nothing is written over that
    another has written.

    Args:
        names: of what the command writes into it.
        proof: whether a folder is one that the command has written.
        what: for messages: the option, and the kind ("run.out: expected a new folder or a run's").

    Raises ValueError or OSError.
    """
    expected = f"{what}, got {path}"
    out = _real(path, expected)
    if out.exists() and not out.is_dir():
        raise ValueError(f"{expected}, which is {what_is_at(out)}")
    for source in _local_paths(inputs):
        if _same(source, out) or (
            source.is_file() and source.parent == out and source.name in [*names]
        ):
            raise ValueError(
                f"{expected}, which "
                f"{'is' if _same(source, out) else 'would be written over'} the input {source}"
            )
    if out.is_dir() and not proof(out):
        there = next((name for name in names if os.path.lexists(out / name)), None)
        if there is not None:
            raise ValueError(
                f"{expected}, which is none and has a {there} that would be written over"
            )
    nearest = next(p for p in (out, *out.parents) if os.path.lexists(p))
    if not nearest.is_dir():
        raise NotADirectoryError(f"{expected}, which cannot be made, since {nearest} is no folder")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise PermissionError(
            f"{expected}, where nothing can be written: no permission in {nearest}"
        )
    return out


def check_file(path: Path, name: str, *, inputs: Iterable[object] = (), begins: str = "") -> Path:
    """The file, without links, that a command may write or write anew: no folder, no input, and
    where one is there it begins with one of the characters `begins`, as this command's does.
    ValueError or OSError."""
    expected = f"{name}: expected a new file or an earlier one, got {path}"
    out = _real(path, expected)
    if out.is_dir():
        raise ValueError(f"{expected}, which is a folder")
    for source in _local_paths(inputs):
        if _same(source, out):
            raise ValueError(f"{expected}, which is an input")
    if begins and out.is_file():
        with out.open("rb") as file:
            start = file.read(1 << 10).decode("utf-8", "replace").lstrip("\ufeff \r\n\t")
        if start and start[0] not in begins:
            raise ValueError(f"{expected}, which holds something else")
    nearest = next(p for p in (out.parent, *out.parent.parents) if os.path.lexists(p))
    if not nearest.is_dir():
        raise NotADirectoryError(f"{expected}, which cannot be made, since {nearest} is no folder")
    where = nearest if not out.exists() or out.is_file() else out  # a device or pipe is written to
    if not os.access(where, os.W_OK):
        raise PermissionError(f"{expected}, where nothing can be written: no permission in {where}")
    return out
