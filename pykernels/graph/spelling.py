"""Bring a captured graph to one spelling, so that matching has to know only one.

`normalize` rewrites the variants of an operation (``convolution``, ``addmm``, ``hardtanh(0, 6)``, ``x * sigmoid(x)``,
``mean((2, 3))`` ...) into the one that is matched.
"""

from __future__ import annotations

import operator

from torch import fx

from pykernels.graph.layer_norm import spelled_out_layer_norm
from pykernels.graph.nodes import argument, arguments, aten, erase_dead, facts, is_call, name_of, only_user, replace

__all__ = ["normalize", "shuffle_last"]


def normalize(module: fx.GraphModule, training: bool = False) -> None:
    """Rewrite variants of an operation to the spelling that is matched; `training` leaves batch norms as they are."""
    for node in list(module.graph.nodes):
        if node.op == "call_function":
            rule = _RULES.get(name_of(node))
            if rule is not None and not (training and rule is _inference_batch_norm):
                rule(module, node)
    for node in list(module.graph.nodes):
        if is_call(node, "aten.div", "aten.mul"):
            _spelled_out_activation(node)
            spelled_out_layer_norm(module, node)
    erase_dead(module)


def shuffle_last(module: fx.GraphModule) -> None:
    """Shuffle channels where they lie last: see `_channel_shuffle`."""
    for node in list(module.graph.nodes):
        if is_call(node, "aten.reshape"):
            _channel_shuffle(module, node)
    erase_dead(module)


def _convolution(module: fx.GraphModule, node: fx.Node) -> None:
    x, weight, bias, stride, padding, dilation, transposed, output_padding, groups = list(arguments(node).values())[:9]
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
    x, weight, bias, mean, var, momentum, eps = arguments(node).values()
    node.meta["val"] = node.meta["val"][0]
    replace(node, aten.batch_norm.default, (x, weight, bias, mean, var, False, momentum, eps, False))
    for reader in readers:
        reader.replace_all_uses_with(node)
        module.graph.erase_node(reader)


def _addmm(module: fx.GraphModule, node: fx.Node) -> None:
    bias, x, transposed = node.args[:3]
    known = facts(bias)
    if is_call(transposed, "aten.t") and not node.kwargs and known is not None and len(known.shape) == 1:
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
    if node.target is not aten.view.dtype:
        replace(node, aten.reshape.default, node.args[:2])


def _mean(module: fx.GraphModule, node: fx.Node) -> None:
    """The mean over height and width is the adaptive average pool to 1x1 (and a flatten)."""
    source, known = node.args[0], facts(node.args[0])
    dims = argument(node, "dim")
    if known is None or len(known.shape) != 4 or not dims or argument(node, "dtype") is not None:
        return
    if not known.dtype.is_floating_point or sorted(dim % 4 for dim in dims) != [2, 3]:
        return
    node.meta["spelled"] = "mean"
    if argument(node, "keepdim"):
        replace(node, aten.adaptive_avg_pool2d.default, (source, [1, 1]))
        return
    with module.graph.inserting_before(node):
        pooled = module.graph.call_function(aten.adaptive_avg_pool2d.default, (source, [1, 1]))
    pooled.meta = {key: value for key, value in node.meta.items() if key != "val"}
    replace(node, aten.flatten.using_ints, (pooled, 1))


def _sum(module: fx.GraphModule, node: fx.Node) -> None:
    """The sum of a few slices is a sum of tensors."""
    known, dims = facts(node.args[0]), argument(node, "dim")
    if known is None or not dims or len(dims) != 1 or argument(node, "dtype") is not None or argument(node, "keepdim"):
        return
    dim = dims[0] % len(known.shape)
    count = known.shape[dim]
    if not known.dtype.is_floating_point or not isinstance(count, int) or not 1 < count <= 4 or len(known.shape) < 5:
        return
    meta = {key: value for key, value in node.meta.items() if key != "val"}
    with module.graph.inserting_before(node):
        parts = [module.graph.call_function(aten.select.int, (node.args[0], dim, index)) for index in range(count)]
        total = parts[0]
        for part in parts[1:-1]:
            total = module.graph.call_function(aten.add.Tensor, (total, part))
            total.meta = dict(meta)
    for part in parts:
        part.meta = dict(meta)
    replace(node, aten.add.Tensor, (total, parts[-1]))


def _max_pool_indices(module: fx.GraphModule, node: fx.Node) -> None:
    """A max pool whose indices nobody reads is the plain one."""
    readers = list(node.users)
    if any(reader.target is not operator.getitem or reader.args[1] != 0 for reader in readers):
        return
    node.meta["val"] = node.meta["val"][0]
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
    "aten.sum": _sum,
    "aten.max_pool2d_with_indices": _max_pool_indices,
    "aten.pad": _pad,
}


def _spelled_out_activation(node: fx.Node) -> None:
    """``relu6(x + 3) / 6`` is hardsigmoid, ``x * hardsigmoid(x)`` hardswish, ``x * sigmoid(x)`` silu, and
    ``0.5 * x * (1 + erf(x / sqrt(2)))`` gelu."""
    if is_call(node, "aten.mul") and (x := _erf_gate(node)) is not None:
        replace(node, aten.gelu.default, (x,))
        return
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
    if len(node.args) != 2 or node.kwargs or not isinstance(node.args[1], (int, float)):
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


def _erf_gate(node: fx.Node) -> fx.Node | None:
    """The x of a product of x, 0.5 and ``1 + erf(x / sqrt(2))``, in any order."""
    factors, number = [], 1.0
    pending = list(node.args)
    while pending:
        factor = pending.pop()
        if isinstance(factor, (int, float)):
            number *= factor
        elif is_call(factor, "aten.mul") and only_user(factor) is not None and not factor.kwargs:
            pending += factor.args
        else:
            factors.append(factor)
    if len(factors) != 2 or abs(number - 0.5) > 1e-6:
        return None
    for x, gate in (factors, factors[::-1]):
        if (
            is_call(gate, "aten.add")
            and gate.args[1:] == (1,)
            and not gate.kwargs
            and is_call(gate.args[0], "aten.erf")
        ):
            scaled = gate.args[0].args[0]
            if len(scaled.args) != 2 or scaled.kwargs or scaled.args[0] is not x:
                continue
            by = scaled.args[1]
            divided = is_call(scaled, "aten.div") and isinstance(by, float) and abs(by - 2**0.5) < 1e-6
            if divided or (is_call(scaled, "aten.mul") and isinstance(by, float) and abs(by - 0.5**0.5) < 1e-6):
                return x
    return None


def _shifted_relu6(node: object, reader: fx.Node) -> fx.Node | None:
    if not is_call(node, "aten.relu6") or only_user(node) is not reader:
        return None
    shifted = node.args[0]
    if is_call(shifted, "aten.add") and only_user(shifted) is node and shifted.args[1] == 3 and not shifted.kwargs:
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
        new.meta = {"nn_module_stack": node.meta.get("nn_module_stack")}
    replace(node, aten.permute.default, (joined, [0, 3, 1, 2]))
