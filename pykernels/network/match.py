"""Find what our kernels can run in a canonical graph: steps, each a call and the epilogue that its kernel absorbs.

A step absorbs a call only when nobody else reads what lies between, so that nothing is computed twice, and stands where
its last call stood, so that every operand is ready. A convolution or linear layer takes the padding before it and the
activation, residual add and quantize after it; pools, adds, products, concatenations and pointwise functions between
quantized values become 8-bit steps. Float graphs that the quantizer annotates are matched by the same rules.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pykernels.graph.alias import writes
from pykernels.graph.nodes import (
    argument,
    arguments,
    constant,
    facts,
    is_call,
    is_copy_of_values,
    is_move,
    name_of,
    names,
    only_user,
)
from pykernels.graph.qdq import DEQUANTIZE, DEQUANTIZE_CHANNEL, QUANTIZE, QParams, qparams
from pykernels.network.step import Step, Weight
from pykernels.ops._sizes import spread
from pykernels.ops.dtypes import REALS
from pykernels.ops.names import BY_ATEN as ACTIVATIONS

__all__ = ["ACTIVATIONS", "CURVES", "is_zero_pad", "match", "quantized_source", "runs_on_bytes", "same_shape", "unary"]

# Activations of networks: those that kernels apply, and those that only a table of 256 entries computes.
CURVES = frozenset(ACTIVATIONS) | names(
    """
    hardtanh clamp clamp_min clamp_max leaky_relu elu selu celu mish softplus softsign logsigmoid log_sigmoid hardshrink
    softshrink threshold
    """
)
# Pointwise functions of one tensor: on an 8-bit tensor each is a table.
_POINTWISE = CURVES | names("abs neg exp sqrt square pow add sub mul div rsub")
_LAYERS = ("aten.conv2d", "aten.conv1d", "aten.linear")
_AVERAGES = ("aten.avg_pool2d", "aten.adaptive_avg_pool2d")
_MAXIMA = {
    "aten.max_pool2d": "max_pool2d",
    "aten.max_pool2d_with_indices": "max_pool2d_with_indices",
    "aten.adaptive_max_pool2d": "adaptive_max_pool2d_with_indices",  # which yields (values, indices)
}
_UPSAMPLES = ("aten.upsample_nearest2d", "aten.upsample_bilinear2d")
_REASONS = {
    "aten.conv_transpose1d": "transposed convolution: no kernel of ours",
    "aten.conv_transpose2d": "transposed convolution in training, or of weights or a geometry that no ordinary one has",
    "aten.conv_transpose3d": "transposed convolution: no kernel of ours",
    "aten.conv3d": "3-D convolution: no kernel of ours",
    "aten.addcmul": "batch norm that stands alone: a scale and a shift",
    "aten.batch_norm": "batch norm with statistics of its own",
}
_ELEMENTWISE = frozenset(ACTIVATIONS) | names(
    "hardtanh clamp leaky_relu elu add sub mul div cat softmax log_softmax mean sum stack constant_pad_nd"
)


def match(
    module: fx.GraphModule, *, annotating: bool = False, norms: bool = False, apart: frozenset[str] = frozenset()
) -> list[Step]:
    """The steps of a canonical graph, in the order of their last calls; every call is in exactly one.

    Args:
        annotating: the steps of a float graph are those that int8 kernels will run.
        norms: a layer takes the batch norm after it, too: in a graph that trains these are not folded.
        apart: names of nodes that are never fused to another.
    """
    return _Matcher(module, annotating, norms, apart).run()


def same_shape(a: object, b: object) -> bool:
    """Whether two nodes surely have the same shape: symbolic sizes must be the same expression."""
    first, second = facts(a), facts(b)
    return first is not None and second is not None and first.shape == second.shape


def quantized_source(module: fx.GraphModule, node: object) -> QParams | None:
    """Parameters of the 8-bit tensor behind a float value that was only moved since its dequantize, else None."""
    while isinstance(node, fx.Node) and runs_on_bytes(node):
        node = node.args[0]
    if isinstance(node, fx.Node) and is_call(node, "aten.cat"):
        sources = [quantized_source(module, value) for value in node.args[0]]
        same = len(set(sources)) == 1 and sources[0] is not None and sources[0].full_range
        return sources[0] if same else None
    known = facts(node)
    if not is_call(node, DEQUANTIZE) or known is None or known.dtype is not torch.float32:
        return None
    return qparams(module, node)


def runs_on_bytes(node: fx.Node) -> bool:
    """Whether this call of a tensor in 8 bits runs on the bytes themselves."""
    if is_call(node, "aten.max_pool2d"):
        known = facts(node)
        return known is not None and len(known.shape) == 4
    return is_zero_pad(node) or is_copy_of_values(node)


def is_zero_pad(node: object) -> bool:
    """Whether `node` pads with constant zeros, which 8 bits hold exactly: the zero point."""
    return is_call(node, "aten.constant_pad_nd") and argument(node, "value") == 0


def int8_weight(module: fx.GraphModule, node: object) -> Weight | None:
    """The s8 weight behind a dequantize of a constant: symmetric, per output channel or per tensor; else None."""
    if not isinstance(node, fx.Node) or not is_call(node, DEQUANTIZE, DEQUANTIZE_CHANNEL):
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
    if name_of(node) not in _POINTWISE or not node.args or not isinstance(node.args[0], fx.Node):
        return False
    return not any(isinstance(value, fx.Node) for value in (*node.args[1:], *node.kwargs.values()))


class _Matcher:
    def __init__(self, module: fx.GraphModule, annotating: bool, norms: bool, apart: frozenset[str]) -> None:
        self.module = module
        self.annotating, self.norms, self.apart = annotating, norms, apart
        self.order = {node: index for index, node in enumerate(module.graph.nodes)}
        self.taken: set[fx.Node] = set()
        self.steps: list[Step] = []
        self.reasons: dict[fx.Node, str] = {}

    def run(self) -> list[Step]:
        nodes = [node for node in self.module.graph.nodes if node.op == "call_function"]
        # To be quantized, backwards: of two layers meeting in an add the later one takes it, and what the other has
        # written is observed before.
        for node in reversed(nodes) if self.annotating else nodes:
            if is_call(node, *_LAYERS) and node.name not in self.apart:
                self._take(self._layer(node))
        for node in nodes:
            if node not in self.taken:
                self._take(self._light(node))
        for node in nodes:
            if node not in self.taken:
                self._take(self._pointwise(node))
        for node in nodes:
            if node not in self.taken:
                self._take(self._left(node))
        self.steps.sort(key=lambda step: self.order[step.output])
        return self.steps

    def _take(self, step: Step | None) -> None:
        if step is not None:
            self.taken.update(step.nodes)
            self.steps.append(step)

    def _left(self, node: fx.Node) -> Step:
        name = name_of(node)
        kind = "move" if is_move(node) else "torch"
        reason = self.reasons.get(node) or _REASONS.get(name)
        if writes(node):
            reason = "it writes an input, or state that the network keeps"
        if reason is None:
            fusable = name in _ELEMENTWISE
            reason = "not beside a layer it could be fused into" if fusable else "no kernel of ours"
        return Step(kind, [node], [(value, node) for value in node.all_input_nodes], reason=reason)

    def _free_user(self, node: fx.Node) -> fx.Node | None:
        user = only_user(node)
        free = user is not None and user not in self.taken and user.op == "call_function"
        return user if free and user.name not in self.apart else None

    # --- layers with weights ---

    def _layer(self, node: fx.Node) -> Step | None:
        known, values = facts(node), arguments(node)
        x, given = values["input"], facts(values["input"])
        if known is None or given is None or known.dtype not in REALS:
            self.reasons[node] = f"dtype {known.dtype if known else 'unknown'}: float32, bfloat16 and float16 only"
            return None
        if self.annotating and known.dtype is not torch.float32:
            return None
        linear = is_call(node, "aten.linear")
        if not linear and len(given.shape) != (3 if is_call(node, "aten.conv1d") else 4):
            self.reasons[node] = "convolution without a batch dimension"
            return None
        if not linear and not _constant_geometry(node):
            self.reasons[node] = "padding, stride or dilation is not constant"
            return None
        bias = values["bias"]
        if bias is not None and constant(self.module, bias) is None and not self.norms:
            self.reasons[node] = "the bias is computed at run time"
            return None
        if self.norms:
            held = isinstance(values["weight"], fx.Node) and values["weight"].op == "get_attr"
        else:
            held = self._constant_weight(values["weight"])
        weight = facts(values["weight"])
        if not held or weight is None or len(weight.shape) != (2 if linear else len(given.shape)):
            self.reasons[node] = "the weight is computed at run time"
            return None
        nodes, operands = [node], [(x, node)]
        source = quantized_source(self.module, x)
        if not linear and self._zero_pad(x, len(given.shape) - 2):
            nodes, operands = [x, node], [(x.args[0], x)]
            source = quantized_source(self.module, x.args[0])
        quantized = source is not None and int8_weight(self.module, values["weight"]) is not None
        step = Step("linear" if linear else "conv2d", nodes, operands, quantized=quantized)
        if self.norms and not linear:
            norm = self._free_user(node)
            if is_call(norm, "aten.batch_norm"):
                step.nodes.append(norm)
        self._absorb_epilogue(step, residuals=not (linear and (quantized or self.annotating)))
        return step

    def _constant_weight(self, node: Any) -> bool:
        """A constant, or the dequantize of one that no int8 kernel takes."""
        if is_call(node, DEQUANTIZE, DEQUANTIZE_CHANNEL):
            node = node.args[0]
        return constant(self.module, node) is not None

    def _zero_pad(self, x: object, dims: int) -> bool:
        """A zero padding of the `dims` last dimensions that only this convolution reads."""
        if not isinstance(x, fx.Node) or not is_zero_pad(x) or only_user(x) is None or x.name in self.apart:
            return False
        widths = x.args[1]
        return len(widths) <= 2 * dims and all(isinstance(width, int) and width >= 0 for width in widths)

    def _absorb_epilogue(self, step: Step, residuals: bool) -> None:
        """Follow the only reader: at most one activation and one residual add in either order, then a quantize."""
        while (user := self._free_user(step.output)) is not None:
            activation = self._activation(user)
            if activation is not None and step.activation == "none":
                step.activation = activation
            elif residuals and step.residual_order is None and (other := self._residual(step, user)):
                step.operands.append((other, user))
                step.residual_order = "after" if step.activation != "none" else "before"
            elif step.quantized and is_call(user, QUANTIZE) and (out := qparams(self.module, user)):
                if out.full_range:
                    step.nodes.append(user)
                    step.out = out
                return
            else:
                return
            step.nodes.append(user)

    def _activation(self, node: fx.Node) -> str | None:
        name = ACTIVATIONS.get(name_of(node))
        if name == "gelu" and argument(node, "approximate") != "none":
            return None
        return name

    def _residual(self, step: Step, add: fx.Node) -> fx.Node | None:
        """The other operand of a plain add of equal shapes (an 8-bit one when the layer is quantized)."""
        if not _plain(add, "aten.add"):
            return None
        value = step.output
        other = add.args[1] if add.args[0] is value else add.args[0]
        if other is value or other.op == "get_attr" or not same_shape(other, value):
            return None
        if facts(other).dtype != facts(value).dtype:
            return None
        if step.quantized and quantized_source(self.module, other) is None:
            return None
        # What is observed between two 8-bit kernels must be there before the one that reads it.
        if self.annotating and self.order[other] > self.order[next(n for n in step.nodes if is_call(n, *_LAYERS))]:
            return None
        return other

    # --- between quantized values ---

    def _light(self, node: fx.Node) -> Step | None:
        if is_call(node, QUANTIZE):
            return self._table(node)
        if is_call(node, "aten.add", "aten.mul"):
            found = self._binary(node)
            if found is not None:
                return found
        if is_call(node, "aten.cat"):
            return self._cat(node)
        if is_call(node, *_AVERAGES, *_MAXIMA):
            return self._pool(node)
        if is_call(node, *_UPSAMPLES, "pykernels.interleave"):
            return self._resized(node)
        if self.annotating and unary(node):
            return Step("lookup", [node], [(node.args[0], node)])
        return None

    def _quantize_after(self, step: Step) -> None:
        """Absorb the quantize that alone reads the last call."""
        user = self._free_user(step.output)
        out = qparams(self.module, user)
        if out is not None and is_call(user, QUANTIZE) and out.full_range:
            step.nodes.append(user)
            step.out = out

    def _table(self, node: fx.Node) -> Step | None:
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
        return Step("lookup", [*chain, node], [(source, (*chain, node)[0])], quantized=True, out=out)

    def _binary(self, node: fx.Node) -> Step | None:
        kind = name_of(node).removeprefix("aten.")
        if not _plain(node, "aten.add", "aten.mul"):
            return None
        a, b = node.args
        eight = all(quantized_source(self.module, value) is not None for value in (a, b))
        if not eight and not self.annotating:
            return None
        if not same_shape(a, b):
            if kind == "add" or not (_gates(a, b) or _gates(b, a)):
                self.reasons[node] = "8-bit operands of different shapes"
                return None
            if _gates(a, b) and eight:
                a, b = b, a
        step = Step(kind, [node], [(a, node), (b, node)], quantized=eight)
        user = self._free_user(node)
        activation = None if user is None or kind != "add" else self._activation(user)
        if activation is not None and (eight or activation in ("relu", "relu6")):
            step.nodes.append(user)
            step.activation = activation
        if eight:
            self._quantize_after(step)
        return step if step.out is not None or self.annotating else None

    def _cat(self, node: fx.Node) -> Step | None:
        values = node.args[0]
        if not isinstance(values, (list, tuple)) or not values or not all(isinstance(v, fx.Node) for v in values):
            return None
        step = Step("cat", [node], [(value, node) for value in values])
        if self.annotating:
            return step
        sources = [quantized_source(self.module, value) for value in values]
        if any(source is None for source in sources) or len({s.dtype for s in sources if s}) != 1:
            return None
        step.quantized = True
        self._quantize_after(step)
        if step.out is None:
            if len(set(sources)) != 1 or not sources[0].full_range:
                return None
            step.out = sources[0]  # a plain copy; whoever wants floats dequantizes the result
        return step

    def _pool(self, node: fx.Node) -> Step | None:
        known = facts(node.args[0])
        if known is None or len(known.shape) != 4 or known.dtype not in REALS:
            self.reasons[node] = "not a 4-D float32, bfloat16 or float16 tensor"
            return None
        if not _constant_geometry(node):
            self.reasons[node] = "the size is not constant"
            return None
        name = name_of(node)
        step = Step(_MAXIMA.get(name) or name.removeprefix("aten."), [node], [(node.args[0], node)])
        step.quantized = quantized_source(self.module, node.args[0]) is not None
        if step.quantized and name in _AVERAGES:
            self._quantize_after(step)
        elif step.quantized and name != "aten.max_pool2d":
            step.quantized = False
        return step

    def _resized(self, node: fx.Node) -> Step | None:
        """Upsampling, and phases put in their places; 8 bits keep their scale."""
        known = facts(node.args[0])
        if known is None or len(known.shape) != 4 or known.dtype not in REALS:
            self.reasons[node] = "not a 4-D float32, bfloat16 or float16 tensor"
            return None
        step = Step(name_of(node).split(".")[1], [node], [(node.args[0], node)])
        source, user = quantized_source(self.module, node.args[0]), self._free_user(node)
        if not is_call(node, "aten.upsample_bilinear2d"):
            step.quantized = source is not None
        elif is_call(user, QUANTIZE) and source is not None and qparams(self.module, user) == source:
            self._quantize_after(step)  # rounded to the same scale: the bytes are what is blended
            step.quantized = step.out is not None
        return step

    # --- between floats ---

    def _pointwise(self, node: fx.Node) -> Step | None:
        """What nothing before it takes: activations, and the sums that they follow."""
        known = facts(node)
        if self.annotating or known is None or known.dtype not in REALS or not node.args:
            return None
        if _plain(node, "aten.add"):
            return self._real_sum(node)
        source = facts(node.args[0])
        if source is None or source.dtype != known.dtype:
            return None
        activation = self._activation(node)
        if activation is not None:
            return Step("activation", [node], [(node.args[0], node)], activation=activation)
        if is_call(node, "aten.leaky_relu"):
            return Step("leaky_relu", [node], [(node.args[0], node)])
        if is_call(node, "aten.softmax", "aten._softmax"):
            return Step("softmax", [node], [(node.args[0], node)])
        if is_call(node, "aten.layer_norm"):
            return self._layer_norm(node)
        if is_call(node, "aten.scaled_dot_product_attention"):
            return self._attention(node)
        return None

    def _real_sum(self, node: fx.Node) -> Step | None:
        """A sum that an activation follows; any other is torch's."""
        a, b = node.args
        user = self._free_user(node)
        activation = None if user is None else self._activation(user)
        if activation is None or facts(a).dtype != facts(b).dtype:
            return None
        if not same_shape(a, node):
            a, b = b, a
        if not same_shape(a, b) and not _gates(b, a):
            return None
        return Step("add", [node, user], [(a, node), (b, node)], activation=activation)

    def _layer_norm(self, node: fx.Node) -> Step | None:
        values = arguments(node)
        if len(values["normalized_shape"]) != 1:
            self.reasons[node] = "more than the last dimension is normalized"
            return None
        for name in ("weight", "bias"):
            if values[name] is not None and constant(self.module, values[name]) is None:
                self.reasons[node] = f"the {name} is computed at run time"
                return None
        step = Step("layer_norm", [node], [(values["input"], node)])
        self._quantize_after(step)
        return step

    def _attention(self, node: fx.Node) -> Step | None:
        values = arguments(node)
        names = ("query", "key", "value", *(("attn_mask",) if values["attn_mask"] is not None else ()))
        query, key, value, *mask = known = [facts(values[name]) for name in names]
        if any(found is None for found in known) or not all(isinstance(values[name], fx.Node) for name in names):
            return None
        if any(len(found.shape) != 4 or found.dtype != query.dtype for found in (query, key, value)):
            self.reasons[node] = "attention without a dimension for images, and one for heads"
            return None
        heads, share = query.shape[1], key.shape[1]
        grouped = values["enable_gqa"] and isinstance(heads, int) and isinstance(share, int) and heads % share == 0
        fits = key.shape[0] == value.shape[0] == query.shape[0] and key.shape[3] == query.shape[3]
        fits = fits and key.shape[1:3] == value.shape[1:3] and (heads == share or grouped)
        fits = fits and (isinstance(query.shape[3], int) or isinstance(values["scale"], float))
        if not fits or values["dropout_p"] != 0 or not isinstance(values["is_causal"], bool):
            self.reasons[node] = "attention with dropout, or of shapes that are spread over one another"
            return None
        if mask and not _spreads(mask[0], (*query.shape[:3], key.shape[2]), query.dtype):
            self.reasons[node] = "the mask of attention has not a column for each key, or another dtype"
            return None
        return Step("attention", [node], [(values[name], node) for name in names])


def _spreads(mask: Any, over: tuple[Any, ...], dtype: torch.dtype) -> bool:
    """Whether a mask is read along the keys, and repeated along the other dimensions where it has one of them."""
    sizes = over[4 - len(mask.shape) :] if 1 <= len(mask.shape) <= 4 else ()
    if not sizes or mask.dtype not in (torch.bool, dtype) or mask.shape[-1] != sizes[-1]:
        return False
    return all(size in (1, whole) for size, whole in zip(mask.shape, sizes, strict=True))


def _plain(node: fx.Node, *calls: str) -> bool:
    """A call of two tensors and nothing else: ``add`` has an ``alpha``."""
    two = len(node.args) == 2 and all(isinstance(value, fx.Node) and facts(value) is not None for value in node.args)
    return two and is_call(node, *calls) and not node.kwargs


def _gates(small: fx.Node, large: fx.Node) -> bool:
    """[N, C, 1, 1] against [N, C, H, W]: squeeze-excite."""
    few, many = facts(small).shape, facts(large).shape
    return len(few) == len(many) == 4 and few[:2] == many[:2] and few[2:] == (1, 1)


def _constant_geometry(node: fx.Node) -> bool:
    """Whether no size among the arguments of a layer or pool is computed at run time."""
    sizes = ("stride", "padding", "dilation", "kernel_size", "output_size", "groups")
    return not any(
        isinstance(item, fx.Node)
        for name, value in arguments(node).items()
        if name in sizes
        for item in ([value] if isinstance(value, (int, str, fx.Node)) else value or [])
    )


def conv_padding(node: fx.Node, pad: fx.Node | None) -> tuple[int, int, int, int]:
    """(left, right, top, bottom) of a convolution, ``"same"`` and ``"valid"`` too, and of the padding before it."""
    values = arguments(node)
    dims = 1 if is_call(node, "aten.conv1d") else 2
    padding, kernel = values["padding"], facts(values["weight"]).shape[2:]
    if padding == "valid":
        pairs = [(0, 0)] * dims
    elif padding == "same":
        reach = [step * (size - 1) for size, step in zip(kernel, spread(values["dilation"], dims), strict=True)]
        pairs = [(total // 2, total - total // 2) for total in reach]
    else:
        pairs = [(side, side) for side in spread(padding, dims)]
    sides = [side for pair in reversed(pairs) for side in pair]
    widths = [] if pad is None else list(pad.args[1])
    left, right, top, bottom = (a + b for a, b in zip(_four(sides), _four(widths), strict=True))
    return left, right, top, bottom


def _four(sides: list[int]) -> list[int]:
    return sides + [0] * (4 - len(sides))
