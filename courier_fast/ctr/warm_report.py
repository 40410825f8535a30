"""What an embedding adds to a model that has learned from older pages, period by period, beside
what models trained from scratch claim; from the cells' files alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..files import write_atomically
from .cells import NONE, Plan, mean_predictions
from .impressions import SCRATCH, Impressions, as_date
from .judge import judge

Array = npt.NDArray

STRETCHES = 8  # rows of a table: periods in a row, of about as many pages
ABOUT = (
    'AUC minus that of the model on ids alone ("none"), which goes on as they do; 95 % intervals, '
    'by users, paired. "warm": its inputs are added, at zero, to what the older pages made of ids; '
    '"from scratch": they are there from the first page on. Each period is predicted before it is '
    "trained on; a row is several periods."
)


def warm_gains(plan: Plan, out: Path, split: str) -> list[dict[str, Any]]:
    """For each model, form and embedding of a warm start: "periods", rows of "from", "impressions",
    "clicks", and of AUC "none", "warm", "scratch" and "warm_minus_scratch" ({"value", "low",
    "high"}, or None where a row has one label or one user); "all" of the whole split. Empty without
    that protocol."""
    protocol = next((p for p in plan.protocols if p.periods and p.name != SCRATCH), None)
    if protocol is None:
        return []
    shown = Impressions(plan.dataset, split, history=plan.history)
    stretches = _stretches(protocol.periods[split], len(shown.pages))
    found = []
    for model in plan.models:
        of = partial(mean_predictions, plan, out, split, model)
        none = of(NONE, NONE, protocol.name)
        for form, name in ((f, n) for x, f, n in plan.groups() if x is protocol and f != NONE):
            p = {
                NONE: none,
                "warm": of(form, name, protocol.name),
                "scratch": of(form, name, SCRATCH),
            }
            rows = [_row(plan, shown, p, pages) for pages in stretches]
            about = {"model": model, "form": form, "embedding": name}
            found.append(about | {"periods": rows, "all": _row(plan, shown, p, shown.pages)})
    return found


def _stretches(periods: Sequence[range], pages: int) -> list[range]:
    """Periods joined into at most so many."""
    bounds = np.array([x.start for x in periods] + [periods[-1].stop])
    wanted = bounds[0] + np.linspace(0, pages, STRETCHES + 1)
    cuts = bounds[np.unique(np.abs(bounds[:, None] - wanted).argmin(0))]
    return [range(int(a), int(b)) for a, b in itertools.pairwise(cuts)]


def _row(plan: Plan, shown: Impressions, p: Mapping[str, Array], pages: range) -> dict[str, Any]:
    offsets, first = shown.offsets, shown.pages.start
    part = slice(int(offsets[pages.start - first]), int(offsets[pages.stop - first]))
    clicked, user = shown.clicked[part], shown.user[part]
    d = plan.dataset
    since = as_date(d.page_time[pages.start]) if d.timed else f"page {pages.start:,}"
    row: dict[str, Any] = {
        "from": since.partition(" ")[0] if d.timed else since,
        "impressions": len(clicked),
        "clicks": int(clicked.sum()),
    }
    row |= dict.fromkeys((NONE, "warm", "scratch", "warm_minus_scratch"))
    if not 0 < row["clicks"] < len(clicked) or len(np.unique(user)) < 2:
        return row
    weight = None if shown.weight is None else shown.weight[part]
    mine = {name: x[part] for name, x in p.items()}
    judged = judge(clicked, mine, user, base=NONE, weight=weight)
    both = {name: mine[name] for name in ("scratch", "warm")}
    against = judge(clicked, both, user, base="scratch", weight=weight)
    row[NONE] = _interval(judged[NONE]["auc"])
    for name in both:
        row[name] = _interval(judged[name]["difference"]["auc"])
    row["warm_minus_scratch"] = _interval(against["warm"]["difference"]["auc"])
    return row


def _interval(x: Mapping[str, float]) -> dict[str, float]:
    return {name: x[name] for name in ("value", "low", "high")}


# ---- as text and picture -------------------------------------------------------------------------


def warm_tables(gains: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, header and lines of a table for each model, form and embedding."""
    head = ["from", "impressions", "none", "warm", "from scratch", "warm minus from scratch"]
    tables = []
    for x in gains:
        lines = [[row["from"], *_cells(row)] for row in x["periods"]]
        lines.append(["all", *_cells(x["all"])])
        tables.append((f"{x['model']}, {x['form']}, {x['embedding']}", head, lines))
    return tables


def _cells(row: Mapping[str, Any]) -> list[str]:
    none = "n/a" if row[NONE] is None else f"{row[NONE]['value']:.4f}"
    differences = ["n/a"] * 3
    if row["warm"] is not None:
        found = [row[name] for name in ("warm", "scratch", "warm_minus_scratch")]
        differences = [f"{x['value']:+.4f} ({x['low']:+.4f} to {x['high']:+.4f})" for x in found]
    return [f"{row['impressions']:,}", none, *differences]


def write_warm_plot(gains: Sequence[Mapping[str, Any]], out: Path) -> list[Path]:
    """warm.png: the gain by period, warm and from scratch; a panel for each model, form and
    embedding."""
    if not gains:
        return []
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained", figsize=(6, 2.6 * len(gains)))
    for axis, x in zip(figure.subplots(len(gains), 1, squeeze=False)[:, 0], gains, strict=True):
        rows = [row for row in x["periods"] if row["warm"] is not None]
        place = np.arange(len(rows))
        for shift, (name, label) in zip(
            (-0.08, 0.08), {"warm": "warm", "scratch": "from scratch"}.items(), strict=True
        ):
            middle = np.array([row[name]["value"] for row in rows])
            ends = np.array([[row[name]["low"], row[name]["high"]] for row in rows]).T
            errors = np.abs(ends - middle) if rows else None
            axis.errorbar(place + shift, middle, errors, marker="o", capsize=3, label=label)
        axis.axhline(0, color="grey", linewidth=1)
        axis.set_xticks(place, [row["from"] for row in rows], rotation=20)
        axis.set_title(f"{x['model']}, {x['form']}, {x['embedding']}: AUC minus none")
        axis.grid(alpha=0.3)
        axis.legend()
    path = out / "warm.png"
    write_atomically(path, partial(figure.savefig, format="png", dpi=110))
    return [path]
