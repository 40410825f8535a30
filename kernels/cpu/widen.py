"""bfloat16 on a CPU without fast products of it: everything in float32, gradients rounded at the
end."""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from ...loss.problem import Gradients, Histories, Problem, SequenceProblem
from ...loss.union.blocks import Block
from ...surroundings import for_products

_P = TypeVar("_P", Problem, SequenceProblem)


def widened(p: _P) -> _P:
    """The same problem of float32 rows."""
    names = ("pv", "history", "query", "key", "value", "reconstructed")
    rows = {name: getattr(p, name, None) for name in names}
    return replace(p, **{name: x.float() for name, x in rows.items() if x is not None})


def narrowed(found: Gradients, p: Problem | SequenceProblem) -> Gradients:
    """In the types of `p`'s inputs."""
    given = {name: x for name, x in vars(found).items() if x is not None}
    return replace(found, **{name: x.to(getattr(p, name).dtype) for name, x in given.items()})


def widened_block(x: Block) -> Block:
    """Float32 rows where products of the others are slow, else as it is."""
    query = None if x.query is None else for_products(x.query)
    return replace(x, rows=for_products(x.rows), query=query)


def widened_histories(x: Histories) -> Histories:
    """As `widened_block`; keys and values that are one tensor stay one."""
    key = for_products(x.key)
    return replace(x, key=key, value=key if x.value is x.key else for_products(x.value))
