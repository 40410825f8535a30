"""Gains of an embedding by category, the policy that follows from them, and gates."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from ctr_factory import make_world

from courier_fast.cli import main
from courier_fast.ctr import Impressions, make_protocol
from courier_fast.ctr.cells import NONE, Plan, run_plan
from courier_fast.ctr.export import export_impressions
from courier_fast.ctr.fit import Settings, fit
from courier_fast.ctr.harm import Policy, category_gains, decide, shrink
from courier_fast.ctr.harm_report import decided, harm
from courier_fast.ctr.impressions import category_codes
from courier_fast.ctr.inputs import Material
from courier_fast.ctr.report import make_report, markdown
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
        found, deviation = shrink(gain, error**2)
        before += ((gain - truth) ** 2).sum()
        after += ((found - truth) ** 2).sum()
        inside.append(np.abs(found - truth) < 1.96 * deviation)
        assert (np.abs(found - found.mean()) <= np.abs(gain - found.mean()) + 0.2).all()
    assert after < 0.6 * before
    assert 0.92 < np.mean(inside) < 0.98


def test_what_nobody_knows_stands_at_the_mean() -> None:
    found, _ = shrink(np.array([1.0, 1.2, 0.8, -50.0]), np.array([0.01, 0.01, 0.01, np.inf]))
    assert found[3] == pytest.approx(1.0, abs=0.05)
    same, _ = shrink(np.array([1.0, 1.0, 1.0]), np.array([0.1, 0.2, 0.3]))
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
    rows = {x["category"]: x for x in category_gains(shown, *predictions(shown, {"c2"}))}
    assert [c for c, x in rows.items() if x["shrunken"] < 0] == ["c2"]
    assert rows["c2"]["high"] < 0 < min(x["low"] for c, x in rows.items() if c != "c2")
    assert sum(x["impressions"] for x in rows.values()) == len(shown)
    none, p = predictions(shown, set(), 0.2)
    assert all(x["shrunken"] > 0 for x in category_gains(shown, none, p))
    # The whole is what the categories add up to.
    loss = [-np.log(np.where(shown.clicked, x, 1 - x)).mean() for x in (none, p)]
    rows = category_gains(shown, none, p)
    total = sum(x["gain"] * x["impressions"] for x in rows) / len(shown)
    assert total == pytest.approx(loss[0] - loss[1])


# ---- policies ------------------------------------------------------------------------------------


def policy_of(d: Dataset, style: np.ndarray, off: set[str], path: Path) -> Path:
    shown = Impressions(d, "validation")
    rows = category_gains(shown, *predictions(shown, off))
    decide(d, {"style": [style]}, {("similarity", "style"): rows}).write(path)
    return path


def test_a_policy_is_read_as_it_was_written(world: World, tmp_path: Path) -> None:
    d, style = world
    path = policy_of(d, style, {"c1"}, tmp_path / "policy.json")
    policy = Policy.read(path, d, {"style": [style]})
    assert policy.row("similarity", "style")["off"] == ["c1"]
    off = policy.off("similarity+policy", "style", d)
    assert set(np.array(d.categories.to_pylist())[off]) == {"c1"}
    with pytest.raises(ValueError, match="policy: expected one for cluster of 'style', got one"):
        policy.row("cluster", "style")


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


# ---- gates ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["din", "dcnv2"])
def test_gates_close_where_the_embedding_misleads(name: str, tmp_path: Path) -> None:
    """In category c1 what the embedding says is turned round in the training pages' second half
    and noise after: less weight there than elsewhere."""
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


def test_gates_begin_nearly_open_and_without_an_embedding_there_are_none(world: World) -> None:
    d, style = world
    material = Material(d, make_protocol(d))
    assert material.inputs("cluster+gate", style).tables.gated
    assert not material.inputs("cluster", style).tables.gated


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
    assert "| dcnv2 | similarity | style | +policy |" in text
    # Another policy makes its cells anew, and those alone.
    other = replace(plan, policy=decided(plan, out))
    assert other.policy is not None and other.policy.rows[0]["form"] == "similarity"
    times = {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()}
    run_plan(other, out, threads=1)
    changed = {p.name for p in (out / "cells").iterdir() if times[p.name] != p.stat().st_mtime_ns}
    same = other.policy.row("similarity", "style")["off"] == ["c3"]
    assert changed == (set() if same else {"dcnv2-similarity+policy-style-disjoint-0.parquet"})


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("text", "policy.json"),
        ("shape", "policy: expected a file of `courier-fast ctr`, policy.json, got"),
        ("dataset", "policy: expected one decided on"),
        ("table", "policy: expected one decided for these embeddings, got one for another table"),
        ("category", "policy: expected categories of"),
        ("all", "policy: expected a category that similarity of 'style' is left to, got all 4"),
        ("form", "policy: expected one for similarity of 'style', got one for cluster of style"),
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
