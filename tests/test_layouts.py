"""One problem in every layout, and in memory of every kind, is one loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import DEVICES
from torch import Tensor

import courier_fast as cf

IMPLS = ("reference", "cpu", "triton")
P_COUNTS, H_COUNTS, DIM = [3, 0, 5, 2], [4, 2, 0, 6], 12


def ragged(counts: list[int], seed: int, dim: int | None = DIM) -> list[Tensor]:
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, dim, generator=g) if dim else torch.rand(n, generator=g) < 0.5
        for n in counts
    ]


def padded(pages: list[Tensor], filler: float = torch.nan) -> tuple[Tensor, Tensor]:
    longest = max(len(x) for x in pages) + 1
    out = torch.full((len(pages), longest, *pages[0].shape[1:]), filler).to(pages[0].dtype)
    mask = torch.zeros(len(pages), longest, dtype=torch.bool)
    for i, x in enumerate(pages):
        out[i, : len(x)], mask[i, : len(x)] = x, True
    return out, mask


def offsets(counts: list[int]) -> Tensor:
    return torch.tensor([0, *counts]).cumsum(0)


def nested(pages: list[Tensor]) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(
        torch.cat(pages), offsets([len(x) for x in pages])
    )


PV, HISTORY, CLICKED = ragged(P_COUNTS, 1), ragged(H_COUNTS, 2), ragged(P_COUNTS, 3, None)


def run(
    impl: str, pv: Tensor, history: Tensor, clicked: Tensor, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients of pv and history, on the CPU; skipped where impl cannot run."""
    if impl == "triton":
        pytest.importorskip("triton")
    if impl == "cpu":
        pytest.importorskip("courier_fast._native")
    device = DEVICES.get(impl, "cpu")
    pv = pv.to(device).detach().requires_grad_()
    history = history.to(device).detach().requires_grad_()
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    loss = cf.reconstruction_loss(pv, history, clicked.to(device), impl=impl, **options)
    loss.backward()
    assert pv.grad is not None
    assert history.grad is not None
    return loss.detach().cpu(), pv.grad.cpu(), history.grad.cpu()


def packed_run(impl: str) -> tuple[Tensor, Tensor, Tensor]:
    pages = {"pv_offsets": offsets(P_COUNTS), "history_offsets": offsets(H_COUNTS)}
    return run(impl, torch.cat(PV), torch.cat(HISTORY), torch.cat(CLICKED), **pages)


@pytest.mark.parametrize("impl", IMPLS)
def test_padded_is_packed(impl: str) -> None:
    loss, d_pv, d_history = packed_run(impl)
    pv, pv_mask = padded(PV)
    history, history_mask = padded(HISTORY, torch.inf)
    clicked, _ = padded(CLICKED, 1)
    got = run(impl, pv, history, clicked, pv_mask=pv_mask, history_mask=history_mask)
    torch.testing.assert_close(got[0], loss)
    torch.testing.assert_close(got[1][pv_mask], d_pv)
    torch.testing.assert_close(got[2][history_mask], d_history)
    assert not got[1][~pv_mask].any()
    assert not got[2][~history_mask].any()


@pytest.mark.parametrize("impl", IMPLS)
def test_nested_is_packed(impl: str) -> None:
    loss, d_pv, d_history = packed_run(impl)
    got = run(impl, nested(PV), nested(HISTORY), nested(CLICKED))
    torch.testing.assert_close(got[0], loss)
    torch.testing.assert_close(got[1].values(), d_pv)
    torch.testing.assert_close(got[2].values(), d_history)


@pytest.mark.parametrize("impl", IMPLS)
def test_nested_with_holes_is_packed(impl: str) -> None:
    """Offsets with lengths: what lies between the end of a page and the next is padding."""
    loss, _, _ = packed_run(impl)

    def holey(pages: list[Tensor]) -> Tensor:
        x, _ = padded(pages)
        starts = torch.arange(len(pages) + 1) * x.shape[1]
        counts = torch.tensor([len(p) for p in pages])
        return torch.nested.nested_tensor_from_jagged(x.flatten(0, 1), starts, counts)

    pv, history, clicked = holey(PV), holey(HISTORY), holey(CLICKED)
    clicked = torch.nested.nested_tensor_from_jagged(clicked.values(), pv.offsets(), pv.lengths())
    got = cf.reconstruction_loss(
        *(x.to(DEVICES.get(impl, "cpu")) for x in (pv, history, clicked)), impl=impl
    )
    torch.testing.assert_close(got.cpu(), loss)


@pytest.mark.parametrize("impl", IMPLS)
def test_items_are_rows(impl: str) -> None:
    """A table with indices is the packed problem of its rows; its gradient is the sum over the
    occurrences."""
    g = torch.Generator().manual_seed(5)
    table = torch.randn(9, DIM, generator=g)
    pv_index = torch.randint(0, 9, (sum(P_COUNTS),), generator=g)
    history_index = torch.randint(0, 9, (sum(H_COUNTS),), generator=g)
    pages = {"pv_offsets": offsets(P_COUNTS), "history_offsets": offsets(H_COUNTS)}
    loss, d_pv, d_history = run(
        impl, table[pv_index], table[history_index], torch.cat(CLICKED), item_ids=pv_index, **pages
    )
    device = DEVICES.get(impl, "cpu")
    leaf = table.to(device).requires_grad_()
    where = {k: v.to(device) for k, v in pages.items()}
    got = cf.reconstruction_loss(
        pv_index.to(device),
        history_index.to(device),
        torch.cat(CLICKED).to(device),
        embeddings=leaf,
        impl=impl,
        **where,
    )
    got.backward()
    assert leaf.grad is not None
    expected = (
        torch.zeros_like(table)
        .index_add_(0, pv_index, d_pv)
        .index_add_(0, history_index, d_history)
    )
    torch.testing.assert_close(got.detach().cpu(), loss)
    torch.testing.assert_close(leaf.grad.cpu(), expected)


def views(x: Tensor) -> dict[str, Tensor]:
    """The same [B, L, D] numbers in other memory."""
    wide = torch.zeros(*x.shape[:2], 2 * x.shape[2])
    wide[..., ::2] = x
    return {
        "strided": wide[..., ::2],
        "transposed": x.transpose(0, 1).contiguous().transpose(0, 1),
        "channels-last": x.permute(2, 0, 1)
        .contiguous()
        .permute(1, 2, 0),  # the strides of a feature map
    }


@pytest.mark.parametrize("kind", ["strided", "transposed", "channels-last"])
@pytest.mark.parametrize("impl", IMPLS)
def test_memory_format_does_not_matter(impl: str, kind: str) -> None:
    pv, pv_mask = padded(PV, 0.0)
    history, history_mask = padded(HISTORY, 0.0)
    clicked, _ = padded(CLICKED, 0)
    masks = {"pv_mask": pv_mask, "history_mask": history_mask}
    expected = run(impl, pv, history, clicked, **masks)
    odd_pv, odd_history = views(pv)[kind], views(history)[kind]
    assert not odd_pv.is_contiguous()
    got = run(
        impl,
        odd_pv,
        odd_history,
        clicked,
        pv_mask=pv_mask.T.contiguous().T,
        history_mask=history_mask,
    )
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_history(impl: str) -> None:
    """One history for all pages, expanded with stride 0: its gradient is the sum over the pages."""
    pv, pv_mask = padded(PV, 0.0)
    clicked, _ = padded(CLICKED, 0)
    one = torch.randn(1, 4, DIM, generator=torch.Generator().manual_seed(9))
    _, _, d_each = run(impl, pv, one.repeat(len(PV), 1, 1), clicked, pv_mask=pv_mask)
    device = DEVICES.get(impl, "cpu")
    leaf = one.to(device).requires_grad_()
    cf.reconstruction_loss(
        pv.to(device),
        leaf.expand(len(PV), -1, -1),
        clicked.to(device),
        pv_mask=pv_mask.to(device),
        impl=impl,
    ).backward()
    assert leaf.grad is not None
    torch.testing.assert_close(leaf.grad.cpu(), d_each.sum(0, keepdim=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_reconstruct_in_every_layout(impl: str) -> None:
    device = DEVICES.get(impl, "cpu")
    if impl == "cpu":
        pytest.importorskip("courier_fast._native")
    packed, packed_weights = cf.reconstruct(
        torch.cat(PV).to(device),
        torch.cat(HISTORY).to(device),
        pv_offsets=offsets(P_COUNTS).to(device),
        history_offsets=offsets(H_COUNTS).to(device),
        return_weights=True,
        impl=impl,
    )
    pv, pv_mask = padded(PV, 0.0)
    history, history_mask = padded(HISTORY, 0.0)
    masks = {"pv_mask": pv_mask.to(device), "history_mask": history_mask.to(device)}
    r, weights = cf.reconstruct(
        pv.to(device), history.to(device), return_weights=True, impl=impl, **masks
    )
    torch.testing.assert_close(r[pv_mask.to(device)], packed)
    assert weights.shape == (*pv_mask.shape, 1, history.shape[1])
    torch.testing.assert_close((weights[:, :, 0] @ history.to(device)), r)
    torch.testing.assert_close(
        weights[pv_mask.to(device)][..., : packed_weights.shape[-1]], packed_weights
    )
    jagged = cf.reconstruct(nested(PV).to(device), nested(HISTORY).to(device), impl=impl)
    torch.testing.assert_close(jagged.values(), packed)


@pytest.mark.parametrize("impl", IMPLS)
def test_sequence_in_every_layout(impl: str) -> None:
    device = DEVICES.get(impl, "cpu")
    if impl == "cpu":
        pytest.importorskip("courier_fast._native")
    history, mask = padded(HISTORY)
    packed = cf.click_sequence_loss(
        torch.cat(HISTORY).to(device), history_offsets=offsets(H_COUNTS).to(device), impl=impl
    )
    other = cf.click_sequence_loss(
        history.to(device), history_mask=mask.to(device), impl=impl, reduction="none"
    )
    assert other.shape == mask.shape
    torch.testing.assert_close(other.sum() / (other != 0).sum(), packed)
    torch.testing.assert_close(
        cf.click_sequence_loss(nested(HISTORY).to(device), impl=impl), packed
    )
