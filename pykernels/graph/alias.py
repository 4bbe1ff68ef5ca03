"""What shares memory with what, and in-place calls made functional.

What a call views and what it writes is said by its schema (``Tensor(a)``, ``Tensor(a!)``); where a schema is silent
(``dropout`` in evaluation and ``type_as`` may return their argument), the fake values that export recorded tell whether
two tensors share memory.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

aten = torch.ops.aten

__all__ = ["functionalize", "is_view", "writes"]


def is_view(target: object) -> bool:
    """Whether the schema of a call says that its result may share memory with its argument, which it does not write."""
    if not isinstance(target, torch._ops.OpOverload) or target._schema.is_mutable:
        return False
    return any(result.alias_info is not None for result in target._schema.returns)


def writes(node: fx.Node) -> list[fx.Node]:
    """The values that a call writes into, by its schema."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or not target._schema.is_mutable:
        return []
    found: list[fx.Node] = []
    for position, argument in enumerate(target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, fx.Node)]
    return found


def functionalize(module: fx.GraphModule) -> list[fx.Node]:
    """Replace in-place calls by functional ones where nobody else sees the memory; returns those left as they were."""
    if not any(writes(node) for node in module.graph.nodes):
        return []
    order = {node: index for index, node in enumerate(module.graph.nodes)}
    bases: dict[fx.Node, frozenset[fx.Node]] = {}
    sharing: dict[fx.Node, list[fx.Node]] = {}  # base -> every value that may share its memory
    left: list[fx.Node] = []
    for node in module.graph.nodes:
        written = writes(node)
        if written and not _replace_by_twin(node, written, bases, sharing, order):
            left.append(node)
        bases[node] = _bases(node, bases)
        for base in bases[node]:
            sharing.setdefault(base, []).append(node)
    return left


def _bases(node: fx.Node, bases: dict[fx.Node, frozenset[fx.Node]]) -> frozenset[fx.Node]:
    """The values whose memory the value of `node` may lie in."""
    if node.op != "call_function":
        return frozenset([node])
    if node.target is operator.getitem:
        return bases.get(node.args[0], frozenset([node]))
    storages = _storages(node)
    found: set[fx.Node] = set()
    for source in node.all_input_nodes:
        if is_view(node.target) or writes(node) or storages & _storages(source):
            found |= bases[source]
    return frozenset(found or [node])


def _storages(node: fx.Node) -> set[int]:
    leaves = pytree.tree_leaves(node.meta.get("val"))
    return {leaf.untyped_storage()._cdata for leaf in leaves if isinstance(leaf, torch.Tensor) and _strided(leaf)}


def _strided(tensor: torch.Tensor) -> bool:
    return tensor.layout is torch.strided and not tensor.is_quantized


def _replace_by_twin(
    node: fx.Node,
    written: list[fx.Node],
    bases: dict[fx.Node, frozenset[fx.Node]],
    sharing: dict[fx.Node, list[fx.Node]],
    order: dict[fx.Node, int],
) -> bool:
    """Make ``relu_`` ``relu``, where what it writes is a value of the graph's own that nothing else shows later on."""
    twin, source = _twin(node), written[0]
    if twin is None or len(written) > 1 or node.args[0] is not source:
        return False
    if any(base.op != "call_function" for base in bases[source]):
        return False
    for base in bases[source]:
        for other in sharing[base]:
            if other is not source and any(order[user] > order[node] for user in other.users):
                return False
    for user in list(source.users):
        if user is not node and order[user] > order[node]:
            user.replace_input_with(source, node)
    node.target = twin
    return True


def _twin(node: fx.Node) -> Any:
    """The functional overload of an in-place call, if it gives the shape and dtype of what would be written."""
    target: Any = node.target
    packet = str(target.overloadpacket).removeprefix("aten.")
    if target.namespace != "aten" or not packet.endswith("_") or not hasattr(aten, packet[:-1]):
        return None
    twin = getattr(getattr(aten, packet[:-1]), target._overloadname, None)
    if twin is None or len(twin._schema.returns) != 1 or not isinstance(node.args[0], fx.Node):
        return None
    before = node.args[0].meta.get("val")
    others = [leaf.meta.get("val") for leaf in node.all_input_nodes if leaf is not node.args[0]]
    return None if any(_promotes(before, other) for other in others) else twin


def _promotes(before: Any, other: Any) -> bool:
    """Whether a functional call may give another dtype or size than that of `before`, which an in-place call keeps."""
    if not isinstance(before, torch.Tensor) or not isinstance(other, torch.Tensor) or other.dim() == 0:
        return False
    return torch.promote_types(before.dtype, other.dtype) != before.dtype or other.dim() > before.dim()
