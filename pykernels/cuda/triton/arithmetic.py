"""Bytes to bytes in one pass: qadd, qmul, qcat and qlookup, see pykernels/ops/quantize.py.

    f = (a - a_zero_point) * a_scale  +|*  (b - b_zero_point) * b_scale        q = requantize(activation(f))

Dense tensors are run through as they lie in memory; a factor a channel, and the pieces of a concatenation, as rows ×
columns of it.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from pykernels.cuda.triton.arguments import (
    KINDS,
    check_activation,
    check_byte_dtype,
    check_device,
    check_scale,
    check_zero_point,
    dense,
    in_layout_of,
    inverse,
    is_channels_last,
    single,
)
from pykernels.cuda.triton.epilogue import OPTIONS, activate, dequantize, rint, store_output
from pykernels.cuda.triton.planes import TILE, flat, place, tile_shape, tiles
from pykernels.cuda.triton.tiles import check, on

__all__ = ["qadd", "qcat", "qlookup", "qmul"]

ZERO_POINTS = ["a_zero_point", "b_zero_point", "zero_point", "out_zero_point"]


# $0 to $3: the bytes of $4, as unsigned, plus 2^23, since they are the lowest bits of such a number.
UNPACK = """{
prmt.b32 $0, $4, 0x4B000000, 0x7440;
prmt.b32 $1, $4, 0x4B000000, 0x7441;
prmt.b32 $2, $4, 0x4B000000, 0x7442;
prmt.b32 $3, $4, 0x4B000000, 0x7443;
}"""
UNSIGNED = tl.constexpr(UNPACK)
SIGNED = tl.constexpr(
    UNPACK.replace("$4", "b").replace("{", "{ .reg .b32 b; xor.b32 b, $4, 0x80808080;")  # int8 plus 128
)
BOUNDS = ("none", "relu", "relu6")  # activations that only bound what they are given


@triton.jit
def _number(q, zero_point, ASM: tl.constexpr):
    """q - zero_point, fp32: exact. Without ASM in plain steps."""
    if ASM:
        SHIFT: tl.constexpr = 0x800000 + (128 if q.dtype == tl.int8 else 0)
        TEXT: tl.constexpr = SIGNED if q.dtype == tl.int8 else UNSIGNED
        v = tl.inline_asm_elementwise(TEXT, "=&r,=&r,=&r,=&r,r", [q], tl.float32, True, 4)
        return v - (zero_point + SHIFT).to(tl.float32)
    else:
        return (q.to(tl.int32) - zero_point).to(tl.float32)


@triton.jit
def _combine(
    a, b, a_scale, a_zero_point, b_scale, b_zero_point, OP: tl.constexpr, ASM: tl.constexpr
):  # fmt: skip
    x = _number(a, a_zero_point, ASM) * a_scale
    y = _number(b, b_zero_point, ASM) * b_scale
    return x + y if OP == "add" else x * y


@triton.jit
def _finish(
    pointer, f, mask, inverse, zero_point, ACTIVATION: tl.constexpr, CLAMPS: tl.constexpr, OUT: tl.constexpr
):  # fmt: skip
    """Store requantize(activation(f)). CLAMPS: f * inverse is no NaN, and the activation bounds it, no more."""
    if CLAMPS:
        low = ((-128 if OUT == "int8" else 0) - zero_point).to(tl.float32)
        high = ((127 if OUT == "int8" else 255) - zero_point).to(tl.float32)
        if ACTIVATION != "none":
            low = tl.maximum(low, 0.0)
        if ACTIVATION == "relu6":
            high = tl.minimum(high, 6.0 * inverse)
        q = rint(tl.minimum(tl.maximum(f * inverse, low), high)) + zero_point
        tl.store(pointer, q.to(pointer.dtype.element_ty), mask=mask)
    else:
        store_output(pointer, activate(f, ACTIVATION), mask, inverse, zero_point, OUT)


@triton.jit(do_not_specialize=ZERO_POINTS)
def _binary(
    a, b, out, n, a_scale, a_zero_point, b_scale, b_zero_point, inverse, out_zero_point,
    OP: tl.constexpr, ACTIVATION: tl.constexpr, CLAMPS: tl.constexpr, OUT: tl.constexpr, ASM: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    i = flat(TILE)
    x = tl.load(a + i, mask=i < n, other=0)
    y = tl.load(b + i, mask=i < n, other=0)
    f = _combine(x, y, a_scale, a_zero_point, b_scale, b_zero_point, OP, ASM)
    _finish(out + i, f, i < n, inverse, out_zero_point, ACTIVATION, CLAMPS, OUT)


@triton.jit(do_not_specialize=ZERO_POINTS)
def _binary_channels(
    a, b, out, rows, cols, pixels, a_scale, a_zero_point, b_scale, b_zero_point, inverse, out_zero_point,
    OP: tl.constexpr, ACTIVATION: tl.constexpr, CLAMPS: tl.constexpr, OUT: tl.constexpr, ASM: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """A number of b for each column of each `pixels` rows of a (channels_last), or for each row (contiguous)."""
    row, col = place(cols, ROWS, SPAN)
    mask = (row < rows) & (col < cols)
    if COLUMNS:
        y = tl.load(b + (row // pixels * cols + col), mask=mask, other=0)
    else:
        y = tl.load(b + row, mask=row < rows, other=0)
    i = row * cols + col
    x = tl.load(a + i, mask=mask, other=0)
    f = _combine(x, y, a_scale, a_zero_point, b_scale, b_zero_point, OP, ASM)
    _finish(out + i, f, mask, inverse, out_zero_point, ACTIVATION, CLAMPS, OUT)


@triton.jit(do_not_specialize=ZERO_POINTS)
def _place_rows(
    x, out, rows, cols, width, offset, scale, zero_point, inverse, out_zero_point,
    OUT: tl.constexpr, COPY: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Rows of x, requantized or (COPY) as they are, to `offset` in the output's rows of `width`."""
    row, col = place(cols, ROWS, SPAN)
    mask = (row < rows) & (col < cols)
    q = tl.load(x + (row * cols + col), mask=mask, other=0)
    to = out + (row * width + offset + col)
    if COPY:
        tl.store(to, q, mask=mask)
    else:
        store_output(to, dequantize(q, zero_point, scale), mask, inverse, out_zero_point, OUT)


@triton.jit
def _lookup(x, table, out, n, TILE: tl.constexpr):
    i = flat(TILE)
    tl.store(out + i, tl.load(table + tl.load(x + i, mask=i < n, other=0).to(tl.int32)), mask=i < n)


COMPILED = isinstance(_binary, triton.JITFunction)  # Triton's interpreter knows no PTX


# ---- launchers ----


def _clamps(a_scale: float, b_scale: float, scale: float, activation: str) -> bool:
    """Whether nothing but bounds come after the sum or product of numbers that are finite, as is 1 / `scale`."""
    finite = all(math.isfinite(single(256.0 * s)) for s in (a_scale, b_scale))
    return finite and math.isfinite(inverse(scale)) and activation in BOUNDS


def _elementwise(
    op: str, a: torch.Tensor, b: torch.Tensor, a_scale: float, a_zero_point: int, b_scale: float, b_zero_point: int,
    out_scale: float, out_zero_point: int, out_dtype: torch.dtype, activation: str,
) -> torch.Tensor:  # fmt: skip
    check_byte_dtype(op, "a", a.dtype)
    check_byte_dtype(op, "b", b.dtype)
    check_device(op, "b", b, a)
    check_byte_dtype(op, "out_dtype", out_dtype)
    check_scale(op, "a_scale", a_scale)
    check_scale(op, "b_scale", b_scale)
    check_scale(op, "out_scale", out_scale)
    check_zero_point(op, "a_zero_point", a_zero_point, a.dtype)
    check_zero_point(op, "b_zero_point", b_zero_point, b.dtype)
    check_zero_point(op, "out_zero_point", out_zero_point, out_dtype)
    same = a.shape == b.shape
    per_channel = a.dim() == 4 and b.shape == (*a.shape[:2], 1, 1)
    words = f"b must have the shape of a, {list(a.shape)}, or be [N, C, 1, 1] against [N, C, H, W]"
    check(same or per_channel, op, f"{words}, not {list(b.shape)}")
    a = dense(a)
    out = torch.empty_like(a, dtype=out_dtype)
    if a.numel() == 0:
        return out
    numbers = (single(a_scale), a_zero_point, single(b_scale), b_zero_point, inverse(out_scale), out_zero_point)
    how: dict[str, Any] = {"OP": op.removeprefix("q"), "ACTIVATION": activation, "OUT": KINDS[out_dtype], **OPTIONS}
    how |= {"CLAMPS": _clamps(a_scale, b_scale, out_scale, activation), "ASM": COMPILED}
    columns = is_channels_last(a)
    with on(a.device):
        if same or not (columns or a.is_contiguous()):
            b = in_layout_of(a, b)
            _binary[(triton.cdiv(a.numel(), TILE),)](a, b, out, a.numel(), *numbers, TILE=TILE, **how)
        else:
            pixels = a.shape[2] * a.shape[3]
            cols = a.shape[1] if columns else pixels
            rows, shape = a.numel() // cols, tile_shape(cols)
            _binary_channels[tiles(rows, cols, shape)](
                a, b.contiguous(), out, rows, cols, pixels, *numbers, COLUMNS=columns, **shape, **how
            )
    return out


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
    check_activation("qadd", activation)
    parameters = (a_scale, a_zero_point, b_scale, b_zero_point, out_scale, out_zero_point, out_dtype)
    return _elementwise("qadd", a, b, *parameters, activation)


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
    parameters = (a_scale, a_zero_point, b_scale, b_zero_point, out_scale, out_zero_point, out_dtype)
    return _elementwise("qmul", a, b, *parameters, "none")


def qcat(
    xs: list[torch.Tensor],
    scales: list[float],
    zero_points: list[int],
    dim: int,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype,
) -> torch.Tensor:
    op = "qcat"
    check(len(xs) > 0, op, "xs must hold at least one tensor")
    for argument, numbers in (("scales", scales), ("zero_points", zero_points)):
        words = f"{argument} must have {len(xs)} numbers, one for each of xs, not {len(numbers)}"
        check(len(numbers) == len(xs), op, words)
    check_byte_dtype(op, "out_dtype", out_dtype)
    check_scale(op, "out_scale", out_scale)
    check_zero_point(op, "out_zero_point", out_zero_point, out_dtype)
    first = xs[0]
    dims, sizes = first.dim(), list(first.shape)
    words = f"dim must lie in [{-dims}, {dims - 1}] for xs[0] of shape {sizes}, not {dim}"
    check(-dims <= dim < dims, op, words)
    dim %= dims
    for i, x in enumerate(xs):
        check_byte_dtype(op, f"xs[{i}]", x.dtype)
        check_device(op, f"xs[{i}]", x, first)
        check_scale(op, f"scales[{i}]", scales[i])
        check_zero_point(op, f"zero_points[{i}]", zero_points[i], x.dtype)
        fits = x.dim() == dims and all(d == dim or x.shape[d] == first.shape[d] for d in range(dims))
        words = f"xs[{i}] must have the shape of xs[0], {list(first.shape)}, but along dim {dim}, not {list(x.shape)}"
        check(fits, op, words)
    sizes[dim] = sum(x.shape[dim] for x in xs)
    layout = torch.contiguous_format
    if is_channels_last(first) and not first.is_contiguous():
        layout = torch.channels_last
    out = torch.empty(sizes, dtype=out_dtype, device=first.device, memory_format=layout)
    order = (0, 2, 3, 1) if layout == torch.channels_last else range(dims)  # of the dimensions in memory
    place = list(order).index(dim)
    rows = math.prod(sizes[d] for d in order[:place])
    inner = math.prod(sizes[d] for d in order[place + 1 :])
    offset = 0
    with on(first.device):
        for x, scale, zero_point in zip(xs, scales, zero_points, strict=True):
            cols = inner * x.shape[dim]
            if rows * cols > 0:
                copy = x.dtype == out_dtype and single(scale) == single(out_scale) and zero_point == out_zero_point
                shape = tile_shape(cols)
                _place_rows[tiles(rows, cols, shape)](
                    x.contiguous(memory_format=layout), out, rows, cols, inner * sizes[dim], offset, single(scale),
                    zero_point, inverse(out_scale), out_zero_point, OUT=KINDS[out_dtype], COPY=copy, **shape, **OPTIONS,
                )  # fmt: skip
            offset += cols
    return out


def qlookup(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    op = "qlookup"
    check_byte_dtype(op, "x", x.dtype)
    check_byte_dtype(op, "table", table.dtype)
    check_device(op, "table", table, x)
    check(table.shape == (256,), op, f"table must have shape [256], not {list(table.shape)}")
    source = dense(x)
    out = torch.empty_like(source, dtype=table.dtype)
    if x.numel() > 0:
        with on(x.device):
            _lookup[(triton.cdiv(x.numel(), TILE),)](
                source.view(torch.uint8), table.contiguous(), out, x.numel(), TILE=TILE
            )
    return out
