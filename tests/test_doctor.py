"""courier-fast doctor: every missing thing is a line, and a wrong number is found and named."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from courier_fast.cli import main
from courier_fast.doctor import command, machine, probes
from courier_fast.doctor.cases import of_a_machine
from courier_fast.loss.problem import LaunchError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def said(step: Callable[[Any], None]) -> dict[str, str]:
    found: dict[str, str] = {}
    step(lambda name, text: found.update({name: text}))
    return found


# ---- what is there -------------------------------------------------------------------------------


def test_what_is_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines())
    assert torch.__version__ in lines["PyTorch"]
    assert {"courier_fast", "Python", "native library", *probes.MODULES} <= set(lines)
    assert 'impl="auto", cpu' in lines
    if not torch.cuda.is_available():
        assert lines["GPU"].startswith("none: ")


def broken_packages(folder: Path) -> dict[str, str]:
    """The environment of an installation in which everything is broken in a way of its own."""
    sources = {
        "torch": "raise OSError('libcudart.so.13: cannot open shared object file')",
        "triton": "print('a banner')\nraise SystemError('no such symbol')",
        "faiss": "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)",
        "ray": "raise ModuleNotFoundError(\"No module named 'ray'\", name='ray')",
        "xformers": "raise ModuleNotFoundError(\"No module named 'flash'\", name='flash')",
    }
    for name, source in sources.items():
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
    return os.environ | {"PYTHONPATH": str(folder)}


def test_what_is_missing_or_broken_is_a_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "courier_fast.cli", "doctor", "--check"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        env=broken_packages(tmp_path),
        cwd=tmp_path,
        check=False,
    )
    lines = done.stdout.splitlines()
    assert "PyTorch: broken: OSError: libcudart.so.13: cannot open shared object file" in lines
    assert "Triton: broken: SystemError: no such symbol" in lines
    assert "faiss: broken: its process ended by SIGSEGV" in lines
    assert "Ray: not installed (package ray)" in lines
    assert "xformers: broken: ModuleNotFoundError: No module named 'flash'" in lines
    assert "a banner" not in done.stdout
    assert lines[-1].startswith("nothing can be checked: OSError: libcudart")
    assert done.stderr == ""
    assert done.returncode == 1


def test_a_triton_that_is_broken_is_not_checked(tmp_path: Path) -> None:
    environment = broken_packages(tmp_path) | {"TRITON_INTERPRET": "1"}
    for name in ("torch", "xformers"):  # the rest is whole
        (tmp_path / name / "__init__.py").unlink()
        (tmp_path / name).rmdir()
    code = "from courier_fast.doctor import command; print([p.impl for p in command._paths()])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert (
        "not checked: triton: courier_fast.kernels.triton.loss cannot be imported: SystemError"
        in done.stdout
    )
    assert "'cpu'" in done.stdout.splitlines()[-1]


def test_a_hang_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "SECONDS", 0.3)
    monkeypatch.setattr(machine, "_BOOT", "import time; time.sleep(60)")
    monkeypatch.setattr(machine, "MODULES", {"faiss": "faiss"})
    assert dict(machine.lines())["faiss"] == "not imported within 0 s"


def test_a_native_library_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, probes.NATIVE, None)  # type: ignore[arg-type]
    assert said(probes._native)["native library"].startswith(
        "courier_fast._native is missing or does not load: "
    )


def test_a_driver_that_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    def init() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "init", init)
    assert "too old (found version 11040)" in said(probes._gpus)["GPU"]


def test_gpus_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    about = SimpleNamespace(
        name="A GPU", major=9, minor=0, total_memory=80 * 2**30, multi_processor_count=132
    )
    about.shared_memory_per_block_optin = 227 * 1024
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: about)
    found = said(probes._gpus)
    assert list(found) == ["GPU 0", "GPU 1"]
    assert found["GPU 1"] == (
        "A GPU, compute capability 9.0, 80 GiB, 132 multiprocessors, "
        "227 KiB of shared memory a block"
    )


def test_why_auto_takes_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    from courier_fast.kernels.cpu import native

    cpu = torch.device("cpu")
    assert probes._chosen(cpu, torch.float16).startswith("reference (dtype is torch.float16; ")
    monkeypatch.setattr(native, "library", None)
    monkeypatch.setattr(native, "error_text", "no such file")
    assert "does not load: no such file" in probes._chosen(cpu, torch.float32)


# ---- the check -----------------------------------------------------------------------------------


@pytest.fixture
def checked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """The lines of a check of one path, in float32, of some cases or all; it has to end so."""

    def check(impl: str, status: int = 1, only: Callable[[str], bool] | None = None) -> list[str]:
        device = "cuda" if torch.cuda.is_available() and impl != "cpu" else "cpu"
        path = command.Path(impl, impl, device, ("float32",))
        monkeypatch.setattr(command, "_paths", lambda: iter([path]))
        if only is not None:
            cases = [x for x in of_a_machine("float32", 32, 320) if only(x.name)]
            monkeypatch.setattr(command, "_cases", lambda path, dtype: cases)
        assert command.check() == status
        return capsys.readouterr().out.splitlines()

    return check


def tensors(x: Any) -> Iterator[Tensor]:
    if isinstance(x, Tensor):
        if x.is_floating_point():
            yield x
    elif isinstance(x, tuple):
        for y in x:
            yield from tensors(y)


def spoiled(launch: Callable[..., Any]) -> Callable[..., Any]:
    """What is launched, with every number that it writes a hundredth too large."""

    def run(*args: Any, **kwargs: Any) -> Any:
        found = [*tensors(args), *tensors(tuple(kwargs.values()))]
        before = [x.clone() for x in found]
        result = launch(*args, **kwargs)
        for x, old in zip(found, before, strict=True):
            x.copy_(torch.where(x != old, x * 1.01, x))
        return result

    return run


def kernels(package: str = "") -> dict[str, Any]:
    """Those of `kernels/triton`, by name."""
    import courier_fast.kernels.triton.loss  # noqa: F401

    inside = f"courier_fast.kernels.triton.{package}"
    found = (x for n, m in sys.modules.items() if n.startswith(inside) for x in vars(m).values())
    return {
        x.fn.__name__: x
        for x in found
        if hasattr(x, "run") and not isinstance(x, type) and "run" in vars(x)
    }


TRITON = {
    "attend": "reconstruct, no gradient",
    "contrast": "given, no gradient",
    "sequence_losses": "click sequence, no gradient",
    "attend_dkv": "reconstruct",
    "pv_gradient": "reconstruct",
    "reconstruction_gradient": "given",
    "page_mean": "click sequence, no gradient",
    "row_gradients": "weights, statistics",
    "transposed_product": "anchor, wide",
}


def found_wrong(path: str, case: str, name: str, lines: list[str]) -> None:
    """A check that ended with the case and names the kernel and the sizes."""
    *before, wrong, _ = lines
    assert all(" of its budget" in line for line in before)
    where, _, about = wrong.partition(": WRONG: ")
    assert where.startswith(f"{path}: {case}: float32, 5 pages of 3, history to 4, D = ")
    assert about.startswith("N = 15, M = ")
    assert " x its budget; kernels: " in about
    assert not name or name in about.partition("kernels: ")[2].split(", ")


@pytest.mark.long("planted faults", short=("attend", "reconstruction_gradient"))
@pytest.mark.parametrize("name", TRITON)
def test_a_planted_wrong_number_names_its_kernel(
    name: str, monkeypatch: pytest.MonkeyPatch, checked: Callable[..., list[str]]
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    found = kernels()[name]
    monkeypatch.setattr(found, "run", spoiled(found.run))
    found_wrong("triton", TRITON[name], name, checked("triton"))


def test_wrong_numbers_of_attention_for_each_candidate_are_found(
    monkeypatch: pytest.MonkeyPatch, checked: Callable[..., list[str]]
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    others = kernels("candidate")
    assert others
    for found in others.values():
        monkeypatch.setattr(found, "run", spoiled(found.run))
    lines = checked("triton", only=lambda name: name.startswith("candidate"))
    found_wrong("triton", "candidate", "", lines)


NATIVE = {
    "attend": "reconstruct, no gradient",
    "finish": "given, no gradient",
    "attend_backward": "reconstruct",
    "normalize_backward": "given",
    "candidate": "candidate",
}


@pytest.mark.parametrize("name", NATIVE)
def test_a_planted_wrong_number_names_its_native_stage(
    name: str, monkeypatch: pytest.MonkeyPatch, checked: Callable[..., list[str]]
) -> None:
    import courier_fast.kernels.cpu.loss  # noqa: F401
    from courier_fast.kernels.cpu import native

    if native.library is None:
        pytest.skip(native.error_text)
    right = native.call
    wrong = spoiled(right)
    for module in [m for n, m in sys.modules.items() if n.startswith("courier_fast.kernels.cpu.")]:
        if vars(module).get("call") is right:
            monkeypatch.setattr(
                module, "call", lambda n, *a: (wrong if n == name else right)(n, *a)
            )
    found_wrong("cpu", NATIVE[name], name, checked("cpu"))


def test_what_an_implementation_refuses_is_not_checked(
    monkeypatch: pytest.MonkeyPatch, checked: Callable[..., list[str]]
) -> None:
    pytest.importorskip("courier_fast._native")
    from courier_fast.loss import operators

    reasons = operators.unavailable_reasons

    def refused(impl: str, p: Any) -> list[str]:
        return ["shared memory"] if p.attention == "candidate" else reasons(impl, p)

    monkeypatch.setattr(operators, "unavailable_reasons", refused)
    first, second, last = checked("cpu", 0, lambda name: name in ("anchor", "candidate"))
    assert "cpu: anchor: " in first and " of its budget" in first
    assert second.startswith("cpu: candidate: ") and second.endswith("not checked: shared memory")
    assert last.startswith("all 1 right, ")


@pytest.mark.skipif(not INTERPRETED, reason="interpreted")
def test_a_kernel_that_cannot_be_launched_is_named(
    monkeypatch: pytest.MonkeyPatch, checked: Callable[..., list[str]]
) -> None:
    def run(*args: Any, **kwargs: Any) -> None:
        raise LaunchError("the kernel attend cannot be launched, OutOfResources: shared memory")

    monkeypatch.setattr(kernels()["attend"], "run", run)
    lines = checked("triton")
    assert any("the kernel attend cannot be launched, OutOfResources" in line for line in lines)
