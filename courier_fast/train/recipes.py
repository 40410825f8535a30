"""Settings that belong together, by name: they hold where a config gives no other."""

from __future__ import annotations

from typing import Any, Literal

Recipe = Literal["candidate", "courier"]

# By full name. "courier": the authors' numbers (arXiv 2306.05001 and their published code).
RECIPES: dict[str, dict[str, Any]] = {
    "candidate": {},
    "courier": {
        "loss.attention": "multihead",
        "loss.heads": 4,
        "loss.unit": False,
        "loss.temperature": 0.05,
        "loss.history_negatives": False,
        "loss.reconstruction_weight": 1.0,
        "loss.prediction_weight": 1.0,
        "loss.sequence_weight": 1.0,
        "loss.sequence": "newest",
        "loss.sequence_temperature": 0.05,
        "data.history": 5,
        "optim.epochs": 1,
        "optim.lr": 1e-4,
        "optim.min_lr": 1.0,
        "optim.warmup": 0.0,
        "optim.weight_decay": 1e-6,
        "optim.betas": (0.9, 0.999),
        "optim.clip": 0.0,
    },
}


def by_recipe(values: Any) -> Any:
    """The tables of a config with the settings of its loss.recipe where it gives none; `values` are
    as they were given, also what is wrong."""
    if not isinstance(values, dict):
        return values
    # A section may be given as the model that it becomes.
    given = {
        name: dict(x) if isinstance(x, dict) else x.model_dump(exclude_unset=True)
        for name, x in values.items()
        if isinstance(x, dict) or hasattr(x, "model_dump")
    }
    recipe = dict(RECIPES.get(str(given.get("loss", {}).get("recipe")), {}))
    if given.get("optim", {}).keys() & {"epochs", "steps"}:
        recipe.pop("optim.epochs", None)
    if given.get("loss", {}).get("attention") == "mean":  # it has no heads
        recipe.pop("loss.heads", None)
    for full, value in recipe.items():
        section, _, name = full.partition(".")
        if section in given or section not in values:
            given.setdefault(section, {}).setdefault(name, value)
    return values | given if recipe else values
