"""Bad input gets an error that names the argument, what was expected and what came."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import courier_fast as cf
from courier_fast import surroundings
from courier_fast.loss import functional, operators
from courier_fast.loss.arguments import check_temperature

PADDED = {
    "pv": torch.randn(3, 4, 8),
    "history": torch.randn(3, 5, 8),
    "clicked": torch.ones(3, 4, dtype=torch.bool),
}
PACKED = {
    "pv": torch.randn(6, 8),
    "history": torch.randn(5, 8),
    "clicked": torch.ones(6, dtype=torch.bool),
    "pv_offsets": torch.tensor([0, 2, 6]),
    "history_offsets": torch.tensor([0, 5, 5]),
}
ITEMS = {
    "pv": torch.tensor([[0, 1], [2, 3]]),
    "history": torch.tensor([[4, 4], [1, 0]]),
    "clicked": torch.ones(2, 2, dtype=torch.bool),
    "embeddings": torch.randn(5, 8),
}

BAD: list[tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = [
    (PADDED, {"pv": [1.0]}, TypeError, "pv: expected a torch.Tensor, got list"),
    (
        PADDED,
        {"pv": torch.ones(3, 4, 8, dtype=torch.int64)},
        TypeError,
        "pv: expected a floating tensor",
    ),
    (PADDED, {"pv": torch.randn(3, 4)}, ValueError, r"pv: expected padded shape .* got \[3, 4\]"),
    (
        PADDED,
        {"history": torch.randn(2, 5, 8)},
        ValueError,
        "history: expected 3 pages, as in pv, got 2",
    ),
    (
        PADDED,
        {"history": torch.randn(3, 5, 7)},
        ValueError,
        r"history: expected shape \[3, 5, 8\], got \[3, 5, 7\]",
    ),
    (
        PADDED,
        {"history": torch.randn(3, 5, 8, dtype=torch.float64)},
        TypeError,
        "history: expected torch.float32",
    ),
    (PADDED, {"clicked": torch.rand(3, 4)}, TypeError, "clicked: expected a bool or integer"),
    (
        PADDED,
        {"clicked": torch.ones(3, 5, dtype=torch.bool)},
        ValueError,
        r"clicked: expected shape \[3, 4\], got \[3, 5\]",
    ),
    (
        PADDED,
        {"pv_mask": torch.ones(3, 3, dtype=torch.bool)},
        ValueError,
        r"pv_mask: expected shape \[3, 4\]",
    ),
    (PADDED, {"pv_mask": torch.ones(3, 4)}, TypeError, "pv_mask: expected a bool"),
    (PADDED, {"pv_offsets": torch.tensor([0, 3])}, ValueError, "expected the same layout"),
    (PADDED, {"query": torch.randn(3, 4, 7)}, ValueError, r"query: expected shape \[3, 4, 8\]"),
    (PADDED, {"key": torch.randn(3, 4, 8)}, ValueError, r"key: expected shape \[3, 5, 8\]"),
    (PADDED, {"value": torch.randn(3, 5, 8).half()}, TypeError, "value: expected torch.float32"),
    (PADDED, {"item_ids": torch.rand(3, 4)}, TypeError, "item_ids: expected an integer tensor"),
    (
        PADDED,
        {"item_ids": torch.ones(12, dtype=torch.int64)},
        ValueError,
        r"item_ids: expected shape \[3, 4\]",
    ),
    (
        PADDED,
        {"log_q": torch.ones(3, 4, dtype=torch.int64)},
        TypeError,
        "log_q: expected a floating tensor",
    ),
    (
        PADDED,
        {"weights": torch.full((3, 4), -1.0)},
        ValueError,
        "weights: expected finite values of at least 0, got -1",
    ),
    (
        PADDED,
        {"weights": torch.full((3, 4), torch.inf)},
        ValueError,
        "weights: expected finite values .* got inf",
    ),
    (
        PADDED,
        {"weights": torch.full((3, 4), torch.nan)},
        ValueError,
        "weights: expected finite values .* got nan",
    ),
    (
        PADDED,
        {"temperature": 0.0},
        ValueError,
        "temperature: expected a finite value above 0, got 0",
    ),
    (PADDED, {"temperature": -1}, ValueError, "temperature: .* got -1"),
    (PADDED, {"temperature": float("nan")}, ValueError, "temperature: .* got nan"),
    (
        PADDED,
        {"temperature": torch.tensor(-0.5)},
        ValueError,
        "temperature: expected a value above 0, got -0.5",
    ),
    (PADDED, {"temperature": torch.ones(2)}, ValueError, "temperature: expected a float or a 0-d"),
    (
        PADDED,
        {"temperature": "warm"},
        TypeError,
        "temperature: expected a float or a 0-d tensor, got str",
    ),
    (
        PADDED,
        {"num_heads": 3},
        ValueError,
        "num_heads: expected a divisor of the embedding dimension 8, got 3",
    ),
    (PADDED, {"num_heads": 0}, ValueError, "num_heads"),
    (PADDED, {"attention_scale": "x"}, TypeError, "attention_scale: expected a float"),
    (
        PADDED,
        {"negatives": "all"},
        ValueError,
        "negatives: expected one of 'batch', 'page', 'other_pages', got 'all'",
    ),
    (PADDED, {"direction": "up"}, ValueError, "direction: expected one of"),
    (PADDED, {"reduction": "max"}, ValueError, "reduction: expected one of"),
    (PADDED, {"impl": "cuda"}, ValueError, "impl: expected one of 'auto', 'reference'"),
    (
        PACKED,
        {"pv_offsets": torch.tensor([1, 2, 6])},
        ValueError,
        "pv_offsets: expected to start at 0, got 1",
    ),
    (
        PACKED,
        {"pv_offsets": torch.tensor([0, 4, 2])},
        ValueError,
        "pv_offsets: expected non-decreasing values, got 4 before 2",
    ),
    (
        PACKED,
        {"pv_offsets": torch.tensor([0, 2, 7])},
        ValueError,
        "pv_offsets: expected to end at 6 rows or before, got 7",
    ),
    (
        PACKED,
        {"pv_offsets": torch.tensor([0.0, 2, 6])},
        TypeError,
        "pv_offsets: expected an integer tensor",
    ),
    (
        PACKED,
        {"history_offsets": torch.tensor([0, 5])},
        ValueError,
        "history: expected 2 pages, as in pv, got 1",
    ),
    (
        PACKED,
        {"history_offsets": torch.tensor([[0, 5, 5]])},
        ValueError,
        "history_offsets: expected shape",
    ),
    (
        PACKED,
        {"pv_mask": torch.ones(6, dtype=torch.bool)},
        ValueError,
        "pv: expected pv_mask .* or pv_offsets .* got both",
    ),
    (
        ITEMS,
        {"pv": torch.tensor([[0, 1], [2, 5]])},
        ValueError,
        "pv: expected indices from 0 to 4, got 5",
    ),
    (
        ITEMS,
        {"history": torch.tensor([[-1, 4], [1, 0]])},
        ValueError,
        "history: expected indices from 0 to 4, got -1",
    ),
    (ITEMS, {"pv": torch.rand(2, 2)}, TypeError, "pv: expected an integer tensor"),
    (ITEMS, {"embeddings": torch.randn(5)}, ValueError, r"embeddings: expected shape \[items, D\]"),
    (
        PADDED,
        {"clicked": torch.full((3, 4), -100)},
        ValueError,
        "clicked: expected bool or integers 0 and 1, got -100",
    ),
    (
        PADDED,
        {"pv_mask": torch.full((3, 4), 2)},
        ValueError,
        "pv_mask: expected bool or integers 0 and 1, got 2",
    ),
    (
        PADDED,
        {"attention_scale": float("nan")},
        ValueError,
        "attention_scale: expected a finite value, got nan",
    ),
    (PADDED, {"workspace": 0}, ValueError, "workspace: expected at least 1 byte, got 0"),
    (PADDED, {"workspace": "1G"}, TypeError, r"workspace: expected an int \(bytes\), got str"),
    (PADDED, {"pv": torch.randn(3, 4, 0), "history": torch.randn(3, 5, 0)}, ValueError, "got 0"),
]

# Every tensor argument on another device; "meta" is one that every build of torch has.
ELSEWHERE: list[tuple[dict[str, Any], str, Any]] = [
    (PADDED, "history", PADDED["history"]),
    (PADDED, "clicked", PADDED["clicked"]),
    (PADDED, "pv_mask", torch.ones(3, 4, dtype=torch.bool)),
    (PADDED, "history_mask", torch.ones(3, 5, dtype=torch.bool)),
    (PADDED, "query", torch.randn(3, 4, 8)),
    (PADDED, "key", torch.randn(3, 5, 8)),
    (PADDED, "value", torch.randn(3, 5, 8)),
    (PADDED, "item_ids", torch.ones(3, 4, dtype=torch.int64)),
    (PADDED, "log_q", torch.ones(3, 4)),
    (PADDED, "weights", torch.ones(3, 4)),
    (PADDED, "temperature", torch.tensor(0.1)),
    (PACKED, "pv_offsets", PACKED["pv_offsets"]),
    (PACKED, "history_offsets", PACKED["history_offsets"]),
    (ITEMS, "pv", ITEMS["pv"]),
    (ITEMS, "history", ITEMS["history"]),
]


@pytest.mark.parametrize(
    ("good", "name", "value"), ELSEWHERE, ids=[name for _, name, _ in ELSEWHERE]
)
def test_tensors_on_another_device(good: dict[str, Any], name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}: expected a tensor on cpu, got meta"):
        cf.reconstruction_loss(**(good | {name: value.to("meta")}))


def jagged(counts: list[int], *shape: int) -> torch.Tensor:
    starts = torch.tensor([0, *counts]).cumsum(0)
    return torch.nested.nested_tensor_from_jagged(torch.ones(sum(counts), *shape), starts)


NESTED = {"pv": jagged([2, 3], 8), "history": jagged([1, 4], 8), "clicked": jagged([2, 3]) > 0}
HOLES = (torch.ones(6), torch.tensor([0, 3, 6]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"history": torch.randn(2, 4, 8)}, "pv and history: expected the same layout"),
        ({"clicked": torch.ones(5) > 0}, "clicked: expected a jagged NestedTensor, as pv is one"),
        ({"clicked": jagged([3, 2]) > 0}, "clicked: expected the offsets of pv"),
        ({"weights": jagged([2, 2])}, "weights: expected the offsets of pv"),
        ({"pv": jagged([2, 3], 8).transpose(1, 2)}, "pv: expected the ragged dimension"),
        ({"pv": jagged([2, 3])}, "pv: expected 3 dimensions, got 2"),
        ({"history": jagged([1, 4, 1], 8)}, "history: expected 2 pages, as in pv, got 3"),
        ({"pv_mask": torch.ones(2, 3) > 0}, "pv: a NestedTensor brings its own offsets"),
        ({"pv_offsets": torch.tensor([0, 2, 5])}, "expected the same layout"),
        (
            {
                "pv": torch.nested.nested_tensor_from_jagged(
                    torch.ones(6, 8), HOLES[1], torch.tensor([2, 3])
                ),
                "clicked": torch.nested.nested_tensor_from_jagged(
                    HOLES[0] > 0, HOLES[1], torch.tensor([3, 2])
                ),
            },
            "clicked: expected the lengths of pv",
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_nested_input(change: dict[str, Any], message: str) -> None:
    assert cf.reconstruction_loss(**NESTED).isfinite()
    with pytest.raises(ValueError, match=message):
        cf.reconstruction_loss(**(NESTED | change))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: checks that synchronise")
def test_values_on_a_gpu_are_checked_on_demand() -> None:
    for good, change, error, message in BAD:
        if not {"pv_offsets", "weights"} & set(change) or error is not ValueError:
            continue
        moved = {
            k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in (good | change).items()
        }
        with pytest.raises(error, match=message):
            cf.reconstruction_loss(**moved, validate=True)


@pytest.mark.parametrize(
    ("good", "change", "error", "message"), BAD, ids=lambda x: x if isinstance(x, str) else None
)
def test_bad_input(
    good: dict[str, Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        cf.reconstruction_loss(**(good | change))


@pytest.mark.parametrize("good", [PADDED, PACKED, ITEMS], ids=["padded", "packed", "items"])
def test_good_input(good: dict[str, Any]) -> None:
    assert cf.reconstruction_loss(**good).isfinite()


def test_padding_may_hold_any_index_and_any_weight() -> None:
    mask = torch.tensor([[True, True], [True, False]])
    wild = {
        "pv": torch.tensor([[0, 1], [2, 99]]),
        "weights": torch.tensor([[1.0, 1], [1, torch.nan]]),
    }
    expected = cf.reconstruction_loss(**ITEMS, pv_mask=mask)
    assert torch.equal(cf.reconstruction_loss(**(ITEMS | wild), pv_mask=mask), expected)


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_rows_past_the_last_offset_may_hold_anything(impl: str) -> None:
    """As padding by a mask: any index, any weight, any label."""
    g = torch.Generator().manual_seed(0)
    pages = {
        "pv_offsets": torch.tensor([0, 2, 4]),
        "history_offsets": torch.tensor([0, 2, 3]),
        "embeddings": torch.randn(5, 8, generator=g),
        "impl": impl,
    }
    live = {
        "pv": torch.tensor([0, 1, 2, 3]),
        "history": torch.tensor([0, 1, 4]),
        "clicked": torch.tensor([1, 0, 1, 1]),
        "weights": torch.tensor([1.0, 1, 2, 1]),
        "log_q": torch.tensor([1.0, 0, 1, 1]),
        "item_ids": torch.tensor([4, 4, 5, 6]),
    }
    wild = {
        "pv": 99,
        "history": -7,
        "clicked": -100,
        "weights": torch.nan,
        "log_q": torch.nan,
        "item_ids": 4,
    }
    longer = {k: torch.cat([x, torch.tensor([wild[k], wild[k]])]) for k, x in live.items()}
    expected = cf.reconstruction_loss(**live, **pages)
    assert torch.equal(cf.reconstruction_loss(**longer, **pages), expected)
    history = {"embeddings": pages["embeddings"], "history_offsets": pages["history_offsets"]}
    assert torch.equal(
        cf.click_sequence_loss(longer["history"], impl=impl, **history),
        cf.click_sequence_loss(live["history"], impl=impl, **history),
    )


def test_explicit_impl_never_falls_back_and_lists_every_reason() -> None:
    double = {k: v.double() if v.is_floating_point() else v for k, v in PADDED.items()}
    with pytest.raises(RuntimeError, match="impl='cpu' cannot run .*torch.float64"):
        cf.reconstruction_loss(**double, impl="cpu")
    wide = {
        "pv": torch.randn(1, 2, 2000).double(),
        "history": torch.randn(1, 2, 2000).double(),
        "clicked": torch.ones(1, 2) > 0,
    }
    with pytest.raises(RuntimeError, match="(?s)impl='triton'.*") as caught:
        cf.reconstruction_loss(**wide, impl="triton")
    if "cannot be imported" not in str(caught.value):
        assert "float64" in str(caught.value)
        assert "2000" in str(caught.value)
    assert cf.reconstruction_loss(**double).dtype == torch.float64  # auto: the reference


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": torch.tensor(0.1)}, TypeError, "temperature: expected a float"),
        ({"temperature": -1.0}, ValueError, "temperature"),
        ({"min_temperature": 0.0}, ValueError, "min_temperature: expected a finite value above 0"),
        (
            {"temperature": 0.001, "learnable_temperature": True},
            ValueError,
            "temperature: expected at least min_temperature",
        ),
        ({"negatives": "none"}, ValueError, "negatives"),
        ({"impl": "fast"}, ValueError, "impl"),
        ({"workspace": -1}, ValueError, "workspace"),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_bad_module_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        cf.ReconstructionLoss(**options)


def test_click_sequence_input() -> None:
    with pytest.raises(ValueError, match="history: expected padded shape"):
        cf.click_sequence_loss(torch.randn(4, 8))
    with pytest.raises(ValueError, match="reduction"):
        cf.click_sequence_loss(torch.randn(2, 4, 8), reduction="all")
    with pytest.raises(TypeError, match="item_ids"):
        cf.click_sequence_loss(torch.randn(2, 4, 8), item_ids=torch.rand(2, 4))


def test_modules_print_and_travel() -> None:
    """extra_repr, state_dict, deepcopy and pickle keep the options and the learned temperature."""
    module = cf.ReconstructionLoss(0.2, True, 0.05, negatives="page", num_heads=2)
    assert "temperature=0.2, learnable_temperature=True, min_temperature=0.05" in repr(module)
    assert "num_heads=2, negatives='page'" in repr(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert repr(other) == repr(module)
    fresh = cf.ReconstructionLoss(0.1, True)
    fresh.load_state_dict(module.state_dict())
    assert float(fresh.temperature.detach()) == pytest.approx(0.2)
    assert not cf.ReconstructionLoss(0.005).state_dict()  # a fixed temperature has no limit
    assert repr(cf.ClickSequenceLoss()).startswith("ClickSequenceLoss(temperature=0.1, reduction=")


def test_module_is_the_function() -> None:
    options: dict[str, Any] = {"negatives": "page", "direction": "both", "reduction": "sum"}
    expected = cf.reconstruction_loss(**PADDED, temperature=0.2, **options)
    assert torch.equal(cf.ReconstructionLoss(0.2, **options)(**PADDED), expected)
    learned = cf.ReconstructionLoss(0.2, learnable_temperature=True, **options)
    found = learned(**PADDED)
    torch.testing.assert_close(found, expected)
    found.backward()
    weight = learned.log_inverse_temperature
    assert weight is not None
    assert weight.grad is not None
    # d loss / d log(1/tau) = -tau d loss / d tau
    tau = torch.tensor(0.2, requires_grad=True)
    cf.reconstruction_loss(**PADDED, temperature=tau, **options).backward()
    assert tau.grad is not None
    torch.testing.assert_close(weight.grad, -0.2 * tau.grad.view(1))


def test_learned_temperature_can_leave_its_limit() -> None:
    """An ordinary clamp has no gradient beyond the limit and would be stuck there."""
    module = cf.ReconstructionLoss(0.02, learnable_temperature=True, min_temperature=0.02)
    assert list(module.state_dict()) == ["log_inverse_temperature"]
    weight = module.log_inverse_temperature
    assert weight is not None
    with torch.no_grad():
        weight += 1  # an optimizer's step past the limit
    assert float(module.temperature.detach()) == pytest.approx(0.02)
    for direction, moves in ((1, True), (-1, False)):  # descending raises or lowers the temperature
        weight.grad = None
        (-direction * module.temperature).backward()
        assert bool(weight.grad.any()) == moves


@pytest.mark.parametrize("layout", ["padded", "packed", "items"])
def test_gpu_inputs_are_not_read_back(monkeypatch: pytest.MonkeyPatch, layout: str) -> None:
    """Nothing waits for a GPU between the call and the operator: a tensor without data raises where
    its values are read."""
    asked = []

    def operator(p: Any, impl: str, stats: bool) -> tuple[torch.Tensor, ...]:
        asked.append(impl)
        rows = [torch.zeros(p.num_pv, device="cuda") for _ in range(5)]
        return torch.zeros((), device="cuda"), *rows, torch.zeros((), device="cuda")

    monkeypatch.setattr(operators, "unavailable_reasons", lambda impl, p: [])
    monkeypatch.setattr(operators, "loss", operator)
    good = {"padded": PADDED, "packed": PACKED, "items": ITEMS}[layout]
    shape = good["clicked"].shape
    with FakeTensorMode(allow_non_fake_inputs=True):
        batch = {k: torch.empty(v.shape, dtype=v.dtype, device="cuda") for k, v in good.items()}
        for name, dtype in (("weights", torch.float32), ("item_ids", torch.int64)):
            batch[name] = torch.empty(shape, dtype=dtype, device="cuda")
        batch["clicked"] = batch["item_ids"]
        temperature = torch.empty((), device="cuda")
        cf.reconstruction_loss(**batch, temperature=temperature, return_stats=True)
        monkeypatch.setattr(surroundings, "has_values", lambda x: True)
        with pytest.raises(DataDependentOutputException):
            cf.reconstruction_loss(**batch, validate=True)
    assert asked == [functional.AUTO["cuda"]]


def test_a_temperature_from_the_host_is_not_waited_for() -> None:
    copies: list[Any] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func is torch.ops.aten._to_copy.default:
                copies.append(kwargs.get("non_blocking"))
            return func(*args, **(kwargs or {}))

    tau = torch.tensor(0.1, requires_grad=True)
    with Watch():
        moved, _ = check_temperature(tau, torch.device("meta"), False)
    assert moved is not None
    assert moved.requires_grad
    assert copies == [True]


# ---- every argument, given what it is not --------------------------------------------------------


def wrong_tensors() -> dict[str, Any]:
    """What is no dense tensor of this process."""
    return {
        "list": [[0.5] * 200] * 200,
        "numpy": torch.randn(200, 200).numpy(),
        "text": "x" * 10**5,
        "int": 3,
        "dict": {"rows": list(range(10**4))},
        "sparse": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "quantized": torch.quantize_per_tensor(torch.randn(3, 4), 0.1, 0, torch.qint8),
        "complex": torch.randn(3, 4, dtype=torch.complex64),
        "meta": torch.empty(3, 4, device="meta"),
        "module": torch.nn.Linear(2, 2),
    }


WRONG_VALUES = ([1.0] * 10**4, torch.randn(100), torch.randn(50).numpy(), {"a": 1}, 10**6000, None)
TENSORS = (
    "pv",
    "history",
    "clicked",
    "pv_mask",
    "history_mask",
    "pv_offsets",
    "history_offsets",
    "embeddings",
    "query",
    "key",
    "value",
    "temperature",
    "item_ids",
    "log_q",
    "weights",
    "table_ids",
    "memory",
    "memory_ids",
    "memory_log_q",
)
VALUES = (
    "attention",
    "attention_scale",
    "attention_temperature",
    "num_heads",
    "negatives",
    "direction",
    "reduction",
    "exchange",
    "impl",
    "workspace",
    "group",
    "validate",
    "return_stats",
)
NULLABLE = ("attention", "attention_scale", "attention_temperature", "group")


def refused(call: Any, name: str, value: Any) -> None:
    kind = f"{name} given {type(value).__name__}"
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    message = str(caught.value)
    assert name in message, f"{kind}: {message}"
    assert len(message) < 500, f"{kind}: {len(message)} characters"


def test_every_tensor_argument_refuses_what_is_none() -> None:
    good = PADDED | {"memory": torch.randn(2, 8)}
    ids = {"item_ids": torch.arange(12).view(3, 4), "memory_ids": torch.arange(2)}
    needs: dict[str, dict[str, Any]] = {
        "memory_ids": ids,
        "memory_log_q": ids | {"log_q": torch.zeros(3, 4)},
        "table_ids": {k: v for k, v in ITEMS.items() if k != "memory"},
        "pv_offsets": PACKED,
        "history_offsets": PACKED,
    }
    for name in TENSORS:
        base = good | needs.get(name, {})
        if name in ("table_ids", "pv_offsets", "history_offsets"):
            base = needs[name]
        for kind, value in wrong_tensors().items():
            if name == "temperature" and kind == "int":
                continue
            if kind == "meta" and name in ("pv", "history", "embeddings"):
                continue  # the others are on another device than these
            refused(
                lambda b=base, n=name, v=value: cf.reconstruction_loss(**(b | {n: v})), name, value
            )
            if name in ("pv", "history", "query", "key", "value", "embeddings"):
                call = {k: v for k, v in PADDED.items() if k != "clicked"} | {name: value}
                refused(lambda c=call: cf.reconstruct(**c), name, value)
            if name in ("history", "history_mask", "embeddings", "item_ids", "temperature"):
                call = {"history": PADDED["history"], name: value}
                refused(lambda c=call: cf.click_sequence_loss(**c), name, value)
    for name in ("pv", "history", "clicked"):
        refused(lambda n=name: cf.reconstruction_loss(**(PADDED | {n: None})), name, None)


def test_every_option_refuses_what_is_none() -> None:
    for name in VALUES:
        for value in WRONG_VALUES:
            if value is None and name in NULLABLE:
                continue
            if name in ("validate", "return_stats") and isinstance(value, int):
                continue
            refused(lambda n=name, v=value: cf.reconstruction_loss(**PADDED, **{n: v}), name, value)
            # The module does not know yet what the heads have to divide.
            if not (name == "num_heads" and isinstance(value, int)):
                refused(lambda n=name, v=value: cf.ReconstructionLoss(**{n: v}), name, value)
            if name in ("reduction", "exchange", "impl", "workspace", "group", "validate"):
                refused(lambda n=name, v=value: cf.ClickSequenceLoss(**{n: v}), name, value)
    for name in ("temperature", "min_temperature", "learnable_temperature", "cuda_graph"):
        for value in WRONG_VALUES:
            if not (name == "learnable_temperature" and isinstance(value, int)):
                refused(lambda n=name, v=value: cf.ReconstructionLoss(**{n: v}), name, value)


def test_a_push_refuses_what_is_no_tensor() -> None:
    memory = cf.EmbeddingMemory(4, 8)
    good = {"embeddings": torch.randn(2, 8), "ids": torch.arange(2), "log_q": torch.zeros(2)}
    for name in good:
        for value in (*wrong_tensors().values(), *([None] if name != "log_q" else [])):
            refused(lambda n=name, v=value: memory.push(**(good | {n: v})), name, value)
    for name in ("size", "dim", "dtype"):
        for value in (*WRONG_VALUES[:4], 1 << 31, 10**5000):
            arguments = {"size": 4, "dim": 8, name: value}
            refused(lambda a=arguments: cf.EmbeddingMemory(**a), name, value)
    assert len(memory) == 0


def test_a_list_as_pv_fills_no_screen() -> None:
    """Its message held all of its numbers, 33 million characters."""
    rows = torch.randn(1000, 50).tolist()
    with pytest.raises(TypeError) as caught:
        cf.reconstruction_loss(rows, PADDED["history"], PADDED["clicked"])
    assert str(caught.value) == "pv: expected a torch.Tensor, got list of length 1000"
