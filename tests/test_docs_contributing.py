"""The worked examples of docs/contributing: the blocks of a page are one program, which runs, and
does what the page says."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import factories
import pytest
import torch
from factories import LOSS_INPUTS, check_loss, loss_yardstick, make, results

from courier_fast.loss import operators, reference
from courier_fast.loss.problem import Needs
from courier_fast.testing.budget import Budget

FOLDER = Path(__file__).parent.parent / "docs/contributing"


def a_loss(page: ModuleType) -> None:
    """The definition is what the equation says, pair by pair, and a wrong gradient is refused."""
    p = factories.in_float64(make(3, mask=True, ids=True), LOSS_INPUTS)
    pv_page = reference.page_of_rows(p.pv_offsets, p.pv_mask, p.num_pv).tolist()
    history_page = reference.page_of_rows(p.history_offsets, p.history_mask, p.num_history)
    r, pairs = reference.reconstruct(p)[0], []
    for i, b in enumerate(pv_page):
        if b < 0 or not p.clicked[i] or b not in history_page:
            continue
        for j, other in enumerate(pv_page):
            if other >= 0 and p.ids[i] != p.ids[j]:
                s_ij, s_ii = (torch.cosine_similarity(r[i], p.pv[k], dim=0) for k in (j, i))
                pairs.append(torch.log1p(((s_ij - s_ii) / p.tau).exp()))
    torch.testing.assert_close(page.pairwise_loss(p), torch.stack(pairs).mean())

    p = make(3, tensor_tau=True)
    right = results(page.fast_pairwise_loss, p, LOSS_INPUTS)
    yardstick = factories.yardstick(page.pairwise_loss, p, LOSS_INPUTS)
    for name in (None, "output", "pv", "history", "temperature"):
        budget = Budget(torch.float32)
        budget.add(yardstick, {k: x * (1 + 1e-4 * (k == name)) for k, x in right.items()})
        assert {e.tensor for e in budget.errors() if not e.passes} == {name} - {None}


def a_backend(page: ModuleType) -> None:
    """Other problems than the page's, the statistics, what is saved, and what is refused."""
    check_loss("dense", draws=2, dim=5, tau=0.03, clicked=0.9, attention_scale=2.0)
    check_loss("dense", draws=1, longest_history=0)
    p = make(5, mask=True)
    exact = reference.reconstruction_loss(p)
    found = operators.loss(p, "dense", stats=True)
    for x, y in zip(found, (exact.loss, *exact.rows, exact.num_skipped), strict=True):
        torch.testing.assert_close(x, y)
    needs = Needs(pv=True, history=True)
    with torch.no_grad():
        for stats in (False, True):
            *outputs, saved = page.loss_forward(p, needs, stats)
            assert [(x.shape, x.dtype) for x in saved] == page.saved_spec(p, needs)
            fakes = operators._loss_fake(p, stats)
            assert [(x.shape, x.dtype) for x in outputs] == [(x.shape, x.dtype) for x in fakes]
        before = saved[0].clone()
        page.loss_backward(p, needs, saved, torch.tensor(3.0))
        assert torch.equal(saved[0], before)

    assert operators.unavailable_reasons("dense", p) == []
    other = make(0, table=True, log_q=True, dtype=torch.bfloat16, negatives="page")
    reasons = operators.unavailable_reasons("dense", other)
    assert reasons == [
        "pv_index is not None",
        "log_q is not None",
        "negatives is not 'batch'",
        "dtype is torch.bfloat16",
    ]
    assert operators.unavailable_reasons("dense", factories.make_sequence())
    wrong = replace(p, tau=p.tau * 1.0001)
    budget = Budget(torch.float32)
    budget.add(
        loss_yardstick(p),
        results(lambda _: operators.loss(wrong, "dense")[0], p, LOSS_INPUTS),
    )
    with pytest.raises(AssertionError, match="over the error budget"):
        budget.check()


def a_dataset_layout(page: ModuleType) -> None:
    """Who saw what after which history, and that the command knows the layout."""
    from courier_fast.cli import main
    from courier_fast.data.dataset import Dataset

    expected = [
        ("ann", "031", {"007", "012"}),
        ("bob", "007", {"012"}),
        ("cleo", "007", {"058", "063"}),
        ("ann", "044", {"007", "012", "031"}),
        ("bob", "031", {"007", "012"}),
        ("cleo", "012", {"007", "058", "063"}),
    ]
    command = "prepare by-name --layout corner-shop --source published --page-size 3 "
    assert main([*command.split(), "--min-history", "1"]) == 0
    for path in ("shop", "by-name"):
        d = Dataset(path)
        ids, users, found = d.item_ids.to_pylist(), d.user_ids.to_pylist(), []
        for i in range(d.num_pages):
            shown = slice(d.pv_start[i], d.pv_end[i])
            (clicked,) = d.pv_item[shown][d.pv_clicked[shown]]
            seen = {ids[k] for k in d.event_item[d.history_start[i] : d.history_end[i]]}
            found.append((users[d.page_user[i]], ids[clicked], seen))
        assert found == expected
    assert Dataset("shop").info["splits"] == {"train": [0, 4], "validation": [4, 5], "test": [5, 6]}
    images = page.corner_shop(Path("published")).items.collect()["image"]
    assert images.to_list() == ["p1", "p2", "p3", "p4", "p5", "p6"]


CHECKS: dict[str, Callable[[ModuleType], None]] = {
    "add-a-backend.md": a_backend,
    "add-a-dataset-layout.md": a_dataset_layout,
    "add-a-loss.md": a_loss,
}


def test_every_page_is_checked() -> None:
    assert CHECKS.keys() == {path.name for path in FOLDER.iterdir()}


@pytest.mark.parametrize("name", CHECKS)
def test_a_page_does_what_it_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The program as a module; what it registers is gone after the test."""
    tables: list[dict[str, Any]] = [operators.IMPLEMENTATIONS, factories.DEVICES]
    if name == "add-a-dataset-layout.md":
        layouts = pytest.importorskip("courier_fast.data.prepare.layouts", exc_type=ImportError)
        tables.append(layouts.LAYOUTS)
    text = (FOLDER / name).read_text()
    codes = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    module = f"page_{FOLDER.joinpath(name).stem.replace('-', '_')}"
    (tmp_path / f"{module}.py").write_text("\n".join(codes))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with ExitStack() as after:
        for table in tables:
            after.enter_context(patch.dict(table))
        after.callback(sys.modules.pop, module, None)
        CHECKS[name](importlib.import_module(module))
