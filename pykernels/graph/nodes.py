"""Small helpers over torch.fx graphs that every pass of the surgery shares.

A *plain* graph module, the form all passes work on, has one placeholder for each flat input, ``get_attr`` nodes for
parameters, buffers and constants, ``call_function`` nodes with ATen (or ``quantized_decomposed``) overloads, and one
``output``. Shapes are those of an example run (`annotate`), so that a pass may ask for a node's rank and dtype.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from pykernels.graph.export import constant

aten = torch.ops.aten

__all__ = [
    "MOVES",
    "ON_BYTES",
    "Facts",
    "annotate",
    "argument",
    "arguments",
    "constant",
    "erase_dead",
    "facts",
    "is_call",
    "module_path",
    "name_of",
    "names",
    "only_user",
    "replace",
    "set_constant",
]


class Facts(NamedTuple):
    """What an example run told about the tensor a node yields."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    contiguous: bool


def names(text: str) -> frozenset[str]:
    """``aten.`` names from a list of words."""
    return frozenset("aten." + word for word in text.split())


# Operations that only move or rename elements: values, hence quantization parameters, pass through them untouched.
MOVES: frozenset[str] = names(
    """
    view _unsafe_view reshape flatten unflatten permute transpose t squeeze unsqueeze expand slice select narrow
    chunk split split_with_sizes unbind contiguous clone alias detach index_select flip pixel_shuffle
    pixel_unshuffle channel_shuffle movedim swapaxes
    """
)


# What the lowering runs on an 8-bit tensor itself; torch interpolates uint8 and no int8.
ON_BYTES = MOVES | {"getitem", "aten.upsample_nearest2d"}


def name_of(node: fx.Node) -> str:
    """``aten.relu`` for a call of any overload of relu; the kind of node for everything else."""
    if node.op != "call_function":
        return node.op
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket)
    if target is operator.getitem:
        return "getitem"
    return getattr(target, "__name__", str(target))


def is_call(node: object, *names: str) -> bool:
    """Whether `node` calls one of the operations `names`, such as ``aten.relu``, whatever the overload."""
    return isinstance(node, fx.Node) and node.op == "call_function" and name_of(node) in names


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen call by name, defaults filled in."""
    schema = node.target._schema
    values: dict[str, Any] = {}
    for position, argument in enumerate(schema.arguments):
        if position < len(node.args):
            values[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value if argument.has_default_value() else None
    return values


def argument(node: fx.Node, name: str) -> Any:
    """One argument of an ATen call by its name in the schema."""
    return arguments(node)[name]


def set_constant(module: fx.GraphModule, before: fx.Node, value: torch.Tensor, hint: str) -> fx.Node:
    """Add a buffer named after `hint` and a ``get_attr`` node for it in front of `before`."""
    stem = "folded_" + "".join(c if c.isalnum() else "_" for c in hint)
    name, number = stem, 1
    while hasattr(module, name):
        name, number = f"{stem}_{number}", number + 1
    module.register_buffer(name, value.detach())
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    node.meta["facts"] = _facts_of(value)
    return node


def only_user(node: fx.Node) -> fx.Node | None:
    """The single node that reads `node`, or None when there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def replace(
    node: fx.Node, target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> None:
    """Turn a call into another one in place; users, name and metadata stay."""
    node.target, node.args, node.kwargs = target, tuple(args), kwargs or {}


def erase_dead(module: fx.GraphModule) -> None:
    """Remove calls nobody reads, and constants only they read."""
    for node in reversed(list(module.graph.nodes)):
        if node.users or node.op in ("placeholder", "output"):
            continue
        module.graph.erase_node(node)


def module_path(node: fx.Node) -> str:
    """Where the node came from in the user's model (``layer1.0.conv1``), or its name when that is unknown."""
    stack = node.meta.get("nn_module_stack")
    if stack:
        entry = list(stack.values())[-1]
        path = str(entry[0] if isinstance(entry, tuple) else entry)
        for prefix in ("L['self'].", "L['fn'].", "getattr(L['self'], ", "L__self___"):
            path = path.removeprefix(prefix)
        if path and path not in ("L['self']", "L['fn']"):
            return path.replace("._modules", "").replace("['", ".").replace("']", "").strip(".")
    return node.name


def facts(node: object) -> Facts | None:
    """Shape, dtype and contiguity of the tensor `node` yields; None for tuples, numbers and the unknown."""
    return node.meta.get("facts") if isinstance(node, fx.Node) else None


def _facts_of(value: object) -> Facts | None:
    if not isinstance(value, torch.Tensor):
        return None
    return Facts(tuple(int(size) for size in value.shape), value.dtype, value.is_contiguous())


class _Recorder(fx.Interpreter):
    def run_node(self, node: fx.Node) -> Any:
        value = super().run_node(node)
        node.meta["facts"] = _facts_of(value)
        return value


def annotate(module: fx.GraphModule, example: Iterable[Any]) -> None:
    """Run the graph once on flat example inputs and note the facts of every value.

    Raises whatever the graph raises on these inputs.
    """
    with torch.no_grad():
        _Recorder(module).run(*example)
