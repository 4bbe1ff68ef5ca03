"""Depthwise int8 convolution: C groups of one channel each. Weights lie as [KH][ceil(KW / 4)][C][4 of KW].

out[p, c] = epilogue(sum over taps of x[p at tap, c] * w[tap, c]), on channels_last memory. A program takes a tile of
pixels times channels; a thread loads 16 channels of a tap at a time, turns those of four taps around, so that a word
holds four taps of a channel, and multiplies words: dp4a, whose s32 sums are exact. Padding holds the zero point.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.cuda.triton import tiles
from pykernels.cuda.triton.arguments import as_bits, ceil_div
from pykernels.cuda.triton.conv_shape import ConvShape, pixels_of
from pykernels.cuda.triton.epilogue import OPTIONS, finish_sums
from pykernels.cuda.triton.gemm import NUMBERS, Epilogue
from pykernels.cuda.triton.pack import Packed

__all__ = ["depthwise"]

SIZES = ["H", "W", "OH", "OW", "KH", "SH", "SW", "DH", "DW", "TOP", "LEFT"]


# $0 to $3, of four channels: the sums $12 to $15 plus products of bytes, those of $4 to $7, a tap each, with those of
# $8 to $11, a channel each. u8 times s8; with s32 instead of u32 s8 times s8.
DP4A = """{
.reg .b32 a<4>, b<4>;
prmt.b32 a0, $4, $5, 0x5140;
prmt.b32 a1, $4, $5, 0x7362;
prmt.b32 a2, $6, $7, 0x5140;
prmt.b32 a3, $6, $7, 0x7362;
prmt.b32 b0, a0, a2, 0x5410;
prmt.b32 b1, a0, a2, 0x7632;
prmt.b32 b2, a1, a3, 0x5410;
prmt.b32 b3, a1, a3, 0x7632;
dp4a.u32.s32 $0, b0, $8, $12;
dp4a.u32.s32 $1, b1, $9, $13;
dp4a.u32.s32 $2, b2, $10, $14;
dp4a.u32.s32 $3, b3, $11, $15;
}"""
UNSIGNED = tl.constexpr(DP4A)
SIGNED = tl.constexpr(DP4A.replace("dp4a.u32", "dp4a.s32"))
CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 4 + ["r"] * 12))


@triton.jit
def _multiply(x, w, acc, DP4A: tl.constexpr):
    """acc + the products of four taps, bytes x[0] to x[3], and of the bytes of the words w."""
    if DP4A:
        ASM: tl.constexpr = UNSIGNED if x[0].dtype == tl.uint8 else SIGNED
        acc = tl.inline_asm_elementwise(ASM, CONSTRAINTS, [x[0], x[1], x[2], x[3], w, acc], tl.int32, True, 4)
    else:
        for i in tl.static_range(4):
            acc += x[i].to(tl.int32) * ((w << (24 - 8 * i)) >> 24)
    return acc


@triton.jit(do_not_specialize=[*NUMBERS, *SIZES])
def _depthwise(
    x, w, out, residual, sums, scales, biases, row_scale, row_zero_point, M, C, ROW, H, W, OH, OW, KH, SH, SW,
    DH, DW, TOP, LEFT, x_scale, x_zero_point, residual_scale, residual_zero_point, inverse, zero_point,
    ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, AFTER: tl.constexpr, OUT: tl.constexpr,
    KW: tl.constexpr, DP4A: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """M = N * OH * OW pixels; w: words of four taps, ROW from four taps to the next. Without DP4A in plain steps."""
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
        for quad in tl.static_range((KW + 3) // 4):
            taps = ()
            for j in tl.static_range(4 * quad, 4 * quad + 4):
                if j < KW:
                    z = ix + j * DW
                    mask = (there & (z >= 0) & (z < W))[:, None] & (c < C)[None, :]
                    taps += (tl.load(base + j * DW * C, mask=mask, other=fill),)
                else:
                    taps += (tl.zeros((BM, BC), x.dtype.element_ty),)
            # Each thread loads what it multiplies with: shared by way of shared memory, it would cost a barrier a tap.
            weight = tl.broadcast_to((w + c)[None, :], (BM, BC))
            weight = tl.load(weight, mask=(c < ROW)[None, :], other=0)
            acc = _multiply(taps, weight, acc, DP4A)
            w += ROW
        base += DH * W * C
    place = m.to(tl.int64)[:, None] * C + c[None, :]
    finish_sums(
        acc, m, c, m < M, c < C, place, out, residual, sums, scales, biases, row_scale, row_zero_point, x_scale,
        x_zero_point, residual_scale, residual_zero_point, inverse, zero_point, ACTIVATION, RESIDUAL, AFTER, OUT,
    )  # fmt: skip


COMPILED = isinstance(_depthwise, triton.JITFunction)  # Triton's interpreter knows no PTX


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
    words = weights.weight.view(torch.int32)
    with tiles.on(x.device):
        _depthwise[grid](
            pixels, words, as_bits(out), M=m, C=s.c, ROW=weights.layout.row // 4, H=s.h, W=s.w, OH=s.oh, OW=s.ow,
            KH=kh, KW=kw, DP4A=COMPILED, SH=sh, SW=sw, DH=dh, DW=dw, TOP=top, LEFT=left, **arguments,
            **tile, num_warps=4, **OPTIONS,
        )  # fmt: skip
