"""`courier-fast ctr --protocol warm`: models go on over newer pages, each predicted before."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ctr_factory import make_world

from courier_fast.cli import main
from courier_fast.ctr import make_protocol
from courier_fast.ctr.cells import NONE, Cell, Plan, read_predictions, run_plan
from courier_fast.ctr.fit import Settings, predict, seeded
from courier_fast.ctr.impressions import SCRATCH
from courier_fast.ctr.inputs import Material
from courier_fast.ctr.models import MODELS, make_model
from courier_fast.ctr.report import make_report
from courier_fast.ctr.warm import _Stream, go_on
from courier_fast.data.dataset import Dataset

World = tuple[Dataset, np.ndarray]
QUICK = Settings(batch=128, lr=3e-3)
FORMS = ("similarity", "vector", "cluster", "code", "all")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("world") / "d"
    return make_world(path, style_decides=True, users=60, items=120, pages=800)


@pytest.fixture(scope="module")
def material(world: World) -> Material:
    return Material(world[0], make_protocol(world[0], "warm", periods=4), least=0)


# ---- what is added starts at zero ----------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_new_inputs_change_no_prediction_and_learn(
    name: str, form: str, world: World, material: Material
) -> None:
    base, inputs = material.inputs(NONE), material.inputs(form, world[1])
    split, pages = inputs.splits["validation"], np.arange(40)
    with seeded(0):
        model = make_model(name, base.tables, base.users, base.dense)
    stream = _Stream(model, torch.optim.Adam(model.parameters(), lr=1e-2), QUICK)
    stream.train(base.splits["train"], np.arange(100))
    with seeded(1):
        wider = stream.into(make_model(name, inputs.tables, inputs.users, inputs.dense))
    before = predict(model, base.splits["validation"], pages)
    assert np.abs(predict(wider.model, split, pages) - before).max() < 1e-6
    # Going on without what is new is going on as before: nothing of it was lost, Adam's sums too.
    assert sum(len(s) for s in wider.optimizer.state.values()) == sum(
        len(s) for s in stream.optimizer.state.values()
    )
    wider.train(split, pages)
    stream.train(base.splits["validation"], pages)
    after = predict(stream.model, base.splits["validation"], pages)
    moved = np.abs(predict(wider.model, split, pages) - after).max()
    assert moved > 1e-4, "the new inputs learn nothing"


@pytest.mark.parametrize("name", MODELS)
def test_with_nothing_new_it_goes_on_as_it_is(name: str, material: Material) -> None:
    base = material.inputs(NONE)
    of = name, base, material.protocol, QUICK, 3
    alone, added = go_on(*of).predictions, go_on(*of, before=base).predictions
    assert all(np.array_equal(alone[r], added[r]) for r in ("validation", "test"))


# ---- nothing of the future -----------------------------------------------------------------------


def test_later_pages_change_no_earlier_prediction(world: World) -> None:
    d, style = world
    protocol = make_protocol(d, "warm", periods=4)
    made = Material(d, protocol, least=0)
    truth = go_on("dcnv2", made.inputs("similarity", style), protocol, QUICK).predictions
    other = Material(d, protocol, least=0)
    first, second = protocol.periods["test"]
    shown = other.shown["test"]
    turned = shown.clicked.copy()
    here = shown.offsets[second.start - shown.pages.start]
    turned[here:] = ~turned[here:]
    shown.clicked = turned
    found = go_on("dcnv2", other.inputs("similarity", style), protocol, QUICK).predictions
    assert np.array_equal(found["validation"], truth["validation"])
    assert np.array_equal(found["test"], truth["test"])  # each period before its own clicks
    turned[: shown.offsets[first.stop - shown.pages.start]] ^= True
    found = go_on("dcnv2", other.inputs("similarity", style), protocol, QUICK).predictions
    assert np.array_equal(found["test"][:here], truth["test"][:here])
    assert not np.array_equal(found["test"][here:], truth["test"][here:])


def test_periods_cover_both_ranges_and_divide_no_moment(world: World) -> None:
    d, _ = world
    for count in (0, 1, 2, 7):
        periods = make_protocol(d, "warm", periods=count).periods
        for name in ("validation", "test"):
            pages = [page for x in periods[name] for page in x]
            assert pages == list(d.split(name))
        every = [*periods["validation"], *periods["test"]]
        times = [(d.page_moment[x.start], d.page_moment[x.stop - 1]) for x in every]
        assert all(a[1] < b[0] for a, b in itertools.pairwise(times))
        if count == 0:
            assert all(a // 86_400 == b // 86_400 for a, b in times)
        elif count > 1:
            assert len(every) in (count, count + 1)  # one more where the test range begins


# ---- the command ---------------------------------------------------------------------------------


def run(d: Dataset, style: np.ndarray, out: Path) -> dict[str, Any]:
    rng = np.random.default_rng(99)  # not the seed of the styles
    tables = {"style": [style], "random": [rng.normal(size=style.shape).astype(np.float32)]}
    warm = make_protocol(d, "warm", periods=4)
    plan = Plan(
        d,
        tables,
        ["dcnv2"],
        [NONE, "similarity"],
        [warm, replace(warm, name=SCRATCH)],
        seeds=1,
        settings=QUICK,
    )
    run_plan(plan, out, threads=1)
    return make_report(plan, out)


def test_a_signal_is_found_and_noise_is_not(tmp_path: Path) -> None:
    d, style = make_world(tmp_path / "d", style_decides=True, users=150, items=200, pages=3000)
    found = {x["embedding"]: x for x in run(d, style, tmp_path / "out")["warm"]}
    sees, blind = found["style"], found["random"]
    for name in ("warm", "scratch"):
        assert sees["all"][name]["low"] > 0.02
        assert blind["all"][name]["low"] < 0.01
    assert len(sees["periods"]) == 2  # of the test range: four of validation and test together
    assert sum(x["impressions"] for x in sees["periods"]) == sees["all"]["impressions"]
    # What was done is not done again, and done anew it has the same bits.
    file = Cell("dcnv2", "similarity", "style", "warm", 0).file
    first = read_predictions(tmp_path / "out" / "cells" / file, ("test",))["test"]
    written = (tmp_path / "out" / "cells" / file).stat().st_mtime_ns
    run(d, style, tmp_path / "out")
    assert (tmp_path / "out" / "cells" / file).stat().st_mtime_ns == written
    (tmp_path / "out" / "cells" / file).unlink()
    run(d, style, tmp_path / "out")
    again = read_predictions(tmp_path / "out" / "cells" / file, ("test",))["test"]
    assert np.array_equal(first, again)


@pytest.mark.long("whole commands")
def test_the_command(world: World, tmp_path: Path) -> None:
    d, style = world
    np.save(tmp_path / "style.npy", style)
    out = tmp_path / "out"
    what = ["ctr", "--dataset", str(d.path), "--embeddings", str(tmp_path / "style.npy")]
    what += ["--out", str(out), "--protocol", "warm", "--periods", "3", "--no-control"]
    what += ["--models", "dcnv2", "--forms", "similarity", "--seeds", "1"]
    assert main(what) == 0
    [gains] = json.loads((out / "ctr.json").read_text())["warm"]
    assert gains["embedding"] == "style"
    assert "### dcnv2, similarity, style" in (out / "ctr.md").read_text()
    assert (out / "warm.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--protocol", "warm", "--periods", "999"],
            "periods: expected at most the 160 pages of validation and test, got 999",
        ),
        (["--protocol", "warm", "--periods", "-1"], "periods: expected at most the 160 pages"),
        (["--periods", "3"], "--periods: has no effect with --protocol disjoint"),
        (["--protocol", "warm", "--export", "e"], "--export: has no effect with --protocol warm"),
        (["--protocol", "warm", "--min-count", "3"], "--min-count: has no effect with --protocol"),
    ],
)
def test_bad_input(
    more: list[str],
    message: str,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    np.save(tmp_path / "style.npy", world[1])
    what = ["ctr", "--dataset", str(world[0].path), "--out", str(tmp_path / "out")]
    assert main([*what, "--embeddings", str(tmp_path / "style.npy"), *more]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "cells").exists()


def test_a_period_without_a_click_is_named(world: World) -> None:
    d = Dataset(world[0].path)
    clicked = d.pv_clicked.copy()
    pages = d.split("test")
    clicked[d.pv_start[pages.start + 1] : d.pv_end[pages.start + 3]] = False
    d.__dict__["pv_clicked"] = clicked
    with pytest.raises(ValueError, match=r"periods: expected a click in each, got none on the 1 "):
        make_protocol(d, "warm", periods=160)
