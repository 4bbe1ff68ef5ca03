"""Small helpers over torch.fx graphs that every pass shares.

A *plain* graph module, the form all passes work on, has one placeholder for each flat input, one ``get_attr`` node for
each parameter, buffer or constant, ``call_function`` nodes with ATen (or ``quantized_decomposed``) overloads, and one
``output``. ``meta["val"]`` of a node is the fake tensor (or the tuple of them) that it yields; `infer` gives one to the
nodes that a pass has made.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from pykernels.graph.alias import is_view, writes

aten = torch.ops.aten

__all__ = [
    "Facts",
    "aliases_layout",
    "argument",
    "arguments",
    "aten",
    "attribute",
    "constant",
    "erase_dead",
    "facts",
    "in_memory_order",
    "infer",
    "is_call",
    "is_copy_of_values",
    "is_move",
    "module_path",
    "name_of",
    "names",
    "only_user",
    "replace",
    "set_constant",
]


class Facts(NamedTuple):
    """What is known of the tensor a node yields. Sizes that may vary are symbolic expressions (sympy's)."""

    shape: tuple[Any, ...]
    dtype: torch.dtype


def names(text: str) -> frozenset[str]:
    """``aten.`` names from a list of words."""
    return frozenset("aten." + word for word in text.split())


# Calls that copy, reorder or repeat elements into memory of their own; those that do so without a copy are views.
_COPIES = names("clone contiguous flip roll repeat index_select pixel_shuffle pixel_unshuffle channel_shuffle")


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


def is_move(node: object) -> bool:
    """Whether `node` only moves or renames the elements of its first argument: a view, or a copy in another order.

    Values, hence quantization parameters, pass through it untouched. A piece of a tuple of moved values is moved too.
    """
    if not isinstance(node, fx.Node) or node.op != "call_function" or not node.args:
        return False
    source = node.args[0]
    if node.target is operator.getitem:
        return is_move(source)
    if name_of(node) in _COPIES:
        return True
    if not is_view(node.target) or aliases_layout(node) or not isinstance(source, fx.Node):
        return False
    before, after = _dtypes(source), _dtypes(node)
    return not before or not after or before == after  # `to` may be a view, and changes values


def is_copy_of_values(node: object) -> bool:
    """Whether every element of the result is one of the first argument's: a move, a maximum, nearest upsampling, or
    the interleaving of a transposed convolution's phases.

    Rounding before it is rounding after it, to the bit.
    """
    return is_move(node) or is_call(node, "aten.max_pool2d", "aten.upsample_nearest2d", "pykernels.interleave")


def _dtypes(node: fx.Node) -> set[torch.dtype]:
    return {leaf.dtype for leaf in pytree.tree_leaves(node.meta.get("val")) if isinstance(leaf, torch.Tensor)}


def aliases_layout(node: fx.Node) -> bool:
    """Whether the meaning of a call depends on how its argument lies in memory, as that of ``as_strided`` does."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    given = {argument.name for argument in node.target._schema.arguments}
    strided = {"self", "size", "stride"} <= given and not name_of(node).startswith("aten.new_")
    return strided or node.target is aten.view.dtype or name_of(node) in names("sym_stride sym_storage_offset stride")


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of an ATen call by name, defaults filled in."""
    values: dict[str, Any] = {}
    for position, argument in enumerate(node.target._schema.arguments):
        if position < len(node.args):
            values[argument.name] = node.args[position]
        elif argument.name in node.kwargs:
            values[argument.name] = node.kwargs[argument.name]
        else:
            values[argument.name] = argument.default_value if argument.has_default_value() else None
    return values


def argument(node: fx.Node, name: str) -> Any:
    """One argument of an ATen call by its name in the schema; None where the overload has none of that name."""
    return arguments(node).get(name)


def constant(module: fx.GraphModule, node: object) -> torch.Tensor | None:
    """The tensor behind a ``get_attr`` node that no call writes, or None when `node` is anything else."""
    if not isinstance(node, fx.Node) or node.op != "get_attr" or any(node in writes(user) for user in node.users):
        return None
    return attribute(module, node)


def attribute(module: fx.GraphModule, node: fx.Node) -> torch.Tensor | None:
    """The tensor that a ``get_attr`` node names, or None where it names something else."""
    value = operator.attrgetter(str(node.target))(module)
    return value.detach() if isinstance(value, torch.Tensor) else None


def set_constant(module: fx.GraphModule, before: fx.Node, value: torch.Tensor, hint: str) -> fx.Node:
    """Add a buffer named after `hint` and a ``get_attr`` node for it in front of `before`."""
    stem = "folded_" + "".join(c if c.isalnum() else "_" for c in hint)
    name, number = stem, 1
    while hasattr(module, name):
        name, number = f"{stem}_{number}", number + 1
    module.register_buffer(name, value.detach())
    with module.graph.inserting_before(before):
        node = module.graph.get_attr(name)
    mode = _fake_mode(module)
    if mode is not None:
        node.meta["val"] = mode.from_tensor(value.detach(), static_shapes=True)
    return node


def only_user(node: fx.Node) -> fx.Node | None:
    """The single node that reads `node`, or None when there are more or none."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def replace(
    node: fx.Node, target: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any] | None = None
) -> None:
    """Turn a call into another one of the same value in place; users, name and metadata stay."""
    node.target, node.args, node.kwargs = target, tuple(args), kwargs or {}


def erase_dead(module: fx.GraphModule) -> None:
    """Remove calls that nobody reads and that write nothing, and constants only they read."""
    for node in reversed(list(module.graph.nodes)):
        if node.users or node.op in ("placeholder", "output") or writes(node):
            continue
        if isinstance(node.target, torch._ops.OpOverload) and "_assert" in str(node.target):
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
    """Shape and dtype of the tensor `node` yields; None for tuples, numbers and the unknown."""
    value = node.meta.get("val") if isinstance(node, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return None
    return Facts(tuple(_size(size) for size in value.shape), value.dtype)


def _size(size: Any) -> Any:
    """A number, or the expression of a symbolic size: to compare that adds no guard."""
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression) if expression.is_number else expression


def in_memory_order(node: fx.Node) -> torch.memory_format | None:
    """How the tensor of `node` lies in memory in the model: contiguous, channels_last, or None for another order."""
    value = node.meta["val"]
    if value.is_contiguous():
        return torch.contiguous_format
    if value.dim() == 4 and value.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return None


def _fake_mode(module: fx.GraphModule) -> FakeTensorMode | None:
    for node in module.graph.nodes:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(leaf, FakeTensor):
                return leaf.fake_mode
    return None


def infer(module: fx.GraphModule, example: Sequence[Any] = ()) -> None:
    """Give every node that has none its fake value; `example` stands for inputs that have none."""
    mode = _fake_mode(module) or FakeTensorMode(allow_non_fake_inputs=True)
    given: Iterator[Any] = iter(example)
    with mode, torch.no_grad():
        for node in module.graph.nodes:
            if node.op == "placeholder":
                value = next(given, None)
                if "val" not in node.meta:
                    node.meta["val"] = mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
            elif node.op == "get_attr" and "val" not in node.meta:
                tensor = attribute(module, node)
                if tensor is not None:
                    node.meta["val"] = mode.from_tensor(tensor, static_shapes=True)
            elif node.op == "call_function" and "val" not in node.meta:
                _infer_call(node)


def _infer_call(node: fx.Node) -> None:
    if any("val" not in source.meta for source in node.all_input_nodes):
        return
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
    try:
        node.meta["val"] = node.target(*args, **kwargs)
    except Exception:  # a fake may refuse anything; what is unknown is left to torch
        return
