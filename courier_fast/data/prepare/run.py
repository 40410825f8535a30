"""`courier-fast prepare`: interactions, item metadata and an image folder -> the dataset folder of
dataset.py.

Nothing that grows with the number of events is held in memory: steps (steps.py, their order
plan.py) take parts of them, in threads of this process (in_threads.py) or as tasks of Ray
(on_ray.py).
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

from ...disk import bytes_under, size_text, writing
from ...engines import ENGINES
from ...locations import Location, location
from ...output import DATASET, check_remote, new_folder
from ...storage import delete_file, join
from . import plan
from .in_threads import Threads
from .items import Inputs
from .layouts import Source
from .on_ray import on_ray
from .options import PrepareOptions
from .vectors import EmbeddingFile

log = logging.getLogger(__name__)

# Bytes that a click takes at most until its page is written, and each item of that; and an item
# shown (measured on 200,000 rows).
_OF_CLICK, _OF_ITEM, _OF_SHOWN = 140, 10, 64


def prepare(
    out: Location,
    *,
    source: Source,
    images: Location | None = None,
    embeddings: EmbeddingFile | None = None,
    options: PrepareOptions | None = None,
    engine: str = "local",
    ray_address: str | None = None,
) -> dict[str, Any]:
    """Writes the dataset folder `out` (see dataset.py) and gives its report.

    A local folder appears when it is complete: until then there is `<out>.partial-...` beside it
    (in it, where it is a mounted volume), which is removed again where something fails or a signal
    ends it. In an object store dataset.json is written last, and a folder without it is none. Items
    that no event or page names are left out, and with `images` or `embeddings` those without a
    usable one, before any page is made.

    Args:
        out: a folder, local or s3:// and so on, that is not there yet or empty; with
            `options.overwrite` also a dataset. See output.py.
        source: from an importer of layouts.py, or of one's own.
        images: a folder of image files called after the items; None: a dataset without images.
        embeddings: ready ones in place of images.
        engine: "local", this process; or "ray", processes of this machine or a cluster. Both write
            the same bytes.
        ray_address: of a running cluster; None: processes of this machine.

    Raises:
        FileExistsError: `out` is there, or has come while this ran: then the message says where the
            finished dataset is.
        FileNotFoundError: a file or folder is not.
        DiskFullError: there is no room for it; the message says where.
        ValueError: `out` is something else than a dataset, an input or in one; columns or values
            that are not what they should be; nothing left to train on.
    """
    options = options or PrepareOptions()
    if options.keep_unclicked and source.impressions is None:
        raise ValueError(
            "keep_unclicked: expected a source with impressions (--page-column, --history-column, "
            f"or a --layout with them), got {source.layout} with clicks alone: its pages are "
            "made around them"
        )
    if options.validation_from and (not source.timed or source.named_splits):
        raise ValueError(
            "validation_from, test_from: expected pages with times, got a source whose "
            f"{'rows name their splits' if source.named_splits else 'order of rows decides'}"
        )
    if options.keep_own and source.histories is None:
        raise ValueError(
            "keep_own: expected a source with given histories (--history-column), got one whose "
            "histories are the events before a page"
        )
    if images is not None and embeddings is not None:
        raise ValueError("images, embeddings: expected one of them, got both")
    if source.events is None and source.impressions is None:
        raise ValueError("source: expected events or impressions, got neither")
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, got {engine!r}")
    out, images = location(out), None if images is None else location(images)
    vectors = None if embeddings is None else embeddings.open()
    inputs = Inputs(source, images, vectors)
    rule: dict[str, Any] = {
        "inputs": [images, *(() if vectors is None else vectors.files)],
        "listed": source.files,
        "overwrite": options.overwrite,
    }
    need = _Need(options, source)

    for text in source.notes:
        log.warning("%s", text)

    def write(folder: Location, scratch: Path, begin: Callable[[], None]) -> dict[str, Any]:
        def begins(rows: int) -> None:
            need.rows = 0 if engine == "ray" else rows  # Ray has its own place for them
            begin()

        if engine == "ray":
            with on_ray(ray_address) as tasks:
                return plan.write(tasks, folder, scratch, inputs, options, begins)
        cores = options.threads or len(os.sched_getaffinity(0))
        with closing(Threads(scratch, options.memory_gib, cores)) as threads:
            return plan.write(threads, folder, scratch, inputs, options, begins)

    if isinstance(out, Path):
        with new_folder(out, DATASET, **rule, need=need) as folder:
            (folder / "scratch").mkdir()
            need.folder = folder
            report = write(folder, folder / "scratch", lambda: None)
            shutil.rmtree(folder / "scratch")
        return report
    check_remote(out, DATASET, **rule)

    def begin() -> None:
        check_remote(out, DATASET, **rule)
        delete_file(join(out, "dataset.json"))

    with tempfile.TemporaryDirectory(prefix="courier-prepare-") as temporary:
        need.folder = Path(temporary)
        with writing(temporary, need):
            return write(out, Path(temporary), begin)


class _Need:
    """What the message about a full disk says of the space that is needed."""

    def __init__(self, options: PrepareOptions, source: Source) -> None:
        self.options, self.shown = options, source.impressions is not None
        self.folder, self.rows = Path(), 0

    def __call__(self) -> str:
        written = bytes_under(self.folder)
        text = f"prepare had written {size_text(written)} there"
        if not self.rows:
            return f"{text}, and reading had not ended"
        each = _OF_SHOWN if self.shown else _OF_CLICK + _OF_ITEM * self.options.page_size
        least = max(self.rows * each, written)
        return (
            f"{text} and needs about {size_text(least)} for {self.rows:,} rows, besides the images"
        )
