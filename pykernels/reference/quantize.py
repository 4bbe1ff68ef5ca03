"""quantize: between real numbers and bytes, and arithmetic on bytes."""

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
