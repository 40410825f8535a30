"""What the Triton kernels compile to for GPUs that need not be there: on sm_90 the tiles in use
keep their sums in registers, and the hot loops are bare. That every path compiles for other GPUs
too is `test_dry_run.py`'s."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent

triton = pytest.importorskip("triton", reason="Triton is not installed")
if not sys.platform.startswith("linux"):
    pytest.skip("Triton compiles on Linux only", allow_module_level=True)

from bench.launches import COMMON, SPECIAL  # noqa: E402
from courier_fast.kernels.triton.tiles import SHARED_MEMORY  # noqa: E402

# Bytes of a thread that may spill, outside of loops: two registers from tile to tile with Triton
# 3.9; in attention for each candidate what is kept over the sum of long histories; and with several
# heads one tile more, and addresses of 64 bits from head to head.
MAY_SPILL = {
    "log-q": 8,
    "heads": 16,
    "candidate-heads": 128,
    "candidate-items": 40,
    "candidate-256": 40,
    "candidate-128": 40,
    "candidate-dot": 40,
    "candidate-ids": 40,
    "candidate-projected": 40,
    "candidate-fp32-64": 40,
    "candidate-fp16-128": 40,
}
# The same with Triton 3.6, where attention keeps more from block to block since a logit's gradient
# is a difference that cancels (before: 0, and 8 for "candidate").
OLDER_MAY_SPILL = {
    "bf16-768": 8,
    "fp32-256": 8,
    "fp32-64": 88,
    "heads": 32,
    "candidate-256": 104,
    "candidate-items": 120,
    "candidate-dot": 48,
    "candidate-projected": 56,
    "candidate-ids": 56,
}
# Of pages in bins: what was reached. dL/dx of a tile holds five tiles of numbers and what is known
# of the pages, 184 bytes too much in bfloat16; the most is that of exact products of float32.
BINNED_MAY_SPILL = {
    "binned_gradients": 440,
    "binned_columns": 32,
    "page_weights": 8,
}

# The same of the lanes of pages of one block: a sum of 64 x 256 numbers, half the registers of 128
# threads, stands beside a step's logits, products and weights, with 4 heads of 64 lanes.
LANES_MAY_SPILL = {"lane_scores": 456, "lane_columns": 1096, "lane_history": 1760}
# Instructions of a step of 64 candidates on a page by 4 warps (bfloat16, D = 256, sm_90); with
# Triton 3.6, and 3.8.
LANE_LOOPS = {
    "candidate-projected": {
        "lane_scores": (942, 988),
        "lane_columns": (1312, 1305),
        "lane_history": (1250, 1268),
    },
    "candidate-heads": {
        "lane_scores": (1574, 1561),
        "lane_columns": (2506, 2441),
        "lane_history": (2471, 2486),
    },
}

# Instructions of a step of the contrast's loop over columns (bfloat16, sm_90): of the pass for
# log-sum-exps alone, the forward and the transposed pass, with Triton 3.6 and from 3.7 on (in 3.9,
# wgmma descriptors are longer). What was reached, so that it is not lost again: a mask or an
# address more in the loop is at least eight.
HOT_LOOPS = {
    "bf16-256": ((209, 242), (239, 278), (249, 278)),
    "bf16-128": ((275, 286), (326, 349), (285, 325)),
    "bf16-64": ((147, 156), (171, 190), (164, 180)),
}
# Of a tile of candidates and a bin: the same of binned.py, D = 256, by dot products and by cosines;
# and loads of what is spilled, of which there is none elsewhere.
BINNED_LOOPS = {
    "candidate-dot": {
        "binned_scores": (683, 684),
        "binned_gradients": (1174, 1127),
        "binned_columns": (125, 130),
        "binned_history": (184, 182),
    },
    "candidate-256": {
        "binned_scores": (676, 678),
        "binned_gradients": (1140, 1159),
        "binned_columns": (125, 130),
        "binned_history": (184, 182),
    },
    "candidate-ids": {
        "binned_scores": (749, 748),
        "binned_gradients": (1313, 1248),
        "binned_columns": (125, 130),
        "binned_history": (184, 182),
    },
}
BINNED_ELSEWHERE = 136  # bytes spilled at most on sm_80 and sm_86
BINNED_RELOADS = {"candidate-dot": (7, 11), "candidate-256": (10, 29), "candidate-ids": (19, 18)}
SLACK = 4  # of the compiler: it orders and merges differently from one release to the next


SHORT = "bf16-64"  # compiled by the short run, too
# A process needs seconds to begin; workers that share these tests should not each compile all.
AT_ONCE = 5
LONG = [label for label in (*COMMON, *SPECIAL) if label != SHORT]
GROUPS = [[SHORT], *(LONG[i : i + AT_ONCE] for i in range(0, len(LONG), AT_ONCE))]


def version() -> tuple[int, ...]:
    """Triton's, (major, minor)."""
    return tuple(int(x) for x in triton.__version__.split(".")[:2])


def compiled(label: str) -> list[dict[str, Any]]:
    """What came out of each launch on sm_90."""
    found = outcomes(",".join(next(group for group in GROUPS if label in group)), 90)
    return [x for x in found if x["which"] == label]


@functools.cache
def outcomes(which: str, *capabilities: int) -> list[dict[str, Any]]:
    """Of some labels, each on each capability; Triton's own cache makes later runs short."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    workers = str(min(2, os.cpu_count() or 1))
    run = subprocess.run(
        [sys.executable, str(HERE / "compile_worker.py"), which, workers, *map(str, capabilities)],
        env=environment,
        cwd=HERE.parent,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads(run.stdout)


def check(results: list[dict[str, Any]], may_spill: int = 0) -> None:
    assert results
    for x in results:
        label = f"{x['name']} on sm_{x['capability']}"
        assert x["error"] is None, f"{label}: {x['error']}"
        assert x["shared"] <= SHARED_MEMORY[x["capability"]], f"{label}: {x['shared']} bytes shared"
        spilled = f"{label}: {x['spilled']} bytes on the stack, {x['registers']} registers"
        reached = (BINNED_MAY_SPILL | LANES_MAY_SPILL).get(x["name"], 0)
        assert x["spilled"] <= max(may_spill, reached), spilled
        in_loop = {"LDL", "STL"} & set(x["loop"])
        assert reached or not in_loop, f"{label}: spills in the loop: {x['loop']}"
        needed = x["needs_wgmma"] and x["capability"] == 90
        assert x["wgmma"] or not needed, f"{label}: no wgmma in the PTX"


def test_detects_spills_and_wgmma() -> None:
    own = {(x["name"], x["capability"]): x for x in outcomes("own", 80, 90)}
    assert own["fits", 90]["error"] is None
    assert own["fits", 90]["wgmma"]
    assert own["fits", 90]["spilled"] == 0
    assert not own["fits", 80]["wgmma"]
    assert own["spills", 90]["spilled"] > 0


@pytest.mark.long("GPU targets", short=(SHORT,))
@pytest.mark.parametrize("label", [*COMMON, *SPECIAL])
def test_kernels_compile_for_hopper(label: str) -> None:
    older = version() < (3, 7)
    reached = MAY_SPILL | OLDER_MAY_SPILL if older else MAY_SPILL
    check(compiled(label), reached.get(label, 0))


@pytest.mark.long("GPU targets", short=(SHORT,))
@pytest.mark.parametrize("label", HOT_LOOPS)
def test_hot_loops_stay_bare(label: str) -> None:
    """No mask, id or predicate outside the diagonal and the tail: every one of them shows in the
    count."""
    if version() < (3, 6):
        pytest.skip("Triton 3.5 takes about 130 instructions more for the same loops")
    newer = version() >= (3, 7)
    loops = [x for x in compiled(label) if x["name"] == "contrast" and x["loop"]]
    assert len(loops) >= 3
    for x in loops:
        flags = x["constexprs"]
        kind = (1 if flags["NEED_SUM"] else 2) if flags["NEED_VALUES"] else 0
        most = HOT_LOOPS[label][kind][newer] + SLACK
        count = sum(x["loop"].values())
        assert count <= most, f"{count} instructions, {most} at most: {x['loop']}"
        assert x["loop"].get("LDGSTS", 0) > 0, f"loads are not ahead of their use: {x['loop']}"


@pytest.mark.long("GPU targets")
@pytest.mark.parametrize("label", BINNED_LOOPS)
def test_loops_over_bins_do_not_grow(label: str) -> None:
    if version() < (3, 6):
        pytest.skip("counted from Triton 3.6 on")
    newer = version() >= (3, 7)
    found = [x for x in compiled(label) if x["name"] in BINNED_LOOPS[label]]
    assert {x["name"] for x in found} == set(BINNED_LOOPS[label])
    for x in found:
        count, most = sum(x["loop"].values()), BINNED_LOOPS[label][x["name"]][newer]
        assert count > most // 2, f"{x['name']}: {x['loop']} is no loop over candidates"
        assert count <= most + SLACK, f"{x['name']}: {count} instructions: {x['loop']}"
        reloads = BINNED_RELOADS[label][newer] if x["name"] == "binned_gradients" else 0
        assert x["loop"].get("LDL", 0) <= reloads, f"{x['name']}: {x['loop']}"
        assert not x["loop"].get("STL"), f"{x['name']}: {x['loop']}"


@pytest.mark.long("GPU targets")
def test_bins_have_registers_and_memory_elsewhere() -> None:
    names = BINNED_MAY_SPILL.keys() | BINNED_LOOPS["candidate-dot"].keys()
    for capability in (80, 86):
        found = [x for x in outcomes("candidate-dot", capability) if x["name"] in names]
        assert {"binned_scores", "binned_gradients"} <= {x["name"] for x in found}
        check(found)
        assert max(x["spilled"] for x in found) <= BINNED_ELSEWHERE


@pytest.mark.long("GPU targets")
@pytest.mark.parametrize("label", LANE_LOOPS)
def test_loops_of_lanes_do_not_grow(label: str) -> None:
    if version() < (3, 6):
        pytest.skip("counted from Triton 3.6 on")
    found = {x["name"]: x for x in compiled(label) if x["name"].startswith("lane_")}
    assert set(found) == set(LANE_LOOPS[label])
    for name, counts in LANE_LOOPS[label].items():
        most = counts[version() >= (3, 7)]
        count = sum(found[name]["loop"].values())
        assert most // 2 < count <= most + SLACK, f"{name}: {count}: {found[name]['loop']}"
        assert found[name]["needs_wgmma"]


@pytest.mark.long("GPU targets")
def test_the_contrast_is_expected_on_wgmma() -> None:
    found = {x["name"] for x in compiled("bf16-256") if x["needs_wgmma"]}
    assert found == {"contrast"}
