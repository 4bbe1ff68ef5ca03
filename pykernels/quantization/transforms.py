"""Rewrites of an exported graph that let more of it run in int8; every one keeps the function computed.

They run before annotation (``Int8Quantizer.transform_for_annotation``), in this order:

1. in-place calls become functional, so that a quantize node may stand between producer and consumer;
2. evaluation-mode dropout disappears;
3. spelled-out activations become one call: ``x * sigmoid(x)`` is silu, ``relu6(x + 3) / 6`` is hardsigmoid and
   ``x * hardsigmoid(x)`` is hardswish;
4. a batch norm that no convolution precedes (pre-activation networks: DenseNet, ResNet-v2) becomes a depthwise 1x1
   convolution: its weights are one number per channel, which symmetric per-channel int8 holds without error.
"""

from __future__ import annotations

import operator

import torch
from torch.fx import GraphModule, Node

from pykernels.graph.batch_norm import constant_scale_and_shift

from .patterns import (
    BATCH_NORMS,
    CONVOLUTIONS,
    DROPOUTS,
    FUNCTIONAL,
    LINEARS,
    argument,
    aten,
    fusable_activation,
    is_call,
    is_view,
    shape_of,
)


def prepare_graph(model: GraphModule, *, training: bool = False) -> GraphModule:
    """Apply the rewrites in place and return the graph module; ``training`` keeps dropout and batch norms."""
    functionalize(model)
    if not training:
        remove_dropout(model)
    merge_activations(model)
    if not training:
        batch_norm_to_convolution(model)
    model.graph.eliminate_dead_code()
    model.graph.lint()
    model.recompile()
    return model


def functionalize(model: GraphModule) -> None:
    """Replace ``relu_`` and its like by the functional call, and later uses of the overwritten tensor by its result.

    A call on a parameter or buffer (``num_batches_tracked.add_``) is left alone: there the side effect is the point.
    """
    order = {node: position for position, node in enumerate(model.graph.nodes)}
    for node in model.graph.nodes:
        if not is_call(node, frozenset(FUNCTIONAL)):
            continue
        overwritten = node.args[0]
        if overwritten.op == "get_attr" or _aliased(overwritten, node, order):
            continue
        node.target = FUNCTIONAL[node.target]
        overwritten.replace_all_uses_with(node, delete_user_cb=lambda user, at=node: order[user] > order[at])


def _aliased(overwritten: Node, writer: Node, order: dict[Node, int]) -> bool:
    """True when a view of ``overwritten``, or what it views, is read after ``writer``: it would see the write."""
    base = overwritten
    while is_view(base):
        base = base.args[0]
    pending, seen = [base], {base}
    while pending:
        value = pending.pop()
        if value is not overwritten and any(order[user] > order[writer] for user in value.users):
            return True
        for user in value.users:
            if is_view(user) and order[user] < order[writer] and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def remove_dropout(model: GraphModule) -> None:
    """Erase dropout that is off (``training=False``)."""
    for node in list(model.graph.nodes):
        if is_call(node, DROPOUTS) and argument(node, 2, "train", False) is False:
            node.replace_all_uses_with(node.args[0])
            model.graph.erase_node(node)


def merge_activations(model: GraphModule) -> None:
    """Recognise activations written out in arithmetic."""
    for node in list(model.graph.nodes):
        if _is_shifted_relu6(node):
            _replace(model, node, aten.hardsigmoid.default, node.args[0].args[0].args[0])
    for node in list(model.graph.nodes):
        if not is_call(node, frozenset({aten.mul.Tensor})) or len(node.args) != 2:
            continue
        for value, gate in (node.args, node.args[::-1]):
            if is_call(gate, frozenset({aten.sigmoid.default, aten.hardsigmoid.default})) and gate.args[0] is value:
                silu = gate.target is aten.sigmoid.default
                _replace(model, node, aten.silu.default if silu else aten.hardswish.default, value)
                break


def _is_shifted_relu6(node: Node) -> bool:
    """``relu6(x + 3) / 6``, or times 1/6."""
    divided = is_call(node, frozenset({aten.div.Tensor})) and node.args[1] == 6
    scaled = is_call(node, frozenset({aten.mul.Tensor})) and node.args[1] == 1 / 6
    if not (divided or scaled) or not isinstance(node.args[0], Node) or fusable_activation(node.args[0]) != "relu6":
        return False
    shifted = node.args[0].args[0]
    return is_call(shifted, frozenset({aten.add.Tensor})) and shifted.args[1] == 3 and not shifted.kwargs


def _replace(model: GraphModule, node: Node, target: object, value: Node) -> None:
    with model.graph.inserting_before(node):
        merged = model.graph.call_function(target, (value,))
    merged.meta = dict(node.meta)
    node.replace_all_uses_with(merged)
    model.graph.eliminate_dead_code()


def batch_norm_to_convolution(model: GraphModule) -> None:
    """Turn each remaining evaluation-mode batch norm of a 3-D or 4-D tensor into a depthwise 1x1 convolution."""
    for node in list(model.graph.nodes):
        if not is_call(node, BATCH_NORMS) or is_call(node.args[0], CONVOLUTIONS | LINEARS):
            continue
        native = node.target is aten._native_batch_norm_legit_no_training.default
        if not native and argument(node, 5, "training", False):
            continue
        shape = shape_of(node.args[0])
        affine = _batch_norm_affine(model, node, eps_index=6 if native else 7)
        if shape is None or len(shape) not in (3, 4) or affine is None:
            continue
        scale, shift = affine
        spatial = len(shape) - 2
        target = aten.conv1d.default if spatial == 1 else aten.conv2d.default
        with model.graph.inserting_before(node):
            weight = _parameter(model, f"{node.name}_weight", scale.reshape(-1, 1, *[1] * spatial))
            bias = _parameter(model, f"{node.name}_bias", shift)
            one, zero = [1] * spatial, [0] * spatial
            convolution = model.graph.call_function(target, (node.args[0], weight, bias, one, zero, one, scale.numel()))
        convolution.meta = dict(node.meta)
        if native:
            convolution.meta["val"] = node.meta["val"][0]
            for user in list(node.users):
                if is_call(user, frozenset({operator.getitem})) and user.args[1] == 0:
                    user.replace_all_uses_with(convolution)
        else:
            node.replace_all_uses_with(convolution)
        model.graph.eliminate_dead_code()


def _batch_norm_affine(model: GraphModule, node: Node, eps_index: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Scale and shift of an evaluation-mode batch norm, fp32 [C] each; None when its statistics are not constants."""
    gamma, beta, mean, variance = (argument(node, i, "") for i in range(1, 5))
    eps = argument(node, eps_index, "eps", 1e-5)
    assert isinstance(eps, float)
    affine = constant_scale_and_shift(model, mean, variance, eps, gamma, beta)
    return None if affine is None else (affine[0].float(), affine[1].float())


def _parameter(model: GraphModule, name: str, value: torch.Tensor) -> Node:
    while hasattr(model, name):
        name += "_"
    model.register_parameter(name, torch.nn.Parameter(value, requires_grad=False))
    node = model.graph.get_attr(name)
    fake_mode = next(
        (n.meta["val"].fake_mode for n in model.graph.nodes if hasattr(n.meta.get("val"), "fake_mode")), None
    )
    if fake_mode is not None:
        node.meta["val"] = fake_mode.from_tensor(value, static_shapes=True)
    return node
