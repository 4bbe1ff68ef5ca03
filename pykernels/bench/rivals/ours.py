"""Ours: the ops with packed weights for layers, `pykernels.optimize` for whole networks."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

import pykernels
from pykernels.bench.case import Case
from pykernels.bench.rivals.base import Absent, Rival, Run
from pykernels.bench.rivals.torch_rivals import module_of
from pykernels.nn._quantize import quantize_weight
from pykernels.nn.follow import ACTIVATIONS
from pykernels.ops import _load


class Ours(Rival):
    """Our ops. Weights are packed once, in `prepare`; a call is one op."""

    name = "pykernels"
    ours = True
    families = frozenset({"gemm", "linear", "conv", "pool", "quantize", "codec", "sparse", "network"})

    def prepare(self, case: Case) -> Run:
        if _load.CPU_ERROR is not None:
            raise Absent(_load.CPU_ERROR)
        make = getattr(self, f"_{case.family}")
        with torch.inference_mode():
            run: Run = make(case)

        def guarded() -> Any:
            with torch.inference_mode():
                return run()

        return guarded

    def _gemm(self, case: Case) -> Run:
        ops, layer = torch.ops.pykernels, case.quantized
        assert layer is not None
        packed = ops.int8_linear_pack(layer.weight, layer.weight_scale, layer.bias)
        features, x, scale, zero = layer.weight.shape[0], layer.x, layer.x_scale, layer.x_zero_point
        return lambda: ops.int8_linear(x, packed, features, scale, zero)

    def _linear(self, case: Case) -> Run:
        ops = torch.ops.pykernels
        model, (x,) = module_of(case, "fp32" if self.precision == "int8" else self.precision)
        linear, activation = _linear_of(model)
        features = linear.out_features
        if self.precision == "int8":
            packed = ops.int8_linear_pack(*quantize_weight(linear.weight), linear.bias)
            return lambda: ops.int8_linear(x, packed, features, activation=activation)
        packed = ops.linear_pack(linear.weight, linear.bias)
        return lambda: ops.linear(x, packed, features, activation)

    def _conv(self, case: Case) -> Run:
        ops = torch.ops.pykernels
        if self.precision == "int8":
            layer = case.quantized
            if layer is None:
                raise Absent("the case has no int8 form")
            packed = ops.qconv2d_pack(layer.weight, layer.weight_scale, layer.bias, layer.groups)
            channels, kernel = layer.weight.shape[0], list(layer.weight.shape[2:])
            geometry = (kernel, [layer.stride] * 2, [layer.padding] * 4, [1, 1], layer.groups)
            rest = (
                layer.x_scale,
                layer.x_zero_point,
                layer.out_scale,
                layer.out_zero_point,
                torch.uint8,
                layer.activation,
            )
            x = layer.x
            return lambda: ops.qconv2d(x, packed, channels, *geometry, *rest)
        model, (x,) = module_of(case, self.precision)
        conv = next(m for m in model.modules() if isinstance(m, nn.Conv2d))
        left = [int(conv.padding[1])] * 2 + [int(conv.padding[0])] * 2
        packed = ops.conv2d_pack(conv.weight, conv.bias, conv.groups)
        geometry = (list(conv.kernel_size), list(conv.stride), left, list(conv.dilation), conv.groups)
        channels = conv.out_channels
        activation = _activation_of(model)
        return lambda: ops.conv2d(x, packed, channels, *geometry, activation)

    def _pool(self, case: Case) -> Run:
        ops, p = torch.ops.pykernels, case.parameters
        _, (x,) = module_of(case, self.precision)
        kernel, stride, padding = ([int(str(p[key]))] * 2 for key in ("kernel", "stride", "padding"))
        if p["kind"] == "max":
            return lambda: ops.max_pool2d(x, kernel, stride, padding, [1, 1], False)
        if self.precision == "int8":
            affine = (p["scale"], p["zero_point"], p["scale"], p["zero_point"], torch.uint8)
            if p["kind"] == "avg":
                return lambda: ops.qavg_pool2d(x, kernel, stride, padding, False, True, None, *affine)
            return lambda: ops.qadaptive_avg_pool2d(x, [1, 1], *affine)
        if p["kind"] == "avg":
            return lambda: ops.avg_pool2d(x, kernel, stride, padding, False, True, None)
        return lambda: ops.adaptive_avg_pool2d(x, [1, 1])

    def _quantize(self, case: Case) -> Run:
        ops, p, inputs = torch.ops.pykernels, case.parameters, case.inputs
        scale, zero = p["scale"], p["zero_point"]
        if p["kind"] == "quantize":
            return lambda: ops.quantize_per_tensor(inputs[0], scale, zero, torch.uint8)
        if p["kind"] == "dequantize":
            return lambda: ops.dequantize_per_tensor(inputs[0], scale, zero, torch.float32)
        return lambda: ops.qadd(*inputs, scale, zero, scale, zero, p["out_scale"], zero, torch.uint8, "relu")

    def _codec(self, case: Case) -> Run:
        ops, p = torch.ops.pykernels, case.parameters
        data, rest = case.inputs[0], (p["segments"], p["codec"], p["block"])
        out, payload = torch.empty(p["elements"]), torch.zeros(p["bytes"], dtype=torch.uint8)
        residual = torch.zeros(p["elements"])
        calls: dict[str, Run] = {
            "encode": lambda: (ops.compress_encode(data, residual, payload, *rest), payload)[1],
            "decode": lambda: (ops.compress_decode(data, out, *rest), out)[1],
            "reduce": lambda: (ops.compress_reduce(data, residual, payload, *rest, 0.25), payload)[1],
        }
        return calls[p["kind"]]

    def _sparse(self, case: Case) -> Run:
        encode, x, k = torch.ops.pykernels.sparse_encode, case.inputs[0], case.parameters["k"]
        residual, payload = torch.zeros_like(x), torch.zeros(8 * k, dtype=torch.uint8)
        segments = torch.tensor([[0, x.numel(), 0]])
        return lambda: (encode(x, residual, None, payload, segments, k), payload)[1]

    def meaning(self, case: Case, output: Any) -> Any:
        if case.family == "sparse":
            return output[4 * case.parameters["k"] :].view(torch.float32).abs().sort(descending=True).values
        coded = case.family == "codec" and case.parameters["kind"] != "decode"
        return case.parameters["decode"](output) if coded else output

    def _network(self, case: Case) -> Run:
        optimize = getattr(pykernels, "optimize", None)
        if optimize is None:
            raise Absent("this build of pykernels has no optimize")
        calibration = list(case.calibration) if self.precision == "int8" else None
        with torch.inference_mode(False), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fast = optimize(case.model, case.inputs, precision=self.precision, calibration=calibration)
        inputs = case.inputs
        return lambda: fast(*inputs)


class OursSums(Rival):
    """`int8_mm`: s8/u8 x s8 -> s32 on a plain, unpacked weight, as `torch._int_mm` takes it."""

    name = "pykernels int8_mm"
    ours = True
    families = frozenset({"gemm"})

    def __init__(self) -> None:
        super().__init__("int8")

    def prepare(self, case: Case) -> Run:
        if _load.CPU_ERROR is not None:
            raise Absent(_load.CPU_ERROR)
        layer = case.quantized
        assert layer is not None
        a, b = (layer.x.to(torch.int16) - 128).to(torch.int8), layer.weight.t()
        return lambda: torch.ops.pykernels.int8_mm(a, b)


def _linear_of(model: nn.Module) -> tuple[nn.Linear, str]:
    return next(m for m in model.modules() if isinstance(m, nn.Linear)), _activation_of(model)


def _activation_of(model: nn.Module) -> str:
    return next((ACTIVATIONS[type(m)].kernel_name for m in model.modules() if type(m) in ACTIVATIONS), "none")
