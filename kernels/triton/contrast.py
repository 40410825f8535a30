"""Triton: the contrast. One kernel serves the forward pass over the candidates of each anchor and
the transposed pass over the anchors of each candidate; neither writes the similarity matrix.

Scores are in powers of two: t_ij = log2(e) (cos_ij / tau + bias_j).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tiles
from .common import (
    LN2,
    LOG2E,
    SMALLEST_FIXED_TAU,
    kernel,
    places_before,
    schedule,
    score_scale,
    temperature,
)
from .masks import MASK_OTHER_PAGES, MASK_PAGE, MASK_SEQUENCE_IDS, MASKS, candidate_mask
from .shapes import Shape

if TYPE_CHECKING:
    from ...loss.problem import Problem, SequenceProblem
    from ...loss.union.blocks import Scoring

# A row's sum is kept in this many parts, one to each column of the smallest matrix instruction:
# threads hold columns of their own and meet once, after the loop.
SUM_PARTS = tl.constexpr(8)

LARGEST_FIXED_SCALE = tl.constexpr(1 / (SMALLEST_FIXED_TAU * LN2.value))

# From this dimension on one address moves along with the blocks, and their rows are at distances
# from it; below, each row's is made of its number: 11 instructions fewer a step at 256, 15 more and
# spills at 128 (Triton 3.6, sm_90).
MOVED_DIM = tl.constexpr(256)


@triton.jit
def of_columns(ptr, place, end, TAIL: tl.constexpr):
    """A value per column; 0 past the end, which only the last block reaches."""
    if TAIL:
        return tl.load(ptr + place, mask=place < end, other=0)
    else:
        return tl.load(ptr + place)


class Columns(NamedTuple):
    """The other side of a pass, None where there is nothing."""

    unit: Any  # [capacity, BLOCK_D] unit rows
    id: Any
    page: Any
    count: Any
    offset: Any = None  # [capacity], added to the scores
    scale: Any = None  # [capacity], a factor of 2^t in the sum of rows alone
    page_offsets: Any = None  # for masks by page: pv offsets [B + 1]


class Rows(NamedTuple):
    """This side of a pass, likewise."""

    unit: Any
    id: Any
    page: Any
    count: Any
    list: Any
    offset: Any = None
    # [capacity, 2]: the positive's cosine, exact and as the rounded rows give it
    rank_score: Any = None
    log_q: Any = None  # [N]


class RowTile(NamedTuple):
    """A tile of rows, loaded."""

    x: Any  # [BLOCK_M, BLOCK_D]
    id: Any  # [BLOCK_M], as all that follows
    page: Any
    place: Any
    offset: Any  # None where there is none, or only after the loop
    rank_score: Any


class Sums(NamedTuple):
    """Where parts of tiles leave their sums, None for those that nobody wants."""

    acc: Any  # [slots * BLOCK_M, BLOCK_D]; with TO_LIST [N, BLOCK_D], rows at their places there
    top: Any  # [slots * BLOCK_M], as the next two
    total: Any
    above: Any


class Constants(NamedTuple):
    """What is constant in a pass: see `contrast`."""

    MASK: Any
    DIAGONAL: Any
    X_OFFSET_AFTER: Any
    Y_OFFSET_IS_COUNT: Any
    Y_OFFSET_IS_LSE: Any
    LIFT: Any
    FIXED_SHIFT: Any
    ONLINE: Any
    NEED_SUM: Any
    NEED_VALUES: Any
    NEED_RANK: Any
    TO_LIST: Any
    STREAM: Any
    EITHER: Any
    TAU_IS_TENSOR: Any
    BLOCK_M: Any
    BLOCK_N: Any
    BLOCK_D: Any
    PRECISION: Any


@triton.jit
def block_mask(rows, y, place, end, TAIL: tl.constexpr, MASK: tl.constexpr):
    """`candidate_mask` of a block of columns, which are loaded here."""
    y_id = of_columns(y.id, place, end, TAIL)
    y_page = place
    if MASK == MASK_PAGE or MASK == MASK_OTHER_PAGES or MASK == MASK_SEQUENCE_IDS:
        y_page = of_columns(y.page, place, end, TAIL)
    allowed = candidate_mask(rows.id, y_id, rows.page, y_page, rows.place, place, MASK)
    if TAIL:
        allowed = allowed & (place < end)[None, :]
    return allowed


@triton.jit
def contrast_step(
    top,  # [BLOCK_M] running maximum
    total,  # [BLOCK_M, SUM_PARTS]
    acc,  # [BLOCK_M, BLOCK_D]
    above,  # [BLOCK_M] int32
    rows,
    y,
    block_ptr,  # of y's first row, or (MOVED_DIM) of the block's
    start,
    end,
    own_first,
    own_width,
    scale,
    TAIL: tl.constexpr,
    how: tl.constexpr,
):
    """total += sum_j 2^(t_ij - top), acc += sum_j 2^(t_ij - top) y_j over one block of columns."""
    place = start + tl.arange(0, how.BLOCK_N)
    row = place if how.BLOCK_D < MOVED_DIM else tl.arange(0, how.BLOCK_N)
    where = row.to(tl.int64)[:, None] * how.BLOCK_D + tl.arange(0, how.BLOCK_D)[None, :]
    if TAIL:
        block = tl.load(block_ptr + where, mask=(place < end)[:, None], other=0.0)
    else:
        block = tl.load(block_ptr + where)
    t = tl.dot(rows.x, tl.trans(block), input_precision=how.PRECISION) * scale
    if rows.offset is not None:
        t += rows.offset[:, None]
    if y.offset is not None:
        y_offset = of_columns(y.offset, place, end, TAIL)
        if how.FIXED_SHIFT:
            # No score is above 1/tau: shift by it, in one instruction with the scale.
            y_offset -= scale
        if how.Y_OFFSET_IS_LSE:
            if how.LIFT != 0.0:
                y_offset -= how.LIFT
            t -= y_offset[None, :]
        else:
            t += y_offset[None, :]
    elif how.FIXED_SHIFT:
        t -= scale
    # The mask comes after the product: made before it, it would travel through registers.
    if TAIL or not how.DIAGONAL:
        allowed = block_mask(rows, y, place, end, TAIL, how.MASK)
        t = tl.where(allowed, t, -float("inf"))
    else:
        # All threads agree: only blocks that hold items of this tile are masked. `near` is `place`,
        # written so that no address of an id is kept up to date in the blocks that need none.
        distance = (start - own_first).to(tl.uint32, bitcast=True)
        if distance < own_width:
            near = own_first.to(tl.int64) + distance.to(tl.int64) + tl.arange(0, how.BLOCK_N)
            allowed = block_mask(rows, y, near, end, TAIL, how.MASK)
            t = tl.where(allowed, t, -float("inf"))
    if how.NEED_RANK:
        # Exact ties are not above; the two sums of the same products may differ in their last bits.
        bar = rows.rank_score + 1e-6 * scale
        if how.FIXED_SHIFT:
            bar -= scale
        if how.Y_OFFSET_IS_COUNT:
            bias = of_columns(y.offset, place, end, TAIL)
            count = (tl.exp2(bias) + 0.5).to(tl.int32)
            above += tl.sum(tl.where(t > bar[:, None] + bias[None, :], count[None, :], 0), axis=1)
        else:
            above += tl.sum((t > bar[:, None]).to(tl.int32), axis=1)
    if how.ONLINE:
        new_top = tl.maximum(top, tl.max(t, axis=1))
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        rescale = tl.exp2(top - shift)
        p = tl.exp2(t - shift[:, None])
        top = new_top
        if how.NEED_SUM:
            total = total * rescale[:, None]
        if how.NEED_VALUES:
            acc = acc * rescale[:, None]
    else:
        p = tl.exp2(t)
    if how.NEED_SUM:
        total += tl.sum(tl.reshape(p, [p.shape[0], how.BLOCK_N // SUM_PARTS, SUM_PARTS]), axis=1)
    if y.scale is not None:
        p *= of_columns(y.scale, place, end, TAIL)[None, :]
    if how.NEED_VALUES:
        acc = tl.dot(p.to(block.dtype), block, acc, input_precision=how.PRECISION)
    return top, total, acc, above


@triton.jit
def contrast_columns(rows, y, low, high, own_first, own_width, scale, how: tl.constexpr):
    """(top, total, acc, above) of the columns from low to high: see `contrast_step`."""
    top = tl.full([how.BLOCK_M], -float("inf"), tl.float32)
    if how.FIXED_SHIFT:
        top = tl.full([how.BLOCK_M], 0.0, tl.float32) + scale
    total = tl.full([how.BLOCK_M, SUM_PARTS], 0.0, tl.float32)
    acc = tl.full([how.BLOCK_M, how.BLOCK_D], 0.0, tl.float32)
    above = tl.full([how.BLOCK_M], 0, tl.int32)
    # The tail is peeled: a mask on every load of the inner loop costs several percent.
    whole = low + tl.maximum(high - low, 0) // how.BLOCK_N * how.BLOCK_N
    block_ptr = y.unit
    if how.BLOCK_D >= MOVED_DIM:
        block_ptr += low.to(tl.int64) * how.BLOCK_D
    for start in range(low, whole, how.BLOCK_N):
        top, total, acc, above = contrast_step(
            top,
            total,
            acc,
            above,
            rows,
            y,
            block_ptr,
            start,
            high,
            own_first,
            own_width,
            scale,
            False,
            how,
        )
        if how.BLOCK_D >= MOVED_DIM:
            block_ptr += how.BLOCK_N * how.BLOCK_D
    if whole < high:
        top, total, acc, above = contrast_step(
            top,
            total,
            acc,
            above,
            rows,
            y,
            block_ptr,
            whole,
            high,
            own_first,
            own_width,
            scale,
            True,
            how,
        )
    return top, total, acc, above


@triton.jit
def contrast_rows(
    tile,
    slot,
    low,
    high,
    parts,
    part,
    x,
    y,
    x_count,
    y_count,
    y_place_ptr,
    sums,
    scale,
    how: tl.constexpr,
):
    """One part of one row tile: see `contrast`."""
    first = tile * how.BLOCK_M
    x_place = first + tl.arange(0, how.BLOCK_M)
    valid = x_place < x_count
    dims = tl.arange(0, how.BLOCK_D)
    where = x_place.to(tl.int64)[:, None] * how.BLOCK_D + dims[None, :]
    unit = tl.load(x.unit + where, mask=valid[:, None], other=0.0)

    x_id = tl.load(x.id + x_place, mask=valid, other=0)
    x_page = x_place
    if how.MASK == MASK_PAGE or how.MASK == MASK_OTHER_PAGES or how.MASK == MASK_SEQUENCE_IDS:
        x_page = tl.load(x.page + x_place, mask=valid, other=-2)
    rank_score = tl.full([how.BLOCK_M], 0.0, tl.float32)
    x_offset = None
    if x.offset is not None:
        x_offset = tl.load(x.offset + x_place, mask=valid, other=0.0)
    if how.NEED_RANK:
        rank_score = tl.load(x.rank_score + x_place * 2 + 1, mask=valid, other=0.0) * scale
        if x.log_q is not None:
            position = tl.load(x.list + x_place, mask=valid, other=0)
            rank_score -= tl.load(x.log_q + position, mask=valid, other=0.0) * LOG2E

    low = low * how.BLOCK_N
    high = tl.minimum(high * how.BLOCK_N, y_count)
    if how.MASK == MASK_PAGE:
        page_first = tl.load(x.page + first)
        page_last = tl.load(x.page + tl.minimum(first + how.BLOCK_M, x_count) - 1)
        low = places_before(y_place_ptr, tl.load(y.page_offsets + page_first))
        end = places_before(y_place_ptr, tl.load(y.page_offsets + page_last + 1))
        columns = tl.cdiv(tl.cdiv(end - low, how.BLOCK_N), parts) * how.BLOCK_N
        low += part * columns
        high = tl.minimum(low + columns, end)

    # Both lists ascend by position: the columns of the tile's own items (pages) are one range, and
    # every other column is a candidate of all its rows. Blocks that begin in own_first + [0,
    # own_width) hold some of that range.
    own_first = low
    own_width = low
    if how.DIAGONAL:
        there = first < x_count
        last = tl.minimum(first + how.BLOCK_M, x_count) - 1
        if how.MASK == MASK_OTHER_PAGES:
            first_page = tl.load(x.page + first, mask=there, other=0)
            last_page = tl.load(x.page + last, mask=there, other=0)
            begin = tl.load(y.page_offsets + first_page)
            end = tl.load(y.page_offsets + last_page + 1)
        else:
            begin = tl.load(x.list + first, mask=there, other=0)
            end = tl.load(x.list + last, mask=there, other=0) + 1
        own_first = places_before(y_place_ptr, begin) - (how.BLOCK_N - 1)
        own_width = (places_before(y_place_ptr, end) - own_first).to(tl.uint32, bitcast=True)

    before = None if how.X_OFFSET_AFTER else x_offset
    rows = RowTile(unit, x_id, x_page, x_place, before, rank_score)
    top, total, acc, above = contrast_columns(rows, y, low, high, own_first, own_width, scale, how)
    if x.offset is not None and how.X_OFFSET_AFTER:
        # log m of a column that stands for m items: a factor of its row, outside the loop.
        acc = acc * tl.exp2(x_offset)[:, None]
    row = slot.to(tl.int64) * how.BLOCK_M + tl.arange(0, how.BLOCK_M)
    if how.NEED_SUM:
        tl.store(sums.total + row, tl.sum(total, axis=1))
        tl.store(sums.top + row, top)
    if how.NEED_RANK:
        tl.store(sums.above + row, above)
    if how.NEED_VALUES:
        if how.TO_LIST:
            row = tl.load(x.list + x_place, mask=valid, other=0).to(tl.int64)
        where = row[:, None] * how.BLOCK_D + dims[None, :]
        if how.TO_LIST:
            tl.store(sums.acc + where, acc.to(sums.acc.dtype.element_ty), mask=valid[:, None])
        else:
            tl.store(sums.acc + where, acc.to(sums.acc.dtype.element_ty))


@kernel
def contrast(
    x,  # Rows
    y,  # Columns
    y_place_ptr,  # the prefix sums that made the list of y
    sums,  # Sums
    slots,
    programs,
    tau,
    how: tl.constexpr,  # Constants
):
    """sum_j 2^(t_ij - shift) and sum_j 2^(t_ij - shift) y_j, for one tile of rows and one part of
    the columns.

    Forward: x = r, y = e, the sums give logsumexp_j s_ij and sum_j p_ij e_j.
    Transposed: x = e, y = r, the offset of y is -lse_i and its scale g_i, and the sum is
    sum_i g_i p_ij r_i. ("identify" swaps r and e.)

    EITHER: only the device knows the temperature. The kernel is launched with a fixed shift and
    with a running maximum, which costs half of its loop; the one that does not fit returns at once.
    """
    pid = tl.program_id(0)
    x_count = tl.load(x.count)
    y_count = tl.load(y.count)
    tiles, blocks, parts, share = schedule(
        x_count, y_count, slots, programs, how.BLOCK_M, how.BLOCK_N, how.STREAM
    )
    if how.TO_LIST:
        parts = tl.minimum(parts, 1)
    scale = score_scale(tau, how.TAU_IS_TENSOR)
    if how.EITHER:
        fits = scale <= LARGEST_FIXED_SCALE
        if fits == (not how.FIXED_SHIFT):
            return
    if how.STREAM:
        # From where to where in the row of all blocks, counted from the first tile's. An equal part
        # of a tile is as good as a share.
        first_tile = pid // parts
        last_tile = tl.minimum(first_tile, tl.cdiv(x_count, how.BLOCK_M) - 1)
        per_part = tl.cdiv(blocks, parts)
        begin = tl.minimum(pid % parts * per_part, blocks)
        end = tl.minimum(begin + per_part, blocks)
        # 64 bits: programs past the last share would begin anywhere. And no branch: Triton 3.5 does
        # not compile loops whose bounds come out of one.
        streams = share > 0
        place = tl.minimum(pid.to(tl.int64) * share, tiles * blocks).to(tl.int32)
        first_tile = tl.where(streams, place // blocks, first_tile)
        begin = tl.where(streams, place - first_tile * blocks, begin)
        end = tl.where(streams, begin + tl.minimum(share, tiles * blocks - place), end)
        last_tile = tl.where(streams, first_tile + tl.cdiv(end, blocks) - 1, last_tile)
        for tile in range(first_tile, last_tile + 1):
            before = (tile - first_tile) * blocks
            low = tl.maximum(begin - before, 0)
            high = tl.minimum(end - before, blocks)
            slot = pid + tl.where(streams, tile, 0)
            part = 0
            contrast_rows(
                tile,
                slot,
                low,
                high,
                parts,
                part,
                x,
                y,
                x_count,
                y_count,
                y_place_ptr,
                sums,
                scale,
                how,
            )
    else:
        tile = pid // parts
        if tile * how.BLOCK_M >= x_count:
            return
        part = pid % parts
        low = part * tl.cdiv(blocks, parts)
        high = tl.minimum(low + tl.cdiv(blocks, parts), blocks)
        slot = pid
        contrast_rows(
            tile,
            slot,
            low,
            high,
            parts,
            part,
            x,
            y,
            x_count,
            y_count,
            y_place_ptr,
            sums,
            scale,
            how,
        )


# ---- launches ------------------------------------------------------------------------------------

# float16 probabilities of many candidates would be subnormal: they are lifted by 2^12 and lowered
# again in float32.
HALF_LIFT = 12.0


def lowered(g: Tensor) -> tuple[Tensor, Tensor]:
    """g in units of its largest entry, and the factor to restore the products (float16 range)."""
    largest = g.abs().amax()
    largest = torch.where(largest == 0, 1.0, largest)
    return g / largest, largest * 2.0**-HALF_LIFT


@dataclass
class PassSide:
    """One side of a contrast pass: unit rows and what masks and offsets them. Without ids, `ids` is
    the list."""

    unit: Tensor
    count: Tensor
    list: Tensor
    page: Tensor
    ids: Tensor
    bias: Tensor | None
    place: Tensor  # of its rows from 1: the prefix sums that made the list
    merged: bool = False  # the bias is log m of m equal candidates


@dataclass
class Pass:
    """Partial results of one contrast pass."""

    acc: Tensor
    top: Tensor | None
    total: Tensor | None
    above: Tensor | None
    slots: int
    tile: tiles.Tile
    in_place: bool = False  # `acc` is where the rows' gradients go, each at its row's place


@dataclass(frozen=True)
class Scores:
    """Which pairs the passes score, and how."""

    mask: int
    tau: Any  # what `score_scale` of the kernels takes
    tau_is_tensor: bool
    page_offsets: Tensor
    workspace: int  # bytes
    # Whether the running maximum may be needed: tau unknown here or small, or no bound on the
    # scores; and whether 1/tau may replace it. Where tau is on the device, both hold and the kernel
    # looks there.
    online: bool
    fixed_shift: bool


def scores(
    p: Problem | SequenceProblem | Scoring,
    mask: int,
    page_offsets: Tensor,
    dtype: torch.dtype,
    biased: bool,
) -> Scores:
    tau, tau_is_tensor = temperature(p).values()
    # Biases are of unknown size; float16 products need every bit of their range.
    bounded = not biased and dtype != torch.float16
    large = p.tau >= SMALLEST_FIXED_TAU
    return Scores(
        mask,
        tau,
        tau_is_tensor,
        page_offsets,
        p.workspace,
        online=tau_is_tensor or not large or not bounded,
        fixed_shift=bounded and (tau_is_tensor or large),
    )


def run_contrast(
    s: Shape,
    x: PassSide,
    y: PassSide,
    scores: Scores,
    out: Pass,
    *,
    y_offset: Tensor | None = None,
    y_offset_is_lse: bool = False,
    y_scale: Tensor | None = None,
    x_offset: Tensor | None = None,
    x_offset_after: bool = False,
    positive: Tensor | None = None,
    log_q: Tensor | None = None,
    need_sum: bool = True,
    need_rank: bool = False,
) -> None:
    """Sums in registers; `need_sum` off: the transposed pass, whose rows' log-sum-exp is known.
    `y_offset`: else the bias."""
    mask = scores.mask
    y_offset = y.bias if y_offset is None else y_offset

    fixed_shift, online = need_sum and scores.fixed_shift, need_sum and scores.online
    either = fixed_shift and online
    ways = ((True, False), (False, True)) if either else ((fixed_shift, online),)
    rows = Rows(x.unit, x.ids, x.page, x.count, x.list, x_offset, positive, log_q)
    columns = Columns(y.unit, y.ids, y.page, y.count, y_offset, y_scale, scores.page_offsets)
    for fixed, running in ways:
        how = Constants(
            MASK=mask,
            # Where no ids but the rows' own places decide, both sides ascend by position or page.
            DIAGONAL=mask == MASKS["sequence"]
            or (
                mask in (MASKS["batch"], MASKS["other_pages"])
                and x.ids is x.list
                and y.ids is y.list
            ),
            X_OFFSET_AFTER=x_offset_after,
            Y_OFFSET_IS_COUNT=y.merged,
            Y_OFFSET_IS_LSE=y_offset_is_lse,
            LIFT=HALF_LIFT if y_offset_is_lse and x.unit.dtype == torch.float16 else 0.0,
            FIXED_SHIFT=fixed,
            ONLINE=running,
            NEED_SUM=need_sum,
            NEED_VALUES=s.values,
            NEED_RANK=need_rank,
            TO_LIST=out.in_place,
            STREAM=s.stream and not out.in_place,
            EITHER=either,
            TAU_IS_TENSOR=scores.tau_is_tensor,
            BLOCK_M=out.tile.block_m,
            BLOCK_N=out.tile.block_n,
            BLOCK_D=s.stride,
            PRECISION=s.precision,
        )
        contrast[(out.slots,)](
            rows,
            columns,
            y.place,
            Sums(out.acc, out.top, out.total, out.above),
            out.slots,
            s.programs(out.tile),
            scores.tau,
            how=how,
            **out.tile.launch,
        )
