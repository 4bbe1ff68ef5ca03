"""What was done to a model, as plain data: it can be JSON, and is done again on the model that it was made for.

{"version": 1,
 "prune": {...},                 as `pykernels.prune.Recipe`; null: nothing was removed
 "distil": {"steps": 1000},      null: it was not
 "precision": "int8"}            as `pykernels.optimize` takes it: a name, or each step's
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pykernels.ops.dtypes import STORED

__all__ = ["PRECISIONS", "check_recipe", "recipe_of"]

Recipe = dict[str, Any]
VERSION = 1
PRECISIONS = ("fp32", *STORED, "int8")


def recipe_of(prune: Mapping[str, Any] | None, steps: int, precision: str | Mapping[str, str]) -> Recipe:
    """The recipe of so many steps of distillation of a model that is pruned so, in this precision."""
    return {
        "version": VERSION,
        "prune": None if prune is None else dict(prune),
        "distil": {"steps": steps} if steps else None,
        "precision": precision if isinstance(precision, str) else dict(precision),
    }


def check_recipe(recipe: Any) -> Recipe:
    """`recipe`, if it is one; what it says of pruning is checked when the model is pruned.

    Raises:
        ValueError: it is not; the message says where.
    """
    if not isinstance(recipe, Mapping) or recipe.get("version") != VERSION or "precision" not in recipe:
        raise ValueError(f"recipe: a dictionary of version {VERSION} is needed, as `Compressed.recipe` is")
    precision = recipe["precision"]
    if not isinstance(precision, Mapping) and precision not in PRECISIONS:
        raise ValueError(f"recipe: precision {precision!r} is none of {', '.join(PRECISIONS)}, nor each step's")
    prune, distil = recipe.get("prune"), recipe.get("distil")
    if prune is not None and not isinstance(prune, Mapping):
        raise ValueError("recipe: 'prune' must be a recipe of pykernels.prune, or nothing")
    steps: Any = 0
    if distil is not None:
        steps = distil.get("steps") if isinstance(distil, Mapping) else None
        if type(steps) is not int or steps < 1:
            raise ValueError("recipe: 'distil' must have steps, a whole number above 0")
    return recipe_of(prune, steps, precision)
