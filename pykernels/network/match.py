"""Find what our kernels can run in a canonical graph: anchors, the epilogue they absorb, and 8-bit operations.

A `Group` is one future call: a convolution or linear layer with the padding before it and the activation, residual add
and quantize after it; or a pool, add, multiply, concatenation or lookup table between quantized values. A group absorbs
a node only when nobody else reads what lies between, so that nothing is computed twice, and stands where its last node
stood, so that every operand is ready.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx

from pykernels.graph.nodes import ON_BYTES, arguments, constant, facts, is_call, name_of, names, only_user
from pykernels.graph.spelling import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE
from pykernels.ops._sizes import spread
from pykernels.ops.dtypes import REALS
from pykernels.ops.names import BY_ATEN as ACTIVATIONS

__all__ = ["ACTIVATIONS", "Group", "QParams", "Weight", "match", "quantized_source", "unary"]

# Pointwise functions of one tensor: on an 8-bit tensor each is a table of 256 entries.
_POINTWISE = names(
    """
    relu relu6 hardtanh clamp clamp_min clamp_max hardswish hardsigmoid sigmoid silu gelu tanh leaky_relu elu selu
    celu mish softplus softsign logsigmoid log_sigmoid hardshrink softshrink threshold abs neg exp sqrt square pow
    add sub mul div rsub
    """
)
_8BIT = (torch.uint8, torch.int8)


class QParams(NamedTuple):
    """Per-tensor affine parameters of an 8-bit value: real = (q - zero_point) * scale, q within [low, high]."""

    scale: float
    zero_point: int
    low: int
    high: int
    dtype: torch.dtype

    @property
    def full_range(self) -> bool:
        """Whether the clamp is the type's own, which is all the kernels know."""
        return (self.low, self.high) == ((0, 255) if self.dtype is torch.uint8 else (-128, 127))


class Weight(NamedTuple):
    """An int8 weight with one scale an output channel."""

    values: torch.Tensor
    scale: torch.Tensor


@dataclass
class Group:
    """One call of ours: which nodes of the graph it stands for and how they are fused."""

    kind: str
    nodes: list[fx.Node]
    x: fx.Node
    activation: str = "none"
    residual: fx.Node | None = None
    residual_order: str = "before"
    padding: tuple[int, int, int, int] | None = None
    weight: Weight | None = None
    inputs: Sequence[fx.Node] = ()
    out: QParams | None = None
    chain: list[fx.Node] = field(default_factory=list)

    @property
    def anchor(self) -> fx.Node:
        """The node the group is named after."""
        return self.chain[0] if self.chain else self.nodes[0]

    @property
    def last(self) -> fx.Node:
        """The node whose value the group yields."""
        return self.nodes[-1]


def qparams(module: fx.GraphModule, node: object) -> QParams | None:
    """Parameters of a per-tensor quantize or dequantize call when they are constants and 8-bit, else None."""
    if not is_call(node, QUANTIZE, DEQUANTIZE):
        return None
    _, scale, zero_point, low, high, dtype = node.args[:6]
    if isinstance(scale, fx.Node):
        value = constant(module, scale)
        scale = None if value is None or value.numel() != 1 else float(value)
    if isinstance(zero_point, fx.Node):
        value = constant(module, zero_point)
        zero_point = None if value is None or value.numel() != 1 else int(value)
    if scale is None or zero_point is None or dtype not in _8BIT:
        return None
    low = (0 if dtype is torch.uint8 else -128) if low is None else int(low)
    high = (255 if dtype is torch.uint8 else 127) if high is None else int(high)
    return QParams(float(scale), int(zero_point), low, high, dtype)


def quantized_source(module: fx.GraphModule, node: object) -> QParams | None:
    """Parameters of the 8-bit tensor behind a float value that was only moved since its dequantize, else None."""
    nearest = False
    while isinstance(node, fx.Node) and _passes(node):
        nearest = nearest or is_call(node, "aten.upsample_nearest2d")
        node = node.args[0]
    if is_call(node, "aten.cat"):
        sources = [quantized_source(module, value) for value in node.args[0]]
        same = len(set(sources)) == 1 and sources[0] is not None and sources[0].full_range
        return sources[0] if same else None
    found = qparams(module, node) if is_call(node, DEQUANTIZE) else None
    if found is None or facts(node) is None or facts(node).dtype is not torch.float32:
        return None
    if nearest and found.dtype is not torch.uint8:  # torch interpolates u8 and no s8
        return None
    return found


def _passes(node: fx.Node) -> bool:
    """Whether the lowering runs this call on the 8-bit tensor itself."""
    if is_call(node, "aten.max_pool2d"):
        known = facts(node)
        return known is not None and len(known.shape) == 4
    if is_call(node, "aten.constant_pad_nd"):
        return (node.args[2] if len(node.args) > 2 else 0) == 0
    return name_of(node) in ON_BYTES


def int8_weight(module: fx.GraphModule, node: object) -> Weight | None:
    """The s8 weight behind a dequantize of a constant: symmetric, per output channel or per tensor; else None."""
    if not is_call(node, DEQUANTIZE, DEQUANTIZE_CHANNEL):
        return None
    values = constant(module, node.args[0])
    if values is None or values.dtype is not torch.int8:
        return None
    if is_call(node, DEQUANTIZE):
        found = qparams(module, node)
        if found is None or found.zero_point != 0:
            return None
        return Weight(values, values.new_full((values.shape[0],), found.scale, dtype=torch.float32))
    scale, zero_point = (constant(module, value) for value in node.args[1:3])
    axis = node.args[3]
    if scale is None or axis not in (0, -values.dim()) or (zero_point is not None and bool((zero_point != 0).any())):
        return None
    return Weight(values, scale.float().contiguous())


def unary(node: fx.Node) -> bool:
    """Whether the node is a pointwise function of one tensor and numbers."""
    if name_of(node) not in _POINTWISE or not isinstance(node.args[0], fx.Node):
        return False
    return not any(isinstance(value, fx.Node) for value in (*node.args[1:], *node.kwargs.values()))


def match(module: fx.GraphModule) -> tuple[dict[fx.Node, Group], dict[fx.Node, str]]:
    """Group the graph: the groups by their last node, and why a node was left alone where a reason is known."""
    return _Matcher(module).run()


class _Matcher:
    def __init__(self, module: fx.GraphModule) -> None:
        self.module = module
        self.taken: set[fx.Node] = set()
        self.groups: dict[fx.Node, Group] = {}
        self.reasons: dict[fx.Node, str] = {}

    def run(self) -> tuple[dict[fx.Node, Group], dict[fx.Node, str]]:
        nodes = [node for node in self.module.graph.nodes if node.op == "call_function"]
        for node in nodes:
            if node not in self.taken and is_call(node, "aten.conv2d", "aten.conv1d", "aten.linear"):
                self._layer(node)
        for node in nodes:
            if node in self.taken:
                continue
            group = None
            if is_call(node, QUANTIZE):
                group = self._table(node)
            elif is_call(node, "aten.add", "aten.mul"):
                group = self._binary(node)
            elif is_call(node, "aten.cat"):
                group = self._cat(node)
            elif is_call(node, "aten.avg_pool2d", "aten.adaptive_avg_pool2d"):
                group = self._average(node)
            elif is_call(node, "aten.max_pool2d", "aten.max_pool2d_with_indices", "aten.adaptive_max_pool2d"):
                group = self._maximum(node)
            if group is not None:
                self._take(group)
        return self.groups, self.reasons

    def _take(self, group: Group) -> None:
        self.taken.update(group.nodes)
        self.groups[group.last] = group

    def _free_user(self, node: fx.Node) -> fx.Node | None:
        user = only_user(node)
        return None if user is None or user in self.taken or user.op != "call_function" else user

    # --- layers with weights ---

    def _layer(self, node: fx.Node) -> None:
        known, values = facts(node), arguments(node)
        x = values["input"]
        if known is None or known.dtype not in REALS:
            self.reasons[node] = f"dtype {known.dtype if known else 'unknown'}: float32, bfloat16 and float16 only"
            return
        linear = is_call(node, "aten.linear")
        if not linear and len(facts(x).shape) != (3 if is_call(node, "aten.conv1d") else 4):
            self.reasons[node] = "convolution without a batch dimension"
            return
        padding = None if linear else conv_padding(self.module, node)
        if not linear and padding is None:
            self.reasons[node] = "padding is not constant"
            return
        bias = values["bias"]
        if bias is not None and constant(self.module, bias) is None:
            self.reasons[node] = "the bias is computed at run time"
            return
        nodes = [node]
        source, weight = quantized_source(self.module, x), int8_weight(self.module, values["weight"])
        if not linear:
            before = self._zero_pad(x)
            if before is not None:
                widths = before.args[1]
                sides = tuple(int(w) for w in widths) + (0,) * (4 - len(widths))
                padding = tuple(a + b for a, b in zip(padding, sides, strict=True))
                nodes.insert(0, before)
                x = before.args[0]
                source = quantized_source(self.module, x)
        quantized = source is not None and weight is not None
        if weight is None and not self._constant_weight(values["weight"]):
            self.reasons[node] = "the weight is computed at run time"
            return
        kind = ("q" if quantized else "") + ("linear" if linear else "conv2d")
        group = Group(kind, nodes, x, padding=padding, weight=weight if quantized else None, chain=[node])
        self._absorb_epilogue(group, quantized, residuals=not (linear and quantized))
        self._take(group)

    def _constant_weight(self, node: fx.Node) -> bool:
        """A constant, or the dequantize of one that no int8 kernel takes."""
        if is_call(node, DEQUANTIZE, DEQUANTIZE_CHANNEL):
            node = node.args[0]
        return constant(self.module, node) is not None

    def _zero_pad(self, x: object) -> fx.Node | None:
        """A zero padding of height and width that only this convolution reads."""
        if not is_call(x, "aten.constant_pad_nd") or only_user(x) is None:
            return None
        widths, value = x.args[1], (x.args[2] if len(x.args) > 2 else 0)
        plain = all(isinstance(width, int) and width >= 0 for width in widths) and len(widths) in (2, 4)
        return x if plain and value == 0 else None

    def _absorb_epilogue(self, group: Group, quantized: bool, residuals: bool) -> None:
        """Follow the only reader: at most one activation and one residual add in either order, then a quantize."""
        while (user := self._free_user(group.last)) is not None:
            activation = self._activation(user)
            if activation is not None and group.activation == "none":
                group.activation = activation
            elif residuals and group.residual is None and (other := self._residual(group.last, user, quantized)):
                group.residual = other
                group.residual_order = "after" if group.activation != "none" else "before"
            elif quantized and is_call(user, QUANTIZE) and (out := qparams(self.module, user)):
                if out.full_range:
                    group.nodes.append(user)
                    group.out = out
                return
            else:
                return
            group.nodes.append(user)

    def _activation(self, node: fx.Node) -> str | None:
        name = ACTIVATIONS.get(name_of(node))
        if name == "gelu" and arguments(node)["approximate"] != "none":
            return None
        return name

    def _residual(self, value: fx.Node, add: fx.Node, quantized: bool) -> fx.Node | None:
        """The other operand of a plain add of equal shapes (an 8-bit one when the layer is quantized)."""
        if not is_call(add, "aten.add") or len(add.args) != 2 or add.kwargs.get("alpha", 1) != 1:
            return None
        other = add.args[1] if add.args[0] is value else add.args[0]
        if other is value or not isinstance(other, fx.Node) or facts(other) is None:
            return None
        if facts(other)[:2] != facts(value)[:2]:
            return None
        if quantized and quantized_source(self.module, other) is None:
            return None
        return other

    # --- between quantized values ---

    def _quantize_after(self, nodes: list[fx.Node]) -> QParams | None:
        """Absorb the quantize that alone reads the last node."""
        user = self._free_user(nodes[-1])
        out = qparams(self.module, user) if is_call(user, QUANTIZE) else None
        if out is None or not out.full_range:
            return None
        nodes.append(user)
        return out

    def _table(self, node: fx.Node) -> Group | None:
        """quantize(f(dequantize(q))) for pointwise f is one lookup; so is a change of parameters (f = identity)."""
        out = qparams(self.module, node)
        if out is None:
            return None
        chain: list[fx.Node] = []
        source = node.args[0]
        while isinstance(source, fx.Node) and source not in self.taken and unary(source) and only_user(source):
            chain.insert(0, source)
            source = source.args[0]
        found = quantized_source(self.module, source)
        if found is None or (not chain and found == out):
            return None
        return Group("qlookup", [*chain, node], source, out=out, chain=chain)

    def _binary(self, node: fx.Node) -> Group | None:
        if len(node.args) != 2 or node.kwargs or any(not isinstance(value, fx.Node) for value in node.args):
            return None
        a, b = node.args
        if any(quantized_source(self.module, value) is None for value in (a, b)):
            return None
        shape_a, shape_b = facts(a).shape, facts(b).shape
        kind = "qadd" if is_call(node, "aten.add") else "qmul"
        if shape_a != shape_b:
            gate_b, gate_a = _gates(shape_b, shape_a), _gates(shape_a, shape_b)
            if kind == "qadd" or not (gate_a or gate_b):
                self.reasons[node] = "8-bit operands of different shapes"
                return None
            if gate_a:
                a, b = b, a
        nodes, activation = [node], "none"
        user = self._free_user(node)
        if kind == "qadd" and user is not None and (name := self._activation(user)) is not None:
            nodes.append(user)
            activation = name
        out = self._quantize_after(nodes)
        if out is None:
            return None
        return Group(kind, nodes, a, activation=activation, inputs=(a, b), out=out)

    def _cat(self, node: fx.Node) -> Group | None:
        sources = [quantized_source(self.module, value) for value in node.args[0]]
        if not sources or any(source is None for source in sources) or len({s.dtype for s in sources if s}) != 1:
            return None
        nodes = [node]
        out = self._quantize_after(nodes)
        if out is None:
            if len(set(sources)) != 1 or not sources[0].full_range:
                return None
            out = sources[0]  # a plain copy; whoever wants floats dequantizes the result
        return Group("qcat", nodes, node.args[0][0], inputs=tuple(node.args[0]), out=out)

    def _average(self, node: fx.Node) -> Group | None:
        known = facts(node.args[0])
        if known is None or len(known.shape) != 4 or known.dtype not in REALS:
            self.reasons[node] = "not a 4-D float32, bfloat16 or float16 tensor"
            return None
        adaptive = is_call(node, "aten.adaptive_avg_pool2d")
        kind = "adaptive_avg_pool2d" if adaptive else "avg_pool2d"
        if adaptive and any(not isinstance(size, int) for size in node.args[1]):
            self.reasons[node] = "output size is not constant"
            return None
        if quantized_source(self.module, node.args[0]) is None:
            return Group(kind, [node], node.args[0])
        nodes = [node]
        out = self._quantize_after(nodes)
        return Group("q" + kind, nodes, node.args[0], out=out)

    def _maximum(self, node: fx.Node) -> Group | None:
        known = facts(node.args[0])
        if known is None or len(known.shape) != 4 or known.dtype not in REALS:
            self.reasons[node] = "not a 4-D float32, bfloat16 or float16 tensor"
            return None
        if is_call(node, "aten.max_pool2d_with_indices"):
            return Group("max_pool2d_with_indices", [node], node.args[0])
        if is_call(node, "aten.adaptive_max_pool2d"):  # yields (values, indices)
            return Group("adaptive_max_pool2d_with_indices", [node], node.args[0])
        return Group("max_pool2d", [node], node.args[0])


def _gates(small: tuple[int, ...], large: tuple[int, ...]) -> bool:
    """[N, C, 1, 1] against [N, C, H, W]: squeeze-excite."""
    return len(small) == len(large) == 4 and small[:2] == large[:2] and small[2:] == (1, 1)


def conv_padding(module: fx.GraphModule, node: fx.Node) -> tuple[int, int, int, int] | None:
    """(left, right, top, bottom) of a conv1d or conv2d call, also for ``padding="same"`` and ``"valid"``."""
    values: dict[str, Any] = arguments(node)
    one_d = is_call(node, "aten.conv1d")
    padding, dilation = values["padding"], values["dilation"]
    weight = facts(values["weight"])
    if padding == "valid":
        return (0, 0, 0, 0)
    if padding == "same":
        if weight is None:
            return None
        kernel = weight.shape[2:]
        sides: list[int] = []
        for size, step in reversed(list(zip(kernel, spread(dilation, len(kernel)), strict=True))):
            total = step * (size - 1)
            sides += [total // 2, total - total // 2]
        return tuple(sides + [0] * (4 - len(sides)))
    if any(not isinstance(value, int) for value in spread(padding, 1 if one_d else 2)):
        return None
    if one_d:
        (left,) = spread(padding, 1)
        return (left, left, 0, 0)
    top, left = spread(padding, 2)
    return (left, left, top, top)
