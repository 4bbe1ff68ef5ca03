"""Bring a captured graph to one spelling, so that matching has to know only one.

`functionalize` turns ``relu_`` into ``relu`` where no alias can tell the difference; `normalize` rewrites the variants
of an operation (``convolution``, ``addmm``, ``hardtanh(0, 6)``, ``x * sigmoid(x)``, ``mean((2, 3))`` ...) into the one
the matcher reads; `share_quantizers` merges equal quantize/dequantize calls; `raise_quantizers` moves a quantize in
front of the moves, maxima and concatenations before it, so that these run on the 8-bit tensor.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from pykernels.graph.nodes import (
    MOVES,
    argument,
    arguments,
    aten,
    constant,
    erase_dead,
    facts,
    is_call,
    name_of,
    only_user,
    replace,
)

__all__ = ["functionalize", "normalize", "raise_quantizers", "share_quantizers"]

QUANTIZE = "quantized_decomposed.quantize_per_tensor"
DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor"
DEQUANTIZE_CHANNEL = "quantized_decomposed.dequantize_per_channel"
# Monotonic or copying operations: quantizing before them is quantizing after them, to the bit.
_COMMUTE = MOVES | {"aten.max_pool2d", "aten.upsample_nearest2d"}
_MULTI_OUTPUT = {"aten.chunk", "aten.split", "aten.split_with_sizes", "aten.unbind"}
_MAY_ALIAS = MOVES | {"getitem", "aten.dropout", "aten.to"}


def functionalize(module: fx.GraphModule) -> list[fx.Node]:
    """Replace in-place calls by functional ones; returns those an alias makes unsafe to replace, as they were."""
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    left: list[fx.Node] = []
    for node in module.graph.nodes:
        target = node.target
        if node.op != "call_function" or not hasattr(target, "_schema") or not target._schema.is_mutable:
            continue
        functional = _functional(target)
        source = node.args[0] if node.args else None
        if functional is None or not isinstance(source, fx.Node) or not _owned(source, node, order):
            left.append(node)
            continue
        for user in list(source.users):
            if user is not node and order[user] > order[node]:
                user.replace_input_with(source, node)
        node.target = functional
    return left


def _functional(target: Any) -> Any:
    packet, overload = str(target.overloadpacket).removeprefix("aten."), target._overloadname
    if not packet.endswith("_") or not hasattr(aten, packet[:-1]):
        return None
    return getattr(getattr(aten, packet[:-1]), overload, None)


def _owned(source: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether nothing that lives after `node` can see the memory of `source` except through `source` itself."""
    if source.op != "call_function":
        return False
    if any(name_of(user) in _MAY_ALIAS and order[user] < order[node] for user in source.users if user is not node):
        return False
    while name_of(source) in _MAY_ALIAS:
        parent = source.args[0]
        if not isinstance(parent, fx.Node) or only_user(parent) is not source or parent.op != "call_function":
            return False
        source = parent
    return True


def normalize(module: fx.GraphModule) -> None:
    """Rewrite variants of an operation to the spelling the matcher reads. Needs an annotated graph."""
    for node in list(module.graph.nodes):
        if node.op == "call_function":
            rule = _RULES.get(name_of(node))
            if rule is not None:
                rule(module, node)
    for node in list(module.graph.nodes):
        if is_call(node, "aten.div", "aten.mul"):
            _spelled_out_activation(node)
        elif is_call(node, "aten.reshape"):
            _channel_shuffle(module, node)
    erase_dead(module)


def _convolution(module: fx.GraphModule, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = node.args[:9]
    rank = len(stride)
    if rank not in (1, 2, 3):
        return
    if transposed:
        target = (aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input)[rank - 1]
        replace(node, target, (x, weight, bias, stride, padding, output_padding, groups, dilation))
    else:
        target = (aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)[rank - 1]
        replace(node, target, (x, weight, bias, stride, padding, dilation, groups))


def _inference_batch_norm(module: fx.GraphModule, node: fx.Node) -> None:
    """`_native_batch_norm_legit_no_training` yields (y, mean, rstd); `batch_norm` yields y."""
    readers = list(node.users)
    if any(reader.target is not operator.getitem or reader.args[1] != 0 for reader in readers):
        return
    x, weight, bias, mean, var, momentum, eps = node.args
    node.meta["facts"] = facts(readers[0]) if readers else None
    replace(node, aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False))
    for reader in readers:
        reader.replace_all_uses_with(node)
        module.graph.erase_node(reader)


def _addmm(module: fx.GraphModule, node: fx.Node) -> None:
    bias, x, transposed = node.args[:3]
    if is_call(transposed, "aten.t") and not node.kwargs:
        replace(node, aten.linear.default, (x, transposed.args[0], bias))


def _mm(module: fx.GraphModule, node: fx.Node) -> None:
    x, transposed = node.args[:2]
    if is_call(transposed, "aten.t"):
        replace(node, aten.linear.default, (x, transposed.args[0], None))


def _clamp(module: fx.GraphModule, node: fx.Node) -> None:
    values = arguments(node)
    if is_call(node, "aten.hardtanh"):
        low, high = values["min_val"], values["max_val"]
    elif is_call(node, "aten.clamp_min"):
        low, high = values["min"], None
    else:
        low, high = values["min"], values["max"]
    if isinstance(low, fx.Node) or isinstance(high, fx.Node) or low != 0:
        return
    if high is None:
        replace(node, aten.relu.default, node.args[:1])
    elif high == 6:
        replace(node, aten.relu6.default, node.args[:1])


def _view(module: fx.GraphModule, node: fx.Node) -> None:
    """Our activations are channels_last, where a `view` may have no strides to express it: `reshape` always works."""
    replace(node, aten.reshape.default, node.args[:2])


def _mean(module: fx.GraphModule, node: fx.Node) -> None:
    """The mean over height and width is the adaptive average pool to 1x1 (and a flatten)."""
    source, known = node.args[0], facts(node.args[0])
    dims = argument(node, "dim")
    if known is None or len(known.shape) != 4 or dims is None or argument(node, "dtype") is not None:
        return
    if not known.dtype.is_floating_point or sorted(dim % 4 for dim in dims) != [2, 3]:
        return
    node.meta["spelled"] = "mean"
    if argument(node, "keepdim"):
        replace(node, aten.adaptive_avg_pool2d.default, (source, [1, 1]))
        return
    with module.graph.inserting_before(node):
        pooled = module.graph.call_function(aten.adaptive_avg_pool2d.default, (source, [1, 1]))
    pooled.meta.update(node.meta)
    pooled.meta["facts"] = known._replace(shape=(*known.shape[:2], 1, 1))
    replace(node, aten.flatten.using_ints, (pooled, 1))


def _max_pool_indices(module: fx.GraphModule, node: fx.Node) -> None:
    """A max pool whose indices nobody reads is the plain one."""
    readers = list(node.users)
    if any(reader.target is not operator.getitem or reader.args[1] != 0 for reader in readers):
        return
    node.meta["facts"] = facts(readers[0]) if readers else None
    replace(node, aten.max_pool2d.default, node.args, dict(node.kwargs))
    for reader in readers:
        reader.replace_all_uses_with(node)
        module.graph.erase_node(reader)


def _pad(module: fx.GraphModule, node: fx.Node) -> None:
    values = arguments(node)
    if values["mode"] == "constant":
        replace(node, aten.constant_pad_nd.default, (node.args[0], values["pad"], values["value"] or 0))


_RULES = {
    "aten.convolution": _convolution,
    "aten._native_batch_norm_legit_no_training": _inference_batch_norm,
    "aten.addmm": _addmm,
    "aten.mm": _mm,
    "aten.clamp": _clamp,
    "aten.clamp_min": _clamp,
    "aten.hardtanh": _clamp,
    "aten.view": _view,
    "aten._unsafe_view": _view,
    "aten.mean": _mean,
    "aten.max_pool2d_with_indices": _max_pool_indices,
    "aten.pad": _pad,
}


def _spelled_out_activation(node: fx.Node) -> None:
    """``relu6(x + 3) / 6`` is hardsigmoid, ``x * hardsigmoid(x)`` hardswish, ``x * sigmoid(x)`` silu."""
    gated = _hard_gate(node)
    if gated is not None:
        x, factor = gated
        if factor is None:
            replace(node, aten.hardsigmoid.default, (x,))
        elif factor is x:
            replace(node, aten.hardswish.default, (x,))
        return
    if is_call(node, "aten.mul") and len(node.args) == 2:
        for x, gate in (node.args, node.args[::-1]):
            if is_call(gate, "aten.sigmoid") and gate.args[0] is x and only_user(gate) is node:
                replace(node, aten.silu.default, (x,))
                return
            if is_call(gate, "aten.hardsigmoid") and gate.args[0] is x and only_user(gate) is node:
                replace(node, aten.hardswish.default, (x,))
                return


def _hard_gate(node: fx.Node) -> tuple[fx.Node, fx.Node | None] | None:
    """Match ``relu6(x + 3) / 6`` -> (x, None) and ``(y * relu6(x + 3)) / 6`` -> (x, y)."""
    if len(node.args) != 2 or isinstance(node.args[1], fx.Node):
        return None
    divided = is_call(node, "aten.div") and node.args[1] == 6
    scaled = is_call(node, "aten.mul") and abs(float(node.args[1]) - 1 / 6) < 1e-7
    if not (divided or scaled):
        return None
    inner = node.args[0]
    x = _shifted_relu6(inner, node)
    if x is not None:
        return x, None
    if is_call(inner, "aten.mul") and only_user(inner) is node and len(inner.args) == 2:
        for factor, gate in (inner.args, inner.args[::-1]):
            x = _shifted_relu6(gate, inner)
            if x is not None and isinstance(factor, fx.Node):
                return x, factor
    return None


def _shifted_relu6(node: object, reader: fx.Node) -> fx.Node | None:
    if not is_call(node, "aten.relu6") or only_user(node) is not reader:
        return None
    shifted = node.args[0]
    if is_call(shifted, "aten.add") and only_user(shifted) is node and shifted.args[1] == 3:
        return shifted.args[0]
    return None


def _channel_shuffle(module: fx.GraphModule, node: fx.Node) -> None:
    """Shuffle channels where they lie last: in NHWC the shuffle is one transposing copy and stays channels_last.

    Spelled ``x.view(n, g, c, h, w).transpose(1, 2).reshape(n, -1, h, w)``, it would leave an NCHW tensor behind.
    """
    swap = node.args[0]
    if not is_call(swap, "aten.transpose") or only_user(swap) is not node or sorted(swap.args[1:]) != [1, 2]:
        return
    split = swap.args[0]
    if not is_call(split, "aten.reshape") or only_user(split) is not swap:
        return
    x = split.args[0]
    before, middle, after = facts(x), facts(split), facts(node)
    if before is None or middle is None or after is None or before.shape != after.shape:
        return
    if len(before.shape) != 4 or len(middle.shape) != 5:
        return
    if (middle.shape[0], *middle.shape[3:]) != (before.shape[0], *before.shape[2:]):
        return
    n, _, _, h, w = list(split.args[1])
    groups, channels = middle.shape[1:3]
    graph = module.graph
    with graph.inserting_before(node):
        last = graph.call_function(aten.permute.default, (x, [0, 2, 3, 1]))
        parts = graph.call_function(aten.reshape.default, (last, [n, h, w, groups, channels]))
        swapped = graph.call_function(aten.transpose.int, (parts, 3, 4))
        joined = graph.call_function(aten.reshape.default, (swapped, [n, h, w, groups * channels]))
    for new in (last, parts, swapped, joined):
        new.meta = {"facts": before, "nn_module_stack": node.meta.get("nn_module_stack")}
    replace(node, aten.permute.default, (joined, [0, 3, 1, 2]))


# --- quantize and dequantize ------------------------------------------------------------------------------------------


def share_quantizers(module: fx.GraphModule) -> None:
    """Merge quantize (dequantize) calls that read the same value with the same parameters."""
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    for node in list(module.graph.nodes):
        seen: dict[Any, fx.Node] = {}
        for user in sorted(node.users, key=order.__getitem__):
            if not is_call(user, QUANTIZE, DEQUANTIZE, DEQUANTIZE_CHANNEL) or user.args[0] is not node or user.kwargs:
                continue
            first = seen.setdefault((user.target, *user.args[1:]), user)
            if first is not user:
                user.replace_all_uses_with(first)
                module.graph.erase_node(user)


def raise_quantizers(module: fx.GraphModule) -> None:
    """Move quantize calls in front of operations that commute with rounding, so that these run in 8 bits."""
    graph = module.graph
    pending = [node for node in graph.nodes if is_call(node, QUANTIZE)]
    while pending:
        quantize = pending.pop()
        source = quantize.args[0]
        if not isinstance(source, fx.Node) or only_user(source) is not quantize or len(quantize.args) != 6:
            continue
        if is_call(source, "aten.cat"):
            inputs = list(source.args[0])
        elif name_of(source) in _COMMUTE - _MULTI_OUTPUT:
            inputs = [source.args[0]]
        else:
            continue
        if any(not isinstance(value, fx.Node) for value in inputs):
            continue
        floats = [value for value in inputs if not _quantized(value)]
        if is_call(source, "aten.cat"):
            if not floats or any(constant(module, value) is not None for value in floats):
                continue
        elif not floats or only_user(floats[0]) is not source or floats[0].op in ("placeholder", "get_attr"):
            continue
        dequantize, parameters = torch.ops.quantized_decomposed.dequantize_per_tensor.default, quantize.args[1:]
        for value in dict.fromkeys(floats):
            with graph.inserting_before(source):
                early = graph.call_function(quantize.target, (value, *parameters))
                back = graph.call_function(dequantize, (early, *parameters))
            early.meta.update(value.meta)
            back.meta.update(value.meta)
            source.replace_input_with(value, back)
            pending.append(early)
    share_quantizers(module)


def _quantized(node: fx.Node) -> bool:
    while name_of(node) in _COMMUTE or is_call(node, "getitem"):
        node = node.args[0]
    return is_call(node, DEQUANTIZE)
