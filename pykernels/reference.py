"""The oracle: every op in plain torch, written for clarity. Tests and benchmarks import it; nothing else does.

Integer results are exact: kernels agree with them bit for bit, except behind silu, sigmoid, gelu and tanh, where the
kernels' own exp and erf may differ from torch's by a rounding, so a quantized result by one.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

ACTIVATIONS = {
    "none": lambda x: x,
    "relu": torch.relu,
    "relu6": F.relu6,
    "hardsigmoid": lambda x: torch.clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0),
    "hardswish": lambda x: x * (torch.clamp(x + 3.0, 0.0, 6.0) * (1.0 / 6.0)),
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "tanh": torch.tanh,
}

_RANGE = {torch.uint8: (0.0, 255.0), torch.int8: (-128.0, 127.0)}


def requantize(f: torch.Tensor, scale: float | None, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    """fp32 `f` to `dtype`: a cast for floats, else clamp(rint(f * (1/scale)) + zero_point) in fp32, half to even.

    NaN becomes the zero point, infinities the ends of the range.
    """
    if dtype not in _RANGE:
        return f.to(dtype)
    assert scale is not None
    return _to_bytes(f, torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point), dtype)


def _to_bytes(f: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    low, high = _RANGE[dtype]
    rounded = torch.round(f.float() * (1.0 / scale)).nan_to_num(0.0, torch.inf, -torch.inf)
    return torch.clamp(rounded + zero_point.float(), low, high).to(dtype)


def _to_real(q: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor) -> torch.Tensor:
    return (q.to(torch.int32) - zero_point.to(torch.int32)).float() * scale


def dequantize(q: torch.Tensor, scale: float, zero_point: int) -> torch.Tensor:
    """(q - zero_point) * scale in fp32."""
    return _to_real(q, torch.tensor(scale, dtype=torch.float32), torch.tensor(zero_point))


# ---- quantize ----

_SMALLEST_NORMAL = torch.finfo(torch.float32).tiny


def quantize_per_tensor(x: torch.Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    return requantize(x.float(), scale, zero_point, dtype)


def dequantize_per_tensor(x: torch.Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    return dequantize(x, scale, zero_point).to(dtype)


def _along(x: torch.Tensor, channels: torch.Tensor, axis: int) -> torch.Tensor:
    """`channels`, one a channel of `x`, shaped to broadcast along `axis`."""
    shape = [1] * x.dim()
    shape[axis] = -1
    return channels.reshape(shape)


def quantize_per_channel(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, dtype: torch.dtype
) -> torch.Tensor:
    return _to_bytes(x, _along(x, scale.float(), axis), _along(x, zero_point, axis), dtype)


def dequantize_per_channel(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, dtype: torch.dtype
) -> torch.Tensor:
    return _to_real(x, _along(x, scale.float(), axis), _along(x, zero_point, axis)).to(dtype)


def quantize_per_token(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Affine over min and max with 0 for uint8, symmetric for int8; NaNs are left out of the range."""
    values = F.pad(torch.where(x.isnan(), 0.0, x.float()), (0, 1))  # the 0 that the range includes
    low, high = values.amin(-1, keepdim=True), values.amax(-1, keepdim=True)
    scale = (high - low) / 255.0 if dtype == torch.uint8 else torch.maximum(-low, high) / 127.0
    tiny = scale < _SMALLEST_NORMAL
    scale = torch.where(tiny, 1.0, scale)
    if dtype == torch.uint8:
        zero_point = torch.round(torch.where(tiny, 0.0, -low) / scale).nan_to_num(0.0).clamp(0.0, 255.0).to(torch.int32)
    else:
        zero_point = torch.zeros_like(scale, dtype=torch.int32)
    return _to_bytes(x, scale, zero_point, dtype), scale, zero_point


def dequantize_per_token(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    return _to_real(x, scale, zero_point).to(dtype)


def quantize_per_block(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 over blocks of the flattened `x`; the last block may be short."""
    flat = x.reshape(-1)
    blocks = -(-flat.numel() // block_size)
    padded = F.pad(flat, (0, blocks * block_size - flat.numel())).reshape(blocks, block_size)
    q, scale, _ = quantize_per_token(padded, torch.int8)
    return q.reshape(-1)[: flat.numel()].reshape(x.shape), scale.reshape(-1)


def dequantize_per_block(x: torch.Tensor, scale: torch.Tensor, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    flat = x.reshape(-1)
    return (flat.float() * scale.repeat_interleave(block_size)[: flat.numel()]).reshape(x.shape).to(dtype)


def qadd(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: float,
    a_zero_point: int,
    b_scale: float,
    b_zero_point: int,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
    activation: str = "none",
) -> torch.Tensor:
    f = dequantize(a, a_scale, a_zero_point) + dequantize(b, b_scale, b_zero_point)
    return requantize(ACTIVATIONS[activation](f), out_scale, out_zero_point, out_dtype)


def qmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: float,
    a_zero_point: int,
    b_scale: float,
    b_zero_point: int,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    f = dequantize(a, a_scale, a_zero_point) * dequantize(b, b_scale, b_zero_point)
    return requantize(f, out_scale, out_zero_point, out_dtype)


def qcat(
    xs: list[torch.Tensor],
    scales: list[float],
    zero_points: list[int],
    dim: int,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    reals = [dequantize(x, scale, zero_point) for x, scale, zero_point in zip(xs, scales, zero_points, strict=True)]
    return requantize(torch.cat(reals, dim), out_scale, out_zero_point, out_dtype)


def qlookup(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """`table` indexed by the bytes of `x`: an int8 -1 finds entry 255."""
    return table[x.reshape(-1).view(torch.uint8).long()].reshape(x.shape)


# ---- linear and conv: everything between the exact sums and the output is `_finish` ----


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
    """fp32 or bf16 with fp32 sums; `weight` [N, K] is not packed."""
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
    """fp32 or bf16 with fp32 sums; padding is (left, right, top, bottom)."""
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
    if r is not None and r.dtype in _RANGE:
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


# ---- pool: all on [N, C, H, W] ----


def max_pool2d_with_indices(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 holds every bfloat16 and every byte, so the detour over it is exact."""
    y, indices = F.max_pool2d(x.float(), kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
    return y.to(x.dtype), indices


def adaptive_max_pool2d_with_indices(x: torch.Tensor, output_size: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    y, indices = F.adaptive_max_pool2d(x.float(), list(output_size), return_indices=True)
    return y.to(x.dtype), indices


def avg_pool2d(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None = None,
) -> torch.Tensor:
    """In fp64, rounded once."""
    y = F.avg_pool2d(x.double(), kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return y.to(x.dtype)


def adaptive_avg_pool2d(x: torch.Tensor, output_size: list[int]) -> torch.Tensor:
    return F.adaptive_avg_pool2d(x.double(), (output_size[0], output_size[1])).to(x.dtype)


def _requantize_average(
    total: torch.Tensor,
    divisor: torch.Tensor,
    x_scale: float,
    out_scale: float | None,
    out_zero_point: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """`total`: the exact integer sums in fp64. float(total) * (x_scale / divisor) in fp32, then requantized."""
    f = total.float() * (torch.tensor(x_scale, dtype=torch.float32) / divisor.float())
    return requantize(f, out_scale, out_zero_point, out_dtype)


def qavg_pool2d(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
    x_scale: float,
    x_zero_point: int,
    out_scale: float | None,
    out_zero_point: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    """Padding counts as the real number 0."""
    real = x.double() - x_zero_point
    total = F.avg_pool2d(real, kernel_size, stride, padding, ceil_mode, divisor_override=1)
    ones = torch.ones_like(real[:1, :1])
    if divisor_override is not None:
        divisor = torch.tensor(divisor_override)
    elif count_include_pad:  # how many elements of the padded plane each window covers
        vertical, horizontal = padding
        ones = F.pad(ones, (horizontal, horizontal, vertical, vertical), value=1.0)
        divisor = F.avg_pool2d(ones, kernel_size, stride, 0, ceil_mode, divisor_override=1)
        divisor = divisor[..., : total.shape[2], : total.shape[3]]
    else:
        divisor = F.avg_pool2d(ones, kernel_size, stride, padding, ceil_mode, divisor_override=1)
    return _requantize_average(total, divisor, x_scale, out_scale, out_zero_point, out_dtype)


def qadaptive_avg_pool2d(
    x: torch.Tensor,
    output_size: list[int],
    x_scale: float,
    x_zero_point: int,
    out_scale: float | None,
    out_zero_point: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    def counts(size: int, outputs: int) -> torch.Tensor:
        o = torch.arange(outputs)
        return ((o + 1) * size + outputs - 1) // outputs - o * size // outputs

    divisor = counts(x.shape[2], output_size[0])[:, None] * counts(x.shape[3], output_size[1])
    mean = F.adaptive_avg_pool2d(x.double() - x_zero_point, (output_size[0], output_size[1]))
    return _requantize_average(torch.round(mean * divisor), divisor, x_scale, out_scale, out_zero_point, out_dtype)
