"""Batches of unique items: against a plain Python assembly; shards, shuffles, cuts, padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dataset_factory import make_dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from courier_fast.data.batches import BatchPlan, padded_size
from courier_fast.data.dataset import Dataset


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("data") / "dataset"
    return make_dataset(folder, users=23, items=60, pages=211, history=9, images=False, seed=3)


def plain(
    dataset: Dataset, pages: list[int], history: int
) -> list[tuple[list[int], list[bool], list[int]]]:
    """Items, clicks and history of each page, item by item."""
    found = []
    for page in pages:
        shown = range(dataset.pv_start[page], dataset.pv_end[page])
        past = list(range(dataset.history_start[page], dataset.history_end[page]))[-history:]
        found.append(
            (
                [int(dataset.pv_item[i]) for i in shown],
                [bool(dataset.pv_clicked[i]) for i in shown],
                [int(dataset.event_item[i]) for i in past],
            )
        )
    return found


@pytest.mark.parametrize("history", [1, 4, 100])
def test_assembly_is_that_of_plain_python(dataset: Dataset, history: int) -> None:
    plan = BatchPlan(dataset, pages=17, history=history)
    for step in range(plan.steps(0)):
        batch = plan.batch(0, step)
        pages = plain(dataset, batch.pages.tolist(), history)
        assert len(set(batch.items.tolist())) == len(batch.items)
        assert batch.items[batch.pv_index].tolist() == [i for p in pages for i in p[0]]
        assert batch.clicked.tolist() == [c for p in pages for c in p[1]]
        assert batch.items[batch.history_index].tolist() == [i for p in pages for i in p[2]]
        assert np.diff(batch.pv_offsets).tolist() == [len(p[0]) for p in pages]
        assert np.diff(batch.history_offsets).tolist() == [len(p[2]) for p in pages]
        assert batch.occurrences == sum(len(p[0]) + len(p[2]) for p in pages)
        assert batch.num_anchors == sum(sum(p[1]) for p in pages if p[2])
        assert batch.num_sequence_anchors == sum(len(p[2]) for p in pages if len(set(p[2])) > 1)
        # Nothing but what the pages hold, in order of first use.
        assert batch.items.tolist() == list(dict.fromkeys(i for p in pages for i in (*p[0], *p[2])))


def test_no_pages_is_an_empty_batch(dataset: Dataset) -> None:
    batch = BatchPlan(dataset, pages=4).assemble(np.zeros(0, np.int64))
    assert len(batch.items) == batch.occurrences == batch.num_anchors == 0
    assert batch.pv_offsets.tolist() == [0]


@pytest.mark.parametrize("size", [{"pages": 8}, {"images": 40}])
@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_ranks_neither_overlap_nor_lose_pages(
    dataset: Dataset, size: dict[str, int], world: int
) -> None:
    plans = [BatchPlan(dataset, **size, rank=r, world=world, seed=5) for r in range(world)]
    assert len({p.steps(2) for p in plans}) == 1
    seen = [page for p in plans for s in range(p.steps(2)) for page in p.pages(2, s).tolist()]
    assert sorted(seen) == list(dataset.split("train"))


def test_a_share_is_the_first_pages_and_divides_no_moment(dataset: Dataset) -> None:
    train, times = dataset.split("train"), dataset.page_time
    for share in (0.2, 0.5):
        plan = BatchPlan(dataset, pages=8, share=share)
        seen = sorted(page for s in range(plan.steps(0)) for page in plan.pages(0, s).tolist())
        assert seen == list(range(len(seen)))
        assert abs(len(seen) - share * dataset.num_pages) <= (times == times[len(seen)]).sum()
        assert times[len(seen) - 1] < times[len(seen)]
        assert plan.until == times[len(seen) - 1]
    assert dataset.first_pages(1.0) == dataset.first_pages(0.99) == train
    for wrong in (0.0, 1.5, 1e-9):
        with pytest.raises(ValueError, match=f"share: expected .*got {wrong}"):
            dataset.first_pages(wrong)


def test_more_ranks_than_pages_leaves_some_empty(dataset: Dataset) -> None:
    world = len(dataset.split("train")) + 3
    sizes = [
        len(BatchPlan(dataset, pages=1, rank=r, world=world).pages(0, 0)) for r in range(world)
    ]
    assert sorted(sizes) == [0, 0, 0] + [1] * (world - 3)


def test_batches_of_an_epoch_are_even(dataset: Dataset) -> None:
    plan = BatchPlan(dataset, pages=50, world=3, rank=1)
    sizes = [
        len(BatchPlan(dataset, pages=50, world=3, rank=r).pages(0, s))
        for r in range(3)
        for s in range(plan.steps(0))
    ]
    assert max(sizes) <= 50
    assert max(sizes) - min(sizes) <= 1


def test_budget_of_images_is_kept_and_used(dataset: Dataset) -> None:
    plan = BatchPlan(dataset, images=40, history=9)
    for step in range(plan.steps(0)):
        batch = plan.batch(0, step)
        assert len(batch.items) <= 40
        if step + 1 < plan.steps(0):  # and the next page would not have fitted
            more = plan.assemble(np.append(batch.pages, plan.pages(0, step + 1)[0]))
            assert len(more.items) > 40


def test_a_page_above_the_budget_is_an_error_that_names_it(dataset: Dataset) -> None:
    with pytest.raises(ValueError, match=r"images: a batch may hold 3 unique images, but page \d+"):
        BatchPlan(dataset, images=3).steps(0)


def test_an_epoch_is_its_own_permutation_and_repeatable(dataset: Dataset) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        plan = BatchPlan(dataset, pages=8, seed=seed)
        return [p for s in range(plan.steps(epoch)) for p in plan.pages(epoch, s).tolist()]

    assert order(1, 0) == order(1, 0)
    assert order(1, 0) != order(1, 1) != order(2, 1)
    plan = BatchPlan(dataset, pages=8, shuffle=False)
    assert np.concatenate([plan.pages(0, s) for s in range(plan.steps(0))]).tolist() == list(
        dataset.split("train")
    )


def test_any_step_in_any_order(dataset: Dataset) -> None:
    """Steps asked for out of order, across epochs, are those asked for in order: nothing is kept
    between them."""
    once = BatchPlan(dataset, pages=8, seed=1)
    expected = {
        (e, s): once.batch(e, s).items.tolist() for e in range(2) for s in range(once.steps(e))
    }
    other = BatchPlan(dataset, pages=8, seed=1)
    for e, s in reversed(list(expected)):
        assert other.batch(e, s).items.tolist() == expected[e, s]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "exactly one of pages and images"),
        ({"pages": 1, "images": 1}, "exactly one of pages and images"),
        ({"pages": 1, "history": 0}, "history: expected at least 1"),
        ({"pages": 1, "rank": 2, "world": 2}, "rank: expected"),
        ({"pages": 1, "split": "other"}, "split: expected one of"),
    ],
)
def test_wrong_arguments(dataset: Dataset, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BatchPlan(dataset, **arguments)


def test_a_step_past_the_end(dataset: Dataset) -> None:
    plan = BatchPlan(dataset, pages=8)
    with pytest.raises(ValueError, match=r"step: expected 0 <= step <"):
        plan.pages(0, plan.steps(0))


@settings(deadline=None)
@given(st.integers(1, 10**7))
def test_padding_is_small_and_sizes_are_few(n: int) -> None:
    size = padded_size(n)
    assert n <= size <= n * 1.125
    assert padded_size(size) == size


def test_padding_to_given_sizes() -> None:
    assert [padded_size(n, (64, 256)) for n in (1, 64, 65, 256)] == [64, 64, 256, 256]
    assert padded_size(257, (64, 256)) == 288
    assert len({padded_size(n) for n in range(900, 1100)}) <= 4


def test_a_missing_folder_or_another_format(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="courier-fast prepare"):
        Dataset(tmp_path)
    for other in (1, 99):
        (tmp_path / "dataset.json").write_text(f'{{"format": {other}, "splits": {{}}}}')
        message = f"^dataset: expected format 2, got {other} in {tmp_path}/.*; prepare it again$"
        with pytest.raises(ValueError, match=message):
            Dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match="without --images"):
        _ = dataset.images


@pytest.mark.parametrize("batches", [{"pages": 3}, {"images": 30}])
def test_an_epoch_cut_anew_has_the_rest_of_its_pages(
    dataset: Dataset, batches: dict[str, int]
) -> None:
    plan = BatchPlan(dataset, **batches)
    order = np.concatenate([plan.pages(2, s) for s in range(plan.steps(2))])
    ranks = [BatchPlan(dataset, rank=r, world=3, **batches) for r in range(3)]
    for other in ranks:
        other.recut(2, 4, 37)
    steps = range(4, ranks[0].steps(2))
    found = np.concatenate([x.pages(2, s) for s in steps for x in ranks])
    assert np.array_equal(found, order[37:])
    assert ranks[0].position(2, 4) == 37
    assert ranks[0].position(2, steps.stop) == len(order)
    assert len(ranks[0].pages(1, 0)) > 0
