"""Histories that are given by the source's rows: against brute force, in every form that a file can
hold them in, and what is wrong with them."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from prepare_factory import digest, source_of
from test_prepare import small_parts

from courier_fast.cli import main
from courier_fast.ctr.impressions import Impressions
from courier_fast.data.batches import BatchPlan
from courier_fast.data.dataset import Dataset
from courier_fast.data.prepare.layouts import Columns, generic
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.run import prepare
from courier_fast.report.sections import summary

COLUMNS = {"page": "page_id", "history": "past"}
SMALL: dict[str, Any] = {"min_history": 1, "max_history": 4}


def log(seed: int, pages: int = 80, users: int = 6, items: int = 25) -> list[dict[str, Any]]:
    """Page views in the order of the log: items with zeros, repeats and own clicks in histories;
    some users' pages have the same history."""
    rng = np.random.default_rng(seed)
    out = []
    for page in range(pages):
        shown = rng.choice(np.arange(1, items), rng.integers(1, 7), replace=False).tolist()
        size = rng.integers(0, 9)
        past = [0] * (8 - size) + rng.integers(1, items + 10, size).tolist()
        user = int(rng.integers(users))
        same = [p["past"] for p in out if p["user"] == f"u{user}"]
        out.append(
            {
                "page": f"p{page:02}",
                "user": f"u{user}",
                "items": shown,
                "clicked": [int(rng.random() < 0.4) for _ in shown],
                "past": same[-1] if same and rng.random() < 0.4 else past,
            }
        )
    return out


def item_rows(pages: list[dict[str, Any]], **more: list[Any]) -> pl.DataFrame:
    """A row for each item shown."""
    names = {"page": "page_id", "user": "user_id", "items": "item_id"}
    frame = pl.DataFrame(pages).with_columns(pl.Series(n, v) for n, v in more.items())
    return frame.rename(names).explode("item_id", "clicked")


def expected_of(
    pages: list[dict[str, Any]], *, own: bool = False, repeats: bool = False
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """By brute force, with SMALL: the pages kept, and what became of the items of histories."""
    out, counts = [], Counter[str]()
    for page in pages:
        hits = {i for i, c in zip(page["items"], page["clicked"], strict=True) if c}
        past: list[int] = []
        for item in reversed([i for i in page["past"] if i]):
            counts["read"] += 1
            if item in hits and not own:
                counts["own"] += 1
            elif item in past and not repeats:
                counts["repeated"] += 1
            else:
                past.append(item)
        counts["older"] += max(len(past) - 4, 0)
        past = past[:4][::-1]
        counts["kept"] += len(past)
        if hits and len(hits) < len(page["items"]) and past:
            out.append({**page, "past": past})
    return out, counts


def found_in(data: Dataset) -> list[dict[str, Any]]:
    items, users = data.item_ids.to_pylist(), data.user_ids.to_pylist()
    return [
        {
            "user": users[data.page_user[p]],
            "items": [int(items[i]) for i in data.pv_item[data.pv_start[p] : data.pv_end[p]]],
            "clicked": data.pv_clicked[data.pv_start[p] : data.pv_end[p]].tolist(),
            "past": [
                int(items[i]) for i in data.event_item[data.history_start[p] : data.history_end[p]]
            ],
        }
        for p in range(data.num_pages)
    ]


@pytest.mark.parametrize("keep", [{}, {"keep_own": True}, {"repeats": "keep"}])
@pytest.mark.parametrize("seed", range(3))
def test_pages_are_those_of_brute_force(
    tmp_path: Path, seed: int, keep: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    pages = log(seed)
    item_rows(pages).write_parquet(tmp_path / "log.parquet")
    source = generic([tmp_path / "log.parquet"], None, Columns(**COLUMNS))
    report = prepare(tmp_path / "out", source=source, options=PrepareOptions(**SMALL, **keep))
    data = Dataset(tmp_path / "out")
    expected, counts = expected_of(
        pages, own="keep_own" in keep, repeats=keep.get("repeats") == "keep"
    )
    found = found_in(data)
    assert found == [{n: page[n] for n in found[0]} for page in expected]
    dropped = report["histories"]["dropped"]
    assert {why.split(" ")[0]: n for why, n in dropped.items()} == {
        word: counts[name]
        for word, name in (("clicked", "own"), ("in", "repeated"), ("older", "older"))
        if counts[name]
    }
    assert [report["histories"][n] for n in ("read", "kept")] == [counts["read"], counts["kept"]]
    # The order of the log decides; a list is stored once where a user's pages have the same.
    assert data.page_time.tolist() == list(range(data.num_pages))
    assert data.info["histories"] == "given" and data.info["times"] == "order"
    lists = {(p["user"], *p["past"]) for p in expected}
    ranges = set(zip(data.history_start.tolist(), data.history_end.tolist(), strict=True))
    assert len(ranges) == len(lists) < len(expected)
    assert data.events.schema.names == ["item"]
    # Items of a history alone are items of the dataset.
    shown = {i for page in pages for i in page["items"]}
    names = {int(i) for i in data.item_ids.to_pylist()}
    assert names == shown | {i for page in pages for i in page["past"]} - {0} and names - shown


def write(frame: pl.DataFrame, folder: Path, name: str, form: str) -> Path:
    """A log in one of the forms that columns of lists may have."""
    nested = [n for n, kind in frame.schema.items() if isinstance(kind, pl.List)]

    def each(text: Any) -> pl.DataFrame:
        made = {n: [text(v) for v in frame[n].to_list()] for n in nested}
        return frame.with_columns(pl.Series(n, v, pl.String) for n, v in made.items())

    path = folder / f"{name}.{form.split('-')[0]}"
    kind = form.partition("-")[2]
    between = {"blanks": " ", "commas": ", ", "bars": "|"}.get(kind)
    if kind == "json":
        frame = each(json.dumps)
    elif between:
        frame = each(lambda v: between.join(map(str, v)))
    elif kind == "array":
        frame = frame.with_columns(pl.col("past").list.to_array(8))
    if path.suffix == ".csv":
        frame.write_csv(path)
    elif path.suffix == ".jsonl":
        frame.write_ndjson(path)
    else:
        frame.write_parquet(path)
    return path


FORMS = ["parquet", "parquet-array", "parquet-bars", "csv-blanks", "csv-commas", "csv-json"]
FORMS += ["csv-bars", "jsonl", "jsonl-json", "jsonl-blanks"]


@pytest.mark.parametrize("rows", ["items", "views"])
def test_every_form_gives_the_same_bytes(tmp_path: Path, rows: str) -> None:
    pages = log(3, pages=40)
    frame = item_rows(pages) if rows == "items" else pl.DataFrame(pages)
    columns = Columns(**COLUMNS)
    if rows == "views":
        columns = Columns("user", "items", history="past")
    found = []
    for number, form in enumerate(FORMS):
        path = write(frame, tmp_path, f"log{number}", form)
        out = tmp_path / f"out{number}"
        prepare(out, source=generic([path], None, columns), options=PrepareOptions(**SMALL))
        found.append(digest(out))
    assert all(of == found[0] for of in found)
    # The newest first, and something else than zeros for nothing.
    past = pl.col("past").list.reverse().list.eval(pl.element().replace(0, -1))
    turned = frame.with_columns(past)
    path = write(turned, tmp_path, "turned", "parquet")
    for name, value in (("history_order", "newest-first"), ("padding", "-1")):
        columns = Columns(**{**columns.__dict__, name: value})
    prepare(
        tmp_path / "out", source=generic([path], None, columns), options=PrepareOptions(**SMALL)
    )
    assert digest(tmp_path / "out") == found[0]


def test_page_views_are_the_rows_of_their_items(tmp_path: Path) -> None:
    """Lists, objects and JSON of objects, in order of positions, as rows of items are."""
    pages = log(4, pages=40)
    item_rows(pages).write_parquet(tmp_path / "items.parquet")
    rng = np.random.default_rng(0)
    mixed = []
    for page in pages:
        order = rng.permutation(len(page["items"]))
        lists = {n: [page[n][i] for i in order] for n in ("items", "clicked")}
        mixed.append({**page, **lists, "position": (order + 1).tolist()})
    names = ("items", "clicked", "position")
    objects = [
        [
            dict(zip(("note", "hit", "at"), of, strict=True))
            for of in zip(*(p[n] for n in names), strict=True)
        ]
        for p in mixed
    ]
    frame = pl.DataFrame(mixed)
    frame.write_parquet(tmp_path / "lists.parquet")
    of_objects = frame.select("user", "past", rs=pl.Series(objects))
    of_objects.write_parquet(tmp_path / "objects.parquet")
    of_objects.write_ndjson(tmp_path / "objects.jsonl")
    text = frame.select("user", "past", rs=pl.Series([json.dumps(o) for o in objects]))
    text.write_parquet(tmp_path / "json.parquet")
    views = Columns("user", "items", history="past", position="position")
    fields = Columns("user", "note", history="past", clicked="hit", position="at", results="rs")
    cases = {
        "items.parquet": Columns(**COLUMNS),
        "lists.parquet": views,
        "objects.parquet": fields,
        "objects.jsonl": fields,
        "json.parquet": fields,
    }
    found = {}
    for name, columns in cases.items():
        source = generic([tmp_path / name], None, columns)
        prepare(tmp_path / f"of-{name}", source=source, options=PrepareOptions(**SMALL))
        found[name] = found_in(Dataset(tmp_path / f"of-{name}"))
    assert all(of == found["items.parquet"] for of in found.values())


def test_splits_are_named(tmp_path: Path) -> None:
    pages = log(5, pages=60)
    rng = np.random.default_rng(1)
    names = rng.choice(["test", "train", "validation"], len(pages)).tolist()
    item_rows(pages, fold=names).write_parquet(tmp_path / "log.parquet")
    columns = Columns(**COLUMNS, split="fold")
    source = generic([tmp_path / "log.parquet"], None, columns)
    report = prepare(tmp_path / "out", source=source, options=PrepareOptions(**SMALL))
    data = Dataset(tmp_path / "out")
    found = found_in(data)
    for split in ("train", "validation", "test"):
        mine = [page for page, name in zip(pages, names, strict=True) if name == split]
        expected = [{n: page[n] for n in found[0]} for page in expected_of(mine)[0]]
        rows = data.split(split)
        assert found[rows.start : rows.stop] == expected
        assert report["splits"][split] == {"pages": len(expected)}


def test_times_are_read_where_they_are(tmp_path: Path) -> None:
    pages = log(6, pages=40)
    times = np.random.default_rng(2).permutation(40).tolist()
    frame = item_rows(pages, timestamp=[1_600_000_000 + 86_400 * t for t in times])
    frame.write_parquet(tmp_path / "log.parquet")
    source = generic([tmp_path / "log.parquet"], None, Columns(**COLUMNS))
    report = prepare(tmp_path / "out", source=source, options=PrepareOptions(**SMALL))
    data = Dataset(tmp_path / "out")
    ordered = [page for _, page in sorted(zip(times, pages, strict=True), key=lambda of: of[0])]
    found = found_in(data)
    assert found == [{n: p[n] for n in found[0]} for p in expected_of(ordered)[0]]
    assert report["splits"]["train"]["from"].startswith("2020-09-")
    assert "times" not in data.info
    # Items of a history alone were first seen with the first page that has it.
    of_item: dict[int, list[int]] = {}
    for time, page in zip(times, pages, strict=True):
        for item in {*page["items"], *page["past"]} - {0}:
            of_item.setdefault(item, []).append(1_600_000_000 + 86_400 * time)
    ids = [int(i) for i in data.item_ids.to_pylist()]
    assert data.item_first_seen.tolist() == [min(of_item[i]) for i in ids]
    assert data.items.arrow("last_seen").to_pylist() == [max(of_item[i]) for i in ids]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"past": "{}"}, r"log.csv: row 2: past: expected a list of ids.* got \{\}"),
        ({"past": "[1, 2"}, r"log.csv: row 2: past: expected a list .*not JSON.*\[1, 2"),
        ({"past": "[[1], 2]"}, r"log.csv: row 2: past: expected a list of ids.*\[\[1\], 2\]"),
        ({"items": "[1, 2, 3"}, r"log.csv: row 2: items: expected a list .*not JSON"),
        ({"clicked": "0 1"}, r"row 2: clicked: expected as many values as items has, 3, got 2"),
        ({"fold": "dev"}, r"row 2: fold: expected train, validation, test, got 'dev'"),
        ({"position": "1 2 x"}, "expected numbers as position, got x"),
        ({"clicked": "0 1 maybe"}, "expected yes or no in each row.*'maybe'"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, change: dict[str, str], message: str) -> None:
    row = {"user": "u", "items": "1 2 3", "clicked": "0 1 0", "past": "4 5", "fold": "train"}
    row["position"] = "1 2 3"
    pl.DataFrame([row, row | change]).write_csv(tmp_path / "log.csv")
    columns = Columns("user", "items", history="past", split="fold", position="position")
    source = generic([tmp_path / "log.csv"], None, columns)
    with pytest.raises(ValueError, match=message):
        prepare(tmp_path / "out", source=source, options=PrepareOptions(**SMALL))
    assert not (tmp_path / "out").exists()


def test_a_column_that_holds_no_lists_is_named(tmp_path: Path) -> None:
    path = tmp_path / "log.parquet"
    frame = item_rows(log(0, pages=5)).with_columns(past=3)
    frame.write_parquet(path)
    with pytest.raises(ValueError, match="expected a list of ids.* as past, got a column of Int"):
        generic([path], None, Columns(**COLUMNS))
    frame.with_columns(past=[[1]]).write_parquet(path)
    with pytest.raises(ValueError, match="expected a list of ids.* as past, got a column of List"):
        generic([path], None, Columns(**COLUMNS))
    with pytest.raises(ValueError, match="history_order: expected one of"):
        Columns(**COLUMNS, history_order="newest")
    with pytest.raises(ValueError, match="expected a history column"):
        Columns(split="fold")
    source = source_of([("u", "i", 1)])
    with pytest.raises(ValueError, match="keep_own: expected a source with given histories"):
        prepare(tmp_path / "out", source=source, options=PrepareOptions(keep_own=True))


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item_rows(log(7)).write_parquet(tmp_path / "log.parquet")
    line = ["prepare", str(tmp_path / "out"), "--interactions", str(tmp_path / "log.parquet")]
    line += ["--page-column", "page_id", "--history-column", "past", "--min-history", "1"]
    assert main(line) == 0
    text = capsys.readouterr().out
    assert "histories are given: " in text and "clicked on the page itself" in text
    assert main([*line, "--overwrite", "--test-from", "2020-01-01"]) != 0
    assert (
        main([*line, "--overwrite", "--validation-from", "2020-01-01", "--test-from", "2020-01-02"])
        != 0
    )
    assert "expected pages with times" in capsys.readouterr().err


def shop(folder: Path, pages: int = 400) -> Path:
    """A dataset without times whose histories are given, and embeddings beside it."""
    rng = np.random.default_rng(0)
    views = log(8, pages=pages, users=20, items=30)
    item_rows(views).write_parquet(folder / "log.parquet")
    names = {i for page in views for i in (*page["items"], *page["past"])} - {0}
    about = pl.DataFrame({"item_id": sorted(names)}).with_columns(
        category=pl.format("kind{}", pl.col("item_id") % 3)
    )
    about.write_csv(folder / "items.csv")
    out = folder / "shop"
    line = ["prepare", str(out), "--interactions", str(folder / "log.parquet"), "--min-history"]
    line += ["1", "--page-column", "page_id", "--history-column", "past"]
    assert main([*line, "--items", str(folder / "items.csv"), "--keep-unclicked"]) == 0
    table = rng.normal(size=(Dataset(out).num_items, 8)).astype(np.float32)
    np.save(folder / "e.npy", table)
    return out


def test_everything_downstream_takes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, e = shop(tmp_path), str(tmp_path / "e.npy")
    data = Dataset(out)
    assert main(["verify", str(out)]) == 0
    plan = BatchPlan(data, pages=16, history=5)
    batch = plan.batch(0, 0)
    for i, page in enumerate(batch.pages.tolist()):
        past = data.event_item[data.history_start[page] : data.history_end[page]][-5:]
        here = slice(*batch.history_offsets[i : i + 2])
        assert batch.items[batch.history_index[here]].tolist() == past.tolist()
    assert batch.num_sequence_anchors > 0
    # Each page's history counts, however few lists are stored.
    counts = np.zeros(data.num_items)
    for page in data.split("train"):
        for column, a, b in (
            (data.pv_item, data.pv_start[page], data.pv_end[page]),
            (
                data.event_item,
                max(data.history_start[page], data.history_end[page] - 5),
                data.history_end[page],
            ),
        ):
            np.add.at(counts, column[a:b], 1)
    expected = np.log(np.maximum(counts, 0.5) / counts.sum())
    assert np.allclose(plan.log_q(histories=True), expected)
    # Popularity counts clicks on earlier pages.
    shown = Impressions(data, "test")
    first = data.pv_start[data.split("test").start]
    before = Counter(data.pv_item[:first][data.pv_clicked[:first]].tolist())
    rows = slice(0, data.pv_end[data.split("test").start] - first)
    clicks = np.log1p([before[i] for i in shown.item[rows].tolist()])
    assert np.allclose(shown.popularity()[rows], np.stack([clicks, clicks], 1))
    assert not shown.hour.any() and not shown.weekday.any()

    settings = ["--model.dim", "8", "--optim.steps", "3", "--run.device", "cpu"]
    settings += ["--data.pages", "16", "--loss.sequence_weight", "0.5"]
    line = ["train", "--data.dataset", str(out), "--data.features", e, *settings]
    assert main([*line, "--run.out", str(tmp_path / "run")]) == 0
    evaluate = ["evaluate", "--dataset", str(out), "--embeddings", e, "--bootstrap", "10"]
    assert main([*evaluate, "--baselines", "random", "popularity", "--device", "cpu"]) == 0
    capsys.readouterr()
    ctr = ["ctr", "--dataset", str(out), "--embeddings", e, "--out", str(tmp_path / "ctr")]
    ctr += ["--models", "din", "--forms", "none", "similarity", "--seeds", "1", "--epochs", "1"]
    assert main([*ctr, "--no-control", "--export", str(tmp_path / "x")]) == 0
    said = capsys.readouterr().out + "".join(
        p.read_text() for p in sorted((tmp_path / "ctr").rglob("*.md"))
    )
    assert "Histories are given: lists of the source, without what was clicked" in said
    facts = {name: kept for name, kept, _ in summary(data)["facts"]}
    assert facts["Items of given histories"] == f"{data.report['histories']['kept']:,}"
    # A date says nothing about pages without times.
    with pytest.raises(ValueError, match="since: expected a dataset with times"):
        data.need_times("since")
