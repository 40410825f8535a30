"""`courier-fast ctr`: bad input before any work, resuming, simulated worlds, slices, the export."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ctr_factory import make_world

from courier_fast.cli import main
from courier_fast.ctr import Impressions, cells, features, make_protocol
from courier_fast.ctr.cells import Plan, read_predictions, run_plan
from courier_fast.ctr.command import _named_files
from courier_fast.ctr.export import export_impressions
from courier_fast.ctr.fit import Settings
from courier_fast.ctr.slices import slices
from courier_fast.data.dataset import Dataset

QUICK = Settings(batch=256, epochs=1, lr=3e-3)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, np.ndarray]:
    path = tmp_path_factory.mktemp("world") / "d"
    return make_world(path, style_decides=True, users=60, items=120, pages=800)


def write(path: Path, ids: list[str], table: np.ndarray) -> Path:
    rows = pa.FixedSizeListArray.from_arrays(
        pa.array(table.ravel().astype(np.float32)), table.shape[1]
    )
    pq.write_table(pa.table({"item_id": ids, "embedding": rows}), path)
    return path


def command(dataset: Dataset, embeddings: Path, out: Path, *more: str) -> int:
    what = [
        "ctr",
        "--dataset",
        str(dataset.path),
        "--embeddings",
        str(embeddings),
        "--out",
        str(out),
    ]
    return main([*what, *more])


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "missing",
            "expected finite numbers for all 120 items, got none for 1 in .* (first: 00007)",
        ),
        ("nan", "expected finite numbers for all 120 items, got none for 2 in .* (first: 00003)"),
        ("extra", "expected items of .* alone, got 1 others in .* (first: other)"),
        ("duplicate", "expected each item_id once, got 00004 twice"),
    ],
)
def test_wrong_embeddings_are_named_before_any_training(
    tmp_path: Path,
    world: tuple[Dataset, np.ndarray],
    capsys: pytest.CaptureFixture,
    what: str,
    message: str,
) -> None:
    d, style = world
    ids, table = d.item_ids.to_pylist(), style.copy()
    if what == "missing":
        ids, table = ids[:7] + ids[8:], np.delete(table, 7, 0)
    elif what == "nan":
        table[[3, 9], 0] = [np.nan, np.inf]
    elif what == "extra":
        ids, table = [*ids, "other"], np.concatenate([table, table[:1]])
    elif what == "duplicate":
        ids[5] = ids[4]
    out = tmp_path / "out"
    assert command(d, write(tmp_path / "e.parquet", ids, table), out) == 2
    said = capsys.readouterr().err
    assert re.search(message.replace("(", r"\(").replace(")", r"\)"), said), said
    assert not out.exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--forms", "pixels"],
            "form: expected one of none, vector, similarity, cluster, code, all, got 'pixels'",
        ),
        (["--models", "deepfm"], "models: expected some of din, dcnv2, got 'deepfm'"),
        (["--protocol", "both"], "protocol: expected some of disjoint, shared, warm, got 'both'"),
        (["--encoder-share", "0.9"], "encoder_share: expected a share"),
        (["--seeds", "0"], "seeds, threads, min_count: expected at least 1, 0 and 1, got 0"),
        (["--history", "0"], "history: expected at least 1, got 0"),
        (["--batch", "0"], "batch: expected at least 1, got 0"),
        (["--lr", "0"], "lr, l2: expected above 0"),
    ],
)
def test_wrong_settings_are_named_before_any_training(
    tmp_path: Path,
    world: tuple[Dataset, np.ndarray],
    capsys: pytest.CaptureFixture,
    more: list[str],
    message: str,
) -> None:
    d, style = world
    path = write(tmp_path / "e.parquet", d.item_ids.to_pylist(), style)
    assert command(d, path, tmp_path / "out", *more) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_of_embeddings_are_their_own(
    tmp_path: Path, world: tuple[Dataset, np.ndarray], capsys: pytest.CaptureFixture
) -> None:
    d, style = world
    for name in ("random", "none"):
        path = write(tmp_path / f"{name}.parquet", d.item_ids.to_pylist(), style)
        assert command(d, path, tmp_path / "out") == 2
        assert "expected different names" in capsys.readouterr().err
    assert command(d, tmp_path / "{seed}.npy", tmp_path / "out") == 2
    assert "expected NAME=PATH where the file's name is but the seed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "name", "path"),
    [
        ("a/trained.npy", "trained", "a/trained.npy"),
        ("mine=a/b.parquet", "mine", "a/b.parquet"),
        ("a/day=3/b.npy", "b", "a/day=3/b.npy"),
        ("a/mean_1f_seed-{seed}.npy", "mean_1f", "a/mean_1f_seed-1.npy"),
        ("e{seed}.npy", "e", "e1.npy"),
        ("mine=a/{seed}/e.npy", "mine", "a/1/e.npy"),
    ],
)
def test_embeddings_have_names_and_seeds(text: str, name: str, path: str) -> None:
    found, paths = _named_files(text, 2)
    assert (found, paths[-1]) == (name, Path(path))
    assert len(paths) == (2 if "{seed}" in text else 1)


def test_an_encoder_that_saw_what_it_must_not_is_named(
    tmp_path: Path, world: tuple[Dataset, np.ndarray], capsys: pytest.CaptureFixture
) -> None:
    d, style = world
    path = write(tmp_path / "e.parquet", d.item_ids.to_pylist(), style)
    bounds = {p: make_protocol(d, p).bound for p in ("disjoint", "shared")}
    for protocol, bound in bounds.items():
        for until, wrong in ((bound - 1, False), (bound, True), (None, False)):
            (tmp_path / "e.parquet.json").write_text(json.dumps({"trained_until": until}))
            more = [
                "--protocol",
                protocol,
                "--models",
                "din",
                "--forms",
                "none",
                "--seeds",
                "1",
                "--epochs",
                "1",
            ]
            if wrong:
                assert command(d, path, tmp_path / "out", *more) == 2
                said = capsys.readouterr().err
                assert f"for --protocol {protocol}, got one that has seen pages until" in said
                assert "--data.share" in said
            else:
                assert command(d, path, tmp_path / protocol, *more) == 0


# ---- cells ---------------------------------------------------------------------------------------


def small_plan(world: tuple[Dataset, np.ndarray], **more: Any) -> Plan:
    d, style = world
    settings = {
        "models": ["din"],
        "forms": ["none", "similarity"],
        "protocols": [make_protocol(d)],
        "seeds": 2,
        "settings": QUICK,
    }
    return Plan(d, {"style": [style]}, **(settings | more))


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted((folder / "cells").iterdir())}


def test_a_run_that_was_stopped_goes_on_to_the_same_bytes(
    tmp_path: Path, world: tuple[Dataset, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(world)
    assert run_plan(plan, tmp_path / "whole", threads=2) == 0
    whole = contents(tmp_path / "whole")
    assert list(whole) == [
        f"din-{f}-{e}-disjoint-{s}.parquet"
        for f, e in (("none", "none"), ("similarity", "style"))
        for s in (0, 1)
    ]

    done = 0

    def stop(cell: cells.Cell) -> None:
        nonlocal done
        done += 1
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_plan(plan, tmp_path / "parts", threads=1, ended=stop)
    before = contents(tmp_path / "parts")
    assert 2 <= len(before) < 4
    assert run_plan(plan, tmp_path / "parts", threads=1) == len(before)
    assert contents(tmp_path / "parts") == whole
    # All there: nothing is trained.
    monkeypatch.setattr(cells, "fit", None)
    assert run_plan(plan, tmp_path / "parts", threads=1) == 4


def test_a_cell_of_other_settings_is_made_anew(
    tmp_path: Path, world: tuple[Dataset, np.ndarray], caplog: pytest.LogCaptureFixture
) -> None:
    run_plan(small_plan(world, forms=["none"]), tmp_path, threads=1)
    before = contents(tmp_path)
    other = small_plan(world, forms=["none"], settings=Settings(batch=128, epochs=1))
    assert run_plan(other, tmp_path, threads=1) == 0
    assert caplog.text.count("was made with other data or settings") == 2
    assert all(x != before[name] for name, x in contents(tmp_path).items())


def test_each_seed_has_the_encoder_of_its_own(
    tmp_path: Path, world: tuple[Dataset, np.ndarray]
) -> None:
    _, style = world
    other = features.random_vectors(*style.shape, seed=3)
    several = small_plan(world, forms=["similarity"], seeds=2)
    run_plan(replace(several, embeddings={"e": [style, other]}), tmp_path / "both", threads=2)
    for seed, table in enumerate([style, other]):
        alone = replace(several, embeddings={"e": [table]})
        out = tmp_path / str(seed)
        run_plan(alone, out, threads=2)
        name = f"din-similarity-e-disjoint-{seed}.parquet"
        assert contents(out)[name] == contents(tmp_path / "both")[name]
        assert (
            run_plan(alone, tmp_path / "both", threads=2) == 1
        )  # of the other seed it is another cell
        run_plan(replace(several, embeddings={"e": [style, other]}), tmp_path / "both", threads=2)


def test_predictions_are_of_the_splits_impressions(
    tmp_path: Path, world: tuple[Dataset, np.ndarray]
) -> None:
    d, _ = world
    run_plan(small_plan(world, seeds=1, forms=["none"]), tmp_path, threads=1)
    path = tmp_path / "cells" / "din-none-none-disjoint-0.parquet"
    read = pq.read_table(path).to_pydict()
    shown = [Impressions(d, s) for s in ("validation", "test")]
    assert read["item"] == np.concatenate([x.item for x in shown]).tolist()
    assert read["clicked"] == np.concatenate([x.clicked for x in shown]).tolist()
    parts = read_predictions(path, ("test",))
    assert parts["test"].tolist() == read["p"][len(shown[0]) :]
    run_plan(
        small_plan(world, seeds=1, forms=["none"], ranges=("validation",)), tmp_path, threads=1
    )
    assert set(pq.read_table(path)["range"].to_pylist()) == {"validation"}


# ---- the whole command ---------------------------------------------------------------------------


@pytest.mark.long("whole commands")
@pytest.mark.parametrize("style_decides", [True, False])
def test_an_image_is_worth_what_it_decides(tmp_path: Path, style_decides: bool) -> None:
    """Where style decides clicks it adds AUC, in each form, and where the item decides it adds
    nothing; random vectors never do."""
    d, style = make_world(tmp_path / "d", style_decides=style_decides)
    path = write(tmp_path / "style.parquet", d.item_ids.to_pylist(), style)
    more = [
        "--models",
        "din",
        "--forms",
        "similarity",
        "vector",
        "--protocol",
        "shared",
        "--seeds",
        "1",
        "--epochs",
        "3",
    ]
    assert command(d, path, tmp_path / "out", *more) == 0
    report = json.loads((tmp_path / "out" / "ctr.json").read_text())
    (table,) = report["tables"]
    assert report["alarms"] == []
    none, *rows = table["rows"]
    assert none["form"] == "none" and len(rows) == 4
    for row in rows:
        gain = row["difference"]["auc"]
        if style_decides and row["embedding"] == "style":
            assert gain["low"] > 0.05, row["form"]
        else:
            assert gain["low"] < 0 < gain["high"] < 0.06, row
    for one in table["against"]:  # in the same form: sight, not capacity
        assert (one["embedding"], one["other"]) == ("style", "random")
        assert (one["auc"]["low"] > 0.05) == style_decides, one
    pictures = {p.name: p.read_bytes()[:4] for p in (tmp_path / "out").glob("*.png")}
    names = ["gains.png", "categories.png", "calibration.png", "harm.png"]
    assert pictures == dict.fromkeys(names, b"\x89PNG")
    text = (tmp_path / "out" / "ctr.md").read_text()
    assert text.count("minus none |") >= 3
    assert f"| similarity | style | {rows[0]['auc']['value']:.4f}" in text


def test_an_input_that_knows_the_answer_is_an_alarm(
    tmp_path: Path, world: tuple[Dataset, np.ndarray], capsys: pytest.CaptureFixture
) -> None:
    d, style = world
    path = write(tmp_path / "style.parquet", d.item_ids.to_pylist(), style)
    more = ["--models", "din", "--forms", "none", "--seeds", "1", "--epochs", "1", "--no-control"]
    assert command(d, path, tmp_path / "out", *more) == 0
    assert "an input knows the answer" not in capsys.readouterr().out
    cell = tmp_path / "out" / "cells" / "din-none-none-disjoint-0.parquet"
    read = pq.read_table(cell)
    told = np.where(read["clicked"].to_numpy(), 0.9, 0.1).astype(np.float32)
    pq.write_table(read.set_column(read.column_names.index("p"), "p", pa.array(told)), cell)
    assert command(d, path, tmp_path / "out", *more) == 0  # the table is made from the cells
    assert "AUC 1.0000 is above 0.99: an input knows the answer" in capsys.readouterr().out.replace(
        "\n", " "
    )


def test_other_dimensions_than_the_last_run_are_an_error(
    tmp_path: Path, world: tuple[Dataset, np.ndarray], capsys: pytest.CaptureFixture
) -> None:
    d, style = world
    ids, more = (
        d.item_ids.to_pylist(),
        ["--models", "din", "--forms", "none", "--seeds", "1", "--epochs", "1"],
    )
    assert command(d, write(tmp_path / "e.parquet", ids, style), tmp_path / "out", *more) == 0
    path = write(tmp_path / "e.parquet", ids, np.tile(style, (1, 2)))
    capsys.readouterr()
    assert command(d, path, tmp_path / "out", *more) == 2
    assert "expected 8 dimensions of 'e', as in the last run into" in capsys.readouterr().err


def test_items_without_an_embedding_are_allowed_when_asked(
    tmp_path: Path, world: tuple[Dataset, np.ndarray]
) -> None:
    d, style = world
    path = write(tmp_path / "e.parquet", d.item_ids.to_pylist()[10:], style[10:])
    more = [
        "--models",
        "dcnv2",
        "--forms",
        "all",
        "--seeds",
        "1",
        "--epochs",
        "1",
        "--allow-missing",
        "--split",
        "validation",
        "--export",
        str(tmp_path / "x"),
    ]
    assert command(d, path, tmp_path / "out", *more) == 0
    report = json.loads((tmp_path / "out" / "ctr.json").read_text())
    assert [r["form"] for r in report["tables"][0]["rows"]] == ["none", "all", "all"]
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == [
        "README.md",
        "dataset_config.yaml",
        "e_vectors.npz",
        "items.parquet",
        "test.parquet",
        "train.parquet",
        "validation.parquet",
    ]


# ---- slices --------------------------------------------------------------------------------------


def test_slices_divide_the_impressions(world: tuple[Dataset, np.ndarray]) -> None:
    d = Dataset(world[0].path)
    x = Impressions(d, "test")
    cosine = np.random.default_rng(0).uniform(-1, 1, len(x))
    cosine[:7] = np.nan
    first = int(x.time.min()) - 40 * 86_400  # items are older and younger than the slices' bounds
    d.item_first_seen = first + np.arange(d.num_items) * 43_200
    values = {
        "clicks in training": d.item_clicks[x.item],
        "days since first seen": (x.time - d.item_first_seen[x.item]) // 86_400,
        "history": x.history_length,
        "largest cosine to the history": cosine,
        "category": None,
    }
    total: dict[str, int] = {}
    sizes = []
    for kind, name, mask in slices(x, cosine):
        total[kind] = total.get(kind, 0) + int(mask.sum())
        of = values[kind]
        if of is None:
            assert {d.categories[int(i)].as_py() for i in x.item[mask]} == {name}
        elif name in ("before", "none"):
            assert (of[mask] < 0).all() if name == "before" else np.isnan(of[mask]).all()
        elif " to " in name:
            low, high = map(float, name.split(" to "))
            assert low - 0.01 < of[mask].min() <= of[mask].max() < high + 0.01
            sizes.append(int(mask.sum()))
        else:
            low, high = (name.rstrip("+").split("-") * 2)[:2]
            assert of[mask].min() >= int(low)
            assert name.endswith("+") or of[mask].max() <= int(high)
    assert total == dict.fromkeys(values, len(x))
    assert len(sizes) == 4 and max(sizes) - min(sizes) <= 1


# ---- export --------------------------------------------------------------------------------------


def test_export_has_the_impressions_and_all_forms(
    tmp_path: Path, world: tuple[Dataset, np.ndarray]
) -> None:
    d, style = world
    protocol = make_protocol(d)
    export_impressions(d, protocol, {"style": style}, tmp_path, history=5, rows=300)
    for name in ("train", "validation", "test"):
        x = Impressions(d, getattr(protocol, name), history=5)
        read = pq.read_table(tmp_path / f"{name}.parquet")
        ids = np.array(d.item_ids.to_pylist())
        assert read["item_id"].to_pylist() == ids[x.item].tolist()
        assert read["clicked"].to_pylist() == x.clicked.tolist()
        for row in (0, len(x) // 2, len(x) - 1):
            page = x.page[row] - x.pages.start
            history = d.event_item[x.history_start[page] : x.history_end[page]]
            assert read["history"][row].as_py() == ids[history].tolist()
        found = np.stack([read[f"style_similarity_{c}"] for c in features.SIMILARITY], 1)
        np.testing.assert_allclose(found, features.similarity_features(style, x), atol=1e-6)
        np.testing.assert_array_equal(read["popularity"], x.popularity()[:, 0])
    items = pq.read_table(tmp_path / "items.parquet")
    known = protocol.known_items(d)
    vectors = np.stack(items["style_vector"].to_numpy())
    np.testing.assert_array_equal(vectors, features.vector_features(style, known))
    clusters = features.cluster_features(style, known)
    np.testing.assert_array_equal(items["style_cluster_256"], clusters[:, 0])
    codes = features.code_features(style, known)
    np.testing.assert_array_equal(items["style_code_3"], codes[:, 2])
    seen, every = features.code_prefixes(codes, known), features.code_prefixes(codes)
    np.testing.assert_array_equal(read["style_prefix_2"], seen[x.item, 1])
    same = features.same_cluster(every, x)
    np.testing.assert_array_equal(
        np.stack([read[f"style_same_prefix_{i}"] for i in (1, 2, 3)], 1), same
    )
    text = (tmp_path / "README.md").read_text()
    for table in (read, items):
        for column in table.column_names:
            generic = column.replace("style_similarity_", "style_similarity_*|").split("|")[0]
            if any(x in generic for x in ("cluster_", "code_", "prefix_")):
                generic = "_".join([*generic.split("_")[:-1], "*"])
            assert f"| {generic} |" in text, column


def test_the_control_knows_nothing_and_is_always_the_same() -> None:
    rows = features.random_vectors(500, 16)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, rtol=1e-5)
    np.testing.assert_array_equal(rows, features.random_vectors(500, 16))
    assert abs((rows @ rows.T)[~np.eye(500, dtype=bool)].mean()) < 0.01
