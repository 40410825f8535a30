"""python -m bench.gpu: its stages run (rehearsed, tiny), what fails costs a case and not a stage,
and a run can go on."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # at the end: the installed package comes before the source tree

pytest.importorskip("triton", reason="Triton is not installed")

import courier_fast  # noqa: E402
from bench import cases as bench_cases  # noqa: E402
from bench.gpu import __main__ as driver  # noqa: E402
from bench.gpu import record as records  # noqa: E402
from bench.gpu import smoke, stages, summary, tools, worker  # noqa: E402
from bench.gpu.record import FAILED, PASSED, SKIPPED, STOPPED, Record, Result  # noqa: E402
from bench.gpu.worker import Setting  # noqa: E402
from bench.problems import SHAPES  # noqa: E402
from courier_fast.doctor import cases  # noqa: E402

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is interpreted")


def setting(out: Path, seconds: float = 600) -> Setting:
    return Setting(out, True, time.time() + seconds)


# ---- the stages ----------------------------------------------------------------------------------


@pytest.mark.long("whole commands", short=("bench",))
@interpreted
@pytest.mark.parametrize("name", [n for n in stages.STAGES if n not in ("smoke", "tests")])
def test_every_stage_runs(name: str, tmp_path: Path) -> None:
    where = setting(tmp_path)
    cases = stages.STAGES[name].cases(where)
    # Two are enough where all are alike.
    some = dict(list(cases.items())[:2])
    assert worker.run(some, Record(tmp_path, name), where) == 0
    content = Record(tmp_path, name).read()
    assert records.finished(content)
    assert summary.first_failure(content) is None, summary.first_failure(content)
    known = {PASSED, SKIPPED} if name in ("step", "dali") else {PASSED}
    assert {c["status"] for c in content["cases"].values()} <= known
    assert content["surroundings"]["torch"] == torch.__version__
    text = summary.markdown(
        {n: Record(tmp_path, n).read() for n in stages.STAGES}, "command", True, "source"
    )
    assert f"| {name} | " in text
    assert "met" not in text.split(), "a rehearsal meets no target"


def test_what_the_tests_stage_runs_is_there() -> None:
    assert all((ROOT / "tests" / f"{name}.py").exists() for name in stages.TESTS)


@interpreted
def test_the_smallest_cases_launch_every_kernel() -> None:
    source = "".join(p.read_text() for p in (ROOT / "kernels" / "triton").rglob("*.py"))
    launched = set(re.findall(r"^@kernel.*\ndef (\w+)\(", source, re.MULTILINE))
    assert "contrast" in launched
    seen: set[str] = set()
    for case in smoke.smallest("float32", 32):
        result = smoke.judged(case, "cpu", bare=True)
        assert result.status == PASSED
        seen |= set(result.data["kernels"])
    assert seen == launched


def test_cases_have_names_of_their_own() -> None:
    for every in (smoke.every(True), smoke.every(False)):
        by_key = {case.key: case for case in every}
        assert all(by_key[case.key] == case for case in every)
    assert {x.shape.longest_history for x in every} >= {1, 300}
    candidate = {(x.dtype, x.shape.dim) for x in every if x.options.attention == "candidate"}
    assert candidate >= {("float32", 256), ("float32", 768), ("bfloat16", 768), ("float16", 256)}
    assert every[0].options.attention == "candidate", "the default call comes first"


@interpreted
def test_a_wrong_kernel_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(x for x in smoke.smallest("float32", 32) if x.name == "anchor")
    assert smoke.judged(case, "cpu").status == PASSED
    right = cases._FUNCTIONS["loss"]

    def wrong(case: Any, impl: str) -> Any:
        loss = right(case, impl)
        return (lambda b: loss(b) * 1.001) if impl == "triton" else loss

    monkeypatch.setitem(cases._FUNCTIONS, "loss", wrong)
    result = smoke.judged(case, "cpu")
    assert result.status == FAILED
    assert re.search(
        r"N = 15, M = \d+, K = \d+, D = 32: \w+ \(\w+\) has \d+\.\d+ x its budget", result.line
    )
    assert "contrast" in result.line

    def broken(case: Any, impl: str) -> Any:
        def loss(batch: Any) -> Any:
            out = right(case, impl)(batch)
            if impl != "triton":
                return out
            raise RuntimeError("an illegal memory access was encountered")

        return loss

    monkeypatch.setitem(cases._FUNCTIONS, "loss", broken)
    found, sound = worker.attempt(lambda: smoke.judged(case, "cpu"))
    assert found.status == FAILED and sound
    assert found.line.startswith("WrongNumberError: reduce_loss: N = 15, M = "), "the last kernel"


# ---- the driver ----------------------------------------------------------------------------------


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Workers run a stage of the test's own, which notes what it began in begun.txt."""
    source = f"""
        import os, sys, time, types
        sys.path.append({str(ROOT)!r})
        from pathlib import Path
        # A worker starts seven times here: of the package it needs files.py, and torch not at all.
        package = sys.modules["courier_fast"] = types.ModuleType("courier_fast")
        package.__path__ = [{courier_fast.__path__[0]!r}]
        from bench.gpu import worker
        from bench.gpu.record import Record, Result
        worker.surroundings = lambda setting: {{}}
        def run(name, work):
            with open("begun.txt", "a") as file:
                file.write(name + "\\n")
            return work()
        def fault():
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        def wrong():
            raise ValueError("wrong")
        def missing():
            import nothing_of_that_name
        works = dict(
            right=lambda: Result("fine", data={{"ms": 1}}),
            wrong=wrong, missing=missing, fault=fault,
            crash=lambda: os._exit(9), after=lambda: Result("after"),
            hang=lambda: time.sleep(100),
            last=lambda: Result("last"),
        )
        chosen = os.environ["CASES"].split()
        cases = {{k: (lambda k=k: run(k, works[k])) for k in chosen}}
        name, out, deadline = sys.argv[1], Path(sys.argv[3]), float(sys.argv[5])
        sys.exit(worker.run(cases, Record(out, name), worker.Setting(out, True, deadline)))
    """
    path = tmp_path / "stage.py"
    path.write_text(textwrap.dedent(source))
    monkeypatch.setattr(tools, "module", lambda _name, *words: [sys.executable, str(path), *words])
    monkeypatch.setattr(driver, "GRACE", 0.2)
    monkeypatch.setitem(stages.STAGES, "smoke", stages.Stage(lambda s: {}, 60, workers=1))
    return path


def run(out: Path, *words: str) -> int:
    return driver.main(
        ["--rehearse", "--no-install", "--out", str(out), "--stage", "smoke", *words]
    )


def begun(out: Path) -> list[str]:
    return (out / "begun.txt").read_text().split()


def test_what_fails_costs_its_case_and_a_run_goes_on(
    script: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("CASES", "right wrong missing fault crash after")
    assert run(out) == 1
    found = Record(out, "smoke").read()
    status = {k: c["status"] for k, c in found["cases"].items()}
    passed, failed = ["right", "after"], ["wrong", "fault", "crash"]
    assert status == dict.fromkeys(passed, PASSED) | dict.fromkeys(failed, FAILED) | {
        "missing": SKIPPED
    }
    assert found["cases"]["right"]["data"] == {"ms": 1}
    assert "ended with 9" in found["cases"]["crash"]["line"]
    assert found["problem"] is None
    text = capsys.readouterr().out
    assert "2 passed, 3 failed, 1 skipped; first failure: wrong: ValueError: wrong" in text
    assert "| smoke | 2 passed, 3 failed, 1 skipped | " in (out / "summary.md").read_text()
    assert begun(out) == ["right", "wrong", "missing", "fault", "crash", "after"]
    # Only what is missing; named, a finished stage begins again.
    run(out)
    assert len(begun(out)) == 12
    monkeypatch.setattr(driver, "begin_again", lambda args: None)
    run(out)
    assert len(begun(out)) == 12, "a finished stage was run again"
    monkeypatch.setenv("CASES", "right wrong missing fault crash after last")
    with Record(out, "smoke").changed() as content:
        content["expected"] = 7
    run(out)
    assert begun(out)[12:] == ["last"]


@pytest.mark.long("whole commands")
def test_a_hang_ends_with_its_time(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("CASES", "right hang last")
    start = time.time()
    assert run(out, "--minutes", "0.12") == 0, "what has no time left has not failed"
    assert time.time() - start < 20
    found = Record(out, "smoke").read()
    assert not records.finished(found)
    assert [c["status"] for c in found["cases"].values()] == [PASSED, STOPPED]
    assert found["seconds"] >= 6
    assert "**2 left**" in summary.state(found)
    # After two fair tries it is what it is.
    monkeypatch.setattr(records, "FAIR", 0.0)
    record = Record(out, "smoke")
    for _ in range(2):
        record.open_again()
        assert record.claim(["right", "hang", "last"]) == "hang"
        assert record.settle(os.getpid(), "stopped: no time left", True)
    assert record.read()["cases"]["hang"]["status"] == FAILED
    assert record.claim(["right", "hang", "last"]) == "last"


def test_a_stage_that_does_not_begin_is_no_loss(
    script: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script.write_text("raise SystemExit('a typo')")
    assert run(tmp_path / "out") == 1
    found = Record(tmp_path / "out", "smoke").read()
    assert "ended with 1: a typo" in found["problem"]
    assert "a typo" in (tmp_path / "out" / "summary.md").read_text()


def test_time_goes_to_the_stages_by_their_shares(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: dict[str, float] = {}
    clock = [1000.0]

    def run_stage(args: Any, name: str, seconds: float, source: str) -> dict[str, Any]:
        given[name] = seconds
        clock[0] += 1 if name == "smoke" else seconds
        return Record(tmp_path, name).read()

    monkeypatch.setattr(driver, "run_stage", run_stage)
    monkeypatch.setattr(driver.time, "time", lambda: clock[0])
    monkeypatch.setattr(driver, "write_summary", lambda *args: {})
    driver.run_all(driver.parse(["--out", str(tmp_path)]), "source", "command")
    assert list(given) == list(stages.STAGES)
    total = sum(s.share for s in stages.STAGES.values())
    assert given["smoke"] == pytest.approx(540 * stages.STAGES["smoke"].share / total)
    # What the first did not need, the others have.
    assert sum(given.values()) - given["smoke"] == pytest.approx(539)


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert driver.main(["--out", str(tmp_path / "out")]) == 2
    assert "--rehearse" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


def test_a_python_of_the_system_gets_an_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEP 668: pip refuses to install into the Python of Debian, Ubuntu and others."""
    (tmp_path / "EXTERNALLY-MANAGED").touch()
    monkeypatch.setattr(driver.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(sys, "prefix", sys.base_prefix)
    assert driver.externally_managed()
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "venv"))
    assert not driver.externally_managed()

    python = driver.own_python(tmp_path)
    assert python == tmp_path / "venv" / "bin" / "python"
    assert "include-system-site-packages = true" in (tmp_path / "venv/pyvenv.cfg").read_text()
    code = "import sys; print(sys.prefix != sys.base_prefix)"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"

    # The whole command goes on there; where there is no environment it says what to do.
    ran: list[list[str]] = []

    def again(command: list[str], **_: Any) -> Any:
        ran.append(command)
        return subprocess.CompletedProcess(command, 7, "", "No module named venv")

    monkeypatch.setattr(driver, "externally_managed", lambda: True)
    monkeypatch.setattr(driver.subprocess, "run", again)
    words = ["--rehearse", "--out", str(tmp_path)]
    assert driver.main(words) == 7
    assert ran == [[str(python), "-m", "bench.gpu", *words]]
    problem = driver.own_python(tmp_path / "other")
    assert isinstance(problem, str)
    assert "PEP 668" in problem and "No module named venv" in problem


# ---- the summary ---------------------------------------------------------------------------------


def bench_case(name: str, flops: float, **milliseconds: float) -> dict[str, Any]:
    def row(impl: str, ms: float) -> dict[str, Any]:
        times = [ms * 1e-3] * 3
        about = {"name": impl, "times": times, "wall": times, "memory": 1, "beyond": 30 * 2**20}
        return about | {"errors": [], "failures": [], "left_out": None, "another": False}

    rows = [row(n, ms) for n, ms in milliseconds.items()]
    data = {"case": {"name": name, "group": "shapes"}, "flops": flops, "floor_seconds": 9e-5}
    return {"status": PASSED, "line": "", "data": data | {"results": rows}}


def contents(**cases: dict[str, Any]) -> dict[str, dict[str, Any]]:
    empty = {"expected": None, "seconds": 0.0, "problem": None, "cases": {}}
    return {
        n: empty | ({"cases": cases[n], "expected": len(cases[n])} if n in cases else {})
        for n in stages.STAGES
    }


def test_targets_are_met_or_not() -> None:
    measured = {
        "paper": bench_case("paper", 1.0, triton=0.19, triton_graph=0.25),
        "big100": bench_case("big100", 100.0, triton=10.0),
        "huge": bench_case("huge", 1600.0, triton=180.0),
        "big20 tf32": bench_case("big20 tf32", 1.0, triton=4.0, eager=9.0),
    }
    ratios = {
        "both": {"status": PASSED, "line": "", "data": {"ratio": 2.0}},
        "statistics": {"status": PASSED, "line": "", "data": {"ratio": 1.2}},
    }
    text = summary.markdown(contents(bench=measured, options=ratios), "command", False, "s")
    lines = text.splitlines()

    def line(start: str) -> str:
        return next(x for x in lines if x.startswith(start))

    assert line("| paper | GPU time | 0.19 ms").endswith("| met |")
    assert line("| paper | wall time, graph | 0.25 ms").endswith("| **not met** |")
    assert line("| big100 | GPU time | 10 ms").endswith("| the second, too |")
    assert line("| paper50 | GPU time |").endswith("| not measured |")
    assert line("| big20, tf32: of eager's time | 0.444").endswith("| met |")
    assert line("| huge: rate over big100's | 0.889").endswith("| **not met** |")
    assert line("| both: over the bare loss | 2.000").endswith("| met |")
    assert line("| statistics: over the bare loss | 1.200").endswith("| **not met** |")
    assert line("| log_q: over the bare loss |").endswith("| not measured |")
    assert line("| smoke |").startswith("| smoke | not begun |")


def test_a_wrong_result_meets_no_target() -> None:
    measured = {"big20 tf32": bench_case("big20 tf32", 1.0, triton=4.0, eager=9.0)}
    measured["big20 tf32"]["data"]["results"][0]["failures"] = ["over"]
    results = summary.results_of(contents(bench=measured), "command")
    assert summary.relative_goals(results)[0][1] is None


# ---- what other programs print -------------------------------------------------------------------


def test_pytest_is_read() -> None:
    assert tools.of_pytest(0, "....\n12 passed, 3 skipped in 4.0s").line.startswith("12 passed")
    text = "FAILED tests/test_loss.py::test_a[triton] - Assertion\n1 failed, 2 passed in 1s"
    failed = tools.of_pytest(1, text)
    assert failed.status == FAILED
    assert "first: tests/test_loss.py::test_a[triton]" in failed.line
    assert tools.of_pytest(5, "3 deselected").status == FAILED


@pytest.mark.parametrize(
    ("code", "text", "status", "line"),
    [
        (0, "x\n========= ERROR SUMMARY: 0 errors\n", PASSED, "no errors"),
        (
            0,
            "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)",
            PASSED,
            "no errors",
        ),
        (
            66,
            "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 2 bytes\n"
            "=========     at contrast+0x1a0\n========= ERROR SUMMARY: 12 errors",
            FAILED,
            "12 errors; first: Invalid __global__ read of size 2 bytes at contrast+0x1a0",
        ),
        (
            66,
            "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)",
            FAILED,
            "2 errors",
        ),
        (1, "========= ERROR SUMMARY: 0 errors", FAILED, "no errors, but exit code 1"),
        (139, "Segmentation fault", FAILED, "no summary (exit code 139): Segmentation fault"),
    ],
)
def test_the_sanitizer_is_read(code: int, text: str, status: str, line: str) -> None:
    found = tools.of_sanitizer(code, text)
    assert found.status == status
    assert found.line.startswith(line)


NCU = """\
==PROF== Connected to process 12
"ID","Kernel Name","launch__registers_per_thread",\
"sm__inst_executed_pipe_tensor_op_hmma.avg.pct_of_peak_sustained_active",\
"smsp__issue_active.avg.per_cycle_active",\
"smsp__average_warps_issue_stalled_long_scoreboard_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_selected_per_issue_active.ratio",\
"smsp__average_warps_issue_stalled_wait_per_issue_active.ratio"
"","","register/thread","%","inst/cycle","inst","inst","inst"
"0","contrast","246","71.5","0.43","1.25","1.00","0.75"
"1","contrast","245","69.0","0.41","n/a","1.00","1,000.5"
"""


def test_ncu_is_read() -> None:
    found = tools.of_ncu(0, NCU)
    assert found.status == PASSED
    first, second = found.data["kernels"]
    assert first["tensor_pipe_percent"] == 71.5
    assert first["issue_slots_percent"] == pytest.approx(43)
    assert first["stalls"] == {"long_scoreboard": 1.25, "wait": 0.75}
    assert first["registers"] == 246
    assert second["stalls"] == {"wait": 1000.5}
    assert "contrast: tensor pipe 71.5 %" in found.line
    assert "contrast: tensor pipe 69.0 %" in found.line
    assert tools.of_ncu(1, "==ERROR== ERR_NVGPUCTRPERM").status == SKIPPED
    assert tools.of_ncu(1, "==ERROR== no kernels were profiled").status == FAILED


def test_the_kernels_that_are_profiled_are_there() -> None:
    source = "".join(p.read_text() for p in (ROOT / "kernels" / "triton").rglob("*.py"))
    launched = re.findall(r"^@kernel.*\ndef (\w+)\(", source, re.MULTILINE)
    pattern = tools.KERNELS.removeprefix("regex:")
    chosen = {name for name in launched if re.search(pattern, name)}
    assert "contrast" in chosen
    assert {name.rpartition("_")[2] for name in chosen} >= {"scores", "columns", "history"}
    command = tools.profile_command("candidate paper, cosine", Path("log.csv"))
    assert command[command.index("--kernel-name") + 1] == tools.KERNELS
    assert command[-5:] == ["--shape", "paper", "--attention", "candidate", "--cosine"]


def test_the_default_call_is_measured_first() -> None:
    known = {c.name: c for c in bench_cases.cases("cuda")}
    assert set(stages.FIRST) <= set(known)
    assert stages.FIRST[0] == "candidate paper"
    for shape in ("paper", "paper50", "big20"):
        for cosine in (False, True):
            case = known[f"candidate {shape}{', cosine' * cosine}"]
            assert case.shape == SHAPES[shape]
            assert case.options.attention == "candidate" and case.options.cosine is cosine
    assert {c.dtype for c in known.values() if c.group == "candidate"} >= {"float32", "float16"}


def test_a_missing_tool_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "found", lambda tool: None)
    real = Setting(tmp_path, False, time.time() + 60)
    for found in (tools.sanitize("memcheck", real), tools.profile("paper", real)):
        assert found.status == SKIPPED
        assert "not on the PATH" in found.line
    assert tools.sanitizer_command("racecheck")[:3] == ["compute-sanitizer", "--tool", "racecheck"]


def test_our_own_missing_module_is_no_skip() -> None:
    def typo() -> Result:
        raise ModuleNotFoundError("No module named 'bench.nothing'", name="bench.nothing")

    with pytest.raises(ModuleNotFoundError):
        worker.attempt(typo)
