"""Maxima over [N, C, H, W] in channels_last memory whose windows lie in a few neighbouring lines: any NaN wins.

A program takes LINES lines of the output, some pixels and some channels. It takes the maximum of each line of its
windows once, for all outputs that the line belongs to, so that of a 3x3 window with stride 2 four lines cost 27 loads
and 26 maxima where single outputs would cost 36 and 32, and read 9 lines of the input instead of 12. Taps beyond the
plane repeat those at its edge, which are the window's own, and change no maximum.

Bytes are compared in words of four, two at a time: a byte leads a half of a word, its neighbour trails and can decide
nothing between different leaders, nor does it matter between equal ones.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pykernels.cuda.triton.arguments import BYTES, KINDS, as_bits
from pykernels.cuda.triton.epilogue import OPTIONS
from pykernels.cuda.triton.gemm import machine
from pykernels.cuda.triton.pool_channels import LINE_LIMIT, greater, load_numbers, store_numbers
from pykernels.cuda.triton.tiles import on
from pykernels.cuda.triton.windows import GEOMETRY, Windows

__all__ = ["max_lines", "shape_of", "suits"]

THREADS = 128
SPAN_BYTES = 256  # of a pixel's channels, to a program
MOST_TAPS = 25  # of a window, since all are written out
PROGRAMS = 8  # of a multiprocessor, which more lines to a program must leave
UNSIGNED = tl.constexpr("max.u16x2 $0, $1, $2;")
SIGNED = tl.constexpr("max.s16x2 $0, $1, $2;")


@triton.jit
def _greater_halves(a, b, SIGNS: tl.constexpr, ASM: tl.constexpr):
    """Of two words, each half's greater; without ASM in plain steps."""
    if ASM:
        return tl.inline_asm_elementwise(SIGNED if SIGNS else UNSIGNED, "=r,r,r", [a, b], tl.int32, True, 1)
    else:
        if not SIGNS:
            a, b = a.to(tl.uint32, bitcast=True), b.to(tl.uint32, bitcast=True)
        high = tl.maximum(a >> 16, b >> 16)
        low = tl.maximum((a << 16) >> 16, (b << 16) >> 16)
        return ((high << 16) | (low & 0xFFFF)).to(tl.int32, bitcast=True)


@triton.jit
def _tap(
    line, iw, c, channels, width, x_col, EVEN: tl.constexpr, KIND: tl.constexpr, WORDS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """(numbers,) of the pixels `iw`, or of words those whose halves the even bytes lead, and the odd ones."""
    iw = tl.minimum(tl.maximum(iw, 0), width - 1)
    pointer = line + ((iw.to(tl.int64) if WIDE else iw) * x_col + c)
    if WORDS:
        word = tl.load(pointer) if EVEN else tl.load(pointer, mask=c < channels)
        return (word << 8, word)
    else:
        return (load_numbers(pointer, c < channels, EVEN, KIND),)


@triton.jit
def _greater(v, best, KIND: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr):
    if WORDS:
        SIGNS: tl.constexpr = KIND == "int8"
        return (_greater_halves(v[0], best[0], SIGNS, ASM), _greater_halves(v[1], best[1], SIGNS, ASM))
    else:
        return (greater(v[0], best[0]),)


@triton.jit
def _greatest(
    maxima, FIRST: tl.constexpr, COUNT: tl.constexpr, KIND: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    best = maxima[FIRST]
    for j in tl.static_range(1, COUNT):
        best = _greater(maxima[FIRST + j], best, KIND, WORDS, ASM)
    return best


@triton.jit
def _store(pointer, best, mask, KIND: tl.constexpr, WORDS: tl.constexpr):
    if WORDS:
        tl.store(pointer, ((best[0] >> 8) & 0x00FF00FF) | (best[1] & -0xFF0100), mask=mask)
    else:
        store_numbers(pointer, best[0], mask, KIND)


@triton.jit(do_not_specialize=GEOMETRY)
def _max_lines(
    x, y, blocks, channels, height, width, out_h, out_w, x_batch, x_row, x_col, stride_w, padding_h, padding_w,
    KIND: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr, WIDE: tl.constexpr, STRIDE: tl.constexpr,
    DOWN: tl.constexpr, RIGHT: tl.constexpr, EVEN: tl.constexpr, LINES: tl.constexpr, PIXELS: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    """`blocks` programs share LINES lines' pixels; axis 1 is the channels. WIDE: places in a line need 64 bits. EVEN:
    SPAN divides the channels. With WORDS, channels and strides count words."""
    if WORDS:
        x = x.to(tl.pointer_type(tl.int32))
        y = y.to(tl.pointer_type(tl.int32))
    group = tl.program_id(0) // blocks
    groups = tl.cdiv(out_h, LINES)
    n = (group // groups).to(tl.int64)
    oh = group % groups * LINES
    ow = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)[:, None]
    c = tl.program_id(1) * SPAN + tl.arange(0, SPAN)[None, :]
    exists = (ow < out_w) & (c < channels)
    x += n * x_batch
    top = oh * STRIDE - padding_h
    left = ow * stride_w - padding_w
    maxima = ()  # of the lines of the windows
    bests = ()
    for r in tl.static_range(LINES):
        for j in tl.static_range(0 if r == 0 else (r - 1) * STRIDE + DOWN, r * STRIDE + DOWN):
            line = x + tl.minimum(tl.maximum(top + j, 0), height - 1).to(tl.int64) * x_row
            greatest = _tap(line, left, c, channels, width, x_col, EVEN, KIND, WORDS, WIDE)
            for t in tl.static_range(1, RIGHT):
                v = _tap(line, left + t, c, channels, width, x_col, EVEN, KIND, WORDS, WIDE)
                greatest = _greater(v, greatest, KIND, WORDS, ASM)
            maxima += (greatest,)
        bests += (_greatest(maxima, r * STRIDE, DOWN, KIND, WORDS, ASM),)
    to = (ow.to(tl.int64) if WIDE else ow) * channels + c
    y += (n * out_h + oh) * out_w * channels
    for r in tl.static_range(LINES):
        _store(y + to, bests[r], exists & (oh + r < out_h), KIND, WORDS)
        y += tl.cast(out_w, tl.int64) * channels


COMPILED = isinstance(_max_lines, triton.JITFunction)  # Triton's interpreter knows no PTX


def suits(windows: Windows) -> bool:
    """Whether all taps of a window, none dilated, can be written out, and begin where it begins."""
    down, right = windows.taps
    return not windows.adaptive and windows.reach == windows.taps and down * right <= MOST_TAPS


def shape_of(
    images: int, channels: int, windows: Windows, dtype: torch.dtype, arch: int, processors: int
) -> dict[str, Any]:
    """The constants of `_max_lines`: 16 bytes a thread and line, and as many lines as share some of the input, up to
    four, and leave the device enough programs. `channels` is a multiple of 4 for words."""
    out_h, out_w = windows.outputs
    words = dtype in BYTES and arch >= 90 and channels % 4 == 0
    size = 4 if words else dtype.itemsize
    count = channels // 4 if words else channels
    span = min(triton.next_power_of_2(count), SPAN_BYTES // size)
    elements = THREADS * 16 // size
    pixels = max(1, min(elements // span, triton.next_power_of_2(out_w)))
    across = triton.cdiv(count, span) * triton.cdiv(out_w, pixels) * images
    lines = 4 if windows.stride[0] < windows.taps[0] else 1
    while lines > 1 and across * triton.cdiv(out_h, lines) < PROGRAMS * processors:
        lines //= 2
    return {"WORDS": words, "LINES": lines, "PIXELS": pixels, "SPAN": span, "EVEN": count % span == 0}


def max_lines(x: torch.Tensor, y: torch.Tensor, windows: Windows) -> None:
    """Fill y, channels_last as x is."""
    arch, processors = machine(x.device)
    strides = x.stride(0), x.stride(2), x.stride(3)
    whole = (x.data_ptr() | strides[0] | strides[1] | strides[2]) % 4 == 0
    shape = shape_of(x.shape[0], x.shape[1], windows, x.dtype, arch if whole else 0, processors)
    unit = 4 if shape["WORDS"] else 1
    channels, (height, width), (out_h, out_w) = x.shape[1] // unit, x.shape[2:], windows.outputs
    blocks, across = triton.cdiv(out_w, shape["PIXELS"]), triton.cdiv(channels, shape["SPAN"])
    wide = max(width * x.stride(3), out_w * x.shape[1]) >= LINE_LIMIT
    with on(x.device):
        _max_lines[(x.shape[0] * triton.cdiv(out_h, shape["LINES"]) * blocks, across)](
            as_bits(x), as_bits(y), blocks, channels, height, width, out_h, out_w, *(s // unit for s in strides),
            windows.stride[1], *windows.padding, KIND=KINDS[x.dtype], ASM=COMPILED, WIDE=wide,
            STRIDE=windows.stride[0], DOWN=windows.taps[0], RIGHT=windows.taps[1],
            num_warps=THREADS // 32, **shape, **OPTIONS,
        )  # fmt: skip
