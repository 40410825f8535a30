"""Measures of rankings and of click predictions, with intervals (docs/evaluation.md)."""

from .calibration import Bin, Calibration, Isotonic, Platt, calibration, fit_isotonic, fit_platt
from .clicks import GroupMean, auc, gauc, hit_rate, logloss, mrr, ndcg, normalised_entropy
from .intervals import Comparison, Difference, Estimate, compare, holm, relative_improvement
from .ranks import Ranks, bootstrap_means, count_ranks, interval, page_values

__all__ = [
    "Bin",
    "Calibration",
    "Comparison",
    "Difference",
    "Estimate",
    "GroupMean",
    "Isotonic",
    "Platt",
    "Ranks",
    "auc",
    "bootstrap_means",
    "calibration",
    "compare",
    "count_ranks",
    "fit_isotonic",
    "fit_platt",
    "gauc",
    "hit_rate",
    "holm",
    "interval",
    "logloss",
    "mrr",
    "ndcg",
    "normalised_entropy",
    "page_values",
    "relative_improvement",
]
