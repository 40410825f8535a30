"""The losses where candidates are in more than one place: of this batch, of other processes, of a
memory.

Each is made of one primitive, the log-sum-exp of scores of rows against columns (log_sum_exp.py),
and arithmetic on what belongs to a row, with PyTorch's own gradients:

    L_rec, anchor i:   log(1 + exp(lse_i - s_ii)),   lse_i over the candidates but i itself
    L_seq, anchor k:   lse_k - mean of s_kp over its positives p

Nothing here waits for a GPU: lists keep the length of what they are taken from there, and a count
on the device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from .. import operators, reference
from ..problem import Histories, Problem, SequenceProblem
from .blocks import Block, Scoring
from .candidates import CandidateUnion, Memory
from .exchange import Participants
from .log_sum_exp import Call, CandidateLogSumExp, LogSumExp, unit_rows

# The bias of a column that is none: its exp is 0 beside any score.
NOWHERE = -1e30


def _scoring(p: Problem | SequenceProblem) -> tuple[Scoring, Tensor]:
    """And 1/tau as a float64 tensor that takes a gradient."""
    device = (p.pv if isinstance(p, Problem) else p.history).device
    if p.temperature is None:
        inverse = torch.full((), 1.0 / p.tau, dtype=torch.float64, device=device)
        return Scoring(None, p.tau, p.workspace), inverse
    return Scoring(p.temperature.detach(), 0.0, p.workspace), 1.0 / p.temperature.double()


# ---- rows of a batch -----------------------------------------------------------------------------


@dataclass
class _Listed:
    """The rows of a flag: exactly those on the CPU; on a GPU as many as there might be, the live
    ones first."""

    index: Tensor  # [n] int64, ascending over the live ones
    live: Tensor | None  # [n] bool; None: all
    count: Tensor | None  # [1] int32

    def __len__(self) -> int:
        return self.index.shape[0]

    def zeroed(self, x: Tensor) -> Tensor:
        """x [n] or [n, D], 0 where there is no row, whatever it holds."""
        if self.live is None:
            return x
        return torch.where(self.live if x.dim() == 1 else self.live[:, None], x, 0)

    def bias(self, bias: Tensor | None) -> Tensor | None:
        """Of columns: those that are none have no weight."""
        if self.live is None:
            return bias
        nothing = (
            torch.zeros((), device=self.index.device, dtype=torch.float32) if bias is None else bias
        )
        return torch.where(self.live, nothing, NOWHERE)


def _waits(device: torch.device) -> bool:
    """Whether the host may ask for values: on the CPU they are there."""
    return device.type == "cpu"


def _listed(flag: Tensor) -> _Listed:
    if _waits(flag.device):
        return _Listed(flag.nonzero().squeeze(1), None, None)
    # Not argsort of a bool: the order of the rows is the order of the list.
    order = torch.argsort((~flag).to(torch.uint8), stable=True)
    count = flag.sum(dtype=torch.int32).view(1)
    return _Listed(order, torch.arange(len(flag), device=flag.device) < count, count)


def _place(flag: Tensor) -> Tensor:
    """[N] place of each row in the list of a flag."""
    return flag.cumsum(0) - 1


def _counts(group: Tensor, groups: int) -> Tensor:
    """Rows of each group [groups] int64; those of group -1 count nowhere. torch.bincount would wait
    for a GPU."""
    counts = torch.zeros(groups + 1, dtype=torch.int64, device=group.device)
    return counts.scatter_add_(0, torch.where(group < 0, groups, group), torch.ones_like(group))[
        :groups
    ]


def _take(source: Tensor, index: Tensor | None, rows: Tensor) -> Tensor:
    """Rows of the batch, from a table if there is one. Both gradients have the same bits each time,
    on a GPU too."""
    return source[rows] if index is None else functional.embedding(index[rows], source)


@dataclass
class _Batch:
    """What is known of the rows before anything is computed."""

    page: Tensor  # [N], -1 for padding
    history_page: Tensor  # [K] likewise
    is_anchor: Tensor  # [N] bool
    has_history: Tensor  # [N] bool, of real rows
    skipped: Tensor  # 0-d: clicked, without a history
    ids: Tensor | None  # [N] int64


def _batch(p: Problem, table_ids: Tensor | None) -> _Batch:
    assert p.clicked is not None
    page = reference.page_of_rows(p.pv_offsets, p.pv_mask, p.num_pv)
    history_page = reference.page_of_rows(p.history_offsets, p.history_mask, p.num_history)
    pages = p.pv_offsets.shape[0] - 1
    real = page >= 0
    if p.reconstructed is None:
        present = torch.cat([_counts(history_page, pages) > 0, real.new_zeros(1)])
        has_history = present[page]  # page -1 is the last entry
    else:
        has_history = real if p.reconstructed_mask is None else real & p.reconstructed_mask
    clicked = p.clicked & real
    is_anchor = clicked & has_history
    if p.weights is not None:
        is_anchor &= p.weights > 0
    ids = p.item_ids
    if table_ids is not None:
        ids = table_ids[torch.where(real, p.pv_index, 0)] if len(table_ids) else page
    elif ids is None:
        ids = p.pv_index
    return _Batch(page, history_page, is_anchor, has_history, (clicked & ~has_history).sum(), ids)


# ---- the reconstruction loss ---------------------------------------------------------------------


def _attended(p: Problem, impl: str, rows: Tensor) -> Tensor:
    """R [N, D] of the rows flagged, by the attention of their own queries where it is not given."""
    if p.reconstructed is not None:
        return p.reconstructed
    q = replace(p, pv_mask=rows, clicked=None, temperature=None, tau=1.0, log_q=None, weights=None)
    q = replace(q, item_ids=None, attention="anchor", cosine=False)
    return reference.reconstruct(q)[0] if impl == "reference" else operators.reconstruct(q, impl)


@dataclass
class _Columns:
    """Columns of a direction in this batch, and which of them are the anchors' own."""

    block: Block
    own: Tensor  # [M]


def _item_columns(p: Problem, b: _Batch, anchor: Tensor, table_ids: Tensor | None) -> _Columns:
    """PV items, E itself; or the different ones among them with the bias log m, where nothing else
    tells them apart."""
    every = b.page >= 0
    plain = p.log_q is None and p.negatives == "batch" and p.query is None
    if p.pv_index is not None and plain and (p.item_ids is None or table_ids is not None):
        counts = _counts(torch.where(every, p.pv_index, -1), len(p.pv))
        items = _listed(counts > 0)
        ids = items.index if table_ids is None else table_ids[items.index]
        rows = items.zeroed(p.pv[items.index])
        bias = items.bias(counts[items.index].double().log())
        own = _place(counts > 0)[p.pv_index[anchor]]
        return _Columns(Block(rows, ids, None, bias, True, items.count), own)
    items = _listed(every)
    block = _row_block(p, b, items.zeroed(_take(p.pv, p.pv_index, items.index)), items)
    if p.query is not None and p.attention == "candidate":
        block.query = items.zeroed(p.query[items.index])
    return _Columns(block, _place(every)[anchor])


def _row_block(p: Problem, b: _Batch, rows: Tensor, listed: _Listed) -> Block:
    """Columns that are PV rows."""
    ids = listed.index if b.ids is None else b.ids[listed.index]
    page = b.page[listed.index] if p.negatives == "other_pages" else None
    bias = None if p.log_q is None else -p.log_q[listed.index]
    return Block(rows, ids, page, listed.bias(bias), False, listed.count)


def reconstruction_loss(p: Problem, union: CandidateUnion, stats: bool) -> reference.LossOutput:
    """L_rec over every candidate of the union: `reference.reconstruction_loss` of the processes'
    batches as one."""
    b = _batch(p, union.table_ids)
    if p.negatives == "page":
        return _of_own_page(p, union, b, stats)
    anchors = _listed(b.is_anchor)
    if p.attention == "candidate":
        return _candidate_loss(p, union, b, anchors, stats)
    a = anchors.index
    directions = ("reconstruct", "identify") if p.direction == "both" else (p.direction,)
    every = b.has_history if "identify" in directions else b.is_anchor
    made = _listed(every)
    r = unit_rows(made.zeroed(_attended(p, union.impl, every)[made.index]))
    items = _item_columns(p, b, a, union.table_ids)
    e = unit_rows(items.block.rows)
    x = {
        "reconstruct": anchors.zeroed(r[_place(every)[a]]),
        "identify": anchors.zeroed(e[items.own]),
    }
    y = {"reconstruct": replace(items.block, rows=e), "identify": _row_block(p, b, r, made)}
    sizes = union.agree(p, stats, [len(anchors), *(len(y[d]) for d in directions)])
    scored = _Scored(
        p, union, b, anchors, (x["reconstruct"] * x["identify"]).sum(1, dtype=torch.float64)
    )
    for d, size in zip(directions, sizes[1:], strict=True):
        call = scored.call(y[d], sizes[0], size, stats)
        scored.add(*LogSumExp.apply(x[d], y[d].rows, scored.inverse_tau, p.pv.dtype, call))
    return _output(scored, stats)


def _candidate_loss(
    p: Problem, union: CandidateUnion, b: _Batch, anchors: _Listed, stats: bool
) -> reference.LossOutput:
    """Attention "candidate"; the anchor's own score is that of its own query, as with "anchor"."""
    a = anchors.index
    columns = _item_columns(p, b, a, union.table_ids)
    size = union.agree(p, stats, [len(columns.block)])[0]
    r = unit_rows(anchors.zeroed(_attended(_by_products(p, b), union.impl, b.is_anchor)[a]))
    e = unit_rows(anchors.zeroed(columns.block.rows[columns.own]))
    scored = _Scored(p, union, b, anchors, (r * e).sum(1, dtype=torch.float64))
    call = scored.call(columns.block, [], size, stats)
    pages_end = p.pv_offsets.shape[0] - 1
    call.x.page = (
        b.page[a] if anchors.live is None else torch.where(anchors.live, b.page[a], pages_end)
    )
    source = p.pv if p.history is None else p.history
    every = torch.arange(p.num_history, device=source.device)

    def of_history(given: Tensor | None) -> Tensor:
        x = _take(source, p.history_index, every) if given is None else given
        return torch.where(b.history_page[:, None] >= 0, x, 0)

    key = of_history(p.key)
    value = None if p.key is None and p.value is None else of_history(p.value)
    histories = Histories(
        key, key, p.history_offsets, b.history_page, p.attention_scale, p.cosine, p.num_heads
    )
    query, scale = columns.block.query, scored.inverse_tau
    scored.add(
        *CandidateLogSumExp.apply(columns.block.rows, query, key, value, scale, histories, call)
    )
    return _output(scored, stats)


def _by_products(p: Problem, b: _Batch) -> Problem:
    """The same attention by plain products: that by cosines is that of unit queries and keys."""
    if not p.cosine:
        return p
    source = p.pv if p.history is None else p.history

    def unit(given: Tensor | None, rows: Tensor, index: Tensor | None, page: Tensor) -> Tensor:
        every = torch.arange(len(page), device=page.device)
        x = _take(rows, index, every) if given is None else given
        x = torch.where(page[:, None] >= 0, x, 0)
        heads = x.view(len(x), p.num_heads, x.shape[1] // p.num_heads)
        return reference.normalize(heads).reshape(x.shape)

    query = unit(p.query, p.pv, p.pv_index, b.page)
    return replace(p, query=query, key=unit(p.key, source, p.history_index, b.history_page))


def _of_own_page(p: Problem, union: CandidateUnion, b: _Batch, stats: bool) -> reference.LossOutput:
    """Candidates of the own page alone: nothing travels but the weights."""
    union.agree(p, stats, [])
    q = replace(p, reduction="none", item_ids=b.ids)
    if union.impl == "reference":
        out = reference.reconstruction_loss(q)
    else:
        out = reference.LossOutput(*operators.loss(q, union.impl, stats))
    if p.reduction != "none":
        weights = b.is_anchor.double()
        if p.weights is not None:
            weights = torch.where(b.is_anchor, p.weights.double(), 0.0)
        out.loss = reduced(p.reduction, out.loss.double(), weights, union.processes).to(
            out.loss.dtype
        )
    return out


@dataclass
class _Scored:
    """Anchors and their positives; losses of a direction are added one after the other."""

    p: Problem
    union: CandidateUnion
    b: _Batch
    anchors: _Listed
    positive: Tensor  # [M] float64: cosines

    def __post_init__(self) -> None:
        self.scoring, self.inverse_tau = _scoring(self.p)
        self.score = self.positive * self.inverse_tau
        if self.p.log_q is not None:
            log_q = self.p.log_q[self.anchors.index].double()
            self.score = self.score - self.anchors.zeroed(log_q)
        self.losses: list[Tensor] = []
        self.first: tuple[Tensor, Tensor] | None = (
            None  # log-sum-exp and `above` of the first direction
        )

    def call(self, y: Block, rows: list[int], columns: list[int], stats: bool) -> Call:
        p, b, a = self.p, self.b, self.anchors.index
        pairs = "other_pages" if p.negatives == "other_pages" else "ids"
        x = Block(
            y.rows.new_zeros(len(a), 0), a if b.ids is None else b.ids[a], count=self.anchors.count
        )
        if pairs == "other_pages":
            x.page = b.page[a]
        bar = self.score.detach() if stats and not self.losses else None
        memory = (
            None if self.union.memory is None else _memory_block(self.union.memory, p.attention)
        )
        return Call(
            self.union, self.scoring, x, y, pairs, b.ids is not None, rows, columns, memory, bar
        )

    def add(self, lse: Tensor, above: Tensor) -> None:
        """log(1 + exp(lse - score)): the positive joins its candidates."""
        self.losses.append(torch.logaddexp(torch.zeros_like(lse), lse - self.score))
        if self.first is None:
            self.first = torch.logaddexp(lse, self.score).detach(), above


def _memory_block(memory: Memory, attention: str) -> Block:
    bias = None if memory.log_q is None else -memory.log_q
    if attention == "candidate":
        # Copies: a memory may go on before the backward pass, which looks at these again.
        ids = None if memory.ids is None else memory.ids.clone()
        return Block(memory.rows.clone(), ids, None, bias)
    return Block(unit_rows(memory.rows).to(memory.rows.dtype), memory.ids, None, bias)


def _output(scored: _Scored, stats: bool) -> reference.LossOutput:
    p, b, anchors = scored.p, scored.b, scored.anchors
    assert scored.first is not None
    lse, above = scored.first
    item = anchors.zeroed(sum(scored.losses, torch.zeros_like(lse)) / len(scored.losses))
    kind = torch.promote_types(p.pv.dtype, torch.float32)

    def spread(x: Tensor) -> Tensor:  # [M] -> [N]
        return x.new_zeros(p.num_pv).index_copy(0, anchors.index, anchors.zeroed(x))

    if p.reduction == "none":
        loss = spread(item)
    else:
        weights = torch.ones_like(item) if p.weights is None else p.weights[anchors.index].double()
        loss = reduced(p.reduction, item, anchors.zeroed(weights), scored.union.processes)
    # A zero that depends on every input: whatever is not used here gets a gradient of zeros.
    for x in p.embedded:
        loss = loss + x[:0].sum().double()
    ranks = spread(above + 1) if stats else above
    return reference.LossOutput(
        loss.to(kind),
        spread(item.detach()).to(kind),
        spread(lse).to(kind),
        spread(scored.positive.detach()).to(kind),
        ranks,
        b.is_anchor,
        b.skipped,
    )


def reduced(
    reduction: str, item: Tensor, weights: Tensor, processes: Participants | None
) -> Tensor:
    """The weighted sum of this process's rows; with "mean" W times it over the weights of all, so
    that the mean of the processes' losses (and of their gradients, as DDP takes it) is the union's.
    """
    loss = (weights * item).sum()
    if reduction == "sum":
        return loss
    total, size = weights.sum(), 1
    if processes is not None:
        total, size = processes.sum(total), processes.size
    return loss * size / torch.where(total > 0, total, 1.0)


# ---- the click sequence --------------------------------------------------------------------------


def click_sequence_loss(p: SequenceProblem, union: CandidateUnion) -> Tensor:
    """L_seq over every candidate of the union, as `reconstruction_loss`."""
    scoring, inverse_tau = _scoring(p)
    pages = max(p.history_offsets.shape[0] - 1, 1)  # padding asks for a page, too
    page = reference.page_of_rows(p.history_offsets, p.history_mask, p.num_history)
    rows = _listed(page >= 0)
    at, page = rows.index, page[rows.index]
    c = unit_rows(rows.zeroed(_take(p.history, p.history_index, at)))
    ids = p.ids
    if union.table_ids is not None and p.history_index is not None:
        ids = union.table_ids[p.history_index] if len(union.table_ids) else page
    own_ids = at if ids is None else ids[at]
    size = union.agree(p, False, [len(rows)])[0]

    # Positives of k: the page's rows without those of k's item; sums over a page and over an item
    # on a page give both.
    group = _groups(page, own_ids)
    number = _counts(page, pages)[page] - _counts(group, len(rows))[group]
    is_anchor = rows.zeroed(number) > 0
    sums = _sums(c, page, pages)[page] - _sums(c, group, len(rows))[group]
    positive = (c * sums).sum(1, dtype=torch.float64) / number.clamp(min=1) * inverse_tau

    block = Block(c, own_ids, page, None, False, rows.count)
    call = Call(
        union,
        scoring,
        block,
        replace(block, bias=rows.bias(None)),
        "sequence" if ids is not None else "ids",
        ids is not None,
        size,
        size,
        None,
        None,
    )
    lse, _ = LogSumExp.apply(c, c, inverse_tau, p.history.dtype, call)
    item = torch.where(is_anchor, lse - positive, 0.0)
    if p.reduction == "none":
        loss = item.new_zeros(p.num_history).index_copy(0, at, item)
    else:
        loss = reduced(p.reduction, item, is_anchor.double(), union.processes)
    loss = loss + p.history[:0].sum().double()
    return loss.to(torch.promote_types(p.history.dtype, torch.float32))


def _groups(page: Tensor, ids: Tensor) -> Tensor:
    """Number of each row's (page, id) [n]; as many groups as rows at most, so that nobody has to
    count them."""
    by_id = torch.argsort(ids, stable=True)
    order = by_id[torch.argsort(page[by_id], stable=True)]
    new = torch.ones_like(order)
    new[1:] = ((page[order][1:] != page[order][:-1]) | (ids[order][1:] != ids[order][:-1])).to(
        new.dtype
    )
    return torch.empty_like(order).scatter_(0, order, new.cumsum(0) - 1)


def _sums(x: Tensor, group: Tensor, groups: int) -> Tensor:
    """[groups, D], in a fixed order on a GPU too."""
    where = torch.where(group < 0, groups, group)
    return x.new_zeros(groups + 1, x.shape[1]).index_put((where,), x, accumulate=True)[:groups]
