"""Tables and plots of what was measured."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.candidates import OURS
from bench.cases import GOALS, MEASURES, OVER_OTHERS, VARIANT_GOALS

MIB = 2**20
TITLES = {
    "shapes": "Shapes",
    "dims": "Embedding dimensions",
    "rows": "Rows",
    "types": "float32",
    "candidate": "Attention for each candidate",
    "courier": "COURIER as its authors define it",
    "options": "Options, over the bare loss",
}
# What the goals were set for.
GOAL_DEVICES = ("H100", "H200")

Record = dict[str, Any]


def right(row: Record) -> bool:
    """Whether a row was measured, and is within the error budget."""
    return row["times"] is not None and not row["failures"]


def rows_of(results: Record, group: str) -> Iterator[tuple[Record, Record]]:
    for case in results["cases"]:
        if case["case"]["group"] == group:
            for row in case["results"]:
                yield case, row


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1e3:.4g}"


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / MIB:,.0f}"


def _errors(row: Record) -> str:
    if row["another"]:
        return "another loss"
    if row["errors"] is None:
        return ""
    share = max(e["error"] / e["budget"] if e["budget"] else 0.0 for e in row["errors"])
    if row["failures"]:
        return f"**over the budget**: {share:.3g}"
    return f"{share:.2f}"


def _case_table(case: Record, on_gpu: bool) -> list[str]:
    about = case["case"]
    what = "forward" if about["forward"] else "forward + backward"
    tf32 = ", tf32" if about["tf32"] else ""
    titles = (
        ("GPU ms (p20 to p80)" if on_gpu else "ms (p20 to p80)", True),
        ("wall ms", on_gpu),
        ("over eager", True),
        ("share of the floor", True),
        ("peak MiB", True),
        ("over gradients", on_gpu),
        ("errors / budget", True),
    )
    lines = [
        f"**{about['name']}**, {what}, {about['dtype']}{tf32}: N = {case['rows']:,}, M = "
        f"{case['anchors']:,}, "
        f"{case['columns']:,} columns, K = {case['history']:,}, D = {case['dim']}; "
        f"floor {_ms(case['floor_seconds'])} ms",
        "",
        "| | " + " | ".join(x for x, shown in titles if shown) + " |",
        "| --- " * (1 + sum(shown for _, shown in titles)) + "|",
    ]
    eager = next((r for r in case["results"] if r["name"] == "eager" and r["times"]), None)
    for row in case["results"]:
        if row["times"] is None:
            continue
        low, middle, high = row["times"]
        faster = share = ""
        if right(row):
            share = f"{case['floor_seconds'] / middle:.1%}"
            if eager is not None and not row["another"]:
                faster = f"{eager['times'][1] / middle:.2f}"
        name = f"**{row['name']}**" if row["name"] in OURS else row["name"]
        cells = (
            f"{_ms(middle)} ({_ms(low)} to {_ms(high)})",
            _ms(row["wall"][1]),
            faster,
            share,
            _mib(row["memory"]),
            _mib(row["beyond"]),
            _errors(row),
        )
        shown = [x for x, (_, wanted) in zip(cells, titles, strict=True) if wanted]
        lines.append(f"| {' | '.join([name, *shown])} |")
    lines += _over_others(case)
    left_out: dict[str, list[str]] = {}
    for row in case["results"]:
        if row["left_out"] is not None:
            left_out.setdefault(row["left_out"], []).append(row["name"])
    if left_out:
        lines += [
            "",
            "Left out: " + "; ".join(f"{', '.join(n)}: {why}" for why, n in left_out.items()),
        ]
    return [*lines, ""]


def _over_others(case: Record) -> list[str]:
    """Our time and memory as shares of others', where there is a limit to them; theirs also where
    they err too much."""
    found = {r["name"]: r for r in case["results"] if r["times"] is not None}
    lines = []
    for (name, other), limits in OVER_OTHERS.items():
        for ours in (n for n in found if n in OURS and right(found[n])):
            if name != case["case"]["name"] or other not in found:
                continue
            words = []
            pairs = [(r["times"][1], r["memory"]) for r in (found[ours], found[other])]
            for what, mine, others, most in zip(("time", "memory"), *pairs, limits, strict=True):
                if mine is not None and others:
                    verdict = "met" if mine / others <= most else "**not met**"
                    words.append(f"{mine / others:.2g} of its {what} (at most {most:g}: {verdict})")
            lines.append(f"- {ours} over {other}: {', '.join(words)}")
    return ["", *lines] if lines else []


def _variants(case: Record) -> list[str]:
    impl = case["case"]["names"][0]
    lines = [
        f'impl="{impl}", {case["case"]["dtype"]}, {case["case"]["shape"]["pages"]:,} pages of '
        f"{case['case']['shape']['items']} items, D = {case['case']['shape']['dim']}",
        "",
        "| | ms (p20 to p80) | over bare | at most | errors / budget |",
        "| --- | --- | --- | --- | --- |",
    ]
    bare = next((r for r in case["results"] if r["name"] == "bare" and right(r)), None)
    for row in case["results"]:
        if row["times"] is None:
            lines.append(f"| {row['name']} | left out: {row['left_out']} | | | |")
            continue
        low, middle, high = row["times"]
        ratio = f"{middle / bare['times'][1]:.2f}" if right(row) and bare is not None else ""
        goal = f"{VARIANT_GOALS[row['name']]:.2f}" if row["name"] in VARIANT_GOALS else ""
        lines.append(
            f"| {row['name']} | {_ms(middle)} "
            f"({_ms(low)} to {_ms(high)}) | {ratio} | {goal} | {_errors(row)} |"
        )
    return [*lines, ""]


def reached(results: Record, case: str, what: str) -> float | None:
    """What was measured of a goal, in its unit; None if it was not, or its result was wrong."""
    names, _unit, _more = MEASURES[what]
    for found in results["cases"]:
        if found["case"]["name"] != case or found["case"]["group"] == "options":
            continue
        for row in found["results"]:
            if row["name"] not in names or not right(row):
                continue
            if what == "GPU time":
                return row["times"][1] * 1e3
            if what.startswith("wall time"):
                return row["wall"][1] * 1e3
            if what == "share of the floor":
                return 100 * found["floor_seconds"] / row["times"][1]
            return None if row["beyond"] is None else row["beyond"] / MIB
    return None


def goals(results: Record) -> list[str]:
    """The targets beside what was measured."""
    lines = [
        "## Goals",
        "",
        "| | | measured | at most (share: at least) | then | |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for goal in GOALS:
        _names, unit, more = MEASURES[goal.what]
        value = reached(results, goal.case, goal.what)

        def met(limit: float | None, value: float | None = value, more: bool = more) -> bool:
            if value is None or limit is None:
                return False
            return value >= limit if more else value <= limit

        verdict = "not measured"
        if value is not None:
            verdict = "met" if met(goal.first) else "**not met**"
            verdict = "the second, too" if met(goal.then) else verdict
        measured = "" if value is None else f"{value:.4g} {unit}"
        then = "" if goal.then is None else f"{goal.then:g} {unit}"
        lines.append(
            f"| {goal.case} | {goal.what} | {measured} | {goal.first:g} "
            f"{unit} | {then} | {verdict} |"
        )
    return [*lines, ""]


def markdown(results: Record) -> str:
    """The report as text."""
    known = {k: v for k, v in results["surroundings"].items() if v is not None}
    gpu = known.get("gpu")
    lines = [
        f"# {gpu or known['cpu']}",
        "",
        f"`{results['command']}`",
        "",
        ", ".join(f"{k} {v}" for k, v in known.items()),
        "",
        "Medians of candidates measured in turns in one run"
        + (", GPU time between events around queued work" if gpu else "")
        + ". Share of the floor: of the time that the products alone take at the rate of a large "
        "one, measured in the same run. "
        "Errors are against float64; the budget is twice the error of eager code in the same type, "
        "or of a model of its rounding (courier_fast.testing.budget), plus one rounding. "
        "What is over it gets no ratio. Names: `python -m bench.loss --help`.",
        "",
    ]
    if gpu and any(x in gpu for x in GOAL_DEVICES):
        lines += goals(results)
    for group, title in TITLES.items():
        found = [c for c in results["cases"] if c["case"]["group"] == group]
        if not found:
            continue
        lines += [f"## {title}", ""]
        if group in ("rows", "dims"):
            lines += [f"![{title}]({group}.svg)", ""]
        for case in found:
            lines += _variants(case) if group == "options" else _case_table(case, bool(gpu))
    if any(c["case"]["group"] == "shapes" for c in results["cases"]):
        lines += ["## Roofline", "", "![Roofline](roofline.svg)", ""]
    return "\n".join(lines)


# ---- plots ---------------------------------------------------------------------------------------


def _lines(results: Record, group: str, x: str, value: Any) -> dict[str, list[tuple[float, float]]]:
    """Points by candidate, of right results."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for case, row in rows_of(results, group):
        y = value(case, row) if right(row) else None
        if y is not None:
            lines.setdefault(row["name"], []).append((case[x], y))
    return {name: sorted(points) for name, points in lines.items()}


def _draw(axis: Any, lines: dict[str, list[tuple[float, float]]]) -> None:
    for name, points in lines.items():
        bold = name in OURS
        axis.plot(
            *zip(*points, strict=True), marker="o", markersize=3, label=name, lw=2.5 if bold else 1
        )


def plots(results: Record, folder: Path) -> None:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "courier_fast"
    from matplotlib import pyplot

    def save(figure: Any, name: str) -> None:
        figure.tight_layout()
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        pyplot.close(figure)

    times = _lines(results, "rows", "rows", lambda case, row: row["times"][1] * 1e3)
    if times:
        figure, (left, middle) = pyplot.subplots(1, 2, figsize=(10, 4))
        _draw(left, times)
        memory = _lines(
            results, "rows", "rows", lambda case, row: row["memory"] and row["memory"] / MIB
        )
        _draw(middle, memory)
        for axis, label in ((left, "ms"), (middle, "peak MiB over the inputs")):
            axis.set(xscale="log", yscale="log", xlabel="N = M", ylabel=label)
        left.legend(fontsize=7)
        save(figure, "rows")
    shares = _lines(
        results, "dims", "dim", lambda case, row: 100 * case["floor_seconds"] / row["times"][1]
    )
    if shares:
        figure, axis = pyplot.subplots(figsize=(6, 4))
        _draw(axis, shares)
        axis.set(xlabel="D", ylabel="share of the floor, %", ylim=(0, None))
        axis.legend(fontsize=7)
        save(figure, "dims")
    if any(True for _ in rows_of(results, "shapes")):
        save(_roofline(results, pyplot), "roofline")


def _roofline(results: Record, pyplot: Any) -> Any:
    """TFLOP/s over flops per byte: the products' flops, the bytes of inputs and gradients."""
    figure, axis = pyplot.subplots(figsize=(7, 4.5))
    shapes = [c for c in results["cases"] if c["case"]["group"] == "shapes"]
    rates = {c["case"]["dtype"]: c["product"]["flops_per_second"] for c in shapes}
    memory = results["copy_bytes_per_second"]
    intensities = [c["flops"] / c["bytes"] for c in shapes]
    low, high = min(intensities) / 4, max(intensities) * 4
    for dtype, rate in rates.items():
        corner = rate / memory
        xs = sorted({min(low, corner / 4), corner, high})
        axis.plot(xs, [min(x * memory, rate) / 1e12 for x in xs], "k-", lw=1)
        axis.annotate(
            f"{dtype} product, {rate / 1e12:.3g} TFLOP/s",
            (high, rate / 1e12),
            ha="right",
            va="bottom",
            fontsize=7,
        )
    names = sorted({r["name"] for c in shapes for r in c["results"] if right(r)})
    for name in names:
        points = [
            (c["flops"] / c["bytes"], c["flops"] / r["times"][1] / 1e12, c["case"]["name"])
            for c in shapes
            for r in c["results"]
            if r["name"] == name and right(r)
        ]
        ours = name in OURS
        axis.plot(
            [p[0] for p in points],
            [p[1] for p in points],
            "o" if ours else "x",
            ms=7 if ours else 4,
            label=name,
        )
        if ours:
            for x, y, label in points:
                axis.annotate(label, (x, y), fontsize=6, xytext=(4, 4), textcoords="offset points")
    axis.set(xscale="log", yscale="log", xlabel="flops per byte", ylabel="TFLOP/s")
    axis.legend(fontsize=7)
    return figure


def write_report(results: Record, folder: Path) -> None:
    """README.md and the plots, beside results.json."""
    plots(results, folder)
    (folder / "README.md").write_text(markdown(results).rstrip() + "\n")
