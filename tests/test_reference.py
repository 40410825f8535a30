"""The reference against a loop written from the equations, its derivatives, and the closed form of
the gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from factories import LOSS_INPUTS, SEQUENCE_INPUTS, in_float64, make, make_sequence
from test_loss import CASES
from torch import Tensor

from courier_fast.loss import reference
from courier_fast.loss.problem import Problem, SequenceProblem

Vector = list[float]


def dot(a: Vector, b: Vector) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def cosine(a: Vector, b: Vector) -> float:
    na, nb = math.sqrt(dot(a, a)), math.sqrt(dot(b, b))
    return 0.0 if na == 0 or nb == 0 else dot(a, b) / (na * nb)


def log_sum_exp(values: list[float]) -> float:
    top = max(values)
    return top + math.log(sum(math.exp(v - top) for v in values))


def rows_of(values: Tensor, index: Tensor | None) -> list[Vector]:
    return (values if index is None else values[index]).tolist()


def pages_of(offsets: Tensor, mask: Tensor | None, rows: int) -> list[int | None]:
    """Page of each row, None for padding."""
    pages: list[int | None] = [None] * rows
    for b in range(len(offsets) - 1):
        for i in range(int(offsets[b]), int(offsets[b + 1])):
            if mask is None or bool(mask[i]):
                pages[i] = b
    return pages


def naive_loss(p: Problem) -> dict[int, float]:
    """The loss of each anchor, by the definition."""
    e = rows_of(p.pv, p.pv_index)
    source = p.pv if p.history is None else p.history
    c = rows_of(source, p.history_index)
    q = e if p.query is None else p.query.tolist()
    k = c if p.key is None else p.key.tolist()
    v = c if p.value is None else p.value.tolist()
    page = pages_of(p.pv_offsets, p.pv_mask, p.num_pv)
    history_page = pages_of(p.history_offsets, p.history_mask, p.num_history)
    head_dim = len(e[0]) // p.num_heads if e else 0

    def reconstruct(j: int, of: int | None) -> Vector | None:
        """Item j asks the history of a page."""
        mine = [i for i, b in enumerate(history_page) if b is not None and b == of]
        if page[j] is None or not mine:
            return None
        r: Vector = []
        for h in range(p.num_heads):
            part = slice(h * head_dim, (h + 1) * head_dim)
            like = cosine if p.cosine else dot
            scores = [p.attention_scale * like(q[j][part], k[i][part]) for i in mine]
            norm = log_sum_exp(scores)
            a = [math.exp(s - norm) for s in scores]
            r += [
                sum(w * v[i][part][d] for w, i in zip(a, mine, strict=True))
                for d in range(head_dim)
            ]
        return r

    r = [reconstruct(j, page[j]) for j in range(len(e))]
    if p.reconstructed is not None:
        given, mask = p.reconstructed.tolist(), p.reconstructed_mask
        r = [
            None if page[j] is None or (mask is not None and not mask[j]) else row
            for j, row in enumerate(given)
        ]
    ids = list(range(len(e))) if p.ids is None else p.ids.tolist()
    tau = p.tau if p.temperature is None else float(p.temperature.detach())
    log_q = [0.0] * len(e) if p.log_q is None else p.log_q.tolist()
    assert p.clicked is not None

    def allowed(i: int, j: int) -> bool:
        if i == j:
            return True
        if page[j] is None or ids[i] == ids[j]:
            return False
        return {"batch": True, "page": page[i] == page[j], "other_pages": page[i] != page[j]}[
            p.negatives
        ]

    losses = {}
    for i in range(len(e)):
        r_i = r[i]
        if page[i] is None or not bool(p.clicked[i]) or r_i is None:
            continue
        if p.weights is not None and float(p.weights[i]) == 0:
            continue
        positive = cosine(r_i, e[i]) / tau - log_q[i]
        parts = []
        if p.direction in ("reconstruct", "both"):
            others = [j for j in range(len(e)) if allowed(i, j)]
            made = dict.fromkeys(others, r_i)
            if p.attention == "candidate":
                made = {j: reconstruct(j, page[i]) for j in others}
            scores = [cosine(made[j], e[j]) / tau - log_q[j] for j in others]
            parts.append(log_sum_exp(scores) - positive)
        if p.direction in ("identify", "both"):
            scores = [
                cosine(r_j, e[i]) / tau - log_q[j]
                for j, r_j in enumerate(r)
                if r_j is not None and allowed(i, j)
            ]
            parts.append(log_sum_exp(scores) - positive)
        losses[i] = sum(parts) / len(parts)
    return losses


def naive_sequence(p: SequenceProblem) -> dict[int, float]:
    c = rows_of(p.history, p.history_index)
    page = pages_of(p.history_offsets, p.history_mask, p.num_history)
    ids = list(range(len(c))) if p.ids is None else p.ids.tolist()
    tau = p.tau if p.temperature is None else float(p.temperature.detach())
    losses = {}
    for k in range(len(c)):
        if page[k] is None:
            continue
        others = [x for x in range(len(c)) if x != k and page[x] is not None]
        positives = [x for x in others if page[x] == page[k] and ids[x] != ids[k]]
        candidates = [x for x in others if not (ids[x] == ids[k] and page[x] != page[k])]
        if not positives:
            continue
        lse = log_sum_exp([cosine(c[k], c[x]) / tau for x in candidates])
        losses[k] = sum(lse - cosine(c[k], c[x]) / tau for x in positives) / len(positives)
    return losses


def reduced(losses: dict[int, float], weights: Tensor | None, reduction: str) -> float:
    w = {i: 1.0 if weights is None else float(weights[i]) for i in losses}
    total = sum(w[i] * x for i, x in losses.items())
    return total / (sum(w.values()) or 1.0) if reduction == "mean" else total


SMALL: dict[str, Any] = {"pages": 5, "longest_pv": 4, "longest_history": 4, "dim": 6}
LOOPED = [name for name, case in CASES.items() if not {"dim", "pages"} & set(case)]


@pytest.mark.parametrize("case", LOOPED)
def test_loss_is_the_definition(case: str) -> None:
    options = SMALL | CASES[case] | ({"num_heads": 3} if CASES[case].get("num_heads") else {})
    p = in_float64(make(2, **(options | {"longest_history": 4})), LOSS_INPUTS)
    found, expected = reference.reconstruction_loss(p), naive_loss(p)
    assert expected
    items = torch.zeros(p.num_pv, dtype=torch.float64)
    for i, x in expected.items():
        items[i] = x
    torch.testing.assert_close(found.item_loss, items)
    assert found.is_anchor.nonzero().squeeze(1).tolist() == sorted(expected)
    if p.reduction == "none":
        torch.testing.assert_close(found.loss.detach(), items)
    else:
        assert found.loss.item() == pytest.approx(
            reduced(expected, p.weights, p.reduction), rel=1e-10
        )


@pytest.mark.parametrize(
    "options", [{}, {"ids": True}, {"mask": True, "ids": True}, {"table": True}], ids=str
)
@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_sequence_loss_is_the_definition(options: dict[str, Any], reduction: str) -> None:
    p = in_float64(
        make_sequence(
            3, reduction=reduction, **(SMALL | {"pages": 8, "longest_history": 6} | options)
        ),
        SEQUENCE_INPUTS,
    )
    found, expected = reference.click_sequence_loss(p).detach(), naive_sequence(p)
    assert expected
    if reduction == "none":
        assert {i: x for i, x in enumerate(found.tolist()) if x} == pytest.approx(
            expected, rel=1e-10
        )
    else:
        assert float(found) == pytest.approx(reduced(expected, None, reduction), rel=1e-10)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction": "both", "log_q": True},
        {"projected": True, "num_heads": 2},
        {"table": True, "tensor_tau": True},
    ],
    ids=str,
)
def test_derivatives(options: dict[str, Any]) -> None:
    p = in_float64(
        make(1, **({"pages": 3, "longest_pv": 3, "longest_history": 3, "dim": 4} | options)),
        LOSS_INPUTS,
    )
    names = [
        n for n in LOSS_INPUTS if getattr(p, n) is not None and (n != "history" or p.key is None)
    ]

    def loss(*tensors: Tensor) -> Tensor:
        from dataclasses import replace

        return reference.reconstruction_loss(
            replace(p, **dict(zip(names, tensors, strict=True)))
        ).loss

    inputs = tuple(getattr(p, n) for n in names)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


def test_closed_form_of_the_gradients() -> None:
    """dL/dr, dL/de and dL/d(1/tau) as derived in kernels/README.md, at the unit vectors
    themselves."""
    g = torch.Generator().manual_seed(0)
    m, n, d, tau = 7, 12, 5, 0.2
    r = torch.nn.functional.normalize(
        torch.randn(m, d, generator=g, dtype=torch.float64), dim=1
    ).requires_grad_()
    e = torch.nn.functional.normalize(
        torch.randn(n, d, generator=g, dtype=torch.float64), dim=1
    ).requires_grad_()
    weight = torch.rand(m, generator=g, dtype=torch.float64)
    share = weight / weight.sum()
    inverse = torch.tensor(1 / tau, dtype=torch.float64, requires_grad=True)
    positive = torch.arange(m)
    s = r @ e.T * inverse
    loss = (share * (s.logsumexp(1) - s[positive, positive])).sum()
    dr, de, d_inverse = torch.autograd.grad(loss, (r, e, inverse))
    p = s.softmax(1)
    o = p @ e
    torch.testing.assert_close(dr, share[:, None] / tau * (o - e[:m]))
    expected = (share[:, None] * p).T @ r / tau
    expected[:m] -= share[:, None] / tau * r
    torch.testing.assert_close(de, expected)
    torch.testing.assert_close(d_inverse, (share * ((r * o).sum(1) - (r * e[:m]).sum(1))).sum())


def test_zero_vectors_have_cosine_and_gradient_zero() -> None:
    x = torch.tensor(
        [[3.0, 4.0], [0.0, 0.0], [1e-20, 0.0]], dtype=torch.float64, requires_grad=True
    )
    unit = reference.normalize(x)
    unit.sum().backward()
    assert unit.tolist() == [[0.6, 0.8], [0.0, 0.0], [0.0, 0.0]]
    assert x.grad is not None
    assert x.grad[1:].tolist() == [[0.0, 0.0], [0.0, 0.0]]
