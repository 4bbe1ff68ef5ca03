"""A quantized graph of which some steps are float again: every assignment of precisions from one calibration.

Ranges are observed on the float network, so they hold for any assignment. A graph with quantizers in which a step's
weight is the float one, and nobody but int8 steps reads through quantizers, is what PT2E would have made of it.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch.fx import GraphModule, Node

from pykernels.graph.nodes import argument, constant, is_call, module_path
from pykernels.graph.qdq import DEQUANTIZE, QUANTIZE, qparams
from pykernels.network.assemble import words
from pykernels.quantization.quantizer import AVERAGES, LAYERS
from pykernels.quantization.recipes import Calibrated

__all__ = ["Chooseable", "Fitted", "Mixture", "Tensor8"]

# Of layers, by node name: int8 weights, and the bias that goes with them.
Fitted = Mapping[str, tuple[torch.Tensor, "torch.Tensor | None"]]


@dataclass
class Chooseable:
    """A step whose precision is chosen.

    Attributes:
        name: of its layer's call, or of its only one.
        nodes: names of all its calls.
        reads, writes: values, by their places.
        follows, only_bytes: as in `choose.StepCost`.
    """

    name: str
    where: str
    what: str
    nodes: frozenset[str]
    layer: bool
    reads: list[int] = field(default_factory=list)
    writes: int | None = None

    follows: bool = False
    only_bytes: bool = False


@dataclass
class Tensor8:
    """A value that some int8 step wants in 8 bits.

    Attributes:
        name: of the node that makes it.
        quantizer: the name of a quantize call that reads it.
        float_reader, keeps: as in `choose.ValueCost`.
    """

    name: str
    quantizer: str
    float_reader: bool = False
    keeps: bool = False


class Mixture:
    """The steps of a calibrated model, and its graph in any assignment of int8 to them.

    Attributes:
        steps: in the order of execution.
        values: what they exchange.
        calibrated: the graph, in which all are int8, with weights at the nearest values.
    """

    def __init__(self, calibrated: Calibrated) -> None:
        self.calibrated = calibrated
        self.steps: list[Chooseable] = []
        self.values: list[Tensor8] = []
        self._owner: dict[str, int] = {}
        module = calibrated.captured.module
        for step in calibrated.steps:
            layer = step.kind in LAYERS
            anchor = next((n for n in step.nodes if n.name in calibrated.weights), step.nodes[0])
            for node in step.nodes:
                self._owner[node.name] = len(self.steps)
            nodes = frozenset(node.name for node in step.nodes)
            self.steps.append(
                Chooseable(
                    anchor.name,
                    module_path(anchor),
                    words(step),
                    nodes,
                    layer,
                    follows=not layer,
                    only_bytes=not layer and step.kind not in AVERAGES,
                )
            )
        places: dict[Node, int] = {}
        for quantize in module.graph.nodes:
            if not is_call(quantize, QUANTIZE):
                continue
            source = quantize.args[0]
            producer = self._owner.get(source.name)
            for user in _readers(quantize):
                reader = self._owner.get(user.name)
                if reader is not None and reader == producer:
                    continue
                if source not in places:
                    places[source] = len(self.values)
                    self.values.append(Tensor8(source.name, quantize.name))
                    if producer is not None:
                        self.steps[producer].writes = places[source]
                place = places[source]
                if reader is None:
                    self.values[place].float_reader = True
                elif place not in self.steps[reader].reads:
                    self.steps[reader].reads.append(place)
            direct = [user for user in source.users if not is_call(user, QUANTIZE)]
            if source in places and any(user.name not in self._owner for user in direct):
                self.values[places[source]].float_reader = True
        self._find_keepers(module)

    def _find_keepers(self, module: GraphModule) -> None:
        nodes = {node.name: node for node in module.graph.nodes}
        parameters = [qparams(module, nodes[value.quantizer]) for value in self.values]
        for step in self.steps:
            if not step.layer and step.writes is not None and step.reads:
                made = parameters[step.writes]
                self.values[step.writes].keeps = made is not None and all(parameters[r] == made for r in step.reads)

    def graph(self, int8: Collection[int], fitted: Fitted | None = None) -> GraphModule:
        """A copy in which these steps, by their places, are int8.

        Args:
            fitted: weights and biases of layers, by name, in place of the nearest values and the model's biases.
        """
        module = copy.deepcopy(self.calibrated.captured.module)
        nodes = {node.name: node for node in module.graph.nodes}
        chosen = {name for name, place in self._owner.items() if place in int8}
        wanted = {
            quantize.args[0]
            for quantize in nodes.values()
            if is_call(quantize, QUANTIZE) and any(user.name in chosen for user in _readers(quantize))
        }
        for quantize in nodes.values():
            if not is_call(quantize, QUANTIZE):
                continue
            source = quantize.args[0]
            made = source.name in chosen
            for dequantize in list(quantize.users):
                for user in list(dequantize.users):
                    # A float reader takes floats where there are some; an int8 step that has written bytes has none.
                    if user.name not in chosen and not (made and source in wanted and self._apart(source, user)):
                        user.replace_input_with(dequantize, source)
        for place, step in enumerate(self.steps):
            if not step.layer:
                continue
            node = nodes[step.name]
            if place not in int8:
                self._set(module, node, 1, f"{step.name}_float_weight", self.calibrated.weights[step.name])
            elif fitted is not None:
                weight, bias = fitted[step.name]
                self._set(module, node.args[1], 0, f"{step.name}_fitted_weight", weight)
                if bias is not None:
                    self._set(module, node, 2, f"{step.name}_fitted_bias", bias)
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        return module

    def fitted(self, module: GraphModule) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
        """The weights and biases of a graph whose layers are all int8."""
        found = {}
        nodes = {node.name: node for node in module.graph.nodes}
        for step in self.steps:
            if step.layer:
                node = nodes[step.name]
                weight = operator.attrgetter(str(node.args[1].args[0].target))(module)
                found[step.name] = weight.clone(), constant(module, argument(node, "bias"))
        return found

    def _apart(self, source: Node, user: Node) -> bool:
        """Whether a value leaves its step on the way to this reader."""
        return self._owner.get(source.name) != self._owner.get(user.name)

    @staticmethod
    def _set(module: GraphModule, node: Node, place: int, name: str, tensor: torch.Tensor) -> None:
        """Make an argument of a call this constant."""
        module.register_buffer(name, tensor)
        old = node.args[place] if len(node.args) > place else None
        with module.graph.inserting_before(node):
            new = module.graph.get_attr(name)
        if isinstance(old, Node):
            new.meta = dict(old.meta)
        args = list(node.args) + [None] * (place + 1 - len(node.args))
        args[place] = new
        node.args = tuple(args)


def _readers(quantize: Node) -> list[Node]:
    return [user for dequantize in quantize.users if is_call(dequantize, DEQUANTIZE) for user in dequantize.users]
