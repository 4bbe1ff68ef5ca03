"""Quantize and dequantize calls of a graph: shared where they are equal, and moved in front of what commutes with them.

`share_quantizers` merges equal calls; `raise_quantizers` moves a quantize in front of the moves, maxima and
concatenations before it, so that these run on the 8-bit tensor.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import fx

from pykernels.graph.nodes import constant, facts, is_call, is_copy_of_values, only_user

__all__ = [
    "DEQUANTIZE",
    "DEQUANTIZE_CHANNEL",
    "QUANTIZE",
    "QParams",
    "has_quantizers",
    "qparams",
    "raise_quantizers",
    "share_quantizers",
]

QUANTIZE = "quantized_decomposed.quantize_per_tensor"
DEQUANTIZE = "quantized_decomposed.dequantize_per_tensor"
DEQUANTIZE_CHANNEL = "quantized_decomposed.dequantize_per_channel"
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


def has_quantizers(module: object) -> bool:
    """Whether `module` is a graph with quantize or dequantize calls, as PT2E quantization makes it."""
    return isinstance(module, fx.GraphModule) and any(
        "quantized_decomposed" in str(n.target) for n in module.graph.nodes
    )


def qparams(module: fx.GraphModule, node: object) -> QParams | None:
    """Parameters of a per-tensor quantize or dequantize call when they are constants and 8-bit, else None."""
    if not isinstance(node, fx.Node) or not is_call(node, QUANTIZE, DEQUANTIZE):
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
        elif is_copy_of_values(source) and facts(source.args[0]) is not None:
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
            for new in (early, back):
                new.meta = {key: item for key, item in value.meta.items() if key != "val"}
            source.replace_input_with(value, back)
            pending.append(early)
    share_quantizers(module)


def _quantized(node: fx.Node) -> bool:
    while is_copy_of_values(node):
        node = node.args[0]
    return is_call(node, DEQUANTIZE)
