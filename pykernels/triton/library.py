"""The CUDA library's int8 GEMM, where it is loaded and its table prefers it to gemm.py's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from pykernels import _tuned

if TYPE_CHECKING:
    from pykernels.triton.gemm import Epilogue

__all__ = ["int8_gemm"]


def int8_gemm(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, epilogue: Epilogue, arch: int) -> bool:
    """Do what `gemm.gemm` does, on a device of compute capability `arch` / 10; False where that is left to it."""
    e, r = epilogue, epilogue.residual
    if a.dtype != torch.uint8 or e.weights is None or not a.is_contiguous() or not b.is_contiguous():
        return False
    dtype = None if r is None else r.dtype
    config = _tuned.int8_gemm(a.shape[0], b.shape[0], a.shape[1], out.dtype, dtype, divmod(arch, 10))
    if config is None:
        return False
    w = e.weights
    tensors = (a, b, out, w.scales, w.sums, w.biases, e.row_scale, e.row_zero_point, *([] if r is None else [r]))
    if any(t is not None and t.data_ptr() % 16 for t in tensors):
        return False
    torch.ops.pykernels._cuda_int8_gemm(
        a, b, out, w.scales, w.sums, w.biases, e.row_scale, e.row_zero_point, e.x_scale, e.x_zero_point, e.out_scale,
        e.out_zero_point, e.activation, r, e.residual_scale, e.residual_zero_point, "after" if e.after else "before",
        config,
    )  # fmt: skip
    return True
