"""Kernel launches as the pipeline makes them, recorded instead of run.

Nothing in the pipeline looks at data on the host, so it can be walked through without a GPU; what it would have
launched, with the types and constants of each launch, is what tests compile for other GPUs and what tuning looks at.
"""

from __future__ import annotations

import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import KernelInterface

# Shared memory a block can have, in bytes, by compute capability: a kernel that wants more compiles but cannot be launched.
SHARED_MEMORY = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}

_TYPES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}

_CONTRAST = ("contrast", "scores", "product", "transposed_product")


@dataclass(frozen=True)
class Launch:
    """One kernel with the argument types, alignment and constants of a launch."""

    name: str
    fn: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]  # arguments known to be multiples of 16
    num_warps: int
    num_stages: int

    @property
    def needs_wgmma(self) -> bool:
        """Whether Hopper's fast matrix instructions are expected: the contrast, unless float32 must be exact."""
        wide = self.constexprs.get("BLOCK_M", 0) >= 64
        return self.name in _CONTRAST and wide and self.constexprs["PRECISION"] != "ieee"


class _Recorder:
    """Stands in for a kernel: `kernel[grid](...)` notes the launch."""

    def __init__(self, name: str, fn: Any, launches: list[Launch]) -> None:
        self._name, self._fn, self._launches = name, fn, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*args: Any, num_warps: int = 4, num_stages: int = 3, **kwargs: Any) -> None:
            names = self._fn.arg_names
            values = dict(zip(names, args, strict=False)) | kwargs
            missing, extra = set(names) - set(values), set(values) - set(names)
            if missing or extra:
                raise TypeError(
                    f"{self._name}: missing arguments {sorted(missing)}, unknown arguments {sorted(extra)}"
                )
            constant = {p.name for p in self._fn.params if p.is_constexpr}
            signature: dict[str, str] = {}
            aligned = []
            for name in names:
                value = values[name]
                if name in constant:
                    signature[name] = "constexpr"
                elif isinstance(value, torch.Tensor):
                    signature[name] = "*" + _TYPES[value.dtype]
                    aligned.append(name)
                elif isinstance(value, int):
                    signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
                    if value % 16 == 0:
                        aligned.append(name)
                else:
                    signature[name] = "fp32"
            constexprs = {name: values[name] for name in names if name in constant}
            self._launches.append(
                Launch(
                    self._name,
                    self._fn,
                    signature,
                    constexprs,
                    tuple(aligned),
                    num_warps,
                    num_stages,
                )
            )

        return launch


@contextlib.contextmanager
def recorded(*modules: ModuleType) -> Iterator[list[Launch]]:
    """Replace the kernels of these modules by recorders; yields the list that fills."""
    launches: list[Launch] = []
    replaced: list[tuple[ModuleType, str, Any]] = []
    try:
        for module in modules:
            for name, value in list(vars(module).items()):
                if (
                    isinstance(value, (JITFunction, KernelInterface))
                    and value.__module__ == module.__name__
                ):
                    replaced.append((module, name, value))
                    setattr(module, name, _Recorder(name, value, launches))
        yield launches
    finally:
        for module, name, value in replaced:
            setattr(module, name, value)


# Problems that between them launch every kernel in every way that changes its code: (embedding dimension, type, options).
# The first few are what users run most; the others vary one thing each.
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32
COMMON: dict[str, tuple[int, torch.dtype, dict[str, Any]]] = {
    "bf16-256": (256, _BF16, {}),
    "bf16-768": (768, _BF16, {"reduction": "none"}),
    "items": (256, _BF16, {"table": True}),
}
SPECIAL: dict[str, tuple[int, torch.dtype, dict[str, Any]]] = {
    "fp32-256": (256, _FP32, {}),
    "bf16-64": (64, _BF16, {}),
    "bf16-128": (128, _BF16, {}),
    "bf16-1024": (1024, _BF16, {}),
    "fp16-256": (256, _FP16, {}),
    "fp16-1024": (1024, _FP16, {}),
    "tf32-256": (256, _FP32, {"tf32": True}),
    "fp32-64": (64, _FP32, {}),
    "fp32-1024": (1024, _FP32, {}),
    "learned-temperature": (256, _BF16, {"tensor_tau": True}),
    "both": (256, _BF16, {"direction": "both"}),
    "page": (256, _BF16, {"negatives": "page"}),
    "log-q": (256, _BF16, {"log_q": True}),
    "stats": (256, _BF16, {"stats": True}),
    "heads": (256, _BF16, {"num_heads": 4, "projected": True}),
    "fused-attention-128": (128, _BF16, {"fused": True}),
    "fused-attention-256": (256, _BF16, {"fused": True}),
}


def launches_of(label: str, capability: int = 90) -> list[Launch]:
    """The launches of the loss on one of these problems, forward and backward; with COMMON ones also those of
    `reconstruct` and the click-sequence loss. Without repeats. With the tiles for a compute capability."""
    from courier_fast.problem import Problem, SequenceProblem

    from . import chunked, click_sequence, configs, contrast, epilogue, pipeline, plan, reconstruct

    dim, dtype, options = (COMMON | SPECIAL)[label]
    options = dict(options)
    stats, ids = options.pop("stats", False), options.pop("ids", False)
    log_q, table = options.pop("log_q", False), options.pop("table", False)
    tf32, fused = options.pop("tf32", False), options.pop("fused", False)
    projected, tensor_tau = options.pop("projected", False), options.pop("tensor_tau", False)
    pages, items, past = 512, 4, 16
    rows, history_rows = pages * items, pages * past

    def embeddings(count: int) -> torch.Tensor:
        return torch.empty(count, dim, dtype=dtype)

    p = Problem(
        pv=embeddings(rows // 2 if table else rows),
        history=None if table else embeddings(history_rows),
        query=embeddings(rows) if projected else None,
        key=embeddings(history_rows) if projected else None,
        value=embeddings(history_rows) if projected else None,
        pv_index=torch.zeros(rows, dtype=torch.int64) if table else None,
        history_index=torch.zeros(history_rows, dtype=torch.int64) if table else None,
        pv_offsets=torch.arange(pages + 1) * items,
        history_offsets=torch.arange(pages + 1) * past,
        pv_mask=torch.ones(rows, dtype=torch.bool) if table else None,
        history_mask=torch.ones(history_rows, dtype=torch.bool) if table else None,
        clicked=torch.ones(rows, dtype=torch.bool),
        item_ids=torch.zeros(rows, dtype=torch.int64) if ids else None,
        log_q=torch.zeros(rows) if log_q else None,
        weights=torch.ones(rows) if log_q else None,
        temperature=torch.tensor(0.1) if tensor_tau else None,
        tau=0.1,
        attention_scale=dim**-0.5,
        **options,
    )
    history = p.pv if p.history is None else p.history
    sequence = SequenceProblem(
        history=history,
        history_index=p.history_index,
        history_offsets=p.history_offsets,
        history_mask=p.history_mask,
        item_ids=torch.zeros(history_rows, dtype=torch.int64) if ids else None,
        temperature=p.temperature,
        tau=p.tau,
    )
    needs = [
        getattr(p, name) is not None
        for name in ("pv", "history", "query", "key", "value", "temperature")
    ]
    before = torch.get_float32_matmul_precision(), configs.FUSED_STRIDES, configs.TARGET
    configs.TARGET = capability
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    if fused:
        configs.FUSED_STRIDES = frozenset({dim})
    one = torch.ones(()) if p.reduction != "none" else torch.ones(rows)
    try:
        with recorded(plan, reconstruct, contrast, chunked, epilogue, click_sequence) as launches:
            pipeline.loss_forward(p, [False] * 6, stats)
            saved = pipeline.loss_forward(p, needs, stats)[-1]
            pipeline.loss_backward(p, needs, saved, one)
            if label in COMMON:
                p = replace(p, direction="reconstruct")
                pipeline.reconstruct_forward(p)
                pipeline.reconstruct_backward(p, needs[:5], embeddings(rows))
                _, saved = pipeline.sequence_forward(sequence, [True, needs[5]])
                pipeline.sequence_backward(sequence, [True, needs[5]], saved, torch.ones(()))
    finally:
        torch.set_float32_matmul_precision(before[0])
        configs.FUSED_STRIDES, configs.TARGET = before[1:]
    distinct = {repr((x.name, x.signature, x.constexprs, x.aligned)): x for x in launches}
    return list(distinct.values())


# ---- what a launch compiles to ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on a GPU that need not be there."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes
    wgmma: int  # Hopper's matrix instructions, in the whole kernel
    loop: dict[
        str, int
    ]  # instructions of the innermost loop with matrix instructions, by kind; {} without one, or not asked for


def source_of(launch: Any) -> ASTSource:
    """Pointers are multiples of 16 bytes, as torch's are: it decides how loads compile."""
    signature, attributes = {}, {}
    names = launch.fn.arg_names
    missing = [n for n in names if n not in launch.signature and n not in launch.constexprs]
    if missing:
        raise ValueError(f"{launch.name}: no type for {', '.join(missing)}")
    for place, name in enumerate(names):
        kind = "constexpr" if name in launch.constexprs else launch.signature[name]
        signature[name] = kind
        if kind.startswith("*") or name in launch.aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(launch.fn, signature, constexprs=dict(launch.constexprs), attrs=attributes)


def compiled(launch: Any, capability: int, with_loop: bool = False) -> Compiled:
    """Compiles a launch for an NVIDIA GPU of some compute capability; `with_loop` disassembles it, which takes longer.
    Not under TRITON_INTERPRET=1."""
    kernel = triton.compile(
        source_of(launch),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": launch.num_warps, "num_stages": launch.num_stages},
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _dumped("--dump-resource-usage", file.name)
        loop = _hot_loop(_dumped("-sass", file.name)) if with_loop else {}
    # What functions have in common is listed as one more function: the kernel is the largest.
    found: dict[str, int] = {}
    for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", usage):
        found[key] = max(found.get(key, 0), int(value))
    return Compiled(
        registers=found["REG"],
        spilled=found["STACK"] + found.get("LOCAL", 0),
        shared=kernel.metadata.shared,
        wgmma=kernel.asm["ptx"].count("wgmma.mma_async"),
        loop=loop,
    )


def _dumped(what: str, file: str) -> str:
    """cuobjdump comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run(
        [str(tool), what, file], capture_output=True, text=True, check=True
    ).stdout


def _hot_loop(sass: str) -> dict[str, int]:
    """Instructions of the shortest backward jump around matrix instructions, without what a forward jump inside leaves
    out: the masks, which only the diagonal's blocks need."""
    instructions = [
        (int(address, 16), text)
        for address, text in re.findall(r"/\*([0-9a-f]{4,6})\*/\s+(.*?);", sass)
    ]
    place = {address: i for i, (address, _) in enumerate(instructions)}

    def target(i: int) -> int | None:
        jump = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", instructions[i][1])
        return None if jump is None else place.get(int(jump[1], 16))

    def multiplies(begin: int, end: int) -> bool:
        body = (text for _, text in instructions[begin:end])
        return any(re.search(r"\b[A-Z]G?MMA\b", text) and "FMA" not in text for text in body)

    jumps = [(to, i) for i in range(len(instructions)) if (to := target(i)) is not None]
    loops = [(to, i + 1) for to, i in jumps if to < i and multiplies(to, i)]
    begin, end = min(loops, key=lambda x: x[1] - x[0], default=(0, 0))
    skipped = {
        j for to, i in jumps if begin <= i < to < end and not multiplies(i, to) for j in range(i + 1, to)
    }  # fmt: skip
    kinds: dict[str, int] = {}
    for i in range(begin, end):
        if i not in skipped:
            kind = re.sub(r"^@!?U?P\w+\s+", "", instructions[i][1]).split()[0].split(".")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds
