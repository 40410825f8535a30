"""The drawn catalogue, the simulated users and the report."""

from __future__ import annotations

import argparse
import html
import io
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from rich.console import Console

from courier_fast.quickstart import catalogue, command
from courier_fast.quickstart.stages import HEAD_START, Estimate, Stages, clock
from courier_fast.quickstart.users import (
    Behaviour,
    click_probability,
    item_codes,
    liking,
    simulate,
    user_tastes,
)
from courier_fast.report.text import headline

# ---- catalogue -----------------------------------------------------------------------------------


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


# ---- users ---------------------------------------------------------------------------------------


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


# ---- command -------------------------------------------------------------------------------------


def test_quickstart_leaves_other_folders_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(ValueError, match="expected a new folder or an earlier quickstart"):
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
    assert headline(found, "page", "HR@1") in (out / "report.html").read_text()
    printed = capsys.readouterr().out
    assert "report.html" in printed
    assert "left out: " not in printed and "\x1b" not in printed
    lines = [line for line in printed.splitlines() if " so far, about " in line]
    assert [line.split()[0] for line in lines] == list(command.SECONDS)
    found = json.loads((out / "ctr" / "ctr.json").read_text())
    assert found["summary"] in html.unescape((out / "report.html").read_text())
    best = max(r["auc"]["value"] for r in found["tables"][0]["rows"])
    assert best < found["attainable"] < 1


# ---- the line for the whole ----------------------------------------------------------------------


def test_the_estimate_begins_with_the_table_and_follows_the_machine() -> None:
    estimate = Estimate({"a": 10, "b": 60, "c": 30})
    assert estimate.left("a", 0, 0) == 100
    assert estimate.left("a", 0, 4) == 96
    estimate.took["a"] = 20  # twice the table's time
    slowness = (20 + HEAD_START) / (10 + HEAD_START)
    assert estimate.slowness() == slowness
    assert estimate.left("b", 0, 0) == pytest.approx(90 * slowness)
    # Two thirds of a long stage say more than all of a short one.
    assert estimate.left("b", 2 / 3, 120) == pytest.approx(50 * 145 / 55)
    assert estimate.left("b", 0, 1e6) == pytest.approx(30 * slowness)  # never below what follows
    estimate.took["b"] = 180
    assert estimate.left("c", 1, 60) == 0


def test_a_stage_of_given_minutes_is_not_stretched() -> None:
    estimate = Estimate({"a": 10, "b": 60, "c": 30}, fixed=["b"], took={"a": 40})
    assert estimate.left("b", 0.5, 30) == pytest.approx(30 + 30 * 45 / 15)
    estimate.took["b"] = 60
    assert estimate.slowness() == 3


def test_seconds_follow_the_sizes() -> None:
    q = command.Quickstart()
    assert command.expected_seconds(q) == command.SECONDS
    more = command.expected_seconds(replace(q, items=2 * q.items, steps=3 * q.steps))
    assert more["Draw"] == 2 * command.SECONDS["Draw"]
    assert more["Train"] == 3 * command.SECONDS["Train"]
    assert command.expected_seconds(replace(q, minutes=4))["Train"] == 240


def test_a_terminal_gets_one_line_that_changes() -> None:
    file = io.StringIO()
    stages = Stages(Console(file=file, force_terminal=True, width=90), {"Draw": 5, "Train": 60})
    with stages("Draw", "some products"):
        pass
    with stages("Train", "an encoder") as advance:
        advance(0.5)
        stages._stage_began -= 100
        sleep(0.7)  # the line is drawn twice a second
    text = file.getvalue()
    assert "1 of 2" in text and "0:00 so far, about 1:05 left" in text
    assert "2 of 2" in text and "about 1:19 left" in text  # 30 s x (5 + 100) / (5 + 5 + 30)
    assert list(stages.seconds) == ["Draw", "Train"]


def test_clock() -> None:
    assert [clock(x) for x in (0, 59.6, 65, 3600)] == ["0:00", "1:00", "1:05", "60:00"]


def test_click_probability_is_what_shoppers_do() -> None:
    """Counted over many pages of the same liking; a perfect model's mean is the rate of clicks."""
    like = np.tile([[0.0, 1.0, 0.2, 3.3, 3.3, 0.5]], (40_000, 1))
    behaviour = Behaviour(sharpness=1.3, noise=0.2, again=0.3, none=0.25)
    p = click_probability(like[:1], behaviour)[0]
    assert p.sum() == pytest.approx(1 + 0.3 / 0.75)
    rng = np.random.default_rng(0)
    careless = rng.random(len(like)) < behaviour.noise
    score = np.where(careless[:, None], 0, behaviour.sharpness * like) + rng.gumbel(size=like.shape)
    clicks = np.where(rng.random(len(like)) < 0.3 / 0.75, 2, 1)
    clicked = np.argsort(np.argsort(-score, 1), 1) < clicks[:, None]
    np.testing.assert_allclose(clicked.mean(0), p, atol=4 * 0.5 / len(like) ** 0.5)


def test_the_first_plot_does_not_announce_its_fonts(tmp_path: Path) -> None:
    code = "from courier_fast import cli; cli.main(['verify', '.']); import matplotlib.font_manager"
    shown = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={**os.environ, "MPLCONFIGDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert any(tmp_path.glob("fontlist-*.json"))  # made anew
    assert "verify" in shown.stderr and "fontManager" not in shown.stderr
