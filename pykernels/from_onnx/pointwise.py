"""ONNX's functions of single elements, comparisons, casts, softmaxes and reductions."""

from __future__ import annotations

import functools
import operator as python
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from pykernels.from_onnx import sizes
from pykernels.from_onnx.table import Refused, operator

__all__: list[str] = []

_PLAIN: dict[str, Callable[..., torch.Tensor]] = {
    "Abs": torch.abs, "Acos": torch.acos, "Acosh": torch.acosh, "Asin": torch.asin, "Asinh": torch.asinh,
    "Atan": torch.atan, "Atanh": torch.atanh, "BitwiseNot": torch.bitwise_not, "Ceil": torch.ceil, "Cos": torch.cos,
    "Cosh": torch.cosh, "Erf": torch.erf, "Exp": torch.exp, "Floor": torch.floor, "HardSwish": F.hardswish,
    "IsNaN": torch.isnan, "Log": torch.log, "Mish": F.mish, "Neg": torch.neg, "Not": torch.logical_not,
    "Reciprocal": torch.reciprocal, "Relu": torch.relu, "Round": torch.round, "Sigmoid": torch.sigmoid,
    "Sign": torch.sign, "Sin": torch.sin, "Sinh": torch.sinh, "Softplus": F.softplus, "Softsign": F.softsign,
    "Sqrt": torch.sqrt, "Tan": torch.tan, "Tanh": torch.tanh,
}  # fmt: skip
_BINARY: dict[str, Callable[..., torch.Tensor]] = {
    "Add": torch.add, "And": torch.logical_and, "BitwiseAnd": torch.bitwise_and, "BitwiseOr": torch.bitwise_or,
    "BitwiseXor": torch.bitwise_xor, "Equal": torch.eq, "Greater": torch.gt, "GreaterOrEqual": torch.ge,
    "Less": torch.lt, "LessOrEqual": torch.le, "Mul": torch.mul, "Or": torch.logical_or, "Pow": torch.pow,
    "Sub": torch.sub, "Xor": torch.logical_xor,
}  # fmt: skip


def _unary(name: str, function: Callable[..., torch.Tensor]) -> None:
    def apply(x: torch.Tensor) -> torch.Tensor:
        return function(x)

    apply.__name__ = apply.__qualname__ = name.lower()
    operator(name)(apply)


def _operands(*values: Any) -> Iterator[Any]:
    """Numbers as numbers, and so a list of one beside a tensor that has dimensions; other lists as tensors."""
    rank = max((value.dim() for value in values if isinstance(value, torch.Tensor)), default=1)
    for value in values:
        if isinstance(value, list):
            yield value[0] if len(value) == 1 and rank else sizes.tensor(value)
        else:
            yield value


def _binary(name: str, function: Callable[..., torch.Tensor]) -> None:
    def apply(a: Any, b: Any) -> torch.Tensor:
        a, b = _operands(a, b)
        if not isinstance(a, torch.Tensor):
            if name == "Mul" or name == "Add":
                return function(b, a)
            if name != "Pow":
                a = torch.scalar_tensor(a, dtype=b.dtype)
        return function(a, b)

    apply.__name__ = apply.__qualname__ = name.lower()
    operator(name, numbers=True)(apply)


for _name, _function in _PLAIN.items():
    _unary(_name, _function)
for _name, _function in _BINARY.items():
    _binary(_name, _function)


@operator("Div", numbers=True)
def divide(a: Any, b: Any) -> torch.Tensor:
    a, b = _operands(a, b)
    tensor = a if isinstance(a, torch.Tensor) else b
    if tensor.is_floating_point():
        return torch.div(a, b)
    return torch.div(a, b, rounding_mode="trunc")


@operator("Mod", numbers=True)
def modulo(a: Any, b: Any, *, fmod: int = 0) -> torch.Tensor:
    a, b = _operands(a, b)
    return torch.fmod(a, b) if fmod else torch.remainder(a, b)


@operator("Identity")
def identity(x: torch.Tensor) -> torch.Tensor:
    return x


@operator("Sum")
def total(*values: torch.Tensor) -> torch.Tensor:
    return functools.reduce(python.add, values)


@operator("Mean")
def mean_of(*values: torch.Tensor) -> torch.Tensor:
    return functools.reduce(python.add, values) / len(values)


@operator("Max")
def maximum(*values: torch.Tensor) -> torch.Tensor:
    return functools.reduce(torch.maximum, values)


@operator("Min")
def minimum(*values: torch.Tensor) -> torch.Tensor:
    return functools.reduce(torch.minimum, values)


@operator("Where", numbers=True)
def where(condition: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
    a, b = _operands(a, b)
    return torch.where(condition, a, b)


@operator("Cast")
def cast(x: torch.Tensor, *, to: torch.dtype, saturate: int = 1) -> torch.Tensor:
    return x.to(to)


@operator("CastLike")
def cast_like(x: torch.Tensor, like: torch.Tensor, *, saturate: int = 1) -> torch.Tensor:
    return x.to(like.dtype)


@operator("IsInf")
def is_infinite(x: torch.Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> torch.Tensor:
    found = torch.isposinf(x) if detect_positive else torch.zeros_like(x, dtype=torch.bool)
    return found | torch.isneginf(x) if detect_negative else found


@operator("Clip", known="low high")
def clip(x: torch.Tensor, low: Any = None, high: Any = None) -> torch.Tensor:
    """What is beyond the dtype bounds nothing."""
    low, high = (end[0] if isinstance(end, (list, tuple)) else end for end in (low, high))
    if x.is_floating_point():
        ends = torch.finfo(x.dtype)
        low, high = (
            (None if low is None or low <= ends.min else low),
            (None if high is None or high >= ends.max else high),
        )
    if low is None and high is None:
        return x
    return torch.relu(x) if low == 0 and high is None else torch.clamp(x, low, high)


@operator("Elu")
def elu(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    return F.elu(x, alpha)


@operator("Celu")
def celu(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    return F.celu(x, alpha)


@operator("Selu")
def selu(x: torch.Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Any:
    if abs(alpha - 1.6732632) > 1e-6 or abs(gamma - 1.0507010) > 1e-6:
        raise Refused("alpha and gamma of its own")
    return F.selu(x)


@operator("LeakyRelu")
def leaky_relu(x: torch.Tensor, *, alpha: float = 0.01) -> torch.Tensor:
    return F.leaky_relu(x, alpha)


@operator("ThresholdedRelu")
def thresholded_relu(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    return F.threshold(x, alpha, 0.0)


@operator("PRelu")
def prelu(x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    channels = x.dim() > 1 and tuple(slope.shape) == (x.shape[1], *[1] * (x.dim() - 2))
    if channels or slope.dim() == 0 or tuple(slope.shape) == (1,):
        return F.prelu(x, slope.reshape(-1))
    return torch.where(x > 0, x, x * slope)


@operator("Shrink")
def shrink(x: torch.Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> torch.Tensor:
    if bias == lambd:
        return F.softshrink(x, lambd)
    zero = torch.zeros_like(x)
    return torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, zero))


@operator("Swish")
def swish(x: torch.Tensor, *, alpha: float = 1.0) -> torch.Tensor:
    return F.silu(x) if alpha == 1.0 else x * torch.sigmoid(alpha * x)


@operator("HardSigmoid")
def hard_sigmoid(x: torch.Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> torch.Tensor:
    if abs(alpha - 1 / 6) < 1e-6 and beta == 0.5:
        return F.hardsigmoid(x)
    return torch.clamp(x * alpha + beta, 0, 1)


@operator("Gelu")
def gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    return F.gelu(x, approximate=approximate)


@operator("Softmax")
def softmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    return torch.softmax(x, axis)


@operator("Hardmax")
def hardmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    first = torch.argmax(x, axis, keepdim=True)
    return torch.zeros_like(x).scatter(axis, first, 1.0)


@operator("LogSoftmax")
def log_softmax(x: torch.Tensor, *, axis: int = -1) -> torch.Tensor:
    return torch.log_softmax(x, axis)


@operator("Dropout", known="ratio training")
def dropout(x: torch.Tensor, ratio: Any = None, training: Any = None, *, seed: int = 0) -> torch.Tensor:
    if training:
        raise Refused("training_mode")
    return x


@operator("CumSum", known="axis")
def cumulative_sum(x: torch.Tensor, axis: Any, *, exclusive: int = 0, reverse: int = 0) -> torch.Tensor:
    axis = axis[0] if isinstance(axis, list) else axis
    y = x.flip(axis) if reverse else x
    y = torch.cumsum(y, axis, dtype=x.dtype) - y if exclusive else torch.cumsum(y, axis, dtype=x.dtype)
    return y.flip(axis) if reverse else y


def _product(x: torch.Tensor, axes: list[int], keepdim: bool) -> torch.Tensor:
    for axis in sorted((axis % x.dim() for axis in axes), reverse=True):
        x = torch.prod(x, axis, keepdim)
    return x


_REDUCTIONS: dict[str, Callable[..., torch.Tensor]] = {
    "ReduceMean": torch.mean,
    "ReduceSum": torch.sum,
    "ReduceMax": torch.amax,
    "ReduceMin": torch.amin,
    "ReduceLogSumExp": torch.logsumexp,
    "ReduceProd": _product,
    "ReduceL1": lambda x, dims, keepdim: torch.linalg.vector_norm(x, 1, dims, keepdim),
    "ReduceL2": lambda x, dims, keepdim: torch.linalg.vector_norm(x, 2, dims, keepdim),
    "ReduceLogSum": lambda x, dims, keepdim: torch.sum(x, dims, keepdim).log(),
    "ReduceSumSquare": lambda x, dims, keepdim: torch.sum(x * x, dims, keepdim),
}


def _reduction(name: str, function: Callable[..., torch.Tensor]) -> None:
    def reduce(x: torch.Tensor, axes: Any = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> torch.Tensor:
        if not axes:
            if noop_with_empty_axes:
                return x
            axes = list(range(x.dim()))
        y = function(x, axes, bool(keepdims))
        return y if y.dtype == x.dtype else y.to(x.dtype)  # torch sums int32 in int64

    reduce.__name__ = reduce.__qualname__ = name.lower()
    operator(name, known="axes")(reduce)


for _name, _function in _REDUCTIONS.items():
    _reduction(_name, _function)


def _place(name: str, function: Callable[..., torch.Tensor]) -> None:
    def place(x: torch.Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> torch.Tensor:
        if select_last_index:
            return x.shape[axis] - 1 - function(x.flip(axis), axis, bool(keepdims))
        return function(x, axis, bool(keepdims))

    place.__name__ = place.__qualname__ = name.lower()
    operator(name)(place)


_place("ArgMax", torch.argmax)
_place("ArgMin", torch.argmin)


@operator("TopK", known="k", several=True)
def top_k(
    x: torch.Tensor, k: Any, *, axis: int = -1, largest: int = 1, sorted: int = 1, outputs: int
) -> tuple[torch.Tensor, ...]:
    values, indices = torch.topk(x, k[0] if isinstance(k, list) else k, axis, bool(largest), bool(sorted))
    return values, indices
