"""Depthwise int8 convolution: C groups of one channel each. Weights lie as [taps][C], C contiguous as in x.

out[p, c] = epilogue(sum over taps of x[p at tap, c] * w[tap, c]), on channels_last memory. A program takes a tile of
pixels times channels; a thread loads 16 channels at a time and multiplies them in s32. Padding holds the zero point.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.triton import tiles
from pykernels.triton.arguments import as_bits, ceil_div
from pykernels.triton.conv_shape import ConvShape, pixels_of
from pykernels.triton.epilogue import OPTIONS, finish_sums
from pykernels.triton.gemm import NUMBERS, Epilogue
from pykernels.triton.pack import Packed

__all__ = ["depthwise"]

SIZES = ["H", "W", "OH", "OW", "KH", "SH", "SW", "DH", "DW", "TOP", "LEFT"]


@triton.jit(do_not_specialize=[*NUMBERS, *SIZES])
def _depthwise(
    x, w, out, residual, sums, scales, biases, row_scale, row_zero_point, M, C, ROW, H, W, OH, OW, KH, SH, SW,
    DH, DW, TOP, LEFT, x_scale, x_zero_point, residual_scale, residual_zero_point, inverse, zero_point,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, AFTER: tl.constexpr, OUT: tl.constexpr,
    KW: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """M = N * OH * OW pixels; ROW channels from one tap's weights to the next's."""
    tiles_c = tl.cdiv(C, BC)
    m = tl.program_id(0) // tiles_c * BM + tl.arange(0, BM)
    c = tl.program_id(0) % tiles_c * BC + tl.arange(0, BC)
    line = m // OW
    iy = line % OH * SH - TOP
    ix = m % OW * SW - LEFT
    base = x + ((line // OH).to(tl.int64) * H * W + iy * W + ix)[:, None] * C + c[None, :]
    acc = tl.zeros((BM, BC), tl.int32)
    fill = tl.cast(x_zero_point, x.dtype.element_ty)
    for i in range(KH):
        y = iy + i * DH
        there = (y >= 0) & (y < H) & (m < M)
        for j in tl.static_range(KW):
            z = ix + j * DW
            mask = (there & (z >= 0) & (z < W))[:, None] & (c < C)[None, :]
            value = tl.load(base + j * DW * C, mask=mask, other=fill).to(tl.int32)
            # Each thread loads what it multiplies with: shared by way of shared memory, it would cost a barrier a tap.
            weight = tl.broadcast_to((w + j * ROW + c)[None, :], (BM, BC))
            weight = tl.load(weight, mask=(c < ROW)[None, :], other=0).to(tl.int32)
            acc += value * weight
        base += DH * W * C
        w += KW * ROW
    place = m.to(tl.int64)[:, None] * C + c[None, :]
    finish_sums(
        acc, m, c, m < M, c < C, place, out, residual, sums, scales, biases, row_scale, row_zero_point, x_scale,
        x_zero_point, residual_scale, residual_zero_point, inverse, zero_point, ACTIVATION, RESIDUAL, AFTER, OUT,
    )  # fmt: skip


def tile_of(c: int) -> dict[str, int]:
    """2048 results a program, 16 a thread: as many channels as there are, up to 128."""
    bc = min(128, max(16, triton.next_power_of_2(c)))
    return {"BM": 2048 // bc, "BC": bc}


def depthwise(x: torch.Tensor, weights: Packed, s: ConvShape, out: torch.Tensor, epilogue: Epilogue) -> None:
    """out, channels_last, of x [N, C, H, W], uint8 or int8."""
    pixels = pixels_of(x)
    m, tile = s.n * s.oh * s.ow, tile_of(s.c)
    if m == 0:
        return
    (left, _, top, _), arguments = s.padding, epilogue.arguments(out, False)
    grid = (ceil_div(m, tile["BM"]) * ceil_div(s.c, tile["BC"]),)
    (kh, kw), (sh, sw), (dh, dw) = s.kernel, s.stride, s.dilation
    with tiles.on(x.device):
        _depthwise[grid](
            pixels, weights.weight, as_bits(out), M=m, C=s.c, ROW=weights.layout.row, H=s.h, W=s.w, OH=s.oh, OW=s.ow,
            KH=kh, KW=kw, SH=sh, SW=sw, DH=dh, DW=dw, TOP=top, LEFT=left, **arguments, **tile, num_warps=4,
            **OPTIONS,
        )  # fmt: skip
