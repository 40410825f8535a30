"""`courier_fast.metrics.clicks` as the tables take it: dicts fit for JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy.typing as npt

from ..metrics.calibration import Calibration
from ..metrics.intervals import Estimate, compare

Array = npt.NDArray

# Names in the table of what `compare` calls otherwise.
NAMES = {
    "auc": "auc",
    "gauc": "gauc[impressions]",
    "logloss": "logloss",
    "ndcg@10": "ndcg@10",
    "mrr": "mrr",
}


def judge(
    clicked: Array,
    p: Mapping[str, Array],
    user: Array,
    base: str = "none",
    page: Array | None = None,
    weight: Array | None = None,
) -> dict[str, dict[str, Any]]:
    """By name of probabilities [n]: "auc", "gauc" and "logloss", with `page` also "ndcg@10" and
    "mrr", each {"value", "low", "high", "se"}; "normalised_entropy" and "calibration".

    For all names but `base` also "difference": the same metrics minus those of `base`, paired by
    user, with "p" after Holm's correction over the names; "mde": the least difference of AUC that
    is found with power 80 %; "relaimpr": (AUC - 0.5) / (AUC of base - 0.5) - 1.
    """
    result: dict[str, dict[str, Any]] = {}
    for name, found in compare(clicked, p, user=user, base=base, page=page, weight=weight).items():
        metrics = {n: found.metrics[m] for n, m in NAMES.items() if m in found.metrics}
        row: dict[str, Any] = {n: _interval(e) for n, e in metrics.items()}
        row["calibration"] = calibrated(found.calibration)
        row["normalised_entropy"] = found.normalised_entropy
        if name != base:
            row["difference"] = {n: _difference(e) for n, e in metrics.items()}
            row["relaimpr"] = found.rela_impr
            assert found.auc.minus_base is not None
            row["mde"] = found.auc.minus_base.detectable
        result[name] = row
    return result


def _interval(x: Estimate) -> dict[str, float]:
    return {"value": x.value, "low": x.low, "high": x.high, "se": x.se}


def _difference(x: Estimate) -> dict[str, float]:
    d = x.minus_base
    assert d is not None
    return {"value": d.value, "low": d.low, "high": d.high, "se": d.se, "p": d.holm}


def calibrated(x: Calibration) -> dict[str, Any]:
    """ "pcoc": predicted over observed clicks; "ece"; "bins"."""
    return {"pcoc": x.pcoc, "ece": x.ece, "bins": [asdict(b) for b in x.bins]}
