"""Batch norm with fixed statistics, as the affine map it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from pykernels.graph.nodes import constant

__all__ = ["constant_scale_and_shift", "scale_and_shift"]


def scale_and_shift(
    mean: torch.Tensor, var: torch.Tensor, eps: float, gamma: torch.Tensor | None, beta: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """gamma rsqrt(var + eps) and beta - mean scale, in fp64: batch_norm(x) is x scale + shift for each channel."""
    scale = torch.rsqrt(var.double() + eps)
    if gamma is not None:
        scale = scale * gamma.double()
    shift = -mean.double() * scale
    return scale, shift if beta is None else shift + beta.double()


def constant_scale_and_shift(
    module: fx.GraphModule, mean: Any, var: Any, eps: float, gamma: Any, beta: Any
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """`scale_and_shift` of a call in an exported graph; None unless its statistics and parameters are constants."""
    tensors = [None if node is None else constant(module, node) for node in (mean, var, gamma, beta)]
    if any(t is None and node is not None for t, node in zip(tensors, (mean, var, gamma, beta), strict=True)):
        return None
    if tensors[0] is None or tensors[1] is None:
        return None
    return scale_and_shift(tensors[0], tensors[1], eps, *tensors[2:])
