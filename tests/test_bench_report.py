"""python -m bench: what is selected, kept, judged and drawn; what is written with the peers; tiles
and their tuning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # at the end: the installed package comes before the source tree

from bench import __main__ as bench  # noqa: E402
from bench import candidates, cases, errors, peers, report  # noqa: E402
from bench.candidates import Candidate, make  # noqa: E402
from courier_fast import surroundings  # noqa: E402
from courier_fast.testing.batches import Options, Shape, make_batch  # noqa: E402

CPU = torch.device("cpu")


def row(name: str, ms: float | None, **more: Any) -> dict[str, Any]:
    times = None if ms is None else [ms * 0.9e-3, ms * 1e-3, ms * 1.1e-3]
    return {
        "name": name,
        "times": times,
        "wall": times,
        "memory": 50 * 2**20,
        "beyond": 40 * 2**20,
        "errors": [{"error": 1.0, "budget": 2.0}],
        "left_out": None if ms is not None else "it is not installed",
        "another": False,
        "failures": [],
    } | more


def case(name: str, group: str, found: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    about = {"name": name, "group": group, "dtype": "bfloat16", "forward": False, "tf32": False}
    about |= {"names": ["triton"], "shape": {"pages": 4, "items": 5, "dim": 256}}
    return {
        "case": about,
        "rows": 1000,
        "anchors": 200,
        "columns": 1000,
        "history": 700,
        "dim": 256,
        "flops": 3e8,
        "bytes": 1e6,
        "product": {"size": 8192, "flops_per_second": 7.9e14},
        "floor_seconds": 1e-4,
        "results": found,
    } | more


def results(gpu: str | None = "NVIDIA H100 80GB HBM3") -> dict[str, Any]:
    wrong = {"failures": [{"error": 3.0, "budget": 2.0}], "errors": [{"error": 3.0, "budget": 2.0}]}
    shapes = [row("eager", 2.0), row("triton", 0.2), row("inf_cl", 0.1, **wrong), row("cce", None)]
    variants = [row("bare", 1.0), row("log_q", 1.3), row("page", None)]
    return {
        "command": "python -m bench",
        "surroundings": {"gpu": gpu, "cpu": "a CPU", "torch": "2.11"},
        "copy_bytes_per_second": 3e12,
        "cases": [
            case("paper", "shapes", shapes),
            case("N = M = 1,000", "rows", shapes),
            case("N = M = 2,000", "rows", shapes, rows=2000),
            case("D = 64", "dims", [row("triton", 0.19)], dim=64),
            case("options", "options", variants),
        ],
    }


def test_goals_are_met_or_not_by_what_is_right() -> None:
    found = results()
    assert report.reached(found, "paper", "GPU time") == pytest.approx(0.2)
    assert report.reached(found, "paper", "memory over gradients") == 40
    assert report.reached(found, "D = 64", "share of the floor") == pytest.approx(100 / 1.9)
    assert report.reached(found, "big20", "GPU time") is None
    found["cases"][0]["results"][1]["failures"] = [{"error": 3.0, "budget": 2.0}]
    assert report.reached(found, "paper", "GPU time") is None
    lines = report.markdown(results()).splitlines()
    assert "| paper | GPU time | 0.2 ms | 0.22 ms | 0.16 ms | met |" in lines
    assert "| D = 64 | share of the floor | 52.63 % | 50 % | 60 % | met |" in lines
    assert "| big20 | GPU time |  | 2.6 ms | 2.1 ms | not measured |" in lines
    slow = results()
    slow["cases"][0]["results"][1] = row("triton", 0.3)
    assert "| paper | GPU time | 0.3 ms | 0.22 ms | 0.16 ms | **not met** |" in report.markdown(
        slow
    )
    fast = results()
    fast["cases"][0]["results"][1] = row("triton", 0.15)
    assert "0.15 ms | 0.22 ms | 0.16 ms | the second, too |" in report.markdown(fast)
    assert "## Goals" not in report.markdown(results("NVIDIA T4"))


def test_what_is_wrong_gets_no_ratio_and_no_point(tmp_path: Path) -> None:
    found = results()
    report.write_report(found, tmp_path)
    text = (tmp_path / "README.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith("| inf_cl"))
    assert "over the budget" in line
    assert "10.00" not in line
    assert next(x for x in text.splitlines() if x.startswith("| **triton**")).count("10.00") == 1
    assert "Left out: cce: it is not installed" in text
    assert "| log_q | 1.3 (1.17 to 1.43) | 1.30 | 1.15 |" in text
    for name in ("rows", "dims", "roofline"):
        drawn = (tmp_path / f"{name}.svg").read_text()
        assert len(drawn) < 200_000
    lines = report._lines(found, "rows", "rows", lambda c, r: r["times"][1])
    assert set(lines) == {"eager", "triton"}
    assert [x for x, _ in lines["triton"]] == [1000, 2000]


def test_shares_of_what_others_take() -> None:
    found = [row("eager", 2.0), row("eager_full", 4.0, memory=2000 * 2**20), row("cpu", 0.4)]
    text = report.markdown(results() | {"cases": [case("candidate", "candidate", found)]})
    assert "## Attention for each candidate" in text
    shares = "0.2 of its time (at most 0.25: met), 1 of its memory (at most 0.05: **not met**)"
    assert f"- cpu over eager: {shares}" in text
    assert "- cpu over eager_full: 0.1 of its time" in text
    assert "0.025 of its memory (at most 0.05: met)" in text
    found[0]["failures"] = [{"error": 3.0, "budget": 2.0}]
    text = report.markdown(results() | {"cases": [case("candidate", "candidate", found)]})
    assert f"- cpu over eager: {shares}" in text, "others take what they take, also where they err"
    found[2]["failures"] = [{"error": 3.0, "budget": 2.0}]
    text = report.markdown(results() | {"cases": [case("candidate", "candidate", found)]})
    assert "- cpu over" not in text, "a share of what is wrong"
    assert "of its time" not in report.markdown(results())


def test_quick_on_a_cpu_and_what_stays_when_it_is_cut_short(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [
        cases.Case("one", Shape(20, 4, 5, 16, 0.5), dtype="float32", names=("reference", "eager")),
        cases.Case("two", Shape(20, 4, 5, 16, 0.5), dtype="float32", names=("reference",)),
    ]
    monkeypatch.setattr(bench, "selected", lambda *_: small)
    real = bench.measured

    def stops(case: Any, *args: Any, **kwargs: Any) -> Any:
        if case.name == "two":
            raise KeyboardInterrupt
        return real(case, *args, **kwargs)

    monkeypatch.setattr(bench, "measured", stops)
    arguments = ["--quick", "--device", "cpu", "--out", str(tmp_path), "--case", "one", "two"]
    with pytest.raises(KeyboardInterrupt):
        bench.main(arguments)
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [c["case"]["name"] for c in kept["cases"]] == ["one"]
    assert bench.main(["--report", str(tmp_path)]) == 0
    assert "**one**" in (tmp_path / "README.md").read_text()


def test_selection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(surroundings, "BFLOAT16_PRODUCTS", True)
    gpu = cases.cases("cuda")
    names = [c.name for c in gpu]
    assert len(set(names)) == len(names)
    goals = {g.case for g in cases.GOALS}
    assert goals <= set(names), "a goal for what is not measured"
    assert set(cases.VARIANT_GOALS) <= set(cases.VARIANTS)
    assert [c.name for c in cases.selected("cuda", False, ["paper"], None)] == ["paper"]
    assert {c.group for c in cases.selected("cpu", False, None, ["dims"])} == {"dims"}
    for device in ("cpu", "cuda"):
        found = cases.selected(device, False, None, ["candidate"])
        assert all(c.options.attention == "candidate" for c in found)
        three = cases.selected(device, False, None, ["courier"])
        assert all(c.options.courier and {"eager", "cpu", "triton"} <= set(c.names) for c in three)
        assert {case for case, _ in cases.OVER_OTHERS} <= {c.name for c in found + three}
        assert {"eager", "compile", "cpu", "triton"} <= set(found[0].names)
    monkeypatch.setattr(surroundings, "BFLOAT16_PRODUCTS", False)
    assert {c.dtype for c in cases.cases("cpu")} == {"float32"}
    assert cases.cases("cuda") == gpu
    with pytest.raises(ValueError, match="--case: expected some of paper.*got papr"):
        cases.selected("cuda", False, ["papr"], None)


def test_variants_are_those_losses() -> None:
    shape = Shape(60, 4, 5, 32, 0.5)
    rows, _ = bench.measured_variants(cases.VARIANTS, shape, "cpu", "bfloat16", CPU, 1)
    assert [r.name for r in rows] == list(cases.VARIANTS)
    assert [(r.name, r.left_out, r.failures) for r in rows if r.left_out or r.failures] == []
    assert all(r.times is not None for r in rows)


# ---- peers ---------------------------------------------------------------------------------------


def _fakes() -> dict[str, Any]:
    """The peers' functions with their signatures, in PyTorch."""

    def cce(e: Tensor, c: Tensor, targets: Tensor, filter_eps: Any = "high") -> Tensor:
        assert filter_eps is None
        return functional.cross_entropy(e @ c.T, targets)

    def liger(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(input @ weight.T, target)

    class Scaled:  # of liger-kernel 0.8.5: a loss of each row
        @staticmethod
        def apply(_input: Tensor, weight: Tensor, target: Tensor, temperature: float) -> Tensor:
            logits = _input @ weight.T / temperature
            return functional.cross_entropy(logits, target, reduction="none")

    def quack(x: Tensor, weight: Tensor, target: Tensor, chunk_size: int = 4096) -> Tensor:
        return functional.cross_entropy(x @ weight.T, target)

    def inf(q: Tensor, k: Tensor, labels: Tensor, scale: float, head_dim: int) -> Tensor:
        assert q.shape[1] % head_dim == 0
        return functional.cross_entropy(scale * q @ k.T, labels, reduction="none")

    class Clip:
        def __init__(self, temperature: float, normalized_inputs: bool, stable: bool) -> None:
            assert normalized_inputs
            assert not stable
            self.temperature = temperature

        def __call__(self, x: Tensor, y: Tensor) -> Tensor:
            s, places = x @ y.T / self.temperature, torch.arange(len(x))
            return (functional.cross_entropy(s, places) + functional.cross_entropy(s.T, places)) / 2

    def varlen(q: Tensor, k: Tensor, v: Tensor, at: Tensor, to: Tensor, *most: int) -> Tensor:
        assert at.dtype == to.dtype == torch.int32
        parts = []
        for i in range(len(at) - 1):
            one, past = q[at[i] : at[i + 1], 0], k[to[i] : to[i + 1], 0]
            assert len(one) <= most[0]
            assert len(past) <= most[1]
            a = (one @ past.T * q.shape[2] ** -0.5).softmax(-1)
            parts.append((a @ past)[:, None])
        return torch.cat(parts)

    return {
        "cut_cross_entropy": types.SimpleNamespace(linear_cross_entropy=cce),
        "liger_kernel.transformers.functional": types.SimpleNamespace(
            liger_fused_linear_cross_entropy=liger
        ),
        "liger_kernel.ops.fused_linear_scaled_cross_entropy": types.SimpleNamespace(
            LigerFusedLinearScaledCrossEntropyFunction=Scaled
        ),
        "quack.linear_cross_entropy": types.SimpleNamespace(chunked_linear_cross_entropy=quack),
        "inf_cl": types.SimpleNamespace(cal_flash_loss=inf),
        "memeff": types.SimpleNamespace(MemoryEfficientCLIPLoss=Clip),
        "torch.nn.attention.varlen": types.SimpleNamespace(varlen_attn=varlen),
    }


@pytest.mark.parametrize(
    "name", ["cce", "liger", "liger_scaled", "quack", "inf_cl", "memeff", "varlen"]
)
def test_peers_are_called_for_this_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "varlen" and not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this torch has no linear_cross_entropy")
    fakes = _fakes()
    monkeypatch.setattr(peers, "_module", lambda _name, module, _batch: fakes[module])
    both = name == "memeff"
    options = Options(direction="both" if both else "reconstruct")
    batch = make_batch(Shape(12, 4, 5, 32, 1.0 if both else 0.4), options, torch.float64, CPU)
    made = make(name, batch)
    assert isinstance(made, Candidate)
    truth = errors.exact(batch)
    for key, x in errors.loss_and_gradients(made.loss, batch).items():
        torch.testing.assert_close(x, truth[key])


def test_peers_say_why_they_are_left_out() -> None:
    batch = make_batch(Shape(12, 4, 5, 32, 0.4), Options(), torch.float32, CPU)
    for name in peers.NAMES:
        reason = make(name, batch)
        assert isinstance(reason, str)
        assert reason
    masked = make_batch(Shape(12, 4, 5, 32, 0.4), Options(ids=True), torch.float32, CPU)
    assert "takes no masks" in str(make("cce", masked))
    assert set(candidates.NAMES) >= set(peers.NAMES)


# ---- tiles ---------------------------------------------------------------------------------------


def _script(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.long("GPU targets")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU this takes its time: run it itself")
def test_tuning_writes_tiles_that_are_taken(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    from bench import tune
    from courier_fast.kernels.triton import tiles

    out = tmp_path / "tiles.json"
    arguments = ["--dim", "64", "--rows", "160", "--repeats", "1", "--out", str(out)]
    arguments += ["--block-m", "16", "--block-n", "16", "--warps", "4", "--stages", "2"]
    assert tune.main([*arguments, "--kind", "forward", "--dtype", "float32"]) == 0
    assert tiles.OVERRIDE is None
    (entry,) = json.loads(out.read_text())
    assert (entry["type"], entry["kind"], entry["stride"]) == ("float32", "forward", 64)
    found = tiles.read_tiles(out)
    tile = tiles.Tile(**entry["tile"])
    assert found == {("float32", "forward", 64): tile}
    assert tune.main([*arguments, "--kind", "forward", "--dtype", "float32"]) == 0
    assert len(json.loads(out.read_text())) == 1, "what is there is not tuned again"
    code = (
        "import torch; from courier_fast.kernels.triton import tiles;"
        "print(tiles.contrast_tile(torch.float32, 64, torch.device('cpu')))"
    )
    run = _script(code, COURIER_FAST_TILES=str(out))
    assert run.stdout.strip() == repr(tile), run.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing", "expected a file that bench.tune wrote"),
        ('[{"type": "16-bit"}]', "expected a file that bench.tune wrote"),
        (
            '[{"type": "8-bit", "kind": "forward", "stride": 64,'
            ' "tile": {"block_m": 64, "block_n": 64, "num_warps": 4, "num_stages": 2}}]',
            "expected types 16-bit or float32",
        ),
        (
            '[{"type": "16-bit", "kind": "forward", "stride": 64,'
            ' "tile": {"block_m": 48, "block_n": 64, "num_warps": 4, "num_stages": 2}}]',
            "expected rows and columns that are powers of two",
        ),
    ],
)
def test_tiles_that_are_none(tmp_path: Path, text: str, message: str) -> None:
    from courier_fast.kernels.triton import tiles

    (tmp_path / "tiles.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        tiles.read_tiles(tmp_path / "tiles.json")


@pytest.mark.long("GPU targets")
@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_tuning_without_a_gpu_is_refused() -> None:
    run = _script(
        "import sys; from bench import tune; sys.exit(tune.main([]))", TRITON_INTERPRET="0"
    )
    assert run.returncode == 2
    assert "expected a CUDA device, found none" in run.stderr


def _compiled(problem: str, *kernels: str) -> list[list[str]]:
    """Columns of what bench.compiled prints of them."""
    pytest.importorskip("triton")
    arguments = [problem, "--kernel", *kernels]
    run = _script(f"import sys; from bench import compiled; sys.exit(compiled.main({arguments}))")
    assert run.returncode == 0, run.stderr
    return [x.split() for x in run.stdout.splitlines()[2:]]


@pytest.mark.long("GPU targets")
def test_compiled_candidate_kernels() -> None:
    lines = _compiled("candidate-256", "binned_scores", "candidate_history")
    assert {x[0] for x in lines} == {"binned_scores", "candidate_history"}
    for name, registers, spilled, _shared, _wgmma, loop, *_ in lines:
        assert 32 <= int(registers) <= 255
        assert int(spilled) <= (32 if name == "candidate_history" else 0)
        assert int(loop) > 100


@pytest.mark.long("GPU targets")
def test_compiled_without_a_gpu() -> None:
    lines = [x for x in _compiled("bf16-64", "contrast", "compact") if x[0] == "contrast"]
    assert len(lines) == 3
    for _name, registers, spilled, _shared, wgmma, loop, *_ in lines:
        assert 32 <= int(registers) <= 255
        assert int(spilled) == 0
        assert int(wgmma) > 0
        assert int(loop) > 100
