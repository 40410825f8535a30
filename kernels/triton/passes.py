"""The two ways through the contrast: sums over the candidates in registers, or P of a chunk of rows
in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import chunked, contrast, tiles
from .masks import MASKS
from .shapes import Shape, cdiv
from .state import HALF_LIFT, Pass, PassSide, Results, Scores, Transposed


def forward_pass(
    s: Shape,
    x: PassSide,
    y: PassSide,
    scores: Scores,
    out: Pass,
    results: Results,
    transposed: Transposed | None = None,
) -> None:
    """Parts of sum_j p_ij y_j, and the results of each row x_i."""
    if s.chunked:
        run_chunks(s, x, y, scores, results.lse, transposed, out, results)
        return
    run_contrast(
        s,
        x,
        y,
        scores,
        out,
        positive=results.positive,
        log_q=results.log_q,
        need_rank=results.stats,
    )
    _finish(s, x, y, scores, out, results, 0, x.unit.shape[0])


def _finish(
    s: Shape,
    x: PassSide,
    y: PassSide,
    scores: Scores,
    out: Pass,
    results: Results,
    first: int,
    number: int,
) -> None:
    """Results of rows `first` to `first + number` from the parts in `out`."""
    items = contrast.Items(*results.items) if results.stats else None
    contrast.finish_rows[(cdiv(number, 256),)](
        contrast.Sums(None, out.top, out.total, out.above),
        x.count,
        y.count,
        results.positive,
        x.list,
        results.log_q,
        contrast.AnchorResults(results.loss, results.lse, results.miss, items),
        out.slots,
        s.programs(out.tile),
        first,
        first + number,
        scores.tau,
        TAU_IS_TENSOR=scores.tau_is_tensor,
        STREAM=s.stream,
        BLOCK_M=out.tile.block_m,
        BLOCK_N=out.tile.block_n,
        BLOCK=256,
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
    rows = contrast.Rows(x.unit, x.ids, x.page, x.count, x.list, x_offset, positive, log_q)
    columns = contrast.Columns(
        y.unit, y.ids, y.page, y.count, y_offset, y_scale, scores.page_offsets
    )
    for fixed, running in ways:
        how = contrast.Constants(
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
        contrast.contrast[(out.slots,)](
            rows,
            columns,
            y.rank,
            contrast.Sums(out.acc, out.top, out.total, out.above),
            out.slots,
            s.programs(out.tile),
            scores.tau,
            how=how,
            **out.tile.launch,
        )


def run_chunks(
    s: Shape,
    x: PassSide,
    y: PassSide,
    scores: Scores,
    lse: Tensor,
    transposed: Transposed | None,
    out: Pass | None = None,
    results: Results | None = None,
) -> None:
    """A contrast direction in chunks of rows. `out` and `results`: the forward pass, which fills
    `lse`; without them `lse` is known. With a fixed shift and `transposed`, the scores are computed
    once and P serves two products."""
    values = out is not None and s.values
    run = _Chunks(s, x, y, scores, lse, values or transposed is not None, out, results)
    scaled = None
    if transposed is not None:
        scaled = torch.empty(run.rows, s.stride, dtype=x.unit.dtype, device=s.device)
    capacity = x.unit.shape[0]
    for first in range(0, capacity, run.rows):
        # Relative to the log-sum-exp, not to a shift.
        normalised = out is None or scores.online
        if out is not None and results is not None:
            run.scores(first, False, True, run.store and not normalised)
            run.reduce(first, out)
            _finish(s, x, y, scores, out, results, first, min(run.rows, capacity - first))
        if normalised and run.store:
            run.scores(first, True, False, True)
        if out is not None and values:
            if normalised:
                # The product's P is relative to the log-sum-exp now, not to the running maximum.
                assert out.top is not None
                last = min(first + run.rows, capacity)
                torch.sub(lse[first:last], run.lift, out=out.top[first:last])
            run.product(first, out.acc)
        if transposed is not None:
            top = out.top if out is not None else lse
            run.transposed_product(first, transposed, scaled, top, normalised)


_NO_SUMS = contrast.Sums(None, None, None, None)


class _Chunks:
    """The workspace of a direction in chunks of rows, and its launches for the chunk that begins
    with row `first`."""

    def __init__(
        self,
        s: Shape,
        x: PassSide,
        y: PassSide,
        scores: Scores,
        lse: Tensor,
        store: bool,
        out: Pass | None,
        results: Results | None,
    ) -> None:
        tile, kind = s.product, x.unit.dtype
        self.s, self.x, self.y, self.how, self.lse, self.store = s, x, y, scores, lse, store
        self.online, self.results = out is not None and scores.online, results
        self.rank = results is not None and results.stats
        self.columns = y.unit.shape[0]
        self.rows = min(
            tiles.chunk_rows(self.columns, kind, scores.workspace, tile),
            cdiv(x.unit.shape[0], tile.block_m) * tile.block_m,
        )
        self.tiles_m, self.tiles_n = cdiv(self.rows, tile.block_m), cdiv(self.columns, tile.block_n)
        # Rows of P begin at multiples of a tile: loads stay wide, and a tile may be read beyond its
        # last column.
        self.stride = cdiv(self.tiles_n * tile.block_n, tile.block_m) * tile.block_m
        self.p = torch.empty(self.rows, self.stride, dtype=kind, device=s.device) if store else None
        parts = (self.tiles_n, self.rows)
        top, total = (torch.empty(parts, dtype=torch.float32, device=s.device) for _ in range(2))
        above = torch.empty(parts, dtype=torch.int32, device=s.device) if self.rank else None
        self.sums = contrast.Sums(None, top, total, above)
        self.lift = HALF_LIFT if kind == torch.float16 else 0.0
        self.tile: dict[str, Any] = {
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
            "BLOCK_K": tile.block_k,
            "PRECISION": s.precision,
            **tile.launch,
        }

    def scores(self, first: int, normalised: bool, sums: bool, keep: bool) -> None:
        """P of the chunk if `keep`; with `sums` its rows' largest score and sum in each tile."""
        x, y, results = self.x, self.y, self.results
        positive = None if results is None else results.positive
        log_q = None if results is None else results.log_q
        chunked.scores[(self.tiles_m * self.tiles_n,)](
            contrast.Rows(x.unit, x.ids, x.page, x.count, x.list, None, positive, log_q),
            contrast.Columns(y.unit, y.ids, y.page, y.count, y.bias),
            self.lse if normalised else None,
            self.p if keep else None,
            self.sums if sums else _NO_SUMS,
            self.how.tau,
            self.lift if normalised else 0.0,
            first,
            self.rows,
            self.stride,
            STRIDE=self.s.stride,
            TAU_IS_TENSOR=self.how.tau_is_tensor,
            MASK=self.how.mask,
            Y_OFFSET_IS_COUNT=y.merged and results is not None,
            ONLINE=self.online,
            **self.tile,
        )

    def reduce(self, first: int, out: Pass) -> None:
        """One part of each row, from those of the tiles."""
        chunked.reduce_parts[(cdiv(self.rows, 256),)](
            self.sums,
            contrast.Sums(None, out.top, out.total, out.above if self.rank else None),
            self.x.count,
            self.y.count,
            first,
            self.rows,
            BLOCK_N=self.s.product.block_n,
            BLOCK=256,
        )

    def product(self, first: int, out: Tensor) -> None:
        """P y."""
        chunked.product[(self.tiles_m * cdiv(self.s.stride, self.s.product.block_n),)](
            self.p,
            self.y.unit,
            self.x.count,
            self.y.count,
            out,
            first,
            self.rows,
            self.stride,
            STRIDE=self.s.stride,
            **self.tile,
        )

    def transposed_product(
        self, first: int, transposed: Transposed, scaled: Any, top: Tensor, normalised: bool
    ) -> None:
        """P^T of the scaled rows x, added to what earlier chunks gave."""
        s, tile = self.s, self.s.product
        chunked.scale_rows[(cdiv(self.rows, s.small.block_m),)](
            self.x.unit,
            transposed.g,
            None if normalised else top,
            self.lse,
            scaled,
            self.x.count,
            first,
            self.rows,
            STRIDE=s.stride,
            BLOCK_M=s.small.block_m,
            BLOCK_D=tiles.next_power_of_2(s.stride),
            num_warps=s.small.num_warps,
        )
        programs = cdiv(self.columns, tile.block_m) * cdiv(s.stride, tile.block_n)
        chunked.transposed_product[(programs,)](
            self.p,
            scaled,
            self.x.count,
            self.y.count,
            transposed.out,
            first,
            self.rows,
            self.stride,
            STRIDE=s.stride,
            ACCUMULATE=first > 0,
            **self.tile,
        )


def lowered(g: Tensor) -> tuple[Tensor, Tensor]:
    """g in units of its largest entry, and the factor to restore the products (float16 range)."""
    largest = g.abs().amax()
    largest = torch.where(largest == 0, 1.0, largest)
    return g / largest, largest * 2.0**-HALF_LIFT
