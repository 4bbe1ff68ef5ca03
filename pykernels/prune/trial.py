"""What fewer channels, or a block less, do to the answers: measured, one group or block at a time.

Gradients tell which channels of a layer matter least. How much is lost with a quarter of them, or with a block, they
tell badly: weights that are refitted make up for most of the one and for nothing of the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pykernels.graph.export import mode

from .coupling import Group
from .entries import read_entry
from .recipe import recipe_of
from .reconstruct import observed
from .surgery import masked

__all__ = ["changes"]

SAMPLES = 32  # or as many as the first entry has


def changes(
    model: nn.Module,
    groups: Sequence[Group],
    blocks: Sequence[str],
    order: Mapping[str, Sequence[int]],
    data: Iterable[Any],
    inputs: int,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, dict[int, float]], dict[str, float]]:
    """The squared change of the outputs, summed, an entry of the data: of each group by width, and of each block.

    Args:
        groups: of channels; looked at are about a quarter, a half and three quarters of each.
        blocks: names of blocks that may hand on their input.
        order: of each group its units, those that stay longest first.
        data: entries as `read_entry` takes them; weights are refitted on all of them.
        inputs: how many inputs a call has.
        progress: called as ``progress("measuring losses", done, total)``.
    """
    recipes = {
        (group.name, width): recipe_of(model, [group], {group.name: order[group.name][:width]})
        for group in groups
        for width in _steps(group)
    }
    readers = {name for recipe in recipes.values() for name, axes in recipe["layers"].items() if "in" in axes}
    weights: dict[tuple[str, int, str], tuple[torch.Tensor, torch.Tensor | None]] = {}
    for name, found in observed(model, readers, data, inputs):
        for (group, width), recipe in recipes.items():
            kept = recipe["layers"].get(name, {}).get("in", {}).get("kept")
            if kept is not None and found.suffice(len(kept)):
                weight, bias = found.refitted(kept)
                weights[group, width, name] = weight.float(), None if bias is None else bias.float()
    entries, total = _few(data, inputs), len(recipes) + len(blocks)
    by_width: dict[str, dict[int, float]] = {group.name: {} for group in groups}
    by_block: dict[str, float] = {}
    with mode(model, False), torch.no_grad():
        answers = [_outputs(model(*args)) for args in entries]

        def change(tried: nn.Module) -> float:
            if progress is not None:
                progress("measuring losses", len(by_block) + sum(map(len, by_width.values())) + 1, total)
            found = (
                (a - b).double().square().sum()
                for x, y in zip(entries, answers, strict=True)
                for a, b in zip(_outputs(tried(*x)), y, strict=True)
            )
            return float(sum(found, torch.zeros(()))) / len(entries)

        for (group, width), recipe in recipes.items():
            tried = masked(model, recipe)
            for name, axes in recipe["layers"].items():
                layer: Any = tried.get_submodule(name)
                if (group, width, name) in weights:
                    weight, bias = weights[group, width, name]
                    layer.weight[:, axes["in"]["kept"]] = weight
                    if bias is not None:
                        layer.bias.copy_(bias)
            by_width[group][width] = change(tried)
        for block in blocks:
            by_block[block] = change(masked(model, recipe_of(model, [], {}, [block])))
    return by_width, by_block


def _steps(group: Group) -> list[int]:
    widths = group.widths[:-1]
    return sorted({widths[len(widths) * quarter // 4] for quarter in (1, 2, 3)}) if widths else []


def _few(data: Iterable[Any], inputs: int) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    samples = 0
    for number, entry in enumerate(data):
        args, _ = read_entry(entry, inputs, number)
        found.append(args)
        leaf = next((x for x in pytree.tree_leaves(args) if isinstance(x, torch.Tensor) and x.dim()), None)
        samples += 1 if leaf is None else leaf.shape[0]
        if samples >= SAMPLES:
            break
    return found


def _outputs(answer: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(answer) if isinstance(x, torch.Tensor) and x.is_floating_point()]
