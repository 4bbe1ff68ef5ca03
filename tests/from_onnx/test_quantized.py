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
