"""Attention for each candidate: the reference against the definition, every implementation against
the reference, edges."""

from __future__ import annotations

import math
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import (
    GPU,
    LOSS_INPUTS,
    Budget,
    check_loss,
    in_float64,
    loss_yardstick,
    make,
    mapped,
    results,
    skip_unless_available,
    with_gradients,
)
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_cpu import PEAK, needs_native
from test_edges import build, loss_of, normal, run
from test_loss import HALF
from test_reference import SMALL, naive_loss, reduced
from torch import Tensor

import courier_fast as cf
from courier_fast.kernels.cpu import candidate
from courier_fast.loss import operators, reference
from courier_fast.loss.options import CHOICES
from courier_fast.loss.problem import Needs, Problem
from courier_fast.testing.interpreter import truncated_tf32

IMPLS = ("cpu", "triton")
CANDIDATE: dict[str, Any] = {"attention": "candidate"}
COSINE: dict[str, Any] = {"cosine": True, "attention_scale": 5.0}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "cosine": COSINE,
    "page": {"negatives": "page"},
    "other-pages": {"negatives": "other_pages"},
    "ids": {"ids": True},
    "ids-page": {"ids": True, "negatives": "page"},
    "ids-other-pages-cosine": {"ids": True, "negatives": "other_pages"} | COSINE,
    "log-q": {"log_q": True},
    "weights": {"weights": True},
    "weights-sum": {"weights": True, "reduction": "sum"},
    "none-weights": {"reduction": "none", "weights": True},
    "heads": {"num_heads": 4},
    "heads-cosine": {"num_heads": 3} | COSINE,
    "heads-long-histories": {"num_heads": 2, "longest_history": 40, "pages": 4},
    "many-clicks": {"clicked": 1.0, "longest_pv": 40, "pages": 3},
    "projected": {"projected": True},
    "projected-cosine": {"projected": True} | COSINE,
    "projected-heads": {"projected": True, "num_heads": 2},
    "padding": {"mask": True},
    "padding-ids-cosine": {"mask": True, "ids": True} | COSINE,
    "items": {"table": True},
    "items-cosine": {"table": True} | COSINE,
    "items-page": {"table": True, "negatives": "page"},
    "items-other-pages": {"table": True, "negatives": "other_pages"},
    "items-ids": {"table": True, "ids": True},
    "items-log-q": {"table": True, "log_q": True},
    "items-padding-weights": {"table": True, "mask": True, "weights": True},
    "items-projected": {"table": True, "projected": True},
    "items-none": {"table": True, "reduction": "none"},
    "tensor-tau": {"tensor_tau": True},
    "tensor-tau-log-q": {"tensor_tau": True, "log_q": True},
    "tau-0.005": {"tau": 0.005},
    "tau-0.02-items": {"tau": 0.02, "table": True},
    "tau-2": {"tau": 2.0},
    "all-clicked": {"clicked": 1.0},
    "items-all-clicked": {"clicked": 1.0, "table": True},
    # By cosines: what Triton has in bins, and what it leaves out of them.
    "cosine-log-q-other-pages": {"log_q": True, "negatives": "other_pages"} | COSINE,
    "cosine-tensor-tau": {"tensor_tau": True} | COSINE,
    "cosine-weights": {"weights": True, "reduction": "sum"} | COSINE,
    "cosine-clicks-all-over": {"clicked": 0.8, "longest_pv": 8} | COSINE,
    "cosine-items-all-clicked": {"clicked": 1.0, "table": True} | COSINE,
    "cosine-long-histories": {"longest_history": 90, "pages": 5} | COSINE,
    "cosine-several-tiles": {"pages": 40} | COSINE,
    "cosine-sharp": {"cosine": True, "attention_scale": 20.0},
    "cosine-sharper": {"cosine": True, "attention_scale": 100.0},
    "cosine-tau-0.01": {"tau": 0.01} | COSINE,
    "log-q-other-pages": {"log_q": True, "negatives": "other_pages"},
    "clicks-all-over": {"clicked": 0.8, "longest_pv": 8},
    "cosine-dim-100": {"dim": 100, "pages": 6} | COSINE,
    "sharp": {"attention_scale": 3.0},
    "long-histories": {"longest_history": 80, "pages": 5},
    "several-tiles": {"pages": 40},
    "one-page": {"pages": 1, "longest_pv": 12, "longest_history": 12},
    "dim-1": {"dim": 1},
    "dim-17": {"dim": 17},
    "dim-100": {"dim": 100, "pages": 6},
    "dim-256": {"dim": 256, "pages": 6},
    "dim-300": {"dim": 300, "pages": 6},
}
LOOPED = [name for name, case in CASES.items() if not {"dim", "pages"} & set(case)]


def problem(seed: int = 0, **case: Any) -> Any:
    return make(seed, **(CANDIDATE | case))


def loss_results(impl: str, p: Any) -> dict[str, Tensor]:
    skip_unless_available(impl, p)
    return results(lambda q: operators.loss(q, impl, False)[0], p, LOSS_INPUTS)


# ---- the definition ------------------------------------------------------------------------------


@pytest.mark.parametrize("case", LOOPED)
def test_loss_is_the_definition(case: str) -> None:
    options = SMALL | CASES[case] | ({"num_heads": 3} if CASES[case].get("num_heads") else {})
    p = in_float64(problem(2, **options), LOSS_INPUTS)
    found, expected = reference.reconstruction_loss(p), naive_loss(p)
    assert expected
    items = torch.zeros(p.num_pv, dtype=torch.float64)
    for i, x in expected.items():
        items[i] = x
    torch.testing.assert_close(found.item_loss, items)
    total = reduced(expected, p.weights, p.reduction)
    loss = found.loss.detach()
    torch.testing.assert_close(loss, items if p.reduction == "none" else loss.new_tensor(total))


@pytest.mark.parametrize(
    "options",
    [
        {},
        COSINE | {"log_q": True},
        {"projected": True, "num_heads": 2},
        {"table": True, "tensor_tau": True},
    ],
    ids=str,
)
def test_derivatives(options: dict[str, Any]) -> None:
    small = {"pages": 3, "longest_pv": 3, "longest_history": 3, "dim": 4}
    p = in_float64(problem(1, **(small | options)), LOSS_INPUTS)
    names = [n for n in LOSS_INPUTS if getattr(p, n) is not None]
    names = [n for n in names if n != "history" or p.key is None]

    def loss(*tensors: Tensor) -> Tensor:
        inputs = dict(zip(names, tensors, strict=True))
        return reference.reconstruction_loss(replace(p, **inputs)).loss

    assert torch.autograd.gradcheck(loss, tuple(getattr(p, n) for n in names))


# ---- implementations -----------------------------------------------------------------------------


def check(impl: str, case: str, **more: Any) -> None:
    """Fewer pages for Triton's interpreter, which takes seconds for what a GPU does in
    microseconds."""
    small = {"pages": 5} if impl == "triton" and not GPU else {}
    sizes = {"pages": 14} if impl == "triton" and "several-tiles" in case else {}
    check_loss(impl, **CANDIDATE, **(small | more | CASES[case] | sizes))


@pytest.mark.long(
    "kernels case by case",
    short=(
        "plain",
        "cosine",
        "ids-other-pages-cosine",
        "projected-heads",
        "items-padding-weights",
        "tensor-tau-log-q",
        "cosine-clicks-all-over",
    ),
)
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", CASES)
def test_float32(impl: str, case: str) -> None:
    check(impl, case)


HALF_CASES = (
    "plain",
    "cosine",
    "items",
    "padding",
    "none-weights",
    "tensor-tau",
    "tau-0.02-items",
    "projected-cosine",
    "heads",
    "dim-300",
    "several-tiles",
    "cosine-items-all-clicked",
    "cosine-long-histories",
    "cosine-sharp",
)


@pytest.mark.long("kernels case by case", short=("plain", "cosine", "items"))
@pytest.mark.parametrize(("impl", "dtype"), [(i, t) for i in IMPLS for t in HALF[i]], ids=str)
@pytest.mark.parametrize("case", HALF_CASES)
def test_half(impl: str, dtype: torch.dtype, case: str) -> None:
    """float16 has too little range for weights and gradients: their products run in tf32."""
    with truncated_tf32() if impl == "triton" and not GPU else nullcontext():
        check(impl, case, dtype=dtype, **({"pages": 14} if impl == "cpu" else {"pages": 7}))


def binned_pages(
    pages: list[tuple[int, int]], clicks: list[int], **options: Any
) -> tuple[Problem, Any]:
    """Of pages with so many rows and history rows and as many clicks, from their first row on."""
    clicked = [int(k < n) for (rows, _), n in zip(pages, clicks, strict=True) for k in range(rows)]
    rows, past = (sum(x) for x in zip(*pages, strict=True))
    p = build("triton", normal(rows, 8), normal(past, 8), pages, clicked, attention="candidate")
    p = replace(p, cosine=True, attention_scale=5.0, **options)
    skip_unless_available("triton", p)
    from courier_fast.kernels.triton import loss as triton_loss
    from courier_fast.kernels.triton.candidate import state

    if GPU and p.pv.dtype != torch.bfloat16:
        p = mapped(p, lambda _, x: x.bfloat16() if x.is_floating_point() else x)
    saved = triton_loss.loss_forward(p, Needs(pv=True, history=True), False)[-1]
    return p, state.CandidateState.restored(state.candidate_shape(p), saved)


def test_which_pages_are_binned() -> None:
    """Those of at most 64 history rows, with an entry for each four anchors: side by side with
    others that need as many units of 4."""
    pages = [(2, 1), (5, 64), (4, 5), (3, 0), (1, 65), (1, 33), (2, 4), (9, 2), (3, 9)]
    p, found = binned_pages(pages, [2, 4, 4, 3, 1, 1, 2, 5, 0])
    bins = found.bins
    assert bins is not None
    # Of one unit: pages 0, 6 and 7, which has two entries; of two: page 2; of sixteen: 1 and 5.
    # Page 4 is too long.
    assert bins.page_place.tolist() == [0, 32, 16, -1, -1, 48, 1, 2, -1]
    assert bins.page_entries.tolist() == [1, 1, 1, 0, 0, 1, 1, 2, 0]
    assert bins.bin_count.tolist() == [4, 1]
    assert listed(found) == [[], [4], [0, 1, 2, 4, 5, 6, 7]]

    page = torch.full((64,), -1)
    page[:4], page[16:18] = torch.tensor([0, 6, 7, 7]), 2
    page[32:48], page[48:] = 1, 5
    assert bins.unit_page[:64].tolist() == page.tolist()
    assert bins.unit_entry[:4].tolist() == [0, 1, 2, 3]
    assert bins.unit_entry[16:18].tolist() == [16, 16]
    row = bins.slot_row.view(-1, 64)
    start = p.history_offsets.tolist()
    assert row[0, :6].tolist() == [start[0], -1, -1, -1, start[6], start[6] + 1]
    assert row[0, 8:16].tolist() == 2 * [start[7], start[7] + 1, -1, -1]
    assert row[2].tolist() == list(range(start[1], start[2]))


def test_with_ids_each_anchor_has_an_entry() -> None:
    pages = [(2, 1), (3, 6), (3, 70), (4, 64)]
    ids = torch.tensor([5, 7, 5, 9, 9, 1, 2, 3, 4, 5, 6, 7])
    _, found = binned_pages(pages, [2, 3, 1, 1], item_ids=ids)
    bins = found.bins
    assert bins is not None
    assert bins.page_place.tolist() == [0, 16, -1, 32]
    assert bins.page_entries.tolist() == [2, 3, 0, 1]
    assert bins.unit_page[:48].tolist() == 2 * [0] + 14 * [-1] + 6 * [1] + 10 * [-1] + 16 * [3]
    assert bins.unit_entry[16:22].tolist() == [16, 16, 18, 18, 20, 20]
    assert bins.unit_id is not None
    assert bins.unit_id[:2].tolist() == [5, 7]
    assert bins.unit_id[16:22].tolist() == [5, 5, 9, 9, 9, 9]
    assert bins.bin_count.tolist() == [3, 1]


@pytest.mark.parametrize(("clicks", "several"), [(20, True), (21, False)])
def test_pages_of_several_entries_without_room(clicks: int, several: bool) -> None:
    """Six bins, of which each entry here takes one: all of a page's entries have room, or none."""
    pages = [(1, 64), (24, 40)]
    _, found = binned_pages(pages, [1, clicks])
    bins = found.bins
    assert bins is not None
    assert (bins.page_place[1] >= 0) == several
    assert bins.bin_count.tolist() == ([6, 0] if several else [1, 1])
    assert listed(found) == [[], [] if several else [1], [0, 1]]


def listed(found: Any) -> list[list[int]]:
    """Small pages, large ones, and all that have an anchor."""
    return [x[:n].tolist() for x, n in zip(found.page_list, found.page_count, strict=True)]


def test_which_pages_are_small() -> None:
    """Those of at most 16 anchors and as many history rows as there are lanes for a head, where
    none is in a bin."""
    pages = [(2, 1), (17, 3), (16, 32), (3, 0), (1, 33), (2, 16), (2, 17)]
    rows, past = (sum(x) for x in zip(*pages, strict=True))
    clicked = [1] * rows
    clicked[-1] = 0
    p = build("triton", normal(rows, 24), normal(past, 24), pages, clicked, attention="candidate")
    skip_unless_available("triton", p)
    from courier_fast.kernels.triton import loss as triton_loss
    from courier_fast.kernels.triton.candidate import state

    p = replace(p, key=p.history.clone())  # no products of E and C alone: no bins
    for heads, small in ((1, [0, 2, 5, 6]), (2, [0, 5]), (8, [])):
        q = replace(p, num_heads=heads)
        saved = triton_loss.loss_forward(q, Needs(pv=True, history=True), False)[-1]
        found = state.CandidateState.restored(state.candidate_shape(q), saved)
        large = [b for b in (0, 1, 2, 4, 5, 6) if b not in small]
        assert listed(found) == [small, large, [0, 1, 2, 4, 5, 6]]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("options", [{}, COSINE | {"table": True}], ids=str)
def test_two_runs_give_the_same_bits(impl: str, options: dict[str, Any]) -> None:
    p = problem(3, impl=impl, pages=8, **options)
    first, again = (loss_results(impl, p) for _ in range(2))
    for name, x in first.items():
        assert torch.equal(x, again[name]), name


@pytest.mark.parametrize("impl", IMPLS)
def test_merged_columns_equal_expanded_rows(impl: str) -> None:
    p = problem(5, impl=impl, table=True, pages=8, **COSINE)
    assert p.pv_index is not None and p.history_index is not None
    rows = {"pv": p.pv[p.pv_index], "history": p.pv[p.history_index]}
    rows = {k: x.detach().requires_grad_() for k, x in rows.items()}
    expanded = replace(p, pv_index=None, history_index=None, item_ids=p.pv_index, **rows)
    merged, apart = loss_results(impl, p), loss_results(impl, expanded)
    table = torch.zeros_like(p.pv).index_add_(0, p.pv_index, apart["pv"])
    table.index_add_(0, p.history_index, apart["history"])
    torch.testing.assert_close(merged["output"], apart["output"])
    torch.testing.assert_close(merged["pv"], table)


# ---- what it is the same as ----------------------------------------------------------------------


def ragged(seed: int = 0, dim: int = 24) -> dict[str, Tensor]:
    """Arguments of the public loss: three pages, the last one without a history."""
    g = torch.Generator().manual_seed(seed)
    return {
        "pv": torch.randn(9, dim, generator=g),
        "history": torch.randn(7, dim, generator=g),
        "clicked": torch.tensor([1, 0, 0, 1, 1, 0, 0, 1, 0]).bool(),
        "pv_offsets": torch.tensor([0, 3, 6, 9]),
        "history_offsets": torch.tensor([0, 5, 7, 7]),
    }


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
@pytest.mark.parametrize("attention", [{}, {"attention_temperature": 0.3}], ids=str)
def test_on_the_own_page_it_is_the_listwise_softmax(impl: str, attention: dict[str, Any]) -> None:
    """With negatives of the own page R_bj = R_j: a softmax over cos(R_j, E_j) of the page's
    items."""
    a = ragged()
    loss = cf.reconstruction_loss(
        **a, attention="candidate", negatives="page", reduction="none", impl=impl, **attention
    )
    r = cf.reconstruct(
        a["pv"],
        a["history"],
        pv_offsets=a["pv_offsets"],
        history_offsets=a["history_offsets"],
        impl="reference",
        **attention,
    )
    s = torch.cosine_similarity(r, a["pv"], dim=1) / 0.1
    for i in a["clicked"][:6].nonzero().flatten().tolist():
        page = slice(0, 3) if i < 3 else slice(3, 6)
        assert float(loss[i]) == pytest.approx(float(s[page].logsumexp(0) - s[i]), rel=1e-4)
    assert not loss[6:].any()


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
@pytest.mark.parametrize("negatives", CHOICES["negatives"])
def test_without_a_query_it_is_the_mean_and_so_is_the_anchors(impl: str, negatives: str) -> None:
    a = ragged()
    options = {"negatives": negatives, "reduction": "none", "impl": impl}
    none = cf.reconstruction_loss(**a, attention="candidate", attention_scale=0.0, **options)
    mean = cf.reconstruction_loss(**a, attention="mean", **options)
    anchor = cf.reconstruction_loss(**a, attention="anchor", attention_scale=0.0, **options)
    assert none.any()
    torch.testing.assert_close(none, mean)
    torch.testing.assert_close(anchor, mean)


@pytest.mark.parametrize("attention", ["candidate", "anchor"])
def test_attention_by_cosines_is_that_of_unit_projections(attention: str) -> None:
    a = ragged()
    unit = {
        k: torch.nn.functional.normalize(a[v], dim=1)
        for k, v in (("query", "pv"), ("key", "history"))
    }
    by_scale = cf.reconstruction_loss(**a, **unit, attention=attention, attention_scale=4.0)
    assert float(cf.reconstruction_loss(**a, attention=attention, attention_temperature=0.25)) == (
        pytest.approx(float(by_scale), rel=1e-5)
    )


@pytest.mark.parametrize("kind", ["padded", "table"])
def test_cosines_in_other_layouts(kind: str) -> None:
    """Padding may hold anything here, too, with each attention."""
    a = ragged()
    pv, past = a["pv"].reshape(3, 3, -1), torch.full((3, 5, 24), torch.nan)
    past[0], past[1, :2] = a["history"][:5], a["history"][5:]
    mask = ~past.isnan().any(2)
    for attention in ("candidate", "anchor"):
        options = {"attention": attention, "attention_temperature": 0.4}
        expected = float(cf.reconstruction_loss(**a, **options))
        if kind == "padded":
            leaf = past.clone().requires_grad_()
            found = cf.reconstruction_loss(
                pv, leaf, a["clicked"].view(3, 3), history_mask=mask, **options
            )
            found.backward()
            assert leaf.grad is not None and not leaf.grad[~mask].any()
        else:
            table = torch.cat([a["pv"], a["history"]])
            inputs = a | {"pv": torch.arange(9), "history": torch.arange(9, 16)}
            found = cf.reconstruction_loss(**inputs, embeddings=table, **options)
        assert float(found.detach()) == pytest.approx(expected, rel=1e-4)


# ---- edges ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_no_anchor_gives_zero_attached_to_every_input(impl: str) -> None:
    for pages, clicked in (([(3, 2), (2, 0)], [0, 0, 0, 1, 1]), ([], []), ([(3, 0)], [1, 0, 0])):
        rows, past = (sum(x) for x in zip(*pages, strict=True)) if pages else (0, 0)
        p = build(
            impl,
            normal(rows, 8),
            normal(past, 8),
            pages,
            clicked,
            attention="candidate",
            temperature=torch.tensor(0.1),
        )
        loss = loss_of(impl, p)
        assert not loss.any() and loss.requires_grad
        for grad in torch.autograd.grad(loss, [p.pv, p.history, p.temperature]):
            assert not grad.any()  # NaN would count


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_a_history_of_one_item_is_that_item(impl: str) -> None:
    a = ragged()
    a |= {"history": a["history"][:2], "history_offsets": torch.tensor([0, 1, 2, 2])}
    found = cf.reconstruction_loss(**a, attention="candidate", impl=impl)
    mean = cf.reconstruction_loss(**a, attention="mean", impl="reference")
    assert float(found) == pytest.approx(float(mean), rel=1e-5)


@pytest.mark.long("kernels case by case", short=("cpu",))
@pytest.mark.parametrize(("impl", "length"), [("cpu", 10_000), ("triton", 700)])
def test_a_long_history(impl: str, length: int) -> None:
    pages = [(3, length), (2, 3)]
    p = build(
        impl,
        normal(5, 16),
        normal(length + 3, 16, seed=1),
        pages,
        [1, 0, 0, 0, 1],
        attention="candidate",
    )
    found, expected = run(impl, p), run("reference", p)
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("impl", IMPLS)
def test_one_candidate_only_gives_zero(impl: str) -> None:
    p = build(impl, normal(1, 16), normal(2, 16, seed=1), [(1, 2)], [1], attention="candidate")
    found = run(impl, p)
    rounding = torch.finfo(torch.float32).eps / p.tau
    assert abs(float(found["output"])) <= rounding
    assert found["pv"].abs().max() <= rounding / p.tau


@pytest.mark.parametrize("impl", IMPLS)
def test_zero_vectors(impl: str) -> None:
    pv, history = normal(5, 16), normal(4, 16, seed=1)
    pv[1], history[2:] = 0, 0  # every reconstruction of page 1 is zero
    p = build(
        impl, pv, history, [(3, 2), (2, 2)], [1, 1, 0, 1, 0], attention="candidate", cosine=True
    )
    found, expected = run(impl, p), run("reference", p)
    assert not found["pv"][1].any()
    for name, x in found.items():
        torch.testing.assert_close(x, expected[name])


@pytest.mark.parametrize("filler", [torch.nan, torch.inf])
@pytest.mark.parametrize("impl", IMPLS)
def test_padding_has_no_influence(impl: str, filler: float) -> None:
    p = problem(3, mask=True, impl=impl, pages=6, dim=16)
    assert p.pv_mask is not None and p.history_mask is not None
    dead = {"pv": ~p.pv_mask, "history": ~p.history_mask}
    for mask in dead.values():
        mask[-1] = True  # past the last offset

    def filled(value: float) -> dict[str, Tensor]:
        def change(name: str, x: Tensor) -> Tensor:
            return x.detach().masked_fill(dead[name][:, None], value) if name in dead else x

        return run(impl, with_gradients(mapped(p, change), LOSS_INPUTS))

    found, clean = filled(filler), filled(0.0)
    for name, x in found.items():
        assert torch.equal(x, clean[name]), name
        assert x.isfinite().all()


@pytest.mark.parametrize("name", ["pv", "history"])
@pytest.mark.parametrize("impl", IMPLS)
def test_non_finite_live_rows_reach_the_loss(impl: str, name: str) -> None:
    tensors = {"pv": normal(5, 16), "history": normal(4, 16, seed=1)}
    tensors[name][0, 3] = torch.nan
    p = build(
        impl,
        tensors["pv"],
        tensors["history"],
        [(3, 2), (2, 2)],
        [1, 0, 0, 1, 0],
        reduction="none",
        attention="candidate",
    )
    expected = reference.reconstruction_loss(p).loss
    assert expected.isnan().any()
    assert loss_of(impl, p).isnan().tolist() == expected.isnan().tolist()


@pytest.mark.long("memory")
@needs_native
def test_memory_on_the_cpu_does_not_grow_with_candidates_times_history() -> None:
    """6,000 candidates by 6,000 history rows are 144 MB in float32; their products are held a chunk
    at a time."""
    code = PEAK.format(tests=str(Path(__file__).parent), dtype="float32", clicked=1.0, ids=False)
    code = code.replace("pages=3000", "pages=1200, attention='candidate'")
    run = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert int(done.stdout) <= candidate.CHUNK_BYTES + (40 << 20)


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (
            {"attention": "both"},
            ValueError,
            "attention: expected one of 'candidate', 'anchor', 'mean', got 'both'",
        ),
        (
            {"attention_temperature": 0.0},
            ValueError,
            "attention_temperature: expected a value above 0, got 0.0",
        ),
        (
            {"attention_temperature": -1.0},
            ValueError,
            "attention_temperature: expected a value above 0",
        ),
        (
            {"attention_temperature": float("nan")},
            ValueError,
            "attention_temperature: expected a finite value",
        ),
        ({"attention_temperature": "1"}, TypeError, "attention_temperature: expected a float"),
        (
            {"attention_temperature": 1.0, "attention_scale": 1.0},
            ValueError,
            "expected at most one of the two, "
            "got attention_scale 1.0 and attention_temperature 1.0",
        ),
        (
            {"attention": "mean", "attention_scale": 1.0},
            ValueError,
            "expected none with attention 'mean'",
        ),
        (
            {"direction": "identify"},
            ValueError,
            'direction: expected "reconstruct" with attention "candidate", got \'identify\'',
        ),
        ({"direction": "both"}, ValueError, "direction: expected"),
        (
            {"value": torch.zeros(7, 12)},
            ValueError,
            r"value: expected shape \[7, 24\], got \[7, 12\]",
        ),
    ],
    ids=str,
)
def test_bad_input(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cf.reconstruction_loss(**ragged(), **({"attention": "candidate"} | options))


def test_xformers_says_why_not() -> None:
    p = problem(0)
    assert any("candidate" in reason for reason in operators.unavailable_reasons("xformers", p))


# ---- why -----------------------------------------------------------------------------------------


def held_out_loss(attention: str) -> float:
    """Of an embedding without any taste in it, on batches without any taste: chance is log of the
    candidates."""
    losses = []
    for seed in range(20):
        g = torch.Generator().manual_seed(seed)
        pv, history = torch.randn(16, 5, 32, generator=g), torch.randn(16, 10, 32, generator=g)
        clicked = torch.zeros(16, 5, dtype=torch.bool)
        clicked[:, 0] = True
        losses.append(
            float(
                cf.reconstruction_loss(
                    pv, history, clicked, attention=attention, attention_scale=1.0, temperature=0.5
                )
            )
        )
    return sum(losses) / len(losses)


def test_the_anchors_attention_sees_the_answer() -> None:
    """Random embeddings and random clicks: nothing is to be known. Attention with the anchor's
    query is far better than chance all the same, as it has seen the item it is to find; attention
    for each candidate is not better."""
    chance = math.log(80)
    assert held_out_loss("anchor") < chance - 0.5
    assert held_out_loss("candidate") > chance - 0.01


# ---- torch's machinery ---------------------------------------------------------------------------


def test_compiles_without_graph_breaks() -> None:
    skip_unless_available("cpu", problem(0))
    a = ragged()

    def loss(pv: Tensor, history: Tensor) -> Tensor:
        return cf.reconstruction_loss(
            **(a | {"pv": pv, "history": history}), attention="candidate", impl="cpu"
        )

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a["pv"], a["history"]), loss(a["pv"], a["history"]))


@pytest.mark.long("kernels case by case", short=("triton",))
@pytest.mark.parametrize(("impl", "examples"), [("cpu", 30), ("triton", 6)])
def test_ragged_batches(impl: str, examples: int) -> None:
    skip_unless_available(impl, problem(0, impl=impl))
    pages = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 6)), max_size=5)

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(
        pages=pages,
        dim=st.integers(1, 40),
        negatives=st.sampled_from(CHOICES["negatives"]),
        tau=st.sampled_from([0.01, 0.1, 1.0]),
        cosine=st.booleans(),
        ids=st.booleans(),
        seed=st.integers(0, 2**16),
    )
    def check(pages: list[tuple[int, int]], dim: int, seed: int, ids: bool, **options: Any) -> None:
        budget = Budget(torch.float32)
        rows, past = (sum(p[i] for p in pages) for i in (0, 1))
        for draw in range(3):
            g = torch.Generator().manual_seed(seed + draw)
            clicked = (torch.rand(rows, generator=g) < 0.5).int().tolist()
            p = build(
                impl,
                torch.randn(rows, dim, generator=g),
                torch.randn(past, dim, generator=g),
                pages,
                clicked,
                item_ids=torch.randint(0, 6, (rows,), generator=g) if ids else None,
                attention="candidate",
                **options,
            )
            found = loss_results(impl, p)
            assert all(x.isfinite().all() for x in found.values())
            budget.add(loss_yardstick(p, draw), found)
        budget.check()

    check()
