"""OpenVINO: fp32, bf16 where the processor has it, int8 by NNCF (post-training quantization; for linears
compressed weights)."""

from __future__ import annotations

import contextlib
import io
import logging
from typing import Any

import torch

from pykernels.bench.case import Case
from pykernels.bench.rivals.base import Absent, Rival, Run, calibration_parts, require, require_floats
from pykernels.bench.rivals.onnx_layers import exported, qdq_layer


class OpenVino(Rival):
    """OpenVINO's CPU plugin, latency hint, the same number of threads as torch."""

    name = "OpenVINO"

    def __init__(self, precision: str) -> None:
        super().__init__(precision)
        families = (
            {"linear", "conv", "pool", "network"} if precision != "int8" else {"gemm", "linear", "conv", "network"}
        )
        self.families = frozenset(families)

    def prepare(self, case: Case) -> Run:
        openvino = require("openvino")
        core = openvino.Core()
        if self.precision == "int8" and case.quantized is not None and case.family != "linear":
            return self._runner(core, core.read_model(io.BytesIO(qdq_layer(case.quantized))), (case.quantized.x,))
        floats = require_floats(case)
        if self.precision == "bf16" and "BF16" not in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            raise Absent("OpenVINO computes in bf16 only on processors that have it")
        model = core.read_model(io.BytesIO(exported(floats, case.inputs)))
        if self.precision == "int8":
            model = quantized(model, case)
        return self._runner(core, model, case.inputs)

    def _runner(self, core: Any, model: Any, inputs: tuple[torch.Tensor, ...]) -> Run:
        import openvino

        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": "bf16" if self.precision == "bf16" else "f32",
        }
        request = core.compile_model(model, "CPU", settings).create_infer_request()
        arrays = [x.contiguous().numpy() for x in inputs]
        for i, array in enumerate(arrays):
            request.set_input_tensor(i, openvino.Tensor(array, shared_memory=True))

        def run(alive: Any = arrays) -> Any:  # the request shares the arrays' memory and does not own it
            request.infer()
            return request.get_output_tensor(0).data

        return run


def quantized(model: Any, case: Case) -> Any:
    """An OpenVINO model of the case in int8, by NNCF."""
    nncf = require("nncf")
    if case.family == "linear":  # int8 weights; the plugin quantizes activations as they come, as ours does
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return nncf.compress_weights(model, mode=nncf.CompressWeightsMode.INT8_SYM)
    logging.getLogger("nncf").setLevel(logging.ERROR)
    parts = calibration_parts(case)
    data = nncf.Dataset(parts, lambda part: part.numpy())
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        return nncf.quantize(model, data, subset_size=len(parts))
