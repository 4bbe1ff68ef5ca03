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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pykernels.graph.export import mode

from .coupling import Group, is_depthwise
from .entries import read_entry

__all__ = ["reconstruct", "remaining"]

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
    for name, found in _observed(model, [n for n, axes in recipe["layers"].items() if "in" in axes], data, inputs):
        axes = recipe["layers"][name]
        if found.suffice(len(axes["in"]["kept"])):
            found.refit(pruned.get_submodule(name), axes["in"]["kept"], axes.get("out", {}).get("kept"))
            done.append(name)
    return done


def remaining(
    model: nn.Module, groups: Sequence[Group], order: Mapping[str, Sequence[int]], data: Iterable[Any], inputs: int
) -> dict[str, dict[int, float]]:
    """Of each group, by width, what part of a removal's change `reconstruct` leaves: 0 where others tell it all.

    Changes are squared errors of what the layers that read the group compute, each as a part of what it computes of
    all its channels. Layers whose weights are not fitted are left out; 1 where there are no others.

    Args:
        groups: of channels.
        order: of each group its units, those that stay longest first.
        data, inputs: as of `reconstruct`.
    """
    readers: dict[str, list[Group]] = {}
    for group in groups:
        for name in dict.fromkeys(slot.layer for slot in group.units[0] if slot.axis == "in"):
            readers.setdefault(name, []).append(group)
    raw: dict[tuple[str, int], float] = {}
    left: dict[tuple[str, int], float] = {}
    for name, found in _observed(model, list(readers), data, inputs):
        for group in readers[name]:
            for width in _steps(group):
                gone = {
                    s.channel
                    for u in order[group.name][width:]
                    for s in group.units[u]
                    if s.layer == name and s.axis == "in"
                }
                before, after = found.errors([c for c in range(found.channels) if c not in gone])
                raw[group.name, width] = raw.get((group.name, width), 0.0) + before
                left[group.name, width] = left.get((group.name, width), 0.0) + after
    return {
        group.name: {
            w: min(left[group.name, w] / raw[group.name, w], 1.0) if raw.get((group.name, w)) else 1.0
            for w in _steps(group)
        }
        for group in groups
    }


def _steps(group: Group) -> list[int]:
    """Widths at which is looked what is left: about a quarter, a half and three quarters."""
    widths = group.widths[:-1]
    return sorted({widths[len(widths) * quarter // 4] for quarter in (1, 2, 3)}) if widths else []


def _observed(
    model: nn.Module, names: Iterable[str], data: Iterable[Any], inputs: int
) -> Iterator[tuple[str, _Moments]]:
    """The moments of those of the layers that can be fitted, from as few passes over the data as fit into memory."""
    whole = copy.deepcopy(model)
    wanted = set(names)
    layers = {name: layer for name, layer in whole.named_modules() if name in wanted and _fits(layer)}
    while layers:
        moments: dict[str, _Moments] = {}
        while layers and (not moments or sum(map(_bytes, moments.values())) < _ROOM):
            name = next(iter(layers))
            moments[name] = _Moments(layers.pop(name))
        handles = [whole.get_submodule(name).register_forward_pre_hook(found.add) for name, found in moments.items()]
        with mode(whole, False), torch.no_grad():
            for number, entry in enumerate(data):
                whole(*read_entry(entry, inputs, number)[0])
        for handle in handles:
            handle.remove()
        yield from moments.items()


def _bytes(moments: _Moments) -> int:
    return moments.second.numel() * moments.second.element_size()


def _fits(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return layer.in_features <= _LARGEST
    if not isinstance(layer, nn.Conv2d) or is_depthwise(layer) or layer.groups > 1 or layer.padding_mode != "zeros":
        return False
    return not isinstance(layer.padding, str) and layer.weight[0].numel() <= _LARGEST


class _Moments:
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

    @property
    def channels(self) -> int:
        return int(self.layer.weight.shape[1])

    def suffice(self, kept: int) -> bool:
        return self.count >= _ENOUGH * self.taps * kept

    def refit(self, small: Any, kept: list[int], makes: list[int] | None) -> None:
        """Give the pruned layer its weights, and bias."""
        columns, mean, weight = self._columns(kept), self.first / self.count, self._weight(makes)
        change = self._change(weight, columns)
        found = weight[:, columns] + change
        with torch.no_grad():
            small.weight.copy_(found.reshape(small.weight.shape))
            if self.layer.bias is not None:
                bias = self.layer.bias if makes is None else self.layer.bias[makes]
                small.bias.copy_(bias.double() + weight @ mean - found @ mean[columns])

    def errors(self, kept: list[int]) -> tuple[float, float]:
        """The squared error of the layer without its other channels, and of a refitted one, in parts of its output."""
        columns, weight = self._columns(kept), self._weight(None)
        moment = self._moment()
        gone = weight.clone()
        gone[:, columns] = 0
        whole, before = (float(((w @ moment) * w).sum()) for w in (weight, gone))
        if whole <= 0 or before <= 0:
            return 0.0, 0.0
        if not self.suffice(len(kept)):
            return before / whole, before / whole
        gone[:, columns] = -self._change(weight, columns)
        return before / whole, float(((gone @ moment) * gone).sum()) / whole

    def _columns(self, kept: list[int]) -> torch.Tensor:
        return (torch.tensor(kept)[:, None] * self.taps + torch.arange(self.taps)).flatten()

    def _weight(self, makes: list[int] | None) -> torch.Tensor:
        weight: torch.Tensor = self.layer.weight.detach().double().flatten(1)
        return weight if makes is None else weight[makes]

    def _moment(self) -> torch.Tensor:
        """Around the mean where a bias takes that up."""
        moment, mean = self.second / self.count, self.first / self.count
        return moment if self.layer.bias is None else moment - mean[:, None] * mean

    def _change(self, weight: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """What is added to the weights of `columns` [out, columns]."""
        moment = self._moment()
        inner = moment[columns[:, None], columns]
        inner.diagonal().add_(_RIDGE * inner.diagonal().mean().clamp_min(1e-30))
        # what is added is fitted, not the weights: where channels are alone, these stay as they are
        rest = weight @ moment[:, columns] - weight[:, columns] @ inner
        return torch.linalg.solve(inner, rest.t()).t()
