"""Maxima over [N, C, H, W] in channels_last memory: the greatest tap of each window; any NaN wins; ties keep the first.

Those without indices whose windows are small and not dilated are pool_lines.py's.

A program takes some pixels of one line of the output and some channels, so that where it is needs no division but a
program's own. A window that ends in the plane repeats its last tap, which changes no maximum, instead of masking taps;
so an output costs a load of 16 bytes' share, one maximum and little else for each tap.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from pykernels.cuda.triton.arguments import KINDS, as_bits
from pykernels.cuda.triton.epilogue import OPTIONS
from pykernels.cuda.triton.reals import INFINITY, bf16_number, bits_of, number_of
from pykernels.cuda.triton.tiles import on
from pykernels.cuda.triton.windows import GEOMETRY, Windows, window

__all__ = ["LINE_LIMIT", "greater", "load_numbers", "max_channels", "shape_of", "store_numbers"]

THREADS = 128
SPAN_BYTES = 256  # of a pixel's channels, to a program
UNROLLED = 9  # taps whose loads may be in flight together; of larger windows a third
LINE_LIMIT = 2**31  # elements of a line that 32 bits number


@triton.jit
def load_numbers(pointer, mask, EVEN: tl.constexpr, KIND: tl.constexpr):
    """Numbers in the order of those at `pointer`; anything where not `mask`, which is not stored.

    fp32, but fp16 of bytes: a byte, as unsigned, is the bits of a tiny number, and a GPU compares two of these at once.
    """
    loaded = tl.load(pointer) if EVEN else tl.load(pointer, mask=mask)
    if KIND == "bf16":
        return bf16_number(loaded)
    elif KIND == "uint8":
        return loaded.to(tl.uint16).to(tl.float16, bitcast=True)
    elif KIND == "int8":
        return (loaded.to(tl.uint8, bitcast=True) ^ 0x80).to(tl.uint16).to(tl.float16, bitcast=True)
    else:
        return loaded.to(tl.float32)


@triton.jit
def greater(v, best):
    """Of two zeros the positive one; of two NaNs any."""
    return tl.maximum(best, v, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store_numbers(pointer, best, mask, KIND: tl.constexpr):
    """What was loaded, so nothing is rounded."""
    if KIND == "bf16":
        tl.store(pointer, (bits_of(best) >> 16).to(tl.uint16), mask=mask)
    elif KIND == "uint8":
        tl.store(pointer, best.to(tl.uint16, bitcast=True).to(tl.uint8), mask=mask)
    elif KIND == "int8":
        tl.store(pointer, (best.to(tl.uint16, bitcast=True).to(tl.uint8) ^ 0x80).to(tl.int8, bitcast=True), mask=mask)
    else:
        tl.store(pointer, best.to(pointer.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=GEOMETRY)
def _max_channels(
    x, y, indices, blocks, channels, height, width, out_h, out_w, x_batch, x_row, x_col,
    reach_h, reach_w, stride_h, stride_w, padding_h, padding_w, step_h, step_w,
    KIND: tl.constexpr, ADAPTIVE: tl.constexpr, WIDE: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr,
    UNROLL: tl.constexpr, EVEN: tl.constexpr, PIXELS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """`blocks` programs share a line's pixels; axis 1 is the channels. WIDE: places in a line need 64 bits. EVEN: SPAN
    divides the channels."""
    line = tl.program_id(0) // blocks
    oh = line % out_h
    ow = tl.program_id(0) % blocks * PIXELS + tl.arange(0, PIXELS)[:, None]
    c = tl.program_id(1) * SPAN + tl.arange(0, SPAN)[None, :]
    exists = (ow < out_w) & (c < channels)
    top, bottom = window(oh, height, out_h, reach_h, stride_h, padding_h, step_h, ADAPTIVE)
    left, right = window(tl.minimum(ow, out_w - 1), width, out_w, reach_w, stride_w, padding_w, step_w, ADAPTIVE)
    down = (bottom - 1 - top) // step_h  # the last tap's number
    aside = (right - 1 - left) // step_w
    image = x + (line // out_h).to(tl.int64) * x_batch
    if KIND == "uint8" or KIND == "int8":
        best = tl.zeros([PIXELS, SPAN], tl.float16)
    else:
        best = -number_of(tl.full([PIXELS, SPAN], INFINITY, tl.int32))
    index = tl.full([PIXELS, SPAN], -1, tl.int32)
    for t in tl.range(0, TAPS_H * TAPS_W, loop_unroll_factor=UNROLL):
        ih = top + tl.minimum(t // TAPS_W, down) * step_h
        iw = left + tl.minimum(t % TAPS_W, aside) * step_w
        at = (iw.to(tl.int64) if WIDE else iw) * x_col + c
        v = load_numbers(image + ih.to(tl.int64) * x_row + at, c < channels, EVEN, KIND)
        if indices is not None:
            better = (v > best) | (v != v) | (index < 0)
            index = tl.where(better, ih * width + iw, index)
            best = tl.where(better, v, best)
        else:
            best = greater(v, best)
    to = (ow.to(tl.int64) if WIDE else ow) * channels + c
    begin = line.to(tl.int64) * out_w * channels
    store_numbers(y + begin + to, best, exists, KIND)
    if indices is not None:
        tl.store(indices + begin + to, index.to(tl.int64), mask=exists)


def shape_of(channels: int, out_w: int, dtype: torch.dtype, with_indices: bool) -> dict[str, Any]:
    """Pixels and channels of a program: 8 numbers a thread, or 32 bytes, and whether its channels are all there."""
    span = min(triton.next_power_of_2(channels), SPAN_BYTES // dtype.itemsize)
    elements = THREADS * (32 if dtype.itemsize == 1 and not with_indices else 8)
    pixels = max(1, min(elements // span, triton.next_power_of_2(out_w)))
    return {"PIXELS": pixels, "SPAN": span, "EVEN": channels % span == 0}


def max_channels(x: torch.Tensor, y: torch.Tensor, indices: torch.Tensor | None, windows: Windows) -> None:
    """Fill y, and indices with the places of the maxima in their planes, both channels_last as x is."""
    shape = shape_of(x.shape[1], windows.outputs[1], x.dtype, indices is not None)
    blocks, across = triton.cdiv(windows.outputs[1], shape["PIXELS"]), triton.cdiv(x.shape[1], shape["SPAN"])
    (down, right), (height, width) = windows.taps, x.shape[2:]
    loop: dict[str, Any] = {"TAPS_H": down, "TAPS_W": right, "UNROLL": unroll(down, right)}
    wide = max(width * x.stride(3), windows.outputs[1] * x.shape[1]) >= LINE_LIMIT
    with on(x.device):
        _max_channels[(x.shape[0] * windows.outputs[0] * blocks, across)](
            as_bits(x), as_bits(y), indices, blocks, x.shape[1], height, width, *windows.outputs, x.stride(0),
            x.stride(2), x.stride(3), *windows.reach, *windows.stride, *windows.padding, *windows.step,
            KIND=KINDS[x.dtype], ADAPTIVE=windows.adaptive, WIDE=wide, num_warps=THREADS // 32,
            **loop, **shape, **OPTIONS,
        )  # fmt: skip


def unroll(down: int, right: int) -> int:
    taps = down * right
    return taps if taps <= UNROLLED else UNROLLED // 3
