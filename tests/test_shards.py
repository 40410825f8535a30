"""The dataset folder in shards: however it is cut, everything downstream sees the same; what is cut
off or altered is named."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from dataset_factory import columns_of, images_of, make_dataset, rewrite
from prepare_factory import digest, random_events, source_of

from courier_fast.data import batches, tables
from courier_fast.data.batches import BatchPlan, Order
from courier_fast.data.dataset import TABLES, Dataset
from courier_fast.data.prepare.options import PrepareOptions
from courier_fast.data.prepare.run import prepare
from courier_fast.data.tables import Maps, ShardedTable, write_images, write_shard
from courier_fast.storage import Folder, Shard


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """One shard of each table."""
    return make_dataset(tmp_path_factory.mktemp("whole") / "d", items=60, pages=150)


@pytest.fixture
def cut(whole: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """The same in many shards."""
    monkeypatch.setenv("COURIER_FAST_CACHE", str(tmp_path / "cache"))
    return rewrite(whole, tmp_path / "cut", shard_rows=17, shard_bytes=5000)


def assert_same(found: Dataset, expected: Dataset) -> None:
    for name in TABLES:
        columns = columns_of(found, name)
        for column, values in columns_of(expected, name).items():
            assert columns[column].tolist() == values.tolist(), (name, column)
    assert images_of(found) == images_of(expected)
    assert found.images.present.tolist() == expected.images.present.tolist()
    for attribute in ("page_user", "page_time", "pv_clicked", "event_item", "item_clicks"):
        a, b = getattr(found, attribute), getattr(expected, attribute)
        assert isinstance(a, np.ndarray)
        assert a.dtype == b.dtype
        assert a.tolist() == b.tolist()
    assert found.pv_weight is expected.pv_weight is None
    assert found.first_pages(0.4) == expected.first_pages(0.4)
    for how in ({"pages": 7}, {"images": 30}):
        plans = [BatchPlan(d, history=4, seed=3, **how) for d in (found, expected)]
        assert plans[0].steps(1) == plans[1].steps(1)
        assert plans[0].until == plans[1].until
        for step in range(plans[0].steps(1)):
            one, other = (vars(p.batch(1, step)) for p in plans)
            assert {n: v.tolist() for n, v in one.items()} == {
                n: v.tolist() for n, v in other.items()
            }
        for of in (lambda p: p.weights(0.5), lambda p: p.log_q(True), lambda p: p.log_q()):
            np.testing.assert_allclose(of(plans[0]), of(plans[1]), rtol=1e-6)


def test_many_shards_are_as_one(whole: Dataset, cut: Dataset) -> None:
    assert len(cut.pages.shards) == 9
    assert len(cut.tables["images"].shards) > 5
    assert_same(cut, whole)
    assert_same(pickle.loads(pickle.dumps(cut)), whole)


def test_prepare_cuts_where_it_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COURIER_FAST_CACHE", str(tmp_path / "cache"))
    source = source_of(random_events(0))
    for name, rows in (("one", 1 << 20), ("many", 50)):
        options = PrepareOptions(min_history=1, shard_rows=rows)
        prepare(tmp_path / name, source=source, options=options)
    one, many = Dataset(tmp_path / "one"), Dataset(tmp_path / "many")
    for name in TABLES:
        shards = many.tables[name].shards
        rows = [s.rows for s in shards]
        assert rows[:-1] == [50] * (len(rows) - 1)
        assert 0 < rows[-1] <= 50
        assert [s.name for s in shards] == [f"{name}/{i:05}.arrow" for i in range(len(rows))]
        found, expected = columns_of(many, name), columns_of(one, name)
        assert {n: v.tolist() for n, v in found.items()} == {
            n: v.tolist() for n, v in expected.items()
        }
    assert many.verify() == sum(
        (tmp_path / "many").joinpath(s.name).stat().st_size
        for t in many.tables.values()
        for s in t.shards
    )


@pytest.mark.parametrize("seed", range(5))
def test_columns_are_those_of_one_array(
    tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COURIER_FAST_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(seed)
    values = rng.integers(0, 1000, 500)
    entries = tables.write_shards(tmp_path, "t", {"x": values}, int(rng.integers(1, 200)))
    table = ShardedTable(Maps(Folder(tmp_path)), [Shard(**e) for e in entries])
    column = table.column("x")
    rows = rng.integers(0, 500, 300)
    np.testing.assert_array_equal(column.take(rows), values[rows])
    assert len(column.take(rows[:0])) == 0
    starts = rng.integers(0, 500, 40)
    ends = np.minimum(500, starts + rng.integers(0, 90, 40))
    expected = np.concatenate([values[a:b] for a, b in zip(starts, ends, strict=True)])
    np.testing.assert_array_equal(column.ranges(starts, ends), expected)
    a, b = sorted(rng.integers(0, 501, 2).tolist())
    np.testing.assert_array_equal(np.concatenate([values[:0], *column.parts(a, b)]), values[a:b])
    np.testing.assert_array_equal(column.joined(), values)
    assert column[17] == values[17]
    assert sum(map(len, column.parts(a, b))) == b - a


def test_the_same_rows_are_the_same_bytes(tmp_path: Path) -> None:
    """Cut from a longer array, joined from parts or written as they are; with and without nulls
    among the rows."""
    text = pa.array(["a", None, "ccc", "dd", "", "f", None, "hh", "i", "j"])
    for start, end in ((0, 10), (2, 6), (1, 4), (5, 10)):
        rows = text[start:end]
        ways = [
            rows,
            pa.array(rows.to_pylist()),
            pa.concat_arrays([text[start : start + 1], text[start + 1 : end]]),
        ]
        numbers = np.arange(10)[start:end]
        entries = [
            write_shard(tmp_path, f"t{i}", 0, {"s": way, "n": numbers})
            for i, way in enumerate(ways)
        ]
        assert len({e["sha256"] for e in entries}) == 1, (start, end)


def test_images_are_cut_by_the_bytes_before_them(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    images = [rng.bytes(n) if n else None for n in rng.integers(0, 40, 100).tolist()]
    images[50] = rng.bytes(1000)  # passes over numbers
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    with tables.ImageStoreWriter(tmp_path / "a", 100) as store:
        for image in images:
            store.append(image)
    before = np.cumsum([0, *(len(i or b"") for i in images)])[:-1] // 100
    alone = [
        write_images(
            tmp_path / "b", n, [i for i, of in zip(images, before, strict=True) if of == n]
        )
        for n in np.unique(before).tolist()
    ]
    assert store.shards == alone
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


# ---- order ---------------------------------------------------------------------------------------


def test_an_epoch_has_every_page_once_and_few_shards_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(batches, "WINDOW", 100)
    bounds, rows = np.arange(0, 521, 40), range(30, 480)
    order = Order(rows, bounds, seed=1, shuffle=True)
    pages = order.pages(0, 0, len(rows))
    assert sorted(pages.tolist()) == list(rows)
    for start, stop in ((0, 7), (95, 240), (440, 450)):  # from anywhere, in any order
        assert (
            Order(rows, bounds, 1, True).pages(0, start, stop).tolist()
            == pages[start:stop].tolist()
        )
        assert order.pages(0, start, stop).tolist() == pages[start:stop].tolist()
    assert order.pages(1, 0, len(rows)).tolist() != pages.tolist()
    assert Order(rows, bounds, 2, True).pages(0, 0, len(rows)).tolist() != pages.tolist()
    # A shard's pages are all within one window of whole shards.
    place = np.argsort(pages)
    for a in range(40, 480, 40):
        at = place[a - 30 : a + 10]
        assert at.max() - at.min() < 100 + 40
    assert Order(rows, bounds, 1, False).pages(0, 3, 9).tolist() == list(range(33, 39))


def test_up_to_a_window_the_shards_do_not_matter() -> None:
    one, many = (
        Order(range(500), np.array(b), 4, True).pages(2, 0, 500).tolist()
        for b in ([0, 500], [0, 10, 90, 500])
    )
    assert one == many != sorted(one)
    plain = np.arange(500)
    np.random.Generator(np.random.Philox(key=[4, 2])).shuffle(plain)
    assert one == plain.tolist()


# ---- damage --------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("damage", "error"),
    [(truncate, ValueError), (alter, ValueError), (Path.unlink, FileNotFoundError)],
)
def test_a_damaged_shard_is_named(
    cut: Dataset, damage: Callable[[Path], None], error: type[Exception]
) -> None:
    assert isinstance(cut.path, Path)
    for name in ("events/00002.arrow", "items/00001.arrow"):
        path = cut.path / name
        before = path.read_bytes()
        damage(path)
        with pytest.raises(error, match=name):
            _ = (Dataset(cut.path).event_item, Dataset(cut.path).item_ids)
        with pytest.raises(error, match=name):
            Dataset(cut.path).verify()
        path.write_bytes(before)
    images = cut.path / "images/00001.arrow"
    damage(images)
    with pytest.raises(error, match=r"images/00001\.arrow"):
        Dataset(cut.path).verify()
    if damage is not alter:  # what is altered in a local image is found when it is decoded
        with pytest.raises(error, match=r"images/00001\.arrow"):
            images_of(Dataset(cut.path))


def test_a_report_that_was_cut_off_passed(cut: Dataset) -> None:
    assert isinstance(cut.path, Path)
    (cut.path / "report.json").write_text('{"events": 3,')
    with pytest.raises(ValueError, match=r"report\.json: was cut off or altered"):
        Dataset(cut.path).verify()


def test_a_damaged_manifest_is_named(cut: Dataset) -> None:
    assert isinstance(cut.path, Path)
    alter(cut.path / "manifest.json")
    with pytest.raises(ValueError, match=r"manifest\.json was cut off or altered"):
        Dataset(cut.path)
    (cut.path / "manifest.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"manifest\.json"):
        Dataset(cut.path)
