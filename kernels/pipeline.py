"""impl="triton": the loss as a sequence of kernel launches, without a host sync and without the similarity matrix.

Forward: pages and compacted lists (plan) -> e and r as contiguous unit rows -> one streaming pass over the candidates
-> log-sum-exp and loss. Backward: gradients of r -> attention -> one transposed pass for the gradients of e.
README.md has the notation and the derivation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy
import torch
import triton
from torch import Tensor

from . import candidate_pipeline, configs, contrast, epilogue
from .passes import lowered, run_chunks, run_contrast
from .reconstruct_pipeline import reconstruct_backward, reconstruct_forward
from .sequence import sequence_backward, sequence_forward, sequence_saved_spec
from .stages import (
    attend,
    attention_backward,
    e_inputs,
    gather_anchors,
    make_plan,
    normalize,
    normalize_given,
    occurrences,
    reconstructed,
    reduce_losses,
    row_gradients,
    sides,
    spread,
    sum_occurrences,
)
from .state import (
    HALF_LIFT,
    MASKS,
    Pass,
    Shape,
    Transposed,
    allows_fixed_shift,
    cdiv,
    empty_tensors,
    is_empty,
    loss_shape,
    needs_running_maximum,
    state_spec,
    sums_dtype,
    temperature_argument,
)

if TYPE_CHECKING:
    from courier_fast.problem import Problem, SequenceProblem

__all__ = [
    "loss_backward",
    "loss_forward",
    "reconstruct_backward",
    "reconstruct_forward",
    "saved_spec",
    "sequence_backward",
    "sequence_forward",
    "sequence_saved_spec",
    "unavailable_reasons",
]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def interpreter_works(triton_version: str, numpy_version: str) -> bool:
    """Triton before 3.7 takes arrays of one element for numbers, which NumPy 2.4 no longer does."""
    old, new = (
        tuple(int(x) for x in version.split(".")[:2]) for version in (triton_version, numpy_version)
    )
    return old >= (3, 7) or new < (2, 4)


def unavailable_reasons(p: Problem | SequenceProblem) -> list[str]:
    """Why these kernels cannot run this problem here; empty if they can."""
    source = p.pv if hasattr(p, "pv") else p.history
    reasons = []
    device = source.device
    if device.type != "cuda" and not (device.type == "cpu" and configs.interpreted()):
        reasons.append(f"the tensors are on {device.type!r}; Triton kernels need a CUDA device")
    elif device.type == "cpu" and not interpreter_works(triton.__version__, numpy.__version__):
        reasons.append(
            f"the interpreter of Triton {triton.__version__} needs NumPy below 2.4, this is {numpy.__version__}"
        )
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


def saved_spec(p: Problem, needs: Sequence[bool]) -> list[tuple[tuple[Any, ...], torch.dtype]]:
    """Shapes and types of `saved`; nothing is saved where there is nothing to compute or nobody wants gradients."""
    if not any(needs) or is_empty(p):
        return []
    if p.attention == "candidate":
        return list(candidate_pipeline.state_spec(p, loss_shape(p)).values())
    return list(state_spec(p, loss_shape(p)).values())


def _stats_buffers(rows: int, stats: bool, device: torch.device) -> tuple[Tensor, ...]:
    size = rows if stats else 0
    floats = [torch.zeros(size, dtype=torch.float32, device=device) for _ in range(3)]
    rank = torch.zeros(size, dtype=torch.int64, device=device)
    return (*floats, rank)


def loss_forward(p: Problem, needs: Sequence[bool], stats: bool) -> tuple[Any, ...]:
    """(loss, item_loss, log_sum_exp, positive_similarity, rank, is_anchor, num_skipped, saved)."""
    return forward(p, needs, stats, None)


def forward(
    p: Problem, needs: Sequence[bool], stats: bool, given: Tensor | None
) -> tuple[Any, ...]:
    """The loss; `given` is R [N, D] where another implementation computes the attention."""
    device = p.pv.device
    item_loss, item_lse, item_positive, item_rank = _stats_buffers(p.num_pv, stats, device)
    per_item = p.reduction == "none"
    if is_empty(p):
        loss = torch.zeros((p.num_pv,) if per_item else (), dtype=torch.float32, device=device)
        is_anchor = torch.zeros(p.num_pv if stats else 0, dtype=torch.bool, device=device)
        skipped = (
            _skipped_without_history(p)
            if stats
            else torch.zeros(0, dtype=torch.int64, device=device)
        )
        return loss, item_loss, item_lse, item_positive, item_rank, is_anchor, skipped, []

    if p.attention == "candidate":
        per_row = (item_loss, item_lse, item_positive, item_rank)
        loss, items, t = candidate_pipeline.forward(p, stats, per_row)
        return _results(p, needs, stats, loss, items, per_row, t)
    s = loss_shape(p)
    grads = any(needs)
    t = empty_tensors(state_spec(p, s, grads), device)
    tile = s.forward(grads)
    make_plan(p, s, t, p.clicked)
    tau, tau_is_tensor = temperature_argument(p)
    positive = torch.empty(s.rows, 2, dtype=torch.float32, device=device)
    if "reconstruct" in s.directions:
        normalize(p, s, t["e"], t["column_list"], t["counts"][2:3], not s.merged)
    if given is not None:
        normalize_given(p, s, t, given, positive)
    else:
        attend(p, s, t, positive, None)
    if s.both_lists:
        every, positive = positive, torch.empty_like(positive)
        normalize(p, s, t["e_anchor"], t["anchor_list"], t["counts"][0:1], True)
        gather_anchors(s, t, every, positive)

    losses = []
    online = needs_running_maximum(p, p.pv.dtype, p.log_q is not None)
    for direction in s.directions:
        x, y = sides(p, s, t, direction)
        flat = s.flat(s.rows, tile, device)
        out = Pass(
            t[f"{direction}_acc"],
            t[f"{direction}_top"],
            torch.empty(flat, dtype=torch.float32, device=device),
            torch.empty(flat if stats else 0, dtype=torch.int32, device=device),
            s.slots(s.rows, tile, device),
            tile,
        )
        first_stats = stats and direction == s.directions[0]
        loss = torch.empty(s.rows, dtype=torch.float32, device=device)
        options: dict[str, Any] = {
            "mask": MASKS[p.negatives],
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
            contrast.finish_rows[(cdiv(rows, 256),)](
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
                s.programs(tile, device),
                first_row,
                first_row + rows,
                tau,
                TAU_IS_TENSOR=tau_is_tensor,
                HAS_LOG_Q=p.log_q is not None,
                HAS_POSITIVE=True,
                STATS=first_stats,
                STREAM=s.stream,
                BLOCK_M=out.tile.block_m,
                BLOCK_N=out.tile.block_n,
                BLOCK=256,
            )

        if s.chunked:
            transposed = None
            if grads and s.early:
                g, factor = _early_row_gradients(p, s, t, direction)
                transposed = Transposed(g, t[f"{direction}_dy"])
                t[f"{direction}_factor"].copy_(factor)
            run_chunks(
                s, x, y, out, t[f"{direction}_lse"], finish, transposed, p.workspace, **options
            )
        else:
            run_contrast(
                s,
                x,
                y,
                out=out,
                page_offsets=p.pv_offsets,
                fixed_shift=allows_fixed_shift(p, p.pv.dtype, p.log_q is not None),
                **options,
            )
            finish(0, s.rows)
        losses.append(loss)

    loss, items = reduce_losses(p, s, t, losses, item_loss, stats)
    return _results(
        p, needs, stats, loss, items, (item_loss, item_lse, item_positive, item_rank), t
    )


def _results(
    p: Problem,
    needs: Sequence[bool],
    stats: bool,
    loss: Tensor,
    items: Tensor,
    per_row: tuple[Tensor, ...],
    t: dict[str, Tensor],
) -> tuple[Any, ...]:
    """What `loss_forward` gives, from the reduced loss, the items' losses and the state."""
    if p.reduction == "none":
        loss = items.clone() if stats else items
    is_anchor = t["flags"][0] != 0 if stats else t["flags"].new_zeros(0, dtype=torch.bool)
    skipped = (
        t["counts"][3].to(torch.int64) if stats else t["counts"].new_zeros(0, dtype=torch.int64)
    )
    saved = list(t.values()) if any(needs) else []
    return loss, *per_row, is_anchor, skipped, saved


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
    return backward(p, needs, saved, grad, False)[0]


def backward(
    p: Problem, needs: Sequence[bool], saved: Sequence[Tensor], grad: Tensor, given: bool
) -> tuple[list[Tensor | None], Tensor | None]:
    """Gradients, and dL/dR [N, D] where R was given."""
    inputs = (p.pv, p.history, p.query, p.key, p.value, p.temperature)
    if is_empty(p):
        zeros = [
            torch.zeros_like(x) if need and x is not None else None
            for x, need in zip(inputs, needs, strict=True)
        ]
        return zeros, torch.zeros(
            p.num_pv, p.pv.shape[1], dtype=p.pv.dtype, device=p.pv.device
        ) if given else None
    if p.attention == "candidate":
        return candidate_pipeline.backward(p, needs, saved, grad), None
    s = loss_shape(p)
    device, dtype = p.pv.device, p.pv.dtype
    t = dict(zip(state_spec(p, s), saved, strict=True))
    tau, tau_is_tensor = temperature_argument(p)
    half = dtype == torch.float16
    new = torch.empty

    # Upstream gradient of each anchor. In a mean or a sum without weights it is one number, and stays out of the
    # transposed pass: a factor of every column costs it 3 percent.
    uniform = p.weights is None and p.reduction != "none"
    g = t["weight_sum"]
    if not uniform:
        g = row_gradients(p, s, t, grad, t["weight_sum"], 1.0 / len(s.directions))
    d_pv = torch.empty_like(p.pv) if needs[0] and p.history is not None else None
    results, factor = _transposed_passes(p, s, t, needs, grad, None if uniform else g, d_pv)
    upstream: dict[str, Any] = {
        "g_ptr": g,
        "upstream_ptr": grad,
        "weight_sum_ptr": t["weight_sum"],
        "share": 1.0 / len(s.directions),
        "lower": 2.0**-HALF_LIFT if half else 1.0,
        "UNIFORM": uniform,
        "transposed_factor_ptr": factor if factor is not None else g,
        "HAS_FACTOR": factor is not None,
        "tau": tau,
        "TAU_IS_TENSOR": tau_is_tensor,
    }
    dr, delta, tau_parts = _reconstruction_gradient(p, s, t, results, upstream)
    d_temperature = None
    if needs[5]:
        assert p.temperature is not None
        d_temperature = -tau_parts.sum() / p.temperature

    def with_contrast(out: Tensor, dq: Tensor | None) -> Tensor:
        return spread(p, s, t, out, dq, **_contrast_inputs(s, t, results, upstream))

    if given:
        d_rows = spread(p, s, t, new(s.rows, s.dim, dtype=dtype, device=device), dr)
        dq, d_key, d_value = None, None, None
    else:
        d_rows = None
        dq, d_key, d_value = attention_backward(p, s, t, needs, dr, delta)
    grads: list[Tensor | None] = [None] * 6
    grads[5] = d_temperature
    if needs[2]:
        grads[2] = spread(p, s, t, torch.empty_like(p.query), dq)
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
            assert d_pv is not None
            grads[0] = with_contrast(d_pv, own_dq)
    elif needs[0]:
        d_rows_pv = with_contrast(new(s.rows, s.dim, dtype=torch.float32, device=device), own_dq)
        grads[0] = _table_gradient(
            p, s, t, d_rows_pv, d_history, results.get("reconstruct"), upstream
        )
    return grads, d_rows


def _transposed_passes(
    p: Problem,
    s: Shape,
    t: dict[str, Tensor],
    needs: Sequence[bool],
    grad: Tensor,
    g: Tensor | None,
    d_pv: Tensor | None,
) -> tuple[dict[str, Pass], Tensor | None]:
    """sum_i g_i p_ij x_i of each direction, to dL/dE itself where it can be; and the factor that is left out of them.

    `g` None: the same for every anchor, and left out."""
    tau, tau_is_tensor = temperature_argument(p)
    device, dtype = p.pv.device, p.pv.dtype
    half = dtype == torch.float16
    scale, factor = g, None
    none = t["weight_sum"]
    results: dict[str, Pass] = {}
    for direction in s.directions:
        x, y = sides(p, s, t, direction)
        if direction == "reconstruct" and not needs[0]:
            continue
        if s.early:
            factor = t[f"{direction}_factor"] * grad
            results[direction] = Pass(t[f"{direction}_dy"], none, none, none, 1, s.transposed)
            continue
        if half and g is not None and factor is None:
            scale, factor = lowered(g)
        capacity = y.unit.shape[0]
        tiles = cdiv(capacity, s.transposed.block_m)
        # Chunks are summed in float32; one pass is rounded once.
        kind = torch.float32 if s.chunked else sums_dtype(dtype)
        in_place = (
            direction == "reconstruct"
            and d_pv is not None
            and not s.chunked
            and p.negatives != "page"
            and d_pv.dtype == kind
            and s.stride == s.dim
            and 2 * tiles > s.programs(s.transposed, device)
        )
        if in_place:
            assert d_pv is not None
            result = Pass(d_pv, none, none, none, tiles, s.transposed, True)
        else:
            flat = s.flat(capacity, s.transposed, device)
            acc = torch.empty(flat, s.stride, dtype=kind, device=device)
            slots = s.slots(capacity, s.transposed, device)
            result = Pass(acc, none, none, none, slots, s.transposed)
        results[direction] = result
        if s.chunked:
            assert scale is not None  # each row has its own: else P was used at once
            run_chunks(
                s,
                x,
                y,
                None,
                t[f"{direction}_lse"],
                None,
                Transposed(scale, result.acc),
                p.workspace,
                mask=MASKS[p.negatives],
                tau=tau,
                tau_is_tensor=tau_is_tensor,
                y_offset=y.bias,
            )
            continue
        run_contrast(
            s,
            y,
            x,
            out=result,
            mask=MASKS[p.negatives],
            tau=tau,
            tau_is_tensor=tau_is_tensor,
            page_offsets=p.pv_offsets,
            y_offset=t[f"{direction}_lse"],
            y_offset_is_lse=True,
            y_scale=scale,
            x_offset=y.bias,
            x_offset_after=s.merged and not half,
            need_sum=False,
        )
    return results, factor


def _reconstruction_gradient(
    p: Problem,
    s: Shape,
    t: dict[str, Tensor],
    results: dict[str, Pass],
    upstream: dict[str, Any],
) -> tuple[Tensor, Tensor, Tensor]:
    """dL/dR of the listed rows, its products with R per head, and parts of -tau dL/dtau."""
    device, none = p.pv.device, t["weight_sum"]
    rows, _pages, count = reconstructed(s, t)
    tiles_of = {"FORWARD_M": s.tile.block_m, "FORWARD_N": s.tile.block_n}
    tiles_of |= {"TRANSPOSED_M": s.transposed.block_m, "TRANSPOSED_N": s.transposed.block_n}
    forward_slots = s.slots(s.rows, s.tile, device)
    forward = "reconstruct" in s.directions
    identify = "identify" in s.directions
    dr = torch.empty(s.rows, s.stride, dtype=p.pv.dtype, device=device)
    delta = torch.empty(p.num_heads, s.rows, dtype=torch.float32, device=device)
    programs = cdiv(s.rows, s.small.block_m)
    tau_parts = torch.empty(programs, dtype=torch.float32, device=device)
    any_pass = next(iter(results.values()), None)
    back = results.get("identify", any_pass)
    epilogue.reconstruction_gradient[(programs,)](
        list_ptr=rows,
        count_ptr=count,
        anchor_rank_ptr=t["ranks"][0],
        anchor_flag_ptr=t["flags"][0],
        anchor_count_ptr=t["counts"][0:1],
        column_count_ptr=t["counts"][2:3],
        unit_ptr=t["r"],
        norm_ptr=t["norm"],
        **e_inputs(p),
        forward_acc_ptr=t["reconstruct_acc"] if forward else none,
        forward_top_ptr=t["reconstruct_top"] if forward else none,
        forward_lse_ptr=t["reconstruct_lse"] if forward else none,
        forward_miss_ptr=t["reconstruct_miss"] if forward else none,
        **upstream,
        transposed_acc_ptr=back.acc if back is not None else none,
        identify_miss_ptr=t["identify_miss"] if identify else none,
        dr_ptr=dr,
        delta_ptr=delta,
        tau_part_ptr=tau_parts,
        capacity=s.rows,
        forward_slots=forward_slots,
        transposed_slots=back.slots if back is not None else 1,
        programs=s.programs(s.tile, device),
        transposed_programs=s.programs(s.transposed, device),
        D=s.dim,
        STRIDE=s.stride,
        HEADS=p.num_heads,
        RECONSTRUCT=forward,
        IDENTIFY=identify,
        STREAM=s.stream,
        **tiles_of,
        BLOCK_M=s.small.block_m,
        BLOCK_D=s.block_d,
        num_warps=s.small.num_warps,
    )
    return dr, delta, tau_parts


def _contrast_inputs(
    s: Shape, t: dict[str, Tensor], results: dict[str, Pass], upstream: dict[str, Any]
) -> dict[str, Any]:
    """What `spread` needs to make dL/dE too."""
    none = t["weight_sum"]
    forward = "reconstruct" in s.directions
    identify = "identify" in s.directions
    column = results.get("reconstruct")
    return {
        "anchor_count_ptr": t["counts"][0:1],
        "column_count_ptr": t["counts"][2:3],
        "reconstructed_count_ptr": reconstructed(s, t)[2],
        "transposed_acc_ptr": column.acc if column is not None else none,
        "identify_acc_ptr": t["identify_acc"] if identify else none,
        "identify_top_ptr": t["identify_top"] if identify else none,
        "identify_lse_ptr": t["identify_lse"] if identify else none,
        "forward_miss_ptr": t["reconstruct_miss"] if forward else none,
        "identify_miss_ptr": t["identify_miss"] if identify else none,
        **upstream,
        "transposed_slots": column.slots if column is not None else 1,
        "identify_slots": s.slots(s.rows, s.tile, none.device),
        "CONTRAST": True,
        "COLUMNS": column is not None and not s.merged,
        "RECONSTRUCT": forward,
        "IDENTIFY": identify,
        "IN_PLACE": column is not None and column.in_place,
    }


def _early_row_gradients(
    p: Problem, s: Shape, t: dict[str, Tensor], direction: str
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
    g = row_gradients(p, s, t, one, weight_sum, 1.0 / len(s.directions))
    return lowered(g) if p.pv.dtype == torch.float16 else (g, one)


def _table_gradient(
    p: Problem,
    s: Shape,
    t: dict[str, Tensor],
    d_pv: Tensor,
    d_history: Tensor | None,
    result: Pass | None,
    upstream: dict[str, Any],
) -> Tensor:
    """dL/dU: occurrences summed in a fixed order, and what the merged columns add."""
    assert p.pv_index is not None and p.history_index is not None
    order, starts = occurrences(
        s.items, [(p.pv_index, t["pv_page"]), (p.history_index, t["history_page"])]
    )
    if not s.merged or result is None:
        return sum_occurrences(p.pv, s, order, starts, d_pv, d_history, s.rows)
    merged = {
        "item_count_ptr": t["item_count"],
        "column_rank_ptr": t["item_rank"],
        "column_count_ptr": t["counts"][2:3],
        "anchor_count_ptr": t["counts"][0:1],
        "transposed_acc_ptr": result.acc,
        "transposed_slots": result.slots,
        "MERGED": True,
    } | {name: x for name, x in upstream.items() if name != "g_ptr"}
    return sum_occurrences(p.pv, s, order, starts, d_pv, d_history, s.rows, merged)
