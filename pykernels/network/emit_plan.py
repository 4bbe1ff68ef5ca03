"""A network as plans: runs of steps that the CPU takes in one call each, `torch.ops.pykernels.run_plan`.

What a plan cannot do stays a call of torch's between two plans. A plan says which steps there are, not how large their
tensors are: that follows from the inputs of a call. What the numbers of a step mean stands in csrc/cpu/plan, before the
function of its kind.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import FloorDiv, Mod, PythonMod

from pykernels.graph.nodes import aliases_layout
from pykernels.network.emit_fx import Emitted, Emitter
from pykernels.network.plan import WEIGHTS, Planned, places
from pykernels.network.plan_format import DTYPES, UNTUNED, Program, Record, encode
from pykernels.network.step import Call, Concatenation, Layer, Lookup, Network, Pool, QParams, Step, Value
from pykernels.ops import names
from pykernels.ops.dtypes import REALS

aten = torch.ops.aten

__all__ = ["emit_plan"]

_ACTIVATIONS = {name: number for number, name in enumerate(names.ACTIVATIONS)}
_MAX_DIMS = 6
_NO_QUANTIZATION = QParams(1.0, 0, 0, 0, torch.uint8)


def emit_plan(network: Network, emitted: Emitted, weights: torch.Tensor) -> Planned | None:
    """The network with plans in it; None where no step can be planned.

    Args:
        emitted: the same network as `emit_fx` emitted it.
        weights: one uint8 tensor of which the buffers of that program are views; the plans read it.
    """
    planner = _Planner(network, emitted, weights)
    program = planner.run()
    if not planner.labels:
        return None
    return Planned(program, planner.labels, places(emitted.program, weights))


class _Unplanned(Exception):
    """A step that no plan can take."""


class _Segment:
    """A plan in the making: values by their numbers."""

    def __init__(self) -> None:
        self.inputs: list[Value] = []
        self.records: list[Record] = []  # what they read counts records from -1 downwards: the inputs are not all known
        self.labels: list[str] = []
        self.results: dict[Value, int] = {}  # the record that yields it
        self.channels_last: dict[Value, bool] = {}  # of results of four dimensions

    def number(self, value: Value) -> int:
        """An input from 0 upwards, or the result of a record from -1 downwards."""
        if value in self.results:
            return -1 - self.results[value]
        if value not in self.inputs:
            self.inputs.append(value)
        return self.inputs.index(value)

    def program(self, outputs: Sequence[Value], weight_bytes: int) -> tuple[Program, list[str]]:
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
            [(places[self.results[value]], self.channels_last[value]) for value in outputs],
        )
        return program, [self.labels[place] for place in places]


class _Planner(Emitter):
    def __init__(self, network: Network, emitted: Emitted, weights: torch.Tensor) -> None:
        super().__init__(network)
        self.emitted, self.weights = emitted, weights
        self.labels: dict[str, list[str]] = {}  # of each plan, what its steps stand for
        self.label = ""
        self.segment = _Segment()
        self.pieces: dict[Value, list[tuple[Value, list[int]]]] = {}  # of a tuple: slices of a value
        self.views: dict[Value, Step] = {}  # results of the segment that are views
        self.symbols: dict[Any, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for value in self.network.inputs:
            self.nodes[value] = self.graph.placeholder(value.name)
        self.steps = self.network.live()
        self.kept = _read_by_strides(self.steps)
        for place, step in enumerate(self.steps):
            self.place = place
            if self._plan(step):
                continue
            if step.has_effect or any(self._pending(value) for value in step.values):
                self._flush()
            self.nodes[step.outputs[0]] = self.emit(step)
        self.place = len(self.steps)
        self._flush()
        return self.finish()

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

    def _in_weights(self, key: Any) -> list[int]:
        """Where a constant begins among the weights, and its bytes."""
        found = getattr(self.emitted.program, self.emitted.names[key])
        offset, size = found.data_ptr() - self.weights.data_ptr(), found.numel() * found.element_size()
        if not 0 <= offset <= self.weights.numel() - size:
            raise _Unplanned  # state, which changes
        return [offset, size]

    # --- segments ---

    def _plan(self, step: Step) -> bool:
        """Take a step into the plan in hand, if it can be."""
        rule = _RULES.get(step.kind)
        self.label = ": ".join(filter(None, (step.where, step.what or step.kind)))
        records, inputs = len(self.segment.records), len(self.segment.inputs)
        try:
            if rule is None or step.has_effect or (step.kind == "move" and step.outputs[0] in self.kept):
                raise _Unplanned
            rule(self, step)
        except _Unplanned:
            for made, count in (("records", records), ("labels", records), ("inputs", inputs)):
                del getattr(self.segment, made)[count:]
            return False
        return True

    def _read(self, value: Any) -> int:
        """A tensor that a step reads: see `_Segment.number`."""
        if not isinstance(value, Value) or value.shape is None or value.dtype not in DTYPES:
            raise _Unplanned
        if len(value.shape) > _MAX_DIMS:
            raise _Unplanned
        if value.constant is not None:
            return self._constant(value)
        return self.segment.number(value)

    def _constant(self, value: Value) -> int:
        key = ("constant", value.name)
        if key not in self.emitted.names or not value.constant.is_contiguous():
            raise _Unplanned
        offset, _ = self._in_weights(key)
        return self._add("constant", [], [offset, DTYPES[value.dtype], *value.constant.shape])

    def _add(self, kind: str, inputs: Sequence[int], numbers: Sequence[Any] = (), reals: Sequence[float] = ()) -> int:
        """A record; its own number."""
        if not all(isinstance(number, int) for number in numbers):
            raise _Unplanned  # a size that varies
        self.segment.records.append(Record(kind, list(inputs), list(numbers), list(reals)))
        self.segment.labels.append(self.label)
        return -len(self.segment.records)

    def _yield(self, step: Step, number: int, channels_last: bool = False) -> None:
        """The step's result is that of a record, or one of the plan's inputs."""
        value = step.outputs[0]
        if value.shape is None or value.dtype not in DTYPES or len(value.shape) > _MAX_DIMS:
            raise _Unplanned
        if number >= 0:  # an input: outputs are results
            number = self._add("reshape", [number], [-2 - d for d in range(len(value.shape))])
        self.segment.results[value] = -1 - number
        self.segment.channels_last[value] = channels_last and len(value.shape) == 4

    def _last(self, value: Value) -> bool:
        """Whether a value probably lies channels_last."""
        return self.segment.channels_last.get(value, len(value.shape or ()) == 4)

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
        program, labels = segment.program(outputs, self.weights.numel())
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
            [int(segment.channels_last[value]) for value in outputs],
        )
        for place, value in enumerate(outputs):
            self.nodes[value] = self.call(operator.getitem, call, place)

    def _size(self, size: Any) -> Any:
        """A size as a number, or as a node that computes it from sizes of the network's inputs."""
        if isinstance(size, (int, sympy.Integer)):
            return int(size)
        if size in self.symbols:
            return self.symbols[size]
        if isinstance(size, sympy.Symbol):
            for value in self.network.inputs:
                if size in (value.shape or ()):
                    made = self.call(aten.sym_size.int, self.nodes[value], value.shape.index(size))
                    break
            else:
                raise ValueError(f"no input of the network has the size {size}")
        else:
            operation = next((f for kind, f in _ARITHMETIC.items() if isinstance(size, kind)), None)
            if operation is None:
                raise ValueError(f"a size of the network is {size}, which no call computes")
            first, *rest = (self._size(argument) for argument in size.args)
            made = first
            for argument in rest:
                made = self.call(operation, made, argument)
        self.symbols[size] = made
        return made

    # --- steps ---

    def plan_layer(self, step: Step) -> None:
        """Convolutions and linear layers."""
        layer, (x, *residual), (result,) = step.details, step.inputs, step.outputs
        assert isinstance(layer, Layer)
        linear, line = step.kind == "linear", step.kind == "conv2d" and len(x.shape) == 3
        operands = [self._read(value) for value in (x, *residual)]
        if line:
            operands = [self._add("reshape", [operand], [-2, -3, 1, -4]) for operand in operands]
        numbers = [*self._in_weights(layer.key), layer.weight.shape[0]]
        if not linear:
            kernel = (1, layer.weight.shape[2]) if line else layer.weight.shape[2:]
            numbers += [*kernel, *layer.stride, *layer.padding, *layer.dilation, layer.groups]
        given, made = _quantization(x), _quantization(result)
        added = _quantization(residual[0]) if residual else _NO_QUANTIZATION
        numbers += [_ACTIVATIONS[step.activation], int(step.residual_order == "after"), DTYPES[result.dtype]]
        numbers += [given.zero_point, made.zero_point, added.zero_point, *UNTUNED]
        number = self._add(step.kind, operands, numbers, [given.scale, made.scale, added.scale])
        if line:
            number = self._add("reshape", [number], [-2, -3, -5])
        self._yield(step, number, not linear)

    def plan_pool(self, step: Step) -> None:
        """Average and max pools."""
        (x,), (result,) = step.inputs, step.outputs
        assert isinstance(step.details, Pool)
        geometry, numbers = step.details.geometry, []
        source = self._read(x)
        if step.kind == "max_pool2d":
            kernel, stride, padding, dilation, ceil_mode = geometry
            numbers = [*kernel, *stride, *padding, *dilation, int(ceil_mode)]
        else:
            if step.kind == "avg_pool2d":
                kernel, stride, padding, ceil_mode, include, divisor = geometry
                numbers = [*kernel, *stride, *padding, 1, 1, int(ceil_mode), int(include), divisor or 0]
            else:
                numbers = list(geometry[0])
            given, made = _quantization(x), _quantization(result)
            numbers += [DTYPES[result.dtype], given.zero_point, made.zero_point]
        reals = [] if step.kind == "max_pool2d" else [given.scale, made.scale]
        self._yield(step, self._add(step.kind, [source], numbers, reals), self._last(x))

    def plan_conversion(self, step: Step) -> None:
        """To 8 bits and back."""
        (x,), (result,) = step.inputs, step.outputs
        params = result.quantization or x.quantization
        number = self._add(step.kind, [self._read(x)], [DTYPES[result.dtype], params.zero_point], [params.scale])
        self._yield(step, number, self._last(x))

    def plan_binary(self, step: Step) -> None:
        """Sums and products of two 8-bit tensors."""
        (a, b), out = step.inputs, step.out
        _check_pair(a, b)
        numbers = [a.quantization.zero_point, b.quantization.zero_point, DTYPES[out.dtype], out.zero_point]
        if step.kind == "add":
            numbers.append(_ACTIVATIONS[step.activation])
        reals = [a.quantization.scale, b.quantization.scale, out.scale]
        self._yield(step, self._add("q" + step.kind, [self._read(a), self._read(b)], numbers, reals), self._last(a))

    def plan_concatenation(self, step: Step) -> None:
        """Concatenations of 8-bit tensors."""
        assert isinstance(step.details, Concatenation)
        out, params = step.out, [x.quantization for x in step.inputs]
        numbers = [step.details.dim % len(step.inputs[0].shape), DTYPES[out.dtype], out.zero_point]
        numbers += [p.zero_point for p in params]
        reals = [out.scale, *(p.scale for p in params)]
        operands = [self._read(x) for x in step.inputs]
        self._yield(step, self._add("qcat", operands, numbers, reals), self._last(step.inputs[0]))

    def plan_table(self, step: Step) -> None:
        """Pointwise functions of 8-bit tensors."""
        assert isinstance(step.details, Lookup)
        table = step.details.table
        key = ("table", bytes(table.view(torch.uint8).tolist()), table.dtype)
        numbers = [self._in_weights(key)[0], DTYPES[table.dtype]]
        self._yield(step, self._add("qlookup", [self._read(step.inputs[0])], numbers), self._last(step.inputs[0]))

    def plan_call(self, step: Step) -> None:
        """Calls of torch's that a plan knows."""
        assert isinstance(step.details, Call)
        rule = _CALLS.get(step.details.target)
        if rule is None:
            raise _Unplanned
        rule(self, step, *step.details.args, **step.details.kwargs)
        if rule in _VIEWS:
            self.views[step.outputs[0]] = step

    # --- calls ---

    def plan_arithmetic(self, step: Step, a: Any, b: Any, alpha: Any = 1) -> None:
        """Sums and products of two floats."""
        kind = "mul" if step.details.target is aten.mul.Tensor else "add"
        less = step.details.target is aten.sub.Tensor
        if not isinstance(a, Value) or alpha != 1 or a.dtype not in REALS or step.outputs[0].dtype != a.dtype:
            raise _Unplanned
        if type(b) in (int, float) and a.dtype is torch.float32:
            self._yield(step, self._add(kind, [self._read(a)], reals=[-float(b) if less else float(b)]), self._last(a))
            return
        if less or not isinstance(b, Value) or a.dtype != b.dtype:
            raise _Unplanned
        if step.outputs[0].shape != a.shape:
            a, b = b, a
        _check_pair(a, b, channels=True)
        self._yield(step, self._add(kind, [self._read(a), self._read(b)]), self._last(a))

    def plan_cat(self, step: Step, values: Any, dim: int = 0) -> None:
        """A concatenation of what has one dtype."""
        if len({value.dtype for value in values}) != 1 or any(value.shape == (0,) for value in values):
            raise _Unplanned
        operands = [self._read(value) for value in values]
        number = self._add("cat", operands, [dim % len(values[0].shape)])
        self._yield(step, number, all(self._last(value) for value in values))

    def plan_reshape(self, step: Step, x: Any, *_: Any, **__: Any) -> None:
        """Other sizes for the same elements."""
        source, before, after = self._read(x), x.shape, step.outputs[0].shape
        sizes: list[int] = []
        for size in after or ():
            if isinstance(size, int):
                sizes.append(size)
            elif size in before:
                sizes.append(-2 - before.index(size))
            elif -1 not in sizes:
                sizes.append(-1)
            else:
                raise _Unplanned
        self._yield(step, self._add("reshape", [source], sizes))

    def plan_permute(self, step: Step, x: Any, dims: Sequence[int]) -> None:
        """Dimensions in another order."""
        source = self._read(x)
        self._yield(step, self._add("permute", [source], [d % len(x.shape) for d in dims]))

    def plan_transpose(self, step: Step, x: Any, first: int = 0, second: int = 1) -> None:
        """Two dimensions exchanged."""
        if not isinstance(x, Value) or x.shape is None or len(x.shape) < 2:
            raise _Unplanned
        order = list(range(len(x.shape)))
        order[first], order[second] = order[second], order[first]
        self.plan_permute(step, x, order)

    def plan_slice(self, step: Step, x: Any, dim: int = 0, start: Any = None, end: Any = None, stride: int = 1) -> None:
        """Every `stride`-th element from `start` to `end`."""
        source = self._read(x)
        last = torch.iinfo(torch.int64).max
        numbers = [dim % len(x.shape), 0 if start is None else start, last if end is None else end, stride]
        self._yield(step, self._add("slice", [source], numbers))

    def plan_select(self, step: Step, x: Any, dim: int, index: Any) -> None:
        """One element along a dimension, which vanishes."""
        source, rank = self._read(x), len(x.shape)
        if not isinstance(index, int):
            raise _Unplanned
        dim %= rank
        end = torch.iinfo(torch.int64).max if index == -1 else index + 1
        piece = self._add("slice", [source], [dim, index, end, 1])
        self._yield(step, self._add("reshape", [piece], [-2 - d for d in range(rank) if d != dim]))

    def plan_pieces(self, step: Step, x: Any, _: Any, dim: int = 0) -> None:
        """What `split` and `chunk` yield: each piece is planned where it is read."""
        self._read(x)
        shapes = [leaf.shape for leaf in step.output.meta["val"]]
        rank, start, pieces = len(x.shape), 0, []
        for shape in shapes:
            if not isinstance(shape[dim], int):
                raise _Unplanned
            pieces.append((x, [dim % rank, start, start + shape[dim], 1]))
            start += shape[dim]
        self.pieces[step.outputs[0]] = pieces

    def plan_piece(self, step: Step, pieces: Any, place: int) -> None:
        """One of them."""
        if pieces not in self.pieces:
            raise _Unplanned
        x, numbers = self.pieces[pieces][place]
        self._yield(step, self._add("slice", [self._read(x)], numbers))

    def plan_expand(self, step: Step, x: Any, *_: Any, **__: Any) -> None:
        """Dimensions of size 1 repeated."""
        source, before, after = self._read(x), x.shape, step.outputs[0].shape
        new = len(after) - len(before)
        sizes = [-1 if d >= new and size == before[d - new] else size for d, size in enumerate(after)]
        self._yield(step, self._add("expand", [source], sizes))

    def plan_pad(self, step: Step, x: Any, pads: Sequence[Any], value: Any = 0) -> None:
        """Constants around a tensor."""
        if any(not isinstance(size, int) or size < 0 for size in pads) or not isinstance(value, (int, float)):
            raise _Unplanned
        self._yield(step, self._add("pad", [self._read(x)], pads, [float(value or 0)]), self._last(x))

    def plan_same(self, step: Step, x: Any, *_: Any, memory_format: Any = None, **__: Any) -> None:
        """A copy that nobody tells from the original, or one in another memory format."""
        source = self._read(x)
        if memory_format in (torch.contiguous_format, torch.channels_last):
            last = memory_format is torch.channels_last
            self._yield(step, self._add("contiguous", [source], [int(last)]), last)
        elif memory_format in (None, torch.preserve_format):
            self._yield(step, source, self._last(x))
        else:
            raise _Unplanned

    def plan_contiguous(self, step: Step, x: Any, memory_format: Any = torch.contiguous_format) -> None:
        """In a memory format."""
        self.plan_same(step, x, memory_format=memory_format)

    def plan_cast(self, step: Step, x: Any, dtype: Any, *rest: Any, **__: Any) -> None:
        """Another float dtype."""
        source = self._read(x)
        if x.dtype not in REALS or dtype not in REALS or any(rest):
            raise _Unplanned
        self._yield(step, self._add("cast", [source], [DTYPES[dtype]]), self._last(x))


_RULES: dict[str, Callable[[_Planner, Step], None]] = {
    "conv2d": _Planner.plan_layer,
    "linear": _Planner.plan_layer,
    "max_pool2d": _Planner.plan_pool,
    "avg_pool2d": _Planner.plan_pool,
    "adaptive_avg_pool2d": _Planner.plan_pool,
    "quantize": _Planner.plan_conversion,
    "dequantize": _Planner.plan_conversion,
    "add": _Planner.plan_binary,
    "mul": _Planner.plan_binary,
    "cat": _Planner.plan_concatenation,
    "lookup": _Planner.plan_table,
    "move": _Planner.plan_call,
    "cast": _Planner.plan_call,
    "torch": _Planner.plan_call,
}
_CALLS: dict[Any, Callable[..., None]] = {
    aten.add.Tensor: _Planner.plan_arithmetic,
    aten.mul.Tensor: _Planner.plan_arithmetic,
    aten.sub.Tensor: _Planner.plan_arithmetic,
    aten.cat.default: _Planner.plan_cat,
    aten.reshape.default: _Planner.plan_reshape,
    aten.view.default: _Planner.plan_reshape,
    aten._unsafe_view.default: _Planner.plan_reshape,
    aten.flatten.using_ints: _Planner.plan_reshape,
    aten.unflatten.int: _Planner.plan_reshape,
    aten.squeeze.dim: _Planner.plan_reshape,
    aten.squeeze.dims: _Planner.plan_reshape,
    aten.unsqueeze.default: _Planner.plan_reshape,
    aten.permute.default: _Planner.plan_permute,
    aten.transpose.int: _Planner.plan_transpose,
    aten.t.default: _Planner.plan_transpose,
    aten.slice.Tensor: _Planner.plan_slice,
    aten.select.int: _Planner.plan_select,
    aten.chunk.default: _Planner.plan_pieces,
    aten.split.Tensor: _Planner.plan_pieces,
    aten.split_with_sizes.default: _Planner.plan_pieces,
    operator.getitem: _Planner.plan_piece,
    aten.expand.default: _Planner.plan_expand,
    aten.constant_pad_nd.default: _Planner.plan_pad,
    aten.clone.default: _Planner.plan_same,
    aten.alias.default: _Planner.plan_same,
    aten.detach.default: _Planner.plan_same,
    aten.contiguous.default: _Planner.plan_contiguous,
    aten.to.dtype: _Planner.plan_cast,
}
_VIEWS = (
    _Planner.plan_reshape,
    _Planner.plan_permute,
    _Planner.plan_transpose,
    _Planner.plan_slice,
    _Planner.plan_select,
    _Planner.plan_pieces,
    _Planner.plan_piece,
    _Planner.plan_expand,
)
_ARITHMETIC: dict[Any, Any] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    FloorDiv: operator.floordiv,
    Mod: operator.mod,
    PythonMod: operator.mod,
    sympy.Max: torch.sym_max,
    sympy.Min: torch.sym_min,
}


def _read_by_strides(steps: Sequence[Step]) -> set[Value]:
    """Values whose memory beyond their elements calls like ``as_strided`` may read, and what these are views of."""
    found: set[Value] = set()
    for step in reversed(steps):
        if aliases_layout(step.output) or (step.kind == "move" and step.outputs[0] in found):
            found.update(step.values)
    return found


def _quantization(value: Value) -> QParams:
    return value.quantization or _NO_QUANTIZATION


def _check_pair(a: Any, b: Any, channels: bool = False) -> None:
    """Two tensors of one shape, or [N, C, H, W] and [N, C, 1, 1]; with `channels` b may have one element a channel, or
    one at all."""
    if not isinstance(a, Value) or not isinstance(b, Value) or a.shape is None or b.shape is None:
        raise _Unplanned
    image = len(a.shape) == 4
    if a.shape == b.shape or (image and b.shape == (*a.shape[:2], 1, 1)):
        return
    one = (1,) * (len(a.shape) - len(b.shape)) + b.shape
    kinds = [(1,) * len(a.shape), (*(1,) * (len(a.shape) - 1), *a.shape[-1:])]
    kinds += [(1, a.shape[1], 1, 1)] if image else []
    if not channels or len(b.shape) > len(a.shape) or one not in kinds:
        raise _Unplanned
