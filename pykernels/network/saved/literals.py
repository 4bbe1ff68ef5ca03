"""Values of Python as JSON and back: what the calls of a graph, and the types of its inputs, are written down with.

Numbers, booleans, strings, None and lists are what they are in JSON. Everything else is an object with one entry::

    {"float": "nan"}   {"complex": [1.0, 0.0]}   {"tuple": [...]}   {"dict": [[key, value], ...]}   {"slice": [0, 9, 2]}
    {"dtype": "float32"}   {"device": "cpu"}   {"layout": "strided"}   {"memory_format": "channels_last"}

Names are looked up in the tables below, and nowhere else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["DTYPES", "decode", "encode", "expect"]

_NAMES = "bool uint8 int8 uint16 int16 uint32 int32 uint64 int64 float8_e4m3fn float8_e5m2 bfloat16 float16 float32"
DTYPES = {name: getattr(torch, name) for name in f"{_NAMES} float64 complex64 complex128".split()}
_FORMATS = {name: getattr(torch, name) for name in ("contiguous_format", "preserve_format", "channels_last")}
_FORMATS["channels_last_3d"] = torch.channels_last_3d
_TABLES: dict[str, dict[str, Any]] = {
    "dtype": DTYPES,
    "device": {"cpu": torch.device("cpu")},  # a file is the CPU's; who loads it moves it
    "layout": {"strided": torch.strided},
    "memory_format": _FORMATS,
    "float": {"nan": math.nan, "inf": math.inf, "-inf": -math.inf},
}
_DEPTH = 32


def expect(value: Any, kind: type, what: str) -> Any:
    """`value`, which must be exactly of type `kind`: in JSON True is no number.

    Raises:
        ValueError: it is not.
    """
    if type(value) is not kind:
        raise ValueError(f"{what}: {kind.__name__} is needed, not {type(value).__name__}")
    return value


def encode(value: Any, other: Callable[[Any], Any] | None = None, depth: int = 0) -> Any:
    """`value` as JSON; `other` writes down what this module does not know.

    Raises:
        ValueError: a value cannot be written down, or is nested too deeply.
    """
    if depth > _DEPTH:
        raise ValueError(f"a value is nested more than {_DEPTH} deep")

    def all_of(values: Any) -> list[Any]:
        return [encode(each, other, depth + 1) for each in values]

    if value is None or type(value) in (bool, str):
        return value
    if type(value) is int:
        if not -(2**63) <= value < 2**63:
            raise ValueError(f"the number {value} has more than 64 bits")
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) is complex:
        return {"complex": all_of((value.real, value.imag))}
    if type(value) is slice:
        return {"slice": all_of((value.start, value.stop, value.step))}
    if isinstance(value, torch.device) and value.type == "cpu":
        return {"device": "cpu"}
    for kind, type_ in (("dtype", torch.dtype), ("layout", torch.layout), ("memory_format", torch.memory_format)):
        if isinstance(value, type_):
            name = str(value).removeprefix("torch.")
            if name in _TABLES[kind]:
                return {kind: name}
    if isinstance(value, list):
        return all_of(value)
    if isinstance(value, tuple):
        return {"tuple": all_of(value)}
    if isinstance(value, dict):
        return {"dict": [all_of(pair) for pair in value.items()]}
    if other is not None:
        return other(value)
    raise ValueError(f"{value!r} cannot be written down")


def decode(value: Any, other: Callable[[str, Any], Any] | None = None, depth: int = 0) -> Any:
    """What `encode` wrote; ``other(kind, content)`` reads what its `other` wrote as ``{kind: content}``.

    Raises:
        ValueError: it is nothing that `encode` writes.
    """
    if depth > _DEPTH:
        raise ValueError(f"a value is nested more than {_DEPTH} deep")

    def all_of(values: Any, count: int | None = None) -> list[Any]:
        if count is not None and len(expect(values, list, "a value")) != count:
            raise ValueError(f"a value of {count} parts has {len(values)}")
        return [decode(each, other, depth + 1) for each in expect(values, list, "a value")]

    if value is None or type(value) in (bool, str, float):
        return value
    if type(value) is int:
        if not -(2**63) <= value < 2**63:
            raise ValueError("a number has more than 64 bits")
        return value
    if type(value) is list:
        return all_of(value)
    if type(value) is not dict or len(value) != 1:
        raise ValueError("a value is an object of one entry")
    ((kind, content),) = value.items()
    if kind in _TABLES:
        if type(content) is not str or content not in _TABLES[kind]:
            raise ValueError(f"a {kind} is {content!r}, which is none of {', '.join(_TABLES[kind])}")
        return _TABLES[kind][content]
    if kind == "complex":
        parts = all_of(content, 2)
        return complex(*(expect(part, float, "a part of a complex number") for part in parts))
    if kind == "slice":
        return slice(*all_of(content, 3))
    if kind == "tuple":
        return tuple(all_of(content))
    if kind == "dict":
        pairs = [all_of(pair, 2) for pair in expect(content, list, "a dict")]
        try:
            return dict(pairs)
        except TypeError as error:
            raise ValueError(f"a key of a dict: {error}") from error
    if other is None:
        raise ValueError(f"a value is a {kind!r}")
    return other(kind, content)
