"""Pictures of the tables: what each row adds, the first embedding by category, and calibration;
from ctr.json's numbers alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically
from .cells import NONE

CALIBRATED = 4  # curves of a picture
CLICKS = 10  # that a category needs: the interval of fewer would set the scale


def write_plots(report: Mapping[str, Any], out: Path) -> list[Path]:
    """gains.png, categories.png and, where the pages were given, calibration.png; a panel for each
    table."""
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
    return paths


def _intervals(axis: Any, names: Sequence[str], values: Sequence[Mapping[str, float]]) -> int:
    """A dot with its interval for each name, the first on top; how many."""
    place = np.arange(len(names))[::-1]
    middle = np.array([v["value"] for v in values])
    ends = np.abs(np.array([[v["low"], v["high"]] for v in values]).T - middle)
    axis.errorbar(middle, place, xerr=ends, fmt="o", capsize=3)
    axis.axvline(0, color="grey", linewidth=1)
    axis.set_yticks(place, names)
    axis.locator_params(axis="x", nbins=6)
    return len(names)


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
