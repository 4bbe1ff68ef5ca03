"""Pools over [N, C, H, W]: see pykernels/ops/pool.py.

    max:   the greatest tap of each window; any NaN wins; ties keep the first
    avg:   (sum of the taps) / divisor, summed in fp32
    qavg:  requantize(float(sum of (q - x_zero_point)) * (x_scale / divisor)), the sum exact in s32

The output is rows × columns of memory: rows of channels of one pixel (channels_last), or rows of pixels of one line
(contiguous). A program takes a tile of it and goes through the windows of its outputs tap by tap; of wide windows that
are averaged it takes one pixel, and many taps at a time. Nothing is padded: taps beyond the plane are masked. Maxima of
channels_last memory are those of pool_lines.py and pool_channels.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from pykernels.cuda.triton.arguments import (
    BYTES,
    KINDS,
    as_bits,
    check_byte_dtype,
    check_real_dtype,
    check_scale,
    check_zero_point,
    inverse,
    name,
    single,
)
from pykernels.cuda.triton.epilogue import OPTIONS, store_output
from pykernels.cuda.triton.gemm import machine
from pykernels.cuda.triton.planes import TILE, place, tile_shape, tiles
from pykernels.cuda.triton.pool_channels import max_channels
from pykernels.cuda.triton.pool_lines import max_lines, suits
from pykernels.cuda.triton.reals import INFINITY, load_real, number_of
from pykernels.cuda.triton.tiles import check, on
from pykernels.cuda.triton.windows import GEOMETRY, Windows, adaptive, check_input, longest, plain, window
from pykernels.ops.dtypes import ANY_WORDS, REALS

__all__ = [
    "adaptive_avg_pool2d",
    "adaptive_max_pool2d",
    "adaptive_max_pool2d_with_indices",
    "avg_pool2d",
    "max_pool2d",
    "max_pool2d_with_indices",
    "qadaptive_avg_pool2d",
    "qavg_pool2d",
]

WIDE_WINDOW = 32  # taps from which a window is averaged by a program of its own
UNROLLED = 3  # taps whose loads are in flight together: enough to wait for memory, and no register spilled
PROGRAMS = 8  # of a multiprocessor, among which wide windows are divided
INDEX_LIMIT = 2**31 - TILE  # rows of outputs that 32 bits number

AFFINE = ["zero_point", "out_zero_point"]


@triton.jit
def _outputs(
    cols, channels, out_h, out_w, LAST: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr
):
    """(row, column, image, channel, line, pixel of the line) of each output of this program's tile."""
    row, col = place(cols, ROWS, SPAN)
    r, k = row, col
    if not WIDE:
        r, k = row.to(tl.int32), col.to(tl.int32)
    if LAST:
        line = r // out_w
        return row, col, line // out_h, k, line % out_h, r % out_w
    else:
        plane = r // out_h
        return row, col, plane // channels, plane % channels, r % out_h, k


@triton.jit
def _extent(o, begin, end, size, reach, stride, padding, PADDED: tl.constexpr):
    """An axis's factor of the divisor: taps in the window, or (PADDED) taps and padding."""
    if PADDED:
        return tl.minimum(reach, size + padding - (o * stride - padding)).to(tl.float32)
    else:
        return (end - begin).to(tl.float32)


@triton.jit
def _load(pointer, mask, KIND: tl.constexpr, LOWEST: tl.constexpr):
    if KIND == "uint8" or KIND == "int8":
        return tl.load(pointer, mask=mask, other=LOWEST)
    else:
        v = load_real(pointer, mask, KIND)
        return tl.where(mask, v, -number_of(tl.full(v.shape, INFINITY, tl.int32)))


@triton.jit(do_not_specialize=GEOMETRY)
def _max(
    x, y, indices, rows, cols, channels, height, width, out_h, out_w, x_batch, x_channel, x_row, x_col,
    reach_h, reach_w, stride_h, stride_w, padding_h, padding_w, step_h, step_w,
    KIND: tl.constexpr, ADAPTIVE: tl.constexpr, WIDE: tl.constexpr, TAPS_H: tl.constexpr,
    TAPS_W: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Of contiguous memory."""
    row, col, n, c, oh, ow = _outputs(cols, channels, out_h, out_w, False, WIDE, ROWS, SPAN)
    exists = (row < rows) & (col < cols)
    top, bottom = window(oh, height, out_h, reach_h, stride_h, padding_h, step_h, ADAPTIVE)
    left, right = window(ow, width, out_w, reach_w, stride_w, padding_w, step_w, ADAPTIVE)
    base = x + n.to(tl.int64) * x_batch + c.to(tl.int64) * x_channel
    LOWEST: tl.constexpr = -128 if KIND == "int8" else 0
    best = _load(base + tl.zeros([ROWS, SPAN], tl.int32), exists & (row < 0), KIND, LOWEST)  # the lowest there is
    index = tl.full([ROWS, SPAN], -1, tl.int32)
    for t in tl.range(0, TAPS_H * TAPS_W, loop_unroll_factor=UNROLL):
        ih = top + t // TAPS_W * step_h
        iw = left + t % TAPS_W * step_w
        inside = exists & (ih < bottom) & (iw < right)
        v = _load(base + (ih.to(tl.int64) * x_row + iw.to(tl.int64) * x_col), inside, KIND, LOWEST)
        if indices is not None:
            better = inside & ((v > best) | (v != v) | (index < 0))
            index = tl.where(better, ih * width + iw, index)
            best = tl.where(better, v, best)
        elif KIND == "uint8" or KIND == "int8":
            best = tl.maximum(best, v)
        else:
            best = tl.where((v > best) | (v != v), v, best)
    at = row * cols + col
    if KIND == "uint8" or KIND == "int8":
        tl.store(y + at, best, mask=exists)
    else:
        store_output(y + at, best, exists, 1.0, 0, KIND)
    if indices is not None:
        tl.store(indices + at, index.to(tl.int64), mask=exists)


@triton.jit
def _store_average(
    pointer, total, taps, divisor, mask, x_scale, zero_point, inverse, out_zero_point,
    KIND: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    divisor = tl.zeros(total.shape, tl.float32) + divisor
    if KIND == "uint8" or KIND == "int8":
        factor = tl.math.div_rn(tl.zeros(total.shape, tl.float32) + x_scale, divisor)
        f = (total - taps * zero_point).to(tl.float32) * factor
    else:
        f = tl.math.div_rn(total, divisor)
    store_output(pointer, f, mask, inverse, out_zero_point, OUT)


@triton.jit
def _load_term(pointer, mask, KIND: tl.constexpr):
    """What a sum adds: fp32, or int32 of bytes."""
    if KIND == "uint8" or KIND == "int8":
        return tl.load(pointer, mask=mask, other=0).to(tl.int32)
    else:
        return load_real(pointer, mask, KIND)


@triton.jit(do_not_specialize=[*GEOMETRY, *AFFINE])
def _average(
    x, y, rows, cols, channels, height, width, out_h, out_w, x_batch, x_channel, x_row, x_col,
    reach_h, reach_w, stride_h, stride_w, padding_h, padding_w, divisor, x_scale, zero_point, inverse, out_zero_point,
    KIND: tl.constexpr, OUT: tl.constexpr, DIVISOR: tl.constexpr, ADAPTIVE: tl.constexpr, LAST: tl.constexpr,
    WIDE: tl.constexpr, TAPS_H: tl.constexpr, TAPS_W: tl.constexpr, UNROLL: tl.constexpr, ROWS: tl.constexpr,
    SPAN: tl.constexpr,
):  # fmt: skip
    row, col, n, c, oh, ow = _outputs(cols, channels, out_h, out_w, LAST, WIDE, ROWS, SPAN)
    exists = (row < rows) & (col < cols)
    top, bottom = window(oh, height, out_h, reach_h, stride_h, padding_h, 1, ADAPTIVE)
    left, right = window(ow, width, out_w, reach_w, stride_w, padding_w, 1, ADAPTIVE)
    base = x + n.to(tl.int64) * x_batch + c.to(tl.int64) * x_channel
    total = tl.zeros([ROWS, SPAN], tl.int32 if KIND == "uint8" or KIND == "int8" else tl.float32)
    for t in tl.range(0, TAPS_H * TAPS_W, loop_unroll_factor=UNROLL):
        ih = top + t // TAPS_W
        iw = left + t % TAPS_W
        inside = exists & (ih < bottom) & (iw < right)
        total += _load_term(base + (ih.to(tl.int64) * x_row + iw.to(tl.int64) * x_col), inside, KIND)
    if DIVISOR != "given":
        PADDED: tl.constexpr = DIVISOR == "padded"
        down = _extent(oh, top, bottom, height, reach_h, stride_h, padding_h, PADDED)
        divisor = down * _extent(ow, left, right, width, reach_w, stride_w, padding_w, PADDED)
    taps = (bottom - top) * (right - left)
    _store_average(
        y + (row * cols + col), total, taps, divisor, exists, x_scale, zero_point, inverse, out_zero_point, KIND, OUT
    )


@triton.jit(do_not_specialize=[*GEOMETRY, *AFFINE])
def _average_window(
    x, y, sums, channels, height, width, out_h, out_w, x_batch, x_channel, x_row, x_col,
    y_batch, y_channel, y_row, y_col, reach_h, reach_w, stride_h, stride_w, padding_h, padding_w,
    divisor, x_scale, zero_point, inverse, out_zero_point,
    KIND: tl.constexpr, OUT: tl.constexpr, DIVISOR: tl.constexpr, ADAPTIVE: tl.constexpr, FLAT: tl.constexpr,
    PARTS: tl.constexpr, TAPS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """One output pixel, SPAN channels, TAPS taps at a time; FLAT: the window's taps lie x_col apart, line after line.

    With PARTS > 1, a program of axis 1 adds up its part of the taps and leaves the sum in `sums` [PARTS, pixels,
    channels]; without x, a program adds up the parts, in order.
    """
    across = tl.cdiv(channels, SPAN)
    c = (tl.program_id(0) % across * SPAN + tl.arange(0, SPAN)[None, :]).to(tl.int64)
    pixel = tl.program_id(0) // across
    ow = pixel % out_w
    oh = pixel // out_w % out_h
    n = (pixel // out_w // out_h).to(tl.int64)
    top, bottom = window(oh, height, out_h, reach_h, stride_h, padding_h, 1, ADAPTIVE)
    left, right = window(ow, width, out_w, reach_w, stride_w, padding_w, 1, ADAPTIVE)
    breadth = right - left
    taps = (bottom - top) * breadth
    pixels = tl.num_programs(0) // across
    SUM: tl.constexpr = tl.int32 if KIND == "uint8" or KIND == "int8" else tl.float32
    if x is None:
        total = tl.zeros([1, SPAN], SUM)
        for part in tl.static_range(PARTS):
            at = (tl.cast(pixels, tl.int64) * part + pixel) * channels + c
            total += tl.load(sums + at, mask=c < channels, other=0)
    else:
        base = x + n * x_batch + top.to(tl.int64) * x_row + left.to(tl.int64) * x_col + c * x_channel
        totals = tl.zeros([TAPS, SPAN], SUM)
        depth = tl.cdiv(tl.cdiv(taps, TAPS), PARTS) * TAPS
        begin = tl.program_id(1) * depth
        end = tl.minimum(begin + depth, taps)
        for first in tl.range(begin, end, TAPS, loop_unroll_factor=4):
            t = first + tl.arange(0, TAPS)[:, None]
            if FLAT:
                place = t.to(tl.int64) * x_col
            else:
                place = (t // breadth).to(tl.int64) * x_row + (t % breadth).to(tl.int64) * x_col
            totals += _load_term(base + place, (t < end) & (c < channels), KIND)
        total = tl.sum(totals, axis=0, keep_dims=True)
    if PARTS > 1 and x is not None:
        at = (tl.cast(pixels, tl.int64) * tl.program_id(1) + pixel) * channels + c
        tl.store(sums + at, total, mask=c < channels)
    else:
        if DIVISOR != "given":
            PADDED: tl.constexpr = DIVISOR == "padded"
            down = _extent(oh, top, bottom, height, reach_h, stride_h, padding_h, PADDED)
            divisor = down * _extent(ow, left, right, width, reach_w, stride_w, padding_w, PADDED)
        to = y + n * y_batch + oh.to(tl.int64) * y_row + ow.to(tl.int64) * y_col + c * y_channel
        _store_average(to, total, taps, divisor, c < channels, x_scale, zero_point, inverse, out_zero_point, KIND, OUT)


# ---- launchers ----


def _wants_channels_last(x: torch.Tensor) -> bool:
    return x.shape[1] > 1 and x.stride(1) == 1 and not x.is_contiguous()


def _in_place(x: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """What is read: x, or a copy when neither channels nor columns lie next to each other; whether channels do."""
    last = _wants_channels_last(x)
    return (x if last or x.stride(3) == 1 or x.shape[3] == 1 else x.contiguous()), last


def _empty(x: torch.Tensor, windows: Windows, dtype: torch.dtype) -> torch.Tensor:
    layout = torch.channels_last if _wants_channels_last(x) else torch.contiguous_format
    return torch.empty((*x.shape[:2], *windows.outputs), dtype=dtype, device=x.device, memory_format=layout)


def _tile(y: torch.Tensor, last: bool) -> tuple[int, int, tuple[int], dict[str, Any]]:
    """(rows, columns, grid, constants) of the output."""
    cols = y.shape[1] if last else y.shape[3]
    rows, shape = y.numel() // cols, tile_shape(cols)
    return rows, cols, tiles(rows, cols, shape), {**shape, "LAST": last, "WIDE": rows >= INDEX_LIMIT}


def _strides(x: torch.Tensor, last: bool) -> tuple[int, int, int, int]:
    return x.stride(0), 1 if last else x.stride(1), x.stride(2), x.stride(3) if last else 1


def _loop(windows: Windows) -> dict[str, Any]:
    """The constants of the loop over the taps."""
    h, w = windows.taps
    return {"ADAPTIVE": windows.adaptive, "TAPS_H": h, "TAPS_W": w, "UNROLL": min(h * w, UNROLLED), **OPTIONS}


def warps(dtype: torch.dtype, with_indices: bool) -> int:
    """Of maxima: 16 bytes a thread at the least, and half as many numbers where their indices need registers, too."""
    return 8 if with_indices and dtype in REALS else 4


def _max_pool(x: torch.Tensor, windows: Windows, with_indices: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    y = _empty(x, windows, x.dtype)
    indices = _empty(x, windows, torch.int64) if with_indices else None
    if y.numel() == 0:
        return y, indices
    source, last = _in_place(x)
    if last:
        if indices is None and suits(windows):
            max_lines(source, y, windows)
        else:
            max_channels(source, y, indices, windows)
        return y, indices
    rows, cols, grid, shape = _tile(y, last)
    del shape["LAST"]
    with on(x.device):
        _max[grid](
            as_bits(source), as_bits(y), indices, rows, cols, *x.shape[1:], *windows.outputs,
            *_strides(source, last), *windows.reach, *windows.stride, *windows.padding, *windows.step,
            KIND=KINDS[x.dtype], num_warps=warps(x.dtype, with_indices), **_loop(windows), **shape,
        )  # fmt: skip
    return y, indices


def _check_poolable(op: str, x: torch.Tensor) -> None:
    good = x.dtype in REALS or x.dtype in BYTES
    check(good, op, f"x must be {ANY_WORDS}, not {name(x.dtype)}")
    check_input(op, x)


def max_pool2d(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> torch.Tensor:
    op = "max_pool2d"
    _check_poolable(op, x)
    return _max_pool(x, plain(op, x, kernel_size, stride, padding, dilation, ceil_mode), False)[0]


def _with_indices(op: str, x: torch.Tensor, windows: Windows) -> tuple[torch.Tensor, torch.Tensor]:
    good = x.shape[2] < 2**31 // x.shape[3]
    check(good, op, f"x must have fewer than 2^31 elements a plane, not shape {list(x.shape)}")
    y, indices = _max_pool(x, windows, True)
    assert indices is not None
    return y, indices


def max_pool2d_with_indices(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    ceil_mode: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    op = "max_pool2d_with_indices"
    _check_poolable(op, x)
    return _with_indices(op, x, plain(op, x, kernel_size, stride, padding, dilation, ceil_mode))


def adaptive_max_pool2d(x: torch.Tensor, output_size: list[int]) -> torch.Tensor:
    op = "adaptive_max_pool2d"
    _check_poolable(op, x)
    return _max_pool(x, adaptive(op, x, output_size), False)[0]


def adaptive_max_pool2d_with_indices(x: torch.Tensor, output_size: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    op = "adaptive_max_pool2d_with_indices"
    _check_poolable(op, x)
    return _with_indices(op, x, adaptive(op, x, output_size))


@dataclass(frozen=True)
class Affine:
    """How an average of bytes is requantized."""

    x_scale: float = 1.0
    x_zero_point: int = 0
    out_scale: float | None = None
    out_zero_point: int = 0
    out_dtype: torch.dtype | None = None

    def check(self, op: str, x: torch.Tensor) -> None:
        check_byte_dtype(op, "x", x.dtype)
        check_scale(op, "x_scale", self.x_scale)
        check_zero_point(op, "x_zero_point", self.x_zero_point, x.dtype)
        assert self.out_dtype is not None
        good = self.out_dtype in REALS or self.out_dtype in BYTES
        check(good, op, f"out_dtype must be {ANY_WORDS}, not {name(self.out_dtype)}")
        good = (self.out_dtype in BYTES) == (self.out_scale is not None)
        check(good, op, "out_scale must be given for a uint8 or int8 out_dtype, and only then")
        if self.out_scale is not None:
            check_scale(op, "out_scale", self.out_scale)
            check_zero_point(op, "out_zero_point", self.out_zero_point, self.out_dtype)


def _average_pool(
    op: str, x: torch.Tensor, windows: Windows, divisor: int | None, padded: bool, q: Affine
) -> torch.Tensor:
    taps = windows.taps[0] * windows.taps[1]
    if x.dtype in BYTES and taps >= 2**23:
        h, w = (longest(x.shape[2 + d], windows, d) for d in (0, 1))
        words = f"x has windows of {h} x {w} elements; their sum is exact in 32 bits below 2^23 elements only"
        check(h * w < 2**23, op, words)
    y = _empty(x, windows, q.out_dtype or x.dtype)
    if y.numel() == 0:
        return y
    source, last = _in_place(x)
    numbers = (
        1.0 if divisor is None else single(divisor), single(q.x_scale), q.x_zero_point,
        1.0 if q.out_scale is None else inverse(q.out_scale), q.out_zero_point,
    )  # fmt: skip
    kinds = {
        "KIND": KINDS[x.dtype],
        "OUT": KINDS[y.dtype],
        "DIVISOR": "given" if divisor is not None else "padded" if padded else "taps",
    }
    n, channels = x.shape[:2]
    with on(x.device):
        if taps >= WIDE_WINDOW:
            span = min(triton.next_power_of_2(channels), 64)
            pixels = n * windows.outputs[0] * windows.outputs[1]
            programs, deep = pixels * triton.cdiv(channels, span), TILE // span
            parts = _parts(programs, triton.cdiv(taps, deep), machine(x.device)[1])
            whole = windows.outputs[1] == 1 and windows.padding[1] == 0 and windows.taps[1] == x.shape[3]
            flat = whole and source.stride(2) == source.shape[3] * source.stride(3)
            sums = None
            if parts > 1:
                kind = torch.int32 if x.dtype in BYTES else torch.float32
                sums = torch.empty((parts, pixels, channels), dtype=kind, device=x.device)
            for given, axis in ((as_bits(source), parts), (None, 1))[: 1 if parts == 1 else 2]:
                _average_window[(programs, axis)](
                    given, as_bits(y), sums, *x.shape[1:], *windows.outputs,
                    *_strides(source, last), *y.stride(), *windows.reach, *windows.stride, *windows.padding, *numbers,
                    ADAPTIVE=windows.adaptive, FLAT=flat, PARTS=parts, TAPS=deep,
                    SPAN=span, **kinds, **OPTIONS,
                )  # fmt: skip
        else:
            rows, cols, grid, shape = _tile(y, last)
            _average[grid](
                as_bits(source), as_bits(y), rows, cols, *x.shape[1:], *windows.outputs, *_strides(source, last),
                *windows.reach, *windows.stride, *windows.padding, *numbers, **kinds, **_loop(windows), **shape,
            )  # fmt: skip
    return y


def _parts(programs: int, steps: int, processors: int) -> int:
    """How many programs divide a window of so many steps: those that the device still has room for, four steps each."""
    parts = 1
    while parts < 64 and 2 * parts * programs <= PROGRAMS * processors and steps >= 8 * parts:
        parts *= 2
    return parts


def _plain_average(
    op: str, x: torch.Tensor, kernel: list[int], stride: list[int], padding: list[int], ceil_mode: bool,
    count_include_pad: bool, divisor: int | None, q: Affine,
) -> torch.Tensor:  # fmt: skip
    check_input(op, x)
    good = divisor is None or 0 < abs(divisor) < 2**31
    windows = plain(op, x, kernel, stride, padding, [1, 1], ceil_mode)
    check(good, op, f"divisor_override must not be 0 and lie within 2^31, not {divisor}")
    return _average_pool(op, x, windows, divisor, count_include_pad, q)


def avg_pool2d(
    x: torch.Tensor,
    kernel_size: list[int],
    stride: list[int],
    padding: list[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None = None,
) -> torch.Tensor:
    op = "avg_pool2d"
    check_real_dtype(op, "x", x.dtype)
    arguments = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return _plain_average(op, x, *arguments, Affine())


def adaptive_avg_pool2d(x: torch.Tensor, output_size: list[int]) -> torch.Tensor:
    op = "adaptive_avg_pool2d"
    check_real_dtype(op, "x", x.dtype)
    check_input(op, x)
    return _average_pool(op, x, adaptive(op, x, output_size), None, False, Affine())


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
    op, q = "qavg_pool2d", Affine(x_scale, x_zero_point, out_scale, out_zero_point, out_dtype)
    q.check(op, x)
    return _plain_average(op, x, kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override, q)


def qadaptive_avg_pool2d(
    x: torch.Tensor,
    output_size: list[int],
    x_scale: float,
    x_zero_point: int,
    out_scale: float | None,
    out_zero_point: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    op, q = "qadaptive_avg_pool2d", Affine(x_scale, x_zero_point, out_scale, out_zero_point, out_dtype)
    q.check(op, x)
    check_input(op, x)
    return _average_pool(op, x, adaptive(op, x, output_size), None, False, q)
