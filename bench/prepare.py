"""`courier-fast prepare` with both engines on drawn events, and what that means for far more.
`python -m bench.prepare`

The engines run in processes of their own, in turns; of each the fastest counts. Memory is what
belongs to one process alone, and the object store, at their peaks. Steps are timed in this process
in CPU seconds, over all threads, so a machine that does other things, too, says the same. The plan
on paper multiplies those by as many rows, and by as much as the engine took longer than its steps.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from PIL import Image

from courier_fast.data.prepare import steps
from courier_fast.data.prepare.items import Candidates
from courier_fast.data.prepare.layouts import Source, generic
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.pages import market_of
from courier_fast.data.prepare.rows import arrow_text

PARTS = 64  # that a step's rows are cut into, where they are timed
NAMES = ["user", "time", "history_start", "history_end", "pv_start", "pv_end"]


def draw(folder: Path, events: int) -> list[str]:
    """Events of a year in 8 files of CSV, a tenth as many users, a fiftieth as many items; the
    arguments that name them."""
    rng = np.random.default_rng(0)
    users, items = max(events // 10, 1), max(events // 50, 1)
    columns = {
        "user_id": (users * rng.random(events) ** 1.5).astype(np.int64),
        "item_id": (items * rng.random(events) ** 2).astype(np.int64),
        "timestamp": 1_600_000_000 + rng.integers(0, 365 * 86_400, events),
    }
    ids = [pl.col(name).cast(pl.String).str.zfill(9) for name in ("user_id", "item_id")]
    (folder / "clicks").mkdir(parents=True)
    frame = pl.DataFrame(columns).with_columns(ids)
    for part, rows in enumerate(np.array_split(np.arange(events), 8)):
        frame[rows].write_csv(folder / "clicks" / f"part-{part}.csv")
    about = {"item_id": np.arange(items), "category": np.arange(items) % 40}
    pl.DataFrame(about).with_columns(ids[1]).write_csv(folder / "items.csv")
    return ["--interactions", str(folder / "clicks"), "--items", str(folder / "items.csv")]


# ---- the engines ---------------------------------------------------------------------------------


def memory(root: int) -> dict[str, int]:
    """Bytes in use now: of a process, of Ray's tasks under it, and of the object store."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(path.parent.name))
    found = {"driver": 0, "workers": 0, "store": 0}
    family = [root]
    for process in family:
        family += children.get(process, [])
        try:
            lines = Path(f"/proc/{process}/status").read_text().splitlines()
            name = Path(f"/proc/{process}/cmdline").read_text()
        except OSError:
            continue
        size = {
            k: int(v.split()[0]) << 10 for k, v in (s.split(":", 1) for s in lines) if "Rss" in k
        }
        kind = "driver" if process == root else "workers" if name.startswith("ray::") else ""
        if kind:
            found[kind] += size.get("RssAnon", 0)
        found["store"] = max(found["store"], size.get("RssShmem", 0))
    return found


def run(engine: str, out: Path, arguments: Sequence[str]) -> dict[str, Any]:
    """Seconds, peak bytes, and the checksum of everything."""
    command = [
        sys.executable,
        "-m",
        "courier_fast.cli",
        "prepare",
        str(out),
        "--overwrite",
        "--engine",
        engine,
        *arguments,
    ]
    began, peak = time.perf_counter(), {"driver": 0, "workers": 0, "store": 0}
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors)
        while process.poll() is None:
            now = memory(process.pid)
            peak = {name: max(size, now[name]) for name, size in peak.items()}
            time.sleep(0.1)
        seconds = time.perf_counter() - began
        errors.seek(0)
        said = errors.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)}: {said}")
    between = [
        line.split(": ", 1)[1] for line in said.splitlines() if line.startswith("bytes between")
    ]
    manifest = json.loads((out / "dataset.json").read_text())["manifest"]
    return {
        "seconds": seconds,
        **peak,
        "between": between[0] if between else "",
        "manifest": manifest,
    }


# ---- the steps -----------------------------------------------------------------------------------


def timed(step: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What a step gives, and its CPU seconds."""
    began = time.process_time()
    result = step(*arguments)
    return result, time.process_time() - began


def cpu_of_steps(arguments: Sequence[str], out: Path) -> dict[str, float]:
    """Microseconds of one core for each event, by step."""
    options = PrepareOptions()
    source = generic([Path(arguments[1])], Path(arguments[3]))
    assert source.parts is not None
    seconds = dict.fromkeys(("read", "to_users", "by_user", "make", "by_time", "write_rows"), 0.0)
    assert source.items is not None
    table = source.items.collect().with_columns(
        pl.lit(None, pl.Int64).alias(n) for n in ("first_seen", "last_seen")
    )
    ids = arrow_text(table["item_id"])
    row = np.arange(len(ids), dtype=np.int32)
    first, last = np.zeros(len(ids), np.int64), np.full(len(ids), 1 << 40)
    market = market_of(table, first, last, options)
    times = np.quantile(
        [1_600_000_000, 1_600_000_000 + 365 * 86_400], np.arange(1, PARTS) / PARTS
    ).astype(np.int64)
    bounds = (times, np.zeros(len(times), np.int64))
    pieces, total = [], 0
    for frame in source.parts():
        (block, items, about), cost = timed(
            lambda f=frame: list(steps.read([f], "events", source, 0, 1 << 40))
        )
        seconds["read"] += cost
        total += about["rows"]
        users = block["users"]
        cuts = users.take(np.linspace(0, len(users) - 1, PARTS + 1).astype(np.int64)[1:-1])
        _, cost = timed(steps.to_users, block, items, ids, row, steps.union(cuts))
        seconds["to_users"] += cost
        pieces.append(steps.to_users(block, items, ids, row, steps.union(users[:0]))[0])
    (_, events, _, _, _), seconds["by_user"] = timed(steps.by_user, False, options, *pieces)
    few = {"first": events["first"][:100]} | {
        n: events[n][: events["first"][99]] for n in ("item", "time")
    }
    steps.pages_of_users(few, None, (0, 0, 0), market, None, None, bounds, options)  # compiles
    made, seconds["make"] = timed(
        steps.pages_of_users, events, None, (0, 0, 0), market, None, None, bounds, options
    )
    (pages, of_pages, sums), seconds["by_time"] = timed(steps.by_time, options, *made[:-1])
    for name, columns, part, rows in (
        ("pages", NAMES, pages, sums["pages"]),
        ("page_items", ["item", "clicked"], of_pages, sums["items"]),
        ("events", ["item", "time"], events, len(events["item"])),
    ):
        shards = [(s, a, min(a + (1 << 22), rows)) for s, a in enumerate(range(0, rows, 1 << 22))]
        _, cost = timed(steps.write_rows, out, name, columns, shards, [0], [0], part)
        seconds["write_rows"] += cost
    return {name: 1e6 * s / total for name, s in seconds.items()}


def seconds_of_items(items: int) -> float:
    """Microseconds for each item of what the leading process does by itself: their ids, their
    metadata, what is on offer."""
    ids = pl.Series("item_id", np.random.default_rng(0).permutation(items)).cast(pl.String)
    about = pl.DataFrame({"item_id": ids, "category": (ids.cast(pl.Int64) % 40).cast(pl.String)})
    began = time.perf_counter()
    known = steps.union(arrow_text(ids.str.zfill(9)))
    table = pl.DataFrame({"item_id": pl.Series("id", known, pl.String)}).with_row_index("code")
    source = Source("drawn", items=about.with_columns(pl.col("item_id").str.zfill(9)).lazy())
    chosen = Candidates(table, source, None).chosen([]).table
    times = np.random.default_rng(1).integers(0, 1 << 30, (2, items))
    market_of(chosen, times[0], times[0] + times[1], PrepareOptions())
    return 1e6 * (time.perf_counter() - began) / items


def cpu_of_image(side: int, count: int = 200) -> tuple[float, int]:
    """Microseconds of a core to check a photograph-like JPEG of side x side pixels; its bytes."""
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (side // 8, side // 8, 3), np.uint8))
    fine = rng.integers(-8, 9, (side, side, 3))
    pixels = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC)).astype(int) + fine
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "JPEG", quality=85)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "1.jpg"
        path.write_bytes(file.getvalue())
        _, cost = timed(steps.usable_images, [str(path)] * count, PrepareOptions())
    return 1e6 * cost / count, len(file.getvalue())


# ---- on paper ------------------------------------------------------------------------------------


def plan(
    cpu: dict[str, float],
    image: tuple[float, int],
    of_item: float,
    longer: float,
    between: float,
    args: argparse.Namespace,
) -> dict[str, float]:
    """Hours and bytes for `args.plan_events` and `args.plan_images`.

    `longer`: what the engine took over what its steps did. `between`: bytes between steps for each
    event.
    """
    cores = args.machines * args.cores
    network = args.machines * args.gbit / 8 * 1e9  # bytes a second
    core_seconds = sum(cpu.values()) * 1e-6 * args.plan_events * longer
    image_seconds = image[0] * 1e-6 * args.plan_images * longer
    moved = between * args.plan_events
    images = image[1] * args.plan_images
    return {
        "core hours, events": core_seconds / 3600,
        "core hours, images": image_seconds / 3600,
        "hours, events": core_seconds / cores / 3600 + moved / network / 3600,
        "hours, items, by one process": of_item * 1e-6 * args.plan_images / 3600,
        "hours, images": image_seconds / cores / 3600 + 3 * images / network / 3600,
        "TB shuffled, events": moved / 1e12,
        "TB of images": images / 1e12,
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.prepare", description=__doc__)
    add = parser.add_argument
    add("--events", type=int, default=5_000_000)
    add("--turns", type=int, default=3)
    add("--folder", type=Path, help="for what is drawn and written; default: a temporary one")
    add("--plan-events", type=float, default=10e9)
    add("--plan-images", type=float, default=100e6)
    add("--machines", type=int, default=16)
    add("--cores", type=int, default=32, help="of a machine")
    add("--gbit", type=float, default=25.0, help="network of a machine, Gbit/s")
    add("--side", type=int, default=512, help="pixels of the images of the plan")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.folder) as scratch:
        folder = Path(scratch)
        arguments = draw(folder, args.events)
        found: dict[str, list[dict[str, Any]]] = {"local": [], "ray": []}
        for _ in range(args.turns):
            for engine, turns in found.items():
                turns.append(run(engine, folder / engine, arguments))
        assert len({t["manifest"] for turns in found.values() for t in turns}) == 1
        best = {engine: min(turns, key=lambda t: t["seconds"]) for engine, turns in found.items()}
        for engine, turn in best.items():
            sizes = ", ".join(
                f"{n} {turn[n] / 2**20:,.0f} MiB" for n in ("driver", "workers", "store")
            )
            print(
                f"{engine}: {turn['seconds']:.1f} s, {sizes}; between tasks: "
                f"{turn['between'] or 'none'}"
            )
        nothing = draw(folder / "few", 1000)
        start = min(run("ray", folder / "few-out", nothing)["seconds"] for _ in range(args.turns))
        cpu = cpu_of_steps(arguments, folder / "steps")
    print(f"ray for 1,000 events: {start:.1f} s")
    print(
        "microseconds of a core for each event: "
        + ", ".join(f"{n} {c:.2f}" for n, c in cpu.items())
    )
    image = cpu_of_image(args.side)
    print(f"an image of {args.side} pixels, {image[1]:,} bytes: {image[0]:,.0f} microseconds")
    of_item = seconds_of_items(1_000_000)
    print(f"the leading process: {of_item:.2f} microseconds for each item")
    ours = len(os.sched_getaffinity(0))
    longer = (best["ray"]["seconds"] - start) * ours / (sum(cpu.values()) * 1e-6 * args.events)
    moved = sum(
        int(part.rsplit(" ", 1)[1].replace(",", "")) for part in best["ray"]["between"].split(", ")
    )
    print(
        f"ray took {longer:.2f} of its steps' time on {ours} cores; {moved / args.events:.0f} "
        "bytes shuffled for each event"
    )
    print(
        f"{args.plan_events:,.0f} events, {args.plan_images:,.0f} images on {args.machines} "
        f"machines of {args.cores} cores:"
    )
    for name, value in plan(cpu, image, of_item, longer, moved / args.events, args).items():
        print(f"  {name}: {value:,.2f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
