"""What only impl="cpu" has: instruction sets, threads, a bounded workspace, chunks of rows."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from factories import (
    LOSS_INPUTS,
    SEQUENCE_INPUTS,
    check_loss,
    check_problems,
    check_reconstruct,
    check_sequence,
    make,
    make_sequence,
    results,
    skip_unless_available,
    with_gradients,
)
from torch import Tensor

from courier_fast import reconstruction_loss, surroundings
from courier_fast.kernels.cpu import contrast, native
from courier_fast.kernels.cpu import loss as cpu_loss
from courier_fast.kernels.cpu.widen import widened
from courier_fast.loss import operators
from courier_fast.loss.problem import Problem

needs_native = pytest.mark.skipif(native.library is None, reason="the native library is not built")
VARIANTS = () if native.library is None else tuple(native.library.variants())


def loss_results(p: Problem) -> dict[str, Tensor]:
    return results(lambda q: operators.loss(q, "cpu", False)[0], p, LOSS_INPUTS)


def assert_same_bits(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, x in expected.items():
        assert torch.equal(found[name].nan_to_num(), x.nan_to_num()), name


# ---- the native library --------------------------------------------------------------------------


def test_missing_native_library_is_the_reason() -> None:
    code = """
        import sys
        sys.modules["courier_fast._native"] = None
        import torch, courier_fast
        from courier_fast.loss import operators
        pv, clicked = torch.randn(4, 8), torch.ones(4, dtype=torch.bool)
        offsets = torch.tensor([0, 4])
        arguments = dict(pv_offsets=offsets, history_offsets=offsets)
        courier_fast.reconstruction_loss(pv, pv, clicked, **arguments)
        try:
            courier_fast.reconstruction_loss(pv, pv, clicked, impl="cpu", **arguments)
        except Exception as error:
            print(error)
    """
    run = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "native library courier_fast._native is missing" in done.stdout


@needs_native
def test_every_reason_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.VARIANT_VARIABLE, "mmx")
    p = replace(make(), pv=torch.zeros(3, 4, dtype=torch.float16, device="meta"))
    reasons = " ".join(cpu_loss.unavailable_reasons(p))
    for part in ("'mmx'", *native.library.variants(), "'meta'", "torch.float16"):
        assert part in reasons


# ---- instruction sets ----------------------------------------------------------------------------


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv(native.VARIANT_VARIABLE, request.param)
    return request.param


# Dimensions and numbers of columns around the vectors of 4, 8 and 16, so that each loop has its
# rest.
VARIANT_CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "dim-35": {"dim": 35},
    "small-tau-log-q": {"tau": 0.005, "log_q": True, "pages": 20},
    "both-page-ids": {"direction": "both", "negatives": "page", "ids": True},
    "items": {"table": True, "tensor_tau": True, "pages": 30},
    "heads-projected": {"num_heads": 3, "projected": True, "dim": 33},
    "bfloat16": {"dtype": torch.bfloat16, "pages": 40, "ids": True},
    "bfloat16-items": {"dtype": torch.bfloat16, "pages": 40, "table": True, "direction": "both"},
    # Whole panels of 64: with AVX-512's bfloat16 dot products, products of our own.
    "bfloat16-64": {"dtype": torch.bfloat16, "pages": 40, "dim": 64, "tau": 0.02},
    "bfloat16-128-both": {
        "dtype": torch.bfloat16,
        "pages": 40,
        "dim": 128,
        "direction": "both",
        "negatives": "other_pages",
        "ids": True,
        "log_q": True,
    },
    "bfloat16-64-items": {
        "dtype": torch.bfloat16,
        "pages": 40,
        "dim": 64,
        "table": True,
        "tensor_tau": True,
    },
}


@pytest.fixture
def bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages in bfloat16 also where a CPU would rather have them in float32."""
    monkeypatch.setattr(surroundings, "BFLOAT16_PRODUCTS", True)


@pytest.mark.parametrize("case", VARIANT_CASES)
def test_variant(variant: str, case: str, bfloat16_products: None) -> None:
    check_loss("cpu", **VARIANT_CASES[case])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_variant_of_the_other_operators(
    variant: str, dtype: torch.dtype, bfloat16_products: None
) -> None:
    check_sequence("cpu", dtype=dtype, ids=True, pages=30)
    check_reconstruct("cpu", dtype=dtype, num_heads=2, dim=34)


WIDENED: dict[str, dict[str, Any]] = {
    "anchor": {"tensor_tau": True, "mask": True},
    "both-projected": {"direction": "both", "projected": True},
    "candidate": {"attention": "candidate", "projected": True},
    "items": {"table": True},
    "none": {"reduction": "none"},
    "given": {"given": True},
}


def loss_alone(p: Any, inputs: tuple[str, ...]) -> dict[str, Tensor]:
    """And its gradients; those of 1, as each scaling of a bfloat16 gradient rounds it again."""
    loss = operators.loss(p, "cpu")[0]
    leaves = {n: getattr(p, n) for n in inputs if getattr(p, n) is not None}
    found = torch.autograd.grad(loss.sum(), list(leaves.values()))
    return {"loss": loss.detach()} | dict(zip(leaves, found, strict=True))


@needs_native
@pytest.mark.parametrize("case", [*WIDENED, "sequence"])
def test_bfloat16_without_products_is_float32(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients rounded once, at the end."""
    monkeypatch.setattr(surroundings, "BFLOAT16_PRODUCTS", False)
    how: dict[str, Any] = {"dtype": torch.bfloat16, "pages": 20}
    p, inputs = make_sequence(ids=True, **how), SEQUENCE_INPUTS
    if case != "sequence":
        p, inputs = make(**how, **WIDENED[case]), LOSS_INPUTS
    found = loss_alone(p, inputs)
    wide = loss_alone(with_gradients(widened(p), inputs), inputs)
    rounded = {n for n, x in wide.items() if x.dtype != found[n].dtype}
    assert rounded == set(wide) - {"loss", "temperature"}
    assert_same_bits(found, {n: x.to(found[n].dtype) for n, x in wide.items()})


@needs_native
@pytest.mark.parametrize("attention", ["anchor", "candidate"])
def test_bfloat16_with_a_memory_and_without_products(
    attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of candidates are products of float32 rows, whatever their type."""
    monkeypatch.setattr(surroundings, "BFLOAT16_PRODUCTS", False)
    p, kinds = make(dtype=torch.bfloat16, pages=20), set()
    real = torch.mm

    def mm(a: Tensor, b: Tensor, **more: Any) -> Tensor:
        kinds.update((a.dtype, b.dtype))
        return real(a, b, **more)

    monkeypatch.setattr(torch, "mm", mm)
    rows = [x.detach().requires_grad_() for x in (p.pv, p.history)]
    loss = reconstruction_loss(
        *rows,
        p.clicked,
        pv_offsets=p.pv_offsets,
        history_offsets=p.history_offsets,
        memory=torch.randn(30, 24).bfloat16(),
        attention=attention,
        impl="cpu",
    )
    loss.backward()
    assert kinds == {torch.float32}


def test_ranks_of_a_variant(variant: str) -> None:
    from courier_fast.loss import reference

    for case in ({}, {"log_q": True}, {"table": True}, {"ids": True, "negatives": "other_pages"}):
        p = make(3, pages=60, **case)
        rank = operators.loss(p, "cpu", True)[4]
        assert torch.equal(rank, reference.reconstruction_loss(p).rank)


@needs_native
@pytest.mark.parametrize("last", [-3.0, torch.nan, torch.inf], ids=str)
def test_probabilities_of_extreme_scores(last: float) -> None:
    """exp over the whole range of float32: 0 below it; NaN and infinity reach the sum."""
    row = torch.tensor([0.0, -87.0, -88.0, -1e4, -torch.inf, -30.0, -0.5, -5e-8, -17.3, -1.1])
    row = torch.cat([row.repeat(5), torch.tensor([-2.0, last])])
    expected = row.double().exp()
    expected[row < -87.3] = 0
    for variant in VARIANTS:
        scores = torch.cat([torch.zeros(1), row])[None].clone()
        top, total = torch.empty(1), torch.empty(1, dtype=torch.float64)
        own, nothing = torch.zeros(1, dtype=torch.int64), (None,) * 3
        native.library.contrast(
            scores, 0, 1.0, *nothing, own, *nothing, False, top, total, None, 1, variant
        )
        if last != -3.0:
            assert not total.isfinite()
            continue
        assert top == 0
        found = scores[0, 1:].double()
        assert torch.equal(found == 0, expected == 0)
        error = (found - expected).abs()[expected > 0] / expected[expected > 0]
        assert error.max() <= torch.finfo(torch.float32).eps
        assert total == pytest.approx(float(expected.sum()), rel=torch.finfo(torch.float32).eps)


HAS_PRODUCTS = [v for v in VARIANTS if native.library.panel_columns(v)]


@pytest.mark.skipif(not HAS_PRODUCTS, reason="this CPU has no bfloat16 dot products")
@pytest.mark.parametrize("dim", [64, 192])
@pytest.mark.parametrize("columns", [1, 2, 47, 48, 49, 63, 64, 65, 97, 400])
def test_products_at_every_edge(dim: int, columns: int) -> None:
    """Scores, P y and P^T x around groups of rows, panels and blocks; memory before them holds NaN.

    Numbers whose scores, probabilities (powers of two) and products no rounding touches.
    """
    for rows in (1, 2, 5, 6, 7, 23, 24, 48, 49, 101):
        g = torch.Generator().manual_seed(rows)
        x, y = (torch.randint(-1, 2, (n, dim), generator=g) / 8 for n in (rows, columns))
        products = contrast._NativeProducts(y.bfloat16(), True, True)
        products.room(rows)
        for memory in (products.scratch, products.kept, products.weighted):
            assert memory is not None
            memory.fill_(0x7FC07FC0)
        own = torch.arange(rows) % columns
        top, total = torch.empty(rows), torch.empty(rows, dtype=torch.float64)
        product = torch.full((rows, dim), torch.nan)
        about = (64 * math.log(2), *(None,) * 3, own, *(None,) * 3)
        products.tile(x.bfloat16(), slice(0, columns), about, (top, total, None), product)
        d_y = torch.ones(columns, dim)
        products.transposed(x.bfloat16(), d_y)

        power = 64 * (x @ y.T)
        power[torch.arange(rows), own] = -torch.inf
        highest = power.max(1).values.nan_to_num(neginf=0)
        p = (power - highest[:, None]).exp2()
        torch.testing.assert_close(top, highest * math.log(2))
        torch.testing.assert_close(product, p @ y)
        torch.testing.assert_close(d_y, p.T @ x + 1)
        # Not rounded to bfloat16: exp of scores that were rounded to float32.
        torch.testing.assert_close(total.float(), p.sum(1), rtol=1e-5, atol=0)


def test_auto_takes_the_kernels_for_small_batches() -> None:
    """They cost the host less than the reference at every size that was measured
    (kernels/cpu/README.md)."""
    from courier_fast.loss import functional

    p = make(pages=2)
    skip_unless_available("cpu", p)
    assert functional.choose("auto", p) == "cpu"


# ---- chunks, threads, workspace ------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize(
    "case", ["plain", "both-page-ids", "items", "bfloat16", "bfloat16-128-both", "small-tau-log-q"]
)
def test_several_chunks(monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.setattr(contrast, "CHUNK_BYTES", 1)
    monkeypatch.setattr(contrast, "NATIVE_CHUNK_BYTES", 1)
    monkeypatch.setattr(contrast, "LEAST_CHUNK_ROWS", 5)
    monkeypatch.setattr(contrast, "PAGE_CHUNK_ROWS", 5)
    check_loss("cpu", **VARIANT_CASES[case])
    check_sequence("cpu", ids=True, pages=20)


@needs_native
@pytest.mark.parametrize("options", [{}, {"dtype": torch.bfloat16}, {"table": True}], ids=str)
def test_two_runs_and_any_threads(options: dict[str, Any]) -> None:
    """Two runs give the same bits; the stages also on any number of threads, the products may
    differ in rounding."""
    problems = [make(seed, pages=60, dim=64, **options) for seed in range(3)]
    p = problems[0]
    torch.set_num_threads(1)
    alone = operators.reconstruct(p, "cpu")
    assert_same_bits(loss_results(p), loss_results(p))
    check_problems("cpu", problems)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(operators.reconstruct(p, "cpu"), alone)
        assert_same_bits(loss_results(p), loss_results(p))
        check_problems("cpu", problems)


PEAK = """
    import ctypes, gc, sys
    from pathlib import Path
    import torch
    sys.path.insert(0, {tests!r})
    from factories import LOSS_INPUTS, make, results
    from courier_fast.loss import operators

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(x.split()[1]) << 10 for x in lines if x.startswith(field + ":"))

    def run(p):
        return results(lambda q: operators.loss(q, "cpu", False)[0], p, LOSS_INPUTS)

    torch.set_num_threads(2)
    options = dict(longest_pv=10, longest_history=10, dim=64, clicked={clicked}, ids={ids})
    options["dtype"] = getattr(torch, {dtype!r})
    p = make(pages=2000, **options)
    if {ids}:
        p.item_ids.zero_()
    run(make(pages=200, **options))  # loads libraries, starts threads
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    grads = run(p)
    peak = status("VmHWM") - before
    print(peak - sum(x.nbytes for x in grads.values()))
"""


@pytest.mark.long("memory")
@needs_native
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("dtype", "ids"), [("float32", False), ("float32", True), ("bfloat16", False)]
)
def test_memory_does_not_grow_with_rows_times_columns(dtype: str, ids: bool) -> None:
    """All of 10,000 rows as anchors: the similarities are 400 MB in float32, with every item the
    same one too."""
    code = PEAK.format(tests=os.path.dirname(__file__), dtype=dtype, clicked=1.0, ids=ids)
    run = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    # One chunk of rows, and a few copies of the inputs (3 MB each in float32), which all rows are
    # here.
    assert int(done.stdout) <= contrast.CHUNK_BYTES + (64 << 20)


# ---- regressions ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"log_q": True}, {"negatives": "page"}, {"ids": True}], ids=str
)
def test_table_with_as_many_items_as_rows(options: dict[str, Any]) -> None:
    """Columns in the order of rows were taken for the table's rows where there were as many."""
    problems = []
    for seed in range(3):
        p = make(seed, table=True, **options)
        g = torch.Generator().manual_seed(seed)
        table = torch.randn(p.num_pv, p.pv.shape[1], generator=g).requires_grad_()
        problems.append(replace(p, pv=table))
    check_problems("cpu", problems)


def test_frozen_inputs() -> None:
    """A product that no wanted gradient needs is left out; the others keep their values."""
    p = make(1, direction="both", tensor_tau=True)
    skip_unless_available("cpu", p)
    everything = loss_results(p)
    for name in LOSS_INPUTS:
        x = getattr(p, name)
        if x is None:
            continue
        alone = {n: getattr(p, n).detach() for n in LOSS_INPUTS if getattr(p, n) is not None}
        alone[name] = x.detach().requires_grad_()
        q = replace(p, **alone)
        loss = operators.loss(q, "cpu", False)[0]
        g = torch.Generator().manual_seed(7)
        upstream = torch.randn(loss.shape, generator=g)
        (grad,) = torch.autograd.grad(loss, [alone[name]], upstream)
        assert torch.equal(grad, everything[name]), name


@needs_native
def test_click_sequence_none_equals_mean() -> None:
    p = make_sequence(2, ids=True, pages=20)
    skip_unless_available("cpu", p)
    mean = results(lambda q: operators.loss(q, "cpu")[0], p, SEQUENCE_INPUTS)["output"]
    each = operators.loss(replace(p, reduction="none"), "cpu")[0].detach()
    torch.testing.assert_close(each.sum() / (each != 0).sum(), mean)


def test_one_candidate_whose_score_underflows() -> None:
    """With no other candidate at tau = 0.01 and cos = -1 the loss was 0/0."""
    p = make(1, tau=0.01, pages=1)
    page = torch.tensor([0, 1])
    opposite = {"pv": torch.ones(1, 1), "history": -torch.ones(1, 1), "clicked": page[1:] > 0}
    p = replace(p, **opposite, pv_offsets=page, history_offsets=page)
    skip_unless_available("cpu", p)
    p = replace(p, pv=p.pv.requires_grad_(), history=p.history.requires_grad_())
    found = loss_results(p)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found.values())
