"""How inputs and outputs are nested (a pytree's ``TreeSpec``) as JSON and back.

A leaf is None, everything else ``[type, context, children]``. A type is the name that it was registered under with
torch's pytrees; who loads has registered it. torch's own reader of such specs imports modules that the text names, so
it is not used.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torch.utils import _pytree as pytree

from pykernels.network.saved.literals import decode, encode, expect

__all__ = ["dump", "parse"]

_DEPTH = 32
_NAMED_TUPLE = "collections.namedtuple"
# What a defaultdict of a model's outputs may be made with.
_FACTORIES = {"None": None, **{kind.__name__: kind for kind in (list, tuple, dict, set, int, float, bool, str)}}
_LEAF = pytree.tree_structure(0)


def dump(spec: pytree.TreeSpec, depth: int = 0) -> Any:
    """`spec` as JSON.

    Raises:
        ValueError: a type in it has no name, its context is more than data, or it is nested too deeply.
    """
    if spec.is_leaf():
        return None
    if depth > _DEPTH:
        raise ValueError(f"inputs or outputs are nested more than {_DEPTH} deep")
    context: Any = spec.context
    if spec.type is pytree.namedtuple:
        name, context = _NAMED_TUPLE, _name(context)
    elif spec.type is defaultdict:
        name, (factory, keys) = _name(spec.type), context
        names = [name for name, known in _FACTORIES.items() if known is factory]
        if not names:
            raise ValueError(
                f"a defaultdict of {factory!r} is an input or output; {', '.join(_FACTORIES)} can be saved"
            )
        context = [names[0], list(keys)]
    else:
        name, writer = _name(spec.type), pytree.SUPPORTED_SERIALIZED_TYPES[spec.type].to_dumpable_context
        context = context if writer is None else writer(context)
    try:
        context = encode(context)
    except ValueError as error:
        raise ValueError(f"the type {name} is an input or output: {error}") from error
    return [name, context, [dump(spec.child(i), depth + 1) for i in range(spec.num_children)]]


def _name(kind: Any) -> str:
    known = pytree.SUPPORTED_SERIALIZED_TYPES.get(kind)
    name = None if known is None else known.serialized_type_name
    if name is None or name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND:
        raise ValueError(
            f"{kind} is the type of an input or output and has no serialized_type_name: register it with one"
        )
    return str(name)


def parse(content: Any) -> pytree.TreeSpec:
    """The ``TreeSpec`` that `dump` wrote, tried on leaves that are numbers.

    Raises:
        ValueError: it is none, it has a type that is not registered here, or a type does not take what it is given.
    """
    spec = _parse(content, 0)
    try:
        pytree.tree_unflatten(range(spec.num_leaves), spec)
    except Exception as error:  # whatever a registered type raises when it is made of what it does not expect
        raise ValueError(f"inputs or outputs cannot be nested so: {type(error).__name__}: {error}") from error
    return spec


def _parse(content: Any, depth: int) -> pytree.TreeSpec:
    if content is None:
        return _LEAF
    if depth > _DEPTH:
        raise ValueError(f"inputs or outputs are nested more than {_DEPTH} deep")
    if len(expect(content, list, "a type of inputs or outputs")) != 3:
        raise ValueError("a type of inputs or outputs has a name, a context and children")
    name, context, children = content
    kind, context = _type(name), decode(context)
    if kind is pytree.namedtuple:
        context = _type(context)
        if not hasattr(context, "_fields"):
            raise ValueError(f"the type {context} is no named tuple")
    elif kind is defaultdict:
        if (
            type(context) is not list
            or len(context) != 2
            or type(context[0]) is not str
            or context[0] not in _FACTORIES
        ):
            raise ValueError(f"a defaultdict is one of {', '.join(_FACTORIES)}, with keys")
        context = [_FACTORIES[context[0]], context[1]]
    else:
        reader = pytree.SUPPORTED_SERIALIZED_TYPES[kind].from_dumpable_context
        if reader is not None:
            try:
                context = reader(context)
            except Exception as error:  # whatever the registered reader raises
                raise ValueError(f"the type {name}: {type(error).__name__}: {error}") from error
    return pytree.TreeSpec(kind, context, [_parse(child, depth + 1) for child in expect(children, list, "children")])


def _type(name: Any) -> Any:
    known = pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE
    if type(name) is not str or name == pytree.NO_SERIALIZED_TYPE_NAME_FOUND or name not in known:
        raise ValueError(f"{name!r} is the type of an input or output and is not registered with torch's pytrees here")
    return known[name]
