"""Weights of pruned layers that make up for the channels which they do not read any more.

What a layer computed of all channels x is approached with those that are kept, in the least squares over the data: of
weights W [out, in * taps] and the second moments G = mean(x x^T), in windows where there are taps, the nearest are

    W' = W G[:, kept] (G[kept, kept] + ridge)^-1

(after He et al., Channel Pruning for Accelerating Very Deep Neural Networks, 2017, whose layers see the pruned network;
here all moments are the whole network's, from one pass over the data, as layers before are brought near it, too). With
a bias moments are taken around the means, and it takes up the difference.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from .moments import observed

__all__ = ["reconstruct"]


def reconstruct(
    model: nn.Module, pruned: nn.Module, recipe: Mapping[str, Any], data: Iterable[Any], inputs: int
) -> list[str]:
    """Change the weights of convolutions and linear layers of `pruned` that read fewer channels; return their names.

    Args:
        model: the whole model.
        recipe: what was removed of it.
        data: entries as `read_entry` takes them.
        inputs: how many inputs a call has.
    """
    done = []
    for name, found in observed(model, [n for n, axes in recipe["layers"].items() if "in" in axes], data, inputs):
        axes = recipe["layers"][name]
        if found.suffice(len(axes["in"]["kept"])):
            found.refit(pruned.get_submodule(name), axes["in"]["kept"], axes.get("out", {}).get("kept"))
            done.append(name)
    return done
