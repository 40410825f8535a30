"""Gains of an embedding by category, the policy that follows from them, and gates."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ctr_factory import make_world
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure

from courier_fast.cli import main
from courier_fast.ctr import Impressions, make_protocol
from courier_fast.ctr.cells import NONE, Plan, run_plan, write_cell
from courier_fast.ctr.command import _exported, _exported_off
from courier_fast.ctr.export import export_impressions
from courier_fast.ctr.features import FORMS
from courier_fast.ctr.fit import Settings, fit, predict, seeded
from courier_fast.ctr.harm import Policy, category_gains, decide, shrink
from courier_fast.ctr.harm_report import decided, harm, harm_notes, harm_tables, lowest
from courier_fast.ctr.impressions import SCRATCH, category_codes
from courier_fast.ctr.inputs import Inputs, Material
from courier_fast.ctr.models import MODELS, make_model
from courier_fast.ctr.plots import _harmed, _variants, write_plots
from courier_fast.ctr.report import make_report, markdown, print_ctr_report, write_ctr_report
from courier_fast.data.dataset import Dataset

World = tuple[Dataset, np.ndarray]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("world") / "d"
    return make_world(path, style_decides=True, users=60, items=120, pages=800)


# ---- shrinkage -----------------------------------------------------------------------------------


def test_shrunken_gains_are_nearer_to_the_truth() -> None:
    """Of categories whose true gains differ as much as their errors do; and 95 % are inside."""
    rng = np.random.default_rng(0)
    inside, before, after = [], 0.0, 0.0
    for _ in range(200):
        truth = 0.3 + 0.2 * rng.normal(size=30)
        error = rng.uniform(0.05, 0.6, 30)
        gain = truth + error * rng.normal(size=30)
        found, deviation, centre = shrink(gain, error**2)
        before += ((gain - truth) ** 2).sum()
        after += ((found - truth) ** 2).sum()
        inside.append(np.abs(found - truth) < 1.96 * deviation)
        assert (np.abs(found - centre) <= np.abs(gain - centre)).all()
    assert after < 0.6 * before
    assert 0.92 < np.mean(inside) < 0.98


def test_what_nobody_knows_stands_at_the_mean() -> None:
    found, _, mean = shrink(np.array([1.0, 1.2, 0.8, -50.0]), np.array([0.01, 0.01, 0.01, np.inf]))
    assert found[3] == mean == pytest.approx(1.0, abs=0.05)
    same, _, _ = shrink(np.array([1.0, 1.0, 1.0]), np.array([0.1, 0.2, 0.3]))
    assert same == pytest.approx(1.0)  # nothing differs: all at the mean


def predictions(shown: Impressions, harmed: set[str], strength: float = 1.0) -> tuple[Any, Any]:
    """Of a model without and with an embedding that knows the clicks, but in some categories is
    surely wrong."""
    rng = np.random.default_rng(3)
    codes, names = category_codes(shown.dataset)
    wrong = np.isin(np.array(names), list(harmed))[codes][shown.item]
    noise = rng.normal(size=len(shown))
    sign = np.where(wrong, -1, 1) * strength
    none = -1 + 0.5 * noise
    p = none + sign * np.where(shown.clicked, 1.0, -1.0)
    return 1 / (1 + np.exp(-none)), 1 / (1 + np.exp(-p))


def test_planted_harm_is_found_and_nothing_else(world: World) -> None:
    shown = Impressions(world[0], "validation")
    rows = {x["category"]: x for x in category_gains(shown, *predictions(shown, {"c2"}))[0]}
    assert [c for c, x in rows.items() if x["shrunken"] < 0] == ["c2"]
    assert rows["c2"]["high"] < 0 < min(x["low"] for c, x in rows.items() if c != "c2")
    assert sum(x["impressions"] for x in rows.values()) == len(shown)
    none, p = predictions(shown, set(), 0.2)
    assert all(x["shrunken"] > 0 for x in category_gains(shown, none, p)[0])
    # The whole is what the categories add up to.
    loss = [-np.log(np.where(shown.clicked, x, 1 - x)).mean() for x in (none, p)]
    rows, _ = category_gains(shown, none, p)
    total = sum(x["gain"] * x["impressions"] for x in rows) / len(shown)
    assert total == pytest.approx(loss[0] - loss[1])


# ---- policies ------------------------------------------------------------------------------------


def policy_of(d: Dataset, style: np.ndarray, off: set[str], path: Path) -> Path:
    shown = Impressions(d, "validation")
    rows, _ = category_gains(shown, *predictions(shown, off))
    decide(d, {"style": [style]}, {("similarity", "style"): rows}, "disjoint").write(path)
    return path


def test_a_policy_is_read_as_it_was_written(world: World, tmp_path: Path) -> None:
    d, style = world
    path = policy_of(d, style, {"c1"}, tmp_path / "policy.json")
    policy = Policy.read(path, d, {"style": [style]}, ["similarity"])
    assert policy.protocol == "disjoint"
    assert policy.row("similarity", "style")["off"] == ["c1"]
    off = policy.off("similarity+policy", "style", d)
    assert set(np.array(d.categories.to_pylist())[off]) == {"c1"}
    with pytest.raises(ValueError, match="policy: expected one for cluster of 'style', got one"):
        policy.row("cluster", "style")


def test_an_embedding_that_is_left_out_is_no_matter(world: World, tmp_path: Path) -> None:
    """The error for one that is turned off everywhere says to leave it out: then the others' rows
    were refused for it, too."""
    d, style = world
    path = policy_of(d, style, {"c1"}, tmp_path / "policy.json")
    about = json.loads(path.read_text())
    [row] = about["rows"]
    about["rows"].append(row | {"embedding": "bad", "off": ["c0", "c1", "c2", "c3"]})
    about["embeddings"]["bad"] = ["sha256:bad"]
    path.write_text(json.dumps(about))
    policy = Policy.read(path, d, {"style": [style]}, ["similarity"])
    assert policy.row("similarity", "style")["off"] == ["c1"]


Change = Callable[[dict[str, Any]], object]


def first(**changed: object) -> Change:
    """The file's only row, changed."""
    return lambda x: x["rows"][0].update(changed)


WITH = "a file of `courier-fast ctr`, policy.json, with "
DAMAGED: dict[str, tuple[Change, str]] = {
    "no version": (lambda x: x.pop("version"), f"{WITH}version, got none"),
    "version 2": (lambda x: x.update(version=2), f"{WITH}1 as version, got 2"),
    "version as text": (lambda x: x.update(version="1"), f"{WITH}1 as version, got '1'"),
    "no dataset": (lambda x: x.pop("dataset"), f"{WITH}dataset, got none"),
    "dataset null": (lambda x: x.update(dataset=None), f"{WITH}a text as dataset, got None"),
    "embeddings a list": (
        lambda x: x.update(embeddings=["style"]),
        f"{WITH}an object as embeddings, got ['style']",
    ),
    "embeddings null": (
        lambda x: x.update(embeddings=None),
        f"{WITH}an object as embeddings, got None",
    ),
    "checksums a text": (
        lambda x: x["embeddings"].update(style="sha256:1"),
        f"{WITH}a list as embeddings.style, got 'sha256:1'",
    ),
    "a checksum that is none": (
        lambda x: x["embeddings"].update(style=[1]),
        f"{WITH}a text as embeddings.style[0], got 1",
    ),
    "no checksum": (
        lambda x: x["embeddings"].update(style=[]),
        "checksums of 'style' among its embeddings, got none",
    ),
    "an embedding without checksums": (
        lambda x: x.update(embeddings={}),
        "checksums of 'style' among its embeddings, got none",
    ),
    "no rows": (lambda x: x.pop("rows"), f"{WITH}rows, got none"),
    "rows an object": (lambda x: x.update(rows={}), f"{WITH}a list as rows, got {{}}"),
    "a row that is none": (lambda x: x["rows"].append([]), f"{WITH}an object as rows[1], got []"),
    "two rows": (
        lambda x: x["rows"].append(x["rows"][0] | {"off": ["c2"]}),
        "one row for similarity of 'style', got two",
    ),
    "no form": (lambda x: x["rows"][0].pop("form"), f"{WITH}rows[0].form, got none"),
    "form null": (first(form=None), f"{WITH}a text as rows[0].form, got None"),
    "an unknown form": (
        first(form="cosines"),
        "one of vector, similarity, cluster, code, all as rows[0].form, got 'cosines'",
    ),
    "form none": (first(form="none"), "all as rows[0].form, got 'none'"),
    "no embedding": (lambda x: x["rows"][0].pop("embedding"), f"{WITH}rows[0].embedding, got none"),
    "no off": (lambda x: x["rows"][0].pop("off"), f"{WITH}rows[0].off, got none"),
    "off null": (first(off=None), f"{WITH}a list as rows[0].off, got None"),
    "off a text": (first(off="c1"), f"{WITH}a list as rows[0].off, got 'c1'"),
    "off an object": (first(off={"c1": True}), f"{WITH}a list as rows[0].off, got {{'c1': True}}"),
    "off nested": (first(off=[["c1"]]), f"{WITH}a text as rows[0].off[0], got ['c1']"),
    "off of mixed types": (first(off=["c1", 2]), f"{WITH}a text as rows[0].off[1], got 2"),
    "no categories": (
        lambda x: x["rows"][0].pop("categories"),
        f"{WITH}rows[0].categories, got none",
    ),
    "empty categories": (
        first(categories=[]),
        "the categories that similarity of 'style' was judged in, got none",
    ),
    "categories as texts": (
        first(categories=["c1"]),
        f"{WITH}an object as rows[0].categories[0], got 'c1'",
    ),
    "a category without a name": (
        lambda x: x["rows"][0]["categories"][2].pop("category"),
        f"{WITH}rows[0].categories[2].category, got none",
    ),
    "a category without a text": (
        lambda x: x["rows"][0]["categories"][0].update(category=None),
        f"{WITH}a text as rows[0].categories[0].category, got None",
    ),
    "protocol null": (lambda x: x.update(protocol=None), f"{WITH}a text as protocol, got None"),
}


@pytest.fixture(scope="module")
def written(world: World, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy, to be damaged in copies."""
    return policy_of(*world, {"c1"}, tmp_path_factory.mktemp("policy") / "policy.json")


@pytest.mark.parametrize("what", DAMAGED)
def test_a_damaged_policy_is_named(what: str, world: World, written: Path, tmp_path: Path) -> None:
    """Before, they were errors of other names later, or taken for a policy: a text as "off" for
    each of its letters."""
    change, message = DAMAGED[what]
    about = json.loads(written.read_text())
    change(about)
    path = tmp_path / "own.json"
    path.write_text(json.dumps(about))
    with pytest.raises(ValueError) as error:  # noqa: PT011  (the whole message is compared)
        Policy.read(path, world[0], {"style": [world[1]]}, ["similarity"])
    assert str(error.value).startswith("policy: expected ")
    assert str(error.value).endswith(f"{message} in {path}")


def test_more_than_a_policy_needs_may_stand_in_its_file(
    world: World, written: Path, tmp_path: Path
) -> None:
    about = json.loads(written.read_text())
    about["note"] = "c2 by hand"
    about["rows"][0] |= {"off": ["c1", "c2"], "why": {"c2": 1}}
    about["rows"][0]["categories"] = [{"category": f"c{i}"} for i in range(4)]
    del about["protocol"]
    (tmp_path / "own.json").write_text(json.dumps(about))
    policy = Policy.read(tmp_path / "own.json", world[0], {"style": [world[1]]}, ["similarity"])
    assert policy.row("similarity", "style")["off"] == ["c1", "c2"]
    assert policy.protocol == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.floats(allow_nan=False) | st.text("c1ö"),
    lambda x: st.lists(x, max_size=2) | st.dictionaries(st.text("c1", max_size=2), x, max_size=2),
    max_leaves=4,
)


def places(x: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where a JSON value has a value."""
    inner = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    return [path, *(p for key, value in inner for p in places(value, (*path, key)))]


@settings(deadline=None, max_examples=300, derandomize=True)
@given(st.data())
def test_whatever_stands_anywhere_in_a_policy_is_an_error_or_a_policy(
    world: World, written: Path, data: st.DataObject
) -> None:
    about = {"": json.loads(written.read_text())}
    for _ in range(data.draw(st.integers(1, 2))):
        *way, last = ("", *data.draw(st.sampled_from(places(about[""]))))
        inner: Any = about
        for key in way:
            inner = inner[key]
        inner[last] = data.draw(JSON)
    path = written.with_name("other.json")
    path.write_text(json.dumps(about[""]))
    tables = {"style": [world[1]]}
    try:
        policy = Policy.read(path, world[0], tables, ["similarity"])
    except ValueError as error:
        said = str(error)
    else:
        off = set(policy.row("similarity", "style")["off"])
        assert off < {"c0", "c1", "c2", "c3"}
        mask = policy.off("similarity", "style", world[0])
        assert set(np.array(world[0].categories.to_pylist())[mask]) == off
        return
    assert said.startswith("policy: ")
    assert str(path) in said


@pytest.mark.parametrize("form", ["similarity", "vector", "cluster", "code", "all"])
def test_zeros_are_where_the_policy_says(form: str, world: World) -> None:
    d, style = world
    off = np.arange(d.num_items) % 4 == 1
    material = Material(d, make_protocol(d))
    on, zeros = material.inputs(form, style), material.inputs(form, style, off)
    base = material.inputs(NONE)
    assert (zeros.tables.codes[off, 2:] == 0).all()
    assert torch.equal(zeros.tables.codes[~off], on.tables.codes[~off])
    if on.tables.vectors is not None and zeros.tables.vectors is not None:
        assert (zeros.tables.vectors[off] == 0).all()
        assert torch.equal(zeros.tables.vectors[~off], on.tables.vectors[~off])
    added = on.tables.added
    assert added == on.dense - base.dense
    split = zeros.splits["test"]
    if added:
        told = split.dense[:, -added:][off[split.shown.item]]
        assert (told == told[:1]).all()  # one number for what is zero, standardised
        assert not torch.equal(split.dense[:, -added:], on.splits["test"].dense[:, -added:])
    assert torch.equal(split.dense[:, : base.dense], base.splits["test"].dense)


def test_the_export_has_the_zeros(world: World, tmp_path: Path) -> None:
    d, style = world
    off = np.arange(d.num_items) % 4 == 1
    forms = dict.fromkeys(("similarity", "cluster", "code", "vector"), off)
    export_impressions(d, make_protocol(d), {"style": style}, tmp_path / "on")
    export_impressions(
        d, make_protocol(d), {"style": style}, tmp_path / "off", off={"style": forms}
    )
    one, other = (pq.read_table(tmp_path / n / "test.parquet") for n in ("on", "off"))
    assert one.schema.equals(other.schema)
    here = np.isin(np.array(one["category"].to_pylist()), ["c1"])
    for name in one.column_names:
        a, b = (np.array(x[name].to_pylist(), dtype=object) for x in (one, other))
        if not name.startswith("style_"):
            assert a.tolist() == b.tolist(), name
            continue
        assert a[~here].tolist() == b[~here].tolist(), name
        nothing = -1 if b.dtype == object and isinstance(b[0], int) else 0
        assert set(b[here].tolist()) == {nothing}, name
    vectors = np.stack(pq.read_table(tmp_path / "off" / "items.parquet")["style_vector"].to_numpy())
    assert (vectors[off] == 0).all()
    assert (np.abs(vectors[~off]).sum(1) > 0).all()


def test_the_export_says_what_the_policy_has_nothing_for(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    d, style = world
    c1, nothing = np.arange(d.num_items) % 4 == 1, np.zeros(d.num_items, bool)
    off = {"style": {"similarity": c1, "cluster": nothing, "all": c1}}
    protocol, tables = make_protocol(d), {"style": style, "other": -style}
    with caplog.at_level(logging.WARNING, "courier_fast"):
        export_impressions(d, protocol, tables, tmp_path / "off", off=off)
    [said] = [r.getMessage() for r in caplog.records if "policy" in r.getMessage()]
    other = "vector of other, similarity of other, cluster of other, code of other"
    assert f"for vector of style, code of style, {other}: exported without zeros" in said
    text = (tmp_path / "off" / "README.md").read_text()
    assert "| style | similarity | c1 |" in text
    assert "| style | cluster | no category |" in text
    for line in ("style | vector", "style | code", "other | similarity"):
        assert f"| {line} | nothing was decided: as without a policy |" in text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "courier_fast"):
        export_impressions(d, protocol, tables, tmp_path / "on")
        every = {name: dict.fromkeys(FORMS[1:-1], c1) for name in tables}
        export_impressions(d, protocol, tables, tmp_path / "every", off=every)
    assert not caplog.records
    assert "olicy" not in (tmp_path / "on" / "README.md").read_text()
    assert "nothing was decided" not in (tmp_path / "every" / "README.md").read_text()


def test_each_seed_of_an_embedding_is_exported_with_its_policy(world: World) -> None:
    """Of names that begin alike, each has its own."""
    d, style = world
    tables = {"style": [style, -style], "style-x": [style], "random": [style]}
    rows = [
        {"form": "vector", "embedding": "style", "off": ["c1"], "categories": []},
        {"form": "code", "embedding": "style-x", "off": ["c2"], "categories": []},
        {"form": "code", "embedding": "gone", "off": ["c3"], "categories": []},
    ]
    plan = Plan(d, tables, [], [], [], policy=Policy(d.fingerprint, {}, rows))
    assert list(_exported(plan)) == [
        ("style-0", "style", 0),
        ("style-1", "style", 1),
        ("style-x", "style-x", 0),
    ]
    assert plan.policy is not None
    category = np.array(d.categories.to_pylist())
    off = _exported_off(plan, plan.policy)
    said = {name: {f: set(category[mask]) for f, mask in of.items()} for name, of in off.items()}
    c1 = {"vector": {"c1"}}
    assert said == {"style-0": c1, "style-1": c1, "style-x": {"code": {"c2"}}}


# ---- gates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["din", "dcnv2"])
def test_gates_close_where_the_embedding_misleads(name: str, tmp_path: Path) -> None:
    """The vectors of category c1 are noise: what the embedding says has less weight there than
    elsewhere."""
    d, style = make_world(tmp_path / "d", style_decides=True, users=150, items=200, pages=3000)
    rng = np.random.default_rng(5)
    misled = style.copy()
    c1 = np.arange(d.num_items) % 4 == 1
    misled[c1] = rng.normal(size=(c1.sum(), 8))
    protocol = make_protocol(d, "shared")
    inputs = Material(d, protocol).inputs("similarity+gate", misled)
    settings = Settings(batch=128, lr=1e-2, epochs=3, patience=6)
    model: Any = fit(name, inputs, settings).model
    gates = 2 * torch.sigmoid(model.items.gates.weight[:4, 0])
    assert gates[1] < gates[[0, 2, 3]].min() - 0.02


@pytest.mark.parametrize("form", ["similarity", "all"])
@pytest.mark.parametrize("name", MODELS)
def test_gates_begin_open_and_weigh_what_the_embedding_says(
    name: str, form: str, world: World
) -> None:
    d, style = world
    material = Material(d, make_protocol(d), ranges=("train", "validation"))
    plain, gated = material.inputs(form, style), material.inputs(form + "+gate", style)

    def model_of(inputs: Inputs) -> Any:
        with seeded(0):
            return make_model(name, inputs.tables, inputs.users, inputs.dense)

    model, split = model_of(gated), gated.splits["validation"]
    before = predict(model, split)
    assert np.array_equal(before, predict(model_of(plain), plain.splits["validation"]))
    with torch.no_grad():
        model.items.gates.weight[1] = -100.0  # shut, for c1
    changed = predict(model, split) != before
    x = split.shown
    c1 = np.arange(d.num_items) % 4 == 1
    told, rows = c1[x.item], x.page - x.pages.start
    if form == "all":  # vectors and codes are in the history, too
        seen = np.concatenate([[0], np.cumsum(c1[d.event_item])])
        told = told | (seen[x.history_end] > seen[x.history_start])[rows]
    assert (told[changed]).all()
    assert changed[told].mean() > 0.9


@pytest.mark.parametrize("form", [NONE, "cluster"])
def test_without_being_asked_for_there_are_no_gates(form: str, world: World) -> None:
    inputs = Material(world[0], make_protocol(world[0])).inputs(form, world[1])
    model: Any = make_model("din", inputs.tables, inputs.users, inputs.dense)
    assert model.items.gates is None


# ---- the report ----------------------------------------------------------------------------------

CATEGORIES = {"disjoint": "c1", "shared": "c2", "warm": "c3", SCRATCH: "c3"}


@pytest.fixture(scope="module")
def planted(world: World, tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Path]:
    """Cells of every protocol; the embedding misleads in another category in each."""
    d, style = world
    out = tmp_path_factory.mktemp("planted")
    (out / "cells").mkdir()
    warm = make_protocol(d, "warm", periods=2)
    protocols = [warm, make_protocol(d), make_protocol(d, "shared"), replace(warm, name=SCRATCH)]
    forms = [NONE, "similarity", "similarity+policy"]
    plan = Plan(d, {"style": [style]}, ["din"], forms, protocols, seeds=1)
    read = {r: Impressions(d, r) for r in plan.ranges}
    for group in plan.groups():
        for cell in plan.cells(group):
            place = 0 if cell.form == NONE else 1
            wrong = set() if cell.form.endswith("+policy") else {CATEGORIES[cell.protocol]}
            p = {r: predictions(x, wrong)[place] for r, x in read.items()}
            columns = {
                "range": np.repeat(list(p), [len(x) for x in p.values()]),
                "p": np.concatenate(list(p.values())),
            }
            write_cell(out / "cells" / cell.file, cell, "", columns, [])
    return plan, out


def test_each_protocol_has_gains_of_its_own(planted: tuple[Plan, Path]) -> None:
    """The others' were left out. The warm ones have their own tables, and decide where there is
    nothing else."""
    plan, out = planted
    policy = decided(plan, out)
    assert policy.protocol == "disjoint"
    assert policy.row("similarity", "style")["off"] == ["c1"]
    found = harm(plan, out, "test", policy)
    assert [(x["protocol"], lowest(x)[0]["category"]) for x in found] == [
        ("disjoint", "c1"),
        ("shared", "c2"),
    ]
    for x in found:
        assert [row["category"] for row in x["categories"] if row["off"]] == ["c1"]
        assert x["variants"]["+policy"]["logloss"]["high"] < 0
    titles = [title for title, _, _ in harm_tables(found)]
    assert titles[1:] == [f"din, {p}, similarity, style" for p in ("disjoint", "shared")]
    alone = replace(plan, protocols=[p for p in plan.protocols if p.periods])
    policy = decided(alone, out)
    assert (policy.protocol, policy.row("similarity", "style")["off"]) == ("warm", ["c3"])
    assert [x["protocol"] for x in harm(alone, out, "test", policy)] == ["warm"]


@pytest.mark.parametrize("split", ["validation", "test"])
def test_the_report_says_what_decided_and_that_validation_is_no_judge(
    split: str, planted: tuple[Plan, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    plan, out = planted
    policy = decided(plan, out)
    report = make_report(plan, out, split) | {"harm": harm(plan, out, split, policy)}
    report["harm_notes"] = harm_notes(policy, split)
    write_ctr_report(report, tmp_path)
    print_ctr_report(report)
    texts = [(tmp_path / name).read_text() for name in ("ctr.md", "ctr.json")]
    for text in (*texts, " ".join(capsys.readouterr().out.split())):
        assert "decided on validation of protocol disjoint" in text
        assert ("the very pages that the policy was decided on" in text) == (split == "validation")
    paths = {path.name: path for path in write_plots(report, tmp_path)}
    assert paths["harm.png"].read_bytes()[:4] == b"\x89PNG"
    assert "harm.png" not in {p.name for p in write_plots(report | {"harm": []}, tmp_path)}


def test_the_picture_marks_what_is_off(planted: tuple[Plan, Path]) -> None:
    plan, out = planted
    [x, _] = harm(plan, out, "test", decided(plan, out))
    x["categories"][0]["category"] = "$^$"  # no formula, which would be an error
    above, below = Figure().subplots(2)
    _harmed(above, x)
    _variants(below, x)
    names = [text.get_text().partition(" (")[0] for text in above.get_yticklabels()]
    rows = lowest(x)
    assert names == [row["category"] for row in rows]
    every, marked = above.containers  # with their intervals
    assert every[0].get_xdata() == pytest.approx([1000 * row["shrunken"] for row in rows])
    assert marked[0].get_xdata() == pytest.approx([1000 * rows[0]["shrunken"]])
    assert marked[0].get_ydata() == [len(rows) - 1]  # on top
    lines = {line.get_label(): line.get_xdata()[0] for line in above.lines}
    assert lines["mean of all categories"] == pytest.approx(1000 * x["mean"])
    [value] = below.containers[0][0].get_xdata()
    assert value == pytest.approx(-1000 * x["variants"]["+policy"]["logloss"]["value"])
    assert value > 0  # better than all on
    above.figure.canvas.draw()


# ---- the command ---------------------------------------------------------------------------------


def test_variants_beside_all_on(world: World, tmp_path: Path) -> None:
    d, style = world
    rng = np.random.default_rng(8)
    tables = {"style": [style], "random": [rng.normal(size=style.shape).astype(np.float32)]}
    path = policy_of(d, style, {"c3"}, tmp_path / "policy.json")
    plan = Plan(
        d,
        tables,
        ["dcnv2"],
        [NONE, "similarity", "similarity+gate", "similarity+policy"],
        [make_protocol(d)],
        seeds=1,
        settings=Settings(batch=256, epochs=1, lr=3e-3),
        policy=Policy.read(path, d, {"style": [style]}),
    )
    out = tmp_path / "out"
    run_plan(plan, out, threads=1)
    report = make_report(plan, out)
    forms = {(row["form"], row["embedding"]) for row in report["tables"][0]["rows"]}
    assert ("similarity+policy", "style") in forms
    assert ("similarity+gate", "random") not in forms  # of the control there is nothing to turn off
    assert plan.policy is not None
    report["harm"] = harm(plan, out, "test", plan.policy)
    [found] = report["harm"]
    assert [x["category"] for x in found["categories"] if x["off"]] == ["c3"]
    assert set(found["variants"]) == {"+policy", "+gate"}
    text = markdown(json.loads(json.dumps(report)))
    assert "| dcnv2, disjoint | similarity | style | +policy |" in text
    # Another policy makes its cells anew, and those alone.
    other = replace(plan, policy=decided(plan, out))
    assert other.policy is not None and other.policy.rows[0]["form"] == "similarity"
    times = {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    run_plan(other, out, threads=1)
    changed = {p.name for p in (out / "cells").iterdir() if times[p.name] != p.stat().st_mtime_ns}
    same = other.policy.row("similarity", "style")["off"] == ["c3"]
    assert changed == (set() if same else {"dcnv2-similarity+policy-style-disjoint-0.parquet"})


def test_what_misleads_since_training_is_turned_off_and_the_policy_mends_it(tmp_path: Path) -> None:
    """From vectors to a policy and back: in c1 taste is turned round from validation on."""
    sizes = {"users": 150, "items": 200, "pages": 4000}
    d, style = make_world(tmp_path / "d", style_decides=True, turned=1, **sizes)
    np.save(tmp_path / "style.npy", style)
    what = ["ctr", "--dataset", str(d.path), "--embeddings", str(tmp_path / "style.npy")]
    what += ["--models", "dcnv2", "--forms", "similarity", "--seeds", "1", "--epochs", "2"]
    what += ["--protocol", "shared", "--no-control", "--out", str(tmp_path / "out")]
    assert main(what) == 0
    [row] = json.loads((tmp_path / "out" / "policy.json").read_text())["rows"]
    assert row["off"] == ["c1"]
    assert main([*what, "--policy", str(tmp_path / "out" / "policy.json")]) == 0
    [x] = json.loads((tmp_path / "out" / "ctr.json").read_text())["harm"]
    harmed = {row["category"] for row in x["categories"] if row["high"] < 0}
    assert harmed == {row["category"] for row in x["categories"] if row["off"]} == {"c1"}
    worth = x["variants"]["+policy"]
    assert worth["logloss"]["high"] < 0 < worth["auc"]["low"]


@pytest.mark.long("whole commands")
def test_the_command_decides_and_applies(world: World, tmp_path: Path) -> None:
    d, style = world
    np.save(tmp_path / "style.npy", style)
    what = ["ctr", "--dataset", str(d.path), "--embeddings", str(tmp_path / "style.npy")]
    what += ["--models", "dcnv2", "--forms", "similarity", "--seeds", "1", "--epochs", "1"]
    what += ["--out", str(tmp_path / "out")]
    assert main(what) == 0
    policy = json.loads((tmp_path / "out" / "policy.json").read_text())
    assert [row["form"] for row in policy["rows"]] == ["similarity"]
    policy["rows"][0]["off"] = ["c0"]
    (tmp_path / "own.json").write_text(json.dumps(policy))
    more = ["--policy", str(tmp_path / "own.json"), "--gate", "--export", str(tmp_path / "export")]
    assert main([*what, *more]) == 0
    [x] = json.loads((tmp_path / "out" / "ctr.json").read_text())["harm"]
    assert set(x["variants"]) == {"+policy", "+gate"}
    table = pq.read_table(tmp_path / "export" / "test.parquet")
    here = np.array(table["category"].to_pylist()) == "c0"
    assert (table["style_similarity_max"].to_numpy()[here] == 0).all()
    text = (tmp_path / "export" / "README.md").read_text()
    assert "| style | similarity | c0 |" in text
    assert "| style | cluster | nothing was decided: as without a policy |" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text", "policy.json"),
        ("shape", "policy: expected a file of `courier-fast ctr`, policy.json, with version, got"),
        ("dataset", "policy: expected one decided on"),
        ("table", "policy: expected one decided for these embeddings, got one for another table"),
        ("category", "policy: expected categories of"),
        ("all", "policy: expected a category that similarity of 'style' is left to, got all 4"),
        ("form", "policy: expected one for similarity of 'style', got one for cluster of 'style'"),
    ],
)
def test_a_policy_that_does_not_fit(
    change: str, message: str, world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    d, style = world
    np.save(tmp_path / "style.npy", style)
    path = policy_of(d, style, {"c1"}, tmp_path / "policy.json")
    about = json.loads(path.read_text())
    row = about["rows"][0]
    if change == "shape":
        about = {"rows": []}
    elif change == "dataset":
        about["dataset"] = "sha256:other"
    elif change == "table":
        about["embeddings"]["style"] = ["sha256:other"]
    elif change == "category":
        row["off"] = ["shoes"]
    elif change == "all":
        row["off"] = ["c0", "c1", "c2", "c3"]
    elif change == "form":
        row["form"] = "cluster"
    path.write_text("{" if change == "text" else json.dumps(about))
    what = ["ctr", "--dataset", str(d.path), "--embeddings", str(tmp_path / "style.npy")]
    what += ["--forms", "similarity", "--out", str(tmp_path / "out"), "--policy", str(path)]
    assert main(what) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out" / "cells").exists()
