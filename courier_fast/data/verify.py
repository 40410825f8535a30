"""`courier-fast verify`: reads every shard of a dataset where it lies, against the manifest."""

from __future__ import annotations

import argparse

from ..locations import location
from .dataset import Dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("dataset", type=location, help="folder written by `courier-fast prepare`")


def run(args: argparse.Namespace) -> int:
    dataset = Dataset(args.dataset)
    size = dataset.verify()
    shards = sum(len(table.shards) for table in dataset.tables.values())
    print(f"{args.dataset}: {shards:,} shards, {size:,} bytes, as the manifest lists them")
    return 0
