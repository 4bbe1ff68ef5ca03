"""Folding: what can be computed before the first call is computed now.

* ``batch_norm`` after a convolution, a transposed convolution or a linear layer goes into its weights:
  ``w' = w * gamma / sqrt(var + eps)`` and ``b' = (b - mean) * gamma / sqrt(var + eps) + beta``, in float64.
* A batch norm that stands alone becomes ``x * scale + shift`` with a scale and a shift a channel, for images and lines
  a depthwise convolution.
* Dropout, identity copies and other calls that do nothing in evaluation are removed.
* Calls whose inputs are all constants are evaluated, except dequantized int8 weights: those stay int8, and are
  transposed as such.
* A constant that is added to a layer without a bias is its bias.
"""

from __future__ import annotations

import torch
from torch import fx

from pykernels.graph.alias import writes
from pykernels.graph.batch_norm import constant_scale_and_shift
from pykernels.graph.nodes import (
    aliases_layout,
    argument,
    arguments,
    aten,
    constant,
    facts,
    is_call,
    is_move,
    only_user,
    replace,
    set_constant,
)
from pykernels.graph.qdq import DEQUANTIZE, DEQUANTIZE_CHANNEL

__all__ = [
    "DROPOUTS",
    "fold_batch_norms",
    "fold_biases",
    "fold_constants",
    "remove_dropout",
    "remove_no_ops",
    "separate_batch_norms",
]

_CONVS = ("aten.conv1d", "aten.conv2d", "aten.conv3d")
_TRANSPOSED = ("aten.conv_transpose1d", "aten.conv_transpose2d", "aten.conv_transpose3d")
DROPOUTS = ("aten.dropout", "aten.feature_dropout", "aten.alpha_dropout", "aten.feature_alpha_dropout")
_COPIES = ("aten.alias", "aten.detach", "aten.clone", "aten.contiguous", "aten.lift_fresh_copy", "aten.lift_fresh")


def remove_dropout(module: fx.GraphModule) -> None:
    """Remove dropout that is off. Then it returns its very argument, which its schema does not tell."""
    for node in list(module.graph.nodes):
        if is_call(node, *DROPOUTS, *(f"{name}_" for name in DROPOUTS)) and _off(node):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)


def _off(node: fx.Node) -> bool:
    return argument(node, "train") is False


def remove_no_ops(module: fx.GraphModule, training: bool = False) -> None:
    """Remove dropout that is off, copies, casts to the same dtype, and slices of everything."""
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            continue
        source = node.args[0]
        if is_call(node, *DROPOUTS):
            useless = _off(node) or (node.args[1] == 0 and not training)
        elif is_call(node, *_COPIES):
            # A clone in another memory format is a layout flip for the sake of a `view` we make a `reshape` of anyway.
            useless = not any(aliases_layout(user) for user in node.users) and not _must_own_memory(node)
        elif is_call(node, "aten.to", "aten._to_copy"):
            before, after = facts(source), facts(node)
            useless = before is not None and after is not None and before.dtype == after.dtype and _stays(source, node)
        elif is_call(node, "aten.slice"):
            before, after = facts(source), facts(node)
            values = arguments(node)
            whole = values["start"] in (None, 0) and (values["end"] is None or values["end"] == 2**63 - 1)
            useless = before is not None and after is not None and whole and values["step"] == 1
        else:
            useless = False
        if useless and not writes(node):
            node.replace_all_uses_with(source)
            module.graph.erase_node(node)


def _stays(source: fx.Node, node: fx.Node) -> bool:
    """Whether both are on one device: `to` also moves."""
    return source.meta["val"].device == node.meta["val"].device


def _must_own_memory(node: fx.Node) -> bool:
    """Whether a copy can be told from what it copies: an input or a constant that is returned, or is written later."""
    source = node.args[0]
    while is_move(source):
        source = source.args[0]
    if source.op not in ("placeholder", "get_attr"):
        return False
    return any(user.op == "output" for user in node.users) or any(source in writes(user) for user in source.users)


def fold_constants(module: fx.GraphModule) -> None:
    """Evaluate calls that read nothing but constants; int8 weights stay int8 under their dequantize."""
    for node in list(module.graph.nodes):
        if is_call(node, "aten.t", "aten.permute", "aten.transpose"):
            _transpose_dequantized(module, node)
        inputs = node.all_input_nodes
        if node.op != "call_function" or not inputs or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if any(constant(module, source) is None for source in inputs) or node.target._schema.is_mutable:
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags or "dequantize" in str(node.target):
            continue
        values = fx.map_arg((node.args, dict(node.kwargs)), lambda n: constant(module, n))
        with torch.no_grad():
            result = node.target(*values[0], **values[1])
        if not isinstance(result, torch.Tensor):
            continue
        folded = set_constant(module, node, result, node.name)
        node.replace_all_uses_with(folded)
        module.graph.erase_node(node)


def _transpose_dequantized(module: fx.GraphModule, node: fx.Node) -> None:
    """The transpose of a dequantized constant is the transposed constant, dequantized."""
    source = node.args[0]
    values = constant(module, source.args[0]) if is_call(source, DEQUANTIZE, DEQUANTIZE_CHANNEL) else None
    if values is None:
        return
    parameters = list(source.args[1:])
    if is_call(source, DEQUANTIZE_CHANNEL):
        # sizes that tell dimensions apart say where the axis goes
        told = node.target(torch.empty(tuple(range(2, 2 + values.dim())), device="meta"), *node.args[1:]).shape
        parameters[2] = told.index(parameters[2] % values.dim() + 2)
    moved = set_constant(module, node, node.target(values, *node.args[1:]).contiguous(), node.name)
    replace(node, source.target, (moved, *parameters), dict(source.kwargs))


def fold_biases(module: fx.GraphModule) -> None:
    """Give a layer without a bias the constant that is added to it, one number an output channel."""
    for node in list(module.graph.nodes):
        if not is_call(node, "aten.add") or len(node.args) != 2 or node.kwargs:
            continue
        for layer, other in (node.args, node.args[::-1]):
            if not is_call(layer, "aten.linear", *_CONVS) or only_user(layer) is not node:
                continue
            values, known, added = arguments(layer), facts(layer), constant(module, other)
            if added is None or known is None or values["bias"] is not None or added.dtype != known.dtype:
                continue
            channel = len(known.shape) - 1 if is_call(layer, "aten.linear") else 1
            sizes = [1] * (len(known.shape) - added.dim()) + list(added.shape)
            channels = known.shape[channel]
            if sizes != [channels if d == channel else 1 for d in range(len(known.shape))]:
                continue
            bias = set_constant(module, layer, added.reshape(-1), layer.name + "_bias")
            positions = [argument.name for argument in layer.target._schema.arguments]
            replace(layer, layer.target, [bias if name == "bias" else values[name] for name in positions])
            node.replace_all_uses_with(layer)
            module.graph.erase_node(node)
            break


def fold_batch_norms(module: fx.GraphModule) -> int:
    """Fold batch norms into the layer before them, or make them an affine map; returns how many were folded."""
    folded = 0
    for node in list(module.graph.nodes):
        if not is_call(node, "aten.batch_norm"):
            continue
        affine = _scale_and_shift(module, node)
        if affine is None:
            continue
        scale, shift = affine
        layer = node.args[0]
        if isinstance(layer, fx.Node) and only_user(layer) is node and _fold_into(module, layer, scale, shift):
            node.replace_all_uses_with(layer)
            module.graph.erase_node(node)
            folded += 1
        else:
            _make_affine(module, node, scale, shift)
    return folded


def separate_batch_norms(module: fx.GraphModule) -> None:
    """Make affine maps of the batch norms that torchao would fold into a convolution which others read without them.

    Its folding looks at a batch norm's argument alone: not whether somebody else reads the convolution, not whether
    what looks like one now was a batch norm before, nor whether another one has gone into the same weight already.
    """
    for node in list(module.graph.nodes):
        if is_call(node, "aten.batch_norm") and _shares_its_layer(node):
            affine = _scale_and_shift(module, node)
            if affine is not None:
                _make_affine(module, node, *affine)


def _shares_its_layer(norm: fx.Node) -> bool:
    layer = norm.args[0]
    if not is_call(layer, *_CONVS, *_TRANSPOSED, "aten.linear"):
        return is_call(layer, "aten.batch_norm")
    if len(layer.users) > 1:
        return True
    alike = [next(iter(user.users), None) for user in layer.args[1].users]
    return any(not is_call(other, "aten.batch_norm") or other.args[1:5] != norm.args[1:5] for other in alike)


def _scale_and_shift(module: fx.GraphModule, node: fx.Node) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The float64 scale and shift of a batch norm in evaluation; None when it uses the batch's own statistics."""
    values = arguments(node)
    if values["training"]:
        return None
    statistics = values["running_mean"], values["running_var"]
    return constant_scale_and_shift(module, *statistics, float(values["eps"]), values["weight"], values["bias"])


def _fold_into(module: fx.GraphModule, layer: fx.Node, scale: torch.Tensor, shift: torch.Tensor) -> bool:
    """Scale the output channels of a layer with constant weights. False when it is not such a layer."""
    if not is_call(layer, "aten.linear", *_CONVS, *_TRANSPOSED):
        return False
    if is_call(layer, "aten.linear"):
        shape = facts(layer)
        if shape is None or len(shape.shape) != 2:  # of 3-D inputs batch norm takes dim 1, linear writes the last
            return False
    values = arguments(layer)
    weight, bias = constant(module, values["weight"]), None
    if weight is None or not weight.is_floating_point():
        return False
    if values["bias"] is not None:
        bias = constant(module, values["bias"])
        if bias is None:
            return False
    if is_call(layer, *_TRANSPOSED):  # [in, out / groups, ...]; group g owns rows g * in / groups and on
        groups = int(values["groups"])
        ins, outs = weight.shape[0], weight.shape[1]
        per_group = scale.view(groups, 1, outs).expand(groups, ins // groups, outs).reshape(ins, outs)
        factor = per_group.view(ins, outs, *[1] * (weight.dim() - 2))
    else:
        factor = scale.view(-1, *[1] * (weight.dim() - 1))
    new_weight = (weight.double() * factor).to(weight.dtype)
    new_bias = ((0 if bias is None else bias.double() * scale) + shift).to(weight.dtype)
    positions = [argument.name for argument in layer.target._schema.arguments]
    arguments_now = list(layer.args) + [values[name] for name in positions[len(layer.args) :]]
    arguments_now[positions.index("weight")] = set_constant(module, layer, new_weight, layer.name + "_weight")
    arguments_now[positions.index("bias")] = set_constant(module, layer, new_bias, layer.name + "_bias")
    replace(layer, layer.target, arguments_now)
    return True


def _make_affine(module: fx.GraphModule, node: fx.Node, scale: torch.Tensor, shift: torch.Tensor) -> None:
    """``batch_norm(x)`` becomes a scale and a shift a channel.

    Of images and lines that is a depthwise convolution, which takes the activation after it into the same pass; of
    anything else ``addcmul(shift, x, scale)`` with constants of shape [C, 1, ...].
    """
    shape = facts(node)
    if shape is None:
        return
    source, dims = node.args[0], len(shape.shape)
    node.meta["spelled"] = "batch_norm"
    scale, shift = scale.to(shape.dtype), shift.to(shape.dtype)
    if dims in (3, 4):
        flat = [1] * (dims - 2)
        weight = set_constant(module, node, scale.view(-1, 1, *flat), node.name + "_scale")
        bias = set_constant(module, node, shift, node.name + "_shift")
        target = aten.conv2d.default if dims == 4 else aten.conv1d.default
        replace(node, target, (source, weight, bias, flat, [0] * len(flat), flat, scale.numel()))
        return
    view = [-1] + [1] * (dims - 2)
    shift_node = set_constant(module, node, shift.view(view), node.name + "_shift")
    scale_node = set_constant(module, node, scale.view(view), node.name + "_scale")
    replace(node, aten.addcmul.default, (shift_node, source, scale_node))
