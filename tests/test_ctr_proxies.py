"""`courier-fast ctr --proxies`: proxy metrics of embeddings against what they add."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ctr_factory import make_world
from scipy.stats import spearmanr

from courier_fast import ReconstructionLoss
from courier_fast.cli import main
from courier_fast.ctr import make_protocol
from courier_fast.ctr.cells import NONE, Cell, Plan, write_cell
from courier_fast.ctr.impressions import Impressions
from courier_fast.ctr.proxies import METRICS, Proxies, judge_proxies, spearman
from courier_fast.ctr.report import make_report, markdown
from courier_fast.data.dataset import Dataset

World = tuple[Dataset, np.ndarray]
NOISES = (0.0, 0.3, 0.6, 1.0, 2.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    path = tmp_path_factory.mktemp("world") / "d"
    return make_world(path, style_decides=True, users=60, items=120, pages=800)


def noisy(style: np.ndarray, noise: float) -> np.ndarray:
    rng = np.random.default_rng(int(10 * noise))
    return (style + noise * rng.normal(size=style.shape)).astype(np.float32)


def test_rank_correlation_is_spearmans_also_with_ties() -> None:
    rng = np.random.default_rng(0)
    for _ in range(5):
        x, y = rng.integers(0, 4, 9), rng.normal(size=9)
        assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic, abs=1e-12)
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


def test_each_proxy_knows_sight_from_noise(world: World) -> None:
    d, style = world
    proxies = Proxies(d)
    sees, blind = proxies.of(style), proxies.of(noisy(np.zeros_like(style), 1.0))
    assert sees["HR@10"] > blind["HR@10"] + 0.05
    assert sees["AUC"] > blind["AUC"] + 0.1
    assert sees["L_rec"] < blind["L_rec"]
    codes = np.arange(d.num_items) % 4  # the factory's categories
    assert proxies.of(np.eye(4, dtype=np.float32)[codes])["same category"] == 1
    assert blind["same category"] == pytest.approx(0.25, abs=0.1)
    assert proxies.of(np.eye(4, dtype=np.float32)[codes])["effective rank"] == pytest.approx(
        3, 0.01
    )
    lost = style.copy()
    lost[3] = np.nan  # an item without an embedding
    assert all(np.isfinite(x) for x in proxies.of(lost).values())


def test_the_proxy_loss_is_the_trainers(world: World) -> None:
    d, style = world
    pages = d.split("validation")
    assert len(pages) <= 128  # one batch
    rows = torch.nn.functional.normalize(torch.from_numpy(style), dim=1)
    past = [d.event_item[max(a, b - 20) : b] for a, b in _histories(d, pages)]
    shown = d.pv_item[d.pv_start[pages.start] : d.pv_end[pages.stop - 1]]
    clicked = d.pv_clicked[d.pv_start[pages.start] : d.pv_end[pages.stop - 1]]
    history = np.concatenate(past)
    # One page more, of all history items, which has no history and no click.
    pv = torch.from_numpy(np.concatenate([shown, history]).astype(np.int64))
    found = ReconstructionLoss(0.2, attention="candidate", attention_temperature=1.0)(
        pv,
        torch.from_numpy(history.astype(np.int64)),
        torch.from_numpy(np.concatenate([clicked, np.zeros(len(history), bool)])),
        pv_offsets=_offsets([*(d.pv_end - d.pv_start)[pages.start : pages.stop], len(history)]),
        history_offsets=_offsets([*map(len, past), 0]),
        embeddings=rows,
    )
    assert Proxies(d).of(style)["L_rec"] == pytest.approx(float(found), rel=1e-5)


def _histories(d: Dataset, pages: range) -> list[tuple[int, int]]:
    return [(int(d.history_start[p]), int(d.history_end[p])) for p in pages]


def _offsets(lengths: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.append(0, np.cumsum(lengths)))


def planted(world: World, out: Path, sign: int) -> Plan:
    """Cells whose predictions know the clicks the better, the less noise is in the embedding, or,
    with sign -1, the more."""
    d, style = world
    tables = {f"noise-{x}": [noisy(style, x)] for x in NOISES}
    plan = Plan(d, tables, ["din"], [NONE, "similarity"], [make_protocol(d, "shared")], seeds=1)
    (out / "cells").mkdir(parents=True)
    known = dict(zip([NONE, *tables], [0.2, *(1.5 - sign * 0.5 * x for x in NOISES)], strict=True))
    for group in plan.groups():
        for cell in plan.cells(group):
            rng, parts = np.random.default_rng(len(cell.embedding)), []
            for name in plan.ranges:
                shown = Impressions(d, name)
                logit = known[cell.embedding] * shown.clicked + rng.normal(size=len(shown))
                parts.append((np.full(len(shown), name), 1 / (1 + np.exp(-logit))))
            where, p = (np.concatenate(x) for x in zip(*parts, strict=True))
            write_cell(out / "cells" / cell.file, cell, "", {"range": where, "p": p}, [])
    return plan


@pytest.mark.parametrize("sign", [1, -1])
def test_a_planted_order_is_found(world: World, tmp_path: Path, sign: int) -> None:
    plan = planted(world, tmp_path, sign)
    report = make_report(plan, tmp_path)
    [rate] = report["proxies"] = judge_proxies(plan, tmp_path, report)
    assert rate["form"] == "similarity"
    assert rate["model"] == "din"
    assert list(rate["metrics"]) == list(METRICS)
    for name in ("HR@10", "AUC"):
        assert sign * rate["metrics"][name]["correlation"] > 0.8
    found = rate["metrics"]["AUC"]
    assert found["low"] <= found["correlation"] <= found["high"]
    assert (found["chosen"] == rate["best"]) == (sign == 1)
    gains = [x["gain"] for x in rate["embeddings"].values()]
    assert rate["mean"] == pytest.approx(np.mean(gains))
    assert rate["again"] > 0.8
    text = markdown(json.loads(json.dumps(report)))
    assert "## What foretells the gain" in text
    assert "| din, shared | similarity | L_rec |" in text


def test_three_embeddings_are_too_few(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    d, style = world
    paths = []
    for i in range(3):
        paths.append(tmp_path / f"e{i}.npy")
        np.save(paths[-1], style)
    what = ["ctr", "--dataset", str(d.path), "--proxies", "--out", str(tmp_path / "out")]
    assert main([*what, "--embeddings", *map(str, paths)]) == 2
    assert "proxies: expected at least 4 embeddings to rank" in capsys.readouterr().err
    assert not (tmp_path / "out" / "cells").exists()


@pytest.mark.long("whole commands")
def test_the_command_writes_it(world: World, tmp_path: Path) -> None:
    d, style = world
    paths = []
    for noise in NOISES[:4]:
        paths.append(str(tmp_path / f"noise-{noise}.npy"))
        np.save(paths[-1], noisy(style, noise))
    out = tmp_path / "out"
    what = ["ctr", "--dataset", str(d.path), "--proxies", "--out", str(out), "--epochs", "1"]
    what += ["--models", "dcnv2", "--forms", "similarity", "--seeds", "1", "--no-control"]
    assert main([*what, "--embeddings", *paths]) == 0
    [rate] = json.loads((out / "ctr.json").read_text())["proxies"]
    assert set(rate["embeddings"]) == {Path(path).stem for path in paths}
    assert Cell("dcnv2", "similarity", "noise-0.3", "disjoint", 0).file in {
        p.name for p in (out / "cells").iterdir()
    }
    assert "What foretells the gain" in (out / "ctr.md").read_text()
