"""Which categories an embedding harms: its gain in each, shrunken towards the mean, and a policy
that fills its features with zeros where it does.

The gain x of an impression is the logloss without the embedding minus that with it: unlike AUC it
is defined in a category of any size, and gains of categories add up to the whole. A category's mean
g_c has a standard error e_c by users. Categories differ by a variance t^2 beyond that (DerSimonian
and Laird 1986), and what is known of one is, by empirical Bayes,

    b_c = t^2 / (t^2 + e_c^2),   shrunken_c = m + b_c (g_c - m),   m = the mean of all

so that a category of few impressions stands near the mean, whatever it seems to show.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.dataset import Dataset
from ..files import array_sha256, read_json, write_atomically
from .impressions import Impressions, category_codes

Array = npt.NDArray

GATE, POLICY = "+gate", "+policy"  # behind a form: how its inputs are weighed by category
RULE = "zeros where the shrunken gain in logloss on validation is below 0"
VERSION = 1


def base_form(form: str) -> str:
    """The form itself."""
    return form.partition("+")[0]


def category_gains(shown: Impressions, none: Array, p: Array) -> list[dict[str, Any]]:
    """By category, the largest first: "category", "impressions", "users", "gain" (mean of the
    logloss of `none` [n] minus that of `p` [n]), "shrunken", "low" and "high" (95 %)."""
    x = _logloss(shown.clicked, none) - _logloss(shown.clicked, p)
    weight = np.ones(len(x)) if shown.weight is None else shown.weight.astype(np.float64)
    codes, names = category_codes(shown.dataset)
    of, user = codes[shown.item], shown.user
    spread = np.average((x - np.average(x, weights=weight)) ** 2, weights=weight)
    rows, gain, error = [], [], []
    for code in np.argsort(-np.bincount(of, minlength=len(names)), kind="stable"):
        mask = of == code
        if not mask.any():
            continue
        w, y = weight[mask], x[mask]
        mean = float(np.average(y, weights=w))
        _, place = np.unique(user[mask], return_inverse=True)
        users = int(place.max()) + 1
        pulled = np.bincount(place, w * (y - mean)) / w.sum()
        by_users = users / (users - 1) * (pulled**2).sum() if users > 1 else np.inf
        # Two or three users may agree by chance.
        error.append(max(by_users, spread / len(y)))
        gain.append(mean)
        about = {"category": names[code], "impressions": len(y), "users": users, "gain": mean}
        rows.append(about)
    shrunken, deviation = shrink(np.array(gain), np.array(error))
    for row, value, d in zip(rows, shrunken, deviation, strict=True):
        row |= {"shrunken": float(value), "low": float(value - 1.96 * d)}
        row["high"] = float(value + 1.96 * d)
    return rows


def _logloss(clicked: Array, p: Array) -> Array:
    p = np.clip(p.astype(np.float64), 1e-7, 1 - 1e-7)
    return -np.log(np.where(clicked, p, 1 - p))


def shrink(gain: Array, variance: Array) -> tuple[Array, Array]:
    """Gains [C] with the variances of their errors [C], which may be infinite, shrunken towards
    their mean, and the standard deviations of what they then may be off by."""
    known = np.isfinite(variance)
    if not known.any():
        return np.full(len(gain), gain.mean()), np.full(len(gain), np.inf)
    w = np.where(known, 1 / np.maximum(variance, 1e-30), 0)
    mean = (w * gain).sum() / w.sum()
    excess = (w * (gain - mean) ** 2).sum() - (known.sum() - 1)
    room = w.sum() - (w**2).sum() / w.sum()
    between = max(0.0, excess / room) if room > 0 else 0.0
    w = np.where(known, 1 / (np.maximum(variance, 1e-30) + between), 0)
    mean, of_mean = (w * gain).sum() / w.sum(), 1 / w.sum()
    b = np.where(known, between / (between + np.where(known, variance, 1)), 0)
    own = np.where(known, b * np.where(known, variance, 0), between)
    if known.sum() > 3:  # t^2 is estimated, too (Morris 1983)
        own = own + 2 / (known.sum() - 3) * ((1 - b) * (gain - mean)) ** 2 * known
    return mean + b * (gain - mean), np.sqrt(own + (1 - b) ** 2 * of_mean)


@dataclass(frozen=True)
class Policy:
    """Categories whose features are zeros, for each form and embedding; what a policy file has.

    Attributes:
        dataset: fingerprint of that on which it was decided.
        embeddings: {name: checksums of its tables}.
        rows: {"form", "embedding", "off": categories, "categories": of `category_gains`}.
    """

    dataset: str
    embeddings: dict[str, list[str]]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path, dataset: Dataset, tables: Mapping[str, Sequence[Array]]) -> Policy:
        """ValueError for a file that is none, or of another dataset or other embeddings, for
        categories that the dataset lacks and for a policy that leaves nothing."""
        found = read_json(path)
        try:
            policy = cls(found["dataset"], found["embeddings"], found["rows"])
            off = {(row["form"], row["embedding"]): list(row["off"]) for row in policy.rows}
        except (KeyError, TypeError):
            raise ValueError(
                f"policy: expected a file of `courier-fast ctr`, policy.json, got {path}"
            ) from None
        if policy.dataset != dataset.fingerprint:
            raise ValueError(
                f"policy: expected one decided on {dataset.path}, got one of another dataset "
                f"(checksum {policy.dataset[:19]}, here {dataset.fingerprint[:19]}) in {path}"
            )
        for name, sums in _checksums(tables).items():
            if policy.embeddings.get(name, sums) != sums:
                raise ValueError(
                    f"policy: expected one decided for these embeddings, got one for another table "
                    f"{name!r} in {path}"
                )
        known = set(category_codes(dataset)[1])
        for (form, name), names in off.items():
            if unknown := sorted(set(names) - known):
                raise ValueError(
                    f"policy: expected categories of {dataset.path}, got {unknown[0]!r} in {path}"
                )
            if set(names) >= {x["category"] for x in policy.row(form, name)["categories"]}:
                raise ValueError(
                    f"policy: expected a category that {form} of {name!r} is left to, got all "
                    f"{len(names)} turned off in {path}: leave this embedding out"
                )
        return policy

    def row(self, form: str, embedding: str) -> dict[str, Any]:
        """ValueError where nothing was decided."""
        for row in self.rows:
            if (row["form"], row["embedding"]) == (base_form(form), embedding):
                return row
        decided = ", ".join(f"{row['form']} of {row['embedding']}" for row in self.rows)
        raise ValueError(
            f"policy: expected one for {base_form(form)} of {embedding!r}, got one for "
            f"{decided or 'nothing'}"
        )

    def off(self, form: str, embedding: str, dataset: Dataset) -> Array:
        """[items] bool: those of the categories that are off."""
        codes, names = category_codes(dataset)
        return np.isin(np.array(names), self.row(form, embedding)["off"])[codes]

    def write(self, path: Path) -> None:
        about = {"version": VERSION, "rule": RULE, **vars(self)}
        text = json.dumps(about, indent=1, ensure_ascii=False)
        write_atomically(path, lambda partial: partial.write_text(text + "\n"))


def decide(
    dataset: Dataset,
    tables: Mapping[str, Sequence[Array]],
    gains: Mapping[tuple[str, str], list[dict[str, Any]]],
) -> Policy:
    """By form and embedding, from their gains on validation."""
    rows = [
        {
            "form": form,
            "embedding": name,
            "off": [x["category"] for x in of if x["shrunken"] < 0],
            "categories": of,
        }
        for (form, name), of in gains.items()
    ]
    return Policy(dataset.fingerprint, _checksums(tables), rows)


def _checksums(tables: Mapping[str, Sequence[Array]]) -> dict[str, list[str]]:
    return {name: [array_sha256(x) for x in of] for name, of in tables.items()}
