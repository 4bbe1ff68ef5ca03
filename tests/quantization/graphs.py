"""Reading a graph with quantize/dequantize nodes, for the tests of this folder."""

from __future__ import annotations

import torch
from torch.fx import GraphModule, Node

Q = torch.ops.quantized_decomposed.quantize_per_tensor.default
DQ = torch.ops.quantized_decomposed.dequantize_per_tensor.default
WEIGHT_DQ = torch.ops.quantized_decomposed.dequantize_per_channel.default
aten = torch.ops.aten


def calls(graph: GraphModule, target: object) -> list[Node]:
    """All calls of ``target``, in order."""
    return [node for node in graph.graph.nodes if node.op == "call_function" and node.target is target]


def is_int8(value: Node) -> bool:
    """True when a node is a dequantized u8 activation or s8 weight."""
    return value.op == "call_function" and value.target in (DQ, WEIGHT_DQ)


def scale_of_input(node: Node, index: int = 0) -> tuple[float, int]:
    """Scale and zero point of the int8 tensor a call reads."""
    value = node.args[index]
    assert isinstance(value, Node) and value.target is DQ, f"{node.name} reads fp32 from {value}"
    return value.args[1:3]


def scale_of_output(node: Node) -> tuple[float, int]:
    """Scale and zero point a call's only consumer quantizes its result with."""
    (user,) = node.users
    assert user.target is Q, f"{node.name} yields fp32 to {user}"
    return user.args[1:3]


def output_of(graph: GraphModule) -> Node:
    """The node that computes the network's (only) result."""
    (result,) = next(node for node in graph.graph.nodes if node.op == "output").args[0]
    return result


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value - reference).norm() / reference.norm())
