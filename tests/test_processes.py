"""A loss over several processes: that of one process on the union of their batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from factories import Budget, skip_unless_available, yardstick_of
from process_problems import (
    Case,
    Shard,
    arguments,
    combined,
    expected,
    memory_of,
    run_shard,
    shards_of,
    union_of,
)
from spawn import spawn
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import courier_fast as cf
from courier_fast.testing.interpreter import make_fast

ATTENTIONS: dict[str, dict[str, Any]] = {
    "anchor": {"attention": "anchor"},
    "mean": {"attention": "anchor", "attention_scale": 0.0},
    "candidate": {"attention": "candidate"},
    "cosine": {"attention": "candidate", "cosine": True, "attention_scale": 5.0},
}


def case(options: str, **fields: Any) -> Case:
    """`options`: words, of ATTENTIONS, of flags, or name=value."""
    found: dict[str, Any] = {}
    for word in options.split():
        name, _, value = word.partition("=")
        if word in ATTENTIONS:
            found |= ATTENTIONS[word]
        elif value:
            found[name] = int(value) if value.isdigit() else value
        else:
            found[name] = True
    return Case(options=found, **fields)


# By what they are: (options, fields of the case). No ranks where rows tie: equal ones of a table
# with different ids, and reconstructions of a page by the mean.
DEFINITION: list[tuple[str, dict[str, Any]]] = [
    ("anchor", {}),
    ("anchor", {"layout": "padded"}),
    ("anchor direction=identify", {"exchange": "ring"}),
    ("anchor direction=both weights", {"layout": "padded", "exchange": "ring"}),
    ("anchor direction=both reduction=none ids", {}),
    ("anchor negatives=other_pages", {"exchange": "gather"}),
    ("anchor negatives=other_pages direction=identify ids", {"exchange": "ring"}),
    ("anchor negatives=page log_q reduction=sum", {}),
    ("anchor negatives=page ids weights", {}),
    ("anchor ids log_q weights", {"layout": "padded"}),
    ("anchor log_q reduction=sum workspace=2000", {"layout": "past"}),
    ("anchor projected num_heads=2", {"layout": "padded"}),
    ("mean", {"exchange": "ring"}),
    ("mean direction=identify weights", {"stats": False}),
    ("candidate", {}),
    ("candidate ids log_q", {"exchange": "ring"}),
    ("candidate projected", {"exchange": "ring"}),
    ("candidate projected num_heads=2 weights", {"layout": "padded"}),
    ("candidate negatives=other_pages reduction=none", {"exchange": "gather"}),
    ("candidate negatives=page ids", {}),
    ("cosine", {"layout": "padded", "exchange": "ring"}),
    ("cosine ids num_heads=3 reduction=sum", {"layout": "past"}),
    ("cosine log_q negatives=other_pages workspace=2000", {}),
    ("anchor table", {"layout": "past"}),
    ("anchor table direction=both", {"layout": "padded", "exchange": "ring"}),
    ("anchor table negatives=other_pages reduction=none", {}),
    ("anchor table ids", {"table_ids": False, "stats": False}),
    ("anchor table log_q weights", {"exchange": "ring"}),
    ("mean table", {}),
    ("candidate table", {"exchange": "ring"}),
    ("candidate table ids", {"table_ids": False, "stats": False}),
    ("cosine table negatives=other_pages", {"layout": "padded"}),
    ("cosine table log_q weights", {"exchange": "ring"}),
    ("anchor ids", {"memory": True}),
    ("anchor log_q weights", {"memory": True, "exchange": "ring"}),
    ("anchor table negatives=other_pages", {"memory": True}),
    ("candidate ids", {"memory": True, "layout": "padded"}),
    ("cosine table log_q", {"memory": True, "exchange": "ring"}),
    ("given", {}),
    ("given direction=both ids weights", {"layout": "padded", "exchange": "ring"}),
    ("given negatives=page log_q reduction=none", {"layout": "past"}),
    ("given table negatives=other_pages", {"exchange": "ring"}),
    ("given ids log_q", {"memory": True, "layout": "padded"}),
    ("", {"sequence": True}),
    ("", {"sequence": True, "layout": "padded", "exchange": "ring"}),
    ("ids", {"sequence": True, "layout": "past"}),
    ("ids reduction=none", {"sequence": True, "exchange": "ring"}),
    ("ids reduction=sum workspace=2000", {"sequence": True, "layout": "padded"}),
    ("table", {"sequence": True, "exchange": "ring"}),
    ("table ids", {"sequence": True, "table_ids": False}),
]
# As on a GPU, where nobody asks for values.
STATIC = [(options, more | {"static": True}) for options, more in DEFINITION]
# In Triton's interpreter.
TRITON: list[tuple[str, dict[str, Any]]] = [
    ("anchor direction=both ids log_q", {}),
    ("anchor table negatives=other_pages", {"exchange": "ring", "static": True}),
    ("anchor weights dim=17", {"layout": "padded", "memory": True}),
    ("cosine ids", {"exchange": "ring", "static": True}),
    ("candidate table log_q", {"memory": True}),
    ("candidate projected num_heads=2", {"static": True}),
    ("given direction=both ids", {"static": True}),
    ("ids", {"sequence": True, "exchange": "ring", "static": True}),
    ("table", {"sequence": True}),
]


def numbered(
    listed: list[tuple[str, dict[str, Any]]], first: int = 0, **fields: Any
) -> list[tuple[Case, int]]:
    """With a seed for each."""
    return [
        (case(options, **(more | fields)), i) for i, (options, more) in enumerate(listed, first)
    ]


def run_cases(cases: list[tuple[Case, int]], times: int = 1) -> list[list[dict[str, Tensor]]]:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    if any(c.impl == "triton" for c, _ in cases):
        make_fast()
    return [[run_shard(c, seed, group, rank, size) for c, seed in cases] for _ in range(times)]


def whole_of(c: Case, seed: int, size: int) -> Any:
    return union_of(shards_of(c, size, seed), memory_of(c, seed))


def differences(found: dict[str, Tensor], truth: dict[str, Tensor]) -> list[str]:
    """What is off by more than 1e-12 of its length; a temperature's gradient, a difference of sums,
    of the loss's."""
    wrong = []
    for name, x in truth.items():
        y = found[name]
        if not x.is_floating_point():
            if not torch.equal(x, y):
                wrong.append(f"{name} differs")
            continue
        off, size = float((x - y).norm()), float(x.norm())
        if "temperature" in name:
            size = max(size, float(truth["output"].norm()))
        if not off <= 1e-12 * size + 1e-15:
            wrong.append(f"{name}: off by {off:.3g}, size {size:.3g}")
    return wrong


def same_bits(x: dict[str, Tensor], y: dict[str, Tensor]) -> bool:
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x)


def check_exact(
    cases: list[tuple[Case, int]], every: list[list[dict[str, Tensor]]], size: int
) -> None:
    wrong = []
    for i, (c, seed) in enumerate(cases):
        whole = combined(c, [found[i] for found in every])
        truth = expected(c, whole_of(c, seed, size), whole)
        wrong += [f"{c}, {seed}: {x}" for x in differences(whole, truth)]
    assert not wrong, "\n".join(wrong)


def check_budget(
    cases: list[tuple[Case, int]], every: list[list[dict[str, Tensor]]], size: int
) -> None:
    """Cases that differ in the seed alone are judged together."""
    budgets: dict[str, Budget] = {}
    wrong = []
    for i, (c, seed) in enumerate(cases):
        whole = combined(c, [found[i] for found in every])
        union = whole_of(c, seed, size)

        def run(p: Any, c: Case = c, whole: dict[str, Tensor] = whole) -> dict[str, Tensor]:
            return expected(c, p, whole)

        truth = yardstick_of(run, union, c.inputs, seed)
        for name, x in truth.exact.items():
            exactly = not x.is_floating_point() and c.dtype == torch.float32
            if exactly and not torch.equal(x, whole[name]):
                wrong.append(f"{c}, {seed}: {name} differs")
        for results in (truth.exact, truth.eager, *truth.rounded):
            for name in [n for n, x in results.items() if not x.is_floating_point()]:
                del results[name]  # type: ignore[attr-defined]
        budgets.setdefault(repr(c), Budget(c.dtype)).add(truth, whole)
    for name, budget in budgets.items():
        wrong += [f"{name}: {e}" for e in budget.errors() if not e.passes]
    assert not wrong, "\n".join(wrong)


# ---- the loss of the union -----------------------------------------------------------------------


@pytest.mark.long("several processes", short=(2,))
@pytest.mark.parametrize("size", [2, 3, 4])
def test_definition_is_exact(size: int, tmp_path: Path) -> None:
    cases = numbered(DEFINITION) + numbered(STATIC, 100)
    every = spawn(run_cases, size, tmp_path, cases)
    check_exact(cases, [found[0] for found in every], size)


@pytest.mark.long("several processes")
def test_padding_without_a_page_asks_for_none(tmp_path: Path) -> None:
    """The click sequence of a process that had padding alone looked its page up among none."""
    cases = []
    for options, more in (("anchor ids", {}), ("cosine", {}), ("ids", {"sequence": True})):
        c = case(options, layout="past", static=True, **more)
        cases.append((c, next(i for i in range(99) if has_no_pages(shards_of(c, 2, i)))))
    every = spawn(run_cases, 2, tmp_path, cases)
    check_exact(cases, [found[0] for found in every], 2)


def has_no_pages(shards: list[Shard]) -> bool:
    return any(len(s.problem.history_offsets) == 1 for s in shards)


@pytest.mark.long("several processes")
@pytest.mark.parametrize(
    ("size", "dtype", "every"),
    [(2, torch.float32, 1), (3, torch.bfloat16, 2), (4, torch.float32, 3)],
    ids=str,
)
def test_cpu(size: int, dtype: torch.dtype, every: int, tmp_path: Path) -> None:
    listed = DEFINITION[::every]
    cases = [x for first in (0, 100, 200) for x in numbered(listed, first, impl="cpu", dtype=dtype)]
    skip_unless_available("cpu", whole_of(*cases[0], size))
    found = spawn(run_cases, size, tmp_path, cases, 2)
    check_budget(cases, [first for first, _ in found], size)
    for first, again in found:
        for i, (c, seed) in enumerate(cases):
            assert same_bits(first[i], again[i]), f"{c}, {seed}: other bits in a second run"


@pytest.mark.long("several processes")
def test_triton(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    size = 2
    cases = numbered(TRITON, impl="triton", dtype=torch.float32)
    every = spawn(run_cases, size, tmp_path, cases)
    check_budget(cases, [found[0] for found in every], size)


def in_pairs(cases: list[tuple[Case, int]]) -> list[dict[str, Tensor]]:
    """Processes 0 and 2 are one group, 1 and 3 another, at the same time with other batches."""
    groups = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    rank = dist.get_rank()
    own = groups[rank % 2]
    return [run_shard(c, seed + 50 * (rank % 2), own, rank // 2, 2) for c, seed in cases]


@pytest.mark.long("several processes")
def test_groups_of_some_processes(tmp_path: Path) -> None:
    cases = numbered(DEFINITION[::4])
    found = spawn(in_pairs, 4, tmp_path, cases)
    check_exact(cases, [found[0], found[2]], 2)
    check_exact([(c, seed + 50) for c, seed in cases], [found[1], found[3]], 2)


# ---- one process ---------------------------------------------------------------------------------


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Any]:
    """A group of this process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/r", rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_a_group_of_one_has_the_bits_of_none(impl: str, alone: Any) -> None:
    dtype = torch.float64 if impl == "reference" else torch.float32
    for c, seed in numbered(DEFINITION, impl=impl, dtype=dtype):
        found = run_shard(c, seed, alone, 0, 1)
        assert same_bits(found, run_shard(c, seed, None, 0, 1)), c


MEMORY = [(options, more) for options, more in DEFINITION if more.get("memory")] + [
    ("anchor", {"memory": True, "layout": "padded"}),
    ("mean weights reduction=none", {"memory": True}),
    ("candidate table negatives=other_pages", {"memory": True}),
    ("cosine num_heads=2 reduction=sum", {"memory": True, "layout": "past"}),
]


def test_memory_is_one_more_page() -> None:
    cases = numbered(MEMORY) + numbered(MEMORY, 100, static=True)
    check_exact(cases, [[run_shard(c, seed, None, 0, 1) for c, seed in cases]], 1)


@pytest.mark.long("memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_memory_on_the_cpu(dtype: torch.dtype) -> None:
    cases = [x for first in (0, 100, 200) for x in numbered(MEMORY, first, impl="cpu", dtype=dtype)]
    skip_unless_available("cpu", whole_of(*cases[0], 1))
    check_budget(cases, [[run_shard(c, seed, None, 0, 1) for c, seed in cases]], 1)


# ---- DistributedDataParallel ---------------------------------------------------------------------


class Model(nn.Module):
    """An encoder and both losses, with one temperature each: learned in float64, and that of the
    module."""

    def __init__(self, group: Any, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).double()
        self.log_tau = nn.Parameter(torch.tensor(-2.0, dtype=torch.float64))
        self.reconstruction = cf.ReconstructionLoss(
            learnable_temperature=True, group=group, **options
        )
        self.group = group

    def forward(self, given: dict[str, Any]) -> Tensor:
        given = {n: x for n, x in given.items() if n not in ("temperature", "workspace")}
        rows = [given.pop(n) for n in ("pv", "history", "clicked")]
        name = "embeddings" if "embeddings" in given else None
        if name:
            given[name] = self.encoder(given[name])
        else:
            rows[:2] = (self.encoder(x) for x in rows[:2])
        sequence = {n: given[n] for n in ("embeddings", "table_ids") if n in given}
        for n in ("history_mask", "history_offsets"):
            if n in given:
                sequence[n] = given[n]
        pulled = cf.click_sequence_loss(
            rows[1], temperature=self.log_tau.exp(), group=self.group, **sequence
        )
        return self.reconstruction(*rows, **given) + 0.3 * pulled


DDP_CASES = ["anchor", "anchor direction=both ids", "candidate table", "cosine weights log_q"]


def trained(model: nn.Module, shards: Callable[[int], Shard], steps: int = 3) -> list[Any]:
    """Loss and gradients of each step."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found = []
    for step in range(steps):
        given, _, _ = arguments(shards(step), "packed")
        loss = model({n: x for n, x in given.items() if x is not None})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gradients = {n.removeprefix("module."): x.grad.clone() for n, x in model.named_parameters()}
        found.append((loss.detach(), gradients))
    return found


def ddp_model(group: Any) -> nn.Module:
    torch.manual_seed(0)
    return Model(group)


def in_ddp(cases: list[Case]) -> list[Any]:
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    found = []
    for c in cases:
        # Buckets of a parameter each: their reductions begin between the exchanges of the two
        # losses.
        model = DistributedDataParallel(ddp_model(group), bucket_cap_mb=1e-6)
        found.append(trained(model, lambda step, c=c: shards_of(c, size, step)[rank]))  # type: ignore[misc]
    return found


@pytest.mark.long("several processes", short=(2,))
@pytest.mark.parametrize("size", [2, 3])
def test_ddp_trains_as_one_process(size: int, tmp_path: Path) -> None:
    cases = [case(options) for options in DDP_CASES]
    every = spawn(in_ddp, size, tmp_path, cases)
    for i, c in enumerate(cases):

        def union(step: int, c: Case = c) -> Shard:
            shards = shards_of(c, size, step)
            whole = union_of(shards, None)
            if shards[0].table_ids is None:
                return Shard(whole, None)
            ids = torch.cat([s.table_ids for s in shards if s.table_ids is not None])
            return Shard(replace(whole, item_ids=None), ids)

        truth = trained(ddp_model(None), union)
        for step, (loss, gradients) in enumerate(truth):
            losses = [found[i][step][0] for found in every]
            torch.testing.assert_close(torch.stack(losses).mean(), loss, rtol=1e-6, atol=0)
            for name, x in gradients.items():
                for found in every:
                    y = found[i][step][1][name]
                    assert torch.equal(y, every[0][i][step][1][name])
                    exact = "reconstruction" not in name
                    assert (x - y).norm() <= (1e-12 if exact else 1e-6) * x.norm(), (c, step, name)


def encoder() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).double()


def loss_of_rows(rows: Tensor, given: dict[str, Tensor], group: Any) -> Tensor:
    pv, history = rows.split([len(given["clicked"]), len(rows) - len(given["clicked"])])
    names = ("clicked", "pv_offsets", "history_offsets", "item_ids")
    return cf.reconstruction_loss(pv, history, group=group, **{n: given[n] for n in names})


def with_gradient_cache(c: Case, rows_at_a_time: int) -> dict[str, Tensor]:
    """The loss once, on the embeddings of all rows; then the encoder again in slices, the last of
    which synchronises."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    given, _, _ = arguments(shards_of(c, size, 0)[rank], "packed")
    inputs = torch.cat([given["pv"], given["history"]]).detach()
    model = DistributedDataParallel(encoder())
    with torch.no_grad():
        rows = model(inputs)
    rows.requires_grad_()
    loss_of_rows(rows, given, group).backward()
    assert rows.grad is not None
    slices = list(zip(inputs.split(rows_at_a_time), rows.grad.split(rows_at_a_time), strict=True))
    with model.no_sync():
        for x, gradient in slices[:-1]:
            model(x).backward(gradient)
    x, gradient = slices[-1]
    model(x).backward(gradient)
    return {n: p.grad for n, p in model.module.named_parameters() if p.grad is not None}


@pytest.mark.long("several processes")
def test_gradient_cache(tmp_path: Path) -> None:
    c, size = case("candidate ids"), 3
    found = spawn(with_gradient_cache, size, tmp_path, c, 7)
    given, _, _ = arguments(Shard(union_of(shards_of(c, size, 0), None), None), "packed")
    model = encoder()
    loss_of_rows(model(torch.cat([given["pv"], given["history"]]).detach()), given, None).backward()
    for name, p in model.named_parameters():
        for mine in found:
            assert p.grad is not None
            assert (mine[name] - p.grad).norm() <= 1e-12 * p.grad.norm(), name


def in_fsdp(c: Case) -> dict[str, Tensor]:
    """The encoder in FSDP, the loss with its temperature in DDP."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    given, _, _ = arguments(shards_of(c, size, 0)[rank], "packed")
    model = encoder()
    fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
    loss = cf.ReconstructionLoss(learnable_temperature=True, group=group)
    return step_of(model, DistributedDataParallel(loss), given)


def step_of(model: nn.Module, loss: nn.Module, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """Gradients by name."""
    rows = model(torch.cat([given["pv"], given["history"]]).detach())
    pv, history = rows.split([len(given["pv"]), len(given["history"])])
    names = ("clicked", "pv_offsets", "history_offsets", "item_ids")
    loss(pv, history, **{n: given[n] for n in names}).backward()
    found = {}
    for name, p in (*model.named_parameters(), *loss.named_parameters()):
        assert p.grad is not None
        grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        found[name.removeprefix("module.")] = grad
    return found


@pytest.mark.long("several processes")
def test_fsdp_and_a_loss_that_is_wrapped(tmp_path: Path) -> None:
    c, size = case("candidate ids"), 3
    every = spawn(in_fsdp, size, tmp_path, c)
    given, _, _ = arguments(Shard(union_of(shards_of(c, size, 0), None), None), "packed")
    truth = step_of(encoder(), cf.ReconstructionLoss(learnable_temperature=True), given)
    for found in every:
        for name, x in truth.items():
            eps = 1e-12 if x.dtype == torch.float64 else 1e-6
            assert (found[name] - x).norm() <= eps * x.norm(), name
