"""The image files of a folder, local or remote, by the ids that they are called after; and what
else lies there."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass, field

from pyarrow import fs

from ...locations import Location, is_url
from ...output import is_partial
from ...storage import filesystem, read_bytes
from ..read.ids import one
from ..read.likeness import MOST, difference

LEADS_OUT = "a symbolic link out of the folder of images, not followed"
# Of an item's files that with the first of these comes first.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif", ".jfif")
ARCHIVES = (".zip", ".tar", ".tgz", ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar")
# What systems keep beside pictures: thumbnails, copies of what was deleted. Names that begin with a
# dot are hidden, too.
_KEPT_BESIDE = {
    "__macosx",
    "@eadir",
    "@tmp",
    "@recycle",
    "#recycle",
    "#snapshot",
    "$recycle.bin",
    "recycler",
    "recycled",
    "lost+found",
    "system volume information",
    "@recently-snapshot",
    "~snapshot",
    "_gsdata_",
}
ORDER = "by suffix (.jpg, .jpeg, .png, ...), then in fewer folders, then the larger one"
Paths = str | tuple[str, ...]


@dataclass
class ImageFiles:
    """The image files of a folder by id. No symbolic link is followed out of it, and nothing hidden
    is looked at."""

    paths: dict[str, Paths] = field(
        default_factory=dict
    )  # several: in order, for the first one that is usable
    outside: dict[str, str] = field(
        default_factory=dict
    )  # ids whose only file is a link out of the folder: the link
    folders: list[str] = field(
        default_factory=list
    )  # links to folders out of it: what they hold is not looked at
    unreadable: list[str] = field(default_factory=list)  # subfolders, and why
    hidden: int = 0  # files and folders passed over
    other_images: list[str] = field(
        default_factory=list
    )  # some whose id nobody asked for, relative to the folder
    others: list[str] = field(default_factory=list)  # some that are no images
    suffixes: Counter[str] = field(default_factory=Counter)  # of both, all of them
    unread: dict[str, str] = field(
        default_factory=dict
    )  # ids by whose name there is a file with a suffix that is not read

    @property
    def several(self) -> dict[str, tuple[str, ...]]:
        """The ids with more than one file."""
        return dict(sorted((i, of) for i, of in self.paths.items() if isinstance(of, tuple)))

    def missing_note(self, missing: list[str]) -> str:
        """What lies there in place of the files of some ids."""
        total = sum(self.suffixes.values())
        if not total:
            hidden = f"{self.hidden:,} that are hidden" if self.hidden else "none"
            return (
                f"of other files there are {hidden}"
                if self.paths
                else f"of files there are {hidden}"
            )
        kinds = ", ".join(
            f"{n:,} {suffix or 'without suffix'}" for suffix, n in self.suffixes.most_common(4)
        )
        text = f"beside them there are {kinds}" if self.paths else f"there are {kinds}"
        text += f" ({', '.join(sorted(self.other_images or self.others)[:3])})"
        return "; ".join([text, *self.hints(missing)])

    def hints(self, missing: list[str]) -> list[str]:
        """Why files are not found under their ids."""
        out = []
        unread = Counter(self.unread[i] for i in missing if i in self.unread)
        for suffix, count in unread.most_common(3):
            kind = f"the suffix {suffix}, which is not read" if suffix else "no suffix"
            out.append(f"{count:,} items have a file with {kind}: make it .jpg or .png")
        archives = [n for n in self.others if n.lower().endswith(ARCHIVES)]
        if archives:
            out.append(f"{archives[0]} is an archive: unpack it")
        known = set(missing)
        names = {_id_of_name(n): n.rsplit("/", 1)[-1] for n in (*self.other_images, *self.others)}
        if found := _in_folders(known, (*self.other_images, *self.others)):
            out.append(
                f"folders are called after items ({found[1]}): each file has to be called after "
                f"its item ({found[0]}.jpg)"
            )
        if found := _inside(known, names):
            out.append(f"names have more in them than the item ({names[found[1]]} for {found[0]})")
        elif alike := difference(missing, names):
            out.append(f"do names differ {alike[0]} (item {alike[1]}, file {names[alike[2]]})?")
        return out


def _in_folders(known: set[str], names: Iterable[str]) -> tuple[str, str] | None:
    pairs = [(part, name) for name in names for part in name.split("/")[:-1] if part in known]
    return min(pairs, default=None)


def _inside(known: set[str], stems: Iterable[str]) -> tuple[str, str] | None:
    """An id that is a part of a name, at whose ends stand a letter or digit and something else."""
    pairs = []
    for stem in stems:
        cuts = [i for i in range(1, len(stem)) if not (stem[i - 1].isalnum() and stem[i].isalnum())]
        ends = [0, *cuts[:16], len(stem)]
        parts = (stem[a:b] for a in ends for b in ends if a < b and b - a < len(stem))
        pairs += [(part, stem) for part in parts if part in known]
    return min(pairs, default=None)


# ---- finding them --------------------------------------------------------------------------------


def _id_of_name(relative: str) -> str:
    return os.path.splitext(relative.rsplit("/", 1)[-1])[0]


def _id_of_folder(relative: str) -> str:
    return relative.split("/")[-2] if "/" in relative else _id_of_name(relative)


# How a file's path in the folder gives its id.
IDS: dict[str, Callable[[str], str]] = {
    "name": _id_of_name,
    "folder": _id_of_folder,
    "path": lambda relative: os.path.splitext(relative)[0],
}


def is_hidden(name: str) -> bool:
    """Whether a file or folder of this name is passed over."""
    beside = name.casefold() in _KEPT_BESIDE or is_partial(name)
    return name.startswith(".") or beside


def index_images(folder: Location, ids: Container[str], id_from: str = "name") -> ImageFiles:
    """The image files under `folder` (with its subfolders) for the ids wanted, in the form of
    ids.py. FileNotFoundError where it is none.

    Args:
        id_from: what of a file is its id: its "name" without suffix, the name of its "folder", or
            its "path" in `folder` without suffix.
    """
    files = ImageFiles()
    found: dict[str, list[tuple[str, str, int]]] = {}  # path, in the folder, bytes
    outside: dict[str, str] = {}
    listed = _remote(folder, files) if isinstance(folder, str) else _local(os.fspath(folder), files)
    for path, relative, out, size in listed:
        suffix = os.path.splitext(relative)[1].lower()
        name = one(IDS[id_from](relative))
        if suffix in SUFFIXES and name in ids:
            if out:
                outside[name] = min(path, outside.get(name, path))
            else:
                found.setdefault(name, []).append((path, relative, size))
            continue
        files.suffixes[suffix] += 1
        if suffix not in SUFFIXES and name in ids and len(files.unread) < 1_000_000:
            files.unread[name] = suffix
        sample = files.other_images if suffix in SUFFIXES else files.others
        if len(sample) < MOST:
            sample.append(relative)
    files.paths = {name: of[0][0] if len(of) == 1 else _ordered(of) for name, of in found.items()}
    files.outside = {name: path for name, path in outside.items() if name not in found}
    files.folders.sort()
    files.unreadable.sort()
    return files


def _ordered(of: list[tuple[str, str, int]]) -> tuple[str, ...]:
    def key(one: tuple[str, str, int]) -> tuple[int, int, int, str]:
        path, relative, size = one
        if size < 0:
            try:
                size = os.stat(path).st_size
            except OSError:
                size = 0
        suffix = os.path.splitext(path)[1].lower()
        return SUFFIXES.index(suffix), relative.count("/"), -size, relative

    return tuple(path for path, _, _ in sorted(of, key=key))


def _local(folder: str, files: ImageFiles) -> Iterator[tuple[str, str, bool, int]]:
    """Files: path, path in the folder, whether it is a link out of it, -1."""
    if not os.path.isdir(folder):
        raise FileNotFoundError(f"images: expected a folder, got {folder}")
    root = os.path.realpath(folder)

    def leads_out(link: str) -> bool:
        return os.path.commonpath([root, os.path.realpath(link)]) != root

    begin = len(os.path.join(folder, ""))
    folders = [folder]
    while folders:
        here = folders.pop()
        try:
            with os.scandir(here) as entries:
                for entry in entries:
                    link = entry.is_symlink()
                    if is_hidden(entry.name):
                        files.hidden += 1
                    elif entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    elif link and os.path.isdir(entry.path):
                        if leads_out(entry.path):  # else its files are found without it
                            files.folders.append(entry.path)
                    else:
                        yield entry.path, entry.path[begin:], link and leads_out(entry.path), -1
        except OSError as error:
            why = error.strerror or str(error)
            if here == folder:
                raise OSError(f"images: the folder {folder} cannot be read: {why}") from None
            files.unreadable.append(f"{here}: {why}")


def _remote(folder: str, files: ImageFiles) -> Iterator[tuple[str, str, bool, int]]:
    """As `_local`, with the files' bytes. FileNotFoundError where there is nothing."""
    system, name = filesystem(folder)
    rows = system.get_file_info(fs.FileSelector(name, recursive=True, allow_not_found=True))
    begin = len(name.rstrip("/")) + 1
    listed = sorted((r.path[begin:], r.size or 0) for r in rows if r.type == fs.FileType.File)
    if not listed:
        raise FileNotFoundError(
            f"images: expected a folder with images called after the items, got none in {folder}"
        )
    for relative, size in listed:
        if any(map(is_hidden, relative.split("/"))):
            files.hidden += 1
        else:
            yield f"{folder}/{relative}", relative, False, size


def read_any(path: str) -> bytes:
    """The bytes of an image file or URL, as `read_image`."""
    from .pictures import MAX_FILE, read_image

    if not is_url(path):
        return read_image(path)
    data = read_bytes(path, MAX_FILE + 1)
    if len(data) > MAX_FILE:
        raise ValueError(f"more than {MAX_FILE:,} bytes")
    return data
