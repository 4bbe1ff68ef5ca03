"""What was removed from a model, as plain data: it can be JSON, and is done again on the model that it was made for.

{"version": 1,
 "layers": {"layer1.0.conv1": {"out": {"of": 64, "kept": [0, 2, 5]}}, "layer1.0.conv2": {"in": {...}}},
 "blocks": ["layer3.4"]}
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .coupling import Group, is_depthwise, width

__all__ = ["Recipe", "check_recipe", "recipe_of"]

Recipe = dict[str, Any]
VERSION = 1


def recipe_of(
    model: nn.Module, groups: Iterable[Group], kept: Mapping[str, Sequence[int]], blocks: Iterable[str] = ()
) -> Recipe:
    """The recipe that keeps of each group, by its name, the units of these numbers, and of `blocks` their inputs alone.

    Layers inside of a dropped block are left out, and so are layers that lose nothing.
    """
    dropped = tuple(blocks)
    removed: dict[tuple[str, str], set[int]] = defaultdict(set)
    for group in groups:
        stays = set(kept.get(group.name, range(len(group.units))))
        for number, unit in enumerate(group.units):
            if number not in stays:
                for slot in unit:
                    removed[slot.layer, slot.axis].add(slot.channel)
    layers: dict[str, Any] = {}
    for (layer, axis), gone in sorted(removed.items()):
        if not any(layer.startswith(f"{block}.") for block in dropped):
            of = width(model.get_submodule(layer), axis)
            layers.setdefault(layer, {})[axis] = {"of": of, "kept": [i for i in range(of) if i not in gone]}
    return {"version": VERSION, "layers": layers, "blocks": list(dropped)}


def check_recipe(model: nn.Module, recipe: Any) -> Recipe:
    """`recipe`, if it is one for this model.

    Raises:
        ValueError: it is not; the message says where.
    """
    if not isinstance(recipe, Mapping) or recipe.get("version") != VERSION:
        raise ValueError(f"recipe: a dictionary of version {VERSION} is needed, as `Pruned.recipe` is")
    layers, blocks = recipe.get("layers"), recipe.get("blocks")
    if not isinstance(layers, Mapping) or not isinstance(blocks, list):
        raise ValueError("recipe: it must have layers, a dictionary, and blocks, a list")
    modules = dict(model.named_modules())
    for block in blocks:
        if not isinstance(block, str) or block not in modules or not block:
            raise ValueError(f"recipe: the model has no block {block!r}")
    for name, axes in layers.items():
        if name not in modules:
            raise ValueError(f"recipe: the model has no layer {name!r}")
        if not isinstance(axes, Mapping) or not axes or not set(axes) <= {"in", "out"}:
            raise ValueError(f"recipe: layer {name!r} needs channels that are kept, 'in' or 'out'")
        for axis, channels in axes.items():
            _check_channels(name, modules[name], axis, channels)
    return {"version": VERSION, "layers": {n: dict(axes) for n, axes in layers.items()}, "blocks": list(blocks)}


def _check_channels(name: str, module: nn.Module, axis: str, channels: Any) -> None:
    try:
        of = width(module, axis)
    except ValueError as error:
        raise ValueError(f"recipe: layer {name!r}: {error}") from None
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups > 1 and not is_depthwise(module):
        raise ValueError(f"recipe: layer {name!r} is a convolution of {module.groups} groups, which cannot be cut")
    if not isinstance(channels, Mapping) or channels.get("of") != of:
        raise ValueError(f"recipe: layer {name!r} has {of} channels ({axis}), the recipe is for another model")
    kept = channels.get("kept")
    if not isinstance(kept, list) or not kept or not all(type(i) is int and 0 <= i < of for i in kept):
        raise ValueError(f"recipe: layer {name!r}: kept must be numbers of channels ({axis}), from 0 to {of - 1}")
    if any(a >= b for a, b in itertools.pairwise(kept)):
        raise ValueError(f"recipe: layer {name!r}: the numbers of channels ({axis}) must rise")
