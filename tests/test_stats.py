"""The statistics against brute force over the similarity matrix."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from factories import Budget, in_float64, make, skip_unless_available, yardstick_of

import courier_fast as cf
from courier_fast.loss import operators, reference

IMPLS = ("cpu", "triton")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ids": True},
        {"table": True},
        {"log_q": True},
        {"direction": "both"},
        {"direction": "identify", "mask": True},
        {"negatives": "page"},
        {"dim": 300},
        {"attention": "candidate"},
        {"attention": "candidate", "ids": True, "log_q": True, "cosine": True},
        {"attention": "candidate", "table": True},
        {"attention": "candidate", "negatives": "page"},
    ],
    ids=str,
)
@pytest.mark.parametrize("impl", IMPLS)
def test_per_row_statistics(impl: str, options: dict[str, Any]) -> None:
    budget = Budget(torch.float32)
    for seed in (6, 7, 8):
        p = make(seed, impl=impl, pages=14, **options)
        skip_unless_available(impl, p)
        with torch.no_grad():
            _, item, lse, positive, rank, is_anchor, skipped = operators.loss(p, impl, True)
        expected = reference.reconstruction_loss(in_float64(p, ()))
        assert torch.equal(is_anchor, expected.is_anchor)
        assert int(is_anchor.sum()) > 3
        assert torch.equal(rank, expected.rank)
        assert int(skipped) == int(expected.num_skipped)
        budget.add(
            yardstick_of(lambda q: per_row(reference.reconstruction_loss(q)), p, (), seed),
            {"item_loss": item, "log_sum_exp": lse, "positive_similarity": positive},
        )
    budget.check()


def per_row(out: reference.LossOutput) -> dict[str, torch.Tensor]:
    return {
        name: getattr(out, name) for name in ("item_loss", "log_sum_exp", "positive_similarity")
    }


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_rank_up_to_ties(impl: str) -> None:
    """Pages with one history item: in "identify" all candidates of a page tie; those of other pages
    do not."""
    p = make(2, impl="cpu" if impl == "reference" else impl, pages=20, longest_history=1)
    p = replace(p, direction="identify")
    skip_unless_available(impl, p)
    if impl == "reference":
        rank = reference.reconstruction_loss(p).rank
    else:
        rank = operators.loss(p, impl, True)[4]
    page = reference.page_of_rows(p.pv_offsets, None, p.num_pv)
    e = torch.nn.functional.normalize(p.pv.detach().double())
    has_history = p.history_offsets.diff() > 0
    assert p.history is not None
    c = torch.nn.functional.normalize(p.history.detach().double())
    start = p.history_offsets[:-1]
    seen = 0
    for i in rank.nonzero().squeeze(1).tolist():
        scores = {
            b: float(e[i] @ c[start[b]]) for b in range(len(has_history)) if bool(has_history[b])
        }
        mine = int(page[i])
        above = sum(int((page == b).sum()) for b, s in scores.items() if s > scores[mine])
        ties = int((page == mine).sum()) - 1
        assert 1 + above <= int(rank[i]) <= 1 + above + ties
        seen += ties > 0
    assert seen > 3


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_equal_scores_are_not_above_the_positive(impl: str) -> None:
    """The same embedding three times without ids: each is a candidate, none ranks above the
    others."""
    row = torch.randn(8, generator=torch.Generator().manual_seed(0))
    pv = torch.stack([row, row, row, -row])[None]
    clicked = torch.tensor([[True, True, False, False]])
    if impl == "triton":
        pytest.importorskip("triton")
    device = "cuda" if impl == "triton" and torch.cuda.is_available() else "cpu"
    history = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1))
    _, stats = cf.reconstruction_loss(
        pv.to(device), history.to(device), clicked.to(device), return_stats=True, impl=impl
    )
    ranks = stats.rank[0, :2].tolist()
    assert ranks[0] == ranks[1]
    assert ranks[0] in (1, 2)


def test_recall_and_mrr() -> None:
    p = make(6, pages=14)
    args = {"pv_offsets": p.pv_offsets, "history_offsets": p.history_offsets}
    _, stats = cf.reconstruction_loss(
        p.pv, p.history, p.clicked, return_stats=True, impl="reference", **args
    )
    ranks = stats.rank[stats.is_anchor].tolist()
    assert len(ranks) == int(stats.num_anchors) > 3
    for k in (1, 5, 20):
        assert float(stats.recall_at(k)) == pytest.approx(sum(r <= k for r in ranks) / len(ranks))
    assert float(stats.mrr()) == pytest.approx(sum(1 / r for r in ranks) / len(ranks))


def test_stats_keep_the_layout_of_clicked() -> None:
    pv, history, clicked = (
        torch.randn(3, 4, 8),
        torch.randn(3, 5, 8),
        torch.ones(3, 4, dtype=torch.bool),
    )
    _, stats = cf.reconstruction_loss(pv, history, clicked, return_stats=True)
    for x in (
        stats.item_loss,
        stats.log_sum_exp,
        stats.positive_similarity,
        stats.rank,
        stats.is_anchor,
    ):
        assert x.shape == (3, 4)
        assert not x.requires_grad


@pytest.mark.parametrize("impl", ("reference", *IMPLS))
def test_statistics_say_which_direction_they_are_of(impl: str) -> None:
    """Of a loss in both directions, rank and log-sum-exp are those of one."""
    p = make(6, impl="cpu" if impl == "reference" else impl, pages=14)
    if impl != "reference":
        skip_unless_available(impl, p)
    args = {"pv_offsets": p.pv_offsets, "history_offsets": p.history_offsets}

    def stats(direction: str) -> cf.ReconstructionStats:
        return cf.reconstruction_loss(
            p.pv,
            p.history,
            p.clicked,
            direction=direction,
            attention="anchor",
            return_stats=True,
            impl=impl,
            **args,
        )[1]

    found = {d: stats(d) for d in ("reconstruct", "identify", "both")}
    assert {d: s.direction for d, s in found.items()} == {
        "reconstruct": "reconstruct",
        "identify": "identify",
        "both": "reconstruct",
    }
    both, same, other = found["both"], found[found["both"].direction], found["identify"]
    for name in ("rank", "log_sum_exp", "positive_similarity"):
        torch.testing.assert_close(getattr(both, name), getattr(same, name))
    assert not torch.equal(both.rank, other.rank)
    assert not torch.allclose(both.log_sum_exp, other.log_sum_exp)
    torch.testing.assert_close(both.item_loss, (same.item_loss + other.item_loss) / 2)
    assert both.mrr() == same.mrr() != other.mrr()
