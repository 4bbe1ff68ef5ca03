"""ONNX models of a few nodes, made with onnx.helper, and the answers of ONNX's reference implementation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator


def model(
    nodes: list[Any],
    inputs: dict[str, tuple[Any, list[Any]]],
    outputs: list[str],
    constants: dict[str, Any] | None = None,
    opset: int = 18,
) -> onnx.ModelProto:
    """A model of float32 outputs whose sizes are not declared.

    Args:
        inputs: of each name its NumPy dtype and its sizes, names where they are free.
        constants: initializers: arrays, or what NumPy makes an array of.
    """
    graph = helper.make_graph(
        nodes,
        "model",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)
            for name, (dtype, shape) in inputs.items()
        ],
        [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in (constants or {}).items()],
    )
    versions = [helper.make_opsetid("", opset), helper.make_opsetid("com.example", 1)]
    return helper.make_model(graph, opset_imports=versions, ir_version=8)


def saved(proto: onnx.ModelProto, folder: Path, name: str = "model.onnx") -> Path:
    path = folder / name
    path.write_bytes(proto.SerializeToString())
    return path


def answers(proto: onnx.ModelProto, *inputs: torch.Tensor) -> list[torch.Tensor]:
    """What ONNX's own slow and simple implementation answers."""
    names = [value.name for value in proto.graph.input]
    found = ReferenceEvaluator(proto).run(None, dict(zip(names, (x.numpy() for x in inputs), strict=True)))
    return [torch.from_numpy(np.array(value)) for value in found]
