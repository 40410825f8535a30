"""`courier-fast embed`: a trained encoder over a dataset or a folder of images, into one file of
embeddings."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn
from torch import Tensor, nn

from ..cluster import add_engine_arguments, connected
from ..data.dataset import Dataset
from ..data.decode import KINDS, Decoder, make_decoder
from ..data.pictures import seen_size
from ..data.storage import is_url, location, read_any, size_and_time
from ..data.transforms import eval_windows
from ..disk import size_text, writing
from ..files import sync, write_atomically
from ..locations import local_path
from ..output import check_file

log = logging.getLogger(__name__)

Array = npt.NDArray


class Source(Protocol):
    """The inputs of an encoder, by row.

    `load(rows)` gives inputs [n, ...] and damaged [n] bool, whose inputs mean nothing; `digest` is
    that of a row's bytes; `fingerprint` changes when the inputs may have.
    """

    ids: Sequence[Any]  # [rows] text
    present: Array  # [rows] bool

    def load(self, rows: Array) -> tuple[Tensor, Array]: ...

    def digest(self, row: int) -> str: ...

    def fingerprint(self) -> str: ...


class DatasetImages:
    """The images of a dataset's items, centre crops."""

    def __init__(self, dataset: Dataset, decoder: Decoder) -> None:
        self.ids, self.store, self.decoder = dataset.item_ids, dataset.images, decoder
        self.present = self.store.present

    def load(self, rows: Array) -> tuple[Tensor, Array]:
        windows = eval_windows(self.store.shapes[rows])
        return self.decoder.decode(
            self.store.take(rows.tolist()), windows, np.zeros(len(rows), bool)
        )

    def digest(self, row: int) -> str:
        return hashlib.sha256(self.store[row].tobytes()).hexdigest()

    def fingerprint(self) -> str:
        return _hash([self.ids.to_pylist(), *self.store.fingerprint()], self.store.shapes)


class FolderImages:
    """The image files of a folder (local or remote) and its subfolders, centre crops; by id,
    sorted.

    Symbolic links out of the folder are not followed: they are named, and their ids have no image.
    Of several files for one id the first usable one is taken; files of one name in different
    folders are an error, as their ids would be the same.

    Args:
        id_from: what of a file is its id: its "name" without suffix, the name of its "folder", or
            its "path" in the folder without suffix.
    """

    def __init__(
        self, folder: str | os.PathLike[str], decoder: Decoder, id_from: str = "name"
    ) -> None:
        from ..data.image_files import LEADS_OUT, ORDER, index_images

        files = index_images(location(folder), _Everything(), id_from)
        if several := files.several:
            name, paths = next(iter(several.items()))
            if id_from == "name" and len({os.path.dirname(path) for path in paths}) > 1:
                raise ValueError(
                    f"images: expected one folder for files of the same name, got {len(paths):,} "
                    f"called {name} ({paths[0]}, {paths[1]}): "
                    "with --id-from folder their folders' names are the ids, "
                    "with --id-from path both together"
                )
            log.warning(
                "images: %d ids have several files (first: %s before %s); one is taken %s",
                len(several),
                *paths[:2],
                ORDER,
            )
        for text in files.unreadable:
            log.warning("images: a folder cannot be read: %s", text)
        self.not_followed = sorted([*files.outside.values(), *files.folders])
        for link in self.not_followed[:5]:
            log.warning("%s: %s", link, LEADS_OUT)
        if len(self.not_followed) > 5:
            log.warning("and %d more such links", len(self.not_followed) - 5)
        if not files.paths:
            raise ValueError(
                f"images: expected a folder with images, got none in {folder}; "
                f"{files.missing_note([])}"
            )
        self.ids: Sequence[Any] = sorted(files.paths | files.outside)
        self.paths: list[Any] = [files.paths.get(i, "") for i in self.ids]
        self.decoder = decoder
        self.present = np.array([path != "" for path in self.paths])

    def load(self, rows: Array) -> tuple[Tensor, Array]:
        images = [_read(self.paths[row]) for row in rows.tolist()]
        windows = eval_windows(np.array([seen_size(image) for image in images]))
        return self.decoder.decode(images, windows, np.zeros(len(rows), bool))

    def digest(self, row: int) -> str:
        return hashlib.sha256(_read(self.paths[row]).tobytes()).hexdigest()

    def fingerprint(self) -> str:
        return _hash([list(self.ids), self.paths, [_size_and_time(path) for path in self.paths]])


class FeatureRows:
    """Precomputed features [rows, F]; a row that is not finite is missing."""

    def __init__(self, table: Array, ids: Sequence[Any]) -> None:
        self.table, self.ids = table, ids
        self.present = np.isfinite(table).all(1)

    def load(self, rows: Array) -> tuple[Tensor, Array]:
        return torch.from_numpy(self.table[rows]), np.zeros(len(rows), bool)

    def digest(self, row: int) -> str:
        return hashlib.sha256(self.table[row].tobytes()).hexdigest()

    def fingerprint(self) -> str:
        return _hash([str(i) for i in self.ids], self.table)


class _Everything:
    def __contains__(self, name: object) -> bool:
        return True


def _size_and_time(path: str | tuple[str, ...]) -> Any:
    if isinstance(path, tuple):
        return [_size_and_time(one) for one in path]
    if is_url(path):
        return size_and_time(path)
    try:
        about = os.stat(path)
    except OSError:  # a link without a target, a file just removed: a damaged image
        return 0, 0
    return about.st_size, about.st_mtime_ns


def _read(path: str | tuple[str, ...]) -> Array:
    """A file's bytes; none where it is gone, unreadable or too large, which is a damaged image. Of
    several files the first usable one's."""
    if isinstance(path, tuple):
        from ..data.image_check import check_image

        found = (_read(one) for one in path)
        return next(
            (x for x in found if check_image(x.tobytes()).image is not None), np.zeros(0, np.uint8)
        )
    try:
        return np.frombuffer(read_any(path), np.uint8)
    except (OSError, ValueError):
        return np.zeros(0, np.uint8)


def _hash(about: Any, *arrays: Array) -> str:
    digest = hashlib.sha256(json.dumps(about).encode())
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(memoryview(np.ascontiguousarray(array).reshape(-1).view(np.uint8)))  # type: ignore[arg-type]
    return digest.hexdigest()


# ---- encoding ------------------------------------------------------------------------------------


def encode(
    model: Callable[[Tensor], Tensor],
    source: Source,
    rows: Array,
    *,
    batch: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Iterator[tuple[Array, Array, Array]]:
    """Batches (rows [n], embeddings [n, D] float32 with NaN for damaged images, damaged [n]) of
    some rows of `source`, in their order.

    The next batch is decoded while one is encoded. Batches are cut from the start of `rows`, so an
    interrupted pass that goes on at a multiple of `batch` does the same arithmetic.

    Args:
        dtype: autocast to it; None: as the model is.
    """
    device = torch.device(device)
    training = isinstance(model, nn.Module) and model.training
    bounds = [*range(0, len(rows), batch), len(rows)]
    parts = [rows[a:b] for a, b in pairwise(bounds)]
    with ThreadPoolExecutor(1, "courier-embed") as ahead:
        if isinstance(model, nn.Module):
            model.eval()
        try:
            loading = ahead.submit(source.load, parts[0]) if parts else None
            for part, following in zip(parts, [*parts[1:], None], strict=True):
                assert loading is not None
                inputs, damaged = loading.result()
                if following is not None:
                    loading = ahead.submit(source.load, following)
                context = torch.autocast(device.type, dtype) if dtype else nullcontext()
                with torch.inference_mode(), context:
                    found = model(inputs.to(device, non_blocking=True)).float().cpu().numpy()
                wrong = ~np.isfinite(found).all(1) & ~damaged
                if wrong.any():
                    raise RuntimeError(
                        "encoder: expected finite embeddings, got NaN or infinity for "
                        f"{source.ids[int(part[wrong.argmax()])]}"
                    )
                found[damaged] = np.nan
                yield part, found, damaged
        finally:
            if isinstance(model, nn.Module):
                model.train(training)


def encode_all(
    model: Callable[[Tensor], Tensor],
    source: Source,
    *,
    batch: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
) -> Array:
    """Embeddings [rows, D] float32 of everything in `source`, in memory; NaN where an image is
    missing or damaged. ValueError without any."""
    table: Array | None = None
    rows = np.flatnonzero(source.present)
    for part, found, _ in encode(model, source, rows, batch=batch, device=device, dtype=dtype):
        if table is None:
            table = np.full((len(source.ids), found.shape[1]), np.nan, np.float32)
        table[part] = found
    if table is None:
        raise ValueError("images: expected at least one, got none")
    return table


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
    source: Source,
    out: str | os.PathLike[str],
    *,
    batch: int = 256,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    save_seconds: float = 5.0,
    bar: bool = False,
    space: str | None = None,
    encode: Callable[..., Iterator[tuple[Array, Array, Array]]] = encode,
) -> EmbedReport:
    """Writes embeddings of every row of `source` to `out`, and a JSON file of the same name with
    ".json" added.

    `out` is .npy ([rows, D] float32 in the source's order) or .parquet (item_id string, embedding
    fixed_size_list<float32>[D]). Items without an image or with a damaged one have NaN there. Until
    it is complete the rows lie in `out`.partial; a run that was killed goes on from there, on a CPU
    to the same bits. If the encoder, the inputs or a setting is another, it says so and starts
    over.

    Args:
        encoder: a module with `dim`; with images also `size`, `mean` and `std`.
        batch: images encoded at once.
        dtype: autocast to it; None: as the encoder is.
        save_seconds: how often progress is saved.
        bar: shows progress in the terminal.
        space: identity of the encoder, for the JSON file.
        encode: another way to the same batches (embed_ray.py).

    Raises:
        ValueError: `out` is neither .npy nor .parquet, or batch is below 1.
        RuntimeError: the encoder gives NaN for a good image.
    """
    out, began = local_path(out), time.monotonic()
    if out.suffix not in (".npy", ".parquet"):
        raise ValueError(f"out: expected a .npy or .parquet file, got {out}")
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
    beside["not_followed"] = getattr(source, "not_followed", [])
    if out.suffix == ".npy":
        beside["item_ids"] = [str(name) for name in names]
    write_atomically(
        out.with_name(f"{out.name}.json"),
        lambda path: path.write_text(json.dumps(beside, indent=1, ensure_ascii=False), "utf-8"),
    )
    work.finish(out, names)
    return report


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

    def __init__(self, out: Path, about: dict[str, Any], source: Source, dim: int) -> None:
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

    def finish(self, out: Path, ids: Sequence[Any]) -> None:
        """Makes it `out`."""
        if out.suffix == ".parquet":
            write_atomically(out, lambda path: _write_parquet(path, ids, self.table))
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
    return _hash(
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


def _write_parquet(path: Path, ids: Sequence[Any], table: Array, rows: int = 1 << 16) -> None:
    import pyarrow.parquet as pq

    dim = table.shape[1]
    schema = pa.schema([("item_id", pa.string()), ("embedding", pa.list_(pa.float32(), dim))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(table), rows):
            values = pa.array(np.asarray(table[start : start + rows]).reshape(-1))
            columns = [
                pa.array([str(i) for i in ids[start : start + rows]], pa.string()),
                pa.FixedSizeListArray.from_arrays(values, dim),
            ]
            writer.write_table(pa.table(columns, schema=schema))


# ---- the command ---------------------------------------------------------------------------------


def add_device_arguments(parser: argparse.ArgumentParser) -> None:
    """How images are decoded and encoded: shared with `evaluate`."""
    parser.add_argument("--batch", type=int, default=256, help="images encoded at once")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; auto: cuda if there")
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 autocast on a GPU",
    )
    parser.add_argument("--decoder", choices=KINDS, default="auto")
    parser.add_argument("--threads", type=int, default=0, help="decoding threads; 0: all cores")


def device_of(args: argparse.Namespace) -> tuple[torch.device, torch.dtype | None]:
    """Device and autocast type that the arguments ask for."""
    name = args.device
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    bfloat16 = args.precision == "bfloat16" or (args.precision == "auto" and device.type == "cuda")
    return device, torch.bfloat16 if bfloat16 else None


def run_source(encoder: Any, run: Path, dataset: Dataset, args: argparse.Namespace) -> Source:
    """What the encoder of a run takes: the dataset's images, or the features that a projection was
    trained on."""
    device, _ = device_of(args)
    if encoder.about["backbone"] is not None:
        return DatasetImages(dataset, make_decoder_for(encoder, device, args))
    from ..data.embeddings import read_embeddings
    from ..train.config import Config

    features = Config.load(run / "config.toml").data.features
    if features is None:
        raise ValueError(f"run: expected data.features in {run / 'config.toml'}, got none")
    return FeatureRows(read_embeddings(features, dataset), dataset.item_ids)


def make_decoder_for(encoder: Any, device: torch.device, args: argparse.Namespace) -> Decoder:
    """The decoder that `args` ask for, with the encoder's size and normalisation."""
    return make_decoder(
        args.decoder,
        encoder.size,
        device=device,
        threads=args.threads,
        mean=encoder.mean,
        std=encoder.std,
    )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", type=local_path, required=True, help="folder of a training run")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--dataset", type=location, help="folder written by `courier-fast prepare`")
    what.add_argument(
        "--images",
        type=location,
        help="any folder of images; ids are the files' names without suffix",
    )
    parser.add_argument(
        "--id-from",
        choices=("name", "folder", "path"),
        default="name",
        help="of --images: ids are names without suffix, names of the files' folders, or paths "
        "without suffix",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        required=True,
        help="embeddings.npy, embeddings.parquet, or a folder that can grow",
    )
    parser.add_argument(
        "--only-new",
        action="store_true",
        help="into a folder that is there: items that it lacks, and those with another image",
    )
    parser.add_argument(
        "--since", metavar="DATE", help="with --only-new: looks at items first seen since then only"
    )
    parser.add_argument(
        "--remove-missing",
        action="store_true",
        help="with --only-new: items of the folder that have no image any more are marked as gone",
    )
    parser.add_argument(
        "--compact",
        action="store_true",
        help="of a folder: afterwards all parts become one, without old rows and items that are "
        "gone",
    )
    add_engine_arguments(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.engine == "local":
        return _run(args, {})
    from .embed_ray import encode_on

    with connected(args.ray_address) as ray:
        return _run(args, {"encode": encode_on(ray)})


def _features_of(run: Path) -> Path | None:
    """The file that a run's projection was trained on."""
    from ..train.config import Config

    settings = run / "config.toml"
    return Config.load(settings).data.features if settings.is_file() else None


def _run(args: argparse.Namespace, how: dict[str, Any]) -> int:
    from ..serve.contract import contract_of_run
    from ..train.encoder import load_encoder

    inputs = [
        args.images,
        args.dataset,
        *(args.run / n for n in ("config.toml", "encoder.json", "encoder.safetensors")),
    ]
    if args.out.suffix and not args.out.is_dir():  # before the work
        check_embeddings_out(args.out, [*inputs, _features_of(args.run)])
    device, dtype = device_of(args)
    encoder = load_encoder(args.run, device)
    space = contract_of_run(args.run).space
    source: Source
    of_features = encoder.about["backbone"] is None
    if of_features and (unused := {"decoder", "threads"} & set(getattr(args, "given", ()))):
        raise ValueError(
            f"--{min(unused)}: has no effect with an encoder of features (--run {args.run}): "
            "no image is decoded"
        )
    if args.dataset is not None:
        source = run_source(encoder, args.run, Dataset(args.dataset), args)
    elif of_features:
        raise ValueError(
            f"run: expected an encoder of images with --images, got one of features in {args.run}"
        )
    else:
        source = FolderImages(args.images, make_decoder_for(encoder, device, args), args.id_from)
    how |= {"batch": args.batch, "device": device, "dtype": dtype, "bar": True}
    if not args.out.suffix or args.out.is_dir():
        return _run_folder(args, encoder, source, how | {"space": space})
    if args.only_new or args.since or args.compact or args.remove_missing:
        raise ValueError(
            "only_new, since, remove_missing, compact: expected a folder as --out with them, "
            f"got {args.out}"
        )
    report = embed_source(encoder, source, args.out, space=space, **how)
    print(
        f"{report.path}: {report.rows:,} embeddings of {report.dim} dimensions in "
        f"{report.seconds:.1f} s"
        f" ({report.resumed:,} from an interrupted run); "
        f"{len(report.missing):,} items without an image and"
        f" {len(report.damaged):,} with a damaged one are NaN and listed in {report.path.name}.json"
    )
    return 0


def _run_folder(args: argparse.Namespace, encoder: Any, source: Source, how: dict[str, Any]) -> int:
    from .embed_new import embed_new, rows_since

    rows = None
    if args.remove_missing and (args.since or not args.only_new):
        raise ValueError(
            "remove_missing: expected --only-new with it, and no --since: it looks at all items"
        )
    if args.since:
        if args.dataset is None or not args.only_new:
            raise ValueError(
                "since: expected --dataset, which knows when items were first seen, "
                "and --only-new with it"
            )
        rows = rows_since(Dataset(args.dataset).item_first_seen, args.since)
    store, report = embed_new(
        encoder,
        source,
        args.out,
        rows=rows,
        only_new=args.only_new,
        remove_missing=args.remove_missing,
        **how,
    )
    last = store.parts[-1]["name"] if store.parts else ""
    if args.compact:
        store = store.compact()
    new, name = (0, "nothing new") if report is None else (report.rows, last)
    print(
        f"{args.out}: {new:,} embeddings of {store.dim} dimensions more ({name}), {store.rows:,} "
        f"rows in all; space {store.space[:19]}"
    )
    if report is not None and report.damaged:
        print(
            f"{len(report.damaged):,} with a damaged image are NaN: {', '.join(report.damaged[:5])}"
        )
    return 0
