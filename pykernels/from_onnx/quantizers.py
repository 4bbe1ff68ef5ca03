"""QuantizeLinear and DequantizeLinear as calls of ``torch.ops.quantized_decomposed``, as PT2E makes them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from pykernels.from_onnx import layers
from pykernels.from_onnx.table import Refused, operator

__all__ = ["dequantize", "quantize"]

_BYTES = {torch.uint8: (0, 255), torch.int8: (-128, 127)}


def quantize(
    x: Any,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
    saturate: int = 1,
    precision: int = 0,
) -> Any:
    """``clamp(rint(x / scale) + zero_point)``: a constant, or the function and the arguments of a call."""
    dtype = zero_point.dtype if zero_point is not None else output_dtype or torch.uint8
    scale, zeros = _checked(scale, zero_point, dtype, block_size)
    low, high = _BYTES[dtype]
    if isinstance(x, torch.Tensor):
        scales, shifts = (_along(value, x, axis) for value in (scale, zeros))
        return (torch.round(x / scales) + shifts).clamp(low, high).to(dtype)
    ops = torch.ops.quantized_decomposed
    if scale.numel() == 1:
        return ops.quantize_per_tensor.default, (x, scale.item(), int(zeros.item()), low, high, dtype)
    return ops.quantize_per_channel.default, (x, scale, zeros, axis, low, high, dtype)


def dequantize(
    x: Any,
    scale: torch.Tensor,
    zero_point: torch.Tensor | None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: torch.dtype | None = None,
) -> Any:
    """``(x - zero_point) * scale``. Constants of 8 bits stay what they are, under a call; others, as a bias of 32 bits,
    and what is no weight of a layer, are computed."""
    if isinstance(x, torch.Tensor) and (x.dtype not in _BYTES or x.dim() < 2):
        if block_size or scale.dtype is not torch.float32:
            raise Refused("blocks, or scales that are not float32")
        zero = torch.zeros_like(scale) if zero_point is None else zero_point.float()
        return (x.float() - _along(zero, x, axis)) * _along(scale, x, axis)
    dtype = x.dtype if isinstance(x, torch.Tensor) else torch.uint8 if zero_point is None else zero_point.dtype
    scale, zeros = _checked(scale, zero_point, dtype, block_size)
    if isinstance(x, torch.Tensor) and dtype is torch.uint8 and bool((zeros == 128).all()):
        x, dtype, zeros = (
            (x.to(torch.int16) - 128).to(torch.int8),
            torch.int8,
            torch.zeros_like(zeros),
        )  # as weights are
    low, high = _BYTES[dtype]
    ops = torch.ops.quantized_decomposed
    if scale.numel() == 1:
        return ops.dequantize_per_tensor.default, (x, scale.item(), int(zeros.item()), low, high, dtype)
    return ops.dequantize_per_channel.default, (x, scale, zeros, axis, low, high, dtype)


def _checked(
    scale: torch.Tensor, zero_point: torch.Tensor | None, dtype: torch.dtype, block_size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    if dtype not in _BYTES:
        raise Refused(f"{dtype}: only 8 bits are understood")
    if block_size or scale.dim() > 1 or scale.dtype is not torch.float32:
        raise Refused("blocks, or scales that are not float32")
    if not bool((scale > 0).all() and scale.isfinite().all()):
        raise Refused("a scale that is not positive and finite")
    zeros = torch.zeros(scale.shape) if zero_point is None else zero_point
    if zeros.numel() != scale.numel():
        raise Refused("scale and zero point of different sizes")
    return scale, zeros.to(torch.int64)


def _along(value: torch.Tensor, x: torch.Tensor, axis: int) -> torch.Tensor:
    """Numbers a channel as they spread over `x`; one number as it is."""
    if value.numel() == 1:
        return value.reshape(())
    if value.numel() != x.shape[axis]:
        raise Refused("not as many scales as channels")
    return value.reshape([-1 if d == axis % x.dim() else 1 for d in range(x.dim())])


# Of scales that are computed from data: integers as floats, whose sums are exact below 2^24.


@operator("DynamicQuantizeLinear", several=True)
def dynamic_quantize(x: torch.Tensor, *, outputs: int) -> tuple[torch.Tensor, ...]:
    """u8, and the scale and zero point that the least and the largest element make."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = torch.where(low == high, torch.ones_like(low), (high - low) / 255)
    zero = torch.round(-low / scale).clamp(0, 255)
    return (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8), scale, zero.to(torch.uint8)


def _centred(x: torch.Tensor, zero: torch.Tensor | None) -> torch.Tensor:
    return x.float() if zero is None else x.float() - zero.float()


@operator("MatMulInteger")
def matmul_integer(
    a: torch.Tensor, b: torch.Tensor, a_zero: torch.Tensor | None = None, b_zero: torch.Tensor | None = None
) -> torch.Tensor:
    if a_zero is not None and a_zero.dim() == 1 and a_zero.numel() != 1:
        a_zero = a_zero.unsqueeze(-1)  # one a row
    left, right = _centred(a, a_zero), _centred(b, b_zero)
    y = F.linear(left, right.t()) if right.dim() == 2 else torch.matmul(left, right)
    return y.to(torch.int32)


@operator("ConvInteger")
def conv_integer(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_zero: torch.Tensor | None = None,
    weight_zero: torch.Tensor | None = None,
    **how: Any,
) -> torch.Tensor:
    if weight_zero is not None and weight_zero.numel() != 1:
        weight_zero = weight_zero.reshape(-1, *[1] * (weight.dim() - 1))
    return layers.conv(_centred(x, x_zero), _centred(weight, weight_zero), **how).to(torch.int32)
