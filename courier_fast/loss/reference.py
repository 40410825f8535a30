"""The oracle: COURIER's losses in plain PyTorch, to be read beside the equations.

Any device, any floating type (float64 for tests), gradients by autograd, double backward included.
It keeps the clicked-rows-by-all-items similarity matrix in memory and synchronises with the device;
every other implementation is tested against it. Letters as in arXiv 2306.05001 and the README: E
are PV embeddings, C history embeddings, R the reconstruction of a PV item from its page's history.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .problem import NORM_EPS, Histories, Problem, SequenceProblem


@dataclass
class LossOutput:
    """What one evaluation gives; per-row tensors are in the layout of the PV rows and 0 where a row
    is no anchor."""

    loss: Tensor  # 0-d, or [N] with reduction "none"
    item_loss: Tensor  # [N] loss of each anchor, before weights
    log_sum_exp: Tensor  # [N] over the candidates
    positive_similarity: Tensor  # [N] cos(R_i, E_i)
    rank: Tensor  # [N] int64: 1 + candidates that score above the positive
    is_anchor: Tensor  # [N] bool
    num_skipped: Tensor  # 0-d int64: clicked items left out because their page has no history

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """What is per row."""
        return (
            self.item_loss,
            self.log_sum_exp,
            self.positive_similarity,
            self.rank,
            self.is_anchor,
        )


@dataclass
class _Rows:
    """Real rows of one side, padding removed."""

    keep: Tensor  # [n_real] positions in the packed layout
    page: Tensor  # [n_real] page of each
    counts: Tensor  # [B] real rows per page


def _compute_dtype(x: Tensor) -> torch.dtype:
    """Softmax, logits and losses are float32 or better, whatever the input type."""
    return torch.promote_types(x.dtype, torch.float32)


def page_of_rows(offsets: Tensor, mask: Tensor | None, rows: int) -> Tensor:
    """Page of every row [rows] int64, -1 for padding (masked, or at or past the last offset)."""
    position = torch.arange(rows, device=offsets.device)
    page = torch.searchsorted(offsets, position, right=True) - 1
    real = page < offsets.shape[0] - 1
    if mask is not None:
        real = real & mask
    return torch.where(real, page, -1)


def _real_rows(offsets: Tensor, mask: Tensor | None, rows: int) -> _Rows:
    page = page_of_rows(offsets, mask, rows)
    keep = (page >= 0).nonzero().squeeze(1)
    page = page[keep]
    return _Rows(keep, page, torch.bincount(page, minlength=offsets.shape[0] - 1))


def _take(values: Tensor, index: Tensor | None, keep: Tensor) -> Tensor:
    """Rows `keep` of the packed layout: of the values themselves, or of the table they point into,
    where an index out of range is an error, a negative one too."""
    return values[keep] if index is None else functional.embedding(index[keep], values)


def normalize(x: Tensor) -> Tensor:
    """x / |x| along the last dimension; a zero vector gives zeros, and no gradient."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=_compute_dtype(x))
    nonzero = ~(norm <= NORM_EPS)  # NaN counts as non-zero, so that it shows in the loss
    # The inner `where` keeps the untaken branch finite: 0/0 there would make the gradient NaN.
    safe = torch.where(nonzero, x, torch.ones_like(x))
    norm = torch.linalg.vector_norm(safe, dim=-1, keepdim=True, dtype=_compute_dtype(x))
    return torch.where(nonzero, (safe / norm).to(x.dtype), torch.zeros_like(x))


def _pad_pages(values: Tensor, rows: _Rows, length: int) -> Tensor:
    """[n_real, D] -> [B, length, D], zeros where a page is shorter."""
    start = rows.counts.cumsum(0) - rows.counts
    slot = (
        rows.page * length + torch.arange(len(rows.page), device=values.device) - start[rows.page]
    )
    padded = values.new_zeros(len(rows.counts) * length, values.shape[1])
    return padded.index_copy(0, slot, values).view(len(rows.counts), length, values.shape[1])


def _unread(x: Tensor) -> Tensor:
    """Zeros, attached to x, whatever it holds."""
    return torch.zeros_like(x) + x[:0].sum()


def _attention_rows(p: Problem, pv: _Rows, history: _Rows) -> tuple[Tensor, Tensor, Tensor]:
    """q of the real PV rows, k and v of the real history rows."""
    source = p.pv if p.history is None else p.history
    q = _take(p.pv, p.pv_index, pv.keep) if p.query is None else p.query[pv.keep]
    k = _take(source, p.history_index, history.keep) if p.key is None else p.key[history.keep]
    v = _take(source, p.history_index, history.keep) if p.value is None else p.value[history.keep]
    return q, k, v


def _attend(p: Problem, pv: _Rows, history: _Rows) -> tuple[Tensor, Tensor]:
    """R [n_real, D] and the attention weights [n_real, heads, longest history] of real PV rows.

    a_jk = softmax over k in H_b of (c q_j . k_k),  R_j = sum_k a_jk v_k;
    zeros where the page has no history.
    """
    q, k, v = _attention_rows(p, pv, history)
    if not p.attention_scale:
        # Nobody asks: 0 times a product that may be infinite is not 0.
        q, k = _unread(q), _unread(k)
    heads, dim = p.num_heads, q.shape[1]
    longest = int(history.counts.max()) if len(history.counts) else 0
    most = int(pv.counts.max()) if len(pv.counts) else 0
    if longest == 0 or most == 0:
        # No page has a history: R = 0, still attached to the inputs.
        nothing = _unread(k).sum() + _unread(v).sum()
        return _unread(q) + nothing, q.new_zeros(len(q), heads, longest, dtype=_compute_dtype(q))

    def split(
        x: Tensor, rows: _Rows, length: int
    ) -> Tensor:  # [n_real, D] -> [B, heads, length, D / heads]
        return (
            _pad_pages(x, rows, length)
            .view(len(rows.counts), length, heads, dim // heads)
            .transpose(1, 2)
        )

    present = torch.arange(longest, device=q.device) < history.counts[:, None]  # [B, longest]
    # A page without history is let see its zero padding, so that no softmax is over nothing; R is
    # then exactly 0.
    visible = present | (history.counts == 0)[:, None]
    scores = (split(q, pv, most) @ split(k, history, longest).mT).to(
        _compute_dtype(q)
    ) * p.attention_scale
    weights = scores.masked_fill(~visible[:, None, None, :], -torch.inf).softmax(-1)
    out = weights.to(q.dtype) @ split(v, history, longest)  # [B, heads, most, D / heads]

    start = pv.counts.cumsum(0) - pv.counts
    row = torch.arange(len(pv.page), device=q.device) - start[pv.page]
    r = out.transpose(1, 2)[pv.page, row].reshape(len(q), dim)
    return r, weights.transpose(1, 2)[pv.page, row] * present[pv.page][:, None, :]


def reconstruct(p: Problem) -> tuple[Tensor, Tensor]:
    """R [N, D] and the attention weights [N, heads, longest history] (over the real history rows of
    the page, in order)."""
    pv = _real_rows(p.pv_offsets, p.pv_mask, p.num_pv)
    history = _real_rows(p.history_offsets, p.history_mask, p.num_history)
    r, a = _attend(p, pv, history)
    full_r = r.new_zeros(p.num_pv, r.shape[1]).index_copy(0, pv.keep, r)
    full_a = a.new_zeros(p.num_pv, *a.shape[1:]).index_copy(0, pv.keep, a)
    return full_r, full_a


def _inverse_temperature(p: Problem | SequenceProblem, like: Tensor) -> Tensor:
    tau = p.temperature
    if tau is None:
        tau = torch.tensor(p.tau, dtype=torch.float64, device="cpu")
    return (1.0 / tau).to(device=like.device, dtype=_compute_dtype(like))


@dataclass
class _Contrast:
    loss: Tensor  # [M]
    log_sum_exp: Tensor  # [M]
    positive_similarity: Tensor  # [M]
    rank: Tensor  # [M]


def candidate_cosines(histories: Histories, e: Tensor, query: Tensor, listed: Tensor) -> Tensor:
    """cos(R_bj, E_j) [pages listed, n]: every candidate j, with unit row e_j [n, D] and query q_j
    [n, D], asks the history of every page b in `listed` itself.

    a_bjk = softmax over k in H_b of (c q_j . k_k),  R_bj = sum_k a_bjk v_k
    """

    def heads(x: Tensor) -> Tensor:  # [rows, D] -> [heads, rows, D / heads]
        return x.view(len(x), histories.heads, x.shape[1] // histories.heads).transpose(0, 1)

    q, k, v = heads(query), heads(histories.key), heads(histories.value)
    if histories.cosine:
        q, k = normalize(q), normalize(k)
    cosines = []
    for b in listed.tolist():
        mine = histories.page == b
        scores = (q @ k[:, mine].mT).to(_compute_dtype(q)) * histories.scale
        r = scores.softmax(-1).to(q.dtype) @ v[:, mine]  # [heads, n, D / heads]
        r = normalize(r.transpose(0, 1).reshape(e.shape))
        cosines.append((r[:, None, :] @ e[:, :, None]).view(-1))
    return torch.stack(cosines) if cosines else e.new_zeros(0, len(e))


def _contrast(
    cosine: Tensor,  # [M, n]: of r and e of the anchors and the candidates, or the other way round
    positive: Tensor,  # [M] column of each row's positive
    allowed: Tensor,  # [M, n] bool: candidates, the positive included
    inverse_tau: Tensor,
    log_q: Tensor | None,  # [n]
) -> _Contrast:
    """logsumexp_{j in cand(i)} s_ij - s_ii with s_ij = cos / tau [- log_q_j]."""
    cosine = cosine.to(inverse_tau.dtype)
    s = cosine * inverse_tau
    if log_q is not None:
        s = s - log_q.to(s.dtype)
    # Mask after the scaling: masking first would give 0 * inf = NaN as the gradient of tau.
    s = s.masked_fill(~allowed, -torch.inf)
    s_positive = s.gather(1, positive[:, None]).squeeze(1)
    lse = s.logsumexp(1)
    rank = 1 + (s > s_positive[:, None]).sum(1)
    return _Contrast(lse - s_positive, lse, cosine.gather(1, positive[:, None]).squeeze(1), rank)


def _allowed(
    p: Problem, page: Tensor, ids: Tensor | None, anchor: Tensor, column: Tensor
) -> Tensor:
    """cand(i) as a mask [M, n]; `anchor` [M] and `column` [n]: positions among the real PV rows."""
    itself = anchor[:, None] == column
    other = torch.ones_like(itself)
    if p.negatives == "page":
        other = page[anchor][:, None] == page[column]
    elif p.negatives == "other_pages":
        other = page[anchor][:, None] != page[column]
    if ids is not None:
        other = other & (ids[anchor][:, None] != ids[column])
    return other | itself


def reconstruction_loss(p: Problem) -> LossOutput:
    """L_rec = sum_{i in A} w_i [logsumexp_{j in cand(i)} s_ij - s_ii] / sum_{i in A} w_i,
    s_ij = cos(R_i, E_j) / tau.

    A = {i: clicked, page has history, w_i > 0}. Direction "identify" has s_ji in place of s_ij,
    over the items j with a history; "both" is the mean of the two, and its statistics are those of
    "reconstruct". With attention "candidate", s_ij = cos(R_bj, E_j) / tau on i's page b. Where R is
    given, an item has a history if it has an R.
    """
    assert p.clicked is not None
    pv = _real_rows(p.pv_offsets, p.pv_mask, p.num_pv)
    history = _real_rows(p.history_offsets, p.history_mask, p.num_history)
    e_raw = _take(p.pv, p.pv_index, pv.keep)
    has_history = history.counts[pv.page] > 0
    if p.reconstructed is not None:
        has_history = p.has_given(pv.keep)
    clicked = p.clicked[pv.keep]
    weights = None if p.weights is None else p.weights[pv.keep]
    is_anchor = clicked & has_history
    if weights is not None:
        is_anchor = is_anchor & (weights > 0)
    anchor = is_anchor.nonzero().squeeze(1)  # [M]
    everyone = torch.arange(len(pv.keep), device=anchor.device)
    reconstructed = has_history.nonzero().squeeze(1)
    ids = None if p.ids is None else p.ids[pv.keep]
    log_q = None if p.log_q is None else p.log_q[pv.keep]

    e = normalize(e_raw)
    inverse_tau = _inverse_temperature(p, e)
    if p.attention == "candidate":
        assert p.direction == "reconstruct"
        pages, which = pv.page[anchor].unique_consecutive(return_inverse=True)
        q, k, v = _attention_rows(p, pv, history)
        histories = Histories(
            k, v, p.history_offsets, history.page, p.attention_scale, p.cosine, p.num_heads
        )
        cosine = candidate_cosines(histories, e, q, pages)[which]
    else:
        given = p.reconstructed
        r_raw = _attend(p, pv, history)[0] if given is None else given[pv.keep]
        cosine = normalize(r_raw[anchor]) @ e.T
    results = []
    if p.direction in ("reconstruct", "both"):
        allowed = _allowed(p, pv.page, ids, anchor, everyone)
        results.append(_contrast(cosine, anchor, allowed, inverse_tau, log_q))
    if p.direction in ("identify", "both"):
        allowed = _allowed(p, pv.page, ids, anchor, reconstructed)
        positive = torch.searchsorted(reconstructed, anchor)
        r = normalize(r_raw[reconstructed])
        results.append(
            _contrast(
                e[anchor] @ r.T,
                positive,
                allowed,
                inverse_tau,
                None if log_q is None else log_q[reconstructed],
            )
        )
    loss_i = sum((c.loss for c in results), torch.zeros_like(inverse_tau)) / len(results)  # [M]

    where = pv.keep[anchor]

    def spread(x: Tensor) -> Tensor:  # [M] -> [N]
        return x.new_zeros(p.num_pv).index_copy(0, where, x)

    # A zero that depends on every input, the unused ones too (history beside key and value): a
    # batch without anchors or rows still gives each of them a (zero) gradient.
    attach = inverse_tau * 0
    for x in p.embedded:
        attach = attach + x[:0].sum().to(loss_i.dtype)
    if p.reduction == "none":
        loss = spread(loss_i) + attach
    elif weights is None:
        loss = loss_i.sum() / (max(len(anchor), 1) if p.reduction == "mean" else 1) + attach
    else:
        w = weights[anchor].to(loss_i.dtype)
        total = w.sum() if p.reduction == "mean" and len(anchor) else torch.ones_like(attach)
        loss = (w * loss_i).sum() / total + attach
    first = results[0]
    return LossOutput(
        loss=loss,
        item_loss=spread(loss_i.detach()),
        log_sum_exp=spread(first.log_sum_exp.detach()),
        positive_similarity=spread(first.positive_similarity.detach()),
        rank=spread(first.rank),
        is_anchor=torch.zeros(p.num_pv, dtype=torch.bool, device=where.device).index_fill(
            0, where, True
        ),
        num_skipped=(clicked & ~has_history).sum(),
    )


def click_sequence_loss(p: SequenceProblem) -> Tensor:
    """L_seq = mean over anchors k of -(1/|pos(k)|) sum_{p in pos(k)}
    [s_kp - logsumexp_{l in cand(k)} s_kl].

    pos(k): the other history items of k's page (not k's own item again); anchors are the items that
    have one; cand(k): every history item but k itself and its re-occurrences on other pages. 0-d,
    or [K] with reduction "none".
    """
    history = _real_rows(p.history_offsets, p.history_mask, p.num_history)
    c_raw = _take(p.history, p.history_index, history.keep)
    c = normalize(c_raw)
    inverse_tau = _inverse_temperature(p, c)
    ids = torch.arange(len(c), device=c.device) if p.ids is None else p.ids[history.keep]

    same_page = history.page[:, None] == history.page
    same_item = ids[:, None] == ids
    itself = torch.eye(len(c), dtype=torch.bool, device=c.device)
    positive = same_page & ~same_item & ~itself
    anchor = positive.any(1).nonzero().squeeze(1)
    positive = positive[anchor]
    allowed = ~itself[anchor] & (~same_item | same_page)[anchor]

    s = (c[anchor] @ c.T).to(inverse_tau.dtype) * inverse_tau
    lse = s.masked_fill(~allowed, -torch.inf).logsumexp(1)
    loss_k = lse - s.masked_fill(~positive, 0).sum(1) / positive.sum(1)
    attach = c_raw[:0].sum().to(s.dtype) + inverse_tau * 0
    if p.reduction == "none":
        return loss_k.new_zeros(p.num_history).index_copy(0, history.keep[anchor], loss_k) + attach
    return loss_k.sum() / (max(len(anchor), 1) if p.reduction == "mean" else 1) + attach
