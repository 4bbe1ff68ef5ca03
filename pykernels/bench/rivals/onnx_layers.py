"""A quantized layer as an ONNX graph, which ONNX Runtime and OpenVINO both fuse to their int8 kernels."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import torch
from torch import nn

from pykernels.bench.case import QuantizedLayer
from pykernels.bench.rivals.base import require

OPSET = 18


def qdq_layer(layer: QuantizedLayer) -> bytes:
    """DequantizeLinear -> Conv | Gemm -> (Relu) -> (QuantizeLinear), u8 in, u8 or fp32 out."""
    onnx = require("onnx")
    helper, numpy_helper, types = onnx.helper, onnx.numpy_helper, onnx.TensorProto
    constants: dict[str, Any] = {
        "x_scale": np.float32(layer.x_scale),
        "x_zero": np.uint8(layer.x_zero_point),
        "w_q": layer.weight.contiguous().numpy(),
        "w_scale": layer.weight_scale.numpy(),
        "w_zero": np.zeros(layer.weight.shape[0], np.int8),
        "b_scale": (layer.weight_scale * layer.x_scale).numpy(),
        "b_zero": np.zeros(layer.weight.shape[0], np.int32),
    }
    constants["b_q"] = torch.round(layer.bias / (layer.weight_scale * layer.x_scale)).to(torch.int32).numpy()
    nodes = [
        helper.make_node("DequantizeLinear", ["x", "x_scale", "x_zero"], ["x_f"]),
        helper.make_node("DequantizeLinear", ["w_q", "w_scale", "w_zero"], ["w_f"], axis=0),
        helper.make_node("DequantizeLinear", ["b_q", "b_scale", "b_zero"], ["b_f"], axis=0),
    ]
    if layer.is_conv:
        pads, kernel = [layer.padding] * 4, list(layer.weight.shape[2:])
        attributes = {"pads": pads, "strides": [layer.stride] * 2, "group": layer.groups, "kernel_shape": kernel}
        nodes.append(helper.make_node("Conv", ["x_f", "w_f", "b_f"], ["y"], **attributes))
    else:
        nodes.append(helper.make_node("Gemm", ["x_f", "w_f", "b_f"], ["y"], transB=1))
    last = "y"
    if layer.activation == "relu":
        nodes.append(helper.make_node("Relu", [last], ["y_act"]))
        last = "y_act"
    kind = types.FLOAT
    if layer.out_scale is not None:
        constants |= {"y_scale": np.float32(layer.out_scale), "y_zero": np.uint8(layer.out_zero_point)}
        nodes.append(helper.make_node("QuantizeLinear", [last, "y_scale", "y_zero"], ["y_q"]))
        last, kind = "y_q", types.UINT8
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", types.UINT8, list(layer.x.shape))],
        [helper.make_tensor_value_info(last, kind, list(layer.real.shape))],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=9)
    return bytes(model.SerializeToString())


def exported(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> bytes:
    """torch.onnx.export of a float module with fixed shapes."""
    require("onnx")
    require("onnxscript")
    names = [f"x{i}" for i in range(len(inputs))]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        contiguous = tuple(x.contiguous() for x in inputs)
        program = torch.onnx.export(
            model, contiguous, dynamo=True, input_names=names, opset_version=OPSET, verbose=False
        )
    assert program is not None
    return bytes(program.model_proto.SerializeToString())
