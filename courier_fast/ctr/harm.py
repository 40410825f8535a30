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

import itertools
import json
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, ValidationError

from ..data.dataset import Dataset
from ..files import array_sha256, read_json, write_atomically
from .features import FORMS
from .impressions import Impressions, category_codes

Array = npt.NDArray

GATE, POLICY = "+gate", "+policy"  # behind a form: how its inputs are weighed by category
RULE = "zeros where the shrunken gain in logloss on validation is below 0"
VERSION = 1


def base_form(form: str) -> str:
    """The form itself."""
    return form.partition("+")[0]


def category_gains(shown: Impressions, none: Array, p: Array) -> tuple[list[dict[str, Any]], float]:
    """By category, the largest first: "category", "impressions", "users", "gain" (mean of the
    logloss of `none` [n] minus that of `p` [n]), "shrunken", "low" and "high" (95 %); and the mean
    that they are shrunken towards."""
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
    shrunken, deviation, centre = shrink(np.array(gain), np.array(error))
    for row, value, d in zip(rows, shrunken, deviation, strict=True):
        row |= {"shrunken": float(value), "low": float(value - 1.96 * d)}
        row["high"] = float(value + 1.96 * d)
    return rows, centre


def _logloss(clicked: Array, p: Array) -> Array:
    p = np.clip(p.astype(np.float64), 1e-7, 1 - 1e-7)
    return -np.log(np.where(clicked, p, 1 - p))


def shrink(gain: Array, variance: Array) -> tuple[Array, Array, float]:
    """Gains [C] with the variances of their errors [C], which may be infinite, shrunken towards
    their mean, the standard deviations of what they then may be off by, and that mean."""
    known = np.isfinite(variance)
    if not known.any():
        return np.full(len(gain), gain.mean()), np.full(len(gain), np.inf), float(gain.mean())
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
    return mean + b * (gain - mean), np.sqrt(own + (1 - b) ** 2 * of_mean), float(mean)


class _Shape(BaseModel):
    """Of a policy file: types as they stand there, and whatever more somebody has noted."""

    model_config = ConfigDict(strict=True, extra="ignore")


class _Category(_Shape):
    category: str


class _Row(_Shape):
    form: str
    embedding: str
    off: list[str]
    categories: list[_Category]


class _File(_Shape):
    version: Literal[1]  # VERSION
    dataset: str
    embeddings: dict[str, list[str]]
    rows: list[_Row]
    protocol: str = ""


# pydantic's names of what a value is not.
TYPES = {
    "model_type": "an object",
    "dict_type": "an object",
    "list_type": "a list",
    "string_type": "a text",
    "string_unicode": "a text",
    "literal_error": f"{VERSION}",
}


def _shape_error(found: Mapping[str, Any]) -> str | None:
    """What a policy file was expected to have, and what came; None where it has all."""
    try:
        _File.model_validate(found)
    except ValidationError as error:
        first = error.errors()[0]
    else:
        return None
    where = "".join(f"[{x}]" if isinstance(x, int) else f".{x}" for x in first["loc"])[1:]
    about = "a file of `courier-fast ctr`, policy.json, with"
    if first["type"] == "missing":
        return f"{about} {where}, got none"
    wanted = TYPES.get(first["type"], first["msg"])
    return f"{about} {wanted} as {where}, got {reprlib.repr(first['input'])}"


@dataclass(frozen=True)
class Policy:
    """Categories whose features are zeros, for each form and embedding; what a policy file has.

    Attributes:
        dataset: fingerprint of that on which it was decided.
        embeddings: {name: checksums of its tables}.
        rows: {"form", "embedding", "off": categories, "categories": of `category_gains`}.
        protocol: the one whose validation decided; "" where nobody wrote it down.
    """

    dataset: str
    embeddings: dict[str, list[str]]
    rows: list[dict[str, Any]]
    protocol: str = ""

    @classmethod
    def read(
        cls,
        path: Path,
        dataset: Dataset,
        tables: Mapping[str, Sequence[Array]],
        forms: Sequence[str] = (),
    ) -> Policy:
        """ValueError for a file that is none, or of another dataset or other embeddings, for
        categories that the dataset lacks, and where nothing was decided, or nothing is left, for
        one of the forms of these embeddings."""
        try:
            found = read_json(path)
        except ValueError as error:
            raise ValueError(f"policy: {error}") from None
        wrong = _shape_error(found)
        if wrong is None:
            parts = {name: found[name] for name in ("dataset", "embeddings", "rows")}
            policy = cls(**parts, protocol=found.get("protocol", ""))
            wrong = next(policy._contradictions(), None)
            wrong = wrong or next(policy._misfits(dataset, tables), None)
            wrong = wrong or next(policy._unusable(tables, forms), None)
        if wrong is not None:
            raise ValueError(f"policy: expected {wrong} in {path}")
        return policy

    def _contradictions(self) -> Iterator[str]:
        """In the file itself."""
        seen = set()
        for place, row in enumerate(self.rows):
            what = f"{row['form']} of {row['embedding']!r}"
            if row["form"] not in FORMS[1:]:
                yield f"one of {', '.join(FORMS[1:])} as rows[{place}].form, got {row['form']!r}"
            if (row["form"], row["embedding"]) in seen:
                yield f"one row for {what}, got two"
            seen.add((row["form"], row["embedding"]))
            if not self.embeddings.get(row["embedding"]):
                yield f"checksums of {row['embedding']!r} among its embeddings, got none"
            if not row["categories"]:
                yield f"the categories that {what} was judged in, got none"

    def _misfits(self, dataset: Dataset, tables: Mapping[str, Sequence[Array]]) -> Iterator[str]:
        """Between the file and what the run has."""
        if self.dataset != dataset.fingerprint:
            yield (
                f"one decided on {dataset.path}, got one of another dataset "
                f"(checksum {self.dataset[:19]!r}, here {dataset.fingerprint[:19]!r})"
            )
        for name, sums in _checksums(tables).items():
            if self.embeddings.get(name, sums) != sums:
                yield f"one decided for these embeddings, got one for another table {name!r}"
        known = set(category_codes(dataset)[1])
        for row in self.rows:
            if unknown := sorted(set(row["off"]) - known):
                yield f"categories of {dataset.path}, got {unknown[0]!r}"

    def _unusable(
        self, tables: Mapping[str, Sequence[Array]], forms: Sequence[str]
    ) -> Iterator[str]:
        """For a form of an embedding that the run has."""
        rows = {(row["form"], row["embedding"]): row for row in self.rows}
        for form, name in itertools.product(forms, tables):
            row = rows.get((form, name))
            if row is None:
                yield self._undecided(form, name)
                continue
            judged = {x["category"] for x in row["categories"]}
            if judged <= set(row["off"]):
                yield (
                    f"a category that {form} of {name!r} is left to, got all {len(judged)} turned "
                    "off (leave this form or embedding out)"
                )

    def _undecided(self, form: str, embedding: str) -> str:
        decided = ", ".join(f"{row['form']} of {row['embedding']!r}" for row in self.rows)
        return f"one for {form} of {embedding!r}, got one for {decided or 'nothing'}"

    def row(self, form: str, embedding: str) -> dict[str, Any]:
        """ValueError where nothing was decided."""
        for row in self.rows:
            if (row["form"], row["embedding"]) == (base_form(form), embedding):
                return row
        raise ValueError(f"policy: expected {self._undecided(base_form(form), embedding)}")

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
    protocol: str,
) -> Policy:
    """By form and embedding, from their gains on validation of that protocol."""
    rows = [
        {
            "form": form,
            "embedding": name,
            "off": [x["category"] for x in of if x["shrunken"] < 0],
            "categories": of,
        }
        for (form, name), of in gains.items()
    ]
    return Policy(dataset.fingerprint, _checksums(tables), rows, protocol)


def _checksums(tables: Mapping[str, Sequence[Array]]) -> dict[str, list[str]]:
    return {name: [array_sha256(x) for x in of] for name, of in tables.items()}
