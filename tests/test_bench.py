"""bench.loss: a small shape runs, and a wrong result gets no speed-up."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # at the end: the installed package comes before the source tree

from bench import candidates, errors, loss, measure  # noqa: E402
from bench.candidates import Candidate, eager_logits, make  # noqa: E402
from bench.problems import SHAPES  # noqa: E402
from courier_fast.testing.batches import (  # noqa: E402
    Batch,
    Options,
    Shape,
    call,
    make_batch,
)

CPU = torch.device("cpu")
FAST = ["--shape", "tiny", "--device", "cpu", "--repeats", "1", "--no-memory"]


def wrong(batch: Batch) -> Tensor:
    """A temperature that is 1 % off."""
    return call(batch, "reference", temperature=batch.options.tau * 1.01)


def test_a_right_result_gets_a_speed_up(capsys: pytest.CaptureFixture[str]) -> None:
    right = Candidate("right", lambda b: call(b, "reference"))
    assert loss.main([*FAST, "--impl", "reference"], [right]) == 0
    line = next(x for x in capsys.readouterr().out.splitlines() if x.startswith("right"))
    assert line.rstrip().endswith("x]")
    assert "REFUSED" not in line


def test_a_wrong_result_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    code = loss.main(
        [*FAST, "--impl", "reference", "--json", str(file)], [Candidate("wrong", wrong)]
    )
    captured = capsys.readouterr()
    line = next(x for x in captured.out.splitlines() if x.startswith("wrong"))
    assert code == 1
    assert "REFUSED" in line
    assert "x its budget" in line
    assert not line.rstrip().endswith("x]")
    assert "over the error budget: wrong" in captured.err
    failed = {e["tensor"] for r in json.loads(file.read_text())["results"] for e in r["failures"]}
    assert failed == {"loss", "pv", "history"}


def test_not_finite_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    poisoned = Candidate("poisoned", lambda b: call(b, "reference") * torch.nan)
    assert loss.main([*FAST, "--impl", "reference"], [poisoned]) == 1
    assert "REFUSED" in capsys.readouterr().out


def test_an_implementation_asked_for_that_cannot_run_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "xformers", None)  # type: ignore[arg-type]
    assert loss.main([*FAST, "--impl", "xformers"]) == 1
    captured = capsys.readouterr()
    assert "xformers is not installed" in captured.out
    assert "cannot run: xformers" in captured.err


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(negatives="page"),
        Options(negatives="other_pages", ids=True),
        Options(log_q=True),
        Options(weights=True),
        Options(unique_items=60),
    ],
    ids=str,
)
def test_logits_that_are_compiled_are_the_same_loss(options: Options) -> None:
    batch = make_batch(SHAPES["tiny"], options, torch.float64, CPU)
    truth = errors.exact(batch)
    for rows in (None, batch.clicked.nonzero().squeeze(1)):
        found = errors.loss_and_gradients(lambda b, r=rows: eager_logits(b, r), batch)
        for name, x in truth.items():
            torch.testing.assert_close(found[name], x)


@pytest.mark.parametrize(
    "options",
    [
        Options(),
        Options(cosine=True),
        Options(negatives="other_pages", ids=True),
        Options(log_q=True, weights=True, learn_tau=True),
        Options(unique_items=60),
    ],
    ids=str,
)
def test_candidates_in_chunks_and_at_once_are_the_same_loss(
    options: Options, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = replace(options, attention="candidate")
    batch = make_batch(SHAPES["tiny"], options, torch.float64, CPU).to(torch.float64)
    monkeypatch.setitem(candidates.CHUNK_ELEMENTS, "cpu", 7 * batch.rows * batch.dim)
    truth = errors.exact(batch)
    for name in ("eager", "eager_full"):
        made = make(name, batch)
        assert isinstance(made, Candidate)
        for key, x in errors.loss_and_gradients(made.loss, batch).items():
            torch.testing.assert_close(x, truth[key])
        with torch.no_grad():
            torch.testing.assert_close(made.loss(batch), truth["loss"])
    assert "anchor" in str(make("lce", batch))


def test_plain_and_fused_courier_are_the_same_losses() -> None:
    batch = make_batch(SHAPES["tiny"], Options(courier=True), torch.float64, CPU)
    batch = batch.to(torch.float64)
    assert {n.split(".")[0] for n in batch.parameters} == {"attention", "click_head"}
    truth = errors.exact(batch)
    assert truth.keys() == {"loss", *batch.inputs}
    made = make("eager", batch)
    assert isinstance(made, Candidate)
    for name, x in errors.loss_and_gradients(made.loss, batch).items():
        # Batch norm takes what is added to all rows out again.
        torch.testing.assert_close(x, truth[name], atol=1e-9, rtol=1e-7)
    assert "reconstruction loss alone" in str(make("cce", batch))
    moved = batch.with_inputs({"pv": batch.pv + 1, "click_head.3.bias": torch.ones(1)})
    assert torch.equal(moved.pv, batch.pv + 1)
    assert torch.equal(moved.parameters["click_head.3.bias"], torch.ones(1))
    assert moved.parameters.keys() == batch.parameters.keys()


def test_candidates_are_judged_on_few_pages() -> None:
    shape = Shape(512, 5, 20, 256, 0.2)
    few = measure.shape_that_fits(shape, Options(attention="candidate"), CPU)
    assert 20 < few.pages < 120
    assert measure.shape_that_fits(shape, Options(), CPU) == shape


@pytest.mark.parametrize("direction", ["reconstruct", "both"])
def test_the_exact_mean_is_weighted(direction: str) -> None:
    batch = make_batch(
        SHAPES["tiny"], Options(direction=direction, weights=True), torch.float64, CPU
    )
    whole = errors.loss_and_gradients(lambda b: call(b, "reference"), batch.to(torch.float64))
    for name, x in errors.exact(batch).items():
        torch.testing.assert_close(x, whole[name])


def test_exact_in_chunks_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make_batch(SHAPES["tiny"], Options(direction="both"), torch.float64, CPU)
    whole = errors.loss_and_gradients(lambda b: call(b, "reference"), batch)
    monkeypatch.setattr(errors, "CHUNK_ELEMENTS", 10 * batch.rows)
    for name, x in errors.exact(batch).items():
        torch.testing.assert_close(x, whole[name])


def test_errors_are_measured_on_fewer_pages_where_the_reference_does_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "free_memory", lambda device: 200_000)
    right = Candidate("right", lambda b: call(b, "reference"))
    assert loss.main([*FAST, "--impl", "reference"], [right]) == 0
    out = capsys.readouterr().out
    assert "left out: its logits take about" in out
    assert "fewer pages (N = " in out
    assert "the reference does not fit" in out
    assert "[-]" in out, "a speed-up over what was not measured"


@pytest.mark.long("memory")
@pytest.mark.skipif(not measure.can_measure_memory(CPU), reason="needs /proc/self/clear_refs")
def test_peak_memory_sees_the_logits() -> None:
    shape = SHAPES["tiny"]
    shape = type(shape)(600, shape.items, shape.longest_history, shape.dim, 1.0)
    batch = make_batch(shape, Options(), torch.float32, CPU)
    made = make("reference", batch)
    assert isinstance(made, Candidate)
    logits = 4 * batch.rows * batch.anchors
    assert 2 * logits < measure.peak_memory("reference", made.loss, shape, batch)[0] < 12 * logits


@pytest.mark.long("whole commands")
def test_command_line(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    command = [
        sys.executable,
        "-m",
        "bench.loss",
        *FAST,
        "--impl",
        "reference",
        "--json",
        str(file),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "forward + backward" in run.stdout
    assert "tiny on cpu" in run.stdout
    assert json.loads(file.read_text())["results"][0]["times"]
