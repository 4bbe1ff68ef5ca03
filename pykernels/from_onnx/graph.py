"""From an ONNX file to a torch.fx graph, which `optimize` takes like any other model.

Each node is a call of a function of the table, or of ``torch.ops.quantized_decomposed``; torch.export makes ATen calls
of them. Sizes are computed by Python while it does, so a free size stays free: see `sizes`. What depends on constants
alone is computed here.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import os
import pathlib
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from pykernels.from_onnx import layers, moves, older, pointwise, recurrent, resize, sizes  # noqa: F401  (they fill the table)
from pykernels.from_onnx.file import dtype_of, read, require, tensor_of
from pykernels.from_onnx.inputs import Declared, Source
from pykernels.from_onnx.qoperators import between_quantizers
from pykernels.from_onnx.quantizers import dequantize, quantize
from pykernels.from_onnx.table import OLDER, ON_SIZES, OPERATORS, Operator, Refused, refusals
from pykernels.ops.errors import reason

__all__ = ["load"]


def load(path: str | os.PathLike[str]) -> fx.GraphModule:
    """Read an ONNX file as a graph module: positional inputs in the file's order and by its names.

    One output is the answer itself; several are a dictionary by the file's names. Quantize and dequantize nodes become
    calls of ``torch.ops.quantized_decomposed``, as PT2E's conversion makes them.

    Raises:
        ImportError: onnx is not installed.
        ValueError: it is no valid ONNX file, it names data outside its folder, or it has operators, or ways to use
            them, that are not understood: all of them are named, with their nodes.
        OSError: it cannot be read.
    """
    file = pathlib.Path(path)
    try:
        model, tensors = read(file)
        opset = next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
        reader = _Reader(model.graph, opset, tensors, file.parent)
        module = reader.module()
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    module.meta["onnx"] = Source(file, reader.inputs)
    return module


class _Reader:
    """Values are constants (tensors), nodes that yield tensors, and nodes that yield sizes: numbers, or lists."""

    def __init__(
        self,
        graph: Any,
        opset: int,
        tensors: dict[str, torch.Tensor],
        folder: pathlib.Path,
        outside: _Reader | None = None,
    ) -> None:
        self.source, self.opset, self.folder, self.outside = graph, opset, folder, outside
        self.graph, self.root = fx.Graph(), nn.Module()
        self.values: dict[str, torch.Tensor | fx.Node | None] = dict(tensors)  # None: of a node that is not understood
        self.sizes: set[fx.Node] = set()
        self.counts: set[fx.Node] = set()  # of these, those that say how many sizes there are
        self.held: dict[int, fx.Node] = {}  # constants in the graph, by identity
        self.given: list[fx.Node] = []  # of a branch: nodes outside, in the order of its placeholders
        self.inputs: list[Declared] = []
        self.refused: list[tuple[str, str, str]] = []  # operator, name of the node, why
        self.read = Counter(_names_read(graph))

    def module(self) -> fx.GraphModule:
        importlib.import_module("torch.ao.quantization.fx._decomposed")  # declares quantized_decomposed
        if self.source.sparse_initializer:
            raise ValueError("sparse initializers are not understood")
        for value in self.source.input:
            if value.name not in self.values:
                self._input(value)
        for node in between_quantizers(_needed(self.source)):
            self._node(node)
        if self.refused:
            raise ValueError(f"not understood: {refusals(self.refused)}")
        outputs = {value.name: self._tensor(self.values[value.name], value.name) for value in self.source.output}
        self.graph.output(next(iter(outputs.values())) if len(outputs) == 1 else outputs)
        self.graph.eliminate_dead_code()
        module = fx.GraphModule(self.root, self.graph, "ONNX")
        return module.eval()

    def _input(self, value: Any) -> None:
        kind = value.type
        if not kind.HasField("tensor_type") or not kind.tensor_type.HasField("shape"):
            raise ValueError(f"input {value.name}: it is no tensor of known dimensions")
        dims = kind.tensor_type.shape.dim
        shape = tuple(d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in dims)
        if any(isinstance(size, int) and size < 1 for size in shape):
            raise ValueError(f"input {value.name}: its sizes are {list(shape)}")
        self.inputs.append(Declared(value.name, dtype_of(kind.tensor_type.elem_type, f"input {value.name}"), shape))
        self.values[value.name] = self.graph.placeholder(_identifier(value.name, "input"))

    def _node(self, node: Any) -> None:
        inputs = [self.values.get(name, _NOTHING) if name else _NOTHING for name in node.input]
        kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        name = node.name or next(iter(node.output), "")
        results: Any = None
        try:
            if self._entry(kind) is not None or kind in _OWN:
                # after what is not understood nothing is said of what reads it
                results = None if any(value is None for value in inputs) else self._convert(kind, node, inputs)
            else:
                self.refused.append((kind, name, ""))
        except Refused as why:
            self.refused.append((kind, name, str(why)))
        several = results if isinstance(results, tuple) else (results,)
        for value in several:
            if isinstance(value, fx.Node) and value.op == "call_function":
                value.meta.setdefault("onnx", (kind, name))
        for position, output in enumerate(node.output):
            self.values[output] = several[position] if position < len(several) else None

    def _entry(self, kind: str) -> Operator | None:
        """An operator as it is in the file's opset."""
        before, entry = OLDER.get(kind, (0, None))
        return entry if self.opset < before else OPERATORS.get(kind)

    def _convert(self, kind: str, node: Any, inputs: list[Any]) -> Any:
        if kind == "If":
            return self._choice(node, inputs[0])
        attributes = {a.name: self._attribute(a) for a in node.attribute}
        if kind == "Constant":
            return _constant(attributes)
        if kind in ("QuantizeLinear", "DequantizeLinear"):
            return self._quantizer(kind, inputs, attributes, node.output[0])
        if kind in ("Shape", "Size"):
            count = sizes.shape if kind == "Shape" else sizes.size
            if isinstance(inputs[0], fx.Node):
                result = self._sized(self.graph.call_function(count, (inputs[0],), attributes))
                self.counts.update({result} if inputs[0] in self.sizes else ())
                return result
            return sizes.tensor(count(inputs[0], **attributes))
        entry = self._entry(kind)
        assert entry is not None
        given = [value for value in inputs if value is not _NOTHING]
        if kind == "ConstantOfShape":
            filled = attributes.pop("value", torch.zeros(1)).reshape(-1)
            if filled.numel() != 1:
                raise Refused("its value is not one number")
            attributes = {"value": filled.item(), "dtype": filled.dtype}
        of_sizes = kind in ON_SIZES and (kind != "ConstantOfShape" or given[0] in self.counts)
        if of_sizes and any(_is_node(v) for v in given) and all(self._small(value) for value in given):
            numbers = [_listed(value) if isinstance(value, torch.Tensor) else value for value in given]
            result = self._sized(self.graph.call_function(ON_SIZES[kind], tuple(numbers), attributes))
            self.counts.update({result} if self.counts.issuperset(filter(_is_node, given)) else ())
            return result
        if any(name and self.read[name] for name in node.output[1:]) and not entry.several:
            raise Refused("more than its first output is read")
        args: list[Any] = []
        computed = not any(_is_node(value) for value in given)
        names = entry.parameters(len(inputs))
        as_numbers = entry.numbers and any(
            _is_node(value) and value not in self.sizes and name != "condition"
            for name, value in zip(names, inputs, strict=False)
        )
        for name, value in zip(names, inputs, strict=False):
            if value is _NOTHING:
                args.append(None)
            elif name in entry.known:
                if _is_node(value) and value not in self.sizes:
                    raise Refused(f"its {name} is computed from data")
                args.append(_listed(value) if isinstance(value, torch.Tensor) else value)
            elif as_numbers and isinstance(value, torch.Tensor) and _is_number(value) and name != "condition":
                args.append(value.tolist())
            elif as_numbers and value in self.sizes and name != "condition":
                args.append(value)
            else:
                args.append(value if computed else self._tensor(value, node.output[0]))
        if entry.several:
            attributes["outputs"] = len(node.output)
        try:
            inspect.signature(entry.function).bind(*args, *[None] * (len(inputs) - len(args)), **attributes)
        except TypeError as error:
            raise Refused(str(error)) from error
        if computed:
            return _compute(entry.function, args, attributes)
        call = self.graph.call_function(entry.function, tuple(args), attributes)
        call.meta["onnx"] = (kind, node.name or node.output[0])
        if not entry.several:
            return call
        return tuple(self.graph.call_function(operator.getitem, (call, i)) for i in range(len(node.output)))

    def _choice(self, node: Any, condition: Any) -> tuple[Any, ...]:
        """The outputs of If: of the branch that a constant chooses, whose nodes stand in the graph like any others; or
        of the one that sizes choose, when the graph is exported."""
        branches = {a.name: a.g for a in node.attribute}
        if isinstance(condition, torch.Tensor) and condition.numel() == 1:
            branch = branches["then_branch" if bool(condition) else "else_branch"]
            self.values.update((tensor.name, tensor_of(tensor, self.folder)) for tensor in branch.initializer)
            for inner in between_quantizers(branch.node):
                self._node(inner)
            return self._results(branch, len(node.output))
        if condition not in self.sizes:
            raise Refused("its condition is computed from data")
        names = ("then_branch", "else_branch")
        (then, first), (otherwise, second) = (self._branch(branches[name], len(node.output)) for name in names)

        def choose(condition: Any, first: list[Any], second: list[Any]) -> Any:
            holds = condition[0] if isinstance(condition, list) else condition
            return then(*first) if holds else otherwise(*second)

        call = self.graph.call_function(choose, (condition, first, second))
        return tuple(self.graph.call_function(operator.getitem, (call, i)) for i in range(len(node.output)))

    def _results(self, branch: Any, count: int) -> tuple[Any, ...]:
        names = [value.name for value in branch.output]
        if len(names) != count or any(name not in self.values for name in names):
            raise Refused("a branch has other outputs")
        return tuple(self.values[name] for name in names)

    def _branch(self, branch: Any, count: int) -> tuple[fx.GraphModule, list[fx.Node]]:
        """A graph of its own, and what it is called with."""
        tensors = {tensor.name: tensor_of(tensor, self.folder) for tensor in branch.initializer}
        reader = _Reader(branch, self.opset, tensors, self.folder, self)
        for name in dict.fromkeys(reader.read):
            value = self.values.get(name)
            if isinstance(value, fx.Node):
                reader.values[name] = inside = reader._from_outside(value, name)
                reader.sizes.update({inside} if value in self.sizes else ())
            elif name in self.values:
                reader.values.setdefault(name, value)
        for node in between_quantizers(branch.node):
            reader._node(node)
        if reader.refused:
            self.refused += reader.refused
            raise Refused("a branch has what is not understood")
        reader.graph.output(tuple(reader._tensor(value, "output") for value in reader._results(branch, count)))
        return fx.GraphModule(reader.root, reader.graph, "Branch"), reader.given

    def _from_outside(self, value: fx.Node, name: str) -> fx.Node:
        self.given.append(value)
        return self.graph.placeholder(f"{_identifier(name, 'outside')}_{len(self.given)}")

    def _attribute(self, attribute: Any) -> Any:
        onnx = require()
        kinds = onnx.AttributeProto
        if attribute.type == kinds.TENSOR:
            return tensor_of(attribute.t, self.folder)
        if attribute.type not in (kinds.FLOAT, kinds.INT, kinds.STRING, kinds.FLOATS, kinds.INTS, kinds.STRINGS):
            raise Refused(f"its attribute {attribute.name}")
        value = onnx.helper.get_attribute_value(attribute)
        if attribute.name in ("to", "output_dtype"):
            return dtype_of(value, attribute.name) if value or attribute.name == "to" else None
        if attribute.type == kinds.STRING:
            return value.decode("utf-8", "replace")
        if attribute.type == kinds.STRINGS:
            return [word.decode("utf-8", "replace") for word in value]
        return list(value) if attribute.type in (kinds.FLOATS, kinds.INTS) else value

    def _quantizer(self, kind: str, inputs: list[Any], attributes: dict[str, Any], hint: str) -> Any:
        x, scale, zero_point = (*inputs, _NOTHING)[:3]
        if x is _NOTHING or not isinstance(scale, torch.Tensor) or _is_node(zero_point):
            raise Refused("its scale or zero point is computed from data")
        zero = None if zero_point is _NOTHING else zero_point
        found = (quantize if kind == "QuantizeLinear" else dequantize)(x, scale, zero, **attributes)
        if isinstance(found, torch.Tensor):
            return found
        target, args = found
        if kind == "DequantizeLinear" and (same := _moved_bytes(args)) is not None:
            return same
        held = [self._tensor(value, hint) if isinstance(value, torch.Tensor) else value for value in args]
        return self.graph.call_function(target, tuple(held))

    def _small(self, value: Any) -> bool:
        """Whether sizes can be computed with it."""
        if isinstance(value, torch.Tensor):
            return value.dim() < 2 and value.numel() <= sizes.SMALL
        return value in self.sizes

    def _sized(self, node: fx.Node) -> fx.Node:
        self.sizes.add(node)
        return node

    def _tensor(self, value: Any, hint: str) -> fx.Node:
        """A value as a node that yields a tensor."""
        if isinstance(value, fx.Node):
            return self.graph.call_function(sizes.tensor, (value,)) if value in self.sizes else value
        if id(value) not in self.held and self.outside is not None:
            self.held[id(value)] = self._from_outside(self.outside._tensor(value, hint), hint)
        elif id(value) not in self.held:
            name = next((name for name, other in self.values.items() if other is value), hint)
            stem = target = _identifier(name, "constant")
            while hasattr(self.root, target):
                target = f"{stem}_{len(self.held)}"
            self.root.register_buffer(target, value)
            self.held[id(value)] = self.graph.get_attr(target)
        return self.held[id(value)]


_OWN = frozenset({"Constant", "DequantizeLinear", "If", "QuantizeLinear", "Shape", "Size"})
"""Operators that the table does not hold."""
_NOTHING: Any = object()
"""An optional input that is not given."""


_MOVES = frozenset({moves.reshape, moves.flatten, moves.transpose, moves.squeeze, moves.unsqueeze, layers.max_pool})


def _moved_bytes(args: tuple[Any, ...]) -> fx.Node | None:
    """What is dequantized by `args`, where it was quantized from values that are multiples of the same scale already.

    Quantizers write such pairs behind every reshape; between the parts of a channel shuffle they hide it.
    """
    quantized, *parameters = args
    ops = torch.ops.quantized_decomposed
    if not _is_node(quantized) or quantized.target is not ops.quantize_per_tensor.default:
        return None
    real, *written = quantized.args
    source = real
    while source.op == "call_function" and source.target in _MOVES:
        source = source.args[0]
    same = source.target is ops.dequantize_per_tensor.default and parameters == written == list(source.args[1:])
    return real if same else None


def _needed(graph: Any) -> list[Any]:
    """The nodes of a graph that an output depends on."""
    wanted = {value.name for value in graph.output}
    found = []
    for node in reversed(graph.node):
        if wanted.intersection(node.output):
            wanted.update(node.input, *(_names_read(attribute.g) for attribute in node.attribute))
            found.append(node)
    return found[::-1]


def _names_read(graph: Any) -> Iterator[str]:
    """What the nodes and outputs of a graph read, those of its branches included."""
    yield from (value.name for value in graph.output)
    for node in graph.node:
        yield from node.input
        for attribute in node.attribute:
            yield from _names_read(attribute.g)


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _is_number(value: torch.Tensor) -> bool:
    return value.dim() == 0 or tuple(value.shape) == (1,)


def _listed(value: torch.Tensor) -> Any:
    if value.dim() > 1:
        raise Refused("numbers of several dimensions")
    return value.tolist()


def _constant(attributes: dict[str, Any]) -> torch.Tensor:
    if len(attributes) != 1:
        raise Refused("its value is not one attribute")
    ((name, value),) = attributes.items()
    dtypes = {"value_float": torch.float32, "value_floats": torch.float32}
    if name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise Refused(name)
    return value if name == "value" else torch.tensor(value, dtype=dtypes.get(name, torch.int64))


def _compute(function: Any, args: list[Any], attributes: dict[str, Any]) -> Any:
    try:
        with torch.no_grad():
            _bound(function, args, attributes)
            return function(*args, **attributes)
    except Refused:
        raise
    except Exception as error:  # of torch, of whatever the file puts together
        raise Refused(reason(error)) from error


def _bound(function: Any, args: list[Any], attributes: dict[str, Any]) -> None:
    """Refuse what would make a large tensor of a few numbers, before it does."""
    try:
        with FakeTensorMode(allow_non_fake_inputs=True):
            found = function(*args, **attributes)
    except Refused:
        raise
    except Exception:  # the computation itself says it better, or can do what fakes cannot
        return
    for value in found if isinstance(found, tuple) else (found,):
        moves.bounded(list(value.shape))


def _identifier(name: str, otherwise: str) -> str:
    """A name of the file as one of Python's."""
    word = re.sub(r"\W", "_", name, flags=re.ASCII)
    return word if re.match(r"[A-Za-z]", word) else f"{otherwise}_{word}".rstrip("_")
