"""ONNX Runtime: fp32, and int8 by its own static quantization (QDQ, per channel, u8 activations).

Where its products saturate (see `pairs_saturate`) its documents advise 7-bit weights: so it gets them there.
"""

from __future__ import annotations

import pathlib
import tempfile
from typing import Any

import torch

from pykernels.bench.case import Case, pairs_saturate
from pykernels.bench.rivals.base import Rival, Run, calibration_parts, require, require_floats
from pykernels.bench.rivals.onnx_layers import exported, qdq_layer


def session(model: bytes, threads: int) -> Any:
    """An inference session with all graph optimizations on `threads` threads."""
    ort = require("onnxruntime")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.log_severity_level = 3
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def runner(model: bytes, inputs: tuple[torch.Tensor, ...]) -> Run:
    """Inputs and outputs are bound once, so that no call copies them."""
    ready = session(model, torch.get_num_threads())
    binding = ready.io_binding()
    arrays = [x.contiguous().numpy() for x in inputs]
    for meta, array in zip(ready.get_inputs(), arrays, strict=True):
        binding.bind_cpu_input(meta.name, array)
    binding.bind_output(ready.get_outputs()[0].name, "cpu")

    def run(alive: Any = arrays) -> Any:  # the binding shares the arrays' memory and does not own it
        ready.run_with_iobinding(binding)
        return binding.get_outputs()[0].numpy()

    return run


class OnnxRuntime(Rival):
    """onnxruntime's CPU provider."""

    name = "ONNX Runtime"

    def __init__(self, precision: str) -> None:
        super().__init__(precision)
        families = (
            {"linear", "conv", "pool", "network"} if precision == "fp32" else {"gemm", "linear", "conv", "network"}
        )
        self.families = frozenset(families)

    def prepare(self, case: Case) -> Run:
        require("onnxruntime")
        if self.precision == "int8" and case.quantized is not None and case.family != "linear":
            return runner(qdq_layer(case.quantized), (case.quantized.x,))
        model = exported(require_floats(case), case.inputs)
        if self.precision == "int8":
            model = _dynamic(model) if case.family == "linear" else _static(model, case)
        return runner(model, case.inputs)


def _dynamic(model: bytes) -> bytes:
    quantization = require("onnxruntime.quantization", "onnxruntime")
    with tempfile.TemporaryDirectory() as folder:
        source, target = pathlib.Path(folder, "float.onnx"), pathlib.Path(folder, "int8.onnx")
        source.write_bytes(model)
        quantization.quantize_dynamic(
            source, target, per_channel=True, weight_type=quantization.QuantType.QInt8, reduce_range=pairs_saturate()
        )
        return target.read_bytes()


def _static(model: bytes, case: Case) -> bytes:
    quantization = require("onnxruntime.quantization", "onnxruntime")
    shape = require("onnxruntime.quantization.shape_inference", "onnxruntime")

    class Reader(quantization.CalibrationDataReader):  # type: ignore[name-defined]
        def __init__(self) -> None:
            self.left = iter([{"x0": part.numpy()} for part in calibration_parts(case)])

        def get_next(self) -> Any:
            return next(self.left, None)

    with tempfile.TemporaryDirectory() as folder:
        source, ready = pathlib.Path(folder, "float.onnx"), pathlib.Path(folder, "ready.onnx")
        target = pathlib.Path(folder, "int8.onnx")
        source.write_bytes(model)
        shape.quant_pre_process(source, ready, skip_symbolic_shape=True)
        quantization.quantize_static(
            ready,
            target,
            Reader(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            reduce_range=pairs_saturate(),
        )
        return target.read_bytes()
