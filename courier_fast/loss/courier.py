"""COURIER as its authors define it: one attention, and three losses of what it reconstructs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..surroundings import for_products, has_values, without_autocast
from . import operators, reference
from .arguments import (
    Attention,
    CheckedInputs,
    check_choices,
    check_workspace,
    fields_of_given,
    finite,
)
from .click_head import ClickHead, ClickRows
from .fallback import kernels_of
from .functional import LEFT_OUT, choose, evaluate, evaluate_reconstruct
from .layouts import Given, describe, require_flag, require_size, require_tensor, shown
from .modules import LossModule
from .options import WORKSPACE
from .problem import Problem
from .union.candidates import Beside
from .union.exchange import Participants, reporting

_PARTS = ("reconstruction", "prediction", "sequence")


class CourierParts(NamedTuple):
    """The three losses before their weights, 0-d, 0 where the weight is 0, and the click logits;
    without a gradient. With `group`, "W times this process's part", as the loss itself."""

    reconstruction: Tensor
    prediction: Tensor
    sequence: Tensor
    # Layout of clicked, 0 where there is none (padding, pages without a history); None in a loss
    # without a click head.
    logits: Tensor | None


class CourierLoss(LossModule):
    """COURIER's three losses as its authors define them (arXiv 2306.05001, their published code).

    One multi-head attention with learned projections, A(x; C) = what `torch.nn.MultiheadAttention`
    gives for the query x and the keys and values C, reconstructs from the history C of a page every
    PV item j of it, and from the older clicks of a history its newest one, t:

        R_j = A(E_j; C)                        R_t = A(C_t; C without t)
        L_rec  = mean over clicked j of   -log softmax_i(cos(R_j, E_i) / temperature) at i = j
        L_pred = mean over j of           log(1 + exp(z_j)) - y_j z_j,   z_j = g([R_j, E_j])
        L_seq  = mean over histories of   -log softmax_u(cos(R_t, C_u) / sequence_temperature) at t
        L = weights[0] L_rec + weights[1] L_pred + weights[2] L_seq

    i goes over all PV items of the batch (or of `group`), u over the newest clicks of all its
    histories, j of L_pred over all PV items of pages with a history; a history of one click has
    nothing older, and its click is a candidate alone. y_j is 1 where j was clicked, and
    g = Linear(2 D, hidden), ReLU, batch norm, Linear(hidden, 1). Histories go from the oldest to
    the newest click.

    Its parameters are those of `attention`, a `torch.nn.MultiheadAttention` (whose weights load),
    and of `click_head`, which is None where the weight of L_pred is 0. They are used in the type of
    the embeddings.

    Args:
        dim: D of the embeddings.
        num_heads: of the attention; a divisor of dim.
        temperature, sequence_temperature: above 0; the second is as the first by default.
        weights: of the three losses, at least 0 and not all 0. One of weight 0 is not computed.
        hidden: width of the click head.
        group, exchange, validate, impl, workspace: as for `ReconstructionLoss`. With `group`, batch
            norm's statistics are those of all processes, too.

    Raises:
        TypeError, ValueError: an argument is not as described; the message names it, what was
            expected and what came.

        loss_fn = CourierLoss(256)
        loss = loss_fn(pv, history, clicked, pv_mask=..., history_mask=...)
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 4,
        temperature: float = 0.05,
        sequence_temperature: float | None = None,
        weights: Sequence[float] = (1, 1, 1),
        hidden: int = 1024,
        *,
        group: Any = LEFT_OUT,
        exchange: str = "auto",
        validate: bool = False,
        impl: str = "auto",
        workspace: int = WORKSPACE,
    ) -> None:
        require_size("dim", dim)
        require_size("hidden", hidden)
        self._heads = Attention("anchor", None, None, num_heads)
        self._heads.of(dim)
        options = {
            "validate": validate,
            "impl": impl,
            "workspace": workspace,
            "group": group,
            "exchange": exchange,
        }
        super().__init__((temperature, False, temperature), options, False)
        self._sequence_temperature = _sequence_temperature(sequence_temperature, self._fixed)
        self._weights = _checked_weights(weights)
        self._dim = dim
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.click_head = ClickHead(dim, hidden) if self._weights[1] else None

    def reset_parameters(self) -> None:
        """As they are made; for a module that was built on the device "meta"."""
        super().reset_parameters()
        if "attention" in self._modules:  # not yet while it is made
            self.attention.out_proj.reset_parameters()
            self.attention._reset_parameters()
            if self.click_head is not None:
                self.click_head.reset_parameters()

    def extra_repr(self) -> str:
        weights = ", ".join(f"{x:g}" for x in self._weights)
        more = f", sequence_temperature={self._sequence_temperature:g}, weights=({weights})"
        return super().extra_repr() + more

    def forward(
        self,
        pv: Tensor,
        history: Tensor,
        clicked: Tensor,
        *,
        item_ids: Tensor | None = None,
        history_ids: Tensor | None = None,
        table_ids: Tensor | None = None,
        return_parts: bool = False,
        **inputs: Any,
    ) -> Tensor | tuple[Tensor, CourierParts]:
        """The weighted sum of the three losses, 0-d float32 (float64 for float64 inputs).

        Args:
            pv, history, clicked: as for `reconstruction_loss`, in any of its layouts.
            item_ids: integers in the layout of clicked: an item with the anchor's id is never its
                negative.
            history_ids: the same of the history items, in the layout of history. Default of both
                with `embeddings`: the index (`table_ids`).
            table_ids: integers [n], the ids of `embeddings`; needed with `group`, unless there are
                item_ids and history_ids.
            return_parts: also return `CourierParts`.
            inputs: pv_mask, history_mask, pv_offsets, history_offsets, embeddings, and options of
                the module for this call, as for `reconstruction_loss`.
        """
        call = _Call(**self._arguments(inputs))
        processes = Participants.of(call.group)
        with reporting(processes):
            require_flag("return_parts", return_parts)
            require_tensor("clicked", clicked)
            ids = {"item_ids": item_ids, "history_ids": history_ids}
            batch = self._batch(pv, history, clicked, ids, call)
            beside = Beside(processes, call.exchange, table_ids)
            with without_autocast(batch.items.values):
                parts = self._parts(batch, beside, call)
            loss = sum(w * x for w, x in zip(self._weights, parts[:3], strict=True) if w)
            loss = loss + batch.attached(loss.dtype)
        if not return_parts:
            return loss
        logits = None if parts.logits is None else batch.inputs.items.restore(parts.logits)
        reconstruction, prediction, sequence = (x.detach() for x in parts[:3])
        return loss, CourierParts(reconstruction, prediction, sequence, logits)

    @torch.no_grad()
    def click_logits(self, pv: Tensor, history: Tensor, **inputs: Any) -> Tensor:
        """The click logits z_j in the layout of pv, float32 (float64 for float64 inputs), 0 where
        there is none; by the running statistics of batch norm, and without a gradient.

        `inputs`: as for `forward`. Raises ValueError for a loss without a click head.
        """
        if self.click_head is None:
            raise ValueError(
                "click_logits: expected a loss with a click head, got weight 0 of L_pred"
            )
        call = _Call(**self._arguments(inputs))
        batch = self._batch(pv, history, None, {}, call)
        with without_autocast(batch.items.values):
            rows, index = batch.click_rows(self._reconstructed(batch, call), None)
            return batch.inputs.items.restore(batch.spread(self.click_head.logits(rows), index))

    # ---- what they are made of ---------------------------------------------------------------

    def _batch(
        self, pv: Any, history: Any, clicked: Any, ids: dict[str, Any], call: _Call
    ) -> _Batch:
        check_choices(exchange=call.exchange, impl=call.impl)
        check_workspace(call.workspace)
        sides = [
            Given("pv", pv, call.pv_mask, call.pv_offsets),
            Given("history", history, call.history_mask, call.history_offsets),
        ]
        inputs = CheckedInputs(
            sides, call.embeddings, call.validate, query=None, key=None, value=None
        )
        self._check_rows("pv" if call.embeddings is None else "embeddings", inputs)
        p = Problem(
            **inputs.fields(self._heads, clicked),
            **inputs.temperature(self.temperature),
            item_ids=inputs.ids("item_ids", ids.get("item_ids")),
            log_q=None,
            weights=None,
            workspace=call.workspace,
        )
        return _Batch.of(inputs, p, inputs.ids("history_ids", ids.get("history_ids"), "history"))

    def _check_rows(self, name: str, inputs: CheckedInputs) -> None:
        if inputs.dim != self._dim:
            raise ValueError(
                f"{name}: expected {self._dim} features, the dim of the loss, got {inputs.dim}"
            )
        device = self.attention.in_proj_weight.device
        if inputs.device != device:
            raise ValueError(
                f"{name}: expected a tensor on {device}, as the parameters of the loss, got one on "
                f"{inputs.device}"
            )

    def _parts(self, batch: _Batch, beside: Beside, call: _Call) -> CourierParts:
        r = self._reconstructed(batch, call) if any(self._weights[:2]) else None
        contrasts: dict[str, Problem] = {}
        if self._weights[0]:
            contrasts["reconstruction"] = batch.contrast(r)
        if self._weights[2]:
            made = self._reconstructed_newest(batch, call)
            contrasts["sequence"] = batch.newest_contrast(made, self._sequence_temperature)
        for p in contrasts.values():  # what is wrong is to be found before anybody waits
            beside.union(p, choose(call.impl, p))
        processes = beside.processes
        if processes is not None and processes.size == 1:
            processes = None
        impl = choose(call.impl, batch.p)
        if processes is not None:
            processes.agree(self._facts(batch) | {"impl": kernels_of(impl)}, [])
        found = dict.fromkeys(_PARTS, batch.items.values.new_zeros((), dtype=batch.precise))
        logits = None
        # All processes in this order, as each part has its exchanges.
        if "reconstruction" in contrasts:
            found["reconstruction"] = evaluate(
                contrasts["reconstruction"], call.impl, beside, None
            )[0]
        if self.click_head is not None:
            rows, index = batch.click_rows(r, processes)
            # Neither torch.compile nor torch.func takes the slices apart.
            traced = torch.compiler.is_compiling() or operators.transformed()
            exact = impl == "reference" or traced
            found["prediction"], logits = self.click_head.loss(rows, exact)
            logits = batch.spread(logits, index)
        if "sequence" in contrasts:
            found["sequence"] = evaluate(contrasts["sequence"], call.impl, beside, None)[0]
        return CourierParts(**found, logits=logits)

    def _facts(self, batch: _Batch) -> dict[str, Any]:
        """What is the same on all processes, or it were not one loss."""
        given = {**dict(self.named_parameters()), "pv": batch.p.pv, "history": batch.p.history}
        wanted = [n for n, x in given.items() if x is not None and x.requires_grad]
        return {
            "loss": "CourierLoss",
            "dim": self._dim,
            "num_heads": self._heads.heads,
            "hidden": None if self.click_head is None else self.click_head[0].out_features,
            "weights": self._weights,
            "dtype": str(batch.items.values.dtype),
            "training": self.training,
            "gradients wanted": str(wanted if torch.is_grad_enabled() else []),
        }

    def _projection(self, which: int, x: Tensor, call: _Call) -> Tensor:
        """That of the attention's query, key or value (0, 1, 2), of rows in their type."""
        a = self.attention
        return _linear(x, a.in_proj_weight.chunk(3)[which], a.in_proj_bias.chunk(3)[which], call)

    def _attended(self, p: Problem, call: _Call) -> Tensor:
        out = self.attention.out_proj
        return _linear(evaluate_reconstruct(p, call.impl), out.weight, out.bias, call)

    def _reconstructed(self, batch: _Batch, call: _Call) -> Tensor:
        """R [N, D]; whatever where a page has no history."""
        query = batch.items.placed(self._projection(0, batch.items.values, call))
        return self._attended(batch.attention(query, *self._keys_and_values(batch, call)), call)

    def _keys_and_values(self, batch: _Batch, call: _Call) -> list[Tensor]:
        if not batch.keys_and_values:
            c = batch.clicks
            batch.keys_and_values = [c.placed(self._projection(i, c.values, call)) for i in (1, 2)]
        return batch.keys_and_values

    def _reconstructed_newest(self, batch: _Batch, call: _Call) -> Tensor:
        """R_t of each history's newest click [B, D]."""
        query = self._projection(0, batch.newest_clicks, call)
        p = batch.attention(query, *self._keys_and_values(batch, call))
        return self._attended(replace(p, **batch.newest_fields, history_mask=batch.is_older), call)


def _linear(x: Tensor, weight: Tensor, bias: Tensor, call: _Call) -> Tensor:
    """In the type of x, as the reference is; else in float32 in between where that is faster."""
    y = x if call.impl == "reference" else for_products(x)
    return functional.linear(y, weight.to(y.dtype), bias.to(y.dtype)).to(x.dtype)


def _sequence_temperature(given: Any, default: float) -> float:
    if given is None:
        return default
    if finite("sequence_temperature", given) <= 0:
        raise ValueError(f"sequence_temperature: expected a value above 0, got {shown(given)}")
    return float(given)


def _checked_weights(weights: Any) -> tuple[float, ...]:
    if not isinstance(weights, Sequence) or isinstance(weights, (str, bytes)):
        raise TypeError(f"weights: expected three numbers, got {describe(weights)}")
    if len(weights) != 3:
        raise ValueError(
            f"weights: expected three numbers, of {', '.join(_PARTS)}, got {len(weights)}"
        )
    found = tuple(finite("weights", x) for x in weights)
    if min(found) < 0 or not any(found):
        raise ValueError(f"weights: expected numbers of at least 0 and one above, got {found}")
    return found


@dataclass
class _Call:
    """What a call is given beside its rows and their ids, and the module's options."""

    group: Any
    exchange: str
    validate: bool
    impl: str
    workspace: int
    pv_mask: Tensor | None = None
    history_mask: Tensor | None = None
    pv_offsets: Tensor | None = None
    history_offsets: Tensor | None = None
    embeddings: Tensor | None = None


# ---- the batch -----------------------------------------------------------------------------------


@dataclass
class _Rows:
    """Those of one side: `values` themselves, or a table's by `index`. What padding holds, and what
    no row asks for, is 0: a product with a gradient of 0 must not make it NaN."""

    values: Tensor  # [rows, D], or the table [n, D]
    index: Tensor | None  # [rows]

    def placed(self, x: Tensor) -> Tensor:
        """Of something made of `values`, what belongs to each row."""
        return x if self.index is None else functional.embedding(self.index, x)


def _cleaned(x: Tensor, live: Tensor | None) -> Tensor:
    return x if live is None else torch.where(live[:, None], x, 0)


def _asked_for(table: Tensor, places: Sequence[tuple[Tensor, Tensor | None]]) -> Tensor:
    """Which rows of a table some row is, [n] bool; `places`: the index of each side, and which of
    its rows are real."""
    found = torch.zeros(len(table), dtype=torch.uint8, device=table.device)
    if len(table):
        for index, live in places:
            real = torch.ones_like(index, dtype=torch.uint8) if live is None else live.byte()
            found.scatter_reduce_(0, index, real, "amax")
    return found.bool()


def _last(page: Tensor, pages: int) -> Tensor:
    """The last row of each page [B], -1 for none; `page` [rows], -1 for rows that are not meant."""
    row = torch.arange(len(page), device=page.device)
    last = torch.full((pages + 1,), -1, dtype=torch.int64, device=page.device)
    return last.scatter_reduce_(0, torch.where(page < 0, pages, page), row, "amax")[:pages]


@dataclass
class _Batch:
    """A batch in the one form, and the page of one PV item that each history's newest click is."""

    inputs: CheckedInputs
    p: Problem
    history_ids: Tensor | None  # [K]
    items: _Rows
    clicks: _Rows
    has_history: Tensor  # [N] bool, of real PV rows
    newest: Tensor  # [B] row of each history's newest click; any where there is none
    has_newest: Tensor  # [B] bool
    has_older: Tensor  # [B] bool
    is_older: Tensor  # [K] bool: real rows but the newest
    keys_and_values: list[Tensor]  # of the clicks [K, D] each, once they are made

    @classmethod
    def of(cls, inputs: CheckedInputs, p: Problem, history_ids: Tensor | None) -> _Batch:
        sides = {name: inputs.sides[name].live() for name in ("pv", "history")}
        if p.history is None:
            assert p.pv_index is not None and p.history_index is not None
            places = [(p.pv_index, sides["pv"]), (p.history_index, sides["history"])]
            table = _cleaned(p.pv, _asked_for(p.pv, places))
            items, clicks = _Rows(table, p.pv_index), _Rows(table, p.history_index)
        else:
            items = _Rows(_cleaned(p.pv, sides["pv"]), None)
            clicks = _Rows(_cleaned(p.history, sides["history"]), None)
        pages = p.pv_offsets.shape[0] - 1
        page = reference.page_of_rows(p.pv_offsets, p.pv_mask, p.num_pv)
        click_page = reference.page_of_rows(p.history_offsets, p.history_mask, p.num_history)
        newest = _last(click_page, pages)
        row = torch.arange(len(click_page), device=click_page.device)
        is_newest = row == torch.cat([newest, newest.new_full((1,), -1)])[click_page]
        is_older = (click_page >= 0) & ~is_newest
        older = _last(torch.where(is_older, click_page, -1), pages)
        return cls(
            inputs,
            p,
            history_ids,
            items,
            clicks,
            has_history=torch.cat([newest >= 0, is_older.new_zeros(1)])[page],
            newest=newest.clamp(min=0)[: None if len(row) else 0],
            has_newest=newest >= 0,
            has_older=older >= 0,
            is_older=is_older,
            keys_and_values=[],
        )

    @property
    def precise(self) -> torch.dtype:
        return torch.promote_types(self.items.values.dtype, torch.float32)

    def attached(self, dtype: torch.dtype) -> Tensor:
        """0 that depends on both sides, whichever losses are computed."""
        return (self.items.values[:0].sum() + self.clicks.values[:0].sum()).to(dtype)

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Problem:
        """That of the PV rows; all are rows of projections."""
        p = replace(self.p, pv=query, history=key, value=value, pv_index=None, history_index=None)
        return replace(p, clicked=None, item_ids=None)

    def contrast(self, r: Tensor) -> Problem:
        """L_rec."""
        p = self.p
        given = fields_of_given(p.pv, p.pv_index, p.pv_offsets, r, self.has_history)
        return replace(p, **given)

    # ---- the newest clicks: pages of one PV item -----------------------------------------------

    @property
    def newest_clicks(self) -> Tensor:
        """[B, D]."""
        c = self.clicks
        if c.index is None:
            return c.values[self.newest]
        return functional.embedding(c.index[self.newest], c.values)

    @property
    def newest_fields(self) -> dict[str, Any]:
        """Which page each is, and which are there."""
        pages = torch.arange(len(self.has_newest) + 1, device=self.newest.device)
        return {
            "pv_offsets": pages.clamp(max=len(self.newest)),
            "pv_mask": self.has_newest[: len(self.newest)],
        }

    def newest_contrast(self, r: Tensor, temperature: float) -> Problem:
        """L_seq."""
        index = None if self.clicks.index is None else self.clicks.index[self.newest]
        rows = self.newest_clicks if index is None else self.p.pv
        fields = self.newest_fields
        older = self.has_older[: len(self.newest)]
        fields |= fields_of_given(rows, index, fields["pv_offsets"], r, older)
        return replace(
            self.p,
            **fields,
            clicked=torch.ones_like(fields["pv_mask"]),
            item_ids=None if self.history_ids is None else self.history_ids[self.newest],
            tau=temperature,
        )

    # ---- the click head's rows -----------------------------------------------------------------

    def click_rows(
        self, r: Tensor, processes: Participants | None
    ) -> tuple[ClickRows, Tensor | None]:
        """And the PV rows that they are; None: all, in order."""
        e, live = self.items.placed(self.items.values), self.has_history
        clicked = self.p.clicked
        if live.device.type != "cpu" or not has_values(live):
            return ClickRows(r, e, clicked, live, processes), None
        index = live.nonzero().squeeze(1)
        if len(index) == len(live):
            return ClickRows(r, e, clicked, None, processes), None
        clicked = None if clicked is None else clicked[index]
        return ClickRows(r[index], e[index], clicked, None, processes), index

    def spread(self, x: Tensor, index: Tensor | None) -> Tensor:
        """[n] of `click_rows` as [N], 0 where there is none."""
        if index is None:
            return torch.where(self.has_history, x, 0)
        return x.new_zeros(len(self.has_history)).index_copy(0, index, x)
