"""Operators of 8 bits (ONNX Runtime's QOperator format) as what they stand for: floats between quantizers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from pykernels.from_onnx.file import require

__all__ = ["between_quantizers"]

# Each triple of inputs is bytes, scale and zero point; behind them stand the scale and the zero point of the output.
_PLAIN = {
    "QLinearConv": "Conv",
    "QLinearMatMul": "MatMul",
    "com.microsoft.QGemm": "Gemm",
    "com.microsoft.QLinearAdd": "Add",
    "com.microsoft.QLinearAveragePool": "AveragePool",
    "com.microsoft.QLinearConcat": "Concat",
    "com.microsoft.QLinearGlobalAveragePool": "GlobalAveragePool",
    "com.microsoft.QLinearLeakyRelu": "LeakyRelu",
    "com.microsoft.QLinearMul": "Mul",
    "com.microsoft.QLinearSigmoid": "Sigmoid",
    "com.microsoft.QLinearSoftmax": "Softmax",
}
_MOVES = frozenset({"Flatten", "MaxPool", "Reshape", "Resize", "Slice", "Squeeze", "Transpose", "Unsqueeze"})


def between_quantizers(nodes: Iterable[Any]) -> Iterator[Any]:
    """The nodes, with operators of bytes as DequantizeLinear, the operator of floats, QuantizeLinear."""
    scaled: dict[str, list[str]] = {}  # of bytes their scale and zero point
    for node in nodes:
        kind = node.op_type if node.domain in ("", "ai.onnx") else f"{node.domain}.{node.op_type}"
        if kind == "QuantizeLinear":
            scaled[node.output[0]] = list(node.input[1:3])
        whole = len(node.input) >= 5 and len(node.output) == 1  # nobody has checked operators of other domains
        if kind in _PLAIN and whole and not any(_differs(attribute) for attribute in node.attribute):
            found = list(_plain(node, _PLAIN[kind]))
        elif kind in _MOVES and node.input[0] in scaled:
            found = list(_between(node, kind, [[node.input[0], *scaled[node.input[0]]]], scaled[node.input[0]]))
            found[-2].input.extend(node.input[1:])
        else:
            yield node
            continue
        scaled[node.output[0]] = list(found[-1].input[1:])
        yield from found


def _differs(attribute: Any) -> bool:
    """Whether channels lie last, or a softmax is that of an older opset."""
    return (attribute.name == "channels_last" and attribute.i != 0) or (attribute.name == "opset" and attribute.i < 13)


def _plain(node: Any, kind: str) -> Iterator[Any]:
    inputs, bias = list(node.input), ""
    if kind == "Concat":
        inputs = inputs[2:] + inputs[:2]
    elif kind == "Conv":
        inputs, bias = inputs[:8], inputs[8] if len(inputs) > 8 else ""
    elif kind == "Gemm":
        inputs, bias = inputs[:6] + inputs[7:], "".join(inputs[6:7])
    count = len(inputs) // 3
    triples, given = [inputs[3 * i : 3 * i + 3] for i in range(count)], inputs[3 * count :]
    if not bias:
        yield from _between(node, kind, triples, given)
        return
    # 32 bits, of which one is the product of the two scales
    scale, real = f"{node.output[0]}/bias_scale", f"{node.output[0]}/bias"
    make = require("onnx.helper").make_node
    yield make("Mul", [triples[0][1], triples[1][1]], [scale], name=node.name)
    yield make("DequantizeLinear", [bias, scale], [real], name=node.name, axis=0)
    found = list(_between(node, kind, triples, given))
    found[-2 if given else -1].input.append(real)
    yield from found


def _between(node: Any, kind: str, triples: list[list[str]], given: list[str]) -> Iterator[Any]:
    """Dequantize each triple, compute, and quantize where a scale is given."""
    make, name, (out, *_) = require("onnx.helper").make_node, node.name, node.output
    reals = [f"{out}/operand{i}" for i in range(len(triples))]
    for i, (triple, real) in enumerate(zip(triples, reals, strict=True)):
        axis = 0 if kind == "Conv" and i else 1
        yield make("DequantizeLinear", triple, [real], name=name, axis=axis)
    middle = f"{out}/real" if given else out
    computed = make(kind, reals, [middle], name=name)
    computed.attribute.extend(a for a in node.attribute if a.name not in ("channels_last", "opset"))
    yield computed
    if given:
        yield make("QuantizeLinear", [middle, *given], [out], name=name)
