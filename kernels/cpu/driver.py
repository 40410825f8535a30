"""impl="cpu": tiles of the similarity through torch.mm, everything between two products in one native pass.

With reduction "mean" or "sum" the weights of the anchors are known in the forward pass, so each chunk of rows of
P = exp(s - top) is computed once and serves both P e and P^T r while it is in cache; the backward only scales what was
saved. README.md has the measurements.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from courier_fast.problem import Problem, SequenceProblem

try:
    from courier_fast import _native
except ImportError as error:
    _native = None
    _NATIVE_ERROR = str(error)
else:
    _NATIVE_ERROR = ""

_DTYPES = (torch.float32, torch.bfloat16)
_NORM_EPS = 1e-12
# A chunk of P should stay in the last-level cache between the pass over it and the products.
CHUNK_BYTES = 16 << 20
# A fixed shift of 1/tau (plus the largest bias) replaces the row maximum where float32 has the range for it.
_LARGEST_FIXED_RANGE = 60.0


def unavailable_reasons(p: Problem | SequenceProblem) -> list[str]:
    """Why the CPU kernels cannot run this problem here; empty if they can."""
    source = p.pv if hasattr(p, "pv") else p.history
    reasons = []
    if _native is None:
        reasons.append(
            f"the native library courier_fast._native is missing or does not load: {_NATIVE_ERROR}"
        )
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


def _normalize(source: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    """Unit rows of source[row] in its type, and their norms in float32."""
    unit = torch.empty(row.shape[0], source.shape[1], dtype=source.dtype)
    norm = torch.empty(row.shape[0], dtype=torch.float32)
    _native.normalize(source, row, unit, norm, torch.get_num_threads())
    return unit, norm


def _normalize_backward(d_unit: Tensor, unit: Tensor, norm: Tensor, out: Tensor) -> Tensor:
    _native.normalize_backward(d_unit, unit, norm, out, torch.get_num_threads())
    return out


@dataclass
class _Rows:
    """Real rows of one side, padding removed."""

    keep: Tensor  # [n] positions in the batch
    page: Tensor  # [n]
    start: Tensor  # [B + 1] first real row of each page
    source: Tensor  # [n] row of the source tensor: the position, or the table index


def _real_rows(offsets: Tensor, mask: Tensor | None, index: Tensor | None, rows: int) -> _Rows:
    position = torch.arange(rows)
    page = torch.searchsorted(offsets, position, right=True) - 1
    real = page < offsets.shape[0] - 1
    if mask is not None:
        real &= mask
    keep = real.nonzero().squeeze(1)
    page = page[keep]
    counts = torch.bincount(page, minlength=offsets.shape[0] - 1)
    start = torch.zeros(offsets.shape[0], dtype=torch.int64)
    torch.cumsum(counts, 0, out=start[1:])
    return _Rows(keep, page, start, keep if index is None else index[keep])


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
        _native.attend_backward(
            *self.arguments,
            d_r,
            d_q,
            d_k,
            d_v,
            self.page_starts,
            self.scale,
            self.heads,
            torch.get_num_threads(),
        )
        return d_q, d_k, d_v


@dataclass
class _Reconstruction:
    unit: Tensor  # [M, D] r, or R itself
    norm: Tensor  # [M]
    positive: Tensor  # [M] cos(R, E) in float32
    attention: _Attention


def _attend(p: Problem, pv: _Rows, history: _Rows, rows: Tensor, raw: bool) -> _Reconstruction:
    """Reconstructions of `rows` (among the real PV rows, all of pages with a history)."""
    c_source = p.pv if p.history is None else p.history
    page = pv.page[rows]
    first, last = history.start[page], history.start[page + 1]
    sizes = (last - first) * p.num_heads
    ends = sizes.cumsum(0)
    weights = torch.empty(int(ends[-1]) if len(ends) else 0, dtype=torch.float32)
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
        ends - sizes,
        weights,
    )
    count, dim = rows.shape[0], p.pv.shape[1]
    unit = torch.empty(count, dim, dtype=p.pv.dtype)
    norm = torch.empty(count, dtype=torch.float32)
    positive = torch.empty(count, dtype=torch.float32)
    threads = torch.get_num_threads()
    _native.attend(
        *arguments, p.pv, e_row, unit, norm, positive, p.attention_scale, p.num_heads, raw, threads
    )
    change = torch.ones_like(page, dtype=torch.bool)
    torch.ne(page[1:], page[:-1], out=change[1:])
    attention = _Attention(
        arguments,
        p.attention_scale,
        p.num_heads,
        change.nonzero().squeeze(1),
        dim,
        count,
        history.keep.shape[0],
    )
    return _Reconstruction(unit, norm, positive, attention)


@dataclass
class _Candidates:
    """The columns of one direction and which of them each row may not use; its positive is always among these."""

    unit: Tensor  # [n, D]
    bias: Tensor | None  # [n] float32
    count: Tensor | None  # [n] float32, candidates that a column stands for
    rank_bias: Tensor | None  # [n]
    positive: Tensor  # [M] column of each row's positive
    excluded_at: Tensor  # [M + 1]
    excluded: Tensor
    range_first: Tensor | None  # [M]
    range_last: Tensor | None
    page_first: Tensor | None  # [M]: with negatives "page", the columns of the row's page
    page_last: Tensor | None


@dataclass
class _Scores:
    """What a direction gives for each row, in float32."""

    lse: Tensor  # [M], the positive included
    miss: Tensor  # [M] 1 - p of the positive
    above: Tensor | None  # [M]
    d_x: Tensor | None  # [M, D] g_i sum_{j != i} p_ij y_j (without the 1/tau)
    d_y: Tensor | None  # [n, D] sum_i g_i p_ij x_i


def _contrast(
    x: Tensor,
    y: _Candidates,
    inverse_tau: float,
    positive: Tensor | None,
    g: Tensor | None,
    want_rank: bool,
    add_to: Tensor | None = None,
) -> _Scores:
    """One direction, chunk by chunk: scores, probabilities, and with g (weights of the rows) both gradients.

    `positive` [M]: scores of the positives, biases included, in float32; None: the positives are among the candidates.
    """
    m, dim = x.shape
    n = y.unit.shape[0]
    lse, miss = torch.empty(m), torch.zeros(m)
    above = torch.empty(m, dtype=torch.int64) if want_rank else None
    d_x = torch.empty(m, dim) if g is not None else None
    d_y = None
    if g is not None:
        d_y = torch.zeros(n, dim) if add_to is None else add_to
    largest = float(y.bias.max()) if y.bias is not None and n else 0.0
    spread = largest - float(y.bias.min()) if y.bias is not None and n else 0.0
    fixed = 2 * inverse_tau + spread <= _LARGEST_FIXED_RANGE
    fixed_top = inverse_tau + max(largest, 0.0) if fixed else None
    chunk = max(32, CHUNK_BYTES // max(n * x.element_size(), 1))
    if y.page_first is not None:
        # Few columns belong to a few pages: small chunks keep the products small.
        chunk = min(chunk, 64)
    chunk = max(min(chunk, m), 1)
    buffer = torch.empty(chunk * n, dtype=x.dtype) if y.page_first is None else None
    threads = torch.get_num_threads()
    half = x.dtype != torch.float32
    out = torch.empty(chunk, dim, dtype=x.dtype) if g is not None else None
    top, total = torch.empty(m), torch.empty(m)
    for start in range(0, m, chunk):
        stop = min(start + chunk, m)
        rows = slice(start, stop)
        low, high = 0, n
        excluded_at, excluded = y.excluded_at[start : stop + 1], y.excluded
        range_first, range_last, pos = y.range_first, y.range_last, y.positive[rows]
        if y.page_first is not None and y.page_last is not None:
            low, high = int(y.page_first[start]), int(y.page_last[stop - 1])
            if high <= low:
                high = low + 1
        columns = high - low
        xs, ys = x[rows], y.unit[low:high]
        scores = (
            buffer[: (stop - start) * n]
            if buffer is not None
            else x.new_empty((stop - start) * columns)
        ).view(stop - start, columns)
        torch.mm(xs, ys.T, out=scores)
        if y.page_first is not None and y.page_last is not None:
            excluded_at, excluded = _outside_page(y, start, stop, low, high)
            pos = pos - low

        def part(t: Tensor | None, low: int = low, high: int = high) -> Tensor | None:
            return None if t is None else t[low:high]

        _native.contrast(
            scores,
            inverse_tau,
            part(y.bias),
            part(y.count),
            pos if want_rank else None,
            excluded_at,
            excluded,
            range_first[rows] if range_first is not None else None,
            range_last[rows] if range_last is not None else None,
            part(y.rank_bias),
            fixed_top,
            top[rows],
            total[rows],
            above[rows] if above is not None else None,
            threads,
        )
        if positive is None:
            lse[rows] = top[rows] + total[rows].log()
        else:
            highest = torch.maximum(top[rows], positive[rows])
            others = total[rows] * (top[rows] - highest).exp()
            everything = others + (positive[rows] - highest).exp()
            lse[rows] = highest + everything.log()
            miss[rows] = others / everything
        if g is None or d_x is None or d_y is None or out is None:
            continue
        factor = g[rows] * (top[rows] - lse[rows]).exp()
        # A row without weight has no share, also where its log-sum-exp is over nothing.
        factor = torch.where(g[rows] == 0, 0.0, factor)[:, None]
        torch.mm(scores, ys, out=out[: stop - start])
        torch.mul(out[: stop - start], factor, out=d_x[rows])
        weighted = (xs * factor).to(x.dtype)
        if half:
            d_y[low:high] += torch.mm(scores.T, weighted)
        else:
            d_y[low:high].addmm_(scores.T, weighted)
    return _Scores(lse, miss, above, d_x, d_y)


def _outside_page(
    y: _Candidates, start: int, stop: int, low: int, high: int
) -> tuple[Tensor, Tensor]:
    """The excluded columns of each row of a chunk, in the chunk's columns: other pages', and its own exclusions."""
    assert y.page_first is not None and y.page_last is not None
    column = torch.arange(low, high)
    outside = (column < y.page_first[start:stop, None]) | (column >= y.page_last[start:stop, None])
    at = y.excluded_at[start : stop + 1]
    row = torch.repeat_interleave(torch.arange(stop - start), at.diff())
    own = y.excluded[int(at[0]) : int(at[-1])]
    inside = (own >= low) & (own < high)
    outside[row[inside], own[inside] - low] = True
    ends = torch.zeros(stop - start + 1, dtype=torch.int64)
    torch.cumsum(outside.sum(1), 0, out=ends[1:])
    return ends, outside.nonzero()[:, 1].contiguous()


def _same_id(ids: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """For each id in `of` the positions with that id, as (starts [M + 1], positions)."""
    ordered, order = torch.sort(ids, stable=True)
    first = torch.searchsorted(ordered, of)
    counts = torch.searchsorted(ordered, of, right=True) - first
    at = torch.zeros(of.shape[0] + 1, dtype=torch.int64)
    torch.cumsum(counts, 0, out=at[1:])
    place = torch.arange(int(at[-1])) - torch.repeat_interleave(at[:-1] - first, counts)
    return at, order[place]


# ---- reconstruction loss ------------------------------------------------------------------------------------------


@dataclass
class _Result:
    item: Tensor  # [M] loss of each anchor
    scores: _Scores
    cosine: Tensor  # [M]
    anchor: Tensor  # [M] positions among the real PV rows
    pv: _Rows
    skipped: Tensor
    weight: Tensor | None  # [M]
    gradients: list[Tensor | None]


def _inverse_tau(p: Problem | SequenceProblem) -> float:
    return 1.0 / (p.tau if p.temperature is None else float(p.temperature))


def _run(p: Problem, needs: Sequence[bool], want_rank: bool, upstream: Tensor | None) -> _Result:
    """Forward pass and, where `needs` says so, all gradients; `upstream` [N] for reduction "none"."""
    assert p.clicked is not None
    inverse_tau = _inverse_tau(p)
    pv = _real_rows(p.pv_offsets, p.pv_mask, p.pv_index, p.num_pv)
    history = _real_rows(p.history_offsets, p.history_mask, p.history_index, p.num_history)
    has_history = (history.start.diff() > 0)[pv.page]
    clicked = p.clicked[pv.keep]
    is_anchor = clicked & has_history
    weight = None
    if p.weights is not None:
        is_anchor &= p.weights[pv.keep] > 0
    anchor = is_anchor.nonzero().squeeze(1)
    if p.weights is not None:
        weight = p.weights[pv.keep[anchor]]
    directions = ("reconstruct", "identify") if p.direction == "both" else (p.direction,)
    listed = anchor if p.direction == "reconstruct" else has_history.nonzero().squeeze(1)
    place = torch.searchsorted(listed, anchor)  # of the anchors among the rows with an R
    r = _attend(p, pv, history, listed, False)
    cosine = r.positive[place]

    grads = any(needs)
    g = None
    if grads:
        if upstream is not None:
            g = upstream[pv.keep[anchor]].to(torch.float32)
        else:
            g = torch.ones(anchor.shape[0]) if weight is None else weight.clone()
            if p.reduction == "mean" and anchor.shape[0]:
                g /= g.sum(dtype=torch.float64)
        g = g / len(directions)

    log_q = None if p.log_q is None else p.log_q[pv.keep]
    ids = None if p.ids is None else p.ids[pv.keep]
    e_columns = _item_columns(p, pv, anchor, ids, log_q) if "reconstruct" in directions else None
    scores, items = [], torch.zeros(anchor.shape[0])
    d_r = torch.zeros(listed.shape[0], p.pv.shape[1]) if grads else None
    d_e_anchor = torch.zeros(anchor.shape[0], p.pv.shape[1]) if grads else None
    r_anchor = r.unit if listed is anchor else r.unit[place]
    e_anchor, e_anchor_norm = _normalize(p.pv, pv.source[anchor])
    positive_score = cosine * inverse_tau
    if log_q is not None:
        positive_score = positive_score - log_q[anchor]
    d_columns = None
    for direction in directions:
        rank = want_rank and not scores
        if direction == "reconstruct":
            assert e_columns is not None
            x, y, own = r_anchor, e_columns[0], e_anchor
        else:
            x, y, own = (
                e_anchor,
                _reconstruction_columns(p, pv, r.unit, listed, anchor, place, ids, log_q),
                r_anchor,
            )
        to_r = d_r if direction == "identify" else None
        s = _contrast(x, y, inverse_tau, positive_score, g, rank, to_r)
        scores.append(s)
        items += (s.lse - positive_score) / len(directions)
        if g is None or s.d_x is None or d_r is None or d_e_anchor is None:
            continue
        pull = (g * s.miss)[:, None]
        s.d_x -= pull * own
        if direction == "reconstruct":
            d_columns = s.d_y
            d_r.index_add_(0, place, s.d_x)
            d_e_anchor -= pull * x
        else:
            d_e_anchor += s.d_x
            d_r.index_add_(0, place, -pull * x)
        s.d_x = s.d_y = None

    gradients: list[Tensor | None] = [None] * 6
    if d_r is not None and d_e_anchor is not None:
        if needs[5]:
            assert p.temperature is not None
            # Every score is r . e / tau: the sum of dL/dr . r is dL/d(1/tau).
            slope = (d_r * r.unit).sum(dtype=torch.float64)
            gradients[5] = (-slope * inverse_tau**2).to(p.temperature.dtype)
        d_r *= inverse_tau
        along = (d_r * r.unit).sum(1, keepdim=True)
        scale = torch.where(r.norm <= _NORM_EPS, 0.0, 1.0 / r.norm)[:, None]
        d_r -= along * r.unit
        d_r *= scale
        _spread_gradients(
            p,
            needs,
            gradients,
            pv,
            history,
            listed,
            anchor,
            r.attention,
            d_r,
            d_e_anchor,
            d_columns,
            e_columns,
            e_anchor,
            e_anchor_norm,
            inverse_tau,
        )
    skipped = (clicked & ~has_history).sum()
    return _Result(items, scores[0], cosine, anchor, pv, skipped, weight, gradients)


def _spread_gradients(
    p: Problem,
    needs: Sequence[bool],
    gradients: list[Tensor | None],
    pv: _Rows,
    history: _Rows,
    listed: Tensor,
    anchor: Tensor,
    attention: _Attention,
    d_r: Tensor,  # [listed, D] gradient of R
    d_e_anchor: Tensor,  # [M, D] gradient of the anchors' unit e, without the 1/tau
    d_columns: Tensor | None,  # [n, D] gradient of the columns' unit e, without the 1/tau
    e_columns: tuple[_Candidates, Tensor, Tensor, Tensor] | None,
    e_anchor: Tensor,
    e_anchor_norm: Tensor,
    inverse_tau: float,
) -> None:
    """From gradients of unit rows and reconstructions to those of the inputs."""
    table = p.history is None
    own_history = needs[0] if table else needs[1]
    want_q = needs[2] if p.query is not None else needs[0]
    want_k = needs[3] if p.key is not None else own_history
    want_v = needs[4] if p.value is not None else own_history
    together = p.key is None and p.value is None and want_k
    d_q, d_k, d_v = attention.gradients(d_r, want_q, want_k, want_v, together)

    def place_rows(shape_of: Tensor, rows: Tensor, values: Tensor) -> Tensor:
        return torch.zeros_like(shape_of).index_copy_(0, rows, values.to(shape_of.dtype))

    if needs[2]:
        gradients[2] = place_rows(p.query, pv.keep[listed], d_q)
    if needs[3]:
        gradients[3] = place_rows(p.key, history.keep, d_k)
    if needs[4]:
        gradients[4] = place_rows(p.value, history.keep, d_v)
    d_history = d_k if p.key is None else d_v if p.value is None else None
    if not table and needs[1]:
        gradients[1] = (
            place_rows(p.history, history.keep, d_history)
            if d_history is not None
            else torch.zeros_like(p.history)
        )
    if not needs[0]:
        return
    # Through the normalisation: columns first (all PV rows or unique items), then the anchors' own share.
    if d_columns is not None and e_columns is not None:
        y, row, norm, source = e_columns
        d_columns *= inverse_tau
        whole = row.shape[0] == p.pv.shape[0] and p.pv.dtype == torch.float32
        d_columns = _normalize_backward(d_columns, y.unit, norm, d_columns)
        if whole:
            total = d_columns  # every row of pv is a column, in order
        else:
            total = torch.zeros(p.pv.shape, dtype=torch.float32)
            total.index_add_(0, source, d_columns)
    else:
        total = torch.zeros(p.pv.shape, dtype=torch.float32)
    d_e_anchor *= inverse_tau
    total.index_add_(
        0, pv.source[anchor], _normalize_backward(d_e_anchor, e_anchor, e_anchor_norm, d_e_anchor)
    )
    if p.query is None and d_q is not None:
        total.index_add_(0, pv.source[listed], d_q)
    if table and d_history is not None:
        total.index_add_(0, history.source, d_history)
    gradients[0] = total.to(p.pv.dtype)


def _item_columns(
    p: Problem, pv: _Rows, anchor: Tensor, ids: Tensor | None, log_q: Tensor | None
) -> tuple[_Candidates, Tensor, Tensor, Tensor]:
    """Candidates of direction "reconstruct": (columns, their rows, norms, rows of the source)."""
    if p.pv_index is not None and p.item_ids is None and log_q is None and p.negatives == "batch":
        # Equal candidates are one column with the bias log m.
        counts = torch.bincount(pv.source, minlength=p.pv.shape[0])
        source = counts.nonzero().squeeze(1)
        column_of = torch.zeros(p.pv.shape[0], dtype=torch.int64).index_copy_(
            0, source, torch.arange(len(source))
        )
        unit, norm = _normalize(p.pv, source)
        count = counts[source].to(torch.float32)
        positive = column_of[pv.source[anchor]]
        every = torch.arange(anchor.shape[0] + 1)
        y = _Candidates(
            unit, count.log(), count, None, positive, every, positive, None, None, None, None
        )
        return y, source, norm, source
    unit, norm = _normalize(p.pv, pv.source)
    y = _masked(p, pv, unit, torch.arange(len(pv.keep)), anchor, anchor, ids, log_q)
    return y, pv.source, norm, pv.source


def _reconstruction_columns(
    p: Problem,
    pv: _Rows,
    unit: Tensor,
    listed: Tensor,
    anchor: Tensor,
    place: Tensor,
    ids: Tensor | None,
    log_q: Tensor | None,
) -> _Candidates:
    """Candidates of direction "identify": the reconstructions."""
    return _masked(p, pv, unit, listed, anchor, place, ids, log_q)


def _masked(
    p: Problem,
    pv: _Rows,
    unit: Tensor,
    column: Tensor,  # [n] real PV rows of the columns
    anchor: Tensor,  # [M] real PV rows of the anchors
    positive: Tensor,  # [M] columns of the anchors
    ids: Tensor | None,
    log_q: Tensor | None,
) -> _Candidates:
    if ids is None:
        excluded_at, excluded = torch.arange(anchor.shape[0] + 1), positive
    else:
        excluded_at, excluded = _same_id(ids[column], ids[anchor])
    bias = None if log_q is None else -log_q[column].to(torch.float32)
    first = last = None
    if p.negatives != "batch":
        page = pv.page[column]
        first = torch.searchsorted(page, pv.page[anchor])
        last = torch.searchsorted(page, pv.page[anchor], right=True)
    others, own = p.negatives == "other_pages", p.negatives == "page"
    return _Candidates(
        unit,
        bias,
        None,
        bias,
        positive,
        excluded_at,
        excluded,
        first if others else None,
        last if others else None,
        first if own else None,
        last if own else None,
    )


def _reduced(p: Problem, result: _Result) -> Tensor:
    if p.reduction == "none":
        return torch.zeros(p.num_pv).index_copy_(0, result.pv.keep[result.anchor], result.item)
    weight = torch.ones_like(result.item) if result.weight is None else result.weight
    loss = (weight.double() * result.item).sum()
    if p.reduction == "mean" and len(weight):
        loss = loss / weight.sum(dtype=torch.float64)
    return loss.to(torch.float32)


def loss_forward(p: Problem, needs: Sequence[bool], stats: bool) -> tuple[Any, ...]:
    """(loss, item_loss, log_sum_exp, positive_similarity, rank, is_anchor, num_skipped, saved)."""
    early = p.reduction != "none"
    result = _run(p, needs if early else [False] * 6, stats, None)
    where = result.pv.keep[result.anchor]

    def spread(x: Tensor | None) -> Tensor:
        if not stats or x is None:
            return torch.zeros(0)
        return torch.zeros(p.num_pv, dtype=x.dtype).index_copy_(0, where, x)

    rank = torch.zeros(0, dtype=torch.int64)
    is_anchor, skipped = torch.zeros(0, dtype=torch.bool), torch.zeros(0, dtype=torch.int64)
    if stats:
        assert result.scores.above is not None
        rank = spread(result.scores.above + 1)
        is_anchor = torch.zeros(p.num_pv, dtype=torch.bool).index_fill_(0, where, True)
        skipped = result.skipped
    saved = [grad for grad in result.gradients if grad is not None]
    per_row = (spread(result.item), spread(result.scores.lse), spread(result.cosine))
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


def _reconstructed(p: Problem) -> tuple[_Rows, _Rows, Tensor, _Reconstruction]:
    pv = _real_rows(p.pv_offsets, p.pv_mask, p.pv_index, p.num_pv)
    history = _real_rows(p.history_offsets, p.history_mask, p.history_index, p.num_history)
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
    nothing = torch.zeros(0, p.pv.shape[1])
    no_anchor = torch.zeros(0, dtype=torch.int64)
    unit, norm = nothing.to(p.pv.dtype), torch.zeros(0)
    _spread_gradients(
        p,
        [*needs, False],
        gradients,
        pv,
        history,
        listed,
        no_anchor,
        r.attention,
        d_r,
        nothing,
        None,
        None,
        unit,
        norm,
        1.0,
    )
    return gradients[:5]


# ---- click sequence -----------------------------------------------------------------------------------------------


def sequence_saved_spec(p: SequenceProblem, needs: Sequence[bool]) -> list[tuple[Any, torch.dtype]]:
    """As `saved_spec`."""
    return [] if p.reduction == "none" else _gradient_shapes(p, ("history", "temperature"), needs)


def _page_sums(values: Tensor, rows: _Rows) -> Tensor:
    return torch.zeros(rows.start.shape[0] - 1, values.shape[1]).index_add_(0, rows.page, values)


def _run_sequence(
    p: SequenceProblem, needs: Sequence[bool], upstream: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(losses of the anchors, their positions in the batch, gradients)."""
    inverse_tau = _inverse_tau(p)
    rows = _real_rows(p.history_offsets, p.history_mask, p.history_index, p.num_history)
    c, norm = _normalize(p.history, rows.source)
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

    def sum_of_positives(
        values: Tensor,
    ) -> Tensor:  # [n, D] -> for each row the sum over its positives
        by_group = torch.zeros(groups, values.shape[1]).index_add_(0, group, values)
        return _page_sums(values, rows)[rows.page] - by_group[group]

    if ids is None:
        excluded_at, excluded = torch.arange(anchor.shape[0] + 1), anchor
    else:
        # The item's occurrences on other pages and the row itself.
        at, same = _same_id(ids, ids[anchor])
        row = torch.repeat_interleave(torch.arange(anchor.shape[0]), at.diff())
        out = (rows.page[same] != rows.page[anchor][row]) | (same == anchor[row])
        excluded = same[out]
        excluded_at = torch.zeros(anchor.shape[0] + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(row[out], minlength=anchor.shape[0]), 0, out=excluded_at[1:])
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
    y = _Candidates(c, None, None, None, anchor, excluded_at, excluded, None, None, None, None)
    s = _contrast(c[anchor], y, inverse_tau, None, g, False)
    loss = s.lse - (c32[anchor] * mean).sum(1) * inverse_tau

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
            d_c *= inverse_tau
            d_rows = _normalize_backward(d_c, c, norm, d_c)
            target = rows.keep if p.history_index is None else rows.source
            total = torch.zeros(p.history.shape, dtype=torch.float32).index_add_(0, target, d_rows)
            gradients[0] = total.to(p.history.dtype)
    return loss, rows.keep[anchor], gradients


def sequence_forward(p: SequenceProblem, needs: Sequence[bool]) -> tuple[Tensor, list[Tensor]]:
    """(loss, saved) of the click-sequence loss."""
    early = p.reduction != "none"
    losses, where, gradients = _run_sequence(p, needs if early else [False, False], None)
    if p.reduction == "none":
        return torch.zeros(p.num_history).index_copy_(0, where, losses), []
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
