"""What is left to do, in one pass over memory, behind a float GEMM or convolution of cuBLAS or cuDNN."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from pykernels.cuda.triton import tiles
from pykernels.cuda.triton.arguments import KINDS, as_bits, ceil_div, check_device, check_real_dtype
from pykernels.cuda.triton.epilogue import OPTIONS, finish
from pykernels.cuda.triton.reals import load_real
from pykernels.cuda.triton.tiles import check

__all__ = ["check_residual", "finish_floats"]


@triton.jit(do_not_specialize=["M"])
def _finish_floats(
    y, biases, residual, M, N,
    REAL: tl.constexpr, ACTIVATION: tl.constexpr, RESIDUAL: tl.constexpr, AFTER: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    place = m.to(tl.int64)[:, None] * N + n[None, :]
    mask = (m < M)[:, None] & (n < N)[None, :]
    f = load_real(y + place, mask, REAL) + tl.load(biases + n, mask=n < N, other=0.0)[None, :]
    finish(f, residual, y, place, mask, 1.0, 0, 1.0, 0, ACTIVATION, RESIDUAL, AFTER, REAL)


def shape_of(n: int) -> dict[str, int]:
    """A tile of 4096 elements, as wide as rows of n are, up to 512."""
    bn = min(512, max(16, triton.next_power_of_2(n)))
    return {"BM": 4096 // bn, "BN": bn}


def finish_floats(
    y: torch.Tensor, biases: torch.Tensor, activation: str, residual: torch.Tensor | None, after: bool
) -> None:
    """y = activation(y + bias + residual), in place, or with `after` the residual behind the activation.

    A 16-bit y is rounded twice, as the product that cuBLAS or cuDNN stored and as the result, where the CPU's ops round
    once: without an activation it is off by up to u * (abs(product) + abs(result)), u = 2^-8 for bfloat16 and 2^-11 for
    float16. cuBLAS could leave fp32, for 10 bytes moved an element instead of 6; cuDNN, through torch, could not.

    Args:
        y: [M, N], contiguous, float32, bfloat16 or float16; residual: of its shape, contiguous, any of these dtypes.
        biases: [N], float32.
    """
    m, n = y.shape
    if y.numel() == 0:
        return
    shape = shape_of(n)
    with tiles.on(y.device):
        _finish_floats[(ceil_div(m, shape["BM"]), ceil_div(n, shape["BN"]))](
            as_bits(y), biases, None if residual is None else as_bits(residual), m, n, REAL=KINDS[y.dtype],
            ACTIVATION=activation, RESIDUAL=None if residual is None else KINDS[residual.dtype], AFTER=after,
            **shape, num_warps=4, **OPTIONS,
        )  # fmt: skip


def check_residual(op: str, residual: torch.Tensor | None, x: torch.Tensor, shape: Sequence[int], order: str) -> bool:
    """Checks a float residual for an output of this shape; whether it is added after the activation."""
    check_residual_shape(op, residual, x, shape, order)
    if residual is not None:
        check_real_dtype(op, "residual", residual.dtype)
    return order == "after"


def check_residual_shape(
    op: str, residual: torch.Tensor | None, x: torch.Tensor, shape: Sequence[int], order: str
) -> None:
    words = f"residual_order must be 'before' or 'after' the activation, not '{order}'"
    check(order in ("before", "after"), op, words)
    if residual is not None:
        check_device(op, "residual", residual, x)
        words = f"residual must have the output's shape {list(shape)}, not {list(residual.shape)}"
        check(list(residual.shape) == list(shape), op, words)
