"""What the stages found, in one page: a line a stage, the targets met or not, the options' costs,
what went wrong."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench import report
from bench.cases import VARIANT_GOALS
from bench.gpu.record import DONE, FAILED, PASSED, SKIPPED

Content = Mapping[str, Any]  # of a record


def state(content: Content) -> str:
    """In words."""
    if content["expected"] is None and not content["problem"]:
        return "not begun"
    counts = {s: sum(c["status"] == s for c in content["cases"].values()) for s in DONE}
    words = [f"{n} {s}" for s, n in counts.items() if n]
    left = (content["expected"] or 0) - sum(counts.values())
    if left > 0:
        words.append(f"**{left} left**")
    return ", ".join(words) or "nothing done"


def first_failure(content: Content) -> str | None:
    """What the stage itself ran into, or its first failed case."""
    if content["problem"]:
        return str(content["problem"])
    for key, case in content["cases"].items():
        if case["status"] == FAILED:
            return f"{key}: {case['line']}"
    return None


def results_of(records: Mapping[str, Content], command: str) -> dict[str, Any]:
    """What bench.report takes: the cases of the stage `bench`, the captured times from `graph`
    where they are newer."""
    bench = records["bench"]
    cases = {k: c.get("data") or {} for k, c in bench["cases"].items() if c["status"] in DONE}
    rate = cases.pop("copy", {}).get("copy_bytes_per_second")
    return {
        "command": command,
        "surroundings": bench.get("surroundings") or {"gpu": None, "cpu": "not measured"},
        "copy_bytes_per_second": rate,
        "cases": [data for data in cases.values() if "case" in data],
    }


def _median(results: Mapping[str, Any], case: str, name: str) -> tuple[float, float] | None:
    """Seconds and flops of a right row."""
    for found in results["cases"]:
        if found["case"]["name"] == case:
            for row in found["results"]:
                if row["name"] == name and report.right(row):
                    return row["times"][1], found["flops"]
    return None


def relative_goals(results: Mapping[str, Any]) -> list[tuple[str, float | None, float, bool]]:
    """(what, measured, limit, whether at most) of the targets that compare two measurements."""
    ours, eager = (_median(results, "big20 tf32", n) for n in ("triton", "eager"))
    half = None if ours is None or eager is None else ours[0] / eager[0]
    huge, big = (_median(results, n, "triton") for n in ("huge", "big100"))
    rate = None if huge is None or big is None else (huge[1] / huge[0]) / (big[1] / big[0])
    return [
        ("big20, tf32: of eager's time", half, 0.5, True),
        ("huge: rate over big100's", rate, 0.95, False),
    ]


def verdict(value: float | None, limit: float, at_most: bool) -> str:
    if value is None:
        return "not measured"
    return "met" if (value <= limit if at_most else value >= limit) else "**not met**"


def _relative(results: Mapping[str, Any], options: Content) -> list[str]:
    ratios = {k: (c.get("data") or {}).get("ratio") for k, c in options["cases"].items()}
    rows = relative_goals(results)
    rows += [(f"{n}: over the bare loss", ratios.get(n), x, True) for n, x in VARIANT_GOALS.items()]
    lines = ["## Targets that compare", "", "| | measured | | |", "| --- | --- | --- | --- |"]
    for what, value, limit, at_most in rows:
        shown = "" if value is None else f"{value:.3f}"
        bound = f"at {'most' if at_most else 'least'} {limit:g}"
        lines.append(f"| {what} | {shown} | {bound} | {verdict(value, limit, at_most)} |")
    return [*lines, ""]


def _stages(records: Mapping[str, Content]) -> list[str]:
    lines = ["| stage | | seconds | first failure |", "| --- | --- | --- | --- |"]
    for name, content in records.items():
        failure = (first_failure(content) or "").replace("|", "/")
        lines.append(f"| {name} | {state(content)} | {content['seconds']:.0f} | {failure} |")
    return [*lines, ""]


def _lines(name: str, content: Content) -> list[str]:
    """Every case; of long stages only what did not pass."""
    shown = []
    for key, case in content["cases"].items():
        status, line = case["status"], case.get("line", "")
        if name not in ("smoke",) or status not in (PASSED, SKIPPED):
            shown.append(f"- {key}: {'' if status == PASSED else status + ': '}{line}")
    return [f"## {name}", "", *shown, ""] if shown else []


def markdown(records: Mapping[str, Content], command: str, rehearsed: bool, source: str) -> str:
    """The page."""
    results = results_of(records, command)
    known = {k: v for k, v in results["surroundings"].items() if v is not None}
    lines = ["# The first hour on a GPU", "", f"`{command}`", ""]
    if rehearsed:
        lines += ["**A rehearsal on the CPU: no number here means anything.**", ""]
    lines += [", ".join(f"{k} {v}" for k, v in known.items()), "", *_stages(records)]
    other = [n for n, c in records.items() if c.get("source") not in (None, source)]
    if other:
        lines += [f"Measured with other sources than the present ones: {', '.join(other)}.", ""]
    if not rehearsed:
        lines += report.goals(results) + _relative(results, records["options"])
    for name, content in records.items():
        lines += _lines(name, content)
    return "\n".join(lines).rstrip() + "\n"


def broken(records: Mapping[str, Content]) -> list[str]:
    """Stages with a failure."""
    return [n for n, c in records.items() if first_failure(c) is not None]
