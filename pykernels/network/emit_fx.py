"""A network as an fx graph: packed weights as buffers, one call of ours a step, everything else as it was.

What runs on every device and under torch.compile, torch.export and AOTInductor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from pykernels.network.step import Attention, Call, Concatenation, Layer, Lookup, Network, Pool, Step, Value

aten = torch.ops.aten

__all__ = ["Emitted", "Emitter", "emit_fx"]


class Emitted(NamedTuple):
    """A network as a graph.

    Attributes:
        program: from the flat inputs to the flat tuple of outputs; its constants are its own.
        names: what the constants are called in it, by the keys under which emitters know them.
    """

    program: fx.GraphModule
    names: dict[Any, str]


def emit_fx(network: Network) -> Emitted:
    """The network with one call for each step."""
    emitter = Emitter(network)
    program = emitter.run()
    return Emitted(program, {key: str(node.target) for key, node in emitter.constants.items()})


class Emitter:
    """Makes the graph; the plan's emitter is one that does so only where it must."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.nodes: dict[Value, Any] = {}
        self.constants: dict[Any, fx.Node] = {}

    def run(self) -> fx.GraphModule:
        for value in self.network.inputs:
            self.nodes[value] = self.graph.placeholder(value.name)
        for step in self.network.live():
            self.nodes[step.outputs[0]] = self.emit(step)
        return self.finish()

    def emit(self, step: Step) -> fx.Node:
        """The node that yields the step's result."""
        return _EMITTERS[step.kind](self, step)

    def finish(self) -> fx.GraphModule:
        """The graph, once all steps are in it."""
        self.graph.output(tuple(self._node(value) for value in self.network.outputs))
        result = fx.GraphModule(self.root, self.graph)
        result.graph.eliminate_dead_code(_has_effect)
        result.graph.lint()
        result.recompile()
        return result

    def _node(self, value: Any) -> Any:
        if isinstance(value, fx.GraphModule):
            return self._attribute(value, "region", value)
        if not isinstance(value, Value):
            return value
        if value.constant is not None:
            return self._attribute(value.constant, value.name, ("constant", value.name))
        return self.nodes[value]

    def _attribute(self, value: Any, name: str, key: Any) -> fx.Node:
        """A ``get_attr`` of a new buffer or graph; the same `key` yields the same one."""
        if key in self.constants:
            return self.constants[key]
        stem = "".join(c if c.isalnum() else "_" for c in name)
        stem = stem if stem[:1].isalpha() else "_" + stem
        unique, number = stem, 1
        while hasattr(self.root, unique):
            unique, number = f"{stem}_{number}", number + 1
        if isinstance(value, torch.Tensor):
            self.root.register_buffer(unique, value.detach().clone())  # the model may train on
        else:
            self.root.add_module(unique, value)
        self.constants[key] = self.graph.get_attr(unique)
        return self.constants[key]

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(target, args, kwargs)

    def ours(self, op: str | None, *args: Any) -> fx.Node:
        return self.call(getattr(torch.ops.pykernels, str(op)).default, *args)

    # --- steps ---

    def torchs(self, step: Step) -> fx.Node:
        """A call as the graph has it."""
        assert isinstance(step.details, Call)
        args, kwargs = pytree.tree_map(self._node, (step.details.args, step.details.kwargs), is_leaf=_is_leaf)
        return self.call(step.details.target, *args, **kwargs)

    def conversion(self, step: Step) -> fx.Node:
        """``quantize_per_tensor`` and ``dequantize_per_tensor``."""
        (x,), (result,) = step.inputs, step.outputs
        params = result.quantization or x.quantization
        return self.ours(step.op, self._node(x), params.scale, params.zero_point, result.dtype)

    def layer(self, step: Step) -> fx.Node:
        """``conv2d``, ``qconv2d``, ``linear`` and ``int8_linear``."""
        layer, (x, *residual), (result,) = step.details, step.inputs, step.outputs
        assert isinstance(layer, Layer)
        linear, line = step.kind == "linear", step.kind == "conv2d" and len(x.shape) == 3
        weight = (layer.weight.unsqueeze(2) if line else layer.weight).contiguous()
        source, packed, *more = self._node(x), self.packed(step, layer, weight), *map(self._node, residual)
        if line:
            source, *more = (self.call(aten.unsqueeze.default, value, 2) for value in (source, *more))
        args: tuple[Any, ...] = (source, packed, weight.shape[0])
        if not linear:
            stride, padding, dilation = list(layer.stride), list(layer.padding), list(layer.dilation)
            args += (list(weight.shape[2:]), stride, padding, dilation, layer.groups)
        if step.quantized:
            out = step.out
            args += (x.quantization.scale, x.quantization.zero_point)
            args += (None, 0) if out is None else (out.scale, out.zero_point)
            args += (result.dtype, step.activation)
            for node, value in zip(more, residual, strict=True):
                args += (node, value.quantization.scale, value.quantization.zero_point, step.residual_order)
        else:
            args += (step.activation, *((*more, step.residual_order) if more else ()))
        y = self.ours(step.op, *args)
        return self.call(aten.squeeze.dim, y, 2) if line else y

    def packed(self, step: Step, layer: Layer, weight: torch.Tensor) -> fx.Node:
        """The packed weights, the same for all steps of one key."""
        if layer.key not in self.constants:
            scale = () if layer.weight_scale is None else (layer.weight_scale,)
            groups = () if step.kind == "linear" else (layer.groups,)
            with torch.no_grad():
                packed = getattr(torch.ops.pykernels, f"{step.op}_pack")(weight, *scale, layer.bias, *groups)
            self._attribute(packed, step.where + "_packed", layer.key)
        return self.constants[layer.key]

    def binary(self, step: Step) -> fx.Node:
        """``qadd``, ``qmul`` and ``add``."""
        (a, b), out = step.inputs, step.out
        if not step.quantized:
            return self.ours(step.op, self._node(a), self._node(b), step.activation)
        pairs = [number for x in (a, b) for number in (x.quantization.scale, x.quantization.zero_point)]
        tail = (out.scale, out.zero_point, out.dtype, *((step.activation,) if step.kind == "add" else ()))
        return self.ours(step.op, self._node(a), self._node(b), *pairs, *tail)

    def concatenation(self, step: Step) -> fx.Node:
        """``qcat``: a plain copy where the parameters are equal, else requantized in the same pass."""
        assert isinstance(step.details, Concatenation)
        params, out = [x.quantization for x in step.inputs], step.out
        scales, zero_points = [p.scale for p in params], [p.zero_point for p in params]
        tail = (step.details.dim, out.scale, out.zero_point, out.dtype)
        return self.ours(step.op, [self._node(x) for x in step.inputs], scales, zero_points, *tail)

    def table(self, step: Step) -> fx.Node:
        """``qlookup``."""
        assert isinstance(step.details, Lookup)
        table = step.details.table
        name = "_".join(step.what.split(" + ")[:-1]) or "requantize"
        key = ("table", bytes(table.view(torch.uint8).tolist()), table.dtype)
        return self.ours(step.op, self._node(step.inputs[0]), self._attribute(table, name + "_table", key))

    def attention(self, step: Step) -> fx.Node:
        """``attention``."""
        assert isinstance(step.details, Attention)
        query, key, value, *mask = map(self._node, step.inputs)
        return self.ours(step.op, query, key, value, *(mask or [None]), step.details.causal, step.details.scale)

    def pool(self, step: Step) -> fx.Node:
        """Pools and the ops that are called like them."""
        assert isinstance(step.details, Pool)
        (x,), (result,) = step.inputs, step.outputs
        tail: tuple[Any, ...] = ()
        if step.op.startswith("q"):
            tail = (x.quantization.scale, x.quantization.zero_point)
            tail += (None, 0) if step.out is None else (step.out.scale, step.out.zero_point)
            tail += (result.dtype,)
        geometry = pytree.tree_map(self._node, step.details.geometry, is_leaf=_is_leaf)
        y = self.ours(step.op, self._node(x), *geometry, *tail)
        if step.out is None or step.quantized:
            return y
        return self.ours("quantize_per_tensor", y, step.out.scale, step.out.zero_point, result.dtype)


_EMITTERS: dict[str, Callable[[Emitter, Step], fx.Node]] = {
    "conv2d": Emitter.layer,
    "linear": Emitter.layer,
    "add": Emitter.binary,
    "mul": Emitter.binary,
    "cat": Emitter.concatenation,
    "lookup": Emitter.table,
    "avg_pool2d": Emitter.pool,
    "adaptive_avg_pool2d": Emitter.pool,
    "max_pool2d": Emitter.pool,
    "max_pool2d_with_indices": Emitter.pool,
    "adaptive_max_pool2d_with_indices": Emitter.pool,
    "upsample_nearest2d": Emitter.pool,
    "upsample_bilinear2d": Emitter.pool,
    "interleave": Emitter.pool,
    "activation": Emitter.pool,
    "leaky_relu": Emitter.pool,
    "softmax": Emitter.pool,
    "layer_norm": Emitter.pool,
    "attention": Emitter.attention,
    "quantize": Emitter.conversion,
    "dequantize": Emitter.conversion,
    "move": Emitter.torchs,
    "cast": Emitter.torchs,
    "size": Emitter.torchs,
    "torch": Emitter.torchs,
}


def _is_leaf(tree: Any) -> bool:
    return isinstance(tree, (Value, fx.GraphModule))


def _has_effect(node: fx.Node) -> bool:
    """Whether dead-code elimination must keep a call that nobody reads: those that write, and checks."""
    if node.op in ("placeholder", "output"):
        return True
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return (target._schema.is_mutable and target.namespace != "pykernels") or "_assert" in str(target)
