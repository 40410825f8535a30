"""`courier-fast export`."""

from __future__ import annotations

import argparse

from ..locations import local_path, location
from .export import FORMATS, export
from .golden import verify
from .load import PRECISIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--run",
        type=local_path,
        help="folder of a training run; without it --verify judges an earlier --out",
    )
    parser.add_argument("--out", type=local_path, required=True, help="folder of the export")
    parser.add_argument("--format", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument(
        "--licence",
        help="of the weights, for example apache-2.0; they inherit the terms of the backbone's "
        "weights and of the photos",
    )
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=PRECISIONS,
        default=["float32"],
        help="of the ONNX files; float32 is always one of them",
    )
    parser.add_argument(
        "--dim", type=int, help="the first dimensions alone, as `embed --dim`; default: all"
    )
    parser.add_argument(
        "--dataset",
        type=location,
        help="measures parity on its photos, and HR@10 and speed of every precision",
    )
    parser.add_argument("--split", default="test", help="of the dataset, that is ranked")
    parser.add_argument("--photos", type=int, default=256, help="of the dataset, for parity")
    parser.add_argument("--threads", type=int, default=1, help="of the speed measured")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="runs the golden pictures through every file as it is served",
    )
    parser.add_argument(
        "--vectors",
        type=local_path,
        help="with --verify: .npy [8, dim] that another client made of the golden pictures",
    )


def run(args: argparse.Namespace) -> int:
    if args.run is None and not args.verify:
        raise ValueError("run: expected the folder of a training run, or --verify, got neither")
    if args.run is not None:
        if not args.licence:
            raise ValueError(
                "licence: expected that of the weights, "
                "for example --licence apache-2.0, got none; "
                "they inherit the terms of the backbone's weights and of the photos"
            )
        contract = export(
            args.run,
            args.out,
            licence=args.licence,
            formats=args.format,
            precisions=args.precision,
            dim=args.dim,
            dataset=args.dataset,
            split=args.split,
            photos=args.photos,
            threads=args.threads,
        )
        for entry in contract.files:
            if entry["precision"]:
                print(f"{args.out / entry['name']} ({entry['precision']})")
        print(f"space {contract.space}; contract.json and MODEL_CARD.md say the rest")
    if not args.verify:
        return 0
    verdicts = verify(args.out, args.vectors)
    for verdict in verdicts:
        print(verdict)
    return 0 if all(verdict.passes for verdict in verdicts) else 1
