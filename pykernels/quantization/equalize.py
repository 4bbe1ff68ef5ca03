"""Cross-layer equalization: channels that share one 8-bit scale are brought to sizes that waste little of it.

Multiplying channel c of an activation by s[c] > 0, in the layers that make it, and dividing it out again in the layers
that read it changes nothing in real numbers, as long as all between is homogeneous: f(s x) = s f(x), as of relu,
maxima, averages and residual sums. (Nagel et al. 2019, "Data-free quantization through weight equalization and bias
correction", for pairs of layers; here for all layers that a residual stream ties together.) In 8 bits it moves error:
an activation has one scale for all channels, so small channels next to large ones are coarse; a weight has one scale
for each output channel, so what is divided by a small s makes the others coarse.

The expected squared error of both, at the outputs of the layers that read, decides between s = 1 and a family of
others, s[c] = weight[c]^b / range[c]^a, where range is the channel's largest magnitude over the calibration inputs and
weight its largest weight in the layers that read it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from pykernels.graph.nodes import argument, arguments, constant, erase_dead, facts, is_call, replace, set_constant

__all__ = ["equalize"]

CONVOLUTIONS = ("aten.conv1d", "aten.conv2d")
HOMOGENEOUS = ("aten.relu", "aten.max_pool2d", "aten.avg_pool2d", "aten.adaptive_avg_pool2d")
EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
WORTH = 0.9  # of the error with s = 1: for less, a network is left as it is
SAMPLES = 8  # calibration entries that are looked at


@dataclass
class _Group:
    """Activations whose channels must be scaled alike, the layers that make them and those that read them."""

    values: list[fx.Node] = field(default_factory=list)
    makers: list[fx.Node] = field(default_factory=list)
    readers: list[fx.Node] = field(default_factory=list)


def equalize(module: fx.GraphModule, samples: Sequence[tuple[Any, ...]]) -> list[str]:
    """Scale channels of a plain fp32 graph without batch norms, in place; returns the names of the layers changed.

    Args:
        module: the graph; weights that change become buffers of its own.
        samples: calibration inputs, each a tuple of the graph's inputs; a few are looked at, spread over all.
    """
    groups = _groups(module)
    seen = _Statistics(module, {value for group in groups for value in group.values})
    with torch.no_grad():
        for sample in samples[:: -(-len(samples) // SAMPLES)]:
            seen.run(*sample)
        changed: set[str] = set()
        for group in groups:
            scale = _choose(module, group, seen)
            if scale is None:
                continue
            for layer in group.makers:
                _rescale(module, layer, scale, output=True)
            for layer in group.readers:
                _rescale(module, layer, scale, output=False)
            changed |= {layer.name for layer in (*group.makers, *group.readers)}
    if changed:
        erase_dead(module)
        module.recompile()
    return sorted(changed)


def _groups(module: fx.GraphModule) -> list[_Group]:
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while parent[node] is not node:
            node = parent[node]
        return node

    for node in module.graph.nodes:
        if _is_layer(module, node):
            parent[node] = node
        elif (sources := _passes(node)) and all(source in parent for source in sources):
            parent[node] = node
            for source in sources:
                parent[root(source)] = root(node)
    found: dict[fx.Node, _Group] = {}
    for node in parent:
        group = found.setdefault(root(node), _Group())
        group.values.append(node)
        if _is_layer(module, node):
            group.makers.append(node)
    return [group for group in found.values() if _closed(module, group)]


def _is_layer(module: fx.GraphModule, node: fx.Node) -> bool:
    """A convolution of a batch with real weights and bias, constants that nobody writes."""
    if not is_call(node, *CONVOLUTIONS):
        return False
    weight, bias, known = constant(module, argument(node, "weight")), argument(node, "bias"), facts(node)
    return (
        weight is not None
        and weight.is_floating_point()
        and (bias is None or constant(module, bias) is not None)
        and known is not None
        and len(known.shape) == weight.dim()
    )


def _passes(node: fx.Node) -> list[fx.Node]:
    """The activations whose channels are those of the result, where f(s x) = s f(x); empty where that is not so."""
    if is_call(node, *HOMOGENEOUS):
        return [node.args[0]] if isinstance(node.args[0], fx.Node) else []
    if is_call(node, "aten.add") and len(node.args) == 2 and argument(node, "alpha") in (None, 1):
        a, b = node.args
        same = facts(a) is not None and facts(b) is not None and facts(a) == facts(b)
        return [a, b] if same and isinstance(a, fx.Node) and isinstance(b, fx.Node) else []
    return []


def _closed(module: fx.GraphModule, group: _Group) -> bool:
    """Whether nobody but convolutions reads the group's values outside of it; notes those convolutions."""
    values = set(group.values)
    for value in group.values:
        for user in value.users:
            if user in values and not is_call(user, *CONVOLUTIONS):
                continue
            if not _is_layer(module, user) or user.args[0] is not value:
                return False
            if user not in group.readers:
                group.readers.append(user)
    return bool(group.readers)


class _Statistics(fx.Interpreter):
    """Of each channel of the nodes `of`: the largest magnitude, and the mean square."""

    def __init__(self, module: fx.GraphModule, of: set[fx.Node]) -> None:
        super().__init__(module)
        self.of = of
        self.most: dict[fx.Node, torch.Tensor] = {}
        self.square: dict[fx.Node, torch.Tensor] = {}
        self.count = 0

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.of:
            rows = result.float().transpose(0, 1).flatten(1)
            most, square = rows.abs().amax(1), rows.square().mean(1)
            self.most[n] = torch.maximum(self.most[n], most) if n in self.most else most
            self.square[n] = self.square[n] + square if n in self.square else square
        return result

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self.count += 1
        return super().run(*args, **kwargs)


def _inputs(layer: fx.Node, weight: torch.Tensor, channels: torch.Tensor) -> torch.Tensor:
    """What belongs to the input channels of each output channel: [output channels, input channels of a group]."""
    groups = int(arguments(layer)["groups"])
    return channels.view(groups, -1).repeat_interleave(weight.shape[0] // groups, 0)


def _choose(module: fx.GraphModule, group: _Group, seen: _Statistics) -> torch.Tensor | None:
    """The scales of least expected error, or None where s = 1 is about as good."""
    most = torch.stack([seen.most[value] for value in group.values]).amax(0)
    readers = []
    widest = torch.zeros_like(most)
    for layer in group.readers:
        weight = constant(module, argument(layer, "weight"))
        assert weight is not None
        taps = weight.float().flatten(2)
        largest = taps.abs().amax(2)
        groups = int(arguments(layer)["groups"])
        widest = torch.maximum(widest, largest.view(groups, -1, largest.shape[1]).amax(1).flatten())
        x = layer.args[0]
        square = _inputs(layer, weight, seen.square[x] / seen.count)
        energy = taps.square().sum(2)
        # Errors count by the size of what the layer yields, so that large and small ones weigh alike.
        readers.append((layer, weight, largest, energy, square, seen.most[x], float((energy * square).sum())))

    def error(scale: torch.Tensor) -> float:
        total = 0.0
        for layer, weight, largest, energy, square, range_, size in readers:
            s = _inputs(layer, weight, scale)
            step = (range_ * scale).max() / 255
            coarse = (largest / s).amax(1, keepdim=True) / 127
            taps = weight[0, 0].numel()
            noise = step.square() * (energy / s.square()).sum() + (coarse.square() * taps * square * s.square()).sum()
            total += float(noise) / 12 / max(size, 1e-30)
        return total

    tiny = float(most.max()) * 1e-4 + 1e-30
    wide = float(widest.max()) * 1e-4 + 1e-30
    best, least = None, WORTH * error(torch.ones_like(most))
    for a, b in itertools.product(EXPONENTS, EXPONENTS):
        scale = widest.clamp(min=wide) ** b / most.clamp(min=tiny) ** a
        scale = scale / scale.log().mean().exp()
        found = error(scale)
        if found < least:
            best, least = scale, found
    return best


def _rescale(module: fx.GraphModule, layer: fx.Node, scale: torch.Tensor, output: bool) -> None:
    """Multiply what a layer yields, or divide what it reads, by the scale of each channel."""
    values = arguments(layer)
    weight = constant(module, values["weight"])
    assert weight is not None
    flat = [1] * (weight.dim() - 2)
    names = [a.name for a in layer.target._schema.arguments]
    args = list(layer.args) + [values[name] for name in names[len(layer.args) :]]
    if output:
        changed = (weight.float() * scale.view(-1, 1, *flat)).to(weight.dtype)
        bias = None if values["bias"] is None else constant(module, values["bias"])
        if bias is not None:
            moved = (bias.float() * scale).to(bias.dtype)
            args[names.index("bias")] = set_constant(module, layer, moved, layer.name + "_bias")
    else:
        inputs = _inputs(layer, weight, scale)
        changed = (weight.float() / inputs.view(*inputs.shape, *flat)).to(weight.dtype)
    args[names.index("weight")] = set_constant(module, layer, changed, layer.name + "_weight")
    replace(layer, layer.target, args)
