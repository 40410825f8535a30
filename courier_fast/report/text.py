"""Numbers and names as a reader sees them, and the result in a sentence."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

TITLES = {
    "page": "the other items of the page",
    "sampled": "items drawn uniformly",
    "popular": "items drawn by popularity",
}
MINUS, NONE, SPACE = "\N{MINUS SIGN}", "\N{EN DASH}", "\N{NO-BREAK SPACE}"


def number(value: float | None, digits: int = 3) -> str:
    """A number as text, with a typographic minus; a dash where there is none."""
    if value is None or not math.isfinite(value):
        return NONE
    return f"{value:.{digits}f}".replace("-", MINUS)


def percent(value: float | None) -> str:
    return (
        NONE if value is None or not math.isfinite(value) else number(100 * value, 1) + SPACE + "%"
    )


def name_of(method: str) -> str:
    """A method's name for readers: "Pixels 8 x 8, standardised"."""
    method = re.sub(r"(?<=\d)x(?=\d)", " \N{MULTIPLICATION SIGN} ", method)
    return method[:1].upper() + method[1:]


def headline(results: Mapping[str, Any], candidates: str, metric: str) -> str:
    """The result in a sentence: the main method, raw pixels and the backbone before training, each
    at its better of raw and standardised."""
    methods = results["sets"][candidates]["methods"]

    def value(method: str) -> float:
        return methods[method][metric]["mean"]

    main = results["settings"]["main"]
    best: dict[str, str] = {}
    for method in methods:
        kind = method.split()[0]
        if method != main and kind in ("pixels", "untrained", "pre-trained"):
            best[kind] = max(best.get(kind, method), method, key=value)
    texts = [
        f"{'raw pixels' if kind == 'pixels' else f'the {kind} network'} on {percent(value(method))}"
        for kind, method in best.items()
    ]
    rest = f", {' and '.join(texts)}" if texts else ""
    share = percent(value(main))
    return f"The trained embedding ranks the clicked item first on {share} of held-out pages{rest}."


def margins(results: Mapping[str, Any], candidates: str, metric: str) -> list[dict[str, str]]:
    """The main method's lead over each other one in percentage points, the smallest first."""
    rows = []
    for method, cells in results["sets"][candidates]["differences"].items():
        value, low, high = (100 * cells[metric][k] for k in ("mean", "low", "high"))
        text = (
            f"{'+' if value > 0 else ''}{number(value, 1)} ({number(low, 1)} to {number(high, 1)})"
        )
        rows.append((value, {"name": name_of(method), "text": text}))
    return [row for _, row in sorted(rows, key=lambda entry: entry[0])]
