"""Attention for each candidate by packed pages: which calls take those kernels, chunks of
candidates, and numbers at the ends of their range."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import check_problems, make
from test_edges import build, loss_of, normal, run

from courier_fast.loss import reference

pytest.importorskip("triton", reason="Triton is not installed")

PACKED = {"binned_scores", "binned_gradients", "binned_columns", "binned_history"}
CALL = """
import contextlib, json, sys
import torch
from bench.launches import recorded
from courier_fast import ReconstructionLoss
from courier_fast.kernels.triton import loss as triton_loss

triton_loss.unavailable_reasons = lambda p: []  # there is no GPU, and nothing runs
kind, dim, capability, options = json.loads(sys.argv[1])
given = {"item_ids": torch.arange(2560).view(512, 5)} if options.pop("ids", False) else {}
around = torch.autocast("cpu", torch.bfloat16) if kind == "autocast" else contextlib.nullcontext()
dtype = torch.float32 if kind == "autocast" else getattr(torch, kind)
pv = torch.zeros(512, 5, dim, dtype=dtype, requires_grad=True)
history = torch.zeros(512, 10, dim, dtype=dtype, requires_grad=True)
clicked = torch.zeros(512, 5, dtype=torch.bool)
loss_fn = ReconstructionLoss(temperature=0.1, impl="triton", **options)
with recorded(capability) as found, around:
    loss_fn(pv, history, clicked, **given).backward()
print(json.dumps([x.name for x in found]))
"""


def launched(kind: str, dim: int = 256, capability: int = 90, **options: Any) -> list[str]:
    """Kernels that the module of the README launches on a GPU, forward and backward."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    found = subprocess.run(
        [sys.executable, "-c", CALL, json.dumps([kind, dim, capability, options])],
        env=environment,
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert found.returncode == 0, found.stderr[-4000:]
    return json.loads(found.stdout)


@pytest.mark.parametrize(
    ("kind", "dim", "capability", "options"),
    [
        ("bfloat16", 256, 90, {}),
        ("float32", 256, 80, {}),
        ("autocast", 256, 120, {}),
        ("bfloat16", 768, 100, {}),
        ("float16", 256, 86, {}),
        ("autocast", 64, 90, {"attention_temperature": 0.01}),
        ("bfloat16", 256, 90, {"ids": True}),
    ],
    ids=str,
)
def test_the_call_of_the_readme_takes_the_packed_kernels(
    kind: str, dim: int, capability: int, options: dict[str, Any]
) -> None:
    assert set(launched(kind, dim, capability, **options)) >= PACKED


def test_a_call_that_cannot_is_seen() -> None:
    assert not PACKED & set(launched("bfloat16", num_heads=2))


@pytest.mark.parametrize("cosine", [False, True])
def test_chunks_of_candidates_add_up(cosine: bool) -> None:
    """More candidates than a tile has, and no room for more than one."""
    given = {"attention": "candidate", "pages": 70, "dim": 16, "clicked": 0.2, "cosine": cosine}
    problems = [replace(make(seed, impl="triton", **given), workspace=1) for seed in range(2)]
    assert all(p.num_pv > 128 for p in problems)
    check_problems("triton", problems)


@pytest.mark.parametrize("scale", [12.0, 60.0])
def test_large_logits(scale: float) -> None:
    """Of some hundreds: without the maximum of a page 2^l would be infinite."""
    given = {"attention": "candidate", "attention_scale": scale, "pages": 6}
    problems = [make(seed, impl="triton", **given) for seed in range(3)]
    largest = max(float((p.pv.detach() @ p.history.detach().T).max()) for p in problems)
    assert largest * scale > 200
    check_problems("triton", problems)


@pytest.mark.parametrize("cosine", [False, True])
def test_zero_vectors(cosine: bool) -> None:
    pv, history = normal(5, 16), normal(4, 16, seed=1)
    pv[1], history[1], history[2:] = 0, 0, 0  # every reconstruction of page 1 is zero
    pages = [(3, 2), (2, 2)]
    p = build("triton", pv, history, pages, [1, 1, 0, 1, 0], attention="candidate", cosine=cosine)
    found, expected = run("triton", p), run("reference", p)
    assert not found["pv"][1].any()
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["pv", "history"])
@pytest.mark.parametrize("cosine", [False, True])
def test_what_is_not_finite_is_where_eager_code_has_it(
    value: float, name: str, cosine: bool
) -> None:
    """Also where pages share a bin."""
    tensors = {"pv": normal(7, 16), "history": normal(6, 16, seed=1)}
    tensors[name][0, 3] = value
    p = build(
        "triton",
        tensors["pv"],
        tensors["history"],
        [(3, 2), (2, 2), (2, 2)],
        [1, 0, 0, 1, 0, 0, 1],
        reduction="none",
        attention="candidate",
        cosine=cosine,
    )
    expected = reference.reconstruction_loss(p).loss
    assert expected.isnan().any()
    assert loss_of("triton", p).isnan().tolist() == expected.isnan().tolist()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"num_heads": 2}, "num_heads is 2"),
        ({"projected": True}, "query and key and value of the caller's own"),
        ({"negatives": "page"}, 'negatives is "page"'),
        ({"dim": 1}, "one dimension"),
    ],
    ids=str,
)
def test_why_a_call_takes_the_slower_kernels(options: dict[str, Any], reason: str) -> None:
    from courier_fast.kernels.triton.candidate.state import fast_path_reasons

    p = make(0, attention="candidate", **options)
    (found,) = fast_path_reasons(p)
    assert found.startswith(reason)
    assert not fast_path_reasons(make(0, attention="candidate"))
    assert "return_stats" in fast_path_reasons(make(0, attention="candidate"), stats=True)[0]


def test_the_log_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    from courier_fast.kernels.triton.candidate.state import tell_slow_path

    caplog.set_level("INFO", "courier_fast")
    for _ in range(2):
        tell_slow_path("a reason", "another")
    assert caplog.messages == ['attention="candidate" takes the slower kernels: a reason; another']
