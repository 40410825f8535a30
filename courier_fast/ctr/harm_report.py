"""Gains by category, the policy that follows from those of validation, and what policies and gates
are worth; from the cells' files alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .cells import NONE, RANDOM, Plan, mean_predictions
from .harm import GATE, POLICY, Policy, base_form, category_gains, decide
from .impressions import Impressions
from .judge import judge

SHOWN = 12  # categories of a table or picture, those of the lowest gains
ABOUT = (
    "Gain: logloss without the embedding minus that with it, in thousandths, by the candidate's "
    "category, shrunken towards the mean of all categories (empirical Bayes, errors by users, 95 "
    '%); "off": what a policy decided on validation turns off. The categories of the lowest gains.'
)
COMPARED = (
    "What turning categories off (+policy: zeros in place of features) and a learned gate for each "
    "category (+gate) are worth: minus the same form with all categories on."
)


def judged_protocols(plan: Plan) -> list[str]:
    """Those that have gains by category, the deciding one first: not the warm ones, which have
    tables of their own, unless there are no others."""
    return [p.name for p in plan.protocols if not p.periods] or [plan.protocols[0].name]


def judged_forms(plan: Plan) -> list[str]:
    """Those that a policy is decided for."""
    return [f for f in plan.forms if f != NONE and base_form(f) == f]


def decided(plan: Plan, out: Path) -> Policy:
    """From the validation predictions of the first of `judged_protocols`, means over seeds and
    models."""
    shown = Impressions(plan.dataset, "validation", history=plan.history)
    protocol = judged_protocols(plan)[0]
    names = [name for name in plan.embeddings if name != RANDOM]

    def predicted(form: str, name: str) -> np.ndarray:
        of = [
            mean_predictions(plan, out, "validation", m, form, name, protocol) for m in plan.models
        ]
        return np.mean(of, 0)

    none, gains = predicted(NONE, NONE), {}
    for form, name in itertools.product(judged_forms(plan), names):
        gains[form, name], _ = category_gains(shown, none, predicted(form, name))
    tables = {name: plan.embeddings[name] for name in names}
    return decide(plan.dataset, tables, gains, protocol)


def harm_notes(policy: Policy, split: str) -> list[str]:
    """What a reader of the tables has to know of the policy."""
    where = f" of protocol {policy.protocol}" if policy.protocol else ""
    notes = [f"The policy was decided on validation{where}, for all models and protocols."]
    if split == "validation":
        notes.append(
            "These numbers are of validation, the very pages that the policy was decided on: it "
            "looks better here than it is. `--split test` judges it."
        )
    return notes


def harm(plan: Plan, out: Path, split: str, policy: Policy) -> list[dict[str, Any]]:
    """For each model, protocol, form and embedding: "categories", of `category_gains` on the split
    with "off"; "mean", what they are shrunken towards; "variants" {"+policy", "+gate": the
    differences of "auc" and "logloss" from the form with all on}, those that there are."""
    shown = Impressions(plan.dataset, split, history=plan.history)
    names = [name for name in plan.embeddings if name != RANDOM]
    found = []
    for protocol, model, form, name in itertools.product(
        judged_protocols(plan), plan.models, judged_forms(plan), names
    ):
        of = partial(mean_predictions, plan, out, split, model, protocol=protocol)
        all_on, off = of(form, name), set(policy.row(form, name)["off"])
        rows, mean = category_gains(shown, of(NONE, NONE), all_on)
        variants = {}
        for variant in (POLICY, GATE):
            if form + variant in plan.forms:
                p = {"all on": all_on, variant: of(form + variant, name)}
                judged = judge(shown.clicked, p, shown.user, base="all on", weight=shown.weight)
                variants[variant] = {
                    metric: judged[variant]["difference"][metric] for metric in ("auc", "logloss")
                }
        found.append(
            {
                "model": model,
                "protocol": protocol,
                "form": form,
                "embedding": name,
                "mean": mean,
                "categories": [row | {"off": row["category"] in off} for row in rows],
                "variants": variants,
            }
        )
    return found


def lowest(x: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The categories of one of `harm` that are shown, the lowest gain first."""
    return sorted(x["categories"], key=lambda row: row["shrunken"])[:SHOWN]


def harm_tables(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and lines of the tables for people."""
    tables = []
    compared = [
        [
            f"{x['model']}, {x['protocol']}",
            x["form"],
            x["embedding"],
            variant,
            _range(d["auc"], 1, 4),
            _range(d["logloss"], 1, 5),
        ]
        for x in found
        for variant, d in x["variants"].items()
    ]
    if compared:
        head = ["model", "form", "embedding", "", "AUC minus all on", "logloss minus all on"]
        tables.append((COMPARED, head, compared))
    for x in found:
        lines = [
            [
                row["category"],
                f"{row['impressions']:,}",
                f"{row['users']:,}",
                f"{1000 * row['gain']:+.2f}",
                _range(row | {"value": row["shrunken"]}, 1000, 2),
                "off" if row["off"] else "",
            ]
            for row in lowest(x)
        ]
        head = ["category", "impressions", "users", "gain", "shrunken", "policy"]
        about = ", ".join(x[key] for key in ("model", "protocol", "form", "embedding"))
        tables.append((about, head, lines))
    return tables


def _range(x: Mapping[str, float], times: float, digits: int) -> str:
    value, low, high = (f"{times * x[k]:+.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
