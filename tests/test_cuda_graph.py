"""`cuda_graph=True`: the same loss and gradients as without, whatever is called in between.

Without a GPU a stand-in for the capture does again what was captured, into the same tensors, as a
graph would: a result that was not copied out in time shows.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from factories import GPU
from torch import Tensor

from courier_fast import ClickSequenceLoss, ReconstructionLoss
from courier_fast.loss import cuda_graph

IMPL = "triton" if GPU else "cpu"
DEVICE = "cuda" if GPU else "cpu"


@pytest.fixture
def captures(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How often a signature was captured."""
    count: list[int] = []

    class Counted(cuda_graph._Graph):
        def __init__(self, *args: Any) -> None:
            count.append(1)
            super().__init__(*args)

    class StandIn:
        def __init__(self, device: torch.device) -> None:
            pass

        def take_turn(self) -> None:
            pass

        def capture(self, body: Any) -> Any:
            results = body()

            def replay() -> None:
                for kept, new in zip(results, body(), strict=True):
                    kept.copy_(new)

            return results, replay

    monkeypatch.setattr(cuda_graph, "_Graph", Counted)
    if not GPU:
        monkeypatch.setattr(cuda_graph, "Place", StandIn)
        monkeypatch.setattr(cuda_graph, "DEVICES", ("cpu",))
        monkeypatch.setattr(cuda_graph, "IMPLS", ("cpu",))
    return count


def batch(seed: int, pages: int = 6, dim: int = 16) -> dict[str, Tensor]:
    """Padded: 4 items and 5 of history a page."""
    g = torch.Generator().manual_seed(seed)
    tensors = {
        "pv": torch.randn(pages, 4, dim, generator=g),
        "history": torch.randn(pages, 5, dim, generator=g),
        "clicked": torch.rand(pages, 4, generator=g) < 0.5,
        "pv_mask": torch.rand(pages, 4, generator=g) < 0.9,
        "history_mask": torch.rand(pages, 5, generator=g) < 0.8,
    }
    tensors = {k: x.to(DEVICE) for k, x in tensors.items()}
    for name in ("pv", "history"):
        tensors[name].requires_grad_()
    return tensors


def packed(seed: int) -> dict[str, Tensor]:
    b = batch(seed)
    lengths = torch.tensor([0, 4, 8, 12, 16, 20, 24], device=DEVICE)
    return {
        "pv": b["pv"].detach().reshape(24, -1).requires_grad_(),
        "history": b["history"].detach().reshape(30, -1).requires_grad_(),
        "clicked": b["clicked"].reshape(-1),
        "pv_offsets": lengths,
        "history_offsets": torch.tensor([0, 5, 5, 15, 18, 25, 30], device=DEVICE),
    }


def items(seed: int) -> dict[str, Tensor]:
    b = batch(seed)
    g = torch.Generator().manual_seed(seed)
    return b | {
        "pv": torch.randint(0, 9, (6, 4), generator=g).to(DEVICE),
        "history": torch.randint(0, 9, (6, 5), generator=g).to(DEVICE),
        "embeddings": torch.randn(9, 16, generator=g).to(DEVICE).requires_grad_(),
    }


def nested(seed: int) -> dict[str, Tensor]:
    b = packed(seed)

    def jagged(values: Tensor, offsets: Tensor) -> Tensor:
        return torch.nested.nested_tensor_from_jagged(values, offsets)

    return {
        "pv": jagged(b["pv"], b["pv_offsets"]),
        "history": jagged(b["history"], b["history_offsets"]),
        "clicked": jagged(b["clicked"], b["pv_offsets"]),
        "leaf_pv": b["pv"],
        "leaf_history": b["history"],
    }


LAYOUTS: dict[str, Callable[[int], dict[str, Tensor]]] = {
    "padded": batch,
    "packed": packed,
    "items": items,
    "nested": nested,
}


def leaves(module: Any, b: dict[str, Tensor]) -> list[Tensor]:
    return [x for x in (*b.values(), *module.parameters()) if x.requires_grad and x.is_leaf]


def call(module: Any, b: dict[str, Tensor]) -> Any:
    return module(**{k: x for k, x in b.items() if not k.startswith("leaf")})


def modules(**options: Any) -> tuple[ReconstructionLoss, ReconstructionLoss]:
    """With and without graph."""
    return tuple(  # type: ignore[return-value]
        ReconstructionLoss(impl=IMPL, cuda_graph=on, **options).to(DEVICE) for on in (True, False)
    )


def same(found: Any, expected: Any) -> None:
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"direction": "both"},
        {"learnable_temperature": True},
        {"reduction": "sum"},
        {"reduction": "none"},
    ],
    ids=str,
)
def test_other_inputs_of_the_same_shape(
    captures: list[int], layout: str, options: dict[str, Any]
) -> None:
    graphed, plain = modules(**options)
    for seed in range(3):
        b = LAYOUTS[layout](seed)
        loss, expected = call(graphed, b), call(plain, b)
        if loss.is_nested:
            loss, expected = loss.values(), expected.values()
        same([loss], [expected])
        upstream = torch.rand(loss.shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
        found = torch.autograd.grad(loss, leaves(graphed, b), upstream)
        same(found, torch.autograd.grad(expected, leaves(plain, b), upstream))
    assert len(captures) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_an_upstream_gradient(captures: list[int], dtype: torch.dtype) -> None:
    """The same bits, whatever it is: float16 too gets a GradScaler's factor before anything is
    rounded."""
    if dtype == torch.float16 and not GPU:
        pytest.skip("float16 needs a GPU here: the native library has none")
    graphed, plain = modules()
    b = {
        k: x.detach().to(dtype).requires_grad_() if x.requires_grad else x
        for k, x in batch(0).items()
    }
    for factor in (0.3, 65536.0, 1e-30):
        found = torch.autograd.grad(call(graphed, b) * factor, leaves(graphed, b))
        same(found, torch.autograd.grad(call(plain, b) * factor, leaves(plain, b)))


def test_inputs_changed_before_the_backward(captures: list[int]) -> None:
    """As without a graph: an error, and no gradient of something else."""
    graphed, _ = modules()
    b = batch(0)
    loss = call(graphed, b)
    with torch.no_grad():
        b["pv"].mul_(-1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class FakeGPU:
    """A GPU's streams, graphs and their memory. As PyTorch does it: streams come round again after
    a while, and a capture takes what an earlier one with the same pool, on the same stream, has
    given back. Addresses are numbers."""

    STREAMS = 4

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.pools = itertools.count()
        self.numbers = itertools.cycle(range(self.STREAMS))
        self.addresses = itertools.count()
        self.free: dict[Any, list[int]] = {}
        self.captures: list[Any] = []  # of (device, pool, stream)
        self.current = self.stream("cuda:1", -1)
        for name, value in {
            "Stream": lambda device: self.stream(device, next(self.numbers)),
            "current_stream": lambda device: self.current,
            "stream": contextlib.nullcontext,
            "graph_pool_handle": lambda: next(self.pools),
            "CUDAGraph": lambda: SimpleNamespace(replay=None),
            "graph": self.graph,
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)

    def stream(self, device: Any, number: int) -> Any:
        found = SimpleNamespace(device=device, number=number, waited=[])
        found.wait_stream = lambda other: found.waited.append(other)
        return found

    def graph(self, _graph: Any, pool: Any, stream: Any, **_: Any) -> Any:
        self.captures.append((stream.device, pool, stream.number))
        return contextlib.nullcontext()

    def allocate(self, count: int) -> list[int]:
        """In the capture that is at work."""
        free = self.free.setdefault(self.captures[-1], [])
        return [free.pop() if free else next(self.addresses) for _ in range(count)]

    def body(self, kept: int, scratch: int, used: list[set[int]]) -> list[Any]:
        """What a pass does: `used` gets all that it writes."""
        results, inside = self.allocate(kept), self.allocate(scratch)
        self.free[self.captures[-1]] += inside
        used.append({*inside, *results})
        return results


def test_captures_are_on_a_stream_of_their_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's default is a stream of the GPU that the process captured on first."""
    gpu = FakeGPU(monkeypatch)
    place = cuda_graph.Place(torch.device("cuda", 1))
    for _ in range(2):
        place.capture(list)
    assert len(set(gpu.captures)) == 1  # one stream, one pool
    assert gpu.captures[0][0] == torch.device("cuda", 1)


def overwritten(gpu: FakeGPU) -> int:
    """Signatures whose forward leaves something for its backward where another one writes."""
    kept, written = [], []
    for _ in range(3 * gpu.STREAMS):
        place, used = cuda_graph.Place(torch.device("cuda", 1)), []
        counted = [0]

        def body(saved: int, scratch: int, used: Any = used, counted: Any = counted) -> Any:
            counted[0] += 1
            return gpu.body(saved, scratch, used) if counted[0] % 3 == 0 else []  # no warm-up

        saved, _ = place.capture(lambda b=body: b(2, 5))
        place.capture(lambda b=body: b(1, 3))
        assert used[1] & used[0]  # they share what neither keeps
        assert not used[1] & set(saved)
        kept.append(set(saved))
        written.append(set().union(*used))
    others = [set().union(*written[:i], *written[i + 1 :]) for i in range(len(written))]
    return sum(bool(saved & other) for saved, other in zip(kept, others, strict=True))


def test_no_graph_writes_where_another_keeps_something(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when streams have come round: of as many signatures as one likes, a forward may be
    replayed between forward and backward of another."""
    assert not overwritten(FakeGPU(monkeypatch))


def test_one_that_did_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: 0)
    assert overwritten(gpu)


def test_another_stream_waits_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGPU(monkeypatch)
    place = cuda_graph.Place(torch.device("cuda", 1))
    first, second = gpu.current, gpu.stream("cuda:1", -2)
    place.take_turn()
    place.take_turn()
    assert first.waited == []
    gpu.current = second
    place.take_turn()
    assert second.waited == [first]


def test_calls_before_backwards(captures: list[int]) -> None:
    graphed, plain = modules()
    batches = [batch(seed) for seed in range(3)]
    losses = [call(graphed, b) for b in batches]
    for b, loss in reversed(list(zip(batches, losses, strict=True))):
        expected = call(plain, b)
        same([loss], [expected])
        for _ in range(2):  # twice, for retain_graph
            found = torch.autograd.grad(loss, leaves(graphed, b), retain_graph=True)
            same(found, torch.autograd.grad(expected, leaves(plain, b), retain_graph=True))
    sum(losses).backward()
    assert len(captures) == 1


def test_inputs_changed_in_place(captures: list[int]) -> None:
    graphed, plain = modules()
    b = batch(0)
    before = call(graphed, b)
    with torch.no_grad():
        b["pv"].mul_(-1)
        b["clicked"].logical_not_()
    after = call(graphed, b)
    same([after], [call(plain, b)])
    assert not torch.equal(before, after)


def test_what_makes_a_new_graph(captures: list[int]) -> None:
    graphed, plain = modules()
    b = batch(0)
    frozen = b | {"history": b["history"].detach()}
    cases: list[dict[str, Tensor]] = [b, batch(1, pages=7), batch(1, dim=24), frozen]
    cases.append({k: x for k, x in b.items() if k != "pv_mask"})
    cases.append(b | {"weights": torch.rand(6, 4, device=DEVICE)})
    for number, case in enumerate(cases, 1):
        for _ in range(2):
            loss, expected = call(graphed, case), call(plain, case)
            found = torch.autograd.grad(loss, leaves(graphed, case))
            same(found, torch.autograd.grad(expected, leaves(plain, case)))
        assert len(captures) == number
    with torch.no_grad():
        assert not call(graphed, b).requires_grad
    assert len(captures) == len(cases) + 1


def test_stats(captures: list[int]) -> None:
    graphed, plain = modules(return_stats=True)
    kept = []
    for seed in range(2):
        b = batch(seed)
        (loss, stats), (_, expected) = call(graphed, b), call(plain, b)
        loss.backward()
        kept.append((stats, expected))
    for stats, expected in kept:
        for name in ("item_loss", "log_sum_exp", "positive_similarity", "rank", "is_anchor"):
            same([getattr(stats, name)], [getattr(expected, name)])


def test_click_sequences(captures: list[int]) -> None:
    graphed, plain = (ClickSequenceLoss(impl=IMPL, cuda_graph=on) for on in (True, False))
    for seed in range(2):
        b = batch(seed)
        inputs = {"history": b["history"], "history_mask": b["history_mask"]}
        loss, expected = graphed(**inputs), plain(**inputs)
        same([loss], [expected])
        same(*(torch.autograd.grad(x, [b["history"]]) for x in (loss, expected)))
    assert len(captures) == 1


def test_few_graphs_are_kept_and_many_are_warned_of(captures: list[int]) -> None:
    graphed, _ = modules()
    limit = graphed._graphs.limit  # type: ignore[union-attr]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for pages in range(1, 2 * limit + 3):
            call(graphed, batch(0, pages=pages))
            call(graphed, batch(0, pages=1))  # in use: stays
    assert len(graphed._graphs) == limit  # type: ignore[arg-type]
    assert len(captures) == 2 * limit + 2
    assert len(caught) == 1
    assert "signatures" in str(caught[0].message)


def test_copies_start_without_graphs(captures: list[int]) -> None:
    graphed, _ = modules(learnable_temperature=True)
    b = batch(0)
    loss = call(graphed, b)
    file = io.BytesIO()
    pickle.dump(graphed, file)
    file.seek(0)
    for copied in (copy.deepcopy(graphed), pickle.load(file)):
        assert len(copied._graphs) == 0
        same([call(copied, b)], [loss])
    assert list(graphed.state_dict()) == ["log_inverse_temperature"]
    assert "cuda_graph=True" in repr(graphed)


def test_second_derivatives_are_refused(captures: list[int]) -> None:
    graphed, _ = modules()
    b = batch(0)
    (first,) = torch.autograd.grad(call(graphed, b) * 2, [b["pv"]], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        first.sum().backward()


def test_what_cannot_be_a_graph(captures: list[int]) -> None:
    b = batch(0)
    with pytest.raises(ValueError, match="cuda_graph and validate"):
        ReconstructionLoss(cuda_graph=True, validate=True)
    with pytest.raises(TypeError, match="cuda_graph: expected True or False, got"):
        ReconstructionLoss(cuda_graph=1)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="impl='reference' cannot be captured"):
        call(ReconstructionLoss(impl="reference", cuda_graph=True), b)
    assert not captures


@pytest.mark.skipif(GPU, reason="for machines without a GPU")
def test_without_a_gpu() -> None:
    with pytest.raises(
        RuntimeError, match="tensors are on cpu, expected a CUDA device; impl='cpu'"
    ):
        call(ReconstructionLoss(cuda_graph=True, impl="cpu"), batch(0))


@pytest.mark.skipif(not GPU, reason="needs a GPU: the real capture, and its synchronisations")
def test_a_replayed_step_never_waits_for_the_gpu(captures: list[int]) -> None:
    graphed, plain = modules()
    b = batch(0)
    call(graphed, b).backward()
    expected = torch.autograd.grad(call(plain, b), leaves(plain, b))
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = torch.autograd.grad(call(graphed, b), leaves(graphed, b))
    finally:
        torch.cuda.set_sync_debug_mode(before)
    same(found, expected)


@pytest.mark.skipif(not GPU, reason="needs a GPU: a graph around everything")
def test_inside_a_graph_of_somebody_else() -> None:
    graphed, plain = modules()
    b = batch(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            torch.autograd.grad(call(plain, b), leaves(plain, b))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = torch.autograd.grad(call(graphed, b), leaves(graphed, b))
    with torch.no_grad():
        b["pv"].mul_(-1)
    graph.replay()
    same(found, torch.autograd.grad(call(plain, b), leaves(plain, b)))
