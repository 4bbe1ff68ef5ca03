"""Layer norms of the last dimension that are written out, as exporters of ONNX do below opset 17, and TensorFlow's:
``(x - m) / sqrt(mean((x - m)^2) + eps)`` with ``m = mean(x)``, times a scale, plus a shift."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import fx

from pykernels.graph.nodes import argument, aten, constant, facts, is_call, only_user, replace

__all__ = ["spelled_out_layer_norm"]


class _Deviation(NamedTuple):
    """``sqrt(mean((x - m)^2) + eps)`` of x."""

    x: fx.Node
    mean: fx.Node
    eps: float


def spelled_out_layer_norm(module: fx.GraphModule, node: fx.Node) -> None:
    """Make one call of what ends in `node`, a product or a quotient, and of the scale and shift that follow it."""
    found = _normalized(node)
    if found is not None:
        _write(module, node, found, None, None)
        return
    if is_call(node, "aten.mul"):  # x * (g / deviation) + (b - m * (g / deviation))
        total = only_user(node)
        for x, factor in (node.args, node.args[::-1]):
            scaled = _scaled_inverse(factor)
            if scaled is None or scaled[0].x is not x or not is_call(total, "aten.add") or total.kwargs:
                continue
            shift = total.args[1] if total.args[0] is node else total.args[0]
            if not is_call(shift, "aten.sub") or shift.kwargs or not is_call(shift.args[1], "aten.mul"):
                continue
            if set(shift.args[1].args) == {scaled[0].mean, factor}:
                _write(module, total, scaled[0], scaled[1], shift.args[0])
                return


def _write(module: fx.GraphModule, end: fx.Node, found: _Deviation, scale: Any, shift: Any) -> None:
    channels = facts(found.x).shape[-1:]

    def fits(value: Any) -> bool:
        known = constant(module, value)
        return known is not None and tuple(known.shape) == channels

    if (scale is not None and not fits(scale)) or (shift is not None and not fits(shift)):
        return
    for call in ("aten.mul", "aten.add"):
        user = only_user(end)
        if (call == "aten.mul") is (scale is not None) or shift is not None or not is_call(user, call) or user.kwargs:
            continue
        other = user.args[1] if user.args[0] is end else user.args[0]
        if fits(other):
            end, scale, shift = (user, other, shift) if call == "aten.mul" else (user, scale, other)
    replace(end, aten.layer_norm.default, (found.x, list(channels), scale, shift, found.eps))


def _normalized(node: fx.Node) -> _Deviation | None:
    """Of ``(x - m) / deviation``, or of the product with its inverse."""
    if len(node.args) != 2 or node.kwargs:
        return None
    pairs = [node.args] if is_call(node, "aten.div") else [node.args, node.args[::-1]]
    for centred, by in pairs:
        found = _deviation(by) if is_call(node, "aten.div") else _inverse(by)
        if found is not None and _centred(centred) == (found.x, found.mean):
            return found
    return None


def _scaled_inverse(node: Any) -> tuple[_Deviation, Any] | None:
    """Of ``g / deviation`` what is divided by, and g."""
    if is_call(node, "aten.mul") and len(node.args) == 2 and not node.kwargs:
        for by, scale in (node.args, node.args[::-1]):
            found = _inverse(by)
            if found is not None:
                return found, scale
    return None


def _inverse(node: Any) -> _Deviation | None:
    if is_call(node, "aten.rsqrt"):
        return _of_variance(node.args[0])
    if is_call(node, "aten.reciprocal"):
        return _deviation(node.args[0])
    one = is_call(node, "aten.div") and not node.kwargs and isinstance(node.args[0], (int, float))
    return _deviation(node.args[1]) if one and node.args[0] == 1 else None


def _deviation(node: Any) -> _Deviation | None:
    return _of_variance(node.args[0]) if is_call(node, "aten.sqrt") else None


def _of_variance(node: Any) -> _Deviation | None:
    """Of ``mean((x - m)^2) + eps``."""
    if not is_call(node, "aten.add") or node.kwargs or not isinstance(node.args[1], float):
        return None
    square = _averaged(node.args[0])
    if square is None:
        return None
    if not (is_call(square, "aten.pow") and square.args[1] == 2) and not (
        is_call(square, "aten.mul") and square.args[0] is square.args[1]
    ):
        return None
    centred = _centred(square.args[0])
    return None if centred is None else _Deviation(*centred, node.args[1])


def _centred(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """The x and m of ``x - m``."""
    if not is_call(node, "aten.sub") or node.kwargs or len(node.args) != 2:
        return None
    x, mean = node.args
    return (x, mean) if isinstance(x, fx.Node) and _averaged(mean) is x else None


def _averaged(node: Any) -> fx.Node | None:
    """What `node` is the mean of, over its last dimension, which stays."""
    if not is_call(node, "aten.mean") or not argument(node, "keepdim") or argument(node, "dtype") is not None:
        return None
    source, known = node.args[0], facts(node.args[0])
    dims = argument(node, "dim")
    if known is None or not dims or [d % len(known.shape) for d in dims] != [len(known.shape) - 1]:
        return None
    return source if isinstance(known.shape[-1], int) else None
