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

SHOWN = 12  # categories of a table in text, those of the lowest gains
ABOUT = (
    "Gain: logloss without the embedding minus that with it, in thousandths, by the candidate's "
    "category, shrunken towards the mean of all categories (empirical Bayes, errors by users, 95 "
    '%); "off": what a policy decided on validation turns off. The categories of the lowest gains.'
)
COMPARED = (
    "What turning categories off (+policy: zeros in place of features) and a learned gate for each "
    "category (+gate) are worth: minus the same form with all categories on."
)


def decided(plan: Plan, out: Path) -> Policy:
    """From the validation predictions of the first protocol, means over seeds; gains are means over
    the models."""
    shown = Impressions(plan.dataset, "validation", history=plan.history)
    forms = [f for f in plan.forms if f != NONE and base_form(f) == f]
    names = [name for name in plan.embeddings if name != RANDOM]
    gains = {}
    for form, name in itertools.product(forms, names):
        none, p = (
            np.mean([_predicted(plan, out, "validation", m, *x) for m in plan.models], 0)
            for x in ((NONE, NONE), (form, name))
        )
        gains[form, name] = category_gains(shown, none, p)
    return decide(plan.dataset, {name: plan.embeddings[name] for name in names}, gains)


def harm(plan: Plan, out: Path, split: str, policy: Policy) -> list[dict[str, Any]]:
    """For each model, form and embedding: "categories", of `category_gains` on the split with
    "off"; "variants" {"+policy", "+gate": the differences of "auc" and "logloss" from the form with
    all on}, those that there are."""
    shown = Impressions(plan.dataset, split, history=plan.history)
    forms = [f for f in plan.forms if f != NONE and base_form(f) == f]
    names = [name for name in plan.embeddings if name != RANDOM]
    found = []
    for model, form, name in itertools.product(plan.models, forms, names):
        of = partial(_predicted, plan, out, split, model)
        all_on, off = of(form, name), set(policy.row(form, name)["off"])
        rows = category_gains(shown, of(NONE, NONE), all_on)
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
                "form": form,
                "embedding": name,
                "categories": [row | {"off": row["category"] in off} for row in rows],
                "variants": variants,
            }
        )
    return found


def _predicted(plan: Plan, out: Path, split: str, model: str, form: str, name: str) -> np.ndarray:
    return mean_predictions(plan, out, split, model, form, name, plan.protocols[0].name)


def harm_tables(found: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and lines of the tables for people."""
    tables = []
    compared = [
        [
            *(x[key] for key in ("model", "form", "embedding")),
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
        lowest = sorted(x["categories"], key=lambda row: row["shrunken"])[:SHOWN]
        lines = [
            [
                row["category"],
                f"{row['impressions']:,}",
                f"{row['users']:,}",
                f"{1000 * row['gain']:+.2f}",
                _range(row | {"value": row["shrunken"]}, 1000, 2),
                "off" if row["off"] else "",
            ]
            for row in lowest
        ]
        head = ["category", "impressions", "users", "gain", "shrunken", "policy"]
        tables.append((f"{x['model']}, {x['form']}, {x['embedding']}", head, lines))
    return tables


def _range(x: Mapping[str, float], times: float, digits: int) -> str:
    value, low, high = (f"{times * x[k]:+.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"
