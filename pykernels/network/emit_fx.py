"""Emit the lowered graph: packed weights as buffers, one call of ours a group, everything else as it was.

Float layers become ``conv2d`` and ``linear``, quantize/dequantize graphs ``qconv2d``, ``int8_linear``, ``qadd`` ... A
value is kept in the form it was produced in, 8 bits or float; the other form is made only when somebody reads it, once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from pykernels.graph.nodes import (
    MOVES,
    ON_BYTES,
    Facts,
    arguments,
    aten,
    constant,
    facts,
    is_call,
    module_path,
    name_of,
    names,
)
from pykernels.graph.spelling import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE
from pykernels.network.devices import graph_device
from pykernels.network.match import Group, QParams, match, qparams
from pykernels.network.report import Fused, Left, Report, bytes_of
from pykernels.ops._sizes import spread
from pykernels.ops.dtypes import REALS, STORED

__all__ = ["lower"]

_REASONS = {
    "aten.conv_transpose1d": "transposed convolution: no kernel of ours",
    "aten.conv_transpose2d": "transposed convolution: no kernel of ours",
    "aten.conv_transpose3d": "transposed convolution: no kernel of ours",
    "aten.conv3d": "3-D convolution: no kernel of ours",
    "aten.upsample_nearest2d": "interpolation: no kernel of ours",
    "aten.upsample_bilinear2d": "interpolation: no kernel of ours",
    "aten.addcmul": "batch norm that stands alone: a scale and a shift",
    "aten.batch_norm": "batch norm with statistics of its own",
}
_ELEMENTWISE = names(
    """
    add sub mul div cat relu relu6 hardtanh hardswish hardsigmoid sigmoid silu gelu tanh clamp leaky_relu elu
    softmax log_softmax mean sum stack constant_pad_nd
    """
)


@dataclass
class _Value:
    """A value of the source graph in the lowered one: as float, in 8 bits, or both."""

    plain: Any = None
    quantized: Any = None
    params: QParams | None = None
    make: Callable[[], Any] | None = None  # emits `plain` when it is first read


def lower(
    module: fx.GraphModule, precision: str = "fp32", edges: torch.dtype | None = None
) -> tuple[fx.GraphModule, Report]:
    """Lower a prepared plain graph (see `capture.prepare`).

    Args:
        module: a plain graph with facts; float, or with quantize/dequantize calls.
        precision: ``bf16`` and ``fp16`` store weights and activations in bfloat16 or float16 between float inputs and
            float outputs of the original dtype; ``fp32`` and ``int8`` keep what is in the graph.
        edges: the dtype of float inputs and outputs, where it is not that of the graph: the graph of a model of 16-bit
            floats is quantized in fp32. What is float between int8 layers is then stored in it, too.

    Returns:
        The lowered graph module, whose forward takes the flat inputs and returns the flat tuple of outputs, and the
        report of what was done.
    """
    return _Lowering(module, precision, edges).run()


class _Lowering:
    def __init__(self, module: fx.GraphModule, precision: str, edges: torch.dtype | None = None) -> None:
        self.module = module
        self.edges = edges
        self.real = STORED.get(precision, edges)  # what floats are stored in; None: as they are in the graph
        self.device = graph_device(module)
        self.root = nn.Module()
        self.graph = fx.Graph()
        self.values: dict[fx.Node, _Value] = {}
        self.constants: dict[Any, fx.Node] = {}
        self.report = Report(precision=precision)
        self.groups, self.reasons = match(module)
        self.inside = {node for group in self.groups.values() for node in group.nodes} - set(self.groups)

    def run(self) -> tuple[fx.GraphModule, Report]:
        for node in self.module.graph.nodes:
            if node.op == "get_attr":
                tensor = constant(self.module, node)
                self.report.bytes_before += 0 if tensor is None else bytes_of([tensor])
            elif node in self.inside:
                continue
            elif node.op == "output":
                self._output(node)
            else:
                self.values[node] = self._emit(node)
        lowered = fx.GraphModule(self.root, self.graph)
        lowered.graph.eliminate_dead_code()
        lowered.graph.lint()
        lowered.recompile()
        self.report.bytes_after = bytes_of(lowered.buffers())
        return lowered, self.report.on(self.device)

    # --- values ---

    def call(self, target: Callable[..., Any], *args: Any) -> fx.Node:
        return self.graph.call_function(target, args)

    def ours(self, op: str, *args: Any) -> fx.Node:
        return self.call(getattr(torch.ops.pykernels, op).default, *args)

    def tensor(self, value: torch.Tensor, name: str, key: Any = None) -> fx.Node:
        """A ``get_attr`` of a new buffer; the same `key` yields the same buffer."""
        if key is not None and key in self.constants:
            return self.constants[key]
        stem = "".join(c if c.isalnum() else "_" for c in name)
        stem = stem if stem[:1].isalpha() else "_" + stem
        unique, number = stem, 1
        while hasattr(self.root, unique):
            unique, number = f"{stem}_{number}", number + 1
        self.root.register_buffer(unique, value)
        node = self.graph.get_attr(unique)
        if key is not None:
            self.constants[key] = node
        return node

    @property
    def out_real(self) -> torch.dtype:
        """What a kernel writes that turns integers into floats."""
        return self.real or torch.float32

    def stored(self, tensor: torch.Tensor) -> torch.Tensor:
        """A constant as it is stored: floats in `real`."""
        return tensor if self.real is None or tensor.dtype not in REALS else tensor.to(self.real)

    def plain(self, node: Any) -> Any:
        """The float (or integer) form of an argument; a dequantize is emitted when there is only the 8-bit one."""
        if not isinstance(node, fx.Node):
            return node
        if node.op == "get_attr":
            return self._constant_argument(node)
        value = self.values[node]
        if value.plain is None and value.make is not None:
            value.plain = value.make()
        if value.plain is None:
            if is_call(node, QUANTIZE):
                return value.quantized
            assert value.params is not None
            self.report.conversions += 1
            value.plain = self.ours(
                "dequantize_per_tensor", value.quantized, value.params.scale, value.params.zero_point, self.out_real
            )
        return value.plain

    def _constant_argument(self, node: fx.Node) -> fx.Node:
        tensor = constant(self.module, node)
        if tensor is None:
            raise ValueError(f"constant {node.target} of the graph is not a tensor")
        return self.tensor(self.stored(tensor), str(node.target), key=("constant", str(node.target)))

    def quantized(self, node: fx.Node) -> tuple[fx.Node, QParams]:
        """The 8-bit form of a float value that has one."""
        value = self.values[node]
        assert value.quantized is not None and value.params is not None
        return value.quantized, value.params

    # --- one node ---

    def _emit(self, node: fx.Node) -> _Value:
        if node.op == "placeholder":
            return self._input(node)
        group = self.groups.get(node)
        if group is not None:
            return _EMITTERS[group.kind](self, group)
        if is_call(node, QUANTIZE) and qparams(self.module, node) is not None:
            return self._quantize(node)
        if is_call(node, DEQUANTIZE, DEQUANTIZE_CHANNEL):
            return self._dequantize(node)
        if name_of(node) in ON_BYTES and isinstance(node.args[0], fx.Node):
            source = self.values.get(node.args[0])
            if source is not None and source.quantized is not None:
                return self._move(node, source)
        if is_call(node, "aten.constant_pad_nd") and (padded := self._pad_quantized(node)) is not None:
            return padded
        return self._leave(node)

    def _input(self, node: fx.Node) -> _Value:
        placeholder = self.graph.placeholder(str(node.target))
        known = facts(node)
        given = None if known is None or known.dtype not in REALS else self.edges or known.dtype
        if given is not None and self.real not in (None, given):
            return _Value(make=lambda: self.call(aten.to.dtype, placeholder, self.real))
        return _Value(plain=placeholder)

    def _quantize(self, node: fx.Node) -> _Value:
        params = qparams(self.module, node)
        source = node.args[0]
        assert params is not None and isinstance(source, fx.Node)
        value = self.values.get(source)
        if value is not None and value.quantized is not None and value.params == params:
            return value
        self.report.conversions += 1
        quantized = self.ours("quantize_per_tensor", self.plain(source), params.scale, params.zero_point, params.dtype)
        if not params.full_range:
            quantized = self.call(aten.clamp.default, quantized, params.low, params.high)
        return _Value(quantized=quantized, params=params)

    def _dequantize(self, node: fx.Node) -> _Value:
        source = node.args[0]
        if isinstance(source, fx.Node) and (values := constant(self.module, source)) is not None:
            # a weight that no int8 kernel of ours reads: float from now on
            arguments_ = fx.map_arg(tuple(node.args[1:]), lambda n: constant(self.module, n))
            weight = self.stored(node.target(values, *arguments_))
            return _Value(make=lambda: self.tensor(weight, str(source.target), key=("weight", node)))
        params = qparams(self.module, node)
        value = self.values.get(source) if isinstance(source, fx.Node) else None
        if params is None or value is None or value.quantized is None:
            return self._leave(node)
        return _Value(quantized=value.quantized, params=params)

    def _move(self, node: fx.Node, source: _Value) -> _Value:
        self.report.moves += name_of(node) != "getitem"
        rest = fx.map_arg(tuple(node.args[1:]), self.plain)
        moved = self.graph.call_function(node.target, (source.quantized, *rest), dict(node.kwargs))
        return _Value(quantized=moved, params=source.params)

    def _pad_quantized(self, node: fx.Node) -> _Value | None:
        """Zero padding of an 8-bit tensor pads with its zero point."""
        source = self.values.get(node.args[0])
        if source is None or source.quantized is None or source.params is None:
            return None
        if (node.args[2] if len(node.args) > 2 else 0) != 0:
            return None
        padded = self.call(aten.constant_pad_nd.default, source.quantized, node.args[1], source.params.zero_point)
        self.report.moves += 1
        return _Value(quantized=padded, params=source.params)

    def _leave(self, node: fx.Node) -> _Value:
        args = fx.map_arg(node.args, self.plain)
        kwargs = fx.map_arg(dict(node.kwargs), self.plain)
        if self.real is not None:
            args, kwargs = _in_dtype(args, self.real), _in_dtype(kwargs, self.real)
        name = name_of(node)
        if name in MOVES:
            self.report.moves += 1
        elif facts(node) is not None and facts(node).shape != () and name != "getitem":
            self.report.left.append(Left(name.removeprefix("aten."), module_path(node), self._reason(node, name)))
        return _Value(plain=self.graph.call_function(node.target, args, kwargs))

    def _reason(self, node: fx.Node, name: str) -> str:
        if node in self.reasons:
            return self.reasons[node]
        if name in _REASONS:
            return _REASONS[name]
        if name in _ELEMENTWISE:
            return "not beside a layer it could be fused into"
        return "no kernel of ours"

    def _output(self, node: fx.Node) -> None:
        def finish(value: Any) -> Any:
            if not isinstance(value, fx.Node):
                return value
            result, known = self.plain(value), facts(value)
            if known is None:
                return result
            wanted = None if known.dtype not in REALS else self.edges or known.dtype
            if wanted is not None and self.real not in (None, wanted):
                result = self.call(aten.to.dtype, result, wanted)
            if len(known.shape) == 4 and known.contiguous and value.op == "call_function":
                result = self.call(aten.contiguous.default, result)
            return result

        self.graph.output(tuple(finish(value) for value in node.args[0]))

    # --- groups ---

    def fused(self, op: str, group: Group, *extra: str) -> None:
        parts = [
            node.meta.get("spelled", name_of(node).removeprefix("aten."))
            for node in group.nodes
            if not is_call(node, QUANTIZE)
        ]
        parts = ["pad" if part == "constant_pad_nd" else part for part in parts]
        if group.out is not None and is_call(group.last, QUANTIZE):
            parts.append("quantize")
        self.report.fused.append(Fused(op, " + ".join([*parts, *extra]), module_path(group.anchor)))

    def layer(self, group: Group) -> _Value:
        """A convolution or linear layer, float or 8-bit."""
        anchor, values = group.anchor, arguments(group.anchor)
        linear, int8 = group.kind.endswith("linear"), group.weight is not None
        known = facts(anchor)
        assert known is not None
        bias = None if values["bias"] is None else constant(self.module, values["bias"])
        one_d = is_call(anchor, "aten.conv1d")
        weight = group.weight.values if group.weight is not None else self._float_weight(values["weight"], known)
        weight = weight.unsqueeze(2) if one_d else weight
        name = module_path(anchor) + "_packed"
        source = group.x
        key = (group.kind, values["weight"], values["bias"])
        if int8:
            assert group.weight is not None
            pack = torch.ops.pykernels.int8_linear_pack if linear else torch.ops.pykernels.qconv2d_pack
            parameters: list[Any] = [weight.contiguous(), group.weight.scale, None if bias is None else bias.float()]
            x, params = self.quantized(source)
        else:
            pack = torch.ops.pykernels.linear_pack if linear else torch.ops.pykernels.conv2d_pack
            bias = None if bias is None else bias.to(weight.dtype)
            parameters = [weight.contiguous(), bias]
            x, params = self.plain(source), None
        with torch.no_grad():
            packed = self.tensor(pack(*parameters, *([] if linear else [values["groups"]])), name, key)
        residual, residual_params = None, None
        if group.residual is not None:
            if int8:
                residual, residual_params = self.quantized(group.residual)
            else:
                residual = self.plain(group.residual)
        if one_d:
            x = self.call(aten.unsqueeze.default, x, 2)
            residual = None if residual is None else self.call(aten.unsqueeze.default, residual, 2)
        out = group.out
        if linear:
            features = weight.shape[0]
            if int8:
                assert params is not None
                dtype = self.out_real if out is None else out.dtype
                scale, zero_point = (None, 0) if out is None else (out.scale, out.zero_point)
                op, args = "int8_linear", (x, packed, features, params.scale, params.zero_point)
                result = self.ours(op, *args, scale, zero_point, dtype, group.activation)
            else:
                op = "linear"
                result = self.ours(op, x, packed, features, *_epilogue(group, residual))
        else:
            geometry = (
                weight.shape[0],
                list(weight.shape[2:]),
                _pair(values["stride"], one_d, 1),
                list(group.padding or (0, 0, 0, 0)),
                _pair(values["dilation"], one_d, 1),
                values["groups"],
            )
            if int8:
                assert params is not None
                op, args = "qconv2d", (x, packed, *geometry, params.scale, params.zero_point)
                dtype = self.out_real if out is None else out.dtype
                args += (None, 0) if out is None else (out.scale, out.zero_point)
                args += (dtype, group.activation)
                if residual is not None and residual_params is not None:
                    extra = (residual, residual_params.scale, residual_params.zero_point, group.residual_order)
                    args += extra
                result = self.ours(op, *args)
            else:
                op = "conv2d"
                result = self.ours(op, x, packed, *geometry, *_epilogue(group, residual))
        if one_d:
            result = self.call(aten.squeeze.dim, result, 2)
        self.fused(op, group)
        if out is not None:
            return _Value(quantized=result, params=out)
        return _Value(plain=result)

    def _float_weight(self, node: fx.Node, known: Facts) -> torch.Tensor:
        weight = constant(self.module, node)
        if weight is None:  # int8 weights before a float input
            values = constant(self.module, node.args[0])
            rest = fx.map_arg(tuple(node.args[1:]), lambda n: constant(self.module, n))
            weight = node.target(values, *rest)
        return weight.to(self.real or known.dtype)

    def binary(self, group: Group) -> _Value:
        """``qadd`` and ``qmul``."""
        assert group.out is not None
        (a, pa), (b, pb) = (self.quantized(value) for value in group.inputs)
        out = group.out
        args = (a, b, pa.scale, pa.zero_point, pb.scale, pb.zero_point, out.scale, out.zero_point, out.dtype)
        extra = (group.activation,) if group.kind == "qadd" else ()
        self.fused(group.kind, group)
        return _Value(quantized=self.ours(group.kind, *args, *extra), params=out)

    def concatenation(self, group: Group) -> _Value:
        """``qcat``: a plain copy where the parameters are equal, else requantized in the same pass."""
        assert group.out is not None
        pairs = [self.quantized(value) for value in group.inputs]
        cat = next(node for node in group.nodes if is_call(node, "aten.cat"))
        dim = int(arguments(cat)["dim"])
        scales, zero_points = [p.scale for _, p in pairs], [p.zero_point for _, p in pairs]
        args = ([x for x, _ in pairs], scales, zero_points, dim, group.out.scale, group.out.zero_point, group.out.dtype)
        self.fused("qcat", group)
        return _Value(quantized=self.ours("qcat", *args), params=group.out)

    def table(self, group: Group) -> _Value:
        """``qlookup``: the 256 answers of a pointwise chain, computed by torch itself now."""
        assert group.out is not None
        source, params = self.quantized(group.x)
        codes = torch.arange(256, dtype=torch.uint8, device=self.device)
        codes = codes.view(torch.int8) if params.dtype is torch.int8 else codes
        real = (codes.to(torch.float32) - params.zero_point) * params.scale
        for node in group.chain:
            real = node.target(real, *node.args[1:], **node.kwargs)
        out = group.out
        steps = torch.round(real * (1.0 / out.scale)) + out.zero_point
        table = steps.nan_to_num(nan=out.zero_point).clamp(out.low, out.high).to(out.dtype)
        name = "_".join(name_of(node).removeprefix("aten.") for node in group.chain) or "requantize"
        key = ("table", bytes(table.view(torch.uint8).tolist()), out.dtype)
        self.fused("qlookup", group, *(() if group.chain else ("requantize",)))
        return _Value(quantized=self.ours("qlookup", source, self.tensor(table, name + "_table", key)), params=out)

    def average(self, group: Group) -> _Value:
        """Average pools, float or 8-bit in."""
        anchor, values = group.nodes[0], arguments(group.nodes[0])
        if is_call(anchor, "aten.adaptive_avg_pool2d"):
            geometry: list[Any] = [spread(values["output_size"])]
        else:
            kernel = spread(values["kernel_size"])
            geometry = [
                kernel,
                spread(values["stride"]) if values["stride"] else kernel,
                spread(values["padding"]),
                values["ceil_mode"],
                values["count_include_pad"],
                values["divisor_override"],
            ]
        self.fused(group.kind, group)
        if not group.kind.startswith("q"):
            return _Value(plain=self.ours(group.kind, self.plain(group.x), *geometry))
        x, params = self.quantized(group.x)
        out = group.out
        if out is None:
            result = self.ours(group.kind, x, *geometry, params.scale, params.zero_point, None, 0, self.out_real)
            return _Value(plain=result)
        tail = (params.scale, params.zero_point, out.scale, out.zero_point, out.dtype)
        return _Value(quantized=self.ours(group.kind, x, *geometry, *tail), params=out)

    def maximum(self, group: Group) -> _Value:
        """Max pools; of an 8-bit tensor the maximum is taken on its bytes."""
        values = arguments(group.nodes[0])
        if "kernel_size" in values:
            kernel = spread(values["kernel_size"])
            stride = spread(values["stride"]) if values["stride"] else kernel
            tail = (spread(values["padding"]), spread(values["dilation"]), values["ceil_mode"])
            geometry: tuple[Any, ...] = (kernel, stride, *tail)
        else:
            geometry = (spread(values["output_size"]),)
        self.fused(group.kind, group)
        source = self.values.get(group.x)
        if group.kind == "max_pool2d" and source is not None and source.quantized is not None:
            return _Value(quantized=self.ours(group.kind, source.quantized, *geometry), params=source.params)
        return _Value(plain=self.ours(group.kind, self.plain(group.x), *geometry))


_EMITTERS: dict[str, Callable[[_Lowering, Group], _Value]] = {
    "conv2d": _Lowering.layer,
    "qconv2d": _Lowering.layer,
    "linear": _Lowering.layer,
    "qlinear": _Lowering.layer,
    "qadd": _Lowering.binary,
    "qmul": _Lowering.binary,
    "qcat": _Lowering.concatenation,
    "qlookup": _Lowering.table,
    "avg_pool2d": _Lowering.average,
    "adaptive_avg_pool2d": _Lowering.average,
    "qavg_pool2d": _Lowering.average,
    "qadaptive_avg_pool2d": _Lowering.average,
    "max_pool2d": _Lowering.maximum,
    "max_pool2d_with_indices": _Lowering.maximum,
    "adaptive_max_pool2d_with_indices": _Lowering.maximum,
}


def _epilogue(group: Group, residual: fx.Node | None) -> tuple[Any, ...]:
    if residual is None:
        return (group.activation,)
    return (group.activation, residual, group.residual_order)


def _pair(value: Any, one_d: bool, across: int) -> list[int]:
    """A size per dimension as [height, width]; a 1-D layer is a row of height one."""
    items = spread(value)
    return [across, items[0]] if one_d else items


def _in_dtype(tree: Any, dtype: torch.dtype) -> Any:
    """Explicit float dtypes in the arguments of what stays with torch."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(_in_dtype(item, dtype) for item in tree)
    if isinstance(tree, dict):
        return {key: _in_dtype(item, dtype) for key, item in tree.items()}
    return dtype if isinstance(tree, torch.dtype) and tree in REALS else tree
