"""Gradients in slices are those of one pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from dataset_factory import make_dataset
from torch import Tensor, nn
from train_factory import settings

from courier_fast.train.encoder import build_encoder
from courier_fast.train.gradient_cache import cached_backward, check_sliceable
from courier_fast.train.trainer import Trainer


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("size", [1, 5, 8, 100])
def test_gradient_in_slices_is_that_in_one_pass(size: int) -> None:
    torch.manual_seed(0)
    encoder = build_encoder("test_convnext", 6, 32).double()
    images, target = torch.randn(21, 3, 32, 32).double(), torch.randn(21, 21).double()

    def loss_of(e: Tensor) -> Tensor:  # every pair counts, as in a contrastive loss
        return ((e @ e.T).softmax(1) * target).sum()

    loss_of(encoder(images)).backward()
    expected = gradients(encoder)
    encoder.zero_grad()
    loss = cached_backward(encoder, images, loss_of, size, seed=0)
    torch.testing.assert_close(loss, loss_of(encoder(images)).detach(), rtol=1e-12, atol=0)
    found = gradients(encoder)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-13)


def test_both_passes_draw_the_same_random_numbers() -> None:
    """With dropout the slices' gradient is that of one graph over the same draws."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(4, 50), nn.Dropout(0.5), nn.Linear(50, 3)).double()
    rows = torch.randn(10, 4).double()

    def loss_of(e: Tensor) -> Tensor:
        return (e @ e.T).logsumexp(1).sum()

    whole = []
    for i, part in enumerate(rows.split(4)):
        torch.manual_seed(7 + i)
        whole.append(encoder(part))
    loss_of(torch.cat(whole)).backward()
    expected = gradients(encoder)
    encoder.zero_grad()
    cached_backward(encoder, rows, loss_of, 4, seed=7)
    for name, gradient in gradients(encoder).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13)


def test_the_last_slice_completes_every_gradient() -> None:
    """`synchronised` is called once, when the head's gradients are complete and the encoder's lack
    the last slice."""
    torch.manual_seed(0)
    encoder, head = nn.Linear(4, 5).double(), nn.Linear(5, 3).double()
    model = nn.Sequential(encoder, head)
    rows = torch.randn(10, 4).double()
    before: list[Tensor] = []

    def loss_of(features: Tensor) -> Tensor:
        e = head(features)
        return (e @ e.T).logsumexp(1).sum()

    def synchronised(compute: Callable[[], Tensor]) -> Tensor:
        before.extend(p.grad.clone() for p in model.parameters())
        out = compute()
        assert len(out) == 2  # of 10 rows in slices of 4
        return out

    cached_backward(encoder, rows, loss_of, 4, 0, synchronised)
    found = [p.grad for p in model.parameters()]
    assert len(before) == len(found) == 4  # called once
    assert [torch.equal(x, y) for x, y in zip(before, found, strict=True)] == [
        False,
        False,
        True,
        True,
    ]
    model.zero_grad()
    loss_of(encoder(rows)).backward()
    for x, p in zip(found, model.parameters(), strict=True):
        torch.testing.assert_close(x, p.grad, rtol=1e-10, atol=1e-13)


def test_batch_norm_is_refused_in_slices() -> None:
    with pytest.raises(
        ValueError,
        match=r"model\.slice: expected an encoder without batch statistics, got one with "
        r"BatchNorm2d \(1\)",
    ):
        check_sliceable(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))


def test_slices_in_the_trainer(tmp_path: Path) -> None:
    """In float32 by the error budget: the slices' error against float64 is at most twice that of
    one pass, plus a rounding."""
    dataset = make_dataset(tmp_path / "dataset", pages=120, seed=1)
    one, two, exact = (
        Trainer(
            settings(dataset, tmp_path / name, model__slice=size, model__backbone="test_convnext")
        )
        for name, size in (("one", 0), ("two", 7), ("exact", 0))
    )
    batch = one.loader.load(0, 0)
    exact.learner.modules.double()
    exact.learner.head = exact.encoder.head  # type: ignore[method-assign]  # which would give float32
    exact.backward(replace(batch, images=batch.images.double()))
    a, b = one.backward(batch), two.backward(batch)
    torch.testing.assert_close(a.loss, b.loss)
    named = one.learner.modules.named_parameters()
    for (name, x), y, z in zip(
        named, two.learner.parameters, exact.learner.parameters, strict=True
    ):
        rounding = torch.finfo(torch.float32).eps * z.grad.norm()
        assert (y.grad - z.grad).norm() <= 2 * (x.grad - z.grad).norm() + rounding, name
