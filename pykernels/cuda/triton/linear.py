"""Linear layers on CUDA tensors: int8_mm and int8_linear by gemm.py, float ones by cuBLAS and an epilogue."""

from __future__ import annotations

import torch

from pykernels.cuda.triton.arguments import (
    BYTES,
    check_activation,
    check_byte_dtype,
    check_device,
    check_dim,
    check_real_dtype,
    check_scale,
    check_zero_point,
    name,
)
from pykernels.cuda.triton.floats import check_residual, finish_floats
from pykernels.cuda.triton.gemm import Epilogue, gemm, rows16
from pykernels.cuda.triton.pack import MAX_REDUCTION, checked_packed, cuda_layout
from pykernels.cuda.triton.quantize import quantize_per_tensor, quantize_per_token
from pykernels.cuda.triton.tiles import check
from pykernels.ops.dtypes import ANY_WORDS, REALS

__all__ = ["check_out", "int8_linear", "int8_mm", "linear"]


def check_out(op: str, dtype: torch.dtype, scale: float | None, zero_point: int) -> None:
    """An output's dtype, and the scale that 8-bit ones must have and others must not."""
    check(dtype in (*BYTES, *REALS), op, f"out_dtype must be {ANY_WORDS}, not {name(dtype)}")
    if dtype not in BYTES:
        check(scale is None, op, f"out_scale makes no sense for out_dtype {name(dtype)}")
        return
    if scale is None:
        check(False, op, f"out_scale is required for out_dtype {name(dtype)}")
    else:
        check_scale(op, "out_scale", scale)
    check_zero_point(op, "out_zero_point", zero_point, dtype)


def int8_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """See `pykernels.ops.linear.int8_mm`."""
    op = "int8_mm"
    check_byte_dtype(op, "a", a.dtype)
    check_device(op, "b", b, a)
    check(b.dtype == torch.int8, op, f"b must be int8, not {name(b.dtype)}")
    check(a.dim() >= 2, op, f"a must have at least 2 dimensions, not shape {list(a.shape)}")
    check_dim(op, "b", b, 2)
    (k, n), columns = b.shape, a.shape[-1]
    words = f"a has {columns} columns (shape {list(a.shape)}) but b has {k} rows (shape {list(b.shape)})"
    check(k == columns, op, words)
    words = f"b sums more than {MAX_REDUCTION} products to one output, which s32 cannot hold"
    check(k <= MAX_REDUCTION, op, words)
    out = a.new_empty((*a.shape[:-1], n), dtype=torch.int32)
    if out.numel() == 0:
        return out
    sums = None if a.dtype == torch.int8 else b.sum(0, dtype=torch.int32)
    gemm(rows16(a), rows16(b.t()), out, Epilogue(sums=sums))
    return out


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_order: str = "before",
) -> torch.Tensor:
    """See `pykernels.ops.linear.linear`.

    cuBLAS multiplies, and adds the bias and applies relu in the same pass; what else there is to do is a second one.
    """
    op = "linear"
    check_real_dtype(op, "x", x.dtype)
    check(x.dim() >= 1, op, "x must have at least 1 dimension")
    k, shape = x.shape[-1], (*x.shape[:-1], out_features)
    weights = checked_packed(op, packed, x, cuda_layout(x.dtype, 1, out_features, k))
    check_activation(op, activation)
    after = check_residual(op, residual, x, shape, residual_order)
    rows, weight = x.reshape(x.shape[:-1].numel(), k), weights.rows[:, :k].t()
    if residual is None and activation in ("none", "relu") and k > 0:  # without a K, cuBLAS leaves relu out
        bias = weights.biases.to(x.dtype)
        relu = activation == "relu"
        y = torch._addmm_activation(bias, rows, weight) if relu else torch.addmm(bias, rows, weight)
    else:
        y = rows @ weight
        flat = None if residual is None else residual.reshape(y.shape).contiguous()
        finish_floats(y, weights.biases, activation, flat, after)
    return y.view(shape)


def int8_linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    x_scale: float | None = None,
    x_zero_point: int = 0,
    out_scale: float | None = None,
    out_zero_point: int = 0,
    out_dtype: torch.dtype | None = None,
    activation: str = "none",
) -> torch.Tensor:
    """See `pykernels.ops.linear.int8_linear`."""
    op = "int8_linear"
    floating = x.dtype in REALS
    good = floating or x.dtype in BYTES
    check(good, op, f"x must be {ANY_WORDS}, not {name(x.dtype)}")
    check(x.dim() >= 1, op, "x must have at least 1 dimension")
    check(floating or x_scale is not None, op, f"x_scale is required for {name(x.dtype)} x")
    layout = cuda_layout(torch.int8, 1, out_features, x.shape[-1])
    weights = checked_packed(op, packed, x, layout)
    check_activation(op, activation)
    dtype = out_dtype or (x.dtype if floating else torch.float32)
    check_out(op, dtype, out_scale, out_zero_point)
    row_scale = row_zero_point = None
    if x_scale is not None:
        check_scale(op, "x_scale", x_scale)
        check_zero_point(op, "x_zero_point", x_zero_point, torch.uint8 if floating else x.dtype)
        if floating:
            x = quantize_per_tensor(x, x_scale, x_zero_point, torch.uint8)
    else:
        x, row_scale, row_zero_point = quantize_per_token(x, torch.uint8)
    out = x.new_empty((*x.shape[:-1], out_features), dtype=dtype)
    epilogue = Epilogue(
        weights=weights,
        activation=activation,
        x_scale=1.0 if x_scale is None else x_scale,
        x_zero_point=x_zero_point,
        row_scale=row_scale,
        row_zero_point=row_zero_point,
        out_scale=1.0 if out_scale is None else out_scale,
        out_zero_point=out_zero_point,
    )
    gemm(rows16(x), weights.rows, out, epilogue)
    return out
