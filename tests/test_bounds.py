"""Nothing outside of what was given is read: bounds are checked where memory is, so also where a
program was traced before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from factories import make, make_sequence, skip_unless_available
from torch import Tensor

import courier_fast as cf
from courier_fast.loss import layouts, operators

TABLE = 10
INDICES = [TABLE, -1, 10**12, -(10**12)]


def pages(**change: Any) -> dict[str, Tensor]:
    """Indices of a table, packed: two pages of items and histories."""
    return {
        "pv": torch.arange(8) % TABLE,
        "history": torch.arange(6) % TABLE,
        "clicked": torch.ones(8, dtype=torch.bool),
        "pv_offsets": torch.tensor([0, 5, 8]),
        "history_offsets": torch.tensor([0, 2, 6]),
    } | change


def with_index(name: str, index: int, dtype: torch.dtype = torch.int64) -> dict[str, Tensor]:
    given = pages()
    given[name] = given[name].clone()
    given[name][3] = index
    return given | {name: given[name].to(dtype)}


OFFSETS = {
    "past the end": ([0, 5, 9], "to end at 8 rows or before, got 9"),
    "far past": ([0, 5, 10**12], "to end at 8 rows or before"),
    "falling": ([0, 6, 5], "non-decreasing values"),
    "negative": ([0, -3, 8], "non-decreasing values"),
    "late": ([1, 5, 8], "to start at 0, got 1"),
}


def loss(table: Tensor, given: dict[str, Tensor], **options: Any) -> Tensor:
    return cf.reconstruction_loss(**given, embeddings=table, **options)


def reconstruct(table: Tensor, given: dict[str, Tensor], **options: Any) -> Tensor:
    given = {k: x for k, x in given.items() if k != "clicked"}
    return cf.reconstruct(**given, embeddings=table, **options)


def sequence(table: Tensor, given: dict[str, Tensor], **options: Any) -> Tensor:
    given = {k: x for k, x in given.items() if "history" in k}
    return cf.click_sequence_loss(**given, embeddings=table, **options)


@pytest.fixture(scope="module")
def traced() -> dict[Any, Any]:
    """Programs that were traced with good pages, by name and implementation."""
    torch._dynamo.reset()
    found: dict[Any, Any] = {}
    good = pages()
    for call in (loss, reconstruct, sequence):
        for impl in ("cpu", "reference"):
            compiled = torch.compile(call, backend="aot_eager")
            compiled(torch.randn(TABLE, 8), good, impl=impl)
            found[call, impl] = compiled
    return found


@pytest.mark.parametrize("impl", ["cpu", "reference"])
@pytest.mark.parametrize("call", [loss, reconstruct, sequence])
def test_a_traced_program_looks_at_its_indices(traced: Any, call: Any, impl: str) -> None:
    skip_unless_available("cpu", make(0))
    run, table = traced[call, impl], torch.randn(TABLE, 8)
    torch.testing.assert_close(run(table, pages(), impl=impl), call(table, pages(), impl=impl))
    names = ["history"] if call is sequence else ["pv", "history"]
    for name in names:
        for index in INDICES:
            expected = f"{name}: expected indices from 0 to 9, got {index}"
            for program in (run, call):
                with pytest.raises(ValueError, match=expected):
                    program(table, with_index(name, index), impl=impl)
    name = "history" if call is sequence else "pv"
    for starts, message in OFFSETS.values():
        rows = torch.arange(8) % TABLE
        given = pages(**{name: rows, f"{name}_offsets": torch.tensor(starts)})
        for program in (run, call):
            with pytest.raises(ValueError, match=f"{name}_offsets: expected {message}"):
                program(table, given, impl=impl)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8], ids=str)
def test_smaller_integers(traced: Any, dtype: torch.dtype) -> None:
    skip_unless_available("cpu", make(0))
    with pytest.raises(ValueError, match="pv: expected indices from 0 to 9, got 11"):
        loss(torch.randn(TABLE, 8), with_index("pv", 11, dtype))


def test_padding_may_hold_any_index_in_a_traced_program() -> None:
    skip_unless_available("cpu", make(0))
    torch._dynamo.reset()
    table = torch.randn(TABLE, 8)
    index, clicked = torch.arange(6).view(2, 3), torch.ones(2, 3, dtype=torch.bool)

    def run(table: Tensor, index: Tensor, mask: Tensor) -> Tensor:
        return cf.reconstruction_loss(
            index, index, clicked, embeddings=table, pv_mask=mask, history_mask=mask
        )

    compiled = torch.compile(run, backend="eager")
    mask = torch.tensor([[True, True, False], [True, True, True]])
    wild = index.clone()
    wild[0, 2] = 10**12  # padding may hold anything
    torch.testing.assert_close(compiled(table, wild, mask), run(table, index, mask))
    with pytest.raises(ValueError, match="pv: expected indices from 0 to 9, got 1000000000000"):
        compiled(table, wild, torch.ones_like(mask))


def test_an_exported_program_keeps_them() -> None:
    skip_unless_available("cpu", make(0))

    class Model(torch.nn.Module):
        def forward(self, table: Tensor, pv: Tensor, history: Tensor) -> Tensor:
            clicked = torch.ones(pv.shape, dtype=torch.bool)
            return cf.reconstruction_loss(pv, history, clicked, embeddings=table, impl="cpu")

    index = torch.arange(6).view(2, 3)
    table = torch.randn(TABLE, 8)
    given = (table, index, index.clone())
    program = torch.export.export(Model(), given).module()
    torch.testing.assert_close(program(*given), Model()(*given))
    for bad in INDICES:
        with pytest.raises(ValueError, match=f"history: expected indices .* got {bad}"):
            program(table, index, torch.full((2, 3), bad))


@pytest.mark.parametrize("side", ["pv", "history"])
def test_the_operators_themselves(side: str) -> None:
    """Whoever calls them, without the checks of arguments."""
    p, q = make(0, table=True, projected=True), make_sequence(0, table=True)
    skip_unless_available("cpu", p)
    for bad in (12, *INDICES[1:]):  # both tables hold 12
        getattr(p, f"{side}_index")[0] = bad
        q.history_index[0] = bad
        for run in (operators.loss, operators.reconstruct):
            with pytest.raises(ValueError, match=f"{side}: expected indices .* got {bad}"):
                run(p, "cpu")
        with pytest.raises(ValueError, match=f"history: expected indices .* got {bad}"):
            operators.loss(q, "cpu")


def test_on_a_gpu_what_nobody_looks_at_is_clamped() -> None:
    """Where the values are not read, as on "meta" and a GPU, the program has a clamp in the place
    of the check."""
    index = torch.tensor([-5, 0, 99], device="meta")
    assert layouts.check_index("pv", index, None, 10, False).device.type == "meta"
    with pytest.raises(ValueError, match="embeddings: expected a row for the indices in pv"):
        layouts.check_index("pv", index, None, 0, False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_indices_on_a_gpu() -> None:
    table = torch.randn(TABLE, 16, device="cuda")
    for index in INDICES:
        given = {k: x.cuda() for k, x in with_index("pv", index).items()}
        assert loss(table, given).isfinite()
        with pytest.raises(ValueError, match="pv: expected indices"):
            loss(table, given, validate=True)
    for starts, _ in OFFSETS.values():
        given = {k: x.cuda() for k, x in pages(pv_offsets=torch.tensor(starts)).items()}
        loss(table, given)
        torch.cuda.synchronize()


def test_table_ids_and_memories() -> None:
    """Ids are taken through the index of the batch, which is checked before."""
    ids = torch.arange(TABLE) + 100
    given = with_index("pv", TABLE)
    with pytest.raises(ValueError, match="pv: expected indices from 0 to 9, got 10"):
        loss(torch.randn(TABLE, 8), given, table_ids=ids)
    memory = cf.EmbeddingMemory(4, 8)
    memory.push(torch.randn(2, 8), torch.arange(2))
    rows, memory_ids, _ = memory.read()
    for impl in ("cpu", "reference"):
        with pytest.raises(ValueError, match="pv: expected indices from 0 to 9, got 10"):
            loss(
                torch.randn(TABLE, 8),
                given,
                table_ids=ids,
                memory=rows,
                memory_ids=memory_ids,
                impl=impl,
            )
