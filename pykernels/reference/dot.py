"""linear and conv: everything between the exact sums and the output is `_finish`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pykernels.reference.quantize import (
    ACTIVATIONS,
    dequantize,
    quantize_per_tensor,
    quantize_per_token,
    requantize,
)


def _finish(
    f: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    residual: torch.Tensor | None,
    residual_order: str,
) -> torch.Tensor:
    """Bias (shaped to broadcast), residual and activation in fp32, in the kernels' order."""
    if bias is not None:
        f = f + bias
    if residual is not None and residual_order == "before":
        f = f + residual
    f = ACTIVATIONS[activation](f)
    if residual is not None and residual_order == "after":
        f = f + residual
    return f


def int8_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return (a.double() @ b.double()).to(torch.int32)  # exact: sums stay below 2^53


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_order: str = "before",
) -> torch.Tensor:
    """fp32, bf16 or fp16 with fp32 sums; `weight` [N, K] is not packed."""
    y = x.float() @ weight.float().t()
    return _finish(y, bias, activation, None if residual is None else residual.float(), residual_order).to(x.dtype)


def int8_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: float | None = None,
    x_zero_point: int = 0,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out_dtype: torch.dtype | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """`weight` [N, K] int8 is not packed. A float x is quantized first: per token without x_scale, else per tensor."""
    dtype = out_dtype or (x.dtype if x.dtype.is_floating_point else torch.float32)
    scale: torch.Tensor
    zero_point: torch.Tensor
    if x.dtype.is_floating_point and x_scale is None:
        x, scale, zero_point = quantize_per_token(x, torch.uint8)
    else:
        assert x_scale is not None
        scale, zero_point = torch.tensor(x_scale, dtype=torch.float32), torch.tensor(x_zero_point)
        if x.dtype.is_floating_point:
            x = quantize_per_tensor(x, x_scale, x_zero_point, torch.uint8)
    acc = ((x.double() - zero_point.double()) @ weight.double().t()).to(torch.int32)
    f = _finish(acc.float() * (scale * weight_scale), bias, activation, None, "before")
    return requantize(f, out_scale, out_zero_point, dtype)


def conv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_order: str = "before",
) -> torch.Tensor:
    """fp32, bf16 or fp16 with fp32 sums; padding is (left, right, top, bottom)."""
    y = F.conv2d(F.pad(x.float(), padding), weight.float(), None, stride, 0, dilation, groups)
    b = None if bias is None else bias.view(1, -1, 1, 1)
    return _finish(y, b, activation, None if residual is None else residual.float(), residual_order).to(x.dtype)


def qconv2d(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    x_scale: float,
    x_zero_point: int,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out_dtype: torch.dtype = torch.uint8,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    residual_order: str = "before",
) -> torch.Tensor:
    real = F.pad(x.double() - x_zero_point, padding)
    acc = F.conv2d(real, weight.double(), None, stride, 0, dilation, groups).to(torch.int32)
    scale = (torch.tensor(x_scale, dtype=torch.float32) * weight_scale).view(1, -1, 1, 1)
    r = residual
    if r is not None and not r.is_floating_point():
        r = dequantize(r, residual_scale, residual_zero_point)
    b = None if bias is None else bias.view(1, -1, 1, 1)
    f = _finish(acc.float() * scale, b, activation, None if r is None else r.float(), residual_order)
    return requantize(f, out_scale, out_zero_point, out_dtype)


def conv_bn_act(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
    activation: str = "relu",
    residual: torch.Tensor | None = None,
    residual_order: str = "before",
) -> torch.Tensor:
    y = F.conv2d(F.pad(x.float(), padding), weight.float(), bias, stride, 0, dilation, groups)
    y = F.batch_norm(y, running_mean, running_var, gamma, beta, eps=eps)
    return _finish(y, None, activation, None if residual is None else residual.float(), residual_order).to(x.dtype)
