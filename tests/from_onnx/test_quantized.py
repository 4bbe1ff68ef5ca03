"""Files with quantize and dequantize nodes, as ONNX Runtime's quantizer writes them, become int8 steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")

from onnx import helper

import pykernels as pk
from pykernels.from_onnx import load
from pykernels.graph.qdq import has_quantizers
from tests.from_onnx.onnx_models import answers, model, saved
from tests.networks import ops

NODE = helper.make_node
X = {"x": (np.float32, ["batch", 4, 8, 8])}
Constants = dict[str, Any]


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def pair(name: str, out: str, scale: str, zero: str) -> list[Any]:
    """Quantized and dequantized again."""
    return [
        NODE("QuantizeLinear", [name, scale, zero], [f"{out}_q"]),
        NODE("DequantizeLinear", [f"{out}_q", scale, zero], [out]),
    ]


def layers(activations: Any, weights: Any, per_channel: bool) -> Any:
    """Convolution and relu, a residual sum, the mean over the image, a Gemm of transposed weights."""
    random = rng()
    outs = {"w1": (4, 4, 3, 3), "w2": (4, 4, 1, 1), "w3": (4, 5)}
    shift = 0 if weights is np.int8 else 128
    low = 0 if activations is np.uint8 else -128
    constants: Constants = {
        "s": np.float32(0.05),
        "z": activations(low + 120),
        "sr": np.float32(0.03),
        "zr": activations(low),
    }
    nodes = pair("x", "xd", "s", "z")
    for name, shape in outs.items():
        axis, count = (1, shape[1]) if name == "w3" else (0, shape[0])
        scales = random.uniform(0.005, 0.02, count if per_channel else ()).astype(np.float32)
        constants[name] = (random.integers(-127, 128, shape) + shift).astype(weights)
        constants[f"{name}s"], constants[f"{name}z"] = scales, np.full(scales.shape, shift, weights)
        constants[f"{name}b"] = random.integers(-900, 900, count).astype(np.int32)
        constants[f"{name}bs"] = (scales * (constants["sr"] if name == "w3" else constants["s"])).astype(np.float32)
        constants[f"{name}bz"] = np.zeros(scales.shape, np.int32)
        nodes += [
            NODE("DequantizeLinear", [name, f"{name}s", f"{name}z"], [f"{name}d"], axis=axis),
            NODE("DequantizeLinear", [f"{name}b", f"{name}bs", f"{name}bz"], [f"{name}bd"], axis=0),
        ]
    nodes += [
        NODE("Conv", ["xd", "w1d", "w1bd"], ["c1"], pads=[1, 1, 1, 1]),
        NODE("Relu", ["c1"], ["r1"]),
        *pair("r1", "r1d", "sr", "zr"),
        NODE("Conv", ["xd", "w2d", "w2bd"], ["c2"]),
        *pair("c2", "c2d", "s", "z"),
        NODE("Add", ["r1d", "c2d"], ["a"]),
        *pair("a", "ad", "s", "z"),
        NODE("GlobalAveragePool", ["ad"], ["g"]),
        *pair("g", "gd", "sr", "z"),
        NODE("Flatten", ["gd"], ["f"]),
        NODE("Gemm", ["f", "w3d", "w3bd"], ["y3"]),
        *pair("y3", "y", "s", "z"),
    ]
    return model(nodes, X, ["y"], constants, opset=19)


@pytest.mark.parametrize(
    "activations, weights, per_channel",
    [(np.uint8, np.int8, True), (np.int8, np.int8, False), (np.uint8, np.uint8, True)],
)
def test_layers_between_quantizers_run_on_bytes(
    activations: Any, weights: Any, per_channel: bool, tmp_path: Path
) -> None:
    proto = layers(activations, weights, per_channel)
    x = torch.randn(16, 4, 8, 8)
    fast = pk.optimize(saved(proto, tmp_path), x[:2], precision="int8")
    found = ops(fast)
    assert {"pykernels.qconv2d", "pykernels.qadaptive_avg_pool2d", "pykernels.int8_linear"} <= set(found)
    assert [found.count(f"pykernels.{name}_per_tensor") for name in ("quantize", "dequantize")] == [1, 1]
    apart = (fast(x) - answers(proto, x)[0]).abs() / 0.05
    assert (apart < 1.01).float().mean() > 0.98 and apart.max() < 3


def test_the_rounded_graph_is_the_file(tmp_path: Path) -> None:
    proto = layers(np.uint8, np.int8, True)
    graph = load(saved(proto, tmp_path))
    x = torch.randn(4, 4, 8, 8)
    assert has_quantizers(graph)
    apart = (graph(x) - answers(proto, x)[0]).abs() / 0.05
    assert (apart < 0.01).float().mean() > 0.95 and apart.max() < 1.01  # 1 / scale is a product here


def test_a_product_of_rows_is_a_linear_layer_on_bytes(tmp_path: Path) -> None:
    random = rng()
    constants: Constants = {
        "s": np.float32(0.05),
        "z": np.uint8(128),
        "w": random.integers(-127, 128, (8, 6)).astype(np.int8),
        "ws": random.uniform(0.005, 0.02, 6).astype(np.float32),
        "b": random.standard_normal(6).astype(np.float32),
    }
    nodes = [
        *pair("x", "xd", "s", "z"),
        NODE("DequantizeLinear", ["w", "ws"], ["wd"], axis=1),
        NODE("MatMul", ["xd", "wd"], ["m"]),
        NODE("Add", ["m", "b"], ["a"]),
        *pair("a", "y", "s", "z"),
    ]
    proto = model(nodes, {"x": (np.float32, ["batch", 3, 8])}, ["y"], constants, opset=19)
    x = torch.randn(16, 3, 8)
    fast = pk.optimize(saved(proto, tmp_path), x, precision="int8")
    assert ops(fast) == ["pykernels.quantize_per_tensor", "pykernels.int8_linear", "pykernels.dequantize_per_tensor"]
    assert ((fast(x) - answers(proto, x)[0]).abs() < 0.0501).float().mean() > 0.99


def test_a_channel_shuffle_between_quantizers_is_one_copy(tmp_path: Path) -> None:
    nodes = [
        *pair("x", "xd", "s", "z"),
        NODE("Reshape", ["xd", "apart"], ["r"]),
        *pair("r", "rd", "s", "z"),
        NODE("Transpose", ["rd"], ["t"], perm=[0, 2, 1, 3, 4]),
        *pair("t", "td", "s", "z"),
        NODE("Reshape", ["td", "back"], ["b"]),
        *pair("b", "y", "s", "z"),
    ]
    constants = {
        "s": np.float32(0.05),
        "z": np.uint8(128),
        "apart": np.array([0, 2, 2, 8, 8]),
        "back": np.array([0, 4, 8, 8]),
    }
    proto = model(nodes, X, ["y"], constants, opset=19)
    x = torch.randn(3, 4, 8, 8)
    fast = pk.optimize(saved(proto, tmp_path), x, precision="int8")
    found = ops(fast)
    assert [found.count(f"pykernels.{name}_per_tensor") for name in ("quantize", "dequantize")] == [1, 1]
    assert found.count("aten.permute") == 2  # to where channels lie last, and back
    torch.testing.assert_close(fast(x), answers(proto, x)[0], atol=1e-6, rtol=0)


def test_weights_that_are_quantized_in_the_file_are_weights(tmp_path: Path) -> None:
    constants: Constants = {
        "s": np.float32(0.05),
        "z": np.int8(0),
        "w": rng().standard_normal((6, 4, 1, 1)).astype(np.float32),
        "ws": np.full(6, 0.02, np.float32),
        "wz": np.zeros(6, np.int8),
    }
    nodes = [
        *pair("x", "xd", "s", "z"),
        NODE("QuantizeLinear", ["w", "ws", "wz"], ["wq"], axis=0),
        NODE("DequantizeLinear", ["wq", "ws", "wz"], ["wd"], axis=0),
        NODE("Conv", ["xd", "wd"], ["c"]),
        *pair("c", "y", "s", "z"),
    ]
    proto = model(nodes, X, ["y"], constants, opset=19)
    x = torch.randn(2, 4, 8, 8)
    fast = pk.optimize(saved(proto, tmp_path), x, precision="int8")
    assert "pykernels.qconv2d" in ops(fast)
    assert ((fast(x) - answers(proto, x)[0]).abs() < 0.0501).float().mean() > 0.99


@pytest.mark.parametrize(
    "constants, why",
    [
        ({"s": np.float32(0.1), "z": np.int16(0)}, "torch.int16: only 8 bits are understood"),
        ({"s": np.float32(0), "z": np.int8(0)}, "a scale that is not positive and finite"),
        ({"s": np.float32(np.nan), "z": np.int8(0)}, "a scale that is not positive and finite"),
        ({"s": np.float32([0.1, 0.2]), "z": np.int8([0])}, "scale and zero point of different sizes"),
        ({"s": np.float16(0.1), "z": np.int8(0)}, "scales that are not float32"),
    ],
)
def test_quantizers_of_other_kinds_are_refused(constants: Constants, why: str, tmp_path: Path) -> None:
    proto = model(pair("x", "y", "s", "z"), {"x": (np.float32, [2, 2])}, ["y"], constants, opset=21)
    with pytest.raises(ValueError, match=rf"model.onnx: not understood: QuantizeLinear \(y_q: .*{why}"):
        load(saved(proto, tmp_path))


def test_scales_that_are_computed_are_refused(tmp_path: Path) -> None:
    nodes = [NODE("ReduceMax", ["x"], ["s"], keepdims=0), *pair("x", "y", "s", "z")]
    proto = model(nodes, {"x": (np.float32, [2, 2])}, ["y"], {"z": np.int8(0)})
    with pytest.raises(ValueError, match="its scale or zero point is computed from data"):
        load(saved(proto, tmp_path))


def test_parameters_that_are_no_weights_are_constants(tmp_path: Path) -> None:
    """Quantizers round biases and the numbers of an activation, too; a table is made of these."""
    constants: Constants = {"s": np.float32(0.05), "z": np.uint8(100), "q": np.uint8(200), "zero": np.uint8(0)}
    nodes = [
        *pair("x", "xd", "s", "z"),
        NODE("DequantizeLinear", ["q", "s", "zero"], ["ten"]),
        NODE("Mul", ["xd", "ten"], ["m"]),
        *pair("m", "y", "s", "z"),
    ]
    proto = model(nodes, {"x": (np.float32, ["batch", 4])}, ["y"], constants, opset=19)
    x = torch.randn(64, 4)
    fast = pk.optimize(saved(proto, tmp_path), precision="int8")
    assert ops(fast) == ["pykernels.quantize_per_tensor", "pykernels.qlookup", "pykernels.dequantize_per_tensor"]
    assert ((fast(x) - answers(proto, x)[0]).abs() < 0.0501).all()


# ---- operators that take and give bytes ------------------------------------------------------------------------------
def microsoft(kind: str, inputs: list[str], outputs: list[str], **attributes: Any) -> Any:
    return NODE(kind, inputs, outputs, domain="com.microsoft", **attributes)


def with_microsoft(proto: Any) -> Any:
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return proto


def bytes_between(activations: Any) -> tuple[Any, Any]:
    """The same network in bytes, and in floats between quantizers."""
    random = rng()
    zero = activations(120 if activations is np.uint8 else -8)
    constants: Constants = {
        "s": np.float32(0.05),
        "z": zero,
        "w": random.integers(-127, 128, (6, 4, 3, 3)).astype(np.int8),
        "ws": random.uniform(0.005, 0.02, 6).astype(np.float32),
        "wz": np.zeros(6, np.int8),
        "b": random.integers(-900, 900, 6).astype(np.int32),
        "v": random.integers(-127, 128, (6, 5)).astype(np.int8),
        "vs": np.float32(0.01),
        "vz": np.int8(0),
        "flat": np.array([0, 6]),
    }
    scale, q = ["s", "z"], ["s", "z"]
    lone = [
        NODE("QuantizeLinear", ["x", *scale], ["xq"]),
        NODE("QLinearConv", ["xq", *q, "w", "ws", "wz", *q, "b"], ["c"], pads=[1, 1, 1, 1]),
        NODE("MaxPool", ["c"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        microsoft("QLinearSigmoid", ["m", *q, *q], ["g"]),
        microsoft("QLinearMul", ["m", *q, "g", *q, *q], ["p"]),
        microsoft("QLinearConcat", [*q, "p", *q, "m", *q], ["k"], axis=0),
        microsoft("QLinearGlobalAveragePool", ["k", *q, *q], ["a"], channels_last=0),
        NODE("Reshape", ["a", "flat"], ["f"]),
        NODE("QLinearMatMul", ["f", *q, "v", "vs", "vz", *q], ["yq"]),
        NODE("DequantizeLinear", ["yq", *scale], ["y"]),
    ]
    between = [
        *pair("x", "xd", *scale),
        NODE("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
        NODE("Mul", ["s", "ws"], ["bs"]),
        NODE("DequantizeLinear", ["b", "bs"], ["bd"], axis=0),
        NODE("Conv", ["xd", "wd", "bd"], ["c"], pads=[1, 1, 1, 1]),
        *pair("c", "cd", *scale),
        NODE("MaxPool", ["cd"], ["m"], kernel_shape=[2, 2], strides=[2, 2]),
        NODE("Sigmoid", ["m"], ["g"]),
        *pair("g", "gd", *scale),
        NODE("Mul", ["m", "gd"], ["p"]),
        *pair("p", "pd", *scale),
        NODE("Concat", ["pd", "m"], ["k"], axis=0),
        NODE("GlobalAveragePool", ["k"], ["a"]),
        *pair("a", "ad", *scale),
        NODE("Reshape", ["ad", "flat"], ["f"]),
        NODE("DequantizeLinear", ["v", "vs", "vz"], ["vd"]),
        NODE("MatMul", ["f", "vd"], ["yr"]),
        *pair("yr", "y", *scale),
    ]
    return with_microsoft(model(lone, X, ["y"], constants, opset=19)), model(between, X, ["y"], constants, opset=19)


@pytest.mark.parametrize("activations", [np.uint8, np.int8])
def test_operators_of_bytes_are_those_of_floats_between_quantizers(activations: Any, tmp_path: Path) -> None:
    lone, between = bytes_between(activations)
    x = torch.randn(2, 4, 8, 8)
    found = pk.optimize(saved(lone, tmp_path), x, precision="int8")
    expected = pk.optimize(saved(between, tmp_path, "between.onnx"), x, precision="int8")
    assert torch.equal(found(x), expected(x)) and found(x).abs().max() > 0
    assert {"pykernels.qconv2d", "pykernels.int8_linear"} <= set(ops(found)) and ops(found) == ops(expected)


def test_operators_of_bytes_that_are_not_understood_are_named(tmp_path: Path) -> None:
    nodes = [
        NODE("QuantizeLinear", ["x", "s", "z"], ["q"]),
        microsoft("QLinearGlobalAveragePool", ["q", "s", "z", "s", "z"], ["a"], name="last", channels_last=1),
        microsoft("QGemm", ["a", "s"], ["g"], name="short"),
        microsoft("FusedConv", ["g"], ["c"], name="fused"),
        NODE("DequantizeLinear", ["c", "s", "z"], ["y"]),
    ]
    proto = with_microsoft(model(nodes, X, ["y"], {"s": np.float32(0.1), "z": np.uint8(0)}, opset=19))
    with pytest.raises(
        ValueError,
        match=r"not understood: com.microsoft.QLinearGlobalAveragePool \(last\); com.microsoft.QGemm \(short\); "
        r"com.microsoft.FusedConv \(fused\)",
    ):
        load(saved(proto, tmp_path))


# ---- scales that are computed from data ------------------------------------------------------------------------------
@pytest.mark.parametrize("zero", [None, np.uint8(7), np.arange(6, dtype=np.uint8)], ids=["none", "one", "a column"])
def test_products_of_what_is_quantized_as_it_comes(zero: Any, tmp_path: Path) -> None:
    """As `quantize_dynamic` writes a linear layer."""
    constants: Constants = {"w": rng().integers(0, 256, (8, 6)).astype(np.uint8), "ws": np.float32(0.01)}
    if zero is not None:
        constants["wz"] = zero
    nodes = [
        NODE("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        NODE("MatMulInteger", ["q", "w", "z", *(["wz"] if zero is not None else [])], ["p"]),
        NODE("Cast", ["p"], ["f"], to=1),
        NODE("Mul", ["s", "ws"], ["scale"]),
        NODE("Mul", ["f", "scale"], ["y"]),
    ]
    proto = model(nodes, {"x": (np.float32, ["batch", 3, 8])}, ["y"], constants, opset=19)
    x = torch.randn(5, 3, 8)
    fast = pk.optimize(saved(proto, tmp_path))
    assert fast.free == [[0]] and "pykernels.linear" in ops(fast)
    torch.testing.assert_close(fast(x), answers(proto, x)[0], atol=1e-5, rtol=1e-5)
    assert torch.equal(fast(torch.zeros(2, 3, 8)), torch.zeros(2, 3, 6))


def test_a_convolution_of_what_is_quantized_as_it_comes(tmp_path: Path) -> None:
    constants: Constants = {"w": rng().integers(-127, 128, (6, 4, 3, 3)).astype(np.int8), "wz": np.int8(3)}
    nodes = [
        NODE("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        NODE("ConvInteger", ["q", "w", "z", "wz"], ["p"], pads=[1, 1, 1, 1]),
        NODE("Cast", ["p"], ["f"], to=1),
        NODE("Mul", ["f", "s"], ["y"]),
    ]
    proto = model(nodes, X, ["y"], constants, opset=19)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(pk.optimize(saved(proto, tmp_path))(x), answers(proto, x)[0], atol=1e-3, rtol=1e-5)
