"""Helpers shared by the Triton kernels.

What belongs together is one argument, a NamedTuple that the host gives: of tensors and floats, None
where there is nothing; or of constants, whose parameter is a `tl.constexpr`. An integer, and an
address that is a multiple of 16 bytes in one batch and not in the next, is an argument of its own:
in a tuple both decide what is compiled, whatever `kernel` says. Types are outside too, as what is
compiled could not be noted down.

Up to Triton 3.6 a tuple that holds None cannot itself be compared with None: where there is nothing
at all, it holds None alone. Up to 3.6, too, a constant out of a tuple is a plain number, which
`tl.full` takes and `tl.zeros` does not; a string or a tuple out of one is first given a name.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import triton
import triton.language as tl

from ...loss.launched import tell
from ...loss.problem import LaunchError
from . import tiles

if TYPE_CHECKING:
    from ...loss.problem import Problem, SequenceProblem
    from ...loss.union.blocks import Scoring

# Vectors no longer than this count as zero: cosine 0, gradient 0.
NORM_EPS = tl.constexpr(1e-12)
LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# A fixed shift of 1/tau replaces the running maximum where exp(-2/tau) is far from float32's
# smallest number.
SMALLEST_FIXED_TAU = 0.05


# Addresses of one number among others, or of a row of a table: whether they are multiples of 16
# bytes says nothing.
_ANYWHERE = (
    "count_ptr",
    "place_ptr",
    "reconstructed_place_ptr",
    "y_place_ptr",
    "page_list_ptr",
    "page_count_ptr",
)


# What a launch reports of memory, and of kernels before it.
_OTHERS = (
    "out of memory",
    "illegal memory access",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "uncorrectable",
)


def kernel(
    fn: Callable[..., Any] | None = None,
    *,
    aligned: tuple[str, ...] = (),
    registers: int | None = None,
) -> Any:
    """A kernel that is launched: one compilation for any size.

    Triton would make a constant of an integer argument of 1, which has no methods, and compile anew
    for sizes that are multiples of 16; where that decides how wide loads are, the argument is named
    in `aligned`. Whether a product and a sum are rounded once is said here, because Triton's
    default changes. `registers` of a thread, as of a `configs.Tile`.

    A launch raises LaunchError where the kernel cannot be compiled, or not be launched.
    """
    if fn is None:
        return functools.partial(kernel, aligned=aligned, registers=registers)
    plain = [
        p.name
        for p in inspect.signature(fn).parameters.values()
        if "constexpr" not in str(p.annotation)
        and p.name not in aligned
        and (p.name[-4:] != "_ptr" or p.name in _ANYWHERE)
    ]
    compiled = triton.jit(fn, do_not_specialize=plain)
    launch = compiled.run
    if isinstance(compiled, triton.JITFunction):  # not in the interpreter
        launch = functools.partial(launch, enable_fp_fusion=True, maxnreg=registers)

    def run(*args: Any, **kwargs: Any) -> Any:
        tell(fn.__name__)
        try:
            return launch(*args, **kwargs)
        except Exception as error:  # of the compiler, ptxas, the C compiler of the launcher, CUDA
            what = f"{type(error).__name__}: {' '.join(str(error).split())[-400:]}"
            if any(words in what for words in _OTHERS):
                raise
            raise LaunchError(f"the kernel {fn.__name__} cannot be launched, {what}") from error

    compiled.run = run
    return compiled


_INTERPRETED = tl.constexpr(tiles.interpreted())


@triton.jit
def exp2_flushed(x):
    """2^x, 0 below float32's smallest normal number: what brings subnormal numbers about takes as
    long again."""
    if _INTERPRETED:
        return tl.exp2(x)
    else:
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def rsqrt_flushed(x):
    """1 / sqrt(x) of a normal number."""
    if _INTERPRETED:
        return tl.rsqrt(x)
    else:
        return tl.inline_asm_elementwise(
            "rsqrt.approx.ftz.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def page_of(offsets_ptr, row, pages, steps):
    """Page of each row: the last b with offsets[b] <= row; `pages` at or past the last offset."""
    low = tl.zeros_like(row)
    high = low + pages + 1
    for _ in range(steps):
        middle = (low + high) // 2
        open_ = low < high
        offset = tl.load(offsets_ptr + middle, mask=open_, other=0)
        below = offset <= row
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & (offset > row), middle, high)
    return low - 1


@triton.jit
def places_before(place_ptr, row):
    """Flagged rows among the first `row` ones, from the inclusive prefix sums."""
    return tl.load(place_ptr + row - 1, mask=row > 0, other=0)


class Source(NamedTuple):
    """Rows [*, D], and the table index they are read through or None."""

    rows: Any
    index: Any


@triton.jit
def source_row(source, row, mask):
    """Row of the source tensor as int64."""
    if source.index is not None:
        return tl.load(source.index + row, mask=mask, other=0).to(tl.int64)
    else:
        return row.to(tl.int64)


@triton.jit
def load_rows(
    source, row, mask, D: tl.constexpr, BLOCK_D: tl.constexpr, AGAIN: tl.constexpr = False
):
    """Rows of a source as [rows, BLOCK_D], zeros beyond D and where the mask is off; AGAIN: from
    memory, whatever was loaded before."""
    dims = tl.arange(0, BLOCK_D)
    start = source_row(source, row, mask) * D
    return tl.load(
        source.rows + start[:, None] + dims[None, :],
        mask=mask[:, None] & (dims < D)[None, :],
        other=0.0,
        eviction_policy="evict_first" if AGAIN else "",
    )


@triton.jit
def load_source(source, row, mask, how: tl.constexpr, AGAIN: tl.constexpr = False):
    """The same, of the constants of an attention."""
    return load_rows(source, row, mask, how.D, how.BLOCK_D, AGAIN)


@triton.jit
def score_scale(tau, TAU_IS_TENSOR: tl.constexpr):
    """log2(e) / tau, the factor from a cosine to a score in powers of two, rounded once.

    A temperature in device memory is read there; a float one comes as the finished factor.
    """
    if TAU_IS_TENSOR:
        return (1.0 / tl.load(tau).to(tl.float64) * LOG2E).to(tl.float32)
    else:
        return tau


def temperature(p: Problem | SequenceProblem | Scoring) -> dict[str, Any]:
    """What `score_scale` of the kernels takes."""
    known = p.temperature is None
    tau = 1.0 / (p.tau * math.log(2.0)) if known else p.temperature
    return {"tau": tau, "TAU_IS_TENSOR": not known}


NO_TAU = {"tau": 1.0, "TAU_IS_TENSOR": False}


@triton.jit
def unit_scale(norm):
    """1 / norm, 0 for a zero vector; NaN stays NaN so that it shows in the loss."""
    return tl.where(norm <= NORM_EPS, 0.0, 1.0 / norm)


@triton.jit
def schedule(
    count,
    other_count,
    slots,
    programs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STREAM: tl.constexpr,
):
    """How a contrast pass is divided: (row tiles, column blocks of a tile, parts of a tile, blocks
    of a share).

    Either every tile has equally many parts, one a program, as many as keep `programs` of them at
    work; the share is 0 then. Or, where that would leave programs idle, each has a share of all
    blocks of all tiles that ends in the middle of a tile (stream-K). Computed from the counts in
    device memory, by producer and consumer alike.
    """
    tiles = tl.maximum(tl.cdiv(count, BLOCK_M), 1)
    blocks = tl.maximum(tl.cdiv(other_count, BLOCK_N), 1)
    parts = tl.minimum(tl.maximum(programs // tiles, 1), blocks)
    share = tiles * 0
    if STREAM:
        work = tiles * parts
        idle = work * 10 < tl.cdiv(work, programs) * programs * 9
        # A share of every tile's blocks: their number has to fit into 32 bits.
        small = tiles.to(tl.int64) * blocks < 2147483647 - programs
        if idle & small & (tiles + programs <= slots):
            share = tl.cdiv(tiles * blocks, programs)
    return tiles, blocks, parts, share


@triton.jit
def parts_of(tile, blocks, parts, share):
    """(slot of the first part, number of parts) of a row tile."""
    if share > 0:
        first = tile * blocks // share
        last = (tile * blocks + blocks - 1) // share
        # A part is at the sum of its tile and its program: from one part to the next, at least one
        # of the two grows.
        slot = tile + first
        number = last - first + 1
    else:
        slot = tile * parts
        number = tile * 0 + parts
    return slot, number


@triton.jit
def normalize_backward(grad, unit, norm):
    """Gradient of x from that of x / |x|: (grad - (grad . unit) unit) / |x|."""
    along = tl.sum(grad * unit, axis=1)
    return (grad - along[:, None] * unit) * unit_scale(norm)[:, None]


@triton.jit
def add_in(top, total, new_top, new_total):
    """Sum of two (maximum, sum of 2^(t - maximum)) pairs."""
    highest = tl.maximum(top, new_top)
    safe = tl.where(highest == -float("inf"), 0.0, highest)
    return highest, total * tl.exp2(top - safe) + new_total * tl.exp2(new_top - safe)
