"""The losses users call: every layout and option, checked, on whichever implementation fits."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import composed, ops, reference
from .cuda_graph import Graphs
from .packing import (
    Side,
    as_bool,
    as_index,
    check_index,
    describe,
    require_tensor,
    side,
    watches_values,
)
from .peers import EXCHANGES, Peers, reporting
from .problem import ATTENTIONS, DIRECTIONS, NEGATIVES, REDUCTIONS, Problem, SequenceProblem
from .reach import reach_of

IMPLS = ("auto", "reference", *ops.IMPLEMENTATIONS)
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
WORKSPACE = 1 << 30


@dataclass
class ReconstructionStats:
    """What one loss evaluation tells about its anchors; nothing here needs another pass or carries a gradient.

    Tensors "in the layout of clicked" are 0 (False) where an item is no anchor. A loss with direction "both" has a softmax
    over items and one over reconstructions: its log_sum_exp and rank, and so recall and MRR, are those of the first, as
    `direction` says, while item_loss is the mean of the two. Candidates that tie with the positive (equal rows with
    different ids, or with "identify" the items of a page with a single history item) are not above it, but for rounding.
    """

    item_loss: Tensor  # layout of clicked, float32: loss of each anchor before weights
    log_sum_exp: Tensor  # layout of clicked, float32: over the candidates of each anchor
    positive_similarity: Tensor  # layout of clicked, float32: cos(R_i, E_i)
    rank: Tensor  # layout of clicked, int64: 1 + number of candidates that score above the positive
    is_anchor: Tensor  # layout of clicked, bool
    num_anchors: Tensor  # 0-d int64
    num_clicked_without_history: (
        Tensor  # 0-d int64: clicked items that are no anchors for want of a history
    )
    direction: str  # "reconstruct" or "identify": whose log_sum_exp and rank these are

    def recall_at(self, k: int) -> Tensor:
        """Share of anchors whose positive is among the k best candidates, 0-d float32; NaN without anchors."""
        hits = (self._anchors(self.is_anchor) & (self._anchors(self.rank) <= k)).sum()
        return hits / self.num_anchors

    def mrr(self) -> Tensor:
        """Mean reciprocal rank of the positive, 0-d float32; NaN without anchors."""
        is_anchor, rank = self._anchors(self.is_anchor), self._anchors(self.rank)
        return torch.where(is_anchor, 1.0 / rank.clamp(min=1), 0.0).sum() / self.num_anchors

    @staticmethod
    def _anchors(x: Tensor) -> Tensor:
        return x.values() if x.is_nested else x


# ---- checks -------------------------------------------------------------------------------------------------------


_CHOICES = {
    "attention": ATTENTIONS,
    "negatives": NEGATIVES,
    "direction": DIRECTIONS,
    "reduction": REDUCTIONS,
    "exchange": EXCHANGES,
    "impl": IMPLS,
}


def _check_choices(**values: Any) -> None:
    for name, value in values.items():
        if value not in _CHOICES[name]:
            raise ValueError(
                f"{name}: expected one of {', '.join(map(repr, _CHOICES[name]))}, got {value!r}"
            )


def _check_workspace(workspace: Any) -> None:
    if isinstance(workspace, bool) or not isinstance(workspace, int):
        raise TypeError(f"workspace: expected an int (bytes), got {describe(workspace)}")
    if workspace < 1:
        raise ValueError(f"workspace: expected at least 1 byte, got {workspace}")


def _check_temperature(
    temperature: Any, device: torch.device, validate: bool
) -> tuple[Tensor | None, float]:
    """(tensor, float): exactly one of them is used."""
    if isinstance(temperature, Tensor):
        if temperature.dim() != 0 or not temperature.is_floating_point():
            raise ValueError(
                f"temperature: expected a float or a 0-d floating tensor, got {describe(temperature)}"
            )
        if temperature.device != device:
            if temperature.device.type != "cpu":
                raise ValueError(
                    f"temperature: expected a tensor on {device}, got {temperature.device}"
                )
            # The host does not wait: what is read there was copied before the call returns.
            temperature = temperature.to(device, non_blocking=True)
        if (
            watches_values()
            and (validate or device.type == "cpu")
            and not float(temperature.detach()) > 0
        ):
            raise ValueError(
                f"temperature: expected a value above 0, got {float(temperature.detach())}"
            )
        return temperature, 0.0
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(
            f"temperature: expected a float or a 0-d tensor, got {describe(temperature)}"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a finite value above 0, got {temperature}")
    return None, float(temperature)


def _check_weights(weights: Tensor, layout: Side, validate: bool) -> None:
    if not (watches_values() and (validate or weights.device.type == "cpu")):
        return
    bad = ~(torch.isfinite(weights) & (weights >= 0))
    live = layout.live()
    if live is not None:
        bad = bad & live
    if bool(bad.any()):
        raise ValueError(
            f"weights: expected finite values of at least 0, got {float(weights[bad][0])}"
        )


def _autocast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Floating inputs in the autocast type, where autocast is on: the loss is a matrix product at heart."""
    device = next(t for t in tensors if t is not None).device.type
    try:  # torch.amp.is_autocast_available cannot be traced in PyTorch 2.11
        if not torch.is_autocast_enabled(device):
            return tensors
    except RuntimeError:  # a device without autocast
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(
        t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t
        for t in tensors
    )


def _float_rows(name: str, x: Any, like: Tensor | None) -> Tensor:
    x = require_tensor(name, x)
    if x.dtype not in _FLOATS:
        raise TypeError(f"{name}: expected a floating tensor (embeddings), got {x.dtype}")
    if like is not None and x.dtype != like.dtype:
        raise TypeError(
            f"{name}: expected {like.dtype}, the type of the other embeddings, got {x.dtype}"
        )
    if like is not None and x.device != like.device:
        raise ValueError(f"{name}: expected a tensor on {like.device}, got {x.device}")
    return x


def _on_device(name: str, x: Tensor, device: torch.device) -> Tensor:
    if x.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got {x.device}")
    return x


def _per_item(name: str, x: Any, layout: Side, device: torch.device) -> Tensor:
    return layout.flatten(name, _on_device(name, require_tensor(name, x), device), ())


def _optional_float(
    name: str, x: Any, layout: Side, device: torch.device, double: bool
) -> Tensor | None:
    if x is None:
        return None
    if not require_tensor(name, x).is_floating_point():
        raise TypeError(f"{name}: expected a floating tensor, got {x.dtype}")
    return (
        _per_item(name, x, layout, device).detach().to(torch.float64 if double else torch.float32)
    )


def _optional_ids(name: str, x: Any, layout: Side, device: torch.device) -> Tensor | None:
    if x is None:
        return None
    return as_index(name, _per_item(name, x, layout, device))


def _table(embeddings: Any) -> Tensor:
    table = _float_rows("embeddings", embeddings, None)
    if table.dim() != 2 or table.is_nested:
        raise ValueError(f"embeddings: expected shape [items, D], got {describe(table)}")
    return table


def _choose(impl: str, p: Problem | SequenceProblem) -> str:
    """The implementation to run; an explicit one never falls back."""
    source = p.pv if isinstance(p, Problem) else p.history
    if impl == "auto":
        candidate = {"cuda": "triton", "cpu": "cpu"}.get(source.device.type)
        # The interpreter is for tests: impl="triton" on CPU tensors has to be asked for.
        return (
            candidate
            if candidate is not None and not ops.unavailable_reasons(candidate, p)
            else "reference"
        )
    if impl != "reference":
        reasons = ops.unavailable_reasons(impl, p)
        if reasons:
            raise RuntimeError(f"impl={impl!r} cannot run this problem here: " + "; ".join(reasons))
    return impl


# ---- from arguments to a Problem ----------------------------------------------------------------------------------


def _finite(name: str, x: Any) -> float:
    if isinstance(x, bool) or not isinstance(x, (int, float)):
        raise TypeError(f"{name}: expected a float, got {describe(x)}")
    if not math.isfinite(x):
        raise ValueError(f"{name}: expected a finite value, got {x}")
    return float(x)


@dataclass(frozen=True)
class _Attention:
    """The attention's arguments, as the user gives them."""

    kind: str
    scale: float | None
    temperature: float | None
    heads: Any

    def __post_init__(self) -> None:
        given = [n for n in ("scale", "temperature") if getattr(self, n) is not None]
        for name in given:
            _finite(f"attention_{name}", getattr(self, name))
        if self.temperature is not None and self.temperature <= 0:
            raise ValueError(
                f"attention_temperature: expected a value above 0, got {self.temperature}"
            )
        most = 0 if self.kind == "mean" else 1
        if len(given) > most:
            what = "none with attention 'mean'" if most == 0 else "at most one of the two"
            raise ValueError(
                f"attention_scale and attention_temperature: expected {what}, got "
                + " and ".join(f"attention_{n} {getattr(self, n)}" for n in given)
            )

    def of(self, dim: int) -> dict[str, Any]:
        """Fields of the Problem; raises ValueError if the heads do not divide the dimension."""
        heads = self.heads
        if isinstance(heads, bool) or not isinstance(heads, int) or heads < 1 or dim % heads:
            raise ValueError(
                f"num_heads: expected a divisor of the embedding dimension {dim}, got {heads!r}"
            )
        scale = (dim // heads) ** -0.5 if self.scale is None else float(self.scale)
        if self.temperature is not None:
            scale = 1.0 / self.temperature
        return {
            "attention": "candidate" if self.kind == "candidate" else "anchor",
            "cosine": self.kind == "candidate" and self.temperature is not None,
            "attention_scale": 0.0 if self.kind == "mean" else scale,
            "num_heads": heads,
        }


def _unit_heads(x: Tensor, heads: int) -> Tensor:
    """Rows divided by their length, head by head."""
    return reference.normalize(x.view(len(x), heads, -1)).reshape(len(x), -1)


def _build(
    pv: Any,
    history: Any,
    clicked: Any | None,
    pv_mask: Any,
    history_mask: Any,
    pv_offsets: Any,
    history_offsets: Any,
    embeddings: Any,
    query: Any,
    key: Any,
    value: Any,
    attention: _Attention,
    validate: bool,
) -> tuple[dict[str, Any], Side, Side]:
    """What `reconstruction_loss` and `reconstruct` share: fields of the Problem, and the two layouts."""
    pv, history = require_tensor("pv", pv), require_tensor("history", history)
    table = None
    if embeddings is None:
        _float_rows("pv", pv, None)
        _float_rows("history", history, None)
    else:
        table = _table(embeddings)
        as_index("pv", pv)
        as_index("history", history)
    pv_in, history_in, query, key, value, table = _autocast(
        pv,
        history,
        *(
            None if x is None else require_tensor(n, x)
            for n, x in (("query", query), ("key", key), ("value", value))
        ),
        table,
    )
    assert pv_in is not None and history_in is not None
    source = table if table is not None else pv_in
    device = source.device
    features = 0 if table is not None else 1
    if table is None:
        _float_rows("history", history_in, pv_in)
    for name, x in (("pv", pv_in), ("history", history_in)):
        _on_device(name, x, device)
    if (pv_in.is_nested != history_in.is_nested) or (
        (pv_offsets is None) != (history_offsets is None)
    ):
        raise ValueError(
            "pv and history: expected the same layout (both padded, both packed with offsets, or both nested), "
            f"got pv {describe(pv_in)} with{'' if pv_offsets is not None else 'out'} pv_offsets and "
            f"history {describe(history_in)} with{'' if history_offsets is not None else 'out'} history_offsets"
        )
    pv_side = side("pv", pv_in, features, pv_mask, pv_offsets, device, validate)
    history_side = side(
        "history", history_in, features, history_mask, history_offsets, device, validate
    )
    pages, history_pages = pv_side.offsets.shape[0] - 1, history_side.offsets.shape[0] - 1
    if pages != history_pages:
        raise ValueError(f"history: expected {pages} pages, as in pv, got {history_pages}")
    dim = source.shape[-1] if not source.is_nested else source.values().shape[-1]
    if dim == 0:
        raise ValueError(
            f"{'embeddings' if table is not None else 'pv'}: expected an embedding dimension of at least 1, got 0"
        )
    options = attention.of(dim)

    def projection(name: str, x: Tensor | None, layout: Side) -> Tensor | None:
        return None if x is None else layout.flatten(name, _float_rows(name, x, source), (dim,))

    fields: dict[str, Any] = {
        "query": projection("query", query, pv_side),
        "key": projection("key", key, history_side),
        "value": projection("value", value, history_side),
        "pv_offsets": pv_side.offsets,
        "history_offsets": history_side.offsets,
        "pv_mask": pv_side.mask,
        "history_mask": history_side.mask,
        "clicked": None
        if clicked is None
        else as_bool("clicked", _per_item("clicked", clicked, pv_side, device), pv_side, validate),
    } | options
    if table is None:
        fields |= {
            "pv": pv_side.flatten("pv", pv_in, (dim,)),
            "history": history_side.flatten("history", history_in, (dim,)),
            "pv_index": None,
            "history_index": None,
        }
    else:
        fields |= {"pv": table.contiguous(), "history": None}
        for name, x, layout in (("pv", pv_in, pv_side), ("history", history_in, history_side)):
            index = as_index(name, layout.flatten(name, x, ()))
            fields[f"{name}_index"] = check_index(
                name, index, layout.live(), table.shape[0], validate
            )
    if attention.temperature is not None and not options["cosine"]:
        # Attention on unit vectors is that of projections: one query a row costs little.
        source = fields["pv"] if table is not None else fields["history"]
        for name, rows, index, layout in (
            ("query", fields["pv"], fields["pv_index"], pv_side),
            ("key", source, fields["history_index"], history_side),
        ):
            x = fields[name]
            if x is None:
                x = rows if index is None else rows[index]
            live = layout.live()
            if live is not None:  # whatever padding holds
                x = torch.where(live[:, None], x, 0)
            fields[name] = _unit_heads(x, options["num_heads"])
    return fields, pv_side, history_side


def _attention_of(attention: str | None, direction: str) -> str:
    """The default is what trained the best embeddings (docs/hm-fashion.md), where a direction has it."""
    if attention is not None:
        return attention
    return "candidate" if direction == "reconstruct" else "anchor"


def reconstruction_loss(
    pv: Tensor,
    history: Tensor,
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

        R_bj = sum_k softmax_k(c q_j . k_k) v_k over the history of page b,   s_ij = cos(R_bj, E_j) / temperature on i's page b
        L = sum_{i in A} w_i [logsumexp_{j in cand(i)} s_ij - s_ii] / sum_{i in A} w_i

    That is attention "candidate": each candidate asks the history itself. With "anchor" only the anchor does, and
    s_ij = cos(R_i, E_j) / temperature with R_i = R_bi, which knows the answer before it is compared with anything; with
    "mean" nobody does, a = 1 / |history|.

    Anchors A are the clicked items whose page has a history. B pages, N page-view (PV) items, K history items:

    Args:
        pv: embeddings E of the PV items: padded [B, P, D] (with `pv_mask` [B, P], True = real), packed [N, D] with
            `pv_offsets` [B + 1], or a torch.jagged NestedTensor [B, *, D]. With `embeddings`: integer indices instead.
        history: embeddings C of the history items, in the same kind of layout: [B, H, D] or [K, D].
        clicked: bool, or integers 0 and 1, one per PV item: [B, P] or [N].
        pv_mask, history_mask: which padded rows are real; None: all. What padding holds has no influence.
        pv_offsets, history_offsets: first row of each page and the end; rows past the end are padding.
        embeddings: a table [n, D] of unique items that `pv` and `history` index; it takes the gradient, and each item is
            one candidate however often it occurs.
        query, key, value: attention inputs in the layouts of pv, history, history; default pv, history, history.
        temperature: tau > 0, a float or a 0-d tensor that may require a gradient.
        attention: "candidate" (direction "reconstruct" only), "anchor" or "mean"; default "candidate", in the other
            directions "anchor".
        attention_scale: c; default 1 / sqrt(D / num_heads).
        attention_temperature: t > 0, in place of attention_scale: q and k are divided by their lengths, head by head (zero
            vectors stay zero), and c = 1/t.
        num_heads: attention heads; D is split among them.
        negatives: "batch" (all other PV items), "page" (those of the anchor's page) or "other_pages".
        direction: "reconstruct" (softmax over items), "identify" (over reconstructions) or "both" (their mean).
        item_ids: integers in the layout of clicked: an item with the anchor's id is never its negative. Default with
            `embeddings`: the index; otherwise no two items are the same.
        log_q: log sampling probability of each candidate, subtracted from its scores. Takes no gradient.
        weights: weight >= 0 of each clicked item as an anchor; 0 makes it none. Takes no gradient.
        group: a torch.distributed ProcessGroup: the candidates are those of all its processes, and the loss that of the union
            of their batches (docs/processes.md). "mean" gives W times this process's part, so that DistributedDataParallel's
            mean of the gradients is the union's. Every process calls, and calls backward, also without any page.
        exchange: how their rows travel: all at once ("gather"), in rounds of bounded memory ("ring"), or as `workspace` has
            room ("auto").
        table_ids: int64 [n], the ids of `embeddings` wherever they occur, in place of the index as identity; needed with
            `group` and with `memory`.
        memory: embeddings [Q, D] of earlier batches (`EmbeddingMemory`), candidates beside those of the batch in direction
            "reconstruct". No gradient.
        memory_ids, memory_log_q: [Q], as item_ids (or table_ids) and log_q, and needed where these are given.
        reduction: "mean" (weighted), "sum" (weighted) or "none" (one value per PV item, before weights).
        return_stats: also return a `ReconstructionStats`.
        validate: also check on a GPU what needs its values (offsets, indices, weights): a device synchronisation.
        impl: "auto", or "reference", "triton", "cpu", "xformers", which then never falls back.
        workspace: bytes the chunked path may hold (D > 256, or exact float32 products on a GPU).

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or in the layout of clicked with reduction "none".

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, what was expected and what came.
        RuntimeError: the requested impl cannot run here; the message lists every reason.
    """
    peers = Peers.of(group)
    with reporting(peers):
        attention = _attention_of(attention, direction)
        _check_choices(
            attention=attention,
            negatives=negatives,
            direction=direction,
            reduction=reduction,
            exchange=exchange,
            impl=impl,
        )
        if attention == "candidate" and direction != "reconstruct":
            raise ValueError(
                f'direction: expected "reconstruct" with attention "candidate", got {direction!r}: "identify" and "both" compare '
                'reconstructions made for their own items (attention "anchor" or "mean")'
            )
        _check_workspace(workspace)
        fields, pv_side, _ = _build(
            pv,
            history,
            require_tensor("clicked", clicked),
            pv_mask,
            history_mask,
            pv_offsets,
            history_offsets,
            embeddings,
            query,
            key,
            value,
            _Attention(attention, attention_scale, attention_temperature, num_heads),
            validate,
        )
        device = fields["pv"].device
        double = fields["pv"].dtype == torch.float64
        tau_tensor, tau = _check_temperature(temperature, device, validate)
        if tau_tensor is not None:
            tau_tensor = tau_tensor.to(torch.float64 if double else torch.float32)
        weight_rows = _optional_float("weights", weights, pv_side, device, double)
        if weight_rows is not None:
            _check_weights(weight_rows, pv_side, validate)
        p = Problem(
            **fields,
            item_ids=_optional_ids("item_ids", item_ids, pv_side, device),
            log_q=_optional_float("log_q", log_q, pv_side, device, double),
            weights=weight_rows,
            temperature=tau_tensor,
            tau=tau,
            negatives=negatives,
            direction=direction,
            reduction=reduction,
            workspace=workspace,
        )
        chosen = _choose(impl, p)
        p, reach = reach_of(
            p, chosen, peers, table_ids, exchange, (memory, memory_ids, memory_log_q)
        )
        if reach is not None and _graphs is not None:
            raise ValueError(
                "cuda_graph: expected False with group or memory, whose sizes the host has to know, got True"
            )
        if reach is not None:
            out = composed.reconstruction_loss(p, reach, return_stats)
            loss, rows, skipped = out.loss, out.rows, out.num_skipped
        elif _graphs is not None:
            loss, *per_row, skipped = _graphs(p, chosen, return_stats)
            rows = tuple(per_row)
        elif chosen == "reference":
            out = reference.reconstruction_loss(p)
            loss = out.loss
            rows = out.rows
            skipped = out.num_skipped
        else:
            loss, *per_row, skipped = ops.reconstruction_loss(p, chosen, return_stats)
            rows = tuple(per_row)
        if reduction == "none":
            loss = pv_side.restore(loss)
        if not return_stats:
            return loss
        num_anchors = rows[-1].sum()
        item_loss, lse, positive, rank, is_anchor = (pv_side.restore(x.detach()) for x in rows)
        return loss, ReconstructionStats(
            item_loss,
            lse,
            positive,
            rank,
            is_anchor,
            num_anchors,
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
    """Reconstructions R_j = sum_k a_jk v_k, a_jk = softmax over the page's history of c q_j . k_k (arXiv 2306.05001).

    Arguments as for `reconstruction_loss`. Returns R in the layout of pv with D features (zeros for padding and for pages
    without history), in the input type. With `return_weights` also the attention weights, computed by the reference and
    without gradient, for pictures: padded [B, P, heads, H] over the positions of `history`; packed and nested
    [N, heads, longest history] over the rows of the page's history in order, zeros past its end.
    """
    _check_choices(impl=impl)
    fields, pv_side, history_side = _build(
        pv,
        history,
        None,
        pv_mask,
        history_mask,
        pv_offsets,
        history_offsets,
        embeddings,
        query,
        key,
        value,
        _Attention("anchor", attention_scale, attention_temperature, num_heads),
        validate,
    )
    p = Problem(**fields, item_ids=None, log_q=None, weights=None, temperature=None, tau=1.0)
    chosen = _choose(impl, p)
    r = reference.reconstruct(p)[0] if chosen == "reference" else ops.reconstruct(p, chosen)
    r = pv_side.restore(r)
    if not return_weights:
        return r
    with torch.no_grad():
        weights = reference.reconstruct(p)[1]
    if history_side.kind != "padded":
        return r, weights
    pages, length = history_side.shape
    spread = weights.new_zeros(*pv_side.shape, num_heads, length)
    if weights.numel():
        # The reference numbers real history rows in order: put them back where the mask has them.
        mask = (
            history_side.mask
            if history_side.mask is not None
            else torch.ones(pages * length, dtype=torch.bool, device=r.device)
        )
        mask = mask.view(pages, length)
        order = (mask.cumsum(1) - 1).clamp(min=0)[:, None, None, :].expand(*spread.shape)
        by_page = weights.view(*pv_side.shape, num_heads, -1)
        spread = by_page.gather(3, order) * mask[:, None, None, :]
    return r, spread


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
    """Click-sequence loss, L_seq of COURIER (arXiv 2306.05001): items of one history attract each other.

        L_seq = mean over anchors k of -(1/|pos(k)|) sum_{p in pos(k)} [s_kp - logsumexp_{l in cand(k)} s_kl],
        s_kl = cos(C_k, C_l) / temperature

    Anchors are the history items whose page has another, different item; positives are those; candidates are all history
    items of the batch but the anchor itself and its id's re-occurrences on other pages.

    Args:
        history: [B, H, D] with `history_mask`, [K, D] with `history_offsets`, a torch.jagged NestedTensor, or with
            `embeddings` integer indices in one of these layouts.
        item_ids: integers in the layout of history without D; default with `embeddings`: the index.
        group, exchange, table_ids: as for `reconstruction_loss`; candidates are the history items of all processes.
        temperature, reduction, validate, impl, workspace: as for `reconstruction_loss`; "none" gives a value per history
            item, 0 where it is no anchor.

    Returns:
        The loss, float32 (float64 for float64 inputs): 0-d, or one value per history item.
    """
    peers = Peers.of(group)
    with reporting(peers):
        _check_choices(reduction=reduction, exchange=exchange, impl=impl)
        _check_workspace(workspace)
        history = require_tensor("history", history)
        table = None if embeddings is None else _table(embeddings)
        if table is None:
            _float_rows("history", history, None)
        else:
            as_index("history", history)
        history_in, table = _autocast(history, table)
        assert history_in is not None
        source = table if table is not None else history_in
        device = source.device
        _on_device("history", history_in, device)
        layout = side(
            "history",
            history_in,
            0 if table is not None else 1,
            history_mask,
            history_offsets,
            device,
            validate,
        )
        tau_tensor, tau = _check_temperature(temperature, device, validate)
        if tau_tensor is not None:
            tau_tensor = tau_tensor.to(
                torch.float64 if source.dtype == torch.float64 else torch.float32
            )
        index = None
        if table is None:
            dim = history_in.values().shape[-1] if history_in.is_nested else history_in.shape[-1]
            rows = layout.flatten("history", history_in, (dim,))
        else:
            rows = table.contiguous()
            index = as_index("history", layout.flatten("history", history_in, ()))
            index = check_index("history", index, layout.live(), table.shape[0], validate)
        if rows.shape[1] == 0:
            raise ValueError("history: expected an embedding dimension of at least 1, got 0")
        p = SequenceProblem(
            history=rows,
            history_index=index,
            history_offsets=layout.offsets,
            history_mask=layout.mask,
            item_ids=_optional_ids("item_ids", item_ids, layout, device),
            temperature=tau_tensor,
            tau=tau,
            reduction=reduction,
            workspace=workspace,
        )
        chosen = _choose(impl, p)
        p, reach = reach_of(p, chosen, peers, table_ids, exchange)
        if reach is not None and _graphs is not None:
            raise ValueError(
                "cuda_graph: expected False with group, whose sizes the host has to know, got True"
            )
        if reach is not None:
            loss = composed.click_sequence_loss(p, reach)
            return layout.restore(loss) if reduction == "none" else loss
        if _graphs is not None:
            return _graphs(p, chosen)[0]
        loss = (
            reference.click_sequence_loss(p)
            if chosen == "reference"
            else ops.click_sequence_loss(p, chosen)
        )
        return layout.restore(loss) if reduction == "none" else loss


# ---- modules ------------------------------------------------------------------------------------------------------


class _ClampMax(torch.autograd.Function):
    """min(x, limit), with the gradient of x where it is not clamped or where a descent step leads back below."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x.clamp(max=limit)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        (x,) = ctx.saved_tensors
        # An ordinary clamp has no gradient beyond the limit: a step past it could never be undone.
        return torch.where((x <= ctx.limit) | (grad > 0), grad, 0.0), None


class _TransformedClampMax(_ClampMax):
    """The same for torch.func. Not for every call: with setup_context, torch spends 10 us on the signature."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, limit: float) -> Tensor:  # type: ignore[override]
        return x.clamp(max=limit)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        x, ctx.limit = inputs
        ctx.save_for_backward(x)


class _WithTemperature(nn.Module):
    """A fixed temperature, or one learned as log(1/tau) and clamped from below; and the options of a call."""

    log_inverse_temperature: nn.Parameter | None

    def __init__(
        self,
        temperature: float,
        learnable: bool,
        minimum: float,
        options: dict[str, Any],
        cuda_graph: bool,
    ) -> None:
        super().__init__()
        if not isinstance(cuda_graph, bool):
            raise TypeError(f"cuda_graph: expected True or False, got {describe(cuda_graph)}")
        if cuda_graph and options["validate"]:
            raise ValueError(
                "cuda_graph and validate: expected at most one, as validation looks at values on the host, got both"
            )
        if cuda_graph and options["group"] is not None:
            raise ValueError(
                "cuda_graph: expected False with group, whose sizes the host has to know, got True"
            )
        self._graphs = Graphs() if cuda_graph else None
        if isinstance(temperature, Tensor):
            raise TypeError(f"temperature: expected a float, got {describe(temperature)}")
        _check_temperature(temperature, torch.device("cpu"), False)
        if (
            isinstance(minimum, bool)
            or not isinstance(minimum, (int, float))
            or not 0 < minimum < math.inf
        ):
            raise ValueError(f"min_temperature: expected a finite value above 0, got {minimum!r}")
        if learnable and temperature < minimum:
            raise ValueError(
                f"temperature: expected at least min_temperature {minimum}, got {temperature}"
            )
        _check_choices(**{name: options[name] for name in _CHOICES if name in options})
        _check_workspace(options["workspace"])
        self._fixed, self._minimum = float(temperature), float(minimum)
        self._options = options
        start = nn.Parameter(torch.tensor(-math.log(temperature))) if learnable else None
        self.register_parameter("log_inverse_temperature", start)

    @property
    def temperature(self) -> float | Tensor:
        """The current temperature: a float, or a 0-d float32 tensor if it is learned."""
        if self.log_inverse_temperature is None:
            return self._fixed
        clamp = _TransformedClampMax if ops.transformed() else _ClampMax
        clamped = clamp.apply(self.log_inverse_temperature.float(), -math.log(self._minimum))
        return torch.exp(-clamped)

    def extra_repr(self) -> str:
        if self.log_inverse_temperature is None:
            text = f"temperature={self._fixed:g}"
        else:
            now = float(torch.exp(-self.log_inverse_temperature.detach()))
            text = f"temperature={now:.4g}, learnable_temperature=True, min_temperature={self._minimum:g}"
        options = self._options | {"cuda_graph": self._graphs is not None}
        return text + "".join(
            f", {name}={value!r}" for name, value in options.items() if value is not None
        )


class ReconstructionLoss(_WithTemperature):
    """`reconstruction_loss` as a module: options at construction, tensors at the call.

    With `learnable_temperature` the parameter `log_inverse_temperature` holds log(1/tau) (0-d, float32), and
    tau >= `min_temperature`; at that limit only gradients that raise tau pass. Other options as for `reconstruction_loss`.

    With `cuda_graph`, forward and backward are captured as two CUDA graphs for each signature (shapes, types, which
    tensors are given, which take a gradient, options) and replayed afterwards: for small batches of fixed shape, whose
    launches cost the host more than the GPU. Up to 8 signatures are kept; other shapes are captured anew, so use the padded
    layout, or pad to a few sizes. A backward that comes after another call of the same signature computes its forward
    again. Under torch.compile, and inside somebody else's graph, the kernels are launched as usual. Raises RuntimeError
    where there is no CUDA device, and for implementations other than "triton".

        loss = ReconstructionLoss(temperature=0.1)(pv, history, clicked, pv_mask=..., history_mask=...)
    """

    def __init__(
        self,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        min_temperature: float = 0.01,
        *,
        attention: str | None = None,
        attention_scale: float | None = None,
        attention_temperature: float | None = None,
        num_heads: int = 1,
        negatives: str = "batch",
        direction: str = "reconstruct",
        group: Any = None,
        exchange: str = "auto",
        reduction: str = "mean",
        return_stats: bool = False,
        validate: bool = False,
        impl: str = "auto",
        workspace: int = WORKSPACE,
        cuda_graph: bool = False,
    ) -> None:
        options = {
            "group": group,
            "exchange": exchange,
            "attention": _attention_of(attention, direction),
            "attention_scale": attention_scale,
            "attention_temperature": attention_temperature,
            "num_heads": num_heads,
            "negatives": negatives,
            "direction": direction,
            "reduction": reduction,
            "return_stats": return_stats,
            "validate": validate,
            "impl": impl,
            "workspace": workspace,
        }
        super().__init__(temperature, learnable_temperature, min_temperature, options, cuda_graph)

    def forward(
        self, pv: Tensor, history: Tensor, clicked: Tensor, **inputs: Any
    ) -> Tensor | tuple[Tensor, ReconstructionStats]:
        """`inputs`: the tensor arguments of `reconstruction_loss` (masks, offsets, embeddings, query, ids, weights, ...)."""
        return reconstruction_loss(
            pv,
            history,
            clicked,
            temperature=self.temperature,
            _graphs=self._graphs,
            **(self._options | inputs),
        )


class ClickSequenceLoss(_WithTemperature):
    """`click_sequence_loss` as a module; temperature and `cuda_graph` as in `ReconstructionLoss`."""

    def __init__(
        self,
        temperature: float = 0.1,
        learnable_temperature: bool = False,
        min_temperature: float = 0.01,
        *,
        group: Any = None,
        exchange: str = "auto",
        reduction: str = "mean",
        validate: bool = False,
        impl: str = "auto",
        workspace: int = WORKSPACE,
        cuda_graph: bool = False,
    ) -> None:
        options = {
            "group": group,
            "exchange": exchange,
            "reduction": reduction,
            "validate": validate,
            "impl": impl,
            "workspace": workspace,
        }
        super().__init__(temperature, learnable_temperature, min_temperature, options, cuda_graph)

    def forward(self, history: Tensor, **inputs: Any) -> Tensor:
        """`inputs`: the tensor arguments of `click_sequence_loss` (mask, offsets, embeddings, item_ids)."""
        return click_sequence_loss(
            history, temperature=self.temperature, _graphs=self._graphs, **(self._options | inputs)
        )
