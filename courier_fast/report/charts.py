"""Charts as SVG or in percent of a width: their colours are those of the page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from .text import name_of, number, percent


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """Round numbers that cover [low, high]."""
    span = high - low or abs(high) or 1.0
    raw = span / count
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(s * size for s in (1, 2, 2.5, 5, 10) if s * size >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def curve(
    title: str, note: str, series: Mapping[str, Sequence[tuple[float, float]]]
) -> dict[str, Any] | None:
    """A small line chart as SVG in the page's colours; None where nothing is to be drawn."""
    series = {
        n: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for n, points in series.items()
    }
    series = {n: points for n, points in series.items() if points}
    if not series:
        return None
    width, height, left, bottom, top, right = 340, 190, 42, 24, 10, 12
    xs = [x for points in series.values() for x, _ in points]
    ys = [y for points in series.values() for _, y in points]
    rows = _ticks(min(ys), max(ys))
    x0, x1, y0, y1 = min(xs), max(max(xs), min(xs) + 1), rows[0], rows[-1]

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (x - x0) / (x1 - x0) * (width - left - right),
            top + (y1 - y) / (y1 - y0) * (height - top - bottom),
        )

    decimals = max(0, -math.floor(math.log10(rows[1] - rows[0]) + 1e-9))
    if round((rows[1] - rows[0]) * 10**decimals, 6) % 1:
        decimals += 1
    parts = []
    for y in rows:
        _, py = place(x0, y)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{py:.1f}" y2="{py:.1f}"/>'
        )
        at = f'x="{left - 8}" y="{py + 3.5:.1f}"'
        parts.append(f'<text {at} text-anchor="end">{number(y, decimals)}</text>')
    for x, anchor in ((x0, "start"), (x1, "end")):
        px, _ = place(x, y0)
        label = f"step {x:.0f}" if anchor == "end" else f"{x:.0f}"
        parts.append(f'<text x="{px:.1f}" y="{height - 6}" text-anchor="{anchor}">{label}</text>')
    for i, points in enumerate(series.values()):
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(x, y) for x, y in points))
        parts.append(f'<polyline class="s{i}" points="{path}"/>')
        px, py = place(*points[-1])
        parts.append(f'<circle class="s{i}" cx="{px:.1f}" cy="{py:.1f}" r="3"/>')
    last = "; ".join(
        f"{n} {number(p[0][1], 2)} to {number(p[-1][1], 2)}" for n, p in series.items()
    )
    return {
        "title": title,
        "note": note,
        "legend": list(series) if len(series) > 1 else [],
        "alt": f"{title} over the steps: {last}",
        "svg": Markup("".join(parts)),  # our own numbers alone
        "width": width,
        "height": height,
    }


def dots(
    rows: Sequence[tuple[str, float, float, float]],
    *,
    own: str = "",
    start: float = 0.0,
    text: Callable[[float], str] = percent,
) -> dict[str, Any]:
    """(name, value, low, high) as dots with their intervals on one axis from `start`, places in
    percent of its width."""
    ticks = _ticks(start, max([high for *_, high in rows], default=1.0))
    start, span = ticks[0], ticks[-1] - ticks[0]

    def at(value: float) -> float:
        return round(100 * (value - start) / span, 2)

    return {
        "rows": [
            {
                "name": name,
                "own": name == own,
                "text": text(value),
                "at": at(value),
                "from": at(low),
                "width": round(at(high) - at(low), 2),
            }
            for name, value, low, high in rows
        ],
        "ticks": [{"text": f"{100 * t:g}", "at": at(t)} for t in ticks],
    }


def forest(results: Mapping[str, Any], candidates: str, metric: str) -> dict[str, Any]:
    """Methods as dots, the best first."""
    rows = [
        (name_of(method), cells[metric]["mean"], cells[metric]["low"], cells[metric]["high"])
        for method, cells in results["sets"][candidates]["methods"].items()
        if math.isfinite(cells[metric]["mean"])
    ]
    rows.sort(key=lambda row: -row[1])
    return dots(rows, own=name_of(results["settings"]["main"]))
