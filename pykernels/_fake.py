"""Shape functions of the ops: what torch.compile and torch.export see instead of a kernel.

Each follows its op's section in csrc/schema.cpp. They must be right for contiguous and channels_last inputs and for
symbolic sizes, so they compute with sizes only and never read a packed tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from pykernels.ops import _load
from pykernels.ops.packed import packed_bytes

F = TypeVar("F", bound=Callable[..., object])


def fake(name: str) -> Callable[[F], F]:
    """Register the decorated shape function of the op `name`; without the library there is no op to register it for."""

    def register(function: F) -> F:
        if _load.CPU_ERROR is None:
            torch.library.register_fake(f"pykernels::{name}", function)
        return function

    return register


# ---- quantize: outputs keep the dense layout of their (first) input, as torch.empty_like does ----


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


def _per_row(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=dtype)


@fake("quantize_per_tensor")
@fake("dequantize_per_tensor")
def _(x: torch.Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    return _like(x, dtype)


@fake("quantize_per_channel")
@fake("dequantize_per_channel")
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, dtype: torch.dtype) -> torch.Tensor:
    return _like(x, dtype)


@fake("quantize_per_token")
def _(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _like(x, dtype), _per_row(x, torch.float32), _per_row(x, torch.int32)


@fake("dequantize_per_token")
def _(x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _like(x, dtype)


@fake("quantize_per_block")
def _(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(x, torch.int8), x.new_empty(((x.numel() + block_size - 1) // block_size,), dtype=torch.float32)


@fake("dequantize_per_block")
def _(x: torch.Tensor, scale: torch.Tensor, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    return _like(x, dtype)


@fake("qadd")
@fake("qmul")
def _(
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
    return _like(a, out_dtype)


@fake("qcat")
def _(
    xs: list[torch.Tensor],
    scales: list[float],
    zero_points: list[int],
    dim: int,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    first = xs[0]
    size = list(first.shape)
    size[dim] = sum(x.shape[dim] for x in xs)
    channels_last = (
        first.dim() == 4 and not first.is_contiguous() and first.is_contiguous(memory_format=torch.channels_last)
    )
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty(size, dtype=out_dtype, device=first.device, memory_format=layout)


@fake("qlookup")
def _(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return _like(x, table.dtype)


# ---- compress: results are written into arguments ----


@fake("compress_encode")
def _(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    payload: torch.Tensor,
    segments: torch.Tensor,
    codec: str,
    block: int,
    stochastic: bool = False,
    seed: int = 0,
) -> None:
    return None


@fake("compress_decode")
def _(
    payloads: torch.Tensor,
    out: torch.Tensor,
    segments: torch.Tensor,
    codec: str,
    block: int,
    factor: float = 1.0,
) -> None:
    return None


@fake("compress_reduce")
def _(
    payloads: torch.Tensor,
    residual: torch.Tensor | None,
    payload: torch.Tensor,
    segments: torch.Tensor,
    codec: str,
    block: int,
    factor: float,
    stochastic: bool = False,
    seed: int = 0,
) -> None:
    return None


@fake("sparse_encode")
def _(
    x: torch.Tensor,
    residual: torch.Tensor,
    velocity: torch.Tensor | None,
    payload: torch.Tensor,
    segments: torch.Tensor,
    k: int,
    threshold: float = 0.0,
    momentum: float = 0.0,
) -> None:
    return None


@fake("sparse_decode")
def _(payloads: torch.Tensor, out: torch.Tensor, k: int, factor: float = 1.0) -> None:
    return None


@fake("randomk_encode")
def _(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    values: torch.Tensor,
    segments: torch.Tensor,
    k: int,
    seed: int,
) -> None:
    return None


@fake("randomk_decode")
def _(values: torch.Tensor, out: torch.Tensor, segments: torch.Tensor, k: int, seed: int, factor: float = 1.0) -> None:
    return None


# ---- linear: leading dimensions are kept, the result is contiguous ----


def _rows(x: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], columns), dtype=dtype)


@fake("int8_mm")
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    torch._check(a.shape[-1] == b.shape[0], lambda: f"int8_mm: a has shape {a.shape}, b {b.shape}")
    return _rows(a, b.shape[1], torch.int32)


@fake("linear")
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_order: str = "before",
) -> torch.Tensor:
    return _rows(x, out_features, x.dtype)


@fake("int8_linear")
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    x_scale: float | None = None,
    x_zero_point: int = 0,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out_dtype: torch.dtype | None = None,
    activation: str = "none",
) -> torch.Tensor:
    return _rows(x, out_features, out_dtype or (x.dtype if x.dtype.is_floating_point else torch.float32))


# ---- conv: the result is channels_last whatever the input is ----


@fake("linear_pack")
def _(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return weight.new_empty((packed_bytes(weight),), dtype=torch.uint8)


@fake("int8_linear_pack")
def _(weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    return weight.new_empty((packed_bytes(weight),), dtype=torch.uint8)


@fake("conv2d_pack")
def _(weight: torch.Tensor, bias: torch.Tensor | None = None, groups: int = 1) -> torch.Tensor:
    return weight.new_empty((packed_bytes(weight, groups),), dtype=torch.uint8)


@fake("qconv2d_pack")
def _(
    weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None, groups: int = 1
) -> torch.Tensor:
    return weight.new_empty((packed_bytes(weight, groups),), dtype=torch.uint8)


def _convolved(
    x: torch.Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    dtype: torch.dtype,
) -> torch.Tensor:
    n, _, h, w = x.shape
    left, right, top, bottom = padding
    (kh, kw), (sh, sw), (dh, dw) = kernel_size, stride, dilation
    oh = (h + top + bottom - dh * (kh - 1) - 1) // sh + 1
    ow = (w + left + right - dw * (kw - 1) - 1) // sw + 1
    return torch.empty((n, out_channels, oh, ow), dtype=dtype, device=x.device, memory_format=torch.channels_last)


@fake("conv2d")
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_order: str = "before",
) -> torch.Tensor:
    return _convolved(x, out_channels, kernel_size, stride, padding, dilation, x.dtype)


@fake("qconv2d")
def _(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
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
    return _convolved(x, out_channels, kernel_size, stride, padding, dilation, out_dtype)


@fake("conv_bn_act")
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor,
    running_var: torch.Tensor,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: str = "relu",
    residual: torch.Tensor | None = None,
    residual_order: str = "before",
) -> torch.Tensor:
    return _convolved(x, weight.shape[0], weight.shape[2:], stride, padding, dilation, x.dtype)


# ---- pool: outputs keep the layout of their input ----


def _pooled(x: torch.Tensor, size: list[int], dtype: torch.dtype | None = None) -> torch.Tensor:
    # csrc/cpu/pool/op.cpp decides alike: contiguous wins where the strides of a tensor fit both layouts.
    channels_last = x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()
    return torch.empty(
        (x.shape[0], x.shape[1], size[0], size[1]),
        dtype=dtype or x.dtype,
        device=x.device,
        memory_format=torch.channels_last if channels_last else torch.contiguous_format,
    )


def _pool_size(size: int, kernel_size: int, stride: int, padding: int, dilation: int, ceil_mode: bool) -> int:
    """Outputs along one axis. With ceil_mode a window may overrun the end but not begin there: the minimum."""
    room = size + 2 * padding - dilation * (kernel_size - 1) - 1
    if ceil_mode:
        out = torch.sym_min((room + stride - 1) // stride + 1, (size + padding + stride - 1) // stride)
    else:
        out = room // stride + 1
    torch._check(out > 0, lambda: f"pykernels: kernel_size {kernel_size} does not fit x, of size {size}")
    return out


def _pool_sizes(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> list[int]:
    torch._check(x.dim() == 4, lambda: f"pykernels: x must have 4 dimensions, not shape {list(x.shape)}")
    return [_pool_size(x.shape[2 + d], kernel_size[d], stride[d], padding[d], dilation[d], ceil_mode) for d in (0, 1)]


@fake("max_pool2d")
def _(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> torch.Tensor:
    return _pooled(x, _pool_sizes(x, kernel_size, stride, padding, dilation, ceil_mode))


@fake("max_pool2d_with_indices")
def _(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    sizes = _pool_sizes(x, kernel_size, stride, padding, dilation, ceil_mode)
    return _pooled(x, sizes), _pooled(x, sizes, torch.int64)


@fake("adaptive_max_pool2d")
@fake("adaptive_avg_pool2d")
def _(x: torch.Tensor, output_size: list[int]) -> torch.Tensor:
    return _pooled(x, output_size)


@fake("adaptive_max_pool2d_with_indices")
def _(x: torch.Tensor, output_size: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return _pooled(x, output_size), _pooled(x, output_size, torch.int64)


@fake("avg_pool2d")
def _(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None = None,
) -> torch.Tensor:
    return _pooled(x, _pool_sizes(x, kernel_size, stride, padding, [1, 1], ceil_mode))


@fake("qavg_pool2d")
def _(
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
    return _pooled(x, _pool_sizes(x, kernel_size, stride, padding, [1, 1], ceil_mode), out_dtype)


@fake("qadaptive_avg_pool2d")
def _(
    x: torch.Tensor,
    output_size: list[int],
    x_scale: float,
    x_zero_point: int,
    out_scale: float | None,
    out_zero_point: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    return _pooled(x, output_size, out_dtype)
