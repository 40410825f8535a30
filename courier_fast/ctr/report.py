"""The tables: made from the cells' files alone, as JSON, Markdown and in the terminal."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import write_atomically
from ..markdown import markdown_table
from ..metrics.calibration import calibration, fit_platt
from ..metrics.clicks import auc
from .cells import NONE, RANDOM, Cell, Plan, read_predictions
from .features import SIMILARITY, similarity_features
from .harm_report import ABOUT as ABOUT_HARM
from .harm_report import COMPARED, harm_tables
from .impressions import Impressions, histories_said
from .judge import calibrated, judge
from .proxies import ABOUT as ABOUT_PROXIES
from .proxies import proxy_table
from .slices import Slice, slices
from .warm_report import ABOUT as ABOUT_WARM
from .warm_report import warm_gains, warm_tables

log = logging.getLogger(__name__)

Array = npt.NDArray

WEIGHTED = (
    "Some pages were cut: their impressions have weights, in training and in all numbers but "
    "counts, NDCG and MRR, which are of the rows that "
    "are there."
)
LEAK = 0.99  # an AUC above it: the model was told


def make_report(plan: Plan, out: Path, split: str = "test") -> dict[str, Any]:
    """What the cells in `out` say about a split, fit for JSON.

    Probabilities are averaged over the seeds, impression by impression; intervals (95 %) and
    differences to the form "none" are of these, by users.
    """
    shown = Impressions(plan.dataset, split, history=plan.history)
    first = next(iter(plan.embeddings.values()))[0]
    similar = similarity_features(first, shown)
    known = similar[:, SIMILARITY.index("count")] > 0
    parts = list(slices(shown, np.where(known, similar[:, SIMILARITY.index("max")], np.nan)))
    tables = [
        _judged_table(plan, out, shown, split, protocol.name, model, parts)
        for protocol, model in itertools.product(plan.protocols, plan.models)
    ]
    return {
        "dataset": str(plan.dataset.path),
        "split": split,
        "pages": plan.dataset.info.get("pages", "given or made"),
        "histories": histories_said(plan.dataset),
        "weighted": shown.weight is not None,
        "protocols": {p.name: p.describe(plan.dataset) for p in plan.protocols},
        "settings": asdict(plan.settings)
        | {"history": plan.history, "min_count": plan.least, "seeds": plan.seeds},
        "embeddings": {name: x[0].shape[1] for name, x in plan.embeddings.items()},
        "encoders": {name: len(x) for name, x in plan.embeddings.items()},
        "tables": tables,
        "warm": warm_gains(plan, out, split),
        "alarms": [
            f"{model} {row['form']} {row['embedding']} ({protocol}): AUC {row['auc']['value']:.4f} "
            f"is above {LEAK}: an input knows the answer"
            for table in tables
            for protocol, model in [(table["protocol"], table["model"])]
            for row in table["rows"]
            if row["auc"]["value"] > LEAK
        ],
    }


def _judged_table(
    plan: Plan,
    out: Path,
    shown: Impressions,
    split: str,
    protocol: str,
    model: str,
    parts: Sequence[Slice],
) -> dict[str, Any]:
    mine = [(form, name) for p, form, name in plan.groups() if p.name == protocol]
    seeds = {
        key: [
            read_predictions(out / "cells" / Cell(model, *key, protocol, seed).file, plan.ranges)
            for seed in range(plan.seeds)
        ]
        for key in mine
    }
    mean = {
        key: {r: np.mean([s[r] for s in of], 0) for r in plan.ranges} for key, of in seeds.items()
    }
    p = {_name(*key): of[split] for key, of in mean.items()}
    judged = judge(shown.clicked, p, shown.user, page=shown.page, weight=shown.weight)
    tuned = Impressions(plan.dataset, "validation", history=plan.history)
    made = plan.dataset.info.get("pages") == "made"
    rows = []
    for key in mine:
        here = mean[key]
        curve = fit_platt(tuned.clicked, here["validation"], weight=tuned.weight)
        mended = calibration(shown.clicked, curve(here[split]), weight=shown.weight)
        rows.append(
            {
                "form": key[0],
                "embedding": key[1],
                **judged[_name(*key)],
                "auc_of_seeds": [
                    auc(shown.clicked, s[split], weight=shown.weight) for s in seeds[key]
                ],
                "recalibrated": calibrated(mended),
            }
        )
    users, clicks = len(np.unique(shown.user)), int(shown.clicked.sum())
    return {
        "protocol": protocol,
        "model": model,
        "impressions": len(shown),
        "clicks": clicks,
        "users": users,
        "made_pages": made,
        "rows": rows,
        "against": _against(plan, shown, p),
        "slices": list(_slices(shown, p, parts)),
    }


def _against(plan: Plan, shown: Impressions, p: dict[str, Array]) -> list[dict[str, Any]]:
    """The first embedding minus each other one in the same form: what sets it apart, where "minus
    none" is what a form adds."""
    first, *others = plan.embeddings
    found = []
    for form in (f for f in plan.forms if f != NONE):
        for other in others:
            names = [_name(form, first), _name(form, other)]
            if not set(names) <= p.keys():
                continue  # the control has no policy and no gates
            judged = judge(
                shown.clicked,
                {n: p[n] for n in names},
                shown.user,
                base=names[1],
                weight=shown.weight,
            )
            found.append(
                {"form": form, "embedding": first, "other": other, **judged[names[0]]["difference"]}
            )
    return found


def _name(form: str, embedding: str) -> str:
    return form if form == NONE else f"{form} {embedding}"


def _slices(
    shown: Impressions, p: dict[str, Array], parts: Sequence[Slice]
) -> Iterator[dict[str, Any]]:
    """Each slice's numbers; those with one label or one user have no AUC."""
    user = shown.user
    for kind, name, mask in parts:
        clicks, users = int(shown.clicked[mask].sum()), len(np.unique(user[mask]))
        found: dict[str, Any] = {
            "kind": kind,
            "name": name,
            "impressions": int(mask.sum()),
            "clicks": clicks,
            "users": users,
            "rows": None,
        }
        if 0 < clicks < mask.sum() and users > 1:
            weight = None if shown.weight is None else shown.weight[mask]
            judged = judge(
                shown.clicked[mask], {n: x[mask] for n, x in p.items()}, user[mask], weight=weight
            )
            found["rows"] = {
                n: {
                    "auc": x["auc"],
                    **({"difference": x["difference"]["auc"]} if n != NONE else {}),
                }
                for n, x in judged.items()
            }
        yield found


# ---- as text -------------------------------------------------------------------------------------


def write_ctr_report(report: dict[str, Any], out: Path) -> None:
    """ctr.json and ctr.md."""
    text = json.dumps(report, indent=1, ensure_ascii=False)
    write_atomically(out / "ctr.json", lambda path: path.write_text(text + "\n"))
    write_atomically(out / "ctr.md", lambda path: path.write_text(markdown(report)))


HEAD = (
    "form",
    "embedding",
    "AUC",
    "AUC of one seed",
    "minus none",
    "Holm p",
    "RelaImpr",
    "GAUC",
    "minus none",
    "logloss",
    "minus none",
    "normalised entropy",
    "NDCG@10",
    "MRR",
    "ECE",
    "ECE, recalibrated",
    "clicks, predicted / observed",
)


def markdown(report: dict[str, Any]) -> str:
    """All tables and slices."""
    parts = [
        f"# What embeddings add to a CTR model: {Path(report['dataset']).name}, {report['split']}",
        *notes_of(report),
    ]
    for table in report["tables"]:
        parts.append(f"## {table['model']}, {table['protocol']}\n\n{about_table(table)}")
        parts.append(
            markdown_table(HEAD, [cells_of(row, table["made_pages"]) for row in table["rows"]])
        )
        if table["against"]:
            first, others = (
                table["against"][0]["embedding"],
                list(dict.fromkeys(a["other"] for a in table["against"])),
            )
            forms = list(dict.fromkeys(a["form"] for a in table["against"]))
            of = {(a["form"], a["other"]): _range(a["auc"], "+") for a in table["against"]}
            parts.append(
                f"### {table['model']}, {table['protocol']}: AUC of {first} minus others, "
                "form by form"
            )
            parts.append(
                markdown_table(
                    ["form", *others], [[f, *(of.get((f, o), "") for o in others)] for f in forms]
                )
            )
        for kind in dict.fromkeys(s["kind"] for s in table["slices"]):
            parts.append(f"### {table['model']}, {table['protocol']}: by {kind}")
            parts.append(
                markdown_table(
                    *slice_cells(kind, [s for s in table["slices"] if s["kind"] == kind])
                )
            )
    if report.get("warm", []):
        parts += ["## Warm start", ABOUT_WARM]
        for title, head, lines in warm_tables(report.get("warm", [])):
            parts += [f"### {title}", markdown_table(head, lines)]
    if report.get("harm"):
        parts += ["## Harm", ABOUT_HARM, *report.get("harm_notes", [])]
        for title, head, lines in harm_tables(report["harm"]):
            parts += [f"### {title}" if title != COMPARED else title, markdown_table(head, lines)]
    if report.get("proxies"):
        parts += ["## What foretells the gain", ABOUT_PROXIES]
        parts.append(markdown_table(*proxy_table(report["proxies"])))
    return "\n\n".join(parts) + "\n"


def notes_of(report: dict[str, Any]) -> list[str]:
    made = {
        "made": "Pages are made: the other items were drawn, not seen, so AUC measures the draw, "
        "too. Compare forms here, never kinds of pages.",
        "given": "Pages are given: what was shown is known.",
    }
    seeds = report["settings"]["seeds"]
    notes = [
        *(f"**{alarm}**" for alarm in report["alarms"]),
        made.get(
            report["pages"], "Whether pages are given or made is not recorded in this dataset."
        ),
        *([report["histories"]] if report.get("histories") else []),
        *([WEIGHTED] if report.get("weighted") else []),
        *(f"Pages, {line}." for line in report["protocols"].values()),
        f"Probabilities are means of {seeds} seeds; beside their AUC stands that of one seed, mean "
        "± deviation. Intervals: 95 %, by users, paired for differences; p by Holm over "
        "a table's rows. Slices are exploratory: their intervals are not corrected for their "
        "number; cosines in them are the first embedding's.",
    ]
    several = [name for name, n in report["encoders"].items() if n > 1]
    if several:
        notes.append(
            f"{', '.join(several)}: each seed of the model has an encoder of its own, so that ± is "
            "the deviation over both. Averaged, they are several "
            "encoders, where a row of one file is one: compare these by the AUC of one seed."
        )
    if RANDOM in report["embeddings"]:
        notes.append(f'"{RANDOM}" are random vectors: what they add is capacity, not sight.')
    return notes


def about_table(table: dict[str, Any]) -> str:
    shown = [r["mde"] for r in table["rows"] if r["form"] != NONE]
    text = (
        f"{table['impressions']:,} impressions with {table['clicks']:,} clicks of "
        f"{table['users']:,} users."
    )
    if shown:
        text += (
            f" A difference of AUC below {max(shown):.4f} is more likely missed than found here "
            "(power 80 %)."
        )
    return text


def _range(x: dict[str, float], sign: str = "", digits: int = 4) -> str:
    value, low, high = (f"{x[k]:{sign}.{digits}f}" for k in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def of_one_seed(row: dict[str, Any]) -> str:
    """Mean over the seeds' own AUC, and their deviation."""
    of = row["auc_of_seeds"]
    return f"{np.mean(of):.4f}" + (f" ± {np.std(of, ddof=1):.4f}" if len(of) > 1 else "")


def cells_of(row: dict[str, Any], made: bool) -> list[str]:
    d = row.get("difference")

    def metric(name: str, digits: int = 4) -> list[str]:
        return [f"{row[name]['value']:.{digits}f}", _range(d[name], "+", digits) if d else ""]

    own, difference = metric("auc")
    of_auc = [
        own,
        of_one_seed(row),
        difference,
        f"{d['auc']['p']:.3f}" if d else "",
        f"{100 * row['relaimpr']:+.1f} %" if d else "",
    ]
    numbers = [
        row["normalised_entropy"],
        row["ndcg@10"]["value"],
        row["mrr"]["value"],
        row["calibration"]["ece"],
        row["recalibrated"]["ece"],
    ]
    rate = "n/a" if made else f"{row['calibration']['pcoc']:.3f}"
    return [
        row["form"],
        row["embedding"] if d else "",
        *of_auc,
        *metric("gauc"),
        *metric("logloss", 5),
        *(f"{x:.4f}" for x in numbers),
        rate,
    ]


def slice_cells(kind: str, found: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and lines."""
    names = next((list(s["rows"]) for s in found if s["rows"]), [])
    rows = []
    for s in found:
        values = ["n/a"] * len(names)
        if s["rows"]:
            values = [
                _range(r["difference"], "+", 3) if "difference" in r else f"{r['auc']['value']:.3f}"
                for r in s["rows"].values()
            ]
        rows.append([s["name"], f"{s['impressions']:,}", f"{s['users']:,}", *values])
    head = [f"AUC, {n}" if n == NONE else f"{n} minus none" for n in names]
    return [kind, "impressions", "users", *head], rows


def print_ctr_report(report: dict[str, Any], console: Console | None = None) -> None:
    """The main tables; slices are in ctr.md."""
    if console is None:
        console = Console()
        if not console.is_terminal:
            console.width = 120
    for note in notes_of(report):
        style = "bold red" if note.startswith("**") else ""
        console.print(note.strip("*"), highlight=False, style=style)
    for table in report["tables"]:
        console.print(
            f"\n{table['model']}, {table['protocol']}: {about_table(table)}",
            style="bold",
            highlight=False,
        )
        console.print(_rich(table))
    for title, head, lines in warm_tables(report.get("warm", [])):
        console.print(_plain(f"warm start: {title}", head, lines))
    for title, head, lines in harm_tables(report.get("harm", [])):
        if title == COMPARED:
            console.print(_plain(title, head, lines))
    for note in report.get("harm_notes", []):
        console.print(note, highlight=False, markup=False)
    if report.get("proxies"):
        console.print(_plain("What foretells the gain", *proxy_table(report["proxies"])))
    console.print("All columns and slices are in ctr.md, all numbers in ctr.json.", highlight=False)


def _plain(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> Table:
    grid = Table(*head, box=box.SIMPLE_HEAD, title=title, title_justify="left")
    for line in lines:
        grid.add_row(*line)
    return grid


def _rich(table: dict[str, Any]) -> Table:
    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for name in (
        "form",
        "embedding",
        "AUC",
        "one seed",
        "minus none",
        "Holm p",
        "GAUC minus none",
        "logloss minus none",
        "ECE",
    ):
        grid.add_column(name)
    for row in table["rows"]:
        if row["form"] == NONE:
            grid.add_row(
                NONE,
                "",
                _value(row["auc"]),
                of_one_seed(row),
                "",
                "",
                "",
                "",
                f"{row['calibration']['ece']:.4f}",
            )
            continue
        d = row["difference"]
        grid.add_row(
            row["form"],
            Text(row["embedding"]),
            _value(row["auc"]),
            of_one_seed(row),
            _value(d["auc"], "+"),
            f"{d['auc']['p']:.3f}",
            _value(d["gauc"], "+"),
            _value(d["logloss"], "+", better=-1),
            f"{row['calibration']['ece']:.4f}",
        )
    return grid


def _value(x: dict[str, float], sign: str = "", better: int = 1) -> Text:
    low, high = sorted((better * x["low"], better * x["high"]))
    colour = "green" if low > 0 else "red" if high < 0 else ""
    return Text.assemble(
        (f"{x['value']:{sign}.4f}\n", colour if sign else "bold"),
        (f"{x['low']:.4f} {x['high']:.4f}", "dim"),
    )
