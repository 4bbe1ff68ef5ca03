"""The CUDA library's int8 GEMM and convolutions, where it is loaded and its table prefers them to Triton's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pykernels.cuda import tables

if TYPE_CHECKING:
    from pykernels.cuda.triton.conv_shape import ConvShape
    from pykernels.cuda.triton.gemm import Epilogue

__all__ = ["few_channels", "int8_conv", "int8_few_channels", "int8_gemm"]


def _aligned(*tensors: torch.Tensor | None) -> bool:
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def int8_gemm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, epilogue: Epilogue, arch: int) -> bool:
    """Do what `gemm.gemm` does, on a device of compute capability `arch` / 10; False where that is left to it."""
    e, r, w = epilogue, epilogue.residual, epilogue.weights
    if a.dtype != torch.uint8 or w is None or not a.is_contiguous() or not b.is_contiguous():
        return False
    dtype = None if r is None else r.dtype
    config = tables.int8_gemm(a.shape[0], b.shape[0], a.shape[1], out.dtype, dtype, divmod(arch, 10))
    if config is None or not _aligned(a, b, out, w.scales, w.sums, w.biases, e.row_scale, e.row_zero_point, r):
        return False
    torch.ops.pykernels._cuda_int8_gemm(
        a, b, out, w.scales, w.sums, w.biases, e.row_scale, e.row_zero_point, e.x_scale, e.x_zero_point, e.out_scale,
        e.out_zero_point, e.activation, r, e.residual_scale, e.residual_zero_point, "after" if e.after else "before",
        config,
    )  # fmt: skip
    return True


def _im2col(s: ConvShape, x_zero_point: int) -> bool:
    """Whether TMA can gather the pixels: beyond the border it knows only 0, and distances have 8 bits."""
    (kh, kw), (dh, dw) = s.kernel, s.dilation
    if s.groups != 1 or max(s.stride) > 8 or max(s.padding) > 127 or max((kh - 1) * dh, (kw - 1) * dw) > 127:
        return False
    return x_zero_point == 0 or not any(s.padding)


def int8_conv(x: torch.Tensor, s: ConvShape, out: torch.Tensor, epilogue: Epilogue, arch: int) -> bool:
    """The convolution of x, channels_last, and the epilogue; False where that is left to Triton."""
    e, r, w = epilogue, epilogue.residual, epilogue.weights
    if x.dtype != torch.uint8 or w is None or not _im2col(s, e.x_zero_point):
        return False
    dtype, taps = None if r is None else r.dtype, s.kernel[0] * s.kernel[1]
    config = tables.int8_conv(s.n * s.oh * s.ow, s.o, s.c, taps, out.dtype, dtype, divmod(arch, 10))
    if config is None or not _aligned(x, w.rows, out, w.scales, w.sums, w.biases, r):
        return False
    torch.ops.pykernels._cuda_int8_conv(
        x, w.rows, out, s.kernel, s.stride, s.padding, s.dilation, w.scales, w.sums, w.biases, e.x_scale,
        e.x_zero_point, e.out_scale, e.out_zero_point, e.activation, r, e.residual_scale, e.residual_zero_point,
        "after" if e.after else "before", config,
    )  # fmt: skip
    return True


def few_channels(s: ConvShape) -> bool:
    """Whether the library has a kernel for the few channels of this convolution: csrc/cuda/conv/few_channels.h."""
    bytes_of_image = s.h * s.w * s.c
    fits = s.groups == 1 and s.c <= 4 and s.dilation == (1, 1) and max(s.stride) <= 2 and max(s.padding) < 128
    return fits and bytes_of_image < 2**31 and s.n * bytes_of_image < 2**33 and s.n * s.oh * s.ow < 2**31


def int8_few_channels(x: torch.Tensor, s: ConvShape, out: torch.Tensor, epilogue: Epilogue, arch: int) -> bool:
    """The convolution of few channels of x, channels_last, and the epilogue; False where that is left to Triton."""
    e, r, w = epilogue, epilogue.residual, epilogue.weights
    if w is None or not few_channels(s):
        return False
    dtype = None if r is None else r.dtype
    config = tables.int8_few_channels(s.n * s.oh * s.ow, s.o, s.c, s.kernel, out.dtype, dtype, divmod(arch, 10))
    if config is None or not _aligned(x, w.rows, out, w.scales, w.sums, w.biases, r):
        return False
    torch.ops.pykernels._cuda_int8_few_channels(
        x, w.rows, out, s.kernel, s.stride, s.padding, w.scales, w.sums, w.biases, e.x_scale,
        e.x_zero_point, e.out_scale, e.out_zero_point, e.activation, r, e.residual_scale, e.residual_zero_point,
        "after" if e.after else "before", config,
    )  # fmt: skip
    return True
