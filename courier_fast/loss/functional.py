"""The losses users call: every layout and option, checked, on whichever implementation fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..surroundings import has_values, without_autocast
from . import operators, reference
from .arguments import (
    Attention,
    CheckedInputs,
    attention_of,
    check_choices,
    check_reconstructed,
    check_workspace,
)
from .cuda_graph import Graphs
from .fallback import OR_REFERENCE, kernels_of
from .layouts import Given, describe, require_flag, require_tensor, shown
from .options import WORKSPACE
from .problem import Problem, SequenceProblem
from .union import losses
from .union.candidates import Beside
from .union.exchange import Group, Participants, reporting

# What impl="auto" takes where it can run. Triton's interpreter is for tests: impl="triton" on CPU
# tensors has to be asked for.
AUTO = {"cuda": "triton" + OR_REFERENCE, "cpu": "cpu"}
# How the error of an explicit `impl` begins, after its name.
REFUSED = "cannot run this problem here"
# The `group` of a module that is given none.
LEFT_OUT = Group(None)


@dataclass
class ReconstructionStats:
    """What one loss evaluation tells about its anchors; nothing here needs another pass or carries
    a gradient.

    Tensors "in the layout of clicked" are 0 (False) where an item is no anchor. A loss with
    direction "both" has a softmax over items and one over reconstructions: its log_sum_exp and
    rank, and so recall and MRR, are those of the first, as `direction` says, while item_loss is the
    mean of the two. Candidates that tie with the positive (equal rows with different ids, or with
    "identify" the items of a page with a single history item) are not above it, but for rounding.
    """

    item_loss: Tensor  # layout of clicked, float32: loss of each anchor before weights
    log_sum_exp: Tensor  # layout of clicked, float32: over the candidates of each anchor
    positive_similarity: Tensor  # layout of clicked, float32: cos(R_i, E_i)
    rank: Tensor  # layout of clicked, int64: 1 + number of candidates that score above the positive
    is_anchor: Tensor  # layout of clicked, bool
    num_anchors: Tensor  # 0-d int64
    # 0-d int64: clicked items that are no anchors for want of a history, or of a given R
    num_clicked_without_history: Tensor
    direction: str  # "reconstruct" or "identify": whose log_sum_exp and rank these are

    def recall_at(self, k: int) -> Tensor:
        """Share of anchors whose positive is among the k best candidates, 0-d float32; NaN without
        anchors."""
        hits = (self._anchors(self.is_anchor) & (self._anchors(self.rank) <= k)).sum()
        return hits.float() / self.num_anchors

    def mrr(self) -> Tensor:
        """Mean reciprocal rank of the positive, 0-d float32; NaN without anchors."""
        is_anchor, rank = self._anchors(self.is_anchor), self._anchors(self.rank)
        inverse = 1.0 / rank.clamp(min=1).float()
        return torch.where(is_anchor, inverse, 0.0).sum() / self.num_anchors

    @staticmethod
    def _anchors(x: Tensor) -> Tensor:
        return x.values() if x.is_nested else x


def choose(impl: str, p: Problem | SequenceProblem) -> str:
    """The implementation to run; an explicit one never falls back."""
    if impl == "auto":
        candidate = AUTO.get(operators.source_of(p).device.type)
        if candidate is None or operators.unavailable_reasons(kernels_of(candidate), p):
            return "reference"
        return candidate
    if impl != "reference":
        reasons = operators.unavailable_reasons(impl, p)
        if reasons:
            raise RuntimeError(f"impl={impl!r} {REFUSED}: " + "; ".join(reasons))
    return impl


def evaluate(
    p: Problem | SequenceProblem,
    impl: str,
    beside: Beside,
    graphs: Graphs | None,
    stats: bool = False,
) -> tuple[Tensor, ...]:
    """The loss and what belongs to `stats`, as `operators.loss` gives them."""
    chosen = choose(impl, p)
    p, union = beside.union(p, chosen)
    if union is not None and graphs is not None:
        raise ValueError(
            "cuda_graph: expected False with group or memory, "
            "whose sizes the host has to know, got True"
        )
    if graphs is not None:
        return graphs(p, kernels_of(chosen), stats)
    if union is None and chosen != "reference" and not operators.fell_back(p):
        return operators.loss(p, chosen, stats)
    source = operators.source_of(p)
    if not torch.compiler.is_compiling() and not has_values(source):
        return tuple(operators.without_values(p, stats))
    with without_autocast(source):
        if union is None:
            return operators.defined(p)
        if isinstance(p, SequenceProblem):
            return (losses.click_sequence_loss(p, union),)
        out = losses.reconstruction_loss(p, union, stats)
    return (out.loss, *out.rows, out.num_skipped)


def evaluate_reconstruct(p: Problem, impl: str) -> Tensor:
    """R [N, D] by the attention of `p`; zeros for padding and for pages without history."""
    chosen = choose(impl, p)
    if chosen != "reference":
        return operators.reconstruct(p, chosen)
    if torch.compiler.is_compiling() or has_values(p.pv):
        with without_autocast(p.pv):
            return reference.reconstruct(operators.checked(p))[0]
    return operators.without_values(p, False, whole=False)[0]


def reconstruction_loss(
    pv: Tensor,
    history: Tensor | None,
    clicked: Tensor,
    *,
    pv_mask: Tensor | None = None,
    history_mask: Tensor | None = None,
    pv_offsets: Tensor | None = None,
    history_offsets: Tensor | None = None,
    embeddings: Tensor | None = None,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    reconstructed: Tensor | None = None,
    reconstructed_mask: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    attention: str | None = None,
    attention_scale: float | None = None,
    attention_temperature: float | None = None,
    num_heads: int = 1,
    negatives: str = "batch",
    direction: str = "reconstruct",
    item_ids: Tensor | None = None,
    log_q: Tensor | None = None,
    weights: Tensor | None = None,
    group: Any = None,
    exchange: str = "auto",
    table_ids: Tensor | None = None,
    memory: Tensor | None = None,
    memory_ids: Tensor | None = None,
    memory_log_q: Tensor | None = None,
    reduction: str = "mean",
    return_stats: bool = False,
    validate: bool = False,
    impl: str = "auto",
    workspace: int = WORKSPACE,
    _graphs: Graphs | None = None,
) -> Tensor | tuple[Tensor, ReconstructionStats]:
    """Contrastive user intention reconstruction, L_rec of COURIER (arXiv 2306.05001).

        R_bj = sum_k softmax_k(c q_j . k_k) v_k over the history of page b
        s_ij = cos(R_bj, E_j) / temperature on i's page b
        L = sum_{i in A} w_i [logsumexp_{j in cand(i)} s_ij - s_ii] / sum_{i in A} w_i

    That is attention "candidate": each candidate asks the history itself. With "anchor" only the
    anchor does, and s_ij = cos(R_i, E_j) / temperature with R_i = R_bi, which knows the answer
    before it is compared with anything; with "mean" nobody does, a = 1 / |history|. With
    `reconstructed` R is the caller's, and the rest of it a contrast of R with E: InfoNCE.

    Anchors A are the clicked items whose page has a history. B pages, N page-view (PV) items, K
    history items:

    Args:
        pv: embeddings E of the PV items: padded [B, P, D] (with `pv_mask` [B, P], True = real),
            packed [N, D] with `pv_offsets` [B + 1], or a torch.jagged NestedTensor [B, *, D]. With
            `embeddings`: integer indices instead.
        history: embeddings C of the history items, in the same kind of layout: [B, H, D] or [K, D];
            None with `reconstructed`.
        clicked: bool, or integers 0 and 1, one per PV item: [B, P] or [N].
        pv_mask, history_mask: which padded rows are real; None: all. What padding holds has no
            influence.
        pv_offsets, history_offsets: first row of each page and the end; rows past the end are
            padding.
        embeddings: a table [n, D] of unique items that `pv` and `history` index; it takes the
            gradient, and each item is one candidate however often it occurs.
        query, key, value: attention inputs in the layouts of pv, history, history; default pv,
            history, history.
        reconstructed: R of each PV item, made by the caller (another attention, the user's side of
            two towers), in the layout of pv with D features, beside a table too; it takes a
            gradient. Then there is no history, attention, query, key or value.
        reconstructed_mask: which items have an R, in the layout of clicked; None: all. Those
            without are no anchors, with directions "identify" and "both" no candidates either, and
            what their rows of `reconstructed` hold has no influence.
        temperature: tau > 0, a float or a tensor of one number that may require a gradient.
        attention: "candidate" (direction "reconstruct" only), "anchor" or "mean"; default
            "candidate", in the other directions "anchor".
        attention_scale: c; default 1 / sqrt(D / num_heads).
        attention_temperature: t > 0, in place of attention_scale: q and k are divided by their
            lengths, head by head (zero vectors stay zero), and c = 1/t.
        num_heads: attention heads; D is split among them.
        negatives: "batch" (all other PV items), "page" (those of the anchor's page) or
            "other_pages".
        direction: "reconstruct" (softmax over items), "identify" (over reconstructions) or "both"
            (their mean).
        item_ids: integers in the layout of clicked: an item with the anchor's id is never its
            negative. Default with `embeddings`: the index; otherwise no two items are the same.
        log_q: log sampling probability of each candidate, subtracted from its scores. Takes no
            gradient.
        weights: weight >= 0 of each clicked item as an anchor; 0 makes it none. Takes no gradient.
        group: a torch.distributed ProcessGroup, or "world", all processes at the time of the call:
            the candidates are those of all its processes, and the loss that of the union of their
            batches (docs/processes.md). "mean" gives W times this process's part, so that
            DistributedDataParallel's mean of the gradients is the union's. Every process calls, and
            calls backward, also without any page.
        exchange: how their rows travel: all at once ("gather"), in rounds of bounded memory
            ("ring"), or as `workspace` has room ("auto").
        table_ids: integers [n], the ids of `embeddings` wherever they occur, in place of the index
            as identity; needed with `group` and with `memory`, unless there are item_ids.
        memory: embeddings [Q, D] of earlier batches (`EmbeddingMemory`), candidates beside those of
            the batch in direction "reconstruct". No gradient.
        memory_ids, memory_log_q: [Q], as item_ids (or table_ids) and log_q, and needed where these
            are given.
        reduction: "mean" (weighted), "sum" (weighted) or "none" (one value per PV item, before
            weights).
        return_stats: also return a `ReconstructionStats`.
        validate: also check on a GPU what needs its values (offsets, indices, weights): a device
            synchronisation.
        impl: "auto", or "reference", "triton", "cpu", "xformers", which then never falls back.
        workspace: bytes the chunked path may hold (D > 256, or exact float32 products on a GPU).

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or in the layout of clicked with
        reduction "none".

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, what was
            expected and what came.
        RuntimeError: the requested impl cannot run here; the message lists every reason.
    """
    processes = Participants.of(group)
    with reporting(processes):
        check_choices(
            negatives=negatives,
            direction=direction,
            reduction=reduction,
            exchange=exchange,
            impl=impl,
        )
        if reconstructed is not None:
            check_reconstructed(
                history=history,
                history_mask=history_mask,
                history_offsets=history_offsets,
                query=query,
                key=key,
                value=value,
                attention=attention,
                attention_scale=attention_scale,
                attention_temperature=attention_temperature,
                num_heads=None if num_heads == 1 else num_heads,
            )
        elif reconstructed_mask is not None:
            raise ValueError(
                "reconstructed_mask: expected None without reconstructed, got "
                f"{describe(reconstructed_mask)}"
            )
        attention = attention_of(attention, direction)
        check_choices(attention=attention)
        if attention == "candidate" and direction != "reconstruct":
            raise ValueError(
                'direction: expected "reconstruct" with attention "candidate", '
                f'got {shown(direction)}: "identify" and "both" compare '
                'reconstructions made for their own items (attention "anchor" or "mean")'
            )
        check_workspace(workspace)
        require_flag("return_stats", return_stats)
        require_tensor("clicked", clicked)
        sides = [Given("pv", pv, pv_mask, pv_offsets)]
        if reconstructed is None:
            attends = Attention(attention, attention_scale, attention_temperature, num_heads)
            sides.append(Given("history", history, history_mask, history_offsets))
            inputs = CheckedInputs(sides, embeddings, validate, query=query, key=key, value=value)
            found = inputs.fields(attends, clicked)
        else:
            inputs = CheckedInputs(sides, embeddings, validate, reconstructed=reconstructed)
            found = inputs.fields_of_reconstructed(clicked, reconstructed_mask)
        p = Problem(
            **found,
            **inputs.temperature(temperature),
            weights=inputs.weights(weights),
            item_ids=inputs.ids("item_ids", item_ids),
            log_q=inputs.floats("log_q", log_q),
            negatives=negatives,
            direction=direction,
            reduction=reduction,
            workspace=workspace,
        )
        beside = Beside(processes, exchange, table_ids, memory, memory_ids, memory_log_q)
        loss, *per_row, skipped = evaluate(p, impl, beside, _graphs, bool(return_stats))
        loss = inputs.attached(loss)
    if reduction == "none":
        loss = inputs.items.restore(loss)
    if not return_stats:
        return loss
    item_loss, lse, positive, rank, is_anchor = (inputs.items.restore(x.detach()) for x in per_row)
    return loss, ReconstructionStats(
        item_loss,
        lse,
        positive,
        rank,
        is_anchor,
        per_row[-1].sum(),
        skipped,
        direction="identify" if direction == "identify" else "reconstruct",
    )


def reconstruct(
    pv: Tensor,
    history: Tensor,
    *,
    pv_mask: Tensor | None = None,
    history_mask: Tensor | None = None,
    pv_offsets: Tensor | None = None,
    history_offsets: Tensor | None = None,
    embeddings: Tensor | None = None,
    query: Tensor | None = None,
    key: Tensor | None = None,
    value: Tensor | None = None,
    attention_scale: float | None = None,
    attention_temperature: float | None = None,
    num_heads: int = 1,
    return_weights: bool = False,
    validate: bool = False,
    impl: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Reconstructions R_j = sum_k a_jk v_k, a_jk = softmax over the page's history of c q_j . k_k
    (arXiv 2306.05001).

    Arguments as for `reconstruction_loss`. Returns R in the layout of pv with D features (zeros for
    padding and for pages without history), in the input type. With `return_weights` also the
    attention weights, computed by the reference and without gradient, for pictures: padded
    [B, P, heads, H] over the positions of `history`; packed and nested [N, heads, longest history]
    over the rows of the page's history in order, zeros past its end.
    """
    check_choices(impl=impl)
    require_flag("return_weights", return_weights)
    attends = Attention("anchor", attention_scale, attention_temperature, num_heads)
    sides = (
        Given("pv", pv, pv_mask, pv_offsets),
        Given("history", history, history_mask, history_offsets),
    )
    inputs = CheckedInputs(sides, embeddings, validate, query=query, key=key, value=value)
    p = Problem(
        **inputs.fields(attends, None),
        item_ids=None,
        log_q=None,
        weights=None,
        temperature=None,
        tau=1.0,
    )
    r = evaluate_reconstruct(p, impl)
    r = inputs.items.restore(inputs.attached(r))
    if not return_weights:
        return r
    with torch.no_grad(), without_autocast(p.pv):
        return r, _by_position(reference.reconstruct(p)[1], inputs)


def _by_position(weights: Tensor, inputs: CheckedInputs) -> Tensor:
    """Attention weights [N, heads, longest history]; of padded pages, by position in `history`."""
    history = inputs.sides["history"]
    if history.kind != "padded":
        return weights
    count, length = history.shape
    heads = weights.shape[1]
    spread = weights.new_zeros(*inputs.items.shape, heads, length)
    if not weights.numel():
        return spread
    # The reference numbers real history rows in order: put them back where the mask has them.
    mask = history.mask
    if mask is None:
        mask = torch.ones(count * length, dtype=torch.bool, device=weights.device)
    mask = mask.view(count, length)
    order = (mask.cumsum(1) - 1).clamp(min=0)[:, None, None, :].expand(*spread.shape)
    by_page = weights.view(*inputs.items.shape, heads, -1)
    return by_page.gather(3, order) * mask[:, None, None, :]


def click_sequence_loss(
    history: Tensor,
    *,
    history_mask: Tensor | None = None,
    history_offsets: Tensor | None = None,
    embeddings: Tensor | None = None,
    item_ids: Tensor | None = None,
    temperature: float | Tensor = 0.1,
    group: Any = None,
    exchange: str = "auto",
    table_ids: Tensor | None = None,
    reduction: str = "mean",
    validate: bool = False,
    impl: str = "auto",
    workspace: int = WORKSPACE,
    _graphs: Graphs | None = None,
) -> Tensor:
    """Click-sequence loss, L_seq of COURIER (arXiv 2306.05001): items of one history attract each
    other.

        L_seq = mean over anchors k of
                -(1/|pos(k)|) sum_{p in pos(k)} [s_kp - logsumexp_{l in cand(k)} s_kl],
        s_kl = cos(C_k, C_l) / temperature

    Anchors are the history items whose page has another, different item; positives are those;
    candidates are all history items of the batch but the anchor itself and its id's re-occurrences
    on other pages.

    Args:
        history: [B, H, D] with `history_mask`, [K, D] with `history_offsets`, a torch.jagged
            NestedTensor, or with `embeddings` integer indices in one of these layouts.
        item_ids: integers in the layout of history without D; default with `embeddings`: the index.
        group, exchange, table_ids: as for `reconstruction_loss`; candidates are the history items
            of all processes.
        temperature, reduction, validate, impl, workspace: as for `reconstruction_loss`; "none"
            gives a value per history item, 0 where it is no anchor.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or one value per history item.
    """
    processes = Participants.of(group)
    with reporting(processes):
        check_choices(reduction=reduction, exchange=exchange, impl=impl)
        check_workspace(workspace)
        inputs = CheckedInputs(
            (Given("history", history, history_mask, history_offsets),), embeddings, validate
        )
        tau = inputs.temperature(temperature)
        rows, index = inputs.rows("history")
        p = SequenceProblem(
            history=rows,
            history_index=index,
            history_offsets=inputs.items.offsets,
            history_mask=inputs.items.mask,
            item_ids=inputs.ids("item_ids", item_ids),
            **tau,
            reduction=reduction,
            workspace=workspace,
        )
        (loss,) = evaluate(p, impl, Beside(processes, exchange, table_ids), _graphs)
        return inputs.items.restore(loss) if reduction == "none" else loss
