"""Pointwise functions of real numbers: what stands in a network with no layer before it to take it.

Inputs are float32, bfloat16 or float16 of any shape and strides, computed in fp32 and rounded once to the dtype that
they have. Outputs have the dense layout of the first input, as ``torch.empty_like`` gives it. None has a gradient. Bad
arguments raise ``RuntimeError`` with the argument's name. Results are the same bits on every isa.
"""

from __future__ import annotations

import torch

from pykernels.ops._register import fake

__all__ = ["activate", "add", "leaky_relu"]


def add(a: torch.Tensor, b: torch.Tensor, activation: str = "none") -> torch.Tensor:
    """``activation(a + b)``; ``b`` has the dtype of ``a`` and its shape, or is [N, C, 1, 1] against [N, C, H, W]."""
    out: torch.Tensor = torch.ops.pykernels.add(a, b, activation)
    return out


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    """``activation(x)``: a name in `pykernels.ops.names.ACTIVATIONS`; gelu is that with erf."""
    out: torch.Tensor = torch.ops.pykernels.activate(x, activation)
    return out


def leaky_relu(x: torch.Tensor, negative_slope: float = 0.01) -> torch.Tensor:
    """``x`` where it is positive, else ``x * negative_slope``."""
    out: torch.Tensor = torch.ops.pykernels.leaky_relu(x, negative_slope)
    return out


@fake("activate", "leaky_relu")
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@fake("add")
def _(a: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(a)
