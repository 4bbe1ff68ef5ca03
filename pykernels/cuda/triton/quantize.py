"""Real numbers to bytes and back: quantize_* and dequantize_*, see pykernels/ops/quantize.py.

    q = clamp(rint(x * (1 / scale)) + zero_point)      x = (q - zero_point) * scale        all in fp32

Dense tensors are run through as they lie in memory. Where scale and zero point vary, memory is rows × columns, with one
of each a row or a column. The values of scale and zero point tensors are not looked at (that would wait for the
device), so bad ones give bad numbers, not errors.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from pykernels.cuda.triton.arguments import (
    KINDS,
    as_bits,
    check_byte_dtype,
    check_device,
    check_real_dtype,
    check_scale,
    check_zero_point,
    dense,
    inverse,
    name,
    single,
)
from pykernels.cuda.triton.epilogue import OPTIONS, dequantize, requantize, rint, store_output
from pykernels.cuda.triton.planes import TILE, flat, place, tile_shape, tiles
from pykernels.cuda.triton.reals import load_real, store_real
from pykernels.cuda.triton.tiles import check, on

__all__ = [
    "dequantize_per_block",
    "dequantize_per_channel",
    "dequantize_per_tensor",
    "dequantize_per_token",
    "quantize_per_block",
    "quantize_per_channel",
    "quantize_per_tensor",
    "quantize_per_token",
]

SMALLEST_NORMAL = tl.constexpr(2.0**-126)
LONGEST = 8192  # elements of a row that a program keeps in registers; longer ones are read twice


@triton.jit(do_not_specialize=["zero_point"])
def _quantize(x, q, n, inverse, zero_point, REAL: tl.constexpr, OUT: tl.constexpr, TILE: tl.constexpr):
    i = flat(TILE)
    store_output(q + i, load_real(x + i, i < n, REAL), i < n, inverse, zero_point, OUT)


@triton.jit(do_not_specialize=["zero_point"])
def _dequantize(q, x, n, scale, zero_point, REAL: tl.constexpr, TILE: tl.constexpr):
    i = flat(TILE)
    v = tl.load(q + i, mask=i < n, other=0)
    store_real(x + i, dequantize(v, zero_point, scale), i < n, REAL)


@triton.jit
def _parameters(scale, zero_point, row, col, n, cols, channels, COLUMNS: tl.constexpr):
    """The scales and zero points of a tile's columns, or of its rows, which go through the channels again and again."""
    if COLUMNS:
        channel = col
        there = col < cols
    else:
        channel = row % channels
        there = row * cols < n
    s = tl.load(scale + channel, mask=there, other=1.0)
    if zero_point is None:
        return s, 0
    else:
        return s, tl.load(zero_point + channel, mask=there, other=0)


@triton.jit
def _quantize_channels(
    x, q, scale, zero_point, n, cols, channels,
    REAL: tl.constexpr, OUT: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    row, col = place(cols, ROWS, SPAN)
    s, zero = _parameters(scale, zero_point, row, col, n, cols, channels, COLUMNS)
    i = row * cols + col
    mask = (col < cols) & (i < n)
    inverse = tl.math.div_rn(tl.full(s.shape, 1.0, tl.float32), s)
    store_output(q + i, load_real(x + i, mask, REAL), mask, inverse, zero, OUT)


@triton.jit
def _dequantize_channels(
    q, x, scale, zero_point, n, cols, channels,
    REAL: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    row, col = place(cols, ROWS, SPAN)
    s, zero = _parameters(scale, zero_point, row, col, n, cols, channels, COLUMNS)
    i = row * cols + col
    mask = (col < cols) & (i < n)
    store_real(x + i, dequantize(tl.load(q + i, mask=mask, other=0), zero, s), mask, REAL)


@triton.jit
def _row_parameters(low, high, OUT: tl.constexpr):
    """(scale, its inverse, zero point) of rows whose numbers, and 0, lie in [low, high]."""
    if OUT == "uint8":
        levels = tl.full(low.shape, 255.0, tl.float32)
        scale = tl.math.div_rn(high - low, levels)
    else:
        levels = tl.full(low.shape, 127.0, tl.float32)
        scale = tl.math.div_rn(tl.maximum(0.0 - low, high), levels)
    tiny = scale < SMALLEST_NORMAL
    scale = tl.where(tiny, 1.0, scale)
    if OUT == "uint8":
        at_low = tl.math.div_rn(tl.where(tiny, 0.0, 0.0 - low), scale)
        zero = rint(tl.where(at_low == at_low, tl.minimum(at_low, 255.0), 0.0))  # inf / inf is NaN
    else:
        zero = tl.zeros(low.shape, tl.int32)
    return scale, tl.math.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale), zero


@triton.jit
def _quantize_rows(
    x, q, scale, zero_point, n, cols,
    REAL: tl.constexpr, OUT: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, SPAN: tl.constexpr,
):  # fmt: skip
    """Each row of `cols` elements by its own range; the last row may be short. WHOLE: SPAN covers a row."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    col = tl.arange(0, SPAN)[None, :]
    there = row * cols < n
    x += row * cols
    q += row * cols
    left = n - row * cols  # elements of the row, or more
    LOW: tl.constexpr = 0 if OUT == "uint8" else -127
    HIGH: tl.constexpr = 255 if OUT == "uint8" else 127
    if WHOLE:
        mask = (col < cols) & (col < left)
        v = load_real(x + col, mask, REAL)
        known = tl.where(v == v, v, 0.0)
        low = tl.minimum(tl.min(known, axis=1, keep_dims=True), 0.0)
        high = tl.maximum(tl.max(known, axis=1, keep_dims=True), 0.0)
        s, inverse, zero = _row_parameters(low, high, OUT)
        tl.store(q + col, requantize(v, inverse, zero, LOW, HIGH).to(q.dtype.element_ty), mask=mask)
    else:
        lows = tl.zeros([ROWS, SPAN], tl.float32)
        highs = tl.zeros([ROWS, SPAN], tl.float32)
        for begin in range(0, cols, SPAN):
            at = begin + col
            v = load_real(x + at, (at < cols) & (at < left), REAL)
            known = tl.where(v == v, v, 0.0)
            lows = tl.minimum(lows, known)
            highs = tl.maximum(highs, known)
        low = tl.min(lows, axis=1, keep_dims=True)
        high = tl.max(highs, axis=1, keep_dims=True)
        s, inverse, zero = _row_parameters(low, high, OUT)
        for begin in range(0, cols, SPAN):
            at = begin + col
            mask = (at < cols) & (at < left)
            v = load_real(x + at, mask, REAL)
            tl.store(q + at, requantize(v, inverse, zero, LOW, HIGH).to(q.dtype.element_ty), mask=mask)
    tl.store(scale + row, s, mask=there)
    if zero_point is not None:
        tl.store(zero_point + row, zero, mask=there)


# ---- launchers ----


def row_shape(cols: int) -> dict[str, int]:
    """The constants of `_quantize_rows`, and its warps: 16 elements a thread, 32 of the longest rows."""
    span = triton.next_power_of_2(cols) if cols <= LONGEST else LONGEST // 2
    rows = max(1, TILE // span)
    return {"WHOLE": cols <= LONGEST, "ROWS": rows, "SPAN": span, "num_warps": max(4, min(8, rows * span // 512))}


def quantize_per_tensor(x: torch.Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    op = "quantize_per_tensor"
    check_real_dtype(op, "x", x.dtype)
    check_byte_dtype(op, "dtype", dtype)
    check_scale(op, "scale", scale)
    check_zero_point(op, "zero_point", zero_point, dtype)
    source = dense(x)
    q = torch.empty_like(source, dtype=dtype)
    if x.numel() > 0:
        with on(x.device):
            _quantize[(triton.cdiv(x.numel(), TILE),)](
                as_bits(source), q, x.numel(), inverse(scale), zero_point, REAL=KINDS[x.dtype], OUT=KINDS[dtype],
                TILE=TILE, **OPTIONS,
            )  # fmt: skip
    return q


def dequantize_per_tensor(x: torch.Tensor, scale: float, zero_point: int, dtype: torch.dtype) -> torch.Tensor:
    op = "dequantize_per_tensor"
    check_byte_dtype(op, "x", x.dtype)
    check_real_dtype(op, "dtype", dtype)
    check_scale(op, "scale", scale)
    check_zero_point(op, "zero_point", zero_point, x.dtype)
    source = dense(x)
    y = torch.empty_like(source, dtype=dtype)
    if x.numel() > 0:
        with on(x.device):
            _dequantize[(triton.cdiv(x.numel(), TILE),)](
                source, as_bits(y), x.numel(), single(scale), zero_point, REAL=KINDS[dtype], TILE=TILE, **OPTIONS
            )
    return y


def _channels(
    op: str, x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int
) -> tuple[torch.Tensor, torch.Tensor, int, bool]:
    """(fp32 scales, int32 zero points, columns of the dense x as rows × columns, whether they go along the columns)."""
    good = -x.dim() <= axis < x.dim()
    check(good, op, f"axis must lie in [{-x.dim()}, {x.dim() - 1}] for x of shape {list(x.shape)}, not {axis}")
    n = x.shape[axis]
    reals, integers = (torch.float32, torch.float64), (torch.int32, torch.int64)
    check_device(op, "scale", scale, x)
    check_device(op, "zero_point", zero_point, x)
    check(scale.dtype in reals, op, f"scale must be float32 or float64, not {name(scale.dtype)}")
    check(zero_point.dtype in integers, op, f"zero_point must be int32 or int64, not {name(zero_point.dtype)}")
    for argument, t in (("scale", scale), ("zero_point", zero_point)):
        good = t.shape == (n,)
        check(good, op, f"{argument} must have shape [{n}], the size of x along axis {axis}, not {list(t.shape)}")
    inner = x.stride(axis) if n > 1 else x.numel()  # elements between one channel and the next
    return scale.float().contiguous(), zero_point.int().contiguous(), n if inner == 1 else inner, inner == 1


def quantize_per_channel(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, dtype: torch.dtype
) -> torch.Tensor:
    op = "quantize_per_channel"
    check_real_dtype(op, "x", x.dtype)
    check_byte_dtype(op, "dtype", dtype)
    source = dense(x)
    s, zero, cols, columns = _channels(op, source, scale, zero_point, axis)
    q = torch.empty_like(source, dtype=dtype)
    if x.numel() > 0:
        shape = tile_shape(cols)
        with on(x.device):
            _quantize_channels[tiles(x.numel() // cols, cols, shape)](
                as_bits(source), q, s, zero, x.numel(), cols, s.numel(), REAL=KINDS[x.dtype], OUT=KINDS[dtype],
                COLUMNS=columns, **shape, **OPTIONS,
            )  # fmt: skip
    return q


def _dequantize_rows(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor | None, cols: int, columns: bool, dtype: torch.dtype
) -> torch.Tensor:
    """Of the dense x, whose last row of `cols` elements may be short."""
    y = torch.empty_like(x, dtype=dtype)
    if x.numel() > 0:
        shape = tile_shape(cols)
        with on(x.device):
            _dequantize_channels[tiles(triton.cdiv(x.numel(), cols), cols, shape)](
                x, as_bits(y), scale, zero_point, x.numel(), cols, scale.numel(), REAL=KINDS[dtype], COLUMNS=columns,
                **shape, **OPTIONS,
            )  # fmt: skip
    return y


def dequantize_per_channel(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, dtype: torch.dtype
) -> torch.Tensor:
    op = "dequantize_per_channel"
    check_byte_dtype(op, "x", x.dtype)
    check_real_dtype(op, "dtype", dtype)
    source = dense(x)
    s, zero, cols, columns = _channels(op, source, scale, zero_point, axis)
    return _dequantize_rows(source, s, zero, cols, columns, dtype)


def _back_in_layout_of(x: torch.Tensor, contiguous: torch.Tensor) -> torch.Tensor:
    """Rows of the logical tensor are rows of memory only when it is contiguous: the output of a copy goes back."""
    return contiguous if x.is_contiguous() else torch.empty_like(x, dtype=contiguous.dtype).copy_(contiguous)


def _quantize_each_row(x: torch.Tensor, q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, cols: int):
    """Of the contiguous x, whose last row may be short."""
    shape = row_shape(cols)
    with on(x.device):
        _quantize_rows[(triton.cdiv(scale.numel(), shape["ROWS"]),)](
            as_bits(x), q, scale, zero, x.numel(), cols, REAL=KINDS[x.dtype], OUT=KINDS[q.dtype], **shape, **OPTIONS
        )


def quantize_per_token(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    op = "quantize_per_token"
    check_real_dtype(op, "x", x.dtype)
    check_byte_dtype(op, "dtype", dtype)
    check(x.dim() >= 1, op, "x must have at least 1 dimension, its tokens run along the last")
    rows = (*x.shape[:-1], 1)
    q = torch.empty(x.shape, dtype=dtype, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    zero = torch.empty(rows, dtype=torch.int32, device=x.device)
    if x.numel() > 0:
        _quantize_each_row(x.contiguous(), q, scale, zero, x.shape[-1])
    elif scale.numel() > 0:  # rows without elements count as zeros
        scale.fill_(1.0)
        zero.fill_(0)
    return _back_in_layout_of(x, q), scale, zero


def dequantize_per_token(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    op = "dequantize_per_token"
    check_byte_dtype(op, "x", x.dtype)
    check_real_dtype(op, "dtype", dtype)
    check(x.dim() >= 1, op, "x must have at least 1 dimension, its tokens run along the last")
    for argument, t, expected in (("scale", scale, torch.float32), ("zero_point", zero_point, torch.int32)):
        check_device(op, argument, t, x)
        check(t.dtype == expected, op, f"{argument} must be {name(expected)}, not {name(t.dtype)}")
        words = f"{argument} must have the shape of x, {list(x.shape)}, with 1 in the last place, not {list(t.shape)}"
        check(t.shape == (*x.shape[:-1], 1), op, words)
    y = _dequantize_rows(x.contiguous(), scale.contiguous(), zero_point.contiguous(), x.shape[-1], False, dtype)
    return _back_in_layout_of(x, y)


def _blocks(op: str, x: torch.Tensor, block_size: int) -> int:
    check(block_size >= 1, op, f"block_size must be at least 1, not {block_size}")
    return triton.cdiv(x.numel(), block_size)


def quantize_per_block(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    op = "quantize_per_block"
    check_real_dtype(op, "x", x.dtype)
    scale = torch.empty(_blocks(op, x, block_size), dtype=torch.float32, device=x.device)
    q = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    if x.numel() > 0:
        _quantize_each_row(x.contiguous(), q, scale, None, min(block_size, x.numel()))
    return _back_in_layout_of(x, q), scale


def dequantize_per_block(x: torch.Tensor, scale: torch.Tensor, block_size: int, dtype: torch.dtype) -> torch.Tensor:
    op = "dequantize_per_block"
    check(x.dtype == torch.int8, op, f"x must be int8, not {name(x.dtype)}")
    check_device(op, "scale", scale, x)
    check(scale.dtype == torch.float32, op, f"scale must be float32, not {name(scale.dtype)}")
    check_real_dtype(op, "dtype", dtype)
    count = _blocks(op, x, block_size)
    words = f"scale must have shape [{count}], one for each block of {block_size}, not {list(scale.shape)}"
    check(scale.shape == (count,), op, words)
    cols = min(block_size, max(1, x.numel()))
    return _back_in_layout_of(x, _dequantize_rows(x.contiguous(), scale.contiguous(), None, cols, False, dtype))
