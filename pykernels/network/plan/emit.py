"""A network as plans: runs of steps that the CPU takes in one call each, `torch.ops.pykernels.run_plan`.

What a plan cannot do stays a call of torch's between two plans. A plan says which steps there are, not how large their
tensors are: that follows from the inputs of a call. What the numbers of a step mean stands in csrc/cpu/plan, before the
function of its kind.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from pykernels.graph.nodes import aliases_layout
from pykernels.network.emit_fx import Emitted, Emitter
from pykernels.network.plan.format import DTYPES, Program, Record, encode
from pykernels.network.plan.planned import WEIGHTS, Planned, places
from pykernels.network.plan.rules import RULES, Unplanned
from pykernels.network.step import Call, Layer, Network, Step, Value

aten = torch.ops.aten

__all__ = ["emit_plan"]

_MAX_DIMS, _MAX_STEPS = 6, 4096  # csrc/cpu/plan/format.h: kMaxDims, and half of kMaxSteps: a step may take two


def emit_plan(network: Network, emitted: Emitted, weights: torch.Tensor) -> Planned | None:
    """The network with plans in it; None where no step can be planned.

    Args:
        emitted: the same network as `emit_fx` emitted it.
        weights: one uint8 tensor of which the buffers of that program are views; the plans read it.
    """
    planner = Planner(network, emitted, weights)
    program = planner.run()
    if not planner.labels:
        return None
    return Planned(program, planner.labels, places(emitted.program, weights))


class _Segment:
    """A plan in the making: values by their numbers."""

    def __init__(self) -> None:
        self.inputs: list[Value] = []
        self.records: list[Record] = []  # what they read counts records from -1 downwards: the inputs are not all known
        self.labels: list[str] = []
        self.results: dict[Value, int] = {}  # the record that yields it

    def number(self, value: Value) -> int:
        """An input from 0 upwards, or the result of a record from -1 downwards."""
        if value in self.results:
            return -1 - self.results[value]
        if value not in self.inputs:
            self.inputs.append(value)
        return self.inputs.index(value)

    def program(
        self, outputs: Sequence[Value], channels_last: Mapping[Value, bool], weight_bytes: int
    ) -> tuple[Program, list[str]]:
        """The plan that yields these values, and what its steps stand for; what none of them needs is left out."""
        needed = {self.results[value] for value in outputs}
        for place in reversed(range(len(self.records))):
            if place in needed:
                needed.update(-1 - source for source in self.records[place].inputs if source < 0)
        places = {place: len(self.inputs) + number for number, place in enumerate(sorted(needed))}
        for record in self.records:
            record.inputs = [source if source >= 0 else places.get(-1 - source, 0) for source in record.inputs]
        program = Program(
            weight_bytes,
            [(DTYPES[value.dtype], len(value.shape or ())) for value in self.inputs],
            [self.records[place] for place in places],
            [(places[self.results[value]], channels_last[value]) for value in outputs],
        )
        return program, [self.labels[place] for place in places]


class Planner(Emitter):
    def __init__(self, network: Network, emitted: Emitted, weights: torch.Tensor) -> None:
        super().__init__(network)
        self.emitted, self.weights = emitted, weights
        self.labels: dict[str, list[str]] = {}  # of each plan, what its steps stand for
        self.label = ""
        self.segment = _Segment()
        self.channels_last: dict[Value, bool] = {}  # of values of four dimensions
        # Of a tuple: slices, and whether they lose their dimension.
        self.pieces: dict[Value, list[tuple[Value, list[int], bool]]] = {}
        self.views: dict[Value, Step] = {}  # results of the segment that are views
        self.free = {  # sizes that vary, with an input and a dimension that have it
            size: (value, dim)
            for value in reversed(network.inputs)
            for dim, size in enumerate(value.shape or ())
            if not _is_number(size)
        }
        # And what such a size is a multiple of, with the factor: a height of 8 r says how large r is.
        self.bases = {
            base: (size, int(factor))
            for size in self.free
            for factor, base in (size.as_coeff_Mul(),)
            if base.is_Symbol and base not in self.free
        }
        self.sizes: dict[Any, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for value in self.network.inputs:
            self.nodes[value] = self.graph.placeholder(value.name)
            self.channels_last[value] = value.layout is torch.channels_last
        self.steps = self.network.live()
        self.kept = _read_by_strides(self.steps)
        for place, step in enumerate(self.steps):
            self.place = place
            if len(self.segment.records) >= _MAX_STEPS:
                self._flush()
            if self._plan(step) or self._known_size(step):
                continue
            if step.has_effect or any(self._pending(value) for value in step.values):
                self._flush()
            self.nodes[step.outputs[0]] = self.emit(step)
            # Most of torch's functions keep the memory format of what they read.
            images = [self.last(value) for value in step.values if len(value.shape or ()) == 4]
            self.channels_last[step.outputs[0]] = bool(images) and all(images)
        self.place = len(self.steps)
        self._flush()
        return self.finish()

    def _known_size(self, step: Step) -> bool:
        """Take a size that somebody asks of a tensor from the inputs, so that the tensor need not be there yet."""
        if not isinstance(step.details, Call) or step.details.target is not aten.sym_size.int:
            return False
        value, dim = step.details.args
        if not isinstance(value, Value) or value.shape is None or not self._computable(value.shape[dim]):
            return False
        self.nodes[step.outputs[0]] = self._size(value.shape[dim])
        return True

    def _pending(self, value: Value) -> bool:
        return value in self.segment.results or value in self.pieces

    # --- constants: those of the program that emit_fx made ---

    def packed(self, step: Step, layer: Layer, weight: torch.Tensor) -> fx.Node:
        return self._attribute(None, "", layer.key)

    def _attribute(self, value: Any, name: str, key: Any) -> fx.Node:
        if key not in self.constants:
            name = self.emitted.names[key]
            found = getattr(self.emitted.program, name)
            if isinstance(found, torch.Tensor):
                self.root.register_buffer(name, found)
            else:
                self.root.add_module(name, found)
            self.constants[key] = self.graph.get_attr(name)
        return self.constants[key]

    def in_weights(self, key: Any) -> list[int]:
        """Where a constant begins among the weights, and its bytes."""
        found = getattr(self.emitted.program, self.emitted.names[key])
        offset, size = found.data_ptr() - self.weights.data_ptr(), found.numel() * found.element_size()
        if not 0 <= offset <= self.weights.numel() - size:
            raise Unplanned  # state, which changes
        return [offset, size]

    # --- segments ---

    def _plan(self, step: Step) -> bool:
        """Take a step into the plan in hand, if it can be."""
        rule = RULES.get(step.kind)
        self.label = step.label
        records, inputs = len(self.segment.records), len(self.segment.inputs)
        try:
            if rule is None or step.has_effect or (step.kind == "move" and step.outputs[0] in self.kept):
                raise Unplanned
            rule(self, step)
        except Unplanned:
            for made, count in (("records", records), ("labels", records), ("inputs", inputs)):
                del getattr(self.segment, made)[count:]
            return False
        return True

    def read(self, value: Any) -> int:
        """A tensor that a step reads: see `_Segment.number`."""
        if not isinstance(value, Value) or value.shape is None or value.dtype not in DTYPES:
            raise Unplanned
        if len(value.shape) > _MAX_DIMS:
            raise Unplanned
        if value.constant is not None:
            return self._constant(value)
        return self.segment.number(value)

    def sized(self, size: Sequence[Any]) -> int:
        """An image of this height and width among what the plan has."""
        for value in (*self.segment.results, *self.segment.inputs):
            if value.shape is not None and len(value.shape) == 4 and value.shape[2:] == tuple(size):
                return self.read(value)
        raise Unplanned

    def _constant(self, value: Value) -> int:
        key = ("constant", value.name)
        if key not in self.emitted.names or not value.constant.is_contiguous():
            raise Unplanned
        offset, _ = self.in_weights(key)
        return self.add("constant", [], [offset, DTYPES[value.dtype], *value.constant.shape])

    def add(self, kind: str, inputs: Sequence[int], numbers: Sequence[Any] = (), reals: Sequence[float] = ()) -> int:
        """A record; its own number."""
        if not all(isinstance(number, int) for number in numbers):
            raise Unplanned  # a size that varies
        self.segment.records.append(Record(kind, list(inputs), list(numbers), list(reals)))
        self.segment.labels.append(self.label)
        return -len(self.segment.records)

    def result(self, step: Step, number: int, channels_last: bool = False) -> None:
        """The step's result is that of a record, or one of the plan's inputs."""
        value = step.outputs[0]
        if value.shape is None or value.dtype not in DTYPES or len(value.shape) > _MAX_DIMS:
            raise Unplanned
        if not all(self._computable(size) for size in value.shape):
            raise Unplanned
        if number >= 0:  # an input: outputs are results
            number = self.add("reshape", [number], [-2 - d for d in range(len(value.shape))])
        self.segment.results[value] = -1 - number
        self.channels_last[value] = channels_last and len(value.shape) == 4

    def last(self, value: Value) -> bool:
        """Whether a value lies channels_last, as far as can be told before there are inputs."""
        return self.channels_last.get(value, False)

    def _flush(self) -> None:
        """Call the plan in hand."""
        segment, views, self.segment, self.views, self.pieces = self.segment, self.views, _Segment(), {}, {}
        read = {value for step in self.steps[self.place :] for value in step.values}
        returned = [value for value in self.network.outputs if isinstance(value, Value) and value in segment.results]
        # Views that torch reads are torch's, so that their strides are what they are in the graph of ops.
        tail: dict[Value, Step] = {}
        outputs = dict.fromkeys(value for value in returned if value not in read)
        pending = [value for value in (*segment.results, *views) if value in read]
        while pending:
            value = pending.pop()
            if value in views:
                tail[value] = views[value]
                pending += [source for source in views[value].values if source in segment.results or source in views]
            else:
                outputs[value] = None
        if outputs:
            self._call(segment, list(outputs))
        for step in self.steps:
            if step.outputs[0] in tail:
                self.nodes[step.outputs[0]] = self.emit(step)

    def _call(self, segment: _Segment, outputs: list[Value]) -> None:
        """The plan that yields these values, and its call."""
        program, labels = segment.program(outputs, self.channels_last, self.weights.numel())
        plan, name = encode(program), f"plan_{len(self.labels) + 1}"
        self.labels[name] = labels
        self.root.register_buffer(name, plan)
        if not hasattr(self.root, WEIGHTS):
            self.root.register_buffer(WEIGHTS, self.weights)
        sizes = [self._size(size) for value in outputs for size in value.shape]
        call = self.call(
            torch.ops.pykernels.run_plan.default,
            self.graph.get_attr(name),
            self.graph.get_attr(WEIGHTS),
            [self._node(value) for value in segment.inputs],
            sizes,
            [len(value.shape) for value in outputs],
            [DTYPES[value.dtype] for value in outputs],
            [int(self.channels_last[value]) for value in outputs],
        )
        for place, value in enumerate(outputs):
            self.nodes[value] = self.call(operator.getitem, call, place)

    def _computable(self, size: Any) -> bool:
        """Whether a size follows from sizes of the network's inputs, by functions that we know."""
        if _is_number(size) or size in self.free or size in self.bases:
            return True
        return _operation(size) is not None and all(map(self._computable, size.args))

    def _size(self, size: Any) -> Any:
        """A computable size as a number, or as a node."""
        if _is_number(size):
            return int(size)
        if size not in self.sizes:
            if size in self.free:
                value, dim = self.free[size]
                made = self.call(aten.sym_size.int, self.nodes[value], dim)
            elif size in self.bases:
                whole, factor = self.bases[size]
                made = self.call(operator.floordiv, self._size(whole), factor)
            else:
                made, *rest = (self._size(argument) for argument in size.args)
                for argument in rest:
                    made = self.call(_operation(size), made, argument)
            self.sizes[size] = made
        return self.sizes[size]


@functools.cache
def _arithmetic() -> dict[Any, Any]:
    import sympy  # half a second, which networks of fixed sizes do without
    from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

    return {
        sympy.Add: operator.add,
        sympy.Mul: operator.mul,
        FloorDiv: operator.floordiv,
        Mod: operator.mod,
        PythonMod: operator.mod,
        sympy.Max: torch.sym_max,
        sympy.Min: torch.sym_min,
        sympy.Pow: operator.pow,
    }


def _is_number(size: Any) -> bool:
    return isinstance(size, int) or size.is_Integer


def _operation(size: Any) -> Any:
    """The function that a symbolic size is of its arguments."""
    return next((function for kind, function in _arithmetic().items() if isinstance(size, kind)), None)


def _read_by_strides(steps: Sequence[Step]) -> set[Value]:
    """Values whose memory beyond their elements calls like ``as_strided`` may read, and what these are views of."""
    found: set[Value] = set()
    for step in reversed(steps):
        if aliases_layout(step.output) or (step.kind == "move" and step.outputs[0] in found):
            found.update(step.values)
    return found
