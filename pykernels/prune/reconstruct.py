"""Weights of pruned layers that make up for the channels which they do not read any more.

What a layer computed of all channels x is approached with those that are kept, in the least squares over the data: of
weights W [out, in * taps] and the second moments G = mean(x x^T), in windows where there are taps, the nearest are

    W' = W G[:, kept] (G[kept, kept] + ridge)^-1

(after He et al., Channel Pruning for Accelerating Very Deep Neural Networks, 2017, whose layers see the pruned network;
here all moments are the whole network's, from one pass over the data, as layers before are brought near it, too). With
a bias moments are taken around the means, and it takes up the difference.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pykernels.graph.export import mode

from .coupling import is_depthwise
from .entries import read_entry

__all__ = ["observed", "reconstruct"]

_RIDGE = 1e-3  # of the mean second moment
_ENOUGH = 4  # samples for each number of a sum: with fewer, the fit is to chance
_LARGEST = 8192  # numbers in a sum, whose moments are kept as a matrix
_ROOM = 1 << 30  # bytes of such matrices at once: what does not fit takes another pass over the data


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
            small: Any = pruned.get_submodule(name)
            weight, bias = found.refitted(axes["in"]["kept"], axes.get("out", {}).get("kept"))
            with torch.no_grad():
                small.weight.copy_(weight)
                if bias is not None:
                    small.bias.copy_(bias)
            done.append(name)
    return done


def observed(model: nn.Module, names: Iterable[str], data: Iterable[Any], inputs: int) -> Iterator[tuple[str, Moments]]:
    """The moments of those of the layers that can be fitted, from as few passes over the data as fit into memory."""
    whole = copy.deepcopy(model)
    wanted = set(names)
    layers = {name: layer for name, layer in whole.named_modules() if name in wanted and _fits(layer)}
    while layers:
        moments: dict[str, Moments] = {}
        while layers and (not moments or sum(map(_bytes, moments.values())) < _ROOM):
            name = next(iter(layers))
            moments[name] = Moments(layers.pop(name))
        handles = [whole.get_submodule(name).register_forward_pre_hook(found.add) for name, found in moments.items()]
        with mode(whole, False), torch.no_grad():
            for number, entry in enumerate(data):
                whole(*read_entry(entry, inputs, number)[0])
        for handle in handles:
            handle.remove()
        yield from moments.items()


def _bytes(moments: Moments) -> int:
    return moments.second.numel() * moments.second.element_size()


def _fits(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features <= _LARGEST
    if not isinstance(layer, nn.Conv2d) or is_depthwise(layer) or layer.groups > 1 or layer.padding_mode != "zeros":
        return False
    return not isinstance(layer.padding, str) and layer.weight[0].numel() <= _LARGEST


class Moments:
    """Of a layer's inputs: sums of x and of x x^T over all samples and positions."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.taps = layer.weight[0].numel() // layer.weight.shape[1]
        size = layer.weight[0].numel()
        self.first = torch.zeros(size, dtype=torch.float64)
        self.second = torch.zeros(size, size, dtype=torch.float64)
        self.count = 0

    def add(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x, layer = args[0], self.layer
        if isinstance(layer, nn.Conv2d):
            assert not isinstance(layer.padding, str)
            if self.taps == 1:
                steps = layer.stride
                x = x[:, :, :: steps[0], :: steps[1]].movedim(1, -1)
            else:
                x = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride).movedim(1, -1)
        x = x.reshape(-1, x.shape[-1])
        self.first += x.double().sum(0)
        self.second += (x.t() @ x).double()
        self.count += len(x)

    def suffice(self, kept: int) -> bool:
        """Whether so many channels can be fitted."""
        return self.count >= _ENOUGH * self.taps * kept

    def refitted(self, kept: list[int], makes: list[int] | None = None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Weights [makes, kept, taps...] for the channels that are kept, and the bias, of some outputs or all."""
        columns = (torch.tensor(kept)[:, None] * self.taps + torch.arange(self.taps)).flatten()
        weight, bias = self.layer.weight.detach().double().flatten(1), self.layer.bias
        if makes is not None:
            weight = weight[makes]
            bias = None if bias is None else bias[makes]
        mean, moment = self.first / self.count, self.second / self.count
        if bias is not None:
            moment = moment - mean[:, None] * mean
        inner = moment[columns[:, None], columns]
        inner.diagonal().add_(_RIDGE * inner.diagonal().mean().clamp_min(1e-30))
        # what is added is fitted, not the weights: where channels are alone, these stay as they are
        rest = weight @ moment[:, columns] - weight[:, columns] @ inner
        change = torch.linalg.solve(inner, rest.t()).t()
        found = weight[:, columns] + change
        if bias is not None:
            bias = bias.detach().double() + weight @ mean - found @ mean[columns]
        return found.view(len(weight), len(kept), *self.layer.weight.shape[2:]), bias
