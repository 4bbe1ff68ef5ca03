"""ONNX's arithmetic of shapes on Python's numbers and lists, which may hold symbols of torch.export.

Exporters write ``x.view(x.size(0), -1)`` as Shape, Gather, Unsqueeze, Concat, Reshape: four nodes that see no data.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch

from pykernels.from_onnx.table import Refused, on_sizes

__all__ = ["SMALL", "shape", "size", "tensor"]

SMALL = 64
"""Elements of a constant that sizes may be computed with."""


def shape(x: Any, *, start: int = 0, end: int | None = None) -> list[Any]:
    """Shape: the sizes of a tensor, or of sizes."""
    found = list(x.shape) if isinstance(x, torch.Tensor) else [len(x)] if isinstance(x, list) else []
    return found[start:end]


def size(x: Any) -> Any:
    """Size: the number of elements of a tensor, or of sizes."""
    return math.prod(shape(x))


def tensor(value: Any) -> torch.Tensor:
    """Sizes as a tensor: int64, float32 or bool."""
    if isinstance(value, list):
        return torch.stack([tensor(item) for item in value]) if value else torch.empty(0, dtype=torch.int64)
    kinds = {bool: torch.bool, torch.SymBool: torch.bool, float: torch.float32, torch.SymFloat: torch.float32}
    return torch.scalar_tensor(value, dtype=kinds.get(type(value), torch.int64))


def _each(function: Callable[..., Any], *values: Any) -> Any:
    """`function` of numbers, or of lists element by element; a number or a list of one goes with every element."""
    lists = [value for value in values if isinstance(value, list)]
    if not lists:
        return function(*values)
    count = next((len(value) for value in lists if len(value) != 1), 1)
    if any(len(value) not in (1, count) for value in lists):
        raise Refused("sizes of different numbers meet")
    spread = [value * count if isinstance(value, list) and len(value) == 1 else value for value in values]
    columns = [value if isinstance(value, list) else [value] * count for value in spread]
    return [function(*items) for items in zip(*columns, strict=True)]


def _divide(a: Any, b: Any) -> Any:
    real = any(isinstance(value, (float, torch.SymFloat)) for value in (a, b))
    return a / b if real else a // b


def _root(a: Any) -> Any:
    return torch.sym_sqrt(a) if isinstance(a, torch.SymFloat) else math.sqrt(a)


def _pointwise(name: str, function: Callable[..., Any]) -> None:
    def on_each(*values: Any, **attributes: Any) -> Any:
        if any(attributes.values()):  # the old exporter writes fmod=0
            raise Refused(f"attributes {', '.join(attributes)} of sizes")
        return _each(function, *values)

    on_each.__name__ = on_each.__qualname__ = f"{name.lower()}_sizes"
    on_sizes(name)(on_each)


_POINTWISE: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "Div": _divide,
    "Mod": operator.mod,
    "Neg": operator.neg,
    "Sqrt": _root,
    "Floor": lambda a: torch.sym_float(math.floor(a)),
    "Ceil": lambda a: torch.sym_float(math.ceil(a)),
    "Max": torch.sym_max,
    "Min": torch.sym_min,
    "Equal": operator.eq,
    "Less": operator.lt,
    "LessOrEqual": operator.le,
    "Greater": operator.gt,
    "GreaterOrEqual": operator.ge,
    "Not": operator.not_,
    "And": lambda a, b: a and b,
    "Or": lambda a, b: a or b,
    "Where": lambda condition, a, b: a if condition else b,
    "Identity": lambda a: a,
}
for _name, _function in _POINTWISE.items():
    _pointwise(_name, _function)


@on_sizes("Cast")
def cast_sizes(x: Any, *, to: torch.dtype, saturate: int = 1) -> Any:
    if to.is_floating_point:
        return _each(torch.sym_float, x)
    return _each(bool if to is torch.bool else torch.sym_int, x)


@on_sizes("Gather")
def gather_sizes(x: list[Any], indices: Any, *, axis: int = 0) -> Any:
    return _each(lambda index: x[index], indices)


@on_sizes("Concat")
def concat_sizes(*values: Any, axis: int) -> list[Any]:
    return [item for value in values for item in value]


@on_sizes("Unsqueeze")
def unsqueeze_sizes(x: Any, axes: Any) -> list[Any]:
    if isinstance(x, list):
        raise Refused("sizes of two dimensions")
    return [x]


@on_sizes("Squeeze")
def squeeze_sizes(x: Any, axes: Any = None) -> Any:
    if isinstance(x, list) and len(x) != 1:
        if axes is None:
            return x
        raise Refused("several sizes are squeezed")
    return x[0] if isinstance(x, list) else x


@on_sizes("Slice")
def slice_sizes(x: list[Any], starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> list[Any]:
    if axes is not None and (axes[0] if isinstance(axes, list) else axes) != 0:
        raise Refused("a part of each row of sizes")
    first, last = (value[0] if isinstance(value, list) else value for value in (starts, ends))
    step = 1 if steps is None else steps[0]
    return x[first : None if step < 0 and last < -len(x) else last : step]


@on_sizes("Reshape")
def reshape_sizes(x: Any, shape: list[int], *, allowzero: int = 0) -> Any:
    """Rows of sizes are lists of lists: so exporters turn around the widths of a padding."""
    items = x if isinstance(x, list) else [x]
    flat = [item for row in items for item in row] if items and isinstance(items[0], list) else items
    if len(shape) < 2:
        return flat if shape else flat[0]
    if len(shape) > 2 or shape[1] < 1:
        raise Refused("sizes of several dimensions")
    return [flat[start : start + shape[1]] for start in range(0, len(flat), shape[1])]


@on_sizes("Transpose")
def transpose_sizes(x: Any, *, perm: list[int] | None = None) -> Any:
    if not isinstance(x, list) or not isinstance(x[0], list) or perm not in (None, [1, 0]):
        return x
    return [list(column) for column in zip(*x, strict=True)]


@on_sizes("ReduceProd")
def product_of_sizes(x: list[Any], axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    return [math.prod(x)] if keepdims else math.prod(x)


@on_sizes("ReduceSum")
def sum_of_sizes(x: list[Any], axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Any:
    return [sum(x)] if keepdims else sum(x)


@on_sizes("ConstantOfShape")
def constant_sizes(shape: Any, *, value: Any, dtype: torch.dtype) -> list[Any]:
    """As many sizes as a number of others says, which is known."""
    count = shape[0] if isinstance(shape, list) else shape
    if count > SMALL:
        raise Refused(f"{count} sizes")
    return [value] * count
