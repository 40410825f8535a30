"""impl="cpu": tiles of the similarity through torch.mm, everything between two products in one native pass.

With reduction "mean" or "sum" the weights of the anchors are known in the forward pass, so each chunk of rows of
P = exp(s - top) is computed once and serves both P e and P^T r while it is in cache; the backward only scales what was
saved. README.md has the measurements.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from . import candidate, native
from .native import VARIANT_VARIABLE, call, stage
from .rows import (
    Candidates,
    Result,
    Rows,
    anchors_of,
    inverse_tau_of,
    masked,
    merged,
    normalize,
    normalize_backward,
    part,
    placed,
    real_rows,
    same_id,
    shares_of,
)

if TYPE_CHECKING:
    from courier_fast.problem import Problem, SequenceProblem

_DTYPES = (torch.float32, torch.bfloat16)
# Rows of P held at a time: as many as fit here, but enough that the products stay efficient (README.md).
CHUNK_BYTES = 32 << 20
# With products of our own nothing is packed anew for a chunk: fewer rows are as fast, and make room for the packed columns.
NATIVE_CHUNK_BYTES = 24 << 20
LEAST_CHUNK_ROWS = 256
# With negatives of the own page only, a chunk of rows meets the columns of its pages: fewer rows, narrower products.
PAGE_CHUNK_ROWS = 64


def unavailable_reasons(p: Problem | SequenceProblem) -> list[str]:
    """Why the CPU kernels cannot run this problem here; empty if they can."""
    source = p.pv if hasattr(p, "pv") else p.history
    reasons = []
    if native.library is None:
        reasons.append(
            f"the native library courier_fast._native is missing or does not load: {native.error_text}"
        )
    else:
        variant = os.environ.get(VARIANT_VARIABLE)
        if variant is not None and variant not in native.library.variants():
            runs = ", ".join(native.library.variants())
            reasons.append(f"{VARIANT_VARIABLE} is {variant!r}, and this CPU runs {runs}")
    if source.device.type != "cpu":
        reasons.append(f"the tensors are on {source.device.type!r}, not on the CPU")
    if source.dtype not in _DTYPES:
        reasons.append(f"dtype is {source.dtype}; float32 or bfloat16 is needed")
    return reasons


_LOSS_INPUTS = ("pv", "history", "query", "key", "value", "temperature")


def _gradient_shapes(
    p: Any, names: Sequence[str], needs: Sequence[bool]
) -> list[tuple[Any, torch.dtype]]:
    tensors = [getattr(p, name) for name, need in zip(names, needs, strict=True) if need]
    return [(tuple(t.shape), t.dtype) for t in tensors]


def saved_spec(p: Problem, needs: Sequence[bool]) -> list[tuple[Any, torch.dtype]]:
    """The finished gradients, unless each row's upstream gradient has to be awaited."""
    return [] if p.reduction == "none" else _gradient_shapes(p, _LOSS_INPUTS, needs)


# ---- stages -------------------------------------------------------------------------------------------------------


@dataclass
class _Attention:
    """Attention of listed rows: arguments of the native stage, and what the forward pass leaves."""

    arguments: tuple[Any, ...]
    scale: float
    heads: int
    page_starts: Tensor
    dim: int
    rows: int
    history_rows: int

    def gradients(
        self, d_r: Tensor, want_q: bool, want_k: bool, want_v: bool, together: bool
    ) -> tuple[Any, Any, Any]:
        """float32 (dq of the listed rows, dk, dv of the real history rows); `together`: dk is the sum of both."""
        d_q = torch.zeros(self.rows, self.dim) if want_q else None
        d_k = torch.zeros(self.history_rows, self.dim) if want_k else None
        d_v = d_k if together else torch.zeros(self.history_rows, self.dim) if want_v else None
        stage(
            "attend_backward",
            *self.arguments,
            d_r,
            d_q,
            d_k,
            d_v,
            self.page_starts,
            self.scale,
            self.heads,
        )
        return d_q, d_k, d_v


@dataclass
class _Reconstruction:
    unit: Tensor  # [M, D] r, or R itself
    norm: Tensor  # [M]
    positive: Tensor  # [M] cos(R, E) in float64
    attention: _Attention


def _attend(p: Problem, pv: Rows, history: Rows, rows: Tensor, raw: bool) -> _Reconstruction:
    """Reconstructions of `rows` (among the real PV rows, all of pages with a history)."""
    c_source = p.pv if p.history is None else p.history
    count, dim = rows.shape[0], p.pv.shape[1]
    first, last, weights_at, page_starts = torch.empty(4, count, dtype=torch.int64)
    spans = (pv.page[rows], history.start, p.num_heads, first, last, weights_at, page_starts)
    sizes, pages = call("spans", *spans)
    weights = torch.empty(sizes, dtype=torch.float32)
    e_row = pv.source[rows]
    arguments = (
        p.pv if p.query is None else p.query,
        e_row if p.query is None else pv.keep[rows],
        c_source if p.key is None else p.key,
        history.source if p.key is None else history.keep,
        c_source if p.value is None else p.value,
        history.source if p.value is None else history.keep,
        first,
        last,
        weights_at,
        weights,
    )
    unit = torch.empty(count, dim, dtype=p.pv.dtype)
    norm = torch.empty(count, dtype=torch.float32)
    positive = torch.empty(count, dtype=torch.float64)
    stage(
        "attend", *arguments, p.pv, e_row, unit, norm, positive, p.attention_scale, p.num_heads, raw
    )
    attention = _Attention(
        arguments,
        p.attention_scale,
        p.num_heads,
        page_starts[:pages],
        dim,
        count,
        history.keep.shape[0],
    )
    return _Reconstruction(unit, norm, positive, attention)


@dataclass
class _Scores:
    """What a direction gives for each row; numbers in float64, vectors in float32."""

    lse: Tensor  # [M], the positive included
    loss: Tensor  # [M] lse - positive
    above: Tensor | None  # [M]
    d_x: Tensor | None  # [M, D] g_i (sum_j p_ij y_j - own_i), as the next two without the 1/tau
    d_own: Tensor | None  # [M, D] the positive's own terms apart from d_y: -g_i (1 - p_i) x_i
    d_y: Tensor | None  # [n, D] sum_i g_i p_ij x_i


def _chunks(m: int, y: Candidates, chunk_bytes: int) -> list[tuple[int, int, int, int]]:
    """(first row, end, first column, end) of each chunk."""
    n = y.unit.shape[0]
    if y.page is not None and y.page_only:
        # Rows and columns are in the order of pages.
        starts = range(0, m, PAGE_CHUNK_ROWS)
        stops = [min(start + PAGE_CHUNK_ROWS, m) for start in starts]
        lows = y.page[list(starts), 0].tolist()
        highs = y.page[[stop - 1 for stop in stops], 1].tolist()
        return list(zip(starts, stops, lows, highs, strict=True))
    most = max(LEAST_CHUNK_ROWS, chunk_bytes // max(n * y.unit.element_size(), 1))
    rows = max(1, math.ceil(m / max(1, math.ceil(m / most))))
    return [(start, min(start + rows, m), 0, n) for start in range(0, m, rows)]


def _contrast(
    x: Tensor,
    y: Candidates,
    inverse_tau: float,
    positive: Tensor | None,
    own_unit: Tensor | None,
    g: Tensor | None,
    want_rank: bool,
    want_y: bool = True,
    add_to: Tensor | None = None,
    given: Tensor | None = None,
) -> _Scores:
    """One direction, chunk by chunk: scores, probabilities, and with g (weights of the rows) both gradients.

    `positive` [M]: scores of the positives, biases included, in float64, and `own_unit` [M, D] their unit
    vectors, whose terms stay apart in float32; None: the positives are among the other columns.
    `add_to`: where d_y is to be added. `given` [M]: log-sum-exps that are known, over columns that are not all here; d_y
    is wanted alone.
    """
    m, dim = x.shape
    n = y.unit.shape[0]
    # A few numbers a row in float64: the loss is a difference of scores of 1/tau.
    lse, loss, total = torch.zeros(3, m, dtype=torch.float64)
    factor, pull = torch.empty(2, m)
    top = torch.empty(m)
    above = torch.empty(m, dtype=torch.int64) if want_rank else None
    half = x.dtype != torch.float32
    want_x = g is not None and given is None
    products = _native_products(x, y, want_x, g is not None and want_y)
    chunks = _chunks(m, y, CHUNK_BYTES if products is None else NATIVE_CHUNK_BYTES)
    longest = max((b - a for a, b, _, _ in chunks), default=0)
    # One workspace for all chunks: a fresh one each time would cost more in page faults than the pass over it.
    if products is None:
        workspace = x.new_empty(max(((b - a) * (d - c) for a, b, c, d in chunks), default=0))
    else:
        products.room(longest)
    d_x = d_y = d_own = part_x = part_y = part_weighted = None
    if want_x:
        d_x = torch.empty(m, dim)
        part_x = x.new_empty(longest, dim) if half and products is None else d_x
        d_own = torch.empty(m, dim) if own_unit is not None else None
    if g is not None:
        part_weighted = x.new_empty(longest, dim)
        if want_y:
            d_y = torch.zeros(n, dim) if add_to is None else add_to
            widest = max((d - c for _, _, c, d in chunks), default=0)
            part_y = x.new_empty(widest, dim) if half and products is None else None
    for start, stop, low, high in chunks:
        rows, columns = slice(start, stop), slice(low, high)
        xs, ys = x[rows], y.unit[columns]
        about = (
            inverse_tau,
            part(y.bias, columns),
            part(y.rank_bias, columns),
            part(y.count, columns),
            y.own[rows],
            y.order,
            part(y.same, rows),
            part(y.page, rows),
        )
        results = (top[rows], total[rows], part(above, rows))
        product = None if part_x is None else d_x[rows] if part_x is d_x else part_x[: stop - start]
        if products is None:
            scores = workspace[: (stop - start) * (high - low)].view(stop - start, high - low)
            torch.mm(xs, ys.T, out=scores)
            stage("contrast", scores, low, *about, y.page_only, *results)
        else:
            products.tile(xs, about, results, product)
        weighted = None if part_weighted is None else part_weighted[: stop - start]
        if given is not None:
            assert g is not None and weighted is not None
            torch.mul(xs, (g[rows] * (top[rows] - given[rows]).exp())[:, None], out=weighted)
        else:
            own_pull = None if own_unit is None else pull[rows]
            call(
                "finish",
                *results[:2],
                part(positive, rows),
                part(g, rows),
                lse[rows],
                loss[rows],
                factor[rows],
                own_pull,
            )
            if weighted is None:
                continue
            if products is None:
                torch.mm(scores, ys, out=product)
            # One pass, not five small ones: where cores are shared, each start of all threads may wait for a slice of time.
            stage(
                "weigh",
                product,
                xs,
                part(own_unit, rows),
                factor[rows],
                own_pull,
                part(d_x, rows),
                weighted,
                part(d_own, rows),
            )
        if d_y is None:
            continue
        if products is not None:
            products.transposed(weighted, d_y)
        elif part_y is None:
            d_y[columns].addmm_(scores.T, weighted)
        else:
            # Sums over chunks stay in float32; torch's += would first make a float32 copy of the product.
            product = part_y[: high - low]
            torch.mm(scores.T, weighted, out=product)
            stage("add", d_y[columns], product)
    return _Scores(lse, loss, above, d_x, d_own, d_y)


def contrast_block(
    x: Tensor, y: Candidates, inverse_tau: float, lse: Tensor | None, g: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Rows against some of their candidates: (log-sum-exp [M], g_i sum_j p_ij y_j [M, D], None), or with the log-sum-exp over
    all of them (.., None, sum_i g_i p_ij x_i [n, D])."""
    s = _contrast(x, y, inverse_tau, None, None, g, False, want_y=lse is not None, given=lse)
    if s.d_x is not None:
        # Over no candidate at all, the sum is 0 and its inverse is not finite.
        s.d_x[s.lse == -math.inf] = 0
    return s.lse, s.d_x, s.d_y


class _NativeProducts:
    """The columns, packed once, and the three products of a chunk; what is in between never leaves the cache."""

    def __init__(self, y: Tensor, want_x: bool, want_y: bool) -> None:
        self.columns, self.dim = y.shape
        across, along, _, self.scratch_size = native.library.packed_sizes(0, *y.shape)
        self.across = torch.empty(across, dtype=torch.int32)
        self.along = torch.empty(along, dtype=torch.int32) if want_x else None
        self.want_y = want_y
        self.kept: Tensor | None = None
        self.weighted: Tensor | None = None
        stage("pack", y, self.across, self.along)

    def room(self, rows: int) -> None:
        """For chunks of at most so many rows."""
        threads = torch.get_num_threads()
        self.scratch = torch.empty(threads * self.scratch_size, dtype=torch.int32)
        if self.want_y:
            kept = native.library.packed_sizes(rows, self.columns, self.dim)[2]
            self.kept = torch.empty(kept, dtype=torch.int32)
            weighted = native.library.packed_sizes(0, rows, self.dim)[1]
            self.weighted = torch.empty(weighted, dtype=torch.int32)

    def tile(
        self, x: Tensor, about: tuple[Any, ...], results: tuple[Any, ...], product: Tensor | None
    ) -> None:
        """P of these rows, kept for `transposed`, and P y."""
        stage(
            "tile",
            x,
            self.across,
            self.along,
            self.columns,
            *about,
            *results,
            product,
            self.kept,
            self.scratch,
        )

    def transposed(self, weighted: Tensor, d_y: Tensor) -> None:
        """d_y += P^T weighted."""
        stage("pack", weighted, None, self.weighted)
        stage("transposed", self.kept, self.weighted, weighted.shape[0], d_y)


def _native_products(
    x: Tensor, y: Candidates, want_x: bool, want_y: bool
) -> _NativeProducts | None:
    """Where this CPU has them and they fit; else torch.mm."""
    if x.dtype != torch.bfloat16 or y.page_only or not len(x):
        return None
    panel = native.library.panel_columns(os.environ.get(VARIANT_VARIABLE))
    if not panel or x.shape[1] % panel:
        return None
    return _NativeProducts(y.unit, want_x, want_y)


# ---- reconstruction loss ------------------------------------------------------------------------------------------


def _run(p: Problem, needs: Sequence[bool], want_rank: bool, upstream: Tensor | None) -> Result:
    """Forward pass and, where `needs` says so, all gradients; `upstream` [N] for reduction "none"."""
    if p.attention == "candidate":
        return candidate.run(p, needs, want_rank, upstream)
    inverse_tau = inverse_tau_of(p)
    anchors = anchors_of(p)
    pv, history, anchor = anchors.pv, anchors.history, anchors.row
    directions = ("reconstruct", "identify") if p.direction == "both" else (p.direction,)
    every = p.direction != "reconstruct"
    listed = anchors.has_history.nonzero().squeeze(1) if every else anchor  # the rows with an R
    r = _attend(p, pv, history, listed, False)
    cosine, r_anchor = r.positive, r.unit
    if every:
        place = torch.searchsorted(listed, anchor)  # of the anchors among them
        cosine, r_anchor = cosine[place], r_anchor[place]

    grads = any(needs)
    g = shares_of(p, anchors, upstream) if grads else None
    if g is not None and len(directions) > 1:
        g = g / 2

    log_q = None if p.log_q is None else p.log_q[pv.keep]
    ids = None if p.ids is None else p.ids[pv.keep]
    columns = _item_columns(p, pv, anchor, ids, log_q) if "reconstruct" in directions else None
    scores: list[_Scores] = []
    d_r: Tensor | None = None  # [listed, D], without the 1/tau as the next two
    d_e_anchor: Tensor | None = None  # [M, D]
    d_columns: Tensor | None = None
    e_anchor, e_anchor_norm = normalize(p.pv, pv.source[anchor])
    positive_score = cosine * inverse_tau
    if log_q is not None:
        positive_score = positive_score - log_q[anchor]
    for direction in directions:
        rank = want_rank and not scores
        if direction == "reconstruct":
            assert columns is not None
            s = _contrast(
                r_anchor,
                columns.candidates,
                inverse_tau,
                positive_score,
                e_anchor,
                g,
                rank,
                needs[0],
            )
        else:
            y = masked(p, pv, r.unit, listed, anchor, place, ids, log_q)
            if grads and d_r is None:
                d_r = torch.zeros(listed.shape[0], p.pv.shape[1])
            s = _contrast(e_anchor, y, inverse_tau, positive_score, r_anchor, g, rank, add_to=d_r)
        scores.append(s)
        if s.d_x is None or s.d_own is None:
            continue
        if direction == "reconstruct":
            d_e_anchor, d_columns = s.d_own, s.d_y
            if not every:
                d_r = s.d_x
            else:
                d_r = torch.zeros(listed.shape[0], p.pv.shape[1]).index_add_(0, place, s.d_x)
        else:
            assert d_r is not None
            d_e_anchor = s.d_x if d_e_anchor is None else d_e_anchor.add_(s.d_x)
            d_r.index_add_(0, place, s.d_own)
        s.d_x = s.d_own = s.d_y = None

    gradients: list[Tensor | None] = [None] * 6
    if d_r is not None and d_e_anchor is not None:
        if needs[5]:
            assert p.temperature is not None
            # Every score is r . e / tau: the sum of dL/dr . r is dL/d(1/tau).
            slope = (d_r * r.unit).sum(dtype=torch.float64)
            gradients[5] = (-slope * inverse_tau**2).to(p.temperature.dtype)
        normalize_backward(d_r, r.unit, r.norm, inverse_tau)
        total = None
        if needs[0]:
            total = _column_gradients(p, columns, d_columns, inverse_tau)
            normalize_backward(d_e_anchor, e_anchor, e_anchor_norm, inverse_tau)
            total.index_add_(0, pv.source[anchor], d_e_anchor)
        columns = d_columns = d_e_anchor = None
        _reconstruction_gradients(p, needs, gradients, total, pv, history, listed, r.attention, d_r)
    items = scores[0].loss if len(scores) == 1 else (scores[0].loss + scores[1].loss) / 2
    first = scores[0]
    return Result(items, first.lse, first.above, cosine, anchors, gradients)


def _reconstruction_gradients(
    p: Problem,
    needs: Sequence[bool],
    gradients: list[Tensor | None],
    total: Tensor | None,  # float32, what pv (or the table) has got so far
    pv: Rows,
    history: Rows,
    listed: Tensor,
    attention: _Attention,
    d_r: Tensor,  # [listed, D] gradient of R
) -> None:
    """Through the attention: fills in the gradients of all inputs but the temperature."""
    table = p.history is None
    own_history = needs[0] if table else needs[1]
    want_q = needs[2] if p.query is not None else needs[0]
    want_k = needs[3] if p.key is not None else own_history
    want_v = needs[4] if p.value is not None else own_history
    together = p.key is None and p.value is None and want_k
    d_q, d_k, d_v = attention.gradients(d_r, want_q, want_k, want_v, together)
    if needs[2]:
        gradients[2] = placed(p.query, pv.keep[listed], d_q)
    if needs[3]:
        gradients[3] = placed(p.key, history.keep, d_k)
    if needs[4]:
        gradients[4] = placed(p.value, history.keep, d_v)
    d_history = d_k if p.key is None else d_v if p.value is None else None
    if not table and needs[1]:
        gradients[1] = (
            torch.zeros_like(p.history)
            if d_history is None
            else placed(p.history, history.keep, d_history)
        )
    if total is None:
        return
    if p.query is None:
        total.index_add_(0, pv.source[listed], d_q)
    if table and d_history is not None:
        total.index_add_(0, history.source, d_history)
    gradients[0] = total.to(p.pv.dtype)


@dataclass
class _ItemColumns:
    """The columns of direction "reconstruct": PV items, or the unique items among them."""

    candidates: Candidates
    norm: Tensor  # [n]
    source: Tensor  # [n] rows of pv or of the table
    every_row: bool  # `source` is all of them, in order


def _column_gradients(
    p: Problem, columns: _ItemColumns | None, d_columns: Tensor | None, inverse_tau: float
) -> Tensor:
    """float32 gradient of pv (or of the table) as columns; in the memory of `d_columns` where that has its shape."""
    if columns is None or d_columns is None:
        return torch.zeros(p.pv.shape, dtype=torch.float32)
    normalize_backward(d_columns, columns.candidates.unit, columns.norm, inverse_tau)
    if columns.every_row:
        return d_columns
    return torch.zeros(p.pv.shape, dtype=torch.float32).index_add_(0, columns.source, d_columns)


def _item_columns(
    p: Problem, pv: Rows, anchor: Tensor, ids: Tensor | None, log_q: Tensor | None
) -> _ItemColumns:
    if p.pv_index is not None and p.item_ids is None and log_q is None and p.negatives == "batch":
        y, source = merged(p, pv, anchor)
        unit, norm = normalize(p.pv, source)
        y.unit = unit
        return _ItemColumns(y, norm, source, source.shape[0] == p.pv.shape[0])
    unit, norm = normalize(p.pv, pv.source)
    y = masked(p, pv, unit, torch.arange(len(pv.keep)), anchor, anchor, ids, log_q)
    every_row = p.pv_index is None and len(pv.keep) == p.pv.shape[0]
    return _ItemColumns(y, norm, pv.source, every_row)


def _reduced(p: Problem, result: Result) -> Tensor:
    anchors = result.anchors
    if p.reduction == "none":
        item = result.item.float()
        return torch.zeros(p.num_pv).index_copy_(0, anchors.pv.keep[anchors.row], item)
    weight = anchors.weight
    loss = (result.item if weight is None else weight.double() * result.item).sum()
    if p.reduction == "mean" and len(result.item):
        loss /= len(result.item) if weight is None else weight.sum(dtype=torch.float64)
    return loss.to(torch.float32)


def loss_forward(p: Problem, needs: Sequence[bool], stats: bool) -> tuple[Any, ...]:
    """(loss, item_loss, log_sum_exp, positive_similarity, rank, is_anchor, num_skipped, saved)."""
    early = p.reduction != "none"
    result = _run(p, needs if early else [False] * 6, stats, None)
    anchors = result.anchors
    where = anchors.pv.keep[anchors.row]

    def spread(x: Tensor | None) -> Tensor:
        if not stats or x is None:
            return torch.zeros(0)
        dtype = torch.float32 if x.is_floating_point() else x.dtype
        return torch.zeros(p.num_pv, dtype=dtype).index_copy_(0, where, x.to(dtype))

    rank = torch.zeros(0, dtype=torch.int64)
    is_anchor, skipped = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    if stats:
        assert result.above is not None
        rank = spread(result.above + 1)
        is_anchor = torch.zeros(p.num_pv, dtype=torch.bool).index_fill_(0, where, True)
        skipped = anchors.left_out.sum()
    saved = [grad for grad in result.gradients if grad is not None]
    per_row = (spread(result.item), spread(result.lse), spread(result.cosine))
    return _reduced(p, result), *per_row, rank, is_anchor, skipped, saved


def loss_backward(
    p: Problem, needs: Sequence[bool], saved: Sequence[Tensor], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of (pv, history, query, key, value, temperature)."""
    if p.reduction == "none":
        return _run(p, needs, False, grad).gradients
    return _scaled(saved, needs, grad)


def _scaled(saved: Sequence[Tensor], needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    # Saved gradients are for an upstream gradient of 1; a new tensor each time, since backward may run again.
    remaining = iter(saved)
    return [next(remaining) * grad if need else None for need in needs]


# ---- reconstruct --------------------------------------------------------------------------------------------------


def _reconstructed(p: Problem) -> tuple[Rows, Rows, Tensor, _Reconstruction]:
    pv = real_rows(p.pv_offsets, p.pv_mask, p.pv_index, p.num_pv)
    history = real_rows(p.history_offsets, p.history_mask, p.history_index, p.num_history)
    listed = (history.start.diff() > 0)[pv.page].nonzero().squeeze(1)
    return pv, history, listed, _attend(p, pv, history, listed, True)


def reconstruct_forward(p: Problem) -> Tensor:
    """R [N, D], zeros for padding and for pages without history."""
    pv, _, listed, r = _reconstructed(p)
    return torch.zeros(p.num_pv, p.pv.shape[1], dtype=p.pv.dtype).index_copy_(
        0, pv.keep[listed], r.unit
    )


def reconstruct_backward(p: Problem, needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """Gradients of (pv, history, query, key, value); the attention weights are computed again."""
    pv, history, listed, r = _reconstructed(p)
    gradients: list[Tensor | None] = [None] * 6
    d_r = grad[pv.keep[listed]].to(torch.float32).contiguous()
    total = torch.zeros(p.pv.shape, dtype=torch.float32) if needs[0] else None
    _reconstruction_gradients(p, needs, gradients, total, pv, history, listed, r.attention, d_r)
    return gradients[:5]


# ---- click sequence -----------------------------------------------------------------------------------------------


def sequence_saved_spec(p: SequenceProblem, needs: Sequence[bool]) -> list[tuple[Any, torch.dtype]]:
    """As `saved_spec`."""
    return [] if p.reduction == "none" else _gradient_shapes(p, ("history", "temperature"), needs)


def _page_sums(values: Tensor, rows: Rows) -> Tensor:
    return torch.zeros(rows.start.shape[0] - 1, values.shape[1]).index_add_(0, rows.page, values)


def _run_sequence(
    p: SequenceProblem, needs: Sequence[bool], upstream: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(losses of the anchors, their positions in the batch, gradients)."""
    inverse_tau = inverse_tau_of(p)
    rows = real_rows(p.history_offsets, p.history_mask, p.history_index, p.num_history)
    c, norm = normalize(p.history, rows.source)
    count = rows.keep.shape[0]
    every = torch.arange(count)
    ids = None if p.ids is None else p.ids[rows.keep]

    # Positives of k: the page's rows without those of k's item; sums over a page and over an item on a page give both.
    group = every
    if ids is not None:
        _, item = torch.unique(ids, return_inverse=True)
        _, group = torch.unique(rows.page * (count + 1) + item, return_inverse=True)
    groups = int(group.max()) + 1 if count else 0
    page_size = rows.start.diff()[rows.page]
    number = page_size - torch.bincount(group, minlength=groups)[group]
    anchor = (number > 0).nonzero().squeeze(1)

    def sum_of_positives(values: Tensor) -> Tensor:
        """[n, D]: for each row the sum over its positives."""
        own = values
        if ids is not None:
            own = torch.zeros(groups, values.shape[1]).index_add_(0, group, values)[group]
        return _page_sums(values, rows)[rows.page] - own

    y = Candidates(c, anchor)
    if ids is not None:
        # Left out: the item's occurrences on other pages. Those of one item are in the order of pages.
        y.order, same = same_id(ids, ids[anchor])
        place = torch.empty_like(y.order).scatter_(0, y.order, every)
        ordered_page = rows.page[y.order] + rows.start.shape[0] * torch.searchsorted(
            ids[y.order], ids[y.order]
        )
        own_page = ordered_page[place[anchor]]
        first = torch.searchsorted(ordered_page, own_page)
        last = torch.searchsorted(ordered_page, own_page, right=True)
        y.same = torch.stack([same[:, 0], first, last, same[:, 1]], 1).view(-1, 2, 2)
    c32 = c.to(torch.float32)
    mean = sum_of_positives(c32)[anchor] / number[anchor][:, None]
    g = None
    if any(needs):
        if upstream is not None:
            g = upstream[rows.keep[anchor]].to(torch.float32)
        else:
            g = torch.full(
                (anchor.shape[0],), 1.0 / max(anchor.shape[0], 1) if p.reduction == "mean" else 1.0
            )
    s = _contrast(c[anchor], y, inverse_tau, None, None, g, False)
    loss = s.lse - (c32[anchor] * mean).sum(1, dtype=torch.float64) * inverse_tau

    gradients: list[Tensor | None] = [None, None]
    if g is not None and s.d_x is not None and s.d_y is not None:
        s.d_x -= g[:, None] * mean
        if needs[1]:
            assert p.temperature is not None
            slope = (s.d_x * c32[anchor]).sum(dtype=torch.float64)
            gradients[1] = (-slope * inverse_tau**2).to(p.temperature.dtype)
        if needs[0]:
            pulled = torch.zeros(count, c.shape[1])
            pulled[anchor] = (g / number[anchor])[:, None] * c32[anchor]
            d_c = s.d_y.index_add_(0, anchor, s.d_x) - sum_of_positives(pulled)
            d_rows = normalize_backward(d_c, c, norm, inverse_tau)
            target = rows.keep if p.history_index is None else rows.source
            total = torch.zeros(p.history.shape, dtype=torch.float32).index_add_(0, target, d_rows)
            gradients[0] = total.to(p.history.dtype)
    return loss, rows.keep[anchor], gradients


def sequence_forward(p: SequenceProblem, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
    """(loss, saved) of the click-sequence loss."""
    early = p.reduction != "none"
    losses, where, gradients = _run_sequence(p, needs if early else [False, False], None)
    if p.reduction == "none":
        return torch.zeros(p.num_history).index_copy_(0, where, losses.float()), []
    loss = losses.sum(dtype=torch.float64)
    if p.reduction == "mean":
        loss = loss / max(len(losses), 1)
    return loss.to(torch.float32), [grad for grad in gradients if grad is not None]


def sequence_backward(
    p: SequenceProblem, needs: Sequence[bool], saved: Sequence[Tensor], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of (history or the table, temperature)."""
    if p.reduction == "none":
        return _run_sequence(p, needs, grad)[2]
    return _scaled(saved, needs, grad)
