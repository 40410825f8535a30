"""`courier-fast index build | search | clusters | codes`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

import numpy as np

from ..files import write_atomically
from ..locations import local_path, location
from ..output import CLUSTERS, CODES, INDEX, check_file, check_output
from .index import KINDS, Index, build

if TYPE_CHECKING:
    import pyarrow as pa


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", required=True, metavar="action")

    one = actions.add_parser(
        "build", help="embeddings -> an index, with its measured recall and speed"
    )
    _add_embeddings(one)
    one.add_argument("--out", type=local_path, required=True, help="folder of the index")
    one.add_argument(
        "--kind",
        default="auto",
        help=f"one of {', '.join(KINDS)}; auto: exact up to 100,000 items, then ivf",
    )
    one.add_argument(
        "--recall",
        type=float,
        default=0.95,
        help="share of the 10 nearest that ivf and hnsw must find",
    )
    one.add_argument("--seed", type=int, default=0)

    one = actions.add_parser("search", help="the nearest items of items or image files")
    one.add_argument("--index", type=local_path, required=True, help="folder of `index build`")
    one.add_argument("--item", nargs="+", default=[], help="ids")
    one.add_argument("--image", nargs="+", default=[], type=local_path, help="image files")
    one.add_argument(
        "--encoder", type=local_path, help="run or export, for --image: of the index's space"
    )
    one.add_argument("--k", type=int, default=10)
    one.add_argument("--dataset", type=location, help="whose pictures --html shows")
    one.add_argument("--html", type=local_path, help="a page of pictures")
    one.add_argument("--json", type=local_path, help="the same as JSON")

    one = actions.add_parser("clusters", help="k-means clusters of the items, and their centroids")
    _add_embeddings(one)
    one.add_argument("--out", type=local_path, required=True, help="folder of the clusters")
    one.add_argument("--k", type=int, nargs="+", default=[256, 4096], help="numbers of clusters")
    _add_fit(one, "clustered; later ones get the nearest centroid", "earlier clusters")

    one = actions.add_parser("codes", help="semantic ids of the items, from coarse to fine")
    _add_embeddings(one)
    one.add_argument("--out", type=local_path, required=True, help="folder of the codes")
    one.add_argument("--levels", type=int, default=3, help="numbers of an id")
    one.add_argument("--codes", type=int, default=256, help="different ones of each level")
    _add_fit(one, "what the codebooks are made of", "earlier codes, which stay")


def _add_fit(parser: argparse.ArgumentParser, known: str, like: str) -> None:
    parser.add_argument(
        "--dataset", type=location, help="with --until: knows when items were first seen"
    )
    parser.add_argument("--until", metavar="DATE", help=f"only items first seen before are {known}")
    parser.add_argument(
        "--like", type=local_path, help=f"folder of {like}: what was fitted there is taken"
    )
    parser.add_argument("--seed", type=int, default=0)


def _add_embeddings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--embeddings",
        type=local_path,
        required=True,
        help="folder or file of `courier-fast embed`",
    )


def run(args: argparse.Namespace) -> int:
    runs = {
        "build": _run_build,
        "search": _run_search,
        "clusters": _run_clusters,
        "codes": _run_codes,
    }
    return runs[args.action](args)


def _run_build(args: argparse.Namespace) -> int:
    from ..data.embeddings import read_vectors

    check_output(args.out, INDEX, inputs=[args.embeddings], overwrite=True)
    ids, vectors, space = read_vectors(args.embeddings)
    index = build(
        ids, vectors, args.out, space=space, kind=args.kind, recall=args.recall, seed=args.seed
    )
    settings = "".join(f", {name} {value}" for name, value in index.settings.items())
    print(
        f"{args.out}: {len(index.ids):,} items, {index.kind}{settings}; recall@10 "
        f"{index.measured['recall@10']:.3f}, "
        f"{index.measured['queries_per_s']:,.0f} queries/s"
    )
    return 0


def _run_search(args: argparse.Namespace) -> int:
    from .neighbours import nearest_images, nearest_items, write_page

    if not args.item and not args.image:
        raise ValueError("item, image: expected one of them, got neither")
    if args.k < 1:
        raise ValueError(f"k: expected at least 1, got {args.k}")
    if args.image and args.encoder is None:
        raise ValueError(
            "encoder: expected the run or export whose embeddings the index holds, "
            "for --image; got none"
        )
    if args.html is not None and args.dataset is None:
        raise ValueError("dataset: expected the one whose pictures --html shows, got none")
    inputs = (args.index, args.encoder, args.dataset, *args.image)
    for name, path, begins in (("json", args.json, "["), ("html", args.html, "<")):
        if path is not None:
            check_file(path, name, inputs=inputs, begins=begins)
    index = Index.open(args.index)
    found = nearest_items(index, args.item, args.k)
    if args.image:
        from ..serve.load import load

        found += nearest_images(index, load(args.encoder), args.image, args.k)
    for one in found:
        print("\n".join(one.lines()))
    if args.json is not None:
        said = [
            {"query": n.query, "near": [{"item_id": i, "cosine": c} for i, c in n.near]}
            for n in found
        ]
        text = json.dumps(said, indent=1, ensure_ascii=False) + "\n"
        write_atomically(args.json, lambda path: path.write_text(text, "utf-8"))
    if args.html is not None:
        from ..data.dataset import Dataset

        write_page(found, index, Dataset(args.dataset), args.html)
    return 0


def _run_clusters(args: argparse.Namespace) -> int:
    from ..data.embeddings import read_vectors
    from .clusters import assign_clusters, fit_clusters

    check_output(
        args.out, CLUSTERS, inputs=[args.embeddings, args.like, args.dataset], overwrite=True
    )
    ids, vectors, space = read_vectors(args.embeddings)
    if args.like is not None:
        assign_clusters(ids, vectors, args.like, args.out, space=space)
    else:
        known = None if args.until is None else _seen_before(args, ids)
        fit_clusters(
            ids,
            vectors,
            args.out,
            known=known,
            clusters=args.k,
            space=space,
            until=args.until,
            seed=args.seed,
        )
    print(f"{args.out}: clusters of {len(ids):,} items, and their centroids")
    return 0


def _run_codes(args: argparse.Namespace) -> int:
    from ..data.embeddings import read_vectors
    from .codes import extend_codes, fit_codes

    inputs = [args.embeddings, args.like, args.dataset]
    check_output(args.out, CODES, inputs=inputs, overwrite=True)
    ids, vectors, space = read_vectors(args.embeddings)
    if args.like is not None:
        report = extend_codes(ids, vectors, args.like, args.out, space=space)
    else:
        known = None if args.until is None else _seen_before(args, ids)
        report = fit_codes(
            ids,
            vectors,
            args.out,
            known=known,
            levels=args.levels,
            codes=args.codes,
            space=space,
            until=args.until,
            seed=args.seed,
        )
    kept = ", ".join(f"{x:.3f}" for x in report.get("neighbours", ()))
    print(
        f"{args.out}: codes of {len(ids):,} items; {report['shared']:.1%} share theirs with "
        f"another; used {', '.join(map(str, report['used']))}; squared error "
        f"{', '.join(f'{x:.3f}' for x in report['error'])}"
        + (f"; of the 10 nearest, the same so far {kept}" if kept else "")
    )
    if report.get("would_change"):
        print(f"{report['would_change']:,} items keep a code that they would not get now")
    return 0


def _seen_before(args: argparse.Namespace, ids: pa.Array) -> np.ndarray:
    """[n] bool: the item was first seen before --until; false for those not in the dataset."""
    import pyarrow.compute as pc

    from ..data.dataset import Dataset
    from ..data.prepare.options import epoch

    if args.dataset is None:
        raise ValueError(
            "dataset: expected one with --until, which knows when items were first seen; got none"
        )
    dataset = Dataset(args.dataset)
    dataset.need_times("until")
    place = pc.fill_null(pc.index_in(ids, dataset.item_ids), -1).to_numpy()
    return (place >= 0) & (dataset.item_first_seen[place] < epoch("until", args.until))
