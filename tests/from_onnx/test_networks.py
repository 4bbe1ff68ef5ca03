"""Networks as torch.onnx.export writes them, and ONNX Runtime's quantizer, against ONNX Runtime's answers."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

import onnxruntime

import pykernels as pk
from tests.models import UNet, network
from tests.networks import ops

ZOO = [
    "resnet18", "mobilenet_v2", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0", "shufflenet_v2_x0_5",
    "densenet121", "squeezenet1_1", "unet",
]  # fmt: skip


def exported(module: nn.Module, x: torch.Tensor, path: Path, dynamo: bool = False, opset: int = 18) -> Path:
    """A file with a free batch size, by the new or the old exporter."""
    batch: dict[str, Any] = {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
    if dynamo:
        pytest.importorskip("onnxscript")
        batch = {"dynamic_shapes": ({0: torch.export.Dim("batch")},), "external_data": False, "verbose": False}
    names = {"input_names": ["x"], "output_names": ["y"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(module.eval(), (x,), str(path), dynamo=dynamo, opset_version=opset, **names, **batch)
    return path


def runtime(path: Path, x: torch.Tensor) -> torch.Tensor:
    """ONNX Runtime's answer by its plain kernels: the int8 ones saturate on processors without VNNI."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


def quantized(path: Path, samples: list[torch.Tensor], **options: Any) -> Path:
    """The file by ONNX Runtime's static quantizer."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    shapes = pytest.importorskip("onnxruntime.quantization.shape_inference")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined,misc]
        left = iter(samples)

        def get_next(self) -> dict[str, Any] | None:
            sample = next(self.left, None)
            return None if sample is None else {"x": sample.numpy()}

    ready, target = path.with_suffix(".ready.onnx"), path.with_suffix(".int8.onnx")
    shapes.quant_pre_process(str(path), str(ready), skip_symbolic_shape=True)
    kind = quantization.QuantFormat.QDQ
    quantization.quantize_static(str(ready), str(target), Reader(), quant_format=kind, **options)
    return target


def close(path: Path, x: torch.Tensor, tolerance: float = 1e-4) -> pk.Optimized:
    fast, expected = pk.optimize(path, x[:2]), runtime(path, x)
    assert fast.free == [[0]]
    assert (fast(x) - expected).abs().max() <= tolerance * expected.abs().max()
    return fast


class Words(nn.Module):
    """An embedding, and a block of attention and a gelu between layer norms, as sizes of the input say."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Embedding(20, 16), nn.LayerNorm(16), nn.Linear(16, 5)
        self.parts, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.wide, self.back = nn.Linear(16, 64), nn.Linear(64, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, T] of words -> [N, 5]."""
        y = self.embed(x)
        n, t, width = y.shape
        q, k, v = self.parts(self.norm(y)).reshape(n, t, 3, 2, width // 2).permute(2, 0, 3, 1, 4)
        read = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, t, width)
        y = y + self.out(read)
        y = y + self.back(nn.functional.gelu(self.wide(y)))
        return self.head(y.mean(1))


@pytest.mark.parametrize("opset", [14, 18])
def test_a_transformer(opset: int, tmp_path: Path) -> None:
    path = exported(Words(), torch.randint(20, (2, 7)), tmp_path / "words.onnx", opset=opset)
    found = ops(close(path, torch.randint(20, (5, 7))))
    assert found.count("pykernels.linear") == 5 and "pykernels.softmax" in found
    assert not {"aten.erf", "aten.stack"} & set(found)  # gelu is part of a layer, the scale a number
    assert "pykernels.layer_norm" in found  # written out below opset 17


@pytest.mark.parametrize("opset", [9, 13])
def test_a_u_net(opset: int, tmp_path: Path) -> None:
    x = torch.randn(3, 3, 16, 16)
    path = exported(UNet(4), x[:2], tmp_path / "unet.onnx", opset=opset)
    found = ops(close(path, x))
    assert not any("conv" in name and "pykernels" not in name for name in found)


def test_what_the_quantizer_writes_runs_on_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.ReLU6(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3, groups=8), nn.Hardswish(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5),
    )  # fmt: skip
    samples = [torch.randn(8, 3, 12, 12) for _ in range(4)]
    path = exported(module, samples[0][:2], tmp_path / "net.onnx")
    types = pytest.importorskip("onnxruntime.quantization").QuantType
    path = quantized(path, samples, per_channel=True, activation_type=types.QUInt8, weight_type=types.QInt8)
    x = torch.randn(64, 3, 12, 12)
    fast, expected = pk.optimize(path, x[:2], precision="int8"), runtime(path, x)
    assert [name for name in ops(fast) if "qconv2d" in name or "int8_linear" in name] == [
        "pykernels.qconv2d", "pykernels.qconv2d", "pykernels.int8_linear",
    ]  # fmt: skip
    values = np.unique(expected.numpy())
    step = np.diff(values).min()
    assert ((fast(x) - expected).abs() <= 1.01 * step).float().mean() > 0.98


@pytest.mark.slow
@pytest.mark.parametrize("dynamo", [False, True], ids=["old exporter", "new exporter"])
@pytest.mark.parametrize("name", ZOO)
def test_the_networks_of_the_zoo(name: str, dynamo: bool, tmp_path: Path) -> None:
    module, x = network(name)
    close(exported(module, x, tmp_path / "net.onnx", dynamo), torch.cat([x, x.flip(0)])[:3])


@pytest.mark.slow
@pytest.mark.parametrize("per_channel", [True, False], ids=["per channel", "per tensor"])
@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "unet"])
def test_the_quantized_networks_of_the_zoo(name: str, per_channel: bool, tmp_path: Path) -> None:
    module, x = network(name)
    samples = [torch.randn(8, *x.shape[1:]) for _ in range(4)]
    path = quantized(exported(module, x, tmp_path / "net.onnx"), samples, per_channel=per_channel)
    x = torch.randn(64, *x.shape[1:])
    fast, expected = pk.optimize(path, x[:2], precision="int8"), runtime(path, x)
    if name != "unet":  # whose transposed convolution stays with torch
        assert fast.report().conversions == 2
    # Deep networks make much of one sum that is rounded to the next step, and the two round some sums differently (one
    # rounding or two). So: no further from the floats than ONNX Runtime.
    with torch.no_grad():
        found, exact = fast(x), module(x)
    assert (found - exact).norm() <= 1.1 * (expected - exact).norm()
