"""`courier-fast embed`: an encoder and images, embeddings out."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..data.dataset import Dataset
from ..engines import add_engine_arguments, connected
from ..locations import local_path, location
from ..space import encoder_of_run, space_of
from .device import add_device_arguments, device_of
from .sources import FolderImages, RowSource, make_decoder_for, run_source
from .write import NUMBERS, check_embeddings_out, embed_source


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
    parser.add_argument("--dim", type=int, help="the first dimensions alone; default: all")
    parser.add_argument(
        "--dtype",
        choices=NUMBERS,
        help="as what numbers are stored, int8 with a scale; default: float32, or as a folder that "
        "is there has them",
    )
    add_engine_arguments(parser)
    add_device_arguments(parser)


def run(args: argparse.Namespace) -> int:
    if args.engine == "local":
        return _run(args, {})
    from .on_ray import encode_on

    with connected(args.ray_address) as ray:
        return _run(args, {"encode": encode_on(ray)})


def _features_of(run: Path) -> Path | None:
    """The file that a run's projection was trained on."""
    from ..train.config import Config

    settings = run / "config.toml"
    return Config.load(settings).data.features if settings.is_file() else None


def _run(args: argparse.Namespace, how: dict[str, Any]) -> int:
    from ..train.encoder import first_dimensions, load_encoder

    inputs = [
        args.images,
        args.dataset,
        *(args.run / n for n in ("config.toml", "encoder.json", "encoder.safetensors")),
    ]
    if args.out.suffix and not args.out.is_dir():  # before the work
        check_embeddings_out(args.out, [*inputs, _features_of(args.run)])
    device, dtype = device_of(args)
    encoder = load_encoder(args.run, device)
    about, weights = encoder_of_run(args.run)
    if args.dim is not None:
        encoder = first_dimensions(encoder, args.dim)
        about |= {"dim": args.dim}  # another space than that of all
    space = space_of(weights, about)
    source: RowSource
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
        return _run_folder(args, encoder, source, how | {"space": space, "numbers": args.dtype})
    if args.only_new or args.since or args.compact or args.remove_missing:
        raise ValueError(
            "only_new, since, remove_missing, compact: expected a folder as --out with them, "
            f"got {args.out}"
        )
    numbers = args.dtype or "float32"
    report = embed_source(encoder, source, args.out, space=space, numbers=numbers, **how)
    print(
        f"{report.path}: {report.rows:,} embeddings of {report.dim} dimensions in "
        f"{report.seconds:.1f} s"
        f" ({report.resumed:,} from an interrupted run); "
        f"{len(report.missing):,} items without an image and"
        f" {len(report.damaged):,} with a damaged one are NaN and listed in {report.path.name}.json"
    )
    return 0


def _run_folder(
    args: argparse.Namespace, encoder: Any, source: RowSource, how: dict[str, Any]
) -> int:
    from .grow import embed_new, rows_since

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
        dataset = Dataset(args.dataset)
        dataset.need_times("since")
        rows = rows_since(dataset.item_first_seen, args.since)
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
        f"rows of {store.dtype} in all; space {store.space[:19]}"
    )
    if report is not None and report.damaged:
        print(
            f"{len(report.damaged):,} with a damaged image are NaN: {', '.join(report.damaged[:5])}"
        )
    return 0
