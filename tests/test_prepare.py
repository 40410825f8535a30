"""prepare against brute force on random data, and on damaged images, interruptions and a million
events."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from prepare_factory import Event, digest, page_rows, random_events, source_of

from courier_fast.data.dataset import Dataset
from courier_fast.data.prepare import command, in_threads, plan, rows
from courier_fast.data.prepare.layouts import Columns, Source, generic
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.rows import hash_ids
from courier_fast.data.prepare.run import prepare
from courier_fast.evaluate.targets import find_targets

HM = Path(__file__).parents[2] / "shared/data/hm-fashion"


def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are read a few at a time, and parts are of a few rows."""
    monkeypatch.setattr(rows, "BATCH", 17)
    monkeypatch.setattr(rows, "WITH_LISTS", 5)
    monkeypatch.setattr(in_threads, "_OF_ROW", 1 << 23)
    monkeypatch.setattr(in_threads, "_FEWEST", 8)


# ---- made pages ----------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", ["drop", "keep"])
@pytest.mark.parametrize("negatives", ["uniform", "popularity", "category"])
@pytest.mark.parametrize("seed", range(4))
def test_pages_are_those_of_brute_force(
    tmp_path: Path, seed: int, negatives: str, repeats: str
) -> None:
    events = random_events(seed)
    kinds = {item: f"kind{int(item) % 3}" for _, item, _ in events if int(item) % 5}
    live_days = (0, 3)[seed % 2]
    options = PrepareOptions(
        page_size=4,
        negatives=negatives,
        min_history=2,
        max_history=5,
        repeats=repeats,
        seed=seed,
        live_days=live_days,
    )
    report = prepare(tmp_path / "out", source=source_of(events, kinds), options=options)
    data = Dataset(tmp_path / "out")

    unique = sorted(set(events), key=lambda e: (e[0], e[2], e[1]))
    of_user = defaultdict(list)
    seen = defaultdict(list)
    for user, item, when in unique:
        of_user[user].append((item, when))
        seen[item].append(when)
    users, items = sorted(of_user), sorted(seen)
    assert data.user_ids.to_pylist() == users
    assert data.item_ids.to_pylist() == items
    assert data.categories.to_pylist() == [kinds.get(i) for i in items]
    table = [(items[i], int(t)) for i, t in zip(data.event_item, data.event_time, strict=True)]
    assert table == [e for u in users for e in of_user[u]]
    assert data.item_first_seen.tolist() == [min(seen[i]) for i in items]
    assert data.items.arrow("last_seen").to_pylist() == [max(seen[i]) for i in items]

    expected = []
    for user, item, when in sorted(unique, key=lambda e: (e[2], e[0], e[1])):
        before = [(i, t) for i, t in of_user[user] if t < when]
        if len(before) >= 2 and (repeats == "keep" or item not in [i for i, _ in before]):
            expected.append((user, item, when, before[-5:]))
    rows = page_rows(data)
    found = [
        (r["user"], r["items"][r["clicked"].index(True)], r["time"], r["history"]) for r in rows
    ]

    def others_at(user: str, when: int) -> set[str]:
        own = {i for i, t in of_user[user] if t <= when}
        margin = live_days * 86_400
        return {i for i in items if min(seen[i]) - margin <= when <= max(seen[i]) + margin} - own

    alone = [e for e in expected if not others_at(e[0], e[2])]
    if negatives == "popularity":  # finds only what its draws happen to meet
        alone = [e for e in expected if e not in found]
    assert report["pages"]["dropped"].get("nothing else to show", 0) == len(alone)
    assert found == [e for e in expected if e not in alone]

    for row in rows:
        when = row["time"]
        live = others_at(row["user"], when)
        clicked = row["items"][row["clicked"].index(True)]
        others = [i for i in row["items"] if i != clicked]
        assert sum(row["clicked"]) == 1
        assert all(t < when for _, t in row["history"])
        assert len(set(others)) == len(others) == len(row["items"]) - 1
        assert set(others) <= live
        if negatives == "popularity":
            past = Counter(i for _, i, t in unique if t < when)
            assert all(past[i] for i in others)
        else:
            assert len(others) == min(3, len(live))
        if negatives == "category":
            kin = {i for i in live if kinds.get(i) == kinds.get(clicked) is not None}
            assert len(kin & set(others)) >= min(3, len(kin))

    # Splits: in order of time, together all pages, never inside a timestamp.
    bounds = [data.split(name) for name in ("train", "validation", "test")]
    assert [b.start for b in bounds] == [0, bounds[0].stop, bounds[1].stop]
    assert bounds[2].stop == len(rows)
    for split in bounds[1:]:
        if len(split):
            assert data.page_time[split.start - 1] < data.page_time[split.start]
    train = Counter(found[p][1] for p in bounds[0])
    assert data.item_clicks.tolist() == [train[i] for i in items]
    assert report["events"] == {
        "read": len(events),
        "kept": len(unique),
        "dropped": {"the same user, item and time again": len(events) - len(unique)},
    }
    assert report["pages"]["candidates"] == len(unique)
    assert sum(report["pages"]["dropped"].values()) + len(rows) == len(unique)
    lengths = sorted(len(r["history"]) for r in rows)
    assert report["pages"]["median_history"] == lengths[(len(lengths) - 1) // 2]


def crowd(pages: int = 4000) -> tuple[list[Event], dict[str, int], dict[str, str]]:
    """Single events of a crowd give items their popularity; every page has the same past and the
    same items on offer."""
    counts = {f"c{k:02}": 3 * k + 1 for k in range(24)}
    events = [(f"{i}-{n}", i, 10) for i, count in counts.items() for n in range(count)]
    events += [(f"{i}-late", i, 90) for i in counts]
    for page in range(pages):
        events += [(f"v{page}", "own", 20), (f"v{page}", "target", 30)]
    kinds = {"target": "a", "own": "a", **{i: "ab"[k % 2] for k, i in enumerate(counts)}}
    return events, counts, kinds


@pytest.mark.parametrize("negatives", ["uniform", "popularity", "category"])
def test_negatives_follow_their_distribution(tmp_path: Path, negatives: str) -> None:
    events, counts, kinds = crowd()
    options = PrepareOptions(
        page_size=2, negatives=negatives, min_history=1, validation_share=0, test_share=0
    )
    prepare(tmp_path / "out", source=source_of(events, kinds), options=options)
    data = Dataset(tmp_path / "out")
    weight = {
        "uniform": dict.fromkeys(counts, 1),
        "popularity": counts,
        "category": {i: 1 for i in counts if kinds[i] == "a"},
    }[negatives]
    items = data.item_ids.to_pylist()
    drawn = Counter(items[i] for i in data.pv_item[~data.pv_clicked])
    assert set(drawn) <= set(weight)
    share = data.num_pages / sum(weight.values())
    chi2 = sum((drawn[i] - w * share) ** 2 / (w * share) for i, w in weight.items())
    freedom = len(weight) - 1
    assert data.num_pages == 4000
    assert abs(chi2 - freedom) < 5 * (2 * freedom) ** 0.5
    # The clicked item is as often first as second.
    first = data.pv_clicked[data.pv_start].mean()
    assert abs(first - 0.5) < 5 * 0.5 / 4000**0.5


@pytest.mark.parametrize("negatives", ["uniform", "popularity", "category"])
def test_same_bytes_for_any_order_of_rows_and_any_size_of_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, negatives: str
) -> None:
    events = random_events(5)
    kinds = {item: f"kind{int(item) % 3}" for _, item, _ in events}

    def made(name: str, events: list[Event], seed: int = 0) -> dict[str, str]:
        options = PrepareOptions(page_size=5, min_history=1, negatives=negatives, seed=seed)
        prepare(tmp_path / name, source=source_of(events, kinds), options=options)
        return digest(tmp_path / name)

    first = made("first", events)
    assert made("again", events) == first
    assert made("backwards", events[::-1]) == first
    small_parts(monkeypatch)
    assert made("batches", events) == first
    other = made("seed", events, seed=1)
    assert other["page_items/00000.arrow"] != first["page_items/00000.arrow"]
    assert other["events/00000.arrow"] == first["events/00000.arrow"]


def test_splits_by_date_and_by_share(tmp_path: Path) -> None:
    events = random_events(6)
    options = PrepareOptions(
        min_history=1, validation_from="1970-01-20", test_from="1970-01-30T12:00:00Z"
    )
    report = prepare(tmp_path / "dates", source=source_of(events), options=options)
    data = Dataset(tmp_path / "dates")
    day = data.page_time // 86_400
    assert day[data.split("train")].max() < 19
    assert day[data.split("validation")].min() >= 19
    assert day[data.split("validation")].max() <= 29
    assert day[data.split("test")].min() >= 30
    assert report["splits"]["train"]["from"].startswith("1970-01-")

    share = PrepareOptions(min_history=1, validation_share=0, test_share=0.3)
    prepare(tmp_path / "share", source=source_of(events), options=share)
    data = Dataset(tmp_path / "share")
    assert len(data.split("validation")) == 0
    assert 0.29 <= len(data.split("test")) / data.num_pages < 0.4


# ---- given pages ---------------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_given_pages_are_those_of_brute_force(
    tmp_path: Path, seed: int, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_parts(monkeypatch)
    rng = np.random.default_rng(seed)
    rows, before = [], random_events(seed, users=6, n=30)
    for page in range(80):
        user, when = f"u{rng.integers(6)}", int(rng.integers(50)) * 43_200
        for item in rng.integers(0, 25, rng.integers(1, 9)):
            late = int(rng.integers(3))
            rows.append((f"p{page}", user, f"{item:04}", when + late, bool(rng.random() < 0.2)))
    names = ("page_id", "user_id", "item_id", "time", "clicked")
    source = source_of(before)
    shown = pl.LazyFrame(rows, names, orient="row")
    source = Source("test", source.events, shown)
    options = PrepareOptions(page_size=4, keep_unclicked=keep, min_history=1, max_history=3)
    report = prepare(tmp_path / "out", source=source, options=options)
    data = Dataset(tmp_path / "out")

    clicks = {(u, i, t) for _, u, i, t, hit in rows if hit} | set(before)
    expected = {}
    reasons: Counter[str] = Counter()
    for page in range(80):
        mine = [r for r in rows if r[0] == f"p{page}"]
        items = list(dict.fromkeys(r[2] for r in mine))
        hits = {r[2] for r in mine if r[4]}
        user, when = mine[0][1], min(r[3] for r in mine)
        past = sorted((t, i) for u, i, t in clicks if u == user and t < when)
        if not hits and not keep:
            reasons["nothing clicked"] += 1
        elif len(hits) == len(items) and not keep:
            reasons["nothing else to show"] += 1
        elif not past:
            reasons["fewer earlier events than --min-history"] += 1
        else:
            expected[f"p{page}"] = (user, when, items, hits, [(i, t) for t, i in past[-3:]])
    assert report["pages"]["dropped"] == dict(reasons)
    assert report["pages"]["candidates"] == 80
    shown_of = [e[2] for e in expected.values()]
    clicks_of = [len(e[3]) for e in expected.values()]
    assert report["pages"]["cut"] == sum(
        len(s) > max(4, c + 1) for s, c in zip(shown_of, clicks_of, strict=True)
    )
    kept = {
        "unclicked": clicks_of.count(0),
        "all_clicked": sum(len(s) == c for s, c in zip(shown_of, clicks_of, strict=True)),
    }
    assert {n: report["pages"].get(n) for n in kept} == (kept if keep else dict.fromkeys(kept))
    assert min(kept.values()) > 0 or not keep
    found = page_rows(data)
    assert [r["time"] for r in found] == sorted(r["time"] for r in found)
    assert len(found) == len(expected)
    left = list(expected.values())
    for row in found:
        hits = {i for i, c in zip(row["items"], row["clicked"], strict=True) if c}
        match = next(
            e
            for e in left
            if e[:2] == (row["user"], row["time"])
            and e[3] == hits
            and set(row["items"]) <= set(e[2])
        )
        left.remove(match)
        _, _, items, _, history = match
        assert row["history"] == history
        assert len(row["items"]) == min(len(items), max(4, len(hits) + 1))
        assert row["items"] == [i for i in items if i in row["items"]]  # as shown
        others = (len(items) - len(hits)) / max(len(row["items"]) - len(hits), 1)
        assert row["weight"] == [1 if i in hits else np.float32(others) for i in row["items"]]
    assert not left


def test_weights_are_there_where_a_page_was_cut(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And tell the mean of anything over the items shown, whatever was drawn."""
    rng = np.random.default_rng(0)
    names = ("page_id", "user_id", "item_id", "time", "clicked")
    rows = [
        (
            f"p{page}",
            f"u{page % 7}",
            f"{item:02}",
            86_400 * page,
            item == page % 20 and page % 3 > 0,
        )
        for page in range(400)
        for item in rng.choice(20, 12, replace=False)
    ]
    shown = pl.LazyFrame(rows, names, orient="row")
    before = source_of([(f"u{u}", "00", -1) for u in range(7)]).events
    data = {}
    for size in (5, 12):
        options = PrepareOptions(page_size=size, keep_unclicked=True, min_history=1, seed=1)
        out = tmp_path / str(size)
        report = prepare(out, source=Source("test", before, shown), options=options)
        command.print_report(report)
        data[size] = Dataset(out)
        text, unclicked = capsys.readouterr().out, report["pages"]["unclicked"]
        assert 134 <= unclicked < 300
        assert f"kept: {unclicked} pages without a click, 0 with nothing but clicks" in text
        assert ("400 pages cut" in text) == (size == 5)
    assert data[12].pv_weight is None
    assert "cut" not in json.loads((tmp_path / "12/report.json").read_text())["pages"]
    cut, whole = data[5], data[12]
    assert cut.pv_weight is not None and cut.pv_weight.dtype == np.float32
    assert cut.pv_weight.sum() == pytest.approx(len(whole.pv_item))
    # A page without a click has no target to rank.
    pages = whole.split("test")
    rows = slice(whole.pv_start[pages.start], whole.pv_end[pages.stop - 1])
    targets = find_targets(whole, "test")
    assert 0 < len(targets) == whole.pv_clicked[rows].sum() < len(pages)
    # Each item's rows, counted by weight, within 4 standard errors of what was shown.
    by_item = np.bincount(cut.pv_item, cut.pv_weight, 20)
    expected = np.bincount(whole.pv_item, minlength=20)
    error = np.sqrt(np.bincount(cut.pv_item, cut.pv_weight * (cut.pv_weight - 1), 20))
    assert (np.abs(by_item - expected) < 4 * error).all()
    assert (np.abs(np.bincount(cut.pv_item, minlength=20) - expected) > 4 * error).all()


def test_clicks_alone_have_no_unclicked_pages(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match="keep_unclicked: expected a source with impressions .*test"
    ):
        prepare(
            tmp_path / "out",
            source=source_of(random_events(0)),
            options=PrepareOptions(keep_unclicked=True),
        )
    assert not list(tmp_path.iterdir())


# ---- rows, folders, the command ------------------------------------------------------------------


def test_rows_that_cannot_be_read_are_counted(tmp_path: Path) -> None:
    good = [f"{n % 3},00{(n // 3 + 4 * (n % 3)) % 9},{1_600_000_000 + n}" for n in range(27)]
    path = tmp_path / "own.csv"
    path.write_text(
        "\n".join(
            [
                "user_id,item_id,timestamp",
                *good,
                ",001,1600000005",
                "1,,1600000005",
                "1,001,never",
                "1,001,",
            ]
        )
    )
    report = prepare(
        tmp_path / "out", source=generic([path]), options=PrepareOptions(min_history=1)
    )
    assert report["events"]["read"] == 31
    assert report["events"]["kept"] == 27
    assert report["events"]["dropped"] == {
        "no user, item or page id": 2,
        "time missing or unreadable": 2,
    }
    assert Dataset(tmp_path / "out").item_ids.to_pylist() == [f"00{i}" for i in range(9)]


def test_metadata_widens_when_an_item_is_on_offer(tmp_path: Path) -> None:
    events = [("u", "a", 100), ("u", "b", 200), ("v", "c", 150)]
    about = pl.LazyFrame({"item_id": ["c"], "first_seen": [160], "last_seen": [200]})
    source = Source("test", source_of(events).events, items=about)
    options = PrepareOptions(min_history=1, validation_share=0, test_share=0)
    prepare(tmp_path / "out", source=source, options=options)
    data = Dataset(tmp_path / "out")
    (row,) = page_rows(data)
    assert sorted(row["items"]) == ["b", "c"]
    assert data.item_first_seen.tolist() == [100, 200, 150]


def test_an_interrupted_run_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, source = tmp_path / "out", source_of(random_events(0))
    options = PrepareOptions(min_history=1)

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(plan, "write_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(out, source=source, options=options)
    assert not list(tmp_path.iterdir())

    prepare(out, source=source, options=options)
    before = digest(out)
    with pytest.raises(FileExistsError, match="--overwrite"):
        prepare(out, source=source, options=options)
    again = PrepareOptions(min_history=1, seed=3, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(plan, "write_shards", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare(out, source=source, options=again)
    assert digest(out) == before
    prepare(out, source=source, options=again)
    assert digest(out) != before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.long("killed processes")
def test_a_killed_run_leaves_no_dataset(tmp_path: Path) -> None:
    script = """
import sys, time
from pathlib import Path
import polars as pl
from courier_fast.data.prepare import PrepareOptions, Source, plan, prepare
def wait(*_):
    print("writing", flush=True)
    time.sleep(60)
plan.write_shards = wait
columns = {"user_id": list("uuuvvv"), "item_id": list("abccba"), "time": [0, 2, 4, 1, 3, 5]}
options = PrepareOptions(min_history=1)
prepare(Path(sys.argv[1]), source=Source("test", pl.LazyFrame(columns)), options=options)
"""
    child = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path / "out")], stdout=subprocess.PIPE
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"writing\n"
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    assert not (tmp_path / "out").exists()
    prepare(
        tmp_path / "out", source=source_of(random_events(0)), options=PrepareOptions(min_history=1)
    )
    assert Dataset(tmp_path / "out").num_pages


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 1}, "page_size: expected at least 2, got 1"),
        ({"negatives": "hard"}, "negatives: expected one of"),
        ({"min_history": 0}, "min_history: expected at least 1, got 0"),
        ({"test_share": 0.95}, "leave something for train"),
        ({"test_from": "2020-01-01"}, "expected both or neither"),
        (
            {"validation_from": "soon", "test_from": "2020-01-01"},
            "validation_from: expected a date",
        ),
        ({"validation_from": "2021-01-01", "test_from": "2020-01-01"}, "no date before"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PrepareOptions(**options)


def test_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pages: expected at least one, got none.*min-history"):
        prepare(tmp_path / "a", source=source_of([("u", "i", 1), ("v", "j", 2)]))
    with pytest.raises(ValueError, match="expected events, got none"):
        prepare(tmp_path / "b", source=source_of([]))
    columns = ("page_id", "user_id", "item_id", "time", "clicked")
    kinds = dict(zip(columns, (pl.String, pl.String, pl.String, pl.Int64, pl.Boolean), strict=True))
    source = Source("test", source_of(random_events(0)).events, pl.LazyFrame(schema=kinds))
    with pytest.raises(ValueError, match="pages: expected at least one, got none"):
        prepare(tmp_path / "d", source=source)
    options = PrepareOptions(min_history=1, validation_from="1960-01-01", test_from="1960-01-01")
    with pytest.raises(ValueError, match="pages to train on"):
        prepare(tmp_path / "c", source=source_of(random_events(0)), options=options)
    assert not list(tmp_path.iterdir())


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "own.csv"
    rows = [f"{u},{i},{1_600_000_000 + t}" for u, i, t in random_events(1)]
    path.write_text("\n".join(["who,what,timestamp", *rows]))
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)

    def run(*arguments: str) -> int:
        return command.run(parser.parse_args([str(tmp_path / "out"), *arguments]))

    own = ["--interactions", str(path), "--user-column", "who", "--item-column", "what"]
    assert run(*own, "--min-history", "1", "--page-size", "5") == 0
    data = Dataset(tmp_path / "out")
    assert data.info["options"]["page_size"] == 5
    assert data.info["source"] == {"layout": "generic", "files": [str(path)], "images": None}
    text = capsys.readouterr().out
    assert f"{data.num_pages:,}" in text
    assert "validation: " in text
    with pytest.raises(ValueError, match="expected --source"):
        run("--layout", "hm")


@pytest.mark.long("memory")
def test_memory_stays_bounded(tmp_path: Path) -> None:
    """A million events in a process of its own: what it takes beyond its imports is far less than
    the rows would as objects."""
    rng = np.random.default_rng(0)
    n = 1_000_000
    frame = pl.DataFrame(
        {
            "user_id": rng.integers(0, n // 10, n),
            "item_id": rng.integers(0, n // 50, n),
            "timestamp": rng.integers(1_500_000_000, 1_600_000_000, n),
        }
    )
    frame.write_csv(tmp_path / "own.csv")
    script = """
import resource, sys
from pathlib import Path
from courier_fast.data.prepare.layouts import generic
from courier_fast.data.prepare.run import prepare
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before = peak()
prepare(Path(sys.argv[2]), source=generic([Path(sys.argv[1])]))
print(before, peak())
"""
    arguments = [sys.executable, "-c", script, str(tmp_path / "own.csv"), str(tmp_path / "out")]
    done = subprocess.run(arguments, capture_output=True, text=True, check=True)
    before, after = map(float, done.stdout.split())
    assert after - before < 0.8, (before, after)  # GiB
    assert Dataset(tmp_path / "out").num_pages > n / 2


@pytest.mark.skipif(not HM.is_dir(), reason="the hm-fashion data are not here")
@pytest.mark.parametrize("negatives", ["uniform", "popularity", "category"])
def test_hm_fashion(tmp_path: Path, negatives: str) -> None:
    columns = Columns(category="product_code")
    interactions = pl.read_csv(HM / "interactions.csv", infer_schema=False)
    some = interactions.filter(pl.col("user_id").cast(pl.Int64) <= 60)
    some.write_csv(tmp_path / "some.csv")
    source = generic([tmp_path / "some.csv"], HM / "items.csv", columns)
    options = PrepareOptions(negatives=negatives, shrink=96)
    report = prepare(tmp_path / "out", source=source, images=HM / "images", options=options)
    data = Dataset(tmp_path / "out")
    assert report["events"] == {"read": len(some), "kept": len(some), "dropped": {}}
    assert report["users"] == some["user_id"].n_unique()
    assert data.num_items == some["item_id"].n_unique() == report["images"]["usable"]
    assert report["images"]["missing"] == []
    assert report["images"]["undecodable"] == {}
    assert data.images.present.all()
    assert data.images.shapes.min(1).max() == 96
    assert data.item_ids.to_pylist() == sorted(set(some["item_id"]))
    assert [len(i) for i in data.item_ids.to_pylist()] == [10] * data.num_items
    assert (data.event_time[data.history_end - 1] < data.page_time).all()
    codes = np.array([i[:-3] for i in data.item_ids.to_pylist()])
    if negatives == "category":  # product_code joins colour variants
        page = np.repeat(np.arange(data.num_pages), data.pv_end - data.pv_start)
        clicked = data.pv_item[data.pv_clicked][page]
        assert (codes[data.pv_item] == codes[clicked])[~data.pv_clicked].any()


def test_a_page_is_hashed_by_its_bytes_alone() -> None:
    ids = ["", "a", "page 17", "é", "x" * 1000]
    mask = 2**64 - 1

    def plain(text: str) -> int:
        value = 0xCBF29CE484222325
        for byte in text.encode():
            value = (value ^ byte) * 0x100000001B3 & mask
        value = (value ^ value >> 30) * 0xBF58476D1CE4E5B9 & mask
        value = (value ^ value >> 27) * 0x94D049BB133111EB & mask
        return value ^ value >> 31

    assert hash_ids(pl.Series(ids)[1:]).to_list() == [plain(i) for i in ids[1:]]
    assert hash_ids(pl.Series(ids)).to_list() == [plain(i) for i in ids]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("live_days", float("inf")),
        ("live_days", float("nan")),
        ("memory_gib", float("inf")),
        ("seed", 1 << 64),
        ("seed", -1),
        ("threads", -1),
        ("validation_share", float("nan")),
        ("test_share", float("nan")),
    ],
)
def test_options_without_an_upper_limit_were_overflows(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name}.*: expected "):
        PrepareOptions(**{name: value})  # type: ignore[arg-type]


def test_a_question_mark_in_the_output_was_an_option_of_the_database(tmp_path: Path) -> None:
    rows = "".join(f"{n % 3},{n % 7},{1_600_000_000 + n}\n" for n in range(60))
    (tmp_path / "c.csv").write_text("user_id,item_id,timestamp\n" + rows)
    items = "".join(f"{i},{c}\n" for c in ("hat", "shoe") for i in range(7))
    (tmp_path / "i.csv").write_text("item_id,category\n" + items)
    source = generic([tmp_path / "c.csv"], tmp_path / "i.csv")
    options = PrepareOptions(min_history=1, page_size=3, repeats="keep")
    out = tmp_path / "what? a=b"
    report = prepare(out, source=source, options=options)
    assert report["events"]["kept"] == 60
    assert Dataset(out).categories.to_pylist() == ["hat"] * 7
    # The first of several rows is taken, and that is said.
    assert report["notes"] == [
        "items: 7 items have rows that differ (first: 0); the first row is taken"
    ]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.csv", "i.csv", out.name]


def test_columns_that_are_one_and_rows_that_cannot_be_used(tmp_path: Path) -> None:
    clicks = tmp_path / "c.csv"
    clicks.write_text("user_id,item_id,timestamp\nNULL,1,1600000000\n")
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    args = parser.parse_args(["out", "--interactions", str(clicks), "--user-column", "item_id"])
    with pytest.raises(ValueError, match="expected three, got item_id, item_id, timestamp"):
        command.source_of(args)
    with pytest.raises(
        ValueError,
        match=r'c.csv: expected events, got none .* of 1 rows \(1 a missing id, user_id "NULL"\)',
    ):
        prepare(tmp_path / "out", source=generic([clicks]))
