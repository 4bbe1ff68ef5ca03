"""The int8 convolution of few input channels, such as a network's first: conv.py's implicit GEMM in another order.

A kernel row of a channels_last image is one run of KW * C bytes, where its columns are neighbours. So the depth is
[kernel row][run], each run filled up to RUN bytes, a power of two, with zero weights: a 7x7 kernel of 3 channels is 7
* 32 deep instead of 49 * 16, and the image is read in place. A thread reads 16 bytes of a run as 4-byte words, shifts
them to where they belong (pixels of 3 bytes begin anywhere), and writes the zero point over what is beyond the
border. Behind the run anything may stand.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.cuda.triton import tiles
from pykernels.cuda.triton.arguments import as_bits, ceil_div
from pykernels.cuda.triton.conv_shape import ConvShape, pixels_of
from pykernels.cuda.triton.gemm import GROUP, NUMBERS, Config, Epilogue, machine, place_tile, store_tile
from pykernels.cuda.triton.pack import Packed

__all__ = ["conv_few_channels", "few_config"]

SIZES = ["C", "H", "W", "OH", "OW", "KH", "KW", "SH", "SW", "DH", "TOP", "LEFT"]


@triton.jit
def _leading(n):
    """The word, uint32, whose first n bytes (none below 0, all from 4 on) are 0xFF and the others 0."""
    n = tl.minimum(tl.maximum(n, 0), 4).to(tl.uint64)
    return ((tl.full(n.shape, 1, tl.uint64) << (8 * n)) - 1).to(tl.uint32)


@triton.jit
def _between(low, high):
    """The word of which bytes [low, high) are 0xFF and the others 0."""
    return _leading(high) & (_leading(low) ^ 0xFFFFFFFF)


@triton.jit
def _bytes(w0, w1, w2, w3):
    """int8 [M, 16 * N] of words [M, N] that follow each other."""
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    halves = tl.join(words.to(tl.uint16), (words >> 16).to(tl.uint16))
    quarters = tl.join(halves.to(tl.uint8), (halves >> 8).to(tl.uint8))
    return tl.reshape(quarters, (w0.shape[0], 16 * w0.shape[1])).to(tl.int8, bitcast=True)


@triton.jit
def _next_word(words, before, shift, inside, keep, fill, FLIP: tl.constexpr):
    """(the word that begins `shift` bits into `before`, the one loaded behind it)"""
    after = tl.load(words, mask=inside, other=fill)
    word = (((after.to(tl.uint64) << 32) | before.to(tl.uint64)) >> shift).to(tl.uint32)
    word = fill ^ ((word ^ fill) & keep)
    if FLIP:
        word = word ^ 0x80808080
    return word, after


@triton.jit(do_not_specialize=[*NUMBERS, *SIZES])
def _conv_few(
    x, w, out, residual, sums, scales, biases, row_scale, row_zero_point, M, N, K, C, H, W, OH, OW, KH, KW, SH, SW, DH,
    TOP, LEFT, x_scale, x_zero_point, residual_scale, residual_zero_point, inverse, zero_point,
    FLIP: tl.constexpr, WORDS: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, AFTER: tl.constexpr,
    OUT: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, RUN: tl.constexpr,
):  # fmt: skip
    """x: [images][H][W][C], from a multiple of 4 bytes on; w: [N][K = KH * RUN]; M = images * OH * OW.

    WORDS: lines of the image are whole words, so that runs lie alike in all of them.
    """
    tiles_m = tl.cdiv(M, BM)
    tiles_n = tl.cdiv(N, BN)
    fill = ((x_zero_point + (128 if FLIP else 0)) & 0xFF).to(tl.uint32) * 0x01010101
    piece = tl.arange(0, BK // 16)  # of 16 bytes: [kernel rows of a tile][pieces of a run]
    ky = (piece // (RUN // 16))[None, :]
    place = (piece % (RUN // 16) * 16)[None, :]
    j = tl.arange(0, BK)
    for work in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
        tile_m, tile_n = place_tile(work, tiles_m, tiles_n, GROUP)
        m = tile_m * BM + tl.arange(0, BM)
        line = m // OW
        iy = (line % OH * SH - TOP)[:, None] + ky * DH
        ix = (m % OW * SW - LEFT)[:, None]
        # Of a piece: its first byte in x, and which of its bytes belong to columns of the image.
        begin = ((line // OH).to(tl.int64)[:, None] * H + iy) * W * C + (ix * C + place)
        low = tl.maximum(-ix, 0) * C - place
        high = tl.minimum(W - ix, KW) * C - place
        keep0 = _between(low, high)
        keep1 = _between(low - 4, high - 4)
        keep2 = _between(low - 8, high - 8)
        keep3 = _between(low - 12, high - 12)
        rows = w + tl.minimum(tile_n * BN + tl.arange(0, BN), N - 1).to(tl.int64)[None, :] * K
        acc = tl.zeros((BM, BN), tl.int32)
        for row in range(0, KH, BK // RUN):
            y = iy + row * DH
            there = (m < M)[:, None] & (ky + row < KH) & (y >= 0) & (y < H)
            at = begin + tl.cast(row * DH, tl.int64) * W * C
            skew = ((begin if WORDS else at) & 3).to(tl.int32)
            shift = (skew * 8).to(tl.uint64)
            # A word is read if it has a byte of the image's columns in it: whole words of x's memory, and nothing else.
            lo = tl.where(there, low + skew, 20)
            hi = high + skew
            words = x.to(tl.pointer_type(tl.uint32)) + (at >> 2)
            before = tl.load(words, mask=(lo < 4) & (hi > 0), other=fill)
            w0, before = _next_word(words + 1, before, shift, (lo < 8) & (hi > 4), keep0, fill, FLIP)
            w1, before = _next_word(words + 2, before, shift, (lo < 12) & (hi > 8), keep1, fill, FLIP)
            w2, before = _next_word(words + 3, before, shift, (lo < 16) & (hi > 12), keep2, fill, FLIP)
            w3, before = _next_word(words + 4, before, shift, (lo < 20) & (hi > 16), keep3, fill, FLIP)
            k = row * RUN + j
            b = tl.load(rows + k[:, None], mask=(k < K)[:, None], other=0)
            acc = tl.dot(_bytes(w0, w1, w2, w3), b, acc, out_dtype=tl.int32)
        store_tile(
            acc, m, tile_n * BN, 0, 0, M, N, N, out, residual, sums, scales, biases, row_scale, row_zero_point, x_scale,
            x_zero_point, residual_scale, residual_zero_point, inverse, zero_point, ACTIVATION, RESIDUAL, AFTER, OUT, 1,
        )  # fmt: skip


# ---- launchers ----


def few_config(arch: int, n: int, kh: int, run: int) -> Config:
    """A tile is as deep as the kernel up to 64 and else as one run, 32 at least: the less, the fewer registers.

    What is loaded comes through registers, so that no stage overlaps another: other programs do.
    """
    deep = 64 if 32 < kh * run <= 64 else max(32, run)
    narrow = max(16, min(64, triton.next_power_of_2(n)))
    return Config(128 if deep < 128 else 64, narrow, deep, 4, 1, 3 if arch == 90 else 2)


def conv_few_channels(x: torch.Tensor, weights: Packed, s: ConvShape, out: torch.Tensor, epilogue: Epilogue) -> None:
    """out, channels_last, of x [N, C, H, W], uint8 or int8, a dilation of 1 in the width and one group."""
    m, run = s.n * s.oh * s.ow, weights.layout.row
    if m == 0:
        return
    pixels = pixels_of(x)
    if pixels.data_ptr() % 4:
        pixels = pixels.clone()
    arch, processors = machine(x.device)
    c = few_config(arch, s.o, s.kernel[0], run)
    flip, (left, _, top, _) = x.dtype == torch.uint8, s.padding
    count = ceil_div(m, c.bm) * ceil_div(s.o, c.bn)
    (kh, kw), (sh, sw), (dh, _) = s.kernel, s.stride, s.dilation
    with tiles.on(x.device):
        _conv_few[(min(count, processors * c.resident),)](
            pixels, weights.rows, as_bits(out), M=m, N=s.o, K=kh * run, C=s.c, H=s.h, W=s.w, OH=s.oh, OW=s.ow, KH=kh,
            KW=kw, SH=sh, SW=sw, DH=dh, TOP=top, LEFT=left, FLIP=flip, WORDS=s.w * s.c % 4 == 0, GROUP=GROUP, BM=c.bm,
            BN=c.bn, BK=c.bk, RUN=run, **epilogue.arguments(out, flip), **c.options,
        )  # fmt: skip
