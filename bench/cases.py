"""Everything that `python -m bench` measures, and what it should reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from bench.candidates import OURS
from bench.loss import Case
from bench.problems import SHAPES
from courier_fast import surroundings
from courier_fast.testing.batches import Options, Shape

GROUPS = ("shapes", "dims", "rows", "types", "candidate", "courier", "options")
_NO_COMPILE = ("reference", "eager", "lce", *OURS)
# The options of the loss, each to be compared with the bare one.
VARIANTS = {
    "bare": Options(),
    "item ids": Options(ids=True),
    "log_q": Options(log_q=True),
    "weights": Options(weights=True),
    "page": Options(negatives="page"),
    "other pages": Options(negatives="other_pages"),
    "identify": Options(direction="identify"),
    "both": Options(direction="both"),
    "learned temperature": Options(learn_tau=True),
    "statistics": Options(stats=True),
}


def options_shape(device: str) -> Shape:
    """On which the variants are measured."""
    return SHAPES["big20"] if device == "cuda" else Shape(1024, 5, 20, 256, 0.2)


def _items(device: str, dtype: str) -> Case:
    """The paper's pages with longer histories, 15,360 and about 30,720 occurrences, of 4,000
    items."""
    return Case("items", Shape(3072, 5, 19, 256, 0.2), Options(unique_items=4000), dtype)


def _candidate(dtype: str) -> list[Case]:
    """Attention for each candidate, by dot products and by cosines: 512 pages, and fewer with
    shorter rows."""
    # By cosines, others take as long as by dot products, and some of them minutes.
    names = {False: ("eager", "eager_full", "compile", *OURS), True: ("eager", *OURS)}
    sizes = {
        "candidate": Shape(512, 5, 20, 256, 0.2),
        "candidate small": Shape(128, 5, 20, 64, 0.2),
    }
    return [
        Case(
            f"{name}{', cosine' if cosine else ''}",
            shape,
            Options(attention="candidate", cosine=cosine),
            dtype,
            group="candidate",
            names=names[cosine],
        )
        for name, shape in sizes.items()
        for cosine in (False, True)
    ]


def _candidate_on_gpu() -> list[Case]:
    """The default call at the shapes of the anchor's, by dot products and by cosines; and what else
    decides which kernels it takes: the type, and long rows. At big20 eager code takes seconds."""
    few = Shape(512, 5, 20, 256, 0.2)
    found = [
        (f"candidate {name}", SHAPES[name], "bfloat16", ("eager", *OURS)[name == "big20" :])
        for name in ("paper", "paper50", "big20")
    ]
    found.append(("candidate float32", few, "float32", ("eager", *OURS)))
    found.append(("candidate float16", few, "float16", ("eager", *OURS)))
    found.append(("candidate D = 768", replace(few, dim=768), "bfloat16", ("eager", *OURS)))
    return [
        Case(
            f"{name}{', cosine' if cosine else ''}",
            shape,
            Options(attention="candidate", cosine=cosine),
            dtype,
            group="candidate",
            names=names,
        )
        for name, shape, dtype, names in found
        for cosine in (False, True)
    ]


def _courier(dtype: str) -> list[Case]:
    """The three losses of the authors, at 512 pages and at their 3,072."""
    return [
        Case(
            f"courier {pages:,} {dtype}",
            Shape(pages, 5, 5, 256, 0.2),
            Options(courier=True),
            dtype,
            group="courier",
            names=("eager", "compile", *OURS),
        )
        for pages in (512, 3072)
    ]


def _square(rows: int, dim: int) -> Shape:
    """N = M: every item was clicked."""
    return Shape(rows // 4, 4, 20, dim, 1.0)


def cases(device: str, quick: bool = False) -> list[Case]:
    """What is measured on a device ("cuda" or "cpu"), the variants apart."""
    if quick:
        names = _NO_COMPILE
        dtype = "bfloat16" if device == "cuda" else "float32"
        shape = "paper" if device == "cuda" else "tiny"
        found = [Case(shape, SHAPES[shape], dtype=dtype, names=names)]
        found += [replace(_items(device, dtype), names=names)] if device == "cuda" else []
        small = next(c for c in _candidate(dtype) if c.name == "candidate small")
        found.append(replace(small, names=tuple(n for n in small.names if n != "compile")))
        square = _square(2048, 256)
        return [*found, Case("N = M = 2,048", square, dtype=dtype, group="rows", names=names)]
    dims: tuple[int, ...]
    lengths: tuple[int, ...]
    types: list[Case] = []
    # Without products of it on this CPU, others take minutes for a step in bfloat16.
    dtype = "bfloat16" if device == "cuda" or surroundings.BFLOAT16_PRODUCTS else "float32"
    both = tuple(dict.fromkeys(["float32", dtype]))
    if device == "cuda":
        shapes = ("paper", "paper50", "big20", "big100", "big768", "huge")
        found = [Case(name, SHAPES[name]) for name in shapes]
        found += [_items(device, "bfloat16"), Case("forward", SHAPES["big100"], forward=True)]
        found.append(Case("big100 both", SHAPES["big100"], Options(direction="both")))
        dims, rows = (64, 128, 256, 384, 512, 768, 1024), 32_768
        lengths = (2048, 8192, 32_768, 131_072, 262_144)
        types = [
            Case("big20 tf32", SHAPES["big20"], dtype="float32", tf32=True, group="types"),
            Case("big20 float32", SHAPES["big20"], dtype="float32", group="types"),
        ]
    else:
        found = [Case("paper", SHAPES["paper"], dtype=each) for each in both]
        found += [_items(device, dtype)]
        found.append(Case("forward", SHAPES["paper"], dtype=dtype, forward=True))
        dims, rows = (64, 256, 768), 2048
        lengths = (1024, 2048, 4096, 8192)
    found += [c for each in (both if device == "cpu" else (dtype,)) for c in _candidate(each)]
    found += _candidate_on_gpu() if device == "cuda" else []
    found += [case for each in both for case in _courier(each)]
    found += [Case(f"D = {d}", _square(rows, d), dtype=dtype, group="dims") for d in dims]
    found += [Case(f"N = M = {n:,}", _square(n, 256), dtype=dtype, group="rows") for n in lengths]
    return [*found, *types]


def selected(
    device: str, quick: bool, names: Sequence[str] | None, groups: Sequence[str] | None
) -> list[Case]:
    found = cases(device, quick)
    if names is not None:
        unknown = sorted(set(names) - {c.name for c in found})
        if unknown:
            known = ", ".join(dict.fromkeys(c.name for c in found))
            raise ValueError(f"--case: expected some of {known}, got {', '.join(unknown)}")
        found = [c for c in found if c.name in names]
    return [c for c in found if groups is None or c.group in groups]


# ---- goals ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Goal:
    """At most this, and then at most that; a share of the floor: at least. On an H100 or H200,
    bfloat16 unless the case says otherwise."""

    case: str
    what: str  # a key of `MEASURES`
    first: float
    then: float | None = None


# What a goal is about: (candidates, unit, whether more is better).
MEASURES = {
    "GPU time": (("triton",), "ms", False),
    "wall time": (("triton",), "ms", False),
    "wall time, graph": (("triton_graph",), "ms", False),
    "memory over gradients": (("triton",), "MiB", False),
    "share of the floor": (("triton",), "%", True),
}

GOALS = (
    Goal("candidate paper", "GPU time", 0.9),
    Goal("paper", "GPU time", 0.22, 0.16),
    Goal("paper", "wall time", 0.32, 0.20),
    Goal("paper", "wall time, graph", 0.24, 0.20),
    Goal("paper", "memory over gradients", 48),
    Goal("paper50", "GPU time", 0.28, 0.20),
    Goal("big20", "GPU time", 2.6, 2.1),
    Goal("big20", "memory over gradients", 160),
    Goal("big100", "GPU time", 12.3, 10.4),
    Goal("big100", "memory over gradients", 200),
    Goal("big768", "GPU time", 31, 29),
    Goal("big768", "memory over gradients", 1536),
    Goal("huge", "memory over gradients", 2048),
    Goal("items", "GPU time", 0.15),
    Goal("forward", "GPU time", 3.6, 3.1),
    Goal("D = 64", "share of the floor", 50, 60),
    Goal("D = 128", "share of the floor", 60, 70),
    Goal("D = 384", "share of the floor", 55, 70),
    Goal("D = 512", "share of the floor", 70, 80),
    Goal("D = 1024", "share of the floor", 75, 85),
)

# Of ours over what is named, at most: (time, memory).
OVER_OTHERS = {
    (case, other): (0.25, 0.05)
    for case in ("candidate", "candidate, cosine")
    for other in ("eager", "eager_full")
} | {(f"courier 3,072 {dtype}", "eager"): (0.2, 0.05) for dtype in ("float32", "bfloat16")}

# Of a variant over the bare loss, in the same run.
VARIANT_GOALS = {
    "item ids": 1.15,
    "log_q": 1.15,
    "page": 1.15,
    "learned temperature": 1.15,
    "statistics": 1.05,
    "both": 2.1,
}
