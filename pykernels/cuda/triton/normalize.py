"""softmax and layer_norm, see pykernels/ops/normalize.py: ATen's kernels, which are good ones, behind our checks."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pykernels.cuda.triton.arguments import check_device, check_real_dtype, name
from pykernels.cuda.triton.tiles import check

__all__ = ["layer_norm", "softmax"]


def softmax(x: torch.Tensor, dim: int) -> torch.Tensor:
    op, dims = "softmax", x.dim()
    check_real_dtype(op, "x", x.dtype)
    words = f"dim must lie in [{-dims}, {dims - 1}] for x of shape {list(x.shape)}, not {dim}"
    check(-dims <= dim < dims, op, words)
    return torch.softmax(x.contiguous(), dim)


def layer_norm(x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, eps: float) -> torch.Tensor:
    op = "layer_norm"
    check_real_dtype(op, "x", x.dtype)
    check(x.dim() >= 1, op, "x must have a dimension")
    for argument, t in (("weight", weight), ("bias", bias)):
        if t is not None:
            check_device(op, argument, t, x)
            words = f"{argument} must be float32 of shape [{x.shape[-1]}]"
            fits = t.dtype == torch.float32 and t.shape == x.shape[-1:]
            check(fits, op, f"{words}, not {name(t.dtype)} {list(t.shape)}")
    return F.layer_norm(x.contiguous().float(), x.shape[-1:], weight, bias, eps).to(x.dtype)
