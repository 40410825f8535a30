"""How a contrast pass is divided between programs, and results of passes that are divided in the
middle of a tile."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import (
    DEVICES,
    LOSS_INPUTS,
    check_problems,
    check_sequence,
    make,
    results,
    skip_unless_available,
)

triton = pytest.importorskip("triton")
tl = triton.language

from courier_fast.kernels.triton import loss as triton_loss  # noqa: E402
from courier_fast.kernels.triton import table, tiles  # noqa: E402
from courier_fast.kernels.triton.common import parts_of, schedule  # noqa: E402
from courier_fast.loss import operators, reference  # noqa: E402

DEVICE = DEVICES["triton"]
TILE = 32


@triton.jit
def divide(
    count,
    other_count,
    slots,
    programs,
    out_ptr,  # share, blocks, parts, then first slot and number of parts of each tile
    TILES: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    STREAM: tl.constexpr,  # noqa: N803
):
    _tiles, blocks, parts, share = schedule(
        count, other_count, slots, programs, BLOCK, BLOCK, STREAM
    )
    tile = tl.arange(0, TILES).to(tl.int64)
    slot, number = parts_of(tile, blocks, parts, share)
    tl.store(out_ptr, share)
    tl.store(out_ptr + 1, blocks)
    tl.store(out_ptr + 2, parts)
    tl.store(out_ptr + 3 + tile, slot)
    tl.store(out_ptr + 3 + TILES + tile, number)


def divided(
    count: int, other: int, programs: int, stream: bool = True
) -> tuple[int, int, int, list[int], list[int], int]:
    tiles = max(-(-count // TILE), 1)
    slots = max(2 * tiles + programs // 2, programs)
    width = 1 << (tiles - 1).bit_length()
    out = torch.empty(3 + 2 * width, dtype=torch.int64, device=DEVICE)
    divide[(1,)](count, other, slots, programs, out, TILES=width, BLOCK=TILE, STREAM=stream)
    share, blocks, parts, *rest = out.tolist()
    return share, blocks, parts, rest[:tiles], rest[width : width + tiles], slots


@pytest.mark.parametrize("stream", [True, False])
def test_every_part_has_its_own_slot_and_every_block_is_in_one_part(stream: bool) -> None:
    skip_unless_available("triton", make(0, impl="triton"))
    streamed = 0
    for count, other, programs in [
        (1, 1, 4),
        (33, 1000, 4),
        (96, 1000, 4),
        (130, 999, 4),
        (300, 31, 7),
        (700, 5000, 13),
        (1000, 320, 132),
        (4000, 777, 132),
    ]:
        share, blocks, parts, first, number, slots = divided(count, other, programs, stream)
        taken = [slot + k for slot, n in zip(first, number, strict=True) for k in range(n)]
        assert len(set(taken)) == len(taken)
        assert max(taken) < slots
        if not share:
            assert set(number) == {parts}
            continue
        streamed += 1
        # What the programs do, by the kernel's own rule.
        walked: dict[int, list[int]] = {}
        for program in range(programs):
            end = min((program + 1) * share, blocks * len(first))
            for unit in range(program * share, end):
                tile = unit // blocks
                walked.setdefault(tile + program, []).append(unit)
        assert sorted(walked) == sorted(taken)
        for tile, (slot, n) in enumerate(zip(first, number, strict=True)):
            units = [unit for k in range(n) for unit in walked[slot + k]]
            assert units == list(range(tile * blocks, (tile + 1) * blocks))
        # Nobody waits for a program with more than its share.
        assert share == math.ceil(blocks * len(first) / programs)
    assert (streamed > 2) == stream


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "padding": {"mask": True},
    "both": {"direction": "both"},
    "identify-weights": {"direction": "identify", "weights": True},
    "other-pages-ids": {"negatives": "other_pages", "ids": True},
    "log-q": {"log_q": True},
    "none": {"reduction": "none"},
    "items": {"table": True},
    "items-identify": {"table": True, "direction": "identify"},
    "tensor-tau": {"tensor_tau": True},
    "page": {"negatives": "page"},
}


@pytest.mark.long("kernels case by case", short=("plain", "page"))
@pytest.mark.parametrize(
    ("case", "dtype"),
    [(case, torch.float32) for case in CASES]
    + [(case, torch.float16) for case in ("plain", "both", "none", "items")],
)
def test_a_tile_divided_between_programs(
    case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four programs on some three tiles of anchors and six or more of candidates; D = 32 is the
    length of a row in memory, so that the transposed pass writes where the gradient goes."""
    monkeypatch.setattr(tiles, "programs", lambda _device: 4)
    problems = [
        make(seed, impl="triton", pages=90, clicked=0.3, dim=32, dtype=dtype, **CASES[case])
        for seed in range(2)
    ]
    skip_unless_available("triton", problems[0])
    if case == "plain":
        for p in problems:
            anchors = reference.reconstruction_loss(p).is_anchor.sum()
            assert divided(int(anchors), p.num_pv, 4)[0] > 0
    check_problems("triton", problems)


@pytest.mark.parametrize("ids", [False, True])
def test_a_tile_divided_between_programs_in_a_sequence(ids: bool) -> None:
    check_sequence("triton", draws=2, pages=30, dim=32, ids=ids)


# What program 40,000 of 62,500 does with 160 anchors and 2 million candidates, of which only 32
# rows are in memory: its share would begin at 3.1e9 of 312,500 blocks, past what 32 bits hold.
PAST_THE_WORK = """
import torch, triton.runtime.interpreter as interpreter
from courier_fast.kernels.triton import contrast, shapes
from courier_fast.loss.problem import Problem
from factories import make

s = shapes.loss_shape(make(0, impl="triton", dim=32))
def rows(count):
    number = torch.zeros(32, dtype=torch.int32)
    count = torch.tensor([count], dtype=torch.int32)
    return contrast.PassSide(torch.ones(32, 32), count, number, number, number, None, number)
left = [torch.full(size, 7.0) for size in ((32, 32), (32,), (32,))]
out = contrast.Pass(*left, torch.empty(0, dtype=torch.int32), 62_500, s.tile)
builder, real = interpreter.interpreter_builder, contrast.contrast
builder.set_grid_idx = lambda x, y, z: setattr(builder, "grid_idx", (40_000, y, z))
class One:
    def __getitem__(self, grid):
        assert grid == (62_500,)
        return real[(1,)]
contrast.contrast = One()
seed = torch.zeros(2, dtype=torch.int64)
scores = contrast.Scores(0, 10.0, False, seed, 0, online=False, fixed_shift=True)
contrast.run_contrast(s, rows(160), rows(2_000_000), scores, out)
assert all((x == 7.0).all() for x in left), "wrote"
print("nothing written")
"""


@pytest.mark.long("kernels case by case")
@pytest.mark.skipif(DEVICE != "cpu", reason="for the interpreter")
def test_programs_past_the_work_do_nothing() -> None:
    """A process of its own: reading out of bounds ends it."""
    skip_unless_available("triton", make(0, impl="triton"))
    here = Path(__file__).parent
    run = subprocess.run(
        [sys.executable, "-c", PAST_THE_WORK],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(here)},
        cwd=here.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (run.returncode, run.stdout) == (0, "nothing written\n"), run.stderr[-2000:]


def test_gradients_in_place_without_an_anchor() -> None:
    """Rows that no anchor reaches are written all the same: there, the pass over nothing leaves
    zeros."""
    p = make(0, impl="triton", pages=60, dim=32, clicked=0.0)
    skip_unless_available("triton", p)
    assert p.num_pv > 4 * TILE
    found = results(lambda q: operators.loss(q, "triton", False)[0], p, LOSS_INPUTS)
    assert all(not x.any() for x in found.values())


@pytest.mark.parametrize("items", [5, 2**31])
def test_occurrences_are_sorted_by_keys_as_short_as_they_can_be(
    items: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    sorted_: list[torch.dtype] = []
    real = torch.sort

    def sort(x: torch.Tensor, **options: Any) -> Any:
        sorted_.append(x.dtype)
        return real(x, **options)

    monkeypatch.setattr(torch, "sort", sort)
    if items > 5:  # where each item begins would be 16 GiB
        monkeypatch.setattr(torch, "arange", lambda *_, **options: torch.tensor([0, 1], **options))
    index, page = torch.tensor([3, 0, 3, 1]), torch.tensor([0, 0, -1, 1])
    order, starts = table.occurrences(items, [(index, page), (index[:1], page[:1])])
    assert sorted_ == [torch.int32 if items == 5 else torch.int64]
    assert order.tolist() == [1, 3, 0, 4, 2]  # padding last
    assert starts.tolist() == ([0, 1, 2, 2, 4, 4] if items == 5 else [0, 1])


@pytest.mark.skipif(DEVICE != "cpu", reason="for the interpreter")
def test_a_language_patched_once_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As what the tests' interpreter leaves out."""
    from triton.runtime import interpreter

    for options in ({"direction": "both", "table": True}, {"attention": "candidate"}):
        p = make(1, impl="triton", pages=4, **options)
        skip_unless_available("triton", p)
        found = results(lambda q: operators.loss(q, "triton", False)[0], p, LOSS_INPUTS)
        with monkeypatch.context() as m:
            original = getattr(interpreter._patch_lang, "original", interpreter._patch_lang)
            m.setattr(interpreter, "_patch_lang", original)
            again = results(lambda q: operators.loss(q, "triton", False)[0], p, LOSS_INPUTS)
        for name, x in found.items():
            assert torch.equal(x, again[name]), name


def test_an_interpreter_that_cannot_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for versions, works in {
        ("3.6.0", "2.4.1"): False,
        ("3.6.0", "2.3.5"): True,
        ("3.7.0", "2.10.0"): True,
    }.items():
        assert triton_loss.interpreter_works(*versions) == works
    monkeypatch.setattr(triton_loss, "interpreter_works", lambda *_: False)
    reasons = operators.unavailable_reasons("triton", make(0))
    assert any("needs NumPy below 2.4" in x for x in reasons)
