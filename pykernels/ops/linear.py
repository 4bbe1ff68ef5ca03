"""Linear layers on packed weights, in fp32, bf16, fp16 and int8.

Weights are packed once (`linear_pack`, `int8_linear_pack`) into a uint8 tensor that holds them in the order the
kernels read, with scales, bias and zero-point compensation; its bytes are the same on every isa, so it can be saved
and moved. CUDA devices have an order of their own: pack there. All functions here are for inference and have no
gradient. Leading dimensions of ``x`` are rows; any strides are accepted.

Bad arguments raise ``RuntimeError`` with the argument's name; a packed tensor that is truncated, damaged or made for
other weights is refused. On CUDA devices only its size is looked at, since to read it would be to wait.
"""

from __future__ import annotations

import torch

from pykernels.ops._register import fake
from pykernels.ops.packed import packed_bytes

__all__ = ["int8_linear", "int8_linear_pack", "int8_mm", "linear", "linear_pack"]


def int8_mm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The exact integer product ``a @ b``.

    Args:
        a: [..., M, K], uint8 or int8.
        b: [K, N], int8, any strides. Packed at every call: for constant weights use `int8_linear`.

    Returns:
        [..., M, N], int32. K is at most 65,792, below which no sum can overflow.
    """
    y: torch.Tensor = torch.ops.pykernels.int8_mm(a, b)
    return y


def linear_pack(weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Pack ``weight`` [N, K] (float32, bfloat16 or float16) and ``bias`` [N] for `linear`."""
    packed: torch.Tensor = torch.ops.pykernels.linear_pack(weight, bias)
    return packed


def linear(
    x: torch.Tensor,
    packed: torch.Tensor,
    out_features: int,
    activation: str = "none",
    residual: torch.Tensor | None = None,
    residual_order: str = "before",
) -> torch.Tensor:
    """``activation(x @ weight.T + bias)``, with fp32 sums.

    Args:
        x: [..., K], float32, bfloat16 or float16, as the weights were.
        packed: what `linear_pack` returned; `out_features`: its N.
        activation: a name in `pykernels.ops.names.ACTIVATIONS`; gelu is that with erf.
        residual: [..., N], of any of these dtypes, added before or after the activation as `residual_order` says.

    Returns:
        [..., N] of x's dtype.
    """
    y: torch.Tensor = torch.ops.pykernels.linear(x, packed, out_features, activation, residual, residual_order)
    return y


def int8_linear_pack(
    weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Pack int8 ``weight`` [N, K], symmetric with ``weight_scale`` [N] (float32), and real ``bias`` [N]."""
    packed: torch.Tensor = torch.ops.pykernels.int8_linear_pack(weight, weight_scale, bias)
    return packed


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
    """A linear layer on int8 weights: exact s32 sums, requantized in the same pass.

    Args:
        x: [..., K]. uint8 or int8 with `x_scale` and `x_zero_point`; or float32, bfloat16 or float16, then
            quantized here, per token by each row's own range when `x_scale` is None, else per tensor.
        packed: what `int8_linear_pack` returned; `out_features`: its N.
        out_dtype: float32, bfloat16, float16, uint8 or int8; by default x's for a float x, else float32.
        out_scale, out_zero_point: for an 8-bit `out_dtype`, and only then.
        activation: as for `linear`, applied in fp32 before the result is requantized.

    Returns:
        [..., N] of `out_dtype`.
    """
    y: torch.Tensor = torch.ops.pykernels.int8_linear(
        x, packed, out_features, x_scale, x_zero_point, out_scale, out_zero_point, out_dtype, activation
    )
    return y


# ---- shapes: leading dimensions are kept, the result is contiguous ----


def _rows(x: torch.Tensor, columns: int, dtype: torch.dtype) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], columns), dtype=dtype)


@fake("linear_pack", "int8_linear_pack")
def _(weight: torch.Tensor) -> torch.Tensor:
    return weight.new_empty((packed_bytes(weight),), dtype=torch.uint8)


@fake("int8_mm")
def _(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    torch._check(a.shape[-1] == b.shape[0], lambda: f"int8_mm: a has shape {a.shape}, b {b.shape}")
    return _rows(a, b.shape[1], torch.int32)


@fake("linear")
def _(x: torch.Tensor, out_features: int) -> torch.Tensor:
    return _rows(x, out_features, x.dtype)


@fake("int8_linear")
def _(x: torch.Tensor, out_features: int, out_dtype: torch.dtype | None = None) -> torch.Tensor:
    return _rows(x, out_features, out_dtype or (x.dtype if x.dtype.is_floating_point else torch.float32))
