"""A lowered graph as JSON and back; its buffers are numbers of tensors that someone else keeps.

A graph is ``{"nodes": [...], "buffers": [[name, tensor], ...], "regions": [[name, graph], ...]}``, a node is
``[op, name, target, args, kwargs]`` with the arguments of `literals`, and in these ``{"node": 3}`` for the result of
node 3, which stands before. Names are only names: they are checked, since fx writes them into code.
"""

from __future__ import annotations

import keyword
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from pykernels.network.saved import operators
from pykernels.network.saved.literals import decode, encode, expect

__all__ = ["Unbuilt", "dump", "parse"]

_NODES = 2**16  # of a file: fx and Python's compiler take half a millisecond for each
_REGIONS = 8  # in one another
_TAKEN = fx.GraphModule(nn.Module(), fx.Graph())  # whose attributes no buffer may hide


def _identifier(name: Any, what: str) -> str:
    if type(name) is not str or not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise ValueError(f"{what} is named {name!r}, which is no identifier")
    return name


def _attribute(name: Any, what: str) -> str:
    """The name of a buffer or region."""
    if _identifier(name, what).startswith("__") or hasattr(_TAKEN, name):
        raise ValueError(f"{what} is named {name!r}, which an fx.GraphModule has of its own")
    return str(name)


# --- to JSON ---


def dump(program: fx.GraphModule, number_of: Callable[[torch.Tensor], int], depth: int = 0) -> dict[str, Any]:
    """`program` as JSON.

    Args:
        program: what `emit_fx` yields: placeholders, get_attrs, calls and an output, buffers and regions of its own.
        number_of: takes a buffer, returns the number that stands for it.

    Raises:
        ValueError: a call, an argument or a name cannot be saved; the message names it.
    """
    if depth > _REGIONS:
        raise ValueError(f"regions are nested more than {_REGIONS} deep")
    numbers: dict[fx.Node, int] = {}
    nodes: list[Any] = []
    for node in program.graph.nodes:
        nodes.append(_dump_node(node, numbers))
        numbers[node] = len(numbers)
    used = dict.fromkeys(str(node.target) for node in program.graph.nodes if node.op == "get_attr")
    buffers, regions = [], []
    for name in used:
        value = getattr(program, name)
        if isinstance(value, torch.Tensor):
            buffers.append([_attribute(name, "a buffer"), number_of(value)])
        elif isinstance(value, fx.GraphModule):
            regions.append([_attribute(name, "a region"), dump(value, number_of, depth + 1)])
        else:
            raise ValueError(f"the attribute {name!r} is a {type(value).__name__}")
    return {"nodes": nodes, "buffers": buffers, "regions": regions}


def _dump_node(node: fx.Node, numbers: dict[fx.Node, int]) -> list[Any]:
    def other(value: Any) -> Any:
        if not isinstance(value, fx.Node):
            raise ValueError(f"{node.name}: an argument is {value!r}, a {type(value).__name__}")
        return {"node": numbers[value]}

    name, target = _identifier(node.name, f"a {node.op}"), None
    if node.op == "get_attr":
        target = _attribute(node.target, "an attribute")
    elif node.op == "call_function":
        target = operators.name_of(node.target, node.kwargs)
        operators.check(node.target, node.args, dict(node.kwargs))
    elif node.op not in ("placeholder", "output"):
        raise ValueError(f"{name} is a {node.op}")
    args = [] if node.op == "placeholder" else [encode(value, other) for value in node.args]
    return [node.op, name, target, args, {key: encode(value, other) for key, value in node.kwargs.items()}]


# --- and back ---


class Unbuilt(nn.Module):
    """A graph that was read and found right, and its constants: without the Python code that fx makes of a graph, which
    takes as long as all else that loading does and is often not needed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.graph = fx.Graph()

    def build(self) -> fx.GraphModule:
        """The graph as a module, over the constants as they are now."""
        return fx.GraphModule(self, self.graph)


def parse(content: Any, tensors: list[torch.Tensor], budget: Iterator[int] | None = None, depth: int = 0) -> Unbuilt:
    """The graph that `dump` wrote; `tensors` are its buffers by their numbers.

    Raises:
        ValueError: it is none. Nothing of it was run.
    """
    budget = iter(range(_NODES)) if budget is None else budget
    if depth > _REGIONS:
        raise ValueError(f"regions are nested more than {_REGIONS} deep")
    if set(expect(content, dict, "a graph")) != {"nodes", "buffers", "regions"}:
        raise ValueError("a graph has nodes, buffers and regions")
    root = Unbuilt()
    for name, number in _pairs(content["buffers"], "a buffer"):
        if type(number) is not int or not 0 <= number < len(tensors):
            raise ValueError(f"the buffer {name} is tensor {number!r} of {len(tensors)}")
        _new(root, name, "a buffer")
        root.register_buffer(name, tensors[number])
    for name, region in _pairs(content["regions"], "a region"):
        _new(root, name, "a region")
        root.add_module(name, parse(region, tensors, budget, depth + 1).build())
    known: list[fx.Node] = []
    names: set[str] = set()
    for entry in expect(content["nodes"], list, "nodes"):
        if next(budget, None) is None:
            raise ValueError(f"it has more than {_NODES} nodes")
        if known and known[-1].op == "output":
            raise ValueError("nodes follow the output")
        known.append(_parse_node(root, entry, known, names))
    if not known or known[-1].op != "output":
        raise ValueError("a graph ends without an output")
    return root


def _pairs(content: Any, what: str) -> Iterator[tuple[Any, Any]]:
    for pair in expect(content, list, f"{what}s"):
        if len(expect(pair, list, what)) != 2:
            raise ValueError(f"{what} is a name and what it names")
        yield pair[0], pair[1]


def _new(root: Unbuilt, name: Any, what: str) -> None:
    if hasattr(root, _attribute(name, what)):
        raise ValueError(f"{what} is named {name!r}, as another one is")


def _parse_node(root: Unbuilt, entry: Any, known: list[fx.Node], names: set[str]) -> fx.Node:
    graph = root.graph
    if len(expect(entry, list, "a node")) != 5:
        raise ValueError("a node has an op, a name, a target, args and kwargs")
    op, name, target, *given = entry
    if _identifier(name, "a node") == "self":  # fx would take it for the module
        raise ValueError("a node is named 'self', which means something else")
    if name in names:
        raise ValueError(f"two nodes are named {name!r}")
    names.add(name)

    def other(kind: str, number: Any) -> fx.Node:
        if kind != "node":
            raise ValueError(f"{name}: an argument is a {kind!r}")
        if type(number) is not int or not 0 <= number < len(known):
            raise ValueError(f"{name}: an argument is node {number!r}, {len(known)} nodes stand before")
        return known[number]

    args = tuple(decode(value, other) for value in expect(given[0], list, f"{name}: args"))
    kwargs = {
        _identifier(key, f"{name}: a keyword"): decode(value, other)
        for key, value in expect(given[1], dict, f"{name}: kwargs").items()
    }
    if op == "call_function":
        target = operators.find(target)
        operators.check(target, args, kwargs)
        return graph.create_node(op, target, args, kwargs, name)
    if kwargs or (op == "output") != bool(args) or (target is None) != (op != "get_attr"):
        raise ValueError(f"{name}: a {op!r} does not look so")
    if op == "placeholder":
        if known and known[-1].op != op:
            raise ValueError(f"{name}: an input stands behind a call")
        node = graph.create_node(op, name, name=name)
        if node.name != name:  # fx gives another name to what hides a name of Python's or its own
            raise ValueError(f"an input is named {name!r}, which means something else")
        return node
    if op == "get_attr":
        if _attribute(target, "an attribute") not in root._buffers and target not in root._modules:
            raise ValueError(f"{name}: there is no buffer or region {target!r}")
        return graph.create_node(op, target, name=name)
    if op != "output" or len(args) != 1:
        raise ValueError(f"{name}: a {op!r} is no node of a saved graph")
    return graph.create_node(op, "output", args, name=name)
