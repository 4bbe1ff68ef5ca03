"""pool: all on [N, C, H, W]."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pykernels.reference.quantize import requantize


def max_pool2d_with_indices(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """fp32 holds every bfloat16, float16 and byte, so the detour over it is exact."""
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
