"""The drawn catalogue, the simulated users and the report."""

from __future__ import annotations

import argparse
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from dataset_factory import make_dataset
from PIL import Image

from courier_fast.data.dataset import Dataset, read_table, write_table
from courier_fast.quickstart import catalogue, command, report
from courier_fast.quickstart.users import Behaviour, item_codes, liking, simulate, user_tastes

# ---- catalogue ----------------------------------------------------------------------------------------------------


def draw(folder: Path, count: int, seed: int = 0) -> tuple[pa.Table, dict[str, bytes]]:
    table = catalogue.draw_catalogue(folder, count, seed)
    return table, {path.stem: path.read_bytes() for path in folder.iterdir()}


def test_pictures_are_the_same_bytes_for_the_same_seed(tmp_path: Path) -> None:
    table, pictures = draw(tmp_path / "a", 12)
    again, same = draw(tmp_path / "b", 12)
    shorter, some = draw(tmp_path / "c", 5)
    _, other = draw(tmp_path / "d", 12, seed=1)
    assert table == again and pictures == same
    assert table.slice(0, 5) == shorter and some.items() <= pictures.items()
    assert all(pictures[name] != other[name] for name in pictures)
    assert len(set(pictures.values())) == 12


def test_every_garment_is_drawn_in_every_pattern() -> None:
    for garment in catalogue.GARMENTS:
        for pattern in catalogue.PATTERNS:
            for cut in catalogue.CUTS:
                item = catalogue.Item("00000", garment, pattern, "marine", cut)
                with Image.open(io.BytesIO(catalogue.draw_item(item, 3, 0))) as image:
                    assert image.format == "JPEG" and image.mode == "RGB"
                    assert image.size == (catalogue.SIDE, catalogue.SIDE)
                    assert np.asarray(image).std() > 5  # not one colour


def test_attributes_are_drawn_independently() -> None:
    items = [catalogue.make_item(i, 0) for i in range(2000)]
    for name, values in (
        ("category", catalogue.GARMENTS),
        ("pattern", catalogue.PATTERNS),
        ("palette", catalogue.PALETTES),
        ("cut", catalogue.CUTS),
    ):
        counts = {v: sum(getattr(i, name) == v for i in items) for v in values}
        expected = len(items) / len(counts)
        assert all(0.7 * expected < c < 1.3 * expected for c in counts.values()), (name, counts)
    styles = {(i.category, i.pattern, i.palette) for i in items}
    assert len(styles) > 0.98 * 10 * 6 * 6


def test_catalogue_refuses_no_items(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="count: expected at least 1, got 0"):
        catalogue.draw_catalogue(tmp_path, 0)


# ---- users --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """300 drawn items and 200 users: views, and pictures as means."""
    folder = tmp_path_factory.mktemp("shop")
    table, pictures = draw(folder, 300)
    views, like = simulate(table, 200, behaviour=Behaviour(pages=12))
    pixels = []
    for item in table.column("item_id").to_pylist():
        with Image.open(io.BytesIO(pictures[item])) as image:
            pixels.append(np.asarray(image.resize((8, 8), Image.Resampling.BOX), np.float64))
    return {"catalogue": table, "views": views, "liking": like, "pixels": np.stack(pixels)}


def pages_of(shop: dict[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Users [pages], times [pages], items and clicks [pages, shown]."""
    views = shop["views"]
    row = {v: i for i, v in enumerate(shop["catalogue"].column("item_id").to_pylist())}
    items = np.array([row[i] for i in views.column("item_id").to_pylist()]).reshape(-1, 8)
    users = np.array(views.column("user_id").to_pylist())[::8]
    times = views.column("timestamp").to_numpy()[::8]
    return users, times, items, views.column("clicked").to_numpy().reshape(-1, 8)


def page_auc(clicked: np.ndarray, score: np.ndarray) -> float:
    """Mean over clicks of the share of the page's other items below, ties one half."""
    values = []
    for c, s in zip(clicked, score, strict=True):
        if c.any() and not c.all() and np.isfinite(s).all():
            difference = s[c][:, None] - s[~c][None, :]
            values.append(((difference > 0) + 0.5 * (difference == 0)).mean())
    return float(np.mean(values))


def by_history(shop: dict[str, Any], features: np.ndarray) -> float:
    """AUC of the mean cosine to what the user clicked before, features standardised."""
    deviation = features.std(0)
    x = (features - features.mean(0)) / np.where(deviation > 0, deviation, 1)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    users, times, items, clicked = pages_of(shop)
    score = np.full(items.shape, np.nan)
    for page, (user, time) in enumerate(zip(users, times, strict=True)):
        before = (users == user) & (times < time)
        history = items[before][clicked[before]]
        if len(history) >= 3:
            score[page] = (x[items[page]] @ x[history].T).mean(1)
    return page_auc(clicked, score)


def one_hot(names: list[str]) -> np.ndarray:
    return (np.array(names)[:, None] == np.unique(names)).astype(np.float64)


def test_clicks_follow_taste_and_nothing_else(shop: dict[str, Any]) -> None:
    _, _, _, clicked = pages_of(shop)
    columns = {n: shop["catalogue"].column(n).to_pylist() for n in shop["catalogue"].column_names}
    style = [f"{a} {b}" for a, b in zip(columns["pattern"], columns["palette"], strict=True)]
    taste = page_auc(clicked, shop["liking"].reshape(-1, 8))
    attributes = by_history(
        shop, np.hstack([one_hot(columns["pattern"]), one_hot(columns["palette"]), one_hot(style)])
    )
    category = by_history(shop, one_hot(columns["category"]))
    colour = by_history(shop, shop["pixels"].mean((1, 2)))
    pixels = by_history(shop, shop["pixels"].reshape(300, -1))
    assert taste > 0.88
    assert attributes > 0.78
    assert 0.46 < category < 0.54
    assert 0.46 < colour < 0.58
    assert 0.46 < pixels < 0.6


def test_views_are_well_formed(shop: dict[str, Any]) -> None:
    users, times, items, clicked = pages_of(shop)
    views = shop["views"]
    assert views.column_names == ["page_id", "user_id", "item_id", "timestamp", "clicked"]
    pages = np.array(views.column("page_id").to_pylist()).reshape(-1, 8)
    assert (pages == pages[:, :1]).all() and len(set(pages[:, 0])) == len(pages) == 200 * 12
    assert (np.diff(times) >= 0).all()
    for user in np.unique(users)[:50]:
        own = users == user
        assert len(np.unique(times[own])) == 12  # no two pages at once
        assert len(np.unique(items[own])) == 12 * 8  # nothing shown twice
    clicks = clicked.sum(1)
    assert set(clicks) == {0, 1, 2}
    assert abs((clicks == 0).mean() - 0.1) < 0.03 and abs((clicks == 2).mean() - 0.15) < 0.03
    again, _ = simulate(shop["catalogue"], 200, behaviour=Behaviour(pages=12))
    assert again == views


def test_liking_counts_the_best_taste() -> None:
    tastes = np.array([[[0, 1, 0], [2, 3, 1]]])
    items = np.array([[[0, 1, 0], [0, 1, 1], [2, 1, 0], [2, 3, 1], [4, 4, 1]]])
    np.testing.assert_allclose(liking(tastes[:, None], items), [[3.3, 3.0, 1.3, 3.3, 0.3]])


def test_tastes_of_a_user_differ() -> None:
    tastes = user_tastes(500, 2, 0)
    assert (tastes[:, 0, :2] != tastes[:, 1, :2]).all()


def test_simulation_refuses_a_catalogue_too_small(shop: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"256 items .* got 10 and 100"):
        simulate(shop["catalogue"].slice(0, 100), 10)
    assert item_codes(shop["catalogue"]).shape == (300, 3)


# ---- report -------------------------------------------------------------------------------------------------------


class Page(HTMLParser):
    """What of a page would be fetched, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.images: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.sources += [v or "" for n, v in attrs if n in ("src", "href", "srcset", "data")]
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_data(self, data: str) -> None:
        if self.tags[-1:] != ["style"]:
            self.words.append(data)


def cell(mean: float) -> dict[str, float]:
    return {"mean": mean, "low": mean - 0.0213, "high": mean + 0.0197}


def results() -> dict[str, Any]:
    """As `compare` gives it."""
    values = {
        "trained": 0.4127, "pixels 8x8": 0.1561, "pixels 8x8, standardised": 0.1583, "untrained backbone": 0.1444,
        "untrained backbone, standardised": 0.1711, "random": 0.1306,
    }  # fmt: skip
    one = {
        "pages": 100, "clicks": 120, "users": 20, "mean_candidates": 7.9,
        "methods": {m: {"HR@1": cell(v), "AUC": cell(v + 0.3)} for m, v in values.items()},
        "differences": {
            m: {"HR@1": cell(values["trained"] - v), "AUC": cell(0.1)} for m, v in values.items() if m != "trained"
        },
    }  # fmt: skip
    return {"settings": {"main": "trained"}, "sets": {"page": one, "sampled": one}, "missing": {}}


@pytest.fixture
def tiny(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "dataset")


def embeddings_of(dataset: Dataset) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(dataset.num_items, 16)).astype(np.float32)


def write(tmp_path: Path, dataset: Dataset, **more: Any) -> str:
    run = tmp_path / "run"
    run.mkdir(exist_ok=True)
    lines = [
        {"step": s, "loss_rec": 5 - s / 9, "uniformity": -s / 9, "top1": 0.1 * s}
        for s in range(1, 9)
    ]
    lines[3]["loss_rec"] = lines[0]["top1"] = float("nan")
    (run / "metrics.jsonl").write_text(
        "".join(f"{json.dumps(x)}\n" for x in lines) + '{"step": 9, "lo'
    )
    path = tmp_path / "report.html"
    report.write_report(
        path,
        **{
            "run_dir": run, "dataset": dataset, "embeddings": embeddings_of(dataset), "results": results(),
            "seconds": {"Draw": 3.21, "Train": 99.0}, "settings": {"Network": "a < b"}, **more,
        },
    )  # fmt: skip
    return path.read_text()


def test_report_is_one_file(tmp_path: Path, tiny: Dataset) -> None:
    text = write(tmp_path, tiny)
    page = Page(text)
    assert page.images and all(s.startswith("data:image/jpeg;base64,") for s in page.sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert all(image["alt"] for image in page.images)
    assert page.tags.count("svg") == 3  # loss, top-1, uniformity: what the journal has


def test_headline_has_the_numbers_of_the_results(tmp_path: Path, tiny: Dataset) -> None:
    words = " ".join(Page(write(tmp_path, tiny)).words)
    sentence = report.headline(results(), "page", "HR@1")
    assert sentence in words
    # Of each baseline the better of raw and standardised: nothing is compared with its weaker form.
    assert re.findall(r"[\d.]+(?=\s%)", sentence) == ["41.3", "15.8", "17.1"]
    leads = report.margins(results(), "page", "HR@1")
    assert leads[0] == {"name": "Untrained backbone, standardised", "text": "+24.2 (22.0 to 26.1)"}
    assert leads[0]["text"] in words
    assert "0.413" in words and "0.391 to 0.432" in words


def test_a_worse_embedding_is_not_praised(tmp_path: Path, tiny: Dataset) -> None:
    worse = results()
    for row in worse["sets"]["page"]["differences"].values():
        row["HR@1"] = {"mean": -0.05, "low": -0.08, "high": -0.01}
    words = " ".join(Page(write(tmp_path, tiny, results=worse)).words)
    assert (
        "-5.0 (-8.0 to -1.0)" in words.replace(report.MINUS, "-")
        and "+" not in report.margins(worse, "page", "HR@1")[0]["text"]
    )


def test_report_prints_no_nan(tmp_path: Path, tiny: Dataset) -> None:
    broken = results()
    broken["sets"]["page"]["methods"]["random"]["AUC"] = dict.fromkeys(
        ("mean", "low", "high"), float("nan")
    )
    embeddings = embeddings_of(tiny)
    embeddings[7] = np.nan
    text = write(tmp_path, tiny, results=broken, embeddings=embeddings)
    page = Page(text)
    assert "nan%" not in text and 'nan"' not in text
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(page.words), re.IGNORECASE)
    assert report.NONE in " ".join(page.words)


def test_ids_are_escaped(tmp_path: Path, tiny: Dataset) -> None:
    items = read_table(tiny.path / "items.arrow")
    columns = {n: items.column(n) for n in items.schema.names}
    columns["item_id"] = pa.array([f'<script>alert("{i}")</script>' for i in range(tiny.num_items)])
    columns["category"] = pa.array(['"><b>'] * tiny.num_items)
    (tiny.path / "items.arrow").rename(tiny.path / "old.arrow")
    write_table(tiny.path / "items.arrow", columns)
    page = Page(write(tmp_path, Dataset(tiny.path)))
    assert "script" not in page.tags
    assert any('<script>alert("' in word for word in page.words)
    assert '"><b>' in (page.images[0]["alt"] or "")


def test_an_item_without_a_picture_is_shown_as_such(tmp_path: Path, tiny: Dataset) -> None:
    assert report.thumbnail(tiny, 0) is not None
    store = tiny.images
    store._map = store._map.copy()
    store._map[store._starts[0] : store._ends[0]] = 0
    assert report.thumbnail(tiny, 0) is None
    assert 'class="none"' in write(tmp_path, tiny)


def test_attention_weights_are_those_of_the_loss(tiny: Dataset) -> None:
    embeddings = embeddings_of(tiny)
    for example in report.attention_examples(tiny, embeddings, history=4, count=3, seed=0):
        weights = [past["weight"] for past in example["history"]]
        assert weights == sorted(weights, reverse=True) and len(weights) <= 4
        row = {i: n for n, i in enumerate(tiny.item_ids.to_pylist())}
        own = embeddings[row[example["clicked"]["id"]]]
        logits = np.array([embeddings[row[p["id"]]] @ own for p in example["history"]]) / 4
        expected = np.exp(logits - logits.max())
        np.testing.assert_allclose(weights, expected / expected.sum(), rtol=1e-4)


def test_neighbours_are_nearest_and_never_the_item_itself(tiny: Dataset) -> None:
    embeddings = embeddings_of(tiny)
    x = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    row = {i: n for n, i in enumerate(tiny.item_ids.to_pylist())}
    found = report.neighbours(tiny, embeddings, count=4)
    assert len({f["query"]["category"] for f in found[:3]}) == 3
    for f in found:
        query = row[f["query"]["id"]]
        order = np.argsort(-(x @ x[query]))
        assert [row[n["id"]] for n in f["near"]] == order[1:7].tolist()


def test_collapse_is_named(tmp_path: Path, tiny: Dataset) -> None:
    flat = np.ones((tiny.num_items, 16), np.float32)
    assert "Collapsed" in write(tmp_path, tiny, embeddings=flat)
    assert "No sign of collapse" in write(tmp_path, tiny)


def test_report_refuses_what_does_not_fit(tmp_path: Path, tiny: Dataset) -> None:
    with pytest.raises(ValueError, match=r"embeddings: expected \[50, D\]"):
        write(tmp_path, tiny, embeddings=np.zeros((3, 4), np.float32))
    with pytest.raises(ValueError, match="results: expected what `compare` gives"):
        write(tmp_path, tiny, results={"settings": {"main": "trained"}, "sets": {}})


# ---- command ------------------------------------------------------------------------------------------------------


def test_quickstart_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="expected an empty folder"):
        command.quickstart(tmp_path, command.SHORT)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_short_quickstart_runs_to_the_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    arguments = ["--short", "--steps", "2", "--items", "180", "--users", "30", "--out", str(out)]
    assert command.run(parser.parse_args(arguments)) == 0
    found = json.loads((out / "results.json").read_text())
    assert report.headline(found, "page", "HR@1") in " ".join(
        Page((out / "report.html").read_text()).words
    )
    assert "report.html" in capsys.readouterr().out
