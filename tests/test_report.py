"""The report: one file, with the numbers of the results and nothing that would be fetched."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from dataset_factory import columns_of, images_of, make_dataset, rewrite

from courier_fast.cli import main
from courier_fast.data.dataset import Dataset
from courier_fast.data.images import thumbnails
from courier_fast.evaluate.scores import history_scores
from courier_fast.evaluate.targets import find_targets, sampled_candidates
from courier_fast.metrics.ranks import count_ranks
from courier_fast.report import items, sections, text
from courier_fast.report.page import About, write_report
from courier_fast.train.config import Config
from courier_fast.train.trainer import Trainer


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
        "trained": 0.4127,
        "pixels 8x8": 0.1561,
        "pixels 8x8, standardised": 0.1583,
        "untrained backbone": 0.1444,
        "untrained backbone, standardised": 0.1711,
        "random": 0.1306,
    }
    one = {
        "pages": 100,
        "clicks": 120,
        "users": 20,
        "mean_candidates": 7.9,
        "methods": {m: {"HR@1": cell(v), "AUC": cell(v + 0.3)} for m, v in values.items()},
        "differences": {
            m: {"HR@1": cell(values["trained"] - v), "AUC": cell(0.1)}
            for m, v in values.items()
            if m != "trained"
        },
    }
    return {"settings": {"main": "trained"}, "sets": {"page": one, "sampled": one}, "missing": {}}


PREPARED = {
    "events": {"read": 1234, "kept": 1200, "dropped": {"no item": 34}},
    "pages": {"candidates": 99, "kept": 90, "dropped": {"nothing clicked": 9}, "unclicked": 17},
    "images": {"missing": ["a"], "undecodable": {}},
    "splits": {
        "train": {"pages": 80, "from": "2020-01-01T00:00:00", "to": "2020-02-03T00:00:00"},
        "test": {"pages": 0},
    },
}


@pytest.fixture
def tiny(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "dataset")


def embeddings_of(dataset: Dataset) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(dataset.num_items, 16)).astype(np.float32)


def write(tmp_path: Path, dataset: Dataset, **more: Any) -> str:
    given = more.pop("results", results())
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
    options: dict[str, Any] = {
        "embeddings": embeddings_of(dataset),
        "seconds": {"Draw": 3.21, "Train": 99.0},
        "settings": {"Network": "a < b"},
        **more,
    }
    write_report(
        path,
        About(dataset, run, **options),
        given,
    )
    return path.read_text()


def test_report_is_one_file(tmp_path: Path, tiny: Dataset) -> None:
    html = write(tmp_path, tiny)
    page = Page(html)
    assert page.images and all(s.startswith("data:image/jpeg;base64,") for s in page.sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "http" not in html and "url(" not in html and "@import" not in html
    assert all(image["alt"] for image in page.images)
    assert page.tags.count("svg") == 4  # the map; loss, top-1, uniformity: what the journal has


def test_headline_has_the_numbers_of_the_results(tmp_path: Path, tiny: Dataset) -> None:
    words = " ".join(Page(write(tmp_path, tiny)).words)
    sentence = text.headline(results(), "page", "HR@1")
    assert sentence in words
    # Of each baseline the better of raw and standardised: nothing is compared with its weaker form.
    assert re.findall(r"[\d.]+(?=\s%)", sentence) == ["41.3", "15.8", "17.1"]
    leads = text.margins(results(), "page", "HR@1")
    assert leads[0] == {"name": "Untrained backbone, standardised", "text": "+24.2 (22.0 to 26.1)"}
    assert leads[0]["text"] in words
    assert "0.413" in words and "0.391 to 0.432" in words


def test_a_worse_embedding_is_not_praised(tmp_path: Path, tiny: Dataset) -> None:
    worse = results()
    for row in worse["sets"]["page"]["differences"].values():
        row["HR@1"] = {"mean": -0.05, "low": -0.08, "high": -0.01}
    words = " ".join(Page(write(tmp_path, tiny, results=worse)).words)
    assert (
        "-5.0 (-8.0 to -1.0)" in words.replace(text.MINUS, "-")
        and "+" not in text.margins(worse, "page", "HR@1")[0]["text"]
    )


def test_report_prints_no_nan(tmp_path: Path, tiny: Dataset) -> None:
    broken = results()
    broken["sets"]["page"]["methods"]["random"]["AUC"] = dict.fromkeys(
        ("mean", "low", "high"), float("nan")
    )
    embeddings = embeddings_of(tiny)
    embeddings[7] = np.nan
    html = write(tmp_path, tiny, results=broken, embeddings=embeddings)
    page = Page(html)
    assert "nan%" not in html and 'nan"' not in html
    assert not re.search(r"\b(nan|inf|None)\b", " ".join(page.words), re.IGNORECASE)
    assert text.NONE in " ".join(page.words)


def test_ids_are_escaped(tmp_path: Path, tiny: Dataset) -> None:
    columns = columns_of(tiny, "items")
    columns["item_id"] = pa.array([f'<script>alert("{i}")</script>' for i in range(tiny.num_items)])
    columns["category"] = pa.array(['"><b>'] * tiny.num_items)
    page = Page(write(tmp_path, rewrite(tiny, tmp_path / "d", {"items": columns})))
    assert "script" not in page.tags
    assert any('<script>alert("' in word for word in page.words)
    assert '"><b>' in (page.images[0]["alt"] or "")


def test_an_item_without_a_picture_is_shown_as_such(tmp_path: Path, tiny: Dataset) -> None:
    assert thumbnails.data_uri(tiny.images[0].tobytes()) is not None
    images = [(bytes(len(tiny.images[0])), 8, 8), *images_of(tiny)[1:]]
    broken = rewrite(tiny, tmp_path / "d", images=images)
    assert thumbnails.data_uri(broken.images[0].tobytes()) is None
    assert 'class="none"' in write(tmp_path, broken)


def test_attention_weights_are_those_of_the_loss(tiny: Dataset) -> None:
    embeddings = embeddings_of(tiny)
    for example in items.attention_examples(tiny, embeddings, history=4, count=3, seed=0):
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
    found = items.neighbours(tiny, embeddings, count=4)
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


# ---- sections ------------------------------------------------------------------------------------


def test_map_says_how_many_neighbours_are_of_the_same_category(tiny: Dataset) -> None:
    names = [name or "" for name in tiny.categories.to_pylist()]
    codes = {name: i for i, name in enumerate(sorted(set(names)))}
    category = np.array([codes[name] for name in names])
    rng = np.random.default_rng(0)
    told = np.eye(len(codes), 8, dtype=np.float32)[category] + rng.normal(
        0, 0.01, (len(category), 8)
    )
    found = items.map_of_items(tiny, told, nearest=3)
    assert found is not None
    assert "Of the 3 nearest items by cosine 100.0" in found["note"]
    known = category != codes[""]  # an item without a category has no neighbour of its own
    chance = np.bincount(category)[category[known]].mean() / len(category)
    assert f"by chance it would be {text.percent(chance)}" in found["note"]
    assert found["svg"].count("<circle") == tiny.num_items
    assert sorted(found["legend"]) == sorted({*codes, "other"} - {""})
    told[3] = np.nan
    assert items.map_of_items(tiny, told)["svg"].count("<circle") == tiny.num_items - 1  # type: ignore[index]
    assert items.map_of_items(tiny, np.ones((tiny.num_items, 4), np.float32)) is None


def test_slices_are_the_auc_of_their_clicks(tiny: Dataset) -> None:
    """An embedding that knows one category alone is good there: every item of it like all its
    users' histories."""
    embeddings = embeddings_of(tiny)
    charts = sections.slice_charts(tiny, embeddings, {}, history=5, seed=0)
    assert [c["title"] for c in charts] == [
        "By category of the clicked item",
        "By clicks of the item in training",
    ]
    drawn = sampled_candidates(tiny, find_targets(tiny, "test", 5), 100, seed=0)
    auc = count_ranks(history_scores(tiny, drawn, embeddings), drawn.offsets).auc()
    item = drawn.targets.item
    expected = {}
    for name in set(tiny.categories.to_pylist()):
        mine = np.array([tiny.categories[int(i)].as_py() == name for i in item])
        if mine.any():
            expected[f"{name or 'other categories'} ({mine.sum()})"] = text.percent(
                auc[mine].mean()
            )
    assert {r["name"]: r["text"] for r in charts[0]["rows"]} == expected
    few = (tiny.item_clicks[item] >= 1) & (tiny.item_clicks[item] <= 4)
    rows = {r["name"]: r["text"] for r in charts[1]["rows"]}
    assert rows[f"1 to 4 clicks ({few.sum()})"] == text.percent(auc[few].mean())
    for row in (r for c in charts for r in c["rows"]):
        assert 0 <= row["from"] <= row["from"] + row["width"] <= 100.01


def test_data_and_settings_are_those_of_the_files(tmp_path: Path, tiny: Dataset) -> None:
    (tiny.path / "report.json").write_text(json.dumps(PREPARED))
    (tmp_path / "run").mkdir()
    given = {"data.dataset": str(tiny.path), "loss.temperature": 0.3, "run.out": str(tmp_path)}
    Config.load(None, given).save(tmp_path / "run" / "config.toml")
    assert sections.settings_of(tmp_path / "run") == [
        ("loss.temperature", "0.3"),
        ("optim.epochs", "10"),
    ]
    words = " ".join(Page(write(tmp_path, tiny, settings=None)).words)
    for expected in (
        "1,200",
        "of 1,234",
        "events: no item",
        "pages: nothing clicked",
        "Pages without a click",
        "images: missing",
        "2020-01-01 to 2020-02-03",
        "loss.temperature",
    ):
        assert expected in words


def test_projections_hide_the_attention_and_say_so(tmp_path: Path, tiny: Dataset) -> None:
    (tmp_path / "run").mkdir()
    given = {"data.dataset": str(tiny.path), "loss.projections": "all"}
    Config.load(None, given).save(tmp_path / "run" / "config.toml")
    assert "Not shown: score reconstruction: expected a run with loss.projections none" in " ".join(
        Page(write(tmp_path, tiny)).words
    )


# ---- command -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a real run, with a sweep and a CTR table."""
    folder = tmp_path_factory.mktemp("report")
    dataset = make_dataset(folder / "dataset", users=30, items=60, pages=200, history=6, seed=2)
    (dataset.path / "report.json").write_text(json.dumps(PREPARED))
    train_options = {
        "data.dataset": str(dataset.path),
        "data.size": 32,
        "data.pages": 32,
        "model.dim": 8,
        "model.backbone": "small_conv",
        "optim.steps": 3,
        "run.device": "cpu",
        "run.tensorboard": False,
        "run.progress": False,
        "run.log_steps": 1,
    }
    trainer = Trainer(Config.load(None, train_options | {"run.out": str(folder / "run")}))
    trainer.fit()
    trainer.close()
    given = [str(x) for n, v in train_options.items() for x in (f"--{n}", v)]
    assert (
        main(
            [
                "sweep",
                *given,
                "--loss.temperature",
                "0.1",
                "0.4",
                "--out",
                str(folder / "sweep"),
                "--bootstrap",
                "50",
                "--device",
                "cpu",
            ]
        )
        == 0
    )
    table = next((folder / "sweep" / "embeddings").glob("*.npy"))
    assert (
        main(
            [
                "ctr",
                "--dataset",
                str(dataset.path),
                "--embeddings",
                str(table),
                "--out",
                str(folder / "ctr"),
                "--models",
                "din",
                "--forms",
                "none",
                "similarity",
                "--seeds",
                "1",
                "--epochs",
                "1",
                "--protocol",
                "shared",
            ]
        )
        == 0
    )
    arguments = [
        "--dataset",
        dataset.path,
        "--run",
        folder / "run",
        "--sweep",
        folder / "sweep",
        "--ctr",
        folder / "ctr",
        "--out",
        folder / "report.html",
        "--device",
        "cpu",
        "--bootstrap",
        50,
    ]
    assert main(["report", *map(str, arguments)]) == 0
    return folder / "report.html"


SECTIONS = (
    "What it sees as alike",
    "A map of the catalogue",
    "Which past clicks explain this one",
    "All results",
    "Where it is good",
    "What it adds to a CTR model",
    "Other settings",
    "Training",
    "Collapse watch",
    "The data",
    "What was run",
    "Now with your own data",
)


def test_the_command_writes_every_section(written: Path) -> None:
    html = written.read_text()
    assert re.findall("<h2>(.*?)</h2>", html) == list(SECTIONS)
    page = Page(html)
    found = json.loads((written.parent / "ctr" / "ctr.json").read_text())
    for row in found["tables"][0]["rows"]:
        assert f"{row['logloss']['value']:.5f}" in " ".join(page.words)
    assert all(s.startswith("data:image/") for s in page.sources)
    assert any("loss.temperature" in (image["alt"] or "") for image in page.images)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
@pytest.mark.parametrize("width", [390, 1280])
def test_a_browser_shows_it_without_scrolling_sideways(
    written: Path, tmp_path: Path, width: int
) -> None:
    """With a script beside the page that writes what it finds: the report itself has none."""
    probe = """<script>addEventListener("load", () => {
        const broken = [...document.images].filter(x => !x.complete || !x.naturalWidth).length;
        const low = x => x.getBoundingClientRect().height < 60;
        const empty = [...document.querySelectorAll("section")].filter(low).length;
        const over = document.documentElement.scrollWidth - innerWidth;
        document.title = [over, broken, empty, document.images.length].join(" ");
    });</script></body>"""
    copy = tmp_path / "report.html"
    copy.write_text(written.read_text().replace("</body>", probe))
    run = subprocess.run(
        [
            "chromium",
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            f"--window-size={width},2000",
            "--enable-logging=stderr",
            "--dump-dom",
            copy.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    title = re.search("<title>(.*?)</title>", run.stdout)
    assert title is not None
    wider, broken, empty, images = map(int, title.group(1).split())
    assert (broken, empty) == (0, 0)
    assert images > 10
    assert wider <= 0
    assert "CONSOLE" not in run.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--sweep", "nowhere"), "--sweep: expected the folder of a sweep"),
        (("--ctr", "nowhere"), "--ctr: expected the folder of a finished"),
        (("--headline", "popular"), "--headline: expected one of --candidates, got 'popular'"),
    ],
)
def test_what_is_wrong_is_an_error_before_the_work(
    tmp_path: Path,
    tiny: Dataset,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    message: str,
) -> None:
    np.save(tmp_path / "e.npy", embeddings_of(tiny))
    given = (
        "--dataset",
        str(tiny.path),
        "--embeddings",
        str(tmp_path / "e.npy"),
        "--out",
        str(tmp_path / "r.html"),
    )
    assert main(["report", *given, *options]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()
