"""How long a network takes at other widths: measured on our kernels, layer by layer.

The model is lowered once, as `pykernels.optimize` would, and its plans are timed step by step. A layer at other widths
is that very step with fewer channels, in a plan of its own, timed at a grid of widths; between them times are
interpolated. What it takes inside the network is its time there, scaled by the ratio of the two alone. Steps without
weights scale with the bytes that they move; what is torch's stays as it is.
"""

from __future__ import annotations

import dataclasses
import itertools
import logging
import warnings
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from pykernels.graph.capture import canonicalize, capture
from pykernels.network.assemble import assemble
from pykernels.network.buffers import consolidate
from pykernels.network.emit_fx import emit_fx
from pykernels.network.plan.emit import emit_plan
from pykernels.network.plan.planned import Planned
from pykernels.network.plan.timing import quiet_seconds, step_seconds
from pykernels.network.step import Layer, Network, Step, Value

from .coupling import PANEL, Group, is_depthwise, width
from .knapsack import State

__all__ = ["Latency", "Lowered", "compare", "lower"]

Progress = Callable[[str, int, int], None]
_FRACTIONS = (0.25, 0.5, 0.75)  # of a layer's width, beside one panel: where it is timed
_ALONE_ROUNDS = 10  # of a layer at all of its widths
_ROUNDS = 20  # of the whole network
_COMPARISONS = 3  # times that networks are timed in turn, and a layer while it is slower than expected
_DISTURBED = 1.15  # over what is expected: others are at work on the machine


@dataclasses.dataclass
class Lowered:
    """A model on our kernels, with what it was made of.

    Attributes:
        inputs: flat inputs of one call.
        call: runs it once.
    """

    network: Network
    planned: Planned
    inputs: list[Any]

    def call(self) -> Any:
        with torch.no_grad():
            return self.planned.program(*self.inputs)

    def steps(self) -> dict[str, float]:
        """The seconds of each step, by its label: the quickest of some rounds; what lies between steps under ''."""
        return step_seconds(self.planned, self.inputs, _ROUNDS)


def lower(model: nn.Module, args: tuple[Any, ...], precision: str) -> Lowered:
    """`model` as plans, for inputs of the example's sizes; for int8, ranges come from the example: only times count.

    Raises:
        ValueError: no step of it can be planned.
        NotExportable: torch.export cannot capture it.
    """
    logger = logging.getLogger("torchao")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            if precision == "int8":
                from pykernels.quantization.recipes import calibrate_captured

                found = calibrate_captured(model, args, {}, [args], dynamic_batch=False, refine=False)
                captured, _ = found.finished()
            else:
                captured = capture(model, args, {}, dynamic_batch=False)
        finally:
            logger.setLevel(level)
    canonicalize(captured.module, captured.example)
    network = assemble(captured.module, precision)
    planned = _planned(network)
    if planned is None:
        raise ValueError("model: nothing of it runs on our kernels, so there is no latency to prune for")
    return Lowered(network, planned, pytree.tree_leaves(args))


def compare(*networks: Lowered) -> list[float]:
    """Seconds of a call of each, all with the first one's inputs, on a quiet machine."""
    return quiet_seconds([network.planned for network in networks], networks[0].inputs, _ROUNDS, _COMPARISONS)


def _planned(network: Network) -> Planned | None:
    emitted = emit_fx(network)
    return emit_plan(network, emitted, consolidate(emitted.program))


class Latency:
    """Predicts the seconds of a call at any widths.

    Args:
        model: the whole model, for the widths of its layers.
        lowered: the same on our kernels.
        groups: whose widths change.
    """

    def __init__(self, model: nn.Module, lowered: Lowered, groups: Sequence[Group]) -> None:
        self.model = model
        self.network = lowered.network
        self.widths = _AxisWidths(model, groups)
        self.alone: dict[Any, _Alone] = {}
        self.steps: list[_Timed] = []
        self._read(lowered.network)
        self.full = State({group.name: len(group.units) for group in groups})
        found = lowered.steps()
        counts = Counter(step.label for step in self.steps)
        for step in self.steps:
            step.seconds = found.get(step.label, 0.0) / counts[step.label]
        self.rest = sum(found.values()) - sum(step.seconds for step in self.steps)

    def measure(self, progress: Progress | None = None) -> None:
        """Time each kind of layer at its grid of widths."""
        for number, alone in enumerate(self.alone.values(), start=1):
            alone.measure(alone.grid())
            if progress is not None:
                progress("timing layers", number, len(self.alone))

    def refine(self, state: State) -> None:
        """Time the layers at the widths of this state, too; again, while one takes longer than those beside it say."""
        for alone in self.alone.values():
            pairs = sorted({step.pair(self.widths, state) for step in self.steps if step.alone is alone})
            expected = {pair: alone.between(*pair) for pair in pairs}
            for _ in range(_COMPARISONS):
                alone.measure([alone.full, *pairs])
                if all(alone.times[pair] <= _DISTURBED * expected[pair] for pair in pairs):
                    break

    def __call__(self, state: State) -> float:
        """Seconds of a call."""
        total = self.rest
        for step in self.steps:
            if not state.dropped or not any(step.inside(block) for block in state.dropped):
                total += step.seconds * step.scale(self.widths, state)
        return total

    def _read(self, network: Network) -> None:
        """The steps of a network: layers with their kind, others with the layers whose channels they move."""
        modules = dict(self.model.named_modules())
        flows: dict[Value, dict[str, float]] = {}  # of a value, layers and the part of its channels that they make
        for step in network.live():
            layer, module = step.details, modules.get(step.where)
            if isinstance(layer, Layer) and isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                for value in step.outputs:
                    flows[value] = {step.where: 1.0}
                changes = self.widths.changes(step.where)
                key = (*_kind(step), changes)
                if key not in self.alone:
                    self.alone[key] = _Alone(step, module, network, changes)
                self.steps.append(_Timed(step.label, step.where, self.alone[key]))
                continue
            made = _mixed([(flows.get(value, {}), _size(value)) for value in step.values], step.kind)
            for value in step.outputs:
                flows[value] = made
            self.steps.append(_Timed(step.label, step.where, None, made))


@dataclasses.dataclass
class _Timed:
    """A step, and what it takes at full widths."""

    label: str
    where: str
    alone: _Alone | None
    flow: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0

    def inside(self, block: str) -> bool:
        return self.where == block or self.where.startswith(f"{block}.")

    def pair(self, widths: _AxisWidths, state: State) -> tuple[int, int]:
        return widths(self.where, "in", state), widths(self.where, "out", state)

    def scale(self, widths: _AxisWidths, state: State) -> float:
        """Its time at these widths over that at full ones."""
        if self.alone is not None:
            return self.alone.ratio(*self.pair(widths, state))
        rest = 1.0 - sum(self.flow.values())
        return rest + sum(part * widths.part(layer, state) for layer, part in self.flow.items())


class _AxisWidths:
    """How many channels a layer has in a state."""

    def __init__(self, model: nn.Module, groups: Sequence[Group]) -> None:
        self.model = model
        self.full: dict[tuple[str, str], int] = {}
        self.slots: dict[tuple[str, str], dict[str, int]] = defaultdict(dict)  # slots that a unit of a group has there
        self.sizes = {group.name: len(group.units) for group in groups}
        for group in groups:
            for slot in group.units[0]:
                axis = (slot.layer, slot.axis)
                self.slots[axis][group.name] = self.slots[axis].get(group.name, 0) + 1

    def __call__(self, layer: str, axis: str, state: State) -> int:
        module = self.model.get_submodule(layer)
        if is_depthwise(module):
            axis = "out"
        key = (layer, axis)
        if key not in self.full:
            self.full[key] = width(module, axis)
        slots = self.slots.get(key, {})
        return self.full[key] - sum(count * (self.sizes[group] - state.widths[group]) for group, count in slots.items())

    def part(self, layer: str, state: State) -> float:
        """Of the channels that a layer makes, what is left."""
        return self(layer, "out", state) / self.full[layer, "out"]

    def changes(self, layer: str) -> tuple[bool, bool]:
        """Whether the channels that a layer reads, and makes, can become fewer."""
        made = (layer, "out") in self.slots
        return (made if is_depthwise(self.model.get_submodule(layer)) else (layer, "in") in self.slots), made


class _Alone:
    """A layer's step as a network of its own, timed at pairs of widths."""

    def __init__(self, step: Step, module: nn.Module, network: Network, changes: tuple[bool, bool]) -> None:
        self.step, self.network = step, network
        self.depthwise = is_depthwise(module)
        self.full = (width(module, "out" if self.depthwise else "in"), width(module, "out"))
        self.times: dict[tuple[int, int], float] = {}
        self.cache: dict[tuple[int, int], float] = {}
        self.axes = [_grid(full) if varies else [full] for full, varies in zip(self.full, changes, strict=True)]

    def grid(self) -> list[tuple[int, int]]:
        """Pairs of widths to time: of a depthwise layer both are the same."""
        if self.depthwise:
            return [(count, count) for count in self.axes[1]]
        return list(itertools.product(self.axes[0], self.axes[1]))

    def ratio(self, reads: int, makes: int) -> float:
        """Time at these widths over that at full ones."""
        pair = (reads, makes)
        found = self.cache.get(pair)
        if found is None:
            found = self.cache[pair] = self.between(reads, makes) / self.times[self.full] if self.times else 1.0
        return found

    def between(self, reads: int, makes: int) -> float:
        """Seconds at these widths, from those timed."""
        exact = self.times.get((reads, makes))
        if exact is not None:
            return exact
        low_o, high_o, part_o = _neighbours(self.axes[1], makes)
        if self.depthwise:
            at = self.times
            return at[low_o, low_o] * (1 - part_o) + at[high_o, high_o] * part_o
        low_i, high_i, part_i = _neighbours(self.axes[0], reads)
        low = self.times[low_i, low_o] * (1 - part_o) + self.times[low_i, high_o] * part_o
        high = self.times[high_i, low_o] * (1 - part_o) + self.times[high_i, high_o] * part_o
        return low * (1 - part_i) + high * part_i

    def measure(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Time it at these pairs of widths, in turn; the quickest of all rounds counts, of earlier calls, too."""
        wanted = [self.full, *dict.fromkeys(pairs)]  # the first step of a plan wakes the threads: it is not counted
        inputs: list[Value] = []
        steps: list[Step] = []
        for place, pair in enumerate(wanted):
            step = self._narrow(place, *pair)
            inputs += step.inputs
            steps.append(step)
        network = Network(
            inputs, steps, [step.outputs[0] for step in steps], self.network.precision, self.network.device
        )
        planned = _planned(network)
        if planned is None:
            raise ValueError(f"model: no plan takes the layer {self.step.where!r} at other widths")
        found = step_seconds(planned, [_zeros(value) for value in inputs], _ALONE_ROUNDS)
        for step, pair in zip(steps[1:], wanted[1:], strict=True):
            if step.label in found:
                self.times[pair] = min(found[step.label], self.times.get(pair, found[step.label]))
        self.cache.clear()

    def _narrow(self, place: int, reads: int, makes: int) -> Step:
        """The step with so many channels; `place` tells it from others in one network."""
        layer = self.step.details
        assert isinstance(layer, Layer)
        out = max(
            1, round(layer.weight.shape[0] * makes / self.full[1])
        )  # phases of a transposed one are channels, too
        into = layer.weight.shape[1] if self.depthwise else max(1, round(layer.weight.shape[1] * reads / self.full[0]))
        groups = out if self.depthwise else layer.groups
        narrow = dataclasses.replace(
            layer,
            weight=layer.weight[:out, :into].contiguous(),
            weight_scale=None if layer.weight_scale is None else layer.weight_scale[:out],
            bias=None if layer.bias is None else layer.bias[:out],
            groups=groups,
            key=("alone", place),
        )
        x, *residual = self.step.inputs
        dim = 1 if self.step.kind == "conv2d" else len(x.shape or ()) - 1
        inputs = [_resized(x, f"x{place}", dim, into * groups)]
        inputs += [_resized(value, f"r{place}", dim, out) for value in residual]
        result = _resized(self.step.outputs[0], f"y{place}", dim, out)
        return dataclasses.replace(self.step, details=narrow, inputs=inputs, outputs=[result], where=str(place))


def _grid(full: int) -> list[int]:
    near = {max(PANEL, round(part * full / PANEL) * PANEL) for part in _FRACTIONS}
    return sorted({width for width in (PANEL, *near) if width < full} | {full})


def _kind(step: Step) -> Any:
    """Layers of one kind take the same time."""
    layer = step.details
    assert isinstance(layer, Layer)
    geometry = (layer.weight.shape, layer.stride, layer.padding, layer.dilation, layer.groups, layer.bias is None)
    values = tuple((value.shape, value.dtype, value.layout) for value in (*step.inputs, *step.outputs))
    return step.kind, geometry, values, step.activation, step.residual_order, step.quantized


def _resized(value: Value, name: str, dim: int, size: int) -> Value:
    shape = list(value.shape or ())
    shape[dim] = size
    return dataclasses.replace(value, name=name, shape=tuple(shape), constant=None)


def _zeros(value: Value) -> torch.Tensor:
    shape = [int(size) for size in value.shape or ()]
    layout = torch.channels_last if len(shape) == 4 else torch.contiguous_format
    return torch.zeros(shape, dtype=value.dtype).to(memory_format=layout)


def _size(value: Value) -> float:
    total = 1.0
    for size in value.shape or ():
        total *= float(size)
    return total


def _mixed(parts: Sequence[tuple[Mapping[str, float], float]], kind: str) -> dict[str, float]:
    """What makes the channels that a step moves: of a concatenation all that it reads, else the largest."""
    if not parts:
        return {}
    if kind != "cat":
        return dict(max(parts, key=lambda part: part[1])[0])
    whole = sum(size for _, size in parts) or 1.0
    found: dict[str, float] = defaultdict(float)
    for flow, size in parts:
        for layer, part in flow.items():
            found[layer] += part * size / whole
    return dict(found)


def _neighbours(axis: Sequence[int], at: int) -> tuple[int, int, float]:
    """The widths around `at` among those timed, and how far it lies between them; beyond the ends, the end's line."""
    if len(axis) == 1:
        return axis[0], axis[0], 0.0
    place = min(max(bisect_right(axis, at) - 1, 0), len(axis) - 2)
    low, high = axis[place], axis[place + 1]
    return low, high, (at - low) / (high - low)
