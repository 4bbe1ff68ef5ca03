"""Linear layers on packed weights."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pykernels.nn._chain import Chain, Head
from pykernels.nn._quantize import quantize_weight


class Linear(Head, nn.Linear):
    """`torch.nn.Linear` that runs `torch.ops.pykernels.linear` on packed weights in evaluation.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        precision: ``"fp32"`` computes in the dtype of the weights; ``"bf16"`` and ``"fp16"`` round input and weights
            to bfloat16 or float16, sum in fp32 and return the input's dtype.

    Shape: x [..., in_features] float32, bfloat16 or float16 -> [..., out_features] of the same dtype.
    """

    original = nn.Linear
    ranks = tuple(range(1, 9))

    def __init__(self, in_features: int, out_features: int, bias: bool = True, precision: str = "fp32", **kwargs: Any):
        super().__init__(in_features, out_features, bias, **kwargs)
        self.join(Chain(self), precision)

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Weights as `linear_pack` lays them out, uint8."""
        return torch.ops.pykernels.linear_pack(self.stored(weight), bias)

    def run(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """The layer and its activation."""
        y = torch.ops.pykernels.linear(self.stored(x), packed, self.out_features, self.activation_name)
        return y if y.dtype == x.dtype else y.to(x.dtype)

    def plain(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`F.linear`."""
        return F.linear(x, weight, bias)


class Int8Linear(Linear):
    """`torch.nn.Linear` in int8 in evaluation: s8 weights, symmetric per output channel, and u8 input.

    Without `x_scale` each row (token) of the input gets its own scale and zero point, which needs no calibration; with
    it the whole tensor has this scale and zero point (u8). Parameters stay float; training is torch's own.

    Args:
        in_features, out_features, bias, device, dtype: as `torch.nn.Linear`.
        x_scale, x_zero_point: static parameters of the input, or None for dynamic ones.

    Shape: x [..., in_features] float32, bfloat16 or float16 -> [..., out_features] of the same dtype.
    """

    precisions = ("int8",)
    x_scale: float | None = None
    x_zero_point: int = 0

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        x_scale: float | None = None,
        x_zero_point: int = 0,
        **kwargs: Any,
    ):
        self.x_scale, self.x_zero_point = x_scale, x_zero_point
        super().__init__(in_features, out_features, bias, precision="int8", **kwargs)

    def pack(self, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Weights as `int8_linear_pack` lays them out, uint8."""
        return torch.ops.pykernels.int8_linear_pack(*quantize_weight(weight), None if bias is None else bias.float())

    def run(self, x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        """The layer and its activation."""
        return torch.ops.pykernels.int8_linear(
            x, packed, self.out_features, self.x_scale, self.x_zero_point, activation=self.activation_name
        )
