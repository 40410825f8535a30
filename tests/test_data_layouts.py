"""Every importer on small files in the published format, written here."""

from __future__ import annotations

import gzip
import json
from datetime import datetime
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from prepare_factory import digest
from test_prepare import small_parts

from courier_fast.cli import main
from courier_fast.data.dataset import Dataset
from courier_fast.data.prepare import layouts
from courier_fast.data.prepare.layouts import Columns, Source
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.run import prepare
from courier_fast.data.read import truth

NOON = 1_600_000_000  # 2020-09-13 12:26:40 UTC


def events(source: Source) -> list[tuple[str, str, int]]:
    assert source.events is not None
    frame = source.events.select("user_id", "item_id", "time").collect(engine="streaming")
    assert frame.dtypes == [pl.String, pl.String, pl.Int64]
    return frame.rows()


def categories(source: Source) -> dict[str, str | None]:
    assert source.items is not None
    return dict(source.items.select("item_id", "category").collect().rows())


def test_hm(tmp_path: Path) -> None:
    (tmp_path / "transactions_train.csv").write_text(
        "t_dat,customer_id,article_id,price,sales_channel_id\n"
        "2018-09-20,000058a12d5b43e6,0663713001,0.050830508474576264,2\n"
        "2018-09-20,000058a12d5b43e6,0541518023,0.03049152542372881,2\n"
    )
    (tmp_path / "articles.csv").write_text(
        "article_id,product_code,prod_name,product_group_name\n"
        '0663713001,0663713,"Atlanta, Push",Underwear\n'
    )
    source = layouts.hm(tmp_path)
    day = 1_537_401_600
    user = "000058a12d5b43e6"
    assert events(source) == [(user, "0663713001", day), (user, "0541518023", day)]
    assert categories(source) == {"0663713001": "Underwear"}


def test_movielens_csv(tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text(
        f"userId,movieId,rating,timestamp\n1,296,5.0,{NOON}\n1,306,3.5,{NOON + 1}\n"
    )
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n296,"Pulp Fiction, The",Comedy|Crime\n306,Red,(no genres listed)\n'
    )
    source = layouts.movielens(tmp_path)
    assert events(source) == [("1", "296", NOON), ("1", "306", NOON + 1)]
    assert categories(source)["296"] == "Comedy"
    assert events(layouts.movielens(tmp_path, min_rating=4)) == [("1", "296", NOON)]


def test_movielens_dat(tmp_path: Path) -> None:
    (tmp_path / "ratings.dat").write_text(f"1::1193::5::{NOON}\n2::661::3::{NOON}\n")
    # Latin-1, as published.
    (tmp_path / "movies.dat").write_bytes(b"1193::Mis\xe9rables, Les (1995)::Drama|Musical\n")
    source = layouts.movielens(tmp_path, min_rating=4)
    assert events(source) == [("1", "1193", NOON)]
    assert categories(source) == {"1193": "Drama"}


def test_movielens_100k(tmp_path: Path) -> None:
    (tmp_path / "u.data").write_text(f"196\t242\t3\t{NOON}\n")
    assert events(layouts.movielens(tmp_path)) == [("196", "242", NOON)]


@pytest.mark.parametrize("zipped", [False, True])
def test_amazon_reviews_2023(tmp_path: Path, zipped: bool) -> None:
    review = {
        "rating": 5.0,
        "title": "ok",
        "text": "t",
        "images": [{"small_image_url": "u"}],
        "asin": "B1",
        "parent_asin": "0001",
        "user_id": "AEY",
        "timestamp": NOON * 1000 + 7,
        "verified_purchase": True,
    }
    about = {
        "main_category": "All Beauty",
        "title": "x",
        "price": "None",
        "parent_asin": "0001",
        "categories": ["Beauty", "Hair Care", "Brushes"],
    }
    bare = {"main_category": "All Beauty", "parent_asin": "0002", "categories": [], "price": 3.2}
    texts = {
        "All_Beauty.jsonl": [review, {**review, "rating": 1.0}],
        "meta_All_Beauty.jsonl": [about, bare],
    }
    for name, rows in texts.items():
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if zipped:
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(data))
        else:
            (tmp_path / name).write_bytes(data)
    source = layouts.amazon_reviews_2023(tmp_path, min_rating=4)
    assert events(source) == [("AEY", "0001", NOON)]
    assert categories(source) == {"0001": "Hair Care", "0002": "All Beauty"}
    # The ratings alone, where they are there, are read in place of the reviews.
    (tmp_path / "All_Beauty.csv").write_text(
        f"user_id,parent_asin,rating,timestamp\nAEZ,0002,4.0,{NOON}123\n"
    )
    assert events(layouts.amazon_reviews_2023(tmp_path)) == [("AEZ", "0002", NOON)]


def test_microlens(tmp_path: Path) -> None:
    (tmp_path / "MicroLens-50k_pairs.csv").write_text(
        f"user,item,timestamp\n36121,9580,{NOON}999\n"
    )
    assert events(layouts.microlens(tmp_path)) == [("36121", "9580", NOON)]


def test_microlens_sequences_end_together(tmp_path: Path) -> None:
    (tmp_path / "MicroLens-100k_pairs.tsv").write_text("u1\t3 1 2\nu2\t9\n")
    found = events(layouts.microlens(tmp_path))
    assert found == [("u1", "3", -2), ("u1", "1", -1), ("u1", "2", 0), ("u2", "9", 0)]


def test_pixelrec(tmp_path: Path) -> None:
    (tmp_path / "Pixel200K.csv").write_text(f"item_id,user_id,timestamp\ni007,u1,{NOON}\n")
    (tmp_path / "item_info.csv").write_text(
        'item_id,view_number,title,tag,description\ni007,3,"a\nb",Pet Reptiles,\n'
    )
    source = layouts.pixelrec(tmp_path)
    assert events(source) == [("u1", "i007", NOON)]
    assert categories(source) == {"i007": "Pet Reptiles"}


def write_ebnerd(folder: Path) -> None:
    when = datetime(2020, 9, 13, 12, 26, 40)
    pl.DataFrame(
        {
            "article_id": [3, 4],
            "category_str": ["sport", "krimi"],
            "image_ids": [[77, 78], None],
        },
        schema_overrides={"article_id": pl.Int32},
    ).write_parquet(folder / "articles.parquet")
    for number, split in enumerate(("train", "validation")):
        (folder / split).mkdir()
        pl.DataFrame(
            {
                "impression_id": [10 + number],
                "article_id": [None],
                "impression_time": [when],
                "article_ids_inview": [[3, 4, 5]],
                "article_ids_clicked": [[4]],
                "user_id": [1],
            },
            schema_overrides={
                "article_ids_inview": pl.List(pl.Int32),
                "article_ids_clicked": pl.List(pl.Int32),
            },
        ).write_parquet(folder / split / "behaviors.parquet")
        pl.DataFrame(
            {
                "user_id": [1],
                "impression_time_fixed": [[when, when]],
                "article_id_fixed": [[3, 5]],
                "scroll_percentage_fixed": [[1.0, None]],
            }
        ).write_parquet(folder / split / "history.parquet")


def test_ebnerd(tmp_path: Path) -> None:
    write_ebnerd(tmp_path)
    source = layouts.ebnerd(tmp_path)
    assert source.impressions is not None and source.items is not None
    columns = ("page_id", "user_id", "item_id", "time", "clicked")
    shown = source.impressions.select(columns).collect(engine="streaming").rows()
    assert shown == [
        (page, "1", item, NOON, item == "4") for page in ("10", "11") for item in ("3", "4", "5")
    ]
    assert events(source) == [("1", "3", NOON), ("1", "5", NOON)] * 2
    assert source.items.collect().rows() == [("3", "sport", "77"), ("4", "krimi", None)]
    one = layouts.ebnerd(tmp_path / "validation")
    assert one.impressions is not None and one.items is not None
    assert one.impressions.collect()["page_id"].unique().to_list() == ["11"]


@pytest.mark.parametrize(
    ("text", "time"),
    [
        (str(NOON), NOON),
        (f"{NOON}.75", NOON),
        (f"{NOON}123", NOON),
        (f"{NOON}123456", NOON),
        (f"{NOON}123456789", NOON),
        ("2020-09-13", 1_599_955_200),
        ("2020-09-13 12:26:40", NOON),
        ("2020-09-13T12:26:40", NOON),
        ("2020-09-13T12:26:40Z", NOON),
        (" 2020-09-13 12:26:40 UTC ", NOON),
        ("2020-09-13T12:26:40.999Z", NOON),
        ("2020-09-13T14:26:40+02:00", NOON),
        ("2020-09-13 12:26", NOON - 40),
        ("yesterday", None),
        ("2020-13-13", None),
        ("", None),
    ],
)
def test_generic_reads_times_in_every_form(tmp_path: Path, text: str, time: int | None) -> None:
    # Beside others of its kind.
    other = (
        text
        if text.isdigit()
        else "2000-01-01"
        if ":" in text or time is None or "-" in text
        else NOON
    )
    path = tmp_path / "own.csv"
    path.write_text(f"user_id,item_id,timestamp\n007,0001,{text}\nu,i,{other}\n")
    found = events(layouts.generic([path]))
    expected = {"2000-01-01": 946_684_800}.get(str(other), NOON)
    assert found == [("007", "0001", time), ("u", "i", expected)]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "Europe/Copenhagen"])
def test_generic_reads_parquet_times(tmp_path: Path, unit: str, zone: str | None) -> None:
    moment = pl.Series([datetime(2020, 9, 13, 12, 26, 40)]).cast(pl.Datetime(unit))  # type: ignore[arg-type]
    if zone:
        moment = moment.dt.replace_time_zone("UTC").dt.convert_time_zone(zone)
    path = tmp_path / "own.parquet"
    pl.DataFrame({"user_id": [7], "item_id": [1], "timestamp": moment}).write_parquet(path)
    assert events(layouts.generic([path])) == [("7", "1", NOON)]


def test_generic_pages_and_items(tmp_path: Path) -> None:
    path, about = tmp_path / "shown.tsv", tmp_path / "items.jsonl"
    path.write_text(
        "who\tsku\twhen\tview\tbought\n"
        + "".join(
            f"a\t0{i}\t{NOON}\tp\t{mark}\n"
            for i, mark in enumerate(["1", "0", "true", "no", "1.0"])
        )
    )
    about.write_text('{"sku": "00", "kind": "shoe", "first_seen": "2020-09-13"}\n')
    columns = Columns("who", "sku", "when", "kind", page="view", clicked="bought")
    source = layouts.generic([path, path], about, columns)
    assert source.events is None and source.impressions is not None and source.items is not None
    shown = source.impressions.collect()
    assert len(shown) == 10
    assert truth.read(shown["clicked"]).to_list()[:5] == [True, False, True, False, True]
    assert source.items.collect().rows() == [("00", "shoe", 1_599_955_200)]


def test_errors_name_the_file_and_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "own.csv"
    path.write_text("user,item_id,timestamp\n1,2,3\n")
    with pytest.raises(
        ValueError, match=r"own.csv: expected .*user_id.*got user, item_id.*missing"
    ):
        layouts.generic([path])
    other = tmp_path / "own.xlsx"
    other.write_text("")
    with pytest.raises(ValueError, match="expected a .csv"):
        layouts.generic([other])
    with pytest.raises(FileNotFoundError, match="not there"):
        layouts.generic([tmp_path / "none.csv"])
    with pytest.raises(ValueError, match="at least one file"):
        layouts.generic([])


@pytest.mark.parametrize("name", layouts.LAYOUTS)
def test_a_folder_of_something_else_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "readme.md").write_text("hello")
    with pytest.raises(FileNotFoundError, match=r"expected .*got .*readme.md"):
        layouts.LAYOUTS[name](tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        layouts.LAYOUTS[name](tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("hm", "transactions_train.csv"),
        ("movielens", "ratings.csv"),
        ("amazon-reviews-2023", "All_Beauty.csv"),
        ("microlens", "MicroLens-50k_pairs.csv"),
        ("pixelrec", "Pixel1M.csv"),
        ("ninerec", "QB_pair.csv"),
    ],
)
def test_another_header_is_refused(name: str, file: str, tmp_path: Path) -> None:
    (tmp_path / file).write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=rf"{file}: expected the columns .*, got a, b"):
        layouts.LAYOUTS[name](tmp_path)


def write_mmctr(folder: Path, *, labels: bool = True) -> None:
    """Twelve pages a split, of three rows each: one history, three items."""
    rng = np.random.default_rng(0)
    (folder / "MicroLens_1M_x1").mkdir()
    for split in ("train", "valid", "test"):
        rows = []
        for page in range(12):
            past = [0, 0, *rng.integers(1, 20, 4).tolist()]
            for place, item in enumerate(rng.choice(np.arange(1, 30), 3, replace=False).tolist()):
                rows.append((page % 4, past, item, 3, 5, int(place == page % 3)))
        names = ["user_id", "item_seq", "item_id", "likes_level", "views_level", "label"]
        frame = pl.DataFrame(rows, names, orient="row")
        frame = frame if labels or split != "test" else frame.drop("label")
        frame.write_parquet(folder / f"MicroLens_1M_x1/{split}.parquet")
    about = {"item_id": list(range(30)), "item_tags": [[i % 3 + 1, 0, 0, 0, 0] for i in range(30)]}
    about["item_emb_d128"] = [[0.5] * 128] * 30
    pl.DataFrame(about).write_parquet(folder / "MicroLens_1M_x1/item_info.parquet")


@pytest.mark.parametrize("labels", [True, False])
def test_mmctr(tmp_path: Path, labels: bool) -> None:
    write_mmctr(tmp_path, labels=labels)
    source = layouts.mmctr(tmp_path)
    assert categories(source)["4"] == "2" and "0" not in categories(source)
    report = prepare(tmp_path / "out", source=source, options=PrepareOptions(min_history=1))
    data = Dataset(tmp_path / "out")
    assert {n: of["pages"] for n, of in report["splits"].items()} == {
        "train": 12,
        "validation": 12,
        "test": 12 * labels,
    }
    assert (data.pv_end - data.pv_start).tolist() == [3] * data.num_pages
    train = pl.read_parquet(tmp_path / "MicroLens_1M_x1/train.parquet")
    ids = [int(i) for i in data.item_ids.to_pylist()]
    first = train[:3]
    assert [ids[i] for i in data.pv_item[:3]] == first["item_id"].to_list()
    assert data.pv_clicked[:3].tolist() == [bool(c) for c in first["label"]]
    hit = first.filter(label=1)["item_id"][0]
    past = [i for i in first["item_seq"][0].to_list() if i not in (0, hit)]
    newest = list(dict.fromkeys(past[::-1]))[::-1]
    assert [ids[i] for i in data.event_item[data.history_start[0] : data.history_end[0]]] == newest
    assert any("no labels" in note for note in report["notes"]) is not labels


def write_qilin(folder: Path, form: str, kind: str = "recommendation") -> None:
    rng = np.random.default_rng(len(kind))
    field = f"{'rec' if kind == 'recommendation' else kind}_result_details_with_idx"
    for split, pages in (("train", 30), ("test", 10)):
        rows = []
        for page in range(pages):
            notes = rng.choice(40, 4, replace=False).tolist()
            order = rng.permutation(4).tolist()
            results = [
                {"note_idx": notes[i], "position": i, "click": int(i == 1), "like": 0, "share": 0}
                for i in order
            ]
            rows.append(
                {
                    "request_idx": page,
                    "user_idx": page % 5,
                    "session_idx": page,
                    "recent_clicked_note_idxs": rng.choice(40, 5, replace=False).tolist(),
                    field: results if form == "objects" else json.dumps(results),
                    **({"query": f"query {page}"} if kind == "search" else {}),
                }
            )
        name = f"{kind}_{split}"
        (folder / name).mkdir()
        half = pages // 3
        pl.DataFrame(rows[:half]).write_parquet(folder / name / "train-00000-of-00002.parquet")
        pl.DataFrame(rows[half:]).write_parquet(folder / name / "train-00001-of-00002.parquet")
    (folder / "notes").mkdir(exist_ok=True)
    notes = {"note_idx": list(range(40)), "taxonomy1_id": ["home", "food"] * 20}
    notes["image_path"] = [
        [f"image/part_{i % 3}/img_{i}.jpg", "image/other.jpg"] for i in range(40)
    ]
    pl.DataFrame(notes).write_parquet(folder / "notes/train-00000-of-00001.parquet")


@pytest.mark.parametrize("form", ["objects", "json"])
def test_qilin(tmp_path: Path, form: str) -> None:
    write_qilin(tmp_path, form)
    source = layouts.qilin(tmp_path)
    assert source.items is not None
    about = source.items.collect().rows()
    assert about[:2] == [("0", "home", "img_0"), ("1", "food", "img_1")]
    report = prepare(tmp_path / "out", source=source, options=PrepareOptions(min_history=1))
    data = Dataset(tmp_path / "out")
    splits = {n: of["pages"] for n, of in report["splits"].items()}
    assert splits == {"train": 27, "validation": 3, "test": 10}
    # In order of positions the second is clicked.
    assert data.pv_clicked.reshape(-1, 4).tolist() == [[False, True, False, False]] * 40
    first = pl.read_parquet(tmp_path / "recommendation_train/*.parquet").row(0, named=True)
    results = first["rec_result_details_with_idx"]
    results = json.loads(results) if form == "json" else results
    shown = [r["note_idx"] for r in sorted(results, key=lambda r: r["position"])]
    ids = [int(i) for i in data.item_ids.to_pylist()]
    assert [ids[i] for i in data.pv_item[:4]] == shown
    past = [i for i in first["recent_clicked_note_idxs"] if i != shown[1]]
    assert [ids[i] for i in data.event_item[data.history_start[0] : data.history_end[0]]] == past


def qilin_shown(folder: Path, kind: str, split: str) -> list[list[int]]:
    """The notes of each page, in order of their positions."""
    field = f"{'rec' if kind == 'recommendation' else kind}_result_details_with_idx"
    rows = pl.read_parquet(folder / f"{kind}_{split}/*.parquet")[field]
    of = [json.loads(row) if isinstance(row, str) else row for row in rows.to_list()]
    return [[r["note_idx"] for r in sorted(page, key=lambda r: r["position"])] for page in of]


@pytest.mark.parametrize("form", ["objects", "json"])
@pytest.mark.parametrize("kind", ["recommendation", "search"])
def test_qilin_pages_of_one_kind(tmp_path: Path, kind: str, form: str) -> None:
    """Two files each; the other kind is not looked at."""
    write_qilin(tmp_path, form, kind)
    line = ["prepare", str(tmp_path / "out"), "--layout", "qilin", "--source", str(tmp_path)]
    assert main([*line, "--min-history", "1", "--pages", kind]) == 0
    data = Dataset(tmp_path / "out")
    ids = np.array([int(i) for i in data.item_ids.to_pylist()])
    expected = [page for split in ("train", "test") for page in qilin_shown(tmp_path, kind, split)]
    assert ids[data.pv_item].reshape(-1, 4).tolist() == expected
    assert {n: len(data.split(n)) for n in ("train", "validation", "test")} == {
        "train": 27,
        "validation": 3,
        "test": 10,
    }
    other = {"recommendation": "search", "search": "recommendation"}[kind]
    for pages in (other, "both"):
        with pytest.raises(FileNotFoundError, match=rf"expected {other}_train\*.parquet"):
            layouts.qilin(tmp_path, pages)
    with pytest.raises(ValueError, match="pages: expected one of recommendation, search, both, go"):
        layouts.qilin(tmp_path, "all")


def test_qilin_pages_of_both_kinds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind keeps its order, and every stretch has both."""
    write_qilin(tmp_path, "json", "search")
    write_qilin(tmp_path, "objects")
    expected = {
        (kind, split): qilin_shown(tmp_path, kind, split)
        for kind in ("recommendation", "search")
        for split in ("train", "test")
    }
    digests = []
    for parts in (False, True):
        if parts:
            small_parts(monkeypatch)
        options = PrepareOptions(min_history=1, overwrite=True)
        report = prepare(tmp_path / "out", source=layouts.qilin(tmp_path, "both"), options=options)
        digests.append(digest(tmp_path / "out"))
    assert digests[0] == digests[1]
    assert {n: of["pages"] for n, of in report["splits"].items()} == {
        "train": 54,
        "validation": 6,
        "test": 20,
    }
    data = Dataset(tmp_path / "out")
    ids = np.array([int(i) for i in data.item_ids.to_pylist()])
    shown = ids[data.pv_item].reshape(-1, 4).tolist()
    for split, rows in (("train", shown[:60]), ("test", shown[60:])):
        kinds = ["search" if page in expected["search", split] else "rec" for page in rows]
        for kind in ("recommendation", "search"):
            of = [p for p, k in zip(rows, kinds, strict=True) if kind.startswith(k)]
            assert of == expected[kind, split]
        each = np.array(kinds).reshape(-1, 2)
        assert (each == ["rec", "search"]).all()


def test_ninerec(tmp_path: Path) -> None:
    (tmp_path / "QB_behaviour.tsv").write_text("u1\t3 1 2\nu2\t9\n")
    (tmp_path / "QB_item.csv").write_text("3,a title,another\n")
    ordered = [("u1", "3", -2), ("u1", "1", -1), ("u1", "2", 0), ("u2", "9", 0)]
    assert events(layouts.ninerec(tmp_path)) == ordered
    (tmp_path / "QB_pair.csv").write_text("user,item\nu1,3\n")  # without times
    assert events(layouts.ninerec(tmp_path)) == ordered
    (tmp_path / "QB_pair.csv").write_text(f"user,item,timestamp\nu1,3,{NOON}\n")
    assert events(layouts.ninerec(tmp_path)) == [("u1", "3", NOON)]


def write_taobao(folder: Path) -> None:
    """Users in both splits; one has two rows of features, one has none, one no sample."""
    rng = np.random.default_rng(0)
    users = [-7, *range(1, 20)]
    for split in ("train", "test"):
        samples = [
            (user, int(item), [int(n != 1), int(n == 1)])
            for user in users
            for n, item in enumerate(rng.choice(np.arange(-15, 0), 4, replace=False))
        ]
        pl.DataFrame(
            samples, {"129_1": pl.Int64, "205": pl.Int64, "label_0": pl.List(pl.Int8)}, orient="row"
        ).write_parquet(folder / f"{split}_samples.parquet")
        rows = [(user, rng.integers(-15, 30, 8).tolist()) for user in [3, *users[:-1], 99]]
        past = pl.DataFrame(rows, {"129_1": pl.Int64, "150_2_180": pl.List(pl.Int64)}, orient="row")
        past.with_columns(pl.col("150_2_180").alias("151_2_180")).write_parquet(
            folder / f"{split}_user_features.parquet", row_group_size=5
        )
    about = {"205": list(range(-15, 30)), "206": [i % 4 for i in range(45)]}
    pl.DataFrame(about).write_parquet(folder / "item_features.parquet")


def test_taobao_mm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_taobao(tmp_path)
    found = []
    for parts in (False, True):
        if parts:
            small_parts(monkeypatch)
        options = PrepareOptions(min_history=1, max_history=5, overwrite=True)
        report = prepare(tmp_path / "out", source=layouts.taobao_mm(tmp_path), options=options)
        found.append(digest(tmp_path / "out"))
    assert found[0] == found[1]
    data = Dataset(tmp_path / "out")
    ids, users = [int(i) for i in data.item_ids.to_pylist()], data.user_ids.to_pylist()
    assert "99" not in users and "-7" in users
    assert {n: of["pages"] for n, of in report["splits"].items()} == {
        "train": 17,
        "validation": 2,
        "test": 19,
    }
    assert report["pages"]["dropped"] == {"fewer earlier events than --min-history": 2}
    for page in range(data.num_pages):
        split = "test" if page >= 19 else "train"
        user = int(users[data.page_user[page]])
        samples = pl.read_parquet(tmp_path / f"{split}_samples.parquet").filter(
            pl.col("129_1") == user
        )
        shown = [ids[i] for i in data.pv_item[data.pv_start[page] : data.pv_end[page]]]
        assert shown == samples["205"].to_list()
        of = pl.read_parquet(tmp_path / f"{split}_user_features.parquet")
        past = of.filter(pl.col("129_1") == user)["150_2_180"][0].to_list()
        past = [i for i in past if i not in (0, shown[1])]
        newest = list(dict.fromkeys(past[::-1]))[:5][::-1]
        history = data.event_item[data.history_start[page] : data.history_end[page]]
        assert [ids[i] for i in history] == newest
