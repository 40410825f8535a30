"""The losses are the same whatever is around them, and live in models that are copied, saved,
averaged and sharded."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from factories import DEVICES, make, skip_unless_available
from spawn import spawn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim.swa_utils import AveragedModel

import courier_fast as cf
from courier_fast.loss.layouts import describe, shown
from courier_fast.loss.union import exchange

DIM = 16


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def rows(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "pv": torch.randn(4, 3, DIM, generator=g).to(dtype),
        "history": torch.randn(4, 5, DIM, generator=g).to(dtype),
        "clicked": torch.rand(4, 3, generator=g) < 0.6,
    }


def inputs(impl: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Made where nothing is around."""
    old = torch.randn(3, DIM, generator=torch.Generator().manual_seed(1)).to(dtype)
    given = rows(0, dtype) | {
        "tau": torch.tensor(0.2, dtype=torch.float32),
        "ids": torch.arange(12).view(4, 3),
        "memory": old,
        "memory_ids": torch.arange(3) + 20,
    }
    return {k: x.to(DEVICES.get(impl, "cpu")) for k, x in given.items()}


def everything(impl: str, given: dict[str, Tensor]) -> list[Tensor]:
    """What the public functions give, and their gradients."""
    pv, history, tau = (
        given[k].detach().clone().requires_grad_() for k in ("pv", "history", "tau")
    )
    memory = {k: given[k] for k in ("memory", "memory_ids")}
    ids = given["ids"]
    found: list[Tensor] = []
    for options in (
        {},
        {"num_heads": 2, "return_stats": True},
        {"attention": "anchor", "attention_temperature": 0.5, "direction": "both"},
        {"attention": "mean", "reduction": "none"},
        {"item_ids": ids, **memory, "return_stats": True},
        {"item_ids": ids, **memory, "attention": "anchor", "log_q": None},
    ):
        loss = cf.reconstruction_loss(
            pv, history, given["clicked"], temperature=tau, impl=impl, **options
        )
        if options.get("return_stats"):
            loss, stats = loss
            found += [stats.log_sum_exp, stats.rank, stats.recall_at(1), stats.mrr()]
        found.append(loss)
    found.append(cf.click_sequence_loss(history, temperature=tau, impl=impl))
    found += cf.reconstruct(pv, history, impl=impl, return_weights=True)
    total = sum(x.float().sum() for x in found if x.requires_grad)
    total.backward()
    return [x.detach() for x in (*found, pv.grad, history.grad, tau.grad)]


AROUND: dict[str, Callable[[], Any]] = {
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "meta": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
    "no autocast": lambda: torch.autocast("cpu", enabled=False),
}


@pytest.mark.parametrize("impl", ["reference", "cpu"])
def test_the_same_whatever_is_around(impl: str) -> None:
    skip_unless_available("cpu", make(0))
    for dtype in (torch.float32, torch.bfloat16):
        given = inputs(impl, dtype)
        expected = everything(impl, given)
        for name, around in AROUND.items():
            with warnings.catch_warnings(), around():
                warnings.simplefilter("ignore")
                found = everything(impl, given)
            for number, (a, b) in enumerate(zip(found, expected, strict=True)):
                assert a.dtype == b.dtype, (name, dtype, number)
                assert torch.equal(a, b), (name, dtype, number)


@pytest.mark.long("kernels case by case", short=("meta",))
@pytest.mark.numpy_products
@pytest.mark.parametrize("name", ["float64", "meta"])
def test_the_same_on_triton(name: str) -> None:
    skip_unless_available("triton", make(0, impl="triton"))
    given = inputs("triton", torch.float32)
    expected = everything("triton", given)
    with AROUND[name]():
        found = everything("triton", given)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("impl", ["reference", "cpu", "auto"])
def test_autocast_is_a_cast_of_the_rows(impl: str, dtype: torch.dtype) -> None:
    """Of pv, history, query, key, value, memory and the table; log_q and weights stay, and so does
    what is computed inside."""
    skip_unless_available("cpu", make(0))
    if impl == "cpu" and dtype == torch.float16:
        impl = "auto"  # there is no float16 in it: the reference takes it
    given = rows()
    g = torch.Generator().manual_seed(2)
    projected = {
        name: torch.randn(4, n, DIM, generator=g)
        for name, n in (("query", 3), ("key", 5), ("value", 5))
    }
    item = torch.arange(12).view(4, 3)
    beside = {
        "item_ids": item,
        "log_q": torch.randn(4, 3, generator=g),
        "weights": torch.rand(4, 3, generator=g),
    }
    memory = {
        "memory": torch.randn(5, DIM, generator=g),
        "memory_ids": torch.arange(5) + 50,
        "memory_log_q": torch.zeros(5),
    }
    table = {
        "embeddings": torch.randn(20, DIM, generator=g),
        "pv": item,
        "history": torch.arange(20).view(4, 5),
    }
    for extra in ({}, projected, beside, beside | memory, table, {"num_heads": 4}):
        for attention in ("candidate", "anchor"):
            call = given | extra | {"attention": attention}
            cast = {
                k: x.to(dtype)
                if isinstance(x, Tensor) and k in EMBEDDINGS and x.is_floating_point()
                else x
                for k, x in call.items()
            }
            with torch.autocast("cpu", dtype=dtype):
                found = cf.reconstruction_loss(**call, impl=impl)
            assert torch.equal(found, cf.reconstruction_loss(**cast, impl=impl)), (attention, extra)
    double = rows(0, torch.float64)
    with torch.autocast("cpu", dtype=dtype):
        found = cf.reconstruction_loss(**double)
    assert torch.equal(found, cf.reconstruction_loss(**double))


EMBEDDINGS = ("pv", "history", "query", "key", "value", "memory", "embeddings")


@pytest.mark.parametrize("impl", ["auto", "cpu", "reference"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_fake_and_meta_tensors_give_fake_results(impl: str, reduction: str) -> None:
    skip_unless_available("cpu", make(0))
    old = {"memory": torch.randn(3, DIM), "memory_ids": torch.arange(3)}
    ids = {"item_ids": torch.arange(12).view(4, 3)}

    def results(convert: Callable[[Tensor], Tensor], impl: str) -> list[Tensor]:
        given = {k: convert(x) for k, x in rows().items()}
        more = {k: convert(x) for k, x in (old | ids).items()}
        leaf = given["pv"].requires_grad_()
        options = {"reduction": reduction, "impl": impl}
        found = [
            cf.reconstruction_loss(**given, **options),
            *(
                x.num_anchors if hasattr(x, "rank") else x
                for x in cf.reconstruction_loss(**given, **options, return_stats=True)
            ),
            cf.reconstruction_loss(**given, **more, **options),
            cf.click_sequence_loss(given["history"], **options),
            cf.reconstruct(given["pv"], given["history"], impl=impl),
        ]
        sum(x.sum() for x in found[:1]).backward()
        return [*found, leaf.grad]

    expected = results(torch.clone, impl)
    with FakeTensorMode() as mode:
        fake = results(mode.from_tensor, impl)
    kinds = [fake]
    if impl != "cpu":
        kinds.append(results(lambda x: x.to("meta"), impl))
    for found in kinds:
        assert [(x.shape, x.dtype) for x in found] == [(x.shape, x.dtype) for x in expected]


def test_inference_mode_and_mixed_gradients() -> None:
    given = rows()
    with torch.inference_mode():
        inside = cf.reconstruction_loss(**{k: x.clone() for k, x in given.items()})
    assert torch.equal(inside, cf.reconstruction_loss(**given))
    whole = [given["pv"].clone().requires_grad_(), given["history"].clone().requires_grad_()]
    cf.reconstruction_loss(*whole, given["clicked"]).backward()
    for name, full in zip(("pv", "history"), whole, strict=True):
        alone = given[name].clone().requires_grad_()
        cf.reconstruction_loss(**(given | {name: alone})).backward()
        torch.testing.assert_close(alone.grad, full.grad)


# ---- modules -------------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, DIM)
        self.loss = cf.ReconstructionLoss(learnable_temperature=True, **options)
        self.sequence = cf.ClickSequenceLoss(learnable_temperature=True)
        self.memory = cf.EmbeddingMemory(8, DIM)

    def forward(self, x: Tensor, past: Tensor, clicked: Tensor, ids: Tensor) -> Tensor:
        pv, history = self.encoder(x), self.encoder(past)
        kept, kept_ids, _ = self.memory.read()
        loss = self.loss(pv, history, clicked, item_ids=ids, memory=kept, memory_ids=kept_ids)
        self.memory.push(pv.flatten(0, 1), ids.flatten())
        return loss + self.sequence(history)


def step_inputs(dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x, past = (torch.randn(3, n, 4, generator=g, dtype=torch.float32).to(dtype) for n in (3, 4))
    ids = torch.arange(9).view(3, 3) + 9 * seed
    return x, past, torch.ones(3, 3, dtype=torch.bool), ids


def test_bf16_true_trains_on_a_cpu() -> None:
    """As Lightning's precision "bf16-true": bfloat16 is the default while a model is made and while
    it trains, and the module is converted."""
    with default_dtype(torch.bfloat16):
        torch.manual_seed(0)
        model = Model()
        assert model.loss.log_inverse_temperature.dtype == torch.float32
        assert model.memory.log_q.dtype == torch.float32
        model.to(torch.bfloat16)
        assert model.memory.rows.dtype == torch.bfloat16
        assert model.memory.log_q.dtype == torch.float32
        assert model.memory.ids.dtype == torch.int64
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        losses = []
        for number in range(12):
            optimizer.zero_grad()
            loss = model(*step_inputs(torch.bfloat16, number % 2))
            assert loss.dtype == torch.float32
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    assert all(x == x for x in losses)
    assert losses[-1] < losses[1]
    assert model.loss.log_inverse_temperature.grad.any()


def test_a_double_module_is_exact() -> None:
    module = cf.ReconstructionLoss(0.07, learnable_temperature=True).double()
    assert module.temperature.dtype == torch.float64
    assert module.temperature.shape == ()
    given = {k: x[:2] for k, x in rows(0, torch.float64).items()}

    def loss(parameter: Tensor) -> Tensor:
        weights = {"log_inverse_temperature": parameter}
        return torch.func.functional_call(module, weights, kwargs=given, args=())

    leaf = module.log_inverse_temperature.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(loss, (leaf,))
    assert cf.ReconstructionLoss(0.07, True).half().temperature.dtype == torch.float32


def test_a_model_is_built_on_meta_and_initialised() -> None:
    with torch.device("meta"):
        model = Model()
    assert "learnable_temperature=True" in repr(model)
    model.to_empty(device="cpu")
    for x in (*model.parameters(), *model.buffers()):
        nn.init.constant_(x, 77)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    assert float(model.loss.temperature.detach()) == pytest.approx(0.1)
    assert len(model.memory) == 0
    assert not any(x.any() for x in model.memory.buffers())
    assert model(*step_inputs()).isfinite()


def test_old_state_dicts_load() -> None:
    """The parameter had no dimension once."""
    old = {"log_inverse_temperature": torch.tensor(1.5)}
    for strict, assign in ((True, False), (False, False), (True, True)):
        module = cf.ReconstructionLoss(learnable_temperature=True)
        module.load_state_dict(dict(old), strict=strict, assign=assign)
        assert module.log_inverse_temperature.shape == (1,)
        assert float(module.log_inverse_temperature.detach()) == 1.5
    model = Model()
    state = model.state_dict()
    for name in ("loss", "sequence"):
        state[f"{name}.log_inverse_temperature"] = torch.tensor(1.25)
    model.load_state_dict(state)
    assert float(model.sequence.log_inverse_temperature.detach()) == 1.25


def test_a_temperature_of_one_number() -> None:
    given = rows()
    expected = cf.reconstruction_loss(**given, temperature=0.2)
    tau = torch.tensor([0.2], requires_grad=True)
    found = cf.reconstruction_loss(**given, temperature=tau)
    found.backward()
    torch.testing.assert_close(found.detach(), expected)
    assert tau.grad.shape == (1,)
    with pytest.raises(ValueError, match="temperature: expected a float or a 0-d"):
        cf.reconstruction_loss(**given, temperature=torch.tensor([[0.2]]))


def test_world_without_processes_is_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    given = rows()
    module = cf.ReconstructionLoss(group="world")
    assert "group='world'" in repr(module)
    assert torch.equal(module(**given), cf.ReconstructionLoss()(**given))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert "group='world'" in repr(other)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match='init_process_group before a call with "world"'):
        module(**given)
    with pytest.raises(TypeError, match="group: expected a torch.distributed ProcessGroup"):
        cf.ReconstructionLoss(group="everyone")


def test_none_before_the_processes_is_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.distributed.group.WORLD is None until init_process_group."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cf.ReconstructionLoss()  # left out
        module = cf.ReconstructionLoss(group=None)  # one process, for all that is known
        assert "group" not in repr(module)
        module(**rows())
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cf.ReconstructionLoss()
    with pytest.warns(UserWarning, match='group: got None before .* Give group="world"'):
        cf.ClickSequenceLoss(group=None)


def travelling() -> dict[str, Any]:
    """In each of two processes: what a model does that holds a group."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    rank, found = dist.get_rank(), {}
    given = rows(rank)
    expected = cf.reconstruction_loss(**given, group=dist.group.WORLD)
    late = cf.ReconstructionLoss(group="world")
    assert torch.equal(late(**given), expected)
    module = cf.ReconstructionLoss(group=dist.group.WORLD)
    holder = nn.ModuleDict({"loss": module, "net": nn.Linear(2, 2)})
    file = io.BytesIO()
    torch.save(holder, file)
    file.seek(0)
    copies = [
        copy.deepcopy(holder),
        AveragedModel(holder).module,
        torch.load(file, weights_only=False),
    ]
    for other in copies:
        assert torch.equal(other["loss"](**given), expected)
    part = dist.new_group([rank], use_local_synchronization=True)
    some = pickle.loads(pickle.dumps(cf.ReconstructionLoss(group=part)))
    try:
        some(**given)
    except ValueError as error:
        found["lost"] = str(error)
    assert torch.equal(some(**given, group="world"), expected)
    assert torch.equal(
        copy.deepcopy(cf.ReconstructionLoss(group=part))(**given), cf.reconstruction_loss(**given)
    )
    memory = cf.EmbeddingMemory(8, DIM)
    memory.push(given["pv"].flatten(0, 1)[:2], torch.arange(2) + 10 * rank, group="world")
    found["memory"] = memory.read()[1].tolist()

    early = cf.ReconstructionLoss(group=None)
    early._may_be_early = True  # as if it had been made before init_process_group
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        early(**given)
        early(**given)
    found["said"] = [str(w.message) for w in said]

    torch.manual_seed(0)
    plain = Model(group="world")
    twin, sharded = copy.deepcopy(plain), copy.deepcopy(plain)
    del sharded.memory, twin.memory, plain.memory
    for model in (plain, twin, sharded):
        model.memory = nn.Module()
        model.memory.read = lambda: (torch.zeros(0, DIM), torch.zeros(0, dtype=torch.int64), None)
        model.memory.push = lambda *_: None
    fully_shard(sharded, mesh=init_device_mesh("cpu", (2,)))
    found["repr"] = repr(sharded.loss)
    ddp = DistributedDataParallel(twin)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (sharded, ddp)]
    for _ in range(2):
        for model, optimizer in zip((sharded, ddp), optimizers, strict=True):
            optimizer.zero_grad()
            model(*step_inputs(seed=rank)).backward()
            optimizer.step()
    state = {k: x.full_tensor() for k, x in sharded.state_dict().items()}
    found["apart"] = max(float((x - state[k]).abs().max()) for k, x in twin.state_dict().items())
    found["moved"] = float(
        (state["loss.log_inverse_temperature"] - plain.loss.log_inverse_temperature).detach().abs()
    )
    return found


@pytest.mark.long("several processes")
def test_a_model_with_a_group_travels_and_is_sharded(tmp_path: Path) -> None:
    for found in spawn(travelling, 2, tmp_path):
        assert "group: expected a process group, got a copy from a file" in found["lost"]
        assert found["memory"] == [0, 1, 10, 11]
        assert len(found["said"]) == 1
        assert 'Give group="world"' in found["said"][0]
        assert found["apart"] < 1e-5
        assert found["moved"] > 0
        assert "learnable_temperature=True" in found["repr"]


def test_a_group_of_another_time_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """After destroy_process_group the next group has the same name."""
    made = []

    class Gpu:
        group_name, _device_types = "0", ("cuda",)

    monkeypatch.setattr(exchange, "_cpu_groups", {})
    monkeypatch.setattr(exchange.dist, "get_process_group_ranks", lambda group: [0])
    monkeypatch.setattr(exchange.dist, "new_group", lambda *a, **k: made.append(1) or len(made))
    first, second = Gpu(), Gpu()
    assert [exchange._cpu_group(g) for g in (first, first, second)] == [1, 1, 2]


# ---- nested results ------------------------------------------------------------------------------


def nested(counts: list[int], *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    parts = [torch.ones(n, *shape, dtype=dtype) for n in counts]
    return torch.nested.nested_tensor(parts, layout=torch.jagged)


def test_nested_results_go_with_clicked() -> None:
    counts, past = [3, 1, 5], [2, 4, 1]
    pv, history = nested(counts, 8), nested(past, 8)
    clicked = nested(counts, dtype=torch.bool)
    loss, stats = cf.reconstruction_loss(pv, history, clicked, reduction="none", return_stats=True)
    for x in (loss, stats.item_loss, stats.rank, stats.is_anchor):
        assert x.shape == clicked.shape
        assert (x * clicked).to_padded_tensor(0).shape == clicked.to_padded_tensor(False).shape
    r = cf.reconstruct(pv, history)
    assert r.shape == pv.shape
    assert (r + pv).to_padded_tensor(0.0).shape == (3, 5, 8)
    sequence = cf.click_sequence_loss(history, reduction="none")
    assert sequence.to_padded_tensor(0.0).shape == (3, 4)
    leaf = pv.detach().requires_grad_()
    found = cf.reconstruction_loss(leaf, history, clicked, reduction="none")
    (found * clicked).values().sum().backward()
    assert leaf.grad.shape == leaf.shape


def test_nested_with_holes_keep_their_lengths() -> None:
    base = torch.ones(3, 6, 8)
    starts, lengths = torch.tensor([0, 1, 2]), torch.tensor([3, 2, 4])
    pv = torch.nested.narrow(base, 1, starts, lengths, layout=torch.jagged)
    clicked = torch.nested.narrow(torch.ones(3, 6) > 0, 1, starts, lengths, layout=torch.jagged)
    loss = cf.reconstruction_loss(pv, pv, clicked, reduction="none")
    assert loss.shape == clicked.shape
    assert torch.equal(loss.lengths(), clicked.lengths())


# ---- messages ------------------------------------------------------------------------------------


def test_messages_hold_no_data() -> None:
    numpy = torch.randn(1000, 3).numpy()
    for x in (
        list(range(10**5)),
        numpy,
        "x" * 10**5,
        b"x" * 10**5,
        10**6000,
        {1: numpy},
        (numpy,),
        object(),
    ):
        assert len(shown(x)) < 120, type(x)
        assert len(describe(x)) < 120, type(x)
    assert shown("all") == "'all'"
    assert shown(3) == "3"
    assert describe(None) == "None"
    assert describe([1.0]) == "list of length 1"
    assert describe(numpy) == "ndarray of shape [1000, 3]"
