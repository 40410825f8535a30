"""R given by the caller: the contrast alone, for any attention and for two towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import offsets_of
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

import courier_fast as cf
from courier_fast import reconstruct, reconstruction_loss

PV, HISTORY = torch.tensor([3, 2, 4, 0, 5]), torch.tensor([2, 0, 3, 1, 4])
ROWS, DIM = int(PV.sum()), 8


def rows(seed: int, count: int = ROWS, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, DIM, generator=generator, dtype=dtype).requires_grad_()


def clicks() -> Tensor:
    return torch.arange(ROWS) % 3 < 2


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


PAGE = torch.repeat_interleave(torch.arange(len(PV)), PV)
SEEN = HISTORY[PAGE] > 0  # the items of pages with a history
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "identify": {"direction": "identify"},
    "both": {"direction": "both", "reduction": "none"},
    "page": {"negatives": "page"},
    "other pages": {"negatives": "other_pages", "direction": "both"},
    "ids": {"item_ids": torch.arange(ROWS) % 6},
    "weights": {"weights": torch.arange(ROWS) / 7.0, "log_q": torch.arange(ROWS) / -9.0},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_of_its_own_reconstructions(options: str) -> None:
    """Given what `reconstruct` makes, it is the loss with the attention, to its inputs, too."""
    pv, history = rows(0), rows(1, int(HISTORY.sum()))
    pages = {"pv_offsets": offsets_of(PV), "history_offsets": offsets_of(HISTORY)}
    how = OPTIONS[options] | {"impl": "reference"}
    expected = reconstruction_loss(pv, history, clicks(), attention="anchor", **pages, **how)
    r = reconstruct(pv, history, **pages, impl="reference")
    found = reconstruction_loss(
        pv,
        None,
        clicks(),
        pv_offsets=pages["pv_offsets"],
        reconstructed=r,
        reconstructed_mask=SEEN,
        **how,
    )
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-12
    for a, b in zip(*(gradients(x.sum(), pv, history) for x in (found, expected)), strict=True):
        assert (a - b).abs().max() < 1e-12


def test_it_is_the_cross_entropy_of_two_towers() -> None:
    """One item a page, all clicked: InfoNCE in the batch, both ways."""
    users, items = rows(2), rows(3)
    offsets = torch.arange(ROWS + 1)
    clicked = torch.ones(ROWS, dtype=torch.bool)
    for impl in ("reference", "cpu"):
        kind = torch.float64 if impl == "reference" else torch.float32
        u, e = users.to(kind), items.to(kind)
        logits = normalize(u, dim=1) @ normalize(e, dim=1).T / 0.1
        target = torch.arange(ROWS)
        ways = {"reconstruct": logits, "identify": logits.T}
        expected = {d: cross_entropy(x, target) for d, x in ways.items()}
        expected["both"] = (expected["reconstruct"] + expected["identify"]) / 2
        for direction, truth in expected.items():
            how = {"pv_offsets": offsets, "direction": direction, "impl": impl}
            found = reconstruction_loss(e, None, clicked, reconstructed=u, **how)
            assert torch.allclose(found, truth, rtol=1e-5 if impl == "cpu" else 1e-12)


def layout_of(kind: str, x: Tensor) -> Tensor:
    """Values [ROWS, ...] as a layout has them; padding holds NaN."""
    if kind == "packed":
        return x
    if kind == "nested":
        return torch.nested.nested_tensor_from_jagged(x, offsets_of(PV))
    value = torch.nan if x.is_floating_point() else 0
    padded = x.new_full((len(PV), int(PV.max()), *x.shape[1:]), value)
    for page, values in enumerate(x.split(PV.tolist())):
        padded[page, : len(values)] = values
    return padded


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("kind", ["padded", "packed", "nested"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_layouts(impl: str, kind: str, table: bool) -> None:
    items, r = rows(0, 6, torch.float32), rows(1, ROWS, torch.float32)
    index = torch.arange(ROWS) % 6
    plain = {"clicked": clicks(), "reconstructed_mask": SEEN, "item_ids": index}
    about: dict[str, Any] = {"impl": impl, "return_stats": True}
    packed = {"pv_offsets": offsets_of(PV)}
    expected, stats = reconstruction_loss(
        items[index], None, **plain, **packed, **about, reconstructed=r
    )
    truth = gradients(expected, items, r)
    given = {name: layout_of(kind, x) for name, x in plain.items()}
    if kind == "packed":
        given |= packed
    elif kind == "padded":
        given["pv_mask"] = torch.arange(int(PV.max())) < PV[:, None]
    if table:
        del given["item_ids"]
        given |= {"pv": layout_of(kind, index), "embeddings": items}
    else:
        given["pv"] = layout_of(kind, items[index])
    found, of = reconstruction_loss(
        history=None, **given, **about, reconstructed=layout_of(kind, r)
    )
    assert torch.allclose(found, expected, rtol=1e-6)
    for a, b in zip(gradients(found, items, r), truth, strict=True):
        assert torch.allclose(a, b, atol=1e-7)
    assert of.num_clicked_without_history == stats.num_clicked_without_history
    assert stats.num_clicked_without_history == int((clicks() & ~SEEN).sum()) > 0


@pytest.mark.parametrize("direction", ["reconstruct", "identify", "both"])
@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_rows_without_an_r_have_no_influence(impl: str, direction: str) -> None:
    pv, r = rows(0, ROWS, torch.float32), rows(1, ROWS, torch.float32)
    how = {"pv_offsets": offsets_of(PV), "direction": direction, "impl": impl}
    how["reconstructed_mask"] = SEEN
    truth = reconstruction_loss(pv, None, clicks(), reconstructed=r, **how)
    spoilt = torch.where(SEEN[:, None], r.detach(), torch.nan).requires_grad_()
    found = reconstruction_loss(pv, None, clicks(), reconstructed=spoilt, **how)
    assert torch.equal(found, truth)
    d_pv, d_r = gradients(found, pv, spoilt)
    assert torch.isfinite(d_pv).all()
    assert (d_r[~SEEN] == 0).all()
    assert (d_r[SEEN & clicks()] != 0).any(1).all()


def test_no_row_has_an_r() -> None:
    pv, r = rows(0, ROWS, torch.float32), rows(1, ROWS, torch.float32)
    for impl in ("reference", "cpu"):
        loss = reconstruction_loss(
            pv,
            None,
            clicks(),
            pv_offsets=offsets_of(PV),
            reconstructed=r,
            reconstructed_mask=torch.zeros(ROWS, dtype=torch.bool),
            impl=impl,
        )
        assert loss == 0
        assert all((x == 0).all() for x in gradients(loss, pv, r))


def test_the_module_takes_it() -> None:
    pv, r = rows(0, ROWS, torch.float32), rows(1, ROWS, torch.float32)
    pages = {"pv_offsets": offsets_of(PV)}
    loss_fn = cf.ReconstructionLoss(temperature=0.2)
    expected = reconstruction_loss(pv, None, clicks(), reconstructed=r, temperature=0.2, **pages)
    assert loss_fn(pv, None, clicks(), reconstructed=r, **pages) == expected
    with pytest.raises(ValueError, match=r"reconstructed: expected no .* got attention \('mean'"):
        cf.ReconstructionLoss(attention="mean")(pv, None, clicks(), reconstructed=r, **pages)


def test_errors() -> None:
    pv, r = rows(0, ROWS, torch.float32), rows(1, ROWS, torch.float32)
    good: dict[str, Any] = {"pv_offsets": offsets_of(PV), "reconstructed": r}
    history = {"history_offsets": offsets_of(HISTORY)}
    bad: list[tuple[str, type[Exception], dict[str, Any]]] = [
        (r"reconstructed: .* got history \(shape \[10, 8\]", ValueError, {"history": pv[:10]}),
        (r"got history_offsets \(", ValueError, history),
        (r"got num_heads \(4\)", ValueError, {"num_heads": 4}),
        (r"got key \(.*\) and value \(", ValueError, {"key": pv, "value": pv}),
        (r"got attention_scale \(1.0\)", ValueError, {"attention_scale": 1.0}),
        (
            r"reconstructed: expected shape \[14, 8\], got \[13, 8\]",
            ValueError,
            {"reconstructed": r[1:]},
        ),
        (
            r"reconstructed: expected shape \[14, 8\], got \[14, 4\]",
            ValueError,
            {"reconstructed": r[:, :4]},
        ),
        (r"reconstructed: expected torch.float32", TypeError, {"reconstructed": r.double()}),
        (r"reconstructed: expected a torch.Tensor, got list", TypeError, {"reconstructed": [1]}),
        (
            r"reconstructed_mask: expected a bool",
            TypeError,
            {"reconstructed_mask": torch.ones(ROWS)},
        ),
        (
            r"reconstructed_mask: expected shape \[14\]",
            ValueError,
            {"reconstructed_mask": SEEN[1:]},
        ),
        (
            r"reconstructed_mask: expected None without reconstructed",
            ValueError,
            {"reconstructed": None, "reconstructed_mask": SEEN, "history": pv[:10]} | history,
        ),
        (r"history: expected a torch.Tensor, got None", TypeError, {"reconstructed": None}),
    ]
    for message, kind, change in bad:
        with pytest.raises(kind, match=message):
            reconstruction_loss(pv, clicked=clicks(), **{"history": None} | good | change)
