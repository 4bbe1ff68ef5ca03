"""Between real numbers and 8-bit integers, and arithmetic on the integers.

An affine quantized tensor ``q`` (uint8 or int8) stands for the real numbers ``(q - zero_point) * scale``. Quantizing
is ``clamp(rint(x * (1/scale)) + zero_point)``, in fp32, half to even: what ``torch.ops.quantized_decomposed`` computes
in the graphs of PT2E, and the same bits on every isa. Infinities become the ends of the range. NaN becomes the zero
point, the real number 0, on every isa (in torch, converting NaN to an integer is undefined).

Every function takes any shape and any strides. Outputs have the dense layout of their first input (contiguous,
channels_last or any other permutation), as ``torch.empty_like`` gives it. None has a gradient. Bad arguments raise
``RuntimeError`` with the argument's name: scales must be positive, and they and their inverses finite in fp32; zero
points must be values of the quantized dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from pykernels.ops._register import fake
from pykernels.ops._sizes import layout

__all__ = [
    "dequantize_per_block",
    "dequantize_per_channel",
    "dequantize_per_tensor",
    "dequantize_per_token",
    "lookup_table",
    "qadd",
    "qcat",
    "qlookup",
    "qmul",
    "quantize_per_block",
    "quantize_per_channel",
    "quantize_per_tensor",
    "quantize_per_token",
]


def quantize_per_tensor(
    x: torch.Tensor, scale: float, zero_point: int = 0, dtype: torch.dtype = torch.uint8
) -> torch.Tensor:
    """Real ``x`` (float32, bfloat16 or float16) to ``dtype`` (uint8 or int8) with one scale and zero point."""
    q: torch.Tensor = torch.ops.pykernels.quantize_per_tensor(x, scale, zero_point, dtype)
    return q


def dequantize_per_tensor(
    x: torch.Tensor, scale: float, zero_point: int = 0, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Bytes ``x`` (uint8 or int8) to real numbers in ``dtype`` (float32, bfloat16 or float16)."""
    y: torch.Tensor = torch.ops.pykernels.dequantize_per_tensor(x, scale, zero_point, dtype)
    return y


def quantize_per_channel(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, dtype: torch.dtype = torch.int8
) -> torch.Tensor:
    """Real ``x`` to ``dtype`` with a scale and a zero point for every index along ``axis``.

    ``scale`` (float32 or float64) and ``zero_point`` (int32 or int64) have shape ``[x.shape[axis]]``.
    """
    q: torch.Tensor = torch.ops.pykernels.quantize_per_channel(x, scale, zero_point, axis, dtype)
    return q


def dequantize_per_channel(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, axis: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Bytes ``x`` to real numbers; the arguments are those of :func:`quantize_per_channel`."""
    y: torch.Tensor = torch.ops.pykernels.dequantize_per_channel(x, scale, zero_point, axis, dtype)
    return y


def quantize_per_token(
    x: torch.Tensor, dtype: torch.dtype = torch.uint8
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize every row along the last dimension by its own range: ``q``, ``scale`` and ``zero_point``.

    ``x`` [..., K] is float32, bfloat16 or float16; ``scale`` (float32) and ``zero_point`` (int32) are [..., 1].

    - uint8, affine: ``lo = min(0, min x)``, ``hi = max(0, max x)``, ``scale = (hi - lo) / 255``, ``zero_point =
      rint(-lo / scale)``. The real number 0 is exact.
    - int8, symmetric: ``scale = max |x| / 127``, zero point 0, ``q`` in [-127, 127].

    A row whose scale would be below the smallest normal fp32 number counts as zeros and gets scale 1. NaNs are left out
    of the range. A row that holds an infinity gets scale infinity, and dequantizing it yields NaN.
    """
    q, scale, zero_point = torch.ops.pykernels.quantize_per_token(x, dtype)
    return q, scale, zero_point


def dequantize_per_token(
    x: torch.Tensor, scale: torch.Tensor, zero_point: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Undo :func:`quantize_per_token`: ``x`` [..., K], ``scale`` (float32) and ``zero_point`` (int32) [..., 1].

    The values of ``scale`` and ``zero_point`` are used as they are.
    """
    y: torch.Tensor = torch.ops.pykernels.dequantize_per_token(x, scale, zero_point, dtype)
    return y


def quantize_per_block(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric int8 (±127) over blocks of ``block_size`` elements of the flattened ``x``: ``q`` and ``scale``.

    ``q`` has the shape of ``x``; ``scale`` (float32) has shape [ceil(x.numel() / block_size)], by the rules of the int8
    form of :func:`quantize_per_token`. The last block may be short.
    """
    q, scale = torch.ops.pykernels.quantize_per_block(x, block_size)
    return q, scale


def dequantize_per_block(
    x: torch.Tensor, scale: torch.Tensor, block_size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Undo :func:`quantize_per_block`. The values of ``scale`` are used as they are."""
    y: torch.Tensor = torch.ops.pykernels.dequantize_per_block(x, scale, block_size, dtype)
    return y


def qadd(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: float,
    a_zero_point: int,
    b_scale: float,
    b_zero_point: int,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype = torch.uint8,
    activation: str = "none",
) -> torch.Tensor:
    """``activation(a + b)`` of quantized tensors, requantized in the same pass.

    ``a`` and ``b`` are uint8 or int8, each its own; ``b`` has the shape of ``a``, or [N, C, 1, 1] against [N, C, H, W].
    ``activation`` is a name in `pykernels.ops.names.ACTIVATIONS`; gelu is that with erf.
    """
    out: torch.Tensor = torch.ops.pykernels.qadd(
        a, b, a_scale, a_zero_point, b_scale, b_zero_point, out_scale, out_zero_point, out_dtype, activation
    )
    return out


def qmul(
    a: torch.Tensor,
    b: torch.Tensor,
    a_scale: float,
    a_zero_point: int,
    b_scale: float,
    b_zero_point: int,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype = torch.uint8,
) -> torch.Tensor:
    """``a * b`` of quantized tensors, requantized in the same pass.

    ``b`` has the shape of ``a``, or [N, C, 1, 1] against [N, C, H, W]: the gate of a squeeze-and-excitation block.
    """
    out: torch.Tensor = torch.ops.pykernels.qmul(
        a, b, a_scale, a_zero_point, b_scale, b_zero_point, out_scale, out_zero_point, out_dtype
    )
    return out


def qcat(
    xs: Sequence[torch.Tensor],
    scales: Sequence[float],
    zero_points: Sequence[int],
    dim: int,
    out_scale: float,
    out_zero_point: int,
    out_dtype: torch.dtype = torch.uint8,
) -> torch.Tensor:
    """Concatenate quantized tensors along ``dim``, each requantized to the output's scale and zero point.

    An input that has the output's scale, zero point and dtype already is copied. The output is channels_last when the
    first input is, else contiguous.
    """
    out: torch.Tensor = torch.ops.pykernels.qcat(
        list(xs), list(scales), list(zero_points), dim, out_scale, out_zero_point, out_dtype
    )
    return out


def qlookup(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """``table[x]``: any function of a quantized tensor in one pass; :func:`lookup_table` makes the table.

    ``x`` is uint8 or int8; ``table`` is uint8 or int8 of shape [256], indexed by the byte of ``x``: an int8 -1 finds
    entry 255. The output has the dtype of ``table``.
    """
    out: torch.Tensor = torch.ops.pykernels.qlookup(x, table)
    return out


def lookup_table(
    fn: Callable[[torch.Tensor], torch.Tensor],
    x_scale: float,
    x_zero_point: int,
    out_scale: float,
    out_zero_point: int,
    dtype: torch.dtype = torch.uint8,
    x_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """The table with which :func:`qlookup` applies ``fn`` (say ``torch.nn.functional.hardswish``) to quantized tensors.

    ``fn`` is called once, on the 256 real numbers that ``x_dtype`` (``dtype`` by default) with ``x_scale`` and
    ``x_zero_point`` can mean; what it returns is quantized to ``dtype`` with ``out_scale`` and ``out_zero_point``.
    """
    every_byte = torch.arange(256, dtype=torch.uint8).view(x_dtype or dtype)
    values = fn(dequantize_per_tensor(every_byte, x_scale, x_zero_point))
    if values.shape != every_byte.shape:
        raise ValueError(
            f"lookup_table: fn must work element by element: it turned shape [256] into {list(values.shape)}"
        )
    return quantize_per_tensor(values.to(torch.float32), out_scale, out_zero_point, dtype)


# ---- shapes: outputs keep the dense layout of their (first) input, as torch.empty_like does ----


def _like(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_like(x, dtype=dtype)


def _per_row(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], 1), dtype=dtype)


@fake(
    "quantize_per_tensor",
    "dequantize_per_tensor",
    "quantize_per_channel",
    "dequantize_per_channel",
    "dequantize_per_token",
    "dequantize_per_block",
)
def _(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return _like(x, dtype)


@fake("quantize_per_token")
def _(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return _like(x, dtype), _per_row(x, torch.float32), _per_row(x, torch.int32)


@fake("quantize_per_block")
def _(x: torch.Tensor, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    return _like(x, torch.int8), x.new_empty(((x.numel() + block_size - 1) // block_size,), dtype=torch.float32)


@fake("qadd", "qmul")
def _(a: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
    return _like(a, out_dtype)


@fake("qcat")
def _(xs: list[torch.Tensor], dim: int, out_dtype: torch.dtype) -> torch.Tensor:
    first = xs[0]
    size = list(first.shape)
    size[dim] = sum(x.shape[dim] for x in xs)
    return torch.empty(size, dtype=out_dtype, device=first.device, memory_format=layout(first))


@fake("qlookup")
def _(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    return _like(x, table.dtype)
