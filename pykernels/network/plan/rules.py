"""How steps of a network become steps of a plan, by their kinds.

A rule adds records to the plan in hand, or raises `Unplanned` and leaves the step to torch. What the numbers of a
record mean stands in csrc/cpu/plan, before the function of its kind.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from pykernels.graph.alias import is_view
from pykernels.network.plan.format import DTYPES, UNTUNED
from pykernels.network.step import Attention, Call, Concatenation, Layer, Lookup, Pool, QParams, Step, Value
from pykernels.ops import names
from pykernels.ops.dtypes import REALS

if TYPE_CHECKING:
    from pykernels.network.plan.emit import Planner

aten = torch.ops.aten

__all__ = ["RULES", "Unplanned"]

_ACTIVATIONS = {name: number for number, name in enumerate(names.ACTIVATIONS)}
_NONE = QParams(1.0, 0, 0, 0, torch.uint8)  # of what is not quantized


class Unplanned(Exception):
    """A step that no plan can take."""


def layer(planner: Planner, step: Step) -> None:
    """Convolutions and linear layers."""
    layer, (x, *residual), (result,) = step.details, step.inputs, step.outputs
    assert isinstance(layer, Layer)
    linear, line = step.kind == "linear", step.kind == "conv2d" and len(x.shape) == 3
    operands = [planner.read(value) for value in (x, *residual)]
    if line:
        operands = [planner.add("reshape", [operand], [-2, -3, 1, -4]) for operand in operands]
    numbers = [*planner.in_weights(layer.key), layer.weight.shape[0]]
    if not linear:
        kernel = (1, layer.weight.shape[2]) if line else layer.weight.shape[2:]
        numbers += [*kernel, *layer.stride, *layer.padding, *layer.dilation, layer.groups]
    given, made = _quantization(x), _quantization(result)
    added = _quantization(residual[0]) if residual else _NONE
    numbers += [_ACTIVATIONS[step.activation], int(step.residual_order == "after"), DTYPES[result.dtype]]
    numbers += [given.zero_point, made.zero_point, added.zero_point, *UNTUNED]
    number = planner.add(step.kind, operands, numbers, [given.scale, made.scale, added.scale])
    if line:
        number = planner.add("reshape", [number], [-2, -3, -5])
    planner.result(step, number, not linear)


def pool(planner: Planner, step: Step) -> None:
    """Average and max pools."""
    (x,), (result,) = step.inputs, step.outputs
    assert isinstance(step.details, Pool)
    geometry, numbers = step.details.geometry, []
    source = planner.read(x)
    if step.kind == "max_pool2d":
        kernel, stride, padding, dilation, ceil_mode = geometry
        numbers = [*kernel, *stride, *padding, *dilation, int(ceil_mode)]
    else:
        if step.kind == "avg_pool2d":
            kernel, stride, padding, ceil_mode, include, divisor = geometry
            numbers = [*kernel, *stride, *padding, 1, 1, int(ceil_mode), int(include), divisor or 0]
        else:
            numbers = list(geometry[0])
        given, made = _quantization(x), _quantization(result)
        numbers += [DTYPES[result.dtype], given.zero_point, made.zero_point]
    reals = [] if step.kind == "max_pool2d" else [given.scale, made.scale]
    planner.result(step, planner.add(step.kind, [source], numbers, reals), planner.last(x))


def resized(planner: Planner, step: Step) -> None:
    """Upsampling, and the phases of a transposed convolution."""
    (x,) = step.inputs
    assert isinstance(step.details, Pool)
    reals: list[float] = []
    operands = [planner.read(x)]
    if step.kind == "interleave":
        stride, crop, groups = step.details.geometry
        numbers = [*stride, *crop, groups]
    else:
        size, *align, reals = step.details.geometry
        if any(isinstance(number, Value) for number in size):  # that of another image, most often of the one it joins
            operands.append(planner.sized(step.outputs[0].shape[2:]))
            size = []
        numbers = [int(any(align)), *size]
    planner.result(step, planner.add(step.kind, operands, numbers, reals), planner.last(x))


def unary(planner: Planner, step: Step) -> None:
    """Activations and normalizations of floats."""
    (x,) = step.inputs
    assert isinstance(step.details, Pool)
    operands, last, reals = [planner.read(x)], planner.last(x), []
    if step.kind == "activation":
        numbers = [_ACTIVATIONS[step.activation]]
    elif step.kind == "leaky_relu":
        numbers, reals = [], [*step.details.geometry]
    elif step.kind == "softmax":
        numbers, last = [step.details.geometry[0] % len(x.shape)], False
    else:
        *parameters, eps = step.details.geometry
        numbers, reals, last = [int(value is not None) for value in parameters], [eps], False
        operands += [planner.read(value) for value in parameters if value is not None]
        if step.out is not None:
            numbers += [DTYPES[step.outputs[0].dtype], step.out.zero_point]
            reals.append(step.out.scale)
    planner.result(step, planner.add(step.kind, operands, numbers, reals), last)


def attention(planner: Planner, step: Step) -> None:
    """Scaled dot product attention."""
    assert isinstance(step.details, Attention)
    operands = [planner.read(value) for value in step.inputs]
    numbers = [int(step.details.causal), int(len(operands) > 3)]
    planner.result(step, planner.add("attention", operands, numbers, [step.details.scale]))


def conversion(planner: Planner, step: Step) -> None:
    """To 8 bits and back."""
    (x,), (result,) = step.inputs, step.outputs
    params = result.quantization or x.quantization
    number = planner.add(step.kind, [planner.read(x)], [DTYPES[result.dtype], params.zero_point], [params.scale])
    planner.result(step, number, planner.last(x))


def binary(planner: Planner, step: Step) -> None:
    """Sums and products of two 8-bit tensors, and sums of floats that an activation follows."""
    (a, b), out = step.inputs, step.out
    _check_pair(a, b)
    if not step.quantized:
        number = planner.add(step.kind, [planner.read(a), planner.read(b)], [_ACTIVATIONS[step.activation]])
        planner.result(step, number, planner.last(a))
        return
    numbers = [a.quantization.zero_point, b.quantization.zero_point, DTYPES[out.dtype], out.zero_point]
    if step.kind == "add":
        numbers.append(_ACTIVATIONS[step.activation])
    reals = [a.quantization.scale, b.quantization.scale, out.scale]
    planner.result(
        step, planner.add("q" + step.kind, [planner.read(a), planner.read(b)], numbers, reals), planner.last(a)
    )


def concatenation(planner: Planner, step: Step) -> None:
    """Concatenations of 8-bit tensors."""
    assert isinstance(step.details, Concatenation)
    out, params = step.out, [x.quantization for x in step.inputs]
    numbers = [step.details.dim % len(step.inputs[0].shape), DTYPES[out.dtype], out.zero_point]
    numbers += [p.zero_point for p in params]
    reals = [out.scale, *(p.scale for p in params)]
    operands = [planner.read(x) for x in step.inputs]
    planner.result(step, planner.add("qcat", operands, numbers, reals), planner.last(step.inputs[0]))


def table(planner: Planner, step: Step) -> None:
    """Pointwise functions of 8-bit tensors."""
    assert isinstance(step.details, Lookup)
    table = step.details.table
    key = ("table", bytes(table.view(torch.uint8).tolist()), table.dtype)
    numbers = [planner.in_weights(key)[0], DTYPES[table.dtype]]
    planner.result(step, planner.add("qlookup", [planner.read(step.inputs[0])], numbers), planner.last(step.inputs[0]))


def call_of_torch(planner: Planner, step: Step) -> None:
    """Calls of torch's that a plan knows."""
    assert isinstance(step.details, Call)
    rule = CALLS.get(step.details.target)
    if rule is None:
        raise Unplanned
    rule(planner, step, *_positional(step.details))
    target = step.details.target
    if step.kind == "move" and (target is operator.getitem or is_view(target)):
        planner.views[step.outputs[0]] = step


# --- calls of torch's ---


def arithmetic(planner: Planner, step: Step, a: Any, b: Any, alpha: Any = 1) -> None:
    """Sums and products of two floats."""
    kind = "mul" if step.details.target is aten.mul.Tensor else "add"
    less = step.details.target is aten.sub.Tensor
    if not isinstance(a, Value) or alpha != 1 or a.dtype not in REALS or step.outputs[0].dtype != a.dtype:
        raise Unplanned
    if type(b) in (int, float) and a.dtype is torch.float32:
        planner.result(
            step, planner.add(kind, [planner.read(a)], reals=[-float(b) if less else float(b)]), planner.last(a)
        )
        return
    if less or not isinstance(b, Value) or a.dtype != b.dtype:
        raise Unplanned
    if step.outputs[0].shape != a.shape:
        a, b = b, a
    _check_pair(a, b, repeated=True)
    planner.result(step, planner.add(kind, [planner.read(a), planner.read(b)]), planner.last(a))


def cat(planner: Planner, step: Step, values: Any, dim: int = 0) -> None:
    """A concatenation of what has one dtype."""
    if len({value.dtype for value in values}) != 1 or any(value.shape == (0,) for value in values):
        raise Unplanned
    operands = [planner.read(value) for value in values]
    number = planner.add("cat", operands, [dim % len(values[0].shape)])
    planner.result(step, number, all(planner.last(value) for value in values))


def reshape(planner: Planner, step: Step, x: Any, *_: Any) -> None:
    """Other sizes for the same elements."""
    source, before, after = planner.read(x), x.shape, step.outputs[0].shape
    sizes: list[int] = []
    for size in after or ():
        if isinstance(size, int):
            sizes.append(size)
        elif size in before:
            sizes.append(-2 - before.index(size))
        elif -1 not in sizes:
            sizes.append(-1)
        else:
            raise Unplanned
    planner.result(step, planner.add("reshape", [source], sizes))


def permute(planner: Planner, step: Step, x: Any, dims: Sequence[int]) -> None:
    """Dimensions in another order."""
    source = planner.read(x)
    order = [d % len(x.shape) for d in dims]
    # From NHWC as contiguous memory to an image, and from one to NHWC; anything else is contiguous behind the plan.
    planner.result(step, planner.add("permute", [source], order), order == [0, 3, 1, 2] and not planner.last(x))


def transpose(planner: Planner, step: Step, x: Any, first: int = 0, second: int = 1) -> None:
    """Two dimensions exchanged."""
    if not isinstance(x, Value) or x.shape is None or len(x.shape) < 2:
        raise Unplanned
    order = list(range(len(x.shape)))
    order[first], order[second] = order[second], order[first]
    permute(planner, step, x, order)


def slice_(
    planner: Planner, step: Step, x: Any, dim: int = 0, start: Any = None, end: Any = None, stride: int = 1
) -> None:
    """Every `stride`-th element from `start` to `end`."""
    source = planner.read(x)
    last = torch.iinfo(torch.int64).max
    numbers = [dim % len(x.shape), 0 if start is None else start, last if end is None else end, stride]
    planner.result(step, planner.add("slice", [source], numbers), planner.last(x))


def select(planner: Planner, step: Step, x: Any, dim: int, index: Any) -> None:
    """One element along a dimension, which vanishes."""
    source, rank = planner.read(x), len(x.shape)
    if not isinstance(index, int):
        raise Unplanned
    dim %= rank
    end = torch.iinfo(torch.int64).max if index == -1 else index + 1
    piece = planner.add("slice", [source], [dim, index, end, 1])
    planner.result(step, planner.add("reshape", [piece], _without(rank, dim)))


def pieces(planner: Planner, step: Step, x: Any, _: Any, dim: int = 0) -> None:
    """What `split` and `chunk` yield: each piece is planned where it is read."""
    planner.read(x)
    shapes = [leaf.shape for leaf in step.output.meta["val"]]
    rank, start, pieces = len(x.shape), 0, []
    for shape in shapes:
        if not isinstance(shape[dim], int):
            raise Unplanned
        pieces.append((x, [dim % rank, start, start + shape[dim], 1], False))
        start += shape[dim]
    planner.pieces[step.outputs[0]] = pieces


def unbound(planner: Planner, step: Step, x: Any, dim: int = 0) -> None:
    """What `unbind` yields: as above, without the dimension."""
    planner.read(x)
    dim %= len(x.shape)
    count = len(step.output.meta["val"])
    planner.pieces[step.outputs[0]] = [(x, [dim, place, place + 1, 1], True) for place in range(count)]


def piece(planner: Planner, step: Step, pieces: Any, place: int) -> None:
    """One of them."""
    if pieces not in planner.pieces:
        raise Unplanned
    x, numbers, vanishes = planner.pieces[pieces][place]
    number = planner.add("slice", [planner.read(x)], numbers)
    if vanishes:
        number = planner.add("reshape", [number], _without(len(x.shape), numbers[0]))
    planner.result(step, number, planner.last(x) and not vanishes)


def expand(planner: Planner, step: Step, x: Any, *_: Any) -> None:
    """Dimensions of size 1 repeated."""
    source, before, after = planner.read(x), x.shape, step.outputs[0].shape
    new = len(after) - len(before)
    sizes = [-1 if d >= new and size == before[d - new] else size for d, size in enumerate(after)]
    planner.result(step, planner.add("expand", [source], sizes), planner.last(x))


def pad(planner: Planner, step: Step, x: Any, pads: Sequence[Any], value: Any = 0) -> None:
    """Constants around a tensor."""
    if any(not isinstance(size, int) or size < 0 for size in pads) or not isinstance(value, (int, float)):
        raise Unplanned
    planner.result(step, planner.add("pad", [planner.read(x)], pads, [float(value or 0)]), planner.last(x))


def same(planner: Planner, step: Step, x: Any, memory_format: Any = None) -> None:
    """A copy that nobody tells from the original, or one in another memory format."""
    source = planner.read(x)
    if type(memory_format) is int:  # the default of a schema
        memory_format = torch.contiguous_format
    if memory_format in (torch.contiguous_format, torch.channels_last):
        last = memory_format is torch.channels_last
        planner.result(step, planner.add("contiguous", [source], [int(last)]), last)
    elif memory_format in (None, torch.preserve_format):
        planner.result(step, source, planner.last(x))
    else:
        raise Unplanned


def cast(planner: Planner, step: Step, x: Any, dtype: Any, *rest: Any) -> None:
    """Another float dtype."""
    source = planner.read(x)
    if x.dtype not in REALS or dtype not in REALS or any(rest):  # non_blocking, copy, memory_format
        raise Unplanned
    planner.result(step, planner.add("cast", [source], [DTYPES[dtype]]), planner.last(x))


def _without(rank: int, dim: int) -> list[int]:
    """The sizes of a reshape that drops a dimension of size 1."""
    return [-2 - d for d in range(rank) if d != dim]


def _quantization(value: Value) -> QParams:
    return value.quantization or _NONE


def _check_pair(a: Any, b: Any, repeated: bool = False) -> None:
    """Two tensors of one shape, or [N, C, H, W] and [N, C, 1, 1]; `repeated`: any b that is repeated to a's shape."""
    if not isinstance(a, Value) or not isinstance(b, Value) or a.shape is None or b.shape is None:
        raise Unplanned
    if a.shape == b.shape or (len(a.shape) == 4 and b.shape == (*a.shape[:2], 1, 1)):
        return
    one = (1,) * (len(a.shape) - len(b.shape)) + b.shape
    if not repeated or len(one) > len(a.shape):
        raise Unplanned
    if any(mine not in (1, size) for mine, size in zip(one, a.shape, strict=True)):
        raise Unplanned


def _positional(call: Call) -> list[Any]:
    """The arguments of a call in the order of its schema, defaults included."""
    if not isinstance(call.target, torch._ops.OpOverload):
        return list(call.args)
    found = list(call.args)
    for argument in call.target._schema.arguments[len(call.args) :]:
        found.append(call.kwargs.get(argument.name, argument.default_value))
    return found


RULES: dict[str, Callable[[Planner, Step], None]] = {
    "conv2d": layer,
    "linear": layer,
    "max_pool2d": pool,
    "avg_pool2d": pool,
    "adaptive_avg_pool2d": pool,
    "upsample_nearest2d": resized,
    "upsample_bilinear2d": resized,
    "interleave": resized,
    "activation": unary,
    "leaky_relu": unary,
    "softmax": unary,
    "layer_norm": unary,
    "attention": attention,
    "quantize": conversion,
    "dequantize": conversion,
    "add": binary,
    "mul": binary,
    "cat": concatenation,
    "lookup": table,
    "move": call_of_torch,
    "cast": call_of_torch,
    "torch": call_of_torch,
}
CALLS: dict[Any, Callable[..., None]] = {
    aten.add.Tensor: arithmetic,
    aten.mul.Tensor: arithmetic,
    aten.sub.Tensor: arithmetic,
    aten.cat.default: cat,
    aten.reshape.default: reshape,
    aten.view.default: reshape,
    aten._unsafe_view.default: reshape,
    aten.flatten.using_ints: reshape,
    aten.unflatten.int: reshape,
    aten.squeeze.dim: reshape,
    aten.squeeze.dims: reshape,
    aten.unsqueeze.default: reshape,
    aten.permute.default: permute,
    aten.transpose.int: transpose,
    aten.t.default: transpose,
    aten.slice.Tensor: slice_,
    aten.select.int: select,
    aten.chunk.default: pieces,
    aten.split.Tensor: pieces,
    aten.split_with_sizes.default: pieces,
    aten.unbind.int: unbound,
    operator.getitem: piece,
    aten.expand.default: expand,
    aten.constant_pad_nd.default: pad,
    aten.clone.default: same,
    aten.alias.default: same,
    aten.detach.default: same,
    aten.contiguous.default: same,
    aten.to.dtype: cast,
}
