"""Normalizations over one dimension: softmax and layer norm of real numbers.

``x`` is float32, bfloat16 or float16, computed in fp32 and rounded once; outputs are contiguous. None has a gradient.
Bad arguments raise ``RuntimeError`` with the argument's name. Results are the same bits on every isa.
"""

from __future__ import annotations

import torch

from pykernels.ops._register import fake

__all__ = ["layer_norm", "softmax"]


def softmax(x: torch.Tensor, dim: int = -1) -> torch.Tensor:
    """``exp(x - max) / sum(exp(x - max))`` along ``dim``."""
    out: torch.Tensor = torch.ops.pykernels.softmax(x, dim)
    return out


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension of ``x`` [..., C].

    ``weight`` and ``bias`` are float32 [C], whatever the dtype of ``x``.
    """
    out: torch.Tensor = torch.ops.pykernels.layer_norm(x, weight, bias, eps)
    return out


@fake("softmax", "layer_norm")
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)
