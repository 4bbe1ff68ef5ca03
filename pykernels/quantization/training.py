"""Quantization-aware training: fake quantization while a network trains, then conversion to the same kind of graph.

>>> prepared = prepare_qat(model, (x,))
>>> for x, y in loader: loss(prepared(x), y).backward(); ...
>>> quantized = convert_qat(prepared)

torchao fuses each convolution with its batch norm (statistics keep learning, weights are quantized as they will be when
folded), but writes the batch norm's epsilon as 1e-5 whatever the network's. The true ones are put back here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torchao.quantization.pt2e import disable_observer, enable_observer
from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_qat_pt2e

from pykernels.graph.capture import with_pytree
from pykernels.graph.fold import DROPOUTS, remove_no_ops
from pykernels.graph.nodes import argument, infer, is_call

from .quantizer import Int8Quantizer
from .recipes import RECORD, QuantizationRecord, capture_noting

TORCHAO_EPSILON = 1e-5
EPSILONS = "pykernels_batch_norm_epsilons"


def prepare_qat(
    model: torch.nn.Module,
    example_inputs: Sequence[Any] | torch.Tensor,
    *,
    dynamic_batch: bool = True,
    dynamic_shapes: Any = None,
    keep_float: Iterable[str] = (),
) -> GraphModule:
    """Capture ``model`` for training with fake quantization.

    Args:
        model: the fp32 module, trained or not; it is not changed (parameters are copied).
        example_inputs: a tuple of inputs, as for ``torch.export``.
        dynamic_batch: accept any batch size. Where the model fixes it, a warning and the record say why.
        dynamic_shapes: as for ``torch.export``, in place of the batch size alone.
        keep_float: names of graph nodes to leave in fp32.

    Returns:
        A graph module in training mode. Its ``train()`` and ``eval()`` raise, as for every exported graph: use
        :func:`train_mode` and :func:`eval_mode`.
    """
    record = QuantizationRecord("quantization-aware training")
    captured = capture_noting(model, example_inputs, {}, record, dynamic_batch, dynamic_shapes, training=True)
    graph = captured.module
    _own_parameters(graph)
    epsilons = {
        node.args[4].target: float(argument(node, "eps"))
        for node in graph.graph.nodes
        if is_call(node, "aten.batch_norm") and is_call(node.args[0], "aten.conv1d", "aten.conv2d")
    }
    quantizer = Int8Quantizer(qat=True, keep_float=keep_float)
    prepared = prepare_qat_pt2e(graph, quantizer)
    _restore_epsilons(prepared, epsilons)
    record.groups, record.left_float = len(quantizer.layers), dict(quantizer.left_float)
    prepared.meta[RECORD] = record
    prepared.meta[EPSILONS] = epsilons
    return train_mode(with_pytree(prepared, captured.in_spec, captured.out_spec))


def train_mode(prepared: GraphModule) -> GraphModule:
    """Batch norms and dropout of an exported graph train, ranges follow the data; returns the graph."""
    return _switch(prepared, training=True)


def eval_mode(prepared: GraphModule) -> GraphModule:
    """Batch norms and dropout of an exported graph evaluate, ranges stand still; returns the graph."""
    return _switch(prepared, training=False)


def _switch(prepared: GraphModule, *, training: bool) -> GraphModule:
    """torchao's ``move_exported_model_to_train`` would also reset every dropout to 0.5 and every epsilon to 1e-5."""
    for node in prepared.graph.nodes:
        if is_call(node, *DROPOUTS):
            node.args = (*node.args[:2], training)
        elif is_call(node, "aten.batch_norm"):
            node.args = (*node.args[:5], training, *node.args[6:])
    prepared.recompile()
    prepared.apply(enable_observer if training else disable_observer)
    return prepared


def convert_qat(prepared: GraphModule) -> GraphModule:
    """Convert what :func:`prepare_qat` gave, once trained, to a graph with quantize/dequantize nodes.

    ``prepared`` is used up. The result is of the same kind as that of :func:`quantize`.
    """
    eval_mode(prepared)
    # Folding will add 1e-5 to the variance; hand it the variance that then gives the network's own sum.
    for name, epsilon in prepared.meta.get(EPSILONS, {}).items():
        prepared.get_buffer(name).add_(epsilon - TORCHAO_EPSILON)
    record = prepared.meta.get(RECORD)
    converted = convert_pt2e(prepared)
    infer(converted)
    remove_no_ops(converted)
    converted.recompile()
    if record is not None:
        kept = {node.name for node in converted.graph.nodes}
        record.left_float = {name: why for name, why in record.left_float.items() if name in kept}
        converted.meta[RECORD] = record
    return converted


def _own_parameters(graph: GraphModule) -> None:
    """Give the graph copies of the parameters and buffers, which export shares with the module it captured."""
    for module in graph.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                copied = torch.nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                module._parameters[name] = copied
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = buffer.detach().clone()


def _restore_epsilons(graph: GraphModule, epsilons: dict[Any, float]) -> None:
    """Write each fused batch norm's own epsilon where torchao wrote 1e-5: in the norm and in the weight's scaling."""
    for node in graph.graph.nodes:
        if not is_call(node, "aten.batch_norm"):
            continue
        variance = node.args[4]
        epsilon = epsilons.get(variance.target) if isinstance(variance, Node) else None
        if epsilon is None or epsilon == TORCHAO_EPSILON:
            continue
        node.args = (*node.args[:7], epsilon, *node.args[8:])
        for user in variance.users:  # sqrt(running_var + 1e-5)
            if is_call(user, "aten.add") and user.args[1] == TORCHAO_EPSILON:
                user.args = (user.args[0], epsilon)
    graph.recompile()
