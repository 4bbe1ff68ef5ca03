"""linear and conv: everything between the exact sums and the output is `_finish`, for sums of bytes `finish_sums`."""

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


def fma(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """a * b + c of fp32 tensors, rounded once.

    The product is exact in float64. So would be the sum, but for its last bit: where it was rounded, an odd one stands
    for what is lost, and the rounding to fp32 comes out as that of the exact sum (Boldo and Melquiond, "Emulation of
    FMA and correctly rounded sums: proved algorithms using rounding to odd").
    """
    product, addend = torch.broadcast_tensors(a.double() * b.double(), c.double())
    total = product + addend
    part = total - product
    lost = (product - (total - part)) + (addend - part)  # Knuth's two-sum
    even = (total.contiguous().view(torch.int64) & 1) == 0
    nudged = torch.nextafter(total, torch.where(lost > 0, torch.inf, -torch.inf).to(total.dtype))
    return torch.where((lost != 0) & even & total.isfinite(), nudged, total).float()


_MOST = torch.finfo(torch.float32).max
_BYTES = (torch.uint8, torch.int8)


def finish_sums(
    acc: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    x_scale: torch.Tensor,
    activation: str,
    out_scale: float | None,
    out_zero_point: int,
    dtype: torch.dtype,
    residual: torch.Tensor | None = None,
    residual_scale: float = 1.0,
    residual_zero_point: int = 0,
    residual_order: str = "before",
) -> torch.Tensor:
    """What s32 sums of (x - x_zero_point) * w come to; per-channel tensors and x_scale are shaped to broadcast.

    With f = acc * (x_scale * weight_scale) + bias, from which the rest follows as for floats, where a row has its own
    scale, the activation is curved, the residual is added after it or is no 8-bit one, or the output none. Otherwise
    all that is linear is folded into one multiplication and addition, of unsigned bytes: those of int8 are 128 more.
    """
    scale = x_scale * weight_scale
    linear = activation in ("none", "relu", "relu6") and dtype in _BYTES and x_scale.dim() == 0
    if not linear or (residual is not None and (residual.dtype not in _BYTES or residual_order == "after")):
        if residual is not None:
            quantized = residual.dtype in _BYTES
            residual = dequantize(residual, residual_scale, residual_zero_point) if quantized else residual.float()
        f = fma(acc.float(), scale, torch.zeros(()) if bias is None else bias)
        return requantize(_finish(f, None, activation, residual, residual_order), out_scale, out_zero_point, dtype)
    assert out_scale is not None
    inverse = 1.0 / torch.tensor(out_scale, dtype=torch.float32)
    shift = 128 if dtype is torch.int8 else 0
    zero_point = torch.tensor(float(out_zero_point + shift))
    offset = zero_point
    if residual is not None:
        residual_shift = 128 if residual.dtype is torch.int8 else 0
        factor = (torch.tensor(residual_scale, dtype=torch.float32) * inverse).clamp(max=_MOST)
        offset = zero_point - float(residual_zero_point + residual_shift) * factor
    multiplier = (scale * inverse).clamp(max=_MOST)
    addend = (torch.zeros(()) if bias is None else bias * inverse) + offset
    multiplier, addend = torch.where(addend.isnan(), 0.0, multiplier), torch.where(addend.isnan(), zero_point, addend)
    t = fma(acc.float(), multiplier, addend)
    if residual is not None:
        t = fma((residual.int() + residual_shift).float(), factor, t)
    low = 0.0 if activation == "none" else float(zero_point)
    high = float((torch.round(6.0 * inverse) + zero_point).clamp(max=255.0)) if activation == "relu6" else 255.0
    return (t.clamp(low, high).round().int() - shift).to(dtype)


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
    return finish_sums(acc, weight_scale, bias, scale, activation, out_scale, out_zero_point, dtype)


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
    scale, b = weight_scale.view(1, -1, 1, 1), None if bias is None else bias.view(1, -1, 1, 1)
    return finish_sums(
        acc, scale, b, torch.tensor(x_scale, dtype=torch.float32), activation, out_scale, out_zero_point, out_dtype,
        residual, residual_scale, residual_zero_point, residual_order,
    )  # fmt: skip


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
