"""Regions of a graph that export keeps as graphs of their own: ``torch.no_grad()`` and ``torch.autocast`` blocks."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

__all__ = ["inline_regions"]

_GRAD = "wrap_with_set_grad_enabled"
_AUTOCAST = "wrap_with_autocast"


def inline_regions(module: fx.GraphModule) -> bool:
    """Put the calls of each region into the graph itself; False when one is under autocast, which changes their dtypes.

    A network is for inference: whether gradients are recorded in a region has no meaning there.
    """
    whole = True
    for node in list(module.graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        if node.target.name() == _GRAD:
            _, body, *inputs = node.args
        elif node.target.name() == _AUTOCAST:
            _, _, enabled, _, body, *inputs = node.args
            if enabled:
                whole = False
                continue
        else:
            continue
        inner = module.get_submodule(str(body.target))
        whole &= inline_regions(inner)
        _inline(module, inner, node, body, inputs)
    return whole


def _inline(module: fx.GraphModule, inner: fx.GraphModule, call: fx.Node, body: fx.Node, inputs: list[Any]) -> None:
    known: dict[fx.Node, Any] = {}
    given = iter(inputs)
    with module.graph.inserting_before(call):
        for node in inner.graph.nodes:
            if node.op == "placeholder":
                known[node] = next(given)
            elif node.op == "output":
                outputs = fx.map_arg(node.args[0], known.__getitem__)
            else:
                known[node] = module.graph.node_copy(node, known.__getitem__)
    leaves = pytree.tree_leaves(outputs)
    for user in list(call.users):
        if user.target is operator.getitem:
            user.replace_all_uses_with(leaves[user.args[1]])
            module.graph.erase_node(user)
    if call.users:
        call.replace_all_uses_with(leaves[0])
    module.graph.erase_node(call)
    if not body.users:
        module.graph.erase_node(body)
