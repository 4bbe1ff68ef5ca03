"""What is measured: a case is one piece of work, given to every rival in the form that it takes.

A case carries an fp32 `nn.Module` with its inputs, an int8 layer with bytes for input and weights
(`QuantizedLayer`), or both, and the oracle's answer: no time is reported for an entry whose answer is wrong.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pykernels import reference
from pykernels.bench import machine as machines

PRECISIONS = ("fp32", "bf16", "int8")


def pairs_saturate() -> bool:
    """Whether the u8 x s8 products of oneDNN, ONNX Runtime and others may saturate here: they sum pairs in 16 bits
    without VNNI.

    Ours sum exactly everywhere. So that the others' answers are right and can be timed, weights stay within 7 bits
    here.
    """
    return not any(runs and "vnni" in name for name, runs in machines.machine().isas.items())


@dataclass(frozen=True)
class QuantizedLayer:
    """An int8 convolution or linear: u8 activations (per tensor, affine), s8 weights (per output channel, symmetric).

    x: u8 [N, C, H, W] channels_last, or [M, K]. weight: s8 [O, C/groups, k, k], or [N, K]. weight_scale, bias: fp32
    [O]. out_scale None: fp32 out, else u8 out. activation "relu" is the only one besides "none": every rival fuses it.
    """

    x: torch.Tensor
    x_scale: float
    x_zero_point: int
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor
    out_scale: float | None
    out_zero_point: int
    stride: int = 1
    padding: int = 0
    groups: int = 1
    activation: str = "none"

    @property
    def is_conv(self) -> bool:
        return self.weight.dim() == 4

    @functools.cached_property
    def accumulator(self) -> torch.Tensor:
        """The exact integer sums, s32 (computed in fp64, which holds them all)."""
        x = self.x.double() - self.x_zero_point
        w = self.weight.double()
        if self.is_conv:
            return F.conv2d(x, w, stride=self.stride, padding=self.padding, groups=self.groups).to(torch.int32)
        return (x @ w.t()).to(torch.int32)

    @functools.cached_property
    def real(self) -> torch.Tensor:
        """The layer's answer before requantization, fp32."""
        shape = (1, -1, 1, 1) if self.is_conv else (1, -1)
        scale = (torch.tensor(self.x_scale, dtype=torch.float32) * self.weight_scale).view(shape)
        return reference.ACTIVATIONS[self.activation](self.accumulator.float() * scale + self.bias.view(shape))

    @functools.cached_property
    def expected(self) -> torch.Tensor:
        """The oracle's answer: u8 of `real`, or `real` itself."""
        if self.out_scale is None:
            return self.real
        return reference.requantize(self.real, self.out_scale, self.out_zero_point, torch.uint8)


def qdq_ops() -> Any:
    """torch.ops.quantized_decomposed with its operators declared (torch declares them when this module is imported)."""
    importlib.import_module("torch.ao.quantization.fx._decomposed")
    return torch.ops.quantized_decomposed


class QDQLayer(nn.Module):
    """A `QuantizedLayer` in the form PT2E gives it: dequantize, the fp32 layer, quantize. u8 (u8|fp32) in, u8 or
    fp32 out."""

    weight: torch.Tensor
    weight_scale: torch.Tensor
    weight_zero_point: torch.Tensor
    bias: torch.Tensor

    def __init__(self, layer: QuantizedLayer) -> None:
        super().__init__()
        self.layer = layer
        self.ops = qdq_ops()
        self.register_buffer("weight", layer.weight)
        self.register_buffer("weight_scale", layer.weight_scale)
        self.register_buffer("weight_zero_point", torch.zeros_like(layer.weight_scale, dtype=torch.int64))
        self.register_buffer("bias", layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, layer = self.ops, self.layer
        x = q.dequantize_per_tensor(x, layer.x_scale, layer.x_zero_point, 0, 255, torch.uint8)
        w = q.dequantize_per_channel(self.weight, self.weight_scale, self.weight_zero_point, 0, -128, 127, torch.int8)
        if layer.is_conv:
            y = F.conv2d(x, w, self.bias, layer.stride, layer.padding, 1, layer.groups)
        else:
            y = F.linear(x, w, self.bias)
        if layer.activation == "relu":
            y = F.relu(y)
        if layer.out_scale is None:
            return y
        return q.quantize_per_tensor(y, layer.out_scale, layer.out_zero_point, 0, 255, torch.uint8)


@dataclass(frozen=True)
class Case:
    """One piece of work.

    family: gemm, linear, conv, pool, quantize, codec, sparse or network. group: where the shape comes from ("resnet50",
    "bert_base"). name: the shape, for people. work: operations, a multiply and an add being two (0 where bytes are the
    limit). traffic: for each precision the bytes that must move at least once (inputs, weights, outputs).
    model, inputs: fp32, in evaluation mode; 4-D inputs are channels_last. quantized: the int8 form of a layer.
    calibration: batches like `inputs` for whole networks. parameters: what a family's rivals need beside (see
    families.py). tolerance: the relative error ‖y - oracle‖ / ‖oracle‖ that each precision may have. precisions:
    those that the case exists in.
    """

    family: str
    group: str
    name: str
    work: float
    traffic: dict[str, float]
    model: nn.Module | None = None
    inputs: tuple[torch.Tensor, ...] = ()
    quantized: QuantizedLayer | None = None
    calibration: Sequence[torch.Tensor] = ()
    parameters: dict[str, Any] = field(default_factory=dict)
    tolerance: dict[str, float] = field(default_factory=lambda: {"fp32": 1e-4, "bf16": 3e-2, "int8": 5e-2})
    precisions: tuple[str, ...] = PRECISIONS

    @property
    def label(self) -> str:
        return f"{self.group} {self.name}"

    @functools.cached_property
    def oracle(self) -> torch.Tensor:
        """The right answer in fp32: eager's, or of a case without a model the quantized layer's."""
        if self.model is None:
            assert self.quantized is not None
            return self.quantized.expected
        with torch.inference_mode():
            return self.model(*self.inputs).float()

    def error(self, precision: str, output: torch.Tensor) -> float:
        """How far `output` is from the oracle: ‖output - oracle‖ / ‖oracle‖, or the quanta between two u8 tensors.

        s32 sums are compared exactly with the quantized layer's: 0.0 or infinity.
        """
        if output.dtype == torch.int32 and self.quantized is not None:
            return 0.0 if torch.equal(output.cpu(), self.quantized.accumulator) else float("inf")
        if output.dtype == torch.uint8:
            expected = self.quantized.expected if self.quantized is not None else self.oracle
            if output.shape != expected.shape:
                return float("inf")
            return float((output.int() - expected.int()).abs().max())
        oracle = self.quantized.expected if precision == "int8" and self.quantized is not None else self.oracle
        if output.shape != oracle.shape:
            return float("inf")
        difference, norm = (output.double() - oracle.double()).norm(), oracle.double().norm()
        error = float(difference / norm) if norm > 0 else float(difference)
        return error if error == error else float("inf")

    def allowed(self, precision: str, output: torch.Tensor) -> float:
        """The error that still counts as right: one quantum between u8 tensors, else the precision's tolerance."""
        return 1.0 if output.dtype == torch.uint8 else self.tolerance[precision]
