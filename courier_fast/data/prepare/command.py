"""The command line of `courier-fast prepare`."""

from __future__ import annotations

import argparse
from typing import Any

from rich.console import Console
from rich.table import Table

from ...engines import add_engine_arguments
from ...locations import local_path, location
from ..read.times import FORMATS
from ..tables import SHARD_BYTES, SHARD_ROWS
from .histories import DIFFER
from .layouts import LAYOUTS, ORDERS, PAGES, Columns, Source, generic
from .options import NEGATIVES, PrepareOptions
from .run import prepare
from .vectors import EmbeddingFile


def print_report(report: dict[str, Any]) -> None:
    """The report of `prepare` for people."""
    table = Table("", "read", "kept", "dropped, and why", show_edge=False)

    def reasons(dropped: dict[str, int]) -> str:
        return "\n".join(f"{n:,} {why}" for why, n in dropped.items())

    for name in ("events", "impressions", "histories"):
        if name in report:
            counts = report[name]
            kept = counts.get("kept", counts["read"] - sum(counts["dropped"].values()))
            table.add_row(name, f"{counts['read']:,}", f"{kept:,}", reasons(counts["dropped"]))
    pages = report["pages"]
    table.add_row(
        "pages", f"{pages['candidates']:,}", f"{pages['kept']:,}", reasons(pages["dropped"])
    )
    console = Console()
    console.print(table)
    if given := report.get("histories"):
        console.print(
            f"histories are given: {given['stored']:,} items are stored, as pages of a user with "
            "the same list share it"
        )
        if given[DIFFER]:
            console.print(f"histories: {given[DIFFER]:,} {DIFFER}; the first is taken")
    if "unclicked" in pages:
        console.print(
            f"kept: {pages['unclicked']:,} pages without a click, {pages['all_clicked']:,} with "
            "nothing but clicks"
        )
    if "cut" in pages:
        console.print(
            f"{pages['cut']:,} pages cut to --page-size: "
            "weight says how many items shown a row stands for"
        )
    for column, count in report.get("items_times_unreadable", {}).items():
        console.print(f"items: {count:,} values of {column} cannot be read as times")
    images = report["images"]
    console.print(
        f"{report['users']:,} users, {report['items']:,} items, "
        f"{pages['items'] / pages['kept']:.1f} items a page, median history "
        f"{pages['median_history']}"
    )
    if images:
        bad = images["undecodable"]
        console.print(
            f"{images['usable']:,} images, {len(images['missing']):,} missing, "
            f"{len(bad):,} undecodable"
            + "".join(f"\n  {item}: {why}" for item, why in list(bad.items())[:5])
            + ("\n  ... (report.json has all)" if len(bad) > 5 else ""),
            markup=False,
        )
        for link in images["folders_not_followed"]:
            console.print(f"{link}: a link out of the folder of images, not followed", markup=False)
    if ready := report.get("embeddings"):
        bad = ready["unusable"]
        console.print(
            f"{ready['usable']:,} embeddings of {ready['dim']:,} dimensions ({ready['dtype']}"
            + (f", scale {ready['scale']:.6g}" if ready["scale"] != 1 else "")
            + f"), {len(ready['missing']):,} missing, {len(bad):,} that cannot be used"
            + "".join(f"\n  {item}: {why}" for item, why in list(bad.items())[:5])
            + ("\n  ... (report.json has all)" if len(bad) > 5 else ""),
            markup=False,
        )
    for name, split in report["splits"].items():
        when = f", {split['from']} to {split['to']}" if "from" in split else ""
        console.print(f"{name}: {split['pages']:,} pages{when}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    columns, options = Columns(), PrepareOptions()
    add = parser.add_argument
    add(
        "out",
        type=location,
        help="the dataset folder to write; also s3://, gs://, hdfs://, as are the others",
    )
    add("--layout", default="generic", choices=["generic", *LAYOUTS])
    add("--source", type=local_path, help="folder of the published files (not for generic)")
    add("--images", type=location, help="folder of image files called after the items")
    add(
        "--embeddings",
        type=local_path,
        help="ready embeddings of the items in place of images: .parquet, .npy with item_ids in "
        "the JSON beside it, or a folder of `courier-fast embed`",
    )
    add("--embedding-column", help="of .parquet; default: embedding, or a published file's")
    add("--embedding-id-column", help="of .parquet; default: item_id, or a published file's")
    add(
        "--embedding-scale",
        type=float,
        help="numbers are multiplied by it; default: a published file's, or that in the JSON "
        "beside .npy of int8, else 1",
    )
    add(
        "--min-rating",
        type=float,
        help="least rating that is a click (movielens, amazon-reviews-2023)",
    )
    add("--pages", choices=PAGES, default=PAGES[0], help="that are read (qilin)")
    add(
        "--shrink",
        type=int,
        default=0,
        metavar="PIXELS",
        help="scale longer short sides down to this",
    )
    add("--threads", type=int, default=0, help="threads that check images and sort")
    add(
        "--memory-gib",
        type=float,
        default=options.memory_gib,
        help="GiB that sorting and other steps may take, about; more is faster",
    )
    add("--shard-rows", type=int, default=SHARD_ROWS, help="rows of a shard of a table")
    add(
        "--shard-bytes",
        type=int,
        default=SHARD_BYTES,
        help="bytes of images or embeddings after which a shard is full",
    )
    add("--overwrite", action="store_true")
    add_engine_arguments(parser)

    add = parser.add_argument_group("generic").add_argument
    add(
        "--interactions",
        type=location,
        nargs="+",
        default=[],
        help=".csv, .tsv, .parquet or .jsonl, or folders of them",
    )
    add("--items", type=location, help="a row per item, with its category")
    add("--user-column", default=columns.user)
    add("--item-column", default=columns.item)
    add("--time-column", default=columns.time, help="dates, or numbers since 1970")
    add(
        "--time-format",
        metavar="FORMAT",
        help=f"what times are where that is not clear: {', '.join(FORMATS)}, or a pattern such as "
        "%%d/%%m/%%Y",
    )
    add("--category-column", default=columns.category)
    add("--page-column", help="page or impression id: a row is then an item shown on that page")
    add("--clicked-column", default=columns.clicked, help="whether it was clicked")

    add(
        "--history-column",
        help="what the user had before, the newest last: a list, or text between blanks, commas or "
        "bars; without --page-column a row is then a page view, whose items and clicks are lists",
    )
    add("--history-order", choices=ORDERS, default=columns.history_order)
    add("--padding-id", default=columns.padding, help="stands for no item in a history")
    add(
        "--split-column",
        help="train, validation or test; else times decide, or without them the order of rows",
    )
    add("--results-column", help="of a page view: a list, or JSON, of objects with these fields")
    add("--position-column", help="of a page view: where its items stood")

    add = parser.add_argument_group("pages").add_argument
    add("--page-size", type=int, default=options.page_size, help="items of a page")
    add(
        "--keep-unclicked",
        action="store_true",
        help="given pages without a click stay, as impressions and as candidates",
    )
    add("--negatives", choices=NEGATIVES, default=options.negatives)
    add(
        "--live-days",
        type=float,
        default=options.live_days,
        help="an item is on offer so long before its first and after its last event",
    )
    add(
        "--min-history",
        type=int,
        default=options.min_history,
        help="earlier events that a page needs",
    )
    add(
        "--max-history",
        type=int,
        default=options.max_history,
        help="most recent events that are kept",
    )
    add(
        "--repeats",
        choices=("drop", "keep"),
        default=options.repeats,
        help="made pages whose item the user had before; items that a given history has again",
    )
    add(
        "--keep-own",
        action="store_true",
        help="what was clicked on a page stays in its given history",
    )
    add("--validation-share", type=float, default=options.validation_share)
    add("--test-share", type=float, default=options.test_share)
    add("--validation-from", metavar="DATE")
    add("--test-from", metavar="DATE")
    add("--seed", type=int, default=options.seed)


def source_of(args: argparse.Namespace) -> Source:
    """The source that the command line names."""
    if args.layout == "generic":
        names: tuple[str, ...] = ("user", "item", "time", "category", "page", "clicked")
        names += ("history", "split", "position", "results")
        columns = Columns(
            **{n: getattr(args, f"{n}_column") for n in names},
            time_format=args.time_format,
            history_order=args.history_order,
            padding=args.padding_id,
        )
        of_row = (columns.user, columns.item, columns.time)
        if len({*of_row}) < 3:
            raise ValueError(
                "--user-column, --item-column, --time-column: expected three, got "
                f"{', '.join(of_row)}"
            )
        return generic(args.interactions, args.items, columns)
    if args.source is None:
        raise ValueError(
            f"source: expected --source with the folder of the {args.layout} files, got none"
        )
    how: dict[str, Any] = {"pages": args.pages} if args.layout == "qilin" else {}
    if args.min_rating is not None:
        how["min_rating"] = args.min_rating
    return LAYOUTS[args.layout](args.source, **how)


def embeddings_of(args: argparse.Namespace) -> EmbeddingFile | None:
    """The ready embeddings that the command line names."""
    if args.embeddings is None:
        return None
    return EmbeddingFile(
        args.embeddings, args.embedding_column, args.embedding_id_column, args.embedding_scale
    )


def run(args: argparse.Namespace) -> int:
    options = PrepareOptions(**{n: getattr(args, n) for n in PrepareOptions.__dataclass_fields__})
    report = prepare(
        args.out,
        source=source_of(args),
        images=args.images,
        embeddings=embeddings_of(args),
        options=options,
        engine=args.engine,
        ray_address=args.ray_address,
    )
    print_report(report)
    print(f"written to {args.out}")
    return 0
