"""`courier-fast embed`: a trained encoder over a dataset or a folder of images, into one file of
embeddings."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import nn

from ..data.embeddings import NO_EMBEDDING
from ..disk import size_text, writing
from ..files import sync, write_atomically
from ..locations import local_path
from ..output import check_file
from .encode import encode
from .sources import RowSource, digest_of

log = logging.getLogger(__name__)
Array = npt.NDArray

NUMBERS = ("float32", "float16", "int8")
ROWS = 1 << 16  # at once


# ---- to a file -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class EmbedReport:
    """What `embed_source` wrote; also in the JSON beside the output (with `item_ids` for .npy)."""

    path: Path
    rows: int
    dim: int
    missing: list[str]  # ids without an image, or with a link that is not followed
    damaged: list[str]  # ids whose image cannot be decoded
    resumed: int  # rows that an earlier, interrupted run had done
    seconds: float


def embed_source(
    encoder: nn.Module,
    source: RowSource,
    out: str | os.PathLike[str],
    *,
    batch: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    save_seconds: float = 5.0,
    bar: bool = False,
    space: str | None = None,
    numbers: str = "float32",
    encode: Callable[..., Iterator[tuple[Array, Array, Array]]] = encode,
) -> EmbedReport:
    """Writes embeddings of every row of `source` to `out`, and a JSON file of the same name with
    ".json" added.

    `out` is .npy ([rows, D] float32 in the source's order) or .parquet (item_id string, embedding
    fixed_size_list<float32>[D]). Items without an image or with a damaged one have NaN there; as
    int8 -128 (.npy) or null (.parquet), which no embedding has. Until it is complete
    the rows lie in `out`.partial; a run that was killed goes on from there, on a CPU to the same
    bits. If the encoder, the inputs or a setting is another, it says so and starts
    over.

    Args:
        encoder: a module with `dim`; with images also `size`, `mean` and `std`.
        batch: images encoded at once.
        dtype: autocast to it; None: as the encoder is.
        save_seconds: how often progress is saved.
        bar: shows progress in the terminal.
        space: identity of the encoder, for the JSON file.
        numbers: float32, float16 or int8: as what they are stored; int8 times "scale" in the JSON
            file is the embedding.
        encode: another way to the same batches (on_ray.py).

    Raises:
        ValueError: `out` is neither .npy nor .parquet, or batch is below 1.
        RuntimeError: the encoder gives NaN for a good image.
    """
    out, began = local_path(out), time.monotonic()
    if out.suffix not in (".npy", ".parquet"):
        raise ValueError(f"out: expected a .npy or .parquet file, got {out}")
    if numbers not in NUMBERS:
        raise ValueError(f"numbers: expected one of {', '.join(NUMBERS)}, got {numbers!r}")
    if batch < 1:
        raise ValueError(f"batch: expected at least 1, got {batch}")
    check_embeddings_out(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    size, dim = len(source.ids), int(encoder.dim)  # type: ignore[arg-type]
    about = {
        "encoder": _encoder_fingerprint(encoder),
        "input": source.fingerprint(),
        "settings": {
            "rows": size,
            "dim": dim,
            "batch": batch,
            "device": torch.device(device).type,
            "dtype": str(dtype),
            "decoder": type(getattr(source, "decoder", None)).__name__,
            "torch": torch.__version__,
        },
    }
    work = _Partial(out, about, source, dim)
    encoder.to(device)
    rows, resumed = np.flatnonzero(source.present), work.done
    columns = (*Progress.get_default_columns()[:3], MofNCompleteColumn(), TimeRemainingColumn())
    display = Progress(*columns, disable=not bar)
    task = display.add_task("images", total=len(rows), completed=resumed)
    display.start()
    try:
        for part, found, bad in encode(
            encoder, source, rows[resumed:], batch=batch, device=device, dtype=dtype
        ):
            work.add(part, found, bad)
            display.update(task, completed=work.done)
            if time.monotonic() - work.saved >= save_seconds:
                work.save()
    finally:
        display.stop()
        work.save()
    names = source.ids
    report = EmbedReport(
        out,
        size,
        dim,
        [str(names[i]) for i in np.flatnonzero(~source.present).tolist()],
        [str(names[i]) for i in sorted(work.damaged)],
        resumed,
        time.monotonic() - began,
    )
    beside = {"rows": size, "dim": dim, "missing": report.missing, "damaged": report.damaged}
    beside |= {"space": space, "trained_until": getattr(encoder, "about", {}).get("trained_until")}
    scale = scale_of(work.table) if numbers == "int8" else None
    beside |= {"dtype": numbers} | ({} if scale is None else {"scale": scale})
    beside["not_followed"] = getattr(source, "not_followed", [])
    if out.suffix == ".npy":
        beside["item_ids"] = [str(name) for name in names]
    write_atomically(
        out.with_name(f"{out.name}.json"),
        lambda path: path.write_text(json.dumps(beside, indent=1, ensure_ascii=False), "utf-8"),
    )
    work.finish(out, names, Numbers(numbers, scale))
    return report


@dataclass(frozen=True)
class Numbers:
    """As what embeddings are stored."""

    kind: str  # of NUMBERS
    scale: float | None = None  # of int8

    def of(self, rows: Array) -> Array:
        if self.kind != "int8":
            return rows.astype(self.kind, copy=False)
        have = np.isfinite(rows).all(1, keepdims=True)
        steps = np.clip(np.rint(np.where(have, rows, 0) / self.scale), -127, 127)
        return np.where(have, steps, NO_EMBEDDING).astype(np.int8)


def scale_of(table: Array) -> float:
    """What the largest number of [rows, D] is 127 times of; 1 where there is none but 0."""
    most = 0.0
    for start in range(0, len(table), ROWS):
        rows = np.abs(table[start : start + ROWS])
        most = max(most, float(rows[np.isfinite(rows)].max(initial=0)))
    return most / 127 if most else 1.0


def check_embeddings_out(out: Path, inputs: Iterable[object] = ()) -> None:
    """ValueError or OSError where embeddings cannot be written to a file, or something else than
    earlier ones would be written over."""
    check_file(out, "out", inputs=inputs)
    beside = out.with_name(f"{out.name}.json")
    for left in (beside, *(out.with_name(f"{out.name}.{e}") for e in ("partial", "progress"))):
        check_file(left, "out", inputs=inputs)
    if out.is_file() and not beside.is_file():
        raise ValueError(
            f"out: expected a new file or earlier embeddings, got {out}, which has no "
            f"{beside.name} beside it: `embed` has not written it"
        )


class _Partial:
    """Embeddings of an unfinished `out`, and which are there: of an earlier run, or none."""

    def __init__(self, out: Path, about: dict[str, Any], source: RowSource, dim: int) -> None:
        self.path, self.progress = (
            out.with_name(f"{out.name}.{e}") for e in ("partial", "progress")
        )
        self.about = about
        self.done, self.damaged = _resume(self.path, self.progress, about)
        self.table: np.memmap
        if self.done:
            self.table = np.lib.format.open_memmap(self.path, "r+")
        else:
            self.progress.unlink(
                missing_ok=True
            )  # first: it must never speak of another partial file
            self.table = _allocate(self.path, len(source.ids), dim)
            self.table[~source.present] = np.nan
        self.saved = time.monotonic()

    def add(self, rows: Array, found: Array, damaged: Array) -> None:
        self.table[rows] = found
        self.damaged.update(rows[damaged].tolist())
        self.done += len(rows)

    def save(self) -> None:
        self.table.flush()
        state = {"about": self.about, "done": self.done, "damaged": sorted(self.damaged)}
        write_atomically(self.progress, lambda path: path.write_text(json.dumps(state)))
        self.saved = time.monotonic()

    def finish(self, out: Path, ids: Sequence[Any], numbers: Numbers) -> None:
        """Makes it `out`."""
        if out.suffix == ".parquet":
            write_atomically(out, lambda path: _write_parquet(path, ids, self.table, numbers))
            self.path.unlink(missing_ok=True)
        elif numbers.kind != "float32":
            write_atomically(out, lambda path: _write_npy(path, self.table, numbers))
            self.path.unlink(missing_ok=True)
        else:
            sync(self.path)
            os.replace(self.path, out)
            sync(out.parent)
        self.progress.unlink(missing_ok=True)


def _encoder_fingerprint(encoder: nn.Module) -> str:
    state = {name: value.detach().cpu() for name, value in encoder.state_dict().items()}
    about = [
        type(encoder).__name__,
        *(getattr(encoder, n, None) for n in ("about", "size", "mean", "std")),
    ]
    about += [[name, str(value.dtype)] for name, value in state.items()]
    # Bytes, since NumPy has no bfloat16.
    return digest_of(
        about, *(v.contiguous().reshape(-1).view(torch.uint8).numpy() for v in state.values())
    )


def _resume(partial: Path, progress: Path, about: dict[str, Any]) -> tuple[int, set[int]]:
    """Rows done by an earlier run with the same encoder, inputs and settings, and those of them
    that are damaged."""
    if not (partial.is_file() and progress.is_file()):
        return 0, set()
    try:
        state = json.loads(progress.read_text())
        changed = [name for name in about if state["about"].get(name) != about[name]]
        done, damaged = int(state["done"]), set(state["damaged"])
    except (ValueError, KeyError, AttributeError):
        changed, done, damaged = ["progress file"], 0, set()
    if changed:
        log.warning(
            "%s was begun with another %s: starting over",
            partial.name,
            " and another ".join(changed),
        )
        return 0, set()
    if done:
        log.info("%s: %d rows are done, going on from there", partial.name, done)
    return done, damaged


def _allocate(path: Path, rows: int, dim: int) -> np.memmap:
    path.unlink(missing_ok=True)
    try:
        with writing(path, lambda: f"it needs {size_text(4 * rows * dim)}"):
            table = np.lib.format.open_memmap(path, "w+", np.float32, (rows, dim))
            # A full disk is an error now, and not a crash at some later write into the map.
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, max(1, path.stat().st_size))
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return table


def _write_npy(path: Path, table: Array, numbers: Numbers) -> None:
    with path.open("wb") as file:
        about = {"descr": np.dtype(numbers.kind).str, "fortran_order": False, "shape": table.shape}
        np.lib.format.write_array_header_1_0(file, about)
        for start in range(0, len(table), ROWS):
            file.write(numbers.of(table[start : start + ROWS]).tobytes())


def _write_parquet(path: Path, ids: Sequence[Any], table: Array, numbers: Numbers) -> None:
    import pyarrow.parquet as pq

    dim, kind = table.shape[1], pa.from_numpy_dtype(np.dtype(numbers.kind))
    schema = pa.schema([("item_id", pa.string()), ("embedding", pa.list_(kind, dim))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(table), ROWS):
            some = np.asarray(table[start : start + ROWS])
            absent = None
            if numbers.kind == "int8":
                absent = pa.array(~np.isfinite(some).all(1))
            columns = [
                pa.array([str(i) for i in ids[start : start + ROWS]], pa.string()),
                pa.FixedSizeListArray.from_arrays(
                    pa.array(numbers.of(some).reshape(-1)), dim, mask=absent
                ),
            ]
            writer.write_table(pa.table(columns, schema=schema))
