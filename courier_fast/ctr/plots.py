"""Pictures of the tables: what each row adds, the first embedding by category, calibration, and
where the first embedding harms; from ctr.json's numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically
from .cells import NONE
from .harm_report import lowest

CALIBRATED = 4  # curves of a picture
CLICKS = 10  # that a category needs: the interval of fewer would set the scale


def write_plots(report: Mapping[str, Any], out: Path) -> list[Path]:
    """gains.png, categories.png and, where the pages were given, calibration.png; a panel for each
    table. harm.png, where gains by category are in the report."""
    from matplotlib.figure import Figure

    tables, paths = report["tables"], []
    draw = {"gains": _gains, "categories": _categories}
    if not any(table["made_pages"] for table in tables):
        draw["calibration"] = _calibration
    for name, panel in draw.items():
        figure = Figure(layout="constrained")
        lines = []
        for axis, table in zip(
            figure.subplots(1, len(tables), squeeze=False)[0], tables, strict=True
        ):
            axis.set_title(f"{table['model']}, {table['protocol']}")
            axis.grid(alpha=0.3)
            lines.append(panel(axis, table))
        if not any(lines):
            continue
        figure.set_size_inches(5.5 * len(tables), 1.2 + 0.26 * max(*lines, 6))
        paths.append(out / f"{name}.png")
        write_atomically(paths[-1], partial(figure.savefig, format="png", dpi=110))
    return paths + _write_harm(report, out)


def _intervals(axis: Any, names: Sequence[str], values: Sequence[Mapping[str, float]]) -> int:
    """A dot with its interval for each name, the first on top; how many."""
    place = np.arange(len(names))[::-1]
    _dots(axis, place, values, fmt="o")
    axis.axvline(0, color="grey", linewidth=1)
    axis.set_yticks(place, names, parse_math=False)  # a name may have two "$"
    axis.locator_params(axis="x", nbins=6)
    return len(names)


def _dots(axis: Any, place: Any, values: Sequence[Mapping[str, float]], **style: Any) -> None:
    middle = np.array([v["value"] for v in values])
    ends = np.abs(np.array([[v["low"], v["high"]] for v in values]).T - middle)
    axis.errorbar(middle, place, xerr=ends, capsize=3, **style)


def _gains(axis: Any, table: Mapping[str, Any]) -> int:
    rows = [row for row in table["rows"] if row["form"] != NONE]
    if not rows:
        return 0
    axis.set_xlabel("AUC minus none, 95 %")
    return _intervals(
        axis,
        [f"{r['form']}, {r['embedding']}" for r in rows],
        [r["difference"]["auc"] for r in rows],
    )


def _best(table: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The row of the first embedding's best form."""
    rows = [row for row in table["rows"] if row["form"] != NONE]
    own = [row for row in rows if row["embedding"] == rows[0]["embedding"]]
    return max(own, key=lambda row: row["auc"]["value"], default=None)


def _categories(axis: Any, table: Mapping[str, Any]) -> int:
    """The paper's Fig. 4: categories of at least `CLICKS` clicks by gain."""
    best = _best(table)
    if best is None:
        return 0
    name = f"{best['form']} {best['embedding']}"
    parts = [
        s
        for s in table["slices"]
        if s["kind"] == "category" and s["rows"] and s["clicks"] >= CLICKS
    ]
    parts.sort(key=lambda s: -s["rows"][name]["difference"]["value"])
    if not parts:
        return 0
    axis.set_xlabel(f"AUC, {best['form']} of {best['embedding']} minus none, 95 %")
    names = [f"{s['name']} ({s['impressions']:,})" for s in parts]
    return _intervals(axis, names, [s["rows"][name]["difference"] for s in parts])


def _calibration(axis: Any, table: Mapping[str, Any]) -> int:
    rows = [row for row in table["rows"] if row["form"] == NONE]
    rows += sorted(
        (r for r in table["rows"] if r["form"] != NONE), key=lambda r: -r["auc"]["value"]
    )
    most = 0.0
    for row in rows[:CALIBRATED]:
        bins = row["calibration"]["bins"]
        predicted, observed = ([b[n] for b in bins] for n in ("predicted", "observed"))
        name = NONE if row["form"] == NONE else f"{row['form']}, {row['embedding']}"
        axis.plot(predicted, observed, marker="o", label=name)
        most = max(most, *predicted, *observed)
    axis.plot([0, most], [0, most], color="grey", linewidth=1)
    axis.set_xlabel("predicted")
    axis.set_ylabel("observed clicks")
    axis.legend()
    return 14  # as many lines as its height


# ---- harm ----------------------------------------------------------------------------------------


def _write_harm(report: Mapping[str, Any], out: Path) -> list[Path]:
    """harm.png of the first embedding: a row of panels for each form, a column for each table;
    below a panel what policy and gates are worth there, on a scale of their own."""
    from matplotlib.figure import Figure

    found = report.get("harm", [])
    own = [x for x in found if x["embedding"] == found[0]["embedding"]]
    if not own:
        return []
    forms = list(dict.fromkeys(x["form"] for x in own))
    tables = list(dict.fromkeys((x["model"], x["protocol"]) for x in own))
    kinds = [(_harmed, max(len(lowest(x)) for x in own) + 4)]
    if any(x["variants"] for x in own):
        kinds.append((_variants, 5))
    heights = [height for _, height in kinds] * len(forms)
    figure = Figure(layout="constrained", figsize=(5.5 * len(tables), 0.26 * sum(heights)))
    axes = figure.subplots(
        len(heights), len(tables), squeeze=False, gridspec_kw={"height_ratios": heights}
    )
    for x in own:
        row, column = forms.index(x["form"]), tables.index((x["model"], x["protocol"]))
        for below, (panel, _) in enumerate(kinds):
            axis = axes[len(kinds) * row + below, column]
            axis.grid(alpha=0.3)
            panel(axis, x)
    if report["split"] == "validation":
        figure.suptitle("of validation, which the policy was decided on")
    legend = {
        text: handle
        for axis in axes.flat
        for handle, text in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    # Beside the panels: within one it would hide intervals.
    figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=len(legend))
    path = out / "harm.png"
    write_atomically(path, partial(figure.savefig, format="png", dpi=110))
    return [path]


def _harmed(axis: Any, x: Mapping[str, Any]) -> None:
    """Shrunken gains of the lowest categories, and what they are shrunken towards."""
    rows = lowest(x)
    values = [{k: 1000 * row[k] for k in ("shrunken", "low", "high")} for row in rows]
    values = [v | {"value": v["shrunken"]} for v in values]
    axis.set_title(
        f"{x['model']}, {x['protocol']}: {x['form']}, {x['embedding']}", parse_math=False
    )
    axis.set_xlabel("gain in logloss, thousandths, shrunken, 95 %")
    _intervals(axis, [f"{row['category']} ({row['impressions']:,})" for row in rows], values)
    axis.set_ylim(-0.6, len(rows) - 0.4)
    off = [i for i, row in enumerate(rows) if row["off"]]
    if off:
        place = len(rows) - 1 - np.array(off)
        _dots(axis, place, [values[i] for i in off], fmt="X", color="C3", label="off by the policy")
    axis.axvline(1000 * x["mean"], color="C2", linestyle="--", label="mean of all categories")


def _variants(axis: Any, x: Mapping[str, Any]) -> None:
    """Differences of logloss from the form with all categories on, as gains: more is better."""
    axis.set_xlabel("gain in logloss over all on, thousandths, 95 %")
    values = [
        {"value": -1000 * d["value"], "low": -1000 * d["high"], "high": -1000 * d["low"]}
        for d in (of["logloss"] for of in x["variants"].values())
    ]
    if values:
        axis.set_ylim(-0.6, _intervals(axis, list(x["variants"]), values) - 0.4)
