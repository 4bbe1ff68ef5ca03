"""From the steps of a graph to a network: each value in the form that it is stored in, conversions where forms meet.

A value is kept in the form it was produced in, 8 bits or float; the other form is made when somebody first reads it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from pykernels.graph.alias import writes
from pykernels.graph.nodes import (
    aliases_layout,
    argument,
    arguments,
    aten,
    attribute,
    constant,
    facts,
    in_memory_order,
    is_call,
    module_path,
    name_of,
)
from pykernels.graph.qdq import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE, QParams, qparams
from pykernels.network.devices import graph_device
from pykernels.network.match import conv_padding, int8_weight, match, runs_on_bytes
from pykernels.network.step import KEEPING, Attention, Call, Concatenation, Layer, Lookup, Network, Pool, Step, Value
from pykernels.ops._sizes import spread
from pykernels.ops.dtypes import REALS, STORED

__all__ = ["assemble", "words"]


def assemble(module: fx.GraphModule, precision: str = "fp32", edges: torch.dtype | None = None) -> Network:
    """The network of a canonical graph (see `graph.capture.canonicalize`), float or with quantize/dequantize calls.

    Args:
        precision: ``bf16`` and ``fp16`` store weights and activations in bfloat16 or float16 between float inputs and
            float outputs of the original dtype; ``fp32`` and ``int8`` keep what is in the graph.
        edges: the dtype of float inputs and outputs, where it is not that of the graph: the graph of a model of 16-bit
            floats is quantized in fp32. What is float between int8 layers is then stored in it, too.
    """
    return _Assembler(module, precision, edges).run()


@dataclass
class _Forms:
    """A value of the graph: as float (or whatever else torch computes), in 8 bits, or both."""

    plain: Any = None
    quantized: Value | None = None
    make: Callable[[], Any] | None = None  # makes `plain` when it is first read


class _Assembler:
    def __init__(self, module: fx.GraphModule, precision: str, edges: torch.dtype | None) -> None:
        self.module = module
        self.precision, self.edges = precision, edges
        self.real = STORED.get(precision, edges)  # what floats are stored in; None: as they are in the graph
        self.forms: dict[fx.Node, _Forms] = {}
        self.masks: dict[fx.Node, Value] = {}
        self.given: dict[fx.Node, Value] = {}  # inputs as the caller has them
        self.steps: list[Step] = []

    def run(self) -> Network:
        steps = {step.output: step for step in match(self.module)}
        inputs: list[Value] = []
        outputs: list[Any] = []
        for node in self.module.graph.nodes:
            if node.op == "placeholder":
                inputs.append(self._input(node))
            elif node.op == "output":
                outputs = [self._returned(value) for value in node.args[0]]
            elif node in steps:
                self._step(steps[node])
        return Network(inputs, self.steps, outputs, self.precision, graph_device(self.module))

    # --- values ---

    def _value(self, node: fx.Node, quantization: QParams | None = None, dtype: torch.dtype | None = None) -> Value:
        known = facts(node)
        if known is None:
            return Value(node.name, quantization=quantization)
        stored = self.real if self.real is not None and known.dtype in REALS else known.dtype
        if quantization is not None:
            stored = quantization.dtype
        return Value(node.name, known.shape, dtype or stored, in_memory_order(node), quantization)

    def _add(self, step: Step, inputs: list[Any], *outputs: Value) -> None:
        step.inputs, step.outputs = inputs, list(outputs)
        self.steps.append(step)

    def _convert(self, kind: str, node: fx.Node, source: Value, result: Value, *call: Any) -> Value:
        """A conversion or cast that no call of the graph stands for."""
        step = Step(kind, [node], [], where=module_path(node), out=result.quantization)
        if call:
            target, args = call
            step.details = Call(target, args)
        self._add(step, [source], result)
        return result

    def _input(self, node: fx.Node) -> Value:
        given, known = self._value(node), facts(node)
        given.name = str(node.target)
        if known is not None and known.dtype in REALS:
            given.dtype = self.edges or known.dtype
        self.given[node] = given
        self.forms[node] = _Forms(make=lambda: self._stored(node, given))
        return given

    def _stored(self, node: fx.Node, value: Value) -> Value:
        """A float of the model's dtype in the one that floats are stored in."""
        if value.dtype not in REALS or self.real in (None, value.dtype):
            return value
        return self._convert("cast", node, value, self._value(node), aten.to.dtype, (value, self.real))

    def _constant(self, node: fx.Node) -> Any:
        """A ``get_attr`` that torch reads: a tensor as it is stored, or a graph of a control-flow call."""
        tensor = attribute(self.module, node)
        if tensor is None:
            return self.module.get_submodule(str(node.target))
        known = self.forms.get(node)
        if known is None:
            written = constant(self.module, node) is None  # state keeps its dtype
            stored = tensor if written or self.real is None or tensor.dtype not in REALS else tensor.to(self.real)
            value = Value(str(node.target), tuple(tensor.shape), stored.dtype, constant=stored)
            known = self.forms[node] = _Forms(plain=value)
        return known.plain

    def plain(self, node: Any) -> Any:
        """The float (or integer) form of an argument; a dequantize is made when there is only the 8-bit one."""
        if not isinstance(node, fx.Node):
            return node
        if node.op == "get_attr":
            return self._constant(node)
        form = self.forms[node]
        if form.plain is None and form.make is not None:
            form.plain = form.make()
        if form.plain is None:
            assert form.quantized is not None and form.quantized.quantization is not None
            if is_call(node, QUANTIZE):
                return form.quantized
            dtype = self.real or torch.float32
            form.plain = self._convert("dequantize", node, form.quantized, self._value(node, dtype=dtype))
            form.plain.quantization = None
        return form.plain

    def quantized(self, node: fx.Node) -> Value | None:
        """The 8-bit form of a float value, if it has one."""
        form = self.forms.get(node)
        return None if form is None else form.quantized

    # --- steps ---

    def _step(self, step: Step) -> None:
        step.where = module_path(self._named_after(step))
        step.what = words(step)
        node = step.output
        make = _MAKERS.get(step.kind)
        if make is not None:
            make(self, step)
        elif is_call(node, QUANTIZE) and qparams(self.module, node) is not None:
            self._quantize(node)
        elif is_call(node, DEQUANTIZE, DEQUANTIZE_CHANNEL):
            self._dequantize(step)
        elif runs_on_bytes(node) and (source := self.quantized(node.args[0])) is not None:
            self._move(step, source)
        else:
            self._leave(step)

    @staticmethod
    def _named_after(step: Step) -> fx.Node:
        layers = [node for node in step.nodes if is_call(node, "aten.conv2d", "aten.conv1d", "aten.linear")]
        return (layers or step.nodes)[0]

    def _finish(self, step: Step, inputs: list[Any], node: fx.Node | None = None) -> None:
        """Add a step of ours; its result is 8 bits where it has parameters for them."""
        node = node or step.output
        result = self._value(node, step.out)
        if step.out is None and step.quantized and result.dtype in REALS:
            result.dtype = self.real or torch.float32  # what a kernel writes that turns integers into floats
        self._add(step, inputs, result)
        self.forms[node] = _Forms(quantized=result) if step.out is not None else _Forms(plain=result)

    def _quantize(self, node: fx.Node) -> None:
        params, source = qparams(self.module, node), node.args[0]
        assert params is not None
        known = self.quantized(source)
        if known is not None and known.quantization == params:
            self.forms[node] = self.forms[source]
            return
        result = self._value(node, params)
        if params.full_range:
            self._convert("quantize", node, self.plain(source), result)
        else:
            whole = self._convert("quantize", node, self.plain(source), self._value(node, params))
            self._convert("cast", node, whole, result, aten.clamp.default, (whole, params.low, params.high))
        self.forms[node] = _Forms(quantized=result)

    def _dequantize(self, step: Step) -> None:
        node, source = step.output, step.output.args[0]
        params = qparams(self.module, node)
        if isinstance(source, fx.Node) and (codes := constant(self.module, source)) is not None:
            form = _Forms(make=lambda: self._float_constant(node, source))
            if params is not None and params.full_range:
                form.quantized = Value(str(source.target), tuple(codes.shape), codes.dtype, None, params, codes)
            self.forms[node] = form
            return
        known = self.quantized(source) if isinstance(source, fx.Node) else None
        if params is None or known is None:
            self._leave(step)
            return
        self.forms[node] = _Forms(quantized=known)

    def _float_constant(self, node: fx.Node, source: fx.Node) -> Value:
        """8-bit constants that no kernel of ours reads so: float from now on."""
        weight = self._evaluate(node)
        weight = weight if self.real is None else weight.to(self.real)
        return Value(str(source.target) + "_float", tuple(weight.shape), weight.dtype, constant=weight)

    def _evaluate(self, node: fx.Node) -> torch.Tensor:
        args = fx.map_arg(tuple(node.args), lambda n: constant(self.module, n))
        return node.target(*args, **node.kwargs)

    def _move(self, step: Step, source: Value) -> None:
        """Moves and zero padding of an 8-bit tensor act on its bytes."""
        node, params = step.output, source.quantization
        assert params is not None
        step.kind = "move"
        rest = list(fx.map_arg(tuple(node.args[1:]), self.plain))
        kwargs = fx.map_arg(dict(node.kwargs), self.plain)
        if is_call(node, "aten.constant_pad_nd"):  # with the code of zero
            rest, kwargs = [rest[0], params.zero_point], {}
        step.details = Call(node.target, (source, *rest), kwargs)
        result = self._value(node, params)
        self._add(step, [source], result)
        self.forms[node] = _Forms(quantized=result)

    def _leave(self, step: Step) -> None:
        """Left to torch, call by call."""
        for node in step.nodes:
            left = step if len(step.nodes) == 1 else Step("torch", [node], [], reason=step.reason)
            if left.kind != "move":
                left.kind = "torch" if _of_tensors(node) else "size"
            left.where, left.what = module_path(node), name_of(node).removeprefix("aten.")
            written, region = set(writes(node)), isinstance(node.target, torch._ops.HigherOrderOperator)
            read = self._restored if aliases_layout(node) else self._in_model_dtype if region else self.plain
            args = fx.map_arg(node.args, lambda n: self._owned(n) if n in written else read(n))  # noqa: B023
            kwargs = fx.map_arg(dict(node.kwargs), self.plain)
            if self.real is not None and not region:
                args, kwargs = _in_dtype(args, self.real), _in_dtype(kwargs, self.real)
            left.details = Call(node.target, args, kwargs)
            own = _of_region(node) or _chooses_its_dtype(node)
            result = self._value(node, dtype=facts(node).dtype if own else None)
            self._add(left, [], result)
            self.forms[node] = _Forms(make=lambda n=node, v=result: self._stored(n, v))

    def _in_model_dtype(self, node: fx.Node) -> Any:
        """A value as the model has it: the graphs of control-flow calls are not rewritten."""
        value, known = self.plain(node), facts(node)
        if not isinstance(value, Value) or known is None or value.dtype == known.dtype:
            return value
        result = self._value(node, dtype=known.dtype)
        return self._convert("cast", node, value, result, aten.to.dtype, (value, known.dtype))

    def _owned(self, node: fx.Node) -> Any:
        """What a call writes: the caller's input itself, or the network's own state."""
        return self.given[node] if node.op == "placeholder" else self.plain(node)

    def _restored(self, node: fx.Node) -> Any:
        """A value that lies in memory as it does in the model: kernels of ours write channels_last."""
        value = self.plain(node)
        if facts(node) is None or not isinstance(value, Value) or value.constant is not None:
            return value
        layout = in_memory_order(node)
        if layout is None:
            raise ValueError(f"model: {node.name} is read by its strides, which are those of no memory format")
        result = self._value(node)
        step = Step("move", [node], [], details=Call(aten.contiguous.default, (value,), {"memory_format": layout}))
        self._add(step, [value], result)
        return result

    def _returned(self, node: Any) -> Any:
        """An output in the dtype and memory format that the model gives it."""
        if not isinstance(node, fx.Node):
            return node
        known, value = facts(node), self.plain(node)
        if known is None or not isinstance(value, Value):
            return value
        wanted = self.edges or known.dtype if known.dtype in REALS else None
        if wanted is not None and self.real not in (None, wanted):
            value = self._convert("cast", node, value, self._value(node, dtype=wanted), aten.to.dtype, (value, wanted))
        four = len(known.shape) == 4 and node.op == "call_function"
        if four and in_memory_order(node) is torch.contiguous_format:
            result = self._value(node, dtype=value.dtype)
            value = self._convert("cast", node, value, result, aten.contiguous.default, (value,))
        return value

    # --- steps of ours ---

    def layer(self, step: Step) -> None:
        """A convolution or linear layer, float or 8-bit."""
        anchor = self._named_after(step)
        values = arguments(anchor)
        known = facts(anchor)
        assert known is not None
        found = int8_weight(self.module, values["weight"]) if step.quantized else None
        scale = None if found is None else found.scale
        weight = self._float_weight(values["weight"], known.dtype) if found is None else found.values
        bias = None if values["bias"] is None else constant(self.module, values["bias"])
        if bias is not None:
            bias = bias.float() if step.quantized else bias.to(weight.dtype)
        step.details = Layer(weight, scale, bias, (step.kind, step.quantized, values["weight"], values["bias"]))
        if step.kind == "conv2d":
            pad = step.nodes[0] if step.nodes[0] is not anchor else None
            one_d = is_call(anchor, "aten.conv1d")
            step.details.stride = _pair(values["stride"], one_d)
            step.details.dilation = _pair(values["dilation"], one_d)
            step.details.padding = conv_padding(anchor, pad)
            step.details.groups = values["groups"]
        read = self.quantized if step.quantized else self.plain
        self._finish(step, [read(node) for node in step.reads])

    def _float_weight(self, node: fx.Node, dtype: torch.dtype) -> torch.Tensor:
        weight = constant(self.module, node)
        weight = self._evaluate(node) if weight is None else weight  # int8 weights before a float input
        return weight.to(self.real or dtype)

    def pointwise(self, step: Step) -> None:
        """Sums, products and concatenations."""
        if step.kind == "cat":
            step.details = Concatenation(int(argument(step.anchor, "dim") or 0))
        self._finish(step, [self.quantized(node) if step.quantized else self.plain(node) for node in step.reads])

    def unary(self, step: Step) -> None:
        """Functions of one float tensor: activations and normalizations."""
        values = arguments(step.anchor)
        if step.kind == "leaky_relu":
            step.details = Pool((float(values["negative_slope"]),))
        elif step.kind == "softmax":
            step.details = Pool((int(values["dim"]),))
        elif step.kind == "layer_norm":
            parameters = [self._in_fp32(values[name]) for name in ("weight", "bias")]
            step.details = Pool((*parameters, float(values["eps"])))
        else:
            step.details = Pool((step.activation,))
        self._finish(step, [self.plain(step.reads[0])])

    def attention(self, step: Step) -> None:
        """Scaled dot product attention: query, key, value, and a mask."""
        values, (query, *_) = arguments(step.anchor), [facts(node) for node in step.reads]
        scale = 1.0 / math.sqrt(query.shape[3]) if values["scale"] is None else float(values["scale"])
        step.details = Attention(values["is_causal"], scale)
        self._finish(step, [self.plain(node) for node in step.reads[:3]] + list(map(self._mask, step.reads[3:])))

    def _mask(self, node: fx.Node) -> Value:
        """A mask as kernels read it: truth as bytes."""
        value: Value = self.plain(node)
        if value.dtype is not torch.bool:
            return value
        if node not in self.masks:
            self.masks[node] = self._bytes_of(node, value)
        return self.masks[node]

    def _bytes_of(self, node: fx.Node, value: Value) -> Value:
        if value.constant is not None:
            name, bytes_ = f"{value.name}_bytes", value.constant.view(torch.uint8)
            return Value(name, tuple(bytes_.shape), torch.uint8, constant=bytes_)
        result = self._value(node, dtype=torch.uint8)
        return self._convert("cast", node, value, result, aten.view.dtype, (value, torch.uint8))

    def _in_fp32(self, node: fx.Node | None) -> Value | None:
        """A constant that a kernel reads in fp32, whatever floats are stored in."""
        tensor = constant(self.module, node)
        if tensor is None:
            return None
        tensor = tensor.float().contiguous()
        return Value(f"{node.target}_fp32", tuple(tensor.shape), torch.float32, constant=tensor)

    def table(self, step: Step) -> None:
        """The 256 answers of a pointwise chain, computed by torch itself now."""
        source, out = self.quantized(step.reads[0]), step.out
        assert source is not None and source.quantization is not None and out is not None
        params = source.quantization
        codes = torch.arange(256, dtype=torch.uint8, device=graph_device(self.module))
        codes = codes.view(torch.int8) if params.dtype is torch.int8 else codes
        real = (codes.to(torch.float32) - params.zero_point) * params.scale
        for node in step.nodes[:-1]:
            real = node.target(real, *node.args[1:], **node.kwargs)
        steps = torch.round(real * (1.0 / out.scale)) + out.zero_point
        table = steps.nan_to_num(nan=out.zero_point).clamp(out.low, out.high).to(out.dtype)
        step.details = Lookup(table)
        self._finish(step, [source])

    def pool(self, step: Step) -> None:
        """Average and max pools; the maximum of an 8-bit tensor is taken on its bytes."""
        values = arguments(step.anchor)
        if "kernel_size" not in values:
            geometry: tuple[Any, ...] = (spread(values["output_size"]),)
        else:
            kernel = spread(values["kernel_size"])
            stride = spread(values["stride"]) if values["stride"] else kernel
            rest = ("dilation", "ceil_mode") if "dilation" in values else ()
            rest = rest or ("ceil_mode", "count_include_pad", "divisor_override")
            geometry = (kernel, stride, spread(values["padding"]), *(_plural(name, values[name]) for name in rest))
        step.details = Pool(geometry)
        self._keep(step, step.kind == "max_pool2d")

    def resized(self, step: Step) -> None:
        """Upsampling, and the phases of a transposed convolution."""
        values = arguments(step.anchor)
        if step.kind == "interleave":
            step.details = Pool((list(values["stride"]), list(values["crop"]), values["groups"]))
        else:
            size, factors = self._upsampled(values)
            align = [bool(values["align_corners"])] if step.kind == "upsample_bilinear2d" else []
            step.details = Pool((size, *align, factors))
        self._keep(step, step.kind != "upsample_bilinear2d")

    def _upsampled(self, values: dict[str, Any]) -> tuple[list[Any], list[float]]:
        """The size or the scale factors of an upsampling, of either overload: the other list is empty."""
        factors = values.get("scale_factors") or [values.get("scales_h"), values.get("scales_w")]
        size = [self.plain(number) for number in values["output_size"] or ()]
        given = [float(factor) for factor in factors if factor is not None]
        return ([], given) if len(given) == 2 and not size else (size, [])

    def _keep(self, step: Step, always: bool) -> None:
        """Steps whose bytes keep their meaning; `always`: whether there are bytes to take, the match says it or not."""
        source = self.quantized(step.reads[0]) if step.quantized or always else None
        if step.kind in KEEPING and source is not None:
            step.out = source.quantization
        step.quantized = source is not None
        self._finish(step, [self.plain(step.reads[0]) if source is None else source])


_MAKERS: dict[str, Callable[[_Assembler, Step], None]] = {
    "conv2d": _Assembler.layer,
    "linear": _Assembler.layer,
    "add": _Assembler.pointwise,
    "mul": _Assembler.pointwise,
    "cat": _Assembler.pointwise,
    "lookup": _Assembler.table,
    "avg_pool2d": _Assembler.pool,
    "adaptive_avg_pool2d": _Assembler.pool,
    "max_pool2d": _Assembler.pool,
    "max_pool2d_with_indices": _Assembler.pool,
    "adaptive_max_pool2d_with_indices": _Assembler.pool,
    "upsample_nearest2d": _Assembler.resized,
    "upsample_bilinear2d": _Assembler.resized,
    "interleave": _Assembler.resized,
    "activation": _Assembler.unary,
    "leaky_relu": _Assembler.unary,
    "softmax": _Assembler.unary,
    "layer_norm": _Assembler.unary,
    "attention": _Assembler.attention,
}


def words(step: Step) -> str:
    """What a step stands for: ``conv2d + relu + quantize``."""
    parts = [
        node.meta.get("spelled", name_of(node).rpartition(".")[2]) for node in step.nodes if not is_call(node, QUANTIZE)
    ]
    parts = ["pad" if part == "constant_pad_nd" else part for part in parts]
    if step.out is not None and is_call(step.output, QUANTIZE):
        parts.append("quantize")
    if step.kind == "lookup" and len(step.nodes) == 1:
        parts.append("requantize")
    return " + ".join(parts)


def _of_tensors(node: fx.Node) -> bool:
    """Whether a call yields tensors, and not only sizes; what is unknown counts as one."""
    leaves = pytree.tree_leaves(node.meta.get("val", torch.empty(0)))
    return any(isinstance(leaf, torch.Tensor) for leaf in leaves)


def _of_region(node: fx.Node) -> bool:
    """Whether a tensor comes out of a control-flow call."""
    call = node.args[0] if name_of(node) == "getitem" else node
    return facts(node) is not None and isinstance(call.target, torch._ops.HigherOrderOperator)


def _chooses_its_dtype(node: fx.Node) -> bool:
    """Whether a call makes a tensor of numbers, in torch's default dtype."""
    told = any(isinstance(leaf, torch.dtype) for leaf in pytree.tree_leaves((node.args, node.kwargs)))
    made = facts(node) is not None and name_of(node) != "getitem"
    return made and not told and all(facts(value) is None for value in node.all_input_nodes)


def _pair(value: Any, one_d: bool) -> tuple[int, int]:
    """A size per dimension as (height, width); a line is an image of height one."""
    first, *rest = spread(value, 1 if one_d else 2)
    return (1, first) if one_d else (first, *rest)


def _plural(name: str, value: Any) -> Any:
    return spread(value) if name == "dilation" else value


def _in_dtype(tree: Any, dtype: torch.dtype) -> Any:
    """Explicit float dtypes in the arguments of what stays with torch."""
    if isinstance(tree, (tuple, list)):
        return type(tree)(_in_dtype(item, dtype) for item in tree)
    if isinstance(tree, dict):
        return {key: _in_dtype(item, dtype) for key, item in tree.items()}
    return dtype if isinstance(tree, torch.dtype) and tree in REALS else tree
