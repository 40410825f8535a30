"""What is there, asked in a process of its own: an installation that is broken may end it.

    python -m courier_fast.doctor.probes losses

prints lines `name<tab>text`.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

Say = Callable[[str, str], None]

MODULES = {
    "Triton": "triton",
    "DALI": "nvidia.dali",
    "faiss": "faiss",
    "Ray": "ray",
    "xformers": "xformers.ops",
}
PACKAGES = {
    "Triton": "triton",
    "DALI": "nvidia-dali-cuda130",
    "faiss": "faiss-cpu",
    "Ray": "ray",
    "xformers": "xformers",
}
NATIVE = "courier_fast._native"


def version(name: str, say: Say) -> None:
    module = MODULES[name]
    importlib.import_module(module)
    top = importlib.import_module(module.removesuffix(".ops"))
    say(name, str(getattr(top, "__version__", "of no version")))


def losses(say: Say) -> None:
    """PyTorch, GPUs, the native library, and what the losses run on."""
    import torch

    built = f"CUDA {torch.version.cuda}" if torch.version.cuda else "no CUDA"
    if torch.version.hip:
        built = f"ROCm {torch.version.hip}"
    say("PyTorch", f"{torch.__version__}, built for {built}")
    for step in (_gpus, _native, _choices):
        try:
            step(say)
        except Exception as error:  # one that is broken keeps no other from being told
            say(step.__name__.strip("_"), f"cannot be asked: {_one_line(error)}")


def _one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"


def _gpus(say: Say) -> None:
    import torch

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        there = torch.cuda.is_available()
    if not there:
        said = [" ".join(str(w.message).split())[:400] for w in caught]
        if not said:
            try:
                torch.cuda.init()
            except Exception as error:  # of the driver, or a torch without CUDA
                said = [_one_line(error)]
        say("GPU", f"none: {'; '.join(said) or 'no CUDA device is visible'}")
        return
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        shared = getattr(about, "shared_memory_per_block_optin", 0) // 1024
        text = f"{about.name}, compute capability {about.major}.{about.minor}, "
        text += f"{about.total_memory / 2**30:.0f} GiB, {about.multi_processor_count} "
        say(f"GPU {i}", f"{text}multiprocessors, {shared} KiB of shared memory a block")


def _native(say: Say) -> None:
    try:
        library: Any = importlib.import_module(NATIVE)
    except ImportError as error:
        say("native library", f"{NATIVE} is missing or does not load: {error}")
        return
    from ..kernels.cpu.native import VARIANT_VARIABLE

    runs = library.variants()
    taken = os.environ.get(VARIANT_VARIABLE, runs[0])
    say("native library", f"takes {taken}; this CPU runs {', '.join(runs)}")


def _choices(say: Say) -> None:
    """Which implementation impl="auto" takes, and why not another."""
    import torch

    from ..loss.functional import AUTO
    from ..loss.operators import IMPLEMENTATIONS, unavailable_reasons

    for device in ["cuda"] * torch.cuda.is_available() + ["cpu"]:
        about = empty_problem(torch.device(device), torch.float32, 256, "candidate")
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            say(f'impl="auto", {device}', f"{str(dtype)[6:]}: {_chosen(about.pv.device, dtype)}")
        for impl in IMPLEMENTATIONS:
            reasons = unavailable_reasons(impl, about)
            if reasons and not AUTO[device].startswith(impl):
                say(f'impl="{impl}", {device}', f"not for: {'; '.join(reasons)}")


def _chosen(device: Any, dtype: Any) -> str:
    """Of every attention and dimension."""
    from ..loss.fallback import kernels_of
    from ..loss.functional import AUTO, choose
    from ..loss.operators import unavailable_reasons

    found: dict[tuple[str, str], list[str]] = {}
    for attention in ("candidate", "anchor"):
        for dim in (64, 128, 256, 512, 1024):
            p = empty_problem(device, dtype, dim, attention)
            chosen = kernels_of(choose("auto", p))
            wanted = kernels_of(AUTO[device.type])
            why = "" if chosen == wanted else "; ".join(unavailable_reasons(wanted, p))
            found.setdefault((chosen, why), []).append(f"{attention} D = {dim}")
    every = len(found) == 1
    return "; ".join(
        f"{chosen}{'' if every else ' for ' + ', '.join(which)}{f' ({why})' if why else ''}"
        for (chosen, why), which in found.items()
    )


def empty_problem(device: Any, dtype: Any, dim: int, attention: str) -> Any:
    """Without rows, with gradients."""
    import torch

    from ..testing.problems import NoValues, problem

    with torch.device(device):
        nothing = torch.zeros(1, dtype=torch.int64)
        p = problem(
            NoValues(), (0, nothing), (0, nothing), dim=dim, dtype=dtype, attention=attention
        )
    p.pv.requires_grad_()
    return p


def main() -> None:
    def say(name: str, text: str) -> None:
        print(f"{name}\t{text}", flush=True)

    if sys.argv[1] == "losses":
        losses(say)
    else:
        version(sys.argv[1], say)


if __name__ == "__main__":
    main()
