"""Kernel launches as the pipeline makes them, recorded instead of run.

Nothing in the pipeline looks at data on the host, so it can be walked through without a GPU; what
it would have launched, with the types and constants of each launch, is what tests compile for other
GPUs and what tuning looks at.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

if TYPE_CHECKING:
    from courier_fast.loss.problem import Problem

_CONTRAST = (
    "contrast",
    "scores",
    "product",
    "transposed_product",
    "binned_scores",
    "binned_gradients",
    "binned_columns",
    "binned_history",
    "lane_scores",
    "lane_columns",
    "lane_history",
)


@dataclass(frozen=True)
class Launch:
    """One kernel with the argument types, alignment and constants of a launch."""

    name: str
    fn: Any
    signature: dict[str, Any]  # types; of an argument that is a tuple, a tuple of them
    # By place among the arguments, and in the argument if it is a tuple:
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]  # what is known to be a multiple of 16
    num_warps: int
    num_stages: int
    fp_fusion: bool  # a product and a sum are rounded once
    registers: int | None  # at most, of a thread

    @property
    def key(self) -> str:
        """What it compiles to depends on nothing else, but the target."""
        numbers = self.num_warps, self.num_stages, self.fp_fusion, self.registers
        return repr((self.name, self.signature, self.constants, self.attributes, numbers))

    @property
    def constexprs(self) -> dict[str, Any]:
        """The constants by name; of an argument that holds several, each by its own."""
        found: dict[str, Any] = {}
        for (place, *inside), x in self.constants.items():
            if not inside:
                name = self.fn.arg_names[place]
                found |= x._asdict() if hasattr(x, "_asdict") else {name: x}
        return found

    @property
    def needs_wgmma(self) -> bool:
        """Whether Hopper's fast matrix instructions are expected: the contrast, unless float32 must
        be exact."""
        wide = self.constexprs.get("BLOCK_M", 0) >= 64
        return self.name in _CONTRAST and wide and self.constexprs["PRECISION"] != "ieee"


class _Driver:
    """Stands in for Triton's driver: a GPU of some compute capability, on which nothing runs."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> str:
        # A kernel keeps what it compiled by device: no other driver has this one.
        return f"recorded sm_{self._capability}"

    def get_current_stream(self, _device: str) -> int:
        return 0


@contextlib.contextmanager
def recorded(capability: int = 90) -> Iterator[list[Launch]]:
    """What is launched inside, as Triton would compile it for a GPU of this compute capability;
    yields the list that fills.

    The launches take Triton's own way to the compiler: which arguments become constants or are
    known to be multiples of 16 is its decision. Instead of compiling, what it decided is noted.
    """
    launches: list[Launch] = []

    def note(*_: Any, fn: Any, compile: dict[str, Any], **__: Any) -> bool:
        fn = fn.jit_function
        options = json.loads(compile["specialization_data"])["options"]
        launch = Launch(
            name=fn.fn.__name__,
            fn=fn,
            signature=dict(compile["signature"]),
            constants=dict(compile["constants"]),
            attributes={place: x for place, x in compile["configs"][0].items() if x},
            num_warps=options["num_warps"],
            num_stages=options["num_stages"],
            fp_fusion=options["enable_fp_fusion"],
            registers=options["maxnreg"],
        )
        launches.append(launch)
        return True  # neither compile nor launch it

    runtime = triton.knobs.runtime
    driver, hook = triton.runtime.driver, runtime.jit_cache_hook
    before = driver._active
    driver.set_active(_Driver(capability))
    runtime.jit_cache_hook = note
    try:
        yield launches
    finally:
        runtime.jit_cache_hook = hook
        driver._active = before


# Problems that between them launch every kernel in every way that changes its code: (embedding
# dimension, type, options). The first few are what users run most; the others vary one thing each.
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
    "fp16-256": (256, _FP16, {}),
    "tf32-256": (256, _FP32, {"tf32": True}),
    "fp32-64": (64, _FP32, {}),
    "fp32-1024": (1024, _FP32, {}),
    "learned-temperature": (256, _BF16, {"tensor_tau": True}),
    "both": (256, _BF16, {"direction": "both"}),
    "page": (256, _BF16, {"negatives": "page"}),
    "log-q": (256, _BF16, {"log_q": True}),
    "stats": (256, _BF16, {"stats": True}),
    "heads": (256, _BF16, {"num_heads": 4, "projected": True}),
    "given": (256, _BF16, {"given": True, "direction": "both"}),
    "candidate-256": (256, _BF16, {"attention": "candidate", "cosine": True}),
    "candidate-128": (
        128,
        _BF16,
        {"attention": "candidate", "cosine": True, "log_q": True, "negatives": "other_pages"},
    ),
    "candidate-items": (
        256,
        _BF16,
        {"attention": "candidate", "cosine": True, "table": True, "tensor_tau": True},
    ),
    "candidate-dot": (256, _BF16, {"attention": "candidate"}),
    "candidate-ids": (256, _BF16, {"attention": "candidate", "ids": True}),
    "candidate-projected": (256, _BF16, {"attention": "candidate", "projected": True}),
    "candidate-heads": (256, _BF16, {"attention": "candidate", "num_heads": 4, "projected": True}),
    "candidate-fp32-64": (64, _FP32, {"attention": "candidate", "cosine": True}),
    "candidate-fp16-128": (128, _FP16, {"attention": "candidate", "cosine": True}),
}


def launches_of(label: str, capability: int = 90) -> list[Launch]:
    """The launches of the loss on one of these problems, forward and backward; with COMMON ones
    also those of `reconstruct` and the click-sequence loss. Without repeats. With the tiles for a
    compute capability."""
    dim, dtype, options = (COMMON | SPECIAL)[label]
    return launches(dim, dtype, capability, everything=label in COMMON, **options)


def launches(
    dim: int,
    dtype: torch.dtype,
    capability: int = 90,
    *,
    everything: bool = True,
    stats: bool = False,
    tf32: bool = False,
    **options: Any,
) -> list[Launch]:
    """The launches for such a problem; `options` are those of `_problem`."""
    from courier_fast.kernels.triton import loss as triton_loss
    from courier_fast.kernels.triton import tiles
    from courier_fast.loss.problem import Needs, SequenceProblem

    p = _problem(dim, dtype, **options)
    sequence = SequenceProblem(
        history=p.pv if p.history is None else p.history,
        history_index=p.history_index,
        history_offsets=p.history_offsets,
        history_mask=p.history_mask,
        item_ids=None if p.item_ids is None else torch.zeros(p.num_history, dtype=torch.int64),
        temperature=p.temperature,
        tau=p.tau,
        reduction=p.reduction,
    )
    needs = Needs(*(getattr(p, name) is not None for name in Needs._fields))

    def grad(rows: int) -> torch.Tensor:
        return torch.ones(rows if p.reduction == "none" else ())

    before = torch.get_float32_matmul_precision(), tiles.TARGET
    tiles.TARGET = capability
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        with recorded(capability) as found:
            triton_loss.loss_forward(p, Needs(), stats)
            saved = triton_loss.loss_forward(p, needs, stats)[-1]
            triton_loss.loss_backward(p, needs, saved, grad(p.num_pv))
            if everything:
                q = replace(p, direction="reconstruct")
                triton_loss.reconstruct_forward(q)
                triton_loss.reconstruct_backward(
                    q, needs._replace(temperature=False), p.pv.new_empty(p.num_pv, dim)
                )
                asked = Needs(history=True, temperature=needs.temperature)
                _, saved = triton_loss.sequence_forward(sequence, asked)
                triton_loss.sequence_backward(sequence, asked, saved, grad(sequence.num_history))
    finally:
        torch.set_float32_matmul_precision(before[0])
        tiles.TARGET = before[1]
    return list({x.key: x for x in found}.values())


def _problem(
    dim: int,
    dtype: torch.dtype,
    *,
    pages: int = 512,
    items: int = 4,
    past: int = 16,
    masks: bool = False,
    weights: bool = False,
    log_q: bool = False,
    table: bool = False,
    **options: Any,
) -> Problem:
    """Pages of so many items and so much history each, which hold nothing; `options` are those of
    `testing.problems.problem`."""
    from courier_fast.testing.problems import NoValues, problem

    pv, history = ((pages * n, torch.arange(pages + 1) * n) for n in (items, past))
    given = {"mask": masks or table, "weights": weights or log_q, "log_q": log_q, "table": table}
    return problem(NoValues(), pv, history, dim=dim, dtype=dtype, **given, **options)


# ---- what a launch compiles to -------------------------------------------------------------------


@dataclass(frozen=True)
class Compiled:
    """What a kernel needs on a GPU that need not be there."""

    registers: int  # of a thread
    spilled: int  # bytes of a thread's stack
    shared: int  # bytes
    wgmma: int  # Hopper's matrix instructions, in the whole kernel
    # Instructions of the innermost loop with matrix instructions, by kind; {} without one, or where
    # nobody asked.
    loop: dict[str, int]


def source_of(launch: Any) -> ASTSource:
    """What Triton compiles for a launch."""
    return ASTSource(launch.fn, launch.signature, launch.constants, launch.attributes)


def _options(launch: Any) -> dict[str, Any]:
    return {
        "num_warps": launch.num_warps,
        "num_stages": launch.num_stages,
        "maxnreg": launch.registers,
        "enable_fp_fusion": True,
    }


def lowered(
    launch: Any, capability: int, stages: Sequence[str] = ("ttir", "ttgir", "llir")
) -> dict[str, Any]:
    """What Triton knows of a kernel after its own stages, "module" (the program) among it, "shared"
    (bytes of shared memory) after the last of them; without machine code, which takes most of the
    time."""
    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    options = backend.parse_options(_options(launch))
    source = source_of(launch)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    known: dict[str, Any] = {}
    backend.add_stages(known, options, source.language)
    code = backend.get_codegen_implementation(options)
    module = source.make_ir(target, options, code, backend.get_module_map(), context)
    metadata: dict[str, Any] = {"target": target, **options.__dict__}
    for stage in stages:
        module = known[stage](module, metadata)
    return metadata | {"module": module, "context": context}  # in which the program lives


def compiled(launch: Any, capability: int, with_loop: bool = False) -> Compiled:
    """Compiles a launch for an NVIDIA GPU of some compute capability; `with_loop` disassembles it,
    which takes longer. Not under TRITON_INTERPRET=1."""
    kernel = triton.compile(
        source_of(launch),
        target=GPUTarget("cuda", capability, 32),
        options=_options(launch),
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
    """Instructions of the shortest backward jump around matrix instructions, without what a forward
    jump inside leaves out: the masks, which only the diagonal's blocks need."""
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
        j
        for to, i in jumps
        if begin <= i < to < end and not multiplies(i, to)
        for j in range(i + 1, to)
    }
    kinds: dict[str, int] = {}
    for i in range(begin, end):
        if i not in skipped:
            kind = re.sub(r"^@!?U?P\w+\s+", "", instructions[i][1]).split()[0].split(".")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
    return kinds
