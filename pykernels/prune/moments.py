"""Second moments of what layers read, by which weights are fitted: of inputs x in windows, sums of x and of x x^T."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pykernels.graph.export import mode

from .coupling import is_depthwise
from .entries import at_entry, read_entry

__all__ = ["ROOM", "Moments", "fits", "observed", "room"]

ROOM = 1 << 30
"""Bytes of second moments at once: what does not fit takes another pass over the data."""
_RIDGE = 1e-3  # of the mean second moment
_ENOUGH = 4  # samples for each number of a sum: with fewer, a fit is to chance
_LARGEST = 8192  # numbers in a sum, whose moments are kept as a matrix


def fits(layer: nn.Module) -> bool:
    """Whether weights of a layer of this kind can be fitted."""
    if isinstance(layer, nn.Linear):
        return layer.in_features <= _LARGEST
    if not isinstance(layer, nn.Conv2d) or is_depthwise(layer) or layer.groups > 1 or layer.padding_mode != "zeros":
        return False
    return not isinstance(layer.padding, str) and layer.weight[0].numel() <= _LARGEST


def room(layer: Any) -> int:
    """Bytes that its moments take."""
    return 8 * int(layer.weight[0].numel()) ** 2


def observed(model: nn.Module, names: Iterable[str], data: Iterable[Any], inputs: int) -> Iterator[tuple[str, Moments]]:
    """The moments of those of the layers that can be fitted, from as few passes over the data as fit into memory.

    Args:
        data: entries as `read_entry` takes them.
        inputs: how many inputs a call has.
    """
    whole = copy.deepcopy(model)
    wanted = set(names)
    layers = {name: layer for name, layer in whole.named_modules() if name in wanted and fits(layer)}
    while layers:
        moments: dict[str, Moments] = {}
        while layers and (not moments or sum(room(found.layer) for found in moments.values()) < ROOM):
            name = next(iter(layers))
            moments[name] = Moments(layers.pop(name))
        handles = [whole.get_submodule(name).register_forward_pre_hook(found.add) for name, found in moments.items()]
        with mode(whole, False), torch.no_grad():
            for number, entry in enumerate(data):
                args, _ = read_entry(entry, inputs, number)
                with at_entry(number):
                    whole(*args)
        for handle in handles:
            handle.remove()
        yield from moments.items()


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

    @property
    def channels(self) -> int:
        return int(self.layer.weight.shape[1])

    def __add__(self, other: Moments) -> Moments:
        both = Moments(self.layer)
        both.first, both.second = self.first + other.first, self.second + other.second
        both.count = self.count + other.count
        return both

    def suffice(self, kept: int) -> bool:
        """Whether so many channels can be fitted."""
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

    def inverted(self, channels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights [out, channels * taps] and the inverse of the second moments of these channels."""
        columns = self._columns(channels)
        return self._weight(None)[:, columns], torch.linalg.inv(self._inner(self._moment(), columns))

    def left(self, kept: list[int], others: Moments, curvature: torch.Tensor) -> float:
        """Refitted to these channels here, how far the layer's output is changed by that for others' inputs: the sum
        over `curvature` [out, out] of the second moments of the change."""
        columns, weight = self._columns(kept), self._weight(None)
        change = -weight
        change[:, columns] = self._change(weight, columns)
        return float((curvature * (change @ others._moment() @ change.t())).sum())

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
        inner = self._inner(moment, columns)
        # what is added is fitted, not the weights: where channels are alone, these stay as they are
        rest = weight @ moment[:, columns] - weight[:, columns] @ inner
        return torch.linalg.solve(inner, rest.t()).t()

    def _inner(self, moment: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
        """The moments of some columns, with a ridge."""
        inner = moment[columns[:, None], columns]
        inner.diagonal().add_(_RIDGE * inner.diagonal().mean().clamp_min(1e-30))
        return inner
