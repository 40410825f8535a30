"""Kernels are launched on the GPU of their tensors; and impl="auto" survives one that cannot be.

Without a GPU, Triton's interpreter stands in for it: which device is current, and which kernel
fails, is planted where it launches.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from factories import GPU, make, make_sequence, skip_unless_available
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import courier_fast as cf
from courier_fast import surroundings
from courier_fast.loss import fallback, functional, operators
from courier_fast.loss.problem import LaunchError
from courier_fast.loss.union import losses
from courier_fast.loss.union.candidates import CandidateUnion

pytest.importorskip("triton", reason="Triton is not installed")
if GPU:
    pytest.skip("what is planted is planted in the interpreter", allow_module_level=True)


# ---- calls ---------------------------------------------------------------------------------------


def batch(dim: int = 16) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    rows = {
        "pv": torch.randn(2, 2, dim, generator=g).requires_grad_(),
        "history": torch.randn(2, 3, dim, generator=g).requires_grad_(),
    }
    return rows | {"clicked": torch.tensor([[True, False], [True, True]])}


def leaves(b: dict[str, Tensor]) -> list[Tensor]:
    return [b["pv"], b["history"]]


def loss(impl: str, **options: Any) -> list[Tensor]:
    """Loss and gradients."""
    b = batch()
    found = cf.reconstruction_loss(**b, impl=impl, **options)
    return [found.detach(), *torch.autograd.grad(found, leaves(b), materialize_grads=True)]


def with_memory(impl: str, **options: Any) -> list[Tensor]:
    g = torch.Generator().manual_seed(4)
    return loss(impl, memory=torch.randn(3, 16, generator=g), **options)


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


def watched(impl: str) -> list[Tensor]:
    """By the registered operators, as torch.compile calls them."""
    with Watching():
        return loss(impl, attention="anchor")


def transformed(impl: str) -> list[Tensor]:
    b = {k: x.detach() for k, x in batch().items()}

    def of(pv: Tensor, history: Tensor) -> Tensor:
        given = {"pv": pv, "history": history, "clicked": b["clicked"]}
        return cf.reconstruction_loss(**given, attention="anchor", impl=impl)

    grads, value = torch.func.grad_and_value(of, argnums=(0, 1))(b["pv"], b["history"])
    return [value, *grads]


def reconstruct(impl: str) -> list[Tensor]:
    b = batch()
    found = cf.reconstruct(b["pv"], b["history"], impl=impl)
    grads = torch.autograd.grad(found, leaves(b), torch.full_like(found, 0.3))
    return [found.detach(), *grads]


def sequence(impl: str) -> list[Tensor]:
    b = batch()
    found = cf.click_sequence_loss(b["history"], impl=impl)
    return [found.detach(), *torch.autograd.grad(found, [b["history"]])]


def sequence_of_processes(impl: str) -> list[Tensor]:
    """As with `group`, but for the transfers."""
    p = make_sequence(2, dim=16, pages=2)
    p.history = p.history.detach().requires_grad_()
    union = CandidateUnion(impl, None, "auto", None, None)
    found = losses.click_sequence_loss(p, union)
    return [found.detach(), *torch.autograd.grad(found, [p.history])]


CALLS: dict[str, Callable[[str], list[Tensor]]] = {
    "anchor": lambda impl: loss(impl, attention="anchor", direction="both"),
    "candidate": loss,
    "memory": lambda impl: with_memory(impl, attention="anchor"),
    "candidate, memory": with_memory,
    "operators": watched,
    "torch.func": transformed,
    "reconstruct": reconstruct,
    "click sequence": sequence,
    "click sequence, group": sequence_of_processes,
}


# ---- what is planted -----------------------------------------------------------------------------

Launch = Callable[[str], None]


@pytest.fixture
def at_launch(monkeypatch: pytest.MonkeyPatch) -> Callable[[Launch], None]:
    """What is called with the name of each kernel before it is launched."""
    from triton.runtime import interpreter

    skip_unless_available("triton", make(0, impl="triton"))
    executor = interpreter.GridExecutor
    original = executor.__call__

    def plant(look: Launch) -> None:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            look(self.fn.__name__)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(executor, "__call__", call)

    return plant


class _Devices:
    """Two GPUs, of which the first is current; all tensors are on the second."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.current = 0
        self.launches: list[tuple[str, int]] = []
        monkeypatch.setattr(surroundings, "gpu_of", lambda _: 1)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.current)
        monkeypatch.setattr(torch.cuda, "device", self.device)

    @contextlib.contextmanager
    def device(self, number: int) -> Iterator[None]:
        before, self.current = self.current, number
        try:
            yield
        finally:
            self.current = before

    def note(self, name: str) -> None:
        self.launches.append((name, self.current))


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch, at_launch: Any) -> _Devices:
    found = _Devices(monkeypatch)
    at_launch(found.note)
    return found


class _Faults:
    """Kernels that cannot be launched, and how often it was tried."""

    def __init__(self, plant: Any) -> None:
        self.kernels: set[str] | None = set()  # None: all
        self.error: Exception | None = None
        self.tried = 0
        plant(self.look)

    def look(self, name: str) -> None:
        from triton.runtime.errors import OutOfResources

        if self.kernels is None or name in self.kernels:
            self.tried += 1
            raise self.error or OutOfResources(262144, 232448, "shared memory")


@pytest.fixture
def faults(monkeypatch: pytest.MonkeyPatch, at_launch: Any) -> _Faults:
    """impl="auto" takes the Triton kernels, here too."""
    monkeypatch.setitem(functional.AUTO, "cpu", "triton" + fallback.OR_REFERENCE)
    monkeypatch.setattr(fallback, "_failed", set())
    monkeypatch.setattr(fallback, "_told", set())
    return _Faults(at_launch)


def auto(call: Callable[[str], list[Tensor]]) -> tuple[list[Tensor], list[str]]:
    """What "auto" gives, and its warnings."""
    impl = "triton" + fallback.OR_REFERENCE if call is sequence_of_processes else "auto"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = call(impl)
    # NumPy, too, has warnings, in the interpreter.
    return found, [str(x.message) for x in caught if "courier_fast" in str(x.message)]


def same(found: list[Tensor], expected: list[Tensor], reordered: bool = False) -> None:
    """In every bit; `reordered`: but for the order of three terms of a sum."""
    for x, y in zip(found, expected, strict=True):
        off = (x.double() - y.double()).abs().max()
        assert off <= (2.0**-22 * y.abs().max() if reordered else 0), off


# ---- the device ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_kernels_run_on_the_gpu_of_their_tensors(devices: _Devices, name: str) -> None:
    """Forward and backward, of every autograd function."""
    CALLS[name]("triton")
    assert len(devices.launches) > 3
    assert {gpu for _, gpu in devices.launches} == {1}, devices.launches
    assert devices.current == 0


def test_a_launch_on_another_gpu_would_be_seen(
    devices: _Devices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(surroundings, "on_gpu_of", lambda _: contextlib.nullcontext())
    for call in (CALLS["anchor"], CALLS["memory"]):
        call("triton")
        assert {gpu for _, gpu in devices.launches} == {0}


# ---- what is known before a launch ---------------------------------------------------------------

KIB = 1024


@pytest.mark.parametrize(
    ("shared", "dtype", "dim", "gradients", "runs"),
    [
        (227, torch.float32, 1024, True, False),
        (227, torch.float32, 513, True, False),
        (227, torch.float32, 1024, False, True),
        (227, torch.float32, 512, True, True),
        (163, torch.float32, 300, True, False),
        (99, torch.float32, 257, True, False),
        (99, torch.float32, 256, True, True),
        (99, torch.float32, 1024, False, False),
        (227, torch.float16, 1024, True, True),
        (163, torch.float16, 1024, True, False),
        (99, torch.float16, 512, True, False),
        (163, torch.bfloat16, 1024, True, True),
        (99, torch.bfloat16, 1024, True, False),
        (99, torch.bfloat16, 512, True, True),
    ],
)
def test_what_needs_too_much_shared_memory_is_refused(
    monkeypatch: pytest.MonkeyPatch,
    shared: int,
    dtype: torch.dtype,
    dim: int,
    gradients: bool,
    runs: bool,
) -> None:
    """test_dry_run.py compares with what the kernels compile to."""
    from courier_fast.kernels.triton import loss as triton_loss
    from courier_fast.kernels.triton import tiles

    monkeypatch.setattr(tiles, "shared_memory", lambda _: shared * KIB)
    p = make(0, dim=dim, dtype=dtype, attention="candidate", pages=1)
    with torch.set_grad_enabled(gradients):
        reasons = triton_loss._shared_memory_reasons(p)
    assert reasons == [] if runs else f"a block of this GPU has {shared}" in reasons[0]


# ---- kernels that cannot be launched -------------------------------------------------------------


@pytest.mark.parametrize("name", CALLS)
def test_auto_takes_the_reference_where_nothing_compiles(faults: _Faults, name: str) -> None:
    faults.kernels = None
    found, warned = auto(CALLS[name])
    # There, the gradient of E is that of three uses, two of which the operator has added up.
    same(found, CALLS[name]("reference"), reordered=name == "candidate, memory")
    assert warned
    assert len(warned) == len(set(warned))
    for message in warned:
        assert "OutOfResources: out of resource: shared memory, Required: 262144" in message
        assert "report" in message
        assert torch.__version__ in message
    tried = faults.tried
    again, warned = auto(CALLS[name])
    same(again, found)
    assert not warned
    assert faults.tried == tried


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("anchor", "attend_dkv"),
        ("candidate", "candidate_history"),
        ("operators", "attend_dq"),
        ("torch.func", "attend_dq"),
        ("reconstruct", "attend_dkv"),
    ],
)
def test_a_backward_that_cannot_be(faults: _Faults, name: str, kernel: str) -> None:
    """The loss is the kernels', its gradients the reference's; from then on both are."""
    call = CALLS[name]
    (loss_of_kernels, *_), reference = call("triton"), call("reference")
    faults.kernels = {kernel}
    found, warned = auto(call)
    same(found, [loss_of_kernels, *reference[1:]])
    assert len(warned) == 1
    assert f"the kernel {kernel} cannot be launched" in warned[0]
    again, warned = auto(call)
    same(again[1:], reference[1:])
    assert not warned
    assert faults.tried == 1


def test_what_works_goes_on(faults: _Faults) -> None:
    """A call without gradients launches other kernels than one with them."""
    faults.kernels = {"attend_dkv"}
    auto(CALLS["anchor"])
    b = {k: x.detach() for k, x in batch().items()}
    options = {"attention": "anchor", "direction": "both"}
    same(
        [cf.reconstruction_loss(**b, **options)],
        [cf.reconstruction_loss(**b, **options, impl="triton")],
    )
    assert faults.tried == 1


def test_each_cause_is_told_once(faults: _Faults) -> None:
    faults.kernels = {"attend_dkv", "candidate_columns"}
    assert len(auto(CALLS["anchor"])[1]) == 1
    assert not auto(CALLS["reconstruct"])[1]  # another problem, the same cause
    assert len(auto(CALLS["candidate"])[1]) == 1
    assert faults.tried == 3


@pytest.mark.parametrize("name", ["anchor", "candidate", "memory", "click sequence, group"])
def test_an_explicit_implementation_never_falls_back(faults: _Faults, name: str) -> None:
    faults.kernels = {"contrast", "candidate_columns"}
    with pytest.raises(LaunchError, match="the kernel (contrast|candidate_columns) cannot be"):
        CALLS[name]("triton")
    assert faults.tried == 1


@pytest.mark.parametrize("words", ["out of memory", "an illegal memory access was encountered"])
def test_what_is_no_fault_of_the_kernel_is_raised(faults: _Faults, words: str) -> None:
    """Memory may be there the next time; of kernels before it, a launch only brings the news."""
    faults.kernels, faults.error = None, RuntimeError(f"Triton Error [CUDA]: {words}")
    with pytest.raises(RuntimeError, match=words):
        auto(CALLS["anchor"])
    assert not fallback._failed


def test_a_temperature_of_each_step_compiles_nothing_anew(faults: _Faults) -> None:
    faults.kernels = {"contrast"}
    for tau in (0.1, 0.2, 0.3):
        auto(lambda impl, tau=tau: loss(impl, attention="anchor", temperature=tau))
    assert faults.tried == 1


def test_other_sizes_do_not_either(faults: _Faults) -> None:
    faults.kernels = {"contrast"}
    for pages in (2, 3, 4):
        p = make(0, pages=pages, dim=16)
        operators.loss(p, "triton" + fallback.OR_REFERENCE)
    assert faults.tried == 1
