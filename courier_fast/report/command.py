"""`courier-fast report`: one HTML page about a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..evaluate import command as evaluate
from ..locations import local_path
from ..output import check_file
from .page import About, write_report
from .sections import ctr_tables, sweep_pictures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=local_path, default=Path("report.html"), help="the page (default report.html)"
    )
    parser.add_argument(
        "--ctr", type=local_path, help="folder of `courier-fast ctr`: its tables are shown"
    )
    parser.add_argument(
        "--sweep", type=local_path, help="folder of `courier-fast sweep`: its plots are shown"
    )
    parser.add_argument(
        "--headline",
        default="page",
        metavar="SET",
        help="the set of candidates that the headline is about (default page)",
    )
    evaluate.add_arguments(parser)


def run(args: argparse.Namespace) -> int:
    # What is wrong is an error before the work, not after.
    if args.run is None and args.embeddings is None:
        raise ValueError("--run, --embeddings: expected one of them, got neither")
    check_file(args.out, "out", inputs=evaluate.inputs_of(args), begins="<")
    if args.sweep is not None:
        sweep_pictures(args.sweep)
    if args.ctr is not None:
        ctr_tables(args.ctr)
    if args.headline not in args.candidates:
        raise ValueError(f"--headline: expected one of --candidates, got {args.headline!r}")
    args.k = sorted({1, *args.k})
    dataset, methods, results = evaluate.evaluate(args)
    embeddings = methods[0].embeddings
    assert embeddings is not None
    about = About(
        dataset,
        args.run or args.embeddings.parent,
        embeddings,
        ctr=args.ctr,
        sweep=args.sweep,
        click=methods[0].click,
    )
    write_report(
        args.out, about, results, candidates=args.headline, history=args.history, seed=args.seed
    )
    print(f"{args.out}")
    return 0
