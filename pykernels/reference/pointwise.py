"""pointwise: functions of real numbers, in fp32, rounded once."""

from __future__ import annotations

import torch

from pykernels.reference.quantize import ACTIVATIONS


def add(a: torch.Tensor, b: torch.Tensor, activation: str = "none") -> torch.Tensor:
    return ACTIVATIONS[activation](a.float() + b.float()).to(a.dtype)


def activate(x: torch.Tensor, activation: str) -> torch.Tensor:
    return ACTIVATIONS[activation](x.float()).to(x.dtype)


def leaky_relu(x: torch.Tensor, negative_slope: float) -> torch.Tensor:
    return torch.where(x > 0, x.float(), x.float() * negative_slope).to(x.dtype)
