"""impl="triton": the loss as a sequence of kernel launches, without a host sync and without the similarity matrix.

Forward: pages and compacted lists (plan) -> e and r as contiguous unit rows -> one streaming pass over the candidates
-> log-sum-exp and loss. Backward: gradients of r -> attention -> one transposed pass for the gradients of e.
README.md has the notation and the derivation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chunked, configs, contrast, epilogue, plan, reconstruct

if TYPE_CHECKING:
    from courier_fast.problem import Problem, SequenceProblem

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_MASKS = {"batch": 0, "page": 1, "other_pages": 2}

# A fixed shift of 1/tau replaces the running maximum where exp(-2/tau) is far from float32's smallest number.
_SMALLEST_FIXED_TAU = 0.05
# float16 probabilities of many candidates would be subnormal: they are lifted by 2^12 and lowered again in float32.
_HALF_LIFT = 12.0


def unavailable_reasons(p: Problem | SequenceProblem) -> list[str]:
    """Why these kernels cannot run this problem here; empty if they can."""
    source = p.pv if hasattr(p, "pv") else p.history
    reasons = []
    device = source.device
    if device.type != "cuda" and not (device.type == "cpu" and configs.interpreted()):
        reasons.append(f"the tensors are on {device.type!r}; Triton kernels need a CUDA device")
    if (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) < (8, 0)
    ):
        reasons.append("the GPU is older than compute capability 8.0")
    if source.dtype not in _DTYPES:
        reasons.append(f"dtype is {source.dtype}; float32, float16 or bfloat16 is needed")
    if not 1 <= source.shape[1] <= configs.LARGEST_DIM:
        reasons.append(
            f"the embedding dimension is {source.shape[1]}; 1 to {configs.LARGEST_DIM} is supported"
        )
    return reasons


# ---- shapes of what the forward leaves to the backward ------------------------------------------------------------

_Spec = dict[str, tuple[tuple[Any, ...], torch.dtype]]


def _cdiv(a: Any, b: int) -> Any:
    return (a + b - 1) // b


@dataclass(frozen=True)
class _Shape:
    """What the launches of one problem have in common."""

    dim: int
    stride: int
    block_d: int
    rows: int  # N
    history_rows: int  # K
    pages: int
    items: int  # n of the table, 0 without one
    merged: bool  # equal candidates are one column
    every: bool  # R of every item with a history, not of the anchors only
    both_lists: bool  # anchors and reconstructed rows are different lists
    directions: tuple[str, ...]
    id_dtype: torch.dtype
    chunked: bool  # P of a chunk of rows is stored, instead of sums over D in registers
    early: bool  # ... and used at once for the gradient of the columns: the weights of the rows are known
    tile: configs.Tile
    product: configs.ProductTile
    attention: configs.Tile
    backward: configs.Tile
    small: configs.Tile
    precision: str

    def slots(self, capacity: Any, device: torch.device) -> Any:
        """Programs of a contrast pass over at most `capacity` rows, and so the tiles of partial sums it writes."""
        if self.chunked:
            return 1
        return torch.sym_max(_cdiv(capacity, self.tile.block_m), configs.programs(device))

    def flat(self, capacity: Any, device: torch.device) -> Any:
        """Rows of what such a pass writes."""
        return capacity if self.chunked else self.slots(capacity, device) * self.tile.block_m


def _shape(p: Problem) -> _Shape:
    dim = p.pv.shape[1]
    chunks = configs.use_chunks(p.pv.dtype, dim)
    stride = configs.row_stride(dim, chunks)
    table = p.pv_index is not None
    every = p.direction != "reconstruct"
    return _Shape(
        dim=dim,
        stride=stride,
        block_d=configs.block_dim(stride),
        rows=p.num_pv,
        history_rows=p.num_history,
        pages=p.pv_offsets.shape[0] - 1,
        items=p.pv.shape[0] if table else 0,
        # Columns can be merged where every page sees the same candidates, known by the index alone; a table much
        # larger than the batch is not worth a column list of its own.
        merged=table
        and p.item_ids is None
        and p.log_q is None
        and p.negatives == "batch"
        and p.direction != "identify"
        and p.pv.shape[0] <= p.num_pv,
        every=every,
        both_lists=every,
        directions=("reconstruct", "identify") if p.direction == "both" else (p.direction,),
        id_dtype=torch.int64 if p.item_ids is not None else torch.int32,
        chunked=chunks,
        early=chunks and p.reduction != "none",
        tile=configs.contrast_tile(p.pv.dtype, stride),
        product=configs.product_tile(p.pv.dtype),
        attention=configs.attention_tile(p.pv.dtype, stride, False),
        backward=configs.attention_tile(p.pv.dtype, stride, True),
        small=configs.rows_tile(stride),
        precision=configs.dot_precision(p.pv.dtype),
    )


def _list_spec(name: str, capacity: Any, id_dtype: torch.dtype, bias: bool) -> _Spec:
    spec: _Spec = {
        f"{name}_list": ((capacity,), torch.int32),
        f"{name}_page": ((capacity,), torch.int32),
        f"{name}_id": ((capacity,), id_dtype),
    }
    if bias:
        spec[f"{name}_bias"] = ((capacity,), torch.float32)
    return spec


def _pass_spec(name: str, flat: Any, stride: int, rows: Any) -> _Spec:
    return {
        f"{name}_acc": ((flat, stride), torch.float32),
        f"{name}_top": ((flat,), torch.float32),
        f"{name}_lse": ((rows,), torch.float32),
        f"{name}_miss": ((rows,), torch.float32),
    }


def _plan_spec(p: Problem, s: _Shape) -> _Spec:
    """Pages, lists and the attention's log-sum-exp."""
    spec: _Spec = {
        "history_page": ((s.history_rows,), torch.int32),
        "pv_page": ((s.rows,), torch.int32),
        "flags": ((4, s.rows), torch.int32),
        "ranks": ((4, s.rows), torch.int32),
        "counts": ((4,), torch.int32),
        "attention_lse": ((p.num_heads, s.rows), torch.float32),
    }
    return spec | _list_spec("anchor", s.rows, s.id_dtype, False)


def _state_spec(p: Problem) -> _Spec:
    """Name, shape and type of every tensor that the backward needs, in the order of `saved`."""
    s = _shape(p)
    device, dtype, rows = p.pv.device, p.pv.dtype, s.rows
    columns = s.items if s.merged else rows
    spec = _plan_spec(p, s) | {
        "r": ((rows, s.stride), dtype),
        "norm": ((rows,), torch.float32),
        "weight_sum": ((), torch.float32),
    }
    if s.both_lists:
        spec |= _list_spec("reconstructed", rows, s.id_dtype, p.log_q is not None)
        spec |= {"r_anchor": ((rows, s.stride), dtype), "e_anchor": ((rows, s.stride), dtype)}
    if "reconstruct" in s.directions:
        spec |= _list_spec("column", columns, s.id_dtype, p.log_q is not None or s.merged)
        spec |= {"e": ((columns, s.stride), dtype)}
    if s.merged:
        spec |= {"item_count": ((s.items,), torch.int32), "item_rank": ((s.items,), torch.int32)}
    for name in s.directions:
        spec |= _pass_spec(name, s.flat(rows, device), s.stride, rows)
        if s.early:
            columns_of = columns if name == "reconstruct" else rows
            spec |= {
                f"{name}_dy": ((columns_of, s.stride), torch.float32),
                f"{name}_factor": ((), torch.float32),
            }
    return spec


def saved_spec(p: Problem, needs: Sequence[bool]) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """Shapes and types of `saved`; nothing is saved where there is nothing to compute or nobody wants gradients."""
    return list(_state_spec(p).values()) if any(needs) and not _is_empty(p) else []


def _is_empty(p: Problem) -> bool:
    return p.num_pv == 0 or p.num_history == 0 or p.pv_offsets.shape[0] == 1


# ---- launches -----------------------------------------------------------------------------------------------------


def _empty(spec: _Spec, device: torch.device) -> dict[str, Tensor]:
    return {
        name: torch.empty(shape, dtype=dtype, device=device)
        for name, (shape, dtype) in spec.items()
    }


def _prefix_sums(flags: Tensor, out: Tensor) -> Tensor:
    return torch.cumsum(flags, -1, dtype=torch.int32, out=out)


def _temperature(p: Problem | SequenceProblem) -> tuple[Any, bool]:
    """What `score_scale` of the kernels takes."""
    return (
        (1.0 / (p.tau * math.log(2.0)), False) if p.temperature is None else (p.temperature, True)
    )


def _online(p: Problem | SequenceProblem, dtype: torch.dtype, log_q: bool) -> bool:
    """Whether the running maximum is needed: tau unknown here or small, biases of unknown size, or float16 products."""
    return (
        p.temperature is not None or p.tau < _SMALLEST_FIXED_TAU or log_q or dtype == torch.float16
    )


def _steps(pages: int) -> int:
    return (pages + 1).bit_length()


def _mark_history(p: Problem | SequenceProblem, page: Tensor, live: Tensor | None) -> None:
    rows = page.shape[0]
    pages = p.history_offsets.shape[0] - 1
    plan.history_pages[(_cdiv(rows, configs.BLOCK_PLAN),)](
        p.history_offsets,
        p.history_mask if p.history_mask is not None else page,
        page,
        live if live is not None else page,
        rows,
        pages,
        _steps(pages),
        HAS_MASK=p.history_mask is not None,
        WANT_LIVE=live is not None,
        BLOCK=configs.BLOCK_PLAN,
    )


def _make_plan(p: Problem, s: _Shape, t: dict[str, Tensor], clicked: Tensor | None) -> None:
    """Pages, flags, prefix sums and compacted lists; the counts stay on the device."""
    live = None
    if p.history_mask is not None:
        live = torch.empty_like(t["history_page"])
    _mark_history(p, t["history_page"], live)
    if live is not None:
        live = torch.cumsum(live, 0, dtype=torch.int32)
    dummy = t["flags"]
    merged = "item_count" in t
    if merged:
        t["item_count"].zero_()
    grid = (_cdiv(s.rows, configs.BLOCK_PLAN),)
    plan.pv_flags[grid](
        p.pv_offsets,
        p.pv_mask if p.pv_mask is not None else dummy,
        clicked if clicked is not None else dummy,
        p.weights if p.weights is not None else dummy,
        p.history_offsets,
        live if live is not None else dummy,
        p.pv_index if p.pv_index is not None else dummy,
        t["pv_page"],
        t["flags"],
        t["item_count"] if merged else dummy,
        s.rows,
        s.pages,
        _steps(s.pages),
        HAS_MASK=p.pv_mask is not None,
        HAS_WEIGHTS=p.weights is not None,
        HAS_CLICKED=clicked is not None,
        HAS_HISTORY_MASK=live is not None,
        EVERY_RECONSTRUCTION=s.every,
        COUNT_ITEMS=merged,
        BLOCK=configs.BLOCK_PLAN,
    )
    _prefix_sums(t["flags"], t["ranks"])
    t["counts"].copy_(t["ranks"][:, -1])
    ids = p.item_ids if p.item_ids is not None else p.pv_index
    for flag, name in enumerate(("anchor", "reconstructed", "column")):
        if f"{name}_list" not in t or (name == "column" and merged):
            continue
        bias = t.get(f"{name}_bias")
        plan.compact[grid](
            t["ranks"][flag],
            t["flags"][flag],
            t["pv_page"],
            ids if ids is not None else dummy,
            p.log_q if bias is not None else dummy,
            t[f"{name}_list"],
            t[f"{name}_page"],
            t[f"{name}_id"],
            bias if bias is not None else dummy,
            s.rows,
            HAS_ID=ids is not None,
            HAS_LOG_Q=bias is not None,
            BLOCK=configs.BLOCK_PLAN,
        )
    if merged:
        present = (t["item_count"] > 0).to(torch.int32)
        _prefix_sums(present, t["item_rank"])
        t["counts"][2:3].copy_(t["item_rank"][-1:])
        plan.compact_items[(_cdiv(s.items, configs.BLOCK_PLAN),)](
            t["item_rank"],
            t["item_count"],
            t["column_list"],
            t["column_bias"],
            s.items,
            BLOCK=configs.BLOCK_PLAN,
        )


@dataclass
class _Rows:
    """One side of a contrast pass: unit rows and what masks and offsets them. `ids` None: the list itself."""

    unit: Tensor
    count: Tensor
    list: Tensor
    page: Tensor
    ids: Tensor
    bias: Tensor | None
    rank: Tensor  # prefix sums that made the list


def _sides(p: Problem, s: _Shape, t: dict[str, Tensor], direction: str) -> tuple[_Rows, _Rows]:
    """(anchors, candidates) of a direction."""
    has_ids = p.item_ids is not None or p.pv_index is not None

    def side(unit: str, name: str, flag: int) -> _Rows:
        return _Rows(
            t[unit],
            t["counts"][flag : flag + 1],
            t[f"{name}_list"],
            t[f"{name}_page"],
            # Without ids an item is itself alone; a merged column's list holds item numbers, which are the ids.
            t[f"{name}_id"]
            if has_ids and not (name == "column" and s.merged)
            else t[f"{name}_list"],
            t.get(f"{name}_bias"),
            t["ranks"][flag],
        )

    if direction == "reconstruct":
        return side("r_anchor" if s.both_lists else "r", "anchor", 0), side("e", "column", 2)
    return side("e_anchor", "anchor", 0), side("r", "reconstructed", 1)


def _attention_inputs(p: Problem) -> dict[str, Any]:
    """q, k, v and the index each is read through."""
    history = p.pv if p.history is None else p.history
    inputs: dict[str, Any] = {}
    for name, given, default, index in (
        ("q", p.query, p.pv, p.pv_index),
        ("k", p.key, history, p.history_index),
        ("v", p.value, history, p.history_index),
    ):
        indexed = given is None and index is not None
        inputs[f"{name}_ptr"] = default if given is None else given
        inputs[f"{name}_index_ptr"] = index if indexed else p.history_offsets
        inputs[f"HAS_{name.upper()}_INDEX"] = indexed
    return inputs


def _e_inputs(p: Problem) -> dict[str, Any]:
    return {
        "e_ptr": p.pv,
        "e_index_ptr": p.pv_index if p.pv_index is not None else p.pv_offsets,
        "HAS_E_INDEX": p.pv_index is not None,
    }


def _reconstructed(s: _Shape, t: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """List, pages and count of the rows that have an R."""
    name, flag = ("reconstructed", 1) if s.both_lists else ("anchor", 0)
    return t[f"{name}_list"], t[f"{name}_page"], t["counts"][flag : flag + 1]


def _attend(
    p: Problem, s: _Shape, t: dict[str, Tensor], positive: Tensor, raw: Tensor | None
) -> None:
    rows, pages, count = _reconstructed(s, t)
    reconstruct.attend[(_cdiv(s.rows, s.attention.block_m),)](
        **_attention_inputs(p),
        **_e_inputs(p),
        history_offsets_ptr=p.history_offsets,
        history_page_ptr=t["history_page"],
        list_ptr=rows,
        list_page_ptr=pages,
        count_ptr=count,
        attention_lse_ptr=t["attention_lse"],
        unit_ptr=t["r"] if raw is None else raw,
        norm_ptr=t["norm"],
        positive_ptr=positive,
        capacity=s.rows,
        scale=p.attention_scale,
        D=s.dim,
        STRIDE=s.stride,
        HEADS=p.num_heads,
        RAW=raw is not None,
        BLOCK_M=s.attention.block_m,
        BLOCK_H=s.attention.block_n,
        BLOCK_D=s.block_d,
        BLOCK_C=configs.attention_part(s.block_d),
        PRECISION=s.precision,
        num_warps=s.attention.num_warps,
        num_stages=s.attention.num_stages,
    )


def _normalize(
    p: Problem, s: _Shape, unit: Tensor, rows: Tensor, count: Tensor, through_index: bool
) -> None:
    index = p.pv_index if through_index else None
    epilogue.normalize_rows[(_cdiv(unit.shape[0], s.small.block_m),)](
        p.pv,
        index if index is not None else rows,
        rows,
        count,
        unit,
        D=s.dim,
        STRIDE=s.stride,
        HAS_INDEX=index is not None,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )


@dataclass
class _Pass:
    """Partial results of one contrast pass."""

    acc: Tensor
    top: Tensor
    total: Tensor
    above: Tensor
    slots: int


def _run_contrast(
    s: _Shape,
    x: _Rows,
    y: _Rows,
    *,
    out: _Pass,
    mask: int,
    tau: Any,
    tau_is_tensor: bool,
    page_offsets: Tensor,
    y_offset: Tensor | None = None,
    y_offset_is_count: bool = False,
    y_scale: Tensor | None = None,
    x_offset: Tensor | None = None,
    positive: Tensor | None = None,
    log_q: Tensor | None = None,
    online: bool = False,
    fixed_shift: bool = False,
    need_sum: bool = True,
    need_values: bool = True,
    need_rank: bool = False,
    fused: dict[str, Any] | None = None,
) -> None:
    dummy = x.list
    unused = dict.fromkeys(
        (
            "q_ptr q_index_ptr k_ptr k_index_ptr v_ptr v_index_ptr e_ptr e_index_ptr history_offsets_ptr "
            "history_page_ptr attention_lse_ptr norm_ptr positive_ptr"
        ).split(),
        dummy,
    )
    unused |= {
        "HAS_Q_INDEX": False,
        "HAS_K_INDEX": False,
        "HAS_V_INDEX": False,
        "HAS_E_INDEX": False,
    }
    unused |= {"capacity": 0, "attention_scale": 1.0}

    def pick(tensor: Tensor | None) -> Tensor:
        return dummy if tensor is None else tensor

    contrast.contrast[(out.slots,)](
        x_ptr=x.unit,
        y_ptr=y.unit,
        x_count_ptr=x.count,
        y_count_ptr=y.count,
        x_id_ptr=x.ids,
        y_id_ptr=y.ids,
        x_page_ptr=x.page,
        y_page_ptr=y.page,
        x_offset_ptr=pick(x_offset),
        y_offset_ptr=pick(y_offset),
        y_scale_ptr=pick(y_scale),
        x_rank_score_ptr=pick(positive),
        log_q_ptr=pick(log_q),
        page_offsets_ptr=page_offsets,
        y_rank_ptr=y.rank,
        tau=tau,
        acc_ptr=out.acc,
        top_ptr=out.top,
        total_ptr=out.total,
        above_ptr=out.above,
        slots=out.slots,
        list_ptr=x.list,
        **(unused if fused is None else fused),
        D=s.dim,
        FUSED=fused is not None,
        BLOCK_H=s.attention.block_n,
        TAU_IS_TENSOR=tau_is_tensor,
        MASK=mask,
        HAS_X_OFFSET=x_offset is not None,
        HAS_Y_OFFSET=y_offset is not None,
        HAS_Y_SCALE=y_scale is not None,
        Y_OFFSET_IS_COUNT=y_offset_is_count,
        HAS_RANK_LOG_Q=log_q is not None,
        FIXED_SHIFT=fixed_shift,
        ONLINE=online,
        NEED_SUM=need_sum,
        NEED_VALUES=need_values,
        NEED_RANK=need_rank,
        BLOCK_M=s.tile.block_m,
        BLOCK_N=s.tile.block_n,
        BLOCK_D=s.stride,
        PRECISION=s.precision,
        num_warps=s.tile.num_warps,
        num_stages=s.tile.num_stages,
    )


@dataclass
class _Transposed:
    """sum_i g_i p_ij x_i, into `out` [y capacity, STRIDE]; g may be in units of its largest entry (float16)."""

    g: Tensor
    out: Tensor


def _run_chunks(
    s: _Shape,
    x: _Rows,
    y: _Rows,
    out: _Pass | None,
    lse: Tensor,
    finish: Callable[[int, int], None] | None,
    transposed: _Transposed | None,
    workspace: int,
    *,
    mask: int,
    tau: Any,
    tau_is_tensor: bool,
    y_offset: Tensor | None = None,
    y_offset_is_count: bool = False,
    positive: Tensor | None = None,
    log_q: Tensor | None = None,
    online: bool = False,
    need_values: bool = True,
    need_rank: bool = False,
) -> None:
    """A contrast direction in chunks of rows. `out` and `finish`: the forward pass, which fills `lse`; without them
    `lse` is known. With a fixed shift and `transposed`, the scores are computed once and P serves two products."""
    device = x.unit.device
    tile = s.product
    capacity, columns = x.unit.shape[0], y.unit.shape[0]
    rows = min(
        configs.chunk_rows(columns, x.unit.dtype, workspace, tile),
        _cdiv(capacity, tile.block_m) * tile.block_m,
    )
    tiles_n = _cdiv(columns, tile.block_n)
    store = transposed is not None or need_values
    p = torch.empty((rows, columns) if store else (1, 1), dtype=x.unit.dtype, device=device)
    part_top = torch.empty(tiles_n, rows, dtype=torch.float32, device=device)
    part_total = torch.empty_like(part_top)
    part_above = torch.empty(
        (tiles_n, rows) if need_rank else (1, 1), dtype=torch.int32, device=device
    )
    scaled = (
        torch.empty(rows, s.stride, dtype=x.unit.dtype, device=device)
        if transposed is not None
        else p
    )
    lift = _HALF_LIFT if x.unit.dtype == torch.float16 else 0.0
    launch = {"num_warps": tile.num_warps, "num_stages": tile.num_stages}
    block: dict[str, Any] = {
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
    }
    block["PRECISION"] = s.precision
    small = {"BLOCK_M": s.small.block_m, "BLOCK_D": configs.next_power_of_2(s.stride)}

    def run_scores(first_row: int, normalised: bool, sums: bool, keep: bool) -> None:
        rank = need_rank and sums
        chunked.scores[(_cdiv(rows, tile.block_m) * tiles_n,)](
            x.unit,
            y.unit,
            x.count,
            y.count,
            x.ids,
            y.ids,
            x.page,
            y.page,
            y_offset if y_offset is not None else lse,
            positive if positive is not None else lse,
            x.list,
            log_q if log_q is not None else lse,
            lse,
            p,
            part_top,
            part_total,
            part_above,
            tau,
            lift if normalised else 0.0,
            first_row,
            rows,
            columns,
            STRIDE=s.stride,
            TAU_IS_TENSOR=tau_is_tensor,
            MASK=mask,
            HAS_Y_OFFSET=y_offset is not None,
            Y_OFFSET_IS_COUNT=y_offset_is_count,
            HAS_RANK_LOG_Q=log_q is not None,
            NORMALISED=normalised,
            ONLINE=online,
            STORE=keep,
            SUMS=sums,
            NEED_RANK=rank,
            **block,
            **launch,
        )

    for first_row in range(0, capacity, rows):
        normalised = online or out is None
        if out is not None and finish is not None:
            run_scores(first_row, False, True, store and not normalised)
            chunked.reduce_parts[(_cdiv(rows, 256),)](
                part_top,
                part_total,
                part_above,
                out.top,
                out.total,
                out.above,
                x.count,
                y.count,
                first_row,
                rows,
                NEED_RANK=need_rank,
                BLOCK_N=tile.block_n,
                BLOCK=256,
            )
            finish(first_row, min(rows, capacity - first_row))
        if normalised and store:
            run_scores(first_row, True, False, True)
        if out is not None and need_values:
            if normalised:
                # The product's P is relative to the log-sum-exp now, not to the running maximum.
                last = min(first_row + rows, capacity)
                torch.sub(lse[first_row:last], lift, out=out.top[first_row:last])
            chunked.product[(_cdiv(rows, tile.block_m) * _cdiv(s.stride, tile.block_n),)](
                p,
                y.unit,
                x.count,
                y.count,
                out.acc,
                first_row,
                rows,
                columns,
                STRIDE=s.stride,
                **block,
                **launch,
            )
        if transposed is not None:
            chunked.scale_rows[(_cdiv(rows, s.small.block_m),)](
                x.unit,
                transposed.g,
                out.top if out is not None else lse,
                lse,
                scaled,
                x.count,
                first_row,
                rows,
                STRIDE=s.stride,
                NORMALISED=normalised,
                **small,
                num_warps=s.small.num_warps,
            )
            chunked.transposed_product[
                (_cdiv(columns, tile.block_m) * _cdiv(s.stride, tile.block_n),)
            ](
                p,
                scaled,
                x.count,
                y.count,
                transposed.out,
                first_row,
                rows,
                columns,
                STRIDE=s.stride,
                ACCUMULATE=first_row > 0,
                **block,
                **launch,
            )


def _stats_buffers(rows: int, stats: bool, device: torch.device) -> tuple[Tensor, ...]:
    size = rows if stats else 0
    floats = [torch.zeros(size, dtype=torch.float32, device=device) for _ in range(3)]
    rank = torch.zeros(size, dtype=torch.int64, device=device)
    return (*floats, rank)


def loss_forward(p: Problem, needs: Sequence[bool], stats: bool) -> tuple[Any, ...]:
    """(loss, item_loss, log_sum_exp, positive_similarity, rank, is_anchor, num_skipped, saved)."""
    return _forward(p, needs, stats, None)


def _forward(
    p: Problem, needs: Sequence[bool], stats: bool, given: Tensor | None
) -> tuple[Any, ...]:
    """The loss; `given` is R [N, D] where another implementation computes the attention."""
    device = p.pv.device
    item_loss, item_lse, item_positive, item_rank = _stats_buffers(p.num_pv, stats, device)
    per_item = p.reduction == "none"
    if _is_empty(p):
        loss = torch.zeros((p.num_pv,) if per_item else (), dtype=torch.float32, device=device)
        is_anchor = torch.zeros(p.num_pv if stats else 0, dtype=torch.bool, device=device)
        skipped = (
            _skipped_without_history(p)
            if stats
            else torch.zeros(0, dtype=torch.int64, device=device)
        )
        return loss, item_loss, item_lse, item_positive, item_rank, is_anchor, skipped, []

    s = _shape(p)
    t = _empty(_state_spec(p), device)
    grads = any(needs)
    _make_plan(p, s, t, p.clicked)
    tau, tau_is_tensor = _temperature(p)
    positive = torch.empty(s.rows, 2, dtype=torch.float32, device=device)
    fuse = given is None and configs.fuse_attention(
        s.stride, s.chunked, s.both_lists, p.num_heads, stats
    )
    if "reconstruct" in s.directions:
        _normalize(p, s, t["e"], t["column_list"], t["counts"][2:3], not s.merged)
    if given is not None:
        rows, _, count = _reconstructed(s, t)
        epilogue.given_rows[(_cdiv(s.rows, s.small.block_m),)](
            r_ptr=given,
            **_e_inputs(p),
            list_ptr=rows,
            count_ptr=count,
            unit_ptr=t["r"],
            norm_ptr=t["norm"],
            positive_ptr=positive,
            D=s.dim,
            STRIDE=s.stride,
            BLOCK_M=s.small.block_m,
            BLOCK_D=s.block_d,
            num_warps=s.small.num_warps,
        )
    elif not fuse:
        _attend(p, s, t, positive, None)
    if s.both_lists:
        every, positive = positive, torch.empty_like(positive)
        _normalize(p, s, t["e_anchor"], t["anchor_list"], t["counts"][0:1], True)
        epilogue.gather_anchors[(_cdiv(s.rows, s.small.block_m),)](
            t["r"],
            every,
            t["ranks"][1],
            t["anchor_list"],
            t["counts"][0:1],
            t["r_anchor"],
            positive,
            STRIDE=s.stride,
            BLOCK_M=s.small.block_m,
            BLOCK_D=configs.next_power_of_2(s.stride),
            num_warps=s.small.num_warps,
        )

    losses = []
    online = _online(p, p.pv.dtype, p.log_q is not None)
    for direction in s.directions:
        x, y = _sides(p, s, t, direction)
        flat = s.flat(s.rows, device)
        out = _Pass(
            t[f"{direction}_acc"],
            t[f"{direction}_top"],
            torch.empty(flat, dtype=torch.float32, device=device),
            torch.empty(flat if stats else 0, dtype=torch.int32, device=device),
            s.slots(s.rows, device),
        )
        first_stats = stats and direction == s.directions[0]
        loss = torch.empty(s.rows, dtype=torch.float32, device=device)
        options: dict[str, Any] = {
            "mask": _MASKS[p.negatives],
            "tau": tau,
            "tau_is_tensor": tau_is_tensor,
            "y_offset": y.bias,
            "y_offset_is_count": s.merged and direction == "reconstruct",
            "positive": positive,
            "log_q": p.log_q,
            "online": online,
            "need_values": grads,
            "need_rank": first_stats,
        }

        def finish(
            first_row: int, rows: int, x: Any = x, y: Any = y, out: Any = out, loss: Any = loss
        ) -> None:
            contrast.finish_rows[(_cdiv(rows, 256),)](
                out.top,
                out.total,
                out.above,
                x.count,
                y.count,
                positive,
                t["anchor_list"],
                p.log_q if p.log_q is not None else positive,
                loss,
                t[f"{direction}_lse"],
                t[f"{direction}_miss"],
                item_lse,
                item_positive,
                item_rank,
                out.slots,
                first_row,
                first_row + rows,
                tau,
                TAU_IS_TENSOR=tau_is_tensor,
                HAS_LOG_Q=p.log_q is not None,
                HAS_POSITIVE=True,
                STATS=first_stats,
                BLOCK_M=s.tile.block_m,
                BLOCK_N=s.tile.block_n,
                BLOCK=256,
            )

        if s.chunked:
            transposed = None
            if grads and s.early:
                g, factor = _early_row_gradients(p, s, t, direction)
                transposed = _Transposed(g, t[f"{direction}_dy"])
                t[f"{direction}_factor"].copy_(factor)
            _run_chunks(
                s, x, y, out, t[f"{direction}_lse"], finish, transposed, p.workspace, **options
            )
        else:
            fused = None
            if fuse:
                fused = _attention_inputs(p) | _e_inputs(p)
                fused |= {
                    "history_offsets_ptr": p.history_offsets,
                    "history_page_ptr": t["history_page"],
                    "attention_lse_ptr": t["attention_lse"],
                    "norm_ptr": t["norm"],
                    "positive_ptr": positive,
                    "capacity": s.rows,
                    "attention_scale": p.attention_scale,
                }
            _run_contrast(
                s,
                x,
                y,
                out=out,
                page_offsets=p.pv_offsets,
                fixed_shift=not online,
                fused=fused,
                **options,
            )
            finish(0, s.rows)
        losses.append(loss)

    items = item_loss
    if per_item and not stats:
        items = torch.zeros(s.rows, dtype=torch.float32, device=device)
    loss = torch.empty((), dtype=torch.float32, device=device)
    contrast.reduce_loss[(1,)](
        losses[0],
        losses[-1],
        t["anchor_list"],
        t["counts"][0:1],
        p.weights if p.weights is not None else loss,
        loss,
        t["weight_sum"],
        items,
        BOTH=len(losses) == 2,
        HAS_WEIGHTS=p.weights is not None,
        MEAN=p.reduction == "mean",
        ITEMS=per_item or stats,
        BLOCK=1024,
    )
    if per_item:
        loss = items.clone() if stats else items
    is_anchor = t["flags"][0] != 0 if stats else torch.zeros(0, dtype=torch.bool, device=device)
    skipped = (
        t["counts"][3].to(torch.int64)
        if stats
        else torch.zeros(0, dtype=torch.int64, device=device)
    )
    saved = list(t.values()) if grads else []
    return loss, item_loss, item_lse, item_positive, item_rank, is_anchor, skipped, saved


def _skipped_without_history(p: Problem) -> Tensor:
    """Clicked items of a batch without any history: all of them, padding apart."""
    assert p.clicked is not None
    clicked = p.clicked if p.pv_mask is None else p.clicked & p.pv_mask
    inside = torch.arange(p.num_pv, device=clicked.device) < p.pv_offsets[-1]
    return (clicked & inside).sum()


def loss_backward(
    p: Problem, needs: Sequence[bool], saved: Sequence[Tensor], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of (pv, history, query, key, value, temperature)."""
    return _backward(p, needs, saved, grad, False)[0]


def _backward(
    p: Problem, needs: Sequence[bool], saved: Sequence[Tensor], grad: Tensor, given: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    """Gradients, and dL/dR [N, D] where R was given."""
    inputs = (p.pv, p.history, p.query, p.key, p.value, p.temperature)
    if _is_empty(p):
        zeros = [
            torch.zeros_like(x) if need and x is not None else None
            for x, need in zip(inputs, needs, strict=True)
        ]
        return zeros, torch.zeros(
            p.num_pv, p.pv.shape[1], dtype=p.pv.dtype, device=p.pv.device
        ) if given else None
    s = _shape(p)
    device, dtype = p.pv.device, p.pv.dtype
    t = dict(zip(_state_spec(p), saved, strict=True))
    tau, tau_is_tensor = _temperature(p)
    half = dtype == torch.float16
    slots = s.slots(s.rows, device)
    new = torch.empty

    # Upstream gradient of each anchor, and the transposed passes.
    g = new(s.rows, dtype=torch.float32, device=device)
    results: dict[str, _Pass] = {}
    factor = None
    scale = g
    for direction in s.directions:
        offset = torch.empty_like(g)
        epilogue.row_gradients[(_cdiv(s.rows, 256),)](
            grad,
            grad.stride(0) if grad.dim() else 0,
            p.weights if p.weights is not None else g,
            t["weight_sum"],
            t[f"{direction}_lse"],
            t["anchor_list"],
            t["counts"][0:1],
            g,
            offset,
            s.rows,
            1.0 / len(s.directions),
            _HALF_LIFT if half else 0.0,
            PER_ROW=p.reduction == "none",
            HAS_WEIGHTS=p.weights is not None,
            BLOCK=256,
        )
        x, y = _sides(p, s, t, direction)
        wanted = needs[0] if direction == "reconstruct" else True
        if not wanted:
            continue
        if s.early:
            factor = t[f"{direction}_factor"] * grad
            results[direction] = _Pass(t[f"{direction}_dy"], g, g, g, 1)
            continue
        if half and factor is None:
            scale, factor = _lowered(g)
        capacity = y.unit.shape[0]
        passes = s.slots(capacity, device)
        acc = new(s.flat(capacity, device), s.stride, dtype=torch.float32, device=device)
        results[direction] = result = _Pass(acc, g, g, g, passes)
        if s.chunked:
            _run_chunks(
                s,
                x,
                y,
                None,
                t[f"{direction}_lse"],
                None,
                _Transposed(scale, acc),
                p.workspace,
                mask=_MASKS[p.negatives],
                tau=tau,
                tau_is_tensor=tau_is_tensor,
                y_offset=y.bias,
            )
            continue
        _run_contrast(
            s,
            y,
            x,
            out=result,
            mask=_MASKS[p.negatives],
            tau=tau,
            tau_is_tensor=tau_is_tensor,
            page_offsets=p.pv_offsets,
            y_offset=offset,
            y_scale=scale,
            x_offset=y.bias,
            need_sum=False,
        )

    rows, pages, count = _reconstructed(s, t)
    tile = {"FORWARD_M": s.tile.block_m, "FORWARD_N": s.tile.block_n}
    tile |= {"TRANSPOSED_M": s.tile.block_m, "TRANSPOSED_N": s.tile.block_n}
    forward = "reconstruct" in s.directions
    identify = "identify" in s.directions
    columns = t["counts"][2:3]
    dr = new(s.rows, s.stride, dtype=dtype, device=device)
    delta = new(p.num_heads, s.rows, dtype=torch.float32, device=device)
    programs = _cdiv(s.rows, s.small.block_m)
    tau_parts = new(programs, dtype=torch.float32, device=device)
    any_pass = next(iter(results.values()), None)
    back = results.get("identify", any_pass)
    epilogue.reconstruction_gradient[(programs,)](
        list_ptr=rows,
        count_ptr=count,
        anchor_rank_ptr=t["ranks"][0],
        anchor_flag_ptr=t["flags"][0],
        anchor_count_ptr=t["counts"][0:1],
        column_count_ptr=columns,
        unit_ptr=t["r"],
        norm_ptr=t["norm"],
        **_e_inputs(p),
        forward_acc_ptr=t["reconstruct_acc"] if forward else g,
        forward_top_ptr=t["reconstruct_top"] if forward else g,
        forward_lse_ptr=t["reconstruct_lse"] if forward else g,
        forward_miss_ptr=t["reconstruct_miss"] if forward else g,
        g_ptr=g,
        transposed_acc_ptr=back.acc if back is not None else g,
        identify_miss_ptr=t["identify_miss"] if identify else g,
        transposed_factor_ptr=factor if factor is not None else g,
        dr_ptr=dr,
        delta_ptr=delta,
        tau_part_ptr=tau_parts,
        capacity=s.rows,
        forward_slots=slots,
        transposed_slots=back.slots if back is not None else 1,
        tau=tau,
        TAU_IS_TENSOR=tau_is_tensor,
        D=s.dim,
        STRIDE=s.stride,
        HEADS=p.num_heads,
        RECONSTRUCT=forward,
        IDENTIFY=identify,
        HAS_FACTOR=factor is not None,
        **tile,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    d_temperature = None
    if needs[5]:
        assert p.temperature is not None
        d_temperature = -tau_parts.sum() / p.temperature

    def with_contrast(out: Tensor, dq: Tensor | None) -> Tensor:
        column = results.get("reconstruct")
        return _spread(
            p,
            s,
            t,
            out,
            dq,
            anchor_count_ptr=t["counts"][0:1],
            column_count_ptr=columns,
            reconstructed_count_ptr=count,
            transposed_acc_ptr=column.acc if column is not None else g,
            transposed_factor_ptr=factor if factor is not None else g,
            identify_acc_ptr=t["identify_acc"] if identify else g,
            identify_top_ptr=t["identify_top"] if identify else g,
            identify_lse_ptr=t["identify_lse"] if identify else g,
            forward_miss_ptr=t["reconstruct_miss"] if forward else g,
            identify_miss_ptr=t["identify_miss"] if identify else g,
            g_ptr=g,
            transposed_slots=column.slots if column is not None else 1,
            identify_slots=slots,
            tau=tau,
            TAU_IS_TENSOR=tau_is_tensor,
            CONTRAST=True,
            COLUMNS=column is not None and not s.merged,
            RECONSTRUCT=forward,
            IDENTIFY=identify,
            HAS_FACTOR=factor is not None,
        )

    if given:
        d_rows = _spread(p, s, t, new(s.rows, s.dim, dtype=dtype, device=device), dr)
        dq, d_key, d_value = None, None, None
    else:
        d_rows = None
        dq, d_key, d_value = _attention_backward(p, s, t, needs, dr, delta)
    grads: list[Tensor | None] = [None] * 6
    grads[5] = d_temperature
    if needs[2]:
        grads[2] = _spread(p, s, t, torch.empty_like(p.query), dq)
    if needs[3]:
        grads[3] = d_key
    if needs[4]:
        grads[4] = d_value
    own_dq = dq if p.query is None else None
    # dk and dv of history rows that are not given apart; with both, their sum is in d_key.
    d_history = d_key if p.key is None else d_value if p.value is None else None
    if p.history is not None:
        if needs[1]:
            grads[1] = d_history if d_history is not None else torch.zeros_like(p.history)
        if needs[0]:
            grads[0] = with_contrast(torch.empty_like(p.pv), own_dq)
    elif needs[0]:
        d_pv = with_contrast(new(s.rows, s.dim, dtype=torch.float32, device=device), own_dq)
        grads[0] = _table_gradient(
            p, s, t, d_pv, d_history, results.get("reconstruct"), factor, tau, tau_is_tensor
        )
    return grads, d_rows


def _spread(
    p: Problem,
    s: _Shape,
    t: dict[str, Tensor],
    out: Tensor,
    dq: Tensor | None,
    **contrast_inputs: Any,
) -> Tensor:
    """Rows of the batch [N, D] from the compacted dq; with the contrast's inputs, dL/dE and dq together."""
    dummy = t["ranks"]
    unused: dict[str, Any] = dict.fromkeys(
        (
            "anchor_count_ptr column_count_ptr reconstructed_count_ptr transposed_acc_ptr transposed_factor_ptr "
            "identify_acc_ptr identify_top_ptr identify_lse_ptr forward_miss_ptr identify_miss_ptr g_ptr"
        ).split(),
        dummy,
    )
    unused |= {"transposed_slots": 1, "identify_slots": 1, "tau": 1.0, "TAU_IS_TENSOR": False}
    flags = ("CONTRAST", "COLUMNS", "RECONSTRUCT", "IDENTIFY", "HAS_FACTOR")
    unused |= dict.fromkeys(flags, False)
    tile = s.tile
    epilogue.pv_gradient[(_cdiv(s.rows, s.small.block_m),)](
        out_ptr=out,
        rank_ptr=t["ranks"],
        flag_ptr=t["flags"],
        **_e_inputs(p),
        unit_ptr=t["r"],
        dq_ptr=dq if dq is not None else dummy,
        rows=s.rows,
        **(unused | contrast_inputs),
        D=s.dim,
        STRIDE=s.stride,
        DQ_STRIDE=dq.shape[1] if dq is not None else s.dim,
        ADD_DQ=dq is not None,
        TRANSPOSED_M=tile.block_m,
        TRANSPOSED_N=tile.block_n,
        IDENTIFY_M=tile.block_m,
        IDENTIFY_N=tile.block_n,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    return out


def _early_row_gradients(
    p: Problem, s: _Shape, t: dict[str, Tensor], direction: str
) -> tuple[Tensor, Tensor]:
    """g_i for an upstream gradient of 1, before the losses are known, and the factor that belongs to it."""
    device = p.pv.device
    one = torch.ones((), dtype=torch.float32, device=device)
    weight_sum = one
    if p.reduction == "mean":
        flags = t["flags"][0]
        weight_sum = (
            flags.sum(dtype=torch.float32)
            if p.weights is None
            else torch.where(flags != 0, p.weights, 0).sum()
        )
    g = torch.empty(s.rows, dtype=torch.float32, device=device)
    epilogue.row_gradients[(_cdiv(s.rows, 256),)](
        one,
        0,
        p.weights if p.weights is not None else g,
        weight_sum,
        g,
        t["anchor_list"],
        t["counts"][0:1],
        g,
        torch.empty_like(g),
        s.rows,
        1.0 / len(s.directions),
        0.0,
        PER_ROW=False,
        HAS_WEIGHTS=p.weights is not None,
        BLOCK=256,
    )
    return _lowered(g) if p.pv.dtype == torch.float16 else (g, one)


def _lowered(g: Tensor) -> tuple[Tensor, Tensor]:
    """g in units of its largest entry, and the factor that restores the products (float16 range)."""
    largest = g.abs().amax()
    largest = torch.where(largest == 0, 1.0, largest)
    return g / largest, largest * 2.0**-_HALF_LIFT


def _attention_backward(
    p: Problem, s: _Shape, t: dict[str, Tensor], needs: Sequence[bool], dr: Tensor, delta: Tensor
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(dq of the listed rows, dk, dv); where key and value are both the history, dk is their sum and dv None."""
    device, dtype = p.pv.device, p.pv.dtype
    table = p.history is None
    rows, pages, count = _reconstructed(s, t)
    shared = _attention_inputs(p)
    # float16 has too little range for gradients of a mean over many anchors: their products run in tf32.
    dot_type = tl.float32 if dtype != torch.bfloat16 else tl.bfloat16
    common = {
        "capacity": s.rows,
        "scale": p.attention_scale,
        "D": s.dim,
        "STRIDE": s.stride,
        "HEADS": p.num_heads,
        "DOT_TYPE": dot_type,
        "BLOCK_M": s.backward.block_m,
        "BLOCK_H": s.backward.block_n,
        "BLOCK_D": s.block_d,
        "BLOCK_C": configs.attention_part(s.block_d),
        "PRECISION": s.precision,
        "num_warps": s.backward.num_warps,
        "num_stages": s.backward.num_stages,
    }
    dq = None
    if needs[2] if p.query is not None else needs[0]:
        # Occurrences of a table's items are summed: keep them in float32 until then.
        dq_dtype = torch.float32 if table or p.query is None else dtype
        dq = torch.empty(s.rows, s.dim, dtype=dq_dtype, device=device)
        reconstruct.attend_dq[(_cdiv(s.rows, s.backward.block_m),)](
            **shared,
            history_offsets_ptr=p.history_offsets,
            history_page_ptr=t["history_page"],
            list_ptr=rows,
            list_page_ptr=pages,
            count_ptr=count,
            attention_lse_ptr=t["attention_lse"],
            dr_ptr=dr,
            delta_ptr=delta,
            dq_ptr=dq,
            **common,
        )
    history_need = needs[0] if table else needs[1]
    want_key = needs[3] if p.key is not None else history_need
    want_value = needs[4] if p.value is not None else history_need
    if not want_key and not want_value:
        return dq, None, None
    together = p.key is None and p.value is None

    def output(given: Tensor | None) -> Tensor:
        kind = torch.float32 if table and given is None else dtype
        return torch.empty(s.history_rows, s.dim, dtype=kind, device=device)

    dk = output(p.key) if want_key else None
    dv = output(p.value) if want_value and not together else None
    anything = dk if dk is not None else dv
    part = (
        min(s.block_d, configs.LARGEST_REGISTER_DIM)
        if common["BLOCK_C"] != s.block_d
        else s.block_d
    )
    reconstruct.attend_dkv[(_cdiv(s.history_rows, s.backward.block_n), _cdiv(s.block_d, part))](
        **shared,
        pv_offsets_ptr=p.pv_offsets,
        rank_ptr=t["ranks"][1 if s.both_lists else 0],
        history_page_ptr=t["history_page"],
        list_ptr=rows,
        list_page_ptr=pages,
        attention_lse_ptr=t["attention_lse"],
        dr_ptr=dr,
        delta_ptr=delta,
        dk_ptr=dk if dk is not None else anything,
        dv_ptr=dv if dv is not None else anything,
        history_rows=s.history_rows,
        WANT_DK=want_key,
        WANT_DV=want_value,
        SUM_KV=together,
        BLOCK_O=part,
        **common,
    )
    return dq, dk, dv


def _occurrences(items: int, rows: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Row numbers sorted by item, and where each item's begin [items + 1]; padding (page < 0) comes last."""
    keys = torch.cat([torch.where(page >= 0, index, items) for index, page in rows])
    ordered, order = torch.sort(keys, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(items + 1, device=keys.device))


def _table_gradient(
    p: Problem,
    s: _Shape,
    t: dict[str, Tensor],
    d_pv: Tensor,
    d_history: Tensor | None,
    result: _Pass | None,
    factor: Tensor | None,
    tau: Any,
    tau_is_tensor: bool,
) -> Tensor:
    """dL/dU: occurrences summed in a fixed order, and what the merged columns add."""
    assert p.pv_index is not None and p.history_index is not None
    order, starts = _occurrences(
        s.items, [(p.pv_index, t["pv_page"]), (p.history_index, t["history_page"])]
    )
    if not s.merged or result is None:
        return _sum_occurrences(p.pv, s, order, starts, d_pv, d_history, s.rows)
    merged = {
        "item_count_ptr": t["item_count"],
        "column_rank_ptr": t["item_rank"],
        "column_count_ptr": t["counts"][2:3],
        "anchor_count_ptr": t["counts"][0:1],
        "transposed_acc_ptr": result.acc,
        "transposed_factor_ptr": factor if factor is not None else result.acc,
        "transposed_slots": result.slots,
        "tau": tau,
        "TAU_IS_TENSOR": tau_is_tensor,
        "MERGED": True,
        "HAS_FACTOR": factor is not None,
    }
    return _sum_occurrences(p.pv, s, order, starts, d_pv, d_history, s.rows, merged)


def _sum_occurrences(
    table: Tensor,
    s: _Shape,
    order: Tensor,
    starts: Tensor,
    d_pv: Tensor | None,
    d_history: Tensor | None,
    rows: int,
    merged: dict[str, Any] | None = None,
) -> Tensor:
    """The gradient of a table from those of its occurrences; the first `rows` of them are PV rows."""
    out = torch.empty_like(table)
    unused = dict.fromkeys(
        ("item_count_ptr", "column_rank_ptr", "column_count_ptr", "anchor_count_ptr"), order
    ) | dict.fromkeys(("transposed_acc_ptr", "transposed_factor_ptr"), out)
    plain = unused | {
        "transposed_slots": 1,
        "tau": 1.0,
        "TAU_IS_TENSOR": False,
        "MERGED": False,
        "HAS_FACTOR": False,
    }
    epilogue.table_gradient[(s.items,)](
        out_ptr=out,
        order_ptr=order,
        starts_ptr=starts,
        pv_ptr=d_pv if d_pv is not None else out,
        history_ptr=d_history if d_history is not None else out,
        table_ptr=table,
        rows=rows,
        **(plain if merged is None else merged),
        D=s.dim,
        STRIDE=s.stride,
        HAS_PV=d_pv is not None,
        HAS_HISTORY=d_history is not None,
        TRANSPOSED_M=s.tile.block_m,
        TRANSPOSED_N=s.tile.block_n,
        BLOCK_R=16,
        BLOCK_D=s.block_d,
        num_warps=4,
    )
    return out


# ---- reconstruct --------------------------------------------------------------------------------------------------


def _reconstruct(p: Problem) -> tuple[_Shape, dict[str, Tensor], Tensor]:
    """The lists of all PV rows with a history, and their R [N, D]."""
    s = _shape(p)
    t = _empty(_plan_spec(p, s), p.pv.device)
    _make_plan(p, s, t, None)
    r = torch.zeros(s.rows, s.dim, dtype=p.pv.dtype, device=p.pv.device)
    t |= {"r": r, "norm": t["attention_lse"]}
    _attend(p, s, t, t["attention_lse"], r)
    return s, t, r


def reconstruct_forward(p: Problem) -> Tensor:
    """R [N, D], zeros for padding and for pages without history."""
    if _is_empty(p):
        return torch.zeros(p.num_pv, p.pv.shape[1], dtype=p.pv.dtype, device=p.pv.device)
    return _reconstruct(p)[2]


def reconstruct_backward(p: Problem, needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """Gradients of (pv, history, query, key, value); the attention is computed again."""
    inputs = (p.pv, p.history, p.query, p.key, p.value)
    if _is_empty(p):
        return [
            torch.zeros_like(x) if need and x is not None else None
            for x, need in zip(inputs, needs, strict=True)
        ]
    s, t, r = _reconstruct(p)
    device, dtype = p.pv.device, p.pv.dtype
    rows, _, count = _reconstructed(s, t)
    dr = torch.empty(s.rows, s.stride, dtype=dtype, device=device)
    delta = torch.empty(p.num_heads, s.rows, dtype=torch.float32, device=device)
    epilogue.given_gradient[(_cdiv(s.rows, s.small.block_m),)](
        grad.contiguous(),
        r,
        rows,
        count,
        dr,
        delta,
        s.rows,
        D=s.dim,
        STRIDE=s.stride,
        HEADS=p.num_heads,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    dq, d_key, d_value = _attention_backward(p, s, t, needs, dr, delta)
    grads: list[Tensor | None] = [None] * 5
    grads[3] = d_key if needs[3] else None
    grads[4] = d_value if needs[4] else None
    d_history = d_key if p.key is None else d_value if p.value is None else None
    table = p.history is None
    # The list holds exactly the rows with a gradient, and every place of it is written.
    d_rows = None
    if dq is not None:
        kind = torch.float32 if table and p.query is None else dtype
        d_rows = torch.empty(s.rows, s.dim, dtype=kind, device=device)
        _spread(p, s, t, d_rows, dq)
    if needs[2]:
        grads[2] = d_rows
    own = d_rows if p.query is None else None
    if not table:
        if needs[0]:
            grads[0] = own if own is not None else torch.zeros_like(p.pv)
        if needs[1]:
            grads[1] = d_history if d_history is not None else torch.zeros_like(p.history)
    elif needs[0]:
        if own is None:
            own = torch.zeros(s.rows, s.dim, dtype=torch.float32, device=device)
        grads[0] = _table_gradient(p, s, t, own, d_history, None, None, 1.0, False)
    return grads


# ---- click sequence -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _SequenceShape(_Shape):
    mask: int = 0


def _sequence_shape(p: SequenceProblem) -> _SequenceShape:
    dim = p.history.shape[1]
    chunks = configs.use_chunks(p.history.dtype, dim)
    stride = configs.row_stride(dim, chunks)
    dtype = p.history.dtype
    return _SequenceShape(
        dim=dim,
        stride=stride,
        block_d=configs.block_dim(stride),
        rows=p.num_history,
        history_rows=p.num_history,
        pages=p.history_offsets.shape[0] - 1,
        items=0 if p.history_index is None else p.history.shape[0],
        merged=False,
        every=False,
        both_lists=False,
        directions=(),
        id_dtype=torch.int64 if p.item_ids is not None else torch.int32,
        chunked=chunks,
        early=False,
        tile=configs.contrast_tile(dtype, stride),
        product=configs.product_tile(dtype),
        attention=configs.attention_tile(dtype, stride, False),
        backward=configs.attention_tile(dtype, stride, True),
        small=configs.rows_tile(stride),
        precision=configs.dot_precision(dtype),
        mask=3 if p.ids is None else 4,
    )


def _sequence_spec(p: SequenceProblem) -> _Spec:
    s = _sequence_shape(p)
    spec: _Spec = {
        "history_page": ((s.rows,), torch.int32),
        "rank": ((s.rows,), torch.int32),
        "c": ((s.rows, s.stride), p.history.dtype),
        "number": ((s.rows,), torch.float32),
        "anchors": ((), torch.float32),
    }
    spec |= _list_spec("row", s.rows, s.id_dtype, False)
    return spec | _pass_spec("pass", s.flat(s.rows, p.history.device), s.stride, s.rows)


def _sequence_is_empty(p: SequenceProblem) -> bool:
    return p.num_history == 0 or p.history_offsets.shape[0] == 1


def sequence_saved_spec(
    p: SequenceProblem, needs: Sequence[bool]
) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """As `saved_spec`."""
    return list(_sequence_spec(p).values()) if any(needs) and not _sequence_is_empty(p) else []


def _sequence_rows(s: _SequenceShape, t: dict[str, Tensor]) -> _Rows:
    ids = t["row_id"] if s.mask == 4 else t["row_list"]
    return _Rows(t["c"], t["rank"][-1:], t["row_list"], t["row_page"], ids, None, t["rank"])


def _page_mean(
    p: SequenceProblem,
    s: _SequenceShape,
    t: dict[str, Tensor],
    factor: Tensor | None,
    cosine: Tensor,
) -> Tensor:
    out = torch.empty(s.rows, s.stride, dtype=torch.float32, device=cosine.device)
    rows = _sequence_rows(s, t)
    epilogue.page_mean[(_cdiv(s.rows, s.attention.block_m),)](
        t["c"],
        rows.ids,
        rows.page,
        rows.count,
        p.history_offsets,
        t["rank"],
        factor if factor is not None else cosine,
        out,
        t["number"],
        cosine,
        STRIDE=s.stride,
        HAS_ID=s.mask == 4,
        TRANSPOSED=factor is not None,
        BLOCK_M=s.attention.block_m,
        BLOCK_H=s.attention.block_n,
        BLOCK_D=configs.next_power_of_2(s.stride),
        PRECISION=s.precision,
        num_warps=s.attention.num_warps,
        num_stages=1,
    )
    return out


def sequence_forward(p: SequenceProblem, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
    """(loss, saved) of the click-sequence loss."""
    device = p.history.device
    per_item = p.reduction == "none"
    if _sequence_is_empty(p):
        return torch.zeros(
            (p.num_history,) if per_item else (), dtype=torch.float32, device=device
        ), []
    s = _sequence_shape(p)
    t = _empty(_sequence_spec(p), device)
    tau, tau_is_tensor = _temperature(p)
    live = torch.empty_like(t["history_page"])
    _mark_history(p, t["history_page"], live)
    _prefix_sums(live, t["rank"])
    ids = p.ids
    plan.compact[(_cdiv(s.rows, configs.BLOCK_PLAN),)](
        t["rank"],
        live,
        t["history_page"],
        ids if ids is not None else live,
        live,
        t["row_list"],
        t["row_page"],
        t["row_id"],
        live,
        s.rows,
        HAS_ID=ids is not None,
        HAS_LOG_Q=False,
        BLOCK=configs.BLOCK_PLAN,
    )
    rows = _sequence_rows(s, t)
    epilogue.normalize_rows[(_cdiv(s.rows, s.small.block_m),)](
        p.history,
        p.history_index if p.history_index is not None else rows.list,
        rows.list,
        rows.count,
        t["c"],
        D=s.dim,
        STRIDE=s.stride,
        HAS_INDEX=p.history_index is not None,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    cosine = torch.empty(s.rows, dtype=torch.float32, device=device)
    _page_mean(p, s, t, None, cosine)
    out = _Pass(
        t["pass_acc"],
        t["pass_top"],
        torch.empty(s.flat(s.rows, device), dtype=torch.float32, device=device),
        live,
        s.slots(s.rows, device),
    )
    options = {
        "mask": s.mask,
        "tau": tau,
        "tau_is_tensor": tau_is_tensor,
        "online": _online(p, p.history.dtype, False),
        "need_values": any(needs),
    }

    def finish(first_row: int, number: int) -> None:
        contrast.finish_rows[(_cdiv(number, 256),)](
            out.top,
            out.total,
            live,
            rows.count,
            rows.count,
            cosine,
            rows.list,
            cosine,
            cosine,
            t["pass_lse"],
            t["pass_miss"],
            cosine,
            cosine,
            live,
            out.slots,
            first_row,
            first_row + number,
            tau,
            TAU_IS_TENSOR=tau_is_tensor,
            HAS_LOG_Q=False,
            HAS_POSITIVE=False,
            STATS=False,
            BLOCK_M=s.tile.block_m,
            BLOCK_N=s.tile.block_n,
            BLOCK=256,
        )

    if s.chunked:
        _run_chunks(s, rows, rows, out, t["pass_lse"], finish, None, p.workspace, **options)
    else:
        _run_contrast(
            s,
            rows,
            rows,
            out=out,
            page_offsets=p.history_offsets,
            fixed_shift=not options["online"],
            **options,
        )
        finish(0, s.rows)
    loss = torch.zeros((s.rows,) if per_item else (), dtype=torch.float32, device=device)
    epilogue.sequence_losses[(1,)](
        t["pass_lse"],
        cosine,
        t["number"],
        rows.list,
        rows.count,
        cosine if per_item else loss,
        t["anchors"],
        loss,
        tau,
        TAU_IS_TENSOR=tau_is_tensor,
        MEAN=p.reduction == "mean",
        ITEMS=per_item,
        BLOCK=1024,
    )
    return loss, list(t.values()) if any(needs) else []


def sequence_backward(
    p: SequenceProblem, needs: Sequence[bool], saved: Sequence[Tensor], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of (history or the table, temperature)."""
    device = p.history.device
    if _sequence_is_empty(p):
        return [
            torch.zeros_like(p.history) if needs[0] else None,
            torch.zeros_like(p.temperature) if needs[1] and p.temperature is not None else None,
        ]
    s = _sequence_shape(p)
    t = dict(zip(_sequence_spec(p), saved, strict=True))
    # `page_mean` counts the positives again: not into what was saved.
    scratch = t | {"number": torch.empty_like(t["number"])}
    tau, tau_is_tensor = _temperature(p)
    half = p.history.dtype == torch.float16
    rows = _sequence_rows(s, t)
    g, offset, factor, cosine = (
        torch.empty(s.rows, dtype=torch.float32, device=device) for _ in range(4)
    )
    epilogue.sequence_row_gradients[(_cdiv(s.rows, 256),)](
        grad,
        grad.stride(0) if grad.dim() else 0,
        t["anchors"],
        t["number"],
        t["pass_lse"],
        rows.list,
        rows.count,
        g,
        offset,
        factor,
        s.rows,
        _HALF_LIFT if half else 0.0,
        PER_ROW=p.reduction == "none",
        BLOCK=256,
    )
    scale, lower = _lowered(g) if half else (g, None)
    slots = s.slots(s.rows, device)
    acc = torch.empty(s.flat(s.rows, device), s.stride, dtype=torch.float32, device=device)
    options = {"mask": s.mask, "tau": tau, "tau_is_tensor": tau_is_tensor}
    if s.chunked:
        _run_chunks(
            s,
            rows,
            rows,
            None,
            t["pass_lse"],
            None,
            _Transposed(scale, acc),
            p.workspace,
            **options,
        )
    else:
        _run_contrast(
            s,
            rows,
            rows,
            out=_Pass(acc, g, g, g, slots),
            page_offsets=p.history_offsets,
            y_offset=offset,
            y_scale=scale,
            need_sum=False,
            **options,
        )
    mean = _page_mean(p, s, scratch, None, cosine)
    pulled = _page_mean(p, s, scratch, factor, cosine)
    table = p.history_index is not None
    d_rows = torch.zeros(
        s.rows, s.dim, dtype=torch.float32 if table else p.history.dtype, device=device
    )
    programs = _cdiv(s.rows, s.small.block_m)
    tau_parts = torch.empty(programs, dtype=torch.float32, device=device)
    tiles = {"TILE_M": s.tile.block_m, "TILE_N": s.tile.block_n}
    tiles |= {"TRANSPOSED_M": s.tile.block_m, "TRANSPOSED_N": s.tile.block_n}
    epilogue.sequence_gradient[(programs,)](
        rows.list,
        rows.count,
        p.history,
        p.history_index if p.history_index is not None else rows.list,
        g,
        t["pass_lse"],
        mean,
        pulled,
        t["pass_acc"],
        t["pass_top"],
        acc,
        lower if lower is not None else g,
        d_rows,
        tau_parts,
        slots,
        tau,
        TAU_IS_TENSOR=tau_is_tensor,
        HAS_INDEX=table,
        HAS_FACTOR=lower is not None,
        D=s.dim,
        STRIDE=s.stride,
        **tiles,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    d_temperature = None
    if needs[1]:
        assert p.temperature is not None
        d_temperature = -tau_parts.sum() / p.temperature
    if not needs[0]:
        return [None, d_temperature]
    if not table:
        return [d_rows, d_temperature]
    order, starts = _occurrences(s.items, [(p.history_index, t["history_page"])])
    return [_sum_occurrences(p.history, s, order, starts, None, d_rows, 0), d_temperature]
